"""Jobs: processes of scripts, each with a folder of its own, run here or on a Ray cluster, and gone on with after a kill.

A job that has finished under the same code is skipped; one that left a checkpoint goes on from there; any other is started
afresh. What fails after its retries leaves a run directory that says so, with its log.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import rundirs
from processes import end_on_signals, end_with_parent

from envs import ledger

ROOT = Path(__file__).resolve().parents[1]
LOG_LINES = 25
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that no script sends itself


@dataclass(frozen=True)
class Limits:
    """How a job is run: tries after the first, seconds for each, CPU threads, the folder that relative paths start from, and,
    on a cluster, GPUs, and whether its process ends with the task that started it: that may be started again elsewhere."""

    retries: int
    timeout: float
    threads: int
    cwd: str
    gpus: float = 0.0
    bound: bool = False


class Job(ABC):
    """What the functions below know of a process. Subclasses are frozen dataclasses, whose fields are in its record."""

    resumable = True  # it leaves one run directory, with checkpoints that --resume goes on from

    @property
    @abstractmethod
    def folder(self) -> str:
        """Its name: no other job has the same."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The script."""

    @property
    @abstractmethod
    def told(self) -> dict:
        """Arguments that a failed run names where the script has not: exp_name, seed, market."""

    @abstractmethod
    def command(self, folder: Path, threads: int) -> list[str]:
        """What starts it afresh, with its run directories in `folder`."""

    @abstractmethod
    def code_hash(self, cwd: str) -> str:
        """Of the script and all that its results depend on: a run of older code or data is run again."""

    def prepare(self, runs_dir: Path, limits: Limits, stopping: Callable[[], bool]) -> str | None:
        """Make what it needs; None, or in one line why that failed. Raises Interrupted once `stopping()` holds."""
        return None

    def fault(self, path: Path) -> str | None:
        """What is wrong with a run directory of it; None if it is whole."""
        run = rundirs.read(path)
        if run.reason is None and "panel" not in run.content:
            return "run.json holds no panel"
        if run.reason is None:
            rundirs.load(run)
        return run.reason


class Interrupted(Exception):
    """The command is ending: the job stays as it is, for the next start."""


class Killed(str):
    """Why a process failed that was ended from outside: its checkpoint is not at fault."""


def run_job(job: Job, runs_dir: Path, limits: Limits, stopping: Callable[[], bool] = lambda: False) -> dict:
    """Run a job unless it has finished before; returns its record, which is also written to job.json.

    Raises Interrupted, and leaves the job to be gone on with, once `stopping()` holds.
    """
    folder, started = runs_dir / job.folder, time.time()
    stop_leftover(folder)
    record, code = read_json(folder / "job.json"), job.code_hash(limits.cwd)
    if record.get("code") == code and record.get("status") == "finished" and complaint(job, folder) is None:
        return record | {"skipped": True}
    if record.get("code") != code:  # never continue a run of other code
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"job": asdict(job), "code": code, "status": "running", "attempts": 0}
    ledger.write_json(folder / "job.json", record)
    failure = job.prepare(runs_dir, limits, stopping)
    if failure is None:
        failure = tries(lambda: attempt(job, folder, limits, stopping), record, limits, stopping)
    record |= {"status": "failed" if failure else "finished", "failure": failure, "seconds": time.time() - started}
    if failure:
        mark_failed(job, folder, failure)
    ledger.write_json(folder / "job.json", record)
    return record


def tries(once: Callable[[], str | None], record: dict, limits: Limits, stopping: Callable[[], bool]) -> str | None:
    """Call `once` until it returns None or the retries are spent; counts in record["attempts"], returns the last failure."""
    while True:
        if stopping():
            raise Interrupted
        record["attempts"] += 1
        failure = once()
        if failure is None or record["attempts"] > limits.retries:
            return failure


def attempt(job: Job, folder: Path, limits: Limits, stopping: Callable[[], bool]) -> str | None:
    """One try; None, or in one line why it failed. It goes on from a checkpoint where there is one."""
    checkpoints = [run for run in run_dirs(folder) if (run / "model.pt").is_file()] if job.resumable else []
    for run in run_dirs(folder):
        if run not in checkpoints[-1:]:
            shutil.rmtree(run)
    command = job.command(folder, limits.threads)
    if checkpoints:
        command, model = [*command[:2], "--resume", str(checkpoints[-1])], checkpoints[-1] / "model.pt"
        saved = model.stat().st_mtime_ns
    failure = run_process(command, folder, limits, stopping) or complaint(job, folder)
    at_fault = failure is not None and not isinstance(failure, Killed)
    if at_fault and checkpoints and model.is_file() and model.stat().st_mtime_ns == saved:
        model.unlink()  # it leads nowhere: the next try starts afresh
    return failure


def run_process(command: list[str], folder: Path, limits: Limits, stopping: Callable[[], bool]) -> str | None:
    """Run it to its end, its output into log.txt; None, or why it failed. Whatever ends this call ends its processes too."""
    log = folder / "log.txt"
    env = os.environ | {"PYTHONPATH": python_path(ROOT)}  # the envs/ whose code was hashed
    with log.open("a") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        process = subprocess.Popen(
            command, cwd=limits.cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: Ctrl-C reaches this command alone
            preexec_fn=partial(end_with_parent, signal.SIGKILL) if limits.bound else None,
        )  # fmt: skip
    try:
        (folder / "pid").write_text(str(process.pid))
        deadline = time.monotonic() + limits.timeout
        while (code := process.poll()) is None:
            if stopping():
                raise Interrupted
            if time.monotonic() > deadline:
                return f"not finished after {limits.timeout:g} seconds"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(0.5, max(0.0, deadline - time.monotonic())))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (folder / "pid").unlink(missing_ok=True)
    if -code in FROM_OUTSIDE:
        return Killed(f"ended by {signal.Signals(-code).name}: {last_lines(log, 1)}")
    return f"exit code {code}: {last_lines(log, 1)}" if code else None


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders first."""
    return os.pathsep.join(filter(None, (*map(str, folders), os.environ.get("PYTHONPATH"))))


def complaint(job: Job, folder: Path) -> str | None:
    """What is wrong with the run directories of a job; None where all are whole."""
    runs = run_dirs(folder)
    found = next((f"{run.name}: {fault}" for run in runs if (fault := job.fault(run))), None)
    return found if runs else "left no run directory"


def mark_failed(job: Job, folder: Path, failure: str):
    """Make sure that the scoreboard shows a failure with its log: in the run directory that is at fault, or in a new one.

    Of a job that leaves several run directories those that are whole count.
    """
    known = {"script": job.path.name, "args": job.told}
    faulty = [run for run in run_dirs(folder) if job.resumable or job.fault(run)]
    if not faulty:
        faulty = [folder / f"failed__{job.path.stem}__{job.told['seed']}__{int(time.time())}"]
        faulty[0].mkdir()
    for run in faulty:
        content = known | read_json(run / "run.json")
        ledger.write_json(run / "run.json", content | {"status": "failed", "failure": content.get("failure") or failure})
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(folder / "log.txt", run / "log.txt")


def stop_leftover(folder: Path):
    """A command that was killed outright leaves its processes behind; end the one that still writes to this folder.

    Needs /proc, to tell it from a process that has its number now.
    """
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / "pid").read_text())
        while any(Path(part).is_relative_to(folder) for part in Path(f"/proc/{pid}/cmdline").read_text().split("\0")):
            os.killpg(pid, signal.SIGKILL)
            time.sleep(0.02)


def run_dirs(folder: Path) -> list[Path]:
    """Run directories of a job, oldest first."""
    return sorted(folder.glob("*/"), key=lambda path: path.stat().st_mtime_ns)


def last_lines(log: Path, lines: int = LOG_LINES) -> str:
    text = log.read_text(errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def hash_of(start: str, *paths: Path) -> str:
    """Hex digest of a text and the contents of files."""
    digest = hashlib.sha256(start.encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """{} where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Keep other commands out of the folder of --`flag`. The system lets go of the lock of a process that dies. Exits where it
    is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runner.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            sys.exit(f"--{flag} {folder}: process {file.read().strip()} runs there; expected a folder without a runner")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def local_results(jobs: list[Job], runs_dir: Path, limits: Limits, workers: int) -> Iterator[tuple[Job, Callable[[], dict]]]:
    """(job, its result) as each one ends, `workers` at once in this machine's processes."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(run_job, job, runs_dir, limits, stop.is_set): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def load_ray(flag: str) -> ModuleType:
    """Ray, which --`flag` asks for. Exits where it is not installed: a cluster is optional."""
    try:
        import ray
    except ImportError:
        sys.exit(f"--{flag}: Ray is not installed; expected pip install ray, or no --{flag}")
    return ray


def ray_results(
    jobs: list[Job], runs_dir: Path, limits: Limits, ray: ModuleType, address: str | None
) -> Iterator[tuple[Job, Callable[[], dict]]]:
    """(job, its result) as each one ends, on a Ray cluster, as many at once as it has room for.

    A task whose worker or machine dies is started again by Ray, elsewhere if need be, and goes on from the job's checkpoint.
    """
    env = {"PYTHONPATH": python_path(ROOT, ROOT / "benchmark")}  # where run_job's imports are
    ray.init(address=address, runtime_env={"env_vars": env})
    end_on_signals()  # Ray has set handlers of its own
    try:
        remote = ray.remote(num_cpus=limits.threads, num_gpus=limits.gpus, max_retries=limits.retries)(run_job)
        waiting = {remote.remote(job, runs_dir, replace(limits, bound=True)): job for job in jobs}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done[0]), lambda ref=done[0]: ray.get(ref)
        finally:
            for ref in waiting:
                ray.cancel(ref)  # raises KeyboardInterrupt in run_job, which ends its process
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=10)
    finally:
        ray.shutdown()


def execute(jobs: list[Job], runs_dir: Path, results: Iterator[tuple[Job, Callable[[], dict]]]) -> list[dict]:
    """All jobs; prints a line as each one ends, and the end of the log of what failed. Records in the order of the jobs.

    results: of `local_results` or `ray_results`.
    """
    records: dict[Job, dict] = {}
    started = time.time()
    with contextlib.closing(results):
        for job, result in results:
            folder = runs_dir / job.folder
            try:
                record = result()
            except Exception as error:  # of this command, the disk or the cluster: a red row like any other
                failure = " ".join(f"{type(error).__name__}: {error}".split())
                folder.mkdir(exist_ok=True)
                mark_failed(job, folder, failure)
                record = {"status": "failed", "failure": failure, "seconds": 0.0}
            records[job] = record
            spent, ran = time.time() - started, sum(not r.get("skipped") for r in records.values())
            left = f", {spent / ran * (len(jobs) - len(records)) / 60:.0f} min left" if ran else ""
            state = "skipped, finished before" if record.get("skipped") else f"{record['status']} in {record['seconds']:.0f} s"
            print(f"[{len(records)}/{len(jobs)}, {spent / 60:.1f} min{left}] {job.folder}: {state}", flush=True)
            if record["status"] == "failed":
                log = last_lines(folder / "log.txt") if (folder / "log.txt").is_file() else ""
                print("\n    ".join([f"    {record['failure']}", *log.splitlines()]), flush=True)
    return [records[job] for job in jobs]


def run_command(main: Callable[[], int]):
    """End with the exit code of main(); a request to end says that the same command goes on."""
    end_on_signals()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
