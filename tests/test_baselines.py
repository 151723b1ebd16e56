"""Baselines: each does what its name says, from the past alone, and pays; holding costs nothing; runs are complete."""

import contextlib
import json
from dataclasses import replace

import baselines
import numpy as np
import pandas as pd
import pytest
import rules
from conftest import DEAR, FILLS, ROOT, SMALL, assert_same_bits, ragged_panel, run_python, tampered

from envs import portfolio_references, references
from envs.costs import DELISTED, RECORD, load_costs
from envs.ledger import LEDGER
from envs.panel import Panel
from envs.portfolio_tables import PortfolioConfig
from envs.synthetic import make_panel

CONFIG = rules.RuleConfig(window=50, refit_every=20, momentum_window=30, kelly_t=0.5)
CHARGES = ["commission", "spread", "slippage", "impact", "borrow", "financing"]
TRADING = ["turnover", *CHARGES[:4]]
NOISE = "synthetic:noise:bars=300:train=1:val=1:test=2:assets=5"
OPTIMISED = ("mean-variance", "min-variance", "risk-parity", "hrp")


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """A plan for the symbols of ragged_panel(1, bars=240), one order for each twelfth day."""
    path, rng = tmp_path_factory.mktemp("plan") / "orders.csv", np.random.default_rng(0)
    times = ragged_panel(1, bars=240).timestamps[::12].astype("datetime64[D]")
    rows = [f"{day},R{i},{w:.3f}\n" for day in times for i, w in enumerate(rng.uniform(-0.1, 0.3, 6))]
    path.write_text("timestamp,symbol,weight\n" + "".join(rows))
    return str(path)


def setting(panel, costs=DEAR, fill="auto", config=CONFIG, embargo=5, **changes):
    terms = PortfolioConfig(costs=costs, fill=fill)
    return rules.Setting(panel, panel.split(embargo=embargo), terms, 1, replace(config, **changes))


def backtest(name, s):
    return baselines.backtest(name, s, baselines.order(name, s))


@pytest.fixture(scope="module")
def ragged(orders):
    return setting(ragged_panel(1, bars=240), plan=orders)


@pytest.fixture(scope="module")
def small():
    return setting(make_panel(SMALL, seed=3), "institutional")


def decided(s, name):
    return np.concatenate([np.arange(a, b - 1) for a, b in zip(s.starts[name], s.splits[name].ranges[:, 1])])


def closes(s, rows):
    """Whether a symbol is closed for good at a row: the first of those at which it counts as delisted."""
    delisted = s.data.execution.status == DELISTED
    return (delisted[rows] & ~delisted[rows - 1]).any(axis=1)


@pytest.mark.parametrize("which", ("ragged", "small"))
def test_every_rule_runs_pays_and_adds_up(which, request):
    s = request.getfixturevalue(which)
    names = rules.applicable(s)
    only_here = {"plan"} if which == "ragged" else {"oracle-regime", "oracle-returns"}
    assert set(names) == set(rules.RULES) - {"plan", "oracle-regime", "oracle-returns", "closed-form"} | only_here
    ledgers = {}
    for name in names:
        frames = backtest(name, s)
        assert list(frames) == ["train", "val", "test"]
        for split, frame in frames.items():
            assert tuple(frame.columns) == LEDGER and set(frame["split"]) == {split}
            values = frame[list(RECORD)].to_numpy()
            assert np.isfinite(values).all() and (frame["equity"] > 0).all()
            money = frame["gross_return"] - frame[CHARGES].sum(axis=1) + frame["interest"]
            np.testing.assert_allclose(frame["net_return"], money, rtol=0, atol=1e-12)
            grown = frame.groupby("market")["net_return"].transform(lambda net: (1 + net).cumprod())
            np.testing.assert_allclose(frame["equity"], grown, rtol=1e-12)
            traded = frame["turnover"] > 0
            assert traded.any() and (frame.loc[traded, ["commission", "spread", "slippage", "impact"]] > 0).all().all()
            assert (frame.loc[~traded, TRADING] == 0).all().all()
            times = s.panel.timestamps[decided(s, split) + 1]
            assert_same_bits(frame["timestamp"].to_numpy("datetime64[ns]"), times, f"{name}: the bars of every rule")
            assert frame["action"].map(len).eq(s.panel.num_symbols).all()
        ledgers[name] = frames["test"]["net_return"].to_numpy()
    assert len({values.tobytes() for values in ledgers.values()}) == len(names)  # no two rules are the same


@pytest.mark.parametrize("fill, at", (*((fill, "a fit") for fill in FILLS), ("next_open", "a new month")))
def test_no_order_and_no_money_depends_on_later_bars(fill, at, orders):
    panel = ragged_panel(1, bars=240)
    s = setting(panel, fill=fill, plan=orders)
    t = int(s.starts["test"][0]) + 20
    if at == "a new month":
        t = next(row for row in s.monthly() if row > t - 10)
    names = rules.applicable(s)
    before = {name: (rules.RULES[name](s), backtest(name, s)["test"]) for name in names}
    for seed in range(2):
        s = setting(tampered(panel, t, np.random.default_rng(seed)), fill=fill, plan=orders)
        for name, (targets, frame) in before.items():
            assert_same_bits(rules.RULES[name](s)[: t + 1], targets[: t + 1], f"{name}: orders up to bar t")
            after = backtest(name, s)["test"]
            seen = frame["timestamp"] <= panel.timestamps[t]
            assert 8 < seen.sum() < len(frame)
            money = list(RECORD)
            assert frame.loc[seen, money].equals(after.loc[seen, money]), f"{name}: money up to bar t"
            assert not frame.loc[~seen, money].equals(after.loc[~seen, money]), f"{name}: nothing was changed"


def test_what_is_not_ordered_is_held_for_nothing(ragged):
    """Random orders with random holes: no trade and no cost without an order, but for delistings."""
    rng = np.random.default_rng(0)
    targets = rng.uniform(-0.2, 0.4, ragged.panel.close.shape)
    targets[rng.random(len(targets)) < 0.5] = np.nan
    targets[ragged.first] = 0.2
    for split in ragged.splits.values():
        rows = decided(ragged, split.name)
        frame = baselines.account(ragged, split, targets)
        idle = np.isnan(targets[rows]).all(axis=1) & ~closes(ragged, rows)
        assert 5 < idle.sum() < len(rows) - 5
        assert (frame.loc[idle, TRADING] == 0.0).all().all() and (frame.loc[idle, "gross_exposure"] > 0.1).all()
        assert (frame.loc[~idle, "turnover"] > 0).mean() > 0.9
        assert_same_bits(np.stack(frame["action"]), targets[rows])


def test_one_symbol_can_be_held_while_another_is_traded(small):
    targets = np.full(small.panel.close.shape, np.nan)
    targets[small.first, 0] = 0.5
    targets[:, 1] = np.where(np.arange(len(targets)) % 2, 0.3, 0.1)
    s = setting(small.panel, "zero")
    frame = baselines.account(s, s.splits["test"], targets)
    a, b = s.starts["test"][0], s.splits["test"].ranges[0, 1]
    shares, cash, held = np.zeros(2), 1.0, []  # by hand, in money: fills at the next open
    for t in range(a, b - 1):
        open_, close = small.panel.open[t + 1, :2], small.panel.close[t + 1, :2]
        equity = cash + shares @ open_
        wanted = np.where(np.isnan(targets[t, :2]), shares, np.nan_to_num(targets[t, :2]) * equity / open_)
        cash -= (wanted - shares) @ open_
        shares = wanted
        held.append(cash + shares @ close)
    np.testing.assert_allclose(frame["equity"][: len(held)], held, rtol=1e-10)


def test_buy_and_hold_trades_once(small, ragged):
    for s in (small, ragged):
        for split, frame in backtest("buy-and-hold", s).items():
            closed = closes(s, decided(s, split))
            first = frame.groupby("market").cumcount() == 0
            assert (frame.loc[first, "turnover"] > 0.5).all()
            assert (frame.loc[~first & ~closed, TRADING] == 0.0).all().all()
    gone = closes(ragged, decided(ragged, "train"))
    assert gone.any()  # a delisted holding is closed without an order
    frame = backtest("buy-and-hold", ragged)["train"]
    assert (frame.loc[gone, "turnover"] > 0).all() and (frame.loc[gone, "commission"] > 0).all()
    s, panel = setting(small.panel, "zero"), small.panel
    frame = backtest("buy-and-hold", s)["val"]
    a, b = s.starts["val"][0], s.splits["val"].ranges[0, 1]
    np.testing.assert_allclose(frame["equity"], (panel.close[a + 1 : b] / panel.open[a + 1]).mean(axis=1), rtol=1e-10)


def test_equal_weight_is_the_reference_of_the_portfolio_market(ragged):
    for split in ragged.splits.values():
        expected = portfolio_references.references(ragged.data, split, 1.0)["equal weight"]
        found = baselines.account(ragged, split, rules.RULES["equal-weight"](ragged))
        assert found.drop(columns="action").equals(expected.drop(columns="action"))


def test_monthly_orders_fall_on_the_first_bar_of_a_month(ragged, small):
    for s in (ragged, small):
        targets = rules.RULES["equal-weight-monthly"](s)
        for split in s.splits:
            for a, b in zip(s.starts[split], s.splits[split].ranges[:, 1]):
                times = pd.Series(s.panel.timestamps[a : b - 1])
                month, before = times.dt.strftime("%Y-%m"), pd.Timestamp(s.panel.timestamps[a - 1])
                first = ~month.duplicated().to_numpy()
                first[0] = True  # in cash: it enters at once
                assert_same_bits(~np.isnan(targets[a : b - 1]).any(axis=1), first)
                assert first.sum() > 1 and before < times[0]
        rows = np.flatnonzero(~np.isnan(targets).any(axis=1))
        np.testing.assert_array_equal((targets > 0)[rows], s.panel.present[rows])
        assert targets[rows].sum(axis=1) == pytest.approx(1.0)


def test_random_is_of_the_simplex_and_of_the_seed(ragged, small):
    weights = rules.RULES["random"](small)
    assert (weights**2).mean() == pytest.approx(2 / (6 * 7), rel=0.03)  # Dirichlet of six ones
    targets = rules.RULES["random"](ragged)
    assert targets.sum(axis=1) == pytest.approx(1.0) and ((targets > 0) == ragged.panel.present).all()
    assert_same_bits(rules.RULES["random"](ragged), targets)
    other = replace(ragged, seed=2)
    assert not np.array_equal(rules.RULES["random"](other), targets)


@pytest.mark.parametrize("name, best, worst", (("momentum", 1.0, 0.0), ("momentum-neutral", 0.5, -0.5)))
def test_momentum_ranks_returns_without_the_last_bars(name, best, worst, small, ragged):
    for s in (small, ragged):
        targets, checked = rules.RULES[name](s), 0
        close = pd.DataFrame(s.panel.close)
        for a, b in zip(s.panel.segments, np.append(s.panel.segments[1:], s.panel.num_bars)):
            past = close[a:b].ffill().pct_change(30 - 2, fill_method=None).shift(2)  # a twelfth of 30 bars, rounded
            for t in range(a, b):
                if np.isnan(targets[t]).any():
                    continue
                score = past.loc[t].where(s.panel.present[t]).dropna().sort_values()
                size = 2 if len(score) > 4 else 1
                expected = np.zeros(s.panel.num_symbols)
                expected[score.index[-size:]], expected[score.index[:size]] = best / size, worst / size
                np.testing.assert_allclose(targets[t], expected, atol=1e-15)
                assert t - a >= 30
                checked += 1
        assert checked > 5


def test_momentum_window_is_a_year_and_a_month(small):
    s = replace(small, config=rules.RuleConfig())
    year = round(s.panel.bars_per_year)
    assert 255 < year < 265  # business days
    assert_same_bits(
        rules.RULES["momentum"](s),
        rules.RULES["momentum"](replace(s, config=rules.RuleConfig(momentum_window=year, momentum_skip=22))),
    )
    with pytest.raises(ValueError, match="--momentum-window 30, --momentum-skip 30: expected 0 <= skip < window"):
        rules.RULES["momentum"](replace(s, config=rules.RuleConfig(momentum_window=30, momentum_skip=30)))


def saw_panel(means, size, bars=300):
    """Simple returns mean + size and mean - size in turn: their sample mean and variance are known."""
    returns = np.array(means) + np.where(np.arange(bars) % 2, size, -size)[:, None]
    close = 100 * np.cumprod(1 + returns, axis=0)
    days = np.datetime64("2020-01-01") + np.arange(bars)
    return Panel("saw", days.astype("datetime64[ns]"), tuple("ABCDE"[: len(means)]), close)


def test_kelly_weights_and_gates():
    """Over 50 bars the t-statistic is mean / size * 7: A has an edge, B none, C one below the round trip, D is short."""
    panel = saw_panel((1e-3, 1e-5, 1.9e-5, -1e-3), 1e-2)
    panel = replace(panel, close=np.where([1, 1, 0, 1], panel.close, saw_panel([1.9e-5] * 4, 1e-4).close))
    s = setting(panel, "institutional", kelly_t=0.5, kelly_fraction=0.02, refit_every=20)
    targets = rules.RULES["kelly-lite"](s)
    rows = s.every(20)
    weight = 0.02 * 1e-3 / (1e-4 * 50 / 49)
    weight /= 1.0 + 2.0 * weight  # C's, which is not traded, is cut to 1; then all are to a gross exposure of 1
    np.testing.assert_allclose(targets[rows][:, [0, 1, 3]], np.tile([weight, 0.0, -weight], (len(rows), 1)), rtol=1e-6)
    assert np.isnan(targets[rows, 2]).all() and np.isnan(np.delete(targets, rows, axis=0)).all()
    assert s.notes["spread_gated"] == len(rows) and s.notes["edge_gated"] == len(rows)
    assert s.notes["orders"] == 2 * len(rows)
    # 1.9e-5 * 22 bars is more than 4 bp
    s = setting(panel, "institutional", kelly_t=0.5, kelly_fraction=0.02, refit_every=22)
    targets = rules.RULES["kelly-lite"](s)[s.every(22)]
    assert np.abs(targets).sum(axis=1) == pytest.approx(1.0) and (targets[:, 2] > 0.7).all()
    s = setting(panel, "institutional", kelly_t=0.8, kelly_fraction=0.02)
    assert (rules.RULES["kelly-lite"](s)[s.every(20)][:, [0, 3]] == 0).all()


def estimator(name):
    from skfolio.moments import LedoitWolf, ShrunkMu
    from skfolio.optimization import HierarchicalRiskParity, MeanRisk, ObjectiveFunction, RiskBudgeting
    from skfolio.prior import EmpiricalPrior

    kinds = {"min-variance": MeanRisk, "risk-parity": RiskBudgeting, "hrp": HierarchicalRiskParity}
    prior = EmpiricalPrior(ShrunkMu(), LedoitWolf())
    if name == "mean-variance":
        return MeanRisk(ObjectiveFunction.MAXIMIZE_RATIO, prior_estimator=prior)
    return kinds[name](prior_estimator=prior)


@pytest.mark.parametrize("name", OPTIMISED)
def test_optimised_weights_are_skfolios_on_the_trailing_window(name, small, ragged):
    targets = rules.RULES[name](small)
    a = small.starts["val"][0]
    ordered = np.flatnonzero(~np.isnan(targets[a : a + 100]).any(axis=1))
    assert set(ordered) <= {0, 20, 40, 60, 80} and len(ordered) > 1
    for t in a + ordered:
        x = small.panel.close[t - 49 : t + 1] / small.panel.close[t - 50 : t] - 1
        np.testing.assert_allclose(targets[t], estimator(name).fit(x).weights_, atol=2e-5)  # what solvers leave open
        for other in (x[1:], x[:-1], small.panel.close[t - 50 : t] / small.panel.close[t - 51 : t - 1] - 1):
            with contextlib.suppress(ValueError):  # no expected return is positive
                assert np.abs(targets[t] - estimator(name).fit(other).weights_).max() > 1e-4
    targets = rules.RULES[name](ragged)
    rows = np.flatnonzero(~np.isnan(targets).any(axis=1))
    assert (targets[rows][~ragged.panel.present[rows]] == 0).all()
    assert (targets[rows[rows > 125], 2] == 0).all()  # delisted at 120
    assert targets[rows].sum(axis=1) == pytest.approx(1.0, abs=1e-6)
    for t in rows:
        begin = max(1, t - 49)
        enough = ragged.panel.present[begin : t + 1].mean(axis=0) >= 0.8
        known = np.isfinite(ragged.panel.close[:begin]).any(axis=0)
        assert (targets[t][~(enough & known)] == 0).all()
    seldom = (ragged.panel.present[rows] & (targets[rows] == 0)).any(axis=1)
    assert name == "mean-variance" or 0 < seldom.sum() < len(rows)  # a symbol that has just been listed waits


def test_a_failed_fit_holds_and_is_counted(small, monkeypatch):
    calls, fit = [], rules.fitted

    def shaky(estimator, x):
        calls.append(0)
        if len(calls) % 2 == 0:
            raise RuntimeError("solver\nfell over")
        return fit(estimator, x)

    monkeypatch.setattr(rules, "fitted", shaky)
    s = replace(small, notes={})
    targets = rules.RULES["hrp"](s)
    rows = s.every(20)
    assert_same_bits(np.isnan(targets[rows]).all(axis=1), np.arange(len(rows)) % 2 == 1)
    assert s.notes["fits"] == len(rows) and s.notes["failed_fits"] == len(rows) // 2
    assert "RuntimeError: solver fell over" in s.notes["last_failure"]
    frame = baselines.account(s, s.splits["test"], targets)
    quiet = np.isnan(targets[decided(s, "test")]).all(axis=1)
    assert (frame.loc[quiet, "turnover"] == 0).all()
    entered = frame.assign(ordered=~quiet).groupby("market")["ordered"].cummax()
    assert (frame["gross_exposure"] > 0.9).equals(entered.rename("gross_exposure")) and entered.mean() > 0.9
    monkeypatch.setattr(rules, "fitted", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="hrp on 'synthetic.*: no finite order in the test split.*ZeroDivisionError"):
        backtest("hrp", s)


def test_leadlag_rules_hold_what_the_market_holds(small):
    """From the second bar on, the ledger of LeadLag-v0 with a fixed lookback; heuristics change between the two."""
    data, split = small.leadlag, small.splits["test"]
    targets = {}
    for k, bars in enumerate(rules.LOOKBACKS):
        targets[bars] = rules.RULES[f"lead-lag-{bars}"](small)
        expected = references.run(data, split, references.hold(np.full(small.panel.num_bars, k)))
        found = baselines.account(small, split, targets[bars])
        for m, (a, b) in enumerate(zip(small.starts["test"], split.ranges[:, 1])):
            theirs, ours = (f[f["market"] == m]["net_return"].to_numpy()[-(b - 1 - a) + 1 :] for f in (expected, found))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    returns = np.diff(np.log(small.panel.close), axis=0, prepend=np.nan)
    for t in decided(small, "test")[100:400:7]:
        now = t + 1 - np.array([5, 60])
        if now[1] <= small.panel.segments[small.panel.segment_of_row[t]]:
            continue
        short, long = (np.sqrt(np.mean(returns[a : t + 1] ** 2)) for a in now)
        assert_same_bits(rules.RULES["lead-lag-volatility"](small)[t], targets[10 if short > long else 90][t])
    mixed = rules.RULES["lead-lag-correlation"](small)
    shorts, longs = ((mixed == targets[k]).all(axis=1)[decided(small, "test")] for k in (10, 90))
    assert (shorts | longs).all() and 0.1 < shorts.mean() < 0.9
    level = rules.regime_features(small.panel)[:, rules.REGIME_FEATURES.index("average_correlation")]
    for t in decided(small, "test")[::31]:
        a = small.panel.segments[small.panel.segment_of_row[t]]
        assert_same_bits(mixed[t], targets[10 if level[t] > level[a : t + 1].mean(dtype=np.float64) else 90][t])


def test_oracles_are_those_of_the_references(small):
    s, split = setting(small.panel, "institutional"), small.splits["test"]
    data = rules.LeadLagData(s.panel, rules.LeadLagConfig())
    expected = references.references(data, s.splits)
    for name in ("oracle-regime", "oracle-returns"):
        ours, theirs = backtest(name, s)["test"], expected[name.replace("-", " ")]
        for m, (a, b) in enumerate(zip(s.starts["test"], split.ranges[:, 1])):
            nets = [f[f["market"] == m]["net_return"].to_numpy()[-(b - 1 - a) + 1 :] for f in (ours, theirs)]
            np.testing.assert_allclose(*nets, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("market", ("garleanu-pedersen", "merton"))
def test_closed_form_is_that_of_the_references_under_its_own_costs(market):
    args = baselines.parse(["--market", f"synthetic:{market}:bars=300:train=2:val=1:test=2"])
    s = baselines.load(args)
    assert s.data.costs.quadratic_impact_bps == (75 if market == "garleanu-pedersen" else 0)
    assert s.data.costs.commission_bps == 0 and "closed-form" in rules.applicable(s)
    assert ("momentum" in rules.applicable(s)) == (market == "garleanu-pedersen")  # Merton's market has one symbol
    aversion = 40.0 if market == "garleanu-pedersen" else 1.0
    expected = portfolio_references.references(s.data, s.splits["test"], aversion)["closed form"]
    found = backtest("closed-form", s)["test"]
    assert found.drop(columns="action").equals(expected.drop(columns="action"))
    given = baselines.parse(["--market", f"synthetic:{market}", "--costs", "retail", "--penalty-variance", "1"])
    assert (given.portfolio.costs, given.rules.penalty_variance) == ("retail", 1.0)
    assert baselines.parse([]).portfolio.costs == "institutional"


def test_optimisers_are_left_out_where_a_symbol_never_varies():
    s = baselines.load(baselines.parse(["--market", "synthetic:tail:bars=300:train=2:val=1:test=2"]))
    fitted = {"mean-variance", "min-variance", "risk-parity", "hrp"}
    assert s.data.costs.name == "zero" and not s.data.config.cash and not fitted & set(rules.applicable(s))
    moving = baselines.load(baselines.parse(["--market", "synthetic:noise:bars=300:train=2:val=1:test=2"]))
    assert fitted <= set(rules.applicable(moving))


def write_plan(path, *rows, header="timestamp,symbol,weight"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_plan_is_ordered_at_the_first_bar_at_or_after_its_time(tmp_path):
    panel = saw_panel((1e-3, 2e-3), 1e-2)
    day = lambda row, hour="": f"{panel.timestamps[row]!s:.10}{hour}"  # noqa: E731
    s = setting(panel, embargo=0)
    (val, test), stop = (int(s.starts[name][0]) for name in ("val", "test")), panel.num_bars
    assert (val, test) == (180, 240)
    rows = (
        f"{day(250)},A,0.5", f"{day(260, ' 10:00')},B,-0.25", f"{day(250)},B,0.25",  # after the close of bar 260: bar 261
        f"{day(235)},A,0.9", f"{day(200)},B,0.1", f"{day(271, 'T09:00')},A,0.7", f"{day(272)},A,0.8",  # both bar 272
        f"{day(299)},A,0.3", "2031-01-01,A,0.4",
    )  # fmt: skip
    s = setting(panel, embargo=0, plan=write_plan(tmp_path / "a.csv", *rows))
    targets = rules.RULES["plan"](s)
    expected = np.full((stop, 2), np.nan)
    expected[200, 1], expected[235, 0], expected[250], expected[261, 1] = 0.1, 0.9, (0.5, 0.25), -0.25
    expected[272, 0], expected[299, 0] = 0.8, 0.3
    expected[test] = 0.9, 0.1  # what the plan wants by the start of the test split
    assert_same_bits(targets, expected)
    assert s.notes == {"plan_rows": 9, "orders": 8, "not_filled": 0}
    frame = baselines.account(s, s.splits["test"], targets)
    assert np.flatnonzero(frame["turnover"]).tolist() == [0, 10, 21, 32]
    assert frame["net_exposure"][10] == pytest.approx(0.75)
    one_day_late = rules.RULES["plan"](setting(panel, plan=write_plan(tmp_path / "b.csv", "2019-01-01,A,1"), embargo=0))
    assert (one_day_late[[0, val, test], 0] == 1).all() and np.isnan(one_day_late[:, 1]).all()


@pytest.mark.parametrize(
    "row, message",
    (
        ("2020-13-01,A,1", r"data row 2, symbol 'A': timestamp is '2020-13-01'; expected an ISO 8601 time"),
        ("2020-01-05,Z,1", r"data row 2, symbol 'Z': symbol is 'Z'; expected one of \['A', 'B'\]"),
        ("2020-01-05,A,x", r"data row 2, symbol 'A': weight is 'x'; expected a finite number"),
        ("2020-01-05,A,inf", r"data row 2, symbol 'A': weight is 'inf'; expected a finite number"),
        ("2020-01-05,A,", r"data row 2, symbol 'A': weight is ''; expected a finite number"),
        ("2020-01-04,B,1", r"data row 2, symbol 'B': timestamp is '2020-01-04'; expected each symbol once at a time"),
        ("2020-01-05T10:00Z,B,1", r"data row 2, symbol 'B': timestamp is .*; expected no UTC offset, as in saw"),
    ),
)
def test_plan_errors_name_the_row(row, message, tmp_path):
    panel = saw_panel((1e-3, 2e-3), 1e-2)
    with pytest.raises(ValueError, match=r"--plan .*plan.csv: " + message):
        rules.read_plan(write_plan(tmp_path / "plan.csv", "2020-01-04,B,0.5", row), panel)


def test_plan_files_that_are_none(tmp_path):
    panel = saw_panel((1e-3, 2e-3), 1e-2)
    for path in (
        write_plan(tmp_path / "a.csv", "2020-01-04,B,0.5", header="time,symbol,weight"),
        write_plan(tmp_path / "b.csv"), str(tmp_path / "none.csv"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--plan .*(expected rows of timestamp, symbol, weight|not a readable CSV file)"):
            rules.read_plan(path, panel)


@pytest.mark.parametrize("field, value", (("window", 1), ("refit_every", 0), ("kelly_t", -1.0), ("momentum_window", 1)))
def test_bad_parameters_name_the_flag(field, value):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} {value}: expected"):
        rules.RuleConfig(**{field: value})


def test_command_leaves_runs_that_look_like_a_scripts(tmp_path):
    names = ["equal-weight", "no/such", "kelly-lite", "oracle-regime", "buy-and-hold"]
    options = ["--market", NOISE, "--seed", "4", "--costs", "retail", "--runs-dir", str(tmp_path), "--only", *names]
    done = run_python(str(ROOT / "benchmark" / "baselines.py"), *options)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "--only no/such: no such baseline; expected some of buy-and-hold equal-weight" in done.stderr
    assert "oracle-regime: ValueError: panel 'synthetic:noise" in done.stderr and "Traceback" not in done.stderr
    assert "3 of 5 baselines finished" in done.stdout
    found = {path.name.rsplit("__", 1)[0]: path for path in tmp_path.iterdir()}
    assert set(found) == {
        "Portfolio-v0__baseline-equal-weight__4", "Portfolio-v0__baseline-no-such__4", "Portfolio-v0__baseline-kelly-lite__4",
        "LeadLag-v0__baseline-oracle-regime__4", "Portfolio-v0__baseline-buy-and-hold__4",
    }  # fmt: skip
    panel = make_panel(NOISE, 4)
    for name, path in found.items():
        run = json.loads((path / "run.json").read_text())
        assert run["args"]["exp_name"] in name and run["args"]["seed"] == 4 and run["trials"] == 1
        assert run["env_id"] == name.split("__")[0] and run["args"]["market"] == NOISE
        assert run["panel"]["sha256"] == panel.sha256 and set(run["panel"]["splits"]) == {"train", "val", "test"}
        assert run["market"]["fill"] == "next_open" and run["market"]["costs"] == load_costs("retail").__dict__
        assert {"script_sha256", "rules_sha256", "git_commit", "packages", "wall_clock"} <= set(run)
        if "such" in name or "oracle" in name:
            assert run["status"] == "failed" and "expected" in run["failure"] and not (path / "ledger.parquet").exists()
            continue
        assert run["status"] == "finished" and run["failure"] is None
        frame = pd.read_parquet(path / "ledger.parquet")
        assert tuple(frame.columns) == LEDGER and set(frame["split"]) == {"train", "val", "test"}
        assert run["env_steps"] == len(frame) == 4 * 239 and frame["action"].map(len).eq(5).all()
        score, test = run["scores"]["test"]["agent"], frame[frame["split"] == "test"]
        assert score["bars"] == len(test) == 2 * 239
        assert score["growth"] == pytest.approx(np.log1p(test["net_return"]).mean() * panel.bars_per_year)


def test_a_bug_in_one_rule_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(rules.RULES, "momentum", lambda s: [][0])
    args = baselines.Args(only=("momentum", "equal-weight"), market=NOISE, runs_dir=str(tmp_path))
    assert baselines.main(args) == 1
    runs = {path.name.split("__")[1]: json.loads((path / "run.json").read_text()) for path in tmp_path.iterdir()}
    assert runs["baseline-momentum"]["status"] == "failed" and "IndexError" in runs["baseline-momentum"]["failure"]
    assert runs["baseline-equal-weight"]["status"] == "finished"
    assert baselines.main(replace(args, only=("equal-weight",))) == 0
    with pytest.raises(SystemExit, match="PanelError: market 'nowhere' is not known"):
        baselines.main(replace(args, market="nowhere"))


def test_a_panel_that_is_too_short_is_said_so(tmp_path):
    s = setting(make_panel(NOISE, 0), momentum_window=400)
    with pytest.raises(
        ValueError, match="momentum on 'synthetic:noise.*: no finite order in the test split; expected more bars"
    ):
        backtest("momentum", s)


def test_walk_forward_runs_one_fold():
    args = baselines.Args(market="sp500", start="2015", folds=3, fold=1)
    s = baselines.load(args)
    assert s.splits["test"].ranges.tolist() == s.panel.walk_forward(3, embargo=5)[1]["test"].ranges.tolist()
    with pytest.raises(ValueError, match="--fold 3: expected 0 to 2"):
        baselines.load(replace(args, fold=3))
