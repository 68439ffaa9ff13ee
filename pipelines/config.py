"""Configuration: one TOML file, every key optional, unknown keys refused by name.

Each section is a frozen pydantic model (`pipelines.config_sections`); durations are kept as int
milliseconds and written as ``30m``, ``24h``, ``7d``.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError, model_validator

from pipelines.config_sections import (
    AttributionConfig,
    BacktestConfig,
    BreakerConfig,
    CalibrationConfig,
    ChecksConfig,
    DelayConfig,
    DistillationConfig,
    FeaturesConfig,
    KafkaConfig,
    LabelsConfig,
    Policy,
    PublishConfig,
    ReplayConfig,
    SamplesConfig,
    Section,
    ServeConfig,
    StreamConfig,
    StudentConfig,
    Task,
    TaskLabelsConfig,
    TeacherConfig,
    TrackingConfig,
)
from pipelines.errors import ConfigError

__all__ = ["Config", "Task", "config_error", "dump_config", "load_config", "parse_config", "with_values"]


class Config(Section):
    """The whole configuration.

    Examples
    --------
    >>> load_config(None, ["attribution.click_window=1h"]).attribution.click_window
    3600000
    """

    attribution: AttributionConfig = AttributionConfig()
    labels: LabelsConfig = LabelsConfig()
    samples: SamplesConfig = SamplesConfig()
    checks: ChecksConfig = ChecksConfig()
    delay: DelayConfig = DelayConfig()
    features: FeaturesConfig = FeaturesConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    replay: ReplayConfig = ReplayConfig()
    distillation: DistillationConfig = DistillationConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    backtest: BacktestConfig = BacktestConfig()
    kafka: KafkaConfig = KafkaConfig()
    stream: StreamConfig = StreamConfig()
    breaker: BreakerConfig = BreakerConfig()
    publish: PublishConfig = PublishConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _tasks_have_windows(self) -> Config:
        missing = [task for task in self.labels.tasks if task not in self.attribution.tasks]
        if missing:
            raise ValueError(
                "labels.tasks names view_through, so attribution.view_through_window must be set"
            )
        return self

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
        features = config.features.model_copy(update={"spec": path.parent / config.features.spec})
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
        raise config_error(error) from error


def with_values(config: Config, section: str, values: Mapping[str, Any]) -> Config:
    """The configuration with other values in one section.

    Raises
    ------
    ConfigError
        If a value does not fit.

    Examples
    --------
    >>> with_values(Config(), "samples", {"negative_rate": 0.1}).samples.negative_rate
    0.1
    """
    if not values:
        return config
    document = config.model_dump(mode="json", exclude_none=True)
    document[section] |= values
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise config_error(error) from error


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


def config_error(
    error: ValidationError,
    model: type[BaseModel] = Config,
    what: str = "config key",
    hint: str = "ctrstream backtest --print-config lists the keys",
) -> ConfigError:
    """What pydantic found wrong with a document of a model, told by its key; ``what`` is a word for a key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, list(_valid_keys(model)), n=1, cutoff=0.4)
        return ConfigError(f"unknown {what} {key}.", hint=f"did you mean {nearest[0]}?" if nearest else hint)
    if not key:
        # A rule over several sections names the keys itself.
        return ConfigError(f"{first['msg'].removeprefix('Value error, ')}.")
    return ConfigError(f"{what} {key}: {first['msg']}. Received: {first.get('input')!r}.")


def _valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _valid_keys(kind, f"{prefix}{name}.")
