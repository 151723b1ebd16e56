"""Market-neutral, factor-neutral and grouped portfolios: exposures that are known in time, and the projection onto their zero.

`market_beta` and `factor_loadings` are causal: row t is a function of bars t and earlier inside the same price history.
`clusters` and `pairs` choose symbols once, by the bars of one split (training) and nothing else.
"""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from numba import njit
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import pdist, squareform

from envs.features import log_returns, standardised_returns
from envs.panel import Panel, PanelError, Split

MIN_BARS = 60  # fewer say little about a correlation
PRIOR_BARS = 20  # a beta of 1 weighs as much as this many bars
MIN_VARIANCE = 1e-12  # of the market's return per bar: below it there is nothing to have a beta to
COVERAGE = 0.9  # share of the bars that a symbol must have to be one leg of a pair


def market_beta(panel: Panel, window: int = 60) -> np.ndarray:
    """(T, N) float64 beta of each symbol to the equally weighted market, from bars of the last `window` rows.

    b = cov(r, m) / var(m) over the symbol's own bars, r its log return since its bar before, m the mean log return of the
    symbols with such a return in that row; then w b + (1 - w), with w = bars / (bars + 20): shrunk towards 1, the mean beta,
    as by Vasicek (1973) if the prior is as precise as 20 bars are. 1 where nothing is known (first bars, or a market that
    does not move), 0 where the symbol is not listed yet.

    Raises ValueError if window < 2.
    """
    if window < 2:
        raise ValueError(f"window={window}: expected at least 2 bars")
    returns, listed = log_returns(panel), np.isfinite(panel.filled("close"))
    known = panel.present.copy()
    known[1:] &= listed[:-1]
    known[panel.segments] = False
    market = (returns * known).sum(axis=1) / np.maximum(1, known.sum(axis=1))
    beta = _betas(returns, market, known, panel.segments[panel.segment_of_row], window)
    return np.where(listed, beta, 0.0)


@njit(cache=True, error_model="numpy")
def _betas(returns, market, known, first, window):
    rows, symbols = returns.shape
    out = np.ones((rows, symbols))
    for t in range(rows):
        start = max(first[t], t + 1 - window)
        for i in range(symbols):
            bars, mean = 0, 0.0
            for u in range(start, t + 1):
                if known[u, i]:
                    bars += 1
                    mean += market[u]
            mean /= max(1, bars)
            variance, covariance = 0.0, 0.0  # times bars
            for u in range(start, t + 1):
                if known[u, i]:
                    variance += (market[u] - mean) ** 2
                    covariance += (market[u] - mean) * returns[u, i]
            if variance > MIN_VARIANCE * bars:
                weight = bars / (bars + PRIOR_BARS)
                out[t, i] = weight * covariance / variance + 1.0 - weight
    return out


def factor_loadings(panel: Panel, count: int, window: int = 250, every: int = 20) -> np.ndarray:
    """(T, N, count) float64 loadings of the first `count` principal components of the last `window` rows of returns.

    Eigenvectors of the covariance matrix of `standardised_returns` over the symbols with a bar in at least half of these rows
    (the others load 0): orthonormal columns, the largest eigenvalue first, each with a sum that is not negative. Computed at
    the 60th bar of a history and every `every` bars from there on, and held in between; 0 before. Columns that have no
    variance to explain, as where fewer than `count` symbols have bars, are 0.

    Raises ValueError if count is not from 1 to N, window < 2 or every < 1.
    """
    _expect_count(panel, count, panel.num_symbols)
    if window < 2 or every < 1:
        raise ValueError(f"window={window}, every={every}: expected at least 2 rows, and at least 1")
    x, out = standardised_returns(panel), np.zeros((*panel.close.shape, count))
    for start, stop in pairwise((*panel.segments, panel.num_bars)):
        for t in range(start + MIN_BARS - 1, stop, every):
            rows = slice(max(start, t + 1 - window), t + 1)
            covered = np.flatnonzero(panel.present[rows].mean(axis=0) >= 0.5)
            centred = x[rows][:, covered] - x[rows][:, covered].mean(axis=0)
            values, vectors = np.linalg.eigh(centred.T @ centred)
            some = values > 1e-10 * values.max(initial=0.0)
            first = vectors[:, some][:, ::-1][:, :count]  # eigh's order ascends
            first *= np.where(first.sum(axis=0) < 0, -1.0, 1.0)
            out[t : min(t + every, stop), covered, : first.shape[1]] = first
    return out


def clusters(panel: Panel, split: Split, count: int) -> np.ndarray:
    """(N,) int64 cluster of each symbol, 0..count-1, numbered in the order of their first symbols.

    Average linkage on the distance sqrt((1 - correlation) / 2) (half of Mantegna's, 1999) of the log returns in the split, each
    since the symbol's bar before, at the bars that two symbols share; cut where `count` clusters are left. Symbols that share
    fewer than 60, or do not move, count as uncorrelated: so such a symbol joins those that it is near to by what is known,
    and is among the last to be joined if nothing is.

    Raises ValueError if count is not from 1 to N.
    """
    _expect_count(panel, count, panel.num_symbols)
    if panel.num_symbols == 1:  # nothing to link
        return np.zeros(1, dtype=np.int64)
    returns = pd.DataFrame(np.concatenate(_returns_by_history(panel, split)))
    correlation = returns.corr(min_periods=MIN_BARS).fillna(0.0).to_numpy()
    distance = squareform(np.sqrt((1.0 - correlation) / 2.0), checks=False)  # takes the upper triangle
    return cut_tree(linkage(distance, method="average"), n_clusters=count)[:, 0]


def pairs(panel: Panel, split: Split, count: int) -> np.ndarray:
    """(N, count) float64 long/short pairs: column k is 1/2 on one symbol and -1/2 on a later one, the nearest pair first.

    The distance method of Gatev, Goetzmann & Rouwenhorst (2006): the sum of squared deviations between log prices that start
    at 0 in each history of the split, over all its bars; prices are carried forward, and 0 before a symbol's first bar. Pairs
    are taken in ascending order, skipping those with a symbol already taken. Candidates are the symbols with at least 60 bars
    in the split, and in at least 90% of its rows.

    Raises ValueError if count is not from 1 to N // 2; PanelError, naming the symbols that are none, if there are fewer than
    2 count candidates.
    """
    _expect_count(panel, count, panel.num_symbols // 2)
    log_price = np.concatenate([np.nan_to_num(part).cumsum(axis=0) for part in _returns_by_history(panel, split)])
    bars = np.concatenate([panel.present[start:stop] for start, stop in split.ranges]).sum(axis=0)
    least = max(MIN_BARS, COVERAGE * len(log_price))
    candidates = np.flatnonzero(bars >= least)
    if len(candidates) < 2 * count:
        short = [f"{panel.symbols[i]} ({bars[i]})" for i in np.flatnonzero(bars < least)]
        raise PanelError(
            f"{panel.name}: split {split.name!r}: {count} pairs need {2 * count} symbols with at least {np.ceil(least):.0f} "
            f"bars each, found {len(candidates)}; too few bars: {', '.join(short)}"
        )
    out = np.zeros((panel.num_symbols, count))
    first, second = (candidates[side] for side in np.triu_indices(len(candidates), 1))  # the order of pdist
    free, k = np.ones(panel.num_symbols, bool), 0
    for p in np.argsort(pdist(log_price[:, candidates].T, "sqeuclidean"), kind="stable"):
        legs = [first[p], second[p]]
        if free[legs].all() and k < count:
            out[legs, k] = 0.5, -0.5
            free[legs] = False
            k += 1
    return out


def neutralise(weights: torch.Tensor, exposures: torch.Tensor, movable: torch.Tensor) -> torch.Tensor:
    """The nearest weights whose exposures are zero, among those that leave the symbols that cannot move where they are.

    weights (..., N) as fractions of equity; exposures (..., N, K), column k the exposure of weight 1 in each symbol; movable
    (..., N) bool; all broadcast, on one device, weights and exposures of one float type. Returns (..., N), differentiable in
    weights and exposures.

    Minimises |w - weights| over w = weights where not movable and exposures^T w = 0, summed over all symbols; where the movable
    symbols cannot offset all of it, over the w with the least |exposures^T w|. With E the exposures whose immovable rows are
    zero that is w = weights - (E^T)^+ exposures^T weights (Penrose 1956). Directions in which E has less than
    sqrt(machine epsilon) of its largest singular value count as none, so that collinear and zero columns do no harm.

    Raises ValueError if the shapes do not fit or movable is not bool.
    """
    n = weights.shape[-1]
    if exposures.ndim < 2 or exposures.shape[-2] != n or movable.shape[-1:] != (n,) or movable.dtype != torch.bool:
        raise ValueError(
            f"weights {tuple(weights.shape)}, exposures {tuple(exposures.shape)}, movable {tuple(movable.shape)} "
            f"{movable.dtype}: expected (..., N), (..., N, K), (..., N) bool"
        )
    exposure = (exposures * weights[..., None]).sum(dim=-2)
    lever = torch.linalg.pinv(exposures * movable[..., None], rtol=torch.finfo(exposures.dtype).eps ** 0.5)
    offset = (exposure[..., None, :] @ lever).squeeze(-2)
    return torch.where(movable, weights - offset, weights)


def _expect_count(panel, count, most):
    if not 1 <= count <= most:
        raise ValueError(f"count={count}: panel {panel.name!r} has {panel.num_symbols} symbols; expected 1 to {most}")


def _returns_by_history(panel, split):
    """Log returns (rows, N) of each history's part of each range, from prices inside it alone; NaN where there is none."""
    out = []
    for start, stop in split.ranges:
        for part in np.split(np.arange(start, stop), np.flatnonzero(np.diff(panel.segment_of_row[start:stop])) + 1):
            log_close = pd.DataFrame(np.log(panel.close[part]))
            out.append(log_close.ffill().diff().where(panel.present[part]).to_numpy())
    return out
