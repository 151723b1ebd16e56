"""Tasks of meta-learning on markets: a task is one range of a split, a synthetic history or a slice of a real one."""

import numpy as np

from envs.panel import Split

# Markets whose histories differ in what is best, each history a task. The first three are for LeadLag-v0: from the first bar to
# the last the followers of the strong network react in the session, or overnight (`synthetic.Hidden`). In the first case a
# lookback of 27 bars earns more than twice what the longest one does, in the second it loses what it earned. Closes do not
# tell which, and news is noise: only rewards do. Drift comes up or down independently of it. The best lookback of each task
# beats the best one for all of them by about 0.32, 0.36 and 0.33 of log growth a year, with a standard error of 0.04 over 120
# tasks; fixed lookbacks on the first half of a history tell which is the better of the two in 99% of them.
# The others are for Portfolio-v0, long only: the Merton fraction, drift / vol^2 within 0 and 1, is best.
_PERSISTENT = "synthetic:hidden:bars=1000:train=120:val=20:test=40:regime_bars=1e9:news=0"
_BROWNIAN = "synthetic:merton:bars=600:train=150:val=20:test=40"
TASK_SETS = {
    "bull-bear": f"{_PERSISTENT}:drift=-0.03|0.03:beta_fast=2.5:beta_slow=0.4",
    "mixed": f"{_PERSISTENT}:drift=-0.05..0.05:vol=0.006~0.02:beta_fast=2..3:beta_slow=0.3..0.5",
    "planted-lag": f"{_PERSISTENT}:life_fast=40~160:beta_fast=2..3:beta_slow=0.2..0.5",
    "portfolio-bull-bear": f"{_BROWNIAN}:drift=-0.003|0.003:vol=0.03",
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
    return Split(split.name, np.column_stack([start, cut])), Split(split.name, np.column_stack([cut, stop]))
