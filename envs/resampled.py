"""Markets made of another market, real or synthetic, for controls and stress tests; `synthetic.load_market` reads them.

- `shuffled:<market>`: its bars in random order. Nothing can be predicted from earlier bars; the control.
- `bootstrap[:key=value...]:<market>`: new histories of blocks of its bars, those of each split from that split's bars only.
- `crossed[:key=value...]:<market>`: training and validation on one half of its symbols, the test on the other, later.

They nest (`shuffled:crossed:sp500`), and each draws from the seed. `Panel.hidden` is dropped: the truth about a bar told what
the next one would be, which is now another, and closed forms hold for the market as it was. `Panel.parameters` are kept where a
history is made of one history, else dropped.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from envs.costs import parse_options
from envs.panel import SPLIT_NAMES, Panel, PanelError, Split

BASE = 100.0  # close before the first bar of a history
LAST_TIME = np.datetime64("2262-01-01", "ns")  # what datetime64[ns] can hold, in whole years
# A leading part that is an option. A path such as "year=2020/prices.csv" or "./year=2020" is a market.
OPTION = re.compile(r"\w+=[^/\\]*")

Generators = Callable[[int, int], np.random.Generator]  # (split, history) -> its random numbers


@dataclass(frozen=True)
class Shuffled:
    """Each history's bars in random order: a bar keeps its cross-section of returns, traded value and extra series.

    Means, volatilities, correlations and fat tails are those of the source; every relation between bars is gone, so an
    algorithm that beats a static rule here by more than chance is broken. A history's first bar, which has no return,
    stays first; timestamps stay in order. Symbols that were listed for a part of a history are present in that share of
    the bars, at random: choose dates and symbols without gaps for a control that trades like its source.
    """

    def remake(self, panel: Panel, generators: Generators) -> Panel:
        rows, edges = np.arange(panel.num_bars), np.append(panel.segments, panel.num_bars)
        for j, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
            rows[start + 1 : stop] = generators(0, j).permutation(rows[start + 1 : stop])
        previous = previous_close(panel)
        previous[panel.segments] = panel.close[panel.segments]  # a first bar that opens a history again: a return of 0
        return replace(panel, **compound(panel, previous, rows, panel.segments))


@dataclass(frozen=True)
class Chronological:
    """Keys of the markets that cut their source in time first, as `Panel.split` does: a source that brings histories for
    each split is cut by these instead."""

    train_fraction: float = 0.6
    val_fraction: float = 0.2
    embargo: int = 5

    def split(self, panel: Panel) -> dict[str, Split]:
        return panel.split(self.train_fraction, self.val_fraction, self.embargo)


@dataclass(frozen=True)
class Bootstrap(Chronological):
    """New histories by the stationary bootstrap (Politis & Romano 1994, "The stationary bootstrap", JASA 89): blocks of
    consecutive bars that start anywhere and have geometric lengths of mean `block`, wrapping around at the source's end.
    History j of a split depends on the seed, the split and j, not on how many others there are.

    The source is cut in time first: `train`, `val` and `paths` (test) histories are made of training, validation and test
    bars only, so no test bar was ever trained on. Where a split has several source histories, a block stays in its own.
    A history has `bars` bars (0: as many as the longest source history of its split has) on that source's calendar, whose
    bar lengths repeat where it is too short. What holds within a block (lead-lag, momentum, volatility clusters shorter
    than it) stays, its order in time does not. Scores over the paths tell the luck of the order from skill; that all
    paths have one source is an uncertainty that they do not show.

    Raises PanelError, as Panel.split does, or if a source history of a split has fewer than two bars with a return, if a
    symbol has none in any new history, or if `bars` reach beyond 2262 or prices beyond float64.
    """

    block: float = 60.0
    bars: int = 0
    train: int = 20
    val: int = 6
    paths: int = 20

    def __post_init__(self):
        for key in ("block", "train", "val", "paths"):
            if not getattr(self, key) >= 1:  # also true of NaN
                raise ValueError(f"{key}={getattr(self, key)}: expected at least 1")
        if self.bars != 0 and self.bars < 2:
            raise ValueError(f"bars={self.bars}: expected at least 2, or 0: as many as the source has")

    def remake(self, panel: Panel, generators: Generators) -> Panel:
        previous = previous_close(panel)
        usable = (panel.present & ~np.isnan(previous)).any(axis=1)
        rows, times, labels = [], [], []
        for split in self.split(panel).values():
            pools = [start + np.flatnonzero(usable[start:stop]) for start, stop in split.ranges]
            fewest = min(map(len, pools))
            if fewest < 2:
                raise PanelError(
                    f"{panel.name}: too few bars: {fewest} with a return to draw {split.name} bars from, expected at least 2"
                )
            longest = max(pools, key=len)
            times.append(calendar(panel, longest, self.bars or len(longest)))
            histories = {"train": self.train, "val": self.val, "test": self.paths}[split.name]
            for j in range(histories):
                rng = generators(SPLIT_NAMES.index(split.name), j)
                rows.append(stationary_blocks(pools, len(times[-1]), self.block, rng))
            times += times[-1:] * (histories - 1)
            labels += [split.name] * histories
        starts = np.cumsum([0, *map(len, rows[:-1])])
        made = compound(panel, previous, np.concatenate(rows), starts)
        return replace(
            panel, timestamps=np.concatenate(times), segments=starts, segment_split=tuple(labels), segment_weight=None,
            parameters={}, **made,
        )  # fmt: skip


@dataclass(frozen=True)
class Crossed(Chronological):
    """Symbols are cut at random into two halves of N // 2, each in the source's order; training and validation bars show
    the first half, test bars the second in the same columns: what was learnt must hold for other symbols, later.

    Prices are those of the source. A column is named after both symbols that it shows, "AAPL>XOM".

    Raises PanelError, as Panel.split does, or if the source has one symbol only.
    """

    def remake(self, panel: Panel, generators: Generators) -> Panel:
        half = panel.num_symbols // 2
        if half == 0:
            raise PanelError(f"{panel.name}: one symbol, {panel.symbols[0]!r}, expected at least 2: to train and to test on")
        order = generators(0, 0).permutation(panel.num_symbols)
        seen, unseen = np.sort(order[:half]), np.sort(order[half : 2 * half])
        parts = [
            (np.arange(start, stop), unseen if split.name == "test" else seen, split.name)
            for split in self.split(panel).values()
            for start, stop in split.ranges
        ]

        source = panel.segment_of_row[[rows[0] for rows, _, _ in parts]]

        def cut(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[r] if values.ndim == 1 else values[np.ix_(r, c)] for r, c, _ in parts])

        return replace(
            panel,
            timestamps=cut(panel.timestamps),
            symbols=tuple(f"{panel.symbols[a]}>{panel.symbols[b]}" for a, b in zip(seen, unseen)),
            **{name: cut(values) for name, values in panel.fields.items()},
            extras={name: cut(values) for name, values in panel.extras.items()},
            segments=np.cumsum([0, *(len(rows) for rows, _, _ in parts[:-1])]),
            segment_split=tuple(label for _, _, label in parts),
            segment_weight=None if panel.segment_weight is None else panel.segment_weight[source],
            parameters={name: values[source] for name, values in panel.parameters.items()},
        )


RESAMPLED = {"shuffled": Shuffled, "bootstrap": Bootstrap, "crossed": Crossed}


def is_resampled(spec: str) -> bool:
    """Whether a market's specification starts with one of the prefixes of this module."""
    kind, colon, _ = spec.partition(":")
    return bool(colon) and kind in RESAMPLED


def source_of(spec: str) -> str:
    """The market that `<prefix>[:key=value...]:<market>` is made of. Raises PanelError if none is named."""
    return _parse(spec)[1]


def resampled(spec: str, source: Panel, seed: int = 0) -> Panel:
    """The panel of `<prefix>[:key=value...]:<market>`, made of `source`, the panel of that market.

    The same for the same spec, seed and source. Options are leading parts key=value. Raises PanelError, naming the option or
    what of the source is too small, and what was expected.
    """
    config, _ = _parse(spec)
    # make_panel draws from [seed, split, j] and [seed, split, j, 1]; every nested prefix needs numbers of its own besides
    level = 1 + sum(part in RESAMPLED for part in spec.split(":"))
    return config.remake(replace(source, name=spec, hidden={}), lambda split, j: np.random.default_rng([seed, split, j, level]))


def leading_options(spec: str) -> tuple[list[str], str]:
    """The parts key=value that follow the prefix of a specification, and the market after them.

    Raises PanelError if no market is named.
    """
    _, *parts = spec.split(":")
    count = next((i for i, part in enumerate(parts) if not OPTION.fullmatch(part)), len(parts))
    market = ":".join(parts[count:])
    if not market:
        raise PanelError(f"--market {spec}: no market to draw from, expected one at the end, such as {spec.rstrip(':')}:sp500")
    return parts[:count], market


def _parse(spec: str) -> tuple[Shuffled | Bootstrap | Crossed, str]:
    options, market = leading_options(spec)
    try:
        return parse_options(":".join(options), RESAMPLED[spec.partition(":")[0]](), f"--market {spec}"), market
    except ValueError as error:
        raise PanelError(str(error)) from None


def calendar(panel: Panel, rows: np.ndarray, bars: int) -> np.ndarray:
    """(bars,) the times of `rows`, two or more, cut, or continued by the same bar lengths all over again: as many bars per
    year. Raises PanelError if they reach beyond 2262."""
    times = panel.timestamps[rows]
    span = times[-1] - times[0]
    rounds, within = divmod(bars - 1, len(times) - 1)
    if rounds > (LAST_TIME - times[within]) // span:
        raise PanelError(f"{panel.name}: {bars=} from {times[0]!s:.10} end after {LAST_TIME!s:.10}, expected fewer bars")
    rounds, within = np.divmod(np.arange(bars), len(times) - 1)
    return times[within] + rounds * span


def previous_close(panel: Panel) -> np.ndarray:
    """(T, N) each symbol's last close before the bar, in the same history; NaN where it has had none."""
    previous = np.roll(panel.filled("close"), 1, axis=0)
    previous[panel.segments] = np.nan
    return previous


def compound(panel: Panel, previous: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> dict:
    """Bars `rows` (M,) of the panel one after another, as new histories that begin at `starts` (S,) of them.

    Prices move by the source bar's returns on `previous` (T, N), from BASE at the start of each history. A symbol is
    absent where the source bar has no bar of it, or `previous` is NaN. Volume is such that the traded value is that of the
    source bar. Returns the fields and `extras`, by the names that Panel gives them.
    """
    returns = (panel.close / previous)[rows]
    level = np.where(np.isnan(returns), 1.0, returns)
    level[starts] *= BASE
    before = np.full_like(level, BASE)  # the close of the bar before, carried forward over absent bars
    with np.errstate(over="ignore"):  # Panel refuses infinite prices, and says where
        for start, stop in zip(starts, [*starts[1:], len(rows)]):
            np.cumprod(level[start:stop], axis=0, out=level[start:stop])
            before[start + 1 : stop] = level[start : stop - 1]
        made = {name: before * (values / previous)[rows] for name, values in panel.fields.items() if name != "volume"}
    if panel.volume is not None:
        made["volume"] = (panel.volume * panel.close)[rows] / made["close"]
    return made | {"extras": {name: values[rows] for name, values in panel.extras.items()}}


def stationary_blocks(pools: list[np.ndarray], bars: int, block: float, rng: np.random.Generator) -> np.ndarray:
    """(bars,) entries of `pools`: blocks that start at any entry of any pool, go on with probability 1 - 1 / block at
    each bar, and wrap around inside their pool (Politis & Romano 1994)."""
    lengths = np.repeat([len(pool) for pool in pools], [len(pool) for pool in pools])
    firsts = np.repeat(np.cumsum([0, *map(len, pools[:-1])]), [len(pool) for pool in pools])
    at = np.arange(bars)
    begins = rng.random(bars) * block < 1.0
    began = np.maximum.accumulate(np.where(begins, at, 0))  # the first block begins at 0 in any case
    start = rng.integers(len(lengths), size=bars)[began]
    return np.concatenate(pools)[firsts[start] + (start - firsts[start] + at - began) % lengths[start]]
