"""The scoreboard: what may be ranked together, what is shown of what failed, and that its numbers are those of the ledgers."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import metrics
import numpy as np
import pandas as pd
import pytest
import rundirs
import scoreboard as board
from conftest import ROOT, run_python

from envs import ledger
from envs.costs import RECORD, Costs

SCRIPT = ROOT / "benchmark" / "scoreboard.py"
BARS, PER_YEAR = 200, 252.0
EVIL = '<img src=x onerror="window.pwned=1">|`</script><script>window.pwned=1</script>'


def make_ledger(seed: int, mean: float = 0.0005, markets: int = 1, bars: int = BARS) -> pd.DataFrame:
    """Test split of `markets` histories and a little of a training split, as ledger.backtest leaves them."""
    rng, parts = np.random.default_rng(seed), []
    for split, number in (("train", 1), ("test", markets)):
        for market in range(number):
            frame = pd.DataFrame(np.zeros((bars, len(RECORD))), columns=list(RECORD))
            frame["commission"] = 1e-5
            frame["gross_return"] = mean + 0.01 * rng.standard_normal(bars)
            frame["net_return"] = frame["gross_return"] - frame["commission"]
            frame["turnover"] = rng.random(bars)
            frame["equity"] = np.cumprod(1.0 + frame["net_return"])
            frame.insert(0, "timestamp", pd.date_range("2020-01-02", periods=bars, freq="D", unit="ns"))
            frame.insert(0, "market", market)
            frame.insert(0, "split", split)
            parts.append(frame)
    return pd.concat(parts, ignore_index=True).assign(action=0)


def make_run(
    root: Path, name="ppo", seed=1, frame=None, market="prices.csv", sha=None, args=None, costs=None, **content
) -> Path:
    """A run directory as a script leaves it; `content` overrides run.json."""
    path = ledger.new_run_dir(str(root), "Portfolio-v0", "".join(c for c in name if c.isalnum() or c in "-_"), seed)
    frame = make_ledger(seed) if frame is None else frame
    end = frame.loc[frame["split"] == "test", "timestamp"].max()
    ledger.write_ledger(path / "ledger.parquet", frame)
    test = frame[frame["split"] == "test"]
    run = {
        "status": "finished", "env_id": "Portfolio-v0", "script_sha256": "s", "trials": 1, "failure": None,
        "args": {"exp_name": name, "seed": seed, "market": market, **(args or {})},
        "panel": {
            "name": market, "sha256": sha or ("a" * 64), "symbols": ["A"], "bars_per_year": PER_YEAR,
            "splits": {"test": {"start": "2020-01-01T00:00:00", "end": end.isoformat(), "bars": len(test)}},
        },
        "market": {"fill": "next_open", "costs": vars(Costs(**(costs or {})))},
        "scores": {"test": {"agent": {"bars": len(test)}}},
    } | content  # fmt: skip
    ledger.write_json(path / "run.json", run)
    return path


def change(path: Path, edit):
    content = json.loads((path / "run.json").read_text())
    edit(content)
    (path / "run.json").write_text(json.dumps(content))


def assemble(*roots, **options):
    return board.assemble(board.Args(runs=tuple(roots), resamples=options.pop("resamples", 50), replays=False, **options))


def command(*arguments):
    return run_python(str(SCRIPT), *map(str, arguments))


CHANGES = {
    "panel.sha256": lambda run: run["panel"].update(sha256="b" * 64),
    "panel.splits.test": lambda run: run["panel"]["splits"]["test"].update(start="2020-01-02T00:00:00"),
    "market.fill": lambda run: run["market"].update(fill="same_close"),
    "market.costs.half_spread_bps": lambda run: run["market"]["costs"].update(half_spread_bps=7.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_not_ranked_together(tmp_path, name):
    make_run(tmp_path, "ppo")
    other = make_run(tmp_path, "sac")
    assert len(assemble(tmp_path, strict=True)["groups"]) == 1
    before = rundirs.terms(rundirs.read(other))
    change(other, CHANGES[name])
    found = assemble(tmp_path)
    assert [[row["name"] for row in group["rows"]] for group in found["groups"]] in ([["ppo"], ["sac"]], [["sac"], ["ppo"]])
    assert name in found["banner"][0]
    after = rundirs.terms(rundirs.read(other))
    with pytest.raises(SystemExit) as refusal:
        assemble(tmp_path, strict=True)
    assert all(str(part) in str(refusal.value) for part in (name, before[name], after[name]))


def test_the_name_of_a_cost_model_does_not_part_runs(tmp_path):
    make_run(tmp_path, "ppo")
    make_run(tmp_path, "sac", costs={"name": "my own"})
    assert len(assemble(tmp_path)["groups"]) == 1


def test_seeds_of_a_synthetic_market_are_one_group(tmp_path):
    for seed in (1, 2):
        for name in ("ppo", "sac"):
            make_run(tmp_path, name, seed, market="synthetic:noise", sha=str(seed) * 64)
    found = assemble(tmp_path, strict=True)
    (group,) = found["groups"]
    assert [row["seeds"] for row in group["rows"]] == [2, 2]
    assert any("draws prices of its own" in line for line in group["warnings"])
    assert "seeds 1, 2 paired" in group["pairs"]["0,1"]["how"]
    # another specification, or other prices under the same seed, is another market
    make_run(tmp_path, "ppo", 1, market="synthetic:noise:bars=9", sha="1" * 64)
    make_run(tmp_path, "old", 2, market="synthetic:noise", sha="f" * 64)
    found = assemble(tmp_path)
    assert sorted(sorted(row["name"] for row in group["rows"]) for group in found["groups"]) == [
        ["old"],
        ["ppo"],
        ["ppo", "sac"],
    ]
    assert "panel.sha256 of seed 2" in found["banner"][0] and "panel.name" in found["banner"][0]


@pytest.mark.parametrize("market", ["shuffled:sp500", "bootstrap:block=20:prices.csv", "crossed:sp500"])
def test_seeds_of_a_market_made_of_another_are_one_group_for_the_same_symbols(tmp_path, market):
    for seed in (1, 2):
        make_run(tmp_path, "ppo", seed, market=market, sha=str(seed) * 64)
    (group,) = assemble(tmp_path, strict=True)["groups"]
    assert group["rows"][0]["seeds"] == 2
    assert any("draws prices of its own" in line for line in group["warnings"])
    make_run(tmp_path, "few", 3, market=market, sha="3" * 64, args={"symbols": ["A", "B"]})  # the name does not say so
    found = assemble(tmp_path)
    assert len(found["groups"]) == 2 and "args.symbols" in found["banner"][0]


def test_shards_of_a_panel_are_groups_of_their_own(tmp_path):
    for seed, shard in ((1, "0/2"), (2, "0/2"), (1, "1/2"), (3, "0/1")):
        make_run(tmp_path, "ppo", seed, args={"shard": shard})
    make_run(tmp_path, "other", 1)  # a script that always trades all
    found = assemble(tmp_path)
    names = sorted((row["name"], row["seeds"]) for group in found["groups"] for row in group["rows"])
    assert len(found["groups"]) == 3 and "args.shard" in found["banner"][0]
    assert names == [("other", 1), ("ppo", 1), ("ppo", 1), ("ppo", 2)]


def test_configurations_of_one_script_are_rows_of_their_own(tmp_path):
    make_run(tmp_path, "ppo", args={"portfolio": {"scale": 0.5, "costs": "x"}, "runs_dir": "here"})
    make_run(tmp_path, "ppo", args={"portfolio": {"scale": 1.0, "costs": "y"}, "runs_dir": "there"})
    make_run(tmp_path, "ppo", 2, args={"portfolio": {"scale": 1.0, "costs": "z"}, "runs_dir": "there"})
    (group,) = assemble(tmp_path)["groups"]
    assert {row["name"]: row["seeds"] for row in group["rows"]} == {"ppo [scale=0.5]": 1, "ppo [scale=1]": 2}
    assert any("different seeds" in line for line in group["warnings"])
    assert group["configurations"] == 2


def test_the_latest_of_a_repeated_run_counts(tmp_path):
    make_run(tmp_path, frame=make_ledger(1))
    make_run(tmp_path, frame=make_ledger(5))  # its directory gets a later second
    (group,) = assemble(tmp_path)["groups"]
    expected = ledger.summarise(test_part(make_ledger(5)), PER_YEAR, resamples=0)
    assert group["rows"][0]["sharpe"]["value"] == pytest.approx(expected["sharpe"])
    assert group["trials"] == 2 and any("1 older run" in line for line in group["warnings"])


def test_part(frame):
    return frame[frame["split"] == "test"].reset_index(drop=True)


test_part.__test__ = False


def broken(name):
    """name -> (change of a run directory, part of the reason that must be given)."""

    def edit_ledger(edit):
        def do(path):
            frame = pd.read_parquet(path / "ledger.parquet")
            ledger.write_ledger(path / "ledger.parquet", edit(frame))

        return do

    def cut_file(path):
        content = (path / "ledger.parquet").read_bytes()
        (path / "ledger.parquet").write_bytes(content[: len(content) // 2])

    def put(column, value):
        return edit_ledger(lambda f: f.assign(**{column: np.where(f.index == len(f) - 5, value, f[column])}))

    def no_bars(path):
        change(path, lambda run: run.pop("scores"))
        edit_ledger(lambda f: f.iloc[:-7])(path)

    return {
        "failed": (lambda p: change(p, lambda r: r.update(status="failed", failure="loss is NaN")), "loss is NaN"),
        "running": (lambda p: change(p, lambda r: r.update(status="running")), "never finished"),
        "odd status": (lambda p: change(p, lambda r: r.update(status=["?"])), "status ['?']"),
        "no run.json": (lambda p: (p / "run.json").unlink(), "no run.json"),
        "half a run.json": (lambda p: (p / "run.json").write_text('{"status": "fin'), "run.json cannot be read"),
        "a list": (lambda p: (p / "run.json").write_text("[]"), "run.json is no object"),
        "no seed": (lambda p: change(p, lambda r: r["args"].pop("seed")), "args.seed"),
        "no costs": (lambda p: change(p, lambda r: r["market"].pop("costs")), "does not describe its market"),
        "no ledger": (lambda p: (p / "ledger.parquet").unlink(), "no ledger.parquet"),
        "half a ledger": (cut_file, "cannot be read"),
        "no test split": (edit_ledger(lambda f: f[f["split"] == "train"]), "no bar of the test split"),
        "bars missing": (edit_ledger(lambda f: f.iloc[:-7]), "truncated"),
        "bars missing, no scores": (no_bars, "truncated"),
        "a bar missing inside": (edit_ledger(lambda f: f.drop(index=len(f) - 9)), "truncated"),
        "NaN": (put("net_return", np.nan), "net_return is not finite"),
        "infinity": (put("turnover", np.inf), "turnover is not finite"),
        "a better return": (put("net_return", 0.5), "does not follow"),
        "time going back": (
            edit_ledger(lambda f: f.iloc[[*range(BARS + 90), BARS + 91, BARS + 90, *range(BARS + 92, 2 * BARS)]]),
            "do not increase",
        ),
        "a bar twice": (
            edit_ledger(lambda f: f.assign(timestamp=f["timestamp"].where(f.index != BARS + 90, f["timestamp"].shift()))),
            "do not increase",
        ),
        "no column": (edit_ledger(lambda f: f.drop(columns="turnover")), "cannot be read"),
    }[name]  # fmt: skip


BROKEN = (
    "failed", "running", "odd status", "no run.json", "half a run.json", "a list", "no seed", "no costs", "no ledger",
    "half a ledger", "no test split", "bars missing", "bars missing, no scores", "a bar missing inside", "NaN", "infinity",
    "a better return", "time going back", "a bar twice", "no column",
)  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_a_red_row_with_its_reason(tmp_path, name):
    make_run(tmp_path, "ppo")
    path = make_run(tmp_path, "sac")
    (path / "log.txt").write_text("".join(f"line {k}\r\n\n" for k in range(99)))
    edit, reason = broken(name)
    edit(path)
    found = assemble(tmp_path)
    assert [row["name"] for row in found["groups"][0]["rows"]] == ["ppo"] and len(found["groups"]) == 1
    (row,) = found["groups"][0]["failed"] + found["unplaced"]
    assert reason in row["reason"] and row["path"] == str(path)
    assert row["log"].splitlines() == [f"line {k}" for k in range(74, 99)]
    assert "1 of 2 runs failed" in found["banner"][0]
    text = board.markdown(found)
    assert f"**failed**: {board._safe(row['reason'])}" in text
    if name in ("failed", "running", "no ledger", "NaN", "bars missing"):  # known where it belongs: it counts there as a trial
        assert found["groups"][0]["failed"] and found["groups"][0]["trials"] == 2


def test_a_job_that_left_no_run_directory_is_shown(tmp_path):
    make_run(tmp_path / "a", "ppo")
    (tmp_path / "a" / "job.json").write_text("{}")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "job.json").write_text("{}")
    found = assemble(tmp_path / "a", tmp_path / "b", tmp_path / "b", tmp_path / "c")
    assert [(row["name"], row["reason"]) for row in found["unplaced"]] == [
        ("b", "it has no run.json"),
        ("c", "no such directory"),
    ]


def test_gymnasium_tasks_are_no_failures(tmp_path):
    path = make_run(tmp_path, "ppo", last_100_returns=490.0, env_steps=500_000)
    change(path, lambda run: [run.pop("panel"), run.pop("market"), run.update(env_id="CartPole-v1")])
    (path / "ledger.parquet").unlink()
    found = assemble(tmp_path)
    assert not found["unplaced"] and not found["groups"]
    assert found["tasks"] == [{"name": "ppo", "env_id": "CartPole-v1", "seeds": "1", "score": "490 ± 0", "steps": "500,000"}]


def test_numbers_are_those_of_the_ledgers(tmp_path):
    frames = {("ppo", s): make_ledger(s, 0.001) for s in (1, 2, 3)} | {("baseline-equal-weight", 1): make_ledger(9)}
    for (name, seed), frame in frames.items():
        make_run(tmp_path, name, seed, frame)
    (group,) = assemble(tmp_path, resamples=300)["groups"]
    assert [row["name"] for row in group["rows"]] == ["ppo", "baseline-equal-weight"]
    for row in group["rows"]:
        parts = [test_part(frame) for (name, _), frame in frames.items() if name == row["name"]]
        scores = [ledger.summarise(part, PER_YEAR, resamples=0) for part in parts]
        for key in ("sharpe", "growth", "turnover", "cost"):
            cell = row[key]
            assert cell["value"] == pytest.approx(np.mean([s[key] for s in scores]), rel=1e-9), key
            assert cell["low"] <= cell["value"] <= cell["high"] and cell["low"] < cell["high"] or key == "cost"
        assert row["max_drawdown"] == pytest.approx(np.mean([s["max_drawdown"] for s in scores]))
        assert row["reference"] == (row["name"] == "baseline-equal-weight")
    # the interval of a mean of independent bars is close to the one of theory
    growth = ledger.growth(test_part(frames["baseline-equal-weight", 1]))
    half = 1.96 * growth.std(ddof=1) / np.sqrt(BARS) * PER_YEAR
    cell = group["rows"][1]["growth"]
    assert (cell["high"] - cell["low"]) / 2 == pytest.approx(half, rel=0.3)


def test_differences_are_paired(tmp_path):
    """A strategy that earns 1 bp more in every bar is better beyond doubt, although both intervals overlap."""
    base = make_ledger(4)
    better = base.assign(net_return=base["net_return"] + 1e-4)
    better["equity"] = better.groupby(["split", "market"])["net_return"].transform(lambda r: (1 + r).cumprod())
    for name, frame in (("base", base), ("better", better)):
        make_run(tmp_path, name, frame=frame)
    (group,) = assemble(tmp_path)["groups"]
    assert [row["name"] for row in group["rows"]] == ["better", "base"]
    assert group["rows"][0]["growth"]["low"] < group["rows"][1]["growth"]["high"]
    scores = {score["key"]: score for score in group["pairs"]["0,1"]["scores"]}
    assert scores["growth"]["difference"] == pytest.approx(1e-4 * PER_YEAR, rel=0.02)
    assert 0.9e-4 * PER_YEAR < scores["growth"]["low"] <= scores["growth"]["high"] < 1.1e-4 * PER_YEAR
    assert scores["sharpe"]["low"] > 0


def test_pairs_use_the_seeds_that_both_have(tmp_path):
    """On synthetic markets only those are the same prices; the same inputs give the same draws."""
    frames = {
        (name, seed): make_ledger(10 * seed + len(name)) for name, seed in (("ppo", 1), ("ppo", 2), ("sac2", 2), ("dqn22", 3))
    }
    for (name, seed), frame in frames.items():
        make_run(tmp_path, name, seed, frame, market="synthetic:noise", sha=str(seed) * 64)
    (group,) = assemble(tmp_path)["groups"]
    order = [row["name"] for row in group["rows"]]
    i, j = sorted((order.index("ppo"), order.index("sac2")))
    pair = {score["key"]: score for score in group["pairs"][f"{i},{j}"]["scores"]}
    growth = {key: ledger.growth(test_part(frame)).mean() * PER_YEAR for key, frame in frames.items()}
    gap = (growth["ppo", 2] - growth["sac2", 2]) * (1 if order[i] == "ppo" else -1)
    assert pair["growth"]["difference"] == pytest.approx(gap)
    i, j = sorted((order.index("ppo"), order.index("dqn22")))
    assert "No seed in common" in group["pairs"][f"{i},{j}"]["note"]
    assert json.dumps(assemble(tmp_path)["groups"]) == json.dumps(assemble(tmp_path)["groups"])


def test_intervals_know_of_the_seeds(tmp_path):
    """Seeds that each earn the same in every bar differ from each other alone: without drawing seeds there is no interval."""
    for seed, mean in enumerate((0.0, 1e-3, 2e-3, 3e-3), 1):
        frame = make_ledger(7)
        frame["net_return"] += mean
        frame["equity"] = frame.groupby(["split", "market"])["net_return"].transform(lambda r: (1 + r).cumprod())
        make_run(tmp_path, seed=seed, frame=frame)
    make_run(tmp_path, "alone", frame=make_ledger(7))
    (group,) = assemble(tmp_path, resamples=400)["groups"]
    ppo, alone = ({**row["growth"]} for row in sorted(group["rows"], key=lambda row: -row["seeds"]))
    time, both = alone["high"] - alone["low"], ppo["high"] - ppo["low"]
    seeds = 3.92 * np.std([0.0, 1e-3, 2e-3, 3e-3]) / 2 * PER_YEAR
    assert both == pytest.approx(np.hypot(time, seeds), rel=0.25) and both > 1.1 * time


def test_many_markets_are_drawn_whole(tmp_path):
    frame = make_ledger(1, markets=12, bars=60)
    make_run(tmp_path, frame=frame)
    (group,) = assemble(tmp_path, resamples=400)["groups"]
    assert group["block"] is None and "12 markets drawn whole" in group["notes"][0]
    expected = ledger.summarise(test_part(frame), PER_YEAR, resamples=1000)
    cell = group["rows"][0]["sharpe"]
    assert cell["value"] == pytest.approx(expected["sharpe"])
    assert cell["high"] - cell["low"] == pytest.approx(expected["sharpe_high"] - expected["sharpe_low"], rel=0.25)


def test_rows_that_start_later_are_compared_on_common_bars(tmp_path):
    frame = make_ledger(1, markets=2)
    make_run(tmp_path, "early", frame=frame)
    late = frame[frame.groupby(["split", "market"]).cumcount() >= 50].reset_index(drop=True)
    late["equity"] = late.groupby(["split", "market"])["net_return"].transform(lambda r: (1 + r).cumprod())
    path = make_run(tmp_path, "late", frame=late)
    change(path, lambda run: run["panel"]["splits"]["test"].update(bars=400))
    (group,) = assemble(tmp_path)["groups"]
    early, later = group["rows"]
    for key in ("sharpe", "growth", "turnover", "cost", "max_drawdown"):
        assert early[key] == later[key] or early[key]["value"] == pytest.approx(later[key]["value"]), key
    assert any("from 300 to 400" in line for line in group["warnings"])


def fold_runs(root: Path, name="ppo", folds=3, seed=1, mean=0.0005, **content) -> list[Path]:
    """A run directory for each walk-forward fold, their test splits one after another."""
    paths = []
    for fold in range(folds):
        frame = make_ledger(10 * seed + fold, mean)
        frame["timestamp"] += pd.Timedelta(days=BARS * fold)
        args = {"folds": folds, "fold": fold, "runs_dir": f"job {fold}"}
        paths.append(make_run(root, name, seed, frame, args=args, **content))
        start = frame["timestamp"].min().isoformat()
        change(paths[-1], lambda run, start=start: run["panel"]["splits"]["test"].update(start=start))
    return paths


def test_walk_forward_folds_are_one_row(tmp_path):
    paths = fold_runs(tmp_path) + fold_runs(tmp_path, seed=2) + fold_runs(tmp_path, "sac", mean=-0.01)
    (group,) = assemble(tmp_path)["groups"]
    assert [(row["name"], row["seeds"]) for row in group["rows"]] == [("ppo", 2), ("sac", 1)]
    assert "3 walk-forward folds" in group["facts"] and f"{3 * BARS:,} bars a run" in group["facts"]
    assert "test split 2020-01-02 to " in group["facts"]
    expected = [np.concatenate([test_part(make_ledger(10 * seed + k))["net_return"] for k in range(3)]) for seed in (1, 2)]
    sharpe = np.mean([ledger.sharpe(x, PER_YEAR) for x in expected])
    assert group["rows"][0]["sharpe"]["value"] == pytest.approx(sharpe, rel=1e-9)
    assert len(group["manifests"]) == len(paths) and group["trials"] == 3
    # a fold that was run again: the latest counts; one that is missing: the others stay apart
    again = make_run(tmp_path, "sac", 1, make_ledger(77), args={"folds": 3, "fold": 0, "runs_dir": "again"})
    assert all(len(group["rows"]) <= 2 for group in assemble(tmp_path)["groups"])
    shutil.rmtree(again)
    shutil.rmtree(paths[-1])
    boards = assemble(tmp_path)["groups"]
    assert [[row["name"] for row in group["rows"]] for group in boards] == [["ppo"], ["sac"], ["sac"]]
    change(paths[1], lambda run: run.update(status="failed", failure="crash"))
    assert sum(len(group["failed"]) for group in assemble(tmp_path)["groups"]) + len(assemble(tmp_path)["unplaced"]) == 1


def test_curves_end_where_the_ledgers_end(tmp_path):
    frames = {seed: make_ledger(seed, bars=600) for seed in (1, 2, 3)}
    for seed, frame in frames.items():
        make_run(tmp_path, seed=seed, frame=frame)
    curve = assemble(tmp_path)["groups"][0]["curves"]["rows"]["ppo"]
    ends = [test_part(frame)["equity"].iloc[-1] for frame in frames.values()]
    assert curve["equity"][-1] == pytest.approx(np.median(ends), rel=1e-4)
    assert (curve["equity_low"][-1], curve["equity_high"][-1]) == pytest.approx((min(ends), max(ends)), rel=1e-4)
    assert len(curve["x"]) == 240 and curve["x"][-1] == pd.Timestamp(frames[1]["timestamp"].max()).value // 10**6
    assert max(curve["drawdown"]) <= 0


def test_cost_multiples_become_a_curve(tmp_path):
    for factor in (0.5, 1.0, 2.0):
        make_run(tmp_path, costs=vars(Costs().scaled(factor)) if factor != 1 else None)
    make_run(tmp_path, costs={"commission_bps": 3.0})  # not in proportion
    found = assemble(tmp_path)
    assert len(found["groups"]) == 4
    (curve,) = found["costs"]
    assert [p["multiple"] for p in curve["rows"]["ppo"]] == [0.5, 1.0, 2.0]


def test_learning_curves_are_read_from_events(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for seed in (1, 2):
        writer = SummaryWriter(make_run(tmp_path, seed=seed))
        for step in range(0, 101, 10):
            writer.add_scalar("charts/episodic_return", step * seed, step)
            writer.add_scalar("losses/value", 1.0, step)
        writer.close()
    learning = assemble(tmp_path)["groups"][0]["learning"]
    assert list(learning) == ["charts/episodic_return"]
    curve = learning["charts/episodic_return"]["ppo"]
    assert (curve["x"][-1], curve["low"][-1], curve["y"][-1], curve["high"][-1]) == (100, 100, 150, 200)


def test_compare_prints_differences(tmp_path, capsys):
    base = make_ledger(4)
    for name, seed in (("ppo", 1), ("ppo", 2), ("sac", 1)):
        make_run(tmp_path / name, name, seed, base if name == "sac" else make_ledger(seed, 0.002))

    def compare(*sides, runs=()):
        board.main(board.Args(runs=runs, compare=tuple(map(str, sides)), resamples=50))
        return capsys.readouterr().out

    expected = [
        ledger.growth(test_part(f)).mean() * PER_YEAR * 100 for f in (make_ledger(1, 0.002), make_ledger(2, 0.002), base)
    ]
    for out in (compare("ppo", "sac", runs=(tmp_path,)), compare(tmp_path / "ppo", tmp_path / "sac")):
        number = re.search(r"^growth +(\S+)% +(\S+)% +(\S+)% +\[(\S+)%, (\S+)%\]", out, re.M)
        ours, theirs, gap, low, high = map(float, number.groups())
        assert (ours, theirs) == pytest.approx((np.mean(expected[:2]), expected[2]), abs=0.06)
        assert gap == pytest.approx(ours - theirs, abs=0.15) and low < gap < high
        assert "stationary bootstrap" in out
    swapped = compare("sac", "ppo", runs=(tmp_path,))
    assert "first: A sac" in swapped and float(re.search(r"^growth +\S+ +\S+ +(\S+)%", swapped, re.M).group(1)) < 0
    assert not list(tmp_path.rglob("scoreboard.*"))
    with pytest.raises(SystemExit, match="nobody: no such row.*ppo, sac"):
        compare("ppo", "nobody", runs=(tmp_path,))
    with pytest.raises(SystemExit, match="several"):
        compare(tmp_path, tmp_path / "sac")
    change(next((tmp_path / "sac").glob("*")), CHANGES["market.fill"])
    with pytest.raises(SystemExit, match="market.fill: next_open and same_close"):
        compare(tmp_path / "ppo", tmp_path / "sac")


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory) -> Path:
    """A scoreboard written by the command, from runs whose every text tries to break out of it."""
    root = tmp_path_factory.mktemp("page")
    for seed in (1, 2):
        make_run(root / "runs", EVIL, seed, market=EVIL, frame=make_ledger(seed, 0.003), args={"note": EVIL})
        make_run(root / "runs", "baseline-equal-weight", seed, market=EVIL, frame=make_ledger(seed + 10))
    make_run(root / "runs", "sac", 1, market=EVIL, frame=make_ledger(20, 0.001))
    bad = make_run(root / "runs", "dqn" + EVIL, 1, market=EVIL, status="failed", failure=EVIL)
    (bad / "log.txt").write_text(EVIL + "\nthe end")
    make_run(root / "runs", "far", 1, costs={"commission_bps": 9})
    done = command(root / "runs", "--out", root / "out", "--resamples", "50")
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "out" / "scoreboard.html"


def test_page_holds_the_data_and_escapes_it(evil_page):
    html = evil_page.read_text()
    assert "<img" not in html and html.count("</script>") == 2 and "__DATA__" not in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1)
    written = json.loads((evil_page.parent / "scoreboard.json").read_text())
    assert json.loads(data) == written
    assert {row["name"] for row in written["groups"][0]["rows"]} == {EVIL, "baseline-equal-weight", "sac"}
    assert written["groups"][0]["failed"][0]["log"] == EVIL + "\nthe end"
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", html.replace(data, ""))  # opens offline
    text = (evil_page.parent / "scoreboard.md").read_text()
    assert "<img" not in text and "<script" not in text and "&lt;img" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table if "failed" not in line}
    assert len(widths) == 1, "a name broke a row of the table"


PROBE = """
<script>
const said = [], state = {};
const all = selector => [...document.querySelectorAll("#group-0 " + selector)];
const names = () => all("tbody tr[data-name]:not(.failed)").filter(r => !r.hidden).map(r => r.dataset.name);
const head = label => all("th button").find(b => b.textContent === label);
setTimeout(() => {
  state.start = names();
  head("growth").click(); state.down = names(); head("growth").click(); state.up = names();
  head("algorithm").click(); state.named = names();
  const box = document.querySelector("input[type=search]");
  box.value = "SAC"; box.dispatchEvent(new Event("input")); state.filtered = names();
  box.value = ""; box.dispatchEvent(new Event("input")); state.all = names();
  state.charts = document.querySelectorAll("#group-0 .grid svg").length;
  state.lines = document.querySelectorAll("#group-0 .grid svg path[fill=none]").length;
  document.querySelector("#group-0 .legend button").click();
  state.fewer = document.querySelectorAll("#group-0 .grid svg path[fill=none]").length;
  state.failed = [...document.querySelectorAll("tr.failed")].map(r => r.textContent);
  const [a, b] = all(".pair select"), cells = () => all(".pair + div")[0].textContent;
  a.value = "sac"; b.value = "baseline-equal-weight"; a.onchange(); state.pair = cells();
  a.value = "baseline-equal-weight"; b.value = "sac"; a.onchange(); state.reverse = cells();
  for (const d of document.querySelectorAll("details")) d.open = true;
  document.querySelector("#group-0 .grid svg").dispatchEvent(new PointerEvent("pointermove", { clientX: 200, clientY: 400 }));
  document.getElementById("theme").click(); state.theme = document.documentElement.dataset.theme;
  state.pwned = window.pwned === undefined ? "no" : "yes"; state.images = document.images.length;
  state.width = innerWidth; state.wide = document.documentElement.scrollWidth;
  setTimeout(() => {
    state.manifest = [...document.querySelectorAll("details pre")].map(p => p.textContent).join("");
    state.errors = said; parent.postMessage(JSON.stringify(state), "*");
  }, 300);
}, 300);
</script>
"""


def browse(html: str, probe: str, folder: Path, width: int) -> dict:
    """What `probe` posts from the page in headless Chromium, `width` pixels wide; no error may be logged."""
    browser = next((found for name in board.BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium")
    html = html.replace("<head>", "<head><script>addEventListener('error', e => said.push(e.message));</script>", 1)
    (folder / "page.html").write_text(html.replace("</body>", probe + "</body>"))
    (folder / "frame.html").write_text(
        f"<iframe src=page.html width={width} height=900 style='border:0'></iframe><pre id=out></pre>"
        "<script>onmessage = e => document.getElementById('out').textContent = encodeURIComponent(e.data)</script>"
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=5000 --dump-dom"
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [browser, *flags.split(), profile, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"<pre id=\"out\">(.+?)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    state = json.loads(unquote(found.group(1)))
    assert state["errors"] == [] and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert state["width"] == width and state["wide"] <= width, "the page scrolls sideways"
    return state


@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(evil_page, tmp_path, width):
    state = browse(evil_page.read_text(), PROBE, tmp_path, width)
    rows = json.loads((evil_page.parent / "scoreboard.json").read_text())["groups"][0]["rows"]
    by_growth = [row["name"] for row in sorted(rows, key=lambda row: -row["growth"]["value"])]
    assert state["start"] == [row["name"] for row in rows]
    assert state["down"] == by_growth and state["up"] == by_growth[::-1]
    assert state["named"][0] != state["named"][-1] and sorted(state["named"]) == sorted(state["all"]) == sorted(by_growth)
    assert state["filtered"] == ["sac"]
    assert state["charts"] == 2 and state["lines"] == 6 and state["fewer"] == 4
    assert len(state["failed"]) == 1 and all(EVIL in text and "the end" in text for text in state["failed"])
    assert "Sharpe" in state["pair"] and state["pair"] != state["reverse"]
    assert EVIL in json.loads(json.dumps(state["manifest"])).replace('\\"', '"')
    assert state["theme"] in ("dark", "light") and state["pwned"] == "no" and state["images"] == 0


def test_a_picture_of_the_page(tmp_path, monkeypatch):
    make_run(tmp_path / "runs")
    args = board.Args(runs=(tmp_path / "runs",), out=tmp_path / "out", resamples=20, replays=False, picture=True)
    if any(shutil.which(name) for name in board.BROWSERS):
        board.main(args)
        assert (tmp_path / "out" / "scoreboard.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(board, "BROWSERS", ("no-browser",))
    with pytest.raises(SystemExit, match="--picture: none of no-browser"):
        board.main(args)


STRESS_PROBE = """
<script>
const said = [], state = {};
setTimeout(() => {
  const heads = [...document.querySelector("#group-0 table").querySelectorAll("th[scope=col]")];
  const seen = () => heads.filter(h => getComputedStyle(h).display !== "none").map(h => h.textContent);
  const all = [...document.querySelectorAll("#group-0 button")].find(b => b.textContent === "All scores");
  state.few = seen(); all.click();
  state.many = seen(); state.pressed = all.getAttribute("aria-pressed"); all.click();
  state.again = seen();
  state.bars = [...document.querySelectorAll("#group-0 svg rect title")].map(t => t.textContent);
  const section = [...document.querySelectorAll("section")].find(s => s.textContent.startsWith("Cost sensitivity"));
  state.costs = section.textContent; state.dots = section.querySelectorAll("circle").length;
  state.width = innerWidth; state.wide = document.documentElement.scrollWidth;
  state.errors = said; parent.postMessage(JSON.stringify(state), "*");
}, 300);
</script>
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_stress_in_a_browser(tmp_path, monkeypatch, width):
    """All scores on demand; regimes as bars; cost sensitivity as a section of its own."""
    for name in ("ppo", EVIL):
        make_run(tmp_path / "runs", name, frame=make_ledger(len(name)))
    score = {"value": 1.0, "low": 0.5, "high": 1.5}
    both = {"ppo": score, EVIL: score | {"value": -2.0, "low": float("nan")}}
    stressed = {
        "sensitivity": {name: [{"multiple": m, **value} for m in (0, 1, 5)] for name, value in both.items()},
        "late": both, "regimes": {"sharpe": {"bull": both, "crisis": both}}, "notes": ["replayed"],
    }  # fmt: skip
    monkeypatch.setattr(board, "stress", lambda *_: stressed)
    found = board.assemble(board.Args(runs=(tmp_path / "runs",), resamples=20))
    state = browse(board.page(found), STRESS_PROBE, tmp_path, width)
    labels = [column["label"] for column in found["columns"]]
    main = [column["label"] for column in found["columns"] if not column.get("more")]
    assert state["few"] == state["again"] == ["algorithm", *main] and state["many"] == ["algorithm", *labels]
    assert state["pressed"] == "true" and "Sortino" in labels and "Sortino" not in main and "1 bar late" in main
    assert len(state["bars"]) == 4 and "ppo, bull: 1.00 (0.50 to 1.50)" in state["bars"]
    assert "the same orders, replayed" in state["costs"] and EVIL in state["costs"] and state["dots"] == 6
    text = board.markdown(found)
    assert "1.00 [0.50, 1.50]" in text and "- replayed" in text


def test_every_score_is_in_the_json(tmp_path):
    """Those of metrics, mean over seeds; against buy-and-hold on the same panel where that was run."""
    frames = [make_ledger(1), make_ledger(2)]
    for seed, frame in enumerate(frames, 1):
        make_run(tmp_path, "ppo", seed, frame)
    market = make_ledger(3)
    make_run(tmp_path, "baseline-buy-and-hold", 1, market)
    found = assemble(tmp_path)
    assert {column["key"] for column in found["columns"]} >= set(metrics.SCORES)
    row = next(row for row in found["groups"][0]["rows"] if row["name"] == "ppo")
    against = test_part(market)["net_return"].to_numpy()
    tables = [metrics.table(test_part(frame), PER_YEAR, against) for frame in frames]
    for key in ("sortino", "cvar", "beta", "information_ratio", "drawdown_duration", "profit_factor"):
        assert row[key] == pytest.approx(np.mean([scores[key] for scores in tables]), rel=1e-9)
    group = found["groups"][0]
    assert group["selection"]["spa"] is not None and group["selection"]["pbo"] is not None and group["trials"] == 3
    assert (
        0 <= row["dsr"] <= row["psr"] <= 1 and row["better"] is None and "P(better) is missing" in " ".join(group["warnings"])
    )
    make_run(tmp_path, "baseline-equal-weight", 1, make_ledger(5, -0.01), trials=50)
    group = assemble(tmp_path)["groups"][0]
    better = {row["name"]: row["better"] for row in group["rows"]}
    assert better["ppo"] > 0.95 and better["baseline-equal-weight"] is None and group["trials"] == 53
