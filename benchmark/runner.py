"""Run every script and every baseline on the same markets, seeds, costs and fills, then build the scoreboard.

A full run: 5 seeds of every script of algos/, with the steps that it defaults to, on its own markets (MARKETS) and on the
protocol's (PROTOCOL); the baselines on all of these; --folds walks forward on real prices. --quick: 2 seeds, half a
million steps, the first two markets of each script (the first of one that learns from a dataset), no protocol, and no fitted
rules on drawn markets: a dozen scripts take less than half an hour on two cores. It shows that everything runs; scores after
so few steps say little.

Scripts that learn from a dataset (OFFLINE) get one collected for them first, on the same terms, by collect.py: once for all
that need it, into `<runs_dir>/datasets/<what was collected>/data`. Those that adapt (ADAPTING) run on sets of tasks only. Those
that need the run of another script (MASTERS) are left out: nothing here makes it for them. Start both by hand, and give the
scoreboard their run directories.

Each run is a process with a folder of its own, `<runs_dir>/<job>/`, named after what it runs: started again, the runner skips
what has finished under the same code, resumes what has left a checkpoint, and repeats the rest. What fails after its retries
leaves a run directory that says so, with its log: on the scoreboard it is a red row, and the exit code is 1.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import rundirs
import tyro
from jobs import (
    ROOT,
    Job,
    Limits,
    cores,
    execute,
    hash_of,
    load_ray,
    local_results,
    locked,
    ray_results,
    read_json,
    run_command,
    run_process,
    stop_leftover,
    tries,
)

from envs import ledger
from envs.dataset import META, sha256_of
from envs.synthetic import drawn_from_seed
from envs.tasks import TASK_SETS

BASELINES = "baselines"
COLLECTOR = "collect"
# Beginnings of the names of scripts that learn from a dataset alone: it is collected before they start, and brings the market,
# its costs, fill and splits along, so that none of those flags is theirs.
OFFLINE = ("bc_", "cql_", "iql_")
# And of those that need the run of another script, whose agents they command.
MASTERS = ("ppo_allocator_",)
# And of those that adapt to a task, a part of whose bars they spend on that: they run on sets of tasks alone (envs/tasks.py),
# so that elsewhere no other script's scores are cut to the bars that are left.
ADAPTING = ("maml_", "pearl_", "rl2_")
DATASETS, DATASET = "datasets", "dataset.hdf5"
# Markets of a script, by the last part of its name; any other script runs on the real one alone. --quick: the first two.
REAL = "sp500"
MARKETS = {
    "leadlag": ("synthetic:leadlag", REAL, "synthetic:hidden"),
    "portfolio": ("synthetic:garleanu-pedersen", REAL, "synthetic:merton", "synthetic:tail"),
    "diffmarket": ("synthetic:garleanu-pedersen", REAL, "synthetic:merton"),
    "trading": ("synthetic:ou", REAL, "synthetic:modes"),
}
# More runs of a script, under names of their own; not with --quick.
VARIANTS = {
    "ppo_quantile_portfolio": (
        ("--cvar-alpha", "0.1", "--exp-name", "ppo_quantile_portfolio_static"),
        ("--cvar-alpha", "0.1", "--risk", "iterated", "--exp-name", "ppo_quantile_portfolio_iterated"),
    ),
}
OFFLINE_MARKETS = ("synthetic:garleanu-pedersen", "synthetic:leadlag", REAL)  # --quick: the first
TASKS = {
    "leadlag": (TASK_SETS["bull-bear"], TASK_SETS["mixed"]),
    "portfolio": (TASK_SETS["portfolio-signal"], TASK_SETS["portfolio-mixed"]),
}  # --quick: the first
# What is collected on a market, by the beginning of its name; any other is long only, as the online script trades it there.
REGIMES = {
    "synthetic:leadlag": "lookback",
    "synthetic:garleanu-pedersen": "long_short",
    "synthetic:merton": "long_short",
}
# The script that the collector trains, and what its data depend on besides in benchmark/
TRAINED = {"lookback": "ppo_leadlag", "long_only": "ppo_portfolio", "long_short": "ppo_portfolio"}
COLLECTORS_CODE = ("baselines.py", "behaviours.py", "replay.py", "rules.py")
# What every script meets besides: controls in which nothing can be found, and histories and symbols of other draws.
PROTOCOL = {
    "noise": "synthetic:noise",
    "shuffled": f"shuffled:{REAL}",
    "monte-carlo": f"bootstrap:{REAL}",
    "cross-universe": f"crossed:{REAL}",
}
SEEDS, QUICK_SEEDS = (1, 2, 3, 4, 5), (1, 2)
# On one core half a million steps of PPO take 15 s, most of it start-up. A dozen scripts are 48 runs, two at a time: half an
# hour leaves each a minute.
QUICK_STEPS, QUICK_GRADIENT_STEPS = 500_000, 2_000
TIMEOUT, QUICK_TIMEOUT = 7200.0, 300.0  # seconds
# Of the baselines on a drawn market, those that --quick has time for: nothing is fitted to each of its many histories.
QUICK_RULES = ("buy-and-hold", "equal-weight", "equal-weight-monthly", "random", "kelly-lite")
QUICK_RULES_OF = {
    "synthetic:leadlag": ("lead-lag-10", "lead-lag-30", "lead-lag-90", "oracle-regime", "oracle-returns"),
    "synthetic:garleanu-pedersen": ("closed-form",),
    "synthetic:merton": ("closed-form",),
}
OWN_COSTS = (
    "synthetic:garleanu-pedersen",
    "synthetic:merton",
    "synthetic:black-scholes",
    "synthetic:tail",
)  # their closed form holds for the costs that scripts set there


@dataclass
class Args:
    quick: bool = False
    """less of everything, as above: minutes on two cores"""
    scripts: tuple[str, ...] = ()
    """scripts of algos/ to run, such as ppo_leadlag; baselines for the rules (all by default)"""
    markets: tuple[str, ...] = ()
    """markets to run all of them on, instead of each script's own and the protocol's"""
    protocol: tuple[str, ...] | None = None
    """more markets for all: noise, shuffled, monte-carlo, cross-universe (default all; none with --quick or --markets)"""
    folds: int = 0
    """walk-forward folds, all of them run, on markets with one real history (0: one split)"""
    start: str | None = None
    """first date of real prices, and of what is made of them"""
    end: str | None = None
    """last date of them"""
    seeds: tuple[int, ...] = ()
    """seeds (default 1 to 5; with --quick 1 and 2)"""
    costs: str = "institutional"
    """cost model of every run; markets with a closed form keep the costs that it holds for"""
    fill: str = "auto"
    """fill rule of every run"""
    total_timesteps: int = 0
    """steps of each run, and of the PPO that data are collected with (0: the script's default; with --quick half a million)"""
    gradient_steps: int | None = None
    """gradient steps of scripts that learn from a dataset (the script's default; with --quick 2,000)"""
    workers: int = 0
    """runs at once (0: one for every two cores; with --quick one for every core)"""
    ray_address: str | None = None
    """address of a Ray cluster whose machines share these folders (local: start one here), instead of local workers"""
    retries: int = 1
    """how often a failed run is tried again, from its checkpoint if it left one"""
    timeout: float = 0.0
    """seconds after which a try counts as failed (0: two hours; with --quick five minutes)"""
    runs_dir: Path = ROOT / "runs" / "benchmark"
    """folder of the runs; one runner at a time"""
    out: Path = ROOT / "benchmark" / "results"
    """folder of the scoreboard"""
    dry_run: bool = False
    """print the commands of all runs, and do nothing"""

    def __post_init__(self):
        """Fill in what depends on other arguments. Exits with one line that names the flag and what was expected."""
        available = (*available_scripts(), BASELINES)
        for flag, given, known in (("scripts", self.scripts, available), ("protocol", self.protocol or (), tuple(PROTOCOL))):
            if unknown := [name for name in given if name not in known]:
                sys.exit(f"--{flag} {' '.join(unknown)}: expected some of {' '.join(known)}")
        for flag in ("folds", "total_timesteps", "workers", "retries"):
            if getattr(self, flag) < 0:
                sys.exit(f"--{flag.replace('_', '-')} {getattr(self, flag)}: expected 0 or more")
        if self.gradient_steps is not None and self.gradient_steps < 1:
            sys.exit(f"--gradient-steps {self.gradient_steps}: expected at least 1")
        if any(seed < 0 for seed in self.seeds):
            sys.exit(f"--seeds {' '.join(map(str, self.seeds))}: expected 0 or more each")
        if not 0 <= self.timeout < float("inf"):
            sys.exit(f"--timeout {self.timeout:g}: expected 0 or a number of seconds")
        self.scripts = self.scripts or available
        self.seeds = self.seeds or (QUICK_SEEDS if self.quick else SEEDS)
        self.total_timesteps = self.total_timesteps or (QUICK_STEPS if self.quick else 0)
        self.gradient_steps = self.gradient_steps or (QUICK_GRADIENT_STEPS if self.quick else None)
        self.timeout = self.timeout or (QUICK_TIMEOUT if self.quick else TIMEOUT)
        if self.protocol is None:
            self.protocol = () if self.quick or self.markets else tuple(PROTOCOL)
        self.runs_dir, self.out = self.runs_dir.resolve(), self.out.resolve()


@dataclass(frozen=True)
class BenchmarkJob(Job):
    """One process: a script with its flags on a market, all baselines with a seed of theirs, or the collector of a dataset."""

    script: str
    market: str
    seed: int
    flags: tuple[str, ...] = ()
    data: "BenchmarkJob | None" = None  # what collects the dataset that it learns from

    @property
    def folder(self) -> str:
        """Its name: what it runs on what, readable, and a hash of all of it."""
        content = {key: value for key, value in asdict(self).items() if value is not None}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        market = "".join(c if c.isalnum() else "-" for c in Path(self.market).name)[:40]
        return f"{self.script}__{market}__{self.seed}__{digest}"

    @property
    def path(self) -> Path:
        return ROOT / ("benchmark" if self.script in (BASELINES, COLLECTOR) else "algos") / f"{self.script}.py"

    @property
    def resumable(self) -> bool:
        return self.script != BASELINES  # which leave a run directory for every rule

    @property
    def told(self) -> dict:
        exp_name = self.flags[self.flags.index("--exp-name") + 1] if "--exp-name" in self.flags else self.script
        return {"exp_name": exp_name, "seed": self.seed, "market": self.market}

    def command(self, folder: Path, threads: int) -> list[str]:
        """What starts it afresh, with its run directories, or the collector's dataset, in `folder`."""
        dataset = data_folder(self.data, folder.parent) / DATASET if self.data else None
        source = ("--dataset", str(dataset)) if dataset else ("--market", self.market)
        target = "--out" if self.script == COLLECTOR else "--runs-dir"
        call = [sys.executable, str(self.path), *source, "--seed", str(self.seed), target, str(folder)]
        return [*call, *self.flags, *(() if self.script == BASELINES else ("--num-threads", str(threads)))]

    def code_hash(self, cwd: str) -> str:
        """Of the script, all of envs/, the market's files, and what made its dataset."""
        used = []
        if self.script == BASELINES:
            used = [ROOT / "benchmark" / name for name in ("rules.py", "replay.py")]
        elif self.script == COLLECTOR:
            online = TRAINED[self.flags[self.flags.index("--regime") + 1]]
            used = [ROOT / "algos" / f"{online}.py", *(ROOT / "benchmark" / name for name in COLLECTORS_CODE)]
        market = Path(cwd, self.market)
        data = [market] if market.is_file() else sorted(path for path in market.rglob("*") if path.is_file())
        start = self.data.code_hash(cwd) if self.data else ""
        return hash_of(start, self.path, *used, *sorted((ROOT / "envs").glob("*.py")), *data)

    def prepare(self, runs_dir: Path, limits: Limits, stopping: Callable[[], bool]) -> str | None:
        """Have its dataset collected, if it learns from one."""
        failure = collect(self.data, runs_dir, limits, stopping) if self.data else None
        if failure is None:
            return None
        shutil.copy(runs_dir / DATASETS / self.data.folder / "log.txt", runs_dir / self.folder)
        return f"its data were not collected: {failure}"


def available_scripts() -> list[str]:
    return sorted(path.stem for path in (ROOT / "algos").glob("[!_]*.py") if not path.stem.startswith(MASTERS))


def data_folder(collection: BenchmarkJob, runs_dir: Path) -> Path:
    """Where the collector leaves its dataset; the folder around it has the runner's record and the log."""
    return runs_dir / DATASETS / collection.folder / "data"


def markets_of(script: str, args: Args) -> list[str]:
    """Markets of a script, each once."""
    kind, protocol = script.rpartition("_")[2], args.protocol
    if script.startswith(OFFLINE):
        own, quick = OFFLINE_MARKETS, 1
    elif script.startswith(ADAPTING):
        own, quick, protocol = TASKS[kind], 1, ()
    else:
        own, quick = MARKETS.get(kind, (REAL,)), 2
    own = args.markets or own[: quick if args.quick else None]
    return list(dict.fromkeys([*own, *(PROTOCOL[name] for name in protocol)]))


def plan(args: Args) -> list[BenchmarkJob]:
    """Every job of a benchmark, each once, the same for the same arguments: scripts by name, then the baselines.

    The baselines run wherever a script of the plan does; alone, wherever any script would.
    """
    scripts = [script for script in dict.fromkeys(args.scripts) if script != BASELINES]
    jobs = [
        job
        for script in scripts
        for market in markets_of(script, args)
        for terms in terms_on(market, args)
        for job in (offline_jobs if script.startswith(OFFLINE) else online_jobs)(script, market, terms, args)
    ]
    if BASELINES in args.scripts:
        for market in dict.fromkeys(m for script in scripts or available_scripts() for m in markets_of(script, args)):
            drawn = drawn_from_seed(market)
            known = next((rules for name, rules in QUICK_RULES_OF.items() if market.startswith(name)), ())
            only = ("--only", *QUICK_RULES, *known) if args.quick and drawn else ()
            seeds = args.seeds if drawn else args.seeds[:1]  # on one real history rules have no seed to differ by
            jobs += [
                BenchmarkJob(BASELINES, market, seed, (*terms, *only)) for terms in terms_on(market, args) for seed in seeds
            ]
    return list(dict.fromkeys(jobs))


def online_jobs(script: str, market: str, terms: tuple[str, ...], args: Args) -> list[BenchmarkJob]:
    variants = [(), *(() if args.quick else VARIANTS.get(script, ()))]
    return [
        BenchmarkJob(script, market, seed, (*terms, *steps_of(args), *variant)) for variant in variants for seed in args.seeds
    ]


def offline_jobs(script: str, market: str, terms: tuple[str, ...], args: Args) -> list[BenchmarkJob]:
    """A script on the dataset of each seed, whose collector gets what an online script would; behaviour cloning runs twice.

    The second time on the best tenth of the data, which shows how much of what others gain is a choice of episodes.
    """
    variants = [()]
    if script.startswith("bc_"):
        variants.append(("--top-percent", "10", "--exp-name", f"{script}_top10"))
    regime = next((regime for name, regime in REGIMES.items() if market.startswith(name)), "long_only")
    collect = ("--regime", regime, *terms, *steps_of(args), *(("--quick",) if args.quick else ()))
    steps = ("--gradient-steps", str(args.gradient_steps)) if args.gradient_steps else ()
    return [
        BenchmarkJob(script, market, seed, (*steps, *variant), BenchmarkJob(COLLECTOR, market, seed, collect))
        for variant in variants
        for seed in args.seeds  # innermost, so that workers side by side need different data
    ]


def steps_of(args: Args) -> tuple[str, ...]:
    return ("--total-timesteps", str(args.total_timesteps)) if args.total_timesteps else ()


def terms_on(market: str, args: Args) -> list[tuple[str, ...]]:
    """Flags of costs, fill, dates and split there: one tuple for each split to be run."""
    costs = () if market.startswith(OWN_COSTS) else ("--costs", args.costs)
    days = (args.start, args.end) if "synthetic:" not in market else (None, None)
    dates = [part for flag, day in zip(("--start", "--end"), days) if day for part in (flag, day)]
    folds = 0 if drawn_from_seed(market) else args.folds
    splits = [("--folds", str(folds), "--fold", str(fold)) for fold in range(folds)] or [()]
    return [(*costs, "--fill", args.fill, *dates, *split) for split in splits]


def collect(job: BenchmarkJob, runs_dir: Path, limits: Limits, stopping: Callable[[], bool]) -> str | None:
    """Have a dataset collected, unless it lies there, made by the same code; None, or in one line why there is none.

    Once for all jobs that need it: the first to come collects, the others wait for it and share its success or failure.
    `main` forgets failures, so that the next start tries again. Raises Interrupted once `stopping()` holds.
    """
    out = data_folder(job, runs_dir)
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:  # for writing: a shared disk may refuse to lock what is only read
        fcntl.flock(lock, fcntl.LOCK_EX)  # its holder is of this runner, and ends when `stopping()` holds
        stop_leftover(folder)
        record, code = read_json(folder / rundirs.COLLECTED), job.code_hash(limits.cwd)
        if record.get("code") == code and record.get("status") == "failed":
            return record["failure"]
        if record.get("code") == code and record.get("status") == "finished" and data_complaint(out) is None:
            return None
        record = {"job": asdict(job), "code": code, "status": "running", "attempts": 0}
        ledger.write_json(folder / rundirs.COLLECTED, record)
        (folder / "log.txt").unlink(missing_ok=True)

        def once():
            shutil.rmtree(out, ignore_errors=True)
            return run_process(job.command(out, limits.threads), folder, limits, stopping) or data_complaint(out)

        failure = tries(once, record, limits, stopping)
        record |= {"status": "failed" if failure else "finished", "failure": failure}
        ledger.write_json(folder / rundirs.COLLECTED, record)
        return failure


def data_complaint(folder: Path) -> str | None:
    """What is wrong with a dataset, by the hash in its meta; None where it is whole."""
    path, meta = folder / DATASET, read_json(folder / META)
    if not path.is_file() or not meta:
        return f"left no {DATASET} with {META}"
    return None if meta.get("sha256") == sha256_of(path) else f"{DATASET} is not the one that {META} tells of"


def limits_of(args: Args) -> tuple[Limits, int]:
    """What every job gets, and how many run at once."""
    workers = args.workers or (cores() if args.quick else max(1, cores() // 2))
    return Limits(args.retries, args.timeout, max(1, cores() // workers), os.getcwd()), workers


def main(args: Args) -> int:
    jobs = plan(args)
    if args.dry_run:
        threads = limits_of(args)[0].threads
        for collection in dict.fromkeys(job.data for job in jobs if job.data):
            print(shlex.join(collection.command(data_folder(collection, args.runs_dir), threads)))
        for job in jobs:
            print(shlex.join(job.command(args.runs_dir / job.folder, threads)))
        return 0
    ray = load_ray("ray-address") if args.ray_address is not None else None
    with locked(args.runs_dir, "runs-dir"):
        print(f"{len(jobs)} runs in {args.runs_dir}", flush=True)
        for collection in {job.data for job in jobs if job.data}:  # those that failed before are tried again
            record = data_folder(collection, args.runs_dir).with_name(rundirs.COLLECTED)
            if read_json(record).get("status") == "failed":
                record.unlink()
        limits, workers = limits_of(args)
        if ray:
            results = ray_results(jobs, args.runs_dir, limits, ray, args.ray_address)
        else:
            results = local_results(jobs, args.runs_dir, limits, workers)
        records = execute(jobs, args.runs_dir, results)
        folders = [str(args.runs_dir / job.folder) for job in jobs]
        scoreboard = [sys.executable, str(ROOT / "benchmark" / "scoreboard.py"), *folders, "--out", str(args.out)]
        board = subprocess.run(scoreboard).returncode
    failed = [record for record in records if record["status"] != "finished"]
    print(f"{len(records) - len(failed)} of {len(records)} runs finished; scoreboard in {args.out}")
    return 1 if failed or board else 0


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Args, description=__doc__)))
