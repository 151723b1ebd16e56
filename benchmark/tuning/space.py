"""What a sweep searches: the flags of a script as its --help lists them, and what --space of tuner.py says of them."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

ROOT = Path(__file__).resolve().parents[2]
DEFAULT, REWARD_WEIGHTS = "default", "reward-weights"
PRESETS = {
    # of any script: the flags that it has, where its own default is within these bounds
    DEFAULT: {
        "learning-rate": "log:1e-4:1e-2",
        "actor-learning-rate": "log:1e-4:1e-2",
        "gamma": "0:0.99",
        "gae-lambda": "0.8:1",
        "ent-coef": "0:0.02",
        "clip-coef": "0.1:0.4",
        "clip-low": "0.1:0.4",
        "clip-high": "0.1:0.5",
        "kl-coef": "0:0.1",
        "num-minibatches": "logint:1:16",
        "update-epochs": "int:1:4",
        "max-grad-norm": "log:0.1:10",
        "log-std": "-3:0.5",
        "expectile": "0.5:0.95",
        "beta": "log:0.3:10",
        "alpha": "log:0.01:5",
        "tau": "log:1e-3:2e-2",
        "top-percent": "10|25|50|100",
        "top-fraction": "0.1:0.5",  # of LeadLag-v0's symbols, to lead and to follow
    },
    # of ppo_portfolio: penalties per bar beside a log growth of some 1e-4, and 1e-4 of squared returns
    REWARD_WEIGHTS: {
        "penalty-turnover": "0:0.01",
        "penalty-drawdown": "0:0.01",
        "penalty-cvar": "0:0.1",
        "penalty-variance": "0:20",
    },
}
KINDS = {"INT": int, "FLOAT": float, "STR": str}
SCALES = {int: ("int", "logint"), float: ("", "log")}
FORMS = {int: "int:lo:hi, logint:lo:hi, ", float: "lo:hi, log:lo:hi, "}

Value = bool | int | float | str


@dataclass(frozen=True)
class Flag:
    """A flag as --help lists it. kind: None where it takes several values. default: as printed."""

    kind: type | None
    choices: tuple[str, ...]
    default: str

    def read(self, text: str) -> Value:
        """The value that `text` stands for. Raises ValueError saying what was expected."""
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{text!r} is neither true nor false")
            return text.lower() == "true"
        if self.choices and text not in self.choices:
            raise ValueError(f"{text!r} is not one of {' '.join(self.choices)}")
        try:
            value = self.kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {'a whole number' if self.kind is int else 'a number'}") from None
        if self.kind is float and not np.isfinite(value):
            raise ValueError(f"{text!r} is not finite")
        return value


def environment(**changes: str) -> dict[str, str]:
    """Variables for a script: it imports the envs/ of this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | changes


def flags_of(script: Path, arguments: list[str]) -> dict[str, Flag]:
    """Flags of a script, without their dashes, and its defaults under `arguments`, from what --help prints.

    Raises ValueError in one line where --help fails, or shows no script of this kind.
    """
    call = [sys.executable, str(script), *arguments, "--help"]
    wide = environment(COLUMNS="1000", NO_COLOR="1")
    done = subprocess.run(call, env=wide, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = [text for line in (done.stdout + done.stderr).splitlines() if (text := line.strip("│╭╰╮╯─ "))]
        raise ValueError(f"{shlex.join(call[1:])}: exit code {done.returncode}: {said[-1] if said else 'it said nothing'}")
    entries: list[list[str]] = []
    inside = False  # of an entry: it ends with its box
    for line in done.stdout.splitlines():
        text = line.strip("│ ")
        if text.startswith("--"):
            entries.append([text])
            inside = True
        elif text.startswith(("╭", "╰")):
            inside = False
        elif inside:
            entries[-1].append(text)
    found = {}
    for first, *more in entries:
        name, negative, metavar = re.match(r"--([\w-]+)(, --no-[\w-]+)?(?: (\S+(?: \S+)*))?(?:\s{2}|$)", first).groups()
        plain = (metavar or "").removeprefix("{None}|")
        choices = tuple(plain[1:-1].split(",")) if re.fullmatch(r"\{[^ ]*\}", plain) else ()
        kind = bool if negative else str if choices else KINDS.get(plain)
        default = re.search(r"\(default: (.*?)\)$", " ".join(filter(None, (first, *more))))
        found[name.replace("_", "-")] = Flag(kind, choices, default[1] if default else "")
    if missing := [name for name in ("seed", "runs-dir") if name not in found]:
        raise ValueError(f"--script {script}: its --help lists no --{missing[0]}; expected a script like those of algos/")
    return found


def require_flags(script: Path, arguments: list[str], flags: dict[str, Flag]):
    """Raises ValueError naming the first flag among a script's arguments that it does not have."""
    for part in arguments:
        name = part.partition("=")[0].removeprefix("--").replace("_", "-")
        if part.startswith("--") and name.removeprefix("no-") not in flags and name not in flags:
            raise ValueError(f"{part}: {script.name} has no such flag; expected, after --, flags of the script")


def distribution(flag: Flag, text: str) -> BaseDistribution:
    """What the right side of an entry of --space stands for. Raises ValueError saying what was expected."""
    if flag.kind is None:
        raise ValueError("the flag takes several values; expected one that takes one")
    if text.startswith("="):
        return CategoricalDistribution((flag.read(text[1:]),))
    if "|" in text:
        values = [flag.read(part) for part in text.split("|")]
        if len(set(values)) < len(values):
            raise ValueError("expected each value once")
        return CategoricalDistribution(values)
    scale, *bounds = text.rsplit(":", 2) if text.count(":") > 1 else ("", *text.split(":"))
    if len(bounds) < 2 or scale not in SCALES.get(flag.kind, ()) or flag.choices:
        raise ValueError(f"expected {FORMS.get(flag.kind, '')}a|b|c or =value, for it is {flag.kind.__name__}")
    low, high = map(flag.read, bounds)
    log = scale.startswith("log")
    if not low < high or (log and low <= 0):
        raise ValueError(f"expected {'0 < ' if log else ''}lo < hi")
    return (IntDistribution if flag.kind is int else FloatDistribution)(low, high, log=log)


def holds(space: BaseDistribution, value: Value) -> bool:
    return value in space.choices if isinstance(space, CategoricalDistribution) else space.low <= value <= space.high


def value_in(arguments: list[str], name: str) -> str | None:
    """Text that a script's arguments give a flag; None where they do not."""
    found = None
    for part, following in zip(arguments, [*arguments[1:], "--"]):
        flag, equals, text = part.partition("=")
        flag = flag.replace("_", "-")
        if flag == f"--{name}":
            found = text if equals else "True" if following.startswith("--") else following
        elif flag == f"--no-{name}":
            found = "False"
    return found


def read_space(
    entries: tuple[str, ...], arguments: list[str], flags: list[dict[str, Flag]], listed_only: bool
) -> tuple[dict[str, BaseDistribution], dict[str, Value]]:
    """(what is searched, where it starts), by flag, of the entries of --space.

    It starts where `arguments`, the script's own, say, or else from its default in `flags`, those of the script on each
    market; listed_only: from the first of the listed values, and ranges are refused. Raises ValueError that names the entry and
    what was expected.
    """
    texts: dict[str, tuple[str, bool]] = {}  # flag -> text, whether it has to be there
    for entry in entries:
        name, equals, text = entry.partition("=")
        if equals:
            texts[name.removeprefix("--").replace("_", "-")] = text, True
        elif name in PRESETS:
            texts |= {key: (value, name != DEFAULT) for key, value in PRESETS[name].items()}
        else:
            raise ValueError(f"--space {entry}: expected flag=range, or one of {' '.join(PRESETS)}")
    space, start = {}, {}
    for name, (text, wanted) in texts.items():
        where = f"--space {name}={text}"
        if name not in flags[0]:
            if not wanted:
                continue
            close = [flag for flag in flags[0] if set(name.split("-")) & set(flag.split("-"))]
            raise ValueError(f"{where}: the script has no such flag; expected one of {' '.join(close[:8] or flags[0])}")
        try:
            found = distribution(flags[0][name], text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if isinstance(found, CategoricalDistribution) and (listed_only or found.single()):
            space[name], start[name] = found, found.choices[0]
            continue
        if listed_only:
            raise ValueError(f"{where}: expected, with --grid and --ablate, a|b|c or =value")
        given = value_in(arguments, name)
        defaults = sorted({known[name].default for known in flags} if given is None else {given})
        try:
            value = flags[0][name].read(defaults[0])
        except ValueError:  # None
            value = None
        if len(defaults) == 1 and value is not None and holds(found, value):
            space[name], start[name] = found, value
        elif wanted:
            told = f"the script's {' or '.join(defaults)}, which trial 0 runs"
            raise ValueError(f"{where}: expected a range that holds {told}; or another start, after --: -- --{name} VALUE")
    return space, start


def as_arguments(params: dict[str, Value]) -> list[str]:
    """--flag=value, which holds for negative numbers too; --flag or --no-flag."""
    return [
        f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"
        for name, value in params.items()
    ]


def text_of(space: BaseDistribution) -> str:
    """For people."""
    if isinstance(space, CategoricalDistribution):
        return " | ".join(map(str, space.choices))
    return f"{space.low:g} to {space.high:g}{', logarithmic' if space.log else ''}"


def brief(params: dict[str, Value]) -> str:
    """For people: four digits."""
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items())
