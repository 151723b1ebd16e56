"""Portfolio-v0: choose the weights of a portfolio, bar by bar, under exact constraints.

The action is a score per symbol, then one for cash (long_only with cash), then one for leverage (where asked for). Scores
times `scale` are target weights, or changes of the weights held; the order is their Euclidean projection onto what the
constraints allow (`projection.project`). So a score of 0 asks for equal weights (long_only), for nothing (long_short), or for
no trade (changes). A symbol without a bar now cannot be ordered: its weight stays, and uses up its share of the caps.

Three guards may change an order before it trades (`RegimeGuard`): each looks at the account and at the agent's own order only.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from numba import cuda, njit, prange

from envs.costs import EQUITY, RUIN, TURNOVER, account_step
from envs.episodes import MOMENTS, RATE, begin_episode, follow_return, forget_returns, recent_volatility
from envs.panel import Split
from envs.portfolio_tables import LONG_ONLY, PortfolioConfig, PortfolioData
from envs.projection import project
from envs.synthetic import load_market
from envs.vector import MarketEnv, MarketVectorEnv

LARGEST = 10.0  # scores beyond +-LARGEST count as that
GUARDS = ("guard_drawdown", "guard_return", "guard_turnover")
COMPONENTS = ("log_growth", "differential_sharpe", "turnover", "drawdown", "cvar", "variance", *GUARDS)
STATE = MOMENTS + [("value_at_risk", np.float64), ("window_growth", np.float64)]
Y, LOW, HIGH, CAPS, KAPPA = range(5)  # rows of the kernels' scratch


@dataclass(frozen=True)
class RegimeGuard:
    """Three independent rules, checked before each trade; None switches one off. Each says in `info` when it fires."""

    guard_drawdown: float | None = None
    """scale the order down while the drawdown is at least this, such as 0.1"""
    guard_scale: float = 0.5
    """to this fraction, the rest is cash"""
    guard_return: float | None = None
    """penalise turnover while the net return of the last --guard-window bars is below this, such as -0.05"""
    guard_window: int = 60
    """bars of that window; the rule rests until an episode is as long"""
    guard_penalty: float = 0.02
    """the penalty: only what a trade exceeds this weight by is traded"""
    guard_turnover: float | None = None
    """trade only a part where the order's turnover exceeds this, such as 0.5"""
    guard_probe: float = 0.25
    """this part, the probe"""

    def __post_init__(self):
        for name, low, high in (
            ("guard_drawdown", 0, 1), ("guard_scale", 0, 1), ("guard_return", -0.99, np.inf), ("guard_window", 1, np.inf),
            ("guard_penalty", 0, np.inf), ("guard_turnover", 0, np.inf), ("guard_probe", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value!r}: expected a number from {low} to {high}")

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(name for name in GUARDS if getattr(self, name) is not None)


class Parameters(NamedTuple):
    """Scalars of the kernels."""

    long_only: bool
    change: bool  # scores are changes of the weights held
    cash: bool
    leverage: bool
    scale: float
    asset_cap: float
    net: float  # largest |sum of weights| in long_short
    group_cap: float
    num_groups: int
    episode_length: int  # bars; 0: to the end of the range
    random_start: bool
    cvar_alpha: float
    w_growth: float  # weights of the reward components
    w_sharpe: float
    w_turnover: float
    w_drawdown: float
    w_cvar: float
    w_variance: float
    guard_drawdown: float  # infinite: off
    guard_scale: float
    guard_return: float  # minus infinity: off; a log return
    guard_window: int
    guard_penalty: float
    guard_turnover: float  # infinite: off
    guard_probe: float


@njit(cache=True, error_model="numpy", forceinline=True)
def observe(i, m, p, s, memory, record, obs):
    """Write market i's observation, laid out as PortfolioData.layout says."""
    n, features, context = m.present.shape[1], m.assets.shape[1], m.context.shape[1]
    t = s.t
    for e in range(features):
        obs[i, e] = m.assets[t, e]
    for e in range(context):
        obs[i, features + e] = m.context[t, e]
    at = features + context
    gross, net = 0.0, 0.0
    for j in range(n):
        w = memory[i, j]
        obs[i, at + j] = w
        obs[i, at + n + j] = w - memory[i, n + j]
        gross += abs(w)
        net += w
    at += 2 * n
    obs[i, at] = gross
    obs[i, at + 1] = net
    obs[i, at + 2] = s.equity / s.peak - 1.0
    obs[i, at + 3] = s.mean_return
    obs[i, at + 4] = recent_volatility(s)
    obs[i, at + 5] = record[i, TURNOVER] if s.length > 0 else 0.0
    obs[i, at + 6] = m.gross[t]


@njit(cache=True, error_model="numpy", forceinline=True)
def reset_one(i, m, p, state, memory, record, obs):
    """Begin an episode in market i, all in cash: a random window of the split, or, without random_start, range i."""
    s = state[i]
    begin_episode(i, m.starts, m.stops, m.weights, p.episode_length, p.random_start, s)
    forget_returns(s)
    s.value_at_risk = 0.0
    s.window_growth = 0.0
    memory[i, :] = 0.0
    observe(i, m, p, s, memory, record, obs)


@njit(cache=True, error_model="numpy", forceinline=True)
def score(action):
    return min(LARGEST, max(-LARGEST, np.float64(action)))  # float32 times a number stays float32 where nothing is compiled


@njit(cache=True, error_model="numpy", forceinline=True)
def order_one(i, m, p, s, memory, actions, b):
    """Turn market i's scores into the order b.choice[i] (N,), inside the constraints, and let the guards change it."""
    n, t = m.present.shape[1], s.t
    y, low, high, caps, kappa = b.scratch[i, Y], b.scratch[i, LOW], b.scratch[i, HIGH], b.scratch[i, CAPS], b.scratch[i, KAPPA]
    order = b.choice[i]
    budget = m.gross[t]
    if p.leverage:
        budget = min(budget, max(0.0, 1.0 + np.float64(actions[i, actions.shape[1] - 1])))
    elif p.long_only:
        budget = min(budget, 1.0)

    # What cannot be ordered stays as it is, and uses up its part of every cap.
    gross_cap, fixed, held = budget, 0.0, 0.0
    for g in range(p.num_groups):
        caps[g] = p.group_cap
    for j in range(n):
        w = memory[i, j]
        held += w
        if m.present[t, j]:
            y[j] = p.scale * score(actions[i, j]) + (w if p.change else 0.0)
            low[j] = 0.0 if p.long_only else -p.asset_cap
            high[j] = p.asset_cap
        else:
            y[j] = low[j] = high[j] = 0.0
            fixed += w
            gross_cap -= abs(w)
            if m.group[j] >= 0 and p.num_groups > 0:
                caps[m.group[j]] = max(0.0, caps[m.group[j]] - abs(w))
    gross_cap = max(0.0, gross_cap)
    net_low, net_high = (gross_cap, gross_cap) if p.long_only else (-p.net - fixed, p.net - fixed)
    net_budget = gross_cap
    if p.long_only:
        gross_cap = np.inf  # no weight is negative: the net says it all
    cash = -np.inf
    if p.long_only and p.cash:
        cash = p.scale * score(actions[i, n]) + (budget - held if p.change else 0.0)

    lossy = s.length >= p.guard_window and s.window_growth < p.guard_return
    fallen = s.equity <= s.peak * (1.0 - p.guard_drawdown)
    b.components[i, 6], b.components[i, 7] = fallen, lossy
    for stage in range(3):  # the agent's order; after penalty and probe; scaled down: each within the constraints
        if stage == 1:
            turnover = 0.0
            for j in range(n):
                if m.present[t, j]:
                    turnover += abs(order[j] - memory[i, j])
            large = turnover > p.guard_turnover
            b.components[i, 8] = large
            if not (lossy or large):
                continue
        elif stage == 2 and not fallen:
            break
        if stage > 0:
            part = p.guard_probe if large and stage == 1 else 1.0
            penalty = p.guard_penalty if lossy and stage == 1 else 0.0
            cash = net_budget if p.long_only else -np.inf
            for j in range(n):
                if m.present[t, j]:
                    trade = order[j] - memory[i, j]
                    trade = math.copysign(max(0.0, abs(trade) - penalty), trade)
                    y[j] = memory[i, j] + part * trade if stage == 1 else p.guard_scale * order[j]
                    cash -= y[j]
        project(y, low, high, m.group, caps[: p.num_groups], gross_cap, net_low, net_high, cash, kappa, order)
    for j in range(n):
        if not m.present[t, j]:
            order[j] = memory[i, j]


@njit(cache=True, error_model="numpy", forceinline=True)
def trade_one(i, m, p, state, memory, actions, b):
    """First half of a bar of market i: the order, its fill, the mark."""
    s = state[i]
    t, n = s.t, m.present.shape[1]
    order_one(i, m, p, s, memory, actions, b)
    growth = account_step(
        memory[i, :n], b.choice[i], m.to_fill[t], m.to_mark[t], m.status[t],
        m.impact[min(t, len(m.impact) - 1)], m.years[t], m.fill_at_end, s.equity, m.rates[0], b.record[i],
    )  # fmt: skip
    s.equity *= growth
    s.peak = max(s.peak, s.equity)
    s.t = t + 1
    s.length += 1
    b.record[i, EQUITY] = s.equity
    b.row[i] = t
    for j in range(n):
        memory[i, n + j] = b.choice[i, j]
    log_growth = math.log(max(growth, RUIN))
    slot = 2 * n + s.length % p.guard_window
    s.window_growth += log_growth - memory[i, slot]
    memory[i, slot] = log_growth
    b.components[i, 0] = log_growth


@njit(cache=True, error_model="numpy", forceinline=True)
def report_one(i, m, p, state, memory, b):
    """Second half: reward, end of the episode, observation; a new episode where this one ended."""
    s = state[i]
    r = b.record[i, 0]
    b.components[i, 1] = follow_return(s, r)
    b.components[i, 2] = b.record[i, TURNOVER]
    b.components[i, 3] = 1.0 - s.equity / s.peak
    # CVaR as in Rockafellar & Uryasev 2000, v + E[(loss - v)+] / alpha, around a value at risk v that follows the losses
    excess = max(0.0, -r - s.value_at_risk)
    b.components[i, 4] = s.value_at_risk + excess / p.cvar_alpha
    step = RATE * math.sqrt(s.mean_square)
    s.value_at_risk += step * (1.0 if excess > 0.0 else -p.cvar_alpha / (1.0 - p.cvar_alpha))
    b.components[i, 5] = r * r
    b.reward[i] = (
        p.w_growth * b.components[i, 0] + p.w_sharpe * b.components[i, 1] - p.w_turnover * b.components[i, 2]
        - p.w_drawdown * b.components[i, 3] - p.w_cvar * b.components[i, 4] - p.w_variance * b.components[i, 5]
    )  # fmt: skip
    b.terminated[i] = s.equity <= RUIN
    b.truncated[i] = not b.terminated[i] and s.t >= s.stop - 1
    if b.terminated[i] or b.truncated[i]:
        observe(i, m, p, s, memory, b.record, b.final_obs)
        reset_one(i, m, p, state, memory, b.record, b.obs)
    else:
        observe(i, m, p, s, memory, b.record, b.obs)


@njit(cache=True, error_model="numpy")
def reset_serial(m, p, state, memory, b):
    for i in range(len(state)):
        reset_one(i, m, p, state, memory, b.record, b.obs)


@njit(cache=True, error_model="numpy", parallel=True)
def reset_parallel(m, p, state, memory, b):
    for i in prange(len(state)):
        reset_one(i, m, p, state, memory, b.record, b.obs)


@njit(cache=True, error_model="numpy")
def step_serial(m, p, state, memory, actions, b):
    for i in range(len(state)):
        trade_one(i, m, p, state, memory, actions, b)
        report_one(i, m, p, state, memory, b)


@njit(cache=True, error_model="numpy", parallel=True)
def step_parallel(m, p, state, memory, actions, b):
    for i in prange(len(state)):
        trade_one(i, m, p, state, memory, actions, b)
        report_one(i, m, p, state, memory, b)


@cuda.jit(cache=True)
def reset_cuda(m, parameters, state, memory, b):
    i = cuda.grid(1)
    if i < len(state):
        reset_one(i, m, parameters[0], state, memory, b.record, b.obs)


@cuda.jit(cache=True)
def step_cuda(m, parameters, state, memory, actions, b):
    i = cuda.grid(1)
    if i < len(state):
        trade_one(i, m, parameters[0], state, memory, actions, b)
        report_one(i, m, parameters[0], state, memory, b)


class PortfolioVectorEnv(MarketVectorEnv):
    """`gym.make_vec("Portfolio-v0", num_envs)`: many portfolios over one panel.

    data: PortfolioData, or what `--market` takes (then `market_seed` and fields of PortfolioConfig may follow).
    split: a Split of its panel, or "train", "val", "test" of `panel.split()`. Episodes last `episode_length` bars (0: to the
    end of the range) from a random bar, or with random_start=False from the start of range i modulo the number of ranges.
    reward_weights: weights of COMPONENTS but the guards: `log_growth` (1 by default), `differential_sharpe`, and the
    penalties `turnover`, `drawdown`, `cvar` (of the worst `cvar_alpha` of bars) and `variance` (of the net return, squared).
    `infos["choice"]` (n, N) are the weights ordered; `infos["components"]` the components, unweighted, 1 where a guard fired.
    """

    component_names = COMPONENTS
    ledger_columns = GUARDS
    _reset_loops = (reset_serial, reset_parallel, reset_cuda)
    _step_loops = (step_serial, step_parallel, step_cuda)

    def __init__(
        self,
        num_envs: int = 1,
        data: PortfolioData | str = "synthetic:garleanu-pedersen",
        split: Split | str = "train",
        episode_length: int = 256,
        random_start: bool = True,
        guard: RegimeGuard | None = None,
        reward_weights: dict[str, float] | None = None,
        cvar_alpha: float = 0.05,
        num_threads: int | None = None,
        device: str = "cpu",
        market_seed: int = 0,
        **config,
    ):
        if isinstance(data, str):
            data = PortfolioData(load_market(data, market_seed), PortfolioConfig(**config))
        elif config:
            raise ValueError(f"{sorted(config)}: expected none of PortfolioConfig's fields beside a PortfolioData")
        if not 0 < cvar_alpha < 1:
            raise ValueError(f"cvar_alpha={cvar_alpha}: expected a fraction in (0, 1)")
        self.data, self.guard, self.cvar_alpha = data, guard or RegimeGuard(), cvar_alpha
        self.reward_weights = dict.fromkeys(COMPONENTS[:6], 0.0) | {"log_growth": 1.0} | (reward_weights or {})
        if set(self.reward_weights) != set(COMPONENTS[:6]):
            raise ValueError(f"reward_weights: {sorted(self.reward_weights)}: expected only {COMPONENTS[:6]}")
        c, n = data.config, data.panel.num_symbols
        number = n + (c.constraints == LONG_ONLY and c.cash) + c.leverage
        space = gym.spaces.Box(-LARGEST, LARGEST, (number,), np.float32)
        super().__init__(
            num_envs, data.panel, split, data.observation_size, space, episode_length, random_start,
            extra_state=STATE, memory_size=2 * n + self.guard.guard_window,
            choice=((n,), np.float64), scratch=(5, max(n, len(data.groups))), num_threads=num_threads,
            device=device,
        )  # fmt: skip
        self._market = data.market(self.split)
        w, g = self.reward_weights, self.guard

        def off(value, otherwise):
            return otherwise if value is None else float(value)

        self._constant = Parameters(
            c.constraints == LONG_ONLY, c.orders == "change", c.cash, c.leverage, data.scale, c.asset_cap, off(c.net, np.inf),
            c.group_cap, len(data.groups), episode_length, random_start, cvar_alpha,
            *(float(w[name]) for name in COMPONENTS[:6]),
            off(g.guard_drawdown, np.inf), g.guard_scale, -np.inf if g.guard_return is None else math.log1p(g.guard_return),
            g.guard_window, g.guard_penalty, off(g.guard_turnover, np.inf), g.guard_probe,
        )  # fmt: skip

    def _parameters(self) -> Parameters:
        return self._constant

    def _infos(self, copy, done):
        infos = super()._infos(copy, done)
        if done is not None:
            infos["choice"] = self._own(self._buffers.choice) if copy else self._buffers.choice
        return infos


class PortfolioEnv(MarketEnv):
    """`gym.make("Portfolio-v0")`: one portfolio; takes the keyword arguments of PortfolioVectorEnv."""

    vector_class = PortfolioVectorEnv
