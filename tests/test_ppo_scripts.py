"""What the PPO scripts in algos/ have in common beyond test_scripts.py: the choice of the model, other environments, and PPO's
arithmetic on the script's own variables."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from scripts import SCRIPTS, Bandit, PPOScript, Run, Toy, assert_same_content, assert_same_ledger

from envs import ledger, portfolio_references, references, trading_references

pytest_plugins = ["scripts"]


@pytest.fixture(params=[name for name, script in SCRIPTS.items() if isinstance(script, PPOScript)])
def script(request):
    return SCRIPTS[request.param]


def test_the_normaliser_counts_every_observation(script, base):
    agent = script.make_agent(script.module, base.model)
    agent.load_state_dict(base.model["model"])
    assert float(agent.norm.count) == pytest.approx(20480, abs=1e-3) and (agent.norm.var >= 0).all()


def test_the_model_is_chosen_on_validation_and_the_test_split_read_once(script, inside, monkeypatch):
    """And the agent that is evaluated does not change: its statistics of observations stay those of training."""
    read, backtests = [], []
    for module in (references, portfolio_references, trading_references):

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
    if "symbol" in frame:
        frame = ledger.book(frame)
    if script.score == "growth":
        return float(ledger.growth(frame).mean() * years)
    return portfolio_references.utility(frame, 1 + 2 * g["args"].penalty_variance, years)


def test_bad_sizes_are_named(script, complaint):
    line = complaint(*script.short, "--num-envs", "0")
    assert "--num-envs 0" in line and "at least 1" in line
    most = script.most_minibatches
    line = complaint(*script.short, "--num-minibatches", str(most + 1))
    assert f"--num-minibatches {most + 1}: expected 1 to {most}" in line


def test_actions_of_the_wrong_kind_are_refused(script, complaint):
    env_id, expected = script.refused
    line = complaint("--env-id", env_id, "--total-timesteps", "512")
    assert f"--env-id {env_id}" in line and f"expected {expected} actions" in line


# --- other environments


def test_any_gymnasium_id_and_no_resume_of_it(script, inside, tmp_path, capsys):
    env_id, low, high = script.classic
    g = inside("--env-id", env_id, "--total-timesteps", "4096")
    run, printed = Run(g["run_dir"]).json, capsys.readouterr().out
    assert re.fullmatch(rf"{env_id}__{script.name}__1__\d+", g["run_dir"].name)
    assert run["status"] == "finished" and run["env_steps"] == 4096
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
    options += [*script.on(script.market), *script.own, "--num-envs", "20", "--num-steps", "23", "--episode-length", "9"]
    return inside(*options, "--total-timesteps", str(20 * 23))


def test_advantages_equal_the_slow_definition(script, one_iteration):
    """A_t = sum of (gamma lambda)^l delta_{t+l} to the end of the episode; V of an episode's own last observation counts
    where it was cut, and nothing after it terminated. The transitions are stepped again through the public API."""
    g = one_iteration
    args, agent = g["args"], g["agent"]
    norm = type(agent.norm)(g["obs_size"])  # that of the first rollout

    def value(obs, memory):
        with torch.no_grad():
            features, memory = script.features(agent, norm(torch.as_tensor(np.asarray(obs), dtype=torch.float32)), memory)
            return agent.value(features).double().numpy(), memory

    env = script.make_envs(g)
    actions, shape = g["actions"].cpu().numpy(), (args.num_steps, args.num_envs)
    if actions.ndim == 3:  # scores are clipped on their way to the market only
        actions = np.clip(actions, env.single_action_space.low, env.single_action_space.high)
    obs, _ = env.reset(seed=args.seed)
    deltas, over, kinds = np.zeros(shape), np.zeros(shape, bool), set()
    memory = script.blank(agent, args.num_envs)
    for t in range(args.num_steps):
        now, memory = value(obs, memory)
        obs, reward, terminated, truncated, infos = env.step(actions[t])
        following = np.array(obs)
        over[t] = terminated | truncated
        for i in np.flatnonzero(over[t]):
            following[i] = infos["final_obs"][i]
        kinds |= {(bool(a), bool(b)) for a, b in zip(terminated, truncated)}
        deltas[t] = args.reward_scale * reward + args.gamma * value(following, memory)[0] * ~terminated - now
        memory[:, torch.as_tensor(over[t])] = 0.0
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
        "--vf-coef", "0.3", "--clip-coef", "0.05", "--total-timesteps", "1024", "--num-minibatches", "4",
    )  # fmt: skip
    assert len(g["index"]) == 256 and len(set(g["index"].tolist())) == 256
    ratio = g["ratio"].detach().double().numpy()
    assert (ratio > 1.05).any() and (ratio < 0.95).any()
    a = g["advantages"].flatten()[g["index"]].double().numpy()
    a = (a - a.mean()) / a.std(ddof=1)
    policy = -np.where(a > 0, np.minimum(ratio, 1.05), np.maximum(ratio, 0.95)) @ a / 256
    total = policy + 0.3 * script.value_loss(g) - 0.07 * float(g["entropy"].detach())
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
        out = agent.actor(script.features(agent, agent.norm(obs), script.blank(agent, 1))[0])[0].numpy()
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
