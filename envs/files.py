"""Load a panel from a file, from a folder, or from what skfolio bundles; every error names file, symbol and row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from envs.panel import FIELDS, ISO_TIME, UTC_OFFSET, Panel, PanelError, check_bars
from envs.series import Publications, add_series, read_publications

TIME_NAMES = ("timestamp", "date", "datetime", "time")
PUBLISHED = "published"  # decides in a file of series, where another time says what a value is about
SYMBOL_NAMES = ("symbol", "ticker", "asset", "instrument")
ADJUSTED_CLOSE_NAMES = ("adj close", "adj_close")  # a close, in a file that has no column named close
MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "None")  # in price and volume columns of CSV files
ROW_NUMBERS = ("", "__index_level_0__")  # how pandas saves a nameless index: no data, where a time column is named
TIME_RANGE = pd.Timestamp("1678-01-01", tz="UTC"), pd.Timestamp("2262-01-01", tz="UTC")  # what datetime64[ns] can hold
ACCEPTED = (
    "accepted: 'sp500', a .csv or .parquet file, a folder with one CSV file per symbol, "
    "or (where the caller handles it) 'synthetic:<name>[:key=value...]' and what is made of another market: "
    "'shuffled:<market>', 'bootstrap[:key=value...]:<market>', 'crossed[:key=value...]:<market>', "
    "'mixed[:key=value...]:<market>'"
)


def load_panel(
    spec: str,
    symbols: Sequence[str] | None = None,
    start: str | None = None,
    end: str | None = None,
    resample: str | None = None,
    columns: Sequence[str] | None = None,
    series: str | None = None,
    series_lag: int = 1,
) -> Panel:
    """Load a panel and its extra series, then Panel.select(symbols, start, end), then Panel.resample(resample).

    spec is one of:
    - "sp500": closes of 20 US shares, daily, 1990-2022, that come with skfolio;
    - a .csv or .parquet file with a time column (timestamp, date, datetime or time, or else a first column of dates)
      and, long: a symbol column (symbol, ticker, asset or instrument), close and perhaps open, high, low and volume;
      or, one symbol, named like the file: close and so on without a symbol column;
      or, wide: one column of closes per symbol, empty where there is no bar;
    - a folder of one-symbol .csv files, all with the same fields.
    Column names are case-insensitive; "adj close" stands in for a missing close. Times are ISO 8601.

    Extra series go to Panel.extras, at each bar the value published latest as of `series_lag` bars of the file earlier:
    columns: more columns of numbers in the long or one-symbol file, or in every file of the folder. A value counts as
        published at its row's time, an empty one as not published.
    series: a .csv or .parquet file with a time column (published, or else one of the above), perhaps a symbol column
        (without it the series are about all symbols), and columns of numbers, in any order of rows. If it has both
        `published` and another time, the other is ignored; so are symbols that the market lacks.

    Raises PanelError, naming the file, the symbol and the data row (counted from 1, without header and blank lines).
    """
    path = Path(spec).expanduser()
    if isinstance(columns, str):
        raise PanelError(f"{spec}: columns are {columns!r}, expected a list of names")
    columns, own = [name.strip() for name in columns or ()], None
    if spec == "sp500":
        if columns:
            raise PanelError(f"sp500: columns {columns} are asked for, expected none: it has closes only")
        panel = _load_sp500()
    elif spec and path.is_dir():  # an empty path would be the working directory
        panel, own = _load_folder(path, columns)
    elif path.suffix.lower() in (".csv", ".parquet"):
        panel, own = _load_file(path, columns)
    else:
        raise PanelError(f"market {spec!r} is not known; {ACCEPTED}")
    # Before select: what was published before `start` is known at `start`.
    if own is not None:
        panel = add_series(panel, own, series_lag)
    if series is not None:
        source = Path(series).expanduser()
        if source.suffix.lower() not in (".csv", ".parquet"):
            raise PanelError(f"series {series!r}: expected a .csv or .parquet file")
        panel = add_series(panel, read_publications(_open_table(source, series=True), panel), series_lag)
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

    def fields(self, asked: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
        """Field -> the file's column, in the order of FIELDS; and the same of the extra columns asked for.

        Raises PanelError for an unknown or a missing column.
        """
        found, extra = {}, {_key(name) for name in asked}
        for column in self.columns:
            key = _key(column)
            if key in ADJUSTED_CLOSE_NAMES and key not in extra and "close" not in map(_key, self.columns):
                key = "close"
            if key not in extra.union(FIELDS) or key in found:
                raise PanelError(
                    f"{self.path}: unknown or repeated column {column!r}, expected a time column {TIME_NAMES}, at most "
                    f"one symbol column {SYMBOL_NAMES}, and of {FIELDS} (or {ADJUSTED_CLOSE_NAMES} for close) each once"
                )
            found[key] = column
        if "close" not in found:
            raise PanelError(f"{self.path}: no close column besides {self.time!r}, found {self.columns}")
        for name in asked:
            if _key(name) not in found:
                raise PanelError(f"{self.path}: no column {name!r}, which was asked for, among {self.columns}")
        return {f: found[f] for f in FIELDS if f in found}, {name: found[_key(name)] for name in asked}

    def numbers(self, column: str) -> np.ndarray:
        """(rows,) the column as numbers. Raises PanelError at the first value that is none."""
        raw = self.read(column)
        is_number = pd.api.types.is_numeric_dtype(raw) and not pd.api.types.is_bool_dtype(raw)
        values = pd.to_numeric(raw if is_number else raw.astype(str), errors="coerce")  # dates and bools are no prices
        self._refuse((values.isna() & raw.notna()).to_numpy(), column, raw, "a number")
        return values.to_numpy()

    def finite(self, column: str) -> np.ndarray:
        """(rows,) float64, NaN where the column is empty. Raises PanelError at the first value that is not finite."""
        values = self.numbers(column).astype(np.float64)
        infinite = np.isinf(values)
        if infinite.any():  # the column is read again for the message alone
            self._refuse(infinite, column, self.read(column), "a finite number")
        return values

    def names(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """(rows,) int64 codes into the sorted symbols. Raises PanelError at the first missing one."""
        raw = self.read(self.symbol)
        codes, unique = pd.factorize(raw)
        unique = [str(name).strip() for name in unique]
        symbols = tuple(sorted(set(unique)))
        nameless = np.append([not name for name in unique], True)  # a null has code -1, the last
        self._refuse(nameless[codes], self.symbol, raw, "a symbol")
        return np.searchsorted(symbols, unique)[codes], symbols

    def times(self) -> tuple[np.ndarray, str | None]:
        """(rows,) datetime64[ns] and the time zone. Raises PanelError at the first value that is no time, or that has
        another offset than the first."""
        raw = self.read(self.time)
        codes, unique = pd.factorize(raw)  # each distinct time is parsed once
        self._refuse(codes < 0, self.time, raw, "a time")
        if pd.api.types.is_datetime64_any_dtype(unique.dtype):
            parsed = pd.DatetimeIndex(pd.to_datetime(unique, utc=True))
            offsets = np.full(len(unique), "UTC" if hasattr(unique.dtype, "tz") else "")
        else:
            text = pd.Series(unique).astype(str).str.strip()
            parsed = _parse_iso(text)
            offsets = text.str.extract(UTC_OFFSET, expand=False).fillna("").replace("Z", "+00:00")
            offsets = offsets.str.replace(":", "").str.ljust(5, "0").to_numpy(dtype=str)  # +01 and +01:00 are the same
            offsets[offsets == "00000"] = ""
        low, high = TIME_RANGE
        self._refuse(~((parsed >= low) & (parsed < high))[codes], self.time, raw, "an ISO 8601 time such as 2020-03-01")
        first = offsets[codes[0]]
        expected = f"{f'the UTC offset {first}' if first else 'no UTC offset'} as in data row 1: time zones are mixed"
        self._refuse((offsets != first)[codes], self.time, raw, expected)
        return parsed.tz_localize(None).as_unit("ns").to_numpy()[codes], "UTC" if first else None

    def _refuse(self, bad: np.ndarray, column: str, raw: pd.Series, expected: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            found = str(raw.iloc[row])
            raise PanelError(f"{self.path}: column {column!r}, data row {row + 1}: {found!r}, expected {expected}")


def _key(column: str) -> str:
    return column.strip().lower()


def _parse_iso(text: pd.Series) -> pd.DatetimeIndex:
    text = text.where(text.str.fullmatch(ISO_TIME))  # pandas reads "now", "-5" and "2020" as ISO 8601 too
    return pd.DatetimeIndex(pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce"))


def _open_table(path: Path, series: bool = False) -> _Table:
    """Find the roles of the columns of a file of bars, or of series, which must name its time column.

    Raises PanelError if the file is missing, empty, corrupt, or has no time column.
    """
    if not path.is_file():
        raise PanelError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise PanelError(f"{path}: the file is empty")
    columns, open_columns = (_parquet if path.suffix.lower() == ".parquet" else _csv)(path)
    for i, column in enumerate(columns):
        if column in columns[:i] or (i > 0 and not column):
            raise PanelError(f"{path}: column {i + 1} is named {column!r}, expected a name that no other column has")
    named = {_key(column): column for column in reversed(columns)}
    names = (PUBLISHED, *TIME_NAMES) if series else TIME_NAMES
    times = sorted((c for c in columns if _key(c) in names), key=lambda c: names.index(_key(c)))
    if series and len([c for c in times if _key(c) == PUBLISHED] or times) != 1:
        raise PanelError(f"{path}: time columns are {times} of {columns}, expected {PUBLISHED!r} or one of {TIME_NAMES}")
    time, is_named = (times or columns)[0], bool(times)
    data = [c for c in columns if not (is_named and c in ROW_NUMBERS) and not (series and c in times)]
    symbol = next((named[name] for name in SYMBOL_NAMES if named.get(name, time) != time), None)
    others = [c for c in data if series and _key(c) in SYMBOL_NAMES and c not in (time, symbol)]
    if others:
        raise PanelError(f"{path}: symbol columns are {[symbol, *others]}, expected at most one of {SYMBOL_NAMES}")
    read = open_columns(time, symbol)
    values = read(time)
    if len(values) == 0:
        raise PanelError(f"{path}: header only, expected data rows")
    if not is_named and not pd.api.types.is_datetime64_any_dtype(values) and _parse_iso(values[:1].astype(str)).hasnans:
        raise PanelError(f"{path}: no time column in {columns}, expected one of {TIME_NAMES}, or dates in the first")
    return _Table(path, time, symbol, [c for c in data if c not in (time, symbol)], read)


def _csv(path: Path) -> tuple[list[str], Callable]:
    """The header, and a function (time column, symbol column or None) -> (column -> values)."""

    def read_csv(**options: object) -> pd.DataFrame:
        try:
            return pd.read_csv(path, encoding="utf-8-sig", keep_default_na=False, **options)
        except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
            raise PanelError(f"{path}: not a readable CSV file: {error}") from error

    header = read_csv(header=None, nrows=1, dtype=str).iloc[0].tolist()

    def open_columns(time: str, symbol: str | None) -> Callable[[str], pd.Series]:
        text = {column: "category" for column in (time, symbol) if column is not None}  # a ticker may be "NA" or "TRUE"
        missing = {column: MISSING for column in header if column not in text}
        frame = read_csv(header=0, names=header, dtype=text, na_values=missing, low_memory=False)
        if not isinstance(frame.index, pd.RangeIndex):
            raise PanelError(f"{path}: data rows have more fields than the header, which has {len(header)}")
        return frame.__getitem__

    return header, open_columns


def _parquet(path: Path) -> tuple[list[str], Callable]:
    """As _csv. The columns that pandas saved as an index come first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def attempt(call: Callable, *args: object) -> object:
        try:
            return call(*args)
        except (pa.ArrowException, OSError) as error:
            raise PanelError(f"{path}: not a readable parquet file: {error}") from error

    file = attempt(pq.ParquetFile, path)
    index = [c for c in (file.schema_arrow.pandas_metadata or {}).get("index_columns", []) if isinstance(c, str)]
    columns = index + [c for c in file.schema_arrow.names if c not in index]
    nested = [c.name for c in file.schema_arrow if pa.types.is_nested(c.type)]
    if nested or not columns:
        raise PanelError(f"{path}: nested columns {nested} of {columns}, expected one or more columns and none nested")

    def read(column: str) -> pd.Series:
        return attempt(file.read, [column]).column(column).to_pandas()

    return columns, lambda time, symbol: read


def _load_file(path: Path, asked: Sequence[str] = ()) -> tuple[Panel, Publications | None]:
    """The panel, and what the columns asked for publish."""
    table = _open_table(path)
    keys = set(map(_key, table.columns))
    if table.symbol is None and keys - set(FIELDS) and not keys & {"close", *ADJUSTED_CLOSE_NAMES}:
        if asked:
            raise PanelError(
                f"{path}: columns {list(asked)} are asked for, expected none: without a symbol or a close column the "
                f"file is wide, {table.columns} being symbols"
            )
        return _load_wide(table), None
    columns_of, extras_of = table.fields(asked)
    times, timezone = table.times()
    columns, symbols = (np.zeros(len(times), dtype=np.int64), (path.stem,)) if table.symbol is None else table.names()

    def where(row: int) -> str:
        return f"{path}: symbol {symbols[columns[row]]!r}, data row {row + 1}"

    _check_order(times, columns, where)
    timestamps, cells = np.unique(times, return_inverse=True)
    shape = (len(timestamps), len(symbols))
    cells *= shape[1]
    cells += columns
    present = np.zeros(shape, dtype=bool)
    present.flat[cells] = True
    fields = {f: np.full(shape, np.nan) for f in columns_of}
    for f, values in fields.items():
        values.flat[cells] = table.numbers(columns_of[f])
    # Here, and not in Panel alone: it knows neither the file's rows nor that a NaN close was meant to be a bar.
    check_bars(fields, present, lambda cell: where(int((cells == cell).argmax())))
    _check_counts(path, symbols, present)
    panel = Panel(name=path.name, timestamps=timestamps, symbols=symbols, timezone=timezone, **fields)
    extras = [(name, table.finite(column)) for name, column in extras_of.items()]
    return panel, Publications(str(path), times, columns, extras) if extras else None


def _load_wide(table: _Table) -> Panel:
    path, symbols = table.path, tuple(table.columns)
    times, timezone = table.times()
    _check_order(times, np.zeros(len(times), dtype=np.int64), lambda row: f"{path}: data row {row + 1}")
    close = np.empty((len(times), len(symbols)))
    for i, column in enumerate(symbols):
        close[:, i] = table.numbers(column)
    present = ~np.isnan(close)

    def where(cell: int) -> str:
        return f"{path}: symbol {symbols[cell % len(symbols)]!r}, data row {cell // len(symbols) + 1}"

    check_bars({"close": close}, present, where)
    _check_counts(path, symbols, present)
    some = present.any(axis=1)
    return Panel(name=path.name, timestamps=times[some], symbols=symbols, close=close[some], timezone=timezone)


def _load_folder(path: Path, asked: Sequence[str] = ()) -> tuple[Panel, Publications | None]:
    files = sorted(path.glob("*.csv"))
    if not files:
        raise PanelError(f"{path}: no .csv file in this folder, expected one per symbol")
    parts, extras = zip(*(_load_file(file, asked) for file in files), strict=True)
    for file, part in zip(files, parts, strict=True):
        found = part.symbols, list(part.fields), part.timezone
        expected = (file.stem,), list(parts[0].fields), parts[0].timezone
        if found != expected:
            raise PanelError(f"{file}: symbols, fields and time zone are {found}, expected {expected} as in {files[0]}")
    timestamps = np.unique(np.concatenate([part.timestamps for part in parts]))
    fields = {f: np.full((len(timestamps), len(parts)), np.nan) for f in parts[0].fields}
    for column, part in enumerate(parts):
        rows = np.searchsorted(timestamps, part.timestamps)
        for f, values in part.fields.items():
            fields[f][rows, column] = values[:, 0]
    symbols = tuple(file.stem for file in files)
    panel = Panel(name=path.name, timestamps=timestamps, symbols=symbols, timezone=parts[0].timezone, **fields)
    if not asked:
        return panel, None
    times, owners = [part.published for part in extras], [part.columns + i for i, part in enumerate(extras)]
    series = [(name, np.concatenate([part.series[i][1] for part in extras])) for i, name in enumerate(asked)]
    return panel, Publications(str(path), np.concatenate(times), np.concatenate(owners), series)


def _load_sp500() -> Panel:
    try:
        from skfolio.datasets import load_sp500_dataset
    except ImportError as error:
        raise PanelError("sp500: the data come with skfolio, which is not installed: pip install skfolio") from error
    frame = load_sp500_dataset()
    close = np.ascontiguousarray(frame.to_numpy(dtype=np.float64))
    return Panel("sp500", frame.index.as_unit("ns").to_numpy(), tuple(frame.columns), close)


def _check_order(times: np.ndarray, columns: np.ndarray, where: Callable[[int], str]) -> None:
    """Raise PanelError at the first record whose time does not follow the same symbol's record before it."""
    order = np.argsort(columns, kind="stable")
    follows = (np.diff(times[order]) > np.timedelta64(0)) | (np.diff(columns[order]) != 0)
    if not follows.all():
        row = int(order[1:][~follows].min())
        same = np.flatnonzero((times[:row] == times[row]) & (columns[:row] == columns[row]))
        fault = f"is a duplicate of data row {same[0] + 1}" if same.size else "is unsorted, before the previous bar's"
        raise PanelError(f"{where(row)}: time {times[row]} {fault}, expected strictly increasing times")


def _check_counts(path: Path, symbols: tuple[str, ...], present: np.ndarray) -> None:
    counts = present.sum(axis=0)
    if counts.min() < 2:
        few = int(counts.argmin())
        raise PanelError(f"{path}: symbol {symbols[few]!r}: too few bars: {counts[few]}, expected at least 2")
