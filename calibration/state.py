"""Reading and writing calibrator state: plain JSON data, exact floats, refused when it does not fit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.errors import StaleStateError

__all__ = ["canonical_json", "digest", "expect_fields", "finite", "finite_list"]


def canonical_json(state: Mapping[str, Any]) -> str:
    """One text for one state: sorted keys, no blanks, ASCII, shortest round-trip floats, no NaN.

    Python writes the shortest decimal that reads back as the same float64, so the text loses no bit.

    Examples
    --------
    >>> canonical_json({"slope": 0.1, "kind": "platt"})
    '{"kind":"platt","slope":0.1}'
    """
    return json.dumps(state, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(state: Mapping[str, Any]) -> str:
    """Sha256 of :func:`canonical_json`, in hexadecimal."""
    return hashlib.sha256(canonical_json(state).encode("ascii")).hexdigest()


def expect_fields(
    state: Mapping[str, Any], kind: str, fields: Iterable[str], version: int | None = None
) -> None:
    """Refuse a state of another kind or version, or one with fields missing or unknown.

    Raises
    ------
    StaleStateError
        Says what was expected and what was found.
    """
    found_kind = state.get("kind") if isinstance(state, Mapping) else None
    if found_kind != kind:
        raise StaleStateError(f"expected calibration state of kind {kind!r}; got {found_kind!r}.")
    if version is not None and state.get("version") != version:
        raise StaleStateError(
            f"expected {kind!r} calibration state of version {version}; got {state.get('version')!r}.",
            hint="calibrate again, or use the program version that wrote it",
        )
    expected, found = {"kind", *fields, *(() if version is None else ("version",))}, set(state)
    if expected != found:
        raise StaleStateError(
            f"calibration state of kind {kind!r} does not fit: missing {sorted(expected - found)}, "
            f"unknown {sorted(found - expected)}.",
            hint="it was written by another version of this program; calibrate again or use that version",
        )


def finite(state: Mapping[str, Any], field: str) -> float:
    """The field as a finite float; ``StaleStateError`` otherwise."""
    return finite_list([state[field]], field)[0]


def finite_list(values: Any, field: str) -> list[float]:
    """The values as finite floats; ``StaleStateError`` otherwise."""
    is_list = isinstance(values, list)
    if not is_list or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise StaleStateError(f"calibration state: {field} must hold finite numbers only.")
    return [float(v) for v in values]
