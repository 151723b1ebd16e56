"""What every script in algos/ must satisfy: what it leaves behind, that it can be repeated, killed and resumed, and PPO's
arithmetic on the script's own variables. What is one script's own is in test_<script>.py."""

import dataclasses
import hashlib
import inspect
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
from conftest import ROOT, assert_same_bits
from scripts import (
    ITERATIONS,
    SCRIPTS,
    Bandit,
    Run,
    Toy,
    actions_of,
    assert_same_content,
    assert_same_ledger,
    assert_same_run,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs import ledger, portfolio_references, references
from envs.costs import RECORD
from envs.synthetic import make_panel

pytest_plugins = ["scripts"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def nested_fields(script) -> dict:
    """All arguments of a script, by group."""
    return dataclasses.asdict(script.module.Args())


# --- what a run leaves behind


def test_run_json_says_everything(script, base):
    run, args, expected = base.json, base.json["args"], nested_fields(script)
    assert (run["status"], run["failure"], run["env_id"], run["trials"]) == ("finished", None, script.env_id, 1)
    assert set(args) == set(expected)
    given = {"seed": 1, "market": script.market, "num_envs": 64, "num_steps": 16, "total_timesteps": 20480, "eval_every": 5}
    assert {key: args[key] for key in given} == given
    for group, values in script.given.items():
        assert set(args[group]) == set(expected[group])
        assert {key: args[group][key] for key in values} == values
    assert run["script"] == script.path.name and run["device"] == "cpu" and run["python"] and run["platform"]
    assert run["script_sha256"] == hashlib.sha256(script.path.read_bytes()).hexdigest()
    assert "git_commit" in run and {"torch", "numpy", "numba", "gymnasium"} <= set(run["packages"])

    panel = make_panel(script.market, seed=1)
    assert run["panel"] == json.loads(json.dumps(ledger.describe_panel(panel, panel.split())))
    assert set(run["panel"]["splits"]) == {"train", "val", "test"}
    assert all({"start", "end", "bars"} == set(split) for split in run["panel"]["splits"].values())
    assert run["market"]["fill"] == "next_open" and run["market"]["costs"] == dataclasses.asdict(script.loaded_costs)

    assert run["env_steps"] == 20480 and run["sps"] > 0 and 0 < run["train_seconds"] <= run["wall_clock"]
    assert np.isfinite([run[f"val_{script.score}"], run["last_100_returns"]]).all()
    assert set(run["scores"]) == {"train", "val", "test"}
    assert list(run["scores"]["test"]) == ["agent", *script.others]
    for split in ("train", "val"):
        assert set(run["scores"][split]) == {"agent"}
    fields = {"growth", "sharpe", "gross_sharpe", "max_drawdown", "turnover", "cost", "bars"}
    for split, name in [("val", "agent"), ("train", "agent"), *(("test", name) for name in run["scores"]["test"])]:
        score, extra = run["scores"][split][name], {"sharpe_low", "sharpe_high"} if split == "test" else set()
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
            assert len(market) > 0.75 * rows.shape[1]  # the first bars of a history only warm the features up
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
    assert {"model", "best_model", "optimizer", "rng", "envs", "obs"} <= set(model)
    agent = script.make_agent(script.module, model)
    agent.load_state_dict(model["model"])
    assert float(agent.norm.count) == pytest.approx(20480, abs=1e-3) and (agent.norm.var >= 0).all()
    assert len(model["optimizer"]["state"]) == len(list(agent.parameters()))


def test_tensorboard_has_cleanrls_tags(script, base):
    events, val = EventAccumulator(str(base.folder)), f"eval/val_{script.score}"
    events.Reload()
    tags = set(events.Tags()["scalars"])
    losses = {f"losses/{x}" for x in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")}
    assert {"charts/episodic_return", "charts/SPS", "charts/learning_rate", val} | losses <= tags
    for tag, steps in (("charts/SPS", range(1, 21)), ("losses/entropy", range(1, 21)), (val, (5, 10, 15, 20))):
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
        assert row and all(
            text in row[0]
            for text in (
                f"{score['sharpe']:.2f}", f"[{score['sharpe_low']:.2f}, {score['sharpe_high']:.2f}]", f"{score['growth']:.1%}",
                f"{score['max_drawdown']:.1%}", f"{score['turnover']:.0f}x", f"{score['cost']:.1%}",
            )
        ), name  # fmt: skip
    assert str(base.folder) in out


# --- the same bits


def test_the_same_seed_gives_the_same_bits_and_another_does_not(script, base, inside):
    """In this process, after whatever ran here before, as in a fresh one."""
    assert_same_run(Run(inside(*script.short)["run_dir"]), base)
    other = Run(inside(*script.short, "--seed", "2")["run_dir"])
    assert other.json["panel"]["sha256"] != base.json["panel"]["sha256"]
    assert not torch.equal(other.model["model"]["actor.0.weight"], base.model["model"]["actor.0.weight"])
    assert not torch.equal(other.model["rng"], base.model["rng"])


def test_the_same_seed_gives_the_same_bits_on_two_threads(script, inside):
    options = [*script.short, "--total-timesteps", "5120"]
    first, second = (Run(inside(*options, num_threads=2)["run_dir"]) for _ in range(2))
    assert first.json["args"]["num_threads"] == 2 and first.folder != second.folder
    assert_same_run(first, second)


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

    inside("--resume", str(folder), "--seed", "9", "--num-steps", "8")
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
    assert not actions_of(found.ledger).any()  # zero weights: the first action that is allowed, or no trade


# --- the test split


def test_the_model_is_chosen_on_validation_and_the_test_split_read_once(script, inside, monkeypatch):
    """And the agent that is evaluated does not change: its statistics of observations stay those of training."""
    read, backtests = [], []
    for module in (references, portfolio_references):

        def spy(*args, _run=module.run, **kwargs):
            given = inspect.signature(_run).bind(*args, **kwargs).arguments
            if given["policy"].__name__ != "agent_policy":
                return _run(*args, **kwargs)
            read.append(given["split"].name)
            agent = given["policy"].__globals__["agent"]
            before = {key: value.clone() for key, value in agent.state_dict().items()}
            frame = _run(*args, **kwargs)
            assert_same_content(dict(agent.state_dict()), before, "agent")
            backtests.append((agent.training, frame, before))
            return frame

        monkeypatch.setattr(module, "run", spy)
    g = inside(*script.short)
    guarded = ["test"] if "without guard" in script.others else []  # once with, once without
    assert read == ["val"] * 4 + ["train", "val", "test", *guarded]
    *tried, (_, chosen, reported) = backtests[:6]
    val = [frame for _, frame, _ in tried[:4]]
    assert_same_content(reported, dict(g["agent"].state_dict()))
    scores = np.array([score_of(script, g, frame) for frame in val])
    best = int(scores.argmax())
    assert scores[best] == g["run"][f"val_{script.score}"] and len(set(scores)) > 1
    assert_same_content(tried[best][2], reported)  # the weights and statistics that had the best score
    assert_same_ledger(chosen, val[best])


def score_of(script, g, frame) -> float:
    years = g["panel"].bars_per_year
    if script.score == "growth":
        return float(ledger.growth(frame).mean() * years)
    return portfolio_references.utility(frame, 1 + 2 * g["args"].penalty_variance, years)


def test_other_test_markets_change_nothing_in_training(script, base, inside):
    """A third test history, drawn from a seed of its own: not a bit of the model knows of it."""
    other = Run(inside(*script.short, "--market", script.market.replace("test=2", "test=3"))["run_dir"])
    found, expected = other.model, base.model
    for key in ("model", "best_model", "best_score", "optimizer", "rng"):
        assert_same_content(found[key], expected[key], key)
    assert set(other.ledger["market"]) == {0, 1, 2}
    assert other.json["scores"]["test"]["agent"]["growth"] != base.json["scores"]["test"]["agent"]["growth"]


# --- what goes wrong


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
        (["--num-envs", "0"], ("--num-envs 0", "at least 1")),
        (["--num-minibatches", "1025"], ("--num-minibatches 1025", "1024")),
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


def test_actions_of_the_wrong_kind_are_refused(script, complaint):
    env_id, expected = script.refused
    line = complaint("--env-id", env_id, "--total-timesteps", "512")
    assert f"--env-id {env_id}" in line and f"expected {expected} actions" in line


def test_divergence_stops_cleanly(script, inside, tmp_path):
    with pytest.raises(SystemExit) as caught:
        inside(*script.short, "--learning-rate", "1e20", "--no-anneal-lr", "--max-grad-norm", "1e9")
    (folder,) = (tmp_path / "runs").iterdir()
    run, line = json.loads((folder / "run.json").read_text()), caught.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1
    assert run["status"] == "failed" and run["failure"] in line and str(folder) in line
    assert re.search(r"iteration \d+\b.*(loss|kl|weight|bias|log_std)", run["failure"])
    assert not (folder / "ledger.parquet").exists() and "scores" not in run
    if (folder / "model.pt").exists():
        model = torch.load(folder / "model.pt", weights_only=True)
        assert all(torch.isfinite(v).all() for v in model["model"].values())


def test_help_lists_and_explains_every_flag(script, inside, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as caught:
        inside("--help")
    assert caught.value.code == 0
    entries = {}
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│ ")
        if start := re.match(r"(?:-h, )?--([a-z-]+)", text):
            entries[flag := start[1]] = ""
        if entries:
            entries[flag] += f" {text}"
    arguments = nested_fields(script)
    names = {name for group in arguments.values() if isinstance(group, dict) for name in group}
    names |= {name for name, value in arguments.items() if not isinstance(value, dict)}
    assert len(names) > 50
    unexplained = set()
    for name in names:
        told, default, _ = entries[name.replace("_", "-")].rpartition("(default:")
        words = re.findall(r"(?<![-\w])[a-z]{2,}", re.sub(r"--[\w-]+|\{.*?\}|\[.*?\]", "", told))
        if not default or len(words) < 2:
            unexplained.add(name)
    assert unexplained == set(script.unexplained)


# --- other environments


def test_any_gymnasium_id_and_no_resume_of_it(script, inside, tmp_path, capsys):
    env_id, low, high = script.classic
    g = inside("--env-id", env_id, "--total-timesteps", "4096")
    run, printed = Run(g["run_dir"]).json, capsys.readouterr().out
    assert re.fullmatch(rf"{env_id}__{script.name}__1__\d+", g["run_dir"].name)
    assert run["status"] == "finished" and run["env_steps"] == 4096 and run["args"]["num_envs"] == 4
    assert run["args"] == json.loads(json.dumps(dataclasses.asdict(g["args"])))
    for name, value in script.module.CLASSIC_CONTROL.items():
        assert run["args"][name] == {"total_timesteps": 4096}.get(name, value), name
    returns = [run[key] for key in ("last_100_returns", "eval_return") if run.get(key) is not None]
    assert returns and all(low < r < high and f"{r:.4g}" in printed for r in returns)
    assert not {"scores", "panel", "market"} & set(run) and not (g["run_dir"] / "ledger.parquet").exists()
    assert run[f"val_{script.score}"] is None
    with pytest.raises(SystemExit, match=f"--resume.*{env_id}.*{script.env_id}"):
        inside("--resume", str(g["run_dir"]))
    assert Run(g["run_dir"]).json == run, "the refused run was changed"


def test_a_budget_too_small_to_finish_an_episode(script, inside):
    g = inside("--env-id", script.classic[0], "--num-steps", "4", "--total-timesteps", "16", "--num-minibatches", "2")
    assert g["run"]["last_100_returns"] is None and g["run"]["status"] == "finished"


# --- the arithmetic of PPO, on the script's own variables


@pytest.fixture(params=["Toy", "market"])
def one_iteration(request, script, inside, register):
    """Variables of the script after one iteration in which no weight moves: all values can be computed again."""
    options = ["--learning-rate", "0", "--gamma", "0.9", "--gae-lambda", "0.8", "--reward-scale", "50", "--seed", "7"]
    if request.param == "Toy":
        options += [*register(Toy, script.toy), *script.toy_options, "--num-envs", "5", "--num-steps", "23"]
        return inside(*options, "--num-minibatches", "1", "--total-timesteps", str(5 * 23))
    options += ["--market", script.market, *script.own, "--num-envs", "20", "--num-steps", "23", "--episode-length", "9"]
    return inside(*options, "--total-timesteps", str(20 * 23))


def test_advantages_equal_the_slow_definition(script, one_iteration):
    """A_t = sum of (gamma lambda)^l delta_{t+l} to the end of the episode; V of an episode's own last observation counts
    where it was cut, and nothing after it terminated. The transitions are stepped again through the public API."""
    g = one_iteration
    args, agent = g["args"], g["agent"]
    norm = type(agent.norm)(g["obs_size"])  # that of the first rollout

    def value(obs):
        with torch.no_grad():
            return agent.value(norm(torch.as_tensor(np.asarray(obs), dtype=torch.float32))).double().numpy()

    env = script.make_envs(g)
    actions, shape = g["actions"].cpu().numpy(), (args.num_steps, args.num_envs)
    if actions.ndim == 3:  # scores are clipped on their way to the market only
        actions = np.clip(actions, env.single_action_space.low, env.single_action_space.high)
    obs, _ = env.reset(seed=args.seed)
    deltas, over, kinds = np.zeros(shape), np.zeros(shape, bool), set()
    for t in range(args.num_steps):
        now = value(obs)
        obs, reward, terminated, truncated, infos = env.step(actions[t])
        following = np.array(obs)
        over[t] = terminated | truncated
        for i in np.flatnonzero(over[t]):
            following[i] = infos["final_obs"][i]
        kinds |= {(bool(a), bool(b)) for a, b in zip(terminated, truncated)}
        deltas[t] = args.reward_scale * reward + args.gamma * value(following) * ~terminated - now
        if t + 1 < args.num_steps:
            assert_same_bits(g["obs"][t + 1].numpy(), np.asarray(obs, np.float32), f"observation {t + 1}")
    assert kinds == ({(0, 0), (0, 1)} if g["is_market"] else {(0, 0), (0, 1), (1, 0)})
    expected = np.zeros_like(deltas)
    for t, i in np.ndindex(deltas.shape):
        factor = 1.0
        for later in range(t, len(deltas)):
            expected[t, i] += factor * deltas[later, i]
            factor *= args.gamma * args.gae_lambda
            if over[later, i]:
                break
    np.testing.assert_allclose(g["advantages"].cpu().numpy(), expected, atol=2e-4, rtol=1e-4)
    spread = np.abs(expected).mean()
    assert spread > 0.01


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_first_minibatch_has_ratio_one(script, inside, iterations):
    """One epoch of one minibatch: new and old log-probabilities are of the same weights, normaliser and actions."""
    twist = [*script.twist, "--update-epochs", "1", "--num-minibatches", "1", "--episode-length", "9"]
    g = inside(*script.short, *twist, "--total-timesteps", str(iterations * 1024))
    losses = g["losses"]
    assert abs(losses["approx_kl"]) < 1e-6 and losses["clipfrac"] == 0.0 and abs(losses["policy_loss"]) < 1e-5
    np.testing.assert_allclose(g["ratio"].detach().cpu().numpy(), 1.0, atol=1e-5)
    assert float(g["agent"].norm.count) == pytest.approx(iterations * 1024, abs=1e-3)
    assert g["agent"].actor[-1].bias.abs().max() > 1e-5  # both have moved


def test_the_clipped_objective_of_the_last_minibatch(script, inside):
    """Several epochs of several minibatches: the loss, of what the script has in its variables, written out term by term."""
    g = inside(
        *script.short, "--update-epochs", "4", "--learning-rate", "0.01", "--no-anneal-lr", "--ent-coef", "0.07",
        "--vf-coef", "0.3", "--clip-coef", "0.05", "--total-timesteps", "1024",
    )  # fmt: skip
    assert len(g["index"]) == 256 and len(set(g["index"].tolist())) == 256
    ratio = g["ratio"].detach().double().numpy()
    assert (ratio > 1.05).any() and (ratio < 0.95).any()
    a = g["advantages"].flatten()[g["index"]].double().numpy()
    a = (a - a.mean()) / a.std(ddof=1)
    policy = -np.where(a > 0, np.minimum(ratio, 1.05), np.maximum(ratio, 0.95)) @ a / 256
    value = 0.5 * np.square(g["new_value"].detach().double().numpy() - g["returns"].flatten()[g["index"]].double().numpy())
    total = policy + 0.3 * value.mean() - 0.07 * float(g["entropy"].detach())
    assert float(g["loss"].detach()) == pytest.approx(total, rel=1e-4)


def test_learns_the_best_arm(script, inside, register):
    """In one state: the sign of the loss, of the entropy bonus, and of the log-density."""
    options = [*register(Bandit, script.toy), "--num-envs", "8", "--num-steps", "256", "--gamma", "0", "--update-epochs", "4"]
    options += ["--num-minibatches", "4", "--learning-rate", "0.003", "--no-anneal-lr", "--total-timesteps", str(10 * 2048)]
    greedy = inside(*options, "--ent-coef", "0")
    bored = inside(*options, "--ent-coef", "100")
    assert bored["losses"]["entropy"] > greedy["losses"]["entropy"] + 0.1
    agent, obs = greedy["agent"], torch.tensor([[0.5, -0.5]])
    with torch.no_grad():
        out = agent.actor(agent.norm(obs))[0].numpy()
    if greedy["actions"].ndim == 2:
        assert out.argmax() == 2
    else:
        assert (out > 0.3).all() and (out < 1).all()  # beyond 0.5 while the policy is wide: its scores are clipped at 1


def test_running_norm_equals_numpy_over_all_batches(script):
    rng = np.random.default_rng(0)
    sizes = (1000, 3, 1, 700, 64, 3000)
    batches = [rng.normal(1e3 * rng.random(5), [0.5, 1, 5, 100, 0.1], (n, 5)).astype(np.float32) for n in sizes]
    norm = script.module.RunningNorm(5)
    for batch in batches:
        norm.update(torch.as_tensor(batch))
    everything = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(norm.mean, everything.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(norm.var, everything.var(axis=0), rtol=1e-3)
    assert float(norm.count) == pytest.approx(len(everything), abs=1e-3)
    x = torch.tensor(everything[:50], dtype=torch.float32)
    mean, var = norm.mean.numpy(), norm.var.numpy()
    expected = np.clip((x.double().numpy() - mean) / np.sqrt(var + 1e-8), -10, 10)
    np.testing.assert_allclose(norm(x).numpy(), expected, atol=3e-3)
    far = norm(torch.tensor([[1e9] * 5, [-1e9] * 5]))
    assert far.tolist() == [[10.0] * 5, [-10.0] * 5] and far.dtype == torch.float32
    assert {"mean", "var", "count"} == set(norm.state_dict())  # saved with the weights
    fresh = script.module.RunningNorm(5)
    torch.testing.assert_close(fresh(x[:, :5] / 1e3), (x / 1e3).clamp(-10, 10))


def test_fast_tanh_is_tanh(script):
    tanh = script.module.FastTanh.apply
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, -0.0, 0.0, 1e-7, 100.0, 1e30])])
    torch.testing.assert_close(tanh(x), torch.tanh(x), atol=1e-6, rtol=0)
    assert tanh(x).abs().max() <= 1 and (tanh(x.double()) - torch.tanh(x.double())).abs().max() < 1e-14
    torch.testing.assert_close(script.module.Tanh()(x), tanh(x))
    inputs = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tanh, inputs)
