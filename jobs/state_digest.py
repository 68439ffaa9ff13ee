"""The digest of a state: sha256 over the hashes of small blocks, so that a change costs what it touches.

The bytes of an array are cut into blocks of whole rows, about `BLOCK_BYTES` each. The array's hash is that of
its type, its shape and its blocks' hashes; the state's is that of all names with their arrays' hashes, and of
the plain data. Whoever keeps the blocks' hashes rehashes only blocks that changed and gets the same digest as
one who reads everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "BlockHashes", "digest_of", "state_digest"]

# The least that hashlib hashes without holding the interpreter's lock: others run meanwhile.
BLOCK_BYTES = 2048
_HASH_BYTES = 32


class BlockHashes:
    """The block hashes of one array, which the caller may change row by row.

    Parameters
    ----------
    array : ndarray
        Kept by reference if it is contiguous: change it in place, then call `rehash`.

    Examples
    --------
    >>> table = np.zeros((1000, 4), np.float32)
    >>> hashes = BlockHashes(table)
    >>> table[7] = 1.0
    >>> hashes.rehash(np.array([7]))
    >>> hashes.digest() == BlockHashes(table.copy()).digest()
    True
    """

    def __init__(self, array: NDArray[Any]) -> None:
        rows = np.ascontiguousarray(array).reshape(array.shape or (1,))
        self._header = f"{array.dtype.str}|{array.shape}|".encode()
        self._bytes = rows.reshape(-1).view(np.uint8)
        row_bytes = rows[:1].nbytes
        self._rows_a_block = max(BLOCK_BYTES // row_bytes, 1) if row_bytes else 1
        self._block_bytes = self._rows_a_block * row_bytes
        blocks = -(-self._bytes.size // self._block_bytes) if row_bytes else 0
        self._hashes = np.empty((blocks, _HASH_BYTES), np.uint8)
        self._hash(np.arange(blocks))

    def rehash(self, rows: NDArray[np.int64]) -> None:
        """Take note that the given rows have changed."""
        self._hash(np.unique(rows // self._rows_a_block))

    def digest(self) -> bytes:
        """Of the array as a whole."""
        return hashlib.sha256(self._header + self._hashes.tobytes()).digest()

    def _hash(self, blocks: NDArray[np.int64]) -> None:
        content, size = self._bytes.data, self._block_bytes
        found = [hashlib.sha256(content[start : start + size]).digest() for start in (blocks * size).tolist()]
        self._hashes[blocks] = np.frombuffer(b"".join(found), np.uint8).reshape(-1, _HASH_BYTES)


def digest_of(arrays: Mapping[str, bytes], plain: Mapping[str, Any]) -> str:
    """The digest of a state, from its arrays' digests and its plain data."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{len(name)}|{name}|".encode() + arrays[name])
    total.update(json.dumps(plain, sort_keys=True).encode())
    return total.hexdigest()


def state_digest(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> str:
    """Of names, types, shapes and bytes of all arrays, and the plain data.

    Equal digests mean equal state to the bit. Nothing that depends on the wall clock is part of it.
    """
    return digest_of({name: BlockHashes(array).digest() for name, array in arrays.items()}, plain)
