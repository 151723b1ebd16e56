"""Rules that need no learning, run through the agents' accounting step; each leaves a run directory like a script's.

`python benchmark/baselines.py --market sp500 --only equal-weight momentum`. The rules are in rules.py. They pay the agents'
costs at the agents' fills, but are not bound by their constraints. One that cannot run leaves a failed run; the others go on.
With --log-dataset each also acts in the agents' environment, within their constraints, and leaves what it did as offline data.
"""

import dataclasses
import hashlib
import importlib.metadata
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import behaviours
import numpy as np
import pandas as pd
import replay
import tyro
from rules import RULES, RuleConfig, Setting, applicable, one_line

from envs import ledger, portfolio_references
from envs.panel import Split
from envs.portfolio_tables import PortfolioConfig
from envs.synthetic import load_market


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """names of baselines, from the list above (all that make sense on the market by default)"""
    seed: int = 1
    """seed of the random baseline and, on markets that are drawn, of the panel"""
    runs_dir: str = "runs"
    """folder that the run directories are made in"""
    log_dataset: str | None = None
    """folder to log training episodes to as offline data, a dataset for each rule: on LeadLag-v0 for those that choose a
    lookback, on Portfolio-v0 for the others"""
    log_episodes: int = 100
    """episodes of each dataset"""
    log_noise: float = 0.1
    """standard deviation of the exploration on Portfolio-v0, in scores (random has its own, 0.5)"""
    log_epsilon: float = 0.1
    """share of random choices on LeadLag-v0 (lead-lag-random: all)"""
    episode_length: int = 256
    """bars in a logged episode, which starts at a random bar (0: to the end of the history)"""
    gamma: float = 0.9
    """discount factor of the returns in a dataset"""
    num_threads: int = 0
    """CPU threads of the market kernels that episodes are logged in (0: all cores this process may use)"""
    market: str = "sp500"
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...], see KNOWN for two of them; with the
    prefix shuffled:, bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py)"""
    symbols: tuple[str, ...] = ()
    """symbols of the market to keep (all by default)"""
    start: str | None = None
    """first date of the panel"""
    end: str | None = None
    """last date of the panel"""
    resample: str | None = None
    """coarser bars, such as 1D from hourly data"""
    columns: tuple[str, ...] = ()
    """extra columns of the market's file, which no rule reads, but which are in the observations that are logged"""
    series: str | None = None
    """Parquet or CSV file of more input series, likewise"""
    series_lag: int = 1
    """bars between a publication and the first bar that sees it"""
    train_fraction: float = 0.6
    """share of the bars used to train (synthetic, bootstrap and crossed markets bring histories for each split)"""
    val_fraction: float = 0.2
    """share of the bars used to choose the model; the rest is the test"""
    embargo: int = 5
    """bars dropped between two splits"""
    folds: int = 0
    """walk-forward folds instead of one split (0: none); one of them is run, `fold`"""
    fold: int = 0
    """which fold, from 0"""
    portfolio: PortfolioConfig = field(default_factory=PortfolioConfig)
    """costs and fill; constraints of the portfolios that are logged"""
    rules: RuleConfig = field(default_factory=RuleConfig)
    """parameters of the rules"""

    def __post_init__(self):
        def expect(ok, name, what):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {what}")

        expect(self.log_episodes >= 1, "log_episodes", "at least 1")
        expect(0 <= self.log_noise < np.inf, "log_noise", "0 or a positive number")
        expect(0 <= self.log_epsilon <= 1, "log_epsilon", "a share from 0 to 1")
        expect(self.episode_length >= 0, "episode_length", "0 or a number of bars")
        expect(0 <= self.gamma <= 1, "gamma", "0 to 1")


# Markets with a closed form: the terms that it is derived for, as in algos/ppo_portfolio.py.
KNOWN = {
    "synthetic:garleanu-pedersen": dict(
        portfolio=PortfolioConfig(
            costs="zero:quadratic_impact_bps=75", constraints="long_short", orders="change", gross=10.0, asset_cap=10.0,
            scale=0.5,
        ),
        rules=RuleConfig(penalty_variance=19.5),
    ),
    "synthetic:merton": dict(
        portfolio=PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, asset_cap=2.0, scale=0.5)
    ),
    "synthetic:tail": dict(portfolio=PortfolioConfig(costs="zero", cash=False)),
}  # fmt: skip
NAMES = "baselines:\n" + "\n".join(f"  {name}: {rule.__doc__.splitlines()[0]}" for name, rule in RULES.items())


def load(args: Args) -> Setting:
    """Panel, splits and tables, as the scripts make them. Raises ValueError."""
    panel = load_market(
        args.market, args.seed, symbols=args.symbols or None, start=args.start, end=args.end, resample=args.resample,
        columns=args.columns, series=args.series, series_lag=args.series_lag,
    )  # fmt: skip
    if args.folds:
        if not 0 <= args.fold < args.folds:
            raise ValueError(f"--fold {args.fold}: expected 0 to {args.folds - 1}, for --folds {args.folds}")
        splits = panel.walk_forward(args.folds, val_fraction=args.val_fraction, embargo=args.embargo)[args.fold]
    else:
        splits = panel.split(args.train_fraction, args.val_fraction, args.embargo)
    return Setting(panel, splits, args.portfolio, args.seed, args.rules)


def account(s: Setting, split: Split, targets: np.ndarray) -> pd.DataFrame:
    """Ledger of the orders `targets` (T, N) on `split`, NaN: none; `action` is the weights ordered."""
    starts = s.starts[split.name]
    frame = replay.account(s.panel, s.data.execution, s.data.costs.rates, split, starts, targets)
    ordered = targets[np.concatenate([np.arange(a, b - 1) for a, b in zip(starts, split.ranges[:, 1])])]
    frame["action"] = ordered[:, 0] if ordered.shape[1] == 1 else list(ordered)
    return frame


def order(name: str, s: Setting) -> np.ndarray:
    """Weights (T, N) that a rule orders, NaN: none. Raises ValueError where the rule cannot run."""
    if name not in RULES:
        raise ValueError(f"--only {name}: no such baseline; expected some of {' '.join(RULES)}")
    return RULES[name](s)


def backtest(name: str, s: Setting, targets: np.ndarray) -> dict[str, pd.DataFrame]:
    """Ledger of a rule's orders (T, N) on each split. Raises ValueError where the test split has none."""
    frames = {split.name: account(s, split, targets) for split in s.splits.values()}
    orders = np.concatenate([np.atleast_1d(row) for row in frames["test"]["action"]])
    if np.isinf(targets).any() or np.isnan(orders).all():
        why = f"; last failure: {s.notes['last_failure']}" if s.notes.get("last_failure") else ""
        raise ValueError(f"{name} on {s.panel.name!r}: no finite order in the test split; expected more bars or symbols{why}")
    return frames


def run_baseline(name: str, args: Args, s: Setting, provenance: dict) -> dict:
    """Write the run directory of one baseline; returns its run.json."""
    family = "LeadLag-v0" if name.startswith(("lead-lag", "oracle")) else "Portfolio-v0"
    exp_name = "baseline-" + re.sub(r"[^\w.-]", "-", name)
    run_dir = ledger.new_run_dir(args.runs_dir, family, exp_name, args.seed)
    run = {
        "status": "running", "env_id": family, "args": {"exp_name": exp_name, **dataclasses.asdict(args)}, **provenance,
        "trials": 1, "panel": ledger.describe_panel(s.panel, s.splits),
        "market": {"costs": dataclasses.asdict(s.data.costs), "fill": s.data.fill},
    }  # fmt: skip
    ledger.write_json(run_dir / "run.json", run)
    started, s.notes = time.time(), {}
    try:
        targets = order(name, s)
        frames = backtest(name, s, targets)
        if args.log_dataset:
            behaviours.log_dataset(name, s, args, targets, provenance.get("git_commit"))
    except Exception as error:  # a bug in one rule must not cost the results of the others
        run |= {"status": "failed", "failure": one_line(error)}
        print(f"{name}: {run['failure']}", file=sys.stderr, flush=True)
    else:
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        aversion = 1.0 + 2.0 * args.rules.penalty_variance
        run["scores"] = {
            split: {"agent": ledger.summarise(frame, s.panel.bars_per_year, resamples=1000 if split == "test" else 0)}
            for split, frame in frames.items()
        }
        score = run["scores"]["test"]["agent"]
        score["utility"] = portfolio_references.utility(frames["test"], aversion, s.panel.bars_per_year)
        run |= {"status": "finished", "failure": None, "env_steps": sum(map(len, frames.values()))}
        interval = f"[{score['sharpe_low']:.2f}, {score['sharpe_high']:.2f}]"
        gross = f"{score['gross_sharpe']:.2f} [{score['gross_sharpe_low']:.2f}, {score['gross_sharpe_high']:.2f}]"
        print(f"{name:22}{score['sharpe']:7.2f}  {interval:<16}{gross:<22}{score['growth']:8.1%}", end="")
        print(
            f"{score['max_drawdown']:10.1%}{score['turnover']:9.1f}x{score['cost']:8.2%}{time.time() - started:7.1f} s",
            flush=True,
        )
    run |= {"wall_clock": time.time() - started, "rule": s.notes}
    ledger.write_json(run_dir / "run.json", run)
    return run


def main(args: Args) -> int:
    try:
        s = load(args)
    except ValueError as error:
        sys.exit(one_line(error))
    provenance = ledger.provenance(__file__, "cpu")
    provenance["rules_sha256"] = hashlib.sha256(Path(__file__).with_name("rules.py").read_bytes()).hexdigest()
    provenance["packages"] |= {"skfolio": importlib.metadata.version("skfolio")}
    print(f"market  {s.panel.name}: {s.panel.num_bars} bars x {s.panel.num_symbols} symbols, fill {s.data.fill}")
    print(f"costs   {s.data.costs.describe()}\n\ntest split, per year")
    print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'before costs':<22}{'growth':>8}{'drawdown':>10}", end="")
    print(f"{'turnover':>10}{'cost':>8}")
    names = tuple(dict.fromkeys(args.only)) or tuple(applicable(s))
    for path in (behaviours.dataset_path(args.log_dataset, name, args.seed) for name in names if args.log_dataset):
        if path.exists():
            sys.exit(f"--log-dataset {args.log_dataset}: {path} exists already; expected another folder")
    runs = [run_baseline(name, args, s, provenance) for name in names]
    failed = sum(run["status"] != "finished" for run in runs)
    print(f"{len(runs) - failed} of {len(runs)} baselines finished; run directories in {args.runs_dir}")
    if args.log_dataset:
        print(f"datasets in {args.log_dataset}")
    return 1 if failed else 0


def parse(arguments: list[str] | None = None) -> Args:
    options = dict(args=arguments, description=f"{__doc__}\n{NAMES}", config=(tyro.conf.OmitArgPrefixes,))
    args = tyro.cli(Args, **options)
    for market, settings in KNOWN.items():
        if args.market.startswith(market):
            args = tyro.cli(Args, default=dataclasses.replace(Args(), **settings), **options)
    return args


if __name__ == "__main__":
    sys.exit(main(parse()))
