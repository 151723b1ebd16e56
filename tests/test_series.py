"""Extra series are known when they were published, a lag later, and never before; files load exactly or say where not."""

import numpy as np
import pandas as pd
import pytest
from conftest import assert_same_bits, tampered
from hypothesis import given
from hypothesis import strategies as st
from test_panel import fails, make_panel, ohlcv_panel, three_histories

from envs.files import load_panel
from envs.series import Publications, add_series, align
from envs.synthetic import load_market

NAN = np.nan
BARS = "date,symbol,close,Mean,risk\n"
LONG = BARS + "2020-01-01,A,1,10,\n2020-01-01,B,1,20,\n2020-01-02,A,1,11,5\n2020-01-03,A,1,,6\n2020-01-03,B,1,22,\n"
UTC = BARS + "2020-01-01T00Z,A,1,1,1\n2020-01-02T00Z,A,1,1,1\n"


def publications(published, values, columns=None, name="x"):
    times = np.array(published, dtype="datetime64[ns]")
    columns = None if columns is None else np.array(columns, dtype=np.int64)
    return Publications("s.csv", times, columns, [(name, np.array(values, dtype=np.float64))])


def write(tmp_path, name, text):
    """The text as a CSV file, or the table it holds, times parsed, as a Parquet file."""
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text(text)
    else:
        source = tmp_path / "source.csv"
        source.write_text(text)
        frame = pd.read_csv(source)
        times = [c for c in ("published", "date") if c in frame]
        frame.astype(dict.fromkeys(times, "datetime64[us]")).to_parquet(path, index=False)
        source.unlink()
    return str(path)


# --- alignment


@pytest.mark.parametrize(
    "lag, expected",
    [(0, [NAN, 1, 3, 3, 4]), (1, [NAN, NAN, 1, 3, 3]), (2, [NAN, NAN, NAN, 1, 3]), (np.int64(9), [NAN] * 5)],
)
def test_alignment_by_hand(lag, expected):
    panel = make_panel(np.ones((5, 1)))  # 1 to 5 January, at midnight
    # unsorted; between bars, exactly at one, two before the same bar, an empty value, after the last bar
    published = ["2020-01-05", "2020-01-01T12:00", "2020-01-02T06:00", "2020-01-02T18", "2020-01-04", "2020-01-05T00:00:01"]
    values = [4, 1, 2, 3, NAN, 9]
    assert_same_bits(align(panel, publications(published, values), lag)["x"], np.array(expected, dtype=np.float64))


def test_the_default_lag_is_one_bar():
    panel = make_panel(np.ones((3, 1)))
    told = publications(["2020-01-01"], [7])
    expected = np.array([NAN, 7, 7])
    assert_same_bits(align(panel, told)["x"], expected)
    assert_same_bits(add_series(panel, told).extras["x"], expected)


def test_per_symbol_alignment_with_a_late_a_silent_and_an_unknown_symbol():
    close = np.ones((4, 3))
    close[:2, 1] = NAN  # B lists on 3 January; what was published about it before is known then
    panel = make_panel(close)
    published = ["2020-01-01", "2020-01-02", "2020-01-01", "2020-01-01", "2020-01-02", "2020-01-01"]
    found = align(panel, publications(published, [1, 2, 5, 99, 98, NAN], [0, 0, 1, -1, -1, 2]), 1)["x"]
    assert_same_bits(found, np.array([[NAN, NAN, NAN], [1, 5, NAN], [2, 5, NAN], [2, 5, NAN]]))


@pytest.mark.parametrize(
    "lag, expected",
    [
        (0, [NAN, NAN, 5, 6, NAN, NAN, 5, NAN, NAN, 5, 6, 6]),
        (1, [NAN, NAN, NAN, 5, NAN, NAN, NAN, NAN, NAN, NAN, 5, 6]),
        (3, [NAN] * 10 + [NAN, NAN]),
    ],
)
def test_a_lag_never_reaches_into_the_segment_before(lag, expected):
    panel = three_histories()  # 1-4, 1-3 and 1-5 January
    found = align(panel, publications(["2020-01-03", "2020-01-04"], [5, 6]), lag)["x"]
    assert_same_bits(found, np.array(expected, dtype=np.float64))
    early = align(panel, publications(["2019-01-01"], [8]), lag)["x"]  # known before all three histories
    assert_same_bits(np.isnan(early), np.concatenate([np.arange(n) < lag for n in (4, 3, 5)]))


def by_definition(panel, told, lag):
    (name, values), shape = told.series[0], (panel.num_bars, panel.num_symbols)
    result = np.full(shape, NAN)
    for t, column in np.ndindex(shape):
        u = t - lag
        if u < panel.segments[panel.segment_of_row[t]]:
            continue
        about = ~np.isnan(values) & (told.published <= panel.timestamps[u])
        if told.columns is not None:
            about &= told.columns == column
        if about.any():
            row = np.flatnonzero(about)[told.published[about].argmax()]
            result[t, column] = values[row]
    return {name: result if told.columns is not None else np.ascontiguousarray(result[:, 0])}


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.booleans())
def test_later_publications_change_nothing_that_was_known(seed, lag, per_symbol):
    rng = np.random.default_rng(seed)
    hour = np.timedelta64(1, "h")
    bars = [np.sort(rng.choice(60, n, replace=False)) for n in rng.integers(2, 12, rng.integers(1, 4))]
    origin, segments = np.datetime64("2020-01-01", "ns"), np.cumsum([0, *map(len, bars[:-1])])
    panel = make_panel(np.ones((sum(map(len, bars)), 2)), origin + np.concatenate(bars) * hour, segments=segments)

    def draw(hours):
        """One row per hour, and per symbol if it is about symbols; some empty, some about an unknown symbol."""
        hours = np.repeat(hours, 3 if per_symbol else 1)
        values = np.where(rng.random(len(hours)) < 0.2, NAN, rng.standard_normal(len(hours)))
        return origin + hours * hour, values, np.arange(len(hours)) % 3 - 1 if per_symbol else None

    def join(*parts):
        order = rng.permutation(sum(len(part[0]) for part in parts))  # a file may be in any order
        times, values, columns = (None if p[0] is None else np.concatenate(p)[order] for p in zip(*parts, strict=True))
        return publications(times, values, columns)

    x = int(rng.integers(-5, 65))  # what is published after this hour is anybody's guess
    early = draw(np.flatnonzero(rng.random(x + 5) < 0.3) - 5)
    later = [draw(x + 1 + np.flatnonzero(rng.random(30) < 0.4)) for _ in range(2)]
    told = [join(early, late) for late in later] + [join(early)]
    found = [align(panel, t, lag)["x"] for t in told]
    for aligned, t in zip(found, told, strict=True):
        assert_same_bits(aligned, by_definition(panel, t, lag)["x"])
    rows = np.arange(panel.num_bars) - lag
    blind = (rows < segments[panel.segment_of_row]) | (panel.timestamps[np.maximum(rows, 0)] <= origin + x * hour)
    for aligned in found[:2]:
        assert_same_bits(aligned[blind], found[2][blind])


ALIGN_ERRORS = {
    "negative lag": (([1], [1]), -1, ["s.csv", "lag is -1", ">= 0"]),
    "half a lag": (([1], [1]), 0.5, ["s.csv", "lag is 0.5", "whole number"]),
    "duplicate": (([2, 1, 2, 2], [1, 1, 4, 1]), 1, ["s.csv", "'x'", "data row 3", "4.0", "2020-01-02", "of data row 1"]),
    "symbol": (([1, 1, 1], [1, 2, 3], [1, 0, 1]), 1, ["s.csv", "'x'", "symbol 'B'", "data row 3", "of data row 1"]),
    "first": (([3, 3, 1, 1], [1, 2, 3, 4], [1, 1, 0, 0]), 1, ["s.csv", "symbol 'B'", "data row 2", "of data row 1"]),
}


@pytest.mark.parametrize("told, lag, parts", ALIGN_ERRORS.values(), ids=ALIGN_ERRORS)
def test_align_refuses(told, lag, parts):
    days, *rest = told
    with fails(*parts):
        align(make_panel(np.ones((4, 2))), publications([f"2020-01-0{d}" for d in days], *rest), lag)


def test_empty_values_and_symbols_that_the_panel_lacks_are_no_duplicates():
    told = publications(["2020-01-01"] * 5, [1, NAN, 2, 8, 9], [0, 0, 1, -1, -1])
    assert_same_bits(align(make_panel(np.ones((2, 2))), told, 0)["x"], np.array([[1.0, 2], [1, 2]]))


# --- columns of the market's own file


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_columns_of_a_long_file(tmp_path, name):
    path = write(tmp_path, name, LONG)
    panel = load_panel(path, columns=("RISK", "mean"))
    assert list(panel.extras) == ["RISK", "mean"] and list(panel.fields) == ["close"]  # named as they were asked for
    assert_same_bits(panel.extras["mean"], np.array([[NAN, NAN], [10, 20], [11, 20]]))
    assert_same_bits(panel.extras["RISK"], np.array([[NAN, NAN], [NAN, NAN], [5, NAN]]))
    exact = load_panel(path, columns=["mean", "risk"], series_lag=0)
    assert_same_bits(exact.extras["mean"], np.array([[10.0, 20], [11, 20], [11, 22]]))


def test_columns_of_a_folder_wait_for_bars_of_the_market_not_of_the_file(tmp_path):
    (tmp_path / "A.csv").write_text("date,close,Mean\n2020-01-01,1,10\n2020-01-02,1,11\n2020-01-03,1,\n")
    (tmp_path / "B.csv").write_text("date,mean,close\n2020-01-01,20,1\n2020-01-03,22,1\n")
    long = load_panel(
        write(tmp_path.parent, "long.csv", LONG.replace("risk", "volume").replace(",\n", ",0\n")), columns=["mean"]
    )
    panel = load_panel(str(tmp_path), columns=["mean"])
    assert panel.symbols == long.symbols
    assert_same_bits(panel.extras["mean"], long.extras["mean"])


def test_columns_of_a_one_symbol_file(tmp_path):
    path = write(tmp_path, "SPY.csv", "date,close,mean\n2020-01-01,1,10\n2020-01-02,1,11\n")
    assert_same_bits(load_panel(path, columns=["mean"]).extras["mean"], np.array([[NAN], [10.0]]))
    assert (
        load_panel(path, columns=["mean"], end="2020-01-02").sha256 != load_panel(path, columns=["mean"], series_lag=0).sha256
    )


def test_adjusted_close_may_be_asked_for_besides_close(tmp_path):
    path = write(tmp_path, "m.csv", "date,close,Adj Close\n2020-01-01,4,2\n2020-01-02,4,3\n")
    panel = load_panel(path, columns=["adj close"], series_lag=0)
    assert panel.close[:, 0].tolist() == [4, 4] and panel.extras["adj close"][:, 0].tolist() == [2, 3]


COLUMN_ERRORS = {
    "not asked for": (LONG, ["mean"], ["m.csv", "unknown", "'risk'"]),
    "not there": (LONG, ["mean", "risk", "vix"], ["m.csv", "no column 'vix'", "'close', 'Mean', 'risk'"]),
    "a price": (LONG, ["mean", "risk", "close"], ["m.csv", "'close'", "a name other than"]),
    "twice": (LONG, ["mean", "risk", "Mean"], ["m.csv", "'Mean'", "a name other than", "'mean'"]),
    "twice there": (LONG.replace("risk", "mean"), ["mean"], ["m.csv", "repeated column 'mean'"]),
    "the time": (LONG, ["mean", "risk", "date"], ["m.csv", "no column 'date'"]),
    "one string": (LONG, "mean", ["m.csv", "'mean'", "a list of names"]),
    "text": (LONG.replace("11", "x"), ["mean", "risk"], ["m.csv", "'Mean'", "data row 3", "'x'", "a number"]),
    "infinite": (LONG.replace("11", "inf"), ["mean", "risk"], ["m.csv", "'Mean'", "data row 3", "inf", "finite"]),
    "empty": ("date,close,x\n2020-01-01,1,\n2020-01-02,1,\n", ["x"], ["m.csv", "'x'", "no value in any row"]),
    "too late": ("date,close,x\n2020-01-01,1,\n2020-01-02,1,7\n", ["x"], ["'x'", "2020-01-02", "lag of 1"]),
    "wide": ("date,A,x\n2020-01-01,1,1\n2020-01-02,1,1\n", ["x"], ["m.csv", "['x']", "wide", "'A', 'x'"]),
    "no close": ("date,Adj Close\n2020-01-01,1\n2020-01-02,1\n", ["adj close"], ["m.csv", "no close column"]),
}


@pytest.mark.parametrize("text, columns, parts", COLUMN_ERRORS.values(), ids=COLUMN_ERRORS)
def test_column_errors_say_where(tmp_path, text, columns, parts):
    with fails(*parts):
        load_panel(write(tmp_path, "m.csv", text), columns=columns)


def test_columns_are_refused_where_there_are_none(tmp_path):
    with fails("sp500", "['x']", "closes only"):
        load_panel("sp500", columns=["x"])
    (tmp_path / "A.csv").write_text("date,close,x\n2020-01-01,1,1\n2020-01-02,1,1\n")
    (tmp_path / "B.csv").write_text("date,close\n2020-01-01,1\n2020-01-02,1\n")
    with fails("B.csv", "no column 'x'", "['close']"):
        load_panel(str(tmp_path), columns=["x"])


# --- a file of series


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_global_series(tmp_path, name):
    market = write(tmp_path, "m.csv", "date,A,B\n2020-01-01,1,1\n2020-01-02,1,1\n2020-01-03,1,1\n")
    text = "date, Rate ,published,cpi\n2020-01-03,3,2020-01-02,\n2019-12-01,1,2020-01-01,5\n"  # unsorted; date is ignored
    panel = load_panel(market, series=write(tmp_path, name, text))
    assert list(panel.extras) == ["Rate", "cpi"]
    assert_same_bits(panel.extras["Rate"], np.array([NAN, 1, 3]))
    assert_same_bits(panel.extras["cpi"], np.array([NAN, 5, 5]))
    exact = load_panel(market, series=write(tmp_path, name, text), series_lag=0)
    assert_same_bits(exact.extras["Rate"], np.array([1.0, 3, 3]))


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_series_per_symbol(tmp_path, name):
    market = write(tmp_path, "m.csv", "date,A,B\n2020-01-01,1,1\n2020-01-02,1,1\n2020-01-03,1,1\n")
    text = "date,Ticker,x\n2020-01-01,X,9\n2020-01-02,B,2\n2020-01-01,B,1\n2020-01-01,X,9\n"
    panel = load_panel(market, series=write(tmp_path, name, text))
    assert_same_bits(panel.extras["x"], np.array([[NAN, NAN], [NAN, 1], [NAN, 2]]))


def test_columns_and_series_together_in_utc(tmp_path):
    market = write(tmp_path, "m.csv", UTC)
    series = write(tmp_path, "s.csv", "time,rate\n2020-01-01T01:00+01:00,4\n")
    panel = load_panel(market, columns=["mean", "risk"], series=series)
    assert list(panel.extras) == ["mean", "risk", "rate"] and panel.timezone == "UTC"
    assert_same_bits(panel.extras["rate"], np.array([NAN, 4]))


SERIES_ERRORS = {
    "no time": ("day,x\n2020-01-01,1\n", ["s.csv", "time columns are []", "'day', 'x'", "'published'", "timestamp"]),
    "two times": ("date,time,x\n2020-01-01,2020-01-01,1\n", ["s.csv", "time columns are", "'date', 'time'", "'published'"]),
    "published twice": (
        "Published,published\n2020-01-01,2020-01-01\n",
        ["s.csv", "time columns are", "'Published', 'published'"],
    ),
    "no series": ("published,date,symbol\n2020-01-01,2020-01-01,A\n", ["s.csv", "no series besides 'published'"]),
    "header only": ("published,x\n", ["s.csv", "header only"]),
    "bad time": ("published,x\n2020-01-01,1\nsoon,1\n", ["s.csv", "'published'", "data row 2", "'soon'", "ISO"]),
    "text": ("published,x\n2020-01-01,1\n2020-01-02,up\n", ["s.csv", "'x'", "data row 2", "'up'", "a number"]),
    "bool": ("published,x\n2020-01-01,True\n", ["s.csv", "'x'", "data row 1", "'True'", "a number"]),
    "infinite": ("published,x\n2020-01-01,1\n2020-01-02,-inf\n", ["s.csv", "'x'", "data row 2", "-inf", "finite"]),
    "duplicate": ("published,x\n2020-01-02,1\n2020-01-02,1\n", ["s.csv", "'x'", "data row 2", "duplicate of data row 1"]),
    "duplicate of a symbol": (
        "published,symbol,x\n2020-01-02,B,1\n2020-01-02,A,1\n2020-01-02 00:00,B,2\n",
        ["s.csv", "'x'", "symbol 'B'", "data row 3", "2020-01-02", "duplicate of data row 1"],
    ),
    "no symbol": ("published,symbol,x\n2020-01-02,B,1\n2020-01-02,,1\n", ["s.csv", "'symbol'", "data row 2", "a symbol"]),
    "other symbols": ("published,symbol,x\n2020-01-02,C,1\n", ["s.csv", "'symbol'", "no overlap", "['C']", "['A', 'B']"]),
    "zone": ("published,x\n2020-01-01T00Z,1\n", ["s.csv", "'published'", "are UTC", "expected without a time zone", "m.csv"]),
    "a price": ("published,Volume\n2020-01-01,1\n", ["s.csv", "'Volume'", "a name other than", "'volume'"]),
    "a column": ("published,RISK\n2020-01-01,1\n", ["s.csv", "'RISK'", "a name other than", "'risk'"]),
    "same name": ("published,x,X\n2020-01-01,1,1\n", ["s.csv", "'X'", "a name other than", "'x'"]),
    "too late": (
        "published,x\n2020-01-03,1\n2021-01-01,\n",
        ["s.csv", "no overlap in time", "'x'", "2020-01-03T00:00:00 to 2020-01-03T00:00:00", "lag of 1"],
    ),
    "no values": ("published,x\n2020-01-01,\n", ["s.csv", "no overlap in time", "'x'", "no value in any row"]),
    "none of ours": (
        "published,symbol,x,y\n2020-01-01,A,1,\n2020-01-01,C,1,1\n",
        ["s.csv", "no overlap in time", "'y'", "no value"],
    ),
}


@pytest.mark.parametrize("text, parts", SERIES_ERRORS.values(), ids=SERIES_ERRORS)
def test_series_errors_say_where(tmp_path, text, parts):
    market, series = write(tmp_path, "m.csv", LONG), write(tmp_path, "s.csv", text)
    with fails(*parts):
        load_panel(market, columns=["mean", "risk"], series=series)


def test_series_without_a_zone_do_not_fit_a_market_in_utc(tmp_path):
    market = write(tmp_path, "m.csv", UTC)
    with fails("s.csv", "'date'", "are without a time zone", "expected UTC", "m.csv"):
        load_panel(market, columns=["mean", "risk"], series=write(tmp_path, "s.csv", "date,x\n2020-01-01,1\n"))


@pytest.mark.parametrize("series", ["", "s.txt", "sp500"])
def test_series_come_from_csv_and_parquet_files_only(tmp_path, series):
    with fails(f"series {series!r}", ".csv or .parquet"):
        load_panel(write(tmp_path, "m.csv", LONG), columns=["mean", "risk"], series=series)
    with fails("s.csv", "no such file"):
        load_panel(write(tmp_path, "m.csv", LONG), columns=["mean", "risk"], series=str(tmp_path / "s.csv"))


def test_a_negative_lag_is_refused_from_either_source(tmp_path):
    path = write(tmp_path, "m.csv", LONG)
    with fails("m.csv", "lag is -1"):
        load_panel(path, columns=["mean", "risk"], series_lag=-1)
    with fails("s.csv", "lag is -2"):
        load_panel("sp500", series=write(tmp_path, "s.csv", "date,x\n2000-01-01,1\n"), series_lag=-2)


def test_what_was_published_before_start_is_known_and_the_lag_counts_bars_of_the_file(tmp_path):
    days = pd.date_range("2020-01-01", periods=8).astype(str)
    market = write(tmp_path, "m.csv", "\n".join(["date,A,B", *(f"{d},1,1" for d in days)]))
    series = write(tmp_path, "s.csv", "published,symbol,x\n2020-01-01,A,1\n2020-01-01,B,2\n2020-01-07,B,3\n")
    panel = load_panel(market, series=series, symbols=["B"], start="2020-01-05", resample="2D")
    assert panel.timestamps.astype("datetime64[D]").astype(str).tolist() == ["2020-01-06", "2020-01-08"]
    assert_same_bits(panel.extras["x"], np.array([[2.0], [3.0]]))  # that of 7 January is known on the 8th


def test_load_market_passes_series_on_and_a_synthetic_market_takes_none(tmp_path):
    path, series = write(tmp_path, "m.csv", LONG), write(tmp_path, "s.csv", "date,x\n2020-01-01,1\n")
    options = dict(columns=("mean", "risk"), series=series, series_lag=0)
    panel = load_market(path, 3, **options)
    assert panel.sha256 == load_panel(path, **options).sha256 and list(panel.extras) == ["mean", "risk", "x"]
    spec = "synthetic:noise:assets=2:bars=300:train=1:val=1:test=1"
    load_market(spec, columns=(), series=None, series_lag=0)
    for key in ("columns", "series"):
        with fails(spec, f"--{key}"):
            load_market(spec, **{key: options[key]})


# --- extras of a panel


def with_extras(panel):
    own = np.arange(2.0 * panel.num_bars).reshape(-1, 2)
    return make_panel(panel.close, panel.timestamps, segments=panel.segments, extras={"own": own, "all": own[:, 0].copy()})


def test_select_cuts_extras():
    panel = with_extras(three_histories())
    part = panel.select(["A"], start="2020-01-02")
    rows = [1, 3, 5, 6, 8, 9, 10, 11]  # at rows 0, 4 and 7 it is 1 January, at row 2 A has no bar
    assert_same_bits(part.extras["own"], panel.extras["own"][rows, :1])
    assert_same_bits(part.extras["all"], panel.extras["all"][rows])
    swapped = panel.select(["B", "A"])
    assert_same_bits(swapped.extras["own"], np.ascontiguousarray(panel.extras["own"][:, ::-1]))


def test_resample_keeps_the_extras_of_the_last_merged_row():
    times = np.datetime64("2020-01-01", "ns") + np.array([0, 1, 3, 4, 9, 10]) * np.timedelta64(1, "h")
    close = [[2, 2], [2, NAN], [NAN, 2], [2, 2], [2, 2], [2, 2]]
    all_ = np.array([0, 1, NAN, 3, 4, 5])
    own = np.arange(12.0).reshape(6, 2)
    panel = ohlcv_panel(times, close, extras={"own": own, "all": all_}).resample("4h")
    assert_same_bits(panel.extras["own"], own[[2, 3, 5]])
    assert_same_bits(panel.extras["all"], all_[[2, 3, 5]])  # also where nothing is known there


EXTRAS_ERRORS = {
    "rows": (np.ones((2, 2)), ["(2, 2)", "(3, 2)"]),
    "symbols": (np.ones((3, 1)), ["(3, 1)", "(3, 2)"]),
    "length": (np.ones(2), ["(2,)", "(3,)"]),
    "axes": (np.ones((3, 2, 1)), ["(3, 2, 1)"]),
    "scalar": (np.array(1.0), ["float64 ()"]),
    "float32": (np.ones(3, dtype=np.float32), ["float32", "float64"]),
    "int": (np.ones((3, 2), dtype=np.int64), ["int64", "float64"]),
    "infinite": (np.array([1, np.inf, 1]), ["infinite", "finite or NaN"]),
    "minus infinity": (np.array([NAN, -np.inf, 1]), ["infinite"]),
}


@pytest.mark.parametrize("values, parts", EXTRAS_ERRORS.values(), ids=EXTRAS_ERRORS)
def test_a_panel_refuses_bad_extras(values, parts):
    with fails("test", "'x'", *parts):
        make_panel(np.ones((3, 2)), extras={"x": values})


def test_sha256_covers_extras_and_is_what_it_was_without():
    plain = make_panel([[1, NAN], [2, 3], [4, 5]])
    assert plain.sha256 == "2155c9bb1cda986a8dd195b08330f394add71c015f6f56b78eec01994cf2587a"
    own, other_nan = np.arange(6.0).reshape(3, 2), np.array([0xFFF8000000000001], dtype=np.uint64).view(np.float64)[0]
    changed = own.copy()
    changed[2, 1] = 7
    gap, same_gap = own.copy(), own.copy()
    gap[0], same_gap[0] = NAN, other_nan
    extras = [{}, {"x": own}, {"y": own}, {"x": changed}, {"x": gap}, {"x": own[:, 0]}, {"x": own, "y": own}]
    digests = [make_panel(plain.close, extras=e).sha256 for e in extras]
    assert digests[0] == plain.sha256 and len(set(digests)) == len(digests)
    assert make_panel(plain.close, extras={"x": same_gap}).sha256 == make_panel(plain.close, extras={"x": gap}).sha256


def test_tampering_replaces_extras_after_t_and_nothing_before():
    panel = with_extras(make_panel(np.ones((9, 2))))
    after = tampered(panel, 5, np.random.default_rng(0))
    for name, values in panel.extras.items():
        assert_same_bits(after.extras[name][:6], values[:6])
        assert after.extras[name].shape == values.shape and (after.extras[name][6:] != values[6:]).all()
