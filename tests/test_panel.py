"""Panels load exactly or fail with a message that names file, symbol and row; no bar is ever moved back in time."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import DATA, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.files import load_panel
from envs.panel import FIELDS, Panel, PanelError, Split

OHLCV = "date,symbol,open,high,low,close,volume\n"
GOOD = OHLCV + "2020-01-01,A,1,3,1,2,10\n2020-01-01,B,5,5,5,5,0\n2020-01-02,A,2,4,2,4,20\n2020-01-02,B,5,6,5,6,7\n"


def make_panel(close, times=None, **options):
    close = np.array(close, dtype=np.float64, ndmin=2)
    if times is None:
        times = np.datetime64("2020-01-01", "ns") + np.arange(len(close)) * np.timedelta64(1, "D")
    symbols = options.pop("symbols", tuple("ABCDEFGH"[: close.shape[1]]))
    return Panel("test", np.asarray(times, dtype="datetime64[ns]"), symbols, close, **options)


def line(num_bars, **options):
    return make_panel(np.arange(1.0, num_bars + 1)[:, None], **options)


def ohlcv_panel(times, close, **options):
    """Prices of which high and low are 1 above and below, and open 0.5 below the close; volume counts 1, 2, 3..."""
    close = np.array(close, dtype=np.float64, ndmin=2)
    volume = np.where(np.isnan(close), np.nan, np.arange(1.0, close.size + 1).reshape(close.shape))
    return make_panel(close, times, open=close - 0.5, high=close + 1, low=close - 1, volume=volume, **options)


def fails(*parts):
    """A PanelError that contains all the parts, in this order."""
    return pytest.raises(PanelError, match="(?s)" + ".*".join(map(re.escape, parts)))


def three_histories(**options):
    times = np.concatenate([np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(1, "D") for n in (4, 3, 5)])
    close = np.arange(1.0, 25.0).reshape(12, 2)
    close[[0, 4, 5], 1] = np.nan  # B starts late in the first two histories
    close[2, 0] = np.nan
    return make_panel(close, times, segments=np.array([0, 4, 7]), **options)


# --- files: every error names where it is


CSV_ERRORS = {
    "empty file": ("", ["m.csv", "empty"]),
    "blank lines": ("\n\n", ["m.csv", "not a readable CSV"]),
    "header only": (OHLCV, ["m.csv", "header only"]),
    "no time column": ("symbol,close\nA,1\nA,2\n", ["m.csv", "no time column", "timestamp"]),
    "numbers first": ("x,A\n1,1\n2,2\n", ["m.csv", "no time column"]),
    "no close, long": ("date,symbol,open\n2020-01-01,A,1\n2020-01-02,A,1\n", ["m.csv", "no close column"]),
    "no close, one symbol": ("date,open,high\n2020-01-01,1,1\n2020-01-02,1,1\n", ["m.csv", "no close column"]),
    "time only": ("date\n2020-01-01\n2020-01-02\n", ["m.csv", "no close column"]),
    "unknown column": (GOOD.replace("volume", "vwap"), ["m.csv", "'vwap'", "timestamp", "symbol", "volume"]),
    "close and adj close": (GOOD.replace("volume", "Adj Close"), ["m.csv", "'Adj Close'", "each once"]),
    "close twice": (GOOD.replace("volume", "CLOSE"), ["m.csv", "repeated column 'CLOSE'"]),
    "same name twice": ("date,A,A\n2020-01-01,1,1\n", ["m.csv", "column 3", "'A'", "no other column"]),
    "nameless column": ("date,A,\n2020-01-01,1,1\n", ["m.csv", "column 3", "''"]),
    "long rows": ("date,A\n2020-01-01,1,1\n2020-01-02,1,1\n", ["m.csv", "more fields", "2"]),
    "ragged rows": ("date,A\n2020-01-01,1\n2020-01-02,1,1\n", ["m.csv", "not a readable CSV", "line 3"]),
    "text in wide": ("date,A\n2020-01-01,1\n2020-01-02,x\n", ["m.csv", "'A'", "data row 2", "'x'", "a number"]),
    "bool in wide": ("date,A\n2020-01-01,True\n2020-01-02,False\n", ["m.csv", "'A'", "data row 1", "a number"]),
    "text in long": (GOOD.replace(",4,20", ",4,x"), ["m.csv", "'volume'", "data row 3", "'x'", "a number"]),
    "unsorted, long": (
        OHLCV[:12] + "close\n2020-01-02,A,1\n2020-01-03,B,1\n2020-01-01,A,1\n2020-01-04,B,1\n",
        ["m.csv", "'A'", "data row 3", "2020-01-01", "unsorted"],
    ),
    "unsorted, wide": ("date,A\n2020-01-02,1\n2020-01-01,1\n", ["m.csv", "data row 2", "unsorted"]),
    "duplicate, long": (
        GOOD + "2020-01-03,A,1,1,1,1,1\n2020-01-01 00:00,A,1,1,1,1,1\n",
        ["m.csv", "'A'", "data row 6", "2020-01-01", "duplicate of data row 1"],
    ),
    "duplicate, wide": ("date,A\n2020-01-02,1\n2020-01-02,1\n", ["m.csv", "data row 2", "duplicate of data row 1"]),
    "bad time": (GOOD.replace("2020-01-02,A", "2020-02-30,A"), ["m.csv", "'date'", "data row 3", "2020-02-30", "ISO"]),
    "no time": (GOOD.replace("2020-01-02,A", ",A"), ["m.csv", "'date'", "data row 3", "ISO"]),
    "US date": ("date,A\n01/02/2020,1\n01/03/2020,1\n", ["m.csv", "'date'", "data row 1", "ISO"]),
    "epoch": ("time,A\n1701012000,1\n1701012001,1\n", ["m.csv", "'time'", "data row 1", "ISO"]),
    "now": ("date,A\n2020-01-01,1\nnow,1\n", ["m.csv", "data row 2", "'now'", "ISO"]),
    "out of range": ("date,A\n1500-01-01,1\n2020-01-02,1\n", ["m.csv", "data row 1", "1500"]),
    "zone and none": ("date,A\n2020-01-01T00:00Z,1\n2020-01-02,1\n", ["m.csv", "data row 2", "+0000", "mixed"]),
    "none and zone": ("date,A\n2020-01-01,1\n2020-01-02T00:00Z,1\n", ["m.csv", "data row 2", "no UTC", "mixed"]),
    "two offsets": (
        "date,A\n2020-01-01T00:00+01:00,1\n2020-01-02T00:00+02:00,1\n",
        ["m.csv", "data row 2", "+0100", "mixed"],
    ),
    "no symbol": (GOOD.replace("2020-01-02,A", "2020-01-02,"), ["m.csv", "'symbol'", "data row 3", "a symbol"]),
    "zero price": (GOOD.replace("B,5,6,5,6", "B,0,6,5,6"), ["m.csv", "'B'", "data row 4", "open is 0.0", "> 0"]),
    "nan price": (GOOD.replace("2,4,2,4", "2,4,2,"), ["m.csv", "'A'", "data row 3", "close is nan", "> 0"]),
    "inf price": (GOOD.replace("2,4,2,4", "2,inf,2,4"), ["m.csv", "'A'", "data row 3", "high is inf"]),
    "zero, wide": ("date,A,B\n2020-01-01,1,1\n2020-01-02,1,0\n", ["m.csv", "'B'", "data row 2", "close is 0.0"]),
    "inf, wide": ("date,A,B\n2020-01-01,1,1\n2020-01-02,1,inf\n", ["m.csv", "'B'", "data row 2", "close is inf"]),
    "high < low": (GOOD.replace("B,5,6,5,6", "B,5,6,7,6"), ["m.csv", "'B'", "data row 4", "high is 6.0", "low is 7"]),
    "high < open": (GOOD.replace("B,5,6,5,6", "B,7,6,5,6"), ["m.csv", "'B'", "data row 4", "high is 6", "open is 7"]),
    "high < close": (GOOD.replace("B,5,6,5,6", "B,5,6,5,7"), ["'B'", "data row 4", "high is 6", "close is 7"]),
    "open < low": (GOOD.replace("B,5,6,5,6", "B,4,6,5,6"), ["'B'", "data row 4", "open is 4", "low is 5"]),
    "close < low": (GOOD.replace("B,5,6,5,6", "B,5,6,5,4"), ["'B'", "data row 4", "close is 4", "low is 5"]),
    "negative volume": (GOOD.replace(",4,20", ",4,-20"), ["m.csv", "'A'", "data row 3", "volume is -20.0", ">= 0"]),
    "nan volume": (GOOD.replace(",4,20", ",4,"), ["m.csv", "'A'", "data row 3", "volume is nan"]),
    "one bar, long": (GOOD + "2020-01-03,C,1,1,1,1,1\n", ["m.csv", "'C'", "too few bars: 1"]),
    "one bar, wide": ("date,A,B\n2020-01-01,1,\n2020-01-02,1,2\n", ["m.csv", "'B'", "too few bars: 1"]),
    "no bar, wide": ("date,A,B\n2020-01-01,1,\n2020-01-02,1,\n", ["m.csv", "'B'", "too few bars: 0"]),
}


@pytest.mark.parametrize("text, parts", CSV_ERRORS.values(), ids=CSV_ERRORS)
def test_csv_errors_say_where(tmp_path, text, parts):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with fails(*parts):
        load_panel(str(path))


@pytest.mark.parametrize("spec", ["nothing", "m.txt", "synthetic:leadlag", ""])
def test_unknown_spec_lists_what_is_accepted(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fails(repr(spec), "sp500", ".csv", ".parquet", "folder", "synthetic:<name>[:key=value...]"):
        load_panel(spec)


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_missing_and_unreadable_files_are_named(tmp_path, name):
    path = tmp_path / name
    with fails(name, "no such file"):
        load_panel(str(path))
    path.write_bytes(b"")
    with fails(name, "empty"):
        load_panel(str(path))
    path.write_bytes(b"PAR1\xff\xfe\x00 not what it says")
    with fails(name, "not a readable"):
        load_panel(str(path))


def test_corrupted_parquet_pages_are_named(tmp_path):
    path = tmp_path / "m.parquet"
    frame = pd.DataFrame({"date": pd.date_range("2020", periods=500), "A": np.random.default_rng(0).random(500) + 1})
    frame.to_parquet(path, index=False)
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596  # the footer stays whole, the first pages do not
    path.write_bytes(content)
    with fails("m.parquet", "not a readable parquet"):
        load_panel(str(path))


FOLDER_ERRORS = {
    "nothing": ({}, ["no .csv file"]),
    "bad price": ({"A": "date,close\n2020-01-01,1\n2020-01-02,-1\n"}, ["A.csv", "'A'", "data row 2", "-1.0"]),
    "one bar": ({"A": "date,close\n2020-01-01,1\n"}, ["A.csv", "'A'", "too few bars"]),
    "other fields": (
        {"A": "date,close\n2020-01-01,1\n2020-01-02,1\n", "B": "date,close,volume\n2020-01-01,1,1\n2020-01-02,1,1\n"},
        ["B.csv", "volume", "A.csv"],
    ),
    "zone and none": (
        {"A": "date,close\n2020-01-01,1\n2020-01-02,1\n", "B": "date,close\n2020-01-01T00Z,1\n2020-01-02T00Z,1\n"},
        ["B.csv", "UTC", "A.csv"],
    ),
    "many symbols": ({"A": GOOD}, ["A.csv", "'A', 'B'", "expected", "('A',)"]),
}


@pytest.mark.parametrize("files, parts", FOLDER_ERRORS.values(), ids=FOLDER_ERRORS)
def test_folder_errors_say_where(tmp_path, files, parts):
    for stem, text in files.items():
        (tmp_path / f"{stem}.csv").write_text(text)
    with fails(*parts):
        load_panel(str(tmp_path))


# --- files: every format gives the same panel


@pytest.fixture
def records():
    """40 bars of A, which trades daily, and B, which lists late and skips days; shuffled order inside each day."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"date": np.repeat(pd.date_range("2020-01-30", periods=40), 2), "symbol": ["B", "A"] * 40})
    low, high = rng.uniform(1, 2, 80), rng.uniform(3, 4, 80)
    frame = frame.assign(open=low + 0.5, high=high, low=low, close=high - 0.5, volume=rng.uniform(0, 9, 80))
    skip = (frame.symbol == "B") & ((np.arange(80) < 20) | (np.arange(80) % 3 == 0))
    return frame[~skip].reset_index(drop=True)


def write_long_csv(frame, path):
    frame.to_csv(path / "m.csv", index=False)
    return path / "m.csv"


def write_numbered_csv(frame, path):  # pandas saves the row numbers as a nameless first column
    frame.to_csv(path / "m.csv")
    return path / "m.csv"


def write_odd_csv(frame, path):  # nameless first column of dates, odd capitals and order, adj close, a byte order mark
    frame = frame.rename(columns={"symbol": " Ticker", "close": "Adj Close", "high": "HIGH", "date": ""})
    columns = ["", "volume", "HIGH", "low", "Adj Close", " Ticker", "open"]
    frame[columns].to_csv(path / "m.csv", index=False, encoding="utf-8-sig")
    return path / "m.csv"


def write_parquet(frame, path):
    frame.to_parquet(path / "m.parquet", index=False)
    return path / "m.parquet"


def write_indexed_parquet(frame, path):
    frame.astype({"symbol": "category"}).set_index("date").to_parquet(path / "m.parquet")
    return path / "m.parquet"


def write_filtered_parquet(frame, path):  # pandas saves the gappy row numbers as __index_level_0__
    frame.loc[np.arange(len(frame))].set_axis(np.arange(len(frame)) * 2).to_parquet(path / "m.parquet")
    return path / "m.parquet"


def write_text_parquet(frame, path):
    frame.astype({"date": str, "symbol": object}).to_parquet(path / "m.parquet", index=False)
    return path / "m.parquet"


def write_folder(frame, path):
    for symbol, bars in frame.groupby("symbol"):
        bars.drop(columns="symbol").to_csv(path / f"{symbol}.csv", index=False)
    (path / "notes.txt").write_text("ignored")
    return path


WRITERS = [value for name, value in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_loads_the_same_panel(tmp_path, records, write):
    panel = load_panel(str(write(records, tmp_path)))
    assert panel.symbols == ("A", "B") and panel.timezone is None and panel.name in ("m.csv", "m.parquet", tmp_path.name)
    for name in FIELDS:
        expected = records.pivot(index="date", columns="symbol", values=name)
        np.testing.assert_array_equal(getattr(panel, name), expected.to_numpy())
    np.testing.assert_array_equal(panel.timestamps, expected.index.as_unit("ns").to_numpy())
    again = load_panel(str(write(records, tmp_path)))
    assert panel.sha256 == again.sha256 == load_panel(str(write_parquet(records, tmp_path))).sha256


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("first", ["date", "ticker", "anything"])
def test_wide_files_keep_column_order_and_drop_empty_rows(tmp_path, suffix, first):
    path = tmp_path / f"m{suffix}"
    frame = pd.DataFrame({first: ["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-04"]})
    frame = frame.assign(NA=[np.nan, 1, np.nan, 3], LOW=[np.nan, 5, 6, 7], **{"BRK.B": [np.nan, 1, 2, 3], "BRK": 4.0})
    frame.loc[0, "BRK"] = np.nan
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path, index=False)
    panel = load_panel(str(path))
    assert panel.symbols == ("NA", "LOW", "BRK.B", "BRK") and list(panel.fields) == ["close"]
    np.testing.assert_array_equal(panel.close, [[1, 5, 1, 4], [np.nan, 6, 2, 4], [3, 7, 3, 4]])
    assert panel.timestamps[0] == np.datetime64("2020-01-02")


def test_symbols_that_look_like_missing_values_or_numbers_are_names(tmp_path):
    path = tmp_path / "m.csv"
    names = ["NA", "TRUE", "007", "nan"]
    rows = [f"2020-01-0{day},{name},{day}" for day in (1, 2) for name in names]
    path.write_text("\n".join(["date,symbol,close", *rows]))
    assert load_panel(str(path)).symbols == tuple(sorted(names))


NO_NUMBERS = {"list": [[1.0], [2.0]], "struct": [{"x": 1}, {"x": 2}], "date": pd.date_range("2020", periods=2)}


@pytest.mark.parametrize("values", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_parquet_columns_without_numbers_are_named(tmp_path, values):
    path = tmp_path / "m.parquet"
    pd.DataFrame({"date": pd.date_range("2020", periods=2), "A": values}).to_parquet(path)
    with fails("m.parquet", "'A'", "expected"):
        load_panel(str(path))


def test_one_symbol_file_is_named_like_the_file(tmp_path):
    path = tmp_path / "SPY.csv"
    path.write_text("Date,Open,High,Low,Close,Volume\n20200101,1,2,1,2,3\n20200102,1,2,1,2,3\n")
    panel = load_panel(str(path))
    assert panel.symbols == ("SPY",) and list(panel.fields) == list(FIELDS)


@pytest.mark.parametrize("zone", ["+02:00", "+0200", "+02", "parquet"])
def test_zones_become_utc(tmp_path, zone):
    if zone == "parquet":
        path = tmp_path / "m.parquet"
        times = pd.date_range("2020-01-01", periods=2, tz="Etc/GMT-2")
        pd.DataFrame({"time": times, "A": [1.0, 2.0]}).to_parquet(path, index=False)
    else:
        path = tmp_path / "m.csv"
        path.write_text(f"time,A\n2020-01-01T00:00{zone},1\n2020-01-02T00:00+02:00,2\n")
    panel = load_panel(str(path))
    assert panel.timezone == "UTC" and panel.timestamps[0] == np.datetime64("2019-12-31T22:00")
    assert panel.timestamps.dtype == "datetime64[ns]"


def test_load_selects_and_then_resamples(tmp_path, records):
    path = str(write_long_csv(records, tmp_path))
    panel = load_panel(path, symbols=["A"], start="2020-02", end="2020-02-20", resample="1W")
    assert panel.sha256 == load_panel(path).select(["A"], "2020-02", "2020-02-20").resample("1W").sha256
    with fails("m.csv", "no overlap", "2020-01-30", "2020-03-09"):
        load_panel(path, start="2021-01-01")
    with fails("m.csv", "unknown ['C']", "'A', 'B'"):
        load_panel(path, symbols=["A", "C"])


# --- Panel: what it refuses


PANEL_ERRORS = {
    "one bar": ({"close": [[1.0]]}, ["too few bars"]),
    "short segment": ({"segments": np.array([0, 2])}, ["too few bars", "[0, 2]"]),
    "first segment": ({"segments": np.array([1])}, ["segments", "row 0"]),
    "no segment": ({"segments": np.array([], dtype=np.int64)}, ["segments"]),
    "segment type": ({"segments": np.array([0], dtype=np.int32)}, ["segments", "int32", "int64"]),
    "label": ({"segment_split": ("training",)}, ["segment_split", "training"]),
    "two to cut": (
        {"close": np.ones((6, 1)), "segments": np.array([0, 2, 4]), "segment_split": (None, "train", None)},
        ["segment_split", "or one None"],
    ),
    "weight": ({"segment_weight": np.ones(2)}, ["segment_weight", "(2,)", "one number for each segment"]),
    "label count": ({"segment_split": ("train", "val")}, ["segment_split", "1 of"]),
    "no symbol": ({"symbols": ()}, ["symbols"]),
    "symbol list": ({"symbols": ["A", "B"]}, ["symbols", "tuple"]),
    "same symbol": ({"symbols": ("A", "A")}, ["'A'", "more than once"]),
    "shape": ({"open": np.ones((3, 1))}, ["open", "(3, 1)", "(3, 2)"]),
    "type": ({"open": np.ones((3, 2), dtype=np.float32)}, ["open", "float32", "float64"]),
    "layout": ({"open": np.asfortranarray(np.ones((3, 2)))}, ["open", "not contiguous"]),
    "time back": ({"times": ["2020-01-01", "2020-01-03", "2020-01-02"]}, ["row 2", "2020-01-02", "2020-01-03"]),
    "time twice": ({"times": ["2020-01-01", "2020-01-03", "2020-01-03"]}, ["row 2", "strictly increasing"]),
    "no time": ({"times": ["2020-01-01", "NaT", "2020-01-03"]}, ["row 1", "NaT"]),
    "no bar": ({"close": [[1, np.nan]] * 3}, ["'B'", "no bar"]),
    "negative": ({"close": [[1, 1], [1, -1], [1, 1]]}, ["'B'", "panel row 1", "2020-01-02", "close is -1.0", "> 0"]),
    "inf": ({"close": [[1, 1], [1, np.inf], [1, 1]]}, ["'B'", "panel row 1", "close is inf"]),
    "field without close": (
        {"close": [[1, 1], [1, np.nan], [1, 1]], "open": np.ones((3, 2))},
        ["'B'", "row 1", "open"],
    ),
    "close without field": ({"open": np.array([[1, 1], [1, np.nan], [1, 1]])}, ["'B'", "row 1", "open is nan"]),
}


@pytest.mark.parametrize("options, parts", PANEL_ERRORS.values(), ids=PANEL_ERRORS)
def test_panel_refuses(options, parts):
    with fails("test", *parts):
        make_panel(**{"close": [[1, 1]] * 3} | options)


@pytest.mark.parametrize("excess, accepted", [(0.9e-6, True), (1.1e-6, False)])
@pytest.mark.parametrize("name, sign", [("high", -1), ("low", 1)])
def test_float32_rounding_is_tolerated_and_no_more(excess, accepted, name, sign):
    options = {name: np.full((2, 1), 100 * (1 + sign * excess))}
    if accepted:
        make_panel([[100.0], [100.0]], **options)
    else:
        with fails("'A'", "row 0"):
            make_panel([[100.0], [100.0]], **options)


def test_arrays_are_read_only_views_and_the_callers_stay_writable():
    close = np.ones((3, 2))
    panel = Panel("test", np.arange(3).astype("datetime64[ns]"), ("A", "B"), close)
    assert np.shares_memory(panel.close, close) and close.flags.writeable
    for array in (panel.close, panel.timestamps, panel.segments, panel.present, panel.segment_of_row):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- Panel: what it computes


def test_segments_restart_the_clock():
    panel = three_histories()
    np.testing.assert_array_equal(panel.segment_of_row, np.repeat([0, 1, 2], [4, 3, 5]))
    assert panel.bars_per_year == pytest.approx(365.25)
    np.testing.assert_allclose(panel.bar_years, 1 / 365.25)


def test_bar_years_and_bars_per_year_on_an_uneven_calendar():
    times = ["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-06", "2021-01-01", "2021-02-01"]
    panel = make_panel(np.ones((6, 1)), times, segments=np.array([0, 4]))
    np.testing.assert_allclose(panel.bar_years * 365.25, [1, 1, 3, 1, 31, 31])
    assert panel.bars_per_year == pytest.approx((3 + 1) / (36 / 365.25))


def test_filled_carries_forward_inside_a_segment_and_never_backward():
    panel = three_histories()
    expected = panel.close.copy()
    expected[2, 0] = expected[1, 0]
    np.testing.assert_array_equal(panel.filled("close"), expected)  # B's NaN at 4 and 5 are not filled from row 3
    with fails("'volume'", "['close']"):
        panel.filled("volume")


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_filled_up_to_t_depends_on_bars_up_to_t_only(seed):
    rng = np.random.default_rng(seed)
    close = np.where(rng.random((30, 3)) < 0.5, np.nan, rng.uniform(1, 2, (30, 3)))
    close[[0, -1]] = 1.0
    changed, t = close.copy(), int(rng.integers(1, 29))
    changed[t:] = rng.uniform(1, 2, (30 - t, 3))
    a, b = (make_panel(values).filled("close") for values in (close, changed))
    np.testing.assert_array_equal(a[:t], b[:t])
    np.testing.assert_array_equal(a, pd.DataFrame(close).ffill())


def test_sha256_sees_every_value_but_not_the_name():
    times = np.datetime64("2020-01-01", "ns") + np.arange(4) * np.timedelta64(1, "h")
    close = np.array([[2, np.nan], [2, 3], [2, 3], [2, 3]])
    base = ohlcv_panel(times, close)
    values = {name: array.copy() for name, array in base.fields.items()} | {"timestamps": times, "symbols": ("A", "B")}
    digests = {base.sha256}
    for name in FIELDS:
        for index in np.argwhere(base.present):
            changed = {key: np.array(value) for key, value in values.items() if key in FIELDS}
            changed[name][tuple(index)] += 1e-9
            digests.add(Panel(**values | changed, name="test").sha256)
    for row in range(4):
        moved = times.copy()
        moved[row] += 1
        digests.add(Panel(**values | {"timestamps": moved}, name="test").sha256)
    digests.add(Panel(**values | {"symbols": ("A", "C")}, name="test").sha256)
    digests.add(Panel(**values | {"volume": None}, name="test").sha256)
    digests.add(Panel(**values, segments=np.array([0, 2]), name="test").sha256)
    assert len(digests) == 1 + 5 * 7 + 4 + 3
    assert Panel(**values, name="other").sha256 == base.sha256


def test_sha256_is_the_same_in_another_process():
    code = "from test_panel import three_histories; print(three_histories().sha256)"
    output = run_python("-c", code, PYTHONHASHSEED="7")
    assert output.stdout.strip() == three_histories().sha256, output.stderr


# --- select


def test_select_symbols_and_inclusive_dates():
    times = np.datetime64("2020-01-30", "ns") + np.arange(96) * np.timedelta64(1, "h")
    panel = make_panel(np.arange(1.0, 193).reshape(96, 2), times)
    for start, end, expected in [
        ("2020-01-31", "2020-02-01", slice(24, 72)),
        ("2020-02", None, slice(48, 96)),
        (None, "2020-01", slice(0, 48)),
        ("2020-01-31 12:00", "2020-01-31T14", slice(36, 39)),
        ("2020", "2020", slice(0, 96)),
    ]:
        part = panel.select(["B", "A"], start, end)
        assert part.symbols == ("B", "A")
        np.testing.assert_array_equal(part.close, panel.close[expected, ::-1])
        np.testing.assert_array_equal(part.timestamps, times[expected])
    assert panel.select().sha256 == panel.sha256


def test_select_equals_loading_a_file_that_holds_only_that(tmp_path, records):
    panel = load_panel(str(write_long_csv(records, tmp_path)))
    only = records[(records.symbol == "B") & (records.date >= "2020-02-15")]
    assert panel.select(["B"], start="2020-02-15").sha256 == load_panel(str(write_long_csv(only, tmp_path))).sha256


def test_select_follows_segments_labels_and_hidden():
    hidden = {"regime": np.arange(12), "mean": np.arange(24.0).reshape(12, 2), "betas": np.eye(5)}
    panel = three_histories(segment_split=("train", "val", "test"), hidden=hidden, timezone="UTC")
    part = panel.select(["A"], start="2020-01-02")
    rows = [1, 3, 5, 6, 8, 9, 10, 11]  # at row 2 only B has a bar
    np.testing.assert_array_equal(part.close, panel.close[rows, :1])
    assert part.segments.tolist() == [0, 2, 4] and part.segment_split == ("train", "val", "test")
    assert part.hidden["regime"].tolist() == rows and part.hidden["betas"] is hidden["betas"]
    np.testing.assert_array_equal(part.hidden["mean"], hidden["mean"][rows, :1])
    assert part.timezone == "UTC"
    with fails("too few bars", "[0, 2, 3]"):
        panel.select(["B"], end="2020-01-03")


def test_select_drops_histories_outside_the_range():
    times = ["2020-01-01", "2020-01-02", "2021-01-01", "2021-01-02"]
    panel = make_panel(np.ones((4, 1)), times, segments=np.array([0, 2]), segment_split=("train", "val"))
    part = panel.select(start="2021")
    assert part.segments.tolist() == [0] and part.segment_split == ("val",)


SELECT_ERRORS = {
    "unknown symbol": ({"symbols": ["A", "X"]}, ["unknown ['X']", "'A', 'B'"]),
    "repeated symbol": ({"symbols": ["A", "A"]}, ["'A', 'A'", "different"]),
    "no symbols": ({"symbols": []}, ["symbols []", "'A', 'B'"]),
    "a string": ({"symbols": "A"}, ["symbols 'A'", "a list"]),
    "bad start": ({"start": "soon"}, ["start='soon'", "2020-03-01"]),
    "bad end": ({"end": "2020-02-30"}, ["end='2020-02-30'"]),
    "US date": ({"end": "01/02/2020"}, ["end='01/02/2020'"]),
    "offset": ({"end": "2020-01-02T00:00Z"}, ["end='2020-01-02T00:00Z'"]),
    "too late": ({"start": "2021-01-01"}, ["no overlap", "from 2021-01-01", "2020-01-01", "2020-01-05"]),
    "too early": ({"end": "1600"}, ["no overlap", "to 1600", "2020-01-01", "2020-01-05"]),
    "backward": ({"start": "2020-01-03", "end": "2020-01-02"}, ["no overlap"]),
    "asked for": ({"symbols": ["B", "A"], "end": "2020-01-03"}, ["no overlap", "['B']", "2020-01-03"]),
}


@pytest.mark.parametrize("options, parts", SELECT_ERRORS.values(), ids=SELECT_ERRORS)
def test_select_errors(options, parts):
    panel = make_panel([[1, np.nan], [1, np.nan], [1, np.nan], [1, 2], [1, 2]])
    with fails("test", *parts):
        panel.select(**options)
    assert panel.select(end="2020-01-03").symbols == ("A",)  # not asked for: dropped


# --- resample


def test_resample_by_hand():
    nan = np.nan
    hours = np.array([0, 1, 3, 4, 5, 9, 13])  # 4 h bins: hours 0-3, 4-7, 8-11, 12-15
    times = np.datetime64("2020-01-01", "ns") + hours * np.timedelta64(1, "h")
    close = [[10, nan], [30, nan], [20, nan], [nan, 5], [12, nan], [nan, 7], [14, 8]]
    panel = ohlcv_panel(times, close, hidden={"regime": hours}, timezone="UTC").resample("4H")
    np.testing.assert_array_equal(panel.timestamps, times[[2, 4, 5, 6]])  # never before the last bar it holds
    np.testing.assert_array_equal(panel.close, [[20, nan], [12, 5], [nan, 7], [14, 8]])
    np.testing.assert_array_equal(panel.open, [[9.5, nan], [11.5, 4.5], [nan, 6.5], [13.5, 7.5]])
    np.testing.assert_array_equal(panel.high, [[31, nan], [13, 6], [nan, 8], [15, 9]])
    np.testing.assert_array_equal(panel.low, [[9, nan], [11, 4], [nan, 6], [13, 7]])
    np.testing.assert_array_equal(panel.volume, [[1 + 3 + 5, nan], [9, 8], [nan, 12], [13, 14]])
    assert panel.hidden == {} and panel.timezone == "UTC"


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["2h", "7h", "1D", "2D", "1W", "ME"]))
def test_resample_is_causal_and_agrees_with_pandas(seed, rule):
    rng = np.random.default_rng(seed)
    times = np.datetime64("2020-01-30T05", "ns") + np.sort(rng.permutation(2000)[:1500]) * np.timedelta64(1, "h")
    close = np.where(rng.random((1500, 2)) < 0.3, np.nan, rng.uniform(2, 3, (1500, 2)))
    close[[0, -1]] = 2.0
    panel = ohlcv_panel(times, close)
    coarse = panel.resample(rule)
    frame = pd.DataFrame(close, index=times).resample(rule, **({"origin": "epoch"} if rule[-1] == "h" else {})).last()
    if rule != "2D":  # pandas counts these from the first bar
        np.testing.assert_array_equal(coarse.close, frame.dropna(how="all"))
    np.testing.assert_allclose(np.nansum(coarse.volume), np.nansum(panel.volume))
    t = int(rng.integers(1000, 1500))
    shorter = ohlcv_panel(times[:t], close[:t]).resample(rule)
    closed = shorter.num_bars - 1  # later bars may only change the last bin
    for name, values in shorter.fields.items():
        np.testing.assert_array_equal(values[:closed], coarse.fields[name][:closed])
    np.testing.assert_array_equal(shorter.timestamps[:closed], coarse.timestamps[:closed])


def test_resample_never_mixes_histories():
    panel = three_histories(segment_split=("train", "val", "test")).resample("2D")  # epoch bins start on odd days here
    expected = [[3, 4], [7, 8], [11, np.nan], [13, 14], [17, 18], [21, 22], [23, 24]]
    np.testing.assert_array_equal(panel.close, expected)
    assert panel.segments.tolist() == [0, 2, 4] and panel.segment_split == ("train", "val", "test")


def test_resample_drops_bins_without_a_bar_and_keeps_segments_aligned():
    close = np.ones((10, 1))
    close[2:4] = np.nan
    panel = make_panel(close, segments=np.array([0, 6])).resample("2D")
    assert panel.segments.tolist() == [0, 2]
    assert panel.timestamps.astype("datetime64[D]").astype(str).tolist() == [f"2020-01-{d:02}" for d in (2, 6, 8, 10)]


RESAMPLE_ERRORS = {
    "finer": ("4h", ["'4h'", "finer than the data", "1 days"]),
    "not a rule": ("often", ["'often'", "'4h'"]),
    "zero": ("0D", ["'0D'"]),
    "negative": ("-1D", ["'-1D'"]),
    "not text": (None, ["None"]),
    "one bin": ("YE", ["too few bars"]),
}


@pytest.mark.parametrize("rule, parts", RESAMPLE_ERRORS.values(), ids=RESAMPLE_ERRORS)
def test_resample_errors(rule, parts):
    with fails("test", *parts):
        line(20).resample(rule)


def test_monthly_bars_are_not_finer_than_monthly_data():
    times = pd.date_range("2020-01-31", periods=24, freq="ME").to_numpy()
    panel = make_panel(np.arange(1.0, 25)[:, None], times)
    assert panel.resample("ME").sha256 == panel.sha256


# --- split and walk_forward


def check_folds(folds, num_bars, embargo):
    """Ordered, disjoint, at least two rows each, and exactly `embargo` rows between neighbours of a fold."""
    for fold in folds:
        assert list(fold) == ["train", "val", "test"] and all(fold[name].name == name for name in fold)
        (train,), (val,), (test,) = (split.ranges for split in fold.values())
        assert 0 <= train[0] and test[1] <= num_bars
        assert train[1] + embargo == val[0] and val[1] + embargo == test[0]
        for split in fold.values():
            start, stop = split.ranges[0]
            assert split.num_bars == stop - start >= 2


@settings(deadline=None)
@given(st.integers(2, 400), st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.integers(0, 40))
def test_split_properties(num_bars, train, val, embargo):
    panel = line(num_bars)
    try:
        splits = panel.split(train, val, embargo)
    except PanelError as error:
        usable = num_bars - 2 * embargo
        sizes = usable * np.array([train, val, 1 - train - val])
        assert train + val >= 1 or sizes.min() < 3, error  # a split rounds to fewer than two rows only below this
        return
    check_folds([splits], num_bars, embargo)
    usable = num_bars - 2 * embargo
    assert splits["test"].ranges[0, 1] == num_bars
    assert sum(split.num_bars for split in splits.values()) == usable
    assert abs(splits["train"].num_bars - train * usable) <= 0.5 and abs(splits["val"].num_bars - val * usable) <= 1


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(1, 8), st.none() | st.integers(1, 200), st.floats(0.05, 0.95), st.integers(0, 20))
def test_walk_forward_properties(num_bars, folds, train_bars, val_fraction, embargo):
    panel = line(num_bars)
    options = dict(train_bars=train_bars, val_fraction=val_fraction, embargo=embargo)
    try:
        result = panel.walk_forward(folds, **options)
    except PanelError as error:
        window = (num_bars - embargo) // (folds + 1) if train_bars is None else train_bars
        left = (num_bars - embargo - window) / folds
        inside = (window - embargo) * min(val_fraction, 1 - val_fraction)
        assert left < 3 or inside < 3, error
        return
    check_folds(result, num_bars, embargo)
    tests = np.concatenate([fold["test"].ranges for fold in result])
    assert len(result) == folds and tests[-1, 1] == num_bars
    np.testing.assert_array_equal(tests[1:, 0], tests[:-1, 1])  # blocks touch and do not overlap
    assert np.ptp(np.diff(tests, axis=1)) <= 1
    for fold in result:
        start, stop = fold["train"].ranges[0, 0], fold["val"].ranges[0, 1]
        assert start == 0 if train_bars is None else stop - start == train_bars
        assert abs(fold["val"].num_bars - val_fraction * (stop - start - embargo)) <= 0.5


def test_split_by_hand():
    assert {k: v.ranges.tolist() for k, v in line(10).split().items()} == {
        "train": [[0, 6]],
        "val": [[6, 8]],
        "test": [[8, 10]],
    }
    splits = line(14).split(0.6, 0.2, embargo=2)
    assert [split.ranges.tolist()[0] for split in splits.values()] == [[0, 6], [8, 10], [12, 14]]
    assert splits["val"].describe(line(14)) == {"start": "2020-01-09T00:00:00", "end": "2020-01-10T00:00:00", "bars": 2}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[[0, 8], [8, 10], [10, 20]], [[0, 16], [16, 20], [20, 30]]]),
        ({"train_bars": 10}, [[[0, 8], [8, 10], [10, 20]], [[10, 18], [18, 20], [20, 30]]]),
        ({"train_bars": 11, "embargo": 1}, [[[0, 8], [9, 11], [12, 21]], [[9, 17], [18, 20], [21, 30]]]),
    ],
)
def test_walk_forward_by_hand(options, expected):
    folds = line(30).walk_forward(2, **options)
    assert [[split.ranges.tolist()[0] for split in fold.values()] for fold in folds] == expected


def test_labelled_segments_are_split_by_label():
    panel = three_histories(segment_split=("test", "train", "val"))
    splits = panel.split(train=9, val=9, embargo=9)
    assert {k: v.ranges.tolist() for k, v in splits.items()} == {"train": [[4, 7]], "val": [[7, 12]], "test": [[0, 4]]}
    with fails("segment_split", "each of"):
        three_histories(segment_split=("test", "train", "train")).split()
    two = Split("train", np.array([[0, 4], [7, 12]]))
    assert two.num_bars == 9
    assert two.describe(panel) == {"start": "2020-01-01T00:00:00", "end": "2020-01-05T00:00:00", "bars": 9}


def test_one_segment_without_a_label_is_cut_in_time():
    """As it would be alone, wherever it stands among the others; weights go with what a range is made of."""
    weights = np.array([3.0, 1.0, 2.0])
    times = np.datetime64("2020-01-01", "ns") + np.arange(26) * np.timedelta64(1, "D")
    panel = make_panel(
        np.ones((26, 1)), times, segments=np.array([0, 3, 23]), segment_split=("train", None, "test"), segment_weight=weights
    )
    splits, alone = panel.split(0.5, 0.25, 2), line(20).split(0.5, 0.25, 2)
    assert splits["train"].ranges.tolist() == [[0, 3], *(alone["train"].ranges + 3).tolist()]
    assert splits["val"].ranges.tolist() == (alone["val"].ranges + 3).tolist()
    assert splits["test"].ranges.tolist() == [*(alone["test"].ranges + 3).tolist(), [23, 26]]
    assert {name: split.weights.tolist() for name, split in splits.items()} == {"train": [3, 1], "val": [1], "test": [1, 2]}
    assert panel.select(end="2020-01-20").segment_weight.tolist() == [3, 1]
    assert panel.resample("2D").split(0.5, 0.25)["test"].weights.tolist() == [1, 2]
    with fails("split(embargo=-1)", ">= 0"):
        panel.split(embargo=-1)
    with fails("split(train=0.9, val=0.2)", "sum < 1"):
        panel.split(0.9, 0.2)


@pytest.mark.parametrize("weights", ([1.0], [1.0, 0.0], [1.0, np.nan], [1.0, np.inf], [[1.0, 1.0]]))
def test_weights_of_a_split_are_positive_numbers_for_each_range(weights):
    with fails("split 'train': weights", "expected 2 positive numbers"):
        Split("train", [[0, 4], [4, 8]], weights)


SPLIT_ERRORS = {
    "too few bars": (lambda: line(5).split(), ["'val'", "too few bars", "hold 1", "at least 2"]),
    "large embargo": (lambda: line(20).split(embargo=15), ["'train'", "too few bars", "embargo"]),
    "negative embargo": (lambda: line(20).split(embargo=-1), ["test", "split(embargo=-1)"]),
    "zero train": (lambda: line(20).split(train=0), ["split(train=0"]),
    "zero val": (lambda: line(20).split(val=0.0), ["val=0.0"]),
    "nothing for test": (lambda: line(20).split(0.8, 0.2), ["sum < 1"]),
    "nan": (lambda: line(20).split(float("nan")), ["train=nan"]),
    "segments": (lambda: three_histories().split(), ["split needs one price history", "3 segments", "segment_split"]),
    "segments, walk": (lambda: three_histories().walk_forward(2), ["walk_forward needs one price history", "3"]),
    "no folds": (lambda: line(20).walk_forward(0), ["folds=0"]),
    "many folds": (lambda: line(20).walk_forward(10), ["too few bars", "fewer folds"]),
    "long window": (lambda: line(20).walk_forward(2, train_bars=30), ["too few bars"]),
    "no window": (lambda: line(20).walk_forward(2, train_bars=0), ["train_bars=0"]),
    "all val": (lambda: line(20).walk_forward(2, val_fraction=1.0), ["val_fraction=1.0"]),
    "walk embargo": (lambda: line(20).walk_forward(2, embargo=-1), ["walk_forward(embargo=-1)"]),
    "overlap": (lambda: Split("x", np.array([[0, 5], [4, 8]])), ["'x'", "overlap"]),
    "shape": (lambda: Split("x", np.array([0, 5])), ["'x'", "shape"]),
}


@pytest.mark.parametrize("call, parts", SPLIT_ERRORS.values(), ids=SPLIT_ERRORS)
def test_split_errors(call, parts):
    with fails(*parts):
        call()


# --- real data


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no real market data: {DATA / name} is absent (set CLEANMARKETS_DATA)")
    return load_panel(str(DATA / name))


@pytest.mark.parametrize("name, zone", [("us_equities_daily.parquet", None), ("crypto_hourly.parquet", "UTC")])
def test_real_long_parquet(name, zone):
    panel = real(name)
    frame = pd.read_parquet(DATA / name)
    assert panel.timezone == zone and panel.present.sum() == len(frame)
    assert (panel.num_bars, panel.num_symbols) == (frame.timestamp.nunique(), frame.symbol.nunique())
    for i in np.random.default_rng(0).integers(0, len(frame), 50):
        record = frame.iloc[i]
        row = np.searchsorted(panel.timestamps, np.datetime64(record.timestamp.tz_localize(None)))
        column = panel.symbols.index(record.symbol)
        assert [values[row, column] for values in panel.fields.values()] == [record[f] for f in FIELDS]
    assert panel.sha256 == load_panel(str(DATA / name)).sha256
    weekly = panel.resample("1W")
    assert np.nansum(weekly.volume) == pytest.approx(np.nansum(panel.volume))
    assert weekly.bars_per_year == pytest.approx(52.18, abs=0.5)


def test_real_wide_csv():
    panel = real("crypto_daily_close.csv")
    frame = pd.read_csv(DATA / "crypto_daily_close.csv", index_col=0).dropna(how="all")
    np.testing.assert_array_equal(panel.close, frame.to_numpy())
    assert panel.symbols == tuple(frame.columns) and panel.bars_per_year == pytest.approx(365.25)


def test_sp500_is_bundled():
    panel = load_panel("sp500", symbols=["AAPL", "XOM"], start="2000", end="2001-12-31")
    assert panel.symbols == ("AAPL", "XOM") and panel.present.all() and list(panel.fields) == ["close"]
    assert panel.bars_per_year == pytest.approx(252, abs=2)
    assert load_panel("sp500").num_symbols == 20
