"""What the environments share: seeds, autoreset, who owns an array, and a state that goes on bit for bit."""

import numpy as np
import pytest
from conftest import SMALL, assert_same_bits, assert_same_rollout, make_env, random_actions, rollout, run_python, single_env

from envs.leadlag_tables import LeadLagData
from envs.panel import Split


def test_market_i_at_seed_s_is_the_single_env_at_seed_s_plus_i(market):
    """Over several episodes: autoreset's observation is what the single env's reset() returns."""
    data, options = market
    vector = make_env(data, 4, episode_length=21, **options)
    chosen = random_actions(vector, 80, seed=1)
    log = rollout(vector, chosen, seed=50)
    assert log["truncated"].sum() >= 12 and not log["terminated"].any()
    masked = log["seen_mask"].shape[2] > 0
    for i in range(4):
        single = single_env(data, i, episode_length=21, **options)
        obs, info = single.reset(seed=50 + i)
        for n in range(len(chosen)):
            assert_same_bits(obs, log["seen_obs"][n, i], "obs")
            assert_same_bits(single.action_masks(), log["seen_mask"][n, i], "action_masks()")
            assert ("action_mask" in info) == masked
            if masked:
                assert_same_bits(info["action_mask"], log["seen_mask"][n, i], "mask")
            obs, reward, terminated, truncated, info = single.step(chosen[n, i])
            assert reward == log["reward"][n, i] and truncated == log["truncated"][n, i] and not terminated
            assert_same_bits(info["record"], log["record"][n, i], "record")
            if "choice" in log:
                assert_same_bits(info["choice"], log["choice"][n, i], "choice")
            if truncated:
                assert_same_bits(obs, log["final_obs"][n, i], "final_obs")
                if masked:
                    assert_same_bits(info["action_mask"], log["final_mask"][n, i], "final mask")
                obs, info = single.reset()


def test_a_list_of_seeds_and_going_on_without_one(market):
    data, options = market
    env, other = (make_env(data, 3, episode_length=5, **options) for _ in range(2))
    assert_same_bits(env.reset(seed=[7, 8, 9])[0], other.reset(seed=7)[0])
    assert_same_bits(env.reset()[0], other.reset()[0])
    rows = [env.reset()[1]["row"] for _ in range(20)]
    assert len(np.unique(rows)) > 20, "reset() without a seed repeats itself"
    for seed in (-1, [1, 2], [1, 2, -3]):
        with pytest.raises(ValueError, match="seed="):
            env.reset(seed=seed)


def test_the_same_seed_gives_the_same_rollout(market):
    """In a new env, and again in one that has been used; another seed gives another."""
    data, options = market
    used, fresh = (make_env(data, 3, episode_length=17, **options) for _ in range(2))
    chosen = random_actions(used, 60)
    expected = rollout(used, chosen, seed=2)
    other = rollout(used, chosen, seed=90)
    assert not np.array_equal(other["obs"], expected["obs"])
    assert_same_rollout(rollout(used, chosen, seed=2), expected)
    assert_same_rollout(rollout(fresh, chosen, seed=2), expected)


def test_a_task_is_a_range_of_the_split(market):
    """From the reset that names it on, every episode lies in it, with random starts or without; -1 is any again."""
    data, options = market
    bars = data.panel.num_bars
    split = (
        data.panel.split()["train"] if data.panel.segment_split else Split("train", [[0, bars * 3 // 4], [bars * 3 // 4, bars]])
    )
    env = make_env(data, 6, **options | {"split": split, "episode_length": 5})
    if not env.takes_tasks:
        with pytest.raises(ValueError, match="expected none: its episodes belong to symbols"):
            env.reset(seed=0, options={"tasks": np.zeros(6, int)})
        return

    def inside(infos, tasks):
        return (infos["range"] == tasks).all() and all(a <= r < b for (a, b), r in zip(split.ranges[tasks], infos["row"]))

    env.reset(seed=3)
    for tasks in (np.zeros(6, int), np.array([0, 1, 1, 0, 1, 1])):
        seen = [env.reset(options={"tasks": tasks})[1]]
        seen += [env.step(a)[4] for a in random_actions(env, 30, seed=2)]
        seen += [env.reset()[1] for _ in range(9)]  # until it is told otherwise
        assert all(inside(infos, tasks) for infos in seen)
        assert len({infos["row"][1] for infos in seen}) > 8, "always the same window"
    ordered = make_env(data, 2, **options | {"split": split, "episode_length": 0, "random_start": False})
    rows = [
        ordered.reset(seed=0, options={"tasks": np.array(tasks)})[1]["row"].tolist() for tasks in ([0, 1], [1, 0], [-1, -1])
    ]
    assert rows[0] == rows[1][::-1] == rows[2] and rows[0][0] < rows[0][1]
    env.reset(options={"tasks": np.full(6, -1)})
    assert {int(r) for _ in range(9) for r in env.reset()[1]["range"]} == {0, 1}
    single = single_env(data, **options | {"split": split, "episode_length": 5})
    for task in (0, 1, 0):
        _, info = single.reset(seed=task, options={"tasks": [task]})
        assert info["range"] == task and single.step(single.action_space.sample())[4]["range"] == task
    for wrong in ({"tasks": [0, 1]}, {"tasks": np.full(6, 2)}, {"tasks": np.full(6, -2)}, {"tasks": np.zeros(6)}, {"task": 0}):
        with pytest.raises(ValueError, match="expected (6 integers from -1|tasks)"):
            env.reset(options=wrong)


def test_ranges_come_up_by_their_weights(market):
    """Of a split whose ranges have weights; a task is still a task, and without random starts every range comes in turn."""
    data, options = market
    bars = data.panel.num_bars
    ranges = data.panel.split()["train"].ranges if data.panel.segment_split else [[0, bars * 3 // 4], [bars * 3 // 4, bars]]
    split = Split("train", ranges, [0.9, 0.1])
    env = make_env(data, 1000, **options | {"split": split, "episode_length": 5})
    second = env.reset(seed=1)[1]["row"] >= split.ranges[1, 0]
    if env.takes_tasks or len(env._market.starts) == 2 * (len(env._market.first) - 1):  # every symbol in both ranges
        assert second.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 1000))
    if env.takes_tasks:
        assert (env.reset(options={"tasks": np.ones(1000, int)})[1]["range"] == 1).all()
    ordered = make_env(data, 2, **options | {"split": split, "episode_length": 0, "random_start": False})
    plain = make_env(data, 2, **options | {"split": Split("train", ranges), "episode_length": 0, "random_start": False})
    assert_same_bits(ordered.reset(seed=0)[1]["row"], plain.reset(seed=0)[1]["row"])


def test_the_last_info_of_an_episode_names_its_own_range(market):
    data, options = market
    single = single_env(data, **options | {"episode_length": 3})
    _, info = single.reset(seed=0)
    if "range" not in info:
        return
    ranges = set()
    for _ in range(40):
        here, over = info["range"], False
        while not over:
            _, _, _, over, info = single.step(single.action_space.sample())
            assert info["range"] == here
        _, info = single.reset()
        ranges.add(int(info["range"]))
    assert len(ranges) == len(single.vector.split.ranges)


def test_single_env_info_belongs_to_the_observation_it_comes_with(market):
    data, options = market
    env = single_env(data, episode_length=9, random_start=True, **options)
    chosen = random_actions(env.vector, 9)[:, 0]
    _, first = env.reset(seed=0)
    row, keys = first["row"], set(first)
    for n, action in enumerate(chosen):
        _, _, _, truncated, info = env.step(action)
        assert info["row"] == row + n + 1, f"step {n}"
    assert truncated
    assert set(env.reset()[1]) == keys


def test_same_step_autoreset(market):
    """final_obs is what an unbroken episode shows at that bar; obs is the first of the next episode."""
    data, options = market
    short, endless = (make_env(data, 2, episode_length=n, random_start=False, **options) for n in (12, 0))
    first, _ = short.reset(seed=0)
    endless.reset(seed=0)
    for n, actions in enumerate(random_actions(short, 12), start=1):
        unbroken = endless.step(actions)
        obs, reward, terminated, truncated, infos = short.step(actions)
        assert_same_bits(reward, unbroken[1], "reward")
        assert truncated.all() == (n == 12) and truncated.any() == truncated.all() and not terminated.any()
        if n < 12:
            assert_same_bits(obs, unbroken[0], "obs")
            assert "final_obs" not in infos
    assert_same_bits(infos["final_obs"], unbroken[0], "final_obs")
    assert ("final_action_mask" in infos) == ("action_mask" in infos)
    if "action_mask" in infos:
        assert_same_bits(infos["final_action_mask"], unbroken[4]["action_mask"], "final_action_mask")
    assert_same_bits(obs, first, "first obs of the next episode")
    assert infos["_final_obs"].all()


def test_an_episode_knows_nothing_of_the_one_before(market):
    """Another history of actions, the same second episode: not one bit of it differs."""
    data, options = market
    env = make_env(data, 2, episode_length=12, random_start=False, **options)
    one, other = random_actions(env, 24, seed=1), random_actions(env, 24, seed=2)
    other[12:] = one[12:]
    expected, found = rollout(env, one), rollout(env, other)
    assert not np.array_equal(found["record"][:12], expected["record"][:12])
    assert_same_rollout(*({name: x[12:] for name, x in log.items()} for log in (found, expected)))


def test_what_step_returns_belongs_to_the_caller(market):
    data, options = market
    env = make_env(data, 3, episode_length=2, **options)
    obs, infos = env.reset(seed=0)
    kept = []
    for actions in random_actions(env, 6):
        kept.append((obs, obs.copy()))
        obs, reward, terminated, truncated, infos = env.step(actions)
        kept += [(a, a.copy()) for a in (reward, terminated, truncated)]
        kept += [(a, a.copy()) for a in infos.values() if isinstance(a, np.ndarray)]
        kept += [(a, a.copy()) for a in infos["components"].values()]
    for mine, copy in kept:
        assert_same_bits(mine, copy)


def test_out_receives_the_observations(market):
    data, options = market
    env, other = (make_env(data, 3, episode_length=4, **options) for _ in range(2))
    storage = np.zeros((6, *other.reset(seed=0)[0].shape), np.float32)
    env.reset(seed=0)
    for n, actions in enumerate(random_actions(env, 6)):
        result, expected = env.step(actions, out=storage[n]), other.step(actions)
        assert result[0] is not None and np.shares_memory(result[0], storage[n])
        for found, copy in zip(result[:4], expected[:4]):
            assert_same_bits(found, copy)
    shape = storage[0].shape
    for bad in (np.zeros(shape), np.zeros((2, shape[1]), np.float32), np.zeros(shape[::-1], np.float32).T):
        with pytest.raises(ValueError, match="out: .*expected C-contiguous float32"):
            env.step(actions, out=bad)


def test_state_round_trip_goes_on_bit_for_bit(market):
    data, options = market
    if isinstance(data, LeadLagData):
        options = options | dict(curriculum=(9, 33), curriculum_steps=60, anneal_steps=60)
    env, later = (make_env(data, 5, episode_length=15, **options) for _ in range(2))
    chosen = random_actions(env, 100)
    rollout(env, chosen[:38])
    later.set_state(env.get_state())
    expected, found = rollout(env, chosen[38:], seed=None), rollout(later, chosen[38:], seed=None)
    for log in (expected, found):
        log["seen_obs"] = log["seen_obs"][1:]  # the caller keeps the observation it already has
    assert_same_rollout(found, expected)


def test_no_more_threads_than_numba_was_given():
    code = (
        "import envs, gymnasium as gym\n"
        f"markets = gym.make_vec('LeadLag-v0', num_envs=64, data={SMALL!r}, num_threads=2)\n"
        "markets.reset(seed=0)\n"
        "markets.step(markets.action_space.sample())\n"
        "print(markets.unwrapped.num_threads)"
    )
    done = run_python("-c", code, NUMBA_NUM_THREADS="1")
    assert done.stdout.strip() == "1", done.stderr
