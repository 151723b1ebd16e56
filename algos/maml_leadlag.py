"""MAML (Finn et al. 2017, arXiv:1703.03400) with ProMP's outer loop (Rothfuss et al. 2019, arXiv:1810.06784): weights that a
gradient step or two on a new market's own episodes make a strategy for its regime."""

import argparse
import dataclasses
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# Threads that wait spin only briefly: with libgomp's default one busy neighbour makes training ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matrix products are refused on CUDA
import gymnasium as gym
import numba
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs  # noqa: F401  (registers the environments)
from envs import ledger, references
from envs.adaptation import adaptation_report, print_adaptation, sharpe_by_regime
from envs.costs import RUIN
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.synthetic import load_market
from envs.tasks import HELD_OUT, TASK_SETS, halves, slices

MARKET_ENV = "LeadLag-v0"
DIVERGED = 1e6  # losses and KL divergences that no step of a policy has; where tanh saturates nothing need overflow
EVALUATION = 0  # where the seeds of training have the iteration, from 1


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
    """LeadLag-v0, or the id of a task whose reset takes options={"tasks": ...}, to check the algorithm: Navigation2D-v0"""
    market: str = TASK_SETS["bull-bear"]
    """bull-bear, mixed or planted-lag, sets of tasks (envs/tasks.py); or any market, of which each range of bars is a task:
    sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...]; with the prefix shuffled:,
    bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py)"""
    symbols: tuple[str, ...] = ()
    """symbols of the market to keep (all by default)"""
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
    leadlag: LeadLagConfig = field(default_factory=LeadLagConfig)
    """costs, fill and signal"""
    actions: str = "absolute"
    """absolute (one of the lookbacks), delta (shorter, same, longer) or hybrid (both)"""
    max_jump: int = 0
    """most steps on the grid of lookbacks in one bar (0: no limit)"""
    task_bars: int = 0
    """bars of each task that the ranges of a split are cut into, for a market of one history (0: each range is a task)"""
    adapt_share: float = 0.5
    """share of each history, its beginning, to adapt on; what comes after is to be earned in"""

    total_timesteps: int = 4_000_000
    """steps of all markets together, before and after adaptation"""
    tasks_per_batch: int = 20
    """tasks in an iteration"""
    episodes_per_task: int = 20
    """markets of each, which run at once, for one episode before every update and one after the last"""
    num_steps: int = 64
    """bars in an episode, which starts at a random bar"""
    hidden: int = 64
    """units of each of the two layers"""
    inner_steps: int = 1
    """updates for a task, in training"""
    inner_lr: float = 3.0
    """step size of the first update; advantages are standardised, and say little of a single bar"""
    further_lr: float = 3.0
    """step size of the second one"""
    further_decay: float = 1.0
    """factor on the step size from each further one to the next"""
    first_order: bool = False
    """leave out how the inner gradient depends on the weights (FOMAML)"""
    updates: int = 3
    """updates for a task, in evaluation"""
    eval_tasks: int = 40
    """with --env-id: held-out tasks of the final evaluation"""
    eval_episodes: int = 20
    """with --env-id: episodes of each of them for every update there"""
    log_std: float = -0.5
    """with continuous actions: initial log standard deviation, where 1 is half the width of the action space"""
    learning_rate: float = 3e-3
    """learning rate of Adam, which updates the weights that adaptation starts from"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.5
    """discount factor; today's lookback moves little beyond tomorrow"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    update_epochs: int = 5
    """passes over each iteration's episodes; with a single one no ratio would ever be clipped"""
    clip_coef: float = 0.3
    """clipping of the probability ratio after adaptation"""
    kl_coef: float = 5e-4
    """penalty on the KL divergence of the weights' own policy from the one that sampled"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    eval_every: int = 20
    """iterations between two evaluations on the validation split; with --env-id the mean adapted return of them is looked at"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for --env-id: the published protocol of 2D navigation (100 units twice, 20 episodes of 100 steps, step size 0.1),
# but two updates in training, 40 episodes in evaluation, and smaller further steps: standardised advantages do not shrink as
# the goal comes near, so that the published 0.05 overshoots.
TEST_TASK = dict(
    total_timesteps=96_000_000, tasks_per_batch=40, num_steps=100, hidden=100, inner_steps=2, inner_lr=0.1, further_lr=0.03,
    further_decay=0.5, eval_episodes=40, learning_rate=1.5e-3, gamma=0.99, gae_lambda=1.0, patience=4,
)  # fmt: skip


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


def draw(p, generator=None):
    """(...,) actions drawn with probabilities p (..., A), which need not quite sum to 1; one without probability never is."""
    if p.device.type == "cpu":  # inverts the distribution
        cumulative = p.cumsum(dim=-1)
        drawn = torch.rand((*p.shape[:-1], 1), device=p.device, generator=generator) * cumulative[..., -1:]
        return (cumulative <= drawn).sum(dim=-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)  # cumsum is not deterministic there


class Agent(nn.Module):
    """A policy, and how it looks with weights of their own for each of K tasks: a dict of tensors with K in front.

    Masked discrete actions, or Gaussian scores (A,), of which -1 and 1 are the ends of the action space.
    """

    def __init__(self, obs_size, num_actions, continuous, hidden, log_std):
        super().__init__()
        self.norm, self.continuous = RunningNorm(obs_size), continuous
        self.weights = nn.ParameterDict()
        for n, (size, out) in enumerate(pairwise((obs_size, hidden, hidden, num_actions))):
            self.weights[f"weight{n}"] = nn.init.orthogonal_(torch.empty(size, out), 0.01 if n == 2 else 2**0.5)
            self.weights[f"bias{n}"] = torch.zeros(out)
        if continuous:
            self.weights["log_std"] = torch.full((num_actions,), float(log_std))

    def for_tasks(self, tasks):
        """The weights, once for each task: name -> (K, ...)."""
        return {name: p.expand(tasks, *p.shape) for name, p in self.weights.items()}

    def outputs(self, params, x):
        """(K, M, A) logits or means, of normalised observations x (K, M, D) under the weights of their task."""
        for n in range(3):
            x = torch.baddbmm(params[f"bias{n}"][:, None], x, params[f"weight{n}"])
            x = x.tanh() if n < 2 else x
        return x

    def log_prob(self, params, x, mask, actions):
        """(K, M) log-probability of actions (K, M), or log-density, summed over A, of scores (K, M, A)."""
        out = self.outputs(params, x)
        if self.continuous:
            log_std = params["log_std"][:, None]
            return (-0.5 * ((actions - out) * (-log_std).exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(dim=2)
        return torch.where(mask, out, -1e8).log_softmax(dim=2).gather(2, actions[..., None]).squeeze(2)

    def sample(self, params, x, mask, generator=None):
        """Actions (K, M) or scores (K, M, A), drawn."""
        out = self.outputs(params, x)
        if self.continuous:
            noise = torch.randn(out.shape, generator=generator, device=out.device)
            return out + params["log_std"][:, None].exp() * noise
        return draw(torch.where(mask, out, -1e8).softmax(dim=2), generator)

    def act_greedily(self, params, x, mask):
        return torch.where(mask, self.outputs(params, x), -1e8).argmax(dim=2)


class Batch(NamedTuple):
    """An episode in each of E markets for each of K tasks: M = T * E steps a task, step by step."""

    obs: torch.Tensor  # (K, M, D)
    x: torch.Tensor  # (K, M, D) the same, normalised
    mask: torch.Tensor  # (K, M, A) bool
    actions: torch.Tensor  # (K, M), or scores (K, M, A)
    logprobs: torch.Tensor  # (K, M) when they were drawn
    advantages: torch.Tensor  # (K, M)
    weight: torch.Tensor  # (K, M) 1 / number of the task's steps that count; 0 after the end of an episode
    returns: torch.Tensor  # (K, E) sum of rewards


def linear_values(x, targets, counts):
    """(K, T, E) values of normalised observations x (K, T, E, D): for each task the least-squares fit to `targets` (K, T, E).

    The linear feature baseline (Duan et al. 2016, arXiv:1604.06778): observations, their squares and powers of time. A critic
    would have to be adapted too; this one is the best of its kind on every batch, at once. counts: bool, steps to fit.
    """
    time = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[None, :, None, None] / 100.0
    powers = [(time**n).expand(*x.shape[:3], 1) for n in range(4)]
    features = torch.cat([x.double(), x.double() ** 2, *powers], dim=3).flatten(1, 2)
    seen = features * counts.flatten(1)[..., None]
    gram = seen.mT @ features + 1e-5 * torch.eye(features.shape[2], device=x.device, dtype=torch.float64)
    fit = torch.linalg.solve(gram, seen.mT @ targets.double().flatten(1)[..., None])
    return (features @ fit).view(targets.shape).float()


def estimate_advantages(x, rewards, counts, gamma, gae_lambda):
    """(K, T, E) advantages, standardised over each task's steps that count, of normalised observations x (K, T, E, D).

    An episode is all there is: after its end, or the end of the rollout, nothing is to be earned.
    """
    after = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)

    def accumulate(terms, factor):
        out, running = torch.zeros_like(terms), torch.zeros_like(terms[:, 0])
        for step in reversed(range(terms.shape[1])):
            running = terms[:, step] + factor * after[:, step] * running
            out[:, step] = running
        return out

    values = linear_values(x, accumulate(rewards, gamma), counts)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1) * after
    advantages = accumulate(rewards + gamma * following - values, gamma * gae_lambda)
    number = counts.sum(dim=(1, 2), keepdim=True)
    advantages = (advantages - (advantages * counts).sum(dim=(1, 2), keepdim=True) / number) * counts
    return advantages / ((advantages**2).sum(dim=(1, 2), keepdim=True) / number).sqrt().clamp(min=1e-8)


def rollout(agent, params, markets, tasks, seed, args, generator=None):
    """A Batch of episodes in `tasks` (K,), each under its own weights; seed: of the markets, generator: of the actions."""
    device, steps = agent.norm.mean.device, args.num_steps
    shape = (len(tasks), markets.num_envs // len(tasks))
    space, size = markets.single_action_space, markets.single_observation_space.shape[0]
    number = space.shape[0] if agent.continuous else int(space.n)
    obs = torch.zeros((steps + 1, markets.num_envs, size))
    masks = torch.ones((steps + 1, markets.num_envs, number), dtype=torch.bool)
    rewards = torch.zeros((steps, markets.num_envs))
    counts = torch.ones((steps + 1, markets.num_envs), dtype=torch.bool)
    taken = []
    first_obs, infos = markets.reset(seed=seed, options={"tasks": np.repeat(tasks, shape[1])})
    obs[0] = torch.as_tensor(first_obs)
    for step in range(steps):
        if "action_mask" in infos:
            masks[step] = torch.as_tensor(infos["action_mask"])
        with torch.no_grad():
            x = agent.norm(obs[step].to(device)).view(*shape, size)
            action = agent.sample(params, x, masks[step].to(device).view(*shape, number), generator)
        taken.append(action)
        action = action.flatten(0, 1).cpu().numpy()
        if agent.continuous:
            middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
            action = (middle + half * action).clip(space.low, space.high)
        next_obs, reward, terminated, truncated, infos = markets.step(action)
        obs[step + 1], rewards[step] = torch.as_tensor(next_obs), torch.as_tensor(reward)
        counts[step + 1] = counts[step] & ~torch.as_tensor(terminated | truncated)

    def by_task(rows):  # (T, K * E, ...) -> (K, T, E, ...)
        return rows.view(steps, *shape, *rows.shape[2:]).transpose(0, 1).to(device)

    rewards, counts = by_task(rewards * counts[:-1]), by_task(counts[:-1])
    with torch.no_grad():
        x = agent.norm(obs[:-1].to(device).flatten(0, 1)).view(steps, *shape, size).transpose(0, 1)
        advantages = estimate_advantages(x, rewards, counts, args.gamma, args.gae_lambda)
        weight = counts / counts.sum(dim=(1, 2), keepdim=True)
        steps_of = [by_task(obs[:-1]), x, by_task(masks[:-1]), torch.stack(taken, dim=1), advantages, weight]
        obs, x, masks, actions, advantages, weight = (rows.flatten(1, 2) for rows in steps_of)
        logprobs = agent.log_prob(params, x, masks, actions)
    return Batch(obs, x, masks, actions, logprobs, advantages, weight, rewards.sum(dim=1))


def step_size(args, n):
    """Of the update after n others."""
    return args.inner_lr if n == 0 else args.further_lr * args.further_decay ** (n - 1)


def inner_update(agent, params, batch, size, create_graph=False):
    """The weights (name -> (K, ...)) one policy gradient step later, each task's on its own episodes; and the logratio (K, M).

    The surrogate is the ratio of probabilities times the advantage: its first derivative is the policy gradient, and, unlike
    with log-probabilities, its second one is right too (Rothfuss et al. 2019, section 4). create_graph: for a derivative of
    the result with respect to the weights before. The logratio can be derived in any case.
    """
    logratio = agent.log_prob(params, batch.x, batch.mask, batch.actions) - batch.logprobs
    surrogate = (batch.weight * logratio.exp() * batch.advantages).sum()
    gradient = torch.autograd.grad(surrogate, list(params.values()), retain_graph=True, create_graph=create_graph)
    return {name: p + size * g for (name, p), g in zip(params.items(), gradient)}, logratio


def meta_loss(agent, batches, query, args):
    """ProMP's objective (Rothfuss et al. 2019, eq. 14), to be minimised, and its statistics (4,).

    batches: before each of the updates, as sampled by the weights of that moment; query: after the last one. All is a function
    of the agent's weights as they are now. With several updates what is earned after each of them counts alike (Antoniou et
    al. 2019, arXiv:1810.09502, section 4): else only the last would be learned to help. The KL divergence of the sampling
    policy from the agent's own is estimated from the sample, as (r - 1) - log r.
    """
    params, logratios = agent.for_tasks(len(query.x)), []
    for n, batch in enumerate(batches):
        params, logratio = inner_update(agent, params, batch, step_size(args, n), create_graph=not args.first_order)
        logratios.append(logratio)
    logratios.append(agent.log_prob(params, query.x, query.mask, query.actions) - query.logprobs)
    kl = (batches[0].weight * (logratios[0].exp() - 1 - logratios[0])).sum() / len(query.x)
    pg_loss = 0.0
    for batch, logratio in zip((*batches[1:], query), logratios[1:]):
        ratio = logratio.exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        gains = torch.min(ratio * batch.advantages, clipped * batch.advantages)
        pg_loss = pg_loss - (batch.weight * gains).sum() / (len(query.x) * len(batches))
    with torch.no_grad():
        approx_kl = (query.weight * (ratio - 1 - logratio)).sum() / len(query.x)
        clip_fraction = (query.weight * ((ratio - 1).abs() > args.clip_coef)).sum() / len(query.x)
    return pg_loss + args.kl_coef * kl, torch.stack([pg_loss.detach(), kl.detach(), approx_kl, clip_fraction])


def make_envs(args, data, split, tasks):
    """Markets of a split, or points of a test task: --episodes-per-task for each of `tasks` tasks."""
    if args.env_id != MARKET_ENV:
        return gym.make_vec(args.env_id, tasks * args.episodes_per_task)
    return gym.make_vec(
        MARKET_ENV, tasks * args.episodes_per_task, data=data, split=split, actions=args.actions, max_jump=args.max_jump,
        episode_length=args.num_steps, num_threads=args.num_threads,
    )  # fmt: skip


def derived_seed(*key):
    """A seed for environments, another one for every key of integers; market i takes it plus i."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def save_checkpoint(path, content):
    """Written beside and moved into place: a kill at any moment leaves the previous checkpoint or this one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the defaults of the rest
    first.add_argument("--env-id", "--env_id", default=MARKET_ENV)
    chosen, _ = first.parse_known_args()
    settings = TEST_TASK if chosen.env_id != MARKET_ENV else {}
    args = tyro.cli(Args, default=dataclasses.replace(Args(), **settings), config=(tyro.conf.OmitArgPrefixes,))
    args.market = TASK_SETS.get(args.market, args.market)  # run.json has it in full
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "model.pt").is_file():
            sys.exit(f"--resume {args.resume}: no model.pt there; expected a run directory with a checkpoint")
        checkpoint = torch.load(run_dir / "model.pt", weights_only=True)
        saved = checkpoint["args"]
        args = Args(**{**saved, "leadlag": LeadLagConfig(**saved["leadlag"]), "resume": args.resume})
    for flag in (
        "tasks_per_batch", "episodes_per_task", "num_steps", "hidden", "inner_steps", "updates", "eval_tasks",
        "eval_episodes", "update_epochs",
        "eval_every", "checkpoint_every",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.task_bars < 0:
        sys.exit(f"--task-bars {args.task_bars}: expected at least 0")
    is_market = args.env_id == MARKET_ENV
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    batch_size = args.tasks_per_batch * args.episodes_per_task * args.num_steps * (args.inner_steps + 1)
    num_iterations = max(1, args.total_timesteps // batch_size)

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, parts = None, None, None
    try:
        if is_market:
            panel = load_market(
                args.market, args.seed, symbols=args.symbols or None, start=args.start,
                end=args.end, resample=args.resample,
            )  # fmt: skip
            if args.folds:
                if not 0 <= args.fold < args.folds:
                    raise ValueError(f"--fold {args.fold}: expected 0 to {args.folds - 1}, for --folds {args.folds}")
                splits = panel.walk_forward(args.folds, val_fraction=args.val_fraction, embargo=args.embargo)[args.fold]
            else:
                splits = panel.split(args.train_fraction, args.val_fraction, args.embargo)
            data = LeadLagData(panel, args.leadlag)
            if args.task_bars:
                splits = {name: slices(panel, split, args.task_bars) for name, split in splits.items()}
            parts = {name: halves(split, args.adapt_share) for name, split in splits.items()}
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
        adapt_envs = make_envs(args, data, parts and parts["train"][0], args.tasks_per_batch)
        query_envs = make_envs(args, data, parts and parts["train"][1], args.tasks_per_batch) if is_market else adapt_envs
        space = adapt_envs.single_action_space
        continuous = isinstance(space, gym.spaces.Box)
        tasks_known = is_market or "parameters" in adapt_envs.reset(seed=args.seed)[1]
        if not tasks_known or not isinstance(space, gym.spaces.Box | gym.spaces.Discrete):
            raise ValueError(f"--env-id {args.env_id}: expected {MARKET_ENV} or a task such as Navigation2D-v0")
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    obs_size = adapt_envs.single_observation_space.shape[0]
    agent = Agent(obs_size, space.shape[0] if continuous else int(space.n), continuous, args.hidden, args.log_std).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    # Start, or go on from the checkpoint. Every iteration begins new episodes, so that the environments need not be saved.
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    recent_returns, adapted_returns = [], []  # of the last episodes; of every iteration since the last look, its mean
    if checkpoint:
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        recent_returns, adapted_returns = checkpoint["recent_returns"], checkpoint["adapted_returns"]
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

    def adapt(envs, tasks):
        """The weights of held-out tasks (K,) after 0, 1, ... --updates updates. Training does not notice: its random numbers
        are not touched."""
        noise = torch.Generator(device).manual_seed(args.seed)
        stages = [{name: p.detach() for name, p in agent.for_tasks(len(tasks)).items()}]
        for n in range(args.updates):
            batch = rollout(agent, stages[-1], envs, tasks, derived_seed(args.seed, EVALUATION, n), args, noise)
            before = {name: p.clone().requires_grad_() for name, p in stages[-1].items()}
            after, _ = inner_update(agent, before, batch, step_size(args, n))
            stages.append({name: p.detach() for name, p in after.items()})
        return stages

    def adapt_to(split):
        """The same of the histories of a split, on their first parts."""
        envs = make_envs(args, data, parts[split][0], len(splits[split].ranges))
        return adapt(envs, np.arange(len(splits[split].ranges)))

    def policy_of(early, late=None, begins=0):
        """The most likely actions in K markets under weights `early` (name -> (K, ...)), from row `begins` on under `late`."""

        def policy(observation, mask, rows):
            with torch.no_grad():
                x = agent.norm(torch.as_tensor(observation).to(device))[:, None]
                allowed = torch.as_tensor(mask).to(device)[:, None]
                choices = [agent.act_greedily(p, x, allowed).squeeze(1).cpu().numpy() for p in (early, late or early)]
            return np.where(rows < begins, *choices)

        return policy

    def backtest(split, policy):
        return references.run(data, split, policy, actions=args.actions, max_jump=args.max_jump)

    def earned(split, params):
        """(K,) net log growth of every history's second part, and whether it was finished."""
        frame = backtest(parts[split][1], policy_of(params))
        grown = frame.assign(growth=ledger.growth(frame)).groupby("market")
        last = grown["equity"].last().to_numpy()
        return grown["growth"].sum().to_numpy(), np.isfinite(last) & (last > RUIN)

    started, failure = time.time(), None
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, mininterval=0.5)
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)

        # Rollouts: episodes before each update, then after the last one, in the later part of the same histories
        rng = np.random.default_rng([args.seed, iteration])
        known = len(parts["train"][0].ranges) if is_market else HELD_OUT
        tasks = rng.choice(known, args.tasks_per_batch, replace=known < args.tasks_per_batch)
        params, batches = agent.for_tasks(args.tasks_per_batch), []
        for n in range(args.inner_steps):
            batch = rollout(agent, params, adapt_envs, tasks, derived_seed(args.seed, iteration, n), args)
            params, _ = inner_update(agent, params, batch, step_size(args, n))
            batches.append(batch)
        query = rollout(agent, params, query_envs, tasks, derived_seed(args.seed, iteration, args.inner_steps), args)
        global_step += batch_size
        recent_returns = (recent_returns + query.returns.flatten().tolist())[-100:]
        adapted_returns.append(query.returns.mean().item())

        # Update
        statistics = torch.zeros(4, device=device)
        for _ in range(args.update_epochs):
            loss, found = meta_loss(agent, batches, query, args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
            optimizer.step()
            statistics += found
        for batch in (*batches, query):
            agent.norm.update(batch.obs.flatten(0, 1))  # after the update: the first ratio is exactly 1
        names = ("policy_loss", "inner_kl", "approx_kl", "clipfrac")
        losses = dict(zip(names, (statistics / args.update_epochs).tolist()))
        train_seconds += time.perf_counter() - tick

        # Fail-safe: stop cleanly, and say where
        bad = [name for name, value in losses.items() if not abs(value) < DIVERGED]
        bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            failure = f"diverged in iteration {iteration} (step {global_step}): {', '.join(bad)} not finite, or absurd"
            break

        # Logging
        sps = int(global_step / train_seconds)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", sps, global_step)
        writer.add_scalar("charts/episodic_return", query.returns.mean(), global_step)
        writer.add_scalar("charts/unadapted_return", batches[0].returns.mean(), global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        progress.set_postfix_str(
            f"{sps} steps/s, return {batches[0].returns.mean():.4g}, adapted {query.returns.mean():.4g}", refresh=False
        )
        progress.update(batch_size)

        # Validation: choose the model here, never on the test split; of a test task by what it earned in training
        if iteration % args.eval_every == 0 or iteration == num_iterations:
            score, adapted_returns = float(np.mean(adapted_returns)), []
            if is_market:
                growths, _ = earned("val", adapt_to("val")[-1])
                score = float(growths.mean())
                writer.add_scalar("eval/val_growth", score, global_step)
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best = score, 0
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
        stop_early = args.patience > 0 and evals_since_best >= args.patience
        if iteration % args.checkpoint_every == 0 or iteration == num_iterations or stop_early:
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "iteration": num_iterations if stop_early else iteration,
                "global_step": global_step, "train_seconds": train_seconds,
                "model": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "recent_returns": recent_returns, "adapted_returns": adapted_returns, "best_score": best_score,
                "best_model": best_model, "evals_since_best": evals_since_best,
            })  # fmt: skip
        if stop_early:
            print(f"\nstopped early: no better validation score in {evals_since_best} evaluations")
            break
    progress.close()
    writer.close()

    # Final report: the chosen model on held-out tasks; the test split is read here for the first and only time
    run |= {
        "status": "failed" if failure else "finished", "failure": failure, "env_steps": global_step,
        "train_seconds": train_seconds, "wall_clock": time.time() - started, "sps": global_step / max(train_seconds, 1e-9),
        "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None,
        "val_growth": best_score if is_market else None,
        "best_adapted_return": None if is_market else best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    agent.load_state_dict(best_model)
    if is_market:
        frames = {}
        for split in splits:
            stages, begins = adapt_to(split), parts[split][1].ranges[:, 0]
            frames[split] = backtest(splits[split], policy_of(stages[0], stages[-1], begins))
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        scored = [earned("test", params) for params in stages]
        compared = {"agent": frames["test"], "unadapted": backtest(splits["test"], policy_of(stages[0]))}
        compared |= references.references(data, splits, args.seed, num_threads=args.num_threads)
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(frames[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'drawdown':>10}{'turnover':>10}{'cost':>8}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:22}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['max_drawdown']:10.1%}", end="")
            print(f"{s['turnover']:9.0f}x{s['cost']:8.1%}")
    else:
        tasks = HELD_OUT + np.arange(args.eval_tasks)  # held out
        sizes = dataclasses.replace(args, episodes_per_task=args.eval_episodes)
        envs, scored = make_envs(sizes, None, None, args.eval_tasks), []
        for params in adapt(envs, tasks):
            noise = torch.Generator(device).manual_seed(args.seed + 1)  # the same for every stage
            returns = rollout(agent, params, envs, tasks, derived_seed(args.seed, EVALUATION), args, noise).returns
            scored.append((returns.mean(dim=1).cpu().numpy(), torch.isfinite(returns).all(dim=1).cpu().numpy()))
    returns, completed = (np.stack(rows, axis=1) for rows in zip(*scored))
    run["adaptation"] = adaptation_report(returns, returns[:, 0], completed, args.seed)
    if is_market:
        later = parts["test"][1]
        run["adaptation"]["sharpe_by_regime"] = sharpe_by_regime(backtest(later, policy_of(stages[-1])), panel, later.ranges)
    print_adaptation(run["adaptation"])
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
