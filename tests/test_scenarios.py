"""Stress histories: that they are like the bars with their label, come of training bars only, and of the seed only.

Sources carry their row numbers in an extra series, so that every bar that was made tells which bar it was made of.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, make_env, ragged_with_series, random_actions, rollout, tampered
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from envs import return_model, scenarios
from envs.panel import Panel, PanelError, Split
from envs.portfolio_tables import PortfolioData
from envs.return_model import WINDOW, ReturnModel, fit
from envs.scenarios import BINS, REGIMES, Scenario, macro_labels, regime_labels, stress_panel

LENGTHS = (240, 60, 300, 90, 240, 60, 240, 90)  # calm and crash in turn
CALM, CRASH = 0, 1
MEAN, VOL = (0.0006, -0.004), (0.008, 0.03)  # of the market
LOADING, OWN = np.array([0.6, 0.8, 1.0, 1.2, 1.4]), 1.0  # on the market; a symbol's own volatility over the market's
SPLIT = Split("train", np.array([[100, 1000]]))
MODELS = ("bootstrap", "learned")


def days(bars: int) -> np.ndarray:
    return np.busday_offset("2015-01-01", np.arange(bars), roll="forward").astype("datetime64[ns]")


def panel_of(log_returns: np.ndarray, **extras: np.ndarray) -> Panel:
    """Close-only prices, with `row` and other extras."""
    close = 50 * np.exp(np.cumsum(log_returns, axis=0))
    extras |= {"row": np.arange(len(close), dtype=np.float64)}
    return Panel("hand", days(len(close)), tuple("ABCDEFGH"[: close.shape[1]]), close, extras=extras)


def simulated(lengths, seed: int = 0, dof: float = 8.0) -> Panel:
    """A factor market whose two states take turns; the state, with some noise for distinct values, is the extra `macro`."""
    rng = np.random.default_rng(seed)
    state = np.repeat(np.arange(len(lengths)) % 2, lengths)
    shocks = rng.standard_normal((len(state), len(LOADING) + 1)) * np.sqrt((dof - 2) / rng.chisquare(dof, (len(state), 1)))
    vol, mean = np.array(VOL)[state, None], np.array(MEAN)[state, None]
    returns = mean + vol * (LOADING * shocks[:, :1] + OWN * shocks[:, 1:])
    return panel_of(returns, macro=state + 0.1 * rng.random(len(state)))


@pytest.fixture
def whole_fit():
    """For a test of how good the learned model is: its fit runs to its end."""


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch):
    """Most tests need a learned model, not a good one."""
    if "whole_fit" not in request.fixturenames:
        monkeypatch.setattr(return_model, "STEPS", 20)


@pytest.fixture(scope="module")
def crashes() -> Panel:
    return simulated(LENGTHS)


@pytest.fixture(scope="module")
def ragged() -> Panel:
    """400 bars of every field, a gap of every kind, series of both shapes, row numbers."""
    rng = np.random.default_rng(4)
    small = ragged_with_series()
    big = replace(small, **{name: np.tile(x, (4, 1)) for name, x in small.fields.items()}, timestamps=days(480), extras={})
    own = rng.standard_normal((480, 6))
    return replace(big, extras={"own": own, "macro": rng.standard_normal(480), "row": np.arange(480.0)})


def paths(panel: Panel) -> np.ndarray:
    """(histories, bars, N) log returns from BASE on, of a panel without gaps."""
    close = panel.close.reshape(len(panel.segments), -1, panel.num_symbols)
    return np.diff(np.log(close), axis=1, prepend=np.log(100.0))


def source_rows(panel: Panel) -> np.ndarray:
    return panel.extras["row"].astype(int).reshape(len(panel.segments), -1)


def log_moves(panel: Panel, name: str, base: float = 100.0) -> np.ndarray:
    """(T, N) log of a field over the last close before, by a loop; `base` where there was none."""
    out = np.full(panel.close.shape, np.nan)
    for column in range(panel.num_symbols):
        last = base
        for row in range(panel.num_bars):
            last = base if row in panel.segments else last
            out[row, column] = np.log(panel.fields[name][row, column] / last)
            last = panel.close[row, column] if panel.present[row, column] else last
    return out


def cut(panel: Panel, split: Split) -> Panel:
    """The rows of a split of one range."""
    rows = slice(*split.ranges[0])
    extras = {name: x[rows] for name, x in panel.extras.items()}
    fields = {name: x[rows] for name, x in panel.fields.items()}
    return replace(panel, timestamps=panel.timestamps[rows], extras=extras, **fields)


# --- labels


def test_regimes_by_a_loop(ragged):
    split = Split("train", np.array([[30, 200], [260, 300]]))
    panel = replace(ragged, segments=np.array([0, 250]))
    moves = log_moves(panel, "close", base=np.nan)
    total, vol = np.zeros(480), np.zeros(480)
    for t in range(480):
        known = [np.nanmean(moves[s]) for s in range(max(t - 19, 250 * (t >= 250)), t + 1) if not np.isnan(moves[s]).all()]
        total[t], vol[t] = sum(known), np.sqrt(np.mean(np.square(known))) if known else 0.0
    threshold = np.median(np.append(vol[30:200], vol[260:300]))
    labels = regime_labels(panel, split)
    assert labels.dtype == np.int64 and set(labels) == {0, 1, 2, 3}
    expected = [f"{'volatile' if v > threshold else 'calm'}-{'down' if r < 0 else 'up'}" for r, v in zip(total, vol)]
    assert [REGIMES[k] for k in labels] == expected


@given(t=st.integers(200, 479), seed=st.integers(0, 9))
def test_labels_do_not_see_later_bars(ragged, t, seed):
    split = Split("train", np.array([[0, 201]]))
    later = tampered(ragged, t, np.random.default_rng(seed))
    assert_same_bits(regime_labels(later, split)[: t + 1], regime_labels(ragged, split)[: t + 1])
    assert_same_bits(macro_labels(later, "macro", split)[: t + 1], macro_labels(ragged, "macro", split)[: t + 1])


def test_macro_bins_by_hand():
    values = np.array([np.nan, 5, 1, 2, 4, 3, 6, -9, 99, 3.5])
    panel = panel_of(np.zeros((10, 1)), rate=values)
    split = Split("train", np.array([[0, 7]]))  # 1 to 6: thirds at 2 2/3 and 4 1/3
    labels = macro_labels(panel, "rate", split)
    assert labels.dtype == np.int64 and labels.tolist() == [-1, 2, 0, 0, 1, 1, 2, 0, 2, 1]
    assert macro_labels(panel, "rate", split, bins=2).tolist() == [-1, 1, 0, 0, 1, 0, 1, 0, 1, 0]
    ties = panel_of(np.zeros((10, 1)), rate=np.array([0.0] * 8 + [1, 2]))
    assert macro_labels(ties, "rate", split).tolist() == [0] * 8 + [2, 2]


# --- bootstrap


def test_bars_are_training_bars_with_the_label(ragged):
    """On this split every bar's close before, too, is in the split or the symbol is absent."""
    split = Split("train", np.array([[50, 450]]))
    training = cut(ragged, split)
    labels = regime_labels(training, Split("train", np.array([[0, 400]])))
    made = stress_panel(ragged, split, Scenario(labels=(1, 3)), histories=40, bars=100, seed=1)
    rows = source_rows(made)
    assert set(labels[rows.ravel() - 50]) == {1, 3}
    assert_same_bits(made.hidden["label"], labels[rows.ravel() - 50])
    wanted = 50 + np.flatnonzero(np.isin(labels, (1, 3)))
    assert set(rows.ravel()) == set(wanted) - {50}, "some bar is never drawn; the first has no return"
    at = rows.ravel() - 50
    for name in ("open", "high", "low", "close"):
        np.testing.assert_allclose(log_moves(made, name), log_moves(training, name, np.nan)[at], atol=1e-12)
    traded = (training.volume * training.close)[at]
    np.testing.assert_allclose(made.volume * made.close, np.where(made.present, traded, np.nan), rtol=1e-12)
    for name in ragged.extras:
        assert_same_bits(made.extras[name], training.extras[name][at])


def test_blocks_stay_in_runs_of_the_label(crashes):
    """Within a block rows are consecutive, or go from the end of a run to its start."""
    training = cut(crashes, SPLIT)
    labels = regime_labels(training, Split("train", np.array([[0, 900]])))
    labels[0] = -1  # has no return
    inside = labels == 3
    begins, ends = (np.flatnonzero(np.diff(inside.astype(int), prepend=0, append=0) == d) for d in (1, -1))
    back = dict(zip(ends - 1, begins))
    share = {}
    for block in (4.0, np.inf):
        rows = source_rows(stress_panel(crashes, SPLIT, Scenario(block=block), 60, 120, seed=0)) - 100
        follows = np.array([[b == back.get(a, a + 1) for a, b in zip(path[:-1], path[1:])] for path in rows])
        share[block] = follows.mean()
    assert share[np.inf] == 1.0
    assert abs(share[4.0] - 0.75) < 0.02


def test_histories_have_the_statistics_of_their_label(crashes):
    training = paths(crashes)[0][100:1000]
    labels = regime_labels(cut(crashes, SPLIT), Split("train", np.array([[0, 900]])))
    for label in range(4):
        made = paths(stress_panel(crashes, SPLIT, Scenario(labels=(label,)), 200, 100, seed=3))
        own = training[1:][labels[1:] == label]
        assert abs(made.std() / own.std() - 1) < 0.03
        assert abs(made.mean() - own.mean()) < 4 * own.mean(axis=1).std() * np.sqrt(10 / 20000)
    crash, everything = made.std(), training.std()  # volatile-down came last
    assert crash > 1.2 * everything and made.mean() < training.mean() - 0.004


@pytest.mark.parametrize("model", MODELS)
def test_macro_bins_choose_the_bars(crashes, model):
    top = macro_labels(cut(crashes, SPLIT), "macro", Split("train", np.array([[0, 900]])))
    made = stress_panel(crashes, SPLIT, Scenario(model, labels=(2,), macro="macro"), 20, 100, seed=0)
    rows = source_rows(made).ravel() - 100
    assert set(top[rows]) == {2} == set(made.hidden["label"])
    low = stress_panel(crashes, SPLIT, Scenario(model, labels=(0, 1), macro="macro"), 20, 100, seed=0)
    assert paths(made).std() > 1.5 * paths(low).std()


# --- the learned model


def model_data(bars: int = 4000, seed: int = 0, symbols: int = 5):
    """Log returns, market returns before and labels of a factor market of three states, and what they were drawn with."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, bars)
    loading, own, vol = np.linspace(0.5, 1.2, symbols), np.array([0.6, 0.9, 1.8])[labels], 0.01 * np.linspace(0.5, 2, symbols)
    factor = np.array([0.5, 1.0, 2.5])[labels]
    shocks = rng.standard_normal((bars, symbols + 1)) * np.sqrt(4 / rng.chisquare(6, (bars, 1)))
    mean = np.array([0.1, 0.0, -0.3])[labels]
    returns = vol * (mean[:, None] + loading * factor[:, None] * shocks[:, :1] + own[:, None] * shocks[:, 1:])
    before = 0.01 * rng.standard_normal((bars, WINDOW))
    sigma = [np.diag(vol) @ (np.outer(loading, loading) * f**2 + np.eye(symbols) * s**2) @ np.diag(vol)
             for f, s in ((0.5, 0.6), (1.0, 0.9), (2.5, 1.8))]  # fmt: skip
    return returns, before, labels, sigma


@pytest.fixture(scope="module")
def fitted():
    data = model_data()
    return fit(*data[:3], 3, seed=0), data


def test_likelihood_is_that_of_the_multivariate_t(fitted):
    model, (returns, before, labels, _) = fitted
    some = returns[:40].copy()
    some[np.random.default_rng(0).random(some.shape) < 0.3] = np.nan
    some[:, 0] = returns[:40, 0]
    x = model.inputs(before[:40], labels[:40])
    mu, s_f, s_e = (part.detach().numpy().ravel() for part in model(x))
    vol, b, dof = model.log_vol.exp().detach().numpy(), model.loading.detach().numpy(), model.degrees_of_freedom.item()
    total = 0.0
    for t, row in enumerate(some):
        has = ~np.isnan(row)
        cov = np.diag(vol[has]) @ (np.outer(b, b)[np.ix_(has, has)] * s_f[t] ** 2 + np.eye(has.sum()) * s_e[t] ** 2)
        cov = cov @ np.diag(vol[has])
        total += stats.multivariate_t(vol[has] * mu[t], cov * (dof - 2) / dof, dof).logpdf(row[has])
    found = model.log_likelihood(x, torch.from_numpy(some)).item()
    assert found == pytest.approx(total / np.isfinite(some).sum(), rel=1e-10)


def test_it_recovers_volatility_and_correlation_by_label(fitted):
    """Standard deviations within 8%, correlations within 0.05, means within 0.1 standard deviations."""
    model, (_, before, _, sigma) = fitted
    for label in range(3):
        rngs = [np.random.default_rng([7, j]) for j in range(4000)]
        made = model.sample(before[:4000], np.full(4000, label), 1, rngs)[:, 0]
        deviations = np.sqrt(np.diag(sigma[label]))
        np.testing.assert_allclose(made.std(axis=0), deviations, rtol=0.08)
        expected = sigma[label] / np.outer(deviations, deviations)
        np.testing.assert_allclose(np.corrcoef(made.T), expected, atol=0.05)
        mean = np.array([0.1, 0.0, -0.3])[label] * 0.01 * np.linspace(0.5, 2, 5)
        np.testing.assert_allclose(made.mean(axis=0) / deviations, mean / deviations, atol=0.1)
    assert 4 < model.degrees_of_freedom.item() < 9, "drawn with 6"
    together = np.abs(made / made.std(axis=0))[:, :2].T
    assert np.corrcoef(*together**2)[0, 1] > 0.3, "extremes come together"


def test_held_out_likelihood_beats_a_gaussian(fitted):
    model, (returns, before, labels, _) = fitted
    early, late = returns[:3200], returns[3200:]
    found = model.log_likelihood(model.inputs(before[3200:], labels[3200:]), torch.from_numpy(late)).item()
    assert model.held_out == pytest.approx(found, rel=1e-12)
    gaussian = stats.multivariate_normal(early.mean(axis=0), np.cov(early.T)).logpdf(late).mean() / 5
    assert model.held_out > gaussian + 0.1
    start = ReturnModel(early, before[:3200], labels[:3200], 3, 0)
    assert model.held_out > start.log_likelihood(start.inputs(before[3200:], labels[3200:]), torch.from_numpy(late)).item()


def test_held_out_bars_only_say_when_to_stop(monkeypatch):
    """Where nothing stops it early, the last bars make no difference to the parameters of a step."""
    monkeypatch.setattr(return_model, "STEPS", 4)
    returns, before, labels, _ = model_data(400)
    other = returns.copy()
    other[320:] *= 1.001
    a, b = (fit(r, before, labels, 3, 0).state_dict() for r in (returns, other))
    for name in a:
        assert_same_bits(a[name].numpy(), b[name].numpy(), name)
    other[319] *= 1.001
    assert any((fit(other, before, labels, 3, 0).state_dict()[name] != a[name]).any() for name in a)


def test_parameters_are_those_of_the_best_step(monkeypatch, whole_fit):
    seen, original = [], ReturnModel.log_likelihood

    def record(self, x, returns):
        out = original(self, x, returns)
        if len(returns) == 60:
            seen.append(out.item())
        return out

    monkeypatch.setattr(ReturnModel, "log_likelihood", record)
    monkeypatch.setattr(return_model, "PATIENCE", 7)
    model = fit(*model_data(300)[:3], 3, 0)
    best = int(np.argmax(seen))
    assert model.held_out == seen[best] and len(seen) == best + 1 + 7 < return_model.STEPS


def test_trailing_volatility_drives_the_next_bar(whole_fit):
    """Volatility here is that of the window before: learnt, and a path that begins wild stays wilder."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((1200, WINDOW)) * rng.choice([0.005, 0.02], (1200, 1))
    returns = before.std(axis=1, keepdims=True) * rng.standard_normal((1200, 4))
    model = fit(returns, before, np.zeros(1200, int), 1, 0)
    tame, wild = (np.sort(before.std(axis=1)).searchsorted(v) for v in (0.005, 0.02))
    order = np.argsort(before.std(axis=1))
    starts = before[order[[tame, wild]].repeat(500)]
    made = model.sample(starts, np.zeros(1000, int), 5, [np.random.default_rng([1, j]) for j in range(1000)])
    first, last = made[:, 0].std(axis=1), made[:, -1].std(axis=1)
    assert first[500:].mean() > 2.5 * first[:500].mean() and last[500:].mean() > 2 * last[:500].mean()


def test_the_market_of_a_path_is_its_own():
    """The second bar of two paths that begin alike follows from their different first ones."""
    model = fit(*model_data(300)[:3], 3, 0)
    with torch.no_grad():
        model.out += 0.3 * torch.from_numpy(np.random.default_rng(0).standard_normal(model.out.shape))
    before = model_data(300)[1][:1]
    made = model.sample(before, np.array([1]), 3, [np.random.default_rng(5)])
    for t in range(1, 3):
        window = np.append(before[0], made[0, :t].mean(axis=1))[None, -WINDOW:]
        mu, s_f, s_e = (x.detach().numpy() for x in model(model.inputs(window, np.array([1]))))
        rng = np.random.default_rng(5)
        dof = model.degrees_of_freedom.item()
        mixing = np.sqrt((dof - 2) / rng.chisquare(dof, 3))
        shock = (rng.standard_normal((3, 6)) * mixing[:, None])[t]
        vol, b = model.log_vol.exp().detach().numpy(), model.loading.detach().numpy()
        np.testing.assert_allclose(made[0, t], (vol * (mu + b * s_f * shock[0] + s_e * shock[1:]))[0], rtol=1e-10)


def test_features_of_the_window(fitted):
    model, (_, before, labels, _) = fitted
    x = model.inputs(before, labels).numpy()
    np.testing.assert_array_equal(x[:, :3], labels[:, None] == np.arange(3))
    vol = np.sqrt((before**2).mean(axis=1))
    state = np.column_stack([before.sum(axis=1) / vol / np.sqrt(WINDOW), np.log(vol)])
    expected = (state - state[:3200].mean(axis=0)) / state[:3200].std(axis=0)
    np.testing.assert_allclose(x[:, 3:], expected, rtol=1e-9, atol=1e-12)


def test_what_the_model_is_fitted_to(ragged, monkeypatch):
    """Each training bar with its label, and the market at the WINDOW bars before it, in the same history."""
    given, original = [], scenarios.fit
    monkeypatch.setattr(scenarios, "fit", lambda *args: given.append(args) or original(*args))
    panel = replace(ragged, segments=np.array([0, 150]))
    panel = replace(panel, extras=panel.extras | {"macro": np.where(np.arange(480) % 7 == 0, np.nan, panel.extras["macro"])})
    split = Split("train", np.array([[0, 150], [150, 400]]))
    stress_panel(panel, split, Scenario("learned", labels=(0,), macro="macro"), 1, 2, seed=3)
    moves = log_moves(panel, "close", base=np.nan)
    rows = [t for t in (*range(21, 150), *range(171, 400)) if t % 7]
    ((returns, before, labels, num_labels, seed),) = given
    np.testing.assert_allclose(returns, moves[rows], rtol=1e-12)
    np.testing.assert_allclose(before, [np.nanmean(moves[t - 20 : t], axis=1) for t in rows], rtol=1e-9)
    assert_same_bits(labels, macro_labels(panel, "macro", split)[rows])
    assert num_labels == 3 and seed == 3


def test_a_label_stays_and_each_is_as_likely(crashes):
    made = stress_panel(crashes, SPLIT, Scenario("learned", labels=(0, 3)), 200, 30, seed=0)
    held = made.hidden["label"].reshape(200, 30)
    assert (held == held[:, :1]).all() and abs((held[:, 0] == 3).mean() - 0.5) < 0.12
    assert paths(made)[held[:, 0] == 3].std() > 1.3 * paths(made)[held[:, 0] == 0].std()
    assert made.hidden["held_out"].shape == () and np.isfinite(made.hidden["held_out"])


def test_learned_histories_have_the_statistics_of_their_label(crashes, whole_fit):
    """Volatility within 15% of the rows that have the label, which is far from that of all rows; the true correlations
    within 0.1."""
    training = paths(crashes)[0][100:1000]
    labels = macro_labels(cut(crashes, SPLIT), "macro", Split("train", np.array([[0, 900]])))
    own = training[1:][labels[1:] == 2]
    made = paths(stress_panel(crashes, SPLIT, Scenario("learned", labels=(2,), macro="macro"), 100, 60, seed=3))
    assert abs(made.std() / own.std() - 1) < 0.15 and abs(training.std() / own.std() - 1) > 0.2
    sigma = np.outer(LOADING, LOADING) + OWN**2 * np.eye(5)
    deviations = np.sqrt(np.diag(sigma))
    np.testing.assert_allclose(np.corrcoef(made.reshape(-1, 5).T), sigma / np.outer(deviations, deviations), atol=0.1)


def test_shape_of_learned_bars_by_hand(ragged, monkeypatch):
    """Every bar's gap is the source bar's plus the regression's part; its reach beyond open and close is the source bar's."""
    split = Split("train", np.array([[0, 480]]))
    made = stress_panel(ragged, split, Scenario("learned", labels=(0,)), 6, 90, seed=0)
    assert made.present.all()
    source = {name: log_moves(ragged, name, np.nan) for name in ("open", "high", "low", "close")}
    found = {name: log_moves(made, name) for name in source}
    rows = source_rows(made).ravel()
    has = ~np.isnan(source["close"][rows])
    assert 0.5 < has.mean() < 0.95
    drawn = {name: x[rows][has] for name, x in source.items()}
    slope = np.nansum(source["open"] * source["close"], axis=0) / np.nansum(source["close"] ** 2, axis=0)
    gap = drawn["open"] + (slope * (found["close"] - source["close"][rows]))[has]
    np.testing.assert_allclose(found["open"][has], gap, atol=1e-12)
    for name, extreme in (("high", np.maximum), ("low", np.minimum)):
        reach = drawn[name] - extreme(drawn["open"], drawn["close"])
        np.testing.assert_allclose(found[name][has] - extreme(found["open"], found["close"])[has], reach, atol=1e-12)
    np.testing.assert_allclose((made.volume * made.close)[has], (ragged.volume * ragged.close)[rows][has], rtol=1e-12)
    assert_same_bits(made.extras["own"][has], ragged.extras["own"][rows][has])
    labels = regime_labels(ragged, split)
    for column in range(6):  # elsewhere: a bar of the symbol's own with the label
        own = set(ragged.extras["own"][~np.isnan(source["close"][:, column]) & (labels == 0), column])
        assert set(made.extras["own"][:, column]) <= own


# --- both


def test_severity_multiplies_log_returns(ragged):
    split = Split("train", np.array([[0, 400]]))
    for model in MODELS:
        one, two = (stress_panel(ragged, split, Scenario(model, severity=s), 3, 80, seed=5) for s in (1.0, 2.0))
        for name in ("open", "high", "low", "close"):
            np.testing.assert_allclose(log_moves(two, name), 2 * log_moves(one, name), atol=1e-12)
        np.testing.assert_allclose(two.volume * two.close, one.volume * one.close, rtol=1e-11)


def test_severity_does_not_break_prices_that_were_rounded():
    """A close one ulp of float32 above its high is tolerated as it is, but not its hundredfold."""
    rng = np.random.default_rng(0)
    close = 50 * np.exp(np.cumsum(0.002 * rng.standard_normal((300, 2)), axis=0))
    fields = {"high": close * (1 - 9e-7), "low": close * (1 - 8e-7) * 0.999}
    fields["open"] = fields["low"] * (1 - 9e-7)
    source = Panel("rounded", days(300), ("A", "B"), close, **fields)
    for model in MODELS:
        made = stress_panel(source, Split("train", np.array([[0, 300]])), Scenario(model, severity=50.0), 2, 40, seed=0)
        assert (made.high >= np.maximum(made.open, made.close) * (1 - 1e-12)).all()
        assert (made.low <= np.minimum(made.open, made.close) * (1 + 1e-12)).all()


@pytest.mark.parametrize("macro", [None, "macro"])
@pytest.mark.parametrize("model", MODELS)
def test_rows_outside_the_split_have_no_influence(ragged, model, macro):
    split = Split("train", np.array([[100, 240], [245, 400]]))
    rng = np.random.default_rng(0)
    outside = np.ones(480, bool)
    for a, b in split.ranges:
        outside[a:b] = False
    other = tampered(ragged, -1, rng)

    def mixed(found, changed):
        return np.where(outside.reshape(-1, *[1] * (found.ndim - 1)), changed, found)

    changed = replace(
        ragged,
        **{name: mixed(x, other.fields[name]) for name, x in ragged.fields.items()},
        extras={name: mixed(x, other.extras[name]) for name, x in ragged.extras.items()},
    )
    assert changed.sha256 != ragged.sha256
    made, again = (stress_panel(p, split, Scenario(model, labels=(1,), macro=macro), 3, 80, 0) for p in (ragged, changed))
    assert made.sha256 == again.sha256
    rows = source_rows(made)
    assert not outside[rows].any() and not np.isin(rows, (100, 245)).any(), "a range's first row has no return inside"


@pytest.mark.parametrize("model", MODELS)
def test_seed_determines_the_panel_and_global_generators_stay(crashes, model):
    np.random.seed(1), torch.manual_seed(1), random.seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state().clone(), random.getstate()
    panels = [stress_panel(crashes, SPLIT, Scenario(model), 3, 60, seed) for seed in (4, 4, 5)]
    assert_same_bits(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]
    torch.manual_seed(2), np.random.seed(2)
    panels.append(stress_panel(crashes, SPLIT, Scenario(model), 3, 60, 4))
    assert panels[0].sha256 == panels[1].sha256 == panels[3].sha256 != panels[2].sha256
    a, b, c = paths(panels[0])
    assert not (np.isclose(a, b).all() or np.isclose(b, c).all())


@pytest.mark.parametrize("model", MODELS)
def test_a_history_does_not_depend_on_how_many_others_there_are(crashes, model):
    few, more = (paths(stress_panel(crashes, SPLIT, Scenario(model, labels=(2, 3)), n, 60, seed=2)) for n in (2, 5))
    np.testing.assert_allclose(few, more[:2], atol=1e-9)


def test_symbols_of_few_bars_are_made_like_the_others(ragged):
    """B is first listed among the held-out bars, C is delisted early, D never moves."""
    close = ragged.close.copy()
    close[:330, 1], close[60:, 2], close[:, 3] = np.nan, np.nan, np.where(np.isnan(close[:, 3]), np.nan, 7.0)
    panel = Panel("few", ragged.timestamps, ragged.symbols, close)
    split = Split("train", np.array([[0, 400]]))
    made = stress_panel(panel, split, Scenario("learned"), 30, 100, seed=0)
    assert made.present.all() and list(made.fields) == ["close"] and made.volume is None
    deviations = paths(made).std(axis=(0, 1))
    assert (deviations[[1, 2]] > 0.3 * np.median(deviations)).all() and deviations.max() < 3 * np.median(deviations)


@pytest.mark.parametrize("fields", [("high",), ("low", "volume"), ("open",), ("high", "low")])
@pytest.mark.parametrize("model", MODELS)
def test_panels_with_some_fields(ragged, model, fields):
    kept = {name: ragged.fields[name] for name in fields}
    panel = Panel("some", ragged.timestamps, ragged.symbols, ragged.close, **kept)
    made = stress_panel(panel, Split("train", np.array([[0, 400]])), Scenario(model), 2, 60, seed=0)
    assert set(made.fields) == {*fields, "close"} and made.extras == {}


def test_histories_and_calendar(ragged):
    panel = replace(
        ragged, segments=np.array([0, 100]), segment_split=("train", "val"), timezone="UTC", hidden={"x": np.ones(1)}
    )
    made = stress_panel(panel, Split("train", np.array([[0, 40], [60, 480]])), Scenario(), 3, 500, seed=0)
    assert made.segments.tolist() == [0, 500, 1000] and made.segment_split == ("train",) * 3
    assert made.timezone == "UTC" and list(made.hidden) == ["label"] and made.symbols == panel.symbols
    times = panel.timestamps[100:480]  # the longest history; then its bar lengths again
    for start in made.segments:
        assert_same_bits(made.timestamps[start : start + 380], times)
        assert_same_bits(np.diff(made.timestamps[start + 379 : start + 500]), np.diff(times)[:120])
    rows = source_rows(made).ravel()
    assert not (set(rows) & {*range(40, 60), 0, 60, 100}) and rows.min() < 40 and rows.max() > 440


@pytest.mark.parametrize("model", MODELS)
def test_portfolios_trade_on_them(ragged, model):
    made = stress_panel(ragged, Split("train", np.array([[0, 400]])), Scenario(model, severity=1.5), 4, 80, seed=0)
    data = PortfolioData(made)
    split = Split("train", np.column_stack([made.segments, made.segments + 80]))
    assert len(data.market(split).starts) == 4
    env = make_env(data, 4, split=split, episode_length=10)
    log = rollout(env, random_actions(env, 30))
    assert all(np.isfinite(log[key]).all() for key in ("obs", "reward", "final_obs")) and np.abs(log["reward"]).max() > 0


# --- errors


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model": "gan"}, "model='gan': expected one of ('bootstrap', 'learned')"),
        ({"labels": ()}, "labels=(): expected a tuple of different numbers of 0 .. 3: calm-up, calm-down"),
        ({"labels": (4,)}, "labels=(4,): expected"),
        ({"labels": (-1,)}, "labels=(-1,): expected"),
        ({"labels": (1, 1)}, "labels=(1, 1): expected"),
        ({"labels": 3}, "labels=3: expected a tuple"),
        ({"macro": "rate"}, "labels=(3,): expected a tuple of different numbers of 0 .. 2: rate bin 0"),
        ({"macro": 5}, "macro=5: expected the name of an extra series, or None"),
        ({"block": 0.9}, "block=0.9: expected at least 1"),
        ({"block": np.nan}, "block=nan: expected at least 1"),
        ({"severity": 0.0}, "severity=0.0: expected a positive number"),
        ({"severity": np.inf}, "severity=inf: expected"),
        ({"severity": np.nan}, "severity=nan: expected"),
    ],
)
def test_bad_scenarios(changes, expected):
    with pytest.raises(ValueError) as error:
        Scenario(**changes)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("key, value", [("histories", 0), ("bars", 1), ("seed", -1)])
def test_bad_sizes(crashes, key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: expected at least {value + 1}$"):
        stress_panel(crashes, SPLIT, Scenario(), **({"histories": 1, "bars": 2, "seed": 0} | {key: value}))


def complaint(panel: Panel, split: Split = SPLIT, **scenario) -> str:
    with pytest.raises(PanelError) as error:
        stress_panel(panel, split, Scenario(**scenario), 2, 30, 0)
    return str(error.value)


def test_what_a_panel_lacks_is_said(crashes, ragged):
    assert "hand, split 'train': macro series 'own'" in complaint(crashes, macro="own", labels=(0,))
    assert complaint(crashes, macro="own", labels=(0,)).endswith("global extra series ['macro', 'row']")
    assert "'own', expected one of the global extra series ['macro', 'row']" in complaint(
        ragged, Split("train", np.array([[0, 400]])), macro="own", labels=(0,)
    )
    unknown = replace(crashes, extras={"macro": np.full(crashes.num_bars, np.nan)})
    assert "'macro' has no value in split 'train'" in complaint(unknown, macro="macro", labels=(0,))
    with pytest.raises(ValueError, match="bins=1: expected at least 2"):
        macro_labels(crashes, "macro", SPLIT, bins=1)
    late = Split("train", np.array([[100, 5000]]))
    assert f"split 'train' ends at row 5000, expected at most {crashes.num_bars}" in complaint(crashes, late)

    rising = panel_of(np.abs(0.01 * np.random.default_rng(0).standard_normal((300, 2))))
    found = complaint(rising, Split("train", np.array([[0, 300]])), labels=(1, 3))
    assert "too few bars: 0 are calm-down or volatile-down, expected at least 20" in found
    assert "'calm-up': 149, 'calm-down': 0, 'volatile-up': 150" in found
    one = replace(
        crashes, close=np.where(np.arange(5) == 2, np.where(np.arange(1320)[:, None] == 500, 5.0, np.nan), crashes.close)
    )
    assert "symbol 'C' has no return, expected at least 1" in complaint(one)


def test_a_learned_label_needs_bars_with_a_window_before(crashes):
    split = Split("train", np.array([[100, 100 + 45]]))
    labels = macro_labels(cut(crashes, split), "macro", Split("train", np.array([[0, 45]])))
    usable = np.bincount(labels[21:], minlength=BINS)  # a return in each of the 20 bars before
    found = complaint(crashes, split, model="learned", macro="macro", labels=(1,))
    assert f"too few bars: {usable[1]} are macro bin 1, expected at least 20" in found
    assert f"'macro bin 0': {usable[0]}, 'macro bin 1': {usable[1]}, 'macro bin 2': {usable[2]}" in found


def test_a_model_that_is_not_finite_is_refused(crashes, monkeypatch):
    still = panel_of(np.zeros((300, 2)))
    found = complaint(still, Split("train", np.array([[0, 300]])), model="learned", labels=(0,))
    assert found == "return model: no price moves, expected one that does among the first training bars"
    monkeypatch.setattr(return_model, "LEARNING_RATE", 1e4)
    assert "return model: log-likelihood" in (found := complaint(crashes, model="learned")) and "expected finite" in found


def test_prices_beyond_float64_are_refused(crashes):
    assert "expected a finite number" in complaint(crashes, severity=1e4)
