"""The rules of baselines.py: each makes a table of target weights (T, N), from the bars up to each row alone.

Row t is ordered at the close of bar t and filled after it. NaN is no order: the holding drifts, and neither trades nor pays;
only a delisting closes it. The first line of a rule's docstring is its entry in `--help`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from envs import portfolio_references, references
from envs.costs import TRADABLE
from envs.features import REGIME_FEATURES, log_returns, regime_features
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.panel import Panel, Split
from envs.portfolio_tables import PortfolioConfig, PortfolioData

LOOKBACKS = (10, 30, 90)  # of the lead-lag rules; a geometric grid, as LeadLagConfig makes it
TOP_SHARE = 0.2  # share of the symbols that top-k holds
COVERAGE = 0.8  # share of the bars of a window that a symbol must have to be fitted
TOP = 0.3  # share of the symbols that momentum holds, and the oracle of returns


@dataclass(frozen=True)
class RuleConfig:
    window: int = 252
    """bars of history that the optimised rules and kelly-lite are fitted to (fewer at the start of a history)"""
    refit_every: int = 63
    """bars between two fits of them; in between they hold, without a trade"""
    momentum_window: int = 0
    """bars over which momentum measures returns, up to now (0: those of a year)"""
    momentum_skip: int = -1
    """latest bars of them that it leaves out (-1: a twelfth)"""
    kelly_fraction: float = 0.5
    """share of the Kelly weight, mean / variance, that kelly-lite holds"""
    kelly_t: float = 1.0
    """t-statistic of the mean below which kelly-lite closes a position"""
    top_k: int = 0
    """symbols that top-k holds (0: a fifth of them, at least 1)"""
    top_window: int = 20
    """bars over which top-k measures returns, up to now"""
    plan: str | None = None
    """CSV file of the plan rule, with the columns timestamp, symbol and weight"""
    penalty_variance: float = 0.0
    """of the agent that closed-form is compared with, whose relative risk aversion is 1 + 2 * this"""

    def __post_init__(self):
        def expect(ok, name, what):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {what}")

        expect(self.window >= 2, "window", "at least 2 bars")
        expect(self.refit_every >= 1, "refit_every", "at least 1 bar")
        expect(self.momentum_window == 0 or self.momentum_window >= 2, "momentum_window", "0 or at least 2 bars")
        expect(0 < self.kelly_fraction < np.inf, "kelly_fraction", "a positive number")
        expect(0 <= self.kelly_t < np.inf, "kelly_t", "0 or a positive number")
        expect(self.top_k >= 0, "top_k", "0 or a number of symbols")
        expect(self.top_window >= 1, "top_window", "at least 1 bar")
        expect(0 <= self.penalty_variance < np.inf, "penalty_variance", "0 or a positive number")


@dataclass
class Setting:
    """What a rule may look at. Each range of a split begins in cash at the row where Portfolio-v0 lets its agents decide first.

    `starts`: by split, those rows (R,). `first`, `stop`: of all splits; decisions are taken at rows first..stop-2 of a range.
    `portfolio`: costs and fill of the tables; its constraints bind `data` in Portfolio-v0, but no rule.
    """

    panel: Panel
    splits: dict[str, Split]
    portfolio: PortfolioConfig = PortfolioConfig()
    seed: int = 1
    config: RuleConfig = RuleConfig()
    notes: dict = field(default_factory=dict)  # what the rule has to say in run.json

    def __post_init__(self):
        self.data = PortfolioData(self.panel, self.portfolio)
        self.starts = {name: self.data.market(split).starts for name, split in self.splits.items()}
        self.first = np.concatenate(list(self.starts.values()))
        self.stop = np.concatenate([split.ranges[:, 1] for split in self.splits.values()])

    @cached_property
    def leadlag(self) -> LeadLagData:
        """LeadLag-v0 over the lookbacks of the rules."""
        return self._leadlag(min_lookback=LOOKBACKS[0], max_lookback=LOOKBACKS[-1], num_lookbacks=len(LOOKBACKS))

    @cached_property
    def leadlag_market(self) -> LeadLagData:
        """LeadLag-v0 as its agents have it by default, over eight lookbacks."""
        return self._leadlag()

    def _leadlag(self, **grid) -> LeadLagData:
        data = LeadLagData(self.panel, LeadLagConfig(costs=self.portfolio.costs, fill=self.portfolio.fill, **grid))
        for split in self.splits.values():
            data.market(split)  # refuses a split in which no lookback can be used
        return data

    @cached_property
    def returns(self) -> np.ndarray:
        """(T, N) simple returns of prices carried forward, 0 where there is no earlier price."""
        return np.expm1(log_returns(self.panel))

    @cached_property
    def listed(self) -> np.ndarray:
        return np.isfinite(self.panel.filled("close"))

    def every(self, bars: int) -> np.ndarray:
        """Rows of the first decision of each range and every so many bars after it."""
        return np.concatenate([np.arange(a, b - 1, bars) for a, b in zip(self.first, self.stop)])

    def monthly(self) -> np.ndarray:
        """Rows of the first decision of each range, and of the first bar of every month after it."""
        month = self.panel.timestamps.astype("datetime64[M]")
        new = np.append(True, month[1:] != month[:-1])
        return np.concatenate([np.append(a, a + 1 + np.flatnonzero(new[a + 1 : b - 1])) for a, b in zip(self.first, self.stop)])

    def no_orders(self) -> np.ndarray:
        return np.full(self.panel.close.shape, np.nan)

    def trailing(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (bars, N) of the last `window` bars up to t, and (N,) which symbols have enough of them to be fitted."""
        begin = max(self.panel.segments[self.panel.segment_of_row[t]] + 1, t + 1 - self.config.window)
        x, present = self.returns[begin : t + 1], self.panel.present[begin : t + 1]
        enough = present[-1] & (present.mean(axis=0) >= COVERAGE) & (x.std(axis=0) > 0) & self.listed[begin - 1]
        return x, enough


# choice(setting, data) -> (T,) int64, index of the lookback of `data` that a rule orders at each bar
Choice = Callable[[Setting, LeadLagData], np.ndarray]


def shares(chosen: np.ndarray) -> np.ndarray:
    """Equal weights over what is chosen (..., N) bool; nothing where nothing is."""
    return chosen / np.maximum(chosen.sum(axis=-1, keepdims=True), 1)


def buy_and_hold(s: Setting) -> np.ndarray:
    """equal weights at the first bar, never traded again"""
    return at(s, s.first)


def equal_weight(s: Setting) -> np.ndarray:
    """equal weights over the symbols with a bar, every bar"""
    return shares(s.panel.present)


def equal_weight_monthly(s: Setting) -> np.ndarray:
    """equal weights on the first bar of a month, held in between"""
    return at(s, s.monthly())


def at(s: Setting, rows: np.ndarray) -> np.ndarray:
    """Equal weights ordered at these rows only."""
    targets = s.no_orders()
    targets[rows] = shares(s.panel.present[rows])
    return targets


def random(s: Setting) -> np.ndarray:
    """other weights every bar: uniform over the simplex (Dirichlet of ones), of the seed"""
    drawn = np.random.default_rng(s.seed).standard_exponential(s.panel.close.shape) * s.panel.present
    return drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1e-300)


def nearest(data: LeadLagData, bars: int) -> int:
    """Index of the lookback of `data` that is nearest to so many bars, of two the shorter."""
    return int(np.abs(data.lookbacks - bars).argmin())


def fixed_lookback(bars: int) -> Choice:
    def choice(s: Setting, data: LeadLagData) -> np.ndarray:
        return np.full(s.panel.num_bars, nearest(data, bars))

    choice.__doc__ = f"followers of the leaders of the last {bars} bars"
    return choice


def volatility_lookback(s: Setting, data: LeadLagData) -> np.ndarray:
    """lookback 10 while 5-bar volatility is above that of 60 bars, else 90"""
    ratio = regime_features(s.panel)[:, REGIME_FEATURES.index("vol_ratio")]
    return np.where(ratio > 0, nearest(data, LOOKBACKS[0]), nearest(data, LOOKBACKS[-1]))


def correlation_lookback(s: Setting, data: LeadLagData) -> np.ndarray:
    """lookback 10 while 20-bar average correlation is above its mean of the history so far, else 90"""
    level = regime_features(s.panel)[:, REGIME_FEATURES.index("average_correlation")].astype(np.float64)
    mean = np.zeros_like(level)
    for a, b in zip(s.panel.segments, np.append(s.panel.segments[1:], len(level))):
        mean[a:b] = np.cumsum(level[a:b]) / np.arange(1, b - a + 1)
    return np.where(level > mean, nearest(data, LOOKBACKS[0]), nearest(data, LOOKBACKS[-1]))


def random_lookback(s: Setting, data: LeadLagData) -> np.ndarray:
    """another lookback every bar, each as likely, of the seed"""
    return np.random.default_rng(s.seed).integers(len(data.lookbacks), size=s.panel.num_bars)


def oracle_lookback(s: Setting, data: LeadLagData) -> np.ndarray:
    """told the regime: the lookback that is best in it, of LeadLag-v0's eight (synthetic:leadlag)"""
    require_truth(s, "regime", "expected_return")
    ranges = np.concatenate([split.ranges for split in s.splits.values()])
    everything = Split("test", ranges[np.argsort(ranges[:, 0])])
    frame = references.references(data, {"train": s.splits["train"], "test": everything})["oracle regime"]
    decided = zip(data.market(everything).starts, everything.ranges[:, 1])
    choice = np.zeros(s.panel.num_bars, np.int64)
    choice[np.concatenate([np.arange(a, b - 1) for a, b in decided])] = frame["action"]
    return choice


def following(choice: Choice) -> Callable[[Setting], np.ndarray]:
    """The rule that holds the portfolio of the lookback choice[t] at bar t."""

    def rule(s: Setting) -> np.ndarray:
        data = s.leadlag_market if choice is oracle_lookback else s.leadlag
        return followers(data, choice(s, data))

    rule.__doc__ = choice.__doc__
    return rule


def followers(data: LeadLagData, choice: np.ndarray) -> np.ndarray:
    """The portfolio of lookback choice[t] at bar t; where that lacks history, of the nearest that LeadLag-v0 would take."""
    rows = np.arange(data.panel.num_bars)
    return data.targets[rows, references.hold(choice)(None, data.valid, rows)].astype(np.float64)


def momentum(s: Setting, losers: float = 0.0) -> np.ndarray:
    """the 30% with the best return of the last year but its last month, equal weights, monthly (Jegadeesh & Titman 1993)"""
    window = s.config.momentum_window or round(s.panel.bars_per_year)
    skip = round(window / 12) if s.config.momentum_skip < 0 else s.config.momentum_skip
    if not 0 <= skip < window:
        raise ValueError(f"--momentum-window {window}, --momentum-skip {skip}: expected 0 <= skip < window")
    close, start = s.panel.filled("close"), s.panel.segments[s.panel.segment_of_row]
    targets = s.no_orders()
    for t in s.monthly():
        if t - window < start[t]:
            continue
        past = np.where(s.panel.present[t], close[t - skip] / close[t - window] - 1.0, np.nan)
        ranked = np.argsort(past, kind="stable")[: np.isfinite(past).sum()]  # NaN is sorted last
        if len(ranked) < 2:
            continue
        size = min(max(1, round(TOP * len(ranked))), len(ranked) // 2)
        targets[t] = 0.0
        targets[t, ranked[-size:]] = (1.0 - losers) / size
        targets[t, ranked[:size]] = 0.0 - losers / size
    return targets


def momentum_neutral(s: Setting) -> np.ndarray:
    """the same, half in the best 30% and half short in the worst"""
    return momentum(s, losers=0.5)


def top_k(s: Setting) -> np.ndarray:
    """the k symbols with the best return of the last 20 bars, a fifth of all, equal weights, every bar"""
    size, window = s.config.top_k or max(1, round(TOP_SHARE * s.panel.num_symbols)), s.config.top_window
    if size > s.panel.num_symbols:
        raise ValueError(f"--top-k {size}: expected at most the {s.panel.num_symbols} symbols of panel {s.panel.name!r}")
    close, rows = s.panel.filled("close"), np.arange(s.panel.num_bars)
    known = rows - window >= s.panel.segments[s.panel.segment_of_row]
    past = np.full(close.shape, np.nan)
    past[known] = np.where(s.panel.present[known], close[known] / close[rows[known] - window] - 1.0, np.nan)
    rank = np.argsort(np.argsort(-past, axis=1, kind="stable"), axis=1)  # NaN is ranked last
    targets = shares((rank < size) & np.isfinite(past))
    targets[~np.isfinite(past).any(axis=1)] = np.nan
    return targets


def optimiser(name: str):
    """skfolio's estimator, long only and fully invested, its covariance shrunk (Ledoit & Wolf 2004)."""
    from skfolio.moments import LedoitWolf, ShrunkMu
    from skfolio.optimization import HierarchicalRiskParity, MeanRisk, ObjectiveFunction, RiskBudgeting
    from skfolio.prior import EmpiricalPrior

    prior = EmpiricalPrior(mu_estimator=ShrunkMu(), covariance_estimator=LedoitWolf())
    if name == "mean-variance":
        return MeanRisk(objective_function=ObjectiveFunction.MAXIMIZE_RATIO, prior_estimator=prior)
    return {"min-variance": MeanRisk, "risk-parity": RiskBudgeting, "hrp": HierarchicalRiskParity}[name](prior_estimator=prior)


def optimised(name: str, what: str) -> Callable[[Setting], np.ndarray]:
    """Refitted every `refit_every` bars; where the optimiser fails, the holding stays as it is, and run.json counts it."""

    def rule(s: Setting) -> np.ndarray:
        estimator, targets = optimiser(name), s.no_orders()
        s.notes |= {"fits": 0, "failed_fits": 0, "last_failure": None}
        for t in s.every(s.config.refit_every):
            x, enough = s.trailing(t)
            if not enough.any():
                continue
            s.notes["fits"] += 1
            try:
                weights = np.ones(1) if enough.sum() == 1 else fitted(estimator, x[:, enough])
            except Exception as error:  # an optimiser may raise anything, and so may its solver
                s.notes |= {"failed_fits": s.notes["failed_fits"] + 1, "last_failure": f"row {t}: {one_line(error)}"}
                continue
            targets[t] = 0.0
            targets[t, enough] = weights
        return targets

    rule.__doc__ = f"{what} (skfolio)"
    return rule


def fitted(estimator, x: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = np.asarray(estimator.fit(x).weights_, dtype=np.float64)
    if not np.isfinite(weights).all():
        raise ValueError("weights are not finite")
    return weights


def kelly_lite(s: Setting) -> np.ndarray:
    """half the Kelly weight of each symbol, gross at most 1, where the edge is significant and pays the round trip"""
    costs, targets = s.data.costs, s.no_orders()
    one_way = 1e-4 * (costs.commission_bps + costs.half_spread_bps + costs.slippage_bps + costs.linear_impact_bps)
    s.notes |= {"orders": 0, "edge_gated": 0, "spread_gated": 0}
    for t in s.every(s.config.refit_every):
        x, enough = s.trailing(t)
        mean, variance = x.mean(axis=0), np.where(enough, x.var(axis=0, ddof=1), 1.0)
        edge = enough & (np.abs(mean) >= s.config.kelly_t * np.sqrt(variance / len(x)))
        pays = np.abs(mean) * s.config.refit_every > 2.0 * one_way
        weights = np.where(edge, np.clip(s.config.kelly_fraction * mean / variance, -1.0, 1.0), 0.0)
        weights /= max(1.0, np.abs(weights).sum())  # what is held without an order counts too: gross stays near 1
        targets[t] = np.where(edge & ~pays, np.nan, weights)  # not worth a trade: what is held stays
        s.notes["orders"] += int((edge & pays).sum())
        s.notes["edge_gated"] += int((enough & ~edge).sum())
        s.notes["spread_gated"] += int((edge & ~pays).sum())
    return targets


def plan(s: Setting) -> np.ndarray:
    """the weights of --plan, each ordered at the first bar at or after its time; what it does not name is held"""
    if s.config.plan is None:
        raise ValueError("no plan; expected --plan orders.csv")
    times, columns, weights = read_plan(s.config.plan, s.panel)
    targets = s.no_orders()
    for a, b in zip(s.panel.segments, np.append(s.panel.segments[1:], s.panel.num_bars)):
        rows = a + np.searchsorted(s.panel.timestamps[a:b], times)
        inside = rows < b
        targets[rows[inside], columns[inside]] = weights[inside]  # in order of time: of several for one bar the latest counts
        for t in s.first[(a <= s.first) & (s.first < b)]:  # a range that begins amid the plan takes over what it wants by then
            targets[t, columns[rows <= t]] = weights[rows <= t]
    ordered = ~np.isnan(targets[s.every(1)])
    filled = ordered & (s.data.execution.status[s.every(1)] == TRADABLE)
    s.notes |= {"plan_rows": len(times), "orders": int(ordered.sum()), "not_filled": int((ordered & ~filled).sum())}
    return targets


def read_plan(path: str, panel: Panel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, symbols' columns and weights of a plan's rows, by time. Raises ValueError naming the row and what was expected."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"--plan {path}: not a readable CSV file: {one_line(error)}") from None
    if sorted(frame.columns) != ["symbol", "timestamp", "weight"] or frame.empty:
        raise ValueError(
            f"--plan {path}: {len(frame)} rows of {list(frame.columns)}; expected rows of timestamp, symbol, weight"
        )
    times = pd.to_datetime(frame["timestamp"], format="ISO8601", errors="coerce", utc=True)
    zoned = frame["timestamp"].str.contains(r"[T ].*(?:Z|[+-]\d{2}:?\d{2})$")
    weights = pd.to_numeric(frame["weight"], errors="coerce").to_numpy(np.float64)
    stray = zoned if panel.timezone is None else np.zeros(len(frame), bool)
    for bad, column, expected in (
        (times.isna(), "timestamp", "an ISO 8601 time such as 2020-03-01"),
        (stray, "timestamp", f"no UTC offset, as in {panel.name}"),
        (~frame["symbol"].isin(panel.symbols), "symbol", f"one of {list(panel.symbols)}"),
        (~np.isfinite(weights), "weight", "a finite number, the share of equity"),
        (pd.DataFrame({"t": times, "s": frame["symbol"]}).duplicated(), "timestamp", "each symbol once at a time"),
    ):
        if np.any(bad):
            row = int(np.argmax(bad))
            where = f"data row {row + 1}, symbol {frame['symbol'][row]!r}"
            raise ValueError(f"--plan {path}: {where}: {column} is {frame[column][row]!r}; expected {expected}")
    columns = np.array([panel.symbols.index(name) for name in frame["symbol"]])
    stamps = times.dt.tz_localize(None).to_numpy("datetime64[ns]")
    order = np.argsort(stamps, kind="stable")
    return stamps[order], columns[order], weights[order]


def oracle_returns(s: Setting) -> np.ndarray:
    """told the next bar's expected return: its sign, in the most promising 30% of the symbols (synthetic:leadlag)"""
    require_truth(s, "regime", "expected_return")
    ahead = np.zeros(s.panel.close.shape)
    ahead[:-1] = s.panel.hidden["expected_return"][1:]
    size = max(1, round(TOP * s.panel.num_symbols))
    chosen = np.argsort(np.argsort(-np.abs(ahead), axis=1), axis=1) < size
    return np.where(chosen, np.sign(ahead), 0.0) / size


def closed_form(s: Setting) -> np.ndarray:
    """the weights known to be best (synthetic:garleanu-pedersen, synthetic:merton)"""
    require_truth(s, "expected_return", "volatility")
    return portfolio_references.closed_form(s.data, s.first, 1.0 + 2.0 * s.config.penalty_variance)


def require_truth(s: Setting, *names: str):
    if not set(names) <= set(s.panel.hidden):
        raise ValueError(f"panel {s.panel.name!r} hides no {' and '.join(names)}; expected a synthetic market that does")


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# Rules that choose a lookback at every bar; LeadLag-v0 has the same choice.
CHOICES: dict[str, Choice] = {
    **{f"lead-lag-{bars}": fixed_lookback(bars) for bars in LOOKBACKS},
    "lead-lag-volatility": volatility_lookback,
    "lead-lag-correlation": correlation_lookback,
    "lead-lag-random": random_lookback,
    "oracle-regime": oracle_lookback,
}
RULES: dict[str, Callable[[Setting], np.ndarray]] = {
    "buy-and-hold": buy_and_hold,
    "equal-weight": equal_weight,
    "equal-weight-monthly": equal_weight_monthly,
    "random": random,
    "momentum": momentum,
    "momentum-neutral": momentum_neutral,
    "top-k": top_k,
    "mean-variance": optimised("mean-variance", "the largest Sharpe ratio, means shrunk (James & Stein 1961)"),
    "min-variance": optimised("min-variance", "the smallest variance"),
    "risk-parity": optimised("risk-parity", "equal contributions to variance"),
    "hrp": optimised("hrp", "hierarchical risk parity (Lopez de Prado 2016)"),
    "kelly-lite": kelly_lite,
    **{name: following(choice) for name, choice in CHOICES.items()},
    "oracle-returns": oracle_returns,
    "closed-form": closed_form,
    "plan": plan,
}


def applicable(s: Setting) -> list[str]:
    """The rules that make sense on a panel: lead-lag and ranks need some symbols, optimisers symbols that all vary, oracles the
    truth, plan a file."""
    leave = {"plan"} if s.config.plan is None else set()
    truth = set(s.panel.hidden)
    if not {"regime", "expected_return"} <= truth:
        leave |= {"oracle-regime", "oracle-returns"}
    if not {"expected_return", "volatility"} <= truth:
        leave |= {"closed-form"}
    if s.panel.num_symbols < LeadLagConfig().min_symbols:
        leave |= {name for name in RULES if name.startswith(("lead-lag", "momentum", "top-k"))}
    if (np.ptp(np.delete(log_returns(s.panel), s.panel.segments, axis=0), axis=0) < 1e-12).any():
        leave |= {"mean-variance", "min-variance", "risk-parity", "hrp"}
    return [name for name in RULES if name not in leave]
