"""Trading-v0: one symbol per market, any number of symbols at once; seven orders, exits inside the bar, risk limits.

An order is decided at the close of bar t and filled by the rule of the panel (`costs.FILLS`). Long only, nothing is borrowed.
A stop or target is filled by the path of bar t+1, pessimistically: a bar that opens beyond the level fills at its open; one
that touches both levels fills at the stop; what was invested for a part of the bar pays the carry of all of it. Levels are
those of what is held when a price is made:

- next_open: where the bar opens beyond a level of what was held before, that is closed, and the order is cancelled; else the
  order is filled at the open, and what is held then may be closed by the rest of the bar.
- next_close: the bar's path comes before the order: where it closes the position, the order is cancelled.
- same_close: the order is filled at the close of t; all of bar t+1, its opening gap included, runs over what is held then.

Exits that need no price are orders at the ordinary fill, wait for a bar to be filled, and override the agent's: max_holding,
daily loss, breaker. A weight above max_exposure is cut back to it, unless the agent sells more. Without a bar of the symbol
nothing is filled, and the agent's order is void; a symbol that is delisted is closed at its last price.
"""

import math
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from numba import cuda, njit, prange

from envs.costs import (
    COMMISSION,
    DELISTED,
    EQUITY,
    FILLS,
    INTEREST,
    NET_RETURN,
    RECORD,
    RUIN,
    TRADABLE,
    TURNOVER,
    UNTRADABLE,
    account_step,
    combine_records,
)
from envs.episodes import MOMENTS, begin_episode, follow_return, forget_returns, recent_volatility
from envs.panel import Split
from envs.synthetic import load_market
from envs.trading_tables import TradingConfig, TradingData
from envs.vector import MarketEnv, MarketVectorEnv

ORDERS = ("hold", "buy_small", "buy_medium", "buy_large", "sell_part", "sell_all", "add")
HOLD, BUY_SMALL, BUY_MEDIUM, BUY_LARGE, SELL_PART, SELL_ALL, ADD = range(7)
EVENTS = ("none", "stop", "target", "max_hold", "daily_loss", "breaker", "exposure", "delisted")
NO_EVENT, STOP, TARGET, MAX_HOLD, DAILY_LOSS, BREAKER, EXPOSURE, DELISTING = range(8)
REWARDS = ("pnl", "cost", "holding", "sharpe", "drawdown", "sizing", "hold")
COMPONENTS = (*REWARDS, "event", "masked")
NEXT_CLOSE, SAME_CLOSE = FILLS.index("next_close"), FILLS.index("same_close")
HOLDING_BARS = 252.0  # bars held that the component `holding` counts as 1
PATIENCE = 20.0  # bars held that an agent sees as one half
SLACK = 1e-9  # of weights: by so little a limit is not exceeded but rounded
STATE = [
    ("symbol", np.int64),  # the panel's number of it
    ("held", np.int64),  # bars that the position has been held over
    ("adds", np.int64),  # additions to it
    ("entry", np.float64),  # its average fill price, costs not included; 0 while flat
    ("day_equity", np.float64),  # at the last mark of the calendar date before
    ("stopped", np.bool_),  # the daily loss was reached today
    ("cooldown", np.int64),  # decisions for which the breaker still forbids to buy
    ("breaker_peak", np.float64),
    *MOMENTS,
]


class Parameters(NamedTuple):
    """Scalars of the kernels."""

    first_market: int
    window: int
    small: float
    medium: float
    large: float
    part: float
    add: float
    max_adds: int
    stop_loss: float  # infinite: off
    take_profit: float  # infinite: off
    max_holding: int  # a number of bars that no episode has: off
    max_position: float
    max_exposure: float
    daily_loss: float  # infinite: off
    max_drawdown: float  # infinite: off
    breaker_bars: int
    episode_length: int  # bars; 0: to the end of the run
    random_start: bool
    w_pnl: float  # weights of the reward components
    w_cost: float
    w_holding: float
    w_sharpe: float
    w_drawdown: float
    w_sizing: float
    w_hold: float


@njit(cache=True, error_model="numpy", forceinline=True)
def levels(p, entry):
    """Prices at which a position with this average entry is closed: (stop, target); 0 and infinity where there is none."""
    if entry == 0.0:
        return 0.0, np.inf
    return max(0.0, entry * (1.0 - p.stop_loss)), entry * (1.0 + p.take_profit)


@njit(cache=True, error_model="numpy", forceinline=True)
def touched(stop, target, open_, high, low):
    """What a bar does to a position that is held from its open on: (event, price of the exit). Both touched: the stop."""
    if open_ <= stop:
        return STOP, open_
    if open_ >= target:
        return TARGET, open_
    if low <= stop:
        return STOP, stop
    if high >= target:
        return TARGET, target
    return NO_EVENT, 0.0


@njit(cache=True, error_model="numpy", forceinline=True)
def observe(i, m, p, s, memory, mask, obs):
    """Write market i's observation, laid out as TradingData.layout says, and its action mask."""
    t, j, w = s.t, s.symbol, memory[i, 0]
    count = m.features.shape[2]
    begin = max(m.history[t], t - p.window + 1)
    blank = (p.window - (t + 1 - begin)) * count
    for e in range(blank):
        obs[i, e] = 0.0
    at = blank
    for u in range(begin, t + 1):
        for e in range(count):
            obs[i, at + e] = m.features[j, u, e]
        at += count
    stop, target = levels(p, s.entry)
    price = m.close[t, j]
    obs[i, at] = w
    obs[i, at + 1] = price / s.entry - 1.0 if w > 0.0 else 0.0
    obs[i, at + 2] = s.held / (s.held + PATIENCE)
    obs[i, at + 3] = s.adds / max(1, p.max_adds)
    obs[i, at + 4] = 1.0 - stop / price if stop > 0.0 else 0.0
    obs[i, at + 5] = target / price - 1.0 if target < np.inf else 0.0
    obs[i, at + 6] = 1.0 if w == 0.0 else 0.0
    at += 7
    blocked = s.stopped or s.cooldown > 0
    obs[i, at] = s.equity / s.peak - 1.0
    obs[i, at + 1] = s.equity / s.day_equity - 1.0
    obs[i, at + 2] = s.mean_return
    obs[i, at + 3] = recent_volatility(s)
    obs[i, at + 4] = p.max_position - w
    obs[i, at + 5] = 1.0 if blocked else 0.0
    at += 6
    for e in range(m.regime.shape[1]):
        obs[i, at + e] = m.regime[t, e]
    at += m.regime.shape[1]
    for e in range(m.own.shape[2]):
        obs[i, at + e] = m.own[j, t, e]
    at += m.own.shape[2]
    for e in range(m.shared.shape[1]):
        obs[i, at + e] = m.shared[t, e]
    # allowed: what is possible in full if it were filled at this price
    here = m.present[t, j]
    can_open = here and not blocked and w == 0.0
    mask[i, HOLD] = True
    mask[i, BUY_SMALL] = can_open and p.small <= p.max_position
    mask[i, BUY_MEDIUM] = can_open and p.medium <= p.max_position
    mask[i, BUY_LARGE] = can_open and p.large <= p.max_position
    mask[i, SELL_PART] = here and w > 0.0
    mask[i, SELL_ALL] = here and w > 0.0
    mask[i, ADD] = here and not blocked and w > 0.0 and s.adds < p.max_adds and w + p.add <= p.max_position + SLACK


@njit(cache=True, error_model="numpy", forceinline=True)
def reset_one(i, m, p, state, memory, mask, obs):
    """Begin an episode in market i, all in cash: a random window of its symbol's runs, or, without random_start, one run."""
    s = state[i]
    number = p.first_market + i
    if p.random_start:
        k = number % (len(m.first) - 1)
        begin, end = m.first[k], m.first[k + 1]
    else:
        begin = m.order[number % len(m.order)]
        end = begin + 1
    begin_episode(
        i, m.starts[begin:end], m.stops[begin:end], m.weights[begin:end], p.episode_length, p.random_start, s
    )  # fmt: skip
    s.symbol = m.symbol[begin]
    s.held = 0
    s.adds = 0
    s.entry = 0.0
    s.day_equity = 1.0
    s.stopped = False
    s.cooldown = 0
    s.breaker_peak = 1.0
    forget_returns(s)
    memory[i, 0] = 0.0
    observe(i, m, p, s, memory, mask, obs)


@njit(cache=True, error_model="numpy", forceinline=True)
def target_one(p, s, order, w, drifted):
    """Weight that an allowed order brings a position to, and what overrides it: (target, event).

    w: weight held at the close. drifted: the same at the prices of the fill.
    """
    target = drifted
    if order == BUY_SMALL:
        target = p.small
    elif order == BUY_MEDIUM:
        target = p.medium
    elif order == BUY_LARGE:
        target = p.large
    elif order == SELL_PART:
        target = (1.0 - p.part) * drifted
    elif order == SELL_ALL:
        target = 0.0
    elif order == ADD:
        target = max(drifted, min(drifted + p.add, p.max_position))
    if w > 0.0 and s.cooldown > 0:
        return 0.0, BREAKER
    if w > 0.0 and s.stopped:
        return 0.0, DAILY_LOSS
    if w > 0.0 and s.held >= p.max_holding:
        return 0.0, MAX_HOLD
    if w > p.max_exposure + SLACK and target > p.max_exposure:
        return p.max_exposure, EXPOSURE
    return target, NO_EVENT


@njit(cache=True, error_model="numpy", forceinline=True)
def order_one(i, m, p, s, memory, actions, b):
    """Market i's order for the ordinary fill: b.choice[i], the agent's after the mask; returns (target, drifted, event).

    Target weight, and the weight that is drifted to the fill: where they are equal, nothing is traded. The event is what has
    overridden the agent.
    """
    t, j, w = s.t, s.symbol, memory[i, 0]
    order = actions[i]
    b.components[i, 8] = not b.mask[i, order]
    if not b.mask[i, order]:
        order = HOLD
    b.choice[i] = order
    to_fill = m.to_fill[t, j]
    drifted = w * (1.0 + to_fill) / (1.0 + w * to_fill)
    target, event = target_one(p, s, order, w, drifted)
    return target, drifted, event


@njit(cache=True, error_model="numpy", forceinline=True)
def settle(i, m, s, memory, b, target, to_fill, to_mark, status, years, equity, record):
    """`account_step` for the one symbol of market i at its row; the arguments that are arrays there are numbers here."""
    x, j = b.scratch[i], s.symbol
    x[0], x[1], x[2], x[3] = target, to_fill, to_mark, status
    impact = m.impact[min(s.t, len(m.impact) - 1), j : j + 1]
    return account_step(memory[i, :1], x[0:1], x[1:2], x[2:3], x[3:4], impact, years, m.fill_at_end, equity, m.rates[0], record)


@njit(cache=True, error_model="numpy", forceinline=True)
def trade_one(i, m, p, state, memory, actions, b):
    """First half of a bar of market i: the order and the exits, their fills, the mark."""
    s, record = state[i], b.record[i]
    t, j, held = s.t, s.symbol, memory[i, 0]
    open_, high, low, here = m.open[t + 1, j], m.high[t + 1, j], m.low[t + 1, j], m.present[t + 1, j]
    target, drifted, event = order_one(i, m, p, s, memory, actions, b)
    to_fill, to_mark, status = m.to_fill[t, j], m.to_mark[t, j], m.status[t, j]
    if status == DELISTED:
        event = DELISTING if held > 0.0 else NO_EVENT
    elif status == UNTRADABLE or target == drifted:
        status, event = UNTRADABLE, NO_EVENT

    if held > 0.0 and here and m.fill != SAME_CLOSE:  # the path before the order is filled, over what was held
        stop, goal = levels(p, s.entry)
        whole = m.fill == NEXT_CLOSE  # else only the gap
        exit_, price = touched(stop, goal, open_, high if whole else open_, low if whole else open_)
        if exit_ != NO_EVENT:
            event, target, status, to_fill, to_mark = exit_, 0.0, TRADABLE, price / m.close[t, j] - 1.0, 0.0
    growth = settle(i, m, s, memory, b, target, to_fill, to_mark, status, m.years[t], s.equity, record)
    if status == TRADABLE and target > drifted:
        fill, size = m.close[t, j] * (1.0 + to_fill), record[TURNOVER]
        s.entry = (drifted * s.entry + size * fill) / (drifted + size) if drifted > 0.0 else fill
        s.adds += 1 if drifted > 0.0 else 0

    if memory[i, 0] > 0.0 and here and m.fill != NEXT_CLOSE:  # the path after it, over what is held now
        stop, goal = levels(p, s.entry)
        exit_, price = touched(stop, goal, open_, high, low)
        if exit_ != NO_EVENT:
            # The bar is marked at its close, as ever; the exit takes back what came after it, and closes.
            event, back = exit_, price / m.close[t + 1, j] - 1.0
            growth *= settle(i, m, s, memory, b, 0.0, back, 0.0, TRADABLE, 0.0, s.equity * growth, b.scratch[i, 4:])
            combine_records(record, b.scratch[i, 4:])

    if memory[i, 0] == 0.0:
        s.entry, s.held, s.adds = 0.0, 0, 0
    elif held > 0.0 or m.fill != NEXT_CLOSE:  # what was bought at the close of this bar was not held over it
        s.held += 1
    before = s.equity
    s.equity *= growth
    s.peak = max(s.peak, s.equity)
    s.t = t + 1
    s.length += 1
    record[EQUITY] = s.equity
    b.row[i] = t
    b.components[i, 0] = math.log(max(growth, RUIN))
    b.components[i, 6] = b.choice[i] == HOLD and held == 0.0
    b.components[i, 7] = event
    limit_one(m, p, s, before, memory[i, 0])


@njit(cache=True, error_model="numpy", forceinline=True)
def limit_one(m, p, s, before, weight):
    """Daily loss and breaker at the mark s.t; `before` is the equity at the mark before."""
    if m.day[s.t] != m.day[s.t - 1]:
        s.day_equity, s.stopped = before, s.stopped and weight > 0.0  # a halt puts the exit off, not out
    if s.equity <= s.day_equity * (1.0 - p.daily_loss):
        s.stopped = True
    if s.cooldown > 0 and weight == 0.0:
        s.cooldown -= 1
        if s.cooldown == 0:
            s.breaker_peak = s.equity
    elif s.cooldown == 0:
        s.breaker_peak = max(s.breaker_peak, s.equity)
        if s.equity <= s.breaker_peak * (1.0 - p.max_drawdown):
            s.cooldown = p.breaker_bars


@njit(cache=True, error_model="numpy", forceinline=True)
def report_one(i, m, p, state, memory, b):
    """Second half: reward, end of the episode, observation; a new episode where this one ended."""
    s, w = state[i], memory[i, 0]
    cost = 0.0
    for c in range(COMMISSION, INTEREST):
        cost += b.record[i, c]
    b.components[i, 1] = cost
    b.components[i, 2] = s.held / HOLDING_BARS
    b.components[i, 3] = follow_return(s, b.record[i, NET_RETURN])
    b.components[i, 4] = 1.0 - s.equity / s.peak
    b.components[i, 5] = abs(w - m.sizing[s.symbol, s.t]) if w > 0.0 else 0.0
    b.reward[i] = (
        p.w_pnl * b.components[i, 0] - p.w_cost * b.components[i, 1] - p.w_holding * b.components[i, 2]
        + p.w_sharpe * b.components[i, 3] - p.w_drawdown * b.components[i, 4] - p.w_sizing * b.components[i, 5]
        - p.w_hold * b.components[i, 6]
    )  # fmt: skip
    b.terminated[i] = s.equity <= RUIN
    b.truncated[i] = not b.terminated[i] and s.t >= s.stop - 1
    if b.terminated[i] or b.truncated[i]:
        observe(i, m, p, s, memory, b.final_mask, b.final_obs)
        reset_one(i, m, p, state, memory, b.mask, b.obs)
    else:
        observe(i, m, p, s, memory, b.mask, b.obs)


@njit(cache=True, error_model="numpy")
def reset_serial(m, p, state, memory, b):
    for i in range(len(state)):
        reset_one(i, m, p, state, memory, b.mask, b.obs)


@njit(cache=True, error_model="numpy", parallel=True)
def reset_parallel(m, p, state, memory, b):
    for i in prange(len(state)):
        reset_one(i, m, p, state, memory, b.mask, b.obs)


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


@njit(cache=True, error_model="numpy")
def targets_serial(p, state, memory, mask, actions, out):
    for i in range(len(state)):
        w = memory[i, 0]
        out[i] = target_one(p, state[i], actions[i] if mask[i, actions[i]] else HOLD, w, w)[0]


@cuda.jit(cache=True)
def reset_cuda(m, parameters, state, memory, b):
    i = cuda.grid(1)
    if i < len(state):
        reset_one(i, m, parameters[0], state, memory, b.mask, b.obs)


@cuda.jit(cache=True)
def step_cuda(m, parameters, state, memory, actions, b):
    i = cuda.grid(1)
    if i < len(state):
        trade_one(i, m, parameters[0], state, memory, actions, b)
        report_one(i, m, parameters[0], state, memory, b)


@cuda.jit(cache=True)
def targets_cuda(parameters, state, memory, mask, actions, out):
    i = cuda.grid(1)
    if i < len(state):
        w = memory[i, 0]
        out[i] = target_one(parameters[0], state[i], actions[i] if mask[i, actions[i]] else HOLD, w, w)[0]


class TradingVectorEnv(MarketVectorEnv):
    """`gym.make_vec("Trading-v0", num_envs)`: many accounts over one panel, each trading one symbol.

    data: TradingData, or what `--market` takes (then `market_seed` and fields of TradingConfig may follow).
    split: a Split of its panel, or "train", "val", "test" of `panel.split()`. Market i trades symbol i modulo the number of
    symbols that have a run in the split (`TradingData.runs`), always the same. Episodes last `episode_length` bars (0: to the
    end of the run) from a random bar of its runs, or with random_start=False from the start of run i: all symbols in the first
    range, then those in the next; `num_runs` markets make a backtest. `first_market`: the number i of the first market.
    reward_weights: weights of REWARDS: `pnl` (net log growth; 1 by default), `sharpe` (differential Sharpe ratio), and the
    penalties `cost` (the bar's, which pnl holds already), `holding` (bars held / 252), `drawdown`, `sizing` (distance of the
    weight held from that of TradingConfig.target_volatility) and `hold` (1 for HOLD while flat).

    A masked action is executed as HOLD. `infos["choice"]` (n,) are the orders executed, `infos["symbol"]` (n,) the panel's
    number of each market's symbol; `infos["components"]` are the components, unweighted, and `event` (a number in EVENTS: what
    but the agent closed or cut the position in this bar) and `masked` (1 where the action was).
    """

    component_names = COMPONENTS
    ledger_columns = ("event", "masked")
    takes_tasks = False
    _reset_loops = (reset_serial, reset_parallel, reset_cuda)
    _step_loops = (step_serial, step_parallel, step_cuda)

    def __init__(
        self,
        num_envs: int = 1,
        data: TradingData | str = "synthetic:ou",
        split: Split | str = "train",
        episode_length: int = 256,
        random_start: bool = True,
        first_market: int = 0,
        reward_weights: dict[str, float] | None = None,
        num_threads: int | None = None,
        device: str = "cpu",
        market_seed: int = 0,
        **config,
    ):
        if isinstance(data, str):
            data = TradingData(load_market(data, market_seed), TradingConfig(**config))
        elif config:
            raise ValueError(f"{sorted(config)}: expected none of TradingConfig's fields beside a TradingData")
        if first_market < 0:
            raise ValueError(f"first_market={first_market}: expected 0 or more")
        self.data, self.first_market = data, first_market
        self.reward_weights = dict.fromkeys(REWARDS, 0.0) | {"pnl": 1.0} | (reward_weights or {})
        if set(self.reward_weights) != set(REWARDS):
            raise ValueError(f"reward_weights: {sorted(self.reward_weights)}: expected only {REWARDS}")
        super().__init__(
            num_envs, data.panel, split, data.observation_size, gym.spaces.Discrete(len(ORDERS)), episode_length, random_start,
            extra_state=STATE, memory_size=1, choice=((), np.int64), scratch=(4 + len(RECORD),),
            num_masked=len(ORDERS), num_threads=num_threads,
            device=device,
        )  # fmt: skip
        self._market = data.market(self.split)
        c, w = data.config, self.reward_weights

        def off(value):
            return float(value) if value else np.inf

        self._constant = Parameters(
            first_market, c.window, *map(float, c.sizes), float(c.part), float(c.add), c.max_adds, off(c.stop_loss),
            off(c.take_profit), c.max_holding or np.iinfo(np.int64).max, float(c.max_position), off(c.max_exposure),
            off(c.daily_loss), off(c.max_drawdown), c.breaker_bars, episode_length, random_start,
            *(float(w[name]) for name in REWARDS),
        )  # fmt: skip

    @property
    def num_runs(self) -> int:
        return len(self._market.order)

    def targets(self, actions) -> np.ndarray:
        """(n,) weights that `step(actions)` would aim at if prices stayed at the last close; nothing is stepped.

        After the mask and the limits that override an agent; what the bar of the fill brings, such as a stop, is not known yet.
        Raises ValueError for actions outside the action space.
        """
        actions, held = self._check_actions(actions), (self._state, self._memory, self._buffers.mask)
        if self._gpu is None:
            out = np.zeros(self.num_envs)
            targets_serial(self._parameters(), *held, actions, out)
            return out
        out, parameters = self._gpu.zeros(self.num_envs, np.float64), self._gpu.scalars(self._parameters())
        self._gpu.launch(targets_cuda, self.num_envs, parameters, *map(self._gpu.array, (*held, actions, out)))
        return out

    def ledger_labels(self) -> dict[str, np.ndarray]:
        """Symbol and range of the split that every market trades in a backtest."""
        runs = self._market.order[(self.first_market + np.arange(self.num_envs)) % self.num_runs]
        symbols = np.array(self.data.panel.symbols, dtype=object)
        return {"symbol": symbols[self._market.symbol[runs]], "range": self._market.range_of[runs]}

    def _parameters(self) -> Parameters:
        return self._constant

    def _infos(self, copy, done):
        infos = super()._infos(copy, done)
        infos["symbol"] = self._own(self._state.symbol) if copy else self._state.symbol
        if done is not None:
            infos["choice"] = self._own(self._buffers.choice) if copy else self._buffers.choice
        return infos


class TradingEnv(MarketEnv):
    """`gym.make("Trading-v0")`: one account; takes the keyword arguments of TradingVectorEnv."""

    vector_class = TradingVectorEnv
