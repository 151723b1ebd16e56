"""Technical features: slow formulas, each symbol alone, and no later bar."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_same_bits, make_panel, ragged_panel, tampered

from envs.candles import OHLC_FEATURES
from envs.features import ASSET_FEATURES, asset_features
from envs.technical import OSCILLATORS, Z_WINDOWS, oscillators, technical_features


def test_oscillators_by_slow_formulas():
    """On a panel with two histories, gaps and a late listing."""
    panel = ragged_panel(3, bars=160)
    panel = replace(panel, segments=np.array([0, 90]))
    found = oscillators(panel)
    assert found.shape == (160, 6, len(OSCILLATORS)) and found.dtype == np.float32
    close = panel.filled("close")
    for start, stop in ((0, 90), (90, 160)):
        for i in range(6):
            listed = start + np.flatnonzero(np.append(panel.present[start:stop, i], True))[0]
            assert not found[start:listed, i].any()
            for t in range(listed, stop):
                price = np.log(close[listed : t + 1, i])
                moves = np.diff(price)[-14:]
                rises, falls = moves[moves > 0].sum(), -moves[moves < 0].sum()
                rsi = 100 - 100 / (1 + rises / falls) if falls > 0 else 100.0 if rises > 0 else 50.0
                last = price[-20:]
                spread = last.max() - last.min()
                expected = [rsi / 50 - 1, 2 * (price[-1] - last.min()) / spread - 1 if spread > 0 else 0.0]
                for window in Z_WINDOWS:
                    part = price[-window:]
                    expected.append(np.clip((price[-1] - part.mean()) / part.std(), -5, 5) if part.std() > 1e-6 else 0.0)
                np.testing.assert_allclose(found[t, i], expected, atol=1e-5)


def test_what_does_not_move_has_no_place():
    panel = ragged_panel(0)
    still = replace(panel, **{name: np.where(panel.present, 7.3, np.nan) for name in ("open", "high", "low", "close")})
    assert not oscillators(still).any()


def test_names_and_order():
    panel = ragged_panel(0)
    names, features = technical_features(panel)
    assert names == (*ASSET_FEATURES, *OSCILLATORS, *OHLC_FEATURES) and features.shape == (120, 6, len(names))
    assert features.dtype == np.float32 and np.isfinite(features).all()
    assert_same_bits(features[:, :, : len(ASSET_FEATURES)], asset_features(panel))
    for name in ("open", "high", "low"):
        names, features = technical_features(replace(panel, **{name: None}))
        assert names == (*ASSET_FEATURES, *OSCILLATORS) and features.shape[2] == len(names)


@pytest.mark.parametrize("t", (10, 70))
def test_no_feature_uses_a_later_bar_or_another_symbol(t):
    panel = ragged_panel(2)
    expected = technical_features(panel)[1]
    other = tampered(panel, t, np.random.default_rng(0))
    found = technical_features(other)[1]
    assert_same_bits(found[: t + 1], expected[: t + 1])
    assert not np.array_equal(found, expected)
    mixed = {name: np.concatenate([panel.fields[name][:, :1], other.fields[name][:, 1:]], axis=1) for name in panel.fields}
    assert_same_bits(technical_features(replace(panel, **mixed))[1][:, 0], expected[:, 0])


def test_z_scores_tell_where_a_reverting_price_stands():
    """What an agent on synthetic:ou needs to know: the deviation, which no agent is shown."""
    panel = make_panel("synthetic:ou:bars=3000:train=1:val=1:test=1", 0)
    names, features = technical_features(panel)
    deviation = panel.hidden["deviation"][500:3000]
    for window, least in ((250, 0.9), (1000, 0.97)):
        score = features[500:3000, :, names.index(f"zscore_{window}")]
        assert np.mean([np.corrcoef(score[:, i], deviation[:, i])[0, 1] for i in range(10)]) > least
