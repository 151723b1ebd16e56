"""Markets whose answer is known: drawn from the seed alone, and the truth they report is the truth."""

from dataclasses import replace

import numpy as np
import pytest

from envs.panel import PanelError
from envs.synthetic import FAST, MARKETS, SLOW, SPLITS, load_market, make_panel

MANY = "synthetic:leadlag:bars=2000:train=4:val=1:test=1"


def histories(panel, split):
    return [slice(a, b) for a, b in panel.split()[split].ranges]


@pytest.fixture(scope="module")
def many_bars():
    return make_panel(MANY, seed=5)


@pytest.mark.parametrize("market", sorted(MARKETS))
def test_panel_is_a_function_of_the_seed(market):
    spec = f"synthetic:{market}:bars=300:train=2:val=1:test=1"
    panels = [make_panel(spec, seed) for seed in (0, 0, 1)]
    assert panels[0].sha256 == panels[1].sha256 != panels[2].sha256
    assert panels[0].name == spec
    for key, truth in panels[0].hidden.items():
        np.testing.assert_array_equal(truth, panels[1].hidden[key])
    closes = {panels[0].close[rows].tobytes() for split in SPLITS for rows in histories(panels[0], split)}
    assert len(closes) == 4, "two histories are the same"


@pytest.mark.parametrize("field", ("open", "close", "high", "low"))
def test_a_history_does_not_depend_on_how_many_others_there_are(field):
    few, many = (make_panel(f"synthetic:leadlag:bars=300:train={n}:val={n}:test={n}", seed=4) for n in (1, 3))
    for split in SPLITS:
        for a, b in zip(histories(few, split), histories(many, split)):
            np.testing.assert_array_equal(getattr(few, field)[a], getattr(many, field)[b])
            for key in few.hidden:
                np.testing.assert_array_equal(few.hidden[key][a], many.hidden[key][b])


def test_splits_are_the_labelled_histories():
    panel = make_panel("synthetic:noise:bars=300:train=3:val=1:test=2")
    assert [len(histories(panel, split)) for split in SPLITS] == [3, 1, 2]
    assert all(rows.stop - rows.start == 300 for split in SPLITS for rows in histories(panel, split))


def test_reported_expectation_is_the_conditional_mean():
    """Regress the session's log return plus half its variance on it: slope 1, intercept 0, within 4 standard errors.

    Bars are volatile, so that forgetting half the variance would show.
    """
    panel = make_panel(f"{MANY}:vol_slow=0.08:vol_fast=0.04", seed=5)
    session = np.log(panel.close / panel.open)
    volatility = np.where(panel.hidden["regime"] == SLOW, 0.08, 0.04)[:, None]
    expected = panel.hidden["expected_return"] / volatility
    realised = (session + 0.5 * volatility**2) / volatility
    planted = expected != 0
    x, y = expected[planted], realised[planted]
    design = np.column_stack([np.ones_like(x), x])
    (intercept, slope), residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * residual[0] / (len(x) - 2))
    assert planted.sum() > 50_000 and errors[1] < 0.02
    assert abs(slope - 1) < 4 * errors[1] and abs(intercept) < 4 * errors[0]
    assert residual[0] / len(x) == pytest.approx(0.9, rel=0.02)  # the session's share of the bar's variance
    rest = realised[~planted]
    assert abs(rest.mean()) < 4 * rest.std() / np.sqrt(rest.size) < 0.025  # expected, were it forgotten: 0.03


@pytest.mark.parametrize("lag", (1, 3))
def test_the_network_leads_by_lag_with_the_planted_sign(lag):
    """Leaders fixed, no give-back: only they lead, by `lag` bars, and with correlation beta * volatility share."""
    spec = f"synthetic:leadlag:bars=3000:train=1:val=1:test=1:assets=4:leaders=1:followers=2:retrace=0:lag={lag}"
    panel = make_panel(f"{spec}:life_slow=1e12:life_fast=1e12:regime_bars=1e12:beta_slow=0.5:beta_fast=0.5", seed=2)
    for history in (rows for split in SPLITS for rows in histories(panel, split)):
        returns = np.diff(np.log(panel.close[history]), axis=0)
        signs = panel.hidden["expected_return"][history]
        followers = np.flatnonzero(np.abs(signs).sum(axis=0) > 0)
        assert len(followers) == 2
        at = {k: np.corrcoef(returns[:-k].T, returns[k:].T)[:4, 4:] for k in (1, 2, 3, 4)}
        leader = int(at[lag][:, followers].mean(axis=1).argmax())
        assert leader not in followers
        np.testing.assert_allclose(at[lag][leader, followers], 0.5 / np.sqrt(1.25), atol=0.08)
        for k, corr in at.items():
            planted = np.zeros((4, 4), bool)
            planted[leader, followers] = k == lag
            assert np.abs(corr[~planted]).max() < 0.1


def test_followers_overdo_and_leaders_give_it_back(many_bars):
    """Split by who is expected to move: the sum of squared expectations is the same for both sides when retrace is 1."""
    no_retrace = make_panel(MANY + ":retrace=0", seed=5)
    moving = (many_bars.hidden["expected_return"] != 0).sum(axis=1)
    assert set(moving) == {0, 8} and (moving == 0).sum() == len(many_bars.segments)
    assert set((no_retrace.hidden["expected_return"] != 0).sum(axis=1)) == {0, 4}
    both = no_retrace.hidden["expected_return"]
    np.testing.assert_array_equal(many_bars.hidden["expected_return"][both != 0], both[both != 0])


def test_regimes_tell_themselves_apart_by_volatility(many_bars):
    returns = np.diff(np.log(many_bars.close), axis=0)
    inside = np.ones(len(returns), bool)
    inside[many_bars.segments[1:] - 1] = False
    regime = many_bars.hidden["regime"][1:]
    slow, fast = (returns[inside & (regime == kind)] for kind in (SLOW, FAST))
    assert len(slow) > 1000 and len(fast) > 1000
    assert slow.std() == pytest.approx(0.02 * np.sqrt(1 + 0.14**2 * 0.8), rel=0.03)
    assert fast.std() == pytest.approx(0.01 * np.sqrt(1 + 0.6**2 * 0.8), rel=0.03)


def test_noise_earns_nothing_on_average():
    panel = make_panel("synthetic:noise:bars=3000:train=4:val=1:test=1:vol=0.05", seed=1)
    inside = np.setdiff1d(np.arange(1, panel.num_bars), panel.segments)
    for now, later in ((panel.close[inside - 1], panel.close[inside]), (panel.open[inside], panel.close[inside])):
        simple = later / now - 1
        error = simple.std() / np.sqrt(simple.size)
        assert abs(simple.mean()) < 4 * error
        assert 0.5 * 0.05**2 > 8 * error, "too few bars to see that log returns would be wrong"
    assert (panel.close[inside] / panel.close[inside - 1]).std() == pytest.approx(0.05, rel=0.02)
    assert panel.hidden == {}


@pytest.mark.parametrize(
    "spec, words",
    (
        ("synthetic:momentum", ("--market synthetic:momentum", "unknown synthetic market 'momentum'", "leadlag", "noise")),
        ("synthetic:noise:beta_slow=1", ("--market", "beta_slow=1", "expected key=value", "'vol'")),
        ("synthetic:noise:bars=many", ("--market", "bars='many'", "expected int")),
        ("synthetic:noise:bars=299", ("bars=299", "expected at least 300")),
        ("synthetic:noise:train=0", ("train=0", "expected at least 1")),
        ("synthetic:leadlag:leaders=6:followers=5", ("leaders=6", "followers=5", "at most assets=10")),
        ("synthetic:leadlag:leaders=0", ("leaders=0", "at least 1")),
        ("synthetic:leadlag:lag=0", ("lag=0: expected at least 1",)),
        ("synthetic:leadlag:life_fast=0.5", ("life_fast=0.5: expected",)),
        ("synthetic:leadlag:vol_slow=-1", ("vol_slow=-1.0: expected",)),
        ("synthetic:noise:vol=nan", ("vol=nan: expected",)),
    ),
)
def test_bad_markets_are_named(spec, words):
    with pytest.raises(PanelError) as error:
        make_panel(spec)
    for word in words:
        assert word in str(error.value)


def test_load_market_draws_synthetic_ones_and_reads_the_rest(tmp_path):
    spec = "synthetic:noise:bars=300:train=1:val=1:test=1"
    assert load_market(spec, 3, symbols=None, start=None).sha256 == make_panel(spec, 3).sha256
    for key in ("symbols", "start", "end", "resample"):
        with pytest.raises(PanelError, match=f"synthetic market takes no --{key}"):
            load_market(spec, 3, **{key: "2020"})
    csv = tmp_path / "two.csv"
    csv.write_text("date,A,B\n2020-01-01,1,2\n2020-01-02,3,4\n2020-01-03,5,6\n")
    assert load_market(str(csv), symbols=["B"], start="2020-01-02").close[:, 0].tolist() == [4, 6]


def test_truth_is_cut_with_the_panel(many_bars):
    part = many_bars.select(symbols=["S03", "S01"])
    np.testing.assert_array_equal(part.hidden["expected_return"], many_bars.hidden["expected_return"][:, [3, 1]])
    assert replace(many_bars, hidden={}).sha256 == many_bars.sha256
