"""Recurrent masked PPO: an LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014) remembers what is no longer seen."""

import argparse
import dataclasses
import hashlib
import os
import sys
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
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs  # noqa: F401  (registers LeadLag-v0)
from envs import dataset, dataset_writer, ledger, references
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.synthetic import load_market
from envs.task import describe_task, provenance

MARKET_ENV = "LeadLag-v0"
SHAPING = ("strength", "stability", "extremity", "jump")  # rewards that fade, besides P&L net of cost


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
    """folder to log episodes of the training split to as offline data, a dataset for each entry of --log-at"""
    log_at: tuple[float, ...] = (1.0,)
    """shares of the training after which the policy of that moment is logged, as it explores; 1 also if --patience ends it"""
    log_episodes: int = 100
    """episodes of each dataset"""

    env_id: str = MARKET_ENV
    """LeadLag-v0, or any Gymnasium id with vector observations and discrete actions, to check the algorithm itself"""
    observed: tuple[int, ...] = ()
    """entries of a Gymnasium id's observation that the agent sees (all by default); 0 2 hides the velocities of CartPole-v1"""
    market: str = "synthetic:hidden"
    """sp500, a CSV or Parquet file, a folder of CSVs, or synthetic:<name>[:key=value...]; with the prefix shuffled:,
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
    episode_length: int = 256
    """bars in a training episode, which starts at a random bar"""
    max_jump: int = 0
    """most steps on the grid of lookbacks in one bar (0: no limit)"""
    curriculum: tuple[int, int] | None = None
    """shortest and longest lookback allowed at the start of training"""
    curriculum_fraction: float = 0.3
    """share of training over which those bounds widen to all lookbacks"""
    reward_strength: float = 0.0
    """reward for the mean absolute entry of the lead-lag matrix (shaping; P&L net of cost has weight 1)"""
    reward_stability: float = 0.0
    """reward for the similarity of the matrix to the one before"""
    reward_extremity: float = 0.0
    """reward for the spread between leaders' and followers' scores"""
    reward_jump: float = 0.0
    """penalty for moving the lookback, as a share of the grid"""
    anneal_fraction: float = 0.5
    """share of training over which those four fade to 0"""

    total_timesteps: int = 4_000_000
    """steps of all markets together"""
    memory: Literal["lstm", "gru", "none"] = "lstm"
    """what remembers; none: PPO without memory, to compare with"""
    hidden: int = 64
    """units of it"""
    num_envs: int = 256
    """markets that run at once"""
    num_steps: int = 128
    """bars per market and rollout; gradients reach back to its start, the memory itself to the start of the episode"""
    learning_rate: float = 2e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.5
    """discount factor; today's lookback moves little beyond tomorrow"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch, each of whole rollouts of some of the markets"""
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
    reward_scale: float = 100.0
    """factor on the rewards that the critic sees"""
    eval_every: int = 20
    """iterations between two backtests on the validation split"""
    eval_episodes: int = 100
    """with --env-id: episodes of the final evaluation"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for --env-id: rl-zoo's settings for CartPole without velocities but for 10 epochs in the place of 20, which end
# at a KL of 0.02 (without these limits one seed of three, or of five, ends below 400), and smaller rewards: with values of 50
# the critic would fill the gradient's norm.
CLASSIC_CONTROL = dict(
    total_timesteps=100_000, num_envs=8, num_steps=32, learning_rate=1e-3, gamma=0.98, gae_lambda=0.8,
    num_minibatches=1, update_epochs=10, target_kl=0.02, ent_coef=0.0, reward_scale=0.05, num_threads=1,
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


class Agent(nn.Module):
    """Actor and critic over the normalised observation and the memory's output; shapes are (..., D) throughout."""

    def __init__(self, obs_size, num_actions, memory, hidden):
        super().__init__()
        self.norm = RunningNorm(obs_size)
        self.hidden = hidden
        self.parts = {"lstm": 2, "gru": 1, "none": 0}[memory]  # of the state: an LSTM has a cell too
        self.memory = {"lstm": nn.LSTM, "gru": nn.GRU}[memory](obs_size, hidden) if self.parts else None
        for name, p in self.memory.named_parameters() if self.parts else ():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)
        size = obs_size + (hidden if self.parts else 0)
        self.critic = nn.Sequential(
            layer_init(nn.Linear(size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )  # fmt: skip
        self.actor = nn.Sequential(
            layer_init(nn.Linear(size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )  # fmt: skip

    def blank(self, n):
        """(parts, n, hidden): the state at the start of an episode."""
        return torch.zeros((self.parts, n, self.hidden), device=self.norm.mean.device)

    def remember(self, x, state):
        """Features (T, n, D + hidden) of normalised observations (T, n, D) in a row, and the state (parts, n, hidden) after."""
        if self.parts == 0:
            return x, state
        if self.parts == 2 and x.shape[0] == 1 and x.shape[1] <= 32:  # where the fused call takes longer to begin than to run
            h, c = torch.lstm_cell(x[0], (state[0], state[1]), *self.memory.all_weights[0])
            return torch.cat([x, h[None]], dim=2), torch.stack([h, c])
        out, after = self.memory(x, (state[:1], state[1:]) if self.parts == 2 else state)
        return torch.cat([x, out], dim=2), torch.cat(after) if self.parts == 2 else after

    def log_probs(self, features, mask):
        """(..., A) log-probabilities; masked actions have about -1e8."""
        return torch.where(mask, self.actor(features), -1e8).log_softmax(dim=-1)

    def value(self, features):
        return self.critic(features).squeeze(-1)

    def act_greedily(self, obs, mask, state):
        features, state = self.remember(self.norm(obs)[None], state)
        return torch.where(mask, self.actor(features[0]), -1e8).argmax(dim=1), state


def stretches(done):
    """Rows (first step, market, steps) of the unbroken parts of a rollout of which `done` (T, N) says where episodes ended.

    By market: a memory can run through each of them at once, from the rollout's first state or, after an end, from a blank one.
    """
    begins = torch.cat([torch.ones_like(done[:1]), done[:-1]]).T  # (N, T)
    market, first = begins.nonzero(as_tuple=True)
    last = torch.cat([done[:-1], torch.ones_like(done[:1])]).T.nonzero(as_tuple=True)[1]
    return torch.stack([first, market, last - first + 1], dim=1)


def replay(agent, b_x, state, parts, num_envs):
    """Features of the steps in `parts` (rows of `stretches`) by one call of the memory, and their indices in the batch.

    b_x: (T * N, D), step by step; state: (parts, N, hidden) before the first step. Shorter stretches are filled up at their
    end, which no earlier output sees.
    """
    first, market, steps = parts.T
    step = torch.arange(int(steps.max()), device=b_x.device)[:, None]
    inside = step < steps
    index = torch.where(inside, (first + step) * num_envs + market, market)
    features, _ = agent.remember(b_x[index], torch.where((first == 0)[:, None], state[:, market], 0.0))
    return features[inside], index[inside]


def draw(p):
    """(...,) actions drawn with probabilities p (..., A), which need not quite sum to 1; one without probability never is."""
    if p.device.type == "cpu":  # inverts the distribution
        cumulative = p.cumsum(dim=-1)
        drawn = torch.rand((*p.shape[:-1], 1), device=p.device) * cumulative[..., -1:]
        return (cumulative <= drawn).sum(dim=-1)
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)  # cumsum is not deterministic there


def make_envs(args, data, splits, iterations):
    """Training environments: markets, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if args.env_id != MARKET_ENV:
        return gym.make_vec(
            args.env_id, args.num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
    steps = iterations * args.num_steps
    weights = {name: getattr(args, f"reward_{name}") for name in SHAPING}
    return gym.make_vec(
        MARKET_ENV, args.num_envs, data=data, split=splits["train"], actions=args.actions, max_jump=args.max_jump,
        episode_length=args.episode_length, curriculum=args.curriculum,
        curriculum_steps=int(args.curriculum_fraction * steps), reward_weights=weights,
        anneal_steps=int(args.anneal_fraction * steps), num_threads=args.num_threads,
    )  # fmt: skip


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
        args = Args(**{**saved, "leadlag": LeadLagConfig(**saved["leadlag"]), "resume": args.resume})
    for flag in (
        "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every", "log_episodes",
        "eval_episodes", "hidden",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if not args.log_at or not all(0.0 < share <= 1.0 for share in args.log_at):
        sys.exit(f"--log-at {args.log_at}: expected shares of the training, above 0 and at most 1")
    logged = sorted(Path(args.log_dataset).glob(f"{args.exp_name}__{args.seed}__*/dataset.hdf5")) if args.log_dataset else []
    if logged and not checkpoint:
        sys.exit(f"--log-dataset {args.log_dataset}: holds {logged[0].parent.name} already; expected none of this seed")
    is_market = args.env_id == MARKET_ENV
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    batch_size = args.num_envs * args.num_steps
    minibatch_envs = args.num_envs // args.num_minibatches
    num_iterations = max(1, args.total_timesteps // batch_size)
    if args.num_minibatches > args.num_envs:
        sys.exit(f"--num-minibatches {args.num_minibatches}: expected 1 to {args.num_envs}, the markets (--num-envs)")
    if args.observed and is_market:
        sys.exit(f"--observed {' '.join(map(str, args.observed))}: expected only with --env-id of Gymnasium")

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits = None, None
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
            data = LeadLagData(panel, args.leadlag)
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
        train_envs = make_envs(args, data, splits, num_iterations)
        if not isinstance(train_envs.single_action_space, gym.spaces.Discrete):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected discrete actions")
        if args.log_dataset:  # refuse actions that no dataset can hold
            dataset.layout(f"--log-dataset {args.log_dataset}", 1, train_envs.single_action_space)
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(train_envs.single_action_space.n)
    full_size = int(np.prod(train_envs.single_observation_space.shape))
    if not all(0 <= entry < full_size for entry in args.observed):
        sys.exit(f"--observed {' '.join(map(str, args.observed))}: expected entries from 0 to {full_size - 1}")
    observed = list(args.observed) or slice(None)
    obs_size = len(args.observed) or full_size
    agent = Agent(obs_size, num_actions, args.memory, args.hidden).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    # Storage on the host: the market kernels write observations and masks straight into it
    obs = torch.zeros((args.num_steps + 1, args.num_envs, obs_size))
    masks = torch.ones((args.num_steps + 1, args.num_envs, num_actions), dtype=torch.bool)
    rewards = torch.zeros((args.num_steps, args.num_envs))
    terminated, done = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(rewards, dtype=torch.bool)
    x = torch.zeros((args.num_steps + 1, args.num_envs, obs_size), device=device)  # normalised observations
    actions = torch.zeros((args.num_steps, args.num_envs), dtype=torch.int64, device=device)
    logprobs = torch.zeros((args.num_steps, args.num_envs), device=device)
    advantages = torch.zeros_like(logprobs)
    features = torch.zeros((args.num_steps + 1, args.num_envs, agent.actor[0].in_features), device=device)
    state = agent.blank(args.num_envs)  # of the memory, before the next observation

    def see(observation):
        """(n, D) what the agent sees of n observations."""
        return np.asarray(observation, np.float32).reshape(len(observation), -1)[:, observed]

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    episode_return, recent_returns = np.zeros(args.num_envs), []
    first_obs, infos = train_envs.reset(seed=args.seed)
    obs[0] = torch.as_tensor(see(first_obs))
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
        obs[0], masks[0], state = checkpoint["obs"], checkpoint["mask"], checkpoint["state"].to(device)
        episode_return, recent_returns = checkpoint["episode_return"].numpy(), checkpoint["recent_returns"]
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

    def make_policy(split):
        """A blank memory for every range of the split, and the policy that fills it on the way from its start to its end."""
        now = agent.blank(len(splits[split].ranges))

        def agent_policy(observation, mask, _):
            nonlocal now
            with torch.no_grad():
                seen, allowed = torch.as_tensor(observation).to(device), torch.as_tensor(mask).to(device)
                choice, now = agent.act_greedily(seen, allowed, now)
            return choice.cpu().numpy()

        return agent_policy

    def backtest(split):
        return references.run(data, splits[split], make_policy(split), actions=args.actions, max_jump=args.max_jump)

    def log_dataset(iteration):
        """Episodes of the policy as it explores now. Their random numbers are their own: training does not notice."""
        path = Path(args.log_dataset) / f"{args.exp_name}__{args.seed}__{global_step}" / "dataset.hdf5"
        if path.exists():
            return  # logged before the run was interrupted
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        noise, now = torch.Generator().manual_seed(seed), agent.blank(min(64, args.log_episodes))

        def act(observation, mask, _, begun):
            nonlocal now
            allowed = torch.as_tensor(np.ones((len(observation), num_actions), bool) if mask is None else mask)
            with torch.no_grad():
                now[:, torch.as_tensor(begun)] = 0.0
                seen, now = agent.remember(agent.norm(torch.as_tensor(see(observation)).to(device))[None], now)
                log_probs = agent.log_probs(seen[0], allowed.to(device))
                action = torch.multinomial(log_probs.exp().cpu(), 1, generator=noise)
            return action.squeeze(1).numpy(), log_probs.cpu().gather(1, action).squeeze(1).numpy()

        task, costs, panel_sha256, timestamps = {"env_id": args.env_id, "seed": args.seed}, None, None, None
        if is_market:
            options = dict(actions=args.actions, max_jump=args.max_jump, episode_length=args.episode_length)
            task = describe_task(args.env_id, args, args.leadlag, **options)
            costs, panel_sha256, timestamps = dataclasses.asdict(data.costs), panel.sha256, panel.timestamps
        weights = b"".join(value.cpu().numpy().tobytes() for value in agent.state_dict().values())
        behaviour = {"policy": args.exp_name, "step": global_step, "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
        meta = provenance(task, panel_sha256, costs, run["git_commit"], args.gamma, [behaviour])
        plain = {f"reward_{name}": 0.0 for name in SHAPING} | {"curriculum": None, "num_envs": min(64, args.log_episodes)}
        plain = dataclasses.replace(args, **plain)
        episodes = make_envs(plain, data, splits, num_iterations)
        dataset_writer.log_episodes(path, episodes, act, args.log_episodes, meta, seed, timestamps)

    log_after = {max(1, round(share * num_iterations)) for share in args.log_at} if args.log_dataset else set()
    started, failure = time.time(), None
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, mininterval=0.5)
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)

        # Rollout
        finals, finished_returns = [], []
        first_state = state.clone()
        for step in range(args.num_steps):
            with torch.no_grad():
                x[step] = agent.norm(obs[step].to(device))
                features[step], state = agent.remember(x[step : step + 1], state)
                log_probs = agent.log_probs(features[step], masks[step].to(device))
                action = draw(log_probs.exp())
                logprobs[step] = log_probs.gather(1, action[:, None]).squeeze(1)
                actions[step] = action
            if is_market:
                _, reward, term, trunc, infos = train_envs.step(action.cpu().numpy(), out=obs[step + 1].numpy())
                masks[step + 1] = torch.from_numpy(infos["action_mask"])
            else:
                next_obs, reward, term, trunc, infos = train_envs.step(action.cpu().numpy())
                obs[step + 1] = torch.as_tensor(see(next_obs))
            rewards[step] = torch.as_tensor(reward)
            terminated[step] = torch.as_tensor(term)
            over = term | trunc
            done[step] = torch.as_tensor(over)
            episode_return += reward
            if over.any():
                ended = np.flatnonzero(over)
                finals.append((step, ended, see(np.stack(infos["final_obs"][ended])), state[:, ended]))
                state[:, ended] = 0.0  # the next episode begins with a blank memory
                finished_returns.extend(episode_return[ended].tolist())
                episode_return[ended] = 0.0
        global_step += batch_size
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages. A finished episode is followed by its own last observation, never by the first of the next one:
        # V(final_obs) is bootstrapped where the window was cut (truncation), not where the account was ruined.
        # The memory it is valued with is the one after the step before it.
        with torch.no_grad():
            x[-1] = agent.norm(obs[-1].to(device))
            features[-1], _ = agent.remember(x[-1:], state)
            values = agent.value(features)
            next_values = values[1:].clone()
            if finals:
                final_obs = torch.as_tensor(np.concatenate([f for _, _, f, _ in finals]))
                at_step = torch.as_tensor(np.concatenate([np.full(len(i), s) for s, i, _, _ in finals]))
                at_env = torch.as_tensor(np.concatenate([i for _, i, _, _ in finals]))
                before = torch.cat([memory for _, _, _, memory in finals], dim=1)
                last, _ = agent.remember(agent.norm(final_obs.to(device))[None], before)
                next_values[at_step, at_env] = agent.value(last[0])
            deltas = args.reward_scale * rewards.to(device) - values[:-1]
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
        parts = stretches(done.to(device))
        statistics, updates = torch.zeros(5, device=device), 0
        stop_update = False
        for _ in range(args.update_epochs):
            order = torch.randperm(args.num_envs).to(device)
            for start in range(0, minibatch_envs * args.num_minibatches, minibatch_envs):
                chosen = torch.isin(parts[:, 1], order[start : start + minibatch_envs])
                mb_features, index = replay(agent, b_x, first_state, parts[chosen], args.num_envs)
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
            score = float(ledger.growth(backtest("val")).mean() * panel.bars_per_year)
            writer.add_scalar("eval/val_growth", score, global_step)
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
                "obs": obs[-1], "mask": masks[-1], "state": state, "episode_return": torch.as_tensor(episode_return),
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
        frames = {split: backtest(split) for split in splits}
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        compared = {"agent": frames["test"], **references.references(data, splits, args.seed, num_threads=args.num_threads)}
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(frames[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        growths = {name: score["growth"] for name, score in scores.items()}
        run["capture"] = references.capture(growths["agent"], growths)
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'drawdown':>10}{'turnover':>10}{'cost':>8}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:22}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['max_drawdown']:10.1%}", end="")
            print(f"{s['turnover']:9.0f}x{s['cost']:8.1%}")
        if run["capture"] is not None:
            print(f"capture of the gap between the best fixed lookback and the regime oracle: {run['capture']:.2f}")
    else:
        print(f"\nmean return of the last {len(recent_returns)} episodes of training: {latest}")
        obs_now, _ = train_envs.reset(seed=args.seed + 10_000)  # episodes that training never saw, without exploration
        returns, episode_return[:], state, mask = [], 0.0, agent.blank(args.num_envs), torch.ones_like(masks[0])
        while len(returns) < args.eval_episodes:
            with torch.no_grad():
                action, state = agent.act_greedily(torch.as_tensor(see(obs_now)).to(device), mask.to(device), state)
            obs_now, reward, term, trunc, _ = train_envs.step(action.cpu().numpy())
            episode_return += reward
            returns.extend(episode_return[term | trunc].tolist())
            episode_return[term | trunc], state[:, torch.as_tensor(term | trunc)] = 0.0, 0.0
        run["eval_return"] = float(np.mean(returns))
        print(f"mean return of {len(returns)} episodes of its most likely actions: {run['eval_return']:.4g}")
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
