"""The launcher: its shards, what kills, crashes and second starts leave of them, and the table of all.

Most tests launch a small script that only pretends to learn, in this process; two kill the real one.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import launch
import numpy as np
import pandas as pd
import pytest
import tyro
from conftest import ROOT
from scripts import SCRIPTS, Run, assert_same_ledger, assert_same_run
from test_runner import FakeRay, alive, wait_for

from envs import ledger, trades, trading_references
from envs.synthetic import load_market, make_panel
from envs.trading_tables import TradingData, shard_of

pytest_plugins = ["scripts"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAMES = ("A", "B", "C", "D", "E")
PRICES = "two words; touch x.csv"  # a file's name: no shell may read it
LISTED = 150  # first bar of E
# A script as the launcher sees one: it learns by counting to 8, saves every second iteration, and leaves what the fixture
# `home` has computed for its shard. modes.json: shard -> what goes wrong in each start; the last mode is that of later ones.
FAKE = '''
import json, os, shutil, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    exp_name: str = "fake"
    """its name"""
    seed: int = 1
    """seed of everything"""
    market: str = "prices.csv"
    """which market"""
    symbols: tuple[str, ...] = ()
    """symbols to keep"""
    start: str | None = None
    """first date"""
    end: str | None = None
    """last date"""
    resample: str | None = None
    """coarser bars"""
    shard: str = "0/1"
    """which symbols"""
    runs_dir: str = "runs"
    """folder of the run directory"""
    resume: str | None = None
    """where to go on"""
    num_threads: int = 0
    """threads"""


args, saved, home = tyro.cli(Args), None, Path(__file__).parent
if args.resume:
    saved = json.loads((Path(args.resume) / "model.pt").read_text())
    args = Args(**saved["args"] | {"resume": args.resume})
name = args.shard.replace("/", "-of-")
with (home / "starts" / name).open("a") as file:
    file.write(f"resume {saved['iteration']}\\n" if saved else "start\\n")
starts = len((home / "starts" / name).read_text().splitlines())
modes = json.loads((home / "modes.json").read_text()).get(args.shard, ["fine"])
mode = modes[min(starts, len(modes)) - 1]
print(f"{args.shard}: {mode}", flush=True)
if mode == "crash":
    raise ValueError(f"on purpose in {args.shard}")
folder = Path(args.resume or f"{args.runs_dir}/Trading-v0__fake__{args.seed}__{time.time_ns()}")
folder.mkdir(exist_ok=True)
left = home / "template" / name
run = json.loads((left / "run.json").read_text()) | {"args": asdict(args)}
(folder / "run.json").write_text(json.dumps(run | {"status": "running"}))
for iteration in range(saved["iteration"] + 1 if saved else 1, 9):
    if iteration == 5 and mode == "hang":
        (home / "hangs" / str(os.getpid())).touch()
        time.sleep(600)
    if iteration == 5 and mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if iteration == 5 and mode == "late":
        raise ValueError(f"on purpose in {args.shard}")
    if iteration % 2 == 0:
        (folder / "model.part").write_text(json.dumps({"args": asdict(args), "iteration": iteration}))
        os.replace(folder / "model.part", folder / "model.pt")
if mode == "other prices":
    run["panel"]["sha256"] = "0" * 64
for file in ("ledger.parquet", "symbols.parquet"):
    shutil.copy(left / file, folder)
if mode == "no symbols":
    (folder / "symbols.parquet").unlink()
(folder / "run.json").write_text(json.dumps(run | {"status": "finished"}))
'''


# --- shards


@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("symbols", range(1, 9))
def test_shards_are_disjoint_complete_and_of_the_same_size(number, symbols):
    names = [f"S{k}" for k in range(symbols)]
    if number > symbols:
        with pytest.raises(ValueError, match=f"--shard 0/{number}: expected .* <= {symbols}"):
            shard_of(names, f"0/{number}")
        return
    shards = [shard_of(names, f"{index}/{number}") for index in range(number)]
    assert sorted(sum(shards, ())) == sorted(names)
    assert {len(shard) for shard in shards} <= {symbols // number, symbols // number + 1}
    assert all(shard[0] == f"S{index}" and shard == tuple(sorted(shard)) for index, shard in enumerate(shards))


def test_which_symbols_a_shard_holds():
    names = tuple(f"S{k}" for k in range(143))
    assert shard_of(names, "2/143") == ("S2",) and shard_of(names, "0/1") == names
    assert shard_of(names[:7], "1/3") == ("S1", "S4")


@pytest.mark.parametrize(
    "shard", ["3/3", "4/3", "-1/3", "0/0", "0/4", "1", "1/", "/2", "a/b", "1/2/3", "0.5/2", " 0/2", "", "²/3"]
)
def test_a_bad_shard_is_named(shard):
    with pytest.raises(ValueError) as caught:
        shard_of(("A", "B", "C"), shard)
    assert f"--shard {shard}: expected i/n with 0 <= i < n <= 3, the number of symbols" in str(caught.value)


@pytest.fixture
def script():
    return SCRIPTS["ppo_transformer_trading"]


def test_the_script_refuses_a_bad_shard(script, complaint):
    assert "--shard 3/3: expected i/n with 0 <= i < n <= 3" in complaint("--market", script.market, "--shard", "3/3")


# --- the real script

REAL = (
    "--market", "synthetic:ou:bars=400:train=1:val=1:test=1:assets=3", "--total-timesteps", "20480", "--num-envs", "64",
    "--num-steps", "16", "--width", "8", "--window", "4", "--checkpoint-every", "3", "--eval-every", "5", "--no-cuda",
)  # fmt: skip
COMMAND = (sys.executable, str(ROOT / "benchmark" / "launch.py"))


def start_real(out: Path, *options: str) -> subprocess.Popen:
    call = [*COMMAND, "--script", str(SCRIPTS["ppo_transformer_trading"].path), "--shards", "2", "--out", str(out)]
    return start([*call, *options, "--threads", "1", "--", *REAL])


def start(call: list[str]) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_real(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def real_runs(out: Path) -> dict[str, Run]:
    """Shard -> its run."""
    found = [Run(path.parent) for path in out.glob("*/*/run.json")]
    runs = {run.json["args"]["shard"]: run for run in found}
    assert sorted(runs) == ["0/2", "1/2"] and len(found) == 2
    return runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Two real workers that nothing happens to."""
    out = tmp_path_factory.mktemp("real") / "out"
    assert "2 of 2 shards finished" in finish_real(start_real(out, "--workers", "2"))
    return out


def iterations(folder: Path) -> list[int]:
    """After which iterations a shard was gone on with, by its log."""
    return [int(n) for n in re.findall(r"^resume  .* after iteration (\d+)$", (folder / "log.txt").read_text(), re.MULTILINE)]


def test_two_workers_train_the_shards_of_one_panel(undisturbed):
    runs, panel = real_runs(undisturbed), make_panel(REAL[1], seed=1)
    for shard, symbols in (("0/2", ["S00", "S02"]), ("1/2", ["S01"])):
        run = runs[shard].json
        assert run["market"]["traded"] == symbols == list(run["symbols"])
        assert run["panel"]["sha256"] == panel.sha256 and run["panel"]["symbols"] == ["S00", "S01", "S02"]
        assert run["panel"]["splits"] == runs["0/2"].json["panel"]["splits"]
        frame = pd.read_parquet(runs[shard].folder / "symbols.parquet")
        assert set(frame["symbol"]) == set(symbols) and set(frame["split"]) == {"train", "val", "test"}
    table = json.loads((undisturbed / "table.json").read_text())
    assert [row["symbol"] for row in table["rows"]] == ["S00", "S01", "S02"] and table["book"]["symbols"] == 3
    for row in table["rows"]:  # the script's own scores of the validation split
        told = runs[row["shard"]].json["symbols"][row["symbol"]]
        assert row["val"] == told and undisturbed / row["run_dir"] == runs[row["shard"]].folder
    assert not any(map(iterations, undisturbed.glob("*-of-2__*")))


def test_a_killed_worker_loses_only_what_followed_its_last_checkpoint(undisturbed, tmp_path):
    process = start_real(out := tmp_path / "out", "--workers", "2")
    first = wait_for(lambda: next(out.glob("*__0-of-2__*/*/model.pt"), None), seconds=300)
    os.kill(int((first.parents[1] / "pid").read_text()), signal.SIGKILL)
    printed = finish_real(process)
    assert "2 of 2 shards finished" in printed
    found, expected = real_runs(out), real_runs(undisturbed)
    for shard, run in expected.items():
        assert_same_run(found[shard], run)
        assert_same_ledger(*(pd.read_parquet(r.folder / "symbols.parquet") for r in (found[shard], run)))
    (resumed,) = iterations(first.parents[1])
    assert resumed % 3 == 0 and 3 <= resumed < 20
    assert json.loads((out / "table.json").read_text()) == json.loads((undisturbed / "table.json").read_text()) | {
        "rows": [
            row | {"run_dir": str(found[row["shard"]].folder.relative_to(out))}
            for row in json.loads((undisturbed / "table.json").read_text())["rows"]
        ]
    }


# --- a script that pretends


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Prices of five symbols, the last one listed late, and what each shard of theirs leaves, which trades at random."""
    root, rng = tmp_path_factory.mktemp("template"), np.random.default_rng(0)
    days = pd.bdate_range("2020-01-01", periods=500, name="date")
    closes = pd.DataFrame(50 * np.exp(np.cumsum(0.02 * rng.standard_normal((500, 5)), axis=0)), index=days, columns=NAMES)
    closes.iloc[:LISTED, 4] = np.nan
    closes.to_csv(root / PRICES)
    panel = load_market(str(root / PRICES))
    splits = panel.split(0.4, 0.3, 5)
    for number in (1, 2, 3, 5):
        for index in range(number):
            data = TradingData(panel, symbols=shard_of(NAMES, f"{index}/{number}"))
            noise = np.random.default_rng([number, index]).standard_normal(panel.close.shape)
            frames = {
                name: trading_references.run(data, split, trading_references.thresholds(data, split, noise, -1.0, 1.0))
                for name, split in splits.items()
                if name != "train"
            }
            books = {name: ledger.book(frame) for name, frame in frames.items()}
            folder = root / f"{index}-of-{number}"
            folder.mkdir()
            ledger.write_ledger(folder / "symbols.parquet", pd.concat(frames.values(), ignore_index=True))
            ledger.write_ledger(folder / "ledger.parquet", pd.concat(books.values(), ignore_index=True))
            run = {"env_id": "Trading-v0", "panel": ledger.describe_panel(panel, splits), "market": data.describe()}
            run["scores"] = {"test": {"agent": {"bars": len(books["test"])}}}
            ledger.write_json(folder / "run.json", run)
    return root


class Launcher:
    """The command on the fake script, in this process or in one of its own."""

    def __init__(self, home: Path, template: Path):
        self.home, self.out, self.prices = home, home / "out", home / PRICES
        for name in ("starts", "hangs"):
            (home / name).mkdir()
        (home / "template").symlink_to(template)
        self.prices.write_bytes((template / PRICES).read_bytes())
        (home / "fake.py").write_text(FAKE)
        self.goes_wrong()

    def goes_wrong(self, modes: dict[str, list[str]] | None = None):
        (self.home / "modes.json").write_text(json.dumps(modes or {}))

    def options(self, *options: str) -> list[str]:
        own = options or ("--shards", "2")
        workers = () if "--ray" in own else ("--workers", "2")
        return ["--script", str(self.home / "fake.py"), "--out", str(self.out), *workers, *own]

    @property
    def arguments(self) -> list[str]:
        return ["--market", str(self.prices)]

    def __call__(self, *options: str, arguments: tuple[str, ...] = ()) -> int:
        return launch.main(tyro.cli(launch.Args, args=self.options(*options)), [*self.arguments, *arguments])

    def start(self, *options: str) -> subprocess.Popen:
        return start([*COMMAND, *self.options(*options), "--", *self.arguments])

    def starts(self, shard: str) -> list[str]:
        path = self.home / "starts" / shard.replace("/", "-of-")
        return path.read_text().splitlines() if path.exists() else []

    def hanging(self, number: int) -> list[int]:
        """Processes that hang half-way, once there are so many."""
        wait_for(lambda: len(list((self.home / "hangs").iterdir())) >= number)
        return [int(path.name) for path in (self.home / "hangs").iterdir()]

    @property
    def table(self) -> dict:
        return json.loads((self.out / "table.json").read_text())

    def table_but_run_dirs(self) -> dict:
        table = self.table
        return table | {"rows": [{k: v for k, v in row.items() if k != "run_dir"} for row in table["rows"]]}

    def folder(self, shard: str) -> Path:
        (found,) = self.out.glob(f"fake__{shard.replace('/', '-of-')}__*")
        return found


@pytest.fixture
def fake(tmp_path, template, monkeypatch) -> Iterator[Launcher]:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    (tmp_path / "home").mkdir()
    yield Launcher(tmp_path / "home", template)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_shard_for_every_symbol(fake):
    assert fake("--per-symbol", "--retries", "0") == 0
    rows = fake.table["rows"]
    assert [(row["symbol"], row["shard"]) for row in rows] == [(name, f"{k}/5") for k, name in enumerate(NAMES)]
    assert len({row["run_dir"] for row in rows}) == 5 and all((fake.out / row["run_dir"] / "run.json").exists() for row in rows)
    assert not (fake.home / "x.csv").exists() and all(row["failure"] is None for row in rows)


def test_what_reaches_the_script(fake, capsys):
    """What the fake leaves is of all symbols and another seed: nothing that the launcher would take."""
    given = ("--seed=7", "--exp_name", "mine", "--symbols", "A", "B", "C")
    assert fake("--shards", "2", "--threads", "3", "--retries", "0", arguments=given) == 1
    for shard in ("0/2", "1/2"):
        args = json.loads(next(fake.folder(shard).glob("*/run.json")).read_text())["args"]
        assert (args["shard"], args["seed"], args["exp_name"], args["num_threads"]) == (shard, 7, "mine", 3)
        assert args["symbols"] == ["A", "B", "C"] and args["runs_dir"] == str(fake.folder(shard))
        record = json.loads((fake.folder(shard) / "job.json").read_text())
        assert record["attempts"] == 1 and record["job"]["symbols"] == list(shard_of("ABC", shard))
    assert "2 shards of 3 symbols" in capsys.readouterr().out


def test_the_panel_is_the_one_that_the_script_loads(fake):
    """By the script's arguments, in every form that it takes them; else by its defaults."""
    flags = launch.flags_of(fake.home / "fake.py", [])
    told = {"spec": "prices.csv", "seed": 1, "symbols": None, "start": None, "end": None, "resample": None}
    assert launch.market_flags([], flags) == launch.market_flags(["--symbols", "--exp-name", "x"], flags) == told
    given = [
        "--symbols",
        "B",
        "A",
        "--start=2020-02",
        "--num",
        "3",
        "--end",
        "2021",
        "--resample",
        "1W",
        "--seed=4",
        "--market=b",
    ]
    told = {"spec": "b", "seed": 4, "symbols": ["B", "A"], "start": "2020-02", "end": "2021", "resample": "1W"}
    assert launch.market_flags(given, flags) == told
    args = tyro.cli(launch.Args, args=fake.options("--per-symbol"))
    jobs, panel = launch.plan(args, [*fake.arguments, "--symbols", "B", "A", "--start", "2020-02", "--resample", "1W"])
    expected = load_market(str(fake.prices), symbols=["B", "A"], start="2020-02", resample="1W")
    assert panel.sha256 == expected.sha256 == jobs[1].panel and [job.symbols for job in jobs] == [("B",), ("A",)]


def test_the_table_is_what_the_ledgers_say(fake):
    """Of the test split too, and the book by hand: the mean of the accounts' equity, each cash before its first bar."""
    assert fake("--shards", "3") == 0
    table, per_year = fake.table, load_market(str(fake.prices)).bars_per_year
    frames = [pd.read_parquet(path) for path in fake.out.glob("*/*/symbols.parquet")]
    whole = pd.concat(frames, ignore_index=True)
    assert table["bars_per_year"] == per_year and table["shards"] == 3
    for row in table["rows"]:
        for split in ("val", "test"):
            part = whole[(whole["split"] == split) & (whole["symbol"] == row["symbol"])]
            net, returns = part["net_return"].to_numpy(), trades.trades(part)["return"].to_numpy()
            path = np.append(1.0, part["equity"])
            lost = -returns[returns < 0].sum()
            expected = {
                "sharpe": net.mean() / net.std(ddof=1) * np.sqrt(per_year), "trades": len(returns),
                "max_drawdown": (path / np.maximum.accumulate(path) - 1).min(), "win_rate": (returns > 0).mean(),
                "profit_factor": returns[returns > 0].sum() / lost,
            }  # fmt: skip
            assert (
                len(returns) > 3
                and expected.items() <= row[split].items()
                or all(row[split][key] == pytest.approx(value, rel=1e-12) for key, value in expected.items())
            )
        scores = ledger.summarise(part, per_year)
        assert (row["test"]["sharpe_low"], row["test"]["sharpe_high"]) == (scores["sharpe_low"], scores["sharpe_high"])
        assert "sharpe_low" not in row["val"]
    assert table["book"]["symbols"] == 5
    for split in ("val", "test"):
        part = whole[whole["split"] == split]
        equity = part.pivot(index="timestamp", columns="symbol", values="equity").ffill().fillna(1.0).mean(axis=1).to_numpy()
        net, scores = equity / np.append(1.0, equity[:-1]) - 1, table["book"][split]
        path = np.append(1.0, equity)
        assert scores["bars"] == len(equity)
        assert scores["sharpe"] == pytest.approx(net.mean() / net.std(ddof=1) * np.sqrt(per_year), rel=1e-9)
        assert scores["growth"] == pytest.approx(np.log1p(net).mean() * per_year, rel=1e-9)
        assert scores["max_drawdown"] == pytest.approx((path / np.maximum.accumulate(path) - 1).min(), rel=1e-9)
    assert table["book"]["test"]["sharpe_low"] < table["book"]["test"]["sharpe"] < table["book"]["test"]["sharpe_high"]


def test_the_table_for_people(fake, capsys):
    fake.goes_wrong({"1/3": ["crash"]})
    assert fake("--shards", "3", "--retries", "0") == 1
    text, table = (fake.out / "table.md").read_text(), fake.table
    lines = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    head, rows = lines[0], {line[0].removeprefix("| "): line for line in lines[2:7]}
    assert list(rows) == list(NAMES) and all(len(row) == len(head) for row in rows.values())
    for row in table["rows"]:
        cells = dict(zip(head, rows[row["symbol"]]))
        assert cells["shard"] == row["shard"] and row["run_dir"] in cells["run |"]
        if row["shard"] == "1/3":
            assert "FAILED: exit code 1: ValueError: on purpose in 1/3" in cells["run |"] and row["val"] is row["test"] is None
            assert cells["val Sharpe"] == cells["test Sharpe"] == cells["95% interval"] == cells["test trades"] == "-"
            continue
        for split in ("val", "test"):
            s = row[split]
            told = (f"{s['sharpe']:.2f}", f"{s['max_drawdown']:.1%}", str(s["trades"]), f"{s['win_rate']:.1%}")
            names = ("Sharpe", "drawdown", "trades", "win rate")
            assert tuple(cells[f"{split} {name}"] for name in names) == told
            assert cells[f"{split} profit factor"] == f"{s['profit_factor']:.2f}"
        assert cells["95% interval"] == f"[{row['test']['sharpe_low']:.2f}, {row['test']['sharpe_high']:.2f}]"
    assert (
        "3 of 5 symbols" in text and f"| test | {table['book']['test']['bars']} | {table['book']['test']['sharpe']:.2f}" in text
    )
    printed = capsys.readouterr().out
    assert "2 of 3 shards finished" in printed and "| test |" in printed


def test_a_crashing_shard_is_recorded_and_costs_no_other(fake, capsys):
    fake.goes_wrong({"0/2": ["crash"]})
    assert fake("--shards", "2", "--retries", "1") == 1
    assert fake.starts("0/2") == ["start"] * 2 and fake.starts("1/2") == ["start"]
    failed = [row for row in fake.table["rows"] if row["failure"]]
    assert [row["symbol"] for row in failed] == ["A", "C", "E"] and fake.table["book"]["symbols"] == 2
    (path,) = fake.folder("0/2").glob("*/run.json")
    run = json.loads(path.read_text())
    assert run["status"] == "failed" and "on purpose in 0/2" in run["failure"] and run["args"]["shard"] == "0/2"
    assert "Traceback" in (path.parent / "log.txt").read_text() and "on purpose in 0/2" in capsys.readouterr().out
    assert fake.folder("0/2").name == failed[0]["run_dir"]
    fake.goes_wrong()
    assert fake() == 0 and fake.starts("1/2") == ["start"], "the one that had finished was run again"
    assert fake.starts("0/2") == ["start"] * 3 and not any(row["failure"] for row in fake.table["rows"])


def test_nothing_finished(fake):
    fake.goes_wrong({f"{k}/2": ["crash"] for k in range(2)})
    assert fake("--shards", "2", "--retries", "0") == 1
    assert fake.table["book"] is None and "No shard has finished." in (fake.out / "table.md").read_text()


@pytest.mark.parametrize(
    "mode, said", [("other prices", "trained on other prices"), ("no symbols", "symbols.parquet cannot be read")]
)
def test_a_run_that_the_table_cannot_use_has_failed(fake, mode, said):
    fake.goes_wrong({"1/2": [mode]})
    assert fake("--shards", "2", "--retries", "0") == 1
    (failure,) = {row["failure"] for row in fake.table["rows"] if row["shard"] == "1/2"}
    assert said in failure and fake.table["book"]["symbols"] == 3
    fake.goes_wrong()
    assert fake() == 0


def test_kills_from_outside_never_cost_a_checkpoint(fake):
    """Killed again before the next one, and again: it still goes on from there; a crash there begins afresh."""
    fake.goes_wrong({"0/2": ["killed", "killed", "killed", "fine"], "1/2": ["late", "late", "fine"]})
    assert fake() == 0
    assert fake.starts("0/2") == ["start", *["resume 4"] * 3]
    assert fake.starts("1/2") == ["start", "resume 4", "start"]
    assert "ended by SIGKILL" not in (fake.out / "table.md").read_text()


def test_a_kill_that_no_try_survives_is_named_and_gone_on_with(fake):
    fake.goes_wrong({"0/2": ["killed"]})
    assert fake("--shards", "2", "--retries", "1") == 1
    assert {row["failure"] for row in fake.table["rows"] if row["failure"]} == {"ended by SIGKILL: 0/2: killed"}
    fake.goes_wrong()
    assert fake() == 0 and fake.starts("0/2") == ["start", "resume 4", "resume 4"]


def test_a_killed_launcher_goes_on(fake):
    """kill -9: the second start ends its orphans, skips what had finished, and goes on with the rest."""
    assert fake("--shards", "3") == 0
    expected, fake.out = fake.table_but_run_dirs(), fake.home / "again"
    before = {shard: len(fake.starts(shard)) for shard in ("0/3", "1/3", "2/3")}
    fake.goes_wrong({"0/3": ["fine"], "1/3": ["fine", "hang", "fine"], "2/3": ["fine", "hang", "fine"]})
    process = fake.start("--shards", "3")
    orphans = fake.hanging(2)
    process.kill()
    process.communicate()
    assert all(map(alive, orphans)) and not (fake.out / "table.md").exists()
    again = fake.start("--shards", "3")
    printed, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and printed.count("skipped, finished before") == 1, printed
    assert not any(map(alive, orphans)) and fake.table_but_run_dirs() == expected
    assert {shard: fake.starts(shard)[n:] for shard, n in before.items()} == {
        "0/3": ["start"], "1/3": ["start", "resume 4"], "2/3": ["start", "resume 4"]
    }  # fmt: skip


def test_a_request_to_end_ends_all_and_the_same_command_goes_on(fake):
    fake.goes_wrong({"0/3": ["hang", "fine"], "1/3": ["hang", "fine"]})
    process = fake.start("--shards", "3")
    workers = fake.hanging(2)
    with pytest.raises(SystemExit, match=f"--out .*out: process {process.pid} runs there"):
        fake("--shards", "3")
    process.terminate()
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in printed and "Traceback" not in printed, printed
    assert not any(map(alive, workers)) and fake.starts("2/3") == [] and not (fake.out / "table.md").exists()
    assert fake("--shards", "3") == 0 and fake.starts("0/3") == fake.starts("1/3") == ["start", "resume 4"]


def test_other_code_prices_or_arguments_are_trained_anew(fake):
    assert fake() == 0 and fake() == 0 and fake.starts("0/2") == ["start"]
    with (fake.home / "fake.py").open("a") as file:
        file.write("# changed\n")
    assert fake() == 0 and fake.starts("0/2") == ["start"] * 2
    text = fake.prices.read_text().splitlines()
    fake.prices.write_text("\n".join(text[:-1]) + "\n")
    assert fake("--shards", "2", "--retries", "0") == 1, "the fake's panel is the old one"
    assert fake.starts("0/2") == ["start"] * 3 and {row["failure"] is None for row in fake.table["rows"]} == {False}
    fake.prices.write_text("\n".join(text) + "\n")
    assert fake("--shards", "2", arguments=("--seed", "3")) == 0 and len(list(fake.out.glob("fake__0-of-2__*"))) == 2


@pytest.mark.parametrize("bound", [True, False])
def test_a_bound_process_ends_with_the_one_that_started_it(tmp_path, bound):
    code = "import sys, jobs, pathlib\n"
    code += f"limits = jobs.Limits(0, 60.0, 1, '.', bound={bound})\n"
    code += (
        "jobs.run_process([sys.executable, '-c', 'import time; time.sleep(600)'], pathlib.Path(sys.argv[1]), limits, bool)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmark")))}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env)
    script = int(wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    process.kill()
    process.wait()
    if bound:
        wait_for(lambda: not alive(script))
    else:
        assert alive(script)
        os.kill(script, signal.SIGKILL)


# --- what is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ((), ("--shards 0", "either a number of shards or --per-symbol")),
        (("--shards", "2", "--per-symbol"), ("--shards 2", "either")),
        (("--shards", "-1"), ("--shards -1", "0 or more")),
        (("--shards", "2", "--workers", "-1"), ("--workers -1", "0 or more")),
        (("--shards", "2", "--threads", "-1"), ("--threads -1", "0 or more")),
        (("--shards", "2", "--retries", "-1"), ("--retries -1", "0 or more")),
        (("--shards", "2", "--timeout", "nan"), ("--timeout nan", "0 or more")),
        (("--shards", "2", "--address", "auto"), ("--address auto", "only with --ray")),
        (("--shards", "2", "--gpus", "1"), ("--gpus 1", "only with --ray")),
        (("--shards", "2", "--ray", "--workers", "2"), ("--workers 2", "only without --ray")),
        (("--shards", "2", "--script", "no.py"), ("--script no.py", "no such file")),
    ],
)
def test_bad_options_are_named(fake, options, words):
    script = () if "--script" in options else ("--script", str(fake.home / "fake.py"))
    with pytest.raises(SystemExit) as caught:
        tyro.cli(launch.Args, args=[*script, "--out", str(fake.out), *options])
    assert all(word in caught.value.code for word in words) and len(caught.value.code.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--shard", "0/2"), ("--shard: is set for each shard",)),
        (("--runs-dir=x",), ("--runs-dir: is set",)),
        (("--num_threads", "1"), ("--num-threads: is set",)),
        (("--sede", "3"), ("--sede: fake.py has no such flag",)),
        (("--market", "nowhere.csv"), ("nowhere.csv",)),
        (("--symbols", "A", "nope"), ("nope",)),
        (("--symbols", "A"), ("--shards 2: expected at most 1, the symbols of",)),
        (("--seed", "x"), ("--seed", "x")),
    ],
)
def test_bad_arguments_of_the_script_are_named_before_anything_starts(fake, arguments, words):
    with pytest.raises(SystemExit) as caught:
        fake("--shards", "2", arguments=arguments)
    assert all(word in str(caught.value.code) for word in words) and len(caught.value.code.splitlines()) == 1
    assert not fake.out.exists() and not list((fake.home / "starts").iterdir())


def test_a_script_without_shards_is_refused(fake):
    text = FAKE.replace('    shard: str = "0/1"\n    """which symbols"""\n', "")
    (fake.home / "fake.py").write_text(text)
    with pytest.raises(SystemExit, match="--script .*fake.py: has no --shard; expected one that has"):
        fake()


# --- a cluster


def test_a_cluster_trains_the_same_shards(fake, monkeypatch):
    assert fake("--shards", "3") == 0
    expected, fake.out = fake.table_but_run_dirs(), fake.home / "again"
    monkeypatch.setitem(sys.modules, "ray", ray := FakeRay())
    bound, run_process = [], jobs.run_process

    def spy(command, folder, limits, stopping):
        bound.append(limits.bound)
        return run_process(command, folder, limits, stopping)

    monkeypatch.setattr(jobs, "run_process", spy)
    fake.goes_wrong({"1/3": ["fine", "killed", "fine"]})
    options = ("--shards", "3", "--ray", "--address", "ray://head:10001", "--threads", "2", "--gpus", "0.5", "--retries", "2")
    assert fake(*options) == 0 and fake.table_but_run_dirs() == expected
    (_, init), (_, remote), (last, _) = ray.calls
    assert init["address"] == "ray://head:10001" and last == "shutdown"
    path = init["runtime_env"]["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert path[:2] == [str(ROOT), str(ROOT / "benchmark")]
    assert remote == {"num_cpus": 2, "num_gpus": 0.5, "max_retries": 2}
    assert fake.starts("1/3") == ["start", "start", "resume 4"] and bound == [True] * 4
    assert tyro.cli(launch.Args, args=fake.options("--shards", "3", "--ray")).threads == 1


def test_ray_is_optional(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="--ray: Ray is not installed; expected pip install ray, or no --ray"):
        fake("--shards", "2", "--ray")


def test_a_worker_of_a_real_cluster_is_killed(fake):
    """Ray starts the task again, which goes on from the checkpoint; the script of the killed worker does not outlive it."""
    pytest.importorskip("ray")
    fake.goes_wrong({"0/2": ["hang", "fine"], "1/2": ["fine"]})
    process = fake.start("--shards", "2", "--ray")
    wait_for(lambda: list((fake.home / "hangs").iterdir()), seconds=120)
    (script,) = fake.hanging(1)
    worker = int(Path(f"/proc/{script}/stat").read_text().rpartition(")")[2].split()[1])
    assert "ray" in Path(f"/proc/{worker}/cmdline").read_text() and worker != process.pid
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(script))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert fake.starts("0/2") == ["start", "resume 4"] and fake.starts("1/2") == ["start"]
    assert not any(row["failure"] for row in fake.table["rows"]) and fake.table["book"]["symbols"] == 5
