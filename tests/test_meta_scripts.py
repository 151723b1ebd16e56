"""What the scripts that adapt have in common: tasks cut from one real history, and what they report of them."""

from dataclasses import replace

import numpy as np
import pytest
import replay
import rundirs
from scripts import SCRIPTS, Run, prices

from envs.features import REGIMES
from envs.tasks import TASK_SETS

pytest_plugins = ["scripts"]
META = ("rl2_leadlag", "maml_leadlag", "pearl_portfolio")


@pytest.fixture(params=META)
def script(request):
    return SCRIPTS[request.param]


def test_a_history_is_cut_into_tasks(script, inside, tmp_path):
    """Into slices one after another; a rest that is too short for one belongs to none."""
    prices(900).to_csv(tmp_path / "closes.csv")
    wanted = ["--market", str(tmp_path / "closes.csv"), "--task-bars", "80", "--train-fraction", "0.5", "--embargo", "0"]
    g = inside(*script.short, *wanted)
    run = Run(g["run_dir"])
    ranges = {name: split.ranges for name, split in g["splits"].items()}
    assert {name: len(r) for name, r in ranges.items()} == {"train": 4, "val": 2, "test": 3}  # the first 60 bars are no task
    assert all((np.diff(r, axis=1) == 80).all() for r in ranges.values())
    assert (ranges["test"][:, 0] == [630, 710, 790]).all()  # half, then a fifth, of 900 bars are gone
    assert run.json["adaptation"]["tasks"] == 3 and run.json["panel"]["splits"]["test"]["bars"] == 240
    test = run.ledger.query("split == 'test'")
    assert set(test["market"]) == {0, 1, 2}
    found = run.json["adaptation"]["sharpe_by_regime"]
    assert found and set(found) <= set(REGIMES) and sum(score["windows"] for score in found.values()) > 0
    # the scoreboard finds the same tasks, and what the orders of the ledger earned there
    read = replace(rundirs.read(run.folder), ledger=test.reset_index(drop=True))
    assert (replay.load(read)[1].ranges == ranges["test"]).all()
    assert len(replay.replay(read)["1x"]) == len(read.ledger)


def test_too_long_a_task_is_named(script, complaint, tmp_path):
    prices(300).to_csv(tmp_path / "closes.csv")
    line = complaint(*script.short, "--market", str(tmp_path / "closes.csv"), "--task-bars", "100")
    assert "split 'val': no slice of 100 rows" in line


def test_task_bars_below_zero_are_named(script, complaint):
    assert "--task-bars -3: expected at least 0" in complaint(*script.short, "--task-bars", "-3")


def test_a_set_of_tasks_goes_by_its_name(script, inside, monkeypatch):
    """And by its specification in run.json, so that others can load it."""
    monkeypatch.setitem(TASK_SETS, "some", script.market)
    run = Run(inside(*script.short, "--market", "some", "--total-timesteps", "1024")["run_dir"])
    assert run.json["args"]["market"] == script.market == run.json["panel"]["name"]
