"""Tasks of meta-learning: what is scored was never adapted on."""

import numpy as np
import pytest
from conftest import assert_same_bits, tampered

from envs import references
from envs.features import REGIMES
from envs.leadlag_tables import LeadLagData
from envs.ledger import growth
from envs.panel import Panel, PanelError, Split
from envs.portfolio_tables import PortfolioData
from envs.synthetic import CROWDED, OPEN, make_panel
from envs.tasks import TASK_SETS, halves, slice_regimes, slices

SPLIT = Split("val", np.array([[3, 13], [20, 27], [27, 31]]))


def test_halves_by_hand():
    adapt, score = halves(SPLIT)
    assert adapt.ranges.tolist() == [[3, 8], [20, 24], [27, 29]] and adapt.name == "val"
    assert score.ranges.tolist() == [[8, 13], [24, 27], [29, 31]] and score.name == "val"
    adapt, score = halves(Split("test", SPLIT.ranges[:2]), 0.3)
    assert adapt.ranges.tolist() == [[3, 6], [20, 22]] and score.ranges.tolist() == [[6, 13], [22, 27]]


@pytest.mark.parametrize("share", (0, 1, -0.1, 1.5, np.nan))
def test_a_share_is_a_fraction(share):
    with pytest.raises(ValueError, match=rf"share={share}: expected a fraction in \(0, 1\)"):
        halves(SPLIT, share)


@pytest.mark.parametrize("share, rows", ((0.3, r"\[27, 28\)"), (0.8, r"\[26, 27\)")))
def test_parts_too_short_are_said(share, rows):
    with pytest.raises(PanelError, match=f"split 'val': too few bars: rows {rows} hold 1"):
        halves(SPLIT, share)


def test_weights_stay_with_their_ranges():
    for part in halves(Split("train", SPLIT.ranges, [1.0, 2.0, 5.0])):
        assert part.weights.tolist() == [1, 2, 5]


# --- slices of real histories


def walk(bars=400, symbols=3, seed=0, **options):
    """A history of random walks that turn volatile half way."""
    rng = np.random.default_rng(seed)
    returns = rng.standard_normal((bars, symbols)) * np.where(np.arange(bars) < bars // 2, 0.005, 0.02)[:, None]
    times = np.datetime64("2020-01-01", "ns") + np.arange(bars) * np.timedelta64(1, "D")
    return Panel("walk", times, tuple("ABCDE"[:symbols]), 100 * np.exp(np.cumsum(returns, axis=0)), **options)


def test_slices_by_hand():
    panel = walk(100, segments=np.array([0, 40]), segment_split=("train", "test"))
    assert slices(panel, Split("train", [[0, 40]]), 15, warmup=0).ranges.tolist() == [[0, 15], [15, 30]]
    both = Split("test", [[3, 33], [40, 100]])
    assert slices(panel, both, 30, warmup=0).ranges.tolist() == [[3, 33], [40, 70], [70, 100]]
    assert slices(panel, both, 25, warmup=5).ranges.tolist() == [[5, 30], [45, 70], [70, 95]]  # after the history's start
    assert slices(panel, Split("test", [[60, 100]]), 20, warmup=10).ranges.tolist() == [[60, 80], [80, 100]]
    assert slices(panel, both, 25, warmup=0).name == "test"


@pytest.mark.parametrize("bars, warmup", ((1, 0), (10, -1)))
def test_slices_refuse_sizes_that_are_none(bars, warmup):
    with pytest.raises(ValueError, match=f"bars={bars}, warmup={warmup}: expected at least 2 and 0"):
        slices(walk(), Split("train", [[0, 400]]), bars, warmup)


def test_ranges_without_a_slice_are_said():
    with pytest.raises(PanelError, match="walk: split 'val': no slice of 90 rows after 30 of warm-up; .* 100, expected"):
        slices(walk(), Split("val", [[0, 100]]), 90, 30)


def test_regimes_of_slices_are_what_they_are_called():
    """Against windows computed one by one; after the turn all is volatile, and up and down are the sign of 20 bars."""
    panel = walk(800)
    split = slices(panel, Split("train", [[0, 800]]), 10, warmup=0)
    found = slice_regimes(panel, split)
    returns = np.diff(np.log(panel.close), axis=0, prepend=np.log(panel.close[:1]))
    vols = np.array([np.sqrt((returns[t - 19 : t + 1] ** 2).mean()) for t in range(20, 800)])
    for row, label in zip(split.ranges[:, 0], found):
        if row < 20:
            assert label == -1
        else:
            volatile, down = vols[row - 20] > np.median(vols[: row - 19]), returns[row - 19 : row + 1].mean() < 0
            assert REGIMES[label] == f"{'volatile' if volatile else 'calm'}-{'down' if down else 'up'}"
    assert set(found) == {-1, 0, 1, 2, 3} and (found[43:] >= 2).all()


def test_regimes_begin_anew_with_every_history():
    panel, alone = walk(400, segments=np.array([0, 200])), walk(400)
    second = Split("test", [[a, a + 20] for a in range(200, 400, 20)])
    part = Panel("part", alone.timestamps[200:], alone.symbols, alone.close[200:].copy())
    expected = slice_regimes(part, Split("test", second.ranges - 200))
    assert_same_bits(slice_regimes(panel, second), expected)
    assert expected[0] == -1 and not np.array_equal(slice_regimes(alone, second), expected)


@pytest.mark.parametrize("row", (30, 155, 250))
def test_the_regime_of_a_slice_does_not_see_beyond_its_first_row(row):
    """Every later bar is another; the label of the slice that begins here, and of those before, is the same."""
    panel = walk(symbols=4, open=walk(symbols=4, seed=1).close)
    split = Split("train", [[a, a + 5] for a in range(0, 400, 5)])
    later = tampered(panel, row, np.random.default_rng(row))
    known, changed = slice_regimes(panel, split), slice_regimes(later, split)
    assert_same_bits(changed[: row // 5 + 1], known[: row // 5 + 1])
    assert not np.array_equal(changed, known)


# --- task sets


@pytest.mark.parametrize("name", TASK_SETS)
def test_histories_of_a_task_set_are_tasks(name):
    """Each with values of its own, drawn from those that the set names, or in a regime of its own that lasts."""
    spec = ":".join(part for part in TASK_SETS[name].split(":") if not part.startswith(("train=", "val=", "test=")))
    panel = make_panel(f"{spec}:train=12:val=1:test=1", 3)
    assert set(panel.parameters) == {
        part.split("=")[0] for part in spec.split(":") if set("~|").intersection(part) or ".." in part
    }
    for values in panel.parameters.values():
        assert len(set(values)) == (2 if set(np.abs(values)) == {abs(values[0])} else 14)
    if "regime" in panel.hidden:
        assert {len(set(panel.hidden["regime"][a:b])) for a, b in panel.split()["train"].ranges} == {1}
        assert set(panel.hidden["regime"][panel.segments]) == {OPEN, CROWDED}


@pytest.mark.parametrize("name", [name for name in TASK_SETS if not name.startswith("portfolio")])
def test_the_best_lookback_differs_from_task_to_task(name):
    """In growth a year, on the second halves of 24 histories: far beyond chance, and known from the first halves."""
    spec = TASK_SETS[name].replace("train=120:val=20:test=40", "train=24:val=1:test=1")
    panel = make_panel(spec, 11)
    data, split = LeadLagData(panel), panel.split()["train"]
    regime = panel.hidden["regime"][split.ranges[:, 0]]

    def earned(part, k):
        frame = references.run(data, part, references.hold(np.full(panel.num_bars, k)))
        return growth(frame).reshape(24, -1).mean(axis=1) * panel.bars_per_year

    short, long = list(data.lookbacks).index(27), len(data.lookbacks) - 1
    adapt, score = ({k: earned(part, k) for k in (short, long)} for part in halves(split))
    gain = score[short] - score[long]
    for kind, sign in ((OPEN, 1), (CROWDED, -1)):
        own = sign * gain[regime == kind]
        assert len(own) > 5 and own.mean() > 0.4 and own.mean() > 5 * own.std() / np.sqrt(len(own))
    told = adapt[short] > adapt[long]
    assert (told == (regime == OPEN)).mean() > 0.9
    best = np.where(told, score[short], score[long])
    assert best.mean() - max(score[short].mean(), score[long].mean()) > 0.15


def test_drift_tells_nothing_of_the_regime():
    """On bull-bear and mixed closes rise or fall in either: the drift of a history is its parameter with the regime's sign."""
    for name in ("bull-bear", "mixed"):
        spec = TASK_SETS[name].replace("train=120", "train=400").replace("bars=1000", "bars=300")
        panel = make_panel(spec, 2)
        first = panel.split()["train"].ranges[:, 0]
        rises = np.where(panel.hidden["regime"][first] == OPEN, 1, -1) * panel.parameters["drift"][:400] > 0
        is_open = panel.hidden["regime"][first] == OPEN
        assert abs(rises[is_open].mean() - rises[~is_open].mean()) < 4 * np.sqrt(0.25 * 2 / 200)


def test_drift_of_the_hidden_market_is_in_the_session_and_changes_with_the_regime():
    spec = "synthetic:hidden:bars=3000:train=10:val=1:test=1:regime_bars=1e9:beta_slow=0:beta_fast=0"
    panel, flat = make_panel(f"{spec}:drift=0.2", 1), make_panel(spec, 1)
    sign = np.where(panel.hidden["regime"] == OPEN, 1, -1)[:, None]
    np.testing.assert_allclose(
        np.log(panel.close / panel.open) - np.log(flat.close / flat.open), sign * np.full((1, 10), 0.002)
    )
    np.testing.assert_allclose(panel.hidden["expected_return"], sign * np.full((1, 10), 0.002))
    assert_same_bits(flat.extras["news"], panel.extras["news"])


@pytest.mark.parametrize("name", [name for name in TASK_SETS if "merton" in TASK_SETS[name]])
def test_portfolio_tasks_have_a_merton_fraction_of_their_own(name):
    panel = make_panel(TASK_SETS[name].replace("train=150", "train=60"), 1)
    PortfolioData(panel).market(halves(panel.split()["train"])[0])
    first = panel.segments
    best = np.clip(panel.hidden["expected_return"][first, 0] / panel.hidden["volatility"][first, 0] ** 2, 0, 1)
    assert 0.3 < (best == 0).mean() < 0.7 and 0.2 < (best == 1).mean() < 0.7
