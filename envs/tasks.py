"""Tasks of meta-learning on markets: a task is one range of a split, a synthetic history or a slice of a real one."""

import numpy as np

from envs.panel import Split


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
