"""`mixed[:key=value...]:<market>`: training episodes on a market's own bars and on synthetic histories, in a stated share.

What is tried and scored on stays the market alone: its validation and test bars are those that it has without the prefix.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from envs.costs import parse_options
from envs.panel import Panel, PanelError
from envs.resampled import calendar, leading_options

PREFIX = "mixed"
OWN_SIZES = ("assets", "val", "test")  # of the synthetic market: as many symbols as the source, no histories but for training


@dataclass(frozen=True)
class Mixed:
    """Keys of the prefix; all others are the synthetic market's, among them ranges (`envs/randomisation.py`)."""

    synthetic: str = "leadlag"
    share: float = 0.5  # of the training episodes that lie in synthetic histories

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}: expected a fraction in (0, 1)")


def is_mixed(spec: str) -> bool:
    """Whether a market's specification starts with this prefix."""
    return spec.startswith(f"{PREFIX}:")


def parse_mixed(spec: str) -> tuple[Mixed, str, str]:
    """The prefix's own keys, the options of the synthetic market, and the market that it is mixed into.

    Raises PanelError naming the key and what was expected, or if no market is named.
    """
    options, market = leading_options(spec)
    own = [option for option in options if option.partition("=")[0] in {f.name for f in fields(Mixed)}]
    others = [option for option in options if option not in own]
    for option in others:
        if option.partition("=")[0] in OWN_SIZES:
            raise PanelError(f"--market {spec}: {option}: expected none of {OWN_SIZES}, which follow from the market")
    try:
        return parse_options(":".join(own), Mixed(), f"--market {spec}"), ":".join(others), market
    except ValueError as error:
        raise PanelError(str(error)) from None


def mix(spec: str, source: Panel, synthetic: Panel, share: float) -> Panel:
    """`source`, and after it the training histories of `synthetic`, which has as many symbols.

    An episode of the training split lies in a synthetic history with probability `share` (`Split.weights`), in each with the
    same; otherwise in one of the source's own histories, by its number of bars. A source of one history keeps being cut in
    time by `Panel.split`. Synthetic histories get the source's symbols, its fields and, over again, the bar lengths of its
    first history; its extra series are unknown (NaN) there, and theirs are dropped. `hidden` is dropped. `parameters` tell
    `synthetic`, 1 or 0, besides those of both, NaN where they do not apply.

    Raises PanelError as `resampled.calendar` does.
    """
    edges = np.append(synthetic.segments, synthetic.num_bars)
    chosen = [k for k, label in enumerate(synthetic.segment_split) if label == "train"]
    rows = np.concatenate([np.arange(edges[k], edges[k + 1]) for k in chosen])
    lengths = np.diff(edges)[chosen]
    times = calendar(source, np.arange(np.append(source.segments, source.num_bars)[1]), int(lengths.max()))
    labels = source.segment_split or (None,) * len(source.segments)
    weight = source.segment_weight
    if weight is None:
        weight = np.diff(source.segments, append=source.num_bars).astype(np.float64)
    trained = np.array([label in ("train", None) for label in labels])
    weight = np.where(trained, (1.0 - share) * weight / weight[trained].sum(), weight)

    made = source.parameters.get("synthetic", np.zeros(len(labels)))  # by another prefix of this kind
    no_own, no_other = np.full(len(labels), np.nan), np.full(len(synthetic.segments), np.nan)
    parameters = {
        name: np.append(source.parameters.get(name, no_own), synthetic.parameters.get(name, no_other)[chosen])
        for name in dict.fromkeys([*source.parameters, *synthetic.parameters])
    }
    return replace(
        source,
        name=spec,
        timestamps=np.concatenate([source.timestamps, *(times[:bars] for bars in lengths)]),
        **{name: np.concatenate([values, synthetic.fields[name][rows]]) for name, values in source.fields.items()},
        segments=np.append(source.segments, source.num_bars + np.cumsum([0, *lengths[:-1]])),
        segment_split=(*labels, *["train"] * len(chosen)),
        segment_weight=np.append(weight, np.full(len(chosen), share / len(chosen))),
        hidden={},
        extras={
            name: np.concatenate([values, np.full((len(rows), *values.shape[1:]), np.nan)])
            for name, values in source.extras.items()
        },
        parameters=parameters | {"synthetic": np.append(made, np.ones(len(chosen)))},
    )
