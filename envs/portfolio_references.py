"""What an agent on Portfolio-v0 is compared with: equal weight, and, on synthetic markets, the policy known to be best."""

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import binom, norm

from envs.ledger import Policy, backtest, backtest_weights, growth
from envs.panel import Panel, Split
from envs.portfolio import PortfolioVectorEnv
from envs.portfolio_tables import PortfolioData


def run(data: PortfolioData, split: Split, policy: Policy, **env_options) -> pd.DataFrame:
    """Ledger of a policy from the start to the end of every range of `split`."""
    markets = PortfolioVectorEnv(len(split.ranges), data=data, split=split, episode_length=0, random_start=False, **env_options)
    return backtest(markets, policy, data.panel, split)


def references(
    data: PortfolioData, split: Split, risk_aversion: float, cvar_alpha: float = 1.0, bars: int = 1
) -> dict[str, pd.DataFrame]:
    """Ledgers on `split` of equal weight over the symbols with a bar, rebalanced every bar, and, where known, `closed form`.

    They pay the agent's costs at the agent's fills, but are not bound by its constraints. On synthetic:tail `closed form` holds
    the symbol with the larger CVaR of `bars` bars at the level `cvar_alpha` (1: mean). At a level below 1 `mean-optimal` is
    there too, and of several bars it is called `best constant`: who may go by what the episode has earned so far can do better.
    """
    panel, market = data.panel, data.market(split)
    rules = {"equal weight": panel.present / np.maximum(panel.present.sum(axis=1, keepdims=True), 1)}
    if {"expected_return", "volatility"} <= set(panel.hidden):
        rules["closed form"] = closed_form(data, market.starts, risk_aversion)
    if "crash_probability" in panel.hidden and not panel.parameters:  # one symbol is best in all histories
        exact = cvar_alpha == 1.0 or bars == 1
        levels = {"closed form" if exact else "best constant": cvar_alpha} | ({"mean-optimal": 1.0} if cvar_alpha < 1.0 else {})
        for name, alpha in levels.items():
            best = np.argmax([tail_cvar(panel, symbol, alpha, bars) for symbol in range(panel.num_symbols)])
            rules[name] = np.tile(np.eye(panel.num_symbols)[best], (panel.num_bars, 1))
    return {
        name: backtest_weights(panel, data.execution, market.rates, split, targets, market.starts)
        for name, targets in rules.items()
    }


def closed_form(data: PortfolioData, starts: np.ndarray, risk_aversion: float) -> np.ndarray:
    """(T, N) best weights to order at each bar, from the truth; each range begins in cash at its row of `starts`.

    The best of mean - risk_aversion / 2 * variance per bar, for independent symbols. Constant expected returns: the
    Merton fraction, (mean - cash rate) / (risk_aversion * variance). Expected returns that revert, with quadratic costs:
    Garleanu & Pedersen 2013 without discounting. The aim counts each factor for less the sooner it fades; the order moves a
    constant share of the way there.
    """
    panel = data.panel
    variance = panel.hidden["volatility"] ** 2
    ahead = np.zeros_like(variance)  # expected return of the next bar, which the panel tells apart from the last
    ahead[:-1] = panel.hidden["expected_return"][1:]
    if "reversion" not in panel.hidden:
        cash = data.costs.cash_rate * panel.bar_years[:, None]
        return (ahead - cash) / (risk_aversion * variance)
    share, pull = trading_rate(risk_aversion, 2e-4 * data.costs.quadratic_impact_bps / variance)
    aim = ahead / (risk_aversion * variance) / (1.0 + panel.hidden["reversion"] * pull / risk_aversion)
    targets = np.zeros_like(aim)
    for t in range(panel.num_bars):
        before = 0.0 if t == 0 or t in starts else targets[t - 1]
        targets[t] = before + share[t] * (aim[t] - before)
    return targets


def trading_rate(risk_aversion: float, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the gap to the aim that is traded each bar, a / cost, and a; trading x costs cost / 2 * variance * x^2.

    a solves a^2 + risk_aversion * a = risk_aversion * cost (Garleanu & Pedersen 2013, at discount rate 0).
    """
    a = 0.5 * (np.sqrt(risk_aversion**2 + 4.0 * risk_aversion * cost) - risk_aversion)
    return np.divide(a, cost, out=np.ones_like(a), where=cost > 0), a


def tail_cvar(panel: Panel, symbol: int, alpha: float, bars: int) -> float:
    """CVaR at level `alpha` in (0, 1] (1: mean) of the log growth of holding one symbol of synthetic:tail for `bars` bars.

    The number of crashes is binomial, and given it the growth is normal: the tail mean of a mixture of normals, whose
    components contribute m Phi(z) - s phi(z), z = (VaR - m) / s (partial expectation of the normal distribution).
    """
    calm, volatility, crash, probability = (
        panel.hidden[key][0, symbol] for key in ("calm_growth", "volatility", "crash", "crash_probability")
    )
    crashes = np.arange(bars + 1)
    share, mean, std = binom.pmf(crashes, bars, probability), bars * calm - crashes * crash, volatility * np.sqrt(bars)
    if alpha == 1.0 or std == 0.0:  # without noise there is no crash either (synthetic.Tail)
        return float(share @ mean)
    at_risk = brentq(lambda v: share @ norm.cdf((v - mean) / std) - alpha, mean.min() - 40 * std, mean.max() + 40 * std)
    z = (at_risk - mean) / std
    return float(share @ (mean * norm.cdf(z) - std * norm.pdf(z)) / alpha)


def tail_flip(panel: Panel, bars: int) -> float:
    """The level below which holding S01 of synthetic:tail for `bars` bars has the larger CVaR of log growth, above it S00."""
    return brentq(lambda alpha: tail_cvar(panel, 0, alpha, bars) - tail_cvar(panel, 1, alpha, bars), 1e-9, 1.0)


def episode_returns(ledger: pd.DataFrame, bars: int) -> np.ndarray:
    """(W,) net log growth of the W whole windows of `bars` bars, one after another from the start of each market."""
    parts = [growth(frame) for _, frame in ledger.groupby("market")]
    return np.concatenate([part[: len(part) // bars * bars].reshape(-1, bars).sum(axis=1) for part in parts])


def cvar(returns: np.ndarray, alpha: float) -> float:
    """Mean of the worst share `alpha` in (0, 1] of the returns; the last of them counts in part. NaN if there are none."""
    worst = np.sort(returns)
    if len(worst) == 0:
        return float("nan")
    weights = np.clip(alpha * len(worst) - np.arange(len(worst)), 0.0, 1.0)
    return float(weights @ worst / weights.sum())


def utility(ledger: pd.DataFrame, risk_aversion: float, bars_per_year: float) -> float:
    """Mean net return less risk_aversion / 2 times its variance, per year."""
    net = ledger["net_return"]
    return float((net.mean() - 0.5 * risk_aversion * net.var(ddof=1)) * bars_per_year)


def hedge_error(data: PortfolioData, ledger: pd.DataFrame, split: Split) -> dict[str, float]:
    """How well a portfolio of one symbol hedges the liability of `panel.hidden` (synthetic:black-scholes), over all histories.

    `delta RMS error`: of the number of shares ordered, in units of one over the price at the first bar, against `delta`;
    `hedged`, `unhedged`: standard deviation of equity less the liability at the end, and of the liability alone.
    """
    panel, market = data.panel, data.market(split)
    gaps, left, owed = [], [], []
    for (_, frame), start in zip(ledger.groupby("market"), market.starts):
        rows = start + np.arange(len(frame))
        equity = np.append(1.0, frame["equity"].to_numpy())
        shares = np.stack(frame["action"]).reshape(-1) * equity[:-1] / (panel.close[rows, 0] / panel.close[start, 0])
        gaps.append(shares - panel.hidden["delta"][rows, 0])
        owed.append(panel.hidden["liability"][rows[-1] + 1])
        left.append(equity[-1] - owed[-1])
    error = float(np.sqrt(np.mean(np.concatenate(gaps) ** 2)))
    return {"delta RMS error": error, "hedged": float(np.std(left, ddof=1)), "unhedged": float(np.std(owed, ddof=1))}
