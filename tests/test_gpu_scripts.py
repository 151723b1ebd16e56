"""PPO scripts on a GPU, compiled, captured, and over several processes: equal to the plain run on the CPU.

Without a GPU: markets on Numba's simulator, torch.compile on the CPU, and processes that talk over gloo. What needs a GPU is
skipped there: it is to be run on a machine that has one.
"""

import inspect
import shutil

import numpy as np
import pytest
import torch
from conftest import SIMULATOR
from scripts import (
    SCRIPTS,
    Run,
    assert_same_content,
    assert_same_ledger,
    finish,
    quick_for,
    torchrun,
    with_gpu,
)

pytest_plugins = ["scripts"]

SMALLEST = {  # of those that run on a GPU: a market, and more options without compiled kernels
    "ppo_leadlag": (
        "synthetic:leadlag:bars=300:train=1:val=1:test=1:assets=4:leaders=2:followers=2",
        "--num-lookbacks", "3", "--max-lookback", "20",
    ),
    "ppo_portfolio": ("synthetic:ou:bars=300:train=1:val=1:test=1:assets=2",),
    "ppo_recurrent_leadlag": (
        "synthetic:hidden:bars=300:train=1:val=1:test=1:assets=4:leaders=1:followers=1",
        "--num-lookbacks", "3", "--max-lookback", "20", "--hidden", "8",
    ),
    "ppo_transformer_trading": (
        "synthetic:ou:bars=300:train=1:val=1:test=1:assets=2", "--window", "3", "--width", "8",
    ),
    "ppo_quantile_portfolio": ("synthetic:ou:bars=300:train=1:val=1:test=1:assets=2",),
    "ppo_hierarchical_trading": (
        "synthetic:modes:bars=300:train=1:val=1:test=1:assets=1:regime_bars=20", "--stages", "0.25", "0.25", "0.5",
        "--decide-every", "3", "--episode-length", "4",
    ),
    "ppo_allocator_portfolio": (
        "synthetic:ou:bars=300:train=1:val=1:test=1:assets=2",
        "--hidden", "8", "--finetune-fraction", "0.5", "--finetune-rate", "0.01",
    ),
}  # fmt: skip
FEW = ("--num-envs", "4", "--num-steps", "8", "--episode-length", "9", "--total-timesteps", "128", "--num-minibatches", "2")


@pytest.fixture(params=SMALLEST)
def script(request):
    return SCRIPTS[request.param]


def on_any_device(script) -> list[str]:
    """Its short run, on a GPU where there is one."""
    return [option for option in script.short if option != "--no-cuda"]


RECORDED = """
import runpy, sys
from scripts import NothingWaits
sys.argv = sys.argv[1:]
g = runpy.run_path(sys.argv[0], run_name="__main__")
g["update"].__globals__.update(finetuning=False, fixed_shapes=lambda x: True)  # as a script has it when it is recorded
with NothingWaits():
    for name in ("rollout", "estimate_advantages", "update", "normalise"):
        g[name]()
"""


def test_markets_on_a_device_change_nothing(script, tmp_path):
    """The path that a GPU takes, on the simulator: the same weights, markets and last returns, and so the same ledger. Weights
    only to rounding where its update sums in another order. Nothing that --cudagraphs would record waits for a number."""
    (tmp_path / "recorded.py").write_text(RECORDED)
    market, *own = SMALLEST[script.name]
    options = (*script.on(market), *FEW, *own, "--num-threads", "1", "--no-cuda", "--market-device")
    host, device = (
        finish(script, *options, name, runs_dir=tmp_path / name, spy=spy, **SIMULATOR)
        for name, spy in (("cpu", None), ("cuda", tmp_path / "recorded.py"))
    )
    ours, theirs = device.model, host.model
    assert ours["iteration"] == 4 and len(ours["recent_returns"]) >= 12
    np.testing.assert_allclose(ours.pop("recent_returns"), theirs.pop("recent_returns"), rtol=1e-12)
    np.testing.assert_allclose(ours.pop("episode_return"), theirs.pop("episode_return"), rtol=1e-12)
    assert ours["args"].pop("market_device") == "cuda" and theirs["args"].pop("market_device") == "cpu"
    ours["args"].pop("runs_dir"), theirs["args"].pop("runs_dir")
    for part in script.rounded:
        assert_same_content(ours.pop(part), theirs.pop(part), part, rounding=1e-5)
    assert_same_content(ours, theirs)
    assert_same_ledger(device.ledger, host.ledger)


def test_without_a_gpu_its_flags_are_left_out_and_said(script, inside, capsys):
    short = (*script.short, "--total-timesteps", "2048")
    plain = Run(inside(*short)["run_dir"])
    capsys.readouterr()
    asked = Run(inside(*short, "--amp", "--cudagraphs")["run_dir"])
    printed = capsys.readouterr().out
    assert "device  cpu (--no-cuda)" in printed
    assert "--amp: --no-cuda; left out" in printed and "--cudagraphs: --no-cuda; left out" in printed
    assert not asked.json["args"]["amp"] and not asked.json["args"]["cudagraphs"]
    assert_same_content(asked.model["model"], plain.model["model"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["ppo_leadlag"], indirect=True)
def test_no_cuda_device_is_said(script, tmp_path):
    run = finish(script, *on_any_device(script), "--total-timesteps", "1024", "--amp", runs_dir=tmp_path)
    assert "device  cpu (no CUDA device)" in run.done.stdout and "--amp: no CUDA device; left out" in run.done.stdout
    assert run.json["device"] == "cpu"


def test_bad_devices_are_named(script, complaint, monkeypatch):
    assert "--market-device gpu: expected auto, cpu or cuda" in complaint(*script.short, "--market-device", "gpu")
    if not torch.cuda.is_available():
        assert "device='cuda': torch" in complaint(*script.short, "--market-device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = complaint(*script.short, "--market-device", "cuda")
    assert found == "--market-device cuda: expected the networks there too, not --no-cuda"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(script, tmp_path):
    """To rounding, after a few updates; the random numbers are the same."""
    options = (*script.short, "--total-timesteps", "4096")
    eager = finish(script, *options, runs_dir=tmp_path / "eager")
    compiled = finish(script, *options, "--compile", runs_dir=tmp_path / "compiled")
    for name, values in eager.model["model"].items():
        torch.testing.assert_close(compiled.model["model"][name], values, atol=1e-5, rtol=1e-5)


@with_gpu
@pytest.mark.parametrize("options", (("--cudagraphs",), ("--compile", "--cudagraphs")))
def test_captured_equals_eager_bit_for_bit(script, tmp_path, options):
    """Over many resets: episodes are shorter than a rollout."""
    short = (*on_any_device(script), *script.captured, "--episode-length", "9", "--total-timesteps", "20480")
    eager = (option for option in options if option != "--cudagraphs")
    plain = finish(script, *short, *eager, runs_dir=tmp_path / "plain")
    captured = finish(script, *short, *options, runs_dir=tmp_path / "captured")
    assert captured.json["args"]["cudagraphs"]
    assert_same_content(captured.model["model"], plain.model["model"])
    for name in ("state", "memory", "mask"):  # calls of step, which some count besides, are none in a replay
        assert_same_content(captured.model["envs"][name], plain.model["envs"][name])


@with_gpu
@pytest.mark.parametrize("script", ["ppo_leadlag"], indirect=True)
def test_what_depends_on_the_device_is_the_same(script):
    """Numbers and gradients of `pick`, and shares of what `draw` draws."""
    x, index = torch.randn((1000, 7)), torch.randint(7, (1000,))
    results = []
    for device in ("cpu", "cuda"):
        there = x.to(device).requires_grad_()
        found = script.module.pick(there, index.to(device))
        results.append((found, torch.autograd.grad(found.square().sum(), there)[0]))
    assert_same_content(*([part.detach().cpu() for part in result] for result in results))
    p = torch.tensor([0.5, 0.0, 0.3, 0.2], device="cuda").expand(100_000, 4)
    shares = script.module.draw(p).bincount(minlength=4) / len(p)
    assert shares[1] == 0.0 and (shares - p[0]).abs().max() < 0.01


@with_gpu
def test_bfloat16_learns_about_the_same(script, tmp_path):
    short = on_any_device(script)
    plain, amp = finish(script, *short, runs_dir=tmp_path / "plain"), finish(script, *short, "--amp", runs_dir=tmp_path / "amp")
    assert amp.json["args"]["amp"]
    for name, values in plain.model["model"].items():
        torch.testing.assert_close(amp.model["model"][name], values, atol=0.05, rtol=0.1)


# Several processes


TOGETHER = """
import runpy, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
script = runpy.run_path(sys.argv[1])
assert script["processes"]() == 2
assert torch.equal(script["average"](torch.tensor([float(rank), 4.0])), torch.tensor([0.5, 4.0]))
for rows in (torch.tensor([[rank, 7], [8, 9]]), torch.tensor([rank == 0, True]), torch.zeros((2, 0))):
    expected = [rows.clone(), rows.clone()]
    if rows.numel():
        expected[0].view(-1)[0], expected[1].view(-1)[0] = (0, 1) if rows.dtype == torch.int64 else (True, False)
    assert torch.equal(script["gathered"](rows), torch.cat(expected)), rows

numbers = torch.Generator().manual_seed(0)
batches = [3.0 + 2.0 * torch.randn((64, 3), generator=numbers) for _ in range(4)]
norm = script["RunningNorm"](3)
norm.update(batches[rank])
norm.update(batches[2 + rank])
everything = torch.cat(batches).double()
assert abs(norm.count.item() - 256) < 1e-3
torch.testing.assert_close(norm.mean, everything.mean(0), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(norm.var, everything.var(0, correction=0), rtol=1e-3, atol=1e-4)
dist.destroy_process_group()
"""


SHARED = (
    "processes", "average", "gathered", "Captured", "RunningNorm", "layer_init", "FastTanh", "Tanh", "draw", "pick",
    "save_checkpoint",
)  # fmt: skip


def test_what_scripts_share_is_the_same(script):
    """To the letter: a test of one script's is a test of all."""
    known = SCRIPTS["ppo_leadlag"].module
    own = {"RunningNorm"} if script.name == "ppo_allocator_portfolio" else set()  # it counts symbols as one
    lacking = {name for name in SHARED if not hasattr(script.module, name)}
    assert lacking <= {"draw", "pick"}
    for name in set(SHARED) - own - lacking:
        assert inspect.getsource(getattr(script.module, name)) == inspect.getsource(getattr(known, name)), name


@pytest.mark.parametrize("script", ["ppo_leadlag", "ppo_allocator_portfolio"], indirect=True)
def test_what_processes_share(script, tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    done = torchrun(str(tmp_path / "together.py"), str(script.path))
    assert done.returncode == 0, done.stderr[-3000:]


SPY = """
import os, runpy, sys, torch
folder, save, sys.argv = sys.argv[1], torch.save, sys.argv[2:]

def keep(content, path):
    save(content, path)
    if content["iteration"] == 2 and os.environ["RANK"] == "0":
        save(content, f"{folder}/second.pt")

torch.save = keep
g = runpy.run_path(sys.argv[0], run_name="__main__")
optimizers = [value.state_dict() for value in g.values() if isinstance(value, torch.optim.Optimizer)]
found = {"model": g["agent"].state_dict(), "optimizers": optimizers, "actions": g["actions"]}
save(found, f"{folder}/rank{os.environ['RANK']}.pt")
"""


@pytest.fixture(scope="module")
def pairs() -> dict[str, Run]:
    return {}


@pytest.fixture
def pair(script, pairs, tmp_path_factory) -> Run:
    """A run of two processes; the same one in all tests. Beside its folder of runs lie rank0.pt and rank1.pt, of both at the
    end, and second.pt, the checkpoint of its second iteration."""
    if script.name not in pairs:
        home = tmp_path_factory.mktemp(script.name)
        (home / "spy.py").write_text(SPY)
        options = [*script.short, "--total-timesteps", "4096", "--runs-dir", str(home / "two")]
        done = torchrun(str(home / "spy.py"), str(home), str(script.path), *options)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (home / "two").iterdir()  # the others keep nothing
        pairs[script.name] = Run(folder, done)
    return pairs[script.name]


def test_two_processes_learn_one_policy_from_different_actions(pair):
    home = pair.folder.parents[1]
    first, second = (torch.load(home / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert_same_content(first["model"], second["model"])
    assert_same_content(first["optimizers"], second["optimizers"])
    assert all(optimizer["state"] for optimizer in first["optimizers"])
    assert (first["actions"] != second["actions"]).any() and len(pair.ledger)


def test_two_processes_share_the_markets(script, pair, inside):
    saved = pair.model
    assert pair.json["status"] == "finished" and pair.json["processes"] == 2 and pair.json["env_steps"] == 4096
    assert pair.json["args"]["num_envs"] == 64 and saved["obs"].shape[0] == 64
    keys = saved["envs"]["state"].view(64, -1)[:, :8].contiguous().view(torch.int64).flatten()
    first = saved["args"]["seed"] + script.reseeded
    assert keys.tolist() == list(range(first, first + 64))  # as one process would have them
    shares = saved["rng"].view(2, -1)
    assert not torch.equal(shares[0], shares[1])  # each draws its own actions
    assert float(saved["model"]["norm.count"]) == pytest.approx(4096, abs=1e-3)
    assert pair.done.stdout.count("run directory") == 1

    with pytest.raises(SystemExit, match="a run of 2 processes; expected as many, not 1"):
        inside("--resume", str(pair.folder))


@pytest.mark.parametrize("script", ["ppo_transformer_trading"], indirect=True)
def test_two_processes_trade_the_symbols_of_one(script, pair, inside):
    """Market for market, by number: shares of 32 markets, which 3 symbols do not divide."""
    state = inside(*script.short, "--total-timesteps", "1024")["train_envs"].unwrapped._state
    assert set(state.symbol) == {0, 1, 2}
    together = pair.model["envs"]["state"].numpy().view(state.dtype)
    np.testing.assert_array_equal(together["symbol"], state.symbol)


@pytest.mark.parametrize("script", quick_for("ppo_leadlag", "ppo_hierarchical_trading", of=SMALLEST), indirect=True)
def test_a_killed_run_of_two_processes_ends_like_one_that_was_not(script, pair, tmp_path):
    """Killed after its second iteration."""
    folder = tmp_path / pair.folder.name
    folder.mkdir()
    shutil.copy(pair.folder.parents[1] / "second.pt", folder / "model.pt")
    done = torchrun(str(script.path), "--resume", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = Run(folder)
    for part in ("model", "envs", "rng"):
        assert_same_content(resumed.model[part], pair.model[part])
    assert_same_ledger(resumed.ledger, pair.ledger)


def test_markets_that_cannot_be_shared_are_refused(script, complaint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert complaint(*script.short, "--num-envs", "7") == "--num-envs 7: expected a multiple of the 2 processes"
