"""Helpers and fixtures for the tests of the scripts in algos/: run one, and look at what it leaves and at its variables.

A new script becomes part of tests/test_scripts.py by its entry in SCRIPTS. Tests of one script alone set `script` in
their own module, and have `base`, `inside` and `complaint` for it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_same_bits, run_python
from torch.utils._python_dispatch import TorchDispatchMode

from envs.costs import Costs, load_costs
from envs.features import ASSET_FEATURES
from envs.ledger import LEDGER
from envs.portfolio import GUARDS
from envs.portfolio_tables import PORTFOLIO, PortfolioConfig

ITERATIONS = 20  # of 1024 steps each, in the short runs
COMMON = (
    "--total-timesteps", "20480", "--eval-every", "5", "--checkpoint-every", "2", "--num-threads", "1", "--no-cuda",
)  # fmt: skip
UNLIKE = {
    "args",
    "train_seconds",
    "wall_clock",
    "sps",
    "git_commit",
    "latency_ms",
}  # in run.json, between two runs of the same seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """A script, the short run that its tests share, and what in a run is its own."""

    name: str
    env_id: str
    market: str  # with 2 histories to train, 1 to validate and 2 to test
    sizes: tuple[str, ...]  # options that make an iteration 1024 steps
    own: tuple[str, ...]  # more options of the short run
    given: dict  # what `sizes` and `own` make of arguments, by group where they are grouped
    score: str  # what validation maximises
    others: tuple[str, ...]  # whom the table compares the agent with
    costs: str  # of the short run
    make_agent: Callable  # module, checkpoint -> an agent of the right size
    losses: tuple[str, ...]  # tags in TensorBoard
    kept: tuple[str, ...]  # what a checkpoint holds besides what all hold
    numbers: tuple[str, ...] = ()  # in run.json besides what all have
    columns: tuple[str, ...] = LEDGER
    scored: float = 0.75  # share of each history that is in the ledger, at least
    unexplained: tuple[str, ...] = ()  # flags that --help only lists
    suppressed: tuple[str, ...] = ()  # arguments without a flag
    logs: bool = True  # offline data of its market
    idles: bool = True  # with all weights zero
    agents: str = ""  # script whose run it takes for its market; none: --market says it
    policy: Callable = lambda g: g["agent_policy"]  # the variables of a run -> its policy for backtests of the test split
    run: str = "online_run"  # fixture of its short run

    @property
    def path(self) -> Path:
        return ROOT / "algos" / f"{self.name}.py"

    @property
    def budget(self) -> list[str]:
        return [*self.sizes, *COMMON]

    def on(self, market: str) -> list[str]:
        """Options that choose a market."""
        return ["--agents", str(agents_run(self.agents, market))] if self.agents else ["--market", market]

    @property
    def short(self) -> list[str]:
        return [*self.on(self.market), *self.own, *self.budget]

    @functools.cached_property
    def module(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(self.name, self.path)
        sys.modules[self.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @functools.cached_property
    def loaded_costs(self) -> Costs:
        return load_costs(self.costs)


def squared_error(g) -> float:
    """The value loss of the last minibatch, of the variables of a run: half the mean squared error."""
    target = g["returns"].flatten()[g["index"]].double().numpy()
    return 0.5 * float(np.square(g["new_value"].detach().double().numpy() - target).mean())


def pinball(quantiles: np.ndarray, targets: np.ndarray) -> float:
    """Quantile regression loss of (n, N) quantiles on (n, M) targets, all pairs: sum over quantiles, mean over the rest."""
    levels = (np.arange(quantiles.shape[1]) + 0.5) / quantiles.shape[1]
    delta = targets[:, None, :] - quantiles[:, :, None]  # (batch, current, target)
    return float((np.abs(levels[:, None] - (delta < 0)) * np.abs(delta)).mean(axis=2).sum(axis=1).mean())


def quantile_error(g) -> float:
    """The same of a quantile critic."""
    targets = g["targets"].flatten(0, 1)[g["index"]]
    return pinball(g["new_quantiles"].detach().double().numpy(), targets.double().numpy())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOScript(Script):
    """With what the tests of PPO's arithmetic need to know."""

    make_envs: Callable = None  # the variables of a run -> its training environments, anew
    twist: tuple[str, ...] = ()  # options that make it hard to keep old and new log-probabilities equal
    classic: tuple[str, float, float] = ()  # a Gymnasium id; bounds on the return of nearly no training
    refused: tuple[str, str] = ()  # a Gymnasium id with actions of the wrong kind; what it expected
    toy: gym.spaces.Space = None  # actions of the Toy below
    toy_options: tuple[str, ...] = ()
    value_loss: Callable = squared_error  # the variables of a run -> the value loss of its last minibatch, by its definition
    features: Callable = lambda agent, x, memory: (x, memory)  # what actor and critic see of observations x (n, D); and the
    blank: Callable = lambda agent, n: torch.zeros((0, n))  # memory (parts, n, ...) after them, of none at the start
    actor_input: str = "x"  # variable that holds them for a rollout
    most_minibatches: int = 1024  # of the short run
    rounded: tuple[str, ...] = ()  # parts of a checkpoint that markets on a GPU leave the same only to rounding
    reseeded: int = 0  # iteration of the short run, at 4 iterations in all, at which it last makes its markets anew
    captured: tuple[str, ...] = ()  # options that let --cudagraphs record the short run
    plain: tuple[str, ...] = ()  # options that make it the PPO whose arithmetic the tests know, and what of its agent has
    view: Callable = lambda agent: agent  # norm, actor, value(features), log_probs(features, mask), act_greedily(obs, mask)
    sizes: tuple[str, ...] = ("--num-envs", "64", "--num-steps", "16")
    losses: tuple[str, ...] = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
    kept: tuple[str, ...] = ("envs", "obs")
    numbers: tuple[str, ...] = ("last_100_returns",)


def transformer_agent(module, saved):
    """From a checkpoint; from other sizes a small one that takes the whole observation for a single bar."""
    size, actions = saved["obs"].shape[1], saved["mask"].shape[1]
    if "model" not in saved:
        return module.Agent(size, actions, slice(0, size), 1, layers=1, width=8, heads=2)
    args, (width, features) = saved["args"], saved["model"]["embed.weight"].shape
    bars = len(saved["model"]["positions"])
    return module.Agent(size, actions, slice(0, bars * features), bars, args["layers"], width, args["heads"])


def allocator_agent(module, saved):
    """From a checkpoint of a market of 3 symbols, or of another environment."""
    size, hidden = saved["obs"].shape[1], saved["args"]["hidden"]
    if saved["args"]["env_id"] != "Portfolio-v0":
        return module.Agent(size, 1, len(saved["model"]["log_std"]), [slice(0, size)], None, None, hidden, 0.0)
    each, drift = len(ASSET_FEATURES) + len(module.SERIES), size - len(PORTFOLIO) - 3
    own = [slice(0, 3 * each), slice(drift - 3, drift), slice(drift, drift + 3)]
    return module.Agent(size, 3, 1, own, each - 1, each - 2, hidden, 0.0)


def grpo_agent(module, saved):
    args = module.Args(**{**saved["args"], "portfolio": PortfolioConfig(**saved["args"]["portfolio"])})
    return module.Agent(args, len(saved["model"]["symbol"]), len(saved["model"]["mean"]))


def pearl_agent(module, saved):
    args = module.Args(**{**saved["args"], "portfolio": PortfolioConfig(**saved["args"]["portfolio"])})
    obs_size, actions = len(saved["model"]["norm.mean"]), len(saved["model"]["reach"])
    return module.Agent(obs_size, actions, args.episodes * args.episode_length, args)


def maml_agent(module, saved):
    size, actions = saved["model"]["weights.weight0"].shape[0], saved["model"]["weights.weight2"].shape[1]
    return module.Agent(size, actions, "weights.log_std" in saved["model"], saved["args"]["hidden"], 0.0)


def sole_specialist(agent):
    """What an agent of a single specialist is to the tests of PPO."""

    def first(x):
        return torch.zeros(len(x), dtype=torch.int64)

    return SimpleNamespace(
        norm=agent.norm, actor=agent.specialists[0],
        value=lambda x: agent.value(x, first(x)),
        log_probs=lambda x, mask: agent.log_probs(x, mask, first(x)),
        act_greedily=lambda obs, mask: agent.act_greedily(agent.norm(obs), mask, first(obs)),
    )  # fmt: skip


SCRIPTS = {
    script.name: script
    for script in (
        Script(
            name="grpo_diffmarket",
            env_id="Portfolio-v0",
            market="synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2",
            sizes=("--num-windows", "16", "--group-size", "4", "--horizon", "16"),
            own=(
                "--gross", "2", "--asset-cap", "0.8", "--hidden", "16", "--estimator", "mix", "--microbatches", "2",
                "--kl-coef", "0.01", "--stress-share", "0.25", "--stress-histories", "4", "--kill-drawdown", "0.05",
            ),
            given={
                "portfolio": {"gross": 2.0, "asset_cap": 0.8, "orders": "change"}, "num_windows": 16, "horizon": 16,
                "stress_share": 0.25,
            },
            score="utility",
            others=("equal weight", "closed form"),
            costs="zero:quadratic_impact_bps=75",
            make_agent=grpo_agent,
            losses=("utility", "grad_norm", "approx_kl", "clipfrac", "pathwise_share", "log_std"),
            kept=("reference", "variances"),
            columns=(*LEDGER[:-1], *GUARDS, "action"),
            unexplained=("costs",),
            policy=lambda g: g["kernel_policy"]("test"),
        ),
        Script(
            name="maml_leadlag",
            env_id="LeadLag-v0",
            market="synthetic:hidden:bars=400:train=2:val=1:test=2:news=0:regime_bars=1e9",
            sizes=("--tasks-per-batch", "4", "--episodes-per-task", "8", "--num-steps", "16"),
            own=("--max-lookback", "60", "--num-lookbacks", "5", "--hidden", "16"),
            given={"leadlag": {"max_lookback": 60, "num_lookbacks": 5}, "tasks_per_batch": 4, "num_steps": 16, "hidden": 16},
            score="growth",
            others=(
                "unadapted", *(f"lookback {k}" for k in (5, 9, 17, 32, 60)), "best in training", "random", "equal weight",
                "oracle regime", "oracle returns",
            ),
            costs="institutional",
            make_agent=maml_agent,
            losses=("policy_loss", "inner_kl", "approx_kl", "clipfrac"),
            kept=("recent_returns",),
            numbers=("last_100_returns",),
            unexplained=("costs", "num_lookbacks", "min_lookback", "max_lookback", "topk"),
            logs=False,
            idles=False,
        ),
        PPOScript(
            name="ppo_leadlag",
            env_id="LeadLag-v0",
            market="synthetic:leadlag:bars=400:train=2:val=1:test=2",
            own=("--max-lookback", "60", "--num-lookbacks", "5"),
            given={"leadlag": {"max_lookback": 60, "num_lookbacks": 5}, "num_envs": 64, "num_steps": 16},
            score="growth",
            others=(
                *(f"lookback {k}" for k in (5, 9, 17, 32, 60)), "best in training", "random", "equal weight",
                "oracle regime", "oracle returns",
            ),
            costs="institutional",
            make_envs=lambda g: g["make_envs"](g["args"], g["data"], g["splits"], 1),
            make_agent=lambda module, saved: module.Agent(saved["obs"].shape[1], saved["mask"].shape[1]),
            twist=("--actions", "hybrid", "--max-jump", "1", "--curriculum", "9", "40"),
            classic=("CartPole-v1", 9, 200),
            refused=("Pendulum-v1", "discrete"),
            toy=gym.spaces.Discrete(3),
            unexplained=("costs", "num_lookbacks", "min_lookback", "max_lookback", "topk"),
        ),
        PPOScript(
            name="ppo_recurrent_leadlag",
            env_id="LeadLag-v0",
            market="synthetic:hidden:bars=400:train=2:val=1:test=2",
            own=("--max-lookback", "60", "--num-lookbacks", "5", "--hidden", "16", "--episode-length", "40"),
            given={"leadlag": {"max_lookback": 60, "num_lookbacks": 5}, "num_envs": 64, "num_steps": 16, "hidden": 16},
            score="growth",
            others=(
                *(f"lookback {k}" for k in (5, 9, 17, 32, 60)), "best in training", "random", "equal weight",
                "oracle regime", "oracle returns",
            ),
            costs="institutional",
            make_envs=lambda g: g["make_envs"](g["args"], g["data"], g["splits"], 1),
            make_agent=lambda module, saved: module.Agent(
                saved["obs"].shape[1], saved["mask"].shape[1], saved["args"]["memory"], saved["args"]["hidden"]
            ),
            twist=("--actions", "hybrid", "--max-jump", "1", "--curriculum", "9", "40"),
            classic=("CartPole-v1", 9, 200),
            refused=("Pendulum-v1", "discrete"),
            toy=gym.spaces.Discrete(3),
            kept=("envs", "obs", "mask", "state"),
            features=lambda agent, x, memory: (lambda out: (out[0][0], out[1]))(agent.remember(x[None], memory)),
            blank=lambda agent, n: agent.blank(n),
            actor_input="features",
            policy=lambda g: g["make_policy"]("test"),
            most_minibatches=64,
            rounded=("model", "optimizer", "state", "best_score", "best_model"),
            unexplained=("costs", "num_lookbacks", "min_lookback", "max_lookback", "topk"),
        ),
        Script(
            name="rl2_leadlag",
            env_id="LeadLag-v0",
            market="synthetic:hidden:news=0:bars=400:train=2:val=1:test=2",
            sizes=("--num-envs", "64", "--episodes", "2", "--episode-length", "8"),
            own=("--max-lookback", "60", "--num-lookbacks", "5", "--hidden", "16", "--eval-episodes", "3"),
            given={
                "leadlag": {"max_lookback": 60, "num_lookbacks": 5}, "num_envs": 64, "episodes": 2, "episode_length": 8,
                "hidden": 16,
            },
            score="growth",
            others=(
                *(f"lookback {k}" for k in (5, 9, 17, 32, 60)), "best in training", "random", "equal weight",
                "oracle regime", "oracle returns",
            ),
            costs="institutional",
            make_agent=lambda module, saved: module.Agent(
                len(saved["model"]["norm.mean"]), len(saved["model"]["actor.4.bias"]), saved["args"]["memory"],
                saved["args"]["hidden"],
            ),
            losses=("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"),
            kept=(),
            scored=0.49,  # the second half; memories adapt on the first
            idles=False,  # its actions are drawn
            unexplained=("costs", "num_lookbacks", "min_lookback", "max_lookback", "topk"),
            logs=False,
        ),
        Script(
            name="pearl_portfolio",
            env_id="Portfolio-v0",
            market="synthetic:merton:drift=-0.003|0.003:vol=0.03:bars=300:train=2:val=1:test=2",
            sizes=("--num-envs", "2", "--episodes", "2", "--episode-length", "128"),
            own=("--gradient-steps", "8", "--meta-batch", "3", "--batch-size", "16", "--hidden", "16", "--buffer-size", "600"),
            given={
                "portfolio": {"constraints": "long_short", "gross": 2.0}, "num_envs": 2, "num_tasks": 2, "episode_length": 128,
                "buffer_size": 600, "gamma": 0.0,
            },
            score="utility",
            others=("unadapted", "equal weight", "closed form"),
            costs="zero",
            make_agent=pearl_agent,
            losses=("actor_loss", "critic_loss", "kl", "alpha_loss", "alpha", "entropy", "q"),
            kept=("target", "buffers"),
            numbers=("last_100_returns",),
            columns=(*LEDGER[:-1], *GUARDS, "action", "parameter_drift"),
            unexplained=("costs",),
            logs=False,
        ),
        PPOScript(
            name="ppo_transformer_trading",
            env_id="Trading-v0",
            market="synthetic:ou:bars=400:train=2:val=1:test=2:assets=3",
            own=("--window", "4", "--width", "8"),
            given={"trading": {"window": 4, "costs": "institutional"}, "num_envs": 64, "num_steps": 16, "width": 8},
            score="growth",
            others=("flat", "buy and hold", "threshold at 0", "optimal band"),
            costs="institutional",
            make_envs=lambda g: g["make_envs"](g["args"], g["splits"], g["env_options"]),
            make_agent=transformer_agent,
            features=lambda agent, x, memory: (agent.encode(x), memory),
            actor_input="features",
            twist=("--max-adds", "1"),
            classic=("CartPole-v1", 9, 200),
            refused=("Pendulum-v1", "discrete"),
            toy=gym.spaces.Discrete(3),
            numbers=("last_100_returns", "optimum_share", "parameters"),
            unexplained=("costs",),
            logs=False,
        ),
        PPOScript(
            name="ppo_hierarchical_trading",
            env_id="Trading-v0",
            market="synthetic:modes:bars=300:train=2:val=1:test=2:assets=2:regime_bars=40",
            own=("--decide-every", "3", "--learning-rate", "0.01"),
            given={"trading": {"window": 1, "costs": "institutional"}, "num_envs": 64, "num_steps": 16, "decide_every": 3},
            score="growth",
            others=("trend alone", "revert alone", "event alone", "oracle gate", "flat", "buy and hold"),
            costs="institutional",
            make_envs=lambda g: g["make_envs"](g["args"], g["splits"], g["env_options"], g["phase"]),
            make_agent=lambda module, saved: module.Agent(
                saved["obs"].shape[1],
                saved["model"]["allowed"] if "model" in saved else torch.ones((1, saved["mask"].shape[1]), dtype=torch.bool),
                0.1,
            ),
            plain=("--specialists", "flat"),
            view=sole_specialist,
            reseeded=3,
            twist=("--max-adds", "1"),
            classic=("CartPole-v1", 9, 200),
            refused=("Pendulum-v1", "discrete"),
            toy=gym.spaces.Discrete(3),
            losses=(
                "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "gate_policy_loss",
                "gate_value_loss", "gate_entropy", "gate_spread",
            ),
            kept=("envs", "obs", "mask", "memory", "phase"),
            policy=lambda g: g["make_policy"]([]),
            logs=False,
            unexplained=("costs",),
        ),
        PPOScript(
            name="ppo_allocator_portfolio",
            env_id="Portfolio-v0",
            market="synthetic:ou:bars=400:train=2:val=1:test=2:assets=3",
            agents="ppo_transformer_trading",
            own=("--hidden", "8", "--guard-turnover", "0.3", "--finetune-fraction", "0.2", "--finetune-rate", "0.001"),
            given={
                "portfolio": {"costs": "institutional", "fill": "auto", "scale": 1.0, "constraints": "long_only"},
                "guard": {"guard_turnover": 0.3}, "num_envs": 64, "num_steps": 16, "hidden": 8,
            },
            score="utility",
            others=("equal budgets, rebalanced", "equal budgets", "equal weight", "without guard"),
            costs="institutional",
            make_envs=lambda g: g["make_envs"](g["args"], g["splits"], g["env_options"]),
            make_agent=allocator_agent,
            features=lambda agent, x, memory: (agent.encode(x), memory),
            captured=("--finetune-fraction", "0"),
            twist=("--log-std", "1"),
            classic=("Pendulum-v1", -2000, -700),
            refused=("CartPole-v1", "continuous"),
            toy=gym.spaces.Box(-1, 1, (2,), np.float32),
            toy_options=("--log-std", "0.5"),
            kept=("envs", "obs", "agents", "best_agents", "tuner"),
            columns=(*LEDGER[:-1], *GUARDS, "action"),
            suppressed=("costs", "fill", "constraints", "orders", "scale", "cash", "leverage", "net"),
            logs=False,
            idles=False,
        ),
        PPOScript(
            name="ppo_portfolio",
            env_id="Portfolio-v0",
            market="synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2",
            own=("--gross", "2", "--asset-cap", "0.8", "--guard-turnover", "0.06", "--guard-drawdown", "0.05"),
            given={
                "portfolio": {"gross": 2.0, "asset_cap": 0.8, "orders": "change"},
                "guard": {"guard_turnover": 0.06, "guard_drawdown": 0.05, "guard_return": None},
                "num_envs": 64, "num_steps": 16,
            },
            score="utility",
            others=("equal weight", "closed form", "without guard"),
            costs="zero:quadratic_impact_bps=75",
            make_envs=lambda g: g["make_envs"](g["args"], g["splits"], g["env_options"]),
            make_agent=lambda module, saved: module.Agent(saved["obs"].shape[1], len(saved["model"]["log_std"]), 0.0),
            twist=("--log-std", "1"),
            classic=("Pendulum-v1", -2000, -700),
            refused=("CartPole-v1", "continuous"),
            toy=gym.spaces.Box(-1, 1, (2,), np.float32),
            toy_options=("--log-std", "0.5"),
            columns=(*LEDGER[:-1], *GUARDS, "action"),
            unexplained=("costs",),
        ),
        PPOScript(
            name="ppo_quantile_portfolio",
            env_id="Portfolio-v0",
            market="synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2",
            own=("--gross", "2", "--asset-cap", "0.8", "--guard-turnover", "0.06", "--num-quantiles", "8"),
            given={
                "portfolio": {"gross": 2.0, "asset_cap": 0.8, "orders": "change"}, "guard": {"guard_turnover": 0.06},
                "num_envs": 64, "num_steps": 16, "num_quantiles": 8, "cvar_alpha": 1.0,
            },
            score="utility",
            others=("equal weight", "closed form", "without guard"),
            costs="zero:quadratic_impact_bps=75",
            make_envs=lambda g: g["make_envs"](g["args"], g["splits"], g["env_options"]),
            make_agent=lambda module, saved: module.Agent(
                len(saved["model"]["norm.mean"]), len(saved["model"]["log_std"]), 0.0, len(saved["model"]["critic.4.bias"])
            ),
            value_loss=quantile_error,
            twist=("--log-std", "1"),
            classic=("Pendulum-v1", -2000, -700),
            refused=("CartPole-v1", "continuous"),
            toy=gym.spaces.Box(-1, 1, (2,), np.float32),
            toy_options=("--log-std", "0.5"),
            kept=("envs", "obs", "account"),
            columns=(*LEDGER[:-1], *GUARDS, "action"),
            unexplained=("costs",),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass
class Run:
    """A finished run and what it left."""

    folder: Path
    done: subprocess.CompletedProcess | None = None

    def __post_init__(self):
        self.json = json.loads((self.folder / "run.json").read_text())

    @property
    def model(self):
        return torch.load(self.folder / "model.pt", map_location="cpu", weights_only=True)

    @property
    def ledger(self):
        return pd.read_parquet(self.folder / "ledger.parquet")


def finish(script: Script, *options, runs_dir: Path, spy: Path | None = None, **environment: str) -> Run:
    """Run the script in a process of its own, or a spy that runs it and looks at what it leaves."""
    start = [str(path) for path in (spy, script.path) if path]
    done = run_python(*start, *options, "--runs-dir", str(runs_dir), timeout=600, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = runs_dir.iterdir()
    return Run(folder, done)


def torchrun(*command: str) -> subprocess.CompletedProcess:
    """Two processes on this machine."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run_python(*start, *command, OMP_NUM_THREADS="1")


@functools.cache
def agents_run(name: str, market: str) -> Path:
    """Run directory of a script's short run on a market, made when first asked for and kept as long as this process."""
    folder = tempfile.TemporaryDirectory()
    KEPT.append(folder)
    script = SCRIPTS[name]
    return finish(script, *script.on(market), *script.own, *script.budget, runs_dir=Path(folder.name)).folder


KEPT = []  # folders that are deleted at the end
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def quick_for(*names: str, of: Iterable[str]) -> list:
    """Parameters of a test of scripts, which is slow for all but those named."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]


class NothingWaits(TorchDispatchMode):
    """Fails at what no CUDA graph records: a number for the host, a shape that depends on numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(at is None or at.dtype != torch.bool for at in args[1]), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


def features_of(script: PPOScript, agent, x: torch.Tensor, starts: np.ndarray) -> torch.Tensor:
    """What actor and critic see of the observations x (N, D) of episodes that begin at `starts`, which ends with N."""
    out = []
    for start, stop in zip(starts, starts[1:]):
        memory = script.blank(agent, 1)
        for row in x[start:stop]:
            features, memory = script.features(agent, row[None], memory)
            out.append(features)
    return torch.cat(out)


def assert_same_content(found, expected, where="model.pt", rounding=0.0):
    """Nested dicts, lists and tensors, bit for bit, or floats and tensors to `rounding`; not the seconds spent, nor the folder
    of the run that was resumed."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected.keys() - {"train_seconds", "resume", "runs_dir"}:
            assert_same_content(found[key], expected[key], f"{where}: {key}", rounding)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for n, (a, b) in enumerate(zip(found, expected)):
            assert_same_content(a, b, f"{where}: {n}", rounding)
    elif rounding and isinstance(expected, (float, torch.Tensor)):
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, torch.Tensor):
        assert_same_bits(found.numpy(), expected.numpy(), where)
    else:
        assert found == expected, where


def assert_same_ledger(found: pd.DataFrame, expected: pd.DataFrame):
    """Bit for bit; pandas compares columns of arrays only approximately."""
    assert_same_bits(actions_of(found), actions_of(expected), "action")
    pd.testing.assert_frame_equal(found.drop(columns="action"), expected.drop(columns="action"), check_exact=True)


def assert_same_run(found: Run, expected: Run):
    assert_same_content(found.model, expected.model)
    assert_same_ledger(found.ledger, expected.ledger)
    assert found.json.keys() == expected.json.keys()
    for key in expected.json.keys() - UNLIKE:
        assert found.json[key] == expected.json[key], key


def actions_of(frame: pd.DataFrame) -> np.ndarray:
    """(rows, ...) actions of a ledger."""
    return np.stack(frame["action"])


def prices(bars=220, symbols=6, seed=0) -> pd.DataFrame:
    """Random walks by day, wide."""
    steps = 0.02 * np.random.default_rng(seed).standard_normal((bars, symbols))
    days = pd.bdate_range("2020-01-01", periods=bars, name="date")
    return pd.DataFrame(50 * np.exp(steps.cumsum(axis=0)), days, [f"C{i}" for i in range(symbols)])


def candles(seed=1) -> pd.DataFrame:
    """The same with open, high, low and volume, a row per bar and symbol."""
    close = prices(seed=seed).stack().rename("close").reset_index().rename(columns={"level_1": "symbol", "date": "timestamp"})
    bars = close.assign(open=close["close"] * np.random.default_rng(seed + 1).uniform(0.99, 1.01, len(close)))
    bars["high"], bars["low"] = bars[["open", "close"]].max(axis=1) * 1.01, bars[["open", "close"]].min(axis=1) * 0.99
    return bars.assign(volume=1e6)


class Toy(gym.Env):
    """Walks a few steps; every second episode is truncated, the others terminate. Refuses actions that are not of its space."""

    observation_space = gym.spaces.Box(-9, 9, (3,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space
        self.episodes = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.t = self.episodes + 1, 0
        return self._observe(0.0), {}

    def _observe(self, action):
        return np.array([self.t, self.episodes % 4, action - 1], np.float32) / 3

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self.t += 1
        over = self.t == 3 + self.episodes % 3
        cut = bool(self.episodes % 2)
        size = float(np.sum(action))
        return self._observe(size), size - 0.3 * self.t, over and not cut, over and cut, {}


class Bandit(gym.Env):
    """One state; episodes of 50 steps. The reward is the action, or, if continuous, minus its squared distance from 0.5."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.5, -0.5], np.float32), {}

    def step(self, action):
        self.t += 1
        discrete = isinstance(self.action_space, gym.spaces.Discrete)
        reward = float(action) if discrete else -float(np.square(action - 0.5).sum())
        return np.array([0.5, -0.5], np.float32), reward, False, self.t == 50, {}


@pytest.fixture
def register(monkeypatch):
    """Register an environment for the length of a test; returns the options for a script to run on it."""

    def call(env_class, action_space):
        name = f"{env_class.__name__}-v0"
        spec = gym.envs.registration.EnvSpec(name, entry_point=env_class, kwargs={"action_space": action_space})
        monkeypatch.setitem(gym.registry, name, spec)
        return ["--env-id", name]

    return call


@pytest.fixture(scope="session")
def short_runs(tmp_path_factory):
    """name of a script -> its short run, made when first asked for."""
    return functools.cache(lambda name: finish(SCRIPTS[name], *SCRIPTS[name].short, runs_dir=tmp_path_factory.mktemp(name)))


@pytest.fixture
def online_run(script, short_runs) -> Run:
    return short_runs(script.name)


@pytest.fixture
def base(request, script) -> Run:
    """The short run of `script`."""
    return request.getfixturevalue(script.run)


@contextlib.contextmanager
def running(script: Script, runs_dir: Path):
    """What runs the script in this process with some options, and returns its variables."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def call(*options, num_threads=1):
        fixed = ["--num-threads", str(num_threads), "--no-cuda", "--runs-dir", str(runs_dir)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script.path), *options, *fixed])
            return runpy.run_path(str(script.path), run_name="__main__")

    yield call
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def inside(script, tmp_path):
    """Run the script in this process; returns its variables."""
    with running(script, tmp_path / "runs") as call:
        yield call


@pytest.fixture
def complaint(inside, capsys, tmp_path):
    """What the user reads when the script refuses some options: its one line, or tyro's box; no run directory is made."""

    def call(*options) -> str:
        with pytest.raises(SystemExit) as caught:
            inside(*options)
        assert not list(tmp_path.glob("runs/*")), "a run directory was made for a run that never began"
        if isinstance(caught.value.code, str):
            assert len(caught.value.code.splitlines()) == 1
            return caught.value.code
        assert caught.value.code == 2
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return call


@pytest.fixture
def unexplained(inside, monkeypatch, capsys):
    """Which of some arguments --help lists without a default, or explains in fewer than two words."""

    def call(names) -> set[str]:
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as caught:
            inside("--help")
        assert caught.value.code == 0
        entries = {}
        for line in capsys.readouterr().out.splitlines():
            text = line.strip("│ ")
            if start := re.match(r"(?:-h, )?--([a-z-]+)", text):
                entries[flag := start[1]] = ""
            if entries:
                entries[flag] += f" {text}"
        found = set()
        for name in names:
            told, default, _ = entries[name.replace("_", "-")].rpartition("(default:")
            words = re.findall(r"(?<![-\w])[a-z]{2,}", re.sub(r"--[\w-]+|\{.*?\}|\[.*?\]", "", told))
            if not default or len(words) < 2:
                found.add(name)
        return found

    return call
