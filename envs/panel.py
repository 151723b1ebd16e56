"""Panel: T bars x N symbols of market data; validate it, select, resample and split it. `files.py` loads it."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd

FIELDS = ("open", "high", "low", "close", "volume")
SPLIT_NAMES = ("train", "val", "test")
PRICE_TOLERANCE = 1e-6  # relative; files hold float32, whose rounding may put a close one ulp above its high
YEAR = np.timedelta64(31_557_600 * 10**9, "ns")  # 365.25 days
# ISO 8601 dates only: day-first and month-first dates cannot be told apart, nor epoch seconds from milliseconds.
ISO_TIME = r"(?:\d{4}-\d{2}-\d{2}|\d{8})(?:[T ]\d.*)?"
UTC_OFFSET = r"[T ].*?(Z|[+-]\d{2}(?::?\d{2})?)$"


class PanelError(ValueError):
    """Market data, or a request for a part of it, that cannot be honoured; says where, what was found and expected."""


@dataclass(frozen=True)
class Split:
    """Rows of a panel for one purpose. A decision may be taken at rows start..stop-2 of each range; features may look
    back before `start`, which is the past, but never past `stop`.

    name: "train", "val" or "test".
    ranges: (n, 2) int64, rows [start, stop), ascending, at least two rows each.
    weights: (n,) float64, relative probabilities of an episode with a random start to lie in each range; None: each window of
        the episode's length is as likely as any other.
    Raises PanelError if a range is shorter, ranges overlap or descend, or weights are not n positive numbers.
    """

    name: str
    ranges: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        ranges = np.asarray(self.ranges, dtype=np.int64)
        if ranges.ndim != 2 or ranges.shape[1] != 2 or len(ranges) == 0:
            raise PanelError(f"split {self.name!r}: ranges have shape {ranges.shape}, expected (n, 2) with n >= 1")
        for start, stop in ranges:
            if start < 0 or stop - start < 2:
                raise PanelError(
                    f"split {self.name!r}: too few bars: rows [{start}, {stop}) hold {max(stop - start, 0)}, expected "
                    "at least 2; use more bars, fewer folds, other fractions or a smaller embargo"
                )
        if np.any(ranges[1:, 0] < ranges[:-1, 1]):
            raise PanelError(f"split {self.name!r}: ranges overlap or descend: {ranges.tolist()}")
        object.__setattr__(self, "ranges", _read_only(ranges))
        if self.weights is not None:
            weights = np.asarray(self.weights, dtype=np.float64)
            if weights.shape != ranges.shape[:1] or not (np.isfinite(weights) & (weights > 0)).all():
                raise PanelError(f"split {self.name!r}: weights {weights}, expected {len(ranges)} positive numbers")
            object.__setattr__(self, "weights", _read_only(weights))

    @property
    def num_bars(self) -> int:
        return int(np.diff(self.ranges, axis=1).sum())

    @property
    def odds(self) -> np.ndarray:
        """`weights` as compiled code takes them: (n,) float64, or (0,) for None."""
        return np.zeros(0) if self.weights is None else self.weights.copy()

    def describe(self, panel: "Panel") -> dict[str, str | int]:
        """ISO times of the earliest and the latest bar, and the number of bars: {"start", "end", "bars"}."""
        start, end = panel.timestamps[self.ranges[:, 0]].min(), panel.timestamps[self.ranges[:, 1] - 1].max()
        return {"start": pd.Timestamp(start).isoformat(), "end": pd.Timestamp(end).isoformat(), "bars": self.num_bars}


@dataclass(frozen=True, eq=False, repr=False)
class Panel:
    """T bars x N symbols. Arrays are C-contiguous, and read-only views of what the caller passed.

    name: where the data come from: "sp500", a file's name, "synthetic:...", "shuffled:...".
    timestamps: (T,) datetime64[ns], UTC or zone-less, strictly increasing inside each segment.
    symbols: N unique names.
    close: (T, N) float64, in the quote currency; NaN where the symbol has no bar at that time.
    open, high, low, volume: (T, N) float64 or None, NaN exactly where close is; volume in shares or coins.
    segments: (S,) int64, the first row of each independent price history, [0] for one; at least two bars each.
    segment_split: S labels "train", "val" or "test", or None. One of them may be None itself: a history that `split` cuts in
        time, among others that are for one purpose.
    segment_weight: (S,) float64, what `Split.weights` is for the ranges made of each segment, or None.
    hidden: the truth of a synthetic market, never shown to an agent; axis 0 of length T follows rows and then axis 1
        of length N follows symbols when the panel is cut; other arrays are kept whole.
    extras: named input series besides prices, such as forecasts: (T, N) or (T,) float64; row t is known at the close of
        bar t, NaN where nothing is known yet.
    timezone: "UTC" if the source named a time zone (times are converted), None if it did not.
    parameters: what each history of a synthetic market drew for itself, name -> (S,) float64; NaN where it does not apply.

    Raises PanelError, naming the symbol and the 0-based panel row, if any of this does not hold, if a price is not
    positive, a volume negative, or a high or low is inconsistent with the other prices beyond float32 rounding.
    """

    name: str
    timestamps: np.ndarray
    symbols: tuple[str, ...]
    close: np.ndarray
    open: np.ndarray | None = None
    high: np.ndarray | None = None
    low: np.ndarray | None = None
    volume: np.ndarray | None = None
    segments: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    segment_split: tuple[str | None, ...] | None = None
    segment_weight: np.ndarray | None = None
    hidden: dict[str, np.ndarray] = field(default_factory=dict)
    timezone: str | None = None
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        symbols = self.symbols
        if not isinstance(symbols, tuple) or not symbols or not all(isinstance(s, str) and s for s in symbols):
            raise PanelError(f"{self.name}: symbols are {symbols!r}, expected a tuple of one or more non-empty strings")
        if len(set(symbols)) < len(symbols):
            repeated = next(s for s in symbols if symbols.count(s) > 1)
            raise PanelError(f"{self.name}: symbol {repeated!r} appears more than once, expected unique symbols")

        num_bars = len(self.timestamps)
        shapes = {f: ((num_bars, len(symbols)), np.float64) for f in FIELDS if f == "close" or f in self.fields}
        shapes |= {"timestamps": ((num_bars,), "datetime64[ns]"), "segments": ((np.size(self.segments),), np.int64)}
        for key, (shape, dtype) in shapes.items():
            array = np.asarray(getattr(self, key))
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                found = f"{array.dtype} {array.shape}{'' if array.flags.c_contiguous else ' not contiguous'}"
                raise PanelError(f"{self.name}: {key} is {found}, expected C-contiguous {np.dtype(dtype)} {shape}")
            object.__setattr__(self, key, _read_only(array))

        extras = {}
        for name, values in self.extras.items():
            values = np.asarray(values)
            shape = (num_bars, len(symbols))[: max(1, np.ndim(values))]
            infinite = values.dtype == np.float64 and np.isinf(values).any()
            if values.shape != shape or values.dtype != np.float64 or infinite:
                found = f"{values.dtype} {values.shape}{' with infinite values' if infinite else ''}"
                raise PanelError(
                    f"{self.name}: extra series {name!r} is {found}, expected float64 {shape} or ({num_bars},), finite or NaN"
                )
            extras[name] = _read_only(np.ascontiguousarray(values))
        object.__setattr__(self, "extras", extras)

        lengths = np.diff(self.segments, append=num_bars)
        if len(lengths) == 0 or self.segments[0] != 0 or lengths.min() < 2:
            raise PanelError(
                f"{self.name}: too few bars or bad segments: {num_bars} bars, segments start at rows "
                f"{self.segments.tolist()}, expected row 0 first and at least 2 bars in each"
            )
        if self.segment_split is not None and (
            len(self.segment_split) != len(lengths)
            or not set(self.segment_split) <= {*SPLIT_NAMES, None}
            or self.segment_split.count(None) > 1
        ):
            raise PanelError(
                f"{self.name}: segment_split is {self.segment_split}, expected {len(lengths)} of {SPLIT_NAMES}, or one None"
            )
        if self.segment_weight is not None and np.shape(self.segment_weight) != lengths.shape:
            found = np.shape(self.segment_weight)
            raise PanelError(f"{self.name}: segment_weight has shape {found}, expected one number for each segment")
        for name, values in self.parameters.items():
            if np.shape(values) != lengths.shape or values.dtype != np.float64 or np.isinf(values).any():
                found = f"{np.asarray(values).dtype} {np.shape(values)}"
                raise PanelError(f"{self.name}: parameter {name!r} is {found}, expected float64 {lengths.shape}, finite or NaN")
        steps = np.diff(self.timestamps)
        steps[self.segments[1:] - 1] = YEAR  # a new history may restart the clock
        back = np.flatnonzero(~(steps > np.timedelta64(0)))  # also true of NaT
        if back.size:
            row = int(back[0]) + 1
            raise PanelError(
                f"{self.name}: panel row {row}: timestamp {self.timestamps[row]} follows {self.timestamps[row - 1]}, "
                "expected strictly increasing times inside a segment"
            )

        def where(i: int) -> str:
            row, column = divmod(i, self.num_symbols)
            return f"{self.name}: symbol {symbols[column]!r}, panel row {row} ({self.timestamps[row]})"

        check_bars(self.fields, ~np.isnan(self.close), where)
        if not self.present.any(axis=0).all():
            missing = symbols[int(self.present.any(axis=0).argmin())]
            raise PanelError(f"{self.name}: symbol {missing!r} has no bar, expected at least 1")

    def __repr__(self) -> str:
        span = f"{self.timestamps.min()!s:.16} to {self.timestamps.max()!s:.16}"
        return f"Panel({self.name!r}, {self.num_bars} bars x {self.num_symbols} symbols, {span})"

    @property
    def num_bars(self) -> int:
        return len(self.timestamps)

    @property
    def num_symbols(self) -> int:
        return len(self.symbols)

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """The fields this panel has, name -> (T, N), in the order of FIELDS."""
        return {f: getattr(self, f) for f in FIELDS if getattr(self, f) is not None}

    @cached_property
    def segment_of_row(self) -> np.ndarray:
        """(T,) int64, the index of the segment that each row belongs to."""
        lengths = np.diff(self.segments, append=self.num_bars)
        return _read_only(np.repeat(np.arange(len(self.segments), dtype=np.int64), lengths))

    def parameters_at(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> (n,) float64: `parameters` of the histories that rows (n,) belong to."""
        return {name: values[self.segment_of_row[rows]] for name, values in self.parameters.items()}

    @cached_property
    def present(self) -> np.ndarray:
        """(T, N) bool, where a symbol has a bar."""
        return _read_only(np.isfinite(self.close))

    @property
    def bars_per_year(self) -> float:
        """Bars per 365.25 days, pooled over segments: sum of (bars - 1) / sum of calendar spans."""
        last = np.append(self.segments[1:], self.num_bars) - 1
        years = (self.timestamps[last] - self.timestamps[self.segments]) / YEAR
        return float((last - self.segments).sum() / years.sum())

    @property
    def bar_years(self) -> np.ndarray:
        """(T,) float64, years from bar t to t+1; the last bar of a segment gets the segment's median."""
        years = np.diff(self.timestamps, append=self.timestamps[-1:]) / YEAR
        for start, stop in self._segment_ranges():
            years[stop - 1] = np.median(years[start : stop - 1])
        return years

    @cached_property
    def sha256(self) -> str:
        """Hex digest over symbols, timestamps, every field, segments and extra series; not over name, hidden and parameters."""
        digest = hashlib.sha256(json.dumps([self.symbols, list(self.fields)]).encode())
        digest.update(self.timestamps.astype("<i8").tobytes())
        digest.update(self.segments.astype("<i8").tobytes())
        for values in self.fields.values():
            digest.update(np.where(self.present, values, np.nan).astype("<f8", copy=False).tobytes())  # one bit pattern
        for name, values in self.extras.items():
            digest.update(json.dumps([name, values.ndim]).encode())
            digest.update(np.where(np.isnan(values), np.nan, values).astype("<f8", copy=False).tobytes())
        return digest.hexdigest()

    def filled(self, field: str) -> np.ndarray:
        """(T, N) the field carried forward inside each segment, NaN before a symbol's first bar; never backward.

        Raises PanelError if the panel lacks the field.
        """
        if field not in self.fields:
            raise PanelError(f"{self.name}: no field {field!r}, expected one of {list(self.fields)}")
        latest = np.where(self.present, np.arange(self.num_bars)[:, None], -1)
        np.maximum.accumulate(latest, axis=0, out=latest)
        in_segment = latest >= self.segments[self.segment_of_row][:, None]
        values = np.take_along_axis(self.fields[field], np.maximum(latest, 0), axis=0)
        values[~in_segment] = np.nan
        return values

    def select(self, symbols: Sequence[str] | None = None, start: str | None = None, end: str | None = None) -> "Panel":
        """The given symbols, in the given order, from `start` to `end`, both inclusive and in the panel's time ("2020",
        "2020-03", "2020-03-01", "2020-03-01 12:00"). Rows at which no selected symbol has a bar are dropped, and so is
        a symbol without a bar in the range, unless it was asked for by name.

        Raises PanelError if a symbol is unknown or repeated, a date does not parse, nothing is left, or a symbol asked
        for has no bar in the range.
        """
        columns = np.arange(self.num_symbols)
        if symbols is not None:
            unknown = [s for s in symbols if s not in self.symbols]
            if isinstance(symbols, str) or not symbols or unknown or len(set(symbols)) < len(symbols):
                raise PanelError(
                    f"{self.name}: symbols {symbols!r}{f', unknown {unknown}' if unknown else ''}, expected a list of "
                    f"different names among {list(self.symbols)}"
                )
            columns = np.array([self.symbols.index(s) for s in symbols])
        times = pd.DatetimeIndex(self.timestamps)
        keep = np.ones(self.num_bars, dtype=bool)
        if start is not None:
            keep &= np.asarray(times >= self._period("start", start).start_time)
        if end is not None:
            keep &= np.asarray(times < (self._period("end", end) + 1).start_time)
        asked = f"{start or 'the first bar'} to {end or 'the last bar'}"

        present = self.present[:, columns] & keep[:, None]
        rows, has_bar = np.flatnonzero(present.any(axis=1)), present.any(axis=0)
        if rows.size == 0:
            raise PanelError(
                f"{self.name}: no overlap: no bar from {asked}; the panel's range is {times.min()} to {times.max()}"
            )
        if symbols is not None and not has_bar.all():
            missing = [self.symbols[c] for c in columns[~has_bar]]
            raise PanelError(f"{self.name}: no overlap: {missing} have no bar from {asked}")
        columns = columns[has_bar]
        kept, segments = np.unique(self.segment_of_row[rows], return_index=True)
        return Panel(
            name=self.name,
            timestamps=self.timestamps[rows],
            symbols=tuple(self.symbols[c] for c in columns),
            **{f: np.ascontiguousarray(values[np.ix_(rows, columns)]) for f, values in self.fields.items()},
            segments=segments.astype(np.int64),
            segment_split=self.segment_split and tuple(self.segment_split[k] for k in kept),
            segment_weight=None if self.segment_weight is None else self.segment_weight[kept],
            hidden={key: self._cut(array, rows, columns) for key, array in self.hidden.items()},
            timezone=self.timezone,
            extras={name: self._cut(array, rows, columns) for name, array in self.extras.items()},
            parameters={name: values[kept] for name, values in self.parameters.items()},
        )

    def resample(self, rule: str) -> "Panel":
        """Coarser bars by a pandas offset alias such as "4h", "1D" or "1W": first open, highest high, lowest low, last
        close and summed volume over the bars present. A bin is stamped with its last bar's time, when all of it is
        known. Bins without a bar are dropped; so is `hidden`, which describes the bars that were merged.

        Raises PanelError if the rule does not parse, is finer than the data, or leaves a segment fewer than two bars.
        """
        try:
            offset = pd.tseries.frequencies.to_offset(re.sub(r"(?<![A-Za-z])H$", "h", rule))
            rule_years = float(np.diff(pd.date_range("2000-01-01", periods=14, freq=offset)).max() / YEAR)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise PanelError(f"{self.name}: resample rule {rule!r}, expected one like '4h', '1D': {error}") from error
        data_years = float(np.median(self.bar_years))
        if rule_years < data_years * (1 - 1e-9):
            raise PanelError(f"{self.name}: rule {rule!r} is finer than the data, whose bars are {data_years * 365.25:g} days")
        if isinstance(offset, pd.offsets.Day):
            offset = pd.offsets.Hour(24 * offset.n)
        # Bins count from a fixed origin: from the first bar, "7h" bins would move whenever `start` does.
        origin = {"origin": "epoch"} if isinstance(offset, pd.offsets.Tick) else {}
        last, segments = [], []
        for start, stop in self._segment_ranges():
            rows = pd.Series(np.arange(start, stop), index=pd.DatetimeIndex(self.timestamps[start:stop]))
            segments.append(sum(map(len, last)))
            last.append(rows.resample(offset, **origin).max().dropna().to_numpy(dtype=np.int64))
        last = np.concatenate(last)
        first = np.append(0, last[:-1] + 1)

        rows = np.arange(self.num_bars)[:, None]
        close_row = np.maximum.reduceat(np.where(self.present, rows, -1), first, axis=0)
        open_row = np.minimum.reduceat(np.where(self.present, rows, self.num_bars), first, axis=0)
        empty = close_row < 0
        pick = {
            "open": lambda values: np.take_along_axis(values, np.where(empty, 0, open_row), axis=0),
            "high": lambda values: np.fmax.reduceat(values, first, axis=0),
            "low": lambda values: np.fmin.reduceat(values, first, axis=0),
            "close": lambda values: np.take_along_axis(values, np.where(empty, 0, close_row), axis=0),
            "volume": lambda values: np.add.reduceat(np.nan_to_num(values), first, axis=0),
        }
        some = ~empty.all(axis=1)
        segments = np.array(segments, dtype=np.int64)
        return Panel(
            name=self.name,
            timestamps=self.timestamps[last][some],
            symbols=self.symbols,
            **{f: np.where(empty, np.nan, pick[f](values))[some] for f, values in self.fields.items()},
            segments=segments - np.append(0, np.cumsum(~some))[segments],
            segment_split=self.segment_split,
            segment_weight=self.segment_weight,
            timezone=self.timezone,
            extras={name: values[last][some] for name, values in self.extras.items()},
            parameters=self.parameters,
        )

    def split(self, train: float = 0.6, val: float = 0.2, embargo: int = 0) -> dict[str, Split]:
        """Chronological {"train", "val", "test"}; `embargo` rows between neighbours belong to neither, and fractions
        are of the other rows. A panel with labelled segments is split by its labels, each segment its own range; its
        histories are independent, so fractions and embargo do not apply, but to a segment whose label is None.

        Raises PanelError if a fraction or the embargo is out of range, a split gets fewer than two rows, or the panel
        has several segments without labels.
        """
        labels = self.segment_split
        if labels is None:
            self._require_one_history("split")
            labels = (None,)
        if None not in labels and set(labels) != set(SPLIT_NAMES):
            raise PanelError(f"{self.name}: segment_split is {labels}, expected each of {SPLIT_NAMES}")
        parts = {name: [] for name in SPLIT_NAMES}
        for k, (label, (start, stop)) in enumerate(zip(labels, self._segment_ranges().tolist())):
            bounds = self._cut_in_time(start, stop, train, val, embargo) if label is None else {label: (start, stop)}
            for name, rows in bounds.items():
                parts[name].append((*rows, k))
        weight = self.segment_weight
        return {
            name: Split(name, np.array(found)[:, :2], None if weight is None else weight[np.array(found)[:, 2]])
            for name, found in parts.items()
        }

    def walk_forward(
        self, folds: int, train_bars: int | None = None, val_fraction: float = 0.2, embargo: int = 0
    ) -> list[dict[str, Split]]:
        """One {"train", "val", "test"} per fold. Test blocks follow each other to the last row without overlap. The
        window before a block, and `embargo` rows away from it, ends in `val_fraction` validation, again after
        `embargo` rows. It starts at row 0 and grows, the first as long as a test block; or, if `train_bars` is given,
        it rolls: always the `train_bars` rows (training, embargo and validation together) before the block.

        Raises PanelError if an argument is out of range, a split gets fewer than two rows, or the panel has several
        segments.
        """
        self._require_one_history("walk_forward")
        self._require_embargo("walk_forward", embargo)
        if folds < 1 or not 0 < val_fraction < 1 or (train_bars is not None and train_bars < 1):
            raise PanelError(
                f"{self.name}: walk_forward({folds=}, {train_bars=}, {val_fraction=}), expected folds >= 1, "
                "train_bars None or >= 1, and 0 < val_fraction < 1"
            )
        window = (self.num_bars - embargo) // (folds + 1) if train_bars is None else train_bars
        edges = np.linspace(window + embargo, self.num_bars, folds + 1).astype(np.int64)
        result = []
        for test_start, test_stop in pairwise(edges.tolist()):
            val_stop = test_start - embargo
            train_start = 0 if train_bars is None else val_stop - train_bars
            val_start = val_stop - round(val_fraction * (val_stop - train_start - embargo))
            train, val = (train_start, val_start - embargo), (val_start, val_stop)
            result.append(_splits(train=train, val=val, test=(test_start, test_stop)))
        return result

    def _cut_in_time(self, start: int, stop: int, train: float, val: float, embargo: int) -> dict[str, tuple[int, int]]:
        """Rows of each split of the history [start, stop), as `split` says."""
        self._require_embargo("split", embargo)
        if not (train > 0 and val > 0 and train + val < 1):
            raise PanelError(f"{self.name}: split(train={train}, val={val}), expected both > 0 and their sum < 1")
        usable = stop - start - 2 * embargo
        train_stop, val_stop = start + round(train * usable), start + round((train + val) * usable) + embargo
        return {"train": (start, train_stop), "val": (train_stop + embargo, val_stop), "test": (val_stop + embargo, stop)}

    def _segment_ranges(self) -> np.ndarray:
        return np.column_stack([self.segments, np.append(self.segments[1:], self.num_bars)])

    def _cut(self, array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        if array.shape[:1] != (self.num_bars,):
            return array
        return array[rows][:, columns] if array.shape[1:2] == (self.num_symbols,) else array[rows]

    def _period(self, flag: str, text: str) -> pd.Period:
        try:
            if not re.fullmatch(r"\d{4}(-\d{2})?|" + ISO_TIME, text) or re.search(UTC_OFFSET, text):
                raise ValueError("not ISO 8601 without an offset")
            return pd.Period(text)
        except (ValueError, TypeError) as error:
            raise PanelError(f"{self.name}: {flag}={text!r}, expected a date like '2020-03-01': {error}") from error

    def _require_one_history(self, method: str) -> None:
        if len(self.segments) > 1:
            raise PanelError(
                f"{self.name}: {method} needs one price history, and this panel has {len(self.segments)} segments; "
                "label them in segment_split and use split(), or select one"
            )

    def _require_embargo(self, method: str, embargo: int) -> None:
        if embargo < 0:
            raise PanelError(f"{self.name}: {method}(embargo={embargo}), expected >= 0 rows")


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _splits(**ranges: tuple[int, int]) -> dict[str, Split]:
    return {name: Split(name, np.array([bounds])) for name, bounds in ranges.items()}


def check_bars(fields: dict[str, np.ndarray], present: np.ndarray, where: Callable[[int], str]) -> None:
    """Raise PanelError at the first bad bar; where(i) names the i-th of the T*N cells in C order."""

    def require(ok: np.ndarray, name: str, expected: str, other: str | None = None) -> None:
        if not ok.all():
            i = int(ok.argmin())
            bound = "" if other is None else f", {other} is {fields[other].flat[i]}"
            raise PanelError(f"{where(i)}: {name} is {fields[name].flat[i]}, expected {expected}{bound}")

    for name, values in fields.items():
        positive, sign = (values >= 0, ">=") if name == "volume" else (values > 0, ">")
        require(~present | (np.isfinite(values) & positive), name, f"a finite number {sign} 0")
        require(present | np.isnan(values), name, "nan, as close is here")
    for upper, lower in (("high", "low"), ("high", "open"), ("high", "close"), ("open", "low"), ("close", "low")):
        if upper in fields and lower in fields:
            below = fields[upper] * (1 + PRICE_TOLERANCE) < fields[lower]  # False where NaN, no bar
            require(~below, upper, f"no less than {lower}", lower)
