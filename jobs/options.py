"""Options that several subcommands share: configuration, output folder, ``--as-of``, broker address.

Each is a decorator for a click command function. Option callbacks report a wrong value as a usage error
(exit code 2), and a machine that cannot do what is asked as ``SetupError`` (exit code 1).
"""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from pipelines.errors import SetupError

R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])

_META = "ctrstream.config."  # keys in click's Context.meta


def _remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Store one of the three configuration options; print the configuration once all are known.

    The three are eager: ``--print-config`` must work without the command's own required options, and the
    order on the command line must not matter.
    """
    if ctx.resilient_parsing:
        return value
    ctx.meta[_META + str(parameter.name)] = value
    names = ("config_path", "overrides", "print_config")
    if all(_META + name in ctx.meta for name in names) and ctx.meta[_META + "print_config"]:
        from pipelines.config import dump_config, load_config

        config = load_config(ctx.meta[_META + "config_path"], ctx.meta[_META + "overrides"])
        click.echo(dump_config(config), nl=False)
        ctx.exit()
    return value


def config_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add ``--config``, ``--set`` and ``--print-config``; pass the loaded ``config`` to the function.

    The function receives the keyword ``config`` (``pipelines.config.Config``). Put this decorator under
    ``@click.command()``, like any other option.
    """

    @click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        callback=_remember,
        help="Configuration file (TOML). Every key is optional.",
    )
    @click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        is_eager=True,
        callback=_remember,
        help="Override one configuration key, as in `--set student.batch_rows=512`. Repeatable.",
    )
    @click.option(
        "--print-config",
        is_flag=True,
        is_eager=True,
        callback=_remember,
        help="Print the resulting configuration as TOML and exit.",
    )
    @functools.wraps(function)
    def with_config(
        *args: Any, config_path: Path | None, overrides: tuple[str, ...], print_config: bool, **kwargs: Any
    ) -> R:
        from pipelines.config import load_config

        return function(*args, config=load_config(config_path, overrides), **kwargs)

    return with_config


def writable_folder(path: Path, *, option: str = "--out") -> Path:
    """Create an output folder and check that files can be made in it.

    Parameters
    ----------
    path : Path
        The folder; missing parents are created.
    option : str
        The option to name in the remedy.

    Returns
    -------
    Path
        The same path.

    Raises
    ------
    SetupError
        If the folder cannot be created or written to.
    """
    hint = f"choose another folder with {option}, or change its owner or permissions"
    try:
        path.mkdir(parents=True, exist_ok=True)
        # os.access answers for root what the permission bits say nothing about (read-only mounts), but not
        # for all file systems: making a file is the only sure answer.
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SetupError(f"the folder {path} is not writable: {error.strerror}.", hint=hint) from error
    return path


def output_option(
    *, required: bool = True, default: str | None = None, help: str = "Output folder; created when missing."
) -> Callable[[Function], Function]:
    """Add ``--out DIR``, checked to be writable before the command starts; passes ``out`` (``Path``).

    Parameters
    ----------
    required : bool
        Whether the option must be given; ignored where `default` is set.
    default : str, optional
        Folder to use where none is given.
    help : str
        Text for ``--help``.
    """

    def check(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
        return value if value is None or ctx.resilient_parsing else writable_folder(value)

    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        required=required and default is None,
        default=default,
        show_default=default is not None,
        callback=check,
        help=help,
    )


def parse_utc_ms(text: str) -> int:
    """Parse an ISO-8601 time with an offset into milliseconds since the epoch.

    Parameters
    ----------
    text : str
        For example ``2025-03-01T12:00:00Z`` or ``2025-03-01T14:00:00+02:00``.

    Returns
    -------
    int
        Milliseconds since 1970-01-01T00:00:00Z; finer digits are cut.

    Raises
    ------
    ValueError
        If the text is no ISO-8601 time or names no offset.

    Examples
    --------
    >>> parse_utc_ms("1970-01-01T00:00:01.5Z")
    1500
    >>> parse_utc_ms("1970-01-01T02:00:00+02:00")
    0
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"expected an ISO-8601 time such as 2025-03-01T00:00:00Z. Got {text!r}: {error}."
        ) from error
    if moment.tzinfo is None:
        raise ValueError(
            f"expected a time with an offset, such as {text}Z. Got {text}, which names no time zone."
        )
    # Integer arithmetic: a float of seconds cannot hold every millisecond exactly.
    since_epoch = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since_epoch.days * 86_400 + since_epoch.seconds) * 1000 + since_epoch.microseconds // 1000


class _Milliseconds(click.ParamType[int]):
    """A click type for a function from text to int64 milliseconds; its ``ValueError`` is a usage error."""

    @abstractmethod
    def parse(self, text: str) -> int:
        """Milliseconds of a text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn text into milliseconds, or fail as a usage error."""
        if isinstance(value, int):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class UtcTime(_Milliseconds):
    """A moment, as ``parse_utc_ms`` reads it."""

    name = "TIME"

    def parse(self, text: str) -> int:
        """Milliseconds since the epoch."""
        return parse_utc_ms(text)


class Duration(_Milliseconds):
    """A stretch of time such as ``7d``, as ``pipelines.duration.parse_duration`` reads it."""

    name = "DURATION"

    def parse(self, text: str) -> int:
        """Its length."""
        from pipelines.duration import parse_duration

        return parse_duration(text)


def as_of_option(*, required: bool = False) -> Callable[[Function], Function]:
    """Add ``--as-of TIME``; passes ``as_of`` (``int | None``, event time, ms since the epoch, UTC)."""
    return click.option(
        "--as-of",
        type=UtcTime(),
        required=required,
        help="Use only what was known at this time: ISO-8601 with an offset, as in 2025-03-01T00:00:00Z.",
    )


def bootstrap_option(function: Function) -> Function:
    """Add ``--bootstrap-servers HOST:PORT[,...]``; passes ``bootstrap_servers`` (``str | None``)."""
    return click.option(
        "--bootstrap-servers",
        metavar="HOST:PORT[,...]",
        envvar="CTRSTREAM_BOOTSTRAP_SERVERS",
        show_envvar=True,
        help="Kafka to use instead of the configured one.",
    )(function)
