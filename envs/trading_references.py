"""What an agent on Trading-v0 is compared with: rules that need no learning, and, on synthetic:ou, the best band.

Every rule acts through Trading-v0's own orders, fills and limits.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numba import njit
from numpy.polynomial.hermite_e import hermegauss
from scipy.sparse import csr_matrix

from envs.costs import FILLS, RECORD, TRADABLE, Costs, account_step
from envs.ledger import Policy, backtest
from envs.panel import Split
from envs.synthetic import OVERNIGHT, reversion, stationary_deviation
from envs.trading import BUY_LARGE, BUY_SMALL, HOLD, SELL_ALL, TradingVectorEnv
from envs.trading_tables import POSITION, TradingData

NODES = 12  # of the Gauss-Hermite quadrature of each part of a bar
REACH = 5.0  # stationary deviations that the grid reaches to either side
TOLERANCE = 1e-11  # of the growth per bar


class Band(NamedTuple):
    """Buy below `buy`, sell above `sell` (log deviations from the level at a close), hold in between; `growth`: net log growth
    per bar that this earns."""

    buy: float
    sell: float
    growth: float


def run(data: TradingData, split: Split, policy: Policy, **env_options) -> pd.DataFrame:
    """Ledger of a policy on every symbol from the start to the end of every range of `split`."""
    number = len(data.runs(split))
    markets = TradingVectorEnv(number, data=data, split=split, episode_length=0, random_start=False, **env_options)
    return backtest(markets, policy, data.panel, split)


def thresholds(data: TradingData, split: Split, signal: np.ndarray, buy: float, sell: float) -> Policy:
    """The policy that buys all it may while signal (T, N) is below `buy`, and sells all while it is above `sell`."""
    runs = data.market(split)
    symbol = runs.symbol[runs.order]
    flat = data.layout["position"].start + POSITION.index("flat")

    def policy(obs, mask, rows):
        x = signal[rows, symbol]
        buys = np.arange(BUY_SMALL, BUY_LARGE + 1)
        most = np.where(mask[:, buys], buys, HOLD).max(axis=1)
        order = np.where(obs[:, flat] > 0, np.where(x < buy, most, HOLD), np.where(x > sell, SELL_ALL, HOLD))
        return np.where(mask[np.arange(len(order)), order], order, HOLD)

    return policy


def references(data: TradingData, split: Split) -> dict[str, pd.DataFrame]:
    """Ledgers on `split` of `flat` and `buy and hold`, and on synthetic:ou of `threshold at 0`, which buys below the level and
    sells above it, and, unless histories draw keys of their own, `optimal band`, the best where a buy is all of the equity, and
    no exit or limit closes it. The last two are told the true deviation.
    """
    nothing = np.zeros(data.panel.close.shape)
    rules = {"flat": (nothing, -np.inf, np.inf), "buy and hold": (nothing, np.inf, np.inf)}
    hidden = data.panel.hidden
    if {"deviation", "half_life", "volatility"} <= set(hidden):
        rules["threshold at 0"] = (hidden["deviation"], 0.0, 0.0)
        if not data.panel.parameters:  # one band is best in all histories
            half_life, vol = (float(hidden[key].flat[0]) for key in ("half_life", "volatility"))
            best = optimal_band(half_life, vol, data.costs, data.fill)
            rules["optimal band"] = (hidden["deviation"], best.buy, best.sell)
    return {name: run(data, split, thresholds(data, split, *rule)) for name, rule in rules.items()}


def optimal_band(half_life: float, vol: float, costs: Costs, fill: str, points: int = 601, weights: int = 2) -> Band:
    """The best policy on synthetic:ou among those that hold one of `weights` shares of equity, evenly from 0 to 1.

    half_life and vol as in synthetic.OrnsteinUhlenbeck. With two weights, all or nothing, that is a band. With more of them
    `buy` and `sell` are where the first share is bought or sold; where impact is quadratic that earns more, with five weights
    2% at the defaults. State: deviation at a close (`points` of them) and weight held, in between by interpolation. Choice:
    hold, which lets the weight drift, or bring it to one of these weights at the fill, after the costs that `account_step`
    takes for it; square-root impact and interest are left out. A step runs from one close to the next, in two parts, before
    and after the fill, each integrated by Gauss-Hermite quadrature; it earns the log growth of equity. Relative value
    iteration (Puterman 1994, 8.5) gives the mean growth per bar, and the values by which to choose.

    Raises ValueError if the fill rule is unknown, or there are fewer than two weights or three points.
    """
    if weights < 2 or points < 3:
        raise ValueError(f"weights={weights}, points={points}: expected at least 2 and 3")
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r}: expected one of {FILLS}")
    share = {"next_open": OVERNIGHT**2, "next_close": 1.0, "same_close": 0.0}[fill]  # of the bar before the fill
    reach = REACH * stationary_deviation(half_life, vol)
    x, w = np.linspace(-reach, reach, points), np.linspace(0.0, 1.0, weights)
    before, earned_before = _part(x, w, *reversion(half_life, vol, share))
    after, earned_after = _part(x, w, *reversion(half_life, vol, 1.0 - share))
    paid = np.array([[_trading_growth(a, b, costs.rates[0]) for b in w] for a in w])  # log growth of going from a to b
    value, change = np.zeros((points, weights)), np.array([0.0, np.inf])
    while np.ptp(change) > TOLERANCE:
        at_fill = (earned_after + after @ value.ravel()).reshape(points, weights)
        # what each choice is worth at the fill: (points, weight held, choice), the last one to hold
        choices = np.concatenate([at_fill[:, None, :] + paid, at_fill[:, :, None]], axis=2)
        q = np.stack([earned_before + before @ c.ravel() for c in np.moveaxis(choices, 2, 0)], axis=1)
        q = q.reshape(points, weights, weights + 1)
        new = q.max(axis=2)
        change, value = new - value, new - new[points // 2, 0]
    buying, selling = q[:, 0, 1:-1].max(axis=1) - q[:, 0, -1], q[:, -1, :-2].max(axis=1) - q[:, -1, -1]  # over holding
    return Band(_crossing(x, buying), _crossing(x, selling), float(change.mean()))


def _part(x, w, keep, noise):
    """A part of a bar in which nothing is traded: the operator that takes values at its end (points * weights) to their means
    at its start, as a sparse matrix, and (points * weights,) the mean log growth of equity."""
    nodes, probability = hermegauss(NODES)
    probability = probability / probability.sum()
    shape = (len(x), len(w), NODES)
    end = np.broadcast_to(keep * x[:, None, None] + noise * nodes, shape)
    gain = np.expm1(end - x[:, None, None])
    grown = 1.0 + w[:, None] * gain
    held = w[:, None] * (1.0 + gain) / grown
    rows = np.broadcast_to(np.arange(len(x) * len(w)).reshape(len(x), len(w), 1), shape)
    (i, right), (j, up) = _between(x, end), _between(w, held)
    operator = csr_matrix((len(x) * len(w),) * 2)
    for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (right if di else 1.0 - right) * (up if dj else 1.0 - up) * probability
        columns = (i + di) * len(w) + j + dj
        operator += csr_matrix((share.ravel(), (rows.ravel(), columns.ravel())), shape=operator.shape)
    return operator, (np.log(grown) @ probability).ravel()


def _between(grid, points):
    """Index of the grid point at or below each of `points`, and how far on to the next one it lies, within the grid."""
    place = np.clip((points - grid[0]) / (grid[1] - grid[0]), 0.0, len(grid) - 1.0)
    index = np.minimum(place.astype(np.int64), len(grid) - 2)
    return index, place - index


@njit(cache=True, error_model="numpy")
def _trading_growth(held, target, rates):
    """Log growth of equity in bringing a weight to another one, by the one accounting step."""
    one = np.zeros(1)
    growth = account_step(
        np.full(1, held), np.full(1, target), one, one, np.full(1, TRADABLE), np.zeros(0), 0.0, False, 1.0, rates,
        np.zeros(len(RECORD)),
    )  # fmt: skip
    return np.log(growth)


def _crossing(x, advantage):
    """Where `advantage` (a trade's over holding) changes its sign, by interpolation; NaN where it never does."""
    at = np.flatnonzero((advantage[:-1] > 0) != (advantage[1:] > 0))
    if len(at) == 0:
        return float("nan")
    k = at[0]
    return float(x[k] - advantage[k] * (x[k + 1] - x[k]) / (advantage[k + 1] - advantage[k]))
