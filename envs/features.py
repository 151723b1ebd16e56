"""Causal features: everything here at row t is a function of bars t and earlier, inside the same price history.

Four things are computed once per panel and then only indexed by the environments:

- `standardised_returns`: log returns divided by a trailing volatility, the input of the lead-lag signals;
- `leadlag_signal`: lead-lag matrices over K lookbacks at every bar, summarised to what agents see;
- `regime_features`: volatility, trend, dispersion and correlation of the whole market;
- `asset_features`: last return, trends and volatility of each symbol.

Cost per bar does not grow with the lookback: a window is moved by one term in, one term out. The running
sums are anchored afresh every `BLOCK` bars, so that rounding errors do not accumulate with the length of a history.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from envs.panel import Panel

BLOCK = 512  # bars between two re-anchorings of the running window sums
LEVY, XCORR = 0, 1  # signal codes inside the kernels
SIGNALS = {"levy": LEVY, "xcorr": XCORR}

REGIME_WINDOWS = (5, 20, 60)
REGIME_FEATURES = (
    tuple(f"log_vol_{w}" for w in REGIME_WINDOWS)
    + tuple(f"trend_{w}" for w in REGIME_WINDOWS)
    + (
        "vol_ratio",
        "dispersion",
        "average_correlation",
        "drawdown",
    )
)
REGIMES = ("calm-up", "calm-down", "volatile-up", "volatile-down")  # what labels of regimes are numbers of

TREND_WINDOWS = (5, 20, 60)
ASSET_FEATURES = ("return", *(f"trend_{w}" for w in TREND_WINDOWS), "log_vol", "present")


class LeadLagSignal(NamedTuple):
    """Lead-lag matrices C (antisymmetric; C[i, j] > 0: i leads j) over K lookbacks, summarised per bar.

    Rows where a lookback has no full window hold zeros and `eligible` is False there.
    """

    scores: np.ndarray  # (T, K, N) float32: row means of C over eligible symbols; > 0: the symbol leads
    eligible: np.ndarray  # (T, K, N) bool: enough history, coverage, liquidity, and a bar now
    strength: np.ndarray  # (T, K) float32: mean |C[i, j]| over eligible pairs
    stability: np.ndarray  # (T, K, K) float32: cosine of C[t, k] with C[t-1, k'], in [-1, 1]
    matrix: np.ndarray  # (T, K, N(N-1)/2) float32: upper triangle of C, or (0, 0, 0) unless asked for


def log_returns(panel: Panel) -> np.ndarray:
    """(T, N) float64 close-to-close log returns on prices carried forward; 0 where there is no earlier price."""
    log_close = np.log(panel.filled("close"))
    returns = np.zeros_like(log_close)
    returns[1:] = np.diff(log_close, axis=0)
    returns[panel.segments] = 0.0
    return np.nan_to_num(returns, nan=0.0, copy=False)


def standardised_returns(panel: Panel, halflife: float = 20.0, clip: float = 5.0) -> np.ndarray:
    """(T, N) float64: log return over the exponentially weighted volatility known one bar before, clipped to +-clip.

    The volatility of bar t uses bars before t only, so that a large move is not shrunk by itself. Bars without
    trade (return exactly 0) leave it as it was; the first bar of a symbol gets 0.
    """
    return _standardise(log_returns(panel), panel.segments, 0.5 ** (1.0 / halflife), clip)


@njit(cache=True, error_model="numpy")
def _standardise(returns, segments, decay, clip):
    rows, columns = returns.shape
    out = np.zeros((rows, columns))
    first = np.zeros(rows, dtype=np.bool_)
    first[segments] = True
    square = np.zeros(columns)  # weighted sum of squares and its weight: unbiased from the first bar on
    weight = np.zeros(columns)
    for t in range(rows):
        if first[t]:
            square[:] = 0.0
            weight[:] = 0.0
        for i in range(columns):
            r = returns[t, i]
            if r == 0.0:
                continue
            if weight[i] > 0.0 and square[i] > 0.0:
                out[t, i] = min(clip, max(-clip, r / np.sqrt(square[i] / weight[i])))
            square[i] = decay * square[i] + r * r
            weight[i] = decay * weight[i] + 1.0
    return out


def leadlag_signal(
    panel: Panel,
    lookbacks: np.ndarray,
    signal: str = "xcorr",
    max_lag: int = 1,
    min_coverage: float = 0.8,
    min_dollar_volume: float = 0.0,
    keep_matrix: bool = False,
) -> LeadLagSignal:
    """Lead-lag matrices of `panel` at every bar for every lookback.

    `xcorr`: C[i, j] = sum over lags l = 1..max_lag of corr(x_i(u-l), x_j(u)) - corr(x_j(u-l), x_i(u)), u over the last
    `lookback` bars. `levy`: the signed area of the level-2 path signature over the window, A = (S - S^T) / 2 with
    S[i, j] = sum_u (P_i(u-1) - P_i(s)) x_j(u), divided by the norms of x_i and x_j (Bennett, Cucuringu & Reinert 2022).
    x are `standardised_returns`; P their cumulative sums; a bar without trade counts as a zero return.

    A symbol is eligible for a lookback when it has a bar now, bars in at least `min_coverage` of the window, and a mean
    traded value per bar of at least `min_dollar_volume` over it (panels without volume: only 0 is accepted).
    """
    if signal not in SIGNALS:
        raise ValueError(f"signal={signal!r}: expected one of {sorted(SIGNALS)}")
    if max_lag < 1:
        raise ValueError(f"max_lag={max_lag}: expected at least 1")
    if min_dollar_volume > 0 and panel.volume is None:
        raise ValueError(f"min_dollar_volume={min_dollar_volume}: panel {panel.name!r} has no volume; expected 0")
    x = standardised_returns(panel)
    present = panel.present
    traded = np.zeros((1, 1)) if panel.volume is None else np.nan_to_num(panel.volume * panel.close, nan=0.0)
    rows, symbols, count = len(x), x.shape[1], len(lookbacks)
    pairs = symbols * (symbols - 1) // 2
    out = LeadLagSignal(
        scores=np.zeros((rows, count, symbols), np.float32),
        eligible=_eligible(present, traded, panel.segments, lookbacks, max_lag, min_coverage, min_dollar_volume),
        strength=np.zeros((rows, count), np.float32),
        stability=np.zeros((rows, count, count), np.float32),
        matrix=np.zeros((rows, count, pairs) if keep_matrix else (0, 0, 0), np.float32),
    )
    starts, stops = _blocks(panel.segments, rows)
    _signal_blocks(x, starts, stops, panel.segment_of_row, panel.segments, lookbacks, SIGNALS[signal], max_lag, *out)
    return out


def _blocks(segments, rows):
    """Row ranges of at most BLOCK bars that do not cross a history's start, counted from that start."""
    ends = np.append(segments[1:], rows)
    starts = np.concatenate([np.arange(a, b, BLOCK) for a, b in zip(segments, ends)])
    stops = np.concatenate([np.minimum(np.arange(a, b, BLOCK) + BLOCK, b) for a, b in zip(segments, ends)])
    return starts, stops


@njit(cache=True, error_model="numpy")
def _eligible(present, traded, segments, lookbacks, max_lag, min_coverage, min_dollar_volume):
    rows, symbols = present.shape
    out = np.zeros((rows, len(lookbacks), symbols), dtype=np.bool_)
    bars = np.zeros((rows + 1, symbols), dtype=np.int64)  # prefix sums: any window by difference
    value = np.zeros((rows + 1, symbols))
    segment, start = 0, 0
    for t in range(rows):
        if segment + 1 < len(segments) and t == segments[segment + 1]:
            segment += 1
            start = t
        for i in range(symbols):
            bars[t + 1, i] = bars[t, i] + present[t, i]
            if min_dollar_volume > 0.0:
                value[t + 1, i] = value[t, i] + traded[t, i]
        for k in range(len(lookbacks)):
            window = lookbacks[k]
            s = t + 1 - window
            if s - max_lag < start + 1:  # +1: the first bar of a history has no return
                continue
            for i in range(symbols):
                enough = bars[t + 1, i] - bars[s, i] >= min_coverage * window
                liquid = min_dollar_volume <= 0.0 or value[t + 1, i] - value[s, i] >= min_dollar_volume * window
                out[t, k, i] = present[t, i] and enough and liquid
    return out


@njit(cache=True, error_model="numpy", parallel=True)
def _signal_blocks(
    x, starts, stops, segment_of_row, segments, lookbacks, signal, max_lag, scores, eligible, strength, stability, matrix
):
    """Fill the summaries block by block; each block anchors its window sums directly, then moves them bar by bar."""
    symbols, count = x.shape[1], len(lookbacks)
    reach = lookbacks.max() + max_lag
    for b in prange(len(starts)):
        lo = segments[segment_of_row[starts[b]]]
        base = max(lo, starts[b] - 1 - reach)  # rows below are never read by this block
        path, square = _prefix_sums(x, base, stops[b])
        sums = np.zeros((count, max_lag if signal == XCORR else 1, symbols, symbols))
        current = np.zeros((count, symbols, symbols))
        previous = np.zeros((count, symbols, symbols))
        anchored = np.zeros(count, dtype=np.bool_)
        # the bar before the block is computed too, but not stored: stability compares with it
        for t in range(max(lo, starts[b] - 1), stops[b]):
            previous, current = current, previous
            for k in range(count):
                window = lookbacks[k]
                if t + 1 - window - max_lag < lo + 1:
                    continue
                if signal == XCORR:
                    _move_xcorr(x, t, window, max_lag, anchored[k], sums[k])
                    _matrix_xcorr(path, square, t - base, window, max_lag, sums[k], current[k])
                else:
                    _move_levy(x, path, t, base, window, anchored[k], sums[k, 0])
                    _matrix_levy(square, t - base, window, sums[k, 0], current[k])
                anchored[k] = True
                _drop_ineligible(eligible[t, k], current[k])
                if t >= starts[b]:
                    strength[t, k] = _summarise(eligible[t, k], current[k], scores[t, k])
                    if matrix.shape[0] > 0:
                        p = 0
                        for i in range(symbols):
                            for j in range(i + 1, symbols):
                                matrix[t, k, p] = current[k, i, j]
                                p += 1
            if t >= starts[b]:
                _cosines(current, previous, stability[t])


@njit(cache=True, error_model="numpy")
def _prefix_sums(x, start, stop):
    """Row r holds the sums of x and x^2 over rows start .. start+r-1."""
    path = np.zeros((stop - start + 1, x.shape[1]))
    square = np.zeros((stop - start + 1, x.shape[1]))
    for t in range(start, stop):
        for i in range(x.shape[1]):
            path[t - start + 1, i] = path[t - start, i] + x[t, i]
            square[t - start + 1, i] = square[t - start, i] + x[t, i] * x[t, i]
    return path, square


@njit(cache=True, error_model="numpy")
def _move_xcorr(x, t, window, max_lag, anchored, sums):
    """sums[l-1, i, j] = sum over the last `window` bars u, up to t, of x_i(u-l) x_j(u)."""
    symbols = x.shape[1]
    for lag in range(1, max_lag + 1):
        m = sums[lag - 1]
        if anchored:
            old = t - window
            for i in range(symbols):
                a, c = x[t - lag, i], x[old - lag, i]
                for j in range(symbols):
                    m[i, j] += a * x[t, j] - c * x[old, j]
        else:
            m[:] = 0.0
            for u in range(t + 1 - window, t + 1):
                for i in range(symbols):
                    a = x[u - lag, i]
                    for j in range(symbols):
                        m[i, j] += a * x[u, j]


@njit(cache=True, error_model="numpy")
def _matrix_xcorr(path, square, row, window, max_lag, sums, out):
    """C from the window sums; `row` is t counted from where the prefix sums start."""
    symbols = out.shape[0]
    cross = np.zeros((symbols, symbols))
    late, late_scale = _window_sum(path, square, row, window)
    for lag in range(1, max_lag + 1):
        early, early_scale = _window_sum(path, square, row - lag, window)
        for i in range(symbols):
            a, c = early[i] / window, early_scale[i]
            for j in range(symbols):
                cross[i, j] += (sums[lag - 1, i, j] - a * late[j]) * c * late_scale[j]
    for i in range(symbols):
        for j in range(symbols):
            out[i, j] = cross[i, j] - cross[j, i]


@njit(cache=True, error_model="numpy")
def _window_sum(path, square, row, window):
    """Sum over the `window` rows that end with `row`, and 1 / norm of the centred column (0 where it is constant)."""
    symbols = path.shape[1]
    total, scale = np.zeros(symbols), np.zeros(symbols)
    for i in range(symbols):
        total[i] = path[row + 1, i] - path[row + 1 - window, i]
        centred = square[row + 1, i] - square[row + 1 - window, i] - total[i] * total[i] / window
        scale[i] = 1.0 / np.sqrt(centred) if centred > 1e-9 * window else 0.0
    return total, scale


@njit(cache=True, error_model="numpy")
def _move_levy(x, path, t, base, window, anchored, s):
    """S[i, j] = sum over the last `window` bars u of (P_i(u-1) - P_i(before the window)) x_j(u), moved by Chen's identity."""
    symbols = x.shape[1]
    if anchored:
        old = t - window  # the bar that leaves; before it, the window began
        for i in range(symbols):
            before = path[t - base, i] - path[old - base, i]
            gone = x[old, i]
            for j in range(symbols):
                s[i, j] += before * x[t, j] - gone * (path[t - base + 1, j] - path[old - base + 1, j])
    else:
        s[:] = 0.0
        first = t + 1 - window
        for u in range(first, t + 1):
            for i in range(symbols):
                before = path[u - base, i] - path[first - base, i]
                for j in range(symbols):
                    s[i, j] += before * x[u, j]


@njit(cache=True, error_model="numpy")
def _matrix_levy(square, row, window, s, out):
    symbols = out.shape[0]
    scale = np.zeros(symbols)
    for i in range(symbols):
        norm = square[row + 1, i] - square[row + 1 - window, i]
        scale[i] = 1.0 / np.sqrt(norm) if norm > 1e-9 * window else 0.0
    for i in range(symbols):
        for j in range(symbols):
            out[i, j] = 0.5 * (s[i, j] - s[j, i]) * scale[i] * scale[j]


@njit(cache=True, error_model="numpy")
def _drop_ineligible(eligible, c):
    for i in range(len(eligible)):
        if not eligible[i]:
            c[i, :] = 0.0
            c[:, i] = 0.0


@njit(cache=True, error_model="numpy")
def _summarise(eligible, c, scores):
    """Row means into `scores`; returns the mean absolute entry. Both over eligible symbols."""
    n = 0
    for i in range(len(eligible)):
        n += eligible[i]
    if n < 2:
        return 0.0
    strength = 0.0
    for i in range(len(eligible)):
        total = 0.0
        for j in range(len(eligible)):
            total += c[i, j]
            strength += abs(c[i, j])
        scores[i] = total / (n - 1)
    return strength / (n * (n - 1))


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})  # no NaN here; lets the sums vectorise
def _cosines(current, previous, out):
    """out[k, q] = cosine of the matrices current[k] and previous[q]; 0 where either is all zeros."""
    count = len(current)
    size = current.shape[1] * current.shape[2]
    a, b = current.reshape(count, size), previous.reshape(count, size)
    for k in range(count):
        aa = 0.0
        for p in range(size):
            aa += a[k, p] * a[k, p]
        for q in range(count):
            bb, ab = 0.0, 0.0
            for p in range(size):
                bb += b[q, p] * b[q, p]
                ab += a[k, p] * b[q, p]
            out[k, q] = ab / np.sqrt(aa * bb) if aa > 0.0 and bb > 0.0 else 0.0


def regime_features(panel: Panel) -> np.ndarray:
    """(T, len(REGIME_FEATURES)) float32 description of the whole market at each bar, from trailing windows only.

    Log annualised volatility (mean over symbols), trend of the equal-weight market in standard deviations, ratio of
    shortest to longest volatility, cross-sectional dispersion over volatility, average pairwise correlation (from
    the variance of the mean), drawdown of the equal-weight market from its running maximum. Returns are over symbols
    with a price; windows are shorter at the start of a history.
    """
    alive = np.isfinite(panel.filled("close"))
    return _regime(log_returns(panel), alive, panel.segments, np.asarray(REGIME_WINDOWS), panel.bars_per_year)


@njit(cache=True, error_model="numpy")
def _regime(returns, alive, segments, windows, bars_per_year):
    rows, symbols = returns.shape
    number = len(windows)
    out = np.zeros((rows, 2 * number + 4), dtype=np.float32)
    market, square, spread = np.zeros(rows + 1), np.zeros(rows + 1), np.zeros(rows + 1)  # prefix sums
    market2 = np.zeros(rows + 1)
    segment, start, level, peak = 0, 0, 0.0, 0.0
    for t in range(rows):
        if segment + 1 < len(segments) and t == segments[segment + 1]:
            segment += 1
            start, level, peak = t, 0.0, 0.0
        n, mean, second = 0, 0.0, 0.0
        for i in range(symbols):
            if alive[t, i]:
                n += 1
                mean += returns[t, i]
                second += returns[t, i] ** 2
        mean /= max(1, n)
        second /= max(1, n)
        market[t + 1] = market[t] + mean
        market2[t + 1] = market2[t] + mean * mean
        square[t + 1] = square[t] + second
        spread[t + 1] = spread[t] + np.sqrt(max(0.0, second - mean * mean))
        level += mean
        peak = max(peak, level)
        for w in range(number):
            length = min(windows[w], t + 1 - start)
            s = t + 1 - length
            vol = np.sqrt(max(1e-12, (square[t + 1] - square[s]) / length))
            out[t, w] = np.log(vol * np.sqrt(bars_per_year))
            out[t, number + w] = (market[t + 1] - market[s]) / (vol * np.sqrt(length))
        s = t + 1 - min(windows[1], t + 1 - start)
        total = max(1e-12, square[t + 1] - square[s])
        out[t, 2 * number] = out[t, 0] - out[t, number - 1]
        out[t, 2 * number + 1] = (spread[t + 1] - spread[s]) / np.sqrt(total * (t + 1 - s))
        share = (market2[t + 1] - market2[s]) / total  # (1 + (n - 1) rho) / n for equal volatilities
        out[t, 2 * number + 2] = (share * n - 1.0) / (n - 1.0) if n > 1 else 0.0
        out[t, 2 * number + 3] = level - peak
    return out


def asset_features(panel: Panel) -> np.ndarray:
    """(T, N, len(ASSET_FEATURES)) float32 description of every symbol at each bar, from trailing windows only.

    Standardised last return; its sums over TREND_WINDOWS bars over the square root of their number; log annualised
    volatility of 20 bars; 1 where the symbol has a bar now. Windows are shorter at the start of a history; symbols that
    have not been listed yet have zeros.
    """
    x, returns = standardised_returns(panel), log_returns(panel)
    features = [x, *(_window_sum_of(panel, x, w)[0] for w in TREND_WINDOWS)]
    square, bars = _window_sum_of(panel, returns**2, 20)
    variance = square / np.sqrt(bars)
    features.append(0.5 * np.log(np.maximum(variance, 1e-12) * panel.bars_per_year))
    listed = np.isfinite(panel.filled("close"))
    return np.stack([np.where(listed, f, 0.0) for f in (*features, panel.present)], axis=2).astype(np.float32)


def _window_sum_of(panel, x, window):
    """Sums over the last `window` bars of each history over the root of their number; and that number (T, 1)."""
    row = np.arange(len(x))
    bars = np.minimum(row - panel.segments[panel.segment_of_row] + 1, window)[:, None]
    total = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x, axis=0)])
    return (total[1:] - np.take_along_axis(total, row[:, None] + 1 - bars, axis=0)) / np.sqrt(bars), bars
