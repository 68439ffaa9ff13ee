"""The command line: what it imports, how it fails, the options that commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner, Result

from jobs.cli import COMMANDS, cli
from jobs.options import as_of_option, bootstrap_option, config_options, output_option, parse_utc_ms
from pipelines.errors import (
    ConfigError,
    CtrstreamError,
    DataError,
    SetupError,
    StaleStateError,
    TransientError,
)

if TYPE_CHECKING:
    from pipelines.config import Config

HEAVY = {
    "torch",
    "pyspark",
    "mlflow",
    "sklearn",
    "lightgbm",
    "kafka",
    "matplotlib",
    "pandas",
    "numpy",
    "pydantic",
}


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command function of the test's own as ``ctrstream probe``."""

    def run(command: click.Command, *arguments: str) -> Result:
        module = ModuleType("tests.probe_command")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "probe", (module.__name__, "A command of this test."))
        return CliRunner().invoke(cli, ["probe", *arguments])

    return run


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import json, sys; from click.testing import CliRunner; from jobs.cli import cli\n"
        "result = CliRunner().invoke(cli, ['--help'])\n"
        "print(json.dumps([result.exit_code, result.output, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    exit_code, output, modules = json.loads(done.stdout)
    assert exit_code == 0
    assert {line.split()[0] for line in output.splitlines() if line.startswith("  ")} >= set(COMMANDS)
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_listed_command_can_be_imported(name: str) -> None:
    module = import_module(COMMANDS[name][0])
    assert isinstance(module.command, click.Command)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_command_needs_an_engine_to_print_its_help(name: str) -> None:
    program = (
        "import sys; from click.testing import CliRunner; from jobs.cli import cli\n"
        f"result = CliRunner().invoke(cli, [{name!r}, '--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (HEAVY - {"numpy", "pydantic"}) & set(done.stdout.split())


def test_unknown_command_names_the_nearest_and_is_bad_usage() -> None:
    result = CliRunner().invoke(cli, ["brokr", "up"])
    assert result.exit_code == 2
    assert "brokr" in result.output
    assert "'broker'" in result.output


def test_unknown_subcommand_names_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["broker", "upp"])
    assert result.exit_code == 2
    assert "'up'" in result.output


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert CliRunner().invoke(cli, ["--version"]).output.strip().endswith(version("ctrstream"))


@pytest.mark.parametrize(
    ("error_type", "exit_code"),
    [
        (CtrstreamError, 1),
        (SetupError, 1),
        (StaleStateError, 1),
        (TransientError, 1),
        (ConfigError, 2),
        (DataError, 3),
    ],
)
def test_error_becomes_one_message_with_its_hint_and_exit_code(
    probe: Callable[..., Result], error_type: type[CtrstreamError], exit_code: int
) -> None:
    @click.command()
    def command() -> None:
        raise error_type("expected A. Got B.", hint="do C")

    result = probe(command)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr == "error: expected A. Got B.\nhint: do C\n"


def test_interrupt_ends_with_130(probe: Callable[..., Result]) -> None:
    @click.command()
    def command() -> None:
        raise KeyboardInterrupt

    assert probe(command).exit_code == 130


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "probe", ("a_package_that_is_not_there", ""))
    result = CliRunner().invoke(cli, ["probe"])
    assert result.exit_code == 1
    assert "a_package_that_is_not_there" in result.stderr
    assert "make setup" in result.stderr


def test_logs_go_to_stderr_from_the_chosen_level(probe: Callable[..., Result]) -> None:
    import logging

    @click.command()
    def command() -> None:
        logging.getLogger("jobs.probe").info("progress")
        logging.getLogger("someone.else").info("chatter")
        click.echo("data")

    result = probe(command)
    assert result.stdout == "data\n"
    assert "INFO jobs.probe: progress" in result.stderr
    assert "chatter" not in result.stderr


def test_package_from_another_root_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jobs.cli", "broker", "status", "--data", str(tmp_path / "broker")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"calibration from {tmp_path}" in done.stderr


@click.command()
@click.option("--events", required=True)
@config_options
def configured(events: str, config: Config) -> None:
    click.echo(f"{events} {config.student.batch_rows} {config.replay.ratio}")


def test_config_file_and_overrides_reach_the_command(probe: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[student]\nbatch_rows = 64\n[replay]\nratio = 0.5\n")
    result = probe(configured, "--events", "x", "--config", str(path), "--set", "student.batch_rows=32")
    assert result.stdout == "x 32 0.5\n"


def test_print_config_needs_no_other_option_and_can_be_read_back(
    probe: Callable[..., Result], tmp_path: Path
) -> None:
    printed = probe(configured, "--print-config", "--set", "student.batch_rows=32")
    assert printed.exit_code == 0
    path = tmp_path / "run.toml"
    path.write_text(printed.stdout)
    assert probe(configured, "--config", str(path), "--print-config").stdout == printed.stdout
    assert probe(configured, "--events", "x", "--config", str(path)).stdout.startswith("x 32 ")


def test_unknown_config_key_is_bad_configuration_and_names_the_nearest(probe: Callable[..., Result]) -> None:
    result = probe(configured, "--events", "x", "--set", "student.batch_row=32")
    assert result.exit_code == 2
    assert "batch_rows" in result.stderr


def test_output_folder_is_created_or_named(probe: Callable[..., Result], tmp_path: Path) -> None:
    @click.command()
    @output_option()
    def command(out: Path) -> None:
        click.echo(out.is_dir())

    assert probe(command, "--out", str(tmp_path / "a" / "b")).stdout == "True\n"
    assert list((tmp_path / "a" / "b").iterdir()) == [], "the check leaves nothing behind"
    (tmp_path / "file").touch()
    refused = probe(command, "--out", str(tmp_path / "file" / "b"))
    assert refused.exit_code == 1
    assert f"{tmp_path / 'file' / 'b'} is not writable" in refused.stderr
    assert "--out" in refused.stderr


def test_read_only_output_folder_is_refused(probe: Callable[..., Result], tmp_path: Path) -> None:
    @click.command()
    @output_option()
    def command(out: Path) -> None:
        click.echo("started")

    # Permission bits do not bind root; /proc does, as a read-only mount would.
    folder = "/proc" if os.geteuid() == 0 else str(tmp_path)
    tmp_path.chmod(0o500)
    result = probe(command, "--out", folder)
    tmp_path.chmod(0o700)
    assert result.exit_code == 1
    assert f"{folder} is not writable" in result.stderr
    assert result.stdout == ""


def test_as_of_is_milliseconds_of_an_absolute_time(probe: Callable[..., Result]) -> None:
    @click.command()
    @as_of_option()
    def command(as_of: int | None) -> None:
        click.echo(repr(as_of))

    assert probe(command).stdout == "None\n"
    # 2025-03-01T00:00:00Z is day 20,148 since the epoch.
    assert probe(command, "--as-of", "2025-03-01T00:00:00Z").stdout == f"{20_148 * 86_400_000}\n"
    assert probe(command, "--as-of", "2025-03-01T02:00:00+02:00").stdout == f"{20_148 * 86_400_000}\n"


@pytest.mark.parametrize("text", ["2025-03-01T00:00:00", "2025-03-01", "yesterday", "1740787200000"])
def test_as_of_without_a_time_zone_or_no_time_is_bad_usage(probe: Callable[..., Result], text: str) -> None:
    @click.command()
    @as_of_option(required=True)
    def command(as_of: int) -> None:
        click.echo(as_of)

    result = probe(command, "--as-of", text)
    assert result.exit_code == 2
    assert text in result.stderr


def test_times_before_the_epoch_keep_their_milliseconds() -> None:
    assert parse_utc_ms("1969-12-31T23:59:59.999Z") == -1


def test_bootstrap_servers_come_from_the_option_or_the_environment(
    probe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    @bootstrap_option
    def command(bootstrap_servers: str | None) -> None:
        click.echo(bootstrap_servers)

    monkeypatch.setenv("CTRSTREAM_BOOTSTRAP_SERVERS", "one:1")
    assert probe(command).stdout == "one:1\n"
    assert probe(command, "--bootstrap-servers", "two:2").stdout == "two:2\n"
