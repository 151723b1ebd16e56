"""Round trips: what a ledger of accounts that trade one symbol each says about their trades, and about every symbol."""

import numpy as np
import pandas as pd

from envs.ledger import growth, summarise
from envs.trading import EVENTS

EXITS = tuple(EVENTS.index(name) for name in ("stop", "target"))  # inside a bar, after its fill


def trades(ledger: pd.DataFrame) -> pd.DataFrame:
    """One row per trade of a ledger of Trading-v0: symbol, market, entered (timestamp of its first bar), bars, return.

    A trade lasts from the bar in which a flat account buys to the bar in which it is flat again, whatever it adds or sells in
    between; one that is open at the end of its range ends there, at the last mark. Its return is the account's, net of all
    costs, over these bars, as a fraction of the equity before them.
    """
    exposed = ledger["gross_exposure"].to_numpy() > 0.0  # just after the fill
    kept = exposed & ~ledger["event"].isin(EXITS).to_numpy()  # at the mark
    market = ledger["market"].to_numpy()
    before = np.append(False, kept[:-1] & (market[1:] == market[:-1]))
    number = np.cumsum(exposed & ~before)
    inside = ledger.assign(growth=growth(ledger), number=number)[exposed | before]
    found = inside.groupby("number").agg(
        symbol=("symbol", "first"), market=("market", "first"), entered=("timestamp", "first"), bars=("growth", "size"),
        growth=("growth", "sum"),
    )  # fmt: skip
    found["return"] = np.expm1(found.pop("growth"))
    return found.reset_index(drop=True)


def by_symbol(ledger: pd.DataFrame, bars_per_year: float) -> dict[str, dict[str, float]]:
    """Symbol -> its scores in a ledger of Trading-v0, ranges pooled, net of costs, in the order of the ledger.

    sharpe, growth (per year) and max_drawdown as in `ledger.summarise`; trades: their number; win_rate: share of them with a
    positive return; profit_factor: sum of the positive returns over the sum of the sizes of the negative ones. The last two are
    NaN without a trade; the factor is infinite where no trade has lost.
    """
    done = {symbol: part["return"].to_numpy() for symbol, part in trades(ledger).groupby("symbol")}
    out = {}
    for symbol, part in ledger.groupby("symbol", sort=False):
        scores, returns = summarise(part, bars_per_year, resamples=0), done.get(symbol, np.zeros(0))
        won, lost = returns[returns > 0].sum(), -returns[returns < 0].sum()
        out[symbol] = {name: scores[name] for name in ("bars", "growth", "sharpe", "max_drawdown")} | {
            "trades": len(returns),
            "win_rate": float((returns > 0).mean()) if len(returns) else np.nan,
            "profit_factor": float(won / lost) if lost > 0 else np.inf if won > 0 else np.nan,
        }
    return out
