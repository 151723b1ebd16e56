"""algos/grpo_diffmarket.py: what it alone does: two estimators of one gradient, its policies, utilities, stress scenarios."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import SCRIPTS, Run, actions_of, candles
from torch.distributions import Dirichlet, Independent, Normal, kl_divergence

from envs import ledger, portfolio_references
from envs.costs import RUIN
from envs.diffmarket import Account, DiffMarket
from envs.neutral import market_beta
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import load_market, make_panel

pytest_plugins = ["scripts"]

GP = "synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=1"
BLACK_SCHOLES = "synthetic:black-scholes:bars=71:train=20:val=3:test=4"
TINY = ["--num-windows", "8", "--group-size", "2", "--horizon", "8", "--lookback", "4", "--hidden", "8", "--embedding", "2"]
TINY += ["--total-timesteps", "512", "--eval-every", "2"]
SCRIPT = SCRIPTS["grpo_diffmarket"]


@pytest.fixture
def script():
    return SCRIPT


def setting(market=GP, seed=0, **changes):
    """The module, and arguments, agent, market and tables on a market, as the script makes them."""
    m = SCRIPT.module
    known = next((values for name, values in m.KNOWN.items() if market.startswith(name)), {})
    args = m.Args(**{"hidden": 8, "lookback": 3, "num_windows": 8, "group_size": 4, "horizon": 6, **known, **changes})
    panel = load_market(market, seed)
    data = PortfolioData(panel, dataclasses.replace(args.portfolio, orders="target", scale=args.portfolio.gross))
    tables = m.make_tables(args, data, "cpu")
    torch.manual_seed(seed)
    agent = m.Agent(args, panel.num_symbols, tables.features.shape[2])
    with torch.no_grad():
        agent.scale.copy_(1.0 / tables.features.flatten(0, 1).std(0).clamp(min=1e-3))
        for layer in (agent.score, agent.cash):
            if layer is not None:  # scores of some size, so that something depends on them
                layer.weight.mul_(50.0)
    return m, args, panel, data, tables, agent, DiffMarket(data.execution, data.costs, args.smooth)


# --- two estimators of one gradient


def test_grpo_and_pathwise_gradients_agree_on_a_one_step_quadratic():
    """One bar, mean-variance utility, no costs: quadratic in the action. The cosine of both gradients goes to 1 with samples:
    1 - cosine falls about as the inverse of their number, as it must for an unbiased estimate."""
    m, args, panel, _, tables, agent, market = setting(
        "synthetic:merton:bars=300:train=2:val=1:test=1:drift=0.01", utility="mean_variance", risk_aversion=10.0, horizon=1,
        lookback=1, group_size=2, log_std=-1.0, gamma=0.0, reward_scale=1.0, portfolio=PortfolioConfig(
            costs="zero", constraints="long_short", gross=1e3, asset_cap=1e3, scale=1.0),
    )  # fmt: skip
    rows = torch.arange(60, 60 + 16).unsqueeze(1)
    parameters = list(agent.parameters())

    def flat(loss):
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads]).double()

    def grpo():
        with torch.no_grad():
            path = m.roll_out(args, agent, market, tables, rows, args.group_size)
            utility = m.utility_of(args, tables, rows, path)
            advantages = m.advantages_of(args, m.rewards_of(args, path.growth), utility, 1)
            old = agent.log_prob(path.scores, m.choices(agent, tables.present[rows].unsqueeze(1)), path.actions)
        return flat(m.grpo_loss(args, agent, tables, rows, path, advantages, old)[0])

    torch.manual_seed(1)
    exact = sum(flat(m.pathwise_loss(args, agent, market, tables, rows)[0]) for _ in range(100)) / 100
    total, curve = torch.zeros_like(exact), {}
    for n in range(1, 257):
        total += grpo()
        if n in (1, 4, 16, 64, 256):
            curve[n] = float(torch.cosine_similarity(total, exact, dim=0))
    assert curve[256] > 0.999 and 1.0 - curve[256] < 0.1 * (1.0 - curve[1]), curve
    assert float(total.norm() / 256 / exact.norm()) == pytest.approx(
        1.0, abs=0.1
    )  # the size agrees too: nothing is scaled twice


def test_the_pathwise_gradient_is_that_of_the_utility():
    """Against differences of the utility over the whole window, with costs, in float64: nothing is detached on the way."""
    m, args, _, data, tables, agent, _ = setting(utility="drawdown", penalty=1.0, smooth=1e-3, log_std=-8.0)
    market, agent = DiffMarket(data.execution, data.costs, args.smooth, dtype=torch.float64), agent.double()
    tables = m.Tables(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in tables))
    rows = m.rows_of(torch.tensor([70, 100, 390]), 6)

    def utility():
        torch.set_default_dtype(torch.float64)
        try:
            path = m.roll_out(args, agent, market, tables, rows, 1, explore=False)
            return m.utility_of(args, tables, rows, path).mean()
        finally:
            torch.set_default_dtype(torch.float32)

    for parameter, at in (
        (agent.score.weight, (0, 3)),
        (agent.held, (2,)),
        (agent.account.weight, (1, 2)),
        (agent.symbol, (1, 0)),
    ):
        (grad,) = torch.autograd.grad(utility(), parameter)
        with torch.no_grad():
            parameter[at] += 1e-4
            up = utility()
            parameter[at] -= 2e-4
            down = utility()
            parameter[at] += 1e-4
        assert float(grad[at]) == pytest.approx(float(up - down) / 2e-4, rel=1e-4) and grad[at] != 0


def test_the_gradient_of_the_kl_penalty_runs_through_the_weights_held():
    """Against differences, in float64: states depend on the parameters too, and both policies are read in them."""
    m, args, _, data, tables, agent, _ = setting(kl_coef=1.0, reward_scale=0.0, log_std=-1.0, group_size=2)
    market, agent = DiffMarket(data.execution, data.costs, args.smooth, dtype=torch.float64), agent.double()
    tables = m.Tables(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in tables))
    reference = copy.deepcopy(agent).requires_grad_(False)
    with torch.no_grad():
        reference.score.weight.mul_(-1.0)
        reference.held.mul_(2.0)
    rows = m.rows_of(torch.tensor([70, 390]), 6)

    def penalty():
        torch.manual_seed(0)
        return m.pathwise_loss(args, agent, market, tables, rows, reference)[0]

    parameter, at = agent.score.weight, (0, 3)
    (grad,) = torch.autograd.grad(penalty(), parameter)
    with torch.no_grad():
        parameter[at] += 1e-5
        up = penalty()
        parameter[at] -= 2e-5
        down = penalty()
    assert float(grad[at]) == pytest.approx(float(up - down) / 2e-5, rel=1e-4)


def test_advantages_equal_the_slow_definition():
    m, args, *_ = setting(gamma=0.8)
    rng = torch.Generator().manual_seed(0)
    rewards, utility = torch.randn((3, 4, 5), generator=rng), torch.randn((3, 4), generator=rng)
    found = m.advantages_of(args, rewards, utility, 5)
    whole = m.advantages_of(args, None, utility, 5)
    for b, g, t in np.ndindex(3, 4, 5):
        to_go = [sum(0.8**k * float(rewards[b, i, t + k]) for k in range(5 - t)) for i in range(4)]
        others = [i for i in range(4) if i != g]
        assert float(found[b, g, t]) == pytest.approx(to_go[g] - np.mean([to_go[i] for i in others]), abs=1e-5)
        assert float(whole[b, g, t]) == pytest.approx(5 * float(utility[b, g] - utility[b, others].mean()), abs=1e-5)


def test_the_clipped_surrogate_term_by_term():
    m, args, _, _, tables, agent, market = setting(clip_low=0.1, clip_high=0.3)
    rows = m.rows_of(torch.tensor([70, 400]), 6)
    with torch.no_grad():
        path = m.roll_out(args, agent, market, tables, rows, 4)
        old = agent.log_prob(path.scores, m.choices(agent, tables.present[rows].unsqueeze(1)), path.actions)
        advantages = torch.randn(old.shape)
        loss, ratio = m.grpo_loss(args, agent, tables, rows, path, advantages, old)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)  # the same weights, states and actions
        assert float(loss) == pytest.approx(-float(advantages.mean()), abs=1e-5)
        moved = old + torch.linspace(-1, 1, old.numel()).view(old.shape)
        loss, ratio = m.grpo_loss(args, agent, tables, rows, path, advantages, moved)
    a, r = advantages.double().numpy(), ratio.double().numpy()
    expected = -np.where(a > 0, a * np.minimum(r, 1.3), a * np.maximum(r, 0.9)).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5) and (r > 1.3).any() and (r < 0.9).any()


def test_mix_weights_by_inverse_variance(inside):
    g = inside(
        "--market", GP, *TINY, "--estimator", "mix", "--microbatches", "4", "--total-timesteps", "128", "--max-grad-norm", "1e9"
    )
    grpo, pathwise = (torch.stack(kept) for kept in g["gradients"])
    assert grpo.shape == pathwise.shape and len(grpo) == 4
    v = [float(x.var(0).sum()) for x in (grpo, pathwise)]
    assert float(g["share"]) == pytest.approx(v[0] / sum(v), rel=1e-5) and 0.5 < float(g["share"]) < 1
    expected = (v[1] * grpo.mean(0) + v[0] * pathwise.mean(0)) / sum(v)
    torch.testing.assert_close(g["mixed"], expected)


# --- policies


@pytest.mark.parametrize("policy", ["gaussian", "dirichlet"])
def test_densities_and_divergences_are_torchs(policy):
    m = SCRIPT.module
    args = m.Args(policy=policy, hidden=4, lookback=1, log_std=-0.7)
    agent, other = (m.Agent(args, 3, 2) for _ in range(2))
    with torch.no_grad():
        other.log_std.add_(0.3)
    torch.manual_seed(0)
    scores, moved = torch.randn(50, 4), torch.randn(50, 4)
    mask = torch.tensor([[True, True, False, True]]).expand(50, -1)

    def distribution(agent, scores):
        scores = scores[:, [0, 1, 3]]
        if policy == "gaussian":
            return Independent(Normal(scores, agent.log_std[[0, 1, 3]].exp()), 1)
        return Dirichlet((-2 * agent.log_std).exp() * 3 * scores.softmax(-1) + 1e-3)

    action = agent.sample(scores, mask, torch.randn(50, 4))
    ours = agent.log_prob(scores, mask, action)
    theirs = distribution(agent, scores)
    torch.testing.assert_close(ours, theirs.log_prob(action[:, [0, 1, 3]]), rtol=1e-4, atol=1e-3)
    divergence = kl_divergence(theirs, distribution(other, moved))
    torch.testing.assert_close(agent.kl(scores, mask, other, moved), divergence, rtol=1e-3, atol=1e-3)
    assert (agent.kl(scores, mask, agent, scores).abs() < 1e-4).all()
    many = torch.stack([agent.sample(scores, mask, torch.randn(50, 4)) for _ in range(4000)])[..., [0, 1, 3]]
    torch.testing.assert_close(many.mean(0), theirs.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), theirs.variance.sqrt(), atol=0.05, rtol=0.1)
    torch.testing.assert_close(agent.mean_action(scores, mask)[:, [0, 1, 3]], theirs.mean, atol=1e-5, rtol=0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_orders_are_inside_the_constraints(data):
    """Whatever the scores and the weights held: caps, budget, what cannot be ordered; in training as in the kernel."""
    m = SCRIPT.module
    symbols, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    long_only = data.draw(st.booleans())
    gross = 1.0 if long_only else data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    cap = data.draw(st.sampled_from([0.2, 1.0, 10.0]))
    kill = data.draw(st.sampled_from([None, 0.1]))
    portfolio = PortfolioConfig(
        constraints="long_only" if long_only else "long_short", gross=gross, asset_cap=cap, scale=0.7,
        orders="target" if long_only else data.draw(st.sampled_from(["target", "change"])),
    )  # fmt: skip
    policy = data.draw(st.sampled_from(["gaussian", "dirichlet"])) if long_only else "gaussian"
    args = m.Args(portfolio=portfolio, policy=policy, kill_drawdown=kill)
    held = torch.tensor(rng.dirichlet(np.ones(symbols + 1), (5, 2))[..., :-1], dtype=torch.float32)
    held = held * (1 if long_only else torch.tensor(rng.choice([-1.0, 1.0], held.shape), dtype=torch.float32))
    held = held * gross * min(1.0, cap)
    present = torch.tensor(rng.random((5, 1, symbols)) < 0.7)
    cap_now = torch.tensor(rng.choice([gross, 0.5 * gross], (5, 1)), dtype=torch.float32)
    exposures = torch.tensor(rng.normal(1, 1, (5, 1, symbols, 1)), dtype=torch.float32)
    exposures = exposures if not long_only and data.draw(st.booleans()) else None
    scores = torch.tensor(
        rng.normal(0, data.draw(st.sampled_from([0.1, 3.0])), (5, 2, symbols + long_only)), dtype=torch.float32
    )
    if policy == "dirichlet":
        mask = torch.cat([present, torch.ones_like(present[..., :1])], -1)
        scores = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    equity = torch.tensor(rng.uniform(0.7, 1.0, (5, 2)), dtype=torch.float32)
    account = Account(held, equity, torch.ones_like(equity))
    order = m.target_weights(args, scores, account, m.Bar(present, cap_now, exposures))
    assert torch.isfinite(order).all() and order.shape == held.shape
    assert torch.equal(order[~present.expand_as(order)], held[~present.expand_as(held)])
    fixed = (held * ~present).abs().sum(-1)
    assert ((order * present).abs().sum(-1) <= (cap_now - fixed).clamp(min=0) + 1e-5).all()
    assert ((order * present).abs() <= cap + 1e-6).all()
    if long_only:
        assert (order >= 0).all()
    if exposures is not None and present.all():
        assert ((exposures.squeeze(-1) * order).sum(-1).abs() < 1e-4).all()
    if kill:
        calm = m.target_weights(
            args, scores, account._replace(equity=torch.ones_like(equity)), m.Bar(present, cap_now, exposures)
        )
        assert ((order * present).abs().sum(-1) <= (calm * present).abs().sum(-1) + 1e-5).all()


@pytest.mark.parametrize("policy", ["gaussian", "dirichlet"])
def test_gradients_are_finite_where_no_symbol_has_a_bar(policy):
    """Without cash there is then no choice at all: what is held stays, and gradients go on through it alone."""
    portfolio = PortfolioConfig(cash=False, costs="institutional")
    m, args, _, _, tables, agent, market = setting(policy=policy, portfolio=portfolio, estimator="mix", utility="log")
    tables.present[[72, 74]] = False
    rows, parameters = m.rows_of(torch.tensor([70, 400]), 6), list(agent.parameters())
    with torch.no_grad():
        path = m.roll_out(args, agent, market, tables, rows, 2)
        mask = m.choices(agent, tables.present[rows].unsqueeze(1))
        old = agent.log_prob(path.scores, mask, path.actions)
    torch.testing.assert_close(path.targets[0, :, 2], path.states[0, :, 2, :4])
    loss, ratio = m.grpo_loss(args, agent, tables, rows, path, torch.randn(old.shape), old)
    for each in (loss, m.pathwise_loss(args, agent, market, tables, rows)[0]):
        grads = torch.autograd.grad(each, parameters, materialize_grads=True)
        assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.any() for grad in grads)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-3, rtol=0)


def test_pairs_stay_balanced_where_a_leg_has_no_bar():
    """The other leg offsets what is held of it: nothing, once it was delisted."""
    m = SCRIPT.module
    args = m.Args(pairs=2, portfolio=PortfolioConfig(constraints="long_short", gross=4.0, scale=1.0))
    legs = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.5], [0.0, -0.5], [0.0, 0.0]])
    held = torch.tensor([0.2, -0.2, 0.3, -0.3, 0.0]).expand(3, -1)
    present = torch.tensor([[True] * 5, [True, False, True, True, True], [True, False, False, False, True]])
    bar = m.Bar(present, torch.full((3,), 4.0), None)
    score = torch.tensor([0.5, 0.3, -0.2, 0.4, 0.9]).expand(3, -1)
    order = m.target_weights(args, score, Account(held, torch.ones(3), torch.ones(3)), bar, 2.0 * legs @ legs.T)
    expected = [[0.1, -0.1, -0.3, 0.3, 0.0], [0.2, -0.2, -0.3, 0.3, 0.0], [0.2, -0.2, 0.3, -0.3, 0.0]]
    torch.testing.assert_close(order, torch.tensor(expected))
    gone = Account(held * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), torch.ones(3), torch.ones(3))
    order = m.target_weights(args, score, gone, bar, 2.0 * legs @ legs.T)
    assert order[1, 0] == 0.0 and order[2, 0] == 0.0


def test_the_kill_switch_is_a_logistic_function_of_the_drawdown():
    m = SCRIPT.module
    args = m.Args(kill_drawdown=0.1, kill_width=0.02, portfolio=PortfolioConfig(constraints="long_short", gross=2.0, scale=1.0))
    drawdown = torch.tensor([0.0, 0.06, 0.1, 0.14, 0.3])
    equity = (1.0 - drawdown).requires_grad_()
    account = Account(torch.zeros(5, 1), equity, torch.ones(5))
    order = m.target_weights(
        args, torch.full((5, 1), 0.8), account, m.Bar(torch.ones(5, 1).bool(), torch.full((5,), 2.0), None)
    )
    expected = 0.8 / (1 + np.exp((drawdown.numpy() - 0.1) / 0.02))
    np.testing.assert_allclose(order.detach().squeeze(1).numpy(), expected, atol=1e-5)
    (grad,) = torch.autograd.grad(order.sum(), equity)
    assert (grad >= 0).all() and grad[2] == pytest.approx(0.8 * 0.25 / 0.02, rel=1e-3)


@pytest.mark.parametrize("encoder", ["mlp", "gru"])
def test_a_window_is_encoded_as_bar_by_bar_and_only_from_the_past(encoder):
    m, args, panel, _, tables, agent, _ = setting(encoder=encoder, lookback=5, embedding=2)
    rows = m.rows_of(torch.tensor([70, 302, 450]), 8)  # the second begins near the start of its history
    with torch.no_grad():
        found = agent.encode(tables, rows)
        if encoder == "mlp":  # the same bars whatever window they are in
            for t in (0, 3, 7):
                torch.testing.assert_close(agent.encode(tables, rows[:, t : t + 1]), found[:, t : t + 1], atol=1e-5, rtol=1e-4)
        later = tables.features.clone()
        later[75:300] = torch.randn_like(later[75:300])
        changed = agent.encode(tables._replace(features=later), rows)
        assert torch.equal(changed[0, :5], found[0, :5]) and not torch.allclose(changed[0, 5:], found[0, 5:])
        assert torch.equal(changed[1:], found[1:])  # nor another history
        before = tables.features.clone()
        before[:300] = torch.randn_like(before[:300])
        assert torch.equal(agent.encode(tables._replace(features=before), rows)[1:], found[1:])
        window = agent.encode(tables, rows[:1])
        older = tables.features.clone()
        older[:66] = 0.0  # before the lookback
        assert torch.equal(agent.encode(tables._replace(features=older), rows[:1]), window)
        older[66] = 1.0
        assert not torch.allclose(agent.encode(tables._replace(features=older), rows[:1])[:, 0], window[:, 0])


def test_symbols_are_alike_and_permuting_them_permutes_orders():
    m, args, _, _, tables, agent, market = setting(embedding=0, utility="log")
    rows, order = m.rows_of(torch.tensor([70, 400]), 6), torch.tensor([2, 0, 3, 1])
    permuted = tables._replace(features=tables.features[:, order])
    with torch.no_grad():
        torch.testing.assert_close(agent.encode(permuted, rows), agent.encode(tables, rows)[:, :, order], atol=1e-5, rtol=1e-4)
        encoded, state = agent.encode(tables, rows), torch.randn(2, 6, 8)
        moved = torch.cat([state[..., order], state[..., 4:]], dim=-1)
        torch.testing.assert_close(
            agent.decide(encoded[:, :, order], moved), agent.decide(encoded, state)[..., order], atol=1e-5, rtol=1e-4
        )


# --- utilities


def windows_of_growth(seed=0, shape=(3, 4, 50)):
    return 1.0 + 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rollout(growth, states=None, targets=None):
    return SCRIPT.module.Rollout(growth, states, None, None, targets)


def test_utilities_by_hand():
    m = SCRIPT.module
    growth = windows_of_growth()
    g = growth.numpy()

    def utility(name, **changes):
        args = m.Args(utility=name, penalty=0.3, **changes)
        return m.utility_of(args, None, None, rollout(growth)).numpy()

    log = np.log(g).mean(-1)
    np.testing.assert_allclose(utility("log"), log)
    np.testing.assert_allclose(utility("mean_variance", risk_aversion=7.0), ((g - 1) - 3.5 * (g - 1) ** 2).mean(-1))
    np.testing.assert_allclose(utility("sharpe"), (g - 1).mean(-1) / (g - 1).std(-1, ddof=1), rtol=1e-4)
    equity = np.cumprod(np.concatenate([np.ones((3, 4, 1)), g], axis=-1), axis=-1)
    fall = 1 - equity / np.maximum.accumulate(equity, axis=-1)
    np.testing.assert_allclose(utility("drawdown"), log - 0.3 * fall[..., 1:].mean(-1))
    v = np.linspace(-0.1, 0.1, 20001)
    for at in np.ndindex(3, 4):  # the minimum over v, found by trying
        worst = (v + np.maximum(-(g[at] - 1) - v[:, None], 0).mean(1) / 0.2).min()
        assert utility("cvar", cvar_alpha=0.2)[at] == pytest.approx(log[at] - 0.3 * worst, abs=1e-5)
    for at in np.ndindex(3, 4):  # a tail of 2.5 bars
        worst = np.sort(1 - g[at])[::-1]
        tail = (worst[0] + worst[1] + 0.5 * worst[2]) / 2.5
        assert utility("cvar", cvar_alpha=0.05)[at] == pytest.approx(log[at] - 0.3 * tail, abs=1e-9)
    net = growth.clone().requires_grad_()
    args = m.Args(utility="cvar", cvar_alpha=0.05, penalty=1.0)
    risk = net.clamp(min=RUIN).log().mean(-1) - m.utility_of(args, None, None, rollout(net))
    (grad,) = torch.autograd.grad(risk.sum(), net)
    torch.testing.assert_close(grad.sum(-1), -torch.ones_like(risk))  # all returns up by x: the risk down by x
    ruined = growth.clone()
    ruined[0, 0, 3] = -2.0
    floored = (np.log(g[0, 0]).sum() - np.log(g[0, 0, 3]) + np.log(RUIN)) / 50
    assert float(m.utility_of(m.Args(), None, None, rollout(ruined))[0, 0]) == pytest.approx(floored)


def test_risk_budget_is_best_where_contributions_are_equal():
    m = SCRIPT.module
    rng = torch.Generator().manual_seed(0)
    returns = torch.randn((2000, 3), generator=rng, dtype=torch.float64) * torch.tensor([0.01, 0.02, 0.04])
    tables = m.Tables(None, None, None, None, torch.zeros_like(returns), returns, None, None)
    rows = torch.arange(2000).unsqueeze(0)
    args = m.Args(utility="risk_budget", penalty=1.0)
    growth = torch.ones((1, 1, 2000), dtype=torch.float64)

    def penalty(weights):
        targets = torch.tensor(weights, dtype=torch.float64).expand(1, 1, 2000, 3)
        return -float(m.utility_of(args, tables, rows, rollout(growth, torch.zeros_like(targets), targets)))

    assert penalty([4 / 7, 2 / 7, 1 / 7]) < 0.01 < penalty([1 / 3, 1 / 3, 1 / 3])
    assert penalty([1.0, 0.0, 0.0]) == pytest.approx(4 / 9 + 2 / 9, abs=1e-9)


@pytest.mark.parametrize("fill", ["next_open", "next_close", "same_close"])
def test_risk_budget_is_of_the_profit_that_the_account_makes(fill):
    """Symbol by symbol, the profits whose covariance is taken add up to the account's return, whenever orders are filled."""
    m, args, _, _, tables, agent, market = setting(
        utility="risk_budget", portfolio=PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, fill=fill),
    )  # fmt: skip
    market.smooth, rows = 0.0, m.rows_of(torch.tensor([70, 400]), 6)
    with torch.no_grad():
        path = m.roll_out(args, agent, market, tables, rows, 4)
        net = path.growth - 1.0
        profit = path.states[..., :4] * tables.to_fill[rows].unsqueeze(1) + path.targets * tables.to_mark[rows].unsqueeze(1)
        found = m.utility_of(args, tables, rows, path)
    torch.testing.assert_close(profit.sum(-1), net, atol=1e-4, rtol=0.01)
    share = torch.stack(
        [
            torch.stack([torch.cov(torch.stack([profit[b, g, :, i], profit[b, g].sum(-1)]))[0, 1] for i in range(4)])
            for b in range(2)
            for g in range(4)
        ]
    ).view(2, 4, 4)
    share = share / share.sum(-1, keepdim=True)
    expected = path.growth.log().mean(-1) - args.penalty * (share - 0.25).square().sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_hedging_maximises_minus_the_variance_of_what_is_left():
    m = SCRIPT.module
    growth, owed = windows_of_growth(), torch.zeros(300, dtype=torch.float64)
    rows = m.rows_of(torch.tensor([10, 100, 200]), 50)
    owed[[60, 150, 250]] = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    tables = m.Tables(None, None, None, None, None, None, None, owed)
    growth.requires_grad_()
    left = growth.prod(-1) - torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).unsqueeze(-1)
    found = m.utility_of(m.Args(utility="hedge"), tables, rows, rollout(growth)).mean()
    assert float(found.detach()) == pytest.approx(-float(left.detach().var(correction=0)))
    ours, theirs = torch.autograd.grad(found, growth)[0], torch.autograd.grad(-left.var(correction=0), growth)[0]
    torch.testing.assert_close(ours, theirs)  # though its mean is held fixed


# --- runs


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    """Daily bars of six symbols with gaps, as a file."""
    path = tmp_path_factory.mktemp("market") / "bars.csv"
    bars = candles()
    bars[np.random.default_rng(3).random(len(bars)) > 0.03].to_csv(path, index=False)
    return str(path)


CHOICES = {
    "dirichlet": ["--policy", "dirichlet", "--estimator", "mix", "--microbatches", "2", "--kl-coef", "0.1"],
    "gru": ["--encoder", "gru", "--estimator", "grpo", "--update-epochs", "2", "--microbatches", "3"],
    "fully invested": ["--no-cash", "--estimator", "grpo"],
    "features": ["--ohlc", "--wavelets", "3", "--asset-cap", "0.3"],
    "market neutral": ["--constraints", "long_short", "--neutral", "market", "--gross", "2"],
    "factors": ["--constraints", "long_short", "--neutral", "factors", "--neutral-count", "2", "--orders", "change"],
    "clusters": ["--constraints", "long_short", "--neutral", "clusters", "--neutral-count", "2"],
    "pairs": ["--constraints", "long_short", "--pairs", "2", "--kill-drawdown", "0.02"],
    "stress": ["--stress-share", "0.5", "--stress-histories", "3", "--neutral", "market", "--constraints", "long_short"],
    "learned stress": [
        "--stress-share", "1", "--stress-model", "learned", "--stress-labels", "1", "3", "--stress-candidates", "1",
    ],
    **{name: ["--utility", name] for name in ("sharpe", "cvar", "drawdown", "risk_budget")},
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains_and_is_reported_by_the_kernel(choice, prices, inside):
    """The ledger's orders are the policy's own: the kernel's projection finds nothing to change, and the utility is that of
    training's market."""
    horizon = ["--horizon", "16"] if choice == "learned stress" else []
    g = inside("--market", prices, *TINY, *CHOICES[choice], *horizon, "--total-timesteps", "1024")
    run, args, frames = g["run"], g["args"], g["frames"]
    assert run["status"] == "finished" and np.isfinite(run["val_utility"])
    orders = actions_of(frames["val"])
    assert np.isfinite(orders).all() and np.abs(orders).sum(axis=1).max() <= args.portfolio.gross + 1e-5
    assert np.abs(orders).max() <= args.portfolio.asset_cap + 1e-5 and np.abs(orders).sum() > 0
    at = g["markets"]["val"].starts[0] + np.arange(len(orders))
    complete = g["panel"].present[at].all(axis=1)
    assert 0 < complete.sum() < len(orders)
    if choice in ("market neutral", "stress"):
        exposure = (market_beta(g["panel"])[at] * orders).sum(axis=1)
    elif choice == "factors":
        exposure = np.einsum("tnk,tn->tk", g["tables"].exposures[at].numpy(), orders)
    elif choice == "clusters":
        exposure = orders @ np.eye(2)[g["selection"]]
    elif choice == "pairs":
        exposure = orders - orders @ g["chosen_pairs"].numpy()
        assert np.linalg.matrix_rank(g["chosen_pairs"].numpy()) == 2
    else:
        exposure = np.zeros(len(orders))
    np.testing.assert_allclose(exposure[complete], 0.0, atol=1e-5)
    if choice == "fully invested":
        np.testing.assert_allclose(orders.sum(axis=1), 1.0, atol=1e-5)
    if choice not in ("risk_budget",):
        growth = torch.tensor(1.0 + frames["val"]["net_return"].to_numpy()).view(1, 1, -1)
        again = float(SCRIPT.module.utility_of(args, None, None, rollout(growth)))
        assert again == pytest.approx(run["val_utility"], rel=2e-3, abs=2e-5)


def test_the_model_is_chosen_on_validation_and_the_test_split_read_once(script, inside, monkeypatch):
    read, run_of = [], portfolio_references.run

    def spy(*args, **kwargs):
        read.append(kwargs["split"].name)
        return run_of(*args, **kwargs)

    monkeypatch.setattr(portfolio_references, "run", spy)
    g = inside(*script.short, "--learning-rate", "0.05")
    assert read == ["train", "val", "test"]
    saved = Run(g["run_dir"]).model
    assert saved["best_score"] == g["run"]["val_utility"] and all(
        torch.equal(value, saved["best_model"][name]) for name, value in g["agent"].state_dict().items()
    )
    net = Run(g["run_dir"]).ledger.query("split == 'val'")["net_return"].to_numpy()
    assert (net - 20 * net**2).mean() == pytest.approx(saved["best_score"], rel=1e-3, abs=1e-6)


def test_stress_windows_are_scenarios_and_the_worst_of_their_candidates():
    m, args, _, _, tables, agent, market = setting(utility="log")
    candidates = torch.randint(60, 290, (6, 5))
    found = m.worst(args, agent, market, tables, candidates)
    with torch.no_grad():
        for k in range(6):
            rows = m.rows_of(candidates[k], args.horizon)
            path = m.roll_out(args, agent, market, tables, rows, 1, explore=False)
            utility = m.utility_of(args, tables, rows, path).squeeze(1)
            assert found[k] == candidates[k, utility.argmin()] and len(utility.unique()) > 1
    assert torch.equal(m.worst(args, agent, market, tables, candidates[:, :1]), candidates[:, 0])


def test_the_share_of_stress_windows(inside):
    g = inside("--market", GP, *TINY, "--stress-share", "0.25", "--stress-histories", "3", "--total-timesteps", "128")
    real, rows = g["panel"].num_bars, g["rows"]
    assert (rows[:, 0] >= real).sum() == 2 and (rows < real).all(dim=1).sum() == 6
    assert (rows[:, 0] >= real).tolist() == [False] * 6 + [True] * 2
    extra = g["extra"]
    assert len(extra.segments) == 3 and len(g["tables"].features) == real + extra.num_bars
    assert (g["tables"].first[real:] >= real).all() and g["stressed"].min() >= real + 60
    last = g["stressed"].max() + g["args"].horizon - 1 - real
    assert last < extra.num_bars - 1  # every step has a next mark


@pytest.mark.parametrize(
    "options, words",
    [
        (["--group-size", "1", "--estimator", "grpo"], ("--group-size 1", "at least 2", "grpo")),
        (["--estimator", "mix"], ("--microbatches 1", "2 to")),
        (["--horizon", "1"], ("--horizon 1", "at least 2")),
        (["--horizon", "400"], ("--horizon 400", "training split")),
        (["--update-epochs", "5", "--estimator", "grpo"], ("--update-epochs 5", "1 to 4")),
        (["--update-epochs", "2"], ("--update-epochs 2", "1 to 1", "pathwise")),
        (["--estimator", "mix", "--microbatches", "3"], ("--microbatches", "divisor")),
        (["--estimator", "sarsa"], ("--estimator", "grpo", "pathwise", "mix")),
        (["--policy", "dirichlet"], ("--policy", "gaussian")),
        (["--constraints", "long_only"], ("--orders", "target")),
        (["--constraints", "long_only", "--orders", "target", "--neutral", "market"], ("--neutral", "none")),
        (["--constraints", "long_only", "--orders", "target", "--pairs", "1"], ("--pairs", "0")),
        (["--constraints", "long_only", "--orders", "target", "--no-cash", "--asset-cap", "0.5"], ("--no-cash", "cash")),
        (["--groups", "sectors.csv"], ("--groups", "none")),
        (["--net", "0"], ("--net", "--neutral market")),
        (["--leverage"], ("--leverage",)),
        (["--utility", "hedge"], ("--utility hedge", "synthetic:black-scholes")),
        (["--wavelets", "13"], ("levels=13", "1 to 12")),
        (["--pairs", "9"], ("count=9", "4 symbols")),
        (["--neutral", "factors", "--neutral-count", "5"], ("count=5", "1 to 4")),
        (["--stress-share", "0.5", "--stress-labels", "7"], ("labels", "0 .. 3")),
        (["--stress-share", "0.5", "--stress-macro", "rates"], ("rates", "extra series")),
        (["--stress-share", "2"], ("--stress-share 2", "0 to 1")),
        (["--stress-share", "0.01"], ("--stress-share 0.01", "at least 0.0625")),
        (["--stress-labels", "1"], ("--stress-share 0.0", "at least")),
        (["--stress-macro", "rates"], ("--stress-share 0.0", "at least")),
        (["--market", BLACK_SCHOLES, "--horizon", "10", "--stress-share", "0.5"], ("--stress-share 0.5", "hedge")),
        (["--market", BLACK_SCHOLES, "--horizon", "6"], ("--horizon 6", "[10]")),
        (["--pairs", "1", "--neutral", "market"], ("--pairs", "0 with --neutral")),
        (["--fold", "1"], ("--fold 1", "--folds 0")),
        (["--gamma", "1.5"], ("--gamma 1.5", "0 to 1")),
        (["--kl-coef", "-1"], ("--kl-coef -1", "at least 0")),
        (["--kill-drawdown", "15"], ("--kill-drawdown 15", "0 to 1")),
    ],
)
def test_bad_choices_are_named(complaint, options, words):
    line = complaint("--market", GP, *TINY, *options)
    assert all(word in line for word in words), line


def test_black_scholes_is_hedged_and_reported(inside):
    g = inside("--market", BLACK_SCHOLES, "--horizon", "10", "--total-timesteps", "2560", "--num-windows", "32")
    assert set(g["run"]["hedge"]) == {"delta RMS error", "hedged", "unhedged"}
    assert len(g["windows"]) == 20  # one for each option: it is sold at the first bar of the window and due at its end
    assert g["run"]["hedge"] == portfolio_references.hedge_error(g["data"], g["frames"]["test"], g["splits"]["test"])


def test_hedge_error_of_the_delta_is_zero():
    panel = make_panel("synthetic:black-scholes:train=1:val=1:test=50", 3)
    data = PortfolioData(panel, PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, asset_cap=2.0, scale=1.0))
    split, starts = panel.split()["test"], data.market(panel.split()["test"]).starts

    def policy(observation, _, rows):  # the account follows from the ledger's arithmetic: shares * price / equity
        for r, row in enumerate(rows):
            if row > starts[r]:
                equity[r] += shares[r] * (panel.close[row, 0] - panel.close[row - 1, 0]) / panel.close[starts[r], 0]
            shares[r] = panel.hidden["delta"][row, 0]
        return (shares * panel.close[rows, 0] / panel.close[starts, 0] / equity)[:, None]

    shares, equity = np.zeros(50), np.ones(50)
    error = portfolio_references.hedge_error(data, portfolio_references.run(data, split, policy), split)
    assert error["delta RMS error"] < 1e-6 and error["hedged"] < 0.15 * error["unhedged"]
    idle = ledger.backtest_weights(panel, data.execution, data.costs.rates, split, np.zeros((panel.num_bars, 1)), starts)
    error = portfolio_references.hedge_error(data, idle.assign(action=[np.zeros(1)] * len(idle)), split)
    delta = np.concatenate([panel.hidden["delta"][s : s + 30, 0] for s in starts])
    assert error["delta RMS error"] == pytest.approx(np.sqrt(np.mean(delta**2)))
    assert error["hedged"] == pytest.approx(error["unhedged"])


def test_amp_without_a_gpu_is_said_and_off(inside, capsys):
    g = inside("--market", GP, *TINY, "--amp")
    assert g["args"].amp is False and "--amp: no CUDA device" in capsys.readouterr().out


def test_validation_charges_what_the_ledger_does(inside, prices):
    g = inside("--market", prices, *TINY, "--smooth", "0.5", "--costs", "institutional:commission_bps=100")
    net = g["frames"]["val"]["net_return"].to_numpy()
    assert np.log1p(net).mean() == pytest.approx(g["run"]["val_utility"], rel=1e-4, abs=1e-7)


def test_every_microbatch_has_stress_windows(inside):
    options = ["--stress-share", "0.25", "--stress-histories", "3", "--microbatches", "2", "--total-timesteps", "128"]
    g = inside("--market", GP, *TINY, *options)
    assert [(part[:, 0] >= g["panel"].num_bars).sum().item() for part in g["parts"]] == [1, 1]
    assert sorted(torch.cat(g["parts"])[:, 0].tolist()) == sorted(g["rows"][:, 0].tolist())


def test_ledger_columns_of_the_report(inside, prices):
    g = inside("--market", prices, *TINY)
    assert set(g["run"]["scores"]["test"]) == {"agent", "equal weight"} and isinstance(g["frames"]["test"], pd.DataFrame)
