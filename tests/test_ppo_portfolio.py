"""algos/ppo_portfolio.py: what it alone does: weights, guards, markets with a closed form, a Gaussian policy."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_python
from scipy.stats import kstest
from scripts import SCRIPTS, Bandit, Run, Toy, actions_of, candles, prices
from torch.distributions import Independent, Normal

from envs import ledger
from envs.costs import RECORD, RUIN
from envs.portfolio import GUARDS
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import make_panel

pytest_plugins = ["scripts"]


@pytest.fixture
def script():
    return SCRIPTS["ppo_portfolio"]


# --- what a run leaves behind


def test_the_ledgers_actions_are_the_weights_that_were_ordered(script, base):
    """Ordering them again, without agent, constraints and guards, earns the same; and they are within the constraints."""
    panel = make_panel(script.market, seed=1)
    data = PortfolioData(panel, PortfolioConfig(**base.json["args"]["portfolio"]))
    for name, split in panel.split().items():
        part = base.ledger[base.ledger["split"] == name].reset_index(drop=True)
        market, targets = data.market(split), np.full((panel.num_bars, panel.num_symbols), np.nan)
        for r, start in enumerate(market.starts):
            weights = actions_of(part[part["market"] == r])
            targets[start : start + len(weights)] = weights
        again = ledger.backtest_weights(panel, data.execution, market.rates, split, targets, market.starts)
        assert (again[["market", "timestamp"]] == part[["market", "timestamp"]]).all(axis=None)
        np.testing.assert_allclose(part[list(RECORD)], again[list(RECORD)], rtol=1e-9, atol=1e-12)
    weights = actions_of(base.ledger)
    largest, gross = np.abs(weights).max(axis=1), np.abs(weights).sum(axis=1)
    assert largest.max() == pytest.approx(0.8) and gross.max() <= 2 + 1e-9 and weights.min() < 0


@pytest.fixture
def reported(base, inside, tmp_path):
    """Variables of the script after it has reported on the short run once more."""
    return inside("--resume", str(shutil.copytree(base.folder, tmp_path / "copy")))


def test_the_guards_are_compared_with_none(base, reported):
    run, years = base.json, base.json["panel"]["bars_per_year"]
    guarded, free = reported["compared"]["agent"], reported["compared"]["without guard"]
    guard, scores = run["guard"], run["scores"]["test"]
    assert guard["growth_gained"] == pytest.approx(scores["agent"]["growth"] - scores["without guard"]["growth"], abs=1e-12)
    gain, low, high, how = ledger.difference(guarded, free, years)
    assert (guard["growth_gained"], guard["low"], guard["high"], guard["bootstrap"]) == (gain, low, high, how)
    assert low < gain < high
    test = base.ledger[base.ledger["split"] == "test"]
    assert list(guard["hit_rates"]) == ["guard_drawdown", "guard_turnover"]
    for name, rate in guard["hit_rates"].items():
        assert 0 < rate < 1 and rate == test[name].mean()
    assert set(np.unique(base.ledger[list(GUARDS)])) == {0, 1} and not base.ledger["guard_return"].any()
    assert not free[list(GUARDS)].any(axis=None)
    # the same agent, alike until a guard first fires
    for (_, a), (_, b) in zip(guarded.groupby("market"), free.groupby("market")):
        fired = a[list(GUARDS)].any(axis=1).to_numpy().argmax()
        same = (actions_of(a) == actions_of(b)).all(axis=1)
        assert same[:fired].all() and not same[fired]
    out = base.done.stdout
    assert f"growth {gain:+.2%} a year against none, 95% interval [{low:.2%}, {high:.2%}]" in out
    assert all(f"{name} {rate:.1%}" in out for name, rate in guard["hit_rates"].items())


def test_utility_and_exposure_as_shares_of_the_closed_forms(base, reported):
    """At the risk aversion that the reward has: 1 of the logarithm, and twice 19.5."""
    run, years, utilities = base.json, base.json["panel"]["bars_per_year"], {}
    for name, frame in reported["compared"].items():
        r = frame["net_return"].to_numpy()
        utilities[name] = (r.mean() - 20 * r.var(ddof=1)) * years
        assert run["scores"]["test"][name]["utility"] == pytest.approx(utilities[name], rel=1e-9)
        assert f"{utilities[name]:.1%}" in re.search(rf"^{name}  .*$", base.done.stdout, re.MULTILINE)[0]
    assert utilities["closed form"] == max(utilities.values()) > 0
    assert run["utility_share"] == pytest.approx(utilities["agent"] / utilities["closed form"], rel=1e-9)
    exposure = {name: reported["compared"][name]["net_exposure"].mean() for name in ("agent", "closed form")}
    assert min(frame["equity"].min() for frame in reported["compared"].values()) > RUIN
    assert run["mean_net_exposure"] == pytest.approx(exposure, rel=1e-9)
    line = f"is {run['utility_share']:.3f} of the closed form's; mean net exposure {exposure['agent']:.3f}, closed form"
    assert line in base.done.stdout and "risk aversion 40 " in base.done.stdout
    # the best score on the validation split is that of the model that is reported
    val = base.ledger.query("split == 'val'")["net_return"]
    assert base.json["val_utility"] == pytest.approx((val.mean() - 20 * val.var(ddof=1)) * years, rel=1e-9)


def test_a_market_from_files_with_forecasts_news_and_sectors(script, inside, tmp_path):
    bars = candles()
    bars["Forecast"] = np.random.default_rng(5).standard_normal(len(bars))
    bars.to_csv(tmp_path / "bars.csv", index=False)
    days = pd.to_datetime(bars["timestamp"].unique())
    pd.DataFrame({"published": days[::7], "mood": np.arange(len(days[::7]))}).to_csv(tmp_path / "news.csv", index=False)
    symbols = sorted(bars["symbol"].unique())
    pd.DataFrame({"symbol": symbols, "group": ["a", "b"] * 3}).to_csv(tmp_path / "groups.csv", index=False)
    options = ["--market", str(tmp_path / "bars.csv"), "--columns", "Forecast", "--series", str(tmp_path / "news.csv")]
    options += ["--groups", str(tmp_path / "groups.csv"), "--group-cap", "0.5", "--leverage", "--gross", "1.4"]
    options += ["--reward", "sharpe", "--penalty-turnover", "0.1", "--penalty-cvar", "0.2", "--cvar-alpha", "0.1"]
    g = inside(*script.budget, *options, "--total-timesteps", "4096")
    run = Run(g["run_dir"])
    market = run.json["market"]
    assert market["fill"] == "next_open" and market["costs"]["name"] == "institutional" and market["constraints"] == "long_only"
    assert set(market["extras"]) == {"Forecast", "mood"} and "Forecast" in market["features"]
    assert market["group_names"] == ["a", "b"]
    assert list(run.json["scores"]["test"]) == ["agent", "equal weight"]  # no guard, and nobody knows the best
    assert not {"guard", "utility_share", "mean_net_exposure"} & set(run.json)
    assert g["num_actions"] == len(symbols) + 2  # cash and leverage
    env = g["train_envs"].unwrapped
    expected = {"log_growth": 0, "differential_sharpe": 1, "turnover": 0.1, "drawdown": 0, "cvar": 0.2, "variance": 0}
    assert env.reward_weights == expected and env.cvar_alpha == 0.1
    frame = run.ledger
    assert tuple(frame.columns) == script.columns and not frame.drop(columns="action").isna().any().any()
    weights = actions_of(frame)
    assert weights.min() >= 0 and weights.shape[1] == len(symbols)
    for members in (slice(0, None, 2), slice(1, None, 2)):
        assert weights[:, members].sum(axis=1).max() <= 0.5 + 1e-9
    ends = frame.groupby("split")["timestamp"].agg(["min", "max"])
    assert ends.loc["train", "max"] < ends.loc["val", "min"] < ends.loc["val", "max"] < ends.loc["test", "min"]


def test_gaps_in_closes_from_a_csv_file(script, inside, tmp_path):
    """A symbol is not ordered before its first bar, nor after its last; long only without leverage holds at most 1."""
    wide = prices()
    wide.iloc[:150, 2] = np.nan
    wide.iloc[180:, 4] = np.nan
    wide.to_csv(tmp_path / "closes.csv")
    run = Run(inside(*script.budget, "--market", str(tmp_path / "closes.csv"), "--start", "2020-01-15")["run_dir"])
    assert run.json["market"]["fill"] == "next_close" and run.json["panel"]["symbols"] == list(wide.columns)
    assert run.json["panel"]["splits"]["train"]["start"] >= "2020-01-15" and run.json["args"]["start"] == "2020-01-15"
    frame = run.ledger
    weights, listed = actions_of(frame), frame["timestamp"] >= wide.index[151]  # marked one bar after it was decided
    assert not weights[~listed, 2].any() and weights[listed, 2].all()
    assert weights.min() >= 0 and weights.sum(axis=1).max() <= 1 + 1e-9
    assert frame["timestamp"].max() == wide.index[-1]


# --- markets with a closed form


@pytest.mark.parametrize(
    "market, options, changed",
    [
        ("garleanu-pedersen:train=1:val=1:test=1:bars=300", [], {}),
        (
            "garleanu-pedersen:train=1:val=1:test=1:bars=300",
            ["--costs", "retail", "--gross", "2", "--penalty-variance", "2"],
            {"costs": "retail", "gross": 2.0, "penalty_variance": 2.0},
        ),
        ("merton:train=1:val=1:test=1:bars=300", [], {}),
        (
            "merton:train=1:val=1:test=1:bars=300",
            ["--constraints", "long_only", "--gamma", "0.5"],
            {"constraints": "long_only", "gamma": 0.5},
        ),
        ("noise:train=1:val=1:test=1:bars=300", [], {}),
    ],
)
def test_known_markets_bring_settings_that_flags_override(script, inside, market, options, changed):
    g = inside("--market", f"synthetic:{market}", *options, *script.budget, "--total-timesteps", "1024")
    found = dataclasses.asdict(g["args"])
    found |= found.pop("portfolio")
    defaults = dataclasses.asdict(script.module.Args())
    expected = {**defaults, **defaults.pop("portfolio")}
    if market.startswith("garleanu"):
        expected |= {"costs": "zero:quadratic_impact_bps=75", "orders": "change", "gross": 10.0, "asset_cap": 10.0}
        expected |= {"constraints": "long_short", "scale": 0.5, "penalty_variance": 19.5}
    elif market.startswith("merton"):
        expected |= {"costs": "zero", "constraints": "long_short", "gross": 2.0, "asset_cap": 2.0, "scale": 0.5}
        expected |= {"gamma": 0.0, "log_std": 0.0}
    expected |= changed
    given = {"market", "total_timesteps", "num_envs", "num_steps", "eval_every", "checkpoint_every", "num_threads", "cuda"}
    for name in expected.keys() - given - {"portfolio", "runs_dir", "exp_name"}:
        assert found[name] == expected[name], name
    assert ("utility_share" in g["run"]) == (not market.startswith("noise"))
    assert g["risk_aversion"] == 1 + 2 * expected["penalty_variance"]


# --- what goes wrong


@pytest.mark.parametrize(
    "options, words",
    [
        (["--reward", "alpha"], ("--reward alpha", "growth or sharpe")),
        (["--constraints", "foo"], ("constraints='foo'", "long_only or long_short")),
        (["--orders", "limit"], ("orders='limit'", "target", "change")),
        (["--asset-cap", "0"], ("asset_cap=0", "positive")),
        (["--gross", "-1"], ("gross=-1", "positive")),
        (["--overnight-gross", "3"], ("overnight_gross=3", "gross=2")),
        (["--net", "-1"], ("net=-1", "positive")),
        (["--constraints", "long_only", "--net", "0"], ("net=0", "long_short")),
        (["--group-cap", "0"], ("group_cap=0", "positive")),
        (["--groups", "missing.csv"], ("--groups missing.csv", "No such file")),
        (["--guard-probe", "2"], ("guard_probe=2", "0 to 1")),
        (["--guard-scale", "-0.5"], ("guard_scale=-0.5", "0 to 1")),
        (["--guard-drawdown", "1.5"], ("guard_drawdown=1.5", "0 to 1")),
        (["--guard-window", "0"], ("guard_window=0", "from 1")),
        (["--cvar-alpha", "0"], ("cvar_alpha=0", "fraction")),
        (["--series", "missing.csv"], ("--series", "synthetic market")),
        (["--columns", "forecast"], ("--columns", "synthetic market")),
        (["--market", "sp500", "--series", "missing.csv"], ("missing.csv", "no such file")),
        (["--market", "sp500", "--series", "news.txt"], ("news.txt", r"\.csv or \.parquet")),
        (["--market", "sp500", "--columns", "forecast"], ("forecast", "sp500")),
        (["--market", "synthetic:garleanu"], ("synthetic:garleanu", "unknown", "garleanu-pedersen")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line


# --- the Gaussian policy


def test_log_density_and_entropy_are_those_of_independent_normals(script):
    torch.manual_seed(0)
    agent = script.module.Agent(3, 5, -1.0)
    assert agent.log_std.tolist() == [-1.0] * 5
    with torch.no_grad():
        agent.log_std.copy_(torch.linspace(-2, 1, 5))
    mean = torch.randn(200, 5, requires_grad=True)
    actions = 3 * torch.randn(200, 5)
    expected = Independent(Normal(mean, agent.log_std.exp()), 1)
    found = agent.log_prob(mean, actions)
    torch.testing.assert_close(found, expected.log_prob(actions), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(agent.entropy().expand(200), expected.entropy(), rtol=1e-6, atol=1e-6)
    inputs = (mean, agent.log_std)
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs, retain_graph=True) for y in (found, expected.log_prob(actions)))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    double = agent.double()
    exact = Independent(Normal(mean.double(), double.log_std.exp()), 1).log_prob(actions.double())
    torch.testing.assert_close(double.log_prob(mean.double(), actions.double()), exact, rtol=1e-12, atol=1e-12)


def test_actions_are_kept_as_drawn_and_stepped_as_clipped(script, inside, register):
    """Draws from the policy's normal distribution, half of them beyond the action space, which the toy would refuse."""
    toy = [*register(Toy, script.toy), *script.toy_options, "--num-envs", "8", "--num-steps", "256"]
    g = inside(*toy, "--learning-rate", "0", "--num-minibatches", "1", "--total-timesteps", "2048")
    actions, x = g["actions"].double(), g["x"][:-1]
    with torch.no_grad():
        mean = g["agent"].actor(x).double()
    std = g["agent"].log_std.detach().exp().double()
    assert std.tolist() == pytest.approx([np.exp(0.5)] * 2)
    assert 0.4 < (actions.abs() > 1).double().mean() < 0.7
    z = ((actions - mean) / std).reshape(-1, 2).numpy()
    for draws in (z.ravel(), z.sum(axis=1) / np.sqrt(2), (z[::2] - z[1::2]).ravel() / np.sqrt(2)):
        assert kstest(draws, "norm").pvalue > 1e-3
    density = Normal(mean, std).log_prob(actions).sum(-1)
    np.testing.assert_allclose(g["logprobs"].numpy(), density.numpy(), atol=1e-5)
    walked = (actions.clamp(-1, 1).sum(2) - g["rewards"].double()).numpy() / 0.3  # the toy's reward, solved for its step
    np.testing.assert_allclose(walked, walked.round(), atol=1e-5)
    assert set(np.unique(walked.round())) == {1, 2, 3, 4, 5}


def test_the_final_evaluation_plays_the_mean_action(script, inside, register):
    g = inside(
        *register(Bandit, script.toy), "--num-envs", "8", "--num-steps", "256", "--gamma", "0", "--learning-rate", "0.003",
        "--num-minibatches", "4", "--total-timesteps", str(4 * 2048), "--eval-episodes", "11", "--log-std", "1",
    )  # fmt: skip
    agent = g["agent"]
    assert float(agent.norm.count) == pytest.approx(4 * 2048, abs=1e-3)  # evaluation adds nothing to it
    with torch.no_grad():
        action = agent.actor(agent.norm(torch.tensor([[0.5, -0.5]])))[0].numpy().clip(-1, 1)
    assert g["run"]["eval_return"] == pytest.approx(-50 * np.square(action - 0.5).sum(), rel=1e-4)
    assert len(g["returns"]) == 16 and g["run"]["eval_return"] > g["run"]["last_100_returns"] + 10
    assert json.loads((g["run_dir"] / "run.json").read_text())["eval_return"] == g["run"]["eval_return"]


def test_torch_keeps_to_the_threads_that_were_asked_for(script, tmp_path):
    """In a process of its own: where both use one OpenMP, Numba sets the number of torch's threads as it starts."""
    options = [*script.short, "--total-timesteps", "1024", "--num-threads", "1", "--no-cuda", "--runs-dir", str(tmp_path)]
    code = (
        f"import runpy, sys; sys.argv = {[str(script.path), *options]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "import torch; print('threads', torch.get_num_threads())"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "threads 1"
