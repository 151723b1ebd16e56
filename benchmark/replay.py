"""The same orders under other terms: at 0 to 5 times the costs, one bar late, and scored by regime. All from run directories.

A replay loads the panel that run.json names again, takes the orders of the test split from the ledger, and sends them through
the accounting step that every environment uses. Replayed as they were, they must earn what the ledger says; if not, nothing is
shown.
"""

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
from paired import Draws
from rundirs import Run

from envs import ledger
from envs.costs import TRADABLE, UNTRADABLE, Costs, Execution, execution
from envs.features import log_returns
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.panel import Panel, Split
from envs.synthetic import load_market
from envs.tasks import slices

MULTIPLES = (0.0, 1.0, 2.0, 5.0)  # of the costs
SELECTION = ("symbols", "start", "end", "resample", "columns", "series", "series_lag")
SPLIT = ("folds", "fold", "train_fraction", "val_fraction", "embargo", "task_bars")
TREND_BARS, TREND = 60, 0.5  # bars of the market's trend, and standard deviations from which on it is a bull or bear market
CALM, CRISIS = 0.5, 0.9  # quantiles of volatility below and above which a bar is calm, or a crisis; choppy in between
WINDOW, HARDEST = 63, 0.2  # bars of a window of the test split; share of the windows that count as hardest
FEWEST = 20  # bars of a regime on every panel, below which it has no score
REGIMES = ("bull", "sideways", "bear", "calm", "choppy", "crisis", "hardest")


def load(run: Run) -> tuple[Panel, Split]:
    """Panel and test split of a run. Raises ValueError where they cannot be had, or the panel is another one by now."""
    args = run.content["args"]
    options = {key: args.get(key) for key in (*SELECTION, *SPLIT)}
    panel, split = _load(args["market"], args["seed"], json.dumps(options, sort_keys=True))
    if panel.sha256 != run.panel:
        raise ValueError(f"panel {panel.name!r} has changed since the run: {panel.sha256[:12]}, was {run.panel[:12]}")
    return panel, split


@lru_cache(maxsize=2)  # rows of a group come seed by seed
def _load(market: str, seed: int, options: str) -> tuple[Panel, Split]:
    given = json.loads(options)
    panel = load_market(market, seed, **{key: given[key] for key in SELECTION if given[key] not in (None, [])})
    if given["folds"]:
        folds = panel.walk_forward(given["folds"], val_fraction=given["val_fraction"], embargo=given["embargo"])
        split = folds[given["fold"]]["test"]
    else:
        split = panel.split(given["train_fraction"], given["val_fraction"], given["embargo"])["test"]
    bars = given.get("task_bars")  # only scripts that adapt have tasks
    return panel, slices(panel, split, bars) if bars else split


@lru_cache(maxsize=1)
def _followers(market: str, seed: int, options: str, config: str) -> np.ndarray:
    """(T, K, N) weights that LeadLag-v0 orders for each lookback."""
    return LeadLagData(_load(market, seed, options)[0], LeadLagConfig(**json.loads(config))).targets


def orders(run: Run, panel: Panel, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Weights ordered at every row of the panel (T, N), NaN where none, and the first row of each range of the split (R,)."""
    frame = pd.read_parquet(run.path / "ledger.parquet", columns=["split", "market", "action"])
    frame = frame[frame["split"] == split.name].sort_values("market", kind="stable")
    steps = frame.groupby("market").size().to_numpy()
    starts = split.ranges[:, 1] - 1 - steps
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, steps)])
    action = np.stack([np.atleast_1d(a) for a in frame["action"]])
    targets = np.full(panel.close.shape, np.nan)
    config = run.content["args"].get("leadlag")
    if config is not None:  # the action is a lookback
        args = run.content["args"]
        if args.get("actions", "absolute") != "absolute":
            raise ValueError(
                f"--actions {args['actions']}: its ledger holds moves; expected absolute, whose actions are lookbacks"
            )
        options = json.dumps({key: args.get(key) for key in (*SELECTION, *SPLIT)}, sort_keys=True)
        table = _followers(args["market"], args["seed"], options, json.dumps(config))
        strange = ~np.isin(action[:, 0], np.arange(table.shape[1]))
        if strange.any():
            raise ValueError(
                f"ledger.parquet: action {action[strange][0, 0]} is no lookback; expected 0 to {table.shape[1] - 1}"
            )
        targets[rows] = table[rows, action[:, 0].astype(int)]
    else:
        targets[rows] = action
    return targets, starts


def account(
    panel: Panel, ex: Execution, rates: np.ndarray, split: Split, starts: np.ndarray, targets: np.ndarray
) -> pd.DataFrame:
    """Ledger of the orders `targets` (T, N) on `split`, from the rows `starts` (R,) on; NaN is no order.

    What is not ordered counts as untradable in that bar, so that the accounting step leaves it alone to the last bit.
    """
    idle = np.isnan(targets) & (ex.status == TRADABLE)
    ex = ex._replace(status=np.where(idle, np.int8(UNTRADABLE), ex.status))
    return ledger.backtest_weights(panel, ex, rates, split, np.nan_to_num(targets), starts)


def replay(run: Run) -> dict[str, pd.DataFrame]:
    """Ledgers of the run's orders on the bars of `run.ledger`: by multiple of the costs ("2x"), and one bar later ("late").

    The late ones start in cash. Raises ValueError where the panel cannot be had, or the orders do not earn again what the
    ledger says.
    """
    parts = [_replayed(part) for part in run.folds or (run,)]
    bars, out = pd.MultiIndex.from_frame(run.ledger[["market", "timestamp"]]), {}
    for name in parts[0]:
        frame = pd.concat([part[name] for part in parts], ignore_index=True)
        out[name] = frame[pd.MultiIndex.from_frame(frame[["market", "timestamp"]]).isin(bars)].reset_index(drop=True)
    same, was = (f["net_return"].to_numpy() for f in (out["1x"], run.ledger))
    if len(same) != len(was) or not np.allclose(same, was, rtol=0, atol=1e-9):
        worst = f": up to {np.abs(same - was).max():.2g} a bar off" if len(same) == len(was) else ""
        raise ValueError(f"the orders of its ledger do not earn again what the ledger says{worst}")
    return out


def _replayed(run: Run) -> dict[str, pd.DataFrame]:
    """The same for one run directory, on all of its bars, unchecked."""
    panel, split = load(run)
    targets, starts = orders(run, panel, split)
    market = run.content["market"]
    costs = Costs(**market["costs"])
    late = np.full_like(targets, np.nan)
    for a, b in zip(starts, split.ranges[:, 1]):
        late[a + 1 : b] = targets[a : b - 1]
    out = {}
    for name, multiple, ordered in (*((f"{m:g}x", m, targets) for m in MULTIPLES), ("late", 1.0, late)):
        scaled = costs.scaled(multiple)
        out[name] = account(panel, execution(panel, market["fill"], scaled), scaled.rates, split, starts, ordered)
    return out


def regimes(run: Run) -> dict[str, np.ndarray]:
    """{name of REGIMES: (len(run.ledger),) bool}, which bars of the ledger fall into it.

    A bar belongs to the regime seen at the close before it, when its orders were given: the sum of the equal-weight market's
    last TREND_BARS log returns in standard deviations (bull, bear, sideways), and their standard deviation against its
    quantiles over these bars (calm, choppy, crisis). The hardest windows are chosen with hindsight: those in which
    the correlations and volatilities differ most from those of the window before. Raises what `load` raises.
    """
    loaded = [load(part) for part in run.folds or (run,)]
    panel, ranges = loaded[0][0], np.concatenate([split.ranges for _, split in loaded])
    returns = log_returns(panel)
    listed = np.isfinite(panel.filled("close"))
    market = pd.Series((returns * listed).sum(axis=1) / np.maximum(listed.sum(axis=1), 1))
    window = market.groupby(panel.segment_of_row).rolling(TREND_BARS, min_periods=2)
    volatility = window.std().to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        trend = np.nan_to_num(window.sum().to_numpy() / volatility / np.sqrt(window.count().to_numpy()))
    volatility = np.nan_to_num(volatility)
    unstable, differences = np.full(panel.num_bars, -np.inf), []
    for a, b in ranges:
        history = panel.segments[panel.segment_of_row[a]]  # a window is compared with its own history only
        for start in range(a, b, WINDOW):
            now, before = returns[start : min(start + WINDOW, b)], returns[max(history, start - WINDOW) : start]
            if len(now) == len(before) == WINDOW:
                differences.append(_distance(now, before))
                unstable[start : start + WINDOW] = differences[-1]
    markets = run.ledger["market"].max() + 1
    rows = ledger.decided_rows(run.ledger, panel, np.tile([0, panel.num_bars], (markets, 1)) if run.folds else ranges)
    trend, volatility, unstable = trend[rows], volatility[rows], unstable[rows + 1]
    calm, crisis = np.quantile(volatility, (CALM, CRISIS))
    bull, bear = trend > TREND, trend < -TREND
    labels = (
        bull, ~bull & ~bear, bear, volatility <= calm, (volatility > calm) & (volatility <= crisis), volatility > crisis,
        unstable >= np.quantile(differences or [0.0], 1.0 - HARDEST),
    )  # fmt: skip
    return dict(zip(REGIMES, labels))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference of the correlations of two windows (bars, N) of returns, plus that of log volatilities."""
    alive = (a.std(axis=0) > 0) & (b.std(axis=0) > 0)
    if not alive.any():
        return 0.0
    a, b = a[:, alive], b[:, alive]
    correlation = np.corrcoef(a, rowvar=False) - np.corrcoef(b, rowvar=False)
    return float(np.sqrt(np.mean(correlation**2)) + np.sqrt(np.mean(np.log(a.std(axis=0) / b.std(axis=0)) ** 2)))


def stress(rows: dict[str, list[Run]], resamples: int, seed: int) -> dict:
    """Every row at several costs, one bar late, and by regime, drawn as the scoreboard's own scores are.

    Returns `sensitivity` {row: [{multiple, value, low, high}]} and `late` {row: {value, low, high}}, both Sharpe ratios;
    `regimes` {score: {regime: {row: {value, low, high}}}}; `notes`, among them what could not be replayed and why.
    """
    replayed: dict[str, dict[str, list[Run]]] = {}
    masks: dict[str, dict[str, np.ndarray]] = {name: {} for name in REGIMES}
    failed: dict[str, str] = {}
    for run in sorted((run for runs in rows.values() for run in runs), key=lambda run: run.panel):  # each panel is loaded once
        try:
            if run.panel not in masks["bull"]:
                for name, mask in regimes(run).items():
                    masks[name][run.panel] = mask
            for label, frame in replay(run).items():
                replayed.setdefault(label, {}).setdefault(run.name, []).append(replace(run, ledger=frame))
        except (ValueError, OSError, KeyError, TypeError) as error:  # run.json of a stranger, a file that is gone
            failed.setdefault(run.name, " ".join(str(error).split()))
    out = {"sensitivity": {}, "late": {}, "regimes": {}, "notes": []}
    for label, found in replayed.items():
        found = {name: runs for name, runs in found.items() if name not in failed}
        if not found:
            continue
        draws = Draws(found, resamples, seed)
        for name in found:
            score = draws.scores(name)["sharpe"]
            if label == "late":
                out["late"][name] = score
            else:
                out["sensitivity"].setdefault(name, []).append({"multiple": float(label[:-1]), **score})
    found = {name: runs for name, runs in rows.items() if name not in failed}
    panels = {run.panel for runs in found.values() for run in runs}
    shares = []
    for regime, mask in masks.items():
        keep = {panel: mask[panel] for panel in panels}
        if found and min(kept.sum() for kept in keep.values()) >= FEWEST:
            draws = Draws(found, resamples, seed, keep)
            out["regimes"].setdefault("sharpe", {})[regime] = {name: draws.scores(name)["sharpe"] for name in found}
            shares.append(f"{regime} {np.mean([kept.mean() for kept in keep.values()]):.0%}")
    if shares:
        out["notes"].append(
            f"Regimes, known when an order was given: trend of the equal-weight market over {TREND_BARS} bars (bull, bear: "
            f"beyond {TREND} standard deviations), its volatility (calm: below the median; crisis: the top {1 - CRISIS:.0%}). "
            f"Hardest: the {HARDEST:.0%} of {WINDOW}-bar windows that differ most from the one before, chosen with hindsight. "
            f"Shares of the bars: {', '.join(shares)}."
        )
    for name, why in failed.items():
        out["notes"].append(f"{name}: neither costs, delay nor regimes are shown: {why[:300]}.")
    return out
