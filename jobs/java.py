"""The Java that Kafka, Spark and the jar fetch run on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from pipelines.errors import SetupError

MINIMUM_JAVA = 17  # Kafka 4 brokers and Spark 4 both need it
_HINT = (
    f"install Java {MINIMUM_JAVA} or newer (Debian, Ubuntu: `apt-get install openjdk-17-jre-headless`), "
    "or point JAVA_HOME at one"
)


def java_version(banner: str) -> int | None:
    """Read the feature version from what ``java -version`` prints.

    Parameters
    ----------
    banner : str
        Output of ``java -version``.

    Returns
    -------
    int or None
        The feature version, 8 for the old form ``1.8``; None where the text names none.

    Examples
    --------
    >>> java_version('openjdk version "17.0.15" 2025-04-15')
    17
    >>> java_version('java version "1.8.0_292"')
    8
    >>> java_version("not java") is None
    True
    """
    match = re.search(r'version "(?:1\.)?(\d+)', banner)
    return int(match.group(1)) if match else None


def find_java() -> Path:
    """Find a Java of at least version 17: the one in ``JAVA_HOME`` where that is set, else on the path.

    Returns
    -------
    Path
        The ``java`` executable.

    Raises
    ------
    SetupError
        If there is none, it does not run, or it is too old.
    """
    return _checked_java(os.environ.get("JAVA_HOME"), os.environ.get("PATH"))


@cache  # asking costs 0.1 s; the environment is the key, so that a change of it is answered anew
def _checked_java(java_home: str | None, path: str | None) -> Path:
    if java_home:
        java = Path(java_home) / "bin" / "java"
        if not os.access(java, os.X_OK):
            raise SetupError(f"JAVA_HOME is {java_home}, but there is no bin/java in it.", hint=_HINT)
    else:
        found = shutil.which("java", path=path)
        if found is None:
            raise SetupError(f"expected Java {MINIMUM_JAVA} or newer. Found no java on the path.", hint=_HINT)
        java = Path(found)
    try:
        # The banner goes to stderr.
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{java} does not run: {error}.", hint=_HINT) from error
    version = java_version(done.stderr + done.stdout)
    if done.returncode != 0 or version is None:
        raise SetupError(f"`{java} -version` failed: {(done.stderr + done.stdout).strip()!r}.", hint=_HINT)
    if version < MINIMUM_JAVA:
        raise SetupError(f"expected Java {MINIMUM_JAVA} or newer. {java} is Java {version}.", hint=_HINT)
    return java
