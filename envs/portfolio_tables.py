"""What Portfolio-v0 needs to know about a panel: constraints by symbol, execution, and the features of every bar.

Computed once per panel (`PortfolioData`) and shared by every market instance.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from envs.costs import FILLS, Costs, default_fill, execution, load_costs
from envs.features import ASSET_FEATURES, REGIME_FEATURES, asset_features, regime_features
from envs.panel import Panel, PanelError, Split

LONG_ONLY, LONG_SHORT = "long_only", "long_short"
ORDERS = ("target", "change")
PORTFOLIO = ("gross", "net", "drawdown", "mean_return", "volatility", "turnover", "gross_cap")
WARMUP = 60  # bars of a history before the first decision: the longest window of the features


@dataclass(frozen=True)
class PortfolioConfig:
    """What defines the market: money, and the constraints on the weights (fractions of equity).

    long_only: weights and cash are not negative and sum to the budget, 1 (or, with the leverage head, what it asks for, up to
    `gross`). long_short: the sum of |weights| is at most `gross`, and the sum of weights within +-`net`.
    """

    costs: str = "institutional"
    fill: str = "auto"  # next_open where the panel has opens, else next_close; or same_close
    constraints: str = LONG_ONLY  # or long_short
    orders: str = "target"  # scores are target weights; or changes of the weights held
    scale: float = 0.0  # weight that a score of 1 asks for; 0: an equal share, gross / number of symbols
    cash: bool = True  # long_only: cash has a score of its own; else it holds only what caps leave over
    leverage: bool = False  # one more action: this bar's budget, 1 + action, within 0 and the gross cap
    asset_cap: float = 1.0  # largest |weight| of a symbol
    gross: float = 1.0  # largest sum of |weights|
    overnight_gross: float | None = None  # the same for positions that are held over a change of date
    net: float | None = None  # long_short: largest |sum of weights|
    groups: str | None = None  # CSV file with the columns symbol, group: sectors
    group_cap: float = 1.0  # largest sum of |weights| of a group

    def __post_init__(self):
        def expect(ok, field, what):
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {what}")

        expect(self.fill in ("auto", *FILLS), "fill", f"auto or one of {FILLS}")
        expect(self.constraints in (LONG_ONLY, LONG_SHORT), "constraints", f"{LONG_ONLY} or {LONG_SHORT}")
        expect(self.orders in ORDERS, "orders", f"one of {ORDERS}")
        expect(0 <= self.scale < np.inf, "scale", "0 or a positive number")
        expect(0 < self.asset_cap < np.inf, "asset_cap", "a positive number")
        expect(0 < self.gross < np.inf, "gross", "a positive number")
        expect(
            self.overnight_gross is None or 0 <= self.overnight_gross <= self.gross,
            "overnight_gross", f"a number from 0 to gross={self.gross}",
        )  # fmt: skip
        expect(self.net is None or 0 <= self.net < np.inf, "net", "0 or a positive number")
        expect(self.net is None or self.constraints == LONG_SHORT, "net", f"none unless constraints={LONG_SHORT}")
        expect(0 < self.group_cap < np.inf, "group_cap", "a positive number")


class PortfolioMarket(NamedTuple):
    """Read-only arrays that the kernels index by bar t and symbol i."""

    to_fill: np.ndarray  # (T, N), like the next four as in costs.Execution
    to_mark: np.ndarray
    status: np.ndarray
    impact: np.ndarray
    years: np.ndarray
    fill_at_end: bool
    rates: np.ndarray  # (1,) costs.RATES
    present: np.ndarray  # (T, N) bool: the symbol has a bar now, so that it can be ordered
    group: np.ndarray  # (N,) int64, -1: none
    gross: np.ndarray  # (T,) float64: gross cap of an order decided at bar t
    assets: np.ndarray  # (T, N * F) float32: features of the symbols, one symbol after the other
    context: np.ndarray  # (T, C) float32: regime features and global series
    starts: np.ndarray  # (R,) first row of each range at which a decision can be taken
    stops: np.ndarray  # (R,) end of each range
    weights: np.ndarray  # (R,) float64: relative probabilities of episodes to lie in it, or (0,): by its number of windows


class PortfolioData:
    """A panel with the tables of Portfolio-v0 over it, shared by all environments on that panel.

    Attributes: `panel`, `config`, `costs` (Costs), `fill`, `groups` (names), `features` (names of a symbol's F features), and
    `layout`: the name of each block of the observation -> slice; block `assets` is (N, F), symbol by symbol. A panel's
    extra series are features: those per symbol among the assets', the global ones in a block of their own; 0 where nothing
    is known yet. Raises ValueError naming the field, PanelError for the panel or the file of groups.
    """

    def __init__(self, panel: Panel, config: PortfolioConfig = PortfolioConfig()):
        self.panel, self.config = panel, config
        self.costs: Costs = load_costs(config.costs)
        self.fill = default_fill(panel) if config.fill == "auto" else config.fill
        self.execution = execution(panel, self.fill, self.costs)
        self.groups, self.group = (), np.full(panel.num_symbols, -1)
        if config.groups is not None:
            self.groups, self.group = load_groups(config.groups, panel)
        overnight = config.gross if config.overnight_gross is None else config.overnight_gross
        self.gross = np.where(held_overnight(panel, self.fill), overnight, config.gross)
        own = {name: x for name, x in panel.extras.items() if x.ndim == 2}
        shared = {name: x for name, x in panel.extras.items() if x.ndim == 1}
        self.features = (*ASSET_FEATURES, *own)
        assets = np.concatenate([asset_features(panel), *(np.nan_to_num(x)[..., None] for x in own.values())], axis=2)
        self.assets = assets.astype(np.float32).reshape(panel.num_bars, -1)
        context = np.column_stack([regime_features(panel), *(np.nan_to_num(x) for x in shared.values())])
        self.context = context.astype(np.float32)
        self.layout, at = {}, 0
        for name, size in (
            ("assets", self.assets.shape[1]), ("regime", len(REGIME_FEATURES)), ("series", len(shared)),
            ("weights", panel.num_symbols), ("drift", panel.num_symbols), ("portfolio", len(PORTFOLIO)),
        ):  # fmt: skip
            self.layout[name] = slice(at, at + size)
            at += size
        self.observation_size = at

    @property
    def scale(self) -> float:
        """Weight that a score of 1 asks for."""
        return self.config.scale or self.config.gross / self.panel.num_symbols

    def market(self, split: Split) -> PortfolioMarket:
        starts = []
        for start, stop in split.ranges:
            first = self.panel.segments[self.panel.segment_of_row[start]] + WARMUP
            usable = np.flatnonzero(self.panel.present[max(start, first) : stop - 1].any(axis=1))
            if len(usable) == 0:
                raise ValueError(
                    f"panel {self.panel.name!r}, split {split.name!r}: rows {start}..{stop - 1} hold no bar to decide at; "
                    f"expected more than {WARMUP} bars from the start of a history on"
                )
            starts.append(max(start, first) + usable[0])
        return PortfolioMarket(
            *self.execution, self.costs.rates, self.panel.present, self.group, self.gross, self.assets, self.context,
            np.array(starts), split.ranges[:, 1].copy(), split.odds,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {
            **asdict(self.config), "fill": self.fill, "costs": asdict(self.costs), "scale": self.scale,
            "features": list(self.features), "extras": list(self.panel.extras), "group_names": list(self.groups),
        }  # fmt: skip


def held_overnight(panel: Panel, fill: str) -> np.ndarray:
    """(T,) bool: the position ordered at bar t is held over a change of date before it can be changed again.

    From the times of the bars alone: the calendar of a market is known in advance. The last bars of a history count too.
    """
    day = panel.timestamps.astype("datetime64[D]")
    ahead = 1 if fill == "same_close" else 2
    out = np.ones(panel.num_bars, dtype=bool)
    for start, stop in zip(panel.segments, np.append(panel.segments[1:], panel.num_bars)):
        if stop - start > ahead:
            out[start : stop - ahead] = day[start + ahead : stop] != day[start + ahead - 1 : stop - 1]
    return out


def load_groups(path: str, panel: Panel) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the groups in a CSV file with the columns symbol and group, and (N,) int64 their index for each symbol.

    Raises PanelError if the file cannot be read, lacks a column, names a symbol twice, or leaves one of the panel's out.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise PanelError(f"--groups {path}: not a readable CSV file: {error}") from None
    if not {"symbol", "group"} <= set(frame.columns):
        raise PanelError(f"--groups {path}: has the columns {list(frame.columns)}; expected symbol and group")
    repeated = frame["symbol"].duplicated()
    if repeated.any():
        row = int(repeated.argmax())
        raise PanelError(f"--groups {path}: data row {row + 1}: symbol {frame['symbol'][row]!r} again; expected it once")
    group_of = dict(zip(frame["symbol"], frame["group"]))
    missing = [symbol for symbol in panel.symbols if not group_of.get(symbol)]
    if missing:
        raise PanelError(f"--groups {path}: no group for {missing}; expected one for every symbol of the panel")
    names = tuple(sorted({group_of[symbol] for symbol in panel.symbols}))
    return names, np.array([names.index(group_of[symbol]) for symbol in panel.symbols])
