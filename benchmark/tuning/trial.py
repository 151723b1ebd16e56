"""One trial of a sweep: the script as a process for every seed and market, watched while it runs, and its validation score."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import json_to_distribution
from optuna.trial import TrialState
from scipy.stats import trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.processes import end_with_parent
from benchmark.tuning.space import Value, as_arguments, brief, environment
from envs import ledger
from envs.portfolio_references import utility

POLL = 1.0  # seconds between two looks at a running process
PATIENCE = 5.0  # seconds that a process has to end by itself
IQM = partial(trim_mean, proportiontocut=0.25)


class Failure(Exception):
    """Why a run counts as failed, in one line."""


@dataclass(frozen=True)
class Terms:
    """How every run of a worker is made: the folder of all trials, seconds that a run may take, and its CPU threads."""

    folder: Path
    timeout: float
    threads: int


class Progress:
    """What a trial reports to its study: after each validation backtest the aggregate of the scores of its runs so far.

    A run that has not ended counts with its best validation, for scripts keep the model of that one. Steps count validations
    from the first run to the last, so that trials are compared after equally many.
    """

    def __init__(self, trial: optuna.Trial, how: str):
        self.trial, self.how = trial, how
        self.scores: list[float] = []  # of runs that have ended
        self.step = 0

    def follow(self, validations: "Validations", prune: bool):
        """Report what is new. Raises TrialPruned if the trial is hopeless and `prune` holds."""
        for best in validations.new():
            self.step += 1
            if np.isfinite(best):
                self.trial.report(aggregate(self.how, [*self.scores, best]), self.step)
                if prune and self.trial.should_prune():
                    raise optuna.TrialPruned


def run_trial(study: optuna.Study, trial: optuna.Trial, setup: dict, terms: Terms, beat: Callable[[], None]) -> str:
    """Run the script for every seed and market, and tell the study; what came of it, in words. beat(): a sign of life.

    Raises UpdateFinishedTrialError if the study has given the trial up in the meantime.
    """
    params = {name: suggest(trial, name, json_to_distribution(text)) for name, text in setup["space"].items()}
    folder, told = terms.folder / str(trial.number), brief(params)
    trial.set_user_attr("worker", f"{socket.gethostname()}, process {os.getpid()}")
    progress, runs = Progress(trial, setup["aggregate"]), []
    try:
        for seed, market in (places := [(seed, market) for seed in setup["seeds"] for market in setup["markets"] or [None]]):
            run = folder / "-".join(filter(None, (market and re.sub(r"\W+", "-", market), f"seed-{seed}")))
            own = {"seed": seed} | ({"market": market} if market else {})
            chosen = [*setup["arguments"], *as_arguments(params | own)]
            chosen += [f"--num-threads={terms.threads}"] if setup["threads"] else []
            validations, last = Validations(run), len(runs) + 1 == len(places)

            def look(ended: bool, validations=validations, last=last):
                beat()
                progress.follow(validations, prune=not (ended and last))

            call = [sys.executable, setup["script"], *chosen, "--runs-dir", str(run)]
            run_process(call, run, terms.timeout, look)
            found = run_dir(run)
            check_arrived(found, params | own)
            score = score_of(found, setup["metric"], "val")
            if not np.isfinite(score):
                raise Failure(f"its validation score is {score}")
            progress.scores.append(score)
            runs.append({"seed": seed, "market": market, "score": score, "run_dir": str(found), "args": chosen})
            trial.set_user_attr("runs", runs)
        study.tell(trial, value := aggregate(setup["aggregate"], progress.scores), skip_if_finished=True)
        return f"{value:.6g} {told}"
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        return f"pruned after {progress.step} validations {told}"
    except Failure as failure:
        log = last_lines(run / "log.txt")
        reason = f"{failure}; its log is {run / 'log.txt'}"
        trial.set_user_attr("failure", reason)
        trial.set_user_attr("log", log)
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return "\n    ".join([f"failed: {reason}", *log.splitlines()])


def suggest(trial: optuna.Trial, name: str, space: optuna.distributions.BaseDistribution) -> Value:
    if isinstance(space, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    ask = trial.suggest_int if isinstance(space, optuna.distributions.IntDistribution) else trial.suggest_float
    return ask(name, space.low, space.high, log=space.log)


def run_process(command: list[str], folder: Path, timeout: float, look: Callable[[bool], None]):
    """Run it to its end, its output into log.txt of `folder`; look(whether it has ended) now and then, and once at the end.

    Whatever ends this call, also what look() raises, ends the process and its children. Raises Failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGKILL),
        )  # fmt: skip
    try:
        deadline = time.monotonic() + timeout
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise Failure(f"not finished after {timeout:g} seconds")
            look(False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(POLL, max(0.0, deadline - time.monotonic())))
        if process.returncode == 0:
            look(True)
    finally:
        end_group(process)
    if process.returncode:
        raise Failure(f"exit code {process.returncode}: {last_lines(log, 1)}")


def end_group(process: subprocess.Popen):
    """End a process and its children: by request, and after PATIENCE seconds by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def run_dir(folder: Path) -> Path:
    """The run directory of a run that has ended well. Raises Failure."""
    found = [path for path in folder.glob("*/") if (path / "run.json").is_file()]
    if len(found) != 1:
        raise Failure(f"left {len(found)} run directories; expected one")
    content = json.loads((found[0] / "run.json").read_text())
    if content.get("status") != "finished":
        raise Failure(str(content.get("failure") or f"run.json says status {content.get('status')!r}"))
    if not (found[0] / "ledger.parquet").is_file():
        raise Failure("left no ledger.parquet; expected a run on a market")
    return found[0]


def check_arrived(run: Path, params: dict[str, Value]):
    """Raises Failure unless run.json says that the script ran with all of these."""
    given = flat(json.loads((run / "run.json").read_text())["args"])
    for name, value in params.items():
        if given.get(name.replace("-", "_")) != value:
            raise Failure(f"--{name} {value} did not arrive: run.json says {given.get(name.replace('-', '_'))}")


def flat(tree: dict) -> dict:
    """The leaves of nested dicts: the fields of a script's groups of arguments are flags like any other."""
    return {k: v for key, value in tree.items() for k, v in (flat(value) if isinstance(value, dict) else {key: value}).items()}


class Validations:
    """The best of the validation backtests that a run logs to TensorBoard as eval/val_<what>; a script logs one of these."""

    def __init__(self, folder: Path):
        """folder: that the run directory is made in."""
        self.folder, self.events, self.best = folder, None, []

    def new(self) -> list[float]:
        """The best score so far (NaN: none) at each of those that were not there at the last call."""
        if self.events is None:
            found = [path.parent for path in self.folder.glob("*/events.out.tfevents.*")]
            if not found:
                return []
            self.events = EventAccumulator(str(found[0]), size_guidance={"scalars": 0})
        self.events.Reload()  # what has been added
        tags = [tag for tag in self.events.Tags()["scalars"] if tag.startswith("eval/val_")]
        scores = [event.value for tag in tags for event in self.events.Scalars(tag)]
        seen, self.best = len(self.best), np.fmax.accumulate(scores).tolist() if scores else []
        return self.best[seen:]


def aggregate(how: str, scores: list[float]) -> float:
    """median, mean or iqm, the interquartile mean, of scores."""
    reduce = {"median": np.median, "mean": np.mean, "iqm": IQM}[how]
    return float(reduce(scores))


def score_of(run: Path, metric: str, split: str) -> float:
    """Score of a run, per year, on one split of its ledger, whose other rows are not read. Raises Failure if it has no bars."""
    frame = pd.read_parquet(run / "ledger.parquet", columns=["net_return"], filters=[("split", "==", split)])
    content = json.loads((run / "run.json").read_text())
    if frame.empty:
        raise Failure(f"its ledger holds no bar of the {split} split")
    bars_per_year = float(content["panel"]["bars_per_year"])
    if metric == "sharpe":
        return ledger.sharpe(frame["net_return"].to_numpy(), bars_per_year)
    if metric == "growth" or (metric == "script" and content["env_id"] == "LeadLag-v0"):
        return float(ledger.growth(frame).mean() * bars_per_year)
    return utility(frame, float(metric.partition(":")[2] or risk_aversion(content)), bars_per_year)


def risk_aversion(content: dict) -> float:
    """At which a script chooses its model on Portfolio-v0, from its run.json."""
    args = content["args"]
    if content.get("risk_aversion") is not None:
        return content["risk_aversion"]
    if "penalty_variance" in args:
        return 1.0 + 2.0 * args["penalty_variance"]
    return args["risk_aversion"] if args.get("utility") == "mean_variance" else 1.0
