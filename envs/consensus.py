"""Simple forecasts of every symbol's next bar, what they agree on, and whether that is worth the cost of trading on it."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numba import njit

from envs.costs import Costs
from envs.panel import Panel, PanelError

REASONS = ("pass", "small", "dispersed", "missed", "no_data")  # why a forecast is acted upon, or not
PASS, SMALL, DISPERSED, MISSED, NO_DATA = range(len(REASONS))
SHORT, LONG = 5, 20  # bars of the forecasters
FORECASTERS = (f"momentum_{SHORT}", f"momentum_{LONG}", f"reversion_{LONG}", f"breakout_{LONG}")
HALF_LIFE = 120.0  # bars, of what the regressions remember
PRIOR = 20.0  # bars without any relation that they begin with
HIT_BARS, FEWEST_HITS = 60, 20  # decided bars that a hit rate counts at most, and at least
WIDEST = 2.0  # dispersion, in units of the consensus, above which forecasters do not agree
LOWEST_HIT_RATE = 0.5
SMALLEST_EDGE = 0.1  # of 2 h - 1 in the threshold
SERIES = ("consensus", "dispersion", "hit_rate", "threshold", *(f"reason_{name}" for name in REASONS))


class Consensus(NamedTuple):
    """Diagnostics at every bar's close, each (T, N); NaN where nothing is known yet, or the symbol has no bar.

    mean, dispersion: of the forecasts of the log return to the symbol's next bar, and their standard deviation over the
    forecasters; hit_rate: share of the last HIT_BARS decided bars, with known outcome, in which the sign of the consensus was
    right (a bar is decided where neither consensus nor outcome is 0); threshold: what the size of the consensus must reach;
    reason: int8, number in REASONS.
    """

    mean: np.ndarray
    dispersion: np.ndarray
    hit_rate: np.ndarray
    threshold: np.ndarray
    reason: np.ndarray


def round_trip(costs: Costs) -> float:
    """Cost of buying and selling, as a fraction of the value, without what grows with the size of the trade."""
    return 2e-4 * (costs.commission_bps + costs.half_spread_bps + costs.slippage_bps + costs.linear_impact_bps)


def consensus(panel: Panel, costs: Costs) -> Consensus:
    """Diagnostics of simple forecasts, from bars that have closed and outcomes that are known.

    Forecasters: momentum (log price less that of 5, of 20 bars before), reversion (mean log price of 20 bars less the present
    one), breakout (1 at the highest close of 20 bars, -1 at the lowest, else 0), and each of the panel's extra series of
    symbols (NaN counts as 0). Each one's signal is turned into a forecast by the regression of the outcomes known so far on
    it, through the origin, with weights that halve in HALF_LIFE bars, shrunk by n / (n + PRIOR) where n is their sum. A window
    that reaches back before the symbol's listing begins there. Bars count by symbol: those at which it trades.

    The first reason that holds: `no_data` (fewer than FEWEST_HITS decided bars), `missed` (hit rate of LOWEST_HIT_RATE or
    less), `dispersed` (dispersion above WIDEST times the size of the consensus), `small` (size below the threshold), `pass`.
    The threshold is round_trip / max(2 h - 1, SMALLEST_EDGE) at a hit rate of h: a move of size m, guessed with probability h,
    earns (2 h - 1) m on average, the edge of Kelly (1956), and must pay for the round trip.
    """
    price = np.log(panel.filled("close"))
    own = [np.nan_to_num(x) for x in panel.extras.values() if x.ndim == 2]
    extras = np.stack(own, axis=2) if own else np.zeros((*price.shape, 0))
    return Consensus(
        *_consensus(price, panel.present, panel.segments, extras, 0.5 ** (1.0 / HALF_LIFE), round_trip(costs)),
    )


def with_consensus(panel: Panel, costs: Costs) -> Panel:
    """The panel with the extra series SERIES, the reasons as 0 or 1, after its own; Trading-v0 shows them in `forecasts`.

    Raises PanelError if it has a series of one of these names.
    """
    taken = [name for name in SERIES if name in panel.extras]
    if taken:
        raise PanelError(f"{panel.name}: extra series {taken} exist; expected none of {list(SERIES)}")
    found = consensus(panel, costs)
    reasons = [(found.reason == number).astype(np.float64) for number in range(len(REASONS))]
    return replace(panel, extras={**panel.extras, **dict(zip(SERIES, (*found[:4], *reasons)))})


@njit(cache=True, error_model="numpy")
def _consensus(price, present, segments, extras, keep, cost):
    rows, symbols = price.shape
    count = 4 + extras.shape[2]
    mean, dispersion = np.full((rows, symbols), np.nan), np.full((rows, symbols), np.nan)
    hit_rate, threshold = np.full((rows, symbols), np.nan), np.full((rows, symbols), np.nan)
    reason = np.full((rows, symbols), NO_DATA, np.int8)
    path, signal = np.zeros(LONG + 1), np.zeros(count)  # the symbol's last log prices, the newest at the end; its signals
    cross, square, hits = np.zeros(count), np.zeros(count), np.zeros(HIT_BARS)
    ends = np.append(segments[1:], rows)
    for i in range(symbols):
        for k in range(len(segments)):
            bars, weight, decided, last = 0, 0.0, 0, 0.0
            cross[:], square[:] = 0.0, 0.0
            for t in range(segments[k], ends[k]):
                if not present[t, i]:
                    continue
                if bars == 0:
                    path[:] = price[t, i]
                else:
                    outcome = price[t, i] - path[LONG]  # of the bar before, at which signals and consensus were known
                    weight = keep * weight + 1.0
                    for f in range(count):
                        cross[f] = keep * cross[f] + signal[f] * outcome
                        square[f] = keep * square[f] + signal[f] * signal[f]
                    if outcome != 0.0 and last != 0.0:
                        hits[decided % HIT_BARS] = 1.0 if outcome * last > 0.0 else 0.0
                        decided += 1
                    path[:LONG] = path[1:]
                    path[LONG] = price[t, i]
                bars += 1
                window = path[1:]
                signal[0] = path[LONG] - path[LONG - SHORT]
                signal[1] = path[LONG] - path[0]
                known = min(bars, LONG)
                signal[2] = window[LONG - known :].mean() - path[LONG]
                signal[3] = 0.0
                if window.max() > window.min():
                    signal[3] = 1.0 if path[LONG] == window.max() else -1.0 if path[LONG] == window.min() else 0.0
                for f in range(4, count):
                    signal[f] = extras[t, i, f - 4]
                total, squares = 0.0, 0.0
                for f in range(count):
                    slope = cross[f] / square[f] * weight / (weight + PRIOR) if square[f] > 0.0 else 0.0
                    total += slope * signal[f]
                    squares += (slope * signal[f]) ** 2
                last = total / count
                spread = np.sqrt(max(0.0, squares / count - last * last))
                mean[t, i], dispersion[t, i] = last, spread
                if decided < FEWEST_HITS:
                    continue
                h = hits[: min(decided, HIT_BARS)].mean()
                needed = cost / max(2.0 * h - 1.0, SMALLEST_EDGE)
                hit_rate[t, i], threshold[t, i] = h, needed
                if h <= LOWEST_HIT_RATE:
                    reason[t, i] = MISSED
                elif spread > WIDEST * abs(last):
                    reason[t, i] = DISPERSED
                elif abs(last) < needed:
                    reason[t, i] = SMALL
                else:
                    reason[t, i] = PASS
    return mean, dispersion, hit_rate, threshold, reason
