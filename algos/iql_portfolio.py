"""Implicit Q-learning (Kostrikov, Nair & Levine 2022, arXiv:2110.06169): a policy from logged data, then perhaps online."""

import copy
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from itertools import chain, islice
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
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import ledger
from envs.costs import EQUITY
from envs.dataset import TRANSITION, Dataset
from envs.task import MARKETS, Task

LOGGED = ("actor_loss", "value_loss", "critic_loss", "q", "value", "capped")  # of every gradient step


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the run; the script's by default"""
    seed: int = 1
    """seed of the networks, the batches and the episodes that are held out; the market is that of the data"""
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
    checkpoint_every: int = 5_000
    """gradient steps between two checkpoints (model.pt)"""

    dataset: str = "data/dataset.hdf5"
    """HDF5 file with D4RL's keys (envs/dataset.py); benchmark/collect.py makes one. Its dataset_meta.json names the market"""
    env_id: str | None = None
    """Gymnasium id to evaluate on, where the data name none"""
    validation_fraction: float = 0.1
    """share of the episodes that is held out"""
    memory_mb: float = 2048.0
    """MiB for transitions; larger data are streamed from disk, in shuffled blocks"""
    eval_episodes: int = 100
    """on Gymnasium ids: episodes of an evaluation"""

    gradient_steps: int = 8_000
    """batches to learn from"""
    batch_size: int = 512
    """transitions in a batch"""
    learning_rate: float | None = None
    """learning rate of Adam (1e-3 by default, 3e-4 with discrete actions, which are overfitted sooner); the actor's falls to 0
    along a cosine, unless --finetune-steps follow"""
    gamma: float | None = None
    """discount factor (the data's by default, else 0.99)"""
    hidden: int = 64
    """units in each of two hidden layers"""
    reward_scale: float | None = None
    """factor on rewards (one over their standard deviation by default); with --no-norm-adv the same as --beta to the actor"""
    expectile: float = 0.7
    """of the target critics over the data's actions that the value is; 0.5: their mean, 1: their maximum"""
    beta: float = 2.0
    """the actor imitates each action in proportion to exp(beta * advantage), at most 100"""
    norm_adv: bool = True
    """advantages in units of their mean size, much as in MARWIL (Wang et al. 2018); else of the scaled rewards"""
    tau: float = 0.005
    """share of the critics that moves into the target critics at each step"""
    actor_tau: float = 0.002
    """share of the actor that moves into its average at each step; the average is what acts"""
    max_grad_norm: float = 10.0
    """largest norm of the gradient"""
    eval_every: int = 1_000
    """gradient steps between two validations"""
    patience: int = 0
    """stop after so many of them without a better score (0: never), when fine-tuning only there; the best model is kept"""

    finetune_steps: int = 0
    """steps of all markets together to go on with online, on training episodes, after the offline phase"""
    finetune_envs: int = 64
    """markets that run at once then"""
    finetune_updates: int = 4
    """gradient steps for each step of these markets; half of each batch is offline data"""
    explore_drawdown: float = 0.2
    """exploration shrinks in proportion to the account's drawdown, and ends at this one"""


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

    def forward(self, x):
        x = x.expand(len(self.biases[0]), *x.shape)
        first, second, last = zip(self.weights, self.biases)
        for weight, bias in (first, second):
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(last[1], x, last[0])


class Agent(nn.Module):
    """Actor, twin critics and value over standardised observations; continuous actions are scaled to [-1, 1]."""

    def __init__(self, obs_size, num_actions, discrete, hidden):
        super().__init__()
        self.discrete = discrete
        self.register_buffer("obs_mean", torch.zeros(obs_size))
        self.register_buffer("obs_scale", torch.ones(obs_size))
        self.register_buffer("low", torch.full((num_actions,), -1.0))  # range of the actions that the actor can take
        self.register_buffer("high", torch.full((num_actions,), 1.0))
        self.actor = MLP(obs_size, hidden, num_actions, std=0.01)
        self.steady = copy.deepcopy(self.actor).requires_grad_(False)  # moving average of the actor: it is what acts
        self.log_std = nn.Parameter(torch.zeros(num_actions))
        self.critic = MLP(obs_size if discrete else obs_size + num_actions, hidden, num_actions if discrete else 1, copies=2)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = MLP(obs_size, hidden, 1)
        self.register_buffer("size", torch.tensor(1.0))  # moving average of |advantage|
        self.register_buffer("updates", torch.tensor(0))

    def norm(self, obs):
        return ((obs - self.obs_mean) * self.obs_scale).clamp_(-10.0, 10.0)

    def scale(self, action):
        """Continuous actions of the data in units of the range; those outside count as its ends."""
        return ((2.0 * action - self.high - self.low) / (self.high - self.low)).clamp_(-1.0, 1.0)

    def unscale(self, action):
        return 0.5 * (self.high + self.low + action * (self.high - self.low))

    def q(self, critic, x, action):
        """(2, n) values of actions given normalised observations."""
        if self.discrete:
            return critic(x).gather(2, action.expand(2, -1)[..., None]).squeeze(2)
        return critic(torch.cat([x, action], dim=1)).squeeze(2)

    def policy(self, x, mask, actor=None):
        """(n, A): log-probabilities, masked actions about -1e8; or the means of continuous actions."""
        out = (actor or self.actor)(x).squeeze(0)
        if self.discrete:
            return (out if mask is None else torch.where(mask, out, -1e8)).log_softmax(dim=1)
        return out.tanh()

    def log_prob(self, x, mask, action):
        """(n,) log-probabilities of actions; the standard deviation does not depend on the state."""
        out = self.policy(x, mask)
        if self.discrete:
            return out.gather(1, action[:, None]).squeeze(1)
        log_std = self.log_std.clamp(-5.0, 2.0)
        return -(0.5 * ((action - out) * (-log_std).exp()).square() + log_std + 0.5 * np.log(2 * np.pi)).sum(1)

    @torch.no_grad()
    def act(self, obs, mask, explore=None):
        """Actions for the market: the most likely ones, or, with explore (n,) in 0..1, noisy in that proportion."""
        out = self.policy(self.norm(obs), mask, self.steady)
        if self.discrete:
            best = out.argmax(dim=1)
            if explore is None:
                return best
            drawn = torch.multinomial(out.exp().cpu(), 1).squeeze(1).to(obs.device)
            return torch.where(torch.rand(len(obs), device=obs.device) < explore, drawn, best)
        if explore is not None:
            out = out + explore[:, None] * self.log_std.clamp(-5.0, 2.0).exp() * torch.randn_like(out)
        return self.unscale(out.clamp(-1.0, 1.0))


def make_envs(env_id, task, num_envs, num_threads):
    """Training episodes of the market, or of a Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if task:
        return task.make(num_envs, "train", num_threads=num_threads)
    return gym.make_vec(env_id, num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})


def to_tensors(batch, agent, device):
    """Normalised observations, actions, rewards, next observations, terminals, and masks or None, of a batch of the data."""
    obs, actions, rewards, next_obs, terminals, *masks = (torch.as_tensor(batch[key]).to(device) for key in batch)
    actions = actions if agent.discrete else agent.scale(actions)
    return agent.norm(obs), actions, rewards, agent.norm(next_obs), terminals, *(masks or (None, None))


def moments(data, episodes, key):
    """Mean and standard deviation of one of the data's columns over some episodes, and its largest size, block by block."""
    count, total, squares, largest = 0, 0.0, 0.0, 0.0
    for block in data.blocks(episodes, (key,)):
        x = block[key].astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(axis=0), squares + (x**2).sum(axis=0)
        largest = np.maximum(largest, np.abs(x).max(axis=0))
    return total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0)), largest


def save_checkpoint(path, content):
    """Written beside and moved into place: a kill at any moment leaves the previous checkpoint or this one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    args = tyro.cli(Args)
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "model.pt").is_file():
            sys.exit(f"--resume {args.resume}: no model.pt there; expected a run directory with a checkpoint")
        checkpoint = torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)
        args = Args(**{**checkpoint["args"], "resume": args.resume})
    for flag in (
        "gradient_steps", "batch_size", "eval_every", "checkpoint_every", "eval_episodes",
        "finetune_envs", "finetune_updates", "hidden",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    for flag in ("beta", "learning_rate", "patience", "finetune_steps"):
        if (getattr(args, flag) or 0) < 0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 0 or more")
    if not 0.0 < args.expectile < 1.0:
        sys.exit(f"--expectile {args.expectile}: expected above 0 and below 1")
    if args.gamma is not None and not 0.0 <= args.gamma <= 1.0:
        sys.exit(f"--gamma {args.gamma}: expected 0 to 1")
    if args.reward_scale is not None and args.reward_scale <= 0.0:
        sys.exit(f"--reward-scale {args.reward_scale}: expected above 0")
    for flag in ("tau", "actor_tau"):
        if not 0.0 < getattr(args, flag) <= 1.0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected above 0 and at most 1")
    for flag in ("explore_drawdown", "max_grad_norm"):
        if getattr(args, flag) <= 0.0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected above 0")
    args.num_threads = args.num_threads or len(os.sched_getaffinity(0))

    # Seed, threads, device
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    numba.get_num_threads()  # starts Numba's, which changes the number of torch's: so before the next line
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Data, and the market that they come from; what is wrong with them is said in one line
    try:
        data = Dataset(args.dataset, gym.make(args.env_id).action_space if args.env_id else None)
        task = Task.of(data)
        env_id = task.env_id if task else args.env_id
        if task and args.env_id not in (None, env_id):
            raise ValueError(f"--env-id {args.env_id}: the data are of {env_id}; expected no --env-id")
        if env_id is None and data.meta.get("env_id") in gym.registry.keys() - MARKETS.keys():
            env_id = data.meta["env_id"]
        train, held_out = data.split_episodes(args.validation_fraction, args.seed)
        discrete = isinstance(data.action_space, gym.spaces.Discrete)
        masks = ("infos/action_mask", "infos/next_action_mask")
        keys = TRANSITION + (masks if discrete and set(masks) <= set(data.keys) else ())
        batches = data.batches(train, args.batch_size, args.seed, args.memory_mb, keys)
        validation = next(data.batches(held_out, 8192, args.seed, args.memory_mb, keys))
        obs_size = data.keys["observations"][1][0]
        if args.finetune_steps and not env_id:
            raise ValueError(f"--finetune-steps {args.finetune_steps}: the data name no market; expected --env-id")
        train_envs = make_envs(env_id, task, args.finetune_envs, args.num_threads) if env_id else None
        if train_envs and (train_envs.single_action_space, *train_envs.single_observation_space.shape) != (
            data.action_space,
            obs_size,
        ):
            found = f"{data.action_space} and observations ({obs_size},)"
            raise ValueError(f"{args.dataset}: actions of {found}: expected those of {env_id}")
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    args.learning_rate = args.learning_rate if args.learning_rate is not None else (3e-4 if discrete else 1e-3)
    gamma = args.gamma if args.gamma is not None else data.meta.get("gamma", 0.99)
    reward_mean, reward_std, reward_max = moments(data, train, "rewards")
    data_scale = data.meta.get("reward_scale") or 1.0  # of the data's rewards, against the market's own
    spread = float(reward_std) if reward_std > 1e-6 * reward_max else float(reward_max) or 1.0
    reward_scale = 1.0 / spread if args.reward_scale is None else args.reward_scale
    horizon = 1.0 / (1.0 - gamma) if gamma < 1.0 else float(np.diff(data.starts).max())  # bars that a value sums over
    num_actions = int(data.action_space.n) if discrete else data.action_space.shape[0]
    agent = Agent(obs_size, num_actions, discrete, args.hidden).to(device)
    agent.obs_mean.copy_(torch.tensor(data.meta["observation_mean"]))
    std = torch.tensor(data.meta["observation_std"])
    agent.obs_scale.copy_(torch.where(std > 1e-6, 1.0 / std, 0.0))  # what never varied has taught nothing
    if not discrete:  # a market's space is far wider than what anybody orders
        mean, std, _ = moments(data, train, "actions")
        reach = np.maximum(5.0 * std, 1e-3 * (1.0 + np.abs(mean)))
        low, high = np.maximum(data.action_space.low, mean - reach), np.minimum(data.action_space.high, mean + reach)
        agent.low.copy_(torch.as_tensor(np.where(low < high, low, mean - reach)))  # a space may be a point
        agent.high.copy_(torch.as_tensor(np.where(low < high, high, mean + reach)))
    actor_parameters = [*agent.actor.parameters(), agent.log_std]
    critic_parameters = [*agent.critic.parameters(), *agent.value.parameters()]
    optimizer = torch.optim.Adam(
        [{"params": actor_parameters}, {"params": critic_parameters}], lr=args.learning_rate, fused=True
    )
    for note in data.meta.get("inferred", ()):
        print(f"assumed {note}")
    print(f"data    {args.dataset}: {data.meta['steps']} steps, {len(train)} episodes to train, {len(held_out)} held out")
    print(f"task    {env_id or 'not named: no evaluation'}, gamma {gamma:g}, rewards x {reward_scale:.4g}")

    def update(batch):
        """One step of Adam on all networks, each with the others as they were before it; returns what is logged."""
        x, action, reward, next_x, terminal, mask, _ = batch
        with torch.no_grad():
            q_data = agent.q(agent.target, x, action).amin(dim=0)
        value, next_value = agent.value(torch.cat([x, next_x])).flatten().chunk(2)
        advantage = q_data - value
        v_loss = ((args.expectile - (advantage < 0).float()).abs() * advantage.square()).mean()
        exponent = args.beta * advantage.detach()
        if args.norm_adv:
            agent.size.lerp_(advantage.detach().abs().mean(), 0.01)
            exponent = exponent / agent.size
        weight = exponent.clamp(max=np.log(100.0)).exp()
        actor_loss = -(weight * agent.log_prob(x, mask, action)).mean()
        target = reward_scale * reward + gamma * (1.0 - terminal) * next_value.detach()
        q_loss = (agent.q(agent.critic, x, action) - target).square().mean()
        optimizer.zero_grad()
        (actor_loss + v_loss + q_loss).backward()
        nn.utils.clip_grad_norm_(actor_parameters, args.max_grad_norm, foreach=True)
        nn.utils.clip_grad_norm_(critic_parameters, args.max_grad_norm, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
            agent.updates += 1
            rate = max(args.actor_tau, 1.0 / (1.0 + agent.updates.item()))  # at first a plain mean
            torch._foreach_lerp_(list(agent.steady.parameters()), list(agent.actor.parameters()), rate)
            capped = (exponent >= np.log(100.0)).float().mean()
            return torch.stack([actor_loss, v_loss, q_loss, q_data.mean(), value.mean(), capped])

    @torch.no_grad()
    def evaluate(batch):
        """On held-out transitions: the actor's loss and likelihood of the data, the share of its actions that are the data's
        (within a twentieth of the range), the critics' error, and the size of their values of the actor's actions."""
        x, action, reward, next_x, terminal, mask, _ = batch
        out = agent.policy(x, mask, agent.steady)
        best = out.argmax(dim=1) if discrete else out
        close = best == action if discrete else (best - action).abs() <= 0.1
        value, next_value = agent.value(torch.cat([x, next_x])).flatten().chunk(2)
        advantage = agent.q(agent.target, x, action).amin(dim=0) - value
        nll = -agent.log_prob(x, mask, action)
        target = reward_scale * reward + gamma * (1.0 - terminal) * next_value
        exponent = args.beta * advantage / (agent.size if args.norm_adv else 1.0)
        loss = exponent.clamp(max=np.log(100.0)).exp() * nll
        td_error = agent.q(agent.critic, x, action) - target
        found = {"loss": loss, "nll": nll, "agreement": close.float(), "td_error": td_error.square()}
        found["q"] = agent.q(agent.critic, x, best).abs()
        return {name: float(tensor.mean()) for name, tensor in found.items()}

    # Start, or go on from the checkpoint
    held = to_tensors(validation, agent, device)
    total_steps = args.gradient_steps + args.finetune_updates * -(-args.finetune_steps // args.finetune_envs)
    first_step, train_seconds, evals_since_best, best_step, switch_score = 1, 0.0, 0, 0, None
    logs, logged, held_loss = torch.zeros(len(LOGGED), device=device), 0, {}
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    buffer, filled, recent_returns = None, 0, []
    episode_return, equity, peak = np.zeros(args.finetune_envs), np.ones(args.finetune_envs), np.ones(args.finetune_envs)
    if args.finetune_steps:
        obs_now, infos = train_envs.reset(seed=args.seed)
        capacity = args.finetune_envs * -(-args.finetune_steps // args.finetune_envs)
        buffer = {key: torch.zeros((capacity, *value.shape[1:]), dtype=torch.as_tensor(value).dtype) for key, value in
                  validation.items()}  # fmt: skip
        mask_now = infos.get("action_mask")
        needed = sum(value.numel() * value.element_size() for value in buffer.values()) / 2**20
        if needed > args.memory_mb:
            sys.exit(
                f"--finetune-steps {args.finetune_steps}: needs {needed:.0f} MiB, more than --memory-mb {args.memory_mb:g}"
            )
    if checkpoint:
        if args.finetune_steps and not task:
            sys.exit(f"--resume {args.resume}: {env_id} cannot save its state; expected a run that is not fine-tuned there")
        if checkpoint["sha256"] != data.meta["sha256"]:
            sys.exit(f"--resume {args.resume}: {args.dataset} has changed; expected sha256 {checkpoint['sha256']}")
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        best_score, best_model, best_step = checkpoint["best_score"], checkpoint["best_model"], checkpoint["best_step"]
        first_step, evals_since_best = checkpoint["step"] + 1, checkpoint["evals_since_best"]
        train_seconds, switch_score = checkpoint["train_seconds"], checkpoint["switch_score"]
        logs, logged, held_loss = checkpoint["logs"].to(device), checkpoint["logged"], checkpoint["held_loss"]
        if checkpoint["online"]:
            saved = checkpoint["online"]
            reward_max = saved["reward_max"]
            train_envs.set_state({k: v.numpy() for k, v in saved["envs"].items()})
            for key, value in saved["buffer"].items():
                buffer[key][: len(value)] = value
            filled, obs_now, recent_returns = len(saved["buffer"]["rewards"]), saved["obs"].numpy(), saved["recent_returns"]
            mask_now = None if saved["mask"] is None else saved["mask"].numpy()
            episode_return, equity, peak = saved["accounts"].numpy()
        print(f"resume  {run_dir} after step {checkpoint['step']}")
    else:
        run_dir = ledger.new_run_dir(args.runs_dir, env_id or "offline", args.exp_name, args.seed)
    batches = islice(batches, first_step - 1, None)  # the batches are those of a run that was never interrupted
    if first_step <= total_steps:
        batches = chain([next(batches)], batches)  # the data are read before the clock starts
    run = {
        "status": "running", "env_id": env_id, "args": dataclasses.asdict(args), **ledger.provenance(__file__, str(device)),
        "trials": 1, "risk_aversion": task.risk_aversion if task else None,
        "offline": {
            "dataset": args.dataset, "sha256": data.meta["sha256"], "steps": data.meta["steps"],
            "episodes": data.meta["episodes"], "behaviours": data.meta.get("behaviours"), "inferred": data.meta.get("inferred"),
            "train_episodes": len(train), "gradient_steps": args.gradient_steps,
            "mean_reward": float(reward_mean) / data_scale * (task.panel.bars_per_year if task else 1.0),
        },
    }  # fmt: skip
    if task:
        run |= task.describe()
    ledger.write_json(run_dir / "run.json", run)
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, config=dataclasses.asdict(args), name=run_dir.name,
            sync_tensorboard=True, save_code=True,
        )  # fmt: skip
    writer = SummaryWriter(run_dir, purge_step=first_step if checkpoint else None)
    rows = "\n".join(f"|{key}|{value}|" for key, value in dataclasses.asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")

    def agent_policy(observation, mask, *_):
        mask = None if mask is None else torch.as_tensor(mask).to(device)
        return agent.act(torch.as_tensor(observation).to(device), mask).cpu().numpy()

    def largest_value():
        """Twice what the rewards seen so far can sum to, discounted, and some room for networks just made."""
        return 2.0 * float(reward_max) * reward_scale * horizon + 10.0

    def play(episodes):
        """Returns of new episodes of a Gymnasium task without exploration."""
        games = make_envs(env_id, task, min(16, episodes), args.num_threads)
        obs, infos = games.reset(seed=args.seed + 10_000)
        so_far, returns, wanted = np.zeros(games.num_envs), [[] for _ in range(games.num_envs)], -(-episodes // games.num_envs)
        while min(map(len, returns)) < wanted:  # equally many of each game: the first to end are not like the rest
            action = agent_policy(np.asarray(obs, np.float32), infos.get("action_mask"))
            obs, reward, term, trunc, infos = games.step(action)
            so_far += reward
            for game in np.flatnonzero(term | trunc):
                returns[game].append(so_far[game])
                so_far[game] = 0.0
        return float(np.mean([part[:wanted] for part in returns]))

    started, failure = time.time(), None
    step = first_step - 1
    progress = tqdm(total=total_steps, initial=first_step - 1, unit="step", mininterval=0.5)
    for step in range(first_step, total_steps + 1):
        tick = time.perf_counter()
        batch = next(batches)
        online = step > args.gradient_steps

        # Online: a step of the markets now and then, with noise that an account in drawdown can less afford
        if online and (step - args.gradient_steps - 1) % args.finetune_updates == 0:
            calm = 1.0 - (1.0 - equity / peak) / args.explore_drawdown
            explore = torch.as_tensor(calm.clip(0.0, 1.0), dtype=torch.float32, device=device)
            obs_in = torch.as_tensor(np.asarray(obs_now, np.float32)).to(device)
            action = (
                agent.act(obs_in, None if mask_now is None else torch.as_tensor(mask_now).to(device), explore).cpu().numpy()
            )
            obs_next, reward, term, trunc, infos = train_envs.step(action)
            over = term | trunc
            known, mask_next = np.array(obs_next, np.float32), infos.get("action_mask")
            if over.any():
                known[over] = np.stack(infos["final_obs"][over])
            new = dict(zip(TRANSITION, (obs_now, action, reward, known, term)))
            if masks[0] in keys:
                known_mask = mask_next.copy()
                if over.any():
                    known_mask[over] = infos["final_action_mask"][over]
                new |= dict(zip(masks, (mask_now, known_mask)))
            new["rewards"] = data_scale * reward
            reward_max = max(reward_max, float(np.abs(new["rewards"]).max()))
            for key, value in new.items():
                buffer[key][filled : filled + args.finetune_envs] = torch.as_tensor(np.asarray(value))
            filled += args.finetune_envs
            obs_now, mask_now, episode_return = obs_next, mask_next, episode_return + reward
            if "record" in infos:
                equity = infos["record"][:, EQUITY].copy()
                peak = np.maximum(peak, equity)
            recent_returns = (recent_returns + episode_return[over].tolist())[-100:]
            episode_return[over], equity[over], peak[over] = 0.0, 1.0, 1.0
        if online:
            half = args.batch_size // 2
            pick = torch.randint(filled, (args.batch_size - half,))
            batch = {key: torch.cat([torch.as_tensor(value[:half]), buffer[key][pick]]) for key, value in batch.items()}

        decay = 1.0 if args.finetune_steps else 0.5 * (1.0 + math.cos(math.pi * (step - 1) / args.gradient_steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        logs, logged = logs + update(to_tensors(batch, agent, device)), logged + 1
        train_seconds += time.perf_counter() - tick
        progress.update()
        switch = step == args.gradient_steps
        if step % args.eval_every and step % args.checkpoint_every and step != total_steps and not switch:
            continue

        # Validation: held-out episodes, and, where the market is known, a backtest on its validation split
        stop_early = False
        if step % args.eval_every == 0 or step == total_steps or switch:
            values, held_loss = dict(zip(LOGGED, (logs / logged).tolist())), evaluate(held)
            logs, logged = torch.zeros_like(logs), 0
            score = task.score(task.run("val", agent_policy)) if task else -held_loss["loss"]
            writer.add_scalar("charts/SPS", step / train_seconds, step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            for name, value in values.items():
                writer.add_scalar(f"losses/{name}", value, step)
            for name, value in held_loss.items():
                writer.add_scalar(f"eval/held_out_{name}", value, step)
            writer.add_scalar("eval/val_score", score, step)
            if recent_returns:
                writer.add_scalar("charts/episodic_return", np.mean(recent_returns), step)
            progress.set_postfix_str(f"{step / train_seconds:.0f} steps/s, validation {score:.4g}", refresh=False)

            # Fail-safe: stop cleanly, and say where
            found = {**values, **held_loss, "validation score": score}
            bad = [name for name, value in found.items() if not np.isfinite(value)]
            bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
            if bad:
                failure = f"diverged by step {step}: {', '.join(bad)} not finite"
            bound = largest_value()
            if held_loss["q"] > bound and not bad:
                failure = f"diverged by step {step}: mean |Q| {held_loss['q']:.4g}; rewards seen can sum to half of {bound:.4g}"
            if failure:
                break
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best, best_step = score, 0, step
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
            if switch and args.finetune_steps:
                switch_score, evals_since_best = score, 0  # what comes now is another search
            stop_early = 0 < args.patience <= evals_since_best and (online or not args.finetune_steps)
        due = step % args.checkpoint_every == 0 or step == total_steps or stop_early
        if due and all(torch.isfinite(p).all() for p in agent.parameters()):  # if not, the next validation says so
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "sha256": data.meta["sha256"],
                "step": total_steps if stop_early else step,
                "train_seconds": train_seconds, "model": agent.state_dict(), "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "best_score": best_score, "best_model": best_model, "best_step": best_step,
                "evals_since_best": evals_since_best, "switch_score": switch_score,
                "logs": logs, "logged": logged, "held_loss": held_loss,
                "online": {
                    "envs": {k: torch.as_tensor(v) for k, v in train_envs.get_state().items()},
                    "buffer": {key: value[:filled].clone() for key, value in buffer.items()}, "recent_returns": recent_returns,
                    "reward_max": float(reward_max),
                    "obs": torch.as_tensor(obs_now), "mask": None if mask_now is None else torch.as_tensor(mask_now),
                    "accounts": torch.as_tensor(np.stack([episode_return, equity, peak])),
                } if online and task else None,
            })  # fmt: skip
        if stop_early:
            print(f"\nstopped early: no better validation score in {evals_since_best} validations")
            break
    progress.close()
    writer.close()

    # Final report: the last model, and the one chosen on validation; the test split is read here for the first and only time
    run |= {
        "status": "failed" if failure else "finished", "failure": failure, "train_seconds": train_seconds,
        "wall_clock": time.time() - started, "sps": step / max(train_seconds, 1e-9), "val_score": best_score,
        "env_steps": filled, "last_100_returns": float(np.mean(recent_returns)) if recent_returns else None,
    }  # fmt: skip
    run["offline"] |= {"best_step": best_step, "switch_score": switch_score, "held_out": held_loss, "bound": largest_value()}
    if failure:
        ledger.write_json(run_dir / "run.json", run)
        sys.exit(f"{failure}; the last good checkpoint, if any, is in {run_dir}")
    print(f"\nheld-out episodes: {', '.join(f'{name} {value:.4g}' for name, value in held_loss.items())}")
    if task:
        compared = {"last": task.run("test", agent_policy)}
        agent.load_state_dict(best_model)
        frames = {split: task.run(split, agent_policy) for split in task.splits}
        ledger.write_ledger(run_dir / "ledger_last.parquet", compared["last"])
        ledger.write_ledger(run_dir / "ledger.parquet", pd.concat(frames.values(), ignore_index=True))
        compared = {"agent": frames["test"], **compared, **task.compare(args.seed)}
        scores = {name: ledger.summarise(frame, task.panel.bars_per_year) for name, frame in compared.items()}
        for name, frame in compared.items():
            scores[name]["utility"] = task.score(frame)
        run["scores"] = {"test": scores} | {
            split: {"agent": ledger.summarise(frames[split], task.panel.bars_per_year, resamples=0)}
            for split in ("train", "val")
        }
        print(f"test split, after costs, per year ({scores['agent']['bars']} bars; {scores['agent']['bootstrap']});")
        print(f"agent: best on validation, step {best_step}; score: growth, less risk where the rewards are")
        print(f"{'':22}{'Sharpe':>7}  {'95% interval':<16}{'growth':>8}{'score':>9}{'drawdown':>10}{'turnover':>10}{'cost':>8}")
        for name, s in scores.items():
            interval = f"[{s['sharpe_low']:.2f}, {s['sharpe_high']:.2f}]"
            print(f"{name:22}{s['sharpe']:7.2f}  {interval:<16}{s['growth']:8.1%}{s['utility']:9.1%}", end="")
            print(f"{s['max_drawdown']:10.1%}{s['turnover']:9.0f}x{s['cost']:8.1%}")
        print(f"mean reward of the data: {run['offline']['mean_reward']:.1%} per year")
    elif env_id:
        run["eval_return"] = {"last": play(args.eval_episodes)}
        agent.load_state_dict(best_model)
        run["eval_return"]["best"] = play(args.eval_episodes)
        told = ", ".join(f"{name} model {value:.4g}" for name, value in run["eval_return"].items())
        print(f"mean return of {args.eval_episodes} episodes: {told}")
    ledger.write_json(run_dir / "run.json", run)
    print(f"{run['sps']:.0f} gradient steps/s; run directory {run_dir}")
    if args.track:
        wandb.finish()
