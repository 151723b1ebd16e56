"""Fixtures and helpers that the tests of the markets share.

Panels are small on purpose: `SMALL` for compiled code, `ragged_panel` with `TINY` also for code that runs uncompiled.
"""

import os
import pickle
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from envs.leadlag import LeadLagEnv, LeadLagVectorEnv
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.panel import Panel, Split
from envs.portfolio import PortfolioEnv, PortfolioVectorEnv, RegimeGuard
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import make_panel
from envs.trading import TradingEnv, TradingVectorEnv
from envs.trading_tables import TradingConfig, TradingData
from envs.vector import MarketEnv, MarketVectorEnv

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CLEANMARKETS_DATA", ROOT.parent / "shared" / "data"))  # real prices, no part of the project
SMALL = "synthetic:leadlag:bars=400:train=2:val=1:test=2:assets=6:leaders=2:followers=2"
CONFIG = LeadLagConfig(max_lookback=60, num_lookbacks=5)
TINY = LeadLagConfig(min_lookback=5, max_lookback=20, num_lookbacks=3, min_symbols=3, min_coverage=0.7)
DEAR = "institutional:commission_bps=20:sqrt_impact=0.1:borrow_rate=0.2:financing_rate=0.3:cash_rate=0.05"
FILLS = ("next_open", "next_close", "same_close")
ACTIONS = ("absolute", "delta", "hybrid")
# Portfolio-v0: constraints of every kind; {groups} stands for a file
CONSTRAINTS = {
    "simplex": {},
    "capped, no cash": {"cash": False, "asset_cap": 0.3, "gross": 2.0},
    "groups and leverage": {"leverage": True, "gross": 2.0, "asset_cap": 0.8, "groups": "{groups}", "group_cap": 0.7},
    "long/short": {
        "constraints": "long_short", "gross": 1.5, "net": 0.2, "asset_cap": 0.6, "groups": "{groups}", "group_cap": 0.8,
        "leverage": True,
    },
    "changes": {"constraints": "long_short", "orders": "change"},
    "changes, long": {"orders": "change", "overnight_gross": 0.5},
}  # fmt: skip
GUARD = RegimeGuard(
    guard_drawdown=0.02, guard_return=-0.01, guard_window=7, guard_penalty=0.05, guard_turnover=0.4, guard_probe=0.3
)
PENALTIES = {"differential_sharpe": 0.1, "turnover": 0.1, "drawdown": 0.2, "cvar": 0.3, "variance": 0.4}
# Trading-v0: every exit and every limit, on prices of 2% a day
TRADING = dict(
    window=5, sizes=(0.25, 0.5, 0.8), max_position=0.8, max_exposure=0.8, stop_loss=0.05, take_profit=0.06, max_holding=6,
    daily_loss=0.02, max_drawdown=0.04, breaker_bars=3,
)  # fmt: skip
BURDENS = {"cost": 0.1, "holding": 0.2, "sharpe": 0.1, "drawdown": 0.2, "sizing": 0.1, "hold": 0.05}
KINDS = {
    LeadLagData: (LeadLagVectorEnv, LeadLagEnv),
    PortfolioData: (PortfolioVectorEnv, PortfolioEnv),
    TradingData: (TradingVectorEnv, TradingEnv),
}

pytest.register_assert_rewrite("scripts", "offline_cases")

# the same cases on every machine and in every run; pure-Python runs are slow, so no deadline
settings.register_profile("cleanmarkets", deadline=None, derandomize=True, database=None)
settings.load_profile("cleanmarkets")


@pytest.fixture(scope="session")
def small_panel() -> Panel:
    return make_panel(SMALL, seed=3)


@pytest.fixture(scope="session")
def small_data(small_panel) -> LeadLagData:
    return LeadLagData(small_panel, CONFIG)


@pytest.fixture(scope="session")
def ragged_data() -> LeadLagData:
    return LeadLagData(ragged_panel(0), TINY)


@pytest.fixture(scope="session")
def portfolios(tmp_path_factory) -> dict[str, PortfolioData]:
    """Name in CONSTRAINTS -> tables over a ragged panel with a series per symbol and a global one, at high costs."""
    groups = tmp_path_factory.mktemp("groups") / "groups.csv"
    return {name: portfolio_data(name, ragged_with_series(), groups) for name in CONSTRAINTS}


@pytest.fixture(scope="session")
def calm_data(small_panel) -> PortfolioData:
    return PortfolioData(small_panel)


@pytest.fixture(scope="session")
def tradings() -> dict[str, TradingData]:
    """Fill rule -> tables over a ragged panel with a series per symbol and a global one, at high costs."""
    return {fill: trading_data(ragged_with_series(), fill=fill) for fill in FILLS}


@pytest.fixture(params=(*ACTIONS, "simplex", "long/short", "trading"))
def market(request, small_data, portfolios, tradings) -> tuple[LeadLagData | PortfolioData | TradingData, dict]:
    """Tables and options of an environment of each kind: LeadLag-v0 by action, Portfolio-v0 by constraints, Trading-v0."""
    if request.param in ACTIONS:
        return small_data, {"actions": request.param, "max_jump": 1, "reward_weights": {"strength": 1.0}}
    if request.param == "trading":
        data = tradings["next_open"]
        return data, {"split": whole(data.panel), "reward_weights": BURDENS}
    data = portfolios[request.param]
    return data, {"split": whole(data.panel), "guard": GUARD, "reward_weights": PENALTIES}


def portfolio_data(name: str, panel: Panel, groups: Path, **changes) -> PortfolioData:
    groups.write_text("symbol,group\n" + "".join(f"{s},{'odd' if i % 2 else 'even'}\n" for i, s in enumerate(panel.symbols)))
    config = {key: str(groups) if value == "{groups}" else value for key, value in CONSTRAINTS[name].items()}
    return PortfolioData(panel, PortfolioConfig(**({"costs": DEAR} | config | changes)))


def trading_data(panel: Panel, symbols: tuple[str, ...] | None = None, **changes) -> TradingData:
    return TradingData(panel, TradingConfig(**({"costs": DEAR} | TRADING | changes)), symbols)


def ragged_with_series() -> Panel:
    panel, rng = ragged_panel(0), np.random.default_rng(1)
    own, shared = rng.standard_normal(panel.close.shape), rng.standard_normal(panel.num_bars)
    own[:70, 2] = np.nan
    return replace(panel, extras={"forecast": own, "macro": shared})


def ragged_panel(seed: int, bars: int = 120, symbols: int = 6) -> Panel:
    """One daily history with every field, and with gaps, a late listing, a halt and a delisting."""
    rng = np.random.default_rng(seed)
    present = rng.random((bars, symbols)) > 0.05
    present[: bars // 3, 1] = False
    present[bars // 2 :, 2] = False
    present[bars // 2 : bars // 2 + 8, 3] = False
    days = np.datetime64("2020-01-01") + np.cumsum(rng.choice([1, 1, 1, 3], bars))
    return Panel(
        name="ragged",
        timestamps=days.astype("datetime64[ns]"),
        symbols=tuple(f"R{i}" for i in range(symbols)),
        **_bars(rng, present, np.cumsum(0.02 * rng.standard_normal((bars, symbols)), axis=0)),
    )


def tampered(panel: Panel, t: int, rng: np.random.Generator) -> Panel:
    """The panel with every bar after row t replaced at random: other prices and series, bars removed, bars added."""
    present = rng.random((panel.num_bars - t - 1, panel.num_symbols)) < 0.7
    present[-1] |= ~panel.present[: t + 1].any(axis=0)  # a panel refuses symbols without any bar
    later = _bars(rng, present, 0.5 * rng.standard_normal(present.shape))
    fields = {name: np.concatenate([panel.fields[name][: t + 1], later[name]]) for name in panel.fields}
    extras = {name: np.concatenate([x[: t + 1], rng.standard_normal(x[t + 1 :].shape)]) for name, x in panel.extras.items()}
    return replace(panel, extras=extras, **fields)


def _bars(rng, present, log_price):
    close = np.exp(4 + log_price)
    open_ = close * np.exp(0.01 * rng.standard_normal(close.shape))
    fields = {
        "close": close,
        "open": open_,
        "high": np.maximum(open_, close) * 1.01,
        "low": np.minimum(open_, close) * 0.99,
        "volume": rng.lognormal(8, 1, close.shape),
    }
    return {name: np.where(present, values, np.nan) for name, values in fields.items()}


def whole(panel: Panel) -> Split:
    """All rows of a one-history panel as one range."""
    return Split("test", np.array([[0, panel.num_bars]]))


def make_env(data: LeadLagData | PortfolioData | TradingData, num_envs: int = 1, **kwargs) -> MarketVectorEnv:
    return KINDS[type(data)][0](num_envs, data=data, **kwargs)


def single_env(data: LeadLagData | PortfolioData | TradingData, number: int = 0, **kwargs) -> MarketEnv:
    """What market `number` of a vector env is alone."""
    if isinstance(data, TradingData):
        kwargs |= {"first_market": number}
    return KINDS[type(data)][1](data=data, **kwargs)


def random_actions(env, steps: int, seed: int = 0) -> np.ndarray:
    """(steps, n, ...) actions; masked ones among them, or scores of all sizes."""
    rng = np.random.default_rng(seed)
    if hasattr(env.single_action_space, "n"):
        return rng.integers(0, env.single_action_space.n, (steps, env.num_envs))
    sizes = rng.choice([0.3, 1.0, 3.0, 30.0], (steps, env.num_envs, 1))
    return (rng.standard_normal((steps, *env.action_space.shape)) * sizes).clip(-10, 10).astype(np.float32)


def rollout(env: MarketVectorEnv, actions: np.ndarray, seed: int | None = 0) -> dict[str, np.ndarray]:
    """All that the env says: name -> (steps, n, ...). `seen_obs`, `seen_mask`, `row`: what each action was decided on.

    `final_obs` and `final_mask` are zero where no episode ended. With seed None the env goes on from where it is.
    """
    log = defaultdict(list)
    if seed is not None:
        env.reset(seed=seed)
    obs, mask = env._buffers.obs.copy(), env._buffers.mask.copy()
    for action in actions:
        log["seen_obs"].append(obs)
        log["seen_mask"].append(mask)
        obs, reward, terminated, truncated, infos = env.step(action)
        mask, done = infos.get("action_mask", mask), terminated | truncated
        step = {"obs": obs, "reward": reward, "terminated": terminated, "truncated": truncated, "mask": mask}
        step |= {"record": infos["record"], "row": infos["decided_at"]}
        step |= {name: infos[name] for name in ("lookback", "choice", "symbol") if name in infos}
        step |= {f"component_{name}": values for name, values in infos["components"].items()}
        step["final_obs"] = np.where(done[:, None], infos.get("final_obs", obs), 0)
        step["final_mask"] = np.where(done[:, None], infos.get("final_action_mask", mask), False)
        for name, values in step.items():
            log[name].append(values)
    return {name: np.stack(values) for name, values in log.items()}


def assert_same_bits(found, expected, what: str = ""):
    """Equal shape, type and bits (so that NaN equals NaN, and 0.0 is not -0.0)."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    if found.tobytes() != expected.tobytes():
        where = np.argwhere(~((found == expected) | ((found != found) & (expected != expected))))
        raise AssertionError(f"{what}: {len(where)} entries differ, first at {where[:3].tolist()}")


def assert_same_rollout(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same_bits(found[name], expected[name], name)


SIMULATOR = {"NUMBA_DISABLE_JIT": "1", "NUMBA_ENABLE_CUDASIM": "1", "CUDA_VISIBLE_DEVICES": ""}  # of a GPU, in the environment


def run_python(*args: str, cwd: Path = ROOT, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter with envs/ and tests/ of `cwd` on its path; numba's switches come from `environment` alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTEST_"))}
    path = os.pathsep.join((str(cwd), str(cwd / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])))
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def on_host(values) -> np.ndarray:
    """A copy of an array, or of a tensor on any device."""
    return np.array(values.cpu() if hasattr(values, "cpu") else values)


def kernel_trace(data, target: str, actions: str = "", num_envs: int = 6, steps: int = 90, threads: int = 1):
    """name -> array: everything that an environment's kernels wrote in every step, run on one target.

    target: "serial", "parallel" or "cuda", a GPU or its simulator. Episodes are short, so that there are many autoresets.
    `actions` is LeadLag-v0's.
    """
    if isinstance(data, LeadLagData):
        options = dict(
            actions=actions, max_jump=1, reward_weights={"strength": 0.3, "stability": 0.2, "extremity": 0.1, "jump": 0.05},
            anneal_steps=70, curriculum=(5, 12), curriculum_steps=50, episode_length=17,
        )  # fmt: skip
    elif isinstance(data, PortfolioData):
        options = dict(guard=GUARD, reward_weights=PENALTIES, episode_length=25)
    else:
        options = dict(reward_weights=BURDENS, episode_length=25)
    device = "cuda" if target == "cuda" else "cpu"
    env = make_env(data, num_envs, split=whole(data.panel), num_threads=threads, device=device, **options)
    env.parallel = target == "parallel"
    env.reset(seed=11)
    log = defaultdict(list)
    for row in random_actions(env, steps, seed=5):
        env.step(row if target != "cuda" else env._gpu.tensor(row))
        for name, values in env._buffers._asdict().items():
            if name != "scratch":
                log[name].append(on_host(values))
        log["weights"].append(on_host(env._memory))
        for name in env._state.dtype.names:
            log[f"state_{name}"].append(on_host(getattr(env._state, name)).astype(env._state.dtype[name]))
    return {name: np.stack(values) for name, values in log.items()}


def kernel_trace_in_process(data, path: Path, target: str, actions: str = "", **environment: str) -> dict[str, np.ndarray]:
    """`kernel_trace` in a fresh interpreter, over the same tables."""
    source, out = path / "data.pickle", path / "trace.npz"
    source.write_bytes(pickle.dumps(data))
    code = (
        "import pickle, sys, numpy as np, conftest\n"
        "data = pickle.load(open(sys.argv[1], 'rb'))\n"
        "np.savez(sys.argv[2], **conftest.kernel_trace(data, *sys.argv[3:]))\n"
    )
    done = run_python("-W", "ignore", "-c", code, str(source), str(out), target, actions, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as arrays:
        return dict(arrays)
