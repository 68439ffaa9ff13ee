"""Fitting the delay model that was asked for, and keeping a simpler one where it is no better."""

from __future__ import annotations

import logging
from typing import Literal

from models.delay_hazard import HazardConfig, train_hazard
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_bins import GROUP_BINS
from pipelines.delay_groups import DelayGroups
from pipelines.delay_model import DelayModel
from pipelines.delay_rows import DelayRows, whole
from pipelines.delay_selection import DelayChoice, choose
from pipelines.feature_spec import FeatureSpec

__all__ = ["fit_delay_model"]

logger = logging.getLogger(__name__)

_HELD_OUT = 0.2
# Fewer say nothing about which model is better.
_FEWEST = 200

Kind = Literal["curve", "groups", "hazard"]


def fit_delay_model(
    rows: DelayRows,
    spec: FeatureSpec,
    base: DelayCurve,
    horizon: int,
    kind: Kind,
    groups: tuple[str, ...] = (),
    *,
    open_windows: bool = False,
    hazard: HazardConfig | None = None,
) -> tuple[DelayModel, DelayChoice]:
    """Fit a delay model, unless a simpler one does as well.

    1. Hold out the outcomes of the fifth of the windows that opened last.
    2. Fit the candidates to the others: the curve, the groups if there are any, the network if asked for.
    3. Choose by `pipelines.delay_selection.choose`.
    4. Fit what was chosen to all outcomes, with ``base`` as the common curve.

    Parameters
    ----------
    rows : DelayRows
        Their segments begin with ``groups``.
    spec : FeatureSpec
    base : DelayCurve
        The curve of all outcomes: the answer where it is not beaten.
    horizon : int
        Age (ms) from which a window has closed.
    kind : {"curve", "groups", "hazard"}
        The largest candidate.
    groups : tuple of str
        Features by which to group.
    open_windows : bool
        Learn from open windows, too, with the truncation taken into account.
    hazard : HazardConfig, optional

    Returns
    -------
    model : DelayModel
    choice : DelayChoice
        What was compared; its reason is logged.
    """
    grid = DelayGrid(horizon, GROUP_BINS)
    used = whole(rows if open_windows else rows.closed(horizon), grid)
    train, held_out = used.split(_HELD_OUT)
    if kind == "curve" or min(len(train), len(held_out)) < _FEWEST:
        words = "asked for" if kind == "curve" else f"only {len(used)} outcomes to compare with"
        return base, _logged(DelayChoice("curve", {}, {}, len(held_out), f"curve: {words}"))
    curve = DelayCurve.fit(train.delay, train.follow_up)

    def fit(name: str, of: DelayRows, common: DelayCurve) -> DelayModel:
        if name == "groups":
            return DelayGroups.fit(of.counts(grid, groups), common, open_windows=open_windows)
        if name == "hazard":
            return train_hazard(of, spec, common, horizon, hazard, open_windows=open_windows)
        return common

    names = ["curve", *(["groups"] if groups else []), *(["hazard"] if kind == "hazard" else [])]
    choice = choose({name: fit(name, train, curve) for name in names}, held_out, grid)
    return fit(choice.kind, used, base), _logged(choice)


def _logged(choice: DelayChoice) -> DelayChoice:
    logger.info("delay model: %s", choice.reason)
    return choice
