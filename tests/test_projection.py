"""The projection onto a portfolio's constraints: the same as a conic solver's, always feasible, never NaN."""

from typing import NamedTuple

import numpy as np
import pytest
from conftest import assert_same_bits, run_python
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from envs.projection import project

INF = np.inf


class Constraints(NamedTuple):
    """All arguments of `project` but the scores; `reach` is the range of nets that the rest allows."""

    lo: np.ndarray
    hi: np.ndarray
    group: np.ndarray
    group_cap: np.ndarray
    gross_cap: float
    net_low: float
    net_high: float
    cash: bool


def solve(y, k: Constraints, cash_score: float = 0.0):
    """w (n,), c"""
    w, scratch = np.full(len(y), np.nan), np.full(len(k.group_cap), np.nan)
    c = project(y, *k[:7], cash_score if k.cash else -INF, scratch, w)
    return w, c


@njit
def reach(side, group, group_cap, gross_cap, total):
    """Most that the weights of one sign, each <= side_i, can sum to; `total` (G,) is scratch."""
    total[:] = 0.0
    out = 0.0
    for i in range(len(side)):
        if group[i] >= 0:
            total[group[i]] += side[i]
        else:
            out += side[i]
    for g in range(len(group_cap)):
        out += min(total[g], group_cap[g])
    return min(out, gross_cap)


@njit
def excess(w, c, lo, hi, group, group_cap, gross_cap, net_low, net_high, cash, total):
    """Worst violation: (boxes and sign of cash, caps, net), each infinite for NaN. The net is held to what is in reach."""
    box, gross, net = max(0.0, -c) if cash else abs(c), 0.0, c
    highest = INF if cash else reach(hi, group, group_cap, gross_cap, total)
    lowest = -reach(-lo, group, group_cap, gross_cap, total)
    total[:] = 0.0
    for i in range(len(w)):
        box = max(box, lo[i] - w[i], w[i] - hi[i])
        gross += abs(w[i])
        net += w[i]
        if group[i] >= 0:
            total[group[i]] += abs(w[i])
    caps = max(0.0, gross - gross_cap)
    for g in range(len(group_cap)):
        caps = max(caps, total[g] - group_cap[g])
    low, high = min(net_low, highest), max(net_high, lowest)
    if not np.isfinite(net):
        return INF, INF, INF
    return box, caps, max(0.0, low - net, net - high) / max(1.0, abs(net))


def assert_feasible(w, c, k: Constraints, tol: float = 1e-9):
    box, caps, net = excess(w, c, *k, np.zeros(len(k.group_cap)))
    assert box == 0.0 and caps == 0.0 and net <= tol, (box, caps, net, k)


def in_reach(k: Constraints) -> bool:
    scratch = np.zeros(len(k.group_cap))
    low = -reach(-k.lo, k.group, k.group_cap, k.gross_cap, scratch)
    high = INF if k.cash else reach(k.hi, k.group, k.group_cap, k.gross_cap, scratch)
    return k.net_low <= high and low <= k.net_high


NETS = ("free", "range", "equal", "out of reach")


def random_constraints(rng, n: int, net: str, groups: int | None = None) -> Constraints:
    """Boxes with zero ones among them, caps that bind or not or are zero, groups of one and empty ones."""
    size = rng.choice([0.1, 0.3, 1.0])
    lo, hi = -size * rng.random(n), size * rng.random(n)
    if rng.random() < 0.3:
        lo[:], hi[:] = -size, size
    lo[rng.random(n) < rng.choice([0.0, 0.2, 1.0])] = 0.0
    hi[rng.random(n) < 0.1] = 0.0
    groups = rng.choice([0, 1, 3, n]) if groups is None else groups
    group = rng.integers(-1, groups, n) if groups else np.full(n, -1)
    room = (hi - lo).sum()
    group_cap = room * rng.random(groups) / max(1, groups)
    group_cap[rng.random(groups) < 0.1] = 0.0
    group_cap[rng.random(groups) < 0.2] = INF
    gross_cap = rng.choice([INF, 0.5 * room * rng.random(), 0.2 * room * rng.random(), 0.0], p=[0.3, 0.4, 0.25, 0.05])
    cash = rng.random() < 0.4
    k = Constraints(lo, hi, group, group_cap, gross_cap, -INF, INF, cash)
    scratch = np.zeros(groups)
    ends = -reach(-lo, group, group_cap, gross_cap, scratch), reach(hi, group, group_cap, gross_cap, scratch)
    a, b = np.sort(rng.uniform(*ends, 2)) if rng.random() < 0.7 else ends
    if net == "range":
        return k._replace(net_low=a, net_high=b)
    if net == "equal":
        return k._replace(net_low=a, net_high=a)
    if net == "out of reach":
        away = ends[1] + 0.3 if rng.random() < 0.5 else ends[0] - 0.3
        return k._replace(net_low=away, net_high=away + 0.1 if away > 0 else away)
    return k


def random_scores(rng, n: int) -> np.ndarray:
    y = rng.choice([0.05, 0.3, 1.0, 5.0]) * rng.standard_normal(n) + rng.choice([0.0, 0.3, -1.0])
    return np.round(y, 1) if rng.random() < 0.3 else y


def reference(y, k: Constraints, cash_score: float):
    """w (n,), c by a conic solver; where the net is out of reach, of the points with the closest one."""
    cp = pytest.importorskip("cvxpy", reason="cvxpy comes with skfolio, which is not installed")
    w, c = cp.Variable(len(y)), cp.Variable() if k.cash else cp.Constant(0.0)
    objective = cp.sum_squares(w - y) + (cp.square(c - cash_score) if k.cash else 0.0)
    limits = [w >= k.lo, w <= k.hi]
    limits += [cp.norm1(w[k.group == g]) <= cap for g, cap in enumerate(k.group_cap) if cap < INF and (k.group == g).any()]
    if k.gross_cap < INF:
        limits.append(cp.norm1(w) <= k.gross_cap)
    if k.cash:
        limits.append(c >= 0)
    scratch = np.zeros(len(k.group_cap))
    high = INF if k.cash else reach(k.hi, k.group, k.group_cap, k.gross_cap, scratch)
    low = -reach(-k.lo, k.group, k.group_cap, k.gross_cap, scratch)
    net = cp.sum(w) + c
    if min(k.net_low, high) > -INF:
        limits.append(net >= min(k.net_low, high))
    if max(k.net_high, low) < INF:
        limits.append(net <= max(k.net_high, low))
    problem = cp.Problem(cp.Minimize(objective), limits)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    assert problem.status in ("optimal", "optimal_inaccurate"), problem.status
    return w.value, float(c.value)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_equals_a_conic_solver(n, net):
    rng = np.random.default_rng([n, NETS.index(net)])
    for _ in range(30):
        k, y, cash_score = random_constraints(rng, n, net), random_scores(rng, n), rng.normal()
        (w, c), (w_ref, c_ref) = solve(y, k, cash_score), reference(y, k, cash_score)
        assert_feasible(w, c, k)
        np.testing.assert_allclose(np.append(w, c), np.append(w_ref, c_ref), atol=1e-5, err_msg=str((y, k)))
        cost, cost_ref = (((v - y) ** 2).sum() + (b - cash_score) ** 2 for v, b in ((w, c), (w_ref, c_ref)))
        assert abs(cost - cost_ref) <= 1e-5 * max(1.0, cost_ref)


def test_known_projections():
    free = Constraints(np.full(3, -9.0), np.full(3, 9.0), np.full(3, -1), np.zeros(0), INF, -INF, INF, False)
    y = np.array([3.0, -1.0, 0.5])
    np.testing.assert_array_equal(solve(y, free)[0], y)
    simplex = free._replace(lo=np.zeros(3), net_low=1.0, net_high=1.0)
    np.testing.assert_allclose(solve(np.array([0.9, 0.5, -2.0]), simplex)[0], [0.7, 0.3, 0.0], atol=1e-15)
    np.testing.assert_allclose(solve(y, free._replace(gross_cap=2.0))[0], [2, 0, 0], atol=1e-13)
    np.testing.assert_allclose(solve(y, free._replace(net_low=0.0, net_high=0.0))[0], y - 2.5 / 3, atol=1e-13)
    w, c = solve(np.array([0.4, 0.2, -1.0]), simplex._replace(cash=True), 0.7)
    np.testing.assert_allclose([*w, c], [0.3, 0.1, 0.0, 0.6], atol=1e-15)
    grouped = free._replace(group=np.array([0, 0, -1]), group_cap=np.array([1.0]))
    np.testing.assert_allclose(solve(np.array([2.0, -1.5, 4.0]), grouped)[0], [0.75, -0.25, 4.0], atol=1e-13)
    # the box of a coordinate holds after soft-thresholding, not before: clip(3) - 1 would be 0.5
    boxed = free._replace(hi=np.array([1.5, 9.0, 9.0]), gross_cap=2.5)
    np.testing.assert_allclose(solve(np.array([3.0, 2.0, 0.0]), boxed)[0], [1.5, 1.0, 0.0], atol=1e-13)


@st.composite
def problems(draw, nets=NETS):
    """Constraints, a generator"""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k = random_constraints(rng, draw(st.sampled_from([1, 2, 3, 4, 7, 30])), draw(st.sampled_from(nets)), None)
    return k, rng


@given(problems())
def test_constraints_hold_and_a_second_projection_changes_nothing(problem):
    k, rng = problem
    y = random_scores(rng, len(k.lo))
    w, c = solve(y, k, rng.normal())
    assert_feasible(w, c, k)
    again, c_again = solve(w, k, c)
    np.testing.assert_allclose(np.append(again, c_again), np.append(w, c), rtol=0, atol=1e-9)
    in_place = y.copy()
    project(in_place, *k[:7], -INF, np.zeros(len(k.group_cap)), in_place)
    assert_same_bits(in_place, solve(y, k._replace(cash=False))[0])


@given(problems())
def test_not_expansive_and_the_closest_point(problem):
    k, rng = problem
    a, b = (np.append(random_scores(rng, len(k.lo)), rng.normal() if k.cash else 0.0) for _ in range(2))
    pa, pb = (np.append(*solve(s[:-1], k, s[-1])) for s in (a, b))
    assert np.linalg.norm(pa - pb) <= np.linalg.norm(a - b) + 1e-9
    assert (a - pa) @ (pb - pa) <= 1e-9  # no feasible direction leads closer


@given(problems())
def test_a_feasible_point_is_returned_bit_for_bit(problem):
    k, rng = problem
    inner = 0.999 * solve(random_scores(rng, len(k.lo)), k._replace(net_low=-INF, net_high=INF))[0]
    c = rng.random() if k.cash else 0.0
    net = inner.sum() + c
    w, c_found = solve(inner, k._replace(net_low=net - rng.choice([0.0, 0.1]), net_high=net + rng.choice([0.0, 0.1])), c)
    assert_same_bits(w + 0.0, inner + 0.0)  # -0.0 becomes 0.0
    assert c_found == c


@given(problems())
def test_order_of_coordinates_and_names_of_groups_do_not_matter(problem):
    k, rng = problem
    n, groups = len(k.lo), len(k.group_cap)
    y, order, names = random_scores(rng, n), rng.permutation(n), rng.permutation(groups)
    cap = np.zeros(groups)
    cap[names] = k.group_cap
    group = np.where(k.group < 0, -1, np.append(names, -1)[k.group])[order]
    shuffled = k._replace(lo=k.lo[order], hi=k.hi[order], group=group.astype(np.int64), group_cap=cap)
    (w, c), (w_shuffled, c_shuffled) = solve(y, k, 0.2), solve(y[order], shuffled, 0.2)
    np.testing.assert_allclose(np.append(w_shuffled, c_shuffled), np.append(w[order], c), rtol=0, atol=1e-10)


@given(problems(), st.sampled_from([1e6, 1e3, 1e-6, 1e-12, 0.0]))
def test_huge_and_tiny_scores(problem, scale):
    k, rng = problem
    y = scale * rng.standard_normal(len(k.lo))
    w, c = solve(y, k, scale * rng.normal())
    assert_feasible(w, c, k)
    again, c_again = solve(w, k, c)
    np.testing.assert_allclose(np.append(again, c_again), np.append(w, c), rtol=0, atol=1e-9)


@given(problems(("equal",)), st.sampled_from([1e6, -1e6, 123456.0]))
def test_a_shift_of_all_scores_changes_nothing_where_the_net_is_given(problem, shift):
    k, rng = problem
    y, cash_score = np.round(random_scores(rng, len(k.lo)) * 1024) / 1024, 0.25  # so that shifting is exact
    (w, c), (w_shifted, c_shifted) = solve(y, k, cash_score), solve(y + shift, k, cash_score + shift)
    assert_feasible(w_shifted, c_shifted, k)
    np.testing.assert_allclose(np.append(w_shifted, c_shifted), np.append(w, c), rtol=0, atol=5e-13 * abs(shift))


@njit(error_model="numpy")
def many(calls, n, seed):
    """Worst box, cap and net excess, and the largest (y - Py)(Py' - Py), over random problems with two scores each."""
    np.random.seed(seed)
    groups = 4
    y, w, other, w_other = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    lo, hi, group, cap = np.zeros(n), np.zeros(n), np.zeros(n, np.int64), np.zeros(groups)
    kappa, total = np.zeros(groups), np.zeros(groups)
    box, caps, net, angle = 0.0, 0.0, 0.0, 0.0
    for _ in range(calls // 2):
        size, spread, shift = 10.0 ** np.random.uniform(-1, 0.5), 10.0 ** np.random.uniform(-2, 1), np.random.normal()
        long_only, used = np.random.random() < 0.5, np.random.randint(0, groups + 1)
        for i in range(n):
            lo[i] = 0.0 if long_only else -size * np.random.random()
            hi[i] = size * np.random.random() if np.random.random() < 0.9 else 0.0
            group[i] = np.random.randint(-1, used) if used else -1
            y[i], other[i] = shift + spread * np.random.normal(), shift + spread * np.random.normal()
            if np.random.random() < 0.2:
                y[i] = round(y[i])
        for g in range(groups):
            cap[g] = INF if np.random.random() < 0.2 else size * np.random.random() * n / 8
        gross = size * n * np.random.random() / 2 if np.random.random() < 0.7 else INF
        low = -size * n / 4 * np.random.random() if np.random.random() < 0.5 else size * n / 4 * np.random.random()
        high = low + (0.0 if np.random.random() < 0.5 else np.random.random())
        cash = np.random.random() < 0.4
        score, score_other = (np.random.normal(), np.random.normal()) if cash else (-INF, -INF)
        c = project(y, lo, hi, group, cap[:used], gross, low, high, score, kappa, w)
        c_other = project(other, lo, hi, group, cap[:used], gross, low, high, score_other, kappa, w_other)
        for k in range(2):
            a, b, d = excess(
                w if k else w_other, c if k else c_other, lo, hi, group, cap[:used], gross, low, high, cash, total[:used]
            )
            box, caps, net = max(box, a), max(caps, b), max(net, d)
        product = (score - c) * (c_other - c) if cash else 0.0
        for i in range(n):
            product += (y[i] - w[i]) * (w_other[i] - w[i])
        angle = max(angle, product)
    return box, caps, net, angle


def test_a_million_random_calls():
    worst = np.max([many(700_000, 6, 0), many(250_000, 15, 1), many(50_000, 40, 2)], axis=0)
    print("worst box, cap, net, angle:", worst)
    assert worst[0] == 0.0 and worst[1] == 0.0 and worst[2] <= 1e-10 and worst[3] <= 1e-8, worst


def trace() -> np.ndarray:
    """Results for a few problems of every kind."""
    out, rng = [], np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        for net in NETS:
            for scale in (1.0, 1.0, 1e6):
                k = random_constraints(rng, n, net)
                out.append(np.append(*solve(scale * random_scores(rng, n), k, rng.normal())))
    return np.concatenate(out)


def test_compiled_equals_pure_python(tmp_path):
    code = "import numpy as np, sys, test_projection; np.save(sys.argv[1], test_projection.trace())"
    done = run_python("-W", "error::RuntimeWarning", "-c", code, str(tmp_path / "w.npy"), NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr[-4000:]
    np.testing.assert_allclose(np.load(tmp_path / "w.npy"), trace(), rtol=1e-12, atol=1e-12)
