"""Collect offline data: what rules and a learning agent do on a market, as one dataset, in one regime of actions.

`python benchmark/collect.py --regime long_only --out data/sp500` leaves data/sp500/dataset.hdf5 and dataset_meta.json, as
envs/dataset.py lays them out. The rules of --behaviours are logged by baselines.py, and `ppo` by the script of the regime, as
it explores after each share of its training that --log-at names; all rules and checkpoints give equally many episodes.

Any other flag, such as --start or --asset-cap, goes to both of them as it is; one that only one of them knows is refused. A
collection that was killed is begun again by the same command.
"""

import contextlib
import fcntl
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from behaviours import env_id_of
from jobs import ROOT, last_lines, python_path
from processes import end_on_signals
from rules import RULES

from envs.dataset import META, Dataset
from envs.dataset_writer import merge
from envs.leadlag_tables import LeadLagConfig

PPO = "ppo"
EPISODES, QUICK_EPISODES = 3000, 40
QUICK_STEPS = 1_000_000
OURS = ("--constraints", "--env-id", "--exp-name", "--log-dataset", "--log-episodes", "--only", "--resume")  # set here


@dataclass(frozen=True)
class Regime:
    """What a regime of actions is made of."""

    script: str
    env_id: str
    market: str
    behaviours: tuple[str, ...]
    gamma: float
    flags: tuple[str, ...]


PORTFOLIO = ("ppo_portfolio", "Portfolio-v0", "sp500", ("random", "top-k", "kelly-lite", "momentum", PPO), 0.9)
REGIMES = {
    "long_only": Regime(*PORTFOLIO, ("--constraints", "long_only")),
    "long_short": Regime(*PORTFOLIO, ("--constraints", "long_short")),
    "lookback": Regime(
        "ppo_leadlag", "LeadLag-v0", "synthetic:leadlag",
        ("lead-lag-random", "lead-lag-10", "lead-lag-90", "lead-lag-volatility", PPO), 0.5,
        ("--costs", LeadLagConfig().costs),  # on a market with a closed form baselines.py has costs of its own
    ),
}  # fmt: skip


@dataclass
class Args:
    regime: Literal["long_only", "long_short", "lookback"]
    """what actions are: weights of a portfolio, or the lookback of a lead-lag strategy"""
    out: Path
    """folder of the dataset"""
    episodes: int = 0
    """least number of episodes of all behaviours together (0: 3000; with --quick 40)"""
    seed: int = 1
    """seed of everything drawn: episodes, exploration, networks and, on markets that are drawn, the panel"""
    market: str | None = None
    """what --market of the scripts takes (default sp500; of lookback synthetic:leadlag)"""
    behaviours: tuple[str, ...] = ()
    """rules of baselines.py, and ppo (default random top-k kelly-lite momentum ppo; of lookback lead-lag-random lead-lag-10
    lead-lag-90 lead-lag-volatility ppo)"""
    log_at: tuple[float, ...] = (0.1, 0.4, 1.0)
    """shares of the training after which ppo acts: a behaviour each"""
    log_noise: float | None = None
    """exploration of the rules of a portfolio, in scores (default: that of baselines.py)"""
    log_epsilon: float | None = None
    """share of random choices of the rules of lookback, likewise"""
    total_timesteps: int = 0
    """steps of ppo's training (0: the script's; with --quick a million)"""
    gamma: float | None = None
    """discount factor, of ppo and of the returns in the data (default 0.9; of lookback 0.5)"""
    num_threads: int = 0
    """CPU threads of ppo and of the market kernels (0: all cores this process may use)"""
    runs_dir: Path | None = None
    """folder of ppo's run directory (default: runs in --out)"""
    replace: bool = False
    """put the new dataset in the place of one that is there"""
    quick: bool = False
    """less of everything, as above"""

    def __post_init__(self):
        """Fill in what depends on other arguments. Exits with one line that names the flag and what was expected."""
        regime = REGIMES[self.regime]
        self.behaviours = tuple(dict.fromkeys(self.behaviours)) or regime.behaviours
        self.log_at = tuple(dict.fromkeys(self.log_at))
        known = (*(name for name in RULES if env_id_of(name) == regime.env_id), PPO)
        if unknown := [name for name in self.behaviours if name not in known]:
            sys.exit(f"--behaviours {' '.join(unknown)}: expected, for --regime {self.regime}, some of {' '.join(known)}")
        if not self.log_at or not all(0.0 < share <= 1.0 for share in self.log_at):
            sys.exit(f"--log-at {' '.join(map(str, self.log_at))}: expected shares of the training, above 0 and at most 1")
        for flag in ("episodes", "seed", "total_timesteps", "num_threads"):
            if getattr(self, flag) < 0:
                sys.exit(f"--{flag.replace('_', '-')} {getattr(self, flag)}: expected 0 or more")
        self.episodes = self.episodes or (QUICK_EPISODES if self.quick else EPISODES)
        self.total_timesteps = self.total_timesteps or (QUICK_STEPS if self.quick else 0)
        self.market = self.market or regime.market
        self.gamma = regime.gamma if self.gamma is None else self.gamma
        self.runs_dir = self.runs_dir or self.out / "runs"

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(name for name in self.behaviours if name != PPO)

    @property
    def checkpoints(self) -> int:
        return len(self.log_at) if PPO in self.behaviours else 0


def commands(args: Args, others: list[str], parts: Path) -> list[list[str]]:
    """What logs the behaviours to `parts`, a dataset each: the rules first, which take seconds, then ppo."""
    regime = REGIMES[args.regime]
    share = math.ceil(args.episodes / (len(args.rules) + args.checkpoints))
    terms = ["--market", args.market, "--seed", str(args.seed), "--gamma", str(args.gamma), *regime.flags]
    terms += ["--num-threads", str(args.num_threads), "--log-dataset", str(parts), "--log-episodes", str(share), *others]
    found = []
    if args.rules:
        noise = (("--log-noise", args.log_noise), ("--log-epsilon", args.log_epsilon))
        explore = [part for flag, value in noise if value is not None for part in (flag, str(value))]
        call = [sys.executable, str(ROOT / "benchmark" / "baselines.py"), "--only", *args.rules, *explore]
        found.append([*call, "--runs-dir", str(parts / "runs"), *terms])
    if args.checkpoints:
        call = [sys.executable, str(ROOT / "algos" / f"{regime.script}.py"), "--log-at", *map(str, args.log_at)]
        steps = ["--total-timesteps", str(args.total_timesteps)] if args.total_timesteps else []
        found.append([*call, *steps, "--runs-dir", str(args.runs_dir), *terms])
    return found


def run(command: list[str], log: Path):
    """Run it to its end, its output into `log`. Exits with the last lines of it if it fails."""
    with log.open("a") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        env = os.environ | {"PYTHONPATH": python_path(ROOT)}
        code = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"{last_lines(log)}\n{Path(command[1]).name} failed with exit code {code}; all it said is in {log}")


def datasets(args: Args, parts: Path) -> dict[str, Dataset]:
    """The datasets in `parts` by behaviour, ppo's by step. Exits if two shares of the training were one iteration."""
    found = {name: Dataset(parts / f"{name}__{args.seed}" / "dataset.hdf5") for name in args.rules}
    script = REGIMES[args.regime].script
    steps = sorted(int(path.parent.name.rpartition("__")[2]) for path in parts.glob(f"{script}__{args.seed}__*/dataset.hdf5"))
    if len(steps) != args.checkpoints:
        shares = " ".join(map(str, args.log_at))
        sys.exit(
            f"--log-at {shares}: ppo left {len(steps)} checkpoints, after {steps} steps; expected {args.checkpoints}: shares "
            "that are an iteration apart, or a larger --total-timesteps"
        )
    return found | {f"ppo, {n} steps": Dataset(parts / f"{script}__{args.seed}__{n}" / "dataset.hdf5") for n in steps}


def mean_reward(data: Dataset) -> float:
    """Of a step."""
    blocks = data.blocks(range(len(data.terminated)), ("rewards",))
    return math.fsum(block["rewards"].sum(dtype=float) for block in blocks) / data.meta["steps"]


def describe(name: str, data: Dataset) -> str:
    return f"{name:24}{data.meta['episodes']:10}{data.meta['steps']:12}{mean_reward(data):16.3e}"


def collect(args: Args, others: list[str]):
    """Log, join, put in place. A kill at any moment leaves the old dataset, none, or the new one."""
    log, final = args.out / "collect.log", args.out / "dataset.hdf5"
    for left in args.out.glob("parts-*"):  # by a collection that was killed
        shutil.rmtree(left)
    log.unlink(missing_ok=True)
    before = set(args.runs_dir.glob("*"))
    with tempfile.TemporaryDirectory(prefix="parts-", dir=args.out) as parts:
        for command in commands(args, others, Path(parts)):
            print(f"running {Path(command[1]).name}, its output in {log}", flush=True)
            run(command, log)
        sources = datasets(args, Path(parts))
        joined = Path(parts) / "joined" / "dataset.hdf5"
        merge(joined, [data.path for data in sources.values()])
        lines = [describe(name, data) for name, data in sources.items()]
        final.unlink(missing_ok=True)
        os.replace(joined.with_name(META), args.out / META)
        os.replace(joined, final)
    print(f"{'':24}{'episodes':>10}{'steps':>12}{'reward a step':>16}")
    print("\n".join([*lines, describe("all", Dataset(final))]))
    for path in sorted(set(args.runs_dir.glob("*")) - before):
        print(f"ppo's run directory: {path}")
    print(f"dataset: {final}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other collections out of a folder. The system lets go of the lock of a process that dies. Exits if it is taken."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"--out {folder}: another collection runs there; expected another folder")
    try:
        yield
    finally:
        os.close(lock)


def main(args: Args, others: list[str]) -> int:
    if taken := [part for part in others if part.partition("=")[0].replace("_", "-") in OURS]:
        sys.exit(f"{taken[0]}: is set here; expected flags of the scripts but {' '.join(OURS)}")
    if there := sorted(path.name for path in args.out.glob("*.hdf5")):
        if not args.replace or there != ["dataset.hdf5"]:
            sys.exit(f"--out {args.out}: holds {there[0]} already; expected another folder, or --replace for dataset.hdf5")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {args.out}: {error.strerror}; expected a folder")
    with alone(args.out):
        collect(args, others)
    return 0


if __name__ == "__main__":
    end_on_signals()
    try:
        sys.exit(main(*tyro.cli(Args, description=__doc__, return_unknown_args=True)))
    except KeyboardInterrupt:
        print("interrupted; the same command begins again", file=sys.stderr)
        sys.exit(130)
