"""What throughput.py and throughput_gpu.py share: measurements in turns, their rows and their figures."""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs.synthetic import load_market

ROOT = Path(__file__).resolve().parents[1]


def timed(step: Callable[[], object], steps: int, seconds: float) -> Callable[[], float]:
    """A measurement of steps/s: calls `step`, each of which takes `steps` steps, until `seconds` are over."""

    def measure():
        calls, start = 0, time.perf_counter()
        while True:
            step()
            calls += 1
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return calls * steps / elapsed

    step()  # warm-up: compilation, first touch of the memory
    return measure


def compare(
    section, contestants: dict[str, Callable[[], float] | str], repeats, faster_by=False, targets=(), unit="steps/s"
) -> list[dict]:
    """Rows of contestants measured in turns; the first is the reference of the ratio.

    The ratio is the row's speed over the reference's, or, with `faster_by`, the reference's over the row's. A contestant
    that is a string is one that cannot run, and why. targets: (name, lowest, highest) of ratios that the project wants.
    """
    running = {name: measure for name, measure in contestants.items() if callable(measure)}
    samples = {name: [] for name in running}
    for _ in range(repeats):
        for name, measure in running.items():
            samples[name].append(measure())
    rows, reference = [], next(iter(running))
    for name, measure in contestants.items():
        row = {"section": section, "name": name, "unit": unit, "reference": reference}
        if name in running:
            ratios = np.divide(samples[name], samples[reference])
            ratios = 1.0 / ratios if faster_by else ratios
            row |= {"samples": samples[name], **spread("value", samples[name]), **spread("ratio", ratios)}
        else:
            row["note"] = measure
        for wanted, lowest, highest in targets:
            if wanted == name:
                row["target"] = f">= {lowest}" if np.isinf(highest) else f"<= {highest}"
                row |= {"met": bool(lowest <= row["ratio"] <= highest)} if "ratio" in row else {}
        rows.append(row)
        print(f"  {name:<44} {figure(row, 'value')} {unit}  ratio {figure(row, 'ratio')} {row.get('note', '')}", flush=True)
    return rows


def spread(name: str, values) -> dict[str, float]:
    return {name: float(np.median(values)), f"{name}_min": float(np.min(values)), f"{name}_max": float(np.max(values))}


def figure(row: dict, name: str) -> str:
    if name not in row:
        return "-"
    low, middle, high = (row[key] for key in (f"{name}_min", name, f"{name}_max"))
    return f"{middle:,.0f} [{low:,.0f}, {high:,.0f}]" if middle >= 1000 else f"{middle:.3g} [{low:.3g}, {high:.3g}]"


@functools.cache
def tables(kind: type, market: str):
    """The tables of a market, such as LeadLagData, made once."""
    return kind(load_market(market, 1))


def run_script(path: Path, *options) -> tuple[dict, dict[str, list[tuple[int, float]]]]:
    """Run a script of the project as a process: its run.json, and its scalars by name, as (step, value).

    Raises RuntimeError with the end of what it said if it fails.
    """
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, path, "--runs-dir", runs, *options]
        done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path} failed:\n{done.stderr[-3000:]}")
        (folder,) = Path(runs).iterdir()
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        return json.loads((folder / "run.json").read_text()), scalars
