"""The market rebuilt from a dataset's meta: the same panel, splits, spaces and backtests to the last bit, or why not."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, assert_same_bits, make_env, random_actions, rollout
from scripts import SCRIPTS, assert_same_ledger, prices

from envs import ledger, portfolio_references, references
from envs.dataset import Dataset, DatasetError
from envs.dataset_writer import log_episodes
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.portfolio import RegimeGuard
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import load_market
from envs.task import Task, describe_task, provenance
from envs.trading_tables import TradingConfig

GP = "synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2"
GUARDED = RegimeGuard(guard_drawdown=0.02, guard_scale=0.4, guard_turnover=0.3)
# name -> env_id, arguments of the script, options of its environment
CASES = {
    "lookbacks": (
        "LeadLag-v0", {"market": SMALL, "seed": 4, "leadlag": LeadLagConfig(max_lookback=60, num_lookbacks=5, gross=1.5)},
        {"actions": "hybrid", "max_jump": 1, "episode_length": 40},
    ),
    "lookbacks of prices": (
        "LeadLag-v0",
        {
            "market": "wide.csv", "symbols": ("C4", "C0", "C1", "C2", "C5"), "start": "2020-02-01", "end": "2020-10-01",
            "folds": 2, "fold": 1, "embargo": 3, "leadlag": LeadLagConfig(max_lookback=20, num_lookbacks=3, costs="retail"),
        },
        {"actions": "absolute", "max_jump": 0, "episode_length": 20},
    ),
    "weights": (
        "Portfolio-v0",
        {
            "market": GP, "seed": 2, "portfolio": PortfolioConfig(
                costs="zero:quadratic_impact_bps=75", constraints="long_short", orders="change", gross=3.0, net=0.5, scale=0.5),
        },
        {
            "guard": GUARDED, "cvar_alpha": 0.1, "episode_length": 30,
            "reward_weights": {"log_growth": 1.0, "differential_sharpe": 0.0, "turnover": 0.1, "variance": 4.5},
        },
    ),
    "weights of prices": (
        "Portfolio-v0",
        {
            "market": "prices.csv", "symbols": ("C3", "C0", "C5"), "columns": ("forecast",), "series": "macro.csv",
            "series_lag": 2, "resample": "2D", "train_fraction": 0.65, "val_fraction": 0.15, "embargo": 1,
            "portfolio": PortfolioConfig(leverage=True, gross=2.0, groups="groups.csv", group_cap=0.9, fill="same_close"),
        },
        {"guard": RegimeGuard(), "episode_length": 0, "cvar_alpha": 0.05},
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with prices of six symbols, a forecast for each, a macro series, and groups."""
    monkeypatch.chdir(tmp_path)
    wide = prices(bars=400)
    wide.to_csv("wide.csv")
    long = wide.stack().rename("close").reset_index().rename(columns={"level_1": "symbol", "date": "timestamp"})
    long.assign(forecast=np.sin(np.arange(len(long)))).to_csv("prices.csv", index=False)
    pd.DataFrame({"published": wide.index[::7], "rate": np.arange(len(wide.index[::7]))}).to_csv("macro.csv", index=False)
    pd.DataFrame({"symbol": wide.columns, "group": list("aabbcc")}).to_csv("groups.csv", index=False)
    return tmp_path


def described(case):
    """What a script says of its market, as JSON gives it back, and the script's arguments and options."""
    env_id, given, options = CASES[case]
    script = "ppo_leadlag" if env_id == "LeadLag-v0" else "ppo_portfolio"
    args = SCRIPTS[script].module.Args(**given)
    config = args.leadlag if env_id == "LeadLag-v0" else args.portfolio
    return json.loads(json.dumps(describe_task(env_id, args, config, **options))), args, options


def built(args, options):
    """Panel, splits and tables as the scripts make them."""
    own = {} if hasattr(args, "leadlag") else {name: getattr(args, name) for name in ("columns", "series", "series_lag")}
    panel = load_market(
        args.market, args.seed, symbols=args.symbols or None, start=args.start, end=args.end, resample=args.resample, **own
    )
    splits = panel.split(args.train_fraction, args.val_fraction, args.embargo) if not args.folds else None
    splits = splits or panel.walk_forward(args.folds, val_fraction=args.val_fraction, embargo=args.embargo)[args.fold]
    data = LeadLagData(panel, args.leadlag) if hasattr(args, "leadlag") else PortfolioData(panel, args.portfolio)
    return panel, splits, data


def policy(obs, mask, rows):
    """Something that depends on all that is seen."""
    if mask is None:
        return None
    return np.where(mask, np.sin(10.0 * obs.sum(axis=1, keepdims=True) + np.arange(mask.shape[1])), -9.0).argmax(axis=1)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_market(case, folder):
    task, args, options = described(case)
    panel, splits, data = built(args, options)
    found = Task(task, panel.sha256)
    assert (found.env_id, found.panel.sha256, found.panel.symbols) == (task["env_id"], panel.sha256, panel.symbols)
    assert list(found.splits) == list(splits) == ["train", "val", "test"]
    for name, split in splits.items():
        assert_same_bits(found.splits[name].ranges, split.ranges)
    assert json.dumps(found.describe()["market"]) == json.dumps(data.describe())
    assert found.describe()["panel"] == ledger.describe_panel(panel, splits)

    envs = make_env(data, 3, split=splits["train"], **options)
    again = found.make(3)
    assert again.single_observation_space == envs.single_observation_space
    assert again.single_action_space == envs.single_action_space
    actions = random_actions(envs, 60)
    for name, values in rollout(envs, actions).items():
        assert_same_bits(rollout(found.make(3), actions)[name], values, name)
    assert found.make(2, "val", episode_length=7).episode_length == 7

    width = envs.single_action_space.shape
    act = policy if not width else lambda obs, mask, rows: np.sin(10.0 * obs[:, : width[0]] + rows[:, None]).astype(np.float32)
    terms = {name: value for name, value in options.items() if name != "episode_length"}
    module = references if task["env_id"] == "LeadLag-v0" else portfolio_references
    for split in ("val", "test"):
        frame = module.run(data, splits[split], act, **terms)
        assert_same_ledger(found.run(split, act), frame)
        assert len(set(frame["net_return"])) > len(frame) / 2
        risk_aversion = 1.0 + 2.0 * options.get("reward_weights", {}).get("variance", 0.0)
        net, years = frame["net_return"], panel.bars_per_year
        expected = (net.mean() - 0.5 * risk_aversion * net.var(ddof=1)) * years
        if task["env_id"] == "LeadLag-v0":
            expected = np.log1p(net).mean() * years
        assert found.score(frame) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", ["lookbacks", "weights"])
def test_the_references_are_those_of_the_script(case, folder):
    task, args, options = described(case)
    _, splits, data = built(args, options)
    found = Task(task).compare(5)
    if case == "lookbacks":
        expected = references.references(data, splits, 5)
    else:
        expected = portfolio_references.references(data, splits["test"], 10.0)
    assert list(found) == list(expected)
    for name in expected:
        assert_same_ledger(found[name], expected[name])


def logged(path, case, **meta):
    """A dataset of the case's market; `meta` replaces what is said of it."""
    task, args, options = described(case)
    panel, splits, data = built(args, options)
    envs = make_env(data, 2, split=splits["train"], **options)
    said = provenance(task, panel.sha256, {}, None, 0.9, [{"policy": "none"}]) | meta
    log_episodes(path / "d.hdf5", envs, lambda *_: (envs.action_space.sample() * 0, None), 1, said, 0)
    return Dataset(path / "d.hdf5")


def test_a_dataset_says_where_it_comes_from(folder):
    data = logged(folder, "weights of prices")
    task = Task.of(data)
    assert task.panel.sha256 == data.meta["panel_sha256"] and task.panel.symbols == ("C3", "C0", "C5")
    assert task.options == {"guard": RegimeGuard(), "episode_length": 0, "cvar_alpha": 0.05}
    assert task.make(1).single_action_space == data.action_space
    assert (data.meta["env_id"], data.meta["split"], data.meta["reward_scale"]) == ("Portfolio-v0", "train", 1.0)


@pytest.mark.parametrize("meta", [{"task": None}, {"task": {"env_id": "Pendulum-v1", "seed": 1}}], ids=["none", "Gymnasium"])
def test_data_of_no_market_has_no_task(folder, meta):
    assert Task.of(logged(folder, "weights", **meta)) is None


def test_another_panel_is_refused(folder):
    data = logged(folder, "lookbacks of prices")
    Task.of(data)
    wide = pd.read_csv("wide.csv")
    wide.loc[100, "C4"] *= 1.01
    wide.to_csv("wide.csv", index=False)
    with pytest.raises(DatasetError, match=f"d.hdf5: market wide.csv: sha256 .*: expected {data.meta['panel_sha256']}"):
        Task.of(data)
    (folder / "wide.csv").unlink()
    with pytest.raises(DatasetError, match="d.hdf5: .*wide.csv.*no such file"):
        Task.of(data)


def without(name):
    return lambda task: task.pop(name)


def put(value, *keys):
    def change(task):
        for key in keys[:-1]:
            task = task[key]
        task[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        *((without(name), rf"missing \['{name}'\]") for name in (
            "market", "seed", "symbols", "start", "end", "resample", "train_fraction", "val_fraction", "embargo", "folds",
            "fold", "config", "options",
        )),
        (without("env_id"), r"env_id None: expected one of \['LeadLag-v0', 'Portfolio-v0'\]"),
        (put("Futures-v0", "env_id"), "env_id 'Futures-v0': expected one of"),
        (put(2, "config", "lookback"), "lookback"),
        (put("free", "config", "costs"), "free.*institutional"),
        (put("both", "config", "constraints"), "constraints='both': expected long_only"),
        (put(3, "options", "leverage"), "leverage"),
        (put(1.5, "options", "cvar_alpha"), "cvar_alpha=1.5"),
        (put({"profit": 1.0}, "options", "reward_weights"), "reward_weights: .*profit"),
        (put(2.0, "options", "guard", "guard_scale"), "guard_scale=2.0"),
        (put(1, "options", "guard", "guard_volume"), "guard_volume"),
        (put("long", "options", "episode_length"), "task: "),
        (put("synthetic:nonsense", "market"), "nonsense"),
        (lambda task: task.update(folds=2, fold=2), "fold 2: expected 0 to 1"),
        (lambda task: task.update(folds=2, fold=-1), "fold -1: expected 0 to 1"),
    ],
)  # fmt: skip
def test_a_task_that_is_none_is_refused(change, message):
    task, *_ = described("weights")
    Task(task)
    change(task)
    with pytest.raises(ValueError, match=message):
        Task(task)


def test_what_is_wrong_with_a_task_is_said_of_the_dataset(folder):
    task, *_ = described("weights")
    del task["embargo"]
    with pytest.raises(DatasetError, match=r"d.hdf5: task: missing \['embargo'\]"):
        Task.of(logged(folder, "weights", task=task))
    with pytest.raises(DatasetError, match="env_id 'Futures-v0': expected one of"):
        Task.of(logged(folder / "other", "weights", task=task | {"env_id": "Futures-v0"}))


def test_a_script_without_a_flag_is_no_market():
    class Args:
        market, seed = SMALL, 1

    with pytest.raises(AttributeError, match="symbols"):
        describe_task("LeadLag-v0", Args, LeadLagConfig())


def test_a_market_that_cannot_be_rebuilt_is_refused_before_its_data_are_logged():
    with pytest.raises(ValueError, match="env_id 'Trading-v0': its data cannot be logged; expected one of .*LeadLag-v0"):
        describe_task("Trading-v0", None, TradingConfig())
