"""algos/ppo_transformer_trading.py: its encoder, what it reads of an observation, and what it reports of every symbol."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_python
from scripts import SCRIPTS, Run, candles, finish, prices, with_gpu

from envs import ledger, trades, trading_references
from envs.costs import RUIN
from envs.trading import ADD, BUY_LARGE, HOLD, ORDERS, SELL_ALL
from envs.trading_tables import TradingConfig, TradingData

pytest_plugins = ["scripts"]

WINDOW, BARS, SIZE, ACTIONS = slice(3, 23), 5, 30, 7  # of a small agent: 4 features a bar, 10 numbers around the window


@pytest.fixture
def script():
    return SCRIPTS["ppo_transformer_trading"]


@pytest.fixture
def make_agent(script):
    def call(layers=2, width=8, heads=2):
        torch.manual_seed(0)
        agent = script.module.Agent(SIZE, ACTIONS, WINDOW, BARS, layers, width, heads)
        agent.norm.update(torch.randn(500, SIZE) * 3 + 1)
        return agent

    return call


# --- the encoder


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_encoder_is_pytorchs(script, layers):
    """The last bar of nn.TransformerEncoder with the same weights, in values and in gradients."""
    torch.manual_seed(0)
    width, heads = 8, 2
    agent = script.module.Agent(SIZE, ACTIONS, WINDOW, BARS, layers, width, heads)
    layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, layers, norm=torch.nn.LayerNorm(width), enable_nested_tensor=False)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms and biases too
        for own, theirs in zip(agent.layers, encoder.layers):
            theirs.self_attn.in_proj_weight.copy_(torch.cat([own.query.weight, own.key_value.weight]))
            theirs.self_attn.in_proj_bias.copy_(torch.cat([own.query.bias, own.key_value.bias]))
            pairs = [
                (theirs.self_attn.out_proj, own.output), (theirs.linear1, own.feedforward[0]),
                (theirs.linear2, own.feedforward[2]), (theirs.norm1, own.attention_norm), (theirs.norm2, own.feedforward_norm),
            ]  # fmt: skip
            for to, of in pairs:
                to.load_state_dict(of.state_dict())
        encoder.norm.load_state_dict(agent.encoded_norm.state_dict())
    x = torch.randn(6, SIZE)
    found = agent.encode(x)[:, :width]
    tokens = agent.embed(x[:, WINDOW].reshape(6, BARS, -1)) + agent.positions
    expected = encoder(tokens)[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(6, width)
    for p in (agent.embed.weight, agent.positions, agent.embed.bias):
        own, theirs = (torch.autograd.grad((y * weight).sum(), p, retain_graph=True)[0] for y in (found, expected))
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def test_permuting_symbols_permutes_outputs(make_agent):
    """Rows do not look at each other: another order, or other rows beside them, change nothing but rounding."""
    agent = make_agent()
    obs, mask = torch.randn(64, SIZE), torch.rand(64, ACTIONS) < 0.7
    mask[:, HOLD] = True
    order = torch.randperm(64)

    def outputs(rows):
        features = agent.encode(agent.norm(obs[rows]))
        return agent.log_probs(features, mask[rows]), agent.value(features), agent.act_greedily(obs[rows], mask[rows])

    with torch.no_grad():
        straight, permuted, alone = outputs(torch.arange(64)), outputs(order), outputs(order[:3])
    for a, b, c in zip(straight, permuted, alone):
        torch.testing.assert_close(b, a[order])
        torch.testing.assert_close(c, a[order[:3]])


def test_the_order_of_bars_matters_and_every_bar_is_seen(make_agent):
    agent = make_agent(layers=1)
    x = torch.randn(1, SIZE)
    bars = x[:, WINDOW].reshape(BARS, -1)
    with torch.no_grad():
        encoded = agent.encode(x)
        for k in range(BARS):
            other = x.clone()
            other[:, WINDOW] = bars.index_fill(0, torch.tensor([k]), 3.0).flatten()
            assert (agent.encode(other) - encoded)[:, :8].abs().max() > 1e-3, k
        swapped = x.clone()
        swapped[:, WINDOW] = bars[[1, 0, *range(2, BARS)]].flatten()
        assert (agent.encode(swapped) - encoded)[:, :8].abs().max() > 1e-6


def test_what_is_around_the_window_passes_by_the_encoder(make_agent):
    agent = make_agent()
    x = torch.randn(4, SIZE)
    with torch.no_grad():
        features = agent.encode(x)
        assert features.shape == (4, 8 + 10)
        assert torch.equal(features[:, 8:], torch.cat([x[:, :3], x[:, 23:]], dim=1))
        for at in (0, 2, 23, 29):
            other = x.clone()
            other[:, at] = 99.0
            assert torch.equal(agent.encode(other)[:, :8], features[:, :8])
            assert not torch.equal(
                agent.log_probs(agent.encode(other), torch.ones(4, 7) > 0), agent.log_probs(features, torch.ones(4, 7) > 0)
            )


def test_initial_weights(script):
    """Xavier in the encoder, also of what is concatenated; orthogonal heads, the actor's last layer small."""
    torch.manual_seed(0)
    width = 64
    agent = script.module.Agent(SIZE, ACTIONS, WINDOW, BARS, 2, width, 4)
    for layer in agent.layers:
        key, value = layer.key_value.weight.chunk(2)
        weights = {weight: 2 * width for weight in (layer.query.weight, key, value, layer.output.weight)}
        weights |= {layer.feedforward[0].weight: 5 * width, layer.feedforward[2].weight: 5 * width}
        for weight, fans in weights.items():
            bound = (6 / fans) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound
            assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert agent.embed.weight.abs().max() <= (6 / (4 + width)) ** 0.5
    for head, scale in ((agent.actor[-1], 0.01), (agent.critic[-1], 1.0), (agent.actor[2], 2**0.5)):
        gram = head.weight @ head.weight.T
        torch.testing.assert_close(gram, scale**2 * torch.eye(len(gram)), atol=1e-4 * scale**2, rtol=1e-4)
    assert all((p == 0).all() for name, p in agent.named_parameters() if name.endswith("bias"))


@with_gpu
@pytest.mark.parametrize("precision", ([], ["--amp"]))
def test_more_windows_at_once_than_a_grid_of_blocks_has(script, tmp_path, precision):
    """65,535: in the rollout, and in a minibatch with its gradients."""
    options = [option for option in script.short if option != "--no-cuda"] + precision
    large = ["--num-envs", "65538", "--num-steps", "2", "--num-minibatches", "1", "--total-timesteps", "131076"]
    run = finish(script, *options, *large, "--width", "32", runs_dir=tmp_path)
    assert run.json["status"] == "finished" and run.json["env_steps"] == 131076


# --- a run


def test_the_blocks_of_an_observation_are_the_markets(script, inside):
    """The network takes the window for its tokens, in the shape that the market says it has."""
    g = inside(*script.short, "--window", "3", "--total-timesteps", "1024")
    data, agent = g["data"], g["agent"]
    assert (agent.window, agent.bars) == (data.layout["window"], 3)
    assert agent.embed.in_features == len(data.features) and agent.positions.shape == (3, g["args"].width)
    around = sum(s.stop - s.start for name, s in data.layout.items() if name != "window")
    assert agent.actor[0].in_features == agent.critic[0].in_features == g["args"].width + around
    last = g["obs"][4][:, data.layout["window"]].reshape(64, 3, -1)[:, -1].numpy()  # the newest bar comes last
    state = g["train_envs"].unwrapped
    assert g["run"]["parameters"] == sum(p.numel() for p in agent.parameters())
    assert any((data.windowed[0] == row).all(axis=1).any() for row in last) and state.num_envs == 64


def test_reports_parameters_and_latency(script, base):
    model = base.model["model"]
    counted = sum(v.numel() for name, v in model.items() if not name.startswith("norm."))
    assert base.json["parameters"] == counted and f"{counted} parameters" in base.done.stdout
    spent = base.json["latency_ms"]
    assert set(spent) == {"batch", "p50", "p95"} and spent["batch"] == 32 and 0 < spent["p50"] <= spent["p95"]
    assert f"{spent['p50']:.2f} ms" in base.done.stdout


def test_the_book_and_the_symbols(script, base):
    """ledger.parquet is the book of symbols.parquet, whose validation rows make the table; val_growth is the best model's."""
    symbols, book = pd.read_parquet(base.folder / "symbols.parquet"), base.ledger
    for split, part in symbols.groupby("split", sort=False):
        expected = ledger.book(part.reset_index(drop=True))
        found = book[book["split"] == split].reset_index(drop=True)
        pd.testing.assert_frame_equal(found.drop(columns="action"), expected.drop(columns="action"), check_exact=True)
    assert set(symbols["action"]) <= set(range(len(ORDERS))) and symbols["free"].dtype == bool
    val = symbols[symbols["split"] == "val"]
    table = trades.by_symbol(val, base.json["panel"]["bars_per_year"])
    assert list(base.json["symbols"]) == list(table) == base.json["panel"]["symbols"]
    for name, row in table.items():
        told = {key: np.nan if value is None else value for key, value in base.json["symbols"][name].items()}
        finite = {key: value if np.isfinite(value) else np.nan for key, value in row.items()}
        assert told == pytest.approx(finite, rel=1e-12, nan_ok=True), name
        assert re.search(rf"^{name} .* {row['trades']} ", base.done.stdout, re.MULTILINE)
    assert base.json["alarm"] == script.module.degenerate(val)
    assert base.json["scores"]["val"]["agent"]["growth"] == pytest.approx(base.json["val_growth"], rel=1e-9)


def test_the_share_of_the_optimum_is_of_single_accounts(base, inside, tmp_path):
    g = inside("--resume", str(shutil.copytree(base.folder, tmp_path / "copy")))
    growths = [ledger.growth(frame).mean() for frame in (g["frames"]["test"], g["others"]["optimal band"])]
    assert base.json["optimum_share"] == pytest.approx(growths[0] / growths[1], rel=1e-12) and growths[1] > 0
    assert f"optimal band's growth: {base.json['optimum_share']:.3f}" in base.done.stdout


def test_free_decisions_are_those_with_a_choice(script, inside):
    """HOLD alone is allowed while the breaker forbids to buy: those bars are flat, and their orders no choice."""
    g = inside(*script.short, "--max-drawdown", "0.0005", "--breaker-bars", "7", "--total-timesteps", "1024")
    own, order, found = [], g["make_policy"]([]), pd.read_parquet(g["run_dir"] / "symbols.parquet").query("split == 'test'")

    def policy(observation, mask, rows):
        own.append(mask[:, 1:].any(axis=1))
        return order(observation, mask, rows)

    frame = trading_references.run(g["data"], g["splits"]["test"], policy)
    bars = frame.groupby("market").size()
    expected = np.concatenate([column[:n] for column, n in zip(np.transpose(own), bars)])
    np.testing.assert_array_equal(found["free"], expected)
    assert 0.05 < (~expected).mean() < 0.95
    assert (found["action"][~found["free"]] == HOLD).all() and (found["gross_exposure"][~found["free"]] == 0).all()


def test_a_ruined_account_has_no_choice(script, inside, monkeypatch):
    """It stays in the ledger, where HOLD stands for what it can no longer order; that is no policy that has given up."""
    g = inside(*script.short, "--total-timesteps", "1024")
    start, stop = g["splits"]["val"].ranges[0]
    fields = {name: values.copy() for name, values in g["panel"].fields.items()}
    for values in fields.values():
        values[start + 150 : stop] *= 0.01
    with torch.no_grad():
        g["agent"].actor[4].weight.zero_()
        g["agent"].actor[4].bias.copy_(9.0 * (torch.arange(len(ORDERS)) == BUY_LARGE))
    crashed = TradingData(replace(g["panel"], **fields), g["data"].config)
    monkeypatch.setitem(g["make_policy"].__globals__, "data", crashed)
    frame = g["backtest"]("val")[0]
    over = (frame["equity"] <= RUIN) & (frame["equity"].shift() <= RUIN)
    assert over.sum() > 300 and not frame["free"][over].any() and frame["free"][~over].all()


def planted(g, choose, free=None):
    """A policy that orders what `choose` says where the mask lets it."""

    def policy(observation, mask, _):
        if free is not None:
            free.append(mask.sum(axis=1) > 1)
        order = choose(mask)
        return np.where(mask[:, order], order, HOLD)

    return policy


@pytest.mark.parametrize(
    "orders, alarm",
    [
        ([HOLD], "nothing was ever bought"),
        ([BUY_LARGE], "hold is 99.7% of all orders where there was a choice"),
        ([BUY_LARGE, SELL_ALL, HOLD], None),
        ([BUY_LARGE, ADD, HOLD, HOLD], "hold is"),
    ],
)
def test_the_alarm_of_planted_policies(script, inside, orders, alarm):
    g = inside(*script.short, "--total-timesteps", "1024", "--max-adds", "1")
    step = iter(range(10**6))
    free = []
    policy = planted(g, lambda mask: orders[next(step) % len(orders)], free)
    frame = trading_references.run(g["data"], g["splits"]["val"], policy)
    frame["free"] = np.concatenate([c[:n] for c, n in zip(np.transpose(free), frame.groupby("market").size())])
    found = script.module.degenerate(frame)
    assert found is None if alarm is None else alarm in found


def test_orders_without_a_choice_do_not_count(script):
    frame = pd.DataFrame({"action": [HOLD] * 995 + [BUY_LARGE, SELL_ALL] * 3, "turnover": 1.0, "free": True})
    assert "hold is 99.4%" in script.module.degenerate(frame)
    frame.loc[:900, "free"] = False
    assert script.module.degenerate(frame) is None
    assert script.module.degenerate(frame.assign(free=False)) is None


def test_an_agent_that_only_holds_is_reported(script, base, inside, tmp_path, capsys):
    """Zero weights order the first that is allowed: to hold. It is no error, and it is said everywhere."""
    folder, model = shutil.copytree(base.folder, tmp_path / "copy"), base.model
    best = {key: torch.zeros_like(value) for key, value in model["best_model"].items()}
    torch.save(model | {"best_model": best, "best_score": 1e9}, folder / "model.pt")
    inside("--resume", str(folder))
    assert Run(folder).json["alarm"] == "nothing was ever bought" and Run(folder).json["status"] == "finished"
    assert "ALARM, validation split: nothing was ever bought" in capsys.readouterr().out


# --- markets from files


def test_many_symbols_some_of_them_listed_late(script, inside, tmp_path):
    bars = candles()
    late = (bars["symbol"] == "C4") & (bars["timestamp"] < bars["timestamp"].unique()[170])
    bars[~late].to_csv(tmp_path / "bars.csv", index=False)
    run = Run(inside(*script.short, "--market", str(tmp_path / "bars.csv"), "--total-timesteps", "4096")["run_dir"])
    assert run.json["market"]["fill"] == "next_open" and "optimum_share" not in run.json
    traded = [name for name in run.json["panel"]["symbols"] if name != "C4"]  # without warm-up before the test
    assert list(run.json["symbols"]) == traded and list(run.json["scores"]["test"]) == ["agent", "flat", "buy and hold"]
    frame = pd.read_parquet(run.folder / "symbols.parquet")
    assert len(run.ledger[run.ledger["split"] == "test"]) == frame[frame["split"] == "test"]["timestamp"].nunique()


def test_chosen_symbols_and_closes_alone(script, inside, tmp_path):
    prices().to_csv(tmp_path / "closes.csv")
    options = ["--market", str(tmp_path / "closes.csv"), "--symbols", "C1", "C3", "--stop-loss", "0.03"]
    run = Run(inside(*script.short, *options, "--total-timesteps", "4096")["run_dir"])
    assert run.json["panel"]["symbols"] == list(run.json["symbols"]) == ["C1", "C3"]
    assert run.json["args"]["symbols"] == ["C1", "C3"] and run.json["market"]["fill"] == "next_close"


def test_a_split_without_a_symbol_is_said_before_the_training(script, complaint, tmp_path):
    wide = prices()
    wide.iloc[130:, 4] = np.nan  # before validation begins
    wide.to_csv(tmp_path / "closes.csv")
    line = complaint(*script.short, "--market", str(tmp_path / "closes.csv"), "--shard", "4/6")
    assert "split 'val': no symbol to trade has a bar" in line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--width", "30", "--heads", "4"], ("--width 30", "--heads 4", "multiple")),
        (["--layers", "0"], ("--layers 0", "at least 1")),
        (["--heads", "0"], ("--heads 0", "at least 1")),
        (["--window", "0"], ("window", "0", "at least 1")),
        (["--stop-loss", "2"], ("stop.loss", "2", "below 1")),
        (["--env-id", "CartPole-v1", "--reward-scale", "None"], ("--reward-scale None", "a number")),
        (["--log-dataset", "logs"], ("--log-dataset logs", "--env-id", "Trading-v0")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line


def test_two_runs_are_ranked_beside_each_other(script, base, inside, tmp_path):
    inside(*script.short, "--seed", "2", "--total-timesteps", "4096")
    found = run_python(
        "benchmark/scoreboard.py", str(base.folder), str(tmp_path / "runs"), "--out", str(tmp_path / "board"), "--strict",
        "--resamples", "20", "--reference", script.name,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    page = (tmp_path / "board" / "scoreboard.md").read_text()
    assert page.count("| " + script.name.replace("_", r"\_")) == 2 and "\n2 runs, " in page, page


def test_what_follows_a_cut_episode_is_seen_through_the_same_normaliser(script, inside):
    """With the statistics of the rollouts before: those that a run ends with which is one iteration shorter."""
    options = [*script.short, "--learning-rate", "0", "--episode-length", "9"]
    before, g = (inside(*options, "--total-timesteps", str(1024 * n)) for n in (2, 3))
    with torch.no_grad():
        expected = g["agent"].value(g["agent"].encode(before["agent"].norm(g["final_obs"])))
    torch.testing.assert_close(g["final_values"][g["at_step"], g["at_env"]], expected)
    assert len(expected) > 50 and (before["agent"].norm.mean.abs() > 0.1).any()


def test_rewards_count_in_typical_bars_of_training(script, inside):
    """By default; whatever the market's volatility, and its test split."""
    scales = []
    for vol in ("0.001", "0.01"):
        g = inside(*script.short, "--market", f"{script.market}:vol={vol}", "--total-timesteps", "1024")
        close = g["panel"].close[:800].reshape(2, 400, 3)  # two histories to train on
        returns = np.diff(np.log(close), axis=1, prepend=np.log(close[:, :1]))
        scales.append(g["reward_scale"])
        assert scales[-1] == pytest.approx(1 / returns.std(), rel=1e-9)
    assert scales[0] / scales[1] == pytest.approx(10, rel=0.2)
    assert inside(*script.short, "--total-timesteps", "1024", "--reward-scale", "7")["reward_scale"] == 7


def test_rewards_are_weighted_by_their_flags(script, inside):
    flags = {"pnl": "0.5", "cost": "2", "holding": "3", "sharpe": "4", "drawdown": "5", "sizing": "6", "hold": "7"}
    given = [part for name, value in flags.items() for part in (f"--reward-{name}", value)]
    g = inside(*script.short, *given, "--total-timesteps", "1024")
    assert g["train_envs"].unwrapped.reward_weights == {name: float(value) for name, value in flags.items()}
    assert isinstance(g["data"], TradingData) and isinstance(g["args"].trading, TradingConfig)
