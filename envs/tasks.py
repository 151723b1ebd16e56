"""Tasks of meta-learning on markets: a task is one range of a split, a synthetic history or a slice of a real one."""

import numpy as np
import pandas as pd

from envs.features import REGIME_FEATURES, regime_features
from envs.panel import Panel, PanelError, Split

HELD_OUT = 1_000_000  # of Bandits-v0 and Navigation2D-v0: the first held-out task; those below are to train on

# Markets whose histories differ in what is best, each history a task. The first three are for LeadLag-v0: from the first bar to
# the last the followers of the strong network react in the session, or overnight (`synthetic.Hidden`). In the first case a
# lookback of 27 bars earns more than twice what the longest one does, in the second it loses what it earned. Closes do not
# tell which, and news is noise: only rewards do. Drift comes up or down independently of it. The best lookback of each task
# beats the best one for all of them by about 0.32, 0.36 and 0.33 of log growth a year, with a standard error of 0.04 over 120
# tasks; fixed lookbacks on the first half of a history tell which is the better of the two in 99% of them.
# The others are for Portfolio-v0. Long only the Merton fraction, drift / vol^2 within 0 and 1, is best; half a history of drift
# can be seen in the observation, as the market's drawdown. On portfolio-signal forecasts of the next bar mean what they say,
# or the opposite: no observation tells which.
_PERSISTENT = "synthetic:hidden:bars=1000:train=120:val=20:test=40:regime_bars=1e9:news=0"
_BROWNIAN = "synthetic:merton:bars=600:train=150:val=20:test=40"
_FORECASTS = "synthetic:garleanu-pedersen:assets=2:vol=0.03:reversion_slow=1:reversion_fast=1:bars=600:train=300:val=20:test=40"
TASK_SETS = {
    "bull-bear": f"{_PERSISTENT}:drift=-0.03|0.03:beta_fast=2.5:beta_slow=0.4",
    "mixed": f"{_PERSISTENT}:drift=-0.05..0.05:vol=0.006~0.02:beta_fast=2..3:beta_slow=0.3..0.5",
    "planted-lag": f"{_PERSISTENT}:life_fast=40~160:beta_fast=2..3:beta_slow=0.2..0.5",
    "portfolio-bull-bear": f"{_BROWNIAN}:drift=-0.003|0.003:vol=0.03",
    "portfolio-signal": f"{_FORECASTS}:strength=0.5:sign=-1|1",
    "portfolio-mixed": f"{_BROWNIAN}:drift=-0.004..0.004:vol=0.02~0.06",
}


def halves(split: Split, share: float = 0.5) -> tuple[Split, Split]:
    """Every range cut in time: (its first `share`, to adapt on; the rest, to be scored), range i of both from range i.

    The cut is at start + round(share * length). No bar that is marked in the second part is traded or marked in the first;
    features of the second part may look back into the first, which is its past. Both keep the split's name.

    Raises ValueError if `share` is not inside (0, 1), PanelError if a part of a range holds fewer than two rows.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}: expected a fraction in (0, 1)")
    start, stop = split.ranges.T
    cut = start + np.rint(share * (stop - start)).astype(np.int64)
    first, second = (np.column_stack(bounds) for bounds in ((start, cut), (cut, stop)))
    return Split(split.name, first, split.weights), Split(split.name, second, split.weights)


def slices(panel: Panel, split: Split, bars: int, warmup: int = 60) -> Split:
    """The ranges of `split` in slices of `bars` rows, one after another: the tasks of a real history.

    `slice_regimes` labels them. A rest that is shorter than `bars` belongs to none. A slice begins `warmup` rows after the
    start of its history or later, so that features with windows of so many bars are known at its first row; weights are
    dropped.

    Raises ValueError if bars < 2 or warmup < 0, PanelError if no slice is that long.
    """
    if bars < 2 or warmup < 0:
        raise ValueError(f"bars={bars}, warmup={warmup}: expected at least 2 and 0")
    ranges = []
    for start, stop in split.ranges.tolist():
        history = int(panel.segments[panel.segment_of_row[start]])
        first = max(start, history + warmup)
        ranges += [(a, a + bars) for a in range(first, stop - bars + 1, bars)]
    if not ranges:
        longest = int(np.diff(split.ranges, axis=1).max())
        raise PanelError(
            f"{panel.name}: split {split.name!r}: no slice of {bars} rows after {warmup} of warm-up; its longest range has "
            f"{longest}, expected at least {bars}"
        )
    return Split(split.name, np.array(ranges))


def regimes(panel: Panel) -> np.ndarray:
    """(T,) int64, the regime at each row, as a number in `features.REGIMES`; -1 in the first 20 rows of a history.

    Volatile: the log volatility of the last 20 bars is above its median over the rows of the history so far; down: the equally
    weighted market has lost in them. Both end with the row, whose close a decision may use.
    """
    features, found = regime_features(panel), np.full(panel.num_bars, -1)
    vol, trend = (features[:, REGIME_FEATURES.index(name)] for name in ("log_vol_20", "trend_20"))
    for start, stop in zip(panel.segments, np.append(panel.segments[1:], panel.num_bars)):
        rows = slice(start + 20, stop)  # the first row with 20 returns
        typical = pd.Series(vol[rows]).expanding().median().to_numpy()
        found[rows] = 2 * (vol[rows] > typical) + (trend[rows] < 0)
    return found


def slice_regimes(panel: Panel, split: Split) -> np.ndarray:
    """(n,) int64, the regime that each range of `split` begins in, as `regimes` has it."""
    return regimes(panel)[split.ranges[:, 0]]
