"""Bandits-v0: tasks that are the same whenever they come, rewards as often as they say, and the house's conventions."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import assert_same_bits
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from scipy.stats import binomtest, kstest

import envs  # noqa: F401  (registers Bandits-v0)
from envs.bandits import HELD_OUT


def make(num_envs, **options):
    return gym.make_vec("Bandits-v0", num_envs=num_envs, **options)


def probabilities(infos) -> np.ndarray:
    """(n, arms)."""
    assert list(infos["parameters"]) == [f"p{a}" for a in range(len(infos["parameters"]))]
    return np.stack(list(infos["parameters"].values()), axis=1)


def of_tasks(tasks, seed=0, **options):
    tasks = np.asarray(tasks)
    return probabilities(make(len(tasks), **options).reset(seed=seed, options={"tasks": tasks})[1])


def test_a_task_is_the_same_whatever_the_seed_and_whoever_runs_beside_it():
    tasks = np.array([0, 1, 7, HELD_OUT, 2**40])
    found = of_tasks(tasks)
    assert len(np.unique(found)) == found.size and ((found >= 0) & (found < 1)).all()
    assert_same_bits(of_tasks(tasks[::-1], seed=5), found[::-1].copy())
    assert_same_bits(of_tasks(tasks, arms=2), found[:, :2].copy())  # an arm more changes no other


def test_probabilities_are_uniform_and_independent():
    found = of_tasks(np.arange(4000))
    assert kstest(found.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(found.T) - np.eye(5)).max() < 0.06
    assert np.abs(np.corrcoef(found[:-1, 0], found[1:, 0])[0, 1]) < 0.06  # from one task to the next


def test_every_arm_pays_as_often_as_it_says():
    env = make(3)
    p = probabilities(env.reset(seed=3, options={"tasks": np.array([4, 5, 6])})[1])
    for arm in range(5):
        paid = np.array([env.step(np.full(3, arm))[1] for _ in range(2000)])
        assert set(np.unique(paid)) <= {0.0, 1.0} and paid.dtype == np.float32
        for i in range(3):
            assert binomtest(int(paid[:, i].sum()), 2000, p[i, arm]).pvalue > 1e-3, (i, arm)
    a, b = (np.array([env.step(np.zeros(3, int))[1] for _ in range(50)]) for _ in range(2))
    assert not np.array_equal(a, b)


def test_every_pull_is_an_episode_and_says_nothing():
    env = make(4)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, infos = env.reset(seed=0, options={"tasks": np.arange(4)})
    for _ in range(3):
        after, reward, terminated, truncated, now = env.step(env.action_space.sample())
        assert terminated.all() and not truncated.any() and now["_final_obs"].all()
        assert not obs.any() and not after.any() and not now["final_obs"].any()
        assert after.shape == now["final_obs"].shape == (4, 1) and reward.shape == (4,)
        assert_same_bits(probabilities(now), probabilities(infos))  # the same task until another is asked for
    assert_same_bits(probabilities(env.reset()[1]), probabilities(infos))


def test_without_a_task_every_episode_has_one_of_its_own():
    env, seen = make(2), []
    seen.append(probabilities(env.reset(seed=0)[1]))
    seen += [probabilities(env.step(np.zeros(2, int))[4]) for _ in range(20)]
    assert len(np.unique(seen)) == 21 * 2 * 5
    mixed = env.reset(seed=0, options={"tasks": np.array([3, -1])})[1]
    later = env.step(np.zeros(2, int))[4]
    assert_same_bits(probabilities(mixed)[0], of_tasks([3])[0])
    assert_same_bits(probabilities(later)[0], probabilities(mixed)[0])
    assert (probabilities(later)[1] != probabilities(mixed)[1]).all()


def test_tasks_that_are_drawn_are_for_training(monkeypatch):
    """The largest number that can be drawn is the last task below those that are held out."""
    from envs import bandits

    monkeypatch.setattr(bandits, "draw", lambda keys, counters: np.full(len(keys), 1.0 - 2.0**-53))
    assert_same_bits(probabilities(make(1).reset(seed=0)[1]), of_tasks([HELD_OUT - 1]))


@pytest.mark.parametrize("tasks", [None, np.array([8, HELD_OUT, -1])])
def test_bandit_i_at_seed_s_is_the_single_env_at_seed_s_plus_i(tasks):
    vector, pulls = make(3), np.random.default_rng(0).integers(5, size=(40, 3))
    _, infos = vector.reset(seed=10, options=None if tasks is None else {"tasks": tasks})
    singles = [gym.make("Bandits-v0").unwrapped for _ in range(3)]
    told = [env.reset(seed=10 + i, options=tasks is not None and {"tasks": tasks[i : i + 1]}) for i, env in enumerate(singles)]
    for actions in pulls:
        before = probabilities(infos)
        _, reward, _, _, infos = vector.step(actions)
        for i, env in enumerate(singles):
            obs, info = told[i]
            assert env.observation_space.contains(obs) and list(info["parameters"].values()) == before[i].tolist()
            _, alone, terminated, truncated, info = env.step(actions[i])
            assert alone == reward[i] and terminated and not truncated
            assert list(info["parameters"].values()) == before[i].tolist()  # of the pull that was made
            told[i] = env.reset()


def test_the_same_seed_gives_the_same_rewards():
    env, pulls = make(50), np.random.default_rng(0).integers(5, size=(20, 50))

    def play(seed):
        env.reset(seed=seed, options={"tasks": np.arange(50)})
        return np.array([env.step(actions)[1] for actions in pulls])

    first = play(1)
    assert not np.array_equal(play(51), first) and np.array_equal(play(1), first)
    assert np.array_equal(play(list(range(1, 51))), first)


def test_passes_gymnasiums_check():
    check_env(gym.make("Bandits-v0").unwrapped)


def test_thompson_sampling_and_chance_earn_what_is_published():
    """Duan et al. (2016), table 1: of ten pulls of five arms: chance 5.0, Thompson sampling 5.7, the best mean so far 6.6."""
    n, rng = 20_000, np.random.default_rng(0)
    env, earned = make(n), {}
    for name in ("chance", "thompson", "greedy"):
        env.reset(seed=1, options={"tasks": HELD_OUT + np.arange(n)})
        paid, missed, total = np.ones((n, 5)), np.ones((n, 5)), 0.0
        for _ in range(10):
            score = {
                "chance": lambda: rng.random((n, 5)),
                "thompson": lambda: rng.beta(paid, missed),  # noqa: B023
                "greedy": lambda: paid / (paid + missed) + 1e-3 * rng.random((n, 5)),  # noqa: B023
            }[name]()
            arm = score.argmax(axis=1)
            _, reward, *_ = env.step(arm)
            paid[np.arange(n), arm] += reward
            missed[np.arange(n), arm] += 1 - reward
            total += reward.mean()
        earned[name] = total
    assert earned == pytest.approx({"chance": 5.0, "thompson": 5.7, "greedy": 6.6}, abs=0.2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: make(0), "num_envs=0.*at least 1"),
        (lambda: make(1, arms=1), "arms=1.*at least 2"),
        (lambda: make(2).reset(options={"tasks": np.array([1])}), "tasks=.*2 integers"),
        (lambda: make(1).reset(options={"tasks": np.array([-2])}), "tasks=.*-1 up"),
        (lambda: make(1).reset(options={"tasks": np.array([1.0])}), "tasks=.*integers"),
        (lambda: make(1).reset(options={"task": 1}), "options.*task.*expected only tasks"),
        (lambda: make(2).reset(seed=[1]), "seed=.*list of 2"),
        (lambda: make(2).reset(seed=-1), "seed=-1.*>= 0"),
        (lambda: gym.make("Bandits-v0", render_mode="human").unwrapped, "render_mode='human'"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("actions", [np.array([0, 5]), np.array([-1, 0]), np.array([0]), np.array([0.0, 1.0])])
def test_actions_that_are_no_arms_are_refused(actions):
    env = make(2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(2, int))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions.*2 integers in 0..4"):
        env.step(actions)
