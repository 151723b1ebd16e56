"""algos/cql_portfolio.py: penalties, targets and gradients against a literal computation, Cal-QL's floor, divergence."""

import copy
import json

import numpy as np
import pytest
import torch
from offline_cases import CASES, assert_gradients, network, rows_of, shake, toy, write_foreign
from torch.distributions import Independent, Normal, TransformedDistribution, Uniform
from torch.distributions.transforms import TanhTransform

from envs.dataset import Dataset

pytest_plugins = ["scripts", "offline_cases"]

QUICK = ("--gradient-steps", "1", "--batch-size", "8", "--hidden", "16", "--max-grad-norm", "1e9", "--bc-steps", "0")


@pytest.fixture
def script():
    return CASES["cql_portfolio, continuous"]


@pytest.fixture
def updated(inside, tmp_path):
    """Run on random data, shake the networks, update once on all rows: variables, agent before, rows, what is logged."""

    def call(discrete, *options):
        data = toy(tmp_path / "toy" / "dataset.hdf5", discrete, masked=discrete)
        g = inside("--dataset", str(data), *QUICK, "--tau", "0.3", *options)
        shake(g["agent"])
        old, rows = copy.deepcopy(g["agent"]), rows_of(data)
        if "--calql" in options:  # as if some episodes were not over yet
            rows["infos/mc_return"][::5] = -np.inf
        rows = {key: rows[key] for key in g["keys"]}
        torch.manual_seed(5)
        imitate = g["args"].bc_steps > 0
        logged = dict(zip(g["LOGGED"], g["update"](g["to_tensors"](rows, g["agent"], "cpu"), imitate).tolist(), strict=True))
        return g, old, {key: torch.tensor(value) for key, value in rows.items()}, logged

    return call


def observed(agent, rows, key):
    return ((rows[key] - agent.obs_mean) * agent.obs_scale).clamp(-10, 10)


def assert_polyak(agent, old, tau):
    for new, before, critic in zip(agent.target.parameters(), old.target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(new, before + tau * (critic - before))


@pytest.mark.parametrize("calql", [False, True])
def test_discrete_penalty_and_double_q_target(updated, calql):
    """logsumexp(Q) - Q(a) over the actions that are allowed, of each critic; row by row."""
    g, old, rows, logged = updated(True, "--alpha", "0.7", "--gamma", "0.9", *["--calql"] * calql)
    x, next_x = observed(old, rows, "observations"), observed(old, rows, "next_observations")
    q, q_next, target_next = ([network(mlp, k, y) for k in (0, 1)] for mlp, y in
                              ((old.critic, x), (old.critic, next_x), (old.target, next_x)))  # fmt: skip
    penalty = error = total = 0.0
    for n in range(len(x)):
        action, allowed, later = rows["actions"][n], rows["infos/action_mask"][n], rows["infos/next_action_mask"][n]
        best = max(later.nonzero().flatten().tolist(), key=lambda a: q_next[0][n, a] + q_next[1][n, a])  # noqa: B023
        value = min(target_next[0][n, best], target_next[1][n, best]).detach()
        target = g["reward_scale"] * rows["rewards"][n] + 0.9 * (1 - rows["terminals"][n]) * value
        for k in (0, 1):
            known = q[k][n, allowed]
            if calql:
                known = known.maximum(g["reward_scale"] * rows["infos/mc_return"][n])
            penalty = penalty + known.exp().sum().log() - q[k][n, action]
            error, total = error + (q[k][n, action] - target).square(), total + q[k][n, action]
    penalty, error, mean = penalty / len(x), error / len(x), total / len(x) / 2
    found = [logged[name] for name in ("conservative_loss", "critic_loss", "q")]
    assert found == pytest.approx([penalty.item(), error.item(), mean.item()], rel=1e-4)
    assert_gradients(g["agent"], (old, error + 0.7 * penalty), "critic")
    assert_polyak(g["agent"], old, 0.3)


@pytest.mark.parametrize("calql, imitate", [(False, False), (True, False), (False, True)])
def test_continuous_penalty_target_and_actor(updated, calql, imitate):
    """The same draws, and densities by torch.distributions; actions of the next state are valued at this one; the floor is
    that of the policy's actions only; the actor's loss moves no critic."""
    own = ["--calql"] * calql + ["--bc-steps", str(int(imitate))]
    g, old, rows, logged = updated(False, "--alpha", "0.7", "--gamma", "0.9", "--samples", "4", *own)
    x, next_x, n = observed(old, rows, "observations"), observed(old, rows, "next_observations"), len(rows["rewards"])
    action = ((rows["actions"] - old.low) / (old.high - old.low) * 2 - 1).clamp(-1, 1)
    torch.manual_seed(5)
    noise = [torch.randn(1, n, 2), torch.rand(4, n, 2), torch.randn(4, n, 2), torch.randn(4, n, 2), torch.randn(1, n, 2)]

    def policy(y, eps):
        """Actions of the policy by some noise, and their log-densities."""
        mean, log_std = network(old.actor, 0, y).split(2, dim=1)
        log_std = log_std.clamp(-5, 2)
        before = mean + log_std.exp() * eps
        squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        drawn = squashed.transforms[0](before)
        return drawn, Independent(squashed, 1).log_prob(drawn)

    def q(mlp, k, y, a):
        return network(mlp, k, torch.cat([y, a], dim=1)).squeeze(1)

    ahead = policy(next_x, noise[0])[0][0]
    value = torch.minimum(q(old.target, 0, next_x, ahead), q(old.target, 1, next_x, ahead))
    target = (g["reward_scale"] * rows["rewards"] + 0.9 * (1 - rows["terminals"]) * value).detach()
    uniform = 2 * noise[1] - 1
    candidates = [(a, d, False) for a, d in zip(uniform, Uniform(-1.0, 1.0).log_prob(uniform * 0.999).sum(2))]
    for y, eps in ((x, noise[2]), (next_x, noise[3])):
        candidates += [(a.detach(), d.detach(), True) for a, d in zip(*policy(y, eps))]
    penalty = error = 0.0
    for k in (0, 1):
        valued = []
        for a, density, own_action in candidates:
            known = q(old.critic, k, x, a)
            if calql and own_action:
                known = known.maximum(g["reward_scale"] * rows["infos/mc_return"])
            valued.append(known - density)
        of_data = q(old.critic, k, x, action)
        penalty = penalty + (torch.stack(valued).exp().mean(dim=0).log() - of_data).mean()  # mean: a constant less than the sum
        error = error + (of_data - target).square().mean()
    drawn, density = (part[0] for part in policy(x, noise[4]))
    temperature = old.log_temperature.exp()
    good = torch.minimum(q(old.critic, 0, x, drawn), q(old.critic, 1, x, drawn))
    if imitate:
        inside = action.clamp(-0.999, 0.999)
        mean, log_std = network(old.actor, 0, x).split(2, dim=1)
        normal = Normal(mean, log_std.clamp(-5, 2).exp())
        good = Independent(TransformedDistribution(normal, TanhTransform()), 1).log_prob(inside)
    actor_loss = (temperature.detach() * density - good).mean()
    expected = {
        "actor_loss": actor_loss, "critic_loss": error, "conservative_loss": penalty, "entropy": -density.mean(),
        "temperature": temperature,
    }  # fmt: skip
    for name, tensor in expected.items():
        assert logged[name] == pytest.approx(tensor.item(), rel=1e-3), name
    assert_gradients(g["agent"], (old, error + 0.7 * penalty), "critic")
    assert_gradients(g["agent"], (old, actor_loss), "actor")
    assert_gradients(g["agent"], (old, temperature * (2 - density.detach().mean())), "log_temperature")
    assert_polyak(g["agent"], old, 0.3)


def test_a_network_of_two_inputs_is_that_of_both_together(script):
    """For one action at each observation, and for several."""
    mlp = script.module.MLP(5, 16, 1, copies=2)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x, actions = torch.randn(7, 3), torch.randn(4, 7, 2)
    whole = mlp(torch.cat([x, actions[0]], dim=1))
    torch.testing.assert_close(mlp(x, actions[0]), whole)
    several = mlp(x, actions).view(2, 4, 7, 1)
    torch.testing.assert_close(several[:, 0], whole)
    for m in range(4):
        for k in (0, 1):
            torch.testing.assert_close(several[k, m], network(mlp, k, torch.cat([x, actions[m]], dim=1)))


def test_the_penalty_lowers_actions_that_the_data_do_not_take(inside, tmp_path):
    actions = np.random.default_rng(0).integers(2, size=1000)  # of three
    mask = np.ones((1000, 3), bool)
    data = write_foreign(tmp_path / "d.hdf5", True, rows=1000, actions=actions, **{"infos/action_mask": mask})
    gaps = []
    for alpha in ("0", "5"):
        options = [
            "--gradient-steps",
            "300",
            "--batch-size",
            "64",
            "--hidden",
            "16",
            "--learning-rate",
            "1e-3",
            "--alpha",
            alpha,
        ]
        agent = inside("--dataset", str(data), *options)["agent"]
        q = agent.critic(torch.randn(500, 3)).mean(dim=(0, 1)).detach()
        gaps.append(float(q[:2].mean() - q[2]))
    assert gaps[1] > 1.0 > abs(gaps[0])


def test_no_value_exceeds_what_can_be_earned(inside, tmp_path):
    """Mean |Q| far above max |r| / (1 - gamma): the run fails, and says by how much; below, the bound is in run.json."""
    data = toy(tmp_path / "toy" / "dataset.hdf5", True)
    options = ["--dataset", str(data), "--batch-size", "8", "--hidden", "16", "--gradient-steps", "60", "--eval-every", "20"]
    train, _ = Dataset(data).split_episodes(0.1, 1)
    largest = max(np.abs(block["rewards"]).max() for block in Dataset(data).blocks(train))
    finished = inside(*options, "--gamma", "0.6", "--reward-scale", "3")["run"]
    bound = 2 * 3 * largest / 0.4 + 10
    assert finished["offline"]["bound"] == pytest.approx(bound)
    with pytest.raises(SystemExit) as caught:
        inside(*options, "--gamma", "0.6", "--reward-scale", "3", "--learning-rate", "3", "--eval-every", "2")
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed" and run["failure"] in caught.value.code
    held_out = run["offline"]["held_out"]
    assert held_out["q"] > bound
    assert f"mean |Q| {held_out['q']:.4g}; rewards seen can sum to half of {bound:.4g}" in run["failure"]


def test_returns_must_be_discounted_as_the_values_are(complaint, tmp_path):
    data = toy(tmp_path / "toy" / "dataset.hdf5", True, gamma=0.5)
    line = complaint("--dataset", str(data), "--calql", "--gamma", "0.9")
    assert "--calql" in line and "0.9" in line and "expected 0.5" in line
    foreign = write_foreign(tmp_path / "data.hdf5", True)
    assert "infos/mc_return" in complaint("--dataset", str(foreign), "--calql")


@pytest.mark.parametrize(
    "options", [["--alpha", "-1"], ["--samples", "0"], ["--bc-steps", "-1"], ["--actor-learning-rate", "-1"]]
)
def test_bad_input_is_named(complaint, options):
    line = complaint(*options)
    assert f"{options[0]} {options[1]}" in line and "expected" in line
