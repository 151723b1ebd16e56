"""Masked PPO (arXiv:1707.06347): one pre-norm transformer encoder (arXiv:1706.03762, 2002.04745) trades every symbol alone."""

import argparse
import dataclasses
import hashlib
import os
import sys
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
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs  # noqa: F401  (registers Trading-v0)
from envs import dataset, dataset_writer, ledger, trades, trading_references
from envs.costs import RUIN
from envs.features import log_returns
from envs.synthetic import load_market
from envs.task import provenance
from envs.trading import ORDERS, REWARDS
from envs.trading_tables import TradingConfig, TradingData, shard_of

MARKET_ENV = "Trading-v0"
LATENCY_BATCH, LATENCY_CALLS = 32, 200
MONOTONY = 0.99  # share of one order, of those given where there was a choice, above which a policy counts as degenerate


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
    log_dataset: str | None = None
    """with --env-id: folder to log episodes to as offline data, a dataset for each entry of --log-at"""
    log_at: tuple[float, ...] = (1.0,)
    """shares of the training after which the policy of that moment is logged, as it explores; 1 also if --patience ends it"""
    log_episodes: int = 100
    """episodes of each dataset"""

    env_id: str = MARKET_ENV
    """Trading-v0, or any Gymnasium id with vector observations and discrete actions, to check the algorithm itself"""
    market: str = "synthetic:ou"
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...]; with the prefix shuffled:,
    bootstrap:[key=value:...] or crossed:, one made of it from the seed (envs/resampled.py)"""
    symbols: tuple[str, ...] = ()
    """symbols of the market to keep and to trade (all by default)"""
    shard: str = "0/1"
    """i/n: trade only every n-th of them, from the i-th on, i from 0; splits and market features remain those of all"""
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
    trading: TradingConfig = field(default_factory=TradingConfig)
    """costs, fill, orders, exits, risk limits and what an agent sees"""
    episode_length: int = 256
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

    layers: int = 1
    """transformer layers; published for trading: --layers 4 --width 256 --heads 8"""
    width: int = 32
    """size of a token, one for each bar of --window"""
    heads: int = 2
    """attention heads of a layer"""
    total_timesteps: int = 3_000_000
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
    """discount factor; a position is held for ten bars or so"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 16
    """minibatches per epoch"""
    update_epochs: int = 1
    """passes over each rollout; where the market's noise is 20 times its signal, new bars teach more than old ones"""
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
    reward_scale: float | None = None
    """factor on the rewards that the critic sees (by default one over the standard deviation of the training bars' returns)"""
    eval_every: int = 20
    """iterations between two backtests on the validation split"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for --env-id: CleanRL's settings for classic control, and smaller rewards: with values of 100 the critic fills
# the gradient's norm, and a policy that slips late in training no longer recovers (CartPole: 162 instead of 500, 1 seed of 3).
CLASSIC_CONTROL = dict(
    total_timesteps=500_000, num_envs=4, num_steps=128, learning_rate=2.5e-4, gamma=0.99, gae_lambda=0.95,
    update_epochs=4, ent_coef=0.01, reward_scale=0.05, num_threads=1,
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
        return FastTanh.apply(x)


def xavier_init(layer, parts=1):
    """Xavier-uniform weights of a linear layer, or of `parts` layers of the same size whose outputs are concatenated."""
    for weight in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(weight)
    nn.init.zeros_(layer.bias)
    return layer


class Layer(nn.Module):
    """Attention, then a network four times as wide, each added to its input: nn.TransformerEncoderLayer(norm_first=True)
    without dropout, but able to compute only the last bars, which makes a single layer five times as fast."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = xavier_init(nn.Linear(width, width)), xavier_init(nn.Linear(width, 2 * width), parts=2)
        self.output = xavier_init(nn.Linear(width, width))
        self.feedforward = nn.Sequential(
            xavier_init(nn.Linear(width, 4 * width)), nn.ReLU(), xavier_init(nn.Linear(4 * width, width))
        )

    def forward(self, x, last):
        """(n, last, width): what becomes of the last bars of x (n, W, width), which attend to all W."""
        n, _, width = x.shape
        seen, x = self.attention_norm(x), x[:, -last:]
        query = self.query(seen[:, -last:]).view(n, last, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(seen).view(n, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # (n, heads, last, width / heads)
        x = x + self.output(attended.transpose(1, 2).reshape(n, last, width))
        return x + self.feedforward(self.feedforward_norm(x))


class Agent(nn.Module):
    """Actor and critic on the encoder's view of the last bar, and on the observation around the window as it is.

    window: slice of the observation that holds `bars` rows of features, the oldest first.
    """

    def __init__(self, obs_size, num_actions, window, bars, layers, width, heads):
        super().__init__()
        self.norm = RunningNorm(obs_size)
        self.window, self.bars = window, bars
        length = window.stop - window.start
        self.embed = xavier_init(nn.Linear(length // bars, width))
        self.positions = nn.Parameter(0.02 * torch.randn(bars, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.encoded_norm = nn.LayerNorm(width)
        size = width + obs_size - length
        self.critic = nn.Sequential(
            layer_init(nn.Linear(size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )  # fmt: skip
        self.actor = nn.Sequential(
            layer_init(nn.Linear(size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )  # fmt: skip

    def encode(self, x):
        """Features (n, width + rest) of normalised observations (n, D): the last bar encoded, and what is around the window."""
        bars = self.embed(x[:, self.window].reshape(len(x), self.bars, -1)) + self.positions
        for k, layer in enumerate(self.layers, start=1):
            bars = layer(bars, last=1 if k == len(self.layers) else self.bars)
        return torch.cat([self.encoded_norm(bars[:, -1]), x[:, : self.window.start], x[:, self.window.stop :]], dim=1)

    def log_probs(self, features, mask):
        """(n, A) log-probabilities; masked actions have about -1e8."""
        return torch.where(mask, self.actor(features), -1e8).log_softmax(dim=1)

    def value(self, features):
        return self.critic(features).squeeze(1)

    def act_greedily(self, obs, mask):
        return torch.where(mask, self.actor(self.encode(self.norm(obs))), -1e8).argmax(dim=1)


def draw(p):
    """(...,) actions drawn with probabilities p (..., A), which need not quite sum to 1; one without probability never is."""
    if p.device.type == "cpu":  # inverts the distribution
        cumulative = p.cumsum(dim=-1)
        drawn = torch.rand((*p.shape[:-1], 1), device=p.device) * cumulative[..., -1:]
        return (cumulative <= drawn).sum(dim=-1)
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)  # cumsum is not deterministic there


def make_envs(args, splits, env_options):
    """Training environments: markets, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if args.env_id != MARKET_ENV:
        return gym.make_vec(
            args.env_id, args.num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
    return gym.make_vec(MARKET_ENV, args.num_envs, split=splits["train"], **env_options)


def latency(agent, obs_size, num_actions, device):
    """Milliseconds from LATENCY_BATCH observations to their orders: median and 95th percentile of LATENCY_CALLS calls."""
    obs = torch.zeros((LATENCY_BATCH, obs_size), device=device)
    mask = torch.ones((LATENCY_BATCH, num_actions), dtype=torch.bool, device=device)
    seconds = []
    for _ in range(LATENCY_CALLS):
        tick = time.perf_counter()
        with torch.no_grad():
            agent.act_greedily(obs, mask).cpu()
        seconds.append(time.perf_counter() - tick)
    p50, p95 = 1e3 * np.quantile(seconds, [0.5, 0.95])
    return {"batch": LATENCY_BATCH, "p50": p50, "p95": p95}


def degenerate(frame):
    """What is wrong with a policy that has given up, in words, or None: it never buys, or (almost) always orders the same.

    frame: its ledger by symbol, with the column `free`: whether more than one order was allowed.
    """
    orders = frame.loc[frame["free"], "action"].value_counts(normalize=True)
    if not frame["turnover"].any():
        return "nothing was ever bought"
    if len(orders) and orders.iloc[0] > MONOTONY:
        return f"{ORDERS[orders.index[0]]} is {orders.iloc[0]:.1%} of all orders where there was a choice"
    return None


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
        checkpoint = torch.load(run_dir / "model.pt", weights_only=True)
        saved = checkpoint["args"]
        args = Args(**{**saved, "trading": TradingConfig(**saved["trading"]), "resume": args.resume})
    for flag in (
        "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every", "log_episodes",
        "layers", "width", "heads",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.width % args.heads:
        sys.exit(f"--width {args.width}: expected a multiple of --heads {args.heads}")
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
    if args.reward_scale is None and not is_market:
        sys.exit("--reward-scale None: expected a number with --env-id of Gymnasium")
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = max(1, args.total_timesteps // batch_size)
    if args.num_minibatches > batch_size:
        sys.exit(f"--num-minibatches {args.num_minibatches}: expected 1 to {batch_size}, the steps of a rollout")

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, env_options = None, None, {}
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
            traded = shard_of(panel.symbols, args.shard)
            data = TradingData(panel, args.trading, traded)
            # every split has a symbol to trade, or `runs` says so
            number = {name: len(np.unique(data.runs(split)[:, 0])) for name, split in splits.items()}
            if args.num_envs < number["train"]:
                raise ValueError(f"--num-envs {args.num_envs}: expected at least {number['train']}, one for each symbol")
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"shard   {args.shard}: {len(traded)} of the symbols are traded")
            print(f"costs   {data.costs.describe()}")
            env_options = dict(
                data=data, episode_length=args.episode_length, num_threads=args.num_threads,
                reward_weights={name: getattr(args, f"reward_{name}") for name in REWARDS},
            )  # fmt: skip
        train_envs = make_envs(args, splits, env_options)
        if not isinstance(train_envs.single_action_space, gym.spaces.Discrete):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected discrete actions")
        if args.log_dataset:  # refuse actions that no dataset can hold
            dataset.layout(f"--log-dataset {args.log_dataset}", 1, train_envs.single_action_space)
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(train_envs.single_action_space.n)
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    # A market's window is a sequence of bars; the observation of any other environment is taken for a single one.
    window, bars = (data.layout["window"], args.trading.window) if is_market else (slice(0, obs_size), 1)
    reward_scale = args.reward_scale
    if reward_scale is None:  # so that the critic has the same share of the gradient on every market
        rows = np.concatenate([np.arange(*bounds) for bounds in splits["train"].ranges])
        reward_scale = 1.0 / max(log_returns(panel)[rows][panel.present[rows]].std(), 1e-8)
    agent = Agent(obs_size, num_actions, window, bars, args.layers, args.width, args.heads).to(device)
    num_parameters = sum(p.numel() for p in agent.parameters())
    print(f"network {num_parameters} parameters, {bars} bars a window, on {device.type}")
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    # Storage on the host: the market kernels write observations and masks straight into it
    obs = torch.zeros((args.num_steps + 1, args.num_envs, obs_size))
    masks = torch.ones((args.num_steps + 1, args.num_envs, num_actions), dtype=torch.bool)
    rewards = torch.zeros((args.num_steps, args.num_envs))
    terminated, done = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(rewards, dtype=torch.bool)
    x = torch.zeros((args.num_steps + 1, args.num_envs, obs_size), device=device)  # normalised observations
    features = torch.zeros((args.num_steps + 1, args.num_envs, agent.actor[0].in_features), device=device)
    actions = torch.zeros((args.num_steps, args.num_envs), dtype=torch.int64, device=device)
    logprobs = torch.zeros((args.num_steps, args.num_envs), device=device)
    advantages = torch.zeros_like(logprobs)
    mb_x = torch.zeros((minibatch_size, obs_size), device=device)

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    episode_return, recent_returns = np.zeros(args.num_envs), []
    first_obs, infos = train_envs.reset(seed=args.seed)
    obs[0] = torch.as_tensor(first_obs.reshape(args.num_envs, -1))
    if "action_mask" in infos:
        masks[0] = torch.as_tensor(infos["action_mask"])
    if checkpoint:
        if not is_market:
            sys.exit(f"--resume {args.resume}: {args.env_id} cannot save its state; expected a run of {MARKET_ENV}")
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        train_envs.unwrapped.set_state({k: v.numpy() for k, v in checkpoint["envs"].items()})
        obs[0], masks[0] = checkpoint["obs"], checkpoint["mask"]
        episode_return, recent_returns = checkpoint["episode_return"].numpy(), checkpoint["recent_returns"]
        best_score, best_model = checkpoint["best_score"], checkpoint["best_model"]
        first_iteration, evals_since_best = checkpoint["iteration"] + 1, checkpoint["evals_since_best"]
        global_step, train_seconds = checkpoint["global_step"], checkpoint["train_seconds"]
        print(f"resume  {run_dir} after iteration {checkpoint['iteration']}")
    else:
        run_dir = ledger.new_run_dir(args.runs_dir, args.env_id, args.exp_name, args.seed)
    run = {
        "status": "running", "env_id": args.env_id, "args": dataclasses.asdict(args),
        **ledger.provenance(__file__, str(device)), "trials": 1, "parameters": num_parameters,
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

    def make_policy(free):
        """The policy for backtests; it appends to the list `free` which markets (n,) had more than one order to choose from."""

        def agent_policy(observation, mask, _):
            free.append(mask.sum(axis=1) > 1)
            with torch.no_grad():
                choice = agent.act_greedily(torch.as_tensor(observation).to(device), torch.as_tensor(mask).to(device))
            return choice.cpu().numpy()

        return agent_policy

    def backtest(split):
        """Ledger of every symbol, with a column `free`, and that of the book that gives all of them the same money."""
        free = []
        frame = trading_references.run(data, splits[split], make_policy(free), num_threads=args.num_threads)
        accounts = frame.groupby("market")["equity"]
        had = np.concatenate([had[:n] for had, n in zip(np.transpose(free), accounts.size())])
        frame["free"] = had & (accounts.shift(fill_value=1.0) > RUIN)  # a ruined account has nothing to choose from
        return frame, ledger.book(frame)

    def log_dataset(iteration):
        """Episodes of the policy as it explores now. Their random numbers are their own: training does not notice."""
        path = Path(args.log_dataset) / f"{args.exp_name}__{args.seed}__{global_step}" / "dataset.hdf5"
        if path.exists():
            return  # logged before the run was interrupted
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        noise = torch.Generator().manual_seed(seed)

        def act(observation, mask, *_):
            allowed = torch.as_tensor(np.ones((len(observation), num_actions), bool) if mask is None else mask)
            with torch.no_grad():
                log_probs = agent.log_probs(
                    agent.encode(agent.norm(torch.as_tensor(observation).to(device))), allowed.to(device)
                )
                action = torch.multinomial(log_probs.exp().cpu(), 1, generator=noise)
            return action.squeeze(1).numpy(), log_probs.cpu().gather(1, action).squeeze(1).numpy()

        weights = b"".join(value.cpu().numpy().tobytes() for value in agent.state_dict().values())
        behaviour = {"policy": args.exp_name, "step": global_step, "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
        task = {"env_id": args.env_id, "seed": args.seed}
        meta = provenance(task, None, None, run["git_commit"], args.gamma, [behaviour])
        episodes = make_envs(dataclasses.replace(args, num_envs=min(64, args.log_episodes)), splits, env_options)
        dataset_writer.log_episodes(path, episodes, act, args.log_episodes, meta, seed)

    log_after = {max(1, round(share * num_iterations)) for share in args.log_at} if args.log_dataset else set()
    started, failure = time.time(), None
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, mininterval=0.5)
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)

        # Rollout
        finals, finished_returns = [], []
        for step in range(args.num_steps):
            with torch.no_grad():
                x[step] = agent.norm(obs[step].to(device))
                features[step] = agent.encode(x[step])
                log_probs = agent.log_probs(features[step], masks[step].to(device))
                action = draw(log_probs.exp())
                logprobs[step] = log_probs.gather(1, action[:, None]).squeeze(1)
                actions[step] = action
            if is_market:
                _, reward, term, trunc, infos = train_envs.step(action.cpu().numpy(), out=obs[step + 1].numpy())
                masks[step + 1] = torch.from_numpy(infos["action_mask"])
            else:
                next_obs, reward, term, trunc, infos = train_envs.step(action.cpu().numpy())
                obs[step + 1] = torch.as_tensor(next_obs.reshape(args.num_envs, -1))
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
        global_step += batch_size
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages. A finished episode is followed by its own last observation, never by the first of the next one:
        # V(final_obs) is bootstrapped where the window was cut (truncation), not where the account was ruined.
        with torch.no_grad():
            x[-1] = agent.norm(obs[-1].to(device))
            features[-1] = agent.encode(x[-1])
            values = agent.value(features.flatten(0, 1)).view(args.num_steps + 1, args.num_envs)
            next_values = values[1:].clone()
            if finals:
                final_obs = torch.as_tensor(np.concatenate([f for _, _, f in finals]), dtype=torch.float32)
                at_step = torch.as_tensor(np.concatenate([np.full(len(i), s) for s, i, _ in finals]))
                at_env = torch.as_tensor(np.concatenate([i for _, i, _ in finals]))
                next_values[at_step, at_env] = agent.value(agent.encode(agent.norm(final_obs.to(device))))
            deltas = reward_scale * rewards.to(device) - values[:-1]
            deltas += args.gamma * next_values * ~terminated.to(device)
            carry = args.gamma * args.gae_lambda * ~done.to(device)
            running = torch.zeros(args.num_envs, device=device)
            for step in reversed(range(args.num_steps)):
                running = deltas[step] + carry[step] * running
                advantages[step] = running
            returns = advantages + values[:-1]

        # Update
        b_x, b_masks = x[:-1].flatten(0, 1), masks[:-1].flatten(0, 1).to(device)
        b_actions, b_logprobs = actions.flatten(), logprobs.flatten()
        b_advantages, b_returns, b_values = advantages.flatten(), returns.flatten(), values[:-1].flatten()
        statistics, updates = torch.zeros(5, device=device), 0
        stop_update = False
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_size).to(device)
            for start in range(0, minibatch_size * args.num_minibatches, minibatch_size):
                index = order[start : start + minibatch_size]
                torch.index_select(b_x, 0, index, out=mb_x)
                mb_features = agent.encode(mb_x)
                all_logprobs = agent.log_probs(mb_features, b_masks[index])
                new_logprob = all_logprobs.gather(1, b_actions[index][:, None]).squeeze(1)
                entropy = -(all_logprobs.exp() * all_logprobs).sum(1).mean()  # masked actions have probability 0
                logratio = new_logprob - b_logprobs[index]
                ratio = logratio.exp()

                mb_advantages = b_advantages[index]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped).mean()

                new_value, old_value, target = agent.value(mb_features), b_values[index], b_returns[index]
                v_loss = (new_value - target) ** 2
                if args.clip_vloss:
                    v_clipped = old_value + (new_value - old_value).clamp(-args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - target) ** 2)
                v_loss = 0.5 * v_loss.mean()

                loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
                optimizer.step()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()  # k3, http://joschu.net/blog/kl-approx.html
                    clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
                    statistics += torch.stack([pg_loss, v_loss, entropy, approx_kl, clip_fraction])
                    updates += 1
                if args.target_kl is not None and approx_kl.item() > args.target_kl:
                    stop_update = True
                    break
            if stop_update:
                break
        agent.norm.update(obs[:-1].flatten(0, 1).to(device))  # after the update: the first ratio is exactly 1
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
        losses = dict(zip(names, (statistics / updates).tolist()))
        train_seconds += time.perf_counter() - tick

        # Fail-safe: stop cleanly, and say where
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            failure = f"diverged in iteration {iteration} (step {global_step}): {', '.join(bad)} not finite"
            break

        # Logging
        sps = int(global_step / train_seconds)
        explained = 1 - (b_returns - b_values).var() / b_returns.var()
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", sps, global_step)
        writer.add_scalar("losses/explained_variance", explained.item(), global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(batch_size)

        # Validation: choose the model here, never on the test split
        if is_market and (iteration % args.eval_every == 0 or iteration == num_iterations):
            frame, book = backtest("val")
            score = float(ledger.growth(book).mean() * panel.bars_per_year)
            writer.add_scalar("eval/val_growth", score, global_step)
            writer.add_scalar("eval/alarm", float(degenerate(frame) is not None), global_step)
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
                "model": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "envs": {k: torch.as_tensor(v) for k, v in train_envs.unwrapped.get_state().items()} if is_market else None,
                "obs": obs[-1], "mask": masks[-1], "episode_return": torch.as_tensor(episode_return),
                "recent_returns": recent_returns, "best_score": best_score, "best_model": best_model,
                "evals_since_best": evals_since_best,
            })  # fmt: skip
        if stop_early:
            print(f"\nstopped early: no better validation score in {evals_since_best} backtests")
            break
        obs[0], masks[0] = obs[-1], masks[-1]
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
        frames, books = zip(*(backtest(split) for split in splits))
        frames, books = dict(zip(splits, frames)), dict(zip(splits, books))
        ledger.write_ledger(run_dir / "symbols.parquet", pd.concat(frames.values(), ignore_index=True))
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(books.values(), ignore_index=True))
        others = trading_references.references(data, splits["test"])
        compared = {"agent": books["test"], **{name: ledger.book(frame) for name, frame in others.items()}}
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(books[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        run["symbols"] = trades.by_symbol(frames["val"], panel.bars_per_year)
        run["alarm"] = degenerate(frames["val"])
        if "optimal band" in others:  # of every account by itself, which is what the band maximises
            growths = (ledger.growth(frame).mean() for frame in (frames["test"], others["optimal band"]))
            run["optimum_share"] = float(np.divide(*growths))
        print("\nvalidation split, by symbol, after costs")
        print(f"{'':22}{'Sharpe':>7}{'growth':>10}{'drawdown':>10}{'trades':>8}{'win rate':>10}{'profit factor':>15}")
        for name, s in run["symbols"].items():
            print(f"{name:22}{s['sharpe']:7.2f}{s['growth']:10.1%}{s['max_drawdown']:10.1%}{s['trades']:8}", end="")
            print(f"{s['win_rate']:10.1%}{s['profit_factor']:15.2f}")
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'drawdown':>10}{'turnover':>10}{'cost':>8}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:22}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['max_drawdown']:10.1%}", end="")
            print(f"{s['turnover']:9.0f}x{s['cost']:8.1%}")
        if "optimum_share" in run:
            print(f"share of the optimal band's growth: {run['optimum_share']:.3f}")
        if run["alarm"]:
            print(f"ALARM, validation split: {run['alarm']}")
    else:
        print(f"\nmean return of the last {len(recent_returns)} episodes: {latest}")
    run["latency_ms"] = latency(agent, obs_size, num_actions, device)
    print("{batch} decisions take {p50:.2f} ms (95% below {p95:.2f})".format(**run["latency_ms"]))
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
