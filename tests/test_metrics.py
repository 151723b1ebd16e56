"""Scores: by hand, by their properties, and against three other libraries, with the reason wherever one of these differs."""

import math
import warnings
from typing import NamedTuple

import empyrical
import metrics
import numpy as np
import pandas as pd
import pytest
import quantstats.stats as quantstats
from hypothesis import assume, given
from hypothesis import strategies as st
from metrics import SCORES
from scipy import integrate, stats
from skfolio import measures as skfolio

from envs import ledger
from envs.costs import RECORD

NAN, P = float("nan"), 252.0
# Basis points, so that no case is lost in rounding.
RETURNS = st.lists(st.integers(-3000, 3000).map(lambda bps: 1e-4 * bps), min_size=2, max_size=50).map(np.array)
CHARGES = ["commission", "spread", "slippage", "impact", "borrow", "financing"]


class Series(NamedTuple):
    r: np.ndarray
    benchmark: np.ndarray
    per_year: float
    dated: pd.Series  # r and the benchmark on daily dates, for quantstats
    dated_benchmark: pd.Series


def dated(r) -> pd.Series:
    return pd.Series(r, index=pd.date_range("2000-01-01", periods=len(r), freq="D"))


def random_series(number: int) -> Series:
    """Of one of six kinds: Gaussian, Student-t, skewed to either side, short, often out of the market, without a loss."""
    rng, kind = np.random.default_rng(number), number % 6
    bars = 30 if kind == 3 else int(rng.choice([60, 251, 520, 1000]))
    noise = rng.standard_normal(bars)
    if kind == 1:
        noise = rng.standard_t(3, bars)
    if kind == 2:
        noise = (1.0 - rng.exponential(size=bars)) * rng.choice([-1.0, 1.0])
    benchmark = 2e-4 + 0.01 * rng.standard_normal(bars)
    r = 3e-4 + 0.008 * noise + rng.uniform(-1, 1) * benchmark
    if kind == 4:
        r[rng.random(bars) < 0.6] = 0.0
    if kind == 5:
        r = np.abs(r) + 1e-6
    r = np.maximum(r, -0.9)  # an account that is lost for good has a test of its own
    return Series(r, benchmark, float(rng.choice([252, 52, 365.25])), dated(r), dated(benchmark))


@pytest.fixture(scope="module")
def series() -> list[Series]:
    return [random_series(number) for number in range(1000)]


def longest_drawdown(returns: pd.Series) -> float:
    """From quantstats' list of drawdowns, which counts bars under water: a recovery comes one bar later."""
    under = quantstats.to_drawdown_series(returns)
    found = quantstats.drawdown_details(under)
    open_end = (found["end"] == returns.index[-1].strftime("%Y-%m-%d")) & (under.iloc[-1] < 0)
    return max(found["days"] + ~open_end, default=0)


def arithmetic_alpha(s: Series) -> float:
    """empyrical's alpha, which compounds the alpha of a bar, as the sum of a year's."""
    alpha = empyrical.alpha_aligned(s.r, s.benchmark, annualization=s.per_year)
    return s.per_year * ((1 + alpha) ** (1 / s.per_year) - 1)


OURS = {
    "total_return": lambda s: metrics.total_return(s.r),
    "annual_return": lambda s: metrics.annual_return(s.r, s.per_year),
    "volatility": lambda s: metrics.volatility(s.r, s.per_year),
    "sharpe": lambda s: metrics.sharpe(s.r, s.per_year),
    "sortino": lambda s: metrics.sortino(s.r, s.per_year),
    "max_drawdown": lambda s: metrics.max_drawdown(s.r),
    "drawdown_duration": lambda s: metrics.drawdown_duration(s.r),
    "calmar": lambda s: metrics.calmar(s.r, s.per_year),
    "cvar": lambda s: metrics.cvar(s.r),
    "cvar of 10%": lambda s: metrics.cvar(s.r, 0.1),
    "tail_ratio": lambda s: metrics.tail_ratio(s.r),
    "hit_rate": lambda s: metrics.hit_rate(s.r),
    "profit_factor": lambda s: metrics.profit_factor(s.r),
    "payoff": lambda s: metrics.payoff(s.r),
    "skewness": lambda s: metrics.skewness(s.r),
    "kurtosis": lambda s: metrics.kurtosis(s.r),
    "alpha": lambda s: metrics.alpha_beta(s.r, s.benchmark, s.per_year)[0],
    "beta": lambda s: metrics.alpha_beta(s.r, s.benchmark, s.per_year)[1],
    "information_ratio": lambda s: metrics.information_ratio(s.r, s.benchmark, s.per_year),
    "psr": lambda s: psr_of(s.r),
    "psr above 0.02": lambda s: psr_of(s.r, 0.02),
    "dsr": lambda s: metrics.dsr(*moments(s.r), np.var(s.benchmark[:20], ddof=1), 20),
}
PEERS = {
    ("total_return", "empyrical"): lambda s: empyrical.cum_returns_final(s.r),
    ("total_return", "quantstats"): lambda s: quantstats.comp(s.dated),
    ("annual_return", "empyrical"): lambda s: empyrical.annual_return(s.r, annualization=s.per_year),
    ("annual_return", "quantstats"): lambda s: quantstats.cagr(s.dated, periods=s.per_year),
    ("volatility", "empyrical"): lambda s: empyrical.annual_volatility(s.r, annualization=s.per_year),
    ("volatility", "quantstats"): lambda s: quantstats.volatility(s.dated, periods=s.per_year),
    ("volatility", "skfolio"): lambda s: skfolio.standard_deviation(s.r) * math.sqrt(s.per_year),
    ("sharpe", "empyrical"): lambda s: empyrical.sharpe_ratio(s.r, annualization=s.per_year),
    ("sharpe", "quantstats"): lambda s: quantstats.sharpe(s.dated, periods=s.per_year),
    ("sortino", "empyrical"): lambda s: empyrical.sortino_ratio(s.r, annualization=s.per_year),
    ("sortino", "quantstats"): lambda s: quantstats.sortino(s.dated, periods=s.per_year),
    ("max_drawdown", "empyrical"): lambda s: empyrical.max_drawdown(s.r),
    ("max_drawdown", "quantstats"): lambda s: quantstats.max_drawdown(s.dated),
    ("max_drawdown", "skfolio"): lambda s: -skfolio.max_drawdown(skfolio.get_drawdowns(s.r, compounded=True)),
    ("drawdown_duration", "quantstats"): lambda s: longest_drawdown(s.dated),
    ("calmar", "empyrical"): lambda s: empyrical.calmar_ratio(s.r, annualization=s.per_year),
    ("calmar", "quantstats"): lambda s: quantstats.calmar(s.dated, periods=s.per_year),
    ("cvar", "empyrical"): lambda s: empyrical.conditional_value_at_risk(s.r),
    ("cvar of 10%", "empyrical"): lambda s: empyrical.conditional_value_at_risk(s.r, 0.1),
    ("tail_ratio", "empyrical"): lambda s: empyrical.tail_ratio(s.r),
    ("tail_ratio", "quantstats"): lambda s: quantstats.tail_ratio(s.dated),
    ("hit_rate", "quantstats"): lambda s: quantstats.win_rate(s.dated),
    ("profit_factor", "quantstats"): lambda s: quantstats.profit_factor(s.dated),
    ("payoff", "quantstats"): lambda s: quantstats.payoff_ratio(s.dated),
    ("skewness", "skfolio"): lambda s: skfolio.skew(s.r),
    ("skewness", "scipy"): lambda s: stats.skew(s.r),
    ("kurtosis", "skfolio"): lambda s: skfolio.kurtosis(s.r),
    ("kurtosis", "scipy"): lambda s: stats.kurtosis(s.r, fisher=False),
    ("alpha", "quantstats"): lambda s: quantstats.greeks(s.dated, s.dated_benchmark, periods=s.per_year)["alpha"],
    ("alpha", "empyrical"): arithmetic_alpha,
    ("beta", "quantstats"): lambda s: quantstats.greeks(s.dated, s.dated_benchmark)["beta"],
    ("beta", "empyrical"): lambda s: empyrical.beta_aligned(s.r, s.benchmark),
    ("information_ratio", "quantstats"): lambda s: (
        quantstats.information_ratio(s.dated, s.dated_benchmark) * math.sqrt(s.per_year)
    ),
    ("information_ratio", "empyrical"): lambda s: empyrical.excess_sharpe(s.r, s.benchmark) * math.sqrt(s.per_year),
    ("psr", "skfolio"): lambda s: skfolio.probabilistic_sharpe_ratio(s.r),
    ("psr above 0.02", "skfolio"): lambda s: skfolio.probabilistic_sharpe_ratio(s.r, 0.02),
    ("dsr", "skfolio"): lambda s: skfolio.deflated_sharpe_ratio(s.r, s.benchmark[:20]),
}
# The kind of series, without a loss, that these are not defined on.
UNDEFINED = {"sortino": 5, "calmar": 5, "profit_factor": 5, "payoff": 5}


def score_of(name: str, r: np.ndarray, benchmark: np.ndarray, per_year: float) -> float:
    return OURS[name](Series(r, benchmark, per_year, None, None))


def moments(r) -> tuple[float, int, float, float]:
    return metrics.sharpe(r, 1.0), len(r), metrics.skewness(r), metrics.kurtosis(r)


def psr_of(r, benchmark_sharpe: float = 0.0) -> float:
    return metrics.psr(*moments(r), benchmark_sharpe)


@pytest.mark.parametrize("score, library", PEERS)
def test_agrees_with(series, score, library):
    """On 1,000 series, to 1e-9 of the value or 1e-12, whichever is more."""
    some = [s for number, s in enumerate(series) if number % 6 != UNDEFINED.get(score)]
    if score == "drawdown_duration":
        some = [s for s in some if not falls_from_the_start_only(s.dated)]
    assert len(some) > 800
    found = [OURS[score](s) for s in some]
    np.testing.assert_allclose(found, [PEERS[score, library](s) for s in some], rtol=1e-9, atol=1e-12, equal_nan=False)
    assert all(type(x) is float for x in found)
    assert np.isnan([OURS[score](s) for number, s in enumerate(series) if number % 6 == UNDEFINED.get(score)]).all()


def falls_from_the_start_only(returns: pd.Series) -> bool:
    under = quantstats.to_drawdown_series(returns).to_numpy() < 0
    return under[0] and not (under[1:] & ~under[:-1]).any()


@pytest.mark.parametrize("r, bars", [([-0.1, 0.01, 0.02, -0.01], 4), ([-0.1, 0.01, 0.2, 0.01], 3)])
def test_quantstats_overlooks_a_drawdown_from_the_start_if_it_is_the_only_one(r, bars):
    """Its list looks for bars at a peak with a fall after them, and the start is none of its bars."""
    assert quantstats.drawdown_details(quantstats.to_drawdown_series(dated(r))).empty
    assert quantstats.max_drawdown(dated(r)) == pytest.approx(-0.1) and metrics.drawdown_duration(r) == bars


def test_quantstats_corrects_moments_for_bias():
    """Ours are the sample's, as in Bailey & Lopez de Prado's formula, and kurtosis is raw; quantstats' is the excess over 3."""
    r = random_series(3).r
    n, excess = len(r), metrics.kurtosis(r) - 3
    assert quantstats.skew(dated(r)) == pytest.approx(metrics.skewness(r) * math.sqrt(n * (n - 1)) / (n - 2), rel=1e-9)
    corrected = (n - 1) / (n - 2) / (n - 3) * ((n + 1) * excess + 6)
    assert quantstats.kurtosis(dated(r)) == pytest.approx(corrected, rel=1e-9)


def test_quantstats_psr_can_have_no_value():
    """It is the formula, and the kurtosis is raw, but of moments corrected for bias. These can break kurtosis >= 1 +
    skewness^2, which keeps the root real: then it has no value, where ours, and skfolio's, have one.
    """
    r = random_series(3).r
    corrected = quantstats.skew(dated(r)), quantstats.kurtosis(dated(r)) + 3
    theirs = quantstats.probabilistic_sharpe_ratio(dated(r))
    assert theirs == pytest.approx(metrics.psr(metrics.sharpe(r, 1.0), len(r), *corrected), rel=1e-9)
    assert abs(theirs - psr_of(r)) > 1e-5
    r = np.array([0.013, 0.013, 0.003, 0.003, 0.003, 0.003, 0.003, 0.003])
    with np.errstate(invalid="ignore"):
        assert np.isnan(quantstats.probabilistic_sharpe_ratio(dated(r)))
    assert psr_of(r) == pytest.approx(skfolio.probabilistic_sharpe_ratio(r), rel=1e-9)


def test_other_tails():
    """quantstats' CVaR is a Gaussian's unless told otherwise: blind to the tail that it is for. skfolio counts a part of a
    bar: 1.5 of 30 where ours, empyrical's and quantstats' historical one count 2; the same where the share is of whole bars.
    """
    r = random_series(3).r
    worst = np.sort(r)
    assert metrics.cvar(r) == pytest.approx((worst[0] + worst[1]) / 2, rel=1e-12)
    assert quantstats.cvar(dated(r), method="historical") == pytest.approx(metrics.cvar(r), rel=1e-9)
    assert -skfolio.cvar(r) == pytest.approx((worst[0] + worst[1] / 2) / 1.5, rel=1e-9)
    long = random_series(2).r[:60]
    assert -skfolio.cvar(long) == pytest.approx(metrics.cvar(long), rel=1e-9)
    crash = np.append(np.full(99, 0.001), -0.5)
    assert metrics.cvar(crash) == pytest.approx((-0.5 + 4 * 0.001) / 5)
    assert quantstats.cvar(dated(np.append(crash, crash))) > -0.12 < -0.05 > metrics.cvar(crash)


def test_empyrical_compounds_alpha():
    """Ours adds up: annual mean = alpha + beta * annual mean of the benchmark."""
    s = random_series(0)
    alpha, beta = metrics.alpha_beta(s.r, s.benchmark, P)
    assert empyrical.alpha_aligned(s.r, s.benchmark, annualization=P) == pytest.approx((1 + alpha / P) ** P - 1, rel=1e-9)
    assert alpha + beta * P * s.benchmark.mean() == pytest.approx(P * s.r.mean(), rel=1e-12)


def test_a_lost_account_stays_lost():
    """Two losses of 150% multiply to a gain elsewhere, and to a drawdown of more than everything."""
    r = np.array([0.1, -1.5, -1.5, 0.3])
    for score in (metrics.total_return, metrics.max_drawdown):
        assert score(r) == -1.0
    assert metrics.annual_return(r, P) == -1.0 and metrics.calmar(r, P) == -1.0 and metrics.drawdown_duration(r) == 3
    assert empyrical.cum_returns_final(r) > -1 and empyrical.max_drawdown(r) < -1 and quantstats.comp(dated(r)) > -1


def test_quantstats_takes_large_gains_for_prices():
    r = np.array([0.1, 1.2, 0.3, 0.2])
    assert metrics.volatility(r, 1.0) == pytest.approx(np.std(r, ddof=1), rel=1e-12)
    assert quantstats.volatility(dated(r), periods=1) == pytest.approx(np.std(r[1:] / r[:-1] - 1, ddof=1), rel=1e-9)


def test_nothing_to_divide_by():
    """Elsewhere inf, 0 or NaN, by function; here NaN, so that no ranking takes it for the best or for a number."""
    gains = np.array([0.01, 0.02, 0.03])
    for score in (metrics.profit_factor, metrics.payoff):
        assert np.isnan(score(gains))
    assert np.isnan(metrics.sortino(gains, P)) and np.isnan(metrics.calmar(gains, P))
    assert quantstats.profit_factor(dated(gains)) == np.inf and empyrical.sortino_ratio(gains) == np.inf
    assert np.isnan(quantstats.sortino(dated(gains)))
    flat = np.zeros(30)
    for score in (metrics.tail_ratio, metrics.hit_rate, metrics.skewness, metrics.kurtosis, psr_of):
        assert np.isnan(score(flat))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert quantstats.win_rate(dated(flat)) == 0.0
        assert np.isnan(empyrical.tail_ratio(flat)) and empyrical.tail_ratio(np.append(flat, [1.0] * 4)) == np.inf
    assert np.isnan(metrics.tail_ratio(np.append(flat, [1.0] * 4)))
    constant = np.full(30, 1e-3)
    assert metrics.sharpe(constant, P) == 0.0 and empyrical.sharpe_ratio(constant) == np.inf
    assert metrics.volatility(constant, P) == pytest.approx(0, abs=1e-12)
    assert metrics.max_drawdown(gains) == metrics.drawdown_duration(gains) == 0.0


OF_ONE_BAR = {"total_return", "annual_return", "max_drawdown", "drawdown_duration", "cvar", "cvar of 10%", "tail_ratio"}


@pytest.mark.parametrize(
    "r, defined",
    [([], set()), ([0.01], {*OF_ONE_BAR, "hit_rate"}), ([-0.01], {*OF_ONE_BAR, "hit_rate", "calmar", "profit_factor"})],
)
def test_too_few_bars(r, defined):
    found = {name: score_of(name, np.array(r), np.array(r), P) for name in OURS if name != "dsr"}
    assert {name for name, value in found.items() if not np.isnan(value)} == {*defined, "sharpe"} and found["sharpe"] == 0.0
    if r:
        assert found["total_return"] == pytest.approx(r[0])
        assert found["annual_return"] == pytest.approx((1 + r[0]) ** 252 - 1)


def test_a_lucky_bar_may_compound_to_infinity():
    assert metrics.annual_return([0.01], 1e6) == np.inf


HAND = [0.10, -0.05, 0.0, -0.20, 0.30, -0.10]
BY_HAND = {
    "total_return": 1.1 * 0.95 * 0.8 * 1.3 * 0.9 - 1,
    "annual_return": (1.1 * 0.95 * 0.8 * 1.3 * 0.9) ** 2 - 1,  # 12 bars a year, 6 of them here
    "volatility": math.sqrt(12 * (0.01 + 0.0025 + 0.04 + 0.09 + 0.01 - 0.05**2 / 6) / 5),
    "sharpe": 12 * 0.05 / 6 / math.sqrt(12 * (0.1525 - 0.05**2 / 6) / 5),
    "sortino": math.sqrt(12) * (0.05 / 6) / math.sqrt((0.0025 + 0.04 + 0.01) / 6),
    "max_drawdown": 0.95 * 0.8 - 1,  # after 1.1; then 1.0868, below it again
    "drawdown_duration": 5,  # from the first bar to the last
    "calmar": ((1.1 * 0.95 * 0.8 * 1.3 * 0.9) ** 2 - 1) / (1 - 0.95 * 0.8),
    "cvar": -0.2,  # int(5 * 0.05) + 1: one bar
    "cvar of 10%": -0.2,
    "tail_ratio": (0.1 + 0.75 * 0.2) / (0.2 - 0.25 * 0.1),  # a quarter of the way from the 5th to the 6th, and so below
    "hit_rate": 2 / 5,
    "profit_factor": 0.4 / 0.35,
    "payoff": (0.4 / 2) / (0.35 / 3),
}


@pytest.mark.parametrize("score", BY_HAND)
def test_by_hand(score):
    assert score_of(score, np.array(HAND), np.zeros(6), 12.0) == pytest.approx(BY_HAND[score], rel=1e-12)


def test_moments_by_hand():
    """Deviations of 0, 0, 0 and 4 from their mean of 1 are -1, -1, -1 and 3: m2 = 3, m3 = 6, m4 = 21."""
    r = np.array([0.0, 0.0, 0.0, 0.04])
    assert metrics.skewness(r) == pytest.approx(6 / 3**1.5, rel=1e-12)
    assert metrics.kurtosis(r) == pytest.approx(21 / 9, rel=1e-12)
    root = math.sqrt(1 - 6 / 3**1.5 * 0.5 + (21 / 9 - 1) / 4 * 0.5**2)  # the Sharpe ratio of a bar is 1 / sqrt(12 / 3)
    assert psr_of(r, 0.2) == pytest.approx(stats.norm.cdf((0.5 - 0.2) * math.sqrt(3) / root), rel=1e-12)


def test_benchmark_by_hand():
    """r = 0.002 + 0.5 * benchmark + what is orthogonal to the benchmark and to a constant."""
    benchmark = np.array([0.01, 0.02, 0.03, -0.02])
    r = 0.002 + 0.5 * benchmark + np.array([-0.003, 0.001, 0.001, 0.001])
    assert metrics.alpha_beta(r, benchmark, 50) == pytest.approx((50 * 0.002, 0.5), rel=1e-12)
    assert r - benchmark == pytest.approx([-0.006, -0.007, -0.012, 0.013])  # mean -3, deviations -3, -4, -9, 16: squares 362
    assert metrics.information_ratio(r, benchmark, 50) == pytest.approx(-3 / math.sqrt(362 / 3) * math.sqrt(50), rel=1e-12)


@pytest.mark.parametrize(
    "r, bars",
    [
        ([0.1, 0.1], 0),
        ([0.1, 0.0, 0.0, 0.1], 0),  # cash at the peak is not under water
        ([-0.5, 1.0], 2),  # at the old peak again is a recovery
        ([-0.5, 0.5, 0.1], 3),  # never again: to the end
        ([0.1, 0.1, -0.1], 1),
        ([-0.1, 0.5, -0.1, 0.0, 0.5, 0.0, -0.1, 0.2], 3),  # 2, 3 and 2 bars
        ([-0.1, 0.5, -0.1, 0.5, -0.1, 0.0, 0.0], 3),
    ],
)
def test_time_under_water(r, bars):
    assert metrics.drawdown_duration(np.array(r)) == bars


def test_drawdown_includes_the_start():
    assert metrics.max_drawdown([-0.2, 0.1]) == pytest.approx(-0.2)
    assert metrics.max_drawdown([0.5, -0.1, 0.5, -0.3, 0.1]) == pytest.approx(-0.3)


@given(RETURNS, st.sampled_from((1e-12, 0.01, 0.5, 3.0)))
def test_scale_does_not_matter(r, scale):
    """Twice the risk is no better and no worse, to these."""
    scores = [metrics.tail_ratio, metrics.hit_rate, metrics.profit_factor, metrics.payoff, metrics.skewness, metrics.kurtosis]
    for score in (*scores, lambda r: metrics.sharpe(r, P), lambda r: metrics.sortino(r, P), psr_of):
        assert score(scale * r) == pytest.approx(score(r), rel=1e-6, abs=1e-9, nan_ok=True)


@given(RETURNS)
def test_sides_swap(r):
    assert metrics.skewness(-r) == pytest.approx(-metrics.skewness(r), abs=1e-9, nan_ok=True)
    assert metrics.kurtosis(-r) == pytest.approx(metrics.kurtosis(r), nan_ok=True)
    assert psr_of(-r) == pytest.approx(1 - psr_of(r), abs=1e-6, nan_ok=True)
    for score in (metrics.profit_factor, metrics.payoff):
        if score(r) > 0:
            assert score(-r) == pytest.approx(1 / score(r))
    assert metrics.cvar(r) <= r.mean() + 1e-12


@given(RETURNS)
def test_drawdowns_from_their_definition(r):
    """The worst of all pairs of bars; of all peaks the one that took longest to be reached again, with bars below it."""
    equity = np.cumprod(np.append(1.0, 1 + r))
    bars, longest = range(len(equity)), 0
    assert metrics.max_drawdown(r) == pytest.approx(min(equity[j] / equity[i] - 1 for i in bars for j in bars[i:]), abs=1e-15)
    assert -1 <= metrics.max_drawdown(r) <= 0
    for i in bars:
        if equity[i] == equity[: i + 1].max() and i < len(r) and equity[i + 1] < equity[i]:
            longest = max(longest, next((j for j in bars[i + 1 :] if equity[j] >= equity[i]), len(r)) - i)
    assert metrics.drawdown_duration(r) == longest


@given(RETURNS, st.integers(1, 10))
def test_cash_afterwards_costs_time_only(r, bars):
    """It leaves what was earned, how deep it fell and how often it won; what is a rate falls; time under water goes on."""
    rested = np.append(r, np.zeros(bars))
    for score in (metrics.total_return, metrics.max_drawdown, metrics.hit_rate, metrics.profit_factor, metrics.payoff):
        assert score(rested) == pytest.approx(score(r), rel=1e-12, nan_ok=True)
    yearly = (1 + metrics.total_return(r)) ** (len(r) / len(rested)) - 1
    assert metrics.annual_return(rested, len(r)) == pytest.approx(yearly, rel=1e-9, abs=1e-12)
    assert metrics.sortino(rested, P) == pytest.approx(metrics.sortino(r, P) * math.sqrt(len(r) / len(rested)), nan_ok=True)
    equity = np.cumprod(np.append(1.0, 1 + r))
    under = equity[-1] < equity.max()
    now = len(r) - np.flatnonzero(equity >= np.maximum.accumulate(equity))[-1]
    expected = max(metrics.drawdown_duration(r), now + bars) if under else metrics.drawdown_duration(r)
    assert metrics.drawdown_duration(rested) == expected


@given(RETURNS, st.floats(-3, 3), st.floats(-0.01, 0.01))
def test_regression_finds_what_was_planted(benchmark, beta, alpha):
    assume(np.ptp(benchmark) > 0)
    found = metrics.alpha_beta(alpha + beta * benchmark, benchmark, P)
    assert found == pytest.approx((P * alpha, beta), rel=1e-9, abs=1e-9)


@given(RETURNS, st.floats(-0.01, 0.01))
def test_active_returns_that_do_not_vary_have_no_information_ratio(r, more):
    """Rounding leaves a deviation of some 1e-17, by which nothing must be divided."""
    assert np.isnan(metrics.information_ratio(r + more, r, P))
    assert np.isnan(metrics.alpha_beta(r, np.full(len(r), more), P)).all()


def test_deflated_sharpe_ratio_of_the_paper():
    """Bailey & Lopez de Prado 2014: a Sharpe ratio of 2.5 over 5 years of days, of the best of 100 trials, or of 46."""
    paper = (2.5 / math.sqrt(250), 1250, -3.0, 10.0, 0.5 / 250)
    assert metrics.dsr(*paper, 100) == pytest.approx(0.9004, abs=5e-5)
    assert metrics.dsr(*paper, 46) == pytest.approx(0.9505, abs=5e-5)
    assert metrics.expected_max_sharpe(0.5, 100) == pytest.approx(0.1132 * math.sqrt(250), abs=1e-3)
    assert metrics.dsr(*paper, 1) == metrics.psr(*paper[:4])  # nothing was selected
    assert metrics.dsr(*paper[:4], NAN, 1) == metrics.psr(*paper[:4])  # and one trial has no variance


@pytest.mark.parametrize("trials, within", [(5, 0.03), (46, 0.015), (1000, 0.01)])
def test_luck_is_the_expected_maximum(trials, within):
    """Of standard Gaussians, by integration; the formula is an approximation for many."""
    exact = integrate.quad(lambda x: x * trials * stats.norm.pdf(x) * stats.norm.cdf(x) ** (trials - 1), -10, 10)[0]
    assert metrics.expected_max_sharpe(1.0, trials) == pytest.approx(exact, rel=within)
    assert metrics.expected_max_sharpe(0.09, trials) == pytest.approx(0.3 * metrics.expected_max_sharpe(1.0, trials))
    assert metrics.expected_max_sharpe(1.0, trials + 1) > metrics.expected_max_sharpe(1.0, trials) > 0
    assert metrics.expected_max_sharpe(0.0, trials) == 0.0


@pytest.mark.parametrize("side", (-1, 1))
def test_psr_is_a_probability(side):
    """Of 2,000 histories of skewed returns with a true Sharpe ratio of 0.5 a bar, 5% are above 95% and 5% below 5%.

    So large that the moments count: with the skewness left out it would be 10% or 0.4%, with excess kurtosis up to 12%.
    """
    rng = np.random.default_rng(5)
    r = 0.5 + side * (rng.exponential(size=(2000, 500)) - 1)
    found = np.array([psr_of(row, 0.5) for row in r])
    assert [(found < 0.05).mean(), (found > 0.95).mean()] == pytest.approx([0.05, 0.05], abs=0.018)


def test_psr_needs_raw_kurtosis():
    with pytest.raises(ValueError, match=r"psr: kurtosis=0: expected the raw one, at least 1 \+ skewness\^2 = 1"):
        metrics.psr(0.1, 100, 0.0, 0.0)
    assert metrics.psr(0.1, 100, 0.0, 3.0) == pytest.approx(stats.norm.cdf(0.1 * math.sqrt(99) / math.sqrt(1.005)), rel=1e-12)
    assert metrics.psr(0.1, 100, 0.0, 3.0, 0.1) == 0.5
    assert metrics.psr(0.1, 100, 0.0, 1.0) == pytest.approx(stats.norm.cdf(0.1 * math.sqrt(99)))  # a coin, the least there is
    assert np.isnan([metrics.psr(0.1, 1, 0.0, 3.0), metrics.psr(0.1, 100, NAN, NAN), metrics.psr(2.0, 100, 1.0, 2.0)]).all()


def make_frame() -> pd.DataFrame:
    """Two markets of three and two bars, the rows of the second between those of the first."""
    frame = pd.DataFrame(np.zeros((5, len(RECORD))), columns=list(RECORD))
    frame["net_return"] = [0.1, 0.2, -0.5, -0.1, 0.2]
    frame["market"] = [0, 1, 0, 1, 0]
    frame["equity"] = [1.1, 1.2, 0.55, 1.08, 0.66]
    frame[CHARGES] = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4]
    frame["interest"] = 9.0  # no cost
    frame["gross_return"] = frame["net_return"] + 0.01
    frame["turnover"] = [1.0, 0.0, 0.5, 0.0, 1.0]
    frame["gross_exposure"] = [1.0, 1.5, 1.0, 0.5, 1.0]
    frame["net_exposure"] = [1.0, -1.5, 0.0, 0.5, 0.0]
    frame["timestamp"] = pd.to_datetime(["2020-01-01", "2020-01-01", "2020-01-02", "2020-01-02", "2020-01-03"])
    return frame.assign(split="test", action=0)


def test_table_by_hand():
    """6 bars a year. Net returns are -0.5, -0.1, 0.1, 0.2, 0.2: mean -0.02, deviations -48, -8, 12, 22, 22 hundredths."""
    squares, cubes, fourths = (sum(x**k for x in (-48, -8, 12, 22, 22)) for k in (2, 3, 4))
    deviation = 0.01 * math.sqrt(squares / 4)
    skew, kurt = cubes / 5 / (squares / 5) ** 1.5, fourths / 5 / (squares / 5) ** 2
    per_bar = -0.02 / deviation
    root = math.sqrt(1 - skew * per_bar + (kurt - 1) / 4 * per_bar**2)
    annual = [0.66**2 - 1, 1.08**3 - 1]
    market = np.array([0.1, 0.0, -0.3, 0.0, 0.2])  # deviations from 0 as they are: squares 0.14, products 0.2
    active = np.array([0.0, 0.2, -0.2, -0.1, 0.0])  # mean -0.02, deviations 2, 22, -18, -8, 2: squares 880
    expected = {
        "total_return": (-0.34 + 0.08) / 2,
        "annual_return": sum(annual) / 2,
        "growth": 6 * math.log(0.66 * 1.08) / 5,
        "volatility": deviation * math.sqrt(6),
        "sharpe": per_bar * math.sqrt(6),
        "gross_sharpe": -0.01 / deviation * math.sqrt(6),
        "psr": stats.norm.cdf(per_bar * 2 / root),
        "sortino": -0.02 / math.sqrt((0.25 + 0.01) / 5) * math.sqrt(6),
        "calmar": (annual[0] / 0.5 + annual[1] / 0.1) / 2,
        "alpha": 6 * -0.02,
        "beta": 0.2 / 0.14,
        "information_ratio": -0.02 / (0.01 * math.sqrt(880 / 4)) * math.sqrt(6),
        "max_drawdown": (-0.5 - 0.1) / 2,
        "drawdown_duration": (2 + 1) / 2,
        "cvar": -0.5,
        "tail_ratio": 0.2 / (0.5 - 0.2 * 0.4),
        "skewness": skew,
        "kurtosis": kurt,
        "hit_rate": 3 / 5,
        "profit_factor": 0.5 / 0.6,
        "payoff": (0.5 / 3) / (0.6 / 2),
        "turnover": 6 * 0.5,
        "cost": 6 * 21e-4,
        "gross_exposure": 1.0,
        "net_exposure": 0.0,
    }
    assert active == pytest.approx(make_frame()["net_return"] - market)
    found = metrics.table(make_frame(), 6, market)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15) and all(type(x) is float for x in found.values())
    alone = metrics.table(make_frame().drop(columns="split"), 6)
    assert np.isnan([alone.pop(name) for name in ("alpha", "beta", "information_ratio")]).all()
    assert alone == {name: found[name] for name in alone}


def test_table_and_summary_agree():
    frame = make_frame()
    frame = pd.concat([frame, frame.assign(market=frame["market"] + 2)], ignore_index=True)
    summary = ledger.summarise(frame, P, resamples=0)
    table = metrics.table(frame, P)
    both = set(summary) & set(table)
    assert len(both) == 8
    assert {name: table[name] for name in both} == pytest.approx({name: summary[name] for name in both}, rel=1e-12)


def test_a_path_score_that_one_market_lacks_is_missing():
    """A mean over the others would leave out the market that never fell."""
    frame = make_frame()
    frame.loc[frame["market"] == 1, "net_return"] = 0.1
    found = metrics.table(frame, 6)
    assert np.isnan(found["calmar"]) and found["max_drawdown"] == -0.25 and found["drawdown_duration"] == 1


def test_scores_describe_the_table():
    assert list(SCORES) == list(metrics.table(make_frame(), 6))
    labels, kinds, helps = zip(*SCORES.values())
    assert len(set(labels)) == len(set(helps)) == len(SCORES)
    assert set(kinds) == {"number", "percent", "times", "probability", "count"} and all(map(str.strip, helps))


@pytest.mark.parametrize("score", sorted(OURS.keys() - {"sharpe", "psr", "psr above 0.02", "dsr"}))
def test_bad_returns_are_refused(score):
    good = np.array([0.1, -0.1, 0.2])
    for bad in (NAN, np.inf):
        with pytest.raises(ValueError, match=rf"returns: {bad} in row 1; expected finite numbers"):
            score_of(score, np.array([0.1, bad, 0.2]), good, P)
    with pytest.raises(ValueError, match=r"returns: shape \(3, 1\); expected one number per bar"):
        score_of(score, good[:, None], good, P)


@pytest.mark.parametrize("score", ("annual_return", "volatility", "sortino", "calmar", "alpha", "information_ratio"))
@pytest.mark.parametrize("per_year", (0.0, -1.0, NAN, np.inf))
def test_bars_per_year_are_positive(score, per_year):
    with pytest.raises(ValueError, match=f"per_year={per_year}: expected a positive number"):
        score_of(score, np.array([0.1, -0.1, 0.2]), np.array([0.1, -0.1, 0.2]), per_year)


@pytest.mark.parametrize("score", ("alpha", "information_ratio"))
def test_a_bad_benchmark_is_refused(score):
    good = np.array([0.1, -0.1, 0.2])
    with pytest.raises(ValueError, match="benchmark: nan in row 2; expected finite numbers"):
        score_of(score, good, np.array([0.1, 0.1, NAN]), P)
    with pytest.raises(ValueError, match="benchmark: 2 bars; expected one for each of the 3 returns"):
        score_of(score, good, good[:2], P)


def test_bad_arguments_are_refused():
    for alpha in (0.0, 1.0, -0.1, NAN):
        with pytest.raises(ValueError, match=f"cvar: alpha={alpha}: expected a share"):
            metrics.cvar([0.1, 0.2], alpha)
    for trials in (0, -3, 2.5, NAN):
        with pytest.raises(ValueError, match=f"trials={trials}: expected a whole number from 1"):
            metrics.expected_max_sharpe(1.0, trials)
    for variance in (-1.0, NAN, np.inf):
        with pytest.raises(ValueError, match=f"variance_of_sharpes={variance}: expected a variance"):
            metrics.expected_max_sharpe(variance, 2)


def test_table_refuses_what_is_no_ledger_of_one_split():
    frame = make_frame()
    for name in ("market", "net_return", "interest", "equity"):
        with pytest.raises(ValueError, match=f"table: column '{name}' is missing; expected a ledger"):
            metrics.table(frame.drop(columns=name), P)
    with pytest.raises(ValueError, match="table: no bar"):
        metrics.table(frame.iloc[:0], P)
    with pytest.raises(ValueError, match="table: splits train, test; expected the ledger of one"):
        metrics.table(frame.assign(split=["train", "test", "test", "test", "test"]), P)
    for name in ("turnover", "borrow", "equity"):
        broken = frame.copy()
        broken.loc[3, name] = NAN
        with pytest.raises(ValueError, match=f"{name}: nan in row 3; expected finite"):
            metrics.table(broken, P)
    with pytest.raises(ValueError, match="benchmark: 4 bars; expected one for each of the 5 returns"):
        metrics.table(frame, P, np.zeros(4))
    with pytest.raises(ValueError, match="per_year=0: expected a positive number"):
        metrics.table(frame, 0)
