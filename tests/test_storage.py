"""A file in a folder is there whole or not at all, and the first of two writers wins, on any file system."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.errors import ConfigError, SetupError
from pipelines.storage import ArrowFolder, Folder, HadoopFolder, LocalFolder, open_folder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(params=["path", "uri"])
def folder(request: pytest.FixtureRequest, spark: SparkSession, tmp_path: Path) -> Folder:
    place = tmp_path / "a folder" / "x=1"
    opened = open_folder(place if request.param == "path" else f"file://{place}", spark)
    assert isinstance(opened, LocalFolder if request.param == "path" else HadoopFolder)
    return opened


def test_location_says_what_opens_it(spark: SparkSession, tmp_path: Path) -> None:
    assert open_folder(tmp_path) == open_folder(str(tmp_path), spark) == LocalFolder(tmp_path)
    assert open_folder("s3a://bucket/lake") == ArrowFolder("s3a://bucket/lake")
    assert open_folder("file:///lake", spark).child("a", "b").location == "file:///lake/a/b"
    assert open_folder(tmp_path / "a").child("b").location == str(tmp_path / "a" / "b")


def test_plain_path_is_refused_where_spark_would_look_elsewhere(spark: SparkSession) -> None:
    configuration = spark.sparkContext._jsc.hadoopConfiguration()
    configuration.set("fs.defaultFS", "hdfs://namenode:8020")
    try:
        with pytest.raises(ConfigError, match="default file system is hdfs://namenode:8020") as caught:
            open_folder("/lake", spark)
    finally:
        configuration.set("fs.defaultFS", "file:///")
    assert caught.value.hint == "write hdfs://namenode:8020/lake or file:///lake"


def test_absent_folder_is_empty(folder: Folder) -> None:
    assert not folder.exists()
    assert not folder.exists("MANIFEST.json")
    assert (folder.names(), folder.files()) == ([], {})
    folder.delete()
    folder.delete("MANIFEST.json")
    with pytest.raises(FileNotFoundError):
        folder.read("MANIFEST.json")


def test_file_is_written_and_replaced(folder: Folder) -> None:
    for content in (b"first", b"", bytes(range(256)) * 400):
        folder.write("MANIFEST.json", content)
        assert folder.read("MANIFEST.json") == content
    assert (folder.names(), folder.exists(), folder.exists("MANIFEST.json")) == (
        ["MANIFEST.json"],
        True,
        True,
    )
    assert folder.files() == {"MANIFEST.json": 102_400}


def test_first_creation_wins(folder: Folder) -> None:
    assert folder.create("claim", b"mine")
    assert not folder.create("claim", b"yours")
    assert folder.read("claim") == b"mine"
    assert folder.files() == {"claim": 4}


def test_files_lie_below_and_are_deleted_with_their_folder(folder: Folder) -> None:
    folder.write("data/hour=1/part-0", b"1234")
    folder.child("data").write("hour=2/part-0", b"12")
    folder.write("MANIFEST.json", b"{}")
    assert folder.names() == ["MANIFEST.json", "data"]
    assert folder.child("data").names() == ["hour=1", "hour=2"]
    assert folder.files() == {"MANIFEST.json": 2, "data/hour=1/part-0": 4, "data/hour=2/part-0": 2}
    folder.delete("data/hour=1")
    folder.delete("MANIFEST.json")
    assert folder.files() == {"data/hour=2/part-0": 2}
    folder.delete()
    assert not folder.exists()


def test_sparks_checksums_and_staging_are_not_listed(spark: SparkSession, folder: Folder) -> None:
    spark.range(3).coalesce(1).write.parquet(folder.child("rows").location)
    folder.write(".staging/half", b"x")
    assert folder.names() == ["rows"]
    (name,) = folder.files()
    assert name.startswith("rows/part-")
    assert name.endswith(".parquet")


def test_same_file_can_be_written_by_path_and_by_uri(spark: SparkSession, tmp_path: Path) -> None:
    by_path, by_uri = open_folder(tmp_path), open_folder(f"file://{tmp_path}", spark)
    # Hadoop's checksum of an older content must not speak against the newer one.
    stream = spark.sparkContext._jvm.org.apache.hadoop.fs.Path(f"file://{tmp_path}/text")  # type: ignore[union-attr]
    system = stream.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())
    for writer in (by_path, by_uri):
        output = system.create(stream)
        output.write(bytearray(b"with a checksum"))
        output.close()
        assert (tmp_path / ".text.crc").exists()
        writer.write("text", b"another content")
        assert by_path.read("text") == by_uri.read("text") == b"another content"


def test_of_many_creators_at_once_one_wins(folder: Folder) -> None:
    start, won = threading.Barrier(8), []

    def claim(number: int) -> None:
        start.wait()
        for turn in range(10):
            if folder.create(f"claim-{turn}", str(number).encode()):
                won.append((turn, str(number).encode()))

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [(turn, folder.read(f"claim-{turn}")) for turn in range(10)]


def test_reader_never_sees_a_part(folder: Folder) -> None:
    contents = {bytes([letter]) * 200_000 for letter in b"ab"}
    folder.write("MANIFEST.json", min(contents))
    done = threading.Event()

    def replace() -> None:
        for _ in range(20):
            for content in sorted(contents):
                folder.write("MANIFEST.json", content)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(folder.read("MANIFEST.json"))
    writer.join()
    assert set(seen) <= contents


def _replace_for_ever(place: Path) -> None:
    letter = 0
    while True:
        letter = (letter + 1) % 26
        LocalFolder(place).write("MANIFEST.json", bytes([97 + letter]) * 1_000_000)


def test_killed_writer_leaves_a_whole_file_and_nothing_else_to_see(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    for attempt in range(5):
        child = multiprocessing.get_context("fork").Process(target=_replace_for_ever, args=(tmp_path,))
        child.start()
        deadline = time.monotonic() + 30
        while not folder.exists("MANIFEST.json") and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        content = folder.read("MANIFEST.json")
        assert (len(content), len(set(content))) == (1_000_000, 1)
        assert list(folder.files()) == ["MANIFEST.json"]


def test_uri_is_read_without_spark(spark: SparkSession, tmp_path: Path) -> None:
    place = tmp_path / "a folder"
    LocalFolder(place).write("data/part-0", b"rows")
    LocalFolder(place).write("data/.part-0.crc", b"crc")
    LocalFolder(place).write("MANIFEST.json", b"{}")
    read = open_folder(f"file://{place}")
    assert (read.names(), read.files()) == (["MANIFEST.json", "data"], {"MANIFEST.json": 2, "data/part-0": 4})
    assert (read.exists("MANIFEST.json"), read.child("none").exists()) == (True, False)
    assert read.child("data").read("part-0") == b"rows"
    assert read.child("none").names() == []
    with pytest.raises(FileNotFoundError):
        read.read("none")
    with pytest.raises(SetupError, match="without Spark"):
        read.write("MANIFEST.json", b"")


def test_file_system_without_its_jars_is_told(spark: SparkSession) -> None:
    with pytest.raises(SetupError, match=r"cannot open nosuch://bucket/lake: .*nosuch"):
        open_folder("nosuch://bucket/lake", spark).exists()
    with pytest.raises(SetupError, match="cannot open nosuch://bucket/lake: "):
        open_folder("nosuch://bucket/lake").names()
