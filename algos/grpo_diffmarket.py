"""GRPO (Shao et al. 2024, arXiv:2402.03300) and pathwise gradients on a differentiable market: portfolio weights."""

import argparse
import copy
import dataclasses
import hashlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

# Threads that wait spin only briefly: with libgomp's default one busy neighbour makes training ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matrix products are refused on CUDA
import numba
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import dataset_writer, ledger, portfolio_references
from envs.candles import ohlc_features, wavelet_features
from envs.costs import RUIN
from envs.diffmarket import Account, DiffMarket, deleverage
from envs.neutral import clusters, factor_loadings, market_beta, neutralise, pairs
from envs.portfolio import PortfolioVectorEnv
from envs.portfolio_tables import LONG_ONLY, WARMUP, PortfolioConfig, PortfolioData
from envs.scenarios import Scenario, stress_panel
from envs.synthetic import load_market
from envs.task import describe_task, provenance

MARKET_ENV = "Portfolio-v0"  # whose kernel keeps the ledger; training runs on its copy in torch


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the run; the script's by default"""
    seed: int = 1
    """seed of the networks, the windows and, on markets that are drawn, of the panel"""
    torch_deterministic: bool = True
    """use deterministic algorithms, so that the same seed on the same machine gives the same bits"""
    cuda: bool = True
    """train on a GPU where there is one"""
    num_threads: int = 0
    """CPU threads of torch and of the market kernels (0: all cores this process may use)"""
    amp: bool = False
    """on CUDA: networks in bfloat16; the accounts stay in float32"""
    compile: bool = False
    """compile the step of policy and market (needs a C++ compiler on a CPU): starts a minute later, then three times as fast"""
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
    """folder to log episodes of the training split to as offline data, a dataset for each entry of --log-at; without
    log-probabilities: it holds the weights, not what the policy drew, and caps turn many draws into the same weights"""
    log_at: tuple[float, ...] = (1.0,)
    """shares of the training after which the policy of that moment is logged, as it explores; 1 also if --patience ends it"""
    log_episodes: int = 100
    """episodes of each dataset"""

    market: str = "synthetic:garleanu-pedersen"
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...], see KNOWN below for three of them;
    with the prefix shuffled:, bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py)"""
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
    smooth: float = 1e-4
    """trades of about this weight and less have a cost with a gradient at 0 in training; ledgers have the exact cost"""
    ohlc: bool = False
    """the agent also sees gap, body, range and volume of each bar (needs a market with these)"""
    wavelets: int = 0
    """the agent also sees so many levels of a causal Haar wavelet transform of the returns"""
    neutral: Literal["none", "market", "factors", "clusters"] = "none"
    """long_short: orders without exposure to the market (trailing betas), to principal components, or to any cluster"""
    neutral_count: int = 3
    """number of these components or clusters"""
    pairs: int = 0
    """long_short: order so many pairs of symbols, chosen in training data, instead of symbols (0: symbols)"""
    kill_drawdown: float | None = None
    """an order is scaled smoothly to half at this drawdown and on to nothing, such as 0.15; with --orders change what is
    held is part of it, so that it fades bar by bar"""
    kill_width: float = 0.01
    """how gradually: it is a logistic function of drawdown / this"""

    stress_share: float = 0.0
    """share of the training windows taken from stress scenarios (envs/scenarios.py), made of training bars"""
    stress_model: Literal["bootstrap", "learned"] = "bootstrap"
    """blocks of bars with the wanted label, or a small model of returns given the label"""
    stress_labels: tuple[int, ...] = ()
    """labels to draw from: 0 calm and rising, 1 calm and falling, 2 volatile and rising, 3 volatile and falling (default 3)"""
    stress_macro: str | None = None
    """global series of the market whose terciles 0, 1, 2 are the labels instead (default 2)"""
    stress_severity: float = 1.0
    """factor on their log returns"""
    stress_histories: int = 64
    """scenarios drawn"""
    stress_candidates: int = 4
    """windows drawn for each one trained on: the one that is worst for the policy as it is; 1: not adversarial"""

    estimator: Literal["grpo", "pathwise", "mix"] = "pathwise"
    """of the gradient: from the actions' log-probabilities, through the market, or both weighted by their inverse variances"""
    policy: Literal["gaussian", "dirichlet"] = "gaussian"
    """scores (long_only: logits of a softmax; long_short: scaled onto the simplex of |weights|), or a Dirichlet (long_only)"""
    encoder: Literal["mlp", "gru"] = "mlp"
    """what reads the features of the last bars, the same network for every symbol"""
    lookback: int = 16
    """bars that it reads before each decision"""
    hidden: int = 64
    """width of its layers"""
    embedding: int = 0
    """learned numbers that tell the network which symbol it reads (0: all symbols are alike)"""
    utility: Literal["log", "mean_variance", "sharpe", "cvar", "drawdown", "risk_budget", "hedge"] = "log"
    """maximised over windows: log wealth per bar; with a penalty on variance, on the conditional value at risk, on the
    drawdown, on risk contributions that are not equal; Sharpe; or the least variance of what a liability leaves (`hedge`)"""
    risk_aversion: float = 1.0
    """of mean_variance: mean net return - risk_aversion / 2 * mean square, per bar"""
    penalty: float = 0.1
    """weight of the penalty in cvar, drawdown and risk_budget"""
    cvar_alpha: float = 0.05
    """share of a window's bars that count as the tail"""

    total_timesteps: int = 2_000_000
    """bars of all rollouts together"""
    num_windows: int = 32
    """windows of the market per iteration"""
    group_size: int = 4
    """rollouts of each window: same prices, other actions"""
    horizon: int = 64
    """bars of a window; each begins in cash"""
    microbatches: int = 1
    """parts that an iteration's windows are differentiated in, one after another, to save memory"""
    learning_rate: float = 2e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.9
    """grpo: discount of the rewards to go in log, mean_variance and drawdown; pathwise gradients are exact and need none"""
    update_epochs: int = 1
    """grpo: passes over each set of rollouts, 1 to 4"""
    clip_low: float = 0.2
    """grpo: the probability ratio is clipped below 1 - this"""
    clip_high: float = 0.28
    """grpo: and above 1 + this (Yu et al. 2025, arXiv:2503.14476)"""
    kl_coef: float = 0.0
    """weight of the KL divergence to the reference policy"""
    ema_decay: float = 0.99
    """of the reference policy, a moving average of the policy, per iteration"""
    log_std: float = -1.0
    """logarithm of the policy's standard deviation at the start, in scores; dirichlet: -1/2 log of the concentration"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    reward_scale: float = 100.0
    """pathwise, mix: factor on utilities and rewards; grpo divides advantages by their spread instead"""
    eval_every: int = 20
    """iterations between two backtests on the validation split"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for markets whose best policy is known: the terms that its derivation assumes, and what it depends on. Where one
# policy is best all the time, the last model is taken: the best of many on the validation split would be the luckiest there.
KNOWN = {
    "synthetic:garleanu-pedersen": dict(
        portfolio=PortfolioConfig(
            costs="zero:quadratic_impact_bps=75", constraints="long_short", orders="change", gross=10.0, asset_cap=10.0,
            scale=0.5,
        ),
        utility="mean_variance", risk_aversion=40.0, lookback=1, embedding=8, smooth=0.0, num_windows=64,
        total_timesteps=6_000_000,
    ),
    "synthetic:merton": dict(
        portfolio=PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, asset_cap=2.0, scale=0.5),
        lookback=1, log_std=0.0, gamma=0.0, num_windows=256, group_size=2, learning_rate=5e-4, total_timesteps=16_000_000,
        eval_every=10_000,
    ),
    "synthetic:black-scholes": dict(
        portfolio=PortfolioConfig(costs="zero", constraints="long_short", gross=2.0, asset_cap=2.0, scale=1.0),
        utility="hedge", lookback=1, horizon=30, num_windows=256, group_size=1, log_std=-3.0,
        total_timesteps=6_000_000, eval_every=10_000,
    ),
}  # fmt: skip


class Bar(NamedTuple):
    """What turning actions into weights needs to know of the bar at which they are decided."""

    present: torch.Tensor  # (..., N) bool: the symbol can be ordered
    gross: torch.Tensor  # (...) gross cap of an order decided then
    exposures: torch.Tensor | None  # (..., N, K) what orders are neutral to


class Tables(NamedTuple):
    """What the policy reads of each bar, on the device; stress scenarios follow the market's own rows."""

    features: torch.Tensor  # (T, N, F) float32
    present: torch.Tensor  # (T, N) bool, (T,) and (T, N, K): as in Bar
    gross: torch.Tensor
    exposures: torch.Tensor | None
    to_fill: torch.Tensor  # (T, N) simple return of each symbol from this mark to the fill, on the weights held until then
    to_mark: torch.Tensor  # (T, N) and from there to the next mark, on those ordered
    first: torch.Tensor  # (T,) int64 first row of the history that the row is in
    liability: torch.Tensor | None  # (T,) what is owed at that mark, in units of the starting equity

    def bar(self, rows):
        return Bar(self.present[rows], self.gross[rows], None if self.exposures is None else self.exposures[rows])


def make_tables(args, data, device, selection=None):
    """Tables of a panel. `selection` (N,): cluster of each symbol, for --neutral clusters."""
    panel = data.panel
    blocks = [data.assets.reshape(panel.num_bars, panel.num_symbols, -1)]
    if args.ohlc:
        blocks.append(ohlc_features(panel))
    if args.wavelets:
        blocks.append(wavelet_features(panel, args.wavelets))
    blocks.append(np.repeat(data.context[:, None], panel.num_symbols, axis=1))
    exposures = {
        "none": lambda: None,
        "market": lambda: market_beta(panel)[..., None],
        "factors": lambda: factor_loadings(panel, args.neutral_count),
        "clusters": lambda: np.repeat(np.eye(args.neutral_count)[selection][None], panel.num_bars, axis=0),
    }[args.neutral]()
    ex, liability = data.execution, panel.hidden.get("liability")

    def tensor(x):
        return None if x is None else torch.as_tensor(np.asarray(x, np.float32)).to(device)

    return Tables(
        tensor(np.concatenate(blocks, axis=2)),
        torch.tensor(panel.present, device=device), tensor(data.gross), tensor(exposures),
        tensor(ex.to_fill), tensor(ex.to_mark),
        torch.tensor(panel.segments[panel.segment_of_row], device=device), tensor(liability),
    )  # fmt: skip


def layer_init(layer, std=np.sqrt(2)):
    nn.init.orthogonal_(layer.weight, std)
    if layer.bias is not None:
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


class Agent(nn.Module):
    """Scores of the symbols, and of cash in long_only, from their last bars and the weights held; alike for all symbols.

    Prices do not depend on actions, so `encode` reads a whole window at once, before its first bar is traded; only `decide`,
    which needs the weights held, runs bar by bar.
    """

    def __init__(self, args, num_symbols, num_features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.lookback, self.dirichlet = args.lookback, args.policy == "dirichlet"
        self.symbol = nn.Parameter(torch.randn(num_symbols, args.embedding))
        size = num_features + args.embedding
        self.gru = args.encoder == "gru"
        if self.gru:
            self.encoder = nn.GRU(size, args.hidden, batch_first=True)
        else:  # a dense layer over the last bars, for all bars of a window in one convolution
            self.encoder = nn.Conv1d(size, args.hidden, args.lookback)
        self.market = layer_init(nn.Linear(2 * args.hidden, args.hidden))  # a symbol's own encoding and the mean of all
        self.held = nn.Parameter(torch.randn(args.hidden) / np.sqrt(args.hidden))
        self.account = layer_init(nn.Linear(4, args.hidden, bias=False), std=0.5)
        self.score = layer_init(nn.Linear(args.hidden, 1), std=0.01)
        self.has_cash = args.portfolio.constraints == LONG_ONLY and args.portfolio.cash
        self.cash = layer_init(nn.Linear(args.hidden, 1), std=0.01) if self.has_cash else None
        size = 1 if self.dirichlet else num_symbols + self.has_cash
        self.log_std = nn.Parameter(torch.full((size,), args.log_std))

    def encode(self, tables, rows):
        """(B, H, N, D) what the policy knows of the market at rows (B, H), consecutive in each window."""
        before = torch.arange(1 - self.lookback, 0, device=rows.device)
        span = torch.cat([rows[:, :1] + before, rows], dim=1)
        first = tables.first[rows[:, :1]]
        x = ((tables.features[span.maximum(first)] - self.mean) * self.scale).clamp(-10.0, 10.0)
        x = x * (span >= first)[..., None, None]  # nothing before a history begins
        batch, bars, symbols, _ = x.shape
        x = torch.cat([x, self.symbol.expand(batch, bars, -1, -1)], dim=-1).transpose(1, 2).flatten(0, 1)
        if self.gru:
            x = self.encoder(x)[0][:, self.lookback - 1 :]
        else:
            x = FastTanh.apply(self.encoder(x.mT)).mT
        x = x.unflatten(0, (batch, symbols)).transpose(1, 2)
        present = tables.present[rows].unsqueeze(-1)
        mean = (x * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1.0)
        return self.market(torch.cat([x, mean.expand_as(x)], dim=-1))

    def decide(self, encoded, state):
        """(..., A) scores given encoded (..., N, D) and state (..., N + 4): the weights held, and the account's."""
        symbols = encoded.shape[-2]
        x = encoded + state[..., :symbols, None] * self.held + self.account(state[..., symbols:]).unsqueeze(-2)
        x = FastTanh.apply(x)
        score = self.score(x).squeeze(-1)
        return torch.cat([score, self.cash(x.mean(-2))], dim=-1) if self.has_cash else score

    def concentration(self, scores, mask):
        """Dirichlet: (..., A) > 0, in the sum exp(-2 log_std) times the number of choices."""
        share = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (-2.0 * self.log_std).exp() * mask.sum(-1, keepdim=True) * share + 1e-3

    def sample(self, scores, mask, noise):
        """Actions, differentiable in the scores: a = scores + std * noise, or shares drawn from the Dirichlet."""
        if not self.dirichlet:
            return scores + self.log_std.exp() * noise
        gamma = torch._standard_gamma(self.concentration(scores, mask)).clamp(min=1e-20) * mask
        return gamma / gamma.sum(-1, keepdim=True)

    def mean_action(self, scores, mask):
        if not self.dirichlet:
            return scores
        share = self.concentration(scores, mask) * mask
        return share / share.sum(-1, keepdim=True)

    def log_prob(self, scores, mask, action):
        if not self.dirichlet:
            z = (action - scores) * (-self.log_std).exp()
            return -(mask * (0.5 * z.square() + self.log_std + 0.5 * np.log(2 * np.pi))).sum(-1)
        a = self.concentration(scores, mask)
        density = (a - 1.0) * action.clamp(min=1e-20).log() - a.lgamma()
        return (mask * density).sum(-1) + (a * mask).sum(-1).lgamma()

    def kl(self, scores, mask, reference, reference_scores):
        """KL divergence of this policy from the reference, in closed form."""
        if not self.dirichlet:
            ratio = (2.0 * (self.log_std - reference.log_std)).exp()
            gap = (scores - reference_scores).square() * (-2.0 * reference.log_std).exp()
            return 0.5 * (mask * (ratio + gap - 1.0 - ratio.log())).sum(-1)
        a, b = self.concentration(scores, mask), reference.concentration(reference_scores, mask)
        total_a, total_b = (a * mask).sum(-1), (b * mask).sum(-1)
        terms = b.lgamma() - a.lgamma() + (a - b) * (a.digamma() - total_a.digamma().unsqueeze(-1))
        return total_a.lgamma() - total_b.lgamma() + (mask * terms).sum(-1)


def target_weights(args, action, account, bar, pair_projection=None):
    """(..., N) weights to order: always inside the constraints of args.portfolio. Differentiable."""
    c, held, present = args.portfolio, account.weights, bar.present
    fixed = (held * ~present).abs().sum(-1)  # what cannot be ordered stays, and uses up its part of the caps
    alive = None
    if args.kill_drawdown is not None:
        alive = torch.sigmoid((args.kill_drawdown + account.drawdown) / args.kill_width).unsqueeze(-1)
    if c.constraints == LONG_ONLY:
        room = (bar.gross.clamp(max=1.0) - fixed).clamp(min=0.0).unsqueeze(-1)
        if args.policy == "gaussian":
            number = held.shape[-1]
            logits = action[..., :number].masked_fill(~present, torch.finfo(action.dtype).min)  # -inf: NaN if none is
            action = torch.cat([logits, action[..., number:]], dim=-1).softmax(-1)
        y = (room * action[..., : held.shape[-1]]).clamp(max=c.asset_cap)
        return torch.where(present, y if alive is None else y * alive, held)
    y = unit_weight(args, held.shape[-1]) * action
    if c.orders == "change":
        y = y + held
    if pair_projection is not None:
        partner = pair_projection.diag().diag() - pair_projection  # 1/2 where two symbols are a pair
        y = torch.where((~present).to(y.dtype) @ partner > 0.0, -2.0 * held @ partner, y)  # offset a leg that cannot be ordered
        y = torch.where(present, y, held) @ pair_projection
    if bar.exposures is not None:
        y = neutralise(torch.where(present, y, held), bar.exposures, present)
    if alive is not None:
        y = y * alive
    y = deleverage(y * present, (bar.gross - fixed).clamp(min=0.0))
    y = y * (c.asset_cap / y.abs().amax(-1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0)
    return torch.where(present, y, held)


def unit_weight(args, symbols):
    return args.portfolio.scale or args.portfolio.gross / symbols


class Rollout(NamedTuple):
    growth: torch.Tensor  # (B, G, H) of equity, per bar
    states: torch.Tensor  # (B, G, H, N + 4) what `decide` saw
    scores: torch.Tensor  # (B, G, H, A)
    actions: torch.Tensor  # (B, G, H, A)
    targets: torch.Tensor  # (B, G, H, N) weights ordered


def observe(account, cap):
    """(..., N + 4) the part of the agent's input that its actions change: weights, their sums, drawdown; and the gross cap."""
    w = account.weights
    sums = torch.stack([w.abs().sum(-1), w.sum(-1), account.drawdown, cap.expand(w.shape[:-1])], dim=-1)
    return torch.cat([w, sums], dim=-1)


def choices(agent, present):
    """(..., A) bool: where the policy has a choice: symbols with a bar, and cash; all where there is none, to no effect."""
    if agent.has_cash:
        return torch.cat([present, torch.ones_like(present[..., :1])], dim=-1)
    return present | ~present.any(-1, keepdim=True)


def trade(args, agent, market, account, encoded, bar, rows, noise, pair_projection):
    """One bar of every rollout: what the agent sees, decides and orders, and what its account becomes."""
    state = observe(account, bar.gross)
    scores = agent.decide(encoded, state)
    mask = choices(agent, bar.present)
    action = agent.mean_action(scores, mask) if noise is None else agent.sample(scores, mask, noise)
    target = target_weights(args, action, account, bar, pair_projection)
    return state, scores, action, target, market.step(account, target, rows)


def roll_out(args, agent, market, tables, rows, group, explore=True, pair_projection=None, step=trade):
    """`group` rollouts from cash through each window of rows (B, H); same prices, other actions. Differentiable."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=args.amp):
        encoded = agent.encode(tables, rows).to(market.dtype)
    account = market.account(len(rows), group)
    horizon = rows.shape[1]
    noise = [None] * horizon
    if explore:
        number = market.num_symbols + agent.has_cash
        noise = torch.randn((horizon, len(rows), group, number), device=rows.device)
    bars = tables.bar(rows.T.unsqueeze(-1))  # (H, B, 1, ...)
    bars = zip(*([None] * horizon if x is None else x.unbind() for x in bars))
    encoded = encoded.transpose(0, 1).unsqueeze(2).unbind()
    path = []
    for t, bar in enumerate(bars):
        *seen, after = step(args, agent, market, account, encoded[t], Bar(*bar), rows[:, t, None], noise[t], pair_projection)
        account = after.account
        path.append((after.growth, *seen))
    growth, states, scores, actions, targets = zip(*path)
    return Rollout(torch.stack(growth, dim=2), *(torch.stack(x, dim=2) for x in (states, scores, actions, targets)))


def rewards_of(args, growth):
    """(..., H) rewards whose mean over the window is the utility, or None: it is not a mean over bars."""
    log_growth = growth.clamp(min=RUIN).log()
    if args.utility == "log":
        return log_growth
    if args.utility == "mean_variance":
        net = growth - 1.0
        return net - 0.5 * args.risk_aversion * net.square()
    if args.utility == "drawdown":
        equity = peak = torch.ones_like(growth[..., 0])
        falls = []
        for factor in growth.unbind(-1):  # the gradient of cumprod is a cumsum, which has no deterministic form on CUDA
            equity = equity * factor
            peak = torch.maximum(peak, equity)
            falls.append(1.0 - equity / peak)
        return log_growth - args.penalty * torch.stack(falls, dim=-1)
    return None


def utility_of(args, tables, rows, path):
    """(B, G) utility of rollouts through windows of rows (B, H)."""
    growth = path.growth
    rewards = rewards_of(args, growth)
    if rewards is not None:
        return rewards.mean(-1)
    net, log_growth = growth - 1.0, growth.clamp(min=RUIN).log().mean(-1)
    if args.utility == "sharpe":
        return net.mean(-1) / (net.std(-1) + 1e-6)
    if args.utility == "cvar":  # Rockafellar & Uryasev 2000: the minimum over v of v + E[(loss - v)+] / alpha
        bars = growth.shape[-1]
        tail = args.cvar_alpha * bars  # so many of the largest losses, the last of them in part
        share = (tail - torch.arange(bars, device=net.device)).clamp(0.0, 1.0) / tail
        return log_growth - args.penalty * ((-net).sort(-1, descending=True).values * share.to(net.dtype)).sum(-1)
    if args.utility == "risk_budget":  # each symbol's share of the variance, against an equal share
        to_fill, to_mark = (x[rows].unsqueeze(1) for x in (tables.to_fill, tables.to_mark))
        profit = path.states[..., : to_fill.shape[-1]] * to_fill + path.targets * to_mark
        profit = profit - profit.mean(2, keepdim=True)
        covariance = (profit * profit.sum(-1, keepdim=True)).mean(2)
        share = covariance / covariance.sum(-1, keepdim=True).clamp(min=1e-12)
        return log_growth - args.penalty * (share - 1.0 / share.shape[-1]).square().sum(-1)
    left = growth.prod(-1) - tables.liability[rows[:, -1] + 1].unsqueeze(-1)  # hedge
    return -(left - left.detach().mean()).square()


def advantages_of(args, rewards, utility, horizon):
    """(B, G, H): discounted rewards to go, or the utility, less the mean of the window's other rollouts at that bar."""
    if rewards is None:
        to_go = horizon * utility.unsqueeze(-1).expand(-1, -1, horizon)
    else:
        to_go, running = torch.zeros_like(rewards), torch.zeros_like(rewards[..., 0])
        for t in reversed(range(horizon)):
            running = rewards[..., t] + args.gamma * running
            to_go[..., t] = running
    group = to_go.shape[1]
    return (to_go - to_go.mean(1, keepdim=True)) * group / (group - 1)


def rows_of(starts, horizon):
    return starts.unsqueeze(-1) + torch.arange(horizon, device=starts.device)


def worst(args, agent, market, tables, candidates, **options):
    """(S,) of candidates (S, K), first rows of windows: of each S the one of least utility for the policy as it is."""
    if candidates.shape[1] == 1:
        return candidates[:, 0]
    with torch.no_grad():
        rows = rows_of(candidates.flatten(), args.horizon)
        path = roll_out(args, agent, market, tables, rows, 1, explore=False, **options)
        utility = utility_of(args, tables, rows, path).view(candidates.shape)
    return candidates.gather(1, utility.argmin(1, keepdim=True)).squeeze(1)


def pathwise_loss(args, agent, market, tables, rows, reference=None, **options):
    """The utility of windows `rows`, negative: its gradient runs through every bar of the market."""
    path = roll_out(args, agent, market, tables, rows, args.group_size, **options)
    utility = utility_of(args, tables, rows, path)
    loss = -args.reward_scale * utility.mean()
    return loss + penalty_kl(args, agent, reference, tables, rows, path.states, path.scores), utility


def grpo_loss(args, agent, tables, rows, path, advantages, old_log_probs, reference=None):
    """The clipped surrogate of PPO over rollouts `path` of windows `rows`; also the ratios of the probabilities."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=args.amp):
        encoded = agent.encode(tables, rows).to(path.states.dtype)
    scores = agent.decide(encoded.unsqueeze(1), path.states)
    mask = choices(agent, tables.present[rows].unsqueeze(1))
    ratio = (agent.log_prob(scores, mask, path.actions) - old_log_probs).exp()
    clipped = ratio.clamp(1.0 - args.clip_low, 1.0 + args.clip_high)
    loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    return loss + penalty_kl(args, agent, reference, tables, rows, path.states, scores), ratio


def penalty_kl(args, agent, reference, tables, rows, states, scores):
    """kl_coef times the mean KL divergence from the reference in `states`; both policies' scores have gradients in these."""
    if args.kl_coef == 0.0:
        return 0.0
    with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16, enabled=args.amp):
        encoded = reference.encode(tables, rows).to(states.dtype)
    reference_scores = reference.decide(encoded.unsqueeze(1), states)
    mask = choices(agent, tables.present[rows].unsqueeze(1))
    return args.kl_coef * agent.kl(scores, mask, reference, reference_scores).mean()


def save_checkpoint(path, content):
    """Written beside and moved into place: a kill at any moment leaves the previous checkpoint or this one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the defaults of the rest
    first.add_argument("--market", default=Args.market)
    chosen, _ = first.parse_known_args()
    settings = next((settings for market, settings in KNOWN.items() if chosen.market.startswith(market)), {})
    args = tyro.cli(Args, default=dataclasses.replace(Args(), **settings), config=(tyro.conf.OmitArgPrefixes,))
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "model.pt").is_file():
            sys.exit(f"--resume {args.resume}: no model.pt there; expected a run directory with a checkpoint")
        checkpoint = torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
        args = Args(**{**saved, "portfolio": PortfolioConfig(**saved["portfolio"]), "resume": args.resume})
    for flag, low, high in (
        ("num_windows", 1, np.inf), ("group_size", 1 if args.estimator == "pathwise" else 2, np.inf), ("horizon", 2, np.inf),
        ("microbatches", 2 if args.estimator == "mix" else 1, args.num_windows),
        ("update_epochs", 1, 4 if args.estimator == "grpo" else 1),
        ("lookback", 1, np.inf), ("hidden", 1, np.inf), ("embedding", 0, np.inf), ("eval_every", 1, np.inf),
        ("checkpoint_every", 1, np.inf), ("log_episodes", 1, np.inf), ("stress_share", 0, 1), ("stress_histories", 1, np.inf),
        ("stress_candidates", 1, np.inf), ("kill_width", 1e-6, np.inf), ("cvar_alpha", 1e-6, 1), ("ema_decay", 0, 1),
        ("gamma", 0, 1), ("kl_coef", 0, np.inf), ("kill_drawdown", 0, 1),
    ):  # fmt: skip
        if getattr(args, flag) is not None and not low <= getattr(args, flag) <= high:
            expected = f"{low} to {high}" if high < np.inf else f"at least {low}"
            sys.exit(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {expected}, with --estimator {args.estimator}"
            )
    if not args.log_at or not all(0.0 < share <= 1.0 for share in args.log_at):
        sys.exit(f"--log-at {args.log_at}: expected shares of the training, above 0 and at most 1")
    logged = sorted(Path(args.log_dataset).glob(f"{args.exp_name}__{args.seed}__*/dataset.hdf5")) if args.log_dataset else []
    if logged and not checkpoint:
        sys.exit(f"--log-dataset {args.log_dataset}: holds {logged[0].parent.name} already; expected none of this seed")
    c, long_only = args.portfolio, args.portfolio.constraints == LONG_ONLY
    left_over = c.asset_cap < 1 or args.kill_drawdown is not None  # weight that only cash can hold
    for refused, flag, expected in (
        (c.groups is not None, "groups", "none: the caps here are on gross and assets"),
        (c.net is not None, "net", "none: see --neutral market"),
        (c.leverage, "leverage", "no such action"), (long_only and c.orders != "target", "orders", "target in long_only"),
        (long_only and not c.cash and left_over, "no-cash", "cash, to hold what caps and kill switch leave over"),
        (long_only and args.neutral != "none", "neutral", "none in long_only"),
        (long_only and args.pairs > 0, "pairs", "0 in long_only"),
        (not long_only and args.policy == "dirichlet", "policy", "gaussian in long_short"),
        (args.estimator == "mix" and args.num_windows % args.microbatches, "microbatches", "a divisor of --num-windows"),
        (args.pairs > 0 and args.neutral != "none", "pairs", "0 with --neutral, whose offsets break pairs up"),
    ):  # fmt: skip
        if refused:
            sys.exit(f"--{flag}: expected {expected}")
    num_stress = round(args.stress_share * args.num_windows)
    if num_stress == 0 and (args.stress_share > 0.0 or args.stress_labels or args.stress_macro):
        sys.exit(f"--stress-share {args.stress_share}: expected at least {0.5 / args.num_windows:g}, for one window or more")
    if args.stress_share > 0.0 and args.utility == "hedge":
        sys.exit(f"--stress-share {args.stress_share}: expected 0 with --utility hedge: nothing is owed in a scenario")
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    batch_size = args.num_windows * args.group_size * args.horizon
    num_iterations = max(1, args.total_timesteps // batch_size)

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    risk_aversion = args.risk_aversion if args.utility == "mean_variance" else 1.0
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    if device.type == "cpu" and args.amp:
        print("--amp: no CUDA device is used here; the networks stay in float32")
        args.amp = False

    # Market: panel, splits, tables; what is wrong with them is said in one line
    try:
        panel = load_market(
            args.market, args.seed, symbols=args.symbols or None, start=args.start, end=args.end, resample=args.resample,
            columns=args.columns, series=args.series, series_lag=args.series_lag,
        )  # fmt: skip
        last_fold = max(args.folds, 1) - 1
        if not 0 <= args.fold <= last_fold:
            raise ValueError(f"--fold {args.fold}: expected 0 to {last_fold}, for --folds {args.folds}")
        if args.folds:
            splits = panel.walk_forward(args.folds, val_fraction=args.val_fraction, embargo=args.embargo)[args.fold]
        else:
            splits = panel.split(args.train_fraction, args.val_fraction, args.embargo)
        # In the kernel the scores are the weights over the gross cap, so that it projects each order onto itself.
        data = PortfolioData(panel, dataclasses.replace(c, orders="target", scale=c.gross))
        selection = clusters(panel, splits["train"], args.neutral_count) if args.neutral == "clusters" else None
        tables, execution = make_tables(args, data, device, selection), data.execution
        chosen_pairs = None
        if args.pairs:
            legs = torch.as_tensor(pairs(panel, splits["train"], args.pairs), dtype=torch.float32, device=device)
            chosen_pairs = 2.0 * legs @ legs.T  # onto the span of the pairs' spreads
        if args.utility == "hedge" and tables.liability is None:
            raise ValueError(
                f"--utility hedge: market {args.market} owes nothing; expected one such as synthetic:black-scholes"
            )
        markets = {split: data.market(splits[split]) for split in splits}
        lives = {int(b - a - 1) for m in markets.values() for a, b in zip(m.starts, m.stops)}
        if args.utility == "hedge" and lives != {args.horizon}:
            raise ValueError(f"--horizon {args.horizon}: --utility hedge expects the bars from sale to payoff, {sorted(lives)}")
        ranges = list(zip(markets["train"].starts, markets["train"].stops))
        windows = torch.as_tensor(np.concatenate([np.arange(a, b - args.horizon) for a, b in ranges]), device=device)
        if len(windows) == 0:
            raise ValueError(f"--horizon {args.horizon}: expected fewer bars than a range of the training split has")
        odds, counts = splits["train"].odds, np.array([max(0, b - args.horizon - a) for a, b in ranges])
        if len(odds):  # of the ranges; of the windows in them
            odds = torch.as_tensor(np.repeat(odds / np.maximum(counts, 1), counts))
        stressed = windows[:0]
        if num_stress > 0:
            labels = args.stress_labels or ((2,) if args.stress_macro else (3,))
            scenario = Scenario(args.stress_model, labels, args.stress_macro, severity=args.stress_severity)
            bars = WARMUP + args.horizon + args.lookback + 1
            extra = stress_panel(panel, splits["train"], scenario, args.stress_histories, bars, args.seed)
            extra_data = PortfolioData(extra, data.config)
            more = make_tables(args, extra_data, device, selection)
            starts = np.concatenate([np.arange(s + WARMUP, s + bars - args.horizon) for s in extra.segments])
            stressed = torch.as_tensor(starts + panel.num_bars, device=device)
            tables = Tables(*(
                None if a is None else torch.cat([a, b + panel.num_bars if name == "first" else b])
                for name, a, b in zip(Tables._fields, tables, more)
            ))  # fmt: skip
            execution = type(execution)(*(
                a if np.ndim(a) == 0 or len(a) == 1 else np.concatenate([a, b])
                for a, b in zip(execution, extra_data.execution)
            ))  # fmt: skip
        market = DiffMarket(execution, data.costs, args.smooth, device=device)
        exact = copy.copy(market)  # of the same tables; models are chosen by what the ledger charges
        exact.smooth = 0.0
        print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
        print(f"costs   {data.costs.describe()}")
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    agent = Agent(args, panel.num_symbols, tables.features.shape[2]).to(device)
    with torch.no_grad():  # the features' mean and spread over the training bars
        bars = np.concatenate([np.arange(a, b) for a, b in ranges])
        seen = tables.features[torch.as_tensor(bars)][torch.as_tensor(panel.present[bars])]
        agent.mean.copy_(seen.mean(0))
        agent.scale.copy_(1.0 / seen.std(0).clamp(min=1e-3))
    reference = copy.deepcopy(agent).requires_grad_(False)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    options = dict(pair_projection=chosen_pairs, step=torch.compile(trade) if args.compile else trade)

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    variances = torch.zeros(2)  # mix: moving averages, of the grpo and of the pathwise gradient
    if checkpoint:
        agent.load_state_dict(checkpoint["model"])
        reference.load_state_dict(checkpoint["reference"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        variances = checkpoint["variances"]
        best_score, best_model = checkpoint["best_score"], checkpoint["best_model"]
        first_iteration, evals_since_best = checkpoint["iteration"] + 1, checkpoint["evals_since_best"]
        global_step, train_seconds = checkpoint["global_step"], checkpoint["train_seconds"]
        print(f"resume  {run_dir} after iteration {checkpoint['iteration']}")
    else:
        run_dir = ledger.new_run_dir(args.runs_dir, MARKET_ENV, args.exp_name, args.seed)
    run = {
        "status": "running", "env_id": MARKET_ENV, "args": dataclasses.asdict(args),
        **ledger.provenance(__file__, str(device)), "trials": 1,
        "panel": ledger.describe_panel(panel, splits), "market": data.describe(),
    }  # fmt: skip
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

    def draw_windows():
        """(B, H) rows; the share of stress scenarios comes last."""
        num = args.num_windows - num_stress
        picked = torch.multinomial(odds, num, replacement=True) if len(odds) else torch.randint(len(windows), (num,))
        ordinary = windows[picked.to(device)]
        if num_stress == 0:
            return rows_of(ordinary, args.horizon)
        drawn = stressed[torch.randint(len(stressed), (num_stress, args.stress_candidates)).to(device)]
        return rows_of(torch.cat([ordinary, worst(args, agent, market, tables, drawn, **options)]), args.horizon)

    def ranges_of(split):
        """Rows at which a decision is taken, (R, bars) for the ranges of each length."""
        ranges = [np.arange(a, b - 1) for a, b in zip(markets[split].starts, markets[split].stops)]
        for bars in sorted({len(r) for r in ranges}):
            yield torch.as_tensor(np.stack([r for r in ranges if len(r) == bars]), device=device)

    def evaluate(split):
        """Mean utility of the policy without exploration over the whole ranges of a split."""
        total, number = 0.0, 0
        with torch.no_grad():
            for at in ranges_of(split):
                path = roll_out(args, agent, exact, tables, at, 1, explore=False, **options)
                total += float(utility_of(args, tables, at, path).sum()) * at.shape[1]
                number += at.numel()
        return total / number

    def kernel_policy(split, explore=False):
        """The policy on the kernel: the observation holds the account, the row says what the market looks like."""
        place, encoded = np.zeros(panel.num_bars, np.int64), []
        with torch.no_grad():
            for at in ranges_of(split):
                place[at.cpu().numpy().ravel()] = sum(map(len, encoded)) + np.arange(at.numel())
                encoded.append(agent.encode(tables, at).flatten(0, 1))
            encoded = torch.cat(encoded)
        weights, own = data.layout["weights"], data.layout["portfolio"]

        def agent_policy(observation, _, rows):
            with torch.no_grad():
                obs, at = torch.as_tensor(observation).to(device), torch.as_tensor(rows).to(device)
                one = torch.ones(len(obs), device=device)
                account = Account(obs[:, weights], 1.0 + obs[:, own][:, 2], one)  # the drawdown is all that matters of equity
                bar = tables.bar(at)
                scores = agent.decide(encoded[place[rows]], observe(account, bar.gross))
                mask = choices(agent, bar.present)
                action = agent.sample(scores, mask, torch.randn_like(scores)) if explore else agent.mean_action(scores, mask)
                order = target_weights(args, action, account, bar, chosen_pairs)
                if agent.has_cash:
                    order = torch.cat([order, bar.gross.clamp(max=1.0).unsqueeze(-1) - order.sum(-1, keepdim=True)], dim=-1)
                return (order / c.gross).cpu().numpy()

        return agent_policy

    def backtest(split):
        return portfolio_references.run(
            data=data, split=splits[split], policy=kernel_policy(split), num_threads=args.num_threads
        )

    def log_dataset(iteration):
        """Episodes of the policy as it explores now. Their random numbers are their own: training does not notice."""
        path = Path(args.log_dataset) / f"{args.exp_name}__{args.seed}__{global_step}" / "dataset.hdf5"
        if path.exists():
            return  # logged before the run was interrupted
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        # What rewards say of the utility bar by bar; of risk_budget and hedge, which no bar has alone, only the growth
        weights = {
            "mean_variance": {"variance": 0.5 * (args.risk_aversion - 1.0)},  # log growth has the first unit of risk aversion
            "sharpe": {"log_growth": 0.0, "differential_sharpe": 1.0},
            "cvar": {"cvar": args.penalty},
            "drawdown": {"drawdown": args.penalty},
        }.get(args.utility, {})
        terms = dict(reward_weights={"log_growth": 1.0} | weights, cvar_alpha=args.cvar_alpha, episode_length=args.horizon)
        task = describe_task(MARKET_ENV, args, data.config, **terms)
        values = b"".join(value.cpu().numpy().tobytes() for value in agent.state_dict().values())
        behaviour = {"policy": args.exp_name, "step": global_step, "checkpoint_sha256": hashlib.sha256(values).hexdigest()}
        meta = provenance(task, panel.sha256, dataclasses.asdict(data.costs), run["git_commit"], args.gamma, [behaviour])
        number = min(64, args.log_episodes)
        episodes = PortfolioVectorEnv(number, data=data, split=splits["train"], num_threads=args.num_threads, **terms)
        act = kernel_policy("train", explore=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            dataset_writer.log_episodes(
                path, episodes, lambda *seen: (act(*seen[:3]), None), args.log_episodes, meta, seed, panel.timestamps
            )

    log_after = {max(1, round(share * num_iterations)) for share in args.log_at} if args.log_dataset else set()
    started, failure = time.time(), None
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, mininterval=0.5)
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)
        rows = draw_windows()
        parts = [rows[i :: args.microbatches] for i in range(args.microbatches)]  # each with its share of stress scenarios

        # Rollouts for grpo, and their advantages
        if args.estimator != "pathwise":
            with torch.no_grad():
                paths = [roll_out(args, agent, market, tables, part, args.group_size, **options) for part in parts]
                utilities = [utility_of(args, tables, part, p) for part, p in zip(parts, paths)]
                advantages = [
                    advantages_of(args, rewards_of(args, p.growth), u, args.horizon) for p, u in zip(paths, utilities)
                ]
                # by the batch's spread, not by each group's, which would give quiet windows more weight (Liu et al. 2025)
                scale = torch.cat(advantages).std() + 1e-12 if args.estimator == "grpo" else 1.0 / args.reward_scale
                advantages = [a / scale for a in advantages]
                masks = [choices(agent, tables.present[part].unsqueeze(1)) for part in parts]
                old = [agent.log_prob(p.scores, mask, p.actions) for p, mask in zip(paths, masks)]

        # Update
        statistics = torch.zeros(3, device=device)
        if args.estimator == "pathwise":
            optimizer.zero_grad()
            utilities = []
            for part in parts:
                loss, utility = pathwise_loss(args, agent, market, tables, part, reference, **options)
                (loss * len(part) / len(rows)).backward()
                utilities.append(utility.detach())
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=True)
            optimizer.step()
        for _ in range(args.update_epochs if args.estimator == "grpo" else 0):
            optimizer.zero_grad()
            for i, part in enumerate(parts):
                loss, ratio = grpo_loss(args, agent, tables, part, paths[i], advantages[i], old[i], reference)
                (loss * len(part) / len(rows)).backward()
                with torch.no_grad():
                    clip = (ratio < 1.0 - args.clip_low) | (ratio > 1.0 + args.clip_high)
                    kl = (ratio - 1.0 - ratio.log()).mean()  # k3, http://joschu.net/blog/kl-approx.html
                    statistics[:2] += torch.stack([kl, clip.float().mean()]) * len(part) / len(rows) / args.update_epochs
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=True)
            optimizer.step()
        if args.estimator == "mix":
            gradients = [[], []]
            for i, part in enumerate(parts):
                losses = (
                    grpo_loss(args, agent, tables, part, paths[i], advantages[i], old[i], reference)[0],
                    pathwise_loss(args, agent, market, tables, part, reference, **options)[0],
                )
                for kept, loss in zip(gradients, losses):
                    grad = torch.autograd.grad(loss, parameters, materialize_grads=True)
                    kept.append(torch.cat([g.flatten() for g in grad]))
            stacks = [torch.stack(kept) for kept in gradients]
            # Each weighted by the inverse of its variance over microbatches: the best if the two are uncorrelated
            new = torch.stack([stack.var(0).sum() for stack in stacks]).cpu()
            variances = new if iteration == 1 else 0.9 * variances + 0.1 * new
            share = variances[0] / variances.sum().clamp(min=1e-30)  # of the pathwise gradient
            mixed = (1.0 - share) * stacks[0].mean(0) + share * stacks[1].mean(0)
            for p, g in zip(parameters, mixed.split([p.numel() for p in parameters])):
                p.grad = g.view_as(p)
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=True)
            optimizer.step()
            statistics[2] = share
        with torch.no_grad():
            for kept, now in zip(reference.parameters(), parameters):
                kept.lerp_(now, 1.0 - args.ema_decay)
        global_step += batch_size
        utility = torch.cat(utilities).mean().item()
        names = ("utility", "grad_norm", "approx_kl", "clipfrac", "pathwise_share")
        losses = dict(zip(names, (utility, norm.item(), *statistics.tolist())))
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
        writer.add_scalar("charts/episodic_return", utility, global_step)
        writer.add_scalar("losses/log_std", agent.log_std.mean().item(), global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        progress.set_postfix_str(f"{sps} steps/s, utility {utility:.4g}", refresh=False)
        progress.update(batch_size)

        # Validation: choose the model here, never on the test split
        if iteration % args.eval_every == 0 or iteration == num_iterations:
            score = evaluate("val")
            writer.add_scalar("eval/val_utility", score, global_step)
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best = score, 0
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
        stop_early = args.patience > 0 and evals_since_best >= args.patience
        if iteration in log_after or (stop_early and num_iterations in log_after):
            log_dataset(iteration)
        if iteration % args.checkpoint_every == 0 or iteration == num_iterations or stop_early:
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "iteration": num_iterations if stop_early else iteration,
                "global_step": global_step, "train_seconds": train_seconds,
                "model": agent.state_dict(), "reference": reference.state_dict(), "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "variances": variances, "best_score": best_score, "best_model": best_model,
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
        "val_utility": best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    agent.load_state_dict(best_model)
    frames = {split: backtest(split) for split in splits}
    ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
    compared = {"agent": frames["test"], **portfolio_references.references(data, splits["test"], risk_aversion)}
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
    if "closed form" in scores:
        run["utility_share"] = scores["agent"]["utility"] / scores["closed form"]["utility"]
        alive = {name: frame["net_exposure"][frame["equity"] > RUIN] for name, frame in compared.items()}
        weight, best = (float(alive[name].mean()) for name in ("agent", "closed form"))
        run["mean_net_exposure"] = {"agent": weight, "closed form": best}
        print(f"utility at risk aversion {risk_aversion:g} is {run['utility_share']:.3f} of the closed form's; ", end="")
        print(f"mean net exposure {weight:.3f}, closed form {best:.3f}")
    if args.utility == "hedge":
        error = portfolio_references.hedge_error(data, frames["test"], splits["test"])
        run["hedge"] = error
        print(", ".join(f"{name} {value:.4f}" for name, value in error.items()))
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
