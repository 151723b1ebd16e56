"""Masked discrete PPO (Schulman et al. 2017, arXiv:1707.06347) that learns which lookback a lead-lag strategy should use."""

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

import envs  # noqa: F401  (registers LeadLag-v0)
from envs import dataset, dataset_writer, ledger, references
from envs.device import unavailable
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
    """LeadLag-v0, or any Gymnasium id with vector observations and discrete actions, to check the algorithm itself"""
    market: str = "synthetic:leadlag"
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

    total_timesteps: int = 8_000_000
    """steps of all markets together"""
    num_envs: int = 1024
    """markets that run at once"""
    num_steps: int = 32
    """bars per market and rollout"""
    learning_rate: float = 2e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.5
    """discount factor; today's lookback moves little beyond tomorrow"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
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
    reward_scale: float = 100.0
    """factor on the rewards that the critic sees"""
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
    def __init__(self, obs_size, num_actions):
        super().__init__()
        self.norm = RunningNorm(obs_size)
        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )  # fmt: skip
        self.actor = nn.Sequential(
            layer_init(nn.Linear(obs_size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )  # fmt: skip

    def log_probs(self, x, mask):
        """(n, A) log-probabilities given normalised observations; masked actions have about -1e8."""
        return torch.where(mask, self.actor(x), -1e8).log_softmax(dim=1)

    def value(self, x):
        return self.critic(x).squeeze(1)

    def act_greedily(self, obs, mask):
        return torch.where(mask, self.actor(self.norm(obs)), -1e8).argmax(dim=1)


def draw(p):
    """(...,) actions drawn with probabilities p (..., A), which need not quite sum to 1; one without probability never is."""
    if p.device.type == "cpu":  # inverts the distribution
        cumulative = p.cumsum(dim=-1)
        drawn = torch.rand((*p.shape[:-1], 1), device=p.device) * cumulative[..., -1:]
        return (cumulative <= drawn).sum(dim=-1)
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)  # cumsum is not deterministic there


def pick(x, index):
    """(...,) entries of x (..., A) with the numbers index (...)."""
    if x.device.type == "cpu":
        return x.gather(-1, index[..., None]).squeeze(-1)
    chosen = torch.arange(x.shape[-1], device=x.device) == index[..., None]  # there the gradient of gather would sort
    return torch.where(chosen, x, 0.0).sum(dim=-1)


def make_envs(args, data, splits, iterations, device="cpu"):
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
        anneal_steps=int(args.anneal_fraction * steps), num_threads=args.num_threads, device=device,
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
        checkpoint = torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
        args = Args(**{**saved, "leadlag": LeadLagConfig(**saved["leadlag"]), "resume": args.resume})
    for flag in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every", "log_episodes"):
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if not args.log_at or not all(0.0 < share <= 1.0 for share in args.log_at):
        sys.exit(f"--log-at {args.log_at}: expected shares of the training, above 0 and at most 1")
    logged = sorted(Path(args.log_dataset).glob(f"{args.exp_name}__{args.seed}__*/dataset.hdf5")) if args.log_dataset else []
    if logged and not checkpoint:
        sys.exit(f"--log-dataset {args.log_dataset}: holds {logged[0].parent.name} already; expected none of this seed")
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
        sys.exit("--cudagraphs: expected markets on the GPU (LeadLag-v0 and --market-device auto or cuda)")
    shaped = args.curriculum is not None or any(getattr(args, f"reward_{name}") for name in SHAPING)
    if args.cudagraphs and shaped:
        sys.exit("--cudagraphs: expected no --curriculum and no --reward-...: what is recorded cannot change from step to step")
    if rank > 0:  # this process does all that the first one does, so that it decides alike, but keeps nothing of it
        scratch = tempfile.TemporaryDirectory()
        args.runs_dir, args.track, args.log_dataset = scratch.name, False, None
        sys.stdout = open(os.devnull, "w")

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
        train_envs = make_envs(dataclasses.replace(args, num_envs=num_envs), data, splits, num_iterations, market_device)
        if not isinstance(train_envs.single_action_space, gym.spaces.Discrete):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected discrete actions")
        if args.log_dataset:  # refuse actions that no dataset can hold
            dataset.layout(f"--log-dataset {args.log_dataset}", 1, train_envs.single_action_space)
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_actions = int(train_envs.single_action_space.n)
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    agent = Agent(obs_size, num_actions).to(device)
    on_cuda = device.type == "cuda"  # captured or not: a rate in memory is rounded to float32
    rate = torch.tensor(args.learning_rate, device=device) if on_cuda else args.learning_rate
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, fused=True, capturable=on_cuda)
    if world_size > 1:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, rank)).generate_state(1)[0]))  # now every process by itself

    # Storage where the markets are: their kernels write observations and masks straight into it
    place = device if on_gpu else "cpu"
    obs = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=place)
    masks = torch.ones((args.num_steps + 1, num_envs, num_actions), dtype=torch.bool, device=place)
    rewards = torch.zeros((args.num_steps, num_envs), device=place)
    terminated, done = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(rewards, dtype=torch.bool)
    x = torch.zeros((args.num_steps + 1, num_envs, obs_size), device=device)  # normalised observations
    actions = torch.zeros((args.num_steps, num_envs), dtype=torch.int64, device=device)
    logprobs, values = torch.zeros((args.num_steps, num_envs), device=device), torch.zeros(x.shape[:2], device=device)
    final_values = torch.zeros_like(logprobs)  # of the last observation of an episode that ended at this step
    advantages, returns = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    mb_x = torch.zeros((minibatch_size, obs_size), device=device)
    index = torch.zeros(minibatch_size, dtype=torch.int64, device=device)  # of the minibatch, in the rollout

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    episode_return, recent_returns = np.zeros(num_envs), []
    ended_return = torch.zeros_like(rewards, dtype=torch.float64)  # on a GPU: that of an episode at the step that it ended at
    if on_gpu:
        episode_return = torch.zeros(num_envs, device=device, dtype=torch.float64)
    first_obs, infos = train_envs.reset(seed=args.seed + rank * num_envs)
    obs[0] = torch.as_tensor(first_obs.reshape(num_envs, -1))
    if "action_mask" in infos:
        masks[0] = torch.as_tensor(infos["action_mask"])
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
        obs[0], masks[0] = own(checkpoint["obs"]), own(checkpoint["mask"])
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

    def agent_policy(observation, mask, _):
        with torch.no_grad():
            choice = agent.act_greedily(torch.as_tensor(observation).to(device), torch.as_tensor(mask).to(device))
        return choice.cpu().numpy()

    def backtest(split):
        return references.run(data, splits[split], agent_policy, actions=args.actions, max_jump=args.max_jump)

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
                log_probs = agent.log_probs(agent.norm(torch.as_tensor(observation).to(device)), allowed.to(device))
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

    # What is computed, as functions of tensors: --compile compiles each of them
    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def choose(observation, mask):
        """Normalised observations (n, D), actions (n,) drawn from the policy, and their log-probabilities."""
        with torch.no_grad(), autocast():
            normalised = agent.norm(observation)
            log_probs = agent.log_probs(normalised, mask)
            action = draw(log_probs.exp())
            return normalised, action, pick(log_probs, action)

    def value_of(normalised):
        with torch.no_grad(), autocast():
            return agent.value(normalised).float()

    def accumulate(values, final_values, rewards, terminated, done):
        """Advantages (T, n). A finished episode is followed by its own last observation, never by the first of the next one:
        V(final_obs) is bootstrapped where the window was cut (truncation), not where the account was ruined."""
        deltas = args.reward_scale * rewards - values[:-1]
        deltas += args.gamma * torch.where(done, final_values, values[1:]) * ~terminated
        carry = args.gamma * args.gae_lambda * ~done
        running, found = torch.zeros(num_envs, device=device), []
        for step in reversed(range(args.num_steps)):
            running = deltas[step] + carry[step] * running
            found.append(running)
        return torch.stack(found[::-1])

    def objective(x, mask, action, old_logprob, advantage, old_value, target):
        """The loss of a minibatch, its parts that are watched (5,), and ratio, entropy and new values."""
        with autocast():
            all_logprobs = agent.log_probs(x, mask)
            new_value = agent.value(x).float()
        new_logprob = pick(all_logprobs, action)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(1).mean()  # masked actions have probability 0
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
            x[step], actions[step], logprobs[step] = choose(obs[step], masks[step])
            _, reward, term, trunc, infos = train_envs.unwrapped.step(actions[step], out=obs[step + 1])
            masks[step + 1], rewards[step], terminated[step] = infos["action_mask"], reward, term
            torch.logical_or(term, trunc, out=done[step])
            final_values[step] = value_of(agent.norm(infos["final_obs"]))
            episode_return.add_(reward)
            ended_return[step] = episode_return
            episode_return.mul_(~done[step])

    def estimate_advantages():
        with torch.no_grad():
            x[-1] = agent.norm(obs[-1].to(device))
        values.copy_(value_of(x.flatten(0, 1)).view(values.shape))
        advantages.copy_(accumulate(values, final_values, rewards.to(device), terminated.to(device), done.to(device)))
        torch.add(advantages, values[:-1], out=returns)

    def update():
        """A step of the optimiser on the rows `index` of the rollout; what `objective` returns."""
        torch.index_select(x[:-1].flatten(0, 1), 0, index, out=mb_x)
        batch = (rows.flatten()[index] for rows in (actions, logprobs, advantages, values[:-1], returns))
        found = objective(mb_x, b_masks[index], *batch)
        optimizer.zero_grad()
        found[0].backward()
        if world_size > 1:
            gradients = [p.grad for p in agent.parameters()]
            together = average(torch.cat([g.flatten() for g in gradients]))
            for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients])):
                gradient.copy_(mean.view_as(gradient))
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
        optimizer.step()
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
        tick = time.perf_counter()
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
                x[step], action, logprobs[step] = choose(obs[step].to(device), masks[step].to(device))
                actions[step] = action
                if is_market:
                    _, reward, term, trunc, infos = train_envs.step(action.cpu().numpy(), out=obs[step + 1].numpy())
                    masks[step + 1] = torch.from_numpy(infos["action_mask"])
                else:
                    next_obs, reward, term, trunc, infos = train_envs.step(action.cpu().numpy())
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
                    final_values[at_step, at_env] = agent.value(agent.norm(final_obs.to(device))).float()
        global_step += steps
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages and update
        estimate_advantages()
        b_masks = masks[:-1].flatten(0, 1).to(device)
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
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(steps)

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
            envs_state = train_envs.unwrapped.get_state() if is_market else {}
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "iteration": num_iterations if stop_early else iteration,
                "global_step": global_step, "train_seconds": train_seconds, "processes": world_size,
                "model": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": gathered(torch.get_rng_state()),
                "cuda_rng": gathered(torch.cuda.get_rng_state()) if device.type == "cuda" else None,
                "envs": {k: gathered(torch.as_tensor(v)) for k, v in envs_state.items()} if is_market else None,
                "obs": gathered(obs[-1]), "mask": gathered(masks[-1]),
                "episode_return": gathered(torch.as_tensor(episode_return)),
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
        print(f"\nmean return of the last {len(recent_returns)} episodes: {latest}")
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
    if world_size > 1:
        dist.destroy_process_group()
