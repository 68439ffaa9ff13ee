"""Which labels a calibrator has learned from: written into its state, and held against the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from calibration.state import expect_fields
from pipelines.errors import ConfigError, StaleStateError

__all__ = ["MODES", "LabelOrigin"]

MODES = ("matured", "policy", "delay_model")


@dataclass(frozen=True, slots=True)
class LabelOrigin:
    """Where the labels of an online calibrator come from; see ``docs/calibration-labels.md``.

    Attributes
    ----------
    mode : {"matured", "policy", "delay_model"}
        Windows that have closed; the rows of the label policy with its weights; outcomes as they come,
        against the share of them that should have come by now.
    policy : str
        The label policy of the task: which rows there are, and when a window's first row is learned.
    window : int
        Width of the label window, ms.
    lag : int
        How long after the opening of its window a label is heard, in the mean, ms.
    delay : str, optional
        Digest of the delay curve that mode ``delay_model`` counts by.

    Examples
    --------
    >>> origin = LabelOrigin("matured", "esdfm", 86_400_000, 86_700_000)
    >>> LabelOrigin.from_state(origin.state()) == origin
    True
    """

    mode: str
    policy: str
    window: int
    lag: int
    delay: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"calibration labels must be one of {list(MODES)}. Received: {self.mode!r}.")
        if not (self.window >= 0 and self.lag >= 0):
            raise ConfigError(f"window and lag must be >= 0. Received: window={self.window}, lag={self.lag}.")
        if (self.delay is None) is (self.mode == "delay_model"):
            raise ConfigError(
                f"a delay curve belongs to mode delay_model and to no other. "
                f"Received: mode={self.mode!r}, delay={self.delay!r}."
            )

    def refuse_other(self, expected: LabelOrigin, where: str) -> None:
        """Refuse to go on from labels of another origin.

        Raises
        ------
        StaleStateError
            Names each part that differs.
        """
        own, wanted = self.state(), expected.state()
        # The lag follows from the rest and from the data.
        parts = [name for name in ("mode", "policy", "window", "delay") if own[name] != wanted[name]]
        if parts:
            told = "; ".join(f"{name} {own[name]!r}, expected {wanted[name]!r}" for name in parts)
            raise StaleStateError(
                f"{where} has learned from other labels than the configuration asks for: {told}.",
                hint="train again, or set calibration.labels, labels and attribution as they were",
            )

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"kind": "label_origin", **asdict(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """What `state` described; ``StaleStateError`` if it is none."""
        expect_fields(state, "label_origin", cls.__slots__)
        fields = {name: state[name] for name in cls.__slots__}
        is_text = isinstance(fields["delay"], str | None)
        is_number = all(type(fields[name]) is int for name in ("window", "lag"))
        if not (is_text and is_number):
            raise StaleStateError(f"the origin of the calibration's labels cannot be read: {fields}.")
        try:
            return cls(**fields)
        except ConfigError as error:
            raise StaleStateError(f"the origin of the calibration's labels does not fit: {error}") from error
