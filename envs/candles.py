"""Causal features of the shape of bars (open, high, low, close, volume), and of returns at several scales (wavelets)."""

import numpy as np

from envs.features import log_returns, standardised_returns, window_sum
from envs.panel import Panel, PanelError

OHLC_FEATURES = ("gap", "body", "range", "close_in_range", "volume_surprise")
WINDOW = 20  # bars before the current one: of the volatility and of the usual volume
CLIP = 5.0


def ohlc_features(panel: Panel) -> np.ndarray:
    """(T, N, len(OHLC_FEATURES)) float32 description of every symbol's last bar.

    gap: log(open / last close before the bar), body: log(close / open), range: log(high / low), each over the volatility
    (root mean square log return) of the WINDOW bars before; where the close lies in the bar's range, -1 at the low, 1 at
    the high; log(volume / mean volume of the WINDOW bars before), 0 without volume. Within +-CLIP; 0 where a symbol has no
    bar, or none before it in its history. Raises PanelError if the panel has no open, high or low.
    """
    for name in ("open", "high", "low"):
        if getattr(panel, name) is None:
            raise PanelError(f"panel {panel.name!r} has no {name} prices; expected open, high and low for --ohlc")
    square, bars = (_before(panel, x) for x in window_sum(panel, log_returns(panel) ** 2, WINDOW))
    volatility = np.sqrt(square / np.sqrt(np.maximum(bars, 1.0)))
    previous = _before(panel, panel.filled("close"), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        moves = [np.log(panel.open / previous), np.log(panel.close / panel.open), np.log(panel.high / panel.low)]
        features = [move / volatility for move in moves]
        features.append(2.0 * (panel.close - panel.low) / (panel.high - panel.low) - 1.0)
        features[-1][panel.high == panel.low] = 0.0
        if panel.volume is None:
            features.append(np.zeros_like(previous))
        else:
            volume = _before(panel, window_sum(panel, np.nan_to_num(panel.volume), WINDOW)[0])
            number = _before(panel, window_sum(panel, panel.present.astype(float), WINDOW)[0])
            features.append(np.log(panel.volume / (volume / number)))
    known = panel.present & np.isfinite(previous)
    out = [np.where(known & ~np.isnan(f), np.clip(f, -CLIP, CLIP), 0.0) for f in features]
    return np.stack(out, axis=2).astype(np.float32)


def wavelet_features(panel: Panel, levels: int = 5) -> np.ndarray:
    """(T, N, levels) float32 details of the standardised returns x at scales of 2, 4, ..., 2^levels bars.

    The causal a trous Haar transform (Renaud, Starck & Murtagh 2005): c_0 = x; c_j(t) = (c_j-1(t) + c_j-1(t - 2^(j-1))) / 2,
    the mean of the last 2^j bars, 0 before a history begins; detail d_j = c_j-1 - c_j, half the difference of two means of
    2^(j-1) bars. White noise of variance 1 has details of variance 2^-j: they are multiplied by sqrt(2^j).
    Raises ValueError for levels outside 1..12.
    """
    if not 1 <= levels <= 12:
        raise ValueError(f"wavelets={levels}: expected 1 to 12 levels")
    smooth, details = standardised_returns(panel), []
    for j in range(1, levels + 1):
        coarser = 0.5 * (smooth + _before(panel, smooth, 0.0, 2 ** (j - 1)))
        details.append((smooth - coarser) * np.sqrt(2.0**j))
        smooth = coarser
    return np.stack(details, axis=2).astype(np.float32)


def _before(panel, x, fill=0.0, bars=1):
    """x (T, ...) as it was `bars` rows earlier in the same history; `fill` where that is before its start."""
    row = np.arange(len(x)) - bars
    out = x[np.maximum(row, 0)].astype(float)
    out[row < panel.segments[panel.segment_of_row]] = fill
    return out
