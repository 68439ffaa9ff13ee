"""The file that ``spark-submit`` is given to run: the command line, on the Spark that it has started.

``spark-submit OPTIONS $(ctrstream spark-entry) samples build ...``, see docs/cluster.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

__all__ = ["command"]


@click.command("spark-entry")
@click.option("--jars", is_flag=True, help="Print the jars of the Kafka connector instead, for its --jars.")
def command(jars: bool) -> None:
    """Print the file that spark-submit is given to run any command on a cluster.

    As in `spark-submit --master yarn $(ctrstream spark-entry) samples build ...`.
    """
    if jars:
        from jobs.jars import resolve

        click.echo(",".join(str(jar) for jar in sorted(resolve("spark-kafka").glob("*.jar"))))
    else:
        click.echo(Path(__file__).resolve())


def _run() -> None:
    here = Path(__file__).resolve().parent
    # The folder of a script is on the path, where our modules would hide others' of the same name.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    if (here / "cli.py").is_file():  # not alone, as where a cluster's manager has copied it to
        sys.path.insert(0, str(here.parent))
    from jobs.cli import main

    main()


if __name__ == "__main__":
    _run()
