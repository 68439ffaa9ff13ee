"""Two calibrations on the same rows, compared by Spark: log loss by user, level by day."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.duration import DAY_MS

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["DayLevel", "PairedLoss", "day_levels", "paired_loss"]

# Sums are of whole numbers of this unit, so that they do not depend on the order of the rows.
_UNIT = 2.0**-28


@dataclass(frozen=True)
class PairedLoss:
    """Mean log loss of one calibration less that of another; below 0 the first is better.

    Attributes
    ----------
    users : int
        The clusters: rows of one user are not independent.
    difference : float
        Nats a row, weighted.
    standard_error : float or None
        By clusters; None with fewer than two.
    z : float or None
        Difference over its standard error: standard normal for many users if both are equally good.
    """

    users: int
    difference: float
    standard_error: float | None
    z: float | None


@dataclass(frozen=True)
class DayLevel:
    """Observed and expected positives of the rows that opened on one day, weighted.

    Attributes
    ----------
    day : int
        Its beginning, ms UTC.
    rows : int
    positives, square : float
        Sums of weight x label, and of weight squared x label, which is the variance of the former.
    expected : dict of str to float
        By column of logits.
    """

    day: int
    rows: int
    positives: float
    square: float
    expected: dict[str, float]


def paired_loss(rows: DataFrame, first: str, second: str) -> PairedLoss:
    """Compare two columns of calibrated logits, with the standard error of clusters of users.

    With ``D_u`` and ``W_u`` the sums over the rows of a user of weight x (first loss - second loss) and of
    weight, the mean is ``m = ΣD / ΣW`` and its variance ``k/(k-1) Σ(D_u - m W_u)² / (ΣW)²`` over k users: the
    linearised variance of a ratio, as for cluster samples (Cochran 1977, Sampling Techniques, 6.3 and 9A).
    """
    from pyspark.sql import functions as F

    by_user = rows.groupBy("user_key").agg(
        F.sum(_units(F.col("weight") * (_loss(first) - _loss(second)))).cast("decimal(19,0)").alias("d"),
        F.sum(_units(F.col("weight"))).cast("decimal(19,0)").alias("w"),
    )
    d, w = F.col("d"), F.col("w")
    found = by_user.agg(
        F.count(F.lit(1)), F.sum(d), F.sum(w), F.sum(d * d), F.sum(d * w), F.sum(w * w)
    ).first()
    if found is None or not found[0]:
        return PairedLoss(0, 0.0, None, None)
    users, total, weight, squares, products, weights = (int(value) for value in found)
    mean = total / weight
    if users < 2:
        return PairedLoss(users, mean, None, None)
    # In whole numbers first: what is left is small beside its terms.
    spread = squares * weight**2 - 2 * total * weight * products + total**2 * weights
    error = math.sqrt(max(0, spread) * users / (users - 1)) / weight**2
    return PairedLoss(users, mean, error, mean / error if error > 0.0 else None)


def day_levels(rows: DataFrame, columns: tuple[str, ...]) -> list[DayLevel]:
    """Observed and expected positives by day of opening (UTC), in order."""
    from pyspark.sql import functions as F

    weight, label = F.col("weight"), F.col("label")
    days = rows.groupBy(F.floor(F.col("event_time") / DAY_MS).alias("day")).agg(
        F.count(F.lit(1)),
        F.sum(_units(weight * label)),
        F.sum(_units(weight * weight * label)),
        *(F.sum(_units(weight / (1.0 + F.exp(-F.col(name))))) for name in columns),
    )
    return [
        DayLevel(
            day * DAY_MS,
            count,
            positives * _UNIT,
            square * _UNIT,
            {name: value * _UNIT for name, value in zip(columns, expected, strict=True)},
        )
        for day, count, positives, square, *expected in sorted(days.collect())
    ]


def _units(value: Column) -> Column:
    from pyspark.sql import functions as F

    return F.rint(value / _UNIT).cast("bigint")


def _loss(logit: str) -> Column:
    """Log loss in nats of a label in [0, 1]: ``max(z, 0) - y z + ln(1 + exp(-abs(z)))``."""
    from pyspark.sql import functions as F

    z = F.col(logit)
    return F.greatest(z, F.lit(0.0)) - F.col("label") * z + F.log1p(F.exp(-F.abs(z)))
