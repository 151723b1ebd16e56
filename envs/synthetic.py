"""Markets whose best policy is known, drawn from a seed; and `load_market`, which turns any `--market` into a panel.

`synthetic:<name>[:key=value...]` draws independent price histories for training, validation and test, each from a
seed of its own, so that evaluation always runs on markets that training never saw. The truth (regime, expected
return) is kept in `panel.hidden` for oracles and is never part of an observation.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit
from scipy.signal import lfilter
from scipy.stats import norm

from envs.costs import parse_values
from envs.files import load_panel
from envs.histories import INTRADAY, OVERNIGHT, Histories
from envs.mixed import PREFIX, is_mixed, mix, parse_mixed
from envs.panel import SPLIT_NAMES, Panel, PanelError
from envs.randomisation import drawn_or_number, randomised
from envs.resampled import is_resampled, resampled, source_of
from envs.synthetic_modes import Modes

SLOW, FAST = 0, 1  # values of hidden["regime"] on the lead-lag market
OPEN, CROWDED = 0, 1  # and on the hidden one
WARM_UP = 60  # bars before Portfolio-v0's first decision, at which an option is sold


@dataclass(frozen=True)
class LeadLag(Histories):
    """Leaders move first, followers copy them one bar later; who leads is redrawn, slowly or fast.

    A follower's next bar holds `beta` times its volatility times the leaders' standardised mean shock; a leader's
    holds `-retrace` times as much of the followers' (it gives back what they overdo), so that a lookback which still
    sees the network of yesterday loses. In the slow regime the network lasts `life_slow` bars and is faint: only a long
    lookback can see it. In the fast regime it is strong, and leaders and followers change places every `life_fast`
    bars: only a short one keeps up. The volatilities (per bar) tell the regimes apart. Durations are exponential.
    """

    leaders: int = 4
    followers: int = 4
    beta_slow: float = 0.14
    beta_fast: float = 0.6
    retrace: float = 1.0
    vol_slow: float = 0.02
    vol_fast: float = 0.01
    life_slow: float = 800.0
    life_fast: float = 50.0
    regime_bars: float = 300.0
    lag: int = 1

    def __post_init__(self):
        Histories.__post_init__(self)
        self.expect(lag=1, life_slow=1, life_fast=1, regime_bars=1, vol_slow=0, vol_fast=0)
        if self.leaders < 1 or self.followers < 1 or self.leaders + self.followers > self.assets:
            raise ValueError(
                f"synthetic:leadlag: leaders={self.leaders}, followers={self.followers}: expected at least 1 of each, "
                f"together at most assets={self.assets}"
            )

    def draw(self, rng: np.random.Generator):
        """Overnight and intraday log returns (bars, assets); the truth by name; extra series that agents see, by name."""
        overnight = OVERNIGHT * rng.standard_normal((self.bars, self.assets))
        intraday = INTRADAY * rng.standard_normal((self.bars, self.assets))
        orders = np.argsort(rng.random((self.bars, self.assets)), axis=1)
        regime, expected = _leadlag(
            overnight, intraday, orders, rng.random((self.bars, 2)), self.leaders, self.followers, self.lag,
            (self.beta_slow, self.beta_fast), (self.vol_slow, self.vol_fast), (self.life_slow, self.life_fast),
            self.retrace, self.regime_bars,
        )  # fmt: skip
        return overnight, intraday, {"regime": regime, "expected_return": expected}, {}


@njit(cache=True, error_model="numpy")
def _leadlag(overnight, intraday, orders, uniform, leaders, followers, lag, beta, vol, life, retrace, regime_bars):
    """Scale the standard shocks in place and plant the network; returns the regime and the expected return per bar.

    expected[t] is the mean log return of bar t's session given the shocks of earlier bars.
    """
    bars, assets = overnight.shape
    regime, expected = np.zeros(bars, np.int64), np.zeros((bars, assets))
    shock = np.zeros((bars, assets))
    leader, follower = orders[0, :leaders].copy(), orders[0, leaders : leaders + followers].copy()
    now = SLOW if uniform[0, 0] < 0.5 else FAST
    for t in range(bars):
        if t > 0 and uniform[t, 0] < 1.0 / regime_bars:
            now = FAST if now == SLOW else SLOW
        if t > 0 and uniform[t, 1] < 1.0 / life[now]:
            if now == FAST and leaders == followers:
                leader, follower = follower, leader
            else:
                leader, follower = orders[t, :leaders].copy(), orders[t, leaders : leaders + followers].copy()
        regime[t] = now
        for i in range(assets):
            overnight[t, i] *= vol[now]
            intraday[t, i] *= vol[now]
            shock[t, i] = overnight[t, i] + intraday[t, i]
        lead, back = 0.0, 0.0
        if t >= lag:
            for i in leader:
                lead += shock[t - lag, i] / np.sqrt(leaders)
            for i in follower:
                back += shock[t - lag, i] / np.sqrt(followers)
        for i in follower:
            expected[t, i] = beta[now] * lead
        for i in leader:
            expected[t, i] = -retrace * beta[now] * back
        for i in range(assets):
            intraday[t, i] += expected[t, i] - 0.5 * vol[now] ** 2  # driftless in simple returns
    return regime, expected


@dataclass(frozen=True)
class Hidden(Histories):
    """A lead-lag market whose regime cannot be seen in one bar: only the history of the news reveals it.

    One half of the assets has a faint network of leaders and followers that lasts `life_slow` bars, which only a long lookback
    sees; the other half a strong one whose sides change places every `life_fast` bars, which a short lookback sees and a long
    one sees nothing of. Followers react in the session. But while the regime is CROWDED, those of the strong network react
    overnight, twice as much, and the session takes half of it back: who orders at the close what short lookbacks say, to be
    filled at the open, loses then what it earns while the regime is OPEN. From close to close both are the same: no lagged
    correlation tells them apart. The extra series "news" does, slowly: each bar's is standard normal around `news` while OPEN,
    around -`news` while CROWDED, so that one bar's is right in Phi(news) of cases (0.66 for 0.4), and a memory of many in
    nearly all. A regime lasts `regime_bars` on average. Volatilities and strengths are per bar. All assets
    drift by `drift`, in units of vol, in the session while OPEN, and by its opposite while CROWDED.
    """

    leaders: int = 2
    followers: int = 3
    beta_slow: float = 0.2
    beta_fast: float = 1.5
    vol: float = 0.01
    life_slow: float = 10_000.0
    life_fast: int = 80
    regime_bars: float = 150.0
    news: float = 0.4
    drift: float = 0.0

    def __post_init__(self):
        Histories.__post_init__(self)
        self.expect(vol=0, life_slow=1, life_fast=1, regime_bars=1)
        if self.assets % 2 or min(self.leaders, self.followers) < 1 or self.leaders + self.followers > self.assets // 2:
            raise ValueError(
                f"synthetic:hidden: leaders={self.leaders}, followers={self.followers}, assets={self.assets}: expected an even "
                "number of assets, half of them at least as many as leaders and followers, of which there are 1 or more"
            )

    def draw(self, rng: np.random.Generator):
        changes = np.append(True, rng.random(self.bars - 1) < 1.0 / self.regime_bars)
        regime = (rng.integers(2) + np.cumsum(changes)) % 2
        overnight = OVERNIGHT * rng.standard_normal((self.bars, self.assets))
        intraday = INTRADAY * rng.standard_normal((self.bars, self.assets))
        shock = overnight + intraday
        first, second = np.split(rng.permutation(self.assets), 2)
        faint, strong = np.zeros_like(shock), np.zeros_like(shock)
        renewed = np.cumsum(rng.random(self.bars) < 1.0 / self.life_slow)
        roles = rng.permuted(np.tile(self._sides(), (renewed[-1] + 1, 1)), axis=1)[renewed]
        faint[:, first] = self.beta_slow * self._reaction(shock[:, first], roles)
        swapped = (np.arange(self.bars) + rng.integers(self.life_fast)) // self.life_fast % 2
        roles = np.where(swapped[:, None], -1.0, 1.0) * rng.permuted(self._sides())
        strong[:, second] = self.beta_fast * self._reaction(shock[:, second], roles)
        crowded = (regime == CROWDED)[:, None]
        expected = faint + np.where(crowded, -strong - self.drift, strong + self.drift)  # of the session
        intraday += expected
        overnight += np.where(crowded, 2.0 * strong, 0.0)
        expected *= self.vol
        return (
            self.vol * overnight,
            self.vol * intraday - 0.5 * self.vol**2,
            {"regime": regime, "expected_return": expected},
            {"news": rng.standard_normal(self.bars) + np.where(regime == CROWDED, -self.news, self.news)},
        )

    def _sides(self) -> np.ndarray:
        """(assets / 2,): 1 leads, -1 follows, 0 neither."""
        return np.repeat([1.0, -1.0, 0.0], [self.leaders, self.followers, self.assets // 2 - self.leaders - self.followers])

    @staticmethod
    def _reaction(shock: np.ndarray, roles: np.ndarray) -> np.ndarray:
        """(bars, assets) what followers add to their own shocks: the standardised mean of the leaders' of the bar before."""
        out = np.zeros_like(shock)
        leading = roles[1:] == 1.0
        lead = (leading * shock[:-1]).sum(axis=1) / np.sqrt(np.maximum(leading.sum(axis=1), 1))
        out[1:] = (roles[1:] == -1.0) * lead[:, None]
        return out


@dataclass(frozen=True)
class Noise(Histories):
    """Driftless random walks: no policy earns anything before costs, and every trade loses after them."""

    vol: float = 0.012

    def __post_init__(self):
        Histories.__post_init__(self)
        self.expect(vol=0)

    def draw(self, rng: np.random.Generator):
        overnight = self.vol * OVERNIGHT * rng.standard_normal((self.bars, self.assets))
        intraday = self.vol * INTRADAY * rng.standard_normal((self.bars, self.assets))
        # simple returns, not log returns, must have mean 0
        overnight -= 0.5 * (self.vol * OVERNIGHT) ** 2
        intraday -= 0.5 * (self.vol * INTRADAY) ** 2
        return overnight, intraday, {}, {}


@dataclass(frozen=True)
class GarleanuPedersen(Histories):
    """Returns that are predictable for a while, to be traded against quadratic costs (Garleanu & Pedersen 2013).

    Symbol i's simple return of bar t+1 is factor f_i(t), known at the close of bar t, plus noise; f_i reverts to 0 by the
    share `reversion` a bar, slow for the even symbols, fast for the odd ones. No gaps: a bar opens where the last one closed.
    The factor is the panel's extra series "factor". With `sign` -1 the return is the opposite of what it says.
    """

    assets: int = 4
    train: int = 100
    sign: float = 1.0
    vol: float = 0.01
    strength: float = 0.2  # standard deviation of the factor, in units of vol
    reversion_slow: float = 0.03
    reversion_fast: float = 0.2

    def __post_init__(self):
        Histories.__post_init__(self)
        for key in ("vol", "strength"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"synthetic market: {key}={getattr(self, key)}: expected a number between 0 and 1")
        if abs(self.sign) != 1:
            raise ValueError(f"synthetic market: sign={self.sign}: expected 1 or -1")
        for key in ("reversion_slow", "reversion_fast"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"synthetic market: {key}={getattr(self, key)}: expected a number in (0, 1]")

    def draw(self, rng: np.random.Generator):
        shape = (self.bars, self.assets)
        reversion = np.resize([self.reversion_slow, self.reversion_fast], self.assets)
        factor = rng.standard_normal(shape)
        factor[1:] *= np.sqrt(1.0 - (1.0 - reversion) ** 2)
        for t in range(1, self.bars):
            factor[t] += (1.0 - reversion) * factor[t - 1]
        factor *= self.strength * self.vol
        expected = self.sign * np.concatenate([np.zeros((1, self.assets)), factor[:-1]])
        returns = np.maximum(expected + self.vol * rng.standard_normal(shape), -0.99)
        hidden = {"expected_return": expected, "reversion": np.tile(reversion, (self.bars, 1))}
        hidden["volatility"] = np.full(shape, self.vol)
        return np.zeros(shape), np.log1p(returns), hidden, {"factor": factor}


@dataclass(frozen=True)
class Merton(Histories):
    """Geometric Brownian motion without gaps: the best weight is the Merton fraction, drift / (risk aversion * vol^2).

    Bars are coarse and histories many: the standard error of a drift estimated from T bars is vol / sqrt(T).
    """

    assets: int = 1
    train: int = 200
    drift: float = 0.006  # of the simple return per bar
    vol: float = 0.1

    def __post_init__(self):
        Histories.__post_init__(self)
        self.expect_inside(vol=(0, 1))
        if not -1 < self.drift < 1:
            raise ValueError(f"synthetic market: drift={self.drift}: expected a number between -1 and 1")

    def draw(self, rng: np.random.Generator):
        shape = (self.bars, self.assets)
        returns = np.log1p(self.drift) - 0.5 * self.vol**2 + self.vol * rng.standard_normal(shape)
        hidden = {"expected_return": np.full(shape, self.drift), "volatility": np.full(shape, self.vol)}
        return np.zeros(shape), returns, hidden, {}


@dataclass(frozen=True)
class BlackScholes(Histories):
    """A call option, sold at the money WARM_UP bars into each history and due at its last bar, to be hedged with the share
    that it is on: geometric Brownian motion without drift, interest or gaps (Black & Scholes 1973).

    Extra series of the symbol: `moneyness`, log(price / strike) in standard deviations of what is left of the option's
    life, and `maturity`, that part of its life. In `hidden`: `delta`, the number of shares to hold, and `liability`, the payoff
    at the last bar. Money is in units of the price of the share when the option was sold: an account of 1 can buy one.
    """

    assets: int = 1
    bars: int = 91
    train: int = 5000
    val: int = 200
    test: int = 200
    life_vol: float = 0.2  # of the log price over the option's life
    fewest_bars: ClassVar[int] = WARM_UP + 3

    def __post_init__(self):
        Histories.__post_init__(self)
        if self.assets != 1:
            raise ValueError(f"synthetic market: assets={self.assets}: expected 1, the share that the option is on")
        if not 0 < self.life_vol < 1:
            raise ValueError(f"synthetic market: life_vol={self.life_vol}: expected a number between 0 and 1")

    def draw(self, rng: np.random.Generator):
        life = self.bars - WARM_UP - 1
        vol = self.life_vol / np.sqrt(life)
        returns = -0.5 * vol**2 + vol * rng.standard_normal((self.bars, 1))
        price = np.cumsum(returns)
        price -= price[WARM_UP]  # log, in units of the strike
        left = np.clip(1.0 - np.arange(-WARM_UP, life + 1) / life, 0.0, 1.0)
        deviation = self.life_vol * np.sqrt(np.maximum(left, 0.5 / life))  # at expiry all is known: no division by 0
        moneyness = price / deviation
        liability = np.zeros(self.bars)
        liability[-1] = max(0.0, np.expm1(price[-1]))
        hidden = {"delta": norm.cdf(moneyness + 0.5 * deviation)[:, None], "liability": liability}
        return np.zeros((self.bars, 1)), returns, hidden, {"moneyness": moneyness[:, None], "maturity": left[:, None]}


@dataclass(frozen=True)
class Tail(Histories):
    """S00 earns more on average and crashes now and then; S01 earns less, the same in every bar, and never crashes.

    Log returns of a bar: S00 `gain` plus noise of standard deviation `vol`, and -`crash` more in the share `probability` of the
    bars, which nothing foretells; S01 `steady`. Whoever maximises the mean holds S00, whoever maximises the conditional value
    at risk of a small enough share of bars or episodes holds S01: `portfolio_references.tail_flip` says from which share on.
    """

    assets: int = 2
    train: int = 20
    gain: float = 0.01
    vol: float = 0.002
    crash: float = 0.11
    probability: float = 0.02
    steady: float = 0.003

    def __post_init__(self):
        Histories.__post_init__(self)
        if self.assets != 2:
            raise ValueError(f"synthetic market: assets={self.assets}: expected 2, one that crashes and one that does not")
        for key in ("gain", "vol", "crash", "probability", "steady"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"synthetic market: {key}={getattr(self, key)}: expected a number between 0 and 1")
        if not self.gain - self.probability * self.crash > self.steady:
            raise ValueError(
                f"synthetic market: steady={self.steady}: expected less than gain - probability * crash = "
                f"{self.gain - self.probability * self.crash:g}, so that the mean prefers the symbol that crashes"
            )

    def draw(self, rng: np.random.Generator):
        crashed = rng.random(self.bars) < self.probability
        risky = self.gain + self.vol * rng.standard_normal(self.bars) - self.crash * crashed
        returns = np.column_stack([risky, np.full(self.bars, self.steady)])
        truth = {
            "calm_growth": (self.gain, self.steady), "volatility": (self.vol, 0.0), "crash": (self.crash, 0.0),
            "crash_probability": (self.probability, 0.0),
        }  # fmt: skip
        return np.zeros(returns.shape), returns, {key: np.tile(value, (self.bars, 1)) for key, value in truth.items()}, {}


@dataclass(frozen=True)
class OrnsteinUhlenbeck(Histories):
    """Log prices that revert to a level: buying low pays, and costs make it best to do nothing inside a band.

    The deviation of an asset's log price from its level is an Ornstein-Uhlenbeck process, sampled at opens and closes; the
    night is OVERNIGHT^2 of a bar. It halves in `half_life` bars, on average; `vol` is the standard deviation of what a bar
    adds. Histories begin in the stationary distribution; assets are independent. In `hidden`: `deviation` at the close,
    `half_life` and `volatility`; `trading_references.optimal_band` says what is best.
    """

    train: int = 20
    half_life: float = 5.0
    vol: float = 0.001  # small, so that costs matter: buying below the level and selling above earns 0.7 of what the band does

    def __post_init__(self):
        Histories.__post_init__(self)
        self.expect(half_life=0.5)
        self.expect_inside(vol=(0, 1))

    def draw(self, rng: np.random.Generator):
        shape = (self.bars, self.assets)
        keep, _ = reversion(self.half_life, self.vol)
        (keep_night, night), (keep_day, day) = (reversion(self.half_life, self.vol, part**2) for part in (OVERNIGHT, INTRADAY))
        shocks = night * rng.standard_normal(shape), day * rng.standard_normal(shape)
        start = stationary_deviation(self.half_life, self.vol) * rng.standard_normal(self.assets)
        added = keep_day * shocks[0] + shocks[1]  # by a whole bar
        added[0] = start
        deviation = lfilter([1.0], [1.0, -keep], added, axis=0)
        before = np.concatenate([np.zeros((1, self.assets)), deviation[:-1]])
        opened = keep_night * before + shocks[0]
        opened[0] = 0.0
        hidden = {"deviation": deviation, "half_life": np.full(shape, self.half_life), "volatility": np.full(shape, self.vol)}
        return opened - before, deviation - opened, hidden, {}


def reversion(half_life: float, vol: float, share: float = 1.0) -> tuple[float, float]:
    """What `share` of a bar leaves of an Ornstein-Uhlenbeck deviation, and the standard deviation of what it adds.

    half_life in bars; vol is what a whole bar adds. A share s adds vol * sqrt((1 - k^2s) / (1 - k^2)), k = 2^(-1 / half_life).
    """
    keep = 0.5 ** (1.0 / half_life)
    return keep**share, vol * np.sqrt((1.0 - keep ** (2.0 * share)) / (1.0 - keep**2))


def stationary_deviation(half_life: float, vol: float) -> float:
    """Standard deviation of the stationary distribution of the deviation."""
    return vol / np.sqrt(1.0 - 0.5 ** (2.0 / half_life))


MARKETS = {
    "leadlag": LeadLag, "hidden": Hidden, "noise": Noise, "garleanu-pedersen": GarleanuPedersen, "merton": Merton,
    "black-scholes": BlackScholes, "tail": Tail, "ou": OrnsteinUhlenbeck, "modes": Modes,
}  # fmt: skip


def make_panel(spec: str, seed: int = 0) -> Panel:
    """The panel of `synthetic:<name>[:key=value...]`: its histories one after another, labelled train, val, test.

    A value may be one that every history draws for itself (`envs/randomisation.py`), which `Panel.parameters` then holds.
    History j of a split is drawn from the seed sequence (seed, split, j) alone: the test markets do not depend on
    how many training markets there are. Raises PanelError naming the flag, the key, and what was expected.
    """
    _, _, rest = spec.partition(":")
    name, _, options = rest.partition(":")
    if name not in MARKETS:
        raise PanelError(f"--market {spec}: unknown synthetic market {name!r}; expected one of {sorted(MARKETS)}")
    flag, default = f"--market {spec}", MARKETS[name]()
    try:
        values = parse_values(options, default, flag, drawn_or_number)
    except ValueError as error:
        raise PanelError(str(error)) from None
    try:
        histories, configs, parameters = randomised(default, values, seed)
    except ValueError as error:
        raise PanelError(f"{flag}: {error}") from None
    config = configs[0]
    drawn = [own.draw(np.random.default_rng([seed, *key])) for own, key in zip(configs, histories)]
    segments = np.arange(len(drawn)) * config.bars
    overnight, intraday = (np.stack([d[part] for d in drawn]) for part in (0, 1))
    log_close = np.log(100.0) + np.cumsum(overnight + intraday, axis=1)
    close, open_ = np.exp(log_close), np.exp(log_close - intraday)
    # the range of a bar: a few ticks beyond open and close, from a generator of its own for each history
    draws = [np.random.default_rng([seed, *key, 1]).exponential(0.25, (2, *close.shape[1:])) for key in histories]
    reach = np.stack(draws, axis=1) * np.abs(intraday)
    shape = (-1, config.assets)
    calendar = np.busday_offset("2000-01-03", np.arange(config.bars), roll="forward").astype("datetime64[ns]")
    return Panel(
        name=spec,
        timestamps=np.tile(calendar, len(drawn)),
        symbols=tuple(f"S{i:02d}" for i in range(config.assets)),
        close=close.reshape(shape),
        open=open_.reshape(shape),
        high=(np.maximum(open_, close) * np.exp(reach[0])).reshape(shape),
        low=(np.minimum(open_, close) * np.exp(-reach[1])).reshape(shape),
        volume=np.full((len(drawn) * config.bars, config.assets), 1e6),
        segments=segments,
        segment_split=tuple(SPLIT_NAMES[split] for split, _ in histories),
        hidden={key: np.concatenate([d[2][key] for d in drawn]) for key in drawn[0][2]},
        extras={key: np.concatenate([d[3][key] for d in drawn]) for key in drawn[0][3]},
        timezone=None,
        parameters=parameters,
    )


def load_market(spec: str, seed: int = 0, **selection) -> Panel:
    """The panel that `--market` names: a synthetic one drawn from `seed`, any that `load_panel` reads, or one made of
    another market by a prefix (`envs/resampled.py`, `envs/mixed.py`), drawn from `seed` too.

    `selection` (symbols, start, columns, ...) is passed on to `load_panel`, by a prefix to its market; a synthetic market
    takes none of it, but for series_lag, which says nothing by itself. Raises PanelError as these do.
    """
    if is_mixed(spec):
        config, options, market = parse_mixed(spec)
        source = load_market(market, seed, **selection)
        own = f"synthetic:{config.synthetic}:assets={source.num_symbols}:val=1:test=1:{options}".rstrip(":")
        # of a seed of its own: a synthetic source, or a prefix in it, would have the same training histories
        other_seed = int(np.random.SeedSequence([seed, spec.split(":").count(PREFIX)]).generate_state(1)[0])
        try:
            return mix(spec, source, make_panel(own, other_seed), config.share)
        except PanelError as error:
            raise PanelError(f"--market {spec}: {error}") from None
    if is_resampled(spec):
        return resampled(spec, load_market(source_of(spec), seed, **selection), seed)
    if not spec.startswith("synthetic:"):
        return load_panel(spec, **selection)
    given = [key for key, value in selection.items() if value and key != "series_lag"]
    if given:
        raise PanelError(f"--market {spec}: a synthetic market takes no --{given[0]}; expected key=value options in its name")
    return make_panel(spec, seed)


def drawn_from_seed(spec: str) -> bool:
    """Whether every seed has prices of its own on the market `spec`: what `load_market` does not simply read."""
    return spec.startswith("synthetic:") or is_resampled(spec) or is_mixed(spec)
