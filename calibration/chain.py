"""From the model's logit to the probability that is used: one object for stream, batch and serving."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration.base import Calibrator, checked_rows
from calibration.identity import IdentityCalibrator
from calibration.label_origin import LabelOrigin
from calibration.link import LOGIT_LIMIT, FloatArray, sigmoid
from calibration.online import OnlineConfig, OnlinePlatt, information_centre
from calibration.sampling import SamplingCorrection
from calibration.segments import SegmentConfig, SegmentCorrection
from calibration.selection import METHODS, fit_method, fold_sketches, select_method
from calibration.sketch import LogitSketch
from calibration.state import canonical_json, digest, expect_fields, finite
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["STATE_VERSION", "CalibrationChain"]

STATE_VERSION = 2


class CalibrationChain:
    """Sampling correction, base calibrator, online line, segments; in this order, each working in logits.

    ::

        logit ─► + ln w ─► base (fixed) ─► OnlinePlatt (learns) ─► SegmentCorrection (learns) ─► probability

    Parameters
    ----------
    base : Calibrator, optional
        One of :data:`calibration.selection.METHODS`; identity without one.
    negative_sampling_rate : float
        Kept share of the negatives that the *model* was trained on.
    online : OnlinePlatt, optional
    segments : SegmentCorrection, optional
    labels : LabelOrigin, optional
        Which labels the learning parts hear. A chain that does not learn has none.

    Notes
    -----
    - Predict before you learn: :meth:`update` assumes that the rows were transformed first.
    - Fit on mature labels, or on fresh rows with the weights of their label policy or of a delay curve
      (:func:`calibration.delayed.exposure_weights` of this chain's own :meth:`transform`); never on raw
      stream rows.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(-2.0, 1.0, 20_000)
    >>> label = rng.random(20_000) < sigmoid(0.5 * logit - 1.0)
    >>> chain = CalibrationChain.fit(logit, label, online=OnlineConfig())
    >>> chain.method
    'platt'
    >>> chain.update(logit[:256], label[:256])
    >>> again = CalibrationChain.from_json(chain.to_json())
    >>> again.digest() == chain.digest()
    True
    >>> chain.transform([0.0]).round(2).tolist()
    [0.3]
    """

    def __init__(
        self,
        base: Calibrator | None = None,
        *,
        negative_sampling_rate: float = 1.0,
        online: OnlinePlatt | None = None,
        segments: SegmentCorrection | None = None,
        labels: LabelOrigin | None = None,
    ) -> None:
        self.sampling = SamplingCorrection(negative_sampling_rate)
        self.base: Calibrator = base if base is not None else IdentityCalibrator()
        self.online = online
        self.segments = segments
        self.labels = labels

    # -- fitting ----------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        *,
        method: str = "auto",
        negative_sampling_rate: float = 1.0,
        online: OnlineConfig | None = None,
        segments: SegmentConfig | None = None,
        segment_keys: npt.ArrayLike | None = None,
        folds: int = 5,
    ) -> Self:
        """Fit to rows that the model did not learn from.

        ``method="auto"`` takes the simplest of ``none, temperature, platt, beta, isotonic`` whose
        cross-validated log loss is within one paired standard error of the best
        (:func:`calibration.selection.select_method`; folds by a hash of the row number, so deterministic).

        Parameters
        ----------
        logit, label, weight : array_like, shape (n,)
            Conventions of :mod:`calibration.base`. Rows must occur as they do in traffic: not down-sampled,
            or weighted back.
        method : str
            ``auto``, or one of :data:`calibration.selection.METHODS`.
        negative_sampling_rate : float
            Undone before anything is fitted.
        online, segments : optional
            Add these parts. The online line starts from the identity, around these rows' logits.
        segment_keys : array_like of int64, shape (n, fields), optional
            Starts the segment tables from these rows; without them they start empty.

        Raises
        ------
        ConfigError
            Unknown method, or a parameter outside its range.
        DataError
            Bad values; no rows, unless ``method="none"``.
        """
        z, y, w = checked_rows(logit, label, weight)
        if segment_keys is not None and segments is None:
            raise ConfigError(
                "segment keys were given, but no segments to fit.", hint="pass segments=SegmentConfig(…)"
            )
        sampling = SamplingCorrection(negative_sampling_rate)
        corrected = sampling.transform_logit(z)
        chain = cls.fit_sketches(
            fold_sketches(corrected, y, w, folds=folds),
            method=method,
            negative_sampling_rate=negative_sampling_rate,
        )
        based = chain.base.transform_logit(corrected)
        if online is not None:
            chain.online = OnlinePlatt(online, information_centre(based, w) if len(based) else None)
        if segments is not None and segment_keys is not None:
            chain.segments = SegmentCorrection.fit(segments, segment_keys, sigmoid(based), y, w)
        elif segments is not None:
            chain.segments = SegmentCorrection(segments)
        return chain

    @classmethod
    def fit_sketches(
        cls, folds: Sequence[LogitSketch], *, method: str = "auto", negative_sampling_rate: float = 1.0
    ) -> Self:
        """Fit the base to sketches of disjoint rows, one a fold: what a batch job over many partitions has.

        The sketches must hold logits *after* the sampling correction.
        """
        if method not in ("auto", *METHODS):
            raise ConfigError(f"unknown calibration method {method!r}; expected one of {['auto', *METHODS]}.")
        total = sum(folds, LogitSketch())
        if method != "none" and total.rows <= 0.0:
            raise DataError("cannot fit a calibrator to no rows.", hint="wait until labels have matured")
        chosen = select_method(folds).method if method == "auto" else method
        return cls(fit_method(chosen, total), negative_sampling_rate=negative_sampling_rate)

    # -- applying and learning --------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The kind of the base calibrator, such as ``none``, ``platt`` or ``isotonic``."""
        return self.base.kind

    def transform_logit(self, logit: npt.ArrayLike, segment_keys: npt.ArrayLike | None = None) -> FloatArray:
        """Calibrated logit within ``[-LOGIT_LIMIT, LOGIT_LIMIT]``, shape ``(n,)``.

        Parameters
        ----------
        logit : array_like, shape (n,), logit space
            As it comes from the model.
        segment_keys : array_like of int64, shape (n, fields)
            Needed if and only if the chain has segments; ignored without.

        Raises
        ------
        DataError
            Bad values, or segment keys that are missing.
        """
        z = self._before_segments(self._based(logit))
        if self.segments is not None:
            z = self.segments.transform_logit(z, self._needed(segment_keys))
        limited: FloatArray = np.clip(z, -LOGIT_LIMIT, LOGIT_LIMIT)
        return limited

    def transform(self, logit: npt.ArrayLike, segment_keys: npt.ArrayLike | None = None) -> FloatArray:
        """Calibrated probability, shape ``(n,)``; the sigmoid of :meth:`transform_logit`."""
        return sigmoid(self.transform_logit(logit, segment_keys))

    def update(
        self,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        segment_keys: npt.ArrayLike | None = None,
    ) -> None:
        """Let the online parts learn from one batch, all of it or, on an error, none; the base stays.

        Parameters
        ----------
        logit, label, weight : array_like, shape (n,)
            ``logit`` as it comes from the model.
        segment_keys : array_like of int64, shape (n, fields)
            Needed if and only if the chain has segments.
        """
        z, y, w = checked_rows(logit, label, weight)
        based = self._based(z)
        if self.segments is not None:
            # With the line as it was when these rows were predicted; and first, because it checks the keys.
            self.segments.update(self._needed(segment_keys), sigmoid(self._before_segments(based)), y, w)
        if self.online is not None:
            self.online.update(based, y, w)

    def refit(self) -> None:
        """Re-estimate how strongly segments are shrunk; once a release is often enough."""
        if self.segments is not None:
            self.segments.refit()

    # -- state ------------------------------------------------------------------------------------------

    def copy(self) -> Self:
        """An independent chain in the same state: what a release freezes while this one learns on."""
        return type(self).from_state(self.state())

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "kind": "calibration_chain",
            "version": STATE_VERSION,
            "negative_sampling_rate": self.sampling.negative_sampling_rate,
            "base": self.base.state(),
            "online": None if self.online is None else self.online.state(),
            "segments": None if self.segments is None else self.segments.state(),
            "labels": None if self.labels is None else self.labels.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The chain that :meth:`state` described; ``StaleStateError`` if it is none or of another version."""
        version = state.get("version")
        if version != STATE_VERSION:
            raise StaleStateError(
                f"expected calibration state of version {STATE_VERSION}; got {version!r}.",
                hint="calibrate again, or use the program version that wrote it",
            )
        expect_fields(
            state,
            "calibration_chain",
            ("version", "negative_sampling_rate", "base", "online", "segments", "labels"),
        )
        base_kind = state["base"].get("kind") if isinstance(state["base"], Mapping) else None
        if base_kind not in METHODS:
            raise StaleStateError(
                f"unknown base calibrator {base_kind!r}; expected one of {sorted(METHODS)}."
            )
        return cls(
            METHODS[base_kind].from_state(state["base"]),
            negative_sampling_rate=finite(state, "negative_sampling_rate"),
            online=None if state["online"] is None else OnlinePlatt.from_state(state["online"]),
            segments=None if state["segments"] is None else SegmentCorrection.from_state(state["segments"]),
            labels=None if state["labels"] is None else LabelOrigin.from_state(state["labels"]),
        )

    def to_json(self) -> str:
        """The state as canonical JSON text: equal texts mean equal calibration, to the bit."""
        return canonical_json(self.state())

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The chain of :meth:`to_json`; ``StaleStateError`` if the text is no such state."""
        try:
            state = json.loads(text)
        except ValueError as error:
            raise StaleStateError(f"expected calibration state as JSON; {error}.") from error
        if not isinstance(state, dict):
            raise StaleStateError(f"expected calibration state as a JSON object; got {type(state).__name__}.")
        return cls.from_state(state)

    def digest(self) -> str:
        """Sha256 of :meth:`to_json`, in hexadecimal."""
        return digest(self.state())

    # -- internals --------------------------------------------------------------------------------------

    def _based(self, logit: npt.ArrayLike) -> FloatArray:
        return self.base.transform_logit(self.sampling.transform_logit(logit))

    def _before_segments(self, based: FloatArray) -> FloatArray:
        return based if self.online is None else self.online.transform_logit(based)

    def _needed(self, segment_keys: npt.ArrayLike | None) -> npt.ArrayLike:
        if segment_keys is not None:
            return segment_keys
        names = [] if self.segments is None else list(self.segments.config.names)
        raise DataError(
            "this calibration corrects segments, but no segment keys were given.",
            hint=f"pass segment_keys of shape (n, {len(names)}): one column for each of {names}",
        )
