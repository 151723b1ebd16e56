"""Backtest a policy over a split, keep every bar in a ledger, and write the run directory that leaves a script.

A ledger is a pandas DataFrame with one row per bar and market (`LEDGER`); everything that a scoreboard shows is computed
from it. A run directory holds `run.json`, `ledger.parquet`, `model.pt` and TensorBoard events.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from arch.bootstrap import StationaryBootstrap, optimal_block_length
from numba import njit
from scipy.stats import norm
from scipy.stats import t as student

from envs.costs import EQUITY, RECORD, RUIN, Execution, account_step
from envs.panel import Panel, Split
from envs.vector import MarketVectorEnv

LEDGER = ("split", "market", "timestamp", *RECORD, "action")
SAME = 1e-10  # returns that differ by no more than this share of the largest do not vary: rounding
PACKAGES = ("torch", "numpy", "numba", "gymnasium", "pandas", "tyro")

# policy(observations (n, D), action masks (n, A) or None, rows of the panel (n,)) -> actions (n, ...)
Policy = Callable[[np.ndarray, np.ndarray | None, np.ndarray], np.ndarray]


def backtest(envs: MarketVectorEnv, policy: Policy, panel: Panel, split: Split) -> pd.DataFrame:
    """Run `policy` once from the start to the end of every range of `split`; returns its ledger.

    `envs` must hold one market per range (Trading-v0: per range and symbol), made with random_start=False and
    episode_length=0; what it says of them (`ledger_labels`) are further columns. A market that is ruined stays in the ledger
    to the end of its range, flat and without return. Timestamps are those of the marks. `action` is what the policy chose,
    or, where the environment makes something else of it, that (`infos["choice"]`): the weights ordered, the order executed.
    A policy that keeps account of what it earns has an attribute `after`, called after each bar with the rewards (n,) and
    whether each market's range is over (n,).
    """
    markets = envs.num_runs
    if envs.num_envs != markets:
        what = "range" if markets == len(split.ranges) else "range and symbol"
        raise ValueError(f"backtest: {envs.num_envs} markets for split {split.name!r}; expected one per {what}: {markets}")
    obs, infos = envs.reset(seed=0)
    first = infos["row"]
    steps = envs.stops - 1 - first
    records = np.zeros((steps.max(), markets, len(RECORD)))
    extra = np.zeros((steps.max(), markets, len(envs.ledger_columns)))
    actions = None
    alive = np.ones(markets, bool)
    for t in range(steps.max()):
        action = policy(obs, infos.get("action_mask"), infos["row"])
        obs, reward, terminated, truncated, infos = envs.step(action)
        if hasattr(policy, "after"):
            policy.after(reward, terminated | truncated)
        records[t, alive] = infos["record"][alive]
        records[t, ~alive, EQUITY] = records[t - 1, ~alive, EQUITY]
        for c, name in enumerate(envs.ledger_columns):
            extra[t, alive, c] = infos["components"][name][alive]
        chosen = infos.get("choice", action)
        if actions is None:
            actions = np.zeros((steps.max(), *chosen.shape), chosen.dtype)
        actions[t, alive] = chosen[alive]
        alive &= ~(terminated | truncated)
    records = np.concatenate([records, extra], axis=2)
    return _frame(panel, split, first, steps, records, actions, envs.ledger_columns, envs.ledger_labels())


def backtest_weights(panel: Panel, ex: Execution, rates: np.ndarray, split: Split, targets: np.ndarray, first=None):
    """Ledger of ordering the weights targets[t] (T, N) at every bar t of `split`; `first` (R,): first row of each range."""
    first = split.ranges[:, 0] if first is None else np.asarray(first)
    steps = split.ranges[:, 1] - 1 - first
    records = np.zeros((steps.max(), len(first), len(RECORD)))
    for r in range(len(first)):
        _run_weights(ex, rates, first[r], steps[r], np.asarray(targets, np.float64), records[:, r])
    return _frame(panel, split, first, steps, records, np.zeros(records.shape[:2]))


@njit(cache=True, error_model="numpy")
def _run_weights(ex, rates, first, steps, targets, records):
    weights = np.zeros(targets.shape[1])
    equity = 1.0
    for step in range(steps):
        t = first + step
        if equity > RUIN:
            equity *= account_step(
                weights, targets[t], ex.to_fill[t], ex.to_mark[t], ex.status[t], ex.impact[min(t, len(ex.impact) - 1)],
                ex.years[t], ex.fill_at_end, equity, rates[0], records[step],
            )  # fmt: skip
        records[step, EQUITY] = equity


def _frame(panel, split, first, steps, records, actions, extra=(), labels=None):
    """Records (steps, markets, fields) as a ledger, one market after the other.

    extra: names of the fields beyond RECORD. labels: further columns, name -> (markets,). So are `parameter_<name>`, what the
    history drew for itself (`Panel.parameters`).
    """
    labels = (labels or {}) | {f"parameter_{name}": values for name, values in panel.parameters_at(first).items()}
    parts = []
    for r in range(len(first)):
        frame = pd.DataFrame(records[: steps[r], r], columns=[*RECORD, *extra])
        frame.insert(0, "timestamp", panel.timestamps[first[r] + 1 : first[r] + 1 + steps[r]])
        frame.insert(0, "market", r)
        frame.insert(0, "split", split.name)
        flat = actions[: steps[r], r].reshape(steps[r], -1)
        frame["action"] = flat[:, 0] if flat.shape[1] == 1 else list(flat)
        for name, values in labels.items():
            frame[name] = values[r]
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def decided_rows(frame: pd.DataFrame, panel: Panel, ranges: np.ndarray) -> np.ndarray:
    """(len(frame),) int64, the row of the panel at whose close the orders of each bar of a ledger were given.

    That is the row before the bar's timestamp. ranges: (markets, 2), rows [start, stop) in which each market's bars lie, in
    order of their numbers. Raises ValueError if the ledger has more markets.
    """
    rows, markets = np.zeros(len(frame), np.int64), int(frame["market"].max()) + 1
    if markets > len(ranges):
        raise ValueError(f"ledger: {markets} markets: expected at most {len(ranges)}, one for each range of the split")
    for number, where in frame.groupby("market").indices.items():
        start, stop = ranges[number]
        rows[where] = start + np.searchsorted(panel.timestamps[start:stop], frame["timestamp"].to_numpy()[where]) - 1
    return rows


def book(ledger: pd.DataFrame) -> pd.DataFrame:
    """One account per range of a ledger with one per range and symbol: columns LEDGER, `market` the number of the range.

    It gives every symbol of the range an equal budget at the start and lets each run: its equity is their mean. The
    budget of a symbol is cash, without interest, before its first row and after its last. Returns and costs are fractions of
    the whole equity at the last mark, so that the identity of costs.RECORD holds; turnover and exposures, which count by the
    equity at the fill, are means over the symbols by their equity at the last mark. `action` (S,) are the shares of the equity
    that the symbols, in order of their first rows, hold just after the fill.

    Raises ValueError if the ledger lacks the columns symbol and range.
    """
    if not {"symbol", "range"} <= set(ledger.columns):
        raise ValueError(f"book: columns {list(ledger.columns)}: expected symbol and range among them, as Trading-v0 has")
    parts = []
    for number, part in ledger.groupby("range"):
        times, row = np.unique(part["timestamp"].to_numpy(), return_inverse=True)
        column, symbols = pd.factorize(part["symbol"])
        equity = np.full((len(times) + 1, len(symbols)), np.nan)  # row 0: the start
        equity[0], equity[row + 1, column] = 1.0, part["equity"]
        equity = pd.DataFrame(equity).ffill().to_numpy()
        share = equity[:-1] / equity[:-1].sum(axis=1, keepdims=True)
        shares = {name: np.zeros(share.shape) for name in RECORD[:-1]}  # what the symbols contribute
        for name, contributed in shares.items():
            contributed[row, column] = part[name]
            contributed *= share
        out = pd.DataFrame({"split": part["split"].iloc[0], "market": number, "timestamp": times})
        out = out.assign(**{name: contributed.sum(axis=1) for name, contributed in shares.items()})
        out["equity"], out["action"] = equity[1:].mean(axis=1), list(shares["net_exposure"])
        parts.append(out)
    return pd.concat(parts, ignore_index=True)


def growth(ledger: pd.DataFrame) -> np.ndarray:
    """Net log growth of every bar, as in the reward of the environments: no bar counts for less than log(RUIN)."""
    return np.log(np.maximum(1.0 + ledger["net_return"].to_numpy(), RUIN))


def summarise(ledger: pd.DataFrame, bars_per_year: float, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Scores of one split, markets pooled; rates are per year.

    Sharpe is mean / std(ddof=1) * sqrt(bars per year) of net returns (cash rate not subtracted: it is part of the
    return). `*_low`, `*_high`: 95% percentile interval of `resamples` (0: none) bootstrap draws. Drawdown is the mean over
    markets of each one's deepest, from the running maximum including the start.
    """
    costs = ledger[["commission", "spread", "slippage", "impact", "borrow", "financing"]].to_numpy().sum(axis=1)
    equity = ledger.groupby("market")["equity"]
    drawdowns = [float((path / np.maximum(np.maximum.accumulate(path), 1.0) - 1.0).min()) for _, path in equity]
    out = {
        "bars": len(ledger),
        "growth": float(growth(ledger).mean() * bars_per_year),
        "volatility": float(ledger["net_return"].std(ddof=1) * np.sqrt(bars_per_year)) if len(ledger) > 1 else 0.0,
        "max_drawdown": float(np.mean(drawdowns)),
        "turnover": float(ledger["turnover"].mean() * bars_per_year),
        "cost": float(costs.mean() * bars_per_year),
        "gross_exposure": float(ledger["gross_exposure"].mean()),
    }
    for name, column in (("sharpe", "net_return"), ("gross_sharpe", "gross_return")):
        out[name] = sharpe(ledger[column].to_numpy(), bars_per_year)
        if resamples:
            interval = sharpe_interval(ledger[column].to_numpy(), ledger["market"].to_numpy(), bars_per_year, resamples, seed)
            out[f"{name}_low"], out[f"{name}_high"], out["bootstrap"] = interval
    return out


def sharpe_interval(returns, market, bars_per_year: float, resamples: int, seed: int) -> tuple[float, float, str]:
    """95% interval of the Sharpe ratio, as `interval` draws it; NaN where returns do not vary."""
    if len(returns) < 20 or constant(returns):
        return float("nan"), float("nan"), "returns do not vary"
    return interval(
        returns, market, lambda n, s, q: s / n / np.sqrt((q - s * s / n) / (n - 1)) * np.sqrt(bars_per_year), resamples, seed
    )


def difference(
    ledger: pd.DataFrame, other: pd.DataFrame, bars_per_year: float, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float, str]:
    """By how much `ledger` grows faster than `other` on the same bars, per year; its 95% interval, bars paired; how drawn.

    Raises ValueError if the two do not hold the same bars.
    """
    same = ["split", "market", "timestamp"]
    if not ledger[same].equals(other[same]):
        raise ValueError("difference: the ledgers hold different bars; expected the same split, markets and timestamps")
    gap = growth(ledger) - growth(other)
    mean = float(gap.mean() * bars_per_year)
    if len(gap) < 20 or np.ptp(gap) == 0.0:
        return mean, mean, mean, "they do not differ" if np.ptp(gap) == 0.0 else "too few bars for an interval"
    return mean, *interval(gap, ledger["market"].to_numpy(), lambda n, s, q: s / n * bars_per_year, resamples, seed)


def interval(x: np.ndarray, market: np.ndarray, statistic: Callable, resamples: int, seed: int) -> tuple[float, float, str]:
    """95% percentile interval of statistic(count, sum, sum of squares) of x, and how it was drawn.

    Ten or more markets (independent histories) are resampled whole, for an expanded interval (`quantile_levels`). Fewer: the
    stationary bootstrap over bars (Politis & Romano 1994), mean block length by Politis & White 2004 as corrected in
    Patton, Politis & White 2009.
    """
    markets = len(np.unique(market))
    if markets >= 10:
        drawn = np.random.default_rng(seed).integers(markets, size=(resamples, markets))
        draws = statistic(*(np.bincount(market, weights)[drawn].sum(axis=1) for weights in (None, x, x**2)))
        how, levels = f"{markets} markets resampled whole", quantile_levels(markets)
    else:
        block = max(1.0, float(optimal_block_length(x)["stationary"].iloc[0]))
        bootstrap = StationaryBootstrap(block, x, seed=seed)
        draws = bootstrap.apply(lambda part: statistic(len(part), part.sum(), (part**2).sum()), resamples)
        how, levels = f"stationary bootstrap, mean block {block:.1f} bars", quantile_levels()
    low, high = np.quantile(draws, levels)
    return float(low), float(high), how


def quantile_levels(units: int | None = None) -> tuple[float, float]:
    """Quantiles of bootstrap draws that make a 95% interval: 0.025 and 0.975, or wider ones for few resampled units.

    A percentile interval of n units is too narrow by sqrt((n - 1) / n), and by the ratio of the normal's quantile to Student's:
    Hesterberg's (2015) expanded percentile interval makes up for both. None: bars, which are many.
    """
    if units is None:
        return 0.025, 0.975
    low = float(norm.cdf(np.sqrt(units / (units - 1)) * student.ppf(0.025, units - 1)))
    return low, 1.0 - low


def constant(returns: np.ndarray) -> bool:
    """Whether returns (n,) are all the same but for rounding."""
    return bool(np.ptp(returns) <= SAME * np.abs(returns).max())


def sharpe(returns: np.ndarray, bars_per_year: float) -> float:
    """Annualised Sharpe ratio of returns per bar; 0 where they do not vary."""
    if len(returns) < 2 or constant(returns):
        return 0.0
    return float(returns.mean() / returns.std(ddof=1) * np.sqrt(bars_per_year))


def new_run_dir(root: str, env_id: str, exp_name: str, seed: int) -> Path:
    """runs/<env id>__<script>__<seed>__<unix time>/, created; a name that is taken gets a later second."""
    stamp = int(time.time())
    while True:
        path = Path(root) / f"{env_id.replace('/', '-')}__{exp_name}__{seed}__{stamp}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            stamp += 1


def provenance(script: str, device: str) -> dict:
    """What code ran on what: script sha256, git commit, package versions, device, platform."""
    return {
        "script": Path(script).name,
        "script_sha256": hashlib.sha256(Path(script).read_bytes()).hexdigest(),
        "git_commit": _git_commit(Path(script).resolve().parent),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
    }


def _git_commit(folder: Path) -> str | None:
    """Commit of the checkout, "-dirty" where tracked files differ; None outside a checkout."""
    try:
        call = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_panel(panel: Panel, splits: dict[str, Split]) -> dict:
    return {
        "name": panel.name,
        "sha256": panel.sha256,
        "symbols": list(panel.symbols),
        "bars_per_year": panel.bars_per_year,
        "splits": {name: split.describe(panel) for name, split in splits.items()},
    }


def write_json(path: Path, content: dict):
    """Written beside and moved into place: a reader never sees half a file. NaN becomes null."""
    _replace(path, lambda part: part.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"))


def write_ledger(path: Path, ledger: pd.DataFrame):
    _replace(path, lambda part: ledger.to_parquet(part, index=False))


def _replace(path: Path, write: Callable[[Path], object]):
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
