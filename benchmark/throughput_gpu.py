"""`throughput.py --device cuda`: markets, rollout and training on a GPU: eager, compiled, captured; and the card's limits.

A measurement ends once the GPU is idle. Captured: recorded as a CUDA graph, and replayed without the host.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import compare, run_script, spread, tables, timed
from numba import config

from envs import ledger, references
from envs.device import Gpu
from envs.leadlag import LeadLagVectorEnv
from envs.leadlag_tables import LeadLagData
from envs.portfolio import PortfolioVectorEnv
from envs.portfolio_tables import PortfolioData
from envs.trading import TradingVectorEnv
from envs.trading_tables import TradingData

NUM_ENVS, QUICK = (1024, 16_384, 65_536, 262_144, 1_048_576), (1024, 65_536)
FILLED = 65_536  # markets that should keep a large card busy; with fewer, starting its kernels takes most of the time
NUM_STEPS = 32  # bars per market and rollout
STEPS_IN_A_ROW = 8  # of the markets alone, between two looks at the clock
MARKETS = {  # kind of data -> its vector env, and its market
    LeadLagData: (LeadLagVectorEnv, "LeadLag-v0", "market"),
    PortfolioData: (PortfolioVectorEnv, "Portfolio-v0", "portfolio"),
    TradingData: (TradingVectorEnv, "Trading-v0", "trading"),
}
SCRIPT = Path("algos") / "ppo_leadlag.py"
MODES = {  # of training
    "eager": (),
    "compiled": ("--compile",),
    "captured": ("--cudagraphs",),
    "compiled and captured": ("--compile", "--cudagraphs"),
    "compiled, captured, bfloat16": ("--compile", "--cudagraphs", "--amp"),
}
CAPTURE = ("--num-envs", 16_384, "--num-minibatches", 8, "--eval-every", 5, "--compile", "--cudagraphs")  # and its goal:
CAPTURE_MARKET = "synthetic:leadlag"  # the script's own
CAPTURED_SHARE, CAPTURE_SECONDS, CAPTURE_STEPS = 0.7, 10, 120 * 16_384 * NUM_STEPS
WARMUP = 3  # iterations of a run that compile, capture and warm up
NEWTON = 2  # iterations of the accounting step, as counted on random actions


def card(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "simulated GPU"


def finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(step: Callable[[], object], steps: int, seconds: float) -> Callable[[], float]:
    """As `measuring.timed`, of work that the GPU does after the call."""

    def together():
        for _ in range(STEPS_IN_A_ROW):
            step()
        finish()

    return timed(together, STEPS_IN_A_ROW * steps, seconds)


def captured(step: Callable[[], object]) -> Callable[[], object] | str:
    """`step` as a CUDA graph; why there is none, in the simulator."""
    if not torch.cuda.is_available() or config.ENABLE_CUDASIM:
        return "no graphs without a GPU"
    finish()
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    finish()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=beside):
        step()
    return graph.replay


def wanted(rows: list[dict], name: str, lowest: float):
    """Say in the row of this name whether its value is as high as the project wants."""
    for row in rows:
        if row["name"] == name:
            row["target"] = f">= {lowest:,.0f} {row['unit']}"
            row |= {"met": row["value"] >= lowest} if "value" in row else {}


def make(args, kind, num_envs: int):
    """An env on the device, reset, and a function that draws random actions and steps it once."""
    env_class, _, market = MARKETS[kind]
    env = env_class(num_envs, data=tables(kind, getattr(args, market)), device=args.device)
    obs, _ = env.reset(seed=0)
    discrete, out = hasattr(env.single_action_space, "n"), obs.clone()
    actions = torch.zeros(env.action_space.shape, dtype=torch.int64 if discrete else torch.float32, device=obs.device)

    def step():
        actions.random_(env.single_action_space.n) if discrete else actions.normal_().clamp_(-10.0, 10.0)
        env.step(actions, out=out)

    return env, step


def contest(section: str, args, steppers: dict[str, tuple[Callable, bool]], steps: int) -> list[dict]:
    """Rows of functions that step the markets, and whether they are captured first; what finds no room on the card says so."""
    contestants = {}
    for name, (step, capture) in steppers.items():
        try:
            step = captured(step) if capture else step
            contestants[name] = step if isinstance(step, str) else measured(step, steps, args.seconds)
        except torch.cuda.OutOfMemoryError as error:
            contestants[name] = str(error).split(".")[0]
    return compare(section, contestants, args.repeats)


def measure_env(args) -> list[dict]:
    rows = []
    for kind, (_, label, _) in MARKETS.items():
        for n in args.num_envs:
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            _, step = make(args, kind, n)
            used = (torch.cuda.memory_allocated() - before if torch.cuda.is_available() else 0) / n
            eager, graph = f"{label}, {n} markets, eager", f"{label}, {n} markets, captured"
            found = contest("gpu-env", args, {eager: (step, False), graph: (step, True)}, n)
            for row in found:
                row["bytes_per_market"] = used
            if kind is LeadLagData and n >= 2**20:
                wanted(found, graph, 500e6)
            rows += found
    return rows


def work_of_a_step(env, kind) -> tuple[float, float]:
    """Bytes that one market's step has to move at the least, each once, and float64 operations of its accounting."""
    symbols = env.panel.num_symbols
    moved = 2 * (env._state.raw[0].nbytes + env._memory[0].nbytes)
    moved += sum(x[0].nbytes for name, x in env._buffers._asdict().items() if "final" not in name and name != "scratch")
    moved += env.single_action_space.dtype.itemsize * int(np.prod(env.single_action_space.shape))
    for x in env._market:
        if isinstance(x, np.ndarray):
            moved += x.itemsize * (x.shape[-1] if x.ndim > 1 else 1)  # a row: all symbols of a bar, or a matrix's features
    drift, iteration, settle, mark = 4, 14, 14, 2  # operations for each symbol in costs.account_step
    return moved, symbols * (drift + NEWTON * iteration + settle + mark)


def measure_roofline(args) -> list[dict]:
    """Bytes and operations per second of the markets alone, beside a copy in the card's memory and a float64 product on it."""
    device, size = Gpu(args.device).device, 2**28 if torch.cuda.is_available() else 2**16
    source, side = torch.zeros(size, device=device), 4096 if torch.cuda.is_available() else 64
    target, matrix = torch.zeros_like(source), torch.randn((side, side), dtype=torch.float64, device=device)
    product = torch.zeros_like(matrix)
    limits = {
        "GB/s": ("a copy in the card's memory", lambda: target.copy_(source), 2 * source.nbytes),
        "GFLOP/s": ("a float64 matrix product", lambda: torch.mm(matrix, matrix, out=product), 2 * side**3),
    }
    n, rows, steppers = max(args.num_envs), [], {}
    for kind in (LeadLagData, PortfolioData):
        env, step = make(args, kind, n)
        replay = captured(step)
        steppers[kind] = env, step if isinstance(replay, str) else replay
    for at, (unit, (name, limit, amount)) in enumerate(limits.items()):
        contestants = {name: measured(limit, amount / 1e9, args.seconds)}
        for kind, (env, step) in steppers.items():
            work = work_of_a_step(env, kind)[at]
            contestants[f"{MARKETS[kind][1]}, {n} markets"] = measured(step, n * work / 1e9, args.seconds)
        found = compare("gpu-roofline", contestants, args.repeats, unit=unit)
        for row in found:
            row["name"] += f", {unit}"
        rows += found
    return rows


def measure_rollout(args) -> list[dict]:
    """Policy network, sampling and step of `ppo_leadlag.py`, without its update."""
    rows = []
    for n in args.num_envs:
        env, _ = make(args, LeadLagData, n)
        device = env._gpu.device
        size, number = env.single_observation_space.shape[0], int(env.single_action_space.n)
        actor = torch.nn.Sequential(
            torch.nn.Linear(size, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, number)
        ).to(device)
        obs, infos = env.reset(seed=0)
        mask = infos["action_mask"].clone()

        @torch.no_grad()
        def choose(obs, mask, actor=actor):
            log_probs = torch.where(mask, actor(obs), -1e8).log_softmax(dim=1)
            action = (log_probs.exp() / torch.empty_like(log_probs).exponential_()).argmax(dim=1)
            return action, log_probs.gather(1, action[:, None])

        def step(choose, env=env, obs=obs, mask=mask):
            action, _ = choose(obs, mask)
            mask.copy_(env.step(action, out=obs)[4]["action_mask"])

        plain, compiled = partial(step, choose), partial(step, torch.compile(choose, dynamic=False))
        rows += contest("gpu-rollout", args, {
            f"{n} markets, eager": (plain, False),
            f"{n} markets, compiled": (compiled, False),
            f"{n} markets, captured": (plain, True),
            f"{n} markets, compiled and captured": (compiled, True),
        }, n)  # fmt: skip
    return rows


def training_seconds(scalars) -> list[tuple[int, float]]:
    """(steps, seconds of training until then) of every iteration."""
    return [(step, step / speed) for step, speed in scalars["charts/SPS"]]


def measure_training(args) -> list[dict]:
    """The script as a process; its steps/s without the first iterations, which compile, capture and warm up."""
    rows = []
    for n in args.num_envs:
        sizes = ("--market", args.market, "--num-envs", n, "--total-timesteps", 40 * n * NUM_STEPS, "--eval-every", 1000)
        waits = {}

        def trained(*options, name, sizes=sizes, waits=waits):
            def measure():
                seconds = training_seconds(run_script(SCRIPT, *sizes, *options)[1])
                (first, waited), (last, until) = seconds[WARMUP - 1], seconds[-1]
                waits.setdefault(name, []).append(waited)
                return (last - first) / (until - waited)

            return measure

        names = {f"{n} markets, {mode}": options for mode, options in MODES.items()}
        contestants = {name: trained(*options, name=name) for name, options in names.items()}
        found = compare("gpu-training", contestants, max(1, args.repeats // 5))
        for row in found:
            row["warmup_seconds"] = waits[row["name"]]
            if n >= FILLED:
                wanted([row], row["name"], 10e6)
        rows += found
    return rows


def measure_capture(args) -> list[dict]:
    """Seconds of training, after compilation, until a validation backtest captures CAPTURED_SHARE of the gap to the oracle."""
    data = tables(LeadLagData, CAPTURE_MARKET)
    panel, splits = data.panel, data.panel.split()
    yearly = references.references(data, splits | {"test": splits["val"]}, seed=1)
    yearly = {name: float(ledger.growth(frame).mean() * panel.bars_per_year) for name, frame in yearly.items()}
    seconds = []
    for _ in range(max(1, args.repeats // 5)):
        _, scalars = run_script(SCRIPT, "--market", CAPTURE_MARKET, "--total-timesteps", CAPTURE_STEPS, *CAPTURE)
        spent = training_seconds(scalars)
        shares = [(step, references.capture(growth, yearly)) for step, growth in scalars["eval/val_growth"]]
        reached = [dict(spent)[step] for step, share in shares if share >= CAPTURED_SHARE]
        seconds.append(reached[0] - spent[WARMUP - 1][1] if reached else math.nan)
    row = {"section": "gpu-capture", "name": f"until {CAPTURED_SHARE:.0%} is captured on validation", "unit": "s"}
    row |= {"samples": seconds, **spread("value", seconds)}
    row |= {"target": f"<= {CAPTURE_SECONDS} s", "met": row["value"] <= CAPTURE_SECONDS}
    row |= {"note": "not reached"} if math.isnan(row["value"]) else {}
    print(f"  {row['name']:<44} {row['value']:.3g} s", flush=True)
    return [row]


SECTIONS = {
    "gpu-env": (measure_env, "Markets alone, random actions", "times eager"),
    "gpu-roofline": (measure_roofline, "What a step moves and computes, against what the card can do", "share of the limit"),
    "gpu-rollout": (measure_rollout, "LeadLag-v0, rollout: policy network, sampling, step", "times eager"),
    "gpu-training": (measure_training, f"{SCRIPT}: rollout and update, 64-64 tanh networks", "times eager"),
    "gpu-capture": (measure_capture, "From the first update to a policy that knows the regimes", "ratio"),
}
NOTES = {
    "gpu-env": "throughput_cuda.json has the memory in bytes per market beside every row.",
    "gpu-roofline": "Bytes at the least: what is read or written, each once. Operations: those of the accounting step.",
    "gpu-training": "One process each; steps/s without the iterations that compile, capture and warm up, whose seconds "
    "throughput_cuda.json has beside every row.",
    "gpu-capture": "Seconds of training alone: neither compilation nor the backtests on the CPU that look at the policy.",
}
