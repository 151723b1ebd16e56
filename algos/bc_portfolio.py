"""Behaviour cloning (Pomerleau 1991) of logged data, or of the best episodes in them."""

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
from envs.dataset import Dataset
from envs.task import MARKETS, Task

LOGGED = ("actor_loss",)  # of every gradient step


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

    gradient_steps: int = 4_000
    """batches to learn from"""
    batch_size: int = 512
    """transitions in a batch"""
    learning_rate: float = 1e-3
    """learning rate of Adam; it falls to 0 along a cosine"""
    hidden: int = 64
    """units in each of two hidden layers"""
    top_percent: float = 100.0
    """imitate only so many percent of the episodes: those with the largest sum of rewards"""
    max_grad_norm: float = 10.0
    """largest norm of the gradient"""
    eval_every: int = 1_000
    """gradient steps between two validations"""
    patience: int = 0
    """stop after so many of them without a better score (0: never); the best model is kept in any case"""


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
    """Actor over standardised observations; continuous actions are scaled to [-1, 1]."""

    def __init__(self, obs_size, num_actions, discrete, hidden):
        super().__init__()
        self.discrete = discrete
        self.register_buffer("obs_mean", torch.zeros(obs_size))
        self.register_buffer("obs_scale", torch.ones(obs_size))
        self.register_buffer("low", torch.full((num_actions,), -1.0))  # range of the actions that the actor can take
        self.register_buffer("high", torch.full((num_actions,), 1.0))
        self.actor = MLP(obs_size, hidden, num_actions, std=0.01)
        self.log_std = nn.Parameter(torch.zeros(num_actions))

    def norm(self, obs):
        return ((obs - self.obs_mean) * self.obs_scale).clamp_(-10.0, 10.0)

    def scale(self, action):
        """Continuous actions of the data in units of the range; those outside count as its ends."""
        return ((2.0 * action - self.high - self.low) / (self.high - self.low)).clamp_(-1.0, 1.0)

    def unscale(self, action):
        return 0.5 * (self.high + self.low + action * (self.high - self.low))

    def policy(self, x, mask):
        """(n, A): log-probabilities, masked actions about -1e8; or the means of continuous actions."""
        out = self.actor(x).squeeze(0)
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
    def act(self, obs, mask):
        """The most likely actions, for the market."""
        out = self.policy(self.norm(obs), mask)
        return out.argmax(dim=1) if self.discrete else self.unscale(out.clamp(-1.0, 1.0))


def make_envs(env_id, task, num_envs):
    """Training episodes of the market, or of a Gymnasium id. SAME_STEP: a finished episode's last observation is final_obs."""
    if task:
        return task.make(num_envs, "train")
    return gym.make_vec(env_id, num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})


def to_tensors(batch, agent, device):
    """Normalised observations, actions, and masks or None, of a batch of the data."""
    obs, actions, *mask = (torch.as_tensor(batch[key]).to(device) for key in batch)
    return agent.norm(obs), actions if agent.discrete else agent.scale(actions), *(mask or (None,))


def best_episodes(data, episodes, percent):
    """The `percent` of the episodes with the largest sum of rewards, at least one."""
    starts, stops = data.ranges(episodes, ("rewards",))
    rewards = np.concatenate([block["rewards"] for block in data.blocks(episodes, ("rewards",))])
    ends, sums = np.cumsum(stops - starts), np.append(0.0, rewards.cumsum(dtype=np.float64))
    returns = sums[ends] - sums[ends - (stops - starts)]
    count = max(1, round(percent / 100.0 * len(episodes)))
    return np.sort(episodes[np.argsort(-returns, kind="stable")[:count]])


def moments(data, episodes, key):
    """Mean and standard deviation of one of the data's columns over some episodes, block by block."""
    count, total, squares = 0, 0.0, 0.0
    for block in data.blocks(episodes, (key,)):
        x = block[key].astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(axis=0), squares + (x**2).sum(axis=0)
    return total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))


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
    for flag in ("gradient_steps", "batch_size", "eval_every", "checkpoint_every", "eval_episodes", "hidden"):
        if getattr(args, flag) < 1:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    for flag in ("learning_rate", "patience"):
        if getattr(args, flag) < 0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 0 or more")
    if not 0.0 < args.top_percent <= 100.0:
        sys.exit(f"--top-percent {args.top_percent}: expected above 0 and at most 100")
    if args.max_grad_norm <= 0.0:
        sys.exit(f"--max-grad-norm {args.max_grad_norm}: expected above 0")
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
        everything = train
        train, held_out = (best_episodes(data, episodes, args.top_percent) for episodes in (train, held_out))
        discrete = isinstance(data.action_space, gym.spaces.Discrete)
        mask = ("infos/action_mask",)
        keys = ("observations", "actions", *(mask if discrete and set(mask) <= set(data.keys) else ()))
        batches = data.batches(train, args.batch_size, args.seed, args.memory_mb, keys)
        validation = next(data.batches(held_out, 8192, args.seed, args.memory_mb, keys))
        obs_size = data.keys["observations"][1][0]
        games = make_envs(env_id, task, min(16, args.eval_episodes)) if env_id else None
        if games and (games.single_action_space, *games.single_observation_space.shape) != (data.action_space, obs_size):
            found = f"{data.action_space} and observations ({obs_size},)"
            raise ValueError(f"{args.dataset}: actions of {found}: expected those of {env_id}")
    except (ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    reward_mean, _ = moments(data, everything, "rewards")
    data_scale = data.meta.get("reward_scale") or 1.0  # of the data's rewards, against the market's own
    num_actions = int(data.action_space.n) if discrete else data.action_space.shape[0]
    agent = Agent(obs_size, num_actions, discrete, args.hidden).to(device)
    agent.obs_mean.copy_(torch.tensor(data.meta["observation_mean"]))
    std = torch.tensor(data.meta["observation_std"])
    agent.obs_scale.copy_(torch.where(std > 1e-6, 1.0 / std, 0.0))  # what never varied has taught nothing
    if not discrete:  # a market's space is far wider than what anybody orders
        mean, std = moments(data, train, "actions")
        reach = np.maximum(5.0 * std, 1e-3 * (1.0 + np.abs(mean)))
        low, high = np.maximum(data.action_space.low, mean - reach), np.minimum(data.action_space.high, mean + reach)
        agent.low.copy_(torch.as_tensor(np.where(low < high, low, mean - reach)))  # a space may be a point
        agent.high.copy_(torch.as_tensor(np.where(low < high, high, mean + reach)))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    for note in data.meta.get("inferred", ()):
        print(f"assumed {note}")
    print(f"data    {args.dataset}: {data.meta['steps']} steps, {len(train)} episodes to train, {len(held_out)} held out")
    print(f"task    {env_id or 'not named: no evaluation'}")

    def update(batch):
        """One step of Adam; returns what is logged."""
        x, action, mask = batch
        actor_loss = -agent.log_prob(x, mask, action).mean()
        optimizer.zero_grad()
        actor_loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
        optimizer.step()
        return actor_loss.detach()[None]

    @torch.no_grad()
    def evaluate(batch):
        """On held-out transitions: the actor's likelihood of the data, and the share of its actions that are the data's (within
        a twentieth of the range)."""
        x, action, mask = batch
        out = agent.policy(x, mask)
        close = out.argmax(dim=1) == action if discrete else (out - action).abs() <= 0.1
        return {"nll": float(-agent.log_prob(x, mask, action).mean()), "agreement": float(close.float().mean())}

    # Start, or go on from the checkpoint
    held = to_tensors(validation, agent, device)
    first_step, train_seconds, evals_since_best, best_step = 1, 0.0, 0, 0
    logs, logged, held_loss = torch.zeros(len(LOGGED), device=device), 0, {}
    best_score, best_model = -np.inf, {k: v.clone() for k, v in agent.state_dict().items()}
    if checkpoint:
        if checkpoint["sha256"] != data.meta["sha256"]:
            sys.exit(f"--resume {args.resume}: {args.dataset} has changed; expected sha256 {checkpoint['sha256']}")
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        best_score, best_model, best_step = checkpoint["best_score"], checkpoint["best_model"], checkpoint["best_step"]
        first_step, evals_since_best = checkpoint["step"] + 1, checkpoint["evals_since_best"]
        train_seconds = checkpoint["train_seconds"]
        logs, logged, held_loss = checkpoint["logs"].to(device), checkpoint["logged"], checkpoint["held_loss"]
        print(f"resume  {run_dir} after step {checkpoint['step']}")
    else:
        run_dir = ledger.new_run_dir(args.runs_dir, env_id or "offline", args.exp_name, args.seed)
    batches = islice(batches, first_step - 1, None)  # the batches are those of a run that was never interrupted
    if first_step <= args.gradient_steps:
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

    def play(episodes):
        """Returns of new episodes of a Gymnasium task without exploration."""
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
    progress = tqdm(total=args.gradient_steps, initial=first_step - 1, unit="step", mininterval=0.5)
    for step in range(first_step, args.gradient_steps + 1):
        tick = time.perf_counter()
        batch = next(batches)
        decay = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / args.gradient_steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        logs, logged = logs + update(to_tensors(batch, agent, device)), logged + 1
        train_seconds += time.perf_counter() - tick
        progress.update()
        if step % args.eval_every and step % args.checkpoint_every and step != args.gradient_steps:
            continue

        # Validation: held-out episodes, and, where the market is known, a backtest on its validation split
        stop_early = False
        if step % args.eval_every == 0 or step == args.gradient_steps:
            values, held_loss = dict(zip(LOGGED, (logs / logged).tolist())), evaluate(held)
            logs, logged = torch.zeros_like(logs), 0
            score = -held_loss["nll"]
            writer.add_scalar("charts/SPS", step / train_seconds, step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            for name, value in values.items():
                writer.add_scalar(f"losses/{name}", value, step)
            for name, value in held_loss.items():
                writer.add_scalar(f"eval/held_out_{name}", value, step)
            if task:
                writer.add_scalar("eval/val_score", task.score(task.run("val", agent_policy)), step)
            progress.set_postfix_str(f"{step / train_seconds:.0f} steps/s, held-out nll {-score:.4g}", refresh=False)

            # Fail-safe: stop cleanly, and say where
            found = {**values, **held_loss, "validation score": score}
            bad = [name for name, value in found.items() if not np.isfinite(value)]
            bad += [name for name, p in agent.named_parameters() if not torch.isfinite(p).all()]
            if bad:
                failure = f"diverged by step {step}: {', '.join(bad)} not finite"
            if failure:
                break
            evals_since_best += 1
            if score > best_score:
                best_score, evals_since_best, best_step = score, 0, step
                best_model = {k: v.clone() for k, v in agent.state_dict().items()}
            stop_early = args.patience > 0 and evals_since_best >= args.patience
        due = step % args.checkpoint_every == 0 or step == args.gradient_steps or stop_early
        if due and all(torch.isfinite(p).all() for p in agent.parameters()):  # if not, the next validation says so
            save_checkpoint(run_dir / "model.pt", {
                "args": dataclasses.asdict(args), "sha256": data.meta["sha256"],
                "step": args.gradient_steps if stop_early else step,
                "train_seconds": train_seconds, "model": agent.state_dict(), "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "best_score": best_score, "best_model": best_model, "best_step": best_step,
                "evals_since_best": evals_since_best,
                "logs": logs, "logged": logged, "held_loss": held_loss,
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
        "env_steps": 0,
    }  # fmt: skip
    run["offline"] |= {"best_step": best_step, "held_out": held_loss}
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
        print(f"agent: best on held-out episodes, step {best_step}; score: growth, less risk where the rewards are")
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
