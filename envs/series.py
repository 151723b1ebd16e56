"""Input series besides prices, such as forecasts or macro data: what was published when becomes `Panel.extras`.

At bar t an agent may see what was published at or before the time of bar t - lag. The lag is 1 unless asked otherwise: a
publication stamped with a date may have come out after that day's close.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from envs.panel import FIELDS, Panel, PanelError

if TYPE_CHECKING:
    from envs.files import _Table


@dataclass(frozen=True)
class Publications:
    """R rows of a file, in its order: what became known when, and about which symbol.

    source: the file, for messages.
    published: (R,) datetime64[ns], in the panel's time zone.
    columns: (R,) int64, the panel's symbol of each row, -1 for one that the panel lacks; or None: about all symbols.
    series: name and (R,) float64 values of each series, finite, or NaN where a row publishes nothing.
    """

    source: str
    published: np.ndarray
    columns: np.ndarray | None
    series: list[tuple[str, np.ndarray]]


def align(panel: Panel, publications: Publications, lag: int = 1) -> dict[str, np.ndarray]:
    """Name -> (T, N), or (T,) if about all symbols: at row t the value published latest, at or before the time of row
    t - lag; NaN before a symbol's first one, and where row t - lag lies before the segment of row t.

    Raises PanelError if lag is no whole number >= 0, or a series has two values for the same symbol and time.
    """
    if not isinstance(lag, int | np.integer) or lag < 0:
        raise PanelError(f"{publications.source}: series lag is {lag!r}, expected a whole number of bars >= 0")
    rows = np.arange(panel.num_bars) - lag
    known = rows >= panel.segments[panel.segment_of_row]
    cutoff = panel.timestamps[np.maximum(rows, 0)]
    shared = publications.columns is None
    columns = np.zeros(len(publications.published), dtype=np.int64) if shared else publications.columns
    order = np.lexsort((publications.published, columns))  # stable: duplicates stay in the file's order
    order = order[columns[order] >= 0]
    aligned = {}
    for name, values in publications.series:
        kept = order[~np.isnan(values[order])]
        published, owner, value = publications.published[kept], columns[kept], values[kept]
        again = 1 + np.flatnonzero((published[1:] == published[:-1]) & (owner[1:] == owner[:-1]))
        if again.size:
            i = again[kept[again].argmin()]
            about = "" if shared else f"symbol {panel.symbols[owner[i]]!r}, "
            raise PanelError(
                f"{publications.source}: column {name!r}, {about}data row {kept[i] + 1}: {value[i]} published "
                f"{published[i]} is a duplicate of data row {kept[i - 1] + 1}, expected one value per symbol and time"
            )
        result = np.full((panel.num_bars, 1 if shared else panel.num_symbols), np.nan)
        edges = np.searchsorted(owner, np.arange(result.shape[1] + 1))
        for column, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            latest = start - 1 + np.searchsorted(published[start:stop], cutoff, side="right")
            seen = known & (latest >= start)
            result[seen, column] = value[latest[seen]]
        aligned[name] = result[:, 0] if shared else result
    return aligned


def add_series(panel: Panel, publications: Publications, lag: int = 1) -> Panel:
    """The panel with the aligned series among its extras.

    Raises PanelError as `align` does, if a name is taken by a field or another series whatever its capitals, or if a
    series has no value at any bar.
    """
    source, taken = publications.source, {*FIELDS, *map(str.lower, panel.extras)}
    for name, _ in publications.series:
        if name.lower() in taken:
            raise PanelError(f"{source}: series {name!r}: expected a name other than those taken: {sorted(taken)}")
        taken.add(name.lower())
    extras = align(panel, publications, lag)
    for name, values in publications.series:
        if np.isnan(extras[name]).all():
            relevant = ~np.isnan(values)
            if publications.columns is not None:
                relevant &= publications.columns >= 0
            times = publications.published[relevant]
            found = f"is published from {times.min()!s:.19} to {times.max()!s:.19}" if times.size else "has no value in any row"
            raise PanelError(
                f"{source}: no overlap in time: series {name!r} {found}, expected a value that the bars from "
                f"{panel.timestamps.min()!s:.19} to {panel.timestamps.max()!s:.19} know with a lag of {lag}"
            )
    return replace(panel, extras=panel.extras | extras)


def read_publications(table: "_Table", panel: Panel) -> Publications:
    """Every column of a table of series, for the symbols that the panel has.

    Raises PanelError if there is none, a value is no finite number, times have a zone and the panel's do not or the
    reverse, or no symbol is the panel's.
    """
    path = table.path
    if not table.columns:
        raise PanelError(f"{path}: no series besides {table.time!r}, expected one or more columns of numbers")
    published, timezone = table.times()
    if timezone != panel.timezone:
        found, expected = (zone or "without a time zone" for zone in (timezone, panel.timezone))
        raise PanelError(f"{path}: column {table.time!r}: times are {found}, expected {expected} as in {panel.name}")
    columns = None
    if table.symbol is not None:
        codes, symbols = table.names()
        at = {symbol: i for i, symbol in enumerate(panel.symbols)}
        columns = np.array([at.get(symbol, -1) for symbol in symbols])[codes]
        if columns.max() < 0:
            raise PanelError(
                f"{path}: column {table.symbol!r}: no overlap: symbols are {list(symbols)}, expected some of "
                f"{list(panel.symbols)} as in {panel.name}"
            )
    return Publications(str(path), published, columns, [(c.strip(), table.finite(c)) for c in table.columns])
