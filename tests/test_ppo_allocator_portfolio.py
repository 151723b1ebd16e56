"""algos/ppo_allocator_portfolio.py: frozen agents, budgets, a network over a set of symbols, fine-tuning."""

import json
import re
import runpy
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_bits, run_python, tampered
from scripts import (
    SCRIPTS,
    Run,
    actions_of,
    agents_run,
    assert_same_content,
    assert_same_ledger,
    assert_same_run,
    finish,
    prices,
    running,
)
from torch.distributions import Normal

from envs import ledger, portfolio_references
from envs.costs import RUIN
from envs.portfolio import RegimeGuard
from envs.portfolio_tables import PortfolioData
from envs.trading import ORDERS
from envs.trading_tables import TradingData

pytest_plugins = ["scripts"]

SIZE, SYMBOLS, EACH = 31, 4, 5  # of a small agent: 4 symbols of 5 features and 2 weights each, 3 numbers around them
ACTS, TARGET = 4, 3


SCRIPT = SCRIPTS["ppo_allocator_portfolio"]


@pytest.fixture
def script():
    return SCRIPT


@pytest.fixture
def agents(script) -> Run:
    """The agents' run of the short run."""
    return Run(agents_run(script.agents, script.market))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Variables of a short run without fine-tuning."""
    with running(SCRIPT, tmp_path_factory.mktemp("frozen")) as call:
        yield call(*SCRIPT.short, "--finetune-fraction", "0", "--total-timesteps", "5120")


def make_agent(script, symbols=SYMBOLS, acts=ACTS, target=TARGET, seed=0):
    """An agent with large weights, and the slices of its observations: features, 3 numbers, then two weights a symbol."""
    blocks = [slice(0, EACH * symbols), slice(EACH * symbols + 3, (EACH + 1) * symbols + 3)]
    blocks.append(slice(blocks[1].stop, blocks[1].stop + symbols))
    torch.manual_seed(seed)
    agent = script.module.Agent(blocks[2].stop, symbols, 1, blocks, acts, target, 8, -1.0)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return agent


def observations(agent, n=50, absent=()):
    """(n, D), standardised but for `acts` and `target`; symbols in `absent` have neither, and 0 everywhere."""
    symbols, (features, *weights) = agent.num_symbols, agent.own
    x = torch.randn(n, weights[-1].stop)
    own = x[:, features].view(n, symbols, EACH)
    own[:, :, ACTS], own[:, :, TARGET] = 1.0, torch.rand(n, symbols).clamp(0.1)
    for k in absent:
        own[:, k] = 0.0
        for block in weights:
            x[:, block.start + k] = 0.0
    return x


# --- the agents of a run


def test_the_accounts_are_the_agents_own_backtest(base, agents, frozen):
    """Bit for bit what the agents' run reported of every symbol, on all three splits, as long as they are frozen."""
    theirs = pd.read_parquet(agents.folder / "symbols.parquet").drop(columns="free")
    mine = pd.read_parquet(frozen["run_dir"] / "symbols.parquet")
    assert_same_ledger(mine, theirs)
    book = agents.ledger[agents.ledger["split"] == "test"].reset_index(drop=True)
    assert_same_ledger(frozen["compared"]["equal budgets"], book)
    assert frozen["run"]["panel"] == base.json["panel"] == agents.json["panel"]  # comparable on the scoreboard
    assert base.json["market"]["costs"] == agents.json["market"]["costs"] and base.json["agents"]["args"] == agents.json["args"]


def test_what_is_said_of_a_bar(frozen):
    """Probabilities that add up, nothing for orders that are masked; what the account held and what its order asked for."""
    g, names = frozen, frozen["SERIES"]
    said, accounts = g["said"](g["data"]), g["accounts"]["test"]
    times, ranges = pd.Index(g["panel"].timestamps), g["splits"]["test"].ranges
    for (symbol, number), account in accounts.groupby(["symbol", "range"]):
        start, stop = ranges[number]
        first_mark = start + times[start:stop].get_loc(account["timestamp"].iloc[0])
        row, column = first_mark - 1 + np.arange(len(account)), g["panel"].symbols.index(symbol)
        at = {name: said[row, column, k] for k, name in enumerate(names)}
        probability = np.column_stack([at[f"agent_{order}"] for order in ORDERS])
        np.testing.assert_allclose(probability.sum(axis=1), 1.0, atol=1e-6)
        assert (at["agent_acts"] == 1).all() and np.isfinite(at["agent_value"]).all()
        flat = at["agent_weight"] == 0
        assert flat.any() and (probability[flat][:, [4, 5, 6]] == 0).all() and (probability[~flat][:, 1:4] == 0).all()
        chosen = account["action"].to_numpy()
        assert (probability.argmax(axis=1) == chosen).all()
        held, target = at["agent_weight"], at["agent_target"]
        for order, expected in (
            ("hold", held),
            ("buy_small", 0.25),
            ("buy_medium", 0.5),
            ("buy_large", 1.0),
            ("sell_all", 0.0),
        ):
            mine = chosen == ORDERS.index(order)
            np.testing.assert_allclose(target[mine], np.broadcast_to(expected, len(held))[mine], atol=1e-6)
        # just after the fill the account holds what the order asked for, but for the way of the price to the fill
        np.testing.assert_allclose(account["net_exposure"], target, atol=2e-3)
    before = ranges[:, :1] + np.arange(60)  # bars that warm the features up
    assert not said[before].any()


def test_nothing_said_seen_or_earned_depends_on_later_bars(frozen, monkeypatch):
    """Replace every bar after t at random: tables and ledgers up to t stay, to the bit."""
    g, variables = frozen, frozen["run_agents"].__globals__
    test = g["splits"]["test"].ranges

    def outcome(panel):
        data = PortfolioData(
            replace(panel, extras=dict.fromkeys(g["SERIES"], np.zeros(panel.close.shape))), g["args"].portfolio
        )
        monkeypatch.setitem(variables, "data", data)
        monkeypatch.setitem(variables, "trading", TradingData(panel, g["trading"].config))
        monkeypatch.setitem(variables, "env_options", g["env_options"] | {"data": data})
        accounts = g["run_agents"]("test")
        return data.assets, accounts, g["backtest"]("test"), g["backtest"]("test", g["equal_budgets"])

    expected = outcome(g["panel"])
    for t in (test[0, 0] + 90, test[0, 0] + 250):
        found = outcome(tampered(g["panel"], t, np.random.default_rng(t)))
        assert_same_bits(found[0][test[0, 0] : t + 1], expected[0][test[0, 0] : t + 1], f"said up to {t}")
        assert not np.array_equal(found[0][t + 1 : test[0, 1]], expected[0][t + 1 : test[0, 1]])
        for a, b in zip(found[1:], expected[1:]):
            ranges = [frame["range"] if "range" in frame else frame["market"] for frame in (a, b)]
            known = [frame[(r == 0) & (frame["timestamp"] <= g["panel"].timestamps[t])] for frame, r in zip((a, b), ranges)]
            assert len(known[0]) > 20
            assert_same_ledger(*(frame.reset_index(drop=True) for frame in known))


def test_a_symbol_that_is_listed_late_or_gone_gets_nothing(script, inside, tmp_path):
    wide = prices(bars=420)
    wide.iloc[:150, 2] = np.nan
    wide.iloc[300:, 4] = np.nan
    wide.to_csv(tmp_path / "closes.csv")
    theirs = SCRIPTS[script.agents]
    agents = finish(
        theirs, "--market", str(tmp_path / "closes.csv"), *theirs.own, *theirs.budget, "--total-timesteps", "1024",
        runs_dir=tmp_path / "agents",
    )  # fmt: skip
    g = inside("--agents", str(agents.folder), *script.own, *script.budget, "--total-timesteps", "2048")
    said, names = g["said"](g["data"]), g["SERIES"]
    acts = said[:, :, names.index("agent_acts")]
    assert not acts[:210, 2].any() and acts[210:240, 2].all() and not acts[320:, 4].any()
    assert not said[acts == 0].any()
    frame = Run(g["run_dir"]).ledger
    weights, time = actions_of(frame), frame["timestamp"]
    assert not weights[time <= wide.index[210], 2].any() and weights.min() >= 0 and weights.sum(axis=1).max() <= 1 + 1e-9


def test_an_account_that_is_ruined_says_no_more(frozen, monkeypatch):
    """Its agent asks for everything until its symbol loses 99% in a bar. All other accounts go on."""
    g, variables = frozen, frozen["run_agents"].__globals__
    (start, stop), (later, end) = g["splits"]["test"].ranges
    ruin, symbol = start + 150, 1
    fields = {name: values.copy() for name, values in g["panel"].fields.items()}
    for values in fields.values():
        values[ruin:stop, symbol] *= 0.01
    panel = replace(g["panel"], **fields)
    data = PortfolioData(replace(panel, extras=dict.fromkeys(g["SERIES"], np.zeros(panel.close.shape))), g["args"].portfolio)
    monkeypatch.setitem(variables, "data", data)
    monkeypatch.setitem(variables, "trading", TradingData(panel, g["trading"].config))
    monkeypatch.setitem(variables, "env_options", g["env_options"] | {"data": data, "guard": RegimeGuard()})
    given = {name: weight.clone() for name, weight in g["agents"].state_dict().items()}
    bias = torch.tensor([9.0 * (order == "buy_large") + (order == "hold") for order in ORDERS])
    g["agents"].load_state_dict(given | {"actor.4.weight": torch.zeros_like(given["actor.4.weight"]), "actor.4.bias": bias})
    accounts, frame = g["run_agents"]("test"), g["backtest"]("test", g["equal_budgets"])
    g["agents"].load_state_dict(given)

    over = panel.timestamps[ruin]
    account = accounts.query("symbol == 'S01' and range == 0")
    assert (account["equity"] <= RUIN).to_numpy().tolist() == (account["timestamp"] >= over).to_numpy().tolist()
    dead = account[account["timestamp"] > over]
    assert len(dead) > 100 and not dead[["net_return", "turnover", "gross_exposure"]].to_numpy().any()
    said = g["said"](data)
    acts = said[:, :, g["SERIES"].index("agent_acts")]
    assert acts[start + 60 : ruin].all() and acts[ruin : stop - 1, [0, 2]].all() and acts[later + 60 : end - 1].all()
    assert not said[ruin:stop, symbol].any() and dict(Counter(accounts["symbol"])) == dict.fromkeys(panel.symbols, 2 * 339)
    weights, first = actions_of(frame), (frame["market"] == 0).to_numpy()
    after = first & (frame["timestamp"] > over).to_numpy()
    assert not weights[after, symbol].any() and (weights[first & ~after, symbol] > 0.3).all()
    assert (weights[after][:, [0, 2]] > 0.3).all() and (weights[~first] > 0.3).all()


# --- budgets


def test_no_output_is_equal_budgets(frozen):
    g = frozen
    learned = {key: value.clone() for key, value in g["agent"].state_dict().items()}
    g["agent"].load_state_dict(learned | {name: torch.zeros_like(p) for name, p in g["agent"].named_parameters()})
    found, expected = g["backtest"]("test"), g["backtest"]("test", g["equal_budgets"])
    g["agent"].load_state_dict(learned)
    assert_same_ledger(found, expected)
    assert_same_ledger(expected, g["compared"]["equal budgets, rebalanced"])
    # each bar it earns the mean of what the accounts earn, before costs, but for the way of prices to the fill
    alone = g["accounts"]["test"].groupby(["range", "timestamp"])["gross_return"].mean().to_numpy()
    unguarded = g["backtest"]("test", g["equal_budgets"], guard=RegimeGuard())
    together = unguarded["gross_return"].to_numpy()
    assert np.abs(together).max() > 1e-4 and np.abs(together - alone).max() < 1e-5
    target = g["said"](g["data"])[:, :, g["SERIES"].index("agent_target")]
    bars = unguarded.groupby("market").size()
    rows = np.concatenate([np.arange(stop - 1 - bars[k], stop - 1) for k, (_, stop) in enumerate(g["splits"]["test"].ranges)])
    np.testing.assert_allclose(actions_of(unguarded), target[rows] / 3, atol=1e-7)


def test_scores_are_budgets_of_what_the_agents_ask_for(frozen):
    g = frozen
    data, rows = g["data"], np.arange(70, 270)
    target = g["said"](data)[rows, :, g["SERIES"].index("agent_target")].astype(float)
    rng = np.random.default_rng(0)
    for size in (0.5, 3.0):
        actions = rng.normal(0, size, (200, 3))
        scores = g["to_scores"](actions, *g["asked"](data, rows))
        asked = np.exp(actions) * target / 3
        share = np.maximum(1.0, asked.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(scores[:, :3], asked / share, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-6)
        assert (scores >= 0).all()
    assert (share > 1).any() and (share == 1).any()
    space = g["train_envs"].single_action_space
    assert space.shape == (3,) and np.exp(space.high) == pytest.approx([3] * 3) and (space.low == -5).all()


def test_scores_of_tensors_are_those_of_arrays(frozen):
    """As on a GPU; exponentials and sums may be rounded otherwise before they become float32."""
    g, rows = frozen, np.arange(70, 270)
    target, gross = g["asked"](g["data"], rows)
    for size, cap in ((0.5, 1.0), (3.0, 1.0), (3.0, 0.2)):
        actions = np.random.default_rng(1).normal(0, size, (200, 3)).astype(np.float32)
        expected = g["to_scores"](actions, target, cap * gross)
        found = g["to_scores"](*(torch.tensor(array) for array in (actions, target, cap * gross)))
        assert found.dtype == torch.float32 and expected.dtype == np.float32
        np.testing.assert_array_max_ulp(found.numpy(), expected, maxulp=1)


def test_weights_keep_to_the_constraints(script, inside):
    g = inside(
        *script.short, "--finetune-fraction", "0", "--total-timesteps", "2048", "--overnight-gross", "0.2", "--asset-cap", "0.1"
    )
    weights = actions_of(Run(g["run_dir"]).ledger)
    assert weights.max() == pytest.approx(0.1) and weights.sum(axis=1).max() <= 0.2 + 1e-9
    both = (weights > 0).sum(axis=1) == 1
    assert both.any()
    # cut in proportion before the projection, which then has nothing left to do but for the cap of a symbol
    rows = np.arange(70, 170)
    scores = g["to_scores"](np.full((100, 3), 1.0), *g["asked"](g["data"], rows))
    assert scores.sum(axis=1) == pytest.approx(np.full(100, 0.2))


# --- the network over a set


def test_permuting_symbols_permutes_outputs(script):
    agent = make_agent(script)
    x, order = observations(agent), torch.randperm(SYMBOLS)
    y = x.clone()
    for block in agent.own:
        y[:, block] = x[:, block].view(len(x), SYMBOLS, -1)[:, order].flatten(1)
    assert not torch.equal(x, y)
    with torch.no_grad():
        a, b = agent.encode(x), agent.encode(y)
        torch.testing.assert_close(agent.mean(b), agent.mean(a)[:, order])
        torch.testing.assert_close(agent.value(b), agent.value(a))
        actions = torch.randn(len(x), SYMBOLS)
        log_prob = [
            agent.log_prob(agent.mean(f), c, agent.counts(o)) for f, c, o in ((a, actions, x), (b, actions[:, order], y))
        ]
        torch.testing.assert_close(*log_prob)
        assert agent.mean(a).std(dim=1).min() > 1e-3  # symbols differ
    torch.testing.assert_close(agent.counts(y), agent.counts(x)[:, order])


def test_absent_symbols_are_inert(script):
    """Whatever is said of a symbol without an agent; and beside such symbols all is as without them."""
    agent, fewer = make_agent(script, symbols=6), make_agent(script, symbols=4)
    fewer.load_state_dict(fewer.state_dict() | {k: v for k, v in agent.state_dict().items() if not k.startswith("norm")})
    x = observations(agent, absent=(1, 4))
    there = torch.tensor([0, 2, 3, 5])
    small = torch.cat([
        x[:, agent.own[0]].view(-1, 6, EACH)[:, there].flatten(1), x[:, agent.rest], x[:, agent.own[1]][:, there],
        x[:, agent.own[2]][:, there],
    ], dim=1)  # fmt: skip
    other = x.clone()
    other[:, agent.own[0]].view(-1, 6, EACH)[:, 1, :TARGET] = 7.0
    other[:, agent.own[1].start + 4] = -7.0
    action = torch.randn(len(x), 6)
    with torch.no_grad():
        a, b, c = agent.encode(x), fewer.encode(small), agent.encode(other)
        torch.testing.assert_close(agent.mean(a)[:, there], fewer.mean(b))
        torch.testing.assert_close(agent.value(a), fewer.value(b))
        assert torch.equal(agent.mean(a)[:, there], agent.mean(c)[:, there]) and torch.equal(agent.value(a), agent.value(c))
        assert agent.counts(x)[:, there].all() and not agent.counts(x)[:, [1, 4]].any()
        densities = agent.log_prob(agent.mean(a), action, agent.counts(x))
        torch.testing.assert_close(densities, fewer.log_prob(fewer.mean(b), action[:, there], fewer.counts(small)))
        empty = observations(agent, absent=range(6))
        assert torch.isfinite(agent.value(agent.encode(empty))).all()
        assert not agent.log_prob(action, action, agent.counts(empty)).any()


def test_every_part_of_an_observation_is_seen(script):
    agent = make_agent(script)
    x = observations(agent, n=8)
    with torch.no_grad():
        mean, value = agent.mean(agent.encode(x)), agent.value(agent.encode(x))
        for at in range(x.shape[1]):
            other = x.clone()
            other[:, at] += 3.0
            features = agent.encode(other)
            assert (agent.mean(features) - mean).abs().max() > 1e-4 and (agent.value(features) - value).abs().max() > 1e-4, at


def test_log_density_and_entropy_are_those_of_normals(script):
    agent = make_agent(script)
    mean, action, counts = torch.randn(200, SYMBOLS), torch.randn(200, SYMBOLS), torch.rand(200, SYMBOLS) < 0.6
    one = Normal(mean, agent.log_std.exp())
    expected = torch.where(counts, one.log_prob(action), 0.0).sum(1)
    torch.testing.assert_close(agent.log_prob(mean, action, counts), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(agent.entropy(), one.entropy()[0].sum())
    assert agent.log_std.shape == (1,)  # the same for all symbols


def test_symbols_share_the_statistics_of_their_entries(script):
    agent = make_agent(script)
    x = observations(agent, n=4000) * torch.linspace(0.5, 3.0, SIZE) + torch.linspace(-2.0, 2.0, SIZE)
    agent.norm.update(x[:1500])
    agent.norm.update(x[1500:])
    found = agent.norm(x)
    for block in agent.own:
        own, raw = (y[:, block].view(len(x), SYMBOLS, -1) for y in (found, x))
        for entry in range(own.shape[2]):
            if block == agent.own[0] and entry in (ACTS, TARGET):
                assert torch.equal(own[:, :, entry], raw[:, :, entry])
                continue
            values = raw[:, :, entry].double()
            expected = (values - values.mean()) / values.std(correction=0)
            torch.testing.assert_close(own[:, :, entry].double(), expected, atol=2e-3, rtol=2e-3)
    rest = x[:, agent.rest].double()
    expected = (rest - rest.mean(0)) / rest.std(0, correction=0)
    torch.testing.assert_close(found[:, agent.rest].double(), expected, atol=2e-3, rtol=2e-3)


def test_statistics_are_shared_alike_on_a_gpu(script):
    """By the sum that stands in for index_add_ there."""
    agent = make_agent(script)
    agent.norm.update(observations(agent, n=400))
    mean = agent.norm.mean

    class Elsewhere(torch.Tensor):
        is_cuda = True

    found = agent.norm.shared(mean.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, agent.norm.shared(mean), rtol=1e-14, atol=1e-14)
    assert found.unique().numel() < mean.unique().numel()


def test_the_network_reads_the_markets_blocks(frozen):
    g = frozen
    agent, layout, names = g["agent"], g["data"].layout, g["data"].features
    assert agent.own == [layout["assets"], layout["weights"], layout["drift"]]
    assert (names[agent.acts], names[agent.target]) == ("agent_acts", "agent_target") and len(agent.rest) > 7
    row = g["train_envs"].unwrapped.rows
    said = g["said"](g["data"])[row]
    torch.testing.assert_close(agent.symbols(g["obs"][-1])[:, :, len(names) - said.shape[2] : len(names)], torch.tensor(said))
    counts = agent.counts(g["x"][0])
    assert counts.any() and not counts.all() and torch.equal(counts, g["counts"][0])


def test_actions_without_effect_have_no_gradient(frozen):
    """Another action on a symbol whose agent asks for nothing: the same order, the same density."""
    g = frozen
    rows, counts = g["panel_rows"][0].numpy(), g["counts"][0]
    actions = g["actions"][0].clone()
    other = torch.where(counts, actions, actions + 1.0)
    assert not torch.equal(other, actions)
    assert_same_bits(*(g["to_scores"](a.numpy(), *g["asked"](g["data"], rows)) for a in (actions, other)))
    mean = torch.zeros_like(actions)
    assert torch.equal(*(g["agent"].log_prob(mean, a, counts) for a in (actions, other)))


# --- fine-tuning


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Variables of the short run, and a copy of each checkpoint that it wrote, by iteration."""
    kept, save = {}, torch.save

    def spy(content, path):
        save(content, path)
        kept[content["iteration"]] = torch.load(path, weights_only=True)

    with running(SCRIPT, tmp_path_factory.mktemp("checkpoints")) as call:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", spy)
            g = call(*SCRIPT.short)
        yield g, kept


def test_agents_learn_in_the_last_part_only(agents, checkpoints, frozen, inside, base, tmp_path):
    _, kept = checkpoints
    given = agents.model["best_model"]
    for iteration in range(2, 17, 2):
        assert_same_content(dict(kept[iteration]["agents"]), given)
        assert not kept[iteration]["tuner"]["state"]
    for name, weight in kept[20]["agents"].items():
        learns = not name.startswith("norm.")
        assert torch.equal(weight, given[name]) == (not learns), name
        assert not learns or (weight - given[name]).abs().max() < 16 * 4 * 0.001 * 1.01  # minibatches, iterations
    assert not torch.equal(kept[18]["agents"]["embed.weight"], kept[20]["agents"]["embed.weight"])
    assert_same_content(Run(frozen["run_dir"]).model["best_agents"], given)
    # a checkpoint amid it goes on with the same bits
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    torch.save(kept[18], folder / "model.pt")
    inside("--resume", str(folder))
    assert_same_run(Run(folder), base)


def test_the_chosen_agents_are_those_of_the_chosen_model(base, inside, tmp_path):
    """A checkpoint whose best score was that of other agents than the last: of zero weights, which always hold on."""
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    best = {name: torch.zeros_like(weight) for name, weight in base.model["best_agents"].items()}
    torch.save(base.model | {"best_agents": best}, folder / "model.pt")
    inside("--resume", str(folder))
    assert pd.read_parquet(base.folder / "symbols.parquet")["turnover"].any()
    assert not pd.read_parquet(folder / "symbols.parquet")["turnover"].any()
    assert not actions_of(Run(folder).ledger).any()


def test_agents_that_learned_for_the_worse_are_not_chosen(script, agents, inside, monkeypatch):
    """Validation scores that fall from the first one on, before the fine-tuning: the report is of the agents as they were."""
    falling = count(0, -1)
    monkeypatch.setattr(portfolio_references, "utility", lambda *_: float(next(falling)))
    tuned = ["--finetune-fraction", "0.5", "--finetune-rate", "0.01", "--eval-every", "1", "--total-timesteps", "4096"]
    run = Run(inside(*script.short, *tuned)["run_dir"])
    given = agents.model["best_model"]
    assert not torch.equal(run.model["agents"]["embed.weight"], given["embed.weight"])
    assert_same_content(dict(run.model["best_agents"]), given)
    theirs = pd.read_parquet(agents.folder / "symbols.parquet").drop(columns="free")
    assert_same_ledger(pd.read_parquet(run.folder / "symbols.parquet"), theirs)


def test_what_is_said_inside_the_graph_is_what_was_recorded(checkpoints):
    """By the agents as they are: on every training bar, 0 where there is none, and differentiable."""
    g, _ = checkpoints
    g["agents"].load_state_dict(g["best_agents"])
    g["run_agents"]("train")
    rows = np.concatenate([np.arange(start, stop, 7) for start, stop in g["splits"]["train"].ranges])
    says = g["say"](rows)
    recorded = g["said"](g["data"])[rows]
    np.testing.assert_allclose(says.detach().numpy(), recorded[:, :, : says.shape[2]], atol=1e-5)
    absent = recorded[:, :, -1] == 0
    assert absent.any() and not absent.all() and not says.detach().numpy()[absent].any()
    says.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in g["agents"].layers.parameters() if p.ndim > 1)


def test_with_the_agents_in_the_graph_the_ratio_is_still_one(script, inside):
    """One epoch of one minibatch in each iteration: new log-probabilities are those of the rollout, of recorded inputs."""
    tuned = ["--finetune-fraction", "1", "--finetune-rate", "0.01", "--num-minibatches", "1"]
    g = inside(*script.short, *tuned, "--total-timesteps", "3072")
    np.testing.assert_allclose(g["ratio"].detach().numpy(), 1.0, atol=2e-4)
    assert g["finetuning"] and abs(g["losses"]["approx_kl"]) < 1e-6
    # what is seen next is what these agents say
    assert torch.equal(
        g["obs"][-1][:, g["data"].layout["assets"]], torch.tensor(g["data"].assets[g["train_envs"].unwrapped.rows])
    )


def test_no_learning_rate_is_no_fine_tuning(script, inside):
    """But for rounding in the first iteration of it; of the agents, not a bit."""
    budget = ["--total-timesteps", "2048", "--eval-every", "1"]
    plain = inside(*script.short, *budget, "--finetune-fraction", "0")
    tuned = inside(*script.short, *budget, "--finetune-fraction", "0.5", "--finetune-rate", "0")
    assert_same_content(dict(tuned["agents"].state_dict()), dict(plain["agents"].state_dict()))
    for name, weight in plain["agent"].state_dict().items():
        torch.testing.assert_close(tuned["agent"].state_dict()[name], weight, atol=1e-5, rtol=1e-4)


def test_torch_keeps_its_number_of_threads(frozen):
    """Kernels that run on several of them have been started since."""
    assert torch.get_num_threads() == 1 and frozen["train_envs"].unwrapped.parallel


# --- the report


def test_it_is_compared_with_equal_budgets_on_the_same_bars(base, inside, tmp_path):
    g = inside("--resume", str(shutil.copytree(base.folder, tmp_path / "copy")))
    run, years = base.json, base.json["panel"]["bars_per_year"]
    assert list(run["over"]) == ["equal budgets, rebalanced", "equal budgets"]
    for name, told in run["over"].items():
        gain, low, high, how = ledger.difference(g["compared"]["agent"], g["compared"][name], years)
        assert told == {"growth_gained": gain, "low": low, "high": high, "bootstrap": how}
        assert gain == pytest.approx(
            run["scores"]["test"]["agent"]["growth"] - run["scores"]["test"][name]["growth"], abs=1e-12
        )
        assert f"growth {gain:+.2%} a year over {name}, 95% interval [{low:.2%}, {high:.2%}]" in base.done.stdout
    for split in ("train", "val", "test"):
        growth = ledger.growth(g["backtest"](split, g["equal_budgets"])).mean() * years
        assert run["equal_budgets"][split] == pytest.approx(growth, rel=1e-12)
        assert f"{growth:.1%} on {split}" in base.done.stdout
    assert run["agents"]["args"]["market"] in base.done.stdout


def test_it_is_ranked_beside_the_agents(script, base, agents, tmp_path):
    """On one table, with its orders replayed at other costs: the panel is found by what the agents' run says."""
    found = run_python(
        "benchmark/scoreboard.py", str(base.folder), str(agents.folder), "--out", str(tmp_path), "--strict",
        "--resamples", "20", "--reference", script.agents,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    (group,) = json.loads((tmp_path / "scoreboard.json").read_text())["groups"]
    assert {row["name"] for row in group["rows"]} == {script.name, script.agents}


# --- what goes wrong


@pytest.mark.parametrize(
    "options, words",
    [
        (["--market", "sp500"], ("--market",)),
        (["--costs", "zero"], ("--costs",)),
        (["--fill", "same_close"], ("--fill",)),
        (["--folds", "3"], ("--folds",)),
        (["--constraints", "long_short"], ("--constraints",)),
        (["--agents", "nowhere"], ("--agents nowhere", "no run.json", "ppo_transformer_trading.py")),
        (["--finetune-fraction", "1.5"], ("--finetune-fraction 1.5", "0 to 1")),
        (["--log-dataset", "logs"], ("--log-dataset logs", "--env-id")),
        (["--hidden", "0"], ("--hidden 0", "at least 1")),
        (["--asset-cap", "0"], ("asset_cap=0", "positive")),
        (["--reward", "alpha"], ("--reward alpha", "growth or sharpe")),
    ],
)
def test_bad_input_is_named(script, complaint, options, words):
    line = complaint(*script.short, *options)
    assert all(re.search(word, line) for word in words), line


def test_agents_that_learn_cannot_be_recorded(script, monkeypatch, tmp_path):
    """As on a machine with a GPU, where --cudagraphs is not left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    options = ["--cudagraphs", "--market-device", "cuda", "--finetune-fraction", "0.2", "--num-threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(script.path), *options])
    refused = pytest.raises(SystemExit, match="^--cudagraphs: expected --finetune-fraction 0: ")
    with running(script, tmp_path), refused:  # puts torch's settings back
        runpy.run_path(str(script.path), run_name="__main__")


def test_a_market_needs_agents(script, complaint):
    assert "--agents: expected the run directory" in complaint(*script.budget)


def test_a_run_that_cannot_be_used_is_named(script, agents, base, complaint, tmp_path):
    folder = shutil.copytree(agents.folder, tmp_path / "agents")
    told = json.loads((folder / "run.json").read_text())

    def line(**changes):
        (folder / "run.json").write_text(json.dumps(told | changes))
        out = complaint(*script.short, "--agents", str(folder))
        assert f"--agents {folder}: " in out
        return out

    assert "a running run of Trading-v0; expected a finished one" in line(status="running")
    found = line(panel=told["panel"] | {"sha256": "0" * 64})
    assert told["panel"]["sha256"] in found and "0" * 64 in found and "sha256" in found
    torch.save({"best_model": {"embed.weight": torch.zeros(3)}}, folder / "model.pt")
    assert "weights of ppo_transformer_trading.py" in line()
    fewer = {name: value for name, value in told["args"].items() if name != "layers"}
    assert "'layers'; expected arguments" in line(args=fewer)
    trading = told["args"]["trading"] | {"lots": 3}
    assert "'lots'; expected arguments" in line(args=told["args"] | {"trading": trading})
    assert "trades --shard 1/3 of the symbols; expected" in line(args=told["args"] | {"shard": "1/3"})
    (folder / "model.pt").unlink()
    assert "no model.pt" in line()
    other = complaint(*script.short, "--agents", str(base.folder))
    assert "finished run of Portfolio-v0; expected a finished one of Trading-v0" in other
