"""algos/pearl_portfolio.py: what it alone does: encoders, what teaches whom, where contexts come from, what is reported."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from offline_cases import assert_gradients
from scipy.stats import norm
from scripts import SCRIPTS, Run, Toy, assert_same_content
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

from envs import portfolio_references
from envs.adaptation import adaptation_report
from envs.costs import RUIN
from envs.features import REGIMES
from envs.portfolio_tables import PortfolioData
from envs.probe import linear_probe
from envs.tasks import halves

pytest_plugins = ["scripts"]

ENCODERS = ("product", "gru", "attention")
TINY = ("--gradient-steps", "4", "--batch-size", "8", "--hidden", "16", "--latent", "3")


@pytest.fixture
def script():
    return SCRIPTS["pearl_portfolio"]


@pytest.fixture
def make_agent(script):
    """An agent of 4 observations and 2 actions, for contexts of up to 12 steps, whose weights are not those it begins with."""

    def call(encoder="product", obs_size=4, num_actions=2):
        torch.manual_seed(0)
        agent = script.module.Agent(obs_size, num_actions, 12, script.module.Args(encoder=encoder, hidden=16, latent=3))
        shake(agent)
        return agent

    return call


def shake(agent):
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


# --- inference


def test_the_posterior_is_the_normalised_product_of_densities(script):
    """Prior and factors multiplied on a grid."""
    means, precisions = torch.tensor([[0.5], [-2.0], [1.5]])[None], torch.tensor([[2.0], [0.25], [0.0]])[None]
    mean, variance = script.module.posterior(means.double(), precisions.double())
    z = np.linspace(-12, 12, 200_001)
    density = norm.pdf(z) * norm.pdf(z, 0.5, np.sqrt(1 / 2)) * norm.pdf(z, -2.0, 2.0)
    density /= density.sum()
    assert mean.shape == variance.shape == (1, 1)
    assert mean.item() == pytest.approx(density @ z, abs=1e-9) == pytest.approx((2 * 0.5 - 0.25 * 2) / 3.25)
    assert variance.item() == pytest.approx(density @ (z - density @ z) ** 2, abs=1e-9) == pytest.approx(1 / 3.25)


def test_without_factors_the_posterior_is_the_prior_and_many_weigh_more_than_few(script):
    mean, variance = script.module.posterior(torch.randn(2, 3, 4), torch.zeros(2, 3, 4))
    assert not mean.any() and (variance == 1).all()
    few, many = (script.module.posterior(torch.ones(1, n, 1), torch.ones(1, n, 1)) for n in (1, 9))
    assert few[0].item() == 0.5 and few[1].item() == 0.5 and many[0].item() == pytest.approx(0.9)


def test_the_divergence_is_that_of_normals(script):
    torch.manual_seed(0)
    mean, variance = torch.randn(7, 3), torch.rand(7, 3) + 0.1
    prior = Independent(Normal(torch.zeros(7, 3), torch.ones(7, 3)), 1)
    expected = kl_divergence(Independent(Normal(mean, variance.sqrt()), 1), prior)
    torch.testing.assert_close(script.module.divergence(mean, variance), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_order_of_a_context_matters_to_the_gru_only(make_agent, encoder):
    agent, context = make_agent(encoder), torch.randn(5, 12, 11)
    count, shuffled = torch.full((5,), 12), context[:, torch.randperm(12)]
    for found, again in zip(agent.infer(context, count), agent.infer(shuffled, count)):
        assert torch.allclose(found, again, atol=1e-5) == (encoder != "gru")
        assert not torch.allclose(found, agent.infer(context + 1.0, count)[0], atol=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_only_the_steps_that_are_known_count(make_agent, encoder):
    """Nothing after them changes the posterior; without any it is the prior, exactly; each task has its own number."""
    agent, context, count = make_agent(encoder), torch.randn(4, 12, 11), torch.tensor([0, 1, 7, 12])
    mean, variance = agent.infer(context, count)
    assert not mean[0].any() and (variance[0] == 1).all() and mean[1:].any(dim=1).all() and (variance[1:] < 1).all()
    noise = context.clone()
    for n, known in enumerate(count):
        noise[n, known:] = 100 * torch.randn_like(noise[n, known:])
    for found, again in zip((mean, variance), agent.infer(noise, count)):
        torch.testing.assert_close(found, again, atol=1e-6, rtol=0)
    for n, known in enumerate(count[1:], start=1):
        alone = agent.infer(context[n : n + 1, :known], known[None])
        torch.testing.assert_close(alone[0][0], mean[n], atol=1e-5, rtol=1e-5)
    assert not any(part.requires_grad for part in agent.infer(context[:1], count[:1])[:0])


def test_a_factor_of_the_product_is_that_of_its_step_alone(make_agent):
    agent, context = make_agent("product"), torch.randn(1, 3, 11)
    mean, variance = agent.infer(context, torch.tensor([3]))
    each = [agent.infer(context[:, n : n + 1], torch.tensor([1])) for n in range(3)]
    precisions = torch.cat([1 / v - 1 for _, v in each])  # less the prior's
    means = torch.cat([m / v for m, v in each]) / precisions
    torch.testing.assert_close(1 / variance[0], 1 + precisions.sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean[0], (precisions * means).sum(0) / (1 + precisions.sum(0)), rtol=1e-4, atol=1e-5)


def test_attention_weighs_the_steps_that_are_known(make_agent):
    agent, context = make_agent("attention"), torch.randn(3, 12, 11)
    weights, values = agent.encoder.attend(context, torch.tensor([1, 5, 12]))
    assert weights.shape == (3, 4, 12) and values.shape == (3, 12, 4, 4)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, 4))
    assert not weights[0, :, 1:].any() and not weights[1, :, 5:].any() and (weights[2] > 0).all()
    assert not torch.allclose(weights[2, 0], weights[2, 1], atol=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_fresh_posterior_of_a_whole_context_is_narrow(script, encoder):
    """So that critics can tell tasks apart, and the encoder learn from them."""
    torch.manual_seed(0)
    agent = script.module.Agent(4, 2, 500, script.module.Args(hidden=64, encoder=encoder))
    _, variance = agent.infer(0.1 * torch.randn(8, 500, 11), torch.full((8,), 500))
    assert ((variance > 1e-4) & (variance < 0.01)).all()


# --- the policy, and what teaches whom


def test_log_probabilities_are_those_of_a_normal_through_tanh(make_agent):
    agent = make_agent().double()
    x, z = torch.randn(300, 4, dtype=torch.float64), torch.randn(300, 3, dtype=torch.float64)
    torch.manual_seed(1)
    action, logprob = agent.sample(x, z)
    mean, log_std = agent.policy(x, z)
    expected = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1)), 1)
    inside = (action.abs() < 0.999).all(dim=1)
    torch.testing.assert_close(logprob[inside], expected.log_prob(action)[inside], rtol=1e-9, atol=1e-9)
    torch.manual_seed(1)
    torch.testing.assert_close(action, (mean + log_std.exp() * torch.randn_like(mean)).tanh())
    assert log_std.min() > -5 and log_std.max() < 2 and inside.sum() > 200
    obs = torch.randn(300, 4, dtype=torch.float64)
    likely = agent.act(obs, z, explore=False)
    torch.testing.assert_close(likely, agent.policy(agent.norm(obs), z)[0].tanh())
    assert not torch.allclose(agent.act(obs, z, explore=True), likely, atol=1e-3)


def test_the_actor_does_not_teach_the_encoder_nor_the_critics(script, make_agent):
    """Nor do the critics teach the actor; they do teach the encoder."""
    agent = make_agent()
    x, context, count = torch.randn(6, 4), torch.randn(6, 12, 11), torch.full((6,), 9)
    mean, variance = agent.infer(context, count)
    z = mean + variance.sqrt() * torch.randn_like(mean)
    action, logprob = agent.sample(x, z)
    q = script.module.q_values(agent.critic, x, z.detach(), action, frozen=True).amin(dim=0)
    names, parameters = zip(*agent.named_parameters())
    gradients = torch.autograd.grad((0.2 * logprob - q).sum(), parameters, retain_graph=True, allow_unused=True)
    taught = {name.split(".")[0] for name, gradient in zip(names, gradients) if gradient is not None and gradient.any()}
    assert taught == {"actor"}
    q = script.module.q_values(agent.critic, x, z, action.detach())
    gradients = torch.autograd.grad(q.square().mean(), parameters, allow_unused=True)
    taught = {name.split(".")[0] for name, gradient in zip(names, gradients) if gradient is not None and gradient.any()}
    assert taught == {"critic", "encoder"}
    twins = script.module.q_values(agent.critic, x, z, action)
    assert twins.shape == (2, 6) and not torch.allclose(twins[0], twins[1], atol=1e-2)


MARKET = "synthetic:merton:drift=-0.003|0.003:vol=0.03:bars=300:train=3:val=2:test=3"


@pytest.mark.parametrize("encoder, autotune", [("product", True), ("gru", True), ("attention", False)])
def test_losses_gradients_and_targets(script, inside, encoder, autotune):
    """Of one update, by the formulas of the paper, from the same random numbers: rewards and values of the next step, not
    where an account was ruined; the least of the targets' twins; divergence; temperature; a step of the targets."""
    options = ["--market", MARKET, "--num-envs", "3", "--episode-length", "32", "--episodes", "2", "--total-timesteps", "384"]
    options += [
        "--encoder",
        encoder,
        "--heads",
        "2",
        "--gamma",
        "0.7",
        "--tau",
        "0.3",
        "--max-grad-norm",
        "1e9",
        "--alpha",
        "0.3",
    ]
    options += ["--meta-batch", "5", "--kl-coef", "0.25", "--reward-scale", "30", "--autotune" if autotune else "--no-autotune"]
    g = inside(*options, *TINY, "--alpha", "0.3")
    agent, replay, module = g["agent"], g["replay"], script.module
    shake(agent)
    replay["terminated"][:, ::3] = 1.0  # so that it matters
    old, target = copy.deepcopy(agent), copy.deepcopy(g["target"])
    torch.manual_seed(3)
    logged = dict(zip(module.LOGGED, g["update"]().tolist(), strict=True))

    torch.manual_seed(3)
    picked = torch.randint(3, (5,))
    at = (torch.rand((5, 8)) * g["written"][picked, None]).long()
    count = (torch.rand(5) * (g["known"][picked] + 1)).long()
    rows = {name: torch.cat([values[task][i] for task, i in zip(picked, at)]) for name, values in replay.items()}
    assert rows["terminated"].any() and not rows["terminated"].all() and (g["known"] == 64).all() and 0 < count.max() <= 64
    mean, variance = old.infer(g["contexts"][picked], count)
    z = (mean + variance.sqrt() * torch.randn_like(mean)).repeat_interleave(8, dim=0)
    x, next_x, alpha = old.norm(rows["obs"]), old.norm(rows["next_obs"]), old.log_alpha.exp()

    def twins(critic, x, z, action):
        layers = list(zip(critic.weights, critic.biases))
        for k in (0, 1):
            hidden = torch.cat([x, z, action], dim=1)
            for weight, bias in layers[:-1]:
                hidden = (hidden @ weight[k] + bias[k]).relu()
            yield (hidden @ layers[-1][0][k] + layers[-1][1][k]).squeeze(1)

    next_action, next_logprob = old.sample(next_x, z)
    next_value = torch.minimum(*twins(target, next_x, z, next_action)) - alpha * next_logprob
    goal = 30 * rows["rewards"][:, 0] + 0.7 * torch.where(rows["terminated"][:, 0] == 1, 0, next_value)
    critic_loss = sum((q - goal.detach()).square().mean() for q in twins(old.critic, x, z, rows["actions"]))
    kl = module.divergence(mean, variance).mean()
    action, logprob = old.sample(x, z)
    actor_loss = (alpha.detach() * logprob - torch.minimum(*twins(old.critic, x, z.detach(), action))).mean()
    alpha_loss = (alpha * (-logprob.detach() + 1.0)).mean()  # one action: an entropy of -1
    found = {"actor_loss": actor_loss, "critic_loss": critic_loss, "kl": kl, "alpha_loss": alpha_loss, "alpha": alpha}
    found |= {"entropy": -logprob.mean(), "q": torch.stack([*twins(old.critic, x, z, rows["actions"])]).mean()}
    for name, value in found.items():
        assert logged[name] == pytest.approx(value.item(), rel=2e-4, abs=1e-5), name
    assert_gradients(agent, (old, actor_loss), "actor")
    assert_gradients(agent, (old, critic_loss), "critic")
    assert_gradients(agent, (old, critic_loss + 0.25 * kl), "encoder")
    if autotune:
        assert_gradients(agent, (old, alpha_loss), "log_alpha")
    assert torch.equal(agent.log_alpha, old.log_alpha) != autotune
    for new, before, critic in zip(g["target"].parameters(), target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(new, before + 0.3 * (critic - before))
        assert not torch.equal(critic, before)


# --- where contexts come from, and what is learned from


def test_contexts_come_from_first_parts_and_what_is_learned_from_the_rest(inside):
    """Told by the prices' features, which no two bars share. Actions and rewards of a context are those of its own bars."""
    options = ["--market", MARKET, "--num-envs", "3", "--episode-length", "32", "--episodes", "2", "--total-timesteps", "1152"]
    g = inside(*options, *TINY, "--adapt-share", "0.6")
    data, features = g["data"], g["data"].layout["assets"]
    place = {row.tobytes(): t for t, row in enumerate(data.assets)}
    assert g["iteration"] == 3 and len(data.assets) - len(place) == 7  # the first bars of the 8 histories, which decide nothing
    for task, (start, stop) in enumerate(g["splits"]["train"].ranges):
        assert g["written"][task] == 3 * 64 and g["known"][task] == 64
        seen = [place[row.tobytes()] for row in g["contexts"][task, :64, features].numpy()]
        learned = [place[row.tobytes()] for row in g["replay"]["obs"][task, : 3 * 64, features].numpy()]
        after = [place[row.tobytes()] for row in g["replay"]["next_obs"][task, : 3 * 64, features].numpy()]
        cut = start + round(0.6 * (stop - start))
        assert start <= min(seen) and max(seen) < cut <= min(learned) and max(after) < stop
        assert (np.array(after) == np.array(learned) + 1).all()
        obs, action, reward, next_obs = g["contexts"][task].split([25, 1, 1, 25], dim=1)
        weight = (0.5 * 5 * action[:, 0]).clamp(-2, 2)  # half of the score, which is 5 at most, within the gross cap
        ordered = next_obs[:, data.layout["weights"]][:, 0] - next_obs[:, data.layout["drift"]][:, 0]
        last = torch.tensor([t + 1 == cut - 1 or n % 32 == 31 for n, t in enumerate(seen)])
        np.testing.assert_allclose(ordered[~last], weight[~last], atol=1e-5)
        assert (next_obs[:-1][~last[:-1]] == obs[1:][~last[:-1]]).all() and reward.abs().max() < 0.5


def test_what_held_out_tasks_are_scored_on_is_in_no_context(inside):
    """Other prices in the scored parts: the same contexts and posteriors, other scores. In the first parts: all is other."""
    options = ["--market", MARKET, "--num-envs", "3", "--episode-length", "32", "--episodes", "2", "--total-timesteps", "384"]
    g = inside(*options, *TINY)
    panel, state = g["panel"], torch.get_rng_state()
    base = g["adaptation"]("test")
    rng = np.random.default_rng(0)
    for part, same in ((1, True), (0, False)):
        shaken = {name: values.copy() for name, values in panel.fields.items()}
        for start, stop in halves(g["splits"]["test"])[part].ranges:
            factor = np.exp(np.cumsum(0.1 * rng.standard_normal((stop - start, 1)), axis=0))
            for name in ("open", "high", "low", "close"):
                shaken[name][start:stop] *= factor
        g["env_options"]["data"] = PortfolioData(replace(panel, **shaken), g["data"].config)
        torch.set_rng_state(state)
        found = g["adaptation"]("test")
        for n in (2, 3, 4):  # posteriors and contexts
            assert torch.equal(found[n], base[n]) == same
        assert (found[0] != base[0]).any(axis=0).all()


def test_adaptation_by_hand(inside):
    """Stage by stage: the posterior of the episodes so far, and the growth of its mean on the second parts."""
    options = ["--market", MARKET, "--num-envs", "3", "--episode-length", "32", "--episodes", "2", "--total-timesteps", "384"]
    g = inside(*options, *TINY)
    agent, panel = g["agent"], g["panel"]
    scores, completed, means, variances, context, count, truth = g["adaptation"]("test")
    assert scores.shape == completed.shape == (3, 3) and means.shape == variances.shape == (3, 3, 3)
    assert not means[0].any() and (variances[0] == 1).all() and count.tolist() == [64] * 3
    for stage in (1, 2):
        mean, variance = agent.infer(context, torch.full((3,), 32 * stage))
        torch.testing.assert_close(means[stage], mean)
        torch.testing.assert_close(variances[stage], variance)
        _, later = halves(g["splits"]["test"])

        def policy(obs, *_, z=mean):
            x = agent.norm(torch.as_tensor(obs))
            return 5 * agent.actor(torch.cat([x, z], dim=1))[0, :, :1].tanh().detach().numpy()

        frame = portfolio_references.run(g["data"], later, policy, reward_weights=None)
        for task, part in frame.groupby("market"):
            growth = np.log1p(part["net_return"]).mean() * panel.bars_per_year
            assert scores[task, stage] == pytest.approx(growth, rel=1e-5, abs=1e-7)
            assert completed[task, stage] == (part["equity"].min() > RUIN)
    drifts = [panel.hidden["expected_return"][start, 0] for start, _ in g["splits"]["test"].ranges]
    assert truth["drift"].tolist() == pytest.approx(drifts)


def test_the_report_is_of_the_test_tasks_and_printed(script, base, inside, tmp_path, capsys):
    g = inside("--resume", str(shutil.copytree(base.folder, tmp_path / "copy")))
    out, run = capsys.readouterr().out, json.loads((tmp_path / "copy" / "run.json").read_text())
    assert run["adaptation"] == base.json["adaptation"] and run["latent"] == base.json["latent"]
    returns = g["returns"]
    assert set(run["adaptation"].pop("sharpe_by_regime")) <= {*REGIMES, "unknown"}
    assert run["adaptation"] == json.loads(json.dumps(adaptation_report(returns, returns[:, 0], g["completed"], 1)))
    assert run["adaptation"]["tasks"] == 2 and len(run["adaptation"]["stages"]) == 3
    gain = (returns[:, -1] - returns[:, 0]).mean()
    assert run["adaptation"]["transfer_gain"]["mean"] == pytest.approx(gain)
    assert re.search(r"^transfer gain +\S+  \[.*\]", out, re.MULTILINE) and "net log growth per year" in out
    means, variances = g["means"], g["variances"]
    for stage, (mean, variance) in enumerate(zip(means, variances)):
        latent = {name: run["latent"][name][stage] for name in ("kl", "spread", "std")}
        assert latent["kl"] == pytest.approx(script.module.divergence(mean, variance).mean().item())
        np.testing.assert_allclose(latent["spread"], mean.numpy().std(axis=0), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(latent["std"], np.sqrt(variance.numpy()).mean(axis=0), rtol=1e-5)
        read = linear_probe(g["val_means"][stage], g["val_truth"]["drift"], mean, g["truth"]["drift"])
        assert run["probe"]["drift"][stage] == (None if math.isnan(read) else pytest.approx(read))
    assert run["latent"]["kl"][0] == 0 and not any(run["latent"]["spread"][0])


def test_attention_is_reported(inside, capsys):
    options = ["--market", MARKET, "--num-envs", "3", "--episode-length", "32", "--episodes", "2", "--total-timesteps", "384"]
    run = Run(inside(*options, *TINY, "--encoder", "attention", "--heads", "2")["run_dir"]).json
    shares = run["latent"]["attention"]
    assert len(shares) == 2 and all(0 < share <= 1 + 1e-6 for share in shares)
    assert f"attention: a head's weights are spread over {shares[0]:.0%}, {shares[1]:.0%} of" in capsys.readouterr().out


class Recorder:
    """An agent that infers the number of steps it was shown, and acts on its last observation."""

    context_size, reach = 6, torch.ones(1)

    def __init__(self):
        self.shown = []

    def infer(self, context, count):
        self.shown.append((context.clone(), count.tolist()))
        return torch.full((len(context), 1), float(count[0])), None

    def act(self, obs, z, explore):
        assert not explore
        return obs[:, :1] + z

    def unscale(self, action):
        return 2 * action


def test_backtests_infer_from_what_their_own_account_has_shown(script):
    """Every third bar, from the latest five steps."""
    agent = Recorder()
    policy = script.module.Online(agent, every=3, most=5)
    obs = np.arange(40, dtype=np.float32).reshape(10, 2, 2)
    rewards = np.arange(20, dtype=np.float32).reshape(10, 2)
    for t in range(10):
        known = min(5, t // 3 * 3)
        np.testing.assert_array_equal(policy(obs[t]), 2 * (obs[t, :, :1] + known))
        policy.after(rewards[t], np.zeros(2, bool))
    assert [count for _, count in agent.shown] == [[0, 0], [3, 3], [5, 5], [5, 5]]
    assert agent.shown[0][0].shape == (2, 1, 6)
    for inferred, (context, _) in zip((3, 6, 9), agent.shown[1:]):
        for n, t in enumerate(range(max(0, inferred - 5), inferred)):
            action = obs[t, :, :1] + min(5, t // 3 * 3)
            expected = np.concatenate([obs[t], action, rewards[t, :, None], obs[t + 1]], axis=1)
            np.testing.assert_array_equal(context[:, n], expected)


def test_the_last_steps_are_kept_and_end_with_their_own_last_observation(script, inside, register):
    """On episodes of a few steps, into a buffer that holds fewer than were taken: none is followed by the next one's first."""
    options = [*register(Toy, gym.spaces.Box(-1, 1, (2,), np.float32)), *TINY, "--episodes", "2", "--episode-length", "20"]
    g = inside(*options, "--total-timesteps", "120", "--buffer-size", "32", "--eval-tasks", "2")
    assert g["iteration"] == 3 and g["written"].tolist() == [120] and g["known"].tolist() == [40]
    order = np.roll(np.arange(32), -(120 % 32))  # the oldest first
    replay = {name: values[0].numpy()[order] for name, values in g["replay"].items()}
    t, after, episode = replay["obs"][:, 0] * 3, replay["next_obs"][:, 0] * 3, (replay["obs"][:, 1] * 3).round()
    np.testing.assert_allclose(after, t + 1, atol=1e-5)
    over = t[1:].round() == 0  # all 32 are of one visit
    assert 4 < over.sum() < 12
    np.testing.assert_array_equal(replay["terminated"][:-1, 0], over & (episode[:-1] % 2 == 0))  # the others are truncated
    np.testing.assert_allclose(replay["rewards"][:, 0], replay["actions"].sum(axis=1) - 0.3 * after, atol=1e-5)
    latest = g["contexts"][0, 8:].numpy()  # the last 32 of 40 steps
    parts = [replay[name] for name in ("obs", "actions", "rewards", "next_obs")]
    np.testing.assert_array_equal(latest, np.concatenate(parts, axis=1))


def test_tasks_that_are_held_out_are_none_to_train_on(script, inside, monkeypatch):
    """On Navigation2D-v0: other integers for training, validation and test; contexts end with their episodes."""
    asked = []
    original = script.module.gym.make_vec

    def spied(*args, **kwargs):
        markets = original(*args, **kwargs)
        reset = markets.unwrapped.reset

        def wrapped(*, seed=None, options=None):
            asked.append(None if options is None else np.asarray(options["tasks"]).tolist())
            return reset(seed=seed, options=options)

        markets.unwrapped.reset = wrapped
        return markets

    monkeypatch.setattr(gym, "make_vec", spied)
    g = inside(
        "--env-id", "Navigation2D-v0", *TINY, "--num-envs", "4", "--num-tasks", "6", "--eval-tasks", "5", "--episodes", "2",
        "--episode-length", "10", "--total-timesteps", "240",
    )  # fmt: skip
    tasks = [part for part in asked if part is not None]
    training = [part for part in tasks if max(part) < 6]
    assert len(training) == 3 and all(len(set(part)) == 4 for part in training)
    test, val = tasks[3], tasks[-1]
    assert min(test + val) >= 1_000_000 and not set(test) & set(val) and len(test) == len(val) == 5
    run = Run(g["run_dir"]).json
    assert set(run["probe"]) == {"goal_x", "goal_y"} and run["adaptation"]["tasks"] == 5
    scores = np.array([stage["mean"] for stage in run["adaptation"]["stages"]])
    assert (scores < 0).all() and (scores > -20).all() and run["adaptation"]["completion"] == 1.0


@pytest.mark.parametrize("env", [["--env-id", "Pendulum-v1"], ["--env-id", "Navigation2D-v0", "--num-envs", "3"]])
def test_gymnasium_tasks_resume_bit_for_bit(script, inside, tmp_path, env):
    options = [*env, *TINY, "--episode-length", "20", "--episodes", "2", "--eval-tasks", "3", "--checkpoint-every", "1"]
    steps = 4 * 40 * (1 if "Pendulum-v1" in env else 3)
    torch_save, kept = torch.save, []

    def keep(content, path):
        torch_save(content, path)
        kept.append(copy.deepcopy(content))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", keep)
        whole = Run(inside(*options, "--total-timesteps", str(steps))["run_dir"])
    assert [content["iteration"] for content in kept] == [1, 2, 3, 4]
    folder = shutil.copytree(whole.folder, tmp_path / "copy")
    torch.save(kept[1], folder / "model.pt")
    inside("--resume", str(folder))
    again = Run(folder)
    assert_same_content(again.model, whole.model)
    assert (
        again.json["adaptation"] == whole.json["adaptation"]
        and again.json["last_100_returns"] == whole.json["last_100_returns"]
    )


def test_pendulum_is_a_single_task_of_known_range(inside):
    g = inside("--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "400", "--eval-tasks", "3")
    assert g["agent"].reach.tolist() == [2.0] and g["agent"].centre.tolist() == [0.0]
    assert g["written"].tolist() == [400] and g["replay"]["actions"].abs().max() <= 1
    assert Run(g["run_dir"]).json["adaptation"]["stages"][0]["mean"] < -500


# --- what goes wrong


@pytest.mark.parametrize(
    "options, words",
    [
        (["--reward", "alpha"], ("--reward alpha", "growth or sharpe")),
        (["--num-envs", "9"], ("--num-envs 9", "at most 2, the training tasks")),
        (["--encoder", "transformer"], ("--encoder", "product")),
        (["--encoder", "attention", "--heads", "3"], ("--heads 3", "divisor of --hidden 16")),
        (["--tau", "0"], ("--tau 0", "above 0")),
        (["--gamma", "1.5"], ("--gamma 1.5", "0 to 1")),
        (["--alpha", "0"], ("--alpha 0", "above 0")),
        (["--kl-coef", "-1"], ("--kl-coef -1", "0 or more")),
        (["--max-score", "11"], ("--max-score 11", "at most 10")),
        (["--memory-mb", "0.1"], ("--buffer-size 600", "--memory-mb 0.1")),
        (["--adapt-share", "1"], ("share=1", "fraction")),
        (["--adapt-share", "0.15"], ("split 'train'", "no bar to decide at")),
        (["--latent", "0"], ("--latent 0", "at least 1")),
        (["--env-id", "CartPole-v1"], ("--env-id CartPole-v1", "continuous")),
        (["--env-id", "Pendulum-v1", "--num-tasks", "3"], ("--num-tasks 3", "Pendulum-v1 is one task")),
        (["--env-id", "Navigation2D-v0", "--num-tasks", "1"], ("--num-envs 2", "at most 1")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line
