"""Navigation2D-v0: a point has to find a goal that it does not see. The task that meta-reinforcement learning is checked on.

The 2D navigation of MAML (Finn, Abbeel & Levine 2017, arXiv:1703.03400, section 5.3), as the authors' published code has it:
the reward is minus the distance to the goal. (The paper says the squared distance, but its returns are those of the distance:
who stays at the start has -38 on average, and -17 by squares; MAML has -40.4, -11.7, -3.3, -3.2 after 0 to 3 steps.)
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

HORIZON = 100  # steps of an episode
REACH = 0.1  # of a step, on each axis
REGION = 0.5  # goals are uniform on [-REGION, REGION]^2
NEAR = 0.01  # an episode terminates where both coordinates are nearer to the goal's
TRAINING_TASKS = 1_000_000  # tasks 0..999,999 are to train on, from here up they are held out


def goal_of(task: int) -> np.ndarray:
    """(2,) float64: the goal of a task, an integer >= 0; the same one everywhere."""
    return np.random.default_rng(task).uniform(-REGION, REGION, 2)


class Navigation2DVectorEnv(gym.vector.VectorEnv):
    """`gym.make_vec("Navigation2D-v0", num_envs=400)`: many points, each looking for the goal of its own task.

    A point starts at the origin and moves by its action (2,), of which what exceeds `REACH` on an axis is cut off. It sees where it
    is, (2,) float32, and earns minus its distance from the goal after the move. Near the goal the episode terminates, after
    `HORIZON` steps it is truncated; SAME_STEP autoreset, with `infos["final_obs"]`. `infos["task"]` (n,) int64 says which task
    each point has, at the observation that comes with it. Nothing else is random.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int = 1):
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: expected at least 1")
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = gym.spaces.Box(-REACH, REACH, (2,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self._tasks = np.full(num_envs, -1)  # asked for; -1: another one for every episode
        self._task = np.zeros(num_envs, np.int64)  # of the present episode
        self._goal, self._position = np.zeros((num_envs, 2)), np.zeros((num_envs, 2))
        self._length = np.zeros(num_envs, np.int64)
        self._ready = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start a new episode everywhere; returns (obs (n, 2) float32, infos).

        options["tasks"]: (n,) integers, the task that each point keeps from now on; -1, also at first: in every episode another
        one of the `TRAINING_TASKS`, drawn from `seed`. Raises ValueError for tasks of another shape or kind.
        """
        super().reset(seed=seed)
        if options and "tasks" in options:
            tasks = np.asarray(options["tasks"])
            if tasks.shape != (self.num_envs,) or tasks.dtype.kind not in "iu" or tasks.min() < -1:
                raise ValueError(
                    f"options['tasks']: {tasks.dtype}{tasks.shape}: expected {self.num_envs} integers, tasks from 0 up or -1 for any"
                )
            self._tasks = tasks.astype(np.int64)
        self._begin(np.arange(self.num_envs))
        self._ready = True
        return self._position.astype(np.float32), {"task": self._task.copy()}

    def _begin(self, points: np.ndarray):
        """A new episode of some points."""
        wanted = self._tasks[points]
        drawn = self.np_random.integers(TRAINING_TASKS, size=(wanted < 0).sum())
        wanted[wanted < 0] = drawn
        changed = (wanted != self._task[points]) | ~self._ready
        known = {task: goal_of(task) for task in np.unique(wanted[changed])}
        for point, task in zip(points[changed], wanted[changed]):
            self._goal[point] = known[task]
        self._task[points], self._position[points], self._length[points] = wanted, 0.0, 0

    def step(self, actions: np.ndarray):
        """One move of every point: (obs, reward (n,) float32, terminated, truncated, infos), all the caller's own.

        Raises ValueError for actions that are not (n, 2) finite numbers.
        """
        if not self._ready:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != (self.num_envs, 2) or not np.isfinite(actions).all():
            raise ValueError(f"actions: shape {actions.shape}: expected {(self.num_envs, 2)}, finite numbers")
        self._position += actions.clip(-REACH, REACH)
        self._length += 1
        offset = self._position - self._goal
        reward = -np.hypot(offset[:, 0], offset[:, 1]).astype(np.float32)
        terminated = (np.abs(offset) < NEAR).all(axis=1)
        truncated = ~terminated & (self._length >= HORIZON)
        done, infos = terminated | truncated, {}
        if done.any():
            infos = {"final_obs": self._position.astype(np.float32), "_final_obs": done}
            self._begin(np.flatnonzero(done))
        return self._position.astype(np.float32), reward, terminated, truncated, {"task": self._task.copy(), **infos}


class Navigation2DEnv(gym.Env):
    """`gym.make("Navigation2D-v0")`: one point; `reset` takes options["tasks"] too, one integer or a sequence of one."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode: None = None):
        if render_mode is not None:
            raise ValueError(f"render_mode={render_mode!r}: expected None")
        self.render_mode = None
        self.vector = Navigation2DVectorEnv(1)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if options and "tasks" in options:
            options = {**options, "tasks": np.atleast_1d(options["tasks"])}
        obs, infos = self.vector.reset(seed=seed, options=options)
        return obs[0], {"task": infos["task"][0]}

    def step(self, action: np.ndarray):
        task = self.vector._task[0]
        obs, reward, terminated, truncated, infos = self.vector.step(np.asarray(action)[None])
        last = infos["final_obs"][0] if terminated[0] or truncated[0] else obs[0]
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {"task": task}
