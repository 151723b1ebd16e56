"""Environments side by side are each what they are alone."""

import numpy as np
import pytest
from conftest import assert_same_bits, random_actions

from envs.panel import Split
from envs.side_by_side import SideBySide
from envs.synthetic import make_panel
from envs.trading import TradingVectorEnv
from envs.trading_tables import TradingConfig, TradingData


@pytest.fixture(scope="module")
def data():
    return TradingData(make_panel("synthetic:ou:bars=300:train=2:val=1:test=1:assets=2", 1), TradingConfig(window=2))


def parts_of(data, sizes=(3, 5)):
    splits = [Split("train", np.array([[0, 200]])), Split("train", np.array([[310, 420], [430, 600]]))]
    return [TradingVectorEnv(n, data=data, split=split, episode_length=9) for n, split in zip(sizes, splits)]


@pytest.mark.parametrize("in_place", [False, True])
def test_every_row_is_that_of_its_own_env(data, in_place):
    both, alone = SideBySide(parts_of(data)), parts_of(data)
    obs, infos = both.reset(seed=4)
    starts = [part.reset(seed=seed) for part, seed in zip(alone, (4, 7))]
    assert_same_bits(obs, np.concatenate([o for o, _ in starts]), "reset")
    ended = set()
    for t, actions in enumerate(random_actions(both, 40, seed=2)):
        out = np.full(obs.shape, np.nan, np.float32) if in_place else None
        found = both.step(actions, out=out)
        assert not in_place or found[0] is out
        expected = [part.step(a) for part, a in zip(alone, np.split(actions, [3]))]
        for n in range(4):
            assert_same_bits(found[n], np.concatenate([e[n] for e in expected]), f"step {t}: {n}")
        infos, wanted = found[4], [e[4] for e in expected]
        for name in ("row", "action_mask", "record", "choice", "symbol", "decided_at"):
            assert_same_bits(infos[name], np.concatenate([w[name] for w in wanted]), name)
        for name in wanted[0]["components"]:
            assert_same_bits(infos["components"][name], np.concatenate([w["components"][name] for w in wanted]), name)
        over = found[2] | found[3]
        assert ("final_obs" in infos) == over.any()
        for part, rows, own in zip((0, 1), (slice(0, 3), slice(3, 8)), wanted):
            if over[rows].any():
                ended.add((part, bool(over[:3].any() and over[3:].any())))
                assert_same_bits(infos["final_obs"][rows][over[rows]], own["final_obs"][over[rows]], "final_obs")
        assert not over.any() or (infos["_final_obs"] == over).all()
    assert {part for part, _ in ended} == {0, 1}


def test_only_some_of_the_envs_end(data):
    """Where one has a last observation and the other none, the other's rows are zeros, and said to be none."""
    short, long = (
        TradingVectorEnv(2, data=data, split=part.split, episode_length=length) for part, length in zip(parts_of(data), (3, 8))
    )
    both = SideBySide([short, long])
    both.reset(seed=0)
    for _ in range(3):
        infos = both.step(np.zeros(4, np.int64))[4]
    assert infos["_final_obs"].tolist() == [True, True, False, False]
    assert infos["final_obs"][:2].any() and not infos["final_obs"][2:].any()


def test_a_saved_state_goes_on_bit_for_bit(data):
    first, second = SideBySide(parts_of(data)), SideBySide(parts_of(data))
    first.reset(seed=1)
    actions = random_actions(first, 30, seed=3)
    for row in actions[:13]:
        first.step(row)
    second.set_state(first.get_state())
    for row in actions[13:]:
        assert_same_bits(first.step(row)[0], second.step(row)[0], "observation")


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(ValueError, match="expected at least 1"):
        SideBySide([])
    other = TradingData(data.panel, TradingConfig(window=3))
    with pytest.raises(ValueError, match="spaces .* expected"):
        SideBySide([*parts_of(data), *parts_of(other)])
    both = SideBySide(parts_of(data))
    assert both.num_envs == 8 and both.action_space.shape == (8,) and both.observation_space.shape[0] == 8
