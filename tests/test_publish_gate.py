"""What the gate makes of evidence: rounds, refusals, recovery; on sums alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from jobs.publish_gate import Look, PublishGate
from jobs.publish_schedule import PublishSchedule
from jobs.weight_check import broken_parameter, growth, weight_sizes
from monitoring.paired import PairedSums
from pipelines.config import Config, load_config
from pipelines.config_sections import PublishConfig
from pipelines.errors import ConfigError

SEED = 20_261_121
FIRST = "student-0000-0000000000"
CONFIG = PublishConfig(support_rows=2000, support_positives=50, z=3.0)


def batch(
    rng: np.random.Generator, rows: int, *, noise: float = 0.1, shift: float = 0.0, level: float = 0.0
) -> PairedSums:
    """Rows of a click rate about 10 %: the live model's logits are off by noise and shift, both by level."""
    logit = rng.normal(-2.3, 0.7, rows)
    label = rng.random(rows) < 1 / (1 + np.exp(-logit))
    live = logit + rng.normal(0, noise, rows) + shift + level
    good = logit + rng.normal(0, 0.1, rows) + level
    sums = PairedSums()
    sums.update(label, 1 / (1 + np.exp(-live)), 1 / (1 + np.exp(-good)))
    return sums


def gate_with(config: PublishConfig = CONFIG) -> PublishGate:
    gate = PublishGate(config)
    gate.round("click", FIRST, 0)
    return gate


def feed(gate: PublishGate, sums: PairedSums, since: int = 1) -> Look:
    gate.add("click", sums, since, since + 10)
    return gate.look()["click"]


def test_a_round_that_is_full_and_sound_is_passed_and_the_next_begins_empty() -> None:
    rng, gate = np.random.default_rng(SEED), gate_with()
    assert feed(gate, batch(rng, 1500), since=7).outcome == "open"
    assert gate.standing() == {"click": "unproven"}
    look = feed(gate, batch(rng, 1500), since=5)
    assert (look.outcome, look.standing, look.since, look.until) == ("passed", "good", 5, 17)
    assert gate.rounds["click"].sums.rows == 0
    assert gate.rounds["click"].since == -1
    assert gate.objections() == []


def test_few_outcomes_are_no_support_however_many_rows() -> None:
    gate = gate_with()
    assert (
        feed(gate, PairedSums(rows=9000, positives=49, first_expected=49, second_expected=49)).outcome
        == "open"
    )


def test_a_model_that_is_worse_than_last_good_is_refused() -> None:
    look = feed(gate_with(), batch(np.random.default_rng(SEED), 2500, noise=1.5))
    assert (look.outcome, look.is_last_good_better) == ("refused", True)
    assert "log loss more than 2.0% above that of student-0000-0000000000" in look.reasons[0]


def test_a_disaster_is_refused_long_before_the_round_is_full() -> None:
    rng, gate = np.random.default_rng(SEED), gate_with()
    look = feed(gate, batch(rng, 400, noise=6.0))
    assert look.outcome == "refused"
    assert look.figures["share"] < 0.25


def test_a_model_that_is_worse_by_less_than_the_margin_passes() -> None:
    rng = np.random.default_rng(SEED)
    config = CONFIG.model_copy(update={"support_rows": 40_000, "worse_by": 0.02})
    look = feed(gate_with(config), batch(rng, 60_000, noise=0.25))
    assert look.outcome == "passed"
    strict = feed(gate_with(config.model_copy(update={"worse_by": 0.0})), batch(rng, 60_000, noise=0.35))
    assert strict.outcome == "refused"


@pytest.mark.parametrize(("shift", "said"), [(0.7, "PCOC above 1.25"), (-0.7, "PCOC below 0.8")])
def test_a_level_outside_its_limits_is_refused(shift: float, said: str) -> None:
    config = CONFIG.model_copy(update={"worse_by": 10.0})
    look = feed(gate_with(config), batch(np.random.default_rng(SEED), 4000, shift=shift))
    assert (look.outcome, look.reasons, look.is_last_good_better) == ("refused", (said,), True)


def test_clicks_that_cease_are_noticed_without_a_single_one() -> None:
    look = feed(gate_with(), PairedSums(rows=2000, positives=0, first_expected=200, second_expected=200))
    assert look.reasons == ("PCOC above 1.25",)


def test_where_last_good_is_further_off_there_is_no_going_back_to_it() -> None:
    look = feed(gate_with(), PairedSums(rows=4000, positives=100, first_expected=300, second_expected=900))
    assert (look.outcome, look.is_last_good_better) == ("refused", False)


def test_after_a_refusal_nothing_is_published_until_a_round_has_been_passed() -> None:
    rng, gate = np.random.default_rng(SEED), gate_with()
    feed(gate, batch(rng, 2500, noise=1.5))
    assert gate.objections() == ["click: refused before and not proven since"]
    assert feed(gate, batch(rng, 1000)).outcome == "open"
    assert gate.standing() == {"click": "bad"}
    assert feed(gate, batch(rng, 1500)).outcome == "passed"
    assert gate.objections() == []


def test_without_support_it_publishes_or_holds_as_configured() -> None:
    rng = np.random.default_rng(SEED)
    assert gate_with().objections() == []
    holding = gate_with(CONFIG.model_copy(update={"without_support": "hold"}))
    assert holding.objections() == ["no round of any task has been passed yet"]
    feed(holding, batch(rng, 2500))
    assert holding.objections() == []


def test_it_goes_on_from_its_state() -> None:
    rng = np.random.default_rng(SEED)
    one = gate_with()
    feed(one, batch(rng, 1500), since=3)
    other = PublishGate.from_state(CONFIG, json.loads(json.dumps(one.state())))
    more = batch(rng, 1500)
    assert feed(one, more) == feed(other, more)
    assert one.state() == other.state()


def test_equally_good_models_are_refused_at_most_as_often_as_two_tails_of_z() -> None:
    # Ten looks a round, no margin, the level left out: refused in at most 2 (1 - Φ(z)) of the rounds.
    rng, rounds = np.random.default_rng(SEED), 3000
    config = PublishConfig(support_rows=1000, support_positives=1, z=2.0, worse_by=0, pcoc=(1e-6, 1e6))
    logit = rng.normal(-1.5, 0.7, 1000)
    sign = np.resize([1.0, -1.0], 1000)
    truth = 1 / (1 + np.exp(-logit))
    live, good = (1 / (1 + np.exp(-(logit + step * 0.3 * sign))) for step in (1.0, -1.0))
    # Each row is followed by its mirror image, so that neither model is better.
    truth[1::2] = truth[::2]
    live[1::2], good[1::2] = good[::2], live[::2]
    refused = 0
    gate = gate_with(config)
    for _ in range(rounds):
        label = rng.random(1000) < truth
        for part in np.split(np.arange(1000), 10):
            sums = PairedSums()
            sums.update(label[part], live[part], good[part])
            look = feed(gate, sums)
            if look.outcome == "refused":
                refused += 1
                break
    tail = float(stats.norm.sf(2.0))
    assert 0.5 * tail < refused / rounds < 2 * tail + 4 * (2 * tail / rounds) ** 0.5


# The schedule ------------------------------------------------------------------------------------------


def test_without_a_schedule_every_commit_is_due() -> None:
    assert PublishSchedule(PublishConfig(), clock=0, learned=0).is_due(0, 0)


def test_event_time_is_marked_at_whole_multiples_and_rows_count_from_the_last_release() -> None:
    schedule = PublishSchedule(PublishConfig(every_event_time=1000, every_rows=500), clock=2500, learned=100)
    assert not schedule.is_due(2999, 599)
    assert schedule.is_due(3000, 100)
    assert schedule.is_due(2600, 600)
    schedule.published(3400, 600)
    assert not schedule.is_due(3999, 1099)
    again = PublishSchedule(schedule.config, **schedule.state())
    assert again.is_due(4000, 600)


# Weights -----------------------------------------------------------------------------------------------


def test_sizes_are_root_mean_squares_and_say_where_a_weight_is_not_finite() -> None:
    table = np.random.default_rng(SEED).normal(0, 3, (3000, 8)).astype(np.float32)
    sizes = weight_sizes({"embedding": table, "none": np.zeros(0)})
    assert sizes == {"embedding": pytest.approx(float(np.sqrt(np.mean(table.astype(float) ** 2))))}
    for wrong in (np.nan, np.inf):
        table[17, 3] = wrong
        assert not np.isfinite(weight_sizes({"embedding": table})["embedding"])


def test_growth_leaves_out_the_bias_and_what_is_too_small_to_matter() -> None:
    found = growth(
        {"wide": 0.3, "deep": 0.01, "bias": 9.0, "new": 1.0}, {"wide": 0.1, "deep": 1e-9, "bias": 0.1}
    )
    assert found == {"wide": pytest.approx(3.0), "deep": pytest.approx(0.5)}


def test_a_calibrator_that_is_not_finite_is_found() -> None:
    chain = {"kind": "chain", "online": {"line": [0.1, float("inf")]}, "segments": None}
    assert broken_parameter(chain) == "online.line.1"
    assert broken_parameter({"rows": 3, "line": [0.5]}) is None


# The configuration -------------------------------------------------------------------------------------


def test_limits_of_pcoc_must_hold_one() -> None:
    with pytest.raises(ConfigError, match="with 1 between them"):
        load_config(None, ["publish.pcoc=[1.1, 1.2]"])
    assert load_config(None, ['publish.every_event_time="1h"']).publish.every_event_time == 3_600_000
    assert Config().publish.gate
