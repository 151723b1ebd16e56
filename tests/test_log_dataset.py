"""`--log-dataset` of every script in algos/: what it leaves, that training does not notice, kills and resumes, bad input."""

import hashlib
import json

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from scripts import SCRIPTS, PPOScript, Run, Script, Toy, assert_same_content, assert_same_ledger, features_of

from envs import dataset_writer, portfolio_references
from envs.dataset import Dataset
from envs.task import Task

pytest_plugins = ["scripts"]

LENGTH = 16  # bars of an episode
KEYS = ("observations", "actions", "next_observations", "terminals", "timeouts", "rewards")
PPO = [name for name, script in SCRIPTS.items() if isinstance(script, PPOScript)]
both_kinds = pytest.mark.parametrize("script", PPO, indirect=True)
of_markets = pytest.mark.parametrize("script", [name for name in PPO if SCRIPTS[name].logs], indirect=True)


@pytest.fixture(params=[name for name, script in SCRIPTS.items() if script.logs])
def script(request) -> Script:
    return SCRIPTS[request.param]


@pytest.fixture
def options(script):
    """Eight iterations of 1024 steps, with checkpoints after 3, 6 and 8."""
    length = ["--episode-length", str(LENGTH)] if isinstance(script, PPOScript) else []
    return [*script.short, *length, "--total-timesteps", "8192", "--checkpoint-every", "3"]


def contents_of(data, keys=KEYS):
    """All rows of a small dataset."""
    blocks = list(data.blocks(range(len(data.terminated)), keys))
    return {key: np.concatenate([block[key] for block in blocks]) for key in keys}


def sha256_of(state: dict) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def test_training_does_not_notice_and_a_killed_run_goes_on_logging(script, options, inside, monkeypatch, tmp_path):
    """Stopped while it logs after iteration 5, resumed from iteration 3: as one run that never logged, in every bit."""
    folder, calls, seeds, log_episodes = tmp_path / "logs" / "new", [], [], dataset_writer.log_episodes

    def stop(path, *args):
        calls.append(path)
        seeds.append((torch.initial_seed(), args[4]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return log_episodes(path, *args)

    monkeypatch.setattr(dataset_writer, "log_episodes", stop)
    logging = ["--log-dataset", str(folder), "--log-at", "0.5", "0.625", "1", "--log-episodes", "21"]
    with pytest.raises(KeyboardInterrupt):
        inside(*options, *logging)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert Run(run_dir).model["iteration"] == 3
    names = [f"{script.name}__1__{1024 * iteration}" for iteration in (4, 5, 8)]
    first = folder / names[0] / "dataset.hdf5"
    before = first.stat().st_mtime_ns, first.read_bytes()
    assert [p.name for p in folder.iterdir()] == names[:1]

    g = inside("--resume", str(run_dir))
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert [path.parent.name for path in calls] == [names[0], names[1], *names[1:]]
    assert sorted(p.name for p in folder.iterdir()) == names
    logged, plain = Run(run_dir), Run(inside(*options)["run_dir"])
    assert_same_ledger(logged.ledger, plain.ledger)
    for key in plain.model.keys() - {"args", "train_seconds"}:
        assert_same_content(logged.model[key], plain.model[key], key)

    datasets = [Dataset(folder / name / "dataset.hdf5") for name in names]
    for iteration, data in zip((4, 5, 8), datasets):
        meta = data.meta
        (behaviour,) = meta["behaviours"]
        assert (behaviour["policy"], behaviour["step"]) == (script.name, 1024 * iteration)
        assert meta["episodes"] == len(data.terminated) == 21
        assert not data.terminated.any() and (np.diff(data.starts) == LENGTH).all()
        assert (meta["env_id"], meta["seed"], meta["split"], meta["reward_scale"]) == (script.env_id, 1, "train", 1.0)
        assert meta["gamma"] == g["args"].gamma and meta["git_commit"] == logged.json["git_commit"]
        assert meta["panel_sha256"] == logged.json["panel"]["sha256"]
        assert meta["costs"] == logged.json["market"]["costs"]
        (times,) = contents_of(data, ("infos/timestamp",)).values()
        assert np.isin(times.astype("datetime64[ns]"), g["panel"].timestamps).all()
    assert behaviour["checkpoint_sha256"] == sha256_of(logged.model["model"])
    assert len({data.meta["behaviours"][0]["checkpoint_sha256"] for data in datasets}) == 3
    starts = [{row.tobytes() for row in contents_of(data)["observations"][::LENGTH]} for data in datasets]
    assert all(len(a - b) > 15 for a, b in zip(starts, starts[1:])), "the same windows again"

    if isinstance(script, PPOScript):
        assert_behaves_like(script, logged.model, datasets[-1])
    else:  # it draws from torch's own stream, which is seeded anew and then put back
        assert "infos/behavior_logprob" not in datasets[-1].keys and all(found == seed for found, seed in seeds)

    task = Task.of(datasets[-1])  # the market of the run, to the last bit of its backtests
    test = logged.ledger[logged.ledger["split"] == "test"].reset_index(drop=True)
    assert_same_ledger(task.run("test", script.policy(g)), test)
    assert task.score(test) == pytest.approx(logged.json["scores"]["test"]["agent"][script.score], rel=1e-12)
    assert json.loads(json.dumps(task.describe())) == {key: logged.json[key] for key in ("panel", "market")}


def assert_behaves_like(script, model, data):
    """The dataset's log-probabilities are those of a PPO checkpoint; its actions spread as that explores, unless cut off."""
    agent = script.make_agent(script.module, model)
    agent.load_state_dict(model["model"])
    rows = contents_of(data, ("observations", "actions", *(key for key in data.keys if "behavior" in key or "mask" in key)))
    action = torch.as_tensor(rows["actions"])
    with torch.no_grad():
        x = features_of(script, agent, agent.norm(torch.as_tensor(rows["observations"])), data.starts)
        if action.ndim == 2:
            logprob, entropy = agent.log_prob(agent.actor(x), action), float(agent.entropy())
        else:
            mask = torch.as_tensor(rows.get("infos/action_mask", np.ones((len(x), data.action_space.n), bool)))
            all_logprobs = script.view(agent).log_probs(x, mask)
            logprob = all_logprobs.gather(1, action[:, None])[:, 0]
            entropy = float(-(all_logprobs.exp() * all_logprobs).sum(1).mean())
    np.testing.assert_allclose(rows["infos/behavior_logprob"], logprob, atol=1e-4)
    if not (abs(action) == getattr(data.action_space, "high", np.inf)).any():
        assert float(-logprob.mean()) == pytest.approx(entropy, abs=6 * float(logprob.std()) / len(x) ** 0.5 + 1e-4)


@pytest.mark.parametrize("script", ["grpo_diffmarket"], indirect=True)
@pytest.mark.parametrize("policy", ["gaussian", "dirichlet"])
def test_weights_are_those_that_training_would_order(script, inside, policy, tmp_path):
    """Scores of the kernel's market: the policy's own mean, and around it the noise that it explores with."""
    terms = ["--market", script.market, *script.sizes, "--hidden", "8", "--total-timesteps", "1024", "--costs", "zero"]
    if policy == "gaussian":
        terms += ["--gross", "100", "--asset-cap", "100", "--scale", "0.7"]  # nothing binds: weights are held + 0.7 x scores
    else:
        terms += [
            "--constraints",
            "long_only",
            "--orders",
            "target",
            "--policy",
            "dirichlet",
            "--gross",
            "1",
            "--asset-cap",
            "1",
        ]
    g = inside(*terms, "--log-dataset", str(tmp_path / "logs"), "--log-episodes", "64")
    data = Dataset(tmp_path / "logs" / f"{script.name}__1__1024" / "dataset.hdf5")
    rows = contents_of(data, ("observations", "actions", "infos/timestamp", "infos/turnover"))
    of_time = {}
    for start, stop in g["splits"]["train"].ranges:
        for row in range(start, stop):
            of_time.setdefault(g["panel"].timestamps[row].astype("datetime64[ns]").astype(np.int64), []).append(row)
    features = rows["observations"][:, g["data"].layout["assets"]]
    at = [
        next(row for row in of_time[time] if (g["data"].assets[row] == seen).all())
        for time, seen in zip(rows["infos/timestamp"], features)
    ]
    g["agent"].load_state_dict(Run(g["run_dir"]).model["model"])
    mean = g["kernel_policy"]("train")(rows["observations"], None, np.array(at))
    noise = rows["actions"] - mean
    if policy == "gaussian":
        noise *= 100.0 / 0.7 / g["agent"].log_std.detach().exp().numpy()
        assert abs(noise.mean()) < 6 / noise.size**0.5 and noise.std() == pytest.approx(1.0, abs=0.05)
        assert abs(np.corrcoef(noise.T)[0, 1]) < 0.2
    else:  # shares of N + 1, whose variance is mean (1 - mean) / (1 + the sum of the concentrations)
        np.testing.assert_allclose(rows["actions"].sum(axis=1), 1.0, atol=1e-5)
        total = float(mean.shape[1] * (-2.0 * g["agent"].log_std).exp().detach())
        variance = (mean * (1.0 - mean)).mean() / (1.0 + total)
        assert noise.var() == pytest.approx(variance, rel=0.1) and abs(noise.mean(axis=0)).max() < 0.02
    assert (rows["infos/turnover"] > 0).mean() > 0.95


@pytest.mark.parametrize("script", ["grpo_diffmarket"], indirect=True)
@pytest.mark.parametrize(
    "utility, weights",
    [
        (["log"], {}),
        (["mean_variance", "--risk-aversion", "7"], {"variance": 3.0}),
        (["sharpe"], {"log_growth": 0.0, "differential_sharpe": 1.0}),
        (["cvar", "--penalty", "0.3", "--cvar-alpha", "0.2"], {"cvar": 0.3}),
        (["drawdown", "--penalty", "0.3"], {"drawdown": 0.3}),
        (["risk_budget"], {}),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_rewards_stand_for_the_utility(script, inside, utility, weights, monkeypatch, tmp_path):
    """Of the log and drawdown utilities and of mean - variance they are the terms themselves."""
    monkeypatch.setattr(portfolio_references, "references", lambda *_: {})
    terms = ["--market", script.market, "--num-windows", "4", "--group-size", "1", "--horizon", "8", "--hidden", "4"]
    terms += ["--total-timesteps", "32", "--log-dataset", str(tmp_path / "logs"), "--log-episodes", "8", "--utility", *utility]
    g = inside(*terms)
    task = Task.of(Dataset(tmp_path / "logs" / f"{script.name}__1__32" / "dataset.hdf5"))
    envs = task.make(4)
    assert envs.reward_weights == dict.fromkeys(envs.reward_weights, 0.0) | {"log_growth": 1.0} | weights
    assert (envs.episode_length, envs.cvar_alpha) == (8, g["args"].cvar_alpha)
    if utility[0] not in ("log", "drawdown", "mean_variance"):
        return
    envs.reset(seed=0)
    rng, growth, rewards = np.random.default_rng(0), [], []
    for _ in range(8):
        _, reward, _, _, infos = envs.step(rng.normal(0.0, 0.03, envs.action_space.shape).astype(np.float32))
        growth.append(1.0 + infos["record"][:, 0])
        rewards.append(reward)
    expected = script.module.rewards_of(g["args"], torch.as_tensor(np.array(growth).T)).numpy().T
    exact = utility[0] != "mean_variance"  # log growth is net - net^2 / 2 only to the second order
    np.testing.assert_allclose(rewards, expected, rtol=1e-5 if exact else 0.02, atol=1e-7 if exact else 1e-5)


@pytest.mark.parametrize("script", ["ppo_leadlag"], indirect=True)
def test_rewards_are_those_that_training_ends_with(script, options, inside, tmp_path):
    """Shaping and curriculum are the learner's: what is logged is the growth, whatever lookback it came from."""
    shaping = ["--reward-strength", "5", "--reward-jump", "5", "--curriculum", "9", "9", "--total-timesteps", "1024"]
    inside(*options, *shaping, "--log-dataset", str(tmp_path / "logs"), "--log-episodes", "20")
    data = Dataset(tmp_path / "logs" / f"{script.name}__1__1024" / "dataset.hdf5")
    rows = contents_of(data, ("rewards", "actions", "infos/pnl", "infos/cost", "infos/action_mask"))
    np.testing.assert_allclose(rows["rewards"], np.log1p(rows["infos/pnl"] - rows["infos/cost"]), atol=1e-3)
    assert len(set(rows["actions"])) == 5 and rows["infos/action_mask"].sum() > 4 * len(rows["actions"])


@of_markets
def test_an_early_stop_is_the_end(script, options, inside, tmp_path):
    logging = ["--log-dataset", str(tmp_path / "logs"), "--log-episodes", "3"]
    g = inside(*options, "--patience", "1", "--eval-every", "1", "--learning-rate", "0", *logging)
    assert g["global_step"] < 8192
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name == f"{script.name}__1__{g['global_step']}"
    assert Dataset(folder / "dataset.hdf5").meta["behaviours"][0]["step"] == g["global_step"]


@both_kinds
def test_any_gymnasium_id(script, inside, tmp_path):
    """Successors are where the physics lead from the last state: not where the next episode begins."""
    env_id = script.classic[0]
    sizes = ["--num-envs", "4", "--num-steps", "64", "--total-timesteps", "512", "--num-minibatches", "2"]
    logging = ["--log-dataset", str(tmp_path), "--log-at", "0.5", "1", "--log-episodes", "6"]
    g = inside("--env-id", env_id, *script.plain, *sizes, *logging)
    for step in (256, 512):
        data = Dataset(tmp_path / f"{script.name}__1__{step}" / "dataset.hdf5", gym.make(env_id).action_space)
        assert data.meta["episodes"] >= 6 and data.meta["task"] == {"env_id": env_id, "seed": 1} and Task.of(data) is None
        assert data.meta["costs"] is data.meta["panel_sha256"] is None and "infos/timestamp" not in data.keys
    assert_behaves_like(script, Run(g["run_dir"]).model, data)
    with h5py.File(data.path, "r") as file:
        assert file["observations"].dtype == file["next_observations"].dtype == np.float32
    rows, env = contents_of(data), gym.make(env_id).unwrapped
    ends = data.starts[1:] - 1
    if env_id == "Pendulum-v1":
        assert rows["timeouts"][ends].all() and (np.diff(data.starts) == 200).all()
        assert (abs(rows["actions"]) <= 2).all() and (abs(rows["actions"]) == 2).any()
    else:
        assert rows["terminals"][ends].any()
    for row in (*ends, *ends - 1):
        env.reset(seed=0)
        obs = rows["observations"][row].astype(np.float64)
        env.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]]) if env_id == "Pendulum-v1" else obs
        found, reward, *_ = env.step(rows["actions"][row])
        np.testing.assert_allclose(rows["next_observations"][row], found, atol=1e-4)
        assert rows["rewards"][row] == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--log-at", "0"], ("--log-at", "0.0", "above 0 and at most 1")),
        (["--log-at", "0.5", "1.5"], ("--log-at", "1.5", "above 0 and at most 1")),
        (["--log-at", "nan"], ("--log-at", "nan", "above 0 and at most 1")),
        (["--log-at"], ("--log-at",)),
        (["--log-at", "end"], ("--log-at", "end")),
        (["--log-episodes", "0"], ("--log-episodes 0", "at least 1")),
    ],
    ids=" ".join,
)
def test_bad_flags_are_named(script, complaint, flags, words):
    line = complaint(*script.short, *flags, "--log-dataset", "unused")
    assert all(word in line for word in words), line


def test_an_earlier_run_is_not_mixed_with(script, complaint, tmp_path):
    """Said before training, not when hours of it are over; runs of other seeds are no reason to refuse."""
    for seed, step in (("1", 512), ("11", 512)):
        taken = tmp_path / "logs" / f"{script.name}__{seed}__{step}" / "dataset.hdf5"
        taken.parent.mkdir(parents=True)
        taken.touch()
    logging = ["--log-dataset", str(tmp_path / "logs")]
    line = complaint(*script.short, *logging)
    assert "--log-dataset" in line and f"{script.name}__1__512" in line and str(tmp_path / "logs") in line
    line = complaint(*script.short, *logging, "--seed", "2", "--market", "synthetic:nonsense")
    assert "nonsense" in line


@both_kinds
def test_actions_that_no_dataset_can_hold_are_refused_at_once(script, complaint, register, tmp_path):
    space = gym.spaces.Box(-1, 1, (2, 2)) if script.refused[1] == "continuous" else gym.spaces.Discrete(3, start=1)
    line = complaint(*register(Toy, space), "--log-dataset", str(tmp_path / "logs"))
    assert "--log-dataset" in line and str(space) in line and "Discrete space from 0 or a Box of shape (A,)" in line
