"""Features of bars and wavelet details: against slow definitions and hand-computed values, and the leak test over them."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_same_bits, ragged_panel, tampered

from envs.candles import OHLC_FEATURES, ohlc_features, wavelet_features
from envs.features import standardised_returns
from envs.panel import Panel, PanelError

AT = OHLC_FEATURES.index


def one_symbol(close, **fields) -> Panel:
    """Open, high and low are the close unless given."""
    fields = {"open": close, "high": close, "low": close} | fields
    days = np.datetime64("2020-01-01", "ns") + np.arange(len(close)) * np.timedelta64(1, "D")
    columns = {name: np.array(values, dtype=np.float64)[:, None] for name, values in fields.items()}
    return Panel("one", days, ("A",), np.array(close, dtype=np.float64)[:, None], **columns)


def in_two(panel: Panel, row: int) -> Panel:
    """The same bars as two independent histories, the second from `row` on."""
    return replace(panel, segments=np.array([0, row]))


def cut(panel: Panel, start: int, stop: int) -> Panel:
    """Rows start..stop-1 as a panel of one history."""
    fields = {name: values[start:stop] for name, values in panel.fields.items()}
    return replace(panel, timestamps=panel.timestamps[start:stop], segments=np.zeros(1, np.int64), **fields)


def slow_ohlc(panel):
    """One bar at a time, from the definition."""
    out = np.zeros((panel.num_bars, panel.num_symbols, len(OHLC_FEATURES)))
    for t, i in np.argwhere(panel.present):
        o, h, l, c, v = (values[t, i] for values in panel.fields.values())
        rows = np.arange(panel.segments[panel.segment_of_row[t]], t)
        rows = rows[panel.present[rows, i]]
        past, volumes = panel.close[rows, i], panel.volume[rows, i][-20:]
        moves = np.diff(np.log(past))[-20:]
        if len(moves):
            volatility = max(1e-6, np.sqrt(np.mean(moves**2)))
            out[t, i, :3] = np.clip(np.log([o / past[-1], c / o, h / l]) / volatility, -5, 5)
        out[t, i, 3] = 2 * (c - l) / (h - l) - 1 if h > l else 0.0
        if volumes.sum() > 0:
            with np.errstate(divide="ignore"):
                out[t, i, 4] = np.clip(np.log(v / volumes.mean()), -5, 5)
    return out


@pytest.mark.parametrize("seed", range(3))
def test_ohlc_features_equal_the_slow_definition(seed):
    """With gaps, late and early ends of listings, no volume at some bars, and two histories."""
    panel = in_two(ragged_panel(seed), 75)
    volume = np.where(np.random.default_rng(seed).random(panel.volume.shape) < 0.2, 0 * panel.volume, panel.volume)
    panel = replace(panel, volume=volume)
    found = ohlc_features(panel)
    assert found.shape == (120, 6, len(OHLC_FEATURES)) and found.dtype == np.float32
    np.testing.assert_allclose(found, slow_ohlc(panel), rtol=1e-5, atol=1e-6)
    assert not found[~panel.present].any() and (~panel.present).any()


def test_ohlc_features_by_hand():
    panel = one_symbol(
        close=[100, 110, 100, 121], open=[100, 100, 105, 110], high=[110, 110, 120, 121], low=[100, 90, 100, 99],
        volume=[10, 30, 5, 60],
    )  # fmt: skip
    found = ohlc_features(panel)[:, 0]
    up, down = np.log(1.1), np.log(100 / 110)  # the returns known before the third and the fourth bar; of equal size
    np.testing.assert_allclose(found[:2, :3], 0)  # no volatility yet
    np.testing.assert_allclose(found[2, :3], np.log([105 / 110, 100 / 105, 1.2]) / up, rtol=1e-6)
    np.testing.assert_allclose(found[3, :3], np.log([1.1, 1.1, 121 / 99]) / -down, rtol=1e-6)
    np.testing.assert_allclose(found[:, AT("close_in_range")], [-1, 1, -1, 1], rtol=1e-6)
    np.testing.assert_allclose(found[:, AT("volume_surprise")], np.log([1, 3, 5 / 20, 60 / 15]), rtol=1e-6)


def test_windows_are_twenty_bars_of_the_symbol():
    """A jump and a volume leave the windows 21 bars later, no matter how many rows without a bar lie between."""
    close = np.exp(0.01 * (-1.0) ** np.arange(60))
    close[10:] *= 2
    panel = one_symbol(close, high=close * 1.01, volume=np.where(np.arange(60) == 10, 1e4, 100.0))
    height = ohlc_features(panel)[:, 0, AT("range")]
    surprise = ohlc_features(panel)[:, 0, AT("volume_surprise")]
    usual = np.log(1.01) / 0.02
    np.testing.assert_allclose(height[[10, 31, 59]], usual, rtol=1e-5)
    assert height[11] < usual / 5 and height[30] < usual / 5
    np.testing.assert_allclose(surprise[[9, 31]], 0, atol=1e-6)
    np.testing.assert_allclose(surprise[30], np.log(100 / ((19 * 100 + 1e4) / 20)), rtol=1e-5)

    rows = np.arange(60) * 3
    fields = {name: np.full((180, 1), np.nan) for name in panel.fields}
    for name, values in panel.fields.items():
        fields[name][rows] = values
    days = panel.timestamps[0] + np.arange(180) * np.timedelta64(1, "D")
    apart = Panel("apart", days, ("A",), **fields)
    assert_same_bits(ohlc_features(apart)[rows], ohlc_features(panel), "bars with gaps between")


def test_large_moves_and_volumes_are_clipped():
    close = [100, 101, 100, 900, 900]
    panel = one_symbol(
        close, open=[100, 100, 100, 500, 100], high=[101, 101, 101, 900, 1000], low=[99, 99, 99, 100, 50],
        volume=[1, 1, 1, 1e9, 0],
    )  # fmt: skip
    found = ohlc_features(panel)[:, 0]
    np.testing.assert_allclose(found[3], [5, 5, 5, 1, 5])
    assert found[4, AT("volume_surprise")] == -5
    fall = one_symbol([100, 101, 100, 1], open=[100, 100, 100, 10], high=[101, 101, 101, 10], low=[99, 99, 99, 1])
    np.testing.assert_allclose(ohlc_features(fall)[3, 0, :3], [-5, -5, 5])


def test_a_price_that_never_moved_has_finite_features():
    """Volatility 0: nothing moves, then everything does; and an inconsistency that float32 files may hold."""
    still = np.full(30, 50.0)
    panel = one_symbol(still, volume=np.zeros(30))
    assert not ohlc_features(panel).any()
    moved, above = np.append(still, 50.01), np.append(still, 50.01 * (1 + 5e-7))
    found = ohlc_features(one_symbol(moved, high=above))[-1, 0]
    np.testing.assert_allclose(found[:3], [5, 0, 0.5], rtol=1e-3)  # over the least volatility, 1e-6 per bar
    ulp = one_symbol([50, 50, 50.0], high=[51, 51, 50 * (1 - 5e-7)], low=[50, 50, 49.0])
    assert ohlc_features(ulp)[2, 0, AT("close_in_range")] == 1


def test_a_panel_without_volume_has_no_surprise():
    panel = ragged_panel(1)
    without = ohlc_features(replace(panel, volume=None))
    assert not without[:, :, AT("volume_surprise")].any()
    assert_same_bits(without[:, :, :4], ohlc_features(panel)[:, :, :4], "other features")


@pytest.mark.parametrize("field", ("open", "high", "low"))
def test_missing_fields_are_named(field):
    with pytest.raises(PanelError, match=f"ragged: no field '{field}'"):
        ohlc_features(replace(ragged_panel(0), **{field: None}))


def test_wavelets_by_hand(monkeypatch):
    x = np.array([[1.0], [2.0], [4.0], [8.0], [0.0], [3.0]])
    monkeypatch.setattr("envs.candles.standardised_returns", lambda panel: x)
    panel = in_two(one_symbol(np.full(6, 5.0)), 4)
    # c_1 = .5 1.5 3 6 | 0 1.5; c_2 = .25 .75 1.75 3.75 | 0 .75
    expected = np.array([[0.5, 0.25], [0.5, 0.75], [1, 1.25], [2, 2.25], [0, 0], [1.5, 0.75]]) * [np.sqrt(2), 2]
    np.testing.assert_allclose(wavelet_features(panel, 2)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("levels", (1, 3, 7, 12))
def test_details_and_the_last_mean_sum_to_the_return(levels):
    panel = in_two(ragged_panel(2), 50)
    x, found = standardised_returns(panel), wavelet_features(panel, levels)
    assert found.shape == (120, 6, levels) and found.dtype == np.float32
    smooth = np.empty_like(x)  # mean of 2^levels values, zeros before the history's start
    for t in range(120):
        smooth[t] = x[max(50 * (t >= 50), t + 1 - 2**levels) : t + 1].sum(axis=0) / 2**levels
    details = found / np.sqrt(2.0 ** np.arange(1, levels + 1))
    np.testing.assert_allclose(details.sum(axis=2) + smooth, x, atol=1e-5)


def test_details_of_white_noise_have_unit_variance(monkeypatch):
    noise = np.random.default_rng(0).standard_normal((200_000, 1))
    monkeypatch.setattr("envs.candles.standardised_returns", lambda panel: noise)
    found = wavelet_features(one_symbol(np.ones(200_000)), 5)[32:]
    np.testing.assert_allclose(found.var(axis=(0, 1)), 1, atol=0.05)


@pytest.mark.parametrize("levels", (0, 13))
def test_bad_levels_are_named(levels):
    with pytest.raises(ValueError, match=f"levels={levels}: expected 1 to 12"):
        wavelet_features(ragged_panel(0), levels)


@pytest.mark.parametrize("features", (ohlc_features, wavelet_features))
def test_histories_do_not_see_each_other(features):
    panel = ragged_panel(7, bars=200).select(["R0", "R3", "R4", "R5"])  # listed in both halves
    both = features(in_two(panel, 90))
    for start, stop in ((0, 90), (90, 200)):
        assert_same_bits(both[start:stop], features(cut(panel, start, stop)), f"rows from {start}")
    assert both[90:].tobytes() != features(panel)[90:].tobytes()


@pytest.mark.parametrize("features", (ohlc_features, wavelet_features))
@pytest.mark.parametrize("seed", range(4))
def test_no_feature_uses_a_later_bar(features, seed):
    """Every bar after t changed at random, bars removed and added: everything up to t keeps every bit."""
    panel, rng = ragged_panel(seed), np.random.default_rng(seed)
    before = features(panel)
    for t in (0, *rng.integers(1, 118, 6)):
        after = features(tampered(panel, t, rng))
        assert_same_bits(after[: t + 1], before[: t + 1], f"up to row {t}")
        assert after[t + 1 :].tobytes() != before[t + 1 :].tobytes(), "nothing was changed"
