"""What a linear map can read off a network's memory: a diagnostic of what it has understood of a task."""

import numpy as np

RIDGE = 0.1  # penalty on the squared weights of standardised features, for each row that is fitted


def linear_probe(memory: np.ndarray, truth: np.ndarray, held_memory: np.ndarray, held_truth: np.ndarray) -> float:
    """Ridge regression of a truth on memories, fitted on some tasks and scored on others.

    memory (n, H) and truth (n,) are fitted, held_memory (m, H) and held_truth (m,) scored. Of floats: R^2, the share of the
    variance around the mean of what was fitted that is explained (0: nothing; below 0: worse than that mean). Of integers, that
    is labels: accuracy, the share whose label has the largest of one regression each (Hastie, Tibshirani & Friedman 2009,
    section 4.2). NaN where the truth does not vary among those scored, so that there is nothing to explain, or is not finite.

    Raises ValueError naming the argument whose shape does not fit.
    """
    memory, held_memory = np.asarray(memory, np.float64), np.asarray(held_memory, np.float64)
    truth, held_truth = np.asarray(truth), np.asarray(held_truth)
    for name, array, like in (("truth", truth, memory), ("held_truth", held_truth, held_memory)):
        if like.ndim != 2 or array.shape != like.shape[:1] or not len(array):
            raise ValueError(f"{name}: shape {array.shape}: expected ({len(like)},), one for each row of memories {like.shape}")
    if held_memory.shape[1] != memory.shape[1]:
        raise ValueError(f"held_memory: shape {held_memory.shape}: expected {memory.shape[1]} columns, as memory has")
    if (held_truth == held_truth[0]).all() or not all(np.isfinite(x).all() for x in (memory, truth, held_memory, held_truth)):
        return float("nan")
    labels = np.unique(truth) if truth.dtype.kind in "iu" else None
    target = truth[:, None].astype(np.float64) if labels is None else (truth[:, None] == labels).astype(np.float64)
    mean, scale = memory.mean(axis=0), memory.std(axis=0)
    scale[scale < 1e-12] = 1.0  # units that say nothing, such as those of a blank memory
    x, level = (memory - mean) / scale, target.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (target - level))
    predicted = level + (held_memory - mean) / scale @ weights
    if labels is not None:
        return float((labels[predicted.argmax(axis=1)] == held_truth).mean())
    return float(1.0 - np.square(held_truth - predicted[:, 0]).sum() / np.square(held_truth - level[0]).sum())
