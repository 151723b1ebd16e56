"""Continuous PPO with a quantile critic (Nam et al. 2021, arXiv:2105.11366; Dabney et al. 2018, arXiv:1710.10044) and CVaR.

The critic learns quantiles of the return from targets that exchange samples (`replaced`) and never average quantile functions.
--cvar-alpha 1 (default) maximises the mean, as ppo_portfolio.py does, with the mean of the quantiles as baseline. Below 1:

--risk static: CVaR_alpha of R, the rewards of --horizon bars summed, = max over b of b - E[(b - R)+] / alpha (Rockafellar &
  Uryasev 2000). The state holds the budget, b less what has been earned, and how much of the horizon is left: for a given b the
  best policy needs no other memory (Bauerle & Ott 2011). b follows the alpha-quantile of finished horizons. A state is worth
  -E[(budget - Z)+] / alpha, Z what is still to be earned by the critic's quantiles; nothing counts after a horizon's end, where
  the next one begins. In backtests too: the account goes on, the budget starts afresh every --horizon bars.
--risk iterated: rho(s) = CVaR_alpha of r + gamma rho(s'), every bar anew (Ruszczynski 2010). The critic learns the quantiles of
  r + gamma rho(s'); VaR and rho are read off them, and an action is worth VaR - (VaR - r - gamma rho(s'))+ / alpha.

Acting on the CVaR of each state's return would be neither (Lim & Malik 2022).
"""

import argparse
import dataclasses
import hashlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

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

import envs  # noqa: F401  (registers Portfolio-v0)
from envs import dataset, dataset_writer, ledger, portfolio_references
from envs.costs import RUIN
from envs.device import unavailable
from envs.portfolio import RegimeGuard
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import load_market
from envs.task import describe_task, provenance

MARKET_ENV = "Portfolio-v0"


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
    """folder to log episodes of the training split to as offline data, a dataset for each entry of --log-at"""
    log_at: tuple[float, ...] = (1.0,)
    """shares of the training after which the policy of that moment is logged, as it explores; 1 also if --patience ends it"""
    log_episodes: int = 100
    """episodes of each dataset"""

    env_id: str = MARKET_ENV
    """Portfolio-v0, or any Gymnasium id with vector observations and continuous actions, to check the algorithm itself"""
    market: str = "synthetic:garleanu-pedersen"
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...], see KNOWN below for two of them; with
    the prefix shuffled:, bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py)"""
    symbols: tuple[str, ...] = ()
    """symbols of the market to keep (all by default)"""
    start: str | None = None
    """first date of the panel"""
    end: str | None = None
    """last date of the panel"""
    resample: str | None = None
    """coarser bars, such as 1D from hourly data"""
    columns: tuple[str, ...] = ()
    """extra columns of the market's file that the agent sees, such as forecasts"""
    series: str | None = None
    """Parquet or CSV file of more input series, by time of publication (and symbol)"""
    series_lag: int = 1
    """bars between a publication and the first bar that sees it"""
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
    portfolio: PortfolioConfig = field(default_factory=PortfolioConfig)
    """costs, fill and constraints"""
    guard: RegimeGuard = field(default_factory=RegimeGuard)
    """rules that change orders; with any of them on, the report compares the agent with and without them"""
    episode_length: int = 256
    """bars in a training episode, which starts at a random bar"""
    reward: str = "growth"
    """growth (net log growth) or sharpe (differential Sharpe ratio)"""
    penalty_turnover: float = 0.0
    """penalty on the turnover"""
    penalty_drawdown: float = 0.0
    """penalty on the drawdown"""
    penalty_cvar: float = 0.0
    """penalty on the conditional value at risk of the worst --penalty-cvar-alpha of bars"""
    penalty_cvar_alpha: float = 0.05
    """share of bars that count as the tail there"""
    penalty_variance: float = 0.0
    """penalty on the squared net return; with log growth the relative risk aversion is 1 + 2 * this"""

    cvar_alpha: float = 1.0
    """maximise the mean of the worst share of outcomes, this one; 1: of all of them, which is risk-neutral"""
    risk: str = "static"
    """below 1, whose outcomes: static (CVaR of the rewards of --horizon bars, summed, by a budget in the state) or iterated
    (CVaR of every bar's reward and what follows, nested)"""
    horizon: int = 20
    """bars of an outcome, one after another, in static CVaR and in the report (with --env-id: a whole episode)"""
    anneal_alpha: float = 0.0
    """share of the training over which the level falls from 1 to --cvar-alpha; not where the best mean is a corner of the
    constraints, which a policy that has come there hardly leaves"""
    num_quantiles: int = 32
    """quantiles that the critic learns, at the levels (i + 0.5) / this"""
    total_timesteps: int = 8_000_000
    """steps of all markets together"""
    num_envs: int = 1024
    """markets that run at once"""
    num_steps: int = 32
    """bars per market and rollout"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.9
    """discount factor (1 with --risk static, whose horizon is finite)"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation and of the critic's targets (neither with --risk iterated: one step)"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 1
    """passes over each rollout; where noise outweighs the signal, new bars teach more than old ones"""
    norm_adv: bool = True
    """standardise advantages per minibatch"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    log_std: float = -1.0
    """logarithm of the policy's standard deviation at the start, in scores"""
    vf_coef: float = 0.5
    """weight of the critic's quantile loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, of actor and critic each: a sum over quantiles would drown the actor's"""
    target_kl: float | None = None
    """end an update once a minibatch's approximate KL exceeds this"""
    reward_scale: float = 100.0
    """factor on the rewards that the critic sees"""
    eval_every: int = 20
    """iterations between two backtests on the validation split"""
    eval_episodes: int = 100
    """with --env-id: episodes of the final evaluation"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for markets whose best policy is known: the terms that its derivation assumes.
KNOWN = {
    "synthetic:garleanu-pedersen": dict(
        portfolio=PortfolioConfig(
            costs="zero:quadratic_impact_bps=75", constraints="long_short", orders="change", gross=10.0, asset_cap=10.0,
            scale=0.5,
        ),
        penalty_variance=19.5,
    ),
    "synthetic:merton": dict(
        portfolio=PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, asset_cap=2.0, scale=0.5),
        gamma=0.0, log_std=0.0,
    ),
    "synthetic:tail": dict(
        portfolio=PortfolioConfig(costs="zero", cash=False), log_std=0.0, horizon=10, reward_scale=20.0
    ),
}  # fmt: skip

# What changes for --env-id: the settings of rl-zoo for Pendulum-v1.
CLASSIC_CONTROL = dict(
    total_timesteps=100_000, num_envs=4, num_steps=1024, learning_rate=1e-3, gamma=0.9, gae_lambda=0.95, num_minibatches=64,
    update_epochs=10, reward_scale=0.1, log_std=0.0, num_threads=1, anneal_lr=False,
)  # fmt: skip


# What changes for --cvar-alpha below 1: the critic, whose tail is the objective, takes more and smaller steps; and for
# --risk static: rewards are summed over a horizon short enough to do without bootstrapping inside it.
AVERSE = dict(num_minibatches=16)
STATIC = dict(gamma=1.0, gae_lambda=1.0)


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


class Agent(nn.Module):
    def __init__(self, obs_size, num_actions, log_std, num_quantiles):
        super().__init__()
        self.norm = RunningNorm(obs_size)
        self.register_buffer("budget", torch.tensor(0.0))  # that horizons start with, in scaled rewards: part of the policy
        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, num_quantiles), std=1.0),
        )  # fmt: skip
        self.actor = nn.Sequential(
            layer_init(nn.Linear(obs_size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )  # fmt: skip
        self.log_std = nn.Parameter(torch.full((num_actions,), log_std))

    def log_prob(self, mean, action):
        """(n,) log-density of actions (n, A) given the policy's mean; the standard deviation does not depend on the state."""
        z = (action - mean) * (-self.log_std).exp()
        return -0.5 * z.square().sum(1) - (self.log_std + 0.5 * np.log(2 * np.pi)).sum()

    def entropy(self):
        return (self.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()

    def quantiles(self, x):
        """(n, N) quantiles in order: what is learnt for two levels may cross."""
        return self.critic(x).sort(dim=1).values

    def value(self, x):
        return self.critic(x).mean(dim=1)


def quantile_loss(quantiles, targets):
    """Quantile regression (Koenker & Bassett 1978) of (n, N) quantiles at the levels (i + 0.5) / N on samples (n, M), in order.

    |level - 1{target < quantile}| * |target - quantile|, summed over the quantiles, averaged over targets and batch, without
    forming all pairs: (quantile - target)+ needs the targets below only, by their number and sum. No Huber kernel: on
    returns much smaller than its width it learns means.
    """
    (n, size), count = quantiles.shape, targets.shape[1]
    levels = (torch.arange(size, device=quantiles.device) + 0.5) / size
    below = torch.searchsorted(targets, quantiles.detach().contiguous())
    sums = targets @ torch.ones(count, count + 1, device=targets.device).triu(1)  # of the first 0, 1, ..., M targets
    excess = (below * quantiles - sums.gather(1, below)) / count
    return (levels * (targets.mean(dim=1, keepdim=True) - quantiles) + excess).sum() / n


def replaced(rewards, next_quantiles, over, gamma, keep):
    """Sample-replacement lambda-returns SR(lambda) of quantiles (Nam et al. 2021): (T, n, N) samples of the return.

    r + gamma * what follows: sample i of the next step's targets where keep (T, n, N) bool, True with probability lambda, says
    so and the episode goes on, else quantile i of next_quantiles (T, n, N), those of the state that step t led to (0 where
    nothing follows). Samples are exchanged, never averaged: means of quantile functions have too small a spread.
    rewards, over: (T, n).
    """
    targets, following = torch.empty_like(next_quantiles), next_quantiles[-1]
    for step in reversed(range(len(rewards))):
        following = torch.where(keep[step] & ~over[step].unsqueeze(1), following, next_quantiles[step])
        targets[step] = following = rewards[step].unsqueeze(1) + gamma * following
    return targets


def cvar(quantiles, alpha):
    """(...) mean of the worst share alpha of (..., N) quantiles in order; the last of them counts in part."""
    share = alpha * quantiles.shape[-1]
    weights = (share - torch.arange(quantiles.shape[-1], device=quantiles.device, dtype=quantiles.dtype)).clamp(0.0, 1.0)
    return quantiles @ (weights / share)


def shortfall(budget, quantiles, alpha):
    """(...) E[(budget - Z)+] / alpha of budgets (...) under quantiles (..., N) of Z."""
    return (budget.unsqueeze(-1) - quantiles).clamp(min=0.0).mean(dim=-1) / alpha


def iterated_advantage(outcomes, quantiles, alpha):
    """(...) VaR - (VaR - y)+ / alpha - CVaR of outcomes y (...), VaR and CVaR those of quantiles (..., N) in order.

    The factor of grad log pi in the gradient of CVaR_alpha[y] (Tamar et al. 2015): with VaR subtracted inside, and no
    other number, it is right; its mean under the quantiles is 0. alpha: () float64.
    """
    last = (alpha * quantiles.shape[-1] - 1e-9).ceil().long() - 1
    at_risk = quantiles.index_select(-1, last.view(1)).squeeze(-1)
    return at_risk - (at_risk - outcomes).clamp(min=0.0) / alpha - cvar(quantiles, alpha)


def coverage(quantiles, outcomes, level):
    """Share of outcomes (n,) at or below the quantile of that level, between those of (n, N) in order: level, if calibrated."""
    size = quantiles.shape[1]
    place = min(max(level * size - 0.5, 0.0), size - 1.0)
    low, part = int(place), place - int(place)
    at_level = quantiles[:, low] + part * (quantiles[:, min(low + 1, size - 1)] - quantiles[:, low])
    return float((outcomes <= at_level).float().mean()) if len(outcomes) else float("nan")


class Account:
    """What --risk static adds to the state, of n markets: the budget left, in scaled rewards, and the share of the horizon.

    horizon: bars; None: nothing is added. A bar changes it in place, so that it can be recorded.
    """

    def __init__(self, horizon):
        self.horizon = horizon

    def restart(self, num_envs, budget, device="cpu"):
        self.budget = torch.full((num_envs,), float(budget), device=device)
        self.bars, self.earned = torch.zeros_like(self.budget), torch.zeros_like(self.budget)

    def state(self):
        """(n, 2), or (n, 0)"""
        if self.horizon is None:
            return self.budget.new_zeros((len(self.budget), 0))
        return torch.stack([self.budget, 1.0 - self.bars / self.horizon], dim=1)

    def spend(self, rewards, over, budget):
        """One bar: scaled rewards (n,); over (n,) bool: the episode has ended. Returns where an outcome is complete (n,) bool:
        there, or at the end of a horizon, and what it has earned (n,); the next one starts with `budget` ()."""
        if self.horizon is None:
            return over, self.earned
        over, earned = over | (self.bars == self.horizon - 1), self.earned + rewards
        self.budget.copy_(torch.where(over, budget.to(over.device), self.budget - rewards))
        self.bars.add_(1.0).masked_fill_(over, 0.0)
        self.earned.copy_(earned.masked_fill(over, 0.0))
        return over, earned


def joined(observation, state):
    return torch.cat([observation, state], dim=-1) if state.shape[-1] else observation


def make_envs(args, splits, options, device="cpu"):
    """Training environments: markets, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if args.env_id != MARKET_ENV:
        return gym.make_vec(
            args.env_id, args.num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
    return gym.make_vec(
        MARKET_ENV, args.num_envs, split=splits["train"], episode_length=args.episode_length, device=device, **options
    )  # fmt: skip


def save_checkpoint(path, content):
    """Written beside and moved into place: a kill at any moment leaves the previous checkpoint or this one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the defaults of the rest
    first.add_argument("--env-id", "--env_id", default=MARKET_ENV)
    first.add_argument("--market", default=Args.market)
    first.add_argument("--risk", default=Args.risk)
    first.add_argument("--cvar-alpha", "--cvar_alpha", default="1")
    chosen, _ = first.parse_known_args()
    settings = next((settings for market, settings in KNOWN.items() if chosen.market.startswith(market)), {})
    settings = CLASSIC_CONTROL if chosen.env_id != MARKET_ENV else settings
    if chosen.cvar_alpha not in ("1", "1.0"):
        settings = settings | AVERSE | (STATIC if chosen.risk == "static" else {})
    args = tyro.cli(Args, default=dataclasses.replace(Args(), **settings), config=(tyro.conf.OmitArgPrefixes,))
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "model.pt").is_file():
            sys.exit(f"--resume {args.resume}: no model.pt there; expected a run directory with a checkpoint")
        checkpoint = torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
        nested = {"portfolio": PortfolioConfig(**saved["portfolio"]), "guard": RegimeGuard(**saved["guard"])}
        args = Args(**{**saved, **nested, "resume": args.resume})
    for flag in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every", "log_episodes"):
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if not args.log_at or not all(0.0 < share <= 1.0 for share in args.log_at):
        sys.exit(f"--log-at {args.log_at}: expected shares of the training, above 0 and at most 1")
    logged = sorted(Path(args.log_dataset).glob(f"{args.exp_name}__{args.seed}__*/dataset.hdf5")) if args.log_dataset else []
    if logged and not checkpoint:
        sys.exit(f"--log-dataset {args.log_dataset}: holds {logged[0].parent.name} already; expected none of this seed")
    if args.reward not in ("growth", "sharpe"):
        sys.exit(f"--reward {args.reward}: expected growth or sharpe")
    if not 0.0 < args.cvar_alpha <= 1.0:
        sys.exit(f"--cvar-alpha {args.cvar_alpha:g}: expected a share above 0 and at most 1")
    if args.risk not in ("static", "iterated"):
        sys.exit(f"--risk {args.risk}: expected static or iterated")
    risk = args.risk if args.cvar_alpha < 1.0 else "neutral"
    static = risk == "static"
    if not 0.0 <= args.anneal_alpha <= 1.0:
        sys.exit(f"--anneal-alpha {args.anneal_alpha:g}: expected a share of the training, 0 to 1")
    if args.num_quantiles < 1 or args.num_quantiles * args.cvar_alpha < 1.0:
        sys.exit(f"--num-quantiles {args.num_quantiles}: expected at least 1 / --cvar-alpha: {1 / args.cvar_alpha:.0f}")
    if static and args.gamma != 1.0:
        sys.exit(f"--gamma {args.gamma:g}: expected 1 with --risk static, where the rewards of a horizon are summed")
    if static and args.log_dataset:
        sys.exit(f"--log-dataset {args.log_dataset}: expected none with --risk static: its policy sees a budget that data lack")
    is_market = args.env_id == MARKET_ENV
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
    if risk != "neutral" and minibatch_size * world_size * args.cvar_alpha < 20:  # only the tail informs
        sys.exit(f"--num-minibatches {args.num_minibatches}: {minibatch_size} steps each; expected 20 / --cvar-alpha at least")

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    risk_aversion = 1.0 + 2.0 * args.penalty_variance
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
        sys.exit("--cudagraphs: expected markets on the GPU (Portfolio-v0 and --market-device auto or cuda)")
    if rank > 0:  # this process does all that the first one does, so that it decides alike, but keeps nothing of it
        scratch = tempfile.TemporaryDirectory()
        args.runs_dir, args.track, args.log_dataset = scratch.name, False, None
        sys.stdout = open(os.devnull, "w")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, env_options = None, None, None
    try:
        if is_market:
            panel = load_market(
                args.market, args.seed, symbols=args.symbols or None, start=args.start, end=args.end, resample=args.resample,
                columns=args.columns, series=args.series, series_lag=args.series_lag,
            )  # fmt: skip
            if args.folds:
                if not 0 <= args.fold < args.folds:
                    raise ValueError(f"--fold {args.fold}: expected 0 to {args.folds - 1}, for --folds {args.folds}")
                splits = panel.walk_forward(args.folds, val_fraction=args.val_fraction, embargo=args.embargo)[args.fold]
            else:
                splits = panel.split(args.train_fraction, args.val_fraction, args.embargo)
            data = PortfolioData(panel, args.portfolio)
            longest = min(int((split.ranges[:, 1] - 1 - data.market(split).starts).max()) for split in splits.values())
            if not 1 <= args.horizon <= longest:
                raise ValueError(f"--horizon {args.horizon}: expected 1 to {longest}, the bars that every split has")
            bars = 1 if risk == "iterated" else args.horizon  # of an outcome
            weights = {"log_growth": float(args.reward == "growth"), "differential_sharpe": float(args.reward == "sharpe")}
            weights |= {name: getattr(args, f"penalty_{name}") for name in ("turnover", "drawdown", "cvar", "variance")}
            env_options = dict(
                data=data, guard=args.guard, reward_weights=weights, cvar_alpha=args.penalty_cvar_alpha,
                num_threads=args.num_threads,
            )  # fmt: skip
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
        train_envs = make_envs(dataclasses.replace(args, num_envs=num_envs), splits, env_options, market_device)
        if not isinstance(train_envs.single_action_space, gym.spaces.Box):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected continuous actions")
        horizon = args.horizon if is_market else train_envs.spec.max_episode_steps
        if static and not horizon:
            raise ValueError(f"--env-id {args.env_id}: has no time limit; expected one with --risk static, or --risk iterated")
        if args.log_dataset:  # refuse actions that no dataset can hold
            dataset.layout(f"--log-dataset {args.log_dataset}", 1, train_envs.single_action_space)
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(np.prod(train_envs.single_action_space.shape))
    lowest, highest = train_envs.single_action_space.low, train_envs.single_action_space.high
    lowest_score, highest_score = (torch.as_tensor(bound).to(device) for bound in (lowest, highest))
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    state_size = obs_size + 2 * static
    agent = Agent(state_size, num_actions, args.log_std, args.num_quantiles).to(device)
    on_cuda = device.type == "cuda"  # captured or not: a rate in memory is rounded to float32
    rate = torch.tensor(args.learning_rate, device=device) if on_cuda else args.learning_rate
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, fused=True, capturable=on_cuda)
    if world_size > 1:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, rank)).generate_state(1)[0]))  # now every process by itself

    # Storage where the markets are: their kernels write observations straight into it
    place = device if on_gpu else "cpu"
    obs = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=place)
    rewards = torch.zeros((args.num_steps, num_envs), device=place)
    terminated, done = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(rewards, dtype=torch.bool)
    state = torch.zeros((args.num_steps + 1, num_envs, 2 * static), device=place)  # budget, and how much of the horizon is left
    complete, earned = torch.zeros_like(done), torch.zeros_like(rewards)  # outcomes, and what those have earned
    x = torch.zeros((args.num_steps + 1, num_envs, state_size), device=device)  # observations and state, normalised
    actions = torch.zeros((args.num_steps, num_envs, num_actions), device=device)
    logprobs, values = torch.zeros((args.num_steps, num_envs), device=device), torch.zeros(x.shape[:2], device=device)
    quantiles = torch.zeros((*x.shape[:2], args.num_quantiles), device=device)
    final_quantiles = torch.zeros_like(quantiles[1:])  # of the last observation of an episode that ended at this step
    targets = torch.zeros_like(quantiles[1:, :, :1] if risk == "iterated" else quantiles[1:])
    advantages, returns = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    mb_x = torch.zeros((minibatch_size, state_size), device=device)
    mb_actions = torch.zeros((minibatch_size, num_actions), device=device)
    index = torch.zeros(minibatch_size, dtype=torch.int64, device=device)  # of the minibatch, in the rollout

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    episode_return, recent_returns = np.zeros(num_envs), []
    ended_return = torch.zeros_like(rewards, dtype=torch.float64)  # on a GPU: that of an episode at the step that it ended at
    if on_gpu:
        episode_return = torch.zeros(num_envs, device=device, dtype=torch.float64)
    account, outcomes = Account(horizon if static else None), torch.zeros(0, device=place)
    account.restart(num_envs, agent.budget, place)
    alpha = torch.tensor(args.cvar_alpha, dtype=torch.float64, device=device)  # in memory: what is captured sees it change
    first_obs, _ = train_envs.reset(seed=args.seed + rank * num_envs)
    obs[0] = torch.as_tensor(first_obs.reshape(num_envs, -1))
    if checkpoint:
        if not is_market:
            sys.exit(f"--resume {args.resume}: {args.env_id} cannot save its state; expected a run of {MARKET_ENV}")
        if (number := checkpoint.get("processes", 1)) != world_size:
            sys.exit(f"--resume {args.resume}: a run of {number} processes; expected as many, not {world_size}")

        def own(rows):
            return rows.chunk(world_size)[rank].clone()

        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["lr"] = rate  # in the form that this run needs
        torch.set_rng_state(own(checkpoint["rng"]))
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own(checkpoint["cuda_rng"]))
        train_envs.unwrapped.set_state({k: own(v).numpy() for k, v in checkpoint["envs"].items()})
        obs[0] = own(checkpoint["obs"])
        episode_return[:] = own(checkpoint["episode_return"]).to(place) if on_gpu else own(checkpoint["episode_return"]).numpy()
        recent_returns = checkpoint["recent_returns"]
        account.budget, account.bars, account.earned = (own(part).to(place) for part in checkpoint["account"][:3])
        outcomes = torch.as_tensor(checkpoint["account"][3], device=place)
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

    played = Account(account.horizon)  # of the latest evaluation

    def see(observation):
        return agent.norm(joined(torch.as_tensor(observation), played.state()).to(device))

    def agent_policy(observation, *_):
        with torch.no_grad():
            return agent.actor(see(observation)).cpu().numpy().clip(lowest, highest)

    def spend(reward, over):
        played.spend(args.reward_scale * torch.as_tensor(reward, dtype=torch.float32), torch.as_tensor(over), agent.budget)

    agent_policy.after = spend  # called by the backtest after each bar

    def backtest(split, policy=agent_policy, **changes):
        played.restart(len(splits[split].ranges), agent.budget)
        return portfolio_references.run(split=splits[split], policy=policy, **{**env_options, **changes})

    def calibration():
        """Coverage of the critic's quantiles on the validation split, by outcomes of the agent as it explores, which is whom
        the critic knows. Its random numbers are their own. The outcome of the last bars of a history is not known."""
        noise, found, earned, ended = torch.Generator().manual_seed(args.seed), [], [], []

        def exploring_policy(observation, *_):
            with torch.no_grad():
                seen = see(observation)
                found.append(agent.quantiles(seen))
                mean = agent.actor(seen).cpu()
                action = mean + agent.log_std.cpu().exp() * torch.randn(mean.shape, generator=noise)
            return action.numpy().clip(lowest, highest)

        def note(reward, over):
            earned.append(args.reward_scale * torch.as_tensor(reward, device=device))
            ended.append(torch.as_tensor(over, device=device))
            spend(reward, over)

        exploring_policy.after = note
        backtest("val", exploring_policy)
        quantiles, rewards, over = torch.stack(found), torch.stack(earned), torch.stack(ended)
        length, bar = over.int().argmax(dim=0) + 1, torch.arange(len(over), device=device).unsqueeze(1)
        outcomes = rewards * (bar < length)
        if risk == "iterated":
            outcomes[:-1] += args.gamma * cvar(quantiles[1:], args.cvar_alpha)
            known = length - 1
        else:
            for t in reversed(range(len(over) - 1)):
                if not (static and (t + 1) % bars == 0):
                    outcomes[t] += args.gamma * outcomes[t + 1]
            fades = np.log(0.01) / np.log(args.gamma) if 0.0 < args.gamma < 1.0 else np.inf * args.gamma  # to a hundredth
            known = length // bars * bars if static else length - min(np.ceil(fades), len(over))
        quantiles, outcomes, levels = quantiles[bar < known], outcomes[bar < known], {"05": 0.05, "50": 0.5, "95": 0.95}
        return {f"coverage_{name}": coverage(quantiles, outcomes, level) for name, level in levels.items()}

    def score_of(frame):
        """What validation maximises: the utility, or the CVaR of outcomes: of the net log growth of horizons, or of bars."""
        if risk == "neutral":
            return portfolio_references.utility(frame, risk_aversion, panel.bars_per_year)
        return portfolio_references.cvar(portfolio_references.episode_returns(frame, bars), args.cvar_alpha)

    def log_dataset(iteration):
        """Episodes of the policy as it explores now. Their random numbers are their own: training does not notice."""
        path = Path(args.log_dataset) / f"{args.exp_name}__{args.seed}__{global_step}" / "dataset.hdf5"
        if path.exists():
            return  # logged before the run was interrupted
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        noise = torch.Generator().manual_seed(seed)

        def act(observation, *_):
            with torch.no_grad():
                mean = agent.actor(agent.norm(torch.as_tensor(observation).to(device)))
                action = mean + agent.log_std.exp() * torch.randn(mean.shape, generator=noise).to(device)
                action = action.clamp(torch.as_tensor(lowest).to(device), torch.as_tensor(highest).to(device))
                logprob = agent.log_prob(mean, action)  # at the action that is recorded: whoever reads it can compute it again
            return action.cpu().numpy(), logprob.cpu().numpy()

        task, costs, panel_sha256, timestamps = {"env_id": args.env_id, "seed": args.seed}, None, None, None
        if is_market:
            options = {name: value for name, value in env_options.items() if name not in ("data", "num_threads")}
            task = describe_task(args.env_id, args, args.portfolio, episode_length=args.episode_length, **options)
            costs, panel_sha256, timestamps = dataclasses.asdict(data.costs), panel.sha256, panel.timestamps
        weights = b"".join(value.cpu().numpy().tobytes() for value in agent.state_dict().values())
        behaviour = {"policy": args.exp_name, "step": global_step, "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
        meta = provenance(task, panel_sha256, costs, run["git_commit"], args.gamma, [behaviour])
        episodes = make_envs(dataclasses.replace(args, num_envs=min(64, args.log_episodes)), splits, env_options)
        dataset_writer.log_episodes(path, episodes, act, args.log_episodes, meta, seed, timestamps)

    # What is computed, as functions of tensors: --compile compiles each of them
    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def choose(observation):
        """Normalised observations (n, D), scores (n, A) drawn from the policy, and their log-densities (n,)."""
        with torch.no_grad(), autocast():
            normalised = agent.norm(observation)
            mean = agent.actor(normalised).float()
            action = mean + agent.log_std.exp() * torch.randn_like(mean)  # kept as drawn: the market gets it clipped
            return normalised, action, agent.log_prob(mean, action)

    def quantiles_of(normalised):
        with torch.no_grad(), autocast():
            return agent.quantiles(normalised).float()

    def accumulate(quantiles, final_quantiles, alpha, state, rewards, terminated, over):
        """Advantages (T, n), values (T + 1, n), and targets (T, n, M) in order. A finished episode is followed by its own last
        observation, never by the first of the next one: its quantiles are bootstrapped where the window was cut (truncation),
        not where the account was ruined. With a budget nothing follows the end of a horizon, which is `over` too."""
        next_quantiles = torch.where(over.unsqueeze(2), final_quantiles, quantiles[1:])
        next_quantiles *= ~(over if static else terminated).unsqueeze(2)
        scaled, carry = args.reward_scale * rewards, args.gamma * args.gae_lambda * ~over
        if risk == "iterated":
            outcomes = scaled + args.gamma * cvar(next_quantiles, alpha)
            values, targets = cvar(quantiles, alpha), outcomes.unsqueeze(2)
            deltas, carry = iterated_advantage(outcomes, quantiles[:-1], alpha), torch.zeros_like(carry)
        else:
            keep = torch.rand(next_quantiles.shape, device=device) < args.gae_lambda
            targets = replaced(scaled, next_quantiles, over, args.gamma, keep).sort(dim=2).values
            if static:
                budget = state[..., 0]
                values = -shortfall(budget, quantiles, alpha)
                deltas = -shortfall(budget[:-1] - scaled, next_quantiles, alpha) - values[:-1]
            else:
                values = quantiles.mean(dim=2)
                deltas = scaled + args.gamma * next_quantiles.mean(dim=2) - values[:-1]
        running, found = torch.zeros(num_envs, device=device), []
        for step in reversed(range(args.num_steps)):
            running = deltas[step] + carry[step] * running
            found.append(running)
        return torch.stack(found[::-1]), values, targets

    def objective(x, action, old_logprob, advantage, target):
        """The loss of a minibatch, its parts that are watched (5,), and ratio, entropy and new quantiles."""
        with autocast():
            mean, new_quantiles = agent.actor(x).float(), agent.critic(x).float()
        new_logprob, entropy = agent.log_prob(mean, action), agent.entropy()
        logratio = new_logprob - old_logprob
        ratio = logratio.exp()
        if args.norm_adv:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()

        v_loss = quantile_loss(new_quantiles, target)

        loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
        with torch.no_grad():
            approx_kl = ((ratio - 1) - logratio).mean()  # k3, http://joschu.net/blog/kl-approx.html
            clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
            watched = torch.stack([pg_loss, v_loss, entropy, approx_kl, clip_fraction])
        return loss, watched, ratio, entropy, new_quantiles

    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
        functions = choose, quantiles_of, accumulate, objective
        choose, quantiles_of, accumulate, objective = (torch.compile(function, dynamic=False) for function in functions)

    # The three parts of an iteration, on the storage above: --cudagraphs records each of them
    def rollout():
        """Every market's next --num-steps bars, all of it on the GPU."""
        for step in range(args.num_steps):
            state[step] = account.state()
            x[step], actions[step], logprobs[step] = choose(joined(obs[step], state[step]))
            clipped = actions[step].clamp(lowest_score, highest_score)
            _, reward, term, trunc, infos = train_envs.unwrapped.step(clipped, out=obs[step + 1])
            rewards[step], terminated[step] = reward, term
            torch.logical_or(term, trunc, out=done[step])
            complete[step], earned[step] = account.spend(args.reward_scale * rewards[step], done[step], agent.budget)
            if not static:
                final_quantiles[step] = quantiles_of(agent.norm(infos["final_obs"]))
            episode_return.add_(reward)
            ended_return[step] = episode_return
            episode_return.mul_(~done[step])

    def estimate_advantages():
        with torch.no_grad():
            state[-1] = account.state()
            x[-1] = agent.norm(joined(obs[-1], state[-1]).to(device))
        quantiles.copy_(quantiles_of(x.flatten(0, 1)).view(quantiles.shape))
        stored = (part.to(device) for part in (state, rewards, terminated, complete))
        for storage, found in zip((advantages, values, targets), accumulate(quantiles, final_quantiles, alpha, *stored)):
            storage.copy_(found)
        torch.add(advantages, values[:-1], out=returns)

    def update():
        """A step of the optimiser on the rows `index` of the rollout; what `objective` returns."""
        torch.index_select(x[:-1].flatten(0, 1), 0, index, out=mb_x)
        torch.index_select(actions.flatten(0, 1), 0, index, out=mb_actions)
        samples = targets.flatten(0, 1)[index]
        found = objective(mb_x, mb_actions, *(rows.flatten()[index] for rows in (logprobs, advantages)), samples)
        optimizer.zero_grad()
        found[0].backward()
        if world_size > 1:
            gradients = [p.grad for p in agent.parameters()]
            together = average(torch.cat([g.flatten() for g in gradients]))
            for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients])):
                gradient.copy_(mean.view_as(gradient))
        for part in ([*agent.actor.parameters(), agent.log_std], agent.critic.parameters()):
            nn.utils.clip_grad_norm_(part, args.max_grad_norm, foreach=True)
        optimizer.step()
        return tuple(part.detach() for part in found)

    def normalise():
        agent.norm.update(joined(obs[:-1], state[:-1]).flatten(0, 1).to(device))

    if args.cudagraphs:
        rollout, estimate_advantages, update, normalise = map(Captured, (rollout, estimate_advantages, update, normalise))

    log_after = {max(1, round(share * num_iterations)) for share in args.log_at} if args.log_dataset else set()
    scored = "val_utility" if risk == "neutral" else "val_cvar"
    started, failure = time.time(), None
    steps = batch_size * world_size
    progress = tqdm(
        total=num_iterations * steps, initial=global_step, unit="step", unit_scale=True, mininterval=0.5, disable=rank > 0
    )
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        alpha.fill_(args.cvar_alpha ** min(1.0, iteration / max(1.0, args.anneal_alpha * num_iterations)))
        if args.anneal_lr:
            annealed = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)
            optimizer.param_groups[0]["lr"] = rate.fill_(annealed) if on_cuda else annealed

        # Rollout
        if on_gpu:
            rollout()
            finished_returns = ended_return[done][-100:].tolist()
        else:
            finals, finished_returns = [], []
            for step in range(args.num_steps):
                state[step] = account.state()
                x[step], actions[step], logprobs[step] = choose(joined(obs[step], state[step]).to(device))
                action = actions[step].cpu().numpy().clip(lowest, highest)
                if is_market:
                    _, reward, term, trunc, infos = train_envs.step(action, out=obs[step + 1].numpy())
                else:
                    next_obs, reward, term, trunc, infos = train_envs.step(action.reshape(train_envs.action_space.shape))
                    obs[step + 1] = torch.as_tensor(next_obs.reshape(num_envs, -1))
                rewards[step] = torch.as_tensor(reward)
                terminated[step] = torch.as_tensor(term)
                over = term | trunc
                done[step] = torch.as_tensor(over)
                complete[step], earned[step] = account.spend(args.reward_scale * rewards[step], done[step], agent.budget)
                episode_return += reward
                if over.any():
                    ended = np.flatnonzero(over)
                    finals.append((step, ended, np.stack(infos["final_obs"][ended]).reshape(len(ended), -1)))
                    finished_returns.extend(episode_return[ended].tolist())
                    episode_return[ended] = 0.0
            if finals and not static:
                final_obs = torch.as_tensor(np.concatenate([f for _, _, f in finals]), dtype=torch.float32)
                at_step = torch.as_tensor(np.concatenate([np.full(len(i), s) for s, i, _ in finals]))
                at_env = torch.as_tensor(np.concatenate([i for _, i, _ in finals]))
                with torch.no_grad(), autocast():  # never compiled: their number varies
                    final_quantiles[at_step, at_env] = agent.quantiles(agent.norm(final_obs.to(device))).float()
        global_step += steps
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages and update
        estimate_advantages()
        statistics, updates, stop_update = torch.zeros(5, device=device), 0, False
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_size, device=device)
            for start in range(0, minibatch_size * args.num_minibatches, minibatch_size):
                index.copy_(order[start : start + minibatch_size])
                loss, watched, ratio, entropy, new_quantiles = update()
                statistics += watched
                updates += 1
                if args.target_kl is not None and average(watched[3].clone()).item() > args.target_kl:
                    stop_update = True
                    break
            if stop_update:
                break
        normalise()  # after the update: the first ratio is exactly 1
        if static:
            finished = gathered(earned)[gathered(complete)]
            outcomes = torch.cat([outcomes, finished])[-max(len(finished), int(50 / args.cvar_alpha)) :]
            if len(outcomes):
                agent.budget.fill_(np.quantile(outcomes.double().cpu().numpy(), alpha.item()))
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
        losses = dict(zip(names, (average(statistics) / updates).tolist()))
        train_seconds += time.perf_counter() - tick

        # Fail-safe: stop cleanly, and say where
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            failure = f"diverged in iteration {iteration} (step {global_step}): {', '.join(bad)} not finite"
            break

        # Logging
        sps = int(global_step / train_seconds)
        explained = 1 - (returns - values[:-1]).var() / returns.var()
        writer.add_scalar("charts/learning_rate", float(optimizer.param_groups[0]["lr"]), global_step)
        writer.add_scalar("charts/SPS", sps, global_step)
        writer.add_scalar("losses/explained_variance", explained.item(), global_step)
        writer.add_scalar("losses/log_std", agent.log_std.mean().item(), global_step)
        if risk != "neutral":
            writer.add_scalar("charts/cvar_alpha", alpha.item(), global_step)
        if static:
            writer.add_scalar("charts/budget", agent.budget.item(), global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(steps)

        # Validation: choose the model here, never on the test split
        if is_market and (iteration % args.eval_every == 0 or iteration == num_iterations):
            score = score_of(backtest("val"))
            writer.add_scalar(f"eval/{scored}", score, global_step)
            for name, value in calibration().items():
                writer.add_scalar(f"eval/{name}", value, global_step)
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best = score, 0
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
        stop_early = args.patience > 0 and evals_since_best >= args.patience
        if iteration in log_after or (stop_early and num_iterations in log_after):
            log_dataset(iteration)
        if iteration % args.checkpoint_every == 0 or iteration == num_iterations or stop_early:
            envs_state = train_envs.unwrapped.get_state() if is_market else {}
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "iteration": num_iterations if stop_early else iteration,
                "global_step": global_step, "train_seconds": train_seconds, "processes": world_size,
                "model": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": gathered(torch.get_rng_state()),
                "cuda_rng": gathered(torch.cuda.get_rng_state()) if device.type == "cuda" else None,
                "envs": {k: gathered(torch.as_tensor(v)) for k, v in envs_state.items()} if is_market else None,
                "obs": gathered(obs[-1]),
                "episode_return": gathered(torch.as_tensor(episode_return)),
                "account": (*map(gathered, (account.budget, account.bars, account.earned)), outcomes),
                "recent_returns": recent_returns, "best_score": best_score, "best_model": best_model,
                "evals_since_best": evals_since_best,
            })  # fmt: skip
        if stop_early:
            print(f"\nstopped early: no better validation score in {evals_since_best} backtests")
            break
        obs[0] = obs[-1]
    progress.close()
    writer.close()

    # Final report: the chosen model on every split; the test split is read here for the first and only time
    run |= {
        "status": "failed" if failure else "finished", "failure": failure, "env_steps": global_step,
        "train_seconds": train_seconds, "wall_clock": time.time() - started, "sps": global_step / max(train_seconds, 1e-9),
        "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None, scored: best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    if is_market:
        agent.load_state_dict(best_model)
        frames = {split: backtest(split) for split in splits}
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        known = portfolio_references.references(data, splits["test"], risk_aversion, args.cvar_alpha, bars)
        compared = {"agent": frames["test"], **known}
        if args.guard.active:
            compared["without guard"] = backtest("test", guard=RegimeGuard())
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(frames[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        for name, frame in compared.items():
            scores[name]["utility"] = portfolio_references.utility(frame, risk_aversion, panel.bars_per_year)
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':16}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'utility':>9}{'drawdown':>10}", end="")
        print(f"{'turnover':>10}{'cost':>8}{'gross':>7}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:16}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['utility']:9.1%}", end="")
            print(f"{s['max_drawdown']:10.1%}{s['turnover']:9.0f}x{s['cost']:8.1%}{s['gross_exposure']:7.2f}")
        run |= {"outcomes": {}, "calibration": calibration()}
        print(f"net log growth of all windows of {bars} bars\n{'':16}{'mean':>9}{f'CVaR {args.cvar_alpha:g}':>10}")
        for name, frame in compared.items():
            growths = portfolio_references.episode_returns(frame, bars)
            mean, tail = float(growths.mean()), portfolio_references.cvar(growths, args.cvar_alpha)
            run["outcomes"][name] = {"windows": len(growths), "bars": bars, "mean": mean, "cvar": tail}
            print(f"{name:16}{mean:9.2%}{tail:10.2%}")
        if "crash_probability" in panel.hidden and not panel.parameters:
            weight, flip = float(np.stack(frames["test"]["action"])[:, 0].mean()), portfolio_references.tail_flip(panel, bars)
            run["tail"] = {"crashing_weight": weight, "flip": flip}
            print(f"mean weight of the symbol that crashes: {weight:.3f}; the choice flips at the level {flip:.3f}")
        print("share of validation outcomes at or below the critic's quantiles: ", end="")
        print(", ".join(f"{name[-2:]}%: {value:.1%}" for name, value in run["calibration"].items()))
        if risk == "neutral" and "closed form" in scores:
            run["utility_share"] = scores["agent"]["utility"] / scores["closed form"]["utility"]
            alive = {name: frame["net_exposure"][frame["equity"] > RUIN] for name, frame in compared.items()}
            weight, best = (float(alive[name].mean()) for name in ("agent", "closed form"))
            run["mean_net_exposure"] = {"agent": weight, "closed form": best}
            print(f"utility at risk aversion {risk_aversion:g} is {run['utility_share']:.3f} of the closed form's; ", end="")
            print(f"mean net exposure {weight:.3f}, closed form {best:.3f}")
        if args.guard.active:
            gain, low, high, how = ledger.difference(frames["test"], compared["without guard"], panel.bars_per_year)
            hits = {name: float(frames["test"][name].mean()) for name in args.guard.active}
            run["guard"] = {"growth_gained": gain, "low": low, "high": high, "bootstrap": how, "hit_rates": hits}
            fired = ", ".join(f"{name} {rate:.1%}" for name, rate in hits.items())
            print(f"guard: growth {gain:+.2%} a year against none, 95% interval [{low:.2%}, {high:.2%}] ({how})")
            print(f"guard fired on test bars: {fired}")
    else:
        print(f"\nmean return of the last {len(recent_returns)} episodes of training: {latest}")
        obs_now, _ = train_envs.reset(seed=args.seed + 10_000)  # episodes that training never saw, without exploration
        played.restart(num_envs, agent.budget)
        returns, episode_return[:] = [], 0.0
        while len(returns) < args.eval_episodes:
            action = agent_policy(obs_now.astype(np.float32).reshape(num_envs, -1))
            obs_now, reward, term, trunc, _ = train_envs.step(action.reshape(train_envs.action_space.shape))
            spend(reward, term | trunc)
            episode_return += reward
            returns.extend(episode_return[term | trunc].tolist())
            episode_return[term | trunc] = 0.0
        run["eval_return"], run["eval_cvar"] = float(np.mean(returns)), portfolio_references.cvar(returns, args.cvar_alpha)
        print(f"mean return of {len(returns)} episodes of its mean action: {run['eval_return']:.4g}", end="")
        print(f", CVaR at {args.cvar_alpha:g}: {run['eval_cvar']:.4g}")
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
    if world_size > 1:
        dist.destroy_process_group()
