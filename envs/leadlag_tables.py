"""The read-only tables of LeadLag-v0: what every lookback would order at every bar, and what an agent sees of it.

Computed once per panel (`LeadLagData`) and shared by every market instance: a step only indexes them, so that it costs
the same whatever the lookback.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from envs.costs import FILLS, Costs, default_fill, execution, load_costs
from envs.features import REGIME_FEATURES, leadlag_signal, regime_features, standardised_returns
from envs.panel import Panel, Split

ENCODERS = ("rows", "topk", "full")
MATRIX = ("stability", "extremity", "strength")  # of the matrix in use; they follow its encoding


@dataclass(frozen=True)
class LeadLagConfig:
    """What defines the market; everything that the tables are computed from."""

    costs: str = "institutional"
    fill: str = "auto"  # next_open where the panel has opens, else next_close; or same_close
    num_lookbacks: int = 8
    min_lookback: int = 5
    max_lookback: int = 250
    signal: str = "xcorr"  # or levy
    max_lag: int = 1  # lags 1..max_lag of the cross-correlation
    top_fraction: float = 0.3  # leaders are the top, followers the bottom fraction of the row means
    hedge: bool = False  # short the market against the followers: net exposure 0
    gross: float = 1.0  # gross exposure of the follower portfolio
    min_symbols: int = 4  # a lookback needs as many eligible symbols
    min_coverage: float = 0.8  # share of bars that a symbol must have in the window
    min_dollar_volume: float = 0.0  # mean traded value per bar that a symbol must have in the window
    encoder: str = "rows"  # rows: all row means; topk: the k largest and smallest; full: the matrix
    topk: int = 3

    def __post_init__(self):
        def expect(ok, field, what):
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {what}")

        expect(self.fill in ("auto", *FILLS), "fill", f"auto or one of {FILLS}")
        expect(self.min_lookback >= 2, "min_lookback", "at least 2")
        expect(self.max_lookback > self.min_lookback, "max_lookback", f"more than min_lookback={self.min_lookback}")
        expect(self.num_lookbacks >= 2, "num_lookbacks", "at least 2")
        expect(0 < self.top_fraction <= 0.5, "top_fraction", "a fraction in (0, 0.5]")
        expect(0 < self.gross, "gross", "a positive number")
        expect(self.min_symbols >= 2, "min_symbols", "at least 2")
        expect(0 < self.min_coverage <= 1, "min_coverage", "a fraction in (0, 1]")
        expect(self.min_dollar_volume >= 0, "min_dollar_volume", "0 or more")
        expect(self.encoder in ENCODERS, "encoder", f"one of {ENCODERS}")
        expect(self.topk >= 1, "topk", "at least 1")

    @property
    def lookbacks(self) -> np.ndarray:
        """(K,) int64, geometric from min_lookback to max_lookback, in bars."""
        grid = np.geomspace(self.min_lookback, self.max_lookback, self.num_lookbacks).round().astype(np.int64)
        if len(np.unique(grid)) < len(grid):
            raise ValueError(
                f"num_lookbacks={self.num_lookbacks}: {self.min_lookback}..{self.max_lookback} has not that many "
                "different lookbacks; expected fewer"
            )
        return grid


class LeadLagMarket(NamedTuple):
    """Read-only arrays that the kernels index by bar t and lookback k."""

    to_fill: np.ndarray  # (T, N), like the next four as in costs.Execution
    to_mark: np.ndarray
    status: np.ndarray
    impact: np.ndarray
    years: np.ndarray
    fill_at_end: bool
    rates: np.ndarray  # (1,) costs.RATES
    targets: np.ndarray  # (T, K, N) float32 weights of the follower portfolio
    valid: np.ndarray  # (T, K) bool: history, coverage and liquidity suffice
    matrix: np.ndarray  # (T, K, E + 3) float32: what an agent sees of matrix (t, k); MATRIX names the last three
    context: np.ndarray  # (T, K + F + E) float32: strength of all K matrices, regime features, extra series
    stability: np.ndarray  # (T, K, K) float32: matrix k now against matrix k' one bar before
    starts: np.ndarray  # (R,) first row of each range at which a decision can be taken
    stops: np.ndarray  # (R,) end of each range
    weights: np.ndarray  # (R,) float64: relative probabilities of episodes to lie in it, or (0,): by its number of windows


class LeadLagData:
    """A panel with the tables of LeadLag-v0 over it, shared by all environments on that panel.

    Attributes: `panel`, `config`, `costs` (Costs), `fill`, `lookbacks` (K,), `signal` (LeadLagSignal), and `layout`: the
    name of each block of the observation -> slice. A panel's extra series are seen too, 0 where nothing is known yet. Raises
    ValueError naming the field, PanelError for the panel.
    """

    def __init__(self, panel: Panel, config: LeadLagConfig = LeadLagConfig()):
        self.panel, self.config = panel, config
        self.costs: Costs = load_costs(config.costs)
        self.fill = default_fill(panel) if config.fill == "auto" else config.fill
        self.lookbacks = config.lookbacks
        n, count = panel.num_symbols, len(self.lookbacks)
        if n < config.min_symbols:
            raise ValueError(f"panel {panel.name!r} has {n} symbols; expected at least min_symbols={config.min_symbols}")
        self.signal = leadlag_signal(
            panel, self.lookbacks, config.signal, config.max_lag, config.min_coverage, config.min_dollar_volume,
            keep_matrix=config.encoder == "full",
        )  # fmt: skip
        self.execution = execution(panel, self.fill, self.costs)
        self.valid = self.signal.eligible.sum(axis=2) >= config.min_symbols
        self.regime = regime_features(panel)
        self.targets, self.extremity, topk = follower_portfolios(
            self.signal.scores, self.signal.eligible, self.valid, standardised_returns(panel),
            config.top_fraction, config.hedge, config.gross, config.topk if config.encoder == "topk" else 0,
        )  # fmt: skip
        encoded = {"rows": self.signal.scores, "topk": topk, "full": self.signal.matrix}[config.encoder]
        held = np.arange(count)
        about = np.stack([self.signal.stability[:, held, held], self.extremity, self.signal.strength], axis=2)
        self.matrix = np.concatenate([encoded, about], axis=2)
        series = np.column_stack([np.zeros((panel.num_bars, 0)), *(np.nan_to_num(x) for x in panel.extras.values())])
        self.context = np.concatenate([self.signal.strength, self.regime, series.astype(np.float32)], axis=1)
        self.layout, at = {}, 0
        for name, size in (
            ("signal", encoded.shape[2]), *((name, 1) for name in MATRIX), ("strengths", count),
            ("regime", len(REGIME_FEATURES)), ("series", series.shape[1]), ("lookback", count), ("portfolio", 3),
        ):  # fmt: skip
            self.layout[name] = slice(at, at + size)
            at += size
        self.observation_size = at

    def market(self, split: Split) -> LeadLagMarket:
        starts = []
        for start, stop in split.ranges:
            usable = np.flatnonzero(self.valid[start : stop - 1].any(axis=1))
            if len(usable) == 0:
                raise ValueError(
                    f"panel {self.panel.name!r}, split {split.name!r}: no lookback has {self.config.min_symbols} eligible "
                    f"symbols in rows {start}..{stop - 1}; expected more bars or symbols, or a smaller --min-lookback"
                )
            starts.append(start + usable[0])
        return LeadLagMarket(
            *self.execution, self.costs.rates, self.targets, self.valid, self.matrix, self.context,
            self.signal.stability, np.array(starts), split.ranges[:, 1].copy(), split.odds,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {**asdict(self.config), "fill": self.fill, "costs": asdict(self.costs), "lookbacks": self.lookbacks.tolist()}


@njit(cache=True, error_model="numpy", parallel=True)
def follower_portfolios(scores, eligible, valid, x, top_fraction, hedge, gross, topk):
    """Weights (T, K, N) float32 of the follower portfolio, extremity (T, K), and the `topk` encoding (T, K, 3 topk).

    Leaders are the top_fraction of eligible symbols by score, followers the bottom. Followers are held with the sign
    of the leaders' mean standardised return of bar t. With a hedge the equal-weight market is held against them
    and the whole scaled to `gross`. The encoding: topk largest scores, topk smallest, and the leaders' last returns.
    """
    rows, count, symbols = scores.shape
    weights = np.zeros((rows, count, symbols), dtype=np.float32)
    extremity = np.zeros((rows, count), dtype=np.float32)
    encoded = np.zeros((rows, count, 3 * topk), dtype=np.float32)
    for t in prange(rows):
        for k in range(count):
            if not valid[t, k]:
                continue
            members = np.flatnonzero(eligible[t, k])
            order = members[np.argsort(scores[t, k][members], kind="mergesort")]
            n = len(order)
            m = min(max(1, int(round(top_fraction * n))), n // 2)  # nobody both leads and follows
            lead, spread = 0.0, 0.0
            for q in range(m):
                lead += x[t, order[n - 1 - q]]
                spread += (scores[t, k, order[n - 1 - q]] - scores[t, k, order[q]]) / m
            extremity[t, k] = spread
            for q in range(min(topk, n)):
                encoded[t, k, q] = scores[t, k, order[n - 1 - q]]
                encoded[t, k, topk + q] = scores[t, k, order[q]]
                encoded[t, k, 2 * topk + q] = x[t, order[n - 1 - q]]
            side = np.sign(lead) * gross
            for q in range(m):
                weights[t, k, order[q]] = side / m
            if hedge:
                total = 0.0
                for q in range(n):
                    weights[t, k, order[q]] -= side / n
                    total += abs(weights[t, k, order[q]])
                for q in range(n):
                    weights[t, k, order[q]] *= gross / total if total > 0.0 else 0.0
    return weights, extremity, encoded
