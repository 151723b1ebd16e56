"""Masked actions in the PPO scripts that have them: never drawn, without probability, and the others in their proportions."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from scripts import SCRIPTS, Bandit

pytest_plugins = ["scripts"]


@pytest.fixture(params=["ppo_leadlag", "ppo_recurrent_leadlag", "ppo_transformer_trading"])
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture
def masked(script, inside):
    """Run one iteration in which no weight moves; returns its variables, and the masks (steps, envs, A) of its actions."""

    def call():
        twist = [*script.twist, "--episode-length", "9", "--num-minibatches", "1", "--learning-rate", "0"]
        g = inside(*script.short, *twist, "--total-timesteps", "1024")
        first = script.make_envs(g).reset(seed=g["args"].seed)[1]["action_mask"]  # the script has moved on from its row 0
        masks = torch.cat([torch.as_tensor(first)[None], g["masks"][1:-1]])
        assert not masks.all() and masks.any(dim=2).all() and 0.2 < masks.float().mean() < 0.9
        return g, masks

    return call


def test_masked_actions_are_never_sampled_and_have_no_entropy(script, masked):
    """The others are drawn as often as their probabilities say."""
    g, masks = masked()
    actions = g["actions"].cpu()
    assert masks.gather(2, actions[..., None]).all()
    with torch.no_grad():
        logits = g["agent"].actor(g[script.actor_input][:-1]).double().cpu().numpy()
    entropy, expected = 0.0, np.zeros(masks.shape[2])
    for row, allowed in zip(logits.reshape(-1, logits.shape[2]), masks.flatten(0, 1).numpy()):
        p = np.exp(row[allowed]) / np.exp(row[allowed]).sum()
        entropy -= (p * np.log(p)).sum() / masks[..., 0].numel()
        expected[allowed] += p
    assert g["losses"]["entropy"] == pytest.approx(entropy, rel=1e-5)
    counts = np.bincount(actions.flatten(), minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0 and chisquare(counts[possible], expected[possible]).pvalue > 1e-3, (counts, expected)


@pytest.mark.parametrize("number, first", [(0.0, True), (1 - 2**-24, False)], ids=["least", "greatest"])
def test_the_first_or_last_allowed_action_at_the_ends_of_the_unit_interval(masked, monkeypatch, number, first):
    """The least and the greatest number that torch.rand can return, in every draw of the rollout."""
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.full(shape, number, device=device))
    g, masks = masked()
    places = torch.arange(masks.shape[2]).expand(masks.shape)
    expected = places.where(masks, 99).amin(2) if first else places.where(masks, -1).amax(2)
    assert torch.equal(g["actions"].cpu(), expected)
    assert len(expected.unique()) > 1 or (first and masks[..., 0].all())  # an order that is always allowed is always the first


def test_log_probs_are_those_of_the_allowed_actions(script):
    torch.manual_seed(0)
    sizes = {"obs": torch.zeros(1, 4), "mask": torch.zeros(1, 6), "args": {"memory": "gru", "hidden": 5}}
    agent = script.make_agent(script.module, sizes)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)  # far from uniform
    x, mask = torch.randn(500, agent.actor[0].in_features), torch.rand(500, 6) < 0.5
    recurrent = hasattr(agent, "remember")
    mask[:, 2] = True
    log_probs = agent.log_probs(x, mask)
    assert (log_probs.exp()[~mask] == 0).all() and ((log_probs.exp() * log_probs)[~mask] == 0).all()
    for row, allowed, found in zip(agent.actor(x), mask, log_probs):
        torch.testing.assert_close(found[allowed], row[allowed].log_softmax(0))
    obs = torch.randn(500, 4)
    features, _ = script.features(agent, obs, script.blank(agent, 500))  # the normaliser has seen nothing yet
    greedy = agent.act_greedily(obs, mask, *([script.blank(agent, 500)] * recurrent))
    greedy = greedy[0] if isinstance(greedy, tuple) else greedy
    torch.testing.assert_close(greedy, agent.log_probs(features, mask).argmax(1))
    assert mask.gather(1, greedy[:, None]).all()
    loss = log_probs.masked_fill(~mask, 0).sum() - (log_probs.exp() * log_probs).sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in agent.actor.parameters())


def test_sampling_follows_the_softmax(inside, script, register):
    """A bandit after some training, so that its actions are far from equally likely: frequencies of one rollout."""
    g = inside(
        *register(Bandit, script.toy), "--num-envs", "8", "--num-steps", "512", "--total-timesteps", str(4 * 4096),
        "--learning-rate", "0.0015", "--no-anneal-lr", "--gamma", "0", "--update-epochs", "4", "--num-minibatches", "4",
        "--ent-coef", "0.01", *(["--memory", "none"] if script.name.startswith("ppo_recurrent") else []),
    )  # fmt: skip
    actions, logprobs = g["actions"].flatten().cpu().numpy(), g["logprobs"].flatten().double().cpu().exp().numpy()
    counts = np.bincount(actions, minlength=3)
    p = np.array([logprobs[actions == a].mean() for a in range(3)])
    assert counts.min() > 40 and p.max() > 3 * p.min(), (counts, p)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3, (counts, p)
