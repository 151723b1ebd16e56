"""The rules of rules.py as policies in the vector environments, so that what they do there can be logged as offline data.

A rule's target weights become scores of Portfolio-v0, its choice of a lookback the action of LeadLag-v0; both may explore.
"""

import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from rules import CHOICES, Setting
from scipy.stats import norm

from envs import references
from envs.dataset_writer import Actor, log_episodes
from envs.leadlag import LeadLagVectorEnv
from envs.portfolio import LARGEST, PortfolioVectorEnv, RegimeGuard
from envs.portfolio_tables import LONG_ONLY, PortfolioData
from envs.task import SERIES, describe_task, provenance

RANDOM_STD = 0.5  # of the scores of the behaviour "random": both signs, and every symbol
MARKETS = 64  # at once, at most; as in the scripts, so that equal numbers of episodes asked for are equal numbers logged


def env_id_of(name: str) -> str:
    """The environment that a rule acts in when it is logged."""
    return "LeadLag-v0" if name in CHOICES else "Portfolio-v0"


def dataset_path(folder: str, name: str, seed: int) -> Path:
    return Path(folder) / f"{name}__{seed}" / "dataset.hdf5"


def weights_actor(data: PortfolioData, targets: np.ndarray, noise: float, rng: np.random.Generator) -> Actor:
    """Orders in Portfolio-v0 the weights targets[t] (T, N) at row t, noise of standard deviation `noise` on scores.

    NaN is no order: the weight held. An account that holds nothing, as at the start of an episode, takes over what was ordered
    last: an episode may begin between two orders. Without noise there is no log-probability.
    """
    taken_over = pd.DataFrame(targets).groupby(data.panel.segment_of_row).ffill().to_numpy()

    def act(obs, mask, rows, *_):
        held = obs[:, data.layout["weights"]].astype(np.float64)
        empty = ~held.any(axis=1, keepdims=True)
        return explore(scores(data, np.where(empty, taken_over[rows], targets[rows]), held, rows), noise, rng)

    return act


def scores(data: PortfolioData, targets: np.ndarray, held: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The action (n, A) that makes Portfolio-v0 order `targets` (n, N) at `rows` (n,), given the weights `held` (n, N).

    NaN: the weight held, as for a symbol without a bar, which cannot be ordered. Each weight is first cut to the cap of a
    symbol, and to 0 or more in long_only; cash asks for what they leave over of the budget, and the leverage head for a
    budget of 1. The order is then that, to the rounding of float32, unless caps on groups, gross or net exposure forbid it,
    or a score would pass +-LARGEST (a larger --scale reaches further).
    """
    c, scale = data.config, data.scale
    long_only, change = c.constraints == LONG_ONLY, c.orders == "change"
    ordered = np.where(np.isnan(targets), held, targets).clip(0.0 if long_only else -c.asset_cap, c.asset_cap)
    ordered = np.where(data.panel.present[rows], ordered, held)
    base = held if change else np.zeros_like(held)
    action = np.clip((ordered - base) / scale, -LARGEST, LARGEST)
    heads = [action]
    if long_only and c.cash:
        left = np.minimum(data.gross[rows], 1.0) - (base + scale * action).sum(axis=1)
        before = np.minimum(data.gross[rows], 1.0) - held.sum(axis=1) if change else 0.0
        heads.append(np.clip((left - before) / scale, -LARGEST, LARGEST)[:, None])
    if c.leverage:
        heads.append(np.zeros((len(rows), 1)))
    return np.concatenate(heads, axis=1)


def explore(mean: np.ndarray, std: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores (n, A) float32 drawn around `mean` and clipped; the log-density (n,) of these, None if std is 0."""
    scores = (mean + std * rng.standard_normal(mean.shape)).clip(-LARGEST, LARGEST).astype(np.float32)
    return scores, norm.logpdf(scores, mean, std).sum(axis=1) if std > 0.0 else None


def random_actor(data: PortfolioData, size: int, rng: np.random.Generator) -> Actor:
    """Independent normal scores (n, size) of standard deviation RANDOM_STD.

    Where scores are changes of the weights held, their means undo these: the weights ordered do not wander off.
    """

    def act(obs, mask, rows, *_):
        centre = np.zeros((len(obs), size))
        if data.config.orders == "change":
            held = obs[:, data.layout["weights"]]
            centre[:, : held.shape[1]] = np.clip(-held / data.scale, -LARGEST, LARGEST)
        return explore(centre, RANDOM_STD, rng)

    return act


def lookback_actor(choice: np.ndarray, epsilon: float, rng: np.random.Generator) -> Actor:
    """Chooses lookback choice[t] (T,) at row t of LeadLag-v0, or with probability `epsilon` any that the mask allows.

    Where choice[t] is masked, what `references.hold` takes instead. The log-probability is exact.
    """
    policy = references.hold(choice)

    def act(obs, mask, rows, *_):
        wanted = policy(obs, mask, rows)
        uniform = np.where(mask, rng.random(mask.shape), -1.0).argmax(axis=1)
        actions = np.where(rng.random(len(rows)) < epsilon, uniform, wanted)
        probability = (1.0 - epsilon) * (actions == wanted) + epsilon / mask.sum(axis=1)
        return actions, np.log(probability)

    return act


def log_dataset(name: str, s: Setting, args, targets: np.ndarray, commit: str | None) -> int:
    """Log training episodes of a rule to `dataset_path(args.log_dataset, name, args.seed)`; returns their number of steps.

    args: those of baselines.py; targets (T, N): the rule's orders; commit: of the code. Windows and noise are of the seed and
    the name. Raises ValueError if the environment cannot be made, DatasetError (one too) if there is a dataset already.
    """
    env_id, seeds = env_id_of(name), np.random.SeedSequence((args.seed, zlib.crc32(name.encode())))
    rng, seed = np.random.default_rng(seeds), int(seeds.generate_state(1)[0])
    markets = dict(
        num_envs=min(MARKETS, args.log_episodes), split=s.splits["train"], num_threads=args.num_threads or None,
    )  # fmt: skip
    if env_id == "LeadLag-v0":
        data, epsilon = s.leadlag_market, 1.0 if name == "lead-lag-random" else args.log_epsilon
        options = dict(actions="absolute", max_jump=0, episode_length=args.episode_length)
        envs = LeadLagVectorEnv(data=data, **markets, **options)
        act, exploration = lookback_actor(CHOICES[name](s, data), epsilon, rng), {"epsilon": epsilon}
    else:
        data, noise = s.data, RANDOM_STD if name == "random" else args.log_noise
        weights = dict.fromkeys(("differential_sharpe", "turnover", "drawdown", "cvar"), 0.0)
        weights |= {"log_growth": 1.0, "variance": args.rules.penalty_variance}
        options = dict(guard=RegimeGuard(), reward_weights=weights, cvar_alpha=0.05, episode_length=args.episode_length)
        envs = PortfolioVectorEnv(data=data, **markets, **options)
        size, exploration = envs.single_action_space.shape[0], {"noise": noise}
        act = random_actor(data, size, rng) if name == "random" else weights_actor(data, targets, noise, rng)
    task = describe_task(env_id, args, data.config, **options)
    if env_id == "LeadLag-v0" and not (args.columns or args.series):  # its scripts have no such flags
        task = {key: value for key, value in task.items() if key not in SERIES}
    behaviour = {"policy": name, "rules": asdict(args.rules), **exploration, "checkpoint_sha256": None}
    meta = provenance(task, s.panel.sha256, asdict(data.costs), commit, args.gamma, [behaviour])
    path = dataset_path(args.log_dataset, name, args.seed)
    return log_episodes(path, envs, act, args.log_episodes, meta, seed, s.panel.timestamps)
