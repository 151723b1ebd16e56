"""algos/ppo_hierarchical_trading.py: decisions that last, a gate that is frozen, floored and remembers, and what it reports."""

import copy
import re
import shutil

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from scripts import SCRIPTS, Bandit, NothingWaits, Run, candles, finish, prices
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs.synthetic import make_panel
from envs.trading import ORDERS, TradingVectorEnv
from envs.trading_tables import TradingConfig, TradingData

pytest_plugins = ["scripts"]
NAMES = ("trend", "revert", "event")


@pytest.fixture
def script():
    return SCRIPTS["ppo_hierarchical_trading"]


@pytest.fixture
def module(script):
    return script.module


def make_agent(module, floor=0.05, allowed=None, obs_size=5):
    torch.manual_seed(0)
    agent = module.Agent(obs_size, torch.ones((3, 4), dtype=torch.bool) if allowed is None else allowed, floor)
    for head in (agent.gate, *agent.specialists):
        torch.nn.init.normal_(head[-1].weight, std=0.5)  # far from uniform
    return agent


# --- decisions that last


def rollout(steps=13, markets=5, seed=0):
    rng = np.random.default_rng(seed)
    rewards, values, following = rng.standard_normal((3, steps, markets))
    ends = rng.random((steps, markets))
    terminated, done = ends < 0.06, ends < 0.2
    return rewards, values, following, terminated, done


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64 if a.dtype == float else torch.bool) for a in arrays]


def test_a_decision_every_bar_is_plain_gae(module):
    """The flat formulas of PPO, as algos/ppo_leadlag.py has them."""
    rewards, values, following, terminated, done = rollout()
    every = np.ones(rewards.shape, bool)
    found = module.advantages_of(*tensors(rewards, values, following, terminated, done, every), 0.9, 0.8)
    deltas = rewards + 0.9 * following * ~terminated - values
    expected, running = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        running = deltas[t] + 0.9 * 0.8 * ~done[t] * running
        expected[t] = running
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_decisions_earn_what_was_earned_until_the_next_one_by_the_bars_elapsed(module):
    """Stays of several lengths, cut by ends of episodes and by the rollout: each written out from its definition."""
    rewards, values, following, terminated, done = rollout(steps=17, markets=40)
    decided = np.random.default_rng(1).random(rewards.shape) < 0.35
    decided[0] = True
    decided[1:] |= done[:-1]  # an episode begins with a decision
    gamma, lam = 0.9, 0.7
    found = module.advantages_of(*tensors(rewards, values, following, terminated, done, decided), gamma, lam).numpy()
    lengths = set()
    for i in range(rewards.shape[1]):
        starts = [*np.flatnonzero(decided[:, i]), len(rewards)]
        advantage = 0.0
        for start, stop in reversed(list(zip(starts, starts[1:]))):
            over = np.flatnonzero(done[start:stop, i])
            n = (over[0] + 1) if len(over) else stop - start
            last = start + n - 1
            lengths.add(n)
            delta = (gamma ** np.arange(n)) @ rewards[start : start + n, i] - values[start, i]
            delta += gamma**n * following[last, i] * (not terminated[last, i])
            advantage = delta + gamma**n * lam * advantage * (not done[last, i] and stop < len(rewards))
            assert found[start, i] == pytest.approx(advantage, abs=1e-12)
    assert lengths >= {1, 2, 3, 4}


def test_two_decisions_by_hand(module):
    """Three bars and two: 1 + .5 * 2 + .25 * 4 + .125 * 8 - 10 = -6; then 3 + .5 * 5 - 7 = -1.5, ruined at its end."""
    rewards, values, following = (np.zeros((5, 1)) for _ in range(3))
    rewards[:, 0], values[[0, 3], 0], following[:, 0] = (1, 2, 4, 3, 5), (10, 7), (99, 99, 8, 99, 99)
    terminated = np.array([[False], [False], [False], [False], [True]])
    decided = np.array([[True], [False], [False], [True], [False]])
    found = module.advantages_of(*tensors(rewards, values, following, terminated, terminated, decided), 0.5, 0.8)
    assert found[3, 0] == pytest.approx(-1.5)
    assert found[0, 0] == pytest.approx(-6 + 0.125 * 0.8 * -1.5)


def test_one_specialist_is_ppo_to_rounding(inside, tmp_path):
    """Weights of algos/ppo_leadlag.py after some updates of the same episodes, from the same seed."""
    options = ["--env-id", "CartPole-v1", "--total-timesteps", "1536"]
    flat = inside(*options, "--specialists", "flat", "--decide-every", "1")["agent"]
    plain = finish(SCRIPTS["ppo_leadlag"], *options, "--num-threads", "1", "--no-cuda", runs_dir=tmp_path / "plain").model
    renamed = {name.replace("specialists.0", "actor"): value for name, value in flat.state_dict().items() if name != "allowed"}
    assert renamed.keys() == plain["model"].keys() and not flat.gated
    for name, value in renamed.items():
        torch.testing.assert_close(value, plain["model"][name], atol=1e-5, rtol=1e-4, msg=name)


# --- the agent


def test_every_row_is_its_own_specialists(module):
    agent = make_agent(module, allowed=torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool))
    x, mask = torch.randn(200, 5), torch.rand(200, 4) < 0.6
    mask[:, 0] = True
    who = torch.randint(3, (200,))
    found, every = agent.log_probs(x, mask, who), agent.all_log_probs(x, mask)
    for row in range(200):
        ok = mask[row] & agent.allowed[who[row]]
        torch.testing.assert_close(found[row, ok], agent.specialists[who[row]](x[row])[ok].log_softmax(0))
        assert (found[row, ~ok].exp() == 0).all()
        torch.testing.assert_close(every[row, who[row]], found[row])
        torch.testing.assert_close(agent.value(x, who)[row], agent.critic(x)[row, who[row]])
    agent.zero_grad()
    agent.log_probs(x, mask, torch.ones(200, dtype=torch.int64)).masked_fill(~mask, 0).clamp_min(-50).sum().backward()
    moved = [any(p.grad is not None and p.grad.abs().max() > 0 for p in actor.parameters()) for actor in agent.specialists]
    assert moved == [False, True, False]


def test_no_specialist_gets_less_than_its_share_of_the_floor(module):
    agent = make_agent(module, floor=0.3)
    torch.nn.init.normal_(agent.gate[-1].weight, std=300.0)  # as sure as can be
    x, memory = torch.randn(300, 5), torch.randn(300, 3, 3)
    p = agent.gate_log_probs(x, memory).exp().detach()
    torch.testing.assert_close(p.sum(1), torch.ones(300))
    assert p.min() == pytest.approx(0.1, abs=1e-4) and p.max() == pytest.approx(0.8, abs=1e-4)
    agent.gate_floor = 0.0
    torch.testing.assert_close(0.7 * agent.gate_log_probs(x, memory).exp() + 0.1, p)


def test_the_mixture_is_the_specialists_mean(module):
    agent = make_agent(module)
    x, memory, mask = torch.randn(50, 5), torch.randn(50, 3, 3), torch.ones((50, 4), dtype=torch.bool)
    g = agent.gate_log_probs(x, memory).exp()
    expected = sum(g[:, k, None] * agent.log_probs(x, mask, torch.full((50,), k)).exp() for k in range(3))
    torch.testing.assert_close(module.mixed(g.log(), agent.all_log_probs(x, mask)).exp(), expected)


def test_the_gates_memory_is_what_specialists_earned(module):
    """By hand: a market that uses 0, 2 and 2 again; another that only ever uses 1. The gate sees it, and so may act on it."""
    agent = make_agent(module)
    memory = agent.blank(2)
    assert memory.shape == (2, 3, 3) and not memory.any()
    for who, reward in (((0, 1), (2.0, -1.0)), ((2, 1), (4.0, -1.0)), ((2, 1), (50.0, 0.0))):
        memory = agent.remember(memory, torch.tensor(who), torch.tensor(reward))
    r, k = 0.05, 0.95
    expected = [[r * 2 * k * k, 0, r * 4 * k + r * 10], [r * k * k, 0, r * k + r], [0, 0, 1]]  # a reward counts 10 at most
    torch.testing.assert_close(memory[0], torch.tensor(expected))
    torch.testing.assert_close(memory[1, :, 1], torch.tensor([-r * (k * k + k), r * (k * k + k + 1), 1]))
    x = torch.zeros(2, 5)
    assert not torch.allclose(*agent.gate_log_probs(x, memory)) and not torch.allclose(*agent.gate_value(x, memory))


def test_modes_forbid_orders_and_intents_none(script, inside):
    g = inside(*script.short, "--specialists", "modes", "--total-timesteps", "4096", "--decide-every", "2")
    allowed = {name: {ORDERS[a] for a in row.nonzero().flatten()} for name, row in zip(g["names"], g["agent"].allowed)}
    small = {"hold", "buy_small", "sell_part", "sell_all"}
    assert allowed == {"probe": small, "passive": small | {"buy_medium"}, "aggressive": set(ORDERS)}
    actions, chosen = g["actions"].flatten(), g["chosen_by_step"].flatten()
    assert g["agent"].allowed[chosen, actions].all() and len(chosen.unique()) == 3
    assert SCRIPTS["ppo_hierarchical_trading"].module.SPECIALISTS["intents"] == NAMES


# --- stages


@pytest.fixture(params=["options", "mixture"])
def stage(request, script, inside, monkeypatch):
    """Run some iterations of which the last is of one stage; returns its variables, and the weights before and after it."""

    def call(stages, *options):
        kept = []
        saved = torch.save
        monkeypatch.setattr(torch, "save", lambda content, path: (kept.append(clone(content["model"])), saved(content, path)))
        every = ["--decide-every", "1" if request.param == "mixture" else "3", "--gate", request.param]
        g = inside(
            *script.short, "--checkpoint-every", "1", "--total-timesteps", "4096", "--stages", *stages, *every, *options
        )  # fmt: skip
        return g, kept[-2], kept[-1]

    return call


def clone(model):
    return {name: value.clone() for name, value in model.items()}


def moved(before, after):
    """Parts of the agent of which a weight differs."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} - {"norm"}


@pytest.mark.parametrize(
    "stages, parts",
    [
        (("1", "0", "0"), {"specialists", "critic"}),
        (("0.5", "0.5", "0"), {"gate", "gate_critic", "critic"}),
        (("0.25", "0.25", "0.5"), {"specialists", "critic", "gate", "gate_critic"}),
    ],
    ids=["specialists", "gate", "joint"],
)
def test_only_what_is_trained_moves(stage, stages, parts):
    g, before, after = stage(stages)
    assert moved(before, after) == parts


def test_specialists_are_trained_on_their_own_bars_alone(script, inside):
    g = inside(*script.short, "--stages", "1", "0", "0", "--total-timesteps", "2048")
    home, env = g["home"].numpy(), g["train_envs"]
    assert (np.bincount(home) >= 21).all() and len(home) == 64 and (np.diff(home) >= 0).all()
    assert torch.equal(g["chosen_by_step"], g["home"].expand_as(g["chosen_by_step"]))
    regime, (_, infos) = g["panel"].hidden["regime"], env.reset(seed=0)
    mask, seen = infos["action_mask"], set()
    for _ in range(200):
        _, _, _, _, infos = env.step(np.where(mask[:, 1], 1, 0))
        np.testing.assert_array_equal(regime[infos["decided_at"]], home)
        mask = infos["action_mask"]
        seen |= set(infos["decided_at"])
    start, stop = g["splits"]["train"].ranges.min(), g["splits"]["train"].ranges.max()
    assert start <= min(seen) and max(seen) < stop and len(seen) > 200


@pytest.mark.parametrize("phase", [0, 1])
def test_processes_together_have_the_markets_of_one(module, phase):
    """Symbol and bars of every market, by its number, in shares that cut the markets of a specialist, and leave some out."""
    panel = make_panel("synthetic:modes:bars=300:train=1:val=1:test=1:assets=3:regime_bars=40", 3)
    args, data = module.Args(num_envs=16), TradingData(panel, TradingConfig(window=1))
    given = panel.split(), dict(data=data, episode_length=9, num_threads=1), phase

    def state(markets=None):
        parts = module.parts_of(module.make_envs(args, *given, markets))
        for part, rows in parts:
            part.reset(seed=5 + (markets.start if markets else 0) + rows.start)
        return {name: np.concatenate([part._state[name] for part, _ in parts]) for name in ("key", "symbol", "t", "stop")}

    alone, shares = state(), [state(range(first, first + 4)) for first in range(0, 16, 4)]
    assert len(np.unique(alone["symbol"])) == 3
    for name, values in alone.items():
        np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), values)


def test_the_stretches_of_an_intent(module):
    panel = make_panel("synthetic:modes:bars=400:train=2:val=1:test=1:regime_bars=30", 3)
    split = panel.split()["train"]
    rows = [np.concatenate([np.arange(a, b) for a, b in module.own_bars(panel, split, k).ranges]) for k in range(3)]
    for k in range(3):
        assert (panel.hidden["regime"][rows[k]] == k).all()
        assert np.diff(module.own_bars(panel, split, k).ranges, axis=1).min() >= module.SHORTEST
    together = np.concatenate(rows)
    assert len(set(together)) == len(together) and together.max() < 800 and len(together) > 600
    noise = make_panel("synthetic:noise:bars=800:train=1:val=1:test=1", 3)
    labels = module.intents_of(noise, noise.split()["train"])
    features = dict(zip(module.REGIME_FEATURES, module.regime_features(noise).T))
    risen, gone = (features["log_vol_20"] - features["log_vol_60"]), np.abs(features["trend_60"])
    own = np.arange(800)  # of the training history: thirds; where volatility rose, and of the others where prices went far
    np.testing.assert_allclose(np.bincount(labels[own]) / 800, 1 / 3, atol=0.002)
    assert risen[own][labels[own] == 2].min() > risen[own][labels[own] != 2].max()
    assert gone[own][labels[own] == 0].min() > gone[own][labels[own] == 1].max()
    assert risen[labels == 2].min() > risen[labels != 2].max()  # the same bounds for all


@pytest.mark.parametrize(
    "shares, expected", [((0.4, 0.4, 0.2), [0] * 4 + [1] * 4 + [2] * 2), ((0, 0, 1), [2] * 10), ((0, 1, 0), [1] * 10)]
)
def test_stages_in_iterations(module, shares, expected):
    assert [module.phase_of(n, 10, shares) for n in range(1, 11)] == expected


# --- the update of the gate


@pytest.fixture(params=["options", "mixture"])
def joint(request, script, inside):
    """One iteration of the joint stage in one minibatch, after one that moved the weights; and in which none moves."""

    def call(*options):
        every = ["--decide-every", "1" if request.param == "mixture" else "3", "--gate", request.param, "--episode-length", "9"]
        base = [*script.short, "--stages", "0", "0", "1", "--num-minibatches", "1", "--seed", "7"]
        return inside(*base, *every, "--total-timesteps", "1024", *options)

    return call


def test_the_first_ratios_are_one(joint):
    g = joint("--gate-learning-rate", "0")
    np.testing.assert_allclose(g["ratio"].detach().numpy(), 1.0, atol=1e-5)
    assert abs(g["losses"]["approx_kl"]) < 1e-6 and g["losses"]["clipfrac"] == 0
    g["memories"][0] = 0.0  # the script has moved on from its row 0
    seen = g["x"][:-1].flatten(0, 1), g["memories"][:-1].flatten(0, 1), g["chosen_by_step"].view(-1, 1)
    ratio = (g["agent"].gate_log_probs(*seen[:2]).gather(1, seen[2]) - g["gate_logprobs"].view(-1, 1)).exp()
    np.testing.assert_allclose(ratio.detach().numpy(), 1.0, atol=1e-5)
    assert g["mixture"] or g["decided"].sum() < 600


def test_when_the_gate_decides(script, inside):
    """At the start of the rollout, every third bar after, and anew as an episode begins; in between nobody changes."""
    g = inside(
        *script.short, "--stages", "0", "0", "1", "--episode-length", "7", "--decide-every", "3", "--total-timesteps", "1024"
    )
    decided, done, chosen = (g[name].numpy() for name in ("decided", "done", "chosen_by_step"))
    age = np.zeros(decided.shape[1], int)
    for t in range(len(decided)):
        np.testing.assert_array_equal(decided[t], age % 3 == 0)
        if t:
            assert (chosen[t] == chosen[t - 1])[~decided[t]].all()
        age = np.where(done[t], 0, age + 1)
    assert done.any() and len(np.unique(chosen)) == 3


def test_targets_of_both_levels_equal_the_slow_definition(script, inside):
    """What a bar leads to is valued by who goes on, or by the gate's mean where it decides next; the gate by its own critic."""
    g = inside(
        *script.short, "--stages", "0", "0", "1", "--episode-length", "7", "--decide-every", "3", "--total-timesteps", "1024",
        "--learning-rate", "0", "--gate-learning-rate", "0", "--switch-cost", "0.01", "--gamma", "0.8",
    )  # fmt: skip
    agent, args = g["agent"], g["args"]
    x, memories, earned = g["x"], g["memories"], []
    memories[0] = 0.0  # the script has moved on from its row 0
    done, decided, chosen = g["done"], g["decided"], g["chosen_by_step"]
    env = script.make_envs(g)
    env.reset(seed=args.seed)
    norm = type(agent.norm)(g["obs_size"])
    memory = agent.blank(args.num_envs)
    for t in range(args.num_steps):
        torch.testing.assert_close(memories[t], memory)
        _, reward, terminated, truncated, infos = env.step(g["actions"][t].numpy())
        memory = agent.remember(memory, chosen[t], args.reward_scale * torch.as_tensor(reward))
        following, after = x[t + 1].clone(), memory.clone()
        over = torch.as_tensor(terminated | truncated)
        if over.any():
            following[over] = norm(torch.as_tensor(infos["final_obs"]))[over]
        memory[over] = 0.0
        anew = over | (decided[t + 1] if t + 1 < args.num_steps else torch.ones_like(over))
        with torch.no_grad():
            each = agent.critic(following)
            mean = (agent.gate_log_probs(following, after).exp() * each).sum(1)
            expected = torch.where(anew, mean, each.gather(1, chosen[t][:, None]).squeeze(1))
            torch.testing.assert_close(g["next_values"][t], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(g["next_gate_values"][t], agent.gate_value(following, after), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(g["gate_values"][t], agent.gate_value(x[t], memories[t]), atol=1e-5, rtol=1e-4)
        before = memories[t, :, 2]
        changed = before.any(1) & (before.argmax(1) != chosen[t])
        earned.append(args.reward_scale * (torch.as_tensor(reward) - 0.01 * changed))
        if t:
            assert not (changed & ~decided[t]).any()
    charged = torch.stack(earned)
    assert done.any() and (charged < args.reward_scale * g["rewards"] - 1e-3).any()
    slow = script.module.advantages_of(
        charged, g["gate_values"], g["next_gate_values"], g["terminated"], done, decided, 0.8, args.gae_lambda
    )
    torch.testing.assert_close(g["gate_advantages"], slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(g["gate_returns"], slow + g["gate_values"])


def with_fixed_shapes(g):
    """From now on the functions of a finished run compute as on a GPU: with masks in place of rows."""
    g["update"].__globals__["fixed_shapes"] = lambda x: True


@pytest.mark.parametrize("fixed", [False, True])
def test_the_gates_loss_is_its_parts(script, inside, fixed):
    """One more update after several: clipped objective, value, entropy and spread on its decisions, written out."""
    g = inside(
        *script.short, "--stages", "0", "0", "1", "--decide-every", "3", "--total-timesteps", "1024", "--update-epochs", "4",
        "--gate-learning-rate", "0.05", "--no-anneal-lr", "--clip-coef", "0.05", "--gate-balance", "0.3", "--gate-ent-coef",
        "0.2", "--vf-coef", "0.4",
    )  # fmt: skip
    agent, index = copy.deepcopy(g["agent"]), g["index"]
    g["memories"][0] = 0.0  # the script has moved on from its row 0
    if fixed:
        with_fixed_shapes(g)
    loss, watched, *_ = g["update"]()
    rows = index[g["decided"].flatten()[index]]
    assert 40 < len(rows) < len(index) / 2
    x, memory = g["x"][:-1].flatten(0, 1)[rows], g["memories"][:-1].flatten(0, 1)[rows]
    with torch.no_grad():
        log_p, values = agent.gate_log_probs(x, memory).double(), agent.gate_value(x, memory).double()
    ratio = (log_p.gather(1, g["chosen_by_step"].view(-1, 1)[rows]).squeeze(1) - g["gate_logprobs"].flatten()[rows]).exp()
    a = g["gate_advantages"].flatten()[rows].double()
    a = (a - a.mean()) / a.std()
    assert (ratio > 1.05).any() and (ratio < 0.95).any()
    policy = -torch.where(a > 0, ratio.clamp(max=1.05), ratio.clamp(min=0.95)) @ a / len(a)
    value = 0.5 * (values - g["gate_returns"].flatten()[rows]).square().mean()
    p = log_p.exp()
    entropy = -(p * p.log()).sum(1).mean()
    mean = p.mean(0)
    spread = -(mean * mean.log()).sum() - entropy
    assert spread > 0
    torch.testing.assert_close(watched[5:].double(), torch.stack([policy, value, entropy, spread]), atol=1e-5, rtol=1e-4)
    rest = watched[0] - g["args"].ent_coef * watched[2] + 0.4 * watched[1]
    assert float(loss - rest) == pytest.approx(float(policy + 0.4 * value - 0.2 * entropy - 0.3 * spread), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "stages, idle",
    [(("0", "1", "0"), {"specialists"}), (("0", "0", "1"), set())],
    ids=["gate", "joint"],
)
def test_masks_in_place_of_rows_change_nothing(joint, stages, idle):
    """Actions, values, advantages and the gradients of an update as a GPU computes them; nothing in it waits for a number."""
    g = joint("--stages", *stages, "--max-grad-norm", "1e9", "--num-minibatches", "4", "--gate-ent-coef", "0.1")
    agent = g["agent"]
    before, g["memories"][0] = clone(agent.state_dict()), 0.0
    kept = ("x", "chosen_by_step", "gate_logprobs", "actions", "logprobs", "values", "returns", "gate_values", "gate_returns")

    def again():
        agent.load_state_dict(before)
        torch.manual_seed(3)
        g["age"].zero_()
        for step in range(3):
            g["act"](step), g["remember"](step)
        g["estimate_advantages"]()
        loss, watched, *_ = g["update"]()
        return [g[name].clone() for name in kept], loss, watched, {n: p.grad for n, p in agent.named_parameters()}

    rows = again()
    with_fixed_shapes(g)
    with NothingWaits():
        masks = again()
    assert {name.split(".")[0] for name, gradient in rows[3].items() if gradient is None} == idle
    torch.testing.assert_close(masks, rows, atol=1e-5, rtol=1e-4)

    g["decided"][:] = False  # nothing to learn from
    loss, watched, *_ = g["update"]()
    assert torch.isfinite(loss) and not watched[5:].any()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in agent.parameters())


class Signs(Bandit):
    """One of three states for 20 bars, each of which rewards one action alone."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super(Bandit, self).reset(seed=seed)
        self.t, self.state = 0, int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.state], {}

    def step(self, action):
        self.t += 1
        return np.eye(3, dtype=np.float32)[self.state], float(action == self.state), False, self.t == 20, {}


@pytest.mark.parametrize("gate, every", [("options", "1"), ("options", "5"), ("mixture", "1")])
def test_the_gate_finds_out_who_is_good_at_what(inside, register, monkeypatch, gate, every):
    """Frozen specialists that each know one action: the gate learns to send every state to the one that is rewarded there."""
    options = [*register(Signs, gym.spaces.Discrete(3)), "--num-envs", "32", "--num-steps", "20", "--stages", "0", "1", "0"]
    options += ["--gate", gate, "--decide-every", every, "--total-timesteps", "25600", "--gate-learning-rate", "0.01"]
    zeros, made = torch.nn.init.zeros_, []

    def plant(bias):
        """The first three heads of three outputs after the critic's are the specialists': each prefers its own number."""
        zeros(bias)
        made.append(bias)
        heads = [b for b in made if len(b) == 3][1:4]
        with torch.no_grad():
            for k, head in enumerate(heads):
                head[k] = 8.0
        return bias

    monkeypatch.setattr(torch.nn.init, "zeros_", plant)
    g = inside(*options)
    agent = g["agent"]
    x, blank = agent.norm(torch.eye(3)), agent.blank(3)
    assert [actor[-1].bias.argmax().item() for actor in agent.specialists] == [0, 1, 2]
    p = agent.gate_log_probs(x, blank).exp()
    assert p.argmax(1).tolist() == [0, 1, 2] and p.diagonal().min() > 0.7, p


# --- what is reported


def test_usage_of_a_planted_gate(module):
    used = np.array([[0, 2], [0, 2], [1, 2], [1, -1], [0, -1]])
    best = np.array([[0, 2], [1, 2], [1, 0], [1, 0], [0, 0]])
    report = module.usage(used, NAMES, best)
    assert report["usage"] == {"trend": 3 / 8, "revert": 2 / 8, "event": 3 / 8}
    assert report["switches"] == pytest.approx(2 / 6) and report["run_length"] == pytest.approx(8 / 4)
    assert report["accuracy"] == pytest.approx(6 / 8)
    assert report["in_trend"] == {"trend": pytest.approx(2 / 3), "revert": 0.0, "event": pytest.approx(1 / 3)}
    assert report["in_revert"] == {"trend": pytest.approx(1 / 3), "revert": pytest.approx(2 / 3), "event": 0.0}
    assert report["in_event"] == {"trend": 0.0, "revert": 0.0, "event": 1.0}
    plain = module.usage(used, NAMES)
    assert plain == {name: report[name] for name in ("usage", "switches", "run_length")}
    assert module.flatten(plain)["usage_event"] == 3 / 8 and module.flatten(plain)["switches"] == report["switches"]


@pytest.fixture
def finished(base, inside, tmp_path):
    """Variables of the script after the short run."""
    return inside("--resume", str(shutil.copytree(base.folder, tmp_path / "copy")))


def test_a_gate_that_is_told_the_best_is_always_right_and_alone_means_alone(finished):
    g = finished
    best = g["best_intent"]
    _, _, report = g["backtest"]("val", best)
    every = g["args"].decide_every
    assert every == 3 and 0.95 < report["accuracy"] < 1.0  # a choice holds for three bars
    frame, book, report = g["backtest"]("val", np.full(len(best), 1))
    assert report["usage"] == {"trend": 0.0, "revert": 1.0, "event": 0.0} and report["switches"] == 0.0
    rows = frame.groupby("market").size()
    assert report["run_length"] == pytest.approx(rows.mean()) and len(book) == rows.max() and len(rows) == 2


def test_run_json_and_events_report_the_gate(script, base):
    reports, known = base.json["gate"], {"usage", "switches", "run_length", "accuracy", *(f"in_{name}" for name in NAMES)}
    assert set(reports) == {"train", "val", "test"} and all(set(r) <= known for r in reports.values())
    for report in reports.values():
        assert sum(report["usage"].values()) == pytest.approx(1) and 0 <= report["accuracy"] <= 1
    events = EventAccumulator(str(base.folder))
    events.Reload()
    tags = {"gate/accuracy", "gate/switches", "gate/run_length", *(f"gate/usage_{name}" for name in NAMES)}
    assert tags <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("charts/phase")] == [0.0] * 8 + [1.0] * 8 + [2.0] * 4
    assert re.search(rf"gate: accuracy +{reports['test']['accuracy']:.3f}\n", base.done.stdout)


def test_the_policy_of_a_backtest_remembers_as_in_training(finished):
    """Memory, clock and greedy choice of the policy, stepped by hand beside it."""
    g = finished
    agent, args, split = g["agent"], g["args"], g["splits"]["test"]
    with torch.no_grad():  # a gate that goes by its memory
        agent.gate[0].weight[:, g["obs_size"] :] *= 100.0
        agent.gate[-1].bias.zero_()
    followed = set()
    options = dict(data=g["data"], split=split, episode_length=0, random_start=False, num_threads=1)
    env = TradingVectorEnv(len(g["data"].runs(split)), **options)
    trace = []
    policy = g["make_policy"](trace)
    obs, infos = env.reset(seed=0)
    memory = agent.blank(env.num_envs)
    for t in range(40):
        x = agent.norm(torch.as_tensor(obs))
        with torch.no_grad():
            if t % args.decide_every == 0:
                who = agent.gate_log_probs(x, memory).argmax(1)
            expected = agent.log_probs(x, torch.as_tensor(infos["action_mask"]), who).argmax(1).numpy()
        action = policy(obs, infos["action_mask"], infos["row"])
        np.testing.assert_array_equal(action, expected)
        np.testing.assert_array_equal(trace[-1], [who.numpy(), infos["row"]])
        followed |= set(who.tolist())
        obs, reward, terminated, truncated, infos = env.step(action)
        policy.after(reward, terminated | truncated)
        memory = agent.remember(memory, who, args.reward_scale * torch.as_tensor(reward))
    assert memory[:, 0].abs().max() > 0 and len(followed) > 1
    policy.after(reward, np.array([True] + [False] * (env.num_envs - 1)))
    policy(obs, infos["action_mask"], infos["row"])
    assert (trace[-1][:, 0] == -1).all() and (trace[-1][:, 1:] >= 0).all()


def test_logged_actions_are_those_of_a_specialist_that_the_gate_chose_for_a_while(script, inside, tmp_path):
    """Of every five steps from an episode's start on, one and the same specialist explains all log-probabilities."""
    options = ["--env-id", "CartPole-v1", "--total-timesteps", "1024", "--decide-every", "5", "--learning-rate", "0.01"]
    g = inside(*options, "--log-dataset", str(tmp_path / "logs"), "--log-episodes", "30")
    (path,) = (tmp_path / "logs").glob("*/dataset.hdf5")
    with h5py.File(path) as file:
        obs, actions = (torch.as_tensor(file[name][:]) for name in ("observations", "actions"))
        logged, ends = file["infos/behavior_logprob"][:], file["dones"][:].astype(bool)
    agent = g["agent"]
    with torch.no_grad():
        every = agent.all_log_probs(agent.norm(obs), torch.ones((len(obs), 2), dtype=torch.bool))
    found = every.gather(2, actions.long()[:, None, None].expand(-1, 3, 1)).squeeze(2).numpy()
    explains = np.abs(found - logged[:, None]) < 1e-4
    assert explains.any(1).all() and 0.3 < explains.mean() < 0.6
    last = np.flatnonzero(ends)
    episodes = zip(np.append(0, last[:-1] + 1), last + 1)
    blocks = [range(a, min(a + 5, stop)) for start, stop in episodes for a in range(start, stop, 5)]
    who = np.array([explains[list(block)].all(0) for block in blocks])
    assert who.any(1).all() and (who.sum(0) > 5).all()


# --- on other markets


@pytest.mark.parametrize("specialists", ["modes", "intents"])
def test_bars_from_a_csv_file(script, inside, tmp_path, specialists):
    candles().to_csv(tmp_path / "bars.csv", index=False)
    options = ["--market", str(tmp_path / "bars.csv"), "--specialists", specialists, "--total-timesteps", "5120"]
    options += ["--train-fraction", "0.7", "--val-fraction", "0.15", "--embargo", "0"]
    run = Run(inside(*script.short, *options)["run_dir"])
    names = run.json["gate"]["test"]["usage"]
    assert list(run.json["scores"]["test"]) == ["agent", *(f"{name} alone" for name in names), "flat", "buy and hold"]
    assert "accuracy" not in run.json["gate"]["test"] and run.json["market"]["fill"] == "next_open"
    assert not (set(run.json["market"]["forecasts"]) ^ {"consensus", "dispersion", "hit_rate", "threshold"}) - {
        f"reason_{name}" for name in ("pass", "small", "dispersed", "missed", "no_data")
    }


def test_closes_from_a_csv_file_flat_and_without_consensus(script, inside, tmp_path):
    prices().to_csv(tmp_path / "closes.csv")
    options = ["--market", str(tmp_path / "closes.csv"), "--specialists", "flat", "--no-consensus"]
    run = Run(inside(*script.short, *options, "--total-timesteps", "4096")["run_dir"])
    assert list(run.json["scores"]["test"]) == ["agent", "flat", "buy and hold"] and run.json["market"]["forecasts"] == []
    assert run.json["gate"]["test"]["usage"] == {"flat": 1.0}
    first, last = run.model["optimizer"]["state"][6]["step"], run.model["optimizer"]["state"][0]["step"]
    assert first == last == 4 * 4  # the actor's weights moved in every update, as the critic's: there are no stages


def test_patience_counts_from_the_gates_stage_on(script, inside, capsys):
    """The specialists' stage is half of 20 iterations, without a better model in any, as no weight moves."""
    still = ["--learning-rate", "0", "--gate-learning-rate", "0", "--eval-every", "1", "--patience", "2"]
    g = inside(*script.short, *still, "--stages", "0.5", "0.5", "0")
    assert "stopped early" in capsys.readouterr().out and 12 <= g["iteration"] < 20


def test_a_split_without_a_symbol_is_said_before_the_training(script, complaint, tmp_path):
    wide = prices()
    wide.iloc[130:, 4], wide.iloc[:131, 5] = np.nan, np.nan  # gone before validation begins; listed then, and warm later
    wide.to_csv(tmp_path / "closes.csv")
    line = complaint(*script.short, "--market", str(tmp_path / "closes.csv"), "--symbols", "C4", "C5")
    assert "split 'val': no symbol to trade has a bar" in line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--stages", "0.5", "0.6", "0.1"], ("--stages 0.5 0.6 0.1", "sum to 1")),
        (["--stages", "1.5", "-0.5", "0"], ("--stages", "0 or more")),
        (["--gate-floor", "1"], ("--gate-floor 1.0", "below 1")),
        (["--gate", "mixture"], ("--decide-every 3", "expected 1", "mixture")),
        (["--decide-every", "0"], ("--decide-every 0", "at least 1")),
        (["--num-envs", "2", "--num-minibatches", "1"], ("--num-envs 2", "at least 3")),
        (["--specialists", "all"], ("--specialists", "modes", "intents", "flat")),
        (["--market", "synthetic:modes:regime_bars=1"], ("--specialists intents", "5 training bars in a row")),
        (["--env-id", "CartPole-v1", "--specialists", "modes"], ("--specialists modes", "CartPole-v1")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(word in line for word in words), line
