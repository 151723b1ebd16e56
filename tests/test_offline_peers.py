"""benchmark/offline_peers.py and d3rlpy_peer.py without d3rlpy: with stand-ins for the peer and for the package."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import d3rlpy_peer
import h5py
import numpy as np
import offline_peers
import pytest
import torch
from conftest import assert_same_bits

from envs import ledger
from envs.dataset import PROVENANCE, Dataset
from envs.dataset_writer import DatasetWriter, log_episodes
from envs.leadlag_tables import LeadLagConfig
from envs.portfolio_tables import PortfolioConfig
from envs.task import Task, describe_task, provenance

MARKETS = {
    "LeadLag-v0": ("synthetic:leadlag:bars=300:train=2:val=1:test=2", LeadLagConfig(max_lookback=60, num_lookbacks=5)),
    "Portfolio-v0": ("synthetic:noise:assets=3:bars=300:train=2:val=1:test=2", PortfolioConfig()),
}
HIDDEN = 6
STAND_IN = """
import argparse, json, sys
import numpy as np
parser = argparse.ArgumentParser()
for flag in ("--dataset", "--config", "--policy"):
    parser.add_argument(flag, required=True)
args = parser.parse_args()
config = json.load(open(args.config))
widths = (len(config["observation_mean"]), config["hidden"], config["hidden"], config["num_actions"])
rng, arrays = np.random.default_rng(0), {{}}
for i, (a, b) in enumerate(zip(widths, widths[1:])):
    arrays[f"weight{{i}}"] = rng.standard_normal((1, a, b)).astype(np.float32)
    arrays[f"bias{{i}}"] = rng.standard_normal((1, 1, b)).astype(np.float32)
np.savez(args.policy, **arrays)
print("a line that is no result")
{last}
"""
GOOD = 'print(json.dumps({"steps": config["gradient_steps"] - config["warm_up"], "seconds": 0.5, "versions": {"d3rlpy": "9"}}))'


def describe(env_id: str) -> dict:
    market, config = MARKETS[env_id]
    args = SimpleNamespace(
        market=market, seed=2, symbols=(), start=None, end=None, resample=None, train_fraction=0.6, val_fraction=0.2, embargo=5,
        folds=0, fold=0,
    )  # fmt: skip
    options = {"reward_weights": {"variance": 4.5}} if env_id == "Portfolio-v0" else {}
    return describe_task(env_id, args, config, episode_length=20, **options)


@pytest.fixture(scope="module", params=MARKETS)
def path(request, tmp_path_factory) -> Path:
    """Data of random allowed actions on a market."""
    described = describe(request.param)
    task, rng = Task(described), np.random.default_rng(0)
    envs = task.make(4, num_threads=1)
    scores = 0.01 * rng.standard_normal((1000, *envs.action_space.shape))

    def act(obs, mask, row, _):
        if mask is None:
            return scores[rng.integers(1000)].astype(np.float32), None
        return np.array([rng.choice(np.flatnonzero(allowed)) for allowed in mask]), None

    path = tmp_path_factory.mktemp("data") / "dataset.hdf5"
    meta = provenance(described, task.panel.sha256, task.describe()["market"]["costs"], None, 0.8, [])
    log_episodes(path, envs, act, 24, meta, 0)
    return path


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Puts a stand-in in the place of d3rlpy_peer.py; called with what the script does last."""

    def place(last: str = GOOD):
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN.format(last=last))
        monkeypatch.setattr(offline_peers, "PEER", script)

    place()
    return place


def arguments(path, tmp_path, **changes) -> offline_peers.Args:
    options = dict(algorithms=("bc",), rounds=1, gradient_steps=4, score_steps=0, out=tmp_path / "out" / "o.json")
    return offline_peers.Args(path, sys.executable, **{**options, **changes})


def hold(task: Task):
    """A policy of ours for `pretend`: always the first lookback, or the same scores."""

    def policy(obs, mask, rows):
        return mask.argmax(axis=1) if mask is not None else np.full((len(obs), 4), 0.5, np.float32)

    return task.run("test", policy)


def pretend(monkeypatch, data: Dataset, task: Task | None):
    """Stands in for our scripts: leaves a run directory as they do, without training; returns the commands' options."""
    size, discrete = data.keys["observations"][1][0], hasattr(data.action_space, "n")
    actions = int(data.action_space.n) if discrete else data.action_space.shape[0]
    seen = []

    def train(args, algorithm, path, runs, steps, *options):
        seen.append(options)
        run_dir = Path(runs) / "run"
        run_dir.mkdir()
        found = {"validation_fraction": 0.1, "seed": args.seed, "hidden": HIDDEN, "gradient_steps": steps, "gamma": None}
        (run_dir / "run.json").write_text(json.dumps({"args": found}))
        model = {"obs_mean": torch.full((size,), 0.1), "obs_scale": torch.full((size,), 3.0)}
        model |= {"low": torch.full((actions,), -0.5), "high": torch.full((actions,), 0.7)}
        torch.save({"model": model}, run_dir / "model.pt")
        ledger.write_ledger(run_dir / "ledger_last.parquet", hold(task))
        return run_dir

    monkeypatch.setattr(offline_peers, "train_ours", train)
    return seen


def torch_network(sizes, seed=0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])


# The policy


@pytest.mark.parametrize("copies", [1, 2])
def test_saved_networks_are_torch_networks(copies, tmp_path):
    found = [torch_network((5, HIDDEN, HIDDEN, 3, 9), seed) for seed in range(copies)]  # a layer after the three
    policy = d3rlpy_peer.networks(found)
    assert policy.keys() == {f"{kind}{i}" for kind in ("weight", "bias") for i in range(3)}
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    expected = np.mean([net[:5](torch.tensor(x)).detach().numpy() for net in found], axis=0)
    assert np.allclose(d3rlpy_peer.forward(policy, x), expected, atol=1e-6) and expected.shape == (40, 3)


def configured(discrete: bool) -> dict:
    return {
        "algorithm": "bc", "discrete": discrete, "hidden": HIDDEN, "num_actions": 3, "observation_mean": [0.5, -1.0, 0.0, 2.0],
        "observation_scale": [2.0, 1.0, 1e6, 0.1], "action_low": [-1.0, 0.0, 2.0], "action_high": [1.0, 0.5, 3.0],
    }  # fmt: skip


@pytest.mark.parametrize("discrete", [True, False])
def test_policy_for_the_backtest(discrete, tmp_path):
    net = torch_network((4, HIDDEN, HIDDEN, 3))
    np.savez(tmp_path / "policy.npz", **d3rlpy_peer.networks([net]))
    policy = offline_peers.load_policy(tmp_path / "policy.npz", configured(discrete))
    rng = np.random.default_rng(1)
    obs = rng.standard_normal((200, 4))
    x = torch.tensor((obs - [0.5, -1.0, 0.0, 2.0]) * [2.0, 1.0, 1e6, 0.1]).clamp(-10, 10).float()
    out = net(x).detach()
    if discrete:
        mask = rng.random((200, 3)) < 0.5
        mask[:, 0] |= ~mask.any(axis=1)
        assert_same_bits(policy(obs, mask, None), torch.where(torch.tensor(mask), out, -np.inf).argmax(1).numpy())
        assert_same_bits(policy(obs, None, None), out.argmax(1).numpy())
    else:
        low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 0.5, 3.0])
        found = policy(obs, None, None)
        assert np.allclose(found, low + (high - low) * (out.tanh().numpy() + 1) / 2, atol=1e-5)
        assert found.dtype == np.float32


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("bias1"), "bias1.*1, 1, 6"),
        (lambda a: a.update(weight2=a["weight2"][:, :, :2]), r"weight2.*\(1, 6, 2\)"),
        (lambda a: a.update(weight0=np.float32(1)), r"weight0': \(\)"),
        (lambda a: a.update(extra=a["bias0"]), "extra"),
        (lambda a: a.update(bias0=np.full_like(a["bias0"], np.nan)), "bias0: expected finite float32"),
        (lambda a: a.update(bias0=a["bias0"].astype(np.float64)), "bias0: expected finite float32"),
        (lambda a: a.update(bias0=np.array([None])), "expected arrays"),
    ],
)
def test_other_arrays_are_refused(change, message, tmp_path):
    arrays = d3rlpy_peer.networks([torch_network((4, HIDDEN, HIDDEN, 3))])
    change(arrays)
    np.savez(tmp_path / "policy.npz", **arrays)
    with pytest.raises(offline_peers.Failure, match=message):
        offline_peers.load_policy(tmp_path / "policy.npz", configured(True))


@pytest.mark.parametrize("content", [b"nothing", b"", b"PK\x03\x04 cut", None], ids=["text", "empty", "cut", "missing"])
def test_a_file_that_is_no_archive_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "policy.npz").write_bytes(content)
    with pytest.raises(offline_peers.Failure, match="policy.npz: .*expected arrays"):
        offline_peers.load_policy(tmp_path / "policy.npz", configured(True))


# The driver


def test_scores_of_both_on_the_same_bars(path, peer, tmp_path, monkeypatch, capsys):
    data = Dataset(path)
    task = Task.of(data)
    options = pretend(monkeypatch, data, task)
    assert offline_peers.main(arguments(path, tmp_path, algorithms=("iql", "cql"), rounds=0, score_steps=3)) == 0
    content = json.loads((tmp_path / "out" / "o.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    text = (tmp_path / "out" / "o.md").read_text()
    discrete = task.env_id == "LeadLag-v0"
    assert (rows["iql"].get("note") == d3rlpy_peer.NO_IQL) == discrete == (d3rlpy_peer.NO_IQL in text)
    assert content["machine"]["peer"] == {"d3rlpy": "9"}

    row, ours = rows["cql"], hold(task)
    rewards = np.concatenate([b["rewards"] for b in data.blocks(data.split_episodes(0.1, 1)[0], ("rewards",))])
    assert options[-1][:2] == ("--eval-every", 3) and np.isclose(options[-1][-1], 1 / rewards.std(dtype=float))
    size, actions = data.keys["observations"][1][0], int(data.action_space.n) if discrete else 4
    config = configured(discrete) | {
        "observation_mean": [0.1] * size, "observation_scale": [3.0] * size, "action_low": [-0.5] * actions,
        "action_high": [0.7] * actions, "num_actions": actions, "gradient_steps": 3, "warm_up": 0,
    }  # fmt: skip
    told, saved = offline_peers.train_theirs(arguments(path, tmp_path), config, str(tmp_path))
    theirs = task.run("test", offline_peers.load_policy(saved, config))
    assert told["sps"] == 6.0
    for name, frame in (("ours", ours), ("d3rlpy", theirs)):
        expected = ledger.summarise(frame, task.panel.bars_per_year)
        assert np.isclose(row[name]["growth"]["mean"], expected["growth"])
        assert np.isclose(row[name]["score"]["mean"], task.score(frame))
        assert np.isclose(row[name]["sharpe"]["mean"], expected["sharpe"])
        for value in row[name].values():
            assert value["low"] < value["mean"] < value["high"]
    mean, low, high, how = ledger.difference(ours, theirs, task.panel.bars_per_year)
    assert np.allclose([row["difference"]["growth"][k] for k in ("mean", "low", "high")], [mean, low, high]) and how
    gap = row["difference"]["score"]
    assert np.isclose(gap["mean"], task.score(ours) - task.score(theirs)) and gap["low"] < gap["mean"] < gap["high"]
    assert row["met"] == offline_peers.not_worse(gap)
    assert f"| cql, difference | {offline_peers.shown('growth', row['difference']['growth'])} |" in text
    assert "cql, d3rlpy" in capsys.readouterr().out


def test_worse_is_what_the_whole_interval_is_below_zero():
    found = [offline_peers.not_worse({"mean": -1.0, "low": -2.0, "high": high}) for high in (-0.1, 0.0, 0.1)]
    assert found == [False, True, True]


def test_configuration_is_what_our_run_used(path, tmp_path, monkeypatch):
    data = Dataset(path)
    task = Task.of(data)
    pretend(monkeypatch, data, task)
    run_dir = offline_peers.train_ours(arguments(path, tmp_path, seed=5), "cql", path, tmp_path, 7)
    config = json.loads(json.dumps(offline_peers.configuration(data, "cql", run_dir, 2.5, 3)))
    train, _ = data.split_episodes(0.1, 5)
    assert config["episodes"] == [[int(data.starts[e]), int(data.starts[e + 1])] for e in train]
    assert config["gamma"] == 0.8 and config["reward_scale"] == 2.5 and config["warm_up"] == 3
    assert config["gradient_steps"] == 7 and config["seed"] == 5 and "beta" not in config
    assert config["discrete"] == (task.env_id == "LeadLag-v0") and config["num_actions"] == (5 if config["discrete"] else 4)
    assert_same_bits(np.float32(config["observation_mean"]), np.full(len(config["observation_mean"]), 0.1, np.float32))
    assert np.float32(config["action_high"])[0] == np.float32(0.7) and config["action_low"][0] == -0.5


def test_one_line_for_what_failed_and_the_rest_goes_on(path, peer, tmp_path, monkeypatch, capsys):
    data = Dataset(path)
    pretend(monkeypatch, data, Task.of(data))
    peer('sys.exit("first\\n\\nModuleNotFoundError: No module named d3rlpy") if config["algorithm"] == "bc" else ' + GOOD)
    assert offline_peers.main(arguments(path, tmp_path, algorithms=("bc", "cql"), rounds=0, score_steps=3)) == 1
    lines = capsys.readouterr().out.splitlines()
    expected = "stand_in.py, bc: exit status 1; its log ends: a line that is no result | first | ModuleNotFoundError"
    assert sum(expected in line for line in lines) == 1
    rows = json.loads((tmp_path / "out" / "o.json").read_text())["rows"]
    assert rows[0]["note"].startswith(expected) and "met" in rows[1]
    assert expected.replace("|", "\\|") in (tmp_path / "out" / "o.md").read_text()


@pytest.mark.parametrize(
    "last, message",
    [
        ("", "a line that is no result: expected JSON with steps"),
        ('print("[]")', r"\[\]: expected JSON"),
        ('print(json.dumps({"steps": 3, "seconds": 0}))', "expected JSON with steps and seconds"),
        ('print(json.dumps({"steps": 3}))', "expected JSON with steps and seconds"),
    ],
)
def test_a_peer_that_tells_nothing(last, message, peer, tmp_path):
    peer(last)
    with pytest.raises(offline_peers.Failure, match=message):
        offline_peers.train_theirs(arguments(tmp_path / "d.hdf5", tmp_path), configured(True), str(tmp_path))


def test_a_missing_python_is_named(tmp_path):
    with pytest.raises(offline_peers.Failure, match="bc: .*no-such-python.*expected a Python"):
        offline_peers.call(["no-such-python", "x"], "bc")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"algorithms": ("bc", "sac")}, "--algorithms sac: expected some of bc iql cql"),
        ({"rounds": -1}, "--rounds -1: expected at least 0"),
        ({"gradient_steps": 1}, "--gradient-steps 1: expected at least 2"),
        ({"score_steps": -1}, "--score-steps -1"),
        ({"num_threads": 0}, "--num-threads 0: expected at least 1"),
        ({"out": Path("x.md")}, "--out x.md: expected a name that ends in .json"),
    ],
)
def test_bad_flags_are_named(change, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        arguments(tmp_path / "d.hdf5", tmp_path, **change)


def write_nameless(folder: Path) -> Path:
    """Continuous data of no market, two of whose episodes end by a terminal state."""
    import gymnasium as gym

    rng, path = np.random.default_rng(3), folder / "plain.hdf5"
    meta = dict.fromkeys(PROVENANCE) | {"env_id": "Nowhere-v0", "gamma": 0.9}
    with DatasetWriter(path, 4, gym.spaces.Box(-1, 1, (2,), np.float32), meta, 2) as writer:
        obs = rng.standard_normal((2, 4)).astype(np.float32)
        for t in range(60):
            action, after = rng.uniform(-1, 1, (2, 2)).astype(np.float32), rng.standard_normal((2, 4)).astype(np.float32)
            done = np.full(2, t % 6 == 5)
            terminated = done & (t == 29)
            writer.add(obs, action, rng.standard_normal(2), terminated, done & ~terminated, after)
            obs = np.where(done[:, None], rng.standard_normal((2, 4)), after).astype(np.float32)
    return path


def test_data_that_cannot_be_scored(tmp_path):
    with pytest.raises(SystemExit, match="names no market.*--score-steps 0"):
        offline_peers.main(arguments(write_nameless(tmp_path), tmp_path, score_steps=1))
    with pytest.raises(SystemExit, match="DatasetError: .*none.hdf5: expected an HDF5 file"):
        offline_peers.main(arguments(tmp_path / "none.hdf5", tmp_path))


def test_links_for_speed_name_no_market(path, tmp_path):
    link = offline_peers.nameless(path, tmp_path)
    data = Dataset(link)
    assert Task.of(data) is None and data.meta["env_id"] == "not named" and data.meta["gamma"] == 0.8
    assert link.is_symlink() and Task.of(Dataset(path)) is not None


def test_speed_of_a_real_script_beside_the_stand_in(peer, tmp_path, monkeypatch):
    """cql_portfolio.py as it is; the stand-in notes what it was told."""
    peer(f'json.dump(config, open(r"{tmp_path}/told.json", "w")); ' + GOOD)
    path = write_nameless(tmp_path)
    assert offline_peers.main(arguments(path, tmp_path, algorithms=("cql",), gradient_steps=6)) == 0
    content = json.loads((tmp_path / "out" / "o.json").read_text())
    ours, theirs = content["rows"]
    assert theirs["samples"] == [6.0] and ours["samples"][0] > 0
    assert np.isclose(theirs["ratio"], ours["value"] / 6.0) and theirs["met"] == (theirs["ratio"] >= 3)
    config, data = json.loads((tmp_path / "told.json").read_text()), Dataset(path)
    assert config["gradient_steps"] == 6 and config["warm_up"] == 3 and config["hidden"] == 64 and config["samples"] == 10
    assert_same_bits(np.float32(config["observation_mean"]), np.float32(data.meta["observation_mean"]))
    assert "| cql, ours | " in (tmp_path / "out" / "o.md").read_text()


def test_the_same_steps_from_first_to_last(tmp_path, monkeypatch):
    """The speed of cql_portfolio.py is not that of its imitation; each script is told what it knows of."""
    seen = []
    monkeypatch.setattr(
        offline_peers, "train_ours", lambda args, name, path, runs, steps, *options: seen.append(options) or 1 / 0
    )
    args = arguments(write_nameless(tmp_path), tmp_path)
    for name in offline_peers.SCRIPTS:
        with pytest.raises(ZeroDivisionError):
            offline_peers.measure_speed(args, Dataset(args.dataset), name, {})
    told = dict(zip(offline_peers.SCRIPTS, ([o for o in options if isinstance(o, str)] for options in seen)))
    scaled = ["--validation-fraction", "--reward-scale", "--eval-every"]
    assert told == {"bc": ["--eval-every"], "iql": scaled, "cql": [*scaled, "--bc-steps"]} and seen[2][-1] == 0


def test_steady_speed_leaves_out_the_first_steps(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("charts/SPS", 2.0, 10)  # 5 seconds for the first 10 steps
        writer.add_scalar("charts/SPS", 4.0, 30)
    (tmp_path / "run.json").write_text(json.dumps({"args": {"gradient_steps": 30}, "train_seconds": 7.5}))
    assert np.isclose(offline_peers.steady_speed(tmp_path, 10), 20 / 2.5)


# The peer


def test_data_as_d3rlpy_gets_them(tmp_path):
    path = write_nameless(tmp_path)
    starts = Dataset(path).starts
    config = {
        "episodes": [[int(starts[e]), int(starts[e + 1])] for e in (1, 8, 9)], "discrete": False, "reward_scale": 4.0,
        "observation_mean": [0.5] * 4, "observation_scale": [8.0] * 4, "action_low": [-1.0, -0.5], "action_high": [1.0, 0.5],
    }  # fmt: skip
    rows = np.concatenate([np.arange(a, b) for a, b in config["episodes"]])
    with h5py.File(path) as file:
        raw = {key: file[key][:][rows] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    data = d3rlpy_peer.read(str(path), config)
    assert data.keys() == raw.keys() and raw["terminals"].sum() == 2
    assert np.allclose(data["observations"], np.clip((raw["observations"] - 0.5) * 8, -10, 10), atol=1e-5)
    assert (np.abs(data["observations"]) == 10).any() and (np.abs(data["actions"][:, 1]) == 1).any()
    assert np.allclose(data["actions"], np.clip(raw["actions"] * [1, 2], -1, 1), atol=1e-6)
    assert np.allclose(data["rewards"], 4 * raw["rewards"])
    for key in ("terminals", "timeouts"):
        assert_same_bits(data[key], raw[key], key)


class Recorder(SimpleNamespace):
    """Stands in for a configuration of d3rlpy: keeps what it was made with."""


def record(name):
    return lambda *args, **options: Recorder(kind=name, args=args, **options)


@pytest.fixture
def package(monkeypatch):
    """d3rlpy's names that d3rlpy_peer.py uses."""
    parts = {
        "d3rlpy": (), "d3rlpy.algos": ("DiscreteBCConfig", "BCConfig", "IQLConfig", "CQLConfig", "DiscreteCQLConfig"),
        "d3rlpy.models": ("VectorEncoderFactory",), "d3rlpy.optimizers": ("AdamFactory", "CosineAnnealingLRFactory"),
    }  # fmt: skip
    for name, attributes in parts.items():
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, record(attribute))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["d3rlpy"].algos = sys.modules["d3rlpy.algos"]


SETTINGS = {
    "hidden": 48, "batch_size": 96, "learning_rate": 2e-3, "actor_learning_rate": 5e-4, "gamma": 0.7, "expectile": 0.6,
    "beta": 2.0, "tau": 0.01, "alpha": 1.5, "samples": 7, "max_grad_norm": 9.0, "gradient_steps": 500,
}  # fmt: skip


@pytest.mark.parametrize(
    "algorithm, discrete, kind, expected, falls",
    [
        ("bc", True, "DiscreteBCConfig", {"beta": 0.0, "learning_rate": 2e-3}, "optim_factory"),
        ("bc", False, "BCConfig", {"policy_type": "deterministic", "learning_rate": 2e-3}, "optim_factory"),
        (
            "iql", False, "IQLConfig",
            {
                "actor_learning_rate": 5e-4, "critic_learning_rate": 2e-3, "gamma": 0.7, "tau": 0.01, "expectile": 0.6,
                "weight_temp": 2.0, "max_weight": 100.0, "n_critics": 2,
            },
            "actor_optim_factory",
        ),
        (
            "cql", False, "CQLConfig",
            {
                "actor_learning_rate": 5e-4, "critic_learning_rate": 2e-3, "temp_learning_rate": 5e-4, "gamma": 0.7,
                "tau": 0.01, "alpha_learning_rate": 0.0, "initial_alpha": 1.0, "conservative_weight": 1.5,
                "n_action_samples": 7, "soft_q_backup": False, "max_q_backup": False, "n_critics": 2,
            },
            None,
        ),
        (
            "cql", True, "DiscreteCQLConfig",
            {"learning_rate": 2e-3, "gamma": 0.7, "alpha": 1.5, "target_update_interval": 100, "n_critics": 2}, None,
        ),
    ],
)  # fmt: skip
def test_settings_are_the_scripts(package, algorithm, discrete, kind, expected, falls):
    made = vars(d3rlpy_peer.build(SETTINGS | {"algorithm": algorithm, "discrete": discrete}))
    assert made["kind"] == kind and made["batch_size"] == 96
    assert {name: made[name] for name in expected} == expected
    for name, factory in made.items():
        if name.endswith("encoder_factory"):
            assert factory.args == ([48, 48],)
        if name.endswith("optim_factory"):
            schedule = factory.lr_scheduler_factory
            assert factory.clip_grad_norm == 9.0 and (getattr(schedule, "T_max", None) == 500) == (name == falls)
    wanted = {"bc": 1, "iql": 3, "cql": 1 if discrete else 2}[algorithm]
    assert sum(name.endswith("encoder_factory") for name in made) == wanted


def test_one_rate_for_all_where_a_script_has_one(package):
    settings = {name: value for name, value in SETTINGS.items() if name != "actor_learning_rate"}
    assert d3rlpy_peer.build(settings | {"algorithm": "iql", "discrete": False}).actor_learning_rate == 2e-3


@pytest.mark.parametrize("algorithm, discrete", [("bc", True), ("bc", False), ("iql", False), ("cql", True), ("cql", False)])
@pytest.mark.parametrize("true", [True, False])
def test_a_policy_that_acts_otherwise_is_not_saved(algorithm, discrete, true):
    nets = [torch_network((4, 5, 5, 3), seed) for seed in range(2 if algorithm == "cql" and discrete else 1)]
    name = "imitator" if algorithm == "bc" else "q_funcs" if discrete else "policy"
    modules = SimpleNamespace(**{name: nets if name == "q_funcs" else nets[0]})
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)

    def predict(obs):
        out = torch.stack([net(torch.tensor(obs)) for net in nets]).mean(0).detach() * (1 if true else -1)
        return out.argmax(1).numpy() if discrete else out.tanh().numpy()

    algo, config = SimpleNamespace(impl=SimpleNamespace(modules=modules), predict=predict), {"algorithm": algorithm}
    if true:
        assert len(d3rlpy_peer.greedy(algo, config | {"discrete": discrete}, x)["weight0"]) == len(nets)
    else:
        with pytest.raises(RuntimeError, match="differs from d3rlpy's by"):
            d3rlpy_peer.greedy(algo, config | {"discrete": discrete}, x)


def test_no_discrete_iql(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"algorithm": "iql", "discrete": True}))
    with pytest.raises(SystemExit, match=d3rlpy_peer.NO_IQL):
        d3rlpy_peer.main(["--dataset", "d", "--config", str(tmp_path / "config.json"), "--policy", "p"])
