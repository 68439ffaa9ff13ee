"""All checks of a snapshot, and what they have found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.check_delays import Arrivals, credited_arrivals, event_shares
from pipelines.check_events import event_findings
from pipelines.check_features import feature_findings
from pipelines.check_findings import Finding, failed
from pipelines.check_lake import lake_findings, partition_findings
from pipelines.check_overlap import RowSet, find_overlap, overlap_findings
from pipelines.config_sections import ChecksConfig
from pipelines.errors import ConfigError, DataError
from pipelines.lake import lake_batches
from pipelines.snapshot import DELAYS_NAME, read_manifest, read_spec
from pipelines.snapshot_check import SnapshotScan, repeated_finding, scan_snapshot
from pipelines.snapshot_manifest import SnapshotManifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["CheckReport", "check"]


@dataclass(frozen=True)
class CheckReport:
    """What was found of a snapshot, in the order in which it is told."""

    location: str
    manifest: SnapshotManifest
    findings: list[Finding]
    arrivals: list[Arrivals]

    @property
    def failed(self) -> list[Finding]:
        return failed(self.findings)

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == "warning"]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "snapshot": self.manifest.snapshot_id,
            "as_of": self.manifest.as_of,
            "since": self.manifest.since,
            "verdict": "failed" if self.failed else "ok",
            "failed": len(self.failed),
            "warnings": len(self.warnings),
            "findings": [finding.as_dict() for finding in self.findings],
            "arrivals": [arrivals.as_dict() for arrivals in self.arrivals],
            "event_shares": event_shares(self.manifest.events),
        }


def check(
    location: str,
    limits: ChecksConfig,
    *,
    lake: str | None = None,
    train: RowSet | None = None,
    test: RowSet | None = None,
    spark: SparkSession | None = None,
) -> CheckReport:
    """Check a snapshot.

    1. Files, sums and rows against the manifest; nothing said that was not known.
    2. Columns that know the label, or whether its window has closed.
    3. Events that repeat, belong to nothing or came too late; how late they come.
    4. Holes: hours of the lake, partitions of the snapshot.
    5. What a training set and a test set share.

    Parameters
    ----------
    location : str
        Path or URI.
    limits : ChecksConfig
    lake : str, optional
        The lake that it was built from; without it only the snapshot is looked at for holes.
    train, test : RowSet, optional
        Both, or neither.
    spark : SparkSession, optional
        With it ids are compared on executors, and with ``lake`` all clicks and conversions are looked at for
        their delays. Without it ids are compared on the disk of this machine.

    Raises
    ------
    DataError
        If there is no readable manifest, or no lake where one is named.
    """
    scan = scan_snapshot(location, leak_rows=limits.leak_rows, count_ids=spark is None)
    manifest = read_manifest(location)
    readable = not any(finding.area == "files" for finding in failed(scan.findings))
    findings = list(scan.findings)
    if spark is not None and readable:
        from jobs.samples_check_spark import repeated_samples

        findings.append(repeated_finding(repeated_samples(spark, location)))
    findings += _features(scan, location, manifest, limits)
    findings += event_findings(manifest.events, limits)
    findings += partition_findings(manifest, limits)
    if lake is not None:
        batches = lake_batches(lake, spark)
        if not batches:
            raise DataError(
                f"expected a lake with ingested events in {lake}. Found none.",
                hint="name the lake that the snapshot was built from",
            )
        findings += lake_findings(manifest, batches, limits)
    if train is not None and test is not None and readable:
        findings += _overlap(train, test, limits, spark)
    return CheckReport(location, manifest, findings, _arrivals(location, manifest, lake, spark))


def _features(
    scan: SnapshotScan, location: str, manifest: SnapshotManifest, limits: ChecksConfig
) -> list[Finding]:
    findings = []
    for task, sample in scan.samples.items():
        findings += feature_findings(sample, manifest, task, read_spec(location), limits)
    return findings


def _overlap(train: RowSet, test: RowSet, limits: ChecksConfig, spark: SparkSession | None) -> list[Finding]:
    if spark is None:
        return overlap_findings(find_overlap(train, test), limits)
    from jobs.samples_check_spark import overlap

    return overlap_findings(overlap(spark, train, test), limits)


def _arrivals(
    location: str, manifest: SnapshotManifest, lake: str | None, spark: SparkSession | None
) -> list[Arrivals]:
    found: list[Arrivals] = []
    if DELAYS_NAME in manifest.extra_files:
        try:
            found += credited_arrivals(location, manifest)
        except (OSError, KeyError, ValueError, ConfigError):
            # That the file is missing or altered is a finding of its own.
            found = []
    if lake is not None and spark is not None:
        from jobs.samples_check_spark import lake_arrivals

        found += lake_arrivals(spark, lake, manifest)
    return found
