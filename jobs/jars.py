"""Pinned jars of Kafka and of Spark's Kafka connector, fetched once per user and verified.

``jars.lock`` names every jar of every set with its size and SHA-256. The Ivy that comes inside pyspark does
the download, so neither Maven nor a container is needed. ``python -m jobs.jars_lock`` rewrites the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jobs.java import find_java
from pipelines.errors import SetupError

LOCK_FILE = Path(__file__).with_name("jars.lock")
# One jar takes well under a second; Ivy itself waits about a minute for a registry that does not answer.
_FETCH_TIMEOUT_S = 900

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Jar:
    """One line of the lock: Maven coordinates, size in bytes and SHA-256 (hex)."""

    organisation: str
    module: str
    revision: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file that Ivy retrieves, ``module-revision.jar``."""
        return f"{self.module}-{self.revision}.jar"


def read_lock(text: str) -> dict[str, tuple[Jar, ...]]:
    """Parse the lock: one jar a line, ``set organisation:module:revision size sha256``.

    Parameters
    ----------
    text : str
        Content of ``jars.lock``; lines that start with ``#`` are comments.

    Returns
    -------
    dict of str to tuple of Jar
        Jars by name of set.

    Examples
    --------
    >>> read_lock("# a comment\\nkafka org.x:some-lib:1.2 77 ab12")["kafka"][0].file_name
    'some-lib-1.2.jar'
    """
    sets: dict[str, tuple[Jar, ...]] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, coordinates, size, sha256 = line.split()
        organisation, module, revision = coordinates.split(":")
        sets[name] = (*sets.get(name, ()), Jar(organisation, module, revision, int(size), sha256))
    return sets


def cache_root() -> Path:
    """Folder for fetched jars: ``$XDG_CACHE_HOME/ctrstream/jars``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ctrstream" / "jars"


def resolve(name: str, *, root: Path | None = None, lock_file: Path = LOCK_FILE) -> Path:
    """Return the folder that holds exactly the jars of one set, fetching them the first time.

    Parameters
    ----------
    name : str
        ``"kafka"`` (the broker) or ``"spark-kafka"`` (Spark's connector, less what pyspark ships).
    root : Path, optional
        Cache folder; by default ``cache_root()``.
    lock_file : Path
        The lock to follow.

    Returns
    -------
    Path
        A folder; later calls check names and sizes only.

    Raises
    ------
    SetupError
        If Java is missing, the registry cannot be reached, or a jar does not match the lock.
    """
    jars = read_lock(lock_file.read_text(encoding="utf-8"))[name]
    root = cache_root() if root is None else root
    digest = hashlib.sha256("\n".join(jar.sha256 for jar in sorted(jars)).encode()).hexdigest()[:12]
    target = root / f"{name}-{digest}"
    if _is_complete(target, jars):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive(root / f".{name}.lock"):
            if not _is_complete(target, jars):  # another process may have fetched it meanwhile
                _fetch(name, jars, root, target)
    except OSError as error:
        raise SetupError(
            f"cannot write the jar cache {root}: {error}.", hint="set XDG_CACHE_HOME to a writable folder"
        ) from error
    return target


def _is_complete(folder: Path, jars: Sequence[Jar]) -> bool:
    """Quick check of a published folder: all names with their sizes, and nothing else."""
    try:
        found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError):
        return False
    return found == {jar.file_name: jar.size for jar in jars}


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock; the kernel releases it when the process dies, so it cannot go stale."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(name: str, jars: Sequence[Jar], root: Path, target: Path) -> None:
    """Download into a folder beside the target, verify, publish by rename."""
    logger.info("fetching %d jars of the set %s, once per user, into %s", len(jars), name, target)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
        staged = Path(scratch) / "jars"
        descriptor = Path(scratch) / "ivy.xml"
        descriptor.write_text(_ivy_descriptor(jars), encoding="utf-8")
        output = run_ivy(Path(scratch), ["-ivy", str(descriptor)], staged / "[artifact]-[revision].[ext]")
        _verify(name, jars, staged, output)
        if target.exists():  # incomplete or altered: make room for the rename
            shutil.rmtree(target)
        staged.rename(target)


def _ivy_descriptor(jars: Sequence[Jar]) -> str:
    """Ivy's project file. Every jar is named and none looked up through another: the lock decides."""
    lines = [
        f'<dependency org="{jar.organisation}" name="{jar.module}" rev="{jar.revision}"'
        ' transitive="false" conf="default->master"/>'
        for jar in jars
    ]
    return (
        '<ivy-module version="2.0"><info organisation="ctrstream" module="jars"/><dependencies>'
        + "".join(lines)
        + "</dependencies></ivy-module>"
    )


def ivy_jar() -> Path:
    """Path of the Ivy jar inside the installed pyspark, found without importing pyspark.

    Raises
    ------
    SetupError
        If pyspark is not installed or ships no Ivy.
    """
    spec = find_spec("pyspark")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [jar for place in places for jar in sorted((Path(place) / "jars").glob("ivy-*.jar"))]
    if not found:
        raise SetupError("expected pyspark with jars/ivy-*.jar in it. Found none.", hint="run `make setup`")
    return found[-1]


def run_ivy(scratch: Path, what: Sequence[str], retrieve: Path) -> str:
    """Run Ivy with a cache of its own and return what it printed, whether or not it succeeded.

    Parameters
    ----------
    scratch : Path
        Folder for Ivy's cache.
    what : sequence of str
        Options that say what to resolve.
    retrieve : Path
        Ivy's pattern for the files to write.
    """
    command = [str(find_java()), "-jar", str(ivy_jar()), "-cache", str(scratch / "ivy")]
    command += [*what, "-retrieve", str(retrieve)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False, cwd=scratch
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"fetching jars took longer than {_FETCH_TIMEOUT_S} s.", hint="check the network and try again"
        ) from error
    return done.stdout + done.stderr


def _verify(name: str, jars: Sequence[Jar], folder: Path, output: str) -> None:
    missing = [jar.file_name for jar in jars if not (folder / jar.file_name).is_file()]
    if missing:
        reasons = [line.strip() for line in output.splitlines() if "exception" in line.lower()]
        raise SetupError(
            f"expected {len(jars)} jars of the set {name}. Could not fetch {len(missing)}, among them "
            f"{missing[0]}" + (f": {reasons[0]}" if reasons else "."),
            hint="this needs Maven Central once: check the network; behind a proxy set "
            "JAVA_TOOL_OPTIONS='-Dhttps.proxyHost=HOST -Dhttps.proxyPort=PORT'",
        )
    for jar in jars:
        received = file_sha256(folder / jar.file_name)
        if received != jar.sha256:
            raise SetupError(
                f"checksum mismatch for {jar.file_name}: expected sha256 {jar.sha256}. Got {received}.",
                hint="the registry or a proxy served something else; nothing was kept",
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
