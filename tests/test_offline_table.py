"""The scoreboard's offline tables: their numbers are those of the ledgers, and what they lack is said."""

import json
from pathlib import Path

import numpy as np
import offline
import pandas as pd
import pytest
import replay
import rundirs
import scoreboard as board
from test_scoreboard import EVIL, PER_YEAR, assemble, browse, change, make_ledger, make_run, test_part

from envs import ledger
from envs.portfolio_references import utility

AVERSION = 40.0
DRAWN = "synthetic:garleanu-pedersen"


def offline_run(root: Path, name="iql_portfolio", seed=1, best=None, last=None, risk_aversion=AVERSION, data=None, **options):
    """A run directory as a script leaves it that learned from a dataset; `data` overrides what it says of that."""
    best, last = (make_ledger(10 * seed + k) if frame is None else frame for k, frame in ((0, best), (1, last)))
    said = {
        "dataset": str(root / "nowhere" / "dataset.hdf5"), "sha256": f"{seed}", "steps": 1000 * seed, "episodes": 600,
        "behaviours": [{"policy": "random"}, {"policy": "baseline-momentum"}, {"policy": "ppo_portfolio", "step": 9}],
        "mean_reward": 0.01 * seed, "best_step": 500, "gradient_steps": 2000,
    } | (data or {})  # fmt: skip
    args = {"dataset": said["dataset"]} | options.pop("args", {})
    content = {"offline": said, "risk_aversion": risk_aversion, "sps": 500.0 / seed} | options
    path = make_run(root, name, seed, best, args=args, **content)
    ledger.write_ledger(path / "ledger_last.parquet", test_part(last).assign(split="test"))
    return path


def table_of(*roots, **options) -> dict:
    """The only offline table of the only group."""
    (group,) = assemble(*roots, **options)["groups"]
    (table,) = group["offline"]
    return table


def row_of(table: dict, name: str) -> dict:
    (row,) = [row for row in table["rows"] if row["name"] == name]
    return row


def note_of(table: dict, part: str) -> str:
    (note,) = [note for note in table["notes"] if part in note]
    return note


def growth(frame: pd.DataFrame) -> float:
    return float(ledger.growth(frame).mean() * PER_YEAR)


def sharpe(frame: pd.DataFrame) -> float:
    return ledger.sharpe(frame["net_return"].to_numpy(), PER_YEAR)


def test_numbers_are_medians_of_the_ledgers(tmp_path):
    frames = {seed: (make_ledger(seed, 0.001), make_ledger(seed + 50, 0.002)) for seed in (1, 2, 3)}
    for seed, (best, last) in frames.items():
        offline_run(tmp_path, seed=seed, best=best, last=last)
        make_run(tmp_path, "ppo_portfolio", seed, make_ledger(seed + 100, 0.003))
    table = table_of(tmp_path)
    row = row_of(table, "IQL")
    scores = {"utility": lambda frame: utility(frame, AVERSION, PER_YEAR), "growth": growth, "sharpe": sharpe}
    for key, score in scores.items():
        for which, suffix in ((0, ""), (1, "_last")):
            cell = row[key + suffix]
            expected = np.median([score(test_part(pair[which])) for pair in frames.values()])
            assert cell["value"] == pytest.approx(expected, rel=1e-9), key + suffix
            assert cell["low"] < cell["value"] < cell["high"]
        online = row_of(table, "ppo_portfolio")
        expected = np.median([score(test_part(make_ledger(seed + 100, 0.003))) for seed in frames])
        assert online[key]["value"] == pytest.approx(expected) and f"{key}_last" not in online
    assert row["seeds"] == 3 and row["speed"] == 250  # of 500, 250 and 167
    mean = row_of(table, "mean of the data")
    assert mean["utility"]["value"] == pytest.approx(0.02) and mean["seeds"] == 3 and "growth" not in mean
    assert np.isnan(mean["utility"]["low"])
    assert [column["key"] for column in table["columns"]] == [
        "utility", "utility_last", "sharpe", "sharpe_last", "growth", "growth_last", "share", "share_last", "seeds", "speed"
    ]  # fmt: skip
    assert "risk aversion of 40" in note_of(table, "The score is the utility")
    assert "600 episodes, 1,000 to 3,000 steps of momentum, ppo_portfolio, random." in note_of(table, "Data: ")


def test_the_score_is_growth_where_the_risk_aversion_is_one(tmp_path):
    for name, env_id in (("iql_portfolio", "LeadLag-v0"), ("ppo_leadlag", "LeadLag-v0"), ("ppo_portfolio", "Portfolio-v0")):
        make = offline_run if name == "iql_portfolio" else make_run
        options = {"risk_aversion": 1.0} if name == "iql_portfolio" else {"frame": make_ledger(3, 0.003)}
        make(tmp_path, name, 1, env_id=env_id, **options)
    table = table_of(tmp_path)
    assert [row["name"] for row in table["rows"]] == ["ppo_leadlag", "IQL", "mean of the data"]
    keys = [column["key"] for column in table["columns"]]
    assert keys[:4] == ["growth", "growth_last", "sharpe", "sharpe_last"] and "utility" not in keys
    row = row_of(table, "IQL")
    expected = growth(test_part(make_ledger(10))) / growth(test_part(make_ledger(3, 0.003)))
    assert row["share"]["value"] == pytest.approx(expected) and row_of(table, "mean of the data")["growth"]["value"] == 0.01
    assert "the growth, for a relative risk aversion of 1" in note_of(table, "The score is")


def test_utility_is_that_of_the_bars_of_every_draw(tmp_path):
    """Twelve markets are drawn whole; the draws are those of the random numbers that the scoreboard's others come from."""
    frame = make_ledger(4, 0.002, markets=12, bars=40)
    run = rundirs.read(make_run(tmp_path, frame=frame))
    rundirs.load(run)
    found = offline.Medians({"a": [run]}, AVERSION, resamples=20, seed=5).drawn["a", "utility"][1]
    parts = [part for _, part in run.ledger.groupby("market")]
    rng = np.random.default_rng([5, 0])
    draws = [range(12), *(rng.integers(12, size=12) for _ in range(20))]
    expected = [utility(pd.concat([parts[k] for k in draw]), AVERSION, PER_YEAR) for draw in draws]
    assert found == pytest.approx(expected, rel=1e-9)


def test_intervals_know_of_the_seeds(tmp_path):
    """Seeds that each earn the same in every bar differ from each other alone."""
    for seed, mean in enumerate((0.0, 2e-3, 4e-3, 6e-3, 8e-3), 1):
        frame = make_ledger(7)
        frame["net_return"] += mean
        frame["equity"] = frame.groupby(["split", "market"])["net_return"].transform(lambda r: (1 + r).cumprod())
        offline_run(tmp_path, seed=seed, best=frame, last=make_ledger(7))
    row = row_of(table_of(tmp_path, resamples=400), "IQL")
    both, time = (cell["high"] - cell["low"] for cell in (row["growth"], row["growth_last"]))
    medians = np.median(np.random.default_rng(0).choice([0.0, 2e-3, 4e-3, 6e-3, 8e-3], (100_000, 5)), axis=1)
    assert both == pytest.approx(np.hypot(time, 3.92 * medians.std() * PER_YEAR), rel=0.25) and both > 1.5 * time


def test_the_share_is_of_the_configuration_with_most_seeds(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "ppo_portfolio", seed, make_ledger(seed, 0.008), args={"gamma": 0.9})
        offline_run(tmp_path, seed=seed, best=make_ledger(seed, 0.008))
    make_run(tmp_path, "ppo_portfolio", 1, make_ledger(5, 0.003), args={"gamma": 0.5})
    table = table_of(tmp_path)
    assert row_of(table, "IQL")["share"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert "ppo_portfolio [gamma=0.9]" in note_of(table, "Shares") and "share" in row_of(table, "ppo_portfolio [gamma=0.5]")


def test_one_who_never_trades_has_no_utility_and_no_warning(tmp_path, recwarn):
    still = make_ledger(1).assign(gross_return=0.0, net_return=0.0, commission=0.0, turnover=0.0, equity=1.0)
    offline_run(tmp_path, best=still, last=still)
    row = row_of(table_of(tmp_path), "IQL")
    assert row["utility"] == row["utility_last"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert not [warning for warning in recwarn if "divide" in str(warning.message)]


def test_shares_are_paired_by_seed(tmp_path):
    """Where every seed draws its own prices, a seed that only one of the two has tells nothing."""

    def shas(seed):
        return {"market": DRAWN, "sha": f"{seed}" * 64}

    online = {1: make_ledger(1, -0.009), 2: make_ledger(2, 0.008), 3: make_ledger(3, 0.006)}
    ours = {2: make_ledger(12, 0.003), 3: make_ledger(13, 0.003), 4: make_ledger(14, 0.009)}
    for seed, frame in online.items():
        make_run(tmp_path, "ppo_portfolio", seed, frame, **shas(seed))
    for seed, frame in ours.items():
        offline_run(tmp_path, "cql_portfolio", seed, frame, online.get(seed, frame), **shas(seed))
    table = table_of(tmp_path, resamples=200)
    row = row_of(table, "CQL")
    score = {key: utility(test_part(frame), AVERSION, PER_YEAR) for key, frame in online.items()}
    own = {key: utility(test_part(frame), AVERSION, PER_YEAR) for key, frame in ours.items()}
    assert row["share"]["value"] == pytest.approx(np.median([own[seed] / score[seed] for seed in (2, 3)]))
    assert row["share"]["low"] < row["share"]["value"] < row["share"]["high"]
    # the last model is the online one: on every draw it has all of its score
    assert row["share_last"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert "share" not in row_of(table, "ppo_portfolio") and "of ppo_portfolio with the same seed" in note_of(table, "Shares")


@pytest.mark.parametrize("mean, shown", [(-0.004, False), (0.0028, True)])
def test_a_share_of_what_may_be_nothing(tmp_path, mean, shown):
    """None of a negative score; without interval where the online score is below zero on some draw."""
    make_run(tmp_path, "ppo_portfolio", 1, make_ledger(1, mean))
    offline_run(tmp_path, "bc_portfolio", 1, make_ledger(2, 0.004))
    row = row_of(table_of(tmp_path, resamples=400), "BC")
    if shown:
        online = utility(test_part(make_ledger(1, mean)), AVERSION, PER_YEAR)
        assert online > 0
        assert row["share"]["value"] == pytest.approx(utility(test_part(make_ledger(2, 0.004)), AVERSION, PER_YEAR) / online)
        assert np.isnan(row["share"]["low"]) and np.isnan(row["share"]["high"])
    else:
        assert row["share"] is None


def test_rows_are_online_then_offline_then_behaviours_then_the_data(tmp_path):
    for name in ("iql_portfolio", "cql_portfolio", "bc_portfolio_top10", "bc_portfolio"):
        offline_run(tmp_path, name)
    offline_run(tmp_path, "zebra", args={"beta": 3.0})
    offline_run(tmp_path, "zebra", args={"beta": 9.0})
    for name in ("ppo_portfolio", "grpo_diffmarket", "baseline-momentum", "baseline-equal-weight", "baseline-ppo_portfolio"):
        make_run(tmp_path, name)
    table = table_of(tmp_path)
    assert [row["name"] for row in table["rows"]] == [
        "ppo_portfolio", "BC", "BC-10%", "CQL", "IQL", "zebra [beta=3]", "zebra [beta=9]", "baseline-momentum",
        "baseline-ppo_portfolio", "mean of the data",
    ]  # fmt: skip
    assert note_of(table, "Behaviours without a row").endswith(": random.")
    assert "share" in row_of(table, "baseline-momentum")


def test_seeds_of_one_configuration_are_one_row_whatever_folder_their_data_lie_in(tmp_path):
    for seed in (1, 2):
        offline_run(tmp_path, seed=seed, data={"dataset": str(tmp_path / f"{seed}" / "dataset.hdf5")})
    expert = {"behaviours": ["ppo_portfolio"], "mean_reward": 0.5}
    offline_run(tmp_path, seed=1, data=expert)
    (group,) = assemble(tmp_path)["groups"]
    (table,) = group["offline"]
    names = {row["name"]: row["seeds"] for row in table["rows"]}
    mixed = "momentum, ppo_portfolio, random"
    assert names == {
        f"IQL [behaviours={mixed}]": 2, "IQL [behaviours=ppo_portfolio]": 1,
        f"mean of the data [{mixed}]": 2, "mean of the data [ppo_portfolio]": 1,
    }  # fmt: skip
    assert row_of(table, "mean of the data [ppo_portfolio]")["utility"]["value"] == 0.5


def test_each_risk_aversion_and_environment_has_a_table(tmp_path):
    offline_run(tmp_path, "iql_portfolio", risk_aversion=1.0)
    offline_run(tmp_path, "iql_portfolio", risk_aversion=40.0)
    offline_run(tmp_path, "iql_portfolio", env_id="LeadLag-v0", risk_aversion=1.0)
    (group,) = assemble(tmp_path)["groups"]
    tables = group["offline"]
    assert [table["title"].split(":")[0] for table in tables] == ["Offline on LeadLag-v0"] + ["Offline on Portfolio-v0"] * 2
    assert ["risk aversion of 40" in " ".join(table["notes"]) for table in tables] == [False, False, True]
    assert [len(table["rows"]) for table in tables] == [2, 2, 2]


# --- what is missing


def test_a_last_model_that_is_missing_or_broken_is_said(tmp_path):
    paths = {seed: offline_run(tmp_path, "cql_portfolio", seed) for seed in (1, 2)}
    other = offline_run(tmp_path, "bc_portfolio")
    (other / "ledger_last.parquet").unlink()
    change(other, lambda run: run.pop("sps"))
    frame = pd.read_parquet(paths[2] / "ledger_last.parquet")
    for broken, reason in (
        (frame.iloc[:-7], "ledger_last.parquet is truncated"),
        (frame.assign(net_return=0.1), "ledger_last.parquet: equity of market 0"),
        (frame.assign(turnover=np.nan), "ledger_last.parquet: turnover is not finite"),
        (frame.assign(split="val"), "ledger_last.parquet holds no bar of the test split"),
    ):
        ledger.write_ledger(paths[2] / "ledger_last.parquet", broken)
        table = table_of(tmp_path)
        assert reason in note_of(table, "CQL, seed 2, has no last model") and "BC, seed 1" in note_of(
            table, "it has no ledger_last"
        )
        row = row_of(table, "CQL")
        assert row["sharpe_last"]["value"] == pytest.approx(sharpe(test_part(make_ledger(11)))) and row["seeds"] == 2
        bc = row_of(table, "BC")
        assert "utility_last" not in bc and "utility" in bc and bc["speed"] is None


def test_a_last_model_on_other_bars_is_no_last_model(tmp_path):
    path = offline_run(tmp_path)
    frame = pd.read_parquet(path / "ledger_last.parquet")
    frame["timestamp"] = [frame["timestamp"][0] - pd.Timedelta(days=1), *frame["timestamp"][1:]]
    ledger.write_ledger(path / "ledger_last.parquet", frame)
    assert "other bars than ledger.parquet" in note_of(table_of(tmp_path), "IQL, seed 1, has no last model")


def test_both_models_are_cut_to_the_bars_of_all_rows(tmp_path):
    late = test_part(make_ledger(8)).iloc[50:].assign(split="test")
    late["equity"] = (1 + late["net_return"]).cumprod()
    make_run(tmp_path, "ppo_portfolio", frame=late)
    offline_run(tmp_path)
    change(next(tmp_path.glob("*ppo*")), lambda run: run["panel"]["splits"]["test"].update(bars=200))
    row = row_of(table_of(tmp_path), "IQL")
    for key, seed in (("sharpe", 10), ("sharpe_last", 11)):
        assert row[key]["value"] == pytest.approx(sharpe(test_part(make_ledger(seed)).iloc[50:]))


def test_what_a_reader_must_know_is_said(tmp_path):
    offline_run(tmp_path, seed=1)
    offline_run(tmp_path, "cql_portfolio", seed=1, data={"sha256": "another"})
    offline_run(tmp_path, "cql_portfolio", seed=2)
    offline_run(tmp_path, "cql_portfolio", seed=3, status="failed", failure="loss is NaN")
    offline_run(tmp_path, "bc_portfolio_top10", seed=3, status="failed", failure="loss is NaN")
    make_run(tmp_path, "ppo_leadlag", seed=3, status="failed", failure="not offline")
    (group,) = assemble(tmp_path)["groups"]
    (table,) = group["offline"]
    assert note_of(table, "2 offline runs failed").endswith("BC-10% seed 3, CQL seed 3.") and len(group["failed"]) == 3
    assert note_of(table, "One seed only").endswith(": IQL.")
    assert note_of(table, "Not all rows learned from the same data").endswith("seed 1.")
    assert note_of(table, "No ppo_portfolio was run") and not any("share" in row for row in table["rows"])
    offline_run(tmp_path / "other", seed=1)
    make_run(tmp_path / "other", "ppo_portfolio")
    said = " ".join(table_of(tmp_path / "other")["notes"])
    assert "failed" not in said and "same data" not in said and "No ppo" not in said and "no last" not in said


def test_a_group_of_failed_offline_runs_has_no_table(tmp_path):
    make_run(tmp_path, "ppo_portfolio")
    offline_run(tmp_path, status="failed", failure="loss is NaN")
    (group,) = assemble(tmp_path)["groups"]
    assert group["offline"] == [] and [row["name"] for row in group["failed"]] == ["iql_portfolio, seed 1"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda run: run["offline"].pop("behaviours"), lambda run: run["offline"].update(behaviours=[3]),
        lambda run: run["offline"].update(behaviours=[{"step": 3}]), lambda run: run["offline"].update(mean_reward=None),
        lambda run: run.update(offline=["?"]), lambda run: run.pop("risk_aversion"),
        lambda run: run["offline"].update(dataset=3),
    ],
)  # fmt: skip
def test_a_run_that_does_not_describe_its_data_is_a_red_row(tmp_path, edit):
    make_run(tmp_path, "ppo_portfolio")
    change(offline_run(tmp_path), edit)
    found = assemble(tmp_path)
    (row,) = found["unplaced"]
    assert row["reason"].startswith("run.json does not describe its data") and found["groups"][0]["offline"] == []


# --- the market comes from the dataset


def write_meta(folder: Path, **task) -> str:
    """The meta of a dataset, as a script that logs one writes it; returns the path of the dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "env_id": "Portfolio-v0", "market": "prices.csv", "seed": 9, "symbols": ["A"], "start": None, "end": None,
        "resample": None, "train_fraction": 0.6, "val_fraction": 0.2, "embargo": 5, "folds": 0, "fold": 0,
        "config": {"scale": 0.5}, "options": {"cvar_alpha": 0.05},
    } | task  # fmt: skip
    (folder / "dataset_meta.json").write_text(json.dumps({"task": whole}))
    return str(folder / "dataset.hdf5")


def test_what_chose_the_market_comes_from_the_meta_of_the_data(tmp_path):
    dataset = write_meta(tmp_path / "data")
    path = offline_run(tmp_path, data={"dataset": dataset}, args={"embargo": 7})
    change(path, lambda run: run["args"].pop("market"))
    args = rundirs.read(path).content["args"]
    assert args["market"] == "prices.csv" and args["symbols"] == ["A"] and args["portfolio"] == {"scale": 0.5}
    assert args["seed"] == 1 and args["embargo"] == 7, "what the script says of itself counts"
    assert not {"env_id", "config", "options", "cvar_alpha"} & set(args)
    write_meta(tmp_path / "data", env_id="LeadLag-v0", options={"actions": "delta", "max_jump": 1})
    args = rundirs.read(path).content["args"]
    assert args["leadlag"] == {"scale": 0.5} and args["actions"] == "delta" and "portfolio" not in args
    (tmp_path / "data" / "dataset_meta.json").write_text("[]")
    assert "market" not in rundirs.read(path).content["args"]


def test_orders_of_offline_runs_are_replayed(tmp_path):
    """On the panel of their data, which their own arguments do not name."""
    spec = f"{DRAWN}:bars=300:train=1:val=1:test=1"
    dataset = write_meta(tmp_path / "data", market=spec, symbols=[])
    panel, split = replay._load(spec, 1, json.dumps({key: [] for key in replay.SELECTION} | {
        "folds": 0, "fold": 0, "train_fraction": 0.6, "val_fraction": 0.2, "embargo": 5,
    }))  # fmt: skip
    path = offline_run(tmp_path, data={"dataset": dataset}, market=spec, sha=panel.sha256)
    change(path, lambda run: run["args"].pop("market"))
    found, test = replay.load(rundirs.read(path))
    assert found.sha256 == panel.sha256 and np.array_equal(test.ranges, split.ranges)


def test_folds_of_offline_runs_are_one_row(tmp_path):
    """What fold it is stands with the data alone. The mean reward weighs every step of the data the same."""
    frames = {}
    for fold in range(2):
        dataset = write_meta(tmp_path / f"fold {fold}", folds=2, fold=fold)
        frames[fold] = [make_ledger(20 + 10 * fold + k) for k in range(2)]
        for frame in frames[fold]:
            frame["timestamp"] += pd.Timedelta(days=200 * fold)
        path = offline_run(
            tmp_path / "runs", "bc_portfolio", 1, *frames[fold], sps=(40.0, 60.0)[fold],
            data={"dataset": dataset, "steps": (1000, 3000)[fold], "mean_reward": (0.1, 0.5)[fold]},
        )  # fmt: skip
        start = frames[fold][0]["timestamp"].min().isoformat()
        change(path, lambda run, start=start: run["panel"]["splits"]["test"].update(start=start))
    table = table_of(tmp_path / "runs")
    row = row_of(table, "BC")
    for k, key in enumerate(("sharpe", "sharpe_last")):
        whole = pd.concat([test_part(pair[k]) for pair in frames.values()])
        assert row[key]["value"] == pytest.approx(sharpe(whole))
    assert row_of(table, "mean of the data")["utility"]["value"] == pytest.approx(0.4) and row["speed"] == 50
    assert row["seeds"] == 1


# --- what is shown


def test_the_table_is_in_the_text_and_says_nothing_where_there_is_none(tmp_path):
    make_run(tmp_path, "ppo_portfolio", frame=make_ledger(1, 0.004))
    assert "Offline" not in board.markdown(assemble(tmp_path))
    offline_run(tmp_path, data={"behaviours": ["random", EVIL]})
    text = board.markdown(assemble(tmp_path))
    assert "### Offline on Portfolio-v0: best and last" in text and "<img" not in text and "&lt;img" in text
    lines = text[text.index("### Offline") :].splitlines()
    head = next(line for line in lines if line.startswith("| algorithm"))
    assert head.startswith("| algorithm | utility, best | utility, last | Sharpe, best |") and head.endswith("| steps/s |")
    (online,) = [line for line in lines if line.startswith("| ppo")]
    assert online.split(" | ")[2] == "-" and online.endswith("| 1 | - |")
    (mean,) = [line for line in lines if line.startswith("| mean of the data")]
    assert mean.split(" | ")[1] == "1.0%" and "[" not in mean
    assert any(line.startswith("- Best: ") for line in lines)


OFFLINE_PROBE = """
<script>
const said = [], state = {};
setTimeout(() => {
  const shown = document.querySelector("#group-0 .offline"), rows = () => [...shown.querySelectorAll("tbody tr")];
  const names = () => rows().map(r => r.dataset.name);
  state.title = shown.querySelector("h3").textContent; state.start = names();
  state.heads = [...shown.querySelectorAll("th[scope=col]")].map(h => h.textContent);
  state.sorted = shown.querySelectorAll("th[aria-sort]").length;
  [...shown.querySelectorAll("th button")].find(b => b.textContent === "utility, best").click(); state.up = names();
  [...shown.querySelectorAll("th button")].find(b => b.textContent === "seeds").click(); state.seeds = names();
  state.cells = Object.fromEntries(rows().map(r => [r.dataset.name, [...r.children].map(c => c.textContent)]));
  state.notes = shown.querySelector("ul").textContent;
  state.tables = document.querySelectorAll(".offline").length;
  state.main = document.querySelector("#group-0 table th[aria-sort]").textContent;
  state.pwned = window.pwned === undefined ? "no" : "yes";
  state.width = innerWidth; state.wide = document.documentElement.scrollWidth;
  state.errors = said; parent.postMessage(JSON.stringify(state), "*");
}, 300);
</script>
"""


def test_the_table_in_a_browser(tmp_path):
    make_run(tmp_path / "runs", "ppo_portfolio", frame=make_ledger(1, 0.004))
    for seed in (1, 2):
        offline_run(tmp_path / "runs", seed=seed, best=make_ledger(seed, 0.002), data={"behaviours": ["random", EVIL]})
    make_run(tmp_path / "runs", "far", costs={"commission_bps": 9})  # another group, without such a table
    found = assemble(tmp_path / "runs")
    (table,) = found["groups"][0]["offline"]
    state = browse(board.page(found), OFFLINE_PROBE, tmp_path, 390)
    names = [row["name"] for row in table["rows"]]
    assert state["title"] == table["title"] and state["tables"] == 1 and state["pwned"] == "no"
    assert state["start"] == names == ["ppo_portfolio", "IQL", "mean of the data"] and state["sorted"] == 0
    assert state["heads"] == ["algorithm", *(column["label"] for column in table["columns"])]
    by_utility = sorted(table["rows"], key=lambda row: row["utility"]["value"])
    assert state["up"] in ([row["name"] for row in by_utility], [row["name"] for row in by_utility[::-1]])
    assert state["main"] == "Sharpe" and EVIL in state["notes"]
    assert state["cells"]["IQL"][-2:] == ["2", "375"] and state["cells"]["ppo_portfolio"][2] == "–"
    assert state["cells"]["mean of the data"][1] == "1.5%"
