"""Shares of events that repeat, that belong to nothing, and that find their window."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.check_findings import Finding, at_least, at_most, told
from pipelines.config_sections import ChecksConfig

__all__ = ["JOINED", "coverage", "event_findings"]

# Classes of `pipelines.sample_counts.event_counts` that have found what they belong to, in time.
JOINED = ("credited", "superseded", "retraction", "view_through")
_ELSEWHERE = ("read", "duplicate", "before_window")


def coverage(classes: Mapping[str, int]) -> float | None:
    """Share of distinct clicks, or conversions, that found what they belong to, in time.

    Left out are those that belong to an impression outside the snapshot's window. None if there are none.

    Examples
    --------
    >>> coverage({"credited": 7, "late": 1, "orphan": 2, "duplicate": 5, "read": 15})
    0.7
    """
    own = {name: count for name, count in classes.items() if name not in _ELSEWHERE}
    total = sum(own.values())
    return sum(own.get(name, 0) for name in JOINED) / total if total else None


def event_findings(events: Mapping[str, Mapping[str, int]], limits: ChecksConfig) -> list[Finding]:
    """Rates of a manifest's ``events`` beside their limits.

    ::

        duplicate rate  duplicate / read
        orphan rate     orphan / (read - duplicate)
        coverage        joined / (read - duplicate - before_window)
    """
    findings = []
    for kind, classes in events.items():
        read = classes.get("read", 0)
        if not read:
            findings.append(told("events", "no events were read", kind))
            continue
        repeated = classes.get("duplicate", 0)
        findings.append(
            at_most(
                "events",
                "events delivered again",
                kind,
                repeated / read,
                limits.duplicate_rate,
                "share",
                f"{repeated:,} of {read:,}",
            )
        )
        if "orphan" in classes:
            findings += _of_outcomes(kind, classes, limits)
    return findings


def _of_outcomes(kind: str, classes: Mapping[str, int], limits: ChecksConfig) -> list[Finding]:
    distinct = classes["read"] - classes.get("duplicate", 0)
    orphans = classes["orphan"]
    found = coverage(classes)
    lost = {
        name: count
        for name, count in classes.items()
        if count and name not in JOINED and name not in _ELSEWHERE
    }
    words = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in lost.items())
    check = "events that found their window in time"
    return [
        at_most(
            "events",
            "events whose impression is not known",
            kind,
            orphans / max(1, distinct),
            limits.orphan_rate,
            "share",
            f"{orphans:,} of {distinct:,}",
        ),
        told("events", check, kind, None, "share", "none belongs to the window")
        if found is None
        else at_least("events", check, kind, found, limits.coverage, "share", words),
    ]
