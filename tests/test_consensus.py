"""Forecast consensus: every number by hand on small panels, nothing from later bars, and the series that agents see."""

import numpy as np
import pytest

from envs import consensus as module
from envs.consensus import DISPERSED, FORECASTERS, MISSED, NO_DATA, PASS, REASONS, SERIES, SMALL, consensus, round_trip
from envs.costs import Costs, load_costs
from envs.panel import Panel, PanelError
from envs.synthetic import make_panel
from envs.trading_tables import TradingConfig, TradingData

FREE = load_costs("zero")
CHEAP = load_costs("institutional")


def panel_of(returns, **extras) -> Panel:
    """One symbol per column of log returns (T, N), of which the first row is ignored."""
    returns = np.asarray(returns, float).reshape(len(returns), -1)
    returns[0] = 0.0
    close = 100 * np.exp(returns.cumsum(axis=0))
    days = np.datetime64("2020-01-01", "ns") + np.arange(len(close)) * np.timedelta64(1, "D")
    names = tuple(f"S{i}" for i in range(close.shape[1]))
    return Panel("p", days, names, close, extras={name: np.asarray(x, float) for name, x in extras.items()})


def by_hand(panel: Panel, costs: Costs, i: int):
    """The definition, bar by bar over everything known so far, of a symbol without gaps in one history."""
    price = np.log(panel.close[:, i])
    own = [np.nan_to_num(x[:, i]) for x in panel.extras.values() if x.ndim == 2]
    signals, rows = [], []
    for t in range(len(price)):
        past = price[max(0, t - 19) : t + 1]
        top = 1.0 if price[t] == past.max() else -1.0 if price[t] == past.min() else 0.0
        signals.append([
            price[t] - price[max(0, t - 5)], price[t] - price[max(0, t - 20)], past.mean() - price[t],
            top if np.ptp(past) > 0 else 0.0, *(x[t] for x in own),
        ])  # fmt: skip
        s, r = np.array(signals[:-1]).reshape(t, len(signals[0])), np.diff(price[: t + 1])
        weights = 0.5 ** (np.arange(t)[::-1] / 120)
        square = (weights[:, None] * s**2).sum(axis=0) if t else np.zeros(len(signals[0]))
        cross = (weights[:, None] * s * r[:, None]).sum(axis=0) if t else square
        slope = np.divide(cross, square, out=np.zeros_like(square), where=square > 0) * weights.sum() / (weights.sum() + 20)
        forecasts = slope * signals[-1]
        rows.append((forecasts.mean(), forecasts.std()))
    mean, dispersion = np.array(rows).T
    rate, threshold, reason = np.full(len(price), np.nan), np.full(len(price), np.nan), np.full(len(price), NO_DATA)
    ahead = np.diff(price)
    for t in range(len(price)):
        decided = [mean[u] * ahead[u] > 0 for u in range(t) if mean[u] != 0 and ahead[u] != 0]
        if len(decided) < 20:
            continue
        rate[t] = h = np.mean(decided[-60:])
        threshold[t] = round_trip(costs) / max(2 * h - 1, 0.1)
        reason[t] = (
            MISSED if h <= 0.5 else DISPERSED if dispersion[t] > 2 * abs(mean[t])
            else SMALL if abs(mean[t]) < threshold[t] else PASS
        )  # fmt: skip
    return mean, dispersion, rate, threshold, reason


def trending(bars=260, seed=3):
    """Two symbols: one with momentum, one random; and a series that knows of the next return of the first one alone."""
    rng = np.random.default_rng(seed)
    noise = 0.01 * rng.standard_normal((bars, 2))
    for t in range(1, bars):
        noise[t, 0] += 0.5 * noise[t - 1, 0]
    hint = 0.005 * rng.standard_normal((bars, 2))
    hint[:-1, 0] += 0.5 * noise[1:, 0]
    return noise, hint


@pytest.mark.parametrize("costs", [FREE, CHEAP, load_costs("retail")])
def test_every_number_equals_the_slow_definition(costs):
    noise, hint = trending()
    hint[:7] = np.nan
    panel = panel_of(noise, hint=hint, shared=np.arange(len(noise), dtype=float))
    found = consensus(panel, costs)
    seen = set()
    for i in range(2):
        for name, values, expected in zip(found._fields, found, by_hand(panel, costs, i)):
            np.testing.assert_allclose(values[:, i], expected, rtol=1e-9, atol=1e-15, err_msg=name)
        seen |= set(found.reason[:, i])
    assert seen >= {NO_DATA, MISSED, DISPERSED} and (SMALL in seen or costs.name == "zero") and PASS in seen


def test_every_reason_by_hand():
    """A price that rises by 1% a bar: all forecasters come to agree, and are right every time."""
    steady = panel_of(np.full(60, 0.01))
    found = consensus(steady, FREE)
    assert (found.reason[:21] == NO_DATA).all() and np.isnan(found.hit_rate[:21]).all()
    # bar 0 has no signal, so that bar 1 is the first whose outcome is decided: by bar 22 there are 21 - 1 of them
    assert found.reason[22, 0] == PASS and (found.hit_rate[22:] == 1.0).all() and (found.threshold[22:] == 0.0).all()
    # a round trip that costs more than what is forecast: the forecasts of 1% are shrunk by n / (n + 20)
    dear = Costs("dear", commission_bps=60, half_spread_bps=0, slippage_bps=0)
    assert round_trip(dear) == pytest.approx(0.012)
    found = consensus(steady, dear)
    assert (found.reason[22:] == SMALL).all() and found.threshold[30, 0] == pytest.approx(0.012)
    assert 0.005 < found.mean[59, 0] < 0.01
    # nothing to be found: what went wrong more often than not misses
    found = consensus(panel_of(0.01 * np.random.default_rng(1).standard_normal(200)), FREE)
    assert MISSED in found.reason and (found.hit_rate[found.reason == MISSED] <= 0.5).all()
    # a series of one's own that says the opposite of what price forecasters learned
    noise, hint = trending()
    found = consensus(panel_of(noise, hint=hint), FREE)
    wide = found.reason == DISPERSED
    assert wide.any() and (found.dispersion[wide] > 2 * np.abs(found.mean[wide])).all() and (found.hit_rate[wide] > 0.5).all()


def test_the_threshold_grows_as_the_hit_rate_falls():
    """round trip / (2 h - 1), at most ten times it."""
    noise, hint = trending(bars=1500)
    found = consensus(panel_of(noise, hint=hint), CHEAP)
    known = np.isfinite(found.hit_rate)
    edge = 2 * found.hit_rate[known] - 1
    np.testing.assert_allclose(found.threshold[known], 4e-4 / np.maximum(edge, 0.1))
    assert edge.max() > 0.3 and edge.min() < 0.1
    assert round_trip(CHEAP) == pytest.approx(2 * (0.5 + 1.0 + 0.5) * 1e-4)
    assert round_trip(Costs("x", 1, 2, 4, 8, 100)) == pytest.approx(2 * 15e-4)


def test_only_the_last_outcomes_count_in_the_hit_rate():
    """Right for long, then wrong at every bar: after 60 of these the rate is 0."""
    returns = np.concatenate([np.full(200, 0.01), np.full(12, -0.0101)])
    found = consensus(panel_of(returns), FREE)
    np.testing.assert_allclose(found.hit_rate[199], 1.0)
    falls = found.hit_rate[200:212, 0] * 60
    assert falls[0] == pytest.approx(59) and (np.diff(falls) <= 0).sum() > 3


@pytest.mark.parametrize("cut", [30, 77, 140])
def test_nothing_up_to_a_bar_depends_on_later_ones(cut):
    """Prices, series and missing bars after it change at random: not one bit up to it does."""
    noise, hint = trending(200)
    panel = panel_of(noise, hint=hint)
    rng = np.random.default_rng(cut)
    close, other = panel.close.copy(), hint.copy()
    close[cut + 1 :] *= np.exp(rng.standard_normal(close[cut + 1 :].shape))
    close[cut + 2 :: 3, 0] = np.nan
    other[cut + 1 :] = rng.standard_normal(other[cut + 1 :].shape)
    later = Panel("p", panel.timestamps, panel.symbols, close, extras={"hint": other})
    first, second = module.with_consensus(panel, CHEAP), module.with_consensus(later, CHEAP)
    changed = False
    for name in SERIES:
        assert first.extras[name][: cut + 1].tobytes() == second.extras[name][: cut + 1].tobytes(), name
        changed |= not np.array_equal(first.extras[name][cut + 1 :], second.extras[name][cut + 1 :], equal_nan=True)
    assert changed


def test_histories_are_independent_and_gaps_are_skipped():
    noise, hint = trending(240)
    whole = panel_of(noise)
    twice = Panel(
        "p", np.tile(whole.timestamps, 2), whole.symbols, np.concatenate([whole.close, whole.close]),
        segments=np.array([0, 240]), segment_split=("train", "test"),
    )  # fmt: skip
    found, alone = consensus(twice, CHEAP), consensus(whole, CHEAP)
    for a, b in zip(found, alone):
        np.testing.assert_array_equal(a[:240], b)
        np.testing.assert_array_equal(a[240:], b)
    # bars that are missing are as if they had never been
    rows = np.sort(np.random.default_rng(0).choice(480, 240, replace=False))
    close = np.full((480, 2), np.nan)
    close[rows] = whole.close
    close[0, 1] = 7.0 if rows[0] else close[0, 1]
    days = np.datetime64("2020-01-01", "ns") + np.arange(480) * np.timedelta64(1, "D")
    gaps = consensus(Panel("g", days, whole.symbols, close), CHEAP)
    for a, b, empty in zip(gaps, alone, (np.nan,) * 4 + (NO_DATA,)):
        np.testing.assert_array_equal(a[rows, 0], b[:, 0])
        np.testing.assert_array_equal(np.delete(a, rows, axis=0)[:, 0], empty)


def test_trading_shows_them_as_forecasts():
    panel = make_panel("synthetic:modes:bars=300:train=1:val=1:test=1:assets=2", 1)
    told = module.with_consensus(panel, CHEAP)
    assert list(told.extras) == ["surprise", "tone", *SERIES] and told.close is panel.close or (told.close == panel.close).all()
    assert set(told.hidden) == set(panel.hidden) and SERIES[4:] == tuple(f"reason_{name}" for name in REASONS)
    np.testing.assert_array_equal(sum(told.extras[name] for name in SERIES[4:]), 1.0)
    data = TradingData(told, TradingConfig())
    assert data.forecasts == ("surprise", *SERIES, "tone")
    at = data.forecasts.index("reason_no_data")
    assert (data.own[:, :20, at] == 1.0).all() and (data.own[..., at].mean() < 0.3)
    with pytest.raises(PanelError, match="consensus.*expected none"):
        module.with_consensus(told, CHEAP)
    assert len(FORECASTERS) == 4
