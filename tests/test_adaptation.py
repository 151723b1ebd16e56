"""What adaptation is worth: scores, intervals and rates by hand, and nothing missing that goes unsaid."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from envs import adaptation
from envs.adaptation import adaptation_report, print_adaptation, rolling_sharpe
from envs.ledger import write_json
from envs.panel import Panel

RETURNS = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 5.0], [1.0, 6.0, 4.0]])
BASELINE = np.array([1.0, 3.0, 0.0])


def report(returns=RETURNS, baseline=BASELINE, completed=None, seed=0):
    completed = np.isfinite(returns) if completed is None else completed
    return adaptation_report(returns, baseline, completed, seed)


def test_scores_by_hand():
    completed = np.array([[True, True, True], [True, False, True], [True, False, False]])
    found = report(completed=completed)
    assert found["tasks"] == 3 and found["interval"] == "95%, 3 tasks resampled whole"
    assert [stage["mean"] for stage in found["stages"]] == [1.0, 3.0, 4.0]
    assert [stage["completion"] for stage in found["stages"]] == pytest.approx([1.0, 1 / 3, 2 / 3])
    assert found["completion"] == pytest.approx(6 / 9)
    assert found["baseline"]["mean"] == pytest.approx(4 / 3)
    assert found["transfer_gain"]["mean"] == pytest.approx(np.mean([2.0, 2.0, 4.0]))  # last stage - baseline
    assert json.loads(json.dumps(found)) == found


def test_the_gain_is_paired():
    """Tasks differ by far more than what adaptation adds, which is the same on all of them: no doubt about the gain."""
    level = np.arange(20.0) * 100
    found = report(np.column_stack([level, level + 1.5]), level)
    assert found["transfer_gain"] == {"mean": 1.5, "low": 1.5, "high": 1.5}
    assert found["baseline"]["high"] - found["baseline"]["low"] > 300


def test_intervals_are_those_of_a_mean():
    """Students t for normal scores, within what 2000 draws and 40 tasks leave open; wider for a tenth of the tasks."""
    scores = np.random.default_rng(3).standard_normal((40, 2)) * [1.0, 5.0]
    found = report(scores, np.zeros(40))
    for stage, column in zip(found["stages"], scores.T):
        half = student.ppf(0.975, 39) * column.std(ddof=1) / np.sqrt(40)
        assert stage["mean"] == pytest.approx(column.mean())
        assert stage["low"] == pytest.approx(column.mean() - half, abs=0.15 * half)
        assert stage["high"] == pytest.approx(column.mean() + half, abs=0.15 * half)
    few = report(scores[:4], np.zeros(4))["stages"][0]
    assert few["high"] - few["low"] > 1.1 * (np.ptp(np.quantile(scores[:4, 0], [0.25, 0.75])))


def test_intervals_depend_on_the_seed_alone():
    scores = np.random.default_rng(1).standard_normal((12, 3))
    first, again, other = (report(scores, np.zeros(12), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [s["mean"] for s in first["stages"]] == [s["mean"] for s in other["stages"]]


def test_what_is_not_finite_is_not_dropped(tmp_path):
    returns = RETURNS.copy()
    returns[1, 1], returns[2, 2] = np.nan, -np.inf
    found = report(returns)
    assert np.isfinite(list(found["stages"][0].values())).all()
    for score in (found["stages"][1], found["stages"][2], found["transfer_gain"]):
        assert np.isnan([score["mean"], score["low"], score["high"]]).all()
    assert found["completion"] == pytest.approx(7 / 9) and np.isfinite(found["baseline"]["low"])
    write_json(tmp_path / "run.json", found)
    assert json.loads((tmp_path / "run.json").read_text())["transfer_gain"] == {"mean": None, "low": None, "high": None}


def test_one_task_has_no_interval():
    found = report(RETURNS[:1], BASELINE[:1])
    assert found["transfer_gain"]["mean"] == 2.0 and np.isnan(found["transfer_gain"]["low"])


def test_the_table_shows_every_number(capsys):
    print_adaptation(report(np.column_stack([np.arange(4.0), np.arange(4.0) + 2.5]), np.arange(4.0)))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "adaptation on 4 held-out tasks (95%, 4 tasks resampled whole)"
    assert [line.split("  ")[0] for line in lines[2:]] == ["after 0", "after 1", "unadapted baseline", "transfer gain"]
    assert re.fullmatch(r"after 1 +4  \[.*\] +100.0%", lines[3])
    assert re.fullmatch(r"transfer gain +2.5  \[2.5, 2.5\]", lines[-1])


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(returns=np.zeros(3)), r"returns: shape \(3,\): expected \(tasks, stages\)"),
        (dict(returns=np.zeros((3, 0))), r"returns: shape \(3, 0\): expected \(tasks, stages\), at least 1"),
        (dict(baseline=np.zeros(2)), r"baseline: shape \(2,\): expected \(3,\)"),
        (dict(completed=np.ones((3, 2), bool)), r"completed: bool\(3, 2\): expected bool\(3, 3\)"),
        (dict(completed=np.ones((3, 3))), r"completed: float64\(3, 3\): expected bool"),
        (dict(returns=np.full((3, 3), np.nan), completed=np.eye(3) > 0), "task 0, stage 0 is nan: expected finite"),
    ],
)
def test_what_does_not_fit_is_said(change, expected):
    with pytest.raises(ValueError, match=expected):
        report(**change)


# --- Sharpe ratio by regime


def test_rolling_sharpe_by_hand():
    """Windows of 2 bars in runs of the same label, market and split; the fifth bar alone is no window."""
    net = [0.01, 0.03, 0.02, 0.00, 0.05, 0.01, 0.02, -0.01, 0.01, 0.04]
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 2])
    ledger = pd.DataFrame({"split": ["val"] * 7 + ["test"] * 3, "market": [0] * 5 + [1] * 5, "net_return": net})
    found = rolling_sharpe(ledger, labels, 2, bars_per_year=2.0)

    def ratio(a, b):  # of two returns: their mean over |a - b| / sqrt(2), times sqrt(2)
        return (a + b) / 2 / abs(a - b) * 2

    assert list(found) == [0, 1, 2]
    assert found[0] == {"sharpe": pytest.approx(np.mean([ratio(0.01, 0.03), ratio(0.03, 0.02)])), "windows": 2, "stretches": 1}
    assert found[1] == {"sharpe": pytest.approx(np.mean([ratio(0.01, 0.02), 0.0])), "windows": 2, "stretches": 2}
    assert np.isnan(found[2]["sharpe"]) and found[2]["windows"] == found[2]["stretches"] == 0


def test_rolling_sharpe_takes_names_of_regimes_and_markets_in_any_order():
    rng = np.random.default_rng(0)
    ledger = pd.DataFrame({"split": "test", "market": np.arange(60) % 2, "net_return": rng.standard_normal(60)})
    labels = np.where(np.arange(60) < 30, "calm", "wild")
    sorted_ = np.argsort(ledger["market"].to_numpy(), kind="stable")
    found = rolling_sharpe(ledger, labels, 10, 252.0)
    assert found == rolling_sharpe(ledger.iloc[sorted_].reset_index(drop=True), labels[sorted_], 10, 252.0)
    assert found["calm"]["windows"] == found["wild"]["windows"] == 2 * 6 and found["calm"]["stretches"] == 2


@pytest.mark.parametrize(
    "labels, window, expected",
    [(np.zeros(3), 2, r"labels: shape \(3,\): expected \(4,\)"), (np.zeros(4), 1, "window=1: expected at least 2 bars")],
)
def test_what_rolling_sharpe_refuses(labels, window, expected):
    with pytest.raises(ValueError, match=expected):
        rolling_sharpe(pd.DataFrame({"split": "test", "market": 0, "net_return": np.zeros(4)}), labels, window, 252.0)


def test_regimes_are_those_of_the_close_before_a_bar(monkeypatch):
    """25 bars whose orders were given in one regime, 30 in another: 6 and 11 windows of 20."""
    days = np.datetime64("2020-01-01", "ns") + np.arange(60) * np.timedelta64(1, "D")
    panel = Panel("hand", days, ("A",), np.full((60, 1), 10.0))
    monkeypatch.setattr(adaptation, "regimes", lambda _: np.repeat([-1, 0, 3], [4, 25, 31]))
    net = np.random.default_rng(0).standard_normal(55)
    frame = pd.DataFrame({"split": "test", "market": 0, "timestamp": days[5:], "net_return": net})  # decided at rows 4 to 58
    found = adaptation.sharpe_by_regime(frame, panel, np.array([[4, 60]]))
    assert {name: score["windows"] for name, score in found.items()} == {"calm-up": 6, "volatile-down": 11}
    expected = rolling_sharpe(frame[:25], np.zeros(25), 20, panel.bars_per_year)[0.0]["sharpe"]
    assert found["calm-up"]["sharpe"] == expected
