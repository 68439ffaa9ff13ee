"""How late outcomes become known: P(delay <= e | there is an outcome), from a log that ends now.

At the moment T an outcome of a window opened at t has been seen only if its delay is at most the
follow-up T - t. Short delays are therefore over-represented (right truncation), and counting the delays
seen so far would call young windows complete. The reverse product limit of Lynden-Bell corrects that
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from pipelines.errors import DataError

__all__ = ["DelayCurve", "DelayGrid"]

Floats = NDArray[np.float64]

# Below so many outcomes at risk a factor says more about luck than about the delay: with one at risk it
# would be 0 and wipe out everything below it (Lai and Ying 1991 leave such factors out, too).
MINIMUM_AT_RISK = 10.0
_STATE_KIND = "delay_curve"


@dataclass(frozen=True)
class DelayCurve:
    """Distribution function F of the delay with which outcomes become known.

    F is normalised at the largest follow-up that has enough outcomes at risk: what comes later than anything
    that could have been seen is unknowable from this log, and F counts it as never.

    Attributes
    ----------
    delay : ndarray of float64, shape (k,)
        Distinct delays seen, ascending, ms.
    probability : ndarray of float64, shape (k,)
        F at those delays; the last is 1. Between them F is linear, from (0, 0) on.
    support : float
        Number (weight) of outcomes behind the curve. With fewer than `minimum` of them there is no curve:
        F is 1 from delay 0 on, that is, no correction.

    References
    ----------
    Lynden-Bell (1971), A method of allowing for known observational selection in small samples applied to
    3CR quasars; Woodroofe (1985), Estimating a distribution function with truncated data; Lai and Ying
    (1991), Estimating a distribution function with truncated and censored data.

    Examples
    --------
    Exponential delays of mean 1 h, windows opened over the last 2 h. Of those seen, 88 % came within an
    hour; the truth is 63 % (of those that come within 2 h: 73 %):

    >>> rng = np.random.default_rng(0)
    >>> delay, follow_up = rng.exponential(3.6e6, 40_000), rng.uniform(0, 7.2e6, 40_000)
    >>> seen = delay <= follow_up
    >>> curve = DelayCurve.fit(delay[seen], follow_up[seen])
    >>> round(float(np.mean(delay[seen] <= 3.6e6)), 2), round(float(curve.cdf([3.6e6])[0]), 2)
    (0.88, 0.73)
    """

    delay: Floats
    probability: Floats
    support: float

    @classmethod
    def fit(
        cls,
        delay: npt.ArrayLike,
        follow_up: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        *,
        minimum: float = MINIMUM_AT_RISK,
    ) -> Self:
        """Estimate F from the outcomes seen by now.

        Parameters
        ----------
        delay : array_like, shape (n,)
            From the opening of the window until the outcome was known, ms, >= 0.
        follow_up : array_like, shape (n,)
            From the opening of the window until now, ms; never less than the delay.
        weight : array_like, shape (n,), optional
            Outcomes that each row stands for (counts of a histogram).
        minimum : float
            Smallest weight at risk for which a factor is used.

        Raises
        ------
        DataError
            If a delay is negative, not finite or larger than its follow-up.
        """
        seen, age, count = _checked(delay, follow_up, weight)
        total = float(count.sum())
        if total < max(minimum, 1.0):
            return cls(np.zeros(0), np.zeros(0), total)
        point, index = np.unique(seen, return_inverse=True)
        events = np.bincount(index, count, len(point))
        # At risk at d: delay <= d <= follow-up. Whoever has follow-up < d has delay < d as well.
        order = np.argsort(age)
        gone = np.concatenate([[0.0], np.cumsum(count[order])])
        at_risk = np.cumsum(events) - gone[np.searchsorted(age[order], point, side="left")]
        hazard = np.where(at_risk >= minimum, events / np.maximum(at_risk, 1e-300), 0.0)
        survival = np.clip(1.0 - hazard, 0.0, 1.0)
        # F(d_k) = product over j > k of (1 - events_j / at_risk_j)
        probability = np.append(np.cumprod(survival[:0:-1])[::-1], 1.0)
        return cls(point, probability, total)

    def cdf(self, elapsed: npt.ArrayLike) -> Floats:
        """F at each age ``elapsed`` (ms), shape (n,), in [0, 1]."""
        age = np.asarray(elapsed, np.float64)
        if len(self.delay) == 0:
            return np.where(age >= 0, 1.0, 0.0)
        delay, probability = self.delay, self.probability
        if delay[0] > 0:
            delay, probability = np.append(0.0, delay), np.append(0.0, probability)
        return np.interp(age, delay, probability, left=0.0, right=1.0)

    @property
    def fields(self) -> tuple[str, ...]:
        """Features whose hashes it looks at: none, see `pipelines.delay_model.DelayModel`."""
        return ()

    @property
    def common(self) -> DelayCurve:
        """Itself: it is the same for all rows."""
        return self

    def observed_share(
        self,
        elapsed: npt.ArrayLike,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """`cdf`: the features make no difference."""
        return self.cdf(elapsed)

    def survival(
        self,
        elapsed: npt.ArrayLike,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """P(delay > elapsed | there is an outcome), shape (n,)."""
        return 1.0 - self.cdf(elapsed)

    def quantiles(
        self,
        share: float,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """Age (ms) at which ``share`` of the outcomes have come, the same for all rows; shape (n,)."""
        return np.full(len(buckets), self.inverse([share])[0])

    def inverse(self, probability: npt.ArrayLike) -> Floats:
        """Least age (ms) at which F reaches each probability, shape (n,); 0 without a curve."""
        wanted = np.asarray(probability, np.float64)
        if len(self.delay) == 0:
            return np.zeros(wanted.shape)
        delay, probability = np.append(0.0, self.delay), np.append(0.0, self.probability)
        # The first point that reaches it, and the one before, which does not: a flat stretch is left at once.
        end = np.clip(np.searchsorted(probability, wanted, side="left"), 1, len(probability) - 1)
        step = probability[end] - probability[end - 1]
        part = np.where(step > 0, (wanted - probability[end - 1]) / np.where(step > 0, step, 1.0), 0.0)
        found = delay[end - 1] + np.clip(part, 0.0, 1.0) * (delay[end] - delay[end - 1])
        return np.asarray(found, np.float64)

    def mean(self, otherwise: int) -> int:
        """Mean delay (ms), by the middles of 64 equal shares of outcomes; ``otherwise`` without a curve."""
        if len(self.delay) == 0:
            return otherwise
        return int(np.mean(self.inverse((np.arange(64) + 0.5) / 64)))

    def quantile(self, share: float) -> float:
        """Smallest delay seen (ms) by which ``share`` of the outcomes have come; 0 without a curve."""
        if len(self.delay) == 0:
            return 0.0
        return float(self.delay[int(np.searchsorted(self.probability, share, side="left"))])

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "kind": _STATE_KIND,
            "version": 1,
            "delay": self.delay.tolist(),
            "probability": self.probability.tolist(),
            "support": self.support,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """None: the state says it all."""
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> Self:
        """The curve that `state` described.

        Raises
        ------
        DataError
            If it is not the state of a delay curve.
        """
        if state.get("kind") != _STATE_KIND or state.get("version") != 1:
            raise DataError(
                f"expected the state of a {_STATE_KIND}, version 1. Received: kind={state.get('kind')!r}, "
                f"version={state.get('version')!r}."
            )
        delay, probability = (np.asarray(state[name], np.float64) for name in ("delay", "probability"))
        return cls(delay, probability, float(state["support"]))


@dataclass(frozen=True)
class DelayGrid:
    """Bins for delays and follow-ups up to ``horizon`` ms, fine near 0, so that counts can replace rows.

    Bin k ends at ``edges()[k]``; bin 0 holds exactly 0. Both coordinates use the same monotone bins, so a
    delay never passes its follow-up. With 512 bins the edges lie less than 2 % apart beyond the first few.
    """

    horizon: int
    bins: int = 512

    # Finest resolution, as a share of the horizon: 1 minute of 7 days.
    FINEST = 1.0 / 10_080

    @property
    def unit(self) -> float:
        """Length (ms) below which the bins are nearly even, above which nearly geometric."""
        return self.horizon * self.FINEST

    @property
    def scale(self) -> float:
        """Bins per unit of log(1 + x / unit)."""
        return (self.bins - 1) / float(np.log1p(1.0 / self.FINEST))

    def bin_of(self, duration: npt.ArrayLike) -> NDArray[np.int64]:
        """Bin of each duration (ms), in [0, bins)."""
        x = np.clip(np.asarray(duration, np.float64), 0.0, float(self.horizon))
        # The guard keeps a duration that is exactly an edge in its own bin despite rounding.
        k = np.ceil(np.log1p(x / self.unit) * self.scale - 1e-9).astype(np.int64)
        return np.minimum(k, self.bins - 1)

    def whole_bins(self, duration: npt.ArrayLike) -> NDArray[np.int64]:
        """Last bin that lies within each duration (ms) as a whole, in [0, bins).

        Of a follow-up that ends inside a bin only the bins before it can be counted on: their outcomes have
        all been seen.
        """
        x = np.clip(np.asarray(duration, np.float64), 0.0, float(self.horizon))
        k = np.floor(np.log1p(x / self.unit) * self.scale + 1e-9).astype(np.int64)
        return np.minimum(k, self.bins - 1)

    def edges(self) -> Floats:
        """Upper end of each bin, ms, shape (bins,)."""
        return self.unit * np.expm1(np.arange(self.bins) / self.scale)


def _checked(
    delay: npt.ArrayLike, follow_up: npt.ArrayLike, weight: npt.ArrayLike | None
) -> tuple[Floats, Floats, Floats]:
    seen, age = np.asarray(delay, np.float64), np.asarray(follow_up, np.float64)
    count = np.ones(len(seen)) if weight is None else np.asarray(weight, np.float64)
    bad = ~((seen >= 0) & (seen <= age) & np.isfinite(age))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"expected 0 <= delay <= follow-up. Received delay={seen[first]:g} ms, "
            f"follow-up={age[first]:g} ms (row {first}).",
            hint="an outcome can be known now only if its delay is within the follow-up",
        )
    return seen, age, count
