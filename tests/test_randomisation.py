"""Keys that every history draws for itself: from what was asked for, without moving anything else, and shown everywhere."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import CONFIG, assert_same_bits, make_env, random_actions
from scipy.stats import kstest

from envs import references
from envs.leadlag import LeadLagEnv
from envs.leadlag_tables import LeadLagData
from envs.ledger import backtest_weights
from envs.panel import SPLIT_NAMES, PanelError
from envs.randomisation import Drawn, drawn_or_number
from envs.synthetic import MARKETS, load_market, make_panel
from envs.trading import TradingVectorEnv

MANY = "synthetic:leadlag:bars=300:train=200:val=1:test=1:assets=4:leaders=1:followers=1"
SMALL = "synthetic:leadlag:bars=400:train=3:val=1:test=2:assets=6:leaders=2:followers=2:beta_fast=0.5..2"


def drawn(kind, text, count=4000):
    source, rng = drawn_or_number("key", kind, text), np.random.default_rng(0)
    return np.array([source.draw(rng) for _ in range(count)])


# --- distributions


def test_uniform_and_log_uniform_are_as_described():
    assert kstest((drawn(float, "-0.5..1.5") + 0.5) / 2, "uniform").pvalue > 0.01
    assert kstest((np.log10(drawn(float, "1e-3~1e-1")) + 3) / 2, "uniform").pvalue > 0.01


def test_whole_numbers_stay_whole_and_include_both_ends():
    uniform = drawn(int, "2..5")
    values, counts = np.unique(uniform, return_counts=True)
    assert uniform.dtype.kind == "i" and values.tolist() == [2, 3, 4, 5]
    assert np.abs(counts / 4000 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)
    logarithmic = drawn(int, "1~7")
    values, counts = np.unique(logarithmic, return_counts=True)
    assert logarithmic.dtype.kind == "i" and values.tolist() == [1, 2, 3, 4, 5, 6, 7]
    expected = np.log1p(1 / values) / np.log(8)  # n stands for the logs from n to n + 1
    assert np.abs(counts / 4000 - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_the_upper_end_is_not_exceeded_by_rounding():
    class Last:
        def uniform(self, low, high):
            return high  # which a generator's rounding may return

    assert Drawn(int, "~", (2, 5)).draw(Last()) == 5


def test_alternatives_are_equally_likely_and_of_the_type_of_the_key():
    values, counts = np.unique(drawn(float, "0.1|3|-2"), return_counts=True)
    assert values.tolist() == [-2.0, 0.1, 3.0] and np.abs(counts / 4000 - 1 / 3).max() < 0.03
    assert {type(v) for v in drawn_or_number("lag", int, "1|2").values} == {int}


def test_a_number_is_a_number():
    assert drawn_or_number("vol", float, "1e-2") == 0.01 and drawn_or_number("bars", int, "300") == 300


# --- panels


def test_histories_of_a_market_without_ranges_come_from_the_same_numbers_as_ever():
    """Each from [seed, split, j]: log returns from the market's own draw, the reach of bars from [seed, split, j, 1]."""
    panel, config = make_panel(MANY, 6), replace(MARKETS["leadlag"](), bars=300, assets=4, leaders=1, followers=1)
    assert panel.parameters == {}
    for number, (split, j) in enumerate([*((0, j) for j in range(200)), (1, 0), (2, 0)]):
        overnight, intraday, truth, _ = config.draw(np.random.default_rng([6, split, j]))
        rows = slice(300 * number, 300 * number + 300)
        np.testing.assert_allclose(panel.close[rows], 100 * np.exp(np.cumsum(overnight + intraday, axis=0)), rtol=1e-12)
        assert_same_bits(panel.hidden["regime"][rows], truth["regime"])
    reach = np.random.default_rng([6, 2, 0, 1]).exponential(0.25, (2, 300, 4)) * np.abs(intraday)
    body = panel.open[rows], panel.close[rows]
    np.testing.assert_allclose(np.log(panel.high[rows] / np.maximum(*body)), reach[0], atol=1e-12)
    np.testing.assert_allclose(np.log(np.minimum(*body) / panel.low[rows]), reach[1], atol=1e-12)


@pytest.mark.parametrize("market, key, value", [("leadlag", "beta_fast", "0.6"), ("merton", "drift", "0.006")])
def test_what_is_drawn_does_not_move_what_happens(market, key, value):
    """Of alternatives that are all the same, the histories are those of the number itself."""
    spec = f"synthetic:{market}:bars=300:train=2:val=1:test=1:{key}={value}"
    fixed, ranged = make_panel(spec, 3), make_panel(f"{spec}|{value}", 3)
    assert fixed.sha256 == ranged.sha256 and list(ranged.parameters) == [key]
    for name, truth in fixed.hidden.items():
        assert_same_bits(ranged.hidden[name], truth)


def test_what_is_drawn_has_random_numbers_of_its_own(monkeypatch):
    """Not those of the prices, of the reach of bars, or of a prefix; a seed sequence reads missing entries as zeros."""
    keys, original = [], np.random.default_rng

    def record(key):
        keys.append((*key, *[0] * (6 - len(key))))
        return original(key)

    monkeypatch.setattr(np.random, "default_rng", record)
    load_market("shuffled:bootstrap:train=2:val=1:paths=1:synthetic:noise:bars=300:train=2:val=1:test=1:vol=0.01..0.02", 1)
    assert len(keys) == 3 * 4 + 4 + 4 and len(set(keys)) == len(keys)


def test_every_history_has_the_parameters_that_it_says():
    """vol shows in the prices of the history, the drift in its truth; whole numbers arrive as such."""
    panel = make_panel("synthetic:merton:bars=3000:train=20:val=2:test=3:vol=0.01~0.3:drift=-0.01..0.01", 2)
    assert list(panel.parameters) == ["drift", "vol"] and len(set(panel.parameters["vol"])) == 25
    for j, start in enumerate(panel.segments):
        returns = np.diff(np.log(panel.close[start : start + 3000, 0]))
        assert returns.std() == pytest.approx(panel.parameters["vol"][j], rel=0.08)
        assert (panel.hidden["expected_return"][start : start + 3000] == panel.parameters["drift"][j]).all()
    lagged = make_panel("synthetic:leadlag:bars=300:train=8:val=1:test=1:lag=1..3", 2)
    assert lagged.parameters["lag"].dtype == np.float64 and set(lagged.parameters["lag"]) == {1, 2, 3}


def test_parameters_depend_on_seed_split_and_history_alone():
    few, many, other = (
        make_panel(f"synthetic:noise:bars=300:assets=1:train={n}:val={n}:test={n}:vol=0.01..0.02", seed)
        for n, seed in ((1, 5), (4, 5), (4, 6))
    )
    labels = np.array(many.segment_split)
    for split in SPLIT_NAMES:
        assert few.parameters["vol"][np.array(few.segment_split) == split] == many.parameters["vol"][labels == split][0]
    values = np.concatenate([many.parameters["vol"], other.parameters["vol"]])
    assert len(np.unique(values)) == 24
    assert_same_bits(many.parameters["vol"], make_panel(many.name, 5).parameters["vol"])


def test_parameters_follow_histories_into_cuts():
    panel = make_panel("synthetic:noise:bars=300:assets=4:train=2:val=1:test=2:vol=0.01..0.02", 1)
    vol = panel.parameters["vol"]
    assert_same_bits(panel.select(["S01"]).parameters["vol"], vol)
    assert_same_bits(panel.resample("1W").parameters["vol"], vol)
    assert_same_bits(panel.parameters_at(np.array([0, 299, 300, 1499]))["vol"], vol[[0, 0, 1, 4]])
    for prefix, kept in (("shuffled", True), ("crossed", True), ("bootstrap:train=3:val=1:paths=1", False)):
        made = load_market(f"{prefix}:{panel.name}", 1)
        if kept:
            assert_same_bits(made.parameters["vol"], vol)
        else:
            assert made.parameters == {}
    longer = replace(panel, timestamps=panel.timestamps + np.repeat(np.arange(5), 300) * np.timedelta64(3650, "D"))
    assert_same_bits(longer.select(start="2022").parameters["vol"], vol[3:])  # three of five histories end before


# --- what is shown of them


@pytest.fixture(scope="module")
def data():
    return LeadLagData(make_panel(SMALL, 4), CONFIG)


def test_infos_hold_the_parameters_of_the_present_episode(data):
    env = make_env(data, 40, split="train", episode_length=20)
    _, infos = env.reset(seed=0)
    seen = set()
    for actions in random_actions(env, 45):
        expected = data.panel.parameters["beta_fast"][infos["range"]]
        assert list(infos["parameters"]) == ["beta_fast"]
        assert_same_bits(infos["parameters"]["beta_fast"], expected)
        seen |= set(expected)
        infos = env.step(actions)[-1]
    assert len(seen) == 3
    assert "parameters" not in make_env(LeadLagData(make_panel(SMALL.replace("0.5..2", "2"), 4), CONFIG)).reset(seed=0)[1]


def test_the_last_bar_of_a_single_env_belongs_to_the_old_episode(data):
    env = LeadLagEnv(data=data, split="train", episode_length=5)
    _, info = env.reset(seed=1)
    changed = 0
    for _ in range(20):
        now, over = info["parameters"]["beta_fast"], False
        while not over:
            _, _, _, over, info = env.step(int(np.flatnonzero(env.action_masks())[0]))
            assert info["parameters"]["beta_fast"] == now
        _, info = env.reset()
        changed += info["parameters"]["beta_fast"] != now
    assert changed > 5


def test_ledgers_have_a_column_of_each_parameter(data):
    split = data.panel.split()["test"]
    own = data.panel.parameters["beta_fast"][-2:]
    policy = references.hold(np.zeros(data.panel.num_bars, np.int64))
    weights = backtest_weights(
        data.panel, data.execution, data.costs.rates, split, np.zeros(data.panel.close.shape), data.market(split).starts
    )
    for frame in (references.run(data, split, policy), weights):
        assert frame.columns[-1] == "parameter_beta_fast"
        assert_same_bits(frame["parameter_beta_fast"].to_numpy(), own[frame["market"]])


def test_trading_shows_them_too():
    env = TradingVectorEnv(6, data=SMALL, market_seed=4, split="test", episode_length=0, random_start=False)
    _, infos = env.reset(seed=0)
    own = env.panel.parameters["beta_fast"][env.panel.segment_of_row[infos["row"]]]
    assert_same_bits(infos["parameters"]["beta_fast"], own)


# --- what is wrong is said

ERRORS = {
    "assets=4..6": "assets='4..6': expected int, the same in all histories",
    "bars=300|400": "bars='300|400': expected int, the same in all histories",
    "train=1~3": "train='1~3': expected int, the same in all histories",
    "vol=0.02..0.01": "vol='0.02..0.01': expected low..high with low below high",
    "vol=0.02..": "vol='0.02..': expected float",
    "vol=0.01..0.02..0.03": "vol='0.01..0.02..0.03': expected low..high with low below high",
    "vol=0~1": "vol='0~1': expected low~high with low above 0",
    "vol=1~": "vol='1~': expected float",
    "vol=inf|1": "vol='inf|1': expected finite numbers",
    "vol=1|": "vol='1|': expected float",
    "vol=-2..-1": "vol=-1.",
    "volume=1..2": "unknown option 'volume=1..2'",
    "test=0": "test=0: expected at least 1",
    "test=0:vol=1..2": "test=0: expected at least 1",
}


@pytest.mark.parametrize("option", ERRORS)
def test_what_is_wrong_with_a_range_is_said(option):
    spec = f"synthetic:noise:{option}"
    with pytest.raises(PanelError) as error:
        make_panel(spec)
    assert str(error.value).startswith(f"--market {spec}: ") and ERRORS[option] in str(error.value)
    assert str(error.value).count("--market") == 1


@pytest.mark.parametrize("values", (np.zeros(3), np.zeros(5, np.float32), np.full(5, np.inf), np.zeros((5, 1))))
def test_a_panel_refuses_parameters_that_are_not_one_number_per_history(values):
    panel = make_panel("synthetic:noise:bars=300:train=2:val=1:test=2:assets=1")
    with pytest.raises(PanelError, match=r"parameter 'x' is .*, expected float64 \(5,\), finite or NaN"):
        replace(panel, parameters={"x": values})
