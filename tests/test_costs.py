"""The one accounting step and the tables it reads: money is conserved, targets are met, nobody fills in the past."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from conftest import DEAR, FILLS, TINY, assert_same_bits, make_env, ragged_panel, random_actions, rollout, tampered, whole
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from envs.costs import (
    DELISTED,
    PRESETS,
    RECORD,
    RUIN,
    TRADABLE,
    UNTRADABLE,
    Costs,
    account_step,
    default_fill,
    execution,
    load_costs,
)
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.panel import Panel
from envs.synthetic import make_panel

CHARGES = ("commission", "spread", "slippage", "impact", "borrow", "financing")
ZERO = PRESETS["zero"]


@dataclass
class Bar:
    """The arguments of one accounting step."""

    weights: np.ndarray
    target: np.ndarray
    to_fill: np.ndarray
    to_mark: np.ndarray
    status: np.ndarray
    costs: Costs
    impact: np.ndarray
    years: float = 1 / 252
    fill_at_end: bool = False
    equity: float = 1.0

    def settle(self):
        """Growth, the weights at the next mark, and the record by name."""
        weights, record = self.weights.copy(), np.zeros(len(RECORD))
        growth = account_step(
            weights, self.target, self.to_fill, self.to_mark, self.status, self.impact, self.years, self.fill_at_end,
            self.equity, self.costs.rates[0], record,
        )  # fmt: skip
        return growth, weights, dict(zip(RECORD, record))


def bar(weights, target, to_fill=0.0, to_mark=0.0, status=TRADABLE, costs=ZERO, impact=(), **rest) -> Bar:
    """A Bar from lists and scalars."""
    weights = np.array(weights, float)
    arrays = (np.broadcast_to(np.asarray(a, float), weights.shape).copy() for a in (target, to_fill, to_mark))
    status = np.broadcast_to(np.asarray(status, np.int8), weights.shape).copy()
    return Bar(weights, *arrays, status, costs, np.array(impact, float), **rest)


def signed_weights(rng, n):
    """Long and short, gross between 0 and 3, some of them 0."""
    weights = rng.uniform(-1, 1, n) * (rng.random(n) < 0.8)
    return weights * rng.uniform(0, 3) / max(1e-9, np.abs(weights).sum())


@st.composite
def bars(draw, statuses=(UNTRADABLE, TRADABLE, DELISTED)):
    """Any step: every cost may be 0, returns are -60%..+100%, with and without square-root impact."""
    n = draw(st.integers(1, 6))
    charged = draw(st.lists(st.booleans(), min_size=9, max_size=9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    calm = draw(st.booleans())  # small moves, so that not every leveraged case is ruined
    low, high = (-0.06, 0.1) if calm else (-0.6, 1.0)
    most = (50, 50, 50, 50, 500, 0, 0.5, 0.5, 0.3)
    rates = [rng.uniform(0, m) * on for m, on in zip(most, charged)]
    return Bar(
        weights=signed_weights(rng, n) * draw(st.booleans()),
        target=signed_weights(rng, n) * draw(st.booleans()),
        to_fill=rng.uniform(low, high, n),
        to_mark=rng.uniform(low, high, n),
        status=rng.choice(statuses, n).astype(np.int8),
        costs=Costs("random", *rates),
        impact=rng.uniform(0, 0.01, n) if charged[5] else np.zeros(0),
        years=draw(st.sampled_from((0.0, 1 / 252, 3 / 365, 1.0))),
        fill_at_end=draw(st.booleans()),
        equity=draw(st.sampled_from((0.06, 1.0, 7.5))),
    )


def fixed_point(b: Bar):
    """account_step again, slowly: equity after costs E <- E1 - cost(E) until it stands still."""
    c = b.costs.rates[0]
    linear = float(c.commission + c.spread + c.slippage)
    position = [float(w * (1 + r)) for w, r in zip(b.weights, b.to_fill)]
    at_fill = 1 + sum(float(w * r) for w, r in zip(b.weights, b.to_fill))
    wanted = [float(w) if s == TRADABLE else 0.0 for w, s in zip(b.target, b.status)]

    def trades(after):
        return [0.0 if s == UNTRADABLE else w * after - p for w, p, s in zip(wanted, position, b.status)]

    def impact_of(trade):
        cost = sum(abs(x) * float(c.linear_impact) for x in trade)
        if at_fill > 0:
            cost += sum(float(c.quadratic_impact) * x * x / at_fill for x in trade)
        for x, y in zip(trade, b.impact):
            cost += float(y) * abs(x) * np.sqrt(abs(x) * b.equity)
        return cost

    after = at_fill
    for _ in range(1000):
        trade = trades(after)
        before, after = after, at_fill - linear * sum(map(abs, trade)) - impact_of(trade)
        if after <= 0 or after == before:
            break
    trade = trades(max(after, 0.0))  # with nothing left, all that can be is closed
    turnover = sum(map(abs, trade))
    position = [p + x for p, x in zip(position, trade)]
    record = {"commission": turnover * c.commission, "spread": turnover * c.spread, "slippage": turnover * c.slippage}
    record["impact"] = impact_of(trade)
    after = at_fill - sum(record.values())
    ruined = after <= 0  # nothing that could not be closed may revive the account
    profit = 0.0 if ruined else sum(p * r for p, r in zip(position, b.to_mark))
    held, equity = (b.weights, 1.0) if b.fill_at_end else (position, after)
    held, equity = ([], 0.0) if ruined else (held, equity)
    gross = sum(abs(w) for w in held)
    record["borrow"] = b.years * c.borrow * sum(-w for w in held if w < 0)
    record["financing"] = b.years * c.financing * max(0.0, gross - equity)
    record["interest"] = b.years * c.cash * max(0.0, equity - gross)
    growth = after + profit - record["borrow"] - record["financing"] + record["interest"]
    record |= {"net_return": growth - 1, "gross_return": at_fill - 1 + profit}
    record["turnover"] = turnover / at_fill if at_fill > 0 else 0.0
    record["gross_exposure"] = sum(map(abs, position)) / after if after > 0 else 0.0
    record["net_exposure"] = sum(position) / after if after > 0 else 0.0
    weights = [p * (1 + r) / growth if growth > 0 else 0.0 for p, r in zip(position, b.to_mark)]
    return growth, weights, record


@given(bars())
@settings(max_examples=1500)
def test_equity_change_is_profit_and_carry_less_costs(b):
    growth, _, r = b.settle()
    explained = r["gross_return"] - sum(r[name] for name in CHARGES) + r["interest"]
    assert r["net_return"] == growth - 1
    assert abs(r["net_return"] - explained) <= 1e-12 * max(1.0, *map(abs, r.values()))
    assert all(r[name] >= 0 for name in (*CHARGES, "interest", "turnover", "gross_exposure"))


@given(bars())
@settings(max_examples=1000)
def test_step_equals_the_slow_fixed_point(b):
    growth, weights, record = b.settle()
    slow_growth, slow_weights, slow = fixed_point(b)
    assert growth == pytest.approx(slow_growth, rel=1e-12, abs=1e-12)
    assume(abs(growth) > 1e-6)  # dividing by an equity of nearly nothing magnifies rounding
    for name, value in slow.items():
        scale = 1.0 if "exposure" not in name else max(1.0, abs(value) ** 2)
        assert record[name] == pytest.approx(value, rel=1e-12, abs=1e-12 * scale), name
    np.testing.assert_allclose(weights, slow_weights, rtol=1e-12, atol=1e-12 * max(1.0, 1 / abs(growth)) ** 2)


@given(bars(statuses=(TRADABLE,)))
@settings(max_examples=800)
def test_target_is_met_after_costs(b):
    b.to_mark[:] = 0.0
    b.years = 0.0
    growth, weights, record = b.settle()
    if growth <= 0:
        assert not weights.any()
        return
    np.testing.assert_allclose(weights, b.target, atol=1e-10)
    assert record["gross_exposure"] == pytest.approx(np.abs(b.target).sum(), abs=1e-10)
    assert record["net_exposure"] == pytest.approx(b.target.sum(), abs=1e-10)


@given(bars())
@settings(max_examples=500)
def test_untradable_positions_are_left_alone(b):
    growth, weights, _ = b.settle()
    assume(growth > 1e-3)
    halted = b.status == UNTRADABLE
    position = b.weights * (1 + b.to_fill) * (1 + b.to_mark)
    np.testing.assert_allclose(weights[halted] * growth, position[halted], rtol=1e-12, atol=1e-14)
    assert not weights[b.status == DELISTED].any()


def test_turnover_is_measured_against_drifted_weights():
    """Half in each of two; the first doubles before the fill: 2/3 and 1/3 of 1.5. Back to halves trades 1/6 each."""
    costs = replace(ZERO, commission_bps=60)
    _, _, record = bar([0.5, 0.5], [0.5, 0.5], to_fill=[1.0, 0.0]).settle()
    assert record["turnover"] == pytest.approx(1 / 3, abs=1e-15)
    growth, _, record = bar([0.5, 0.5], [0.5, 0.5], to_fill=[1.0, 0.0], costs=costs).settle()
    # E = 1.5 - c ((1 - E/2) + (E/2 - 1/2)) = 1.5 - c/2
    assert growth == pytest.approx(1.5 - 0.006 / 2, abs=1e-15)
    assert record["commission"] == pytest.approx(0.006 / 2, abs=1e-15)


def test_one_purchase_by_hand():
    """All cash to one symbol at 1% cost: E = 1 - 0.01 E; then it gains 10%."""
    growth, weights, record = bar([0.0], [1.0], to_mark=0.1, costs=replace(ZERO, half_spread_bps=100)).settle()
    assert growth == pytest.approx(1.1 / 1.01, abs=1e-15)
    assert record["spread"] == pytest.approx(0.01 / 1.01, abs=1e-15)
    assert record["turnover"] == pytest.approx(1 / 1.01, abs=1e-15)
    assert weights[0] == pytest.approx(1.0, abs=1e-15)


def test_cash_costs_nothing():
    """Selling 0.4 of equity pays on 0.4, although cash grows by as much; cash to cash and holding pay nothing."""
    dear = replace(ZERO, commission_bps=40, half_spread_bps=30, slippage_bps=20, linear_impact_bps=10, quadratic_impact_bps=9)
    growth, _, record = bar([0.0, 0.0], [0.0, 0.0], to_fill=0.3, to_mark=-0.2, costs=dear).settle()
    assert growth == 1.0 and record["turnover"] == 0.0
    weights, moves = np.array([0.3, -0.2, 0.4]), np.array([0.1, -0.2, 0.5])
    drifted = weights * (1 + moves) / (1 + weights @ moves)
    growth, _, record = bar(weights, drifted, to_fill=moves, costs=dear).settle()
    assert growth == pytest.approx(1 + weights @ moves, abs=1e-15) and record["turnover"] < 1e-15
    _, _, record = bar([0.4], [0.0], costs=replace(ZERO, commission_bps=40)).settle()
    assert record["turnover"] == 0.4 and record["commission"] == pytest.approx(0.4 * 0.004, abs=1e-17)


def test_delisted_is_closed_at_its_last_price_with_costs():
    """The target of a delisted symbol is not bought; the short in it is closed for 1%."""
    b = bar([-0.5, 0.0], [-0.9, 0.0], status=[DELISTED, TRADABLE], costs=replace(ZERO, slippage_bps=100))
    growth, weights, record = b.settle()
    assert record["slippage"] == pytest.approx(0.005, abs=1e-17)
    assert growth == pytest.approx(0.995, abs=1e-15)
    assert not weights.any()


def test_impact_by_hand():
    """Selling everything trades the known sizes 0.3 and 0.2: linear, quadratic and square-root impact add up."""
    costs = replace(ZERO, linear_impact_bps=10, quadratic_impact_bps=100)
    b = bar([0.3, -0.2], [0.0, 0.0], to_fill=0.0, costs=costs, impact=[0.02, 0.01], equity=4.0)
    _, _, record = b.settle()
    expected = 0.001 * 0.5 + 0.01 * (0.09 + 0.04) + 0.02 * 0.3 * np.sqrt(0.3 * 4) + 0.01 * 0.2 * np.sqrt(0.2 * 4)
    assert record["impact"] == pytest.approx(expected, abs=1e-16)


@pytest.mark.parametrize("fill_at_end", (False, True))
@pytest.mark.parametrize("gross", (0.6, 2.0))
def test_carry_by_hand(fill_at_end, gross):
    """Half long, half short, free trading: it accrues on what was held, new weights or (fill at the end) old ones."""
    costs = replace(ZERO, borrow_rate=0.04, financing_rate=0.1, cash_rate=0.02)
    held, other = [gross / 2, -gross / 2], [0.1, -0.3]
    weights, target = (held, other) if fill_at_end else (other, held)
    growth, _, record = bar(weights, target, costs=costs, years=0.25, fill_at_end=fill_at_end).settle()
    assert record["borrow"] == pytest.approx(0.25 * 0.04 * gross / 2, abs=1e-16)
    assert record["financing"] == pytest.approx(0.25 * 0.1 * max(0, gross - 1), abs=1e-16)
    assert record["interest"] == pytest.approx(0.25 * 0.02 * max(0, 1 - gross), abs=1e-16)
    assert growth == pytest.approx(1 - record["borrow"] - record["financing"] + record["interest"], abs=1e-15)


@pytest.mark.parametrize("when", ("to_fill", "to_mark"))
def test_ruin_leaves_no_growth_and_no_weights(when):
    growth, weights, record = bar([3.0, 0.0], [3.0, 0.0], costs=Costs(), **{when: [-0.5, 0.0]}).settle()
    assert growth <= 0 and not weights.any()
    assert record["net_return"] == growth - 1


def test_a_halted_holding_cannot_revive_a_ruined_account():
    """At the fill 3 lose half: equity is gone, although the halted second symbol then doubles."""
    fill, mark = [-0.5, 0.0], [0.0, 1.0]
    growth, weights, _ = bar([3.0, 1.0], [0.0, 0.0], fill, mark, status=[TRADABLE, UNTRADABLE]).settle()
    assert growth == -0.5 and not weights.any()


def test_ruin_terminates_and_the_next_episode_starts_whole():
    data = LeadLagData(make_panel("synthetic:noise:vol=0.4:bars=300:train=1:val=1:test=1:assets=4"), replace(TINY, gross=3))
    env = make_env(data, 16, episode_length=0)
    log = rollout(env, random_actions(env, 60))
    equity = log["record"][..., RECORD.index("equity")]
    assert log["terminated"].any()
    np.testing.assert_array_equal(log["terminated"], equity <= RUIN)
    assert not (log["terminated"] & log["truncated"]).any()
    after = np.roll(log["terminated"], 1, axis=0)
    after[0] = False
    growth = 1 + log["record"][..., RECORD.index("net_return")]
    np.testing.assert_allclose(equity[after], growth[after], rtol=1e-13)  # from 1 again
    np.testing.assert_allclose(log["reward"], np.log(np.maximum(growth, RUIN)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("fill", FILLS)
def test_whole_equity_path_adds_up(fill):
    """Over gaps, a listing, a halt and a delisting: products of returns and sums of money both give the equity."""
    data = LeadLagData(ragged_panel(1), replace(TINY, costs=DEAR, fill=fill, gross=1.5))
    env = make_env(data, split=whole(data.panel), random_start=False, episode_length=0)
    steps = env._market.stops[0] - 1 - env._market.starts[0]
    log = rollout(env, random_actions(env, steps))
    assert log["truncated"][-1, 0] and not log["truncated"][:-1].any()
    record = dict(zip(RECORD, log["record"][:, 0].T))
    equity = record["equity"]
    np.testing.assert_allclose(np.cumprod(1 + record["net_return"]), equity, rtol=1e-13)
    before = np.append(1.0, equity[:-1])
    money = before * (record["gross_return"] + record["interest"] - sum(record[name] for name in CHARGES))
    np.testing.assert_allclose(1 + np.cumsum(money), equity, rtol=1e-12)
    for name in (*CHARGES, "turnover"):
        assert record[name].sum() > 0, f"{name} was never charged: the test shows nothing"


NAN = np.nan
OPEN = np.array(
    [[100, 50, NAN, 20], [104, 52, NAN, 21], [105, 57, 8, NAN], [98, NAN, 11, NAN], [100, 63, 12, NAN], [108, 67, 9, NAN]]
)
CLOSE = np.array(
    [[100, 50, NAN, 20], [110, 55, NAN, 22], [99, 60, 10, NAN], [99, NAN, 12, NAN], [108, 66, 9, NAN], [110, 68, 9, NAN]]
)
# prices by hand: the fill of the step from each row, the last mark; a halted or a dead symbol fills and marks at its last price
MARK = np.array(
    [[100, 50, NAN, 20], [110, 55, NAN, 22], [99, 60, 10, 22], [99, 60, 12, 22], [108, 66, 9, 22], [110, 68, 9, 22]]
)
NEXT_OPEN = np.array([[104, 52, NAN, 21], [105, 57, NAN, 22], [98, 60, 11, 22], [100, 63, 12, 22], [108, 67, 9, 22]])
U, T, D = UNTRADABLE, TRADABLE, DELISTED
BAR_NEXT = np.array([[T, T, U, T], [T, T, U, U], [T, U, T, U], [T, T, T, D], [T, T, T, D]])
BAR_NOW = np.array([[T, T, U, T], [T, T, U, T], [T, T, T, U], [T, U, T, U], [T, T, T, D]])


@pytest.mark.parametrize(
    "fill, price, status",
    (("next_open", NEXT_OPEN, BAR_NEXT), ("next_close", MARK[1:], BAR_NEXT), ("same_close", MARK[:-1], BAR_NOW)),
)
def test_fills_by_hand(fill, price, status):
    """Columns: traded throughout, halted in row 3, listed in row 2, gone after row 1 and delisted two bars later."""
    panel = hand_panel()
    found = execution(panel, fill, ZERO, delist_after=2)
    np.testing.assert_allclose(found.to_fill[:-1], np.nan_to_num(price / MARK[:-1] - 1), atol=1e-15)
    np.testing.assert_allclose(found.to_mark[:-1], np.nan_to_num(MARK[1:] / price - 1) * np.isfinite(MARK[:-1]), atol=1e-15)
    np.testing.assert_array_equal(found.status[:-1], status)
    assert not found.to_fill[-1].any() and not found.to_mark[-1].any() and not found.status[-1].any()
    assert found.fill_at_end == (fill == "next_close")
    np.testing.assert_allclose(found.years[:-1] * 365.25, [1, 1, 3, 1, 1])
    assert found.impact.shape == (1, 1)


def hand_panel(**changes) -> Panel:
    days = np.array(["2024-01-03", "2024-01-04", "2024-01-05", "2024-01-08", "2024-01-09", "2024-01-10"], "datetime64[ns]")
    return Panel(**{"name": "hand", "timestamps": days, "symbols": tuple("ABCD"), "close": CLOSE, "open": OPEN} | changes)


def test_default_fill_and_what_a_panel_cannot_fill():
    closes = hand_panel(open=None)
    assert default_fill(hand_panel()) == "next_open" and default_fill(closes) == "next_close"
    with pytest.raises(ValueError, match="--fill next_open.*hand.*no open.*expected next_close or same_close"):
        execution(closes, "next_open", ZERO)
    with pytest.raises(ValueError, match="--fill at_noon: expected one of.*next_open"):
        execution(closes, "at_noon", ZERO)


def test_no_step_leads_out_of_a_history(small_panel):
    found = execution(small_panel, "next_open", ZERO)
    last = np.append(small_panel.segments[1:], small_panel.num_bars) - 1
    assert not found.status[last].any() and not found.to_fill[last].any() and not found.to_mark[last].any()
    inner = np.setdiff1d(np.arange(small_panel.num_bars), last)
    assert (found.status[inner] == TRADABLE).all()
    product = (1 + found.to_fill[inner]) * (1 + found.to_mark[inner])
    np.testing.assert_allclose(product, small_panel.close[inner + 1] / small_panel.close[inner], rtol=1e-14)


@pytest.mark.parametrize("fill", FILLS)
def test_execution_never_depends_on_later_bars(fill):
    """Row t is the step to bar t+1, and no later bar changes it; an order filled at the close of bar t is known at t."""
    panel, rng, costs = ragged_panel(2), np.random.default_rng(0), load_costs(DEAR)
    at_once = ("impact", "status", "to_fill") if fill == "same_close" else ("impact",)
    for t in (20, 59, 60, 67, 68, 69, 70, 110):
        other = execution(tampered(panel, t, rng), fill, costs)
        for name, values in execution(panel, fill, costs)._asdict().items():
            if name not in ("years", "fill_at_end"):
                rows = t + 1 if name in at_once else t
                assert_same_bits(getattr(other, name)[:rows], values[:rows], f"{name} before row {rows}")


def test_square_root_impact_is_trailing_volatility_times_root_of_participation():
    panel, costs, window = ragged_panel(3), replace(ZERO, sqrt_impact=0.7, capital=5e6), 20
    found, close = execution(panel, "next_open", costs).impact, panel.filled("close")
    per_day = max(1.0, panel.bars_per_year / 365.25)
    for t in range(1, panel.num_bars):
        rows = range(max(0, t + 1 - window), t + 1)
        for i in range(panel.num_symbols):
            moves = [np.log(close[u, i] / close[u - 1, i]) if u > 0 and close[u - 1, i] > 0 else 0.0 for u in rows]
            traded = [panel.volume[u, i] * panel.close[u, i] if panel.present[u, i] else 0.0 for u in rows]
            value, variance = np.mean(traded) * per_day, np.mean(np.square(moves)) * per_day
            expected = 0.7 * np.sqrt(variance * 5e6 / value) if value > 0 else 0.0
            assert found[t, i] == pytest.approx(expected, rel=1e-6, abs=1e-9), (t, i)


@pytest.mark.parametrize(
    "spec, words",
    (
        ("brokerage", ("--costs brokerage", "unknown preset", "institutional")),
        ("zero:commision_bps=1", ("--costs zero:commision_bps=1", "commision_bps", "commission_bps")),
        ("institutional:commission_bps", ("--costs", "commission_bps", "key=value")),
        ("institutional:commission_bps=much", ("--costs", "commission_bps='much'", "expected float")),
        ("institutional:name=mine", ("--costs", "name=mine", "expected key=value")),
        ("institutional:commission_bps=-1", ("costs", "commission_bps=-1", "not negative")),
        ("institutional:commission_bps=nan", ("costs", "commission_bps=nan", "finite")),
        ("institutional:capital=0", ("costs", "capital=0", "capital > 0")),
        ("institutional:commission_bps=9000", ("costs", "commission_bps=9000", "less than 5000 bps")),
    ),
)
def test_bad_costs_are_named(spec, words):
    with pytest.raises(ValueError) as error:
        load_costs(spec)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_rate_of_every_preset_takes_a_fraction(preset):
    for key in (f.name for f in fields(Costs) if f.name != "name"):
        spec = f"{preset}:{key}=0.25"
        assert load_costs(spec) == replace(PRESETS[preset], **{key: 0.25}, name=spec)


def test_rates_are_plain_fractions():
    costs = load_costs("institutional:linear_impact_bps=3:cash_rate=-0.01")
    assert tuple(costs.rates[0]) == pytest.approx((0.5e-4, 1e-4, 0.5e-4, 3e-4, 1e-4, 0.005, 0.02, -0.01), abs=1e-18)


def test_scaled_costs_scale_every_charge_but_not_interest():
    costs = Costs("c", 1, 2, 3, 4, 5, 6, 0.1, 0.2, 0.3, 7e5)
    assert costs.scaled(2.0) == Costs("c x2", 2, 4, 6, 8, 10, 12, 0.2, 0.4, 0.3, 7e5)
    assert costs.scaled(0.0) == Costs("c x0", 0, 0, 0, 0, 0, 0, 0, 0, 0.3, 7e5)
    b = bar([0.5, -0.7], [0.9, 0.2], costs=Costs())
    charged = [replace(b, costs=Costs().scaled(x)).settle()[2] for x in (1, 3)]
    for name in ("commission", "spread", "slippage", "financing", "impact"):
        assert charged[1][name] == pytest.approx(3 * charged[0][name], rel=1e-2)


def test_config_passes_costs_on():
    with pytest.raises(ValueError, match="unknown preset 'free'"):
        LeadLagData(ragged_panel(0), LeadLagConfig(costs="free"))
