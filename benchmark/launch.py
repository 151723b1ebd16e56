"""Train a script on every symbol of a market, or on shards of them, here or on a Ray cluster, and collect one table.

`python benchmark/launch.py --script algos/ppo_transformer_trading.py --shards 4 --out runs/shards -- --market sp500`. What
stands after `--` goes to the script as it is. Shard i of n trains, by the script's --shard i/n, on the symbols i, i + n,
i + 2n, ...; all shards see the same panel and the same splits.

Each shard is a process with a folder of its own in --out. One that is killed is started again, and goes on from its last
checkpoint (the script's --checkpoint-every). The same command again goes on with what a launcher that was killed itself left
behind; it skips what has finished under the same code, on the same prices. On a Ray cluster, whose machines share --out, the
shards of a machine that is lost go on elsewhere.

At the end table.md and table.json in --out have a row for each symbol of all shards, after costs, on the validation and the
test split, and the book that gives every symbol the same budget. A shard that failed is there too, and the exit code is 1.
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from jobs import (
    ROOT,
    Job,
    Limits,
    cores,
    execute,
    hash_of,
    load_ray,
    local_results,
    locked,
    ray_results,
    read_json,
    run_command,
    run_dirs,
)
from tuning.space import Flag, flags_of, require_flags, value_in

from envs import ledger, trades
from envs.panel import Panel
from envs.synthetic import load_market
from envs.trading_tables import shard_of

OURS = ("shard", "runs-dir", "resume", "num-threads")  # flags that are set here
SCORED = ("val", "test")
RESAMPLES = {"val": 0, "test": 1000}  # of the intervals, as scripts draw them: validation chose the model, and has none


@dataclass
class Args:
    script: Path
    """script to train, one with --shard"""
    out: Path
    """folder of the runs and of the table; one launcher at a time, shared by the machines of a cluster"""
    shards: int = 0
    """how many shards the symbols are dealt to (0: expects --per-symbol)"""
    per_symbol: bool = False
    """a shard for every symbol"""
    workers: int = 0
    """shards at once on this machine (0: one for every two cores)"""
    threads: int = 0
    """CPU threads of a shard (0: the workers share the cores; with --ray 1)"""
    ray: bool = False
    """run the shards as tasks of a Ray cluster, as many at once as it has room for"""
    address: str | None = None
    """its address, such as auto (default: RAY_ADDRESS, or a cluster that is started here)"""
    gpus: float = 0.0
    """GPUs of a shard on the cluster, such as 0.25"""
    retries: int = 3
    """how often a shard that crashed or was killed is started again, from its last checkpoint"""
    timeout: float = 0.0
    """seconds after which a try of a shard counts as failed (0: never)"""

    def __post_init__(self):
        """Fill in what depends on other arguments. Exits with one line that names the flag and what was expected."""
        if not self.script.is_file():
            sys.exit(f"--script {self.script}: no such file; expected a script such as algos/ppo_transformer_trading.py")
        for flag in ("shards", "workers", "threads", "gpus", "retries", "timeout"):
            if not 0 <= getattr(self, flag) < float("inf"):
                sys.exit(f"--{flag} {getattr(self, flag):g}: expected 0 or more")
        if self.per_symbol == (self.shards > 0):
            sys.exit(f"--shards {self.shards}: expected either a number of shards or --per-symbol")
        for flag in ("address", "gpus"):
            if getattr(self, flag) and not self.ray:
                sys.exit(f"--{flag} {getattr(self, flag)}: expected only with --ray")
        if self.workers and self.ray:
            sys.exit(f"--workers {self.workers}: expected only without --ray; a cluster runs as many as it has room for")
        self.script, self.out = self.script.resolve(), self.out.resolve()
        self.workers = self.workers or max(1, cores() // 2)
        self.threads = self.threads or (1 if self.ray else max(1, cores() // self.workers))
        self.timeout = self.timeout or float("inf")


@dataclass(frozen=True)
class ShardJob(Job):
    """The script on one shard. flags: what stands after the --; panel: the sha256 of the market's."""

    script: str
    shard: str
    symbols: tuple[str, ...]
    panel: str
    market: str
    seed: int
    exp_name: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The script, the shard, and a hash of how it is called."""
        index, number = self.shard.split("/")
        digest = hashlib.sha256(json.dumps([self.script, self.flags]).encode()).hexdigest()[:8]
        return f"{self.path.stem}__{index.zfill(len(number))}-of-{number}__{digest}"

    @property
    def path(self) -> Path:
        return Path(self.script)

    @property
    def told(self) -> dict:
        return {"exp_name": self.exp_name, "seed": self.seed, "market": self.market, "shard": self.shard}

    def command(self, folder: Path, threads: int) -> list[str]:
        own = ("--shard", self.shard, "--runs-dir", str(folder), "--num-threads", str(threads))
        return [sys.executable, self.script, *self.flags, *own]

    def code_hash(self, cwd: str) -> str:
        """Of the script, all of envs/, and the panel."""
        return hash_of(self.panel, self.path, *sorted((ROOT / "envs").glob("*.py")))

    def fault(self, path: Path) -> str | None:
        found = super().fault(path)
        if found:
            return found
        run = read_json(path / "run.json")
        if run["panel"]["sha256"] != self.panel:
            return "it was trained on other prices than the launcher read"
        try:
            symbols_ledger(path)
        except (OSError, ValueError) as error:
            return " ".join(f"symbols.parquet cannot be read: {error}".split())
        return None


def symbols_ledger(path: Path) -> pd.DataFrame:
    """The ledger by symbol of a run directory, every split of it. Raises OSError or ValueError where there is none to read."""
    return pd.read_parquet(path / "symbols.parquet")


def plan(args: Args, arguments: list[str]) -> tuple[list[ShardJob], Panel]:
    """The jobs of all shards, and the panel that they share. Raises ValueError in one line that names the flag."""
    flags = flags_of(args.script, arguments)
    if missing := [name for name in OURS if name not in flags]:
        raise ValueError(
            f"--script {args.script}: has no --{missing[0]}; expected one that has, such as algos/ppo_transformer_trading.py"
        )
    require_flags(args.script, arguments, flags)
    if taken := [name for name in OURS if value_in(arguments, name) is not None]:
        raise ValueError(f"--{taken[0]}: is set for each shard here; expected not after --")
    given = market_flags(arguments, flags)
    panel = load_market(**given)
    number = panel.num_symbols if args.per_symbol else args.shards
    if number > panel.num_symbols:
        raise ValueError(f"--shards {number}: expected at most {panel.num_symbols}, the symbols of {panel.name}")
    exp_name = value_in(arguments, "exp-name") or args.script.stem
    jobs = [
        ShardJob(
            str(args.script), shard, shard_of(panel.symbols, shard), panel.sha256, given["spec"], given["seed"], exp_name,
            tuple(arguments),
        )
        for shard in (f"{index}/{number}" for index in range(number))
    ]  # fmt: skip
    return jobs, panel


def market_flags(arguments: list[str], flags: dict[str, Flag]) -> dict:
    """What `load_market` takes, of a script's arguments, or else by its defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--market", dest="spec", default=flags["market"].default)
    parser.add_argument("--seed", type=int, default=int(flags["seed"].default))
    parser.add_argument("--symbols", nargs="*")
    for name in ("start", "end", "resample"):
        parser.add_argument(f"--{name}")
    try:
        given = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return given | {"symbols": given["symbols"] or None}


# The table


def collect(jobs: list[ShardJob], records: list[dict], args: Args, panel: Panel) -> dict:
    """What table.json holds: `rows`, one for each symbol of all shards in the order of the panel, and `book`, of those that
    finished.

    A row has the symbol, its shard, the run directory in --out, why the shard failed (or None), and, for val and test, the
    scores of `trades.by_symbol` (None where the symbol has no bar to trade), on the test split also sharpe_low, sharpe_high
    and bootstrap, of `ledger.sharpe_interval`. The book gives every symbol the same budget (`ledger.book`), and is scored by
    `ledger.summarise`; None where no shard has finished.
    """
    rows, parts = {}, []
    for job, record in zip(jobs, records):
        folder = args.out / job.folder
        shared = {"shard": job.shard, "run_dir": job.folder, "failure": record["failure"]}
        scores = {split: {} for split in SCORED}
        if record["status"] == "finished":
            (run,) = run_dirs(folder)
            shared["run_dir"] = str(run.relative_to(args.out))
            parts.append(symbols_ledger(run))
            scores = {split: scores_of(parts[-1], split, panel.bars_per_year) for split in SCORED}
        for symbol in job.symbols:
            rows[symbol] = {"symbol": symbol, **shared, **{split: scores[split].get(symbol) for split in SCORED}}
    book = None
    if parts:
        frame = pd.concat(parts, ignore_index=True)
        book = {"symbols": frame["symbol"].nunique()}
        for split in SCORED:
            part = ledger.book(frame[frame["split"] == split])
            book[split] = ledger.summarise(part, panel.bars_per_year, resamples=RESAMPLES[split])
    return {
        "script": str(args.script), "arguments": list(jobs[0].flags), "panel": panel.name, "sha256": panel.sha256,
        "bars_per_year": panel.bars_per_year, "shards": len(jobs), "rows": [rows[symbol] for symbol in panel.symbols],
        "book": book,
    }  # fmt: skip


def scores_of(frame: pd.DataFrame, split: str, bars_per_year: float) -> dict[str, dict]:
    """Symbol -> its scores on a split of a ledger by symbol, with an interval of the Sharpe ratio where RESAMPLES has one."""
    frame = frame[frame["split"] == split]
    found = trades.by_symbol(frame, bars_per_year)
    if RESAMPLES[split]:
        for symbol, part in frame.groupby("symbol"):
            returns, market = part["net_return"].to_numpy(), part["market"].to_numpy()
            low, high, how = ledger.sharpe_interval(returns, market, bars_per_year, RESAMPLES[split], seed=0)
            found[symbol] |= {"sharpe_low": low, "sharpe_high": high, "bootstrap": how}
    return found


def markdown(table: dict) -> str:
    """The table for people."""
    columns = ("Sharpe", "drawdown", "trades", "win rate", "profit factor")
    head = ["symbol", *(f"val {name}" for name in columns)]
    head += ["test Sharpe", "95% interval", *(f"test {name}" for name in columns[1:]), "shard", "run"]
    lines = [f"# {Path(table['script']).stem} on {table['panel']}, {table['shards']} shards", ""]
    lines += [f"After costs. `{' '.join(table['arguments'])}`", "", *header(head)]
    for row in table["rows"]:
        cells = [row["symbol"]]
        for split in SCORED:
            s = row[split] or {}
            cells += [number(s, "sharpe", ".2f"), *([interval(s)] if split == "test" else [])]
            cells += [number(s, "max_drawdown", ".1%"), number(s, "trades", "d"), number(s, "win_rate", ".1%")]
            cells.append(number(s, "profit_factor", ".2f"))
        cells += [row["shard"], f"{row['run_dir']} FAILED: {row['failure']}" if row["failure"] else row["run_dir"]]
        lines.append(line(cells))
    lines += ["", "## The book: the same budget for every symbol", ""]
    if table["book"] is None:
        return "\n".join([*lines, "No shard has finished.", ""])
    known = len(table["rows"])
    lines += [f"{table['book']['symbols']} of {known} symbols; per year.", ""]
    lines += header(["split", "bars", "Sharpe", "95% interval", "growth", "drawdown", "turnover", "cost"])
    for split in SCORED:
        s = table["book"][split]
        cells = [split, number(s, "bars", "d"), number(s, "sharpe", ".2f"), interval(s), number(s, "growth", ".1%")]
        lines.append(line([*cells, number(s, "max_drawdown", ".1%"), f"{s['turnover']:.0f}x", number(s, "cost", ".1%")]))
    return "\n".join([*lines, ""])


def header(names: list[str]) -> list[str]:
    return [line(names), line(["-"] * len(names))]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def number(scores: dict, name: str, form: str) -> str:
    value = scores.get(name)
    return "-" if value is None or np.isnan(value) else format(value, form)


def interval(scores: dict) -> str:
    low, high = (number(scores, f"sharpe_{end}", ".2f") for end in ("low", "high"))
    return "-" if low == "-" else f"[{low}, {high}]"


def main(args: Args, arguments: list[str]) -> int:
    """arguments: the script's, after the --."""
    ray = load_ray("ray") if args.ray else None
    try:
        jobs, panel = plan(args, arguments)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    limits = Limits(args.retries, args.timeout, args.threads, os.getcwd(), args.gpus)
    with locked(args.out, "out"):
        print(f"{len(jobs)} shards of {panel.num_symbols} symbols in {args.out}", flush=True)
        if ray:
            results = ray_results(jobs, args.out, limits, ray, args.address)
        else:
            results = local_results(jobs, args.out, limits, args.workers)
        records = execute(jobs, args.out, results)
        table = collect(jobs, records, args, panel)
        ledger.write_json(args.out / "table.json", table)
        (args.out / "table.md").write_text(text := markdown(table), encoding="utf-8")
    print(text[text.index("## The book") :])
    finished = sum(record["status"] == "finished" for record in records)
    print(f"{finished} of {len(jobs)} shards finished; table in {args.out / 'table.md'}")
    return 0 if finished == len(jobs) else 1


if __name__ == "__main__":
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    run_command(lambda: main(tyro.cli(Args, description=__doc__, args=given[:split]), given[split + 1 :]))
