"""The runner: what it plans, and that crashes, kills, retries and second starts end in the same runs or in red rows.

Most tests run it in a tree of its own, over small scripts that only pretend to learn.
"""

import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import ROOT
from scripts import SCRIPTS, Run, assert_same_ledger
from test_scoreboard import make_ledger, make_run

from envs.tasks import TASK_SETS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a runner

# A script as the runner sees one: it learns by adding its iterations to a checksum, which its checkpoint holds.
# modes.json: "script market seed" -> what goes wrong in each start; the last mode is that of all later ones.
FAKE = """
import argparse, hashlib, json, os, shutil, sys, time
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False)
known = "market seed runs-dir num-threads resume total-timesteps costs fill folds fold start end"
known += " dataset gradient-steps top-percent exp-name"
for flag in known.split():
    parser.add_argument(f"--{flag}")
parser.add_argument("--only", nargs="*", default=["equal-weight", "momentum", "random"])
args = parser.parse_args()
script, tree, saved = Path(__file__).stem, Path(__file__).resolve().parents[1], None
if args.resume:
    saved = json.loads((Path(args.resume) / "model.pt").read_text())
    args = argparse.Namespace(**saved["args"] | {"resume": args.resume})
if args.dataset:
    data = Path(args.dataset)
    args.market = json.loads(data.with_name("dataset_meta.json").read_text())["market"]
    assert data.read_text().startswith(args.market) and script.startswith(("bc_", "cql_", "iql_"))
key = f"{args.exp_name or script} {Path(args.market).name} {args.seed}"
starts = tree / "starts" / key
with starts.open("a") as file:
    file.write(f"resume {saved['iteration']}\\n" if saved else "start\\n")
modes = json.loads((tree / "modes.json").read_text()).get(key, ["fine"])
mode = modes[min(len(starts.read_text().splitlines()), len(modes)) - 1]
print(f"{key}: {mode}\\nin {Path.cwd()} with {os.environ['PYTHONPATH']}", flush=True)


def begin(name):
    folder = Path(args.resume or f"{args.runs_dir}/LeadLag-v0__{name}__{args.seed}__{time.time_ns()}")
    folder.mkdir(exist_ok=True)
    run = json.loads((tree / "template" / args.seed / "run.json").read_text())
    run["args"] = {"exp_name": name, "seed": int(args.seed), "market": args.market}
    (folder / "run.json").write_text(json.dumps(run | {"status": "running"}))
    return folder


def end(folder, ledger, **changes):
    if ledger:
        shutil.copy(tree / "template" / ledger / "ledger.parquet", folder)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"status": "finished"} | changes))


def crash():
    print("the log of a crash", flush=True)
    raise ValueError(f"on purpose in {key}")


if mode == "crash" or (mode == "early, then at every resume" and saved):
    crash()
if mode == "nothing":
    sys.exit(0)
if script == "baselines":
    for number, rule in enumerate(args.only):
        if mode == "between rules" and number == 1:
            crash()
        folder = begin(f"baseline-{rule}")
        if mode == "one rule" and number == 1:
            end(folder, None, status="failed", failure="no finite order")
        else:
            end(folder, "nan" if mode == "nan rule" and number == 1 else args.seed)
    sys.exit(mode == "one rule")
folder = begin(args.exp_name or script)
iteration, checksum = (saved["iteration"], saved["checksum"]) if saved else (0, "")
while iteration < 8:
    iteration += 1
    checksum = hashlib.sha256(f"{checksum} {args.seed} {iteration}".encode()).hexdigest()
    if iteration % 2 == 0:
        content = {"args": vars(args), "iteration": iteration, "checksum": checksum}
        (folder / "model.part").write_text(json.dumps(content))
        os.replace(folder / "model.part", folder / "model.pt")
    if iteration == {"first iteration": 1, "late": 5, "early, then at every resume": 5, "later": 7}.get(mode):
        crash()
    if mode == "hang" and iteration == 5:
        (tree / "hangs" / str(os.getpid())).touch()
        time.sleep(600)
learned = {"steps": 9, "episodes": 3, "behaviours": ["random"], "mean_reward": 0.01, "gradient_steps": 8}
learned = {"offline": {"dataset": args.dataset, "sha256": "d"} | learned, "risk_aversion": 1.0} if args.dataset else {}
end(folder, mode if mode in ("nan", "short") else args.seed, checksum=checksum, **learned)
if mode == "cut":
    whole = (folder / "ledger.parquet").read_bytes()
    (folder / "ledger.parquet").write_bytes(whole[: len(whole) // 2])
if mode == "taskless":
    (folder / "run.json").write_text(json.dumps({"status": "finished", "args": {"seed": int(args.seed), "exp_name": script}}))
if mode == "afterwards":
    crash()
"""

# And the collector: its dataset is what it was asked for, its modes are those of "collect market seed".
COLLECT = """
import argparse, hashlib, json, os, shutil, sys, time
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in "market seed out regime num-threads total-timesteps costs fill folds fold start end".split():
    parser.add_argument(f"--{flag}")
parser.add_argument("--quick", action="store_true")
args = parser.parse_args()
tree, out, key = Path(__file__).resolve().parents[1], Path(args.out), f"collect {Path(args.market).name} {args.seed}"
assert not out.exists(), "an unfinished dataset was left there"
out.mkdir(parents=True)
starts = tree / "starts" / key
with starts.open("a") as file:
    file.write("start\\n")
modes = json.loads((tree / "modes.json").read_text()).get(key, ["fine"])
mode = modes[min(len(starts.read_text().splitlines()), len(modes)) - 1]
print(f"{key}: {mode}", flush=True)
run = out / "runs" / f"LeadLag-v0__ppo__{args.seed}__1"
shutil.copytree(tree / "template" / args.seed, run)
(out / "dataset.hdf5").write_text("half of ")
if mode == "hang":
    (tree / "hangs" / str(os.getpid())).touch()
    time.sleep(600)
if mode == "crash":
    raise ValueError(f"on purpose in {key}")
if mode == "slow":
    time.sleep(1)
text = f"{args.market} {vars(args)}"
(out / "dataset.hdf5").write_text(text)
if mode != "no meta":
    sha256 = hashlib.sha256(text.encode()).hexdigest() if mode != "damaged" else "0"
    (out / "dataset_meta.json").write_text(json.dumps({"sha256": sha256, "market": args.market}))
"""


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """What the scripts leave: sound ledgers of seeds 1 and 2, one with NaN, and one that is too short."""
    root = tmp_path_factory.mktemp("template")
    broken = make_ledger(1)
    broken.loc[broken.index[-5], "net_return"] = np.nan
    for name, seed, frame in (("1", 1, None), ("2", 2, None), ("nan", 1, broken), ("short", 1, make_ledger(1, bars=150))):
        make_run(root, name, seed, frame, "synthetic:noise").rename(root / name)
    return root


@pytest.fixture(scope="module")
def modules():
    """runner, jobs and rules, imported as the commands import them."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("runner", "jobs", "rules")})
    finally:
        sys.path.remove(str(ROOT / "benchmark"))


class Tree:
    """A copy of the project with fake_leadlag, fake_portfolio and fake baselines; the runner in this process or its own."""

    def __init__(self, root: Path, templates: Path, modules, monkeypatch):
        self.root, self.runner, self.jobs, self.runs = root, modules.runner, modules.jobs, root / "runs"
        shutil.copytree(ROOT / "benchmark", root / "benchmark", ignore=shutil.ignore_patterns("results", "__pycache__"))
        shutil.copytree(templates, root / "template")
        (root / "envs").symlink_to(ROOT / "envs")
        for name in ("algos", "starts", "hangs"):
            (root / name).mkdir()
        for path in ("algos/fake_leadlag.py", "algos/fake_portfolio.py", "benchmark/baselines.py"):
            (root / path).write_text(FAKE)
        self.goes_wrong()
        for module in (self.runner, self.jobs):
            monkeypatch.setattr(module, "ROOT", root)

    def learns_offline(self, *scripts: str):
        """Scripts that learn from a dataset, the online scripts, the collector and what it uses, all pretended."""
        for path in (*(f"algos/{name}.py" for name in scripts), "algos/ppo_portfolio.py", "algos/ppo_leadlag.py"):
            (self.root / path).write_text(FAKE)
        (self.root / "benchmark" / "collect.py").write_text(COLLECT)
        (self.root / "benchmark" / "behaviours.py").touch()

    def goes_wrong(self, **modes: list[str]):
        """Modes of fake_leadlag on synthetic:noise: seed1=["crash", "fine"]."""
        self.modes({f"fake_leadlag synthetic:noise {name.removeprefix('seed')}": starts for name, starts in modes.items()})

    def modes(self, modes: dict[str, list[str]]):
        (self.root / "modes.json").write_text(json.dumps(modes))

    def no_board(self):
        """A scoreboard that only notes that it was made, where a test looks at the runs alone."""
        (self.root / "benchmark" / "scoreboard.py").write_text(
            "from pathlib import Path\nPath('boards').open('a').write('x')\n"
        )

    def args(self, **options):
        defaults = dict(
            scripts=("fake_leadlag",), markets=("synthetic:noise",), seeds=(1, 2), workers=2, runs_dir=self.runs,
            out=self.root / "out",
        )  # fmt: skip
        return self.runner.Args(**(defaults | options))

    def run(self, **options) -> int:
        return self.runner.main(self.args(**options))

    def start(self, *options: str, **popen) -> subprocess.Popen:
        """The runner in a process of its own, on both seeds."""
        call = [sys.executable, str(self.root / "benchmark" / "runner.py"), "--scripts", "fake_leadlag", "--seeds", "1", "2"]
        call += ["--markets", "synthetic:noise", "--workers", "2", "--runs-dir", str(self.runs), *options]
        path = os.pathsep.join((str(self.root), str(ROOT)))
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(call, cwd=self.root, env=os.environ | {"PYTHONPATH": path}, **(streams | popen))

    def starts(self, seed: int, script="fake_leadlag", market="synthetic:noise") -> list[str]:
        path = self.root / "starts" / f"{script} {market} {seed}"
        return path.read_text().splitlines() if path.exists() else []

    def hanging(self, number: int) -> list[int]:
        """Processes that hang half-way, once there are so many."""
        found = wait_for(lambda: len(list((self.root / "hangs").iterdir())) >= number and list((self.root / "hangs").iterdir()))
        return [int(path.name) for path in found]

    def results(self) -> dict[tuple[str, int], tuple]:
        """(script, seed) -> what its only run directory holds at the end, but for its name."""
        found = {}
        for path in sorted(self.runs.glob("*/*/")):
            run = json.loads((path / "run.json").read_text())
            key = run["args"]["exp_name"], run["args"]["seed"]
            assert key not in found, f"two run directories of {key}"
            found[key] = (run, (path / "ledger.parquet").read_bytes(), (path / "model.pt").exists())
        return found

    def records(self) -> dict[int, dict]:
        paths = self.runs.glob("*/job.json")
        return {record["job"]["seed"]: record for record in (json.loads(path.read_text()) for path in paths)}


@pytest.fixture
def tree(tmp_path, templates, modules, monkeypatch) -> Iterator[Tree]:
    made = Tree(tmp_path / "a tree", templates, modules, monkeypatch)
    monkeypatch.chdir(made.root)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def undisturbed(tmp_path, templates, modules, monkeypatch) -> dict:
    """What a run that nothing happens to leaves."""
    with monkeypatch.context() as patch:
        other = Tree(tmp_path / "undisturbed", templates, modules, patch)
        patch.chdir(other.root)
        other.no_board()
        assert other.run() == 0
        return other.results()


def wait_for(condition, seconds: float = 30):
    """Its value once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def commands(tree, **options) -> list[str]:
    """Of a plan: script, market and flags of each job, without folders."""
    jobs = tree.runner.plan(tree.runner.Args(**options))
    assert len({job.folder for job in jobs}) == len(jobs)
    return [told(job) for job in jobs]


def told(job) -> str:
    """A job in words; of one that learns from a dataset, those of its collector after "from"."""
    source = f" from {told(job.data)}" if job.data else ""
    return " ".join((job.script, job.market, str(job.seed), *job.flags)) + source


# --- what is planned

TERMS = "--costs institutional --fill auto"
DRAWN = ("synthetic:noise", "shuffled:sp500", "bootstrap:sp500", "crossed:sp500")
GP, MERTON, TAIL = "synthetic:garleanu-pedersen", "synthetic:merton", "synthetic:tail"
OWN = (GP, MERTON, TAIL)  # with costs of their own
LEADLAG, HIDDEN = "synthetic:leadlag", "synthetic:hidden"


def test_a_full_run(tree):
    (tree.root / "algos" / "fake_unheardof.py").write_text(FAKE)
    (tree.root / "algos" / "__init__.py").touch()
    every = {
        "fake_unheardof": ("sp500", *DRAWN), "fake_leadlag": (LEADLAG, "sp500", HIDDEN, *DRAWN),
        "fake_portfolio": (GP, "sp500", MERTON, TAIL, *DRAWN),
    }  # fmt: skip
    expected = [
        f"{script} {market} {seed} {'--fill auto' if market in OWN else TERMS}"
        for script, markets in every.items()
        for market in markets
        for seed in (1, 2, 3, 4, 5)
    ]
    expected += [
        f"baselines {market} {seed} {'--fill auto' if market in OWN else TERMS}"
        for market in {"sp500", LEADLAG, HIDDEN, *OWN, *DRAWN}
        for seed in ((1,) if market == "sp500" else (1, 2, 3, 4, 5))
    ]
    assert sorted(commands(tree)) == sorted(expected)


def test_a_script_runs_as_its_variants_too(tree, monkeypatch):
    monkeypatch.setitem(tree.runner.VARIANTS, "fake_leadlag", (("--lags", "3", "--exp-name", "fake_leadlag_short"),))
    options = dict(scripts=("fake_leadlag",), markets=("sp500",), seeds=(1, 2))
    plain = [f"fake_leadlag sp500 {seed} {TERMS}" for seed in (1, 2)]
    assert commands(tree, **options) == [*plain, *(f"{line} --lags 3 --exp-name fake_leadlag_short" for line in plain)]
    assert [line for line in commands(tree, **options, quick=True) if "--lags" in line] == []


def test_variants_are_of_scripts_and_have_names_of_their_own(tree):
    names = [v[v.index("--exp-name") + 1] for variants in tree.runner.VARIANTS.values() for v in variants]
    scripts = {path.stem for path in (ROOT / "algos").glob("*.py")}
    assert set(tree.runner.VARIANTS) <= scripts and len(set(names)) == len(names) and not scripts & set(names)


def test_a_quick_run(tree):
    found = commands(tree, quick=True)
    steps = "--total-timesteps 500000"
    learn = [line for line in found if not line.startswith("baselines")]
    assert sorted(learn) == sorted(
        f"{script} {market} {seed} {'' if market == GP else '--costs institutional '}--fill auto {steps}"
        for script, home in (("fake_leadlag", "synthetic:leadlag"), ("fake_portfolio", GP))
        for market in (home, "sp500")
        for seed in (1, 2)
    )
    rules = [line for line in found if line.startswith("baselines")]
    assert [line.split()[1:3] for line in rules] == [
        ["synthetic:leadlag", "1"], ["synthetic:leadlag", "2"], ["sp500", "1"], [GP, "1"], [GP, "2"]
    ]  # fmt: skip
    assert all(("--only" in line) == ("sp500" not in line) for line in rules)
    assert not any("--total-timesteps" in line for line in rules)


def test_a_dozen_scripts_fit_the_quick_budget(tree):
    """Half an hour of two cores, less five minutes for the installation, the baselines and the scoreboard."""
    for number in range(10):
        (tree.root / "algos" / f"more{number}_portfolio.py").write_text(FAKE)
    args = tree.runner.Args(quick=True)
    jobs = [job for job in tree.runner.plan(args) if job.script != "baselines"]
    assert len(jobs) == 48 and len(jobs) * 60 / 2 <= 25 * 60
    assert tree.runner.limits_of(args) == (tree.runner.Limits(1, 300, 1, str(tree.root)), len(os.sched_getaffinity(0)))
    cores, (limits, workers) = len(os.sched_getaffinity(0)), tree.runner.limits_of(tree.runner.Args())
    assert workers == max(1, cores // 2) and limits.threads == cores // workers and limits.timeout == 7200
    limits, workers = tree.runner.limits_of(tree.runner.Args(workers=3 * cores))
    assert workers == 3 * cores and limits.threads == 1


@pytest.mark.parametrize("market", ["synthetic:leadlag", GP, MERTON, "synthetic:noise"])
def test_quick_rules_make_sense_where_they_run(tree, modules, market):
    (job,) = tree.runner.plan(tree.args(scripts=("baselines",), markets=(market,), seeds=(1,), quick=True))
    panel = importlib.import_module("envs.synthetic").make_panel(f"{market}:bars=300:train=1:val=1:test=1")
    setting = SimpleNamespace(panel=panel, config=modules.rules.RuleConfig())
    only = job.flags[job.flags.index("--only") + 1 :]
    assert only and set(only) <= set(modules.rules.applicable(setting))
    assert not {"mean-variance", "min-variance", "risk-parity", "hrp"} & set(only)
    told = {"synthetic:leadlag": "oracle-regime", GP: "closed-form", MERTON: "closed-form"}.get(market, "equal-weight")
    assert told in only


def test_every_fold_of_real_histories(tree):
    found = commands(tree, folds=3, seeds=(1, 2), scripts=("fake_leadlag", "baselines"), protocol=("noise",))
    folds = [f"--folds 3 --fold {fold}" for fold in range(3)]
    expected = [f"fake_leadlag sp500 {seed} {TERMS} {fold}" for fold in folds for seed in (1, 2)]
    expected += [f"baselines sp500 1 {TERMS} {fold}" for fold in folds]
    assert sorted(line for line in found if "sp500" in line) == sorted(expected)
    assert not any("--fold" in line for line in found if "synthetic" in line)
    protocol = commands(tree, folds=3, seeds=(1,), scripts=("fake_leadlag", "baselines"))
    assert not any("--fold" in line for line in protocol if line.split()[1] in DRAWN)
    assert sum("--fold" in line for line in commands(tree, folds=2, seeds=(1,), markets=("prices.csv",))) == 6


def test_dates_of_real_prices(tree):
    markets = ("prices.csv", "shuffled:prices.csv", "synthetic:noise", "bootstrap:synthetic:noise")
    found = commands(tree, scripts=("fake_leadlag",), seeds=(1,), markets=markets, start="2016", end="2020-06", folds=2)
    dates = "--start 2016 --end 2020-06"
    assert found == [
        f"fake_leadlag prices.csv 1 {TERMS} {dates} --folds 2 --fold 0",
        f"fake_leadlag prices.csv 1 {TERMS} {dates} --folds 2 --fold 1",
        f"fake_leadlag shuffled:prices.csv 1 {TERMS} {dates}",
        f"fake_leadlag synthetic:noise 1 {TERMS}", f"fake_leadlag bootstrap:synthetic:noise 1 {TERMS}",
    ]  # fmt: skip
    (only_end,) = commands(tree, scripts=("fake_leadlag",), seeds=(1,), markets=("prices.csv",), end="2020")
    assert only_end.endswith("--end 2020")


def test_choices(tree):
    assert commands(tree, scripts=("baselines",), seeds=(7,), quick=True, protocol=("shuffled",)) == [
        line for line in commands(tree, seeds=(7,), quick=True, protocol=("shuffled",)) if line.startswith("baselines")
    ]
    one = dict(scripts=("fake_leadlag",), seeds=(3,))
    terms = "--costs zero --fill next_close --total-timesteps 9"
    chosen = dict(markets=("a.csv", "a.csv"), costs="zero", fill="next_close", total_timesteps=9)
    assert commands(tree, **(one | chosen | {"seeds": (3, 3)})) == [f"fake_leadlag a.csv 3 {terms}"]
    assert [line.split()[1] for line in commands(tree, **one, markets=("a.csv",), protocol=("monte-carlo",))] == [
        "a.csv", "bootstrap:sp500"
    ]  # fmt: skip
    assert [line.split()[1] for line in commands(tree, **one, protocol=())] == [LEADLAG, "sp500", HIDDEN]
    quick = commands(tree, **one, quick=True, protocol=("noise", "cross-universe"))
    assert [line.split()[1] for line in quick] == ["synthetic:leadlag", "sp500", "synthetic:noise", "crossed:sp500"]


@pytest.mark.parametrize("text", ["--quick", "--folds 2", "--quick --folds 2 --fill same_close"])
def test_dry_run_prints_commands_that_the_scripts_understand(modules, capsys, tmp_path, text):
    """The real scripts of the project parse what the runner would start."""
    folder = tmp_path / "none"
    args = tyro.cli(modules.runner.Args, args=[*text.split(), "--dry-run", "--runs-dir", str(folder), "--seeds", "4"])
    assert modules.runner.main(args) == 0 and not folder.exists()
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    jobs = modules.runner.plan(args)
    assert len(lines) == len(jobs) + len({job.data for job in jobs if job.data}) > 5
    parsers = {name: lambda given, s=script: parsed(s, given) for name, script in SCRIPTS.items()}
    parsers["baselines"] = importlib.import_module("baselines").parse
    seen, online = set(), [line for line in lines if not Path(line[1]).stem.startswith((*modules.runner.OFFLINE, "collect"))]
    for python, path, *flags in online:
        found = parsers[Path(path).stem](flags)
        seen.add(Path(path).stem)
        assert python == sys.executable and Path(path).is_file() and found.seed == 4
        assert Path(found.runs_dir).parent == folder and f"--market {found.market}" in " ".join(flags)
        assert found.folds == (2 if found.market == "sp500" and args.folds else 0)
        if Path(path).stem.startswith(modules.runner.ADAPTING):  # elsewhere they would cut the bars that others are scored on
            assert found.market in TASK_SETS.values()
    assert {"baselines", "ppo_leadlag", "ppo_portfolio", "rl2_leadlag", "maml_leadlag", "pearl_portfolio"} <= seen
    assert not any(name.startswith(modules.runner.MASTERS) for name in seen)  # nothing makes the run that they need


def parsed(script, flags):
    return tyro.cli(script.module.Args, args=flags, config=(tyro.conf.OmitArgPrefixes,))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scripts": ("fake_leadlag", "nope")}, ("--scripts nope", "fake_leadlag", "baselines")),
        ({"protocol": ("nose",)}, ("--protocol nose", "noise", "shuffled", "monte-carlo", "cross-universe")),
        ({"folds": -1}, ("--folds -1", "0 or more")),
        ({"retries": -1}, ("--retries -1", "0 or more")),
        ({"workers": -2}, ("--workers -2", "0 or more")),
        ({"total_timesteps": -3}, ("--total-timesteps -3", "0 or more")),
        ({"gradient_steps": 0}, ("--gradient-steps 0", "at least 1")),
        ({"seeds": (1, -4)}, ("--seeds 1 -4", "0 or more")),
        ({"timeout": -1.0}, ("--timeout -1", "0 or a number of seconds")),
        ({"timeout": float("nan")}, ("--timeout nan", "0 or a number of seconds")),
    ],
)
def test_bad_input_is_named(tree, options, words):
    with pytest.raises(SystemExit) as caught:
        tree.runner.Args(**options)
    assert all(word in caught.value.code for word in words) and len(caught.value.code.splitlines()) == 1


# --- what is run once, and what again


def test_finished_runs_are_skipped_until_something_changes(tree, capsys):
    tree.no_board()
    prices = tree.root / "prices.csv"
    prices.write_text("a")
    options = dict(seeds=(1,), markets=("prices.csv",))  # of the folder that it was started in

    def starts():
        return len(tree.starts(1, market="prices.csv"))

    assert tree.run(**options) == 0 and starts() == 1
    assert tree.run(**options) == 0 and starts() == 1
    assert "skipped" in capsys.readouterr().out and (tree.root / "boards").read_text() == "xx"
    prices.write_text("b")
    assert tree.run(**options) == 0 and starts() == 2
    script = tree.root / "algos" / "fake_leadlag.py"
    script.write_text(FAKE + "# changed\n")
    assert tree.run(**options) == 0 and starts() == 3
    (path,) = tree.runs.glob("*/*/ledger.parquet")
    path.write_bytes(path.read_bytes()[:1000])
    assert tree.run(**options) == 0 and starts() == 4
    (tree.root / "envs").unlink()
    (tree.root / "envs").mkdir()
    for source in (ROOT / "envs").glob("*.py"):
        shutil.copy(source, tree.root / "envs")
    assert tree.run(**options) == 0 and starts() == 4, "the same code elsewhere"
    with (tree.root / "envs" / "costs.py").open("a") as file:
        file.write("# changed\n")
    assert tree.run(**options) == 0 and starts() == 5
    assert tree.starts(1, market="prices.csv")[-1] == "start", "a run of other code was gone on with"
    assert len(tree.results()) == 1


def test_relative_paths_are_those_of_the_user_and_the_code_is_that_of_the_tree(tree, tmp_path, monkeypatch):
    tree.no_board()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert tree.run(seeds=(1,)) == 0
    (log,) = tree.runs.glob("*/log.txt")
    assert f"in {tmp_path} with {tree.root}{os.pathsep}mine\n" in log.read_text()


def test_baselines_run_again_when_their_rules_change(tree):
    tree.no_board()
    options = dict(scripts=("baselines",), seeds=(1,))
    for change in ("", "", "# changed\n"):
        with (tree.root / "benchmark" / "rules.py").open("a") as file:
            file.write(change)
        assert tree.run(**options) == 0
    assert tree.starts(1, "baselines") == ["start", "start"]
    assert {name for name, _ in tree.results()} == {"baseline-equal-weight", "baseline-momentum", "baseline-random"}


# --- what goes wrong once


@pytest.mark.parametrize(
    "first, second",
    [
        ("crash", "start"), ("first iteration", "start"), ("nothing", "start"), ("late", "resume 4"), ("hang", "resume 4"),
        ("nan", "resume 8"), ("short", "resume 8"), ("cut", "resume 8"), ("taskless", "resume 8"), ("afterwards", "resume 8"),
    ],
)  # fmt: skip
def test_a_second_try_ends_as_if_nothing_had_happened(tree, undisturbed, first, second):
    tree.no_board()
    tree.goes_wrong(seed1=[first, "fine"])
    assert tree.run(timeout=1.0 if first == "hang" else 60.0) == 0
    assert tree.results() == undisturbed
    assert tree.starts(1) == ["start", second] and tree.starts(2) == ["start"]
    assert {seed: record["attempts"] for seed, record in tree.records().items()} == {1: 2, 2: 1}
    for pid in (tree.root / "hangs").iterdir():
        assert not alive(int(pid.name))


def test_a_checkpoint_that_leads_nowhere_is_left_behind(tree, undisturbed):
    tree.no_board()
    tree.goes_wrong(seed1=["early, then at every resume"] * 2 + ["fine"])
    assert tree.run(retries=2) == 0
    assert tree.starts(1) == ["start", "resume 4", "start"] and tree.results() == undisturbed


def test_a_try_that_came_further_is_gone_on_with(tree, undisturbed):
    tree.no_board()
    tree.goes_wrong(seed1=["late", "later", "fine"])
    assert tree.run(retries=2) == 0
    assert tree.starts(1) == ["start", "resume 4", "resume 6"] and tree.results() == undisturbed


def test_what_failed_is_tried_again_by_the_next_start(tree, undisturbed):
    tree.no_board()
    tree.goes_wrong(seed1=["crash", "crash", "fine"])
    assert tree.run() == 1 and tree.starts(1) == ["start", "start"]
    assert tree.run() == 0 and tree.starts(1) == ["start"] * 3 and tree.starts(2) == ["start"]
    assert tree.results() == undisturbed


# --- what goes wrong for good


def test_every_failure_is_a_red_row(tree, capsys):
    """With the real scoreboard, one market per failure: what it says, and the end of the log."""
    silent = ("hang", "nothing", "nan", "short", "cut", "taskless")
    said = {
        "crash": "exit code 1: ValueError: on purpose", "first iteration": "exit code 1: ValueError: on purpose",
        "late": "exit code 1: ValueError: on purpose", "afterwards": "exit code 1: ValueError: on purpose",
        "hang": "not finished after 1 seconds", "nothing": "left no run directory", "nan": "net_return is not finite",
        "short": "truncated", "cut": "ledger.parquet cannot be read", "taskless": "run.json holds no panel",
    }  # fmt: skip
    markets = {mode: f"{mode.replace(' ', '-')}.csv" for mode in said}
    tree.modes({f"fake_leadlag {market} 1": [mode] for mode, market in markets.items()})
    code = tree.run(markets=("fine.csv", *markets.values()), seeds=(1,), retries=0, timeout=1.0)
    printed = capsys.readouterr().out
    assert code == 1 and "1 of 11 runs finished" in printed
    board = json.loads((tree.root / "out" / "scoreboard.json").read_text())
    (group,) = board["groups"]
    assert [(row["name"], row["seeds"]) for row in group["rows"]] == [("fake_leadlag", 1)]
    failed = group["failed"] + board["unplaced"]
    assert len(failed) == len(said) and board["tasks"] == []
    for mode, market in markets.items():
        (row,) = [row for row in failed if f"__{market.replace('.', '-')}__" in row["path"]]
        assert said[mode] in row["reason"] and row["name"] == "fake_leadlag, seed 1", mode
        assert f"fake_leadlag {market} 1: {mode}" in row["log"] and said[mode] in printed, mode
        assert mode in silent or ("the log of a crash" in row["log"] and "Traceback" in row["log"]), mode
    assert printed.count("the log of a crash") == 4
    page = (tree.root / "out" / "scoreboard.html").read_text()
    assert all(markets[mode] in page for mode in said)


def test_failures_of_baselines_cost_no_other_row(tree):
    modes = ("between rules", "one rule", "nan rule")
    tree.modes({f"baselines {mode.replace(' ', '-')}.csv 1": [mode] for mode in modes})
    markets = tuple(f"{mode.replace(' ', '-')}.csv" for mode in modes)
    assert tree.run(scripts=("baselines",), markets=markets, seeds=(1,), retries=0) == 1
    board = json.loads((tree.root / "out" / "scoreboard.json").read_text())
    failed = [row for group in board["groups"] for row in group["failed"]] + board["unplaced"]
    found = {mode: [r for r in failed if f"__{mode.replace(' ', '-')}-csv__" in r["path"]] for mode in modes}
    assert {mode: [row["name"] for row in rows] for mode, rows in found.items()} == {
        "between rules": ["baselines, seed 1"], "one rule": ["baseline-momentum, seed 1"],
        "nan rule": ["baseline-momentum, seed 1"],
    }  # fmt: skip
    assert found["one rule"][0]["reason"] == "no finite order" and "one rule" in found["one rule"][0]["log"]
    assert "exit code 1: ValueError: on purpose" in found["between rules"][0]["reason"]
    assert "not finite" in found["nan rule"][0]["reason"]
    ranked = [row["name"] for group in board["groups"] for row in group["rows"]]
    assert {"baseline-equal-weight", "baseline-random"} == set(ranked)


def test_an_error_of_the_runner_itself_is_a_red_row(tree, capsys):
    tree.no_board()
    fine = tree.jobs.run_process

    def full(command, folder, *rest):
        if "__1__" in folder.name:
            raise OSError(28, "No space left on device")
        return fine(command, folder, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree.jobs, "run_process", full)
        assert tree.run() == 1
    (path,) = tree.runs.glob("*/failed__*/run.json")
    run = json.loads(path.read_text())
    assert run["status"] == "failed" and "No space left" in run["failure"] and run["args"]["seed"] == 1
    assert "No space left" in capsys.readouterr().out and tree.starts(2) == ["start"]


def test_a_scoreboard_that_fails_is_a_failure(tree):
    (tree.root / "benchmark" / "scoreboard.py").write_text("raise SystemExit(1)")
    assert tree.run(seeds=(1,)) == 1


# --- kills, signals, locks


def test_a_killed_runner_goes_on(tree, undisturbed):
    """kill -9 half-way: its orphans are ended by the next start, which ends like a run that nothing happened to."""
    tree.no_board()
    tree.goes_wrong(seed1=["hang", "fine"], seed2=["fine"])
    process = tree.start()
    (orphan,) = tree.hanging(1)
    wait_for(lambda: tree.records().get(2, {}).get("status") == "finished")
    process.kill()
    process.communicate()
    assert alive(orphan) and tree.records()[1]["status"] == "running"
    again = tree.start()
    printed, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "skipped" in printed, printed
    assert not alive(orphan) and tree.results() == undisturbed
    assert tree.starts(1) == ["start", "resume 4"] and tree.starts(2) == ["start"]


def test_an_orphan_of_a_resumed_run_is_ended_too(tree, undisturbed):
    tree.no_board()
    tree.goes_wrong(seed1=["late", "hang", "fine"])
    # the second start hangs before its first new checkpoint
    process = tree.start()
    (orphan,) = tree.hanging(1)
    process.kill()
    process.communicate()
    assert alive(orphan)
    assert tree.run() == 0 and not alive(orphan) and tree.results() == undisturbed


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_runner_ends_its_processes_and_goes_on(tree, undisturbed, number):
    tree.no_board()
    tree.goes_wrong(seed1=["hang", "fine"], seed2=["hang", "fine"])
    process = tree.start("--workers", "2")
    children = tree.hanging(2)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed, printed
    assert not any(map(alive, children)) and not (tree.root / "boards").exists()
    assert {record["status"] for record in tree.records().values()} == {"running"}
    assert not list(tree.runs.glob("*/failed__*"))
    assert tree.run() == 0 and tree.results() == undisturbed
    assert tree.starts(1) == tree.starts(2) == ["start", "resume 4"]


def test_jobs_that_wait_do_not_start_after_an_interrupt(tree):
    tree.no_board()
    tree.goes_wrong(seed1=["hang"])
    process = tree.start("--workers", "1")
    tree.hanging(1)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 130 and tree.starts(2) == [] and tree.starts(1) == ["start"] and list(tree.records()) == [1]


def test_another_process_with_the_number_of_an_orphan_is_left_alone(tree):
    tree.no_board()
    (job,) = tree.runner.plan(tree.args(seeds=(1,)))
    (tree.runs / job.folder).mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as bystander:
        (tree.runs / job.folder / "pid").write_text(str(bystander.pid))
        assert tree.run(seeds=(1,)) == 0 and bystander.poll() is None
        bystander.kill()


def test_one_runner_at_a_time(tree):
    tree.no_board()
    tree.goes_wrong(seed1=["hang"])
    tree.runs.mkdir()
    (tree.runs / "runner.lock").write_text("1234567")  # left by a runner that is gone
    process = tree.start()
    tree.hanging(1)
    with pytest.raises(SystemExit, match=f"--runs-dir .*runs: process {process.pid} runs there"):
        tree.run(timeout=5.0)
    assert tree.starts(1) == ["start"]
    assert tree.run(runs_dir=tree.root / "other", seeds=(2,)) == 0
    process.terminate()
    process.communicate(timeout=20)
    tree.goes_wrong()
    assert tree.run() == 0


# --- a cluster


class FakeRay:
    """As much of Ray as the runner uses; tasks run when waited for, the last one first."""

    def __init__(self):
        self.calls, self.results = [], {}

    def init(self, **options):
        self.calls.append(("init", options))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ray's own handler"))

    def remote(self, **options):
        self.calls.append(("remote", options))
        return lambda function: SimpleNamespace(remote=lambda *args: self._submit(lambda: function(*args)))

    def _submit(self, task):
        self.results[ref := object()] = task
        return ref

    def wait(self, refs, num_returns=1, timeout=None):
        assert 1 <= num_returns <= len(refs)
        return refs[-num_returns:], refs[:-num_returns]

    def get(self, ref):
        return self.results[ref]()

    def cancel(self, ref):
        self.calls.append(("cancel", ref))

    def shutdown(self):
        self.calls.append(("shutdown", {}))


def test_a_cluster_runs_the_same_jobs(tree, undisturbed, monkeypatch):
    tree.no_board()
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setitem(sys.modules, "ray", fake := FakeRay())
    assert tree.run(ray_address="ray://head:10001") == 0 and tree.results() == undisturbed
    (_, init), (_, remote), (last, _) = fake.calls
    assert init["address"] == "ray://head:10001" and last == "shutdown"
    path = init["runtime_env"]["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert path == [str(tree.root), str(tree.root / "benchmark"), "mine"]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert remote == {"num_cpus": tree.runner.limits_of(tree.args())[0].threads, "num_gpus": 0.0, "max_retries": 1}


def test_a_lost_machine_is_a_red_row(tree, monkeypatch):
    tree.no_board()
    fake = FakeRay()
    get = fake.get
    lost = []

    def lose_the_first(ref):
        if not lost:
            lost.append(ref)
            raise RuntimeError("the node died")
        return get(ref)

    fake.get = lose_the_first
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert tree.run(ray_address="auto") == 1
    (path,) = tree.runs.glob("*/failed__*/run.json")
    assert json.loads(path.read_text())["failure"] == "RuntimeError: the node died"
    assert [name for name, _ in fake.calls][-1] == "shutdown" and tree.starts(1) == ["start"]


def test_an_interrupt_ends_the_tasks_of_a_cluster(tree, monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)

    def interrupted(ref):
        raise KeyboardInterrupt

    fake.get = interrupted
    with pytest.raises(KeyboardInterrupt):
        tree.run(ray_address="auto")
    assert [name for name, _ in fake.calls] == ["init", "remote", "cancel", "shutdown"]


# --- scripts that learn from a dataset

LEARNERS = ("bc_portfolio", "cql_portfolio", "iql_portfolio")


def test_every_offline_job_has_its_data_collected_on_its_terms(tree):
    tree.learns_offline(*LEARNERS)
    chosen = dict(scripts=("iql_portfolio", "baselines"), seeds=(1, 2))
    regimes = {GP: "long_short", "synthetic:leadlag": "lookback"}
    expected = [
        f"iql_portfolio {market} {seed} from collect {market} {seed} --regime {regimes.get(market, 'long_only')} "
        f"{'--fill auto' if market == GP else TERMS}"
        for market in (GP, "synthetic:leadlag", "sp500", *DRAWN)
        for seed in (1, 2)
    ]
    found = commands(tree, **chosen)
    assert found[: len(expected)] == expected
    assert {line.split()[1] for line in found if line.startswith("baselines")} == {line.split()[1] for line in expected}
    given = dict(scripts=("cql_portfolio",), seeds=(3,), markets=("a.csv", f"{MERTON}:bars=9", "synthetic:leadlag:bars=9"))
    terms = "--costs zero --fill next_close"
    assert commands(
        tree, **given, costs="zero", fill="next_close", start="2016", folds=2, total_timesteps=9, gradient_steps=7
    ) == [
        *(
            f"cql_portfolio a.csv 3 --gradient-steps 7 from collect a.csv 3 --regime long_only {terms} --start 2016 "
            f"--folds 2 --fold {fold} --total-timesteps 9"
            for fold in (0, 1)
        ),
        f"cql_portfolio {MERTON}:bars=9 3 --gradient-steps 7 from collect {MERTON}:bars=9 3 --regime long_short "
        "--fill next_close --total-timesteps 9",
        "cql_portfolio synthetic:leadlag:bars=9 3 --gradient-steps 7 from collect synthetic:leadlag:bars=9 3 --regime lookback "
        f"{terms} --total-timesteps 9",
    ]


def test_a_quick_offline_run_clones_behaviour_twice(tree):
    tree.learns_offline(*LEARNERS)
    data = "--regime long_short --fill auto --total-timesteps 500000 --quick"
    assert commands(tree, scripts=("bc_portfolio", "iql_portfolio"), quick=True) == [
        f"{script} {GP} {seed} --gradient-steps 2000{more} from collect {GP} {seed} {data}"
        for script, more in (
            ("bc_portfolio", ""), ("bc_portfolio", " --top-percent 10 --exp-name bc_portfolio_top10"), ("iql_portfolio", "")
        )
        for seed in (1, 2)
    ]  # fmt: skip


def test_jobs_without_data_keep_the_folders_of_earlier_runs(tree):
    (job,) = tree.runner.plan(tree.args(seeds=(1,)))
    fields = {"script": job.script, "market": job.market, "seed": job.seed, "flags": job.flags}
    assert job.folder.endswith(f"__{hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:8]}")


def test_a_dry_run_names_the_collector_once_and_no_market_flag_of_offline_scripts(tree, capsys):
    tree.learns_offline(*LEARNERS)
    assert tree.run(scripts=LEARNERS, seeds=(1, 2), dry_run=True, gradient_steps=5) == 0 and not tree.runs.exists()
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    out = {}
    for line in lines[:2]:
        flags = dict(zip(line[2::2], line[3::2]))
        assert Path(line[1]) == tree.root / "benchmark" / "collect.py" and flags["--regime"] == "long_only"
        assert Path(flags["--out"]).is_relative_to(tree.runs / "datasets") and flags["--market"] == "synthetic:noise"
        assert flags["--costs"] == "institutional" and flags["--num-threads"] == "1"
        out[flags["--seed"]] = flags["--out"]
    assert set(out) == {"1", "2"} and len(lines) == 2 + 4 * 2
    for line in lines[2:]:
        flags = dict(zip(line[2::2], line[3::2]))
        assert flags["--dataset"] == f"{out[flags['--seed']]}/dataset.hdf5" and flags["--gradient-steps"] == "5"
        assert Path(flags["--runs-dir"]).parent == tree.runs
        assert set(flags) <= {
            "--dataset", "--seed", "--runs-dir", "--gradient-steps", "--num-threads", "--top-percent", "--exp-name"
        }  # fmt: skip


def test_data_are_collected_once_for_all_that_wait_for_them(tree):
    """And the policies that collected them are no rows of the scoreboard, also where it looks through all folders."""
    tree.learns_offline(*LEARNERS)
    tree.modes({"collect synthetic:noise 1": ["slow"], "cql_portfolio synthetic:noise 2": ["late", "fine"]})
    assert tree.run(scripts=LEARNERS, workers=4) == 0
    assert tree.starts(1, "collect") == tree.starts(2, "collect") == ["start"]
    names = {"bc_portfolio", "bc_portfolio_top10", "cql_portfolio", "iql_portfolio"}
    assert all(tree.starts(1, name) == ["start"] for name in names)
    assert tree.starts(2, "cql_portfolio") == ["start", "resume 4"], "one that learns from a dataset goes on like any other"
    board = json.loads((tree.root / "out" / "scoreboard.json").read_text())
    (group,) = board["groups"]
    assert {row["name"]: row["seeds"] for row in group["rows"]} == dict.fromkeys(names, 2) and not board["unplaced"]
    assert [row["name"] for row in group["offline"][0]["rows"]] == ["BC", "BC-10%", "CQL", "IQL", "mean of the data"]
    rundirs = importlib.import_module("rundirs")
    assert len(rundirs.find([tree.runs])) == 8
    (data, *_) = (tree.runs / "datasets").glob("*/data")
    assert len(rundirs.find([data])) == 1, "asked for by name, the policies of a dataset are found"


def test_data_are_collected_again_when_they_or_their_code_change(tree):
    tree.no_board()
    tree.learns_offline("iql_portfolio")
    algos, benchmark, prices = tree.root / "algos", tree.root / "benchmark", tree.root / "prices.csv"
    prices.write_text("a")
    (tree.root / "envs").unlink()
    shutil.copytree(ROOT / "envs", tree.root / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    expected = [0, 0]

    def starts(collected: bool, learned: bool):
        assert tree.run(scripts=("iql_portfolio",), markets=("prices.csv",), seeds=(1,)) == 0
        expected[:] = expected[0] + collected, expected[1] + learned
        assert [len(tree.starts(1, name, "prices.csv")) for name in ("collect", "iql_portfolio")] == expected

    def change(path: Path):
        path.write_text(path.read_text() + "\n# changed")

    starts(True, True)
    starts(False, False)
    change(algos / "iql_portfolio.py")
    starts(False, True)
    for path in (
        algos / "ppo_portfolio.py", benchmark / "collect.py", benchmark / "behaviours.py", benchmark / "rules.py",
        benchmark / "baselines.py", tree.root / "envs" / "task.py", prices,
    ):  # fmt: skip
        change(path)
        starts(True, True)
    change(algos / "ppo_leadlag.py")
    starts(False, False)
    (path,) = (tree.runs / "datasets").glob("*/data/dataset.hdf5")
    for damage in (lambda: path.write_text("prices.csv?"), path.unlink, path.with_name("dataset_meta.json").unlink):
        damage()
        starts(False, False)  # nothing needs them
        change(algos / "iql_portfolio.py")
        starts(True, True)


def test_without_data_all_that_need_them_are_red_rows(tree, capsys):
    """One market per failure; the jobs that need a dataset share the tries of one collection, until the next start."""
    tree.learns_offline("bc_portfolio", "iql_portfolio")
    said = {
        "crash": "exit code 1: ValueError: on purpose in collect", "no meta": "left no dataset.hdf5 with dataset_meta.json",
        "damaged": "dataset.hdf5 is not the one", "hang": "not finished after 1 seconds",
    }  # fmt: skip
    markets = {mode: f"{mode.replace(' ', '-')}.csv" for mode in said}
    tree.modes({f"collect {market} 1": [mode, mode, "fine"] for mode, market in markets.items()})
    options = dict(scripts=("bc_portfolio", "iql_portfolio"), seeds=(1,), markets=("fine.csv", *markets.values()), timeout=1.0)
    names = ("bc_portfolio", "bc_portfolio_top10", "iql_portfolio")
    assert tree.run(**options) == 1
    printed = capsys.readouterr().out
    board = json.loads((tree.root / "out" / "scoreboard.json").read_text())
    assert {row["name"] for row in board["groups"][0]["rows"]} == set(names) and not board["groups"][0]["failed"]
    assert len(board["unplaced"]) == len(said) * len(names)
    for mode, market in markets.items():
        assert tree.starts(1, "collect", market) == ["start"] * 2 and tree.starts(1, "iql_portfolio", market) == []
        rows = [row for row in board["unplaced"] if f"__{market.replace('.', '-')}__" in row["path"]]
        assert {row["name"] for row in rows} == {f"{name}, seed 1" for name in names}
        for row in rows:
            assert row["reason"].startswith("its data were not collected: ") and said[mode] in row["reason"], mode
            assert f"collect {market} 1: {mode}" in row["log"] and said[mode] in printed, mode
    tree.no_board()
    assert tree.run(**options) == 0 and not list(tree.runs.glob("*/failed__*"))
    for market in markets.values():
        assert tree.starts(1, "collect", market) == ["start"] * 3 and tree.starts(1, "iql_portfolio", market) == ["start"]
    assert {log.read_text().count("$ ") for log in tree.runs.glob("datasets/*/log.txt")} == {1}


def test_a_collector_that_is_stopped_is_started_afresh(tree):
    """Interrupted: nothing is left running, and who waits for the data stops too. Killed: the next start ends the orphan."""
    tree.no_board()
    tree.learns_offline("cql_portfolio", "iql_portfolio")
    tree.modes({"collect synthetic:noise 1": ["hang", "hang", "fine"]})
    chosen = ("--scripts", "cql_portfolio", "iql_portfolio", "--seeds", "1")
    process = tree.start(*chosen)
    (child,) = tree.hanging(1)
    wait_for(lambda: len(tree.records()) == 1 and len(list(tree.runs.glob("*/job.json"))) == 2)  # one collects, one waits
    process.terminate()
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in printed and not alive(child), printed
    process = tree.start(*chosen)
    orphan = next(pid for pid in tree.hanging(2) if pid != child)
    process.kill()
    process.communicate()
    assert alive(orphan) and not list(tree.runs.glob("*/failed__*"))
    assert tree.run(scripts=("cql_portfolio", "iql_portfolio"), seeds=(1,)) == 0 and not alive(orphan)
    assert tree.starts(1, "collect") == ["start"] * 3 and tree.starts(1, "iql_portfolio") == ["start"]
    (data,) = tree.runs.glob("datasets/*/data/dataset.hdf5")
    assert not data.read_text().startswith("half")


def test_a_cluster_collects_once_too(tree, monkeypatch):
    tree.no_board()
    tree.learns_offline("cql_portfolio", "iql_portfolio")
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    assert tree.run(scripts=("cql_portfolio", "iql_portfolio"), ray_address="auto") == 0
    assert tree.starts(1, "collect") == tree.starts(2, "collect") == ["start"]
    assert all(tree.starts(seed, name) == ["start"] for seed in (1, 2) for name in ("cql_portfolio", "iql_portfolio"))


# --- run_all.sh

PYTHON = """#!/usr/bin/env bash
echo "$0 $*" >> "$LOG"
case "$1 $2" in
    "-c "*) [ -e "$0.ready" ] ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ -f requirements.txt ] && touch "$0.ready" ;;
    *) echo "in $PWD with $PYTHONPATH"; shift; printf '<%s>' "$@" ;;
esac
"""


def test_run_all_makes_an_environment_once_and_only_where_needed(tree, tmp_path):
    (tree.root / "requirements.txt").touch()
    (bin_dir := tmp_path / "bin").mkdir()
    (bin_dir / "python3").write_text(PYTHON)
    (bin_dir / "python3").chmod(0o755)
    log, script = tmp_path / "log", tree.root / "benchmark" / "run_all.sh"

    def start(**environment):
        path = {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}", "LOG": str(log), "PYTHONPATH": "mine"}
        log.write_text("")
        done = subprocess.run(
            [script, "--quick", "a b"], cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"in {tmp_path} with {tree.root}:mine\n<--quick><a b>"
        calls = log.read_text()
        assert f"{tree.root}/benchmark/runner.py --quick a b" in calls
        return calls

    calls = start()
    assert calls.count("-m venv") == calls.count("-m pip install") == 1
    calls = start()
    assert "-m venv" not in calls and "-m pip" not in calls and f"{tree.root}/.venv/bin/python {tree.root}" in calls
    (bin_dir / "python3.ready").touch()
    assert ".venv" not in start()


@pytest.mark.slow
def test_run_all_killed_half_way_and_started_again(tmp_path):
    """The real scripts and baselines at a tiny budget: the same ledgers as without the kill."""
    folders = {name: tmp_path / name for name in ("undisturbed", "killed")}

    def start(name):
        call = [str(ROOT / "benchmark" / "run_all.sh"), "--quick", "--seeds", "1", "--total-timesteps", "1000000"]
        call += ["--runs-dir", str(folders[name] / "runs"), "--out", str(folders[name] / "out")]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
        return subprocess.Popen(call, cwd=tmp_path, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(name):
        process = start(name)
        printed, _ = process.communicate(timeout=900)
        assert process.returncode == 0, printed
        return printed

    def half_way():
        """One run has finished, and another has left a checkpoint."""
        runs = [json.loads(path.read_text()) for path in folders["killed"].glob("runs/*/job.json")]
        begun = [path for path in folders["killed"].glob("runs/*/*/model.pt") if Run(path.parent).json["status"] == "running"]
        return begun and any(run["status"] == "finished" for run in runs)

    finish("undisturbed")
    process = start("killed")
    wait_for(half_way, seconds=600)
    process.kill()
    process.communicate()
    printed = finish("killed")
    assert "skipped" in printed
    logs = [path.read_text() for path in folders["killed"].glob("runs/*/log.txt")]
    assert any("--resume" in log for log in logs)
    found, expected = (
        {(path.parent.name, path.name.rpartition("__")[0]): Run(path) for path in folders[name].glob("runs/*/*/")}
        for name in ("killed", "undisturbed")
    )
    assert found.keys() == expected.keys() and len(expected) > 20
    for key, run in expected.items():
        assert_same_ledger(found[key].ledger, run.ledger)
    boards = [json.loads((folder / "out" / "scoreboard.json").read_text()) for folder in folders.values()]
    assert all(not board["unplaced"] and not any(group["failed"] for group in board["groups"]) for board in boards)
    assert [row["sharpe"] for group in boards[0]["groups"] for row in group["rows"]] == [
        row["sharpe"] for group in boards[1]["groups"] for row in group["rows"]
    ]
