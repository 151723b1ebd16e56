"""Read run directories and sort them into groups that may be ranked together; what cannot be ranked says why.

Everything comes from run.json and ledger.parquet, checked against each other: a ledger that is cut short, holds NaN or does
not add up makes its run a failed one.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from envs.costs import RECORD, RUIN, Costs
from envs.dataset import META
from envs.ledger import growth
from envs.synthetic import drawn_from_seed

LOG_LINES, LOG_CHARACTERS = 25, 4000
LEAVINGS = ("ledger.parquet", "model.pt", "events.out.tfevents.*")
COLLECTED = "collect.json"  # the runner's record of a dataset, in the folder around it
BARS = ["market", "timestamp"]
# Arguments that choose a market but the seed, which runs that command the agents of another run have from that one
MARKET = ("market", "symbols", "start", "end", "resample", "train_fraction", "val_fraction", "embargo", "folds", "fold")
# Arguments that make no other configuration: those of the machine, and those that the comparison group holds resolved.
INCIDENTAL = {
    *("seed", "exp_name", "runs_dir", "resume", "num_threads", "cuda", "torch_deterministic", "checkpoint_every", "only"),
    *("track", "wandb_project_name", "wandb_entity", *MARKET, "costs", "fill", "eval_episodes", "dataset", "agents", "shard"),
    *("log_dataset", "log_at", "log_episodes", "log_noise", "log_epsilon"),
}


@dataclass(eq=False)
class Run:
    path: Path
    content: dict = field(default_factory=dict)  # run.json
    reason: str | None = None  # why it is not ranked
    log: str = ""
    ledger: pd.DataFrame | None = None  # the test split
    name: str = ""
    folds: tuple["Run", ...] = ()  # of a walk-forward run, in order of time

    @property
    def seed(self) -> int:
        return self.content["args"]["seed"]

    @property
    def panel(self) -> str:
        return self.content["panel"]["sha256"]

    @property
    def exp_name(self) -> str:
        args = self.content.get("args")
        return str(args["exp_name"]) if isinstance(args, dict) and args.get("exp_name") else self.path.name

    @property
    def stamp(self) -> float:
        """When it started: the end of its name, or the time of its run.json."""
        last = self.path.name.rpartition("__")[2]
        return float(last) if last.isdigit() else (self.path / "run.json").stat().st_mtime

    @property
    def settings(self) -> dict:
        """Arguments that make a configuration: {"portfolio.scale": 0.5, ...}; of an offline run also what its data are of."""
        data = {}
        if self.offline:
            data = {"env_id": self.content["env_id"], "risk_aversion": self.content["risk_aversion"]}
            data["behaviours"] = ", ".join(self.behaviours)
        return {k: v for k, v in _flat(self.content["args"]).items() if k.rpartition(".")[2] not in INCIDENTAL} | data

    @property
    def offline(self) -> dict | None:
        """What run.json says of the dataset that was learned from; None of an online run."""
        return self.content.get("offline")

    @property
    def behaviours(self) -> list[str]:
        """Names of the policies that acted in an offline run's data, each once, a rule's without "baseline-"."""
        told = (b["policy"] if isinstance(b, dict) else b for b in self.offline["behaviours"])
        return sorted({name.removeprefix("baseline-") for name in told})


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + str(key): value}
    return out


def find(roots: list[Path]) -> list[Run]:
    """Every run directory at or under `roots`, in the order of their names, with what is wrong with run.json, if anything."""
    folders: dict[Path, Run] = {}
    for root in roots:
        if not root.is_dir():
            folders[root.resolve()] = Run(root, reason="no such directory")
            continue
        found = {path.parent for pattern in ("run.json", *LEAVINGS) for path in root.rglob(pattern)}
        # a runner's job that left no run directory
        started = {path.parent for path in root.rglob("job.json")}
        found |= {job for job in started if not any(job in (path, *path.parents) for path in found)}
        # the policies that a dataset was collected with: a benchmark has runs of its own of the same scripts
        collected = {path.parent for path in root.rglob(COLLECTED)}
        found = {path for path in found if collected.isdisjoint(path.parents)}
        for path in sorted(found):
            folders.setdefault(path.resolve(), read(path))
    return list(folders.values())


def read(path: Path) -> Run:
    run = Run(path, log=_last_lines(path / "log.txt"))
    try:
        content = json.loads((path / "run.json").read_text())
    except FileNotFoundError:
        run.reason = "it has no run.json"
        return run
    except (OSError, ValueError) as error:
        run.reason = f"run.json cannot be read: {error}"
        return run
    if not isinstance(content, dict):
        run.reason = "run.json is no object"
        return run
    run.content, missing = content, _missing(content)
    if not missing and "panel" in content and run.offline:
        content["args"] = _market_flags(Path(run.offline["dataset"])) | content["args"]
    if not missing and "agents" in content:
        content["args"] = {name: content["agents"]["args"][name] for name in MARKET} | content["args"]
    status = run.content.get("status")
    if status != "finished":
        run.reason = str(run.content.get("failure") or ("never finished" if status == "running" else f"status {status!r}"))
    elif missing:
        run.reason = missing
    if missing:
        run.content.pop("panel", None)  # not enough to place it
    return run


def _market_flags(dataset: Path) -> dict:
    """Arguments that chose the market of a dataset, from the meta beside it: an offline script has none of its own.

    {} where the dataset is gone; what needs them then says what it lacks.
    """
    try:
        task = json.loads(dataset.with_name(META).read_text())["task"]
        config = "leadlag" if task["env_id"] == "LeadLag-v0" else "portfolio"
        options = {key: value for key, value in task["options"].items() if key == "actions"}
        flags = {key: value for key, value in task.items() if key not in ("env_id", "seed", "config", "options")}
        return {**flags, config: task["config"], **options}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _missing(content: dict) -> str | None:
    """What a run.json lacks to be placed in a group; None for Gymnasium tasks, which have no market."""
    args = content.get("args")
    if not isinstance(args, dict) or not isinstance(args.get("seed"), int):
        return "run.json holds no args.seed"
    if "panel" not in content and "market" not in content:
        return None
    try:
        Costs(**content["market"]["costs"])
        text = [content["market"]["fill"], content["panel"]["name"], content["panel"]["sha256"]]
        whole = {**content["panel"]["splits"]}["test"]["end"] and float(content["panel"]["bars_per_year"]) > 0
        if not whole or not all(isinstance(value, str) for value in text):
            return "run.json does not describe its market: expected text in panel.name, panel.sha256 and market.fill"
    except (KeyError, TypeError, ValueError) as error:
        return f"run.json does not describe its market: {type(error).__name__} {error}"
    return _missing_data(content) if content.get("offline") is not None else None


def _missing_data(content: dict) -> str | None:
    """What the run.json of an offline run lacks to be told apart and compared by its data."""
    try:
        data = content["offline"]
        text = [content["env_id"], data["dataset"], data["sha256"], *Run(Path(), content).behaviours]
        numbers = [content["risk_aversion"], *(data[key] for key in ("steps", "episodes", "mean_reward"))]
    except (KeyError, TypeError, AttributeError) as error:
        return f"run.json does not describe its data: {type(error).__name__} {error}"
    if not all(isinstance(value, str) for value in text) or not all(isinstance(value, (int, float)) for value in numbers):
        return (
            "run.json does not describe its data: expected text in env_id, offline.dataset and offline.sha256, numbers in "
            "risk_aversion, offline.steps, offline.episodes and offline.mean_reward"
        )
    return None


def _last_lines(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4 * LOG_CHARACTERS))
            text = file.read().decode(errors="replace").replace("\r", "\n")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-LOG_LINES:])[-LOG_CHARACTERS:]


def load(run: Run):
    """Read and check the ledger of a finished run; sets `ledger`, or `reason`."""
    try:
        run.ledger = checked(run, "ledger.parquet")
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.reason = " ".join(str(error).split()) or type(error).__name__


def checked(run: Run, file: str) -> pd.DataFrame:
    """The test split of a ledger in a run's directory, by market and time. Raises ValueError where it is not sound."""
    path = run.path / file
    if not path.is_file():
        raise ValueError(f"it has no {file}")
    try:
        frame = pd.read_parquet(path, columns=["split", *BARS, *RECORD])
    except Exception as error:  # whatever a broken file makes the reader raise
        raise ValueError(f"{file} cannot be read: {error}") from None
    for name in RECORD:
        bad = np.flatnonzero(~np.isfinite(frame[name].to_numpy(np.float64)))
        if len(bad):
            raise ValueError(f"{file}: {name} is not finite in row {bad[0]}, and in {len(bad)} rows in all")
    frame = frame[frame["split"] == "test"].drop(columns="split").sort_values("market", kind="stable", ignore_index=True)
    if frame.empty:
        raise ValueError(f"{file} holds no bar of the test split")
    bars = _flat(run.content.get("scores") or {}).get("test.agent.bars")
    if bars is not None and bars != len(frame):
        raise ValueError(f"{file} is truncated: {len(frame)} bars of the test split, run.json says {bars}")
    end = pd.Timestamp(run.content["panel"]["splits"]["test"]["end"])
    if frame["timestamp"].max() != end.tz_localize(frame["timestamp"].dt.tz):
        raise ValueError(f"{file} is truncated: it ends {frame['timestamp'].max()}, the test split {end}")
    for market, part in frame.groupby("market"):
        times, equity = part["timestamp"], part["equity"].to_numpy()
        if not times.is_monotonic_increasing or times.duplicated().any():
            raise ValueError(f"{file}: timestamps of market {market} do not increase")
        alive = np.cumprod(np.concatenate([[True], equity[:-1] > RUIN])).astype(bool)
        made = np.cumprod(1.0 + part["net_return"].to_numpy())
        if not np.allclose(equity[alive], made[alive], rtol=1e-6, atol=1e-9):
            raise ValueError(f"{file}: equity of market {market} does not follow from its net returns")
    return frame


def join_folds(runs: list[Run]) -> list[Run]:
    """Walk-forward runs whose folds are all there become one run each, its test split those of the folds, one after another.

    What is joined has the same arguments but `fold`, panel, costs and fill; of a fold that was run twice the latest counts.
    Every fold starts in cash. Where a fold failed or is missing, the others stay runs of their own.
    """
    families: dict[str, list[Run]] = {}
    for run in runs:
        if run.reason is None and run.content["args"].get("folds"):
            own = ("fold", "dataset", "runs_dir", "resume", "num_threads")
            apart = {k: v for k, v in run.content["args"].items() if k not in own}
            same = [apart, run.panel, run.content["market"], run.content.get("script_sha256")]
            families.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    joined = []
    for members in families.values():
        newest = {run.content["args"]["fold"]: run for run in sorted(members, key=lambda run: run.stamp)}
        parts = tuple(newest[fold] for fold in sorted(newest))
        if len(parts) == members[0].content["args"]["folds"]:
            joined.append(_joined(parts))
            runs = [run for run in runs if run not in parts]
    return [*runs, *joined]


def _joined(parts: tuple[Run, ...]) -> Run:
    frame = pd.concat([run.ledger for run in parts], ignore_index=True)
    frame["equity"] = np.exp(np.cumsum(growth(frame)))
    content = parts[0].content
    splits = [run.content["panel"]["splits"] for run in parts]
    whole = {"start": splits[0]["test"]["start"], "end": splits[-1]["test"]["end"]}
    panel = content["panel"] | {"splits": {"test": whole, "folds": splits}}
    return Run(parts[0].path, content | {"panel": panel}, ledger=frame, folds=parts)


def terms(run: Run) -> dict[str, object]:
    """What must be equal for two runs to be ranked together, by the name of the field in run.json.

    Where every seed has a panel of its own, the panel is its specification and the symbols selected, which it leaves out.
    """
    panel, market = run.content["panel"], run.content["market"]
    costs = {k: float(v) for k, v in asdict(Costs(**market["costs"])).items() if k != "name"}
    if drawn_from_seed(panel["name"]):
        named = {"panel.name": panel["name"], "args.symbols": json.dumps(run.content["args"].get("symbols") or [])}
    else:
        named = {"panel.sha256": panel["sha256"]}
    return named | {
        "args.shard": run.content["args"].get("shard", "0/1"),  # of the symbols
        **{f"panel.splits.{k}": json.dumps(v, sort_keys=True) for k, v in panel["splits"].items()},
        "market.fill": market["fill"],
        **{f"market.costs.{k}": v for k, v in costs.items()},
    }


def differing(a: dict, b: dict) -> list[str]:
    return [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]


def group(runs: list[Run]) -> list[tuple[dict, list[Run]]]:
    """(terms, runs) of every comparison group, the largest first.

    Where one seed of a market that is drawn from it has several panels (its generator changed), that of most runs, or else of
    the latest, stays in the group, and the others form groups of their own.
    """
    groups: dict[str, tuple[dict, list[Run]]] = {}
    for run in runs:
        groups.setdefault(json.dumps(terms(run)), (terms(run), []))[1].append(run)
    out = []
    for shared, members in groups.values():
        parts, clash = [], set()
        while members:
            panels: dict[int, dict[str, list[Run]]] = {}
            for run in members:
                panels.setdefault(run.seed, {}).setdefault(run.panel, []).append(run)
            clash |= {seed for seed, found in panels.items() if len(found) > 1}
            kept = {
                seed: max(found, key=lambda sha: (len(found[sha]), max(run.stamp for run in found[sha])))
                for seed, found in panels.items()
            }
            parts.append((kept, [run for run in members if kept[run.seed] == run.panel]))
            members = [run for run in members if kept[run.seed] != run.panel]
        for kept, part in parts:
            out.append((shared | {f"panel.sha256 of seed {s}": kept[s] for s in sorted(clash & set(kept))}, part))
    return sorted(out, key=lambda g: -len(g[1]))


def name_rows(runs: list[Run]) -> dict[str, list[Run]]:
    """Rows of a table: the runs of one script and one configuration, over seeds. Sets `name` of each run.

    Where a script was run in several configurations, the row says by what they differ, None aside.
    """
    scripts: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        scripts.setdefault(run.exp_name, {}).setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    rows: dict[str, list[Run]] = {}
    for script, configurations in sorted(scripts.items()):
        settings = [json.loads(key) for key in configurations]
        apart = sorted({k for s in settings for k in s if any(s.get(k) != t.get(k) for t in settings)})
        for own, members in zip(settings, configurations.values()):
            told = [f"{k.rpartition('.')[2]}={_brief(own[k])}" for k in apart if own.get(k) is not None]
            name = f"{script} [{', '.join(told[:4])}{', ...' if len(told) > 4 else ''}]" if told else script
            number = 2
            while name in rows:
                name, number = re.sub(r"( #\d+)?$", f" #{number}", name), number + 1
            rows[name] = members
            for run in members:
                run.name = name
    return rows


def _brief(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def latest(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """One run per seed, the latest, by seed; and the older repeats."""
    newest = {run.seed: run for run in sorted(runs, key=lambda run: run.stamp)}
    kept = [newest[seed] for seed in sorted(newest)]
    return kept, [run for run in runs if run not in kept]


def common_bars(runs: list[Run]) -> dict[str, tuple[int, int]]:
    """Cut the ledgers on each panel to the bars that all of them hold; equity then starts at 1 on the first of these.

    Returns {panel: (fewest, most) bars before}, only of panels where something was cut. Raises ValueError where nothing is
    shared.
    """
    cut = {}
    for sha in dict.fromkeys(run.panel for run in runs):
        members = [run for run in runs if run.panel == sha]
        bars = [pd.MultiIndex.from_frame(run.ledger[BARS]) for run in members]
        if all(index.equals(bars[0]) for index in bars):
            continue
        shared = bars[0]
        for index in bars[1:]:
            shared = shared.intersection(index, sort=False)
        if not len(shared):
            raise ValueError(f"the runs on panel {sha[:12]} share no bar of the test split")
        for run, index in zip(members, bars):
            frame = run.ledger[index.isin(shared)].reset_index(drop=True)
            frame["equity"] = np.exp(pd.Series(growth(frame)).groupby(frame["market"]).cumsum())
            run.ledger = frame
        cut[sha] = (min(map(len, bars)), max(map(len, bars)))
    return cut
