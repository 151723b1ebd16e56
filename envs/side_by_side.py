"""Several vectorised markets as one: those of the first, then those of the second, ..., each on bars of its own."""

from typing import Any

import gymnasium as gym
import numpy as np

from envs.vector import MarketVectorEnv


class SideBySide(gym.vector.VectorEnv):
    """`MarketVectorEnv`s of the same spaces, stepped together; what it returns is theirs, row below row.

    Like them it resets a finished episode at once, takes `out`, and saves its state; with `out` only what is written there
    avoids a copy. Market i takes the seed `seed + i`, whichever env it is in. Entries of infos that only some of them have
    (`final_obs`) are zeros in the rows of the others.

    Raises ValueError if there is no env, or the spaces differ.
    """

    def __init__(self, parts: list[MarketVectorEnv]):
        if not parts:
            raise ValueError("SideBySide: no environments: expected at least 1")
        self.parts = parts
        self.single_observation_space = parts[0].single_observation_space
        self.single_action_space = parts[0].single_action_space
        spaces = [(part.single_observation_space, part.single_action_space) for part in parts]
        for found in spaces[1:]:
            if found != spaces[0]:
                raise ValueError(f"SideBySide: spaces {found}: expected those of the first, {spaces[0]}")
        self.metadata = parts[0].metadata
        self.num_envs = sum(part.num_envs for part in parts)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        ends = np.cumsum([part.num_envs for part in parts])
        self._rows = [slice(end - part.num_envs, end) for part, end in zip(parts, ends)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        seeds = [None if seed is None else seed + rows.start for rows in self._rows]
        results = [part.reset(seed=s, options=options) for part, s in zip(self.parts, seeds)]
        return np.concatenate([obs for obs, _ in results]), self._together([infos for _, infos in results])

    def step(self, actions, out: np.ndarray | None = None):
        """As `MarketVectorEnv.step`."""
        results = [
            part.step(actions[rows], out=None if out is None else out[rows]) for part, rows in zip(self.parts, self._rows)
        ]
        obs, reward, terminated, truncated, infos = zip(*results)
        obs = np.concatenate(obs) if out is None else out
        return obs, *map(np.concatenate, (reward, terminated, truncated)), self._together(infos)

    def _together(self, infos):
        """Dicts of arrays (n, ...), or of dicts of such, as one."""
        joined = {}
        for name in dict.fromkeys(name for own in infos for name in own):
            example = next(own[name] for own in infos if name in own)
            if isinstance(example, dict):
                joined[name] = self._together([own[name] for own in infos])
            else:
                missing = [np.zeros((part.num_envs, *example.shape[1:]), example.dtype) for part in self.parts]
                joined[name] = np.concatenate([own.get(name, zeros) for own, zeros in zip(infos, missing)])
        return joined

    def get_state(self) -> dict[str, np.ndarray]:
        """As `MarketVectorEnv.get_state`; entries of part k begin with "k_"."""
        return {f"{k}_{name}": value for k, part in enumerate(self.parts) for name, value in part.get_state().items()}

    def set_state(self, state: dict[str, np.ndarray]):
        for k, part in enumerate(self.parts):
            part.set_state({name.removeprefix(f"{k}_"): v for name, v in state.items() if name.startswith(f"{k}_")})
