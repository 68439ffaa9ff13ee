"""One stable hash for feature values, users and segments.

XXH64 over the UTF-8 bytes of a value's text: the same function is in Spark SQL (``xxhash64``, seed 42)
and in every language, so any side can reproduce a bucket.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

__all__ = ["HASH_SEED", "hash_column", "hash_text", "mix"]

HASH_SEED = 42
_MASK = (1 << 64) - 1


def hash_text(text: str, seed: int = HASH_SEED) -> int:
    """Unsigned 64-bit XXH64 of the UTF-8 bytes of ``text``."""
    return xxhash.xxh64_intdigest(text.encode(), seed)


def hash_column(column: pa.Array | pa.ChunkedArray, seed: int = HASH_SEED) -> NDArray[np.uint64]:
    """XXH64 of each value of a string column, shape (n,); nulls hash to 0.

    Distinct values are hashed once.

    Examples
    --------
    >>> hash_column(pa.array(["a", None, "a"])).tolist() == [hash_text("a"), 0, hash_text("a")]
    True
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    encoded = pc.dictionary_encode(column)
    digest = xxhash.xxh64_intdigest
    values = np.fromiter(
        (0 if text is None else digest(text, seed) for text in _as_binary(encoded.dictionary).to_pylist()),
        np.uint64,
        len(encoded.dictionary),
    )
    codes = encoded.indices
    if codes.null_count == 0:
        return np.asarray(values[codes.to_numpy(zero_copy_only=False)])
    filled = np.append(values, np.uint64(0))
    return np.asarray(filled[codes.fill_null(len(values)).to_numpy(zero_copy_only=False)])


def _as_binary(strings: pa.Array) -> pa.Array:
    return strings.cast(pa.large_binary() if pa.types.is_large_string(strings.type) else pa.binary())


def mix(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Combine two hashes into one, order-sensitive, elementwise (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = left * np.uint64(0x9E3779B97F4A7C15) + right
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
