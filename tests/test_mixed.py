"""Training on real and synthetic histories: in the stated share, told apart, and tried and scored on the real bars alone."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import CONFIG, TRADING, assert_same_bits, make_env, ragged_with_series, random_actions

from envs import references
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.mixed import mix
from envs.panel import Panel, PanelError
from envs.portfolio_tables import PortfolioData
from envs.synthetic import drawn_from_seed, load_market, make_panel
from envs.trading_tables import TradingConfig, TradingData

OPTIONS = "synthetic=leadlag:bars=400:train=3:leaders=2:followers=2:beta_fast=0.5..2"
TERMS = dict(train=0.5, val=0.2, embargo=7)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A file of 900 bars of six symbols, close only."""
    path = tmp_path_factory.mktemp("prices") / "real.csv"
    close = make_panel("synthetic:noise:bars=900:assets=6:train=1:val=1:test=1", 3).close[:900]
    days = np.datetime64("2010-01-01") + np.arange(900) * 2
    path.write_text("\n".join(["date,A,B,C,D,E,F", *(f"{day},{','.join(map(str, row))}" for day, row in zip(days, close))]))
    return str(path)


@pytest.fixture(scope="module")
def mixed(real):
    return load_market(f"mixed:{OPTIONS}:share=0.3:{real}", 5)


def test_validation_and_test_are_those_of_the_market_alone(real, mixed):
    """The same rows of the same history at the same cuts, features included: scores compare with those on the market itself."""
    source = load_market(real)
    assert_same_bits(mixed.close[:900], source.close)
    assert_same_bits(mixed.timestamps[:900], source.timestamps)
    alone, together = source.split(**TERMS), mixed.split(**TERMS)
    for name in ("val", "test"):
        assert_same_bits(together[name].ranges, alone[name].ranges)
    assert together["train"].ranges.tolist() == [*alone["train"].ranges.tolist(), [900, 1300], [1300, 1700], [1700, 2100]]
    tables = [LeadLagData(panel, replace(CONFIG, min_symbols=4)) for panel in (source, mixed)]
    policy = references.hold(np.full(mixed.num_bars, 2))
    frames = [references.run(data, alone["test"], policy) for data in tables]
    assert_same_bits(frames[0]["equity"].to_numpy(), frames[1]["equity"].to_numpy())


def test_synthetic_histories_look_like_the_market(real, mixed):
    """Symbols, fields and bar lengths; prices are those of the synthetic market with as many assets, on numbers of its own."""
    assert mixed.symbols == tuple("ABCDEF") and list(mixed.fields) == ["close"] and mixed.hidden == {}
    assert mixed.segments.tolist() == [0, 900, 1300, 1700] and mixed.segment_split == (None, "train", "train", "train")
    assert (np.diff(mixed.timestamps[900:1300]) == np.timedelta64(2, "D")).all()
    spec = "synthetic:leadlag:bars=400:train=3:leaders=2:followers=2:beta_fast=0.5..2:assets=6"
    same = make_panel(spec, 5)
    assert not np.isin(mixed.close[900:], same.close).any(), "a synthetic source would have the same histories"
    assert load_market(mixed.name, 5).sha256 == mixed.sha256 != load_market(mixed.name, 6).sha256
    assert_same_bits(mixed.parameters["synthetic"], np.array([0.0, 1.0, 1.0, 1.0]))
    assert np.isnan(mixed.parameters["beta_fast"][0]) and len(set(mixed.parameters["beta_fast"][1:])) == 3
    assert drawn_from_seed(mixed.name) and mixed.name.startswith("mixed:")


def test_joined_by_hand():
    """Labelled sources keep their labels, with weights by bars; series are unknown on synthetic bars; only training counts."""
    source = replace(
        make_panel("synthetic:noise:bars=300:assets=2:train=2:val=1:test=1", 1), volume=None,
        extras={"own": np.ones((1200, 2)), "all": np.ones(1200)}, parameters={"x": np.arange(4.0)},
    )  # fmt: skip
    other = make_panel("synthetic:merton:bars=400:assets=2:train=2:val=1:test=1:drift=0.001|0.002", 2)
    made = mix("mixed:hand", source, other, 0.25)
    assert made.segment_split == ("train", "train", "val", "test", "train", "train")
    assert made.segments.tolist() == [0, 300, 600, 900, 1200, 1600] and made.num_bars == 2000
    assert list(made.fields) == ["open", "high", "low", "close"]
    for field, values in made.fields.items():
        assert_same_bits(values[1200:], other.fields[field][:800])
    assert (made.extras["own"][:1200] == 1).all() and np.isnan(made.extras["own"][1200:]).all()
    assert made.extras["all"].shape == (2000,) and np.isnan(made.extras["all"][1200:]).all()
    assert_same_bits(made.parameters["x"], np.array([0, 1, 2, 3, np.nan, np.nan]))
    assert_same_bits(made.parameters["drift"][4:], other.parameters["drift"][:2])
    assert made.split()["train"].weights == pytest.approx([0.375, 0.375, 0.125, 0.125])
    assert_same_bits(made.split()["val"].ranges, source.split()["val"].ranges)


@pytest.mark.parametrize("share", (0.1, 0.5, 0.8))
@pytest.mark.parametrize("kind", (LeadLagData, PortfolioData, TradingData))
def test_the_share_of_episodes_is_as_stated(real, share, kind):
    """Whatever the lengths of histories, warm-ups and episodes; all synthetic histories and all windows come up."""
    panel = load_market(f"mixed:{OPTIONS}:share={share}:{real}", 5)
    config = {LeadLagData: (replace(CONFIG, min_symbols=4),), TradingData: (TradingConfig(**TRADING),)}.get(kind, ())
    env = make_env(kind(panel, *config), 600, split=panel.split(**TERMS)["train"], episode_length=40)
    rows = np.concatenate([env.reset(seed=600 * k)[1]["row"] for k in range(5)])
    made = panel.segment_of_row[rows]
    assert (made > 0).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(rows)))
    within = np.bincount(made, minlength=4)[1:] / (made > 0).sum()
    assert np.abs(within - 1 / 3).max() < 4 * np.sqrt(2 / 9 / (made > 0).sum())
    for k, (start, stop) in enumerate(env.split.ranges):
        own = rows[made == k]
        spread = np.quantile(own, [0, 0.5, 1])
        first, last = spread[0], stop - 1 - 40
        assert last - own.max() < 30 and own.max() <= last and start <= first < start + 130
        assert spread[1] == pytest.approx((first + last) / 2, abs=0.2 * (last - first))


def test_infos_and_ledgers_tell_synthetic_from_real(mixed):
    data = LeadLagData(mixed, replace(CONFIG, min_symbols=4))
    split = mixed.split(**TERMS)
    env = make_env(data, 50, split=split["train"], episode_length=10)
    infos = env.reset(seed=0)[1]
    for actions in random_actions(env, 25):
        assert_same_bits(infos["parameters"]["synthetic"], (infos["row"] >= 900).astype(float))
        infos = env.step(actions)[-1]
    policy = references.hold(np.zeros(mixed.num_bars, np.int64))
    frame = references.run(data, split["train"], policy)
    assert frame.groupby("market")["parameter_synthetic"].unique().map(list).tolist() == [[0], [1], [1], [1]]
    frame = references.run(data, split["test"], policy)
    assert set(frame["parameter_synthetic"]) == {0} and frame["parameter_beta_fast"].isna().all()


def test_prefixes_nest(real):
    inner = load_market(f"mixed:{OPTIONS}:shuffled:{real}", 2)
    assert not np.array_equal(inner.close[:900], load_market(real).close) and inner.segment_split[0] is None
    outer = load_market(f"shuffled:mixed:{OPTIONS}:{real}", 2)
    assert outer.segment_split == inner.segment_split and outer.split()["train"].weights is not None
    again = load_market(f"mixed:{OPTIONS}:mixed:{OPTIONS}:{real}", 2)
    assert again.parameters["synthetic"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert again.split()["train"].weights == pytest.approx([0.25, *[0.5 / 6] * 3, *[0.5 / 3] * 3])
    assert not np.isin(again.close[900:2100], again.close[2100:]).any()
    made = load_market(f"bootstrap:train=2:val=1:paths=1:mixed:{OPTIONS}:{real}", 2)
    assert made.parameters == {} and made.split()["train"].weights is None
    crossed = load_market(f"crossed:mixed:{OPTIONS}:{real}", 2)
    assert crossed.parameters["synthetic"].tolist() == [0, 1, 1, 1, 0, 0] and len(crossed.split()["train"].weights) == 4


def test_selection_reaches_the_market(real):
    made = load_market(f"mixed:{OPTIONS}:{real}", 2, symbols=("B", "C", "D", "F"), start="2011")
    assert made.symbols == ("B", "C", "D", "F") and made.timestamps[0] == np.datetime64("2011-01-02")


def test_series_of_the_market_are_kept():
    source = ragged_with_series()
    made = mix("mixed:x", source, make_panel(f"synthetic:noise:bars=300:train=1:assets={source.num_symbols}"), 0.5)
    assert list(made.extras) == list(source.extras)
    data = PortfolioData(made)
    env = make_env(data, 8, split=made.split()["train"], episode_length=5)
    env.reset(seed=0)
    assert all(np.isfinite(env.step(a)[0]).all() for a in random_actions(env, 12))


def test_default_settings_serve_the_bundled_prices():
    panel = load_market("mixed:bars=600:train=2:sp500", 1, start="2012")
    assert panel.num_symbols == 20
    for data in (LeadLagData(panel, LeadLagConfig()), PortfolioData(panel)):
        env = make_env(data, split=panel.split()["train"])
        env.reset(seed=0)
        assert np.isfinite(env.step(random_actions(env, 1)[0])[1]).all()


ERRORS = {
    "mixed:share=0:{}": "share=0.0: expected a fraction in (0, 1)",
    "mixed:share=1.5:{}": "share=1.5: expected a fraction in (0, 1)",
    "mixed:share=much:{}": "share='much': expected float",
    "mixed:synthetic=nothing:{}": "unknown synthetic market 'nothing'; expected one of",
    "mixed:beta=1:{}": "unknown option 'beta=1'; expected key=value with key one of",
    "mixed:assets=4:{}": "assets=4: expected none of ('assets', 'val', 'test')",
    "mixed:test=4:{}": "test=4: expected none of ('assets', 'val', 'test')",
    "mixed:train=0:{}": "train=0: expected at least 1",
    "mixed:synthetic=black-scholes:{}": "assets=6: expected 1",
    "mixed:share=0.5": "no market to draw from, expected one at the end, such as mixed:share=0.5:sp500",
}


@pytest.mark.parametrize("spec", ERRORS)
def test_what_is_wrong_with_a_specification_is_said(spec, real):
    spec = spec.format(real)
    with pytest.raises(PanelError) as error:
        load_market(spec)
    assert ERRORS[spec.replace(real, "{}")] in str(error.value) and str(error.value).startswith(f"--market {spec}")


def test_an_unknown_market_names_the_prefix_among_what_is_accepted():
    with pytest.raises(PanelError, match=r"'nowhere'.*'mixed\[:key=value...\]:<market>'"):
        load_market("mixed:nowhere")


def test_a_source_of_several_histories_without_labels_is_refused(real):
    times = np.tile(np.arange("2020-01-01", "2020-04-10", dtype="datetime64[D]").astype("datetime64[ns]"), 2)
    source = Panel("two", times, ("A", "B"), np.ones((200, 2)), segments=np.array([0, 100]))
    with pytest.raises(PanelError, match="segment_split is .*, expected 3 of .*, or one None"):
        mix("mixed:two", source, make_panel("synthetic:noise:bars=300:train=1:assets=2"), 0.5)
