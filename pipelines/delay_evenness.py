"""Whether outcomes come as late whatever the time of day: may their share by an age be told from the age?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.delay import DelayCurve
from pipelines.duration import HOUR_MS

__all__ = ["delay_unevenness"]

_PARTS = 4
_PART_MS = 24 // _PARTS * HOUR_MS
# With fewer outcomes chance alone moves a curve by more than what is looked for.
_MINIMUM = 100
_SHARES = np.linspace(0.02, 0.98, 49)


def delay_unevenness(opened: npt.ArrayLike, delay: npt.ArrayLike, follow_up: npt.ArrayLike) -> float | None:
    """Mean absolute difference between the delay curves of quarters of the day (UTC) and the common one.

    Quarters count by their outcomes, ages by the share of all outcomes that come between them. None without
    two quarters of 100 outcomes.

    Parameters
    ----------
    opened, delay, follow_up : array_like, shape (n,)
        Of each outcome seen: when its window opened, how late it came, how long one could have seen it; ms.

    Examples
    --------
    Windows of the morning wait for the evening:

    >>> rng = np.random.default_rng(0)
    >>> opened, follow_up = rng.integers(0, 86_400_000, 20_000), np.full(20_000, 86_400_000)
    >>> delay = rng.exponential(3.6e6, 20_000)
    >>> late = np.where(opened < 43_200_000, 5.0, 1.0) * delay
    >>> [round(delay_unevenness(opened, np.minimum(d, 8e7), follow_up), 2) for d in (delay, late)]
    [0.0, 0.17]
    """
    when, late, age = (np.asarray(values, np.int64) for values in (opened, delay, follow_up))
    common = DelayCurve.fit(late, age)
    points = common.inverse(_SHARES)
    part = when // _PART_MS % _PARTS
    counts, differences = [], []
    for number in range(_PARTS):
        rows = part == number
        if rows.sum() >= _MINIMUM:
            own = DelayCurve.fit(late[rows], age[rows])
            counts.append(int(rows.sum()))
            differences.append(float(np.abs(own.cdf(points) - common.cdf(points)).mean()))
    return float(np.average(differences, weights=counts)) if len(counts) > 1 else None
