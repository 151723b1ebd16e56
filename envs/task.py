"""The market that offline data came from, as JSON in the data's meta, and rebuilt from it: panel, splits, terms, backtests."""

from dataclasses import asdict

import pandas as pd

from envs import portfolio_references, references
from envs.dataset import Dataset, DatasetError
from envs.leadlag import LeadLagVectorEnv
from envs.leadlag_tables import LeadLagConfig, LeadLagData
from envs.ledger import Policy, describe_panel, growth
from envs.portfolio import PortfolioVectorEnv, RegimeGuard
from envs.portfolio_tables import PortfolioConfig, PortfolioData
from envs.synthetic import load_market

MARKET = ("market", "seed", "symbols", "start", "end", "resample")
SPLITS = ("train_fraction", "val_fraction", "embargo", "folds", "fold")
SERIES = ("columns", "series", "series_lag")  # what Portfolio-v0 may read besides prices
MARKETS = {
    "LeadLag-v0": (LeadLagConfig, LeadLagData, LeadLagVectorEnv, references),
    "Portfolio-v0": (PortfolioConfig, PortfolioData, PortfolioVectorEnv, portfolio_references),
}


def describe_task(env_id: str, args, config: LeadLagConfig | PortfolioConfig, **options) -> dict:
    """JSON of a market: `args` has the flags of MARKET, SPLITS and perhaps SERIES; options: those of the vector env."""
    options = {name: asdict(value) if isinstance(value, RegimeGuard) else value for name, value in options.items()}
    flags = {name: getattr(args, name) for name in (*MARKET, *SPLITS, *SERIES) if hasattr(args, name)}
    return {"env_id": env_id, **flags, "config": asdict(config), "options": options}


def provenance(
    task: dict, panel_sha256: str, costs: dict, git_commit: str | None, gamma: float, behaviours: list[dict]
) -> dict:
    """What a dataset's meta says of data logged on the training split of a market."""
    return {
        "env_id": task["env_id"], "panel_sha256": panel_sha256, "costs": costs, "git_commit": git_commit,
        "behaviours": behaviours, "seed": task["seed"], "split": "train", "gamma": gamma, "reward_scale": 1.0, "task": task,
    }  # fmt: skip


class Task:
    """A market rebuilt from what `describe_task` said of it. Attributes: panel, splits, data, options.

    Raises ValueError where the panel cannot be read, is not the one of `sha256` any more, or a field is wrong.
    """

    def __init__(self, task: dict, sha256: str | None = None):
        self.env_id = task["env_id"]
        if self.env_id not in MARKETS:
            raise ValueError(f"task: env_id {self.env_id!r}: expected one of {list(MARKETS)}")
        config, tables, self._vector_env, self._references = MARKETS[self.env_id]
        series = {name: task[name] for name in SERIES if name in task}
        self.panel = load_market(
            task["market"], task["seed"], symbols=task["symbols"] or None, start=task["start"], end=task["end"],
            resample=task["resample"], **series,
        )  # fmt: skip
        if sha256 is not None and self.panel.sha256 != sha256:
            raise ValueError(
                f"market {task['market']}: sha256 {self.panel.sha256}: expected {sha256}, that of the data's panel"
            )
        if task["folds"]:
            folds = self.panel.walk_forward(task["folds"], val_fraction=task["val_fraction"], embargo=task["embargo"])
            self.splits = folds[task["fold"]]
        else:
            self.splits = self.panel.split(task["train_fraction"], task["val_fraction"], task["embargo"])
        self.data = tables(self.panel, config(**task["config"]))
        self.options = dict(task["options"])
        if "guard" in self.options:
            self.options["guard"] = RegimeGuard(**self.options["guard"])
        self.risk_aversion = 1.0 + 2.0 * self.options.get("reward_weights", {}).get("variance", 0.0)

    @classmethod
    def of(cls, dataset: Dataset) -> "Task | None":
        """The market of a dataset; None if its meta names none."""
        task = dataset.meta.get("task")
        if task is None or task["env_id"] not in MARKETS:
            return None
        try:
            return cls(task, dataset.meta["panel_sha256"])
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{dataset.path}: task: {error}: expected what describe_task makes") from error

    def make(self, num_envs: int, split: str = "train", **changes):
        """Vector env of random episodes of a split."""
        return self._vector_env(num_envs, data=self.data, split=self.splits[split], **{**self.options, **changes})

    def run(self, split: str, policy: Policy) -> pd.DataFrame:
        """Ledger of a policy from the start to the end of every range of a split."""
        options = {name: value for name, value in self.options.items() if name != "episode_length"}
        return self._references.run(self.data, self.splits[split], policy, **options)

    def score(self, frame: pd.DataFrame) -> float:
        """What validation maximises, per year: net log growth on LeadLag-v0, utility on Portfolio-v0."""
        if self.env_id == "LeadLag-v0":
            return float(growth(frame).mean() * self.panel.bars_per_year)
        return portfolio_references.utility(frame, self.risk_aversion, self.panel.bars_per_year)

    def compare(self, seed: int) -> dict[str, pd.DataFrame]:
        """Ledgers on the test split of the market's references."""
        if self.env_id == "LeadLag-v0":
            return references.references(self.data, self.splits, seed)
        return portfolio_references.references(self.data, self.splits["test"], self.risk_aversion)

    def describe(self) -> dict:
        """`panel` and `market` of a run.json, as the online scripts write them."""
        market = self.data.describe()
        return {"panel": describe_panel(self.panel, self.splits), "market": market}
