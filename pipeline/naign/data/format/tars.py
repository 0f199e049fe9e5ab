"""All tars of a data set: each is read once, by threads or processes, and they are compared with one another."""

from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace

from joblib import Parallel, cpu_count, delayed
from tqdm import tqdm

from naign.data.format.survey import Inspect, Summary, summarize
from naign.errors import InputError, Unavailable
from naign.storage.base import Store
from naign.storage.store import open_store

THREADS = 8  # tars read at once: the stream of one hardly fills a fast network
PROCESSES = 32  # at most, one a core; each takes a second to start
MUCH = 256 << 20  # bytes of tars from which on processes read them: threads share the interpreter's lock
IDLE = 5  # seconds after which a process without work ends; one whose parent was killed does so half a minute later

KEPT = ".indexing.json"  # ends the names of summaries' files, which exist until index.json does
PROBLEMS = 20  # how many problems a message lists


class Problems(InputError):
    """The problems of a data set; the message lists the first of them."""

    def __init__(
        self,
        path: str,
        problems: list[str],
        note: str = "",
    ) -> None:
        text = f"{path}: {len(problems)} problems"
        for problem in problems[:PROBLEMS]:
            text += f"\n  {problem}"
        if len(problems) > PROBLEMS:
            text += f"\n  and {len(problems) - PROBLEMS} more"
        super().__init__(f"{text}\n{note}".rstrip())
        self.problems = problems


def read_tars(
    store: Store,
    names: list[str],
    inspect: Inspect,  # of each sample
    *,
    size: int,  # bytes of all of them, about
    title: str,  # of the bar on stderr; "": none
    keep: Store | None = None,  # where summaries are kept for the next call, which reads only the others
    version: str = "",  # what `inspect` does: summaries that were kept of another version are not used
) -> list[Summary]:
    """The summary of every tar, in order. Raises InputError for a tar that is missing, if summaries are kept."""
    workers = THREADS
    backend = "threading"
    processes = min(cpu_count(), len(names), PROCESSES)
    if processes > 1 and size >= MUCH:
        workers = processes
        backend = "loky"
    # Paths, not stores: these know the sizes of many tars, and each task would be sent all of them.
    to = keep.path if keep else ""
    parallel = Parallel(workers, backend=backend, return_as="generator", idle_worker_timeout=IDLE)
    results = parallel(
        delayed(_summary)(
            store.path,
            name,
            inspect,
            to,
            version,
        )
        for name in names
    )
    shown = tqdm(
        results,
        desc=title,
        total=len(names),
        unit="tar",
        disable=None if title else True,  # None: where stderr is not a terminal
    )
    try:
        with closing(results):
            return list(shown)
    except BrokenProcessPool:
        killed = "a process that reads tars was killed, for its memory perhaps, or could not start"
        raise Unavailable(f"{killed}: try again; `naign index` continues with the tars not read yet") from None


def _summary(
    path: str,
    name: str,
    inspect: Inspect,
    to: str,
    version: str,
) -> Summary:
    """The summary of a tar, read, or else what an interrupted call kept in the folder `to`."""
    store = open_store(path)
    if not to:
        return replace(summarize(store, name, inspect), table=b"")  # which nobody needs then
    target = open_store(to)
    kept = f"{name.removesuffix('.tar')}{KEPT}"
    version = f"{name}, {store.version(name)}, {version}"
    if target.exists(kept):
        summary = Summary.parse(target.read(kept), version)
        if summary:
            return summary
    summary = summarize(store, name, inspect)
    if not summary.problems:
        target.put(kept, summary.dump(version))
    return summary


def compare(store: Store, summaries: list[Summary]) -> Summary:
    """What all tars hold together, with their problems: in single tars, and where they do not go together."""
    together = Summary()
    for summary in summaries:
        together.problems += summary.problems
        if summary.kind:
            seen = (summary.kind, summary.shape, summary.labels)
            together.add(seen, store.url(summary.shard.name))
    return together
