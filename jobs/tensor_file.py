"""Arrays to a safetensors file and its sha256, straight from where they lie: no copy of the whole in memory.

The library's own ``save`` copies everything twice while no other thread can run; writing and hashing buffers
lets them run. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["write_tensors"]

_TYPES = {
    "|b1": "BOOL",
    "|i1": "I8",
    "|u1": "U8",
    "<i2": "I16",
    "<u2": "U16",
    "<i4": "I32",
    "<u4": "U32",
    "<i8": "I64",
    "<u8": "U64",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
}


def write_tensors(path: Path, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Write a safetensors file, wait until the disk has it, and return its sha256.

    Raises
    ------
    OSError
        If the disk refuses.
    KeyError
        If an array's type has no name in the format.
    """
    # Wide types first, so that each array begins at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        about = {"dtype": _TYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": [begin, end]}
        header[name] = about
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start = memoryview(len(text).to_bytes(8, "little") + text)
        for part in (start, *(_bytes(arrays[name]) for name in order)):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
