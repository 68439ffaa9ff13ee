"""The worst segments of a release: figures of its calibration, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from calibration.chain import CalibrationChain
from calibration.link import logit_of, sigmoid
from calibration.segments import SegmentConfig, SegmentCorrection
from jobs.cli import cli
from jobs.release import TaskFiles, write_release
from jobs.release_segments import release_segments, segment_counts
from pipelines.config import Config, dump_config
from tests.releases import SPEC, trained

LEVELS = ("all", "campaign_id", "campaign_id*site")


@pytest.fixture(scope="module")
def segments() -> SegmentCorrection:
    rng = np.random.default_rng(0)
    keys = np.stack([rng.integers(1, 21, 60_000), rng.integers(1, 4, 60_000)], axis=1)
    p = sigmoid(rng.normal(-2.0, 0.5, 60_000))
    truth = np.where(keys[:, 0] == 7, 1.6 * p, p)
    return SegmentCorrection.fit(SegmentConfig(LEVELS), keys, p, rng.random(60_000) < truth)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, segments: SegmentCorrection) -> Path:
    student, _ = trained(1)
    chain = CalibrationChain(segments=segments)
    return write_release(
        tmp_path_factory.mktemp("releases"),
        kind="student",
        epoch=1,
        step=10,
        spec=SPEC,
        config_toml=dump_config(Config()),
        tasks={"click": TaskFiles("student", student.to_files(), chain.state())},
        segments=("campaign_id", "site"),
        parent=None,
        last_event_time=1_700_000_000_000,
        learned_events=1,
    )


def test_the_campaign_that_is_off_comes_first_with_bounds_around_the_truth(released: Path) -> None:
    first, *others = release_segments(released)
    assert (first["task"], first["level"], first["key"]) == ("click", "campaign_id", f"{7:016x}")
    assert first["is_off"]
    assert first["lower"] < first["multiplier"] < first["upper"]
    assert first["lower"] < 1.6 / 1.03 and first["upper"] > 1.5
    assert sum(one["is_off"] for one in others) <= 1
    assert {one["level"] for one in others} == set(LEVELS)
    crossed = next(one for one in others if one["level"] == "campaign_id*site")
    assert [len(part) for part in crossed["key"].split("*")] == [16, 16]


def test_lost_log_loss_is_what_the_correction_saves_on_its_rows() -> None:
    rng = np.random.default_rng(1)
    keys = np.stack([rng.integers(0, 3, 30_000), rng.integers(0, 2, 30_000)], axis=1)
    p = sigmoid(rng.normal(-1.0, 0.3, 30_000))
    label = (rng.random(30_000) < sigmoid(logit_of(p) + 0.5 * keys[:, 0] - 0.4 * keys[:, 1])).astype(float)
    whole = SegmentCorrection.fit(SegmentConfig(("a", "a*b")), keys, p, label)
    above = SegmentCorrection.fit(SegmentConfig(("a",)), keys[:, :1], p, label)

    def log_loss(logit: np.ndarray) -> np.ndarray:
        loss: np.ndarray = np.logaddexp(0.0, logit) - label * logit
        return loss

    without = log_loss(above.transform_logit(logit_of(p), keys[:, :1]))
    saved = without - log_loss(whole.transform_logit(logit_of(p), keys))
    nested = segment_counts(whole)[1]
    values = whole.segments("a*b")["values"]
    for gain, (a, b) in zip(nested.gain, values, strict=True):
        assert gain == pytest.approx(saved[(keys == [a, b]).all(axis=1)].sum(), rel=0.05)


def test_the_command_prints_the_same_figures(released: Path) -> None:
    asked = ["release", "segments", "--releases", str(released.parent), released.name]
    result = CliRunner().invoke(cli, [*asked, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == release_segments(released)
    table = CliRunner().invoke(cli, [*asked, "--limit", "3", "--rate", "0.01"])
    assert table.exit_code == 0, table.output
    header, first, *rest = table.output.splitlines()
    assert header.split()[:3] == ["TASK", "LEVEL", "KEY"]
    assert first.split()[:3] == ["click", "campaign_id", f"{7:016x}"]
    assert first.endswith(" OFF")
    assert len(rest) == 2
