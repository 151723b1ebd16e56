"""What a sweep found: its best trial against the script's defaults on validation and test, effects of factors, and pictures.

tuner.py calls this when a study has ended. Validation scores are in the study; the ledgers of two trials are read again for
those of the test split, for the first and only time.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import plotly.io
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import bootstrap

from benchmark.tuning.space import ROOT, as_arguments, brief, environment
from benchmark.tuning.trial import IQM, score_of
from envs import ledger

RESAMPLES = 10_000


def interval(scores: np.ndarray, statistic=np.mean) -> tuple[float, float]:
    """95% interval of a statistic of scores (n,) of n runs: bootstrap, expanded for few of them (ledger.quantile_levels)."""
    if len(scores) < 2:
        return float("nan"), float("nan")
    low, _ = ledger.quantile_levels(len(scores))
    drawn = bootstrap(
        (scores,), statistic, confidence_level=1.0 - 2.0 * low, method="percentile", n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(drawn.low), float(drawn.high)


def write_trials(study: optuna.Study, out: Path) -> int:
    """Write trials.json, every trial that has ended with its runs; returns how many were tried, each once if it was lost."""
    setup = study.user_attrs["setup"]
    ended = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    trials = len({t.user_attrs["slot"] for t in ended})
    tried = [
        {
            "number": t.number, "slot": t.user_attrs["slot"], "state": t.state.name.lower(), "value": t.value,
            "params": t.params, "validations": list(t.intermediate_values.values()),
            "seconds": t.duration.total_seconds() if t.duration else None,
            "failure": t.user_attrs.get("failure"), "runs": t.user_attrs.get("runs", []),
        }
        for t in ended
    ]  # fmt: skip
    ledger.write_json(out / "trials.json", {"study": study.study_name, **setup, "trials": trials, "tried": tried})
    return trials


def write_results(study: optuna.Study, trials: int, out: Path) -> str:
    """Write all else that a study leaves in `out`, and return the report as text. trials: how many were tried.

    best.json: the arguments that rerun the best trial, and its scores beside those of slot 0, the start. best/, start/: copies
    of their run directories; run.json of the best ones counts the trials, which deflates their Sharpe ratio on a scoreboard.
    report.md, report.html and, of a design, effects.csv. Exits with one line where no trial was completed.
    """
    setup = study.user_attrs["setup"]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        sys.exit(f"--study {study.study_name}: no trial of {trials} was completed; see {out / 'trials.json'}")
    best = max(complete, key=lambda t: t.value)
    start = next((t for t in complete if t.user_attrs["slot"] == 0), None)
    told = {name: keep(trial, out / name, setup["metric"]) for name, trial in (("best", best), ("start", start)) if trial}
    for copy in (out / "best").glob("*/*/run.json"):
        ledger.write_json(copy, json.loads(copy.read_text()) | {"trials": trials})
    ledger.write_json(out / "best.json", {
        "script": setup["script"], "args": [*setup["arguments"], *as_arguments(best.params)], **told["best"],
        "metric": setup["metric"], "aggregate": setup["aggregate"], "trials": trials, "start": told.get("start"),
    })  # fmt: skip
    lines = [f"# {Path(setup['script']).stem}: {study.study_name}, {trials} trials", ""]
    lines += gain(told, setup, out)
    if setup["design"] != "search":
        lines += effects(complete, setup, out)
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(study, complete, out / "report.html")
    return "\n".join([*lines, "", f"results in {out}"])


def keep(trial: FrozenTrial, folder: Path, metric: str) -> dict:
    """Copy a trial's run directories to `folder`; the trial with its scores, those on the test split among them."""
    shutil.rmtree(folder, ignore_errors=True)
    runs = []
    for run in trial.user_attrs["runs"]:
        made = Path(run["run_dir"])
        shutil.copytree(made, folder / made.parent.name / made.name)
        runs.append(run | {"test": score_of(made, metric, "test")})
    return {"trial": trial.number, "value": trial.value, "params": trial.params, "runs": runs}


def gain(told: dict[str, dict], setup: dict, out: Path) -> list[str]:
    """The best trial against the start, as Markdown: the study's metric by run, and the scoreboard's comparison."""
    best, start = told["best"], told.get("start")
    params = brief(best["params"]) or "the arguments given"
    lines = [f"Best: trial {best['trial']}, {setup['aggregate']} of the validation scores {best['value']:.6g}: {params}", ""]
    if start is None:
        return [*lines, "The start failed, so that there is nothing to compare with."]
    if start["trial"] == best["trial"]:
        lines += ["It is the start itself: nothing was gained.", ""]
    else:
        more = f", {best['value'] / start['value'] - 1.0:+.1%}" if start["value"] > 0 else ""
        lines += [f"Start: trial {start['trial']}, {start['value']:.6g}{more}.", ""]
    lines += [f"| {setup['metric']} | start | best | gain | 95% interval |", "|---|---|---|---|---|"]
    for split, key in (("validation", "score"), ("test", "test")):
        a, b = (np.array([run[key] for run in trial["runs"]]) for trial in (start, best))
        low, high = interval(b - a)
        shown = "-" if np.isnan(low) else f"[{low:.6g}, {high:.6g}]"
        lines.append(f"| {split} | {a.mean():.6g} | {b.mean():.6g} | {(b - a).mean():.6g} | {shown} |")
    lines += ["", f"Means over {len(best['runs'])} runs; differences paired by seed and market, the interval redraws them.", ""]
    lines += ["| seed | market | start, validation | best | start, test | best |", "|---|---|---|---|---|---|"]
    for a, b in zip(start["runs"], best["runs"]):
        scores = " | ".join(f"{run[key]:.6g}" for key in ("score", "test") for run in (a, b))
        lines.append(f"| {a['seed']} | {a['market'] or 'default'} | {scores} |")
    if start["trial"] != best["trial"]:
        lines += ["", "On the test split, histories (or blocks of bars) and seeds redrawn:", "", "```text", compare(out), "```"]
    return lines


def compare(out: Path) -> str:
    """What the scoreboard says of the best runs and those of the start, or why it says nothing."""
    call = [sys.executable, str(ROOT / "benchmark" / "scoreboard.py"), "--compare", str(out / "best"), str(out / "start")]
    done = subprocess.run(call, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"no comparison: {done.stderr.strip()}"


def effects(complete: list[FrozenTrial], setup: dict, out: Path) -> list[str]:
    """Tables of a design, as Markdown: every combination over its runs, and each factor's levels against its first.

    An effect is the mean difference between trials that differ in that factor alone, of the same seed and market; its
    interval redraws seeds and markets. effects.csv holds the same.
    """
    scores = {
        tuple(t.params[name] for name in setup["space"]): np.array([r["score"] for r in t.user_attrs["runs"]]) for t in complete
    }
    names = list(setup["space"])
    lines = ["", f"| {' | '.join([*names, 'mean', 'IQM', '95% interval of the IQM'])} |", "|" + "---|" * (len(names) + 3)]
    for levels, values in scores.items():
        low, high = interval(values, IQM)
        numbers = [f"{values.mean():.6g}", f"{IQM(values):.6g}", "-" if np.isnan(low) else f"[{low:.6g}, {high:.6g}]"]
        lines.append(f"| {' | '.join([*map(str, levels), *numbers])} |")
    rows = []
    for position, name in enumerate(names):
        choices = optuna.distributions.json_to_distribution(setup["space"][name]).choices
        for level in choices[1:]:
            pairs = [
                values - scores[other]
                for levels, values in scores.items()
                if levels[position] == level and (other := (*levels[:position], choices[0], *levels[position + 1 :])) in scores
            ]
            if pairs:
                differences = np.mean(pairs, axis=0)
                rows.append((name, level, choices[0], float(differences.mean()), *interval(differences), len(pairs)))
    with (out / "effects.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("factor", "level", "against", "effect", "low", "high", "pairs"), *rows])
    if rows:
        lines += ["", "| factor | level | against | effect | 95% interval | pairs |", "|---|---|---|---|---|---|"]
        for name, level, first, effect, low, high, pairs in rows:
            shown = "-" if np.isnan(low) else f"[{low:.6g}, {high:.6g}]"
            lines.append(f"| {name} | {level} | {first} | {effect:.6g} | {shown} | {pairs} |")
        lines += ["", "Differences of validation scores, paired by seed and market, which the intervals redraw."]
    return lines


def draw(study: optuna.Study, complete: list[FrozenTrial], path: Path):
    """One page that needs no network: history, and, where parameters varied, parallel coordinates and importances."""
    figures = [visualization.plot_optimization_history(study)]
    if len({t.value for t in complete}) > 1 and complete[0].params:
        figures += [visualization.plot_parallel_coordinate(study), visualization.plot_param_importances(study)]
    parts = [plotly.io.to_html(figure, include_plotlyjs=number == 0, full_html=False) for number, figure in enumerate(figures)]
    head = f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{study.study_name}</title><body>"
    path.write_text("\n".join([head, *parts, "</body></html>"]), encoding="utf-8")
