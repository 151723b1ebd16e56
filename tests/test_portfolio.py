"""Portfolio-v0: Gymnasium's rules, constraints, guards, rewards, what observations show, and that nothing leaks."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from conftest import (
    CONSTRAINTS,
    DEAR,
    FILLS,
    GUARD,
    PENALTIES,
    assert_same_bits,
    assert_same_rollout,
    make_env,
    portfolio_data,
    ragged_panel,
    ragged_with_series,
    random_actions,
    rollout,
    tampered,
    whole,
)
from gymnasium.utils.env_checker import check_env

from envs import ledger
from envs.costs import EQUITY, GROSS_RETURN, INTEREST, NET_RETURN, RECORD, RUIN, TURNOVER
from envs.episodes import DSR_BARS, DSR_RATE, RATE
from envs.panel import Panel, PanelError, Split
from envs.portfolio import COMPONENTS, GUARDS, PortfolioVectorEnv, RegimeGuard
from envs.portfolio_references import (
    closed_form,
    cvar,
    episode_returns,
    references,
    run,
    tail_cvar,
    tail_flip,
    trading_rate,
    utility,
)
from envs.portfolio_tables import PORTFOLIO, WARMUP, PortfolioConfig, PortfolioData, held_overnight, load_groups
from envs.projection import project
from envs.synthetic import make_panel

GP = "synthetic:garleanu-pedersen:bars=400:train=3:val=1:test=3"


def hourly(panel: Panel) -> Panel:
    """The panel with five hourly bars a day instead of one."""
    bar = np.arange(panel.num_bars)
    return replace(panel, timestamps=np.datetime64("2024-01-01T10", "ns") + (bar // 5 * 24 + bar % 5) * np.timedelta64(1, "h"))


@pytest.fixture(scope="session")
def constrained(portfolios, tmp_path_factory):
    """`portfolios`, and two on hourly bars with less overnight."""
    groups, panel = tmp_path_factory.mktemp("hourly") / "groups.csv", hourly(ragged_with_series())
    overnight = {
        f"hourly, {name}": portfolio_data(name, panel, groups, overnight_gross=0.5)
        for name in ("groups and leverage", "long/short")
    }
    return portfolios | overnight


ALL = (*CONSTRAINTS, "hourly, groups and leverage", "hourly, long/short")


def endless(data, num_envs=1, **options):
    return make_env(data, num_envs, split=whole(data.panel), episode_length=0, random_start=False, **options)


# --- Gymnasium


def test_single_env_passes_gymnasiums_checker(calm_data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gym.make("Portfolio-v0", data=calm_data).unwrapped)
    heard = [str(w.message) for w in caught if "infinity" not in str(w.message) and "normalized space" not in str(w.message)]
    assert not heard


def test_make_vec_gives_the_native_vector_env(calm_data):
    env = gym.make_vec("Portfolio-v0", num_envs=3, data=calm_data)
    assert isinstance(env.unwrapped, PortfolioVectorEnv)
    obs, infos = env.reset(seed=0)
    assert env.observation_space.contains(obs) and "action_mask" not in infos
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])


def test_bad_arguments_are_named(calm_data):
    for options, said in (
        ({"reward_weights": {"profit": 1.0}}, "reward_weights.*log_growth"),
        ({"cvar_alpha": 0.0}, "cvar_alpha=0.0"),
        ({"gross": 2.0}, "gross.*PortfolioConfig"),
        ({"split": "future"}, "split='future'"),
    ):
        with pytest.raises(ValueError, match=said):
            make_env(calm_data, **options)
    env = make_env(calm_data, 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions: shape"):
        env.step(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(env.action_space.shape, np.nan))


@pytest.mark.parametrize(
    "field, value",
    [
        ("constraints", "anything"), ("orders", "maybe"), ("scale", -1.0), ("asset_cap", 0.0), ("gross", 0.0),
        ("overnight_gross", 3.0), ("overnight_gross", -0.1), ("net", 0.5), ("net", -0.1), ("group_cap", -0.1),
        ("fill", "yesterday"),
        *((field, np.nan) for field in ("scale", "asset_cap", "gross", "overnight_gross", "net", "group_cap")),
        *((field, np.inf) for field in ("scale", "asset_cap", "gross", "overnight_gross", "net", "group_cap")),
    ],
)  # fmt: skip
def test_bad_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        PortfolioConfig(**{field: value})


# --- time


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", ("groups and leverage", "long/short", "changes, long"))
def test_nothing_seen_or_earned_depends_on_later_bars(fill, name, tmp_path):
    """Replace every bar and every series after row t at random: what was known, ordered and earned stays, to the bit."""
    panel = ragged_with_series()
    actions = random_actions(make_env(portfolio_data(name, panel, tmp_path / "groups.csv")), 50, seed=3)

    def log_of(panel):
        data = portfolio_data(name, panel, tmp_path / "groups.csv", fill=fill)
        return rollout(endless(data, guard=GUARD, reward_weights=PENALTIES), actions)

    expected = log_of(panel)
    for t in (WARMUP + 4, WARMUP + 20, WARMUP + 41):
        found = log_of(tampered(panel, t, np.random.default_rng(t)))
        decided = expected["row"][:, 0]
        for key in expected:
            known = decided <= t if key in ("seen_obs", "choice", "row") else decided + 1 <= t
            assert known.sum() > 3
            assert_same_bits(found[key][known], expected[key][known], f"{key}, t={t}")
        assert not np.array_equal(found["record"], expected["record"]), "the tampering changed nothing at all"


# --- money


@pytest.mark.parametrize("guard", (None, GUARD), ids=("free", "guarded"))
@pytest.mark.parametrize("name", ("simplex", "changes, long", "levered", "short"))
def test_every_bar_adds_up(portfolios, name, guard):
    """Over gaps, a halt and a delisting, at high costs; the last two with more than all of their equity."""
    if name in CONSTRAINTS:
        data = portfolios[name]
    else:
        kind = {"levered": {"cash": False}, "short": {"constraints": "long_short", "leverage": True}}[name]
        data = PortfolioData(
            ragged_with_series(), PortfolioConfig(costs=DEAR, scale=1.0, **({"leverage": True} | kind), gross=3.0)
        )
    env = make_env(data, 8, split=whole(data.panel), episode_length=28, guard=guard)
    log = rollout(env, random_actions(env, 56))
    record, charge = log["record"], {name: log["record"][..., c] for c, name in enumerate(RECORD)}
    charges = record[..., GROSS_RETURN + 1 : INTEREST].sum(axis=2)
    assert np.abs(record[..., NET_RETURN] - (record[..., GROSS_RETURN] - charges + record[..., INTEREST])).max() < 1e-12
    for past in np.split(record, np.flatnonzero(log["truncated"][:, 0]) + 1)[:-1]:
        assert np.allclose(past[..., EQUITY], np.cumprod(1 + past[..., NET_RETURN], axis=0), rtol=1e-12)
    growth = np.log(np.maximum(1 + record[..., NET_RETURN], RUIN))
    assert_same_bits(log["reward"], growth.astype(np.float32), "reward: log growth after costs")
    for paid in ("commission", "spread", "slippage", "impact", *(("financing",) if name in ("levered", "short") else ())):
        assert charge[paid].max() > 1e-6, f"{paid} was never charged: the test shows nothing"
    assert (charge["borrow"].max() > 1e-6) == (name == "short")


@pytest.mark.parametrize("name", ("simplex", "long/short"))
def test_reward_components_recomputed(portfolios, name):
    """Every component from the records alone, bar by bar, and their weighted sum; over two episodes."""
    panel = portfolios[name].panel
    env = make_env(
        portfolios[name], 1, split=whole(panel), episode_length=29, random_start=False, reward_weights=PENALTIES, cvar_alpha=0.1
    )
    log = rollout(env, random_actions(env, 58, seed=4))
    assert np.flatnonzero(log["truncated"]).tolist() == [28, 57]
    total = []
    for n, row in enumerate(log["record"][:, 0]):
        n %= 29
        if n == 0:
            mean = square = smooth = at_risk = 0.0
            peak = 1.0
        r, expected = row[NET_RETURN], dict.fromkeys(COMPONENTS, 0.0)
        expected["log_growth"] = np.log(1 + r)
        if n + 1 > DSR_BARS:
            top = square * (r - mean) - 0.5 * mean * (r * r - square)
            expected["differential_sharpe"] = top / (square - mean**2) ** 1.5
        rate = max(DSR_RATE, 1 / (n + 1))
        mean, square = mean + rate * (r - mean), square + rate * (r * r - square)
        expected["turnover"] = row[TURNOVER]
        peak = max(peak, row[EQUITY])
        expected["drawdown"] = 1 - row[EQUITY] / peak
        expected["cvar"] = at_risk + max(0.0, -r - at_risk) / 0.1
        smooth += RATE * (r * r - smooth)
        at_risk += RATE * np.sqrt(smooth) * (1.0 if -r > at_risk else -0.1 / 0.9)
        expected["variance"] = r * r
        for component, value in expected.items():
            found = log[f"component_{component}"][len(total), 0]
            assert found == pytest.approx(value, abs=1e-12, rel=1e-9), (component, n)
        total.append(expected["log_growth"] + 0.1 * expected["differential_sharpe"])
        total[-1] -= sum(PENALTIES[component] * expected[component] for component in COMPONENTS[2:6])
    assert np.allclose(log["reward"][:, 0], total, rtol=1e-5, atol=1e-7)


# --- constraints


@pytest.mark.parametrize("name", ALL)
def test_constraints_hold_for_random_actions(constrained, name):
    """172,000 orders a kind, more than a million in all, on a panel whose symbols come, go and halt; to 1e-9.

    A symbol without a bar keeps its weight, and uses up its share of the caps and of the net range. A net that the caps put
    out of reach is approached as far as they allow.
    """
    data = constrained[name]
    env = make_env(data, 4096, split=whole(data.panel), episode_length=30)
    env.reset(seed=0)
    config, group, size = data.config, data.group, data.panel.num_symbols
    out_of_reach, overnight = 0, 0
    for actions in random_actions(env, 42, seed=8):
        held, rows = env._memory[:, :size].copy(), env._state.t.copy()
        order = env.step(actions)[4]["choice"]
        present = data.panel.present[rows]
        assert np.isfinite(order).all()
        assert_same_bits(order[~present], held[~present], "absent symbols")
        budget = np.where(held_overnight(data.panel, data.fill)[rows], config.overnight_gross or config.gross, config.gross)
        overnight += (budget < config.gross).sum()
        if config.leverage:
            budget = np.minimum(budget, np.maximum(0.0, 1.0 + actions[:, -1].astype(float)))
        elif config.constraints == "long_only":
            budget = np.minimum(budget, 1.0)
        fixed, free = np.where(present, 0.0, held), np.where(present, order, 0.0)
        left = np.maximum(0.0, budget - np.abs(fixed).sum(axis=1))
        gross, net = np.abs(free).sum(axis=1), free.sum(axis=1)
        assert (gross <= left + 1e-9).all() and (np.abs(free) <= config.asset_cap + 1e-9).all()
        reach = np.where(group < 0, config.asset_cap * present, 0.0).sum(axis=1)
        for g in range(len(data.groups)):
            room = np.maximum(0.0, config.group_cap - np.abs(fixed[:, group == g]).sum(axis=1))
            assert (np.abs(free[:, group == g]).sum(axis=1) <= room + 1e-9).all()
            reach += np.minimum(room, config.asset_cap * present[:, group == g].sum(axis=1))
        reach = np.minimum(left, reach)
        if config.constraints == "long_only":
            assert (free >= 0).all()
            if not config.cash:
                assert np.allclose(net, reach, atol=1e-9), "not invested as far as the caps allow"
        elif config.net is not None:
            low, high = -config.net - fixed.sum(axis=1), config.net - fixed.sum(axis=1)
            assert (net <= np.maximum(high, -reach) + 1e-9).all() and (net >= np.minimum(low, reach) - 1e-9).all()
            out_of_reach += ((high < -reach) | (low > reach)).sum()
    assert config.overnight_gross is None or overnight > 1000
    assert config.net is None or out_of_reach > 10


def slow_order(data, held, row, action, guard=RegimeGuard(), lossy=False, fallen=False):
    """Order (N,) by the description: the problem of the symbols that have a bar alone, within what the others leave over."""
    config, here = data.config, data.panel.present[row]
    long_only, change, size = config.constraints == "long_only", config.orders == "change", data.panel.num_symbols
    action, gone = action.astype(float), np.where(here, 0.0, held)
    budget = data.gross[row]
    if config.leverage:
        budget = min(budget, max(0.0, 1 + action[-1]))
    elif long_only:
        budget = min(budget, 1.0)
    left = max(0.0, budget - np.abs(gone).sum())
    caps = np.array([max(0.0, config.group_cap - np.abs(gone[data.group == g]).sum()) for g in range(len(data.groups))])
    net = np.inf if config.net is None else config.net
    low, high = (left, left) if long_only else (-net - gone.sum(), net - gone.sum())
    cap = np.full(here.sum(), config.asset_cap)

    def closest(wanted, cash):
        order = np.zeros(len(wanted))
        project(
            wanted, np.zeros(len(cap)) if long_only else -cap, cap, data.group[here], caps, np.inf if long_only else left,
            low, high, cash, np.zeros(len(caps)), order,
        )  # fmt: skip
        return order

    asked = data.scale * action[:size][here] + (held[here] if change else 0.0)
    cash = data.scale * action[size] + (budget - held.sum() if change else 0.0) if long_only and config.cash else -np.inf
    order = closest(asked, cash)
    trade = order - held[here]
    large = guard.guard_turnover is not None and np.abs(trade).sum() > guard.guard_turnover
    if lossy or large:
        kept = np.sign(trade) * np.maximum(np.abs(trade) - (guard.guard_penalty if lossy else 0.0), 0.0)
        asked = held[here] + (guard.guard_probe if large else 1.0) * kept
        order = closest(asked, left - asked.sum() if long_only else -np.inf)
    if fallen:
        scaled = guard.guard_scale * order
        order = closest(scaled, left - scaled.sum() if long_only else -np.inf)
    out = held.copy()
    out[here] = order
    return out, large


def without(guard, *fields):
    return replace(guard, **dict.fromkeys(fields))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rules", ((), *((guard,) for guard in GUARDS), GUARDS), ids=lambda rules: "+".join(rules) or "none")
def test_orders_and_guards_as_described(constrained, name, rules):
    """Every order against the slow one, and every guard's flag against its condition: it fires when and only when that holds.

    The drawdown and the return of the last bars are those of the records of this episode; the turnover is that of the
    agent's own order. Each rule alone, none, and all.
    """
    data = constrained[name]
    guard = without(GUARD, *(set(GUARDS) - set(rules)))
    assert guard.active == rules
    env = make_env(data, 12, split=whole(data.panel), episode_length=24, guard=guard)
    env.reset(seed=3)
    returns, fired, changed = [[] for _ in range(12)], dict.fromkeys(GUARDS, 0), 0
    for actions in random_actions(env, 60, seed=6) / 3:
        held, rows = env._memory[:, : data.panel.num_symbols].copy(), env._state.t.copy()
        infos, done = (step := env.step(actions))[4], step[2] | step[3]
        for i, past in enumerate(returns):
            equity = np.cumprod([1.0, *(1 + np.array(past))])
            fallen = guard.guard_drawdown is not None and 1 - equity[-1] / equity.max() >= guard.guard_drawdown
            lossy = guard.guard_return is not None and len(past) >= guard.guard_window
            lossy = lossy and np.prod(1 + np.array(past[-guard.guard_window :])) < 1 + guard.guard_return
            expected, large = slow_order(data, held[i], rows[i], actions[i], guard, lossy, fallen)
            assert np.abs(infos["choice"][i] - expected).max() < 1e-9
            for component, holds in zip(GUARDS, (fallen, lossy, large)):
                assert infos["components"][component][i] == holds, component
                fired[component] += holds
            changed += rules != () and np.abs(expected - slow_order(data, held[i], rows[i], actions[i])[0]).max() > 1e-3
            past.append(infos["record"][i, NET_RETURN])
            if done[i]:
                past.clear()
    assert all((0.005 < fired[component] / 720 < 1) == (component in rules) for component in GUARDS), fired
    assert changed > 5 or not rules


def test_drawdown_guard_keeps_the_net_range():
    """A symbol without a bar holds 0.3; the rest hedges it, to a net of 0: also when the guard has halved the order."""
    panel = ragged_with_series()
    data = PortfolioData(panel, PortfolioConfig(costs="zero", constraints="long_short", net=0.0))
    row = 80
    gone = np.flatnonzero(~panel.present[row])[0]
    env = endless(data, 1, guard=RegimeGuard(guard_drawdown=0.1))
    env.reset(seed=0)
    env._state.t, env._state.equity, env._memory[0, gone] = row, 0.8, 0.3
    order = env.step(np.zeros((1, 6), np.float32))[4]["choice"][0]
    assert order[gone] == 0.3 and order.sum() == pytest.approx(0.0, abs=1e-9)


def test_scores_of_zero(small_panel):
    """Equal weights, cash included; or nothing; or no trade."""
    n = small_panel.num_symbols

    def order_of(score, **config):
        env = make_env(PortfolioData(small_panel, PortfolioConfig(costs="zero", **config)))
        env.reset(seed=0)
        env.step(np.full(env.action_space.shape, score, np.float32))
        held = env._memory[0, :n].copy()
        return env.step(np.zeros(env.action_space.shape, np.float32))[4]["choice"][0], held

    assert np.allclose(order_of(1.0)[0], 1 / (n + 1), atol=1e-12)
    assert np.allclose(order_of(1.0, cash=False)[0], 1 / n, atol=1e-12)
    assert (order_of(1.0, constraints="long_short")[0] == 0).all()
    order, held = order_of(0.1, constraints="long_short", orders="change")
    assert_same_bits(order, held, "no trade")
    assert (held != 0).all()


def test_unit_scores_ask_for_scale(small_panel):
    for config, scale in (({"gross": 1.5}, 1.5 / 6), ({"gross": 1.5, "scale": 0.02}, 0.02)):
        env = make_env(PortfolioData(small_panel, PortfolioConfig(constraints="long_short", **config)))
        env.reset(seed=0)
        score = np.array([[1, -1, 0.5, 0, 0, -0.5]], np.float32)
        assert np.allclose(env.step(score)[4]["choice"], scale * score, atol=1e-15)
    env = make_env(
        PortfolioData(small_panel, PortfolioConfig(constraints="long_short", gross=100.0, asset_cap=50.0, scale=1.0))
    )
    env.reset(seed=0)
    order = env.step(np.array([[99, -99, 10, 0, 0, 0]], np.float32))[4]["choice"][0]
    assert order.tolist() == [10, -10, 10, 0, 0, 0], "scores beyond 10 count as 10"


@pytest.mark.parametrize("head, budget", [(-3.0, 0.0), (-0.4, 0.6), (0.0, 1.0), (0.5, 1.5), (9.0, 2.0)])
def test_leverage_head_sets_the_budget(small_panel, head, budget):
    for config in ({"cash": False}, {"constraints": "long_short"}):
        env = make_env(PortfolioData(small_panel, PortfolioConfig(leverage=True, gross=2.0, **config)))
        env.reset(seed=0)
        action = np.full(env.action_space.shape, 10.0, np.float32)
        action[:, -1] = head
        assert np.abs(env.step(action)[4]["choice"]).sum() == pytest.approx(budget, abs=1e-6)


@pytest.mark.parametrize("fill, ahead", [("next_open", 2), ("next_close", 2), ("same_close", 1)])
def test_held_overnight_by_hand(fill, ahead):
    """Ordered at bar t, filled `ahead - 1` bars later, held to the next fill: overnight if that lies on another day."""
    panel = hourly(ragged_panel(0, bars=15))
    found = held_overnight(panel, fill)
    for t in range(15 - ahead):
        assert found[t] == ((t + ahead) // 5 != (t + ahead - 1) // 5), t
    assert found[15 - ahead :].all()
    assert held_overnight(ragged_panel(0), fill).all()
    gross = PortfolioData(panel, PortfolioConfig(fill=fill, gross=2.0, overnight_gross=0.5)).gross
    assert np.array_equal(gross, np.where(found, 0.5, 2.0))


def test_groups_file(tmp_path):
    panel, path = ragged_panel(0), tmp_path / "groups.csv"
    rows = [f"R{i},{'tech' if i < 4 else 'oil'}" for i in range(6)]
    path.write_text("\n".join(["symbol,group", *rows, "XX,other"]))
    names, index = load_groups(str(path), panel)
    assert names == ("oil", "tech") and index.tolist() == [1, 1, 1, 1, 0, 0]
    for lines, said in (
        (["symbol,sector", *rows], "columns.*expected symbol and group"),
        (["symbol,group", *rows, "R1,oil"], "data row 7: symbol 'R1'"),
        (["symbol,group", *rows[1:]], r"no group for \['R0'\]"),
        (["symbol,group", "R0,", *rows[1:]], r"no group for \['R0'\]"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(PanelError, match=said):
            load_groups(str(path), panel)
    with pytest.raises(PanelError, match="nowhere.csv"):
        load_groups("nowhere.csv", panel)


# --- guards


def guarded(data, guard, steps=58, seed=6):
    env = endless(data, 1, guard=guard)
    return env, rollout(env, random_actions(env, steps, seed=seed) / 3)


def test_guards_at_their_threshold(small_panel):
    """Turnover and a return equal to the limit pass; a drawdown equal to the limit fires."""
    data = PortfolioData(small_panel, PortfolioConfig(costs="zero", constraints="long_short", scale=0.25, gross=2.0))
    score = np.array([[1, 1, 0, 0, 0, 0]], np.float32)  # turnover of exactly 0.5 from cash
    for limit, part in ((0.5, 1.0), (np.nextafter(0.5, 0), 0.1)):
        env = make_env(data, guard=RegimeGuard(guard_turnover=limit, guard_probe=0.1))
        env.reset(seed=0)
        infos = env.step(score)[4]
        assert np.allclose(infos["choice"], part * 0.25 * score, atol=1e-15)
        assert infos["components"]["guard_turnover"] == (part < 1)
    held = env._memory[0, :6].copy()
    order = env.step(-4 * score)[4]["choice"][0]
    assert np.allclose(order, held + 0.1 * (-score[0] - held), atol=1e-15), "a part of the way from what is held"
    both = RegimeGuard(guard_turnover=0.5, guard_probe=0.1, guard_return=-0.05, guard_window=1, guard_penalty=0.0)
    env = make_env(data, guard=both)
    env.reset(seed=0)
    env._state.length, env._state.window_growth = 1, -0.5
    infos = env.step(score)[4]
    assert infos["components"]["guard_return"] == 1 and infos["components"]["guard_turnover"] == 0
    assert np.allclose(infos["choice"], 0.25 * score, atol=1e-15), "also where another guard changes the order"
    env = make_env(data, guard=RegimeGuard(guard_drawdown=0.25, guard_scale=0.5))
    for equity, part in ((0.75, 0.5), (np.nextafter(0.75, 1), 1.0)):
        env.reset(seed=0)
        env._state.equity = equity
        infos = env.step(score)[4]
        assert np.allclose(infos["choice"], part * 0.25 * score, atol=1e-15)
        assert infos["components"]["guard_drawdown"] == (part < 1)
    env = make_env(data, guard=RegimeGuard(guard_return=-0.05, guard_window=2))
    limit = np.log1p(-0.05)
    for bars, growth, fires in ((2, limit, 0), (2, np.nextafter(limit, -1), 1), (1, -0.5, 0)):
        env.reset(seed=0)
        env._state.length, env._state.window_growth = bars, growth
        assert env.step(score)[4]["components"]["guard_return"] == fires, "below the limit, in an episode as long as the window"


def test_return_guard_drops_small_trades_and_shrinks_large_ones(small_panel):
    data = PortfolioData(small_panel, PortfolioConfig(costs="zero", constraints="long_short", scale=1.0, gross=2.0))
    env = make_env(data, guard=RegimeGuard(guard_return=-0.01, guard_window=2, guard_penalty=0.1))
    env.reset(seed=0)
    nothing = np.zeros((1, 6), np.float32)
    env.step(nothing), env.step(nothing)
    score = np.array([[0.05, -0.05, 0.3, -0.3, 0.1, 0]], np.float32)
    calm = env.step(score)[4]
    assert calm["components"]["guard_return"] == 0 and np.allclose(calm["choice"], score, atol=1e-7)
    env.reset(seed=0)
    env.step(nothing), env.step(nothing)
    env._state.window_growth = np.log(0.98)
    found = env.step(score)[4]
    assert found["components"]["guard_return"] == 1
    assert np.allclose(found["choice"], [[0, 0, 0.2, -0.2, 0, 0]], atol=1e-7)


def test_guards_that_are_off_change_nothing(portfolios):
    data = portfolios["long/short"]
    free = guarded(data, None)[1]
    far = RegimeGuard(guard_drawdown=1.0, guard_return=-0.99, guard_turnover=1e9)
    assert_same_rollout(guarded(data, far)[1], free)
    for component in GUARDS:
        assert not free[f"component_{component}"].any()


def test_hit_rates_are_in_the_ledger(calm_data):
    split = calm_data.panel.split()["test"]
    policy = lambda obs, *_: np.tile(np.sin(obs[:, :1] * 7), (1, 7)).astype(np.float32) * np.arange(7)  # noqa: E731
    guard = RegimeGuard(guard_turnover=0.3, guard_drawdown=0.05)
    frame = run(calm_data, split, policy, guard=guard)
    assert tuple(frame.columns) == ("split", "market", "timestamp", *RECORD, *GUARDS, "action")
    assert set(np.unique(frame[list(GUARDS)])) == {0.0, 1.0} and not frame["guard_return"].any()
    for _, market in frame.groupby("market"):
        equity = np.append(1.0, market["equity"].to_numpy())
        below = equity[:-1] <= np.maximum.accumulate(equity)[:-1] * 0.95
        assert_same_bits(market["guard_drawdown"].to_numpy(), below.astype(float), "guard_drawdown")
    ordered = np.stack(frame["action"].to_numpy())
    assert (
        ordered.shape == (len(frame), 6)
        and (ordered >= 0).all()
        and np.allclose(frame["gross_exposure"], ordered.sum(axis=1), atol=1e-9)
    )


@pytest.mark.parametrize(
    "field, value",
    [("guard_drawdown", -0.1), ("guard_scale", 2.0), ("guard_return", -2.0), ("guard_window", 0), ("guard_penalty", -1.0),
     ("guard_turnover", -1.0), ("guard_probe", 1.5), *((field, np.nan) for field in RegimeGuard.__dataclass_fields__)],
)  # fmt: skip
def test_bad_guards_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        RegimeGuard(**{field: value})


# --- observations


def test_observation_holds_what_the_layout_says(portfolios):
    data = portfolios["long/short"]
    panel, layout = data.panel, data.layout
    spans = sorted((s.start, s.stop) for s in layout.values())
    assert spans[0][0] == 0 and spans[-1][1] == data.observation_size
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    env = endless(data, 1)
    log = rollout(env, random_actions(env, 40) / 3)
    assets = log["obs"][:, 0, layout["assets"]].reshape(40, panel.num_symbols, len(data.features))
    after = log["row"][:, 0] + 1
    own = np.nan_to_num(panel.extras["forecast"][after]).astype(np.float32)
    assert_same_bits(assets[:, :, data.features.index("forecast")], own, "series per symbol")
    assert_same_bits(assets[:, :, data.features.index("present")], panel.present[after].astype(np.float32), "present")
    assert_same_bits(log["obs"][:, 0, layout["series"]][:, 0], panel.extras["macro"][after].astype(np.float32), "global series")
    weights, drift = log["obs"][:, 0, layout["weights"]], log["obs"][:, 0, layout["drift"]]
    assert np.allclose(drift, weights - log["choice"][:, 0], atol=1e-6) and np.abs(drift).max() > 1e-4
    portfolio = dict(zip(PORTFOLIO, log["obs"][:, 0, layout["portfolio"]].T))
    record = log["record"][:, 0]
    assert np.allclose(portfolio["gross"], np.abs(weights).sum(axis=1), atol=1e-6)
    assert np.allclose(portfolio["net"], weights.sum(axis=1), atol=1e-6)
    peak = np.maximum.accumulate(np.append(1.0, record[:, EQUITY]))[1:]
    assert np.allclose(portfolio["drawdown"], record[:, EQUITY] / peak - 1, atol=1e-6)
    assert np.allclose(portfolio["turnover"], record[:, TURNOVER], atol=1e-6)
    assert np.allclose(portfolio["gross_cap"], data.gross[after])
    mean = square = 0.0
    for n, r in enumerate(record[:, NET_RETURN]):
        mean, square = mean + RATE * (r - mean), square + RATE * (r * r - square)
        assert portfolio["mean_return"][n] == pytest.approx(mean, abs=1e-7)
        assert portfolio["volatility"][n] == pytest.approx(np.sqrt(square - mean**2), abs=1e-7)


def test_decisions_wait_for_the_features_windows(calm_data):
    for split in calm_data.panel.split().values():
        starts = calm_data.market(split).starts
        assert (starts >= split.ranges[:, 0] + WARMUP).all(), "each range is a history of its own here"
    panel = ragged_panel(0)
    with pytest.raises(ValueError, match=f"rows 0..49 hold no bar.*more than {WARMUP} bars"):
        PortfolioData(panel).market(Split("test", np.array([[0, 50]])))


# --- references


@pytest.mark.parametrize("risk_aversion, cost, reversion", [(40.0, 150.0, 0.2), (5.0, 20.0, 0.03), (1.0, 0.5, 1.0)])
def test_closed_form_solves_the_control_problem(risk_aversion, cost, reversion):
    """Against the Riccati recursion of the same problem: state (weight, factor), control: the trade; variance 1."""
    a, b = np.array([[1, 0], [0, 1 - reversion]]), np.array([[1.0], [0]])
    q = np.array([[risk_aversion / 2, -0.5], [-0.5, 0]])
    cross = np.array([[risk_aversion / 2], [-0.5]])
    value = np.zeros((2, 2))
    for _ in range(20_000):
        h, g = (cost + risk_aversion) / 2 + b.T @ value @ b, cross.T + b.T @ value @ a
        value = q + a.T @ value @ a - g.T @ np.linalg.solve(h, g)
    trade = -np.linalg.solve(h, g)[0]
    share, pull = trading_rate(risk_aversion, np.array(cost))
    aim = 1 / risk_aversion / (1 + reversion * pull / risk_aversion)
    assert np.allclose(trade, [-share, share * aim], rtol=1e-6)


def test_closed_form_is_the_best_of_its_neighbours():
    panel = make_panel(GP, 1)
    data = PortfolioData(panel, PortfolioConfig("zero:quadratic_impact_bps=75"))
    split = panel.split()["test"]
    market = data.market(split)
    best = closed_form(data, market.starts, 40.0)

    def utility_of(targets):
        frame = ledger.backtest_weights(panel, data.execution, market.rates, split, targets, market.starts)
        return utility(frame, 40.0, panel.bars_per_year)

    top = utility_of(best)
    assert top > 0.1 and all(utility_of(k * best) < top for k in (0.8, 1.2))
    assert all(utility_of(np.roll(best, bars, axis=0)) < 0.99 * top for bars in (-1, 1)), "a bar early, a bar late"
    found = references(data, split, 40.0)
    assert set(found) == {"equal weight", "closed form"}
    assert utility(found["closed form"], 40.0, panel.bars_per_year) == pytest.approx(top)
    assert utility(found["equal weight"], 40.0, panel.bars_per_year) < top


def test_merton_fraction():
    panel = make_panel("synthetic:merton:bars=300:train=1:val=1:test=1:drift=0.004:vol=0.05", 0)
    data = PortfolioData(panel, PortfolioConfig("zero:cash_rate=0.1"))
    found = closed_form(data, np.array([WARMUP]), 2.0)
    years = panel.bar_years[100]
    assert found[100, 0] == pytest.approx((0.004 - 0.1 * years) / (2 * 0.05**2))


@pytest.fixture(scope="module")
def tail_panel():
    return make_panel("synthetic:tail:bars=3000:train=60:val=1:test=40", 2)


@pytest.mark.parametrize("bars", [1, 10])
def test_cvar_of_the_tail_market_is_that_of_many_windows(tail_panel, bars):
    """Of both symbols, at levels of which crashes are a part, nearly all, and more than all."""
    data = PortfolioData(tail_panel, PortfolioConfig("zero", cash=False))
    split = tail_panel.split()["train"]
    market = data.market(split)
    for symbol in (0, 1):
        targets = np.tile(np.eye(2)[symbol], (tail_panel.num_bars, 1))
        frame = ledger.backtest_weights(tail_panel, data.execution, market.rates, split, targets, market.starts)
        windows = episode_returns(frame, bars)
        assert len(windows) == 60 * ((3000 - WARMUP - 1) // bars)
        for alpha in (0.01, 0.03, 0.1, 0.25, 0.6, 1.0):
            truth, found = tail_cvar(tail_panel, symbol, alpha, bars), cvar(windows, alpha)
            error = np.sort(windows)[: int(alpha * len(windows))].std() / np.sqrt(alpha * len(windows)) + 0.11 * np.sqrt(
                0.02 * bars / len(windows)
            ) / alpha * (symbol == 0)  # of the tail's mean, and of the share of crashes in it
            assert abs(found - truth) < 4 * error + 1e-12, (symbol, alpha)
    assert tail_cvar(tail_panel, 0, 1.0, bars) == pytest.approx(bars * (0.01 - 0.02 * 0.11))
    assert tail_cvar(tail_panel, 1, 0.3, bars) == pytest.approx(bars * 0.003)


@pytest.mark.parametrize("bars", [1, 10])
def test_the_choice_flips_at_the_computed_level(tail_panel, bars):
    flip = tail_flip(tail_panel, bars)
    assert 0.2 < flip < 0.6
    assert tail_cvar(tail_panel, 0, flip, bars) == pytest.approx(bars * 0.003, abs=1e-9)
    data, split = PortfolioData(tail_panel, PortfolioConfig("zero", cash=False)), tail_panel.split()["test"]
    for factor, symbol in ((0.97, 1), (1.03, 0)):
        found = references(data, split, 1.0, factor * flip, bars)
        name = "closed form" if bars == 1 else "best constant"
        assert list(found) == ["equal weight", name, "mean-optimal"]
        for key, held in ((name, symbol), ("mean-optimal", 0)):
            earned = np.log1p(found[key]["net_return"])
            alone = [np.diff(np.log(tail_panel.close[a + WARMUP : b, held])) for a, b in split.ranges]
            np.testing.assert_allclose(earned, np.concatenate(alone), atol=1e-9)
    assert list(references(data, split, 1.0)) == ["equal weight", "closed form"]
    np.testing.assert_array_equal(
        references(data, split, 1.0)["closed form"]["net_return"], found["mean-optimal"]["net_return"]
    )


def test_no_mix_beats_the_better_symbol_away_from_the_flip(tail_panel):
    """One bar: the CVaR of the log growth of every mix, by a million draws."""
    rng, flip = np.random.default_rng(0), tail_flip(tail_panel, 1)
    shocks = 0.01 + 0.002 * rng.standard_normal(1_000_000) - 0.11 * (rng.random(1_000_000) < 0.02)
    weights = np.linspace(0, 1, 5)
    mixes = [np.sort(np.log(w * np.exp(shocks) + (1 - w) * np.exp(0.003))) for w in weights]
    for factor, best in ((0.5, 0.0), (0.9, 0.0), (1.1, 1.0), (2.0, 1.0)):
        tails = [mix[: int(factor * flip * len(mix))].mean() for mix in mixes]
        assert weights[int(np.argmax(tails))] == best, factor


def test_series_after_the_first_publication_only(tmp_path):
    """A panel without extra series sees none; one with them has them in place."""
    bare, rich = PortfolioData(ragged_panel(0)), PortfolioData(ragged_with_series())
    assert rich.observation_size == bare.observation_size + 6 + 1
    assert rich.features == (*bare.features, "forecast") and rich.describe()["extras"] == ["forecast", "macro"]
    held = replace(ragged_with_series(), extras={})
    assert PortfolioData(held).observation_size == bare.observation_size


def test_costs_are_charged(small_panel):
    dear, free = (PortfolioData(small_panel, PortfolioConfig(costs=costs)) for costs in (DEAR, "zero"))
    actions = random_actions(make_env(dear, 4), 80)
    paid, spared = (rollout(make_env(data, 4), actions)["reward"].sum() for data in (dear, free))
    assert paid < spared - 0.5
