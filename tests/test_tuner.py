"""The tuner: what reaches the scripts, what is read of their runs and when, and that kills, crashes and restarts lose nothing.

Most tests tune a small script that only pretends to learn, in this process; the script is always a process of its own.
"""

import csv
import functools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import scoreboard as board
import tyro
from conftest import ROOT
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from test_scoreboard import PER_YEAR, make_ledger, make_run

import tuner
from benchmark.tuning import results, samplers, space, trial
from envs import ledger
from envs.portfolio_references import utility

SPACE = "learning-rate=log:1e-5:1e-1"
# A script as the tuner sees one: the score is made of its arguments, and put into copies of a ledger and a run.json.
FAKE = '''
import json, os, shutil, subprocess, sys, time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import tyro


@dataclass
class Config:
    asset_cap: float = 1.0
    """a field of a group"""


@dataclass
class Args:
    seed: int = 1
    """seed of everything"""
    market: str = "prices.csv"
    """which market"""
    runs_dir: str = "runs"
    """folder of the run directory"""
    portfolio: Config = field(default_factory=Config)
    """a group"""
    learning_rate: float = 1e-3
    """best at 0.01; the score loses the squared number of decades from there"""
    log_std: float = -1.0
    """may be negative"""
    update_epochs: int = 1
    """whole, and without effect"""
    norm_adv: bool = True
    """worth 0.25"""
    utility: Literal["log", "cvar"] = "log"
    """cvar is worth 0.5"""
    risk_aversion: float | None = None
    """none by default"""
    layers: tuple[int, ...] = (64, 64)
    """several values"""
    mode: str = "fine"
    """what goes wrong"""
    delay: float = 0.0
    """seconds that it takes"""


args = tyro.cli(Args, config=(tyro.conf.OmitArgPrefixes,))
home = Path(__file__).parent
with (home / "starts").open("a") as file:
    file.write(f"{args.runs_dir}\\n")
run_dir = Path(args.runs_dir) / f"LeadLag-v0__fake__{args.seed}__{time.time_ns()}"
run_dir.mkdir(parents=True)
print("it begins", flush=True)


def log(*scores):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run_dir))
    for step, score in enumerate(scores):
        value = summary_pb2.Summary.Value(tag="eval/val_growth", simple_value=score)
        writer.add_event(event_pb2.Event(step=step, wall_time=step, summary=summary_pb2.Summary(value=[value])))
    writer.close()


def hang(name):
    child = subprocess.Popen(["sleep", "600"])
    (home / f"{name}.part").write_text(f"{os.getpid()} {child.pid}")
    os.replace(home / f"{name}.part", home / name)
    time.sleep(600)


if args.mode == "crash" or (args.mode == "crash on b" and args.utility == "cvar"):
    raise ValueError("on purpose")
if args.mode == "hang in the second" and len((home / "starts").read_text().splitlines()) == 2:
    hang("hangs")
if args.mode == "hang":
    hang("hangs")
if args.mode == "hopeless on b" and args.utility == "cvar":
    log(-1000.0)
    hang("hangs")
if args.mode == "bad":
    log(-1000.0)
if "hopeless" in args.mode or args.mode == "log":
    log(-1.0, 2.0, 1.0)
time.sleep(args.delay)
score = -np.log10(args.learning_rate / 1e-2) ** 2 + 0.25 * args.norm_adv + 0.5 * (args.utility == "cvar") + 0.1 * args.seed
table = pq.read_table(home / "template" / "ledger.parquet")
split, net = np.array(table["split"].to_pylist()), table["net_return"].to_numpy().copy()
net[split == "val"] += score / 252 - net[split == "val"].mean()
net[split == "test"] += 0.5 * score / 252 - net[split == "test"].mean()
if args.mode == "poison":
    net[split == "test"] = 1e6
if args.mode == "no validation":
    net[split == "val"] = np.nan
equity = np.concatenate([np.cumprod(1.0 + net[split == name]) for name in ("val", "test")])
for name, column in (("net_return", net), ("equity", equity)):
    table = table.set_column(table.column_names.index(name), name, [column])
if args.mode != "no ledger":
    pq.write_table(table, run_dir / "ledger.parquet")
run = json.loads((home / "template" / "run.json").read_text())
told = asdict(args) | {"exp_name": "fake"}
if args.mode == "deaf":
    told["learning_rate"] = 1e-3
run |= {"args": told, "env_id": "LeadLag-v0", "status": "finished"}
if args.mode == "diverged":
    run |= {"status": "failed", "failure": "diverged in iteration 3: loss not finite"}
(run_dir / "run.json").write_text(json.dumps(run))
'''


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A run directory with a validation and a test split."""
    frame = make_ledger(1)
    frame["split"] = frame["split"].replace("train", "val")
    return make_run(tmp_path_factory.mktemp("template"), "fake", 1, frame)


@pytest.fixture
def script(tmp_path, template) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(template, home / "template")
    (home / "fake.py").write_text(FAKE)
    return home / "fake.py"


@functools.cache
def help_of(text: str) -> dict[str, space.Flag]:
    """The same script says the same: asked once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fake.py"
        path.write_text(text)
        return space.flags_of(path, [])


class Tuner:
    """The command on the fake script, in this process or in one of its own."""

    def __init__(self, script: Path, out: Path):
        self.script, self.out = script, out

    def command(self, *options: str) -> list[str]:
        own = options[: options.index("--")] if "--" in options else options
        rest = options[len(own) :]
        return ["--script", str(self.script), "--out", str(self.out), *own, *rest]

    def __call__(self, *options: str) -> dict:
        """best.json"""
        own = self.command(*options)
        split = own.index("--") if "--" in own else len(own)
        tuner.main(tyro.cli(tuner.Args, args=own[:split]), own[:split], own[split + 1 :])
        return json.loads((self.out / "best.json").read_text())

    def start(self, *options: str) -> subprocess.Popen:
        call = [sys.executable, str(ROOT / "tuner.py"), *self.command(*options)]
        return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def tried(self) -> list[dict]:
        return json.loads((self.out / "trials.json").read_text())["tried"]

    @property
    def starts(self) -> list[str]:
        """Folders of runs, in the order in which the script was started."""
        path = self.script.parent / "starts"
        return path.read_text().splitlines() if path.exists() else []

    def hanging(self) -> list[int]:
        """Ids of a hanging script and its child."""
        hangs = self.script.parent / "hangs"
        wait_until(hangs.exists)
        return [int(pid) for pid in hangs.read_text().split()]


@pytest.fixture
def tune(script, tmp_path, monkeypatch) -> Tuner:
    monkeypatch.setattr(tuner, "flags_of", lambda path, arguments: help_of(path.read_text()))
    monkeypatch.setattr(results, "compare", lambda out: "")
    monkeypatch.setattr(results, "draw", lambda *_: None)
    monkeypatch.setattr(trial, "POLL", 0.1)
    monkeypatch.setattr(tuner, "POLL", 0.1)
    return Tuner(script, tmp_path / "out")


def wait_until(holds, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Ended; one that nobody has waited for yet counts too."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def arguments_of(run: dict) -> dict:
    return json.loads((Path(run["run_dir"]) / "run.json").read_text())["args"]


def score(run: dict, split: str) -> float:
    frame = pd.read_parquet(Path(run["run_dir"]) / "ledger.parquet")
    return float(ledger.growth(frame[frame["split"] == split]).mean() * PER_YEAR)


# What reaches the script


def test_every_parameter_arrives(tune):
    """Of every kind, the first one and those of groups too, in the study as in run.json; seeds and markets as asked for."""
    tune(
        "--trials", "2", "--seeds", "4", "--markets", "a.csv", "b.csv", "--sampler", "random", "--metric", "growth",
        "--space", SPACE, "log-std=-3:0.5", "update-epochs=int:1:8", "norm-adv=true|false", "utility=log|cvar",
        "asset-cap=0.1:1", "risk-aversion==40", "--", "--delay", "0.01",
    )  # fmt: skip
    assert len(tune.tried) == 2
    for tried in tune.tried:
        assert [(run["seed"], run["market"]) for run in tried["runs"]] == [(4, "a.csv"), (4, "b.csv")]
        for run in tried["runs"]:
            given = trial.flat(arguments_of(run))
            assert {name: given[name.replace("-", "_")] for name in tried["params"]} == tried["params"]
            assert (given["seed"], given["market"], given["delay"]) == (run["seed"], run["market"], 0.01)
    first, *others = [tried["params"] for tried in tune.tried]
    assert first == {
        "learning-rate": 1e-3, "log-std": -1.0, "update-epochs": 1, "norm-adv": True, "utility": "log", "asset-cap": 1.0,
        "risk-aversion": 40.0,
    }  # fmt: skip
    assert all(other["learning-rate"] != 1e-3 and other["risk-aversion"] == 40.0 for other in others)


def test_a_parameter_that_does_not_arrive_fails_the_trial(tune):
    tune("--trials", "2", "--seeds", "1", "--space", SPACE, "--", "--mode", "deaf")
    assert [tried["state"] for tried in tune.tried] == ["complete", "fail"]
    assert "did not arrive: run.json says 0.001" in tune.tried[1]["failure"]


def test_trial_0_starts_where_the_arguments_say(tune):
    tune("--trials", "1", "--seeds", "1", "--space", SPACE, "log-std=-3:0.5", "--", "--learning-rate=0.02", "--log-std", "-2.5")
    assert tune.tried[0]["params"] == {"learning-rate": 0.02, "log-std": -2.5}


def test_the_default_space_is_what_the_script_has(tune, capsys):
    tune("--trials", "1", "--seeds", "1")
    assert list(tune.tried[0]["params"]) == ["learning-rate", "update-epochs", "log-std"]
    assert "learning-rate: 0.0001 to 0.01, logarithmic, first 0.001" in capsys.readouterr().out


def test_flags_are_read_from_help(tune):
    found = help_of(FAKE)
    assert found["learning-rate"] == space.Flag(float, (), "0.001") and found["norm-adv"] == space.Flag(bool, (), "True")
    assert found["utility"] == space.Flag(str, ("log", "cvar"), "log") and found["risk-aversion"] == space.Flag(
        float, (), "None"
    )
    assert found["layers"].kind is None and found["asset-cap"].default == "1.0" and found["update-epochs"].kind is int


@pytest.mark.parametrize(
    "text, expected",
    [
        ("learning-rate=log:1e-5:1e-1", FloatDistribution(1e-5, 1e-1, log=True)),
        ("learning-rate=0:1", FloatDistribution(0.0, 1.0)),
        ("log-std=-3:-0.5", FloatDistribution(-3.0, -0.5)),
        ("update-epochs=int:1:8", IntDistribution(1, 8)),
        ("update_epochs=logint:1:64", IntDistribution(1, 64, log=True)),
        ("update-epochs=1|4", CategoricalDistribution((1, 4))),
        ("norm-adv=true|false", CategoricalDistribution((True, False))),
        ("market==a:b=c", CategoricalDistribution(("a:b=c",))),
        ("market=prices.csv|synthetic:noise", CategoricalDistribution(("prices.csv", "synthetic:noise"))),
    ],
)
def test_entries_of_the_space(text, expected):
    (found,), (start,) = (part.values() for part in space.read_space((text,), [], [help_of(FAKE)], False))
    assert found == expected and space.holds(found, start)


BAD = {
    "no script": (["--script", "nowhere.py"], "--script nowhere.py: no such file"),
    "misspelt": (
        ["--space", "lerning-rate=0:1"],
        "--space lerning-rate=0:1: the script has no such flag; expected one of learning-rate",
    ),
    "no range": (["--space", "learning-rate"], "--space learning-rate: expected flag=range, or one of default reward-weights"),
    "words": (["--space", "learning-rate=low:high"], "--space learning-rate=low:high: 'low' is not a number"),
    "one bound": (["--space", "learning-rate=1"], "expected lo:hi, log:lo:hi, a|b|c or =value, for it is float"),
    "upside down": (["--space", "learning-rate=1:0"], "--space learning-rate=1:0: expected lo < hi"),
    "log of 0": (["--space", "learning-rate=log:0:1"], "expected 0 < lo < hi"),
    "infinite": (["--space", "learning-rate=0:inf"], "'inf' is not finite"),
    "a number for a whole one": (
        ["--space", "update-epochs=1:8"],
        "expected int:lo:hi, logint:lo:hi, a|b|c or =value, for it is int",
    ),
    "half": (["--space", "update-epochs=int:1:2.5"], "'2.5' is not a whole number"),
    "range of words": (["--space", "utility=log:1:2"], "expected a|b|c or =value, for it is str"),
    "no choice": (["--space", "utility=log|sharpe"], "'sharpe' is not one of log cvar"),
    "not true": (["--space", "norm-adv=yes|no"], "'yes' is neither true nor false"),
    "twice": (["--space", "utility=log|log"], "expected each value once"),
    "several values": (["--space", "layers=32|64"], "the flag takes several values"),
    "without the default": (
        ["--space", "learning-rate=log:1e-2:1"],
        "expected a range that holds the script's 0.001, which trial 0 runs",
    ),
    "without a default": (["--space", "risk-aversion=1:2", "--metric", "growth"], "a range that holds the script's None"),
    "nothing varies": (["--space", "learning-rate==1"], "--space: nothing varies"),
    "ours": (["--space", "seed=int:1:5"], "--seed: is set for each run here"),
    "ours, after": (["--", "--runs-dir", "x"], "--runs-dir: is set for each run here"),
    "market twice": (["--markets", "a", "--", "--market=b"], "--market: is set for each run here"),
    "unknown, after": (["--", "--lerning-rate", "1"], "--lerning-rate: fake.py has no such flag"),
    "judge": (["--space", "utility=log|cvar"], "--metric script: --space utility changes what the script chooses by"),
    "metric": (["--metric", "sortino"], "--metric sortino: expected script, growth, sharpe or utility:<risk aversion>"),
    "trials": (["--trials", "0"], "--trials 0: expected at least 1"),
    "workers": (["--workers", "-1"], "--workers -1: expected at least 1"),
    "timeout": (["--timeout", "nan"], "--timeout nan: expected a number of seconds above 0"),
    "seeds": (["--seeds", "1", "1"], "--seeds 1 1: expected one or more, each once"),
    "negative seed": (["--seed", "-1"], "--seed -1: expected 0 or more"),
    "markets": (["--markets", "a", "a"], "--markets a a: expected each once"),
    "pruner": (["--pruner", "median", "--metric", "sharpe"], "--pruner median: expected none with"),
    "trials of a grid": (["--grid", "--trials", "3"], "--trials 3: expected without --grid and --ablate"),
    "range in a grid": (["--grid", "--space", SPACE], f"--space {SPACE}: expected, with --grid and --ablate, a|b|c or =value"),
    "both": (["--grid", "--ablate"], "--ablate: expected without --grid"),
    "cmaes": (["--sampler", "cmaes", "--space", SPACE], "--sampler cmaes: expected at least two parameters"),
    "storage": (["--storage", "nonsense://x", "--space", SPACE], "--storage nonsense://x: "),
    "password": (["--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/x", "--space", SPACE], "//me:***@127.0.0.1:1/x: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(tune, name):
    options, expected = BAD[name]
    with pytest.raises(SystemExit) as refusal:
        tune(*options)
    (line,) = str(refusal.value).splitlines()
    assert expected in line and "secret" not in line and not tune.starts


def test_a_default_that_differs_between_markets_has_to_be_given():
    flags = [help_of(FAKE), {"learning-rate": space.Flag(float, (), "0.5")}]
    with pytest.raises(ValueError, match="holds the script's 0.001 or 0.5, which trial 0 runs"):
        space.read_space(("learning-rate=0:1",), [], flags, False)
    assert space.read_space(("learning-rate=0:1",), ["--learning-rate", "0.25"], flags, False)[1] == {"learning-rate": 0.25}


def test_a_script_of_another_kind_is_refused(tmp_path):
    for text, expected in (
        ("print('--seed INT')", "lists no --runs-dir"),
        ("raise SystemExit('no help')", "exit code 1: no help"),
    ):
        (tmp_path / "other.py").write_text(text)
        with pytest.raises(ValueError, match=expected):
            space.flags_of(tmp_path / "other.py", [])


# What is read of a run


def test_the_test_split_is_read_at_the_end_alone(tune, monkeypatch):
    """Rows of the test split that would spoil any score are not read while the study runs; then those of two trials are."""
    read = []

    def spy(path, columns, filters):
        read.append((*Path(path).parts[-4:-2], filters))
        return real(path, columns=columns, filters=filters)

    real = pd.read_parquet
    monkeypatch.setattr(trial.pd, "read_parquet", spy)
    tune("--trials", "2", "--seeds", "1", "2", "--space", SPACE, "--", "--mode", "poison")
    assert [filters for *_, filters in read[:4]] == [[("split", "==", "val")]] * 4
    assert [filters for *_, filters in read[4:]] == [[("split", "==", "test")]] * 4
    for tried in tune.tried:
        expected = [-(np.log10(tried["params"]["learning-rate"] / 1e-2) ** 2) + 0.25 + 0.1 * seed for seed in (1, 2)]
        assert [run["score"] for run in tried["runs"]] == pytest.approx(expected, abs=0.05)


def test_values_are_those_of_the_ledgers(tune):
    best = tune("--trials", "2", "--space", SPACE, "--aggregate", "iqm", "--seeds", "1", "2", "3", "4")
    for tried in tune.tried:
        scores = [score(run, "val") for run in tried["runs"]]
        assert [run["score"] for run in tried["runs"]] == pytest.approx(scores, rel=1e-12)
        assert tried["value"] == pytest.approx(np.mean(sorted(scores)[1:3]), rel=1e-12)
    for name, told in (("best", best), ("start", best["start"])):
        assert [run["test"] for run in told["runs"]] == pytest.approx(
            [score(run, "test") for run in told["runs"]], rel=1e-12
        ), name
    assert best["value"] == max(tried["value"] for tried in tune.tried) and best["start"]["params"] == {"learning-rate": 1e-3}
    assert trial.aggregate("median", [1.0, 5.0, 2.0]) == 2.0 and trial.aggregate("mean", [1.0, 5.0, 3.0]) == 3.0


@pytest.mark.parametrize(
    "env_id, metric, changes, expected",
    [
        ("LeadLag-v0", "script", {}, "growth"),
        ("Portfolio-v0", "growth", {}, "growth"),
        ("Portfolio-v0", "sharpe", {}, "sharpe"),
        ("LeadLag-v0", "utility:7.5", {}, 7.5),
        ("Portfolio-v0", "script", {"args": {"penalty_variance": 3.0}}, 7.0),
        ("Portfolio-v0", "script", {"args": {"utility": "mean_variance", "risk_aversion": 40.0}}, 40.0),
        ("Portfolio-v0", "script", {"args": {"utility": "cvar", "risk_aversion": 40.0}}, 1.0),
        ("Portfolio-v0", "script", {"args": {}, "risk_aversion": 12.0}, 12.0),
    ],
)
def test_metrics(tmp_path, env_id, metric, changes, expected):
    frame = make_ledger(3)
    run = make_run(tmp_path, frame=frame, env_id=env_id, **{"args": {"seed": 1}} | changes)
    found, test = trial.score_of(run, metric, "test"), frame[frame["split"] == "test"]
    if expected == "growth":
        assert found == pytest.approx(np.log1p(test["net_return"]).mean() * PER_YEAR, rel=1e-12)
    elif expected == "sharpe":
        assert found == pytest.approx(test["net_return"].mean() / test["net_return"].std(ddof=1) * PER_YEAR**0.5, rel=1e-12)
    else:
        assert found == pytest.approx(utility(test, expected, PER_YEAR), rel=1e-12)
    with pytest.raises(trial.Failure, match="holds no bar of the val split"):
        trial.score_of(run, metric, "val")


# Failures


def test_a_crash_is_recorded_with_its_log(tune, capsys):
    """And the study goes on."""
    tune(
        "--trials", "3", "--seeds", "1", "2", "--metric", "growth", "--sampler", "random", "--seed", "5",
        "--space", "utility=log|cvar", "--", "--mode", "crash on b",
    )  # fmt: skip
    states = {tried["params"]["utility"]: tried["state"] for tried in tune.tried}
    assert states == {"log": "complete", "cvar": "fail"} and len(tune.tried) == 3
    failed = next(tried for tried in tune.tried if tried["state"] == "fail")
    log = tune.out / "trials" / str(failed["number"]) / "seed-1" / "log.txt"
    assert failed["failure"] == f"exit code 1: ValueError: on purpose; its log is {log}" and "it begins" in log.read_text()
    assert not failed["runs"] and not log.parent.with_name("seed-2").exists()  # nothing more is spent on it
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tune.out / 'study.db'}")  # as a dashboard does
    assert "it begins" in study.trials[failed["number"]].user_attrs["log"]
    said = capsys.readouterr().out
    assert f"failed: exit code 1: ValueError: on purpose; its log is {log}" in said and "    it begins" in said


def test_three_failures_and_nothing_else_end_the_study(tune):
    with pytest.raises(SystemExit) as refusal:
        tune("--trials", "9", "--space", SPACE, "--", "--mode", "crash")
    (line,) = str(refusal.value).splitlines()
    assert line.startswith("the first 3 trials failed, the last: exit code 1: ValueError: on purpose") and len(tune.starts) == 3


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("diverged", "diverged in iteration 3: loss not finite; its log is"),
        ("no ledger", "left no ledger.parquet; expected a run on a market"),
        ("no validation", "its validation score is nan"),
        ("hang", "not finished after 2 seconds"),
    ],
)
def test_reasons_of_failures(tune, mode, expected):
    with pytest.raises(SystemExit, match="no trial of 1 was completed"):
        tune("--trials", "1", "--space", SPACE, "--timeout", "2", "--", "--mode", mode)
    assert tune.tried[0]["failure"].startswith(expected) and tune.tried[0]["state"] == "fail"
    assert mode != "hang" or all(map(gone, tune.hanging()))


# Pruning


def test_pruning_ends_the_process_and_its_children(tune, monkeypatch):
    monkeypatch.setattr(tuner, "make_pruner", lambda args: optuna.pruners.ThresholdPruner(lower=-100.0))
    monkeypatch.setattr(tuner, "CHOOSING", ())
    tune(
        "--trials", "2", "--seeds", "1", "2", "--sampler", "random", "--seed", "3", "--space", "utility=log|cvar", "--",
        "--mode", "hopeless on b",
    )  # fmt: skip
    pruned = [tried for tried in tune.tried if tried["params"]["utility"] == "cvar"]
    assert pruned and all(tried["state"] == "pruned" and tried["validations"] == [-1000.0] for tried in pruned)
    assert all(map(gone, tune.hanging()))
    assert len(tune.starts) == 2 * 2 - len(pruned)  # the second seed of what is hopeless never starts


def test_what_has_ended_is_not_pruned(tune, monkeypatch):
    """Its score is there, and is worth more than what was said of it on the way; unless there is another seed to save."""
    monkeypatch.setattr(tuner, "make_pruner", lambda args: optuna.pruners.ThresholdPruner(lower=-100.0))
    monkeypatch.setattr(trial, "POLL", 60.0)  # a look before it has begun, and one at the end
    tune("--trials", "1", "--seeds", "1", "--space", SPACE, "--", "--mode", "bad")
    assert (tune.tried[0]["state"], tune.tried[0]["validations"]) == ("complete", [-1000.0])
    tune.out = tune.out.with_name("two seeds")
    with pytest.raises(SystemExit, match="no trial of 1 was completed"):
        tune("--trials", "1", "--seeds", "1", "2", "--space", SPACE, "--", "--mode", "bad")
    assert tune.tried[0]["state"] == "pruned"


def test_reports_go_on_from_seed_to_seed(tune):
    """The aggregate of the runs that have ended and of the best validation of the one that runs."""
    tune("--trials", "1", "--seeds", "1", "2", "--aggregate", "mean", "--space", SPACE, "--", "--mode", "log")
    (tried,) = tune.tried
    first = tried["runs"][0]["score"]
    assert tried["validations"] == pytest.approx([-1.0, 2.0, 2.0, *((first + best) / 2 for best in (-1.0, 2.0, 2.0))])


@pytest.mark.parametrize("name", ["median", "hyperband", "none"])
def test_pruners(name, tmp_path):
    study = optuna.create_study(direction="maximize", pruner=tuner.make_pruner(tuner.Args(ROOT / "tuner.py", pruner=name)))
    pruned = 0
    for number in range(20):
        tried = study.ask()
        for step in range(1, 20):
            tried.report(-number, step)
            if tried.should_prune():
                assert name == "hyperband" or (number >= 5 and step == 3)
                pruned += 1
                study.tell(tried, state=TrialState.PRUNED)
                break
        else:
            study.tell(tried, -number)
    assert pruned == 15 if name == "median" else bool(pruned) == (name != "none")
    assert tuner.Args(ROOT / "tuner.py").pruner == "median" and tuner.Args(ROOT / "tuner.py", metric="sharpe").pruner == "none"


# Going on, and several workers


def test_the_same_command_goes_on(tune):
    """To the same trials as without the interruption; what is done is not run again."""
    tune("--trials", "2", "--seeds", "1", "--space", SPACE, "log-std=-3:0.5")
    before = tune.tried
    assert tune("--trials", "3", "--seeds", "1", "--space", SPACE, "log-std=-3:0.5")["trials"] == 3
    assert tune.tried[:2] == before and len(tune.starts) == 3
    tune("--trials", "3", "--seeds", "1", "--space", SPACE, "log-std=-3:0.5")
    assert len(tune.starts) == 3
    tune.out = tune.out.with_name("at once")
    tune("--trials", "3", "--seeds", "1", "--space", SPACE, "log-std=-3:0.5")
    again = [tried["params"] for tried in tune.tried]
    tune.out = tune.out.with_name("out")
    assert again == [tried["params"] for tried in tune.tried] and len({params["log-std"] for params in again}) == 3


def test_another_study_is_not_gone_on_with(tune):
    tune("--trials", "1", "--seeds", "1", "--space", SPACE)
    for options, expected in (
        (["--seeds", "2", "--space", SPACE], r"was begun with seeds \[1\], not \[2\]; expected another name"),
        (["--seeds", "1", "--space", SPACE, "--study", "other"], "holds trials of another study"),
    ):
        with pytest.raises(SystemExit, match=expected):
            tune("--trials", "1", *options)


def test_failed_trials_that_were_asked_for_are_tried_again(tune, monkeypatch):
    """Trial 0 and the cells of a grid; what a sampler suggested has failed for good."""
    monkeypatch.setattr(tuner, "HOPELESS", 9)
    study = optuna.create_study()
    setup = {"design": "search", "start": {"x": 1}, "space": {}}
    args = tuner.Args(ROOT / "tuner.py", trials=3, out=tune.out)
    tuner.set_up(study, setup, args)
    for _ in range(3):
        tried = study.ask()
        tried.set_user_attr("failure", "why")
        study.tell(tried, state=TrialState.FAIL)
    tuner.set_up(study, setup, args)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [(t.number, t.user_attrs["slot"]) for t in waiting] == [(3, 0)]


@pytest.mark.parametrize(
    "storage, number", [("sqlite", signal.SIGKILL), ("journal", signal.SIGKILL), ("sqlite", signal.SIGTERM)]
)
def test_a_worker_that_was_killed_loses_nothing(tune, storage, number):
    """Its script ends with it, the same trial is run again by whoever goes on, and no trial is missing or surplus."""
    options = ["--trials", "2", "--seeds", "1", "--heartbeat", "1", "--space", SPACE]
    options += ["--storage", f"journal:{tune.out / 'journal.log'}"] if storage == "journal" else []
    options += ["--", "--mode", "hang in the second"]
    tune.out.mkdir()
    process = tune.start(*options)
    pids = tune.hanging()
    process.send_signal(number)
    said, _ = process.communicate()
    wait_until(lambda: gone(pids[0]))
    os.kill(pids[1], signal.SIGKILL) if number == signal.SIGKILL else None
    wait_until(lambda: gone(pids[1]))
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "interrupted; the same command goes on from here" in said
    best = tune(*options)
    states = [(tried["slot"], tried["state"]) for tried in tune.tried]
    assert sorted(states) == [(0, "complete"), (1, "complete"), (1, "fail")] and best["trials"] == 2
    lost, again = (tried for tried in tune.tried if tried["slot"] == 1)
    assert lost["params"] == again["params"] != best["start"]["params"] and len(tune.starts) == 3


@pytest.fixture
def postgres():
    """URL of a PostgreSQL server of its own on a Unix socket; it refuses to run as root, and gets another user then."""
    if not (shutil.which("initdb") and shutil.which("pg_ctl")):
        pytest.skip("no PostgreSQL here: initdb and pg_ctl are not on the PATH")
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)

    def call(*command):
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    data = folder / "data"
    call("initdb", "-D", str(data), "-U", "tuner", "-A", "trust", "--no-sync")
    call(
        "pg_ctl",
        "-D",
        str(data),
        "-w",
        "-l",
        str(folder / "log"),
        "-o",
        f"-k {folder} -c listen_addresses='' -c fsync=off",
        "start",
    )
    try:
        yield f"postgresql+psycopg://tuner@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def test_two_workers_on_postgresql(tune, postgres):
    """They never run the same trial, nor one too many, although one of them is killed outright in the middle of a trial."""
    options = ["--trials", "6", "--seeds", "1", "--heartbeat", "1", "--storage", postgres, "--workers", "2", "--space", SPACE]
    options += ["--", "--delay", "0.2"]
    process = tune.start(*options)
    wait_until(lambda: len(tune.starts) >= 3)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in workers if b"--as-worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    wait_until(lambda: Path(f"/proc/{workers[0]}/task/{workers[0]}/children").read_text().strip())
    os.kill(int(workers[0]), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    study = optuna.load_study(study_name="search", storage=postgres)
    lost = [t for t in study.trials if t.state == TrialState.FAIL]
    assert sorted(t.user_attrs["slot"] for t in study.trials if t.state == TrialState.COMPLETE) == list(range(6))
    assert len(lost) <= 1 and len(study.trials) == 6 + len(lost) and len(tune.starts) == len(set(tune.starts)) <= 7
    assert len({t.user_attrs["worker"] for t in study.trials if "worker" in t.user_attrs}) == 2
    params = [t.params["learning-rate"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(set(params)) == 6  # workers with one seed do not suggest the same


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_slot_that_was_queued_twice_is_run_once(tune, tmp_path):
    """As by two commands that set the study up at the same moment; and slots beyond --trials are not run."""
    args = tuner.Args(ROOT / "tuner.py", storage=f"sqlite:///{tmp_path / 'study.db'}")
    storage = tuner.open_storage(args)
    study = optuna.create_study(storage=storage, study_name="search")
    for slot in (0, 1, 0, 1, 2):
        study.enqueue_trial({}, user_attrs={"slot": slot})
    claimed = []
    while found := tuner.claim(study, storage, 2):
        claimed.append(found.number)
        assert storage.get_trial(found._trial_id).state == TrialState.RUNNING
    assert claimed == [0, 1] and tuner.claim(study, storage, 3).number == 4


# Samplers


def values_of(name: str, *parts: int, seed: int = 0) -> list[dict]:
    """Parameters that a sampler suggests in a study that is gone on with by new samplers, a quadratic being maximised."""
    study = optuna.create_study(direction="maximize")
    for trials in parts:
        study.sampler = samplers.make_sampler(name, seed)
        study.optimize(quadratic, trials)
    return [t.params for t in study.trials]


def quadratic(tried: optuna.Trial) -> float:
    """Highest, 0, at 1e-3, 20 and b."""
    x, n = tried.suggest_float("x", 1e-6, 1.0, log=True), tried.suggest_int("n", 1, 100)
    choice = tried.suggest_categorical("choice", ["a", "b", "c"])
    return -(np.log10(x / 1e-3) ** 2) - ((n - 20) / 20) ** 2 - (choice != "b")


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "random", "cem"])
def test_samplers_are_reproducible(name):
    """The same seed suggests the same, interrupted or not; another seed does not; nothing is suggested twice."""
    whole = values_of(name, 12)
    assert values_of(name, 5, 7) == whole != values_of(name, 12, seed=1)
    assert len({params["x"] for params in whole}) == 12


def test_the_cross_entropy_method_converges():
    found = values_of("cem", 120)
    first, last = found[:10], found[-10:]
    assert np.std([np.log10(p["x"]) for p in last]) < 0.25 * np.std([np.log10(p["x"]) for p in first])
    assert np.mean([np.log10(p["x"]) for p in last]) == pytest.approx(-3, abs=0.5)
    assert np.mean([p["n"] for p in last]) == pytest.approx(20, abs=8) and [p["choice"] for p in last].count("b") >= 8
    assert len({p["x"] for p in last}) == 10  # a deviation never vanishes


# Designs


def test_a_grid_finds_planted_effects(tune, capsys):
    tune("--grid", "--metric", "growth", "--seeds", "1", "2", "--space", "norm-adv=true|false", "utility=log|cvar")
    cells = [tuple(tried["params"].values()) for tried in tune.tried]
    assert cells == [(True, "log"), (True, "cvar"), (False, "log"), (False, "cvar")]
    with (tune.out / "effects.csv").open() as file:
        found = {row["factor"]: row for row in csv.DictReader(file)}
    for factor, level, planted in (("norm-adv", "False", -0.25), ("utility", "cvar", 0.5)):
        row = found[factor]
        low, effect, high = (float(row[key]) for key in ("low", "effect", "high"))
        assert row["level"] == level and row["pairs"] == "2" and effect == pytest.approx(planted, abs=0.01)
        assert low <= effect + 1e-12 and effect <= high + 1e-12 and high - low < 0.01
    assert f"| utility | cvar | log | {effect:.6g} |" in capsys.readouterr().out


def test_an_ablation_changes_one_at_a_time(tune):
    tune("--ablate", "--seeds", "1", "--metric", "growth", "--space", "norm-adv=true|false", "update-epochs=1|2|3")
    assert [tuple(tried["params"].values()) for tried in tune.tried] == [(True, 1), (False, 1), (True, 2), (True, 3)]
    with (tune.out / "effects.csv").open() as file:
        assert [(row["factor"], row["level"], row["pairs"]) for row in csv.DictReader(file)] == [
            ("norm-adv", "False", "1"), ("update-epochs", "2", "1"), ("update-epochs", "3", "1"),
        ]  # fmt: skip


def test_a_grid_without_factors_is_a_sweep_over_seeds(tune):
    best = tune("--grid", "--seeds", "1", "2", "3", "4")
    scores = np.array([run["score"] for run in best["runs"]])
    assert len(scores) == 4 and best["trials"] == 1
    mean, iqm, interval = (tune.out / "report.md").read_text().split("95% interval of the IQM |")[1].split("|")[5:8]
    low, high = json.loads(interval)
    assert float(mean) == pytest.approx(scores.mean(), rel=1e-5) and float(iqm) == pytest.approx(
        np.sort(scores)[1:3].mean(), rel=1e-5
    )
    assert scores.min() - 1e-5 <= low < float(iqm) < high <= scores.max() + 1e-5


def test_intervals_cover():
    """Of means of few normal scores: about 95 times in 100."""
    rng = np.random.default_rng(0)
    for size in (5, 20):
        held = [low <= 0.0 <= high for low, high in (results.interval(rng.standard_normal(size)) for _ in range(200))]
        assert 0.87 < np.mean(held) < 0.995
    assert np.isnan(results.interval(np.ones(1))).all()


# Results


def test_best_json_reruns_to_the_same_bits(tune, tmp_path):
    best = tune("--trials", "2", "--seeds", "3", "--markets", "b.csv", "--space", SPACE, "--", "--log-std", "-2")
    (run,) = best["runs"]
    assert best["args"] == ["--log-std", "-2", f"--learning-rate={best['params']['learning-rate']}"]
    subprocess.run([sys.executable, best["script"], *run["args"], "--runs-dir", str(tmp_path / "again")], check=True)
    (again,) = (tmp_path / "again").iterdir()
    assert (again / "ledger.parquet").read_bytes() == (Path(run["run_dir"]) / "ledger.parquet").read_bytes()


def test_the_scoreboard_counts_the_trials(tune, monkeypatch):
    """Of the copies of the best runs: the more there were, the less is left of the Sharpe ratio. It compares best and start."""
    monkeypatch.undo()
    monkeypatch.setattr(tuner, "flags_of", lambda path, arguments: help_of(path.read_text()))
    best = tune("--trials", "3", "--seeds", "1", "2", "--space", "learning-rate=log:1e-3:2e-2")
    assert best["trials"] == json.loads((tune.out / "trials.json").read_text())["trials"] == 3 and best["trial"] > 0
    alone = board.Args(runs=(tune.out / "start", tune.out / "best"), resamples=50, replays=False)
    (group,) = board.assemble(alone)["groups"]
    assert group["trials"] == 2 * 3 + 2 * 1
    for path in (tune.out / "best").glob("*/*/run.json"):
        assert json.loads(path.read_text())["trials"] == 3
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trials": 1}))
    deflated = max(group["rows"], key=lambda row: row["sharpe"]["value"])["dsr"]
    (group,) = board.assemble(alone)["groups"]
    assert deflated < max(group["rows"], key=lambda row: row["sharpe"]["value"])["dsr"]
    assert all(json.loads((Path(r["run_dir"]) / "run.json").read_text())["trials"] == 1 for r in best["runs"])
    report = (tune.out / "report.md").read_text()
    assert "difference  95% interval" in report and "| validation |" in report and "| test |" in report
    page = (tune.out / "report.html").read_text()
    assert page.count("Plotly.newPlot") >= 3 and "src=" not in page.replace('src="data', "")[:200_000].split("<body>")[0]


def test_ray_is_optional(tune, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="--ray: Ray is not installed; expected pip install ray, or no --ray"):
        tune("--ray", "--space", SPACE)


def test_a_real_script(tmp_path):
    """One trial of ppo_leadlag: the value is the validation score that the script chose its model by."""
    sizes = ["--total-timesteps", "2048", "--num-envs", "32", "--num-steps", "16", "--eval-every", "2", "--no-cuda"]
    market = ["--market", "synthetic:leadlag:bars=400:train=2:val=1:test=2", "--max-lookback", "60", "--num-lookbacks", "3"]
    own = ["--script", "algos/ppo_leadlag.py", "--out", str(tmp_path / "out"), "--trials", "1", "--seeds", "1"]
    tuner.main(tyro.cli(tuner.Args, args=own), own, [*sizes, *market])
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    run = json.loads((Path(best["runs"][0]["run_dir"]) / "run.json").read_text())
    assert best["value"] == pytest.approx(run["val_growth"], rel=1e-12) and best["params"]["learning-rate"] == 2e-3
    assert best["runs"][0]["test"] == pytest.approx(run["scores"]["test"]["agent"]["growth"], rel=1e-12)
    assert run["args"]["num_threads"] == len(os.sched_getaffinity(0))
    (tried,) = json.loads((tmp_path / "out" / "trials.json").read_text())["tried"]
    assert len(tried["validations"]) == 2 and max(tried["validations"]) == pytest.approx(run["val_growth"], rel=1e-6)
    assert {"gamma", "gae-lambda", "ent-coef", "clip-coef", "num-minibatches", "update-epochs"} <= set(best["params"])
