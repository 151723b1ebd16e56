"""Does it learn? Markets whose answer is known, and classic control against published results. Minutes each: -m slow."""

import json

import numpy as np
import pytest
from conftest import ROOT, run_python

from envs import references
from envs.leadlag_tables import LeadLagData
from envs.ledger import growth
from envs.synthetic import load_market

SCRIPT = ROOT / "algos" / "ppo_leadlag.py"
REAL = ROOT.parent / "shared" / "data"
SMALL_BUDGET = ("--total-timesteps", "65536", "--num-envs", "256", "--num-steps", "16", "--eval-every", "4")
SECONDS = 3600

pytestmark = pytest.mark.slow


def train(tmp_path, *options) -> dict:
    """run.json of a run of the script on one thread."""
    done = run_python(str(SCRIPT), *options, "--num-threads", "1", "--runs-dir", str(tmp_path), timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    assert (folder / "model.pt").exists()
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("seed", range(1, 6))
def test_captures_the_planted_signal_on_every_seed(tmp_path, seed):
    run = train(tmp_path, "--market", "synthetic:leadlag", "--seed", str(seed))
    assert run["capture"] >= 0.70


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_gap_to_capture_is_no_accident(seed):
    """Regime oracle less best fixed lookback, over the 20 test markets of the default: at least 3 standard errors."""
    panel = load_market("synthetic:leadlag", seed)
    frames = references.references(LeadLagData(panel), panel.split(), seed)
    by_market = {name: frame.assign(growth=growth(frame)).groupby("market")["growth"].mean() for name, frame in frames.items()}
    best = max((name for name in frames if name.startswith("lookback")), key=lambda name: by_market[name].mean())
    gap = (by_market["oracle regime"] - by_market[best]).to_numpy()
    assert len(gap) == 20
    assert gap.mean() >= 3 * gap.std(ddof=1) / np.sqrt(20), f"{best}: {gap.mean() / gap.std(ddof=1) * np.sqrt(20):.2f}"


@pytest.mark.parametrize("seed", range(1, 4))
def test_finds_nothing_where_there_is_nothing(tmp_path, seed):
    agent = train(tmp_path, "--market", "synthetic:noise", "--seed", str(seed))["scores"]["test"]["agent"]
    assert agent["gross_sharpe_low"] <= 0 <= agent["gross_sharpe_high"]
    assert agent["sharpe"] < agent["gross_sharpe"] and agent["cost"] > 0


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("env_id, least", [("CartPole-v1", 475), ("Acrobot-v1", -95)])
def test_classic_control_reaches_cleanrls_results(tmp_path, env_id, least, seed):
    """CleanRL's documentation: 490 +- 6 and -86.4 +- 1.3 after 500k steps."""
    run = train(tmp_path, "--env-id", env_id, "--total-timesteps", "500000", "--seed", str(seed))
    assert run["last_100_returns"] >= least


@pytest.mark.parametrize("market", ["sp500", "crypto_daily_close.csv", "us_equities_daily.parquet", "crypto_hourly.parquet"])
def test_real_markets_run_end_to_end(tmp_path, market):
    path = market if market == "sp500" else str(REAL / market)
    if market == "sp500":
        pytest.importorskip("skfolio", reason="sp500 comes with skfolio, which is not installed")
    elif not (REAL / market).exists():
        pytest.skip(f"{path} is not there: real data for measuring are not part of the project")
    run = train(tmp_path, "--market", path, *SMALL_BUDGET)
    assert run["status"] == "finished" and run["capture"] is None
    scores = run["scores"]["test"]
    assert {"agent", "best in training", "random", "equal weight"} < set(scores)
    for name, score in scores.items():
        assert (
            score["bars"] > 100 and np.isfinite([score[key] for key in ("growth", "sharpe", "max_drawdown", "cost")]).all()
        ), name
    times = run["panel"]["splits"]
    assert times["train"]["end"] < times["val"]["start"] < times["val"]["end"] < times["test"]["start"]
