"""Fetched jars match the lock or are refused; Java is found or its absence is said."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from jobs import jars
from jobs.jars import LOCK_FILE, Jar, read_lock
from jobs.java import find_java
from pipelines.errors import SetupError


@pytest.fixture
def one_jar(tmp_path: Path) -> tuple[Jar, Path]:
    """The smallest jar of the broker's set, and a lock that names only it."""
    jar = min(read_lock(LOCK_FILE.read_text())["kafka"], key=lambda jar: jar.size)
    return jar, write_lock(tmp_path / "jars.lock", jar)


def write_lock(path: Path, jar: Jar) -> Path:
    path.write_text(f"small {jar.organisation}:{jar.module}:{jar.revision} {jar.size} {jar.sha256}\n")
    return path


def test_lock_pins_broker_and_connector_with_checksums() -> None:
    sets = read_lock(LOCK_FILE.read_text())
    assert set(sets) == {"kafka", "spark-kafka"}
    assert "kafka_2.13-4.3.1.jar" in {jar.file_name for jar in sets["kafka"]}
    connector = {jar.file_name for jar in sets["spark-kafka"]}
    assert {
        "spark-sql-kafka-0-10_2.13-4.0.0.jar",
        "spark-token-provider-kafka-0-10_2.13-4.0.0.jar",
    } <= connector
    for jar in (*sets["kafka"], *sets["spark-kafka"]):
        assert len(bytes.fromhex(jar.sha256)) == 32


def test_connector_set_repeats_no_jar_that_pyspark_ships() -> None:
    from jobs.jars_lock import modules_of_pyspark

    assert not modules_of_pyspark() & {jar.module for jar in read_lock(LOCK_FILE.read_text())["spark-kafka"]}


def test_resolved_folder_holds_exactly_the_locked_jars() -> None:
    folder = jars.resolve("kafka")
    expected = {jar.file_name: jar.sha256 for jar in read_lock(LOCK_FILE.read_text())["kafka"]}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == expected
    assert jars.resolve("kafka") == folder


def test_altered_cache_is_fetched_again(one_jar: tuple[Jar, Path], tmp_path: Path) -> None:
    jar, lock = one_jar
    folder = jars.resolve("small", root=tmp_path / "cache", lock_file=lock)
    (folder / jar.file_name).write_bytes(b"cut short")
    again = jars.resolve("small", root=tmp_path / "cache", lock_file=lock)
    assert again == folder
    assert hashlib.sha256((folder / jar.file_name).read_bytes()).hexdigest() == jar.sha256
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder.name]


def test_jar_with_another_checksum_is_refused_and_not_kept(one_jar: tuple[Jar, Path], tmp_path: Path) -> None:
    jar, _ = one_jar
    forged = Jar(jar.organisation, jar.module, jar.revision, jar.size, "0" * 64)
    lock = write_lock(tmp_path / "forged.lock", forged)
    with pytest.raises(SetupError, match=f"checksum mismatch for {jar.file_name}") as raised:
        jars.resolve("small", root=tmp_path / "cache", lock_file=lock)
    assert jar.sha256 in str(raised.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_unreachable_registry_is_one_clear_error(
    one_jar: tuple[Jar, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jar, lock = one_jar
    # A proxy that nobody listens on stands for a network without a way out.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=1")
    with pytest.raises(SetupError, match="Could not fetch 1") as raised:
        jars.resolve("small", root=tmp_path / "cache", lock_file=lock)
    assert jar.file_name in str(raised.value)
    assert "Maven Central" in str(raised.value)


def test_cache_that_cannot_be_written_is_named(one_jar: tuple[Jar, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="XDG_CACHE_HOME"):
        jars.resolve("small", root=tmp_path / "file" / "cache", lock_file=one_jar[1])


def fake_java(folder: Path, banner: str) -> None:
    folder.mkdir(parents=True)
    (folder / "java").write_text(f"#!/bin/sh\necho '{banner}' >&2\n")
    (folder / "java").chmod(0o755)


def test_missing_java_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="Found no java on the path") as raised:
        find_java()
    assert "apt-get install" in str(raised.value)


def test_java_that_is_too_old_is_named_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path / "bin", 'openjdk version "11.0.2" 2019-01-15')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SetupError, match="is Java 11"):
        find_java()


def test_java_home_comes_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path / "home" / "bin", 'openjdk version "21.0.1"')
    fake_java(tmp_path / "path", 'openjdk version "17.0.1"')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_java() == tmp_path / "home" / "bin" / "java"
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(SetupError, match="no bin/java"):
        find_java()
