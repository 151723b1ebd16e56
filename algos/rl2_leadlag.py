"""RL^2 (Duan et al. 2016): PPO with an LSTM or GRU that remembers across the episodes of a task, and so adapts to it."""

import argparse
import dataclasses
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

import envs  # noqa: F401  (registers LeadLag-v0 and Bandits-v0)
from envs import ledger, references
from envs.adaptation import adaptation_report, print_adaptation, sharpe_by_regime
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.probe import linear_probe
from envs.synthetic import load_market
from envs.tasks import HELD_OUT, TASK_SETS, halves, slices

MARKET_ENV = "LeadLag-v0"
SPLITS = ("train", "val", "test")
STAGES = 4  # of the adaptation report: after 0 to 3 episodes


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
    """LeadLag-v0; Bandits-v0, the test task; or any Gymnasium id with vector observations and discrete actions, which is one
    task, unless its reset takes options={"tasks": integers}"""
    market: str = TASK_SETS["bull-bear"]
    """a set of tasks (bull-bear, mixed or planted-lag: envs/tasks.py), sp500, a CSV or Parquet file, a folder of CSVs, or
    synthetic:<name>[:key=value...]; with the prefix shuffled:, bootstrap:[key=value:...] or crossed:, one made of it from the
    seed (envs/resampled.py); each history of it is a task"""
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
    episodes: int = 4
    """episodes of a trial, all on one task: the memory is blank at its start, and lasts to its end"""
    episode_length: int = 64
    """bars in an episode, which starts at a random bar of the task; with --env-id, steps that the trial has for each episode"""
    max_jump: int = 0
    """most steps on the grid of lookbacks in one bar (0: no limit)"""
    task_bars: int = 0
    """bars of each task that the ranges of a split are cut into, for a market of one history (0: each range is a task)"""
    adapt_share: float = 0.5
    """share of each history, from its start, that backtests adapt on; the rest is what they score"""

    total_timesteps: int = 2_000_000
    """steps of all markets together"""
    memory: Literal["lstm", "gru"] = "gru"
    """what remembers"""
    hidden: int = 64
    """units of it"""
    num_envs: int = 256
    """trials that run at once"""
    learning_rate: float = 2e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.5
    """discount factor, across the episodes of a trial too"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch, each of whole trials"""
    update_epochs: int = 1
    """passes over each rollout"""
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
    """factor on the rewards that memory and critic see"""
    eval_every: int = 5
    """iterations between two backtests on the validation split (with --env-id: trials of validation tasks)"""
    eval_episodes: int = 10
    """episodes that score each stage of adaptation to a held-out task; all stages the same ones"""
    eval_tasks: int = 1000
    """with --env-id: validation tasks, and as many test tasks (markets: the histories of those splits)"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


# What changes for --env-id: trials of ten pulls of a bandit, as in Duan et al. (2016).
TEST_TASK = dict(
    total_timesteps=1_500_000, episodes=10, episode_length=1, num_envs=1000, gamma=0.99, gae_lambda=0.3, update_epochs=4,
    reward_scale=1.0, num_threads=1, eval_episodes=1,
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


def draw(p, generator=None):
    """(...,) actions drawn with probabilities p (..., A), which need not quite sum to 1; one without probability never is."""
    if p.device.type == "cpu":  # inverts the distribution
        cumulative = p.cumsum(dim=-1)
        drawn = torch.rand((*p.shape[:-1], 1), device=p.device, generator=generator) * cumulative[..., -1:]
        return (cumulative <= drawn).sum(dim=-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)  # cumsum is not deterministic there


class Agent(nn.Module):
    """Actor and critic over what is seen now and what is remembered of the trial; shapes are (..., D) throughout."""

    def __init__(self, obs_size, num_actions, memory, hidden):
        super().__init__()
        self.norm = RunningNorm(obs_size)
        self.hidden, self.num_actions = hidden, num_actions
        self.parts = {"lstm": 2, "gru": 1}[memory]  # of the state: an LSTM has a cell too
        seen = obs_size + num_actions + 2
        self.memory = {"lstm": nn.LSTM, "gru": nn.GRU}[memory](seen, hidden)
        for name, p in self.memory.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)
        size = seen + hidden
        self.critic = nn.Sequential(
            layer_init(nn.Linear(size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )  # fmt: skip
        self.actor = nn.Sequential(
            layer_init(nn.Linear(size, 64)), Tanh(), layer_init(nn.Linear(64, 64)), Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )  # fmt: skip

    def blank(self, n):
        """(parts, n, hidden): the state at the start of a trial."""
        return torch.zeros((self.parts, n, self.hidden), device=self.norm.mean.device)

    def experience(self, action, reward, over):
        """(n, A + 2) what the last step leaves to be seen at the next: the action one-hot, the scaled reward, and whether the
        episode ended with it; zeros at the start of a trial."""
        taken = nn.functional.one_hot(action, self.num_actions)
        return torch.cat([taken, reward[:, None], over[:, None]], dim=1)

    def see(self, obs, before):
        """(n, D) what enters the networks: the normalised observation, and the experience before it."""
        return torch.cat([self.norm(obs), before], dim=1)

    def remember(self, x, state):
        """Features (T, n, D + hidden) of inputs (T, n, D) in a row, and the state (parts, n, hidden) after."""
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

    def sample(self, log_probs, generator=None):
        """(n,) actions drawn from log-probabilities (n, A); a masked action never is."""
        return draw(log_probs.exp(), generator)


class Player:
    """An agent at play in n markets, without gradients: what it remembers, from step to step and from episode to episode.

    It begins with a blank memory. `state` and `before` are all of it.
    """

    def __init__(self, agent, n, reward_scale, seed):
        self.agent, self.reward_scale = agent, reward_scale
        self.state = agent.blank(n)
        self.before = torch.zeros((n, agent.num_actions + 2), device=self.state.device)
        self.noise = torch.Generator(self.state.device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, obs, mask, rows=None):
        """(n,) actions, as `ledger.backtest` calls for them."""
        device = self.state.device
        obs = torch.as_tensor(np.asarray(obs, np.float32), device=device).reshape(len(obs), -1)
        allowed = torch.ones((len(obs), self.agent.num_actions), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        features, self.state = self.agent.remember(self.agent.see(obs, self.before)[None], self.state)
        log_probs = self.agent.log_probs(features[0], allowed.to(device))
        self.action = self.agent.sample(log_probs, self.noise)
        return self.action.cpu().numpy()

    def after(self, reward, over):
        """To be called after each step with the rewards (n,) and whether each market's episode ended (n,)."""
        reward, over = (torch.as_tensor(np.asarray(array, np.float32), device=self.before.device) for array in (reward, over))
        self.before = self.agent.experience(self.action, self.reward_scale * reward, over)


def play(markets, player, obs, infos, steps):
    """Let the player go on from (obs, infos) of a reset or of a step: (obs, infos, rewards, terminated, over), the last three
    (steps, n)."""
    rewards, terminated, over = [], [], []
    for _ in range(steps):
        obs, reward, term, trunc, infos = markets.step(player(obs, infos.get("action_mask")))
        player.after(reward, term | trunc)
        rewards.append(reward), terminated.append(term), over.append(term | trunc)
    return obs, infos, np.stack(rewards), np.stack(terminated), np.stack(over)


def make_envs(args, data, split, num_envs):
    """Environments: markets on a split, or any Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if args.env_id != MARKET_ENV:
        if gym.spec(args.env_id).vector_entry_point is not None:  # those that know tasks, unlike CartPole-v1's
            own = gym.make_vec(args.env_id, num_envs, vectorization_mode="vector_entry_point")
            if own.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
                return own
        return gym.make_vec(
            args.env_id, num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
    return gym.make_vec(
        MARKET_ENV, num_envs, data=data, split=split, actions=args.actions, max_jump=args.max_jump,
        episode_length=args.episode_length, num_threads=args.num_threads,
    )  # fmt: skip


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
        "num_envs", "episodes", "episode_length", "num_minibatches", "update_epochs", "eval_every", "checkpoint_every",
        "eval_episodes", "eval_tasks", "hidden",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.task_bars < 0:
        sys.exit(f"--task-bars {args.task_bars}: expected at least 0")
    if not 0 < args.adapt_share < 1:
        sys.exit(f"--adapt-share {args.adapt_share}: expected a share above 0 and below 1")
    is_market = args.env_id == MARKET_ENV
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))
    num_steps = args.episodes * args.episode_length  # of a trial
    batch_size = args.num_envs * num_steps
    minibatch_envs = args.num_envs // args.num_minibatches
    num_iterations = max(1, args.total_timesteps // batch_size)
    if args.num_minibatches > args.num_envs:
        sys.exit(f"--num-minibatches {args.num_minibatches}: expected 1 to {args.num_envs}, the trials (--num-envs)")

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Market: panel, splits, tables; what is wrong with them is said in one line
    data, splits, adapting, scored = None, dict.fromkeys(SPLITS), {}, {}
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
            if args.task_bars:
                splits = {name: slices(panel, split, args.task_bars) for name, split in splits.items()}
            for name, split in splits.items():  # each task: what is adapted on, and, later, what is scored
                adapting[name], scored[name] = halves(split, args.adapt_share)
            print(f"market  {panel.name}: {panel.num_bars} bars x {panel.num_symbols} symbols, fill {data.fill}")
            print(f"costs   {data.costs.describe()}")
        train_envs = make_envs(args, data, splits["train"], args.num_envs)
        if not isinstance(train_envs.single_action_space, gym.spaces.Discrete):
            raise ValueError(f"--env-id {args.env_id}: has {train_envs.single_action_space}; expected discrete actions")
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    num_tasks = len(splits["train"].ranges) if is_market else HELD_OUT
    score_name = "growth" if is_market else "return"
    num_actions = int(train_envs.single_action_space.n)
    obs_size = int(np.prod(train_envs.single_observation_space.shape))
    agent = Agent(obs_size, num_actions, args.memory, args.hidden).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    # Storage on the host: the market kernels write observations and masks straight into it
    obs = torch.zeros((num_steps + 1, args.num_envs, obs_size))
    masks = torch.ones((num_steps + 1, args.num_envs, num_actions), dtype=torch.bool)
    rewards = torch.zeros((num_steps, args.num_envs))
    seen = obs_size + num_actions + 2
    x = torch.zeros((num_steps + 1, args.num_envs, seen), device=device)  # normalised observations, experience before them
    actions = torch.zeros((num_steps, args.num_envs), dtype=torch.int64, device=device)
    logprobs = torch.zeros((num_steps, args.num_envs), device=device)
    advantages = torch.zeros_like(logprobs)
    features = torch.zeros((num_steps + 1, args.num_envs, agent.actor[0].in_features), device=device)

    def flat(observation):
        """(n, D) float32."""
        return torch.as_tensor(np.asarray(observation, np.float32).reshape(len(observation), -1))

    # Start, or go on from the checkpoint
    global_step, first_iteration, train_seconds, evals_since_best = 0, 1, 0.0, 0
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    recent_returns = []
    if checkpoint:
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
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
        run |= {"panel": ledger.describe_panel(panel, splits), "market": data.describe() | {"adapt_share": args.adapt_share}}
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

    def adapted(split):
        """A player that has been through some episodes of what each range of the split has to adapt on."""
        tasks = np.arange(len(splits[split].ranges))
        player = Player(agent, len(tasks), args.reward_scale, args.seed)
        markets = make_envs(args, data, adapting[split], len(tasks))
        play(markets, player, *markets.reset(seed=args.seed, options={"tasks": tasks}), (STAGES - 1) * args.episode_length)
        return player

    def backtest(split):
        return references.run(data, scored[split], adapted(split), actions=args.actions, max_jump=args.max_jump)

    def held_out(split):
        """Tasks of the validation or the test split of a Gymnasium id."""
        return HELD_OUT + SPLITS.index(split) * args.eval_tasks + np.arange(args.eval_tasks)

    def trial_return(split):
        """Mean sum of the rewards of a trial, of tasks that training never saw."""
        trials = make_envs(args, None, None, args.eval_tasks)
        player = Player(agent, args.eval_tasks, args.reward_scale, args.seed)
        _, _, earned, _, _ = play(trials, player, *trials.reset(seed=args.seed, options={"tasks": held_out(split)}), num_steps)
        return float(earned.sum(axis=0).mean())

    def adaptation(split):
        """Of held-out tasks after 0, 1, 2, 3 episodes of memory: the mean return of an episode (tasks, STAGES), whether all
        were completed; memories (STAGES, n, H), the last experience included; and name -> (n,) what is true of their tasks."""
        tasks = np.arange(len(splits[split].ranges)) if is_market else held_out(split)
        n = len(tasks) * args.eval_episodes
        options, shape = {"tasks": np.repeat(tasks, args.eval_episodes)}, (len(tasks), args.eval_episodes)
        trials, episodes = make_envs(args, data, adapting.get(split), n), make_envs(args, data, scored.get(split), n)
        player = Player(agent, n, args.reward_scale, args.seed)
        now = trials.reset(seed=args.seed, options=options)
        truth = dict(now[1].get("parameters", {}))
        if is_market and "regime" in panel.hidden:
            kinds = [np.bincount(panel.hidden["regime"][start:stop]).argmax() for start, stop in splits[split].ranges]
            truth["regime"] = np.repeat(kinds, args.eval_episodes)
        returns, completed, memories = [], [], []
        for stage in range(STAGES):
            if stage:
                *now, _, _, _ = play(trials, player, *now, args.episode_length)
            memories.append(torch.cat([player.state.transpose(0, 1).flatten(1), player.before], dim=1).cpu().numpy())
            guest = Player(agent, n, args.reward_scale, args.seed)  # the same random numbers at every stage
            guest.state, guest.before = player.state, player.before.clone()
            guest.before[:, -1] = float(stage > 0)  # an episode ended before this one, unless the memory is blank
            first = episodes.reset(seed=args.seed + n, options=options)  # and the same windows
            _, _, earned, ruined, over = play(episodes, guest, *first, args.episode_length)
            begun = over.cumsum(axis=0) - over == 0  # steps of the first episode
            total = (earned * begun).sum(axis=0, dtype=np.float64)
            returns.append(total.reshape(shape).mean(axis=1))
            failed = (ruined & begun).any(axis=0) & is_market  # elsewhere an episode may well end so
            completed.append((np.isfinite(total) & ~failed).reshape(shape).all(axis=1))
        return np.stack(returns, axis=1), np.stack(completed, axis=1), np.stack(memories), truth

    started, failure = time.time(), None
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, mininterval=0.5)
    for iteration in range(first_iteration, num_iterations + 1):
        tick = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - (iteration - 1) / num_iterations)

        # Rollout: one trial of every market, on a task of its own, from a blank memory
        tasks = np.random.default_rng((args.seed, iteration)).integers(num_tasks, size=args.num_envs)
        seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0])  # market i takes seed + i
        first_obs, infos = train_envs.reset(seed=seed, options={"tasks": tasks})
        obs[0] = flat(first_obs)
        if "action_mask" in infos:
            masks[0] = torch.as_tensor(infos["action_mask"])
        state, before = agent.blank(args.num_envs), torch.zeros((args.num_envs, num_actions + 2), device=device)
        episode_return, finished_returns = np.zeros(args.num_envs), []
        for step in range(num_steps):
            with torch.no_grad():
                x[step] = agent.see(obs[step].to(device), before)
                features[step], state = agent.remember(x[step : step + 1], state)
                log_probs = agent.log_probs(features[step], masks[step].to(device))
                action = agent.sample(log_probs)
                logprobs[step] = log_probs.gather(1, action[:, None]).squeeze(1)
                actions[step] = action
            if is_market:
                _, reward, term, trunc, infos = train_envs.step(action.cpu().numpy(), out=obs[step + 1].numpy())
                masks[step + 1] = torch.from_numpy(infos["action_mask"])
            else:
                next_obs, reward, term, trunc, infos = train_envs.step(action.cpu().numpy())
                obs[step + 1] = flat(next_obs)
            rewards[step] = torch.as_tensor(reward)
            over = term | trunc
            before = agent.experience(action, args.reward_scale * rewards[step].to(device), torch.as_tensor(over).to(device))
            episode_return += reward
            if over.any():
                finished_returns.extend(episode_return[over].tolist())
                episode_return[over] = 0.0
        global_step += batch_size
        recent_returns = (recent_returns + finished_returns)[-100:]

        # Advantages, across the trial: the value of a step is what the rest of the trial earns, in later episodes too, which
        # begin with all that was learned in this one. The trial ends as its last episode does: V of that episode's own last
        # observation is bootstrapped where it was cut, not where it terminated.
        with torch.no_grad():
            following = obs[-1].clone()
            if over.any():
                following[torch.as_tensor(over)] = flat(np.stack(infos["final_obs"][over]))
            before[:, -1] = 0.0  # the episode goes on
            x[-1] = agent.see(following.to(device), before)
            features[-1], _ = agent.remember(x[-1:], state)
            values = agent.value(features)
            next_values = values[1:].clone()
            next_values[-1, torch.as_tensor(term).to(device)] = 0.0
            deltas = args.reward_scale * rewards.to(device) - values[:-1] + args.gamma * next_values
            running = torch.zeros(args.num_envs, device=device)
            for step in reversed(range(num_steps)):
                running = deltas[step] + args.gamma * args.gae_lambda * running
                advantages[step] = running
            returns = advantages + values[:-1]

        # Update
        b_masks = masks[:-1].to(device)
        statistics, updates = torch.zeros(5, device=device), 0
        stop_update = False
        for _ in range(args.update_epochs):
            order = torch.randperm(args.num_envs).to(device)
            for start in range(0, minibatch_envs * args.num_minibatches, minibatch_envs):
                index = order[start : start + minibatch_envs]
                mb_features, _ = agent.remember(x[:-1, index], agent.blank(len(index)))  # one call for whole trials
                all_logprobs = agent.log_probs(mb_features, b_masks[:, index])
                new_logprob = all_logprobs.gather(2, actions[:, index, None]).squeeze(2)
                entropy = -(all_logprobs.exp() * all_logprobs).sum(2).mean()  # masked actions have probability 0
                logratio = new_logprob - logprobs[:, index]
                ratio = logratio.exp()

                mb_advantages = advantages[:, index]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped).mean()

                new_value, old_value, target = agent.value(mb_features), values[:-1, index], returns[:, index]
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
        explained = 1 - (returns - values[:-1]).var() / returns.var()
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", sps, global_step)
        writer.add_scalar("losses/explained_variance", explained.item(), global_step)
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        if finished_returns:
            writer.add_scalar("charts/episodic_return", np.mean(finished_returns), global_step)
        by_episode = rewards.view(args.episodes, args.episode_length, args.num_envs).sum(1).mean(1).tolist()
        writer.add_scalar("charts/first_episode", by_episode[0], global_step)
        writer.add_scalar("charts/last_episode", by_episode[-1], global_step)
        latest = f"{np.mean(recent_returns):.4g}" if recent_returns else "-"
        progress.set_postfix_str(f"{sps} steps/s, return {latest}", refresh=False)
        progress.update(batch_size)

        # Validation: choose the model here, never on the test split
        if iteration % args.eval_every == 0 or iteration == num_iterations:
            growths = ledger.growth(backtest("val")) if is_market else None
            score = trial_return("val") if growths is None else float(growths.mean() * panel.bars_per_year)
            writer.add_scalar(f"eval/val_{score_name}", score, global_step)
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
                "recent_returns": recent_returns, "best_score": best_score, "best_model": best_model,
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
        "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None, f"val_{score_name}": best_score,
    }  # fmt: skip
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    agent.load_state_dict(best_model)
    by_stage, completed, memories, truth = adaptation("test")
    run["adaptation"] = adaptation_report(by_stage, by_stage[:, 0], completed, args.seed)  # unadapted: the memory is blank
    _, _, others, other_truth = adaptation("val")
    run["probe"] = {
        name: [linear_probe(others[stage], other_truth[name], memories[stage], truth[name]) for stage in range(STAGES)]
        for name in truth
    }
    if is_market:
        frames = {split: backtest(split) for split in splits}
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        compared_on = {"train": splits["train"], "test": scored["test"]}
        compared = {
            "agent": frames["test"],
            **references.references(data, compared_on, args.seed, num_threads=args.num_threads),
        }
        scores = {name: ledger.summarise(frame, panel.bars_per_year) for name, frame in compared.items()}
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(frames[split], panel.bars_per_year, resamples=0)} for split in ("train", "val")
        }
        growths = {name: score["growth"] for name, score in scores.items()}
        run["capture"] = references.capture(growths["agent"], growths)
        run["adaptation"]["sharpe_by_regime"] = sharpe_by_regime(frames["test"], panel, scored["test"].ranges)
        print(f"\ntest split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']})")
        print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'drawdown':>10}{'turnover':>10}{'cost':>8}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:22}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['max_drawdown']:10.1%}", end="")
            print(f"{s['turnover']:9.0f}x{s['cost']:8.1%}")
        if run["capture"] is not None:
            print(f"capture of the gap between the best fixed lookback and the regime oracle: {run['capture']:.2f}")
    else:
        run["eval_return"] = trial_return("test")
        print(f"\nmean return of {args.eval_tasks} trials of {args.episodes} episodes, on test tasks: {run['eval_return']:.4g}")
    print_adaptation(run["adaptation"])
    if run["probe"]:
        print(f"\nread off the memory by a linear map ({', '.join(run['probe'])})")
        for stage in range(STAGES):
            print(f"after {stage}{'':18}" + "".join(f"{scores[stage]:7.2f}" for scores in run["probe"].values()))
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
