"""Was the best row good, or the luckiest of many? Probability of overfitting, superior predictive ability, deflation."""

from itertools import combinations

import metrics
import numpy as np
from arch.bootstrap import SPA
from rundirs import Run
from scipy.stats import rankdata

BLOCKS = 16  # of time, for the probability of overfitting: 12,870 ways to choose half of them
FORESIGHT = ("baseline-oracle", "baseline-closed-form")  # they know what no agent can: not candidates for a selection
BUY_AND_HOLD = "baseline-buy-and-hold"


def probability_of_overfitting(returns: np.ndarray, blocks: int = BLOCKS) -> float:
    """Probability that the best of K strategies in one half of the bars is below the median in the other.

    Combinatorially symmetric cross-validation (Bailey, Borwein, Lopez de Prado & Zhu 2017): `returns` (T, K) are cut into
    an even number of blocks of bars, and every half of the blocks selects, by Sharpe ratio, for the other half. The share of
    halves whose choice ranks in the lower half of the others' bars. About 0.5 for noise; 1 where what is gained in one half
    is lost in the other. Raises ValueError for fewer than 2 strategies or bars than blocks, or an odd number of blocks.
    """
    bars, count = returns.shape
    if count < 2 or blocks % 2 or bars < blocks:
        raise ValueError(
            f"probability of overfitting: {bars} bars of {count} strategies, {blocks} blocks; expected at least 2 strategies, "
            "an even number of blocks, and a bar in each"
        )
    edges = np.linspace(0, bars, blocks + 1).astype(int)[:-1]
    sums, squares = np.add.reduceat(returns, edges), np.add.reduceat(returns**2, edges)
    sizes = np.diff(edges, append=bars)
    halves = np.array(list(combinations(range(blocks), blocks // 2)))
    chosen = np.zeros((len(halves), blocks))
    np.put_along_axis(chosen, halves, 1.0, axis=1)
    inside, outside = (_sharpe(half @ sizes, half @ sums, half @ squares) for half in (chosen, 1.0 - chosen))
    best = inside.argmax(axis=1)
    rank = np.take_along_axis(rankdata(outside, axis=1), best[:, None], axis=1)[:, 0]
    return float((rank / (count + 1) <= 0.5).mean())  # a logit of the relative rank that is not positive


def _sharpe(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """(C, K) Sharpe ratios per bar; 0 where returns do not vary."""
    mean = total / n[:, None]
    variance = squares / n[:, None] - mean**2
    return np.where(variance > 1e-18, mean / np.sqrt(np.maximum(variance, 1e-18)), 0.0)


def superior_predictive_ability(
    returns: np.ndarray, benchmark: np.ndarray, block: float, resamples: int = 1000, seed: int = 0
) -> float:
    """p-value of the hypothesis that none of K strategies has a higher mean return than the benchmark (Hansen 2005).

    `returns` (T, K), `benchmark` (T,), on the same bars; stationary bootstrap of mean block `block` bars. The consistent
    p-value of arch, which takes losses. Strategies that never differ from the benchmark are left out; NaN where none differs.
    """
    differs = np.ptp(returns - benchmark[:, None], axis=0) > 1e-15
    if not differs.any():
        return float("nan")
    test = SPA(-benchmark, -returns[:, differs], block_size=max(1, round(block)), reps=resamples, seed=seed)
    test.compute()
    return float(test.pvalues["consistent"])


class Selection:
    """How far luck in choosing among the rows of a group explains the best of them.

    `trials`: every configuration and seed that was tried, those of sweeps and failed runs included. Rows that know the future
    are no candidates, and get no deflated ratio.
    """

    def __init__(self, rows: dict[str, list[Run]], block: float | None, trials: int, resamples: int, seed: int):
        self.trials = trials
        self.candidates = {name: runs for name, runs in rows.items() if not name.startswith(FORESIGHT)}
        moments = {run: _moments(run) for runs in rows.values() for run in runs}
        self.moments = {name: [moments[run] for run in runs] for name, runs in rows.items()}
        sharpes = [moments[run][0] for runs in self.candidates.values() for run in runs]
        spread = float(np.var(sharpes, ddof=1)) if len(sharpes) > 1 else 0.0
        self.luck = metrics.expected_max_sharpe(spread, trials)
        self.pbo = self.spa = None
        self.columns, returns, benchmark = _matrix(self.candidates)
        if len(self.columns) > 1 and len(returns) >= 2 * BLOCKS:
            self.pbo = probability_of_overfitting(returns)
        if benchmark is not None and len(self.columns) and len(returns) >= 20:
            if block is None:  # ten markets or more: they, not bars, are independent
                units = np.concatenate([run.ledger["market"].to_numpy() for run in _one_per_panel(self.candidates)])
                starts = np.flatnonzero(np.append(True, units[1:] != units[:-1]))
                sizes = np.diff(starts, append=len(units))
                returns = np.add.reduceat(returns, starts) / sizes[:, None]
                benchmark = np.add.reduceat(benchmark, starts) / sizes
            self.block = 1.0 if block is None else block
            self.spa = superior_predictive_ability(returns, benchmark, self.block, resamples, seed)

    def row(self, name: str) -> dict[str, float | None]:
        """PSR and DSR of a row, each the mean over its seeds, which share a history and so do not add up to more bars."""
        psr = [metrics.psr(*moments) for moments in self.moments[name]]
        if name not in self.candidates:
            return {"psr": float(np.mean(psr)), "dsr": None}
        dsr = [metrics.psr(*moments, benchmark_sharpe=self.luck) for moments in self.moments[name]]
        return {"psr": float(np.mean(psr)), "dsr": float(np.mean(dsr))}

    @property
    def group(self) -> dict[str, float | None]:
        return {"pbo": self.pbo, "spa": self.spa, "expected_max_sharpe_per_bar": self.luck}

    def warnings(self) -> list[str]:
        out = []
        if self.spa is not None and self.spa > 0.05:
            out.append(
                f"No row is shown to beat buy-and-hold, the search among all of them corrected for (SPA p = {self.spa:.2f})."
            )
        if self.pbo is not None and self.pbo > 0.5:
            out.append(f"Choosing the best row here would have failed more often than not (PBO = {self.pbo:.2f}).")
        return out

    def notes(self, per_year: float) -> list[str]:
        luck = self.luck * np.sqrt(per_year)
        out = [
            f"DSR: {self.trials} trials counted, every run and every trial of a sweep, failed ones too; the best of as many "
            f"without any skill would show a Sharpe ratio of {luck:.2f} (Bailey & Lopez de Prado 2014)."
        ]
        if self.pbo is not None:
            out.append(
                f"PBO {self.pbo:.2f}: probability that the best of {len(self.columns)} in half of the time is below the median "
                f"in the other, {BLOCKS} blocks (Bailey et al. 2017)."
            )
        if self.spa is not None:
            out.append(
                f"SPA p = {self.spa:.3f}: that no row has a higher mean return than buy-and-hold, mean block "
                f"{self.block:.1f} (Hansen 2005)."
            )
        return out


def _moments(run: Run) -> tuple[float, int, float, float]:
    """Sharpe ratio per bar, bars, skewness and raw kurtosis of a run's net returns."""
    r = run.ledger["net_return"].to_numpy()
    return metrics.sharpe(r, 1.0), len(r), metrics.skewness(r), metrics.kurtosis(r)


def _one_per_panel(rows: dict[str, list[Run]]) -> list[Run]:
    """A run of each panel that every row has, by seed."""
    panels = [{run.panel: run for run in runs} for runs in rows.values()]
    return [run for panel, run in panels[0].items() if all(panel in other for other in panels)] if panels else []


def _matrix(rows: dict[str, list[Run]]) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Names, net returns (T, K) on shared bars, and those (T,) of buy-and-hold or None.

    On one panel every run is a column. Where seeds have panels of their own, a row is a column, its seeds one after the other.
    """
    shared = [run.panel for run in _one_per_panel(rows)]
    if not shared:
        return [], np.zeros((0, 0)), None
    net = {
        name: {run.seed: run.ledger["net_return"].to_numpy() for run in runs if run.panel in shared}
        for name, runs in rows.items()
    }
    if len(shared) == 1:
        columns = {f"{name}, seed {seed}": x for name, seeds in net.items() for seed, x in seeds.items()}
    else:
        columns = {name: np.concatenate([seeds[s] for s in sorted(seeds)]) for name, seeds in net.items()}
    benchmark = next((x for name, x in columns.items() if name.startswith(BUY_AND_HOLD)), None)
    columns = {name: x for name, x in columns.items() if not name.startswith(BUY_AND_HOLD)}
    returns = np.stack(list(columns.values()), axis=1) if columns else np.zeros((0, 0))
    return list(columns), returns, benchmark
