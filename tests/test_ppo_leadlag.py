"""algos/ppo_leadlag.py end to end: what it leaves behind, that it can be repeated, killed and resumed, and its arithmetic."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_same_bits, run_python
from scipy.stats import chisquare
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs import ledger
from envs.costs import RECORD, load_costs
from envs.synthetic import make_panel

SCRIPT = ROOT / "algos" / "ppo_leadlag.py"
MARKET = "synthetic:leadlag:bars=400:train=2:val=1:test=2"
LOOKBACKS = ["--max-lookback", "60", "--num-lookbacks", "5"]
SHORT = [
    "--market", MARKET, *LOOKBACKS, "--num-envs", "64", "--num-steps", "16", "--total-timesteps", "20480",
    "--eval-every", "5", "--checkpoint-every", "2", "--num-threads", "1", "--no-cuda",
]  # fmt: skip
ITERATIONS = 20
NAMES = [*(f"lookback {k}" for k in (5, 9, 17, 32, 60)), "best in training", "random", "equal weight"]
ORACLES = ["oracle regime", "oracle returns"]


@dataclasses.dataclass
class Run:
    """A finished process and what it left."""

    done: subprocess.CompletedProcess
    folder: os.PathLike

    def __post_init__(self):
        self.json = json.loads((self.folder / "run.json").read_text())

    @property
    def model(self):
        return torch.load(self.folder / "model.pt", weights_only=True)

    @property
    def ledger(self):
        return pd.read_parquet(self.folder / "ledger.parquet")


def start(*options, runs_dir):
    return run_python(str(SCRIPT), *options, "--runs-dir", str(runs_dir))


def finish(*options, runs_dir) -> Run:
    done = start(*options, runs_dir=runs_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = runs_dir.iterdir()
    return Run(done, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    return finish(*SHORT, runs_dir=tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("ppo_leadlag", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_leadlag"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inside(monkeypatch, tmp_path):
    """Run the script in this process; returns its variables."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def call(*options):
        argv = [str(SCRIPT), *options, "--num-threads", "1", "--no-cuda", "--runs-dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", argv)
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    yield call
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def assert_same_content(found, expected, where="model.pt"):
    """Nested dicts, lists and tensors, bit for bit; not the seconds spent, nor where the run was resumed from."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected.keys() - {"train_seconds", "resume", "runs_dir"}:
            assert_same_content(found[key], expected[key], f"{where}: {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for n, (a, b) in enumerate(zip(found, expected)):
            assert_same_content(a, b, f"{where}: {n}")
    elif isinstance(expected, torch.Tensor):
        assert_same_bits(found.numpy(), expected.numpy(), where)
    else:
        assert found == expected, where


def assert_same_run(found: Run, expected: Run):
    assert_same_content(found.model, expected.model)
    pd.testing.assert_frame_equal(found.ledger, expected.ledger, check_exact=True)
    for key in ("scores", "capture", "val_growth", "last_100_returns", "panel", "market", "env_steps", "status"):
        assert found.json[key] == expected.json[key], key


# --- what a run leaves behind


def test_run_json_says_everything(base, script):
    run, args = base.json, base.json["args"]
    assert (run["status"], run["failure"], run["env_id"], run["trials"]) == ("finished", None, "LeadLag-v0", 1)
    assert set(args) == {f.name for f in dataclasses.fields(script.Args)}
    assert set(args["leadlag"]) == {f.name for f in dataclasses.fields(script.LeadLagConfig)}
    given = {"seed": 1, "market": MARKET, "num_envs": 64, "num_steps": 16, "total_timesteps": 20480, "eval_every": 5}
    assert {key: args[key] for key in given} == given and args["leadlag"]["max_lookback"] == 60
    assert run["script"] == "ppo_leadlag.py" and run["device"] == "cpu" and run["python"] and run["platform"]
    assert run["script_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert "git_commit" in run and {"torch", "numpy", "numba", "gymnasium"} <= set(run["packages"])

    panel = make_panel(MARKET, seed=1)
    assert run["panel"] == json.loads(json.dumps(ledger.describe_panel(panel, panel.split())))
    assert set(run["panel"]["splits"]) == {"train", "val", "test"}
    assert all({"start", "end", "bars"} == set(split) for split in run["panel"]["splits"].values())
    assert run["market"]["fill"] == "next_open" and run["market"]["lookbacks"] == [5, 9, 17, 32, 60]
    assert run["market"]["costs"] == dataclasses.asdict(load_costs("institutional"))

    assert run["env_steps"] == 20480 and run["sps"] > 0 and 0 < run["train_seconds"] <= run["wall_clock"]
    assert np.isfinite([run["val_growth"], run["last_100_returns"]]).all() and run["capture"] is None or run["capture"] < 9
    assert set(run["scores"]) == {"train", "val", "test"}
    assert set(run["scores"]["test"]) == {"agent", *NAMES, *ORACLES}
    for split in ("train", "val"):
        assert set(run["scores"][split]) == {"agent"}
    fields = {"growth", "sharpe", "gross_sharpe", "max_drawdown", "turnover", "cost", "bars"}
    for split, name in [("val", "agent"), ("train", "agent"), *(("test", name) for name in run["scores"]["test"])]:
        score, extra = run["scores"][split][name], {"sharpe_low", "sharpe_high"} if split == "test" else set()
        assert fields | extra <= set(score) and all(np.isfinite(score[key]) for key in fields | extra), name
    assert not list(base.folder.glob("*.part"))


def test_ledger_holds_every_bar_and_every_score(base):
    frame = base.ledger
    assert tuple(frame.columns) == ledger.LEDGER and not frame.isna().any().any()
    panel = make_panel(MARKET, seed=1)
    for split, ranges in (("train", 2), ("val", 1), ("test", 2)):
        part = frame[frame["split"] == split]
        assert set(part["market"]) == set(range(ranges)) and len(part) > 380 * ranges
        scores, again = base.json["scores"][split]["agent"], ledger.summarise(part, panel.bars_per_year)
        numbers = {key: value for key, value in scores.items() if not isinstance(value, str)}
        assert numbers == pytest.approx({key: again[key] for key in numbers}, rel=1e-12)
    assert set(frame["split"]) == {"train", "val", "test"}
    money = frame["gross_return"] + frame["interest"] - frame[list(RECORD[2:8])].sum(axis=1)
    np.testing.assert_allclose(frame["net_return"], money, atol=1e-12)
    assert frame["action"].between(0, 4).all() and frame["action"].nunique() > 1
    # the best score on the validation split is that of the model that is reported
    assert base.json["scores"]["val"]["agent"]["growth"] == pytest.approx(base.json["val_growth"], rel=1e-9)


def test_checkpoint_holds_all_that_is_needed(base, script):
    model = base.model
    assert model["iteration"] == ITERATIONS and model["global_step"] == 20480
    assert set(model["args"]) == {f.name for f in dataclasses.fields(script.Args)}
    assert {"model", "best_model", "optimizer", "rng", "envs", "obs", "mask"} <= set(model)
    agent = script.Agent(model["obs"].shape[1], model["mask"].shape[1])
    agent.load_state_dict(model["model"])
    assert agent.norm.count > 20480 and (agent.norm.var > 0).all()
    assert len(model["optimizer"]["state"]) == len(list(agent.parameters()))


def test_tensorboard_has_cleanrls_tags(base):
    events = EventAccumulator(str(base.folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    losses = {f"losses/{x}" for x in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")}
    assert {"charts/episodic_return", "charts/SPS", "charts/learning_rate", "eval/val_growth"} | losses <= tags
    for tag, steps in (("charts/SPS", range(1, 21)), ("losses/entropy", range(1, 21)), ("eval/val_growth", (5, 10, 15, 20))):
        assert [e.step for e in events.Scalars(tag)] == [1024 * n for n in steps], tag
    rates = [e.value for e in events.Scalars("charts/learning_rate")]
    np.testing.assert_allclose(rates, base.json["args"]["learning_rate"] * (1 - np.arange(20) / 20), rtol=1e-6)
    assert max(e.value for e in events.Scalars("eval/val_growth")) == pytest.approx(base.json["val_growth"], rel=1e-5)
    assert 0 < events.Scalars("losses/entropy")[0].value <= np.log(5) + 1e-6


def test_costs_and_final_table_are_printed(base):
    out = base.done.stdout
    assert MARKET in out and "2000 bars x 10 symbols" in out and "fill next_open" in out
    costs = dataclasses.asdict(load_costs("institutional"))
    assert all(f"{key}={value:g}" in out for key, value in costs.items() if key != "name")
    rows = out[out.index("test split") :]
    for name in ("agent", *NAMES, *ORACLES):
        score = base.json["scores"]["test"][name]
        row = re.search(rf"^{name}  .*$", rows, re.MULTILINE)
        assert row and f"{score['sharpe']:.2f}" in row[0] and f"{score['growth']:.1%}" in row[0], name
    assert str(base.folder) in out


# --- the same bits


def test_the_same_seed_gives_the_same_bits_and_another_does_not(base, tmp_path):
    assert_same_run(finish(*SHORT, runs_dir=tmp_path / "again"), base)
    other = finish(*SHORT, "--seed", "2", runs_dir=tmp_path / "other")
    assert other.json["panel"]["sha256"] != base.json["panel"]["sha256"]
    assert not torch.equal(other.model["model"]["actor.0.weight"], base.model["model"]["actor.0.weight"])
    assert not torch.equal(other.model["rng"], base.model["rng"])


def test_killed_and_resumed_is_never_interrupted(base, tmp_path):
    """kill -9 after some checkpoints; --resume takes the arguments from the run, and ends with the same bits."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    call = [sys.executable, str(SCRIPT), *SHORT, "--runs-dir", str(tmp_path / "runs")]
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

    done = run_python(str(SCRIPT), "--resume", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"after iteration {killed['iteration']}" in done.stdout
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [folder.name]
    resumed = Run(done, folder)
    assert_same_run(resumed, base)
    assert resumed.json["args"] | {"resume": None, "runs_dir": ""} == base.json["args"] | {"runs_dir": ""}


def test_resuming_a_finished_run_reports_it_again(base, inside, tmp_path, capsys):
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    found = inside("--resume", str(folder))
    assert_same_content(torch.load(folder / "model.pt", weights_only=True), base.model)
    assert found["run"]["scores"]["test"]["agent"]["growth"] == base.json["scores"]["test"]["agent"]["growth"]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "ledger.parquet"), base.ledger, check_exact=True)


def test_a_better_model_from_before_the_kill_is_kept(base, inside, tmp_path):
    """A checkpoint two iterations before the end whose best model, by its score, cannot be beaten any more."""
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    model = base.model
    best = {key: torch.zeros_like(value) for key, value in model["best_model"].items()}
    torch.save(model | {"iteration": ITERATIONS - 2, "best_score": 1e9, "best_model": best}, folder / "model.pt")
    inside("--resume", str(folder))
    found = torch.load(folder / "model.pt", weights_only=True)
    assert found["iteration"] == ITERATIONS and found["best_score"] == 1e9
    assert_same_content(found["best_model"], best)
    assert json.loads((folder / "run.json").read_text())["val_growth"] == 1e9
    assert (pd.read_parquet(folder / "ledger.parquet")["action"] == 0).all()  # zero weights: the first that is allowed


# --- what goes wrong


@pytest.fixture
def complaint(inside, capsys):
    """What the user reads last when the script refuses some options: its last line, or tyro's box."""

    def call(*options) -> str:
        with pytest.raises((SystemExit, ValueError, OSError)) as caught:
            inside(*options)
        if caught.type is SystemExit and not isinstance(caught.value.code, str):
            assert caught.value.code == 2
            return " ".join(capsys.readouterr().err.replace("│", " ").split())
        return str(caught.value).splitlines()[-1]

    return call


@pytest.mark.parametrize(
    "options, words",
    [
        (["--market", "no-such-market"], ("market", "no-such-market", "sp500", "synthetic")),
        (["--market", "synthetic:nonsense"], ("--market", "nonsense", "leadlag", "noise")),
        (["--market", "synthetic:leadlag:bras=400"], ("--market", "bras", "bars")),
        (["--folds", "2"], ("segments|walk_forward",)),
        (["--market", "missing/prices.csv"], ("missing/prices.csv", "no such file")),
        (["--market", "sp500", "--symbols", "AAPL", "NOPE"], ("symbols", "NOPE", "AAPL")),
        (["--costs", "free"], ("--costs", "free", "institutional")),
        (["--costs", "retail:comission_bps=2"], ("--costs", "comission_bps", "commission_bps")),
        (["--min-lookback", "450", "--max-lookback", "600", "--num-lookbacks", "3"], ("--min-lookback", "split")),
        (["--min-lookback", "60"], ("min.lookback", "max.lookback", "60")),
        (["--num-lookbacks", "1"], ("num.lookbacks", "at least 2")),
        (["--fill", "yesterday"], ("fill", "yesterday")),
        (["--actions", "any"], ("actions", "any", "absolute")),
    ],
)
def test_bad_input_is_named(complaint, options, words):
    line = complaint(*SHORT, *options)
    assert all(re.search(word, line) for word in words), line


def test_bad_input_fails_the_process(tmp_path):
    done = start(*SHORT, "--costs", "free", runs_dir=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "--costs free" in done.stderr
    assert not list(tmp_path.iterdir()), "a run directory was made for a run that never began"


def test_resume_of_nothing_is_named(complaint, tmp_path):
    line = complaint("--resume", str(tmp_path / "nowhere"))
    assert "--resume" in line and "nowhere" in line, line


def test_divergence_stops_cleanly(tmp_path):
    done = start(*SHORT, "--learning-rate", "1e20", "--no-anneal-lr", "--max-grad-norm", "1e9", runs_dir=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    run, line = json.loads((folder / "run.json").read_text()), done.stderr.splitlines()[-1]
    assert run["status"] == "failed" and run["failure"] in line and str(folder) in line
    assert re.search(r"iteration \d+\b.*(loss|kl|weight|bias)", run["failure"])
    assert not (folder / "ledger.parquet").exists() and "scores" not in run
    if (folder / "model.pt").exists():
        model = torch.load(folder / "model.pt", weights_only=True)
        assert all(torch.isfinite(v).all() for v in model["model"].values())


# --- other markets, actions and environments


def prices(bars=220, symbols=6, seed=0) -> pd.DataFrame:
    """Random walks by day, wide."""
    steps = 0.02 * np.random.default_rng(seed).standard_normal((bars, symbols))
    days = pd.bdate_range("2020-01-01", periods=bars, name="date")
    return pd.DataFrame(50 * np.exp(steps.cumsum(axis=0)), days, [f"C{i}" for i in range(symbols)])


def test_closes_from_a_csv_file_with_delta_actions(tmp_path):
    wide = prices()
    wide.iloc[:40, 2] = np.nan
    wide.to_csv(tmp_path / "closes.csv")
    options = ["--market", str(tmp_path / "closes.csv"), "--max-lookback", "30", "--actions", "delta"]
    run = finish(*SHORT, *options, "--total-timesteps", "4096", runs_dir=tmp_path / "runs")
    assert run.json["market"]["fill"] == "next_close" and run.json["panel"]["symbols"] == list(wide.columns)
    assert run.json["capture"] is None and set(run.json["scores"]["test"]) == {"agent", *run_names(run)}
    frame = run.ledger
    assert frame["action"].between(0, 2).all() and not frame.isna().any().any()
    ends = frame.groupby("split")["timestamp"].agg(["min", "max"])
    assert ends.loc["train", "max"] < ends.loc["val", "min"] < ends.loc["val", "max"] < ends.loc["test", "min"]
    assert ends.loc["test", "max"] == wide.index[-1]


def test_bars_from_a_csv_file_with_hybrid_actions(tmp_path):
    close = prices(seed=1).stack().rename("close").reset_index().rename(columns={"level_1": "symbol", "date": "timestamp"})
    change = np.random.default_rng(2).uniform(0.99, 1.01, len(close))
    bars = close.assign(open=close["close"] * change)
    bars["high"], bars["low"] = bars[["open", "close"]].max(axis=1) * 1.01, bars[["open", "close"]].min(axis=1) * 0.99
    bars.assign(volume=1e6).to_csv(tmp_path / "bars.csv", index=False)
    options = ["--market", str(tmp_path / "bars.csv"), "--max-lookback", "30", "--actions", "hybrid", "--max-jump", "2"]
    run = finish(*SHORT, *options, "--total-timesteps", "4096", "--start", "2020-02-01", runs_dir=tmp_path / "runs")
    assert run.json["market"]["fill"] == "next_open" and run.json["panel"]["splits"]["train"]["start"] >= "2020-02-03"
    assert run.json["scores"]["test"]["agent"]["turnover"] > 0 and run.json["args"]["start"] == "2020-02-01"
    assert run.ledger["action"].between(0, 7).all()


def run_names(run):
    return [*(f"lookback {k}" for k in run.json["market"]["lookbacks"]), "best in training", "random", "equal weight"]


def test_any_gymnasium_id_and_no_resume_of_it(tmp_path, complaint):
    run = finish("--env-id", "CartPole-v1", "--total-timesteps", "4096", "--no-cuda", runs_dir=tmp_path / "cartpole")
    assert re.fullmatch(r"CartPole-v1__ppo_leadlag__1__\d+", run.folder.name)
    assert run.json["status"] == "finished" and 9 < run.json["last_100_returns"] < 200 and run.json["env_steps"] == 4096
    assert run.json["args"]["gamma"] == 0.99 and run.json["args"]["num_envs"] == 4  # CleanRL's settings
    assert not {"scores", "panel", "market"} & set(run.json) and not (run.folder / "ledger.parquet").exists()
    assert run.json["val_growth"] is None and f"{run.json['last_100_returns']:.4g}" in run.done.stdout
    line = complaint("--resume", str(run.folder))
    assert "--resume" in line and "CartPole-v1" in line and "LeadLag-v0" in line, line
    assert json.loads((run.folder / "run.json").read_text()) == run.json, "the refused run was changed"


def test_a_budget_too_small_to_finish_an_episode(inside):
    g = inside("--env-id", "CartPole-v1", "--num-steps", "4", "--total-timesteps", "16")
    assert g["run"]["last_100_returns"] is None and g["run"]["status"] == "finished"


def test_continuous_actions_are_refused(inside):
    with pytest.raises((SystemExit, AssertionError, ValueError), match="--env-id Pendulum-v1.*discrete"):
        inside("--env-id", "Pendulum-v1", "--total-timesteps", "512")


# --- the arithmetic of PPO, on the script's own variables


class Toy(gym.Env):
    """Walks a few steps; every second episode is truncated, the others terminate."""

    observation_space = gym.spaces.Box(-9, 9, (3,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self):
        self.episodes = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.t = self.episodes + 1, 0
        return self._observe(0), {}

    def _observe(self, action):
        return np.array([self.t, self.episodes % 4, action - 1], np.float32) / 3

    def step(self, action):
        self.t += 1
        over = self.t == 3 + self.episodes % 3
        cut = bool(self.episodes % 2)
        return self._observe(action), float(action) - 0.3 * self.t, over and not cut, over and cut, {}


class Bandit(gym.Env):
    """One state; the reward is the action; episodes of 50 steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.5, -0.5], np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([0.5, -0.5], np.float32), float(action), False, self.t == 50, {}


@pytest.fixture(params=["Toy", "LeadLag"])
def one_iteration(request, inside, monkeypatch):
    """Variables of the script after one iteration in which no weight moves: all values can be computed again."""
    options = ["--learning-rate", "0", "--gamma", "0.9", "--gae-lambda", "0.8", "--reward-scale", "50", "--seed", "7"]
    if request.param == "Toy":
        monkeypatch.setitem(gym.registry, "Toy-v0", gym.envs.registration.EnvSpec("Toy-v0", entry_point=Toy))
        options += ["--env-id", "Toy-v0", "--num-envs", "5", "--num-steps", "23", "--num-minibatches", "1"]
        return inside(*options, "--total-timesteps", str(5 * 23))
    options += ["--market", MARKET, *LOOKBACKS, "--num-envs", "20", "--num-steps", "23", "--episode-length", "9"]
    return inside(*options, "--total-timesteps", str(20 * 23))


def test_advantages_equal_the_slow_definition(one_iteration):
    """A_t = sum of (gamma lambda)^l delta_{t+l} to the end of the episode; V of an episode's own last observation counts
    where it was cut, and nothing after it terminated. The transitions are stepped again through the public API."""
    g = one_iteration
    args, agent = g["args"], g["agent"]
    norm = type(agent.norm)(g["obs_size"])  # that of the first rollout

    def value(obs):
        with torch.no_grad():
            return agent.value(norm(torch.as_tensor(np.asarray(obs), dtype=torch.float32))).double().numpy()

    env = g["make_envs"](args, g["data"], g["splits"], 1)
    actions = g["actions"].cpu().numpy()
    obs, _ = env.reset(seed=args.seed)
    deltas, over, kinds = np.zeros(actions.shape), np.zeros(actions.shape, bool), set()
    for t in range(args.num_steps):
        now = value(obs)
        obs, reward, terminated, truncated, infos = env.step(actions[t])
        following = np.array(obs)
        over[t] = terminated | truncated
        for i in np.flatnonzero(over[t]):
            following[i] = infos["final_obs"][i]
        kinds |= {(bool(a), bool(b)) for a, b in zip(terminated, truncated)}
        deltas[t] = args.reward_scale * reward + args.gamma * value(following) * ~terminated - now
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


MASKED = [
    *SHORT, "--actions", "hybrid", "--max-jump", "1", "--curriculum", "9", "40", "--update-epochs", "1",
    "--num-minibatches", "1", "--episode-length", "9",
]  # fmt: skip


def test_the_first_minibatch_has_ratio_one(inside):
    """One epoch of one minibatch, thrice: new and old log-probabilities are of the same weights, normaliser and masks."""
    g = inside(*MASKED, "--total-timesteps", str(3 * 1024))
    losses = g["losses"]
    assert abs(losses["approx_kl"]) < 1e-6 and losses["clipfrac"] == 0.0 and abs(losses["policy_loss"]) < 1e-5
    np.testing.assert_allclose(g["ratio"].detach().cpu().numpy(), 1.0, atol=1e-5)
    assert g["agent"].norm.count > 3000 and g["agent"].actor[-1].bias.abs().max() > 1e-5  # both have moved


def test_masked_actions_are_never_sampled_and_have_no_entropy(inside):
    g = inside(*MASKED, "--learning-rate", "0", "--total-timesteps", "1024")
    env = g["make_envs"](g["args"], g["data"], g["splits"], 1)
    first = torch.as_tensor(env.reset(seed=g["args"].seed)[1]["action_mask"])  # the script has moved on from its row 0
    masks, actions = torch.cat([first[None], g["masks"][1:-1]]), g["actions"].cpu()
    assert not masks.all() and masks.any(dim=2).all() and 0.2 < masks.float().mean() < 0.9
    assert masks.gather(2, actions[..., None]).all()
    with torch.no_grad():
        logits = g["agent"].actor(g["x"][:-1]).double().cpu().numpy()
    entropy = 0.0
    for row, allowed in zip(logits.reshape(-1, logits.shape[2]), masks.flatten(0, 1).numpy()):
        p = np.exp(row[allowed]) / np.exp(row[allowed]).sum()
        entropy -= (p * np.log(p)).sum() / masks[..., 0].numel()
    assert g["losses"]["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_log_probs_are_those_of_the_allowed_actions(script):
    torch.manual_seed(0)
    agent = script.Agent(4, 6)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)  # far from uniform
    x, mask = torch.randn(500, 4), torch.rand(500, 6) < 0.5
    mask[:, 2] = True
    log_probs = agent.log_probs(x, mask)
    assert (log_probs.exp()[~mask] == 0).all() and ((log_probs.exp() * log_probs)[~mask] == 0).all()
    for row, allowed, found in zip(agent.actor(x), mask, log_probs):
        torch.testing.assert_close(found[allowed], row[allowed].log_softmax(0))
    greedy = agent.act_greedily(x, mask)
    torch.testing.assert_close(greedy, log_probs.argmax(1))  # the normaliser has seen nothing yet
    assert mask.gather(1, greedy[:, None]).all()
    loss = log_probs.masked_fill(~mask, 0).sum() - (log_probs.exp() * log_probs).sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in agent.actor.parameters())


def test_sampling_follows_the_softmax(inside, monkeypatch):
    """A bandit after some training, so that its four actions are far from equally likely: frequencies of one rollout."""
    monkeypatch.setitem(gym.registry, "Bandit-v0", gym.envs.registration.EnvSpec("Bandit-v0", entry_point=Bandit))
    g = inside(
        "--env-id", "Bandit-v0", "--num-envs", "8", "--num-steps", "512", "--total-timesteps", str(4 * 4096),
        "--learning-rate", "0.0015", "--no-anneal-lr", "--gamma", "0", "--update-epochs", "4",
    )  # fmt: skip
    actions, logprobs = g["actions"].flatten().cpu().numpy(), g["logprobs"].flatten().double().cpu().exp().numpy()
    counts = np.bincount(actions, minlength=4)
    p = np.array([logprobs[actions == a].mean() for a in range(4)])
    assert counts.min() > 40 and p.max() > 3 * p.min(), (counts, p)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3, (counts, p)


def test_running_norm_equals_numpy_over_all_batches(script):
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e3 * rng.random(5), [0.5, 1, 5, 100, 0.1], (n, 5)) for n in (1000, 3, 1, 700, 64)]
    norm = script.RunningNorm(5)
    for batch in batches:
        norm.update(torch.as_tensor(batch))
    everything = np.concatenate(batches)
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
    fresh = script.RunningNorm(5)
    torch.testing.assert_close(fresh(x[:, :5] / 1e3), (x / 1e3).clamp(-10, 10))
