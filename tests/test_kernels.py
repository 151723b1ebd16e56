"""One step, four targets: serial, parallel, pure Python and CUDA (simulated) write the same bits; and the disk cache works.

LeadLag-v0 by kind of action, Portfolio-v0 by kind of constraints, Trading-v0 by fill rule.
"""

import shutil

import numpy as np
import pytest
from conftest import (
    ACTIONS,
    CONSTRAINTS,
    FILLS,
    ROOT,
    SIMULATOR,
    assert_same_bits,
    kernel_trace,
    kernel_trace_in_process,
    make_env,
    random_actions,
    run_python,
)

from envs.portfolio_tables import PortfolioData
from envs.trading_tables import TradingData

PURE_PYTHON = {"NUMBA_DISABLE_JIT": "1"}

COMPILE = """
import dataclasses, sys
import conftest
from numba.core.dispatcher import Dispatcher
panel = conftest.ragged_panel(0)
for data in (conftest.LeadLagData(panel, conftest.TINY), conftest.PortfolioData(panel), conftest.TradingData(panel)):
    for number in (1, 16):
        env = conftest.make_env(data, number, split=conftest.whole(panel))
        env.reset(seed=0)
        env.step(conftest.random_actions(env, 1)[0])
found = {id(f): f for name, m in list(sys.modules.items()) if name.startswith("envs") for f in vars(m).values()
         if isinstance(f, Dispatcher)}.values()
print(sum(sum(f.stats.cache_misses.values()) for f in found), sum(sum(f.stats.cache_hits.values()) for f in found))
"""


def assert_same_trace(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same_bits(found[name], expected[name], name)


@pytest.fixture(scope="module")
def serial(ragged_data):
    return {actions: kernel_trace(ragged_data, "serial", actions) for actions in ACTIONS}


@pytest.fixture(scope="module")
def pure_python(ragged_data, tmp_path_factory):
    return {
        actions: kernel_trace_in_process(ragged_data, tmp_path_factory.mktemp(actions), "serial", actions, **PURE_PYTHON)
        for actions in ("absolute", "hybrid")
    }


def test_traces_hold_many_episodes_and_every_kind_of_money(serial):
    for trace in serial.values():
        assert trace["truncated"].sum() >= 24
        assert np.abs(trace["weights"]).sum() > 10 and len(np.unique(trace["state_lookback"])) == 3
        assert (trace["components"] != 0).any(axis=(0, 1)).all()


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("actions", ACTIONS)
def test_parallel_equals_serial(ragged_data, serial, actions, threads):
    assert_same_trace(kernel_trace(ragged_data, "parallel", actions, threads=threads), serial[actions])


@pytest.mark.parametrize("actions", ("absolute", "hybrid"))
def test_pure_python_equals_compiled(serial, pure_python, actions):
    assert_same_trace(pure_python[actions], serial[actions])


def test_simulated_cuda_equals_pure_python(ragged_data, pure_python, tmp_path):
    """The kernels launched on the env's own arrays, over more threads than markets. They are loops around the same functions:
    one setting of each environment will do."""
    found = kernel_trace_in_process(ragged_data, tmp_path, "cuda", "absolute", **SIMULATOR)
    assert_same_trace(found, pure_python["absolute"])


PORTFOLIOS = ("groups and leverage", "long/short", "changes, long")  # every branch of the kernels, uncompiled


@pytest.fixture(scope="module")
def portfolios_serial(portfolios):
    return {name: kernel_trace(portfolios[name], "serial") for name in CONSTRAINTS}


@pytest.fixture(scope="module")
def portfolios_pure_python(portfolios, tmp_path_factory):
    return {
        name: kernel_trace_in_process(portfolios[name], tmp_path_factory.mktemp("pure"), "serial", **PURE_PYTHON)
        for name in PORTFOLIOS
    }


def test_portfolio_traces_hold_many_episodes_and_every_guard(portfolios_serial):
    for trace in portfolios_serial.values():
        assert trace["truncated"].sum() >= 18 and np.abs(trace["choice"]).sum() > 10
        assert (trace["components"][..., :6] != 0).any(axis=(0, 1)).all()
        assert (trace["components"][..., 6:].mean(axis=(0, 1)) > 0.01).all()


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_portfolio_parallel_equals_serial(portfolios, portfolios_serial, name, threads):
    assert_same_trace(kernel_trace(portfolios[name], "parallel", threads=threads), portfolios_serial[name])


@pytest.mark.parametrize("name", PORTFOLIOS)
def test_portfolio_pure_python_equals_compiled(portfolios_serial, portfolios_pure_python, name):
    assert_same_trace(portfolios_pure_python[name], portfolios_serial[name])


def test_portfolio_simulated_cuda_equals_pure_python(portfolios, portfolios_pure_python, tmp_path):
    name = PORTFOLIOS[0]
    assert_same_trace(kernel_trace_in_process(portfolios[name], tmp_path, "cuda", **SIMULATOR), portfolios_pure_python[name])


@pytest.fixture(scope="module")
def tradings_serial(tradings):
    return {fill: kernel_trace(tradings[fill], "serial", steps=400) for fill in FILLS}


@pytest.fixture(scope="module")
def tradings_pure_python(tradings, tmp_path_factory):
    return {
        fill: kernel_trace_in_process(tradings[fill], tmp_path_factory.mktemp(fill), "serial", **PURE_PYTHON) for fill in FILLS
    }


def test_trading_traces_hold_many_episodes_and_every_exit(tradings_serial):
    for trace in tradings_serial.values():
        assert trace["truncated"].sum() >= 60 and (trace["components"][..., :7] != 0).any(axis=(0, 1)).all()
        assert set(np.unique(trace["choice"])) == set(range(7)) == set(np.unique(trace["components"][..., 7]))


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("fill", FILLS)
def test_trading_parallel_equals_serial(tradings, tradings_serial, fill, threads):
    assert_same_trace(kernel_trace(tradings[fill], "parallel", steps=400, threads=threads), tradings_serial[fill])


@pytest.mark.parametrize("fill", FILLS)
def test_trading_pure_python_equals_compiled(tradings_serial, tradings_pure_python, fill):
    steps = len(tradings_pure_python[fill]["obs"])
    assert_same_trace(tradings_pure_python[fill], {name: x[:steps] for name, x in tradings_serial[fill].items()})


def test_trading_simulated_cuda_equals_pure_python(tradings, tradings_pure_python, tmp_path):
    fill = FILLS[0]
    assert_same_trace(kernel_trace_in_process(tradings[fill], tmp_path, "cuda", **SIMULATOR), tradings_pure_python[fill])


@pytest.mark.parametrize("kind", ("leadlag", "portfolio", "trading"))
def test_a_market_does_not_depend_on_how_many_others_run(small_data, small_panel, kind):
    data = {"leadlag": small_data, "portfolio": PortfolioData(small_panel), "trading": TradingData(small_panel)}[kind]
    few, many = (make_env(data, n, episode_length=20) for n in (3, 40))
    assert not few.parallel and many.parallel
    chosen = random_actions(many, 60)
    few.reset(seed=9), many.reset(seed=9)
    for actions in chosen:
        found, expected = few.step(actions[:3]), many.step(actions)
        for a, b in zip(found[:4], expected[:4]):
            assert_same_bits(a, b[:3])
        assert_same_bits(found[4]["record"], expected[4]["record"][:3], "record")


def test_the_second_process_compiles_nothing():
    """The first may, or may not: what it needs may have been compiled by any test before."""
    for done in [run_python("-c", COMPILE) for _ in range(2)]:
        assert done.returncode == 0, done.stderr[-4000:]
    misses, hits = map(int, done.stdout.split())
    assert misses == 0 and hits > 5


def test_editing_any_source_changes_the_cache_folder(tmp_path):
    """Numba's own index would not notice that a function called from another file has changed."""
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))

    def folder():
        done = run_python(
            "-c", "import envs, numba; print(numba.config.CACHE_DIR)", cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path)
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    before = folder()
    assert before == folder() and before.startswith(str(tmp_path))
    source = tmp_path / "envs" / "costs.py"
    source.write_text(source.read_text() + "\n# edited\n")
    assert folder() != before
