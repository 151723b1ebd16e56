"""Portfolios without exposure to the market, to factors or to clusters of symbols; and the choice of pairs.

Exposures and choices are NumPy, from past prices; `neutralise` is torch and differentiable, so that a policy is trained on the
orders that it really makes.
"""

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from envs.features import log_returns, standardised_returns, window_sum
from envs.panel import Panel, PanelError, Split

FEWEST = 60  # bars that a principal component, a correlation or a distance is estimated from


def market_beta(panel: Panel, window: int = 60, prior_bars: float = 20.0) -> np.ndarray:
    """(T, N) beta of each symbol's log return to the equally weighted market's, over the last `window` bars of its history.

    Drawn to 1 as if `prior_bars` more bars had had a beta of 1 (shrinkage as in Vasicek 1973): 1 where a symbol has no past.
    """
    returns, listed = log_returns(panel), np.isfinite(panel.filled("close"))
    market = (returns * listed).sum(axis=1, keepdims=True) / np.maximum(listed.sum(axis=1, keepdims=True), 1)
    sums = [window_sum(panel, x, window) for x in (returns * market * listed, market**2 * listed, listed.astype(float))]
    joint, square, number = (total * np.sqrt(bars) for total, bars in sums)
    share = number / (number + prior_bars)
    beta = np.divide(joint, square, out=np.ones_like(joint), where=square > 0)
    return share * beta + (1.0 - share)


def factor_loadings(panel: Panel, count: int, window: int = 250, every: int = 20) -> np.ndarray:
    """(T, N, count) loadings of the first principal components of the standardised returns of the last `window` bars.

    Estimated anew every `every` bars of a history, from its first FEWEST bars on (zeros before), over symbols with a price
    throughout at least half of those bars (others 0). Columns have unit length; their sum is not negative.
    Raises ValueError for a count outside 1..N.
    """
    if not 1 <= count <= panel.num_symbols:
        raise ValueError(f"neutral_count={count}: expected 1 to {panel.num_symbols}, the number of symbols")
    x, listed = standardised_returns(panel), np.isfinite(panel.filled("close"))
    out = np.zeros((panel.num_bars, panel.num_symbols, count))
    for start, stop in zip(panel.segments, np.append(panel.segments[1:], panel.num_bars)):
        for t in range(start + FEWEST - 1, stop, every):
            rows = slice(max(start, t + 1 - window), t + 1)
            chosen = listed[rows].mean(axis=0) >= 0.5
            _, vectors = np.linalg.eigh(x[rows][:, chosen].T @ x[rows][:, chosen])
            vectors = vectors[:, ::-1][:, :count]
            vectors = vectors * np.where(vectors.sum(axis=0) < 0, -1.0, 1.0)
            loadings = np.zeros((panel.num_symbols, count))
            loadings[chosen, : vectors.shape[1]] = vectors
            out[t : min(stop, t + every)] = loadings
    return out


def clusters(panel: Panel, split: Split, count: int) -> np.ndarray:
    """(N,) cluster of each symbol, 0..count-1, in the order of their first symbols; from the rows of `split` alone.

    Average linkage at the distance sqrt((1 - correlation) / 2) of log returns (Mantegna 1999); symbols with less than FEWEST
    bars in common count as uncorrelated. Raises ValueError for a count outside 1..N.
    """
    if not 1 <= count <= panel.num_symbols:
        raise ValueError(f"neutral_count={count}: expected 1 to {panel.num_symbols}, the number of symbols")
    if panel.num_symbols == 1:
        return np.zeros(1, np.int64)
    returns, known = _training_returns(panel, split)
    x = np.where(known, returns, 0.0)
    number = known.T.astype(float) @ known
    each = np.maximum(number, 1.0)
    mean = x.T @ known / each  # of symbol i over the bars that it has in common with j
    covariance = x.T @ x / each - mean * mean.T
    square = (x**2).T @ known / each - mean**2
    scale = np.sqrt(np.maximum(square * square.T, 0.0))
    usable = (number >= FEWEST) & (scale > 0)
    correlation = np.divide(covariance, scale, out=np.zeros_like(scale), where=usable).clip(-1.0, 1.0)
    distance = np.sqrt(0.5 * (1.0 - correlation))
    np.fill_diagonal(distance, 0.0)
    labels = fcluster(linkage(squareform(distance, checks=False), "average"), count, "maxclust")
    _, first, label = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label]


def pairs(panel: Panel, split: Split, count: int) -> np.ndarray:
    """(N, count) weights of the `count` closest pairs of symbols, 1/2 and -1/2; from the rows of `split` alone.

    The distance method of Gatev, Goetzmann & Rouwenhorst 2006: the smallest mean squared difference of log prices that start
    at 0, over bars that both have, at least half of all; a symbol is in one pair at most. Raises PanelError for too few pairs.
    """
    returns, known = _training_returns(panel, split)
    enough = (known.T.astype(float) @ known) >= max(FEWEST, 0.5 * len(known))
    level = np.concatenate([np.cumsum(np.where(known, returns, 0.0)[a:b], axis=0) for a, b in _blocks(split)])
    candidates = []
    for i in range(panel.num_symbols):
        for j in np.flatnonzero(enough[i, i + 1 :]) + i + 1:
            gap = (level[:, i] - level[:, j])[known[:, i] & known[:, j]]
            candidates.append((float(np.mean((gap - gap[0]) ** 2)), i, int(j)))
    out, used = np.zeros((panel.num_symbols, count)), set()
    column = 0
    for _, i, j in sorted(candidates):
        if column < count and not {i, j} & used:
            out[[i, j], column] = 0.5, -0.5
            used |= {i, j}
            column += 1
    if column < count:
        raise PanelError(f"pairs={count}: panel {panel.name!r} has {column} pairs of symbols with enough bars in common")
    return out


def neutralise(weights: Tensor, exposures: Tensor, movable: Tensor) -> Tensor:
    """The weights (..., N) that are nearest to `weights` and without exposure: exposures^T weights = 0, exposures (..., N, K).

    Those that are not `movable` (..., N) bool keep their weight; the others offset their exposure too, as well as they can:
    where exposures are collinear or too few weights can move, in the sense of least squares (a pseudo-inverse of the K x K Gram
    matrix, whose eigenvalues below 1e-6 of its largest count as 0). Differentiable in the weights.
    """
    own = exposures * movable.unsqueeze(-1)
    with torch.no_grad():
        wide = own.double()
        inverse = torch.linalg.pinv(wide.mT @ wide, rtol=1e-6, hermitian=True).to(weights.dtype)
    total = (exposures * weights.unsqueeze(-1)).sum(-2)  # (..., K)
    return weights - (own * (inverse * total.unsqueeze(-2)).sum(-1).unsqueeze(-2)).sum(-1)


def _blocks(split):
    """Where the ranges of a split begin and end among its rows."""
    ends = np.cumsum(split.ranges[:, 1] - split.ranges[:, 0])
    return list(zip(np.append(0, ends[:-1]), ends))


def _training_returns(panel, split):
    """Log returns (R, N) of the rows of a split, and where a symbol has a bar and an earlier price in the same history."""
    rows = np.concatenate([np.arange(a, b) for a, b in split.ranges])
    earlier = np.roll(np.isfinite(panel.filled("close")), 1, axis=0)
    earlier[panel.segments] = False
    return log_returns(panel)[rows], (panel.present & earlier)[rows]
