"""Trading-v0: fills by hand and against an account in shares and cash, masks, limits, what observations show, no leaks."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from conftest import (
    BURDENS,
    DEAR,
    FILLS,
    assert_same_bits,
    make_env,
    ragged_panel,
    ragged_with_series,
    random_actions,
    rollout,
    tampered,
    trading_data,
    whole,
)
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.costs import (
    EQUITY,
    GROSS_EXPOSURE,
    GROSS_RETURN,
    INTEREST,
    NET_RETURN,
    RUIN,
    TURNOVER,
    account_step,
    combine_records,
    load_costs,
)
from envs.episodes import DSR_BARS, DSR_RATE, RATE
from envs.features import REGIME_FEATURES
from envs.panel import Panel, PanelError, Split
from envs.synthetic import make_panel
from envs.trading import (
    ADD,
    BREAKER,
    BUY_LARGE,
    BUY_MEDIUM,
    BUY_SMALL,
    COMPONENTS,
    DAILY_LOSS,
    DELISTING,
    EVENTS,
    EXPOSURE,
    HOLD,
    MAX_HOLD,
    NO_EVENT,
    ORDERS,
    REWARDS,
    SELL_ALL,
    SELL_PART,
    STOP,
    TARGET,
    TradingVectorEnv,
)
from envs.trading_tables import DELIST_AFTER, PORTFOLIO, POSITION, WARMUP, TradingConfig, TradingData

CALM = (100.0, 100.0, 100.0, 100.0)
LEVELS = {"stop_loss": 0.05, "take_profit": 0.10}


def scripted(bars, hours: int = 24, fields=("open", "high", "low")) -> Panel:
    """Symbol A: WARMUP + 1 bars at 100, then `bars` of (open, high, low, close) or None; symbol B always has a bar."""
    rows = [CALM] * (WARMUP + 1) + [bar or (np.nan,) * 4 for bar in bars]
    prices = np.array(rows).T
    table = {name: np.stack([prices[k], np.full(len(rows), 100.0)], axis=1) for k, name in enumerate(("open", "high", "low"))}
    return Panel(
        name="scripted",
        timestamps=np.datetime64("2024-01-01", "ns") + np.arange(len(rows)) * np.timedelta64(hours, "h"),
        symbols=("A", "B"),
        close=np.stack([prices[3], np.full(len(rows), 100.0)], axis=1),
        **{name: table[name] for name in fields},
    )


def play(bars, orders, costs="zero", hours=24, fields=("open", "high", "low"), **config):
    """Steps of one market over scripted bars: per step (event, equity, weight, turnover, order executed)."""
    panel = scripted(bars, hours, fields)
    data = TradingData(panel, TradingConfig(costs=costs, **config), ("A",))
    env = make_env(data, split=whole(panel), episode_length=0, random_start=False)
    env.reset(seed=0)
    steps = []
    for order in orders:
        infos = env.step(np.array([order]))[4]
        record, components = infos["record"][0], infos["components"]
        assert infos["decided_at"][0] == WARMUP + len(steps)
        steps.append(
            (int(components["event"][0]), record[EQUITY], env._memory[0, 0], record[TURNOVER], int(infos["choice"][0]))
        )
    return steps


def events(steps):
    return [step[0] for step in steps]


def equities(steps):
    return pytest.approx([step[1] for step in steps], rel=1e-12)


# --- Gymnasium


@pytest.fixture(scope="module")
def ou_data() -> TradingData:
    return TradingData(make_panel("synthetic:ou:bars=400:train=2:val=1:test=2:assets=3", 0))


def test_single_env_passes_gymnasiums_checker(ou_data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gym.make("Trading-v0", data=ou_data).unwrapped)
    assert not [str(w.message) for w in caught if "infinity" not in str(w.message)]


def test_make_vec_gives_the_native_vector_env(ou_data):
    env = gym.make_vec("Trading-v0", num_envs=7, data=ou_data)
    assert isinstance(env.unwrapped, TradingVectorEnv)
    obs, infos = env.reset(seed=0)
    assert env.observation_space.contains(obs) and infos["action_mask"].shape == (7, len(ORDERS))
    assert infos["symbol"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    obs, _, _, _, infos = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs) and infos["symbol"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_bad_arguments_are_named(ou_data):
    for options, said in (
        ({"reward_weights": {"profit": 1.0}}, "reward_weights.*pnl"),
        ({"first_market": -1}, "first_market=-1"),
        ({"window": 3}, "window.*TradingConfig"),
        ({"split": "future"}, "split='future'"),
    ):
        with pytest.raises(ValueError, match=said):
            make_env(ou_data, **options)
    for symbols, said in (
        (("S01", "S9"), r"unknown \['S9'\].*"),
        (("S01", "S01"), "'S01', 'S01'.*"),
        ((), ".*"),
        ("S01", "'S01'.*"),
    ):
        with pytest.raises(PanelError, match=rf"symbols=.*{said}expected different ones of .*\['S00', 'S01', 'S02'\]"):
            TradingData(ou_data.panel, symbols=symbols)


@pytest.mark.parametrize(
    "field, value",
    [
        ("fill", "yesterday"), ("window", 0), ("max_adds", -1),
        ("sizes", (0.5, 0.25, 1.0)), ("sizes", (0.0, 0.5, 1.0)), ("sizes", (0.5, 0.7, 1.1)), ("sizes", (0.5, 1.0)),
        ("part", 0.0), ("part", 1.0), ("add", 0.0), ("add", 1.1), ("stop_loss", -0.1), ("stop_loss", 1.0),
        ("take_profit", -0.1), ("max_holding", -1), ("max_position", 0.0), ("max_position", 1.1), ("max_exposure", 0.9),
        ("max_exposure", 1.1), ("daily_loss", 0.0), ("daily_loss", 1.0), ("max_drawdown", 0.0), ("max_drawdown", 1.0),
        ("breaker_bars", 0), ("target_volatility", 0.0), ("sizes", (np.nan, 0.5, 1.0)),
        *((field, np.nan) for field in ("part", "add", "stop_loss", "take_profit", "max_position", "max_exposure",
                                        "daily_loss", "max_drawdown", "target_volatility")),
        ("take_profit", np.inf), ("target_volatility", np.inf),
    ],
)  # fmt: skip
def test_bad_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        TradingConfig(**{field: value})


def test_sizes_must_fit_the_largest_position():
    with pytest.raises(ValueError, match=r"sizes=.*the first at most max_position=0.2"):
        TradingConfig(max_position=0.2)


# --- fills by hand; bought at 100, at the open of the first bar, with everything


@pytest.mark.parametrize(
    "bar, event, equity",
    [
        ((99, 101, 96, 97), NO_EVENT, 0.97),
        ((99, 100, 94, 97), STOP, 0.95),
        ((99, 100, 95, 99), STOP, 0.95),  # the low is the level
        ((101, 112, 100, 108), TARGET, 1.10),
        ((90, 98, 88, 97), STOP, 0.90),  # opens below: there
        ((95, 99, 95, 98), STOP, 0.95),
        ((115, 118, 112, 113), TARGET, 1.15),  # opens above: better than the level
        ((100, 111, 94, 105), STOP, 0.95),  # both touched
        ((112, 113, 90, 91), TARGET, 1.12),  # but a gap comes first
        ((94, 120, 93, 119), STOP, 0.94),
    ],
)
@pytest.mark.parametrize("order", (HOLD, SELL_ALL, SELL_PART))
def test_exits_of_a_position_that_is_held(bar, event, equity, order):
    """Under next_open an order fills at the open, unless that is beyond a level: then the position is closed instead."""
    steps = play([CALM, bar, CALM], [BUY_LARGE, order], **LEVELS)
    gap = bar[0] <= 95 or bar[0] >= 110
    assert steps[0] == (NO_EVENT, 1.0, 1.0, 1.0, BUY_LARGE)
    if order == HOLD or gap:
        assert events(steps)[1] == event and steps[1][1] == pytest.approx(equity, rel=1e-12)
        assert steps[1][2] == (0.0 if event else 1.0) and steps[1][3] == (1.0 if event else 0.0)
    elif order == SELL_ALL:
        assert events(steps)[1] == NO_EVENT and steps[1][1] == pytest.approx(bar[0] / 100, rel=1e-12)
    else:  # half at the open, half at the exit or the close
        last = equity if event else bar[3] / 100
        assert events(steps)[1] == event and steps[1][1] == pytest.approx((bar[0] / 100 + last) / 2, rel=1e-12)
        assert steps[1][3] == pytest.approx(0.5 + (last / (last + bar[0] / 100) if event else 0.0))


@pytest.mark.parametrize(
    "bar, event, equity",
    [((100, 101, 94, 97), STOP, 0.95), ((100, 112, 96, 97), TARGET, 1.10), ((100, 112, 94, 97), STOP, 0.95)],
)
def test_a_position_can_be_closed_in_the_bar_that_opened_it(bar, event, equity):
    steps = play([bar, CALM], [BUY_LARGE, HOLD], **LEVELS)
    assert steps[0][:4] == (event, pytest.approx(equity, rel=1e-12), 0.0, 2.0)
    assert steps[1][:4] == (NO_EVENT, pytest.approx(equity, rel=1e-12), 0.0, 0.0)


def test_half_a_position_loses_half_of_it_and_money_adds_up_at_any_cost():
    steps = play([CALM, (99, 100, 94, 97), CALM], [BUY_MEDIUM, HOLD], **LEVELS)
    assert steps[1][:3] == (STOP, pytest.approx(0.975, rel=1e-12), 0.0)
    steps = play([CALM, (99, 100, 94, 97), CALM], [BUY_LARGE, HOLD], costs="zero:commission_bps=100", **LEVELS)
    bought = 1 / 1.01  # what is left after a cost of 1% of itself
    assert equities(steps) == [bought, bought * 0.95 * 0.99]


def test_next_close_runs_the_bar_before_the_order():
    """Bought at the close of the first bar, whose low is no matter; the second closes it before the sale or the addition."""
    bars = [(100, 120, 80, 100), (99, 100, 94, 97), CALM, CALM]
    for order in (HOLD, SELL_ALL, ADD):
        steps = play(bars, [BUY_MEDIUM, order, HOLD], fill="next_close", **LEVELS)
        assert events(steps) == [NO_EVENT, STOP, NO_EVENT] and [step[2] for step in steps[1:]] == [0.0, 0.0]
        assert equities(steps) == [1.0, 0.975, 0.975]
    steps = play(bars, [BUY_MEDIUM, HOLD, BUY_LARGE], fill="next_close", stop_loss=0.07)
    assert equities(steps) == [1.0, 0.985, 1.0]
    gap = play([CALM, (90, 98, 88, 97), CALM], [BUY_LARGE, HOLD], fill="next_close", **LEVELS)
    assert gap[1][:2] == (STOP, pytest.approx(0.90, rel=1e-12))


def test_same_close_runs_the_whole_next_bar_after_the_order():
    for bar, event, equity in (
        ((90, 98, 88, 97), STOP, 0.90), ((115, 118, 112, 113), TARGET, 1.15), ((99, 100, 94, 97), STOP, 0.95),
        ((100, 111, 94, 105), STOP, 0.95), ((99, 101, 98, 99), NO_EVENT, 0.99),
    ):  # fmt: skip
        steps = play([bar, CALM], [BUY_LARGE], fill="same_close", **LEVELS)
        assert steps[0][:2] == (event, pytest.approx(equity, rel=1e-12))
        steps = play([CALM, bar, CALM], [BUY_LARGE, SELL_ALL], fill="same_close", **LEVELS)
        assert steps[1][:3] == (NO_EVENT, pytest.approx(1.0, rel=1e-12), 0.0), "sold before the bar"


@pytest.mark.parametrize("fill, orders", (("next_close", [BUY_LARGE, HOLD]), ("same_close", [HOLD, BUY_LARGE])))
def test_without_opens_the_close_is_the_only_price(fill, orders):
    for fields in ((), ("high", "low")):
        for close, event in ((94.0, STOP), (112.0, TARGET), (96.0, NO_EVENT)):
            steps = play([CALM, (100, 130, 60, close), CALM], orders, fill=fill, fields=fields, **LEVELS)
            assert steps[1][:2] == (event, pytest.approx(close / 100, rel=1e-12))
    bar = (100, 130, 60, 96)
    assert play([CALM, bar, CALM], [BUY_LARGE, HOLD], fields=("open",), **LEVELS)[1][0] == NO_EVENT
    assert play([CALM, bar, CALM], [BUY_LARGE, HOLD], fields=("open", "low"), **LEVELS)[1][0] == STOP


def test_nothing_fills_in_a_halt_and_the_stop_fills_at_the_open_after_it():
    bars = [CALM, None, None, (90, 98, 88, 97), CALM]
    steps = play(bars, [BUY_LARGE, SELL_ALL, SELL_ALL, HOLD], **LEVELS)
    assert events(steps) == [NO_EVENT, NO_EVENT, NO_EVENT, STOP]
    assert [step[2] for step in steps] == [1.0, 1.0, 1.0, 0.0] and equities(steps) == [1.0, 1.0, 1.0, 0.9]
    assert [step[4] for step in steps] == [BUY_LARGE, SELL_ALL, HOLD, HOLD], "without a bar now nothing can be ordered"
    void = play([None, CALM, CALM], [BUY_LARGE, HOLD])
    assert [step[2] for step in void] == [0.0, 0.0], "the order does not wait"
    assert play(bars, [BUY_LARGE, HOLD, HOLD, HOLD])[3][:2] == (NO_EVENT, pytest.approx(0.97, rel=1e-12))


@pytest.mark.parametrize("fill, at", (("next_open", 11), ("next_close", 11), ("same_close", 12)))
def test_a_delisted_position_is_closed_at_its_last_price(fill, at):
    """Once more than DELIST_AFTER bars are missing; then the run ends, though the range does not."""
    panel = scripted([CALM, (101, 104, 100, 103)] + [None] * 30)
    data = TradingData(panel, TradingConfig(costs="zero:commission_bps=10", fill=fill), ("A",))
    env = make_env(data, split=whole(panel), episode_length=0, random_start=False)
    env.reset(seed=0)
    assert DELIST_AFTER == 10
    steps = [env.step(np.array([BUY_LARGE])) for _ in range(DELIST_AFTER + 4)]
    found = [int(step[4]["components"]["event"][0]) for step in steps]
    assert found == [DELISTING if n == 1 + at else NO_EVENT for n in range(len(found))]
    assert [bool(step[3][0]) for step in steps] == [False] * (len(steps) - 1) + [True], "truncated, one bar later at most"
    price = {"next_open": 1.0, "next_close": 1.0, "same_close": 1.0}[fill]
    assert steps[-1][4]["record"][0, EQUITY] == pytest.approx(1.03 / price * (1 / 1.001) * 0.999, rel=1e-12)


@pytest.mark.parametrize("fill, bars", (("next_open", 3), ("next_close", 4), ("same_close", 3)))
def test_maximum_holding_time(fill, bars):
    """Held over three bars, then closed at the next fill, whatever the agent orders; the count starts anew."""
    prices = [(100 + n,) * 4 for n in range(12)]
    steps = play(prices, [BUY_LARGE, *[HOLD] * 2, ADD, *[HOLD] * 2, BUY_LARGE, *[HOLD] * 4], fill=fill, max_holding=3)
    found = [n for n, event in enumerate(events(steps)) if event]
    assert found == [bars, 6 + bars] and set(events(steps)) == {NO_EVENT, MAX_HOLD}
    assert steps[bars][2] == 0.0 and steps[bars - 1][2] == 1.0


def test_a_forced_exit_waits_for_a_bar():
    steps = play([CALM, CALM, None, CALM, CALM], [BUY_LARGE, HOLD, HOLD, HOLD], max_holding=2)
    assert events(steps) == [NO_EVENT, NO_EVENT, NO_EVENT, MAX_HOLD]
    bars = [CALM, (90,) * 4, None, None, (90,) * 4, (80,) * 4]
    for limit, event in (({"daily_loss": 0.05}, DAILY_LOSS), ({"max_drawdown": 0.05}, BREAKER)):
        steps = play(bars, [BUY_LARGE, *[HOLD] * 4], **limit)
        assert events(steps) == [NO_EVENT] * 4 + [event] and steps[4][2] == 0.0, "though the day has passed"


def test_additions_average_in_and_their_number_is_limited():
    """In shares and cash: 25% at 100, 25% more of equity at 110, then the stop 5% below the average price."""
    bars = [CALM, (110, 110, 110, 110), (110, 110, 110, 110), (100, 100, 90, 95), CALM]
    steps = play(bars, [BUY_SMALL, ADD, ADD, HOLD], stop_loss=0.05, max_adds=1)
    assert [step[4] for step in steps] == [BUY_SMALL, ADD, HOLD, HOLD]
    shares, cash = 0.25 / 100, 0.75
    equity = cash + 110 * shares
    more = 0.25 * equity / 110
    average = (100 * shares + 110 * more) / (shares + more)
    assert steps[1][2] == pytest.approx((shares + more) * 110 / equity, rel=1e-12)
    cash, shares = cash - 110 * more, shares + more
    assert 0.95 * average < 100, "the bar does not open below the stop"
    assert steps[3][:2] == (STOP, pytest.approx(cash + shares * 0.95 * average, rel=1e-12))


def test_an_addition_never_exceeds_the_largest_position():
    """Allowed at the close; the price rises to the open, and the order with it: only what fits is bought, or nothing."""
    for up, weight in ((1.2, 0.6), (5.0, 5 * 0.35 / (5 * 0.35 + 0.65))):
        bars = [(100, 100, 100, 100), (100 * up,) * 4, CALM]
        steps = play(bars, [BUY_SMALL, ADD], sizes=(0.35, 0.5, 0.6), max_position=0.6, add=0.25)
        assert steps[1][4] == ADD and steps[1][2] == pytest.approx(weight, rel=1e-12)
        assert (steps[1][3] == 0.0) == (up == 5.0)


def test_partial_sale_and_hold_count_by_the_weight_at_the_fill():
    bars = [CALM, (125, 125, 125, 125), (100, 100, 100, 100), CALM]
    steps = play(bars, [BUY_MEDIUM, SELL_PART, HOLD], part=0.4)
    value = 0.5 * 1.25
    assert steps[1][2] == pytest.approx(0.6 * value / (0.5 + value), rel=1e-12)
    assert steps[2][3] == 0.0 and steps[2][1] == pytest.approx(0.5 + 0.4 * value + 0.6 * 0.5, rel=1e-12)


# --- risk limits by hand


def test_daily_loss_closes_and_forbids_to_buy_until_the_next_day():
    """Six bars a day of four hours. The day's start is the last mark of the day before."""
    first = (WARMUP + 1) % 6
    assert first == 1, "the first scripted bar is the second of its day"
    falls = [(100,) * 4, (98,) * 4, (94,) * 4, (93,) * 4, (93,) * 4, (93,) * 4, (93,) * 4, (93,) * 4]
    steps = play(falls, [BUY_LARGE, HOLD, HOLD, BUY_LARGE, BUY_LARGE, BUY_LARGE, HOLD], hours=4, daily_loss=0.05)
    assert events(steps) == [0, 0, 0, DAILY_LOSS, 0, 0, 0]  # 0.94 at the mark of the third bar, closed at the next open, 93
    assert steps[3][1] == pytest.approx(0.93, rel=1e-12)
    # decisions at rows 63, 64 and 65 are of that day; at row 66 another one begins, with 93 as its start
    assert [step[4] for step in steps] == [BUY_LARGE, HOLD, HOLD, HOLD, HOLD, HOLD, HOLD]
    again = play(falls, [BUY_LARGE, HOLD, HOLD, HOLD, HOLD, HOLD, BUY_LARGE], hours=4, daily_loss=0.05)
    assert again[-1][4] == BUY_LARGE and again[-1][2] == 1.0
    calm = play(falls, [BUY_LARGE, *[HOLD] * 6], hours=4, daily_loss=0.08)
    assert set(events(calm)) == {NO_EVENT}


def test_the_days_start_is_the_last_mark_of_the_day_before():
    """5.5% down over two days, 3% on the second: no daily loss of 5%."""
    falls = [(100,) * 4] * 3 + [(97.5,) * 4, (97.5,) * 4] + [(96,) * 4, (94.5,) * 4, (94.5,) * 4, CALM]
    for loss, closed in (
        (0.05, []),
        (0.03, [7]),
    ):  # 94.5 is 5.5% below the start, and 3.1% below the last mark of the day before
        steps = play(falls, [BUY_LARGE, *[HOLD] * 7], hours=4, daily_loss=loss)
        assert [n for n, event in enumerate(events(steps)) if event == DAILY_LOSS] == closed


def test_breaker_closes_rests_and_starts_its_peak_anew():
    falls = [(p,) * 4 for p in (100, 120, 105, 105, 105, 105, 105, 105, 96, 96, 96)]
    orders = [BUY_LARGE, HOLD, HOLD, *[BUY_LARGE] * 4, HOLD, HOLD]
    steps = play(falls, orders, max_drawdown=0.1, breaker_bars=3)
    assert events(steps)[:4] == [0, 0, 0, BREAKER] and steps[3][2] == 0.0
    # it fired at the mark of the third bar: its three decisions are those at that bar and the two after it
    assert [step[4] for step in steps[3:7]] == [HOLD, HOLD, HOLD, BUY_LARGE]
    assert events(steps)[4:] == [0, 0, 0, 0, 0], "12.5% below 120, but 8.6% below the new peak of 105"
    assert steps[-1][1] == pytest.approx(1.05 * 96 / 105, rel=1e-12)


def test_breaker_rests_from_when_the_position_is_closed():
    falls = [(100,) * 4, (80,) * 4, None, None, None, None, (70,) * 4, (70,) * 4, (70,) * 4, (70,) * 4]
    steps = play(falls, [BUY_LARGE, HOLD, HOLD, HOLD, HOLD, HOLD, HOLD, BUY_LARGE, BUY_LARGE], max_drawdown=0.1, breaker_bars=2)
    assert events(steps) == [0, 0, 0, 0, 0, 0, BREAKER, 0, 0]
    assert [step[4] for step in steps[7:]] == [HOLD, BUY_LARGE]


def test_exposure_is_cut_back_unless_the_agent_sells_more():
    rises = [CALM, (200, 200, 200, 200), (200, 200, 200, 200), CALM]
    config = dict(max_position=0.5, max_exposure=0.6)
    steps = play(rises, [BUY_MEDIUM, HOLD, HOLD], **config)
    assert events(steps) == [0, 0, EXPOSURE] and steps[1][2] == pytest.approx(2 / 3) and steps[2][2] == pytest.approx(0.6)
    assert steps[2][3] == pytest.approx(2 / 3 - 0.6)
    for order, weight in ((SELL_ALL, 0.0), (SELL_PART, 1 / 3)):
        steps = play(rises, [BUY_MEDIUM, HOLD, order], **config)
        assert events(steps)[2] == NO_EVENT and steps[2][2] == pytest.approx(weight)
    back = [CALM, (200, 200, 200, 200), (100, 100, 100, 100), CALM]
    steps = play(back, [BUY_MEDIUM, HOLD, HOLD], **config)
    assert events(steps)[2] == NO_EVENT and steps[2][3] == 0.0, "the price has done it"


def test_rounding_is_no_excess_of_exposure():
    steps = play(
        [CALM] * 9, [BUY_LARGE, *[HOLD] * 7], sizes=(0.1, 0.2, 0.7), max_position=0.7, max_exposure=0.7, costs="retail"
    )
    assert set(events(steps)) == {NO_EVENT} and all(step[3] == 0.0 for step in steps[1:])


# --- an account in shares and cash, from the panel's prices and the description alone


class SlowAccount:
    """One market of Trading-v0: cash, shares, and rules, step by step. Costs are solved by bisection."""

    def __init__(self, data: TradingData, column: int, row: int):
        self.data, self.panel, self.config, self.j, self.t = data, data.panel, data.config, column, row
        self.mark = data.panel.filled("close")[:, column]
        self.here = data.panel.present[:, column]
        self.day = data.panel.timestamps.astype("datetime64[D]")
        self.cash, self.shares, self.average = 1.0, 0.0, None
        self.held = self.adds = self.rest = 0
        self.peak = self.yesterday = self.equity = 1.0
        self.stopped = False

    @property
    def weight(self):
        return self.shares * self.mark[self.t] / self.equity

    def mask(self):
        c, w, flat = self.config, self.weight, self.shares == 0
        now = self.here[self.t]
        free = now and not self.stopped and self.rest == 0
        buys = [free and flat and size <= c.max_position for size in c.sizes]
        add = free and not flat and self.adds < c.max_adds and w + c.add <= c.max_position + 1e-9
        return np.array([True, *buys, now and not flat, now and not flat, add])

    def trade(self, price, weight):
        """Bring the position to this weight after costs; returns the turnover, by the equity before."""
        rates, impact = self.data.costs.rates[0], self.data.execution.impact
        linear = float(rates.commission + rates.spread + rates.slippage + rates.linear_impact)
        root = float(impact[self.t, self.j]) if len(impact) > 1 else 0.0
        wealth, position = self.cash + self.shares * price, self.shares * price

        def cost(value):
            size = abs(value)
            return size * linear + float(rates.quadratic_impact) * size**2 / wealth + root * size**1.5

        low, high = 0.5 * wealth, wealth
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if middle + cost(weight * middle - position) > wealth else (middle, high)
        value = weight * high - position
        self.cash -= value + cost(value)
        bought = value / price
        if value > 0:
            self.average = price if self.shares == 0 else (self.average * self.shares + value) / (self.shares + bought)
        self.shares = self.shares + bought if weight > 0 else 0.0
        return abs(value) / wealth

    def touch(self, prices):
        """(event, price) over the prices of a bar in the order in which they are supposed to be made."""
        c = self.config
        stop = self.average * (1 - c.stop_loss) if c.stop_loss else 0.0
        goal = self.average * (1 + c.take_profit) if c.take_profit else np.inf
        first, *rest = prices
        if first <= stop or first >= goal:
            return (STOP if first <= stop else TARGET), first
        if rest and min(rest) <= stop:
            return STOP, stop
        if rest and max(rest) >= goal:
            return TARGET, goal
        return NO_EVENT, None

    def step(self, action):
        """(order executed, event, equity, turnover)"""
        t, j, c, p, fill = self.t, self.j, self.config, self.panel, self.data.fill
        order = action if self.mask()[action] else HOLD
        event, turnover, cut = NO_EVENT, 0.0, False
        was, weight, start = self.shares > 0, self.weight, self.equity
        opened = p.fields.get("open", p.close)[t + 1, j]
        extremes = [p.fields[name][t + 1, j] for name in ("high", "low") if name in p.fields and "open" in p.fields]
        prices = [opened, *extremes, p.close[t + 1, j]] if "open" in p.fields else [p.close[t + 1, j]]
        closes = [self.mark[t], self.mark[t + 1]]
        missing = (np.arange(t + 2) if fill != "same_close" else np.arange(t + 1))[-(DELIST_AFTER + 1) :]
        gone = not self.here[missing].any() and self.here[: t + 1].any()
        exists = self.here[t] if fill == "same_close" else self.here[t + 1]
        price = {"next_open": opened if exists else closes[0], "next_close": closes[1], "same_close": closes[0]}[fill]
        old_cash = self.cash

        if was and self.here[t + 1] and fill != "same_close":
            event, exit_ = self.touch(prices if fill == "next_close" else prices[:1])
            if event:
                turnover, cut = self.trade(exit_, 0.0), True
        if was and gone:
            event, turnover, cut = DELISTING, self.trade(closes[0], 0.0), True
        if exists and not cut:
            wealth = self.cash + self.shares * price
            drifted = self.shares * price / wealth
            wanted = {
                HOLD: None, BUY_SMALL: c.sizes[0], BUY_MEDIUM: c.sizes[1], BUY_LARGE: c.sizes[2],
                SELL_PART: drifted * (1 - c.part), SELL_ALL: 0.0, ADD: min(drifted + c.add, c.max_position),
            }[order]  # fmt: skip
            if order == ADD and wanted <= drifted:
                wanted = None
            forced = NO_EVENT
            if was and (self.rest > 0 or self.stopped or (c.max_holding and self.held >= c.max_holding)):
                wanted, forced = 0.0, BREAKER if self.rest > 0 else DAILY_LOSS if self.stopped else MAX_HOLD
            elif c.max_exposure and weight > c.max_exposure + 1e-9 and (drifted if wanted is None else wanted) > c.max_exposure:
                wanted, forced = c.max_exposure, EXPOSURE
            if wanted is not None:
                before = self.shares
                turnover, event = self.trade(price, wanted), forced
                self.adds += before > 0 and self.shares > before
        rates, years = self.data.costs.rates[0], p.bar_years[t]
        self.cash += years * float(rates.cash) * (old_cash if fill == "next_close" else self.cash)
        if self.shares > 0 and self.here[t + 1] and fill != "next_close":
            exit_event, exit_ = self.touch(prices)
            if exit_event:
                event, turnover = exit_event, turnover + self.trade(exit_, 0.0)

        self.t += 1
        self.equity = self.cash + self.shares * self.mark[self.t]
        if self.shares == 0:
            self.held, self.adds, self.average = 0, 0, None
        elif was or fill != "next_close":
            self.held += 1
        if self.day[t] != self.day[t + 1]:
            self.yesterday, self.stopped = start, self.stopped and self.shares > 0
        self.stopped |= c.daily_loss is not None and self.equity <= self.yesterday * (1 - c.daily_loss)
        if self.rest > 0:
            self.rest -= self.shares == 0
            if self.rest == 0:
                self.peak = self.equity
        else:
            self.peak = max(self.peak, self.equity)
            if c.max_drawdown is not None and self.equity <= self.peak * (1 - c.max_drawdown):
                self.rest = c.breaker_bars
        return order, event, self.equity, turnover


def hourly(panel: Panel) -> Panel:
    """The panel with five bars a day, one an hour."""
    bar = np.arange(panel.num_bars)
    return replace(panel, timestamps=np.datetime64("2024-01-01T10", "ns") + (bar // 5 * 24 + bar % 5) * np.timedelta64(1, "h"))


def broken(seed: int, fields=("open", "high", "low", "volume")) -> Panel:
    """Hourly bars with gaps, halts of all lengths, delistings for a while and for good."""
    panel, rng = hourly(ragged_panel(seed, bars=200)), np.random.default_rng(seed)
    kept = panel.present.copy()
    for j in range(4):
        for start in rng.integers(70, 190, 2):
            kept[start : start + rng.choice([2, 9, 10, 11, 12, 15]), j] = False
    kept[-1] = True
    kept[150:, 2] = False
    table = {name: np.where(kept, panel.fields[name], np.nan) for name in (*fields, "close")}
    return replace(panel, **({"open": None, "high": None, "low": None, "volume": None} | table))


@pytest.mark.parametrize("fields", (("open", "high", "low", "volume"), (), ("open",)), ids=("all", "closes", "opens"))
@pytest.mark.parametrize("fill", FILLS)
def test_every_step_is_that_of_an_account_in_shares_and_cash(fill, fields):
    """Orders of all kinds, allowed or not, over gaps, halts and delistings, with every exit, limit and cost, and with none."""
    if fill == "next_open" and "open" not in fields:
        return
    seen, halted = set(), 0
    fewer = {"sizes": (0.25, 0.5, 1.0), "max_exposure": None, "stop_loss": 0.0, "daily_loss": None, "max_holding": 0}
    other = {"take_profit": 0.0, "max_drawdown": None, "max_holding": 30, "sizes": (0.2, 0.3, 0.7), "add": 0.2}
    for seed, changes in enumerate(({}, {}, fewer, other)):
        panel = broken(seed, fields)
        data = trading_data(panel, fill=fill, **changes)
        runs = data.runs(whole(panel))
        env = make_env(data, len(runs), split=whole(panel), episode_length=0, random_start=False)
        obs, infos = env.reset(seed=0)
        slow = [SlowAccount(data, *run[[0, 2]]) for run in runs]
        over = np.zeros(len(runs), bool)
        rng = np.random.default_rng(seed)
        while not over.all():
            mask = infos["action_mask"]
            allowed = [rng.choice(np.flatnonzero(row)) for row in mask]
            actions = np.where(rng.random(len(runs)) < 0.8, allowed, rng.integers(7, size=len(runs)))
            actions = np.where(rng.random(len(runs)) < 0.3, HOLD, actions)
            position = obs[:, data.layout["position"]]
            for i in np.flatnonzero(~over):
                assert np.array_equal(mask[i], slow[i].mask())
                view = dict(zip(POSITION, position[i]))
                price, average = slow[i].mark[slow[i].t], slow[i].average
                assert view["weight"] == pytest.approx(slow[i].weight, abs=1e-6) and view["flat"] == (slow[i].shares == 0)
                assert view["unrealised_return"] == pytest.approx(price / average - 1 if average else 0.0, abs=1e-6)
                assert view["bars_held"] == pytest.approx(slow[i].held / (slow[i].held + 20))
                assert view["adds_used"] == pytest.approx(slow[i].adds / 3)
                stop, goal = data.config.stop_loss, data.config.take_profit
                assert view["to_stop"] == pytest.approx(1 - average * (1 - stop) / price if average and stop else 0, abs=1e-6)
                assert view["to_target"] == pytest.approx(average * (1 + goal) / price - 1 if average and goal else 0, abs=1e-6)
            obs, _, terminated, truncated, infos = env.step(actions)
            for i in np.flatnonzero(~over):
                expected = slow[i].step(actions[i])
                record, event = infos["record"][i], int(infos["components"]["event"][i])
                found = (infos["choice"][i], event, record[EQUITY], record[TURNOVER])
                where = f"{panel.symbols[slow[i].j]} at {slow[i].t}"
                assert found[:2] == expected[:2] and found[2:] == pytest.approx(expected[2:], rel=1e-9, abs=1e-12), where
                seen.add(event)
                halted += slow[i].shares > 0 and not slow[i].here[slow[i].t]
            over |= terminated | truncated
    assert seen == set(range(len(EVENTS))) and halted > 20


# --- masks


@given(
    cash=st.just(1.0) | st.floats(0.0, 1.0), adds=st.integers(0, 3), stopped=st.booleans(), cooldown=st.integers(0, 2),
    row=st.integers(WARMUP, 100), symbol=st.integers(0, 5), add=st.floats(0.05, 0.5), largest=st.floats(0.3, 1.0),
)  # fmt: skip
@settings(max_examples=60)
def test_mask_properties(cash, adds, stopped, cooldown, row, symbol, add, largest):
    """What is allowed is possible in full; holding always is; without a bar nothing else; blocked: only selling."""
    sizes = (0.3 * largest, 0.8 * largest, 0.99)
    data = TradingData(ragged_panel(0), TradingConfig(costs="zero", window=1, add=add, max_position=largest, sizes=sizes))
    env = make_env(data, split=whole(data.panel), episode_length=0, random_start=False)
    env.reset(seed=0)
    held = 1.0 - cash
    state = env._state
    state.t, state.symbol, state.adds, state.stopped, state.cooldown = row, symbol, adds, stopped, cooldown
    state.entry, env._memory[0, 0] = 50.0 if held > 0 else 0.0, held
    env._market = env._market._replace(status=np.zeros_like(env._market.status))  # the step itself trades nothing
    price = env._market.close[row + 1, symbol]
    infos = env.step(np.zeros(1, np.int64))[4]
    mask, weight = infos["action_mask"][0], env._memory[0, 0]
    assert mask[HOLD]
    if np.isnan(price):
        return
    here, blocked = data.panel.present[row + 1, symbol], bool(env._state.stopped[0]) or env._state.cooldown[0] > 0
    if not here:
        assert mask.sum() == 1
    buys = mask[[BUY_SMALL, BUY_MEDIUM, BUY_LARGE]]
    if blocked or weight > 0 or not here:
        assert not buys.any()
    else:
        assert buys.tolist() == [size <= largest for size in sizes] and buys[:2].all()
    assert mask[SELL_PART] == mask[SELL_ALL] == (here and weight > 0)
    possible = here and not blocked and weight > 0 and adds < 3 and weight + add <= largest + 1e-9
    assert mask[ADD] == possible
    assert not mask[ADD] or add <= 1.0 - weight + 1e-9, "not on credit"


def test_a_million_steps_obey_the_mask_and_the_limits():
    """1,000 markets of 1,000 steps: what is executed was allowed, what was not is HOLD, and nothing is borrowed or short."""
    panel = hourly(ragged_panel(5, bars=400, symbols=9))
    data = trading_data(panel, window=1, max_adds=2)
    env = make_env(data, 1000, split=whole(panel), episode_length=60)
    env.parallel = False  # equal, and compiled already
    obs, infos = env.reset(seed=0)
    rng, market = np.random.default_rng(0), np.arange(1000)
    flat_at, count = data.layout["position"].start + POSITION.index("flat"), np.zeros((7, 2), np.int64)
    bought_most, masked = 0.0, 0
    storage = np.zeros(obs.shape, np.float32)
    for _ in range(1000):
        mask = infos["action_mask"].copy()
        flat = obs[:, flat_at] == 1
        draws = rng.random((1000, 7))
        actions = np.where(rng.random(1000) < 0.7, (draws * mask).argmax(axis=1), draws.argmax(axis=1))
        allowed = mask[market, actions]
        held = env._memory[:, 0].copy()
        obs, _, _, _, infos = env.step(actions, out=storage)
        choice, record, components = infos["choice"], infos["record"], infos["components"]
        assert mask[market, choice].all() and (choice == np.where(allowed, actions, HOLD)).all()
        assert (components["masked"] == ~allowed).all()
        assert (env._memory >= 0).all() and (env._memory <= 1 + 1e-12).all(), "short, or on credit"
        traded = record[:, TURNOVER] > 0
        increased = traded & np.isin(choice, (BUY_SMALL, BUY_MEDIUM, BUY_LARGE, ADD)) & (components["event"] < MAX_HOLD)
        bought_most = max(bought_most, record[increased, GROSS_EXPOSURE].max(initial=0.0))
        still = (choice == HOLD) & (components["event"] == NO_EVENT)
        assert (record[still, TURNOVER] == 0).all() and (record[still, 2:6] == 0).all(), "holding trades"
        assert not traded[flat & (choice == HOLD)].any() and (held[flat] == 0).all()
        for order in range(7):
            count[order] += (choice == order).sum(), (traded & (choice == order)).sum()
        masked += (~allowed).sum()
        charges = record[:, GROSS_RETURN + 1 : INTEREST].sum(axis=1)
        assert np.abs(record[:, NET_RETURN] - (record[:, GROSS_RETURN] - charges + record[:, INTEREST])).max() < 1e-12
    assert 0.8 - 1e-9 < bought_most <= 0.8 + 1e-9
    assert (count > 3000).all() and masked > 50_000, count


def test_holding_moves_no_bit():
    """A position that is held has no turnover and no cost, and earns the price's return to the last digit of its shares."""
    panel = ragged_panel(1)
    data = TradingData(panel, TradingConfig(costs="retail"), ("R0",))
    env = make_env(data, split=whole(panel), episode_length=0, random_start=False)
    env.reset(seed=0)
    row, equity = int(env._state.t[0]), 1.0
    close = panel.filled("close")[:, 0]
    while not env._memory[0, 0] > 0:
        record, row = env.step(np.array([BUY_MEDIUM]))[4]["record"][0], row + 1
    start, equity = env._memory[0, 0], record[EQUITY]
    bought = row
    while row < panel.num_bars - 2:
        record, row = env.step(np.array([HOLD]))[4]["record"][0], row + 1
        assert (record[[TURNOVER, 2, 3, 4, 5]] == 0.0).all()
        assert record[EQUITY] == pytest.approx(equity * (1 + start * (close[row] / close[bought] - 1)), rel=1e-12)


# --- money


@pytest.mark.parametrize("fill", FILLS)
def test_every_bar_adds_up_and_the_reward_is_net_growth(tradings, fill):
    data = tradings[fill]
    env = make_env(data, 12, split=whole(data.panel), episode_length=30)
    log = rollout(env, random_actions(env, 120))
    record = log["record"]
    charges = record[..., GROSS_RETURN + 1 : INTEREST].sum(axis=2)
    assert np.abs(record[..., NET_RETURN] - (record[..., GROSS_RETURN] - charges + record[..., INTEREST])).max() < 1e-12
    for i in range(12):
        for past in np.split(record[:, i], np.flatnonzero(log["truncated"][:, i]) + 1):
            assert np.allclose(past[:, EQUITY], np.cumprod(1 + past[:, NET_RETURN]), rtol=1e-12)
    growth = np.log(np.maximum(1 + record[..., NET_RETURN], RUIN))
    assert np.allclose(log["reward"], growth, rtol=1e-6, atol=1e-9)
    assert (record[..., 2:6] > 1e-6).any(axis=(0, 1)).all() and (log["component_event"] > 0).mean() > 0.05


def test_two_steps_make_one_record():
    """A bar cut in two at any price, with a trade in each: the record's identity, its growth, and every cost in money."""
    rng, rates = np.random.default_rng(0), load_costs(DEAR).rates[0]
    for _ in range(50):
        weight, one, two = np.array([rng.uniform()]), np.zeros(13), np.zeros(13)
        moves, targets = rng.normal(0, 0.1, 3), rng.uniform(0, 1, 2)
        impact, trade = np.array([0.01]), np.ones(1)
        growth = account_step(
            weight, targets[:1], moves[:1], moves[1:2], trade, impact, 0.004, False, 0.7, rates, one
        )  # fmt: skip
        first = one.copy()
        growth *= account_step(
            weight, targets[1:], moves[2:], np.zeros(1), trade, impact, 0.0, False, 0.7 * growth, rates, two
        )  # fmt: skip
        combine_records(one, two)
        assert one[NET_RETURN] == pytest.approx(growth - 1, abs=1e-14)
        charges = one[GROSS_RETURN + 1 : INTEREST].sum()
        assert abs(one[NET_RETURN] - (one[GROSS_RETURN] - charges + one[INTEREST])) < 1e-14
        for field in range(TURNOVER):
            assert one[field] == pytest.approx(first[field] + (1 + first[NET_RETURN]) * two[field], abs=1e-14)
        assert one[TURNOVER] == first[TURNOVER] + two[TURNOVER]
        assert_same_bits(one[TURNOVER + 1 :], first[TURNOVER + 1 :])


def test_reward_components_recomputed(tradings):
    """Every component from records, prices and orders, bar by bar, and their weighted sum; over two episodes."""
    data = tradings["next_open"]
    panel = data.panel
    data = trading_data(panel, symbols=("R0",), max_drawdown=None, daily_loss=None, target_volatility=0.15)
    env = make_env(data, split=whole(panel), episode_length=28, random_start=False, reward_weights=BURDENS)
    log = rollout(env, np.random.default_rng(0).choice([HOLD, HOLD, HOLD, BUY_SMALL, BUY_MEDIUM, ADD], (56, 1)))
    assert np.flatnonzero(log["truncated"]).tolist() == [27, 55]
    shown = np.where(log["truncated"][..., None], log["final_obs"], log["obs"])[:, 0]
    weight = shown[:, data.layout["position"]][:, 0]
    for n, row in enumerate(log["record"][:, 0]):
        if n % 28 == 0:
            mean = square = held = 0.0
            peak, was = 1.0, False
        r, expected = row[NET_RETURN], dict.fromkeys(REWARDS, 0.0)
        expected["pnl"], expected["cost"] = np.log(1 + r), row[GROSS_RETURN + 1 : INTEREST].sum()
        held = held + 1 if weight[n] > 0 else 0
        expected["holding"] = held / 252
        if n % 28 + 1 > DSR_BARS:
            expected["sharpe"] = (square * (r - mean) - 0.5 * mean * (r * r - square)) / (square - mean**2) ** 1.5
        rate = max(DSR_RATE, 1 / (n % 28 + 1))
        mean, square = mean + rate * (r - mean), square + rate * (r * r - square)
        peak = max(peak, row[EQUITY])
        expected["drawdown"] = 1 - row[EQUITY] / peak
        t = log["row"][n, 0] + 1
        closes = np.log(panel.filled("close")[: t + 1, 0])
        annual = np.sqrt((np.diff(closes)[-20:] ** 2).mean() * panel.bars_per_year)
        expected["sizing"] = abs(weight[n] - min(0.15 / annual, 0.8)) if weight[n] > 0 else 0.0
        expected["hold"] = float(log["choice"][n, 0] == HOLD and not was)
        was = weight[n] > 0
        for component, value in expected.items():
            assert log[f"component_{component}"][n, 0] == pytest.approx(value, abs=1e-6, rel=1e-5), (component, n)
        signs = {"pnl": 1, "sharpe": 1}
        total = sum({"pnl": 1.0, **BURDENS}[name] * signs.get(name, -1) * value for name, value in expected.items())
        assert log["reward"][n, 0] == pytest.approx(total, abs=1e-6, rel=1e-4)
    assert all((log[f"component_{name}"] != 0).any() for name in REWARDS) and COMPONENTS[:7] == REWARDS


# --- time


@pytest.mark.parametrize("fill", FILLS)
def test_nothing_seen_or_earned_depends_on_later_bars(fill):
    """Replace every bar and every series after row t at random: what was known, ordered and earned stays, to the bit."""
    panel = ragged_with_series()
    actions = np.random.default_rng(3).choice([HOLD, HOLD, BUY_SMALL, BUY_LARGE, SELL_PART, ADD], (55, 1))

    def log_of(panel):
        data = trading_data(panel, fill=fill, symbols=("R0",))
        return rollout(make_env(data, split=whole(panel), episode_length=0, random_start=False), actions)

    expected = log_of(panel)
    assert len(set(expected["component_event"][:, 0])) > 2
    for t in (WARMUP + 4, WARMUP + 20, WARMUP + 41):
        found = log_of(tampered(panel, t, np.random.default_rng(t)))
        decided = expected["row"][:, 0]
        for key in expected:
            known = decided <= t if key in ("seen_obs", "seen_mask", "choice", "row", "symbol") else decided + 1 <= t
            assert known.sum() > 3
            assert_same_bits(found[key][known], expected[key][known], f"{key}, t={t}")
        assert not np.array_equal(found["record"], expected["record"]), "the tampering changed nothing at all"


# --- who is traded when


def test_runs_begin_after_the_warm_up_and_end_with_the_symbol():
    """R1 is listed at row 40, R2 has no bar from row 100 on, and R3 none in the second range."""
    panel = ragged_panel(0, bars=240)
    present = panel.present.copy()
    present[:40, 1], present[40:60, 1] = False, True
    present[50:100, 2], present[100:, 2] = True, False
    present[149:, 3] = False
    fields = {name: np.where(present, np.where(panel.present, x, 50.0), np.nan) for name, x in panel.fields.items()}
    fields |= {"high": np.fmax.reduce(list(fields.values())[:4]), "low": np.fmin.reduce(list(fields.values())[:4])}
    panel = replace(panel, **fields)
    data = TradingData(panel)
    split = Split("test", np.array([[10, 150], [150, 240]]))
    runs = data.runs(split).tolist()
    by = {(j, r): (start, stop) for j, r, start, stop in runs}
    assert set(by) == {(j, r) for j in range(6) for r in range(2)} - {(2, 1), (3, 1)}
    first = {j: np.flatnonzero(present[:, j])[0] for j in range(6)}
    for (j, r), (start, stop) in by.items():
        usable = np.flatnonzero(present[:, j] & (np.arange(240) >= max(split.ranges[r, 0], first[j] + WARMUP)))
        assert start == usable[0] and stop == (min(split.ranges[r, 1], 99 + 13) if j == 2 else split.ranges[r, 1])
    market = data.market(split)
    found = market.order
    assert market.range_of[found].tolist() == [0] * 6 + [1] * 4 and market.symbol[found].tolist() == [*range(6), 0, 1, 4, 5]
    env = make_env(data, 10, split=split, episode_length=0, random_start=False)
    assert env.num_runs == 10 and env.reset(seed=0)[1]["row"].tolist() == market.starts[found].tolist()
    assert env.stops.tolist() == market.stops[found].tolist()
    labels = env.ledger_labels()
    assert labels["symbol"].tolist() == [panel.symbols[j] for j in market.symbol[found]]
    assert labels["range"].tolist() == market.range_of[found].tolist()

    late = Split("train", np.array([[150, 240]]))
    env = make_env(data, 8, split=late, episode_length=20)
    assert env.reset(seed=1)[1]["symbol"].tolist() == [0, 1, 4, 5, 0, 1, 4, 5], "those without a run are left out"
    rows = {j: set() for j in (0, 1, 4, 5)}
    for seed in range(40):
        infos = env.reset(seed=1000 * seed)[1]
        for row, j in zip(infos["row"], infos["symbol"]):
            rows[j].add(int(row))
    assert all(len(found) > 20 and min(found) >= 150 for found in rows.values())
    shifted = make_env(data, 3, split=late, first_market=3)
    assert shifted.reset(seed=0)[1]["symbol"].tolist() == [5, 0, 1]
    some = TradingData(panel, symbols=("R4", "R1"))
    assert make_env(some, 3, split=late).reset(seed=0)[1]["symbol"].tolist() == [4, 1, 4]
    with pytest.raises(ValueError, match="split 'train': no symbol to trade has a bar to decide at.*60 bars"):
        make_env(TradingData(panel, symbols=("R3",)), split=late)


def test_random_windows_cover_every_run_of_a_symbol(ou_data):
    env = make_env(ou_data, 6, split="train", episode_length=50)
    market, rows = env._market, []
    for seed in range(60):
        rows.append(env.reset(seed=100 * seed)[1]["row"])
    rows = np.stack(rows)
    assert (env._state.symbol == [0, 1, 2, 0, 1, 2]).all() and len(market.starts) == 6
    for start, stop in zip(market.starts, market.stops):
        inside = (rows >= start) & (rows <= stop - 51)
        assert 0.35 < inside.mean() < 0.65 and ((rows[inside] - start) > 200).any()
    assert (((rows - 60) % 400) <= 289).all(), "an episode has 50 steps"


# --- observations


def test_observations_are_laid_out_as_documented():
    panel = ragged_with_series()
    data = trading_data(panel, symbols=("R0",), max_drawdown=0.02, window=70)
    env = make_env(data, split=whole(panel), episode_length=0, random_start=False)
    log = rollout(env, np.random.default_rng(0).choice([HOLD, HOLD, BUY_LARGE, ADD], (50, 1)))
    sizes = {"window": 70 * len(data.features), "position": 7, "portfolio": 6, "regime": len(REGIME_FEATURES), "forecasts": 2}
    assert {name: part.stop - part.start for name, part in data.layout.items()} == sizes
    assert sum(sizes.values()) == data.observation_size == log["obs"].shape[2] and data.forecasts == ("forecast", "macro")
    equity, record, blocked, mean, square, peak = 1.0, log["record"][:, 0], [], 0.0, 0.0, 1.0
    for n, after in enumerate(log["row"][:, 0] + 1):
        obs = log["obs"][n, 0]
        window = obs[data.layout["window"]].reshape(70, -1)
        begin = max(0, after - 69)
        assert not window[: 69 - (after - begin)].any()
        assert_same_bits(window[69 - (after - begin) :], data.windowed[0, begin : after + 1], "window, oldest bar first")
        assert_same_bits(obs[data.layout["regime"]], data.regime[after], "regime")
        series = [panel.extras["forecast"][after, 0], panel.extras["macro"][after]]
        assert_same_bits(obs[data.layout["forecasts"]], np.array(series, np.float32), "forecasts")
        view, r = dict(zip(PORTFOLIO, obs[data.layout["portfolio"]])), record[n, NET_RETURN]
        mean, square, peak = mean + RATE * (r - mean), square + RATE * (r * r - square), max(peak, record[n, EQUITY])
        assert view["drawdown"] == pytest.approx(record[n, EQUITY] / peak - 1, abs=1e-6)
        assert view["today"] == pytest.approx(r, abs=1e-6), "one bar a day"
        assert view["mean_return"] == pytest.approx(mean, abs=1e-7)
        assert view["volatility"] == pytest.approx(np.sqrt(square - mean**2), abs=1e-7)
        assert view["exposure_left"] == pytest.approx(0.8 - obs[data.layout["position"]][0], abs=1e-6)
        blocked.append(view["blocked"])
        if blocked[-1]:
            assert not log["mask"][n, 0, [BUY_SMALL, BUY_MEDIUM, BUY_LARGE, ADD]].any()
    assert set(blocked) == {0.0, 1.0} and equity == 1.0
    bare = TradingData(replace(panel, extras={}))
    assert bare.layout["forecasts"].start == bare.observation_size and bare.forecasts == ()
    assert bare.describe()["traded"] == list(panel.symbols) and bare.describe()["features"] == list(bare.features)


def test_a_symbol_sees_its_own_bars_and_series():
    panel = ragged_with_series()
    data = TradingData(panel)
    env = make_env(data, 5, split=whole(panel), episode_length=0, random_start=False)
    obs, infos = env.reset(seed=0)
    for i, (row, j) in enumerate(zip(infos["row"], infos["symbol"])):
        assert_same_bits(obs[i, data.layout["window"]], data.windowed[j, row - 15 : row + 1].ravel())
        assert obs[i, data.layout["forecasts"]][0] == np.float32(panel.extras["forecast"][row, j])
    assert set(infos["symbol"]) == {0, 1, 3, 4, 5}


def test_ruin_ends_the_episode():
    crash = [CALM, (100, 100, 4, 4), CALM]
    panel = scripted(crash)
    env = make_env(TradingData(panel, TradingConfig(costs="zero"), ("A",)), split=whole(panel), episode_length=0,
                   random_start=False)  # fmt: skip
    env.reset(seed=0)
    env.step(np.array([BUY_LARGE]))
    _, reward, terminated, truncated, infos = env.step(np.array([HOLD]))
    assert terminated[0] and not truncated[0] and reward[0] == pytest.approx(np.log(RUIN))
    assert infos["final_obs"][0, env.data.layout["position"]][0] == 1.0 and infos["row"][0] == WARMUP
