"""How well a meta-learner adapts: scores per stage of adaptation, transfer gain with its interval, completion, and the Sharpe
ratio in windows of each regime."""

import numpy as np
import pandas as pd

from envs.features import REGIMES
from envs.ledger import decided_rows, quantile_levels, sharpe
from envs.panel import Panel
from envs.tasks import regimes

RESAMPLES = 2000
REGIME_WINDOW = 20  # bars


def adaptation_report(returns: np.ndarray, baseline: np.ndarray, completed: np.ndarray, seed: int) -> dict:
    """What adaptation is worth on held-out tasks, every stage scored on the same windows; as JSON can hold it.

    returns: (tasks, stages) score of each task after 0, 1, 2... updates or episodes, in any unit. baseline: (tasks,) score
    of the unadapted agent on the same windows. completed: (tasks, stages) bool, the episode was neither ruined nor not finite.
    seed: of the bootstrap.

    Returns {"tasks", "interval" (how intervals were drawn), "stages": [{"mean", "low", "high", "completion"}, ...], "baseline":
    {"mean", "low", "high"}, "transfer_gain": the same of last stage - baseline, task by task, "completion": share of all
    episodes}. low and high are a 95% interval: tasks are resampled whole, with all their stages, and the percentiles expanded
    for their number (`ledger.quantile_levels`; NaN for one task). What is not finite is not dropped: it makes the scores that
    it is part of NaN.

    Raises ValueError naming the argument whose shape or type does not fit, or the task and stage that are marked completed but
    not finite.
    """
    returns, baseline, completed = np.asarray(returns, np.float64), np.asarray(baseline, np.float64), np.asarray(completed)
    if returns.ndim != 2 or returns.size == 0:
        raise ValueError(f"returns: shape {returns.shape}: expected (tasks, stages), at least 1 of each")
    if baseline.shape != returns.shape[:1]:
        raise ValueError(f"baseline: shape {baseline.shape}: expected ({len(returns)},), one score per task")
    if completed.shape != returns.shape or completed.dtype != bool:
        raise ValueError(f"completed: {completed.dtype}{completed.shape}: expected bool{returns.shape}, as returns has")
    wrong = np.argwhere(completed & ~np.isfinite(returns))
    if len(wrong):
        task, stage = wrong[0]
        raise ValueError(f"returns: task {task}, stage {stage} is {returns[task, stage]}: expected finite where completed")

    tasks = len(returns)
    scores = np.column_stack([returns, baseline, returns[:, -1] - baseline])
    scores[~np.isfinite(scores)] = np.nan  # an infinite mean would have an interval of infinities and NaN
    mean, low, high = scores.mean(axis=0), *_interval(scores, seed)
    found = [{"mean": float(m), "low": float(a), "high": float(b)} for m, a, b in zip(mean, low, high)]
    rates = completed.mean(axis=0)
    return {
        "tasks": tasks,
        "interval": f"95%, {tasks} tasks resampled whole",
        "stages": [score | {"completion": float(rate)} for score, rate in zip(found, rates)],
        "baseline": found[-2],
        "transfer_gain": found[-1],
        "completion": float(completed.mean()),
    }


def _interval(scores: np.ndarray, seed: int) -> np.ndarray:
    """(2, C) bounds of the 95% bootstrap interval of the mean of each column of scores (tasks, C)."""
    tasks = len(scores)
    if tasks == 1:
        return np.full((2, scores.shape[1]), np.nan)
    drawn = np.random.default_rng(seed).integers(tasks, size=(RESAMPLES, tasks))
    return np.quantile(scores[drawn].mean(axis=1), quantile_levels(tasks), axis=0)  # NaN where any draw is


def print_adaptation(report: dict):
    """Print a report of `adaptation_report` as a table: a line per stage, the baseline, and the transfer gain; and, if a script
    has put it there as "sharpe_by_regime", what that function found."""
    print(f"\nadaptation on {report['tasks']} held-out tasks ({report['interval']})")
    print(f"{'':<24}{'mean':>10}  {'interval':<22}{'completed':>10}")

    def line(name, score):
        interval = f"[{score['low']:.4g}, {score['high']:.4g}]"
        completion = f"{score['completion']:>10.1%}" if "completion" in score else ""
        print(f"{name:<24}{score['mean']:>10.4g}  {interval:<22}{completion}".rstrip())

    for stage, score in enumerate(report["stages"]):
        line(f"after {stage}", score)
    line("unadapted baseline", report["baseline"])
    line("transfer gain", report["transfer_gain"])
    for label, found in report.get("sharpe_by_regime", {}).items():
        print(f"{label:<24}{found['sharpe']:>10.2f}  Sharpe ratio in {found['windows']} windows of {REGIME_WINDOW} bars")


def rolling_sharpe(ledger: pd.DataFrame, labels: np.ndarray, window: int, bars_per_year: float) -> dict:
    """Sharpe ratio of net returns over the windows of `window` bars that lie in one regime, by regime.

    labels: (len(ledger),) the regime of each bar; a causal one is that of the row at which the bar's orders were given
    (`ledger.decided_rows`). A stretch is a run of bars of one market and split with the same label; windows begin at each of
    its bars but the last window - 1, and so overlap.

    Returns label -> {"sharpe": mean of `ledger.sharpe` over its windows, annualised, NaN without one; "windows": their
    number; "stretches": number of the stretches that they lie in, which do not overlap}, labels ascending.

    Raises ValueError if there is not one label for each bar, or window < 2.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(ledger),):
        raise ValueError(f"labels: shape {labels.shape}: expected ({len(ledger)},), one for each bar of the ledger")
    if window < 2:
        raise ValueError(f"window={window}: expected at least 2 bars")
    net, found = ledger["net_return"].to_numpy(), {label: [] for label in np.unique(labels).tolist()}
    for rows in ledger.groupby(["split", "market"]).indices.values():
        for stretch in np.split(rows, np.flatnonzero(labels[rows][1:] != labels[rows][:-1]) + 1):
            if len(stretch) >= window:
                views = np.lib.stride_tricks.sliding_window_view(net[stretch], window)
                found[labels[stretch[0]].item()].append([sharpe(view, bars_per_year) for view in views])
    return {
        label: {
            "sharpe": float(np.mean(np.concatenate(parts))) if parts else float("nan"),
            "windows": sum(map(len, parts)),
            "stretches": len(parts),
        }
        for label, parts in found.items()
    }


def sharpe_by_regime(ledger: pd.DataFrame, panel: Panel, ranges: np.ndarray) -> dict:
    """`rolling_sharpe` over windows of REGIME_WINDOW bars, by the regime in which orders were given (`tasks.regimes`).

    ranges: (markets, 2), rows [start, stop) of the panel in which the bars of each of the ledger's markets lie.
    """
    names = np.array([*REGIMES, "unknown"])[regimes(panel)]  # -1, the last one: nothing is known yet
    return rolling_sharpe(ledger, names[decided_rows(ledger, panel, ranges)], REGIME_WINDOW, panel.bars_per_year)
