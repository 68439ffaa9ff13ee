"""Start-up check that the five packages come from one root.

Their names are generic (``models``, ``pipelines``), so another distribution or a stray folder on
``PYTHONPATH`` can shadow one of them. Running half of one tree and half of another would compute wrong
numbers in silence; refusing to start is cheaper.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import SetupError

PACKAGES = ("pipelines", "models", "calibration", "monitoring", "jobs")


def package_root(name: str) -> Path | None:
    """Find the folder that holds a top-level package, without importing it.

    Parameters
    ----------
    name : str
        Name of a top-level package.

    Returns
    -------
    Path or None
        The folder that contains the package's folder; None where the package cannot be found.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).resolve().parent.parent


def check_one_root(packages: tuple[str, ...] = PACKAGES) -> Path:
    """Check that all packages lie side by side in the folder that this file was loaded from.

    Parameters
    ----------
    packages : tuple of str
        Names of the top-level packages.

    Returns
    -------
    Path
        The common root.

    Raises
    ------
    SetupError
        If a package is missing or comes from another folder.

    Examples
    --------
    >>> check_one_root() == Path(__file__).resolve().parent.parent
    True
    """
    expected = Path(__file__).resolve().parent.parent
    strangers = [(name, root) for name in packages if (root := package_root(name)) != expected]
    if strangers:
        found = ", ".join(f"{name} from {root or 'nowhere'}" for name, root in strangers)
        raise SetupError(
            f"expected the packages {', '.join(packages)} under one root, {expected}. Found {found}.",
            hint="run in an environment of its own (`make setup`), with PYTHONPATH unset",
        )
    return expected
