"""Folders on any file system that Spark can write to: what is put into them is there whole or not at all.

Spark writes the large files itself. This is for what stands around them: manifests, listings, clearing up.

::

    plain path              LocalFolder    POSIX: what is written survives a crash of the machine
    URI, with Spark         HadoopFolder   org.apache.hadoop.fs in the driver: file, hdfs, abfs, s3a, gs, ...
    URI, without Spark      ArrowFolder    pyarrow.fs, for reading: training runs without Spark

Names that begin with a dot are scratch or side files (Hadoop keeps checksums in ``.NAME.crc``). No listing
shows them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from pipelines.errors import ConfigError, SetupError
from pipelines.synced_files import sync_folder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["ArrowFolder", "Folder", "HadoopFolder", "LocalFolder", "is_uri", "open_folder", "open_for_arrow"]

# RFC 3986, but of two letters at least: `C:` is a drive.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
# Where a rename copies, object by object, while one PUT shows its object whole.
_OBJECT_STORES = frozenset({"s3", "s3a", "s3n", "gs", "oss", "obs", "cosn", "wasb", "wasbs"})


class Folder(Protocol):
    """A folder, which need not exist yet. A name may lead into folders below: ``data/part-0.parquet``."""

    @property
    def location(self) -> str:
        """Path or URI, as Spark takes it."""

    def child(self, *names: str) -> Folder:
        """The folder of that name below this one."""

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name; without one, this folder."""

    def read(self, name: str) -> bytes:
        """Content of a file. FileNotFoundError where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file. A reader sees the old content or the new one, never a part."""

    def create(self, name: str, content: bytes) -> bool:
        """Make a file, whole, if there is none of that name; False if there is: the first one wins."""

    def names(self) -> list[str]:
        """Files and folders right in this folder, sorted; none where it does not exist."""

    def files(self) -> dict[str, int]:
        """All files below: sizes in bytes by name relative to this folder, sorted."""

    def delete(self, name: str = "") -> None:
        """Remove a file, or a folder with all that is in it; without a name, this one. Absent is fine."""


def is_uri(location: str | Path) -> bool:
    """Whether a location names its file system.

    Examples
    --------
    >>> is_uri("s3a://bucket/lake"), is_uri("file:///tmp"), is_uri("/tmp/a:/b"), is_uri("runs/lake")
    (True, True, False, False)
    """
    return isinstance(location, str) and _SCHEME.match(location) is not None


def open_folder(location: str | Path, spark: SparkSession | None = None) -> Folder:
    """Open a folder for what its location calls for.

    Parameters
    ----------
    location : str or Path
        A path of this machine, or a URI.
    spark : SparkSession, optional
        Needed to write to a URI.

    Raises
    ------
    ConfigError
        If the location is a plain path, which Spark would look for on another file system.

    Examples
    --------
    >>> open_folder("runs/lake").child("events").location
    'runs/lake/events'
    """
    if is_uri(location):
        text = str(location)
        return ArrowFolder(text) if spark is None else HadoopFolder(text, spark)
    if spark is not None:
        default = str(_configuration(spark).get("fs.defaultFS", "file:///"))
        if not default.startswith("file:"):
            raise ConfigError(
                f"expected a URI, because Spark's default file system is {default}. Received: {location}.",
                hint=f"write {default.rstrip('/')}{location} or file://{location}",
            )
    return LocalFolder(Path(location))


def open_for_arrow(uri: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a URI, and the path in it.

    Raises
    ------
    SetupError
        If Arrow does not know the file system, or cannot reach it.

    Examples
    --------
    >>> open_for_arrow("file:///tmp/a b")[1]
    '/tmp/a b'
    """
    from pyarrow.fs import FileSystem

    # Arrow knows S3 by its plain name, and wants quoted what Hadoop takes literally.
    place, mark, options = uri.partition("?")
    quoted = quote(re.sub(r"^s3[an]:", "s3:", place.rstrip("/")), safe="/:@=+,~") + mark + options
    try:
        system, path = FileSystem.from_uri(quoted)
    # The last is Arrow's word for a file system that it was built without.
    except (OSError, ValueError, NotImplementedError) as error:
        raise SetupError(
            f"cannot open {uri}: {_first_line(error)}",
            hint="copy the folder to this machine and name the copy",
        ) from error
    return system, path


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    path: Path

    @property
    def location(self) -> str:
        return str(self.path)

    def child(self, *names: str) -> LocalFolder:
        return LocalFolder(self.path.joinpath(*names))

    def exists(self, name: str = "") -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with self._scratch(name, content) as (scratch, target):
            os.replace(scratch, target)

    def create(self, name: str, content: bytes) -> bool:
        if self.exists(name):
            return False
        with self._scratch(name, content) as (scratch, target):
            try:
                # A link, because a rename would replace what another process made meanwhile.
                os.link(scratch, target)
            except FileExistsError:
                return False
        return True

    def names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in self.path.iterdir() if not _is_hidden(entry.name))

    def files(self) -> dict[str, int]:
        found = {}
        for folder, below, names in os.walk(self.path):
            below[:] = [name for name in below if not _is_hidden(name)]
            for name in names:
                if not _is_hidden(name):
                    path = Path(folder, name)
                    found[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def delete(self, name: str = "") -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def _scratch(self, name: str, content: bytes) -> Iterator[tuple[Path, Path]]:
        """A file on disk beside the one that it is to become; afterwards the folder is on disk too."""
        target = self.path / name
        _make_durably(target.parent)
        scratch = target.with_name(_scratch_name(target.name))
        try:
            with scratch.open("xb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            # Hadoop would hold the new content against the checksum of an old one.
            target.with_name(f".{target.name}.crc").unlink(missing_ok=True)
            yield scratch, target
            sync_folder(target.parent)
        finally:
            scratch.unlink(missing_ok=True)


@dataclass(frozen=True)
class HadoopFolder:
    """A folder on a file system that Spark's Hadoop client knows, reached through the driver's JVM.

    Where a rename is one step (hdfs, abfs, file), a file is written under a scratch name and renamed. On
    object stores it is one PUT. There `create` asks the store to refuse a second one; a store or client
    that cannot (s3a before Hadoop 3.4.2) leaves a moment in which two writers both believe to be first.
    """

    location: str
    spark: SparkSession = field(repr=False, compare=False)

    def child(self, *names: str) -> HadoopFolder:
        return HadoopFolder("/".join([self.location.rstrip("/"), *names]), self.spark)

    def exists(self, name: str = "") -> bool:
        path = self._path(name)
        return bool(self._system(path).exists(path))

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with _java_errors(path):
            stream = self._system(path).open(path)
            try:
                return bytes(stream.readAllBytes())
            finally:
                stream.close()

    def write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        system = self._system(path)
        if self._is_object_store:
            self._put(system, path, content, overwrite=True)
            return
        with self._scratch(path, content) as scratch:
            if self._is_local:
                system.getRawFileSystem().rename(scratch, path)  # rename(2)
                return
            hadoop = self._jvm.org.apache.hadoop.fs
            modes = self._gateway.new_array(hadoop.Options.Rename, 1)
            modes[0] = hadoop.Options.Rename.OVERWRITE
            context = hadoop.FileContext.getFileContext(path.toUri(), _configuration(self.spark))
            context.rename(scratch, path, modes)

    def create(self, name: str, content: bytes) -> bool:
        from py4j.protocol import Py4JJavaError

        path = self._path(name)
        system = self._system(path)
        if system.exists(path):
            return False
        try:
            if self._is_object_store:
                self._put(system, path, content, overwrite=False)
                return True
            with self._scratch(path, content) as scratch:
                if self._is_local:  # where a rename would replace
                    nio = self._jvm.java.nio.file
                    nio.Files.createLink(nio.Path.of(path.toUri()), nio.Path.of(scratch.toUri()))
                    return True
                return bool(system.rename(scratch, path))
        except Py4JJavaError as error:
            if _class_name(error) in _EXISTS or system.exists(path):
                return False
            raise

    def names(self) -> list[str]:
        path = self._path("")
        system = self._system(path)
        if not system.exists(path):
            return []
        names = [status.getPath().getName() for status in system.listStatus(path)]
        return sorted(name for name in names if not _is_hidden(name))

    def files(self) -> dict[str, int]:
        path = self._path("")
        system = self._system(path)
        if not system.exists(path):
            return {}
        root = PurePosixPath(system.makeQualified(path).toUri().getPath())
        found, listing = {}, system.listFiles(path, True)
        while listing.hasNext():
            status = listing.next()
            name = PurePosixPath(status.getPath().toUri().getPath()).relative_to(root)
            if not any(_is_hidden(part) for part in name.parts):
                found[str(name)] = int(status.getLen())
        return dict(sorted(found.items()))

    def delete(self, name: str = "") -> None:
        path = self._path(name)
        self._system(path).delete(path, True)

    @property
    def _scheme(self) -> str:
        found = _SCHEME.match(self.location)
        return "" if found is None else found["scheme"].lower()

    @property
    def _is_local(self) -> bool:
        return self._scheme == "file"

    @property
    def _is_object_store(self) -> bool:
        return self._scheme in _OBJECT_STORES

    @property
    def _gateway(self) -> Any:
        return self.spark.sparkContext._gateway

    @property
    def _jvm(self) -> Any:
        return self._gateway.jvm

    def _path(self, name: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(f"{self.location.rstrip('/')}/{name}".rstrip("/"))

    def _system(self, path: Any) -> Any:
        try:
            return path.getFileSystem(_configuration(self.spark))
        except Exception as error:
            raise SetupError(
                f"Spark cannot open {self.location}: {_first_line(error)}",
                hint="are the jars of its file system there (spark.jars, spark.jars.packages), and its "
                "spark.hadoop.fs... settings?",
            ) from error

    @contextmanager
    def _scratch(self, path: Any, content: bytes) -> Iterator[Any]:
        """A file beside the one that it is to become, on disk."""
        system = self._system(path)
        scratch = self._jvm.org.apache.hadoop.fs.Path(path.getParent(), _scratch_name(path.getName()))
        if self._is_local:
            # Without its checksums, since the rename of two files is not one step.
            system = system.getRawFileSystem()
        try:
            stream = system.create(scratch, False)
            try:
                stream.write(bytearray(content))
                stream.hsync()
            finally:
                stream.close()
            if self._is_local:
                side = self._jvm.org.apache.hadoop.fs.Path(path.getParent(), f".{path.getName()}.crc")
                system.delete(side, False)
            yield scratch
        finally:
            system.delete(scratch, False)

    def _put(self, system: Any, path: Any, content: bytes, *, overwrite: bool) -> None:
        builder = system.createFile(path).overwrite(overwrite).recursive()
        if not overwrite:
            # Known from Hadoop 3.4.2 on; ignored before.
            builder = builder.opt("fs.option.create.conditional.overwrite", True)
        stream = builder.build()
        try:
            stream.write(bytearray(content))
        except BaseException:
            # Closing would show what has been written so far.
            stream.abort()
            raise
        stream.close()


@dataclass(frozen=True)
class ArrowFolder:
    """A folder behind a URI, for reading, where no Spark runs."""

    location: str

    def child(self, *names: str) -> ArrowFolder:
        return ArrowFolder("/".join([self.location.rstrip("/"), *names]))

    def exists(self, name: str = "") -> bool:
        from pyarrow.fs import FileType

        system, path = self._open(name)
        return bool(system.get_file_info(path).type != FileType.NotFound)

    def read(self, name: str) -> bytes:
        system, path = self._open(name)
        with system.open_input_file(path) as handle:
            return bytes(handle.read())

    def write(self, name: str, content: bytes) -> None:
        raise self._read_only(name)

    def create(self, name: str, content: bytes) -> bool:
        raise self._read_only(name)

    def names(self) -> list[str]:
        return sorted(info.base_name for info in self._list(recursive=False))

    def files(self) -> dict[str, int]:
        root = PurePosixPath(self._open("")[1])
        found = {}
        for info in self._list(recursive=True):
            name = PurePosixPath(info.path).relative_to(root)
            if info.is_file and not any(_is_hidden(part) for part in name.parts):
                found[str(name)] = int(info.size)
        return dict(sorted(found.items()))

    def delete(self, name: str = "") -> None:
        raise self._read_only(name)

    def _list(self, *, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        system, path = self._open("")
        listing = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=recursive))
        return [info for info in listing if not _is_hidden(info.base_name)]

    def _open(self, name: str) -> tuple[Any, str]:
        system, path = open_for_arrow(self.location)
        return system, f"{path}/{name}".rstrip("/")

    def _read_only(self, name: str) -> SetupError:
        return SetupError(f"cannot change {name or 'the folder'} in {self.location} without Spark.")


_EXISTS = frozenset(
    {
        "java.nio.file.FileAlreadyExistsException",
        "org.apache.hadoop.fs.FileAlreadyExistsException",
    }
)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _scratch_name(name: str) -> str:
    return f".{name}.{os.getpid()}.{secrets.token_hex(4)}"


def _make_durably(folder: Path) -> None:
    """Make a folder and its parents, and have their entries on disk."""
    if folder.is_dir():
        return
    _make_durably(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _configuration(spark: SparkSession) -> Any:
    return spark.sparkContext._jsc.hadoopConfiguration()


@contextmanager
def _java_errors(path: Any) -> Iterator[None]:
    from py4j.protocol import Py4JJavaError

    try:
        yield
    except Py4JJavaError as error:
        if _class_name(error) == "java.io.FileNotFoundException":
            raise FileNotFoundError(path.toString()) from error
        raise


def _class_name(error: Any) -> str:
    return str(error.java_exception.getClass().getName())


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "java_exception", None)
    text = str(error) if cause is None else str(cause.toString())
    return (text.strip().splitlines() or [type(error).__name__])[0]
