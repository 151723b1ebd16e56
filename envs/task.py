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
FIELDS = ("env_id", *MARKET, *SPLITS, "config", "options")  # of every market
MARKETS = {
    "LeadLag-v0": (LeadLagConfig, LeadLagData, LeadLagVectorEnv, references),
    "Portfolio-v0": (PortfolioConfig, PortfolioData, PortfolioVectorEnv, portfolio_references),
}


def describe_task(env_id: str, args, config: LeadLagConfig | PortfolioConfig, **options) -> dict:
    """A market as JSON can hold it: what `Task` takes.

    args: has the flags of MARKET and SPLITS, and perhaps those of SERIES. options: of the vector env of `env_id`, besides data
    and split: what defines its actions, rewards, guards and episodes.

    Raises AttributeError for a flag that is missing, ValueError for an environment whose market cannot be rebuilt.
    """
    if env_id not in MARKETS:
        raise ValueError(f"env_id {env_id!r}: its data cannot be logged; expected one of {list(MARKETS)}")
    options = {name: asdict(value) if isinstance(value, RegimeGuard) else value for name, value in options.items()}
    flags = {name: getattr(args, name) for name in (*MARKET, *SPLITS)}
    flags |= {name: getattr(args, name) for name in SERIES if hasattr(args, name)}
    return {"env_id": env_id, **flags, "config": asdict(config), "options": options}


def provenance(
    task: dict, panel_sha256: str, costs: dict, git_commit: str | None, gamma: float, behaviours: list[dict]
) -> dict:
    """What a dataset's meta says of data logged on the training split of a market; `dataset.PROVENANCE`, and the task.

    task: of `describe_task`, or, for another Gymnasium id, its env_id and seed. costs: the cost model in full, as JSON can hold
    it. behaviours: the policies that acted. Rewards are the environment's, unscaled.
    """
    return {
        "env_id": task["env_id"], "panel_sha256": panel_sha256, "costs": costs, "git_commit": git_commit,
        "behaviours": behaviours, "seed": task["seed"], "split": "train", "gamma": gamma, "reward_scale": 1.0, "task": task,
    }  # fmt: skip


class Task:
    """A market rebuilt from `task`, what `describe_task` said of it, as it was or read from JSON.

    sha256: of the panel that it must be; None: any. Attributes: env_id, panel, splits, data (LeadLagData or PortfolioData),
    options (of the vector env), risk_aversion (of `score`).

    Raises ValueError naming the field that is missing or wrong, and where the panel cannot be read, or is another one.
    """

    def __init__(self, task: dict, sha256: str | None = None):
        self.env_id = task.get("env_id")
        if self.env_id not in MARKETS:
            raise ValueError(f"task: env_id {self.env_id!r}: expected one of {list(MARKETS)}")
        missing = [name for name in FIELDS if name not in task]
        if missing:
            raise ValueError(f"task: missing {missing}; expected what describe_task makes")
        config, tables, self._vector_env, self._references = MARKETS[self.env_id]
        series = {name: task[name] for name in SERIES if name in task}
        try:
            self.panel = load_market(
                task["market"], task["seed"], symbols=task["symbols"] or None, start=task["start"], end=task["end"],
                resample=task["resample"], **series,
            )  # fmt: skip
            if sha256 is not None and self.panel.sha256 != sha256:
                raise ValueError(f"market {task['market']}: sha256 {self.panel.sha256}: expected {sha256}, the data's panel")
            if task["folds"]:
                if not 0 <= task["fold"] < task["folds"]:
                    raise ValueError(f"task: fold {task['fold']}: expected 0 to {task['folds'] - 1}")
                folds = self.panel.walk_forward(task["folds"], val_fraction=task["val_fraction"], embargo=task["embargo"])
                self.splits = folds[task["fold"]]
            else:
                self.splits = self.panel.split(task["train_fraction"], task["val_fraction"], task["embargo"])
            self.data = tables(self.panel, config(**task["config"]))
            self.options = dict(task["options"])
            if "guard" in self.options:
                self.options["guard"] = RegimeGuard(**self.options["guard"])
            self.risk_aversion = 1.0 + 2.0 * self.options.get("reward_weights", {}).get("variance", 0.0)
            self.make(1)  # what is wrong with an option is said now
        except TypeError as error:  # an unknown field of config or guard, by its name; a value of another type
            raise ValueError(f"task: {error}; expected what describe_task makes") from error

    @classmethod
    def of(cls, dataset: Dataset) -> "Task | None":
        """The market of a dataset; None if its meta names none: data from elsewhere, or of another Gymnasium id.

        Raises DatasetError naming the dataset, and what `Task` says.
        """
        task = dataset.meta.get("task")
        if task is None or (task.get("env_id") not in MARKETS and "market" not in task):
            return None
        try:
            return cls(task, dataset.meta["panel_sha256"])
        except ValueError as error:
            raise DatasetError(f"{dataset.path}: {error}") from error

    def make(self, num_envs: int, split: str = "train", **changes):
        """Vector env of `num_envs` markets with random episodes of a split (train, val or test). changes: other options of it,
        and what it takes besides, such as num_threads.
        """
        return self._vector_env(num_envs, data=self.data, split=self.splits[split], **{**self.options, **changes})

    def run(self, split: str, policy: Policy) -> pd.DataFrame:
        """Ledger of a policy from the start to the end of every range of a split, as the online scripts' backtests keep it."""
        options = {name: value for name, value in self.options.items() if name != "episode_length"}
        return self._references.run(self.data, self.splits[split], policy, **options)

    def score(self, frame: pd.DataFrame) -> float:
        """What validation maximises, of a ledger, per year: net log growth on LeadLag-v0, on Portfolio-v0 the utility
        (`portfolio_references.utility`) at the risk aversion that the penalty on variance stands for, 1 + 2 times it.
        """
        if self.env_id == "LeadLag-v0":
            return float(growth(frame).mean() * self.panel.bars_per_year)
        return portfolio_references.utility(frame, self.risk_aversion, self.panel.bars_per_year)

    def compare(self, seed: int) -> dict[str, pd.DataFrame]:
        """Ledgers on the test split of the market's references, by name; seed: of those that choose at random."""
        if self.env_id == "LeadLag-v0":
            return references.references(self.data, self.splits, seed)
        return portfolio_references.references(self.data, self.splits["test"], self.risk_aversion)

    def describe(self) -> dict:
        """`panel` and `market` of a run.json, as the online scripts write them."""
        return {"panel": describe_panel(self.panel, self.splits), "market": self.data.describe()}
