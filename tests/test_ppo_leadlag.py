"""algos/ppo_leadlag.py: what it alone does, and on markets from files."""

import re

import numpy as np
import pytest
from scripts import SCRIPTS, Run, candles, prices

pytest_plugins = ["scripts"]


@pytest.fixture
def script():
    return SCRIPTS["ppo_leadlag"]


def names(run: Run) -> list[str]:
    return ["agent", *(f"lookback {k}" for k in run.json["market"]["lookbacks"]), "best in training", "random", "equal weight"]


def test_the_ledger_holds_lookbacks(script, base):
    assert base.json["market"]["lookbacks"] == [5, 9, 17, 32, 60]
    assert base.json["capture"] is None or base.json["capture"] < 9
    frame = base.ledger
    assert frame["action"].between(0, 4).all() and frame["action"].nunique() > 1
    # the best score on the validation split is that of the model that is reported
    assert base.json["scores"]["val"]["agent"]["growth"] == pytest.approx(base.json["val_growth"], rel=1e-9)


def test_closes_from_a_csv_file_with_delta_actions(script, inside, tmp_path):
    wide = prices()
    wide.iloc[:40, 2] = np.nan
    wide.to_csv(tmp_path / "closes.csv")
    options = ["--market", str(tmp_path / "closes.csv"), "--max-lookback", "30", "--actions", "delta"]
    run = Run(inside(*script.short, *options, "--total-timesteps", "4096")["run_dir"])
    assert run.json["market"]["fill"] == "next_close" and run.json["panel"]["symbols"] == list(wide.columns)
    assert run.json["capture"] is None and list(run.json["scores"]["test"]) == names(run)
    frame = run.ledger
    assert frame["action"].between(0, 2).all() and not frame.isna().any().any()
    ends = frame.groupby("split")["timestamp"].agg(["min", "max"])
    assert ends.loc["train", "max"] < ends.loc["val", "min"] < ends.loc["val", "max"] < ends.loc["test", "min"]
    assert ends.loc["test", "max"] == wide.index[-1]


def test_bars_from_a_csv_file_with_hybrid_actions(script, inside, tmp_path):
    candles().to_csv(tmp_path / "bars.csv", index=False)
    options = ["--market", str(tmp_path / "bars.csv"), "--max-lookback", "30", "--actions", "hybrid", "--max-jump", "2"]
    run = Run(inside(*script.short, *options, "--total-timesteps", "4096", "--start", "2020-02-01")["run_dir"])
    assert run.json["market"]["fill"] == "next_open" and run.json["panel"]["splits"]["train"]["start"] >= "2020-02-03"
    assert run.json["scores"]["test"]["agent"]["turnover"] > 0 and run.json["args"]["start"] == "2020-02-01"
    assert run.ledger["action"].between(0, 7).all()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--min-lookback", "450", "--max-lookback", "600", "--num-lookbacks", "3"], ("--min-lookback", "split")),
        (["--min-lookback", "60"], ("min.lookback", "max.lookback", "60")),
        (["--num-lookbacks", "1"], ("num.lookbacks", "at least 2")),
        (["--actions", "any"], ("actions", "any", "absolute")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line
