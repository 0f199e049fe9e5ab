"""Trackers, to which a run reports: files in its folder, Accelerate's trackers, and those of other packages.

Another package adds a tracker by an entry point of the group `naign.trackers`, a pair (settings dataclass or None,
build) like those in TRACKERS (docs/tracking.md); `accelerated` makes one of a subclass of Accelerate's GeneralTracker.
"""

import json
import logging
import math
import os
import ssl
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor

from naign.errors import InputError, one_line
from naign.settings.budget import count_rounds
from naign.settings.registry import listed, lookup
from naign.storage.local import write_atomically

STATUS_SERVER = "KUBEFLOW_TRAINER_SERVER"  # of the variables with which Kubeflow Trainer asks for a TrainJob's status

log = logging.getLogger("naign.monitor")


class Tracker(Protocol):
    """Receives the reports of a run. Every series is over images seen, so that runs of any batch size share an axis."""

    def configuration(self, settings: dict[str, bool | int | float | str], text: str) -> None:
        """The run's settings by name (train.lr), and as YAML. Called once, before any report."""

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        """One point of each series; `counts` are the round and the step."""

    def histogram(self, name: str, values: Tensor, images_seen: int) -> None: ...

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None: ...

    def flush(self) -> None:
        """Write everything reported so far."""

    def close(self) -> None: ...


class JsonLines(Tracker):
    """metrics.jsonl, a JSON object per report with its finite values, and pictures as samples/NAME-IMAGES.png."""

    def __init__(self, settings: None, folder: Path, images_seen: int) -> None:
        self.folder, self.file = folder, folder / "metrics.jsonl"
        if self.file.exists():
            lines = self.file.read_text(errors="replace").splitlines()
            write_atomically(self.file, "".join(f"{line}\n" for line in lines if _seen(line) <= images_seen))

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other numbers
        entry = {"images_seen": images_seen, **counts, **finite, "time": round(time.time(), 3)}
        with self.file.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        file = picture_file(self.folder, name, images_seen)
        file.parent.mkdir(exist_ok=True)
        picture.save(file)


class TensorBoard:
    """Event files in tensorboard/. Accelerate's class cannot drop what a resumed run reports again."""

    def __init__(self, settings: None, folder: Path, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.images_seen = images_seen
        purge_step = images_seen + 1 if images_seen else None  # drops reports after the checkpoint
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        self.histogram, self.flush, self.close = self.board.add_histogram, self.board.flush, self.board.close

    def configuration(self, settings: dict[str, bool | int | float | str], text: str) -> None:
        self.board.add_text("config", f"```yaml\n{text}\n```", self.images_seen)

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, images_seen)

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        self.board.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")


class TrainJob(Tracker):
    """Progress, remaining seconds and metrics in the status of a Kubeflow TrainJob, at most every EVERY seconds.

    Trainer 2.2 sets the address, and the files of a token that changes and of a certificate, in the variables
    KUBEFLOW_TRAINER_SERVER_*, where its feature TrainJobStatus is on (kubeflow/trainer, docs/proposals/2779).
    """

    EVERY = 10.0

    def __init__(self, settings: None, folder: Path, images_seen: int) -> None:
        names = (f"{STATUS_SERVER}_{name}" for name in ("URL", "TOKEN", "CA_CERT"))
        self._url, self._token, certificate = (os.environ[name] for name in names)
        self._trusted = ssl.create_default_context(cafile=certificate)
        self._rounds, self._first, self._sent, self._failing = 0, (0, 0.0), -math.inf, False

    def configuration(self, settings: dict[str, bool | int | float | str], text: str) -> None:
        self._rounds = count_rounds(settings)

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        done, now = counts["round"] + 1, time.monotonic()
        left, (first, since) = self._rounds - done, self._first
        if not first:
            self._first = done, now
        if left and now < self._sent + self.EVERY:
            return
        finite = [(name, value) for name, value in values.items() if math.isfinite(value)][:256]
        status: dict[str, Any] = {"progressPercentage": min(100, 100 * done // self._rounds)}
        if 0 < first < done:
            status["estimatedRemainingSeconds"] = round(left * (now - since) / (done - first))
        status["metrics"] = [{"name": name[:64], "value": f"{value:.6g}"} for name, value in finite]
        status["lastUpdatedTime"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._sent = now
        try:
            head = {"Authorization": f"Bearer {Path(self._token).read_text().strip()}"}
            request = Request(self._url, json.dumps({"trainerStatus": status}).encode(), head)
            urlopen(request, timeout=self.EVERY, context=self._trusted).close()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("the status of this TrainJob cannot be updated: %s", one_line(error))
            self._failing = True


class Accelerated(Tracker):
    """A tracker of Accelerate, without histograms. A resumed run continues the one of the id in trackers/NAME."""

    def __init__(self, kind: type[Any], folder: Path) -> None:
        self.name, self.folder, file = kind.name, folder, folder / "trackers" / kind.name
        known = file.read_text().strip() if file.exists() else ""
        self.options = BEGIN[self.name](folder, known) if self.name in BEGIN else {}
        place = [str(folder)] if kind.requires_logging_directory else []
        self.tracker = kind("naign", *place, **self.options)
        self.tracker.start()
        if self.name in BEGIN:
            file.parent.mkdir(exist_ok=True)
            run = self.tracker.tracker
            write_atomically(file, str(run.id if self.name == "wandb" else run.info.run_id))

    def configuration(self, settings: dict[str, bool | int | float | str], text: str) -> None:
        if "run_id" not in self.options:  # a run in MLflow refuses changed parameters
            self.tracker.store_init_configuration(settings)

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        self.tracker.log({**counts, **values}, step=images_seen)

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        if self.name == "mlflow":
            self.tracker.log_artifact(str(picture_file(self.folder, name, images_seen)), "samples")
        elif hasattr(self.tracker, "log_images"):
            one = self.name in ("aim", "clearml")  # the others take lists
            self.tracker.log_images({name: picture if one else [picture]}, step=images_seen)

    def close(self) -> None:
        self.tracker.finish()


def begin_wandb(folder: Path, known: str) -> dict[str, Any]:
    """Options of wandb.init: offline without a login, and without capturing the output."""
    from requests.utils import get_netrc_auth  # wandb needs it, and looks a login up by it

    options = {"dir": str(folder), "name": folder.name, "id": known or None, "settings": {"console": "off"}}
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    login = os.environ.get("WANDB_API_KEY") or get_netrc_auth(server)
    mode = os.environ.get("WANDB_MODE") or ("online" if login else "offline")
    return options | ({"resume": "allow"} if mode == "online" else {"mode": mode})


def begin_mlflow(folder: Path, known: str) -> dict[str, Any]:
    """Options of MLflow's run: on the server of MLFLOW_TRACKING_URI, or in an SQLite file in the run's folder."""
    options = {"run_name": folder.name}
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else it logs how it creates its tables
        import mlflow

        place = (folder / "mlflow").absolute()
        known = known if place.exists() else ""  # a run fetched from a bucket has the id without the data
        place.mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
        options["logging_dir"] = str(place)  # of artifacts
    return {**options, **({"run_id": known} if known else {})}


BEGIN = {"wandb": begin_wandb, "mlflow": begin_mlflow}
"""Options with which a run starts in a tracker, or continues the one whose id is known."""

Build = Callable[[Any, Path, int], Tracker]
"""Returns a tracker, from its settings (the defaults), the run's folder and the images seen when the run resumes."""

TRACKERS: dict[str, tuple[type | None, Build]] = {"jsonl": (None, JsonLines), "tensorboard": (None, TensorBoard)}
"""Trackers that write to the run's folder and without which a run fails; all others may fail."""

NEEDS = {"mlflow": (("mlflow", "sqlalchemy", "alembic"), "mlflow-skinny sqlalchemy alembic")}  # its SQLite file
"""Modules and packages that a tracker needs, where these are not of its name."""


def accelerated(kind: type[Any]) -> Build:
    """A build for a subclass of Accelerate's GeneralTracker; it takes the project's name, and a folder if it asks."""
    return lambda settings, folder, images_seen: Accelerated(kind, folder)  # type: ignore[abstract]


def find_trackers(names: str) -> dict[str, tuple[type | None, Build]]:
    """The trackers of report.trackers, names with commas between them. Raises InputError for an unknown one."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    theirs = {name: (None, accelerated(kind)) for name, kind in LOGGER_TYPE_TO_CLASS.items() if name not in TRACKERS}
    trackers = {}
    for name in ("jsonl", *listed(names)):
        trackers[name] = lookup("report.trackers", name, TRACKERS | theirs, "naign.trackers")
        modules, packages = NEEDS.get(name, ((name,), name))
        if name in theirs and not all(map(find_spec, modules)):
            raise InputError(f"report.trackers is '{name}', which is not installed: pip install {packages}")
    return trackers | ({"trainjob": (None, TrainJob)} if f"{STATUS_SERVER}_URL" in os.environ else {})


def picture_file(folder: Path, name: str, images_seen: int) -> Path:
    return folder / "samples" / f"{name}-{images_seen:010d}.png"


def _seen(line: str) -> float:
    """Images learned from at a line of metrics.jsonl; infinite for one cut short by a kill, so that it is dropped."""
    try:
        entry = json.loads(line)
        return float(entry["images_seen"]) + float(entry.get("codes_seen", 0))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
