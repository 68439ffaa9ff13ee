"""`ctrstream audit`: what became of the rows that a worker has read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.json_output import json_option, write_json
from pipelines.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pipelines.cursor import TopicPartition

__all__ = ["command", "parse_limit"]

_MOST_RELEASES = 3


def parse_limit(text: str) -> tuple[TopicPartition, int]:
    """Partition and offset of ``TOPIC:PARTITION=OFFSET``.

    Examples
    --------
    >>> parse_limit("clicks:0=1200")
    (('clicks', 0), 1200)
    """
    place, _, offset = text.rpartition("=")
    topic, _, partition = place.rpartition(":")
    if not topic or not partition.isdecimal() or not offset.isdecimal():
        raise ConfigError(f"expected TOPIC:PARTITION=OFFSET, such as clicks:0=1200. Received: {text!r}.")
    return (topic, int(partition)), int(offset)


@click.command()
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder that was passed to `ctrstream stream --state`.",
)
@click.option(
    "--from", "start", metavar="TOPIC:PARTITION=OFFSET", multiple=True, help="First offset. Repeatable."
)
@click.option(
    "--to", "stop", metavar="TOPIC:PARTITION=OFFSET", multiple=True, help="Offset to stop before. Repeatable."
)
@click.option("--event", metavar="ID", help="An impression id, or the event id of a click or conversion.")
@json_option
def command(
    state: Path, start: tuple[str, ...], stop: tuple[str, ...], event: str | None, json_path: str | None
) -> None:
    """Rows by kind and class, with their sum checked; or what became of one event.

    Classes are counted by commit: a range of offsets is widened to the commits that read it. Exit code 3 if
    rows were lost, or if nothing is known of the event.
    """
    from jobs.audit import audit_event, audit_rows

    if event is not None and (start or stop):
        raise ConfigError("--event is asked for alone, without --from and --to.")
    if event is not None:
        found = audit_event(state, event)
        lines = _event_lines(found)
    else:
        found = audit_rows(state, dict(map(parse_limit, start)), dict(map(parse_limit, stop)))
        lines = _row_lines(found)
    if json_path is not None:
        write_json(json_path, found)
    if json_path != "-":
        for line in lines:
            click.echo(line)
    if event is None and any(found["difference"].values()):
        raise DataError(f"rows read and rows accounted for differ: {found['difference']}.")
    if event is not None and not any(
        found[name] for name in ("predicted", "learned", "as_outcome", "dead_letters", "held")
    ):
        raise DataError(
            f"nothing is known of {event}.",
            hint="events of the warm-up, and those that were late, duplicates or orphans, are only counted",
        )


def _row_lines(found: dict[str, Any]) -> list[str]:
    if not found["commits"]:
        return ["no commit has read rows of this range"]
    lines = [
        f"commits\t{found['commits']}, steps {found['steps'][0]} to {found['steps'][1]}, "
        f"epochs {', '.join(map(str, found['epochs']))}"
    ]
    lines += [f"offsets\t{name}\t{first} to {end}" for name, (first, end) in found["offsets"].items()]
    if found["releases"]:
        releases = found["releases"]
        shown = releases if len(releases) <= _MOST_RELEASES else [releases[0], "...", releases[-1]]
        lines.append(f"releases\t{' '.join(shown)}")
    if not found["is_whole"]:
        lines.append("classes are changes: rows that were pending before the first of these commits leave it")
    classes = [
        name for name in found["classes"]["impression"] if any(k[name] for k in found["classes"].values())
    ]
    lines.append("\t".join(["kind", "read", *classes, "difference"]))
    for kind, counts in found["classes"].items():
        values = [found["read"][kind], *(counts[name] for name in classes), found["difference"][kind]]
        lines.append("\t".join([kind, *map(str, values)]))
    return lines


def _event_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"predicted\t{one['task']}\tat {one['predicted_at']}\twith {one['release']}"
        for one in found["predicted"]
    ]
    for name in ("learned", "as_outcome"):
        label = "learned" if name == "learned" else "outcome of"
        lines += [
            f"{label}\t{one['task']}\t{one['row']} row, label {one['label']:g}\tstep {one['step']}\t"
            f"{'not published yet' if one['release'] is None else 'release ' + one['release']}"
            for one in found[name]
        ]
    if found["predicted"] and not found["learned"]:
        lines.append(f"learned\tnot up to step {found['committed_steps']}")
    for letter in found["dead_letters"]:
        position = f"{letter['source']}:{letter['partition']} {letter['offset']}.{letter['row']}"
        lines.append(f"dead letter\t{position}\t{letter['reason']}")
    if found["held"]:
        lines.append("held\twaits for `ctrstream breaker`")
    return lines
