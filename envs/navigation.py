"""Navigation2D-v0: a point has to find a goal that it does not see. The task that meta-reinforcement learning is checked on.

The 2D navigation of MAML (Finn, Abbeel & Levine 2017, arXiv:1703.03400, section 5.3), as the authors' published code has it:
the reward is minus the distance to the goal. (The paper says the squared distance, but its returns are those of the distance:
who stays at the start has -38 on average, and -17 by squares; MAML has -40.4, -11.7, -3.3, -3.2 after 0 to 3 steps.)
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from envs.episodes import assigned_tasks, market_seeds
from envs.tasks import HELD_OUT

HORIZON = 100  # steps of an episode
REACH = 0.1  # of a step, on each axis
REGION = 0.5  # goals are uniform on [-REGION, REGION]^2
NEAR = 0.01  # an episode terminates where both coordinates are nearer to the goal's


def goal_of(task: int) -> np.ndarray:
    """(2,) float64: the goal of a task, an integer >= 0; the same one everywhere."""
    return np.random.default_rng(task).uniform(-REGION, REGION, 2)


class Navigation2DVectorEnv(gym.vector.VectorEnv):
    """`gym.make_vec("Navigation2D-v0", num_envs=400)`: many points, each looking for the goal of its own task.

    A point starts at the origin and moves by its action (2,), of which what exceeds `REACH` on an axis is cut off. It sees
    where it is, (2,) float32, and earns minus its distance from the goal after the move. Near the goal the episode terminates,
    after `HORIZON` steps it is truncated; autoreset is SAME_STEP, as in envs/vector.py. Nothing but the task is random.
    infos["parameters"] holds the goal that the next move is to come near: "goal_x" and "goal_y" (n,).
    Raises ValueError for fewer than one point.
    """

    def __init__(self, num_envs: int = 1):
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: expected at least 1")
        self.num_envs = num_envs
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = gym.spaces.Box(-REACH, REACH, (2,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self._seeds, self._drawn = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)  # drawn: tasks so far
        self._tasks = np.full(num_envs, -1)  # -1: a training task drawn for every episode
        self._goal, self._position = np.zeros((num_envs, 2)), np.zeros((num_envs, 2))
        self._length = np.zeros(num_envs, np.int64)
        self._ready = False

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None):
        """Start an episode of every point; returns (obs (n, 2) float32, infos).

        Point i draws from the seed `seed + i`, or `seed[i]` of a list; without a seed it goes on with its stream (the first
        time: from a random seed). options: {"tasks": (n,) integers}: from now on every episode of point i is of task tasks[i],
        the same goal whatever the seed, or of a training task drawn anew where it is -1, as at first.
        Raises ValueError for other seeds and other options.
        """
        if options:
            self._tasks = assigned_tasks(options, self.num_envs)
            for task in np.unique(self._tasks[self._tasks >= 0]):
                self._goal[self._tasks == task] = goal_of(task)
        if seed is not None or not self._ready:
            self._seeds[:], self._drawn[:] = market_seeds(seed, self.num_envs), 0
        self._ready = True
        self._begin(np.arange(self.num_envs))
        return self._position.astype(np.float32), self._infos()

    def step(self, actions: np.ndarray):
        """One move of every point, actions (n, 2): (obs, reward (n,) float32, terminated, truncated, infos), the caller's own.

        Raises ValueError for actions of another shape or not finite, ResetNeeded before the first reset.
        """
        if not self._ready:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != self.action_space.shape or not np.isfinite(actions).all():
            raise ValueError(f"actions: shape {actions.shape}: expected {self.action_space.shape}, finite numbers")
        self._position += actions.clip(-REACH, REACH)
        self._length += 1
        offset = self._position - self._goal
        reward = -np.hypot(offset[:, 0], offset[:, 1]).astype(np.float32)
        terminated = (np.abs(offset) < NEAR).all(axis=1)
        truncated = ~terminated & (self._length >= HORIZON)
        done, ended = terminated | truncated, {}
        if done.any():
            ended = {"final_obs": self._position.astype(np.float32), "_final_obs": done}
            self._begin(np.flatnonzero(done))
        return self._position.astype(np.float32), reward, terminated, truncated, {**self._infos(), **ended}

    def _begin(self, points: np.ndarray):
        """A new episode of some points (m,)."""
        self._position[points], self._length[points] = 0.0, 0
        for i in points[self._tasks[points] < 0]:  # each from a stream of its own, whatever other points there are
            self._goal[i] = goal_of(np.random.default_rng([self._seeds[i], self._drawn[i]]).integers(HELD_OUT))
            self._drawn[i] += 1

    def _infos(self):
        return {"parameters": {"goal_x": self._goal[:, 0].copy(), "goal_y": self._goal[:, 1].copy()}}


class Navigation2DEnv(gym.Env):
    """`gym.make("Navigation2D-v0")`: one point, over the same code; `reset` takes the same options."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode: str | None = None):
        if render_mode is not None:
            raise ValueError(f"render_mode={render_mode!r}: expected None; what there is to see is the observation")
        self.render_mode = None
        self.vector = Navigation2DVectorEnv(1)
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

    def step(self, action: np.ndarray):
        sought = self.vector._infos()
        obs, reward, terminated, truncated, infos = self.vector.step(np.asarray(action)[None])
        over = bool(terminated[0] or truncated[0])
        self._fresh = (obs, infos) if over else None
        last = infos["final_obs"][0] if over else obs[0]
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._first(sought)

    @staticmethod
    def _first(infos):
        return {"parameters": {name: values[0] for name, values in infos["parameters"].items()}}
