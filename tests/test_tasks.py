"""Tasks of meta-learning: what is scored was never adapted on."""

import numpy as np
import pytest

from envs.panel import PanelError, Split
from envs.tasks import halves

SPLIT = Split("val", np.array([[3, 13], [20, 27], [27, 31]]))


def test_halves_by_hand():
    adapt, score = halves(SPLIT)
    assert adapt.ranges.tolist() == [[3, 8], [20, 24], [27, 29]] and adapt.name == "val"
    assert score.ranges.tolist() == [[8, 13], [24, 27], [29, 31]] and score.name == "val"
    adapt, score = halves(Split("test", SPLIT.ranges[:2]), 0.3)
    assert adapt.ranges.tolist() == [[3, 6], [20, 22]] and score.ranges.tolist() == [[6, 13], [22, 27]]


@pytest.mark.parametrize("share", (0, 1, -0.1, 1.5, np.nan))
def test_a_share_is_a_fraction(share):
    with pytest.raises(ValueError, match=rf"share={share}: expected a fraction in \(0, 1\)"):
        halves(SPLIT, share)


@pytest.mark.parametrize("share, rows", ((0.3, r"\[27, 28\)"), (0.8, r"\[26, 27\)")))
def test_parts_too_short_are_said(share, rows):
    with pytest.raises(PanelError, match=f"split 'val': too few bars: rows {rows} hold 1"):
        halves(SPLIT, share)
