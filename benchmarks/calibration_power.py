"""How often each test of calibration sees a fault of each kind, and what binning costs each figure.

::

    make bench-calibration-power

Predictions are logits drawn from a normal distribution; labels are drawn from the same logits plus a fault:
none, a level, a slope about the mean, or a wave that changes neither (to the first order). A test counts as
rejecting at a p-value below 5 %; the ECE at 1.645 standard deviations above its null, the smoothed ECE at
the 95 % quantile of perfect models. The second table puts beside each other how far a figure of a sketch's
bins lies from that of the rows, and how far it might at worst. The third compares with relplot, the package
of smECE's authors.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from relplot.metrics import smECE_fast

from calibration.link import sigmoid
from calibration.sketch import LogitSketch
from monitoring.binned import binned_calibration_error, binned_quality, binned_smooth_error
from monitoring.binned_tests import binned_tests
from monitoring.bounded import Bounded
from monitoring.calibration_tests import cox_score_test, kuiper_test, pcoc_z_test, spiegelhalter_test
from monitoring.inputs import BoolArray, FloatArray
from monitoring.quality import QualitySums
from monitoring.ranking import auc
from monitoring.reliability import expected_calibration_error
from monitoring.smooth_error import NullError, smooth_calibration_error

__all__ = ["main"]

_TESTS = {
    "PCOC z": pcoc_z_test,
    "Cox": cox_score_test,
    "Kuiper": kuiper_test,
    "Spiegelhalter": spiegelhalter_test,
}
_BINS = 20
# Rows and simulations: about the same time each.
_SIZES = ((2_000, 2000), (20_000, 400), (100_000, 80))
_NULL_DRAWS = 400


@dataclass(frozen=True)
class Fault:
    """What the true logits have that the predicted ones lack."""

    name: str
    of: Callable[[FloatArray], FloatArray]


def _wave(size: float) -> Callable[[FloatArray], FloatArray]:
    """A wave over the logits, less what level and slope explain of it."""

    def fault(logit: FloatArray) -> FloatArray:
        p = sigmoid(logit)
        variance = p * (1.0 - p)
        line = np.stack((np.ones(len(logit)), logit))
        wave = np.sin(4.0 * logit)
        fit = np.linalg.solve((line * variance) @ line.T, (line * variance) @ wave)
        return size * (wave - fit @ line)

    return fault


_FAULTS = (
    Fault("none", lambda logit: np.zeros(len(logit))),
    Fault("level +0.10", lambda logit: np.full(len(logit), 0.10)),
    Fault("slope 1.15", lambda logit: 0.15 * (logit - logit.mean())),
    Fault("wave 0.30", _wave(0.30)),
)


def power(rate: float, rows: int, simulations: int, seed: int) -> Iterator[tuple[str, list[float]]]:
    """Share of simulations that each test rejects, for each fault."""
    rng = np.random.default_rng(seed)
    logit = np.sort(rng.normal(math.log(rate) - 0.4, 0.9, rows))
    p = sigmoid(logit)
    limit = float(np.quantile(NullError(p, p * (1.0 - p) / rows**2).draws(_NULL_DRAWS, seed), 0.95))
    for fault in _FAULTS:
        truth = sigmoid(logit + fault.of(logit))
        rejected = np.zeros(len(_TESTS) + 2)
        for _ in range(simulations):
            rejected += _rejections(rng.random(rows) < truth, p, limit)
        yield fault.name, (rejected / simulations).tolist()


def _rejections(label: BoolArray, p: FloatArray, limit: float) -> list[bool]:
    found = [(test(label, p).p_value or 1.0) < 0.05 for test in _TESTS.values()]
    error, smooth = expected_calibration_error(label, p, _BINS), smooth_calibration_error(label, p)
    found.append(error is not None and error.z is not None and error.z > 1.645)
    found.append(smooth is not None and smooth.smooth_ece > limit)
    return found


def distances(rows: int, seed: int) -> Iterator[tuple[str, float, float, float]]:
    """Figure, value of the rows, distance of that of a sketch's bins, largest possible distance."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-3.5, 1.0, rows)
    p = sigmoid(logit)
    label = rng.random(rows) < sigmoid(1.05 * logit + 0.2)
    bins = LogitSketch.of(logit, label).binned()
    sums = QualitySums()
    sums.update(label, p)
    exact, found = sums.value(), binned_quality(bins)
    for name in ("log_loss", "ne", "brier", "pcoc", "auc"):
        value = auc(label, p) if name == "auc" else exact[name]
        yield _distance(name, value, getattr(found, name))
    smooth, binned_smooth = smooth_calibration_error(label, p), binned_smooth_error(bins)
    if smooth is not None and binned_smooth is not None:
        yield _distance("smooth ECE", smooth.smooth_ece, binned_smooth.smooth_ece)
    error = binned_calibration_error(bins)
    if error is not None:
        # Groups of bins are groups of rows: there is no other value to be away from.
        yield "ECE", error.ece.value, 0.0, error.ece.error
    for test, binned in zip(_TESTS.values(), binned_tests(bins), strict=True):
        yield _distance(binned.name, test(label, p).statistic, binned.statistic)


def _distance(name: str, exact: float | None, found: Bounded | None) -> tuple[str, float, float, float]:
    if exact is None or found is None:
        return name, math.nan, math.nan, math.nan
    return name, exact, abs(found.value - exact), found.error


def against_relplot(rows: int, seed: int) -> Iterator[tuple[str, float, float, float, float]]:
    """World, smECE here and of relplot, seconds of each; relplot's width is one of 1/1024, 2/1024, ..."""
    rng = np.random.default_rng(seed)
    for name, a, b, factor in (
        ("rate 3 %", 1, 30, 1.2),
        ("rate 20 %", 2, 8, 0.9),
        ("both ends", 0.5, 0.5, 0.9),
    ):
        truth = rng.beta(a, b, rows)
        label, p = rng.random(rows) < truth, np.minimum(1.0, factor * truth)
        began = time.process_time()
        ours = smooth_calibration_error(label, p)
        middle = time.process_time()
        theirs = float(smECE_fast(p, label.astype(np.float64)))
        ended = time.process_time()
        yield name, ours.smooth_ece if ours else math.nan, theirs, middle - began, ended - middle


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the usual simulations")
    arguments = parser.parse_args()
    print(f"share rejected at 5 % | {' | '.join((*_TESTS, 'ECE z', 'smooth ECE'))}")
    for rate in (0.01, 0.1):
        for rows, usual in _SIZES:
            simulations = max(2, round(usual * arguments.scale))
            error = 100.0 * math.sqrt(0.05 * 0.95 / simulations)
            print(f"-- {rows} rows of a rate of {rate:.0%}, {simulations} simulations (5 ± {error:.1f})")
            for name, shares in power(rate, rows, simulations, arguments.seed):
                print(f"{name:12s} | {' | '.join(f'{100 * share:5.1f}' for share in shares)}")
    for rows in (10_000, 100_000, 1_000_000):
        print(f"\n{rows} rows: figure | rows | bins differ by | at most by")
        for name, value, away, most in distances(rows, arguments.seed):
            print(f"{name:16s} | {value:10.6f} | {away:.1e} | {most:.1e}")
    print("\nsmooth ECE of 1e5 rows | here | relplot | seconds | relplot's")
    for name, ours, theirs, seconds, their_seconds in against_relplot(100_000, arguments.seed):
        print(f"{name:10s} | {ours:.5f} | {theirs:.5f} | {seconds:.3f} | {their_seconds:.3f}")


if __name__ == "__main__":
    main()
