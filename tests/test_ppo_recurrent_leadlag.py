"""algos/ppo_recurrent_leadlag.py: what remembers, how it is trained over whole rollouts, and what it does not see."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import SCRIPTS, Run, prices

pytest_plugins = ["scripts"]
STEPS, MARKETS = 11, 6


@pytest.fixture
def script():
    return SCRIPTS["ppo_recurrent_leadlag"]


def make_agent(script, memory="lstm"):
    torch.manual_seed(0)
    return script.module.Agent(3, 4, memory, 5)


def rollout(agent, done, seed=1):
    """Observations (STEPS, MARKETS, 3), a first memory, and the features and last memory found step by step."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn((STEPS, MARKETS, 3), generator=rng)
    first = torch.randn((agent.parts, MARKETS, 5), generator=rng)
    memory, out = first.clone(), []
    for step in range(STEPS):
        features, memory = agent.remember(x[step : step + 1], memory)
        out.append(features[0])
        memory = torch.where(done[step][:, None], 0.0, memory)
    return x, first, torch.stack(out), memory


def endings(share=0.25, seed=0):
    """(STEPS, MARKETS) bool; market 0 never ends, 1 at every step, 2 at the first and the last."""
    done = torch.rand((STEPS, MARKETS), generator=torch.Generator().manual_seed(seed)) < share
    done[:, 0], done[:, 1], done[:, 2] = False, True, False
    done[[0, -1], 2] = True
    return done


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_whole_stretches_equal_single_steps(script, memory):
    """Of some of the markets, in the order of the indices that come with them, and with the same gradients."""
    agent, done = make_agent(script, memory), endings()
    x, first, expected, _ = rollout(agent, done)
    parts = script.module.stretches(done)
    chosen = parts[torch.isin(parts[:, 1], torch.tensor([0, 1, 2, 4]))]
    features, index = script.module.replay(agent, x.flatten(0, 1), first, chosen, MARKETS)
    assert sorted(index.tolist()) == [t * MARKETS + i for t in range(STEPS) for i in (0, 1, 2, 4)]
    torch.testing.assert_close(features, expected.flatten(0, 1)[index])
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    weights[:, [3, 5]] = 0.0
    found, wanted = (
        torch.autograd.grad((out * w).sum(), list(agent.memory.parameters()), retain_graph=True) if agent.parts else ()
        for out, w in ((features, weights.flatten(0, 1)[index]), (expected, weights))
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_the_steps_that_a_gpu_records_equal_whole_stretches(script, memory):
    """Of some of the markets, in any order, with episodes that end: features, a loss, and all of its gradients."""
    agent, done, module = make_agent(script, memory), endings(), script.module
    x, first, _, _ = rollout(agent, done)
    x, chosen, parts = x.requires_grad_(), torch.tensor([4, 1, 0, 2]), module.stretches(done)
    results = []
    for features, index in (
        module.replay(agent, x.flatten(0, 1), first, parts[torch.isin(parts[:, 1], chosen)], MARKETS),
        module.replay_steps(agent, x, first, done, chosen),
    ):
        features, index = features[index.argsort()], index.sort().values
        log_probs = agent.log_probs(features, index[:, None] % 7 != torch.arange(4))
        loss = (log_probs.exp() * index.sin()[:, None]).mean() + (agent.value(features) - index.cos()).square().mean()
        results.append([index, features, loss, *torch.autograd.grad(loss, [x, *agent.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert len(results[0][0]) == STEPS * 4 and all(gradient.any() for gradient in results[0][3:])


def test_stretches_are_the_unbroken_parts(script):
    done = endings()
    seen = np.zeros((STEPS, MARKETS), int)
    for first, market, steps in script.module.stretches(done).tolist():
        seen[first : first + steps, market] += 1
        assert first == 0 or done[first - 1, market]
        assert first + steps == STEPS or done[first + steps - 1, market]
        assert not done[first : first + steps - 1, market].any()
    assert (seen == 1).all()


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_nothing_leaks_across_a_reset_and_all_else_is_remembered(script, memory):
    agent, done = make_agent(script, memory), torch.zeros((STEPS, MARKETS), dtype=torch.bool)
    done[4, 3:] = True
    x, first, _, _ = rollout(agent, done)
    x, first = x.requires_grad_(), first.requires_grad_()
    parts = script.module.stretches(done)
    features, index = script.module.replay(agent, x.flatten(0, 1), first, parts, MARKETS)
    last = features[torch.isin(index, torch.arange((STEPS - 1) * MARKETS, STEPS * MARKETS))][:, 3:]  # without the observation
    to_x, to_first = torch.autograd.grad(last.sum(), (x, first))
    assert (to_x[:5, 3:] == 0).all() and (to_first[:, 3:] == 0).all()
    assert (to_x[5:].abs().sum(2) > 0).all() and (to_x[:5, :3].abs().sum(2) > 0).all() and (to_first[:, :3] != 0).any(2).all()


class Recall(gym.Env):
    """A cue, 0 or 1, at the first of five steps; the last action earns 1 where it repeats it."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 1.0], np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 5
        return np.array([0.0, 1 - self.t / 5], np.float32), float(over and action == self.cue), over, False, {}


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_recalls_what_is_no_longer_seen(inside, register, memory):
    """At the end of training and of its own evaluation, which must reset and carry the memory as training does."""
    options = [*register(Recall, gym.spaces.Discrete(2)), "--memory", memory, "--hidden", "16", "--num-envs", "16"]
    options += ["--num-steps", "40", "--total-timesteps", "32000", "--learning-rate", "0.005", "--reward-scale", "1"]
    g = inside(*options, "--gamma", "0.99", "--gae-lambda", "0.95", "--update-epochs", "4", "--eval-episodes", "160")
    found = g["run"]["eval_return"]
    assert abs(found - 0.5) < 0.2 if memory == "none" else found > 0.95, found


def test_the_agent_sees_only_what_it_is_given(inside):
    g = inside("--env-id", "CartPole-v1", "--observed", "0", "2", "--total-timesteps", "512")
    assert g["obs_size"] == 2 and Run(g["run_dir"]).json["args"]["observed"] == [0, 2]
    first, _ = g["make_envs"](g["args"], None, None, 1).reset(seed=1)
    np.testing.assert_array_equal(g["see"](first), first[:, [0, 2]])


def test_bad_entries_are_named(script, complaint):
    line = complaint("--env-id", "CartPole-v1", "--observed", "0", "4")
    assert "--observed 0 4" in line and "0 to 3" in line
    assert "--observed 1" in complaint(*script.short, "--observed", "1")


def test_the_memory_goes_on_from_rollout_to_rollout(script, inside):
    """Features of a second rollout are those of all steps since the last reset, which comes in the middle of it."""
    options = [*script.short, "--episode-length", "20", "--learning-rate", "0", "--total-timesteps", "2048"]
    g = inside(*options)
    agent, x = g["agent"], g["x"][:-1]
    assert g["first_state"].abs().min() > 0 and g["done"].any(dim=0).all()  # 16 steps into episodes of 20
    memory = g["first_state"]
    for step in range(len(x)):
        features, memory = agent.remember(x[step : step + 1], memory)
        torch.testing.assert_close(features[0], g["features"][step])
        memory = torch.where(g["done"][step][:, None], 0.0, memory)
    torch.testing.assert_close(memory, g["state"])


def test_closes_from_a_csv_file_without_memory(script, inside, tmp_path):
    prices().to_csv(tmp_path / "closes.csv")
    options = ["--market", str(tmp_path / "closes.csv"), "--max-lookback", "30", "--memory", "none"]
    run = Run(inside(*script.short, *options, "--total-timesteps", "4096")["run_dir"])
    assert run.json["market"]["fill"] == "next_close" and not [key for key in run.model["model"] if "memory" in key]
