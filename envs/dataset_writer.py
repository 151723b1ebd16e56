"""Write a dataset in the layout of dataset.py: step by step, whole episodes of a policy, or other datasets joined."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from scipy.signal import lfilter

from envs.costs import RECORD
from envs.dataset import (
    CHUNK,
    FLAGS,
    KEYS,
    MEASURED,
    META,
    OPTIONAL,
    PROVENANCE,
    REQUIRED,
    Dataset,
    DatasetError,
    check_array,
    check_rows,
    contents,
    layout,
    sha256_of,
)  # fmt: skip
from envs.ledger import write_json

COSTS = slice(RECORD.index("commission"), RECORD.index("financing") + 1)
JOINED = ("env_id", "panel_sha256", "costs", "split", "gamma", "reward_scale", "task")  # must be the same to be joined; a
# task but for its seed, of which the panel's hash says all that matters

# act(observations (n, D), action masks (n, A) or None, rows of the panel (n,) or None, whether an episode begins (n,) bool)
# -> actions (n, ...) inside the action space, and their log-probabilities (n,) or None
Actor = Callable[[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray], tuple[np.ndarray, np.ndarray | None]]


class DatasetWriter:
    """Collects the steps of `num_envs` markets and leaves `path` with `dataset_meta.json` beside it when it is closed.

    observation_size: D. action_space: of one market, a Discrete from 0 or a Box of shape (A,). meta: at least `PROVENANCE`.

    A market's steps are kept until its episode ends, so that episodes are contiguous in the file: memory holds about four
    times `num_envs` of the longest episode at most. All goes to `path` + ".part", which `close` moves into place: a crash
    leaves no dataset. As a context manager it closes at the end, and drops the data if an exception passes.

    Raises DatasetError if `path` does not end in .hdf5 or exists, its folder holds another dataset, the action space is of
    another kind, or `meta` lacks an entry, or has one of `MEASURED`, or a gamma outside [0, 1].
    """

    def __init__(self, path: str | Path, observation_size: int, action_space: gym.Space, meta: dict, num_envs: int):
        self.path = Path(path)
        if self.path.suffix != ".hdf5":
            raise DatasetError(f"{path}: expected a name that ends in .hdf5")
        beside = self.path.with_name(META)
        if self.path.exists() or (beside.exists() and any(self.path.parent.glob("*.hdf5"))):
            raise DatasetError(f"{path}: there is a dataset in this folder already; expected another folder")
        missing = [name for name in PROVENANCE if name not in meta]
        taken = [name for name in ("schema_version", *MEASURED) if name in meta]
        if missing or taken:
            raise DatasetError(f"{path}: meta: missing {missing}, not to be given: {taken}; expected {list(PROVENANCE)}")
        if not 0.0 <= meta["gamma"] <= 1.0:
            raise DatasetError(f"{path}: meta: gamma={meta['gamma']}: expected 0 to 1")
        if num_envs < 1 or observation_size < 1:
            raise DatasetError(f"{path}: num_envs={num_envs}, observation_size={observation_size}: expected at least 1")
        self.meta, self.num_envs, self.space = dict(meta), num_envs, action_space
        self.episodes = self.steps = 0  # that are finished, and rows that are in the file
        self._layout = layout(path, observation_size, action_space)
        self._buffer = None  # (slots, num_envs) rows of all keys: what comes first says which infos there are
        self._length = 0  # slots in use
        self._start = np.zeros(num_envs, np.int64)  # slot of the first step of each market's episode
        self._pending, self._pending_rows = [], 0  # finished episodes that are not in the file yet
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(self.path.name + ".part")
        self._file = h5py.File(self._part, "w")

    def add(self, obs, actions, rewards, terminated, truncated, next_obs, **infos):
        """One step of every market (n = num_envs).

        obs, next_obs (n, D): `next_obs` is the true successor: where an episode ended `infos["final_obs"]`, not what SAME_STEP
        autoreset returned. actions (n, A) or (n,), rewards (n,), terminated, truncated (n,) bool; both count as terminated.
        infos: any of `OPTIONAL`, the same ones at every step: masks (n, A) bool, the others (n,).

        Raises DatasetError, and takes nothing, for other shapes, kinds or names, numbers that are not finite, actions that are
        masked out or out of bounds, and an `obs` in mid-episode that is not the last step's `next_obs`.
        """
        self._check_open()
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        for name, values in (("terminated", terminated), ("truncated", truncated)):
            check_array(self.path, name, values, (self.num_envs,), np.bool_)
        done = terminated | truncated
        columns = {
            "observations": obs, "next_observations": next_obs, "actions": actions, "rewards": rewards, "terminals": terminated,
            "timeouts": truncated & ~terminated, "dones": done, "episode_terminals": done,
        } | {f"infos/{name}": values for name, values in infos.items()}  # fmt: skip
        self._check_infos(infos)
        self._make_room()
        slab = self._buffer[self._length]
        for key, values in columns.items():
            values = np.asarray(values)
            dtype, shape = self._layout[key]
            check_array(self.path, key, values, (self.num_envs, *shape), dtype)
            with np.errstate(over="ignore"):  # too large for float32: found below as infinity
                slab[key] = values
        check_rows(self.path, {key: slab[key] for key in columns}, self.space, "market")
        known = self._buffer[self._length - 1]["next_observations"]  # unused where an episode begins
        jumps = np.flatnonzero((self._start < self._length) & (slab["observations"] != known).any(axis=1))
        if len(jumps):
            raise DatasetError(
                f"{self.path}: observations, market {jumps[0]}: expected the last step's next_obs in mid-episode"
            )
        self._length += 1
        for market in np.flatnonzero(done):
            self._finish(market)

    def extend(self, source: Dataset, infos: Sequence[str]):
        """Append all episodes of another dataset, with these of its infos (`OPTIONAL`): those of the rows before, if any.

        Raises DatasetError, and takes nothing, where `source` lacks one of them or has another gamma, action space, or type or
        size of a key; while an episode is unfinished here; and after `close`.
        """
        self._check_open()
        if (self._start < self._length).any():
            raise DatasetError(f"{self.path}: in mid-episode; expected all episodes to be over before {source.path} follows")
        self._check_infos(infos)
        row = self._buffer.dtype
        for name, found, expected in (
            ("gamma", source.meta.get("gamma"), self.meta["gamma"]), ("action space", source.action_space, self.space),
            *((key, source.keys.get(key), self._layout[key]) for key in row.names),
        ):  # fmt: skip
            if found != expected:
                raise DatasetError(f"{source.path}: {name}: {found}: expected {expected}, as in {self.path}")
        everything = np.arange(len(source.terminated))
        for block in source.blocks(everything, row.names):
            part = np.empty(len(block["rewards"]), row)
            for key, values in block.items():
                part[key] = values
            part["infos/episode_id"] += self.episodes
            self._queue(part)
        self.episodes += len(everything)

    def close(self):
        """Count unfinished episodes as timeouts, write what is left, and put the file and its meta in place.

        Raises DatasetError if there was no step. Closing again does nothing.
        """
        if self._file is None:
            return
        for market in np.flatnonzero(self._start < self._length):
            last = self._buffer[self._length - 1]
            for key in FLAGS[1:]:
                last[key][market] = 1.0
            self._finish(market)
        if not self.episodes:
            self.drop()
            raise DatasetError(f"{self.path}: no steps; expected at least one")
        self._write(last=True)
        self._file.close()
        self._file = None
        content = contents(self._part, sha256_of(self._part), None, self.space).meta
        del content["inferred"]
        # The meta first: a crash in between leaves no dataset, rather than one whose hash nobody checks.
        write_json(self.path.with_name(META), content | self.meta)
        os.replace(self._part, self.path)

    def drop(self):
        """Throw away what was collected."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._part.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:
            self.drop()

    def _check_open(self):
        if self._file is None:
            raise DatasetError(f"{self.path}: the dataset is closed; expected no more steps")

    def _check_infos(self, infos):
        """All rows have the same infos: until any have been taken, these."""
        if not (self._length or self.episodes):
            unknown = [name for name in infos if name not in OPTIONAL or f"infos/{name}" not in self._layout]
            if unknown:
                raise DatasetError(
                    f"{self.path}: infos {unknown}: expected some of {OPTIONAL}, masks for Discrete actions only"
                )
            keys = [key for key in KEYS if key in REQUIRED or key.removeprefix("infos/") in infos]
            self._buffer = np.zeros((64, self.num_envs), [(key, *self._layout[key]) for key in keys])
        expected = [key.removeprefix("infos/") for key in self._buffer.dtype.names if key not in REQUIRED]
        if set(infos) != set(expected):
            raise DatasetError(f"{self.path}: infos {sorted(infos)}: expected {sorted(expected)}, as at the first step")

    def _make_room(self):
        if self._length < len(self._buffer):
            return
        first = self._start.min()
        used = self._buffer[first:]
        if 2 * len(used) > len(self._buffer):
            self._buffer = np.zeros((2 * len(self._buffer), self.num_envs), self._buffer.dtype)
        self._buffer[: len(used)] = used
        self._start -= first
        self._length = len(used)

    def _finish(self, market):
        episode = self._buffer[self._start[market] : self._length, market].copy()
        episode["infos/episode_id"] = self.episodes
        rewards = episode["rewards"].astype(np.float64)
        episode["infos/mc_return"] = lfilter([1.0], [1.0, -self.meta["gamma"]], rewards[::-1])[::-1]
        self._start[market] = self._length
        self.episodes += 1
        self._queue(episode)

    def _queue(self, rows):
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows >= CHUNK:
            self._write()

    def _write(self, last=False):
        """Append the finished episodes, all of them if this is the last time, else whole chunks only: none is packed twice."""
        rows = np.concatenate(self._pending)
        count = len(rows) if last else len(rows) // CHUNK * CHUNK
        for key in rows.dtype.names:
            if key not in self._file:
                dtype, shape = self._layout[key]
                self._file.create_dataset(  # lzf: twice as fast as gzip; fletcher32 finds damage where no hash is known
                    key, (0, *shape), dtype, maxshape=(None, *shape), chunks=(CHUNK, *shape),
                    compression="lzf", shuffle=True, fletcher32=True,
                )  # fmt: skip
            self._file[key].resize(self.steps + count, axis=0)
            self._file[key][self.steps :] = rows[key][:count]
        self.steps += count
        self._pending, self._pending_rows = [rows[count:].copy()], len(rows) - count


def log_episodes(
    path: str | Path, envs: gym.vector.VectorEnv, act: Actor, episodes: int, meta: dict, seed: int, timestamps=None
) -> int:
    """Write at least `episodes` episodes of a policy on `envs` (SAME_STEP autoreset) to a dataset; returns its steps.

    path, meta: as `DatasetWriter` takes them; seed: as `envs.reset` does. Actions are recorded as executed. Markets add pnl,
    cost and turnover, and, if the panel's `timestamps` (T,) datetime64 are given, the time of the bar at which each action
    was decided. The markets stop together: episodes that are not over then count as timeouts. As in `ledger.backtest`, a policy
    that keeps account of what it earns has an attribute `after`, called after each step with the rewards (n,) and whether each
    market's episode is over (n,).

    Raises DatasetError as `DatasetWriter` does, and for episodes below 1; what `envs` and `act` raise passes. Neither leaves a
    dataset.
    """
    if episodes < 1:
        raise DatasetError(f"{path}: episodes={episodes}: expected at least 1")
    obs, infos = envs.reset(seed=seed)
    n = envs.num_envs
    begun = np.ones(n, bool)
    size = int(np.prod(envs.single_observation_space.shape))
    with DatasetWriter(path, size, envs.single_action_space, meta, n) as writer:
        while writer.episodes < episodes:
            mask, row = infos.get("action_mask"), infos.get("row")
            obs = np.asarray(obs, np.float32).reshape(n, size)
            actions, logprob = act(obs, mask, row, begun)
            next_obs, rewards, terminated, truncated, infos = envs.step(actions)
            over = terminated | truncated
            if hasattr(act, "after"):
                act.after(rewards, over)
            successor = np.array(next_obs, np.float32).reshape(n, size)
            if over.any():
                successor[over] = np.stack(infos["final_obs"][over]).reshape(-1, size)
            known = {} if logprob is None else {"behavior_logprob": logprob}
            if mask is not None:
                known["action_mask"], known["next_action_mask"] = mask, infos["action_mask"].copy()
                if over.any():
                    known["next_action_mask"][over] = infos["final_action_mask"][over]
            if "record" in infos:
                record = infos["record"]
                known["pnl"], known["turnover"] = record[:, RECORD.index("gross_return")], record[:, RECORD.index("turnover")]
                known["cost"] = record[:, COSTS].sum(axis=1)
                if timestamps is not None:
                    known["timestamp"] = timestamps[infos["decided_at"]].astype("datetime64[ns]").astype(np.int64)
            writer.add(obs, actions, rewards, terminated, truncated, successor, **known)
            obs, begun = next_obs, over
    return writer.steps


def merge(path: str | Path, sources: Sequence[str | Path]) -> int:
    """Join datasets of the same terms (`JOINED`) into one, its behaviours those of all; returns its steps.

    The sources stay as they are. Keeps the infos that all of them have; of the meta the terms, and `seed` and `git_commit`
    where all agree, else None. Memory holds two blocks of rows, whatever the sources' length.

    Raises DatasetError naming the file and the field that differs from the first's, for a source that comes twice, and as
    `Dataset` and `DatasetWriter` do.
    """
    if not sources:
        raise DatasetError(f"{path}: no datasets to join; expected at least one")
    datasets = [Dataset(source) for source in sources]
    first, seen = datasets[0], {}
    for other in datasets:
        lacking = [name for name in PROVENANCE if name not in other.meta]
        if lacking:
            raise DatasetError(f"{other.path}: no {META} with {lacking}; expected what DatasetWriter wrote")
        for name in JOINED:
            found, expected = _term(other, name), _term(first, name)
            if found != expected:
                raise DatasetError(f"{other.path}: {name} {found}: expected {expected}, as in {first.path}")
        twin = seen.setdefault(other.meta["sha256"], other.path)
        if twin is not other.path:
            raise DatasetError(f"{other.path}: holds what {twin} holds; expected each dataset once")
    infos = [name for name in OPTIONAL if all(f"infos/{name}" in other.keys for other in datasets)]
    given = {name: first.meta[name] for name in (*PROVENANCE, "task") if name in first.meta}
    for name in ("seed", "git_commit"):
        if any(other.meta[name] != first.meta[name] for other in datasets):
            given[name] = None
    given["behaviours"] = [behaviour for other in datasets for behaviour in other.meta["behaviours"] or ()]
    with DatasetWriter(path, first.keys["observations"][1][0], first.action_space, given, num_envs=1) as writer:
        for other in datasets:
            writer.extend(other, infos)
    return writer.steps


def _term(dataset: Dataset, name: str):
    term = dataset.meta.get(name)
    return {key: value for key, value in term.items() if key != "seed"} if name == "task" and term else term
