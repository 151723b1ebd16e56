"""What Trading-v0's agents are compared with: the best band on synthetic:ou against brute force, rules by their orders."""

import numpy as np
import pandas as pd
import pytest
from conftest import FILLS

from envs.costs import load_costs
from envs.ledger import growth
from envs.panel import PanelError
from envs.synthetic import make_panel, reversion, stationary_deviation
from envs.trading import BUY_LARGE, SELL_ALL
from envs.trading_references import Band, _part, optimal_band, references, run, thresholds
from envs.trading_tables import TradingConfig, TradingData

INSTITUTIONAL = load_costs("institutional")


@pytest.fixture(scope="module")
def market():
    panel = make_panel("synthetic:ou:train=1:val=1:test=12:assets=8:bars=1500", 3)
    return TradingData(panel), panel.split()["test"]


@pytest.fixture(scope="module")
def ledgers(market):
    return references(*market)


def simulated(bands, half_life, vol, costs, fill, bars=4000, paths=500):
    """(bands,) mean net log growth per bar of all-or-nothing bands, all on the same paths, and (bands, paths) of each path."""
    rng = np.random.default_rng(0)
    share = {"next_open": 0.1, "next_close": 1.0, "same_close": 0.0}[fill]
    parts = [reversion(half_life, vol, s) for s in (share, 1.0 - share)]
    c = costs.rates[0]
    linear, quadratic = float(c.commission + c.spread + c.slippage), float(c.quadratic_impact)
    buying, selling = -np.log1p(linear + quadratic), np.log1p(-linear - quadratic)  # to second order in quadratic
    buy, sell = np.array(bands).T[:, :, None]
    x = stationary_deviation(half_life, vol) * rng.standard_normal(paths)
    held, earned = np.zeros((len(bands), paths), bool), np.zeros((len(bands), paths))
    for _ in range(bars):
        wanted = np.where(held, x <= sell, x < buy)
        for part, (keep, noise) in enumerate(parts):
            y = keep * x + noise * rng.standard_normal(paths)
            earned += held * (y - x)
            if part == 0:
                earned += np.where(wanted & ~held, buying, 0.0) + np.where(held & ~wanted, selling, 0.0)
                held = wanted
            x = y
    return earned.mean(axis=1) / bars, earned / bars


@pytest.mark.parametrize("fill", FILLS)
def test_the_band_is_the_best_of_all_bands(fill):
    """Brute force over a grid of bands on the same two million bars: none earns more, and those far away earn less."""
    half_life, vol = 5.0, 0.001
    best = optimal_band(half_life, vol, INSTITUTIONAL, fill)
    assert best.sell == pytest.approx(-best.buy, rel=1e-6) and 0.2 < best.sell / stationary_deviation(half_life, vol) < 1.0
    shifts = np.array([-0.6, -0.3, 0.0, 0.3, 0.6]) * best.sell
    grid = [(best.buy + a, best.sell + b) for a in shifts for b in shifts]
    mean, paths = simulated(grid, half_life, vol, INSTITUTIONAL, fill)
    middle = grid.index((best.buy, best.sell))
    for k in range(len(grid)):
        gap = paths[middle] - paths[k]
        error = gap.std(ddof=1) / np.sqrt(gap.size)
        assert gap.mean() >= -3 * error, (fill, grid[k])
        corner = max(abs(grid[k][0] - best.buy), abs(grid[k][1] - best.sell)) > 0.5 * best.sell
        assert not corner or gap.mean() > 3 * error > 0, "a far band is worse"
    error = paths[middle].std(ddof=1) / np.sqrt(paths[middle].size)
    assert mean[middle] == pytest.approx(best.growth, abs=4 * error) and error < 0.005 * best.growth


def test_without_costs_there_is_one_threshold_and_costs_widen_the_band():
    free = optimal_band(8.0, 0.002, load_costs("zero"), "next_open")
    assert free.buy == pytest.approx(0.0, abs=1e-9) and free.sell == pytest.approx(0.0, abs=1e-9)
    before = free
    for bps in (1, 3, 10, 30):
        band = optimal_band(8.0, 0.002, load_costs(f"zero:commission_bps={bps}"), "next_open")
        assert band.buy < before.buy and band.sell > before.sell and 0 < band.growth < before.growth
        before = band
    # the growth without costs: half the mean size of the deviation, times what reverts in the session after the fill
    keep, noise = reversion(8.0, 0.002, 0.1)
    deviation = stationary_deviation(8.0, 0.002)
    told = (1 - 0.5 ** (1 / 8)) * deviation * np.sqrt(1 / (2 * np.pi))  # were it all held from close to close
    assert free.growth == pytest.approx(told, rel=0.01) and keep < 1 and noise > 0


def test_finer_grids_and_weights_change_little():
    coarse, fine = (optimal_band(5.0, 0.001, INSTITUTIONAL, "next_open", points) for points in (601, 1201))
    assert coarse == pytest.approx(fine, rel=0.005)
    more = optimal_band(5.0, 0.001, INSTITUTIONAL, "next_open", weights=5)
    assert 1.0 < more.growth / coarse.growth < 1.03
    linear = load_costs("zero:commission_bps=3")
    two, five = (optimal_band(5.0, 0.001, linear, "next_open", weights=k).growth for k in (2, 5))
    assert five == pytest.approx(two, rel=1e-3), "without quadratic impact all or nothing is best"


def test_a_part_of_a_bar_moves_prices_and_weights():
    """Means over a normal move of 20%, by a fine sum: of the deviation and the weight at its end, and of the log growth."""
    x, w, keep, noise = np.linspace(-2, 2, 401), np.linspace(0, 1, 5), 0.9, 0.2
    operator, earned = _part(x, w, keep, noise)
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    for i in (150, 200, 260):
        gain = np.expm1(keep * x[i] + noise * z - x[i])
        row = i * 5
        np.testing.assert_allclose((operator @ np.repeat(x, 5))[row : row + 5], keep * x[i], atol=1e-9)
        for k in range(5):
            grown = 1 + w[k] * gain
            assert (operator @ np.tile(w, 401))[row + k] == pytest.approx(density @ (w[k] * (1 + gain) / grown), abs=1e-6)
            assert earned[row + k] == pytest.approx(density @ np.log(grown), abs=1e-6)
    assert operator.sum(axis=1) == pytest.approx(1.0)


def test_growth_is_what_the_policy_of_the_band_earns_in_the_environment(market, ledgers):
    """The kernel's orders, fills and costs on the panel's prices: the same growth, but for chance."""
    data, split = market
    best = optimal_band(5.0, 0.001, data.costs, data.fill)
    assert list(ledgers) == ["flat", "buy and hold", "threshold at 0", "optimal band"]
    earned = {name: frame.assign(g=growth(frame)).groupby("market")["g"].mean().to_numpy() for name, frame in ledgers.items()}
    error = earned["optimal band"].std(ddof=1) / np.sqrt(96)
    assert earned["optimal band"].mean() == pytest.approx(best.growth, abs=4 * error) and error < 0.03 * best.growth
    assert (earned["flat"] == 0).all() and abs(earned["buy and hold"].mean()) < 0.1 * best.growth
    naive = earned["threshold at 0"].mean()
    assert 0.6 * best.growth < naive < 0.8 * best.growth, "the defaults leave a clear gap"


def test_rules_order_what_they_say(market, ledgers):
    data, split = market
    runs = data.market(split)
    x = data.panel.hidden["deviation"]
    for name, buy, sell in (
        ("threshold at 0", 0.0, 0.0),
        ("optimal band", *optimal_band(5.0, 0.001, data.costs, data.fill)[:2]),
    ):
        for number, frame in ledgers[name].groupby("market"):
            k = runs.order[number]
            seen = x[runs.starts[k] : runs.stops[k] - 1, runs.symbol[k]]
            held = False
            for order, deviation in zip(frame["action"], seen):
                expected = SELL_ALL if held and deviation > sell else BUY_LARGE if not held and deviation < buy else 0
                assert order == expected
                held = order == BUY_LARGE or (held and order != SELL_ALL)
    held = ledgers["buy and hold"].groupby("market")
    assert (held["turnover"].apply(np.count_nonzero) == 1).all() and (ledgers["flat"]["turnover"] == 0).all()
    for number, frame in held:
        k = runs.order[number]
        ratio = data.panel.close[runs.stops[k] - 1, runs.symbol[k]] / data.panel.open[runs.starts[k] + 1, runs.symbol[k]]
        assert frame["equity"].iloc[-1] == pytest.approx(ratio / (1 + 3e-4), rel=1e-6)


def test_other_markets_have_no_band():
    panel = make_panel("synthetic:noise:bars=300:train=1:val=1:test=1:assets=2", 0)
    data = TradingData(panel, TradingConfig(max_position=0.5, sizes=(0.1, 0.2, 0.5)))
    split = panel.split()["test"]
    found = references(data, split)
    assert list(found) == ["flat", "buy and hold"] and found["buy and hold"]["gross_exposure"].iloc[5:].mean() > 0.4
    signal = np.ones(panel.close.shape)
    assert run(data, split, thresholds(data, split, signal, 0.0, 2.0))["turnover"].sum() == 0


def test_rules_buy_what_the_largest_position_lets_them():
    """Where the largest order is more than that, it is masked, and they give the next smaller one."""
    panel = make_panel("synthetic:ou:bars=300:train=1:val=1:test=1:assets=2", 0)
    split = panel.split()["test"]
    found, expected = (
        references(TradingData(panel, TradingConfig(max_position=0.5, sizes=sizes)), split)
        for sizes in ((0.1, 0.5, 1.0), (0.1, 0.2, 0.5))
    )
    for name in ("buy and hold", "threshold at 0", "optimal band"):
        assert found[name]["turnover"].any() and found[name]["gross_exposure"].max() == pytest.approx(0.5, abs=0.01)
        pd.testing.assert_frame_equal(found[name].drop(columns="action"), expected[name].drop(columns="action"))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="fill='never'"):
        optimal_band(5.0, 0.001, INSTITUTIONAL, "never")
    with pytest.raises(ValueError, match="weights=1"):
        optimal_band(5.0, 0.001, INSTITUTIONAL, "next_open", weights=1)
    assert Band._fields == ("buy", "sell", "growth")
    for option in ("half_life=0.1", "vol=0", "vol=1"):
        with pytest.raises(PanelError, match=option.split("=")[0]):
            make_panel(f"synthetic:ou:{option}")
