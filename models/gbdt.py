"""Gradient-boosted trees on rates and counts: the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import lightgbm
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from models.encoded_rows import EncodedRows
from models.encoding_in_time import CHUNK_ROWS, encode_in_time
from models.losses import cure_derivatives, cured_log_loss
from models.target_encoding import TargetEncoding
from pipelines.config_sections import TeacherConfig
from pipelines.errors import DataError, StaleStateError
from pipelines.feature_spec import FeatureSpec
from pipelines.training_set import TrainingRows, TrainingSet

__all__ = ["GbdtModel"]

_TREES_FILE, _ENCODING_FILE = "gbdt.txt", "encoding.safetensors"
# Rounds without a better validation loss before boosting stops.
_PATIENCE = 15
_PREDICT_ROWS = 8192


class GbdtModel:
    """LightGBM on the target encoding of every field and on the numbers.

    Labels that may still change enter by the cure-model loss; where all are mature that is the log loss,
    and LightGBM's own objective is used. One thread, so training and prediction give the same bits every
    time.

    Attributes
    ----------
    rounds : int
        Trees; with a validation set the number that was best on it.

    Examples
    --------
    >>> from pipelines.feature_spec import Categorical
    >>> spec = FeatureSpec(categorical=(Categorical(name="item_id", buckets=8),))
    >>> rng = np.random.default_rng(0)
    >>> item = rng.integers(1, 9, 4000).astype(np.int32)[:, None]
    >>> n, label = len(item), (rng.random(4000) < item[:, 0] / 10).astype(np.float32)
    >>> train = TrainingSet(item, np.zeros((n, 0), np.float32), np.zeros(n, np.int64),
    ...     np.zeros((n, 0), np.int64), label, np.ones(n, np.float32), np.arange(n), label == label,
    ...     np.ones(n, np.float32))
    >>> model = GbdtModel.fit(train, spec, TeacherConfig(rounds=30))
    >>> logit = model.predict_logit(np.array([[4], [7]], np.int32), train.numbers[:2])
    >>> (1 / (1 + np.exp(-logit))).round(1).tolist()
    [0.3, 0.7]
    """

    def __init__(
        self, spec: FeatureSpec, encoding: TargetEncoding, booster: lightgbm.Booster, base_logit: float
    ) -> None:
        self.spec = spec
        self.encoding = encoding
        self.base_logit = base_logit
        self._booster = booster

    @classmethod
    def fit(
        cls,
        train: TrainingRows,
        spec: FeatureSpec,
        config: TeacherConfig,
        validation: TrainingSet | None = None,
        *,
        seed: int = 17,
        rounds: int | None = None,
        label_delay: int = 0,
    ) -> Self:
        """Train on rows whose labels may still change.

        Of each training row, its bins (a byte for each input) and some 100 bytes more are in memory, whether
        the rows are or not.

        Parameters
        ----------
        train : TrainingRows
            In time order; those in memory are sorted if they are not.
        spec : FeatureSpec
        config : TeacherConfig
        validation : TrainingSet, optional
            Later rows; boosting stops when their loss has not fallen for 15 rounds.
        seed : int
        rounds : int, optional
            Instead of ``config.rounds``.
        label_delay : int
            Milliseconds after which an outcome is taken as known, when the rates of training rows are made.

        Raises
        ------
        DataError
            If there are no rows.
        """
        if len(train) == 0:
            raise DataError("no rows to train on.", hint="widen the training window")
        if isinstance(train, TrainingSet) and (np.diff(train.event_time) < 0).any():
            train = train.take(np.argsort(train.event_time, kind="stable"))
        known = _Known.of(train)
        encoding = TargetEncoding.fit(train, spec)
        base_logit = float(np.log(encoding.prior / (1.0 - encoding.prior)))
        data = _dataset(partial(_inputs_in_time, encoding, train, label_delay), known, base_logit)
        parameters = _parameters(config, len(train), seed)
        loss = None
        if known.is_open or (validation is not None and (validation.observed_share < 1.0).any()):
            parameters |= {"objective": _cure_objective(known), "metric": "none"}
            loss = None if validation is None else _validation_loss(validation)
        valid: list[lightgbm.Dataset] = []
        if validation is not None and len(validation):
            later = partial(_inputs, encoding, validation)
            valid = [_dataset(later, _Known.of(validation), base_logit, reference=data)]
        booster = lightgbm.train(
            parameters,
            data,
            num_boost_round=rounds or config.rounds,
            valid_sets=valid,
            feval=loss,
            callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)] if valid else [],
        )
        if booster.best_iteration > 0:
            # Through text, so that a model just trained and one loaded from its files are the same trees.
            booster = lightgbm.Booster(
                model_str=booster.model_to_string(num_iteration=booster.best_iteration)
            )
        return cls(spec, encoding, booster, base_logit)

    @property
    def rounds(self) -> int:
        return int(self._booster.num_trees())

    def predict_logit(
        self,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """Log-odds of each row, shape (n,). Trees know values by their buckets; ``ids`` is not looked at."""
        logit = np.full(len(buckets), self.base_logit)
        for start in range(0, len(buckets), _PREDICT_ROWS):
            part = slice(start, start + _PREDICT_ROWS)
            inputs = np.concatenate((self.encoding.transform(buckets[part]), numbers[part]), axis=1)
            logit[part] += self._booster.predict(inputs, raw_score=True, num_threads=1)
        return logit

    def to_files(self) -> dict[str, bytes]:
        """The trees as LightGBM text, the encoding as safetensors."""
        arrays = {
            "positives": self.encoding.positives,
            "exposure": self.encoding.exposure,
            "count": self.encoding.count,
            "scalars": np.array([self.encoding.prior, self.encoding.smoothing, self.base_logit]),
            "spec_digest": _digest_of(self.spec),
        }
        return {
            _TREES_FILE: self._booster.model_to_string().encode(),
            _ENCODING_FILE: safetensors.numpy.save(arrays),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], spec: FeatureSpec) -> Self:
        """The model that ``to_files`` wrote.

        Raises
        ------
        StaleStateError
            If a file is missing or broken, or was made for another feature spec.
        """
        try:
            arrays = safetensors.numpy.load(files[_ENCODING_FILE])
            prior, smoothing, base_logit = arrays["scalars"].tolist()
            positives, exposure, count = (arrays[name] for name in ("positives", "exposure", "count"))
            made_for = arrays["spec_digest"]
            booster = lightgbm.Booster(model_str=files[_TREES_FILE].decode())
        except (KeyError, ValueError, safetensors.SafetensorError, lightgbm.basic.LightGBMError) as error:
            raise StaleStateError(f"expected the files of a tree model. Received: {error!r}.") from error
        if made_for.tobytes() != _digest_of(spec).tobytes():
            raise StaleStateError(
                f"the tree model was made for feature spec {made_for.tobytes().hex()}. "
                f"Received: {spec.digest()}.",
                hint="load it with the feature spec of its own release",
            )
        encoding = TargetEncoding(positives, exposure, count, prior, smoothing, tuple(spec.column_field))
        return cls(spec, encoding, booster, base_logit)


def _digest_of(spec: FeatureSpec) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(spec.digest()), np.uint8)


def _parameters(config: TeacherConfig, rows: int, seed: int) -> dict[str, Any]:
    return {
        "objective": "binary",
        "metric": "binary_logloss",
        "boost_from_average": False,
        "learning_rate": config.learning_rate,
        "num_leaves": config.leaves,
        # A small log still needs leaves: the smallest holds at most 2 % of the rows.
        "min_data_in_leaf": max(1, min(config.min_rows_in_leaf, rows // 50)),
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "seed": seed,
        "verbosity": -1,
    }


@dataclass(frozen=True)
class _Known:
    """What is known of the outcome of each row: the columns that stay in memory, float32, each (n,)."""

    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    observed_share: NDArray[np.float32]

    @classmethod
    def of(cls, rows: TrainingRows) -> Self:
        parts = [(part.label, part.weight, part.observed_share) for part in rows.batches(CHUNK_ROWS)]
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    @property
    def is_open(self) -> bool:
        """Whether some labels may still change."""
        return bool((self.observed_share < 1.0).any())


def _inputs_in_time(
    encoding: TargetEncoding, train: TrainingRows, label_delay: int
) -> Iterator[NDArray[np.float32]]:
    for rows, encoded in encode_in_time(encoding, train, label_delay):
        yield np.concatenate((encoded, rows.numbers), axis=1)


def _inputs(encoding: TargetEncoding, rows: TrainingRows) -> Iterator[NDArray[np.float32]]:
    for part in rows.batches(CHUNK_ROWS):
        yield np.concatenate((encoding.transform(part.buckets), part.numbers), axis=1)


def _dataset(
    inputs: Callable[[], Iterator[NDArray[np.float32]]],
    known: _Known,
    base_logit: float,
    reference: lightgbm.Dataset | None = None,
) -> lightgbm.Dataset:
    n = len(known.label)
    return lightgbm.Dataset(
        EncodedRows(n, inputs),
        known.label,
        weight=known.weight,
        init_score=np.full(n, base_logit),
        reference=reference,
    )


def _cure_objective(train: _Known) -> Any:
    label, share = train.label.astype(np.float64), train.observed_share.astype(np.float64)
    weight = train.weight.astype(np.float64)

    def objective(logit: NDArray[np.float64], _: lightgbm.Dataset) -> tuple[Any, Any]:
        gradient, curvature = cure_derivatives(logit, label, share, majorised=True)
        return weight * gradient, weight * curvature

    return objective


def _validation_loss(validation: TrainingSet) -> Any:
    def loss(logit: NDArray[np.float64], _: lightgbm.Dataset) -> tuple[str, float, bool]:
        return "cured_log_loss", cured_log_loss(logit, validation), False

    return loss
