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
    impact = np.zeros((1, 1)) if impact is None else np.broadcast_to(float(impact), to_fill.shape)
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
