"""Rewrite ``jars.lock``: resolve the wanted versions with all they need, and note sizes and checksums.

Run as ``python -m jobs.jars_lock`` after changing a version below, and read the difference before you commit
it. What is fetched here is trusted; ``jobs.jars`` holds every later fetch against it.
"""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path

from jobs.jars import LOCK_FILE, Jar, file_sha256, ivy_jar, run_ivy
from pipelines.errors import SetupError

# organisation, module, revision
WANTED: dict[str, tuple[tuple[str, str, str], ...]] = {
    "kafka": (
        ("org.apache.kafka", "kafka_2.13", "4.3.1"),
        # Kafka's own list leaves the logging backend open; without one a broker that fails says nothing.
        ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.4"),
    ),
    # 4.0.0 is the newest connector that runs on pyspark 4.0 and is published whole.
    "spark-kafka": (("org.apache.spark", "spark-sql-kafka-0-10_2.13", "4.0.0"),),
}
_HEADER = """\
# Jars that `ctrstream` fetches. Written by `python -m jobs.jars_lock`; do not edit.
# set organisation:module:revision size sha256
"""

logger = logging.getLogger(__name__)


def modules_of_pyspark() -> set[str]:
    """Module names (jar names less the version) that the installed pyspark brings along."""
    return {re.sub(r"-\d.*$", "", path.name) for path in ivy_jar().parent.glob("*.jar")}


def resolve_transitively(wanted: tuple[tuple[str, str, str], ...], without: set[str]) -> list[Jar]:
    """Resolve modules with all that they need, less the modules named in `without`.

    Raises
    ------
    SetupError
        If the registry did not deliver a wanted module.
    """
    jars: dict[tuple[str, str], Jar] = {}
    for organisation, module, revision in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            lib = Path(scratch) / "lib"
            # The configuration "runtime" misses six jars that the broker loads.
            what = ["-dependency", organisation, module, revision, "-confs", "default"]
            output = run_ivy(Path(scratch), what, lib / "[organisation]" / "[module]" / "[revision].[ext]")
            if not (lib / organisation / module / f"{revision}.jar").is_file():
                raise SetupError(f"could not resolve {organisation}:{module}:{revision}.\n{output[-2000:]}")
            for path in sorted(lib.glob("*/*/*.jar")):
                org, name = path.parts[-3:-1]
                if name not in without:
                    jars[org, name] = Jar(org, name, path.stem, path.stat().st_size, file_sha256(path))
    return sorted(jars.values())


def main() -> None:
    """Resolve every set and write the lock."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = []
    for name, wanted in WANTED.items():
        jars = resolve_transitively(wanted, modules_of_pyspark() if name == "spark-kafka" else set())
        logger.info("%s: %d jars, %.0f MB", name, len(jars), sum(jar.size for jar in jars) / 1e6)
        lines += [f"{name} {j.organisation}:{j.module}:{j.revision} {j.size} {j.sha256}\n" for j in jars]
    LOCK_FILE.write_text(_HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
