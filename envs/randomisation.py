"""Domain randomisation: keys of a synthetic market whose value every history draws anew, such as `beta_fast=0.5..2`.

- `low..high`: uniform between the two; of whole numbers, both included.
- `low~high`: log-uniform, both above 0.
- `a|b|c`: any of these, equally likely.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from envs.costs import as_number
from envs.histories import Histories
from envs.panel import SPLIT_NAMES

SIZES = tuple(f.name for f in fields(Histories))  # of the panel, and so the same in all histories


@dataclass(frozen=True)
class Drawn:
    """What a key is drawn from: `kind` (int or float), `how` ("..", "~" or "|") and the bounds, or the alternatives."""

    kind: type
    how: str
    values: tuple[float, ...]

    def draw(self, rng: np.random.Generator) -> float:
        """A value of type `kind`; one draw from `rng`."""
        if self.how == "|":
            return self.values[rng.integers(len(self.values))]
        low, high = self.values
        if self.kind is float:
            return float(rng.uniform(low, high) if self.how == ".." else np.exp(rng.uniform(np.log(low), np.log(high))))
        if self.how == "..":
            return int(rng.integers(low, high, endpoint=True))
        # each n stands for the logs from n to n + 1; rounding could reach the upper end
        return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))


def drawn_or_number(key: str, kind: type, text: str) -> Drawn | float:
    """The value of `key` in a market's specification: a number of type `kind`, or what every history draws one from.

    Raises ValueError saying what was expected; `costs.parse_values` adds the key.
    """
    how = next((sign for sign in ("|", "..", "~") if sign in text), None)
    if how is None:
        return as_number(key, kind, text)
    if key in SIZES:
        raise ValueError(f"expected {kind.__name__}, the same in all histories")
    values = tuple(as_number(key, kind, part) for part in text.split(how))
    if not np.isfinite(values).all():
        raise ValueError("expected finite numbers")
    if how != "|" and not (len(values) == 2 and values[0] < values[1]):
        raise ValueError(f"expected low{how}high with low below high")
    if how == "~" and values[0] <= 0:
        raise ValueError("expected low~high with low above 0")
    return Drawn(kind, how, values)


def randomised(
    default: Histories, values: dict[str, Drawn | float], seed: int
) -> tuple[list[tuple[int, int]], list[Histories], dict[str, np.ndarray]]:
    """The histories of a market, each with keys of its own: their numbers (split, j), their configurations, and what was drawn.

    default: the market; values: of its keys, as given. What history j of a split draws, in the order of the keys' names,
    depends on the seed, the split and j. Drawn values come as name -> (histories,) float64, without them {}.

    Raises ValueError, of the market, naming the key whose value it does not accept.
    """
    ranges = {key: values[key] for key in sorted(values) if isinstance(values[key], Drawn)}
    fixed = {key: value for key, value in values.items() if key not in ranges}
    sizes = [fixed.get(name, getattr(default, name)) for name in SPLIT_NAMES]
    # the market refuses a split without histories, if there is one history to make
    histories = [(split, j) for split, size in enumerate(sizes) for j in range(max(1, size))]
    configs, parameters = [], {key: np.zeros(len(histories)) for key in ranges}
    for i, history in enumerate(histories):
        # Numbers of its own: prices are drawn from [seed, *history] and [seed, *history, 1], prefixes of markets use up
        # [seed, *history, 2] and on. A seed sequence reads missing entries as zeros.
        rng = np.random.default_rng([seed, *history, 0, 1])
        drawn = {key: source.draw(rng) for key, source in ranges.items()}
        configs.append(replace(default, **fixed, **drawn))
        for key, value in drawn.items():
            parameters[key][i] = value
    return histories, configs, parameters
