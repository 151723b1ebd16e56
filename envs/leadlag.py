"""LeadLag-v0: choose the lookback of a lead-lag strategy, bar by bar.

At every bar the market measures who leads and who follows over the chosen lookback (`features.leadlag_signal`), takes the
sign of the leaders' last mean return, and holds the followers that way until the next bar (the follower portfolio of
Cartea, Cucuringu & Jin 2023). The agent's only choice is the lookback. What is right depends on how fast the network
changes, and that has to be read from the market.
"""

import math
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from numba import cuda, njit, prange

from envs.costs import EQUITY, GROSS_EXPOSURE, NET_EXPOSURE, RUIN, account_step
from envs.episodes import begin_episode
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.panel import Split
from envs.synthetic import load_market
from envs.vector import MarketEnv, MarketVectorEnv

ABSOLUTE, DELTA, HYBRID = 0, 1, 2
ACTIONS = {"absolute": ABSOLUTE, "delta": DELTA, "hybrid": HYBRID}
COMPONENTS = ("log_growth", "strength", "stability", "extremity", "jump")


# The scalar functions are inlined (forceinline): a call would copy the tuples' hundred fields and count references.


class Parameters(NamedTuple):
    """Scalars of the kernels; those of the curriculum and of annealing move between steps."""

    actions: int  # ABSOLUTE, DELTA or HYBRID
    max_jump: int  # grid steps that the lookback may move in one bar
    lowest: int  # curriculum: grid indices allowed now
    highest: int
    episode_length: int  # bars; 0: to the end of the range
    random_start: bool
    initial: int  # lookback index at the start of an episode
    w_growth: float  # weights of the reward components, annealing included
    w_strength: float
    w_stability: float
    w_extremity: float
    w_jump: float


@njit(cache=True, error_model="numpy", forceinline=True)
def _fallback(valid, t, k_now):
    """The lookback to hold where no action is allowed: the present one, or the nearest that is valid."""
    count = valid.shape[1]
    for distance in range(count):
        if k_now - distance >= 0 and valid[t, k_now - distance]:
            return k_now - distance
        if k_now + distance < count and valid[t, k_now + distance]:
            return k_now + distance
    return k_now


@njit(cache=True, error_model="numpy", forceinline=True)
def _lookback_of(action, k_now, count, kind):
    """Grid index that an action asks for (delta: down, stay, up; hybrid: K absolute ones, then the three deltas)."""
    if kind == ABSOLUTE or (kind == HYBRID and action < count):
        return action
    return k_now + action - 1 if kind == DELTA else k_now + action - count - 1


@njit(cache=True, error_model="numpy", forceinline=True)
def observe(i, m, p, s, record, mask, obs):
    """Write market i's observation, laid out as LeadLagData.layout says, and its action mask."""
    valid = m.valid
    count, size, more = valid.shape[1], m.matrix.shape[2], m.context.shape[1]
    t, k = s.t, s.lookback
    for e in range(size):
        obs[i, e] = m.matrix[t, k, e]
    for e in range(more):
        obs[i, size + e] = m.context[t, e]
    at = size + more
    for q in range(count):
        obs[i, at + q] = 0.0
    obs[i, at + k] = 1.0
    at += count
    obs[i, at] = record[i, GROSS_EXPOSURE] if s.length > 0 else 0.0
    obs[i, at + 1] = record[i, NET_EXPOSURE] if s.length > 0 else 0.0
    obs[i, at + 2] = s.equity / s.peak - 1.0
    # allowed: valid now, inside the curriculum's bounds, and within reach of the present lookback
    low, high = max(p.lowest, k - p.max_jump), min(p.highest, k + p.max_jump)
    anything = False
    if p.actions != DELTA:
        for q in range(count):
            mask[i, q] = valid[t, q] and low <= q <= high
            anything = anything or mask[i, q]
    if p.actions != ABSOLUTE:
        first = mask.shape[1] - 3
        for d in range(3):
            q = k + d - 1
            mask[i, first + d] = low <= q <= high and valid[t, q]
            anything = anything or mask[i, first + d]
    if not anything:  # the present lookback, or the nearest that is valid
        mask[i, _fallback(valid, t, k) if p.actions == ABSOLUTE else mask.shape[1] - 2] = True


@njit(cache=True, error_model="numpy", forceinline=True)
def reset_one(i, m, p, state, weights, record, mask, obs):
    """Begin an episode in market i: a random window of the split, or, without random_start, range i from its start."""
    s = state[i]
    begin_episode(i, m.starts, m.stops, m.weights, p.episode_length, p.random_start, s)
    s.lookback = _fallback(m.valid, s.t, min(max(p.initial, p.lowest), p.highest))
    weights[i, :] = 0.0
    observe(i, m, p, s, record, mask, obs)


@njit(cache=True, error_model="numpy", forceinline=True)
def trade_one(i, m, p, state, weights, actions, b):
    """First half of a bar of market i: the order, its fill, the mark."""
    s = state[i]
    t, before = s.t, s.lookback
    wanted = _lookback_of(actions[i], before, m.valid.shape[1], p.actions)
    k = wanted if b.mask[i, actions[i]] and m.valid[t, wanted] else _fallback(m.valid, t, before)
    growth = account_step(
        weights[i], m.targets[t, k], m.to_fill[t], m.to_mark[t], m.status[t],
        m.impact[min(t, len(m.impact) - 1)], m.years[t], m.fill_at_end, s.equity, m.rates[0], b.record[i],
    )  # fmt: skip
    s.previous, s.lookback = before, k
    s.equity *= growth
    s.peak = max(s.peak, s.equity)
    s.t = t + 1
    s.length += 1
    b.record[i, EQUITY] = s.equity
    b.components[i, 0] = math.log(max(growth, RUIN))
    b.row[i] = t
    b.choice[i] = k


@njit(cache=True, error_model="numpy", forceinline=True)
def report_one(i, m, p, state, weights, b):
    """Second half: reward, end of the episode, observation; a new episode where this one ended."""
    s = state[i]
    t, k, about = b.row[i], s.lookback, m.matrix.shape[2] - 3
    b.components[i, 1] = m.matrix[t, k, about + 2]
    b.components[i, 2] = m.stability[t, k, s.previous]
    b.components[i, 3] = m.matrix[t, k, about + 1]
    b.components[i, 4] = abs(k - s.previous) / (m.valid.shape[1] - 1)
    b.reward[i] = (
        p.w_growth * b.components[i, 0] + p.w_strength * b.components[i, 1] + p.w_stability * b.components[i, 2]
        + p.w_extremity * b.components[i, 3] - p.w_jump * b.components[i, 4]
    )  # fmt: skip
    b.terminated[i] = s.equity <= RUIN
    b.truncated[i] = not b.terminated[i] and s.t >= s.stop - 1
    if b.terminated[i] or b.truncated[i]:
        observe(i, m, p, s, b.record, b.final_mask, b.final_obs)
        reset_one(i, m, p, state, weights, b.record, b.mask, b.obs)
    else:
        observe(i, m, p, s, b.record, b.mask, b.obs)


@njit(cache=True, error_model="numpy")
def reset_serial(m, p, state, weights, b):
    for i in range(len(state)):
        reset_one(i, m, p, state, weights, b.record, b.mask, b.obs)


@njit(cache=True, error_model="numpy", parallel=True)
def reset_parallel(m, p, state, weights, b):
    for i in prange(len(state)):
        reset_one(i, m, p, state, weights, b.record, b.mask, b.obs)


# Two short loops, not one long: the tables are larger than the cache, and a processor can only fetch for the next
# market what fits into its window of instructions.


@njit(cache=True, error_model="numpy")
def step_serial(m, p, state, weights, actions, b):
    for i in range(len(state)):
        trade_one(i, m, p, state, weights, actions, b)
    for i in range(len(state)):
        report_one(i, m, p, state, weights, b)


@njit(cache=True, error_model="numpy", parallel=True)
def step_parallel(m, p, state, weights, actions, b):
    for i in prange(len(state)):
        trade_one(i, m, p, state, weights, actions, b)
    for i in prange(len(state)):
        report_one(i, m, p, state, weights, b)


@cuda.jit(cache=True)
def reset_cuda(m, parameters, state, weights, b):
    i = cuda.grid(1)
    if i < len(state):
        reset_one(i, m, parameters[0], state, weights, b.record, b.mask, b.obs)


@cuda.jit(cache=True)
def step_cuda(m, parameters, state, weights, actions, b):
    i = cuda.grid(1)
    if i < len(state):
        trade_one(i, m, parameters[0], state, weights, actions, b)
        report_one(i, m, parameters[0], state, weights, b)


class LeadLagVectorEnv(MarketVectorEnv):
    """`gym.make_vec("LeadLag-v0", num_envs=4096)`: many lead-lag markets over one panel.

    data: LeadLagData, or the name of a market (`--market`), then drawn with `market_seed` and `config` fields.
    split: "train", "val", "test", or a Split. episode_length: bars, 0 for the whole range. random_start: a random window;
    otherwise market i runs range i of the split. actions: absolute (K lookbacks), delta (down, stay, up) or hybrid (both).
    max_jump: most grid steps per bar (0: no limit). curriculum: (lowest, highest) lookback in bars allowed at the start;
    the bounds widen linearly to all over `curriculum_steps` calls of step. reward_weights: component name -> weight;
    all but log_growth fade linearly to 0 over `anneal_steps` calls (0: never). A masked action keeps the lookback.
    """

    component_names = COMPONENTS
    _reset_loops = (reset_serial, reset_parallel, reset_cuda)
    _step_loops = (step_serial, step_parallel, step_cuda)

    def __init__(
        self,
        num_envs: int = 1,
        data: LeadLagData | str = "synthetic:leadlag",
        split: Split | str = "train",
        actions: str = "absolute",
        episode_length: int = 256,
        random_start: bool = True,
        max_jump: int = 0,
        curriculum: tuple[int, int] | None = None,
        curriculum_steps: int = 0,
        reward_weights: dict[str, float] | None = None,
        anneal_steps: int = 0,
        num_threads: int | None = None,
        device: str = "cpu",
        market_seed: int = 0,
        **config,
    ):
        if isinstance(data, str):
            data = LeadLagData(load_market(data, market_seed), LeadLagConfig(**config))
        elif config:
            raise ValueError(f"{sorted(config)}: expected none of LeadLagConfig's fields beside a LeadLagData")
        if actions not in ACTIONS:
            raise ValueError(f"actions={actions!r}: expected one of {sorted(ACTIONS)}")
        self.data, self.actions = data, actions
        count = len(data.lookbacks)
        self.max_jump = max_jump if max_jump > 0 else count
        self.reward_weights = {"log_growth": 1.0} | dict.fromkeys(COMPONENTS[1:], 0.0) | (reward_weights or {})
        if set(self.reward_weights) != set(COMPONENTS):
            raise ValueError(f"reward_weights: {sorted(self.reward_weights)}: expected only {COMPONENTS}")
        self.anneal_steps, self.curriculum_steps = anneal_steps, curriculum_steps
        self.bounds = (0, count - 1)
        if curriculum is not None:
            inside = np.flatnonzero((data.lookbacks >= curriculum[0]) & (data.lookbacks <= curriculum[1]))
            if len(inside) == 0:
                raise ValueError(f"curriculum={curriculum}: expected bounds with one of {data.lookbacks.tolist()} inside")
            self.bounds = (int(inside[0]), int(inside[-1]))
        self.steps = 0  # calls of step, for curriculum and annealing
        number = {"absolute": count, "delta": 3, "hybrid": count + 3}[actions]
        super().__init__(
            num_envs, data.panel, split, data.observation_size, gym.spaces.Discrete(number), episode_length, random_start,
            extra_state=[("lookback", np.int64), ("previous", np.int64)], memory_size=data.panel.num_symbols,
            choice=((), np.int64), num_masked=number, num_threads=num_threads,
            device=device,
        )  # fmt: skip
        self._market = data.market(self.split)
        self._lookbacks = data.lookbacks if self._gpu is None else self._gpu.tensor(data.lookbacks)

    def _parameters(self) -> Parameters:
        last = len(self.data.lookbacks) - 1
        opened = min(1.0, self.steps / self.curriculum_steps) if self.curriculum_steps > 0 else 0.0
        fade = max(0.0, 1.0 - self.steps / self.anneal_steps) if self.anneal_steps > 0 else 1.0
        w = self.reward_weights
        return Parameters(
            ACTIONS[self.actions],
            self.max_jump,
            round(self.bounds[0] * (1.0 - opened)),
            round(self.bounds[1] + (last - self.bounds[1]) * opened),
            self.episode_length,
            self.random_start,
            last // 2,
            np.float64(w["log_growth"]),
            *(np.float64(w[name]) * fade for name in COMPONENTS[1:]),
        )

    def step(self, actions, out=None):
        result = super().step(actions, out)
        self.steps += 1
        return result

    def _infos(self, copy, done):
        infos = super()._infos(copy, done)
        infos["lookback"] = self._lookbacks[self._state.lookback if done is None else self._buffers.choice]
        return infos

    def get_state(self):
        return super().get_state() | {"steps": np.array([self.steps])}

    def set_state(self, state):
        super().set_state(state)
        self.steps = int(state["steps"][0])


class LeadLagEnv(MarketEnv):
    """`gym.make("LeadLag-v0")`: one market; takes the keyword arguments of LeadLagVectorEnv."""

    vector_class = LeadLagVectorEnv
