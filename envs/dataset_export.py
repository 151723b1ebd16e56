"""Datasets for Minari, whose episodes hold T + 1 observations. (d3rlpy and CORL read the HDF5 file of dataset.py as it is.)"""

from collections.abc import Iterator

import gymnasium as gym
import h5py
import numpy as np

from envs.dataset import TRANSITION, Dataset, DatasetError


def to_minari_episodes(dataset: Dataset) -> Iterator[dict]:
    """Every episode as the fields of Minari's EpisodeData, one in memory at a time: id 0, 1, ..., observations (T + 1, D)
    float32, actions (T, A) or (T,), rewards (T,) float32, terminations and truncations (T,) bool, and no infos.
    """
    starts, stops = dataset.ranges(np.arange(len(dataset.terminated)), TRANSITION)
    known = np.flatnonzero(stops > starts)
    with h5py.File(dataset.path, "r") as file:
        for number, episode in enumerate(known):
            rows = dataset.read(file, TRANSITION, starts[episode], stops[episode])
            ends = np.arange(starts[episode] + 1, stops[episode] + 1) == stops[episode]
            yield {
                "id": number,
                "observations": np.concatenate([rows["observations"], rows["next_observations"][-1:]]),
                "actions": rows["actions"],
                "rewards": rows["rewards"],
                "terminations": ends & dataset.terminated[episode],
                "truncations": ends & ~dataset.terminated[episode],
                "infos": {},
            }


def export_minari(dataset: Dataset, name: str):
    """Write a copy, episode by episode, as the local Minari dataset `name` ("markets/portfolio-v0"); returns Minari's dataset.

    Raises DatasetError if Minari is not installed; what Minari itself raises, such as for a name that is taken, passes.
    """
    try:
        import minari
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise DatasetError(f"{dataset.path}: cannot export: expected Minari: pip install minari ({error})") from error
    return minari.create_dataset_from_buffers(
        name,
        (EpisodeBuffer(**episode) for episode in to_minari_episodes(dataset)),
        observation_space=gym.spaces.Box(-np.inf, np.inf, dataset.keys["observations"][1], np.float32),
        action_space=dataset.action_space,
        description=f"{dataset.path.name}, sha256 {dataset.meta['sha256']}",
        data_format="hdf5",
    )
