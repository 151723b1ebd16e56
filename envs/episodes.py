"""What the kernels of all markets share: random numbers, the window of an episode, moments of the account's returns.

Scalar functions in the Numba subset, the same on every target; and the seeds and tasks that `reset` takes.
"""

import math
from typing import Any

import numpy as np
from numba import njit

# Fields of every market's state; environments append their own.
STATE = [
    ("key", np.uint64),  # the market's seed
    ("counter", np.uint64),  # random numbers drawn so far
    ("t", np.int64),  # row of the panel: the last bar that has closed
    ("stop", np.int64),  # the episode is truncated when t reaches stop - 1
    ("task", np.int64),  # range of the split that the episodes are windows of; -1: any
    ("range", np.int64),  # range that this episode is a window of
    ("length", np.int64),  # steps in this episode
    ("equity", np.float64),  # 1 at the start of an episode
    ("peak", np.float64),  # running maximum of equity, its start included
]

RATE = 0.05  # of the moving averages of returns that agents see: about 20 bars
DSR_RATE, DSR_BARS = 1 / 60, 20  # of the differential Sharpe ratio; it is 0 for so many bars
# State of environments whose agents see moments of their own returns, or earn the differential Sharpe ratio.
MOMENTS = [(name, np.float64) for name in ("mean_return", "mean_square", "dsr_mean", "dsr_square")]

_STEP, _MUL1, _MUL2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_TO_UNIT = 1.0 / 9007199254740992.0  # 2^-53


@njit(cache=True, error_model="numpy")
def mix64(x):
    """SplitMix64's output function (Steele, Lea & Flood 2014): a bijection of 64 bits."""
    x = (x ^ (x >> _S30)) * _MUL1
    x = (x ^ (x >> _S27)) * _MUL2
    return x ^ (x >> _S31)


@njit(cache=True, error_model="numpy", forceinline=True)
def uniform(key, counter):
    """The counter-th number in [0, 1) of the stream `key`; both np.uint64. No state: the same on every target."""
    bits = mix64(mix64(key + _STEP) ^ (counter * _STEP))
    return np.float64(bits >> _S11) * _TO_UNIT


@njit(cache=True, error_model="numpy", forceinline=True)
def begin_episode(i, starts, stops, weights, episode_length, random_start, s):
    """Put market i's state `s` at the start of a random window of a split, or, without random_start, of range i modulo R.

    starts, stops (R,): first row at which a decision can be taken, and end, of each range. weights (R,): relative
    probabilities of the ranges; (0,): every window is as likely as any other. A task, s.task >= 0, is the one range that comes
    into question, with random_start or without.
    """
    ranges = len(starts)
    r, pick = i % ranges, 0
    first, end = 0, ranges
    if s.task >= 0:
        r, first, end = s.task, s.task, s.task + 1
    if random_start:
        shortest = max(1, episode_length)
        total = 0.0
        for q in range(first, end):
            total += weights[q] if len(weights) > 0 else max(1, stops[q] - starts[q] - shortest)
        left = uniform(s.key, s.counter) * total
        s.counter += np.uint64(1)
        for r in range(first, end):
            choices = max(1, stops[r] - starts[r] - shortest)
            share = weights[r] if len(weights) > 0 else np.float64(choices)
            if left < share:
                break
            left -= share
        pick = min(choices - 1, int(left * (choices / share)))  # rounding could reach the end of the range
    s.range = r
    s.t = starts[r] + pick
    s.stop = stops[r]
    if episode_length > 0:
        s.stop = min(s.stop, s.t + episode_length + 1)
    s.length = 0
    s.equity = 1.0
    s.peak = 1.0


@njit(cache=True, error_model="numpy", forceinline=True)
def forget_returns(s):
    """MOMENTS of the state `s` as an episode begins."""
    s.mean_return = 0.0
    s.mean_square = 0.0
    s.dsr_mean = 0.0
    s.dsr_square = 0.0


@njit(cache=True, error_model="numpy", forceinline=True)
def follow_return(s, r):
    """Count the net return `r` of the bar that makes the episode `s.length` bars long into MOMENTS.

    Returns the differential Sharpe ratio (Moody & Saffell 1998): the derivative of a moving Sharpe ratio with respect to its
    rate; 0 in the first DSR_BARS bars, and where returns have not varied.
    """
    s.mean_return += RATE * (r - s.mean_return)
    s.mean_square += RATE * (r * r - s.mean_square)
    variance = s.dsr_square - s.dsr_mean * s.dsr_mean
    d_mean, d_square = r - s.dsr_mean, r * r - s.dsr_square
    ratio = 0.0
    if s.length > DSR_BARS and variance > 1e-12:
        ratio = (s.dsr_square * d_mean - 0.5 * s.dsr_mean * d_square) / (variance * math.sqrt(variance))
    rate = max(DSR_RATE, 1.0 / s.length)  # plain means at first
    s.dsr_mean += rate * d_mean
    s.dsr_square += rate * d_square
    return ratio


@njit(cache=True, error_model="numpy", forceinline=True)
def recent_volatility(s):
    """Moving standard deviation of the returns counted into MOMENTS."""
    return math.sqrt(max(0.0, s.mean_square - s.mean_return * s.mean_return))


def market_seeds(seed: int | list[int] | None, num_envs: int) -> np.ndarray:
    """(n,) uint64, the seeds of n markets: seed + i, or seed[i] of a list; None: random ones. Raises ValueError for others."""
    if seed is None:
        seed = int(np.random.SeedSequence().entropy % 2**62)
    seeds = np.arange(num_envs) + seed if np.ndim(seed) == 0 else np.asarray(seed)
    if seeds.shape != (num_envs,) or seeds.min() < 0:
        raise ValueError(f"seed={seed!r}: expected an integer >= 0 or a list of {num_envs} of them")
    return seeds.astype(np.uint64)


def assigned_tasks(options: dict[str, Any], num_envs: int, number: int | None = None) -> np.ndarray:
    """(n,) int64, the tasks of reset's options={"tasks": ...}: below `number`, where that is known; -1: any.

    Raises ValueError for other options and other tasks.
    """
    if set(options) != {"tasks"}:
        raise ValueError(f"reset: options {sorted(options)}: expected only tasks")
    tasks = np.asarray(options["tasks"])
    wrong = tasks.shape != (num_envs,) or tasks.dtype.kind not in "iu" or tasks.min() < -1
    if wrong or (number is not None and tasks.max() >= number):
        most = "up" if number is None else f"to {number - 1}, ranges of its split"
        raise ValueError(
            f"reset: tasks {np.unique(tasks)[:9]} of shape {tasks.shape}: expected {num_envs} integers from -1 (any) {most}"
        )
    return tasks.astype(np.int64)
