"""What suggests the parameters of a sweep: Optuna's samplers, and the cross-entropy method."""

import zlib
from collections.abc import Callable

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from scipy.stats import truncnorm

GENERATION, ELITE, SMOOTHING, LEAST_DEVIATION = 10, 0.3, 0.7, 0.02  # of the cross-entropy method


def make_sampler(name: str, seed: int) -> BaseSampler:
    """tpe, gp, cmaes, random or cem. Raises KeyError for any other."""
    if name == "cem":
        return CrossEntropy(seed)
    makers = {
        "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, constant_liar=True),
        "gp": lambda seed: GPSampler(seed=seed),
        "cmaes": lambda seed: CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda seed: RandomSampler(seed=seed),
    }
    return PerTrial(makers[name], seed)


class PerTrial(BaseSampler):
    """A sampler made anew for every trial, from the seed and the trial's number.

    What it suggests then depends on these and on the trials that have ended, but not on how often the study was interrupted;
    and workers that were given the same seed do not suggest the same.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self.make, self.seed = make, seed
        self.inner = make(seed)

    def infer_relative_search_space(self, study, trial):
        self.inner = self.make(int(np.random.SeedSequence((self.seed, trial.number)).generate_state(1)[0]))
        return self.inner.infer_relative_search_space(study, trial)

    def before_trial(self, study, trial):
        self.inner.before_trial(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values):
        self.inner.after_trial(study, trial, state, values)


class CrossEntropy(BaseSampler):
    """The cross-entropy method (Rubinstein 1999; de Boer et al. 2005, doi:10.1007/s10479-005-5724-z), maximising.

    Trials are counted in generations of GENERATION. Each parameter is drawn from a normal distribution within its bounds (on a
    logarithmic scale where it has one), or, categorical, by frequency. Mean, deviation and frequencies move from one
    generation to the next by SMOOTHING towards those of its ELITE; a deviation stays above LEAST_DEVIATION of the range, and
    a choice above that share of an equal frequency. Pruned and failed trials are no elite. All of it follows from the trials
    in the storage.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        rng = np.random.default_rng((self.seed, trial.number, zlib.crc32(param_name.encode())))
        elites = self._elites(study, trial.number // GENERATION, param_name)
        if isinstance(param_distribution, CategoricalDistribution):
            choices = param_distribution.choices
            share = np.full(len(choices), 1.0 / len(choices))
            for values in elites:
                told = np.array([sum(value == choice for value in values) for choice in choices]) / len(values)
                share = SMOOTHING * told + (1.0 - SMOOTHING) * share
            share = (1.0 - LEAST_DEVIATION) * share + LEAST_DEVIATION / len(choices)
            return choices[rng.choice(len(choices), p=share)]
        scale, back = (np.log, np.exp) if param_distribution.log else (np.asarray, float)
        low, high = (float(scale(bound)) for bound in (param_distribution.low, param_distribution.high))
        mean, deviation = 0.5 * (low + high), 0.5 * (high - low)
        for values in elites:
            values = scale(np.array(values, float))
            mean = SMOOTHING * values.mean() + (1.0 - SMOOTHING) * mean
            deviation = SMOOTHING * values.std() + (1.0 - SMOOTHING) * deviation
        deviation = max(deviation, LEAST_DEVIATION * (high - low))
        drawn = truncnorm.ppf(rng.random(), (low - mean) / deviation, (high - mean) / deviation, mean, deviation)
        drawn = float(np.clip(back(drawn), param_distribution.low, param_distribution.high))
        return round(drawn) if isinstance(param_distribution, IntDistribution) else drawn

    @staticmethod
    def _elites(study: optuna.Study, generations: int, name: str) -> list[list]:
        """Values of a parameter in the best trials of each earlier generation; none where fewer than two were completed."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        found = []
        for generation in range(generations):
            ranked = sorted((t for t in done if t.number // GENERATION == generation), key=lambda t: -t.value)
            if len(ranked) >= 2:
                found.append([t.params[name] for t in ranked[: max(2, round(ELITE * len(ranked)))]])
        return found
