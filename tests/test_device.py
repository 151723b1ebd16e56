"""Markets on a GPU, and on Numba's simulator of one: the same numbers as on the CPU, as tensors, and clear refusals.

What needs a device runs where there is a GPU, and everywhere in a process of its own under the simulator, whose results are
the CPU's bits. That the kernels compile to machine code can be checked without a GPU too, where numba-cuda and NVVM are.
"""

import importlib.util
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SIMULATOR, TINY, make_env, on_host, ragged_panel, random_actions, run_python, whole
from numba import config

from envs import device
from envs.leadlag import LeadLagEnv
from envs.leadlag_tables import LeadLagData
from envs.portfolio_tables import PortfolioData
from envs.synthetic import load_market
from envs.trading_tables import TradingData

SIMULATED = bool(config.ENABLE_CUDASIM)
on_device = pytest.mark.skipif(device.unavailable("cuda") is not None, reason="no GPU, and no simulator of one")
without_gpu = pytest.mark.skipif(device.unavailable("cuda") is None, reason="there is a GPU")
ULPS = 16  # of a fraction of equity, whose unit is the account


@pytest.fixture(scope="module")
def ragged():
    return ragged_panel(0)


def test_all_of_this_holds_under_the_simulator():
    if device.unavailable("cuda") is None:
        return  # this process runs them
    found = run_python(
        "-m", "pytest", "-n", "0", "-W", "ignore", str(ROOT / "tests" / "test_device.py"),
        **SIMULATOR, timeout=600,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 17  # none of those that need a device was skipped


def data_of(kind, panel):
    return LeadLagData(panel, TINY) if kind is LeadLagData else kind(panel)


def assert_close(found, expected, what):
    """Integers and flags exactly, floats within ULPS of the larger of their size and 1; bit for bit in the simulator."""
    found, expected = on_host(found), on_host(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    if SIMULATED or found.dtype.kind != "f":
        assert found.tobytes() == expected.tobytes(), what
    else:
        unit = np.spacing(np.maximum(1.0, np.maximum(abs(found), abs(expected)))).astype(np.float64)
        assert (abs(found.astype(np.float64) - expected) <= ULPS * unit).all(), what


def assert_same_infos(found, expected):
    for name, values in expected.items():
        if isinstance(values, dict):
            assert_same_infos(found[name], values)
        elif "final" not in name:
            assert_close(found[name], values, name)


@on_device
@pytest.mark.parametrize("kind", (LeadLagData, PortfolioData, TradingData))
def test_every_step_is_that_of_the_cpu(ragged, kind):
    """Step by step from the same state, so that nothing can drift apart; across resets, with and without `out`."""
    data = data_of(kind, ragged)
    envs = [make_env(data, 6, split=whole(ragged), episode_length=17, device=name) for name in ("cpu", "cuda")]
    (obs, infos), (device_obs, device_infos) = (env.reset(seed=3) for env in envs)
    assert_close(device_obs, obs, "obs")
    assert_same_infos(device_infos, infos)
    space = envs[0].observation_space
    outs = np.zeros(space.shape, np.float32), envs[1]._gpu.zeros(space.shape, np.float32)
    ends = 0
    for step, actions in enumerate(random_actions(envs[0], 60)):
        envs[1].set_state(envs[0].get_state())
        given = outs if step % 2 else (None, None)
        expected = envs[0].step(actions, out=given[0])
        found = envs[1].step(envs[1]._gpu.tensor(actions), out=given[1])
        for name, values, wanted in zip(("obs", "reward", "terminated", "truncated"), found, expected):
            assert isinstance(values, torch.Tensor) and values.device == envs[1]._gpu.device
            assert_close(values, wanted, name)
        assert_same_infos(found[4], expected[4])
        done = expected[2] | expected[3]
        if done.any():
            ends += done.sum()
            assert_close(on_host(found[4]["final_obs"])[done], expected[4]["final_obs"][done], "final_obs")
        assert_close(found[4]["_final_obs"], done, "_final_obs")
        if given[1] is not None:
            assert found[0] is given[1]
    assert ends >= 12


@on_device
@pytest.mark.parametrize("kind", (LeadLagData, PortfolioData, TradingData))
def test_a_state_goes_from_the_device_to_the_host_and_back(ragged, kind):
    data = data_of(kind, ragged)
    there, here, again = (make_env(data, 4, split=whole(ragged), device=name) for name in ("cuda", "cpu", "cuda"))
    there.reset(seed=1)
    actions = random_actions(there, 8)
    for row in actions[:4]:
        there.step(there._gpu.tensor(row))
    saved = there.get_state()
    assert all(isinstance(values, np.ndarray) for values in saved.values())
    here.set_state(saved)
    again.set_state(saved)
    for row in actions[4:]:
        tensor = there._gpu.tensor(row)
        after, copied = there.step(tensor), again.step(tensor)
        assert all(torch.equal(x, y) for x, y in zip(after[:4], copied[:4]))
        assert_close(after[0], here.step(row)[0], "obs")
    assert here.get_state().keys() == there.get_state().keys()


@on_device
def test_what_is_returned_belongs_to_the_caller_unless_out_is_given(ragged):
    env = make_env(data_of(PortfolioData, ragged), 3, split=whole(ragged), device="cuda")
    obs, _ = env.reset(seed=0)
    kept, actions = obs.clone(), env._gpu.tensor(random_actions(env, 1)[0])
    after, reward, *_, infos = env.step(actions)
    kept_after, kept_reward, kept_record = after.clone(), reward.clone(), infos["record"].clone()
    env.step(actions)
    for now, before in ((obs, kept), (after, kept_after), (reward, kept_reward), (infos["record"], kept_record)):
        assert torch.equal(now, before)


@on_device
def test_tasks_and_drawn_parameters():
    panel = load_market("synthetic:ou:vol=0.1|0.3:train=3:val=1:test=1:bars=300", 0)
    data = PortfolioData(panel)
    envs = [make_env(data, 5, device=name) for name in ("cpu", "cuda")]
    tasks = np.array([2, 0, 1, 1, -1])
    infos = [env.reset(seed=4, options={"tasks": tasks})[1] for env in envs]
    assert_close(infos[1]["range"], infos[0]["range"], "range")
    assert on_host(infos[1]["range"])[:4].tolist() == tasks[:4].tolist()
    assert infos[0]["parameters"]
    assert_same_infos(infos[1], infos[0])


@on_device
def test_targets_of_orders(ragged):
    envs = [make_env(TradingData(ragged), 6, split=whole(ragged), device=name) for name in ("cpu", "cuda")]
    for env in envs:
        env.reset(seed=2)
    for row in random_actions(envs[0], 10):
        tensor = envs[1]._gpu.tensor(row)
        assert_close(envs[1].targets(tensor), envs[0].targets(row), "targets")
        envs[0].step(row)
        envs[1].step(tensor)


@on_device
def test_parameters_that_move_between_steps_reach_the_kernel(ragged):
    moving = dict(reward_weights={"jump": 0.5}, anneal_steps=10, curriculum=(5, 12), curriculum_steps=10)
    envs = [make_env(data_of(LeadLagData, ragged), 6, split=whole(ragged), device=d, **moving) for d in ("cpu", "cuda")]
    for env in envs:
        env.reset(seed=2)
    for row in random_actions(envs[0], 14):
        expected, found = envs[0].step(row), envs[1].step(envs[1]._gpu.tensor(row))
        assert_close(found[1], expected[1], "reward")
        assert_close(found[4]["action_mask"], expected[4]["action_mask"], "mask")


@on_device
@pytest.mark.parametrize(
    "spoil, message",
    (
        (lambda a: a[:-1], "actions: .*expected a tensor of"),
        (lambda a: a.to(torch.int32), "actions: .*expected a tensor of"),
        (lambda a: a.cpu().numpy(), "actions: .*expected a tensor of"),
    ),
)
def test_wrong_tensors_are_refused(ragged, spoil, message):
    env = make_env(data_of(LeadLagData, ragged), 4, split=whole(ragged), device="cuda")
    env.reset(seed=0)
    actions = env._gpu.tensor(random_actions(env, 1)[0])
    with pytest.raises(ValueError, match=message):
        env.step(spoil(actions))
    with pytest.raises(ValueError, match="out: .*expected C-contiguous"):
        env.step(actions, out=env._buffers.obs.double())
    with pytest.raises(gym.error.ResetNeeded):
        make_env(data_of(LeadLagData, ragged), 4, split=whole(ragged), device="cuda").step(actions)


@on_device
@pytest.mark.skipif(not SIMULATED, reason="a failed assertion ends the use of a GPU")
@pytest.mark.parametrize("kind, value", ((LeadLagData, 99), (LeadLagData, -1), (PortfolioData, np.nan)))
def test_values_outside_the_space_fail_an_assertion(ragged, kind, value):
    env = make_env(data_of(kind, ragged), 4, split=whole(ragged), device="cuda")
    env.reset(seed=0)
    actions = env._gpu.tensor(random_actions(env, 1)[0])
    actions[2] = value
    with pytest.raises(RuntimeError, match="actions: expected"):
        env.step(actions)


@on_device
def test_a_state_of_another_number_of_markets_is_refused(ragged):
    small, large = (make_env(PortfolioData(ragged), n, split=whole(ragged), device="cuda") for n in (2, 3))
    small.reset(seed=0)
    with pytest.raises(ValueError, match="state: .* bytes: expected .* of 3 markets"):
        large.set_state(small.get_state())


@without_gpu
def test_no_gpu_is_said(ragged):
    with pytest.raises(ValueError, match="device='cuda': torch .* finds 0 CUDA devices; expected cpu"):
        make_env(PortfolioData(ragged), 2, split=whole(ragged), device="cuda")


@pytest.mark.parametrize("name", ("tpu", "cuda:x", "mps"))
def test_other_devices_are_refused(ragged, name):
    with pytest.raises(ValueError, match=f"device='{name}': expected cpu, cuda or cuda:<number>"):
        make_env(PortfolioData(ragged), 2, split=whole(ragged), device=name)


def test_a_single_market_is_of_the_cpu(ragged):
    with pytest.raises(ValueError, match="device='cuda': expected cpu for a single market"):
        LeadLagEnv(data=data_of(LeadLagData, ragged), split=whole(ragged), device="cuda")


COMPILE = """
import types
import numba
import numpy as np
import conftest
from numba import cuda, typeof
from numba.cuda import dispatcher
from envs import leadlag, portfolio, trading
from envs.device import scalars_dtype

dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(9, 0))  # what a kernel is compiled for
panel = conftest.ragged_panel(0)
for module, data in (
    (leadlag, conftest.LeadLagData(panel, conftest.TINY)),
    (portfolio, conftest.PortfolioData(panel)),
    (trading, conftest.TradingData(panel)),
):
    env = conftest.make_env(data, 4, split=conftest.whole(panel))
    actions = env._check_actions(conftest.random_actions(env, 1)[0])
    scalars = np.zeros(1, scalars_dtype(env._parameters()))
    held = env._market, scalars, np.zeros(4, env._state.dtype), env._memory
    assert module.step_cuda._cache.cache_path.startswith(numba.config.CACHE_DIR)  # which changes with the sources
    for kernel, args in ((module.reset_cuda, (*held, env._buffers)), (module.step_cuda, (*held, actions, env._buffers))):
        ptx, _ = cuda.compile_ptx(kernel.py_func, tuple(map(typeof, args)), cc=(9, 0))
        assert ".entry" in ptx
        print(kernel.py_func.__name__)
held += (env._buffers.mask, actions, np.zeros(4))
cuda.compile_ptx(trading.targets_cuda.py_func, tuple(map(typeof, held[1:])), cc=(9, 0))
"""


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_kernels_compile_for_a_gpu():
    done = run_python("-W", "ignore", "-c", COMPILE)
    if "DynamicLibNotFoundError" in done.stderr:
        pytest.skip("NVVM is not installed: " + done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("cuda") == 6
