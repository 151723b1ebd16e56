"""Markets whose answer is known: drawn from the seed alone, and the truth they report is the truth."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstest

from envs import portfolio_tables
from envs.panel import SPLIT_NAMES, PanelError
from envs.synthetic import CROWDED, FAST, MARKETS, OPEN, SLOW, WARM_UP, load_market, make_panel

MANY = "synthetic:leadlag:bars=2000:train=4:val=1:test=1"


def histories(panel, split):
    return [slice(a, b) for a, b in panel.split()[split].ranges]


def inside(panel):
    """Rows that are not the first of a history."""
    return np.setdiff1d(np.arange(panel.num_bars), panel.segments)


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
    closes = {panels[0].close[rows].tobytes() for split in SPLIT_NAMES for rows in histories(panels[0], split)}
    assert len(closes) == 4, "two histories are the same"


@pytest.mark.parametrize("market", sorted(MARKETS))
def test_a_history_does_not_depend_on_how_many_others_there_are(market):
    few, many = (make_panel(f"synthetic:{market}:bars=300:train={n}:val={n}:test={n}", seed=4) for n in (1, 3))
    for split in SPLIT_NAMES:
        for a, b in zip(histories(few, split), histories(many, split)):
            for kind in ("fields", "hidden", "extras"):
                assert getattr(few, kind).keys() == getattr(many, kind).keys()
                for key, values in getattr(few, kind).items():
                    np.testing.assert_array_equal(values[a], getattr(many, kind)[key][b])


def test_splits_are_the_labelled_histories():
    panel = make_panel("synthetic:noise:bars=300:train=3:val=1:test=2")
    assert [len(histories(panel, split)) for split in SPLIT_NAMES] == [3, 1, 2]
    assert all(rows.stop - rows.start == 300 for split in SPLIT_NAMES for rows in histories(panel, split))


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
    for history in (rows for split in SPLIT_NAMES for rows in histories(panel, split)):
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
    rows = inside(many_bars)
    regime = many_bars.hidden["regime"][rows]
    slow, fast = (returns[rows - 1][regime == kind] for kind in (SLOW, FAST))
    assert len(slow) > 1000 and len(fast) > 1000
    assert slow.std() == pytest.approx(0.02 * np.sqrt(1 + 0.14**2 * 0.8), rel=0.03)
    assert fast.std() == pytest.approx(0.01 * np.sqrt(1 + 0.6**2 * 0.8), rel=0.03)


@pytest.fixture(scope="module")
def hidden():
    """Few networks: what followers do alone."""
    return make_panel("synthetic:hidden:bars=3000:train=20:val=1:test=1:life_slow=1e9:life_fast=1000000:beta_slow=0.5", 3)


def test_expectations_of_the_hidden_market_are_conditional_means(hidden):
    """Of the session: slope 1 on them, whatever the regime; of the night, only where the strong network is crowded."""
    rows = inside(hidden)
    session = np.log(hidden.close[rows] / hidden.open[rows]) / 0.01
    night = np.log(hidden.open[rows] / hidden.close[rows - 1]) / 0.01
    expected, crowded = hidden.hidden["expected_return"][rows] / 0.01, hidden.hidden["regime"][rows] == CROWDED
    assert 0.3 < crowded.mean() < 0.7
    first, last = hidden.segments, np.append(hidden.segments[1:], hidden.num_bars)
    of_history = np.searchsorted(hidden.segments, rows, side="right") - 1
    size = np.stack([np.abs(hidden.hidden["expected_return"][a + 1 : b]).mean(axis=0) for a, b in zip(first, last)])
    strong = size[of_history] > 0.01 * 0.8  # mean |N(0, 1)| is 0.8: 0.4 for the faint network, 1.2 for the strong one
    faint = (size[of_history] > 0) & ~strong
    assert strong.any(axis=1).mean() == faint.any(axis=1).mean() == 1.0 and (strong.sum(axis=1) == 3).all()
    for regime in (False, True):
        for kind, by_night in ((strong, -2.0 if regime else 0.0), (faint, 0.0)):
            chosen = kind & (crowded == regime)[:, None]
            x = expected[chosen]
            slope = (x @ session[chosen]) / (x @ x)
            assert slope == pytest.approx(1.0, abs=4 * 0.95 / np.sqrt(x @ x))
            assert (x @ night[chosen]) / (x @ x) == pytest.approx(by_night, abs=4 * 0.32 / np.sqrt(x @ x))


def test_regimes_of_the_hidden_market_look_alike_from_close_to_close(hidden):
    """Mean lagged correlation of leaders with followers, volatility, and correlations within a bar: the same in both."""
    rows = inside(hidden)
    returns = np.zeros_like(hidden.close)
    returns[rows] = np.log(hidden.close[rows] / hidden.close[rows - 1]) / 0.01
    rows = np.setdiff1d(rows, hidden.segments + 1)
    crowded = hidden.hidden["regime"][rows] == CROWDED
    now, before = returns[rows], returns[rows - 1]
    for kind in (now**2, np.abs(now[:, :, None] * before[:, None, :]), np.abs(now[:, :, None] * now[:, None, :])):
        of_bar = kind.reshape(len(rows), -1).mean(axis=1)
        a, b = of_bar[crowded], of_bar[~crowded]
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt(a.var() / len(a) + b.var() / len(b)) < 0.05 * b.mean()


def test_sides_of_the_strong_network_change_places_and_leaders_come_first():
    """Every 50 bars; what moves the followers is the leaders' bar before, and nothing of the same bar."""
    panel = make_panel("synthetic:hidden:bars=3000:train=2:val=1:test=1:life_fast=50:beta_slow=0", 4)
    for history in (rows for split in SPLIT_NAMES for rows in histories(panel, split)):
        expected = (
            panel.hidden["expected_return"][history][1:] * np.where(panel.hidden["regime"][history][1:] == OPEN, 1, -1)[:, None]
        )
        returns = np.diff(np.log(panel.close[history]), axis=0)
        followers = expected != 0
        changes = np.flatnonzero((followers[1:] != followers[:-1]).any(axis=1))
        assert (np.diff(changes) == 50).all() and len(changes) in (59, 60)
        sets = {row.tobytes() for row in followers}
        assert len(sets) == 2 and not np.logical_and(*(np.frombuffer(row, bool) for row in sets)).any()
        one, other = (np.frombuffer(row, bool) for row in sorted(sets))
        for led, leading in ((one, other), (other, one)):
            bars = np.flatnonzero((followers == led).all(axis=1))
            bars = bars[bars > 0]
            lead = expected[bars][:, led].mean(axis=1)
            np.testing.assert_allclose(expected[bars][:, led], np.tile(lead[:, None], led.sum()))
            before, same = (returns[bars - lag][:, leading].mean(axis=1) for lag in (1, 0))
            assert np.corrcoef(lead, before)[0, 1] > 0.4 and abs(np.corrcoef(lead, same)[0, 1]) < 0.15


def test_news_tells_the_regimes_apart_slowly():
    """Independent normals around +-news by the regime of the same bar; regimes last 150 bars; nothing trades on it."""
    panel = make_panel("synthetic:hidden:bars=3000:train=20:val=1:test=1:news=0.5", 2)
    news, regime, rows = panel.extras["news"], panel.hidden["regime"], inside(panel)
    noise = news - np.where(regime == OPEN, 0.5, -0.5)
    assert news.shape == (panel.num_bars,) and kstest(noise, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[rows], noise[rows - 1])[0, 1]) < 4 / np.sqrt(len(rows))
    began = np.union1d(np.flatnonzero(np.diff(regime) != 0) + 1, panel.segments)
    lengths = np.diff(began)[np.isin(began[1:], panel.segments, invert=True)]
    assert lengths.mean() == pytest.approx(150, abs=4 * 150 / np.sqrt(len(lengths)))
    loud = make_panel("synthetic:hidden:bars=3000:train=20:val=1:test=1:news=20", 2)
    np.testing.assert_array_equal(loud.close, panel.close)
    np.testing.assert_array_equal(loud.extras["news"] > 0, regime == OPEN)  # of this bar, and no other


def test_forecasts_of_the_other_sign_are_the_same_and_what_they_say_the_opposite():
    spec = "synthetic:garleanu-pedersen:bars=300:train=1:val=1:test=1"
    panel, other = make_panel(spec, seed=1), make_panel(f"{spec}:sign=-1", seed=1)
    np.testing.assert_array_equal(panel.extras["factor"], other.extras["factor"])
    np.testing.assert_array_equal(panel.hidden["expected_return"], -other.hidden["expected_return"])
    first, second = (np.diff(p.close, axis=0) / p.close[:-1] - p.hidden["expected_return"][1:] for p in (panel, other))
    inside = np.ones(len(first), bool)
    inside[panel.segments[1:] - 1] = False
    np.testing.assert_allclose(first[inside], second[inside], atol=1e-12)  # the noise


def test_garleanu_pedersen_is_as_described():
    """Factors are stationary and revert at two speeds; the next simple return is the factor plus noise; no gaps."""
    panel = make_panel("synthetic:garleanu-pedersen:bars=3000:train=8:val=1:test=1:vol=0.02:strength=0.3", seed=1)
    factor, rows = panel.extras["factor"], inside(panel)
    reversion = np.array([0.03, 0.2, 0.03, 0.2])
    np.testing.assert_array_equal(panel.hidden["reversion"], np.tile(reversion, (panel.num_bars, 1)))
    np.testing.assert_array_equal(panel.hidden["volatility"], 0.02)
    np.testing.assert_array_equal(panel.hidden["expected_return"][rows], factor[rows - 1])  # known one bar before
    assert not panel.hidden["expected_return"][panel.segments].any()
    np.testing.assert_allclose(panel.open[rows], panel.close[rows - 1], rtol=1e-12)
    bars = 3000 * 10 * reversion / (2 - reversion)  # independent ones
    assert (np.abs(factor.std(axis=0) / (0.3 * 0.02) - 1) < 4 / np.sqrt(2 * bars)).all()
    assert factor[panel.segments].std() == pytest.approx(0.3 * 0.02, rel=0.35)  # from the first bar on
    for lag in (1, 5):
        later = np.setdiff1d(rows, (panel.segments[:, None] + np.arange(lag)).ravel())
        found = (factor[later] * factor[later - lag]).mean(axis=0) / (factor**2).mean(axis=0)
        np.testing.assert_allclose(found, (1 - reversion) ** lag, atol=0.03)
    shock = panel.close[rows] / panel.close[rows - 1] - 1 - factor[rows - 1]
    assert shock.std() == pytest.approx(0.02, rel=0.02) and abs(shock.mean()) < 4 * 0.02 / np.sqrt(shock.size)
    between = np.corrcoef(np.column_stack([shock, factor[rows]]).T) - np.eye(8)
    slow = np.repeat([0, 1], 4)[:, None] * np.repeat([0, 1], 4)  # reverting factors are alike by chance for longer
    assert np.abs(between[slow == 0]).max() < 0.03 and np.abs(between).max() < 0.15


def test_merton_is_as_described():
    """Geometric Brownian motion of that drift and volatility in simple and log returns, without gaps."""
    panel = make_panel("synthetic:merton:bars=3000:train=18:val=1:test=1:drift=0.006:vol=0.1", seed=1)
    rows = inside(panel)
    np.testing.assert_array_equal(panel.hidden["expected_return"], 0.006)
    np.testing.assert_array_equal(panel.hidden["volatility"], 0.1)
    assert panel.extras == {} and "reversion" not in panel.hidden
    np.testing.assert_allclose(panel.open[rows], panel.close[rows - 1], rtol=1e-12)
    growth = np.log(panel.close[rows] / panel.close[rows - 1])[:, 0]
    error = 0.1 / np.sqrt(len(rows))
    assert abs(np.expm1(growth).mean() - 0.006) < 4 * error < 0.5 * 0.1**2 / 2, "too few bars to tell means of logs apart"
    assert growth.std() == pytest.approx(0.1, rel=0.02)
    assert abs(np.corrcoef(growth[:-1], growth[1:])[0, 1]) < 4 / np.sqrt(len(rows))


def test_tail_is_as_described():
    """One symbol crashes in the given share of bars, by the given size, whenever; the other always earns the same."""
    panel = make_panel("synthetic:tail:bars=3000:train=18:val=1:test=1:vol=0.004:probability=0.03", seed=1)
    rows = inside(panel)
    np.testing.assert_allclose(panel.open[rows], panel.close[rows - 1], rtol=1e-12)
    growth = np.log(panel.close[rows] / panel.close[rows - 1])
    np.testing.assert_allclose(growth[:, 1], 0.003, atol=1e-12)
    crashed = growth[:, 0] < 0.01 - 0.055
    error = np.sqrt(0.03 * 0.97 / len(rows))
    assert abs(crashed.mean() - 0.03) < 4 * error < 0.005
    assert abs(crashed[1:][crashed[:-1]].mean() - 0.03) < 4 * error / np.sqrt(0.03), "a crash foretells a crash"
    for found, mean in ((growth[~crashed, 0], 0.01), (growth[crashed, 0], -0.1)):
        assert abs(found.mean() - mean) < 4 * 0.004 / np.sqrt(len(found)) and found.std() == pytest.approx(0.004, rel=0.05)
    told = {key: tuple(np.unique(truth, axis=0).ravel()) for key, truth in panel.hidden.items()}
    assert told == {
        "calm_growth": (0.01, 0.003), "volatility": (0.004, 0.0), "crash": (0.11, 0.0), "crash_probability": (0.03, 0.0)
    }  # fmt: skip
    assert panel.extras == {} and len({*panel.segments}) == 20


def test_ou_is_as_described():
    """Stationary from the first bar, reverting by the half-life, with the given shocks, from close to open to close."""
    half_life, vol = 4.0, 0.02
    panel = make_panel(f"synthetic:ou:bars=3000:train=6:val=1:test=1:assets=5:half_life={half_life}:vol={vol}", seed=1)
    deviation, rows = panel.hidden["deviation"], inside(panel)
    np.testing.assert_allclose(np.log(panel.close / 100), deviation, atol=1e-12)
    assert (panel.hidden["half_life"] == half_life).all() and (panel.hidden["volatility"] == vol).all() and panel.extras == {}
    keep = 0.5 ** (1 / half_life)
    spread = vol / np.sqrt(1 - keep**2)
    assert deviation.std() == pytest.approx(spread, rel=0.02) and deviation[panel.segments].std() == pytest.approx(
        spread, rel=0.4
    )
    night = np.log(panel.open[rows] / 100) - keep**0.1 * deviation[rows - 1]
    day = deviation[rows] - keep**0.9 * np.log(panel.open[rows] / 100)
    shock = deviation[rows] - keep * deviation[rows - 1]
    parts = [vol * np.sqrt((1 - keep ** (2 * share)) / (1 - keep**2)) for share in (0.1, 0.9, 1.0)]
    for found, expected in zip((night, day, shock), parts):
        assert found.std() == pytest.approx(expected, rel=0.01)
        assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.02
        assert abs(np.corrcoef(found.ravel(), deviation[rows - 1].ravel())[0, 1]) < 0.02
    assert parts[2] == pytest.approx(vol) and abs(np.corrcoef(night.ravel(), day.ravel())[0, 1]) < 0.02
    assert np.abs(np.corrcoef(shock.T) - np.eye(5)).max() < 0.04, "assets are independent"


def test_noise_earns_nothing_on_average():
    panel = make_panel("synthetic:noise:bars=3000:train=4:val=1:test=1:vol=0.05", seed=1)
    rows = inside(panel)
    for now, later in ((panel.close[rows - 1], panel.close[rows]), (panel.open[rows], panel.close[rows])):
        simple = later / now - 1
        error = simple.std() / np.sqrt(simple.size)
        assert abs(simple.mean()) < 4 * error
        assert 0.5 * 0.05**2 > 8 * error, "too few bars to see that log returns would be wrong"
    assert (panel.close[rows] / panel.close[rows - 1]).std() == pytest.approx(0.05, rel=0.02)
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
        ("synthetic:hidden:assets=9", ("assets=9", "even")),
        ("synthetic:hidden:leaders=3", ("leaders=3, followers=3, assets=10", "half of them")),
        ("synthetic:hidden:life_fast=0", ("life_fast=0: expected at least 1",)),
        ("synthetic:leadlag:life_fast=0.5", ("life_fast=0.5: expected",)),
        ("synthetic:leadlag:vol_slow=-1", ("vol_slow=-1.0: expected",)),
        ("synthetic:noise:vol=nan", ("vol=nan: expected",)),
        ("synthetic:garleanu-pedersen:strength=0", ("strength=0.0: expected a number between 0 and 1",)),
        ("synthetic:garleanu-pedersen:sign=0.5", ("sign=0.5: expected 1 or -1",)),
        ("synthetic:garleanu-pedersen:vol=1", ("vol=1.0: expected",)),
        ("synthetic:garleanu-pedersen:reversion_slow=0", ("reversion_slow=0.0: expected a number in (0, 1]",)),
        ("synthetic:garleanu-pedersen:reversion_fast=1.1", ("reversion_fast=1.1: expected",)),
        ("synthetic:merton:vol=0", ("vol=0.0: expected a number between 0 and 1",)),
        ("synthetic:merton:drift=-1", ("drift=-1.0: expected a number between -1 and 1",)),
        ("synthetic:ou:half_life=0.4", ("half_life=0.4: expected at least 0.5",)),
        ("synthetic:ou:vol=0", ("vol=0.0: expected a number between 0 and 1",)),
        ("synthetic:tail:assets=3", ("assets=3: expected 2",)),
        ("synthetic:tail:vol=0", ("vol=0.0: expected a number between 0 and 1",)),
        ("synthetic:tail:probability=1", ("probability=1.0: expected a number between 0 and 1",)),
        ("synthetic:tail:steady=0.0078", ("steady=0.0078: expected less than gain - probability * crash = 0.0078",)),
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


def test_black_scholes_delta_is_the_derivative_of_the_options_value():
    """The value is the mean payoff over many paths from the same price; delta its difference quotient, on common numbers."""
    panel = make_panel("synthetic:black-scholes:train=1:val=1:test=1", seed=3)
    start, last, life = WARM_UP, 90, 30
    assert WARM_UP == portfolio_tables.WARMUP  # the option is sold where Portfolio-v0 first decides
    price = panel.close[: last + 1, 0] / panel.close[start, 0]
    owed = panel.hidden["liability"]
    assert owed[last] == pytest.approx(max(0.0, price[last] - 1.0)) and not owed[:last].any()
    shocks = np.random.default_rng(0).standard_normal(400_000)
    for row in (start, start + 11, start + 25):
        left = 0.2 * np.sqrt((last - row) / life)
        end = price[row] * np.exp(left * shocks - 0.5 * left**2)
        up, down = (np.maximum(factor * end - 1.0, 0.0).mean() for factor in (1.001, 0.999))
        assert panel.hidden["delta"][row, 0] == pytest.approx((up - down) / (0.002 * price[row]), abs=0.005)
        assert panel.extras["moneyness"][row, 0] == pytest.approx(np.log(price[row]) / left)
        assert panel.extras["maturity"][row, 0] == pytest.approx((last - row) / life)
    assert panel.extras["maturity"][last, 0] == 0 and (panel.extras["maturity"][:start] == 1).all()
    np.testing.assert_allclose(panel.open[1:91], panel.close[:90])  # no gaps: orders are filled at the price that was seen


def test_black_scholes_prices_are_a_martingale_of_the_given_volatility():
    panel = make_panel("synthetic:black-scholes:train=2000:val=1:test=1:life_vol=0.3", seed=1)
    end = panel.close[: 2000 * 91].reshape(2000, 91)[:, [WARM_UP, 90]]
    ratio = end[:, 1] / end[:, 0]
    assert ratio.mean() == pytest.approx(1.0, abs=4 * 0.3 / np.sqrt(2000)) and np.log(ratio).std() == pytest.approx(
        0.3, rel=0.06
    )


@pytest.mark.parametrize(
    "option, words", [("assets=2", ("assets=2", "1")), ("life_vol=1", ("life_vol",)), ("bars=62", ("bars=62", "63"))]
)
def test_black_scholes_refuses(option, words):
    with pytest.raises(PanelError) as caught:
        make_panel(f"synthetic:black-scholes:{option}")
    assert all(word in str(caught.value) for word in words)
