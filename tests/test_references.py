"""What an agent is compared with: every rule is what its name says, chosen on the past alone, and the oracle is a ceiling."""

import numpy as np
import pytest
from conftest import CONFIG, SMALL, TINY, assert_same_bits, make_env, ragged_panel, tampered

from envs import references
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.ledger import LEDGER, growth
from envs.synthetic import make_panel

PLANTED = "synthetic:leadlag:bars=600:train=2:val=1:test=4:beta_fast=1.2:beta_slow=0.5"
RULES = {"best in training", "random", "equal weight"}
ORACLES = {"oracle regime", "oracle returns"}


def mean_growth(ledgers):
    return {name: growth(frame).mean() for name, frame in ledgers.items()}


def test_hold_takes_the_longest_allowed_below_or_else_the_next_above():
    mask = np.array(
        [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 0, 0]], dtype=bool
    )
    choice = np.array([3, 9, 3, 3, 2, 0, 0])
    rows = np.array([0, 2, 3, 2, 4, 5])  # wanted: 3, 3, 3, 3, 2, 0
    found = references.hold(choice)(None, mask, rows)
    np.testing.assert_array_equal(found, [3, 2, 1, 3, 4, 1])


def test_every_reference_is_there_and_complete(small_data):
    splits = small_data.panel.split()
    found = references.references(small_data, splits)
    assert set(found) == {f"lookback {k}" for k in small_data.lookbacks} | RULES | ORACLES
    starts, stops = small_data.market(splits["test"]).starts, splits["test"].ranges[:, 1]
    times = np.concatenate([small_data.panel.timestamps[a + 1 : b] for a, b in zip(starts, stops)])
    for name, frame in found.items():
        assert tuple(frame.columns) == LEDGER and not frame.isna().any().any(), name
        assert_same_bits(frame["timestamp"].to_numpy("datetime64[ns]"), times, name)
        assert set(frame["split"]) == {"test"}, name


def test_fixed_lookbacks_hold_what_they_say(small_data):
    """Stepped by hand: the lookback itself wherever it is valid."""
    splits = small_data.panel.split()
    found = references.references(small_data, splits)
    for k, lookback in enumerate(small_data.lookbacks):
        env = make_env(small_data, 2, split=splits["test"], episode_length=0, random_start=False)
        mask, used, returns, over = env.reset(seed=0)[1]["action_mask"], [], [], np.zeros(2, bool)
        while not over.any():
            allowed = np.flatnonzero(mask[0])
            action = max((q for q in allowed if q <= k), default=allowed[0])
            _, _, _, over, infos = env.step(np.full(2, action))
            mask = infos["action_mask"]
            used.append(infos["lookback"])
            returns.append(infos["record"][:, 0])
        assert (np.array(used) == lookback).mean() > 0.8
        frame = found[f"lookback {lookback}"]
        assert_same_bits(frame["net_return"].to_numpy(), np.array(returns).T.ravel(), f"lookback {lookback}")
    assert found["random"]["action"].nunique() == 5
    assert found["equal weight"]["net_exposure"].to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_random_follows_the_seed(small_data):
    splits = small_data.panel.split()
    first, again, other = (references.references(small_data, splits, seed)["random"] for seed in (0, 0, 1))
    assert first.equals(again) and not first["action"].equals(other["action"])


@pytest.mark.parametrize("seed", range(3))
def test_best_in_training_is_chosen_on_the_training_split(seed):
    panel = make_panel(SMALL, seed)
    data, splits = LeadLagData(panel, CONFIG), panel.split()
    found = references.references(data, splits)

    def held(k, split):
        return references.run(data, splits[split], references.hold(np.full(panel.num_bars, k)))

    trained, tested = ([growth(held(k, split)).mean() for k in range(5)] for split in ("train", "test"))
    best = int(np.argmax(trained))
    assert found["best in training"].equals(found[f"lookback {data.lookbacks[best]}"])
    if seed < 2:  # on these panels another one is best on the test: the choice cannot have been made there
        assert np.argmax(tested) != best


def test_references_do_not_read_the_validation_split(small_data):
    splits = small_data.panel.split()
    full = references.references(small_data, splits)
    less = references.references(small_data, {name: splits[name] for name in ("train", "test")})
    assert all(frame.equals(less[name]) for name, frame in full.items())


@pytest.fixture(scope="module")
def planted():
    panel = make_panel(PLANTED, seed=1)
    data = LeadLagData(panel, LeadLagConfig(max_lookback=120, num_lookbacks=5))
    return data, references.references(data, panel.split())


def test_oracles_are_ceilings_on_a_strong_market(planted):
    data, ledgers = planted
    found = mean_growth(ledgers)
    fixed = [value for name, value in found.items() if name.startswith("lookback")]
    assert found["oracle regime"] > max(fixed) > 0
    assert found["oracle returns"] > 2 * found["oracle regime"]
    assert found["oracle regime"] > max(found[name] for name in RULES)


def test_regime_oracle_uses_one_lookback_per_regime(planted):
    data, ledgers = planted
    frame = ledgers["oracle regime"]
    starts, stops = data.market(data.panel.split()["test"]).starts, data.panel.split()["test"].ranges[:, 1]
    rows = np.concatenate([np.arange(a, b - 1) for a, b in zip(starts, stops)])
    settled = rows - np.repeat(starts, stops - starts - 1) > data.lookbacks[-1]
    regime = data.panel.hidden["regime"][rows]
    chosen = [set(frame["action"].to_numpy()[settled & (regime == kind)]) for kind in (0, 1)]
    assert [len(c) for c in chosen] == [1, 1] and chosen[0] != chosen[1]
    assert max(chosen[0]) > max(chosen[1])  # the slow regime takes the longer lookback


def test_returns_oracle_holds_the_sign_of_the_promised_returns(planted):
    data, ledgers = planted
    frame = ledgers["oracle returns"]
    np.testing.assert_allclose(frame["gross_exposure"], data.config.gross, rtol=1e-6)
    assert (frame["gross_return"] > 0).mean() > 0.6


def test_noise_has_no_oracle():
    panel = make_panel("synthetic:noise:bars=300:train=1:val=1:test=1:assets=5", seed=0)
    data = LeadLagData(panel, CONFIG)
    found = references.references(data, panel.split())
    assert set(found) == {f"lookback {k}" for k in data.lookbacks} | RULES
    assert references.capture(0.1, mean_growth(found)) is None


def test_capture_is_the_share_of_the_gap():
    growths = {"lookback 5": 0.1, "lookback 60": 0.3, "best in training": 0.1, "random": 9.0, "oracle regime": 0.5}
    assert references.capture(0.3, growths) == pytest.approx(0.0)
    assert references.capture(0.5, growths) == pytest.approx(1.0)
    assert references.capture(0.45, growths) == pytest.approx(0.75)
    assert references.capture(0.2, growths) == pytest.approx(-0.5)
    assert references.capture(0.2, {"lookback 5": 0.1, "random": 0.0}) is None


@pytest.mark.parametrize("oracle", (0.3, 0.2))
def test_capture_is_unknown_where_the_oracle_is_no_better(oracle):
    """A small test split: the regime oracle may equal the best fixed lookback of hindsight, or fall below it."""
    assert references.capture(0.25, {"lookback 5": 0.1, "lookback 60": 0.3, "oracle regime": oracle}) is None


@pytest.fixture(scope="module")
def history():
    panel = ragged_panel(1, bars=240)
    return panel, panel.split(embargo=5)


@pytest.mark.parametrize("fill", ("next_open", "next_close", "same_close"))
@pytest.mark.parametrize("ahead", (10, 30))
def test_nothing_earned_depends_on_later_bars(history, fill, ahead, monkeypatch):
    """Bars after t, in the test split, replaced at random: the ledgers up to t keep every bit, and so do orders at t."""
    panel, splits = history
    t = int(splits["test"].ranges[0, 0]) + ahead
    orders = []
    run_weights = references.backtest_weights

    def recorded(panel, ex, rates, split, targets, *args):
        orders.append(targets[: t + 1].copy())
        return run_weights(panel, ex, rates, split, targets, *args)

    monkeypatch.setattr(references, "backtest_weights", recorded)
    config = LeadLagConfig(**{**TINY.__dict__, "fill": fill})
    before = references.references(LeadLagData(panel, config), splits)
    assert set(before) == {f"lookback {k}" for k in config.lookbacks} | RULES
    for seed in range(4):
        after = references.references(LeadLagData(tampered(panel, t, np.random.default_rng(seed)), config), splits)
        for name, frame in before.items():
            seen = frame["timestamp"] <= panel.timestamps[t]
            assert ahead - 2 <= seen.sum() < len(frame)
            assert frame[seen].equals(after[name][after[name]["timestamp"] <= panel.timestamps[t]]), name
            assert not frame[~seen].equals(after[name][after[name]["timestamp"] > panel.timestamps[t]]), name
        assert_same_bits(orders[-1], orders[0], "weights ordered up to bar t")
