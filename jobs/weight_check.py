"""What can be seen of a model without a single label: are its numbers finite, and how large are they?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["broken_parameter", "growth", "weight_sizes"]

# Weights below this do not matter for a logit: a layer that starts from nothing may grow by any factor to it.
_SMALLEST_SIZE = 0.02
_CHUNK = 1 << 20


def weight_sizes(weights: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Root mean square of each table and layer; NaN or infinite if one of its numbers is.

    Examples
    --------
    >>> weight_sizes({"wide": np.array([3.0, 4.0]), "bias": np.array([np.inf])})
    {'wide': 3.5355339059327378, 'bias': inf}
    """
    return {name: _root_mean_square(values) for name, values in weights.items() if values.size}


def _root_mean_square(values: NDArray[Any]) -> float:
    flat, total = values.reshape(-1), 0.0
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        total += float(part @ part)
    return math.sqrt(total / len(flat))


def growth(sizes: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """By which factor each table or layer is larger than it was.

    The bias is left out: it follows the base rate, and its level is judged by PCOC.
    """
    return {
        name: size / max(before[name], _SMALLEST_SIZE)
        for name, size in sizes.items()
        if name != "bias" and name in before
    }


def broken_parameter(state: Any, path: str = "") -> str | None:
    """Where plain data, such as a calibrator's state, holds a number that is not finite; None if nowhere.

    Examples
    --------
    >>> broken_parameter({"online": {"line": [0.1, float("nan")]}})
    'online.line.1'
    """
    if isinstance(state, float):
        return None if math.isfinite(state) else path
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, Mapping):
        parts = state.items()
    elif isinstance(state, list | tuple):
        parts = enumerate(state)
    for key, value in parts:
        found = broken_parameter(value, f"{path}.{key}" if path else str(key))
        if found is not None:
            return found
    return None
