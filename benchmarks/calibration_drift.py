"""How much of the gap between a model that drifts away and the truth each way of calibrating closes.

::

    make bench-calibration-drift ARGS='--seeds 1 2 3 4 5 --rows 300000'

A stream of impressions whose true click probabilities are known. The model's logits are over-sure and never
change; the truth swings by a quarter in log odds each day, walks at random, and jumps once by 0.4. Labels are
late: a click comes after ten minutes on average and counts for 30. ``matured`` learns each row when its
window has closed, with the logit it had; ``policy`` learns each impression at once as a negative and each
click when it comes, with fake-negative weights (:func:`calibration.delayed.fnw_weight`); ``delay_model``,
what the system takes by itself where delays are even, looks at a window four times while it is open, knowing
the curve of delays (:func:`calibration.delayed.exposure_weights`).

Printed is the share of the gap between the raw logits (0) and the truth (1) in expected log loss that is
closed, mean, standard deviation and least over the seeds; without the first day, at whose end ``static`` and
``daily refit`` are fitted for the first time, to matured labels. No method sees a row's label before it is
known, and no label noise enters the losses. The truth of 30 minutes before is what a method that
learns matured labels and does not look ahead could reach without the noise of labels. All of it takes some 20
minutes of one processor.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.base import Calibrator
from calibration.decayed import DecayedCalibrator
from calibration.delayed import exposure_weights, fnw_weight
from calibration.identity import IdentityCalibrator
from calibration.link import sigmoid
from calibration.online import OnlineConfig, OnlinePlatt
from calibration.platt import PlattCalibrator
from jobs.calibration_feed import LOOKS

__all__ = ["main"]

Floats = NDArray[np.float64]

_MINUTES = 24 * 60
_WINDOW, _MEAN_DELAY = 30.0, 10.0
_CENTRE, _SPREAD = -3.5, 1.2
_LABELS = ("matured", "policy", "delay_model")


@dataclass(frozen=True)
class Stream:
    """Impressions in order of time; arrays of shape (n,), times in minutes."""

    time: Floats
    logit: Floats
    true_logit: Floats
    label: Floats
    click_time: Floats
    level: Floats
    slope: Floats

    def late_truth(self) -> Floats:
        """Logits by the true line of 30 minutes before: what matured labels can tell, without their noise."""
        then = np.searchsorted(self.time, self.time - _WINDOW)
        logit: Floats = _CENTRE + self.level[then] + self.slope[then] * (self.logit - _CENTRE)
        return logit

    def starts(self, minutes: float) -> NDArray[np.intp]:
        """First row of every so many minutes, and the number of rows."""
        marks = np.arange(0.0, self.time[-1] + minutes, minutes)
        return np.append(np.searchsorted(self.time, marks), len(self.time))


def stream(seed: int, days: int, rows: int) -> Stream:
    """A drifting world; ``rows`` a day."""
    rng = np.random.default_rng(seed)
    count = days * rows
    day = np.arange(count) / rows
    logit = rng.normal(_CENTRE, _SPREAD, count)
    jump = rng.choice([-0.4, 0.4]) * (day >= rng.uniform(0.4, 0.7) * days)
    cycle = 0.25 * np.sin(2 * np.pi * (day + rng.random()))
    level = 0.25 + cycle + jump + 0.12 * _walk(rng, count, rows)
    slope = 0.85 + 0.02 * _walk(rng, count, rows)
    true_logit = _CENTRE + level + slope * (logit - _CENTRE)
    label = (rng.random(count) < sigmoid(true_logit)).astype(np.float64)
    # Delays are those of clicks that come within the window: others are no clicks.
    share = rng.random(count) * (1.0 - np.exp(-_WINDOW / _MEAN_DELAY))
    click_time = day * _MINUTES - _MEAN_DELAY * np.log1p(-share)
    click_time = np.where(label > 0, click_time, np.inf)
    return Stream(day * _MINUTES, logit, true_logit, label, click_time, level, slope)


def _walk(rng: np.random.Generator, count: int, rows: int) -> Floats:
    """A random walk of variance 1 a day."""
    walk: Floats = np.cumsum(rng.normal(0.0, rows**-0.5, count))
    return walk


def _share(age: Floats) -> Floats:
    """Share of the clicks that have come by an age, minutes."""
    age = np.clip(age, 0.0, _WINDOW)
    share: Floats = np.expm1(-age / _MEAN_DELAY) / np.expm1(-_WINDOW / _MEAN_DELAY)
    return share


class Method:
    """A calibrator and how often it learns.

    Parameters
    ----------
    every : float, minutes
    learn : callable
        Takes the calibrator and what has become known since the last time (logit, label, weight); gives the
        calibrator that is used from now on.
    labels : str
        One of ``matured``, ``policy``, ``delay_model``.
    """

    def __init__(
        self,
        every: float,
        learn: Callable[[Calibrator, Floats, Floats, Floats], Calibrator],
        labels: str,
    ) -> None:
        self.calibrator: Calibrator = IdentityCalibrator()
        self.every, self.learn, self.labels = every, learn, labels

    def _looked(self, world: Stream, before: float, now: float) -> tuple[Floats, Floats, Floats]:
        """Logit, label and weight of what windows have shown since the last look."""
        part = slice(*np.searchsorted(world.time, [before - _WINDOW, now]).tolist())
        opened, click, z = world.time[part], world.click_time[part], world.logit[part]
        is_open = click > before
        opened, click, z = opened[is_open], click[is_open], z[is_open]
        y = (click <= now).astype(np.float64)
        heard, share = _share(before - opened), _share(now - opened)
        positive, negative = exposure_weights(self.calibrator.transform(z), y, heard, share)
        total = positive + negative
        some = total > 0.0
        return z[some], positive[some] / total[some], total[some]

    def run(self, world: Stream) -> tuple[Floats, float]:
        """Logits said before anything later was known; seconds a thousand rows."""
        said = np.empty_like(world.logit)
        starts = world.starts(self.every)
        clicks = np.argsort(world.click_time, kind="stable")[: int(world.label.sum())]
        known = heard = 0
        began = time.perf_counter()
        for step, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            said[start:end] = self.calibrator.transform_logit(world.logit[start:end])
            now = (step + 1) * self.every
            matured = int(np.searchsorted(world.time, now - _WINDOW))
            if self.labels == "matured":
                part = slice(known, matured)
                z, y, known = world.logit[part], world.label[part], matured
                weight = np.ones(len(z))
            elif self.labels == "delay_model":
                z, y, weight = self._looked(world, now - self.every, now)
            else:
                come = int(np.searchsorted(world.click_time[clicks], now))
                of = clicks[heard:come]
                z = np.concatenate([world.logit[start:end], world.logit[of]])
                y, heard = np.repeat([0.0, 1.0], [end - start, len(of)]), come
                weight = fnw_weight(self.calibrator.transform(z), y)
            if len(z):
                self.calibrator = self.learn(self.calibrator, z, y, weight)
        return said, 1e3 * (time.perf_counter() - began) / len(said)


def methods(labels: str) -> dict[str, Method]:
    """By name, fresh."""

    def once(now: Calibrator, z: Floats, y: Floats, w: Floats) -> Calibrator:
        return PlattCalibrator.fit(z, y, w) if isinstance(now, IdentityCalibrator) else now

    def refit(now: Calibrator, z: Floats, y: Floats, w: Floats) -> Calibrator:
        return PlattCalibrator.fit(z, y, w)

    def decayed(half_life: float) -> Callable[[Calibrator, Floats, Floats, Floats], Calibrator]:
        def learn(now: Calibrator, z: Floats, y: Floats, w: Floats) -> Calibrator:
            if isinstance(now, IdentityCalibrator):
                return DecayedCalibrator.fit(z, y, w, half_life=half_life)
            now.update(z, y, w)
            return now

        return learn

    def kalman(config: OnlineConfig) -> Callable[[Calibrator, Floats, Floats, Floats], Calibrator]:
        def learn(now: Calibrator, z: Floats, y: Floats, w: Floats) -> Calibrator:
            filters = OnlinePlatt(config) if isinstance(now, IdentityCalibrator) else now
            filters.update(z, y, w)
            return filters

        return learn

    often = _WINDOW / LOOKS if labels == "delay_model" else 1
    return {
        "static Platt": Method(_MINUTES, once, "matured"),
        "daily refit": Method(_MINUTES, refit, "matured"),
        **{
            f"decayed sketch, {half_life:,.0f} rows": Method(10, decayed(half_life), labels)
            for half_life in (3_000.0, 10_000.0, 30_000.0)
        },
        "kalman, one speed": Method(often, kalman(OnlineConfig(noise_factors=(1.0,))), labels),
        "kalman (default)": Method(often, kalman(OnlineConfig()), labels),
    }


def excess(logit: Floats, true_logit: Floats) -> float:
    """Expected log loss above the truth's, nats."""
    p = sigmoid(true_logit)
    loss = np.logaddexp(0.0, logit) - np.logaddexp(0.0, true_logit) - p * (logit - true_logit)
    return float(loss.mean())


def shares(world: Stream, labels: str) -> dict[str, tuple[float, float]]:
    """Share of the gap closed, and ms a thousand rows, by method."""
    judged = world.time >= _MINUTES
    gap = excess(world.logit[judged], world.true_logit[judged])
    found = {}
    for name, method in methods(labels).items():
        said, seconds = method.run(world)
        found[name] = (1.0 - excess(said[judged], world.true_logit[judged]) / gap, 1e3 * seconds)
    late = world.late_truth()
    found["truth, 30 minutes late"] = (1.0 - excess(late[judged], world.true_logit[judged]) / gap, 0.0)
    return found


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration_drift", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000], help="a day")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--labels", nargs="+", default=_LABELS, choices=_LABELS)
    given = parser.parse_args()
    for rows in given.rows:
        for labels in given.labels:
            runs = [shares(stream(seed, given.days, rows), labels) for seed in given.seeds]
            print(f"\n{rows:,} rows a day, labels: {labels}, {len(runs)} seeds\n")
            print("| method | share of the gap closed | sd | least | ms / 1000 rows |")
            print("|---|---|---|---|---|")
            print("| raw logits | 0 | | | |")
            for name in runs[0]:
                share, cost = np.array([run[name] for run in runs]).T
                print(
                    f"| {name} | {share.mean():.3f} | {share.std():.3f} | {share.min():.3f} | "
                    f"{np.median(cost):.1f} |",
                    flush=True,
                )
            print("| truth | 1 | | | |")


if __name__ == "__main__":
    main()
