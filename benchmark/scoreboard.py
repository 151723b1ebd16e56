"""The scoreboard: run directories in, scoreboard.json, scoreboard.md and scoreboard.html out.

`python benchmark/scoreboard.py runs --out benchmark/results`; `--compare A B` prints the differences between two algorithms or
run directories instead. Every score comes from the test split of the ledgers. Only runs on the same panel, splits, fill rule
and costs are ranked together; the others get tables of their own, or with --strict a refusal that names the field.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from runs import BARS, Run, common_bars, differing, find, group, latest, load, name_rows

from envs import ledger
from envs.costs import Costs

TEMPLATE = Path(__file__).with_name("scoreboard.html")
BUY_AND_HOLD = "baseline-buy-and-hold"
FORESIGHT = ("baseline-oracle", "baseline-closed-form")  # they know what no agent can: not candidates for a selection
CURVE_POINTS, LEARNING_POINTS = 240, 100
CHARGES = ["commission", "spread", "slippage", "impact", "borrow", "financing"]
COLUMNS = [
    dict(key="sharpe", label="Sharpe", kind="number", help="annualised, net of costs, mean over seeds; 95% interval"),
    dict(key="iqm", label="IQM", kind="number", help="interquartile mean of the Sharpe ratios of all markets and seeds"),
    dict(key="growth", label="growth", kind="percent", help="mean log growth a year, net of costs"),
    dict(key="max_drawdown", label="drawdown", kind="percent", help="deepest, mean over markets and seeds"),
    dict(key="cvar", label="CVaR", kind="percent", help="mean net return of the worst 5% of bars"),
    dict(key="turnover", label="turnover", kind="times", help="sum of absolute weight changes a year"),
    dict(key="cost", label="cost", kind="percent", help="all costs a year, share of equity"),
    dict(key="better", label="P(better)", kind="probability", help="probability of a higher Sharpe ratio than the reference's"),
    dict(key="psr", label="PSR", kind="probability", help="probability that the Sharpe ratio is above zero"),
    dict(key="dsr", label="DSR", kind="probability", help="the same, deflated for every trial of the group"),
    dict(key="seeds", label="seeds", kind="count", help="runs that count, one per seed"),
]


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run directories, or folders that hold them at any depth"""
    out: Path = Path("benchmark/results")
    """folder of scoreboard.json, scoreboard.md and scoreboard.html"""
    strict: bool = False
    """refuse, instead of separate tables, when not all runs can be ranked together"""
    reference: str = "baseline-equal-weight"
    """row that the others are compared with"""
    compare: tuple[str, str] | None = None
    """print the differences between two rows or two (folders of) run directories, and write nothing"""
    resamples: int = 1000
    """bootstrap draws of every interval"""
    seed: int = 0
    """seed of the bootstrap"""
    regimes: bool = True
    """scores by regime, where the panel can be loaded again (synthetic markets and files that are still there)"""
    learning: bool = True
    """learning curves from TensorBoard events"""


def equity_curve(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(bars,) log equity and drawdown of one run, each the mean over its markets; a shorter market keeps its last value."""
    paths = [np.cumsum(ledger.growth(part)) for _, part in frame.groupby("market")]
    longest = max(map(len, paths))
    log_equity = np.stack([np.pad(path, (0, longest - len(path)), mode="edge") for path in paths])
    peak = np.maximum.accumulate(np.maximum(log_equity, 0.0), axis=1)
    return log_equity.mean(axis=0), np.expm1(log_equity - peak).mean(axis=0)


def curves(rows: dict[str, list[Run]]) -> dict:
    """Equity (median, lowest and highest seed) and drawdown (median) of every row at the same few bars."""
    frame = next(iter(rows.values()))[0].ledger
    times = [part["timestamp"] for _, part in frame.groupby("market")]
    dated = all(times[0].reset_index(drop=True).equals(other.reset_index(drop=True)) for other in times[1:])
    out = {}
    for name, runs in rows.items():
        both = [equity_curve(run.ledger) for run in runs]
        bars = min(len(path) for path, _ in both)
        at = np.unique(np.linspace(0, bars - 1, CURVE_POINTS).round().astype(int))
        equity = np.exp(np.stack([path[at] for path, _ in both]))
        drawdown = np.stack([path[at] for _, path in both])
        x = times[0].iloc[at].astype("datetime64[ms]").astype(np.int64) if dated and len(times[0]) > at[-1] else at + 1
        out[name] = {"x": list(x), "equity": _short(np.median(equity, axis=0)), "drawdown": _short(np.median(drawdown, axis=0))}
        if len(runs) > 1:
            out[name] |= {"equity_low": _short(equity.min(axis=0)), "equity_high": _short(equity.max(axis=0))}
    return {"dates": dated, "rows": out}


def learning_curves(rows: dict[str, list[Run]]) -> dict[str, dict]:
    """{tag: {row: median, lowest and highest seed over environment steps}} of the TensorBoard events that can be read."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    out: dict[str, dict] = {}
    for name, runs in rows.items():
        found: dict[str, list] = {}
        for run in runs:
            try:
                events = EventAccumulator(str(run.path), size_guidance={"scalars": 1000})
                events.Reload()
                tags = [t for t in events.Tags()["scalars"] if t == "charts/episodic_return" or t.startswith("eval/")]
                for tag in tags:
                    found.setdefault(tag, []).append(np.array([(e.step, e.value) for e in events.Scalars(tag)], float).T)
            except Exception as error:  # events are decoration: a broken file must not cost the scoreboard
                print(f"{run.path}: TensorBoard events cannot be read: {error}", file=sys.stderr)
        for tag, series in found.items():
            series = [s[:, np.isfinite(s[1])] for s in series]
            series = [s[:, np.argsort(s[0], kind="stable")] for s in series if s.shape[1]]
            if not series:
                continue
            low, high = max(s[0, 0] for s in series), min(s[0, -1] for s in series)
            steps = np.linspace(low, high, LEARNING_POINTS) if high > low else np.array([high])
            values = np.stack([np.interp(steps, *s) for s in series])
            curve = {"x": _short(steps), "y": _short(np.median(values, axis=0))}
            if len(series) > 1:
                curve |= {"low": _short(values.min(axis=0)), "high": _short(values.max(axis=0))}
            out.setdefault(tag, {})[name] = curve
    return dict(sorted(out.items()))


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{x:.5g}") for x in values]


def cost_sensitivity(boards: list[dict]) -> list[dict]:
    """Rows that were run under several multiples of one cost model: {row: [{multiple, value, low, high}, ...]}."""
    families: dict[str, list[dict]] = {}
    for board in boards:
        rest = {k: v for k, v in board["terms"].items() if not k.startswith("market.costs.")}
        families.setdefault(json.dumps(rest), []).append(board)
    out = []
    for family in families.values():
        for base in sorted(family, key=lambda board: (" x" in board["costs"]["name"], -len(board["rows"]))):
            points: dict[str, list[dict]] = {}
            multiples = {id(board): _multiple(board["costs"], base["costs"]) for board in family}
            if sum(m is not None for m in multiples.values()) < 2:
                continue
            for board in sorted((b for b in family if multiples[id(b)] is not None), key=lambda b: multiples[id(b)]):
                for row in board["rows"]:
                    points.setdefault(row["name"], []).append({"multiple": multiples[id(board)], **row["sharpe"]})
            points = {name: p for name, p in points.items() if len(p) > 1}
            if points:
                out.append({"market": base["title"], "facts": f"1x is {Costs(**base['costs']).describe()}", "rows": points})
                break
    return out


def _multiple(costs: dict, base: dict) -> float | None:
    """How many times `base` the costs are, as `Costs.scaled` makes them; None where they are not in proportion."""
    keys = [k for k in base if k not in ("name", "cash_rate", "capital")]
    if costs["cash_rate"] != base["cash_rate"] or costs["capital"] != base["capital"]:
        return None
    ours, theirs = (np.array([float(c[k]) for k in keys]) for c in (costs, base))
    if not theirs.any():
        return 1.0 if not ours.any() else None
    factor = float(ours.sum() / theirs.sum())
    return round(factor, 9) if np.allclose(ours, factor * theirs, rtol=1e-9, atol=0.0) else None


def failed_row(run: Run) -> dict:
    reason = run.reason.strip() or "no reason given"
    head, log = reason[:300] + (" ..." if len(reason) > 300 else ""), run.log
    if not log and len(reason) > 300:
        log = reason[-4000:]
    name = f"{run.exp_name}, seed {run.seed}" if isinstance(run.content.get("args"), dict) and "seed" in run.content["args"] else run.exp_name
    return {"name": name, "path": str(run.path), "reason": head, "log": log}
