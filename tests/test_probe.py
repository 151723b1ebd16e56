"""What a linear map reads off a memory: known answers."""

import numpy as np
import pytest

from envs.probe import linear_probe


def memories(n=4000, m=3000, units=6):
    rng = np.random.default_rng(0)
    return rng.normal(5.0, [1e-3, 1, 10, 1, 1, 1e3], (n, units)), rng.normal(5.0, [1e-3, 1, 10, 1, 1, 1e3], (m, units)), rng


def test_share_of_the_variance_that_is_explained():
    """A linear function plus as much noise as signal: one half; of what is not in the memory: nothing."""
    a, b, rng = memories()
    signal = [1e3 * x[:, 0] + x[:, 1] - 1e-3 * x[:, 5] for x in (a, b)]
    assert linear_probe(a, signal[0], b, signal[1]) == pytest.approx(1.0, abs=0.02)
    noisy = [s + np.sqrt(3.0) * rng.standard_normal(len(s)) for s in signal]
    assert linear_probe(a, noisy[0], b, noisy[1]) == pytest.approx(0.5, abs=0.03)
    assert linear_probe(a, rng.random(len(a)), b, rng.random(len(b))) == pytest.approx(0.0, abs=0.01)


def test_r2_counts_from_the_mean_of_what_was_fitted():
    """Scored tasks whose mean is another: a memory that tells nothing is as good as that mean, R^2 is 0 by its definition."""
    a, b = np.zeros((10, 2)), np.ones((4, 2))
    assert linear_probe(a, np.arange(10.0), b, np.array([20.0, 21.0, 22.0, 23.0])) == pytest.approx(0.0, abs=1e-12)


def test_the_penalty_is_that_of_ridge_regression():
    sklearn = pytest.importorskip("sklearn.linear_model")
    a, b, rng = memories(30, 20)
    y, held = rng.random(30), rng.random(20)
    scaled = [(x - a.mean(axis=0)) / a.std(axis=0) for x in (a, b)]
    predicted = sklearn.Ridge(alpha=0.1 * 30).fit(scaled[0], y).predict(scaled[1])
    expected = 1 - np.square(held - predicted).sum() / np.square(held - y.mean()).sum()
    assert linear_probe(a, y, b, held) == pytest.approx(expected, rel=1e-9)


def test_accuracy_of_labels():
    """Three labels by the position of one unit; a blank memory names the most frequent."""
    a, b, _ = memories()
    labels = [np.array([-7, 3, 10])[(x[:, 1] > 5).astype(int) + (x[:, 2] > 12)] for x in (a, b)]
    assert linear_probe(a, labels[0], b, labels[1]) > (labels[1] == -7).mean() + 0.2
    two = [(x[:, 3] + x[:, 4] > 10).astype(int) for x in (a, b)]
    assert linear_probe(a, two[0], b, two[1]) > 0.97
    blank = linear_probe(np.zeros((6, 2)), np.array([1, 1, 1, 1, 0, 0]), np.zeros((4, 2)), np.array([1, 0, 0, 0]))
    assert blank == 0.25


def test_nothing_to_explain_is_nan():
    a, b, _ = memories(10, 5)
    assert np.isnan(linear_probe(a, np.arange(10.0), b, np.ones(5)))
    assert np.isnan(linear_probe(a, np.arange(10.0), np.full_like(b, np.inf), np.arange(5.0)))


@pytest.mark.parametrize("argument, change", [("truth", (9, 5)), ("held_truth", (10, 4)), ("held_memory", None)])
def test_shapes_that_do_not_fit_are_named(argument, change):
    a, b, _ = memories(10, 5)
    if change is None:
        change, b = (10, 5), b[:, :3]
    with pytest.raises(ValueError, match=rf"^{argument}: shape"):
        linear_probe(a, np.arange(float(change[0])), b, np.arange(float(change[1])))
