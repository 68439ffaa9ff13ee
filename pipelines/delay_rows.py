"""Outcomes with their features, row by row: for training a delay network and for judging delay models."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.codec import with_features_from_json
from pipelines.delay import DelayGrid
from pipelines.delay_counts import DelayCounts, Path
from pipelines.delay_model import DelayModel
from pipelines.errors import DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.features import encode
from pipelines.misfits import find_misfits

__all__ = ["DelayRows", "delay_loss", "whole"]

Floats = NDArray[np.float64]

# Share of a uniform distribution over the bins that is mixed in when a model is judged: an outcome in a bin
# that the model holds for impossible costs 17 nats, not infinitely many.
_UNIFORM = 1e-6
_IMPRESSION = ("user_id", "item_id", "position", "event_time", "features")
_OWN = ("opened", "delay", "follow_up")


@dataclass(frozen=True)
class DelayRows:
    """Outcomes seen so far, positives of one task.

    Attributes
    ----------
    buckets : ndarray of int32, shape (n, columns)
    numbers : ndarray of float32, shape (n, numeric features)
    segment_key : ndarray of int64, shape (n, segments)
        As in `pipelines.features.Encoded`.
    opened : ndarray of int64, shape (n,)
        When the window opened, ms since the epoch.
    delay, follow_up : ndarray of int64, shape (n,)
        From then until the outcome was known, and until now, ms; ``0 <= delay <= follow_up``.
    """

    buckets: NDArray[np.int32]
    numbers: NDArray[np.float32]
    segment_key: NDArray[np.int64]
    opened: NDArray[np.int64]
    delay: NDArray[np.int64]
    follow_up: NDArray[np.int64]

    def __post_init__(self) -> None:
        bad = np.flatnonzero((self.delay < 0) | (self.delay > self.follow_up))
        if len(bad):
            first = bad[0]
            raise DataError(
                f"expected 0 <= delay <= follow-up. Received delay={self.delay[first]} ms, "
                f"follow-up={self.follow_up[first]} ms (row {first})."
            )

    def __len__(self) -> int:
        return len(self.delay)

    @classmethod
    def from_table(cls, table: pa.Table, spec: FeatureSpec, segments: tuple[str, ...] = ()) -> Self:
        """Encode what `pipelines.delay_cells.delay_sample` gave; impressions that do not fit are left out."""
        # The delays stay out of the way of features that bear the same names.
        impressions = with_features_from_json(table.select(_IMPRESSION), "features")
        misfits = find_misfits(impressions, spec)
        if misfits:
            fits = np.ones(table.num_rows, np.bool_)
            fits[list(misfits)] = False
            table, impressions = table.filter(pa.array(fits)), impressions.filter(pa.array(fits))
        encoded = encode(impressions, spec, segments)
        opened, delay, follow_up = (np.asarray(table.column(name).to_numpy(), np.int64) for name in _OWN)
        return cls(encoded.buckets, encoded.numbers, encoded.segment_key, opened, delay, follow_up)

    @classmethod
    def from_samples(
        cls, table: pa.Table, as_of: int, horizon: int, segments: tuple[int, ...] = ()
    ) -> DelayRows:
        """Positives of one task out of rows of a snapshot, each sample once, however often it is repeated.

        Parameters
        ----------
        table : pa.Table
            Columns ``sample_id, label, event_time, outcome_known_at, segment_key, buckets, numbers`` of
            `pipelines.snapshot.SAMPLE_SCHEMA`, first rows only.
        as_of : int
            The snapshot's, ms since the epoch.
        horizon : int
            Age (ms) from which a window has closed.
        segments : tuple of int
            Columns of ``segment_key`` to keep.
        """
        positive = table.filter(pc.greater(table.column("label"), 0.0)).combine_chunks()
        names = positive.column("sample_id").to_pylist()
        _, once = np.unique(np.asarray(names, object).astype(str), return_index=True)
        positive = positive.take(pa.array(once)).combine_chunks()
        opened, known = (
            np.asarray(positive.column(name).to_numpy(), np.int64)
            for name in ("event_time", "outcome_known_at")
        )
        follow_up = np.minimum(as_of - opened, horizon)
        key, buckets, numbers = (
            _matrix(positive.column(name)) for name in ("segment_key", "buckets", "numbers")
        )
        return cls(
            buckets.astype(np.int32),
            numbers.astype(np.float32),
            key.astype(np.int64)[:, list(segments)],
            opened,
            np.clip(known - opened, 0, follow_up),
            follow_up,
        )

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> DelayRows:
        """The chosen rows."""
        return DelayRows(**{part.name: getattr(self, part.name)[rows] for part in fields(self)})

    def closed(self, horizon: int) -> DelayRows:
        """Only outcomes of windows that have closed."""
        return self.take(self.follow_up >= horizon)

    def split(self, share: float) -> tuple[DelayRows, DelayRows]:
        """The earlier windows, and the ``share`` (about) that opened last."""
        if len(self) == 0:
            return self, self
        cut = np.quantile(self.opened, 1.0 - share, method="higher")
        return self.take(self.opened < cut), self.take(self.opened >= cut)

    def counts(self, grid: DelayGrid, names: tuple[str, ...]) -> DelayCounts:
        """Counts by the hashes of the first segments, which are those of the features ``names``."""
        paths: list[Path] = [tuple(row) for row in self.segment_key[:, : len(names)].tolist()]
        return DelayCounts.of(grid, names, paths, self.delay, self.follow_up)

    def bins(self, grid: DelayGrid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bins of delay and of the whole follow-up, both (n,); see `DelayGrid.whole_bins`."""
        return grid.bin_of(self.delay), grid.whole_bins(self.follow_up)


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Lists of one length as rows."""
    n = len(column)
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(n, len(flat) // n if n else 0)


def delay_loss(model: DelayModel, rows: DelayRows, grid: DelayGrid) -> Floats:
    """Negative log likelihood of each outcome, nats, shape (n,): ``-log P(bin of the delay | bin <= u)``.

    With ``u`` the last bin that the follow-up covers as a whole: an open window can only have shown what came
    within it. Every row must have a delay in such a bin, see `whole`. A model that is right has the least
    expectation (a proper score); all are judged on the bins of one grid.

    Examples
    --------
    Half of the outcomes come at once, half after a day; judged on one of the latter:

    >>> from pipelines.delay import DelayCurve
    >>> day = 86_400_000
    >>> curve = DelayCurve.fit(np.repeat([0, day], 50), np.full(100, day))
    >>> n = np.zeros(1, np.int64)
    >>> rows = DelayRows(n[:, None], n[:, None], n[:, None], n, n + day, n + day)
    >>> delay_loss(curve, rows, DelayGrid(day, 2)).round(4).tolist()
    [0.6931]
    """
    own, covered = rows.bins(grid)
    edges = grid.edges()

    def share(k: NDArray[np.int64]) -> Floats:
        found = model.observed_share(edges[np.maximum(k, 0)], rows.buckets, rows.numbers, rows.segment_key)
        return np.where(k >= 0, found, 0.0)

    def mixed(values: Floats, bins: NDArray[np.int64]) -> Floats:
        return (1.0 - _UNIFORM) * values + _UNIFORM * bins / grid.bins

    within = mixed(share(own) - share(own - 1), np.ones(len(rows), np.int64))
    return np.log(mixed(share(covered), covered + 1)) - np.log(within)


def whole(rows: DelayRows, grid: DelayGrid) -> DelayRows:
    """Rows whose delay lies in a bin that their follow-up covers as a whole.

    Of the last, unfinished bin of a follow-up only the early part can have been seen. Leaving it out is
    truncation at the end of the bin before, which the likelihood knows of.
    """
    own, covered = rows.bins(grid)
    return rows.take(own <= covered)
