"""The offline scripts beside d3rlpy on the same file: gradient steps per second, and what their policies earn.

`python benchmark/offline_peers.py --dataset data/dataset.hdf5 --peer-python other-environment/bin/python`. d3rlpy stays in
that environment: pip install d3rlpy h5py. Every run is a process. Speed: rounds of ours and theirs in turn, the ratio of each
round; the second half of the steps is timed, sampling included. Score: the last policies of both, backtested on the test split
by the same code, with intervals, and their differences, paired bar by bar.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from d3rlpy_peer import LAYERS, NO_IQL, forward, standardise
from measuring import ROOT, compare, figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from throughput import PEERS, machine

from envs import ledger
from envs.dataset import META, Dataset
from envs.task import Task

SCRIPTS = {name: ROOT / "algos" / f"{name}_portfolio.py" for name in ("bc", "iql", "cql")}
PEER = Path(__file__).with_name("d3rlpy_peer.py")
HELD_OUT = 0.1  # share of the episodes, the default of the scripts
FASTER = 3  # times its gradient steps per second: what the project wants
# arguments of the scripts that the peer gets as they are, where a script has them
SHARED = (
    "seed", "num_threads", "gradient_steps", "batch_size", "hidden", "learning_rate", "actor_learning_rate", "gamma",
    "expectile", "beta", "tau", "alpha", "samples", "max_grad_norm",
)  # fmt: skip


@dataclass
class Args:
    dataset: Path
    """HDF5 file with D4RL's keys (envs/dataset.py); its dataset_meta.json names the market, for the scores"""
    peer_python: str
    """Python of the environment that d3rlpy is installed in"""
    algorithms: tuple[str, ...] = ("bc", "iql", "cql")
    """some of bc, iql and cql; d3rlpy has no IQL for discrete actions"""
    rounds: int = 5
    """rounds of the speed comparison (0: none)"""
    gradient_steps: int = 1_000
    """steps of a run for speed; the first half is not timed"""
    score_steps: int = 5_000
    """steps of the run of each that is backtested (0: none)"""
    seed: int = 1
    """seed of the networks, the batches and the episodes that are held out"""
    num_threads: int = 1
    """CPU threads of each process"""
    out: Path = Path("benchmark/results/offline_peers.json")
    """JSON of what was measured; a table (.md) goes beside it"""

    def __post_init__(self):
        unknown = sorted(set(self.algorithms) - set(SCRIPTS))
        if unknown or not self.algorithms:
            sys.exit(f"--algorithms {' '.join(unknown)}: expected some of {' '.join(SCRIPTS)}")
        for flag, least in (("rounds", 0), ("gradient_steps", 2), ("score_steps", 0), ("num_threads", 1)):
            if getattr(self, flag) < least:
                sys.exit(f"--{flag.replace('_', '-')} {getattr(self, flag)}: expected at least {least}")
        if self.out.suffix != ".json":
            sys.exit(f"--out {self.out}: expected a name that ends in .json")


class Failure(Exception):
    """A process that did not do what it was started for; the message is one line, with the end of its log."""


def call(command: list, what: str) -> str:
    """What a process prints. Raises Failure if it cannot start or exits with another status than 0."""
    try:
        done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise Failure(f"{what}: {error}; expected a Python that can be started") from error
    if done.returncode:
        log = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        raise Failure(f"{what}: exit status {done.returncode}; its log ends: {' | '.join(log[-4:]) or 'empty'}")
    return done.stdout


# Runs


def train_ours(args: Args, algorithm: str, path: Path, runs: str, steps: int, *options) -> Path:
    """Run directory of one of our scripts."""
    command = [sys.executable, SCRIPTS[algorithm], "--dataset", path.absolute(), "--seed", args.seed, "--no-cuda"]
    command += ["--gradient-steps", steps, "--num-threads", args.num_threads, "--runs-dir", runs]
    command += ["--no-norm-adv"] if algorithm == "iql" else []  # d3rlpy weighs advantages in units of the rewards
    call([*command, *options], SCRIPTS[algorithm].name)
    (run_dir,) = Path(runs).iterdir()
    return run_dir


def train_theirs(args: Args, config: dict, folder: str) -> tuple[dict, Path]:
    """What the peer says of its run, and the file with its policy."""
    described, policy = Path(folder) / "config.json", Path(folder) / "policy.npz"
    described.write_text(json.dumps(config))
    command = [args.peer_python, PEER, "--dataset", args.dataset.absolute(), "--config", described, "--policy", policy]
    what = f"{PEER.name}, {config['algorithm']}"
    lines = call(command, what).splitlines()
    try:
        told = json.loads(lines[-1])
        told["sps"] = told["steps"] / told["seconds"]
    except (IndexError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise Failure(f"{what}: {' | '.join(lines[-4:])}: expected JSON with steps and seconds on the last line") from error
    return told, policy


def configuration(data: Dataset, algorithm: str, run_dir: Path, reward_scale: float, warm_up: int) -> dict:
    """What the peer needs to train as a finished run of ours did: its arguments, scales and training episodes."""
    run = json.loads((run_dir / "run.json").read_text())["args"]
    model = torch.load(run_dir / "model.pt", weights_only=True)["model"]
    train, _ = data.split_episodes(run["validation_fraction"], run["seed"])
    discrete = hasattr(data.action_space, "n")
    config = {name: run[name] for name in SHARED if name in run} | {
        "algorithm": algorithm, "discrete": discrete, "warm_up": warm_up, "reward_scale": reward_scale,
        "num_actions": int(data.action_space.n) if discrete else data.action_space.shape[0],
        "observation_mean": model["obs_mean"].tolist(), "observation_scale": model["obs_scale"].tolist(),
        "action_low": model["low"].tolist(), "action_high": model["high"].tolist(),
        "episodes": np.stack([data.starts[train], data.starts[train + 1]], axis=1).tolist(),
    }  # fmt: skip
    if config.get("gamma", 0.0) is None:
        config["gamma"] = data.meta.get("gamma", 0.99)
    return config


def scaling(data: Dataset, algorithm: str, seed: int) -> tuple[float, list]:
    """The factor on rewards, one over their standard deviation as in the scripts, and the options that set it there."""
    if algorithm == "bc":  # which reads no rewards
        return 1.0, []
    train, _ = data.split_episodes(HELD_OUT, seed)
    rewards = np.concatenate([block["rewards"] for block in data.blocks(train, ("rewards",))])
    scale = 1.0 / max(float(rewards.std(dtype=np.float64)), 1e-12)
    return scale, ["--validation-fraction", HELD_OUT, "--reward-scale", scale]


# Speed


def nameless(path: Path, folder: Path) -> Path:
    """A link to the data whose meta names no market: a script that is run for its speed alone has nothing to backtest."""
    link = folder / path.name
    link.symlink_to(path.absolute())
    beside = path.with_name(META)
    if beside.exists():
        meta = json.loads(beside.read_text()) | {"env_id": "not named", "task": None}
        (folder / META).write_text(json.dumps(meta))
    return link


def steady_speed(run_dir: Path, warm_up: int) -> float:
    """Gradient steps per second of a run after its first `warm_up` steps, at which it was validated: the first of all steps
    loads the data."""
    run, events = json.loads((run_dir / "run.json").read_text()), EventAccumulator(str(run_dir))
    events.Reload()
    speeds = {event.step: event.value for event in events.Scalars("charts/SPS")}
    return (run["args"]["gradient_steps"] - warm_up) / (run["train_seconds"] - warm_up / speeds[warm_up])


def measure_speed(args: Args, data: Dataset, algorithm: str, versions: dict) -> list[dict]:
    """Rows of both, measured in turns; ratios are ours over theirs."""
    warm_up, known = args.gradient_steps // 2, {}
    reward_scale, options = scaling(data, algorithm, args.seed)
    # the same steps from first to last: the script would only imitate during the first ones
    options += ["--eval-every", warm_up, *(["--bc-steps", 0] if algorithm == "cql" else [])]

    def ours():
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as runs:
            path = nameless(args.dataset, Path(folder))
            run_dir = train_ours(args, algorithm, path, runs, args.gradient_steps, *options)
            known["config"] = configuration(data, algorithm, run_dir, reward_scale, warm_up)
            return steady_speed(run_dir, warm_up)

    def theirs():
        with tempfile.TemporaryDirectory() as folder:
            told, _ = train_theirs(args, known["config"], folder)
        versions.update(told.get("versions", {}))
        return told["sps"]

    peer = f"{algorithm}, d3rlpy"
    contestants = {f"{algorithm}, ours": ours, peer: NO_IQL if lacking(data, algorithm) else theirs}
    return compare("speed", contestants, args.rounds, faster_by=True, targets=[(peer, FASTER, np.inf)])


def not_worse(difference: dict[str, float]) -> bool:
    """Whether the 95% interval of ours less theirs reaches 0 or lies above it."""
    return difference["high"] >= 0.0


def lacking(data: Dataset, algorithm: str) -> bool:
    return algorithm == "iql" and hasattr(data.action_space, "n")


# Score


def load_policy(path: Path, config: dict) -> ledger.Policy:
    """The policy that the peer saved, for a backtest; masked actions are never chosen. Raises Failure for other arrays."""
    size, hidden, out = len(config["observation_mean"]), config["hidden"], config["num_actions"]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Failure(f"{path.name}: {error}; expected arrays") from error
    copies = max((1, *arrays["weight0"].shape[:1])) if "weight0" in arrays else 1
    widths = (size, *[hidden] * (LAYERS - 1), out)
    shapes = {f"weight{i}": (copies, widths[i], widths[i + 1]) for i in range(LAYERS)}
    shapes |= {f"bias{i}": (copies, 1, widths[i + 1]) for i in range(LAYERS)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes:
        raise Failure(f"{path.name}: {found}: expected {shapes}")
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise Failure(f"{path.name}: {name}: expected finite float32")
    low, high = np.float32(config["action_low"]), np.float32(config["action_high"])

    def policy(observations, mask, rows):
        values = forward(arrays, standardise(np.asarray(observations, np.float32), config))
        if config["discrete"]:
            return (values if mask is None else np.where(mask, values, -np.inf)).argmax(axis=1)
        return 0.5 * (high + low + np.tanh(values) * (high - low))

    return policy


def contributions(task: Task, frame: pd.DataFrame) -> np.ndarray:
    """(bars,) whose mean times the bars per year is `task.score(frame)`; in a variance each bar counts by its squared
    distance from the mean, so that differences between ledgers can be paired bar by bar."""
    if task.env_id == "LeadLag-v0":
        return ledger.growth(frame)
    net = frame["net_return"].to_numpy()
    spread = (net - net.mean()) ** 2 * len(net) / (len(net) - 1)
    return net - 0.5 * task.risk_aversion * spread


def yearly(x: np.ndarray, frame: pd.DataFrame, task: Task) -> dict[str, float]:
    """Mean of x (bars,) per year, and its 95% interval (envs/ledger.py: `interval`)."""
    year = task.panel.bars_per_year
    mean = low = high = float(x.mean() * year)
    if np.ptp(x) > 0.0:
        low, high, _ = ledger.interval(x, frame["market"].to_numpy(), lambda n, s, q: s / n * year, 1000, 0)
    return {"mean": mean, "low": low, "high": high}


def assess(task: Task, frame: pd.DataFrame) -> dict:
    """Growth, score and Sharpe ratio of a ledger, per year, each with its interval."""
    s = ledger.summarise(frame, task.panel.bars_per_year)
    return {
        "growth": yearly(ledger.growth(frame), frame, task), "score": yearly(contributions(task, frame), frame, task),
        "sharpe": {"mean": s["sharpe"], "low": s["sharpe_low"], "high": s["sharpe_high"]},
    }  # fmt: skip


def measure_score(args: Args, data: Dataset, task: Task, algorithm: str, versions: dict) -> list[dict]:
    """One row: both policies on the test split, and by how much ours grows faster and scores higher, bars paired."""
    if lacking(data, algorithm):
        return [{"section": "score", "name": algorithm, "note": NO_IQL}]
    reward_scale, options = scaling(data, algorithm, args.seed)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as runs:
        run_dir = train_ours(args, algorithm, args.dataset, runs, args.score_steps, "--eval-every", args.score_steps, *options)
        ours = pd.read_parquet(run_dir / "ledger_last.parquet")
        config = configuration(data, algorithm, run_dir, reward_scale, 0)
        told, path = train_theirs(args, config, folder)
        theirs = task.run("test", load_policy(path, config))
    versions.update(told.get("versions", {}))
    mean, low, high, how = ledger.difference(ours, theirs, task.panel.bars_per_year)
    gap = yearly(contributions(task, ours) - contributions(task, theirs), ours, task)
    row = {
        "section": "score", "name": algorithm, "ours": assess(task, ours), "d3rlpy": assess(task, theirs),
        "difference": {"growth": {"mean": mean, "low": low, "high": high}, "score": gap}, "bootstrap": how,
        "met": not_worse(gap),
    }  # fmt: skip
    for name in ("ours", "d3rlpy", "difference"):
        print(f"  {algorithm + ', ' + name:<20}" + "  ".join(f"{k} {shown(k, v)}" for k, v in row[name].items()), flush=True)
    return [row]


def shown(name: str, x: dict) -> str:
    spec = ".2f" if name == "sharpe" else ".1%"
    return f"{x['mean']:{spec}} [{x['low']:{spec}}, {x['high']:{spec}}]"


# Report


def escaped(row: dict) -> str:
    """The note of a row, if it has one, for a cell of a table."""
    return row.get("note", "").replace("|", "\\|")


def markdown(content: dict) -> str:
    """What was measured, as tables."""
    lines = ["# Offline scripts beside d3rlpy", "", "| | |", "|-|-|"]
    facts = content["machine"] | content["arguments"] | content["data"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    speed, score = ([row for row in content["rows"] if row["section"] == name] for name in ("speed", "score"))
    if speed:
        lines += [
            "",
            "## Speed",
            "",
            "Gradient steps per second with sampling, second half of the run: median [smallest, largest]",
        ]
        lines += [f"of the rounds, ours and theirs in turn. Target: ours at least {FASTER} times as fast.", ""]
        lines += ["| | steps/s | ours is faster by | met |", "|-|-:|-:|-|"]
    for row in speed:
        value, met = escaped(row) or figure(row, "value"), {True: "yes", False: "no"}.get(row.get("met"), "")
        lines.append(f"| {row['name']} | {value} | {figure(row, 'ratio')} | {met} |")
    if score:
        lines += [
            "",
            "## Score",
            "",
            "Last policies on the test split, after costs, per year, with 95% intervals; differences are",
        ]
        lines += ["paired. Target: the score's difference not below 0 with its whole interval. d3rlpy trains discrete actions"]
        lines += [
            "without masks, which bind when it decides; our cql imitates the data during its first steps (--bc-steps).",
            "",
        ]
        lines += ["| | growth | score | Sharpe | met |", "|-|-:|-:|-:|-|"]
    for row in score:
        if "note" in row:
            lines.append(f"| {row['name']} | {escaped(row)} | | | |")
        for name in ("ours", "d3rlpy", "difference") if "ours" in row else ():
            cells = [shown(key, row[name][key]) if key in row[name] else "" for key in ("growth", "score", "sharpe")]
            met = ("yes" if row["met"] else "no") if name == "difference" else ""
            lines.append(f"| {row['name']}, {name} | {' | '.join(cells)} | {met} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> int:
    """Measure, print and write; returns the exit status: 1 if a process failed. Data that are wrong end it with one line."""
    try:
        data = Dataset(args.dataset)
        task = Task.of(data)
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if args.score_steps and task is None:
        sys.exit(f"--dataset {args.dataset}: names no market to backtest on; expected one that does, or --score-steps 0")
    versions, failed = {}, 0
    content = {
        "machine": {name: fact for name, fact in machine().items() if name not in PEERS}
        | {"script": Path(__file__).name, "peer": versions},
        "arguments": {n: v if isinstance(v, int | tuple) else str(v) for n, v in dataclasses.asdict(args).items()},
        "data": {"steps": data.meta["steps"], "episodes": data.meta["episodes"], "sha256": data.meta["sha256"]},
        "rows": [],
    }  # fmt: skip
    del content["arguments"]["out"], content["arguments"]["peer_python"]
    sections = {"speed": lambda name: measure_speed(args, data, name, versions)} if args.rounds else {}
    if args.score_steps:
        sections["score"] = lambda name: measure_score(args, data, task, name, versions)
    for section, measure in sections.items():
        print(section, flush=True)
        for algorithm in args.algorithms:
            try:
                content["rows"] += measure(algorithm)
            except Failure as error:
                failed = 1
                content["rows"].append({"section": section, "name": algorithm, "note": str(error)})
                print(f"  {error}", flush=True)
            content["machine"]["load_at_end"] = os.getloadavg()[0]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            ledger.write_json(args.out, content)
            args.out.with_suffix(".md").write_text(markdown(content))
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
