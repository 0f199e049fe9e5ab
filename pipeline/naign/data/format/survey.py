"""What is learned of tars by reading every byte of them: their page tables, and what their samples are."""

from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from joblib import Parallel, cpu_count, delayed

from naign.data.decode import decode_image, header_shape, read_npy
from naign.data.format import IndexOptions
from naign.data.format.labels import label_text, parse_number
from naign.data.format.manifest import CHANNELS, FORMS, Shard
from naign.data.format.pages import TAR_BLOCK, Pager
from naign.data.format.webdataset import scan
from naign.data.sample import find_suffix
from naign.errors import InputError, Unavailable, require
from naign.storage.store import open_store
from naign.terminal import counted

THREADS = 8  # tars read at once: the stream of one hardly fills a fast network
PROCESSES = 32  # at most, one a core; each takes a second to start
MUCH = 256 << 20  # bytes of tars from which on processes read them: threads share the interpreter's lock
IDLE = 5  # seconds after which a process without work ends; one whose parent was killed does so half a minute later

KINDS = dict(zip(FORMS.values(), FORMS, strict=True))
MOST_LABELS = 1_000_000  # a larger number in .cls is not a label, and more texts are not classes
PROBLEMS = 20  # how many problems a message lists

Form = tuple[str, tuple[int, ...]]  # kind and shape of a sample


def check_problems(path: str, problems: list[str]) -> None:
    """Raise InputError that lists the first of the problems of a data set, if there is one."""
    if not problems:
        return
    lines = problems[:PROBLEMS]
    if len(problems) > PROBLEMS:
        lines.append(f"and {len(problems) - PROBLEMS} more")
    raise InputError("\n  ".join([f"{path}: {len(problems)} problems", *lines]))


@dataclass(kw_only=True)
class Summary:
    """What was read of one tar."""

    shard: Shard
    table: bytes = b""  # the file of its page table
    forms: set[Form] = field(default_factory=set)  # of its samples
    labels: set[str] = field(default_factory=set)  # as they are written
    broken: dict[str, str] = field(default_factory=dict)  # keys of samples that cannot be used, and why
    problems: list[str] = field(default_factory=list)


def common_form(forms: set[Form]) -> Form:
    """The kind and shape of all samples: (C, 0, 0) where sizes vary. Raises InputError where kinds or points differ."""
    kinds = {kind for kind, _ in forms}
    shapes = {shape for _, shape in forms}
    alike = len(kinds) == 1 and (kinds == {"image"} or len(shapes) == 1)
    some = ", ".join(f"{kind} {shape}" for kind, shape in sorted(forms)[:PROBLEMS])
    require((alike, f"samples of several forms, or none that can be decoded: {some}: repack the data set"))
    channels = max(shape[0] for shape in shapes)  # grey ones are read as colour among others
    sizes = {shape[1:] for shape in shapes}
    size = sizes.pop() if len(sizes) == 1 else (0, 0)
    return kinds.pop(), (channels, *size)


def read_tars(
    path: str,  # folder or bucket
    names: list[str],
    options: IndexOptions,
    *,
    size: int,  # bytes of all of them, about
) -> list[Summary]:
    """The summary of every tar, in order: each is read once, by threads or processes."""
    workers = THREADS
    backend = "threading"
    processes = min(cpu_count(), len(names), PROCESSES)
    if processes > 1 and size >= MUCH:
        workers = processes
        backend = "loky"
    parallel = Parallel(workers, backend=backend, return_as="generator", idle_worker_timeout=IDLE)
    results = parallel(delayed(_summarize)(path, name, options) for name in names)
    shown = counted(
        f"index {path}",
        results,
        total=len(names),
        unit="tar",
    )
    try:
        with closing(results):
            return list(shown)
    except BrokenProcessPool:
        killed = "a process that reads tars was killed, for its memory perhaps, or could not start"
        raise Unavailable(f"{killed}: try again") from None


def _summarize(path: str, name: str, options: IndexOptions) -> Summary:
    """Read every byte of a tar. What is wrong with it, or with single samples, is in `problems` and `broken`."""
    store = open_store(path)
    where = store.url(name)
    pager = Pager()
    summary = Summary(shard=Shard(name=name, samples=0, bytes=0, pages=""))
    try:
        for number, sample in enumerate(scan(store, name, pager)):
            key = sample["__key__"]
            try:
                form, label = _inspect(sample, f"{where}, key {key}", number, options)
            except InputError as error:
                summary.broken[key] = str(error)
                continue
            summary.forms.add(form)
            if label is not None:
                summary.labels.add(label)
        _check_end(pager, where)
        summary.shard, summary.table = pager.shard(name)
    except InputError as error:  # missing, or not a tar from some byte on
        summary.problems.append(str(error))
    return summary


def _inspect(
    sample: dict[str, Any],
    where: str,
    number: int,  # in its tar
    options: IndexOptions,
) -> tuple[Form, str | None]:
    """Form and label, if there is one, of a sample of any data set. Raises InputError if it cannot be used."""
    suffix = find_suffix(sample, "image", where, "is this an image data set?")
    data = sample[suffix]
    kind = "image"
    try:
        if suffix == "npy":
            array = read_npy(data)
            shape = array.shape
            kind = KINDS.get((str(array.dtype), array.ndim), "")
        elif options.sample_check is None or number < options.sample_check:
            shape = decode_image(data).shape
        else:
            shape = header_shape(data)
    except InputError as error:
        remedy = "repack the data set, or index it with --keep-broken and train with --data.broken=skip"
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): {remedy}") from None
    if not kind or (kind == "image" and shape[0] not in CHANNELS):
        wanted = "images are uint8 (1 or 3, H, W), points float32 (D,)"
        raise InputError(f"{where}: the .npy is {array.dtype} of {shape}, but {wanted}: repack the data set")
    text = label_text(sample, options.label, where)
    if text is not None and not options.label and not 0 <= parse_number(text) < MOST_LABELS:
        what = f"label {text[:20]!r} is not a number below {MOST_LABELS}, as in .cls"
        raise InputError(f"{where}: {what}: say where labels are with --label, or repack the data set")
    return (kind, shape), text


def _check_end(pager: Pager, where: str) -> None:
    """Raise InputError for what is wrong with the end of a tar."""
    if not pager.samples:
        raise InputError(f"{where}: holds no samples: remove it")
    rest = pager.get(pager.after, pager.size)
    if len(rest) < 2 * TAR_BLOCK:  # cut between two samples it reads as if whole
        raise InputError(f"{where}: ends in the middle: no end-of-archive mark: copy it again")
    if rest.strip(b"\0"):
        what = "no tar, or more data behind the end of the archive, as of tars laid end to end"
        raise InputError(f"{where}: from byte {pager.after} on {what}: copy it again, or repack it")
