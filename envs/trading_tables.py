"""What Trading-v0 needs to know about a panel: who can be traded when, execution, and the features of every bar.

Computed once per panel (`TradingData`) and shared by every market instance. Tables that a market reads in a row are laid out
symbol by symbol, so that a window of features is one contiguous copy.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from envs.costs import FILLS, Costs, default_fill, execution, load_costs
from envs.features import ASSET_FEATURES, REGIME_FEATURES, regime_features
from envs.panel import Panel, PanelError, Split
from envs.technical import technical_features

WARMUP = 60  # bars of a symbol's own before its first decision: the longest window of the features but the slow z-scores
DELIST_AFTER = 10  # missing bars, as in costs.execution
POSITION = (
    "weight",  # of equity
    "unrealised_return",  # of the price, from the average entry
    "bars_held",  # n bars: n / (n + 20)
    "adds_used",  # share of max_adds
    "to_stop",  # fall of the price to the stop, as a fraction of it; 0: none
    "to_target",  # rise to the target; 0: none
    "flat",  # 1 without a position
)
PORTFOLIO = (
    "drawdown",  # not positive
    "today",  # return since the last mark of the calendar date before
    "mean_return",  # of recent bars, with the next one as in episodes.follow_return
    "volatility",
    "exposure_left",  # max_position less the weight
    "blocked",  # 1 where the daily loss or the breaker forbids to buy
)


def shard_of(symbols: Sequence[str], shard: str) -> tuple[str, ...]:
    """Of shard "i/n" every n-th symbol from the i-th on: the shards 0/n to (n - 1)/n hold each symbol once, none is empty.

    Raises ValueError naming --shard unless 0 <= i < n, and n is at most the number of symbols.
    """
    given = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    index, number = map(int, given.groups()) if given else (0, 0)
    if not index < number <= len(symbols):
        raise ValueError(f"--shard {shard}: expected i/n with 0 <= i < n <= {len(symbols)}, the number of symbols")
    return tuple(symbols[index::number])


@dataclass(frozen=True)
class TradingConfig:
    """What defines the market: money, the seven orders, exits and risk limits. Sizes are fractions of equity, long only."""

    costs: str = "institutional"
    fill: str = "auto"  # next_open where the panel has opens, else next_close; or same_close
    window: int = 16  # bars of technical features that an agent sees
    sizes: tuple[float, float, float] = (0.25, 0.5, 1.0)  # weights that a small, a medium and a large buy bring the position to
    part: float = 0.5  # share of the position that a partial sale sells
    add: float = 0.25  # by which an addition raises the weight
    max_adds: int = 3  # additions to one position
    stop_loss: float = 0.0  # below the average entry price, as a fraction of it, such as 0.05; 0: none
    take_profit: float = 0.0  # above it; 0: none
    max_holding: int = 0  # bars after which a position is closed; 0: no limit
    max_position: float = 1.0  # weight that a buy or an addition may bring the position to
    max_exposure: float | None = None  # a weight that has drifted above this is cut back to it
    daily_loss: float | None = None  # equity down by this since the last mark of the day before: close, no buying today
    max_drawdown: float | None = None  # equity down by this from its peak: close, no buying for --breaker-bars
    breaker_bars: int = 20  # once flat; then the peak of this breaker starts anew
    target_volatility: float = 0.2  # annual, of the weight that the reward's component `sizing` compares with

    def __post_init__(self):
        def expect(ok, field, what):
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {what}")

        expect(self.fill in ("auto", *FILLS), "fill", f"auto or one of {FILLS}")
        expect(self.window >= 1, "window", "at least 1 bar")
        expect(0 < self.max_position <= 1, "max_position", "a fraction in (0, 1]: nothing is borrowed")
        ascending = len(self.sizes) == 3 and 0 < self.sizes[0] < self.sizes[1] < self.sizes[2] <= 1
        expect(ascending, "sizes", "three ascending fractions in (0, 1]")
        expect(self.sizes[0] <= self.max_position, "sizes", f"the first at most max_position={self.max_position}")
        expect(0 < self.part < 1, "part", "a fraction in (0, 1)")
        expect(0 < self.add <= 1, "add", "a fraction in (0, 1]")
        expect(self.max_adds >= 0, "max_adds", "0 or more")
        expect(0 <= self.stop_loss < 1, "stop_loss", "0, or a fraction below 1")
        expect(0 <= self.take_profit < np.inf, "take_profit", "0 or a positive number")
        expect(self.max_holding >= 0, "max_holding", "0 or more bars")
        exposure = self.max_exposure
        expect(
            exposure is None or self.max_position <= exposure <= 1, "max_exposure", f"{self.max_position} (max_position) to 1"
        )
        for field in ("daily_loss", "max_drawdown"):
            value = getattr(self, field)
            expect(value is None or 0 < value < 1, field, "a fraction in (0, 1)")
        expect(self.breaker_bars >= 1, "breaker_bars", "at least 1 bar")
        expect(0 < self.target_volatility < np.inf, "target_volatility", "a positive number")


class TradingMarket(NamedTuple):
    """Read-only arrays that the kernels index by bar t and symbol j (the panel's number of it).

    A run is one symbol in one range of the split; runs are in order of symbols, those of one symbol in order of ranges.
    """

    to_fill: np.ndarray  # (T, N), like the next four as in costs.Execution
    to_mark: np.ndarray
    status: np.ndarray
    impact: np.ndarray
    years: np.ndarray
    fill_at_end: bool
    rates: np.ndarray  # (1,) costs.RATES
    fill: int  # index into costs.FILLS
    open: np.ndarray  # (T, N) float64, like the next three prices, where the symbol has a bar
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray  # carried forward where it has none
    present: np.ndarray  # (T, N) bool: the symbol has a bar
    day: np.ndarray  # (T,) int64: calendar date, in days
    history: np.ndarray  # (T,) int64: first row of the history
    features: np.ndarray  # (N, T, F) float32: technical features
    regime: np.ndarray  # (T, C) float32
    own: np.ndarray  # (N, T, E) float32: extra series of the symbol
    shared: np.ndarray  # (T, G) float32: global series
    sizing: np.ndarray  # (N, T) float32: weight of the target volatility, at most max_position
    symbol: np.ndarray  # (P,) int64: symbol of each run
    starts: np.ndarray  # (P,) its first row at which a decision can be taken
    stops: np.ndarray  # (P,) its end
    weights: np.ndarray  # (P,) float64: relative probabilities of episodes to lie in it, or (0,): by its number of windows
    range_of: np.ndarray  # (P,) its range of the split
    first: np.ndarray  # (K + 1,): runs first[k] to first[k + 1] are those of the k-th symbol that can be traded
    order: np.ndarray  # (P,): all runs, range by range: market i runs run order[i] in a backtest


class TradingData:
    """A panel with the tables of Trading-v0 over it, shared by all environments on that panel.

    symbols: those to be traded, by default all of the panel; what is seen of the whole market does not depend on it.

    Attributes: `panel`, `config`, `costs` (Costs), `fill`, `columns` (numbers of the symbols to be traded), `features` (names
    of the F technical features), `forecasts` (names of the panel's extra series: those per symbol, then the global ones), and
    `layout`: the name of each block of the observation -> slice. Block `window` is (config.window, F), the oldest bar first,
    with zeros before a history begins; POSITION and PORTFOLIO name `position` and `portfolio`, features.REGIME_FEATURES
    `regime`; a forecast is 0 where nothing is known yet. Raises ValueError naming the field, PanelError for the panel and
    for symbols that it does not have, or that are named twice.

    Where a panel has no opens the close is a bar's only price, so that stops and targets are touched, and filled, at closes.
    """

    def __init__(self, panel: Panel, config: TradingConfig = TradingConfig(), symbols: Sequence[str] | None = None):
        self.panel, self.config = panel, config
        self.costs: Costs = load_costs(config.costs)
        self.fill = default_fill(panel) if config.fill == "auto" else config.fill
        self.execution = execution(panel, self.fill, self.costs, DELIST_AFTER)
        traded = list(panel.symbols if symbols is None else symbols)
        unknown = [name for name in traded if name not in panel.symbols]
        if unknown or not traded or len(set(traded)) < len(traded):
            raise PanelError(
                f"symbols={symbols!r}{f', unknown {unknown}' if unknown else ''}: expected different ones of panel "
                f"{panel.name!r}: {list(panel.symbols)}"
            )
        self.columns = np.array([panel.symbols.index(name) for name in traded])
        self.features, technical = technical_features(panel)
        self.windowed = np.ascontiguousarray(technical.transpose(1, 0, 2))
        annual = np.exp(technical[..., ASSET_FEATURES.index("log_vol")].T)
        self.sizing = np.minimum(config.target_volatility / annual, config.max_position).astype(np.float32)
        own = {name: x for name, x in panel.extras.items() if x.ndim == 2}
        shared = {name: x for name, x in panel.extras.items() if x.ndim == 1}
        self.forecasts = (*own, *shared)
        self.own = np.zeros((panel.num_symbols, panel.num_bars, len(own)), np.float32)
        for e, x in enumerate(own.values()):
            self.own[:, :, e] = np.nan_to_num(x).T
        self.shared = np.zeros((panel.num_bars, len(shared)), np.float32)
        for e, x in enumerate(shared.values()):
            self.shared[:, e] = np.nan_to_num(x)
        self.regime = regime_features(panel)
        self.day = panel.timestamps.astype("datetime64[D]").astype(np.int64)
        close = panel.filled("close")
        self.path = (close,) * 4  # open, high, low, close
        if panel.open is not None:
            prices = [panel.fields[name] for name in ("open", "high", "low", "close") if name in panel.fields]
            self.path = (panel.open, np.maximum.reduce(prices), np.minimum.reduce(prices), close)
        self.layout, at = {}, 0
        for name, size in (
            ("window", config.window * len(self.features)), ("position", len(POSITION)), ("portfolio", len(PORTFOLIO)),
            ("regime", len(REGIME_FEATURES)), ("forecasts", len(self.forecasts)),
        ):  # fmt: skip
            self.layout[name] = slice(at, at + size)
            at += size
        self.observation_size = at

    def runs(self, split: Split) -> np.ndarray:
        """(P, 4) int64: symbol, range of the split, first row of a decision, end; by symbol, then by range.

        A symbol's run in a range begins once it has a bar and has had WARMUP rows since its listing in that history, and ends
        with the range, or once it is delisted for good and closed. A symbol without a step in a range has no run there, and is
        left out of a split in which it has none. Raises ValueError if no symbol has one.
        """
        present, rows = self.panel.present, []
        for j in self.columns:
            for r, (start, stop) in enumerate(split.ranges):
                history = self.panel.segments[self.panel.segment_of_row[start]]
                bars = history + np.flatnonzero(present[history:stop, j])
                usable = bars[(bars >= start) & (bars >= bars[:1] + WARMUP)] if len(bars) else bars
                if len(usable):
                    end = min(stop, usable[-1] + DELIST_AFTER + 3)  # the bar that closes it, and the last mark
                    if usable[0] + 1 < end:
                        rows.append((j, r, usable[0], end))
        if not rows:
            raise ValueError(
                f"panel {self.panel.name!r}, split {split.name!r}: no symbol to trade has a bar to decide at; "
                f"expected more than {WARMUP} bars from the listing of a symbol on"
            )
        return np.array(rows)

    def market(self, split: Split) -> TradingMarket:
        panel, runs = self.panel, self.runs(split)
        symbol = runs[:, 0]
        first = np.flatnonzero(np.append(True, symbol[1:] != symbol[:-1]))
        odds = split.odds[runs[:, 1]] if len(split.odds) else split.odds
        return TradingMarket(
            *self.execution, self.costs.rates, FILLS.index(self.fill),
            *self.path, panel.present, self.day, panel.segments[panel.segment_of_row], self.windowed, self.regime, self.own,
            self.shared, self.sizing,
            symbol.copy(), runs[:, 2].copy(), runs[:, 3].copy(), odds, runs[:, 1].copy(), np.append(first, len(runs)),
            np.argsort(runs[:, 1], kind="stable"),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {
            **asdict(self.config), "fill": self.fill, "costs": asdict(self.costs), "features": list(self.features),
            "forecasts": list(self.forecasts), "traded": [self.panel.symbols[j] for j in self.columns],
        }  # fmt: skip
