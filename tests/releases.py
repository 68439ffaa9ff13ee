"""Releases for tests: real students and calibrators over a spec with every kind of feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from calibration.chain import CalibrationChain
from calibration.online import OnlineConfig
from calibration.segments import SegmentConfig
from jobs.release import TaskFiles, write_release
from jobs.release_manifest import Kind
from models.student import LearnBatch, Student
from pipelines.config import Config, dump_config
from pipelines.config_sections import StudentConfig
from pipelines.feature_spec import Categorical, Cross, FeatureSpec, Hour, Numeric, Sequence
from pipelines.features import encode_rows

SEGMENTS = ("campaign_id",)
SPEC = FeatureSpec(
    categorical=(
        Categorical(name="user_id", buckets=512, group="user"),
        Categorical(name="item_id", buckets=512, group="item"),
        Categorical(name="campaign_id", buckets=64),
        Categorical(name="position", buckets=16, group="position", wide_only=True),
    ),
    numeric=(Numeric(name="age", low=0, high=100, mean=40, std=20, boundaries=(20.0, 40.0, 60.0)),),
    hour=Hour(),
    sequence=(Sequence(name="history", buckets=256, max_length=4, group="user"),),
    cross=(Cross(of=("user_id", "campaign_id"), buckets=512),),
)


def impressions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Impressions as a request has them, some with values missing."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for k in range(count):
        features: dict[str, Any] = {
            "campaign_id": f"c{rng.integers(20)}",
            "age": float(rng.integers(15, 90)),
            "history": [f"i{i}" for i in rng.integers(0, 300, rng.integers(0, 7))],
        }
        if k % 5 == 0:
            del features[["campaign_id", "age", "history"][k % 3]]
        rows.append(
            {
                "impression_id": f"imp-{seed}-{k}",
                "user_id": f"u{rng.integers(200)}",
                "item_id": f"i{rng.integers(300)}",
                "event_time": 1_700_000_000_000 + int(rng.integers(86_400_000)),
                "position": int(rng.integers(1, 12)),
                "features": features,
            }
        )
    return rows


def trained(seed: int, spec: FeatureSpec = SPEC) -> tuple[Student, CalibrationChain]:
    """A student that learned noise, and a calibrator with all its parts."""
    rng = np.random.default_rng(seed)
    rows = impressions(512, seed)
    encoded = encode_rows(list(rows), spec, SEGMENTS)
    label = (rng.random(len(rows)) < 0.3).astype(np.float64)
    student = Student.create(spec, StudentConfig(seed=seed))
    one = np.ones(len(rows))
    student.learn(LearnBatch(encoded.buckets, encoded.numbers, label, one, True, one * np.nan, "wait", 0.0))
    chain = CalibrationChain.fit(
        student.predict_logit(encoded.buckets, encoded.numbers),
        label,
        method="platt",
        online=OnlineConfig(),
        segments=SegmentConfig(SEGMENTS, minimum_support=5.0),
        segment_keys=encoded.segment_key,
    )
    return student, chain


def publish(
    root: Path, step: int, *, epoch: int = 1, kind: Kind = "student", bias: float | None = None
) -> Path:
    """Write a release with both tasks; another step gives other models."""
    tasks = {}
    for task in ("click", "conversion"):
        student, chain = trained(step + (task == "conversion"))
        if bias is not None:
            student.weights["bias"].fill_(bias)
        tasks[task] = TaskFiles("student", student.to_files(), chain.state())
    return write_release(
        root,
        kind=kind,
        epoch=epoch,
        step=step,
        parent=None,
        spec=SPEC,
        config_toml=dump_config(Config()),
        segments=SEGMENTS,
        tasks={"click": tasks["click"], "conversion": tasks["conversion"]},
        last_event_time=1_700_000_000_000 + step,
        learned_events=step * 256,
        extra={"produced_at": {"partition-0": 1_700_000_000_000}},
    )
