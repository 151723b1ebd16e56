"""How many steps per second: the markets alone, the rollout, the training, each beside its peers; and the memory.

Machines are noisy: the same work can take several times as long a second later. So whatever is compared runs interleaved,
A B C A B C ..., and a ratio is the median of the ratios of neighbours, with the smallest and the largest beside it.
Peers are optional: `pip install -e ".[peers]"`; one that is not installed gets a row that says so.
"""

import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import throughput_gpu
import tyro
from measuring import compare, figure, run_script, spread, tables, timed

from envs import ledger
from envs.device import unavailable
from envs.leadlag import LeadLagEnv, LeadLagVectorEnv
from envs.leadlag_tables import LeadLagData
from envs.panel import Split
from envs.portfolio import PortfolioEnv, PortfolioVectorEnv
from envs.portfolio_tables import PortfolioData
from envs.synthetic import load_market

SCRIPTS = {LeadLagData: Path("algos") / "ppo_leadlag.py", PortfolioData: Path("algos") / "ppo_portfolio.py"}
ENVS = {LeadLagData: (LeadLagVectorEnv, LeadLagEnv), PortfolioData: (PortfolioVectorEnv, PortfolioEnv)}
INSTALL = 'not installed: pip install -e ".[peers]"'
PEERS = ("stable-baselines3", "sb3-contrib", "gym-trading-env", "gym-anytrading")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = sorted({1, min(2, CORES), CORES})
# the script's defaults, which stable-baselines3 gets too; (n, steps): markets, bars per market and rollout
NUM_ENVS, NUM_STEPS, MINIBATCHES, EPOCHS = 1024, 32, 4, 1
DIFFMARKET, LOOKBACK, WINDOWS, GROUP = Path("algos") / "grpo_diffmarket.py", 128, 64, 4
SB3_SMALL = (8, 128)
RECURRENT, CARTPOLE_STEPS = Path("algos") / "ppo_recurrent_leadlag.py", 25_600


@dataclass
class Args:
    quick: bool = False
    """fewer sizes and repeats"""
    out: Path = Path("benchmark/results")
    """folder of throughput.json and throughput.md"""
    repeats: int = 0
    """rounds of every interleaved comparison (0: 11, with --quick 3); those that train run a third as many"""
    device: str = "cpu"
    """cuda, or cuda:<number>: markets, rollout and training on that GPU, written to throughput_cuda.json and .md"""
    only: tuple[str, ...] = ()
    """sections to run: memory, env, lookback, rollout, peers, training, portfolio-peers, portfolio-training,
    recurrent, diffmarket; with --device cuda gpu-env, gpu-roofline, gpu-rollout, gpu-training, gpu-capture (all by default)"""
    market: str = "synthetic:leadlag:val=1:test=1"
    """market of the sections on LeadLag-v0 but memory: by default the training histories that the script has by default"""
    portfolio: str = "synthetic:noise:assets=30:val=1:test=1"
    """market of the sections on Portfolio-v0"""
    diffmarket: str = "synthetic:noise:assets=4:val=1:test=1"
    """market of the comparison that trains through the differentiable market"""
    trading: str = "synthetic:ou:val=1:test=1"
    """with --device cuda: market of Trading-v0"""
    num_envs: tuple[int, ...] = ()
    """numbers of markets of the env section (default: 1 16 256 1024 4096 16384; with --quick 1 256 4096), and of those on a GPU
    (1024 16384 65536 262144 1048576; with --quick 1024 65536)"""
    seconds: float = 0.3
    """least duration of one measurement"""
    train_steps: int = 100 * NUM_ENVS * NUM_STEPS
    """steps of one training run of the script"""

    def __post_init__(self):
        self.repeats = self.repeats or (3 if self.quick else 11)
        sizes = ((1, 256, 4096), (1, 16, 256, 1024, 4096, 16384))
        if self.device != "cpu":
            if reason := unavailable(self.device):
                sys.exit(f"--{reason}")
            sizes = throughput_gpu.QUICK, throughput_gpu.NUM_ENVS
        self.num_envs = self.num_envs or sizes[not self.quick]
        unknown = set(self.only) - set(self.sections)
        if unknown:
            sys.exit(f"--only {' '.join(sorted(unknown))}: expected some of {' '.join(self.sections)}")

    @property
    def sections(self):
        """Name -> (measure, title, what its ratio is)."""
        return SECTIONS if self.device == "cpu" else throughput_gpu.SECTIONS


# The markets alone


def stepper(
    data: LeadLagData | PortfolioData, num_envs: int, threads: int, loop: str = "auto", action: int | None = None, split="train"
):
    """A function that steps `num_envs` markets once, with random actions or always `action`, as a script does: `out=`."""
    env = ENVS[type(data)][0](num_envs, data=data, split=split, num_threads=threads)
    if loop != "auto":
        env.parallel = loop == "parallel"
    env.reset(seed=0)
    out = np.zeros(env.observation_space.shape, np.float32)
    env.action_space.seed(0)
    actions = np.stack([env.action_space.sample() for _ in range(64)])
    if action is not None:
        actions[:] = action
    rows = cycle(actions)
    return lambda: env.step(next(rows), out=out)


def measure_env(args, data):
    """Every loop at every number of markets."""
    rows = []
    for n in args.num_envs:
        contestants = {f"{n} markets, serial": stepper(data, n, 1, "serial")}
        for threads in THREADS:
            contestants[f"{n} markets, parallel, {threads} threads"] = stepper(data, n, threads, "parallel")
        rows += compare("env", {k: timed(step, n, args.seconds) for k, step in contestants.items()}, args.repeats)
    return rows


def measure_lookback(args, data):
    """Policies that always choose the same lookback: the ratio is the cost of a step against that of the shortest."""
    n = 1024
    policies = {f"lookback {lookback}": stepper(data, n, 1, action=k) for k, lookback in enumerate(data.lookbacks)}
    contestants = {name: timed(step, n, args.seconds) for name, step in policies.items()}
    targets = [(name, 0, 1.1) for name in list(contestants)[1:]]
    return compare("lookback", contestants, args.repeats, faster_by=True, targets=targets)


def measure_peers(args, data):
    """One process, one market after the other, as these packages are run, beside all our cores and our single env.

    All step over the same bars: the first history of the panel.
    """
    n = 2048
    panel, split = first_history(data.panel)
    one = LeadLagData(panel)
    contestants = {
        f"LeadLag-v0, {n} markets, {t} threads": timed(stepper(one, n, t, split=split), n, args.seconds) for t in THREADS[::-1]
    }
    contestants["LeadLag-v0, single env"] = timed(single(LeadLagEnv(data=one, split=split)), 1, args.seconds)
    bars = bars_of_one_symbol(panel)
    for name, make in (("gym-trading-env, TradingEnv", gym_trading_env), ("gym-anytrading, StocksEnv", gym_anytrading)):
        try:
            contestants[name] = timed(single(make(bars)), 1, args.seconds)
        except ImportError:
            contestants[name] = INSTALL
    return compare("peers", contestants, args.repeats, faster_by=True, targets=[("gym-trading-env, TradingEnv", 100, np.inf)])


def measure_portfolio_peers(args, data):
    """A step decides on all symbols. The peer has one market per symbol: its step is one step of each, rebalancing left out."""
    n = 1024
    panel, split = first_history(data.panel)
    one = PortfolioData(panel)
    symbols = panel.num_symbols
    contestants = {
        f"Portfolio-v0, {symbols} symbols, {n} markets, {t} threads": timed(stepper(one, n, t, split=split), n, args.seconds)
        for t in THREADS[::-1]
    }
    contestants["Portfolio-v0, single env"] = timed(single(PortfolioEnv(data=one, split=split)), 1, args.seconds)
    name = f"gym-trading-env, {symbols} TradingEnvs"
    try:
        each = [single(gym_trading_env(bars_of_one_symbol(panel, i))) for i in range(symbols)]
        contestants[name] = timed(lambda: [step() for step in each], 1, args.seconds)
    except ImportError:
        contestants[name] = INSTALL
    return compare("portfolio-peers", contestants, args.repeats, faster_by=True, targets=[(name, 100, np.inf)])


def first_history(panel):
    """The first price history of a synthetic panel, as a panel of its own, and all of it as a training split."""
    bars = panel.segments[1]
    fields = {name: values[:bars].copy() for name, values in panel.fields.items()}
    times = panel.timestamps[:bars].copy()
    cut = dataclasses.replace(
        panel, **fields, timestamps=times, segments=panel.segments[:1], segment_split=("train",), hidden={}, parameters={}
    )
    return cut, Split("train", np.array([[0, bars]]))


def bars_of_one_symbol(panel, symbol: int = 0) -> pd.DataFrame:
    bars = pd.DataFrame({f: values[:, symbol] for f, values in panel.fields.items()}, pd.DatetimeIndex(panel.timestamps))
    bars["feature_return"] = bars["close"].pct_change()
    for field in ("open", "high", "low"):
        bars[f"feature_{field}"] = bars[field] / bars["close"]
    return bars.dropna()


def gym_trading_env(bars) -> gym.Env:
    with warnings.catch_warnings():  # importing it turns every later warning of this process into an error
        from gym_trading_env.environments import TradingEnv
    return TradingEnv(bars, positions=[-1, 0, 1], trading_fees=1e-4, borrow_interest_rate=1e-6, verbose=0)


def gym_anytrading(bars) -> gym.Env:
    from gym_anytrading.envs import StocksEnv

    return StocksEnv(bars.rename(columns=str.capitalize), window_size=10, frame_bound=(10, len(bars)))


def single(env: gym.Env):
    """A function that steps a Gymnasium env once with a random action, and resets it where an episode ends."""
    env.action_space.seed(0)
    actions = cycle([env.action_space.sample() for _ in range(4096)])
    env.reset(seed=0)

    def step():
        _, _, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return step


# Rollout and training


def measure_rollout(args, data):
    """The script's rollout without its update: forward pass of the actor, sampling, step; 64-64 tanh."""
    import torch  # not at the top: a process that only steps markets does without

    n = NUM_ENVS
    actor = torch.nn.Sequential(
        torch.nn.Linear(data.observation_size, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(),
        torch.nn.Linear(64, len(data.lookbacks)),
    )  # fmt: skip

    def rollout(threads):
        env = LeadLagVectorEnv(n, data=data, num_threads=threads)
        obs = torch.zeros((NUM_STEPS + 1, n, data.observation_size))
        first, infos = env.reset(seed=0)
        obs[0], mask = torch.as_tensor(first), torch.as_tensor(infos["action_mask"])

        @torch.no_grad()
        def iterate():
            torch.set_num_threads(threads)
            for t in range(NUM_STEPS):
                log_probs = torch.where(mask, actor(obs[t]), -1e8).log_softmax(dim=1)
                action = (log_probs - torch.empty_like(log_probs).exponential_().log_()).argmax(dim=1)
                log_probs.gather(1, action[:, None])
                _, _, _, _, infos = env.step(action.numpy(), out=obs[t + 1].numpy())
                mask.copy_(torch.from_numpy(infos["action_mask"]))
            obs[0] = obs[-1]

        return iterate

    contestants = {f"rollout, {t} threads": timed(rollout(t), n * NUM_STEPS, args.seconds) for t in THREADS}
    return compare("rollout", contestants, args.repeats)


def measure_training(args, data):
    """The script as a process beside stable-baselines3's PPO, which learns in this one, on the same tables."""
    path, market = SCRIPTS[type(data)], data.panel.name
    contestants = {f"{path}, {t} threads": script(args, path, market, t) for t in THREADS[::-1]}
    small = "SB3 PPO, DummyVecEnv {} x {} steps".format(*SB3_SMALL)
    same = f"SB3 PPO, DummyVecEnv {NUM_ENVS} x {NUM_STEPS} steps"
    vector = f"SB3 PPO, our vector env {NUM_ENVS} x {NUM_STEPS} steps"
    try:
        import torch
        from stable_baselines3.common.env_util import make_vec_env  # a DummyVecEnv of Monitors, as its users make it

        torch.set_num_threads(CORES)
        for name, (n, num_steps) in ((small, SB3_SMALL), (same, (NUM_ENVS, NUM_STEPS))):
            contestants[name] = sb3(args, make_vec_env(lambda: ENVS[type(data)][1](data=data), n), num_steps)
        contestants[vector] = sb3(args, one_vector_env(data), NUM_STEPS)
    except ImportError:
        contestants |= dict.fromkeys((small, same, vector), INSTALL)
    targets = [(small, 20, np.inf), (same, 20, np.inf)]
    section = "training" if type(data) is LeadLagData else "portfolio-training"
    return compare(section, contestants, max(1, args.repeats // 3), faster_by=True, targets=targets)


def measure_recurrent(args, data):
    """The script as a process beside sb3-contrib's RecurrentPPO in this one: CartPole-v1 without velocities, and the market."""
    cartpole = ["--env-id", "CartPole-v1", "--observed", 0, 2, "--target-kl", None]  # all epochs, as the other one runs them
    rows, repeats = [], max(1, args.repeats // 3)
    for task, sizes, options, steps in (
        ("CartPole-v1 without velocities", (8, 32, 1, 10), cartpole, CARTPOLE_STEPS),
        ("LeadLag-v0", (256, 128, MINIBATCHES, EPOCHS), [], args.train_steps),
    ):
        for flag, size in zip(("--num-envs", "--num-steps", "--num-minibatches", "--update-epochs"), sizes):
            options = [*options, flag, size]
        contestants = {f"{RECURRENT}, {task}": script(args, RECURRENT, data.panel.name, 1, *options, steps=steps)}
        dummy, vector = (f"RecurrentPPO, {task}, {envs}" for envs in ("DummyVecEnv", "our vector env"))
        try:
            contestants |= {dummy: recurrent_sb3(args, recurrent_envs(data, task, sizes[0]), *sizes)}
            if task == "LeadLag-v0":
                contestants |= {vector: recurrent_sb3(args, one_vector_env(data, sizes[0]), *sizes)}
        except ImportError:
            contestants |= {dummy: INSTALL}
        rows += compare("recurrent", contestants, repeats, faster_by=True, targets=[(dummy, 5, np.inf)])
    return rows


def recurrent_envs(data, task, n):
    """A DummyVecEnv of Monitors, as its users make it."""
    from stable_baselines3.common.env_util import make_vec_env

    def cartpole():
        env = gym.make("CartPole-v1")
        return gym.wrappers.TransformObservation(env, lambda x: x[[0, 2]], gym.spaces.Box(-np.inf, np.inf, (2,), np.float32))

    return make_vec_env((lambda: ENVS[type(data)][1](data=data)) if task == "LeadLag-v0" else cartpole, n)


def recurrent_sb3(args, env, n, num_steps, minibatches, epochs):
    """With the script's networks: one LSTM of 64 units for both, then 64-64; one call learns from one batch."""
    import torch
    from sb3_contrib import RecurrentPPO

    torch.set_num_threads(1)
    policy = dict(lstm_hidden_size=64, shared_lstm=True, enable_critic_lstm=False, net_arch={"pi": [64, 64], "vf": [64, 64]})
    model = RecurrentPPO(
        "MlpLstmPolicy", env, n_steps=num_steps, batch_size=n * num_steps // minibatches, n_epochs=epochs, gamma=0.98,
        gae_lambda=0.8, learning_rate=1e-3, policy_kwargs=policy, device="cpu", seed=0,
    )  # fmt: skip
    return timed(lambda: model.learn(n * num_steps, reset_num_timesteps=False), n * num_steps, args.seconds)


def script(args, path, market, threads, *options, steps=None):
    command = ["--market", market, "--no-cuda", *options, "--num-threads", threads]
    return lambda: run_script(path, *command, "--total-timesteps", steps or args.train_steps)[0]["sps"]


def one_vector_env(data, num_envs=NUM_ENVS):
    """Its best case: all markets in one call, behind the thinnest VecEnv that keeps the API."""
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        def __init__(self):
            self.env = ENVS[type(data)][0](num_envs, data=data)
            super().__init__(num_envs, self.env.single_observation_space, self.env.single_action_space)

        def reset(self):
            return self.env.reset(seed=0)[0]

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            obs, reward, terminated, truncated, found = self.env.step(self.actions)
            infos, done = [{} for _ in range(self.num_envs)], terminated | truncated
            for i in np.flatnonzero(done):
                infos[i] = {"terminal_observation": found["final_obs"][i], "TimeLimit.truncated": bool(truncated[i])}
            return obs, reward, done, infos

        def get_attr(self, name, indices=None):
            return [getattr(self.env, name, None)] * self.num_envs

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

        close = set_attr = env_method = lambda self, *args, **kwargs: None

    return Adapter()


def sb3(args, env, num_steps):
    """PPO with the script's networks, epochs and minibatches; one call learns from one batch."""
    from stable_baselines3 import PPO

    batch = env.num_envs * num_steps
    model = PPO(
        "MlpPolicy", env, n_steps=num_steps, batch_size=batch // MINIBATCHES, n_epochs=EPOCHS, gamma=0.5, gae_lambda=0.9,
        learning_rate=1e-3, ent_coef=0.001, policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}}, device="cpu", seed=0,
    )  # fmt: skip
    return timed(lambda: model.learn(batch, reset_num_timesteps=False), batch, args.seconds)


def measure_diffmarket(args, data):
    """The script as a process beside the loop that a reader of its formulas would write, with both encoders."""
    rows, repeats = [], max(1, args.repeats // 3)
    sizes = ["--lookback", LOOKBACK, "--num-windows", WINDOWS, "--group-size", GROUP]
    for encoder in ("gru", "mlp"):
        name, naive = f"{DIFFMARKET}, {encoder}, {CORES} threads", f"a network call and a step per bar, {encoder}"
        measure = script(args, DIFFMARKET, data.panel.name, CORES, *sizes, "--encoder", encoder)
        contestants = {name: measure, naive: eager(data, encoder, args.seconds)}
        rows += compare("diffmarket", contestants, repeats, True, [(naive, 10, np.inf)])
    return rows


def eager(data, encoder: str, seconds: float):
    """Pathwise gradients bar by bar: at each, every rollout's last bars are gathered and encoded anew; then one step of the
    same market. Windows of 16 bars: the graph of 64 does not fit into 8 GB."""
    import torch
    from torch import nn

    from envs.diffmarket import DiffMarket

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    symbols, horizon, hidden = data.panel.num_symbols, 16, 64
    market = DiffMarket(data.execution, data.costs)
    features = data.assets.reshape(data.panel.num_bars, symbols, -1)
    features = torch.tensor(np.concatenate([features, np.repeat(data.context[:, None], symbols, axis=1)], axis=2))
    size = features.shape[2]
    read = nn.GRU(size, hidden, batch_first=True) if encoder == "gru" else nn.Linear(LOOKBACK * size, hidden)
    head = nn.Sequential(nn.Linear(hidden + 1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    optimizer = torch.optim.Adam([*read.parameters(), *head.parameters()])

    def learn():
        starts = torch.randint(LOOKBACK, data.panel.segments[1] - horizon, (WINDOWS, 1))
        account, total = market.account(WINDOWS, GROUP), 0.0
        for t in range(horizon):
            last = features[starts + t + torch.arange(1 - LOOKBACK, 1)].transpose(1, 2)  # (windows, symbols, bars, features)
            last = last.unsqueeze(1).expand(-1, GROUP, -1, -1, -1).flatten(0, 2)
            x = read(last)[1][0] if encoder == "gru" else read(last.flatten(1))
            x = torch.cat([x.tanh().view(WINDOWS, GROUP, symbols, hidden), account.weights.unsqueeze(-1)], dim=-1)
            scores = head(x).squeeze(-1)
            target = (scores + 0.1 * torch.randn_like(scores)).softmax(-1)
            after = market.step(account, target, starts + t)
            account, total = after.account, total - after.growth.log().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return timed(learn, WINDOWS * GROUP * horizon, seconds)


# Memory


def measure_memory(args, data):
    """Peak memory of a fresh process that steps 4,096 markets 100 times over 143 symbols x 3,700 bars."""
    for _ in range(2):  # the first may compile, which takes memory of its own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peak = process.submit(peak_megabytes).result()
    print(f"  {peak:,.0f} MB", flush=True)
    return [{
        "section": "memory", "name": "4096 markets over 143 symbols x 3,700 bars, whole process", "unit": "MB",
        **spread("value", [peak]), "target": "< 1,000", "met": peak < 1000,
    }]  # fmt: skip


def peak_megabytes() -> float:
    panel, split = first_history(load_market("synthetic:noise:assets=143:bars=3700:train=1:val=1:test=1"))
    step = stepper(LeadLagData(panel), 4096, CORES, split=split)
    for _ in range(100):
        step()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's ru_maxrss goes back to before exec: it would count the parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# Report

SECTIONS = {
    "memory": (measure_memory, "Peak memory", "ratio"),
    "env": (measure_env, "LeadLag-v0 alone, random actions", "times the serial loop"),
    "lookback": (measure_lookback, "Always the same lookback, 1024 markets, 1 thread", "cost against the shortest"),
    "rollout": (measure_rollout, f"Rollout: policy network, sampling, step; {NUM_ENVS} markets", "times 1 thread"),
    "peers": (measure_peers, "Markets alone, beside other packages", "the first row is faster by"),
    "training": (measure_training, "Training: rollout and update, 64-64 tanh networks", "the first row is faster by"),
    "portfolio-peers": (measure_portfolio_peers, "Portfolio-v0 alone, beside another package", "the first row is faster by"),
    "portfolio-training": (measure_training, "Training on Portfolio-v0, 64-64 tanh networks", "the first row is faster by"),
    "recurrent": (measure_recurrent, "Training with a memory: an LSTM of 64 units, 1 thread", "the script is faster by"),
    "diffmarket": (
        measure_diffmarket, f"Training through the differentiable market, lookback {LOOKBACK}, {WINDOWS} windows x {GROUP}",
        "the script is faster by",
    ),
}  # fmt: skip
NOTES = {
    "env": "`LeadLagVectorEnv.step(actions, out=...)`; obs, reward, masks, accounts and autoreset included.",
    "peers": "gym-trading-env: one symbol, four features, positions -1, 0, 1; gym-anytrading: a window of 10 bars; the whole "
    "history is one episode. All of them, LeadLag-v0 with its ten symbols too, step over the same bars. Both run unchanged; "
    "importing gym_trading_env makes every later warning an error: undone here.",
    "portfolio-peers": "A step decides on all symbols at once; gym-trading-env has one market per symbol, stepped one after "
    "the other, without the rebalancing between them.",
    "diffmarket": "Pathwise gradients. Prices do not depend on orders, so the script reads a window once for all of its "
    "rollouts; the loop reads the last bars again at each bar, for each rollout, as an environment's observation would.",
    "recurrent": "CartPole-v1 with rl-zoo's sizes, 10 epochs. RecurrentPPO has the script's networks and learns in this "
    "process, after a warm-up; on the market without action masks. The script runs as a process; its steps/s "
    "leave out start-up, validation backtests and the final report.",
    "training": f"SB3 has the script's networks, {EPOCHS} epochs and {MINIBATCHES} minibatches per epoch, after a warm-up, on "
    "the same tables, without action masks (a masked action keeps the lookback). The script runs as a process; its steps/s "
    "leave out start-up, validation backtests and the final report.",
}  # fmt: skip


def machine(device: str = "cpu") -> dict[str, object]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    card = f", {throughput_gpu.card(device)}" if device != "cpu" else ""
    facts = ledger.provenance(__file__, f"{model}, {CORES} cores{card}")
    versions = facts.pop("packages") | dict.fromkeys(PEERS, "not installed")
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"date": time.strftime("%Y-%m-%d", time.gmtime())} | facts | versions | {"load_at_start": os.getloadavg()[0]}


def markdown(facts, rows, sections) -> str:
    notes = NOTES | throughput_gpu.NOTES
    lines = ["# Throughput", "", "Median [smallest, largest]; ratios pair by pair of interleaved runs.", ""]
    lines += ["| machine | |", "|-|-|", *(f"| {name} | {value} |" for name, value in facts.items())]
    for section, (_, title, ratio) in sections.items():
        found = [row for row in rows if row["section"] == section]
        if found:
            unit = found[0].get("unit", "steps/s")
            lines += ["", f"## {title}", "", *([notes[section], ""] if section in notes else [])]
            lines += [f"| | {unit} | {ratio} | target | met |", "|-|-:|-:|-:|-|"]
            for row in found:
                met = {True: "yes", False: "no"}.get(row.get("met"), "")
                value = row.get("note") or figure(row, "value")
                lines.append(f"| {row['name']} | {value} | {figure(row, 'ratio')} | {row.get('target', '')} | {met} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> list[dict]:
    facts, rows = machine(args.device), []
    name = "throughput" if args.device == "cpu" else "throughput_cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    for section, (measure, title, _) in args.sections.items():
        if section in (args.only or args.sections):
            print(title, flush=True)
            if args.device != "cpu":
                rows += measure(args)
            else:
                kind, market = (PortfolioData, args.portfolio) if "portfolio" in section else (LeadLagData, args.market)
                kind, market = (PortfolioData, args.diffmarket) if section == "diffmarket" else (kind, market)
                rows += measure(args, tables(kind, market) if section != "memory" else None)
            facts["load_at_end"] = os.getloadavg()[0]
            arguments = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
            content = {"machine": facts, "arguments": arguments, "rows": rows}
            ledger.write_json(args.out / f"{name}.json", content)
            (args.out / f"{name}.md").write_text(markdown(facts, rows, args.sections))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
