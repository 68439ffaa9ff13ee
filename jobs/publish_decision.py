"""One decision of the gate: what became of a candidate, and where the pointers went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Decision", "Verdict"]

Verdict = Literal["published", "refused", "not due"]


@dataclass(frozen=True)
class Decision:
    """What was decided at one commit.

    Attributes
    ----------
    candidate : str
        Name of the release that this commit is, or would have been.
    clock : int
        Event time, ms.
    verdict : str
        ``published``, ``refused`` or ``not due``.
    standing : dict
        ``unproven``, ``good`` or ``bad`` by task.
    reasons : tuple of str
        Why it was refused, or why ``CURRENT`` went back.
    figures : dict
        By task, those of the round of evidence; see `jobs.publish_gate`.
    growth : dict
        Largest factor by which a table or layer has grown since the last good release, by task.
    proven : str or None
        The release that ``last_good`` moved to.
    returned_to : str or None
        The release that ``CURRENT`` went back to.
    begins_trial : bool
        Whether the candidate is published and the one to prove itself next.
    """

    candidate: str
    clock: int
    verdict: Verdict
    standing: dict[str, str]
    reasons: tuple[str, ...]
    figures: dict[str, dict[str, Any]]
    growth: dict[str, float]
    proven: str | None = None
    returned_to: str | None = None
    begins_trial: bool = False

    def about(self) -> dict[str, Any]:
        """JSON data: what a release's manifest says of its gate, and a line of the decisions."""
        document = {name: value for name, value in vars(self).items() if value is not None}
        document["reasons"] = list(self.reasons)
        return {name: _finite(value) for name, value in document.items()}

    def is_news(self, before: Decision | None) -> bool:
        """Whether it is more than one more of the same."""
        if self.proven is not None or self.returned_to is not None:
            return True
        known = (before.verdict == "refused", before.reasons) if before is not None else (False, ())
        return (self.verdict == "refused", self.reasons) != known


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
