"""What every offline script in algos/ must satisfy, on continuous and discrete actions: what it leaves behind, that it can be
repeated, killed and resumed, that it learns from no episode that is held out, and what it says of bad data. What is one
script's own is in test_<script>.py."""

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
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from offline_cases import (
    CASES,
    GRADIENT_STEPS,
    MARKET_STEPS,
    chain,
    edit_meta,
    log_gymnasium,
    market_meta,
    shake,
    toy,
    write_foreign,
)  # fmt: skip
from scripts import Run, Toy, assert_same_content, assert_same_ledger, assert_same_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import (  # noqa: F401 (they hold of all scripts)
    test_ledger_holds_every_bar_and_every_score,
    test_resume_of_nothing_is_named,
    test_resuming_a_finished_run_reports_it_again,
)

from envs import ledger
from envs.dataset import Dataset, sha256_of
from envs.synthetic import make_panel
from envs.task import Task

pytest_plugins = ["scripts", "offline_cases"]
pytestmark = pytest.mark.usefixtures("few_resamples")

ONE_EACH = [name for name, case in CASES.items() if case.discrete == (case.name == "cql_portfolio")]
SMALL = ("--gradient-steps", "40", "--batch-size", "32", "--hidden", "16", "--eval-every", "20", "--checkpoint-every", "10")


@pytest.fixture(params=CASES)
def script(request):
    return CASES[request.param]


def some(names):
    """Run a test on these cases only."""
    return pytest.mark.parametrize("script", names, indirect=True)


def scalars(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


# --- what a run leaves behind


def test_run_json_says_everything(script, base, datasets):
    run, args, expected = base.json, base.json["args"], dataclasses.asdict(script.module.Args())
    assert (run["status"], run["failure"], run["env_id"], run["trials"]) == ("finished", None, script.env_id, 1)
    assert args.keys() == expected.keys() and {name: args[name] for name in script.given} == script.given
    assert run["script"] == script.path.name and run["device"] == "cpu" and run["python"] and run["platform"]
    assert run["script_sha256"] == hashlib.sha256(script.path.read_bytes()).hexdigest()
    assert "git_commit" in run and {"torch", "numpy", "numba", "gymnasium"} <= set(run["packages"])

    panel = make_panel(script.market, seed=1)
    assert run["panel"] == json.loads(json.dumps(ledger.describe_panel(panel, panel.split())))
    assert run["market"]["fill"] == "next_open" and run["market"]["costs"] == dataclasses.asdict(script.loaded_costs)
    assert run["risk_aversion"] == (1.0 if script.discrete else 3.0)

    data, offline = Dataset(datasets / script.env_id / "dataset.hdf5"), run["offline"]
    told = {name: data.meta[name] for name in ("sha256", "steps", "episodes", "behaviours")}
    assert told | {"dataset": str(data.path), "gradient_steps": GRADIENT_STEPS} == {
        name: offline[name] for name in (*told, "dataset", "gradient_steps")
    }
    train, _ = data.split_episodes(0.1, seed=1)
    rewards = np.concatenate([block["rewards"] for block in data.blocks(train)]).astype(float)
    assert offline["mean_reward"] == pytest.approx(rewards.mean() * panel.bars_per_year)
    assert set(offline["held_out"]) == set(script.held_out) and np.isfinite(list(offline["held_out"].values())).all()
    assert offline["best_step"] in {0, *range(40, script.total_steps + 1, 40)}

    assert run["env_steps"] == (8 * MARKET_STEPS if script.online else 0)
    assert run["sps"] > 0 and 0 < run["train_seconds"] <= run["wall_clock"]
    assert np.isfinite([run[key] for key in ("val_score", *script.numbers)]).all()
    assert set(run["scores"]) == {"train", "val", "test"}
    assert list(run["scores"]["test"]) == ["agent", *script.others]
    fields = {"growth", "sharpe", "gross_sharpe", "max_drawdown", "turnover", "cost", "bars"}
    of_test = fields | {"sharpe_low", "sharpe_high", "utility"}
    for score, named in [
        *((run["scores"][split]["agent"], fields) for split in ("train", "val")),
        *((score, of_test) for score in run["scores"]["test"].values()),
    ]:
        assert named <= set(score) and all(np.isfinite(score[key]) for key in named)
    assert not list(base.folder.glob("*.part"))


def test_the_last_model_has_a_ledger_too(script, base):
    """Of the test split, in the same format; and both are in the table."""
    last, years = pd.read_parquet(base.folder / "ledger_last.parquet"), base.json["panel"]["bars_per_year"]
    agent, scores = base.ledger.query("split == 'test'"), base.json["scores"]["test"]
    assert tuple(last.columns) == script.columns and set(last["split"]) == {"test"}
    assert last[["market", "timestamp"]].equals(agent[["market", "timestamp"]].reset_index(drop=True))
    for frame, name in ((agent, "agent"), (last, "last")):
        assert ledger.summarise(frame, years)["growth"] == scores[name]["growth"]
    model, best = base.model, base.json["offline"]["best_step"]
    same = all(torch.equal(model["model"][key], value) for key, value in model["best_model"].items())
    assert same == (best == script.total_steps)

    out = base.done.stdout
    assert f"{base.json['offline']['steps']} steps" in out and script.env_id in out and "run directory" in out
    assert "gamma 0.9" in out or not script.online
    rows = out[out.index("test split") :]
    assert f"step {best};" in rows
    for name, score in scores.items():
        row = re.search(rf"^{name}  .*$", rows, re.MULTILINE)[0]
        assert all(f"{score[field]:.1%}" in row for field in ("growth", "utility", "max_drawdown", "cost")), name
        assert f"{score['sharpe']:.2f}" in row and f"[{score['sharpe_low']:.2f}, {score['sharpe_high']:.2f}]" in row


def test_checkpoint_holds_all_that_is_needed(script, base):
    model = base.model
    assert model["step"] == script.total_steps and set(model["args"]) == set(dataclasses.asdict(script.module.Args()))
    assert {"model", "best_model", "optimizer", "rng", *script.kept} <= set(model)
    agent = script.make_agent(script.module, model)
    agent.load_state_dict(model["model"])
    if script.online:
        assert len(model["online"]["buffer"]["rewards"]) == 8 * MARKET_STEPS


def test_tensorboard_has_cleanrls_tags(script, base):
    events = scalars(base.folder)
    steps = list(range(40, script.total_steps + 1, 40))
    tags = {"charts/SPS", "charts/learning_rate", "eval/val_score"}
    tags |= {f"losses/{name}" for name in script.losses} | {f"eval/held_out_{name}" for name in script.held_out}
    assert set(events.Tags()["scalars"]) == tags | ({"charts/episodic_return"} if script.online else set())
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == steps, tag
    rates = np.array([event.value for event in events.Scalars("charts/learning_rate")])
    # along a cosine, unless the run goes on online
    expected = [1.0 if script.online else 0.5 * (1 + np.cos(np.pi * (n - 1) / GRADIENT_STEPS)) for n in steps]
    np.testing.assert_allclose(rates / base.json["args"]["learning_rate"], expected, rtol=1e-5)
    best = base.json["val_score"]
    if script.name != "bc_portfolio":
        assert max(event.value for event in events.Scalars("eval/val_score")) == pytest.approx(best, rel=1e-5)
    else:
        assert min(event.value for event in events.Scalars("eval/held_out_nll")) == pytest.approx(-best, rel=1e-5)


def test_the_market_is_that_of_the_data(script, base, datasets):
    """Its terms too: the ledger is what the rebuilt market says of the best model's actions."""
    model = base.model
    agent = script.make_agent(script.module, model)
    agent.load_state_dict(model["best_model"])

    def policy(observation, mask, *_):
        return agent.act(torch.as_tensor(observation), None if mask is None else torch.as_tensor(mask)).numpy()

    task = Task(market_meta(script.env_id))
    found = base.ledger
    for split in ("train", "val", "test"):
        part = found[found["split"] == split].reset_index(drop=True)
        assert_same_ledger(part, task.run(split, policy).reset_index(drop=True))


# --- the same bits


def test_the_same_seed_gives_the_same_bits_and_the_data_stay_as_they_are(script, base, short, inside, datasets):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in datasets.rglob("*.*")}
    assert_same_run(Run(inside(*short)["run_dir"]), base)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in datasets.rglob("*.*")} == before


def test_another_seed_gives_other_bits(script, inside, tmp_path):
    """Other networks, batches and held-out episodes."""
    data = toy(tmp_path / "toy" / "dataset.hdf5", script.discrete)
    still = ["--learning-rate", "0", *(["--actor-learning-rate", "0"] * (script.name == "cql_portfolio"))]
    first, other = (inside("--dataset", str(data), *SMALL, "--seed", seed, *still) for seed in ("1", "2"))
    for name, weight in first["agent"].named_parameters():
        if ".weights." in name:
            assert not torch.equal(other["agent"].get_parameter(name), weight), name
    assert any((first["batch"][key] != other["batch"][key]).any() for key in first["batch"])
    assert list(first["held_out"]) != list(other["held_out"])


@some(ONE_EACH)
def test_killed_and_resumed_is_never_interrupted(script, base, short, inside, tmp_path, capsys):
    """kill -9 of a process after some checkpoints; --resume takes the arguments from the run, and ends with the same bits as
    a run in this process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    call = [sys.executable, str(script.path), *short, "--num-threads", "1", "--no-cuda", "--runs-dir", str(tmp_path / "runs")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(call, cwd=ROOT, env=environment, stdout=log, stderr=log)
    written, deadline = set(), time.monotonic() + 120
    while len(written) < 2 and process.poll() is None and time.monotonic() < deadline:
        written |= {os.stat(path).st_mtime_ns for path in (tmp_path / "runs").glob("*/model.pt")}
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    step = torch.load(folder / "model.pt", weights_only=True)["step"]
    assert 40 < step < script.total_steps and not (folder / "ledger.parquet").exists()
    assert json.loads((folder / "run.json").read_text())["status"] == "running"

    inside("--resume", str(folder), "--seed", "9", "--learning-rate", "1")
    assert f"after step {step}" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [folder.name]
    assert_same_run(Run(folder), base)


@pytest.mark.parametrize(
    "script, checkpoint",
    [(name, checkpoint) for name, case in CASES.items() for checkpoint in ((5, 4) if case.online else (2,))],
    indirect=["script"],
)
def test_resumed_anywhere_it_goes_on_the_same(script, base, inside, tmp_path, checkpoint):
    """Before, at and after the switch to the markets; after it in mid-episode and between two steps of them."""
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    shutil.copy(base.folder.parent / f"{checkpoint}.pt", folder / "model.pt")
    saved = Run(folder).model
    assert saved["step"] == 30 * checkpoint and bool(saved.get("online")) == (saved["step"] > GRADIENT_STEPS)
    inside("--resume", str(folder))
    assert_same_run(Run(folder), base)


@some(ONE_EACH)
def test_a_better_model_from_before_the_kill_is_kept(script, base, inside, tmp_path):
    """A checkpoint near the end whose best model, by its score, cannot be beaten any more; and is what is reported."""
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    model = base.model
    zeros = {key: value if key in ("low", "high") else torch.zeros_like(value) for key, value in model["best_model"].items()}
    changed = {"step": script.total_steps - 2, "best_score": 1e9, "best_model": zeros, "best_step": 77}
    torch.save(model | changed, folder / "model.pt")
    inside("--resume", str(folder))
    found = Run(folder)
    assert found.model["step"] == script.total_steps and found.model["best_score"] == found.json["val_score"] == 1e9
    assert_same_content(found.model["best_model"], zeros)
    assert found.json["offline"]["best_step"] == 77
    agent = script.make_agent(script.module, model)
    agent.load_state_dict(zeros)
    constant = agent.act(torch.zeros(1, len(zeros["obs_mean"])), None).numpy()
    task = Task(market_meta(script.env_id))
    if script.discrete:  # the first action that is allowed
        expected = task.run("val", lambda obs, mask, *_: mask.argmax(axis=1))
    else:
        expected = task.run("val", lambda obs, *_: np.repeat(constant, len(obs), axis=0))
    ledger_of_val = found.ledger[found.ledger["split"] == "val"].reset_index(drop=True)
    assert_same_ledger(ledger_of_val, expected.reset_index(drop=True))


def test_patience_stops_and_stays_stopped(script, inside, tmp_path, capsys):
    """Networks that do not move: the second score is no better than the first, nor the third."""
    data = toy(tmp_path / "toy" / "dataset.hdf5", script.discrete)
    still = ["--learning-rate", "0", "--patience", "2"]
    still += {"cql_portfolio": ["--actor-learning-rate", "0"], "iql_portfolio": ["--no-norm-adv"]}.get(script.name, [])
    folder = Path(inside("--dataset", str(data), *SMALL, "--gradient-steps", "900", *still)["run_dir"])
    assert "stopped early" in capsys.readouterr().out
    steps = [event.step for event in scalars(folder).Scalars("charts/SPS")]
    # values of actions drawn anew are noise: only the critics' held-out loss on continuous actions can get better by chance
    if (script.name, script.discrete) == ("cql_portfolio", False):
        assert steps == list(range(20, len(steps) * 20 + 1, 20)) and len(steps) < 45
    else:
        assert steps == [20, 40, 60]
    run = Run(folder)
    assert run.json["status"] == "finished" and run.model["step"] == 900
    assert run.json["offline"]["best_step"] == steps[-3]
    inside("--resume", str(folder))
    assert [event.step for event in scalars(folder).Scalars("charts/SPS")] == steps
    assert_same_content(Run(folder).model, run.model)


# --- data


def test_held_out_episodes_are_never_learned_from(script, inside, tmp_path):
    """Other actions, rewards and returns in them change what is measured on them, and not a bit of the model."""
    first = toy(tmp_path / "one" / "dataset.hdf5", script.discrete)
    _, held_out = Dataset(first).split_episodes(0.1, seed=3)
    second = toy(tmp_path / "two" / "dataset.hdf5", script.discrete, spoil=held_out)
    third = toy(tmp_path / "three" / "dataset.hdf5", script.discrete, spoil=[e for e in range(4) if e not in held_out])
    own = ["--calql"] if script.name == "cql_portfolio" else []
    runs = [Run(inside("--dataset", str(path), *SMALL, "--seed", "3", *own)["run_dir"]) for path in (first, second, third)]
    assert len(held_out) == 4
    assert_same_content(runs[1].model["model"], runs[0].model["model"])
    assert_same_content(runs[1].model["optimizer"], runs[0].model["optimizer"])
    assert runs[1].json["offline"]["held_out"] != runs[0].json["offline"]["held_out"]
    weights = runs[0].model["model"]
    assert any(not torch.equal(runs[2].model["model"][name], value) for name, value in weights.items())


@some(ONE_EACH)
def test_data_larger_than_memory_are_streamed(script, inside, keep_checkpoints, tmp_path, monkeypatch):
    """Trains, and goes on after a kill with the same batches."""
    data = write_foreign(tmp_path / "large" / "data.hdf5", script.discrete, rows=30_000)
    options = ["--dataset", str(data), *SMALL, "--gradient-steps", "30", "--validation-fraction", "0.03"]
    row = 20 if script.name == "bc_portfolio" else 40  # bytes
    options += ["--memory-mb", f"{24_000 * row / 2**20}"]
    streamed, stream = [], Dataset._streamed
    monkeypatch.setattr(Dataset, "_streamed", lambda *args: streamed.append(args) or stream(*args))
    whole = Run(keep_checkpoints(tmp_path / "kept", *options)["run_dir"])
    shutil.copytree(whole.folder, copy := tmp_path / "copy")
    shutil.copy(tmp_path / "kept" / "1.pt", copy / "model.pt")
    inside("--resume", str(copy))
    assert len(streamed) == 2
    assert_same_content(Run(copy).model, whole.model)


@some(ONE_EACH)
def test_other_data_are_no_way_to_go_on(script, inside, tmp_path):
    folder = tmp_path / "toy"
    data = str(toy(folder / "dataset.hdf5", script.discrete))
    run_dir = inside("--dataset", data, *SMALL)["run_dir"]
    shutil.rmtree(folder)
    toy(folder / "dataset.hdf5", script.discrete, spoil=[0])
    with pytest.raises(SystemExit) as caught:
        inside("--resume", str(run_dir))
    assert all(word in caught.value.code for word in ("--resume", str(run_dir), data, "has changed", "sha256"))


@some([name for name, case in CASES.items() if case.online and case.discrete])
def test_data_without_masks_can_be_fine_tuned_where_there_are_some(script, short, datasets, inside, tmp_path):
    folder = shutil.copytree(datasets / script.env_id, tmp_path / "copy")
    path, entries = folder / "dataset.hdf5", json.loads((folder / "dataset_meta.json").read_text())
    with h5py.File(path, "a") as file:
        for key in ("infos/action_mask", "infos/next_action_mask"):
            del file[key], entries["shapes"][key], entries["dtypes"][key]
    edit_meta(path, **entries | {"sha256": sha256_of(path)})
    run = inside(*short, "--dataset", str(path), "--gradient-steps", "5")["run"]
    assert run["status"] == "finished" and run["env_steps"] == 8 * MARKET_STEPS


@some(ONE_EACH)
def test_a_changed_panel_is_refused(script, datasets, complaint, tmp_path):
    folder = shutil.copytree(datasets / script.env_id, tmp_path / "copy")
    task = market_meta(script.env_id, seed=2)
    edit_meta(folder / "dataset.hdf5", task=task)
    line = complaint("--dataset", str(folder / "dataset.hdf5"), *SMALL)
    sha256 = [make_panel(script.market, seed=seed).sha256 for seed in (1, 2)]
    assert all(word in line for word in (script.market, *sha256)), line
    edit_meta(folder / "dataset.hdf5", task=task | {"market": "gone/prices.csv"})
    assert "gone/prices.csv" in complaint("--dataset", str(folder / "dataset.hdf5"), *SMALL)
    edit_meta(folder / "dataset.hdf5", task={"env_id": script.env_id})
    assert "task" in complaint("--dataset", str(folder / "dataset.hdf5"), *SMALL)


@some(ONE_EACH)
def test_other_test_histories_change_nothing_in_training(script, base, short, datasets, inside, tmp_path, monkeypatch):
    """A third test history, drawn from a seed of its own: not a bit of the model knows of it; and it is read last of all."""
    run, order = Task.run, []
    monkeypatch.setattr(Task, "run", lambda task, split, policy: order.append(split) or run(task, split, policy))
    folder = shutil.copytree(datasets / script.env_id, tmp_path / "copy")
    meta = market_meta(script.env_id, market=script.market.replace("test=2", "test=3"))
    edit_meta(folder / "dataset.hdf5", task=meta, panel_sha256=Task(meta).panel.sha256)
    other = Run(inside(*short, "--dataset", str(folder / "dataset.hdf5"))["run_dir"])
    for key in ("model", "best_model", "best_score", "optimizer", "rng"):
        assert_same_content(other.model[key], base.model[key], key)
    assert order == ["val"] * (script.total_steps // 40) + ["test", "train", "val", "test"]
    assert set(other.ledger["market"]) == {0, 1, 2}
    assert other.json["scores"]["test"]["agent"]["growth"] != base.json["scores"]["test"]["agent"]["growth"]


def test_a_file_from_elsewhere_trains(script, inside, tmp_path):
    """Without meta, and without a task: held-out episodes are all there is to choose a model by."""
    data = write_foreign(tmp_path / "data.hdf5", script.discrete)
    run = Run(inside("--dataset", str(data), *SMALL)["run_dir"])
    assert run.json["status"] == "finished" and run.json["env_id"] is None and "scores" not in run.json
    assert run.json["val_score"] == pytest.approx(max(
        -event.value for event in scalars(run.folder).Scalars(f"eval/held_out_{script.held_out[0]}")
    ), rel=1e-5)  # fmt: skip
    assert not list(run.folder.glob("*.parquet"))


@pytest.mark.parametrize("foreign", [False, True])
def test_on_gymnasium_ids_episodes_are_played(script, foreign, inside, tmp_path):
    """The data's own id, or, where they name none, that of --env-id."""
    env_id = "CartPole-v1" if script.discrete else "Pendulum-v1"
    data = tmp_path / "data" / "dataset.hdf5"
    log_gymnasium(data, env_id, 16)
    if foreign:
        data.with_name("dataset_meta.json").unlink()
    run = Run(inside("--dataset", str(data), *SMALL, "--eval-episodes", "3", *(["--env-id", env_id] * foreign))["run_dir"])
    assert run.json["env_id"] == env_id and set(run.json["eval_return"]) == {"last", "best"}
    low, high = (1, 500) if script.discrete else (-2000, 0)
    assert all(low <= value <= high for value in run.json["eval_return"].values())


# --- what goes wrong


@some(ONE_EACH)
@pytest.mark.parametrize(
    "options, words",
    [
        (["--dataset", "nowhere/data.hdf5"], ("nowhere/data.hdf5", "expected an HDF5 file")),
        (["--batch-size", "0"], ("--batch-size 0", "at least 1")),
        (["--gradient-steps", "0"], ("--gradient-steps 0", "at least 1")),
        (["--eval-every", "0"], ("--eval-every 0", "at least 1")),
        (["--checkpoint-every", "-1"], ("--checkpoint-every -1", "at least 1")),
        (["--eval-episodes", "0"], ("--eval-episodes 0", "at least 1")),
        (["--hidden", "0"], ("--hidden 0", "at least 1")),
        (["--validation-fraction", "1"], ("fraction=1", r"\(0, 1\)")),
        (["--memory-mb", "0.01"], ("memory_mb=0.01", "at least")),
        (["--learning-rate", "-1"], ("--learning-rate -1", "0 or more")),
        (["--patience", "-1"], ("--patience -1", "0 or more")),
        (["--max-grad-norm", "0"], ("--max-grad-norm 0", "above 0")),
        (["--learning-rate", "fast"], ("--learning-rate", "fast")),
        (["--learning-rte", "1"], ("--learning-rte",)),
    ],
)
def test_bad_input_is_named(script, complaint, tmp_path, options, words):
    line = complaint("--dataset", str(toy(tmp_path / "dataset.hdf5", script.discrete, episodes=3)), *SMALL, *options)
    assert all(re.search(word, line) for word in words), line


@some([name for name in ONE_EACH if CASES[name].online])
@pytest.mark.parametrize(
    "options, words",
    [
        (["--finetune-envs", "0"], ("--finetune-envs 0", "at least 1")),
        (["--finetune-updates", "0"], ("--finetune-updates 0", "at least 1")),
        (["--finetune-steps", "-5"], ("--finetune-steps -5", "0 or more")),
        (["--explore-drawdown", "0"], ("--explore-drawdown 0", "above 0")),
        (["--gamma", "1.5"], ("--gamma 1.5", "0 to 1")),
    ],
)
def test_bad_online_input_is_named(script, complaint, tmp_path, options, words):
    line = complaint("--dataset", str(toy(tmp_path / "dataset.hdf5", script.discrete, episodes=3)), *SMALL, *options)
    assert all(re.search(word, line) for word in words), line


@some(ONE_EACH)
def test_bad_data_are_named(script, complaint, tmp_path):
    def refused(path, *options):
        line = complaint("--dataset", str(path), *SMALL, *options)
        assert options or str(path) in line, line
        return line

    data = toy(tmp_path / "toy" / "dataset.hdf5", script.discrete)
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert "sha256" in refused(data)
    data.with_name("dataset_meta.json").unlink()
    assert "truncated or corrupted" in refused(data)
    data.write_text("observations,actions\n")
    assert "expected an HDF5 file" in refused(data)
    short_of_rows = write_foreign(tmp_path / "rows.hdf5", script.discrete, rewards=np.zeros(7))
    assert "rewards: (7,) rows" in refused(short_of_rows)
    other_env = "Pendulum-v1" if script.discrete else "CartPole-v1"
    foreign = write_foreign(tmp_path / "data.hdf5", script.discrete)
    assert "actions" in refused(foreign, "--env-id", other_env)
    assert "NoSuch" in refused(foreign, "--env-id", "NoSuch-v0")
    if script.online:
        assert "--finetune-steps" in refused(foreign, "--finetune-steps", "100")


def test_divergence_stops_cleanly(script, inside, tmp_path):
    data = toy(tmp_path / "toy" / "dataset.hdf5", script.discrete)
    options = ["--dataset", str(data), *SMALL, "--learning-rate", "1e20", "--max-grad-norm", "1e9"]
    with pytest.raises(SystemExit) as caught:
        inside(*options)
    (folder,) = (tmp_path / "runs").iterdir()
    run, line = json.loads((folder / "run.json").read_text()), caught.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1
    assert run["status"] == "failed" and run["failure"] in line and str(folder) in line
    assert re.search(r"diverged by step \d+: .*(loss|nll|weight|bias|log_std|Q)", run["failure"])
    assert not (folder / "ledger.parquet").exists() and "scores" not in run
    if (folder / "model.pt").exists():
        model = torch.load(folder / "model.pt", weights_only=True)
        assert model["step"] < 20


@some(ONE_EACH)
def test_help_lists_and_explains_every_flag(script, unexplained):
    names = dataclasses.asdict(script.module.Args())
    assert len(names) > 20
    assert unexplained(names) == set()


# --- what is learned


@some([name for name, case in CASES.items() if case.discrete])
def test_the_best_policy_of_a_chain_is_found_where_cloning_goes_the_wrong_way(script, inside, tmp_path):
    """Right everywhere is best, by gamma^(steps to go - 1); most of the data go left."""
    data, seen = chain(tmp_path / "chain" / "dataset.hdf5"), torch.eye(5)
    options = ["--dataset", str(data), "--batch-size", "128", "--hidden", "32", "--learning-rate", "3e-3"]
    own = {
        "bc_portfolio": [],
        "iql_portfolio": ["--expectile", "0.95", "--beta", "40", "--tau", "0.05", "--reward-scale", "1"],
        "cql_portfolio": ["--alpha", "0.02", "--tau", "0.05", "--reward-scale", "1"],
    }[script.name]
    agent = inside(*options, *own, "--gradient-steps", "900")["agent"]
    if script.name == "bc_portfolio":
        assert agent.act(seen, None).tolist() == [0] * 5
        return
    assert agent.act(seen, None).tolist() == [1] * 5
    x, optimum = agent.norm(seen), 0.9 ** np.arange(4, -1, -1)
    value = agent.value(x)[0, :, 0] if script.name == "iql_portfolio" else agent.target(x).amin(dim=0)[:, 1]
    np.testing.assert_allclose(value.detach(), optimum, atol=0.12)


# --- online, after the data


@some([name for name, case in CASES.items() if case.online])
def test_what_was_lived_through_online_is_remembered_as_it_was(script, inside, register, tmp_path, monkeypatch):
    """Episodes of the Toy, market by market: true successors, terminal states or not, sums of rewards; and what is learned
    from is one half of them, out of all so far, and one half data."""
    space = gym.spaces.Discrete(3) if script.discrete else gym.spaces.Box(-1, 1, (2,), np.float32)
    register(Toy, space)
    log_gymnasium(data := tmp_path / "toy" / "dataset.hdf5", "Toy-v0", 60)
    drawn, halves, randint, cat = [], set(), torch.randint, torch.cat

    def noted_cat(tensors, *args, **kwargs):
        if len(tensors) == 2 and 16 in {len(x) for x in tensors}:
            halves.add(tuple(map(len, tensors)))
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "randint", lambda high, size: drawn.append((high, size)) or randint(high, size))
    monkeypatch.setattr(torch, "cat", noted_cat)
    calql = ["--calql"] if script.name == "cql_portfolio" else []
    options = ["--batch-size", "33", "--hidden", "16", "--gradient-steps", "5", "--finetune-steps", "119"]
    g = inside("--dataset", str(data), *options, "--finetune-envs", "6", "--finetune-updates", "3", *calql)
    assert (16, 17) in halves and drawn == [(6 * (n // 3 + 1), (17,)) for n in range(60)]
    assert g["step"] == 65 and g["filled"] == 120 == len(g["buffer"]["rewards"])

    sums = []
    for market in range(6):
        rows = {key: value[market::6].numpy() for key, value in g["buffer"].items()}
        obs, successor, terminal = (rows[key] for key in ("observations", "next_observations", "terminals"))
        actions = rows["actions"] if script.discrete else rows["actions"].sum(axis=1)
        time = np.rint(3 * obs[:, 0]).astype(int)
        episode = np.cumsum(time == 0) - 1
        over = time + 1 == 3 + episode % 3
        np.testing.assert_allclose(3 * successor, np.stack([time + 1, episode % 4, actions - 1], axis=1), atol=1e-5)
        assert (successor[:-1] == obs[1:])[~over[:-1]].all() and (terminal == (over & (episode % 2 == 0))).all()
        np.testing.assert_allclose(rows["rewards"], actions - 0.3 * (time + 1), atol=1e-5)
        for e in range(episode[-1] + 1):
            rewards = rows["rewards"][episode == e].astype(float)
            ended = over[episode == e].any()
            sums += [(np.flatnonzero(episode == e)[-1], rewards.sum())] if ended else []
            if calql:  # none before the episode is over
                returns = [
                    sum(0.9**k * r for k, r in enumerate(rewards[t:])) if ended else -np.inf for t in range(len(rewards))
                ]
                np.testing.assert_allclose(rows["infos/mc_return"][episode == e], returns, rtol=1e-5)
    sums = [value for _, value in sorted(sums, key=lambda known: known[0])]
    assert sorted(g["recent_returns"]) == pytest.approx(sorted(sums[-100:]), abs=1e-4)


@some([name for name, case in CASES.items() if case.online and case.discrete])
def test_exploration_shrinks_with_the_drawdown_and_masks_are_respected(script, short, inside):
    g = inside(*short, "--gradient-steps", "5", "--explore-drawdown", "0.01")
    rows = {key: value.view(MARKET_STEPS, 8, *value.shape[1:]).numpy() for key, value in g["buffer"].items()}
    allowed = np.take_along_axis(rows["infos/action_mask"], rows["actions"][..., None], axis=2)
    assert allowed.all() and not rows["infos/action_mask"].all()
    successor, following = rows["next_observations"][:-1], rows["observations"][1:]
    ended = (successor != following).any(axis=2)
    assert (ended == (np.arange(1, 20) % 7 == 0)[:, None]).all()
    assert (rows["infos/next_action_mask"][:-1] == rows["infos/action_mask"][1:])[~ended].all()
    # rewards are log growth; at the last step, the 20th, accounts are those of 6 steps since the 14th ended all episodes
    equity = np.exp(np.concatenate([np.zeros((1, 8)), rows["rewards"][14:].astype(float).cumsum(axis=0)]))
    drawdown = 1 - equity / np.maximum.accumulate(equity)
    expected = (1 - drawdown[-2] / 0.01).clip(0, 1)
    np.testing.assert_allclose(g["explore"], expected, atol=2e-4)
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(g["equity"], equity[-1], rtol=1e-5)


@some([name for name, case in CASES.items() if case.online])
def test_exploration_is_none_where_it_is_nought(script, inside, tmp_path):
    data = toy(tmp_path / "toy" / "dataset.hdf5", script.discrete)
    agent = inside("--dataset", str(data), *SMALL)["agent"]
    shake(agent)
    obs, mask = torch.randn(3000, 3), None
    if script.discrete:
        mask = torch.ones(3000, 3, dtype=bool)
        mask[:, 1] = False
    calm, wild = (agent.act(obs, mask, torch.full((3000,), size)) for size in (0.0, 1.0))
    greedy = agent.act(obs, mask)
    assert torch.equal(calm, greedy) and not torch.equal(wild, greedy)
    changed = (wild != greedy).float().mean()
    if not script.discrete:
        assert changed > 0.9 and (wild.abs() <= 1).all()
        half = agent.act(obs, mask, torch.full((3000,), 0.5))
        assert (half - greedy).abs().mean() < (wild - greedy).abs().mean()
    else:
        assert (wild != 1).all()
        # IQL draws from its policy, CQL one action in ten from the two that are allowed
        acts = agent.steady if script.name == "iql_portfolio" else True
        likely = agent.policy(agent.norm(obs), mask, acts).detach().exp().amax(dim=1)
        expected = (1 - likely).mean().item() if script.name == "iql_portfolio" else 0.1 / 2
        assert changed.item() == pytest.approx(expected, abs=0.03)


def test_layers_are_initialised_by_their_place(script):
    """Also where the output is as wide as the hidden layers."""
    mlp = script.module.MLP(5, 32, 32, std=0.01)
    scales = [torch.linalg.svdvals(weight).max().item() for weight in mlp.weights]
    np.testing.assert_allclose(scales, [2**0.5, 2**0.5, 0.01], rtol=1e-4)


def test_what_never_varied_says_nothing(script, inside, tmp_path):
    """A column that is constant in the data has weight 0 whatever it becomes; constant actions leave a range around them."""
    rows = {"observations": np.random.default_rng(0).normal(size=(400, 3)), "rewards": np.ones(400), "terminals": np.zeros(400)}
    rows["observations"][:, 1] = 7.0
    rows["actions"] = np.ones(400, int) if script.discrete else np.full((400, 2), 50.0)
    rows["timeouts"] = (np.arange(400) % 10 == 9).astype(float)
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in rows.items():
            file[key] = values.astype(np.int64 if values.dtype.kind == "i" else np.float32)
    g = inside("--dataset", str(path), *SMALL, "--gradient-steps", "40")
    agent, run = g["agent"], g["run"]
    assert agent.norm(torch.tensor([[0.0, -9.0, 0.0]]))[0, 1] == 0.0 and run["status"] == "finished"
    assert any("timed out" in note or "next_observations" in note for note in run["offline"]["inferred"])
    if not script.discrete:
        assert (agent.high > agent.low).all() and torch.isfinite(agent.scale(torch.full((1, 2), 50.0))).all()
    if script.online:  # rewards that do not vary are scaled by their size
        assert g["reward_scale"] == pytest.approx(1.0)


@some([name for name, case in CASES.items() if case.online])
def test_patience_begins_anew_online(script, inside, datasets, few_resamples):
    """With networks that do not move no validation is better than the first; two of them online end the run."""
    still = ["--learning-rate", "1e-30", *(["--actor-learning-rate", "1e-30"] if script.name == "cql_portfolio" else [])]
    folder = Path(inside(*script.options(datasets), *still, "--eval-every", "10", "--patience", "2")["run_dir"])
    steps = [event.step for event in scalars(folder).Scalars("charts/SPS")]
    assert steps[-1] == GRADIENT_STEPS + 20 < script.total_steps


@some([name for name, case in CASES.items() if case.online])
@pytest.mark.parametrize(
    "flag, value", [("--tau", "0"), ("--actor-tau", "1.5"), ("--reward-scale", "0"), ("--reward-scale", "-1")]
)
def test_flags_out_of_range_are_named(script, complaint, datasets, flag, value):
    line = complaint(*script.options(datasets), flag, value)
    assert flag in line and value in line and "expected" in line


def test_a_checkpoint_between_two_validations_is_finite(script, inside, tmp_path):
    data = toy(tmp_path / "toy" / "dataset.hdf5", script.discrete)
    options = ["--gradient-steps", "40", "--eval-every", "40", "--checkpoint-every", "1", "--learning-rate", "1e30"]
    options += ["--actor-learning-rate", "1e30"] if script.name == "cql_portfolio" else []
    with pytest.raises(SystemExit, match="diverged by step 40"):
        inside("--dataset", str(data), *SMALL, *options, "--max-grad-norm", "1e30")
    for path in (tmp_path / "runs").glob("*/model.pt"):
        weights = torch.load(path, weights_only=True)["model"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_an_id_beside_a_market_is_refused(script, complaint, datasets):
    """Not ignored: it is of the market's kind of actions, or of another; either way not where the data come from."""
    other = "LeadLag-v0" if script.discrete else "Portfolio-v0"
    other = other if other != script.env_id else ("CartPole-v1" if script.discrete else "Pendulum-v1")
    assert "expected" in complaint(*script.options(datasets), "--env-id", other)
