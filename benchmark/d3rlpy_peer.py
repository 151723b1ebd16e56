"""One of d3rlpy's algorithms on a dataset, set up as the script of the same name; benchmark/offline_peers.py starts it.

It runs in an environment of its own, with d3rlpy 2.8, torch, h5py and NumPy, and imports nothing of this project. What it is
to do comes as a JSON file: the script's arguments, and the numbers by which that standardises observations and scales rewards
and actions. Data reach d3rlpy scaled, and steps are taken by its `update`: its scalers, its logger and its progress bar, which
`fit` adds, cost nothing here. The last line printed is JSON: steps, and the seconds that they took; a first part is not timed.
"""

import argparse
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path

import h5py
import numpy as np

LAYERS = 3  # two hidden ones, and the output
NO_IQL = "d3rlpy has no IQL for discrete actions"


def standardise(observations: np.ndarray, config: dict) -> np.ndarray:
    """(n, D) float32 observations as the networks see them."""
    mean, scale = (np.float32(config[name]) for name in ("observation_mean", "observation_scale"))
    return ((observations - mean) * scale).clip(-10.0, 10.0)


def forward(policy: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """(n, out) mean of the outputs of C networks of ReLU layers on x (n, in).

    policy: weight0 (C, in, hidden), bias0 (C, 1, hidden), ... of every layer, float32, as `networks` makes it.
    """
    for layer in range(LAYERS):
        x = x @ policy[f"weight{layer}"] + policy[f"bias{layer}"]
        if layer < LAYERS - 1:
            x = np.maximum(x, 0.0)
    return x.mean(axis=0)


def networks(modules) -> dict[str, np.ndarray]:
    """The first `LAYERS` linear layers of torch modules of one shape, as `forward` reads them: what follows them in a Gaussian
    policy is its standard deviation."""
    import torch

    policy = {}
    linear = [[m for m in module.modules() if isinstance(m, torch.nn.Linear)][:LAYERS] for module in modules]
    for layer, copies in enumerate(zip(*linear, strict=True)):
        policy[f"weight{layer}"] = np.stack([m.weight.detach().numpy().T for m in copies])
        policy[f"bias{layer}"] = np.stack([m.bias.detach().numpy()[None] for m in copies])
    return policy


def read(path: str, config: dict) -> dict[str, np.ndarray]:
    """Arguments of MDPDataset: the rows of the episodes config["episodes"] (first row and end of each), scaled.

    A last row that is not terminal is a timeout; d3rlpy leaves that transition out, as it asks for the next row.
    """
    rows = np.concatenate([np.arange(first, stop) for first, stop in config["episodes"]])
    ends = np.cumsum([stop - first for first, stop in config["episodes"]]) - 1
    with h5py.File(path, "r") as file:
        data = {key: file[key][:][rows] for key in ("observations", "actions", "rewards", "terminals")}
    data["observations"] = standardise(data["observations"].astype(np.float32), config)
    data["rewards"] = data["rewards"].astype(np.float32) * np.float32(config["reward_scale"])
    data["terminals"] = data["terminals"].astype(np.float32)
    data["timeouts"] = np.zeros_like(data["terminals"])
    data["timeouts"][ends] = 1.0 - data["terminals"][ends]
    if not config["discrete"]:
        low, high = np.float32(config["action_low"]), np.float32(config["action_high"])
        data["actions"] = ((2.0 * data["actions"].astype(np.float32) - high - low) / (high - low)).clip(-1.0, 1.0)
    return data


def build(config: dict):
    """d3rlpy's algorithm with the script's settings in place of its defaults; where the two differ, a comment says so."""
    from d3rlpy import algos
    from d3rlpy.models import VectorEncoderFactory
    from d3rlpy.optimizers import AdamFactory, CosineAnnealingLRFactory

    def adam(falls=False):
        schedule = CosineAnnealingLRFactory(T_max=config["gradient_steps"]) if falls else None
        return AdamFactory(clip_grad_norm=config["max_grad_norm"], lr_scheduler_factory=schedule)

    encoder = VectorEncoderFactory([config["hidden"]] * (LAYERS - 1))
    rate, batch = config["learning_rate"], {"batch_size": config["batch_size"]}
    if config["algorithm"] == "bc":
        own = {"learning_rate": rate, "optim_factory": adam(falls=True), "encoder_factory": encoder}
        if config["discrete"]:
            return algos.DiscreteBCConfig(beta=0.0, **own, **batch)  # by default it shrinks the logits
        # the least squares of a policy without noise: the script learns one standard deviation per action too
        return algos.BCConfig(policy_type="deterministic", **own, **batch)
    shared = {"gamma": config["gamma"], "n_critics": 2, **batch}
    if config["algorithm"] == "cql" and config["discrete"]:
        # targets are copied at intervals of as many steps as the script's need to move; errors above 1 count linearly (Huber);
        # no masks in training. Error and penalty are both half of the script's, which Adam does not see
        return algos.DiscreteCQLConfig(
            learning_rate=rate, optim_factory=adam(), encoder_factory=encoder, alpha=config["alpha"],
            target_update_interval=round(1.0 / config["tau"]), **shared,
        )  # fmt: skip
    actor_rate = config.get("actor_learning_rate", rate)
    shared |= {
        "actor_learning_rate": actor_rate, "critic_learning_rate": rate, "tau": config["tau"], "critic_optim_factory": adam(),
        "actor_encoder_factory": encoder, "critic_encoder_factory": encoder,
    }  # fmt: skip
    if config["algorithm"] == "iql":
        return algos.IQLConfig(
            actor_optim_factory=adam(falls=True), value_encoder_factory=encoder, expectile=config["expectile"],
            weight_temp=config["beta"], max_weight=100.0, **shared,
        )  # fmt: skip
    # alpha_learning_rate 0: no Lagrange multiplier, the penalty's weight is `alpha`. The target values the policy's mean, where
    # the script draws an action; the actor follows the critics from the first step
    return algos.CQLConfig(
        actor_optim_factory=adam(), temp_learning_rate=actor_rate, initial_temperature=math.exp(-2.0),
        alpha_learning_rate=0.0, initial_alpha=1.0, conservative_weight=config["alpha"], n_action_samples=config["samples"],
        soft_q_backup=False, max_q_backup=False, **shared,
    )  # fmt: skip


def greedy(algo, config: dict, observations: np.ndarray) -> dict[str, np.ndarray]:
    """The networks of the greedy policy; RuntimeError unless they act as d3rlpy does on scaled observations (n, D)."""
    modules = algo.impl.modules
    if config["algorithm"] == "bc":
        found = [modules.imitator]
    else:
        found = list(modules.q_funcs) if config["discrete"] else [modules.policy]
    policy = networks(found)
    out, chosen = forward(policy, observations), algo.predict(observations)
    if config["discrete"]:
        worst = float((out.max(axis=1) - np.take_along_axis(out, chosen[:, None], axis=1)[:, 0]).max())
    else:
        worst = float(np.abs(np.tanh(out) - chosen).max())
    if worst > 1e-3:
        raise RuntimeError(f"the policy as saved differs from d3rlpy's by {worst:.3g}; expected at most 0.001")
    return policy


def train(config: dict, data: dict[str, np.ndarray]):
    """The trained algorithm, the steps that were timed, and their seconds."""
    import d3rlpy
    import torch

    torch.set_num_threads(config["num_threads"])
    d3rlpy.seed(config["seed"])
    kind = d3rlpy.ActionSpace.DISCRETE if config["discrete"] else d3rlpy.ActionSpace.CONTINUOUS
    dataset = d3rlpy.dataset.MDPDataset(**data, action_space=kind, action_size=config["num_actions"])
    algo = build(config).create(device="cpu")
    algo.build_with_dataset(dataset)
    start = None
    for step in range(config["gradient_steps"]):
        if step == config["warm_up"]:
            start = time.perf_counter()
        algo.update(dataset.sample_transition_batch(config["batch_size"]))
    return algo, config["gradient_steps"] - config["warm_up"], time.perf_counter() - start


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="HDF5 file with D4RL's keys")
    parser.add_argument("--config", required=True, type=Path, help="JSON file that benchmark/offline_peers.py wrote")
    parser.add_argument("--policy", required=True, help="where the greedy policy goes (.npz: arrays alone, see `forward`)")
    args = parser.parse_args(arguments)
    config = json.loads(args.config.read_text())
    if config["algorithm"] == "iql" and config["discrete"]:
        sys.exit(NO_IQL)
    data = read(args.dataset, config)
    algo, steps, seconds = train(config, data)
    np.savez(args.policy, **greedy(algo, config, data["observations"][:1024]))
    versions = {name: importlib.metadata.version(name) for name in ("d3rlpy", "torch", "numpy")}
    print(json.dumps({"steps": steps, "seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
