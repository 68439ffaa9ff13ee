"""MLflow, thinly: the only module that imports it.

A run belongs to a *key*, so that a worker that is started again goes on with its run. Everything here can be
sent twice without harm: metric points are the same points, a release is registered once, aliases are moved
to where they are. That is what lets `jobs.tracking_outbox` repeat after a crash.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.release_manifest import Manifest
from pipelines.errors import ConfigError, DataError, StaleStateError, TransientError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["ALIASES", "Metric", "Run", "Tracking", "flatten"]

log = logging.getLogger(__name__)

Metric = tuple[str, float, int, int]  # key, value, step, timestamp (event time, ms)
ALIASES = ("champion", "challenger", "teacher", "last_good")

KEY_TAG = "ctrstream.key"
RELEASE_TAG = "release"
DIGEST_TAG = "digest"
_NOTE_TAG = "mlflow.note.content"
# The kind of the experiment. MLflow's 3.17 page does not look at it where no view was chosen yet and opens
# its GenAI view, in which runs and charts are hard to find; the parameter chooses.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_TRAINING_VIEW = "?workflowType=machine_learning"
_SOURCE_TAGS = {"mlflow.source.name": "ctrstream", "mlflow.source.type": "LOCAL"}
# MLflow's own limits.
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_CUT = "\n\n(cut here: longer than MLflow keeps)"
# MLflow would repeat a failed request for four minutes; whoever calls us decides that here.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class Tracking:
    """One experiment on an MLflow server, and one registered model.

    Nothing is sent before the first call.

    Parameters
    ----------
    uri : str
        Address of the server, ``http://host:port``.
    experiment : str
        Name; created when missing.
    registered_model : str
        Name in the registry; created when missing.

    Raises
    ------
    ConfigError
        If the address is empty.
    """

    def __init__(self, uri: str, experiment: str, registered_model: str = "ctrstream") -> None:
        if not uri:
            raise ConfigError(
                "expected the address of an MLflow server. Received an empty one.",
                hint="set tracking.uri, as printed by `ctrstream tracking up`",
            )
        self.uri = uri
        self.experiment = experiment
        self.registered_model = registered_model
        self._connected: MlflowClient | None = None
        self._experiment_id = ""

    def experiment_id(self) -> str:
        """Id of the experiment, which is created when missing.

        Raises
        ------
        TransientError
            If the server does not answer.
        """
        if not self._experiment_id:
            client = self.client()
            with self.errors():
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    self._experiment_id = client.create_experiment(self.experiment, tags=_EXPERIMENT_TAGS)
                else:
                    self._experiment_id = str(found.experiment_id)
        return self._experiment_id

    def run(self, name: str, tags: Mapping[str, str] | None = None, key: str | None = None) -> Run:
        """The run of a key; made when there is none, and opened again when it was finished.

        Parameters
        ----------
        name : str
            What the page shows.
        tags : mapping, optional
            Set on the run.
        key : str, optional
            What it is found by; default `name`.

        Raises
        ------
        TransientError
            If the server does not answer.
        """
        key = name if key is None else key
        if "'" in key:
            raise ConfigError(f"the key of a run must hold no quote. Received: {key!r}.")
        experiment, client = self.experiment_id(), self.client()
        all_tags = {**_SOURCE_TAGS, **(tags or {}), KEY_TAG: key}
        with self.errors():
            found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            if not found:
                created = client.create_run(experiment, run_name=name, tags=all_tags)
                return Run(self, str(created.info.run_id))
            run = Run(self, str(found[0].info.run_id))
            if found[0].info.status != "RUNNING":
                client.update_run(run.run_id, status="RUNNING")
        run.set_tags(all_tags)
        return run

    def experiment_url(self) -> str:
        """Address of the page that lists the runs and charts their metrics together."""
        return f"{self.uri}/#/experiments/{self.experiment_id()}/runs{_TRAINING_VIEW}&compareRunsMode=CHART"

    def run_url(self, run_id: str, tab: str = "") -> str:
        """Address of a run's page, or of one of its tabs: ``model-metrics``, ``artifacts``."""
        page = f"{self.uri}/#/experiments/{self.experiment_id()}/runs/{run_id}"
        return f"{page}/{tab}{_TRAINING_VIEW}" if tab else page + _TRAINING_VIEW

    def model_url(self) -> str:
        """Address of the registered model's page."""
        return f"{self.uri}/#/models/{self.registered_model}{_TRAINING_VIEW}"

    def is_up(self) -> bool:
        """Whether the server answers a query now."""
        client = self.client()
        try:
            with self.errors():
                client.search_experiments(max_results=1)
        except TransientError:
            return False
        return True

    def client(self) -> MlflowClient:
        """MLflow's own client, imported and made at the first call."""
        if self._connected is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            _bypass_proxy(self.uri)
            from mlflow import MlflowClient

            self._connected = MlflowClient(self.uri, registry_uri=self.uri)
        return self._connected

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn MLflow's errors into ours.

        Raises
        ------
        TransientError
            If the server does not answer, is too busy or fails: trying again can help.
        DataError
            If it refuses what was sent.
        """
        import requests
        from mlflow.exceptions import MlflowException

        try:
            yield
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 500)
            raise _as_ours(self.uri, status, str(error)) from error
        except MlflowException as error:
            status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
            raise _as_ours(self.uri, status, str(error.message)) from error


class Run:
    """One run. Made by `Tracking.run`. Every method raises ``TransientError`` if the server is away.

    Attributes
    ----------
    run_id : str
    """

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.tracking = tracking
        self.run_id = run_id

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Send metric points; what is not finite is left out, as MLflow's charts break on it.

        Parameters
        ----------
        rows : sequence of (key, value, step, timestamp)
            ``step`` is the window's index and ``timestamp`` event time in ms, so a replay sends the same
            points. The part of ``key`` before the first slash becomes a section of charts.
        """
        from mlflow.entities import Metric as Point

        points = [
            Point(key, float(value), int(timestamp), int(step))
            for key, value, step, timestamp in rows
            if math.isfinite(value)
        ]
        client = self.tracking.client()
        for start in range(0, len(points), _METRICS_PER_BATCH):
            with self.tracking.errors():
                client.log_batch(self.run_id, metrics=points[start : start + _METRICS_PER_BATCH])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters, nested ones as ``section.key``. MLflow keeps the first value of each.

        A value that differs from the one that is kept is left out, and logged.
        """
        from mlflow.entities import Param

        client = self.tracking.client()
        with self.tracking.errors():
            kept = client.get_run(self.run_id).data.params
            wanted = {key: str(value)[:_PARAM_LENGTH] for key, value in flatten(params).items()}
            for key, value in wanted.items():
                if kept.get(key, value) != value:
                    log.warning("the run keeps %s = %s; the new value %s is left out.", key, kept[key], value)
            new = [Param(key, value) for key, value in wanted.items() if key not in kept]
            for start in range(0, len(new), _PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=new[start : start + _PARAMS_PER_BATCH])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a longer text than MLflow keeps is cut, visibly."""
        from mlflow.entities import RunTag

        pairs = [RunTag(key, _cut(str(value))) for key, value in tags.items()]
        if pairs:
            with self.tracking.errors():
                self.tracking.client().log_batch(self.run_id, tags=pairs)

    def note(self, markdown: str) -> None:
        """Set the description that the run's page shows first: the verdict table."""
        self.set_tags({_NOTE_TAG: markdown})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send a file.

        Raises
        ------
        DataError
            If there is no such file.
        """
        if not path.is_file():
            raise DataError(f"expected a file to send to MLflow. There is none at {path}.")
        with self.tracking.errors():
            self.tracking.client().log_artifact(self.run_id, str(path), folder or None)

    def log_artifacts(self, directory: Path, folder: str = "") -> None:
        """Send all files of a directory."""
        if not directory.is_dir():
            raise DataError(f"expected a directory to send to MLflow. There is none at {directory}.")
        with self.tracking.errors():
            self.tracking.client().log_artifacts(self.run_id, str(directory), folder or None)

    def log_figure(self, png: bytes, name: str) -> None:
        """Send a picture as ``figures/NAME.png``; the newest of a name is kept."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.png"
            path.write_bytes(png)
            self.log_artifact(path, "figures")

    def log_image(self, png: bytes, key: str, step: int, timestamp: int) -> None:
        """Send one picture of a series, which the page shows with a slider over the steps."""
        import numpy as np
        from PIL import Image

        # Through an array, because MLflow keeps the mode of a picture and its page cannot show all of them.
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        with self.tracking.errors():
            self.tracking.client().log_image(self.run_id, pixels, key=key, step=step, timestamp=timestamp)

    def register(self, release: Path, aliases: Sequence[str] = ()) -> str:
        """Register a release directory as a version of the registered model, and move aliases to it.

        1. Find the version of that release, by its name and digest; else
        2. send the directory to the run's artefacts, under ``releases/NAME``, and
        3. make the version, tagged with name and digest.
        4. Move the aliases.

        Parameters
        ----------
        release : Path
        aliases : sequence of str
            Of ``champion``, ``challenger``, ``teacher``, ``last_good``.

        Returns
        -------
        str
            The version.

        Raises
        ------
        StaleStateError
            If another release is registered under that name.
        DataError
            If there is no release at that path.
        """
        unknown = [alias for alias in aliases if alias not in ALIASES]
        if unknown:
            raise ConfigError(f"expected an alias of {', '.join(ALIASES)}. Received: {unknown[0]!r}.")
        manifest = Manifest.read(release)
        model, client = self.tracking.registered_model, self.tracking.client()
        with self.tracking.errors():
            version = self._registered(manifest)  # 1
            if version is None:
                folder = f"releases/{manifest.name}"
                self.log_artifacts(release, folder)  # 2
                version = client.create_model_version(  # 3
                    model,
                    # Not runs:/..., which the server itself cannot resolve when its page shows the files.
                    f"{client.get_run(self.run_id).info.artifact_uri}/{folder}",
                    self.run_id,
                    tags={RELEASE_TAG: manifest.name, DIGEST_TAG: manifest.digest, "kind": manifest.kind},
                    description=_describe(manifest),
                    await_creation_for=0,
                ).version
            for alias in aliases:  # 4
                client.set_registered_model_alias(model, alias, version)
        return str(version)

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self.tracking.errors():
            self.tracking.client().set_terminated(self.run_id, status)

    def _registered(self, manifest: Manifest) -> str | None:
        from mlflow.exceptions import MlflowException

        model, client = self.tracking.registered_model, self.tracking.client()
        try:
            client.create_registered_model(model, description=_MODEL_DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        query = f"name = '{model}' and tags.`{RELEASE_TAG}` = '{manifest.name}'"
        for version in client.search_model_versions(query, max_results=1):
            if version.tags[DIGEST_TAG] != manifest.digest:
                raise StaleStateError(
                    f"version {version.version} of {model} is another release named {manifest.name}: "
                    f"expected the digest {manifest.digest}, found {version.tags[DIGEST_TAG]}.",
                    hint="give each worker its own tracking.registered_model",
                )
            return str(version.version)
        return None


_MODEL_DESCRIPTION = (
    "Releases of ctrstream: model, feature spec and calibrator together. `champion` is served, `challenger` "
    "stands by, `teacher` is the model trained offline, `last_good` is what a rollback returns to."
)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters as one level, keys joined by dots.

    Examples
    --------
    >>> flatten({"labels": {"policy": "fnw"}, "seed": 17})
    {'labels.policy': 'fnw', 'seed': 17}
    """
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _bypass_proxy(uri: str) -> None:
    """A proxy that is set for the outside world cannot reach a server on our loopback address."""
    host = urlsplit(uri).hostname or ""
    if host in ("127.0.0.1", "::1", "localhost"):
        kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = f"{kept},{host}" if kept else host


def _cut(text: str) -> str:
    return text if len(text) <= _TAG_LENGTH else text[: _TAG_LENGTH - len(_CUT)] + _CUT


def _as_ours(uri: str, status: int, message: str) -> TransientError | DataError:
    text = message if len(message) <= 500 else message[:500] + " ..."
    if status >= 500 or status in (408, 429):
        return TransientError(f"MLflow at {uri} does not answer as it should: {text}", hint="is it up?")
    return DataError(f"MLflow at {uri} refused what was sent ({status}): {text}")


def _describe(manifest: Manifest) -> str:
    tasks = ", ".join(f"{task} ({entry.model})" for task, entry in manifest.tasks.items())
    rows = {
        "tasks": tasks,
        "parent": f"`{manifest.parent}`" if manifest.parent else "none",
        "events learned": f"{manifest.learned_events:,}",
        "newest event learned (ms)": manifest.last_event_time,
        "calibration segments": ", ".join(manifest.segments) or "none",
        "feature spec": f"`{manifest.feature_spec_digest[:16]}`",
        "digest": f"`{manifest.digest[:16]}`",
    }
    # The list of versions shows the first line only.
    table = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{manifest.name}\n\n{table}"
