"""What all synthetic markets have in common: how many price histories, of how many bars, and how a bar is divided."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

OVERNIGHT, INTRADAY = np.sqrt(0.1), np.sqrt(0.9)  # shares of a bar's standard deviation


@dataclass(frozen=True)
class Histories:
    """Keys that every synthetic market takes: how many independent histories of how many bars."""

    assets: int = 10
    bars: int = 3000
    train: int = 8
    val: int = 6
    test: int = 20
    fewest_bars: ClassVar[int] = 300

    def __post_init__(self):
        self.expect(assets=1, bars=self.fewest_bars, train=1, val=1, test=1)

    def expect(self, **least: float):
        """Raises ValueError naming the first key that is below its least value."""
        for key, value in least.items():
            if not getattr(self, key) >= value:
                raise ValueError(f"synthetic market: {key}={getattr(self, key)}: expected at least {value}")

    def expect_inside(self, **bounds: tuple[float, float]):
        """Raises ValueError naming the first key that is not between its bounds."""
        for key, (low, high) in bounds.items():
            if not low < getattr(self, key) < high:
                raise ValueError(f"synthetic market: {key}={getattr(self, key)}: expected a number between {low} and {high}")
