"""What the project's own files promise each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from jobs.roots import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned() -> dict[str, list[str]]:
    """Lines of the lock by name of distribution."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if match := re.match(r"([a-z0-9][a-z0-9-]*)(\[[a-z0-9,-]+\])?==", line):
            found.setdefault(match.group(1), []).append(line)
    return found


def test_exactly_the_five_packages_are_installed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(PACKAGES)
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == set(PACKAGES)
    assert set(PACKAGES) <= set(PROJECT["tool"]["pytest"]["ini_options"]["testpaths"])


def test_packages_have_no_subfolders_that_an_install_would_miss() -> None:
    nested = [path for package in PACKAGES for path in (ROOT / package).glob("*/**/*.py")]
    assert nested == []


def test_lock_pins_every_dependency_of_every_extra() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in wanted}
    assert names <= set(pinned())


def test_lock_names_no_registry_and_has_a_hash_for_every_pin() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text
    blocks = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert all("--hash=sha256:" in block for block in blocks)
    assert len(blocks) == sum(len(lines) for lines in pinned().values())
