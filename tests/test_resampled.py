"""Markets made of another: what they keep of it, what they destroy, and that no test bar is ever trained on.

Sources carry their row numbers in an extra series, so that every bar that was made tells which bar it was made of.
"""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import (
    CONFIG,
    ROOT,
    TINY,
    assert_same_bits,
    make_env,
    ragged_panel,
    ragged_with_series,
    random_actions,
    rollout,
)

from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.panel import SPLIT_NAMES, Panel, PanelError
from envs.portfolio_tables import PortfolioData
from envs.resampled import resampled
from envs.synthetic import drawn_from_seed, load_market, make_panel

NOISE = "synthetic:noise:bars=300:train=2:val=1:test=2:assets=4"
KINDS = ("shuffled", "bootstrap:train=2:val=1:paths=2", "crossed")
DAYS = np.arange("2020-01-01", "2021-01-01", dtype="datetime64[D]").astype("datetime64[ns]")


def numbered(panel: Panel) -> Panel:
    return replace(panel, extras=panel.extras | {"row": np.arange(panel.num_bars, dtype=np.float64)})


def source_rows(panel: Panel) -> np.ndarray:
    return panel.extras["row"].astype(int)


def histories(panel: Panel, split: str) -> list[np.ndarray]:
    """Source rows of each history of a split."""
    return [source_rows(panel)[a:b] for a, b in panel.split()[split].ranges]


def moves(panel: Panel, base: float = np.nan) -> np.ndarray:
    """(T, N, fields) prices over the symbol's last close before, `base` where it has had none, and the traded value."""
    out = np.full((panel.num_bars, panel.num_symbols, len(panel.fields)), np.nan)
    for column in range(panel.num_symbols):
        for row in range(panel.num_bars):
            if row in panel.segments:
                last = base
            for k, (name, values) in enumerate(panel.fields.items()):
                scale = 1 / panel.close[row, column] if name == "volume" else last
                out[row, column, k] = values[row, column] / scale
            last = panel.close[row, column] if panel.present[row, column] else last
        out[np.isnan(out[:, column]).any(axis=1), column] = np.nan  # no return: as good as no bar
    return out


def closes(*columns, **kwargs) -> Panel:
    close = np.array(columns, dtype=np.float64).T.copy()
    names = tuple("ABCDEFGH"[: close.shape[1]])
    return Panel("hand", DAYS[: len(close)], names, close, **kwargs)


@pytest.fixture(scope="module")
def ragged() -> Panel:
    """One history with every field and kind of gap, series of both shapes, and row numbers."""
    return numbered(ragged_with_series())


@pytest.fixture(scope="module")
def many() -> Panel:
    """Histories with labels; symbols S00 to S03."""
    return numbered(make_panel(NOISE, seed=5))


@pytest.fixture(params=["ragged", "many"])
def source(request) -> Panel:
    return request.getfixturevalue(request.param)


# --- bars are those of the source


@pytest.mark.parametrize("spec", KINDS[:2])
def test_each_bar_has_the_cross_section_of_one_source_bar(source, spec):
    made = resampled(f"{spec}:x", source, seed=2)
    rows, first = source_rows(made), made.segments
    expected, found = moves(source)[rows], moves(made, base=100.0)
    if spec == "shuffled":  # a first bar stays, has no return, and closes at 100
        assert_same_bits(rows[first], source.segments)
        np.testing.assert_array_equal(made.close[first], np.where(source.present[first], 100.0, np.nan))
        for name in ("open", "high", "low"):
            ratio = source.fields[name] / source.close
            np.testing.assert_allclose(made.fields[name][first], 100 * ratio[first], rtol=1e-14)
        found[first] = np.nan
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    assert np.isfinite(expected).any(axis=(1, 2)).mean() > 0.99
    for name, values in source.extras.items():
        assert_same_bits(made.extras[name], values[rows])
    assert made.fields.keys() == source.fields.keys() and made.symbols == source.symbols
    assert made.timezone == source.timezone


def test_prices_are_compounded_by_hand_over_gaps():
    """B is listed late and halts; a bar without a close before it is none."""
    nan = np.nan
    source = closes([10, 20, 10, 30, 15, 15], [nan, 8, nan, 4, 6, 6])
    source = numbered(replace(source, volume=source.close * 0 + 7))
    for seed in range(20):
        made = resampled("shuffled:hand", source, seed)
        a, b = [10.0], [nan]
        returns = {1: (2, nan), 2: (0.5, nan), 3: (3, 0.5), 4: (0.5, 1.5), 5: (1, 1)}  # B's first bar is bar 1
        level = [100.0, 100.0]
        a, b = [100.0], [nan]
        for row in source_rows(made)[1:]:
            level = [x if np.isnan(r) else x * r for x, r in zip(level, returns[row])]
            a.append(level[0])
            b.append(level[1] if row >= 3 else nan)
        np.testing.assert_allclose(made.close, np.array([a, b]).T, rtol=1e-14)
        traded = (source.close * 7)[source_rows(made)]
        np.testing.assert_allclose(made.volume * made.close, np.where(made.present, traded, nan), rtol=1e-14)


def test_a_bar_that_opens_or_peaks_at_its_close_still_does():
    """What is equal stays equal to the last bit: no high below its close."""
    panel = ragged_panel(3)
    flat = replace(panel, open=panel.close, high=panel.close, low=panel.close)
    made = resampled("bootstrap:paths=3:x", flat, seed=0)
    for name in ("open", "high", "low"):
        assert_same_bits(made.fields[name], made.close)


def test_the_truth_is_dropped_and_the_name_is_the_specification():
    for kind in KINDS:
        spec = f"{kind}:{NOISE.replace('noise', 'merton')}"
        made = load_market(spec, 1)
        assert made.name == spec and not made.hidden


# --- shuffled


def test_shuffling_permutes_inside_each_history(source):
    made = resampled("shuffled:x", source, seed=4)
    edges = np.append(source.segments, source.num_bars)
    orders = [source_rows(made)[a:b] - a for a, b in zip(edges[:-1], edges[1:])]
    for order in orders:
        assert sorted(order) == list(range(len(order))) and (order == np.arange(len(order))).sum() < 8
        follows = (np.diff(order) == 1).mean()
        assert follows < 0.05, "neighbours stay together"
    assert len({order.tobytes() for order in orders}) == len(orders), "two histories have one order"
    for key in ("timestamps", "segments"):
        assert_same_bits(getattr(made, key), getattr(source, key))
    assert made.segment_split == source.segment_split


def test_every_order_is_as_likely_as_another():
    """Three bars behind the first have six orders: about 100 of 600 seeds each (standard deviation 9)."""
    source = numbered(closes([1, 2, 3, 4]))
    orders = [tuple(source_rows(resampled("shuffled:x", source, seed))) for seed in range(600)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 60


# a network that never changes, of which every bar of each follower holds something
LEADING = "synthetic:leadlag:bars=3000:train=1:val=1:test=1:assets=6:leaders=3:followers=3:life_slow=1e9:life_fast=1e9"


def lead_of_one_bar(panel: Panel) -> list[float]:
    """Per history: T times the sum of squared lag-1 cross-correlations of different symbols. Where nothing leads, this is
    chi-squared with N (N - 1) degrees of freedom; returned as deviations from that mean."""
    out, n = [], panel.num_symbols
    for a, b in np.column_stack([panel.segments, np.append(panel.segments[1:], panel.num_bars)]):
        x = np.diff(np.log(panel.close[a:b]), axis=0)
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        correlation = x[:-1].T @ x[1:] / (len(x) - 1)
        statistic = (len(x) - 1) * (correlation[~np.eye(n, dtype=bool)] ** 2).sum()
        out.append((statistic - n * (n - 1)) / np.sqrt(2 * n * (n - 1)))
    return out


def test_shuffling_leaves_nothing_to_predict_and_blocks_leave_most():
    for seed in range(3):
        assert min(lead_of_one_bar(load_market(LEADING, seed))) > 20
        assert max(map(abs, lead_of_one_bar(load_market(f"shuffled:{LEADING}", seed)))) < 4
        assert min(lead_of_one_bar(load_market(f"bootstrap:train=1:val=1:paths=2:{LEADING}", seed))) > 20
        assert max(map(abs, lead_of_one_bar(load_market(f"bootstrap:block=1:train=1:val=1:paths=2:{LEADING}", seed)))) < 6


def test_shuffling_keeps_mean_and_covariance():
    source = make_panel(NOISE, seed=1)
    made = resampled("shuffled:x", source, seed=1)
    for a, b in zip(source.segments, np.append(source.segments[1:], source.num_bars)):
        before, after = (np.diff(np.log(p.close[a:b]), axis=0) for p in (source, made))
        np.testing.assert_allclose(after.sum(axis=0), before.sum(axis=0), atol=1e-11)
        np.testing.assert_allclose(np.cov(after.T), np.cov(before.T), rtol=1e-9, atol=1e-15)


# --- bootstrap


def parts(panel: Panel, fractions=(0.6, 0.2, 5)) -> dict[str, list[np.ndarray]]:
    """Split -> the rows of each of its source histories that have a return: all but the first here."""
    found = {name: [np.arange(a, b) for a, b in split.ranges] for name, split in panel.split(*fractions).items()}
    return {name: [np.setdiff1d(rows, panel.segments) for rows in ranges] for name, ranges in found.items()}


def test_histories_of_a_split_are_drawn_from_its_bars_alone(source):
    made = resampled("bootstrap:train=4:val=3:paths=5:x", source, seed=3)
    assert made.segment_split == ("train",) * 4 + ("val",) * 3 + ("test",) * 5
    for name, pools in parts(source).items():
        pool, drawn = np.concatenate(pools), histories(made, name)
        assert {len(rows) for rows in drawn} == {max(map(len, pools))}
        assert set(np.concatenate(drawn)) <= set(pool)
        assert len(set(np.concatenate(drawn))) > 0.6 * len(pool)
        longest = max(pools, key=len)
        for a, b in made.split()[name].ranges:
            assert_same_bits(made.timestamps[a:b], source.timestamps[longest])


def test_no_return_of_the_test_was_trained_on(source):
    """By value: the returns of present symbols, in the order of the columns."""
    made = resampled("bootstrap:train=3:val=3:paths=3:x", source, seed=1)
    close = list(made.fields).index("close")
    returns, seen = moves(made, base=100.0)[:, :, close].round(11), {}
    for name in SPLIT_NAMES:
        values = np.concatenate([returns[a:b] for a, b in made.split()[name].ranges])
        seen[name] = set(values[np.isfinite(values)])
    assert min(map(len, seen.values())) > 50
    assert not (seen["test"] & seen["train"] or seen["test"] & seen["val"] or seen["val"] & seen["train"])


@pytest.mark.parametrize("block", [1, 2])
def test_every_bar_of_a_split_can_be_drawn(source, block):
    """30,000 bars in blocks of 2 miss one of the 600 with probability below 600 exp(-25)."""
    made = resampled(f"bootstrap:block={block}:bars=30000:train=1:val=1:paths=1:x", source, seed=0)
    for name, pools in parts(source).items():
        counts = np.unique(np.concatenate(histories(made, name)), return_counts=True)
        assert_same_bits(counts[0], np.concatenate(pools))
        assert counts[1].max() < 2 * counts[1].mean(), "some bars are drawn more often"


def blocks(rows: np.ndarray, pools: list[np.ndarray]) -> np.ndarray:
    """Lengths of the runs in which each row is followed by the next of its pool, the last by the first."""
    following = {a: b for pool in pools for a, b in zip(pool, np.roll(pool, -1))}
    breaks = [t for t in range(1, len(rows)) if rows[t] != following[rows[t - 1]]]
    return np.diff([0, *breaks])


@pytest.mark.parametrize("block", [3, 12.5, 60])
def test_blocks_have_geometric_lengths_of_the_mean_asked_for(many, block):
    made = resampled(f"bootstrap:block={block}:bars=60000:train=1:val=1:paths=1:x", many, seed=7)
    (rows,) = histories(made, "train")
    lengths = blocks(rows, parts(many)["train"])
    n = len(lengths)
    # two draws in a row may meet by chance: one in 598
    assert abs(lengths.mean() - block) < 4 * block / np.sqrt(n) + block / 598
    for k in (1, 2, int(block), int(2 * block)):
        share = (1 - 1 / block) ** k
        assert abs((lengths > k).mean() - share) < 4 * np.sqrt(share * (1 - share) / n) + 3 / 598


def test_one_endless_block_is_a_source_history_turned_around(source):
    made = resampled("bootstrap:block=inf:x", source, seed=6)
    for name, pools in parts(source).items():
        begins = set()
        for rows in histories(made, name):
            (pool,) = (pool for pool in pools if rows[0] in pool)
            assert_same_bits(rows, np.roll(pool, -int(np.searchsorted(pool, rows[0]))))
            begins.add(rows[0])
        assert len(begins) > 4
        assert {int(np.searchsorted([p[0] for p in pools], row, side="right")) for row in begins} == set(
            range(1, len(pools) + 1)
        ), "a source history is never drawn"


def test_source_histories_of_different_lengths():
    """New ones are as long as the longest, on its calendar; a block starts at every bar alike."""
    starts, labels = np.array([0, 4, 24, 30, 40]), ("train", "train", "val", "test", "test")
    source = numbered(closes(range(1, 61), segments=starts, segment_split=labels))
    made = resampled("bootstrap:block=1:train=300:x", source, seed=0)
    for name, first, last in (("train", 5, 24), ("val", 25, 30), ("test", 41, 60)):
        for a, b in made.split()[name].ranges:
            assert_same_bits(made.timestamps[a:b], DAYS[first:last])
    rows, counts = np.unique(np.concatenate(histories(made, "train")), return_counts=True)
    assert rows.tolist() == [1, 2, 3, *range(5, 24)] and np.ptp(counts) < 0.5 * counts.mean()


def test_defaults_are_those_of_the_documentation(ragged):
    options = "block=60:bars=0:train=20:val=6:paths=20:train_fraction=0.6:val_fraction=0.2:embargo=5"
    assert resampled("bootstrap:x", ragged).sha256 == resampled(f"bootstrap:{options}:x", ragged).sha256
    options = "train_fraction=0.6:val_fraction=0.2:embargo=5"
    assert resampled("crossed:x", ragged).sha256 == resampled(f"crossed:{options}:x", ragged).sha256


def test_bars_without_any_return_are_not_drawn():
    """Row 2 shows only a symbol that has just been listed."""
    nan = np.nan
    source = numbered(closes([1, 2, nan, *range(4, 30)], [nan, nan, *range(3, 30)]))
    made = resampled("bootstrap:bars=500:embargo=0:x", source, seed=0)
    rows = np.concatenate(histories(made, "train"))
    assert 2 not in rows and 0 not in rows and {1, 3} < set(rows)
    assert made.present.any(axis=1).all()


def test_cut_of_the_source_is_by_the_options(ragged):
    made = resampled("bootstrap:train_fraction=0.3:val_fraction=0.5:embargo=9:x", ragged, seed=0)
    for name, pools in parts(ragged, (0.3, 0.5, 9)).items():
        drawn = np.concatenate(histories(made, name))
        assert set(drawn) <= set(pools[0]) and {drawn.min(), drawn.max()} == {pools[0][0], pools[0][-1]}


def test_calendar_is_cut_or_repeats_the_lengths_of_its_bars(ragged):
    for bars in (10, 71, 72, 300):
        made = resampled(f"bootstrap:bars={bars}:train=2:x", ragged, seed=0)
        times = ragged.timestamps[1:66]  # the training part: 60% of 120 - 2 * 5 bars, without the first
        steps = np.resize(np.diff(times), bars - 1)
        for a, b in made.split()["train"].ranges:
            assert_same_bits(made.timestamps[a:b], times[0] + np.append(np.timedelta64(0, "ns"), np.cumsum(steps)))


@pytest.mark.parametrize("spec", ["bootstrap:x", "bootstrap:block=5:bars=40:x"])
def test_a_history_does_not_depend_on_how_many_others_there_are(many, spec):
    few, more = (resampled(spec.replace("bootstrap", f"bootstrap:train={n}:val={n}:paths={n}"), many, 9) for n in (1, 3))
    for name in SPLIT_NAMES:
        (a, *_), (b, *rest) = histories(few, name), histories(more, name)
        assert_same_bits(a, b)
        assert len(rest) == 2 and not any((b == other).all() for other in rest)


def test_splits_are_drawn_apart(many):
    made = resampled("bootstrap:bars=200:block=9:x", many, seed=0)
    train, val = histories(made, "train")[0], histories(made, "val")[0]
    assert not (np.diff(train) == np.diff(val)).all()


# --- crossed


def test_halves_and_times_by_hand():
    """Five symbols, 20 bars: 60% of 18 bars, a bar, 20%, a bar, the rest."""
    base = np.arange(20.0)
    source = closes(*(100 * (i + 1) + base for i in range(5)))
    source = numbered(replace(source, extras={"own": source.close + 0.5}, open=source.close, volume=source.close * 3))
    halves = set()
    for seed in range(40):
        made = resampled("crossed:embargo=1:x", source, seed)
        assert made.segment_split == SPLIT_NAMES and made.num_symbols == 2
        assert_same_bits(made.segments, np.array([0, 11, 14]))
        assert_same_bits(source_rows(made), np.array([*range(11), *range(12, 15), *range(16, 20)]))
        first, second = zip(*(name.split(">") for name in made.symbols))
        assert list(first) == sorted(first) and list(second) == sorted(second) and len({*first, *second}) == 4
        for rows, half in ((slice(0, 14), first), (slice(14, None), second)):
            columns = [source.symbols.index(name) for name in half]
            expected = source.close[source_rows(made)[rows]][:, columns]
            for field, factor in (("close", 1), ("open", 1), ("volume", 3)):
                assert_same_bits(made.fields[field][rows], expected * factor)
            assert_same_bits(made.extras["own"][rows], expected + 0.5)
        assert_same_bits(made.timestamps, source.timestamps[source_rows(made)])
        halves.add((first, second))
    assert len(halves) > 15, "30 are possible"
    assert {name for first, _ in halves for name in first} == set("ABCDE")


def test_labelled_histories_keep_their_labels(many):
    made = resampled("crossed:x", many, seed=1)
    assert made.segment_split == many.segment_split
    assert_same_bits(made.segments, many.segments)
    halves = [[int(name[1:]) for name in half] for half in zip(*(name.split(">") for name in made.symbols))]
    for label, start in zip(made.segment_split, made.segments):
        rows = slice(start, start + 300)
        assert_same_bits(made.close[rows], np.ascontiguousarray(many.close[rows, halves[label == "test"]]))


# --- seeds, nesting and what load_market passes on


@pytest.mark.parametrize("kind", [*KINDS, "shuffled:bootstrap", "bootstrap:crossed", "crossed:shuffled"])
def test_panel_is_a_function_of_spec_and_seed(kind):
    panels = [load_market(f"{kind}:{NOISE}", seed) for seed in (0, 0, 1, 2)]
    assert panels[0].sha256 == panels[1].sha256
    assert len({panel.sha256 for panel in panels}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_differ_on_one_real_history(ragged, kind):
    assert len({resampled(f"{kind}:x", ragged, seed).sha256 for seed in range(4)}) == 4


def test_every_draw_has_random_numbers_of_its_own(monkeypatch):
    """A seed sequence reads missing entries as zeros: [1, 0] is [1, 0, 0]."""
    keys, original = [], np.random.default_rng

    def record(key):
        keys.append((*key, *[0] * (6 - len(key))))
        return original(key)

    monkeypatch.setattr(np.random, "default_rng", record)
    load_market(f"crossed:shuffled:bootstrap:train=2:shuffled:bootstrap:{NOISE}", 1)
    assert len(keys) > 50 and len(set(keys)) == len(keys)


def test_nested_panels():
    spec = "shuffled:synthetic:noise:bars=400:train=2:val=1:test=1"
    made, source = load_market(spec, 3), make_panel(spec.removeprefix("shuffled:"), 3)
    assert made.name == spec and made.segment_split == ("train", "train", "val", "test")
    assert made.sha256 == resampled(spec, source, 3).sha256
    both = load_market("bootstrap:bars=350:paths=3:crossed:" + NOISE, 3)
    assert len(both.segments) == 20 + 6 + 3 and both.num_symbols == 2 and both.num_bars == 29 * 350


def test_selection_reaches_the_inner_market(tmp_path):
    path = tmp_path / "a=b.csv"
    rows = [f"{day!s:.10},{i + 1},{i + 2},{i + 3}" for i, day in enumerate(DAYS[:100])]
    path.write_text("\n".join(["date,A,B,C", *rows]))
    series = tmp_path / "s.csv"
    series.write_text("date,x\n2020-01-01,1\n")
    selection = dict(symbols=("A", "C"), start="2020-01-11", resample="2D", series=str(series))
    inner = load_market(str(path), 0, **selection)
    for kind in KINDS:
        spec = f"{kind}:{path}"
        made = load_market(spec, 2, **selection)
        assert made.sha256 == resampled(spec, inner, 2).sha256 and made.name == spec and list(made.extras) == ["x"]
    with pytest.raises(PanelError, match="synthetic market takes no --symbols"):
        load_market(f"shuffled:{NOISE}", symbols=("S00",))


def test_which_markets_are_drawn():
    drawn = ["synthetic:noise", "shuffled:sp500", "bootstrap:block=5:x.csv", "crossed:shuffled:sp500"]
    read = ["sp500", "shuffled", "data/shuffled:x.csv", "bootstrapped:sp500", "synthetic.csv", ""]
    assert all(map(drawn_from_seed, drawn)) and not any(map(drawn_from_seed, read))


def test_the_benchmark_runs_rules_on_every_seed_of_a_drawn_market():
    sys.path.insert(0, str(ROOT / "benchmark"))
    try:
        runner = importlib.import_module("runner")
    finally:
        sys.path.remove(str(ROOT / "benchmark"))
    markets = ("sp500", "shuffled:sp500", "synthetic:noise")
    jobs = runner.plan(runner.Args(scripts=("baselines",), markets=markets, seeds=(1, 2)))
    assert [(job.market, job.seed) for job in jobs] == [
        ("sp500", 1), ("shuffled:sp500", 1), ("shuffled:sp500", 2), ("synthetic:noise", 1), ("synthetic:noise", 2),
    ]  # fmt: skip


# --- environments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kind_of_env", [LeadLagData, PortfolioData])
@pytest.mark.parametrize("name", ["synthetic:leadlag:bars=400:train=2:val=1:test=2", "ragged"])
def test_environments_step_over_them(name, kind, kind_of_env):
    if name == "ragged":
        panel, config = resampled(f"{kind}:ragged", ragged_panel(0, bars=400, symbols=8), 1), TINY
    else:
        panel, config = load_market(f"{kind}:{name}", 1), replace(CONFIG, min_symbols=3)
    data = kind_of_env(panel, config) if kind_of_env is LeadLagData else kind_of_env(panel)
    for split in ("train", "test"):
        env = make_env(data, 4, split=panel.split()[split], episode_length=25)
        log = rollout(env, random_actions(env, 60))
        assert all(np.isfinite(log[key]).all() for key in ("obs", "reward", "final_obs"))
        assert log["truncated"].sum() >= 8 and np.abs(log["reward"]).max() > 0


def test_default_settings_serve_the_bundled_prices():
    for kind in ("shuffled", "bootstrap:train=1:val=1:paths=1", "crossed"):
        panel = load_market(f"{kind}:sp500", 1, start="2012")
        for env in (make_env(LeadLagData(panel, LeadLagConfig())), make_env(PortfolioData(panel))):
            env.reset(seed=0)
            assert np.isfinite(env.step(random_actions(env, 1)[0])[1]).all()


# --- errors

ERRORS = {
    "shuffled:block=3:sp500": ("--market shuffled:block=3:sp500", "unknown option 'block=3'", "expected none"),
    "bootstrap:blok=3:sp500": ("--market", "'blok=3'", "block", "bars", "paths", "train_fraction"),
    "bootstrap:block=:sp500": ("--market", "block=''", "expected float"),
    "bootstrap:paths=2.5:sp500": ("--market", "paths='2.5'", "expected int"),
    "bootstrap:block=0.5:sp500": ("--market", "block=0.5: expected at least 1"),
    "bootstrap:block=nan:sp500": ("--market", "block=nan: expected at least 1"),
    "bootstrap:train=0:sp500": ("--market", "train=0: expected at least 1"),
    "bootstrap:val=0:sp500": ("--market", "val=0: expected at least 1"),
    "bootstrap:paths=-1:sp500": ("--market", "paths=-1: expected at least 1"),
    "bootstrap:bars=1:sp500": ("--market", "bars=1: expected at least 2, or 0"),
    "bootstrap:bars=-2:sp500": ("--market", "bars=-2: expected at least 2, or 0"),
    "crossed:block=3:sp500": ("--market", "'block=3'", "embargo", "train_fraction", "val_fraction"),
    "shuffled:": ("--market shuffled:", "no market", "shuffled:sp500"),
    "bootstrap:block=5": ("--market bootstrap:block=5", "no market", "bootstrap:block=5:sp500"),
    "bootstrap:block=5:": ("--market bootstrap:block=5:", "no market", "such as bootstrap:block=5:sp500"),
    "crossed:nowhere": ("'nowhere'", "accepted", "sp500"),
    "shuffled:synthetic:nothing": ("synthetic:nothing", "unknown synthetic market"),
    "nowhere": ("shuffled:<market>", "bootstrap[:key=value...]:<market>", "crossed[:key=value...]:<market>"),
    "shuffled:year=2020/prices.csv": ("year=2020/prices.csv", "no such file"),
    "shuffled:./year=2020": ("./year=2020", "accepted"),
    r"shuffled:C:\data\year=2020.csv": (r"C:\data\year=2020.csv: no such file",),
}


@pytest.mark.parametrize("spec", ERRORS)
def test_what_is_wrong_with_a_specification_is_said(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PanelError) as error:
        load_market(spec)
    message = str(error.value)
    assert not [part for part in ERRORS[spec] if part not in message], message


@pytest.mark.parametrize(
    "spec, panel, expected",
    [
        ("crossed:x", closes(range(1, 40)), "crossed:x: one symbol, 'A', expected at least 2"),
        ("crossed:train_fraction=0.9:x", closes(range(1, 40), range(1, 40)), "crossed:*: split(train=0.9, val=0.2)*sum < 1"),
        ("bootstrap:embargo=-1:x", closes(range(1, 40)), "bootstrap:embargo=-1:x: split(embargo=-1), expected >= 0*"),
        ("bootstrap:x", closes(range(1, 10)), "split 'train': too few bars*"),
        ("bootstrap:embargo=0:x", closes([1, 2, 3, 4, 5]), "split 'val': too few bars*"),
        ("bootstrap:embargo=0:train_fraction=0.2:val_fraction=0.4:x", closes(range(1, 11)),
         "bootstrap:*: too few bars: 1 with a return to draw train bars from, expected at least 2"),
        ("bootstrap:x",
         closes(range(1, 31), segments=np.array([0, 10, 12, 20]), segment_split=("train", *SPLIT_NAMES)),
         "bootstrap:x: too few bars: 1 with a return to draw train bars from"),
        ("bootstrap:bars=90000:x", closes(range(1, 300)), "bootstrap:*: bars=90000 from 2020-01-02 end after 2262-01-01*"),
        ("bootstrap:bars=10000000000:x", closes(range(1, 300)), "bootstrap:*: bars=10000000000 from 2020-01-02 end after*"),
        ("bootstrap:bars=9000:x", closes(2.0 ** np.arange(60)), "'A', panel row 1017 *: close is inf, expected a finite"),
        ("shuffled:x", closes([1, 2, 3], [np.nan, np.nan, 5]), "shuffled:x: symbol 'B' has no bar*"),
        ("bootstrap:x", replace(make_panel(NOISE), segment_split=None), "bootstrap:x: split needs one price history*"),
    ],
)  # fmt: skip
def test_what_a_source_lacks_is_said(spec, panel, expected):
    with pytest.raises(PanelError) as error:
        resampled(spec, panel)
    missing = [part for part in expected.split("*") if part not in str(error.value)]
    assert not missing, str(error.value)


def test_bars_just_before_the_end_of_time_are_made():
    made = resampled("bootstrap:bars=88000:train=1:val=1:paths=1:x", closes([1, 2] * 150), 0)
    assert made.timestamps.max() < np.datetime64("2262-01-01") and made.timestamps.max() > np.datetime64("2260-01-01")
