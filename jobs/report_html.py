"""A page of the review: sections put into the template, one document that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.report_blocks import Section, Tile

__all__ = ["Headline", "page_html"]

_SOURCE = "Figures come from the files of the run folder; what is not there is called unknown."


@dataclass(frozen=True)
class Headline:
    """What a reader must know who reads no further."""

    status: str
    claim: str
    counts: tuple[tuple[str, int], ...]
    alarms: tuple[str, ...]
    tiles: tuple[Tile, ...]


def page_html(
    title: str, subtitle: str, headline: Headline, sections: Sequence[Section], source: str = _SOURCE
) -> str:
    """The whole page; ``source`` says below it where the figures come from."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("jobs", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title, subtitle=subtitle, headline=headline, sections=sections, source=source
    )
