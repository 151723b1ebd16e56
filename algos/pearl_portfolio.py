"""PEARL (Rakelly et al. 2019, arXiv:1903.08254): soft actor-critic over a latent task that it infers from what it has seen."""

import argparse
import copy
import dataclasses
import math
import os
import sys
import time
from collections import deque
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
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs  # noqa: F401  (registers Portfolio-v0)
from envs import ledger, portfolio_references
from envs.adaptation import adaptation_report, print_adaptation, sharpe_by_regime
from envs.costs import RUIN
from envs.panel import Split
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.probe import linear_probe
from envs.synthetic import load_market
from envs.tasks import HELD_OUT, TASK_SETS, halves, slices

MARKET_ENV = "Portfolio-v0"
LOGGED = ("actor_loss", "critic_loss", "kl", "alpha_loss", "alpha", "entropy", "q")  # of every gradient step


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the run; the script's by default"""
    seed: int = 1
    """seed of the networks, the episodes and, on markets that are drawn, of the panel"""
    torch_deterministic: bool = True
    """use deterministic algorithms, so that the same seed on the same machine gives the same bits"""
    cuda: bool = True
    """run the networks on a GPU where there is one"""
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

    env_id: str = MARKET_ENV
    """Portfolio-v0, or any Gymnasium id with vector observations and continuous actions, to check the algorithm itself: one
    task, unless its reset takes options={"tasks": integers}, as that of Navigation2D-v0 does"""
    market: str = TASK_SETS["portfolio-signal"]
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...], see KNOWN below for two of them; with
    the prefix shuffled:, bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py); each history
    of it is a task (sets of tasks: envs/tasks.py)"""
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
    max_score: float = 5.0
    """largest score that the policy can give; the market takes up to 10"""
    task_bars: int = 0
    """bars of each task that the ranges of a split are cut into, for a market of one history (0: each range is a task)"""
    adapt_share: float = 0.5
    """share of each history, its beginning, that contexts come from; what comes after is learned from, or scored"""
    episodes: int = 3
    """episodes of a context, in training and in evaluation: the latent is drawn from the prior for the first, and inferred
    anew for each of the others"""
    episode_length: int = 80
    """bars in an episode, which starts at a random bar"""
    reward: str = "growth"
    """growth (net log growth) or sharpe (differential Sharpe ratio)"""
    penalty_turnover: float = 0.0
    """penalty on the turnover"""
    penalty_drawdown: float = 0.0
    """penalty on the drawdown"""
    penalty_cvar: float = 0.0
    """penalty on the conditional value at risk of the worst --cvar-alpha of bars"""
    penalty_variance: float = 0.0
    """penalty on the squared net return; with log growth the relative risk aversion is 1 + 2 * this"""
    cvar_alpha: float = 0.05
    """share of bars that count as the tail"""

    total_timesteps: int = 800_000
    """steps of all markets together"""
    num_envs: int = 32
    """tasks that are visited at once, each time others; on markets each by two instances, one for its context, one to learn
    from"""
    num_tasks: int = 1
    """with --env-id: training tasks (markets: the histories of the split)"""
    buffer_size: int = 2048
    """latest steps of every task to learn from"""
    memory_mb: float = 4096.0
    """MiB that all buffers together may take"""
    gradient_steps: int = 150
    """per iteration"""
    meta_batch: int = 16
    """tasks in a batch"""
    batch_size: int = 64
    """steps of each of them"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.9
    """discount factor"""
    tau: float = 0.005
    """share of the critics that moves into the target critics at each step"""
    hidden: int = 64
    """units in each of two hidden layers"""
    encoder: Literal["product", "gru", "attention"] = "product"
    """how the task is inferred: a Gaussian factor for every step of the context (the paper's), or one for all of it, by a GRU,
    or by heads of attention that a learned query pools"""
    heads: int = 4
    """heads of attention"""
    latent: int = 5
    """dimensions of the latent task"""
    kl_coef: float = 0.001
    """weight of the KL divergence of the latent from its prior, beside the critics' loss; that is nearly all noise, and at the
    paper's 0.1 the latent stays without meaning"""
    autotune: bool = True
    """learn the temperature for an entropy of minus one per action (in units of the range); else it is --alpha"""
    alpha: float = 0.2
    """temperature, the price of entropy; with --autotune where it begins"""
    max_grad_norm: float = 10.0
    """largest norm of the gradient of the actor, and of critics and encoder"""
    reward_scale: float = 100.0
    """factor on the rewards that the critics see"""
    eval_every: int = 5
    """iterations between two backtests on the validation split"""
    eval_tasks: int = 40
    """with --env-id: held-out tasks of the final evaluation"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for markets whose best policy is known: without costs it looks one bar ahead.
MYOPIC = dict(
    portfolio=PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, asset_cap=2.0, scale=0.5), gamma=0.0,
)  # fmt: skip
KNOWN = {"synthetic:merton": MYOPIC, "synthetic:garleanu-pedersen": MYOPIC}

# What changes for --env-id: one task, an episode after another, as CleanRL's SAC; and tasks that hide a goal.
CLASSIC_CONTROL = dict(
    total_timesteps=25_000, num_envs=1, episodes=1, episode_length=200, buffer_size=100_000, gradient_steps=200, meta_batch=1,
    batch_size=256, anneal_lr=False, gamma=0.99, hidden=128, reward_scale=0.1, num_threads=1,
)  # fmt: skip
TEST_TASKS = {
    "Navigation2D-v0": dict(
        total_timesteps=400_000, num_envs=20, num_tasks=100, episode_length=100, gamma=0.9, reward_scale=5.0, kl_coef=0.1,
        num_threads=1,
    ),
}  # fmt: skip


class RunningNorm(nn.Module):
    """Standardises observations by the mean and variance of all seen so far; part of the model, saved with it."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x):
        delta, var = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for part in x.split(1024):  # parts that stay in the cache
            centred = part - self.mean.float()
            delta += centred.sum(dim=0, dtype=torch.float64) / len(x)
            var += centred.square_().sum(dim=0, dtype=torch.float64) / len(x)
        var.sub_(delta**2).clamp_(min=0.0)
        total = self.count + len(x)
        self.var.copy_((self.var * self.count + var * len(x) + delta**2 * self.count * len(x) / total) / total)
        self.mean.add_(delta * len(x) / total)
        self.count.copy_(total)

    def forward(self, x):
        scale = (self.var + 1e-8).rsqrt()
        return torch.addcmul((-self.mean * scale).float(), x, scale.float()).clamp_(-10.0, 10.0)


def layer_init(weight, std=np.sqrt(2)):
    """Orthogonal (in, out) weights, one matrix after the other if there are several."""
    for matrix in weight.view(-1, *weight.shape[-2:]):
        nn.init.orthogonal_(matrix, std)
    return nn.Parameter(weight)


class MLP(nn.Module):
    """`copies` networks of two hidden layers side by side, on the same input: (n, D) -> (copies, n, out)."""

    def __init__(self, size, hidden, out, copies=1, std=1.0):
        super().__init__()
        sizes, stds = (size, hidden, hidden, out), (np.sqrt(2), np.sqrt(2), std)
        self.weights = nn.ParameterList(layer_init(torch.empty(copies, a, b), s) for a, b, s in zip(sizes, sizes[1:], stds))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(copies, 1, b)) for b in sizes[1:])

    def forward(self, x, frozen=False):
        """frozen: the gradient goes to the input, not to the weights."""
        layers = [(w.detach(), b.detach()) if frozen else (w, b) for w, b in zip(self.weights, self.biases)]
        x = x.expand(len(layers[0][0]), *x.shape)
        for weight, bias in layers[:-1]:
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(layers[-1][1], x, layers[-1][0])


def confident(net, most):
    """The network of a single factor, which at first weighs as much as `most` factors of a product do: to critics that saw
    little but noise a latent would stay without meaning."""
    with torch.no_grad():
        net.biases[-1].chunk(2, dim=2)[1].fill_(math.log(most))
    return net


class ProductEncoder(nn.Module):
    """A Gaussian factor for every step of the context, whatever their order."""

    def __init__(self, size, hidden, latent, most, heads):
        super().__init__()
        self.net = MLP(size, hidden, 2 * latent)

    def forward(self, context, count):
        mean, log_precision = self.net(context.flatten(0, 1)).view(*context.shape[:2], -1).chunk(2, dim=2)
        known = torch.arange(context.shape[1], device=context.device) < count[:, None]
        return mean, log_precision.clamp(-20.0, 10.0).exp() * known[..., None]


class GRUEncoder(nn.Module):
    """One Gaussian factor for all steps of the context, read in the order of time."""

    def __init__(self, size, hidden, latent, most, heads):
        super().__init__()
        self.gru = nn.GRU(size, hidden, batch_first=True)
        self.head = confident(MLP(hidden, hidden, 2 * latent), most)

    def forward(self, context, count):
        out, _ = self.gru(context)
        last = out[torch.arange(len(out), device=out.device), (count - 1).clamp(min=0)]
        mean, log_precision = self.head(last).squeeze(0)[:, None].chunk(2, dim=2)
        return mean, log_precision.clamp(-20.0, 10.0).exp() * (count > 0)[:, None, None]


class AttentionEncoder(nn.Module):
    """One Gaussian factor for all steps of the context, whatever their order: each head's learned query pools their values."""

    def __init__(self, size, hidden, latent, most, heads):
        super().__init__()
        self.heads, self.most = heads, most
        self.embed = MLP(size, hidden, 2 * hidden)  # keys, values
        self.query = nn.Parameter(torch.randn(heads, hidden // heads))
        self.head = confident(MLP(hidden + 1, hidden, 2 * latent), most)

    def attend(self, context, count):
        """Keys' weights (n, heads, C), which sum to 1 over the steps known, and the values (n, C, heads, width)."""
        keys, values = self.embed(context.flatten(0, 1)).view(*context.shape[:2], 2, self.heads, -1).unbind(2)
        logits = torch.einsum("nchw,hw->nhc", keys, self.query) / math.sqrt(keys.shape[-1])
        known = torch.arange(context.shape[1], device=context.device) < count[:, None]
        return torch.where(known[:, None], logits, -1e8).softmax(dim=2), values

    def forward(self, context, count):
        weights, values = self.attend(context, count)
        pooled = torch.einsum("nhc,nchw->nhw", weights, values).flatten(1)
        pooled = torch.cat([pooled, (count / self.most)[:, None]], dim=1)  # a mean does not tell of how many
        mean, log_precision = self.head(pooled).squeeze(0)[:, None].chunk(2, dim=2)
        return mean, log_precision.clamp(-20.0, 10.0).exp() * (count > 0)[:, None, None]


# encoder(context (n, C, D), steps known (n,)) -> means and precisions (n, k, L) of k Gaussian factors; precision 0: unknown
ENCODERS = {"product": ProductEncoder, "gru": GRUEncoder, "attention": AttentionEncoder}


def posterior(means, precisions):
    """Mean and variance (n, L) of the prior N(0, I) times Gaussian factors: means, precisions (n, k, L), precision 0: none.

    The precision of a product is the sum of the factors', its mean their mean weighted by precision.
    """
    precision = 1.0 + precisions.sum(dim=1)
    return (precisions * means).sum(dim=1) / precision, 1.0 / precision


def divergence(mean, variance):
    """(n,) KL divergence of N(mean, variance), both (n, L), from N(0, I)."""
    return 0.5 * (mean.square() + variance - 1.0 - variance.log()).sum(dim=1)


class Agent(nn.Module):
    """Encoder, actor and twin critics; actions are in units of their range, [-1, 1].

    most: steps of the largest context. A step of a context is (o, a, r, o').
    """

    def __init__(self, obs_size, num_actions, most, args):
        super().__init__()
        self.context_size = 2 * obs_size + num_actions + 1
        self.norm = RunningNorm(obs_size)
        self.context_norm = RunningNorm(self.context_size)
        self.register_buffer("centre", torch.zeros(num_actions))  # of the actions that the actor can take
        self.register_buffer("reach", torch.ones(num_actions))
        self.encoder = ENCODERS[args.encoder](self.context_size, args.hidden, args.latent, most, args.heads)
        self.actor = MLP(obs_size + args.latent, args.hidden, 2 * num_actions, std=0.01)
        self.critic = MLP(obs_size + args.latent + num_actions, args.hidden, 1, copies=2)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)

    def infer(self, context, count):
        """Posterior mean and variance (n, L) of the task given the first `count` (n,) steps of contexts (n, C, D)."""
        context = context[:, : max(1, int(count.max()))]
        return posterior(*self.encoder(self.context_norm(context.flatten(0, 1)).view(context.shape), count))

    def policy(self, x, z):
        """Mean and log standard deviation (n, A) of an action before the tanh; the gradient does not reach the latent."""
        mean, log_std = self.actor(torch.cat([x, z.detach()], dim=1)).squeeze(0).chunk(2, dim=1)
        return mean, -5.0 + 3.5 * (log_std.tanh() + 1.0)  # from -5 to 2

    def sample(self, x, z):
        """Actions (n, A) as the policy explores, and their log-probabilities (n,); reparametrised."""
        mean, log_std = self.policy(x, z)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        logprob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        logprob = logprob - 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))  # log of the slope of tanh
        return raw.tanh(), logprob.sum(dim=1)

    @torch.no_grad()
    def act(self, obs, z, explore):
        """Actions (n, A) given observations (n, D): drawn, or those of the policy's mean."""
        x = self.norm(obs)
        return self.sample(x, z)[0] if explore else self.policy(x, z)[0].tanh()

    def unscale(self, action):
        """Actions as the environment takes them."""
        return self.centre + self.reach * action


def q_values(critic, x, z, action, frozen=False):
    """(2, n) values of actions."""
    return critic(torch.cat([x, z, action], dim=1), frozen).squeeze(2)


def make_envs(args, num_envs, split, options):
    """Instances of some tasks: markets, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if args.env_id == MARKET_ENV:
        return gym.make_vec(MARKET_ENV, num_envs, split=split, episode_length=args.episode_length, **options)
    if gym.spec(args.env_id).vector_entry_point is not None:
        return gym.make_vec(args.env_id, num_envs, vectorization_mode="vector_entry_point")
    return gym.make_vec(
        args.env_id, num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
    )


def interleave(first, second):
    """One split whose ranges 2i and 2i + 1 are ranges i of two."""
    return Split(first.name, np.stack([first.ranges, second.ranges], axis=1).reshape(-1, 2))


def derived_seed(*key):
    """A seed for environments, another one for every key of integers; market i takes it plus i."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def transition(obs, action, reward, next_obs):
    """(n, D) steps of a context: (o, a, r, o'), actions in units of their range, all else as the environment has it."""
    return torch.cat([obs, action, reward[:, None], next_obs], dim=1)


class Online:
    """Policy of a backtest that infers the task as it goes: every `every` bars, from the latest `most` of each account."""

    def __init__(self, agent, every, most):
        self.agent, self.every, self.bars = agent, every, 0
        self.steps, self.decided, self.reward = deque(maxlen=most), None, None

    @torch.no_grad()
    def __call__(self, observation, *_):
        obs = torch.as_tensor(observation).to(self.agent.reach.device)
        if self.decided is not None:
            self.steps.append(transition(*self.decided, self.reward, obs))
        if self.bars % self.every == 0:
            self.latent = self.agent.infer(*self.context(obs))[0]
        self.bars += 1
        action = self.agent.act(obs, self.latent, explore=False)
        self.decided = obs, action
        return self.agent.unscale(action).cpu().numpy()

    def context(self, obs):
        """What `Agent.infer` takes; at the start a context of no steps."""
        steps = torch.stack(tuple(self.steps), dim=1) if self.steps else obs.new_zeros((len(obs), 1, self.agent.context_size))
        return steps, torch.full((len(obs),), len(self.steps), device=obs.device)

    def after(self, reward, over):
        self.reward = torch.as_tensor(reward).to(self.agent.reach.device)


def save_checkpoint(path, content):
    """Written beside and moved into place: a kill at any moment leaves the previous checkpoint or this one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the defaults of the rest
    first.add_argument("--env-id", "--env_id", default=MARKET_ENV)
    first.add_argument("--market", default=Args.market)
    chosen, _ = first.parse_known_args()
    chosen.market = TASK_SETS.get(chosen.market, chosen.market)
    settings = next((settings for market, settings in KNOWN.items() if chosen.market.startswith(market)), {})
    settings = TEST_TASKS.get(chosen.env_id, CLASSIC_CONTROL) if chosen.env_id != MARKET_ENV else settings
    args = tyro.cli(Args, default=dataclasses.replace(Args(), **settings), config=(tyro.conf.OmitArgPrefixes,))
    args.market = TASK_SETS.get(args.market, args.market)  # run.json has it in full
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "model.pt").is_file():
            sys.exit(f"--resume {args.resume}: no model.pt there; expected a run directory with a checkpoint")
        checkpoint = torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
        args = Args(**{**saved, "portfolio": PortfolioConfig(**saved["portfolio"]), "resume": args.resume})
    for flag in (
        "num_envs", "num_tasks", "episodes", "episode_length", "buffer_size", "gradient_steps", "meta_batch", "batch_size",
        "hidden", "heads", "latent", "eval_every", "eval_tasks", "checkpoint_every",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.task_bars < 0:
        sys.exit(f"--task-bars {args.task_bars}: expected at least 0")
    for flag in ("learning_rate", "kl_coef", "patience"):
        if getattr(args, flag) < 0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 0 or more")
    for flag in ("alpha", "max_grad_norm", "reward_scale", "memory_mb"):
        if not getattr(args, flag) > 0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected above 0")
    if not 0.0 < args.tau <= 1.0:
        sys.exit(f"--tau {args.tau}: expected above 0 and at most 1")
    if not 0.0 <= args.gamma <= 1.0:
        sys.exit(f"--gamma {args.gamma}: expected 0 to 1")
    if not 0.0 < args.max_score <= 10.0:
        sys.exit(f"--max-score {args.max_score}: expected above 0 and at most 10")
    if args.encoder == "attention" and args.hidden % args.heads:
        sys.exit(f"--heads {args.heads}: expected a divisor of --hidden {args.hidden}")
    if args.reward not in ("growth", "sharpe"):
        sys.exit(f"--reward {args.reward}: expected growth or sharpe")
    is_market = args.env_id == MARKET_ENV
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    instances = 2 if is_market else 1  # of every task visited
    most = args.episodes * args.episode_length  # steps of a context
    batch_size = instances * args.num_envs * most
    num_iterations = max(1, args.total_timesteps // batch_size)

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    risk_aversion = 1.0 + 2.0 * args.penalty_variance
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, env_options, adapting, scored = None, None, None, {}, {}
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
            if args.task_bars:
                splits = {name: slices(panel, split, args.task_bars) for name, split in splits.items()}
            for name, split in splits.items():
                adapting[name], scored[name] = halves(split, args.adapt_share)
            data = PortfolioData(panel, args.portfolio)
            weights = {"log_growth": float(args.reward == "growth"), "differential_sharpe": float(args.reward == "sharpe")}
            weights |= {name: getattr(args, f"penalty_{name}") for name in ("turnover", "drawdown", "cvar", "variance")}
            env_options = dict(data=data, reward_weights=weights, cvar_alpha=args.cvar_alpha, num_threads=args.num_threads)
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
            for part in (*adapting.values(), *scored.values()):
                data.market(part)  # a part in which nothing can be decided is said now
            args.num_tasks = len(splits["train"].ranges)
        split = interleave(adapting["train"], scored["train"]) if is_market else None
        train_envs = make_envs(args, instances * args.num_envs, split, env_options)
        if not isinstance(train_envs.single_action_space, gym.spaces.Box):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected continuous actions")
        takes_tasks = is_market or "parameters" in train_envs.reset(seed=args.seed)[1]
        if args.num_tasks > 1 and not takes_tasks:
            raise ValueError(f"--num-tasks {args.num_tasks}: {args.env_id} is one task; expected 1")
        if args.num_envs > args.num_tasks:
            raise ValueError(f"--num-envs {args.num_envs}: expected at most {args.num_tasks}, the training tasks")
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(np.prod(train_envs.single_action_space.shape))
    lowest, highest = train_envs.single_action_space.low.ravel(), train_envs.single_action_space.high.ravel()
    if is_market:
        lowest, highest = np.maximum(lowest, -args.max_score), np.minimum(highest, args.max_score)
    if not np.isfinite(highest - lowest).all():
        sys.exit(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected bounded actions")
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    agent = Agent(obs_size, num_actions, most, args).to(device)
    agent.centre.copy_(torch.as_tensor(0.5 * (highest + lowest)))
    agent.reach.copy_(torch.as_tensor(0.5 * (highest - lowest)))
    target = copy.deepcopy(agent.critic).requires_grad_(False)
    inferring = [*agent.critic.parameters(), *agent.encoder.parameters()]  # what the critics' loss teaches
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)

    # Storage: what each task's critics learn from, and, apart from it, the context of each one's latest visit
    shapes = {"obs": obs_size, "actions": num_actions, "rewards": 1, "next_obs": obs_size, "terminated": 1}
    needed = 4 * args.num_tasks * (args.buffer_size * sum(shapes.values()) + most * agent.context_size) / 2**20
    if needed > args.memory_mb:
        sys.exit(f"--buffer-size {args.buffer_size}: needs {needed:.0f} MiB, more than --memory-mb {args.memory_mb:g}")
    replay = {name: torch.zeros((args.num_tasks, args.buffer_size, size), device=device) for name, size in shapes.items()}
    written = torch.zeros(args.num_tasks, dtype=torch.int64, device=device)  # steps of each task so far
    contexts = torch.zeros((args.num_tasks, most, agent.context_size), device=device)
    known = torch.zeros_like(written)  # steps in each context
    buffers = {**replay, "written": written, "contexts": contexts, "known": known}

    def update():
        """One step of Adam on all networks, each with the others as they were before it; returns what is logged."""
        seen = torch.nonzero(written).squeeze(1)
        picked = seen[torch.randint(len(seen), (args.meta_batch,), device=device)]
        at = torch.rand((args.meta_batch, args.batch_size), device=device) * written[picked, None].clamp(max=args.buffer_size)
        batch = {name: values[picked[:, None], at.long()].flatten(0, 1) for name, values in replay.items()}
        x, next_x = agent.norm(batch["obs"]), agent.norm(batch["next_obs"])
        # Any number of the context's steps, in the order of time: so the agent knows the prior too, and how it narrows
        count = (torch.rand(args.meta_batch, device=device) * (known[picked] + 1)).long()
        mean, variance = agent.infer(contexts[picked], count)
        z = (mean + variance.sqrt() * torch.randn_like(mean)).repeat_interleave(args.batch_size, dim=0)
        alpha = agent.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_logprob = agent.sample(next_x, z)
            next_q = q_values(target, next_x, z, next_action).amin(dim=0) - alpha * next_logprob
            goal = args.reward_scale * batch["rewards"].squeeze(1)
            goal += args.gamma * (1.0 - batch["terminated"].squeeze(1)) * next_q
        # The critics and the divergence alone teach the encoder (Rakelly et al., section 4.2): the actor sees a latent given
        q = q_values(agent.critic, x, z, batch["actions"])
        critic_loss, kl = (q - goal).square().mean(dim=1).sum(), divergence(mean, variance).mean()
        action, logprob = agent.sample(x, z)
        actor_loss = (alpha * logprob - q_values(agent.critic, x, z.detach(), action, frozen=True).amin(dim=0)).mean()
        alpha_loss = -(agent.log_alpha.exp() * (logprob.detach() - num_actions)).mean()  # aims at an entropy of -num_actions
        optimizer.zero_grad()
        (critic_loss + args.kl_coef * kl + actor_loss + alpha_loss).backward()
        nn.utils.clip_grad_norm_(agent.actor.parameters(), args.max_grad_norm, foreach=True)
        nn.utils.clip_grad_norm_(inferring, args.max_grad_norm, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(agent.critic.parameters()), args.tau)
            return torch.stack([actor_loss, critic_loss, kl, alpha_loss, alpha, -logprob.mean(), q.mean()])

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model, recent_returns = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}, []
    if checkpoint:
        agent.load_state_dict(checkpoint["model"])
        target.load_state_dict(checkpoint["target"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        for name, values in buffers.items():
            values.copy_(checkpoint["buffers"][name])
        recent_returns = checkpoint["recent_returns"]
        best_score, best_model = checkpoint["best_score"], checkpoint["best_model"]
        first_iteration, evals_since_best = checkpoint["iteration"] + 1, checkpoint["evals_since_best"]
        global_step, train_seconds = checkpoint["global_step"], checkpoint["train_seconds"]
        print(f"resume  {run_dir} after iteration {checkpoint['iteration']}")
    else:
        run_dir = ledger.new_run_dir(args.runs_dir, args.env_id, args.exp_name, args.seed)
    run = {
        "status": "running", "env_id": args.env_id, "args": dataclasses.asdict(args),
        **ledger.provenance(__file__, str(device)), "trials": 1,
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

    def begin(markets, seed, tasks):
        """First observations of new episodes on some tasks; and the infos."""
        obs, infos = markets.reset(seed=seed, options={"tasks": tasks} if takes_tasks else None)
        return torch.as_tensor(obs.reshape(len(obs), -1), dtype=torch.float32, device=device), infos

    def advance(markets, obs, z, explore):
        """One step of every instance: its actions, rewards, next observations (the last of an episode where one ended),
        whether it terminated and whether it is over; and the observations to go on from."""
        action = agent.act(obs, z, explore)
        next_obs, reward, term, trunc, infos = markets.step(
            agent.unscale(action).cpu().numpy().reshape(markets.action_space.shape)
        )
        next_obs, over = next_obs.reshape(len(obs), -1), term | trunc
        last = next_obs.copy()
        if over.any():
            last[over] = np.stack(infos["final_obs"][over]).reshape(-1, obs.shape[1])
        reward, last, term, over, next_obs = (
            torch.as_tensor(values, device=device) for values in (reward.astype(np.float32), last, term, over, next_obs)
        )
        return action, reward, last.float(), term.float(), over, next_obs.float()

    def play(markets, obs, z, explore):
        """An episode of every instance, of at most --episode-length steps: returns (n,), and each step with whether its
        instance was still in it."""
        total, alive, steps = torch.zeros(len(obs), device=device), torch.ones(len(obs), dtype=torch.bool, device=device), []
        for _ in range(args.episode_length):
            action, reward, last, _, over, next_obs = advance(markets, obs, z, explore)
            steps.append((transition(obs, action, reward, last), alive))
            total, alive, obs = total + reward * alive, alive & ~over, next_obs
            if not alive.any():
                break
        return total, steps

    def acting(z):
        """Policy for backtests that takes the task of every market for its latent in z (n, L)."""
        return lambda obs, *_: agent.unscale(agent.act(torch.as_tensor(obs).to(device), z, explore=False)).cpu().numpy()

    def backtest(split, policy=None):
        """Ledger of a split from the start to the end of each range; the agent infers the task from its own past there."""
        policy = policy or Online(agent, args.episode_length, most)
        return portfolio_references.run(split=splits[split], policy=policy, **env_options)

    @torch.no_grad()
    def adaptation(split):
        """Held-out tasks after 0, 1, ... episodes of context: scores and completion (tasks, stages), at the posterior's mean;
        the posteriors' means and variances, both (stages, tasks, L); the contexts, with their counts; the tasks' parameters."""
        number = len(adapting[split].ranges) if is_market else args.eval_tasks
        tasks = np.arange(number) if is_market else HELD_OUT + (split == "test") * number + np.arange(number)
        markets = make_envs(args, number, adapting.get(split), env_options)
        context = torch.zeros((number, most, agent.context_size), device=device)
        count = torch.zeros(number, dtype=torch.int64, device=device)
        scores, completed, posteriors = [], [], []
        for stage in range(args.episodes + 1):
            mean, variance = agent.infer(context, count)
            posteriors.append((mean, variance))
            if is_market:
                frame = portfolio_references.run(split=scored[split], policy=acting(mean), **env_options)
                frame["growth"] = ledger.growth(frame) * panel.bars_per_year
                by_task = frame.groupby("market").agg({"growth": "mean", "equity": "min"})
                scores.append(by_task["growth"])
                completed.append(np.isfinite(by_task["growth"]) & (by_task["equity"] > RUIN))
            else:
                scores.append(play(markets, begin(markets, derived_seed(args.seed, 0), tasks)[0], mean, explore=False)[0].cpu())
                completed.append(torch.isfinite(scores[-1]))
            if stage < args.episodes:
                obs, infos = begin(markets, derived_seed(args.seed, 0, stage + 1), tasks)
                _, steps = play(markets, obs, mean + variance.sqrt() * torch.randn_like(mean), explore=True)
                for step, alive in steps:
                    at = torch.nonzero(alive).squeeze(1)
                    context[at, count[at]] = step[at]
                    count[at] += 1
        means, variances = (torch.stack(part) for part in zip(*posteriors))
        return (*(np.stack(part, axis=1) for part in (scores, completed)), means, variances, context, count,
                infos.get("parameters", {}))  # fmt: skip

    started, failure = time.time(), None
    episode_return = torch.zeros(args.num_envs, device=device)
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, mininterval=0.5)
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)

        # Visit some tasks. On markets each by two instances, which know the same latent: the context comes from the first part
        # of its history, what is learned from it from the second, as it will be in evaluation
        # (Environments begin anew by a seed of the iteration's own, so that no checkpoint needs their state.)
        visited = torch.randperm(args.num_tasks)[: args.num_envs]
        ranges = torch.cat([2 * visited, 2 * visited + 1]) if is_market else visited
        shown, learned = slice(args.num_envs), slice(-args.num_envs, None)
        obs, _ = begin(train_envs, derived_seed(args.seed, iteration), ranges.numpy())
        visited = visited.to(device)
        known[visited], finished_returns, seen = 0, [], []
        episode_return.zero_()
        for step in range(most):
            if step % args.episode_length == 0:
                with torch.no_grad():
                    mean, variance = agent.infer(contexts[visited], known[visited])
                z = (mean + variance.sqrt() * torch.randn_like(mean)).repeat(instances, 1)
            action, reward, last, term, over, next_obs = advance(train_envs, obs, z, explore=True)
            contexts[visited, step] = transition(obs, action, reward, last)[shown]
            known[visited] += 1
            at = written[visited] % args.buffer_size
            new = (obs, action, reward[:, None], last, term[:, None])
            for values, rows in zip(replay.values(), new, strict=True):
                values[visited, at] = rows[learned]
            written[visited] += 1
            seen.append(obs)
            obs, episode_return = next_obs, episode_return + reward[learned]
            finished_returns.extend(episode_return[over[learned]].tolist())
            episode_return[over[learned]] = 0.0
        agent.norm.update(torch.cat(seen))
        agent.context_norm.update(contexts[visited].flatten(0, 1))
        global_step += batch_size
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Learn
        statistics = torch.zeros(len(LOGGED), device=device)
        for _ in range(args.gradient_steps):
            statistics += update()
        losses = dict(zip(LOGGED, (statistics / args.gradient_steps).tolist()))
        train_seconds += time.perf_counter() - tick

        # Fail-safe: stop cleanly, and say where
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            failure = f"diverged in iteration {iteration} (step {global_step}): {', '.join(bad)} not finite"
            break

        # Logging
        sps = int(global_step / train_seconds)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", sps, global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(batch_size)

        # Validation: choose the model here, never on the test split
        if is_market and (iteration % args.eval_every == 0 or iteration == num_iterations):
            score = portfolio_references.utility(backtest("val"), risk_aversion, panel.bars_per_year)
            writer.add_scalar("eval/val_utility", score, global_step)
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best = score, 0
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
        stop_early = args.patience > 0 and evals_since_best >= args.patience
        if iteration % args.checkpoint_every == 0 or iteration == num_iterations or stop_early:
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "iteration": num_iterations if stop_early else iteration,
                "global_step": global_step, "train_seconds": train_seconds,
                "model": agent.state_dict(), "target": target.state_dict(), "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "buffers": buffers, "recent_returns": recent_returns, "best_score": best_score, "best_model": best_model,
                "evals_since_best": evals_since_best,
            })  # fmt: skip
        if stop_early:
            print(f"\nstopped early: no better validation score in {evals_since_best} backtests")
            break
    progress.close()
    writer.close()

    # Final report: the chosen model on every split; the test split is read here for the first and only time
    run |= {
        "status": "failed" if failure else "finished", "failure": failure, "env_steps": global_step,
        "train_seconds": train_seconds, "wall_clock": time.time() - started, "sps": global_step / max(train_seconds, 1e-9),
        "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None, "val_utility": best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    if is_market:
        agent.load_state_dict(best_model)
        frames = {split: backtest(split) for split in splits}
        prior = torch.zeros((len(splits["test"].ranges), args.latent), device=device)
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        compared = {"agent": frames["test"], "unadapted": backtest("test", acting(prior))}
        compared |= portfolio_references.references(data, splits["test"], risk_aversion)
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
    elif recent_returns:
        print(f"\nmean return of the last {len(recent_returns)} episodes of training: {run['last_100_returns']:.4g}")

    # Adaptation to held-out tasks; who does not adapt takes the task for the prior's mean
    returns, completed, means, variances, context, count, truth = adaptation("test")
    _, _, val_means, _, _, _, val_truth = adaptation("val")
    run["adaptation"] = adaptation_report(returns, returns[:, 0], completed, args.seed)
    if is_market:
        run["adaptation"]["sharpe_by_regime"] = sharpe_by_regime(frames["test"], panel, splits["test"].ranges)
    run["latent"] = {
        "kl": [float(divergence(*stage).mean()) for stage in zip(means, variances)],
        "spread": means.std(dim=1, correction=0).tolist(), "std": variances.sqrt().mean(dim=1).tolist(),
    }  # fmt: skip
    run["probe"] = {
        name: [linear_probe(a, val_truth[name], b, truth[name]) for a, b in zip(val_means.cpu(), means.cpu())] for name in truth
    }
    print_adaptation(run["adaptation"])
    print(f"scores: {'net log growth per year' if is_market else 'return of an episode'}")
    print(
        f"\nlatent: KL from the prior; largest deviation of its mean between tasks; read off it by a linear map: {list(truth)}"
    )
    for stage, (kl, spread) in enumerate(zip(run["latent"]["kl"], run["latent"]["spread"])):
        print(f"after {stage}{'':18}{kl:7.2f}{max(spread):7.2f}", *(f"{r2[stage]:6.2f}" for r2 in run["probe"].values()))
    if args.encoder == "attention":
        with torch.no_grad():
            steps = agent.context_norm(context.flatten(0, 1)).view(context.shape)
            weights, _ = agent.encoder.attend(steps, count)
        share = torch.special.entr(weights).sum(dim=2).exp() / count[:, None]
        run["latent"]["attention"] = share.mean(dim=0).tolist()  # 1: all steps alike
        print(
            f"attention: a head's weights are spread over {', '.join(f'{x:.0%}' for x in run['latent']['attention'])} of them"
        )
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
