"""Offline data: the schema of one flat HDF5 file, its validation, and reading in bounded memory.

The layout is D4RL's (Fu et al. 2020): every key of `KEYS` has one row per transition, episodes lie one after the other, and
`timeouts` mark episodes that ended without a terminal state. d3rlpy's `MDPDataset` and CORL's scripts read it as it is. Beside
it lies `dataset_meta.json`: what wrote the data, and the sha256 that `validate` holds the file to.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import h5py
import numpy as np

SCHEMA_VERSION = 1
META = "dataset_meta.json"
CHUNK = 1024  # rows that are compressed, written, checked and read together

# What one row of each key is; None: float32 (A,) for a Box, int64 for a Discrete action space. (D,), (A,): `_layout`.
KEYS = {
    "observations": np.float32,  # (D,)
    "next_observations": np.float32,  # (D,): the true successor, also where the episode ended
    "actions": None,
    "rewards": np.float32,
    "terminals": np.float32,  # 1: the next state is worth nothing (ruin)
    "timeouts": np.float32,  # 1: the episode ended, but its next state is worth something; never together with terminals
    "dones": np.float32,  # terminals OR timeouts
    "episode_terminals": np.float32,  # 1 on an episode's last row: `dones` under the name of d3rlpy 1
    "infos/episode_id": np.int64,  # 0, 1, 2, ...
    "infos/mc_return": np.float32,  # discounted rewards from here to the end of the episode, which a timeout cuts short
    "infos/behavior_logprob": np.float32,  # of `actions`: log-probability (Discrete) or log-density (Box)
    "infos/action_mask": np.bool_,  # (A,): Discrete actions allowed at `observations`
    "infos/next_action_mask": np.bool_,  # (A,): and at `next_observations`
    "infos/pnl": np.float32,  # of the step, like the next two, in fractions of equity: gross return
    "infos/cost": np.float32,  # all costs; the net return is pnl - cost + interest
    "infos/turnover": np.float32,  # sum of |weight changes|
    "infos/symbol_id": np.int64,
    "infos/timestamp": np.int64,  # of the bar at which the action was decided: nanoseconds since 1970, UTC
}
COMPUTED = ("infos/episode_id", "infos/mc_return")  # known when an episode ends
REQUIRED = (*(key for key in KEYS if not key.startswith("infos/")), *COMPUTED)  # in every file that DatasetWriter made
FOREIGN = ("observations", "actions", "rewards", "terminals")  # in every other file
TRANSITION = ("observations", "actions", "rewards", "next_observations", "terminals")
FLAGS = ("terminals", "timeouts", "dones", "episode_terminals")
SUCCESSORS = (("next_observations", "observations"), ("infos/next_action_mask", "infos/action_mask"))
OPTIONAL = tuple(key.removeprefix("infos/") for key in KEYS if key not in REQUIRED)  # what `DatasetWriter.add` takes by name

# What whoever makes a dataset must say about it; None where there is no such thing. `rewards` are the environment's times
# `reward_scale`; `behaviours` lists the policies that acted, each with the sha256 of its checkpoint.
PROVENANCE = ("env_id", "panel_sha256", "costs", "git_commit", "behaviours", "seed", "split", "gamma", "reward_scale")
MEASURED = ("sha256", "steps", "episodes", "shapes", "dtypes", "action_space", "observation_mean", "observation_std")

_KINDS = {np.float32: "fiub", np.int64: "iu", np.bool_: "b"}  # kinds of NumPy dtypes that are read as each of these


class DatasetError(ValueError):
    """A dataset, or what was to become one, is not as it should be; the message names file, key and row."""


class Contents(NamedTuple):
    """What `validate` found."""

    meta: dict  # of dataset_meta.json; without one: `MEASURED`, and under "inferred" what had to be assumed
    action_space: gym.Space
    starts: np.ndarray  # (episodes + 1,) int64: first row of each episode, and the number of rows
    terminated: np.ndarray  # (episodes,) bool: ended by a terminal state
    keys: dict[str, tuple[type, tuple[int, ...]]]  # keys of the file: dtype and shape of a row as read


def validate(path: str | Path, action_space: gym.Space | None = None) -> Contents:
    """Check a dataset row by row, in bounded memory (the file is only read); returns what it holds.

    A file with `dataset_meta.json` beside it must be what that says, byte for byte. One without may come from anywhere: it
    needs the keys `FOREIGN`, and its hash is not checked. What it lacks is taken from the rest, and said in meta["inferred"]:
    timeouts from dones or episode_terminals, else none; the last row ends an episode; next_observations from the next row (a
    timeout has none); bounds of actions from `action_space`, else from the actions.

    action_space: what the actions must fit; the same as in `dataset_meta.json`, if there is one.

    Raises DatasetError naming file, key, row (counted from 0) and what was expected: no HDF5 file, truncated, corrupted,
    another hash or schema version; a key missing, or of another length, shape or kind; NaN or infinity; flags that are not 0 or
    1 or disagree; episode ids that do not go up by one with each episode; a next observation or mask that is not the next
    row's; actions out of bounds or masked out.
    """
    path = Path(path)
    if not path.is_file() or not h5py.is_hdf5(path):
        raise DatasetError(f"{path}: expected an HDF5 file")
    meta, sha256 = _read_meta(path), sha256_of(path)
    if meta is not None and meta["sha256"] != sha256:
        raise DatasetError(f"{path}: sha256 {sha256}: expected {meta['sha256']}, as in {META}: the file has changed since")
    return contents(path, sha256, meta, action_space)


def contents(path: Path, sha256: str, meta: dict | None, action_space: gym.Space | None) -> Contents:
    try:
        with h5py.File(path, "r") as file:
            return _validate(path, file, sha256, meta, action_space)
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for damage
        raise DatasetError(f"{path}: truncated or corrupted; expected a whole HDF5 file ({error})") from error


def _validate(path, file: h5py.File, sha256: str, meta: dict | None, action_space: gym.Space | None) -> Contents:
    required = FOREIGN if meta is None else REQUIRED
    for key in required:
        if not isinstance(file.get(key), h5py.Dataset):
            raise DatasetError(f"{path}: {key}: missing; expected {list(required)}")
    observations = file["observations"]
    if observations.ndim != 2 or 0 in observations.shape:
        raise DatasetError(f"{path}: observations: shape {observations.shape}: expected (N, D), neither of them 0")
    steps, size = observations.shape
    if meta is None:
        space = _infer_space(path, file) if action_space is None else action_space
    else:
        space = _space(meta["action_space"])
        if action_space is not None and _describe(action_space) != meta["action_space"]:
            raise DatasetError(f"{path}: actions: made for {space}: expected {action_space}")
    keys = {key: row for key, row in layout(path, size, space).items() if isinstance(file.get(key), h5py.Dataset)}
    for key, (dtype, shape) in keys.items():
        check_array(path, key, file[key], (steps, *shape), dtype)

    moments, before = _Moments(size), None
    starts, terminated = [0], []
    for first in range(0, steps, CHUNK):
        rows = {key: file[key][first : first + CHUNK].astype(dtype) for key, (dtype, _) in keys.items()}
        if meta is None:
            _fill_in_flags(rows, last=first + CHUNK >= steps)
        check_rows(path, rows, space, "row", first)
        _check_order(path, rows, before, first, len(terminated))
        before = {key: values[-1:] for key, values in rows.items()}
        ends = np.flatnonzero(rows["dones"])
        starts.extend(first + ends + 1)
        terminated.extend(rows["terminals"][ends] == 1.0)
        moments.update(rows["observations"])
    if starts[-1] != steps:
        raise DatasetError(f"{path}: dones, row {steps - 1}: 0.0: expected 1 on the last row")
    found = {
        "sha256": sha256, "steps": steps, "episodes": len(terminated),
        "shapes": {key: list(file[key].shape) for key in keys}, "dtypes": {key: str(file[key].dtype) for key in keys},
    }  # fmt: skip
    for name in found if meta else ():
        if meta[name] != found[name]:
            raise DatasetError(f"{path}: {name} {found[name]}: expected {meta[name]}, as in {META}")
    if meta is None:
        meta = {"schema_version": SCHEMA_VERSION, **found, "action_space": _describe(space), **moments.describe()}
        meta["inferred"] = _assumptions(keys, action_space)
    return Contents(meta, space, np.array(starts, np.int64), np.array(terminated, bool), keys)


class Dataset:
    """A validated dataset: splits it by episode and reads it in bounded memory. Arguments and errors are those of `validate`.

    Attributes: path, and the fields of `Contents`. A transition whose successor is not known (a timeout in a file without
    next_observations) is left out wherever transitions are read, as d3rlpy does.
    """

    def __init__(self, path: str | Path, action_space: gym.Space | None = None):
        self.path = Path(path)
        self.meta, self.action_space, self.starts, self.terminated, self.keys = validate(path, action_space)

    def split_episodes(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (int64, ascending) of episodes to train on, and of a random `fraction` of all, at least one, to validate on.

        Episodes of one split of a panel overlap in time: to choose a model on other dates, collect a dataset of another split.
        Raises DatasetError for a fraction that is not in (0, 1) or leaves no episode to train on.
        """
        episodes = len(self.terminated)
        held_out = max(1, round(fraction * episodes)) if 0.0 < fraction < 1.0 else episodes
        if held_out >= episodes:
            raise DatasetError(f"{self.path}: fraction={fraction} of {episodes} episodes: expected in (0, 1), some to train on")
        order = np.random.default_rng(seed).permutation(episodes)
        return np.sort(order[held_out:]), np.sort(order[:held_out])

    def blocks(self, indices, keys: tuple[str, ...] = TRANSITION, rng: np.random.Generator | None = None) -> Iterator[dict]:
        """Every transition of the episodes `indices` once, at most CHUNK at a time: {key: (rows, ...)}, types as in `KEYS`.

        In the order of the file; with `rng` blocks come in random order. Raises DatasetError for a key that is not in the file,
        and for episodes that do not exist, come twice or have no transition.
        """
        return self._blocks(*self.ranges(indices, keys), keys, rng)

    def batches(
        self, indices, batch_size: int, seed: int, memory_mb: float = 1024.0, keys: tuple[str, ...] = TRANSITION
    ) -> Iterator[dict[str, np.ndarray]]:
        """Random batches without end of transitions of the episodes `indices`: {key: (batch_size, ...)}, types as in `KEYS`.

        If they fit into `memory_mb` MiB, they are loaded once and drawn uniformly. Else the file is read again and again, its
        blocks in random order, through a shuffle buffer of that size: each transition comes once a pass. The same seed and
        memory_mb give the same batches.

        Raises DatasetError as `blocks` does, for a batch_size below 1, and for too small a memory_mb.
        """
        starts, stops = self.ranges(indices, keys)
        if batch_size < 1:
            raise DatasetError(f"{self.path}: batch_size={batch_size}: expected at least 1")
        row_bytes = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in map(self._row, keys))
        # beside the buffer: a block as stored, converted, and its chosen rows; a batch, and that which the caller still holds
        spare = 4 * CHUNK + 2 * batch_size
        capacity = int(memory_mb * 2**20 / row_bytes) - spare
        total = int((stops - starts).sum())
        if total <= capacity:
            return self._sampled(starts, stops, total, batch_size, seed, keys)
        if capacity < CHUNK + batch_size:
            least = math.ceil((spare + CHUNK + batch_size) * row_bytes / 2**20)
            raise DatasetError(f"{self.path}: memory_mb={memory_mb}: expected at least {least} for batch_size={batch_size}")
        return self._streamed(starts, stops, capacity, batch_size, seed, keys)

    def _row(self, key):
        return self.keys["observations" if key == "next_observations" else key]

    def ranges(self, indices, keys):
        """First rows and ends (int64, ascending) of the transitions of the episodes `indices`; raises as `blocks` does."""
        known = {*self.keys, "next_observations"}
        if not keys or not known.issuperset(keys):
            raise DatasetError(f"{self.path}: keys {list(keys)}: expected some of {sorted(known)}")
        order, episodes = np.sort(np.asarray(indices, np.int64)), len(self.terminated)
        if order.ndim != 1 or not len(order) or order[0] < 0 or order[-1] >= episodes or (np.diff(order) == 0).any():
            raise DatasetError(f"{self.path}: episodes {indices}: expected some of 0 to {episodes - 1}, each once")
        starts, stops = self.starts[order], self.starts[order + 1].copy()
        if "next_observations" not in self.keys:
            stops -= ~self.terminated[order]
        if (stops == starts).all():
            raise DatasetError(f"{self.path}: episodes {indices}: no transition has a known successor; expected at least one")
        return starts, stops

    def read(self, file, keys, first, stop):
        """Rows first to stop of the open h5py `file`, whole: {key: (stop - first, ...)}."""
        rows = {}
        for key in keys:
            dtype, _ = self._row(key)
            if key in file:
                rows[key] = file[key][first:stop].astype(dtype, copy=False)
            else:  # the next row's observation; the last one of an episode stands for its successor, which is never valued
                known = file["observations"][first : stop + 1].astype(dtype, copy=False)
                rows[key] = np.concatenate([known[1:], known[-1:]])[: stop - first]
                ends = self.starts[np.searchsorted(self.starts, first, "right") : np.searchsorted(self.starts, stop, "right")]
                rows[key][ends - 1 - first] = known[ends - 1 - first]
        return rows

    def _blocks(self, starts, stops, keys, rng):
        firsts = np.arange(0, self.starts[-1], CHUNK)
        with h5py.File(self.path, "r") as file:
            for first in firsts if rng is None else rng.permutation(firsts):
                stop = min(first + CHUNK, self.starts[-1])
                some = slice(np.searchsorted(stops, first, "right"), np.searchsorted(starts, stop))
                parts = [np.arange(max(a, first), min(b, stop)) - first for a, b in zip(starts[some], stops[some])]
                wanted = np.concatenate(parts or [[]]).astype(np.int64)
                if len(wanted):
                    rows = self.read(file, keys, first, stop)
                    yield {key: values[wanted] for key, values in rows.items()}

    def _allocate(self, rows, keys):
        return {key: np.empty((rows, *shape), dtype) for key, (dtype, shape) in zip(keys, map(self._row, keys))}

    def _sampled(self, starts, stops, total, batch_size, seed, keys):
        data, filled, rng = self._allocate(total, keys), 0, np.random.default_rng(seed)
        for block in self._blocks(starts, stops, keys, None):
            filled = _append(data, filled, block)
        while True:
            pick = rng.integers(total, size=batch_size)
            yield {key: values.take(pick, axis=0) for key, values in data.items()}

    def _streamed(self, starts, stops, capacity, batch_size, seed, keys):
        buffer, filled, rng = self._allocate(capacity, keys), 0, np.random.default_rng(seed)
        blocks = (block for _ in itertools.count() for block in self._blocks(starts, stops, keys, rng))
        while True:
            while filled + CHUNK <= capacity:
                filled = _append(buffer, filled, next(blocks))
            pick = rng.choice(filled, batch_size, replace=False)
            yield {key: values[pick] for key, values in buffer.items()}
            filled -= batch_size  # the last rows, if they stay, take the places of those that left
            holes, movers = pick[pick < filled], np.setdiff1d(np.arange(filled, filled + batch_size), pick)
            for values in buffer.values():
                values[holes] = values[movers]


class _Moments:
    """Mean and standard deviation (ddof=0) of each column of blocks of rows, in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self, size: int):
        self.count, self.mean, self.squares = 0, np.zeros(size), np.zeros(size)

    def update(self, rows: np.ndarray):
        rows = rows.astype(np.float64)
        total = self.count + len(rows)
        mean = rows.mean(axis=0)
        shift = mean - self.mean
        self.squares += ((rows - mean) ** 2).sum(axis=0) + shift**2 * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def describe(self) -> dict[str, list[float]]:
        std = np.sqrt(self.squares / self.count)
        return {"observation_mean": self.mean.tolist(), "observation_std": std.tolist()}


def _append(buffer: dict, filled: int, block: dict) -> int:
    """Put a block's rows into `buffer` from row `filled`; returns the rows that are filled now."""
    for key, values in block.items():
        stop = filled + len(values)
        buffer[key][filled:stop] = values
    return stop


def layout(path, size: int, space: gym.Space) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Dtype and shape of one row of every key that a dataset with `size` observations and actions of `space` can have.

    Raises DatasetError, which begins with `path`, for actions that are neither Discrete from 0 nor a Box of shape (A,).
    """
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        action, mask = (np.int64, ()), (int(space.n),)
    elif isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        action, mask = (np.float32, space.shape), None
    else:
        raise DatasetError(f"{path}: actions of {space}: expected a Discrete space from 0 or a Box of shape (A,)")
    shapes = {"observations": (size,), "next_observations": (size,), "infos/action_mask": mask, "infos/next_action_mask": mask}
    rows = {key: (dtype, shapes.get(key, ())) for key, dtype in KEYS.items()} | {"actions": action}
    return {key: row for key, row in rows.items() if row[1] is not None}


def check_array(path, key: str, array, shape: tuple[int, ...], dtype):
    """Raise DatasetError unless `array`, NumPy's or h5py's, has this shape and a dtype that is read as `dtype`."""
    if array.shape[:1] != shape[:1]:
        raise DatasetError(f"{path}: {key}: {array.shape[:1]} rows: expected {shape[0]}")
    if array.shape != shape or array.dtype.kind not in _KINDS[dtype]:
        raise DatasetError(f"{path}: {key}: {array.dtype} {array.shape}: expected {np.dtype(dtype)} {shape}")


def check_rows(path, rows: Mapping[str, np.ndarray], space: gym.Space, unit: str, first: int = 0):
    """Raise DatasetError at the first value that no dataset may hold; the error says `unit` first, first + 1, ..."""

    def refuse(key, bad, expected):
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise DatasetError(f"{path}: {key}, {unit} {first + at[0]}: {rows[key][at]}: expected {expected}")

    for key, values in rows.items():
        if values.dtype == np.float32:
            refuse(key, ~np.isfinite(values), "a finite number")
        if key in FLAGS:
            refuse(key, (values != 0.0) & (values != 1.0), "0 or 1")
    refuse("timeouts", rows["timeouts"] * rows["terminals"] == 1.0, "0 where terminals is 1")
    refuse("dones", rows["dones"] != rows["terminals"] + rows["timeouts"], "terminals OR timeouts")
    refuse("episode_terminals", rows["episode_terminals"] != rows["dones"], "1 on an episode's last row, else 0, as dones")
    actions = rows["actions"]
    if isinstance(space, gym.spaces.Box):
        refuse("actions", (actions < space.low) | (actions > space.high), f"an element of {space}")
        return
    refuse("actions", (actions < 0) | (actions >= space.n), f"0 to {space.n - 1}")
    if "infos/action_mask" in rows:
        refuse("actions", ~rows["infos/action_mask"][np.arange(len(actions)), actions], "one that infos/action_mask allows")
    if "infos/next_action_mask" in rows:
        none = ~rows["infos/next_action_mask"].any(axis=1)
        refuse("infos/next_action_mask", none & (rows["terminals"] == 0.0), "an action that is allowed")


def _check_order(path, rows: dict, before: dict | None, first: int, episode: int):
    """Raise DatasetError where `rows` do not continue `before` (the row before, or None) and each other.

    first, episode: number of their first row, and of the episode that it belongs to.
    """
    if "infos/episode_id" in rows:
        expected = episode + np.cumsum(rows["dones"]).astype(np.int64) - rows["dones"].astype(np.int64)
        for row in np.flatnonzero(rows["infos/episode_id"] != expected)[:1]:
            found = f"{path}: infos/episode_id, row {first + row}: {rows['infos/episode_id'][row]}"
            raise DatasetError(f"{found}: expected {expected[row]}: one more after each end of an episode")
    if before is not None:
        rows, first = {key: np.concatenate([before[key], values]) for key, values in rows.items()}, first - 1
    for successor, key in SUCCESSORS:
        if key in rows and successor in rows:
            differs = (rows[successor][:-1] != rows[key][1:]).any(axis=1) & (rows["dones"][:-1] == 0.0)
            for row in np.flatnonzero(differs)[:1]:
                raise DatasetError(f"{path}: {successor}, row {first + row}: expected {key} of the next row in mid-episode")


def _fill_in_flags(rows: dict, last: bool):
    """What a file from elsewhere may leave out; where it has both, a terminal state counts and the timeout does not."""
    terminals = rows["terminals"]
    ended = rows.get("dones", rows.get("episode_terminals", terminals))
    rows["timeouts"] = rows.get("timeouts", ended) * (1.0 - terminals)
    if last and not terminals[-1]:
        for key in FLAGS[1:]:
            if key in rows:
                rows[key][-1] = 1.0
    for key in ("dones", "episode_terminals"):
        rows.setdefault(key, terminals + rows["timeouts"])


def _assumptions(keys, action_space: gym.Space | None) -> list[str]:
    """What `validate` takes for granted about a file without meta."""
    ends = [key for key in ("timeouts", "dones", "episode_terminals") if key in keys]
    notes = [f"no {META}: hash not checked", "the last row ends an episode"]
    if "timeouts" not in keys:
        notes.append(f"timeouts from {ends[0]}" if ends else "no episode timed out")
    if "next_observations" not in keys:
        notes.append("next_observations from the next row; transitions that timed out left out")
    if action_space is None:
        notes.append("bounds of actions from the actions")
    return notes


def _infer_space(path, file: h5py.File) -> gym.Space:
    """The smallest space that holds the file's actions; as many Discrete actions as a mask has columns, if there is one."""
    actions = file["actions"]
    blocks = (actions[first : first + CHUNK] for first in range(0, len(actions), CHUNK))
    if actions.ndim == 1 and actions.dtype.kind in "iu":
        masks = [file[key].shape[-1] for key in ("infos/action_mask", "infos/next_action_mask") if key in file]
        return gym.spaces.Discrete(masks[0] if masks else max(1, 1 + max(int(block.max()) for block in blocks)))
    if actions.ndim == 2 and actions.dtype.kind == "f":
        low, high = np.float32(np.inf), np.float32(-np.inf)
        for block in blocks:  # numbers that are not finite are refused later, by their row
            block = np.nan_to_num(block.astype(np.float32), posinf=0.0, neginf=0.0)
            low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        return gym.spaces.Box(low, high)
    raise DatasetError(f"{path}: actions: {actions.dtype} {actions.shape}: expected integers (N,) or floats (N, A)")


def _describe(space: gym.Space) -> dict:
    """An action space as JSON can hold it; a bound that is infinite is None."""
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n)}
    low, high = ([x if math.isfinite(x) else None for x in bound.tolist()] for bound in (space.low, space.high))
    return {"type": "Box", "low": low, "high": high}


def _space(description: dict) -> gym.Space:
    """The inverse of `_describe`."""
    if description["type"] == "Discrete":
        return gym.spaces.Discrete(description["n"])
    low = np.array([-np.inf if x is None else x for x in description["low"]], np.float32)
    return gym.spaces.Box(low, np.array([np.inf if x is None else x for x in description["high"]], np.float32))


def _read_meta(path: Path) -> dict | None:
    """What dataset_meta.json beside `path` says; None if there is none."""
    beside = path.with_name(META)
    if not beside.exists():
        return None
    try:
        meta = json.loads(beside.read_text())
        missing = [name for name in ("schema_version", *MEASURED, *PROVENANCE) if name not in meta]
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{beside}: expected a JSON object ({error})") from error
    if missing:
        raise DatasetError(f"{beside}: missing {missing}; expected them of every dataset")
    if meta["schema_version"] != SCHEMA_VERSION:
        raise DatasetError(f"{beside}: schema_version {meta['schema_version']}: expected {SCHEMA_VERSION}")
    return meta


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
