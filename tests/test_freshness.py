"""Freshness from manifests and the server's log, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.freshness import BUDGET_S, freshness_report
from jobs.release import Release
from jobs.release_watch import Loaded
from jobs.served_freshness import ServedFreshness
from tests.releases import publish

BEGAN = 1_700_000_000_000


def released(root: Path, step: int, published_at: int, counts: list[tuple[int, int]]) -> str:
    """A release whose events reached the broker in buckets of 100 ms: (ms after ``BEGAN``, events)."""
    path = publish(root, step)
    buckets = [[(BEGAN + at) // 100, count] for at, count in counts]
    tell(
        path,
        {
            "published_at": BEGAN + published_at,
            "produced_at": {"resolution_ms": 100, "counts": buckets},
        },
    )
    return path.name


def tell(release: Path, extra: dict[str, Any]) -> None:
    """Replace what a manifest tells beside its digest."""
    manifest = json.loads((release / "MANIFEST.json").read_text())
    (release / "MANIFEST.json").write_text(json.dumps({**manifest, "extra": extra}))


@pytest.fixture
def releases(tmp_path: Path) -> tuple[Path, list[str]]:
    root = tmp_path / "releases"
    first = publish(root, 0, epoch=0)  # the first student: it has learned nothing online
    tell(first, {})
    names = [
        released(root, 10, 2_050, [(0, 90), (1_000, 10)]),
        released(root, 20, 4_050, [(3_000, 100)]),
        released(root, 30, 6_050, [(5_000, 50)]),
    ]
    return root, names


def loaded(folder: Path, *loads: tuple[str, int]) -> Path:
    path = folder / "loaded.jsonl"
    lines = [json.dumps({"release": name, "loaded_at_ms": BEGAN + at}) for name, at in loads]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_an_event_counts_as_served_when_a_release_that_learned_it_or_a_later_one_is_loaded(
    releases: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, names = releases
    # The server skipped the second release; the third was never loaded by it at all.
    report = freshness_report(root, loaded(tmp_path, (names[0], 2_550), (names[2], 6_550)))
    published, served = (report["stages"][f"event to {name}"] for name in ("published", "served"))
    # Middle of a bucket: 50 ms after its start. 2.0 s (90), 1.0 s (10), 1.0 s (100), 1.0 s (50).
    assert published["rows"] == served["rows"] == 250
    assert published["p50_s"] == pytest.approx(1.0, rel=0.05)
    assert published["p95_s"] == pytest.approx(2.0, rel=0.05)
    # Served: 2.5 (90), 1.5 (10), by the release after theirs 3.5 (100), 1.5 (50).
    assert served["p50_s"] == pytest.approx(2.5, rel=0.05)
    assert served["p95_s"] == pytest.approx(3.5, rel=0.05)
    assert report["budget_s"] == BUDGET_S


def test_events_of_a_release_that_was_never_loaded_are_published_but_not_served(
    releases: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, names = releases
    report = freshness_report(root, loaded(tmp_path, (names[0], 2_550)))
    assert report["stages"]["event to published"]["rows"] == 250
    assert report["stages"]["event to served"]["rows"] == 100


def test_only_events_since_a_moment_are_judged(releases: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, names = releases
    path = loaded(tmp_path, (names[2], 6_550))
    report = freshness_report(root, path, since_ms=BEGAN + 3_000)
    assert report["stages"]["event to published"]["rows"] == 150
    assert report["stages"]["event to published"]["max_s"] == pytest.approx(1.0, rel=0.05)


def test_a_server_counts_each_event_once_when_it_comes_into_service(releases: tuple[Path, list[str]]) -> None:
    root, names = releases
    freshness = ServedFreshness(root)
    # It begins with the first release, skips the second, goes back, and loads the third again.
    for name, at in ((names[0], 2_550), (names[2], 6_550), (names[0], 7_000), (names[2], 8_000)):
        freshness.loaded(Loaded(Release.load(root / name), BEGAN + at))
    (family,) = freshness.collect()
    told = {
        (sample.name.rsplit("_", 1)[1], sample.labels.get("le")): sample.value for sample in family.samples
    }
    # Of the second release's events 3.5 s (100), of the third's 1.5 s (50).
    assert told["count", None] == 150
    assert told["sum", None] == pytest.approx(3.5 * 100 + 1.5 * 50)
    assert [told["bucket", edge] for edge in ("1.0", "2.0", "3.0", "5.0")] == [0, 50, 50, 150]
