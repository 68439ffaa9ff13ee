"""Releases behind the gate, on a log: a healthy line, poisoned ones, crashes, and what people do by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.decision_log import read_decisions
from jobs.online_state import loop_state
from jobs.publish_decision import Decision
from jobs.publish_evidence import EvidenceRows, EvidenceSample
from jobs.publishing import Learned, publish_student
from jobs.release import Release, garbage_collect, list_releases, point
from jobs.release_manifest import Manifest, parse_name
from jobs.release_pointer import Pointer, read_pointer
from jobs.release_watch import ReleaseWatch
from models.table_adagrad import TableAdagrad
from monitoring.paired import PairedSums
from pipelines.errors import StaleStateError
from tests.publish_line import PublishLine
from tests.small_run import SmallRun

FIRST = "student-0000-0000000000"


def flipped_labels(line: PublishLine, first: int, last: int) -> Callable[[int], None]:
    """The line learns the opposite of what happened, from one step to another."""
    truth, at = line.loop._columns, [0]

    def columns(task: Any, examples: Any) -> Any:
        found = truth(task, examples)
        if task == "click" and first <= at[0] < last:
            found["label"] = 1 - found["label"]
        return found

    line.loop._columns = columns  # type: ignore[method-assign]

    def before_step(number: int) -> None:
        at[0] = number

    return before_step


def steps(small_run: SmallRun, count: int) -> Any:
    """The first steps after the warm-up."""
    rows = count * small_run.config.student.batch_rows
    return small_run.steps(small_run.warm_rows, small_run.warm_rows + rows)


@pytest.fixture(scope="module")
def healthy(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> PublishLine:
    """A line over the whole log; nothing is wrong with it."""
    line = PublishLine(small_run, tmp_path_factory.mktemp("healthy") / "releases")
    line.through(small_run.steps(small_run.warm_rows))
    return line


def test_a_healthy_line_is_published_throughout_and_last_good_follows(healthy: PublishLine) -> None:
    assert {decision.verdict for decision in healthy.decisions} == {"published"}
    proven = [decision.proven for decision in healthy.decisions if decision.proven]
    assert len(proven) >= 2
    assert proven == sorted(proven, key=parse_name)
    assert healthy.pointed("last_good") == proven[-1]
    assert parse_name(healthy.pointed("CURRENT")) > parse_name(proven[-1])


def test_what_was_proven_had_been_published_before_every_row_that_proved_it(healthy: PublishLine) -> None:
    order = [decision.candidate for decision in healthy.decisions]
    for decision in healthy.decisions:
        if decision.proven is not None:
            assert order.index(decision.proven) < order.index(decision.candidate)
            assert Manifest.read(healthy.releases / decision.proven).last_event_time < decision.clock


def test_each_release_carries_the_figures_of_its_gate(healthy: PublishLine) -> None:
    for decision in healthy.decisions:
        gate = Manifest.read(healthy.releases / decision.candidate).extra["gate"]
        assert gate["verdict"] == "published"
        assert gate["figures"]["click"]["rows"] > 0
        assert gate["growth"]["click"] < 4
    assert gate["standing"]["click"] == "good"
    assert gate["figures"]["click"]["against"] in {FIRST, *list_releases(healthy.releases)}


def test_flipped_labels_are_refused_serving_goes_back_and_a_recovered_line_goes_on(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases")
    watch, served = ReleaseWatch(small_run.first_releases(tmp_path / "first")), []
    watch.root = line.releases
    before_step = flipped_labels(line, 24, 32)

    def step(number: int) -> None:
        before_step(number)
        if watch.poll():
            served.append(watch.current.release.name)

    line.through(small_run.steps(small_run.warm_rows), step)
    verdicts = [decision.verdict for decision in line.decisions]
    first = verdicts.index("refused")
    again = verdicts.index("published", first)
    back = line.decisions[first].returned_to
    assert back is not None
    # What it goes back to was cut before the first flipped label was learned.
    assert parse_name(back)[1] <= 24 + small_run.warm_loop().step_number
    assert set(verdicts[again:]) == {"published"}
    assert parse_name(line.pointed("last_good")) > parse_name(back)
    assert served[served.index(line.decisions[first - 1].candidate) + 1] == back
    assert served[-1] > line.decisions[again].candidate
    assert watch.problem is None
    refused = {decision.candidate for decision in line.decisions if decision.verdict == "refused"}
    assert not refused & set(list_releases(line.releases))
    logged = [one["verdict"] for one in read_decisions(line.releases)]
    assert "refused" in logged
    assert len(logged) < len(verdicts)


def test_a_learning_rate_that_blows_up_is_refused_by_the_weights_alone(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases")

    def blown_up(number: int) -> None:
        for table in line.loop.students["click"].table_optimizers().values():
            assert isinstance(table, TableAdagrad)
            table._learning_rate = 20.0 if number >= 12 else 0.1

    line.through(steps(small_run, 16), blown_up)
    last = line.decisions[-1]
    assert last.verdict == "refused"
    assert "has grown" in last.reasons[-1]
    assert line.pointed("CURRENT") == line.pointed("last_good") == last.returned_to


def test_late_labels_stop_publishing_but_do_not_bring_back_what_was_proven_since(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases")
    line.through(steps(small_run, 32))
    good, current = line.pointed("last_good"), line.pointed("CURRENT")
    assert FIRST != good != current
    cut_at = Manifest.read(line.releases / good).last_event_time
    bad = PairedSums(rows=900, positives=100, first_expected=900.0, second_expected=100.0)
    for until, expected in ((cut_at, current), (cut_at + 1, good)):
        line.control.gate.round("conversion", FIRST, 0)
        line.control.gate.add("conversion", bad, 1, until)
        line.loop.step_number += 1
        assert line.commit().verdict == "refused"
        assert line.pointed("CURRENT") == expected
    assert line.pointed("last_good") == good


# Candidates that are broken in themselves -----------------------------------------------------------------


@pytest.fixture
def short_line(small_run: SmallRun, tmp_path: Path) -> PublishLine:
    """A line with two releases, neither of them proven."""
    line = PublishLine(small_run, tmp_path / "releases", support_rows=100_000)
    line.through(steps(small_run, 8))
    return line


def broken_weight(line: PublishLine) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, plain = loop_state(line.loop)
    arrays["student/click/weights/wide"].reshape(-1)[5] = np.nan
    return arrays, plain


def broken_calibrator(line: PublishLine) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, plain = loop_state(line.loop)
    plain["calibrators"]["click"]["online"]["lines"] = [float("inf")]
    return arrays, plain


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (broken_weight, "click: a weight of wide is not finite"),
        (broken_calibrator, "click: the calibrator's online.lines.0 is not finite"),
    ],
)
def test_what_is_not_finite_is_refused_and_what_is_again_is_published(
    short_line: PublishLine, small_run: SmallRun, broken: Callable[..., Any], said: str
) -> None:
    assert short_line.pointed("CURRENT") != FIRST
    arrays, plain = broken(short_line)
    decision = short_line.control.decide(arrays, {**plain, "step": plain["step"] + 1}, 1)
    assert (decision.verdict, decision.reasons, decision.returned_to) == ("refused", (said,), FIRST)
    short_line.control.conclude(decision, plain)
    assert read_pointer(short_line.releases, "CURRENT") == Pointer(FIRST, rollback=True)
    short_line.loop.step_number += 2
    assert short_line.commit().verdict == "published"
    assert read_pointer(short_line.releases, "CURRENT") == Pointer(short_line.decisions[-1].candidate)


# The schedule and the switches ----------------------------------------------------------------------------


def test_commits_between_the_marks_are_no_releases(small_run: SmallRun, tmp_path: Path) -> None:
    line = PublishLine(small_run, tmp_path / "releases", every_rows=700)
    line.through(steps(small_run, 24))
    names = [name for name in list_releases(line.releases) if name.startswith("student-0001")]
    learned = [Manifest.read(line.releases / name).learned_events for name in names]
    assert 1 < len(names) < 6
    assert all(later - earlier >= 700 for earlier, later in zip([0, *learned], learned, strict=False))


def test_a_held_line_publishes_nothing_until_it_has_support(small_run: SmallRun, tmp_path: Path) -> None:
    line = PublishLine(small_run, tmp_path / "releases", without_support="hold")
    line.through(steps(small_run, 16))
    verdicts = [decision.verdict for decision in line.decisions]
    assert verdicts[0] == "refused"
    assert line.decisions[0].returned_to is None
    assert "published" in verdicts
    assert set(verdicts[verdicts.index("published") :]) == {"published"}


def test_without_the_gate_everything_is_published_and_last_good_stays(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases", gate=False)
    line.through(steps(small_run, 8), flipped_labels(line, 0, 8))
    assert [decision.verdict for decision in line.decisions] == ["published", "published"]
    assert not (line.releases / "last_good").exists()
    assert line.sample.take() == {}


# Crashes and people ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL."""


def pointers(line: PublishLine) -> dict[str, Pointer | None]:
    return {alias: read_pointer(line.releases, alias) for alias in ("CURRENT", "last_good")}


def finish(line: PublishLine, state: dict[str, Any], cut: tuple[Any, Any]) -> Decision:
    """What a worker does that is started on the commit of one that was killed."""
    line.control = line.new_control()
    line.control.load(state)
    decision = line.control.decide(*cut, 1, is_redo=True)
    if decision.verdict == "published":
        publish_student(
            line.releases,
            Learned.at_cut(line.loop, *cut),
            line.first,
            epoch=1,
            parent=line.pointed("CURRENT"),
            extra={},
        )
    line.control.conclude(decision, cut[1])
    return decision


@pytest.mark.parametrize("moment", ["last_good", "CURRENT", "published", "concluded"])
def test_a_kill_at_any_moment_of_a_decision_ends_where_it_would_have(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed at every commit: before a pointer is moved, before and after what was published is told."""
    undisturbed = PublishLine(small_run, tmp_path / "one")
    undisturbed.through(steps(small_run, 40), flipped_labels(undisturbed, 24, 32))
    line = PublishLine(small_run, tmp_path / "other")
    kills = [0]

    def killed_point(root: Path, alias: str, *given: Any, **named: Any) -> bool:
        if alias == moment:
            kills[0] += 1
            raise Killed
        return point(root, alias, *given, **named)

    def commit() -> Decision:
        cut = loop_state(line.loop)
        line.control.observe(line.sample.take())
        state = line.control.state()
        with monkeypatch.context() as patch:
            patch.setattr("jobs.publish_control.point", killed_point)
            try:
                decision = line.control.decide(*cut, 1)
                if moment == "concluded" and decision.verdict == "published":
                    parent = line.pointed("CURRENT")
                    learned = Learned.at_cut(line.loop, *cut)
                    publish_student(line.releases, learned, line.first, epoch=1, parent=parent, extra={})
                kills[0] += moment in ("published", "concluded")
            except Killed:
                pass
        return finish(line, state, cut)

    line.control._last_good()
    line.commit = commit  # type: ignore[method-assign]
    line.through(steps(small_run, 40), flipped_labels(line, 24, 32))
    assert kills[0] >= 1
    assert pointers(line) == pointers(undisturbed)
    assert line.control.state() == undisturbed.control.state()
    assert list_releases(line.releases) == list_releases(undisturbed.releases)


@pytest.mark.parametrize("is_written", [False, True])
def test_the_first_release_after_a_return_is_published_by_the_worker_that_takes_over(
    short_line: PublishLine, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    arrays, plain = broken_weight(short_line)
    refused = short_line.control.decide(arrays, {**plain, "step": plain["step"] + 1}, 1)
    short_line.control.conclude(refused, plain)
    assert read_pointer(short_line.releases, "CURRENT") == Pointer(FIRST, rollback=True)
    short_line.loop.step_number += 2
    state, cut = short_line.control.state(), loop_state(short_line.loop)
    # Killed before CURRENT was moved.
    short_line.control.decide(*cut, 1)
    if is_written:
        with monkeypatch.context() as patch:
            patch.setattr("jobs.publishing.point", lambda *given, **named: False)
            learned = Learned.at_cut(short_line.loop, *cut)
            publish_student(short_line.releases, learned, short_line.first, epoch=1, parent=FIRST, extra={})
    found = finish(short_line, state, cut)
    assert found.verdict == "published"
    assert read_pointer(short_line.releases, "CURRENT") == Pointer(found.candidate)


def test_what_somebody_rolled_back_while_the_worker_was_away_stays(short_line: PublishLine) -> None:
    state, cut = short_line.control.state(), loop_state(short_line.loop)
    point(short_line.releases, "CURRENT", FIRST, rollback=True)
    assert finish(short_line, state, cut).verdict == "not due"
    assert read_pointer(short_line.releases, "CURRENT") == Pointer(FIRST, rollback=True)


def test_a_last_good_that_somebody_chose_is_the_one_to_compare_with(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases")
    line.through(steps(small_run, 4))
    chosen = line.pointed("CURRENT")
    point(line.releases, "last_good", chosen)
    line.through(steps(small_run, 40))
    assert chosen in {decision.figures["click"]["against"] for decision in line.decisions if decision.figures}


def test_a_last_good_that_reads_other_features_is_named(short_line: PublishLine, small_run: SmallRun) -> None:
    from tests.releases import publish

    other = publish(short_line.releases, 3, epoch=0)
    point(short_line.releases, "last_good", other.name)
    with pytest.raises(StaleStateError, match="reads other features"):
        short_line.commit()


def test_what_is_on_trial_or_compared_with_outlives_garbage_collection(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases")
    line.through(steps(small_run, 24))
    needed = line.control.needed()
    assert len(needed) >= 2
    trial = line.control._trial
    assert trial is not None
    garbage_collect(line.releases, 1, needed)
    assert needed <= set(list_releases(line.releases))
    assert Release.load(line.releases / trial.name).name == trial.name


# The sample ------------------------------------------------------------------------------------------------


def test_the_sample_is_the_rows_of_smallest_hash_whatever_came_between(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases")
    small, large = EvidenceSample(60), EvidenceSample(10**6)
    for events in steps(small_run, 12):
        joined = line.loop.step(events).joined
        for sample in (small, large):
            sample.add(joined, line.loop)
    few, all_rows = (EvidenceRows.concat(sample.take()["click"]) for sample in (small, large))
    assert len(all_rows) > 500
    assert len(few) <= 120
    expected = np.sort(all_rows.order)[:60]
    assert np.array_equal(np.sort(few.smallest(60).order), expected)
    assert small.take() == {}


def test_a_row_is_compared_only_if_last_good_cannot_have_learned_it(
    small_run: SmallRun, tmp_path: Path
) -> None:
    line = PublishLine(small_run, tmp_path / "releases", support_rows=100_000)
    line.through(steps(small_run, 12))
    cut = line.loop.last_event_time
    found = line.control.gate.rounds["click"]
    before = found.sums.rows
    found.after = cut
    line.sample = EvidenceSample(10**6)
    line.through(steps(small_run, 3))
    rows = EvidenceRows.concat(line.sample.take()["click"])
    line.control.observe({"click": [rows]})
    assert found.sums.rows - before == int((rows.event_time > cut).sum()) < len(rows)
