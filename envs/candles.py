"""Features from the shape of the bars, and wavelet details of the returns: like those of features.py, causal.

Row t is a function of bars t and earlier inside the same price history. Portfolio-v0 does not use them; a script that wants
them appends them to `asset_features`.
"""

import numpy as np

from envs.features import log_returns, standardised_returns
from envs.panel import Panel, PanelError

WINDOW = 20  # bars of the trailing volatility and of the mean volume
CLIP = 5.0
MIN_VOLATILITY = 1e-6  # per bar: what does not move is no reason to divide by zero
OHLC_FEATURES = ("gap", "body", "range", "close_in_range", "volume_surprise")
MAX_LEVELS = 12  # details over 4096 bars


def ohlc_features(panel: Panel) -> np.ndarray:
    """(T, N, len(OHLC_FEATURES)) float32 description of every bar.

    gap, body, range: log(open / previous close), log(close / open) and log(high / low), over the symbol's volatility, clipped
    to +-5. The volatility is the root mean square of the close-to-close log returns of the symbol's up to 20 bars before this
    one, so that a large move is not shrunk by itself; it is at least 1e-6.
    close_in_range: 2 (close - low) / (high - low) - 1, from -1 (closed at its low) to 1; 0 if high = low.
    volume_surprise: log(volume / mean volume of the symbol's up to 20 bars before), clipped to +-5; 0 throughout if the panel
    has no volume.

    Bars are the symbol's own: rows without one are skipped. A feature is 0 where the symbol has no bar now, or what it is
    compared with is not known yet: a volatility before the third bar of a history, a volume before the first positive one.
    Raises PanelError, naming the missing field, if the panel lacks open, high or low.
    """
    missing = [name for name in ("open", "high", "low") if name not in panel.fields]
    if missing:
        raise PanelError(f"{panel.name}: no field {missing[0]!r}; ohlc_features expects open, high, low and close")
    column, row = np.nonzero(panel.present.T)  # all bars, symbol after symbol: what precedes is the symbol's bar before
    open_, high, low, close = (panel.fields[name][row, column] for name in ("open", "high", "low", "close"))
    history = panel.segment_of_row[row]
    new = (np.diff(column, prepend=-1) != 0) | (np.diff(history, prepend=-1) != 0)
    place = np.arange(len(row))
    age = place - np.maximum.accumulate(np.where(new, place, 0))  # bars of the symbol before this one in its history

    # a bar's return needs a bar before, so that the number of returns before this bar is age - 1
    square = _mean_before(log_returns(panel)[row, column] ** 2, age - 1)
    volatility = np.maximum(MIN_VOLATILITY, np.sqrt(square))
    moves = [np.log(open_ / _before(close, 1, age, 1.0)), np.log(close / open_), np.log(high / low)]
    features = [np.where(age >= 2, np.clip(move / volatility, -CLIP, CLIP), 0.0) for move in moves]

    # float32 files may put a close one ulp outside its range: clipped
    height = np.where(high > low, high - low, np.inf)
    features.append(np.where(high > low, np.clip(2 * (close - low) / height - 1, -1.0, 1.0), 0.0))
    if panel.volume is None:
        features.append(np.zeros(len(row)))
    else:
        volume = panel.volume[row, column]
        usual = _mean_before(volume, age)
        ratio = np.divide(volume, usual, out=np.ones(len(row)), where=usual > 0)
        features.append(np.log(np.clip(ratio, np.exp(-CLIP), np.exp(CLIP))))

    out = np.zeros((*panel.close.shape, len(OHLC_FEATURES)), dtype=np.float32)
    out[row, column] = np.stack(features, axis=1)
    return out


def wavelet_features(panel: Panel, levels: int = 5) -> np.ndarray:
    """(T, N, levels) float32 details d_1..d_levels of the standardised returns x: moves over 2, 4, ... 2^levels bars.

    The causal a trous Haar transform (Renaud, Starck & Murtagh 2005): c_0 = x, c_j(t) = (c_{j-1}(t) + c_{j-1}(t - 2^{j-1})) / 2
    and d_j = c_{j-1} - c_j, with zeros before a history's start, so that x = d_1 + ... + d_J + c_J. Here d_j is multiplied by
    sqrt(2^j), which gives it unit variance if x is white noise of unit variance: c_{j-1} is a mean of 2^{j-1} values, so its
    variance is 2^{-(j-1)}, and d_j = (c_{j-1}(t) - c_{j-1}(t - 2^{j-1})) / 2 is half the difference of two that share no
    value: variance 2 * 2^{-(j-1)} / 4 = 2^-j.

    Raises ValueError if levels is not from 1 to 12.
    """
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels={levels}: expected 1 to {MAX_LEVELS}")
    smooth = standardised_returns(panel)
    age = (np.arange(panel.num_bars) - panel.segments[panel.segment_of_row])[:, None]
    out = np.empty((*smooth.shape, levels), dtype=np.float32)
    for j in range(1, levels + 1):
        smoother = (smooth + _before(smooth, 2 ** (j - 1), age, 0.0)) / 2
        out[:, :, j - 1] = np.sqrt(2.0**j) * (smooth - smoother)
        smooth = smoother
    return out


def _before(x, k, age, start):
    """x of k rows before, or `start` where age says that fewer than k rows precede in the same history."""
    out = np.full_like(x, start)
    out[k:] = np.where(age[k:] >= k, x[:-k], start)
    return out


def _mean_before(x, age):
    """Means over the up to WINDOW values before each, of which there are `age`; 0 where there is none.

    Every window is summed by itself, so that no rounding error is handed on from bar to bar.
    """
    total = sum(_before(x, k, age, 0.0) for k in range(1, WINDOW + 1))
    return total / np.clip(age, 1, WINDOW)
