"""Signals, eligibility and regime features against slow definitions, and the leak test over all of them."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, assert_same_bits, ragged_panel, tampered

from envs import features
from envs.features import (
    ASSET_FEATURES,
    REGIME_FEATURES,
    REGIME_WINDOWS,
    SIGNALS,
    TREND_WINDOWS,
    asset_features,
    leadlag_signal,
    log_returns,
    regime_features,
    standardised_returns,
)
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.synthetic import make_panel

LOOKBACKS = np.array([5, 13, 40])
COVERAGE, LIQUIDITY = 0.9, 1e5


def slow_standardised(panel, halflife=20.0, clip=5.0):
    """Each return over the weighted root mean square of the symbol's earlier nonzero returns in its history."""
    returns, out = log_returns(panel), np.zeros((panel.num_bars, panel.num_symbols))
    for t in range(panel.num_bars):
        start = panel.segments[panel.segment_of_row[t]]
        for i in range(panel.num_symbols):
            past = [r for r in returns[start:t, i] if r != 0]
            if past and returns[t, i] != 0:
                weights = 0.5 ** (np.arange(len(past))[::-1] / halflife)
                volatility = np.sqrt(np.average(np.square(past), weights=weights))
                out[t, i] = np.clip(returns[t, i] / volatility, -clip, clip)
    return out


def slow_eligible(panel, t, window, max_lag, coverage, liquidity):
    start = panel.segments[panel.segment_of_row[t]]
    if t + 1 - window - max_lag < start + 1:
        return np.zeros(panel.num_symbols, bool)
    rows = slice(t + 1 - window, t + 1)
    traded = np.where(panel.present, panel.volume * panel.close, 0.0)[rows].mean(axis=0)
    return panel.present[t] & (panel.present[rows].mean(axis=0) >= coverage) & (traded >= liquidity)


def slow_matrix(x, t, window, signal, max_lag):
    """C from the definition, over all symbols."""
    rows, n = np.arange(t + 1 - window, t + 1), x.shape[1]
    out = np.zeros((n, n))
    if signal == "levy":
        path = np.cumsum(x[rows], axis=0)
        before = np.vstack([np.zeros(n), path[:-1]])
        s = sum(np.outer(before[u], x[rows[u]]) for u in range(window))
        norms = np.sqrt(np.square(x[rows]).sum(axis=0))
        with np.errstate(all="ignore"):
            return np.nan_to_num((s - s.T) / 2 / np.outer(norms, norms))
    for lag in range(1, max_lag + 1):
        with np.errstate(all="ignore"):
            corr = np.nan_to_num(np.corrcoef(x[rows - lag].T, x[rows].T)[:n, n:])
        out += corr - corr.T
    return out


@pytest.fixture(scope="module")
def long_panel():
    """Two histories of several blocks each, one with gaps inside."""
    panel = make_panel("synthetic:leadlag:bars=400:train=1:val=1:test=1:assets=5:leaders=2:followers=2", seed=8)
    gaps = np.random.default_rng(1).random(panel.close.shape) < 0.06
    fields = {name: np.where(gaps, np.nan, values) for name, values in panel.fields.items()}
    volume = fields.pop("volume") * np.random.default_rng(2).lognormal(-7, 1, panel.close.shape)
    return replace(panel, **fields, volume=volume)


def in_blocks(monkeypatch, size, *args, **kwargs):
    monkeypatch.setattr(features, "BLOCK", size)
    return leadlag_signal(*args, keep_matrix=True, **kwargs)


def antisymmetric(upper, n):
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = upper
    return matrix - matrix.T


def test_standardised_returns_equal_the_slow_definition():
    panel = ragged_panel(4)
    np.testing.assert_allclose(standardised_returns(panel), slow_standardised(panel), rtol=1e-9, atol=1e-12)
    two = make_panel("synthetic:noise:bars=300:train=1:val=1:test=1:assets=2")
    assert not standardised_returns(two)[two.segments].any() and not log_returns(two)[two.segments].any()
    np.testing.assert_allclose(standardised_returns(two)[250:360], slow_standardised(two)[250:360], rtol=1e-9)


@pytest.mark.parametrize("signal, max_lag", (("xcorr", 1), ("xcorr", 3), ("levy", 1)))
def test_signal_equals_the_slow_definition(long_panel, monkeypatch, signal, max_lag):
    """Scores, eligibility, strength, matrix and stability at random bars and lookbacks, over many blocks."""
    found = in_blocks(
        monkeypatch, 64, long_panel, LOOKBACKS, signal, max_lag, min_coverage=COVERAGE, min_dollar_volume=LIQUIDITY
    )
    x, n, rng, seen = standardised_returns(long_panel), long_panel.num_symbols, np.random.default_rng(0), 0

    def slow(t, k):
        eligible = slow_eligible(long_panel, t, LOOKBACKS[k], max_lag, COVERAGE, LIQUIDITY)
        full = t + 1 - LOOKBACKS[k] - max_lag > long_panel.segments[long_panel.segment_of_row[t]]
        matrix = slow_matrix(x, t, LOOKBACKS[k], signal, max_lag) if full else np.zeros((n, n))
        return eligible, matrix * np.outer(eligible, eligible)

    for t in rng.choice(np.arange(1, long_panel.num_bars), 150, replace=False):
        first_row = t in long_panel.segments
        now = [slow(t, k) for k in range(len(LOOKBACKS))]
        for k, (eligible, matrix) in enumerate(now):
            size = eligible.sum()
            seen += 2 <= size < n
            np.testing.assert_array_equal(found.eligible[t, k], eligible)
            np.testing.assert_allclose(antisymmetric(found.matrix[t, k], n), matrix, atol=2e-6)
            summarised = matrix if size >= 2 else 0 * matrix
            np.testing.assert_allclose(found.scores[t, k], summarised.sum(axis=1) / max(1, size - 1), atol=2e-6)
            strength = np.abs(summarised).sum() / max(1, size * (size - 1))
            assert found.strength[t, k] == pytest.approx(strength, abs=2e-6)
            for q in range(len(LOOKBACKS)):
                before = 0 * matrix if first_row else slow(t - 1, q)[1]
                norms = np.linalg.norm(matrix) * np.linalg.norm(before)
                cosine = (matrix * before).sum() / norms if norms > 1e-9 else 0.0
                assert found.stability[t, k, q] == pytest.approx(cosine, abs=1e-5)
    assert seen > 20, "no bar with some symbols ineligible: the test shows nothing"


@pytest.mark.parametrize("signal", sorted(SIGNALS))
def test_results_do_not_depend_on_block(long_panel, monkeypatch, signal):
    one = in_blocks(monkeypatch, 10_000, long_panel, LOOKBACKS, signal, 2)
    for size in (1, 37):
        many = in_blocks(monkeypatch, size, long_panel, LOOKBACKS, signal, 2)
        np.testing.assert_array_equal(many.eligible, one.eligible)
        for name in ("scores", "strength", "stability", "matrix"):
            np.testing.assert_allclose(getattr(many, name), getattr(one, name), atol=1e-6, err_msg=name)


def test_scores_sum_to_zero_because_the_matrix_is_antisymmetric(long_panel):
    for signal in SIGNALS:
        found = leadlag_signal(long_panel, LOOKBACKS, signal)
        assert np.abs(found.scores).max() > 0.1
        np.testing.assert_allclose(found.scores.sum(axis=2), 0, atol=1e-5)


@pytest.mark.parametrize("signal", sorted(SIGNALS))
def test_planted_leader_scores_positive(signal):
    """S0's return is everybody else's one bar later."""
    panel = make_panel("synthetic:noise:bars=300:train=1:val=1:test=1:assets=4", seed=1)
    log_close = np.log(panel.close)
    moves = np.diff(log_close, axis=0, prepend=log_close[:1])
    moves[1:, 1:] = 0.3 * moves[1:, 1:] + moves[:-1, :1]
    moves[panel.segments] = 0
    planted = replace(panel, close=np.exp(4 + np.cumsum(moves, axis=0)), open=None, high=None, low=None)
    found = leadlag_signal(planted, np.array([60]), signal)
    full = found.eligible.all(axis=(1, 2))
    assert full.sum() > 600
    assert (found.scores[full, 0, 0] > 0).mean() > 0.97
    assert (found.scores[full, 0, 1:].mean(axis=1) < 0).mean() > 0.97


@pytest.mark.parametrize(
    "change, words",
    (
        ({"signal": "granger"}, "signal='granger': expected one of.*levy.*xcorr"),
        ({"max_lag": 0}, "max_lag=0: expected at least 1"),
        ({"min_dollar_volume": 5.0}, "min_dollar_volume=5.0: panel 'ragged' has no volume; expected 0"),
    ),
)
def test_bad_signal_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        leadlag_signal(replace(ragged_panel(0), volume=None), LOOKBACKS, **change)


def test_regime_features_equal_the_slow_definition():
    panel = ragged_panel(5, bars=150)
    found = regime_features(panel)
    alive, returns = np.isfinite(panel.filled("close")), log_returns(panel)
    at = REGIME_FEATURES.index
    rows = [r[a] for r, a in zip(returns, alive)]
    market = np.array([r.mean() if len(r) else 0.0 for r in rows])
    second = np.array([np.square(r).mean() if len(r) else 0.0 for r in rows])
    spread = np.array([r.std() if len(r) else 0.0 for r in rows])
    level = np.cumsum(market)
    for t in (3, 17, 44, 60, 76, 149):
        vols = {}
        for w in REGIME_WINDOWS:
            window = slice(max(0, t + 1 - w), t + 1)
            vols[w] = np.sqrt(second[window].mean())
            assert found[t, at(f"log_vol_{w}")] == pytest.approx(np.log(vols[w] * np.sqrt(panel.bars_per_year)), rel=1e-5)
            length = min(w, t + 1)
            trend = market[window].sum() / (vols[w] * np.sqrt(length))
            assert found[t, at(f"trend_{w}")] == pytest.approx(trend, rel=1e-5, abs=1e-6)
        assert found[t, at("vol_ratio")] == pytest.approx(np.log(vols[5] / vols[60]), rel=1e-4, abs=1e-5)
        middle = slice(max(0, t + 1 - REGIME_WINDOWS[1]), t + 1)
        assert found[t, at("dispersion")] == pytest.approx(spread[middle].mean() / vols[20], rel=1e-5)
        share, n = np.square(market[middle]).mean() / second[middle].mean(), alive[t].sum()
        assert found[t, at("average_correlation")] == pytest.approx((share * n - 1) / (n - 1), rel=1e-4, abs=1e-6)
        peak = max(0.0, level[: t + 1].max())
        assert found[t, at("drawdown")] == pytest.approx(level[t] - peak, rel=1e-5, abs=1e-7)


def test_average_correlation_is_one_when_all_move_alike_and_nearly_zero_when_they_do_not():
    panel = make_panel("synthetic:noise:bars=2000:train=1:val=1:test=1:assets=8")
    column = REGIME_FEATURES.index("average_correlation")
    assert abs(regime_features(panel)[30:, column].mean()) < 0.02
    same = replace(panel, close=np.repeat(panel.close[:, :1], 8, axis=1), open=None, high=None, low=None)
    moved = np.setdiff1d(np.arange(panel.num_bars), panel.segments)
    np.testing.assert_allclose(regime_features(same)[moved, column], 1, atol=1e-4)


def test_features_of_a_history_do_not_depend_on_the_one_before(small_panel):
    start, stop = small_panel.segments[1:3]
    alone = replace(
        small_panel, timestamps=small_panel.timestamps[start:stop], segments=np.zeros(1, np.int64), segment_split=None,
        hidden={}, **{name: values[start:stop] for name, values in small_panel.fields.items()},
    )  # fmt: skip
    np.testing.assert_allclose(regime_features(small_panel)[start:stop], regime_features(alone), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(asset_features(small_panel)[start:stop], asset_features(alone), rtol=1e-4, atol=1e-5)
    found, expected = (leadlag_signal(p, np.array([5, 60])) for p in (small_panel, alone))
    assert_same_bits(found.scores[start:stop], expected.scores, "scores")
    assert_same_bits(found.stability[start:stop], expected.stability, "stability")


def test_asset_features_equal_the_slow_definition():
    panel = ragged_panel(5, bars=150)
    found, x, returns = asset_features(panel), slow_standardised(panel), log_returns(panel)
    at, seen = ASSET_FEATURES.index, 0
    assert found.shape == (150, 6, len(ASSET_FEATURES)) and found.dtype == np.float32
    for t, i in np.ndindex(150, 6):
        if not panel.present[: t + 1, i].any():
            assert not found[t, i].any(), "not listed yet"
            continue
        seen += not panel.present[t, i]
        assert found[t, i, at("return")] == pytest.approx(x[t, i], rel=1e-5, abs=1e-6)
        for w in TREND_WINDOWS:
            window = slice(max(0, t + 1 - w), t + 1)
            trend = x[window, i].sum() / np.sqrt(min(w, t + 1))
            assert found[t, i, at(f"trend_{w}")] == pytest.approx(trend, rel=1e-5, abs=1e-6)
        variance = max(1e-12, np.square(returns[max(0, t - 19) : t + 1, i]).mean())
        volatility = np.log(np.sqrt(variance * panel.bars_per_year))
        assert found[t, i, at("log_vol")] == pytest.approx(volatility, rel=1e-4, abs=1e-5)
        assert found[t, i, at("present")] == panel.present[t, i]
    assert seen > 50, "no gaps: the test shows nothing"


def tables(panel, signal):
    """name -> (T, ...): all that LeadLag-v0 shows an agent or derives its orders from, and Portfolio-v0's by symbol."""
    config = replace(TINY, signal=signal, encoder="full", hedge=signal == "levy", min_dollar_volume=1e3)
    data = LeadLagData(panel, config)
    topk = LeadLagData(panel, replace(config, encoder="topk", topk=2))
    return {
        **data.signal._asdict(), "standardised": standardised_returns(panel), "regime": data.regime, "valid": data.valid,
        "targets": data.targets, "extremity": data.extremity,
        "matrix_and_more": data.matrix, "topk": topk.matrix, "context": data.context, "assets": asset_features(panel),
    }  # fmt: skip


@pytest.mark.parametrize("signal", sorted(SIGNALS))
def test_no_feature_and_no_target_uses_a_later_bar(monkeypatch, signal):
    """Every bar after t changed at random, bars removed and added: everything up to t keeps every bit."""
    monkeypatch.setattr(features, "BLOCK", 32)
    panel, rng = ragged_panel(6), np.random.default_rng(3)
    before = tables(panel, signal)
    for t in (30, 63, 64, 80):
        after = tables(tampered(panel, t, rng), signal)
        for name, values in before.items():
            assert_same_bits(after[name][: t + 1], values[: t + 1], f"{name} up to row {t}")
            assert after[name][t + 1 :].tobytes() != values[t + 1 :].tobytes(), f"{name}: nothing was changed"


def test_lookbacks_need_a_panel_with_enough_symbols():
    with pytest.raises(ValueError, match="'ragged' has 3 symbols; expected at least min_symbols=4"):
        LeadLagData(ragged_panel(0, symbols=4).select(["R0", "R1", "R3"]), LeadLagConfig())
