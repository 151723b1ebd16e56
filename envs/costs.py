"""The one cost model and the one accounting step: every environment, baseline and backtest fills, pays and marks here.

Money is counted in fractions of the equity at the last mark, so that one step needs no currency; only square-root
market impact knows the account's size, through `Costs.capital`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numba import njit

from envs.panel import Panel

FILLS = ("next_open", "next_close", "same_close")
UNTRADABLE, TRADABLE, DELISTED = 0, 1, 2
RUIN = 0.05  # an account below this fraction of its start is ruined: the episode ends

# One row of accounting, all in fractions of the equity at the previous mark except the last four. The identity
#   net_return = gross_return - commission - spread - slippage - impact - borrow - financing + interest
# holds to 1e-12 at every step.
RECORD = (
    "net_return",
    "gross_return",  # price P&L
    "commission",
    "spread",
    "slippage",
    "impact",
    "borrow",
    "financing",
    "interest",
    "turnover",  # sum of |weight changes| at the fill, against drifted weights
    "gross_exposure",  # sum of |weights| just after the fill
    "net_exposure",  # sum of weights just after the fill
    "equity",  # after the step; the environments count from 1
)
NET_RETURN, GROSS_RETURN, COMMISSION, SPREAD, SLIPPAGE, IMPACT, BORROW, FINANCING, INTEREST = range(9)
TURNOVER, GROSS_EXPOSURE, NET_EXPOSURE, EQUITY = range(9, len(RECORD))


# What the kernel sees of `Costs`: plain fractions and annual rates.
RATES = np.dtype(
    [(name, np.float64) for name in ("commission", "spread", "slippage", "linear_impact", "quadratic_impact")]
    + [(name, np.float64) for name in ("borrow", "financing", "cash")],
    align=True,  # or kernels on a GPU would load it byte by byte
)


@dataclass(frozen=True)
class Costs:
    """Costs of trading (basis points of the traded value, one way) and of holding (annual rates, e.g. 0.05).

    `quadratic_impact_bps` is per unit of equity traded: trading the fraction x of equity in one symbol costs
    q*x^2. `sqrt_impact` is the Y of the square-root law: cost = Y * daily volatility * sqrt(trade / daily
    traded value) of the trade, charged only where the panel knows volume; `capital` (in the panel's currency) gives it a size.
    Financing is paid on gross exposure above 1, borrow on shorts, and cash earns on equity that is not exposed.
    """

    name: str = "institutional"
    commission_bps: float = 0.5
    half_spread_bps: float = 1.0
    slippage_bps: float = 0.5
    linear_impact_bps: float = 0.0
    quadratic_impact_bps: float = 1.0
    sqrt_impact: float = 0.0
    borrow_rate: float = 0.005
    financing_rate: float = 0.02
    cash_rate: float = 0.0
    capital: float = 1e6

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "name":
                continue
            if not np.isfinite(value) or (value < 0 and f.name != "cash_rate") or (f.name == "capital" and value <= 0):
                raise ValueError(f"costs: {f.name}={value!r}: expected a finite number, not negative (capital > 0)")
        if self.commission_bps + self.half_spread_bps + self.slippage_bps + self.linear_impact_bps >= 5000:
            raise ValueError(f"costs: {self.describe()}: expected less than 5000 bps one way in all")

    @property
    def rates(self) -> np.recarray:
        """(1,) of dtype RATES."""
        bps = (self.commission_bps, self.half_spread_bps, self.slippage_bps, self.linear_impact_bps, self.quadratic_impact_bps)
        row = tuple(1e-4 * x for x in bps) + (self.borrow_rate, self.financing_rate, self.cash_rate)
        return np.array([row], dtype=RATES).view(np.recarray)

    def scaled(self, factor: float) -> "Costs":
        """Every trading cost and charge times `factor` (cash interest stays), for cost sensitivity."""
        keep = ("name", "cash_rate", "capital")
        scaled = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.name not in keep}
        return replace(self, name=f"{self.name} x{factor:g}", **scaled)

    def describe(self) -> str:
        return f"{self.name}: " + ", ".join(f"{k}={v:g}" for k, v in asdict(self).items() if k != "name")


PRESETS = {
    "zero": Costs("zero", 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "institutional": Costs(),
    "retail": Costs("retail", 0, 3, 2, 0, 0, 0, 0.03, 0.08, 0),
    "crypto": Costs("crypto", 5, 1, 2, 0, 1, 0, 0.1, 0.1, 0),
}


def as_number(key: str, kind: type, text: str):
    """`text` as a value of type `kind`; `key` does not matter. Raises ValueError saying what was expected."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {kind.__name__}") from None


def parse_values(text: str, default, flag: str, convert: Callable[[str, type, str], object] = as_number) -> dict:
    """`key=value:key=value` for a dataclass as {key: value}; convert(key, type of the field, text) makes the values.

    Raises ValueError naming `flag`, the key, and what was expected; so does `convert`, without the first two.
    """
    types = {f.name: f.type for f in fields(default) if f.name != "name"}
    values = {}
    for option in filter(None, text.split(":")):
        key, equals, value = option.partition("=")
        if not equals or key not in types:
            expected = f"key=value with key one of {sorted(types)}" if types else "none"
            raise ValueError(f"{flag}: unknown option {option!r}; expected {expected}")
        try:
            values[key] = convert(key, types[key], value)
        except ValueError as error:
            raise ValueError(f"{flag}: {key}={value!r}: {error}") from None
    return values


def parse_options(text: str, default, flag: str):
    """`key=value:key=value` applied to a dataclass instance, each value converted to the type of its default.

    Raises ValueError naming `flag`, the key, and what was expected.
    """
    values = parse_values(text, default, flag)
    try:
        return replace(default, **values)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def load_costs(spec: str) -> Costs:
    """`institutional`, or a preset with changes: `institutional:commission_bps=2:borrow_rate=0.01`."""
    preset, _, options = spec.partition(":")
    if preset not in PRESETS:
        raise ValueError(f"--costs {spec}: unknown preset {preset!r}; expected one of {sorted(PRESETS)}")
    costs = parse_options(options, PRESETS[preset], f"--costs {spec}")
    return replace(costs, name=spec)


class Execution(NamedTuple):
    """How a panel fills and marks: row t is the step from the close of bar t to the close of bar t+1."""

    to_fill: np.ndarray  # (T, N) float64: simple return from the mark at t to the fill price
    to_mark: np.ndarray  # (T, N) float64: simple return from the fill price to the mark at t+1
    status: np.ndarray  # (T, N) int8: UNTRADABLE, TRADABLE, DELISTED (closed at its last price)
    impact: np.ndarray  # (T, N) float64 square-root impact per sqrt(equity); (1, 1) of zero without it
    years: np.ndarray  # (T,) float64: length of the step, for carry
    fill_at_end: bool  # the fill is at the end of the step, so that carry accrues on the old holdings


def default_fill(panel: Panel) -> str:
    return "next_close" if panel.open is None else "next_open"


def execution(panel: Panel, fill: str, costs: Costs, delist_after: int = 10) -> Execution:
    """Returns, tradability and impact of every step of `panel` under a fill rule.

    A symbol without the bar that would fill it is untradable; its price is carried forward for marking. One that has
    been missing for more than `delist_after` bars counts as delisted and is closed at its last price: a rule that
    needs no knowledge of later bars. A symbol can be ordered once it has had a price.
    """
    if fill not in FILLS:
        raise ValueError(f"--fill {fill}: expected one of {FILLS}")
    if fill == "next_open" and panel.open is None:
        raise ValueError(f"--fill next_open: panel {panel.name!r} has no open prices; expected next_close or same_close")
    present, mark = panel.present, panel.filled("close")
    rows, symbols = mark.shape
    to_fill, to_mark = np.zeros((rows, symbols)), np.zeros((rows, symbols))
    status = np.zeros((rows, symbols), np.int8)
    now, after = mark[:-1], mark[1:]
    known = np.isfinite(now)
    if fill == "next_open":
        price, fillable = np.where(present[1:], panel.open[1:], now), present[1:]
    elif fill == "next_close":
        price, fillable = after, present[1:]
    else:
        price, fillable = now, present[:-1]
    with np.errstate(invalid="ignore"):
        to_fill[:-1] = np.where(known, price / now - 1.0, 0.0)
        to_mark[:-1] = np.where(known, after / price - 1.0, 0.0)
    status[:-1] = np.where(known & fillable, TRADABLE, UNTRADABLE)
    missing = _missing_run(present, panel.segments)
    status[:-1][known & ((missing[:-1] if fill == "same_close" else missing[1:]) > delist_after)] = DELISTED
    last = np.append(panel.segments[1:], rows) - 1  # no step leads out of a history
    to_fill[last], to_mark[last], status[last] = 0.0, 0.0, UNTRADABLE
    return Execution(to_fill, to_mark, status, _sqrt_impact(panel, costs), panel.bar_years, fill == "next_close")


def _missing_run(present, segments):
    """(T, N) number of consecutive bars, up to and including this one, in which a symbol has been missing."""
    row = np.arange(len(present))[:, None]
    start = np.zeros(len(present), dtype=np.int64)
    start[segments] = segments
    start = np.maximum.accumulate(start)[:, None]
    last_seen = np.maximum.accumulate(np.where(present, row, -1), axis=0)
    return row - np.maximum(last_seen, start - 1)


def _sqrt_impact(panel: Panel, costs: Costs, window: int = 20) -> np.ndarray:
    """Y * volatility * sqrt(capital / traded value), both trailing over `window` bars; 0 where unknown."""
    if costs.sqrt_impact == 0.0 or panel.volume is None:
        return np.zeros((1, 1))
    close = panel.filled("close")
    returns = np.zeros_like(close)
    returns[1:] = np.log(close[1:] / close[:-1])
    returns[panel.segments] = 0.0
    traded = np.nan_to_num(panel.volume * panel.close)
    variance, value = np.zeros_like(close), np.zeros_like(close)
    ends = np.append(panel.segments[1:], len(close))
    for a, b in zip(panel.segments, ends):
        bars = np.minimum(np.arange(1, b - a + 1), window)[:, None]
        for source, out in ((np.nan_to_num(returns[a:b]) ** 2, variance), (traded[a:b], value)):
            total = np.cumsum(source, axis=0)
            total[window:] -= total[:-window].copy()
            out[a:b] = np.maximum(total, 0.0) / bars
    daily = max(1.0, panel.bars_per_year / 365.25)  # intraday bars: scale both to a day
    ratio = np.where(value > 0, costs.capital / np.where(value > 0, value * daily, 1.0), 0.0)
    return costs.sqrt_impact * np.sqrt(variance * daily * ratio)


@njit(cache=True, error_model="numpy", forceinline=True)
def account_step(weights, target, to_fill, to_mark, status, impact, years, fill_at_end, equity, c, record):
    """One bar of money. `weights` (N,) at the last mark become those at the next; returns the equity's growth factor.

    1. weights drift from the last mark to the fill price; 2. trade to `target` (N,) so that it is met after costs;
    3. drift from the fill to the next mark, carry accrues for `years`. `equity` (in starting units) scales
    square-root impact (impact (N,), or shorter: none). Fills `record` as in RECORD, but for its equity.
    A result <= 0 is ruin: all weights are then 0. `c` is a record of RATES.
    """
    n = len(weights)
    has_impact = len(impact) == n
    held_gross, held_short = 0.0, 0.0
    at_fill = 1.0
    for i in range(n):  # weights are in units of the equity at the last mark, until the end of this function
        held_gross += abs(weights[i])
        held_short += max(0.0, -weights[i])
        at_fill += weights[i] * to_fill[i]
        weights[i] *= 1.0 + to_fill[i]

    # Equity after costs E solves f(E) = E - at_fill + cost(E) = 0. Each cost is convex in its trade, and the trade is
    # affine in E, so f is convex and Newton's method from the right, where f >= 0, falls monotonically to the root.
    linear = c.commission + c.spread + c.slippage + c.linear_impact
    quadratic = c.quadratic_impact / at_fill
    after = at_fill
    solvable = at_fill > 0.0
    for _ in range(60):
        if not solvable:
            break
        f, slope = after - at_fill, 1.0
        for i in range(n):
            if status[i] == UNTRADABLE:
                continue
            w = target[i] if status[i] == TRADABLE else 0.0
            trade = w * after - weights[i]
            size = abs(trade)
            side = w if trade > 0.0 else -w
            f += size * (linear + quadratic * size)
            slope += side * (linear + 2.0 * quadratic * size)
            if has_impact:
                root = impact[i] * math.sqrt(size * equity)
                f += size * root
                slope += 1.5 * side * root
        solvable = slope > 0.0
        move = f / slope
        after -= move
        solvable = solvable and after > 0.0
        if abs(move) <= 1e-11 * at_fill:  # what is left is of second order, or 1e-3 of this where a trade changes sign
            break

    # Where nothing is left to trade with, everything that can be is closed, the costs are still owed, and what could not
    # be closed is written off at the fill price: nothing can revive a ruined account.
    turnover, impact_cost, profit = 0.0, 0.0, 0.0
    gross, net, short = 0.0, 0.0, 0.0
    for i in range(n):
        if status[i] != UNTRADABLE:
            trade = (target[i] * after if status[i] == TRADABLE and solvable else 0.0) - weights[i]
            size = abs(trade)
            turnover += size
            if at_fill > 0.0:
                impact_cost += quadratic * size * size
            if has_impact:
                impact_cost += impact[i] * size * math.sqrt(size * equity)
            weights[i] += trade
        gross += abs(weights[i])
        net += weights[i]
        short += max(0.0, -weights[i])
        profit += weights[i] * to_mark[i]
    commission, spread, slippage = turnover * c.commission, turnover * c.spread, turnover * c.slippage
    impact_cost += turnover * c.linear_impact
    after = at_fill - (commission + spread + slippage + impact_cost)

    borrow, financing, interest = 0.0, 0.0, 0.0
    if solvable:
        base, carried_gross, carried_short = (1.0, held_gross, held_short) if fill_at_end else (after, gross, short)
        borrow = years * c.borrow * carried_short
        financing = years * c.financing * max(0.0, carried_gross - base)
        interest = years * c.cash * max(0.0, base - carried_gross)
    else:
        profit = 0.0
    growth = after + profit - borrow - financing + interest

    scale = 1.0 / growth if solvable and growth > 0.0 else 0.0
    for i in range(n):
        weights[i] *= (1.0 + to_mark[i]) * scale
    record[NET_RETURN] = growth - 1.0
    record[GROSS_RETURN] = (at_fill - 1.0) + profit
    record[COMMISSION] = commission
    record[SPREAD] = spread
    record[SLIPPAGE] = slippage
    record[IMPACT] = impact_cost
    record[BORROW] = borrow
    record[FINANCING] = financing
    record[INTEREST] = interest
    record[TURNOVER] = turnover / at_fill if at_fill > 0.0 else 0.0
    record[GROSS_EXPOSURE] = gross / after if after > 0.0 else 0.0
    record[NET_EXPOSURE] = net / after if after > 0.0 else 0.0
    return growth


@njit(cache=True, error_model="numpy", forceinline=True)
def combine_records(first, second):
    """Make `first` (RECORD) the record of one bar that was accounted for in two steps, `second` following within it.

    Fractions of the second step are of the equity that the first one left: they count its growth times. Turnovers, each a
    fraction of the equity at its own fill, add up; exposures stay those just after the first fill. The identity of RECORD holds
    as it did for both. The equity is not touched.
    """
    growth = 1.0 + first[NET_RETURN]
    for field in range(TURNOVER):
        first[field] += growth * second[field]
    first[TURNOVER] += second[TURNOVER]
