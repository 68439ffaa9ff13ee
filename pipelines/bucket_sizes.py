"""How many rows of an embedding table a column needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.feature_columns import text_column
from pipelines.hashing import hash_column

__all__ = ["Codes", "bucket_count", "encode_values"]

_LEAST, _MOST = 8, 1 << 18
# Rows for each value that is known or to be expected: with 4, one value in five shares its row, with 2 (for
# columns of many values, most of them rare) two in five.
_ROWS_A_VALUE, _ROWS_A_RARE_VALUE = 4, 2
# Columns of up to so many values get a table in which no two of the known values share a row ...
_FEW_VALUES = 64
# ... and those of up to so many one in which at most a tenth of them do.
_SOME_VALUES, _SHARED = 4096, 0.1


@dataclass(frozen=True)
class Codes:
    """Values of a column, numbered in order of first appearance.

    Attributes
    ----------
    code : ndarray of int32, shape (n,)
        Number of each row's value; -1 for null.
    hashes : ndarray of uint64, shape (distinct,)
        Hash of each value, as feature extraction computes it.
    """

    code: NDArray[np.int32]
    hashes: NDArray[np.uint64]

    @property
    def distinct(self) -> int:
        return len(self.hashes)

    @property
    def rows(self) -> int:
        """Rows that have a value."""
        return int((self.code >= 0).sum())

    @property
    def novelty(self) -> float:
        """Share of the last quarter's rows with a value that the first three quarters do not have."""
        earlier, last = self._quarters()
        last = last[last >= 0]
        return float((last > earlier.max(initial=-1)).mean()) if len(last) else 0.0

    def expected(self, horizon: float) -> float:
        """Number of values after ``horizon`` times as many further rows.

        Heaps' law, ``distinct = K rows ** beta``, with beta from the growth over the last quarter: 0 for a
        closed set of values, 1 where each row brings a new one.
        """
        earlier, _ = self._quarters()
        before = int(earlier.max(initial=-1)) + 1
        beta = np.log(self.distinct / before) / np.log(4 / 3) if before else 1.0
        return float(self.distinct * (1 + horizon) ** min(beta, 1.0))

    def _quarters(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        start = len(self.code) - len(self.code) // 4
        return self.code[:start], self.code[start:]

    @property
    def drift(self) -> float:
        """How far the shares of the values differ between both halves: 0 alike, 1 no value in common."""
        middle = len(self.code) // 2
        halves = [half[half >= 0] for half in (self.code[:middle], self.code[middle:])]
        shares = [np.bincount(half, minlength=self.distinct) / max(len(half), 1) for half in halves]
        return float(np.abs(shares[0] - shares[1]).sum() / 2)

    @classmethod
    def of_hashes(cls, hashes: NDArray[np.uint64]) -> Codes:
        """Number values that are hashes already."""
        encoded = pa.array(hashes).dictionary_encode()
        return cls(encoded.indices.to_numpy(), encoded.dictionary.to_numpy())


def encode_values(column: pa.Array) -> Codes:
    """Number the values of a column by their text."""
    encoded = text_column(column).dictionary_encode()
    return Codes(encoded.indices.fill_null(-1).to_numpy(), hash_column(encoded.dictionary))


def bucket_count(codes: Codes, horizon: float) -> int:
    """A power of two of table rows with room for the values known and those to be expected.

    Parameters
    ----------
    codes : Codes
    horizon : float
        How many times as many rows are still to come.

    Examples
    --------
    >>> bucket_count(encode_values(pa.array(["phone", "desktop", "tablet"] * 100)), horizon=3)
    32
    """
    rows_a_value = _ROWS_A_VALUE if codes.distinct <= _SOME_VALUES else _ROWS_A_RARE_VALUE
    wanted = rows_a_value * codes.expected(horizon) if codes.distinct else 0
    buckets = _LEAST
    while buckets < min(wanted, _MOST):
        buckets *= 2
    allowed = 0.0 if codes.distinct <= _FEW_VALUES else _SHARED
    if codes.distinct <= _SOME_VALUES:
        while buckets < _MOST and _shared(codes.hashes, buckets) > allowed:
            buckets *= 2
    return buckets


def _shared(hashes: NDArray[np.uint64], buckets: int) -> float:
    """Share of values that have a table row in common with another."""
    _, count = np.unique(hashes % np.uint64(buckets - 1), return_counts=True)
    return float(count[count > 1].sum() / max(len(hashes), 1))
