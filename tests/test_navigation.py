"""Navigation2D-v0: moves, rewards and ends, worked out by hand; and tasks, which are the same goals everywhere."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import assert_same_bits
from gymnasium.utils.env_checker import check_env
from scipy.stats import kstest

from envs.navigation import HELD_OUT, HORIZON, NEAR, REACH, Navigation2DEnv, Navigation2DVectorEnv, goal_of


def make(tasks, seed=0) -> Navigation2DVectorEnv:
    env = gym.make_vec("Navigation2D-v0", num_envs=len(tasks)).unwrapped
    env.reset(seed=seed, options={"tasks": np.array(tasks)})
    return env


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
def test_the_single_env_passes_gymnasiums_checker():
    check_env(gym.make("Navigation2D-v0").unwrapped)


def test_moves_and_rewards():
    """Against the goal of its task; what is beyond the reach is cut off, and only on that axis."""
    env, at = make([3, 1_000_007]), np.zeros((2, 2))
    goals = np.stack([goal_of(3), goal_of(1_000_007)])
    for moves, made in (
        ([[0.05, -0.02], [0.3, 0.01]], [[0.05, -0.02], [0.1, 0.01]]),
        ([[-9.0, 9.0], [0.0, -0.11]], [[-0.1, 0.1], [0.0, -0.1]]),
    ):
        at += made
        obs, reward, terminated, truncated, infos = env.step(np.array(moves))
        np.testing.assert_allclose(obs, at, atol=1e-7)
        np.testing.assert_allclose(reward, -np.sqrt(((at - goals) ** 2).sum(axis=1)), rtol=1e-6)
        assert obs.dtype == reward.dtype == np.float32 and not terminated.any() and not truncated.any()
        np.testing.assert_array_equal(np.stack(list(infos["parameters"].values()), axis=1), goals)
        assert "final_obs" not in infos


def test_ends_where_both_coordinates_are_near():
    """Just inside on both axes; just outside on one of them is no end. The next episode begins at the origin."""
    env, goal = make([5, 5, 5]), goal_of(5)
    steps = int(np.ceil(np.abs(goal).max() / REACH))
    for n in range(steps):
        stops = [goal + 0.9 * NEAR, goal + [0.9 * NEAR, -1.1 * NEAR], goal + [1.1 * NEAR, 0.0]]
        obs, reward, terminated, truncated, infos = env.step((np.array(stops) - env._position) / (steps - n))
    assert terminated.tolist() == [True, False, False] and not truncated.any()
    assert infos["_final_obs"].tolist() == [True, False, False]
    np.testing.assert_allclose(infos["final_obs"][0], goal + 0.9 * NEAR, atol=1e-6)
    np.testing.assert_array_equal(obs[0], [0.0, 0.0])
    assert reward[0] == pytest.approx(-0.9 * NEAR * np.sqrt(2), rel=1e-5)
    _, reward, *_ = env.step(np.zeros((3, 2)))
    assert reward[0] == pytest.approx(-np.hypot(*goal), rel=1e-6)


def test_is_cut_off_at_the_horizon_and_never_both():
    """One point waits short of its goal and arrives with its very last step; the other never moves."""
    env, goal = make([5, 8]), goal_of(5)
    for n in range(1, HORIZON + 1):
        wanted = goal if n == HORIZON else goal - 0.05 * np.sign(goal)
        _, _, terminated, truncated, infos = env.step(np.stack([wanted - env._position[0], np.zeros(2)]))
        assert (terminated | truncated).any() == (n == HORIZON), n
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]
    np.testing.assert_array_equal(infos["final_obs"][1], [0.0, 0.0])
    assert env._length.tolist() == [0, 0]


def test_goals_are_uniform_and_their_tasks_the_same_everywhere():
    goals = np.stack([goal_of(task) for task in range(HELD_OUT, HELD_OUT + 3000)])
    assert np.abs(goals).max() < 0.5 and len(np.unique(goals)) == goals.size
    assert all(kstest(goals[:, axis], "uniform", (-0.5, 1.0)).pvalue > 1e-3 for axis in (0, 1))
    assert abs(np.corrcoef(goals.T)[0, 1]) < 0.07
    assert -100 * np.hypot(*goals.T).mean() == pytest.approx(-38.3, abs=0.7)  # what who never moves earns
    for seed in (0, 7):
        np.testing.assert_array_equal(make([HELD_OUT, HELD_OUT + 1], seed)._goal, goals[:2])


def test_any_task_is_another_training_task_for_every_episode():
    """From a point's own stream: point i at seed s is point 0 at seed s + i, whatever runs beside it."""
    known = {tuple(goal_of(task)) for task in draws_of(50, 4) + draws_of(51, 4)}
    vector, singles = make([-1, -1], 50), [make([-1], 50), make([-1], 51)]
    seen = []
    for _ in range(4):
        assert_same_bits(vector._goal, np.concatenate([single._goal for single in singles]), "goals")
        seen += [tuple(goal) for goal in vector._goal]
        for env in (vector, *singles):
            for _ in range(HORIZON):
                env.step(np.zeros((env.num_envs, 2)))
    assert len(set(seen)) == 8 and set(seen) == known
    vector.reset()  # goes on
    assert tuple(vector._goal[0]) not in seen
    vector.reset(seed=50)
    assert tuple(vector._goal[0]) == seen[0]


def draws_of(seed, number):
    return [int(np.random.default_rng([seed, n]).integers(HELD_OUT)) for n in range(number)]


def test_the_single_env_is_the_vector_env():
    """Over several episodes: what reset returns is what autoreset has prepared."""
    single, vector = gym.make("Navigation2D-v0").unwrapped, make([-1], 9)
    obs, info = single.reset(seed=9)
    rng = np.random.default_rng(0)
    for n in range(2 * HORIZON + 3):
        assert info["parameters"] == {"goal_x": vector._goal[0, 0], "goal_y": vector._goal[0, 1]}, n
        move, sought = rng.uniform(-0.1, 0.1, 2), info
        obs, reward, terminated, truncated, info = single.step(move)
        expected = vector.step(move[None])
        assert info == sought  # also with the last step, after which another goal is drawn
        over = terminated or truncated
        assert_same_bits(obs, (expected[4]["final_obs"] if over else expected[0])[0], "obs")
        assert (reward, terminated, truncated) == (expected[1][0], expected[2][0], expected[3][0])
        if over:
            obs, info = single.reset()
            assert_same_bits(obs, expected[0][0], "first obs")
    assert single.reset(options={"tasks": [4]})[1]["parameters"]["goal_x"] == goal_of(4)[0]


def test_what_is_returned_belongs_to_the_caller():
    env, kept = make([1, 2]), []
    for _ in range(3):
        obs, reward, terminated, truncated, infos = env.step(np.full((2, 2), 0.03))
        kept += [(a, a.copy()) for a in (obs, reward, terminated, truncated, *infos["parameters"].values())]
    env.reset(seed=0, options={"tasks": np.array([8, 9])})
    for mine, copy in kept:
        assert_same_bits(mine, copy)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda env: Navigation2DVectorEnv(0), "num_envs=0: expected at least 1"),
        (lambda env: env.reset(options={"task": [1, 2]}), r"options \['task'\]: expected only tasks"),
        (lambda env: env.reset(options={"tasks": [1]}), r"expected 2 integers from -1 \(any\) up"),
        (lambda env: env.reset(options={"tasks": [1, -2]}), r"expected 2 integers from -1 \(any\) up"),
        (lambda env: env.reset(options={"tasks": [1.0, 2.0]}), r"expected 2 integers from -1 \(any\) up"),
        (lambda env: env.reset(seed=-1), "seed=-1: expected an integer >= 0"),
        (lambda env: env.reset(seed=[1]), "a list of 2"),
        (lambda env: env.step(np.zeros(2)), r"shape \(2,\): expected \(2, 2\)"),
        (lambda env: env.step(np.full((2, 2), np.nan)), "finite"),
        (lambda env: Navigation2DEnv(render_mode="human"), "render_mode='human'"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(make([1, 2]))
    with pytest.raises(gym.error.ResetNeeded):
        Navigation2DVectorEnv(2).step(np.zeros((2, 2)))
