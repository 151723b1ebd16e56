"""synthetic:modes: three regimes that each pay another way of trading, so that the best specialist is known at every bar."""

from dataclasses import dataclass

import numpy as np
from numba import njit

from envs.histories import INTRADAY, OVERNIGHT, Histories

INTENTS = ("trend", "revert", "event")  # regimes in the order of hidden["regime"], and the specialist that each of them pays
TREND, REVERT, EVENT = range(3)


@dataclass(frozen=True)
class Modes(Histories):
    """The regime is one for all assets, lasts `regime_bars` on average, and is followed by either of the others:

    - trend: each asset drifts by `drift` up or down, and draws its direction anew every `drift_bars` on average;
    - revert: each asset reverts to its price of when the regime began: by what its deviation at the last close says, which
      halves in `half_life` bars;
    - event: each asset drifts by `reaction` with the sign of its extra series `surprise`, until that is 0 again.

    `surprise` is +1 or -1 in the bar of a surprise, then falls in equal steps to 0 over `event_bars`; the next one comes after
    `quiet_bars` on average. It does so in every regime, but tells something in one of them only. The global extra series `tone`
    is -1, 0 or 1 in the three regimes, plus noise of `tone_noise`; volatility is the same in all. `vol` is the standard
    deviation of a bar; drifts are per bar, in units of vol, and all in the session, so that an order for its open has the whole
    of them. An account, long only and without costs, that knows what is expected of each session earns per bar, in units
    of vol: 0.15 in trend, 0.16 in revert, 0.13 in event. What earns in one regime earns nothing in the others, or loses: to
    follow prices and to go against them are each other's opposite, and surprises mean nothing there.

    In `hidden`: `regime` and `best_intent` (bars,), numbers in INTENTS, and `expected_return`, the mean simple return of the
    session of each bar given the bars before it, its regime and the directions of its trends.
    """

    assets: int = 4
    bars: int = 1000
    train: int = 60
    val: int = 12
    vol: float = 0.015
    regime_bars: float = 150.0
    drift: float = 0.3
    drift_bars: float = 50.0
    half_life: float = 2.0
    reaction: float = 0.7
    event_bars: int = 4
    quiet_bars: float = 8.0
    tone_noise: float = 0.2

    def __post_init__(self):
        Histories.__post_init__(self)
        self.expect(regime_bars=1, drift_bars=1, half_life=0.5, event_bars=1, quiet_bars=1, drift=0, reaction=0, tone_noise=0)
        self.expect_inside(vol=(0, 1))

    def draw(self, rng: np.random.Generator):
        """Overnight and intraday log returns (bars, assets); the truth by name; extra series that agents see, by name."""
        shape = (self.bars, self.assets)
        overnight = OVERNIGHT * rng.standard_normal(shape)
        intraday = INTRADAY * rng.standard_normal(shape)
        regime, expected, surprise = _modes(
            overnight + intraday, rng.random((self.bars, 2)), rng.random((*shape, 4)), 1.0 / self.regime_bars, self.drift,
            1.0 / self.drift_bars, 1.0 - 0.5 ** (1.0 / self.half_life), self.reaction, self.event_bars, 1.0 / self.quiet_bars,
        )  # fmt: skip
        tone = regime - 1.0 + self.tone_noise * rng.standard_normal(self.bars)
        hidden = {"regime": regime, "best_intent": regime.copy(), "expected_return": self.vol * expected}
        session = self.vol * (intraday + expected) - 0.5 * self.vol**2  # driftless in simple returns but for what is expected
        return self.vol * overnight, session, hidden, {"surprise": surprise, "tone": tone}


@njit(cache=True, error_model="numpy")
def _modes(shock, switch, uniform, new_regime, drift, new_drift, pull, reaction, event_bars, new_event):
    """Regime (bars,), expected session and `surprise` (bars, assets) of standard shocks; `new_*` are probabilities per bar."""
    bars, assets = shock.shape
    regime, expected, surprise = np.zeros(bars, np.int64), np.zeros((bars, assets)), np.zeros((bars, assets))
    side, deviation = np.zeros(assets), np.zeros(assets)
    now = int(3 * switch[0, 1])
    for t in range(bars):
        began = t == 0
        if t > 0 and switch[t, 0] < new_regime:
            now = (now + 1 + int(2 * switch[t, 1])) % 3
            began = True
        regime[t] = now
        for i in range(assets):
            if began:
                deviation[i] = 0.0
            if began or uniform[t, i, 0] < new_drift:
                side[i] = 1.0 if uniform[t, i, 1] < 0.5 else -1.0
            before = surprise[t - 1, i] if t > 0 else 0.0
            if now == TREND:
                expected[t, i] = drift * side[i]
            elif now == REVERT:
                expected[t, i] = -pull * deviation[i]
            else:
                expected[t, i] = reaction * np.sign(before)
            deviation[i] += shock[t, i] + expected[t, i]
            left = round(event_bars * abs(before)) - 1
            if left > 0:
                surprise[t, i] = np.sign(before) * left / event_bars
            elif uniform[t, i, 2] < new_event:
                surprise[t, i] = 1.0 if uniform[t, i, 3] < 0.5 else -1.0
    return regime, expected, surprise
