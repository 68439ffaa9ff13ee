"""What every model of the delay can do, and how it is stored.

Conventions:

- ``elapsed`` is the age of a label window, ms since it opened; ``F`` is the share of the outcomes to come
  (those credited in the end) that are known by then, in [0, 1], monotone in the age, 1 from the horizon on.
- ``buckets`` int32 ``(n, columns)`` and ``numbers`` float32 ``(n, k)`` are those of
  `pipelines.features.Encoded`; ``segment_key`` int64 ``(n, len(fields))`` holds the hashes of the model's
  ``fields``, as ``encode`` makes them of segments of these names.
- Models are frozen, pure and picklable by Spark, which is transport. Storage is JSON and safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from pipelines.delay import DelayCurve
from pipelines.delay_groups import DelayGroups
from pipelines.delay_hazard import DelayHazard
from pipelines.errors import DataError

__all__ = ["DelayModel", "digest", "from_files", "to_files"]

Floats = NDArray[np.float64]

_STATE, _ARRAYS = "delay.json", "delay.safetensors"


class DelayModel(Protocol):
    """P(delay <= elapsed | there is an outcome, features)."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Features whose hashes are the columns of ``segment_key``; empty where it looks at none."""
        ...

    @property
    def common(self) -> DelayCurve:
        """The curve of all outcomes together, for whoever asks about no row in particular."""
        ...

    def observed_share(
        self,
        elapsed: npt.ArrayLike,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """``F(elapsed | x)``, shape (n,)."""
        ...

    def survival(
        self,
        elapsed: npt.ArrayLike,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """``1 - F(elapsed | x)``, shape (n,)."""
        ...

    def quantiles(
        self,
        share: float,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """Age (ms) by which ``share`` of a row's outcomes have come, shape (n,)."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON data with ``kind`` and ``version``, without the arrays."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that belong to the state, by name."""
        ...


def to_files(model: DelayModel) -> dict[str, bytes]:
    """The model as ``delay.json`` and, if it has arrays, ``delay.safetensors``: the same bytes every time."""
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(model.arrays().items())}
    blob = safetensors.numpy.save(arrays) if arrays else b""
    body = {"state": model.state(), "arrays_sha256": hashlib.sha256(blob).hexdigest() if blob else None}
    files = {_STATE: json.dumps(body, sort_keys=True, allow_nan=False).encode()}
    return files | ({_ARRAYS: blob} if blob else {})


def from_files(files: Mapping[str, bytes]) -> DelayModel:
    """The model that `to_files` wrote.

    Raises
    ------
    DataError
        If a file is missing or damaged, or is of an unknown kind or version.
    """
    if _STATE not in files:
        raise DataError(f"expected a delay model. Without {_STATE}.")
    try:
        body = json.loads(files[_STATE])
        state, expected = body["state"], body["arrays_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{_STATE} is no delay model: {error!r}.") from error
    blob = files.get(_ARRAYS, b"") if expected is not None else b""
    if expected is not None and hashlib.sha256(blob).hexdigest() != expected:
        raise DataError(f"{_ARRAYS} is not the one that {_STATE} was written with.")
    arrays = safetensors.numpy.load(blob) if blob else {}
    kinds: dict[str, Callable[..., DelayModel]] = {
        "delay_curve": DelayCurve.from_state,
        "delay_groups": DelayGroups.from_state,
        "delay_hazard": DelayHazard.from_state,
    }
    kind = state.get("kind")
    if kind not in kinds:
        raise DataError(f"expected a delay model among {', '.join(kinds)}. Received: {kind!r}.")
    return kinds[kind](state, arrays)


def digest(model: DelayModel) -> str:
    """sha256 of all that the model is, hex: equal models, equal digests."""
    return hashlib.sha256(to_files(model)[_STATE]).hexdigest()
