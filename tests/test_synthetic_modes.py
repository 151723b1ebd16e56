"""synthetic:modes: what is said of its regimes is so, and the wrong specialist earns less in each of them."""

import numpy as np
import pytest

from envs.panel import PanelError
from envs.synthetic import make_panel
from envs.synthetic_modes import EVENT, INTENTS, REVERT, TREND

VOL = 0.015


@pytest.fixture(scope="module")
def panel():
    return make_panel("synthetic:modes:bars=3000:train=20:val=1:test=1", 5)


@pytest.fixture(scope="module")
def rows(panel):
    """All but the first two of each history."""
    first = panel.segments
    return np.setdiff1d(np.arange(panel.num_bars), np.concatenate([first, first + 1]))


def session(panel):
    return np.log(panel.close / panel.open)


def test_the_expectation_is_the_conditional_mean_of_the_session(panel, rows):
    """Slope 1, intercept 0, in every regime; the night is driftless, and nothing else of the session varies."""
    for kind in range(3):
        own = rows[panel.hidden["regime"][rows] == kind]
        x = panel.hidden["expected_return"][own].ravel() / VOL
        y = (session(panel)[own].ravel() + 0.5 * VOL**2) / VOL
        slope, intercept = np.polyfit(x, y, 1)
        error = 1 / np.sqrt(len(x))
        assert abs(slope - 1) < 4 * error * 0.95 / x.std() and abs(intercept) < 4 * error, INTENTS[kind]
        assert (y - x).var() == pytest.approx(0.9, rel=0.03)
    night = np.log(panel.open[rows] / panel.close[rows - 1]) / VOL
    assert night.std() == pytest.approx(np.sqrt(0.1), rel=0.02) and abs(night.mean()) < 4 * night.std() / np.sqrt(night.size)


def test_regimes_are_equally_frequent_last_as_long_as_said_and_are_one_for_all_assets(panel):
    regime = panel.hidden["regime"]
    assert regime.shape == (panel.num_bars,) and (panel.hidden["best_intent"] == regime).all()
    np.testing.assert_allclose(np.bincount(regime) / len(regime), 1 / 3, atol=0.06)
    inside = np.setdiff1d(np.arange(1, len(regime)), panel.segments)
    changes = inside[regime[inside] != regime[inside - 1]]
    assert len(inside) / len(changes) == pytest.approx(150, rel=0.12)
    after = np.bincount((regime[changes] - regime[changes - 1]) % 3, minlength=3)
    assert after[0] == 0 and abs(after[1] - after[2]) < 4 * np.sqrt(len(changes))


def test_every_regime_moves_as_it_is_said_to(panel, rows):
    regime, expected = panel.hidden["regime"], panel.hidden["expected_return"] / VOL
    surprise = panel.extras["surprise"]
    np.testing.assert_allclose(np.abs(expected[regime == TREND]), 0.3)
    trend = rows[(regime[rows] == TREND) & (regime[rows - 1] == TREND)]
    assert (np.sign(expected[trend]) != np.sign(expected[trend - 1])).mean() == pytest.approx(0.5 / 50, rel=0.2)
    # revert: the deviation from the price before the regime began, that of the regime's own bars summed up, by half in 2 bars
    bars = np.log(panel.close)
    began = np.maximum.accumulate(np.where(np.append(True, regime[1:] != regime[:-1]), np.arange(len(regime)), 0))
    began = np.maximum(began, panel.segments[panel.segment_of_row])
    revert = rows[(regime[rows] == REVERT) & (began[rows] < rows) & (began[rows] > panel.segments[panel.segment_of_row[rows]])]
    count = (revert - began[revert])[:, None]
    deviation = (bars[revert - 1] - bars[began[revert] - 1]) / VOL + count * 0.5 * VOL
    np.testing.assert_allclose(expected[revert], -(1 - 0.5**0.5) * deviation, atol=1e-8)
    event = rows[regime[rows] == EVENT]
    np.testing.assert_allclose(expected[event], 0.7 * np.sign(surprise[event - 1]))
    assert 0.2 < (surprise[event] != 0).mean() < 0.5


def test_a_surprise_falls_in_equal_steps_and_comes_as_often_in_every_regime(panel, rows):
    surprise = panel.extras["surprise"]
    assert set(np.abs(surprise).ravel()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    now, before = surprise[rows], surprise[rows - 1]
    falling = np.abs(before) > 0.25
    np.testing.assert_allclose(now[falling], before[falling] - 0.25 * np.sign(before[falling]))
    quiet = ~falling
    assert set(np.abs(now[quiet])) == {0.0, 1.0} and np.abs(now[quiet]).mean() == pytest.approx(1 / 8, rel=0.05)
    assert abs(now[quiet].mean()) < 0.02
    share = [(now[panel.hidden["regime"][rows] == kind] != 0).mean() for kind in range(3)]
    np.testing.assert_allclose(share, share[0], rtol=0.1)


def test_the_tone_tells_regimes_apart_but_for_its_noise(panel):
    tone, regime = panel.extras["tone"], panel.hidden["regime"]
    assert tone.shape == (panel.num_bars,)
    for kind in range(3):
        assert tone[regime == kind].mean() == pytest.approx(kind - 1, abs=0.02)
        assert tone[regime == kind].std() == pytest.approx(0.2, rel=0.03)


def test_the_wrong_specialist_earns_nothing_or_loses(panel):
    """Simple rules of each intent, held one bar: which one is best is as said, in every regime, and by a clear gap."""
    regime, bars = panel.hidden["regime"], np.log(panel.close)
    past = bars - np.roll(bars, 10, axis=0)
    last = bars - np.roll(bars, 2, axis=0)
    held = {TREND: past > 0, REVERT: last < 0, EVENT: panel.extras["surprise"] > 0}
    ahead = np.roll(panel.hidden["expected_return"], -1, axis=0) / VOL
    usable = np.ones(len(regime), bool)
    for start in panel.segments:
        usable[start : start + 12] = False
    usable[np.append(panel.segments[1:], len(regime)) - 1] = False
    for kind in range(3):
        there = usable & (regime == kind)
        earned = {rule: (ahead * held[rule])[there].mean() for rule in held}
        others = [value for rule, value in earned.items() if rule != kind]
        assert earned[kind] > 0.07 and max(others) < 0.04 < earned[kind] - max(others), INTENTS[kind]
        assert np.maximum(ahead[there], 0).mean() == pytest.approx((0.15, 0.16, 0.13)[kind], abs=0.02)


@pytest.mark.parametrize("key, word", [("vol=0", "vol=0"), ("half_life=0.1", "half_life"), ("tone_noise=-1", "tone_noise")])
def test_bad_keys_are_named(key, word):
    with pytest.raises(PanelError, match=word):
        make_panel(f"synthetic:modes:{key}")
