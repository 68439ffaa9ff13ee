"""Rows of a table that changed, with the values that they have now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TableRows"]


@dataclass(frozen=True)
class TableRows:
    """What changed of a table since it was last asked for: copies.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,), or None
        Ascending, each once. None: ``values`` is the whole table.
    values : ndarray, shape (n, ...)
    """

    rows: NDArray[np.int64] | None
    values: NDArray[Any]
