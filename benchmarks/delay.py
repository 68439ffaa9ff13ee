"""How well each delay model predicts delays that depend on campaign and hour, beside the truth, and how fast.

::

    make bench-delay ARGS='--outcomes 60000'

Conversions are drawn from mixtures whose weights are a campaign's own, tilted by the hour: the distribution
of each row is known exactly. Models are fitted to outcomes of closed windows and judged on fresh ones: by
held-out negative log likelihood over delay bins, whose least possible expectation is the truth's, and by the
error of F itself at the ages at which training windows are young. Seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from benchmarks.delay_world import FIELDS, SPEC, DelayWorld, Drawn
from models.delay_fit import fit_delay_model
from models.delay_hazard import train_hazard
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_bins import GROUP_BINS
from pipelines.delay_groups import DelayGroups
from pipelines.delay_model import DelayModel, to_files
from pipelines.delay_rows import delay_loss
from pipelines.duration import DAY_MS, HOUR_MS

__all__ = ["main"]

Floats = NDArray[np.float64]

_AGES = (15 * 60_000, HOUR_MS, 6 * HOUR_MS, DAY_MS)
_FRESH = 50_000
_APPLIED = 200_000


@dataclass(frozen=True)
class Truth:
    """The world's own F of a fixed set of rows; of the protocol only what judging needs."""

    world: DelayWorld
    weights: Floats

    def observed_share(self, elapsed: npt.ArrayLike, *_: object) -> Floats:
        return self.world.cdf(elapsed, self.weights)


def timed(fit: Callable[[], DelayModel]) -> tuple[DelayModel, float]:
    """What a function gives, and the processor seconds that it takes."""
    began = time.process_time()
    return fit(), time.process_time() - began


def rows_a_second(model: DelayModel, drawn: Drawn) -> float:
    """Rows a second of `observed_share`."""
    rows = drawn.rows.take(np.arange(_APPLIED) % len(drawn.rows))
    age = np.random.default_rng(1).uniform(0, DAY_MS, len(rows))
    began = time.process_time()
    model.observed_share(age, rows.buckets, rows.numbers, rows.segment_key)
    return len(rows) / (time.process_time() - began)


def share_error(model: DelayModel | Truth, drawn: Drawn, world: DelayWorld) -> float:
    """Root mean square error of F over rows and ages."""
    rows, errors = drawn.rows, []
    for age in _AGES:
        at = np.full(len(rows), float(age))
        found = model.observed_share(at, rows.buckets, rows.numbers, rows.segment_key)
        errors.append(found - world.cdf(at, drawn.weights))
    return float(np.sqrt(np.mean(np.square(errors))))


def closed(drawn: Drawn, world: DelayWorld) -> Drawn:
    """Outcomes of closed windows."""
    return drawn.take(drawn.rows.follow_up >= world.window)


def main() -> None:
    """Fit all of them and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delay", description=__doc__.split("\n")[0])
    parser.add_argument("--outcomes", type=int, default=60_000, help="drawn, before those not yet known")
    parser.add_argument("--campaigns", type=int, default=200)
    parser.add_argument("--tilt", type=float, default=1.5, help="log-odds between noon and midnight")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = DelayWorld.draw(given.campaigns, given.seed, given.tilt)
    every = world.outcomes(given.outcomes, 4 * world.window, given.seed + 1)
    fresh = closed(world.outcomes(_FRESH, 4 * world.window, given.seed + 2), world)
    grid = DelayGrid(world.window, GROUP_BINS)
    rows = every.rows
    # As in a build: the common curve comes from counts.
    fine = DelayGrid(world.window)
    delay, follow_up = (fine.edges()[fine.bin_of(part)] for part in (rows.delay, rows.follow_up))
    base = DelayCurve.fit(delay, follow_up)
    counts = rows.counts(grid, FIELDS)
    # The first call of torch loads half of it.
    train_hazard(rows.take(np.arange(500)), SPEC, base, world.window, open_windows=True)
    fitted: dict[str, tuple[DelayModel, float]] = {
        "curve": timed(lambda: DelayCurve.fit(delay, follow_up)),
        "groups": timed(lambda: DelayGroups.fit(counts, base)),
        "groups, open too": timed(lambda: DelayGroups.fit(counts, base, open_windows=True)),
        "hazard": timed(lambda: train_hazard(rows, SPEC, base, world.window)),
        "hazard, open too": timed(lambda: train_hazard(rows, SPEC, base, world.window, open_windows=True)),
    }
    truth = delay_loss(Truth(world, fresh.weights), fresh.rows, grid)  # type: ignore[arg-type]
    print(f"{len(closed(every, world).rows):,} outcomes of closed windows, {len(rows):,} with the open ones")
    print(f"{len(fresh.rows):,} fresh ones; nats an outcome of the truth: {truth.mean():.4f}")
    print(
        f"{'model':<17} {'excess':>8} {'± s.e.':>8} {'error of F':>11} {'fit s':>7} {'rows/s':>11} {'kB':>6}"
    )
    for name, (model, seconds) in fitted.items():
        excess = delay_loss(model, fresh.rows, grid) - truth
        error = excess.std() / np.sqrt(len(excess))
        size = sum(map(len, to_files(model).values())) / 1e3
        print(
            f"{name:<17} {excess.mean():8.4f} {error:8.4f} {share_error(model, fresh, world):11.4f} "
            f"{seconds:7.2f} {rows_a_second(model, fresh):11,.0f} {size:6.0f}"
        )
    began = time.process_time()
    fit_delay_model(rows, SPEC, base, world.window, "hazard", FIELDS)
    print(f"chosen from all three, in {time.process_time() - began:.1f} s")


if __name__ == "__main__":
    main()
