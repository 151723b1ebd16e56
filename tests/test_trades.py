"""Round trips of a ledger against trades counted by hand, and against accounts that a market was stepped with."""

import numpy as np
import pandas as pd
import pytest
from conftest import assert_same_bits, ragged_panel, whole

from envs import ledger, trading_references
from envs.trades import by_symbol, trades
from envs.trading import BUY_LARGE, BUY_MEDIUM, BUY_SMALL, EVENTS, HOLD
from envs.trading_tables import TradingConfig, TradingData

STOP, TARGET, MAX_HOLD = (EVENTS.index(name) for name in ("stop", "target", "max_hold"))


def account(symbol: str, market: int, bars: list[tuple[float, float, int]]) -> pd.DataFrame:
    """Rows (exposure after the fill, net return, event) of one account."""
    exposure, returns, event = (np.array(values) for values in zip(*bars))
    zeros = dict.fromkeys(("commission", "spread", "slippage", "impact", "borrow", "financing"), 0.0)
    return pd.DataFrame(
        {
            "market": market, "timestamp": pd.date_range("2020-01-01", periods=len(bars)), "symbol": symbol,
            "gross_exposure": exposure, "net_return": returns, "gross_return": returns, "turnover": 0.0, **zeros,
            "equity": np.cumprod(1.0 + returns), "event": event.astype(float),
        }
    )  # fmt: skip


# A: held over three bars, bought more and sold in parts, closed in the fourth; bought and stopped in one bar; bought again at
# once and closed by its age. In its second range: never flat again. B: never traded. C: open as A begins, on the next rows.
A1 = [
    (0.0, 0.0, 0), (0.5, -0.001, 0), (1.0, 0.02, 0), (0.4, 0.01, 0), (0.0, -0.005, 0), (0.0, 0.0, 0),
    (1.0, -0.03, STOP), (1.0, 0.04, 0), (0.0, -0.002, MAX_HOLD), (0.0, 0.0, 0),
]  # fmt: skip
A2 = [(0.0, 0.0, 0), (1.0, -0.01, 0), (1.0, 0.005, 0)]
B = [(0.0, 0.0, 0), (0.0, 0.0, 0)]
C = [(1.0, 0.01, TARGET), (0.3, 0.02, 0)]
EXPECTED = [
    ("A", 0, 1, 4, 0.999 * 1.02 * 1.01 * 0.995 - 1),
    ("A", 0, 6, 1, -0.03),
    ("A", 0, 7, 2, 1.04 * 0.998 - 1),
    ("A", 1, 1, 2, 0.99 * 1.005 - 1),
    ("C", 3, 0, 1, 0.01),
    ("C", 3, 1, 1, 0.02),
]


@pytest.fixture
def by_hand():
    frames = [account("A", 0, A1), account("A", 1, A2), account("B", 2, B), account("C", 3, C)]
    return pd.concat(frames, ignore_index=True)


def test_trades_are_those_counted_by_hand(by_hand):
    found = trades(by_hand)
    assert list(found.columns) == ["symbol", "market", "entered", "bars", "return"]
    assert list(found["symbol"]) == [row[0] for row in EXPECTED] and list(found["market"]) == [row[1] for row in EXPECTED]
    assert list(found["entered"]) == [pd.Timestamp("2020-01-01") + pd.Timedelta(days=row[2]) for row in EXPECTED]
    assert list(found["bars"]) == [row[3] for row in EXPECTED]
    np.testing.assert_allclose(found["return"], [row[4] for row in EXPECTED], rtol=1e-12)


def test_the_table_is_what_the_trades_say(by_hand):
    table = by_symbol(by_hand, 252.0)
    assert list(table) == ["A", "B", "C"]
    returns = np.array([row[4] for row in EXPECTED[:4]])
    a, won = table["A"], returns > 0
    assert (a["bars"], a["trades"], a["win_rate"]) == (13, 4, 0.5) and list(won) == [True, False, True, False]
    assert a["profit_factor"] == pytest.approx((returns[0] + returns[2]) / -(returns[1] + returns[3]), rel=1e-12)
    net = np.array([row[1] for row in A1 + A2])
    assert a["sharpe"] == pytest.approx(net.mean() / net.std(ddof=1) * np.sqrt(252), rel=1e-12)
    assert a["growth"] == pytest.approx(np.log1p(net).mean() * 252, rel=1e-12)
    low = [0.999 * 1.02 * 1.01 * 0.995 * 0.97 / (0.999 * 1.02 * 1.01) - 1, 0.99 - 1]  # of each range, then their mean
    assert a["max_drawdown"] == pytest.approx(np.mean(low), rel=1e-12)
    assert table["B"]["trades"] == 0 and np.isnan(table["B"]["win_rate"]) and np.isnan(table["B"]["profit_factor"])
    assert table["B"]["sharpe"] == table["B"]["max_drawdown"] == 0.0
    assert table["C"] | {"win_rate": 1.0, "profit_factor": np.inf, "trades": 2} == table["C"]


def test_a_ledger_without_any_trade():
    frame = account("B", 0, B)
    assert trades(frame).empty and by_symbol(frame, 252.0)["B"]["trades"] == 0


@pytest.mark.parametrize("fill", ["next_open", "next_close", "same_close"])
def test_trades_of_a_market_with_every_exit(fill):
    """Random orders: every buy that was filled opened a trade, and nothing is earned outside of trades."""
    config = TradingConfig(fill=fill, window=2, stop_loss=0.02, take_profit=0.03, max_holding=4)
    data = TradingData(ragged_panel(0), config)
    rng = np.random.default_rng(0)

    def policy(obs, mask, rows):
        return np.array([rng.choice(np.flatnonzero(allowed)) for allowed in mask])

    split = whole(data.panel)
    frame = trading_references.run(data, split, policy)
    found = trades(frame)
    assert {EVENTS[int(event)] for event in frame["event"]} >= {"none", "stop", "target", "max_hold"}
    bought = frame["action"].isin((BUY_SMALL, BUY_MEDIUM, BUY_LARGE)) & (frame["gross_exposure"] > 0)
    assert len(found) == bought.sum() > 50
    assert_same_bits(found["entered"].to_numpy(), frame["timestamp"][bought].to_numpy(), "entered")
    earned = found.groupby("market")["return"].apply(lambda r: np.log1p(r).sum())
    total = frame.assign(growth=ledger.growth(frame)).groupby("market")["growth"].sum()
    np.testing.assert_allclose(earned.reindex(total.index, fill_value=0.0), total, atol=1e-12)
    flat = trading_references.run(data, split, lambda obs, mask, rows: np.full(len(obs), HOLD))
    assert trades(flat).empty
