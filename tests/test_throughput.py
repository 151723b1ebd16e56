"""benchmark/throughput.py runs, writes what it measured, and does without its peers. No time is asserted: machines vary."""

import json
import sys

import pytest
import throughput
import throughput_gpu
import torch
from conftest import ROOT, SIMULATOR, run_python

TINY = "synthetic:leadlag:bars=300:train=1:val=1:test=1"
SCRIPT = ROOT / "benchmark" / "throughput.py"


def test_command_writes_rows(tmp_path):
    options = ["--quick", "--repeats", "1", "--seconds", "0.01", "--market", TINY, "--num-envs", "1", "32"]
    done = run_python(str(SCRIPT), *options, "--only", "env", "lookback", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "throughput.json").read_text())
    assert content["machine"]["numba"] and content["arguments"]["market"] == TINY
    names = [row["name"] for row in content["rows"] if row["section"] == "env"]
    assert {"1 markets, serial", "32 markets, serial", "32 markets, parallel, 1 threads"} <= set(names)
    lookbacks = [row for row in content["rows"] if row["section"] == "lookback"]
    assert [row["name"] for row in lookbacks] == [f"lookback {k}" for k in (5, 9, 15, 27, 47, 82, 143, 250)]
    for row in content["rows"]:
        assert 0 < row["value_min"] <= row["value"] <= row["value_max"] and row["unit"] == "steps/s"
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and len(row["samples"]) == 1
    assert lookbacks[0]["ratio"] == 1 and all("met" in row for row in lookbacks[1:])
    text = (tmp_path / "throughput.md").read_text()
    assert all(f"| {row['name']} | " in text for row in content["rows"])


def test_missing_peers_are_rows(tmp_path, monkeypatch):
    for package in ("stable_baselines3", "gym_trading_env", "gym_anytrading"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    monkeypatch.setattr(throughput, "script", lambda args, path, market, threads: lambda: 1000.0 * threads)
    rows = throughput.main(throughput.Args(repeats=1, seconds=0.01, market=TINY, only=("peers", "training"), out=tmp_path))
    missing = [row for row in rows if row.get("note") == throughput.INSTALL]
    assert len(missing) == 5 and all("value" not in row and "met" not in row for row in missing)
    assert {row["section"] for row in rows if "value" in row} == {"peers", "training"}
    assert throughput.INSTALL in (tmp_path / "throughput.md").read_text()


def test_ratios_are_of_neighbours():
    first, second = iter([1.0, 10.0, 4.0]), iter([2.0, 30.0, 16.0])
    rows = throughput.compare(
        "x", {"a": lambda: next(first), "b": lambda: next(second), "c": "why"}, 3, targets=[("b", 2, 3), ("c", 1, 2)]
    )
    assert (rows[1]["ratio_min"], rows[1]["ratio"], rows[1]["ratio_max"]) == (2, 3, 4) and rows[1]["met"]
    assert rows[2]["note"] == "why" and "met" not in rows[2] and rows[2]["target"] == "<= 2"


def test_unknown_section_is_refused():
    with pytest.raises(SystemExit, match="--only nonsense"):
        throughput.Args(only=("nonsense",))


def test_device_section_under_the_simulator(tmp_path):
    small = ":bars=300:train=1:val=1:test=1"
    command = [str(SCRIPT), "--device", "cuda", "--repeats", "1", "--seconds", "0.01", "--num-envs", "3"]
    command += ["--market", f"synthetic:leadlag:assets=4:leaders=2:followers=2{small}", "--out", str(tmp_path)]
    command += ["--portfolio", f"synthetic:ou{small}", "--trading", f"synthetic:ou{small}", "--only", "gpu-env", "gpu-roofline"]
    done = run_python("-W", "ignore", *command, **SIMULATOR)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "throughput_cuda.json").read_text())
    assert "simulated GPU" in content["machine"]["device"]
    eager = [row for row in content["rows"] if row["name"].endswith("eager")]
    assert [row["name"].split(",")[0] for row in eager] == ["LeadLag-v0", "Portfolio-v0", "Trading-v0"]
    assert all(row["value"] > 0 for row in eager)
    shares = [row for row in content["rows"] if row["section"] == "gpu-roofline"]
    assert [row["unit"] for row in shares] == 3 * ["GB/s"] + 3 * ["GFLOP/s"] and all(row["ratio"] > 0 for row in shares)
    assert "no graphs without a GPU" in (tmp_path / "throughput_cuda.md").read_text()


def test_training_and_time_to_capture_are_read_off_runs(monkeypatch):
    """The sections that start scripts, on the CPU."""
    monkeypatch.setattr(throughput_gpu, "MODES", {"eager": ("--no-cuda",)})
    monkeypatch.setattr(throughput_gpu, "FILLED", 64)
    args = throughput.Args(repeats=1, num_envs=(64,), market=TINY)
    (row,) = throughput_gpu.measure_training(args)
    assert row["value"] > 0 and row["warmup_seconds"][0] > 0 and row["target"] == ">= 10,000,000 steps/s" and not row["met"]

    monkeypatch.setattr(throughput_gpu, "CAPTURE_MARKET", TINY)
    options = ("--no-cuda", "--num-envs", 64, "--num-steps", 16, "--eval-every", 2)
    monkeypatch.setattr(throughput_gpu, "CAPTURE", options)
    monkeypatch.setattr(throughput_gpu, "CAPTURE_STEPS", 8 * 1024)
    for reachable, growth in ((True, 1e9), (False, -1e9)):
        monkeypatch.setattr(throughput_gpu.references, "capture", lambda found, known, share=growth: share)
        (row,) = throughput_gpu.measure_capture(args)
        assert row["met"] == reachable and row.get("note") == (None if reachable else "not reached")
        assert not reachable or row["value"] < 60


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="--device='tpu': expected cpu, cuda"):
        throughput.Args(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds 0 CUDA devices"):
            throughput.Args(device="cuda")
