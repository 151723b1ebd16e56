"""TradingVectorEnv.targets: what an order aims at, before its bar is known."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import DEAR, TRADING, assert_same_bits, make_env, ragged_panel, random_actions, trading_data, whole

from envs.costs import RECORD
from envs.synthetic import make_panel
from envs.trading import EVENTS, ORDERS
from envs.trading_tables import TradingConfig, TradingData

NET = RECORD.index("net_exposure")


def test_they_are_met_where_the_close_is_the_fill():
    """And nothing but what overrides an agent, or a masked order, makes a target another one than the order says."""
    config = TRADING | {"stop_loss": 0.0, "take_profit": 0.0, "daily_loss": 0.001, "max_drawdown": 0.004}
    panel = make_panel("synthetic:ou:bars=300:train=1:val=1:test=1:assets=4", seed=3)
    data = TradingData(panel, TradingConfig(costs=DEAR, fill="same_close", **config))
    env, seen = make_env(data, 8, episode_length=90), set()
    env.reset(seed=5)
    for orders in random_actions(env, 400, seed=2):
        before = env.get_state()
        targets = env.targets(orders)
        assert all(np.array_equal(before[key], value) for key, value in env.get_state().items()), "something was stepped"
        assert_same_bits(targets, env.targets(orders))
        held = env._memory[:, 0].copy()
        _, _, _, _, infos = env.step(orders)
        np.testing.assert_allclose(infos["record"][:, NET], targets, rtol=1e-9, atol=1e-12)
        seen |= {EVENTS[int(e)] for e in infos["components"]["event"]}
        free = infos["components"]["event"] == 0
        held_on = free & (infos["choice"] == ORDERS.index("hold"))
        assert_same_bits(targets[held_on], held[held_on])
    assert {"none", "max_hold", "daily_loss", "breaker"} <= seen


@pytest.mark.parametrize("fill", ("next_open", "next_close"))
def test_they_do_not_know_the_price_of_the_fill(fill):
    """The same account and another next bar: the same targets."""
    panel = ragged_panel(0)
    fields = {name: values.copy() for name, values in panel.fields.items()}
    for values in fields.values():
        values[81:] *= 1.5
    other = replace(panel, **fields)
    found = []
    for one in (panel, other):
        env = make_env(trading_data(one, fill=fill), 6, split=whole(one), episode_length=0, random_start=False)
        env.reset(seed=0)
        env.step(np.full(6, ORDERS.index("buy_small")))
        while env.rows[0] < 80:
            env.step(np.zeros(6, int))
        at_80 = env.rows == 80
        found.append([env.targets(np.full(6, order))[at_80] for order in range(len(ORDERS))])
    assert at_80.any()
    assert_same_bits(*found)


def test_orders_that_are_none_are_refused():
    env = make_env(trading_data(ragged_panel(0)), 2, split=whole(ragged_panel(0)))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions"):
        env.targets(np.array([0, 7]))
    with pytest.raises(ValueError, match="shape"):
        env.targets(np.zeros(3, int))
