"""Bootstrap draws that all rows of a comparison group share, so that differences between them are paired.

Two stages, for several seeds on one history are not independent markets. First the histories: every run on the same panel
sees the same redrawn bars, or, with ten markets or more in the group, the same redrawn markets. Then the seeds: together for
all rows where every seed has a panel of its own, else each row's by themselves.
"""

import numpy as np
from arch.bootstrap import optimal_block_length
from rundirs import Run
from scipy.stats import trim_mean

from envs.ledger import growth, quantile_levels

CHARGES = ("commission", "spread", "slippage", "impact", "borrow", "financing")
SCORES = ("sharpe", "growth", "turnover", "cost")  # that rows are compared by
DRAWN = (*SCORES, "net_return")  # all functions of sums over bars; rates a year
WHOLE = 10  # markets from which on they are redrawn whole, as in envs.ledger
CHUNK = 16_000_000  # counts held at once


class Draws:
    """Scores of every run on every draw.

    found[row][seed]: (resamples + 1, len(DRAWN)); entry 0 holds the scores themselves, markets pooled as in ledger.summarise.
    cells[row][seed]: (resamples + 1, M) Sharpe ratios of its markets, or, where bars are drawn, of all of them pooled (M = 1).
    how: what was drawn, in words. block: mean block length in bars, None where markets are drawn whole.

    `keep`: {panel: (bars,) bool}, which bars to score (all by default); the others are drawn and left out.
    """

    def __init__(self, rows: dict[str, list[Run]], resamples: int, seed: int, keep: dict[str, np.ndarray] | None = None):
        runs = [run for members in rows.values() for run in members]
        panels = {run.panel: run for run in runs}
        self.resamples, self.seed = resamples, seed
        self.paired_seeds = len(panels) > 1
        histories = sum(run.ledger["market"].nunique() for run in panels.values())
        self.block = None if histories >= WHOLE else _block_length(rows)
        self.levels = quantile_levels(histories if self.block is None else None)
        self.how = (
            f"{histories} markets drawn whole"
            if self.block is None
            else f"stationary bootstrap, mean block {self.block:.1f} bars"
        )
        self.found: dict[str, dict[int, np.ndarray]] = {name: {} for name in rows}
        self.cells: dict[str, dict[int, np.ndarray]] = {name: {} for name in rows}
        for number, (panel, first) in enumerate(sorted(panels.items(), key=lambda item: item[1].seed)):
            members = [(name, run) for name, own in rows.items() for run in own if run.panel == panel]
            sums = np.stack([_bar_sums(run) for _, run in members], axis=1)  # (bars, runs, 5)
            kept = np.ones(len(sums), bool) if keep is None else keep[panel]
            sums[~kept] = 0.0
            rng = np.random.default_rng([seed, number])
            per_year = float(first.content["panel"]["bars_per_year"])
            if self.block is None:
                _, market = np.unique(first.ledger["market"].to_numpy(), return_inverse=True)
                units = np.zeros((market.max() + 1, *sums.shape[1:]))
                np.add.at(units, market, sums)
                sizes, sums = np.bincount(market, kept), units
            else:
                sizes = kept.astype(float)
            scores, drawn = self._scores(sums, sizes, rng, per_year)
            cells = scores[:, :, None, 0]  # (resamples + 1, runs, 1)
            if self.block is None:
                cells = _sharpe(sizes[:, None], *np.moveaxis(sums[:, :, :2], 2, 0), per_year).T[:, drawn].swapaxes(0, 1)
            for k, (name, run) in enumerate(members):
                self.found[name][run.seed] = scores[:, k]
                self.cells[name][run.seed] = cells[:, k]

    def _scores(
        self, sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, per_year: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(resamples + 1, runs, len(DRAWN)) from sums (units, runs, 5) of units that hold `sizes` (units,) bars.

        And which units were drawn, (resamples + 1, units), where markets are drawn whole; the first are the units themselves.
        """
        units, (runs, width) = len(sums), sums.shape[1:]
        flat, parts, kept = sums.reshape(units, -1), [], []
        todo = self.resamples + 1
        while todo:
            some = min(todo, max(1, CHUNK // units))
            counts = np.zeros((some, units))
            for k in range(some):
                drawn = np.arange(units) if todo == self.resamples + 1 and k == 0 else self._draw(units, rng)
                counts[k] = np.bincount(drawn, minlength=units)
                if self.block is None:
                    kept.append(drawn)
            n = (counts @ sizes)[:, None]
            x, squares, log_growth, turnover, cost = np.moveaxis((counts @ flat).reshape(some, runs, width), 2, 0)
            rates = (total / np.maximum(n, 1) * per_year for total in (log_growth, turnover, cost, x))
            parts.append(np.stack([_sharpe(n, x, squares, per_year), *rates], axis=2))
            todo -= some
        return np.concatenate(parts), np.array(kept, dtype=np.int64)

    def _draw(self, units: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of `units` units: each by itself, or blocks of geometric length that wrap around (Politis & Romano 1994)."""
        if self.block is None:
            return rng.integers(units, size=units)
        starts = rng.random(units) < 1.0 / self.block
        starts[0] = True
        block = np.cumsum(starts) - 1
        begin = np.flatnonzero(starts)
        return (rng.integers(units, size=len(begin))[block] + np.arange(units) - begin[block]) % units

    def _seeds(self, name: str, count: int) -> np.ndarray:
        """(resamples, count) which of a row's seeds each draw holds."""
        key = [self.seed, 1_000_003] if self.paired_seeds else [self.seed, *name.encode()]
        return np.random.default_rng(key).integers(count, size=(self.resamples, count))

    def row(self, name: str, seeds: list[int] | None = None) -> np.ndarray:
        """(resamples + 1, len(DRAWN)) of a row: the mean over its seeds, which are drawn too."""
        found = self.found[name]
        seeds = sorted(found) if seeds is None else seeds
        scores = np.stack([found[s] for s in seeds], axis=1)
        means = np.take_along_axis(scores[1:], self._seeds(name, len(seeds))[:, :, None], axis=1).mean(axis=1)
        return np.concatenate([scores[:1].mean(axis=1), means])

    def iqm(self, name: str) -> dict[str, float]:
        """Interquartile mean of the Sharpe ratios of all markets and seeds of a row, seeds and markets (or bars) redrawn.

        With its 95% interval: {value, low, high}; Agarwal et al. 2021, with the histories drawn as everywhere here.
        """
        cells = np.stack([self.cells[name][s] for s in sorted(self.cells[name])], axis=1)  # (resamples + 1, seeds, markets)
        drawn = np.take_along_axis(cells[1:], self._seeds(name, cells.shape[1])[:, :, None], axis=1)
        value = float(trim_mean(cells[0], 0.25, axis=None))
        return {"value": value, **self._interval(trim_mean(drawn.reshape(len(drawn), -1), 0.25, axis=1))}

    def _interval(self, draws: np.ndarray) -> dict[str, float]:
        if not len(draws):
            return {"low": float("nan"), "high": float("nan")}
        low, high = np.quantile(draws, self.levels)
        return {"low": float(low), "high": float(high)}

    def better(self, a: str, b: str) -> float | None:
        """Probability that a run of `a` has a higher Sharpe ratio than one of `b` on redrawn bars or markets; ties count half.

        Over all pairs of their seeds (Agarwal et al. 2021), or over shared seeds where each has prices of its own; None
        where none is shared.
        """
        if self.paired_seeds:
            pairs = [(s, s) for s in sorted(set(self.found[a]) & set(self.found[b]))]
        else:
            pairs = [(s, t) for s in self.found[a] for t in self.found[b]]
        if not pairs or not self.resamples:
            return None
        gaps = np.stack([self.found[a][s][1:, 0] - self.found[b][t][1:, 0] for s, t in pairs])
        return float((0.5 + 0.5 * np.sign(gaps)).mean())

    def scores(self, name: str) -> dict[str, dict]:
        """{score: {value, low, high}} of a row, 95% percentile interval (ledger.quantile_levels)."""
        rows = self.row(name)
        return {score: {"value": rows[0, k], **self._interval(rows[1:, k])} for k, score in enumerate(SCORES)}

    def difference(self, a: str, b: str) -> dict:
        """Scores of `a` minus those of `b`: {"scores": [{key, a, b, difference, low, high}], "how"}, or {"note": why not}."""
        seeds = None
        if self.paired_seeds:
            seeds = sorted(set(self.found[a]) & set(self.found[b]))
            if not seeds:
                return {"note": "No seed in common: on these markets every seed has prices of its own."}
        first, second = self.row(a, seeds), self.row(b, seeds)
        gap = first - second
        scores = [
            {"key": score, "a": first[0, k], "b": second[0, k], "difference": gap[0, k], **self._interval(gap[1:, k])}
            for k, score in enumerate(SCORES)
        ]
        over = f"seeds {', '.join(map(str, seeds))} paired" if seeds else "seeds drawn for each by itself"
        return {"scores": scores, "how": f"{self.how}, the same for both; {over}; {self.resamples} draws"}


def _sharpe(n, x, squares, per_year: float) -> np.ndarray:
    """Annualised Sharpe ratio from the number, sum and sum of squares of returns; 0 where they do not vary."""
    variance = (squares - x * x / np.maximum(n, 1)) / np.maximum(n - 1, 1)
    with np.errstate(all="ignore"):
        varies = (n > 1) & (variance > 1e-18 * squares / np.maximum(n, 1))
        return np.where(varies, x / np.maximum(n, 1) / np.sqrt(variance) * np.sqrt(per_year), 0.0)


def _bar_sums(run: Run) -> np.ndarray:
    """(bars, 5), in the ledger's order, which is by market and time: net return, its square, log growth, turnover, cost."""
    frame = run.ledger
    net = frame["net_return"].to_numpy()
    return np.stack([net, net**2, growth(frame), frame["turnover"], frame[list(CHARGES)].sum(axis=1)], axis=1)


def _block_length(rows: dict[str, list[Run]]) -> float:
    """The longest of the rows' mean block lengths (Politis & White 2004), each of the row's first run."""
    lengths = [1.0]
    for runs in rows.values():
        x = runs[0].ledger["net_return"].to_numpy()
        if len(x) >= 20 and np.ptp(x) > 0.0:
            lengths.append(float(optimal_block_length(x)["stationary"].iloc[0]))
    lengths = [x for x in lengths if np.isfinite(x)]
    return min(max(lengths), max(1.0, min(len(runs[0].ledger) for runs in rows.values()) / 4))
