"""Rules order in the agents' environments what their tables say; what they and ppo do there becomes one dataset, or none."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import baselines
import behaviours
import collect
import numpy as np
import pandas as pd
import pytest
import rules
from conftest import ROOT, SMALL, assert_same_bits, ragged_panel, tampered, whole

from envs.dataset import TRANSITION, Dataset
from envs.dataset_writer import merge
from envs.leadlag import LeadLagVectorEnv
from envs.leadlag_tables import LeadLagConfig
from envs.portfolio import LARGEST, PortfolioVectorEnv
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import make_panel
from envs.task import Task

GP = "synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2"
RULES = rules.RuleConfig(window=50, refit_every=20, momentum_window=30, kelly_t=0.5)
TERMS = {
    "long only": {},
    "no cash": {"cash": False},
    "capped, with leverage": {"asset_cap": 0.15, "leverage": True, "gross": 2.0},
    "changes": {"orders": "change"},
    "long/short": {"constraints": "long_short", "gross": 1.5, "asset_cap": 0.4},
    "long/short changes": {"constraints": "long_short", "orders": "change", "gross": 3.0, "scale": 0.3, "leverage": True},
}
WAIT = 60.0  # seconds


def setting(panel, config=RULES, **terms):
    return rules.Setting(panel, panel.split(), PortfolioConfig(**terms), 1, config)


@pytest.fixture(scope="module")
def small():
    return setting(make_panel(SMALL, seed=3))


class FixedDraws:
    """A generator whose normal numbers are given."""

    def __init__(self, numbers):
        self.numbers = numbers

    def standard_normal(self, shape):
        return np.broadcast_to(self.numbers, shape)


def orders(data, act, steps, split, **options):
    """Rows (steps, n), weights held, and weights that Portfolio-v0 orders given an actor's actions (steps, n, N)."""
    env = PortfolioVectorEnv(3, data=data, split=split, episode_length=25, **options)
    (obs, infos), out = env.reset(seed=5), []
    for _ in range(steps):
        rows, held = infos["row"], obs[:, data.layout["weights"]].astype(np.float64)
        actions, _ = act(obs, None, rows)
        assert actions.dtype == np.float32 and env.action_space.contains(actions)
        obs, _, _, _, infos = env.step(actions)
        out.append((rows, held, infos["choice"]))
    return tuple(np.stack(part) for part in zip(*out))


@pytest.mark.parametrize("terms", TERMS)
def test_a_rule_orders_in_the_market_the_weights_of_its_table(terms):
    """By hand: what is ordered, cut to the caps; the weight held where nothing is, or can be; in cash, the last order."""
    panel = ragged_panel(1, bars=240)
    if terms == "no cash":  # weights must add up to 1 there: a table that does, of symbols that are always present
        panel = make_panel(SMALL, seed=3)
    s = setting(panel, costs="zero", **TERMS[terms])
    rng, c = np.random.default_rng(0), s.portfolio
    if terms == "no cash":
        targets = rng.dirichlet(np.ones(6), panel.num_bars)
        split = s.splits["train"]
    else:
        targets = rng.uniform(-0.05, 0.2, panel.close.shape) * rng.choice([-1, 1, 1], panel.close.shape)
        targets[rng.random(panel.num_bars) < 0.5] = np.nan
        targets[rng.random(panel.close.shape) < 0.1] = np.nan
        split = whole(panel)
    rows, held, ordered = orders(s.data, behaviours.weights_actor(s.data, targets, 0.0, rng), 120, split)
    low = 0.0 if c.constraints == "long_only" else -c.asset_cap
    last = pd.DataFrame(targets).ffill().to_numpy()  # one history, or no NaN
    began, kept, checked = 0, 0, 0
    for row, have, found in zip(rows.ravel(), held.reshape(-1, 6), ordered.reshape(-1, 6)):
        wanted = targets[row] if have.any() else last[row]
        expected = np.where(np.isnan(wanted), have, wanted).clip(low, c.asset_cap)
        expected = np.where(panel.present[row], expected, have)
        if c.constraints == "long_only" and expected.sum() > 1.0 + 1e-9:
            continue  # drift and what cannot be sold leave no room
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
        checked += 1
        began += (not have.any()) and np.isnan(targets[row]).any() and expected.any()
        kept += have.any() and np.isnan(wanted).all()
    assert checked > 300
    assert terms == "no cash" or (began > 3 and kept > 20)


@pytest.mark.parametrize("constraints", ("long_only", "long_short"))
@pytest.mark.parametrize("name", ("top-k", "momentum", "kelly-lite", "buy-and-hold"))
def test_the_rules_themselves(name, constraints, small):
    s = setting(small.panel, constraints=constraints)
    targets = rules.RULES[name](s)
    split = s.splits["train"]
    rows, held, ordered = orders(s.data, behaviours.weights_actor(s.data, targets, 0.0, np.random.default_rng(0)), 60, split)
    wanted = targets[rows]
    clear = ~np.isnan(wanted).any(axis=2) & (np.abs(held).sum(axis=2) > 0)
    if constraints == "long_only":
        wanted = np.maximum(wanted, 0.0)
    np.testing.assert_allclose(ordered[clear], wanted[clear], rtol=0, atol=2e-6)
    assert np.abs(ordered).sum() > 1.0 and (clear.any() or name == "buy-and-hold")


def test_what_no_score_reaches_is_left_to_cash():
    s = setting(make_panel(SMALL, seed=3), costs="zero", scale=0.03)
    targets = np.zeros(s.panel.close.shape)
    targets[:, 2] = 0.9
    act = behaviours.weights_actor(s.data, targets, 0.0, np.random.default_rng(0))
    _, _, ordered = orders(s.data, act, 3, s.splits["train"])
    excess = 1.0 - 2 * LARGEST * 0.03  # beyond the largest scores of the symbol and of cash: shared by all seven
    expected = np.full(6, excess / 7) + np.array([0, 0, LARGEST * 0.03, 0, 0, 0])
    np.testing.assert_allclose(ordered, np.broadcast_to(expected, ordered.shape), atol=2e-6)


def test_log_probabilities_of_scores_are_those_of_the_action_that_is_logged():
    mean = np.array([[0.5, -9.9], [0.0, 0.0]])
    actions, logprob = behaviours.explore(mean, 0.2, FixedDraws([[1.0, -2.0]]))
    np.testing.assert_allclose(actions, [[0.7, -10.0], [0.2, -0.4]], rtol=1e-6)
    density = np.log(1 / (0.2 * np.sqrt(2 * np.pi))) * 2 - 0.5 * np.array([1.0 + 0.5**2, 1.0 + 4.0])  # -9.9 and the clipped -10
    np.testing.assert_allclose(logprob, density, rtol=1e-5)
    still, none = behaviours.explore(mean, 0.0, FixedDraws([[1.0, -2.0]]))
    assert none is None and still.tolist() == mean.astype(np.float32).tolist()


@pytest.mark.parametrize("orders", ["target", "change"])
def test_random_weights(small, orders):
    """The weights asked for are the same in both kinds of orders, whatever is held."""
    data = PortfolioData(small.panel, replace(small.portfolio, orders=orders, scale=0.5))
    obs = np.random.default_rng(1).normal(scale=0.3, size=(4000, data.observation_size))
    held, size = obs[:, data.layout["weights"]], small.panel.num_symbols + 1
    actions, logprob = behaviours.random_actor(data, size, np.random.default_rng(0))(obs, None, None)
    wanted = actions.astype(np.float64)
    wanted[:, :-1] += held / 0.5 if orders == "change" else 0.0
    assert actions.shape == (4000, size) and abs(wanted.mean()) < 0.02 and wanted.std() == pytest.approx(0.5, rel=0.02)
    np.testing.assert_allclose(logprob, (-2.0 * wanted**2).sum(1) - size * np.log(0.5 * np.sqrt(2 * np.pi)), atol=1e-4)


def lookbacks(data, act, steps, split):
    """Masks (steps, n, K), rows (steps, n), actions and the lookbacks in bars that LeadLag-v0 made of them (steps, n)."""
    env = LeadLagVectorEnv(4, data=data, split=split, episode_length=100)
    (obs, infos), out = env.reset(seed=5), []
    for _ in range(steps):
        mask, rows = infos["action_mask"], infos["row"]
        actions, logprob = act(obs, mask, rows)
        obs, _, _, _, infos = env.step(actions)
        out.append((mask, rows, actions, infos["lookback"], logprob))
    return tuple(np.stack(part) for part in zip(*out))


@pytest.mark.parametrize("name", [name for name in rules.CHOICES if name != "lead-lag-random"])
def test_a_lookback_is_the_nearest_of_the_markets_own(name, small):
    data = small.leadlag_market
    assert data.config == LeadLagConfig() and data.lookbacks.tolist() == [5, 9, 15, 27, 47, 82, 143, 250]
    grid, near = data.lookbacks, {10: 9, 30: 27, 90: 82}
    choice = rules.CHOICES[name](small, data)
    mask, rows, actions, found, logprob = lookbacks(
        data, behaviours.lookback_actor(choice, 0.0, np.random.default_rng(0)), 300, small.splits["train"]
    )
    if name == "oracle-regime":
        regimes, wanted = small.panel.hidden["regime"][rows], grid[choice[rows]]
        late = rows - small.panel.segments[small.panel.segment_of_row[rows]] > 250  # whatever it wants is allowed
        of_regime = [set(wanted[late & (regimes == regime)]) for regime in np.unique(regimes)]
        assert all(len(one) == 1 for one in of_regime) and len(set.union(*of_regime)) > 1
    elif name in ("lead-lag-volatility", "lead-lag-correlation"):
        own = rules.CHOICES[name](small, small.leadlag)  # of the baseline, over its three
        wanted = np.vectorize(near.get)(np.array(rules.LOOKBACKS)[own])[rows]
        assert set(np.unique(wanted)) == {9, 82}
    else:
        wanted = np.full(rows.shape, near[int(name.rpartition("-")[2])])
    allowed = mask[np.arange(300)[:, None], np.arange(4), np.searchsorted(grid, wanted)]
    assert allowed.any() and (found[allowed] == wanted[allowed]).all() and (logprob == 0.0).all()
    for here, k, want in zip(mask[~allowed], found[~allowed], wanted[~allowed]):
        below = grid[here & (grid < want)]
        assert k == (below.max() if len(below) else grid[here].min())


def test_random_lookbacks(small):
    """In the ledger one of the three, each as likely; in the market each that is allowed, with its exact probability."""
    own = np.stack([small.leadlag.targets[:, k] for k in range(3)], axis=1)
    targets = rules.RULES["lead-lag-random"](small)
    last = small.leadlag.valid.all(axis=1)
    which = (targets[:, None] == own).all(axis=2)
    assert which[last].any(axis=1).all()
    distinct = last & (np.abs(own[:, 0] - own[:, 1]).sum(axis=1) * np.abs(own[:, 1] - own[:, 2]).sum(axis=1) > 0)
    distinct &= np.abs(own[:, 0] - own[:, 2]).sum(axis=1) > 0
    np.testing.assert_allclose(which[distinct].mean(axis=0), 1 / 3, atol=0.06)
    assert_same_bits(rules.RULES["lead-lag-random"](small), targets)
    assert not np.array_equal(rules.RULES["lead-lag-random"](replace(small, seed=2)), targets)

    mask = np.tile([False, True, True, False, True], (40000, 1))
    rows, rng = np.zeros(len(mask), int), np.random.default_rng(0)
    for epsilon, expected in ((0.3, (0.1, 0.8, 0.1)), (1.0, (1 / 3, 1 / 3, 1 / 3))):
        actions, logprob = behaviours.lookback_actor(np.array([3]), epsilon, rng)(None, mask, rows)  # 3 is not allowed: 2
        for action, probability in zip((1, 2, 4), expected):
            np.testing.assert_allclose(logprob[actions == action], np.log(probability), rtol=1e-12)
            assert (actions == action).mean() == pytest.approx(probability, abs=0.01)
        assert set(actions) == {1, 2, 4}


def test_top_k_holds_the_best_of_what_has_a_history(small):
    ragged = {k: setting(ragged_panel(1, bars=240), replace(RULES, top_k=k, top_window=7)) for k in (5, 2)}
    for s, size in ((small, 1), (ragged[5], 5), (ragged[2], 2)):  # at times fewer than 5 have a history
        targets, window = rules.RULES["top-k"](s), s.config.top_window
        close = pd.DataFrame(s.panel.close)
        for a, b in zip(s.panel.segments, np.append(s.panel.segments[1:], s.panel.num_bars)):
            past = close[a:b].ffill().pct_change(window, fill_method=None).where(s.panel.present[a:b])
            for t in range(a, b):
                best = past.loc[t].dropna().sort_values().index[-size:]
                if len(best) == 0:
                    assert np.isnan(targets[t]).all()
                    continue
                expected = np.zeros(6)
                expected[best] = 1 / len(best)
                np.testing.assert_array_equal(targets[t], expected)
                assert t >= a + window
    assert window == 7 and (targets[160:, 2] == 0).all()  # delisted
    rng, t = np.random.default_rng(0), 150
    later = setting(tampered(s.panel, t, rng), s.config)
    assert_same_bits(rules.RULES["top-k"](later)[: t + 1], targets[: t + 1])
    assert not np.array_equal(rules.RULES["top-k"](later), targets, equal_nan=True)
    many = setting(make_panel(SMALL.replace("assets=6", "assets=60"), 3))
    assert np.unique(rules.RULES["top-k"](many)[300]).tolist() == [0.0, 1 / 12]
    with pytest.raises(ValueError, match="--top-k 7: expected at most the 6 symbols of panel 'ragged'"):
        rules.RULES["top-k"](setting(s.panel, replace(RULES, top_k=7)))


@pytest.mark.parametrize(
    "flag, value",
    (("log_episodes", 0), ("log_noise", -0.1), ("log_epsilon", 1.5), ("episode_length", -1), ("gamma", 1.1)),
)
def test_bad_terms_of_logging_name_the_flag(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value}: expected"):
        baselines.Args(**{flag: value})


@pytest.mark.parametrize("flag, value", (("top_k", -1), ("top_window", 0)))
def test_bad_parameters_of_top_k_name_the_flag(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value}: expected"):
        rules.RuleConfig(**{flag: value})


def log(folder, *options):
    """baselines.py in this process; its datasets by rule."""
    args = baselines.parse([*options, "--log-dataset", str(folder / "data"), "--runs-dir", str(folder / "runs")])
    assert baselines.main(args) == 0
    return {path.name: Dataset(path / "dataset.hdf5") for path in (folder / "data").iterdir()}


def content(data, *keys):
    blocks = list(data.blocks(range(len(data.terminated)), keys or TRANSITION))
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}


def test_baselines_log_what_they_do_on_the_agents_terms(tmp_path):
    names = ("random", "top-k", "kelly-lite", "closed-form", "buy-and-hold")
    short = ("--market", GP, "--log-episodes", "6", "--episode-length", "20", "--gamma", "0.8", "--seed", "4")
    found = log(tmp_path / "a", *short, "--only", *names)
    assert set(found) == {f"{name}__4" for name in names}
    windows, config = set(), baselines.KNOWN["synthetic:garleanu-pedersen"]["portfolio"]
    for name in names:
        data = found[f"{name}__4"]
        assert len(data.terminated) == 6 and data.meta["steps"] == 120 and not data.terminated.any()
        assert data.meta["gamma"] == 0.8 and data.meta["split"] == "train" and data.meta["seed"] == 4
        (behaviour,) = data.meta["behaviours"]
        assert behaviour["policy"] == name and behaviour["noise"] == (0.5 if name == "random" else 0.1)
        assert behaviour["rules"]["penalty_variance"] == 19.5
        task = Task.of(data)
        assert task.data.config == config and task.options["episode_length"] == 20 and task.risk_aversion == 40.0
        rows = content(data, "rewards", "infos/pnl", "infos/cost", "infos/behavior_logprob", "infos/timestamp", "observations")
        net = rows["infos/pnl"].astype(float) - rows["infos/cost"]
        np.testing.assert_allclose(rows["rewards"], np.log1p(net) - 19.5 * net**2, rtol=0, atol=1e-6)
        assert rows["observations"].shape[1] == task.data.observation_size
        windows.add(tuple(rows["infos/timestamp"][::20]))
    assert len(windows) == len(names)  # every behaviour sees other windows
    assert merge(tmp_path / "all" / "dataset.hdf5", [data.path for data in found.values()]) == 600
    again = log(tmp_path / "b", *short, "--only", "top-k")["top-k__4"]
    other = log(tmp_path / "c", *short, "--only", "top-k", "--log-noise", "0")["top-k__4"]
    before = content(found["top-k__4"])
    assert all(np.array_equal(values, before[key]) for key, values in content(again).items())
    assert "infos/behavior_logprob" not in other.keys and other.meta["behaviours"][0]["noise"] == 0.0
    assert 0.05 < (before["actions"] - content(other)["actions"])[::20].std() < 0.2  # at first both hold nothing
    args = baselines.parse([*short, "--only", "top-k", "--log-dataset", str(tmp_path / "b" / "data")])
    with pytest.raises(SystemExit, match="--log-dataset .*top-k__4/dataset.hdf5 exists already; expected another folder"):
        baselines.main(args)


def test_baselines_log_lookbacks(tmp_path):
    names = ("lead-lag-random", "lead-lag-90", "oracle-regime")
    short = ("--market", SMALL, "--log-episodes", "5", "--episode-length", "20", "--only", *names)
    found = log(tmp_path, *short, "--log-epsilon", "0.2", "--costs", "retail", "--fill", "next_close")
    for name in names:
        data = found[f"{name}__1"]
        assert data.meta["env_id"] == "LeadLag-v0" and data.meta["steps"] == 100
        assert data.meta["behaviours"][0]["epsilon"] == (1.0 if name == "lead-lag-random" else 0.2)
        assert not {"columns", "series", "series_lag"} & set(data.meta["task"])
        task = Task.of(data)
        assert task.data.config == LeadLagConfig(costs="retail", fill="next_close")
        rows = content(data, "actions", "infos/action_mask", "infos/behavior_logprob", "infos/pnl", "infos/cost", "rewards")
        probability, allowed = np.exp(rows["infos/behavior_logprob"].astype(float)), rows["infos/action_mask"].sum(axis=1)
        if name == "lead-lag-random":
            np.testing.assert_allclose(probability, 1 / allowed, rtol=1e-6)
        else:
            likely = probability > 0.5
            np.testing.assert_allclose(probability, likely * 0.8 + 0.2 / allowed, rtol=1e-6)
            assert 0.7 < likely[allowed > 1].mean() < 0.97
        net = rows["infos/pnl"].astype(float) - rows["infos/cost"]
        np.testing.assert_allclose(rows["rewards"], np.log1p(net), rtol=0, atol=1e-4)  # but for interest
    merge(tmp_path / "all" / "dataset.hdf5", [data.path for data in found.values()])


def test_what_agents_see_besides_prices_is_logged_too(tmp_path):
    panel, rng = ragged_panel(0, bars=240), np.random.default_rng(0)
    times = np.repeat(panel.timestamps, 6)
    frame = pd.DataFrame({"timestamp": times, "symbol": np.tile(panel.symbols, 240), "close": panel.close.ravel()})
    frame.dropna().to_csv(tmp_path / "prices.csv", index=False)
    frame.assign(forecast=rng.standard_normal(len(frame))).dropna().to_csv(tmp_path / "more.csv", index=False)
    options = ("--log-episodes", "3", "--episode-length", "20", "--embargo", "0", "--only", "equal-weight", "lead-lag-10")
    plain = log(tmp_path / "a", "--market", str(tmp_path / "prices.csv"), *options)
    more = log(tmp_path / "b", "--market", str(tmp_path / "more.csv"), *options, "--columns", "forecast")
    sizes = {name: [len(found[name].meta["observation_mean"]) for found in (plain, more)] for name in plain}
    assert np.diff(sizes["equal-weight__1"]) == 6 and np.diff(sizes["lead-lag-10__1"]) == 6
    assert Task.of(more["equal-weight__1"]).data.features[-1] == "forecast"
    assert Task.of(more["lead-lag-10__1"]).panel.extras.keys() == {"forecast"}  # the panel of the hash
    for data in (*plain.values(), *more.values()):  # one history, so that times tell the splits apart
        (train,) = Task.of(data).splits["train"].ranges
        assert np.isin(content(data, "infos/timestamp")["infos/timestamp"], panel.timestamps[slice(*train)].astype(int)).all()


# --- the collector


def parse(*options, regime="long_only", out="data"):
    return collect.tyro.cli(collect.Args, args=["--regime", regime, "--out", str(out), *options], return_unknown_args=True)


@pytest.fixture
def here(monkeypatch):
    """Runs the commands of the collector in this process, ppo not at all; returns what has been run."""
    ran = []

    def run(command, log):
        ran.append(command)
        log.write_text("ran\n")
        assert baselines.main(baselines.parse(command[2:])) == 0

    monkeypatch.setattr(collect, "run", run)
    return ran


CHEAP = ("--market", GP, "--episode-length", "8", "--behaviours", "random", "equal-weight", "--episodes", "6")


@pytest.mark.parametrize(
    "regime, market, script, flags",
    (
        ("long_only", GP, "ppo_portfolio", ("--asset-cap", "0.5", "--gamma", "0.7")),
        ("long_short", GP, "ppo_portfolio", ("--behaviours", "ppo", "random", "closed-form")),
        ("lookback", SMALL, "ppo_leadlag", ()),
    ),
)
def test_a_collection_of_each_regime(regime, market, script, flags, tmp_path, capsys):
    out = tmp_path / "deep" / "er"
    options = ["--market", market, "--episodes", "12", "--total-timesteps", "1", "--log-at", "1", "--num-threads", "1"]
    options += ["--seed", "3", "--episode-length", "16", "--train-fraction", "0.6", *flags]
    assert collect.main(*parse(*options, regime=regime, out=out)) == 0
    data = Dataset(out / "dataset.hdf5")
    names = [name for name in collect.REGIMES[regime].behaviours if name != "ppo"]
    if regime == "long_short":
        names = ["random", "closed-form"]
    share = -(-12 // (len(names) + 1))
    assert [behaviour["policy"] for behaviour in data.meta["behaviours"]] == [*names, script]
    assert len(data.terminated) == share * (len(names) + 1) and data.meta["steps"] == 16 * len(data.terminated)
    assert data.meta["behaviours"][-1]["step"] == 32768 and data.meta["behaviours"][-1]["checkpoint_sha256"]
    assert "infos/behavior_logprob" in data.keys and data.meta["seed"] == 3
    task = Task.of(data)
    if regime == "lookback":
        assert task.data.config == LeadLagConfig() and data.meta["gamma"] == 0.5 and "infos/action_mask" in data.keys
    else:
        known = baselines.KNOWN["synthetic:garleanu-pedersen"]["portfolio"]
        changes = {"asset_cap": 0.5} if regime == "long_only" else {}
        assert task.data.config == replace(known, constraints=regime, **changes)
        assert data.meta["gamma"] == (0.7 if regime == "long_only" else 0.9) and task.risk_aversion == 40.0
    (run_dir,) = (out / "runs").iterdir()
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    lines = capsys.readouterr().out.splitlines()
    assert f"ppo's run directory: {run_dir}" in lines and f"dataset: {out / 'dataset.hdf5'}" in lines
    rewards = content(data, "rewards")["rewards"].astype(float)
    size, rest = 16 * share, []
    for n, name in enumerate([*names, "ppo, 32768 steps"]):
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.removeprefix(name).split()[:2] == [str(share), str(size)]
        rest.append(float(line.split()[-1]))
        assert rest[-1] == pytest.approx(rewards[n * size : (n + 1) * size].mean(), rel=1e-3)
    (line,) = (line for line in lines if line.startswith("all "))
    assert line.split()[1:3] == [str(len(data.terminated)), str(len(rewards))]
    assert float(line.split()[3]) == pytest.approx(rewards.mean(), rel=1e-3)
    assert sorted(path.name for path in out.iterdir()) == ["collect.log", "dataset.hdf5", "dataset_meta.json", "runs"]


def test_shares_are_even_and_both_processes_get_the_same_terms():
    for regime, quick in (("long_only", False), ("long_short", True), ("lookback", False)):
        args, others = parse("--fill", "same_close", "--folds", "3", *(["--quick"] if quick else []), regime=regime)
        rule, ppo = collect.commands(args, others, collect.Path("parts"))
        known = collect.REGIMES[regime]
        assert len(args.rules) == 4 and args.checkpoints == 3 and args.market == known.market
        only, at = rule.index("--only"), ppo.index("--log-at")
        assert tuple(rule[only + 1 : only + 5]) == args.rules
        assert ppo[at + 1 : at + 4] == ["0.1", "0.4", "1.0"]
        assert ("--total-timesteps" in ppo) == quick and "--total-timesteps" not in rule
        first = rule.index("--market")
        assert rule[first:] == ppo[ppo.index("--market") :] and rule[-4:] == ["--fill", "same_close", "--folds", "3"]
        assert rule[rule.index("--log-episodes") + 1] == ("6" if quick else "429")
        assert ppo[ppo.index("--runs-dir") + 1] == "data/runs" and rule[rule.index("--runs-dir") + 1] == "parts/runs"
        assert known.script in ppo[1] and f"--gamma {known.gamma}" in " ".join(rule)
    args, others = parse("--behaviours", "ppo", "--log-at", "1", "--log-noise", "0.3", "--learning-rate", "1")
    (ppo,) = collect.commands(args, others, collect.Path("parts"))
    assert ppo[-2:] == ["--learning-rate", "1"] and "--log-noise" not in ppo and "3000" in ppo
    args, others = parse("--behaviours", "random", "--log-noise", "0.3", "--log-epsilon", "0.4", "--costs", "zero")
    (rule,) = collect.commands(args, others, collect.Path("parts"))
    parsed = baselines.parse(rule[2:])
    assert (parsed.log_noise, parsed.log_epsilon, parsed.portfolio.costs, parsed.log_episodes) == (0.3, 0.4, "zero", 3000)
    args, others = parse("--market", GP, "--behaviours", "lead-lag-10", regime="lookback")  # with no costs of its own
    (rule,) = collect.commands(args, others, collect.Path("parts"))
    assert baselines.parse(rule[2:]).portfolio.costs == "institutional"
    assert baselines.parse([*rule[2:], "--costs", "retail"]).portfolio.costs == "retail"


@pytest.mark.parametrize(
    "options, message",
    (
        (("--behaviours", "top-k", "nope", "lead-lag-10"), "--behaviours nope lead-lag-10: expected, for --regime long_only"),
        (("--log-at", "0", "1"), "--log-at 0.0 1.0: expected shares of the training"),
        (("--episodes", "-1"), "--episodes -1: expected 0 or more"),
        (("--seed", "-1"), "--seed -1: expected 0 or more"),
    ),
)
def test_bad_flags_are_named(options, message):
    with pytest.raises(SystemExit, match=message):
        parse(*options)


@pytest.mark.parametrize("flag", ("--only", "--log_dataset=x", "--constraints", "--resume"))
def test_flags_that_the_collector_sets_are_refused(flag, tmp_path):
    with pytest.raises(SystemExit, match=f"{flag}: is set here; expected"):
        collect.main(*parse(flag, "x", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_error_of_a_process_that_fails_is_shown(tmp_path):
    with pytest.raises(SystemExit) as caught:
        collect.main(*parse(*CHEAP, "--top-windoe", "3", out=tmp_path))
    message = str(caught.value)
    assert "Unrecognized options: --top-windoe" in message and "baselines.py failed with exit code 2" in message
    assert message.splitlines()[0].startswith("$ ") and str(tmp_path / "collect.log") in message
    assert [path.name for path in tmp_path.iterdir()] == ["collect.log"]
    with pytest.raises(SystemExit, match="--out .*collect.log: .*; expected a folder"):
        collect.main(*parse(*CHEAP, out=tmp_path / "collect.log"))


def test_a_finished_dataset_is_replaced_only_on_demand(here, tmp_path, monkeypatch):
    assert collect.main(*parse(*CHEAP, out=tmp_path)) == 0
    before = (tmp_path / "dataset.hdf5").read_bytes()
    with pytest.raises(SystemExit, match="--out .*: holds dataset.hdf5 already; expected another folder, or --replace"):
        collect.main(*parse(*CHEAP, "--seed", "2", out=tmp_path))
    assert len(here) == 1
    with monkeypatch.context() as patch:  # what fails leaves the old one
        patch.setattr(collect, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect.main(*parse(*CHEAP, "--seed", "2", "--replace", out=tmp_path))
    assert (tmp_path / "dataset.hdf5").read_bytes() == before and Dataset(tmp_path / "dataset.hdf5").meta["seed"] == 1
    assert collect.main(*parse(*CHEAP, "--seed", "2", "--replace", out=tmp_path)) == 0
    assert Dataset(tmp_path / "dataset.hdf5").meta["seed"] == 2
    (tmp_path / "other.hdf5").touch()
    with pytest.raises(SystemExit, match="holds dataset.hdf5 already"):
        collect.main(*parse(*CHEAP, "--replace", out=tmp_path))


def test_a_collection_that_was_interrupted_is_begun_again(here, tmp_path, monkeypatch):
    """Between the meta and the file; and with what a kill leaves lying about."""
    move = os.replace
    moved = []

    def interrupted(source, target):
        if str(target).startswith(f"{tmp_path}{os.sep}dataset"):
            moved.append(target.name)
            if len(moved) == 2:
                raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect.main(*parse(*CHEAP, out=tmp_path))
    assert moved == ["dataset_meta.json", "dataset.hdf5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collect.log", "dataset_meta.json"]
    (tmp_path / "parts-killed" / "random__1").mkdir(parents=True)
    assert collect.main(*parse(*CHEAP, out=tmp_path)) == 0
    assert len(Dataset(tmp_path / "dataset.hdf5").terminated) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collect.log", "dataset.hdf5", "dataset_meta.json"]


def test_a_killed_collection_is_begun_again_but_two_at_once_are_refused(here, tmp_path):
    command = [sys.executable, str(ROOT / "benchmark" / "collect.py"), "--regime", "long_only", "--out", str(tmp_path), *CHEAP]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + WAIT
        while not list(tmp_path.glob("parts-*")) and time.monotonic() < until:
            time.sleep(0.02)
        with pytest.raises(SystemExit, match="--out .*: another collection runs there; expected another folder"):
            collect.main(*parse(*CHEAP, out=tmp_path))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(tmp_path.glob("parts-*")) and not list(tmp_path.glob("*.hdf5"))
    assert collect.main(*parse(*CHEAP, out=tmp_path)) == 0
    assert len(Dataset(tmp_path / "dataset.hdf5").terminated) == 6 and not list(tmp_path.glob("parts-*"))


def test_checkpoints_are_sorted_and_a_missing_one_is_said(here, tmp_path):
    args, _ = parse(*CHEAP, out=tmp_path / "out")
    log(tmp_path, *CHEAP[:4], "--only", "random", "--log-episodes", "2", "--constraints", "long_only")
    source = tmp_path / "data" / "random__1"
    for step in (900, 32768):
        collect.shutil.copytree(source, tmp_path / "data" / f"ppo_portfolio__1__{step}")
    args = replace(args, behaviours=("random", "ppo"), log_at=(0.5, 1.0))
    assert list(collect.datasets(args, tmp_path / "data")) == ["random", "ppo, 900 steps", "ppo, 32768 steps"]
    args = replace(args, log_at=(0.01, 0.02, 1.0))
    with pytest.raises(SystemExit, match=r"--log-at 0.01 0.02 1.0: ppo left 2 checkpoints, after \[900, 32768\] st.*ected 3"):
        collect.datasets(args, tmp_path / "data")


def test_known_terms_are_those_of_the_script():
    """baselines.py and algos/ppo_portfolio.py each say them; a collection needs them to be the same."""
    from scripts import SCRIPTS  # here, for it loads torch, which no other test in this file needs

    theirs = SCRIPTS["ppo_portfolio"].module.KNOWN
    assert theirs.keys() == baselines.KNOWN.keys()
    for market, known in baselines.KNOWN.items():
        assert known["portfolio"] == theirs[market]["portfolio"]
        variance = known.get("rules", rules.RuleConfig()).penalty_variance
        assert variance == theirs[market].get("penalty_variance", 0.0)
