"""Helpers and fixtures for the tests of the offline scripts: small datasets, runs in this process, and their networks.

A new offline script becomes part of tests/test_offline_scripts.py by its entries in CASES.
"""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from scripts import Run, Script

from envs import ledger
from envs.dataset import PROVENANCE, TRANSITION, Dataset
from envs.dataset_writer import DatasetWriter, log_episodes
from envs.leadlag_tables import LeadLagConfig
from envs.ledger import LEDGER
from envs.portfolio import GUARDS
from envs.portfolio_tables import PortfolioConfig
from envs.task import Task, describe_task, provenance

PORTFOLIO = "synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2"
LEADLAG = "synthetic:leadlag:bars=400:train=2:val=1:test=2"
GRADIENT_STEPS, MARKET_STEPS = 120, 20  # of the short run; each step of the markets comes with four of the gradient
SHORT = (
    "--gradient-steps", str(GRADIENT_STEPS), "--batch-size", "32", "--hidden", "16", "--eval-every", "40",
    "--checkpoint-every", "30",
)  # fmt: skip
ONLINE = ("--finetune-steps", str(8 * MARKET_STEPS), "--finetune-envs", "8")
HELD_OUT = ("loss", "nll", "agreement", "td_error", "q")
META = dict.fromkeys(PROVENANCE) | {"env_id": "Nowhere-v0", "gamma": 0.9}  # of data that nothing can be evaluated on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(Script):
    """An offline script on the data of one market; `market`, `costs` and `given` are what these data say."""

    online: bool  # the short run ends with steps of the market
    held_out: tuple[str, ...] = HELD_OUT  # what is measured on held-out episodes
    sizes: tuple[str, ...] = SHORT
    score: str = "score"
    run: str = "offline_run"
    kept: tuple[str, ...] = ("sha256", "step", "best_step", "evals_since_best", "held_loss", "logs")

    @property
    def discrete(self) -> bool:
        return self.env_id == "LeadLag-v0"

    @property
    def total_steps(self) -> int:
        """Gradient steps of the short run."""
        return GRADIENT_STEPS + (4 * MARKET_STEPS if self.online else 0)

    def options(self, folder: Path) -> list[str]:
        """Of the short run, on the datasets in `folder`."""
        return ["--dataset", str(folder / self.env_id / "dataset.hdf5"), *SHORT, *self.own]


MARKETS = {
    "Portfolio-v0": dict(
        market="synthetic:garleanu-pedersen:bars=300:train=2:val=1:test=2",
        costs="zero:quadratic_impact_bps=75",
        others=("last", "equal weight", "closed form"),
        columns=(*LEDGER[:-1], *GUARDS, "action"),
    ),
    "LeadLag-v0": dict(
        market="synthetic:leadlag:bars=400:train=2:val=1:test=2",
        costs="institutional",
        others=(
            "last", *(f"lookback {k}" for k in (5, 9, 17, 32, 60)), "best in training", "random", "equal weight",
            "oracle regime", "oracle returns",
        ),
    ),
}  # fmt: skip
ALGORITHMS = {
    "bc_portfolio": dict(losses=("actor_loss",), held_out=("nll", "agreement"), online=False),
    "iql_portfolio": dict(
        losses=("actor_loss", "value_loss", "critic_loss", "q", "value", "capped"), online=True,
        numbers=("last_100_returns",),
    ),
    "cql_portfolio": dict(
        losses=("actor_loss", "critic_loss", "conservative_loss", "q", "entropy", "temperature"), online=True,
        numbers=("last_100_returns",),
    ),
}  # fmt: skip


def agent_of(discrete: bool):
    """Script.make_agent of a kind of actions."""

    def make(module, saved):
        weights = saved["model"]
        return module.Agent(len(weights["obs_mean"]), len(weights["low"]), discrete, saved["args"]["hidden"])

    return make


def cases():
    for name, algorithm in ALGORITHMS.items():
        for env_id, market in MARKETS.items():
            discrete = env_id == "LeadLag-v0"
            own = ONLINE if algorithm["online"] else ()
            if (name, discrete) == ("cql_portfolio", True):
                own = (*own, "--calql")
            yield f"{name}, {'discrete' if discrete else 'continuous'}", Case(
                name=name, env_id=env_id, own=own, make_agent=agent_of(discrete),
                given={"seed": 1, "gradient_steps": GRADIENT_STEPS, "hidden": 16}, **market, **algorithm,
            )  # fmt: skip


CASES = dict(cases())


def market_meta(env_id: str, **changes) -> dict:
    """What `Task` takes: a market of MARKETS, or one with other `changes`."""
    flags = dict(market=MARKETS[env_id]["market"], seed=1, symbols=(), start=None, end=None, resample=None)
    flags |= dict(train_fraction=0.6, val_fraction=0.2, embargo=5, folds=0, fold=0) | changes
    if env_id == "LeadLag-v0":
        config, options = LeadLagConfig(max_lookback=60, num_lookbacks=5), {"actions": "hybrid", "max_jump": 1}
    else:
        config = PortfolioConfig(
            costs=MARKETS[env_id]["costs"], orders="change", constraints="long_short", gross=2.0, asset_cap=0.8
        )
        options = {"reward_weights": {"variance": 1.0}}
    return describe_task(env_id, SimpleNamespace(**flags), config, episode_length=7, **options)


def random_actor(envs, seed=0):
    """Allowed actions, all as likely, or noise within a third of the bounds; as `log_episodes` takes it."""
    rng, space = np.random.default_rng(seed), envs.single_action_space

    def act(observation, mask, row, _):
        if isinstance(space, gym.spaces.Discrete):
            allowed = np.ones((len(observation), space.n)) if mask is None else mask.astype(float)
            return (rng.random(allowed.shape) * allowed).argmax(axis=1), -np.log(allowed.sum(axis=1)).astype(np.float32)
        return (space.high / 3 * rng.uniform(-1, 1, envs.action_space.shape)).astype(np.float32), None

    return act


def log_market(path: Path, env_id: str, **changes):
    meta = market_meta(env_id, **changes)
    task = Task(meta)
    envs, said = task.make(32), provenance(meta, task.panel.sha256, {"name": "as in task"}, None, 0.9, [{"policy": "random"}])
    log_episodes(path, envs, random_actor(envs), 320, said, 0, task.panel.timestamps)


def log_gymnasium(path: Path, env_id: str, episodes: int, actor=random_actor):
    envs = gym.make_vec(env_id, 8, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
    envs.action_space.seed(0)
    log_episodes(path, envs, actor(envs), episodes, META | {"env_id": env_id}, 0)


def write(path: Path, space: gym.Space, episodes, **meta) -> Path:
    """A dataset of episodes: each a list of (observation, action, reward, next observation, terminal, timeout) or, with two
    masks more, of Discrete actions."""
    size = len(episodes[0][0][0])
    with DatasetWriter(path, size, space, META | meta, num_envs=1) as writer:
        for episode in episodes:
            for obs, action, reward, next_obs, terminal, timeout, *masks in episode:
                row = (np.asarray([value]) for value in (obs, action, reward, bool(terminal), bool(timeout), next_obs))
                infos = dict(zip(("action_mask", "next_action_mask"), (np.asarray([mask]) for mask in masks)))
                writer.add(*row, **infos)
    return path


def toy(path: Path, discrete: bool, spoil=(), episodes=40, length=12, masked=False, **meta) -> Path:
    """Random episodes, of which every third terminates; those in `spoil` have other actions and rewards than without it."""
    episodes = list(range(episodes))
    space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (2,), np.float32)
    told = []
    for episode in episodes:
        rng, other = np.random.default_rng(episode), np.random.default_rng(1000 + episode)
        obs = rng.normal(size=(length + 1, 3)).astype(np.float32)
        mask = np.where(np.arange(3) == rng.integers(3, size=(length + 1, 1)), not masked, True)
        rng = other if episode in spoil else rng
        rewards = rng.normal(size=length)
        actions = (rng.random(mask.shape) * mask).argmax(axis=1) if discrete else rng.uniform(-1, 1, (length, 2))
        rows = []
        for t in range(length):
            ends = t == length - 1
            row = (obs[t], actions[t], rewards[t], obs[t + 1], ends and episode % 3 == 0, ends and episode % 3 > 0)
            rows.append((*row, mask[t], mask[t + 1]) if masked else row)
        told.append(rows)
    return write(path, space, told, **meta)


def chain(path, length=5, seed=0):
    """A deterministic chain of one-hot states: 1 steps right and 0 left; the last step right pays 1 and ends the episode. The
    behaviour mostly steps left, and episodes time out after 12 steps."""
    rng, told = np.random.default_rng(seed), []
    seen = np.eye(length, dtype=np.float32)
    for _ in range(120):
        state, rows = rng.integers(length), []
        for t in range(12):
            action = int(rng.random() < 0.35)
            following, over = max(0, state + 2 * action - 1), state == length - 1 and action == 1
            rows.append((seen[state], action, float(over), seen[min(following, length - 1)], over, not over and t == 11))
            if over:
                break
            state = following
        told.append(rows)
    return write(path, gym.spaces.Discrete(2), told)


def write_foreign(path: Path, discrete: bool, rows=600, episode=20, seed=0, **more) -> Path:
    """A file without meta, with the least that is read: episodes of 20 steps."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(rows, 3)).astype(np.float32), "rewards": rng.normal(size=rows).astype(np.float32),
        "actions": rng.integers(3, size=rows) if discrete else rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "terminals": (np.arange(1, rows + 1) % episode == 0).astype(np.float32),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in (arrays | more).items():
            file[key] = values
    return path


def edit_meta(dataset: Path, **entries):
    """Change what dataset_meta.json says."""
    meta = dataset.with_name("dataset_meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | entries))


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> Path:
    """Folder with a dataset of each market."""
    folder = tmp_path_factory.mktemp("datasets")
    for env_id in MARKETS:
        log_market(folder / env_id / "dataset.hdf5", env_id)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[dict[str, Run], Path]:
    """The short runs that were made so far, and the folder they are kept in."""
    return {}, tmp_path_factory.mktemp("runs")


@pytest.fixture
def few_resamples(monkeypatch):
    """Rough intervals in the reports of a test: they are a third of the time that a short run takes."""
    monkeypatch.setattr(ledger.summarise, "__defaults__", (20, 0))


@pytest.fixture
def keep_checkpoints(inside, monkeypatch):
    """Run the script and keep a copy of every checkpoint in a new folder: 1.pt, 2.pt, ...; returns its variables."""

    def call(folder, *options):
        folder.mkdir()
        replace = os.replace

        def replace_and_keep(source, target):
            replace(source, target)
            if Path(target).name == "model.pt":
                shutil.copy(target, folder / f"{len(list(folder.iterdir())) + 1}.pt")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_and_keep)
            return inside(*options)

    return call


@pytest.fixture
def short(script, datasets) -> list[str]:
    return script.options(datasets)


@pytest.fixture
def offline_run(script, short, finished, few_resamples, keep_checkpoints, capsys) -> Run:
    """The short run of a case, with what it printed; beside its folder lie its checkpoints, 1.pt, 2.pt, ..."""
    runs, folder = finished
    key = script.name, script.env_id
    if key not in runs:
        kept = folder / f"{script.name}, {script.env_id}"
        made = Path(keep_checkpoints(kept, *short)["run_dir"])
        shutil.move(made, kept / "run")
        runs[key] = Run(kept / "run", subprocess.CompletedProcess(short, 0, capsys.readouterr().out))
    return runs[key]


def rows_of(path: Path, **changes) -> dict[str, np.ndarray]:
    """All rows of a dataset as a script's batch, in the order of the file, with other values for some keys."""
    data = Dataset(path)
    keys = [key for key in (*TRANSITION, "infos/action_mask", "infos/next_action_mask", "infos/mc_return") if key in data.keys]
    blocks = list(data.blocks(np.arange(len(data.terminated)), tuple(keys)))
    return {key: np.concatenate([block[key] for block in blocks]) for key in keys} | changes


def network(mlp, k: int, x: torch.Tensor) -> torch.Tensor:
    """What the `k`-th of an MLP's networks makes of its whole input: (n, D) -> (n, out)."""
    for n, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
        x = x @ weight[k] + bias[k]
        x = torch.relu(x) if n < 2 else x
    return x


def shake(agent, seed=0):
    """Other weights, so that no two networks are alike and no output is near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def assert_gradients(agent, loss, parameters: str):
    """The gradients that an update left in some of the agent's parameters are those of `loss`, from a copy of the agent."""
    names = [name for name, _ in agent.named_parameters() if name.startswith(parameters)]
    copied, total = loss
    found = torch.autograd.grad(total, [copied.get_parameter(name) for name in names], retain_graph=True)
    for name, expected in zip(names, found, strict=True):
        torch.testing.assert_close(agent.get_parameter(name).grad, expected, rtol=2e-4, atol=2e-5, msg=name)
