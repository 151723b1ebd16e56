"""What an agent on LeadLag-v0 is compared with: rules that need no learning, and, on synthetic markets, the truth."""

import numpy as np
import pandas as pd

from envs.leadlag import LeadLagVectorEnv
from envs.leadlag_tables import LeadLagData
from envs.ledger import Policy, backtest, backtest_weights, growth
from envs.panel import Split


def run(data: LeadLagData, split: Split, policy: Policy, **env_options) -> pd.DataFrame:
    """Ledger of a policy from the start to the end of every range of `split`."""
    markets = LeadLagVectorEnv(len(split.ranges), data=data, split=split, episode_length=0, random_start=False, **env_options)
    return backtest(markets, policy, data.panel, split)


def hold(choice: np.ndarray) -> Policy:
    """The policy that orders lookback choice[t] at bar t; where it is masked, the longest allowed one below, or above."""

    def policy(obs, mask, rows):
        wanted = choice[rows][:, None]
        grid = np.arange(mask.shape[1])
        cost = np.where(grid <= wanted, wanted - grid, grid + mask.shape[1])
        return np.where(mask, cost, 3 * mask.shape[1]).argmin(axis=1)

    return policy


def references(data: LeadLagData, splits: dict[str, Split], seed: int = 0, **env_options) -> dict[str, pd.DataFrame]:
    """Ledgers on the test split of: every fixed lookback, the one best in training, random choice, equal weight.

    Where the panel's truth is known also `oracle regime`, which is told the regime of the present bar and orders the
    lookback that is best in it (by expected returns less costs, over the training split), and `oracle returns`, which is
    told the expected return of the next bar and holds the sign of it in the most promising symbols, as many as the
    strategy has followers. The first is the best that a choice of lookback by regime can do; an agent that also sees
    how clear the signals are may come out above it.
    """
    panel, test, train = data.panel, splits["test"], splits["train"]
    rows, count = panel.num_bars, len(data.lookbacks)

    def fixed(k, split):
        return run(data, split, hold(np.full(rows, k)), **env_options)

    out = {f"lookback {data.lookbacks[k]}": fixed(k, test) for k in range(count)}
    trained = [fixed(k, train) for k in range(count)]
    earned = np.stack([growth(frame) for frame in trained])
    best = int(earned.mean(axis=1).argmax())
    out["best in training"] = out[f"lookback {data.lookbacks[best]}"]

    rng = np.random.default_rng(seed)
    out["random"] = run(data, test, hold(rng.integers(count, size=rows)), **env_options)
    market = data.market(test)
    equal = panel.present / np.maximum(panel.present.sum(axis=1, keepdims=True), 1) * data.config.gross
    out["equal weight"] = backtest_weights(panel, data.execution, market.rates, test, equal, market.starts)

    if {"regime", "expected_return"} <= set(panel.hidden):
        ahead = np.zeros((rows, panel.num_symbols))
        ahead[:-1] = panel.hidden["expected_return"][1:]
        regime = panel.hidden["regime"]
        decided = np.concatenate([np.arange(a, b - 1) for a, b in zip(data.market(train).starts, train.ranges[:, 1])])
        promised = np.einsum("tki,ti->kt", data.targets[decided], ahead[decided])
        promised -= np.stack([(frame["gross_return"] - frame["net_return"]).to_numpy() for frame in trained])
        choice = np.full(rows, best)
        for kind in np.unique(regime[decided]):
            choice[regime == kind] = int(promised[:, regime[decided] == kind].mean(axis=1).argmax())
        out["oracle regime"] = run(data, test, hold(choice), **env_options)
        size = max(1, round(data.config.top_fraction * panel.num_symbols))
        chosen = np.argsort(np.argsort(-np.abs(ahead), axis=1), axis=1) < size
        ideal = np.where(chosen, np.sign(ahead), 0.0) / size * data.config.gross
        out["oracle returns"] = backtest_weights(panel, data.execution, market.rates, test, ideal, market.starts)
    return out


def capture(agent: float, references: dict[str, float]) -> float | None:
    """(agent - best fixed lookback) / (regime oracle - best fixed lookback), of growths on the test split.

    The fixed lookback is the best on the test split itself, with hindsight, which no rule could know. None where the
    oracle is not known, or does not beat that lookback (few or short test histories): there is no gap to capture.
    """
    if "oracle regime" not in references:
        return None
    best = max(value for name, value in references.items() if name.startswith("lookback"))
    gap = references["oracle regime"] - best
    return (agent - best) / gap if gap > 0 else None
