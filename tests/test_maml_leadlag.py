"""algos/maml_leadlag.py: its meta-gradient against finite differences, its estimates against slow definitions, its episodes
stepped again, and what evaluation may see."""

from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tqdm
from conftest import assert_same_bits
from scipy.stats import chisquare, kstest
from scripts import SCRIPTS, Run, assert_same_content
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Normal

from envs import ledger
from envs.adaptation import sharpe_by_regime
from envs.leadlag_tables import LeadLagData
from envs.navigation import HELD_OUT, HORIZON, goal_of
from envs.tasks import halves

pytest_plugins = ["scripts"]
TASKS, STEPS, OBS, ACTIONS, HIDDEN = 3, 14, 4, 3, 5
ARGS = SimpleNamespace(inner_lr=0.7, further_lr=0.4, further_decay=0.5, clip_coef=0.3, kl_coef=0.2, first_order=False)


@pytest.fixture
def script():
    return SCRIPTS["maml_leadlag"]


@pytest.fixture(params=["masked", "gaussian"])
def tiny(request, script):
    """A small policy in float64 with weights far from zero."""
    torch.manual_seed(0)
    agent = script.module.Agent(OBS, ACTIONS, request.param == "gaussian", HIDDEN, -0.4).double()
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return agent


def reference_log_prob(agent, params, x, mask, actions):
    """(M,) of one task under weights name -> (...), by torch's own distributions."""
    out = x
    for n in range(3):
        out = out @ params[f"weight{n}"] + params[f"bias{n}"]
        out = out.tanh() if n < 2 else out
    if agent.continuous:
        return Normal(out, params["log_std"].exp()).log_prob(actions).sum(dim=1)
    return Categorical(logits=out.masked_fill(~mask, -torch.inf)).log_prob(actions)


def fixed_batches(agent, script, number, drift=0.15, seed=1):
    """Batches drawn by weights near the agent's: ratios are off 1, and some clipped. Some steps do not count."""
    torch.manual_seed(seed)
    batches = []
    for _ in range(number):
        x = torch.randn((TASKS, STEPS, OBS), dtype=torch.float64)
        mask = torch.rand((TASKS, STEPS, ACTIONS)) < 0.6
        mask[..., 1] = True
        with torch.no_grad():
            params = {k: p + drift * torch.randn_like(p) for k, p in agent.for_tasks(TASKS).items()}
            actions = agent.sample(params, x, mask)
            logprobs = agent.log_prob(params, x, mask, actions)
        counts = torch.rand((TASKS, STEPS)) < 0.8
        weight = counts / counts.sum(dim=1, keepdim=True).double()
        advantages = torch.randn((TASKS, STEPS), dtype=torch.float64)
        batches.append(script.module.Batch(x, x, mask, actions, logprobs, advantages, weight, None))
    return batches


def reference_loss(agent, weights, batches, query, args, adapted=None):
    """The meta-objective of weights name -> (...), task by task, from the papers' formulas: it needs first derivatives only.

    adapted: per task, the changes of the weights by each update, in the place of those that follow from `weights`.
    """
    total, sizes = 0.0, (args.inner_lr, args.further_lr, args.further_lr * args.further_decay)
    for k in range(TASKS):
        params, kl, gains = weights, None, []
        for n, batch in enumerate((*batches, query)):
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
            seen = batch.weight[k] > 0
            fresh = reference_log_prob(agent, params, batch.x[k], batch.mask[k], batch.actions[k])[seen]
            ratio, advantages = (fresh - batch.logprobs[k][seen]).exp(), batch.advantages[k][seen]
            if n == 0:
                kl = (ratio.detach() - 1 - ratio.detach().log()).mean()
            else:  # what is earned after n updates
                now = ratio.detach()
                clipped = torch.where(advantages > 0, now.clamp(max=1 + args.clip_coef), now.clamp(min=1 - args.clip_coef))
                gains.append(float((clipped * advantages).mean()))
            if n < len(batches):
                steps = torch.autograd.grad((ratio * advantages).mean(), list(params.values()))
                steps = steps if adapted is None else adapted[k][n]
                params = {name: (p + sizes[n] * g).detach() for (name, p), g in zip(params.items(), steps)}
        total += float(args.kl_coef * kl) - sum(gains) / len(gains)
    return total / TASKS


def finite_differences(function, weights, eps=1e-6):
    out = {}
    for name, p in weights.items():
        grad = torch.zeros_like(p)
        for i in range(p.numel()):
            values = []
            for sign in (1, -1):
                moved = {k: q.detach().clone() for k, q in weights.items()}
                moved[name].view(-1)[i] += sign * eps
                values.append(function(moved))
            grad.view(-1)[i] = (values[0] - values[1]) / (2 * eps)
        out[name] = grad
    return out


@pytest.mark.parametrize("updates", [1, 2])
def test_the_meta_gradient_is_that_of_finite_differences(script, tiny, updates):
    """Through the updates, in float64, on fixed episodes. What it is compared with knows first derivatives only."""
    *batches, query = fixed_batches(tiny, script, updates + 1)
    loss, _ = script.module.meta_loss(tiny, batches, query, ARGS)
    loss.backward()
    weights = {name: p.detach() for name, p in tiny.weights.items()}
    assert loss.item() == pytest.approx(reference_loss(tiny, weights, batches, query, ARGS), rel=1e-10)
    expected = finite_differences(lambda moved: reference_loss(tiny, moved, batches, query, ARGS), weights)
    for name, p in tiny.weights.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        assert p.grad.abs().max() > 1e-4, name


def test_first_order_takes_the_updates_as_they_are(script, tiny):
    """Its gradient is that of the loss after steps that no longer depend on the weights; the second-order one is another."""
    batch, query = fixed_batches(tiny, script, 2)
    args = SimpleNamespace(**{**vars(ARGS), "first_order": True})
    script.module.meta_loss(tiny, [batch], query, args)[0].backward()
    weights = {name: p.detach() for name, p in tiny.weights.items()}
    found = {name: p.grad.clone() for name, p in tiny.weights.items()}
    fixed = []
    for k in range(TASKS):
        params = {name: p.clone().requires_grad_() for name, p in weights.items()}
        fresh = reference_log_prob(tiny, params, batch.x[k], batch.mask[k], batch.actions[k])
        objective = (batch.weight[k] * (fresh - batch.logprobs[k]).exp() * batch.advantages[k]).sum()
        fixed.append([torch.autograd.grad(objective, list(params.values()))])
    expected = finite_differences(lambda moved: reference_loss(tiny, moved, [batch], query, args, fixed), weights)
    tiny.zero_grad()
    script.module.meta_loss(tiny, [batch], query, ARGS)[0].backward()
    for name, p in tiny.weights.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(found[name], p.grad, rtol=1e-2), name


def test_every_task_is_adapted_to_its_own_episodes(script, tiny):
    """As if it were alone; and steps that do not count change nothing."""
    (batch,) = fixed_batches(tiny, script, 1)
    after, logratio = script.module.inner_update(tiny, tiny.for_tasks(TASKS), batch, 0.3)
    other = batch._replace(advantages=batch.advantages + 5.0 * (batch.weight == 0))
    again, _ = script.module.inner_update(tiny, tiny.for_tasks(TASKS), other, 0.3)
    for k in range(TASKS):
        alone = script.module.Batch(*(rows[k : k + 1] if rows is not None else None for rows in batch))
        expected, ratio = script.module.inner_update(tiny, tiny.for_tasks(1), alone, 0.3)
        torch.testing.assert_close(logratio[k], ratio[0])
        for name in after:
            torch.testing.assert_close(after[name][k], expected[name][0])
            torch.testing.assert_close(again[name][k], after[name][k])
            assert not torch.allclose(after[name][k], after[name][k - 1]), name


def test_statistics_of_the_meta_loss(script, tiny):
    *batches, query = fixed_batches(tiny, script, 3)
    loss, statistics = script.module.meta_loss(tiny, batches, query, ARGS)
    pg_loss, kl, approx_kl, clipped = statistics.tolist()
    assert loss.item() == pytest.approx(pg_loss + ARGS.kl_coef * kl)
    assert kl > 0 and approx_kl > 0 and 0 < clipped < 1
    # at the weights that sampled, and without an update, all ratios are 1
    at_rest = [
        b._replace(logprobs=tiny.log_prob(tiny.for_tasks(TASKS), b.x, b.mask, b.actions).detach()) for b in (*batches, query)
    ]
    args = SimpleNamespace(**{**vars(ARGS), "inner_lr": 0.0, "further_lr": 0.0})
    _, (_, kl, approx_kl, clipped) = script.module.meta_loss(tiny, at_rest[:-1], at_rest[-1], args)
    assert max(map(abs, (kl, approx_kl, clipped))) < 1e-12


# --- the policy


def test_sampling_follows_the_probabilities(script, tiny):
    """Of one observation under two tasks' weights; what is masked is never drawn."""
    torch.manual_seed(3)
    params = {name: p + 0.4 * torch.randn_like(p) for name, p in tiny.for_tasks(2).items()}
    n = 20_000
    x = torch.randn((1, 1, OBS), dtype=torch.float64).expand(2, n, OBS)
    mask = torch.tensor([[True, False, True], [True, True, True]])[:, None].expand(2, n, ACTIONS)
    with torch.no_grad():
        actions = tiny.sample(params, x, mask)
        found = tiny.log_prob(params, x, mask, actions)
        greedy = None if tiny.continuous else tiny.act_greedily(params, x, mask)
    for k in range(2):
        own = {name: p[k] for name, p in params.items()}
        torch.testing.assert_close(found[k], reference_log_prob(tiny, own, x[k], mask[k], actions[k]))
        if tiny.continuous:
            mean = tiny.outputs(params, x)[k, 0]
            scores = (actions[k] - mean) / own["log_std"].exp()
            assert all(kstest(scores[:, a].detach().numpy(), "norm").pvalue > 1e-3 for a in range(ACTIONS))
            continue
        each = torch.arange(ACTIONS)[:, None]
        p = torch.stack([tiny.log_prob(params, x[:, :1], mask[:, :1], a.expand(2, 1))[k, 0] for a in each]).exp().detach()
        allowed = mask[k, 0].numpy()
        counts = np.bincount(actions[k], minlength=ACTIONS)
        assert counts[~allowed].sum() == 0 and p.sum().item() == pytest.approx(1)
        assert chisquare(counts[allowed], n * p.numpy()[allowed]).pvalue > 1e-3
        assert (greedy[k] == p.argmax()).all()


@pytest.mark.parametrize("number, first", [(0.0, True), (1 - 2**-24, False)], ids=["least", "greatest"])
def test_the_first_or_last_allowed_action_at_the_ends_of_the_unit_interval(script, monkeypatch, number, first):
    """The least and the greatest number that torch.rand can return, where probabilities add up to 1 but for rounding."""
    torch.manual_seed(0)
    agent, x = script.module.Agent(OBS, 8, False, HIDDEN, 0.0), torch.randn((1, 3000, OBS))
    with torch.no_grad():
        agent.weights["weight2"] *= 100
    mask = torch.rand((1, 3000, 8)) < 0.6
    mask[..., 3] = True
    monkeypatch.setattr(torch, "rand", lambda shape, generator, device: torch.full(shape, number, device=device))
    actions, places = agent.sample(agent.for_tasks(1), x, mask), torch.arange(8).expand(mask.shape)
    assert torch.equal(actions, places.where(mask, 99).amin(2) if first else places.where(mask, -1).amax(2))


def test_the_same_generator_draws_the_same(script, tiny):
    x, mask = torch.randn((1, 50, OBS), dtype=torch.float64), torch.ones((1, 50, ACTIONS), dtype=torch.bool)
    draws = [tiny.sample(tiny.for_tasks(1), x, mask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# --- estimates


def episodes(seed=0, steps=9, markets=30):
    """x (K, T, E, D), rewards and which steps count (K, T, E), of episodes that end at different steps, some never."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TASKS, steps, markets, 2))
    ends = rng.integers(1, steps + 4, size=(TASKS, 1, markets))
    counts = np.arange(steps)[None, :, None] < ends
    rewards = (x[..., 0] + rng.normal(size=counts.shape)) * counts
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(counts)


def test_the_baseline_is_each_tasks_least_squares_fit(script):
    x, rewards, counts = episodes()
    targets = rewards + 3.0 * torch.arange(TASKS)[:, None, None]
    found = script.module.linear_values(x, targets, counts)
    for k in range(TASKS):
        seen = counts[k].numpy()
        time = np.broadcast_to(np.arange(seen.shape[0])[:, None] / 100, seen.shape)
        columns = [*np.moveaxis(x[k].double().numpy(), 2, 0), *np.moveaxis(x[k].double().numpy() ** 2, 2, 0)]
        features = np.stack([*columns, *(time**n for n in range(4))], axis=2)
        fit = np.linalg.solve(features[seen].T @ features[seen] + 1e-5 * np.eye(8), features[seen].T @ targets[k].numpy()[seen])
        np.testing.assert_allclose(found[k].numpy(), features @ fit, rtol=1e-4, atol=1e-4)


def test_advantages_equal_the_slow_definition(script):
    """Sums of (gamma lambda)^l delta to the end of the episode, after which nothing is earned; mean 0, deviation 1 by task."""
    gamma, lam = 0.9, 0.8
    x, rewards, counts = episodes(seed=1)
    found = script.module.estimate_advantages(x, rewards, counts, gamma, lam).numpy()
    earned, seen = np.zeros(counts.shape), counts.numpy()
    for k, t, i in np.ndindex(counts.shape):
        rest = rewards[k, t:, i].numpy()[seen[k, t:, i]] if seen[k, t, i] else np.zeros(0)
        earned[k, t, i] = (gamma ** np.arange(len(rest)) * rest).sum()
    values = script.module.linear_values(x, torch.as_tensor(earned, dtype=torch.float32), counts).numpy()
    expected = np.zeros(counts.shape)
    for k, t, i in np.argwhere(seen):
        for later in range(t, seen.shape[1]):
            if not seen[k, later, i]:
                break
            more = later + 1 < seen.shape[1] and seen[k, later + 1, i]
            delta = rewards[k, later, i] + (gamma * values[k, later + 1, i] if more else 0.0) - values[k, later, i]
            expected[k, t, i] += (gamma * lam) ** (later - t) * delta
    for k in range(TASKS):
        inside = expected[k][seen[k]]
        np.testing.assert_allclose(found[k][seen[k]], (inside - inside.mean()) / inside.std(), rtol=1e-3, atol=1e-3)
        assert (found[k][~seen[k]] == 0).all()


# --- episodes


def navigation_args(script, **changes):
    return script.module.Args(**{**script.module.TEST_TASK, "env_id": "Navigation2D-v0", "episodes_per_task": 6, **changes})


def test_a_rollout_is_one_episode_of_every_point(script):
    """Stepped again through the public API, task by task in the order of the batch."""
    args, tasks = navigation_args(script), np.array([3, 11, 4])
    torch.manual_seed(1)
    agent = script.module.Agent(2, 2, True, 8, -3.5)
    with torch.no_grad():
        params = {name: p.clone() for name, p in agent.for_tasks(3).items()}
        goals = torch.stack([torch.as_tensor(goal_of(int(task))) for task in tasks])
        params["bias2"][:] = goals.float()  # ten steps to the goal, noisy, and past it: some arrive
        agent.norm.mean.fill_(0.1)
    envs = script.module.make_envs(args, None, None, 3)
    batch = script.module.rollout(agent, params, envs, tasks, 5, args)
    again = gym.make_vec("Navigation2D-v0", num_envs=18).unwrapped
    obs, _ = again.reset(seed=5, options={"tasks": np.repeat(tasks, 6)})
    alive, returns, counted = np.ones(18, bool), np.zeros(18), np.zeros((HORIZON, 18), bool)
    for t in range(HORIZON):
        own = batch.obs.view(3, HORIZON, 6, 2)[:, t].reshape(18, 2)
        assert_same_bits(own.numpy()[alive], obs[alive], f"step {t}")
        scores = batch.actions.view(3, HORIZON, 6, 2)[:, t].reshape(18, 2).numpy()
        obs, reward, terminated, truncated, _ = again.step((0.1 * scores).clip(-0.1, 0.1))
        counted[t], returns = alive, returns + reward * alive
        alive = alive & ~(terminated | truncated)
    counts = batch.weight.view(3, HORIZON, 6)
    np.testing.assert_array_equal((counts > 0).transpose(0, 1).reshape(HORIZON, 18).numpy(), counted)
    assert 0 < counted[-1].sum() < 18
    np.testing.assert_allclose(batch.returns.flatten().numpy(), returns, rtol=1e-5)
    np.testing.assert_allclose(batch.weight.sum(dim=1).numpy(), 1.0, rtol=1e-5)
    torch.testing.assert_close(batch.weight.amax(dim=1), 1 / (counts > 0).sum(dim=(1, 2)).float())
    torch.testing.assert_close(batch.x, agent.norm(batch.obs))
    with torch.no_grad():
        torch.testing.assert_close(batch.logprobs, agent.log_prob(params, batch.x, batch.mask, batch.actions))
    moves = batch.actions.view(3, -1, 2).mean(dim=1) - params["bias2"]  # each under its task's weights
    assert moves.abs().max() < 0.1 and (goals[0] - goals[2]).abs().max() > 0.3


def test_training_adapts_on_first_parts_and_earns_in_second_ones(script, inside):
    """Of the same histories, in the order of the tasks; masks are those of the observations they come with."""
    g = inside(*script.short, "--total-timesteps", "1024")
    early, late = halves(g["splits"]["train"], g["args"].adapt_share)
    assert np.array_equal(g["adapt_envs"].unwrapped.split.ranges, early.ranges)
    assert np.array_equal(g["query_envs"].unwrapped.split.ranges, late.ranges)
    assert sorted(set(g["tasks"].tolist())) == [0, 1]
    for name, envs, batch, phase in (("adapt", g["adapt_envs"], g["batches"][0], 0), ("query", g["query_envs"], g["query"], 1)):
        seed = g["derived_seed"](g["args"].seed, 1, phase)
        obs, infos = envs.reset(seed=seed, options={"tasks": np.repeat(g["tasks"], 8)})
        found, masks = batch.obs.view(4, 16, 8, -1), batch.mask.view(4, 16, 8, -1)
        assert_same_bits(found[:, 0].flatten(0, 1).numpy(), obs, f"{name}: first observation")
        for t in range(16):
            assert_same_bits(masks[:, t].flatten(0, 1).numpy(), infos["action_mask"], f"{name}: mask {t}")
            assert (infos["range"] == np.repeat(g["tasks"], 8)).all()
            obs, _, _, truncated, infos = envs.step(batch.actions.view(4, 16, 8)[:, t].flatten().numpy())
        assert truncated.all()  # an episode is a rollout


def test_what_is_scored_was_not_adapted_on(script, inside, monkeypatch):
    """Other prices in the second parts of the test histories: not a bit of the adapted weights changes."""
    g = inside(*script.short, "--total-timesteps", "1024")
    own = g["adapt_to"].__globals__
    expected = own["adapt_to"]("test")
    panel, cut = g["panel"], g["parts"]["test"][1].ranges
    rng, close = np.random.default_rng(0), panel.close.copy()
    for start, stop in cut:
        close[start:stop] *= np.exp(0.05 * rng.standard_normal((stop - start, close.shape[1])).cumsum(axis=0))
    tampered = replace(panel, close=close, open=None, high=None, low=None, volume=None)
    plain = replace(panel, open=None, high=None, low=None, volume=None)
    found = {}
    for name, prices in (("plain", plain), ("tampered", tampered)):
        monkeypatch.setitem(own, "data", LeadLagData(prices, g["args"].leadlag))
        found[name] = own["adapt_to"]("test"), own["earned"]("test", expected[-1])[0]
    for before, after in zip(found["plain"][0], found["tampered"][0]):
        assert_same_content(before, after, "weights")
    assert not np.array_equal(found["plain"][1], found["tampered"][1])


def test_the_ledger_is_unadapted_first_and_adapted_later(script, inside):
    g = inside(*script.short, "--total-timesteps", "2048", "--inner-lr", "50")
    frame, parts = g["frames"]["test"], g["parts"]["test"]
    plain = g["backtest"](g["splits"]["test"], g["policy_of"](g["stages"][0]))
    for k, cut in enumerate(parts[1].ranges[:, 0]):
        late = g["panel"].timestamps[cut]  # a row's timestamp is that of its mark, the bar after the decision
        rows = frame["market"] == k
        before, after = rows & (frame["timestamp"] <= late), rows & (frame["timestamp"] > late)
        assert before.any() and after.any()
        assert (frame["action"] == plain["action"])[before].all()
        assert (frame["action"] != plain["action"])[after].mean() > 0.1
    early = {name: torch.zeros_like(p) for name, p in g["stages"][0].items()}
    late = {**early, "bias2": early["bias2"] + torch.eye(5)[1]}
    policy, begins = g["policy_of"](early, late, parts[1].ranges[:, 0]), parts[1].ranges[:, 0]
    for rows, expected in ((begins - 1, 0), (begins, 1)):  # the very row from which on the second part's orders are given
        assert (policy(np.zeros((2, g["obs_size"]), np.float32), np.ones((2, 5), bool), rows) == expected).all()


def test_the_report_is_of_second_parts(script, inside):
    """Net log growth of every history there, from its ledger, after 0 to 3 updates; paired with no update."""
    g = inside(*script.short, "--total-timesteps", "2048", "--inner-lr", "5")
    report, run = g["run"]["adaptation"], Run(g["run_dir"]).json
    by_regime = report.pop("sharpe_by_regime")
    assert set(run["adaptation"].pop("sharpe_by_regime")) == set(by_regime)
    assert run["adaptation"] == report and report["tasks"] == 2 and len(report["stages"]) == 4
    means = []
    for params in g["stages"]:
        frame = g["backtest"](g["parts"]["test"][1], g["policy_of"](params))
        means.append([ledger.growth(part).sum() for _, part in frame.groupby("market")])
    assert [stage["mean"] for stage in report["stages"]] == pytest.approx(np.mean(means, axis=1), rel=1e-12)
    assert len({round(stage["mean"], 9) for stage in report["stages"]}) > 1
    assert repr(by_regime) == repr(sharpe_by_regime(frame, g["panel"], g["parts"]["test"][1].ranges))  # NaN is not NaN
    assert report["baseline"]["mean"] == report["stages"][0]["mean"] and report["completion"] == 1.0
    assert report["transfer_gain"]["mean"] == pytest.approx(np.mean(means[3]) - np.mean(means[0]), rel=1e-9)


def test_further_updates_have_a_step_size_of_their_own(script, inside, monkeypatch):
    sizes = ("--inner-lr", "0.1", "--further-lr", "0.03", "--further-decay", "0.5")
    g = inside(*script.short, "--total-timesteps", "1024", "--inner-steps", "2", "--updates", "5", *sizes)
    own, sizes = g["adapt"].__globals__, []
    monkeypatch.setitem(
        own, "inner_update", lambda a, p, b, size, _call=own["inner_update"]: sizes.append(size) or _call(a, p, b, size)
    )
    stages = own["adapt_to"]("val")
    assert sizes == [0.1, 0.03, 0.015, 0.0075, 0.00375] and len(stages) == 6


def test_evaluation_changes_nothing_in_training(script, inside):
    runs = [inside(*script.short, "--total-timesteps", "3072", "--eval-every", every) for every in ("1", "3")]
    assert_same_content(*(dict(g["optimizer"].state_dict())["state"] for g in runs), "optimizer")


# --- other tasks


class Arms(gym.vector.VectorEnv):
    """Ten pulls of two arms; the task's parity says which one pays."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = (
            gym.spaces.Box(-1, 1, (1,), np.float32),
            gym.spaces.Discrete(2),
        )
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        self.pays = (np.zeros(self.num_envs, int) if options is None else options["tasks"]) % 2
        self.t = 0
        return np.ones((self.num_envs, 1), np.float32), {"parameters": {"pays": self.pays}}

    def step(self, actions):
        self.t += 1
        over = np.full(self.num_envs, self.t % 10 == 0)
        return np.ones((self.num_envs, 1), np.float32), (actions == self.pays) * 1.0, over, np.zeros(self.num_envs, bool), {}


@pytest.fixture
def arms(monkeypatch):
    spec = gym.envs.registration.EnvSpec("Arms-v0", entry_point=None, vector_entry_point=Arms)
    monkeypatch.setitem(gym.registry, "Arms-v0", spec)
    return [
        "--env-id",
        "Arms-v0",
        "--num-steps",
        "10",
        "--hidden",
        "8",
        "--tasks-per-batch",
        "10",
        "--episodes-per-task",
        "10",
        "--inner-steps",
        "1",
        "--patience",
        "0",
        "--eval-episodes",
        "10",
    ]


def test_learns_to_adapt(inside, arms):
    """One update tells which of two arms pays; nothing can be known before."""
    g = inside(*arms, "--total-timesteps", "60000", "--learning-rate", "0.01", "--eval-tasks", "20")
    stages = [stage["mean"] for stage in g["run"]["adaptation"]["stages"]]
    assert abs(stages[0] - 5) < 1.5 and stages[1] > 8.0, stages


class Fading(Arms):
    """Their pay halves with every iteration's rollouts: the first weights have earned most."""

    resets = 0

    def reset(self, **options):
        type(self).resets += 1
        return super().reset(**options)

    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, reward * 0.5 ** (self.resets // 2), *rest


def test_the_weights_that_earned_most_in_training_are_kept(inside, arms, monkeypatch):
    spec = gym.envs.registration.EnvSpec("Arms-v0", entry_point=None, vector_entry_point=Fading)
    monkeypatch.setitem(gym.registry, "Arms-v0", spec)
    g = inside(*arms, "--total-timesteps", "20000", "--eval-every", "2")
    run = Run(g["run_dir"])
    events = EventAccumulator(str(run.folder))
    events.Reload()
    earned = [event.value for event in events.Scalars("charts/episodic_return")]
    assert len(earned) == 10 and run.json["best_adapted_return"] == pytest.approx(np.mean(earned[:2]), rel=1e-5)
    assert run.json["val_growth"] is None
    kept, last = run.model["best_model"], run.model["model"]
    assert kept.keys() == last.keys() and not torch.equal(kept["weights.weight2"], last["weights.weight2"])
    assert_same_content(dict(g["agent"].state_dict()), kept)  # these are reported


def test_an_interrupted_run_of_a_test_task_goes_on(script, inside, arms, monkeypatch):
    options = [*arms, "--total-timesteps", "20000", "--checkpoint-every", "1"]
    whole = Run(inside(*options)["run_dir"])
    with monkeypatch.context() as patch:
        calls = []

        def interrupt(self, n=1):
            calls.append(n)
            if len(calls) == 6:
                raise KeyboardInterrupt

        patch.setattr(tqdm.tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            inside(*options)
    (folder,) = (path for path in whole.folder.parent.iterdir() if path != whole.folder)
    assert torch.load(folder / "model.pt", weights_only=True)["iteration"] == 5
    inside("--resume", str(folder))
    assert_same_content(Run(folder).model, whole.model)
    assert Run(folder).json["adaptation"] == whole.json["adaptation"]


def test_held_out_tasks_are_those_of_evaluation(script, inside, monkeypatch):
    g = inside("--env-id", "Navigation2D-v0", "--total-timesteps", "1", "--num-steps", "5", "--tasks-per-batch", "4",
               "--episodes-per-task", "3", "--eval-tasks", "7", "--eval-episodes", "3")  # fmt: skip
    assert (g["tasks"] == HELD_OUT + np.arange(7)).all() and len(g["returns"]) == 7
    goals = g["envs"]._goal[::3]
    np.testing.assert_array_equal(goals, [goal_of(HELD_OUT + n) for n in range(7)])
    assert g["run"]["val_growth"] is None


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tasks-per-batch", "0"], "--tasks-per-batch 0: expected at least 1"),
        (["--inner-steps", "0"], "--inner-steps 0: expected at least 1"),
        (["--updates", "0"], "--updates 0: expected at least 1"),
        (["--adapt-share", "1"], "share=1.0: expected a fraction"),
        (["--env-id", "CartPole-v1"], "--env-id CartPole-v1: expected LeadLag-v0 or a task such as Navigation2D-v0"),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    assert words in complaint(*script.short, *options)
