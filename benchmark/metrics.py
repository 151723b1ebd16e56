"""Scores of returns per bar, and all of them for one split of a ledger: `table`.

Throughout: `r` and `benchmark` are (T,) simple net returns of one bar each, as fractions (0.01 is 1%), in order of time;
`per_year` is the number of bars in a year; returns and drawdowns come back as fractions, losses negative. A score that is not
defined (too few bars, no loss to divide by, no variance) is NaN; only `sharpe` is 0 there, as everywhere in this project.
ValueError is raised where a return is not finite, shapes do not fit, or `per_year` is not positive.
An account cannot lose more than it holds: a bar of -100% or worse leaves it at zero for good.
"""

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from envs.costs import RECORD
from envs.ledger import sharpe, summarise

NAN = float("nan")

# What `table` returns, in its order: key -> (label, kind, help). Kinds are those of the scoreboard's columns.
SCORES = {
    "total_return": ("total return", "percent", "compounded, net of costs, mean over markets"),
    "annual_return": ("annual return", "percent", "the constant yearly return with the same end, net, mean over markets"),
    "growth": ("growth", "percent", "mean log growth a year, net of costs"),
    "volatility": ("volatility", "percent", "standard deviation of net returns, a year"),
    "sharpe": ("Sharpe", "number", "mean by standard deviation of net returns, annualised"),
    "gross_sharpe": ("gross Sharpe", "number", "the same before costs"),
    "psr": ("PSR", "probability", "probability that the Sharpe ratio is above zero, given length, skewness and kurtosis"),
    "sortino": ("Sortino", "number", "mean net return by the root mean square of losses, annualised"),
    "calmar": ("Calmar", "number", "annual return by deepest drawdown, mean over markets"),
    "alpha": ("alpha", "percent", "net return a year that the benchmark does not explain"),
    "beta": ("beta", "number", "slope of net returns on the benchmark's"),
    "information_ratio": ("information ratio", "number", "Sharpe ratio of net returns minus the benchmark's"),
    "max_drawdown": ("drawdown", "percent", "deepest, mean over markets"),
    "drawdown_duration": ("longest drawdown", "count", "most bars from a peak until it is reached again, mean over markets"),
    "cvar": ("CVaR", "percent", "mean net return of the worst 5% of bars"),
    "tail_ratio": ("tail ratio", "number", "95th percentile of net returns by the 5th, absolute"),
    "skewness": ("skewness", "number", "of net returns; 0 for a Gaussian, negative where the left tail is the longer one"),
    "kurtosis": ("kurtosis", "number", "of net returns, raw: 3 for a Gaussian"),
    "hit_rate": ("hit rate", "percent", "share of gains among the bars with a gain or a loss"),
    "profit_factor": ("profit factor", "number", "sum of gains by sum of losses"),
    "payoff": ("payoff", "number", "mean gain by mean loss"),
    "turnover": ("turnover", "times", "sum of absolute weight changes a year"),
    "cost": ("cost", "percent", "all costs a year, share of equity"),
    "gross_exposure": ("gross exposure", "times", "mean sum of absolute weights, in units of equity"),
    "net_exposure": ("net exposure", "times", "mean sum of weights, in units of equity"),
}


def table(frame: pd.DataFrame, per_year: float, market: np.ndarray | None = None) -> dict[str, float]:
    """Every score (SCORES) of one split of a ledger (envs.ledger).

    `market`: (len(frame),) returns of a benchmark on the same rows, or None: alpha, beta and information ratio are then NaN.
    Several markets are independent histories. Scores of the distribution of returns, and means, pool all bars as
    envs.ledger.summarise does; scores of a path (total and annual return, drawdown, its duration, Calmar) are means over
    markets, NaN where one of them has none. Raises ValueError, besides, for a frame without bars, with several splits, or
    where a column is missing or not finite.
    """
    _check(frame)
    r = _returns(frame["net_return"], per_year)
    paths = [r[rows] for rows in frame.groupby("market").indices.values()]
    pooled = summarise(frame, per_year, resamples=0)
    alpha, beta = (NAN, NAN) if market is None else alpha_beta(r, market, per_year)

    def mean(score, *arguments) -> float:
        return float(np.mean([score(path, *arguments) for path in paths]))

    return {
        "total_return": mean(total_return),
        "annual_return": mean(annual_return, per_year),
        "growth": pooled["growth"],
        "volatility": volatility(r, per_year),
        "sharpe": pooled["sharpe"],
        "gross_sharpe": pooled["gross_sharpe"],
        "psr": psr(sharpe(r, 1.0), len(r), skewness(r), kurtosis(r)),
        "sortino": sortino(r, per_year),
        "calmar": mean(calmar, per_year),
        "alpha": alpha,
        "beta": beta,
        "information_ratio": NAN if market is None else information_ratio(r, market, per_year),
        "max_drawdown": mean(max_drawdown),
        "drawdown_duration": mean(drawdown_duration),
        "cvar": cvar(r),
        "tail_ratio": tail_ratio(r),
        "skewness": skewness(r),
        "kurtosis": kurtosis(r),
        "hit_rate": hit_rate(r),
        "profit_factor": profit_factor(r),
        "payoff": payoff(r),
        "turnover": pooled["turnover"],
        "cost": pooled["cost"],
        "gross_exposure": pooled["gross_exposure"],
        "net_exposure": float(frame["net_exposure"].mean()),
    }


def total_return(r: np.ndarray) -> float:
    """prod(1 + r) - 1; -1 after ruin."""
    r = _returns(r)
    return float(_equity(r)[-1] - 1.0) if len(r) else NAN


def annual_return(r: np.ndarray, per_year: float) -> float:
    """Geometric: prod(1 + r)^(per_year / T) - 1; -1 after ruin, inf where a few bars compound beyond what a float holds."""
    r = _returns(r, per_year)
    if not len(r):
        return NAN
    with np.errstate(over="ignore"):
        return float(_equity(r)[-1] ** (per_year / len(r)) - 1.0)


def volatility(r: np.ndarray, per_year: float) -> float:
    """std(ddof=1) * sqrt(per_year), a fraction a year."""
    r = _returns(r, per_year)
    return float(r.std(ddof=1) * np.sqrt(per_year)) if len(r) > 1 else NAN


def sortino(r: np.ndarray, per_year: float) -> float:
    """mean / sqrt(mean(min(r, 0)^2)) * sqrt(per_year): the downside deviation is over all bars (Sortino & Price 1994)."""
    r = _returns(r, per_year)
    if len(r) < 2:
        return NAN
    return _ratio(r.mean(), np.sqrt(np.mean(np.minimum(r, 0.0) ** 2))) * float(np.sqrt(per_year))


def max_drawdown(r: np.ndarray) -> float:
    """The deepest fall, in [-1, 0], of the equity below its running maximum, which includes the start at 1."""
    r = _returns(r)
    if not len(r):
        return NAN
    equity = _equity(r)
    return float((equity / np.maximum.accumulate(equity) - 1.0).min())


def drawdown_duration(r: np.ndarray) -> float:
    """The longest time under water, in bars; 0 without a fall.

    It is counted from the bar at which the last peak stood (the start is one) to the first bar that closes at or above that
    peak again, or to the end.
    """
    r = _returns(r)
    if not len(r):
        return NAN
    equity = _equity(r)
    peaks = np.flatnonzero(equity >= np.maximum.accumulate(equity))
    recovered = np.diff(peaks)
    longest = recovered[recovered > 1].max(initial=0)  # from one peak straight to the next is no fall
    return float(max(longest, len(r) - peaks[-1]))


def calmar(r: np.ndarray, per_year: float) -> float:
    """annual_return / |max_drawdown| (Young 1991), here over the whole history; NaN without a fall."""
    return _ratio(annual_return(r, per_year), abs(max_drawdown(r)))


def cvar(r: np.ndarray, alpha: float = 0.05) -> float:
    """Mean of the int((T - 1) * alpha) + 1 worst returns, negative for losses: whole bars, as empyrical counts them.

    Raises ValueError unless 0 < alpha < 1. Conditional value at risk: Rockafellar & Uryasev 2000.
    """
    r = _returns(r)
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"cvar: alpha={alpha!r}: expected a share of the bars between 0 and 1")
    return float(np.sort(r)[: int((len(r) - 1) * alpha) + 1].mean()) if len(r) else NAN


def tail_ratio(r: np.ndarray) -> float:
    """|95th percentile| / |5th percentile|, interpolated linearly."""
    r = _returns(r)
    return _ratio(*np.abs(np.percentile(r, [95, 5]))) if len(r) else NAN


def hit_rate(r: np.ndarray) -> float:
    """Bars with a gain / bars with a gain or a loss: a bar out of the market is neither."""
    r = _returns(r)
    return _ratio((r > 0).sum(), (r != 0).sum())


def profit_factor(r: np.ndarray) -> float:
    """Sum of gains / |sum of losses|."""
    r = _returns(r)
    return _ratio(r[r > 0].sum(), -r[r < 0].sum())


def payoff(r: np.ndarray) -> float:
    """Mean gain / |mean loss|; NaN without a gain, too."""
    r = _returns(r)
    return _ratio(profit_factor(r) * (r < 0).sum(), (r > 0).sum())


def skewness(r: np.ndarray) -> float:
    """m3 / m2^1.5 with the central moments mk of the sample (divided by T, not corrected for bias)."""
    return float(np.mean(_standardised(r) ** 3))


def kurtosis(r: np.ndarray) -> float:
    """m4 / m2^2 of the sample: RAW kurtosis, 3 for a Gaussian and never below 1 + skewness^2; not the excess over 3."""
    return float(np.mean(_standardised(r) ** 4))


def alpha_beta(r: np.ndarray, benchmark: np.ndarray, per_year: float) -> tuple[float, float]:
    """Intercept, a fraction a year, and slope of r = alpha / per_year + beta * benchmark by least squares (Jensen 1968).

    Alpha is annualised arithmetically, so that per_year * mean(r) = alpha + beta * per_year * mean(benchmark): it adds up with
    what the benchmark explains. (1 + alpha per bar)^per_year - 1, as in empyrical, does not.
    """
    r, benchmark = _pair(r, benchmark, per_year)
    if not _varies(benchmark, benchmark):
        return NAN, NAN
    centred = benchmark - benchmark.mean()
    beta = centred @ r / (centred @ centred)
    return float((r.mean() - beta * benchmark.mean()) * per_year), float(beta)


def information_ratio(r: np.ndarray, benchmark: np.ndarray, per_year: float) -> float:
    """Annualised Sharpe ratio of the active returns, r - benchmark (Goodwin 1998); NaN where they do not vary."""
    r, benchmark = _pair(r, benchmark, per_year)
    active = r - benchmark
    return sharpe(active, per_year) if _varies(active, np.maximum(abs(r), abs(benchmark))) else NAN


def psr(sharpe_per_bar: float, bars: int, skewness: float, kurtosis: float, benchmark_sharpe: float = 0.0) -> float:
    """Probabilistic Sharpe ratio (Bailey & Lopez de Prado 2012): P(true Sharpe ratio > benchmark_sharpe).

    Phi[(SR - SR*) sqrt(T - 1) / sqrt(1 - g3 SR + (g4 - 1) / 4 SR^2)], Sharpe ratios per bar, *raw* kurtosis. Raises ValueError
    where kurtosis < 1 + skewness^2, which no raw kurtosis is: given less, the root can be of a negative number.
    """
    least = 1.0 + skewness**2
    if kurtosis < least * (1.0 - 1e-9):
        raise ValueError(f"psr: kurtosis={kurtosis:g}: expected the raw one, at least 1 + skewness^2 = {least:g}")
    variance = 1.0 - skewness * sharpe_per_bar + (kurtosis - 1.0) / 4.0 * sharpe_per_bar**2
    if bars < 2 or not variance > 0.0:
        return NAN
    return float(ndtr((sharpe_per_bar - benchmark_sharpe) * np.sqrt(bars - 1.0) / np.sqrt(variance)))


def expected_max_sharpe(variance_of_sharpes: float, trials: int) -> float:
    """Sharpe ratio that the best of `trials` configurations without any skill is expected to reach by luck.

    sqrt(V) ((1 - gE) Phi^-1[1 - 1/N] + gE Phi^-1[1 - 1/(N e)]), gE = 0.5772... (Bailey & Lopez de Prado 2014), in the units of
    the Sharpe ratios whose variance over trials is V. 0 for one trial: nothing was selected, and the expectation of
    a single draw without skill is 0 (the formula, made for the maximum of many, would give -inf). Raises ValueError
    unless trials is a whole number from 1 and, for more than one, the variance is finite and not negative.
    """
    if not (trials >= 1 and trials == int(trials)):
        raise ValueError(f"expected_max_sharpe: trials={trials!r}: expected a whole number from 1")
    if trials == 1:
        return 0.0
    if not 0.0 <= variance_of_sharpes < np.inf:
        raise ValueError(f"expected_max_sharpe: variance_of_sharpes={variance_of_sharpes!r}: expected a variance")
    luck = (1.0 - np.euler_gamma) * ndtri(1.0 - 1.0 / trials) + np.euler_gamma * ndtri(1.0 - 1.0 / (trials * np.e))
    return float(np.sqrt(variance_of_sharpes) * luck)


def dsr(sharpe_per_bar: float, bars: int, skewness: float, kurtosis: float, variance_of_sharpes: float, trials: int) -> float:
    """Deflated Sharpe ratio (Bailey & Lopez de Prado 2014): `psr` against `expected_max_sharpe` of all that was tried.

    `variance_of_sharpes` is that of the trials' Sharpe ratios per bar. Raises what the two raise.
    """
    return psr(sharpe_per_bar, bars, skewness, kurtosis, expected_max_sharpe(variance_of_sharpes, trials))


def _check(frame: pd.DataFrame):
    missing = [name for name in ("market", *RECORD) if name not in frame]
    if missing:
        raise ValueError(f"table: column {missing[0]!r} is missing; expected a ledger with market and {', '.join(RECORD)}")
    if frame.empty:
        raise ValueError("table: no bar; expected the ledger of one split")
    if "split" in frame and frame["split"].nunique() > 1:
        raise ValueError(f"table: splits {', '.join(map(str, frame['split'].unique()))}; expected the ledger of one")
    for name in RECORD:
        _finite(frame[name], name)


def _returns(r, per_year: float = 1.0, name: str = "returns") -> np.ndarray:
    if not 0.0 < per_year < np.inf:
        raise ValueError(f"per_year={per_year!r}: expected a positive number of bars in a year")
    return _finite(r, name)


def _pair(r, benchmark, per_year: float) -> tuple[np.ndarray, np.ndarray]:
    r, benchmark = _returns(r, per_year), _returns(benchmark, per_year, "benchmark")
    if len(r) != len(benchmark):
        raise ValueError(f"benchmark: {len(benchmark)} bars; expected one for each of the {len(r)} returns")
    return r, benchmark


def _finite(x, name: str) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"{name}: shape {x.shape}; expected one number per bar, (T,)")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"{name}: {x[bad[0]]} in row {bad[0]}; expected finite numbers")
    return x


def _equity(r: np.ndarray) -> np.ndarray:
    """(T + 1,) equity from the start at 1; zero for good once it is lost."""
    return np.cumprod(np.concatenate([[1.0], np.maximum(1.0 + r, 0.0)]))


def _varies(x: np.ndarray, scale: np.ndarray) -> bool:
    """Whether x (T,) moves by more than the rounding of numbers as large as those in `scale` (T,)."""
    return len(x) > 1 and bool(np.ptp(x) > 4.0 * np.finfo(np.float64).eps * np.abs(scale).max())


def _standardised(r) -> np.ndarray:
    """(r - mean) / std(ddof=0), so that powers of tiny returns do not vanish; a single NaN where r does not vary."""
    r = _returns(r)
    return (r - r.mean()) / r.std() if _varies(r, r) else np.full(1, NAN)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else NAN
