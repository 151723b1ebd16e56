"""An independent backtester, in an environment of its own, makes the same equity of the same weights and fees."""

import os
import subprocess
import sys
import venv

import numpy as np
import pytest
import replay

from envs.costs import RUIN, execution, load_costs
from envs.panel import Panel, Split

pytestmark = pytest.mark.slow  # installs some hundred megabytes

VECTORBT = "vectorbt==1.2.0"
BARS, SYMBOLS = 600, 5
# weights, fees in bps; an account that is traded every bar is ruined by more
CASES = {f"{kind}, {fee} bps": (kind, fee) for kind in ("long", "invested", "long/short") for fee in (0, 1, 10)}
CASES |= {f"now and then, {fee} bps": ("now and then", fee) for fee in (0, 10, 50)}

# Target percent is a share of the value before the fees of the bar; the orders of a bar sell first, and share one account.
SCRIPT = """
import sys
import numpy as np
import vectorbt as vbt

given, out = np.load(sys.argv[1]), {}
for name in given["names"]:
    portfolio = vbt.Portfolio.from_orders(
        given["close"], size=given[f"size of {name}"], size_type="targetpercent", fees=float(given[f"fee of {name}"]),
        init_cash=1e6, group_by=True, cash_sharing=True, call_seq="auto", freq="1D",
    )
    assert (portfolio.orders.records["size"] > 0).any()
    out[name] = portfolio.value().to_numpy() / 1e6
np.savez(sys.argv[2], **out)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """Interpreter of a fresh virtual environment with vectorbt."""
    folder = tmp_path_factory.mktemp("vectorbt")
    venv.create(folder, with_pip=True)
    found = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    done = subprocess.run([found, "-m", "pip", "install", "-q", VECTORBT], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        pytest.skip(f"{VECTORBT} cannot be installed for Python {sys.version.split()[0]}: {done.stderr.strip()[-500:]}")
    return found


def weights(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(BARS, SYMBOLS) weights to order; NaN: no order."""
    if kind == "long/short":
        drawn = rng.standard_normal((BARS, SYMBOLS))
        drawn -= drawn.mean(axis=1, keepdims=True)  # vectorbt lends no cash
        return 0.1 + 1.4 * drawn / np.abs(drawn).sum(axis=1, keepdims=True)
    drawn = rng.dirichlet(np.ones(SYMBOLS + (kind != "invested")), size=BARS)[:, :SYMBOLS]  # else the last share is cash
    if kind == "now and then":
        drawn[rng.random(BARS) < 0.8] = np.nan
    return drawn


def test_equity_is_that_of_vectorbt(python, tmp_path):
    rng = np.random.default_rng(0)
    close = 50.0 * np.exp((0.0003 + 0.02 * rng.standard_normal((BARS, SYMBOLS))).cumsum(axis=0))
    days = np.datetime64("2020-01-01", "ns") + np.arange(BARS).astype("timedelta64[D]")
    panel = Panel(name="made", timestamps=days, symbols=tuple("ABCDE"), close=close)
    split, first = Split("test", np.array([[0, BARS]])), np.array([0])
    given, ours = {"names": np.array(list(CASES)), "close": close}, {}
    for name, (kind, fee) in CASES.items():
        targets = weights(kind, rng)
        costs = load_costs(f"zero:commission_bps={fee}")
        ex = execution(panel, "same_close", costs)
        frame = replay.account(panel, ex, costs.rates, split, first, targets)  # ledger.backtest_weights, with holes
        # Our targets are met after costs, vectorbt's are shares of the value before them: it is given the share that is
        # left after the bar's commission, and makes prices, positions, cash, fees and equity of it by itself. Its value
        # at a close is that after the trades of this close; ours, before them. Nothing is ordered at the last close.
        commission = np.append(frame["commission"], 0.0)
        given[f"size of {name}"] = np.vstack([targets[:-1], np.full(SYMBOLS, np.nan)]) * (1.0 - commission)[:, None]
        given[f"fee of {name}"] = np.array(fee * 1e-4)
        ours[name] = np.append(1.0, frame["equity"]) * (1.0 - commission)
        assert (commission > 0).any() == (fee > 0) and frame["turnover"].sum() > 10
        assert frame["equity"].min() > RUIN
    np.savez(tmp_path / "given.npz", **given)
    call = [python, "-I", "-c", SCRIPT, str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(tmp_path / "found.npz") as found:
        for name, equity in ours.items():
            np.testing.assert_allclose(found[name], equity, rtol=1e-9, err_msg=name)
