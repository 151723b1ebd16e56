"""Replays: orders earn again what their ledger says; costs, delay and regimes do to them what they say they do."""

from dataclasses import asdict, replace

import baselines
import numpy as np
import pandas as pd
import pytest
import replay
import rundirs
from conftest import CONFIG, SMALL, make_env, random_actions
from paired import Draws
from scipy.stats import trim_mean

from envs import ledger
from envs.costs import RECORD, execution, load_costs
from envs.leadlag_tables import LeadLagData
from envs.panel import Panel, Split
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import make_panel

RULES = baselines.RuleConfig(window=50, refit_every=20, momentum_window=30)
TRADING = ["commission", "spread", "slippage", "impact"]
CHARGES = [*TRADING, "borrow", "financing"]
KINDS = ("momentum", "equal-weight", "kelly-lite", "LeadLag-v0", "Portfolio-v0", "folds")


def baseline(root, name: str, only: str = "", **options) -> rundirs.Run:
    """Run of the baseline `name`, read back as the scoreboard does it; `only` renames its row."""
    args = baselines.Args(**{"runs_dir": str(root), "market": SMALL, "seed": 3, "rules": RULES} | options)
    written = baselines.run_baseline(name, args, baselines.load(args), {})
    assert written["status"] == "finished", written["failure"]
    return opened(max(root.glob("*__baseline-*"), key=lambda path: path.stat().st_mtime_ns), only or name)


def opened(path, name: str) -> rundirs.Run:
    run = rundirs.read(path)
    rundirs.load(run)
    assert run.reason is None, run.reason
    run.name = name
    return run


def agent(root, data, seed: int = 3, **args) -> rundirs.Run:
    """Run of an agent that acts at random, with a run.json as algos/ppo_leadlag.py and algos/ppo_portfolio.py leave it."""
    panel, family = data.panel, "LeadLag-v0" if isinstance(data, LeadLagData) else "Portfolio-v0"
    splits = panel.split(embargo=5)
    frames = []
    for split in splits.values():
        options = {"actions": args["actions"]} if "actions" in args else {}
        env = make_env(data, len(split.ranges), split=split, episode_length=0, random_start=False, **options)
        actions = iter(random_actions(env, panel.num_bars, seed=1))

        def policy(obs, mask, rows, actions=actions):
            action = next(actions)
            return action if mask is None else np.where(mask[np.arange(len(action)), action], action, mask.argmax(axis=1))

        frames.append(ledger.backtest(env, policy, panel, split))
    path = ledger.new_run_dir(str(root), family, "agent", seed)
    config = {"leadlag" if family == "LeadLag-v0" else "portfolio": asdict(data.config)}
    shared = {"exp_name": "agent", "seed": seed, "market": panel.name, "symbols": (), "start": None, "end": None}
    shared |= {"resample": None, "train_fraction": 0.6, "val_fraction": 0.2, "embargo": 5, "folds": 0, "fold": 0}
    run = {
        "status": "finished", "env_id": family, "args": shared | config | args, "trials": 1, "failure": None,
        "panel": ledger.describe_panel(panel, splits), "market": data.describe(),
    }  # fmt: skip
    ledger.write_ledger(path / "ledger.parquet", pd.concat(frames, ignore_index=True))
    ledger.write_json(path / "run.json", run)
    return opened(path, family)


def edited(run: rundirs.Run, edit) -> rundirs.Run:
    """The run after edit(frame) on all of its ledger.parquet, and what the scoreboard then reads of it."""
    frame = pd.read_parquet(run.path / "ledger.parquet")
    edit(frame)
    ledger.write_ledger(run.path / "ledger.parquet", frame)
    test = frame[frame["split"] == "test"].sort_values("market", kind="stable", ignore_index=True)
    return replace(run, ledger=test[["market", "timestamp", *RECORD]])


def write_prices(path, close: np.ndarray) -> str:
    days = pd.bdate_range("2015-01-01", periods=len(close))
    frame = pd.DataFrame(close, columns=[f"A{i}" for i in range(close.shape[1])])
    frame.insert(0, "timestamp", days.strftime("%Y-%m-%d"))
    long = frame.melt("timestamp", var_name="symbol", value_name="close").sort_values(["timestamp", "symbol"])
    long.to_csv(path, index=False, float_format="%.17g")
    return str(path)


def wandering(bars: int, symbols: int = 4, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """(bars, symbols) log returns that are independent of each other."""
    return scale * np.random.default_rng(seed).standard_normal((bars, symbols))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, rundirs.Run]:
    root = tmp_path_factory.mktemp("runs")
    prices = write_prices(root / "prices.csv", 50 * np.exp(wandering(500).cumsum(axis=0)))
    found = {name: baseline(root / name, name) for name in KINDS[:3]}
    panel = make_panel(SMALL, seed=3)
    found["LeadLag-v0"] = agent(root, LeadLagData(panel, replace(CONFIG, costs="retail")), actions="absolute")
    short = PortfolioConfig(constraints="long_short", gross=1.5, costs="institutional:sqrt_impact=0.02:cash_rate=0.03")
    found["Portfolio-v0"] = agent(root, PortfolioData(panel, short))
    found["folds"] = baseline(root / "folds", "momentum", "folds", market=prices, folds=3, fold=1)
    return found


@pytest.fixture(scope="module")
def replayed(runs):
    return {name: replay.replay(run) for name, run in runs.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_replay_as_it_was_is_the_ledger(name, runs, replayed):
    was, found = runs[name].ledger, replayed[name]
    assert list(found) == ["0x", "1x", "2x", "5x", "late"]
    assert name == "folds" or was["market"].nunique() == 2  # several histories
    for frame in found.values():
        assert frame[["market", "timestamp"]].equals(was[["market", "timestamp"]]) and list(frame.index) == list(was.index)
    np.testing.assert_allclose(found["1x"][list(RECORD)], was[list(RECORD)], rtol=0, atol=1e-12)
    assert (was["turnover"] > 0).any() and (found["1x"][TRADING].sum() > 0).any()


@pytest.mark.parametrize("name", KINDS)
def test_costs_scale_and_nothing_else_does(name, replayed):
    free, once, twice, dear = (replayed[name][f"{m}x"] for m in (0, 1, 2, 5))
    assert (free[CHARGES] == 0).all().all()
    np.testing.assert_allclose(free["net_return"], free["gross_return"] + free["interest"], rtol=0, atol=1e-15)
    assert (free["interest"] > 0).any() == (name == "Portfolio-v0")  # the only one with a cash rate, which is no cost
    cost = [frame[CHARGES].sum(axis=1).to_numpy() for frame in (free, once, twice, dear)]
    for less, more in zip(cost, cost[1:]):
        assert (more >= less - 1e-15).all() and more.sum() > less.sum()
    paid = cost[1] > 1e-9
    for scale, found in ((2, cost[2]), (5, cost[3])):  # to first order: what is left to trade shrinks with what was paid
        np.testing.assert_allclose(found[paid], scale * cost[1][paid], rtol=0.02 * scale)
        np.testing.assert_allclose(found.sum(), scale * cost[1].sum(), rtol=0.005 * scale)


@pytest.mark.parametrize("name", KINDS)
def test_late_orders_are_filled_one_bar_later(name, runs, replayed):
    """By hand: each market's orders, one down, from cash; a bar without an order keeps what it has."""
    run, found = runs[name], replayed[name]["late"]
    panel, split = replay.load(run)
    frame = pd.read_parquet(run.path / "ledger.parquet")
    costs = rundirs.Costs(**run.content["market"]["costs"])
    ex = execution(panel, run.content["market"]["fill"], costs)
    table = LeadLagData(panel, CONFIG).targets if name == "LeadLag-v0" else None
    targets, steps, status = np.full(panel.close.shape, np.nan), [], ex.status.copy()
    for market, part in frame[frame["split"] == "test"].groupby("market"):
        steps.append(len(part))
        decided = np.arange(split.ranges[market, 1] - 1 - len(part), split.ranges[market, 1] - 1)
        for row, action in zip(decided[:-1], part["action"]):
            targets[row + 1] = action if table is None else table[row, action]
        assert tuple(panel.timestamps[decided + 1]) == tuple(part["timestamp"].to_numpy("datetime64[ns]"))
        assert (found.loc[found["market"] == market, ["turnover", "net_return"]].iloc[0] == 0).all() or costs.cash_rate
    first = split.ranges[:, 1] - 1 - np.array(steps)
    filled = np.concatenate([np.arange(a + 1, b - 1) for a, b in zip(first, split.ranges[:, 1])])
    idle = np.isnan(targets)
    assert idle[filled].any() == (name in ("momentum", "kelly-lite", "folds"))
    status[idle] = 0
    late = ledger.backtest_weights(panel, ex._replace(status=status), costs.rates, split, np.nan_to_num(targets), first)
    np.testing.assert_allclose(found[list(RECORD)], late[list(RECORD)], rtol=0, atol=1e-12)
    still = idle[np.concatenate([np.arange(a, b - 1) for a, b in zip(first, split.ranges[:, 1])])].all(axis=1)
    assert (found.loc[still, TRADING] == 0).all().all()
    assert (found["net_return"] - replayed[name]["1x"]["net_return"]).abs().max() > 1e-4


def test_orders_that_know_tomorrow_are_worth_nothing_a_day_later(tmp_path):
    returns = wandering(400, seed=2)
    market = write_prices(tmp_path / "prices.csv", 50 * np.exp(returns.cumsum(axis=0)))
    tomorrow = 0.25 * np.sign(np.roll(returns, -1, axis=0))
    plan = pd.DataFrame(tomorrow, columns=[f"A{i}" for i in range(4)])
    plan.insert(0, "timestamp", pd.bdate_range("2015-01-01", periods=400).strftime("%Y-%m-%d"))
    plan.melt("timestamp", var_name="symbol", value_name="weight").sort_values("timestamp").to_csv(
        tmp_path / "plan.csv", index=False
    )
    rules = replace(RULES, plan=str(tmp_path / "plan.csv"))
    terms = PortfolioConfig(fill="same_close")
    run = baseline(tmp_path, "plan", market=market, rules=rules, portfolio=terms, train_fraction=0.2, val_fraction=0.2)
    found = replay.stress({"plan": [run]}, 50, 0)
    (late,) = found["late"].values()
    assert found["sensitivity"]["plan"][1]["low"] > 10.0
    assert late["low"] < 0.0 and late["value"] < 1.0  # and it still pays


def test_a_bar_without_orders_trades_nothing(runs, replayed):
    frame = pd.read_parquet(runs["kelly-lite"].path / "ledger.parquet")
    none = np.isnan(np.stack(frame.loc[frame["split"] == "test", "action"])).all(axis=1)
    assert none.any() and not none.all()
    for label in ("0x", "1x", "2x", "5x"):
        assert (replayed["kelly-lite"][label].loc[none, ["turnover", *TRADING]] == 0).all().all()


def test_a_replay_is_cut_to_the_bars_of_the_comparison(runs, replayed):
    run = runs["momentum"]
    kept = run.ledger.groupby("market").tail(50)
    found = replay.replay(replace(run, ledger=kept.reset_index(drop=True)))
    for label, whole in replayed["momentum"].items():
        pd.testing.assert_frame_equal(found[label], whole.loc[kept.index].reset_index(drop=True))


def test_the_rows_of_a_ledger_may_come_in_order_of_time(runs, replayed, tmp_path):
    run = runs["momentum"]
    frame = pd.read_parquet(run.path / "ledger.parquet").sort_values("timestamp", kind="stable")
    assert frame.loc[frame["split"] == "test", "market"].diff().abs().sum() > 100
    ledger.write_ledger(tmp_path / "ledger.parquet", frame)
    pd.testing.assert_frame_equal(replay.replay(replace(run, path=tmp_path))["late"], replayed["momentum"]["late"])


def test_the_panel_is_the_one_of_the_run(runs):
    panel, split = replay.load(runs["folds"])
    assert panel.sha256 == runs["folds"].panel
    expected = panel.walk_forward(3, val_fraction=0.2, embargo=5)[1]["test"]
    assert np.array_equal(split.ranges, expected.ranges)
    assert runs["folds"].content["panel"]["splits"]["test"] == split.describe(panel)


def test_series_known_without_delay_are_loaded_without_delay(tmp_path):
    """A lag of 0 is a setting, not a missing one; the series are part of what is hashed."""
    market = write_prices(tmp_path / "prices.csv", 50 * np.exp(wandering(300).cumsum(axis=0)))
    days = pd.bdate_range("2015-01-01", periods=300).strftime("%Y-%m-%d")
    pd.DataFrame({"timestamp": days, "macro": np.arange(300.0)}).to_csv(tmp_path / "series.csv", index=False)
    for lag in (0, 1, 2):
        panel = replay.load_market(market, series=str(tmp_path / "series.csv"), series_lag=lag)
        args = {"series": str(tmp_path / "series.csv"), "series_lag": lag, "market": market}
        run = agent(tmp_path, PortfolioData(panel), **args)
        replay._load.cache_clear()
        assert replay.load(run)[0].sha256 == panel.sha256


def changed_prices(run):
    path = run.content["args"]["market"]
    frame = pd.read_csv(path)
    frame.loc[7, "close"] *= 1.01
    frame.to_csv(path, index=False)
    return run


def gone(run):
    rundirs.Path(run.content["args"]["market"]).unlink()
    return run


def better_returns(run):
    def edit(frame):
        frame.loc[len(frame) - 9, "net_return"] += 1e-6

    return edited(run, edit)


def other_orders(run):
    def edit(frame):
        ordered = frame.index[[np.isfinite(action).all() for action in frame["action"]]]
        frame.at[ordered[-1], "action"] = frame.at[ordered[-1], "action"] + 0.01

    return edited(run, edit)


def other_width(run):
    def edit(frame):
        frame["action"] = [action[:-1] for action in frame["action"]]

    return edited(run, edit)


def shorter(run):
    def edit(frame):
        frame.loc[frame.index[-3:], "split"] = "val"

    return replace(edited(run, edit), ledger=run.ledger)


BROKEN = {
    changed_prices: "has changed since the run",
    gone: "prices.csv",
    better_returns: "do not earn again what the ledger says: up to 1e-06",
    other_orders: "do not earn again what the ledger says: up to",
    other_width: "shape",
    shorter: "do not earn again what the ledger says",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_what_cannot_be_replayed_says_why_and_the_others_are_shown(tmp_path, breaks):
    found = {}
    for number, name in enumerate(("good", "bad")):  # the same prices, from two files
        (tmp_path / name).mkdir()
        market = write_prices(tmp_path / name / "prices.csv", 50 * np.exp(wandering(300).cumsum(axis=0)))
        found[name] = baseline(tmp_path / name, ("equal-weight", "momentum")[number], name, market=market, val_fraction=0.1)
    assert found["good"].panel == found["bad"].panel
    bad = breaks(found["bad"])
    replay._load.cache_clear()
    with pytest.raises(ValueError, match=BROKEN[breaks]) as refusal:
        replay.replay(bad)
    shown = replay.stress({"good": [found["good"]], "bad": [bad]}, 20, 0)
    why = " ".join(str(refusal.value).split())[:300]
    assert f"bad: neither costs, delay nor regimes are shown: {why}." in shown["notes"]
    assert set(shown["sensitivity"]) == set(shown["late"]) == {"good"}
    assert shown["regimes"]["sharpe"] and all(set(rows) == {"good"} for rows in shown["regimes"]["sharpe"].values())


@pytest.mark.parametrize("lookback", (-1, CONFIG.num_lookbacks, 1.5))
def test_an_action_that_is_no_lookback_is_refused(lookback, runs, tmp_path):
    run = runs["LeadLag-v0"]
    path = tmp_path / "copy"
    path.mkdir()
    frame = pd.read_parquet(run.path / "ledger.parquet").astype({"action": float})
    frame.loc[len(frame) - 9, "action"] = lookback
    ledger.write_ledger(path / "ledger.parquet", frame)
    with pytest.raises(ValueError, match=f"action {float(lookback)} is no lookback; expected 0 to 4"):
        replay.replay(replace(run, path=path))


@pytest.mark.parametrize("actions", ("delta", "hybrid"))
def test_moves_on_the_grid_are_refused(actions, tmp_path):
    run = agent(tmp_path, LeadLagData(make_panel(SMALL, seed=3), CONFIG), actions=actions)
    with pytest.raises(ValueError, match=f"--actions {actions}: .*expected absolute"):
        replay.replay(run)
    assert replay.stress({"LeadLag-v0": [run]}, 20, 0)["notes"] != []


# regimes


def panel_of(returns: np.ndarray, histories: int = 1) -> Panel:
    """Close-only panel of log returns (bars, N); with several histories of equal length the first two are train and val."""
    bars = len(returns) // histories
    close = 50 * np.exp(np.concatenate([part.cumsum(axis=0) for part in np.split(returns, histories)]))
    days = np.busday_offset("2015-01-01", np.arange(bars), roll="forward").astype("datetime64[ns]")
    return Panel(
        name="made", timestamps=np.tile(days, histories), symbols=tuple(f"A{i}" for i in range(returns.shape[1])), close=close,
        segments=np.arange(histories) * bars,
        segment_split=("train", "val", *["test"] * (histories - 2)) if histories > 1 else None,
    )  # fmt: skip


def regimes_of(monkeypatch, panel: Panel, split=None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Labels of the bars of the test split, and the rows at which their orders were given."""
    split = panel.split(0.3, 0.1)["test"] if split is None else split
    first = split.ranges[:, 0] + 2  # an agent that cannot decide at once
    frame = ledger.backtest_weights(
        panel,
        execution(panel, "next_close", load_costs("zero")),
        load_costs("zero").rates,
        split,
        np.zeros(panel.close.shape),
        first,
    )
    monkeypatch.setattr(replay, "load", lambda run: (panel, split))
    labels = replay.regimes(rundirs.Run(rundirs.Path("."), ledger=frame))
    assert tuple(labels) == replay.REGIMES
    assert all(label.shape == (len(frame),) and label.dtype == bool for label in labels.values())
    return labels, np.concatenate([np.arange(a, b - 1) for a, b in zip(first, split.ranges[:, 1])])


def crash(bars: int = 500, at: int = 330, length: int = 10) -> np.ndarray:
    returns = wandering(bars, seed=4)
    returns[at : at + length] -= 0.06
    return returns


def test_regimes_partition_the_bars(runs):
    for name in ("momentum", "folds"):
        labels = replay.regimes(runs[name])
        trend, volatility = (np.sum([labels[k] for k in names], axis=0) for names in (replay.REGIMES[:3], replay.REGIMES[3:6]))
        assert (trend == 1).all() and (volatility == 1).all() and len(trend) == len(runs[name].ledger)
        assert all(labels[k].any() for k in ("bull", "bear", "calm", "choppy", "crisis"))
        assert abs(labels["calm"].mean() - 0.5) < 0.01 and abs(labels["crisis"].mean() - 0.1) < 0.01


def test_regimes_by_hand(monkeypatch):
    returns = np.concatenate([wandering(400, seed=1), 0.3 * wandering(400, seed=2) + 0.0005, crash(400, 250)])
    panel = panel_of(np.concatenate([np.zeros((800, 4)), returns]), histories=5)
    close = panel.close.copy()
    close[800:1000, 1:] = np.nan  # not listed yet, and no part of the market
    panel = replace(panel, close=close)
    labels, rows = regimes_of(monkeypatch, panel)
    start = panel.segments[panel.segment_of_row]
    market = np.array([x[listed].mean() for x, listed in zip(replay.log_returns(panel), panel.present)])
    seen = [market[max(start[t], t - 59) : t + 1] for t in rows]  # the last 60 bars, of the same history
    volatility = np.array([x.std(ddof=1) for x in seen])
    trend = np.array([x.sum() for x in seen]) / volatility / np.sqrt([len(x) for x in seen])
    assert np.array_equal(labels["bull"], trend > 0.5) and np.array_equal(labels["bear"], trend < -0.5)
    calm, crisis = np.quantile(volatility, (0.5, 0.9))
    assert np.array_equal(labels["calm"], volatility <= calm) and np.array_equal(labels["crisis"], volatility > crisis)


def test_a_crash_is_a_bear_market_and_a_crisis_once_it_was_seen(monkeypatch):
    labels, rows = regimes_of(monkeypatch, panel_of(crash(1000, 830)))
    seen = (rows >= 835) & (rows < 885)  # from the sixth bar of the crash on, and while the window of 60 bars holds most of it
    assert labels["bear"][seen].all() and labels["crisis"][seen].all()
    assert not labels["crisis"][rows < 830].any()  # nobody knew
    quiet, _ = regimes_of(monkeypatch, panel_of(wandering(1000, seed=4)))
    for name in ("bull", "sideways", "bear"):
        assert np.array_equal(labels[name][rows < 830], quiet[name][rows < 830])


@pytest.mark.parametrize("seed", range(3))
def test_later_bars_change_no_earlier_label(monkeypatch, seed):
    panel, t = panel_of(crash()), 400
    rng = np.random.default_rng(seed)
    later = panel.close.copy()
    later[t + 1 :] *= np.exp(rng.choice([0.002, 0.2]) * rng.standard_normal(later[t + 1 :].shape))
    before, rows = regimes_of(monkeypatch, panel)
    after, _ = regimes_of(monkeypatch, replace(panel, close=later))
    known = rows <= t
    for name in ("bull", "sideways", "bear"):
        assert np.array_equal(before[name][known], after[name][known])
    assert any(not np.array_equal(before[name][~known], after[name][~known]) for name in before)
    # quantiles are those of the whole split, so the bounds move; the order of the bars does not
    market = pd.Series(replay.log_returns(panel).mean(axis=1))
    volatility = market.rolling(60).std().to_numpy()[rows]
    for labels in (before, after):
        for lower in (labels["calm"][known], ~labels["crisis"][known]):
            if lower.any() and not lower.all():
                assert volatility[known][lower].max() <= volatility[known][~lower].min()


def broken(bars: int, at: int, length: int = 63) -> np.ndarray:
    """Independent returns, but for the bars at..at+length, in which all symbols move together, no more than usual."""
    returns = wandering(bars, seed=6)
    returns[at : at + length] = 0.1 * returns[at : at + length] + 0.995 * returns[at : at + length, :1]
    return returns


def test_hardest_are_the_windows_around_a_break_of_correlations(monkeypatch):
    panel = panel_of(broken(1050, 420 + 4 * 63))  # the test split is rows 420 to 1049, ten windows
    split = panel.split(0.3, 0.1)["test"]
    assert split.ranges.tolist() == [[420, 1050]]
    labels, rows = regimes_of(monkeypatch, panel, split)
    window = (rows + 1 - 420) // 63  # of the bar that is earned
    assert set(window[labels["hardest"]]) == {4, 5} and labels["hardest"][np.isin(window, (4, 5))].all()
    calm, _ = regimes_of(monkeypatch, panel_of(wandering(1050, seed=6)), split)
    assert 0.1 < calm["hardest"].mean() < 0.3 and set(window[calm["hardest"]]) != {4, 5}
    # a break between the last bars before the split and its first is one, too
    labels, _ = regimes_of(monkeypatch, panel_of(broken(1050, 420)), split)
    assert set(window[labels["hardest"]]) == {0, 1}


def test_hardest_are_the_windows_around_a_break_of_volatilities(monkeypatch):
    returns = wandering(1050, seed=6)
    returns[420 + 6 * 63 : 420 + 7 * 63] *= 4.0
    panel = panel_of(returns)
    labels, rows = regimes_of(monkeypatch, panel, panel.split(0.3, 0.1)["test"])
    assert set((rows[labels["hardest"]] + 1 - 420) // 63) == {6, 7}


def test_few_windows_have_a_hardest_one_too(monkeypatch):
    panel = panel_of(broken(420, 168 + 2 * 63))
    labels, rows = regimes_of(monkeypatch, panel, panel.split(0.3, 0.1)["test"])
    window = (rows + 1 - 168) // 63  # four windows: two beyond the break are about as hard
    assert len(set(window[labels["hardest"]])) == 1 and set(window[labels["hardest"]]) < {2, 3}
    labels, rows = regimes_of(monkeypatch, panel, Split("test", np.array([[168, 240]])))  # one window and a bit
    assert np.array_equal(labels["hardest"], rows + 1 < 168 + 63)
    # and a split too short to hold a window has none
    panel = panel_of(broken(100, 50))
    labels, _ = regimes_of(monkeypatch, panel, panel.split(0.3, 0.2)["test"])
    assert not labels["hardest"].any()


def test_no_window_reaches_into_another_history(monkeypatch):
    """Test histories of 4.5 windows, each louder than the one before: what begins or ends one is no break."""
    bars, scales = 284, (1, 1, 1, 9, 81)
    parts = [s * broken(bars, 2 * 63) if k == 3 else s * wandering(bars, seed=k) for k, s in enumerate(scales)]
    labels, rows = regimes_of(monkeypatch, panel_of(1e-2 * np.concatenate(parts), histories=5))
    history, window = np.divmod(rows + 1, bars)[0] - 2, (rows + 1) % bars // 63
    found = set(zip(history[labels["hardest"]], window[labels["hardest"]]))
    assert found == {(1, 2), (1, 3)}


# the scoreboard's part


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, list[rundirs.Run]]:
    """Two rows of two seeds each, on a market where every seed has prices of its own."""
    root = tmp_path_factory.mktemp("table")
    return {name: [baseline(root, name, seed=seed) for seed in (3, 4)] for name in ("momentum", "equal-weight")}


def test_stress_from_end_to_end(table):
    found = replay.stress(table, 60, 7)
    assert list(found) == ["sensitivity", "late", "regimes", "notes"]
    own = Draws(table, 60, 7)
    for name, runs in table.items():
        line = found["sensitivity"][name]
        assert [point["multiple"] for point in line] == list(replay.MULTIPLES)
        assert all(set(point) == {"multiple", "value", "low", "high"} for point in line)
        values = [point["value"] for point in line]
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
        once = line[replay.MULTIPLES.index(1.0)]
        np.testing.assert_allclose([once[k] for k in ("value", "low", "high")], list(own.scores(name)["sharpe"].values()))
        assert set(found["late"][name]) == {"value", "low", "high"}
        late = [replay.replay(run)["late"]["net_return"] for run in runs]
        per_year = runs[0].content["panel"]["bars_per_year"]
        np.testing.assert_allclose(found["late"][name]["value"], np.mean([ledger.sharpe(x, per_year) for x in late]))
        for regime, rows in found["regimes"]["sharpe"].items():
            net = [run.ledger["net_return"][replay.regimes(run)[regime]] for run in runs]
            np.testing.assert_allclose(rows[name]["value"], np.mean([ledger.sharpe(x, per_year) for x in net]))
            assert rows[name]["low"] <= rows[name]["high"]
    assert set(found["regimes"]["sharpe"]) == set(replay.REGIMES)
    (note,) = found["notes"]
    shares = {k: np.mean([replay.regimes(run)[k].mean() for run in table["momentum"]]) for k in replay.REGIMES}
    assert ", ".join(f"{k} {share:.0%}" for k, share in shares.items()) in note


def test_a_row_of_which_one_seed_fails_is_not_shown(table):
    first, second = table["momentum"]
    bad = replace(second, ledger=second.ledger.assign(net_return=second.ledger["net_return"] + 1e-5))
    found = replay.stress(table | {"momentum": [first, bad]}, 20, 0)
    assert set(found["sensitivity"]) == set(found["late"]) == set(found["regimes"]["sharpe"]["bull"]) == {"equal-weight"}
    assert sum(note.startswith("momentum: ") for note in found["notes"]) == 1


def test_a_regime_of_few_bars_has_no_score(table, monkeypatch):
    real = replay.regimes

    def rare(run):
        labels = real(run)
        labels["crisis"] = np.arange(len(labels["crisis"])) < (19 if run.seed == 4 else 100)
        labels["calm"] = np.arange(len(labels["calm"])) < 20
        return labels

    monkeypatch.setattr(replay, "regimes", rare)
    found = replay.stress(table, 20, 0)
    assert set(found["regimes"]["sharpe"]) == set(replay.REGIMES) - {"crisis"} and "crisis 1" not in found["notes"][0]


def drawn_from(net: np.ndarray, seed: int = 1, panel: str = "a") -> rundirs.Run:
    """Run of net returns (markets, bars)."""
    frame = pd.DataFrame(0.0, index=range(net.size), columns=list(RECORD))
    frame["net_return"], frame["turnover"] = net.ravel(), np.random.default_rng(seed).random(net.size)
    frame["commission"] = 1e-3 * frame["turnover"]
    frame.insert(0, "timestamp", np.tile(pd.date_range("2020-01-01", periods=net.shape[1]), len(net)))
    frame.insert(0, "market", np.repeat(np.arange(len(net)), net.shape[1]))
    content = {"args": {"seed": seed}, "panel": {"sha256": panel, "bars_per_year": 252.0}}
    return rundirs.Run(rundirs.Path("."), content, ledger=frame)


def returns_of(markets: int, bars: int, seed: int = 0) -> np.ndarray:
    return 0.0005 + 0.01 * np.random.default_rng(seed).standard_normal((markets, bars))


@pytest.mark.parametrize("markets", (1, 3, 12))
def test_scores_on_a_part_of_the_bars(markets):
    """Few histories: bars are drawn; many: the histories are."""
    rows = {name: [drawn_from(returns_of(markets, 120, seed))] for seed, name in enumerate("ab")}
    keep = np.random.default_rng(9).random(markets * 120) < 0.4
    draws, whole = (Draws(rows, 200, 0, kept) for kept in ({"a": keep}, None))
    every = Draws(rows, 200, 0, {"a": np.ones(markets * 120, bool)})
    assert (draws.block is None) == (markets == 12)
    for name, (run,) in rows.items():
        scores, kept = draws.scores(name), run.ledger[keep]
        np.testing.assert_allclose(scores["sharpe"]["value"], ledger.sharpe(kept["net_return"].to_numpy(), 252.0))
        for score, values in (("growth", ledger.growth(kept)), ("turnover", kept["turnover"]), ("cost", kept["commission"])):
            np.testing.assert_allclose(scores[score]["value"], np.mean(values) * 252.0)
            assert scores[score]["low"] < scores[score]["value"] < scores[score]["high"]
        assert every.scores(name) == whole.scores(name) != scores


def test_the_interquartile_mean_by_hand():
    """Of every market and seed, where there are many markets; else of every seed's pooled Sharpe ratio."""
    for markets in (1, 2, 12):
        nets = [returns_of(markets, 80, seed) + 0.01 * (seed == 0) for seed in range(5)]  # one of them by far too good
        rows = {"a": [drawn_from(net, seed) for seed, net in enumerate(nets)]}
        found = Draws(rows, 100, 0).iqm("a")
        parts = [part for net in nets for part in (net if markets >= 10 else [net.ravel()])]
        expected = trim_mean([ledger.sharpe(part, 252.0) for part in parts], 0.25)
        np.testing.assert_allclose(found["value"], expected)
        assert found["low"] < found["value"] < found["high"]


def test_probability_of_improvement():
    net = returns_of(2, 200)
    other = returns_of(2, 200, 8)
    better = net + np.where(net > 0, 1e-4, 2e-4)  # more in every bar, and less apart
    rows = {
        "a": [drawn_from(net, 1), drawn_from(net, 2)], "same": [drawn_from(net, 1), drawn_from(net, 2)],
        "up": [drawn_from(better, 1), drawn_from(better, 3)], "other": [drawn_from(other, 1)],
    }  # fmt: skip
    draws = Draws(rows, 200, 0)
    assert draws.better("a", "same") == draws.better("same", "a") == 0.5
    assert draws.better("up", "a") == 1.0 and draws.better("a", "up") == 0.0
    chance = draws.better("other", "a")
    assert 0.0 < chance < 1.0 and chance + draws.better("a", "other") == pytest.approx(1.0)
    assert Draws(rows, 0, 0).better("up", "a") is None


def test_improvement_is_asked_on_shared_prices_only():
    net = [returns_of(1, 200, seed) for seed in range(4)]

    def on(seeds, shift=0.0):
        return [drawn_from(net[seed] + shift, seed, panel=str(seed)) for seed in seeds]

    draws = Draws({"a": on((0, 1)), "b": on((2, 3)), "c": on((1, 2), 1e-4)}, 100, 0)
    assert draws.paired_seeds and draws.better("a", "b") is None
    assert draws.better("c", "a") == draws.better("c", "b") == 1.0  # seeds 1 and 2


def test_joined_folds_are_replayed_fold_by_fold(tmp_path):
    prices = write_prices(tmp_path / "prices.csv", 50 * np.exp(wandering(500).cumsum(axis=0)))
    parts = [baseline(tmp_path / str(k), "momentum", market=prices, folds=3, fold=k) for k in range(3)]
    (whole,) = rundirs.join_folds(parts)
    found = replay.replay(whole)
    for name, frame in found.items():
        single = pd.concat([replay.replay(part)[name] for part in parts], ignore_index=True)
        pd.testing.assert_frame_equal(frame, single)
    labels = replay.regimes(whole)
    assert {len(mask) for mask in labels.values()} == {len(whole.ledger)}
    trend = np.concatenate([replay.regimes(part)["bull"] for part in parts])
    assert np.array_equal(labels["bull"], trend), "the trend needs no quantile of the bars that are scored"
    whole.name = "momentum"
    out = replay.stress({"momentum": [whole]}, 50, 0)
    assert len(out["sensitivity"]["momentum"]) == len(replay.MULTIPLES) and out["regimes"]["sharpe"]
