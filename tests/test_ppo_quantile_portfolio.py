"""algos/ppo_quantile_portfolio.py: what it alone does: quantiles, targets that exchange samples, budgets, nested CVaR."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import SIMULATOR
from scipy.stats import norm
from scripts import SCRIPTS, Bandit, Run, Toy, assert_same_content, finish, pinball, torchrun, with_gpu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs import portfolio_references
from envs.ledger import growth

pytest_plugins = ["scripts"]

TAIL = "synthetic:tail:bars=300:train=4:val=2:test=3"
STATIC = (
    "--market", TAIL, "--cvar-alpha", "0.25", "--episode-length", "10", "--horizon", "7", "--total-timesteps", "6144",
    "--num-minibatches", "4", "--gae-lambda", "0.9",
)  # fmt: skip
ITERATED = (*STATIC, "--risk", "iterated", "--gamma", "0.8")


@pytest.fixture
def script():
    return SCRIPTS["ppo_quantile_portfolio"]


@pytest.fixture
def f(script):
    """The module: its functions."""
    return script.module


@pytest.fixture
def static(script, inside):
    return inside(*script.budget, "--num-quantiles", "8", *STATIC)


@pytest.fixture
def iterated(script, inside):
    return inside(*script.budget, "--num-quantiles", "8", *ITERATED)


def cvar_of(sample, alpha):
    """Mean of the worst share of a sample whose size that share divides."""
    return np.sort(sample)[: round(alpha * len(sample))].mean()


# --- the quantile loss


def test_the_loss_and_its_gradient_are_those_of_all_pairs(f):
    """|level - 1{delta < 0}| |delta| with delta[b, current, target] = target - current, by autograd."""
    rng = torch.Generator().manual_seed(0)
    for n, size, count in ((5, 7, 7), (3, 8, 1), (1, 1, 9), (40, 32, 3)):
        quantiles = torch.randn((n, size), generator=rng, dtype=torch.float64).requires_grad_()
        targets = torch.randn((n, count), generator=rng, dtype=torch.float64).sort(dim=1).values
        delta = targets[:, None, :] - quantiles[:, :, None]
        level = ((torch.arange(size, dtype=torch.float64) + 0.5) / size)[:, None]
        expected = ((level - (delta < 0).double()).abs() * delta.abs()).mean(dim=2).sum(dim=1).mean()
        found = f.quantile_loss(quantiles.float(), targets.float())
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert float(expected.detach()) == pytest.approx(pinball(quantiles.detach().numpy(), targets.numpy()), rel=1e-12)
        a, b = (torch.autograd.grad(x, quantiles, retain_graph=True)[0] for x in (found, expected))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_learns_the_quantiles_of_a_skewed_distribution(f):
    """Of an exponential one, whose quantiles swapped axes or levels would not give."""
    size, rng = 16, np.random.default_rng(0)
    levels = (np.arange(size) + 0.5) / size
    for scale in (1.0, 1e-4):  # a basis point
        quantiles = torch.zeros((1, size), requires_grad=True)
        optimizer = torch.optim.Adam([quantiles], lr=0.05 * scale, eps=1e-12)
        for step in range(1000):
            optimizer.param_groups[0]["lr"] = 0.05 * scale * (1 - step / 1000)
            targets = torch.as_tensor(np.sort(rng.exponential(scale, (1, 512))), dtype=torch.float32)
            optimizer.zero_grad()
            f.quantile_loss(quantiles, targets).backward()
            optimizer.step()
        np.testing.assert_allclose(quantiles.detach().numpy()[0] / scale, -np.log1p(-levels), atol=0.05, rtol=0.03)


def test_what_is_read_off_the_critic_is_in_order(f):
    torch.manual_seed(0)
    agent, x = f.Agent(3, 2, 0.0, 16), torch.randn(50, 3)
    with torch.no_grad():
        raw, found = agent.critic(x), agent.quantiles(x)
        assert (raw.diff(dim=1) < 0).any() and torch.equal(found, raw.sort(dim=1).values)
        torch.testing.assert_close(agent.value(x), found.mean(dim=1))


# --- targets


def test_targets_are_the_slow_definition(f):
    """Each sample by following it: rewards up to where it is exchanged or the episode ends, then that state's quantile."""
    rng = np.random.default_rng(1)
    shape, gamma = (6, 4, 5), 0.7
    rewards, following = rng.standard_normal(shape[:2]), rng.standard_normal(shape)
    over, keep = rng.random(shape[:2]) < 0.3, rng.random(shape) < 0.6
    found = f.replaced(*(torch.as_tensor(x) for x in (rewards, following, over)), gamma, torch.as_tensor(keep)).numpy()
    lengths = set()
    for t, n, i in np.ndindex(shape):
        total, last = rewards[t, n], t
        while keep[last, n, i] and not over[last, n] and last + 1 < shape[0]:
            last += 1
            total += gamma ** (last - t) * rewards[last, n]
        lengths.add(last - t)
        assert found[t, n, i] == pytest.approx(total + gamma ** (last - t + 1) * following[last, n, i], rel=1e-12)
    assert {0, 1, 2, 3} <= lengths


def test_samples_are_kept_with_the_probability_lambda(script, f, inside, monkeypatch):
    g = inside(*script.short, "--gae-lambda", "0.8", "--total-timesteps", "1024", "--episode-length", "9")
    calls = []
    monkeypatch.setitem(g["accumulate"].__globals__, "replaced", lambda *a: calls.append(a) or f.replaced(*a))
    g["estimate_advantages"]()
    ((rewards, following, over, gamma, keep),) = calls
    assert keep.float().mean() == pytest.approx(0.8, abs=4 * 0.4 / np.sqrt(keep.numel()))
    assert torch.equal(rewards, g["args"].reward_scale * g["rewards"]) and gamma == g["args"].gamma
    assert torch.equal(over, g["done"]) and torch.equal(g["complete"], g["done"]) and over.any()
    assert torch.equal(following[~over], g["quantiles"][1:][~over]) and torch.equal(following[over], g["final_quantiles"][over])
    assert torch.equal(g["targets"], f.replaced(*calls[0]).sort(dim=2).values)


STEPS, ATOMS = 10, 32


def learn_chain(target, rounds=400, batch=200):
    """(STEPS, ATOMS) quantiles of the return of a chain with N(0, 1) rewards, learnt from `target` (rewards, following)."""
    rng = torch.Generator().manual_seed(0)
    quantiles = torch.zeros((STEPS, ATOMS), requires_grad=True)
    loss = SCRIPTS["ppo_quantile_portfolio"].module.quantile_loss
    seen = torch.arange(STEPS).repeat_interleave(batch)
    optimizer = torch.optim.Adam([quantiles], lr=0.1)
    for step in range(rounds):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / rounds)
        with torch.no_grad():
            z = torch.cat([quantiles.detach()[1:], torch.zeros((1, ATOMS))]).sort(dim=1).values
            rewards = torch.randn((STEPS, batch), generator=rng)
            targets = target(rewards, z[:, None].expand(-1, batch, -1), rng).sort(dim=2).values
        optimizer.zero_grad()
        loss(quantiles[seen], targets.flatten(0, 1)).backward()
        optimizer.step()
    return quantiles.detach().sort(dim=1).values.numpy()


def test_quantiles_of_a_ten_step_chain(f):
    """Rewards N(0, 1), ten steps: what is left at step t is N(0, 10 - t). Averaging quantile functions shrinks it."""

    def exchanged(rewards, following, rng):
        over = torch.zeros(rewards.shape, dtype=torch.bool)
        over[-1] = True
        return f.replaced(rewards, following, over, 1.0, torch.rand(following.shape, generator=rng) < 0.9)

    def averaged(rewards, following, rng):
        targets, carried = torch.empty_like(following), following[-1]
        for t in reversed(range(STEPS)):
            carried = rewards[t, :, None] + (0.1 * following[t] + 0.9 * carried if t + 1 < STEPS else following[t])
            targets[t] = carried
        return targets

    levels = (np.arange(ATOMS) + 0.5) / ATOMS
    found, shrunk = learn_chain(exchanged), learn_chain(averaged, rounds=300, batch=128)
    for t in range(STEPS):
        std = np.sqrt(STEPS - t)
        truth = norm.ppf(levels) * std
        np.testing.assert_allclose(found[t, 1:-1], truth[1:-1], atol=0.05 * std, err_msg=f"step {t}")
        np.testing.assert_allclose(found[t], truth, atol=0.15 * std, err_msg=f"step {t}")
        assert found[t].std() == pytest.approx(truth.std(), rel=0.05), t
    assert shrunk[-1].std() == pytest.approx(norm.ppf(levels).std(), rel=0.05)
    assert shrunk[0].std() < 0.85 * found[0].std(), "the control does not fail"


# --- CVaR


@pytest.mark.parametrize("alpha, expected", [(1.0, 2.5), (0.5, 1.5), (0.25, 1.0), (0.4, (1 + 2 * 0.6) / 1.6), (0.75, 2.0)])
def test_cvar_counts_the_last_quantile_in_part(f, alpha, expected):
    quantiles = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    np.testing.assert_allclose(f.cvar(quantiles, alpha).numpy(), [expected, 10 * expected], rtol=1e-6)
    assert portfolio_references.cvar(np.array([4.0, 1.0, 3.0, 2.0]), alpha) == pytest.approx(expected)


def test_cvar_is_the_best_budget_less_its_shortfall(f):
    """Rockafellar & Uryasev: the maximum over b of b - E[(b - Z)+] / alpha, taken at the VaR."""
    z = torch.randn((3, 20), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    budgets = torch.linspace(-4, 4, 8001)
    for alpha in (0.1, 0.33, 0.8, 1.0):
        values = budgets - f.shortfall(budgets.expand(3, -1), z[:, None, :].expand(-1, 8001, -1), alpha)
        np.testing.assert_allclose(values.max(dim=1).values, f.cvar(z, alpha), atol=2e-3)
        at_risk = z[:, int(np.ceil(20 * alpha - 1e-9)) - 1]
        torch.testing.assert_close(at_risk - f.shortfall(at_risk, z, alpha), f.cvar(z, alpha), rtol=1e-5, atol=1e-6)


def test_the_shortfall_passes_through_a_step(f):
    """(b - r - gamma z)+ = gamma ((b - r) / gamma - z)+: the value of a state is gamma times that of the next one."""
    z, b = torch.randn((5, 9)), torch.randn(5)
    now = f.shortfall(b, 0.3 + 0.8 * z, 0.2)
    torch.testing.assert_close(now, 0.8 * f.shortfall((b - 0.3) / 0.8, z, 0.2), rtol=1e-5, atol=1e-6)


def test_iterated_advantages_have_mean_zero_and_end_at_the_var(f):
    z = torch.randn((4, 24), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    for alpha in torch.tensor((0.1, 0.25, 0.9), dtype=torch.float64):
        found = f.iterated_advantage(z.T, z.expand(24, 4, 24), alpha)
        np.testing.assert_allclose(found.mean(dim=0), 0.0, atol=1e-5)
        at_risk = z[:, int(np.ceil(24 * alpha.item())) - 1]
        np.testing.assert_allclose(found[-1], at_risk - f.cvar(z, alpha), rtol=1e-4)  # no more for what lies above
        far = f.iterated_advantage(torch.full((4,), -100.0), z, alpha)
        np.testing.assert_allclose(far, at_risk - (at_risk + 100) / alpha - f.cvar(z, alpha), rtol=1e-4)


# A tiny problem to compute all of exactly: two states, two actions, six equally likely outcomes (reward, next state) of each.
REWARDS = np.array([[[-4, -1, 0, 2, 2, 3], [-1, 0, 0, 1, 1, 1]], [[-6, 0, 1, 2, 3, 3], [-2, 0, 0, 0, 1, 2]]], dtype=float)
LEADS_TO = np.array([[[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]], [[0, 0, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1]]])
HORIZON, LEVEL, DISCOUNT = 3, 0.3, 0.9


def outcomes_of(state, follows):
    return REWARDS[state] + DISCOUNT * follows[LEADS_TO[state]]  # (action, outcome)


def weighted_cvar(values, chances):
    """CVaR at LEVEL and VaR of a discrete distribution."""
    order = np.argsort(values)
    values, below = values[order], np.concatenate([[0], np.cumsum(chances[order])])
    part = np.clip(LEVEL - below[:-1], 0, chances[order])
    return part @ values / LEVEL, values[np.searchsorted(below[1:], LEVEL - 1e-12)]


def nested_cvar(logits):
    """(HORIZON + 1, 2) rho by backward induction, for a softmax policy with logits (HORIZON, 2, 2)."""
    policy = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    rho = np.zeros((HORIZON + 1, 2))
    for t, s in itertools.product(reversed(range(HORIZON)), range(2)):
        rho[t, s] = weighted_cvar(outcomes_of(s, rho[t + 1]).ravel(), np.repeat(policy[t, s] / 6, 6))[0]
    return rho


def test_iterated_advantages_give_the_gradient_of_the_nested_cvar(f):
    """Against central differences of the exact nested CVaR. A step's tail leads on with the weight 1{y <= VaR} / alpha, and
    with the part that is missing at the VaR itself; the quantiles are those of the exact distribution, a million of them."""
    logits = np.random.default_rng(3).normal(size=(HORIZON, 2, 2))
    policy, rho = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True), nested_cvar(logits)
    level = torch.tensor(LEVEL, dtype=torch.float64)
    gradient, reach = np.zeros_like(logits), np.array([1.0, 0.0])  # tail-weighted chances, from state 0
    for t in range(HORIZON):
        following = np.zeros(2)
        for s in range(2):
            y, chances = outcomes_of(s, rho[t + 1]), np.repeat(policy[t, s] / 6, 6).reshape(2, 6)
            order = np.argsort(y.ravel())
            counts = np.round(np.cumsum(chances.ravel()[order]) * 200_000).astype(int)
            quantiles = torch.as_tensor(np.repeat(y.ravel()[order], np.diff(counts, prepend=0)))
            advantage = f.iterated_advantage(torch.as_tensor(y), quantiles.expand(2, 6, -1), level).numpy()
            for a, k in np.ndindex(y.shape):
                score = (np.arange(2) == a) - policy[t, s]
                gradient[t, s] += reach[s] * chances[a, k] * score * advantage[a, k]
            _, at_risk = weighted_cvar(y.ravel(), chances.ravel())
            at, below = chances[y == at_risk].sum(), chances[y < at_risk].sum()
            weight = np.where(y < at_risk, 1.0, np.where(y == at_risk, (LEVEL - below) / at, 0.0)) / LEVEL
            for a, k in np.ndindex(y.shape):
                following[LEADS_TO[s, a, k]] += DISCOUNT * reach[s] * chances[a, k] * weight[a, k]
        reach = following
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        slope = (nested_cvar(logits + step)[0, 0] - nested_cvar(logits - step)[0, 0]) / 2e-5
        assert gradient[index] == pytest.approx(slope, abs=2e-4), index
    assert np.abs(gradient).max() > 0.1


# --- calibration


def test_coverage_is_the_level_where_quantiles_are_right(f):
    levels, rng = (np.arange(32) + 0.5) / 32, np.random.default_rng(0)
    quantiles = torch.as_tensor(norm.ppf(levels)).expand(200_000, -1)
    outcomes = torch.as_tensor(rng.standard_normal(200_000))
    for level in (0.05, 0.5, 0.95):
        assert f.coverage(quantiles, outcomes, level) == pytest.approx(level, abs=0.004)
    assert f.coverage(quantiles, outcomes - 1.0, 0.5) > 0.8 and np.isnan(f.coverage(quantiles[:0], outcomes[:0], 0.5))
    two = torch.tensor([[0.0, 1.0]])
    for level, value in ((0.0, 0.0), (0.25, 0.0), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)):
        assert f.coverage(two, torch.tensor([value]), level) == 1 and f.coverage(two, torch.tensor([value + 1e-3]), level) == 0


# --- the budget


def test_an_account_is_spent_and_starts_afresh(f):
    account, no = f.Account(3), torch.tensor([False, False])
    account.restart(2, 5.0)
    seen, memory = [account.state().tolist()], [account.budget.data_ptr(), account.bars.data_ptr(), account.earned.data_ptr()]
    for rewards, over, budget, complete, earned in (
        ([1.0, -1.0], no, 7.0, [False, False], [1.0, -1.0]),
        ([2.0, 0.0], torch.tensor([False, True]), 7.0, [False, True], [3.0, -1.0]),
        ([4.0, 1.0], no, 8.0, [True, False], [7.0, 1.0]), ([0.0, 0.0], no, 8.0, [False, False], [0.0, 1.0]),
    ):  # fmt: skip
        found = account.spend(torch.tensor(rewards), over, torch.tensor(budget))
        assert [part.tolist() for part in found] == [complete, earned]
        seen.append(account.state().tolist())
    third = pytest.approx(1 / 3, rel=1e-5), pytest.approx(2 / 3, rel=1e-5)
    assert seen == [
        [[5, 1], [5, 1]], [[4, third[1]], [6, third[1]]], [[2, third[0]], [7, 1]], [[8, 1], [6, third[1]]],
        [[8, third[1]], [6, third[0]]],
    ]  # fmt: skip
    assert memory == [account.budget.data_ptr(), account.bars.data_ptr(), account.earned.data_ptr()]
    nothing = f.Account(None)
    nothing.restart(2, 5.0)
    assert nothing.spend(torch.tensor([1.0, 1.0]), no, torch.tensor(7.0))[0] is no and nothing.state().shape == (2, 0)


def test_the_state_holds_budget_and_time_of_every_step(static):
    """Walked again from what the rollout stored: by how much an episode starts, what it earns, when it ends."""
    g = static
    args, state, done = g["args"], g["state"].numpy(), g["complete"].numpy()
    scaled = args.reward_scale * g["rewards"].numpy()
    assert g["state_size"] == g["obs_size"] + 2 == len(g["agent"].norm.mean) and g["x"].shape[2] == g["state_size"]
    assert args.gamma == 1.0 and done.any()
    for t, n in np.ndindex(done.shape):
        if done[t, n]:
            assert state[t + 1, n, 1] == 1.0
        else:
            assert state[t + 1, n, 0] == pytest.approx(state[t, n, 0] - scaled[t, n], abs=1e-4)
            assert state[t + 1, n, 1] == pytest.approx(state[t, n, 1] - 1 / 7, abs=1e-6)
    complete = np.isclose(state[:-1, :, 1], 1 / 7)  # all seven bars; others are cut with the episode, after ten
    assert done[complete].all() and set(np.round(7 * state[:-1, :, 1][done & ~complete])) == {5}
    starts = state[1:][done]
    assert len(np.unique(starts[:, 0])) == 1, "one budget for all episodes that begin in a rollout"


def test_the_budget_is_the_quantile_of_finished_returns(static):
    """Those of the last iteration, walked again, and earlier ones up to fifty in the tail."""
    g = static
    outcomes, done = g["outcomes"].double().numpy(), g["complete"].numpy()
    scaled = g["args"].reward_scale * g["rewards"].double().numpy()
    latest = []
    for t, n in np.argwhere(done):
        begin = t
        while begin > 0 and not done[begin - 1, n]:
            begin -= 1
        if begin > 0:  # the others began before this rollout
            latest.append(scaled[begin : t + 1, n].sum())
    assert len(outcomes) == max(200, done.sum()) and len(latest) > 50
    gaps = np.abs(np.array(latest)[:, None] - outcomes[-done.sum() :][None, :]).min(axis=1)
    assert gaps.max() < 1e-3
    assert g["agent"].budget.item() == pytest.approx(np.quantile(outcomes, 0.25), rel=1e-5)
    assert "budget" in g["best_model"] and g["alpha"] == 0.25


def test_static_advantages_equal_the_slow_definition(static):
    """From the values -E[(budget - Z)+] / alpha, and -(budget)+ / alpha of what is left where an episode ends."""
    g, alpha = static, 0.25
    args, budget, z = g["args"], g["state"][..., 0].double().numpy(), g["quantiles"].double().numpy()
    scaled, done = args.reward_scale * g["rewards"].double().numpy(), g["complete"].numpy()
    value = -np.maximum(budget[..., None] - z, 0).mean(axis=2) / alpha
    np.testing.assert_allclose(g["values"], value, atol=1e-4)
    for n in range(args.num_envs):
        carried = 0.0
        for t in reversed(range(args.num_steps)):
            ahead = -max(budget[t, n] - scaled[t, n], 0) / alpha if done[t, n] else value[t + 1, n]
            carried = ahead - value[t, n] + args.gae_lambda * (0.0 if done[t, n] else carried)
            assert float(g["advantages"][t, n]) == pytest.approx(carried, abs=2e-3)
    # nothing is bootstrapped at the end: all samples there are the last reward
    np.testing.assert_allclose(g["targets"].numpy()[done], np.repeat(scaled[done][:, None], 8, axis=1), rtol=1e-5)


def test_iterated_targets_and_advantages_are_of_one_step(iterated):
    """y = r + gamma rho(s'), s' an episode's own last observation where the window cut it."""
    g, alpha = iterated, 0.25
    z, done, scaled = g["quantiles"].numpy(), g["done"].numpy(), g["args"].reward_scale * g["rewards"].numpy()
    following = np.where(done[..., None], g["final_quantiles"].numpy(), z[1:])
    assert g["state"].shape[2] == 0 and done.any() and not (following[done] == z[1:][done]).any()
    y = scaled + 0.8 * following[..., :2].mean(axis=2)
    np.testing.assert_allclose(g["targets"].numpy()[..., 0], y, atol=1e-4)
    at_risk, rho = z[:-1, :, 1], z[..., :2].mean(axis=2)
    np.testing.assert_allclose(g["values"], rho, atol=1e-5)
    expected = at_risk - np.maximum(at_risk - y, 0) / alpha - rho[:-1]
    np.testing.assert_allclose(g["advantages"], expected, atol=1e-3)


def test_the_level_falls_from_one(script, inside):
    g = inside(*script.budget, *STATIC, "--total-timesteps", "20480", "--anneal-alpha", "0.5")
    events = EventAccumulator(str(g["run_dir"]))
    events.Reload()
    levels = [e.value for e in events.Scalars("charts/cvar_alpha")]
    np.testing.assert_allclose(levels, 0.25 ** np.minimum(1, np.arange(1, 21) / 10), rtol=1e-5)
    assert events.Scalars("charts/budget")[-1].value == pytest.approx(g["agent"].budget.item())
    for name in ("coverage_05", "coverage_50", "coverage_95"):
        assert [e.step for e in events.Scalars(f"eval/{name}")] == [1024 * n for n in (5, 10, 15, 20)]
    best = max(e.value for e in events.Scalars("eval/val_cvar"))
    assert g["run"]["val_cvar"] == pytest.approx(best, rel=1e-5) and "val_utility" not in g["run"]


# --- what is reported


@pytest.mark.parametrize("options, bars", [(STATIC, 7), (ITERATED, 1), ((*ITERATED, "--cvar-alpha", "1"), 7)])
def test_outcomes_are_those_of_the_ledgers(script, inside, capsys, options, bars):
    g = inside(*script.budget, *options)
    run, alpha, out = Run(g["run_dir"]).json, g["args"].cvar_alpha, capsys.readouterr().out
    exact = alpha == 1 or bars == 1
    names = ["agent", "equal weight", "closed form" if exact else "best constant", *(["mean-optimal"] if alpha < 1 else [])]
    assert list(run["outcomes"]) == names == list(run["scores"]["test"])
    for name, frame in g["compared"].items():
        windows = []
        for _, part in frame.groupby("market"):
            own = growth(part)
            windows += [own[k : k + bars].sum() for k in range(0, len(own) - bars + 1, bars)]
        count, found = len(windows), run["outcomes"][name]
        worst = np.sort(windows)
        share = np.clip(alpha * count - np.arange(count), 0, 1)
        tail = float(share @ worst / share.sum())
        assert found == {"windows": count, "bars": bars} | {key: pytest.approx(found[key]) for key in ("mean", "cvar")}
        assert found["mean"] == pytest.approx(np.mean(windows), rel=1e-9) and found["cvar"] == pytest.approx(tail, rel=1e-9)
        row = re.findall(rf"^{name} +.*$", out, re.MULTILINE)[-1]
        assert f"{found['mean']:.2%}" in row and f"{found['cvar']:.2%}" in row
    weight = np.stack(g["frames"]["test"]["action"])[:, 0].mean()
    assert run["tail"] == {"crashing_weight": pytest.approx(weight), "flip": portfolio_references.tail_flip(g["panel"], bars)}
    assert f"{weight:.3f}; the choice flips at the level {run['tail']['flip']:.3f}" in out
    if alpha < 1:  # the best score of validation is that of the model that is reported
        val = portfolio_references.episode_returns(g["frames"]["val"], bars)
        assert run["val_cvar"] == pytest.approx(portfolio_references.cvar(val, alpha), rel=1e-9)
        assert "utility_share" not in run


@pytest.mark.parametrize("options", [STATIC, ITERATED, (*ITERATED, "--cvar-alpha", "1")])
def test_calibration_compares_quantiles_with_what_came(script, inside, options, monkeypatch):
    """By the slow definition, from what the exploring agent saw and earned in its backtest. Bars whose outcome is not over at
    the end of the history do not count."""
    g = inside(*script.budget, "--num-quantiles", "8", *options)
    args, agent, alpha, seen, rewards = g["args"], g["agent"], g["args"].cvar_alpha, [], []
    see, run = g["see"], portfolio_references.run

    def watched(*parts, policy, **more):
        def after(reward, over, note=policy.after):
            rewards.append(args.reward_scale * reward.astype(np.float64))
            note(reward, over)

        policy.after = after
        return run(*parts, policy=policy, **more)

    monkeypatch.setattr(portfolio_references, "run", watched)
    monkeypatch.setitem(g["calibration"].__globals__, "see", lambda observation: seen.append(see(observation)) or seen[-1])
    before, shares, after = torch.get_rng_state(), g["calibration"](), torch.get_rng_state()
    assert shares == g["run"]["calibration"] and set(shares) == {"coverage_05", "coverage_50", "coverage_95"}
    assert torch.equal(before, after), "training would notice"
    length, below = 239, {0.05: [], 0.5: [], 0.95: []}
    r = np.stack(rewards)
    assert r.shape == (length, 2) == (len(seen), 2)
    with torch.no_grad():
        z = np.stack([agent.quantiles(x).double().numpy() for x in seen])
    greedy = args.reward_scale * growth(g["frames"]["val"]).reshape(2, -1).T
    assert np.abs(r - greedy).mean() > 0.01, "it does not explore"
    for market in range(2):
        for t in range(length):
            if g["static"]:
                end = (t // 7 + 1) * 7
                if end > length:
                    continue
                outcome = r[t:end, market].sum()
            elif alpha < 1:
                if t + 1 == length:
                    continue
                outcome = r[t, market] + 0.8 * z[t + 1, market, :2].mean()
            else:
                if 0.8 ** (length - t) > 0.01:
                    continue
                outcome = r[t:, market] @ 0.8 ** np.arange(length - t)
            for level, found in below.items():
                found.append(outcome <= np.interp(level, (np.arange(8) + 0.5) / 8, z[t, market]))
    for level, found in below.items():
        assert shares[f"coverage_{100 * level:02.0f}"] == pytest.approx(np.mean(found), abs=2 / len(found)), level


def test_a_static_agent_is_judged_with_the_budget_it_was_trained_with(static, monkeypatch):
    """In every horizon of a backtest the account starts with the model's budget and is spent by what the market paid."""
    g, states, state = static, [], type(static["played"]).state
    monkeypatch.setattr(type(g["played"]), "state", lambda account: states.append(state(account)) or states[-1])
    frame = g["backtest"]("test")
    budget, earned = g["agent"].budget.item(), g["args"].reward_scale * growth(frame).reshape(3, -1).T
    assert len(states) == len(earned)
    for t, state in enumerate(states):
        start = t - t % 7
        np.testing.assert_allclose(state[:, 1], 1 - (t % 7) / 7, atol=1e-6)
        np.testing.assert_allclose(state[:, 0], budget - earned[start:t].sum(axis=0), atol=1e-4)


def test_actor_and_critic_are_clipped_apart(script, inside):
    g = inside(*script.short, "--max-grad-norm", "1e-3", "--total-timesteps", "1024")
    agent = g["agent"]
    for part in ([*agent.actor.parameters(), agent.log_std], [*agent.critic.parameters()]):
        assert float(torch.stack([p.grad.norm() for p in part]).norm()) == pytest.approx(1e-3, rel=1e-2)


# --- on a GPU, and over several processes


def test_budgets_on_a_device_change_nothing(script, tmp_path):
    """The rollout that a GPU takes, on the simulator: the same accounts and outcomes, and so the same weights."""
    options = [*STATIC, "--market", "synthetic:tail:bars=300:train=1:val=1:test=1", "--num-envs", "4", "--num-steps", "16"]
    options += ["--cvar-alpha", "0.5", "--num-minibatches", "1", "--total-timesteps", "128", "--num-threads", "1", "--no-cuda"]
    host, device = (
        finish(script, *options, "--market-device", name, runs_dir=tmp_path / name, **SIMULATOR).model
        for name in ("cpu", "cuda")
    )
    assert len(host["account"][3]) > 10 and host["model"]["budget"] != 0.0
    for part in ("model", "account", "envs"):
        assert_same_content(device[part], host[part], part)


@with_gpu
@pytest.mark.parametrize("options", (STATIC, ITERATED))
def test_captured_equals_eager_while_the_level_falls(script, tmp_path, options):
    short = [option for option in script.budget if option != "--no-cuda"] + [*options, "--anneal-alpha", "0.5"]
    plain = finish(script, *short, runs_dir=tmp_path / "plain").model
    captured = finish(script, *short, "--cudagraphs", runs_dir=tmp_path / "captured").model
    for part in ("model", "account"):
        assert_same_content(captured[part], plain[part], part)


SPY = """
import os, runpy, sys, torch
folder, sys.argv = sys.argv[1], sys.argv[2:]
g = runpy.run_path(sys.argv[0], run_name="__main__")
content = {name: g[name] for name in ("outcomes", "earned", "complete")} | {"account": vars(g["account"])}
torch.save(content | {"start": g["agent"].budget}, f"{folder}/rank{os.environ['RANK']}.pt")
"""


def test_two_processes_share_a_budget_and_keep_their_accounts(script, tmp_path):
    """The quantile of what the horizons of both have earned."""
    (tmp_path / "spy.py").write_text(SPY)
    options = [*script.budget, *STATIC, "--total-timesteps", "2048", "--runs-dir", str(tmp_path / "runs")]
    done = torchrun(str(tmp_path / "spy.py"), str(tmp_path), str(script.path), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    latest = torch.cat([rank["earned"][rank["complete"]] for rank in (first, second)])
    assert torch.equal(first["outcomes"], second["outcomes"]) and torch.equal(first["outcomes"][-len(latest) :], latest)
    assert not torch.equal(first["earned"], second["earned"]) and first["start"] == second["start"]
    assert first["start"].item() == pytest.approx(np.quantile(first["outcomes"].double().numpy(), 0.25))
    (folder,) = (tmp_path / "runs").iterdir()
    *accounts, outcomes = Run(folder).model["account"]
    assert torch.equal(outcomes, first["outcomes"])
    for name, found in zip(("budget", "bars", "earned"), accounts):
        assert torch.equal(found, torch.cat([first["account"][name], second["account"][name]])), name


# --- resume, other environments, what goes wrong


@pytest.mark.parametrize("options", [STATIC, ITERATED])
def test_a_resumed_run_ends_with_the_same_bits(script, inside, options, monkeypatch):
    """Stopped after four of six iterations."""
    whole = inside(*script.budget, *options)
    save, calls = torch.save, []

    def stop(content, path):
        calls.append(path)
        if content["iteration"] == 6:
            raise KeyboardInterrupt
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            inside(*script.budget, *options)
    g = inside("--resume", str(calls[-1].parent))
    for name, value in whole["agent"].state_dict().items():
        assert torch.equal(g["agent"].state_dict()[name], value), name
    for name in ("budget", "bars", "earned"):
        assert torch.equal(getattr(g["account"], name), getattr(whole["account"], name)), name
    assert torch.equal(g["outcomes"], whole["outcomes"]) and (len(g["outcomes"]) > 0) == g["static"]
    assert g["run"]["outcomes"] == whole["run"]["outcomes"]


@pytest.mark.parametrize("risk", ["static", "iterated"])
def test_other_environments_with_a_tail(script, inside, risk, capsys):
    options = ["--cvar-alpha", "0.25", "--risk", risk, "--num-minibatches", "8"]
    g = inside("--env-id", "Pendulum-v1", "--total-timesteps", "4096", *options)
    assert g["args"].gamma == (1.0 if risk == "static" else 0.9) and g["horizon"] == 200
    assert g["run"]["eval_cvar"] == pytest.approx(cvar_of(g["returns"], 0.25))
    assert g["run"]["eval_cvar"] < g["run"]["eval_return"] and f"{g['run']['eval_cvar']:.4g}" in capsys.readouterr().out


def test_static_settings_come_with_the_risk_and_flags_override(script, inside):
    small = [*script.budget, "--total-timesteps", "1024", "--market", TAIL]
    for options, expected in (
        (["--cvar-alpha", "1.0", "--gamma", "0.5"], (0.5, 0.9, 4)), (["--cvar_alpha=0.5"], (1.0, 1.0, 16)),
        (["--cvar-alpha", "0.5", "--risk", "iterated"], (0.9, 0.9, 16)),
        (["--cvar-alpha", "0.5", "--num-minibatches", "2"], (1.0, 1.0, 2)),
    ):  # fmt: skip
        args = inside(*small, *options)["args"]
        assert (args.gamma, args.gae_lambda, args.num_minibatches) == expected, options
        assert (args.horizon, args.log_std, args.reward_scale) == (10, 0.0, 20.0)
        assert dataclasses.asdict(args.portfolio) | {"costs": "zero", "cash": False} == dataclasses.asdict(args.portfolio)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--cvar-alpha", "0"], ("--cvar-alpha 0", "above 0 and at most 1")),
        (["--cvar-alpha", "1.5"], ("--cvar-alpha 1.5", "above 0 and at most 1")),
        (["--risk", "nested"], ("--risk nested", "static or iterated")),
        (["--anneal-alpha", "-1"], ("--anneal-alpha -1", "0 to 1")),
        (["--num-quantiles", "0"], ("--num-quantiles 0", "at least")),
        (["--cvar-alpha", "0.1", "--num-quantiles", "9"], ("--num-quantiles 9", "10")),
        (["--cvar-alpha", "0.5", "--gamma", "0.9"], ("--gamma 0.9", "expected 1 with --risk static")),
        (["--cvar-alpha", "0.25"], ("--num-minibatches 16", "64", "20 / --cvar-alpha")),
        (["--horizon", "0"], ("--horizon 0", "expected 1 to 239")),
        (["--cvar-alpha", "0.5", "--horizon", "240"], ("--horizon 240", "1 to 239")),
        (["--cvar-alpha", "0.1", "--num-quantiles", "32", "--log-dataset", "logs"], ("--log-dataset logs", "--risk static")),
        (["--penalty-cvar-alpha", "0"], ("cvar_alpha=0", "fraction")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line


def test_a_task_without_a_time_limit_has_no_episode_budget(script, complaint, register):
    toy = register(Toy, script.toy)
    line = complaint(*toy, "--cvar-alpha", "0.5", "--num-minibatches", "4")
    assert "--env-id Toy-v0" in line and "no time limit" in line and "--risk iterated" in line
    assert Bandit is not None
