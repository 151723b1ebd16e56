"""algos/rl2_leadlag.py: a memory that lasts for a trial and no longer, advantages across it, and what is scored by it."""

import dataclasses
import inspect
import json
import os
import re
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from scipy.stats import chisquare
from scripts import SCRIPTS, Run, Toy, actions_of, assert_same_content

from envs import ledger, references
from envs.bandits import BanditsVectorEnv
from envs.leadlag import LeadLagVectorEnv
from envs.tasks import HELD_OUT

pytest_plugins = ["scripts"]
STEPS, MARKETS = 11, 6


@pytest.fixture
def script():
    return SCRIPTS["rl2_leadlag"]


def make_agent(script, memory="gru"):
    torch.manual_seed(0)
    return script.module.Agent(3, 4, memory, 5)


class Secret(BanditsVectorEnv):
    """Bandits that always pay at one arm, the greatest of their probabilities, and at no other: one pull of three tells."""

    def __init__(self, num_envs=1):
        super().__init__(num_envs, arms=3)

    def _begin(self):
        obs, _ = super()._begin()
        self._probabilities = (self._probabilities == self._probabilities.max(axis=1, keepdims=True)).astype(float)
        return obs, self._infos()


@pytest.fixture
def secret(monkeypatch):
    """Options for the script to run on it."""
    spec = gym.envs.registration.EnvSpec("Secret-v0", vector_entry_point=Secret)
    monkeypatch.setitem(gym.registry, "Secret-v0", spec)
    return ["--env-id", "Secret-v0", "--num-envs", "100", "--episodes", "5", "--eval-tasks", "300", "--hidden", "16"]


# --- the memory


def test_what_is_shared_with_recurrent_ppo_is_the_same(script):
    """Its tests, of the normaliser and of tanh, hold here too. (That one's are for GPUs too.)"""
    other = SCRIPTS["ppo_recurrent_leadlag"].module
    norms = [module.RunningNorm(3) for module in (script.module, other)]
    numbers = torch.Generator().manual_seed(0)
    for size in (1000, 1, 3000):
        batch = 5.0 + torch.randn((size, 3), generator=numbers)
        for norm in norms:
            norm.update(batch)
    assert_same_content(*(dict(norm.state_dict(), seen=norm(batch)) for norm in norms))
    assert_same_content(*(module.Tanh()(batch) for module in (script.module, other)))
    for name in ("FastTanh", "layer_init", "save_checkpoint"):
        assert inspect.getsource(getattr(script.module, name)) == inspect.getsource(getattr(other, name)), name
    for name in ("log_probs", "value"):
        assert inspect.getsource(getattr(script.module.Agent, name)) == inspect.getsource(getattr(other.Agent, name)), name


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_a_whole_trial_in_one_call_equals_single_steps(script, memory):
    """Outputs, the last state, and the gradients of the memory's weights."""
    agent = make_agent(script, memory)
    x = torch.randn((STEPS, MARKETS, 3 + 4 + 2), generator=torch.Generator().manual_seed(1))
    weights = torch.randn((STEPS, MARKETS, 5), generator=torch.Generator().manual_seed(2))
    fused, last = agent.remember(x, agent.blank(MARKETS))
    state, out = agent.blank(MARKETS), []
    for step in range(STEPS):
        features, state = agent.remember(x[step : step + 1], state)
        out.append(features[0])
    stepped = torch.stack(out)
    torch.testing.assert_close(fused, stepped)
    torch.testing.assert_close(last, state)
    assert_same_bits(fused[..., :9].detach().numpy(), x.numpy())
    parameters = list(agent.memory.parameters())
    found, expected = (torch.autograd.grad((f[..., 9:] * weights).sum(), parameters) for f in (fused, stepped))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_last_step_leaves_to_be_seen(script):
    agent = make_agent(script)
    actions, rewards, over = torch.tensor([2, 0]), torch.tensor([0.5, -1.0]), torch.tensor([True, False])
    before = agent.experience(actions, rewards, over)
    assert before.tolist() == [[0, 0, 1, 0, 0.5, 1], [1, 0, 0, 0, -1.0, 0]]
    agent.norm.update(torch.randn(50, 3))
    obs = torch.randn(2, 3)
    torch.testing.assert_close(agent.see(obs, before), torch.cat([agent.norm(obs), before], dim=1))


@pytest.fixture(params=["gru", "lstm", 12, 13, 15])
def one_trial(request, script, inside, register):
    """Variables of the script after one trial, on a market or on Toy, in which no weight moves. Toy's episodes are of 3, 4, 5,
    3... steps and terminate, are cut, terminate...: after 12 steps one has terminated, after 15 one was cut, after 13 none."""
    options = ["--learning-rate", "0", "--gamma", "0.9", "--gae-lambda", "0.8", "--reward-scale", "50", "--seed", "7"]
    if isinstance(request.param, str):
        sizes = ["--num-envs", "20", "--episodes", "3", "--episode-length", "9", "--total-timesteps", str(20 * 27)]
        return inside(*script.on(script.market), *script.own, *sizes, *options, "--memory", request.param)
    options += [*register(Toy, gym.spaces.Discrete(3)), "--num-envs", "4", "--episodes", "1"]
    return inside(*options, "--episode-length", str(request.param), "--total-timesteps", str(4 * request.param))


def test_a_trial_replayed_by_its_definition(one_trial):
    """The memory is blank at the start of the trial and lasts through the ends of its episodes; it sees the observation, and
    the action, the reward and the end of the step before. A_t is the sum of (gamma lambda)^l delta_{t+l} to the end of the
    trial; there V of the episode's own next observation is bootstrapped, unless it terminated."""
    g = one_trial
    args, agent, steps, n, count = g["args"], g["agent"], g["num_steps"], g["args"].num_envs, g["num_actions"]
    norm = type(agent.norm)(g["obs_size"])  # as it was

    env = g["make_envs"](args, g["data"], g["splits"]["train"], n)
    tasks = np.random.default_rng((7, 1)).integers(g["num_tasks"], size=n)
    obs, infos = env.reset(seed=int(np.random.SeedSequence((7, 1)).generate_state(1)[0]), options={"tasks": tasks})
    rewards, ends, before = np.zeros((steps, n)), 0, np.zeros((n, count + 2))
    state, values = agent.blank(n), []

    def see(t, obs, before):
        nonlocal state
        x = torch.cat([norm(torch.as_tensor(np.asarray(obs, np.float32))), torch.as_tensor(before, dtype=torch.float32)], dim=1)
        torch.testing.assert_close(g["x"][t], x)
        with torch.no_grad():
            features, state = agent.remember(x[None], state)
            torch.testing.assert_close(g["features"][t], features[0])
            values.append(agent.value(features[0]).double().numpy())

    for t in range(steps):
        see(t, obs, before)
        if g["is_market"]:
            assert (infos["range"] == tasks).all()
        actions = g["actions"][t].numpy()
        obs, rewards[t], terminated, truncated, infos = env.step(actions)
        over = terminated | truncated
        assert over.all() or not over.any()
        ends += over.any()
        before = np.column_stack([np.eye(count)[actions], args.reward_scale * rewards[t], over])
    before[:, -1] = 0.0  # the episode's own next observation is no beginning of another
    see(steps, np.stack(list(infos["final_obs"])) if over.any() else obs, before)
    assert ends >= 3, "no episode ended inside the trial"
    kinds = bool(terminated.any()), bool(truncated.any())
    assert kinds == {12: (True, False), 13: (False, False)}.get(steps, (False, True))

    values = np.stack(values)
    after = values[1:].copy()
    after[-1] *= ~terminated
    deltas = args.reward_scale * rewards + args.gamma * after - values[:-1]
    expected = [(args.gamma * args.gae_lambda) ** np.arange(steps - t) @ deltas[t:] for t in range(steps)]
    np.testing.assert_allclose(g["advantages"].numpy(), expected, atol=2e-4, rtol=1e-4)
    assert np.abs(expected).mean() > 0.01


def test_nothing_leaks_from_one_trial_to_the_next(script, inside):
    """Nor from the last action, reward and end; the trial before has left a memory and an end behind."""
    g = inside(*script.short, "--learning-rate", "0", "--total-timesteps", "2048")
    agent, begun = g["agent"], g["x"][0]
    size = g["obs_size"]
    assert not begun[:, size:].any() and g["x"][1, :, size:].any() and g["state"].abs().min() > 0
    features, _ = agent.remember(begun[None], agent.blank(64))
    torch.testing.assert_close(features[0], g["features"][0])


def test_trials_have_tasks_and_windows_of_their_own(script, inside, monkeypatch):
    """Another for every market and every trial; the same ones for the same seed."""
    told, reset = [], LeadLagVectorEnv.reset

    def spy(self, *, seed=None, options=None):
        out = reset(self, seed=seed, options=options)
        if self.num_envs == 64:  # training
            told.append((options["tasks"].tolist(), out[1]["row"].tolist()))
        return out

    monkeypatch.setattr(LeadLagVectorEnv, "reset", spy)
    for _ in range(2):
        inside(*script.short, "--total-timesteps", "3072")
    assert len(told) == 6 and told[:3] == told[3:]
    assert all(set(tasks) == {0, 1} and len(set(rows)) > 40 for tasks, rows in told)
    assert told[0] != told[1] != told[2]


# --- the update


def test_the_first_minibatch_has_ratio_one(script, inside):
    """One epoch of one minibatch: new and old log-probabilities are of the same weights, normaliser and actions, whether the
    memory ran step by step or over the whole trial at once."""
    options = ["--update-epochs", "1", "--num-minibatches", "1", "--total-timesteps", "3072"]
    g = inside(*script.short, *options)
    assert abs(g["losses"]["approx_kl"]) < 1e-6 and g["losses"]["clipfrac"] == 0.0
    np.testing.assert_allclose(g["ratio"].detach().numpy(), 1.0, atol=1e-5)
    assert float(g["agent"].norm.count) == pytest.approx(3072, abs=1e-3)


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_the_clipped_objective_of_the_last_minibatch(script, inside, clip_vloss):
    """Several epochs of several minibatches: the loss, of what the script has in its variables, written out term by term."""
    g = inside(
        *script.short, "--update-epochs", "4", "--learning-rate", "0.01", "--no-anneal-lr", "--ent-coef", "0.07",
        "--vf-coef", "0.3", "--clip-coef", "0.05", "--total-timesteps", "1024", "--num-minibatches", "4",
        *(["--clip-vloss"] if clip_vloss else []),
    )  # fmt: skip
    chosen = g["index"]
    assert len(set(chosen.tolist())) == 16
    ratio = g["ratio"].detach().double().numpy()
    assert ratio.shape == (16, 16) and (ratio > 1.05).any() and (ratio < 0.95).any()
    a = g["advantages"][:, chosen].double().numpy()
    a = (a - a.mean()) / a.std(ddof=1)
    policy = -np.where(a > 0, np.minimum(ratio, 1.05), np.maximum(ratio, 0.95)) * a
    new, old = g["new_value"].detach().double().numpy(), g["values"][:-1, chosen].double().numpy()
    target = g["returns"][:, chosen].double().numpy()
    np.testing.assert_allclose(target, g["advantages"][:, chosen] + old, atol=1e-5)
    error = (new - target) ** 2
    if clip_vloss:
        error = np.maximum(error, (old + np.clip(new - old, -0.05, 0.05) - target) ** 2)
    total = policy.mean() + 0.3 * 0.5 * error.mean() - 0.07 * float(g["entropy"].detach())
    assert float(g["loss"].detach()) == pytest.approx(total, rel=1e-4)


def test_masked_actions_are_never_drawn_and_the_others_as_often_as_they_should(script, monkeypatch):
    agent = make_agent(script)
    mask = torch.tensor([False, True, True, False]).expand(20_000, 4)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([3.0, 0.0, 1.0, 3.0]))
        agent.actor[-1].weight.zero_()
        log_probs = agent.log_probs(torch.zeros(len(mask), agent.actor[0].in_features), mask)
    drawn = np.bincount(agent.sample(log_probs, torch.Generator().manual_seed(0)).numpy(), minlength=4)
    assert drawn[0] == drawn[3] == 0
    assert chisquare(drawn[1:3], len(mask) * torch.tensor([0.0, 1.0]).double().softmax(0).numpy()).pvalue > 1e-3
    for number, action in ((0.0, 1), (1 - 2**-24, 2)):  # the least and the greatest that torch.rand can return
        monkeypatch.setattr(torch, "rand", lambda shape, number=number, **_: torch.full(shape, number))
        assert (agent.sample(log_probs) == action).all()


# --- adaptation


def test_learns_to_learn_what_one_pull_tells(secret, inside, capsys):
    """One in three guesses at first; from then on a memory that lasts knows more and more, which it does not without one."""
    g = inside(*secret, "--total-timesteps", "60000", "--learning-rate", "0.005", "--ent-coef", "0")
    report, run = g["run"]["adaptation"], g["run"]
    means = [stage["mean"] for stage in report["stages"]]
    assert means[0] == pytest.approx(1 / 3, abs=0.1) and means[1] == pytest.approx(2 / 3, abs=0.12)
    assert means[2] > 0.9 and means[3] > 0.9
    assert report["baseline"]["mean"] == means[0] and report["completion"] == 1.0
    assert report["transfer_gain"]["low"] > 0.4
    assert 3.6 < run["eval_return"] <= 4.1  # 1/3 + 2/3 + 3
    assert set(run["probe"]) == {"p0", "p1", "p2"}
    for share in run["probe"].values():
        assert abs(share[0]) < 0.05 and share[1] > 0.1 and share[3] > 0.8  # the pull just made is remembered too
    printed = capsys.readouterr().out
    assert "transfer gain" in printed and f"on test tasks: {run['eval_return']:.4g}" in printed
    assert "read off the memory by a linear map (p0, p1, p2)" in printed


def test_stages_differ_by_their_memory_alone(script, inside):
    """An agent of zero weights draws its actions at random: the same at every stage, on the same windows, for the same return.
    The rest of a seed's randomness is its own: other windows for other tasks and episodes."""
    g = inside(*script.short, "--total-timesteps", "1024")
    with torch.no_grad():
        for p in g["agent"].parameters():
            p.zero_()
    returns, completed, memories, truth = g["adaptation"]("test")
    assert returns.shape == completed.shape == (2, 4) and completed.all()
    for stage in range(1, 4):
        assert_same_bits(returns[:, stage].copy(), returns[:, 0].copy())
    assert returns[0, 0] != returns[1, 0] and memories.shape == (4, 6, 16 + 5 + 2) and not memories[..., :16].any()
    regime = g["panel"].hidden["regime"]
    assert truth["regime"].tolist() == [
        np.bincount(regime[start:stop]).argmax() for start, stop in g["splits"]["test"].ranges for _ in range(3)
    ]


def test_each_stage_has_been_through_one_more_episode(script, inside, monkeypatch):
    """Of the first part of each range; what it scores lies in the second. A blank memory comes first, and is the baseline."""
    g = inside(*script.short, "--total-timesteps", "1024")
    rows, steps = {"adapt": [], "score": []}, LeadLagVectorEnv.step
    cuts = np.array([ranges[1] for ranges in g["adapting"]["test"].ranges])

    def spy(self, actions, out=None):
        result = steps(self, actions, out)
        decided, task = result[4]["decided_at"], self._state.task
        kind = "adapt" if (self.split.ranges[:, 1] == cuts).all() else "score"
        assert ((decided + 1 < cuts[task]) if kind == "adapt" else (decided >= cuts[task])).all()
        rows[kind].append(decided)
        return result

    monkeypatch.setattr(LeadLagVectorEnv, "step", spy)
    returns, _, memories, _ = g["adaptation"]("test")
    length = g["args"].episode_length
    assert len(rows["adapt"]) == 3 * length and len(rows["score"]) == 4 * length
    scored = np.reshape(rows["score"], (4, length, -1))
    assert (scored == scored[0]).all() and len(np.unique(scored[0, 0])) == 6
    assert not memories[0].any() and all(np.abs(a - b).max() > 1e-3 for a, b in zip(memories, memories[1:]))
    assert len(np.unique(returns[0])) > 1


def test_what_is_scored_begins_with_an_end_unless_the_memory_is_blank(script, inside, monkeypatch):
    """As the later episodes of a trial do in training. In the order of their first steps: the first to be scored, the one whose
    memory is filled, and those that are scored with a copy of it."""
    g, ends = inside(*script.short, "--total-timesteps", "1024"), []

    class Watched(script.module.Player):
        def __call__(self, obs, mask, rows=None):
            if not hasattr(self, "action"):
                ends.append(self.before[:, -1].unique().tolist())
            return super().__call__(obs, mask, rows)

    monkeypatch.setitem(g["adaptation"].__globals__, "Player", Watched)
    g["adaptation"]("val")
    assert ends == [[0.0], [0.0], [1.0], [1.0], [1.0]]


def test_who_is_ruined_has_not_completed(script, inside):
    """Costs of nearly half of what is traded: a few bars leave nothing."""
    options = ["--costs", "zero:commission_bps=4900", "--episode-length", "24", "--total-timesteps", "3072"]
    run = Run(inside(*script.short, *options)["run_dir"]).json
    assert run["status"] == "finished" and run["adaptation"]["completion"] == 0.0


def test_backtests_carry_a_memory_of_the_first_part_into_the_second(script, inside):
    g = inside(*script.short, "--total-timesteps", "3072")
    player = g["adapted"]("test")
    assert player.state.abs().min(dim=2).values.max() > 0 and (player.before[:, -1] == 1).all()
    frame = g["backtest"]("test")
    found = Run(g["run_dir"]).ledger.query("split == 'test'").reset_index(drop=True)
    assert np.array_equal(actions_of(frame), actions_of(found)) and (frame["equity"] == found["equity"]).all()
    for (start, stop), (_, part) in zip(g["splits"]["test"].ranges, frame.groupby("market")):
        assert part["timestamp"].tolist() == list(
            map(type(part["timestamp"].iloc[0]), g["panel"].timestamps[start + 201 : stop])
        )
    blank = script.module.Player(g["agent"], 2, g["args"].reward_scale, g["args"].seed)
    other = references.run(g["data"], g["scored"]["test"], blank)
    assert not np.array_equal(actions_of(other), actions_of(frame))


def test_the_model_is_chosen_on_validation_and_the_test_split_read_once(script, inside, monkeypatch):
    read, run, scores = [], references.run, []

    def spy(data, split, policy, **options):
        frame = run(data, split, policy, **options)
        if hasattr(policy, "after"):
            read.append(split.name)
            scores.append(float(ledger.growth(frame).mean() * data.panel.bars_per_year))
        return frame

    monkeypatch.setattr(references, "run", spy)
    g = inside(*script.short)
    assert read == ["val"] * 4 + ["train", "val", "test"]
    assert g["run"]["val_growth"] == max(scores[:4]) == scores[5] and len(set(scores[:4])) > 1


def test_validation_and_test_tasks_are_held_out_and_disjoint(inside, secret):
    g = inside(*secret, "--total-timesteps", "1500")
    val, test = g["held_out"]("val"), g["held_out"]("test")
    assert len(val) == len(test) == 300 and min(val.min(), test.min()) >= HELD_OUT and not set(val) & set(test)
    assert g["num_tasks"] == HELD_OUT and g["run"]["val_return"] == pytest.approx(g["best_score"])
    assert g["trial_return"]("test") == g["run"]["eval_return"] != g["run"]["val_return"]


# --- other environments, and what goes wrong


def test_a_test_task_is_resumed_to_the_same_bits(script, secret, inside, monkeypatch, tmp_path):
    """From the first of its checkpoints, kept aside."""
    options, replace, kept = [*secret, "--total-timesteps", "3000", "--checkpoint-every", "2"], os.replace, tmp_path / "kept.pt"

    def spy(source, target):
        if target.name == "model.pt" and not kept.exists():
            shutil.copy(source, kept)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", spy)
        base = Run(inside(*options)["run_dir"])
    assert torch.load(kept, weights_only=True)["iteration"] == 2 and base.model["iteration"] == 6
    expected = dataclasses.replace(base, folder=shutil.copytree(base.folder, tmp_path / "expected"))
    shutil.copy(kept, base.folder / "model.pt")
    found = Run(inside("--resume", str(base.folder))["run_dir"])
    assert_same_content(found.model, expected.model)
    for key in ("adaptation", "probe", "eval_return", "val_return", "last_100_returns"):
        assert found.json[key] == expected.json[key]


def test_any_gymnasium_id_with_discrete_actions(inside, complaint):
    g = inside("--env-id", "CartPole-v1", "--episodes", "2", "--episode-length", "30", "--num-envs", "8", "--eval-tasks", "5",
               "--total-timesteps", "960", "--num-minibatches", "2")  # fmt: skip
    run = Run(g["run_dir"]).json
    assert run["status"] == "finished" and 8 < run["adaptation"]["stages"][0]["mean"] < 28 and run["probe"] == {}
    assert run["args"] == json.loads(json.dumps(dataclasses.asdict(g["args"])))
    assert run["args"]["gae_lambda"] == 0.3  # that of a test task


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num-envs", "0"], "--num-envs 0: expected at least 1"),
        (["--episodes", "0"], "--episodes 0: expected at least 1"),
        (["--episode-length", "0"], "--episode-length 0: expected at least 1"),
        (["--eval-tasks", "0"], "--eval-tasks 0: expected at least 1"),
        (["--adapt-share", "1"], "--adapt-share 1.0: expected a share above 0 and below 1"),
        (["--num-minibatches", "65"], "--num-minibatches 65: expected 1 to 64"),
        (["--env-id", "Pendulum-v1"], "--env-id Pendulum-v1.*expected discrete actions"),
    ],
)
def test_bad_sizes_are_named(script, complaint, options, words):
    assert re.search(words, complaint(*script.short, *options))
