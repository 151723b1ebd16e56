"""Run every script and every baseline on the same markets, seeds, costs and fills, then build the scoreboard.

Each run is a process with a folder of its own, `<runs_dir>/<job>/`, named after what it runs: started again, the runner skips
what has finished under the same code, resumes what has left a checkpoint, and repeats the rest. What fails after its retries
leaves a run directory that says so, with the last lines of its log: on the scoreboard it is a red row.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from envs import ledger
from envs.synthetic import drawn_from_seed

ROOT = Path(__file__).resolve().parents[1]
BASELINES = "baselines"
# What a script is run on, by the last part of its name; the first two are --quick's.
MARKETS = {
    "leadlag": ("synthetic:leadlag", "sp500", "synthetic:noise"),
    "portfolio": ("synthetic:garleanu-pedersen", "sp500", "synthetic:noise", "synthetic:merton"),
}
OWN_COSTS = ("synthetic:garleanu-pedersen", "synthetic:merton")  # their closed form holds for the costs that scripts set there
QUICK_STEPS = 1_000_000
LOG_LINES = 25


@dataclass
class Args:
    quick: bool = False
    """two markets a script, three seeds, a million steps: minutes on two cores"""
    scripts: tuple[str, ...] = ()
    """scripts of algos/ to run, such as ppo_leadlag; baselines for the rules (all by default)"""
    markets: tuple[str, ...] = ()
    """markets to run all of them on, instead of each script's own"""
    seeds: tuple[int, ...] = ()
    """seeds (default 1 to 5; with --quick 1 to 3)"""
    costs: str = "institutional"
    """cost model of every run; markets with a closed form keep the costs that it holds for"""
    fill: str = "auto"
    """fill rule of every run"""
    total_timesteps: int = 0
    """steps of each run (0: the script's default; with --quick a million)"""
    workers: int = 0
    """runs at once (0: one for every two cores)"""
    ray_address: str | None = None
    """address of a Ray cluster that shares this folder, instead of local workers"""
    retries: int = 1
    """how often a failed run is tried again"""
    timeout: float = 7200.0
    """seconds after which a run counts as failed"""
    runs_dir: Path = ROOT / "runs" / "benchmark"
    """folder of the runs"""
    out: Path = ROOT / "benchmark" / "results"
    """folder of the scoreboard"""

    def __post_init__(self):
        available = available_scripts()
        unknown = [name for name in self.scripts if name not in (*available, BASELINES)]
        if unknown:
            sys.exit(f"--scripts {' '.join(unknown)}: expected some of {' '.join((*available, BASELINES))}")
        for flag in ("retries", "workers", "total_timesteps"):
            if getattr(self, flag) < 0:
                sys.exit(f"--{flag.replace('_', '-')} {getattr(self, flag)}: expected 0 or more")
        self.seeds = self.seeds or ((1, 2, 3) if self.quick else (1, 2, 3, 4, 5))
        self.total_timesteps = self.total_timesteps or (QUICK_STEPS if self.quick else 0)


@dataclass(frozen=True)
class Job:
    """One process. `folder` is its name: what it runs on what, readable, and a hash of the whole command."""

    script: str
    market: str
    seed: int
    flags: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> str:
        digest = hashlib.sha256("\0".join(map(str, asdict(self).values())).encode()).hexdigest()[:8]
        market = "".join(c if c.isalnum() else "-" for c in Path(self.market).name)[:40]
        return f"{self.script}__{market}__{self.seed}__{digest}"

    @property
    def path(self) -> Path:
        return ROOT / ("benchmark" if self.script == BASELINES else "algos") / f"{self.script}.py"


def available_scripts() -> list[str]:
    return sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


def plan(args: Args) -> list[Job]:
    """Every job of a benchmark, the same for the same arguments."""
    scripts = args.scripts or (*available_scripts(), BASELINES)
    jobs, seen = [], []
    for script in (s for s in scripts if s != BASELINES):
        markets = MARKETS.get(script.rpartition("_")[2], ("sp500",))
        for market in args.markets or (markets[:2] if args.quick else markets):
            steps = ("--total-timesteps", str(args.total_timesteps)) if args.total_timesteps else ()
            jobs += [Job(script, market, seed, (*terms(args, market), *steps)) for seed in args.seeds]
            seen += [market] if market not in seen else []
    if BASELINES in scripts:
        seen = seen or list(args.markets) or ["sp500"]
        # on prices that are not drawn from the seed, rules have no seed to differ by
        jobs += [
            Job(BASELINES, market, seed, terms(args, market))
            for market in seen
            for seed in (args.seeds if drawn_from_seed(market) else args.seeds[:1])
        ]
    return jobs


def terms(args: Args, market: str) -> tuple[str, ...]:
    own = any(market.startswith(name) for name in OWN_COSTS)
    return (() if own else ("--costs", args.costs)) + ("--fill", args.fill)


def code_hash(job: Job) -> str:
    """Of the script and all of envs/: a run of older code is run again."""
    rules = [ROOT / "benchmark" / "rules.py"] if job.script == BASELINES else []
    sources = [job.path, *rules, *sorted((ROOT / "envs").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def run_job(job: Job, runs_dir: Path, retries: int, timeout: float, threads: int) -> dict:
    """Run a job unless it has finished before; returns its record, which is also written to job.json."""
    folder = runs_dir / job.folder
    record_path, log = folder / "job.json", folder / "log.txt"
    record = read_json(record_path)
    code = code_hash(job)
    if record.get("code") == code and record.get("status") == "finished":
        return record | {"skipped": True}
    if record.get("code") != code:  # never continue a run of other code
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"job": asdict(job), "code": code, "status": "running", "attempts": 0}
    ledger.write_json(record_path, record)
    started = time.time()
    for _ in range(retries + 1):
        record["attempts"] += 1
        failure = attempt(job, folder, log, timeout, threads)
        if failure is None:
            break
    record |= {"status": "finished" if failure is None else "failed", "failure": failure, "seconds": time.time() - started}
    for run in run_dirs(folder) or [mark_failed(job, folder)]:
        shutil.copy(log, run / "log.txt")
        content = read_json(run / "run.json")
        if failure is not None and content.get("status") != "finished":
            ledger.write_json(run / "run.json", content | {"status": "failed", "failure": content.get("failure") or failure})
    ledger.write_json(record_path, record)
    return record


def attempt(job: Job, folder: Path, log: Path, timeout: float, threads: int) -> str | None:
    """One try; None, or why it failed. It goes on from a checkpoint where there is one."""
    stop_leftover(folder)
    command = [sys.executable, str(job.path), "--market", job.market, "--seed", str(job.seed), "--runs-dir", str(folder)]
    command += job.flags
    if job.script != BASELINES:
        command += ["--num-threads", str(threads)]
        unfinished = [run for run in run_dirs(folder) if (run / "model.pt").is_file()]
        for run in run_dirs(folder):
            if run not in unfinished[-1:]:
                shutil.rmtree(run)
        if unfinished:
            command = [sys.executable, str(job.path), "--resume", str(unfinished[-1])]
    else:
        for run in run_dirs(folder):
            shutil.rmtree(run)
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        (folder / "pid").write_text(str(process.pid))
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"not finished after {timeout:g} seconds"
        finally:
            process.kill()
            process.wait()
            (folder / "pid").unlink()
    if code:
        return f"exit code {code}: {last_lines(log)}"
    if not run_dirs(folder):
        return "left no run directory"
    return None


def stop_leftover(folder: Path):
    """A runner that was killed leaves its processes behind; end the one that still writes to this folder."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / "pid").read_text())
        if str(folder) in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0"):
            os.kill(pid, signal.SIGKILL)


def run_dirs(folder: Path) -> list[Path]:
    return sorted((path.parent for path in folder.glob("*/run.json")), key=lambda path: path.stat().st_mtime)


def mark_failed(job: Job, folder: Path) -> Path:
    """A run directory for a process that died before it made one, so that the scoreboard can show it."""
    run = folder / f"failed__{job.script}__{job.seed}__{int(time.time())}"
    run.mkdir()
    args = {"exp_name": job.script, "seed": job.seed, "market": job.market}
    ledger.write_json(run / "run.json", {"status": "failed", "script": job.path.name, "args": args})
    return run


def last_lines(log: Path, lines: int = LOG_LINES) -> str:
    text = log.read_text(errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def execute(args: Args, jobs: list[Job]) -> list[dict]:
    """All jobs, some at once; prints a line as each one ends. The order of the records is that of the jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or max(1, cores // 2)
    options = (args.runs_dir, args.retries, args.timeout, max(1, cores // workers))
    records: dict[Job, dict] = {}
    started = time.time()

    def report(job, record):
        records[job] = record
        state = "skipped (finished before)" if record.get("skipped") else f"{record['status']} in {record['seconds']:.0f} s"
        print(f"[{len(records)}/{len(jobs)}, {time.time() - started:.0f} s] {job.folder}: {state}", flush=True)
        if record["status"] == "failed":
            print("    " + record["failure"].replace("\n", "\n    "), flush=True)

    if args.ray_address is not None:
        import ray  # a cluster is optional: pip install ray

        ray.init(address=args.ray_address, runtime_env={"working_dir": None})
        remote = ray.remote(num_cpus=options[-1])(run_job)
        waiting = {remote.remote(job, *options): job for job in jobs}
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            report(waiting.pop(done), ray.get(done))
    else:
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(run_job, job, *options): job for job in jobs}
            for future in as_completed(futures):
                report(futures[future], future.result())
    return [records[job] for job in jobs]


def main(args: Args) -> int:
    args.runs_dir = args.runs_dir.resolve()
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    jobs = plan(args)
    print(f"{len(jobs)} runs in {args.runs_dir}", flush=True)
    records = execute(args, jobs)
    folders = [str(args.runs_dir / job.folder) for job in jobs]
    scoreboard = [sys.executable, str(ROOT / "benchmark" / "scoreboard.py"), *folders, "--out", str(args.out)]
    board = subprocess.run(scoreboard, cwd=ROOT).returncode
    failed = [record for record in records if record["status"] != "finished"]
    print(f"{len(records) - len(failed)} of {len(records)} runs finished; scoreboard in {args.out}")
    return 1 if failed or board else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
