"""The main job: `accelerate launch pipeline/train.py [--config FILE] [--section.key=value ...]`.

Exit codes: 0 done, 2 bad configuration or input, 75 stopped on request after a checkpoint, 76 another rank is gone,
anything else a crash.
"""

import os
import signal
import sys
import traceback
from pathlib import Path


def note(code: int) -> None:
    """Tell `naign launch` how this rank ends."""
    if folder := os.environ.get("NAIGN_ENDINGS"):
        (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(str(code))


def leave(code: int) -> None:
    """End now: the interpreter's own end is held up by a thread that waits for a store, and aborts under gloo's."""
    note(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(_number, lambda *_: leave(75))  # until training listens itself there is nothing to keep

# Run as a script, this file's own folder comes first on the path, where `data` or `match` would hide libraries' names.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

from pipeline.config import parse  # noqa: E402
from pipeline.data.dataset import DataConfig  # noqa: E402
from pipeline.data.format.writer import pack  # noqa: E402
from pipeline.data.sources.catalog import load  # noqa: E402
from pipeline.distributed.ranks import (  # noqa: E402
    build_accelerator,
    keep_memory,
    peers_missed,
    set_threads,
    together,
    warn_of_others,
)
from pipeline.errors import FAILED, INTERRUPTED, InputError, exit_on_input_error  # noqa: E402
from pipeline.storage.store import open_store, use_endpoint  # noqa: E402
from pipeline.training.loop import train  # noqa: E402


def main() -> None:
    try:
        run()
    except SystemExit as error:
        if error.code:
            leave(error.code if isinstance(error.code, int) else FAILED)
    except BaseException:
        traceback.print_exc()
        leave(FAILED)


def run() -> None:
    with exit_on_input_error("train"), peers_missed():
        config = parse(sys.argv[1:])
        use_endpoint(config.data.endpoint)
        keep_memory()
        set_threads(config.train.threads)
        settings = config.train
        accelerator = build_accelerator(settings.timeout, precision=settings.precision, accumulate=settings.accumulate)
        with together(accelerator):
            if accelerator.is_main_process:
                pack_missing(config.data, sys.argv[1:])
                if accelerator.device.type == "cpu":
                    warn_of_others()
        finished = train(config, accelerator)
        accelerator.end_training()
    if accelerator.is_main_process and finished:
        place = config.run.remote or config.run.path
        print(f"done: the run lies in {place}; measure it with: naign evaluate {place}")
    if not finished:
        leave(INTERRUPTED)
    note(0)


def pack_missing(data: DataConfig, words: list[str]) -> None:
    """Fetch and pack what data.source names, where data.path holds no data set yet.

    A configuration file's source belongs to its path: InputError where the words of the command give another path.
    """
    source = data.source or ("mnist" if data.path == DataConfig().path else "")
    if source and not open_store(data.path).exists("index.json"):
        given = {word.partition("=")[0] for word in words}
        if data.source and "--data.path" in given and "--data.source" not in given:
            raise InputError(
                f"{data.path}: no data set here, check --data.path; or pack one there, as with "
                f"naign pack {source} --to {data.path}"
            )
        print(f"no data at {data.path} yet: packing it, as `naign pack {source} --to {data.path}` does", flush=True)
        pack(load(source), data.path)


if __name__ == "__main__":
    main()
