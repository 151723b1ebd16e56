"""MarketVectorEnv: N markets at once over one kernel, as a Gymnasium VectorEnv; MarketEnv: one of them as an Env.

An environment module brings scalar functions `reset_one`, `step_one` and the loops around them; this module brings all
that the environments share: seeds, buffers, threads, autoreset, and what a state needs to be saved and restored.

Autoreset is SAME_STEP: where an episode ends, `step` returns the first observation of the next one, and
`infos["final_obs"]` holds the last observation of the old one. Episodes almost always end by truncation (the window is
over), so bootstrapping from `final_obs` decides results; `terminated` means ruin.
"""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numba import config, set_num_threads

from envs.costs import RECORD
from envs.episodes import STATE, assigned_tasks, market_seeds
from envs.panel import Panel, Split

PARALLEL_FROM = 32  # markets; below, starting threads costs more than they save


class Buffers(NamedTuple):
    """What kernels write, one row a market."""

    obs: np.ndarray  # (n, D) float32
    final_obs: np.ndarray  # (n, D) float32, valid where an episode ended
    reward: np.ndarray  # (n,) float32
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool
    mask: np.ndarray  # (n, A) bool: actions allowed at `obs`; (n, 0) for continuous actions
    final_mask: np.ndarray  # the same at `final_obs`
    record: np.ndarray  # (n, len(RECORD)) float64: accounting of the step
    components: np.ndarray  # (n, C) float64: reward components of the step, unweighted
    row: np.ndarray  # (n,) int64: row of the panel at which the action was decided
    choice: np.ndarray  # (n, ...): what the environment made of the action (LeadLag-v0: the lookback; Portfolio-v0: weights)
    scratch: np.ndarray  # (n, ...) float64: for kernels to work in


class MarketVectorEnv(gym.vector.VectorEnv):
    """Base of the vectorised markets. Subclasses set `component_names`, call `__init__`, and define `_market` (read-only
    arrays), `_parameters()` (scalars that may change between steps) and the loops `_reset_loops`, `_step_loops`:
    triples (serial, parallel, cuda) of functions (market, parameters, state, memory, [actions,] buffers), of which the last
    takes parameters as a table of one record. `memory` (n, M) float64 is what a market remembers besides its scalars, its
    weights first.

    device: "cpu", or "cuda" or "cuda:<number>": state, tables and all that is returned lie on that GPU, as torch's tensors,
    and no step waits for it. The numbers are those of the CPU to rounding (envs/device.py).
    """

    component_names: tuple[str, ...] = ("log_growth",)
    ledger_columns: tuple[str, ...] = ()  # components that a backtest keeps in its ledger
    takes_tasks = True  # whether an episode can be confined to a range of the split
    _reset_loops: tuple
    _step_loops: tuple
    _market: tuple

    def __init__(
        self,
        num_envs: int,
        panel: Panel,
        split: Split | str,
        observation_size: int,
        action_space: gym.Space,
        episode_length: int,
        random_start: bool,
        extra_state: list,
        memory_size: int,
        choice: tuple[tuple[int, ...], type],
        scratch: tuple[int, ...] = (0,),
        num_masked: int = 0,
        num_threads: int | None = None,
        device: str = "cpu",
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: expected at least 1")
        if isinstance(split, str):
            splits = panel.split()
            if split not in splits:
                raise ValueError(f"split={split!r}: expected one of {sorted(splits)} or a Split")
            split = splits[split]
        if episode_length < 0:
            raise ValueError(f"episode_length={episode_length}: expected 0 or more bars")
        self.episode_length, self.random_start = episode_length, random_start
        self.num_envs = num_envs
        self.panel, self.split = panel, split
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_size,), np.float32)
        self.single_action_space = action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(action_space, num_envs)
        available = config.NUMBA_NUM_THREADS  # the cores of this process, unless the user says fewer
        self.num_threads = min(num_threads or available, available)
        # Which of the two equal loops runs; with many markets the parallel one on one thread too: inside a prange body
        # arrays are not reference-counted.
        self.parallel = num_envs >= PARALLEL_FROM
        dtype = np.dtype(STATE + extra_state, align=True)  # a GPU cannot load what is not aligned
        self._gpu, zeros, self._own = None, np.zeros, np.copy
        self._state = np.zeros(num_envs, dtype).view(np.recarray)
        if device != "cpu":
            from envs import device as devices  # not at the top: a process that only steps markets does without torch

            self._gpu = devices.Gpu(device)
            zeros, self._own = self._gpu.zeros, devices.torch.clone
            self._state = devices.Records(num_envs, dtype, self._gpu.device)
        self._state.task[:] = -1
        self._memory = zeros((num_envs, memory_size), np.float64)
        self._buffers = Buffers(
            obs=zeros((num_envs, observation_size), np.float32),
            final_obs=zeros((num_envs, observation_size), np.float32),
            reward=zeros(num_envs, np.float32),
            terminated=zeros(num_envs, np.bool_),
            truncated=zeros(num_envs, np.bool_),
            mask=zeros((num_envs, num_masked), np.bool_),
            final_mask=zeros((num_envs, num_masked), np.bool_),
            record=zeros((num_envs, len(RECORD)), np.float64),
            components=zeros((num_envs, len(self.component_names)), np.float64),
            row=zeros(num_envs, np.int64),
            choice=zeros((num_envs, *choice[0]), choice[1]),
            scratch=zeros((num_envs, *scratch), np.float64),
        )
        self._arrays, self._history = None, None  # on a GPU: what kernels take for the above; `_drawn_parameters`
        self._ready = False

    @property
    def num_runs(self) -> int:
        """Markets that together run every range once where random_start is False: what a backtest needs."""
        return len(self.split.ranges)

    @property
    def rows(self) -> np.ndarray:
        """(n,) row of the panel at which every market is to decide next."""
        return self._own(self._state.t)

    @property
    def stops(self) -> np.ndarray:
        """(n,) end of every market's present episode: its last bar is row stops - 1."""
        return self._own(self._state.stop)

    def ledger_labels(self) -> dict[str, np.ndarray]:
        """Name -> (n,) what a ledger says of every market beside its number."""
        return {}

    def _parameters(self) -> tuple:
        raise AttributeError("a market environment defines _parameters")

    def _run(self, loops, *args):
        """Run one of the triple of loops; its last arguments, tensors or Buffers, are those of the device."""
        if self._gpu is not None:
            if self._arrays is None:
                buffers = Buffers(*map(self._gpu.array, self._buffers))
                tables = self._gpu.tables(self._market)
                self._arrays = tables, self._gpu.array(self._state), self._gpu.array(self._memory), buffers
            market, state, memory, buffers = self._arrays
            *actions, b = args
            if b is not self._buffers:
                buffers = buffers._replace(obs=self._gpu.array(b.obs))
            parameters = self._gpu.scalars(self._parameters())
            self._gpu.launch(
                loops[2], self.num_envs, market, parameters, state, memory, *map(self._gpu.array, actions), buffers
            )
            return
        if self.parallel:
            set_num_threads(self.num_threads)
        loops[self.parallel](self._market, self._parameters(), self._state, self._memory, *args)

    def _fill(self, values, source: np.ndarray):
        """Write an array of the host into a field of the state."""
        values[:] = source if self._gpu is None else self._gpu.tensor(source)

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None):
        """Start a new episode in every market; returns (obs (n, D) float32, infos).

        Market i takes the seed `seed + i`, or `seed[i]` of a list, and from then on draws the same numbers whatever
        other markets run beside it. Without a seed the markets go on with their streams (the first time: a random seed).

        options: {"tasks": (n,) integers}: from now on every episode of market i is a window of range tasks[i] of the split, or
        of any where it is -1, as at first. For meta-learning, where a range, such as a synthetic history, is a task.
        Raises ValueError for other seeds, other options, and tasks that are no ranges of the split.
        """
        if options:
            if not self.takes_tasks:
                raise ValueError(f"reset: options {sorted(options)}: expected none, as its episodes belong to symbols")
            self._fill(self._state.task, assigned_tasks(options, self.num_envs, len(self.split.ranges)))
        if seed is not None or not self._ready:
            self._fill(self._state.key, market_seeds(seed, self.num_envs))
            self._state.counter[:] = 0
        self._ready = True
        self._run(self._reset_loops, self._buffers)
        return self._own(self._buffers.obs), self._infos(copy=True, done=None)

    def step(self, actions, out: np.ndarray | None = None):
        """One bar in every market: (obs, reward, terminated, truncated, infos).

        What is returned belongs to the caller, unless `out` (a C-contiguous (n, D) float32 array, such as a row of rollout
        storage) is given: then obs is written there, and all else is valid until the next call of `step` or `reset`.
        Raises ValueError for actions outside the action space; on a GPU only for their shape, type and place, as nothing waits
        for their values: wrong ones are a failed assertion of the device. There infos always has `final_obs`, and whose it is.
        """
        if not self._ready:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = self._check_actions(actions)
        b = self._buffers
        if out is not None:
            contiguous = out.flags.c_contiguous if self._gpu is None else out.is_contiguous() and out.device == b.obs.device
            if out.shape != b.obs.shape or out.dtype != b.obs.dtype or not contiguous:
                raise ValueError(f"out: {out.dtype}{out.shape}: expected C-contiguous {b.obs.dtype}{b.obs.shape}")
            b = b._replace(obs=out)
        self._run(self._step_loops, actions, b)
        done = b.terminated | b.truncated
        infos = self._infos(copy=out is None, done=done)
        if out is None:
            return *map(self._own, (b.obs, b.reward, b.terminated, b.truncated)), infos
        return out, b.reward, b.terminated, b.truncated, infos

    def _check_actions(self, actions):
        space = self.single_action_space
        if self._gpu is not None:
            return self._gpu.checked(actions, self.action_space.shape, space)
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions: shape {actions.shape}: expected {self.action_space.shape}")
        if isinstance(space, gym.spaces.Discrete):
            if actions.dtype.kind not in "iu" or actions.min() < 0 or actions.max() >= space.n:
                raise ValueError(f"actions: expected integers in 0..{space.n - 1}, found {np.unique(actions)[:9]}")
            return np.ascontiguousarray(actions, dtype=np.int64)
        if not np.isfinite(actions).all():
            raise ValueError("actions: expected finite numbers, found NaN or infinity")
        return np.ascontiguousarray(actions, dtype=np.float32)

    def _infos(self, copy, done):
        own = self._own if copy else lambda array: array
        b = self._buffers
        infos = {"row": own(self._state.t)}
        if self.takes_tasks:
            infos["range"] = own(self._state.range)
        if self.panel.parameters:  # what the history of the present episode drew for itself
            infos["parameters"] = self._drawn_parameters()
        if b.mask.shape[1]:
            infos["action_mask"] = own(b.mask)
        if done is not None:
            infos["record"] = own(b.record)
            components = own(b.components)
            infos["components"] = {name: components[:, c] for c, name in enumerate(self.component_names)}
            infos["decided_at"] = own(b.row)
            if self._gpu is not None or done.any():
                infos["final_obs"], infos["_final_obs"] = own(b.final_obs), done
                if b.mask.shape[1]:
                    infos["final_action_mask"] = own(b.final_mask)
        return infos

    def _drawn_parameters(self):
        """Name -> (n,) what the history of every market's present episode drew for itself."""
        if self._gpu is None:
            return self.panel.parameters_at(self._state.t)
        if self._history is None:
            parameters = {name: self._gpu.tensor(values) for name, values in self.panel.parameters.items()}
            self._history = self._gpu.tensor(self.panel.segment_of_row), parameters
        segment_of_row, parameters = self._history
        return {name: values[segment_of_row[self._state.t]] for name, values in parameters.items()}

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that a later `set_state` on an env made with the same arguments needs to go on bit for bit.

        Arrays of the host, whatever the device: an env on another one goes on from there.
        """
        if self._gpu is not None:
            raw, memory, mask = (x.cpu().numpy() for x in (self._state.raw.flatten(), self._memory, self._buffers.mask))
        else:
            raw, memory, mask = self._state.view(np.uint8), self._memory, self._buffers.mask
        return {"state": raw.copy(), "memory": memory.copy(), "mask": mask.copy()}

    def set_state(self, state: dict[str, np.ndarray]):
        raw = self._state.view(np.uint8) if self._gpu is None else self._state.raw.view(-1)
        if len(raw) != len(state["state"]):
            raise ValueError(
                f"state: {len(state['state'])} bytes: expected {len(raw)}, of {self.num_envs} markets of this version"
            )
        for own, given in ((raw, state["state"]), (self._memory, state["memory"]), (self._buffers.mask, state["mask"])):
            self._fill(own, given)
        self._ready = True


class MarketEnv(gym.Env):
    """One market behind the single-environment API, over the same kernel. Subclasses set `vector_class`."""

    vector_class: type[MarketVectorEnv]
    metadata = {"render_modes": []}

    def __init__(self, render_mode=None, **kwargs):
        if render_mode is not None:
            raise ValueError(f"render_mode={render_mode!r}: expected None; markets are read from their ledgers")
        if kwargs.get("device", "cpu") != "cpu":
            raise ValueError(f"device={kwargs['device']!r}: expected cpu for a single market")
        self.render_mode = None
        self.vector = self.vector_class(num_envs=1, **kwargs)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._fresh = None  # what autoreset has prepared for the next reset()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None or self._fresh is None:
            if seed is None and not self.vector._ready:
                seed = int(self.np_random.integers(2**62))
            obs, infos = self.vector.reset(seed=seed, options=options)
            self._fresh = obs[0], self._first(infos)
            self._reset_keys = set(infos)
        (obs, info), self._fresh = self._fresh, None
        return obs, info

    def step(self, action):
        actions = np.asarray(action)[None]
        now = self.vector._state.range[0]
        obs, reward, terminated, truncated, infos = self.vector.step(actions)
        info = self._first(infos)
        self._fresh = None
        if terminated[0] or truncated[0]:
            self._fresh = obs[0], {k: v for k, v in info.items() if k in self._reset_keys}
            info["row"] = info["decided_at"] + 1
            if "range" in info:
                info["range"] = now
            if "parameters" in info:
                info["parameters"] = {k: v[0] for k, v in self.vector.panel.parameters_at(infos["decided_at"]).items()}
            obs = infos["final_obs"]
            if "action_mask" in info:
                info["action_mask"] = info["final_action_mask"]
            info = {k: v for k, v in info.items() if "final" not in k}
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def action_masks(self) -> np.ndarray:
        """(A,) bool, under the name that sb3-contrib's MaskablePPO looks for."""
        return self.vector._buffers.mask[0].copy()

    @staticmethod
    def _first(infos):
        return {k: MarketEnv._first(v) if isinstance(v, dict) else v[0] for k, v in infos.items()}
