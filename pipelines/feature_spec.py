"""What each feature is: one spec for Spark, worker and serving.

The spec is a TOML file meant to be read and edited; its digest travels with samples, checkpoints and
releases.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import ConfigError
from pipelines.hashing import HASH_SEED

__all__ = ["Categorical", "Cross", "FeatureSpec", "Hour", "LeftOut", "Numeric", "Sequence"]

Group = Literal["user", "item", "context", "position"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Categorical(_Part):
    """A value with an embedding. ``wide_only`` keeps it out of every interaction (position)."""

    name: str
    buckets: int = Field(ge=2)
    group: Group = "context"
    wide_only: bool = False


class Numeric(_Part):
    """A number: standardised for the dense layers, and cut at ``boundaries`` into an embedding."""

    name: str
    transform: Literal["identity", "log1p"] = "identity"
    low: float
    high: float
    mean: float
    std: float = Field(gt=0)
    boundaries: tuple[float, ...] = ()
    group: Group = "context"


class Sequence(_Part):
    """A list of values; their embeddings are averaged."""

    name: str
    buckets: int = Field(ge=2)
    max_length: int = Field(ge=1)
    group: Group = "context"


class Cross(_Part):
    """Two categorical values taken together."""

    of: tuple[str, str]
    buckets: int = Field(ge=2)

    @property
    def name(self) -> str:
        return "_x_".join(self.of)


class Hour(_Part):
    """Hour of the day (UTC) of the impression."""

    name: Literal["hour_of_day"] = "hour_of_day"


class LeftOut(_Part):
    """A column that is not used, and why."""

    name: str
    reason: str


class FeatureSpec(_Part):
    """All features, in the order in which they are encoded.

    Row 0 of the embedding table is padding. Field ``i`` owns the rows
    ``[offsets[i], offsets[i] + sizes[i])``; the first of them stands for null.

    ``dynamic`` names fields of hashed values whose ids are encoded beside their buckets, so that a model can
    give them rows of their own (`models.id_table`).
    """

    version: Literal[1] = 1
    hash_seed: int = HASH_SEED
    categorical: tuple[Categorical, ...] = ()
    numeric: tuple[Numeric, ...] = ()
    hour: Hour | None = None
    sequence: tuple[Sequence, ...] = ()
    cross: tuple[Cross, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    dynamic: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_are_consistent(self) -> FeatureSpec:
        names = [name for name, _ in self.fields()]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each feature may be named once. Received twice: {', '.join(repeated)}")
        known = {part.name for part in self.categorical}
        for cross in self.cross:
            missing = [name for name in cross.of if name not in known]
            if missing:
                raise ValueError(f"a cross takes categorical features. Not among them: {', '.join(missing)}")
        parts: tuple[Categorical | Cross | Sequence, ...] = (*self.categorical, *self.cross, *self.sequence)
        hashed = {part.name for part in parts}
        unknown = [name for name in self.dynamic if name not in hashed]
        if unknown:
            raise ValueError(
                f"dynamic takes categorical features, sequences and crosses: {', '.join(sorted(hashed))}. "
                f"Not among them: {', '.join(unknown)}"
            )
        return self

    def with_dynamic(self, names: Iterable[str]) -> FeatureSpec:
        """The same with more dynamic fields.

        Raises
        ------
        ConfigError
            If a name is no field of hashed values.
        """
        dynamic = tuple(dict.fromkeys((*self.dynamic, *names)))
        try:
            return FeatureSpec.model_validate({**dict(self), "dynamic": dynamic})
        except ValidationError as error:
            raise ConfigError(f"features.dynamic: {error.errors()[0]['msg']}.") from error

    def fields(self) -> Iterator[tuple[str, int]]:
        """Name and number of table rows of each field: interacting ones first, then wide-only ones."""
        for part in self.categorical:
            if not part.wide_only:
                yield part.name, part.buckets
        for number in self.numeric:
            if number.boundaries:
                # null, then one bucket between each pair of boundaries and one past either end.
                yield number.name, len(number.boundaries) + 2
        if self.hour is not None:
            yield self.hour.name, 25
        for cross in self.cross:
            yield cross.name, cross.buckets
        for sequence in self.sequence:
            yield sequence.name, sequence.buckets
        for part in self.categorical:
            if part.wide_only:
                yield part.name, part.buckets

    @property
    def field_names(self) -> list[str]:
        return [name for name, _ in self.fields()]

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self.fields()]

    @property
    def offsets(self) -> list[int]:
        offsets, start = [], 1
        for size in self.sizes:
            offsets.append(start)
            start += size
        return offsets

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table, the padding row included."""
        return 1 + sum(self.sizes)

    @property
    def wide_only_fields(self) -> int:
        """How many of the last fields are wide only."""
        return sum(part.wide_only for part in self.categorical)

    @property
    def column_field(self) -> list[int]:
        """For each column of the encoded bucket matrix, the field that it belongs to.

        A sequence of length L owns L neighbouring columns, every other field one.
        """
        lengths = {part.name: part.max_length for part in self.sequence}
        columns: list[int] = []
        for index, name in enumerate(self.field_names):
            columns += [index] * lengths.get(name, 1)
        return columns

    @property
    def id_columns(self) -> list[int]:
        """The columns of the encoded bucket matrix that belong to dynamic fields."""
        names = self.field_names
        return [column for column, field in enumerate(self.column_field) if names[field] in self.dynamic]

    def digest(self) -> str:
        """sha256 of what decides the encoding (the left-out list and notes do not)."""
        body = self.model_dump(mode="json", exclude={"left_out", *self._unused()})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(mode="json", exclude=self._unused(), exclude_none=True))

    def _unused(self) -> set[str]:
        # Specs without dynamic fields stay what they were, digest and text.
        return set() if self.dynamic else {"dynamic"}

    @classmethod
    def from_toml(cls, text: str, where: str = "feature spec") -> FeatureSpec:
        """Parse a spec.

        Raises
        ------
        ConfigError
            If the text is not TOML or does not fit the schema.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where} is not valid TOML: {error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
            raise ConfigError(f"{where}, key {key}: {first['msg']}.") from error

    @classmethod
    def read(cls, path: Path) -> FeatureSpec:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the feature spec {path}: {error.strerror}.") from error
        return cls.from_toml(text, str(path))
