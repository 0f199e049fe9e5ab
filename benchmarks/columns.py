"""The numbers that tables of trained networks show, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from output import Record

KINDS = ("blur", "noise", "salt_pepper", "rows")
Get = Callable[[Record], float | None]
"""Takes the numbers of `naign evaluate`; None if they lack this one, as classes of unlabelled data."""


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a record."""

    title: str
    get: Get
    digits: int


def at(path: str, scale: float = 1.0) -> Get:
    """The number at a path with dots, times `scale`."""

    def get(record: Record) -> float | None:
        value = record
        for key in path.split("."):
            value = (value or {}).get(key)
        if value is None:
            return None
        return scale * float(value)

    return get


def of_modes(choose: Callable[[list[float]], float]) -> Get:
    """The share of samples, in percent, of the class that `choose` picks."""

    def get(record: Record) -> float | None:
        if not record["modes"]:
            return None
        return 100 * choose(record["modes"])

    return get


def per_10_000(part: str) -> Get:
    """Processor seconds of 10,000 samples."""

    def get(record: Record) -> float | None:
        cost = record.get("sampling") or {}
        if cost.get(part) is None:
            return None
        return cost[part] / cost["samples"] * 10_000

    return get


COLUMNS = {
    "once": Column("FD f(z), × floor", at("fd.once_ratio"), 1),
    "twice": Column("FD f(f(z)), × floor", at("fd.twice_ratio"), 1),
    "of_noise": Column("FD of f(noise), × floor", at("fd.noise_ratio"), 1),
    "recall_of_noise": Column("recall of f(noise)", at("coverage.noise.recall"), 2),
    "idempotence_of_noise": Column("idempotence of f(noise)", at("idempotence.noise"), 3),
    "second": Column("FD f(z), × floor, on a second encoder", at("second.once_ratio"), 1),
    "real": Column("FD of f(training images), × floor", at("fd.real_ratio"), 1),
    "second_real": Column("the same on a second encoder", at("second.real_ratio"), 1),
    "unlabelled": Column("FD f(z), × floor, on an encoder trained without labels", at("unlabelled.once_ratio"), 1),
    "unlabelled_real": Column("f(training images) there", at("unlabelled.real_ratio"), 1),
    "accuracy": Column("accuracy on test images of a classifier of f(z), %", at("accuracy", 100), 1),
    "accuracy_of_real": Column("of training images, %", at("accuracy_of_real", 100), 1),
    "parameters": Column("parameters, 10⁶", at("parameters", 1e-6), 2),
    "latents": Column("FD of z where f decodes it, × floor", at("fd.latents_ratio"), 1),
    "fd_once": Column("FD f(z)", at("fd.once"), 0),
    "fd_twice": Column("FD f(f(z))", at("fd.twice"), 0),
    "rarest": Column("rarest class, %", of_modes(min), 1),
    "commonest": Column("commonest, %", of_modes(max), 1),
    "reconstruction": Column("reconstruction", at("reconstruction"), 3),
    "idempotence": Column("idempotence", at("idempotence.samples"), 3),
    "upside_down": Column("upside down, AUROC", at("density.energy.upside down"), 3),
    "upside_down_twice": Column("of f twice", at("density.twice.upside down"), 3),
    "copying": Column("distance to training, × test's", at("nearest.ratio"), 2),
    "asked": Column("as asked, %", at("asked.share", 100), 1),
    "images": Column("images seen, 10³", at("images_seen", 1e-3), 0),
    "training": Column("training, processor s", at("cpu_seconds"), 0),
    "minutes": Column("core minutes", at("cpu_seconds", 1 / 60), 1),
    "sampling": Column("10,000 f(z), processor s", per_10_000("cpu_seconds"), 1),
    "latents_sampling": Column("10,000 z, processor s", per_10_000("latents_cpu_seconds"), 1),
}
for name in ("precision", "recall", "density", "coverage"):
    COLUMNS[name] = Column(name, at(f"coverage.{name}"), 2)
    COLUMNS[f"latents_{name}"] = Column(f"{name} of z", at(f"coverage.latents.{name}"), 2)
for name in KINDS:
    get_error = at(f"restoration.{name}.once")
    COLUMNS[name] = Column(name.replace("_", " "), get_error, 3)

KEPT = (
    "fd",
    "second",
    "modes",
    "asked",
    "coverage",
    "restoration",
    "density",
    "idempotence",
    "reconstruction",
    "nearest",
    "encoder",
    "images_seen",
    "training_seconds",
    "cpu_seconds",
    "sampling",
    "test_modes",
    "unlabelled",
    "accuracy",
    "accuracy_of_real",
    "parameters",
)
"""What tables keep of the numbers of `naign evaluate`."""


def kept(record: Record) -> Record:
    """A record without what tables do not use; that of a run that diverged as it is."""
    if "failed" in record:
        return record
    return {part: record[part] for part in KEPT if part in record}
