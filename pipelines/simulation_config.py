"""What a simulated event log looks like: every knob, with its unit and default."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS, format_duration, parse_duration
from pipelines.errors import ConfigError

__all__ = ["SimulationConfig", "read_simulation_config"]

# Monday 2026-01-05T00:00:00Z: a log of a few days starts on working days, at the foot of the daily cycle.
_DEFAULT_START = 1_767_571_200_000
_DURATIONS = ("click_window", "attribution_window")


@dataclass(frozen=True)
class SimulationConfig:
    """A simulated world and the log that it leaves behind.

    Attributes
    ----------
    impressions : int
        How many impressions are shown.
    days : float
        Length of the log. Nothing that becomes known after ``start + days`` is written, so that the
        youngest labels are censored, as in life.
    seed : int
        The same config gives the same files, byte for byte (with the same versions of numpy and Arrow).
    start : int
        First moment of the log, ms since the epoch.
    faults : float
        Probability of each kind of fault for each event (late, duplicated, malformed, retracted,
        orphaned); 0 gives a perfect log. The world behind the log does not depend on it.
    users, campaigns, items, advertisers : int
        Sizes of the world; 0 users means one for each 15 impressions, 0 items eight a campaign.
    positions : int
        Slots on a page; position 1 is the best.
    base_click_rate : float
        Mean of P(click within the click window | impression) over the log.
    base_conversion_rate : float
        Mean of P(conversion within the attribution window | click) over the clicks.
    click_window : int
        How long after the impression a click still counts, ms.
    attribution_window : int
        How long after the click a conversion is credited, ms.
    delay_scale : float
        Stretches all conversion delays: 0.1 fits a day's behaviour into a log of a few hours.
    drift : float
        Strength of all drift (item walks, campaign walks, jump of one advertiser, trends); 0 gives a
        stationary world in which only campaigns come and go.

    Examples
    --------
    >>> SimulationConfig(days=0)
    Traceback (most recent call last):
        ...
    pipelines.errors.ConfigError: days must lie in (0, 366]. Received: 0.
    """

    impressions: int = 300_000
    days: float = 5.0
    seed: int = 7
    start: int = _DEFAULT_START
    faults: float = 0.005
    users: int = 0
    campaigns: int = 240
    items: int = 0
    advertisers: int = 24
    positions: int = 8
    base_click_rate: float = 0.09
    base_conversion_rate: float = 0.18
    click_window: int = 30 * MINUTE_MS
    attribution_window: int = 24 * HOUR_MS
    delay_scale: float = 1.0
    drift: float = 1.0

    def __post_init__(self) -> None:
        self._check_types()
        for name, low in _LEAST.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}. Received: {getattr(self, name)}.")
        for name, (low_open, high) in _RANGES.items():
            if not low_open < getattr(self, name) <= high:
                raise ConfigError(
                    f"{name} must lie in ({low_open}, {high}]. Received: {getattr(self, name)}."
                )
        if not 0 <= self.faults <= 0.5:
            raise ConfigError(f"faults must lie in [0, 0.5]. Received: {self.faults}.")
        if not 0 <= self.drift <= 10:
            raise ConfigError(f"drift must lie in [0, 10]. Received: {self.drift}.")
        if self.campaigns < self.advertisers:
            raise ConfigError(
                f"each advertiser has a campaign: campaigns must be at least advertisers. "
                f"Received: {self.campaigns} campaigns < {self.advertisers} advertisers."
            )
        if 0 < self.items < self.campaigns:
            raise ConfigError(
                f"each campaign has an item: items must be at least campaigns. "
                f"Received: {self.items} items < {self.campaigns} campaigns."
            )

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            # Annotations are kept as text (see the __future__ import), hence the quotes.
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type == "int" and not whole:
                raise ConfigError(f"{field.name} must be a whole number. Received: {value!r}.")
            if field.type == "float" and not (whole or (isinstance(value, float) and math.isfinite(value))):
                raise ConfigError(f"{field.name} must be a finite number. Received: {value!r}.")

    @property
    def end(self) -> int:
        """Last moment of the log, ms since the epoch."""
        return self.start + self.duration

    @property
    def duration(self) -> int:
        """Length of the log, ms."""
        return round(self.days * DAY_MS)

    @property
    def user_count(self) -> int:
        return self.users or max(50, self.impressions // 15)

    @property
    def item_count(self) -> int:
        return self.items or 8 * self.campaigns

    def to_mapping(self) -> dict[str, Any]:
        """The config as plain values, durations as text; ``from_mapping`` reads it back."""
        mapping = dataclasses.asdict(self)
        return mapping | {name: format_duration(mapping[name]) for name in _DURATIONS}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Build a config from plain values.

        Raises
        ------
        ConfigError
            If a key is unknown (the nearest valid one is named) or a value does not fit.

        Examples
        --------
        >>> SimulationConfig.from_mapping({"attribution_window": "12h"}).attribution_window
        43200000
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in names:
                nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
                hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(names)}"
                raise ConfigError(f"unknown simulation key {key}.", hint=hint)
        values = dict(mapping)
        for name in _DURATIONS:
            if isinstance(values.get(name), str):
                try:
                    values[name] = parse_duration(values[name])
                except ValueError as error:
                    raise ConfigError(f"simulation key {name}: {error}.") from error
        return cls(**values)


# A log without room for the smallest delays would have no outcomes at all.
_LEAST = {
    "impressions": 1,
    "seed": 0,
    "start": 0,
    "users": 0,
    "campaigns": 1,
    "items": 0,
    "advertisers": 1,
    "positions": 1,
    "click_window": MINUTE_MS,
    "attribution_window": MINUTE_MS,
}
_RANGES = {
    "days": (0, 366),
    "base_click_rate": (0, 0.5),
    "base_conversion_rate": (0, 0.8),
    "delay_scale": (0, 100),
}


def read_simulation_config(path: Path) -> SimulationConfig:
    """Read the ``[simulation]`` section of a TOML file, such as the ``simulation.toml`` beside a log.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not TOML, has no such section or holds an unknown key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the simulation config {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    section = document.get("simulation")
    if not isinstance(section, dict):
        raise ConfigError(
            f"expected a section [simulation] in {path}. Received: {', '.join(document) or 'no section'}.",
            hint="simulation.toml beside a simulated log is a complete example",
        )
    return SimulationConfig.from_mapping(section)
