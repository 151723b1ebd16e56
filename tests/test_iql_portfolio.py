"""algos/iql_portfolio.py: its losses, gradients and targets against a literal computation."""

import copy

import pytest
import torch
from offline_cases import CASES, assert_gradients, network, rows_of, shake, toy
from torch.distributions import Categorical, Normal

pytest_plugins = ["scripts", "offline_cases"]


@pytest.fixture
def script():
    return CASES["iql_portfolio, continuous"]


@pytest.mark.parametrize("discrete, norm_adv", [(False, False), (False, True), (True, True)])
def test_losses_gradients_and_targets(inside, tmp_path, discrete, norm_adv):
    """Of an update on all rows, among them terminal and timed-out ones, by the formulas of the paper, network by network."""
    data = toy(tmp_path / "toy" / "dataset.hdf5", discrete, masked=discrete)
    options = ["--gradient-steps", "1", "--batch-size", "8", "--hidden", "16", "--max-grad-norm", "1e9"]
    options += ["--norm-adv" if norm_adv else "--no-norm-adv", "--actor-tau", "0.5"]
    g = inside("--dataset", str(data), *options, "--expectile", "0.8", "--beta", "30", "--gamma", "0.7", "--tau", "0.3")
    agent, args = g["agent"], g["args"]
    shake(agent)
    old, rows = copy.deepcopy(agent), {key: value for key, value in rows_of(data).items() if key in g["keys"]}
    assert 0 < rows["terminals"].sum() < 40
    logged = dict(zip(g["LOGGED"], g["update"](g["to_tensors"](rows, agent, "cpu")).tolist(), strict=True))

    observe = lambda key: ((torch.tensor(rows[key]) - old.obs_mean) * old.obs_scale).clamp(-10, 10)  # noqa: E731
    x, next_x, action = observe("observations"), observe("next_observations"), torch.tensor(rows["actions"])
    if discrete:
        values = lambda mlp: [network(mlp, k, x)[torch.arange(len(x)), action] for k in (0, 1)]  # noqa: E731
        logits = network(old.actor, 0, x).masked_fill(~torch.tensor(rows["infos/action_mask"]), -torch.inf)
        log_prob = Categorical(logits=logits).log_prob(action)
    else:
        action = ((action - old.low) / (old.high - old.low) * 2 - 1).clamp(-1, 1)
        values = lambda mlp: [network(mlp, k, torch.cat([x, action], 1)).squeeze(1) for k in (0, 1)]  # noqa: E731
        log_prob = Normal(network(old.actor, 0, x).tanh(), old.log_std.clamp(-5, 2).exp()).log_prob(action).sum(1)
    q, value, next_value = torch.minimum(*values(old.target)), network(old.value, 0, x), network(old.value, 0, next_x)
    advantage = q.detach() - value.squeeze(1)
    size = old.size + 0.01 * (advantage.detach().abs().mean() - old.size) if norm_adv else 1.0
    weight = (30 * advantage.detach() / size).exp().clamp(max=100)
    target = g["reward_scale"] * torch.tensor(rows["rewards"])
    target = target + 0.7 * torch.where(torch.tensor(rows["terminals"]) == 1, 0, next_value.detach().squeeze(1))
    losses = {
        "actor_loss": -(weight * log_prob).mean(),
        "value_loss": torch.where(advantage > 0, 0.8, 0.2).mul(advantage**2).mean(),
        "critic_loss": sum((prediction - target).square().mean() for prediction in values(old.critic)) / 2,
    }
    expected = losses | {"q": q.mean(), "value": value.mean(), "capped": (weight >= 100).float().mean()}
    assert 0.01 < expected["capped"] < 0.99
    for name in expected:
        assert logged[name] == pytest.approx(expected[name].item(), rel=1e-4), name
    for loss, networks in (("actor_loss", "actor"), ("value_loss", "value"), ("critic_loss", "critic")):
        assert_gradients(agent, (old, losses[loss]), networks)
    for new, before, critic in zip(agent.target.parameters(), old.target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(new, before + args.tau * (critic - before))
    for new, before, actor in zip(agent.steady.parameters(), old.steady.parameters(), agent.actor.parameters()):
        torch.testing.assert_close(new, before + 0.5 * (actor - before))


@pytest.mark.parametrize("options", [["--beta", "-1"], ["--expectile", "1"], ["--tau", "0"], ["--actor-tau", "1.5"]])
def test_bad_input_is_named(complaint, options):
    line = complaint(*options)
    assert f"{options[0]} {options[1]}" in line and "expected" in line
