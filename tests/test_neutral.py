"""Betas, factor loadings, clusters, pairs and the projection onto zero exposure, against definitions and planted markets."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_bits, ragged_panel, tampered, whole
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from envs.features import standardised_returns
from envs.neutral import clusters, factor_loadings, market_beta, neutralise, pairs
from envs.panel import Panel, PanelError, Split


def panel_of(log_price: np.ndarray, segments=(0,)) -> Panel:
    """Closes only, S0, S1, ...; NaN where there is no bar."""
    days = np.datetime64("2020-01-01", "ns") + np.arange(len(log_price)) * np.timedelta64(1, "D")
    symbols = tuple(f"S{i}" for i in range(log_price.shape[1]))
    return Panel("made", days, symbols, np.exp(log_price), segments=np.array(segments))


def walk(rng, bars, symbols, common=0.0):
    """Log prices of a random walk, of which the share `common` of the variance is the market's."""
    moves = np.sqrt(1 - common) * rng.standard_normal((bars, symbols)) + np.sqrt(common) * rng.standard_normal((bars, 1))
    return np.cumsum(0.01 * moves, axis=0)


def rows(*ranges) -> Split:
    return Split("train", np.array(ranges))


def known_returns(panel):
    """Log return since the symbol's bar before in the same history, NaN where there is none."""
    parts = [pd.DataFrame(np.log(panel.close[panel.segment_of_row == s])) for s in range(len(panel.segments))]
    return np.concatenate([(p.ffill().diff()).where(p.notna()).to_numpy() for p in parts])


# --- market_beta


@pytest.mark.parametrize("window", (2, 25, 60))
def test_market_beta_equals_the_slow_definition(window):
    """With gaps, late and early ends of listings, a halt, and two histories."""
    panel = replace(ragged_panel(3), segments=np.array([0, 70]))
    found, returns = market_beta(panel, window), known_returns(panel)
    assert found.shape == (120, 6) and found.dtype == np.float64
    market = np.array([r[~np.isnan(r)].mean() if (~np.isnan(r)).any() else 0.0 for r in returns])
    seen = 0
    for t, i in np.ndindex(found.shape):
        start = panel.segments[panel.segment_of_row[t]]
        use = np.arange(max(start, t + 1 - window), t + 1)
        use = use[~np.isnan(returns[use, i])]
        if not panel.present[start : t + 1, i].any():
            assert found[t, i] == 0
        elif len(use) < 2:
            assert found[t, i] == 1
        else:
            covariance, w = np.cov(returns[use, i], market[use]), len(use) / (len(use) + 20)
            assert found[t, i] == pytest.approx(w * covariance[0, 1] / covariance[1, 1] + 1 - w, rel=1e-9, abs=1e-9)
            seen += 1
    assert seen > 400


def test_market_beta_by_hand():
    """Two symbols, of which one moves three times as much as the other: 3/2 and 1/2, shrunk by bars / (bars + 20)."""
    moves = np.array([0.0, 0.02, -0.01, 0.03, 0.01])
    panel = panel_of(np.cumsum(np.stack([3 * moves, moves], axis=1), axis=0))
    expected = [
        [1, 1],
        [1, 1],
        [1 + 2 / 22 / 2, 1 - 2 / 22 / 2],
        [1 + 3 / 23 / 2, 1 - 3 / 23 / 2],
        [1 + 4 / 24 / 2, 1 - 4 / 24 / 2],
    ]
    np.testing.assert_allclose(market_beta(panel), expected, rtol=1e-12)


def test_betas_average_to_one_and_a_single_symbol_is_the_market():
    rng = np.random.default_rng(0)
    beta = market_beta(panel_of(walk(rng, 200, 7, common=0.4)))
    np.testing.assert_allclose(beta.mean(axis=1), 1, rtol=1e-12)
    assert beta[-1].std() > 0.05
    np.testing.assert_allclose(market_beta(panel_of(walk(rng, 80, 1))), 1, rtol=1e-12)


def test_a_market_that_does_not_move_leaves_every_beta_at_one():
    """Flat, at a constant pace (whose variance is a rounding error), and with opposite moves that cancel."""
    steps = np.arange(100.0)[:, None]
    for log_price in (0 * steps + [1, 2], 0.01 * steps + [1, 2], 0.01 * (-1) ** steps * [1, -1]):
        np.testing.assert_array_equal(market_beta(panel_of(log_price)), 1)


# --- factor_loadings


def test_factor_loadings_equal_the_slow_definition():
    """Projectors onto each component agree with an SVD of the window, at bars of recomputation and between them."""
    panel, count, window, every = replace(ragged_panel(4, bars=300), segments=np.array([0, 140])), 3, 90, 20
    found, x = factor_loadings(panel, count, window, every), standardised_returns(panel)
    assert found.shape == (300, 6, count) and found.dtype == np.float64
    some = 0
    for t in range(300):
        start = panel.segments[panel.segment_of_row[t]]
        if t - start + 1 < 60:
            assert not found[t].any()
            continue
        at = t - (t - start + 1 - 60) % every
        use = slice(max(start, at + 1 - window), at + 1)
        covered = panel.present[use].sum(axis=0) >= (at + 1 - use.start) / 2
        some += not covered.all()
        centred = np.where(covered, x[use] - x[use].mean(axis=0), 0)
        vectors = np.linalg.svd(centred)[2][:count].T
        expected = vectors * np.where(vectors.sum(axis=0) < 0, -1, 1)
        np.testing.assert_allclose(found[t], expected, atol=1e-8)
    assert some > 20, "every symbol was covered: the test shows nothing"
    last = found[-1]
    np.testing.assert_allclose(last.T @ last, np.eye(count), atol=1e-12)


def test_the_first_loading_of_a_market_is_the_market():
    panel = panel_of(walk(np.random.default_rng(1), 300, 9, common=0.6))
    loadings = factor_loadings(panel, 2)
    assert not loadings[:59].any() and loadings[59].any()
    np.testing.assert_allclose(loadings[-1, :, 0], 1 / 3, atol=0.05)
    assert (loadings.sum(axis=1) >= 0).all()
    assert_same_bits(loadings[59:79], np.repeat(loadings[59:60], 20, axis=0), "held")
    assert loadings[79].tobytes() != loadings[78].tobytes()


def test_components_without_variance_are_zero():
    """Two symbols that move alike and one that stands still have one component; none have none."""
    one = walk(np.random.default_rng(2), 100, 1)
    loadings = factor_loadings(panel_of(np.hstack([one, one, 0 * one])), 3)
    np.testing.assert_allclose(loadings[-1], [[0.5**0.5, 0, 0], [0.5**0.5, 0, 0], [0, 0, 0]], atol=1e-9)
    assert not loadings[-1, :, 1:].any()
    assert not factor_loadings(panel_of(np.zeros((80, 3))), 2).any()
    gone = np.where(np.arange(200)[:, None] < [[10, 12]], walk(np.random.default_rng(3), 200, 2), np.nan)
    assert not factor_loadings(panel_of(gone), 1).any()  # no symbol has half of any window's bars


@pytest.mark.parametrize("bars", (99, 100))
def test_half_of_the_bars_of_the_window_are_needed(bars):
    log_price = walk(np.random.default_rng(0), 400, 3, common=0.6)
    log_price[:280, 1] = log_price[280 + bars :, 1] = np.nan
    loadings = factor_loadings(panel_of(log_price), 1, window=200, every=1)[399, :, 0]
    assert loadings[[0, 2]].all() and (loadings[1] != 0) == (bars == 100)


@pytest.mark.parametrize("exposure", (market_beta, lambda panel: factor_loadings(panel, 3, window=80, every=7)))
@pytest.mark.parametrize("seed", range(3))
def test_no_exposure_uses_a_later_bar(exposure, seed):
    """Every bar after t changed at random, bars removed and added: everything up to t keeps every bit."""
    panel, rng = ragged_panel(seed), np.random.default_rng(seed)
    before = exposure(panel)
    for t in (0, 58, 59, 66, *rng.integers(1, 112, 4)):
        after = exposure(tampered(panel, t, rng))
        assert_same_bits(after[: t + 1], before[: t + 1], f"up to row {t}")
        assert after[t + 1 :].tobytes() != before[t + 1 :].tobytes(), "nothing was changed"


@pytest.mark.parametrize(
    "call, words",
    (
        (lambda p: market_beta(p, 1), "window=1: expected at least 2"),
        (lambda p: factor_loadings(p, 0), "count=0: panel 'ragged' has 6 symbols; expected 1 to 6"),
        (lambda p: factor_loadings(p, 7), "count=7: panel 'ragged' has 6 symbols; expected 1 to 6"),
        (lambda p: factor_loadings(p, 2, window=1), "window=1, every=20: expected"),
        (lambda p: factor_loadings(p, 2, every=0), "window=250, every=0: expected"),
        (lambda p: clusters(p, whole(p), 7), "count=7: .* expected 1 to 6"),
        (lambda p: clusters(p, whole(p), 0), "count=0: .* expected 1 to 6"),
        (lambda p: pairs(p, whole(p), 4), "count=4: .* expected 1 to 3"),
        (lambda p: pairs(p, whole(p), 0), "count=0: .* expected 1 to 3"),
    ),
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(ragged_panel(0))


# --- clusters


def groups_of(rng, bars=400, sizes=(4, 3)):
    """Log prices of groups of symbols, each with a factor of its own, and the group of each symbol, mixed up."""
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    moves = rng.standard_normal((bars, len(sizes)))[:, group] + 0.7 * rng.standard_normal((bars, len(group)))
    return np.cumsum(0.01 * moves, axis=0), group


def by_first(group):
    """The same partition, numbered in the order of the first symbols."""
    names = list(dict.fromkeys(group.tolist()))
    return np.array([names.index(g) for g in group])


@pytest.mark.parametrize("seed", range(5))
def test_clusters_recover_the_groups_of_a_simulated_market(seed):
    log_price, group = groups_of(np.random.default_rng(seed), sizes=(4, 3, 3))
    found = clusters(panel_of(log_price), rows((0, 400)), 3)
    assert found.shape == (10,) and found.dtype == np.int64
    np.testing.assert_array_equal(found, by_first(group))


def test_clusters_by_hand():
    """Copies are nearest, opposites farthest; every count from one cluster to one for each symbol."""
    a, b = walk(np.random.default_rng(0), 200, 2).T
    panel = panel_of(np.stack([a, -a, b, 2 * a, a + 0.5 * b], axis=1))
    expected = {1: [0, 0, 0, 0, 0], 2: [0, 1, 0, 0, 0], 3: [0, 1, 2, 0, 0], 4: [0, 1, 2, 0, 3], 5: [0, 1, 2, 3, 4]}
    for count, labels in expected.items():
        np.testing.assert_array_equal(clusters(panel, rows((0, 200)), count), labels)
    np.testing.assert_array_equal(clusters(panel.select(["S0"]), rows((0, 200)), 1), [0])


def test_clusters_are_average_linkage_of_the_distance():
    """S1 and S2 join first, then S3. S0 is then 0.7479 from these three on average, S4 0.7764, and 0.7416 from each other: they
    join. Other linkages, or a distance that is linear in the correlation or ignores its sign, would cut otherwise."""
    correlation = np.eye(5)
    correlation[np.triu_indices(5, 1)] = [-0.2, -0.4, 0.2, -0.1, 0.6, 0.5, -0.2, -0.1, 0.2, -0.7]
    correlation += np.triu(correlation, 1).T
    noise = np.hstack([np.ones((200, 1)), np.random.default_rng(0).standard_normal((200, 5))])
    moves = np.linalg.qr(noise)[0][:, 1:] @ np.linalg.cholesky(correlation).T  # exact moments
    np.testing.assert_allclose(np.corrcoef(moves.T), correlation, atol=1e-12)
    log_price = np.vstack([np.zeros(5), np.cumsum(moves, axis=0)])
    np.testing.assert_array_equal(clusters(panel_of(log_price), rows((0, 201)), 2), [0, 1, 1, 1, 0])


def test_symbols_that_share_few_bars_join_those_that_are_near_or_stay_alone():
    """S6, late, shares 59 bars with the early S5 but enough with the others; S7 has too few bars for anything."""
    rng = np.random.default_rng(4)
    factor = rng.standard_normal((300, 2))
    moves = factor[:, [0, 0, 0, 1, 1, 0, 0, 0]] + 0.5 * rng.standard_normal((300, 8))
    log_price, row = np.cumsum(0.01 * moves, axis=0), np.arange(300)
    log_price[row >= 200, 5] = log_price[row < 140, 6] = log_price[row < 245, 7] = np.nan
    np.testing.assert_array_equal(clusters(panel_of(log_price), rows((0, 300)), 3), [0, 0, 0, 1, 1, 0, 0, 2])
    still = np.where(np.arange(8) == 3, 1.0, log_price)  # a price that does not move is near to none
    np.testing.assert_array_equal(clusters(panel_of(still), rows((0, 300)), 4), [0, 0, 0, 1, 2, 0, 0, 3])


@pytest.mark.parametrize("returns, expected", ((59, [0, 0, 1]), (60, [0, 1, 0])))
def test_sixty_shared_returns_are_needed(returns, expected):
    """S2 is S0 while it has bars; rows before its first and after its last do not count, though its price is carried on."""
    log_price = walk(np.random.default_rng(0), 300, 2, common=0.3)
    listed = (np.arange(300) >= 100) & (np.arange(300) <= 100 + returns)
    log_price = np.column_stack([log_price, np.where(listed, log_price[:, 0], np.nan)])
    np.testing.assert_array_equal(clusters(panel_of(log_price), rows((0, 300)), 2), expected)


# --- pairs


def cointegrated(rng, bars=500):
    """S0 with S4 and S1 with S3 within a stationary deviation, the first closer; S2, S5 and S6 on their own."""
    log_price = walk(rng, bars, 7)
    log_price[:, 4] = log_price[:, 0] + 0.003 * rng.standard_normal(bars) + 1
    log_price[:, 3] = log_price[:, 1] + 0.01 * rng.standard_normal(bars) - 2
    return log_price


@pytest.mark.parametrize("seed", range(5))
def test_pairs_recover_cointegrated_symbols(seed):
    found = pairs(panel_of(cointegrated(np.random.default_rng(seed))), rows((0, 500)), 2)
    expected = np.zeros((7, 2))
    expected[[0, 4], 0] = expected[[1, 3], 1] = 0.5, -0.5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("ranges", ([(0, 200)], [(0, 90), (95, 200)], [(20, 180)]))
def test_pairs_are_the_nearest_of_those_that_are_left(ranges):
    """Against all pairs listed one by one: deviations start at 0 in each history of each range."""
    panel = panel_of(walk(np.random.default_rng(6), 200, 8, common=0.5), segments=(0, 120))
    parts = [(max(a, s), min(b, e)) for a, b in ranges for s, e in ((0, 120), (120, 200)) if max(a, s) < min(b, e)]
    log_price = np.log(panel.close)
    size = {}
    for i, j in np.ndindex(8, 8):
        if i < j:
            spread = [log_price[a:b, i] - log_price[a:b, j] - (log_price[a, i] - log_price[a, j]) for a, b in parts]
            size[i, j] = sum(np.square(s).sum() for s in spread)
    expected = np.zeros((8, 4))
    for k in range(4):
        i, j = min(size, key=size.get)
        expected[i, k], expected[j, k] = 0.5, -0.5
        size = {pair: s for pair, s in size.items() if not {i, j} & set(pair)}
    np.testing.assert_array_equal(pairs(panel, rows(*ranges), 4), expected)
    np.testing.assert_array_equal(pairs(panel, rows(*ranges), 2), expected[:, :2])


def test_equally_near_pairs_are_taken_in_the_order_of_the_symbols():
    """Copies of three symbols."""
    panel = panel_of(np.repeat(walk(np.random.default_rng(0), 100, 3), 6, axis=1))
    np.testing.assert_array_equal(pairs(panel, rows((0, 100)), 9), np.kron(np.eye(9), [[0.5], [-0.5]]))


def test_pairs_need_enough_bars_and_name_what_lacks_them():
    log_price = walk(np.random.default_rng(0), 200, 4)
    log_price[50:71, 1] = np.nan
    with pytest.raises(
        PanelError, match=r"made: split 'train': 2 pairs need 4 symbols with at least 180 bars.*found 3.*: S1 \(179\)$"
    ):
        pairs(panel_of(log_price), rows((0, 200)), 2)
    assert not pairs(panel_of(log_price), rows((0, 200)), 1)[1].any()
    log_price[50, 1] = 0.0
    assert np.abs(pairs(panel_of(log_price), rows((0, 200)), 2)).sum() == 2
    with pytest.raises(PanelError, match=r"at least 60 bars each, found 0; too few bars: S0 \(59\), S1"):
        pairs(panel_of(log_price), rows((100, 159)), 1)


@pytest.mark.parametrize("choice", (lambda p, s: clusters(p, s, 3), lambda p, s: pairs(p, s, 2)))
@pytest.mark.parametrize("seed", range(3))
def test_only_rows_of_the_split_choose(choice, seed):
    """Every bar outside changed at random, also the one before the split, from which its first return would be taken."""
    rng = np.random.default_rng(seed)
    log_price, _ = groups_of(rng, sizes=(3, 3, 3))
    log_price[rng.random(log_price.shape) < 0.04] = np.nan
    split = rows((100, 180), (190, 260))
    before = choice(panel_of(log_price), split)
    inside = np.zeros(400, bool)
    inside[100:180] = inside[190:260] = True
    for _ in range(20):
        other = 5 * rng.standard_normal(log_price.shape)
        other[rng.random(other.shape) < 0.3] = np.nan
        np.testing.assert_array_equal(choice(panel_of(np.where(inside[:, None], log_price, other)), split), before)
    changed = [choice(panel_of(np.where(inside[:, None], np.cumsum(other, axis=0), log_price)), split) for other in
               0.01 * rng.standard_normal((5, *log_price.shape))]  # fmt: skip
    assert any((after != before).any() for after in changed), "nothing chooses"


# --- neutralise


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


ALL = torch.ones(4, dtype=torch.bool)


@st.composite
def problems(draw, full_rank=True):
    """weights (n,), exposures (n, k), movable (n,): at least k symbols can move, or any number."""
    n, k, seed = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    movable = rng.random(n) < draw(st.sampled_from((0.2, 0.6, 1.0)))
    exposures = rng.standard_normal((n, k)) + draw(st.sampled_from((0.0, 1.0)))
    if full_rank:
        k = min(k, n)
        exposures = exposures[:, :k]
        movable[rng.permutation(n)[:k]] = True
        if np.linalg.cond(exposures[movable]) > 1e3:
            exposures[movable] = np.linalg.qr(exposures[movable])[0]
    elif draw(st.booleans()):
        exposures[:, -1] = exposures[:, :-1].sum(axis=1)  # collinear, or zero
    return torch.from_numpy(rng.standard_normal(n)), torch.from_numpy(exposures), torch.from_numpy(movable)


def test_projection_by_hand():
    w, beta = tensor([0.5, 0.3, 0.2, 0.0]), torch.ones(4, 1, dtype=torch.float64)
    torch.testing.assert_close(neutralise(w, beta, ALL), w - 0.25)
    fixed = torch.tensor([False, True, True, True])
    torch.testing.assert_close(neutralise(w, beta, fixed), tensor([0.5, 0.3 - 1 / 3, 0.2 - 1 / 3, -1 / 3]))
    two = tensor([[1, 0], [1, 0], [0, 2], [0, 1.0]])  # the second: 2 w2 + w3 = 0.4 over |(2, 1)|^2 = 5
    torch.testing.assert_close(neutralise(w, two, ALL), tensor([0.1, -0.1, 0.2 - 0.16, -0.08]))


def test_nothing_movable_one_movable_and_no_exposure():
    w, beta = tensor([0.5, 0.3, 0.2, 0.1]), tensor([[1.0], [2], [1], [0]])
    none = ~ALL
    assert torch.equal(neutralise(w, beta, none), w)
    assert torch.equal(neutralise(w, 0 * beta, ALL), w)
    assert torch.equal(neutralise(w, beta[:, :0], ALL), w)
    one = torch.tensor([False, True, False, False])
    torch.testing.assert_close(neutralise(w, beta, one), tensor([0.5, -0.35, 0.2, 0.1]))
    useless = torch.tensor([False, False, False, True])
    assert torch.equal(neutralise(w, beta, useless), w)  # no exposure of its own: it offsets nothing
    both = torch.cat([beta, beta.flip(0)], dim=1)  # exposures 1.3 and 0.8 to offset by one symbol's 2 and 1
    torch.testing.assert_close(neutralise(w, both, one), tensor([0.5, 0.3 - (1.3 * 2 + 0.8) / 5, 0.2, 0.1]))


@given(problems())
def test_exposure_is_zero_where_it_can_be_and_the_projection_is_the_nearest_point(problem):
    w, e, movable = problem
    out = neutralise(w, e, movable)
    assert torch.equal(out[~movable], w[~movable])
    assert (e.T @ out).abs().max() < 1e-10 * max(1, w.abs().max(), out.abs().max())
    torch.testing.assert_close(neutralise(out, e, movable), out, rtol=0, atol=1e-10)
    free = (e * movable[:, None]).numpy()
    null = np.linalg.svd(free.T)[2][np.linalg.matrix_rank(free) :] * movable.numpy()  # directions that keep the exposure
    for step in np.random.default_rng(0).standard_normal((5, len(null))):
        other = out + torch.from_numpy(step @ null)
        assert (other - w).norm() >= (out - w).norm() - 1e-12


@given(problems(full_rank=False))
def test_projection_equals_least_squares(problem):
    """Also where exposures are collinear or zero, or more than the symbols that can move."""
    w, e, movable = problem
    offset = np.linalg.lstsq((e * movable[:, None]).numpy().T, (e.T @ w).numpy(), rcond=1e-8)[0]
    torch.testing.assert_close(neutralise(w, e, movable), w - torch.from_numpy(offset), rtol=1e-7, atol=1e-9)


def test_projection_equals_a_solver():
    rng = np.random.default_rng(5)
    w, e, movable = rng.standard_normal(8), rng.standard_normal((8, 3)), np.arange(8) > 1
    constraints = [{"type": "eq", "fun": lambda x: e.T @ x}, {"type": "eq", "fun": lambda x: x[:2] - w[:2]}]
    expected = minimize(lambda x: np.square(x - w).sum(), w, constraints=constraints, tol=1e-14).x
    found = neutralise(*(torch.from_numpy(a) for a in (w, e, movable)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_batches_broadcast():
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(3, 5, 4, generator=rng, dtype=torch.float64)
    e = torch.randn(5, 4, 2, generator=rng, dtype=torch.float64)
    movable = torch.rand(3, 1, 4, generator=rng) < 0.8
    found = neutralise(w, e, movable)
    assert found.shape == (3, 5, 4)
    for i, j in np.ndindex(3, 5):
        torch.testing.assert_close(found[i, j], neutralise(w[i, j], e[j], movable[i, 0]), rtol=0, atol=1e-12)
    assert neutralise(w[0, 0], e, movable[0]).shape == (5, 4)


def test_single_precision():
    rng = torch.Generator().manual_seed(1)
    w, e = torch.randn(50, 20, generator=rng), torch.randn(50, 20, 5, generator=rng)
    e[:, :, 4] = e[:, :, 0] - e[:, :, 1] + 1e-7 * e[:, :, 4]  # collinear but for rounding
    movable = torch.rand(50, 20, generator=rng) < 0.7
    found = neutralise(w, e, movable)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), neutralise(w.double(), e[..., :4].double(), movable), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ("full", "collinear", "zero", "few", "none"))
def test_gradients(case):
    """By finite differences: of the weights always, of the exposures where their rank does not change by a small step."""
    rng = torch.Generator().manual_seed(2)
    w, e = (torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True) for shape in ((2, 6), (2, 6, 3)))
    movable = torch.tensor([True, False, True, True, True, True])
    with torch.no_grad():
        if case == "collinear":
            e[:, :, 2] = 2 * e[:, :, 0]
        if case == "zero":
            e[:] = 0
        if case == "few":
            movable[2:5] = False
        if case == "none":
            movable[:] = False
    assert torch.autograd.gradcheck(lambda w: neutralise(w, e.detach(), movable), w)
    if case in ("full", "few", "none"):
        assert torch.autograd.gradcheck(lambda e: neutralise(w.detach(), e, movable), e)
    gradients = torch.autograd.grad(neutralise(w, e, movable).square().sum(), (w, e))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    "weights, exposures, movable",
    (
        ((4,), (5, 2), (4,)),
        ((4,), (4,), (4,)),
        ((4,), (4, 2), (1,)),
        ((4,), (4, 2), ()),
    ),
)
def test_shapes_that_do_not_fit_are_named(weights, exposures, movable):
    with pytest.raises(ValueError, match=r"weights \(4,\), exposures .*: expected \(\.\.\., N\)"):
        neutralise(torch.zeros(weights), torch.zeros(exposures), torch.ones(movable, dtype=torch.bool))


def test_movable_must_be_bool():
    with pytest.raises(ValueError, match=r"movable \(4,\) torch.float32: expected"):
        neutralise(torch.zeros(4), torch.zeros(4, 2), torch.ones(4))


def test_a_book_is_neutral_to_the_exposures_of_a_market():
    """To the market, a factor and the sums of two clusters at once, though some symbols have no bar and are held."""
    log_price, _ = groups_of(np.random.default_rng(1), sizes=(6, 6))
    panel = panel_of(np.where(np.random.default_rng(2).random(log_price.shape) < 0.1, np.nan, log_price))
    member = np.eye(2)[clusters(panel, rows((0, 200)), 2)]
    columns = [market_beta(panel)[..., None], factor_loadings(panel, 1), np.broadcast_to(member, (400, 12, 2))]
    e, movable = torch.from_numpy(np.concatenate(columns, axis=2)), torch.from_numpy(panel.present.copy())
    w = torch.from_numpy(np.random.default_rng(3).standard_normal((400, 12)))
    found = neutralise(w, e, movable)
    assert (e.mT @ found[..., None]).abs()[1:].max() < 1e-10  # all symbols are listed from row 1 on
    assert torch.equal(found[~movable], w[~movable]) and (found - w).abs()[movable].max() > 0.1
