"""Stress histories: new price paths in the manner of the training bars that carry a label, such as "volatile-down".

A label is a regime of the market (`regime_labels`) or a bin of a macro series (`macro_labels`). `stress_panel` makes a Panel of
new histories of the training bars with the wanted labels alone, from which features come by the ordinary code. Two models:

- bootstrap: stationary blocks (Politis & Romano 1994, JASA 89) inside the runs of consecutive bars that have a wanted label.
- learned: a single-index model (Sharpe 1963, "A simplified model for portfolio analysis", Management Science 9) whose mean
  and volatilities depend on the label and on the bars before, with jointly Student-t shocks (density: Kotz & Nadarajah 2004,
  "Multivariate t distributions and their applications", eq. 1.1), fitted by maximum likelihood; see `ReturnModel`.

What is learnt or drawn is a function of the split's rows and the seed only; no global random state is read or moved.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch

from envs.panel import Panel, PanelError, Split
from envs.resampled import calendar, compound, previous_close, stationary_blocks

REGIMES = ("calm-up", "calm-down", "volatile-up", "volatile-down")
WINDOW = 20  # bars of the trailing volatility and return
BINS = 3  # of a macro series
MODELS = ("bootstrap", "learned")
FEWEST = 20  # bars of a label that stress histories can be made of
LEAST_VOL = 1e-6  # of a window in which nothing moved
LEAST_DOF = 2.5  # degrees of freedom; at 2 the variance would be infinite
HIDDEN = 16
HELD_OUT = 0.2  # last share of the training bars, for early stopping
STEPS, PATIENCE, LEARNING_RATE = 1000, 50, 0.01


def regime_labels(panel: Panel, split: Split) -> np.ndarray:
    """(T,) int64 indices into REGIMES, from the equally weighted market's log returns over the last WINDOW bars of the history.

    Volatile: their root mean square is above its median over the rows of `split`, the training split; down: their sum is
    negative. But for that one number, the label of bar t depends on bars t and earlier. The market's return is the mean over
    the symbols that have one, on the last close before.
    """
    total, vol = _trailing(_windows(panel, _market(_logs(panel)["close"])))
    threshold = np.median(vol[_rows(panel, split)])
    return 2 * (vol > threshold) + (total < 0).astype(np.int64)


def macro_labels(panel: Panel, column: str, split: Split, bins: int = BINS) -> np.ndarray:
    """(T,) int64: how many of the bins - 1 inner quantiles of the global extra series `column`, taken over the rows of `split`,
    the training split, its value exceeds; -1 where it is unknown (NaN).

    Raises PanelError if there is no such series, or it has no value in those rows; ValueError if bins < 2.
    """
    if bins < 2:
        raise ValueError(f"bins={bins}: expected at least 2")
    known = [name for name, x in panel.extras.items() if x.ndim == 1]
    if column not in known:
        raise PanelError(f"{panel.name}: macro series {column!r}, expected one of the global extra series {known}")
    values = panel.extras[column]
    seen = values[_rows(panel, split)]
    seen = seen[~np.isnan(seen)]
    if len(seen) == 0:
        raise PanelError(f"{panel.name}: macro series {column!r} has no value in split {split.name!r}, expected at least 1")
    edges = np.quantile(seen, np.arange(1, bins) / bins)
    return np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="left"))


@dataclass(frozen=True)
class Scenario:
    """What stress histories are made like. Raises ValueError naming the field.

    model: one of MODELS.
    labels: the labels to draw from, indices into REGIMES, or, with `macro`, bins 0 .. BINS - 1 of that series.
    macro: a global extra series of the panel, or None for the regimes.
    block: mean length of a block of bars.
    severity: what the log returns are multiplied by, 1 as drawn.
    """

    model: str = "bootstrap"
    labels: tuple[int, ...] = (3,)
    macro: str | None = None
    block: float = 10.0
    severity: float = 1.0

    def __post_init__(self):
        def expect(ok, field, what):
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {what}")

        expect(self.model in MODELS, "model", f"one of {MODELS}")
        expect(self.macro is None or isinstance(self.macro, str), "macro", "the name of an extra series, or None")
        choices, given = set(range(len(self.names))), self.labels
        ok = isinstance(given, tuple) and given and set(given) <= choices and len(set(given)) == len(given)
        expect(ok, "labels", f"a tuple of different numbers of 0 .. {len(choices) - 1}: {', '.join(self.names)}")
        expect(self.block >= 1, "block", "at least 1")
        expect(0 < self.severity < np.inf, "severity", "a positive number")

    @property
    def names(self) -> tuple[str, ...]:
        """What each label is called in messages."""
        return REGIMES if self.macro is None else tuple(f"{self.macro} bin {k}" for k in range(BINS))


def stress_panel(panel: Panel, split: Split, scenario: Scenario, histories: int, bars: int, seed: int) -> Panel:
    """`histories` new histories of `bars` bars each, made of the rows of `split`, the training split; all labelled "train".

    Symbols, fields and names of extras are those of `panel`; times are those of the split's longest history, as
    `resampled.calendar` goes on with them; prices start from `resampled.BASE`. `hidden["label"]` (T,) is the label of the
    training bar that a bar is made of; with the learned model `hidden["held_out"]` () is its `ReturnModel.held_out`.
    History j depends on the seed and j, not on how many there are (learned: up to rounding).

    bootstrap: bars are training bars; a symbol is absent where it has no return on an earlier close of the split; traded value
    and extras are those of the training bar. A run shorter than a block is repeated until the block ends.
    learned: the label, drawn from `scenario.labels`, stays through a history, whose first bar follows the WINDOW bars before a
    training bar with that label. Every symbol has every bar. Shape (gap, range, traded value) and extras of a bar are those of
    a training bar of the same label, drawn in blocks as above; where a symbol is absent there, of another bar of its own.

    Raises PanelError if a symbol has no return in the split or in the new histories, if a wanted label (bootstrap: all wanted
    ones together) has fewer than FEWEST bars with a return (learned: and WINDOW bars before), if the model cannot be fitted,
    and as `macro_labels`, `resampled.calendar` and Panel do; ValueError if `histories`, `bars` or `seed` is too small.
    """
    for key, value, least in (("histories", histories, 1), ("bars", bars, 2), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{key}={value}: expected at least {least}")
    learned = scenario.model == "learned"
    source = _training(panel, split)
    every = Split(split.name, np.array([[0, source.num_bars]]))
    labels = regime_labels(source, every) if scenario.macro is None else macro_labels(source, scenario.macro, every)
    logs = _logs(source)
    present = ~np.isnan(logs["close"])
    if not present.any(axis=0).all():
        symbol = source.symbols[int(present.any(axis=0).argmin())]
        raise PanelError(f"{source.name}: symbol {symbol!r} has no return, expected at least 1: two bars of one history")
    before = np.roll(_windows(source, _market(logs["close"])), 1, axis=0)  # that end with the bar before
    before[source.segments] = np.nan
    usable = present.any(axis=1) & ~(learned & np.isnan(before).any(axis=1))
    pools = [
        _runs(source, usable, labels, wanted, scenario.names)
        for wanted in ([(k,) for k in scenario.labels] if learned else [scenario.labels])
    ]
    rngs = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(j,))) for j in range(histories)]
    rows = np.stack([stationary_blocks(pools[rng.integers(len(pools))], bars, scenario.block, rng) for rng in rngs])
    picked = np.repeat(rows[..., None], source.num_symbols, axis=2)  # (histories, bars, N) the training row of each cell
    hidden = {"label": labels[rows].ravel()}
    if learned:
        fitted, first = usable & (labels >= 0), rows[:, 0]
        model = fit(logs["close"][fitted], before[fitted], labels[fitted], len(scenario.names), seed)
        close = model.sample(before[first], labels[first], bars, rngs)
        hidden["held_out"] = np.array(model.held_out)
        for cells, label, rng in zip(picked, labels[first], rngs):
            _fill(cells, present, labels == label, rng)
    picked = picked.reshape(-1, source.num_symbols)

    def pick(values: np.ndarray) -> np.ndarray:
        return values[rows.ravel()] if values.ndim == 1 else np.take_along_axis(values, picked, axis=0)

    drawn = {name: pick(values) for name, values in logs.items()}
    if learned:
        drawn = _shaped(drawn, close.reshape(picked.shape), logs)
    drawn = {name: scenario.severity * values for name, values in drawn.items()}
    for name, extreme in (("high", np.maximum), ("low", np.minimum)):
        if name in drawn:  # the severity also multiplies the rounding of a file's float32 prices, beyond what Panel tolerates
            drawn[name] = extreme.reduce([drawn[k] for k in ("open", "close", name) if k in drawn])
    with np.errstate(over="ignore"):  # Panel refuses infinite prices, and says where
        fields = {name: np.exp(values) for name, values in drawn.items()}
    if source.volume is not None:
        fields["volume"] = pick(source.volume * source.close) / fields["close"]
    longest = int(np.argmax(np.diff(source.segments, append=source.num_bars)))
    moves = Panel(  # prices over the close before
        name=f"stress of {panel.name}",
        timestamps=np.tile(calendar(source, np.flatnonzero(source.segment_of_row == longest), bars), histories),
        symbols=source.symbols,
        **fields,
        segments=np.arange(histories) * bars,
        segment_split=("train",) * histories,
        hidden=hidden,
        timezone=source.timezone,
        extras={name: pick(values) for name, values in source.extras.items()},
    )
    return replace(moves, **compound(moves, np.ones_like(moves.close), np.arange(moves.num_bars), moves.segments))


class ReturnModel(torch.nn.Module):
    """Log returns of a bar given its label and the market before it, in float64 on the CPU:

        r_i = vol_i * (mu(x) + b_i * s_f(x) * f + s_e(x) * e_i),    i = 1 .. N

    x: the label, and two features of the equally weighted market's last WINDOW returns, standardised: their sum over its
    standard deviation, and the log of their root mean square. mu, log s_f and log s_e are a constant per label plus a network
    of one tanh layer, so that they are bounded however far a path goes. (f, e) are jointly Student-t, uncorrelated with unit
    variances: one chi-square variable scales all symbols, as in a crash, and the likelihood of any subset of them is in closed
    form. vol_i, b_i and the degrees of freedom, above LEAST_DOF, are learnt too.

    held_out: mean log-likelihood (nats) of a return among the last HELD_OUT of the bars, which are used for nothing but to
    choose when to stop; NaN before `fit`.
    """

    def __init__(self, returns: np.ndarray, before: np.ndarray, labels: np.ndarray, num_labels: int, seed: int):
        """As for `fit`; starts from the data's volatilities, means by label, and correlations with the market."""
        super().__init__()
        self.num_labels, self.held_out = num_labels, np.nan
        state = _state(before)
        self.center, self.spread = state.mean(axis=0), np.maximum(state.std(axis=0), LEAST_VOL)
        count = (~np.isnan(returns)).sum(axis=0)
        vol = np.sqrt(np.nansum(returns**2, axis=0) / np.maximum(count, 1))
        known = (vol > 0) & (count >= min(FEWEST, len(returns)))
        if not known.any():
            raise PanelError("return model: no price moves, expected one that does among the first training bars")
        vol = np.where(known, vol, np.median(vol[known]))  # a symbol of few bars: as a usual one
        scaled = returns / vol
        factor = _market(scaled)
        loading = np.nansum(scaled * factor[:, None], axis=0) / np.maximum(count, 1) / max(factor.std(), LEAST_VOL)
        loading = np.where(known, loading, np.median(loading[known]))

        def constants(rows: np.ndarray) -> list[float]:
            """mu, log s_f, log s_e of these bars."""
            signal = max(factor[rows].std() / max(factor.std(), LEAST_VOL), LEAST_VOL)
            total = np.nanvar(scaled[rows])
            own = max(total - signal**2 * np.mean(loading**2), 0.1 * total, LEAST_VOL**2)
            return [np.nanmean(scaled[rows]), np.log(signal), 0.5 * np.log(own)]

        enough = np.bincount(labels, minlength=num_labels) >= FEWEST
        start = {"log_vol": np.log(vol), "loading": loading, "dof": 2.0}
        start["label"] = [constants((labels == k) | ~enough[k]) for k in range(num_labels)]
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn((num_labels + 2, HIDDEN), generator=generator, dtype=torch.float64)
        start["hidden"] = hidden / (num_labels + 2) ** 0.5
        start |= {"bias": np.zeros(HIDDEN), "out": np.zeros((HIDDEN, 3))}
        for name, value in start.items():
            self.register_parameter(name, torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))

    @property
    def degrees_of_freedom(self) -> torch.Tensor:
        return LEAST_DOF + torch.nn.functional.softplus(self.dof)

    def inputs(self, before: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        """(B, WINDOW) market returns of the bars before and (B,) labels -> x (B, num_labels + 2)."""
        one_hot = np.eye(self.num_labels)[labels]
        return torch.from_numpy(np.concatenate([one_hot, (_state(before) - self.center) / self.spread], axis=1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`inputs` -> mu, s_f, s_e, (B, 1) each."""
        out = x[:, : self.num_labels] @ self.label + torch.tanh(x @ self.hidden + self.bias) @ self.out
        return out[:, :1], out[:, 1:2].exp(), out[:, 2:].exp()

    def log_likelihood(self, x: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        """() mean log density of the returns (B, N), NaN where a symbol has none, given `inputs`; per return, in nats.

        The covariance of a bar's d returns over vol_i is s_e^2 I + s_f^2 b b', inverted by Sherman & Morrison (1950).
        """
        present = ~torch.isnan(returns)
        mu, s_f, s_e = self(x)
        z = torch.where(present, returns.nan_to_num() / self.log_vol.exp() - mu, 0.0) / s_e
        b = present * self.loading * s_f / s_e
        d, dof, signal = present.sum(dim=1, dtype=torch.float64), self.degrees_of_freedom, (b**2).sum(dim=1)
        square = (z**2).sum(dim=1) - (b * z).sum(dim=1) ** 2 / (1 + signal)
        log_det = 2 * (present * (self.log_vol + s_e.log())).sum(dim=1) + torch.log1p(signal)
        scale = torch.lgamma((dof + d) / 2) - torch.lgamma(dof / 2) - d / 2 * torch.log((dof - 2) * torch.pi)
        return (scale - 0.5 * log_det - 0.5 * (dof + d) * torch.log1p(square / (dof - 2))).sum() / d.sum()

    @torch.no_grad()
    def sample(self, before: np.ndarray, labels: np.ndarray, bars: int, rngs: list[np.random.Generator]) -> np.ndarray:
        """(H, bars, N) log returns of H paths that go on from the market returns `before` (H, WINDOW), each with its label (H,)
        and random numbers; the market that a bar is conditioned on becomes the mean over the path's own N symbols."""
        dof, loading, vol = self.degrees_of_freedom.item(), self.loading.numpy(), self.log_vol.exp().numpy()
        mixing = np.stack([np.sqrt((dof - 2) / rng.chisquare(dof, bars)) for rng in rngs])
        shocks = mixing[..., None] * np.stack([rng.standard_normal((bars, len(vol) + 1)) for rng in rngs])
        paths = np.empty((len(rngs), bars, len(vol)))
        for t in range(bars):
            mu, s_f, s_e = (x.numpy() for x in self(self.inputs(before, labels)))
            paths[:, t] = vol * (mu + loading * s_f * shocks[:, t, :1] + s_e * shocks[:, t, 1:])
            before = np.column_stack([before[:, 1:], paths[:, t].mean(axis=1)])
        return paths


def fit(returns: np.ndarray, before: np.ndarray, labels: np.ndarray, num_labels: int, seed: int) -> ReturnModel:
    """The ReturnModel of log returns (B, N), NaN where a symbol has none, in the order of time, given the market returns of the
    WINDOW bars before each, `before` (B, WINDOW), and its label (B,), 0 .. num_labels - 1.

    Adam on the first 1 - HELD_OUT of the bars, until the likelihood of the others has not risen for PATIENCE steps; the
    parameters are those of their best. Raises PanelError if no price moves, or a likelihood or parameter is not finite.
    """
    cut = len(returns) - max(1, round(HELD_OUT * len(returns)))
    model = ReturnModel(returns[:cut], before[:cut], labels[:cut], num_labels, seed)
    x, y = model.inputs(before, labels), torch.from_numpy(returns)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    best, best_step, kept = -np.inf, 0, {}
    for step in range(STEPS):
        with torch.no_grad():
            held_out = model.log_likelihood(x[cut:], y[cut:]).item()
        likelihood = model.log_likelihood(x[:cut], y[:cut])
        finite = all(torch.isfinite(p).all() for p in model.parameters()) and torch.isfinite(likelihood)
        if not (finite and np.isfinite(held_out)):
            found = f"log-likelihood {likelihood.item():g}, held out {held_out:g}"
            raise PanelError(f"return model: {found} at step {step}, expected finite numbers and parameters")
        if held_out > best:
            best, best_step, kept = held_out, step, deepcopy(model.state_dict())
        elif step - best_step >= PATIENCE:
            break
        optimizer.zero_grad()
        (-likelihood).backward()
        optimizer.step()
    model.load_state_dict(kept)
    model.held_out = best
    return model


def _rows(panel: Panel, split: Split) -> np.ndarray:
    """The rows of the split, ascending."""
    if split.ranges[-1, 1] > panel.num_bars:
        found = f"split {split.name!r} ends at row {split.ranges[-1, 1]}"
        raise PanelError(f"{panel.name}: {found}, expected at most {panel.num_bars}")
    return np.concatenate([np.arange(start, stop) for start, stop in split.ranges])


def _training(panel: Panel, split: Split) -> Panel:
    """The split's rows alone, a history for each stretch of consecutive ones."""
    rows = _rows(panel, split)
    return replace(
        panel,
        name=f"{panel.name}, split {split.name!r}",
        timestamps=panel.timestamps[rows],
        **{name: values[rows] for name, values in panel.fields.items()},
        segments=np.flatnonzero(np.append(True, ~_consecutive(panel, rows))),
        segment_split=None,
        hidden={},
        extras={name: values[rows] for name, values in panel.extras.items()},
    )


def _consecutive(panel: Panel, rows: np.ndarray) -> np.ndarray:
    """(len(rows) - 1,) bool: the next row is the next bar of the same history."""
    return (np.diff(rows) == 1) & (np.diff(panel.segment_of_row[rows]) == 0)


def _runs(source: Panel, usable: np.ndarray, labels: np.ndarray, wanted: tuple[int, ...], names: tuple) -> list[np.ndarray]:
    """Runs of consecutive usable rows with a wanted label. Raises PanelError if these are fewer than FEWEST rows."""
    rows = np.flatnonzero(usable & np.isin(labels, wanted))
    if len(rows) < FEWEST:
        found = {name: int((usable & (labels == k)).sum()) for k, name in enumerate(names)}
        asked = " or ".join(names[k] for k in wanted)
        raise PanelError(
            f"{source.name}: too few bars: {len(rows)} are {asked}, expected at least {FEWEST}; usable bars by label: {found}"
        )
    return np.split(rows, np.flatnonzero(~_consecutive(source, rows)) + 1)


def _logs(panel: Panel) -> dict[str, np.ndarray]:
    """Name of each price field -> (T, N) its log over the symbol's last close before the bar; NaN where there is none."""
    previous = previous_close(panel)
    return {name: np.log(values / previous) for name, values in panel.fields.items() if name != "volume"}


def _market(returns: np.ndarray) -> np.ndarray:
    """(T,) mean over the symbols that have a return; NaN where none has."""
    count = (~np.isnan(returns)).sum(axis=1)
    return np.where(count > 0, np.nansum(returns, axis=1) / np.maximum(count, 1), np.nan)


def _windows(panel: Panel, market: np.ndarray) -> np.ndarray:
    """(T, WINDOW) `market` at the last WINDOW bars, the row's own last; NaN before the start of the history."""
    rows = np.arange(panel.num_bars)[:, None] - np.arange(WINDOW)[::-1]
    inside = rows >= panel.segments[panel.segment_of_row][:, None]
    return np.where(inside, market[np.maximum(rows, 0)], np.nan)


def _trailing(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and root mean square of the known returns in each window, (T,) each; 0 where none is."""
    count = np.maximum((~np.isnan(windows)).sum(axis=1), 1)
    return np.nansum(windows, axis=1), np.sqrt(np.nansum(windows**2, axis=1) / count)


def _state(before: np.ndarray) -> np.ndarray:
    """(B, 2) trend, in standard deviations, and log volatility of full windows."""
    total, vol = _trailing(before)
    vol = np.maximum(vol, LEAST_VOL)
    return np.column_stack([total / (vol * np.sqrt(WINDOW)), np.log(vol)])


def _fill(cells: np.ndarray, present: np.ndarray, labelled: np.ndarray, rng: np.random.Generator) -> None:
    """Where a symbol is not `present` (T, N) at its row in `cells` (bars, N), put there one of its rows at random, in place:
    a labelled one, or, if it has none, any."""
    for column, has in zip(cells.T, present.T):
        own = np.flatnonzero(has & labelled) if (has & labelled).any() else np.flatnonzero(has)
        absent = ~has[column]
        column[absent] = rng.choice(own, absent.sum())


def _shaped(drawn: dict[str, np.ndarray], close: np.ndarray, logs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bars that end at `close` (M, N) in the shape of `drawn` bars of `logs`, all logs over the close before.

    The gap is the drawn one, moved by each symbol's regression (through 0) of its gaps on its returns: the same share of the
    return would be anything where the drawn return is near 0. High and low are as far beyond open and close as they were.
    """
    made = {"close": close}
    if "open" in drawn:
        square = np.maximum(np.nansum(logs["close"] ** 2, axis=0), LEAST_VOL**2)
        made["open"] = drawn["open"] + np.nansum(logs["open"] * logs["close"], axis=0) / square * (close - drawn["close"])
    body = tuple(made)
    for name, extreme in (("high", np.maximum), ("low", np.minimum)):
        if name in drawn:
            reach = drawn[name] - extreme.reduce([drawn[k] for k in body])
            made[name] = extreme.reduce([made[k] for k in body]) + reach
    return made
