"""What an agent on Portfolio-v0 is compared with: equal weight, and, on synthetic markets, the policy known to be best."""

import numpy as np
import pandas as pd

from envs.ledger import Policy, backtest, backtest_weights
from envs.panel import Split
from envs.portfolio import PortfolioVectorEnv
from envs.portfolio_tables import PortfolioData


def run(data: PortfolioData, split: Split, policy: Policy, **env_options) -> pd.DataFrame:
    """Ledger of a policy from the start to the end of every range of `split`."""
    markets = PortfolioVectorEnv(len(split.ranges), data=data, split=split, episode_length=0, random_start=False, **env_options)
    return backtest(markets, policy, data.panel, split)


def references(data: PortfolioData, split: Split, risk_aversion: float) -> dict[str, pd.DataFrame]:
    """Ledgers on `split` of equal weight over the symbols with a bar, rebalanced every bar, and, where known, `closed form`.

    They pay the agent's costs at the agent's fills, but are not bound by its constraints.
    """
    panel, market = data.panel, data.market(split)
    rules = {"equal weight": panel.present / np.maximum(panel.present.sum(axis=1, keepdims=True), 1)}
    if {"expected_return", "volatility"} <= set(panel.hidden):
        rules["closed form"] = closed_form(data, market.starts, risk_aversion)
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
