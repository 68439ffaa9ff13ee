"""The demo's crash: one worker is killed in mid-stream and recovers, another is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import CtrstreamError

__all__ = ["Recovery", "run_recovery", "start_worker"]

_POLL_S = 0.05
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Recovery:
    """Both digests, and where the worker was killed."""

    digest: str
    reference_digest: str
    killed_at_step: int
    steps: int

    @property
    def exact(self) -> bool:
        return self.digest == self.reference_digest


def run_recovery(out: Path, rows: int) -> Recovery:
    """Consume the backlog twice: with a SIGKILL in mid-stream, and without one, in folders of their own."""
    reference = start_worker(out, out / "reference" / "releases", out / "reference" / "worker", track=False)
    victim = start_worker(out, out / "releases", out / "worker")
    killed_at = _kill_in_mid_stream(victim, out / "worker")
    survivor = start_worker(out, out / "releases", out / "worker")
    digest, steps = _finish(survivor, "recovered worker", out)
    reference_digest, _ = _finish(reference, "reference worker", out)
    return Recovery(digest, reference_digest, killed_at, steps)


def start_worker(
    out: Path, releases: Path, state: Path, *, until_end: bool = True, track: bool = True
) -> subprocess.Popen[str]:
    """Start ``ctrstream stream`` with the demo's config; its log goes beside its state folder."""
    command = [sys.executable, "-m", "jobs.cli", "stream", "--config", str(out / "config.toml")]
    command += ["--releases", str(releases), "--state", str(state)]
    command += ["--until-end"] if until_end else []
    command += [] if track else ["--set", 'tracking.uri=""']
    state.parent.mkdir(parents=True, exist_ok=True)
    with (state.parent / f"{state.name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _kill_in_mid_stream(worker: subprocess.Popen[str], state: Path) -> int:
    """SIGKILL the worker some time after it has committed online steps; returns the committed step."""
    from jobs.checkpoint import CheckpointStore

    store, deadline, seen = CheckpointStore(state), time.monotonic() + _TIMEOUT_S, 0
    while worker.poll() is None and time.monotonic() < deadline:
        names = store.names() if store.head() else []
        if names and int(names[-1].split("-")[0]) > seen:
            seen = int(names[-1].split("-")[0])
            if len(names) >= 2:
                # Between two commits: what was learned since the last one is lost with the process.
                time.sleep(0.7)
                break
        time.sleep(_POLL_S)
    if worker.poll() is not None:
        raise CtrstreamError(
            f"the worker ended before it could be killed (exit code {worker.returncode}).",
            hint=f"see {state.parent / (state.name + '.log')}",
        )
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    return seen


def _finish(worker: subprocess.Popen[str], name: str, out: Path) -> tuple[str, int]:
    stdout, _ = worker.communicate(timeout=_TIMEOUT_S)
    if worker.returncode != 0:
        raise CtrstreamError(
            f"the {name} failed with exit code {worker.returncode}.", hint=f"see the logs in {out}"
        )
    result = json.loads(stdout.strip().splitlines()[-1])
    return result["digest"], int(result["step"])
