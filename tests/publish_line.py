"""A line of commits over a log on disk, with everything of the worker that publishes and nothing of Kafka."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jobs.online import OnlineLoop
from jobs.online_state import loop_state
from jobs.prepared import StepEvents
from jobs.publish_control import PublishControl
from jobs.publish_decision import Decision
from jobs.publish_evidence import EvidenceSample
from jobs.publishing import Learned, load_first, publish_student
from jobs.release import pointed
from pipelines.config import Config
from pipelines.config_sections import PublishConfig
from tests.small_run import SmallRun

# Rounds that a log of three days fills a few times; limits that its noise keeps within.
RULES = PublishConfig(support_rows=500, support_positives=25, z=3.5, worse_by=0.02, pcoc=(0.6, 1.7))


def with_rules(config: Config, **changes: Any) -> Config:
    """The configuration with the rules of these tests."""
    rules = PublishConfig(**(RULES.model_dump() | changes))
    return config.model_copy(update={"publish": rules})


class PublishLine:
    """Steps through the log and decides at every fourth step."""

    def __init__(self, small_run: SmallRun, folder: Path, **rules: Any) -> None:
        self.run, self.releases = small_run, folder
        if not folder.exists():
            small_run.first_releases(folder)
        self.config = with_rules(small_run.config, **rules)
        self.first = load_first(folder)
        self.loop: OnlineLoop = small_run.warm_loop(self.config)
        self.decisions: list[Decision] = []
        self.sample = EvidenceSample(self.config.publish.sample_rows if self.config.publish.gate else 0)
        self.control = self.new_control()
        self._steps = 0

    def new_control(self) -> PublishControl:
        """As a worker that starts has it."""
        return PublishControl(
            self.releases,
            self.first,
            self.config.publish,
            lambda: None,
            lambda decision, folder: self.decisions.append(decision),
        )

    def through(
        self,
        events: Iterable[StepEvents],
        before_step: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Learn all of it, deciding on the way."""
        for step in events:
            before_step(self._steps)
            self.sample.add(self.loop.step(step).joined, self.loop)
            self._steps += 1
            if self._steps % 4 == 0:
                self.commit()

    def commit(self) -> Decision:
        """Observe, decide, publish, conclude."""
        arrays, plain = loop_state(self.loop)
        self.control.observe(self.sample.take())
        decision = self.control.decide(arrays, plain, 1)
        if decision.verdict == "published":
            parent = self.pointed("CURRENT")
            learned = Learned.at_cut(self.loop, arrays, plain)
            extra = {"gate": decision.about()}
            publish_student(self.releases, learned, self.first, epoch=1, parent=parent, extra=extra)
        self.control.conclude(decision, plain)
        return decision

    def pointed(self, alias: str) -> str:
        """Where a pointer stands; it must have been set."""
        name = pointed(self.releases, alias)
        assert name is not None
        return name
