"""How well a meta-learner adapts: scores per stage of adaptation, transfer gain with its interval, completion."""

import numpy as np

from envs.ledger import quantile_levels

RESAMPLES = 2000


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
    low, high = np.quantile(scores[drawn].mean(axis=1), quantile_levels(tasks), axis=0)
    missing = np.isnan(scores).any(axis=0)  # some draws would leave the missing task out
    return np.where(missing, np.nan, [low, high])


def print_adaptation(report: dict):
    """Print a report of `adaptation_report` as a table: a line per stage, the baseline, and the transfer gain."""
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
