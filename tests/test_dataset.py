"""Offline datasets: what markets did comes back bit for bit, every defect is named, memory is bounded, other tools read it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace as with_changes
from itertools import islice

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import CONFIG, ROOT, make_env, portfolio_data, random_actions
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import dataset, dataset_export
from envs.costs import RECORD
from envs.dataset import CHUNK, FLAGS, KEYS, PROVENANCE, REQUIRED, TRANSITION, Dataset, DatasetError, validate
from envs.dataset_writer import DatasetWriter, log_episodes, merge
from envs.leadlag_tables import LeadLagData

GAMMA = 0.9
META = dict.fromkeys(PROVENANCE) | {"env_id": "Toy-v0", "gamma": GAMMA, "seed": 3, "note": "the caller's own"}
WEIGHTS = gym.spaces.Box(np.float32([-1.0, 0.0]), np.float32([1.0, np.inf]))
ORDERS = gym.spaces.Discrete(4)
SIZE = 3


def collect(path, space=WEIGHTS, steps=60, markets=3, end=0.1, seed=0, size=SIZE, lengths=None, meta=None):
    """Write random steps; returns what must be in the file, key -> rows, put together market by market.

    Episodes end by chance `end`, or after lengths[market] = [steps, ...]. Rewards are those of the whole history, numbered.
    """
    rng = np.random.default_rng(seed)
    discrete = isinstance(space, gym.spaces.Discrete)
    running, finished = [[] for _ in range(markets)], []
    schedule = [set(np.cumsum(of_market)) for of_market in lengths or ()]
    obs, mask = rng.normal(size=(markets, size)).astype(np.float32), rng.random((markets, 4)) < 0.5
    mask[:, 1] = True
    with DatasetWriter(path, size, space, META | (meta or {}), markets) as writer:
        for step in range(steps):
            ended = np.array([step + 1 in stops for stops in schedule]) if lengths else rng.random(markets) < end
            how = rng.integers(3, size=markets)
            terminated, truncated = ended & (how != 0), ended & (how != 1)  # or both
            next_obs, next_mask = rng.normal(size=(markets, size)).astype(np.float32), rng.random((markets, 4)) < 0.5
            next_mask[:, 2] = True
            rewards = np.arange(markets, dtype=np.float64) * steps + step
            if discrete:
                actions = np.array([rng.choice(np.flatnonzero(allowed)) for allowed in mask])
                infos = {"action_mask": mask, "next_action_mask": next_mask}
            else:
                actions, infos = (
                    rng.random((markets, 2)),
                    {"pnl": rewards, "timestamp": np.full(markets, step * 10**18 // steps)},
                )
            writer.add(obs, actions, rewards, terminated, truncated, next_obs, **infos)
            for market in np.argsort(~ended, kind="stable"):  # at the last step, those that it cuts come last
                done = ended[market] or step == steps - 1
                row = {"observations": obs[market], "next_observations": next_obs[market], "actions": actions[market]}
                row |= {"rewards": rewards[market], "terminals": terminated[market]}
                row |= {"timeouts": done and not terminated[market], "dones": done, "episode_terminals": done}
                running[market].append(row | {f"infos/{name}": values[market] for name, values in infos.items()})
                if done:
                    finished.append([])
                    while running[market]:
                        later = enumerate(row["rewards"] for row in running[market])
                        known = {"infos/episode_id": len(finished) - 1, "infos/mc_return": sum(GAMMA**k * r for k, r in later)}
                        finished[-1].append(running[market].pop(0) | known)
            obs = np.where(ended[:, None], rng.normal(size=(markets, size)), next_obs).astype(np.float32)
            mask = np.where(ended[:, None], np.roll(next_mask, 1, axis=1), next_mask)
    rows = [row for episode in finished for row in episode]
    return {key: np.stack([row[key] for row in rows]) for key in KEYS if key in rows[0]}


def read(path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {key: file[key][:] for key in KEYS if key in file}


def write(path, arrays, sign=True):
    """A file of `arrays` at `path`; `sign`: with the hash of it in the meta that lies there, else without any meta."""
    path.unlink(missing_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    beside = path.with_name("dataset_meta.json")
    if sign:
        edit(path, sha256=dataset.sha256_of(path))
    else:
        beside.unlink(missing_ok=True)


def edit(path, **entries):
    beside = path.with_name("dataset_meta.json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | entries))


def cut(arrays) -> list[tuple]:
    """(s, a, r, s', terminal) of episodes cut where `terminals` or `timeouts` are 1, as by d3rlpy's BasicTransitionPicker."""
    out, first = [], 0
    for stop in np.flatnonzero((arrays["terminals"] > 0) | (arrays["timeouts"] > 0)) + 1:
        for row in range(first, stop):
            terminal = row == stop - 1 and arrays["terminals"][row]
            if row < stop - 1 or terminal:
                after = arrays["observations"][row] * 0 if terminal else arrays["observations"][row + 1]
                out.append((arrays["observations"][row], arrays["actions"][row], arrays["rewards"][row], after, terminal))
        first = stop
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """One dataset for each kind of actions; tests read it or work on a copy."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("weights", "orders")}
    for name, space in (("weights", WEIGHTS), ("orders", ORDERS)):
        collect(folders[name] / "d.hdf5", space)
    return folders


@pytest.fixture
def copy(made, tmp_path):
    def of(name="weights"):
        shutil.copytree(made[name], tmp_path / name)
        return tmp_path / name / "d.hdf5"

    return of


@pytest.mark.parametrize("space", [WEIGHTS, ORDERS], ids=["weights", "masked orders"])
@pytest.mark.parametrize("end", [0.2, 0.002], ids=["short", "long"])
def test_round_trip(tmp_path, space, end):
    """Markets that end at different times, over several chunks and sizes of the buffer: plain h5py finds D4RL's layout."""
    path = tmp_path / "new" / "d.hdf5"
    expected = collect(path, space, steps=701, markets=7, end=end, seed=1)
    found = read(path)
    assert set(found) == set(expected) >= set(REQUIRED) and len(found["rewards"]) == 7 * 701 > 4 * CHUNK
    for key, values in expected.items():
        dtype = KEYS[key] or (np.int64 if space is ORDERS else np.float32)
        assert found[key].dtype == dtype, key
        if key == "infos/mc_return":
            np.testing.assert_allclose(found[key], values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found[key], values.astype(dtype), err_msg=key)
    data = Dataset(path, space)
    assert sorted(p.name for p in path.parent.iterdir()) == ["d.hdf5", "dataset_meta.json"]
    assert data.action_space == space and data.meta.items() >= META.items() and data.meta["schema_version"] == 1
    assert data.meta["steps"] == 4907 and data.meta["episodes"] == found["infos/episode_id"][-1] + 1
    assert data.meta["shapes"]["observations"] == [4907, SIZE] and data.meta["dtypes"]["rewards"] == "float32"
    wide = found["observations"].astype(np.float64)
    np.testing.assert_allclose(data.meta["observation_mean"], wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(data.meta["observation_std"], wide.std(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(np.diff(data.starts), np.bincount(found["infos/episode_id"]))
    np.testing.assert_array_equal(data.terminated, found["terminals"][data.starts[1:] - 1])


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4), st.integers(1, 25))
def test_any_lengths_of_episodes(tmp_path_factory, lengths, steps):
    path = tmp_path_factory.mktemp("any") / "d.hdf5"
    expected = collect(path, ORDERS, steps, len(lengths), lengths=lengths)
    data, found = Dataset(path), read(path)
    for key in set(expected) - {"infos/mc_return"}:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    blocks = list(data.blocks(range(len(data.terminated)), tuple(found)))
    assert len(blocks) == 1
    for key, values in blocks[0].items():
        np.testing.assert_array_equal(values, found[key], err_msg=key)


@pytest.mark.parametrize("kind", ["LeadLag-v0", "Portfolio-v0"])
def test_episodes_of_a_market(kind, small_panel, tmp_path):
    """Row by row what the environment said, in episodes from random bars to the end of their range, or to ruin."""
    if kind == "LeadLag-v0":
        data = LeadLagData(small_panel, with_changes(CONFIG, gross=45.0))
    else:
        data = portfolio_data("changes", small_panel, tmp_path / "groups.csv", gross=40.0, asset_cap=40.0, costs="retail")
    envs = make_env(data, 5, split="train", episode_length=0)
    actions, step, drawn, said = iter(random_actions(envs, 2000)), envs.step, [], []

    def spied(chosen):
        said.append(step(chosen))
        return said[-1]

    def act(obs, mask, row, begun):
        np.testing.assert_array_equal(begun, said[-1][2] | said[-1][3] if said else np.ones(5, bool))
        chosen = next(actions)
        if mask is not None:
            chosen = np.where(mask[np.arange(5), chosen], chosen, mask.argmax(axis=1))
        drawn.append((obs, mask, row, chosen, np.log(0.5 + row % 2)))
        return drawn[-1][3:]

    envs.step = spied
    steps = log_episodes(tmp_path / "d.hdf5", envs, act, 12, META, 3, small_panel.timestamps)
    found, data = read(tmp_path / "d.hdf5"), Dataset(tmp_path / "d.hdf5", envs.single_action_space)
    expected, running = [], [[] for _ in range(5)]
    for t, ((before, mask, row, chosen, logprob), (obs, reward, terminated, truncated, infos)) in enumerate(zip(drawn, said)):
        over, record = terminated | truncated, dict(zip(RECORD, infos["record"].T))
        np.testing.assert_array_equal(infos["decided_at"], row)
        for i in sorted(range(5), key=lambda i: not over[i]):  # at the last step, those that it cuts come last
            last = over[i] or t == len(said) - 1
            want = {
                "observations": before[i], "next_observations": infos["final_obs"][i] if over[i] else obs[i],
                "actions": chosen[i], "rewards": reward[i], "terminals": terminated[i], "dones": last,
                "timeouts": last and not terminated[i], "episode_terminals": last, "infos/behavior_logprob": logprob[i],
                "infos/pnl": record["gross_return"][i], "infos/turnover": record["turnover"][i],
                "infos/timestamp": small_panel.timestamps[row[i]].astype("datetime64[ns]").astype(np.int64),
                "net": record["net_return"][i], "interest": record["interest"][i],
            }  # fmt: skip
            if mask is not None:
                after = infos["final_action_mask"][i] if over[i] else infos["action_mask"][i]
                want |= {"infos/action_mask": mask[i], "infos/next_action_mask": after}
            running[i].append(want)
            if last:
                expected += running[i]
                running[i] = []
    assert steps == len(expected) == 5 * len(said) and data.meta["steps"] == steps
    columns = {key: np.array([want[key] for want in expected]) for key in expected[0]}
    net, interest = columns.pop("net"), columns.pop("interest")
    assert set(found) - set(columns) == {"infos/episode_id", "infos/mc_return", "infos/cost"}
    for key, values in columns.items():
        np.testing.assert_array_equal(found[key], values.astype(found[key].dtype), err_msg=key)
    np.testing.assert_allclose(found["infos/pnl"] - found["infos/cost"] + interest, net, atol=1e-5)
    assert (found["infos/cost"] > 0).mean() > 0.5
    lengths = np.diff(data.starts)
    assert 3 <= data.terminated.sum() <= len(lengths) - 3 and len(lengths) >= 12 and len(set(lengths)) > 8
    reset = {row.tobytes() for row in found["observations"][data.starts[:-1]]}
    assert not reset & {row.tobytes() for row in found["next_observations"]}


def test_episodes_need_some(tmp_path):
    with pytest.raises(DatasetError, match="d.hdf5: episodes=0: expected at least 1"):
        log_episodes(tmp_path / "d.hdf5", None, None, 0, META, 0)


def put(key, row, value):
    def plant(arrays):
        arrays[key][row] = value

    return plant


def replace(key, change):
    def plant(arrays):
        arrays[key] = change(arrays[key])

    return plant


def drop(key):
    return lambda arrays: arrays.pop(key)


def both(*plants):
    return lambda arrays: [plant(arrays) for plant in plants]


def mask_out(arrays):
    arrays["infos/action_mask"][7, arrays["actions"][7]] = False


# rows 7 and 8 of the dataset of `made` lie inside an episode
DEFECTS = {
    "missing": (drop("rewards"), "rewards: missing; expected"),
    "missing id": (drop("infos/episode_id"), "infos/episode_id: missing; expected"),
    "length": (replace("rewards", lambda x: x[:-1]), r"rewards: \(179,\) rows: expected 180"),
    "empty": (replace("observations", lambda x: x[:0]), r"observations: shape \(0, 3\): expected \(N, D\)"),
    "shape": (replace("next_observations", lambda x: x[:, :2]), r"next_observations: .*\(180, 2\): expected .*\(180, 3\)"),
    "shape of rewards": (replace("rewards", lambda x: x[:, None]), r"rewards: float32 \(180, 1\): expected float32 \(180,\)"),
    "kind": (replace("infos/episode_id", lambda x: x * 1.0), r"infos/episode_id: float64 \(180,\): expected int64"),
    "complex": (replace("rewards", lambda x: x * 1j), "rewards: complex64"),
    "wider": (replace("rewards", lambda x: x.astype(np.float64)), "dtypes .*expected .*, as in dataset_meta.json"),
    "NaN": (put("observations", (7, 1), np.nan), "observations, row 7: nan: expected a finite number"),
    "infinity": (put("infos/pnl", 170, np.inf), "infos/pnl, row 170: inf: expected a finite number"),
    "flag": (put("terminals", 7, 0.5), "terminals, row 7: 0.5: expected 0 or 1"),
    "dones": (put("dones", 7, 1), "dones, row 7: 1.0: expected terminals OR timeouts"),
    "timeout": (put("timeouts", 7, 1), "dones, row 7: 0.0: expected terminals OR timeouts"),
    "episode_terminals": (put("episode_terminals", 7, 1), "episode_terminals, row 7: 1.0: expected 1 on an episode's last row"),
    "ids": (put("infos/episode_id", slice(8, None), 77), "infos/episode_id, row 8: 77: expected "),
    "id of another": (replace("infos/episode_id", lambda x: x + 1), "infos/episode_id, row 0: 1: expected 0"),
    "successor": (put("next_observations", (7, 2), 0), "next_observations, row 7: expected observations of the next row"),
    "low": (put("actions", (7, 1), -0.1), r"actions, row 7: -0.1\d*: expected an element of Box"),
    "high": (put("actions", (7, 0), 1.5), "actions, row 7: 1.5: expected an element of Box"),
    "open end": (
        both(*(put(key, -1, 0) for key in FLAGS)), "dones, row 179: 0.0: expected 1 on the last row",
    ),
}  # fmt: skip
MASKED = {
    "negative": (put("actions", 7, -1), "actions, row 7: -1: expected 0 to 3"),
    "beyond": (put("actions", 7, 4), "actions, row 7: 4: expected 0 to 3"),
    "masked out": (mask_out, "actions, row 7: [0-3]: expected one that infos/action_mask allows"),
    "no choice": (put("infos/next_action_mask", 7, False), "infos/next_action_mask, row 7: .*: expected an action"),
    "mask": (
        put("infos/next_action_mask", 7, True),
        "infos/next_action_mask, row 7: expected infos/action_mask of the next row",
    ),
    "mask's kind": (
        replace("infos/action_mask", lambda x: x.astype(int)),
        r"infos/action_mask: int64 \(180, 4\): expected bool",
    ),
    "actions' kind": (replace("actions", lambda x: x * 1.0), r"actions: float64 \(180,\): expected int64 \(180,\)"),
}


@pytest.mark.parametrize("name, defect", [("weights", d) for d in DEFECTS] + [("orders", d) for d in MASKED])
def test_every_defect_is_named(copy, name, defect):
    plant, message = (DEFECTS | MASKED)[defect]
    path = copy(name)
    arrays = read(path)
    assert not arrays["dones"][6:9].any() and not arrays["infos/episode_id"][7] == arrays["infos/episode_id"][-1]
    write(path, arrays)
    assert validate(path).meta["steps"] == 180
    plant(arrays)
    write(path, arrays)
    before = path.read_bytes()
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}: {message}"):
        Dataset(path)
    assert path.read_bytes() == before


def test_terminals_and_timeouts_are_not_both(copy):
    path = copy()
    arrays = read(path)
    row = np.flatnonzero(arrays["terminals"])[0]
    arrays["timeouts"][row] = 1.0
    write(path, arrays)
    with pytest.raises(DatasetError, match=f"timeouts, row {row}: 1.0: expected 0 where terminals is 1"):
        validate(path)


def test_rows_are_counted_across_chunks(tmp_path):
    """A successor that is wrong on the last row of a chunk, and a NaN in the second one."""
    path = tmp_path / "d.hdf5"
    arrays = collect(path, steps=2 * CHUNK, markets=1, end=0.0)
    for key, row in (("next_observations", CHUNK - 1), ("next_observations", 2 * CHUNK - 2), ("rewards", CHUNK + 5)):
        wrong = {name: values.copy() for name, values in arrays.items()}
        wrong[key][row] = np.nan if key == "rewards" else 0.0
        write(path, wrong, sign=False)
        with pytest.raises(DatasetError, match=f"{key}, row {row}: "):
            validate(path)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_another_hash_is_refused(copy, damage):
    path = copy()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage == "truncated" else flip(whole, 5000))
    before = path.read_bytes()
    with pytest.raises(DatasetError, match="sha256 .*: expected .*: the file has changed since"):
        Dataset(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "missing"])
def test_damage_without_a_hash_is_refused(copy, damage):
    path = copy()
    path.with_name("dataset_meta.json").unlink()
    validate(path)
    with h5py.File(path, "r") as file:
        chunk = file["rewards"].id.get_chunk_info(0)
    whole = path.read_bytes()
    damaged, message = {
        "truncated": (whole[: len(whole) // 2], "truncated or corrupted; expected a whole HDF5 file"),
        "flipped": (flip(whole, chunk.byte_offset + chunk.size // 2), "truncated or corrupted; expected a whole HDF5 file"),
        "text": (b"observations,actions\n", "expected an HDF5 file"),
        "empty": (b"", "expected an HDF5 file"),
        "missing": (None, "expected an HDF5 file"),
    }[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    with pytest.raises(DatasetError, match=message):
        Dataset(path)
    assert damaged is None or path.read_bytes() == damaged


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"schema_version": 2}, "schema_version 2: expected 1"),
        ({"episodes": 3}, r"episodes \d+: expected 3, as in dataset_meta.json"),
        ({"action_space": {"type": "Discrete", "n": 4}}, r"actions: float32 \(180, 2\): expected int64"),
    ],
)
def test_a_meta_that_says_otherwise_is_refused(copy, entries, message):
    path = copy()
    edit(path, **entries)
    with pytest.raises(DatasetError, match=message):
        Dataset(path)


@pytest.mark.parametrize(
    "text, message", [("{", "expected a JSON object"), ("3", "expected a JSON object"), ("{}", "missing .*gamma")]
)
def test_a_meta_that_is_none_is_refused(copy, text, message):
    path = copy()
    path.with_name("dataset_meta.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        Dataset(path)


def test_the_actions_of_a_script_must_be_those_of_the_data(copy):
    with pytest.raises(DatasetError, match=r"actions: made for Discrete\(4\): expected Discrete\(5\)"):
        Dataset(copy("orders"), gym.spaces.Discrete(5))


STEP = {
    "obs": np.zeros((2, SIZE)), "actions": np.zeros(2, int), "rewards": np.zeros(2), "terminated": np.zeros(2, bool),
    "truncated": np.zeros(2, bool), "next_obs": np.zeros((2, SIZE)),
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"obs": np.zeros((2, 4))}, r"observations: float64 \(2, 4\): expected float32 \(2, 3\)"),
        ({"rewards": np.zeros(1)}, r"rewards: \(1,\) rows: expected 2"),
        ({"rewards": np.zeros((2, 1))}, "rewards: float64"),
        ({"terminated": np.zeros(2)}, r"terminated: float64 \(2,\): expected bool"),
        ({"truncated": False}, "truncated: .*expected 2"),
        ({"next_obs": np.array([[0, 0, 0], [0, np.nan, 0]])}, "next_observations, market 1: nan: expected a finite"),
        ({"rewards": np.array([0, 1e39])}, "rewards, market 1: inf: expected a finite"),
        ({"actions": np.array([0, 4])}, "actions, market 1: 4: expected 0 to 3"),
        ({"actions": np.zeros(2)}, "actions: float64"),
        ({"timestamp": np.array(["2020", "2021"], "datetime64[ns]")}, "infos/timestamp: datetime64"),
        ({"action_mask": np.array([[1, 0, 0, 0], [0, 1, 1, 1]], bool)}, "actions, market 1: 0: expected one that"),
        ({"profit": np.zeros(2)}, "infos .'profit'.: expected some of"),
        ({"mc_return": np.zeros(2)}, "infos .'mc_return'.: expected some of"),
    ],
)
def test_a_step_that_no_dataset_may_hold_is_refused(tmp_path, change, message):
    """At once, and the steps before and after are kept."""
    infos = {name: np.ones((2, 4), bool) if "mask" in name else np.zeros(2, int) for name in change if name in dataset.OPTIONAL}
    with DatasetWriter(tmp_path / "d.hdf5", SIZE, ORDERS, META, 2) as writer:
        writer.add(**STEP, **infos)
        with pytest.raises(DatasetError, match=message if "'" not in message else "expected .., as at the first step"):
            writer.add(**STEP | infos | change)
        writer.add(**STEP, **infos)
    assert Dataset(tmp_path / "d.hdf5").meta["steps"] == 4
    with DatasetWriter(tmp_path / "other" / "d.hdf5", SIZE, ORDERS, META, 2) as writer:
        with pytest.raises(DatasetError, match=message):
            writer.add(**STEP | change)
        writer.add(**STEP)


def test_the_observation_after_a_reset_is_no_successor(tmp_path):
    """A collector that takes next_obs for obs goes unnoticed; one that skips a step, or resets without saying so, does not."""
    with DatasetWriter(tmp_path / "d.hdf5", SIZE, ORDERS, META, 2) as writer:
        writer.add(**STEP | {"truncated": np.array([True, False])})
        moved = np.array([[1.0, 0, 0], [0, 0, 0]])
        writer.add(**STEP | {"obs": moved})
        with pytest.raises(DatasetError, match="observations, market 1: expected the last step's next_obs"):
            writer.add(**STEP | {"obs": moved[::-1]})
        writer.add(**STEP)
    with pytest.raises(DatasetError, match="the dataset is closed"):
        writer.add(**STEP)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": "d.h5"}, "expected a name that ends in .hdf5"),
        ({"action_space": gym.spaces.MultiDiscrete([2, 2])}, "MultiDiscrete.*: expected a Discrete space from 0 or a Box"),
        ({"action_space": gym.spaces.Discrete(3, start=1)}, "expected a Discrete space from 0"),
        ({"action_space": gym.spaces.Box(-1, 1, (2, 2))}, r"expected .* Box of shape \(A,\)"),
        ({"meta": {"gamma": 0.9}}, "meta: missing .*'env_id'"),
        ({"meta": META | {"sha256": ""}}, "not to be given: .'sha256'."),
        ({"meta": META | {"gamma": 1.1}}, "gamma=1.1: expected 0 to 1"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"observation_size": 0}, "observation_size=0"),
    ],
)
def test_a_writer_says_what_it_cannot_write(tmp_path, change, message):
    arguments = {"path": "d.hdf5", "observation_size": SIZE, "action_space": ORDERS, "meta": META, "num_envs": 2} | change
    with pytest.raises(DatasetError, match=message):
        DatasetWriter(**arguments | {"path": tmp_path / arguments["path"]})
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_never_overwritten(copy):
    path = copy()
    before = path.read_bytes()
    for other in (path, path.with_name("e.hdf5")):
        with pytest.raises(DatasetError, match="there is a dataset in this folder already"):
            DatasetWriter(other, SIZE, ORDERS, META, 2)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2


def test_an_interrupted_writer_leaves_no_dataset(tmp_path, monkeypatch):
    """Killed in the middle, stopped by an exception, without steps, or unable to move the file: nothing under its name."""
    path = tmp_path / "d.hdf5"
    script = f"""
import os, signal, gymnasium as gym, numpy as np
from envs.dataset import PROVENANCE
from envs.dataset_writer import DatasetWriter
writer = DatasetWriter({str(path)!r}, 3, gym.spaces.Discrete(4), dict.fromkeys(PROVENANCE) | {{"gamma": 0.9}}, 2)
no, ends = np.zeros((2, 3)), np.ones(2, bool)
for _ in range(2000):
    writer.add(no, np.zeros(2, int), np.zeros(2), ends, ~ends, no)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["d.hdf5.part"]
    with pytest.raises(KeyboardInterrupt), DatasetWriter(path, SIZE, ORDERS, META, 2) as writer:
        writer.add(**STEP)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(DatasetError, match="no steps; expected at least one"), DatasetWriter(path, SIZE, ORDERS, META, 2):
        pass
    assert not list(tmp_path.iterdir())
    move = os.replace
    for stuck in (path, path.with_name("dataset_meta.json")):

        def fail(source, target, stuck=stuck):
            if str(target) == str(stuck):
                raise OSError("disk full")
            move(source, target)

        with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
            patched.setattr(os, "replace", fail)
            collect(path)
        assert not path.exists()
    collect(path)
    assert Dataset(path).meta["steps"] == 180 and not path.with_name("d.hdf5.part").exists()


@pytest.mark.parametrize("successors", [True, False], ids=["with successors", "without"])
@pytest.mark.parametrize("ends", ["timeouts", "episode_terminals", "dones", "terminals only"])
def test_a_file_from_elsewhere(copy, ends, successors):
    """D4RL's keys and types, the last episode cut by the end of the file: the transitions are those that d3rlpy makes of it."""
    path = copy()
    arrays = read(path)
    keys = [*("observations", "actions", "rewards", "terminals"), *(["next_observations"] if successors else [])]
    foreign = {key: arrays[key].astype(bool if key == "terminals" else np.float64) for key in keys}
    if ends != "terminals only":
        foreign[ends] = arrays[ends].astype(bool)
        foreign[ends][-1] = foreign["terminals"][-1]
    else:
        arrays["timeouts"] *= 0
        if successors:  # and where an episode goes on it must be the next row
            foreign["next_observations"][:-1] = foreign["observations"][1:]
    foreign["terminals"][-1] = False
    arrays["terminals"][-1], arrays["timeouts"][-1] = 0.0, 1.0
    write(path, foreign, sign=False)
    data = Dataset(path)
    ended = np.maximum(arrays["terminals"], arrays["timeouts"])
    np.testing.assert_array_equal(data.starts[1:] - 1, np.flatnonzero(ended))
    assert any("hash not checked" in note for note in data.meta["inferred"])
    assert any(note == "no episode timed out" for note in data.meta["inferred"]) == (ends == "terminals only")
    assert any("timeouts from" in note for note in data.meta["inferred"]) == (ends in ("episode_terminals", "dones"))
    assert any("left out" in note for note in data.meta["inferred"]) != successors
    np.testing.assert_array_equal(data.action_space.low, arrays["actions"].min(axis=0))
    np.testing.assert_array_equal(data.action_space.high, arrays["actions"].max(axis=0))
    (rows,) = data.blocks(range(len(data.terminated)))
    assert all(values.dtype == np.float32 for values in rows.values())
    if successors:
        np.testing.assert_array_equal(rows["next_observations"], foreign["next_observations"].astype(np.float32))
        assert len(rows["rewards"]) == 180
    else:
        expected = cut(arrays)
        assert len(rows["rewards"]) == len(expected)
        for number, (obs, action, reward, after, terminal) in enumerate(expected):
            np.testing.assert_array_equal(rows["observations"][number], obs)
            np.testing.assert_array_equal(rows["actions"][number], action)
            assert rows["rewards"][number] == reward and rows["terminals"][number] == terminal
            np.testing.assert_array_equal(rows["next_observations"][number], obs if terminal else after)
    with pytest.raises(DatasetError, match="keys .*: expected some of"):
        data.blocks([0], ("infos/mc_return",))
    with pytest.raises(DatasetError, match="actions, row .*: expected an element of"):
        Dataset(path, gym.spaces.Box(-0.1, 0.1, (2,)))


def test_a_file_from_elsewhere_may_say_both_and_holds_what_it_holds(copy):
    """A terminal state that is a timeout too counts as terminal; discrete actions as many as seen, or as the mask has."""
    path = copy("orders")
    arrays = read(path)
    masks = {key: arrays.pop(key) for key in ("infos/action_mask", "infos/next_action_mask")}
    arrays["timeouts"] = arrays["dones"].copy()
    arrays["actions"] = np.minimum(arrays["actions"], 2)
    write(path, arrays, sign=False)
    data = Dataset(path)
    np.testing.assert_array_equal(data.terminated, arrays["terminals"][data.starts[1:] - 1])
    assert data.action_space == gym.spaces.Discrete(3)
    masks["infos/action_mask"][:, 2] = masks["infos/next_action_mask"][:, 2] = True
    masks["infos/action_mask"][np.arange(180), arrays["actions"]] = True
    write(
        path,
        arrays | masks | {"infos/next_action_mask": masks["infos/action_mask"][np.minimum(np.arange(180) + 1, 179)]},
        sign=False,
    )
    assert Dataset(path).action_space == gym.spaces.Discrete(4)
    for key, bad in (("actions", np.nan), ("actions", np.inf), ("observations", 1e39)):
        wrong = read(path) | {"actions": np.zeros((180, 2)), "observations": arrays["observations"].astype(np.float64)}
        wrong = {name: values for name, values in wrong.items() if "infos" not in name and name != "next_observations"}
        wrong[key][5] = bad
        write(path, wrong, sign=False)
        with np.errstate(over="ignore"), pytest.raises(DatasetError, match=f"{key}, row 5: .*: expected a finite number"):
            Dataset(path)


def test_d3rlpy_and_minari_read_the_same(copy):
    """(s, a, r, s', terminal) of ours, of episodes cut at dones, and of T + 1 observations; d3rlpy leaves timeouts out."""
    path = copy()
    arrays, data = read(path), Dataset(path)
    (rows,) = data.blocks(range(len(data.terminated)))
    expected, number = cut(arrays), 0
    for row in range(180):
        if arrays["timeouts"][row]:
            continue
        for key, value in zip(TRANSITION, expected[number]):
            if key != "next_observations" or not rows["terminals"][row]:
                np.testing.assert_array_equal(rows[key][row], value)
        number += 1
    assert number == len(expected)
    row = 0
    for number, episode in enumerate(dataset_export.to_minari_episodes(data)):
        length = len(episode["rewards"])
        assert episode["id"] == number and len(episode["observations"]) == length + 1 and episode["infos"] == {}
        for key, values in (
            ("observations", episode["observations"][:-1]), ("next_observations", episode["observations"][1:]),
            ("actions", episode["actions"]), ("rewards", episode["rewards"]),
            ("terminals", episode["terminations"]), ("timeouts", episode["truncations"]),
        ):  # fmt: skip
            np.testing.assert_array_equal(values, arrays[key][row : row + length], err_msg=key)
        row += length
    assert row == 180 and number == len(data.terminated) - 1


def test_episodes_without_a_transition_are_not_exported(tmp_path):
    path = tmp_path / "d.hdf5"
    arrays = {
        "observations": np.arange(4.0)[:, None],
        "actions": np.zeros((4, 1)),
        "rewards": np.zeros(4),
        "terminals": np.zeros(4),
    }
    arrays["timeouts"] = np.array([0, 1, 1, 0])
    write(path, arrays, sign=False)
    (episode,) = dataset_export.to_minari_episodes(Dataset(path))
    np.testing.assert_array_equal(episode["observations"], [[0], [1]])
    assert episode["truncations"].tolist() == [True] and episode["terminations"].tolist() == [False]
    with pytest.raises(DatasetError, match="no transition has a known successor"):
        Dataset(path).blocks([1, 2])


def test_minari_export(copy, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    for name in ("weights", "orders"):
        data = Dataset(copy(name))
        dataset_export.export_minari(data, f"toy/{name}-v0")
        again = minari.load_dataset(f"toy/{name}-v0")
        assert again.total_steps == 180 and again.action_space == data.action_space
        for ours, theirs in zip(dataset_export.to_minari_episodes(data), again.iterate_episodes(), strict=True):
            for key in ("observations", "actions", "rewards", "terminations", "truncations"):
                np.testing.assert_array_equal(ours[key], getattr(theirs, key), err_msg=key)


def test_without_minari_the_error_says_what_to_install(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DatasetError, match="expected Minari: pip install minari"):
        dataset_export.export_minari(Dataset(copy()), "toy/weights-v0")


def test_split_by_episode(copy):
    data = Dataset(copy())
    episodes = len(data.terminated)
    train, validation = data.split_episodes(0.25, seed=1)
    assert len(validation) == round(0.25 * episodes)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(episodes))
    ids = [
        set(np.concatenate([b["infos/episode_id"] for b in data.blocks(i, ("infos/episode_id",))])) for i in (train, validation)
    ]
    assert ids == [set(train), set(validation)]
    np.testing.assert_array_equal(data.split_episodes(0.25, seed=1)[1], validation)
    assert set(data.split_episodes(0.25, seed=2)[1]) != set(validation) and len(data.split_episodes(1e-9, 0)[1]) == 1
    for fraction in (0.0, 1.0, 0.999, np.nan):
        with pytest.raises(DatasetError, match="fraction=.*expected in"):
            data.split_episodes(fraction, 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """30,000 rows of 100 observations: 25 MiB of transitions. Rewards number the rows of the history."""
    path = tmp_path_factory.mktemp("large") / "d.hdf5"
    collect(path, steps=7500, markets=4, end=0.01, size=100)
    return Dataset(path)


def test_batches_are_uniform_whether_held_or_streamed(large):
    indices, _ = large.split_episodes(0.3, 0)
    arrays = read(large.path)
    chosen = np.isin(arrays["infos/episode_id"], indices)
    row_of = {reward: row for row, reward in enumerate(arrays["rewards"])}
    assert len(row_of) == 30_000
    passes = 12
    for memory_mb in (64.0, 10.0):
        batches = islice(large.batches(indices, 256, 3, memory_mb), passes * chosen.sum() // 256)
        seen, position = np.zeros(30_000, int), []
        for batch in batches:
            rows = [row_of[reward] for reward in batch["rewards"]]
            for key in TRANSITION:
                np.testing.assert_array_equal(batch[key], arrays[key][rows])
            np.add.at(seen, rows, 1)
            position.append(np.std(rows))
        assert not seen[~chosen].any()
        seen = seen[chosen]
        if memory_mb == 64.0:  # independent draws: Poisson, whose variance is its mean
            assert 0.9 < seen.var() / passes < 1.1
        else:  # passes, but for what the buffer holds
            assert seen.min() >= passes - 2 and seen.max() <= passes + 1
            assert min(position[0], np.median(position)) > 0.7 * np.std(np.flatnonzero(chosen))  # from all over the file


def test_batches_follow_the_seed(large):
    for memory_mb in (64.0, 10.0):
        one, same, other = (list(islice(large.batches(range(99), 64, seed, memory_mb), 70)) for seed in (1, 1, 2))
        for a, b in zip(one, same):
            np.testing.assert_array_equal(a["rewards"], b["rewards"])
        assert not np.array_equal(one[0]["rewards"], other[0]["rewards"])
        assert not np.array_equal(one[0]["rewards"], one[1]["rewards"])


def test_streaming_stays_within_its_memory(large):
    """Twice the whole file, whose transitions take 25 MiB; to check it takes little, however long it is."""
    episodes = range(len(large.terminated))
    for memory_mb, use in (
        (10, lambda: [None for _ in islice(large.batches(episodes, 256, 0, 10.0), 240)]),
        (5, lambda: validate(large.path)),
    ):
        tracemalloc.start()
        use()
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert memory_mb / 3 < peak < memory_mb, f"{peak:.1f} MiB"


def test_batches_say_what_is_wrong(large):
    for arguments, message in (
        (([0], 0, 0), "batch_size=0: expected at least 1"),
        ((range(99), 256, 0, 1.0), r"memory_mb=1.0: expected at least \d for batch_size=256"),
        (([], 1, 0), "episodes .*: expected some of 0 to"),
        (([-1], 1, 0), "episodes .*: expected some of 0 to"),
        (([3, 3], 1, 0), "each once"),
        (([10**6], 1, 0), "episodes .*: expected some of 0 to"),
        (([0], 1, 0, 9.0, ("infos/cost",)), "keys .'infos/cost'.: expected some of"),
        (([0], 1, 0, 9.0, ()), "keys .*: expected some of"),
    ):
        with pytest.raises(DatasetError, match=message):
            large.batches(*arguments)
    with pytest.raises(DatasetError) as error:
        large.batches(range(99), 256, 0, 1.0)
    least = float(re.search(r"at least (\d+)", str(error.value)).group(1))
    assert next(large.batches(range(99), 256, 0, least))["rewards"].shape == (256,)


# --- datasets joined


def test_merged(tmp_path):
    """One after the other, in rows of several chunks; what only one of them knows is left out, the sources as they were."""
    task = {"env_id": "Toy-v0", "market": "toy", "seed": 3}
    differing = [(400, {"task": task}), (60, {"task": task | {"seed": 4}, "seed": 4}), (500, {"task": task, "git_commit": "a"})]
    sources = [tmp_path / str(n) / "d.hdf5" for n in range(4)]
    for n, (steps, meta) in enumerate(differing):
        collect(sources[n], steps=steps, seed=n, meta={"behaviours": [{"step": n}]} | meta)
    with DatasetWriter(sources[3], SIZE, WEIGHTS, META | {"behaviours": [{"step": 3}], "task": task}, 1) as writer:
        no = np.zeros(1, bool)
        for step in range(7):  # without a timestamp, but with a cost
            now, then = np.full((1, SIZE), step), np.full((1, SIZE), step + 1.0)
            writer.add(now, np.full((1, 2), 0.5), np.ones(1), no, no, then, pnl=np.full(1, 0.1), cost=np.ones(1))
    parts = [read(source) for source in sources]
    before = [[(p.name, p.read_bytes()) for p in sorted(source.parent.iterdir())] for source in sources]

    path = tmp_path / "all" / "d.hdf5"
    assert merge(path, sources) == sum(len(part["rewards"]) for part in parts) == 2887
    assert [[(p.name, p.read_bytes()) for p in sorted(source.parent.iterdir())] for source in sources] == before
    data, found = Dataset(path), read(path)
    assert set(found) == {*REQUIRED, "infos/pnl"}
    counts = [part["infos/episode_id"][-1] + 1 for part in parts]
    for part, earlier in zip(parts, np.cumsum([0, *counts])):
        part["infos/episode_id"] += earlier
    for key, values in found.items():
        np.testing.assert_array_equal(values, np.concatenate([part[key] for part in parts]), err_msg=key)
    assert data.meta["episodes"] == sum(counts) and data.meta["behaviours"] == [{"step": n} for n in range(4)]
    assert data.meta["task"] == task and data.meta["seed"] is data.meta["git_commit"] is None and "note" not in data.meta
    assert merge(tmp_path / "one" / "d.hdf5", sources[:1]) == 1200 and Dataset(tmp_path / "one" / "d.hdf5").meta["seed"] == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"env_id": "Other-v0"}, "env_id Other-v0: expected Toy-v0"),
        ({"panel_sha256": "ab"}, "panel_sha256 ab: expected None"),
        ({"costs": {"name": "dear"}}, "costs .*dear.*: expected None"),
        ({"split": "val"}, "split val: expected None"),
        ({"gamma": 0.8}, "gamma 0.8: expected 0.9"),
        ({"reward_scale": 2.0}, "reward_scale 2.0: expected None"),
        ({"task": {"seed": 3, "embargo": 5}}, "task .*embargo.*: expected None"),
        ({"space": ORDERS}, r"action space: Discrete\(4\): expected Box"),
        ({"space": gym.spaces.Box(-1, 1, (2,))}, r"action space: Box.*: expected Box"),
        ({"size": 4}, r"observations: .*\(4,\).*: expected .*\(3,\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_terms_are_not_joined(made, tmp_path, change, message):
    first, other = made["weights"] / "d.hdf5", tmp_path / "other" / "d.hdf5"
    collect(other, seed=1, **change if {"space", "size"} & set(change) else {"meta": change})
    with pytest.raises(DatasetError, match=f"^{re.escape(str(other))}: {message}.*, as in "):
        merge(tmp_path / "all" / "d.hdf5", [first, other])
    assert not list(tmp_path.glob("all/*"))


def test_what_cannot_be_joined(made, copy, tmp_path):
    path, target = copy(), tmp_path / "all" / "d.hdf5"
    with pytest.raises(DatasetError, match="no datasets to join; expected at least one"):
        merge(target, [])
    with pytest.raises(DatasetError, match=f"{path}: holds what .* holds; expected each dataset once"):
        merge(target, [made["weights"] / "d.hdf5", path])
    with pytest.raises(DatasetError, match="there is a dataset in this folder already"):
        merge(path, [path])
    assert Dataset(path).meta["steps"] == 180
    path.with_name("dataset_meta.json").unlink()
    with pytest.raises(DatasetError, match=f"{path}: no dataset_meta.json with .*'gamma'"):
        merge(target, [made["weights"] / "d.hdf5", path])
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(DatasetError, match=f"{path}: .*expected a"):
        merge(target, [made["weights"] / "d.hdf5", path])
    assert not list(tmp_path.glob("all/*"))


def test_episodes_of_a_dataset_follow_whole_ones_with_the_same_infos(made, tmp_path):
    source, path, other = Dataset(made["weights"] / "d.hdf5"), tmp_path / "d.hdf5", tmp_path / "other" / "d.hdf5"
    obs, action, no = np.zeros((1, SIZE)), np.zeros((1, 2)), np.zeros(1, bool)
    with DatasetWriter(path, SIZE, WEIGHTS, META, 1) as writer:
        for refused, message in (("cost", "infos/cost: None: expected"), ("profit", "infos .'profit'.: expected some of")):
            with pytest.raises(DatasetError, match=message):
                writer.extend(source, [refused])
        writer.add(obs, action, np.ones(1), no, no, obs, pnl=np.ones(1))
        with pytest.raises(DatasetError, match="d.hdf5: in mid-episode; expected all episodes to be over before"):
            writer.extend(source, ["pnl"])
        writer.add(obs, action, np.ones(1), ~no, no, obs, pnl=np.ones(1))
        for infos in ([], ["timestamp"], ["pnl", "timestamp"]):
            with pytest.raises(DatasetError, match=r"infos .*: expected \['pnl'\], as at the first step"):
                writer.extend(source, infos)
        writer.extend(source, ["pnl"])
        writer.add(obs, action, np.ones(1), no, ~no, obs, pnl=np.ones(1))
    with pytest.raises(DatasetError, match="the dataset is closed"):
        writer.extend(source, ["pnl"])
    with DatasetWriter(other, SIZE, WEIGHTS, META, 1) as writer:
        writer.extend(source, ["pnl"])
        with pytest.raises(DatasetError, match=r"infos \[\]: expected \['pnl'\]"):
            writer.add(obs, action, np.ones(1), no, ~no, obs)
        writer.add(obs, action, np.ones(1), no, ~no, obs, pnl=np.ones(1))
    assert [Dataset(p).meta["episodes"] - len(source.terminated) for p in (path, other)] == [2, 1]
    np.testing.assert_array_equal(read(path)["rewards"][2:-1], read(source.path)["rewards"])


def test_joining_takes_little_memory(tmp_path):
    """However long the sources are: 10^5 rows of 20 observations, 20 MiB, in episodes of 50."""
    rng, markets = np.random.default_rng(0), 100
    path, obs, no = tmp_path / "long" / "d.hdf5", rng.normal(size=(markets, 20)), np.zeros(markets, bool)
    with DatasetWriter(path, 20, WEIGHTS, META, markets) as writer:
        for step in range(1000):
            over = (step + np.arange(markets)) % 50 == 0
            writer.add(obs, np.zeros((markets, 2)), rng.normal(size=markets), no, over, obs)
    collect(tmp_path / "short" / "d.hdf5", size=20)
    tracemalloc.start()
    steps = merge(tmp_path / "all" / "d.hdf5", [path, tmp_path / "short" / "d.hdf5"])
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert steps == 100_180 and peak < 4.0, f"{peak:.1f} MiB"
