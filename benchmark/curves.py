"""What the scoreboard draws: equity, drawdown, learning and cost sensitivity, each over the seeds of a row."""

import json
import sys

import numpy as np
import pandas as pd
from rundirs import Run

from envs import ledger
from envs.costs import Costs

CURVE_POINTS, LEARNING_POINTS = 240, 100


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
    """By market, rows at several multiples of its costs, {row: [{multiple, value, low, high}, ...]}.

    First the same orders replayed, from each board's `sensitivity`; then what was run anew under multiples of one cost model.
    """
    out = [
        {"market": board["name"], "rows": board["sensitivity"],
         "facts": f"the same orders, replayed; 1x is {Costs(**board['costs']).describe()}"}
        for board in boards
        if board["sensitivity"]
    ]  # fmt: skip
    families: dict[str, list[dict]] = {}
    for board in boards:
        rest = {k: v for k, v in board["terms"].items() if not k.startswith("market.costs.")}
        families.setdefault(json.dumps(rest), []).append(board)
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
                facts = f"run anew at each multiple; 1x is {Costs(**base['costs']).describe()}"
                out.append({"market": base["title"], "facts": facts, "rows": points})
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
