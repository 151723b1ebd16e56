"""Search the arguments of any script with Optuna, by its score on the validation split, and say what was gained on the test.

`python tuner.py --script algos/ppo_leadlag.py --trials 30`. What stands after `--` goes to every run of the script as it is:
`python tuner.py --script algos/ppo_portfolio.py --seeds 1 2 3 -- --market sp500 --total-timesteps 2000000`.

--space names flags of the script, as its --help lists them, and what each may be:
    learning-rate=log:1e-4:1e-2   a number, on a logarithmic scale      update-epochs=int:1:8        a whole number
    ent-coef=0:0.05               a number                              num-steps=logint:16:256      the same, logarithmic
    norm-adv=true|false           one of these                          ent-coef==0.01               always this

Two words stand for several, listed in benchmark/tuning/space.py: `default`, which is also what is searched without
--space, for the flags that the script has, and `reward-weights` for the penalties of ppo_portfolio. A later entry replaces an
earlier one.

Trial 0 is the script's defaults, so a range has to hold the default; another start can be given after `--`. A trial is a run
for every seed and market, one process after the other; its value is the median of their scores. The test split is read once,
at the end, for the best trial and for trial 0.

--grid runs every combination of the listed values instead, --ablate one change at a time from the first values; both end with a
table of effects. With neither factor nor value, `--grid` is a sweep over seeds.

The same command again goes on where it was; started on several machines that share --out and --storage, they share the trials.
Results are in --out: best.json, trials.json, report.html, report.md, the best runs in best/ and those of trial 0 in start/.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import tyro
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from benchmark.processes import end_on_signals, end_with_parent
from benchmark.tuning.results import write_results, write_trials
from benchmark.tuning.samplers import make_sampler
from benchmark.tuning.space import DEFAULT, Value, environment, flags_of, read_space, require_flags, text_of, value_in
from benchmark.tuning.trial import PATIENCE, POLL, Terms, run_trial

ROOT = Path(__file__).resolve().parent
CHOOSING = ("penalty-variance", "risk-aversion", "utility")  # flags that change what a script chooses its model by
OURS = ("seed", "runs-dir", "resume")  # flags that are set here
RETRIES = 3  # of a trial whose worker vanished: the fourth time it is held to be the trial's fault
AS_WORKER = "--as-worker"  # first argument of a worker: run trials of a study that is set up, and end
HOPELESS = 3  # failures before anything succeeds


@dataclass
class Args:
    script: Path
    """script to tune"""
    trials: int | None = None
    """trials of the study, over all starts of this command (30; --grid and --ablate have as many as they need)"""
    space: tuple[str, ...] = ()
    """what is searched, as above (default: default; with --grid and --ablate nothing)"""
    grid: bool = False
    """run every combination of the values listed in --space"""
    ablate: bool = False
    """run the first values of --space, and every change of one of them"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of every trial"""
    markets: tuple[str, ...] = ()
    """markets of every trial, what the script's --market takes (default: the script's own)"""
    metric: str = "script"
    """score of a run, on the bars of its validation split, per year: script (what scripts validate by: net log growth on
    LeadLag-v0, else the utility at their risk aversion), growth, sharpe, or utility:<risk aversion>"""
    aggregate: Literal["median", "iqm", "mean"] = "median"
    """value of a trial, of its runs' scores as they are"""
    sampler: Literal["tpe", "gp", "cmaes", "random", "cem"] = "tpe"
    """what suggests parameters; cem is the cross-entropy method"""
    pruner: Literal["median", "hyperband", "none"] | None = None
    """what ends hopeless trials early, by the scripts' validation backtests, the n-th compared with the n-th; only with
    --metric script (default there: median)"""
    seed: int = 0
    """seed of the sampler"""
    study: str | None = None
    """name of the study (default: search, grid or ablation)"""
    storage: str | None = None
    """any SQLAlchemy URL, such as postgresql+psycopg://user@host/name, or journal:FILE on a shared disk
    (default: SQLite, study.db in --out)"""
    out: Path | None = None
    """folder of runs and results (default: tuning/<script>-<study>)"""
    workers: int = 1
    """trials at once; they share the CPU cores"""
    ray: bool = False
    """run the workers as tasks of the Ray cluster of RAY_ADDRESS, or of one started here; its machines share --out and
    --storage"""
    timeout: float = 7200.0
    """seconds after which a run counts as failed"""
    heartbeat: int = 20
    """seconds between two signs of life of a worker; after three without one its trial is run again by another"""

    def __post_init__(self):
        """Fill in what depends on other arguments. Exits with one line that names the flag and what was expected."""
        if not (self.script.is_file() or (ROOT / self.script).is_file()):
            sys.exit(f"--script {self.script}: no such file; expected a script such as algos/ppo_leadlag.py")
        self.script = (self.script if self.script.is_file() else ROOT / self.script).resolve()
        if self.grid and self.ablate:
            sys.exit("--ablate: expected without --grid")
        if self.designed and self.trials is not None:
            sys.exit(f"--trials {self.trials}: expected without --grid and --ablate, which have as many as they need")
        self.trials = 30 if self.trials is None else self.trials
        for flag in ("trials", "workers", "heartbeat"):
            if getattr(self, flag) < 1:
                sys.exit(f"--{flag} {getattr(self, flag)}: expected at least 1")
        if not 0.0 < self.timeout < float("inf"):
            sys.exit(f"--timeout {self.timeout:g}: expected a number of seconds above 0")
        if self.seed < 0:
            sys.exit(f"--seed {self.seed}: expected 0 or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            sys.exit(f"--seeds {' '.join(map(str, self.seeds))}: expected one or more, each once, 0 or above")
        if len(set(self.markets)) < len(self.markets):
            sys.exit(f"--markets {' '.join(self.markets)}: expected each once")
        if not re.fullmatch(r"script|growth|sharpe|utility:\d+(\.\d+)?", self.metric):
            sys.exit(f"--metric {self.metric}: expected script, growth, sharpe or utility:<risk aversion>, such as utility:40")
        if self.pruner not in (None, "none") and (self.metric != "script" or self.designed):
            sys.exit(f"--pruner {self.pruner}: expected none with --grid, --ablate, or a --metric other than script")
        self.pruner = self.pruner or ("median" if self.metric == "script" and not self.designed else "none")
        self.study = self.study or ("grid" if self.grid else "ablation" if self.ablate else "search")
        self.out = (self.out or Path("tuning") / f"{self.script.stem}-{self.study}").resolve()
        self.storage = self.storage or f"sqlite:///{self.out / 'study.db'}"

    @property
    def designed(self) -> bool:
        return self.grid or self.ablate


class Journal(JournalStorage, BaseHeartbeat):
    """Optuna's journal file, with the heartbeat that it lacks: a file beside it for each trial, touched by its worker."""

    def __init__(self, path: Path, interval: int, retry: RetryHeartbeatStaleTrialCallback):
        self.alive = path.with_name(f"{path.name}.alive")
        self.alive.mkdir(parents=True, exist_ok=True)
        self.interval, self.retry = interval, retry
        super().__init__(JournalFileBackend(str(path)))

    def record_heartbeat(self, trial_id: int):
        (self.alive / str(trial_id)).touch()

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        clock = self.alive / "clock"  # the disk's: those of machines may differ
        clock.touch()
        now = clock.stat().st_mtime
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        ids = [self.get_trial_id_from_study_id_trial_number(study_id, trial.number) for trial in running]
        return [trial_id for trial_id in ids if now - (self.alive / str(trial_id)).stat().st_mtime > 3 * self.interval]

    def get_heartbeat_interval(self) -> int:
        return self.interval

    def get_heartbeat_stale_trial_callback(self) -> RetryHeartbeatStaleTrialCallback:
        return self.retry


class Heart:
    """Tells the storage that a trial's worker is alive, every `interval` seconds at most."""

    def __init__(self, storage: RDBStorage | Journal, trial_id: int, interval: int):
        self.storage, self.trial_id, self.interval = storage, trial_id, interval
        self.last = -np.inf

    def beat(self):
        if time.monotonic() - self.last >= self.interval:
            self.storage.record_heartbeat(self.trial_id)
            self.last = time.monotonic()


def open_storage(args: Args) -> RDBStorage | Journal:
    """Exits with one line where it cannot be opened."""
    retry = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
    try:
        if args.storage.startswith("journal:"):
            return Journal(Path(args.storage.removeprefix("journal:")), args.heartbeat, retry)
        patience = {"connect_args": {"timeout": 60}} if args.storage.startswith("sqlite") else {}
        return RDBStorage(
            args.storage, patience, heartbeat_interval=args.heartbeat, grace_period=3 * args.heartbeat,
            heartbeat_stale_trial_callback=retry,
        )  # fmt: skip
    except Exception as error:  # of any database driver
        shown = re.sub(r":[^:@/]*@", ":***@", args.storage)
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        sys.exit(f"--storage {shown}: {told}; expected a URL that SQLAlchemy can open, or journal:FILE")


def make_pruner(args: Args) -> optuna.pruners.BasePruner:
    return {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3),
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }[args.pruner]()


# Setting up


def prepare(args: Args, arguments: list[str]) -> dict:
    """What all trials share, and what the same study may not be resumed with another of.

    Raises ValueError in one line that names the flag and what was expected.
    """
    flags = [
        flags_of(args.script, [*arguments, *(("--market", market) if market else ())]) for market in args.markets or (None,)
    ]
    require_flags(args.script, arguments, flags[0])
    entries = args.space or (() if args.designed else (DEFAULT,))
    space, start = read_space(entries, arguments, flags, args.designed)
    taken = (*OURS, *(("market",) if args.markets else ()))
    if twice := [name for name in taken if name in space or value_in(arguments, name) is not None]:
        raise ValueError(f"--{twice[0]}: is set for each run here; expected neither in --space nor after --")
    if args.markets and "market" not in flags[0]:
        raise ValueError(f"--markets {' '.join(args.markets)}: {args.script.name} has no --market; expected none")
    varied = [name for name, values in space.items() if not values.single()]
    if not varied and not args.designed:
        raise ValueError("--space: nothing varies; expected entries such as learning-rate=log:1e-4:1e-2")
    if args.sampler == "cmaes" and not args.designed and len(varied) < 2:
        raise ValueError("--sampler cmaes: expected at least two parameters in --space")
    if args.metric == "script" and (judges := [name for name in varied if name in CHOOSING]):
        raise ValueError(
            f"--metric script: --space {judges[0]} changes what the script chooses by, and so what trials are compared by; "
            "expected growth, sharpe or utility:<risk aversion>"
        )
    return {
        "script": str(args.script),
        "script_sha256": hashlib.sha256(args.script.read_bytes()).hexdigest(),
        "arguments": arguments,
        "threads": "num-threads" in flags[0] and value_in(arguments, "num-threads") is None,
        "space": {name: distribution_to_json(values) for name, values in space.items()},
        "start": start,
        "design": "grid" if args.grid else "ablation" if args.ablate else "search",
        "seeds": list(args.seeds),
        "markets": list(args.markets),
        "metric": args.metric,
        "aggregate": args.aggregate,
    }


def planned(setup: dict, trials: int) -> list[dict[str, Value] | None]:
    """Parameters of every slot of a study; None: the sampler suggests them. A slot is a trial and what replaces it if lost."""
    if setup["design"] == "search":
        return [setup["start"], *([None] * (trials - 1))]
    levels = {name: list(json_to_distribution(text).choices) for name, text in setup["space"].items()}
    if setup["design"] == "grid":
        return [dict(zip(levels, values)) for values in itertools.product(*levels.values())]
    first = {name: values[0] for name, values in levels.items()}
    return [first, *({**first, name: value} for name, values in levels.items() for value in values[1:])]


def set_up(study: optuna.Study, setup: dict, args: Args):
    """Queue the trials that the study lacks. Of those that failed, only parameters that were asked for are tried again.

    Raises ValueError that names the first field that the study was begun with another of, or the folder of another study.
    """
    begun = study.user_attrs.get("setup")
    if begun is None:
        if any((args.out / "trials").glob("*")):
            raise ValueError(
                f"--out {args.out}: holds trials of another study; expected another folder, or its --study and --storage"
            )
        study.set_user_attr("setup", setup)
    elif different := [key for key in setup if begun.get(key) != setup[key]]:
        key = different[0]
        raise ValueError(
            f"--study {study.study_name}: was begun with {key} {begun.get(key)}, not {setup[key]}; expected another name"
        )
    plan, held = planned(setup, args.trials), set()
    for trial in study.get_trials(deepcopy=False):
        slot = trial.user_attrs["slot"]
        if trial.state != TrialState.FAIL or ("failure" in trial.user_attrs and slot < len(plan) and plan[slot] is None):
            held.add(slot)
    for slot, params in enumerate(plan):
        if slot not in held:
            study.enqueue_trial(params or {}, user_attrs={"slot": slot})


# Running trials


def claim(study: optuna.Study, storage: RDBStorage | Journal, slots: int) -> optuna.Trial | None:
    """A queued trial that is now this worker's; None if there is none. No other worker gets the same.

    Two commands that set the same study up at once may have queued a slot twice: its first trial counts.
    """
    study_id = storage.get_study_id_from_name(study.study_name)
    taken = set()
    for trial in study.get_trials(deepcopy=False):
        slot = trial.user_attrs["slot"]
        if trial.state == TrialState.WAITING and slot < slots and slot not in taken:
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            storage.record_heartbeat(trial_id)  # before it runs: a running trial without a sign of life is never missed
            with contextlib.suppress(UpdateFinishedTrialError):
                if storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                    return optuna.Trial(study, trial_id)
        if trial.state != TrialState.FAIL:
            taken.add(slot)
    return None


def work(args: Args, study: optuna.Study, storage: RDBStorage | Journal):
    """Run trials until none is left, those of workers that vanish included. Exits with one line if the first ones all fail."""
    setup, started = study.user_attrs["setup"], datetime.now()
    slots, terms = len(planned(setup, args.trials)), Terms(args.out / "trials", args.timeout, threads(args))
    study_id = storage.get_study_id_from_name(study.study_name)
    while True:
        with (args.out / "claim.lock").open("a") as lock:  # SQLite does not keep two workers from the same trial by itself
            fcntl.flock(lock, fcntl.LOCK_EX)
            optuna.storages.fail_stale_trials(study)
            trial = claim(study, storage, slots)
        if trial is None:
            if not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                return
            time.sleep(POLL)  # another worker's trial may yet come back
            continue
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        try:
            outcome = run_trial(study, trial, setup, terms, Heart(storage, trial_id, args.heartbeat).beat)
        except UpdateFinishedTrialError:
            outcome = "held to be lost, for this worker was silent too long; another runs it again"
        except BaseException:  # a request to end, or an error of this program: the trial is not at fault, and queued again
            with contextlib.suppress(UpdateFinishedTrialError):
                storage.set_trial_state_values(trial_id, TrialState.FAIL)
                RetryHeartbeatStaleTrialCallback()(study, study.get_trials(deepcopy=False)[trial.number])
            raise
        ended = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        fine = [t for t in ended if t.state != TrialState.FAIL]
        print(f"trial {trial.number} ({len({t.user_attrs['slot'] for t in ended})} of {slots} ended): {outcome}", flush=True)
        failed = [t for t in ended if "failure" in t.user_attrs and t.datetime_complete >= started]
        if not fine and len(failed) >= HOPELESS:
            sys.exit(f"the first {len(failed)} trials failed, the last: {failed[-1].user_attrs['failure']}")


def threads(args: Args) -> int:
    """CPU threads of a run: the workers of this machine share its cores."""
    return max(1, len(os.sched_getaffinity(0)) // args.workers)


# The command


@contextlib.contextmanager
def worker_process(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """A worker of this command, which is asked to end when the block is left."""
    call = [sys.executable, str(Path(__file__).resolve()), AS_WORKER, *arguments]
    process = subprocess.Popen(
        call, env=environment(), start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM)
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def run_worker(arguments: list[str]) -> int:
    """Exit code of a worker; as a task of Ray."""
    with worker_process(arguments) as process:
        return process.wait()


def run_on_ray(args: Args, own: list[str]) -> list[int]:
    """Exit codes of the workers, each a task of a Ray cluster."""
    try:
        import ray  # a cluster is optional
    except ImportError:
        sys.exit("--ray: Ray is not installed; expected pip install ray, or no --ray")
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": environment()["PYTHONPATH"]}}, log_to_driver=True)
    end_on_signals()  # Ray has set handlers of its own
    task = ray.remote(num_cpus=threads(args), max_retries=0)(run_worker)
    tasks = [task.remote(own) for _ in range(args.workers)]
    try:
        return ray.get(tasks)
    finally:
        for running in tasks:
            ray.cancel(running)  # raises KeyboardInterrupt in run_worker
        ray.wait(tasks, num_returns=len(tasks), timeout=2 * PATIENCE)
        ray.shutdown()


def main(args: Args, own: list[str], arguments: list[str], as_worker: bool = False) -> int:
    """own: the command's arguments; arguments: the script's, after the --."""
    warnings.simplefilter("ignore", ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make = {"sampler": make_sampler(args.sampler, args.seed), "pruner": make_pruner(args), "study_name": args.study}
    if as_worker:
        storage = open_storage(args)
        work(args, optuna.load_study(storage=storage, **make), storage)
        return 0
    try:
        setup = prepare(args, arguments)
        args.out.mkdir(parents=True, exist_ok=True)
        storage = open_storage(args)
        study = optuna.create_study(storage=storage, direction="maximize", load_if_exists=True, **make)
        set_up(study, setup, args)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    slots = len(planned(setup, args.trials))
    print(f"{slots} trials of {len(setup['seeds']) * max(1, len(setup['markets']))} runs each in {args.out}", flush=True)
    for name, text in setup["space"].items():
        print(f"    {name}: {text_of(json_to_distribution(text))}, first {setup['start'][name]}", flush=True)
    codes = [0]
    try:
        if args.ray:
            codes = run_on_ray(args, [*own, "--", *arguments])
        elif args.workers == 1:
            work(args, study, storage)
        else:
            with contextlib.ExitStack() as stack:
                workers = [stack.enter_context(worker_process([*own, "--", *arguments])) for _ in range(args.workers)]
                codes = [worker.wait() for worker in workers]
    finally:
        trials = write_trials(study, args.out)
    ended = {t.user_attrs["slot"] for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
    if left := len(set(range(slots)) - ended):
        sys.exit(f"{left} of {slots} trials are left, the workers ended with {codes}; the same command goes on from here")
    print(write_results(study, trials, args.out))
    return 0


if __name__ == "__main__":
    end_on_signals()
    as_worker = sys.argv[1:2] == [AS_WORKER]
    given = sys.argv[2 if as_worker else 1 :]
    split = given.index("--") if "--" in given else len(given)
    own, arguments = given[:split], given[split + 1 :]
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__, args=own), own, arguments, as_worker))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
