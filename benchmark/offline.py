"""The scoreboard's tables of what was learned from a dataset: beside online PPO and the behaviours that made the data.

Best is the model chosen on validation bars (ledger.parquet), last the model as it was when training ended
(ledger_last.parquet). All scores come from the test split of these ledgers, but for the mean reward of the data.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from paired import DRAWN, Draws
from rundirs import BARS, Run, checked

ONLINE = {"LeadLag-v0": "ppo_leadlag", "Portfolio-v0": "ppo_portfolio"}
# Names in the table, in its order
LABELS = {"bc_portfolio": "BC", "bc_portfolio_top10": "BC-10%", "cql_portfolio": "CQL", "iql_portfolio": "IQL"}
LAST = "ledger_last.parquet"
SCORED = {  # key: label, kind, help
    "utility": ("utility", "percent", "mean net return less half of the risk aversion times its variance, a year"),
    "growth": ("growth", "percent", "mean log growth a year, net of costs"),
    "sharpe": ("Sharpe", "number", "annualised, net of costs"),
    "share": ("of online", "percent", "share of online PPO's score"),
}
NO_INTERVAL = {"low": float("nan"), "high": float("nan")}


class Medians(Draws):
    """Draws of best and last models, with the utility among the scores, and medians over seeds where Draws has means.

    drawn[row, score][seed]: (resamples + 1,), entry 0 the score itself.
    """

    def __init__(self, rows: dict[str, list[Run]], risk_aversion: float, resamples: int, seed: int):
        super().__init__(rows, resamples, seed)
        self.drawn: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        for name, found in self.found.items():
            for number, values in found.items():
                of = dict(zip(DRAWN, values.T, strict=True))
                sharpe, mean = of["sharpe"], of["net_return"]
                deviation = np.divide(mean, sharpe, out=np.zeros_like(mean), where=sharpe != 0)  # a Sharpe ratio's other half
                utility = mean - 0.5 * risk_aversion * deviation**2
                for score, values in (("sharpe", sharpe), ("growth", of["growth"]), ("utility", utility)):
                    self.drawn.setdefault((name, score), {})[number] = values

    def median(self, name: str, score: str) -> dict[str, float]:
        """{value, low, high} of a row: median over its seeds, which are drawn too; 95% interval."""
        return self._median(name, self.drawn[name, score])

    def share(self, name: str, online: str, score: str) -> dict[str, float] | None:
        """Median over shared seeds of a score divided by the online row's of the same seed and draw, {value, low, high}.

        None where no seed is shared, or the online row's score is not above zero on each of them: a share of it would say
        nothing. Without interval where that is so on some draw: the interval would have no end.
        """
        ours, theirs = self.drawn[name, score], self.drawn[online, score]
        seeds = sorted(set(ours) & set(theirs))
        if not seeds or any(theirs[s][0] <= 0 for s in seeds):
            return None
        if any((theirs[s] <= 0).any() for s in seeds):
            return {"value": float(np.median([ours[s][0] / theirs[s][0] for s in seeds])), **NO_INTERVAL}
        return self._median(name, {s: ours[s] / theirs[s] for s in seeds})

    def _median(self, name: str, values: dict[int, np.ndarray]) -> dict[str, float]:
        stacked = np.stack([values[s] for s in sorted(values)], axis=1)  # (resamples + 1, seeds)
        drawn = np.take_along_axis(stacked[1:], self._seeds(name, stacked.shape[1]), axis=1)
        return {"value": float(np.median(stacked[0])), **self._interval(np.median(drawn, axis=1))}


def tables(rows: dict[str, list[Run]], failed: list[Run], resamples: int, seed: int) -> list[dict]:
    """Offline tables of a comparison group: one for each environment and risk aversion that it has offline runs of.

    `rows`: the group's, with ledgers on common bars; `failed`: its failed runs. A table is {"title", "columns": [{key, label,
    kind, help}], "rows": [{name, detail, seeds, and a value or {value, low, high} under other keys}], "notes"}.
    """
    kinds: dict[tuple[str, float], dict[str, list[Run]]] = {}
    for name, runs in rows.items():
        if runs[0].offline:
            key = runs[0].content["env_id"], float(runs[0].content["risk_aversion"])
            kinds.setdefault(key, {})[name] = runs
    lost = [run for run in failed if "dataset" in (run.content.get("args") or {})]
    return [table(*key, learned, rows, lost, resamples, seed) for key, learned in sorted(kinds.items())]


def table(
    env_id: str, risk_aversion: float, learned: dict[str, list[Run]], rows: dict[str, list[Run]], lost: list[Run],
    resamples: int, seed: int,
) -> dict:  # fmt: skip
    """One of `tables`: the offline rows `learned`, those of `rows` that belong beside them; `lost`: failed offline runs."""
    data = [run for runs in learned.values() for run in runs]
    behaviours = sorted({name for run in data for name in run.behaviours})
    ppo = ONLINE.get(env_id, "online PPO")
    online = [name for name, runs in rows.items() if runs[0].exp_name == ppo]
    rules = {name: runs[0].exp_name.removeprefix("baseline-") for name, runs in rows.items() if _is_rule(runs[0])}
    rules = {name: rule for name, rule in rules.items() if rule in behaviours}
    last, missing = last_models(learned)
    order = [*online, *sorted(learned, key=_place), *rules]
    medians = Medians({name: rows[name] for name in order} | last, risk_aversion, resamples, seed)
    score = "growth" if risk_aversion == 1.0 else "utility"
    keys = list(dict.fromkeys([score, "sharpe", "growth"]))
    beside = max(online, key=lambda name: len(rows[name]), default=None)
    out = []
    for name in order:
        row = {"name": label(name), "seeds": len(rows[name])}
        for part, suffix in ((name, ""), (_last(name), "_last")):
            if part in medians.found:
                row |= {key + suffix: medians.median(part, key) for key in keys}
                if beside not in (None, name):
                    row[f"share{suffix}"] = medians.share(part, beside, score)
        if name in learned:
            row["speed"] = gradient_steps_per_second(rows[name])
        out.append(row)
    out += mean_rewards(data, score)
    notes = [
        "Best: the model chosen on validation bars; last: the model at the end of training. Online PPO shows its best.",
        "Behaviours are the rules as baselines: without the exploration of the data, and not bound by the agents' constraints.",
        f"Medians over seeds. Intervals: 95%; {medians.how}, then seeds; {resamples} draws.",
        f"The score is the {score}, for a relative risk aversion of {risk_aversion:g}: {SCORED[score][2]}.",
        f"Data: {_spread(run.offline['episodes'] for run in data)} episodes, {_spread(run.offline['steps'] for run in data)} "
        f"steps of {', '.join(behaviours)}. Their mean is that of the rewards, a year: on training bars, exploration included.",
    ]
    if beside is None:
        notes.append(f"No {ppo} was run on the same terms, so there is no share of its score.")
    else:
        notes.append(
            f"Shares: of the score of {beside} with the same seed; none where that is not above zero, no interval where it is "
            "not on every draw."
        )
    if absent := sorted(set(behaviours) - set(rules.values()) - set(ONLINE.values())):
        notes.append(f"Behaviours without a row of their own on the same terms: {', '.join(absent)}.")
    if one := [label(name) for name in learned if len(rows[name]) == 1]:
        notes.append(f"One seed only, so the interval knows nothing of luck in training: {', '.join(one)}.")
    shas = {}
    for run in data:
        shas.setdefault((run.seed, *run.behaviours), set()).add(run.offline["sha256"])
    if mixed := sorted({key[0] for key, found in shas.items() if len(found) > 1}):
        notes.append(f"Not all rows learned from the same data of these behaviours: seed {', '.join(map(str, mixed))}.")
    if lost:
        told = ", ".join(f"{label(run.exp_name)} seed {run.seed}" for run in lost)
        notes.append(f"{len(lost)} offline runs failed and do not count, see the red rows above: {told}.")
    return {
        "title": f"Offline on {env_id}: best and last, beside online PPO and the behaviours of the data",
        "columns": columns([*keys, "share"]), "rows": out, "notes": [*notes, *missing],
    }  # fmt: skip


def columns(keys: list[str]) -> list[dict]:
    """Of a table: `keys` of SCORED, each for best and last, and the counts."""
    out = []
    for key in keys:
        name, kind, text = SCORED[key]
        for suffix, which, model in (("", "best", "chosen on validation"), ("_last", "last", "at the end of training")):
            out.append(dict(key=key + suffix, label=f"{name}, {which}", kind=kind, help=f"{text}; model {model}"))
    return [
        *out,
        dict(key="seeds", label="seeds", kind="count", help="runs that count, one per seed"),
        dict(key="speed", label="steps/s", kind="count", help="gradient steps a second, median over seeds"),
    ]


def last_models(learned: dict[str, list[Run]]) -> tuple[dict[str, list[Run]], list[str]]:
    """Runs of offline rows with the ledger of the last model in the place of the best one's; and which have none, and why."""
    found: dict[str, list[Run]] = {}
    missing = []
    for name, runs in learned.items():
        for run in runs:
            try:
                last = replace(run, ledger=last_ledger(run))
                found.setdefault(_last(name), []).append(last)
            except (ValueError, OSError, KeyError, TypeError) as error:
                missing.append(f"{label(name)}, seed {run.seed}, has no last model: {' '.join(str(error).split())}.")
    return found, missing


def last_ledger(run: Run) -> pd.DataFrame:
    """Test split of the last model, of all folds where there are, on the bars of `run.ledger`. Raises ValueError without it."""
    frame = pd.concat([checked(part, LAST) for part in run.folds or (run,)], ignore_index=True)
    bars = pd.MultiIndex.from_frame(run.ledger[BARS])
    frame = frame[pd.MultiIndex.from_frame(frame[BARS]).isin(bars)].reset_index(drop=True)
    if not frame[BARS].equals(run.ledger[BARS]):
        raise ValueError(f"{LAST} holds other bars than ledger.parquet")
    return frame


def mean_rewards(data: list[Run], score: str) -> list[dict]:
    """Rows with the mean reward of what was learned from, as `score`: median over seeds, one row for each set of behaviours."""
    found: dict[str, dict[int, float]] = {}
    for run in data:
        parts = [part.offline for part in run.folds or (run,)]
        reward = np.average([part["mean_reward"] for part in parts], weights=[part["steps"] for part in parts])
        found.setdefault(", ".join(run.behaviours), {})[run.seed] = float(reward)
    return [
        {
            "name": "mean of the data" + (f" [{behaviours}]" if len(found) > 1 else ""),
            "detail": "rewards on training bars",
            "seeds": len(rewards),
            score: {"value": float(np.median(list(rewards.values()))), **NO_INTERVAL},
        }
        for behaviours, rewards in found.items()
    ]  # fmt: skip


def gradient_steps_per_second(runs: list[Run]) -> int | None:
    """Median over runs and folds; None where run.json does not say it."""
    speeds = [part.content.get("sps") for run in runs for part in run.folds or (run,)]
    speeds = [speed for speed in speeds if isinstance(speed, (int, float))]
    return round(float(np.median(speeds))) if speeds else None


def label(row: str) -> str:
    """Name of a row here: its script's, shortened, and what configuration it is."""
    script, space, rest = row.partition(" ")
    return LABELS.get(script, script) + space + rest


def _place(row: str) -> tuple[int, str]:
    script = row.partition(" ")[0]
    return (list(LABELS).index(script) if script in LABELS else len(LABELS)), row


def _last(row: str) -> str:
    return f"{row}, last"


def _is_rule(run: Run) -> bool:
    return run.exp_name.startswith("baseline-")


def _spread(numbers) -> str:
    """One number, or the lowest to the highest."""
    low, high = min(found := list(numbers)), max(found)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
