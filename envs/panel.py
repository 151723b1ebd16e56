"""Panel: T bars x N symbols of market data; load it, validate it, select, resample and split it."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

FIELDS = ("open", "high", "low", "close", "volume")
TIME_NAMES = ("timestamp", "date", "datetime", "time")
SYMBOL_NAMES = ("symbol", "ticker", "asset", "instrument")
ADJUSTED_CLOSE_NAMES = ("adj close", "adj_close")  # a close, in a file that has no column named close
SPLIT_NAMES = ("train", "val", "test")
MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "None")  # in price and volume columns of CSV files
PRICE_TOLERANCE = 1e-6  # relative; files hold float32, whose rounding may put a close one ulp above its high
YEAR = np.timedelta64(31_557_600 * 10**9, "ns")  # 365.25 days
# ISO 8601 dates only: day-first and month-first dates cannot be told apart, nor epoch seconds from milliseconds.
ISO_TIME = r"(?:\d{4}-\d{2}-\d{2}|\d{8})(?:[T ]\d.*)?"
UTC_OFFSET = r"[T ].*?(Z|[+-]\d{2}(?::?\d{2})?)$"
TIME_RANGE = pd.Timestamp("1678-01-01", tz="UTC"), pd.Timestamp("2262-01-01", tz="UTC")  # what datetime64[ns] can hold
ACCEPTED = (
    "accepted: 'sp500', a .csv or .parquet file, a folder with one CSV file per symbol, "
    "or (where the caller handles it) 'synthetic:<name>[:key=value...]'"
)


class PanelError(ValueError):
    """Market data, or a request for a part of it, that cannot be honoured; says where, what was found and expected."""


@dataclass(frozen=True)
class Split:
    """Rows of a panel for one purpose. A decision may be taken at rows start..stop-2 of each range; features may look
    back before `start`, which is the past, but never past `stop`.

    name: "train", "val" or "test".
    ranges: (n, 2) int64, rows [start, stop), ascending, at least two rows each.
    Raises PanelError if a range is shorter, or ranges overlap or descend.
    """

    name: str
    ranges: np.ndarray

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

    @property
    def num_bars(self) -> int:
        return int(np.diff(self.ranges, axis=1).sum())

    def describe(self, panel: "Panel") -> dict[str, str | int]:
        """ISO times of the earliest and the latest bar, and the number of bars: {"start", "end", "bars"}."""
        start, end = panel.timestamps[self.ranges[:, 0]].min(), panel.timestamps[self.ranges[:, 1] - 1].max()
        return {"start": pd.Timestamp(start).isoformat(), "end": pd.Timestamp(end).isoformat(), "bars": self.num_bars}


@dataclass(frozen=True, eq=False, repr=False)
class Panel:
    """T bars x N symbols. Arrays are C-contiguous, and read-only views of what the caller passed.

    name: where the data come from: "sp500", a file's name, "synthetic:...".
    timestamps: (T,) datetime64[ns], UTC or zone-less, strictly increasing inside each segment.
    symbols: N unique names.
    close: (T, N) float64, in the quote currency; NaN where the symbol has no bar at that time.
    open, high, low, volume: (T, N) float64 or None, NaN exactly where close is; volume in shares or coins.
    segments: (S,) int64, the first row of each independent price history, [0] for one; at least two bars each.
    segment_split: S labels "train", "val" or "test", or None.
    hidden: the truth of a synthetic market, never shown to an agent; axis 0 of length T follows rows and then axis 1
        of length N follows symbols when the panel is cut; other arrays are kept whole.
    timezone: "UTC" if the source named a time zone (times are converted), None if it did not.

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
    segment_split: tuple[str, ...] | None = None
    hidden: dict[str, np.ndarray] = field(default_factory=dict)
    timezone: str | None = None

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

        lengths = np.diff(self.segments, append=num_bars)
        if len(lengths) == 0 or self.segments[0] != 0 or lengths.min() < 2:
            raise PanelError(
                f"{self.name}: too few bars or bad segments: {num_bars} bars, segments start at rows "
                f"{self.segments.tolist()}, expected row 0 first and at least 2 bars in each"
            )
        if self.segment_split is not None and (
            len(self.segment_split) != len(lengths) or not set(self.segment_split) <= set(SPLIT_NAMES)
        ):
            raise PanelError(
                f"{self.name}: segment_split is {self.segment_split}, expected {len(lengths)} of {SPLIT_NAMES}"
            )
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

        _check_bars(self.fields, ~np.isnan(self.close), where)
        if not self.present.any(axis=0).all():
            missing = symbols[int(self.present.any(axis=0).argmin())]
            raise PanelError(f"{self.name}: symbol {missing!r} has no bar, expected at least 1")

    def __repr__(self) -> str:
        span = f"{self.timestamps.min()} to {self.timestamps.max()}"
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
        """Hex digest over symbols, timestamps, every field and segments; not over the name."""
        digest = hashlib.sha256(json.dumps([self.symbols, list(self.fields)]).encode())
        digest.update(self.timestamps.astype("<i8").tobytes())
        digest.update(self.segments.astype("<i8").tobytes())
        for values in self.fields.values():
            digest.update(np.where(self.present, values, np.nan).astype("<f8", copy=False).tobytes())  # one bit pattern
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

    def select(
        self, symbols: Sequence[str] | None = None, start: str | None = None, end: str | None = None
    ) -> "Panel":
        """The given symbols, in the given order, from `start` to `end`, both inclusive ("2020", "2020-03", "2020-03-01",
        "2020-03-01 12:00", in the panel's time). Rows at which no selected symbol has a bar are dropped, and so is a
        symbol without a bar in the range, unless it was asked for by name.

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
            hidden={key: self._cut(array, rows, columns) for key, array in self.hidden.items()},
            timezone=self.timezone,
        )

    def resample(self, rule: str) -> "Panel":
        """Coarser bars by a pandas offset alias such as "4h", "1D" or "1W": first open, highest high, lowest low, last
        close and summed volume over the bars present. A bin is stamped with its last bar's time, when all of it is known.
        Bins without a bar are dropped. `hidden` describes the bars that were merged, and is dropped too.

        Raises PanelError if the rule does not parse, is finer than the data, or leaves a segment fewer than two bars.
        """
        try:
            offset = pd.tseries.frequencies.to_offset(re.sub(r"(?<![A-Za-z])H$", "h", rule))
            rule_years = float(np.diff(pd.date_range("2000-01-01", periods=14, freq=offset)).max() / YEAR)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise PanelError(f"{self.name}: resample rule {rule!r}, expected one like '4h', '1D', '1W': {error}") from error
        data_years = float(np.median(self.bar_years))
        if rule_years < data_years * (1 - 1e-9):
            raise PanelError(
                f"{self.name}: resample rule {rule!r} is finer than the data, whose bars are {data_years * 365.25:g} days"
            )
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
            timezone=self.timezone,
        )

    def split(self, train: float = 0.6, val: float = 0.2, embargo: int = 0) -> dict[str, Split]:
        """Chronological {"train", "val", "test"}; `embargo` rows between neighbours belong to neither, and fractions are
        of the other rows. A panel with labelled segments is split by its labels, each segment its own range; its
        histories are independent, so fractions and embargo do not apply.

        Raises PanelError if a fraction or the embargo is out of range, a split gets fewer than two rows, or the panel
        has several segments without labels.
        """
        if self.segment_split is not None:
            if set(self.segment_split) != set(SPLIT_NAMES):
                raise PanelError(f"{self.name}: segment_split is {self.segment_split}, expected each of {SPLIT_NAMES}")
            labels, ranges = np.array(self.segment_split), self._segment_ranges()
            return {name: Split(name, ranges[labels == name]) for name in SPLIT_NAMES}
        self._require_one_history("split", embargo)
        if not (train > 0 and val > 0 and train + val < 1):
            raise PanelError(f"{self.name}: split(train={train}, val={val}), expected both > 0 and their sum < 1")
        usable = self.num_bars - 2 * embargo
        val_start = round(train * usable) + embargo
        val_stop = round((train + val) * usable) + embargo
        return _splits(train=(0, val_start - embargo), val=(val_start, val_stop), test=(val_stop + embargo, self.num_bars))

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
        self._require_one_history("walk_forward", embargo)
        if folds < 1 or not 0 < val_fraction < 1 or (train_bars is not None and train_bars < 1):
            raise PanelError(
                f"{self.name}: walk_forward({folds=}, {train_bars=}, {val_fraction=}), expected folds >= 1, train_bars >= 1 "
                "or None, and 0 < val_fraction < 1"
            )
        window = (self.num_bars - embargo) // (folds + 1) if train_bars is None else train_bars
        edges = np.linspace(window + embargo, self.num_bars, folds + 1).astype(np.int64)
        result = []
        for test_start, test_stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
            val_stop = test_start - embargo
            train_start = 0 if train_bars is None else val_stop - train_bars
            val_start = val_stop - round(val_fraction * (val_stop - train_start - embargo))
            train, val = (train_start, val_start - embargo), (val_start, val_stop)
            result.append(_splits(train=train, val=val, test=(test_start, test_stop)))
        return result

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

    def _require_one_history(self, method: str, embargo: int) -> None:
        if len(self.segments) > 1:
            raise PanelError(
                f"{self.name}: {method} needs one price history, and this panel has {len(self.segments)} segments; "
                "label them in segment_split and use split(), or select one"
            )
        if embargo < 0:
            raise PanelError(f"{self.name}: {method}(embargo={embargo}), expected >= 0 rows")


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _splits(**ranges: tuple[int, int]) -> dict[str, Split]:
    return {name: Split(name, np.array([bounds])) for name, bounds in ranges.items()}


def _check_bars(fields: dict[str, np.ndarray], present: np.ndarray, where: Callable[[int], str]) -> None:
    """Raise PanelError at the first bad bar; where(i) names the i-th of the T*N cells in C order."""

    def require(ok: np.ndarray, name: str, expected: str) -> None:
        if not ok.all():
            i = int(ok.argmin())
            raise PanelError(f"{where(i)}: {name} is {fields[name].flat[i]:g}, expected {expected.format(i=i)}")

    for name, values in fields.items():
        positive, sign = (values >= 0, ">=") if name == "volume" else (values > 0, ">")
        require(~present | (np.isfinite(values) & positive), name, f"a finite number {sign} 0")
        require(present | np.isnan(values), name, "nan, as close is here")
    for upper, lower in (("high", "low"), ("high", "open"), ("high", "close"), ("open", "low"), ("close", "low")):
        if upper in fields and lower in fields:
            ok = ~(fields[upper] * (1 + PRICE_TOLERANCE) < fields[lower])  # NaN, no bar, is ok
            require(ok, upper, f"no less than {lower}" + (f", {fields[lower].flat[ok.argmin()]:g}" if not ok.all() else ""))


def load_panel(
    spec: str,
    symbols: Sequence[str] | None = None,
    start: str | None = None,
    end: str | None = None,
    resample: str | None = None,
) -> Panel:
    """Load a panel, then Panel.select(symbols, start, end), then Panel.resample(resample).

    spec is one of:
    - "sp500": closes of 20 US shares, daily, 1990-2022, that come with skfolio;
    - a .csv or .parquet file with a time column (timestamp, date, datetime or time, or else a first column of dates) and
      either a symbol column (symbol, ticker, asset or instrument), close and perhaps open, high, low and volume: long;
      or close etc. without a symbol column: one symbol, named like the file;
      or one column of closes per symbol, empty where there is no bar: wide;
    - a folder of one-symbol CSV files, all with the same columns.
    Column names are case-insensitive; "adj close" stands in for a missing close. Times are ISO 8601.

    Raises PanelError, naming the file, the symbol and the data row (counted from 1, without header and blank lines).
    """
    path = Path(spec).expanduser()
    if spec == "sp500":
        panel = _load_sp500()
    elif path.is_dir():
        panel = _load_folder(path)
    elif path.suffix.lower() in (".csv", ".parquet"):
        panel = _load_file(path)
    else:
        raise PanelError(f"market {spec!r} is not known; {ACCEPTED}")
    if symbols is not None or start is not None or end is not None:
        panel = panel.select(symbols, start, end)
    return panel if resample is None else panel.resample(resample)


@dataclass(frozen=True)
class _Table:
    """A CSV or parquet file whose columns are read one at a time; `columns` are those besides time and symbol."""

    path: Path
    time: str
    symbol: str | None
    columns: list[str]
    read: Callable[[str], pd.Series]

    @property
    def bar_columns(self) -> dict[str, str]:
        """Field -> the file's column, in the order of FIELDS. Raises PanelError for an unknown or a missing column."""
        found = {}
        keys = {column: column.strip().lower() for column in self.columns}
        for column, key in keys.items():
            if key in ADJUSTED_CLOSE_NAMES and "close" not in keys.values():
                key = "close"
            if key not in FIELDS or key in found:
                raise PanelError(
                    f"{self.path}: unknown or repeated column {column!r}, expected one time column {TIME_NAMES}, at most one "
                    f"symbol column {SYMBOL_NAMES}, and once each {FIELDS} ('adj close' only where there is no 'close')"
                )
            found[key] = column
        if "close" not in found:
            raise PanelError(f"{self.path}: no close column; found {[self.time, *self.columns]}")
        return {f: found[f] for f in FIELDS if f in found}

    def numbers(self, column: str) -> np.ndarray:
        """(rows,) the column as numbers. Raises PanelError at the first value that is none."""
        raw = self.read(column)
        if pd.api.types.is_bool_dtype(raw):
            raw = raw.astype(str)
        values = pd.to_numeric(raw, errors="coerce")
        bad = (values.isna() & raw.notna()).to_numpy()
        if bad.any():
            row = int(bad.argmax())
            raise PanelError(f"{self.path}: column {column!r}, data row {row + 1}: {raw.iloc[row]!r}, expected a number")
        return values.to_numpy()

    def times(self) -> tuple[np.ndarray, str | None]:
        """(rows,) datetime64[ns] and the time zone. Raises PanelError at the first time that is none or changes zone."""
        codes, unique = pd.factorize(self.read(self.time))

        def fail(bad: np.ndarray, expected: str) -> None:
            if bad.any():
                row = int(bad.argmax())
                found = unique[codes[row]] if codes[row] >= 0 else ""
                raise PanelError(f"{self.path}: column {self.time!r}, data row {row + 1}: {str(found)!r}, expected {expected}")

        fail(codes < 0, "a time")
        if pd.api.types.is_datetime64_any_dtype(unique.dtype):
            parsed, aware = pd.DatetimeIndex(pd.to_datetime(unique, utc=True)), hasattr(unique.dtype, "tz")
        else:
            text = pd.Series(unique).astype(str).str.strip()
            parsed = _parse_iso(text)
            offset = text.str.extract(UTC_OFFSET, expand=False).fillna("").replace("Z", "+00:00")
            offset = (offset.str.replace(":", "") + "00").str[:5].to_numpy(dtype=str)  # "+01:00" and "+01" are the same
            first = offset[codes[0]]
            aware = first != "00"
            zone = f"the UTC offset {first}" if aware else "no UTC offset"
        low, high = TIME_RANGE
        fail((~((parsed >= low) & (parsed < high)))[codes], "an ISO 8601 time, like 2020-03-01 or 2020-03-01T12:00:00Z")
        if not pd.api.types.is_datetime64_any_dtype(unique.dtype):
            fail((offset != first)[codes], f"{zone}, as in data row 1: time zones are mixed")
        return parsed.tz_localize(None).as_unit("ns").to_numpy()[codes], "UTC" if aware else None


def _parse_iso(text: pd.Series) -> pd.DatetimeIndex:
    # The pattern comes first because pandas also reads "now", "-5" and "2020" as ISO 8601.
    return pd.DatetimeIndex(pd.to_datetime(text.where(text.str.fullmatch(ISO_TIME)), format="ISO8601", utc=True, errors="coerce"))


def _open_table(path: Path) -> _Table:
    """Find the roles of a file's columns. Raises PanelError if it is missing, empty, corrupt, or has no time column."""
    if not path.is_file():
        raise PanelError(f"{path}: no such file")
    columns, open_columns = (_parquet if path.suffix.lower() == ".parquet" else _csv)(path)
    for i, column in enumerate(columns):
        if column in columns[:i] or (i > 0 and not column):
            raise PanelError(f"{path}: column {i + 1} is named {column!r}, expected a name that no other column has")
    named = {column.strip().lower(): column for column in reversed(columns)}
    time = next((named[name] for name in TIME_NAMES if name in named), columns[0])
    has_time_name = time.strip().lower() in TIME_NAMES
    if has_time_name and "__index_level_0__" in columns:  # an unnamed index, saved by pandas along with the columns
        columns.remove("__index_level_0__")
    symbol = next((named[name] for name in SYMBOL_NAMES if named.get(name, time) != time), None)
    read = open_columns(time, symbol)
    times = read(time)
    if len(times) == 0:
        raise PanelError(f"{path}: header only, expected data rows")
    if not has_time_name and not pd.api.types.is_datetime64_any_dtype(times):
        if pd.api.types.is_numeric_dtype(times) or _parse_iso(times.iloc[:1].astype(str)).isna()[0]:
            raise PanelError(f"{path}: no time column among {columns}, expected one of {TIME_NAMES}, or dates in the first")
    return _Table(path, time, symbol, [c for c in columns if c not in (time, symbol)], read)


def _csv(path: Path) -> tuple[list[str], Callable]:
    """The header, and a function (time column, symbol column) -> (column -> values)."""

    def read_csv(**options: object) -> pd.DataFrame:
        try:
            return pd.read_csv(path, encoding="utf-8-sig", keep_default_na=False, **options)
        except pd.errors.EmptyDataError as error:
            raise PanelError(f"{path}: the file is empty") from error
        except (pd.errors.ParserError, UnicodeDecodeError) as error:
            raise PanelError(f"{path}: not a CSV file: {error}") from error

    header = read_csv(header=None, nrows=1, dtype=str).iloc[0].tolist()

    def open_columns(time: str, symbol: str | None) -> Callable[[str], pd.Series]:
        text = {column: "category" for column in (time, symbol) if column is not None}  # a ticker may be "NA" or "TRUE"
        missing = {column: MISSING for column in header if column not in text}
        frame = read_csv(
            header=0, names=header, dtype=text, na_values=missing, float_precision="round_trip", low_memory=False
        )
        if not isinstance(frame.index, pd.RangeIndex):
            raise PanelError(f"{path}: data rows have more fields than the header's {len(header)}")
        return frame.__getitem__

    return header, open_columns


def _parquet(path: Path) -> tuple[list[str], Callable]:
    """As _csv. The columns that pandas saved as an index come first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def attempt(call: Callable) -> object:
        try:
            return call()
        except (pa.ArrowException, OSError) as error:
            raise PanelError(f"{path}: not a readable parquet file: {error}") from error

    if path.stat().st_size == 0:
        raise PanelError(f"{path}: the file is empty")
    file = attempt(lambda: pq.ParquetFile(path))
    index = [c for c in (file.schema_arrow.pandas_metadata or {}).get("index_columns", []) if isinstance(c, str)]
    columns = index + [c for c in file.schema_arrow.names if c not in index]

    def read(column: str) -> pd.Series:
        return attempt(lambda: file.read(columns=[column]).column(column).to_pandas())

    return columns, lambda time, symbol: read


def _load_file(path: Path) -> Panel:
    table = _open_table(path)
    keys = {column.strip().lower() for column in table.columns}
    if table.symbol is None and not keys & {"close", *ADJUSTED_CLOSE_NAMES} and keys - set(FIELDS):
        return _load_wide(table)
    times, timezone = table.times()
    symbols, columns = (path.stem,), np.zeros(len(times), dtype=np.int64)
    if table.symbol is not None:
        codes, unique = pd.factorize(table.read(table.symbol))
        names = [str(name) for name in unique]
        nameless = np.append([not name.strip() for name in names], True)[codes]  # a null has code -1, the last
        if nameless.any():
            raise PanelError(f"{path}: column {table.symbol!r}, data row {nameless.argmax() + 1}: no symbol, expected one")
        symbols = tuple(sorted(set(names)))
        columns = np.searchsorted(symbols, names)[codes]
    values = ((field, table.numbers(column)) for field, column in table.bar_columns.items())
    return _lay_out(
        path.name, times, symbols, columns, values, timezone,
        lambda row: f"{path}: symbol {symbols[columns[row]]!r}, data row {row + 1}",
    )  # fmt: skip


def _load_folder(path: Path) -> Panel:
    tables = [_open_table(file) for file in sorted(path.glob("*.csv"))]
    if not tables:
        raise PanelError(f"{path}: no .csv file in this folder, expected one per symbol")
    stamps = [table.times() for table in tables]
    for table, (_, timezone) in zip(tables, stamps):
        found, expected = (list(table.bar_columns), timezone), (list(tables[0].bar_columns), stamps[0][1])
        if table.symbol is not None or found != expected:
            raise PanelError(
                f"{table.path}: symbol column {table.symbol!r}, fields and time zone {found}, expected no symbol column, "
                f"and {expected} as in {tables[0].path.name}"
            )
    lengths = [len(times) for times, _ in stamps]
    columns = np.repeat(np.arange(len(tables)), lengths)
    first = np.cumsum([0, *lengths])
    values = ((f, np.concatenate([t.numbers(t.bar_columns[f]) for t in tables])) for f in tables[0].bar_columns)
    return _lay_out(
        path.name,
        np.concatenate([times for times, _ in stamps]),
        tuple(table.path.stem for table in tables),
        columns,
        values,
        stamps[0][1],
        lambda row: f"{tables[columns[row]].path}: data row {row - first[columns[row]] + 1}",
    )


def _lay_out(
    name: str,
    times: np.ndarray,
    symbols: tuple[str, ...],
    columns: np.ndarray,
    values: Iterator[tuple[str, np.ndarray]],
    timezone: str | None,
    where: Callable[[int], str],
) -> Panel:
    """A panel from records: times, columns (the symbol's index) and each field's values are (rows,), where(row) names one."""
    _check_order(times, columns, where)
    timestamps, rows = np.unique(times, return_inverse=True)
    shape = (len(timestamps), len(symbols))
    cells = rows * shape[1] + columns
    present = np.zeros(shape, dtype=bool)
    present.flat[cells] = True
    fields = {}
    for field_name, numbers in values:
        fields[field_name] = np.full(shape, np.nan)
        fields[field_name].flat[cells] = numbers
    # Here rather than in Panel only, which knows neither the file's rows nor that a NaN close was meant to be a bar.
    _check_bars(fields, present, lambda cell: where(int((cells == cell).argmax())))
    _check_counts(name, symbols, present)
    return Panel(name=name, timestamps=timestamps, symbols=symbols, timezone=timezone, **fields)


def _load_wide(table: _Table) -> Panel:
    path, symbols = table.path, tuple(table.columns)
    times, timezone = table.times()
    _check_order(times, np.zeros(len(times), dtype=np.int64), lambda row: f"{path}: data row {row + 1}")
    close = np.empty((len(times), len(symbols)))
    for i, column in enumerate(table.columns):
        close[:, i] = table.numbers(column)
    present = ~np.isnan(close)

    def where(cell: int) -> str:
        return f"{path}: symbol {symbols[cell % len(symbols)]!r}, data row {cell // len(symbols) + 1}"

    _check_bars({"close": close}, present, where)
    _check_counts(path.name, symbols, present)
    some = present.any(axis=1)
    return Panel(name=path.name, timestamps=times[some], symbols=symbols, close=close[some], timezone=timezone)


def _load_sp500() -> Panel:
    try:
        from skfolio.datasets import load_sp500_dataset
    except ImportError as error:
        raise PanelError("sp500: the data come with skfolio, which is not installed: pip install skfolio") from error
    frame = load_sp500_dataset()
    return Panel(
        name="sp500",
        timestamps=frame.index.as_unit("ns").to_numpy(),
        symbols=tuple(frame.columns),
        close=np.ascontiguousarray(frame.to_numpy(dtype=np.float64)),
    )


def _check_order(times: np.ndarray, columns: np.ndarray, where: Callable[[int], str]) -> None:
    """Raise PanelError at the first record whose time does not follow the same symbol's record before it."""
    order = np.argsort(columns, kind="stable")
    follows = (np.diff(times[order]) > np.timedelta64(0)) | (np.diff(columns[order]) != 0)
    if not follows.all():
        row = int(order[1:][~follows].min())
        earlier = np.flatnonzero((times[:row] == times[row]) & (columns[:row] == columns[row]))
        fault = f"is a duplicate of data row {earlier[0] + 1}" if earlier.size else "is unsorted, earlier than the bar before"
        raise PanelError(f"{where(row)}: time {times[row]} {fault}, expected strictly increasing times")


def _check_counts(name: str, symbols: tuple[str, ...], present: np.ndarray) -> None:
    counts = present.sum(axis=0)
    if counts.min() < 2:
        few = int(counts.argmin())
        raise PanelError(f"{name}: symbol {symbols[few]!r}: too few bars: {counts[few]}, expected at least 2")
