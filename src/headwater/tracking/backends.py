"""The trackers themselves, by way of accelerate's; the only module that imports any of them.

Each has its files below RUN/trackers, unless the environment says where they go (WANDB_MODE,
TRACKIO_DIR, TRACKIO_SPACE_ID, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from headwater.config.tracking import Tracker
from headwater.errors import InputError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

#: Where runs of every study go together; WANDB_PROJECT names another.
_PROJECT = "headwater"
_EXTRA = "pip install 'headwater[track]'"
_INIT_SECONDS = 30.0  # for a server to answer when a run is opened
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_", "OMPI_COMM_", "MV2_COMM_")
#: What the user's environment says, before anything here adds to it.
_USERS = frozenset(os.environ)


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """One run of a tracker: a stage, or what an arm came to.

    study: its group; kind: of stage, or "results". config: plain values, by dotted names.
    """

    study: str
    name: str
    kind: str
    tags: tuple[str, ...]
    config: Mapping[str, str | int | float | bool | None]


class OpenTracker:
    """One run of one tracker, open in the thread that made it. Raises whatever its library does.

    id: what opens the same run again.
    """

    def __init__(self, tracker: GeneralTracker, run_id: str) -> None:
        tracker.main_process_only = False  # else it asks torch.distributed who is the main process
        tracker.start()
        self._tracker = tracker
        self.id = run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values of one step."""
        self._tracker.log(dict(values), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Rows with the same keys, where the tracker takes tables."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Values of the run as a whole."""
        self.log(values, step=0)

    def finish(self) -> None:
        """Send what is left, and close."""
        self._tracker.finish()


class _TensorBoard(OpenTracker):
    def __init__(self, run: TrackedRun, folder: Path, known: str | None) -> None:
        from accelerate.tracking import TensorBoardTracker

        super().__init__(TensorBoardTracker(run.name, folder / "tensorboard"), run.name)
        if known is None:
            text = "\n".join(f"    {name}: {value}" for name, value in run.config.items())
            self._tracker.log({"config": text}, step=0)


class _WandB(OpenTracker):
    def __init__(self, run: TrackedRun, folder: Path, known: str | None) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        run_id = known or secrets.token_hex(6)
        quiet = wandb.Settings(
            silent=True,
            console="off",  # our own streams are not theirs to record
            disable_git=True,  # a remote's address may hold a token
            disable_code=True,
            x_disable_stats=True,
            init_timeout=_INIT_SECONDS,
        )
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id,
            name=run.name,
            group=run.study,
            job_type=run.kind,
            tags=list(run.tags),
            config=dict(run.config),
            dir=folder,
            resume="allow",
            reinit="create_new",
            settings=quiet,
        )
        super().__init__(tracker, run_id)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = list(rows[0])
        data = [list(row.values()) for row in rows]
        self._tracker.log_table(name, columns=columns, data=data, step=step)

    def summarise(self, values: Mapping[str, float]) -> None:
        self._tracker.tracker.summary.update(dict(values))


class _Trackio(OpenTracker):
    def __init__(self, run: TrackedRun, folder: Path, known: str | None) -> None:
        from accelerate.tracking import TrackioTracker
        from trackio.utils import TRACKIO_DIR

        own = folder / "trackio"
        if "TRACKIO_DIR" not in _USERS and own != TRACKIO_DIR:
            raise InputError(
                f"trackio writes to {TRACKIO_DIR} since it was imported, expected {own}; start a "
                "process for each run, or set TRACKIO_DIR"
            )
        name = known or f"{run.name}/{secrets.token_hex(3)}"
        tracker = TrackioTracker(
            _PROJECT,
            name=name,
            group=run.study,
            config={**run.config, "kind": run.kind, "tags": ", ".join(run.tags)},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        super().__init__(tracker, name)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import trackio

        table = trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._tracker.log({name: table}, step=step)


class _MLflow(OpenTracker):
    def __init__(self, run: TrackedRun, folder: Path, known: str | None) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        if "MLFLOW_TRACKING_URI" not in _USERS:
            mlflow.set_tracking_uri((folder / "mlflow").as_uri())
        tags = {"study": run.study, "kind": run.kind, "tags": ", ".join(run.tags)}
        tracker = MLflowTracker(run.study, run_id=known, run_name=run.name, tags=tags)
        super().__init__(tracker, "")
        self.id = str(tracker.tracker.info.run_id)
        if known is None:
            tracker.store_init_configuration(dict(run.config))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import mlflow

        data = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        mlflow.log_dict(data, f"{name}/step-{step:06d}.json")


_TRACKERS: Mapping[Tracker, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}


def open_tracker(name: Tracker, run: TrackedRun, folder: Path, known: str | None) -> OpenTracker:
    """Open a run of a tracker, or go on with the one of the id `known`.

    folder: RUN/trackers, absolute. Raises whatever the tracker's library does.
    """
    opened: OpenTracker = _TRACKERS[name](run, folder, known)
    return opened


def require_trackers(names: Sequence[Tracker]) -> None:
    """Raise InputError where a tracker's package is missing, or wandb would ask for a login."""
    for name in names:
        for package in ("accelerate", name):
            spec = find_spec(package)
            if spec is None or spec.origin is None:  # no origin: a folder that is called so
                raise InputError(
                    f"report_to: {name}: the package {package} is not installed; expected it to be "
                    f"there before anything is trained: {_EXTRA}, or leave {name} out"
                )
    if "wandb" in names and not _wandb_can_start():
        raise InputError(
            "report_to: wandb: no login was found; expected one of `wandb login`, WANDB_API_KEY or "
            "WANDB_MODE=offline (to send later with `wandb sync`): set one, or leave wandb out"
        )


def prepare(names: Sequence[Tracker], folder: Path) -> None:
    """Import what the trackers need, in the main thread, before any is opened in another.

    folder: RUN/trackers, absolute.
    """
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # what it needs without a database
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # else minutes, to no avail
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with _not_a_rank():
        importlib.import_module("accelerate.tracking")
        importlib.import_module("accelerate.state").PartialState(cpu=True)
    for name in names:
        importlib.import_module(name)


def how_to_look(name: Tracker, folder: Path) -> str:
    """The command that shows what a tracker has, for a person."""
    return {
        "tensorboard": f"tensorboard --logdir {folder / 'tensorboard'}",
        "wandb": f"wandb sync {folder / 'wandb'}/offline-run-*"
        if _is_offline()
        else f"project {os.environ.get('WANDB_PROJECT', _PROJECT)} at "
        f"{os.environ.get('WANDB_BASE_URL', 'https://wandb.ai')}",
        "trackio": f"TRACKIO_DIR={os.environ.get('TRACKIO_DIR')} trackio show --project {_PROJECT}",
        "mlflow": "MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri "
        + os.environ.get("MLFLOW_TRACKING_URI", str(folder / "mlflow")),
    }[name]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; lists as JSON.

    >>> flat({"lr": 1e-3, "kl": {"kind": "forward"}, "layers": [0, 1]})
    {'lr': 0.001, 'kl.kind': 'forward', 'layers': '[0, 1]'}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            plain = value is None or isinstance(value, str | int | float)
            found[f"{prefix}{name}"] = value if plain else json.dumps(value)
    return found


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") != "online"


def _wandb_can_start() -> bool:
    """Whether wandb has a key, or needs none: in a thread of a run nobody can type one."""
    if _is_offline() or {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} & os.environ.keys():
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def _not_a_rank() -> Iterator[None]:
    """Without what torchrun or MPI told this process: accelerate would join their group."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if _tells_rank(name)}
    try:
        yield
    finally:
        os.environ.update(kept)


def _tells_rank(name: str) -> bool:
    return name.startswith(_RANK_VARIABLES)
