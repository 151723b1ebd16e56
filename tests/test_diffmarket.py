"""The torch accounting step: the kernel's money to 1e-9, gradients as finite differences say, and none that is no number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEAR, FILLS, assert_same_bits, ragged_panel, tampered
from hypothesis import given, settings
from hypothesis import strategies as st
from test_costs import CHARGES, Bar, signed_weights

from envs import diffmarket
from envs.costs import DELISTED, PRESETS, RECORD, RUIN, TRADABLE, UNTRADABLE, Costs, Execution, execution, load_costs
from envs.diffmarket import Account, DiffMarket, deleverage
from envs.ledger import backtest_weights

SMOOTH = (0.0, 1e-9, 1e-4, 1e-2, 1.0)
ORDINARY = (50, 50, 50, 50, 500, 0.2, 0.5, 0.5, 0.3)  # the most that each field of Costs may be, in their order
ABSURD = (1200, 1200, 1200, 1200, 50_000, 20, 10, 10, 5)
HUGE = Costs("huge", 300, 200, 100, 200, 2000, 0.5, 0.3, 0.4, 0.1)
CARRY_ONLY = replace(PRESETS["zero"], borrow_rate=0.3, financing_rate=0.4, cash_rate=0.1)
CHARGED_AT_FILL = CHARGES[:4]


@st.composite
def markets(draw, most=(ORDINARY, ABSURD)):
    """An Execution over gaps, a listing, a halt and a delisting, calm or wild enough for ruin, its costs, and a generator."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    panel = ragged_panel(draw(st.integers(0, 2**32)), bars=40, symbols=draw(st.integers(4, 6)))
    if draw(st.booleans()):
        panel = tampered(panel, 4, rng)
    costs = draw(st.sampled_from((*PRESETS.values(), *most)))
    if isinstance(costs, tuple):
        costs = Costs("random", *(rng.uniform(0, m) * (rng.random() < 0.7) for m in costs))
    elif draw(st.booleans()):
        costs = replace(costs, sqrt_impact=1.0)
    return execution(panel, draw(st.sampled_from(FILLS)), costs, draw(st.sampled_from((1, 10)))), costs, rng


def many_weights(rng, rows: int, symbols: int, leverage: float = 1.0) -> np.ndarray:
    """(rows, symbols) long and short, gross up to 3 times `leverage`; some rows are flat."""
    weights = np.stack([signed_weights(rng, symbols) for _ in range(rows)])
    return leverage * weights * (rng.random((rows, 1)) < 0.8)


def double(x, grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float64).requires_grad_(grad)


def make(ex: Execution, costs: Costs, smooth: float = 0.0, dtype=torch.float64) -> DiffMarket:
    return DiffMarket(ex, costs, smooth, dtype)


def holding(weights, equity=1.0, grad: bool = False) -> Account:
    """An account that is at its peak."""
    weights = double(weights, grad)
    equity = double(np.broadcast_to(np.asarray(equity, float), weights.shape[:-1]), grad)
    return Account(weights, equity, equity.detach())


def execution_by_hand(to_fill, to_mark, status=TRADABLE, impact=None, fill_at_end: bool = False) -> Execution:
    """(T, N) lists or what broadcasts to them; bars of a tenth of a year."""
    to_fill, to_mark, status = np.broadcast_arrays(np.atleast_2d(to_fill), np.atleast_2d(to_mark), status)
    impact = np.zeros((1, 1)) if impact is None else np.full(to_fill.shape, float(impact))
    years = np.full(len(to_fill), 0.1)
    return Execution(to_fill.astype(float), to_mark.astype(float), status.astype(np.int8), impact, years, fill_at_end)


def in_kernel(ex: Execution, costs: Costs, weights, targets, equity):
    """Bar t from weights[t] to targets[t] for every t: growth (T,), weights (T, N) and the record, (T,) each."""
    steps = [
        Bar(
            weights[t], targets[t], ex.to_fill[t], ex.to_mark[t], ex.status[t], costs, ex.impact[min(t, len(ex.impact) - 1)],
            ex.years[t], ex.fill_at_end, equity[t],
        ).settle()
        for t in range(len(weights))
    ]  # fmt: skip
    growth, weights, records = zip(*steps)
    growth = np.array(growth)
    record = {name: np.array([r[name] for r in records]) for name in RECORD}
    return growth, np.array(weights), record | {"equity": equity * growth}


def spent(record) -> torch.Tensor:
    return sum(record[name] for name in CHARGED_AT_FILL)


def everything(step) -> dict[str, torch.Tensor]:
    """All that a step says, by name."""
    account = step.account
    return {
        "growth": step.growth, "weights": account.weights, "peak": account.peak, "drawdown": account.drawdown
    } | step.record  # fmt: skip


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].detach(), value.detach(), rtol=tolerance, atol=tolerance, err_msg=name)


@given(markets(), st.sampled_from((0.3, 1.0, 8.0)))
@settings(max_examples=150)
def test_step_equals_the_kernel(market, leverage):
    """Every bar at once; what is divided by an equity of nearly nothing is compared in money."""
    ex, costs, rng = market
    bars, symbols = ex.status.shape
    weights, targets = many_weights(rng, bars, symbols, leverage), many_weights(rng, bars, symbols, leverage)
    equity = rng.choice([0.06, 1.0, 7.5], bars)
    growth, after, expected = in_kernel(ex, costs, weights, targets, equity)
    step = make(ex, costs).step(holding(weights, equity), double(targets), torch.arange(bars), record=True)
    assert tuple(step.record) == RECORD
    np.testing.assert_allclose(step.growth, growth, rtol=1e-9, atol=1e-9)
    small = 1 / np.minimum(1.0, np.abs(growth)) ** 2
    assert (np.abs(step.account.weights.numpy() - after) <= 1e-9 * (small[:, None] + np.abs(after))).all()
    r = {name: values.numpy() for name, values in step.record.items()}
    for name, value in expected.items():
        scale = 1.0 + np.abs(value) + (value**2 if "exposure" in name else 0.0)
        assert (np.abs(r[name] - value) <= 1e-9 * scale).all(), name
    np.testing.assert_array_equal(step.account.equity, r["equity"])
    np.testing.assert_array_equal(step.account.peak, np.maximum(equity, r["equity"]))
    money = r["gross_return"] + r["interest"] - sum(r[name] for name in CHARGES)
    assert (np.abs(r["net_return"] - money) <= 1e-12 * np.maximum(1.0, np.abs([*r.values()]).max(axis=0))).all()


def test_the_markets_of_these_tests_show_something():
    """Ruin before and after the fill, costs that nobody can pay, every status and every charge are among them."""
    seen, totals = set(), dict.fromkeys((*CHARGES, "interest", "turnover"), 0.0)

    @given(markets())
    @settings(max_examples=150)
    def look(market):
        ex, costs, rng = market
        bars, symbols = ex.status.shape
        weights, targets = many_weights(rng, bars, symbols, 8.0), many_weights(rng, bars, symbols, 8.0)
        growth, _, record = in_kernel(ex, costs, weights, targets, np.ones(bars))
        at_fill = 1 + (weights * ex.to_fill).sum(axis=1)
        unpaid = (at_fill > 0) & (record["gross_exposure"] == 0) & ((targets != 0) & (ex.status == TRADABLE)).any(axis=1)
        kinds = {"ruin at fill": at_fill <= 0, "unpaid": unpaid, "survival": growth > 0.5}
        kinds["ruin at mark"] = (growth <= 0) & (at_fill > 0) & ~unpaid
        seen.update(ex.status.ravel().tolist(), (name for name, cases in kinds.items() if cases.any()))
        for name in totals:
            totals[name] += record[name].sum()

    look()
    assert seen == {UNTRADABLE, TRADABLE, DELISTED, "ruin at fill", "ruin at mark", "unpaid", "survival"}
    assert all(total > 0 for total in totals.values()), totals


@pytest.mark.parametrize("fill", FILLS)
def test_hold_equals_a_backtest_of_weights(fill, small_panel):
    """Two ranges of one split at once, with ruin in one of them, after which its account stands still."""
    costs, split = load_costs(DEAR), small_panel.split()["test"]
    ex = execution(small_panel, fill, costs)
    ex.to_mark[split.ranges[0, 0] + 30] = -0.9
    rng = np.random.default_rng(0)
    targets = many_weights(rng, small_panel.num_bars, small_panel.num_symbols)
    targets[split.ranges[0, 0] + 30] = 0.3
    ledger = backtest_weights(small_panel, ex, costs.rates, split, targets)
    rows = torch.stack([torch.arange(start, stop - 1) for start, stop in split.ranges])
    account, growth, record = make(ex, costs).hold(double(targets)[rows], rows)
    for name, values in record.items():
        np.testing.assert_allclose(values.ravel(), ledger[name], rtol=1e-9, atol=1e-10, err_msg=name)
    equity = ledger["equity"].to_numpy().reshape(rows.shape)
    np.testing.assert_allclose(growth.cumprod(-1), equity, rtol=1e-9)
    np.testing.assert_allclose(account.equity, equity[:, -1], rtol=1e-9)
    np.testing.assert_allclose(account.peak, np.maximum(1.0, equity.max(axis=1)), rtol=1e-9)
    np.testing.assert_allclose(account.drawdown, equity[:, -1] / np.maximum(1.0, equity.max(axis=1)) - 1, rtol=1e-9)
    assert account.equity[0] <= RUIN < account.equity[1] and not account.weights[0].any() and (growth[0, 31:] == 1.0).all()


@pytest.mark.parametrize("dead", (RUIN, 0.0, -0.4))
def test_a_ruined_account_stays_as_it_is(dead):
    ex = execution_by_hand(0.1, [0.2, -0.1], impact=0.1)
    account = holding([[0.5, -0.4], [0.5, -0.4]], [dead, 1.0])
    step = make(ex, HUGE).step(account, double([0.9, 0.3]), torch.tensor(0), record=True)
    assert step.account.equity[0] == dead and step.growth[0] == 1.0 and not step.account.weights[0].any()
    assert all(values[0] == 0.0 for name, values in step.record.items() if name != "equity")
    assert step.record["equity"][0] == dead and step.account.peak[0] == dead
    assert step.growth[1] != 1.0 and step.account.weights[1].all()


GRADIENTS = [
    (fill, costs) for fill in FILLS for costs in (HUGE, replace(HUGE, sqrt_impact=0.0, quadratic_impact_bps=0.0), CARRY_ONLY)
]


@pytest.mark.parametrize("smooth", (0.0, 1e-2))
@pytest.mark.parametrize("fill, costs", GRADIENTS)
def test_gradients_equal_finite_differences(fill, costs, smooth):
    """Of all that a step says, for the order, the weights held and the equity; no kink is as near as the differences reach."""
    ex, rng = execution(ragged_panel(3, bars=60), fill, costs), np.random.default_rng(1)
    rows = torch.tensor([5, 27, 34, 50])
    assert set(ex.status[rows].ravel()) == {UNTRADABLE, TRADABLE, DELISTED}
    weights, targets = rng.uniform(-0.5, 0.5, (2, len(rows), ex.status.shape[1]))
    targets[0] *= 0.1  # gross below 1: interest
    weights[0] *= 0.1
    market = make(ex, costs, smooth)

    def step(target, weights, equity):
        said = everything(market.step(Account(weights, equity, torch.full_like(equity, 3.0)), target, rows, record=True))
        return tuple(said.values())

    inputs = double(targets, True), double(weights, True), double([0.3, 1.0, 2.0, 4.0], True)
    assert torch.autograd.gradcheck(step, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("smooth", (1e-3, 0.1))
def test_smooth_costs_have_a_gradient_at_no_trade(smooth):
    """Holding what is held, with and without impact, and staying in cash: there |x| has none."""
    held = torch.tensor([[0.4, -0.3], [0.2, 0.5], [0.0, 0.0]])
    market = make(execution_by_hand(0.0, [0.1, -0.2], impact=0.3), replace(HUGE, borrow_rate=0.0, financing_rate=0.0), smooth)

    def step(target, weights, equity):
        step = market.step(Account(weights, equity, equity.detach()), target, torch.tensor(0), record=True)
        names = (name for name in RECORD if name != "gross_exposure")  # which has a kink where a weight changes sign
        return step.growth, step.account.weights, *(step.record[name] for name in names)

    inputs = double(held, True), double(held, True), double([1.0, 2.0, 0.5], True)
    assert torch.autograd.gradcheck(step, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def assert_gradients_are_numbers(said: dict[str, torch.Tensor], **inputs: torch.Tensor):
    for name, value in said.items():
        assert torch.isfinite(value).all(), name
        if value.requires_grad:  # what is never charged does not
            gradients = torch.autograd.grad(value.sum(), inputs.values(), retain_graph=True, allow_unused=True)
            for what, gradient in zip(inputs, gradients):
                assert gradient is None or torch.isfinite(gradient).all(), f"of {name} for {what}"


# to_fill, to_mark, status, weights, order, equity: where a division, a root or a branch not taken could spoil a gradient
DEGENERATE = {
    "ruined at the fill": ([-0.5, 0.0], [0.1, 0.0], TRADABLE, [3.0, 0.2], [1.0, 1.0], 1.0),
    "exactly nothing at the fill": ([-0.5, 0.0], [0.1, 0.0], TRADABLE, [2.0, 0.0], [1.0, 1.0], 1.0),
    "ruined at the mark": (0.0, [-0.9, 0.0], TRADABLE, [1.5, 0.0], [1.5, 0.0], 1.0),
    "exactly nothing at the mark": (0.0, -1.0, TRADABLE, [1.0, 0.0], [1.0, 0.0], 1.0),
    "costs that cannot be paid": (0.0, 0.1, TRADABLE, [0.0, 0.0], [40.0, -40.0], 1.0),
    "delisted": (0.1, 0.0, DELISTED, [0.5, -0.5], [0.3, 0.3], 1.0),
    "untradable": (0.1, 0.2, UNTRADABLE, [0.5, -0.5], [0.3, 0.3], 1.0),
    "no trade": (0.0, 0.1, TRADABLE, [0.5, -0.5], [0.5, -0.5], 1.0),
    "cash to cash": (0.1, 0.1, TRADABLE, [0.0, 0.0], [0.0, 0.0], 1.0),
    "no equity": (0.0, 0.1, TRADABLE, [0.0, 0.0], [0.0, 0.0], 0.0),
    "no equity, but an order": (0.0, 0.1, TRADABLE, [0.0, 0.0], [1.0, 0.0], 0.0),
    "debt": (0.0, 0.1, TRADABLE, [0.5, 0.5], [1.0, 0.0], -0.5),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("costs", (PRESETS["zero"], HUGE))
@pytest.mark.parametrize("case", DEGENERATE)
def test_every_gradient_is_a_number(case, costs, dtype):
    """Also of the bars after; and nothing that is ordered once an account is ruined matters."""
    to_fill, to_mark, status, weights, order, equity = DEGENERATE[case]
    impact = None if costs is PRESETS["zero"] else 0.2
    for smooth in (0.0, 1e-3):
        ex = execution_by_hand(np.full((3, 2), to_fill), np.full((3, 2), to_mark), status, impact)
        market = make(ex, costs, smooth, dtype)
        inputs = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (weights, [order] * 3, equity)]
        start = Account(inputs[0], inputs[2], torch.tensor(2.0, dtype=dtype))
        account, growth, record = market.hold(inputs[1], torch.arange(3), start)
        said = {"weights": account.weights, "drawdown": account.drawdown, "growth": growth} | record
        assert_gradients_are_numbers(said, **dict(zip(("weights", "order", "equity"), inputs)))
        ruined = record["equity"] <= RUIN
        if ruined[0]:
            (gradient,) = torch.autograd.grad(account.equity, inputs[1])
            assert ruined.all() and not gradient[1:].any()


@given(markets(), st.sampled_from(SMOOTH), st.sampled_from((torch.float32, torch.float64)))
@settings(max_examples=60)
def test_no_market_spoils_a_gradient(market, smooth, dtype):
    ex, costs, rng = market
    bars, symbols = ex.status.shape
    weights, targets = many_weights(rng, bars, symbols, 8.0), many_weights(rng, bars, symbols, 8.0)
    equity = rng.choice([-0.1, 0.0, RUIN, 0.06, 1.0], bars)
    weights, targets, equity = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (weights, targets, equity))
    account = Account(weights, equity, torch.ones_like(equity))
    said = everything(make(ex, costs, smooth, dtype).step(account, targets, torch.arange(bars), record=True))
    assert_gradients_are_numbers(said, weights=weights, order=targets, equity=equity)


@given(markets(most=(ORDINARY,)), st.sampled_from(SMOOTH))
@settings(max_examples=60)
def test_no_trade_costs_nothing(market, smooth):
    """What has drifted is ordered as it is at the fill."""
    ex, costs, rng = market
    bars, symbols = ex.status.shape
    ex.status[ex.status == DELISTED] = TRADABLE
    weights = 0.5 * many_weights(rng, bars, symbols)
    at_fill = 1 + (weights * ex.to_fill).sum(axis=1, keepdims=True)
    target = weights * (1 + ex.to_fill) / at_fill
    step = make(ex, costs, smooth).step(holding(weights), double(target), torch.arange(bars), record=True)
    solvent = at_fill[:, 0] > 0.1
    assert solvent.any() and (spent(step.record)[solvent] <= 1e-14).all()
    ex.to_fill[:] = 0.0
    step = make(ex, costs, smooth).step(holding(weights), double(weights), torch.arange(bars), record=True)
    assert (spent(step.record) == 0.0).all() and (step.record["turnover"] == 0.0).all()


@given(markets())
@settings(max_examples=60)
def test_smooth_costs_rise_to_the_exact_ones(market):
    """The smaller `smooth`, the more is charged, never more than exactly."""
    ex, costs, rng = market
    bars, symbols = ex.status.shape
    weights, targets = many_weights(rng, bars, symbols), many_weights(rng, bars, symbols)
    charged, exact = [], None
    for smooth in sorted(SMOOTH, reverse=True):
        step = make(ex, costs, smooth).step(holding(weights), double(targets), torch.arange(bars), record=True)
        charged.append(spent(step.record))
        exact = step
    paid = exact.growth > RUIN  # nobody pays the whole of what ruins
    for less, more in zip(charged, charged[1:]):
        assert (less - more <= 1e-12)[paid].all()
    assert (charged[-1] - charged[-2] <= 1e-7)[paid].all()
    turnover = exact.record["turnover"]
    traded = paid & (turnover > 0.1) & (spent(exact.record) > 0)
    assert (charged[0] < 0.95 * charged[-1])[traded & (turnover < 3)].all()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("smooth", (0.0, 1e-2))
def test_batches_equal_one_account_at_a_time(fill, smooth):
    """Windows by groups, the rows of a window shared by its group; another window's Newton iterations change no result."""
    ex, rng = execution(ragged_panel(5, bars=60), fill, HUGE), np.random.default_rng(2)
    windows, group, bars, symbols = 4, 3, 9, ex.status.shape[1]
    first = torch.tensor([3, 15, 25, 36])
    targets = double(many_weights(rng, windows * group * bars, symbols).reshape(windows, group, bars, symbols))
    market = make(ex, HUGE, smooth)
    account, growth, record = market.hold(targets, first[:, None, None] + torch.arange(bars))
    assert growth.shape == (windows, group, bars) and account.weights.shape == (windows, group, symbols)
    for w in range(windows):
        for g in range(group):
            alone, alone_growth, alone_record = market.hold(targets[w, g], first[w] + torch.arange(bars))
            assert_close({"growth": growth[w, g]}, {"growth": alone_growth})
            assert_close({name: x[w, g] for name, x in record.items()}, alone_record)
            assert_close({name: x[w, g] for name, x in account._asdict().items()}, alone._asdict())


def test_one_account_fans_out_over_rows():
    """Rows broadcast against the account and the order: every way to say the same gives the same bits."""
    ex = execution(ragged_panel(5, bars=60), "next_open", CARRY_ONLY)
    weights, target = many_weights(np.random.default_rng(0), 2, ex.status.shape[1]) + 0.1
    for costs in (CARRY_ONLY, PRESETS["zero"], HUGE):
        market, rows = make(ex, costs), torch.arange(7)
        one = everything(market.step(holding(weights), double(target), rows, record=True))
        each = market.step(holding(np.tile(weights, (7, 1))), double(np.tile(target, (7, 1))), rows, record=True)
        for name, value in everything(each).items():
            assert_same_bits(one[name].expand_as(value), value, name)
        assert one["growth"].shape == (7,)


@pytest.mark.parametrize("fill", FILLS)
def test_step_by_step_equals_hold(fill):
    ex, rng = execution(ragged_panel(6, bars=60), fill, HUGE), np.random.default_rng(3)
    market, rows = make(ex, HUGE, 1e-3), torch.arange(20, 44)
    targets = double(many_weights(rng, 2 * 24, ex.status.shape[1]).reshape(2, 24, -1))
    last, growth, record = market.hold(targets, rows)
    assert list(record) == list(RECORD)
    account = market.account(2)
    assert (account.equity == 1.0).all() and (account.peak == 1.0).all() and not account.weights.any()
    for t in range(24):
        if t == 11:
            middle, half, _ = market.hold(targets[:, 11:], rows[11:], account)
            assert_same_bits(half, growth[:, 11:])
            assert_same_bits(middle.weights, last.weights)
        step = market.step(account, targets[:, t], rows[t], record=True)
        assert market.step(account, targets[:, t], rows[t]).record is None
        for name in RECORD:
            assert_same_bits(step.record[name], record[name][:, t], name)
        assert_same_bits(step.growth, growth[:, t])
        account = step.account
    for found, expected in zip(account, last):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("fill", FILLS)
def test_nothing_depends_on_later_bars_or_orders(fill):
    """Other bars after row t change no bit before it; an order has a gradient in its own bar and later ones, in none before."""
    panel, rng = ragged_panel(7, bars=60), np.random.default_rng(4)
    costs = replace(HUGE, sqrt_impact=0.02)
    targets, rows = 0.3 * many_weights(rng, 59, panel.num_symbols), torch.arange(59)
    _, growth, record = make(execution(panel, fill, costs), costs).hold(double(targets), rows)
    for t in (21, 30, 45):
        _, other, other_record = make(execution(tampered(panel, t, rng), fill, costs), costs).hold(double(targets), rows)
        assert_same_bits(other[:t], growth[:t])
        for name in RECORD:
            assert_same_bits(other_record[name][:t], record[name][:t], name)
        assert (other[t:] != growth[t:]).any()
    orders = double(targets, True)
    _, growth, _ = make(execution(panel, fill, costs), costs).hold(orders, rows)
    for t in (0, 25, 57):
        (gradient,) = torch.autograd.grad(growth[t], orders, retain_graph=True)
        assert not gradient[t + 1 :].any() and gradient[t].any() and (t == 0 or gradient[t - 1].any())


@given(markets(most=(ORDINARY,)))
@settings(max_examples=40)
def test_single_precision_is_close(market):
    ex, costs, rng = market
    bars, symbols = ex.status.shape
    weights, targets = many_weights(rng, bars, symbols), many_weights(rng, bars, symbols)
    exact = make(ex, costs).step(holding(weights), double(targets), torch.arange(bars), record=True)
    account = Account(*(x.float() for x in holding(weights)))
    single = make(ex, costs, dtype=torch.float32).step(account, double(targets).float(), torch.arange(bars), record=True)
    alive = exact.growth > RUIN
    for name, value in everything(single).items():
        expected = everything(exact)[name]
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value[alive], expected[alive], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(params=(torch.float32, torch.float64))
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("costs", (PRESETS["zero"], CARRY_ONLY, HUGE))
def test_the_default_dtype_does_not_matter(costs, dtype, default_dtype):
    """Everything has the market's own, to its last digits, whatever torch's default is."""
    ex, rng = execution(ragged_panel(5, bars=60), "next_open", costs), np.random.default_rng(5)
    weights, targets = many_weights(rng, 59, ex.status.shape[1]), many_weights(rng, 59, ex.status.shape[1])
    for smooth in (0.0, 1e-2):
        market = make(ex, costs, smooth, dtype)
        account = Account(*(x.to(dtype) for x in holding(weights)))
        step = market.step(account, double(targets).to(dtype), torch.arange(59), record=True)
        assert all(x.dtype == dtype for x in (*everything(step).values(), *market.account(2)))
        _, growth, record = market.hold(double(targets).to(dtype), torch.arange(59))
        assert growth.dtype == dtype and all(x.dtype == dtype for x in record.values())
        if dtype == torch.float64 and smooth == 0.0:
            expected, _, _ = in_kernel(ex, costs, weights, targets, np.ones(59))
            np.testing.assert_allclose(step.growth, expected, rtol=1e-12, atol=1e-12)


@given(markets(most=(ORDINARY,)))
@settings(max_examples=40)
def test_as_few_iterations_as_on_cuda_are_enough(market):
    ex, costs, rng = market
    bars, symbols = ex.status.shape
    account, targets = holding(many_weights(rng, bars, symbols)), double(many_weights(rng, bars, symbols))
    full = make(ex, costs).step(account, targets, torch.arange(bars))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffmarket, "_MAX_ITERATIONS", diffmarket._FIXED_ITERATIONS)
        few = make(ex, costs).step(account, targets, torch.arange(bars))
    np.testing.assert_allclose(few.growth, full.growth, rtol=1e-12, atol=1e-12)


def test_deleverage_scales_what_is_too_much():
    target = double([[1.0, -0.6], [0.3, -0.2], [0.5, 0.5], [0.0, 0.0], [2.0, 0.0]])
    found = deleverage(target, double([0.8, 0.8, 1.0, 0.5, 0.0]))
    np.testing.assert_allclose(found, [[0.5, -0.3], [0.3, -0.2], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]], rtol=1e-15)
    assert_same_bits(found[1:4], target[1:4])


@given(st.integers(0, 2**32), st.floats(0.0, 4.0))
def test_deleverage_meets_the_cap_in_proportion(seed, cap):
    target = double(many_weights(np.random.default_rng(seed), 20, 5))
    found, gross = deleverage(target, double(np.full(20, cap))), target.abs().sum(-1)
    np.testing.assert_allclose(found.abs().sum(-1), gross.clamp(max=cap), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(found * gross[:, None], target * found.abs().sum(-1)[:, None], rtol=1e-13, atol=1e-15)
    assert_same_bits(found[gross <= cap], target[gross <= cap])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("cap", (0.0, 0.8))
def test_deleverage_has_a_gradient(cap, dtype):
    """The identity's where nothing is held and the cap is not 0."""
    inputs = double([[0.9, -0.6], [0.3, -0.2]], True), double([0.7, 0.8], True)
    assert torch.autograd.gradcheck(deleverage, inputs)
    target = torch.zeros(2, dtype=dtype, requires_grad=True)
    limit = torch.tensor(cap, dtype=dtype, requires_grad=True)
    gradients = torch.autograd.grad(deleverage(target, limit).sum(), (target, limit))
    assert gradients[0].tolist() == [float(cap > 0)] * 2 and gradients[1] == 0.0


@pytest.mark.parametrize("smooth", (-1e-9, float("nan"), float("inf")))
def test_a_bad_smooth_is_refused(smooth):
    with pytest.raises(ValueError, match=f"smooth={smooth}: expected 0 or a positive number"):
        make(execution_by_hand([0.0, 0.0], 0.0), HUGE, smooth)


def test_orders_of_another_shape_are_refused():
    """A single weight is not spread over every symbol, nor are more rows than orders left out."""
    market = make(execution_by_hand(np.zeros((5, 3)), 0.0), HUGE)
    with pytest.raises(ValueError, match="target: 1 weights; expected one for each of 3 symbols"):
        market.step(market.account(2), torch.zeros(2, 1), torch.tensor(0))
    with pytest.raises(ValueError, match="rows: 5 of them for orders at 4 bars; expected as many"):
        market.hold(double(np.zeros((2, 4, 3))), torch.arange(5))
