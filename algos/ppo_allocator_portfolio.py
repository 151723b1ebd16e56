"""Continuous PPO (arXiv:1707.06347) on a set of symbols (Deep Sets, arXiv:1703.06114): how much each one's agent may risk."""

import argparse
import dataclasses
import hashlib
import json
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
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs  # noqa: F401  (registers Portfolio-v0)
from envs import dataset, dataset_writer, ledger, portfolio_references
from envs.costs import RUIN
from envs.device import unavailable
from envs.features import log_returns
from envs.portfolio import RegimeGuard
from envs.portfolio_tables import LONG_ONLY, PortfolioConfig, PortfolioData
from envs.synthetic import load_market
from envs.task import provenance
from envs.trading import ORDERS, TradingVectorEnv
from envs.trading_tables import POSITION, TradingConfig, TradingData

MARKET_ENV = "Portfolio-v0"
AGENTS_ENV = "Trading-v0"
# What a symbol's agent says at a bar, the last columns of its features: the probability of each order, and its value; then
# the weight that its account holds, the one that its order asks for, and whether there is an agent here: 0 or 1.
SAID = (*(f"agent_{order}" for order in ORDERS), "agent_value")
SERIES = (*SAID, "agent_weight", "agent_target", "agent_acts")
SMALLEST = -5.0  # logarithm of the smallest budget, in equal shares


@dataclass(frozen=True)
class Portfolio(PortfolioConfig):
    # The agents' run says the first two; the others are what budgets mean.
    costs: tyro.conf.Suppress[str] = "institutional"
    fill: tyro.conf.Suppress[str] = "auto"
    constraints: tyro.conf.Suppress[str] = LONG_ONLY
    orders: tyro.conf.Suppress[str] = "target"
    scale: tyro.conf.Suppress[float] = 1.0
    cash: tyro.conf.Suppress[bool] = True
    leverage: tyro.conf.Suppress[bool] = False
    net: tyro.conf.Suppress[float | None] = None


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the run; the script's by default"""
    seed: int = 1
    """seed of the network and the episodes; the panel is that of the agents' run"""
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
    """Portfolio-v0, or any Gymnasium id with vector observations and continuous actions, to check the algorithm itself"""
    agents: str | None = None
    """finished run directory of ppo_transformer_trading.py: one agent for all symbols. It says the market, its dates, splits,
    costs and fill too. Its agents learned on this same training split, where they look better than they are"""
    portfolio: Portfolio = field(default_factory=Portfolio)
    """constraints"""
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
    """penalty on the conditional value at risk of the worst --cvar-alpha of bars"""
    penalty_variance: float = 0.0
    """penalty on the squared net return; with log growth the relative risk aversion is 1 + 2 * this"""
    cvar_alpha: float = 0.05
    """share of bars that count as the tail"""

    hidden: int = 32
    """units of each hidden layer"""
    finetune_fraction: float = 0.0
    """share of the training, its last, in which the agents learn too; their accounts are then run anew in every iteration"""
    finetune_rate: float = 1e-5
    """learning rate of the agents there"""
    total_timesteps: int = 2_000_000
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
    """discount factor"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 16
    """minibatches per epoch"""
    update_epochs: int = 1
    """passes over each rollout; where noise outweighs the signal, new bars teach more than old ones"""
    norm_adv: bool = True
    """standardise advantages per minibatch"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss too"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    log_std: float = -1.0
    """logarithm of the policy's standard deviation at the start, in logarithms of budgets"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an update once a minibatch's approximate KL exceeds this"""
    reward_scale: float | None = None
    """factor on the rewards that the critic sees (by default one over the standard deviation of the training bars' returns)"""
    eval_every: int = 20
    """iterations between two backtests on the validation split"""
    eval_episodes: int = 100
    """with --env-id: episodes of the final evaluation"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for --env-id: the settings of rl-zoo for Pendulum-v1.
CLASSIC_CONTROL = dict(
    total_timesteps=100_000, num_envs=4, num_steps=1024, learning_rate=1e-3, gamma=0.9, gae_lambda=0.95, num_minibatches=64,
    update_epochs=10, reward_scale=0.1, log_std=0.0, num_threads=1, anneal_lr=False,
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
    """Standardises observations by the mean and variance of all seen so far; part of the model, saved with it.

    kind (size,): entries of the same kind share their mean and variance, those of kind -1 stay as they are.
    """

    def __init__(self, size, kind=None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))
        self.register_buffer("kind", (torch.arange(size) if kind is None else kind) + 1, persistent=False)
        self.register_buffer("members", self.kind.bincount(), persistent=False)

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

    def shared(self, x):
        """(size,) mean of x (size,) over the entries of the same kind."""
        if x.is_cuda:  # where a deterministic index_add_ would wait for the host
            total = torch.where(self.kind == torch.arange(len(self.members), device=x.device)[:, None], x, 0.0).sum(dim=1)
        else:
            total = x.new_zeros(len(self.members)).index_add_(0, self.kind, x)
        return (total / self.members)[self.kind]

    def forward(self, x):
        mean = self.shared(self.mean)
        scale = (self.shared(self.var + (self.mean - mean) ** 2) + 1e-8).rsqrt()
        mean, scale = mean.where(self.kind > 0, 0.0), scale.where(self.kind > 0, 1.0)
        return torch.addcmul((-mean * scale).float(), x, scale.float()).clamp_(-10.0, 10.0)


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


class Layer(nn.Module):
    """Attention, then a network four times as wide, each added to its input: nn.TransformerEncoderLayer(norm_first=True)
    without dropout, but able to compute only the last bars, which makes a single layer five times as fast."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x, last):
        """(n, last, width): what becomes of the last bars of x (n, W, width), which attend to all W."""
        n, _, width = x.shape
        seen, x = self.attention_norm(x), x[:, -last:]
        query = self.query(seen[:, -last:]).view(n, last, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(seen).view(n, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # (n, heads, last, width / heads)
        x = x + self.output(attended.transpose(1, 2).reshape(n, last, width))
        return x + self.feedforward(self.feedforward_norm(x))


class SymbolAgent(nn.Module):
    """The network of ppo_transformer_trading.py, which trades every symbol alone; its weights are those of a run.

    window: slice of the observation that holds `bars` rows of features, the oldest first.
    """

    def __init__(self, obs_size, num_actions, window, bars, layers, width, heads):
        super().__init__()
        self.norm = RunningNorm(obs_size)
        self.window, self.bars = window, bars
        length = window.stop - window.start
        self.embed = nn.Linear(length // bars, width)
        self.positions = nn.Parameter(torch.zeros(bars, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.encoded_norm = nn.LayerNorm(width)
        size = width + obs_size - length
        self.critic = nn.Sequential(nn.Linear(size, 64), Tanh(), nn.Linear(64, 64), Tanh(), nn.Linear(64, 1))
        self.actor = nn.Sequential(nn.Linear(size, 64), Tanh(), nn.Linear(64, 64), Tanh(), nn.Linear(64, num_actions))

    def encode(self, x):
        """Features (n, width + rest) of normalised observations (n, D): the last bar encoded, and what is around the window."""
        bars = self.embed(x[:, self.window].reshape(len(x), self.bars, -1)) + self.positions
        for k, layer in enumerate(self.layers, start=1):
            bars = layer(bars, last=1 if k == len(self.layers) else self.bars)
        return torch.cat([self.encoded_norm(bars[:, -1]), x[:, : self.window.start], x[:, self.window.stop :]], dim=1)

    def forward(self, obs, mask):
        """(n, len(SAID)) what it says of observations (n, D): the probability of each order, 0 if masked, and its value."""
        features = self.encode(self.norm(obs))
        probability = torch.where(mask, self.actor(features), -1e8).softmax(dim=1)
        return torch.cat([probability, self.critic(features)], dim=1)


class Agent(nn.Module):
    """Actor and critic over a set of symbols: one network looks at each, and what is common to all is their mean, so that
    another order of symbols is another order of actions, and the same value.

    own: slices of the observation that hold the same number of entries for each of num_symbols symbols, one after the other.
    acts, target: which of a symbol's entries say whether it has an agent, and what that asks for; None: always, and something.
    """

    def __init__(self, obs_size, num_symbols, outputs, own, acts, target, hidden, log_std):
        super().__init__()
        self.num_symbols, self.own, self.acts, self.target = num_symbols, own, acts, target
        kind, at = torch.full((obs_size,), -1), 0
        for block in own:
            each = (block.stop - block.start) // num_symbols
            kind[block] = torch.arange(at, at + each).repeat(num_symbols)
            at += each
        rest = kind < 0
        self.register_buffer("rest", rest.nonzero().squeeze(1), persistent=False)
        kind[rest] = torch.arange(at, at + len(self.rest))
        if acts is not None:
            kind[(kind == acts) | (kind == target)] = -1
        self.norm = RunningNorm(obs_size, kind)
        self.symbol = nn.Sequential(
            layer_init(nn.Linear(at, hidden)), Tanh(), layer_init(nn.Linear(hidden, hidden)), Tanh()
        )  # fmt: skip
        common = hidden + len(self.rest)
        self.critic = nn.Sequential(
            layer_init(nn.Linear(common, hidden)), Tanh(), layer_init(nn.Linear(hidden, hidden)), Tanh(),
            layer_init(nn.Linear(hidden, 1), std=1.0),
        )  # fmt: skip
        self.actor = nn.Sequential(
            layer_init(nn.Linear(hidden + common, hidden)), Tanh(), layer_init(nn.Linear(hidden, outputs), std=0.01)
        )  # fmt: skip
        self.log_std = nn.Parameter(torch.full((outputs,), log_std))

    def symbols(self, x):
        """(n, num_symbols, E) the entries of every symbol in observations x (n, D)."""
        return torch.cat([x[:, block].reshape(len(x), self.num_symbols, -1) for block in self.own], dim=2)

    def encode(self, x):
        """(n, num_symbols, hidden + common) features of normalised observations (n, D): the symbol's, then what is common."""
        own = self.symbols(x)
        seen = self.symbol(own)
        if self.acts is None:
            mean = seen.mean(dim=1)
        else:
            here = own[:, :, self.acts, None]
            mean = (seen * here).sum(dim=1) / here.sum(dim=1).clamp(min=1.0)
        common = torch.cat([mean, x[:, self.rest]], dim=1)
        return torch.cat([seen, common[:, None].expand(-1, self.num_symbols, -1)], dim=2)

    def mean(self, features):
        return self.actor(features).flatten(1)

    def counts(self, x):
        """(n, A) which actions have an effect: not those on symbols whose agent asks for nothing."""
        if self.target is None:
            return torch.ones((len(x), len(self.log_std)), dtype=torch.bool, device=x.device)
        return self.symbols(x)[:, :, self.target] > 0.0

    def log_prob(self, mean, action, counts=1.0):
        """(n,) log-density of those actions (n, A) that count, given the policy's mean, (n, A) or by symbol; its standard
        deviation is the same for all symbols. The others change nothing, and would add their noise to the gradient."""
        log_std = self.log_std.repeat(self.num_symbols)
        z = (action - mean.flatten(1)) * (-log_std).exp()
        return ((-0.5 * z.square() - log_std - 0.5 * np.log(2 * np.pi)) * counts).sum(1)

    def entropy(self):
        return self.num_symbols * (self.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()

    def value(self, features):
        return self.critic(features[:, 0, -self.critic[0].in_features :]).squeeze(1)


def load_agents(folder, device):
    """run.json of a finished run of ppo_transformer_trading.py, its market's panel, splits and TradingData, and its network.

    Raises ValueError naming --agents, the folder, and what is missing or another one than it says.
    """
    where = f"--agents {folder}"
    if folder is None:
        raise ValueError("--agents: expected the run directory of ppo_transformer_trading.py; only --env-id needs none")
    for name in ("run.json", "model.pt"):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{where}: no {name} there; expected a finished run of ppo_transformer_trading.py")
    run = json.loads((Path(folder) / "run.json").read_text())
    if run.get("env_id") != AGENTS_ENV or run.get("status") != "finished":
        raise ValueError(f"{where}: a {run.get('status')} run of {run.get('env_id')}; expected a finished one of {AGENTS_ENV}")
    saved = run["args"]
    if saved.get("shard", "0/1") != "0/1":
        raise ValueError(f"{where}: trades --shard {saved['shard']} of the symbols; expected a run that trades all of them")
    panel = load_market(
        saved["market"], saved["seed"], symbols=saved["symbols"] or None, start=saved["start"], end=saved["end"],
        resample=saved["resample"],
    )  # fmt: skip
    if panel.sha256 != run["panel"]["sha256"]:
        raise ValueError(
            f"{where}: its panel {saved['market']} has sha256 {panel.sha256} now; expected {run['panel']['sha256']}"
        )
    if saved["folds"]:
        splits = panel.walk_forward(saved["folds"], val_fraction=saved["val_fraction"], embargo=saved["embargo"])[saved["fold"]]
    else:
        splits = panel.split(saved["train_fraction"], saved["val_fraction"], saved["embargo"])
    try:
        trading = TradingData(panel, TradingConfig(**saved["trading"]))
        sizes = (saved[name] for name in ("layers", "width", "heads"))
        agents = SymbolAgent(trading.observation_size, len(ORDERS), trading.layout["window"], trading.config.window, *sizes)
        agents.load_state_dict(torch.load(Path(folder) / "model.pt", map_location="cpu", weights_only=True)["best_model"])
    except (KeyError, RuntimeError, TypeError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"{where}: {what}; expected arguments and weights of ppo_transformer_trading.py") from error
    return run, panel, splits, trading, agents.to(device)


def said(data):
    """(T, N, len(SERIES)) view of PortfolioData's table of features that holds what the agents say."""
    panel = data.panel
    return data.assets.reshape(panel.num_bars, panel.num_symbols, -1)[:, :, -len(SERIES) :]


def asked(data, rows=slice(None)):
    """At rows (n,) of PortfolioData's tables: (n, N) weights that the agents' orders ask for, (n,) largest sum of weights."""
    return said(data)[rows, :, SERIES.index("agent_target")], data.gross[rows]


def to_scores(actions, target, gross):
    """Scores (n, N + 1) for Portfolio-v0, which are weights and the rest in cash, of actions (n, N) and what is `asked` there.

    The budget of symbol i is exp(action i) equal shares of the equity, and of that it gets the weight that its agent's order
    asks for: 0 everywhere is equal budgets. If together they come to more than all equity, all are cut in proportion.
    Takes arrays, or tensors of a GPU.
    """
    xp = torch if isinstance(actions, torch.Tensor) else np
    weights = xp.exp(xp.asarray(actions, dtype=xp.float64)) * target / target.shape[1]
    total, budget = weights.sum(axis=1, keepdims=True), xp.clip(gross, None, 1.0)[:, None]
    weights = xp.asarray(weights * xp.clip(budget / xp.clip(total, 1e-12, None), None, 1.0), dtype=xp.float32)
    # Rounded up: what is left over would be spread by the projection, a trifle for every symbol, whatever its agent says.
    cash = xp.asarray(budget - weights.sum(axis=1, keepdims=True, dtype=xp.float64), dtype=xp.float32)
    cash = xp.clip(xp.nextafter(cash, xp.full_like(cash, 2.0)), 0.0, None)
    return xp.concatenate([weights, cash], axis=1)


class Budgets(gym.vector.VectorWrapper):
    """Portfolio-v0 with the logarithms of budgets for actions (`to_scores`), up to the whole equity for one symbol.

    Markets on a GPU copy the tables of `data` when they are first used, and so does this: what agents say later is not seen.
    """

    def __init__(self, env, data):
        super().__init__(env)
        self.tables = asked(data)
        number = data.panel.num_symbols
        self.single_action_space = gym.spaces.Box(SMALLEST, np.log(number, dtype=np.float32), (number,), np.float32)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, env.num_envs)

    def step(self, actions, out=None):
        rows = self.env.unwrapped.rows
        if isinstance(rows, torch.Tensor) and not isinstance(self.tables[0], torch.Tensor):
            self.tables = [torch.tensor(table, device=rows.device) for table in self.tables]
        return self.env.step(to_scores(actions, *(table[rows] for table in self.tables)), out=out)


def make_envs(args, splits, options, device="cpu"):
    """Training environments: markets, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if args.env_id != MARKET_ENV:
        return gym.make_vec(
            args.env_id, args.num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
    markets = gym.make_vec(
        MARKET_ENV, args.num_envs, split=splits["train"], episode_length=args.episode_length, device=device, **options
    )  # fmt: skip
    return Budgets(markets, options["data"])


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
        nested = {"portfolio": Portfolio(**saved["portfolio"]), "guard": RegimeGuard(**saved["guard"])}
        args = Args(**{**saved, **nested, "resume": args.resume})
    for flag in (
        "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every", "log_episodes", "hidden",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if not args.log_at or not all(0.0 < share <= 1.0 for share in args.log_at):
        sys.exit(f"--log-at {args.log_at}: expected shares of the training, above 0 and at most 1")
    logged = sorted(Path(args.log_dataset).glob(f"{args.exp_name}__{args.seed}__*/dataset.hdf5")) if args.log_dataset else []
    if logged and not checkpoint:
        sys.exit(f"--log-dataset {args.log_dataset}: holds {logged[0].parent.name} already; expected none of this seed")
    if not 0.0 <= args.finetune_fraction <= 1.0:
        sys.exit(f"--finetune-fraction {args.finetune_fraction}: expected a share of the training, 0 to 1")
    if args.reward not in ("growth", "sharpe"):
        sys.exit(f"--reward {args.reward}: expected growth or sharpe")
    is_market = args.env_id == MARKET_ENV
    if args.log_dataset and is_market:
        sys.exit(f"--log-dataset {args.log_dataset}: expected only with --env-id of Gymnasium; its data would need the agents")
    if args.reward_scale is None and not is_market:
        sys.exit("--reward-scale None: expected a number with --env-id of Gymnasium")
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # under torchrun
    if args.num_envs % world_size:
        sys.exit(f"--num-envs {args.num_envs}: expected a multiple of the {world_size} processes")
    num_envs = args.num_envs // world_size
    batch_size = num_envs * args.num_steps  # of this process
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = max(1, args.total_timesteps // (batch_size * world_size))
    frozen_iterations = num_iterations - round(args.finetune_fraction * num_iterations)
    if args.num_minibatches > batch_size:
        sys.exit(f"--num-minibatches {args.num_minibatches}: expected 1 to {batch_size}, the steps of a rollout")

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
    if args.cudagraphs and args.finetune_fraction > 0.0:
        sys.exit("--cudagraphs: expected --finetune-fraction 0: a minibatch of learning agents has no fixed size to record")
    if rank > 0:  # this process does all that the first one does, so that it decides alike, but keeps nothing of it
        scratch = tempfile.TemporaryDirectory()
        args.runs_dir, args.track, args.log_dataset = scratch.name, False, None
        sys.stdout = open(os.devnull, "w")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, env_options = None, None, None
    try:
        if is_market:
            agents_run, panel, splits, trading, agents = load_agents(args.agents, device)
            terms = {name: agents_run["args"]["trading"][name] for name in ("costs", "fill")}
            args.portfolio = dataclasses.replace(args.portfolio, **terms)
            # What the agents say is shown as series of the panel, and written into the tables once it is known: `run_agents`.
            unknown = dict.fromkeys(SERIES, np.zeros(panel.close.shape))
            data = PortfolioData(dataclasses.replace(panel, extras=unknown), args.portfolio)
            weights = {"log_growth": float(args.reward == "growth"), "differential_sharpe": float(args.reward == "sharpe")}
            weights |= {name: getattr(args, f"penalty_{name}") for name in ("turnover", "drawdown", "cvar", "variance")}
            env_options = dict(
                data=data, guard=args.guard, reward_weights=weights, cvar_alpha=args.cvar_alpha, num_threads=args.num_threads
            )
            print(f"agents  {args.agents}, seed {agents_run['args']['seed']}, {agents_run['env_steps']} steps")
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
        train_envs = make_envs(dataclasses.replace(args, num_envs=num_envs), splits, env_options, market_device)
        if not isinstance(train_envs.single_action_space, gym.spaces.Box):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected continuous actions")
        if args.log_dataset:  # refuse actions that no dataset can hold
            dataset.layout(f"--log-dataset {args.log_dataset}", 1, train_envs.single_action_space)
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(np.prod(train_envs.single_action_space.shape))
    lowest, highest = train_envs.single_action_space.low, train_envs.single_action_space.high
    lowest_action, highest_action = (torch.as_tensor(bound).to(device) for bound in (lowest, highest))
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    # Any other environment is taken for a single symbol, with all of its actions.
    shape = dict(num_symbols=1, outputs=num_actions, own=[slice(0, obs_size)], acts=None, target=None)
    if is_market:
        at = {name: data.features.index(name) for name in SERIES}
        own = [data.layout[block] for block in ("assets", "weights", "drift")]
        shape = dict(num_symbols=num_actions, outputs=1, own=own, acts=at["agent_acts"], target=at["agent_target"])
    agent = Agent(obs_size, hidden=args.hidden, log_std=args.log_std, **shape).to(device)
    on_cuda = device.type == "cuda"  # captured or not: a rate in memory is rounded to float32
    rate = torch.tensor(args.learning_rate, device=device) if on_cuda else args.learning_rate
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, fused=True, capturable=on_cuda)
    reward_scale = args.reward_scale
    if reward_scale is None:  # so that the critic has the same share of the gradient on every market
        usable = np.concatenate([np.arange(*bounds) for bounds in splits["train"].ranges])
        reward_scale = 1.0 / max(log_returns(panel)[usable][panel.present[usable]].std(), 1e-8)
    tuner = torch.optim.Adam(agents.parameters(), lr=args.finetune_rate, eps=1e-5, fused=True) if is_market else None
    if world_size > 1:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, rank)).generate_state(1)[0]))  # now every process by itself

    # Storage where the markets are: their kernels write observations straight into it
    place = device if on_gpu else "cpu"
    obs = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=place)
    rewards = torch.zeros((args.num_steps, num_envs), device=place)
    terminated, done = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(rewards, dtype=torch.bool)
    x = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=device)  # normalised observations
    actions = torch.zeros((args.num_steps, num_envs, num_actions), device=device)
    logprobs, values = torch.zeros((args.num_steps, num_envs), device=device), torch.zeros(x.shape[:2], device=device)
    counts = torch.ones((args.num_steps, num_envs, num_actions), dtype=torch.bool, device=device)
    panel_rows = torch.zeros((args.num_steps, num_envs), dtype=torch.int64, device=place)
    final_values = torch.zeros_like(logprobs)  # of the last observation of an episode that ended at this step
    advantages, returns = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    mb_x = torch.zeros((minibatch_size, obs_size), device=device)
    mb_actions = torch.zeros((minibatch_size, num_actions), device=device)
    index = torch.zeros(minibatch_size, dtype=torch.int64, device=device)  # of the minibatch, in the rollout

    def run_agents(split):
        """Run every symbol's account over a split, all orders the most likely ones; returns its ledger by symbol.

        What is said at every bar goes into `data`: it depends on that bar and those before it alone. With fine-tuning, what is
        seen on the training split is kept in `seen`.
        """
        runs = trading.market(splits[split])
        symbol, last = runs.symbol[runs.order], np.full(len(runs.order), -1)
        going = np.ones(len(last), bool)
        markets = TradingVectorEnv(
            len(last), data=trading, split=splits[split], episode_length=0, random_start=False, num_threads=args.num_threads
        )
        weight = trading.layout["position"].start + POSITION.index("weight")
        for start, stop in splits[split].ranges:
            said(data)[start:stop] = 0.0

        def symbol_policy(observation, mask, row):
            with torch.no_grad():
                says = agents(torch.as_tensor(observation).to(device), torch.as_tensor(mask).to(device)).cpu().numpy()
            order = says[:, : len(ORDERS)].argmax(axis=1)
            going[:] &= row > last  # an account that is over begins again, and is not listened to any more
            last[:] = row
            at = row[going], symbol[going]
            own = np.column_stack([observation[:, weight], markets.targets(order), np.ones(len(order))])
            said(data)[at] = np.hstack([says, own])[going]
            if seen and split == "train":
                seen["obs"][at], seen["mask"][at] = observation[going], mask[going]
            return order

        torch.set_num_threads(1)  # for a few rows at a time, waiting for threads costs more than they save
        frame = ledger.backtest(markets, symbol_policy, panel, splits[split])
        torch.set_num_threads(args.num_threads)
        return frame

    said_at = slice(-len(SERIES), len(SAID) - len(SERIES))  # of a symbol's features

    def say(at):
        """(len(at), N, len(SAID)) what the agents say now at training rows, differentiable; 0 where there is none."""
        here = said(data)[at, :, SERIES.index("agent_acts")] > 0
        at, symbol = at[np.nonzero(here)[0]], np.nonzero(here)[1]
        says = agents(
            torch.from_numpy(seen["obs"][at, symbol]).to(device), torch.from_numpy(seen["mask"][at, symbol]).to(device)
        )
        out = torch.zeros((*here.shape, len(SAID)), device=device)
        out[torch.from_numpy(here).to(device)] = says
        return out

    seen = {}
    if is_market and args.finetune_fraction > 0.0:  # pages that nothing is written to take no memory
        seen["obs"] = np.zeros((*panel.close.shape, trading.observation_size), np.float32)
        seen["mask"] = np.zeros((*panel.close.shape, len(ORDERS)), bool)

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    best_agents = {k: v.clone() for k, v in agents.state_dict().items()} if is_market else None
    episode_return, recent_returns = np.zeros(num_envs), []
    ended_return = torch.zeros_like(rewards, dtype=torch.float64)  # on a GPU: that of an episode at the step that it ended at
    if on_gpu:
        episode_return = torch.zeros(num_envs, device=device, dtype=torch.float64)
    if is_market:
        if checkpoint:
            agents.load_state_dict(checkpoint["agents"])
        for split in ("train", "val"):
            run_agents(split)
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
        tuner.load_state_dict(checkpoint["tuner"])
        torch.set_rng_state(own(checkpoint["rng"]))
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own(checkpoint["cuda_rng"]))
        train_envs.unwrapped.set_state({k: own(v).numpy() for k, v in checkpoint["envs"].items()})
        obs[0] = own(checkpoint["obs"])
        episode_return[:] = own(checkpoint["episode_return"]).to(place) if on_gpu else own(checkpoint["episode_return"]).numpy()
        recent_returns = checkpoint["recent_returns"]
        best_score, best_model = checkpoint["best_score"], checkpoint["best_model"]
        best_agents = checkpoint["best_agents"]
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
        run["agents"] = {name: agents_run[name] for name in ("args", "script_sha256", "env_steps")}
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

    def most_likely(observation):
        with torch.no_grad():
            mean = agent.mean(agent.encode(agent.norm(torch.as_tensor(observation).to(device))))
        return mean.cpu().numpy().clip(lowest, highest)

    def agent_policy(observation, _, row):
        return to_scores(most_likely(observation), *asked(data, row))

    def equal_budgets(observation, _, row):
        return to_scores(np.zeros((len(observation), num_actions)), *asked(data, row))

    def backtest(split, policy=agent_policy, **changes):
        return portfolio_references.run(split=splits[split], policy=policy, **{**env_options, **changes})

    def log_dataset(iteration):
        """Episodes of the policy as it explores now. Their random numbers are their own: training does not notice."""
        path = Path(args.log_dataset) / f"{args.exp_name}__{args.seed}__{global_step}" / "dataset.hdf5"
        if path.exists():
            return  # logged before the run was interrupted
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        noise = torch.Generator().manual_seed(seed)

        def act(observation, *_):
            with torch.no_grad():
                normalised = agent.norm(torch.as_tensor(observation).to(device))
                mean = agent.mean(agent.encode(normalised))
                action = mean + agent.log_std.exp() * torch.randn(mean.shape, generator=noise).to(device)
                action = action.clamp(torch.as_tensor(lowest).to(device), torch.as_tensor(highest).to(device))
                # at the action that is recorded: whoever reads it can compute it again
                logprob = agent.log_prob(mean, action, agent.counts(normalised))
            return action.cpu().numpy(), logprob.cpu().numpy()

        task = {"env_id": args.env_id, "seed": args.seed}
        weights = b"".join(value.cpu().numpy().tobytes() for value in agent.state_dict().values())
        behaviour = {"policy": args.exp_name, "step": global_step, "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
        meta = provenance(task, None, None, run["git_commit"], args.gamma, [behaviour])
        episodes = make_envs(dataclasses.replace(args, num_envs=min(64, args.log_episodes)), splits, env_options)
        dataset_writer.log_episodes(path, episodes, act, args.log_episodes, meta, seed)

    # What is computed, as functions of tensors: --compile compiles each of them
    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def choose(observation):
        """Normalised observations (n, D), actions (n, A) drawn from the policy, their log-densities (n,), values (n,), and
        `counts` (n, A)."""
        with torch.no_grad(), autocast():
            normalised = agent.norm(observation)
            features = agent.encode(normalised)
            mean, value, counts = agent.mean(features).float(), agent.value(features).float(), agent.counts(normalised)
            std = agent.log_std.exp().repeat(agent.num_symbols)
            action = mean + std * torch.randn_like(mean)  # kept as drawn: the market gets it clipped
            return normalised, action, agent.log_prob(mean, action, counts), value, counts

    def value_of(normalised):
        with torch.no_grad(), autocast():
            return agent.value(agent.encode(normalised)).float()

    def accumulate(values, final_values, rewards, terminated, done):
        """Advantages (T, n). A finished episode is followed by its own last observation, never by the first of the next one:
        V(final_obs) is bootstrapped where the window was cut (truncation), not where the account was ruined."""
        deltas = reward_scale * rewards - values[:-1]
        deltas += args.gamma * torch.where(done, final_values, values[1:]) * ~terminated
        carry = args.gamma * args.gae_lambda * ~done
        running, found = torch.zeros(num_envs, device=device), []
        for step in reversed(range(args.num_steps)):
            running = deltas[step] + carry[step] * running
            found.append(running)
        return torch.stack(found[::-1])

    def objective(x, action, counts, old_logprob, advantage, old_value, target):
        """The loss of a minibatch, its parts that are watched (5,), and ratio, entropy and new values."""
        with autocast():
            features = agent.encode(x)
            mean, new_value = agent.mean(features).float(), agent.value(features).float()
        new_logprob, entropy = agent.log_prob(mean, action, counts), agent.entropy()
        logratio = new_logprob - old_logprob
        ratio = logratio.exp()
        if args.norm_adv:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()

        v_loss = (new_value - target) ** 2
        if args.clip_vloss:
            v_clipped = old_value + (new_value - old_value).clamp(-args.clip_coef, args.clip_coef)
            v_loss = torch.max(v_loss, (v_clipped - target) ** 2)
        v_loss = 0.5 * v_loss.mean()

        loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
        with torch.no_grad():
            approx_kl = ((ratio - 1) - logratio).mean()  # k3, http://joschu.net/blog/kl-approx.html
            clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
            watched = torch.stack([pg_loss, v_loss, entropy, approx_kl, clip_fraction])
        return loss, watched, ratio, entropy, new_value

    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
        functions = choose, value_of, accumulate, objective
        choose, value_of, accumulate, objective = (torch.compile(function, dynamic=False) for function in functions)

    # The three parts of an iteration, on the storage above: --cudagraphs records each of them
    def rollout():
        """Every market's next --num-steps bars, all of it on the GPU."""
        for step in range(args.num_steps):
            if finetuning:
                panel_rows[step] = train_envs.unwrapped.rows
            x[step], actions[step], logprobs[step], values[step], counts[step] = choose(obs[step])
            clipped = actions[step].clamp(lowest_action, highest_action)
            _, reward, term, trunc, infos = train_envs.step(clipped, out=obs[step + 1])
            rewards[step], terminated[step] = reward, term
            torch.logical_or(term, trunc, out=done[step])
            final_values[step] = value_of(agent.norm(infos["final_obs"]))
            episode_return.add_(reward)
            ended_return[step] = episode_return
            episode_return.mul_(~done[step])

    def estimate_advantages():
        with torch.no_grad():
            x[-1] = agent.norm(obs[-1].to(device))
        values[-1] = value_of(x[-1])
        advantages.copy_(accumulate(values, final_values, rewards.to(device), terminated.to(device), done.to(device)))
        torch.add(advantages, values[:-1], out=returns)

    def heard():
        """The inputs mb_x once more, of what the agents say now: the same numbers, but for rounding, and differentiable."""
        at, where = np.unique(panel_rows.flatten()[index.to(place)].cpu().numpy(), return_inverse=True)
        mb_obs = obs[:-1].flatten(0, 1)[index.to(place)].to(device)
        mb_obs[:, data.layout["assets"]].view(minibatch_size, num_actions, -1)[:, :, said_at] = say(at)[where]
        return agent.norm(mb_obs)

    def update():
        """A step of the optimiser, or of both, on the rows `index` of the rollout; what `objective` returns."""
        torch.index_select(x[:-1].flatten(0, 1), 0, index, out=mb_x)
        torch.index_select(actions.flatten(0, 1), 0, index, out=mb_actions)
        batch = (rows.flatten()[index] for rows in (logprobs, advantages, values[:-1], returns))
        found = objective(heard() if finetuning else mb_x, mb_actions, counts.flatten(0, 1)[index], *batch)
        learning = [(agent, optimizer), (agents, tuner)] if finetuning else [(agent, optimizer)]
        for _, descent in learning:
            descent.zero_grad()
        found[0].backward()
        for network, descent in learning:
            if world_size > 1:
                gradients = [p.grad for p in network.parameters()]
                together = average(torch.cat([g.flatten() for g in gradients]))
                for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients])):
                    gradient.copy_(mean.view_as(gradient))
            nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm, foreach=True)
            descent.step()
        return tuple(part.detach() for part in found)

    def normalise():
        agent.norm.update(obs[:-1].flatten(0, 1).to(device))

    if args.cudagraphs:
        rollout, estimate_advantages, update, normalise = map(Captured, (rollout, estimate_advantages, update, normalise))

    log_after = {max(1, round(share * num_iterations)) for share in args.log_at} if args.log_dataset else set()
    started, failure = time.time(), None
    steps = batch_size * world_size
    progress = tqdm(
        total=num_iterations * steps, initial=global_step, unit="step", unit_scale=True, mininterval=0.5, disable=rank > 0
    )
    for iteration in range(first_iteration, num_iterations + 1):
        tick, finetuning = time.perf_counter(), is_market and iteration > frozen_iterations
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
                x[step], actions[step], logprobs[step], values[step], counts[step] = choose(obs[step].to(device))
                action = actions[step].cpu().numpy().clip(lowest, highest)
                if is_market:
                    panel_rows[step] = torch.from_numpy(train_envs.unwrapped.rows)
                    _, reward, term, trunc, infos = train_envs.step(action, out=obs[step + 1].numpy())
                else:
                    next_obs, reward, term, trunc, infos = train_envs.step(action.reshape(train_envs.action_space.shape))
                    obs[step + 1] = torch.as_tensor(next_obs.reshape(num_envs, -1))
                rewards[step] = torch.as_tensor(reward)
                terminated[step] = torch.as_tensor(term)
                over = term | trunc
                done[step] = torch.as_tensor(over)
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
                with torch.no_grad(), autocast():  # never compiled: their number varies
                    final_values[at_step, at_env] = agent.value(agent.encode(agent.norm(final_obs.to(device)))).float()
        global_step += steps
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages and update
        estimate_advantages()
        statistics, updates, stop_update = torch.zeros(5, device=device), 0, False
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
        if finetuning:  # the accounts of these agents, and what is seen of them from the next bar on
            run_agents("train")
            if on_gpu:  # whose markets have copied the tables: others, which go on where these are
                state = train_envs.unwrapped.get_state()
                train_envs = make_envs(dataclasses.replace(args, num_envs=num_envs), splits, env_options, market_device)
                train_envs.unwrapped.set_state(state)
            at = torch.as_tensor(train_envs.unwrapped.rows).cpu().numpy()
            obs[-1][:, data.layout["assets"]] = torch.from_numpy(data.assets[at])
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
        losses = dict(zip(names, (average(statistics) / updates).tolist()))
        train_seconds += time.perf_counter() - tick

        # Fail-safe: stop cleanly, and say where
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
        if finetuning:
            bad += [f"agents.{name}" for name, p in agents.named_parameters() if not torch.isfinite(p).all()]
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
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(steps)

        # Validation: choose the model here, never on the test split
        if is_market and (iteration % args.eval_every == 0 or iteration == num_iterations):
            if finetuning:
                run_agents("val")
            score = portfolio_references.utility(backtest("val"), risk_aversion, panel.bars_per_year)
            writer.add_scalar("eval/val_utility", score, global_step)
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best = score, 0
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
                best_agents = {k: v.clone() for k, v in agents.state_dict().items()}
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
                "agents": agents.state_dict() if is_market else None, "best_agents": best_agents,
                "tuner": tuner.state_dict() if is_market else None, "obs": gathered(obs[-1]),
                "episode_return": gathered(torch.as_tensor(episode_return)),
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
        "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None, "val_utility": best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    if is_market:
        agent.load_state_dict(best_model)
        agents.load_state_dict(best_agents)
        accounts = {split: run_agents(split) for split in splits}
        frames = {split: backtest(split) for split in splits}
        ledger.write_ledger(run_dir / "symbols.parquet", pd.concat(accounts.values(), ignore_index=True))
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        equal = {split: backtest(split, equal_budgets) for split in splits}
        compared = {
            "agent": frames["test"], "equal budgets, rebalanced": equal["test"], "equal budgets": ledger.book(accounts["test"]),
            **portfolio_references.references(data, splits["test"], risk_aversion),
        }  # fmt: skip
        if args.guard.active:
            compared["without guard"] = backtest("test", guard=RegimeGuard())
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(frames[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        for name, frame in compared.items():
            scores[name]["utility"] = portfolio_references.utility(frame, risk_aversion, panel.bars_per_year)
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':26}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'utility':>9}{'drawdown':>10}", end="")
        print(f"{'turnover':>10}{'cost':>8}{'gross':>7}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:26}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['utility']:9.1%}", end="")
            print(f"{s['max_drawdown']:10.1%}{s['turnover']:9.0f}x{s['cost']:8.1%}{s['gross_exposure']:7.2f}")
        if "closed form" in scores:
            run["utility_share"] = scores["agent"]["utility"] / scores["closed form"]["utility"]
            alive = {name: frame["net_exposure"][frame["equity"] > RUIN] for name, frame in compared.items()}
            weight, best = (float(alive[name].mean()) for name in ("agent", "closed form"))
            run["mean_net_exposure"] = {"agent": weight, "closed form": best}
            print(f"utility at risk aversion {risk_aversion:g} is {run['utility_share']:.3f} of the closed form's; ", end="")
            print(f"mean net exposure {weight:.3f}, closed form {best:.3f}")
        bars, run["over"] = ["market", "timestamp"], {}
        for name in ("equal budgets, rebalanced", "equal budgets"):
            # An account that holds every bar, and one that begins once the first agent acts: on the bars that both have
            other = compared[name]
            both = [one.merge(two[bars], on=bars) for one, two in ((frames["test"], other), (other, frames["test"]))]
            gain, low, high, how = ledger.difference(*both, panel.bars_per_year)
            run["over"][name] = {"growth_gained": gain, "low": low, "high": high, "bootstrap": how}
            print(f"growth {gain:+.2%} a year over {name}, 95% interval [{low:.2%}, {high:.2%}] ({how})")
        run["equal_budgets"] = {s: float(ledger.growth(f).mean() * panel.bars_per_year) for s, f in equal.items()}
        told = ", ".join(f"{growth:.1%} on {split}" for split, growth in run["equal_budgets"].items())
        print(f"growth of equal budgets, rebalanced: {told}; the agents learned on the first of these")
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
        returns, episode_return[:] = [], 0.0
        while len(returns) < args.eval_episodes:
            action = most_likely(obs_now.astype(np.float32).reshape(num_envs, -1))
            obs_now, reward, term, trunc, _ = train_envs.step(action.reshape(train_envs.action_space.shape))
            episode_return += reward
            returns.extend(episode_return[term | trunc].tolist())
            episode_return[term | trunc] = 0.0
        run["eval_return"] = float(np.mean(returns))
        print(f"mean return of {len(returns)} episodes of its mean action: {run['eval_return']:.4g}")
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
    if world_size > 1:
        dist.destroy_process_group()
