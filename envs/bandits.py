"""Bandits-v0: Bernoulli bandits, a test task of meta-learning whose results are published (Duan et al. 2016).

A task is a bandit: pulling arm a pays 1 with probability p_a, else 0, and every p_a was drawn uniformly from [0, 1]. An episode
is one pull, and the observation says nothing: what can be learned about a bandit has to be carried from episode to episode.
Of ten pulls of a bandit with five arms chance earns 5.0, Gittins' index 6.6, RL^2 6.7 (Duan et al. 2016, table 1).
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numba import njit

from envs.episodes import assigned_tasks, market_seeds, mix64, uniform
from envs.tasks import HELD_OUT


@njit(cache=True, error_model="numpy")
def probabilities_of(tasks, arms):
    """(n, arms) float64: the probability that each arm pays, of tasks (n,) np.uint64; in a stream of its own for each task."""
    out = np.empty((len(tasks), arms))
    for i in range(len(tasks)):
        for a in range(arms):
            out[i, a] = uniform(mix64(tasks[i]), np.uint64(a))
    return out


@njit(cache=True, error_model="numpy")
def draw(keys, counters):
    """(n,) the next number in [0, 1) of the streams `keys` (n,) np.uint64; counts it in `counters` (n,) np.uint64."""
    out = np.empty(len(keys))
    for i in range(len(keys)):
        out[i] = uniform(keys[i], counters[i])
        counters[i] += np.uint64(1)
    return out


class BanditsVectorEnv(gym.vector.VectorEnv):
    """`gym.make_vec("Bandits-v0")`: n bandits at once; an action is the arm to pull, the observation always 0.

    Every pull ends an episode (terminated); autoreset is SAME_STEP, as in envs/vector.py. infos["parameters"] names the
    probabilities of the next pull: "p0" to "p<arms - 1>" -> (n,). Raises ValueError for fewer than one bandit or two arms.
    """

    def __init__(self, num_envs: int = 1, arms: int = 5):
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: expected at least 1")
        if arms < 2:
            raise ValueError(f"arms={arms}: expected at least 2")
        self.num_envs, self.arms = num_envs, arms
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.single_action_space = gym.spaces.Discrete(arms)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self._keys, self._counters = np.zeros(num_envs, np.uint64), np.zeros(num_envs, np.uint64)
        self._tasks = np.full(num_envs, -1)  # -1: a training task drawn for every episode
        self._probabilities = np.zeros((num_envs, arms))
        self._ready = False

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None):
        """Start an episode of every bandit; returns (obs (n, 1) float32, infos).

        Bandit i draws from the seed `seed + i`, or `seed[i]` of a list; without a seed it goes on with its stream (the first
        time: from a random seed). options: {"tasks": (n,) integers}: from now on every episode of bandit i is of task tasks[i],
        the same probabilities whatever the seed, or of a training task drawn anew where it is -1, as at first.
        Raises ValueError for other seeds and other options.
        """
        if options:
            self._tasks = assigned_tasks(options, self.num_envs)
        if seed is not None or not self._ready:
            self._keys[:], self._counters[:] = market_seeds(seed, self.num_envs), 0
        self._ready = True
        return self._begin()

    def step(self, actions):
        """Pull an arm of every bandit: (obs, reward (n,) float32, terminated: all, truncated: none, infos).

        Raises ValueError for actions that are no arms, ResetNeeded before the first reset.
        """
        if not self._ready:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu" or not self.action_space.contains(actions.astype(np.int64)):
            raise ValueError(f"actions: {actions!r}: expected {self.num_envs} integers in 0..{self.arms - 1}")
        pays = self._probabilities[np.arange(self.num_envs), actions]
        reward = (draw(self._keys, self._counters) < pays).astype(np.float32)
        over = np.ones(self.num_envs, bool)
        final_obs = np.zeros((self.num_envs, 1), np.float32)
        obs, infos = self._begin()
        return obs, reward, over, ~over, {**infos, "final_obs": final_obs, "_final_obs": over}

    def _begin(self):
        """(obs, infos) of the next episode of every bandit."""
        tasks, drawn = self._tasks.copy(), np.flatnonzero(self._tasks < 0)
        counters = self._counters[drawn]
        tasks[drawn] = draw(self._keys[drawn], counters) * HELD_OUT
        self._counters[drawn] = counters
        self._probabilities = probabilities_of(tasks.astype(np.uint64), self.arms)
        return np.zeros((self.num_envs, 1), np.float32), self._infos()

    def _infos(self):
        return {"parameters": {f"p{a}": self._probabilities[:, a] for a in range(self.arms)}}


class BanditsEnv(gym.Env):
    """`gym.make("Bandits-v0")`: one bandit, over the same code; takes `arms`, and of `reset` the same options."""

    metadata = {"render_modes": []}

    def __init__(self, arms: int = 5, render_mode: str | None = None):
        if render_mode is not None:
            raise ValueError(f"render_mode={render_mode!r}: expected None; there is nothing to see")
        self.render_mode = None
        self.vector = BanditsVectorEnv(1, arms)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._fresh = None  # what autoreset has prepared for the next reset()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is None and not self.vector._ready:
            seed = int(self.np_random.integers(2**62))
        if seed is not None or options or self._fresh is None:
            self._fresh = self.vector.reset(seed=seed, options=options)
        (obs, infos), self._fresh = self._fresh, None
        return obs[0], self._first(infos)

    def step(self, action):
        pulled = self.vector._infos()
        obs, reward, terminated, truncated, infos = self.vector.step(np.asarray(action)[None])
        self._fresh = obs, infos
        return infos["final_obs"][0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._first(pulled)

    @staticmethod
    def _first(infos):
        return {"parameters": {name: values[0] for name, values in infos["parameters"].items()}}
