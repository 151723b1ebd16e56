"""What is learned from logged data, beside who logged them. Minutes each: -m slow."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from envs.dataset import Dataset
from envs.dataset_writer import merge

SECONDS = 3600
GOOD = 0.90  # "within 10%" of online PPO

pytestmark = pytest.mark.slow


def run_json(folder: Path) -> dict:
    """Of the one run directory in `folder`."""
    (run_dir,) = folder.iterdir()
    return json.loads((run_dir / "run.json").read_text())


def run(script: str, *options: str) -> None:
    done = run_python(str(ROOT / script), *options, "--num-threads", "1", timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


def learn(script: str, data: Path, runs: Path, *options: str) -> dict:
    """run.json of an offline script on a dataset."""
    run(f"algos/{script}.py", "--dataset", str(data / "dataset.hdf5"), "--runs-dir", str(runs), *options)
    return run_json(runs)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """collected(market, seed): folder of the default mix of data on it, and the test score of the PPO that is part of it."""
    folder, kept = tmp_path_factory.mktemp("data"), {}

    def collect(market, seed):
        if (market, seed) not in kept:
            out = folder / f"{market}-{seed}"
            regime = "lookback" if market == "leadlag" else "long_short"
            options = ["--regime", regime, "--market", f"synthetic:{market}", "--seed", str(seed)]
            run("benchmark/collect.py", *options, "--out", str(out))
            agent = run_json(out / "runs")["scores"]["test"]["agent"]
            kept[market, seed] = out, agent["growth" if market == "leadlag" else "utility"]
        return kept[market, seed]

    return collect


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("market", ["garleanu-pedersen", "leadlag"])
@pytest.mark.parametrize("script", ["iql_portfolio", "cql_portfolio"])
def test_comes_within_a_tenth_of_online_ppo(collected, tmp_path, script, market, seed):
    data, online = collected(market, seed)
    found = learn(script, data, tmp_path, "--seed", str(seed))
    assert found["scores"]["test"]["agent"]["utility"] >= GOOD * online


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("market", ["garleanu-pedersen", "leadlag"])
def test_the_best_tenth_is_better_to_imitate_than_all(collected, tmp_path, market, seed):
    data, _ = collected(market, seed)
    found = {
        percent: learn("bc_portfolio", data, tmp_path / percent, "--seed", str(seed), "--top-percent", percent)
        for percent in ("10", "100")
    }
    score = {percent: run["scores"]["test"]["agent"]["utility"] for percent, run in found.items()}
    assert score["10"] > score["100"]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """Folder of episodes of PPO after a fifth, half and all of its training, and their mean return."""
    folder = tmp_path_factory.mktemp("pendulum")
    logs, shares = folder / "logs", ("0.2", "0.5", "1")
    options = ["--env-id", "Pendulum-v1", "--log-dataset", str(logs), "--log-at", *shares, "--log-episodes", "100"]
    run("algos/ppo_portfolio.py", *options, "--runs-dir", str(folder / "runs"))
    merge(folder / "all" / "dataset.hdf5", sorted(logs.glob("*/dataset.hdf5")))
    data = Dataset(folder / "all" / "dataset.hdf5")
    total = sum(float(block["rewards"].sum()) for block in data.blocks(range(data.meta["episodes"]), ("rewards",)))
    return folder / "all", total / data.meta["episodes"]


@pytest.mark.parametrize("script", ["iql_portfolio", "cql_portfolio"])
def test_pendulum_beats_the_mean_of_who_logged_it(pendulum, tmp_path, script):
    data, mean = pendulum
    assert learn(script, data, tmp_path)["eval_return"]["last"] >= mean
