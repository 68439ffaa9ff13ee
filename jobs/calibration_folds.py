"""Held-out rows dealt to folds and to the last part, as sketches; by Spark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.sketch import LogitSketch
from calibration.sketch_book import SketchBook, SketchKey
from jobs.sketch_spark import sketch_book
from pipelines.config import Task
from pipelines.duration import HOUR_MS

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["MATURITY", "Folds", "fold_sketches_of", "segment_sketches"]

MATURITY = "mature"


@dataclass(frozen=True)
class Folds:
    """Sketches of the rows that calibrators are fitted to.

    Attributes
    ----------
    sketches : tuple of LogitSketch
        One a fold.
    book : SketchBook
        The same by key, for the record.
    """

    sketches: tuple[LogitSketch, ...]
    book: SketchBook


def fold_sketches_of(rows: DataFrame, release: str, task: Task, folds: int) -> Folds:
    """Sketch the logits that a base calibrator starts from, fold by fold.

    A fold is a hash of the user and the hour, so that rows of one visit, which share their luck, are never
    on both sides.

    Parameters
    ----------
    rows : DataFrame
        `jobs.held_out_rows.SCORED_COLUMNS`, the logit after the correction of the sampling.
    release, task
        For the keys of the book.
    folds : int
    """
    from pyspark.sql import functions as F

    named = F.concat(F.lit(_FOLD), _fold(folds).cast("string"))
    book = segment_sketches(rows, release, task, named, "logit")
    keys = [SketchKey(release, task, f"{_FOLD}{number}", MATURITY) for number in range(folds)]
    return Folds(tuple(book[key] if key in book else LogitSketch() for key in keys), book)


def segment_sketches(rows: DataFrame, release: str, task: Task, segment: Column, logit: str) -> SketchBook:
    """A sketch for each value of ``segment``, of the column of logits."""
    from pyspark.sql import functions as F

    keyed = rows.select(
        F.lit(release).alias("release"),
        F.lit(task).alias("task"),
        segment.alias("segment"),
        F.lit(MATURITY).alias("maturity"),
        F.col(logit).alias("logit"),
        "label",
        "weight",
    )
    return sketch_book(keyed, "weight")


_FOLD = "fold="


def _fold(folds: int) -> Column:
    from pyspark.sql import functions as F

    visit = F.xxhash64("user_key", F.floor(F.col("event_time") / HOUR_MS))
    return F.pmod(visit, F.lit(folds))
