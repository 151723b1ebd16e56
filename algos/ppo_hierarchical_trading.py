"""PPO (arXiv:1707.06347) with a gate over specialists: options (Sutton, Precup & Singh 1999), experts (Jacobs et al. 1991)."""

import argparse
import dataclasses
import hashlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# Threads that wait spin only briefly: with libgomp's default one busy neighbour makes training ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matrix products are refused on CUDA
import gymnasium as gym
import numba
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs  # noqa: F401  (registers Trading-v0)
from envs import dataset, dataset_writer, ledger, trading_references
from envs.consensus import with_consensus
from envs.costs import load_costs
from envs.device import unavailable
from envs.features import REGIME_FEATURES, regime_features
from envs.panel import Split
from envs.side_by_side import SideBySide
from envs.synthetic import load_market
from envs.synthetic_modes import EVENT, INTENTS, REVERT, TREND
from envs.task import provenance
from envs.trading import ADD, BUY_LARGE, BUY_MEDIUM, REWARDS
from envs.trading_tables import TradingConfig, TradingData

MARKET_ENV = "Trading-v0"
FORBIDDEN = {"probe": (BUY_MEDIUM, BUY_LARGE, ADD), "passive": (BUY_LARGE, ADD), "aggressive": ()}  # orders of each mode
SPECIALISTS = {"modes": tuple(FORBIDDEN), "intents": INTENTS, "flat": ("flat",)}
PHASES = ("specialists", "gate", "joint")
LOSSES = (
    "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "gate_policy_loss", "gate_value_loss", "gate_entropy",
    "gate_spread",
)  # fmt: skip
SHORTEST = 5  # bars of a stretch of one regime that a specialist is trained on
MEMORY_RATE = 0.05  # of the gate's moving averages: about 20 bars


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the run; the script's by default"""
    seed: int = 1
    """seed of the networks, the episodes and, on markets that are drawn, of the panel"""
    torch_deterministic: bool = True
    """use deterministic algorithms, so that the same seed on the same machine gives the same bits"""
    cuda: bool = True
    """run networks and markets on a GPU where there is one; under torchrun on one GPU for each process"""
    market_device: str = "auto"
    """where the markets run: auto (with the networks), cpu or cuda"""
    compile: bool = False
    """compile what is computed of rollout, advantages and update with torch.compile"""
    cudagraphs: bool = False
    """with everything on a GPU: record rollout, advantages and update once, and replay them without the host"""
    amp: bool = False
    """on a GPU: networks in bfloat16, where autocast finds it safe"""
    num_threads: int = 0
    """CPU threads of torch and of the market kernels (0: all cores this process may use)"""
    track: bool = False
    """log to Weights and Biases too"""
    wandb_project_name: str = "cleanmarkets"
    """project of Weights and Biases"""
    wandb_entity: str | None = None
    """entity (team) of Weights and Biases"""
    runs_dir: str = "runs"
    """folder that the run directory is made in"""
    resume: str | None = None
    """run directory to go on with, under the arguments saved there"""
    checkpoint_every: int = 20
    """iterations between two checkpoints (model.pt)"""
    log_dataset: str | None = None
    """with --env-id: folder to log episodes to as offline data, a dataset for each entry of --log-at"""
    log_at: tuple[float, ...] = (1.0,)
    """shares of the training after which the policy of that moment is logged, as it explores; 1 also if --patience ends it"""
    log_episodes: int = 100
    """episodes of each dataset"""

    env_id: str = MARKET_ENV
    """Trading-v0, or any Gymnasium id with vector observations and discrete actions, to check the algorithm itself"""
    market: str = "synthetic:modes"
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...]; with the prefix shuffled:,
    bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py)"""
    symbols: tuple[str, ...] = ()
    """symbols of the market to keep and to trade (all by default)"""
    start: str | None = None
    """first date of the panel"""
    end: str | None = None
    """last date of the panel"""
    resample: str | None = None
    """coarser bars, such as 1D from hourly data"""
    train_fraction: float = 0.6
    """share of the bars used to train (synthetic, bootstrap and crossed markets bring histories for each split)"""
    val_fraction: float = 0.2
    """share of the bars used to choose the model; the rest is the test"""
    embargo: int = 5
    """bars dropped between two splits"""
    folds: int = 0
    """walk-forward folds instead of one split (0: none); the script runs one of them, `fold`"""
    fold: int = 0
    """which fold, from 0"""
    trading: TradingConfig = field(default_factory=lambda: TradingConfig(window=1))  # features look back themselves
    """costs, fill, orders, exits, risk limits and what an agent sees"""
    consensus: bool = True
    """show agents what simple forecasts agree on: consensus, dispersion, hit rate, threshold, reason (envs/consensus.py)"""
    episode_length: int = 64
    """bars in a training episode, which starts at a random bar"""
    reward_pnl: float = 1.0
    """reward for net log growth"""
    reward_cost: float = 0.0
    """penalty for this bar's costs, on top of those in P&L"""
    reward_holding: float = 0.0
    """penalty for holding a position: its age in years of 252 bars"""
    reward_sharpe: float = 0.0
    """reward for the differential Sharpe ratio"""
    reward_drawdown: float = 0.0
    """penalty for the distance from the highest equity so far"""
    reward_sizing: float = 0.0
    """penalty for the distance of the weight held from that of --target-volatility"""
    reward_hold: float = 0.0
    """penalty for holding on while flat"""

    specialists: Literal["modes", "intents", "flat"] = "intents"
    """modes: probe (opens small), passive (small or medium, never adds), aggressive (all orders), trained first on all bars;
    intents: trend, revert, event, each trained first on stretches of its own regime: the true one on synthetic:modes, elsewhere
    event on the third of the training bars where volatility has risen most (20 bars against 60), trend on the half of the
    others where the market has gone furthest in 60 bars, revert on the rest;
    flat: one specialist, without gate and stages, which is plain PPO"""
    gate: Literal["options", "mixture"] = "options"
    """options: the gate's choice acts for --decide-every bars, and the gate learns from what it earned by then; mixture: the
    policy is the specialists' mean, weighted by the gate, log sum_k g_k pi_k, at every bar"""
    decide_every: int = 8
    """bars for which the gate's choice acts; it ends with the episode, and in training with the rollout"""
    stages: tuple[float, float, float] = (0.4, 0.4, 0.2)
    """shares of the training: specialists alone; the gate, over frozen specialists; both. Critics, and the statistics that
    observations are normalised by, learn in all of them"""
    gate_learning_rate: float = 5e-3
    """learning rate of the gate; like the other one it falls over the whole training, and most of it before the last stage"""
    gate_floor: float = 0.15
    """probability that the gate shares out equally in training, so that no specialist starves; in backtests it has none"""
    gate_balance: float = 0.05
    """bonus for a gate that is sure of single choices and uses all specialists: entropy of its mean choice minus its mean
    entropy; it fades to 0 over the training, because it would go on to even out what is better uneven"""
    gate_ent_coef: float = 0.0
    """weight of the gate's entropy bonus"""
    switch_cost: float = 0.0
    """log growth that the gate is charged for a change of the specialist"""

    total_timesteps: int = 3_000_000
    """steps of all markets together"""
    num_envs: int = 256
    """markets that run at once"""
    num_steps: int = 32
    """bars per market and rollout"""
    learning_rate: float = 2e-3
    """learning rate of Adam, of the specialists"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.9
    """discount factor per bar"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 1
    """passes over each rollout; where the market's noise is many times its signal, new bars teach more than old ones"""
    norm_adv: bool = True
    """standardise advantages per minibatch"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss too"""
    ent_coef: float = 0.001
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an update once a minibatch's approximate KL exceeds this"""
    reward_scale: float = 100.0
    """factor on the rewards that the critic sees"""
    eval_every: int = 40
    """iterations between two backtests on the validation split"""
    patience: int = 0
    """stop after so many of them without a better score (0: never), counted anew in each stage, and not while specialists learn
    alone; the best model is kept in any case"""


# What changes for --env-id: CleanRL's settings for classic control, and smaller rewards: with values of 100 the critic fills
# the gradient's norm, and a policy that slips late in training no longer recovers (CartPole: 162 instead of 500, 1 seed of 3).
CLASSIC_CONTROL = dict(
    total_timesteps=500_000, num_envs=4, num_steps=128, learning_rate=2.5e-4, gamma=0.99, gae_lambda=0.95,
    update_epochs=4, ent_coef=0.01, reward_scale=0.05, num_threads=1, stages=(0.0, 0.0, 1.0),
)  # fmt: skip


def processes():
    """Of this run: 1, or as many as torchrun has started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(x):
    """The mean of a tensor over all processes, in its place."""
    if processes() > 1:
        dist.all_reduce(x)
        x /= processes()
    return x


def gathered(x):
    """The rows of a tensor of all processes, one below the other."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(processes())]
    if x.numel():
        dist.all_gather([part.view(torch.uint8) for part in parts], x.contiguous().view(torch.uint8))
    return torch.cat(parts)


class Captured:
    """A function without arguments, whose work on the GPU is recorded as a CUDA graph, and replayed from its fourth call on.

    Its first two calls are ordinary ones, on a stream beside torch's current one: they compile, and allocate what stays. The
    third one records there, and replays. So it must do the same work on the same memory each time; what it returns is that
    memory.
    """

    def __init__(self, function):
        self.function, self.calls, self.graph, self.result = function, 0, None, None
        self.beside = torch.cuda.Stream()

    def __call__(self):
        if self.graph is None and self.calls < 2:
            self.calls += 1
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                self.result = self.function()
            torch.cuda.current_stream().wait_stream(self.beside)
            return self.result
        if self.graph is None:
            self.graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL has threads of its own
            with torch.cuda.graph(self.graph, stream=self.beside, capture_error_mode=mode):
                self.result = self.function()
        self.graph.replay()
        return self.result


class RunningNorm(nn.Module):
    """Standardises observations by the mean and variance of all seen so far; part of the model, saved with it."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x):
        moments = torch.zeros((2, len(self.mean)), dtype=torch.float64, device=x.device)
        for part in x.split(1024 if x.device.type == "cpu" else 2**20):  # parts that stay in the cache, or fit beside it
            centred = part - self.mean.float()
            moments[0] += centred.sum(dim=0, dtype=torch.float64) / len(x)
            moments[1] += centred.square_().sum(dim=0, dtype=torch.float64) / len(x)
        delta, var = average(moments)
        number = len(x) * processes()
        var = var.sub(delta**2).clamp_(min=0.0)
        total = self.count + number
        self.var.copy_((self.var * self.count + var * number + delta**2 * self.count * number / total) / total)
        self.mean.add_(delta * number / total)
        self.count.copy_(total)

    def forward(self, x):
        scale = (self.var + 1e-8).rsqrt()
        return torch.addcmul((-self.mean * scale).float(), x, scale.float()).clamp_(-10.0, 10.0)


def layer_init(layer, std=np.sqrt(2)):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class FastTanh(torch.autograd.Function):
    """tanh(x) = 2 sigmoid(2x) - 1: on a CPU torch's sigmoid takes a tenth of the time of its tanh."""

    @staticmethod
    def forward(ctx, x):
        y = (2.0 * x).sigmoid_().mul_(2.0).sub_(1.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.tanh_backward(grad, ctx.saved_tensors[0])


class Tanh(nn.Module):
    def forward(self, x):
        return FastTanh.apply(x) if x.device.type == "cpu" else x.tanh()


def fixed_shapes(x):
    """Whether no shape may depend on what is in x: a GPU would have to be waited for, torch.compile does not know it, and
    processes would not agree on it."""
    return x.is_cuda or torch.compiler.is_compiling() or processes() > 1


def pick(x, index):
    """(...,) entries of x (..., A) with the numbers index (...)."""
    if x.device.type == "cpu":
        return x.gather(-1, index[..., None]).squeeze(-1)
    chosen = torch.arange(x.shape[-1], device=x.device) == index[..., None]  # there the gradient of gather would sort
    return torch.where(chosen, x, 0.0).sum(dim=-1)


class Agent(nn.Module):
    """K specialists, a critic of each, and, for more than one, a gate between them with a critic of its own.

    allowed: (K, A) bool, the actions that each specialist may take at all.
    """

    def __init__(self, obs_size, allowed, gate_floor):
        super().__init__()
        count, num_actions = allowed.shape
        self.gated, self.gate_floor = count > 1, gate_floor
        self.norm = RunningNorm(obs_size)
        self.register_buffer("allowed", allowed)
        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, count), std=1.0),
        )  # fmt: skip
        self.specialists = nn.ModuleList(
            nn.Sequential(
                layer_init(nn.Linear(obs_size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
                layer_init(nn.Linear(64, num_actions), std=0.01),
            )
            for _ in range(count)
        )  # fmt: skip
        if self.gated:
            self.gate, self.gate_critic = (
                nn.Sequential(
                    layer_init(nn.Linear(obs_size + 3 * count, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
                    layer_init(nn.Linear(64, outputs), std=std),
                )
                for outputs, std in ((count, 0.01), (1, 1.0))
            )  # fmt: skip

    def log_probs(self, x, mask, specialist):
        """(n, A) log-probabilities of each row's specialist (n,) given normalised observations; others than mask and
        `allowed` let through have about -1e8."""
        if fixed_shapes(x):
            return pick(self.all_log_probs(x, mask).transpose(1, 2), specialist[:, None].expand(mask.shape))
        logits = x.new_zeros(mask.shape)
        for k, actor in enumerate(self.specialists):  # each on its own rows: a third of the work of all on all
            rows = (specialist == k).nonzero().squeeze(1)
            logits[rows] = actor(x[rows])
        return torch.where(mask & self.allowed[specialist], logits, -1e8).log_softmax(dim=1)

    def value(self, x, specialist):
        """(n,) value of going on with each row's specialist (n,)."""
        return pick(self.critic(x), specialist)

    def blank(self, n):
        """(n, 3, K): the gate's memory at the start of an episode."""
        return torch.zeros((n, 3, len(self.allowed)), device=self.allowed.device)

    def remember(self, memory, specialist, reward):
        """The gate's memory after a bar in which `specialist` (n,) earned `reward` (n,).

        Of each specialist: moving averages of what it earned and of how much it was used, and whether it acts now. So a small
        position can pay by what it tells: whether a specialist earns here and now.
        """
        acts = (specialist[:, None] == torch.arange(memory.shape[2], device=memory.device)).float()
        earned, used, _ = memory.unbind(1)
        earned = earned + MEMORY_RATE * (acts * reward[:, None].clamp(-10.0, 10.0) - earned)
        return torch.stack([earned, used + MEMORY_RATE * (acts - used), acts], dim=1)

    def gate_log_probs(self, x, memory):
        """(n, K) log-probabilities of the specialists; none has less than gate_floor / K."""
        p = self.gate(torch.cat([x, memory.flatten(1)], dim=1)).softmax(dim=1)
        return ((1.0 - self.gate_floor) * p + self.gate_floor / p.shape[1]).log()

    def gate_value(self, x, memory):
        """(n,) value where the gate is about to choose."""
        return self.gate_critic(torch.cat([x, memory.flatten(1)], dim=1)).squeeze(1)

    def all_log_probs(self, x, mask):
        """(n, K, A) log-probabilities of every specialist."""
        logits = torch.stack([actor(x) for actor in self.specialists], dim=1)
        return torch.where(mask[:, None] & self.allowed, logits, -1e8).log_softmax(dim=2)

    def act_greedily(self, x, mask, specialist):
        return self.log_probs(x, mask, specialist).argmax(dim=1)


def mixed(gate_log_probs, log_probs):
    """(n, A) log sum_k g_k pi_k: what the gate (n, K) and its specialists (n, K, A) do together."""
    return (gate_log_probs[:, :, None] + log_probs).logsumexp(dim=1)


def advantages_of(rewards, values, next_values, terminated, done, decided, gamma, gae_lambda):
    """Generalised advantage estimates (T, n) of decisions that act until the next one, or the end of episode or rollout.

    All arguments are (T, n). values: at every bar; next_values: of what follows each bar, which counts where a decision's time
    is over, unless terminated there. With n bars elapsed delta = sum_{i<n} gamma^i r_i + gamma^n V' - V, and the next
    decision's advantage counts gamma^n lambda: gamma once a bar, lambda once a decision (Sutton et al. 1999; arXiv:1506.02438).
    Where `decided` is true at every bar these are the plain ones; rows where it is not mean nothing.
    """
    out = torch.zeros_like(rewards)
    over = torch.cat([decided[1:], torch.ones_like(done[:1])]) | done  # with this bar a decision's time is over
    earned = later = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        following = out[step + 1] if step + 1 < len(rewards) else later
        earned = rewards[step] + gamma * torch.where(over[step], next_values[step] * ~terminated[step], earned)
        later = gamma * torch.where(over[step], gae_lambda * following * ~done[step], later)
        out[step] = earned - values[step] + later
    return out


def entropy_of(log_probs):
    """(n,) entropies; masked actions have probability 0."""
    return -(log_probs.exp() * log_probs).sum(1)


def mean_of(x, weight=None):
    """The mean of x (n, ...) over its rows; with weight (n,) over those where it is 1, not 0."""
    return x.mean(0) if weight is None else weight @ x / weight.sum()


def clipped_loss(ratio, advantages, args, weight=None):
    """PPO's clipped objective, to be minimised, of probability ratios and advantages (n,), over the rows of `mean_of`."""
    if args.norm_adv:
        centred = advantages - mean_of(advantages, weight)
        std = advantages.std() if weight is None else (weight @ centred.square() / (weight.sum() - 1)).sqrt()
        advantages = centred / (std + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    return mean_of(torch.max(-advantages * ratio, -advantages * clipped), weight)


def phase_of(iteration, iterations, stages):
    """Number in PHASES of what is trained in an iteration, counted from 1."""
    return int(np.searchsorted(np.cumsum(stages)[:-1], (iteration - 1) / iterations, side="right"))


def homes(num_envs, count):
    """(num_envs,) specialist that each market belongs to: the first ones to the first, in shares as equal as possible."""
    return np.repeat(np.arange(count), [len(share) for share in np.array_split(np.arange(num_envs), count)])


def intents_of(panel, split):
    """(T,) number in INTENTS that each bar is given to in the specialists' own training: what --specialists says."""
    if "best_intent" in panel.hidden:
        return panel.hidden["best_intent"]
    features = dict(zip(REGIME_FEATURES, regime_features(panel).T))
    inside = np.concatenate([np.arange(start, stop) for start, stop in split.ranges])
    risen, gone = features["log_vol_20"] - features["log_vol_60"], np.abs(features["trend_60"])
    event = risen > np.quantile(risen[inside], 2 / 3)
    far = gone > np.median(gone[inside][~event[inside]])
    return np.where(event, EVENT, np.where(far, TREND, REVERT))


def own_bars(panel, split, intent):
    """The stretches of a split, of SHORTEST bars or more, that are given to an intent. Raises ValueError if there is none."""
    own = intents_of(panel, split) == intent
    ranges = []
    for start, stop in split.ranges:
        edges = np.flatnonzero(np.diff(own[start:stop].astype(np.int8), prepend=0, append=0)) + start
        ranges += [(a, b) for a, b in edges.reshape(-1, 2) if b - a >= SHORTEST]
    if not ranges:
        raise ValueError(f"--specialists intents: no {SHORTEST} training bars in a row for {INTENTS[intent]}; expected some")
    return Split(split.name, np.array(ranges))


def usage(used, names, best=None):
    """How a gate used its specialists.

    used: (T, n) number of the specialist that acted at each bar of each market, -1 where there was none; best: the same of the
    one that is known to be best, or None. Returns `usage` by name (shares of the bars), `switches` (share of the bars after a
    market's first at which another one acts than before), `run_length` (mean bars between switches), and where `best` is known
    `accuracy` (share of bars at which they agree) and `in_<name>`, the usage where that specialist is best.
    """
    acting = used >= 0
    changed = (used[1:] != used[:-1]) & acting[1:]
    out = {
        "usage": {name: float((used[acting] == k).mean()) for k, name in enumerate(names)},
        "switches": float(changed.sum() / max(1, acting[1:].sum())),
        "run_length": float(acting.sum() / (changed.sum() + acting[0].sum())),
    }
    if best is not None:
        out["accuracy"] = float((used == best)[acting].mean())
        for k in np.unique(best[acting]):
            there = acting & (best == k)
            out[f"in_{names[k]}"] = {name: float((used[there] == other).mean()) for other, name in enumerate(names)}
    return out


def flatten(report):
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b_c": 2}."""
    parts = ((key, value if isinstance(value, dict) else {"": value}) for key, value in report.items())
    return {f"{key}_{name}".rstrip("_"): value for key, values in parts for name, value in values.items()}


def draw(p):
    """(...,) actions drawn with probabilities p (..., A), which need not quite sum to 1; one without probability never is."""
    if p.device.type == "cpu":  # inverts the distribution
        cumulative = p.cumsum(dim=-1)
        drawn = torch.rand((*p.shape[:-1], 1), device=p.device) * cumulative[..., -1:]
        return (cumulative <= drawn).sum(dim=-1)
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)  # cumsum is not deterministic there


def make_envs(args, splits, env_options, phase, markets=None, device="cpu"):
    """Training environments: markets, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs.

    markets: range of those that are made, of all args.num_envs (None: all). By its number among all of them a market has its
    symbol and, while intents are trained alone, its specialist, on bars of its own: processes together have what one has.
    """
    markets = range(args.num_envs) if markets is None else markets
    if args.env_id != MARKET_ENV:
        return gym.make_vec(
            args.env_id, len(markets), vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
    options = {"device": device, **env_options}
    if PHASES[phase] != "specialists" or args.specialists != "intents":
        return gym.make_vec(MARKET_ENV, len(markets), split=splits["train"], first_market=markets.start, **options)
    home, parts = homes(args.num_envs, len(INTENTS)), []
    for k in range(len(INTENTS)):
        own, bars = np.flatnonzero(home == k), own_bars(env_options["data"].panel, splits["train"], k)
        mine = np.flatnonzero(np.isin(own, markets))  # numbers among the specialist's own
        if len(mine):
            parts.append(gym.make_vec(MARKET_ENV, len(mine), split=bars, first_market=int(mine[0]), **options).unwrapped)
    return SideBySide(parts)


def parts_of(train_envs):
    """(environment, slice of its rows) of each of those side by side, or of the only one."""
    parts = getattr(train_envs.unwrapped, "parts", [train_envs.unwrapped])
    ends = np.cumsum([part.num_envs for part in parts]).tolist()
    return [(part, slice(end - part.num_envs, end)) for part, end in zip(parts, ends)]


def save_checkpoint(path, content):
    """Written beside and moved into place: a kill at any moment leaves the previous checkpoint or this one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the defaults of the rest
    first.add_argument("--env-id", "--env_id", default=MARKET_ENV)
    chosen, _ = first.parse_known_args()
    settings = CLASSIC_CONTROL if chosen.env_id != MARKET_ENV else {}
    args = tyro.cli(Args, default=dataclasses.replace(Args(), **settings), config=(tyro.conf.OmitArgPrefixes,))
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "model.pt").is_file():
            sys.exit(f"--resume {args.resume}: no model.pt there; expected a run directory with a checkpoint")
        checkpoint = torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
        args = Args(**{**saved, "trading": TradingConfig(**saved["trading"]), "resume": args.resume})
    for flag in (
        "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every", "log_episodes",
        "decide_every",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if min(args.stages) < 0 or not np.isclose(sum(args.stages), 1.0):
        sys.exit(f"--stages {' '.join(map(str, args.stages))}: expected three shares of the training, 0 or more, that sum to 1")
    if not 0.0 <= args.gate_floor < 1.0:
        sys.exit(f"--gate-floor {args.gate_floor}: expected a probability, 0 or more and below 1")
    if args.gate == "mixture" and args.decide_every > 1:
        sys.exit(f"--decide-every {args.decide_every}: expected 1 with --gate mixture, which has no choice that lasts")
    names = SPECIALISTS[args.specialists]
    stages = args.stages if len(names) > 1 else (0.0, 0.0, 1.0)
    if args.num_envs < len(names):
        sys.exit(f"--num-envs {args.num_envs}: expected at least {len(names)}, a market for each specialist")
    if not args.log_at or not all(0.0 < share <= 1.0 for share in args.log_at):
        sys.exit(f"--log-at {args.log_at}: expected shares of the training, above 0 and at most 1")
    logged = sorted(Path(args.log_dataset).glob(f"{args.exp_name}__{args.seed}__*/dataset.hdf5")) if args.log_dataset else []
    if logged and not checkpoint:
        sys.exit(f"--log-dataset {args.log_dataset}: holds {logged[0].parent.name} already; expected none of this seed")
    is_market = args.env_id == MARKET_ENV
    if args.log_dataset and is_market:
        sys.exit(
            f"--log-dataset {args.log_dataset}: expected only with --env-id of Gymnasium; {MARKET_ENV} has no offline data"
        )
    if not is_market and args.specialists == "modes":
        sys.exit(f"--specialists modes: expected intents or flat with --env-id {args.env_id}, which has other orders")
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # under torchrun
    if args.num_envs % world_size:
        sys.exit(f"--num-envs {args.num_envs}: expected a multiple of the {world_size} processes")
    num_envs = args.num_envs // world_size
    batch_size = num_envs * args.num_steps  # of this process
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = max(1, args.total_timesteps // (batch_size * world_size))
    if args.num_minibatches > batch_size:
        sys.exit(f"--num-minibatches {args.num_minibatches}: expected 1 to {batch_size}, the steps of a rollout")

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() and args.cuda else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    missing = None if device.type == "cuda" else "no CUDA device" if args.cuda else "--no-cuda"
    print(f"device  {device}{f' ({missing})' if missing else ''}{f', {world_size} processes' if world_size > 1 else ''}")
    for flag in ("amp", "cudagraphs"):
        if missing and getattr(args, flag):
            print(f"--{flag}: {missing}; left out")
            setattr(args, flag, False)
    if args.market_device not in ("auto", "cpu", "cuda"):
        sys.exit(f"--market-device {args.market_device}: expected auto, cpu or cuda")
    market_device = args.market_device if is_market else "cpu"
    if market_device == "auto":
        reason = None if missing else unavailable(str(device))
        if reason:
            print(f"markets on the CPU: {reason}")
        market_device = "cpu" if missing or reason else str(device)
    on_gpu = market_device != "cpu"
    if on_gpu and missing and torch.cuda.is_available():
        sys.exit(f"--market-device {args.market_device}: expected the networks there too, not --no-cuda")
    if args.cudagraphs and not on_gpu:
        sys.exit("--cudagraphs: expected markets on the GPU (Trading-v0 and --market-device auto or cuda)")
    if rank > 0:  # this process does all that the first one does, so that it decides alike, but keeps nothing of it
        scratch = tempfile.TemporaryDirectory()
        args.runs_dir, args.track, args.log_dataset = scratch.name, False, None
        sys.stdout = open(os.devnull, "w")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, env_options, best_intent = None, None, {}, None
    try:
        if is_market:
            panel = load_market(
                args.market, args.seed, symbols=args.symbols or None, start=args.start, end=args.end, resample=args.resample
            )
            if args.folds:
                if not 0 <= args.fold < args.folds:
                    raise ValueError(f"--fold {args.fold}: expected 0 to {args.folds - 1}, for --folds {args.folds}")
                splits = panel.walk_forward(args.folds, val_fraction=args.val_fraction, embargo=args.embargo)[args.fold]
            else:
                splits = panel.split(args.train_fraction, args.val_fraction, args.embargo)
            costs = load_costs(args.trading.costs)
            data = TradingData(with_consensus(panel, costs) if args.consensus else panel, args.trading)
            # every split has a symbol to trade, or `runs` says so
            number = {name: len(np.unique(data.runs(split)[:, 0])) for name, split in splits.items()}
            if args.num_envs < number["train"]:
                raise ValueError(f"--num-envs {args.num_envs}: expected at least {number['train']}, one for each symbol")
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
            env_options = dict(
                data=data, episode_length=args.episode_length, num_threads=args.num_threads,
                reward_weights={name: getattr(args, f"reward_{name}") for name in REWARDS},
            )  # fmt: skip
            best_intent = panel.hidden.get("best_intent") if args.specialists == "intents" else None
        phase = checkpoint["phase"] if checkpoint else phase_of(1, num_iterations, stages)
        markets = range(rank * num_envs, (rank + 1) * num_envs)  # of this process
        train_envs = make_envs(args, splits, env_options, phase, markets, market_device)
        if not isinstance(train_envs.single_action_space, gym.spaces.Discrete):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected discrete actions")
        if args.log_dataset:  # refuse actions that no dataset can hold
            dataset.layout(f"--log-dataset {args.log_dataset}", 1, train_envs.single_action_space)
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(train_envs.single_action_space.n)
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    allowed = torch.tensor([[order not in FORBIDDEN.get(name, ()) for order in range(num_actions)] for name in names])
    agent = Agent(obs_size, allowed, args.gate_floor).to(device)
    on_cuda = device.type == "cuda"  # captured or not: a rate in memory is rounded to float32
    learning_rates = args.learning_rate, args.gate_learning_rate
    rates = [torch.tensor(rate, device=device) if on_cuda else rate for rate in learning_rates]
    groups = [{"params": [*agent.critic.parameters(), *agent.specialists.parameters()], "lr": rates[0]}]
    if agent.gated:
        groups.append({"params": [*agent.gate.parameters(), *agent.gate_critic.parameters()], "lr": rates[1]})
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True, capturable=on_cuda)
    if world_size > 1:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, rank)).generate_state(1)[0]))  # now every process by itself
    mixture = agent.gated and args.gate == "mixture"
    home = torch.as_tensor(homes(args.num_envs, len(names))[markets.start : markets.stop], device=device)

    # Storage where the markets are: their kernels write observations and masks straight into it
    place = device if on_gpu else "cpu"
    obs = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=place)
    masks = torch.ones((args.num_steps + 1, num_envs, num_actions), dtype=torch.bool, device=place)
    rewards = torch.zeros((args.num_steps, num_envs), device=place)
    terminated, done = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(rewards, dtype=torch.bool)
    x = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=device)  # normalised observations
    final_x = torch.zeros_like(x[1:])  # of the last one of an episode that ended at this step
    actions = torch.zeros((args.num_steps, num_envs), dtype=torch.int64, device=device)
    logprobs = torch.zeros((args.num_steps, num_envs), device=device)
    memories = torch.zeros((args.num_steps + 1, num_envs, 3, len(names)), device=device)  # the gate's
    after_memories = torch.zeros_like(memories[1:])  # after a bar, before an episode that begins with the next one clears it
    age = torch.zeros(num_envs, dtype=torch.int64, device=device)  # bars since a decision
    decided, gate_logprobs = torch.ones_like(actions, dtype=torch.bool), torch.zeros_like(logprobs)
    chosen_by_step = home.repeat(args.num_steps, 1)  # specialists that act
    values, next_values, gate_values, next_gate_values = (torch.zeros_like(logprobs) for _ in range(4))
    advantages, returns, gate_advantages, gate_returns = (torch.zeros_like(logprobs) for _ in range(4))
    mb_x = torch.zeros((minibatch_size, obs_size), device=device)
    index = torch.zeros(minibatch_size, dtype=torch.int64, device=device)  # of the minibatch, in the rollout
    balance = torch.zeros((), device=device)  # --gate-balance, as it fades

    def begin(seed):
        """A new episode in every market: its first observation and mask."""
        for part, own in parts_of(train_envs):
            first_obs, infos = part.reset(seed=seed + markets.start + own.start)
            obs[0, own] = torch.as_tensor(first_obs.reshape(part.num_envs, -1))
            if "action_mask" in infos:
                masks[0, own] = torch.as_tensor(infos["action_mask"])

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    episode_return, recent_returns = np.zeros(num_envs), []
    ended_return = torch.zeros_like(rewards, dtype=torch.float64)  # on a GPU: that of an episode at the step that it ended at
    if on_gpu:
        episode_return = torch.zeros(num_envs, device=device, dtype=torch.float64)
    begin(args.seed)
    if checkpoint:
        if not is_market:
            sys.exit(f"--resume {args.resume}: {args.env_id} cannot save its state; expected a run of {MARKET_ENV}")
        if (number := checkpoint.get("processes", 1)) != world_size:
            sys.exit(f"--resume {args.resume}: a run of {number} processes; expected as many, not {world_size}")

        def own(rows):
            return rows.chunk(world_size)[rank].clone()

        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(own(checkpoint["rng"]))
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own(checkpoint["cuda_rng"]))
        for part, rows in parts_of(train_envs):
            state = {k: own(v).view(num_envs, -1)[rows].reshape(-1, *v.shape[1:]) for k, v in checkpoint["envs"].items()}
            part.set_state({k: v.numpy() for k, v in state.items()})
        obs[0], masks[0], memories[0] = own(checkpoint["obs"]), own(checkpoint["mask"]), own(checkpoint["memory"])
        episode_return[:] = own(checkpoint["episode_return"]).to(place) if on_gpu else own(checkpoint["episode_return"]).numpy()
        recent_returns = checkpoint["recent_returns"]
        best_score, best_model = checkpoint["best_score"], checkpoint["best_model"]
        first_iteration, evals_since_best = checkpoint["iteration"] + 1, checkpoint["evals_since_best"]
        global_step, train_seconds = checkpoint["global_step"], checkpoint["train_seconds"]
        print(f"resume  {run_dir} after iteration {checkpoint['iteration']}")
        run_dir = run_dir if rank == 0 else Path(args.runs_dir)
    else:
        run_dir = ledger.new_run_dir(args.runs_dir, args.env_id, args.exp_name, args.seed)
    run = {
        "status": "running", "env_id": args.env_id, "args": dataclasses.asdict(args),
        **ledger.provenance(__file__, str(device)), "trials": 1, "processes": world_size,
    }  # fmt: skip
    if is_market:
        run |= {"panel": ledger.describe_panel(panel, splits), "market": data.describe()}
    ledger.write_json(run_dir / "run.json", run)
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, config=dataclasses.asdict(args), name=run_dir.name,
            sync_tensorboard=True, save_code=True,
        )  # fmt: skip
    writer = SummaryWriter(run_dir, purge_step=global_step if checkpoint else None)
    rows = "\n".join(f"|{key}|{value}|" for key, value in dataclasses.asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")

    def make_policy(trace, told=None):
        """The policy for backtests: the gate decides, or, told: (T,), at each row of the panel that specialist acts.

        It appends to `trace` the specialists (n,) that act and the rows (n,); both -1 in markets whose range is over.
        """
        now, acting, age = None, None, 0

        def agent_policy(observation, mask, rows):
            nonlocal now, acting, age
            if now is None:
                now, alive[:] = agent.blank(len(rows)), [np.ones(len(rows), bool)]
            with torch.no_grad():
                x, allowed = agent.norm(torch.as_tensor(observation).to(device)), torch.as_tensor(mask).to(device)
                if age % args.decide_every == 0:
                    if told is not None:
                        acting = torch.as_tensor(told[rows], device=device)
                    elif agent.gated:
                        acting = agent.gate_log_probs(x, now).argmax(dim=1)
                    else:
                        acting = torch.zeros(len(rows), dtype=torch.int64, device=device)
                age += 1
                trace.append(np.where(alive[0], [acting.cpu().numpy(), rows], -1))
                if mixture and told is None:
                    choice = mixed(agent.gate_log_probs(x, now), agent.all_log_probs(x, allowed)).argmax(dim=1)
                else:
                    choice = agent.act_greedily(x, allowed, acting)
            return choice.cpu().numpy()

        def after(reward, over):
            nonlocal now
            now = agent.remember(now, acting, args.reward_scale * torch.as_tensor(reward).to(device))
            alive[0] = alive[0] & ~over

        alive = []
        agent_policy.after = after
        return agent_policy

    def backtest(split, told=None):
        """Ledger of every symbol, that of the book that gives all of them the same money, and what the gate did."""
        trace = []
        policy = make_policy(trace, told)
        options = {name: env_options[name] for name in ("reward_weights", "num_threads")}
        frame = trading_references.run(data, splits[split], policy, **options)
        used, rows = np.stack(trace, axis=1)
        best = None if best_intent is None else best_intent[rows]
        return frame, ledger.book(frame), usage(used, names, best)

    def log_dataset(iteration):
        """Episodes of the policy as it explores now. Their random numbers are their own: training does not notice."""
        path = Path(args.log_dataset) / f"{args.exp_name}__{args.seed}__{global_step}" / "dataset.hdf5"
        if path.exists():
            return  # logged before the run was interrupted
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        noise, now = torch.Generator().manual_seed(seed), agent.blank(min(64, args.log_episodes))
        acting, age = torch.zeros(len(now), dtype=torch.int64, device=device), np.zeros(len(now), np.int64)

        def act(observation, mask, _, begun):
            nonlocal now, acting, age
            allowed = torch.as_tensor(np.ones((len(observation), num_actions), bool) if mask is None else mask).to(device)
            with torch.no_grad():
                seen = agent.norm(torch.as_tensor(observation).to(device))
                now[torch.as_tensor(begun)], age[begun] = 0.0, 0
                if agent.gated:
                    gate_all = agent.gate_log_probs(seen, now)
                    drawn = torch.multinomial(gate_all.exp().cpu(), 1, generator=noise).squeeze(1).to(device)
                    acting = torch.where(torch.as_tensor(age % args.decide_every == 0, device=device), drawn, acting)
                age += 1
                log_probs = agent.log_probs(seen, allowed, acting).cpu()
                action = torch.multinomial(log_probs.exp(), 1, generator=noise)
                if mixture:
                    log_probs = mixed(gate_all, agent.all_log_probs(seen, allowed)).cpu()
            return action.squeeze(1).numpy(), log_probs.gather(1, action).squeeze(1).numpy()  # given who acts

        def after(reward, over):
            nonlocal now
            now = agent.remember(now, acting, args.reward_scale * torch.as_tensor(reward, dtype=torch.float32).to(device))

        act.after = after
        weights = b"".join(value.cpu().numpy().tobytes() for value in agent.state_dict().values())
        behaviour = {"policy": args.exp_name, "step": global_step, "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
        task = {"env_id": args.env_id, "seed": args.seed}
        meta = provenance(task, None, None, run["git_commit"], args.gamma, [behaviour])
        episodes = make_envs(dataclasses.replace(args, num_envs=len(now)), splits, env_options, phase)
        dataset_writer.log_episodes(path, episodes, act, args.log_episodes, meta, seed)

    # What is computed, as functions of tensors: --compile compiles each of them
    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def choose(observation, mask, memory, decided, before):
        """Normalised observations (n, D), who acts (n,) and the gate's log-probability of it, actions (n,) and theirs.

        The gate chooses where it is `decided` to; elsewhere goes on who acted `before`.
        """
        with torch.no_grad(), autocast():
            normalised = agent.norm(observation)
            chosen, gate_logprob = home, torch.zeros_like(home, dtype=torch.float32)
            if gating:
                gate_all = agent.gate_log_probs(normalised, memory)
                chosen = torch.where(decided, draw(gate_all.exp()), before)
                gate_logprob = pick(gate_all, chosen)
            log_probs = agent.log_probs(normalised, mask, chosen)
            action = draw(log_probs.exp())
            if gating and mixture:
                log_probs = mixed(gate_all, agent.all_log_probs(normalised, mask))
            return normalised, chosen, gate_logprob, action, pick(log_probs, action)

    def value_of(normalised, memory, chosen, after_x, after_memory, decides_next):
        """Values (n,) of going on and of what follows, and the same of the gate, which are 0 while it does not choose.

        What follows a bar is worth what its specialist makes of it, or, where the gate decides next, the gate's mean of them.
        """
        with torch.no_grad(), autocast():
            value, after = agent.value(normalised, chosen).float(), agent.critic(after_x).float()
            following = pick(after, chosen)
            if not gating:
                return value, following, torch.zeros_like(value), torch.zeros_like(value)
            anew = (agent.gate_log_probs(after_x, after_memory).exp() * after).sum(1)
            following = torch.where(decides_next, anew, following)
            gate_value, after_gate_value = agent.gate_value(normalised, memory), agent.gate_value(after_x, after_memory)
            return value, following, gate_value.float(), after_gate_value.float()

    def accumulate(rewards, values, next_values, terminated, done, decided):
        return advantages_of(rewards, values, next_values, terminated, done, decided, args.gamma, args.gae_lambda)

    def gate_objective(x, memory, chosen, old_logprob, advantage, target, weight=None):
        """The gate's loss on decisions, or on the rows of weight 1 among others, and its parts that are watched (4,)."""
        with autocast():
            all_logprobs, new_value = agent.gate_log_probs(x, memory), agent.gate_value(x, memory).float()
        pg_loss = torch.zeros((), device=device)
        if not mixture:
            pg_loss = clipped_loss((pick(all_logprobs, chosen) - old_logprob).exp(), advantage, args, weight)
        v_loss = 0.5 * mean_of((new_value - target).square(), weight)
        entropy = mean_of(entropy_of(all_logprobs), weight)
        spread = entropy_of(mean_of(all_logprobs.exp(), weight)[None].log()).sum() - entropy
        loss = pg_loss + args.vf_coef * v_loss - args.gate_ent_coef * entropy - balance * spread
        return loss, torch.stack([pg_loss, v_loss, entropy, spread])

    def objective(
        x, mask, memory, chosen, decided, action, old_logprob, advantage, old_value, target, gate_logprob, gate_advantage,
        gate_target,
    ):  # fmt: skip
        """The loss of a minibatch, its parts that are watched (9,), and ratio, entropy and new values."""
        with autocast():
            with torch.set_grad_enabled(not frozen):
                all_logprobs = agent.all_log_probs(x, mask) if gating and mixture else agent.log_probs(x, mask, chosen)
            if gating and mixture:
                all_logprobs, advantage = mixed(agent.gate_log_probs(x, memory), all_logprobs), gate_advantage
            new_value = agent.value(x, chosen).float()
        new_logprob = pick(all_logprobs, action)
        entropy = entropy_of(all_logprobs).mean()
        logratio = new_logprob - old_logprob
        ratio = logratio.exp()
        pg_loss = clipped_loss(ratio, advantage, args)

        v_loss = (new_value - target) ** 2
        if args.clip_vloss:
            v_clipped = old_value + (new_value - old_value).clamp(-args.clip_coef, args.clip_coef)
            v_loss = torch.max(v_loss, (v_clipped - target) ** 2)
        v_loss = 0.5 * v_loss.mean()

        loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
        gate_loss, gate_watched = torch.zeros((), device=device), torch.zeros(4, device=device)
        decisions = x, memory, chosen, gate_logprob, gate_advantage, gate_target
        if gating and fixed_shapes(x):
            weight = decided.float()
            enough = weight.sum() > 1  # else it learns nothing here, from numbers that are finite all the same
            gate_loss, gate_watched = gate_objective(*decisions, torch.where(enough, weight, 1.0))
            gate_loss, gate_watched = gate_loss * enough, gate_watched * enough
        elif gating and decided.sum() > 1:
            gate_loss, gate_watched = gate_objective(*(rows[decided] for rows in decisions))
        with torch.no_grad():
            approx_kl = ((ratio - 1) - logratio).mean()  # k3, http://joschu.net/blog/kl-approx.html
            clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
            watched = torch.cat([torch.stack([pg_loss, v_loss, entropy, approx_kl, clip_fraction]), gate_watched])
        return loss + gate_loss, watched, ratio, entropy, new_value

    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
        functions = choose, value_of, accumulate, objective
        choose, value_of, accumulate, objective = (torch.compile(function, dynamic=False) for function in functions)

    # What every rollout does before and after a step of the markets, on the storage above
    def act(step):
        """The gate decides at the start of a rollout, every so many bars, and when an episode begins."""
        torch.eq(age, 0, out=decided[step])
        x[step], chosen_by_step[step], gate_logprobs[step], actions[step], logprobs[step] = choose(
            obs[step].to(device), masks[step].to(device), memories[step], decided[step], chosen_by_step[step - 1]
        )

    def remember(step):
        """What the gate knows of the bar, which the next episode does not."""
        over, reward = done[step].to(device), args.reward_scale * rewards[step].to(device)
        after_memories[step] = agent.remember(memories[step], chosen_by_step[step], reward)
        memories[step + 1] = after_memories[step].masked_fill(over[:, None, None], 0.0)
        age.add_(1).remainder_(args.decide_every).masked_fill_(over, 0)

    # The three parts of an iteration, on the storage above: --cudagraphs records each of them, and anew in each stage
    def rollout():
        """Every market's next --num-steps bars, all of it on the GPU."""
        parts = parts_of(train_envs)
        age.zero_()
        for step in range(args.num_steps):
            act(step)
            for part, own in parts:
                _, reward, term, trunc, infos = part.step(actions[step, own], out=obs[step + 1, own])
                masks[step + 1, own], rewards[step, own], terminated[step, own] = infos["action_mask"], reward, term
                torch.logical_or(term, trunc, out=done[step, own])
                final_x[step, own] = agent.norm(infos["final_obs"])
            remember(step)
            episode_return.add_(rewards[step])
            ended_return[step] = episode_return
            episode_return.mul_(~done[step])

    def estimate_advantages():
        """A finished episode is followed by its own last observation, never by the first of the next one: V(final_obs) is
        bootstrapped where the window was cut (truncation), not where the account was ruined."""
        ends, cuts, scaled = terminated.to(device), done.to(device), args.reward_scale * rewards.to(device)
        with torch.no_grad():
            x[-1] = agent.norm(obs[-1].to(device))
        every = torch.ones_like(decided)
        after_x, decides_next = torch.where(cuts[:, :, None], final_x, x[1:]), torch.cat([decided[1:], every[:1]]) | cuts
        rows = x[:-1], memories[:-1], chosen_by_step, after_x, after_memories, decides_next
        found = value_of(*(part.flatten(0, 1) for part in rows))
        for kept, new in zip((values, next_values, gate_values, next_gate_values), found):
            kept.copy_(new.view_as(kept))
        advantages.copy_(accumulate(scaled, values, next_values, ends, cuts, every))
        torch.add(advantages, values, out=returns)
        if gating:
            acted = memories[:-1, :, 2]
            charged = scaled - args.reward_scale * args.switch_cost * (acted.sum(2) - pick(acted, chosen_by_step))
            gate_advantages.copy_(accumulate(charged, gate_values, next_gate_values, ends, cuts, decided))
            torch.add(gate_advantages, gate_values, out=gate_returns)

    def update():
        """A step of the optimiser on the rows `index` of the rollout; what `objective` returns."""
        torch.index_select(x[:-1].flatten(0, 1), 0, index, out=mb_x)
        batch = (
            chosen_by_step, decided, actions, logprobs, advantages, values, returns, gate_logprobs, gate_advantages,
            gate_returns,
        )  # fmt: skip
        mb_memories = memories[:-1].flatten(0, 1)[index]
        found = objective(mb_x, b_masks[index], mb_memories, *(rows.flatten()[index] for rows in batch))
        optimizer.zero_grad()
        found[0].backward()
        if world_size > 1:
            gradients = [p.grad for p in agent.parameters() if p.grad is not None]  # not of what is frozen
            together = average(torch.cat([g.flatten() for g in gradients]))
            for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients])):
                gradient.copy_(mean.view_as(gradient))
        for group in optimizer.param_groups:  # each by itself: a gate's gradient does not slow its specialists
            nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm, foreach=True)
        optimizer.step()
        return tuple(part.detach() for part in found)

    def normalise():
        agent.norm.update(obs[:-1].flatten(0, 1).to(device))

    recorded = rollout, estimate_advantages, update, normalise
    log_after = {max(1, round(share * num_iterations)) for share in args.log_at} if args.log_dataset else set()
    started, failure = time.time(), None
    steps = batch_size * world_size
    progress = tqdm(
        total=num_iterations * steps, initial=global_step, unit="step", unit_scale=True, mininterval=0.5, disable=rank > 0
    )
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        left = 1.0 - (iteration - 1) / num_iterations
        for group, rate, full in zip(optimizer.param_groups, rates, learning_rates):
            annealed = full * left if args.anneal_lr else full
            group["lr"] = rate.fill_(annealed) if on_cuda else annealed
        balance.fill_(args.gate_balance * left)
        before, phase = phase, phase_of(iteration, num_iterations, stages)
        alone, frozen = PHASES[phase] == "specialists", PHASES[phase] == "gate"
        gating = agent.gated and not alone
        if phase != before:  # other bars, from the start of an episode
            train_envs = make_envs(args, splits, env_options, phase, markets, market_device)
            begin(args.seed + iteration)
            episode_return[:], memories[0], evals_since_best = 0.0, 0.0, 0
        if args.cudagraphs and (phase != before or iteration == first_iteration):  # what is recorded is that of one phase
            rollout, estimate_advantages, update, normalise = map(Captured, recorded)

        # Rollout
        if on_gpu:
            rollout()
            finished_returns = ended_return[done][-100:].tolist()
        else:
            finals, finished_returns = [], []
            age.zero_()
            for step in range(args.num_steps):
                act(step)
                action = actions[step].cpu().numpy()
                if is_market:
                    _, reward, term, trunc, infos = train_envs.step(action, out=obs[step + 1].numpy())
                    masks[step + 1] = torch.from_numpy(infos["action_mask"])
                else:
                    next_obs, reward, term, trunc, infos = train_envs.step(action)
                    obs[step + 1] = torch.as_tensor(next_obs.reshape(num_envs, -1))
                rewards[step] = torch.as_tensor(reward)
                terminated[step] = torch.as_tensor(term)
                over = term | trunc
                done[step] = torch.as_tensor(over)
                remember(step)
                episode_return += reward
                if over.any():
                    ended = np.flatnonzero(over)
                    finals.append((step, ended, np.stack(infos["final_obs"][ended]).reshape(len(ended), -1)))
                    finished_returns.extend(episode_return[ended].tolist())
                    episode_return[ended] = 0.0
            if finals:
                final_obs = torch.as_tensor(np.concatenate([f for _, _, f in finals]), dtype=torch.float32)
                at_step = torch.as_tensor(np.concatenate([np.full(len(i), s) for s, i, _ in finals]))
                at_env = torch.as_tensor(np.concatenate([i for _, i, _ in finals]))
                final_x[at_step, at_env] = agent.norm(final_obs.to(device))
        global_step += steps
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages and update
        estimate_advantages()
        b_masks = masks[:-1].flatten(0, 1).to(device)
        statistics, updates, stop_update = torch.zeros(len(LOSSES), device=device), 0, False
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_size, device=device)
            for start in range(0, minibatch_size * args.num_minibatches, minibatch_size):
                index.copy_(order[start : start + minibatch_size])
                loss, watched, ratio, entropy, new_value = update()
                statistics += watched
                updates += 1
                if args.target_kl is not None and average(watched[3].clone()).item() > args.target_kl:
                    stop_update = True
                    break
            if stop_update:
                break
        normalise()  # after the update: the first ratio is exactly 1
        losses = dict(zip(LOSSES, (average(statistics) / updates).tolist()))
        train_seconds += time.perf_counter() - tick

        # Fail-safe: stop cleanly, and say where
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            failure = f"diverged in iteration {iteration} (step {global_step}): {', '.join(bad)} not finite"
            break

        # Logging
        sps = int(global_step / train_seconds)
        explained = 1 - (returns - values).var() / returns.var()
        writer.add_scalar("charts/learning_rate", float(optimizer.param_groups[0]["lr"]), global_step)
        writer.add_scalar("charts/phase", phase, global_step)
        writer.add_scalar("charts/SPS", sps, global_step)
        writer.add_scalar("losses/explained_variance", explained.item(), global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(steps)

        # Validation: choose the model here, never on the test split
        if is_market and (iteration % args.eval_every == 0 or iteration == num_iterations):
            _, book, report = backtest("val")
            score = float(ledger.growth(book).mean() * panel.bars_per_year)
            writer.add_scalar("eval/val_growth", score, global_step)
            for name, value in flatten(report).items():
                writer.add_scalar(f"gate/{name}", value, global_step)
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best = score, 0
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
        stop_early = args.patience > 0 and evals_since_best >= args.patience and not alone
        if iteration in log_after or (stop_early and num_iterations in log_after):
            log_dataset(iteration)
        if iteration % args.checkpoint_every == 0 or iteration == num_iterations or stop_early:
            states = [part.get_state() for part, _ in parts_of(train_envs)] if is_market else [{}]
            envs_state = {name: np.concatenate([state[name] for state in states]) for name in states[0]}
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "iteration": num_iterations if stop_early else iteration,
                "global_step": global_step, "train_seconds": train_seconds, "processes": world_size,
                "model": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": gathered(torch.get_rng_state()),
                "cuda_rng": gathered(torch.cuda.get_rng_state()) if device.type == "cuda" else None,
                "envs": {k: gathered(torch.as_tensor(v)) for k, v in envs_state.items()} if is_market else None,
                "obs": gathered(obs[-1]), "mask": gathered(masks[-1]), "memory": gathered(memories[-1]), "phase": phase,
                "episode_return": gathered(torch.as_tensor(episode_return)),
                "recent_returns": recent_returns, "best_score": best_score, "best_model": best_model,
                "evals_since_best": evals_since_best,
            })  # fmt: skip
        if stop_early:
            print(f"\nstopped early: no better validation score in {evals_since_best} backtests")
            break
        obs[0], masks[0], memories[0] = obs[-1], masks[-1], memories[-1]
    progress.close()
    writer.close()

    # Final report: the chosen model on every split; the test split is read here for the first and only time
    run |= {
        "status": "failed" if failure else "finished", "failure": failure, "env_steps": global_step,
        "train_seconds": train_seconds, "wall_clock": time.time() - started, "sps": global_step / max(train_seconds, 1e-9),
        "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None, "val_growth": best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    if is_market:
        agent.load_state_dict(best_model)
        frames, books, reports = zip(*(backtest(split) for split in splits))
        books, reports = dict(zip(splits, books)), dict(zip(splits, reports))
        ledger.write_ledger(run_dir / "symbols.parquet", pd.concat(frames, ignore_index=True))
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(books.values(), ignore_index=True))
        compared = {"agent": books["test"]}
        if agent.gated:
            told = {f"{name} alone": np.full(panel.num_bars, k) for k, name in enumerate(names)}
            if best_intent is not None:
                told["oracle gate"] = best_intent
            compared |= {name: backtest("test", choice)[1] for name, choice in told.items()}
        others = trading_references.references(data, splits["test"])
        compared |= {name: ledger.book(frame) for name, frame in others.items()}
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(books[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        run["gate"] = reports
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'drawdown':>10}{'turnover':>10}{'cost':>8}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:22}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['max_drawdown']:10.1%}", end="")
            print(f"{s['turnover']:9.0f}x{s['cost']:8.1%}")
        for name, value in flatten(reports["test"]).items():
            print(f"gate: {name.replace('_', ' '):40}{value:8.3f}")
    else:
        print(f"\nmean return of the last {len(recent_returns)} episodes: {latest}")
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
    if world_size > 1:
        dist.destroy_process_group()
