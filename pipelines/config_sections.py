"""The sections of the configuration file: what can be set, its default, and what fits together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from pipelines.duration import format_duration, parse_duration
from pipelines.errors import ConfigError

__all__ = [
    "TASKS",
    "AttributionConfig",
    "BacktestConfig",
    "BreakerConfig",
    "CalibrationConfig",
    "ChecksConfig",
    "DelayConfig",
    "DistillationConfig",
    "Duration",
    "FeaturesConfig",
    "KafkaConfig",
    "LabelsConfig",
    "Policy",
    "PublishConfig",
    "ReplayConfig",
    "SamplesConfig",
    "Section",
    "ServeConfig",
    "StreamConfig",
    "StudentConfig",
    "TablesConfig",
    "Task",
    "TaskLabelsConfig",
    "TeacherConfig",
    "TopicsConfig",
    "TrackingConfig",
]

Task = Literal["click", "conversion", "view_through"]
# All tasks, in the order in which they are kept everywhere.
TASKS: tuple[Task, ...] = ("click", "conversion", "view_through")
Policy = Literal["wait", "vanilla", "fnw", "fnc", "esdfm", "defer", "defuse", "bidefuse", "relabel"]


def _to_milliseconds(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


Duration = Annotated[
    int,
    BeforeValidator(_to_milliseconds),
    Field(gt=0),
    PlainSerializer(format_duration, return_type=str),
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class AttributionConfig(Section):
    """How long an outcome is credited, and how long the joiner waits before it first speaks."""

    click_window: Duration = 30 * 60_000
    attribution_window: Duration = 7 * 86_400_000
    observation_window: Duration = 15 * 60_000
    allowed_lateness: Duration = 5 * 60_000
    view_through_window: Duration | None = None

    @model_validator(mode="after")
    def _windows_nest(self) -> AttributionConfig:
        if self.observation_window > self.attribution_window:
            raise ValueError(
                "observation_window must not exceed attribution_window. Got "
                f"{format_duration(self.observation_window)} > {format_duration(self.attribution_window)}"
            )
        return self

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that have label windows."""
        return ("click", "conversion") if self.view_through_window is None else TASKS

    def width(self, task: Task) -> int:
        """Width of the label window of a task, ms.

        Raises
        ------
        ConfigError
            If the task is ``view_through`` and has no window.
        """
        if task == "view_through":
            if self.view_through_window is None:
                raise ConfigError(
                    "the task view_through has no window.", hint="set attribution.view_through_window"
                )
            return self.view_through_window
        return self.click_window if task == "click" else self.attribution_window

    def observation(self, task: Task) -> int:
        """How long the first row of a task waits, ms: the observation window within its own."""
        return min(self.observation_window, self.width(task))


class TaskLabelsConfig(Section):
    """What differs for one task."""

    policy: Policy | None = None
    observation_window: Duration | None = None


class LabelsConfig(Section):
    """Which rows the stream emits for an outcome that may still come.

    ``auto`` is settled for each task when the first models are trained: see `pipelines.label_plan`.
    """

    policy: Policy | Literal["auto"] = "auto"
    click: TaskLabelsConfig = TaskLabelsConfig()
    conversion: TaskLabelsConfig = TaskLabelsConfig()
    view_through: TaskLabelsConfig = TaskLabelsConfig()
    confirm_window: Duration | None = None
    traffic_ratio: bool = True
    tasks: tuple[Task, ...] = ("click", "conversion")


class SamplesConfig(Section):
    """How snapshots are cut and sampled.

    Rows are stored by day or hour of the window's opening. Of the negatives the share ``negative_rate`` is
    kept by a stable hash; positives, and exploration traffic (impressions with a propensity), are repeated.
    Weights make up for it: totals stay what they were.
    """

    granularity: Literal["day", "hour"] = "day"
    negative_rate: float = Field(default=1.0, gt=0, le=1)
    positive_copies: int = Field(default=1, ge=1, le=100)
    exploration_copies: int = Field(default=1, ge=1, le=100)


class ChecksConfig(Section):
    """What `samples check` lets pass; shares lie in [0, 1]. See ``docs/samples.md``.

    ``duplicate_rate``, ``orphan_rate`` and ``dead_letter_rate`` are the most of all events that may be such;
    ``coverage`` the least share of the clicks, and of the conversions, that find their window;
    ``completeness`` the least traffic of an hour beside the same hour of other days; ``overlap`` the most of
    a test set that may have been trained on. ``leak_auc`` and ``kind_auc`` bound how well one column may tell
    the label, and open from closed windows, on about ``leak_rows`` rows a task (0: not looked at).
    """

    duplicate_rate: float = Field(default=0.1, ge=0, le=1)
    orphan_rate: float = Field(default=0.05, ge=0, le=1)
    dead_letter_rate: float = Field(default=0.01, ge=0, le=1)
    coverage: float = Field(default=0.5, ge=0, le=1)
    completeness: float = Field(default=0.2, ge=0, lt=1)
    overlap: float = Field(default=0.0, ge=0, le=1)
    leak_auc: float = Field(default=0.99, ge=0.5, le=1)
    kind_auc: float = Field(default=0.9, ge=0.5, le=1)
    leak_rows: int = Field(default=100_000, ge=0)


class DelayConfig(Section):
    """How late outcomes come, and on what that depends: see `pipelines.delay`.

    ``curve`` is one curve a task; ``groups`` one for each value of the features ``groups``, shrunk towards
    the task's; ``hazard`` a small network over the features.
    """

    model: Literal["curve", "groups", "hazard"] = "curve"
    groups: tuple[str, ...] = ("campaign_id",)


class FeaturesConfig(Section):
    """Where the feature spec is; absent means inferred from the warm-up part of the log.

    ``dynamic`` adds to the features whose ids get table rows of their own: see `TablesConfig`.
    """

    spec: Path | None = None
    dynamic: tuple[str, ...] = ()


class TeacherConfig(Section):
    """The model trained offline."""

    model: Literal["lightgbm", "network"] = "lightgbm"
    rounds: int = Field(default=120, ge=1)
    learning_rate: float = Field(default=0.08, gt=0)
    leaves: int = Field(default=31, ge=2)
    min_rows_in_leaf: int = Field(default=100, ge=1)


class TablesConfig(Section):
    """Rows of their own for ids of the dynamic features; see ``docs/tables.md``.

    At most ``capacity`` ids have one at a time (0: none). An id gets it when it has been learned from
    ``admit_after`` times, counted in ``filter_cells`` cells, and loses it when it has not been for ``ttl``.
    """

    capacity: int = Field(default=1 << 20, ge=0, le=1 << 30)
    admit_after: int = Field(default=2, ge=1)
    filter_cells: int = Field(default=1 << 22, ge=64, le=1 << 30)
    ttl: Duration = 30 * 86_400_000


class StudentConfig(Section):
    """The model that learns online.

    ``optimizer`` moves embeddings and first-order weights. ``l1`` is for ``ftrl`` alone;
    ``initial_accumulator`` is not for ``lazy_adam``.
    """

    model: Literal["lr", "fm", "deepfm", "dcn"] = "deepfm"
    frozen: tuple[Literal["cross", "dense"], ...] = ("cross", "dense")
    optimizer: Literal["adagrad", "rowwise_adagrad", "ftrl", "lazy_adam"] = "adagrad"
    batch_rows: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    embedding_dim: int = Field(default=8, ge=1)
    hidden: tuple[int, ...] = (64, 32)
    cross_layers: int = Field(default=2, ge=1)
    l1: float = Field(default=0.0, ge=0)
    l2: float = Field(default=0.1, ge=0)
    initial_accumulator: float = Field(default=0.01, gt=0)
    dense_learning_rate: float = Field(default=0.002, gt=0)
    warmup_epochs: int = Field(default=3, ge=1)
    seed: int = 17
    tables: TablesConfig = TablesConfig()

    def hashed(self) -> StudentConfig:
        """The same without rows of their own for ids."""
        return self.model_copy(update={"tables": self.tables.model_copy(update={"capacity": 0})})

    @model_validator(mode="after")
    def _l1_is_for_ftrl(self) -> StudentConfig:
        if self.l1 and self.optimizer != "ftrl":
            raise ValueError(f'l1 needs optimizer = "ftrl". Got l1 = {self.l1} with "{self.optimizer}"')
        return self


class ReplayConfig(Section):
    """Yesterday's rows from after this time of day, mixed into each update."""

    ratio: float = Field(default=0.25, ge=0, le=4)
    rows_per_hour: int = Field(default=4096, ge=1)


class DistillationConfig(Section):
    """Weight of the cross entropy to the teacher, beside 1 for the log loss, and how old a teacher may be.

    Rows more than ``max_age`` younger than the newest event that the teacher has learned are not distilled.
    A week: traffic repeats itself by the week, so up to then the teacher has seen each of its days.
    """

    weight: float = Field(default=0.2, ge=0)
    max_age: Duration | Literal["off"] = 7 * 86_400_000


class CalibrationConfig(Section):
    """How logits become probabilities.

    ``labels`` says what the online part learns from: windows that have closed, the rows of the label policy
    with their weights, or outcomes as they come, by the delay curve. ``auto`` is settled for each task when
    the first models are trained; see ``docs/calibration-labels.md``.
    """

    method: Literal[
        "auto", "none", "temperature", "platt", "beta", "isotonic", "histogram", "plain_isotonic"
    ] = "auto"
    online: bool = True
    labels: Literal["auto", "matured", "policy", "delay_model"] = "auto"
    segments: tuple[str, ...] = ("campaign_id",)


class BacktestConfig(Section):
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


class TopicsConfig(Section):
    """Names of the Kafka topics."""

    impressions: str = "impressions"
    clicks: str = "clicks"
    conversions: str = "conversions"
    dead_letters: str = "dead_letters"
    labels: str = "labels"


class KafkaConfig(Section):
    """The broker.

    ``options`` go to kafka-python as they are (TLS, SASL); values ``env:NAME`` are read from the environment.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    topics: TopicsConfig = TopicsConfig()
    partitions: int = Field(default=2, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    connect_timeout: Duration = 20_000
    idle_timeout: Duration = 1_000


class StreamConfig(Section):
    """The online worker. What it publishes it commits first, so one interval (wall clock) rules both.

    A checkpoint holds the tables whole, or the rows that changed since the one before it: at most ``deltas``
    such in a row.
    """

    publish_every: Duration = 2_000
    keep_checkpoints: int = Field(default=3, ge=2)
    deltas: int = Field(default=16, ge=0, le=1000)
    keep_releases: int = Field(default=50, ge=2)
    metrics: str = ""
    stall_after: Duration = 30_000
    lag_alarm: int = Field(default=100_000, ge=0)


class BreakerConfig(Section):
    """When the worker stops learning: bounds on the rows of a window of event time, and the hold's size.

    See `monitoring.breaker` for the figures. The defaults are wide enough for any day's ups and downs; bounds
    that depend on the product (the click rate itself, rows per second) are open until they are set.
    ``min_impressions`` and ``min_outcomes`` (clicks, conversions) are what a window must hold before it is
    judged; ``hold_rows`` is how many rows wait on disk at most.
    """

    enabled: bool = True
    window: Duration = 10 * 60_000
    min_impressions: int = Field(default=500, ge=1)
    # With 50 expected and a fall to a tenth, chance alone trips less than once in 10**15 looks.
    min_outcomes: int = Field(default=50, ge=1)
    click_rate: tuple[float, float] = (0.0, 1.0)
    click_rate_change: tuple[float, float] = (0.1, 10.0)
    click_coverage: float = Field(default=0.5, ge=0, le=1)
    conversion_coverage: float = Field(default=0.0, ge=0, le=1)
    null_rate: float = Field(default=1.0, ge=0, le=1)
    null_rise: float = Field(default=0.5, ge=0, le=1)
    rows_per_second: tuple[float, float] = (0.0, 1e9)
    hold_rows: int = Field(default=10_000_000, ge=1)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> BreakerConfig:
        for name in ("click_rate", "click_rate_change", "rows_per_second"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < float("inf"):
                raise ValueError(
                    f"{name} must be two finite bounds, 0 or more, the lower first. Got [{low}, {high}]"
                )
        return self


class PublishConfig(Section):
    """When the worker publishes what it has committed, and what it does not: see ``docs/publishing.md``.

    Without a schedule every commit is a candidate; with both, whichever is due first. A round of the gate is
    ``support_rows`` rows with ``support_positives`` outcomes.
    """

    every_event_time: Duration | None = None
    every_rows: int | None = Field(default=None, ge=1)
    gate: bool = True
    support_rows: int = Field(default=5000, ge=2)
    support_positives: int = Field(default=200, ge=1)
    without_support: Literal["publish", "hold"] = "publish"
    worse_by: float = Field(default=0.02, ge=0)
    z: float = Field(default=4.0, gt=0)
    pcoc: tuple[float, float] = (0.8, 1.25)
    weight_growth: float = Field(default=10.0, gt=1)
    sample_rows: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _pcoc_holds_one(self) -> PublishConfig:
        low, high = self.pcoc
        if not 0 < low < 1 < high:
            raise ValueError(f"pcoc must be two limits above 0 with 1 between them. Got {low:g} and {high:g}")
        return self


class ServeConfig(Section):
    """The scoring endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    reload_every: Duration = 500


class TrackingConfig(Section):
    """MLflow: an empty ``uri`` means no tracking."""

    uri: str = ""
    experiment: str = "ctrstream"
    registered_model: str = "ctrstream"
