"""Configuration: one TOML file, every key optional, unknown keys refused by name.

Each section is a frozen pydantic model; durations are kept as int milliseconds and written as
``30m``, ``24h``, ``7d``.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from pipelines.duration import format_duration, parse_duration
from pipelines.errors import ConfigError

__all__ = ["Config", "Task", "dump_config", "load_config", "parse_config"]

Task = Literal["click", "conversion"]
Policy = Literal["wait", "vanilla", "fnw", "fnc", "esdfm"]


def _to_milliseconds(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


Duration = Annotated[
    int,
    BeforeValidator(_to_milliseconds),
    Field(gt=0),
    PlainSerializer(format_duration, return_type=str),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class AttributionConfig(_Section):
    """How long an outcome is credited, and how long the joiner waits before it first speaks."""

    click_window: Duration = 30 * 60_000
    attribution_window: Duration = 7 * 86_400_000
    observation_window: Duration = 15 * 60_000
    allowed_lateness: Duration = 5 * 60_000

    @model_validator(mode="after")
    def _windows_nest(self) -> AttributionConfig:
        if self.observation_window > self.attribution_window:
            raise ValueError(
                "observation_window must not exceed attribution_window. Got "
                f"{format_duration(self.observation_window)} > {format_duration(self.attribution_window)}"
            )
        return self

    def width(self, task: Task) -> int:
        """Width of the label window of a task, ms."""
        return self.click_window if task == "click" else self.attribution_window

    def observation(self, task: Task) -> int:
        """How long the first row of a task waits, ms: the observation window within its own."""
        return min(self.observation_window, self.width(task))


class TaskLabelsConfig(_Section):
    """What differs for one task."""

    policy: Policy | None = None
    observation_window: Duration | None = None


class LabelsConfig(_Section):
    """Which rows the stream emits for an outcome that may still come.

    ``auto`` is settled for each task when the first models are trained: see `pipelines.label_plan`.
    """

    policy: Policy | Literal["auto"] = "auto"
    click: TaskLabelsConfig = TaskLabelsConfig()
    conversion: TaskLabelsConfig = TaskLabelsConfig()
    traffic_ratio: bool = True
    tasks: tuple[Task, ...] = ("click", "conversion")


class FeaturesConfig(_Section):
    """Where the feature spec is; absent means inferred from the warm-up part of the log."""

    spec: Path | None = None


class TeacherConfig(_Section):
    """The model trained offline."""

    model: Literal["lightgbm", "network"] = "lightgbm"
    rounds: int = Field(default=120, ge=1)
    learning_rate: float = Field(default=0.08, gt=0)
    leaves: int = Field(default=31, ge=2)
    min_rows_in_leaf: int = Field(default=100, ge=1)


class StudentConfig(_Section):
    """The model that learns online."""

    model: Literal["lr", "fm", "deepfm", "dcn"] = "deepfm"
    frozen: tuple[Literal["cross", "dense"], ...] = ("cross", "dense")
    optimizer: Literal["adagrad"] = "adagrad"
    batch_rows: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    embedding_dim: int = Field(default=8, ge=1)
    hidden: tuple[int, ...] = (64, 32)
    cross_layers: int = Field(default=2, ge=1)
    l2: float = Field(default=0.1, ge=0)
    initial_accumulator: float = Field(default=0.01, gt=0)
    dense_learning_rate: float = Field(default=0.002, gt=0)
    warmup_epochs: int = Field(default=3, ge=1)
    seed: int = 17


class ReplayConfig(_Section):
    """Yesterday's rows from after this time of day, mixed into each update."""

    ratio: float = Field(default=0.25, ge=0, le=4)
    rows_per_hour: int = Field(default=4096, ge=1)


class DistillationConfig(_Section):
    """Weight of the cross entropy to the teacher, beside 1 for the log loss."""

    weight: float = Field(default=0.2, ge=0)


class CalibrationConfig(_Section):
    """How logits become probabilities."""

    method: Literal["auto", "none", "platt", "isotonic"] = "auto"
    online: bool = True
    segments: tuple[str, ...] = ("campaign_id",)


class BacktestConfig(_Section):
    """What trains the first models, and how often a release is cut, in event time."""

    warmup: str = "25%"
    publish_every: Duration = 3_600_000

    @model_validator(mode="after")
    def _warmup_is_share_or_duration(self) -> BacktestConfig:
        if self.warmup.endswith("%"):
            share = float(self.warmup[:-1])
            if not 0 < share < 100:
                raise ValueError(f"warmup must lie between 0% and 100%. Got {self.warmup!r}")
        else:
            parse_duration(self.warmup)
        return self


class TopicsConfig(_Section):
    """Names of the Kafka topics."""

    impressions: str = "impressions"
    clicks: str = "clicks"
    conversions: str = "conversions"
    dead_letters: str = "dead_letters"


class KafkaConfig(_Section):
    """The broker.

    ``options`` go to kafka-python as they are (TLS, SASL); values ``env:NAME`` are read from the environment.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    topics: TopicsConfig = TopicsConfig()
    partitions: int = Field(default=2, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    connect_timeout: Duration = 20_000
    idle_timeout: Duration = 1_000


class StreamConfig(_Section):
    """The online worker. What it publishes it commits first, so one interval (wall clock) rules both."""

    publish_every: Duration = 2_000
    keep_checkpoints: int = Field(default=3, ge=2)
    keep_releases: int = Field(default=50, ge=2)


class ServeConfig(_Section):
    """The scoring endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    reload_every: Duration = 500


class TrackingConfig(_Section):
    """MLflow: an empty ``uri`` means no tracking."""

    uri: str = ""
    experiment: str = "ctrstream"
    registered_model: str = "ctrstream"


class Config(_Section):
    """The whole configuration.

    Examples
    --------
    >>> load_config(None, ["attribution.click_window=1h"]).attribution.click_window
    3600000
    """

    attribution: AttributionConfig = AttributionConfig()
    labels: LabelsConfig = LabelsConfig()
    features: FeaturesConfig = FeaturesConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    replay: ReplayConfig = ReplayConfig()
    distillation: DistillationConfig = DistillationConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    backtest: BacktestConfig = BacktestConfig()
    kafka: KafkaConfig = KafkaConfig()
    stream: StreamConfig = StreamConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()

    def policy(self, task: Task) -> Policy:
        """Label policy of a task.

        Raises
        ------
        ConfigError
            If it is ``auto`` and has not been settled.
        """
        own: TaskLabelsConfig = getattr(self.labels, task)
        policy = own.policy or self.labels.policy
        if policy == "auto":
            raise ConfigError(
                f"the label policy of the {task} task is auto and has not been settled.",
                hint="training settles it; or set labels.policy",
            )
        return policy

    def observation(self, task: Task) -> int:
        """How long the first row of a task waits under a policy that waits, ms."""
        own: TaskLabelsConfig = getattr(self.labels, task)
        return min(
            own.observation_window or self.attribution.observation_window, self.attribution.width(task)
        )


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and ``key=value`` overrides (values in TOML syntax; bare words are strings).

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, a key is unknown (the nearest valid one is named) or a
        value does not fit.
    """
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the config file {path}: {error.strerror}.") from error
    config = parse_config(text, str(path), overrides)
    if path is not None and config.features.spec is not None and not config.features.spec.is_absolute():
        features = FeaturesConfig(spec=path.parent / config.features.spec)
        config = config.model_copy(update={"features": features})
    return config


def parse_config(text: str, where: str, overrides: Sequence[str] = ()) -> Config:
    """Configuration from TOML text; ``where`` names it in errors, which are those of `load_config`."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}.") from error
    for override in overrides:
        _apply_override(document, override)
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise _as_config_error(error) from error


def dump_config(config: Config) -> str:
    """The configuration as TOML; ``load_config`` reads it back to an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def resolve_secret(value: Any) -> Any:
    """Replace ``env:NAME`` by the environment variable NAME, so that secrets stay out of files.

    Raises
    ------
    ConfigError
        If the variable is not set.
    """
    if not (isinstance(value, str) and value.startswith("env:")):
        return value
    name = value.removeprefix("env:")
    if name not in os.environ:
        raise ConfigError(f"the environment variable {name} is not set.", hint=f"export {name}=...")
    return os.environ[name]


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"expected --set key=value. Received: {override!r}.")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    table = document
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{parent} is a value, not a section, in --set {override!r}.")
    table[leaf] = value


def _as_config_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, list(_valid_keys(Config)), n=1, cutoff=0.4)
        hint = (
            f"did you mean {nearest[0]}?" if nearest else "ctrstream backtest --print-config lists the keys"
        )
        return ConfigError(f"unknown config key {key}.", hint=hint)
    return ConfigError(f"config key {key}: {first['msg']}. Received: {first.get('input')!r}.")


def _valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _valid_keys(kind, f"{prefix}{name}.")
