"""Stress histories: new price paths in the manner of the training bars that carry a label, such as "volatile-down".

A label is a regime of the market (`regime_labels`) or a bin of a macro series (`macro_labels`). `stress_panel` makes a Panel of
new histories of the training bars with the wanted labels alone, from which features come by the ordinary code. Two models:

- bootstrap: stationary blocks (Politis & Romano 1994, JASA 89) inside the runs of consecutive bars that have a wanted label.
- learned: paths of a small model of returns given the label and the bars before (`return_model.ReturnModel`).

What is learnt or drawn is a function of the split's rows and the seed only; no global random state is read or moved.
"""

from dataclasses import dataclass, replace

import numpy as np

from envs.features import REGIMES
from envs.panel import Panel, PanelError, Split
from envs.resampled import calendar, compound, previous_close, stationary_blocks
from envs.return_model import FEWEST, LEAST_VOL, WINDOW, fit, market_return, trailing

BINS = 3  # of a macro series
MODELS = ("bootstrap", "learned")


def regime_labels(panel: Panel, split: Split) -> np.ndarray:
    """(T,) int64 indices into REGIMES, from the equally weighted market's log returns over the last WINDOW bars of the history.

    Volatile: their root mean square is above its median over the rows of `split`, the training split; down: their sum is
    negative. But for that one number, the label of bar t depends on bars t and earlier. The market's return is the mean over
    the symbols that have one, on the last close before.
    """
    total, vol = trailing(_windows(panel, market_return(_logs(panel)["close"])))
    threshold = np.median(vol[_rows(panel, split)])
    return 2 * (vol > threshold) + (total < 0).astype(np.int64)


def macro_labels(panel: Panel, column: str, split: Split, bins: int = BINS) -> np.ndarray:
    """(T,) int64: how many of the bins - 1 inner quantiles of the global extra series `column`, taken over the rows of `split`,
    the training split, its value exceeds; -1 where it is unknown (NaN).

    Raises PanelError if there is no such series, or it has no value in those rows; ValueError if bins < 2.
    """
    if bins < 2:
        raise ValueError(f"bins={bins}: expected at least 2")
    known = [name for name, x in panel.extras.items() if x.ndim == 1]
    if column not in known:
        raise PanelError(f"{panel.name}: macro series {column!r}, expected one of the global extra series {known}")
    values = panel.extras[column]
    seen = values[_rows(panel, split)]
    seen = seen[~np.isnan(seen)]
    if len(seen) == 0:
        raise PanelError(f"{panel.name}: macro series {column!r} has no value in split {split.name!r}, expected at least 1")
    edges = np.quantile(seen, np.arange(1, bins) / bins)
    return np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="left"))


@dataclass(frozen=True)
class Scenario:
    """What stress histories are made like. Raises ValueError naming the field.

    model: one of MODELS.
    labels: the labels to draw from, indices into REGIMES, or, with `macro`, bins 0 .. BINS - 1 of that series.
    macro: a global extra series of the panel, or None for the regimes.
    block: mean length of a block of bars.
    severity: what the log returns are multiplied by, 1 as drawn.
    """

    model: str = "bootstrap"
    labels: tuple[int, ...] = (3,)
    macro: str | None = None
    block: float = 10.0
    severity: float = 1.0

    def __post_init__(self):
        def expect(ok, field, what):
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {what}")

        expect(self.model in MODELS, "model", f"one of {MODELS}")
        expect(self.macro is None or isinstance(self.macro, str), "macro", "the name of an extra series, or None")
        choices, given = set(range(len(self.names))), self.labels
        ok = isinstance(given, tuple) and given and set(given) <= choices and len(set(given)) == len(given)
        expect(ok, "labels", f"a tuple of different numbers of 0 .. {len(choices) - 1}: {', '.join(self.names)}")
        expect(self.block >= 1, "block", "at least 1")
        expect(0 < self.severity < np.inf, "severity", "a positive number")

    @property
    def names(self) -> tuple[str, ...]:
        """What each label is called in messages."""
        return REGIMES if self.macro is None else tuple(f"{self.macro} bin {k}" for k in range(BINS))


def stress_panel(panel: Panel, split: Split, scenario: Scenario, histories: int, bars: int, seed: int) -> Panel:
    """`histories` new histories of `bars` bars each, made of the rows of `split`, the training split; all labelled "train".

    Symbols, fields and names of extras are those of `panel`; times are those of the split's longest history, as
    `resampled.calendar` goes on with them; prices start from `resampled.BASE`. `hidden["label"]` (T,) is the label of the
    training bar that a bar is made of; with the learned model `hidden["held_out"]` () is its `ReturnModel.held_out`.
    History j depends on the seed and j, not on how many there are (learned: up to rounding).

    bootstrap: bars are training bars; a symbol is absent where it has no return on an earlier close of the split; traded value
    and extras are those of the training bar. A run shorter than a block is repeated until the block ends.
    learned: the label, drawn from `scenario.labels`, stays through a history, whose first bar follows the WINDOW bars before a
    training bar with that label. Every symbol has every bar. Shape (gap, range, traded value) and extras of a bar are those of
    a training bar of the same label, drawn in blocks as above; where a symbol is absent there, of another bar of its own.

    Raises PanelError if a symbol has no return in the split or in the new histories, if a wanted label (bootstrap: all wanted
    ones together) has fewer than FEWEST bars with a return (learned: and WINDOW bars before), if the model cannot be fitted,
    and as `macro_labels`, `resampled.calendar` and Panel do; ValueError if `histories`, `bars` or `seed` is too small.
    """
    for key, value, least in (("histories", histories, 1), ("bars", bars, 2), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{key}={value}: expected at least {least}")
    learned = scenario.model == "learned"
    source = _training(panel, split)
    every = Split(split.name, np.array([[0, source.num_bars]]))
    labels = regime_labels(source, every) if scenario.macro is None else macro_labels(source, scenario.macro, every)
    logs = _logs(source)
    present = ~np.isnan(logs["close"])
    if not present.any(axis=0).all():
        symbol = source.symbols[int(present.any(axis=0).argmin())]
        raise PanelError(f"{source.name}: symbol {symbol!r} has no return, expected at least 1: two bars of one history")
    before = np.roll(_windows(source, market_return(logs["close"])), 1, axis=0)  # that end with the bar before
    before[source.segments] = np.nan
    usable = present.any(axis=1) & ~(learned & np.isnan(before).any(axis=1))
    pools = [
        _runs(source, usable, labels, wanted, scenario.names)
        for wanted in ([(k,) for k in scenario.labels] if learned else [scenario.labels])
    ]
    rngs = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(j,))) for j in range(histories)]
    rows = np.stack([stationary_blocks(pools[rng.integers(len(pools))], bars, scenario.block, rng) for rng in rngs])
    picked = np.repeat(rows[..., None], source.num_symbols, axis=2)  # (histories, bars, N) the training row of each cell
    hidden = {"label": labels[rows].ravel()}
    if learned:
        fitted, first = usable & (labels >= 0), rows[:, 0]
        model = fit(logs["close"][fitted], before[fitted], labels[fitted], len(scenario.names), seed)
        close = model.sample(before[first], labels[first], bars, rngs)
        hidden["held_out"] = np.array(model.held_out)
        for cells, label, rng in zip(picked, labels[first], rngs):
            _fill(cells, present, labels == label, rng)
    picked = picked.reshape(-1, source.num_symbols)

    def pick(values: np.ndarray) -> np.ndarray:
        return values[rows.ravel()] if values.ndim == 1 else np.take_along_axis(values, picked, axis=0)

    drawn = {name: pick(values) for name, values in logs.items()}
    if learned:
        drawn = _shaped(drawn, close.reshape(picked.shape), logs)
    drawn = {name: scenario.severity * values for name, values in drawn.items()}
    for name, extreme in (("high", np.maximum), ("low", np.minimum)):
        if name in drawn:  # the severity also multiplies the rounding of a file's float32 prices, beyond what Panel tolerates
            drawn[name] = extreme.reduce([drawn[k] for k in ("open", "close", name) if k in drawn])
    with np.errstate(over="ignore"):  # Panel refuses infinite prices, and says where
        fields = {name: np.exp(values) for name, values in drawn.items()}
    if source.volume is not None:
        fields["volume"] = pick(source.volume * source.close) / fields["close"]
    longest = int(np.argmax(np.diff(source.segments, append=source.num_bars)))
    moves = Panel(  # prices over the close before
        name=f"stress of {panel.name}",
        timestamps=np.tile(calendar(source, np.flatnonzero(source.segment_of_row == longest), bars), histories),
        symbols=source.symbols,
        **fields,
        segments=np.arange(histories) * bars,
        segment_split=("train",) * histories,
        hidden=hidden,
        timezone=source.timezone,
        extras={name: pick(values) for name, values in source.extras.items()},
    )
    return replace(moves, **compound(moves, np.ones_like(moves.close), np.arange(moves.num_bars), moves.segments))


def _rows(panel: Panel, split: Split) -> np.ndarray:
    """The rows of the split, ascending."""
    if split.ranges[-1, 1] > panel.num_bars:
        found = f"split {split.name!r} ends at row {split.ranges[-1, 1]}"
        raise PanelError(f"{panel.name}: {found}, expected at most {panel.num_bars}")
    return np.concatenate([np.arange(start, stop) for start, stop in split.ranges])


def _training(panel: Panel, split: Split) -> Panel:
    """The split's rows alone, a history for each stretch of consecutive ones."""
    rows = _rows(panel, split)
    return replace(
        panel,
        name=f"{panel.name}, split {split.name!r}",
        timestamps=panel.timestamps[rows],
        **{name: values[rows] for name, values in panel.fields.items()},
        segments=np.flatnonzero(np.append(True, ~_consecutive(panel, rows))),
        segment_split=None,
        segment_weight=None,
        hidden={},
        parameters={},
        extras={name: values[rows] for name, values in panel.extras.items()},
    )


def _consecutive(panel: Panel, rows: np.ndarray) -> np.ndarray:
    """(len(rows) - 1,) bool: the next row is the next bar of the same history."""
    return (np.diff(rows) == 1) & (np.diff(panel.segment_of_row[rows]) == 0)


def _runs(source: Panel, usable: np.ndarray, labels: np.ndarray, wanted: tuple[int, ...], names: tuple) -> list[np.ndarray]:
    """Runs of consecutive usable rows with a wanted label. Raises PanelError if these are fewer than FEWEST rows."""
    rows = np.flatnonzero(usable & np.isin(labels, wanted))
    if len(rows) < FEWEST:
        found = {name: int((usable & (labels == k)).sum()) for k, name in enumerate(names)}
        asked = " or ".join(names[k] for k in wanted)
        raise PanelError(
            f"{source.name}: too few bars: {len(rows)} are {asked}, expected at least {FEWEST}; usable bars by label: {found}"
        )
    return np.split(rows, np.flatnonzero(~_consecutive(source, rows)) + 1)


def _logs(panel: Panel) -> dict[str, np.ndarray]:
    """Name of each price field -> (T, N) its log over the symbol's last close before the bar; NaN where there is none."""
    previous = previous_close(panel)
    return {name: np.log(values / previous) for name, values in panel.fields.items() if name != "volume"}


def _windows(panel: Panel, market: np.ndarray) -> np.ndarray:
    """(T, WINDOW) `market` at the last WINDOW bars, the row's own last; NaN before the start of the history."""
    rows = np.arange(panel.num_bars)[:, None] - np.arange(WINDOW)[::-1]
    inside = rows >= panel.segments[panel.segment_of_row][:, None]
    return np.where(inside, market[np.maximum(rows, 0)], np.nan)


def _fill(cells: np.ndarray, present: np.ndarray, labelled: np.ndarray, rng: np.random.Generator) -> None:
    """Where a symbol is not `present` (T, N) at its row in `cells` (bars, N), put there one of its rows at random, in place:
    a labelled one, or, if it has none, any."""
    for column, has in zip(cells.T, present.T):
        own = np.flatnonzero(has & labelled) if (has & labelled).any() else np.flatnonzero(has)
        absent = ~has[column]
        column[absent] = rng.choice(own, absent.sum())


def _shaped(drawn: dict[str, np.ndarray], close: np.ndarray, logs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bars that end at `close` (M, N) in the shape of `drawn` bars of `logs`, all logs over the close before.

    The gap is the drawn one, moved by each symbol's regression (through 0) of its gaps on its returns: the same share of the
    return would be anything where the drawn return is near 0. High and low are as far beyond open and close as they were.
    """
    made = {"close": close}
    if "open" in drawn:
        square = np.maximum(np.nansum(logs["close"] ** 2, axis=0), LEAST_VOL**2)
        made["open"] = drawn["open"] + np.nansum(logs["open"] * logs["close"], axis=0) / square * (close - drawn["close"])
    body = tuple(made)
    for name, extreme in (("high", np.maximum), ("low", np.minimum)):
        if name in drawn:
            reach = drawn[name] - extreme.reduce([drawn[k] for k in body])
            made[name] = extreme.reduce([made[k] for k in body]) + reach
    return made
