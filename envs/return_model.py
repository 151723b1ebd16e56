"""A small model of returns given a label of the bar and the market before it, fitted by maximum likelihood (`fit`).

A single-index model (Sharpe 1963, "A simplified model for portfolio analysis", Management Science 9) whose mean and
volatilities depend on the label and on the bars before, with jointly Student-t shocks (density: Kotz & Nadarajah 2004,
"Multivariate t distributions and their applications", eq. 1.1).
"""

from copy import deepcopy

import numpy as np
import torch

from envs.panel import PanelError

WINDOW = 20  # bars of the trailing volatility and return
FEWEST = 20  # bars that a label's or a symbol's moments are estimated from
LEAST_VOL = 1e-6  # of a window in which nothing moved
LEAST_DOF = 2.5  # degrees of freedom; at 2 the variance would be infinite
HIDDEN = 16
HELD_OUT = 0.2  # last share of the training bars, for early stopping
STEPS, PATIENCE, LEARNING_RATE = 1000, 50, 0.01


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
        factor = market_return(scaled)
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


def market_return(returns: np.ndarray) -> np.ndarray:
    """(T,) mean over the symbols that have a return; NaN where none has."""
    count = (~np.isnan(returns)).sum(axis=1)
    return np.where(count > 0, np.nansum(returns, axis=1) / np.maximum(count, 1), np.nan)


def trailing(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and root mean square of the known returns in each window, (T,) each; 0 where none is."""
    count = np.maximum((~np.isnan(windows)).sum(axis=1), 1)
    return np.nansum(windows, axis=1), np.sqrt(np.nansum(windows**2, axis=1) / count)


def _state(before: np.ndarray) -> np.ndarray:
    """(B, 2) trend, in standard deviations, and log volatility of full windows."""
    total, vol = trailing(before)
    vol = np.maximum(vol, LEAST_VOL)
    return np.column_stack([total / (vol * np.sqrt(WINDOW)), np.log(vol)])
