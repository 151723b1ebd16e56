"""What every script in algos/ must satisfy: what it leaves behind, that it can be repeated, killed and resumed, and what it
says of bad input. What PPO scripts have in common is in test_ppo_scripts.py, what is one script's own in test_<script>.py."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import (
    ITERATIONS,
    SCRIPTS,
    Run,
    actions_of,
    assert_same_content,
    assert_same_run,
    quick_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs import ledger
from envs.costs import RECORD
from envs.synthetic import make_panel

pytest_plugins = ["scripts"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


of_markets = pytest.mark.parametrize("script", [name for name in SCRIPTS if not SCRIPTS[name].agents], indirect=True)


def nested_fields(script) -> dict:
    """All arguments of a script, by group."""
    return dataclasses.asdict(script.module.Args())


# --- what a run leaves behind


def test_run_json_says_everything(script, base):
    run, args, expected = base.json, base.json["args"], nested_fields(script)
    assert (run["status"], run["failure"], run["env_id"], run["trials"]) == ("finished", None, script.env_id, 1)
    assert set(args) == set(expected)
    source, value = script.on(script.market)
    given = {"seed": 1, source.strip("-"): value, "total_timesteps": 20480, "eval_every": 5} | script.given
    for key, value in given.items():
        if isinstance(value, dict):  # a group of arguments
            assert set(args[key]) == set(expected[key])
            assert {name: args[key][name] for name in value} == value
        else:
            assert args[key] == value, key
    assert run["script"] == script.path.name and run["device"] == "cpu" and run["python"] and run["platform"]
    assert run["script_sha256"] == hashlib.sha256(script.path.read_bytes()).hexdigest()
    assert "git_commit" in run and {"torch", "numpy", "numba", "gymnasium"} <= set(run["packages"])

    panel = make_panel(script.market, seed=1)
    assert run["panel"] == json.loads(json.dumps(ledger.describe_panel(panel, panel.split())))
    assert set(run["panel"]["splits"]) == {"train", "val", "test"}
    assert all({"start", "end", "bars"} == set(split) for split in run["panel"]["splits"].values())
    assert run["market"]["fill"] == "next_open" and run["market"]["costs"] == dataclasses.asdict(script.loaded_costs)

    assert run["env_steps"] == 20480 and run["sps"] > 0 and 0 < run["train_seconds"] <= run["wall_clock"]
    assert np.isfinite([run[key] for key in (f"val_{script.score}", *script.numbers)]).all()
    assert set(run["scores"]) == {"train", "val", "test"}
    assert list(run["scores"]["test"]) == ["agent", *script.others]
    for split in ("train", "val"):
        assert set(run["scores"][split]) == {"agent"}
    fields = {"growth", "sharpe", "gross_sharpe", "max_drawdown", "turnover", "cost", "bars"}
    for split, name in [("val", "agent"), ("train", "agent"), *(("test", name) for name in run["scores"]["test"])]:
        score = run["scores"][split][name]
        varies = split == "test" and score["bootstrap"] != "returns do not vary"
        extra = {"sharpe_low", "sharpe_high"} if varies else set()
        assert fields | extra <= set(score) and all(np.isfinite(score[key]) for key in fields | extra), name
    assert not list(base.folder.glob("*.part"))


def test_ledger_holds_every_bar_and_every_score(script, base):
    frame = base.ledger
    assert tuple(frame.columns) == script.columns and not frame.drop(columns="action").isna().any().any()
    assert np.isfinite(actions_of(frame)).all()
    panel = make_panel(script.market, seed=1)
    rows = np.arange(panel.num_bars).reshape(5, -1)  # of each history
    assert list(frame["split"].unique()) == ["train", "val", "test"]
    for split, histories in (("train", (0, 1)), ("val", (2,)), ("test", (3, 4))):
        part = frame[frame["split"] == split]
        assert set(part["market"]) == set(range(len(histories)))
        for history, (_, market) in zip(histories, part.groupby("market")):
            assert len(market) > script.scored * rows.shape[1]  # the first bars of a history only warm the features up
            assert (market["timestamp"].to_numpy() == panel.timestamps[rows[history, -len(market) :]]).all()
        scores, again = base.json["scores"][split]["agent"], ledger.summarise(part, panel.bars_per_year)
        numbers = {key: value for key, value in scores.items() if not isinstance(value, str) and key != "utility"}
        assert numbers == pytest.approx({key: again[key] for key in numbers}, rel=1e-12)
    money = frame["gross_return"] + frame["interest"] - frame[list(RECORD[2:8])].sum(axis=1)
    np.testing.assert_allclose(frame["net_return"], money, atol=1e-12)


def test_checkpoint_holds_all_that_is_needed(script, base):
    model = base.model
    assert model["iteration"] == ITERATIONS and model["global_step"] == 20480
    assert set(model["args"]) == set(nested_fields(script))
    assert {"model", "best_model", "optimizer", "rng", *script.kept} <= set(model)
    agent = script.make_agent(script.module, model)
    agent.load_state_dict(model["model"])
    assert len(model["optimizer"]["state"]) == len(list(agent.parameters()))


def test_tensorboard_has_cleanrls_tags(script, base):
    events, val = EventAccumulator(str(base.folder)), f"eval/val_{script.score}"
    events.Reload()
    tags = set(events.Tags()["scalars"])
    losses = {f"losses/{name}" for name in script.losses}
    assert {"charts/episodic_return", "charts/SPS", "charts/learning_rate", val} | losses <= tags
    for tag, steps in (("charts/SPS", range(1, 21)), (min(losses), range(1, 21)), (val, (5, 10, 15, 20))):
        assert [e.step for e in events.Scalars(tag)] == [1024 * n for n in steps], tag
    rates = [e.value for e in events.Scalars("charts/learning_rate")]
    np.testing.assert_allclose(rates, base.json["args"]["learning_rate"] * (1 - np.arange(20) / 20), rtol=1e-6)
    assert max(e.value for e in events.Scalars(val)) == pytest.approx(base.json[f"val_{script.score}"], rel=1e-5)


def test_costs_and_final_table_are_printed(script, base):
    out, panel = base.done.stdout, base.json["panel"]
    bars = 5 * int(re.search(r"bars=(\d+)", script.market)[1])
    assert script.market in out and f"{bars} bars x {len(panel['symbols'])} symbols, fill next_open" in out
    costs = dataclasses.asdict(script.loaded_costs)
    assert all(f"{key}={value:g}" in out for key, value in costs.items() if key != "name")
    rows = out[out.index("test split") :]
    for name, score in base.json["scores"]["test"].items():
        row = re.search(rf"^{name}  .*$", rows, re.MULTILINE)
        low, high = (np.nan if score[key] is None else score[key] for key in ("sharpe_low", "sharpe_high"))
        assert row and all(
            text in row[0]
            for text in (
                f"{score['sharpe']:.2f}", f"[{low:.2f}, {high:.2f}]", f"{score['growth']:.1%}",
                f"{score['max_drawdown']:.1%}", f"{score['turnover']:.0f}x", f"{score['cost']:.1%}",
            )
        ), name  # fmt: skip
    assert str(base.folder) in out


# --- the same bits


def test_the_same_seed_gives_the_same_bits_and_another_does_not(script, base, inside):
    """In this process, after whatever ran here before, as in a fresh one."""
    assert_same_run(Run(inside(*script.short)["run_dir"]), base)
    other = Run(inside(*script.short, "--seed", "2")["run_dir"])
    assert script.agents or other.json["panel"]["sha256"] != base.json["panel"]["sha256"]
    for name, weight in script.make_agent(script.module, base.model).named_parameters():
        if weight.ndim > 1:
            assert not torch.equal(other.model["model"][name], base.model["model"][name]), name
    assert not torch.equal(other.model["rng"], base.model["rng"])


@pytest.mark.parametrize("script", quick_for("ppo_leadlag", "ppo_portfolio", "grpo_diffmarket", of=SCRIPTS), indirect=True)
def test_the_same_seed_gives_the_same_bits_on_two_threads(script, inside):
    options = [*script.short, "--total-timesteps", "2048"]
    first, second = (Run(inside(*options, num_threads=2)["run_dir"]) for _ in range(2))
    assert first.json["args"]["num_threads"] == 2 and first.folder != second.folder
    assert_same_run(first, second)


def test_numbas_threads_start_before_torchs_are_counted(script):
    """What that order is for: test_ppo_portfolio.test_torch_keeps_to_the_threads_that_were_asked_for."""
    source = script.path.read_text()
    assert 0 < source.find("numba.get_num_threads()") < source.find("torch.set_num_threads(")


def test_killed_and_resumed_is_never_interrupted(script, base, inside, tmp_path, capsys):
    """kill -9 after some checkpoints; --resume takes the arguments from the run, and ends with the same bits."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    call = [sys.executable, str(script.path), *script.short, "--runs-dir", str(tmp_path / "runs")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(call, cwd=ROOT, env=environment, stdout=log, stderr=log)
    written, deadline = set(), time.monotonic() + 120
    while len(written) < 4 and process.poll() is None and time.monotonic() < deadline:
        written |= {os.stat(path).st_mtime_ns for path in (tmp_path / "runs").glob("*/model.pt")}
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    killed = torch.load(folder / "model.pt", weights_only=True)
    assert 5 < killed["iteration"] < ITERATIONS and not (folder / "ledger.parquet").exists()
    assert np.isfinite(killed["best_score"])
    assert json.loads((folder / "run.json").read_text())["status"] == "running"

    inside("--resume", str(folder), "--seed", "9", "--learning-rate", "1")
    assert f"after iteration {killed['iteration']}" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [folder.name]
    resumed = Run(folder)
    assert_same_run(resumed, base)
    assert resumed.json["args"] | {"resume": None, "runs_dir": ""} == base.json["args"] | {"runs_dir": ""}


def test_resuming_a_finished_run_reports_it_again(base, inside, tmp_path):
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    inside("--resume", str(folder))
    assert_same_run(Run(folder), base)


def test_a_better_model_from_before_the_kill_is_kept(script, base, inside, tmp_path):
    """A checkpoint two iterations before the end whose best model, by its score, cannot be beaten any more."""
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    model = base.model
    best = {key: torch.zeros_like(value) for key, value in model["best_model"].items()}
    torch.save(model | {"iteration": ITERATIONS - 2, "best_score": 1e9, "best_model": best}, folder / "model.pt")
    inside("--resume", str(folder))
    found = Run(folder)
    assert found.model["iteration"] == ITERATIONS and found.model["best_score"] == 1e9
    assert_same_content(found.model["best_model"], best)
    assert found.json[f"val_{script.score}"] == 1e9
    assert not script.idles or not actions_of(found.ledger).any()  # zero weights: the first action that is allowed, or no trade


# --- the test split


def test_other_test_markets_change_nothing_in_training(script, base, inside):
    """A third test history, drawn from a seed of its own: not a bit of the model knows of it."""
    other = Run(inside(*script.short, *script.on(script.market.replace("test=2", "test=3")))["run_dir"])
    found, expected = other.model, base.model
    for key in ("model", "best_model", "best_score", "optimizer", "rng", *script.kept):
        assert_same_content(found[key], expected[key], key)
    assert set(other.ledger["market"]) == {0, 1, 2}
    assert other.json["scores"]["test"]["agent"]["growth"] != base.json["scores"]["test"]["agent"]["growth"]


# --- what goes wrong


@of_markets
@pytest.mark.parametrize(
    "options, words",
    [
        (["--market", "no-such-market"], ("market", "no-such-market", "sp500", "synthetic")),
        (["--market", "synthetic:nonsense"], ("--market", "nonsense", "leadlag", "garleanu-pedersen", "noise")),
        (["--market", "synthetic:noise:bras=400"], ("--market", "bras", "bars")),
        (["--folds", "2"], ("segments|walk_forward",)),
        (["--market", "missing/prices.csv"], ("missing/prices.csv", "no such file")),
        (["--market", "sp500", "--symbols", "AAPL", "NOPE"], ("symbols", "NOPE", "AAPL")),
        (["--costs", "free"], ("--costs", "free", "institutional")),
        (["--costs", "retail:comission_bps=2"], ("--costs", "comission_bps", "commission_bps")),
        (["--fill", "yesterday"], ("fill", "yesterday")),
        (["--learning-rate", "fast"], ("--learning-rate", "fast")),
        (["--learning-rte", "1"], ("--learning-rte",)),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line


def test_resume_of_nothing_is_named(complaint, tmp_path):
    line = complaint("--resume", str(tmp_path / "nowhere"))
    assert "--resume" in line and "nowhere" in line, line


def test_divergence_stops_cleanly(script, inside, tmp_path):
    with pytest.raises(SystemExit) as caught:
        inside(*script.short, "--learning-rate", "1e20", "--no-anneal-lr", "--max-grad-norm", "1e9")
    (folder,) = (tmp_path / "runs").iterdir()
    run, line = json.loads((folder / "run.json").read_text()), caught.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1
    assert run["status"] == "failed" and run["failure"] in line and str(folder) in line
    assert re.search(r"iteration \d+\b.*(loss|utility|kl|weight|bias|log_std)", run["failure"])
    assert not (folder / "ledger.parquet").exists() and "scores" not in run
    if (folder / "model.pt").exists():
        model = torch.load(folder / "model.pt", weights_only=True)
        assert all(torch.isfinite(v).all() for v in model["model"].values())


def test_help_lists_and_explains_every_flag(script, unexplained):
    arguments = nested_fields(script)
    names = {name for group in arguments.values() if isinstance(group, dict) for name in group}
    names |= {name for name, value in arguments.items() if not isinstance(value, dict)}
    assert len(names) > 50
    assert unexplained(names - set(script.suppressed)) == set(script.unexplained)
