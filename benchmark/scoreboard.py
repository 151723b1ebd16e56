"""The scoreboard: run directories in, scoreboard.json, scoreboard.md and scoreboard.html out.

`python benchmark/scoreboard.py runs --out benchmark/results`; `--compare A B` prints the differences between two algorithms or
run directories instead. Every score comes from the test split of the ledgers. Only runs on the same panel, splits, fill rule
and costs are ranked together; the others get tables of their own, or with --strict a refusal that names the field.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import metrics
import numpy as np
import offline
import tyro
from curves import cost_sensitivity, curves, learning_curves
from inference import BUY_AND_HOLD, FORESIGHT, Selection
from paired import Draws
from replay import stress
from rundirs import Run, common_bars, differing, find, group, join_folds, latest, load, name_rows

from envs import ledger
from envs.costs import Costs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TEMPLATE = Path(__file__).with_name("scoreboard.html")
COLUMNS = [
    dict(key="sharpe", label="Sharpe", kind="number", help="annualised, net of costs, mean over seeds; 95% interval"),
    dict(key="iqm", label="IQM", kind="number", help="interquartile mean of the Sharpe ratios of all markets and seeds"),
    dict(key="growth", label="growth", kind="percent", help="mean log growth a year, net of costs"),
    dict(key="max_drawdown", label="drawdown", kind="percent", help="deepest, mean over markets and seeds"),
    dict(key="cvar", label="CVaR", kind="percent", help="mean net return of the worst 5% of bars"),
    dict(key="turnover", label="turnover", kind="times", help="sum of absolute weight changes a year"),
    dict(key="cost", label="cost", kind="percent", help="all costs a year, share of equity"),
    dict(key="late", label="1 bar late", kind="number", help="Sharpe ratio of the same orders, each given one bar later"),
    dict(key="better", label="P(better)", kind="probability", help="probability of a higher Sharpe ratio than the reference's"),
    dict(key="psr", label="PSR", kind="probability", help="probability that the Sharpe ratio is above zero"),
    dict(key="dsr", label="DSR", kind="probability", help="the same, deflated for every trial of the group"),
    dict(key="seeds", label="seeds", kind="count", help="runs that count, one per seed"),
]
SHOWN = {column["key"] for column in COLUMNS}
MORE = [  # on the page on demand, and in the JSON
    dict(key=key, label=label, kind=kind, help=text, more=True)
    for key, (label, kind, text) in metrics.SCORES.items()
    if key not in SHOWN
]


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run directories, or folders that hold them at any depth"""
    out: Path = Path("benchmark/results")
    """folder of scoreboard.json, scoreboard.md and scoreboard.html"""
    strict: bool = False
    """refuse, instead of separate tables, when not all runs can be ranked together"""
    reference: str = "baseline-equal-weight"
    """row that the others are compared with"""
    compare: tuple[str, str] | None = None
    """print the differences between two rows or two (folders of) run directories, and write nothing"""
    resamples: int = 1000
    """bootstrap draws of every interval"""
    seed: int = 0
    """seed of the bootstrap"""
    replays: bool = True
    """the same orders at other costs, one bar late, and by regime, where the panel can be loaded again"""
    learning: bool = True
    """learning curves from TensorBoard events"""
    picture: bool = False
    """also scoreboard.png, the top of the page, by a Chromium that is installed"""


def failed_row(run: Run) -> dict:
    reason = run.reason.strip() or "no reason given"
    head, log = reason[:300] + (" ..." if len(reason) > 300 else ""), run.log
    if not log and len(reason) > 300:
        log = reason[-4000:]
    name = (
        f"{run.exp_name}, seed {run.seed}"
        if isinstance(run.content.get("args"), dict) and "seed" in run.content["args"]
        else run.exp_name
    )
    return {"name": name, "path": str(run.path), "reason": head, "log": log}


def build(shared: dict, runs: list[Run], failed: list[Run], args: Args) -> dict:
    """Everything that the page shows of one comparison group. `runs` have ledgers; `failed` count as trials too."""
    configurations = name_rows(runs)
    rows, repeats = {}, []
    for name, members in configurations.items():
        rows[name], older = latest(members)
        repeats += older
    runs = [run for members in rows.values() for run in members]
    cut = common_bars(runs)
    draws = Draws(rows, args.resamples, args.seed)
    reference = find_row(rows, args.reference)
    first = runs[0].content
    per_year = float(first["panel"]["bars_per_year"])
    drawn = "panel.name" in shared  # from the seed
    test = first["panel"]["splits"]["test"]
    title = first["panel"]["name"]
    costs = Costs(**first["market"]["costs"])
    panels = sorted({run.panel for run in runs})
    facts = [
        f"panel {panels[0][:12]}" if len(panels) == 1 else f"{len(panels)} panels, one per seed",
        f"test split {test['start'][:10]} to {test['end'][:10]}, {len(runs[0].ledger):,} bars a run",
        *([f"{len(runs[0].folds)} walk-forward folds"] if runs[0].folds else []),
        f"fill {first['market']['fill']}",
        f"costs {costs.describe()}",
    ]
    trials = sum(trial_count(run) for run in [*runs, *repeats, *failed])
    selection = Selection(rows, draws.block, trials, args.resamples, args.seed)
    stressed = stress(rows, args.resamples, args.seed) if args.replays else {"notes": []}
    table = [
        {
            "name": name,
            "reference": name == reference,
            "detail": describe_row(name, members),
            "seeds": len(members),
            **scores_of(members, rows.get(BUY_AND_HOLD, []), per_year),
            **draws.scores(name),
            "iqm": draws.iqm(name),
            "better": draws.better(name, reference) if reference not in (None, name) else None,
            "late": stressed.get("late", {}).get(name),
            **selection.row(name),
        }
        for name, members in rows.items()
    ]
    table.sort(key=lambda row: -row["sharpe"]["value"])
    order = [row["name"] for row in table]
    pairs = {f"{i},{j}": draws.difference(order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order))}
    rows = {name: rows[name] for name in order}
    return {
        "title": title,
        "facts": " · ".join(facts),
        "terms": shared,
        "costs": first["market"]["costs"],
        "warnings": [*warnings(rows, repeats, cut, reference, drawn, len(panels), args), *selection.warnings()],
        "notes": [
            f"Intervals: 95%; {draws.how}, then seeds; {args.resamples} draws.",
            *selection.notes(per_year),
            *stressed["notes"],
        ],
        "reference": reference,
        "block": draws.block,
        "trials": trials,
        "configurations": len(configurations),
        "selection": selection.group,
        "rows": table,
        "failed": [failed_row(run) for run in failed],
        "pairs": pairs,
        "offline": offline.tables(rows, failed, args.resamples, args.seed),
        "curves": curves(rows),
        "learning": learning_curves(rows) if args.learning else {},
        "regimes": stressed.get("regimes", {}),
        "sensitivity": stressed.get("sensitivity", {}),
        "manifests": [
            {"path": str(part.path), "run": part.content} for run in [*runs, *repeats, *failed] for part in run.folds or (run,)
        ],
    }


def scores_of(runs: list[Run], benchmark: list[Run], per_year: float) -> dict[str, float]:
    """Every score of metrics.SCORES, mean over the runs of a row; against the benchmark's run on the same panel, if any."""
    market = {run.panel: run.ledger["net_return"].to_numpy() for run in benchmark}
    tables = [metrics.table(run.ledger, per_year, market.get(run.panel)) for run in runs]
    return {key: float(np.mean([scores[key] for scores in tables])) for key in metrics.SCORES}


def trial_count(run: Run) -> int:
    trials = run.content.get("trials", 1)
    return trials if isinstance(trials, int) and trials > 0 else 1


def find_row(rows, name: str) -> str | None:
    """The row of that name: as written, or as a baseline, spaces and case aside."""
    plain = name.lower().replace(" ", "-").replace("_", "-")
    wanted = (name, plain, f"baseline-{plain}")
    return next((row for row in rows if row in wanted or row.replace("_", "-") in wanted), None)


def describe_row(name: str, runs: list[Run]) -> str:
    seeds = f"seeds {', '.join(str(run.seed) for run in runs)}" if len(runs) > 1 else f"seed {runs[0].seed}"
    return f"{seeds}; knows what no agent can" if name.startswith(FORESIGHT) else seeds


def warnings(rows, repeats, cut, reference, drawn: bool, panels: int, args: Args) -> list[str]:
    """What a reader must know before comparing rows of one table."""
    out = []
    numbers = {}
    for name, runs in rows.items():
        numbers.setdefault(tuple(run.seed for run in runs), []).append(name)
    if len(numbers) > 1:
        said = "; ".join(f"{', '.join(map(str, seeds))}: {_some(names)}" for seeds, names in numbers.items())
        out.append(f"Rows were run with different seeds ({said}).")
    if drawn and panels > 1:
        out.append(
            "Every seed of this market draws prices of its own. Rows are compared on the seeds that they share, paired by "
            "seed; a row with other seeds has met other prices."
        )
    one = [name for name, runs in rows.items() if len(runs) == 1 and not name.startswith("baseline-")]
    if one:
        out.append(f"One seed only, so the interval knows nothing of luck in training: {_some(one)}.")
    if cut:
        (low, high), *_ = cut.values()
        out.append(f"Test bars differ between rows (from {low:,} to {high:,}); all scores use the bars that every row has.")
    if repeats:
        out.append(
            f"{len(repeats)} older runs of a configuration and seed that ran again are not ranked; they count as trials."
        )
    mixed = [name for name, runs in rows.items() if len({run.content.get("script_sha256") for run in runs}) > 1]
    if mixed:
        out.append(f"The seeds of one row come from different versions of its script: {_some(mixed)}.")
    if reference is None:
        out.append(f"No row {args.reference!r} to compare with: P(better) is missing.")
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def difference_table(found: dict, a: str, b: str) -> str:
    """Plain text of Draws.difference."""
    if "note" in found:
        return found["note"]
    lines = [f"{'':10}{'first':>10}{'second':>10}{'difference':>12}  95% interval"]
    for score in found["scores"]:
        column = next(c for c in COLUMNS if c["key"] == score["key"])
        one, two, gap, low, high = (shown(score[k], column["kind"]) for k in ("a", "b", "difference", "low", "high"))
        lines.append(f"{column['label']:10}{one:>10}{two:>10}{gap:>12}  [{low}, {high}]")
    return "\n".join([f"first: {a}", f"second: {b}", *lines, found["how"]])


def compare(args: Args) -> int:
    """Print the differences between two rows of the runs given, or between the runs below two folders."""
    a, b = args.compare
    if Path(a).is_dir() and Path(b).is_dir():
        sides = {f"A {a}": find([Path(a)]), f"B {b}": find([Path(b)])}
    else:
        runs, sides = find(list(args.runs)), {f"A {a}": [], f"B {b}": []}
        placed, _, _ = sort_out(runs)
        for _, members, _ in placed:
            for name, own in name_rows(members).items():
                for side, wanted in ((f"A {a}", a), (f"B {b}", b)):
                    if find_row([name], wanted):
                        sides[side] += own
        unknown = [side[2:] for side, own in sides.items() if not own]
        if unknown:
            names = sorted({run.name for run in runs if run.name})
            sys.exit(f"--compare {unknown[0]}: no such row or directory; expected one of {', '.join(names) or 'none'}")
    checked = {side: sort_out(runs) for side, runs in sides.items()}
    first, second = sides
    printed = 0
    apart = []
    for ours, runs_a, _ in checked[first][0]:
        for theirs, runs_b, _ in checked[second][0]:
            fields = differing(ours, theirs)
            if fields:
                apart.append(f"{fields[0]}: {ours.get(fields[0])} and {theirs.get(fields[0])}")
                continue
            for side, own in ((first, runs_a), (second, runs_b)):
                if len(names := name_rows(own)) > 1:
                    sys.exit(f"--compare {side[2:]}: several algorithms, {_some(list(names))}; name one, or its directory")
            rows = {first: latest(runs_a)[0], second: latest(runs_b)[0]}
            common_bars([run for runs in rows.values() for run in runs])
            print(f"\n{runs_a[0].content['panel']['name']}, test split, net of costs, per year")
            print(difference_table(Draws(rows, args.resamples, args.seed).difference(first, second), first, second))
            printed += 1
    for side in sides:
        for run in (*checked[side][1], *(bad for _, _, failed in checked[side][0] for bad in failed)):
            print(f"failed, not counted: {run.path}: {failed_row(run)['reason']}", file=sys.stderr)
    if not printed:
        sys.exit("--compare: nothing to rank together" + (f"; they differ in {apart[0]}" if apart else ""))
    return 0


def sort_out(runs: list[Run]) -> tuple[list[tuple[dict, list[Run], list[Run]]], list[Run], list[Run]]:
    """(terms, runs with ledgers, failed runs) of every group; failed runs that cannot be placed; Gymnasium tasks."""
    placed, unplaced, tasks = [], [], []
    for run in runs:
        if "panel" in run.content:
            placed.append(run)
        elif run.reason:
            unplaced.append(run)
        else:
            tasks.append(run)
    for run in placed:
        if run.reason is None and run.ledger is None:
            load(run)
    placed = join_folds(placed)
    groups = [
        (shared, [run for run in members if run.reason is None], [run for run in members if run.reason is not None])
        for shared, members in group(placed)
    ]
    return groups, unplaced, tasks


def shown(value: float | None, kind: str) -> str:
    if value is None or not np.isfinite(value):
        return "-"
    form = {"percent": ".1%", "times": ".1f", "count": ".0f"}.get(kind, ".2f")
    return f"{value:{form}}" + ("x" if kind == "times" else "")


def markdown(board: dict) -> str:
    """The same tables as text. What comes from files is escaped."""
    lines = ["# Scoreboard", "", board["summary"], ""]
    lines += [f"> {_safe(line)}" for line in board["banner"]]
    for shown_group in board["groups"]:
        lines += ["", f"## {_safe(shown_group['title'])}", "", _safe(shown_group["facts"]), ""]
        lines += [f"> {_safe(line)}  " for line in shown_group["warnings"]] + [""]
        lines += markdown_table(shown_group["rows"], COLUMNS)
        lines += [f"| {_safe(f['name'])} | **failed**: {_safe(f['reason'])} |" for f in shown_group["failed"]]
        lines += ["", *(f"- {_safe(note)}" for note in shown_group["notes"])]
        for table in shown_group["offline"]:
            lines += ["", f"### {_safe(table['title'])}", "", *markdown_table(table["rows"], table["columns"]), ""]
            lines += [f"- {_safe(note)}" for note in table["notes"]]
    if board["unplaced"]:
        lines += ["", "## Failed runs outside of every table", "", "| run | reason |", "|---|---|"]
        lines += [f"| {_safe(f['name'])} | **failed**: {_safe(f['reason'])} |" for f in board["unplaced"]]
    if board["tasks"]:
        lines += [
            "",
            "## Gymnasium tasks",
            "",
            "| algorithm | task | seeds | return, last 100 episodes | steps |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {' | '.join(_safe(t[k]) for k in ('name', 'env_id', 'seeds', 'score', 'steps'))} |" for t in board["tasks"]
        ]
    return "\n".join(lines) + "\n"


def markdown_table(rows: list[dict], columns: list[dict]) -> list[str]:
    """Lines of a table: a row for each algorithm, values with their intervals where they have any."""
    lines = ["| algorithm | " + " | ".join(c["label"] for c in columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            value, kind = row.get(column["key"]), column["kind"]
            if isinstance(value, dict):
                low, high = shown(value["low"], kind), shown(value["high"], kind)
                cells.append(shown(value["value"], kind) + (f" [{low}, {high}]" if low != "-" else ""))
            else:
                cells.append(shown(value, kind))
        lines.append(f"| {_safe(row['name'])} | " + " | ".join(cells) + " |")
    return lines


def _safe(text) -> str:
    """Text of a file inside Markdown: no table cell, HTML or link can come out of it."""
    text = " ".join(str(text).split())
    for character in "\\`*_[]|~":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def page(board: dict) -> str:
    """The HTML page around the JSON, in which no character can end the script element."""
    data = json.dumps(ledger._plain(board), allow_nan=False, ensure_ascii=True)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data)


def task_rows(runs: list[Run]) -> list[dict]:
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault((run.exp_name, str(run.content.get("env_id")), run.content.get("env_steps")), []).append(run)
    rows = []
    for (name, env_id, steps), own in sorted(found.items(), key=lambda item: str(item[0])):
        scores = [run.content.get("last_100_returns") for run in own]
        scores = [float(s) for s in scores if isinstance(s, (int, float))]
        said = f"{np.mean(scores):.4g} ± {np.std(scores):.2g}" if scores else "-"
        rows.append({"name": name, "env_id": env_id, "seeds": str(len(own)), "score": said, "steps": f"{steps or 0:,}"})
    return rows


def assemble(args: Args) -> dict:
    runs = find(list(args.runs))
    if not runs:
        sys.exit(f"no run directory in {' '.join(map(str, args.runs)) or 'nothing'}; expected folders that hold run.json")
    groups, unplaced, tasks = sort_out(runs)
    banner = []
    if len(groups) > 1:
        (one, ours, bad), (two, theirs, worse) = groups[:2]
        fields = differing(one, two)
        if args.strict:
            sys.exit(
                f"--strict: {(ours + bad)[0].path} and {(theirs + worse)[0].path} cannot be ranked together: {fields[0]} is "
                f"{one.get(fields[0])} and {two.get(fields[0])}"
            )
        apart = list(dict.fromkeys(field for other, _, _ in groups[1:] for field in differing(one, other)))
        banner.append(f"{len(groups)} tables that cannot be compared with each other; they differ in {_some(apart)}.")
    failed = len(unplaced) + sum(len(bad) for _, _, bad in groups)
    if failed:
        banner.append(f"{failed} of {len(runs)} runs failed: red rows.")
    boards = []
    for shared, good, bad in groups:
        if good:
            boards.append(build(shared, good, bad, args))
        else:
            unplaced = [*unplaced, *bad]
        for run in good:
            run.ledger = None
    for board in boards:
        family = [other for other in boards if other["title"] == board["title"]]
        about = {"costs": lambda b: b["costs"]["name"], "fill": lambda b: b["terms"]["market.fill"]}
        said = [f"{what} {say(board)[:40]}" for what, say in about.items() if len({say(other) for other in family}) > 1]
        board["name"] = ", ".join([board["title"], *said])
    for board in boards:
        same = [other for other in boards if other["name"].partition(" #")[0] == board["name"]]
        for number, other in enumerate(same[1:], 2):
            other["name"] += f" #{number}"
    summary = f"{len(runs)} runs, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    return {
        "summary": summary,
        "columns": [*COLUMNS, *MORE],
        "banner": banner,
        "groups": boards,
        "unplaced": [failed_row(run) for run in unplaced],
        "tasks": task_rows(tasks),
        "costs": cost_sensitivity(boards),
    }


def take_picture(html: Path, png: Path):
    """Screenshot of the top of a page. Exits where there is no Chromium, or it fails."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"--picture: none of {' '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
        flags += ["--window-size=1280,1500", f"--user-data-dir={profile}", f"--screenshot={png.resolve()}"]
        done = subprocess.run([browser, *flags, html.resolve().as_uri()], capture_output=True, text=True, timeout=120)
    if done.returncode or not png.is_file():
        sys.exit(f"--picture: {browser} failed: {done.stderr[-300:]}")


def main(args: Args) -> int:
    if args.compare:
        return compare(args)
    board = assemble(args)
    args.out.mkdir(parents=True, exist_ok=True)
    ledger.write_json(args.out / "scoreboard.json", board)
    (args.out / "scoreboard.md").write_text(markdown(board), encoding="utf-8")
    (args.out / "scoreboard.html").write_text(page(board), encoding="utf-8")
    if args.picture:
        take_picture(args.out / "scoreboard.html", args.out / "scoreboard.png")
    for line in board["banner"]:
        print(line)
    print(f"{len(board['groups'])} tables, {sum(len(g['rows']) for g in board['groups'])} rows: {args.out / 'scoreboard.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
