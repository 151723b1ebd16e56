"""algos/bc_portfolio.py: likelihoods against torch's, agreement with a teacher, and the best episodes."""

import copy

import numpy as np
import pytest
import torch
from offline_cases import CASES, assert_gradients, network, rows_of, shake, toy, write_foreign
from torch.distributions import Categorical, Normal

from envs.dataset import Dataset

pytest_plugins = ["scripts", "offline_cases"]


@pytest.fixture
def script():
    return CASES["bc_portfolio, continuous"]


@pytest.mark.parametrize("discrete", [False, True])
def test_the_loss_is_the_negative_log_likelihood(inside, tmp_path, discrete):
    data = toy(tmp_path / "toy" / "dataset.hdf5", discrete, masked=discrete)
    options = ["--gradient-steps", "1", "--batch-size", "8", "--hidden", "16", "--max-grad-norm", "1e9"]
    g = inside("--dataset", str(data), *options)
    agent, rows = g["agent"], rows_of(data)
    shake(agent)
    old = copy.deepcopy(agent)
    batch = g["to_tensors"]({key: rows[key] for key in g["keys"]}, agent, "cpu")
    held_out = g["evaluate"](batch)
    (logged,) = g["update"](batch).tolist()
    x, action = (torch.tensor(rows["observations"]) - old.obs_mean) * old.obs_scale, torch.tensor(rows["actions"])
    out = network(old.actor, 0, x)
    if discrete:
        out = out.masked_fill(~torch.tensor(rows["infos/action_mask"]), -torch.inf)
        log_prob, agreement = Categorical(logits=out).log_prob(action), out.argmax(1) == action
    else:
        assert (rows["actions"].max(axis=0) <= 1).all()
        action = 2 * (action - old.low) / (old.high - old.low) - 1
        log_prob = Normal(out.tanh(), old.log_std.exp()).log_prob(action).sum(1)
        agreement = (out.tanh() - action).abs() <= 0.1
    assert logged == held_out["nll"] == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    assert held_out["agreement"] == pytest.approx(agreement.float().mean().item())
    assert 0 < held_out["agreement"] < 1
    assert_gradients(agent, (old, -log_prob.mean()), "actor" if discrete else ("actor", "log_std"))


@pytest.mark.parametrize("discrete", [False, True])
def test_it_agrees_with_a_deterministic_teacher(inside, tmp_path, discrete):
    """On held-out episodes."""
    rng = np.random.default_rng(0)
    obs, weight = rng.normal(size=(4000, 3)).astype(np.float32), rng.normal(size=(3, 3 if discrete else 2))
    actions = (obs @ weight).argmax(axis=1) if discrete else 0.5 * np.tanh(obs @ weight).astype(np.float32)
    data = write_foreign(tmp_path / "data.hdf5", discrete, rows=4000, observations=obs, actions=actions)
    options = ["--gradient-steps", "500", "--batch-size", "128", "--hidden", "32", "--learning-rate", "3e-3"]
    held_out = inside("--dataset", str(data), *options)["run"]["offline"]["held_out"]
    assert held_out["agreement"] >= 0.85


def test_the_best_episodes_are_those_with_the_largest_sums(script, tmp_path):
    """Of rewards, over several blocks of the file and episodes of any length; in the order of the file."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 80, size=90)
    ends = np.zeros(lengths.sum(), np.float32)
    ends[np.cumsum(lengths) - 1] = 1
    rewards = rng.normal(size=len(ends)).astype(np.float32)
    data = Dataset(write_foreign(tmp_path / "d.hdf5", True, rows=len(ends), terminals=ends, rewards=rewards))
    sums = [part.astype(float).sum() for part in np.split(rewards, np.cumsum(lengths)[:-1])]
    some = np.arange(3, 90, 2)  # 44
    for percent, count in ((100, 44), (25, 11), (10, 4), (0.1, 1)):
        expected = sorted(sorted(some, key=lambda episode: -sums[episode])[:count])
        assert script.module.best_episodes(data, some, percent).tolist() == expected


def test_only_the_best_episodes_are_learned_from(inside, tmp_path):
    """Two kinds of episodes, of action 0 and of action 2; only the second pays."""
    kind = np.repeat(np.arange(100) % 10 == 0, 20)
    actions, rewards = np.where(kind, 2, 0), np.where(kind, 0.1, 0.0).astype(np.float32)
    data = write_foreign(tmp_path / "d.hdf5", True, rows=2000, actions=actions, rewards=rewards)
    options = ["--dataset", str(data), "--gradient-steps", "60", "--batch-size", "32", "--hidden", "16"]
    every, best = (inside(*options, *own) for own in ([], ["--top-percent", "10"]))
    obs = torch.randn(50, 3)
    assert not every["agent"].act(obs, None).any() and (best["agent"].act(obs, None) == 2).all()
    assert len(best["train"]) == 9 and len(best["held_out"]) == 1


@pytest.mark.parametrize("percent", ["0", "101"])
def test_a_bad_share_is_named(complaint, percent):
    line = complaint("--top-percent", percent)
    assert f"--top-percent {percent}" in line and "above 0 and at most 100" in line
