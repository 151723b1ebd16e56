"""Luck is not skill: overfitting, superior predictive ability, deflation and intervals, on returns whose truth is known."""

import inference
import metrics
import numpy as np
import pandas as pd
import pytest
from arch.bootstrap import SPA
from inference import Selection, probability_of_overfitting, superior_predictive_ability
from paired import Draws
from rundirs import Run
from scipy.stats import norm, trim_mean

from envs import ledger
from envs.costs import RECORD, execution, load_costs
from envs.synthetic import load_market

PER_YEAR = 252.0


def make_run(name: str, returns: np.ndarray, seed: int = 1, panel: str = "p", trials: int = 1) -> Run:
    """A run whose test split holds `returns` (bars,), or (markets, bars)."""
    parts = []
    for market, r in enumerate(np.atleast_2d(returns)):
        frame = pd.DataFrame(np.zeros((len(r), len(RECORD))), columns=list(RECORD))
        frame["gross_return"] = frame["net_return"] = r
        frame["equity"] = np.cumprod(1.0 + r)
        frame.insert(0, "timestamp", pd.date_range("2020-01-01", periods=len(r)))
        frame.insert(0, "market", market)
        parts.append(frame)
    content = {"args": {"seed": seed}, "panel": {"sha256": panel, "bars_per_year": PER_YEAR}, "trials": trials}
    return Run(None, content, ledger=pd.concat(parts, ignore_index=True), name=name)


def noise(seed: int, *shape: int, mean: float = 0.0) -> np.ndarray:
    return mean + 0.01 * np.random.default_rng(seed).standard_normal(shape)


def select(runs: dict[str, list[np.ndarray]], trials: int | None = None, block: float | None = 1.0) -> Selection:
    rows = {name: [make_run(name, x, seed) for seed, x in enumerate(members)] for name, members in runs.items()}
    trials = sum(map(len, rows.values())) if trials is None else trials
    return Selection(rows, block, trials, 300, 0)


def test_probability_of_overfitting_on_known_cases():
    values = [probability_of_overfitting(noise(k, 800, 30)) for k in range(30)]
    assert 0.4 <= np.mean(values) <= 0.6, "noise"
    recentred = noise(1, 800, 30)
    recentred = (recentred - recentred.mean(axis=0)) / recentred.std(axis=0)
    assert probability_of_overfitting(recentred) == 1.0, "what one half gains, the other loses"
    skilled = noise(2, 800, 30)
    skilled[:, 7] += 0.004
    assert probability_of_overfitting(skilled) == 0.0, "one is good in every half"


def test_probability_of_overfitting_by_hand():
    """Two blocks, two halves: the first is best in one, the second in the other, so each choice is the worse one outside."""
    a, b = np.array([0.02, 0.01, -0.02, -0.01]), np.array([0.01, -0.01, 0.01, 0.02])
    assert probability_of_overfitting(np.stack([a, b], axis=1), blocks=2) == 1.0
    assert probability_of_overfitting(np.stack([b + 0.05, a], axis=1), blocks=2) == 0.0
    same = np.stack([a, a], axis=1)
    assert probability_of_overfitting(same, blocks=2) == 1.0, "a tie in the middle is not above the median"


@pytest.mark.parametrize("shape, blocks", [((100, 1), 16), ((15, 3), 16), ((100, 3), 5)])
def test_probability_of_overfitting_refuses(shape, blocks):
    with pytest.raises(ValueError, match="expected at least 2 strategies"):
        probability_of_overfitting(np.zeros(shape), blocks)


def test_superior_predictive_ability():
    benchmark = noise(0, 600)
    many = noise(1, 600, 20)
    test = SPA(-benchmark, -many, block_size=5, reps=300, seed=3)  # arch takes losses
    test.compute()
    assert superior_predictive_ability(many, benchmark, 5.2, 300, 3) == test.pvalues["consistent"]
    p = [superior_predictive_ability(noise(100 + k, 300, 20), noise(500 + k, 300), 1.0, 200, k) for k in range(100)]
    assert np.mean(np.array(p) < 0.05) <= 0.12 and 0.35 < np.mean(p) < 0.65, "noise is found superior as rarely as it should be"
    assert superior_predictive_ability(many + 0.004 * (np.arange(20) == 3), benchmark, 1.0) < 0.01
    assert superior_predictive_ability(many - 0.01, benchmark, 1.0) > 0.5, "worse than the benchmark is not better"
    twins = np.stack([benchmark, benchmark], axis=1)
    assert np.isnan(superior_predictive_ability(twins, benchmark, 1.0))
    with_twin = np.column_stack([many, benchmark])
    assert superior_predictive_ability(with_twin, benchmark, 5.0, 300, 3) == superior_predictive_ability(
        many, benchmark, 5.0, 300, 3
    )


def test_deflated_ratios_count_every_trial():
    rows = {f"r{k}": [noise(k, 500, mean=0.0008)] for k in range(5)}
    few, many = select(rows), select(rows, trials=1000)
    sharpes = [ledger.sharpe(x[0], 1.0) for x in rows.values()]
    assert few.luck == metrics.expected_max_sharpe(np.var(sharpes, ddof=1), 5)
    assert many.luck > few.luck > 0
    for name, (x,) in rows.items():
        s, moments = ledger.sharpe(x, 1.0), (metrics.skewness(x), metrics.kurtosis(x))
        assert few.row(name)["psr"] == metrics.psr(s, 500, *moments)
        assert few.row(name)["dsr"] == metrics.psr(s, 500, *moments, benchmark_sharpe=few.luck)
        assert many.row(name)["dsr"] < few.row(name)["dsr"] < few.row(name)["psr"]
    assert "1000 trials" in many.notes(PER_YEAR)[0]


def test_seeds_on_one_history_add_no_bars():
    x = noise(1, 500, mean=0.0005)
    one, five = select({"a": [x], "b": [noise(2, 500)]}), select({"a": [x] * 5, "b": [noise(2, 500)]})
    assert one.row("a")["psr"] == pytest.approx(five.row("a")["psr"], abs=1e-15)


def test_foresight_is_no_candidate():
    rows = {f"r{k}": [noise(k, 400)] for k in range(4)} | {"baseline-buy-and-hold": [noise(9, 400)]}
    seer = {"baseline-oracle-returns": [noise(10, 400, mean=0.02)], "baseline-closed-form": [noise(11, 400, mean=0.02)]}
    plain, told = select(rows), select(rows | seer, trials=5)
    assert plain.group == told.group and plain.row("r1") == told.row("r1")
    assert told.row("baseline-oracle-returns")["dsr"] is None and told.row("baseline-oracle-returns")["psr"] > 0.99


def test_every_seed_on_one_panel_is_a_candidate():
    """A lucky seed among many is an accident of its own, which the mean over seeds would hide."""
    lucky = noise(5, 400)
    lucky += 0.003 - lucky.mean()
    rows = {"a": [noise(k, 400) for k in range(3)] + [lucky], "baseline-buy-and-hold": [noise(9, 400)]}
    found = select(rows)
    assert len(found.columns) == 4 and found.spa < 0.05


def test_panels_of_their_own_are_joined():
    """Rows meet on the panels that all have; ten markets or more are the units, whatever bars they hold."""

    def runs(name, mean, panels):
        return [make_run(name, noise(k + 10 * len(name), 6, 80, mean=mean), k, f"p{k}") for k in panels]

    rows = {"good": runs("good", 0.004, (1, 2)), "odd": runs("odd", 0.0, (1, 2, 3)),
            "baseline-buy-and-hold": runs("baseline-buy-and-hold", 0.0, (1, 2))}  # fmt: skip
    found = Selection(rows, None, 7, 300, 0)
    assert found.columns == ["good", "odd"] and found.pbo == 0.0 and found.spa < 0.01 and found.block == 1.0
    rows["odd"] = runs("odd", 0.0, (3,))
    apart = Selection(rows, None, 7, 300, 0)
    assert apart.columns == [] and apart.pbo is None and apart.spa is None and len(apart.notes(PER_YEAR)) == 1


def test_nothing_to_select_from():
    alone = select({"a": [noise(1, 300)]})
    assert alone.pbo is None and alone.spa is None and alone.luck == 0.0 and alone.warnings() == []
    flat = select({"a": [np.zeros(300)], "b": [noise(1, 300)], "baseline-buy-and-hold": [noise(2, 300)]})
    assert np.isnan(flat.row("a")["psr"]) and 0 <= flat.pbo <= 1


def test_warnings_say_when_luck_may_explain_the_best():
    dull = select({**{f"r{k}": [noise(k, 400)] for k in range(6)}, "baseline-buy-and-hold": [noise(99, 400)]})
    assert "No row is shown to beat buy-and-hold" in dull.warnings()[0] and f"{dull.spa:.2f}" in dull.warnings()[0]
    rows = {"good": [noise(1, 400, mean=0.004)], "b": [noise(2, 400)], "baseline-buy-and-hold": [noise(99, 400)]}
    assert select(rows).warnings() == []
    recentred = {name: [x - x.mean()] for name, (x,) in rows.items()}
    assert "PBO = 0.99" in select(recentred).warnings()[-1]


@pytest.mark.parametrize("costs", ["zero", "institutional"])
def test_no_winner_among_200_random_policies(costs):
    """On a market without anything to find, through the same accounting; uncorrected, some of them look significant."""
    panel = load_market("synthetic:noise:bars=700:train=1:val=1:test=1:assets=5", 4)
    split = panel.split()["test"]
    cost = load_costs(costs)
    ex = execution(panel, "next_open", cost)
    rng, rows = np.random.default_rng(1), {}
    held = np.zeros(panel.close.shape)
    held[:] = 1.0 / panel.num_symbols
    for k in range(200):
        targets = np.repeat(rng.uniform(-1, 1, (panel.num_bars // 10 + 1, 5)) / 2.5, 10, axis=0)[: panel.num_bars]
        frame = ledger.backtest_weights(panel, ex, cost.rates, split, targets)
        rows[f"random {k}"] = [make_run(f"random {k}", frame["net_return"].to_numpy())]
    frame = ledger.backtest_weights(panel, ex, cost.rates, split, held)
    rows["baseline-buy-and-hold"] = [make_run("baseline-buy-and-hold", frame["net_return"].to_numpy())]
    found = Selection(rows, 1.0, 201, 500, 0)
    assert found.spa > 0.05
    dsr = [found.row(name)["dsr"] for name in rows]
    assert max(dsr) < 0.95
    if costs == "zero":
        assert max(found.row(name)["psr"] for name in rows) > 0.95, "what correction is for"


def ar1(rng: np.random.Generator, series: int, bars: int, phi: float, sharpe: float) -> np.ndarray:
    """(series, bars) Student-t returns of 1% a bar with autocorrelation phi and that Sharpe ratio per bar."""
    shocks = rng.standard_t(6, (series, bars + 50)) / np.sqrt(1.5)
    for t in range(1, bars + 50):
        shocks[:, t] = phi * shocks[:, t - 1] + np.sqrt(1 - phi**2) * shocks[:, t]
    return 0.01 * (sharpe + shocks[:, 50:])


@pytest.mark.parametrize("phi, how", [(0.0, "bars"), (0.1, "bars"), (0.0, "markets")])
@pytest.mark.parametrize("series, least, most", [(300, 0.91, 0.985), pytest.param(2000, 0.93, 0.97, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth(series, least, most, phi, how):
    """95% intervals of the scoreboard on simulated series with fat tails; the truth is their Sharpe ratio per bar."""
    bars, truth = 750, 0.05
    x = ar1(np.random.default_rng(7), series, bars, phi, truth)
    hits = 0
    for k in range(series):
        returns = x[k].reshape(25, 30) if how == "markets" else x[k]
        score = Draws({"a": [make_run("a", returns, panel=f"p{k}")]}, 250, k).scores("a")["sharpe"]
        hits += score["low"] <= truth * np.sqrt(PER_YEAR) <= score["high"]
    assert least <= hits / series <= most


def test_interquartile_mean_and_probability_of_improvement():
    rows = {"a": [make_run("a", noise(k, 12, 60, mean=0.001), k, f"p{k}") for k in range(3)]}
    rows["b"] = [
        make_run("b", run.ledger["net_return"].to_numpy().reshape(12, 60) + 0.001, run.seed, run.panel) for run in rows["a"]
    ]
    draws = Draws(rows, 200, 0)
    cells = [
        ledger.sharpe(part.to_numpy(), PER_YEAR) for run in rows["a"] for _, part in run.ledger.groupby("market")["net_return"]
    ]
    found = draws.iqm("a")
    assert found["value"] == pytest.approx(trim_mean(cells, 0.25), rel=1e-9)
    assert found["low"] < found["value"] < found["high"]
    assert draws.better("b", "a") == 1.0 and draws.better("a", "b") == 0.0
    apart = Draws({"a": rows["a"][:1], "b": rows["b"][1:]}, 200, 0)
    assert apart.better("a", "b") is None, "no seed in common"
    one = {"a": [make_run("a", noise(1, 300))], "c": [make_run("c", noise(1, 300))]}
    assert Draws(one, 200, 0).better("a", "c") == 0.5, "ties count half"
    gap, bars = 0.0006, 1500
    x = noise(3, bars)
    y = noise(4, bars)
    y += gap - (y - x).mean()
    p = Draws({"x": [make_run("x", x)], "y": [make_run("y", y)]}, 2000, 0).better("y", "x")
    assert p == pytest.approx(norm.cdf(gap * np.sqrt(bars) / (x - y).std()), abs=0.05)


def test_constants_are_the_ones_the_page_states():
    assert inference.BLOCKS == 16 and "baseline-oracle-regime".startswith(inference.FORESIGHT)
