"""Euclidean projection of scores onto a portfolio's constraints: boxes, group caps, a gross cap, a net range, and cash.

With multipliers nu (net), mu >= 0 (gross) and kappa_g >= 0 (groups) the KKT conditions separate by coordinate:
  w_i = clip(soft(y_i - nu, mu + kappa_g(i)), lo_i, hi_i),  c = max(0, cash_score - nu),
where soft(z, t) = sign(z) max(|z| - t, 0) (clipping after it is exact because lo_i <= 0 <= hi_i). A group's whole threshold
is max(mu, t_g), with t_g >= 0 the smallest at which the group keeps its own cap at this nu: it does not depend on mu. So
for a given nu first every t_g is found, then mu, each by one one-dimensional root, and the net falls in nu. All these
functions are monotone and piecewise linear, and Newton's method with their exact slopes ends on the right piece.
"""

import math

from numba import njit


@njit(cache=True, error_model="numpy", forceinline=True)
def _newton(x, rest, slope, a, b, low, high):
    """Next guess for the zero of a falling function in (a, b): `rest` is its value at x, -`slope` its derivative there.

    Bisection where Newton's step leaves (a, b); an end not yet known is infinite, and then `low` or `high` is next.
    """
    guess = x + rest / slope if slope > 1e-9 else math.inf
    if not a < guess < b:
        guess = 0.5 * (a + b)
    return min(max(guess, low), high)


@njit(cache=True, error_model="numpy", forceinline=True)
def _clip(z, t, lo, hi):
    """Long and short part of clip(soft(z, t), lo, hi), without branches: the signs of scores are hard to predict."""
    return min(max(z - t, 0.0), hi), max(min(z + t, 0.0), lo)


@njit(cache=True, error_model="numpy", forceinline=True)
def project(y, lo, hi, group, group_cap, gross_cap, net_low, net_high, cash_score, kappa, w):
    """The w, c that minimise |w - y|^2 + (c - cash_score)^2; writes w (n,), returns c. Time O(n (G + 1)), no allocation.

    Subject to lo_i <= w_i <= hi_i (lo, hi (n,), finite, lo <= 0 <= hi), sum of |w_i| in group g <= group_cap[g] (group
    (n,) int64, -1: none; group_cap (G,)), sum |w_i| <= gross_cap, net_low <= sum w_i + c <= net_high and c >= 0
    (cash_score -inf: c is 0). A net range out of reach is approached as far as the rest allows. Boxes and caps hold
    always, sums taken in this order; the net to 1e-10. A point that keeps all of them is returned bit for bit.
    kappa (G,) is scratch; w may be y.
    """
    n, groups = len(y), len(group_cap)
    box = 0.0
    for i in range(n):
        w[i] = y[i]
        box = max(box, max(hi[i], -lo[i]))
    c = 0.0
    for _ in range(2):  # large scores leave rounding errors of their own size, so then the result is projected again
        size = abs(cash_score) if cash_score > -math.inf else 0.0
        for i in range(n):
            size = max(size, abs(w[i]))
        tol = 1e-15 * (n + 4) * (1.0 + size + box)  # more than rounding does to a sum, so that a cap's root is hit from below
        for g in range(groups):
            kappa[g] = 0.0  # holds t_g; kept, like mu, as the first guess for the next nu
        nu, mu, a, b, move, target, far = 0.0, 0.0, -math.inf, math.inf, size, 0.0, 0.0
        for step in range(200):
            reach = move + 2.0 * tol  # no threshold moves by more than nu does; the first time: a threshold that leaves nothing
            slope = 0.0  # of the net in -nu
            for g in range(groups):
                t, ta, tb, cap = kappa[g], -math.inf, math.inf, group_cap[g]
                low, high = max(0.0, t - reach), t + reach
                free, signed = 0, 0
                for _ in range(100):
                    total, free, signed = 0.0, 0, 0
                    for i in range(n):
                        if group[i] == g:
                            long, short = _clip(w[i] - nu, t, lo[i], hi[i])
                            total += long - short
                            longs, shorts = int(0.0 < long < hi[i]), int(lo[i] < short < 0.0)
                            free += longs + shorts
                            signed += longs - shorts
                    if total > cap:
                        ta = t
                    elif t == 0.0 or total >= cap - tol:
                        tb = t
                        break
                    else:
                        tb = t
                    t = _newton(t, total - cap + 0.5 * tol, free, ta, tb, low, high)
                kappa[g] = tb
                if tb > mu and free > 0:  # a bound group moves only by shifting from shorts to longs
                    slope += free - signed * signed / free
            ma, mb = -math.inf, math.inf
            low, high = max(0.0, mu - reach), mu + reach
            net, free, signed = 0.0, 0, 0
            for _ in range(100):
                gross, net, free, signed = 0.0, 0.0, 0, 0
                for i in range(n):
                    t = mu
                    if groups > 0 and group[i] >= 0:
                        t = max(mu, kappa[group[i]])
                    long, short = _clip(w[i] - nu, t, lo[i], hi[i])
                    gross += long - short
                    net += long + short
                    if t <= mu:  # else its own group's cap holds it
                        longs, shorts = int(0.0 < long < hi[i]), int(lo[i] < short < 0.0)
                        free += longs + shorts
                        signed += longs - shorts
                if gross > gross_cap:
                    ma = mu
                elif mu == 0.0 or gross >= gross_cap - tol:
                    mb = mu
                    break
                else:
                    mb = mu
                mu = _newton(mu, gross - gross_cap + 0.5 * tol, free, ma, mb, low, high)
            mu = mb
            slope += free - signed * signed / free if mu > 0.0 and free > 0 else free
            c = max(0.0, cash_score - nu)
            net += c
            if c > 0.0:
                slope += 1.0
            if step == 0:
                target = min(max(net, net_low), net_high)
                far = size + box  # nothing changes beyond, but for cash
                if cash_score > -math.inf:
                    far += abs(target) + size
            rest = net - target
            if abs(rest) <= (groups + 4) * tol + 4e-15 * abs(target) or step == 199:  # 40 steps have always been enough
                break
            if rest > 0.0:
                if nu >= far:
                    break
                a = nu
            else:
                if nu <= -far:
                    break
                b = nu
            guess = _newton(nu, rest, slope, a, b, -far, far)
            move, nu = abs(guess - nu), guess
        for i in range(n):
            t = mu if group[i] < 0 else max(mu, kappa[group[i]])
            long, short = _clip(w[i] - nu, t, lo[i], hi[i])
            w[i] = long + short
        if tol <= 1e-12:
            break
        if cash_score > -math.inf:
            cash_score = c
    return c
