"""LeadLag-v0: Gymnasium's rules, what actions mean, what rewards hold, what observations show, and that nothing leaks."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from conftest import (
    ACTIONS,
    CONFIG,
    DEAR,
    FILLS,
    SMALL,
    TINY,
    assert_same_bits,
    make_env,
    ragged_panel,
    ragged_with_series,
    random_actions,
    rollout,
    tampered,
    whole,
)
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from envs.costs import RECORD
from envs.features import standardised_returns
from envs.leadlag import COMPONENTS, LeadLagEnv, LeadLagVectorEnv
from envs.leadlag_tables import LeadLagConfig, LeadLagData, follower_portfolios
from envs.panel import Split


def test_single_env_passes_gymnasiums_checker(small_data):
    env = gym.make("LeadLag-v0", data=small_data).unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    heard = [str(w.message) for w in caught if "infinity" not in str(w.message)]  # the observation is unbounded
    assert not heard


def test_make_vec_gives_the_native_vector_env(small_data):
    env = gym.make_vec("LeadLag-v0", num_envs=3, data=small_data)
    assert isinstance(env.unwrapped, LeadLagVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert "autoreset_mode" not in LeadLagVectorEnv.metadata or env.metadata is not LeadLagVectorEnv.metadata
    obs, infos = env.reset(seed=0)
    assert env.observation_space.contains(obs) and infos["action_mask"].shape == (3, 5)
    obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs)
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, np.bool_, np.bool_)


def test_a_market_by_name_is_drawn_with_its_seed_and_config():
    config = {"max_lookback": 60, "num_lookbacks": 5}
    hashes = [LeadLagVectorEnv(1, SMALL, market_seed=s, **config).data.panel.sha256 for s in (3, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("length", (1, 40, 10_000, 0))
@pytest.mark.parametrize("random_start", (True, False))
def test_episodes_stay_inside_the_split(small_data, length, random_start):
    """Starts of 3,000 seeds; decisions of 12 markets until every one has ended at least once."""
    for split in ("train", "val", "test"):
        crowd = make_env(small_data, 3000, split=split, episode_length=length, random_start=random_start)
        starts, stops = crowd._market.starts, crowd._market.stops
        last = stops - 2 if length == 0 else np.maximum(starts, stops - 1 - length)
        row = crowd.reset(seed=0)[1]["row"]
        inside = (row[:, None] >= starts) & (row[:, None] <= (last if random_start else starts))
        assert inside.any(axis=1).all(), f"start rows {np.unique(row[~inside.any(axis=1)])} lie outside"
        if random_start:
            assert set(row) >= {*starts, *last}, "some window is never drawn"
    env = make_env(small_data, 12, split="test", episode_length=length, random_start=random_start)
    log = rollout(env, random_actions(env, 60 if 0 < length < 60 else 420))
    starts, stops = env._market.starts, env._market.stops
    assert ((log["row"][..., None] >= starts) & (log["row"][..., None] <= stops - 2)).any(axis=2).all()
    assert log["truncated"].any(axis=0).all()
    if 0 < length < 60:
        ends = np.flatnonzero(log["truncated"][:, 0])
        np.testing.assert_array_equal(ends, np.arange(length - 1, 60, length))
    else:
        np.testing.assert_array_equal(np.isin(log["row"], stops - 2), log["truncated"])


def nearest_valid(valid, k):
    """The present lookback, or the nearest valid one, the shorter first; the present one where none is valid."""
    return min(np.flatnonzero(valid), key=lambda q: (abs(q - k), q), default=k)


def meaning(kind, action, k, count):
    """Grid index that an action asks for."""
    if kind == "absolute" or (kind == "hybrid" and action < count):
        return action
    return k + {0: -1, 1: 0, 2: 1}[action - (count if kind == "hybrid" else 0)]


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("jump", (0, 1, 2))
@pytest.mark.parametrize("curriculum", (None, (9, 33)))
def test_masks_and_moves_under_any_validity(small_data, kind, jump, curriculum):
    """Tables of random validity, none valid among them: what is allowed, and where every action leads."""
    env = make_env(small_data, 8, actions=kind, max_jump=jump, curriculum=curriculum, episode_length=0, random_start=False)
    rng, count = np.random.default_rng(jump), len(small_data.lookbacks)
    valid = rng.random(small_data.valid.shape) < rng.choice([0.0, 0.2, 0.5, 0.9], (len(small_data.valid), 1))
    env._market = env._market._replace(valid=valid)
    low, high = (0, count - 1) if curriculum is None else (1, 3)
    assert curriculum is None or np.flatnonzero((small_data.lookbacks >= 9) & (small_data.lookbacks <= 33)).tolist() == [
        1,
        2,
        3,
    ]
    _, infos = env.reset(seed=0)
    seen = set()
    for actions in random_actions(env, 250):
        t, k, mask = infos["row"], env._state.lookback.copy(), infos["action_mask"]
        for i in range(8):
            aims = [meaning(kind, a, k[i], count) for a in range(mask.shape[1])]
            allowed = [
                0 <= q < count and valid[t[i], q] and low <= q <= high and (jump == 0 or abs(q - k[i]) <= jump) for q in aims
            ]
            seen.update((bool(any(allowed)), bool(valid[t[i]].any()), bool(x)) for x in allowed)
            if not any(allowed):
                allowed[nearest_valid(valid[t[i]], k[i]) if kind == "absolute" else len(aims) - 2] = True
            np.testing.assert_array_equal(mask[i], allowed)
        _, _, _, truncated, infos = env.step(actions)
        if truncated.any():
            break
        for i in range(8):
            aim = meaning(kind, actions[i], k[i], count)
            wanted = mask[i, actions[i]] and 0 <= aim < count and valid[t[i], aim]
            assert env._state.lookback[i] == (aim if wanted else nearest_valid(valid[t[i]], k[i]))
    assert seen >= {(True, True, True), (True, True, False), (False, False, False)}


def test_a_masked_action_keeps_the_lookback(small_data):
    """All lookbacks valid, two grid steps at most: an order for three is ignored."""
    env = make_env(small_data, 1, max_jump=2, random_start=False)
    _, infos = env.reset()
    for _ in range(70):  # until every lookback has its history
        _, _, _, _, infos = env.step([2])
    assert infos["lookback"] == small_data.lookbacks[2] and infos["action_mask"].all()
    _, _, _, _, infos = env.step([0])
    assert infos["lookback"] == small_data.lookbacks[0]
    np.testing.assert_array_equal(infos["action_mask"][0], [True, True, True, False, False])
    _, _, _, _, infos = env.step([3])
    assert infos["lookback"] == small_data.lookbacks[0]


def test_history_coverage_and_liquidity_decide_what_is_valid():
    """A lookback is allowed where min_symbols symbols have the history, the bars and the traded value."""
    panel = ragged_panel(9)
    config = replace(TINY, min_dollar_volume=2.2e5, min_coverage=0.9)
    data, traded = LeadLagData(panel, config), np.nan_to_num(panel.volume * panel.close)
    for k, window in enumerate(data.lookbacks):
        for t in range(panel.num_bars):
            rows = slice(max(0, t + 1 - window), t + 1)
            enough = panel.present[t] & (panel.present[rows].mean(axis=0) >= 0.9) & (traded[rows].mean(axis=0) >= 2.2e5)
            assert data.valid[t, k] == (t >= window + 1 and enough.sum() >= config.min_symbols), (t, window)
    assert 0.2 < data.valid[30:].mean() < 0.8


def test_curriculum_widens_linearly_to_all_lookbacks(small_data):
    env = make_env(small_data, 1, curriculum=(15, 35), curriculum_steps=200, random_start=False, episode_length=0)
    _, infos = env.reset()  # lookbacks 5, 9, 17, 32, 60: grid indices 2 and 3 are inside
    seen = set()
    for n in range(240):
        t = infos["row"][0]
        _, _, _, _, infos = env.step([2])
        if small_data.valid[t + 1].all():
            opened = min(1.0, n / 200)
            allowed = np.arange(round(2 - 2 * opened), round(3 + opened) + 1)
            np.testing.assert_array_equal(np.flatnonzero(infos["action_mask"][0]), allowed)
            seen.add(tuple(allowed))
    assert seen == {(1, 2, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4)}
    narrow = make_env(small_data, 1, curriculum=(15, 35), episode_length=1)
    masks = rollout(narrow, np.full((50, 1), 2))["seen_mask"]
    assert masks[:, 0, 2:4].all(axis=1).any() and not masks[:, 0, 4].any()


def test_reward_components_are_read_from_the_tables(ragged_data):
    """Independent of the kernel: the lookback held and the one before index strength, stability, extremity and jump."""
    data, weights = ragged_data, {"strength": 0.3, "stability": -0.2, "extremity": 0.7, "jump": 0.4, "log_growth": 2.0}
    env = make_env(data, 4, split=whole(data.panel), episode_length=30, reward_weights=weights)
    chosen = random_actions(env, 100)
    before = rollout_lookbacks(env, chosen)
    log = rollout(env, chosen)
    count, seen = len(data.lookbacks), 0
    for n in range(100):
        for i in range(4):
            t, k_before, action = log["row"][n, i], before[n, i], chosen[n, i]
            k = action if log["seen_mask"][n, i, action] and data.valid[t, action] else nearest_valid(data.valid[t], k_before)
            seen += k != k_before
            growth = np.log(1 + log["record"][n, i, RECORD.index("net_return")])
            expected = {
                "log_growth": growth,
                "strength": data.signal.strength[t, k],
                "stability": data.signal.stability[t, k, k_before],
                "extremity": data.extremity[t, k],
                "jump": abs(k - k_before) / (count - 1),
            }
            for name, value in expected.items():
                assert log[f"component_{name}"][n, i] == pytest.approx(value, rel=1e-14, abs=1e-16), name
            total = sum(weights[name] * (-1 if name == "jump" else 1) * float(value) for name, value in expected.items())
            assert log["reward"][n, i] == pytest.approx(total, rel=1e-6, abs=1e-7)
    assert seen > 100


def rollout_lookbacks(env, actions):
    """(steps, n) grid indices held when each action was chosen."""
    env.reset(seed=0)
    held = []
    for action in actions:
        held.append(env._state.lookback.copy())
        env.step(action)
    return np.array(held)


def test_reward_is_log_growth_after_costs_by_default():
    data = LeadLagData(ragged_panel(10), replace(TINY, costs=DEAR, gross=2.0))
    env = make_env(data, 4, split=whole(data.panel))
    log = rollout(env, random_actions(env, 80))
    net, gross = (log["record"][..., RECORD.index(name)] for name in ("net_return", "gross_return"))
    np.testing.assert_allclose(log["reward"], np.log1p(net), rtol=1e-6, atol=1e-9)
    assert (net < gross - 1e-4).mean() > 0.3, "costs hardly matter here: the test shows nothing"


def test_shaping_fades_linearly_to_nothing(small_data):
    env = make_env(small_data, 2, reward_weights={"strength": 3.0, "jump": 2.0}, anneal_steps=50, episode_length=0)
    log = rollout(env, random_actions(env, 80))
    shaping = 3.0 * log["component_strength"] - 2.0 * log["component_jump"]
    fade = np.maximum(0, 1 - np.arange(80) / 50)[:, None]
    np.testing.assert_allclose(log["reward"], log["component_log_growth"] + fade * shaping, rtol=1e-5, atol=1e-7)
    constant = make_env(small_data, 2, reward_weights={"strength": 3.0}, episode_length=0)
    log = rollout(constant, random_actions(constant, 80))
    np.testing.assert_allclose(log["reward"], log["component_log_growth"] + 3 * log["component_strength"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("actions", ([0, 1, 5], [0, 1, -1], [0, 1], [[0, 1, 2]], [0.0, 1.0, 2.0], 2, [0, 1, np.nan]))
def test_bad_actions_raise(small_data, actions):
    env = make_env(small_data, 3)
    with pytest.raises(gym.error.ResetNeeded):
        env.step([0, 1, 2])
    env.reset(seed=0)
    before = env.get_state()
    with pytest.raises(ValueError, match="actions: "):
        env.step(actions)
    for name, value in env.get_state().items():
        assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("hedge", (False, True))
@pytest.mark.parametrize("top_fraction", (0.1, 0.3, 0.5))
def test_follower_portfolios_equal_the_slow_definition(hedge, top_fraction):
    rng, gross, topk = np.random.default_rng(1), 1.7, 3
    rows, count, symbols = 60, 3, 9
    scores = rng.standard_normal((rows, count, symbols)).astype(np.float32)
    eligible, valid, x = rng.random(scores.shape) < 0.7, rng.random((rows, count)) < 0.8, rng.standard_normal((rows, symbols))
    valid &= eligible.sum(axis=2) >= 2
    x[0] = 0.0  # leaders that did not move: nothing to follow
    weights, extremity, encoded = follower_portfolios(scores, eligible, valid, x, top_fraction, hedge, gross, topk)
    for t, k in np.ndindex(rows, count):
        expected, best = np.zeros(symbols), np.zeros((3, topk))
        if not valid[t, k]:
            assert not weights[t, k].any() and not extremity[t, k].any() and not encoded[t, k].any()
            continue
        members = sorted(np.flatnonzero(eligible[t, k]), key=lambda i: scores[t, k, i])
        m = min(max(1, round(top_fraction * len(members))), len(members) // 2)
        leaders, followers = members[-m:], members[:m]
        expected[followers] = np.sign(x[t, leaders].sum()) / m
        if hedge:
            expected[members] -= np.sign(x[t, leaders].sum()) / len(members)
            expected *= 1 / max(1e-300, np.abs(expected).sum())
        np.testing.assert_allclose(weights[t, k], gross * expected, atol=1e-6)
        held = x[t, leaders].sum() != 0 and not (hedge and m == len(members))
        assert np.abs(weights[t, k]).sum() == pytest.approx(gross * held, abs=1e-5)
        assert not hedge or weights[t, k].sum() == pytest.approx(0, abs=1e-6)
        spread = scores[t, k, leaders].mean() - scores[t, k, followers].mean()
        assert extremity[t, k] == pytest.approx(spread, abs=1e-6)
        for q, i in enumerate(members[::-1][:topk]):
            best[0, q], best[2, q] = scores[t, k, i], x[t, i]
        best[1, : min(topk, len(members))] = scores[t, k, members[:topk]]
        np.testing.assert_allclose(encoded[t, k], best.ravel(), atol=1e-6)


@pytest.mark.parametrize("encoder, size", (("rows", 6), ("topk", 6), ("full", 15)))
def test_observation_blocks(encoder, size):
    panel = ragged_panel(11)
    shared, own = np.random.default_rng(2).standard_normal(panel.num_bars), 2.0 * panel.close
    shared[:20] = np.nan  # nothing is known of it yet
    data = LeadLagData(replace(panel, extras={"shared": shared, "own": own}), replace(TINY, encoder=encoder, topk=2))
    env = make_env(data, 3, split=whole(data.panel), episode_length=25)
    at, count = data.layout, len(data.lookbacks)
    assert [s.stop - s.start for s in at.values()] == [size, 1, 1, 1, count, data.regime.shape[1], 7, count, 3]
    blocks = ["signal", "stability", "extremity", "strength", "strengths", "regime", "series", "lookback", "portfolio"]
    assert list(at) == blocks
    assert env.single_observation_space.shape == (at["portfolio"].stop,)
    table = {"rows": data.signal.scores, "full": data.signal.matrix, "topk": data.matrix[..., :size]}[encoder]
    assert encoder != "topk" or np.abs(table[..., :2] - np.sort(data.signal.scores, axis=2)[..., :-3:-1])[40:].max() < 1
    chosen = random_actions(env, 70)
    held, log = rollout_lookbacks(env, chosen), rollout(env, chosen)
    exposure = [RECORD.index(name) for name in ("gross_exposure", "net_exposure")]
    equity = log["record"][..., RECORD.index("equity")]
    for n, i in np.ndindex(70, 3):
        t, k, obs = log["row"][n, i], held[n, i], log["seen_obs"][n, i]
        np.testing.assert_array_equal(obs[at["signal"]], table[t, k])
        assert obs[at["stability"]] == data.signal.stability[t, k, k] and obs[at["extremity"]] == data.extremity[t, k]
        assert obs[at["strength"]] == data.signal.strength[t, k]
        np.testing.assert_array_equal(obs[at["strengths"]], data.signal.strength[t])
        np.testing.assert_array_equal(obs[at["lookback"]], np.arange(count) == k)
        np.testing.assert_array_equal(obs[at["regime"]], data.regime[t])
        known = np.nan_to_num(np.append(shared[t], own[t])).astype(np.float32)
        np.testing.assert_array_equal(obs[at["series"]], known)
        ended = np.flatnonzero(log["truncated"][:n, i])
        first = ended[-1] + 1 if len(ended) else 0
        path = np.append(1.0, equity[first:n, i])
        shown = log["record"][n - 1, i, exposure] if n > first else np.zeros(2)
        expected = [*shown, path[-1] / path.max() - 1]
        np.testing.assert_allclose(obs[at["portfolio"]], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fill", FILLS)
def test_nothing_seen_or_earned_depends_on_later_bars(fill):
    """Every bar and series after t changed at random: with the same actions, all up to t keeps every bit.

    Of the step decided at t itself, the terms that describe its signal are known, and its order if it fills at once.
    """
    panel, rng = ragged_with_series(), np.random.default_rng(4)
    at_once = (
        "seen_obs",
        "seen_mask",
        "row",
        "component_strength",
        "component_stability",
        "component_extremity",
        "component_jump",
    )
    order = [RECORD.index(n) for n in ("commission", "spread", "slippage", "turnover", "gross_exposure", "net_exposure")]
    config = replace(TINY, fill=fill, costs=DEAR, min_dollar_volume=1e3)

    def play(panel):
        env = make_env(
            LeadLagData(panel, config), split=whole(panel), random_start=False, episode_length=0,
            reward_weights={"strength": 0.1, "stability": 0.1, "extremity": 0.1, "jump": 0.1},
        )  # fmt: skip
        return rollout(env, random_actions(env, panel.num_bars - 30))

    before = play(panel)
    for t in (40, 59, 60, 77):
        after = play(tampered(panel, t, rng))
        for name, values in before.items():
            known = before["row"][:, 0] <= (t if name in at_once else t - 1)
            assert_same_bits(after[name][known], values[known], f"{name} up to row {t}")
        if fill == "same_close":
            known = before["row"][:, 0] <= t
            assert_same_bits(after["record"][known][..., order], before["record"][known][..., order], f"orders up to row {t}")
        assert not np.array_equal(after["reward"], before["reward"]), "nothing was changed"


@pytest.mark.parametrize(
    "field, value",
    (
        ("fill", "noon"), ("min_lookback", 1), ("max_lookback", 5), ("num_lookbacks", 1), ("num_lookbacks", 300),
        ("top_fraction", 0.0), ("top_fraction", 0.6), ("gross", 0.0), ("gross", np.nan), ("min_symbols", 1),
        ("min_coverage", 0.0), ("min_coverage", 1.1), ("min_dollar_volume", -1.0), ("encoder", "pca"), ("topk", 0),
        ("signal", "granger"), ("max_lag", 0),
    ),
)  # fmt: skip
def test_bad_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}: .*expected"):
        LeadLagData(ragged_panel(0), replace(LeadLagConfig(), **{field: value}))


@pytest.mark.parametrize(
    "options, words",
    (
        ({"num_envs": 0}, "num_envs=0: expected at least 1"),
        ({"split": "holdout"}, "split='holdout': expected one of .*test.*train.*val"),
        ({"actions": "relative"}, "actions='relative': expected one of .*absolute"),
        ({"reward_weights": {"sharpe": 1.0}}, "reward_weights: .*sharpe.*expected only .*log_growth"),
        ({"curriculum": (61, 90)}, r"curriculum=\(61, 90\): expected bounds with one of \[5, "),
        ({"topk": 3}, r"\['topk'\]: expected none of LeadLagConfig"),
        ({"episode_length": -5}, "episode_length=-5: expected"),
        ({"split": Split("test", np.array([[0, 4]]))}, "split 'test': no lookback has 4 eligible symbols in rows 0..3"),
    ),
)
def test_bad_env_arguments_are_named(small_data, options, words):
    with pytest.raises(ValueError, match=words):
        LeadLagVectorEnv(**{"num_envs": 2, "data": small_data} | options)
    if "num_envs" not in options:
        with pytest.raises(ValueError, match=words):
            LeadLagEnv(data=small_data, **options)


def test_render_mode_is_refused(small_data):
    with pytest.raises(ValueError, match="render_mode='human': expected None"):
        LeadLagEnv(data=small_data, render_mode="human")


def test_describe_holds_what_a_run_must_record(small_data):
    found = small_data.describe()
    assert found["fill"] == "next_open" and found["lookbacks"] == small_data.lookbacks.tolist()
    assert found["costs"]["commission_bps"] == 0.5 and found["max_lookback"] == CONFIG.max_lookback
    assert set(COMPONENTS) == set(make_env(small_data).reward_weights)


def test_targets_follow_the_sign_of_the_leaders_last_return(small_data):
    """End to end on the panel: the leaders are those with the largest scores, x is the return of the same bar."""
    x, scores = standardised_returns(small_data.panel), small_data.signal.scores
    for t in (100, 399, 700, 1500):
        for k in range(5):
            order = np.argsort(scores[t, k], kind="stable")
            side = np.sign(x[t, order[-2:]].sum())
            assert set(np.flatnonzero(small_data.targets[t, k])) == set(order[:2])
            np.testing.assert_allclose(small_data.targets[t, k, order[:2]], side / 2)
