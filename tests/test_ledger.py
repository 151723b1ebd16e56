"""Ledgers and scores: against sums by hand and slow references; a run directory that is never lost, shared or half written."""

import hashlib
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import CONFIG, DEAR, FILLS, ROOT, SMALL, TINY, assert_same_bits, make_env, ragged_panel, trading_data, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from envs import ledger, references
from envs.costs import RECORD, RUIN, execution, load_costs
from envs.leadlag_tables import LeadLagData
from envs.panel import Panel, Split
from envs.synthetic import make_panel

CHARGES = ("commission", "spread", "slippage", "impact", "borrow", "financing")
INTERVALS = {"sharpe_low", "sharpe_high", "gross_sharpe_low", "gross_sharpe_high"}


def table(*markets, **columns) -> pd.DataFrame:
    """A ledger of some markets' net returns; columns that are not given are 0, gross returns those before 1 bp of costs."""
    parts = []
    for m, net in enumerate(markets):
        part = pd.DataFrame({name: np.zeros(len(net)) for name in RECORD})
        part["net_return"], part["gross_return"], part["commission"] = net, np.array(net) + 1e-4, 1e-4
        part["equity"], part["market"] = np.cumprod(1 + np.array(net)), m
        parts.append(part)
    return pd.concat(parts, ignore_index=True).assign(**columns)


def test_orders_of_a_bar_were_given_at_the_row_before_it(small_data):
    split = small_data.panel.split()["test"]
    frame = references.run(small_data, split, references.hold(np.zeros(small_data.panel.num_bars, np.int64)))
    starts = small_data.market(split).starts
    expected = np.concatenate([np.arange(a, b - 1) for a, b in zip(starts, split.ranges[:, 1])])
    assert_same_bits(ledger.decided_rows(frame, small_data.panel, split.ranges), expected)
    assert_same_bits(ledger.decided_rows(frame[::-1], small_data.panel, split.ranges), expected[::-1].copy())
    with pytest.raises(ValueError, match="expected at most 1, one for each range"):
        ledger.decided_rows(frame, small_data.panel, split.ranges[:1])


def test_scores_by_hand():
    """Two markets of three bars and 50 bars a year."""
    charges = dict(zip(CHARGES, (1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4)))
    frame = table([0.1, -0.05, 0.02], [-0.1, -0.1, 0.3], turnover=[1, 0, 2, 0, 3, 0], gross_exposure=[1, 1, 1, 0, 0, 1])
    found = ledger.summarise(frame.assign(interest=9.0, **charges), 50, resamples=0)
    net = [0.1, -0.05, 0.02, -0.1, -0.1, 0.3]
    mean = sum(net) / 6
    deviation = (sum((x - mean) ** 2 for x in net) / 5) ** 0.5
    expected = {
        "bars": 6,
        "growth": 50 * np.log(1.1 * 0.95 * 1.02 * 0.9 * 0.9 * 1.3) / 6,
        "sharpe": mean / deviation * 50**0.5,
        "gross_sharpe": (mean + 1e-4) / deviation * 50**0.5,
        "volatility": deviation * 50**0.5,
        "max_drawdown": (-0.05 + (0.81 - 1)) / 2,  # the second market falls from its start
        "turnover": 50 * 6 / 6,
        "cost": 50 * 21e-4,  # interest is no cost
        "gross_exposure": 4 / 6,
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_drawdown_is_from_the_highest_point_so_far():
    frame = table([0.0] * 5, equity=[1.2, 0.9, 1.5, 1.2, 3.0])
    assert ledger.summarise(frame, 252, resamples=0)["max_drawdown"] == pytest.approx(0.9 / 1.2 - 1)
    rising = table([0.01] * 5)
    assert ledger.summarise(rising, 252, resamples=0)["max_drawdown"] == 0.0


def test_interval_covers_the_estimate_and_is_as_wide_as_theory_says():
    """For independent returns the standard error of a small Sharpe ratio is sqrt(bars per year / bars)."""
    net = 0.01 * np.random.default_rng(0).standard_normal(3000) + 3e-4
    found = ledger.summarise(table(net[:1000], net[1000:]), 252)
    for name in ("sharpe", "gross_sharpe"):
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        assert low < found[name] < high
        assert high - low == pytest.approx(2 * 1.96 * np.sqrt(252 / 3000), rel=0.2)
    assert "stationary bootstrap" in found["bootstrap"]
    assert ledger.summarise(table(net[:1000], net[1000:]), 252) == found
    assert ledger.summarise(table(net[:1000], net[1000:]), 252, seed=1)["sharpe_low"] != found["sharpe_low"]


def test_interval_widens_where_returns_depend_on_each_other():
    """Each return ten times over: ten times fewer independent bars, which single draws would not notice."""
    draws = 0.01 * np.random.default_rng(1).standard_normal(300)
    slow = ledger.summarise(table(np.repeat(draws, 10)), 252)
    width = slow["sharpe_high"] - slow["sharpe_low"]
    assert width > 2 * (2 * 1.96 * np.sqrt(252 / 3000))


@pytest.mark.parametrize("drift", (0.0, 0.01))
def test_many_markets_are_resampled_whole(drift):
    """60 markets of 50 independent bars: as wide as theory says, and wider where markets differ in their means."""
    rng = np.random.default_rng(3)
    markets = [0.01 * rng.standard_normal(50) + drift * rng.standard_normal() + 3e-4 for _ in range(60)]
    found = ledger.summarise(table(*markets), 252)
    pooled = np.concatenate(markets)
    of_means = np.std([m.mean() for m in markets], ddof=1) / pooled.std() * np.sqrt(252 / 60)
    assert found["sharpe_low"] < found["sharpe"] < found["sharpe_high"] and "60 markets" in found["bootstrap"]
    assert found["sharpe_high"] - found["sharpe_low"] == pytest.approx(2 * 1.96 * of_means, rel=0.2)
    assert ledger.summarise(table(*markets), 252) == found


@pytest.mark.parametrize("value", (0.0, 1e-3, -0.07))
@pytest.mark.parametrize("bars", (2, 19, 30, 250))
def test_returns_that_do_not_vary_have_no_sharpe_ratio(value, bars):
    """Rounding leaves a deviation of some 1e-17, by which nothing must be divided."""
    found = ledger.summarise(table(np.full(bars, value)), 252)
    assert found["sharpe"] == 0.0 and found["growth"] == pytest.approx(252 * np.log(1 + value))
    assert found["volatility"] == pytest.approx(0, abs=1e-12)
    assert np.isnan([found[name] for name in INTERVALS]).all()


def test_short_series_have_no_interval():
    net = 0.01 * np.random.default_rng(2).standard_normal(20)
    assert np.isnan(ledger.summarise(table(net[:19]), 252)["sharpe_low"])
    assert np.isfinite(ledger.summarise(table(net), 252)["sharpe_low"])
    assert not {*INTERVALS, "bootstrap"} & set(ledger.summarise(table(net), 252, resamples=0))


def test_difference_has_a_sign_and_an_honest_interval():
    """Paired with a noisy copy of itself: 0 inside; with one that also gains: outside, on the side that it should be."""
    rng = np.random.default_rng(4)
    few = -norm.ppf(ledger.quantile_levels(12)[0])
    assert few == pytest.approx(2.201 * np.sqrt(12 / 11), rel=1e-3), "Student's quantile of 11 degrees of freedom, n for n - 1"
    for markets, how, reach in ((2, "stationary bootstrap", 1.96), (12, "12 markets resampled whole", few)):
        net = [0.01 * rng.standard_normal(400) for _ in range(markets)]
        base = table(*net).assign(split="test", timestamp=0)
        noise = 0.001 * rng.standard_normal(len(base))
        gained = base.assign(net_return=(1 + base["net_return"]) * np.exp(noise - noise.mean() + 3e-4) - 1)
        gain, low, high, drawn = ledger.difference(gained, base, 252)
        assert gain == pytest.approx(252 * 3e-4) and 0 < low < gain < high and how in drawn
        assert high - low == pytest.approx(2 * reach * 252 * 0.001 / np.sqrt(len(base)), rel=0.5)
        loss, low, high, _ = ledger.difference(base, gained, 252)
        assert loss == pytest.approx(-gain) and low < loss < high < 0
        noisy = base.assign(net_return=(1 + base["net_return"]) * np.exp(noise) - 1)
        gain, low, high, _ = ledger.difference(noisy, base, 252)
        assert low < 0 < high and low < gain < high


def test_difference_of_ledgers_that_cannot_be_paired_is_refused():
    base = table([0.01] * 30, [0.02] * 30).assign(split="test", timestamp=np.arange(60))
    gain, low, high, _ = ledger.difference(base.assign(net_return=1.01 * (1 + base["net_return"]) - 1), base, 252)
    assert gain == pytest.approx(252 * np.log(1.01)) and low == pytest.approx(gain) and high == pytest.approx(gain)
    assert ledger.difference(base, base, 252)[:3] == (0.0, 0.0, 0.0)
    for other in (base.iloc[1:], base.assign(timestamp=1), base.assign(market=0), base.assign(split="val")):
        with pytest.raises(ValueError, match="different bars; expected the same split, markets and timestamps"):
            ledger.difference(base, other, 252)


def test_growth_counts_no_bar_for_less_than_ruin():
    found = ledger.growth(table([0.0, 0.5, -0.5, -0.96, -1.0, -1.7]))
    np.testing.assert_allclose(found, np.log([1.0, 1.5, 0.5, RUIN, RUIN, RUIN]), rtol=1e-15)


def changing(obs, mask, rows):
    """A policy that asks for other lookbacks all the time, masked ones among them."""
    return (np.abs(obs[:, :4]).sum(axis=1) * 1e4).astype(np.int64) % mask.shape[1]


def backtester(data, split, **options):
    return make_env(data, len(split.ranges), split=split, episode_length=0, random_start=False, **options)


@pytest.mark.parametrize("kind", ("absolute", "hybrid"))
def test_backtest_equals_stepping_by_hand(small_data, kind):
    """Every range of the split in an environment of its own, bit for bit; rows carry the time of the mark."""
    panel = small_data.panel
    split = panel.split()["test"]
    found = ledger.backtest(backtester(small_data, split, actions=kind), changing, panel, split)
    assert tuple(found.columns) == ledger.LEDGER and set(found["split"]) == {"test"}
    assert not found.isna().any().any()
    assert found["market"].tolist() == sorted(found["market"]) and set(found["market"]) == {0, 1}
    for r, (_, stop) in enumerate(split.ranges):
        rows = found[found["market"] == r]
        alone = backtester(small_data, Split("test", split.ranges[r : r + 1]), actions=kind)
        obs, infos = alone.reset(seed=99)
        records, actions, marks, over = [], [], [], False
        while not over:
            action = changing(obs, infos["action_mask"], infos["row"])
            obs, _, _, truncated, infos = alone.step(action)
            over = truncated[0]
            records.append(infos["record"][0])
            actions.append(action[0])
            marks.append(infos["decided_at"][0] + 1)
        assert marks[-1] == stop - 1
        assert_same_bits(rows[list(RECORD)].to_numpy(), np.array(records), "record")
        assert_same_bits(rows["action"].to_numpy(), np.array(actions), "action")
        assert_same_bits(rows["timestamp"].to_numpy("datetime64[ns]"), panel.timestamps[marks], "timestamp")
    assert found["action"].nunique() > 3


def test_a_policy_that_keeps_account_is_told_of_every_bar(small_data):
    """What the market paid, and where a range is over: after each bar, in order."""
    split = small_data.panel.split()["train"]
    told = []

    def policy(obs, mask, rows):
        told.append("asked")
        return np.argmax(mask, axis=1)

    policy.after = lambda reward, over: told.append((reward.copy(), over.copy()))
    frame = ledger.backtest(backtester(small_data, split), policy, small_data.panel, split)
    assert told[::2] == ["asked"] * (len(told) // 2)
    rewards, over = (np.stack(part) for part in zip(*told[1::2]))
    lengths = frame.groupby("market").size().to_numpy()
    np.testing.assert_array_equal(over.argmax(axis=0) + 1, lengths)
    for market, part in frame.groupby("market"):
        np.testing.assert_allclose(rewards[: lengths[market], market], ledger.growth(part), atol=1e-6)


def test_ranges_of_different_lengths_are_complete(small_data):
    panel = small_data.panel
    (a, b), (c, d) = panel.split()["test"].ranges
    split = Split("test", np.array([[a, b], [c, d - 100]]))
    market = small_data.market(split)
    found = ledger.backtest(backtester(small_data, split), changing, panel, split)
    both = ledger.backtest_weights(panel, small_data.execution, market.rates, split, small_data.targets[:, 0], market.starts)
    for frame in (found, both):
        for r, rows in frame.groupby("market"):
            start, stop = market.starts[r], market.stops[r]
            assert_same_bits(rows["timestamp"].to_numpy("datetime64[ns]"), panel.timestamps[start + 1 : stop], "timestamp")
            assert (rows["gross_exposure"] > 0).mean() > 0.9


@pytest.mark.parametrize("loss", (0.97, 1.6))
@pytest.mark.parametrize("step", (0, 50))
def test_a_ruined_market_stays_in_the_ledger(small_data, loss, step):
    """Flat to the end of its range; the market beside it does not notice."""
    panel = small_data.panel
    split = panel.split()["test"]

    def constant(obs, mask, rows):
        return np.zeros(len(rows), np.int64)

    calm = ledger.backtest(backtester(small_data, split), constant, panel, split)
    crash = backtester(small_data, split)
    t = crash._market.starts[1] + step
    to_mark = crash._market.to_mark.copy()
    to_mark[t] = -loss * np.sign(small_data.targets[t, 0])  # gross exposure is 1
    crash._market = crash._market._replace(to_mark=to_mark)
    found = ledger.backtest(crash, constant, panel, split)
    assert found[["market", "timestamp"]].equals(calm[["market", "timestamp"]])
    assert found[found["market"] == 0].equals(calm[calm["market"] == 0])
    ruined = found[found["market"] == 1].reset_index(drop=True)
    assert ruined["net_return"][step] == pytest.approx(-loss, abs=0.05)
    assert ruined["equity"][step] <= RUIN and (ruined["equity"][step:] == ruined["equity"][step]).all()
    rest = ruined.loc[step + 1 :, [name for name in RECORD if name != "equity"]]
    assert len(rest) > 100 and (rest == 0).all().all()
    assert np.isfinite(ledger.growth(found)).all() and np.isfinite(ledger.summarise(found, 252, resamples=0)["growth"])


def test_wrong_number_of_markets_is_refused(small_data):
    split = small_data.panel.split()["test"]
    env = make_env(small_data, 3, split=split, episode_length=0, random_start=False)
    with pytest.raises(ValueError, match=r"3 markets for split 'test'; expected one per range: 2"):
        ledger.backtest(env, changing, small_data.panel, split)


# --- the book of all symbols of Trading-v0


def traded(panel, split, costs=DEAR, seed=0):
    """Ledger of random orders on every symbol and range."""
    data = trading_data(panel, costs=costs)
    rng = np.random.default_rng(seed)

    def policy(obs, mask, rows):
        return (rng.random(mask.shape) * mask).argmax(axis=1)

    env = make_env(data, len(data.runs(split)), split=split, episode_length=0, random_start=False)
    return ledger.backtest(env, policy, panel, split), data


def test_a_ledger_of_trading_says_symbol_range_and_events():
    panel = ragged_panel(3, bars=260)
    split = Split("test", np.array([[30, 150], [150, 260]]))
    found, data = traded(panel, split)
    assert tuple(found.columns) == (*ledger.LEDGER[:-1], "event", "masked", "action", "symbol", "range")
    for number, (j, r, start, stop) in enumerate(sorted(data.runs(split).tolist(), key=lambda run: run[1])):
        rows = found[found["market"] == number]
        assert set(rows["symbol"]) == {panel.symbols[j]} and set(rows["range"]) == {r}
        assert_same_bits(rows["timestamp"].to_numpy("datetime64[ns]"), panel.timestamps[start + 1 : stop], "timestamp")
    assert number == found["market"].max() and set(found["action"]) == set(range(7)) and found["event"].max() > 0
    env = make_env(data, 3, split=split, episode_length=0, random_start=False)
    with pytest.raises(ValueError, match=rf"3 markets for split 'test'; expected one per range and symbol: {number + 1}"):
        ledger.backtest(env, changing, panel, split)


@given(seed=st.integers(0, 1000), symbols=st.integers(2, 7))
@settings(max_examples=15)
def test_the_book_is_the_sum_of_equal_budgets(seed, symbols):
    """Its money adds up in every row; its equity is the mean of the symbols', each in cash outside its rows."""
    panel = ragged_panel(seed, bars=220, symbols=max(4, symbols))
    split = Split("test", np.array([[30, 130], [130, 220]]))
    found, _ = traded(panel, split, seed=seed)
    book = ledger.book(found)
    assert tuple(book.columns) == ledger.LEDGER and book["market"].tolist() == sorted(book["market"])
    money = book["gross_return"] + book["interest"] - sum(book[name] for name in CHARGES)
    np.testing.assert_allclose(book["net_return"], money, rtol=0, atol=1e-12)
    for r, rows in book.groupby("market"):
        np.testing.assert_allclose(rows["equity"], np.cumprod(1 + rows["net_return"]), rtol=1e-12)
        parts = [part for _, part in found[found["range"] == r].groupby("market")]
        assert len(rows) == len(set().union(*(part["timestamp"] for part in parts)))
        before = 1.0
        for n in rng_rows(len(rows), seed):
            now = rows["timestamp"].iloc[n]
            values, net, exposure = [], 0.0, []
            for part in parts:
                past = part[part["timestamp"] <= now]
                values.append(past["equity"].iloc[-1] if len(past) else 1.0)
                here = part[part["timestamp"] == now]
                start = here["equity"].iloc[0] / (1 + here["net_return"].iloc[0]) if len(here) else values[-1]
                net += values[-1] - start
                exposure.append(start * here["net_exposure"].iloc[0] if len(here) else 0.0)
            before = rows["equity"].iloc[n - 1] if n > 0 else 1.0
            assert rows["equity"].iloc[n] == pytest.approx(np.mean(values), rel=1e-12)
            assert rows["net_return"].iloc[n] == pytest.approx(net / len(parts) / before, abs=1e-12)
            np.testing.assert_allclose(rows["action"].iloc[n], np.array(exposure) / len(parts) / before, atol=1e-12)
            assert rows["net_exposure"].iloc[n] == pytest.approx(sum(exposure) / len(parts) / before, abs=1e-12)


def rng_rows(count, seed):
    return {0, count - 1, *np.random.default_rng(seed).integers(count, size=4).tolist()}


def test_a_book_needs_symbols_and_ranges(small_data):
    split = small_data.panel.split()["train"]
    frame = ledger.backtest(backtester(small_data, split), changing, small_data.panel, split)
    with pytest.raises(ValueError, match="book: columns .*expected symbol and range"):
        ledger.book(frame)


def account_in_money(panel: Panel, fill: str, costs, targets, first: int, stop: int) -> list[float]:
    """Equity at every mark, from the panel's prices, with shares and cash; costs by bisection. No square-root impact."""
    c = costs.rates[0]
    linear, quadratic = float(c.commission + c.spread + c.slippage + c.linear_impact), float(c.quadratic_impact)
    mark, path = panel.filled("close"), []
    shares, cash, equity = np.zeros(panel.num_symbols), 1.0, 1.0
    for t in range(first, stop - 1):
        bar = t if fill == "same_close" else t + 1
        prices = {"next_open": panel.open, "next_close": panel.close, "same_close": panel.close}[fill][bar]
        price = np.where(panel.present[bar], prices, mark[t])
        known = np.isfinite(mark[t])
        gone = known & ~panel.present[max(0, bar - 10) : bar + 1].any(axis=0) & (bar >= 10)
        trades_in = (known & panel.present[bar]) | gone
        price, now, later = (np.where(known, p, 0.0) for p in (price, mark[t], mark[t + 1]))
        held = shares * now
        wealth = cash + (shares * price).sum()
        wanted = np.where(gone, 0.0, targets[t])

        def trade(after, trades_in=trades_in, wanted=wanted, position=shares * price):
            return np.where(trades_in, wanted * after - position, 0.0)

        def cost(trade, wealth=wealth):
            return linear * np.abs(trade).sum() + quadratic * (trade**2).sum() / wealth

        low, high = 0.5 * wealth, wealth
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (low, middle) if middle + cost(trade(middle)) > wealth else (middle, high)
        order = trade(high)
        cash -= order.sum() + cost(order)
        shares = shares + np.divide(order, price, out=np.zeros_like(price), where=price > 0)
        position, base = (held, equity) if fill == "next_close" else (shares * price, wealth - cost(order))
        gross, short = np.abs(position).sum(), -np.minimum(position, 0).sum()
        charges = c.borrow * short + c.financing * max(0.0, gross - base) - c.cash * max(0.0, base - gross)
        cash -= panel.bar_years[t] * float(charges)
        equity = cash + (shares * later).sum()
        path.append(equity)
    return path


@pytest.mark.parametrize("fill", FILLS)
def test_weights_earn_what_shares_and_cash_earn(fill):
    """Leveraged, long and short, over gaps, a late listing, a halt and a delisting, with every cost."""
    panel = ragged_panel(4, bars=100)
    costs = load_costs(DEAR + ":sqrt_impact=0:quadratic_impact_bps=50:linear_impact_bps=2")
    rng = np.random.default_rng(0)
    targets = rng.normal(0, 0.3, (panel.num_bars, panel.num_symbols)) * (rng.random((panel.num_bars, 1)) < 0.8)
    split = Split("test", np.array([[30, 60], [60, 100]]))
    ex = execution(panel, fill, costs)
    found = ledger.backtest_weights(panel, ex, costs.rates, split, targets)
    assert tuple(found.columns) == ledger.LEDGER and not found.isna().any().any()
    for r, (start, stop) in enumerate(split.ranges):
        equity = found.loc[found["market"] == r, "equity"]
        np.testing.assert_allclose(equity, account_in_money(panel, fill, costs, targets, start, stop), rtol=1e-10)
        times = found.loc[found["market"] == r, "timestamp"].to_numpy("datetime64[ns]")
        assert_same_bits(times, panel.timestamps[start + 1 : stop], "timestamp")
    for name in CHARGES + ("interest", "turnover"):
        assert found[name].sum() > 0, f"{name} was never charged: the test shows nothing"


@pytest.mark.parametrize("fill", FILLS)
def test_buy_and_hold_earns_the_price_ratio(fill, small_panel):
    costs = load_costs("zero")
    split = small_panel.split()["test"]
    targets = np.tile(np.eye(small_panel.num_symbols)[2], (small_panel.num_bars, 1))
    found = ledger.backtest_weights(small_panel, execution(small_panel, fill, costs), costs.rates, split, targets)
    for r, (start, stop) in enumerate(split.ranges):
        rows = found[found["market"] == r]
        price = {
            "next_open": small_panel.open[start + 1, 2],
            "next_close": small_panel.close[start + 1, 2],
            "same_close": small_panel.close[start, 2],
        }[fill]
        assert rows["equity"].iloc[-1] == pytest.approx(small_panel.close[stop - 1, 2] / price, rel=1e-12)
        np.testing.assert_allclose(rows["turnover"], [1.0] + [0.0] * (len(rows) - 1), atol=1e-12)


def test_ruined_weights_stay_flat(small_panel):
    costs = load_costs("zero")
    split = small_panel.split()["test"]
    ex = execution(small_panel, "next_open", costs)
    to_mark = ex.to_mark.copy()
    to_mark[split.ranges[0, 0] + 5] = -0.99
    equal = np.full((small_panel.num_bars, small_panel.num_symbols), 1 / small_panel.num_symbols)
    found = ledger.backtest_weights(small_panel, ex._replace(to_mark=to_mark), costs.rates, split, equal)
    first = found[found["market"] == 0].reset_index(drop=True)
    assert len(first) == np.diff(split.ranges[0])[0] - 1 and 0 < first["equity"][5] <= RUIN
    assert (first["equity"][5:] == first["equity"][5]).all() and (first.loc[6:, "turnover"] == 0).all()
    assert (found.loc[found["market"] == 1, "equity"] > 0.5).all()


@pytest.mark.parametrize("ragged", (False, True))
def test_money_adds_up_in_every_row(ragged):
    panel, config = (ragged_panel(2, bars=200), TINY) if ragged else (make_panel(SMALL, 5), CONFIG)
    data = LeadLagData(panel, replace(config, costs=DEAR, gross=1.5))
    split = whole(panel) if ragged else panel.split()["test"]
    market = data.market(split)
    rng = np.random.default_rng(0)
    targets = rng.normal(0, 0.3, (panel.num_bars, panel.num_symbols)) * (rng.random((panel.num_bars, 1)) < 0.5)
    for frame in (
        ledger.backtest(backtester(data, split), changing, panel, split),
        ledger.backtest_weights(panel, data.execution, market.rates, split, targets, market.starts),
    ):
        money = frame["gross_return"] + frame["interest"] - sum(frame[name] for name in CHARGES)
        np.testing.assert_allclose(frame["net_return"], money, rtol=0, atol=1e-12)
        before = frame.groupby("market")["equity"].shift(fill_value=1.0)
        np.testing.assert_allclose(frame["equity"], before * (1 + frame["net_return"]), rtol=1e-12)
        for name in CHARGES:
            assert frame[name].sum() > 0, f"{name} was never charged: the test shows nothing"


def test_run_directories_never_collide(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: ledger.new_run_dir(str(tmp_path / "a/runs"), "ALE/Pong-v5", "ppo", 3), range(40)))
    assert len(set(paths)) == 40 and all(path.is_dir() for path in paths)
    assert {path.parent for path in paths} == {tmp_path / "a/runs"}
    assert all(re.fullmatch(r"ALE-Pong-v5__ppo__3__\d{10}", path.name) for path in paths)


def test_json_has_null_for_what_is_no_number(tmp_path):
    path = tmp_path / "run.json"
    content = {
        "nan": float("nan"),
        "deep": [{"inf": np.float64("inf"), "minus": (-np.inf, 1.5)}],
        "numpy": [np.int64(3), np.float32(0.5), np.bool_(True), np.float32("nan")],
        5: None,
    }
    ledger.write_json(path, content)
    expected = {"nan": None, "deep": [{"inf": None, "minus": [None, 1.5]}], "numpy": [3, 0.5, True, None], "5": None}
    text = path.read_text()
    assert json.loads(text) == expected and "NaN" not in text and "Infinity" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, frame = tmp_path / "run.json", tmp_path / "ledger.parquet"
    ledger.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        ledger.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    written = table([0.1, 0.2])
    ledger.write_ledger(frame, written)

    def disk_is_full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", disk_is_full)
    with pytest.raises(OSError, match="no space"):
        ledger.write_ledger(frame, table([0.3]))
    pd.testing.assert_frame_equal(pd.read_parquet(frame), written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.parquet", "run.json"]


def test_provenance_says_what_ran_on_what(tmp_path):
    script = ROOT / "algos" / "ppo_leadlag.py"
    found = ledger.provenance(str(script), "cpu")
    assert found["script"] == "ppo_leadlag.py" and found["device"] == "cpu"
    assert found["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert {"torch", "numpy", "numba", "gymnasium", "pandas"} <= set(found["packages"])
    assert found["packages"]["numpy"] == np.__version__ and found["packages"]["pandas"] == pd.__version__
    assert found["platform"] and found["python"].startswith("3.")


def test_provenance_knows_the_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    folder = tmp_path / "project"
    folder.mkdir()
    script = folder / "script.py"
    script.write_text("1\n")
    assert ledger.provenance(str(script), "cpu")["git_commit"] is None

    def git(*args):
        call = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.hooksPath=", *args]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "one", "--no-gpg-sign")
    git("tag", "-a", "v1", "-m", "a tag does not stand in for the commit")
    commit = git("rev-parse", "HEAD")
    assert ledger.provenance(str(script), "cpu")["git_commit"] == commit and len(commit) == 40
    script.write_text("2\n")
    assert ledger.provenance(str(script), "cpu")["git_commit"] == f"{commit}-dirty"


def test_panel_is_described_by_content_and_times(small_panel):
    splits = small_panel.split()
    found = ledger.describe_panel(small_panel, splits)
    assert found["name"] == SMALL and found["sha256"] == small_panel.sha256 and len(found["sha256"]) == 64
    assert found["symbols"] == list(small_panel.symbols) and found["bars_per_year"] == small_panel.bars_per_year
    assert set(found["splits"]) == {"train", "val", "test"}
    assert found["splits"]["test"] == {
        "start": pd.Timestamp(small_panel.timestamps[0]).isoformat(),
        "end": pd.Timestamp(small_panel.timestamps[-1]).isoformat(),
        "bars": 800,
    }
