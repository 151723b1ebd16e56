"""Does it learn? Markets whose answer is known, and classic control against published results. Minutes each: -m slow."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import DATA, run_python
from scripts import SCRIPTS, actions_of

from envs import portfolio_references, references
from envs.leadlag_tables import LeadLagData
from envs.ledger import growth
from envs.synthetic import load_market

LEADLAG, PORTFOLIO, DIFFMARKET, QUANTILE = "ppo_leadlag", "ppo_portfolio", "grpo_diffmarket", "ppo_quantile_portfolio"
RECURRENT, TRANSFORMER, RL2 = "ppo_recurrent_leadlag", "ppo_transformer_trading", "rl2_leadlag"
HIERARCHICAL = "ppo_hierarchical_trading"
MAML = "maml_leadlag"
TAIL = ("--market", "synthetic:tail", "--total-timesteps", "4000000")
SMALL_BUDGET = ("--total-timesteps", "65536", "--num-envs", "256", "--num-steps", "16", "--eval-every", "4")
SECONDS = 3600

pytestmark = pytest.mark.slow


def train(script, tmp_path, *options) -> dict:
    """run.json of a run of a script on one thread."""
    done = run_python(str(SCRIPTS[script].path), *options, "--num-threads", "1", "--runs-dir", str(tmp_path), timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    assert (folder / "model.pt").exists()
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("seed", range(1, 6))
def test_captures_the_planted_signal_on_every_seed(tmp_path, seed):
    run = train(LEADLAG, tmp_path, "--market", "synthetic:leadlag", "--seed", str(seed))
    assert run["capture"] >= 0.70


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_gap_to_capture_is_no_accident(seed):
    """Regime oracle less best fixed lookback, over the 20 test markets of the default: at least 3 standard errors."""
    panel = load_market("synthetic:leadlag", seed)
    frames = references.references(LeadLagData(panel), panel.split(), seed)
    by_market = {name: frame.assign(growth=growth(frame)).groupby("market")["growth"].mean() for name, frame in frames.items()}
    best = max((name for name in frames if name.startswith("lookback")), key=lambda name: by_market[name].mean())
    gap = (by_market["oracle regime"] - by_market[best]).to_numpy()
    assert len(gap) == 20
    assert gap.mean() >= 3 * gap.std(ddof=1) / np.sqrt(20), f"{best}: {gap.mean() / gap.std(ddof=1) * np.sqrt(20):.2f}"


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_memory_captures_what_only_history_reveals(tmp_path, seed):
    """The same networks without a memory see one bar's news, which is right in 0.66 of cases."""
    found = {}
    for memory in ("lstm", "none"):
        found[memory] = train(RECURRENT, tmp_path / memory, "--memory", memory, "--seed", str(seed))["capture"]
    assert found["lstm"] >= 0.5 and found["lstm"] >= found["none"] + 0.2, found


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_memory_balances_the_pole_without_velocities(tmp_path, seed):
    """rl-zoo with sb3-contrib: 500 after 100k steps. Who remembers nothing must fail."""
    found = {}
    for memory in ("lstm", "none"):
        options = ["--env-id", "CartPole-v1", "--observed", "0", "2", "--memory", memory, "--seed", str(seed)]
        found[memory] = train(RECURRENT, tmp_path / memory, *options)["eval_return"]
    assert found["lstm"] >= 450 and found["none"] < 200, found


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_memory_learns_to_explore_bandits(tmp_path, seed):
    """Duan et al. (2016), of ten pulls of five arms: RL^2 6.7, Gittins' index 6.6, Thompson sampling 5.7, chance 5.0."""
    run = train(RL2, tmp_path, "--env-id", "Bandits-v0", "--seed", str(seed))
    stages = [stage["mean"] for stage in run["adaptation"]["stages"]]
    assert run["eval_return"] >= 6.3 and stages[0] < 0.56, stages
    assert run["adaptation"]["transfer_gain"]["low"] > 0.05


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("tasks", ["bull-bear", "mixed"])
def test_a_memory_of_earlier_episodes_is_worth_something_on_held_out_tasks(tmp_path, tasks, seed):
    run = train(RL2, tmp_path, "--market", tasks, "--seed", str(seed))
    assert run["adaptation"]["transfer_gain"]["low"] > 0 and run["adaptation"]["completion"] >= 0.98
    assert run["probe"]["regime"][3] > 0.7


@pytest.mark.parametrize("seed", range(1, 4))
def test_finds_nothing_where_there_is_nothing(tmp_path, seed):
    agent = train(LEADLAG, tmp_path, "--market", "synthetic:noise", "--seed", str(seed))["scores"]["test"]["agent"]
    assert agent["gross_sharpe_low"] <= 0 <= agent["gross_sharpe_high"]
    assert agent["sharpe"] < agent["gross_sharpe"] and agent["cost"] > 0


@pytest.mark.parametrize("seed", range(1, 6))
def test_earns_most_of_the_utility_of_garleanu_and_pedersen(tmp_path, seed):
    run = train(PORTFOLIO, tmp_path, "--market", "synthetic:garleanu-pedersen", "--seed", str(seed))
    assert run["utility_share"] >= 0.90


@pytest.mark.parametrize("seed", range(1, 4))
def test_holds_the_merton_fraction(tmp_path, seed):
    """0.6: the drift of 0.006 over the squared volatility of 0.1."""
    exposure = train(PORTFOLIO, tmp_path, "--market", "synthetic:merton", "--seed", str(seed))["mean_net_exposure"]
    assert exposure["closed form"] == pytest.approx(0.6, rel=0.01)
    assert exposure["agent"] == pytest.approx(0.6, rel=0.10)


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_mean_of_quantiles_is_as_good_a_baseline(tmp_path, seed):
    run = train(QUANTILE, tmp_path, "--market", "synthetic:garleanu-pedersen", "--seed", str(seed))
    assert run["utility_share"] >= 0.90


@pytest.mark.parametrize("form", [("--risk", "iterated"), ("--horizon", "1")])
def test_the_choice_flips_at_the_computed_level(tmp_path, form):
    """Of one bar, where both forms have the same answer: a quarter below that level no crash is risked, a quarter above all."""
    flip = portfolio_references.tail_flip(load_market("synthetic:tail", 1), 1)
    held = {}
    for factor in (0.8, 1.25):
        options = [*TAIL, *form, "--cvar-alpha", f"{factor * flip:.3f}"]
        held[factor] = train(QUANTILE, tmp_path / str(factor), *options)["tail"]
    assert all(tail["flip"] == pytest.approx(flip) for tail in held.values())
    assert held[0.8]["crashing_weight"] < 0.2 and held[1.25]["crashing_weight"] > 0.8


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_tail_is_better_than_of_an_agent_that_maximises_the_mean(tmp_path, seed):
    """CVaR at a tenth of ten bars' growth, on test histories; what it costs in the mean is printed. Held are the bounds of the
    market: steady growth is 3%, the crashing symbol's mean 7.8%."""
    found = {}
    for script, more in ((PORTFOLIO, ()), (QUANTILE, ("--cvar-alpha", "0.1"))):
        train(script, tmp_path / script, *TAIL, "--seed", str(seed), *more)
        (folder,) = (tmp_path / script).iterdir()
        test = pd.read_parquet(folder / "ledger.parquet").query("split == 'test'")
        growths = portfolio_references.episode_returns(test, 10)
        found[script] = portfolio_references.cvar(growths, 0.1), growths.mean()
    (plain, mean), (averse, steady) = found[PORTFOLIO], found[QUANTILE]
    print(f"seed {seed}: CVaR {averse:.2%} instead of {plain:.2%}, at a price of {mean - steady:.2%} in the mean of {mean:.2%}")
    assert plain < -0.02 and averse > 0.027
    assert mean > 0.07 and steady > 0.027


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("estimator, least", [("pathwise", 0.97), ("grpo", 0.90)])
def test_both_gradients_find_the_policy_of_garleanu_and_pedersen(tmp_path, estimator, least, seed):
    run = train(DIFFMARKET, tmp_path, "--estimator", estimator, "--seed", str(seed))
    assert run["utility_share"] >= least


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("estimator", ["pathwise", "grpo"])
def test_both_gradients_hold_the_merton_fraction(tmp_path, estimator, seed):
    run = train(DIFFMARKET, tmp_path, "--market", "synthetic:merton", "--estimator", estimator, "--seed", str(seed))
    assert run["mean_net_exposure"]["agent"] == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize("seed", range(1, 4))
def test_hedges_with_the_delta_of_black_and_scholes(tmp_path, seed):
    hedge = train(DIFFMARKET, tmp_path, "--market", "synthetic:black-scholes", "--seed", str(seed))["hedge"]
    assert hedge["delta RMS error"] <= 0.02 and hedge["hedged"] < 0.15 * hedge["unhedged"]


@pytest.mark.parametrize("seed", range(1, 6))
def test_earns_most_of_what_the_optimal_band_does(tmp_path, seed):
    """That of dynamic programming, which is told the true deviation; on markets that training never saw."""
    run = train(TRANSFORMER, tmp_path, "--market", "synthetic:ou", "--seed", str(seed))
    assert run["optimum_share"] >= 0.85 and run["alarm"] is None
    growth = {name: score["growth"] for name, score in run["scores"]["test"].items()}
    assert growth["threshold at 0"] < 0.8 * growth["optimal band"]  # to buy below and sell above is not enough


@pytest.mark.parametrize("seed", range(1, 4))
def test_trades_little_where_there_is_nothing(tmp_path, seed):
    agent = train(TRANSFORMER, tmp_path, "--market", "synthetic:noise", "--seed", str(seed))["scores"]["test"]["agent"]
    assert agent["gross_sharpe_low"] <= 0 <= agent["gross_sharpe_high"] and agent["growth"] > -0.02


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_gate_knows_its_specialists_on_every_seed(tmp_path, seed):
    """Right in nine bars of ten, more than the best specialist alone, and none of them given up."""
    run = train(HIERARCHICAL, tmp_path, "--market", "synthetic:modes", "--seed", str(seed))
    gate, growths = run["gate"]["test"], {name: score["growth"] for name, score in run["scores"]["test"].items()}
    alone = [growths[f"{name} alone"] for name in gate["usage"]]
    assert gate["accuracy"] > 0.9 and growths["agent"] >= max(alone)
    regime = load_market("synthetic:modes", seed).hidden["best_intent"]
    for k, used in enumerate(gate["usage"].values()):
        assert used >= 0.5 * (regime == k).mean()


@pytest.mark.parametrize("seed", range(1, 4))
def test_two_updates_find_the_way_to_a_goal(tmp_path, seed):
    """2D navigation with less than half of its training, on held-out goals; published after 0, 1, 2: -40.4, -11.7 and -3.3."""
    options = ["--env-id", "Navigation2D-v0", "--total-timesteps", "14400000", "--seed", str(seed)]
    report = train(MAML, tmp_path, *options)["adaptation"]
    found = [stage["mean"] for stage in report["stages"]]
    assert found[0] >= -1.2 * 40.4 and found[1] >= -16.0 and found[2] >= -8.0 and found[3] >= -8.0, found
    assert report["transfer_gain"]["low"] > 15 and report["completion"] == 1.0


@pytest.mark.parametrize("seed", range(1, 4))
def test_guards_gain_nothing_where_there_is_nothing(tmp_path, seed):
    """Without costs, of which a guard would spare some by trading less."""
    guards = ["--guard-drawdown", "0.05", "--guard-return", "-0.02", "--guard-turnover", "0.1"]
    options = ["--market", "synthetic:noise", "--costs", "zero", *guards, *SMALL_BUDGET, "--seed", str(seed)]
    guard = train(PORTFOLIO, tmp_path, *options)["guard"]
    assert guard["low"] <= 0 and guard["low"] < guard["high"]
    assert set(guard["hit_rates"]) == {"guard_drawdown", "guard_return", "guard_turnover"}
    assert max(guard["hit_rates"].values()) > 0.01, "no guard ever fired"


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("env_id, least", [("CartPole-v1", 475), ("Acrobot-v1", -95)])
def test_classic_control_reaches_cleanrls_results(tmp_path, env_id, least, seed):
    """CleanRL's documentation: 490 +- 6 and -86.4 +- 1.3 after 500k steps."""
    run = train(LEADLAG, tmp_path, "--env-id", env_id, "--total-timesteps", "500000", "--seed", str(seed))
    assert run["last_100_returns"] >= least


@pytest.mark.parametrize("seed", range(1, 4))
def test_pendulum_comes_near_rl_zoos_result(tmp_path, seed):
    """rl-zoo: -172 +- 104 after 100k steps, of the mean action as here."""
    assert train(PORTFOLIO, tmp_path, "--env-id", "Pendulum-v1", "--seed", str(seed))["eval_return"] >= -250


def real(market: str) -> str:
    """What `--market` takes."""
    if market == "sp500":
        pytest.importorskip("skfolio", reason="sp500 comes with skfolio, which is not installed")
        return market
    if not (DATA / market).exists():
        pytest.skip(f"no real market data: {DATA / market} is absent (set CLEANMARKETS_DATA)")
    return str(DATA / market)


def check_real(run, names):
    """The scores are numbers, and the splits in order."""
    assert run["status"] == "finished"
    scores = run["scores"]["test"]
    assert names <= set(scores)
    for name, score in scores.items():
        assert (
            score["bars"] > 100 and np.isfinite([score[key] for key in ("growth", "sharpe", "max_drawdown", "cost")]).all()
        ), name
    times = run["panel"]["splits"]
    assert times["train"]["end"] < times["val"]["start"] < times["val"]["end"] < times["test"]["start"]


@pytest.mark.parametrize("market", ["sp500", "crypto_daily_close.csv", "us_equities_daily.parquet", "crypto_hourly.parquet"])
def test_lookbacks_on_real_markets(tmp_path, market):
    run = train(LEADLAG, tmp_path, "--market", real(market), *SMALL_BUDGET)
    assert run["capture"] is None
    check_real(run, {"agent", "best in training", "random", "equal weight"})


@pytest.mark.parametrize("market", ["sp500", "us_equities_daily.parquet"])
def test_every_symbol_of_a_real_market_by_itself(tmp_path, market):
    run = train(TRANSFORMER, tmp_path, "--market", real(market), *SMALL_BUDGET)
    check_real(run, {"agent", "flat", "buy and hold"})
    assert set(run["symbols"]) <= set(run["panel"]["symbols"]) and len(run["symbols"]) > 0.9 * len(run["panel"]["symbols"])
    assert all(0 <= row["win_rate"] <= 1 for row in run["symbols"].values() if row["trades"])


@pytest.mark.parametrize(
    "market, costs",
    [("sp500", "retail"), ("us_equities_daily.parquet", "institutional"), ("crypto_hourly.parquet", "crypto")],
)
def test_portfolios_on_real_markets(tmp_path, market, costs):
    run = train(PORTFOLIO, tmp_path, "--market", real(market), "--costs", costs, *SMALL_BUDGET)
    check_real(run, {"agent", "equal weight"})
    assert run["market"]["costs"]["name"] == costs and "utility_share" not in run
    (folder,) = tmp_path.iterdir()
    frame, symbols = pd.read_parquet(folder / "ledger.parquet"), run["panel"]["symbols"]
    assert tuple(frame.columns) == SCRIPTS[PORTFOLIO].columns and list(frame["split"].unique()) == ["train", "val", "test"]
    assert not frame.drop(columns="action").isna().any(axis=None) and frame["timestamp"].is_monotonic_increasing
    weights = actions_of(frame)
    assert weights.shape == (len(frame), len(symbols)) and weights.min() >= 0 and weights.sum(axis=1).max() <= 1 + 1e-9
    # what is traded costs what the preset says, and some impact; a day in cash and back would be a turnover of 2
    rates = run["market"]["costs"]
    each = 1e-4 * (rates["commission_bps"] + rates["half_spread_bps"] + rates["slippage_bps"])
    for split in ("train", "val", "test"):
        agent = run["scores"][split]["agent"]
        assert 0 < agent["turnover"] < 0.5 * run["panel"]["bars_per_year"]
        assert 0.99 * each <= agent["cost"] / agent["turnover"] <= 1.5 * each
