"""The tests that guard against the classic backtest errors, themselves tested: plant the error, and they must fail."""

import re
import shutil

import pytest
from conftest import ROOT, run_python

TESTS = (
    "conftest.py", "test_costs.py", "test_features.py", "test_leadlag.py", "test_panel.py", "test_portfolio.py",
    "test_series.py", "test_trading.py",
)  # fmt: skip
LEAK_IN_FEATURES = "test_features.py::test_no_feature_and_no_target_uses_a_later_bar[xcorr]"
LEAK_IN_ENV = "test_leadlag.py::test_nothing_seen_or_earned_depends_on_later_bars[same_close]"
CASH = "test_costs.py::test_cash_costs_nothing"
DRIFT = "test_costs.py::test_turnover_is_measured_against_drifted_weights"
FILL = "test_costs.py::test_fills_by_hand[next_open-price0-status0]"
REWARD = "test_leadlag.py::test_reward_is_log_growth_after_costs_by_default"
LEAK_IN_PORTFOLIO = "test_portfolio.py::test_nothing_seen_or_earned_depends_on_later_bars[long/short-next_open]"
GUARDS = "test_portfolio.py::test_guards_at_their_threshold"
NO_TRADE = "test_portfolio.py::test_scores_of_zero"
PORTFOLIO_REWARD = "test_portfolio.py::test_every_bar_adds_up[short-guarded]"
LEAK_IN_SERIES = "test_series.py::test_global_series[s.csv]"
GAP = "test_trading.py::test_exits_of_a_position_that_is_held[0-bar4-1-0.9]"
BOTH_TOUCHED = "test_trading.py::test_exits_of_a_position_that_is_held[0-bar7-1-0.95]"
LEAK_IN_TRADING = "test_trading.py::test_nothing_seen_or_earned_depends_on_later_bars[next_open]"
NODES = (
    LEAK_IN_FEATURES, LEAK_IN_ENV, CASH, DRIFT, FILL, REWARD, LEAK_IN_PORTFOLIO, GUARDS, NO_TRADE, PORTFOLIO_REWARD,
    LEAK_IN_SERIES, GAP, BOTH_TOUCHED, LEAK_IN_TRADING,
)  # fmt: skip

# name -> file, the text to be replaced, what replaces it, the tests that must notice
DEFECTS = {
    "the leaders' direction is read from the next bar": (
        "leadlag_tables.py",
        "lead += x[t, order[n - 1 - q]]",
        "lead += x[min(t + 1, rows - 1), order[n - 1 - q]]",
        (LEAK_IN_FEATURES, LEAK_IN_ENV),
    ),
    "cash pays costs": (
        "costs.py",
        "    turnover, impact_cost, profit = 0.0, 0.0, 0.0\n",
        "    turnover, impact_cost, profit = 0.0, 0.0, 0.0\n"
        "    if solvable:\n"
        "        bought = 0.0\n"
        "        for i in range(n):\n"
        "            bought += target[i] * after - weights[i]\n"
        "        turnover += abs(bought)\n",
        (CASH,),
    ),
    "turnover is measured against weights that have not drifted": (
        "costs.py",
        "            turnover += size\n",
        "            turnover += abs(trade + weights[i] - weights[i] / (1.0 + to_fill[i]))\n",
        (DRIFT,),
    ),
    "orders fill at the close that was observed": (
        "costs.py",
        "price, fillable = np.where(present[1:], panel.open[1:], now), present[1:]",
        "price, fillable = now, present[1:]",
        (FILL,),
    ),
    "the reward leaves out costs": (
        "leadlag.py",
        "b.components[i, 0] = math.log(max(growth, RUIN))",
        "b.components[i, 0] = math.log(max(1.0 + b.record[i, 1], RUIN))",
        (REWARD,),
    ),
    "the portfolio's reward leaves out costs": (
        "portfolio.py",
        "b.components[i, 0] = log_growth",
        "b.components[i, 0] = math.log(max(1.0 + b.record[i, 1], RUIN))",
        (PORTFOLIO_REWARD,),
    ),
    "the features of symbols read the next bar": (
        "features.py",
        "np.where(listed, f, 0.0) for f in (*features, panel.present)",
        "np.roll(np.where(listed, f, 0.0), -1, axis=0) for f in (*features, panel.present)",
        (LEAK_IN_FEATURES, LEAK_IN_PORTFOLIO),
    ),
    "the portfolio's agent sees the next bar's regime": (
        "portfolio.py",
        "obs[i, features + e] = m.context[t, e]",
        "obs[i, features + e] = m.context[min(t + 1, len(m.context) - 1), e]",
        (LEAK_IN_PORTFOLIO,),
    ),
    "a stop fills at its level where the bar opens below it": ("trading.py", "return STOP, open_", "return STOP, stop", (GAP,)),
    "the target is filled where a bar touches both levels": (
        "trading.py",
        "    if low <= stop:\n        return STOP, stop\n",
        "    if low <= stop and high < target:\n        return STOP, stop\n",
        (BOTH_TOUCHED,),
    ),
    "the trader sees the next bar": (
        "trading.py",
        "begin = max(m.history[t], t - p.window + 1)\n",
        "begin = max(m.history[t], t - p.window + 1)\n    t = min(t + 1, m.features.shape[1] - 1)\n    begin += t - s.t\n",
        (LEAK_IN_TRADING,),
    ),
    "a series is known one bar early": (
        "series.py",
        "rows = np.arange(panel.num_bars) - min(lag, panel.num_bars)",
        "rows = np.arange(panel.num_bars) - min(lag, panel.num_bars) + 1",
        (LEAK_IN_SERIES,),
    ),
    "the drawdown guard ignores its threshold": (
        "portfolio.py",
        "fallen = s.equity <= s.peak * (1.0 - p.guard_drawdown)",
        "fallen = p.guard_drawdown <= 1.0 and s.equity < s.peak",
        (GUARDS,),
    ),
    "the turnover guard ignores its threshold": (
        "portfolio.py",
        "large = turnover > p.guard_turnover",
        "large = p.guard_turnover < np.inf",
        (GUARDS,),
    ),
    "changes are counted from the weights ordered, not from those held": (
        "portfolio.py",
        "y[j] = p.scale * score(actions[i, j]) + (w if p.change else 0.0)",
        "y[j] = p.scale * score(actions[i, j]) + (memory[i, n + j] if p.change else 0.0)",
        (NO_TRADE,),
    ),
}


def outcome_of(folder, nodes):
    """Run tests of a copied project uncompiled; returns (exit code, names of the tests that failed, output)."""
    done = run_python(
        "-m", "pytest", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(folder),
        *(f"tests/{node}" for node in nodes), cwd=folder, NUMBA_DISABLE_JIT="1",
    )  # fmt: skip
    return done.returncode, set(re.findall(r"^FAILED tests/(\S+)", done.stdout, re.MULTILINE)), done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in TESTS:
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    return tmp_path


def test_the_unpatched_copy_passes(copied):
    code, failed, output = outcome_of(copied, NODES)
    assert code == 0 and not failed, output
    assert f"{len(NODES)} passed" in output


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_noticed(copied, defect):
    file, old, new, nodes = DEFECTS[defect]
    source = copied / "envs" / file
    text = source.read_text()
    assert text.count(old) == 1, f"the defect no longer fits {file}: {old!r} occurs {text.count(old)} times"
    source.write_text(text.replace(old, new))
    code, failed, output = outcome_of(copied, nodes)
    assert code == 1 and failed == set(nodes), output
