"""Technical features of single symbols: causal like those of features.py, and of each symbol alone."""

import numpy as np
from numba import njit

from envs.candles import OHLC_FEATURES, ohlc_features
from envs.features import ASSET_FEATURES, asset_features, log_returns
from envs.panel import Panel

CLIP = 5.0
FLAT = 1e-6  # deviations of log prices below this count as none
RSI_BARS, CHANNEL_BARS = 14, 20
Z_WINDOWS = (20, 60, 250, 1000)
OSCILLATORS = (f"rsi_{RSI_BARS}", f"channel_{CHANNEL_BARS}", *(f"zscore_{w}" for w in Z_WINDOWS))


def technical_features(panel: Panel) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of F features, and (T, N, F) float32 their values: `asset_features`, `oscillators` and, where the panel has open,
    high and low, `ohlc_features`.
    """
    names, parts = [*ASSET_FEATURES, *OSCILLATORS], [asset_features(panel), oscillators(panel)]
    if {"open", "high", "low"} <= set(panel.fields):
        names += OHLC_FEATURES
        parts.append(ohlc_features(panel))
    return tuple(names), np.concatenate(parts, axis=2)


def oscillators(panel: Panel) -> np.ndarray:
    """(T, N, len(OSCILLATORS)) float32: where every symbol's price stands among its own last ones.

    rsi: sum of the last 14 log returns over the sum of their sizes: Cutler's relative strength index, scaled to -1..1.
    channel: place of the close between the lowest (-1) and the highest (1) of the last 20; 0 if they are the same.
    zscore: log close less its mean over the last W bars, in standard deviations of the same, clipped to +-5 (20 bars: the place
    in Bollinger's bands); 0 where it has not varied. Prices are carried forward over bars without trade; windows are shorter
    after a symbol's listing, before which there are zeros.
    """
    return _oscillators(np.log(panel.filled("close")), log_returns(panel), panel.segments, np.array(Z_WINDOWS))


@njit(cache=True, error_model="numpy")
def _oscillators(price, returns, segments, windows):
    rows, symbols = price.shape
    out = np.zeros((rows, symbols, 2 + len(windows)), dtype=np.float32)
    total, square = np.zeros(rows + 1), np.zeros(rows + 1)  # prefix sums since the symbol's listing in this history
    ends = np.append(segments[1:], rows)
    for i in range(symbols):
        for k in range(len(segments)):
            first = segments[k]
            while first < ends[k] and np.isnan(price[first, i]):
                first += 1
            for t in range(first, ends[k]):
                if t == first:
                    total[t], square[t] = 0.0, 0.0
                x = price[t, i] - price[first, i]
                total[t + 1], square[t + 1] = total[t] + x, square[t] + x * x
                sum_, size = 0.0, 0.0
                for u in range(max(first, t + 1 - RSI_BARS), t + 1):
                    sum_ += returns[u, i]
                    size += abs(returns[u, i])
                out[t, i, 0] = sum_ / size if size > 0.0 else 0.0
                low, high = price[t, i], price[t, i]
                for u in range(max(first, t + 1 - CHANNEL_BARS), t):
                    low, high = min(low, price[u, i]), max(high, price[u, i])
                out[t, i, 1] = 2.0 * (price[t, i] - low) / (high - low) - 1.0 if high > low else 0.0
                for w in range(len(windows)):
                    length = min(windows[w], t + 1 - first)
                    mean = (total[t + 1] - total[t + 1 - length]) / length
                    variance = (square[t + 1] - square[t + 1 - length]) / length - mean * mean
                    if variance > FLAT * FLAT:
                        out[t, i, 2 + w] = min(CLIP, max(-CLIP, (x - mean) / np.sqrt(variance)))
    return out
