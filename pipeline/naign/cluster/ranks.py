"""The ranks of this host: the environment that an engine gives them, their start, and how they end."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import yaml

from naign import shipped
from naign.cluster.rejoin import Links
from naign.errors import InputError, Outcome, one_line, require
from naign.process import SIGNALS

AUDIT = "copies"  # a command of `naign` that ranks run instead of a training
MEANINGS: dict[int, str] = {
    Outcome.BAD_INPUT: "bad configuration or input, which is not tried again",
    Outcome.INTERRUPTED: "stopped on request; the same command goes on from the newest checkpoint",
    Outcome.PEER_LOST: "a rank, a host or stored data is lost; all go on from the newest checkpoint",
}
CRASHED = "crashed; see its last lines above"
WEIGHTS: dict[int, int] = {Outcome.DONE: 0, Outcome.INTERRUPTED: 0, Outcome.PEER_LOST: 1, Outcome.BAD_INPUT: 3}
CRASH_WEIGHT = 2
"""A host ends with its ranks' exit code of the largest weight."""

POSSIBLE = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP"),
    "mixed_precision": ("no", "bf16"),
    "gpu_ids": ("all",),
}
"""Values of a configuration of Accelerate with which training can start, the first if it is not given."""


def find_engine(name: str, precision: str = "", ranks: int = 2) -> dict[str, Any]:
    """A configuration of Accelerate: of the file `name`, of the file of that name in launch/, or, for '', of DDP with
    train.precision=`precision`. InputError for no such file, or one with which so many ranks cannot start.
    """
    if not name:
        from naign.distributed.host import count_gpus

        on_gpus = count_gpus() > 0  # DDP as in launch/gpus.yaml and launch/cpu.yaml, except that the precision decides
        mixed = "bf16" if on_gpus and not precision else "no"
        return {"distributed_type": "MULTI_GPU", "use_cpu": not on_gpus, "mixed_precision": mixed}
    for file in (Path(name), shipped(f"launch/{name}.yaml")):
        if os.path.isfile(file):
            try:
                return _read_engine(file, ranks)
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
                reason = one_line(error, 200)
                raise InputError(f"--engine {file} is not a configuration of Accelerate: {reason}") from None
    known = ", ".join(sorted(file.stem for file in shipped("launch").glob("*.yaml")))
    raise InputError(f"--engine {name} is neither a file nor a name in launch/: {known}")


def _read_engine(file: Path, ranks: int) -> dict[str, Any]:
    """The configuration in a file. Raises ValueError for one that cannot start, and what parsers raise."""
    text = file.read_text()
    config = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise ValueError("it has no distributed_type")
    for key, values in POSSIBLE.items():
        config[key] = config.get(key) or values[0]  # `no` without quotes is False in YAML
        if config[key] not in values:
            raise ValueError(f"{key} is {config[key]}: it must be one of {', '.join(values)}")
    if config["distributed_type"] == "NO" and ranks > 1:
        raise ValueError(f"distributed_type is NO, which starts one rank, and there are to be {ranks}")
    deepspeed = config.get("deepspeed_config") or {}
    if str(deepspeed.get("zero_stage", 2)) not in ("1", "2", "3"):
        raise ValueError(f"deepspeed_config.zero_stage is {deepspeed['zero_stage']}: it must be 1, 2 or 3")
    settings = deepspeed.get("deepspeed_config_file", "none")
    if settings != "none" and not os.path.isfile(settings):
        raise ValueError(f"deepspeed_config_file {settings}: no such file")
    return config


def environment_of(engine: Mapping[str, Any]) -> dict[str, str]:
    """The variables by which Accelerate learns of its configuration in a rank."""
    kind = engine["distributed_type"]
    variables = {
        "ACCELERATE_USE_CPU": str(bool(engine.get("use_cpu"))).lower(),
        "ACCELERATE_MIXED_PRECISION": engine["mixed_precision"],
        "OMP_NUM_THREADS": "1",  # a rank takes its share of the cores: train.threads
    }
    if kind == "FSDP":
        version = (engine.get("fsdp_config") or {}).get("fsdp_version", 1)
        variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(version)}
    if kind == "DEEPSPEED":
        settings = engine.get("deepspeed_config") or {}
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        variables["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(settings)
        variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"  # zero.py sets that of the run
        for key, value in settings.items():
            name = key.removeprefix("deepspeed_").removesuffix("_flag").upper()  # zero3_init_flag: ..._ZERO3_INIT
            variables[f"ACCELERATE_DEEPSPEED_{name}"] = value if isinstance(value, str) else str(value).lower()
    return variables


def require_gpus(wanted: int, processes: int, engine: Mapping[str, Any]) -> None:
    """InputError or Unavailable where there are fewer GPUs than --gpus=`wanted`, or than ranks that are to use them."""
    from naign.distributed.host import check_gpus, count_gpus

    check_gpus(f"--gpus {wanted}", wanted)
    must = engine["distributed_type"] in ("MULTI_GPU", "FSDP")  # DeepSpeed also runs on CPUs
    if not engine.get("use_cpu") and (must or count_gpus()):
        check_gpus(f"{processes} ranks on GPUs are to start here (on CPUs: --engine cpu)", processes)


def check_shares(config: Any, least: int, most: int, processes: int) -> None:
    """InputError where `least` to `most` hosts of so many ranks cannot all share a step and a group equally."""
    from naign.match.matcher import check_groups

    for hosts in range(least, most + 1):
        ranks = hosts * processes
        batch = config.train.batch
        remedy = "choose a multiple, and match.round a multiple of that; an existing run needs other numbers of hosts"
        require(
            (
                batch % (ranks * config.train.accumulate) == 0,
                f"train.batch={batch} cannot be shared by {ranks} ranks on {hosts} hosts: {remedy}",
            )
        )
        check_groups(config.match, ranks)


def command_of(arguments: Sequence[str]) -> list[str]:
    """The command line of a rank."""
    if arguments[:1] == [AUDIT]:
        return [sys.executable, "-m", "naign.cli", *arguments]
    return [sys.executable, str(shipped("pipeline/train.py")), *arguments]


def become_rank(engine: Mapping[str, Any], arguments: Sequence[str]) -> NoReturn:
    """Continue this process as the only rank of the training."""
    os.environ |= environment_of(engine)
    os.environ["NAIGN_LAUNCHER"] = str(os.getpid())  # it is its own, and does not end with a parent
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until training sets its handlers
    os.execv(sys.executable, command_of(arguments))


class Ranks:
    """This host's ranks under way. A context: none is left behind."""

    def __init__(
        self,
        arguments: Sequence[str],
        engine: Mapping[str, Any],
        links: Links,
        *,
        folder: Path,  # for the reasons of their ends
        count: int,  # on each host
        within: float,  # seconds that a rank may take to end
    ) -> None:
        self.within = math.ceil(within)
        self._killed: set[int] = set()  # ranks that this launcher killed
        self._asked: signal.Signals | None = None
        self._deadline = math.inf
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        world = links.hosts * count
        shared = {**os.environ, **environment_of(engine)}
        shared["NAIGN_LAUNCHER"] = str(os.getpid())  # so that ranks end with this process
        if links.generation > 1:
            shared["NAIGN_GENERATION"] = str(links.generation)  # started again: storage/network.py waits for access
        if world > 1 or engine["distributed_type"] == "DEEPSPEED":
            shared |= {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": links.address,
                "MASTER_PORT": str(links.port),
            }
        interface = links.interface()
        if interface:
            shared.setdefault("GLOO_SOCKET_IFNAME", interface)  # else that of the host's name, often 127.0.1.1
        for local in range(count):
            own = {"TORCHELASTIC_ERROR_FILE": str(folder / f"{local}.json")}  # as torchrun's: for the reason of its end
            if "WORLD_SIZE" in shared:
                own |= {"RANK": str(links.number * count + local), "LOCAL_RANK": str(local)}
            self._processes.append(subprocess.Popen(command_of(arguments), env=shared | own))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def running(self) -> bool:
        """Whether a rank still runs. Once one has failed the others are asked to end, and killed in the end."""
        codes = self._codes()
        if self._deadline == math.inf and any(codes.values()):
            self._end()
        if time.monotonic() > self._deadline:
            self.kill()
        return len(codes) < len(self._processes)

    def _codes(self) -> dict[int, int]:
        """The exit codes of ranks that ended; one that SIGTERM ended had no handlers yet."""
        codes = {}
        for local, process in enumerate(self._processes):
            code = process.poll()
            if code == -signal.SIGTERM and self._deadline < math.inf:
                code = int(Outcome.INTERRUPTED)
            if code is not None:
                codes[local] = code
        return codes

    def ask(self) -> None:
        """Ask the ranks to write a checkpoint and end, for which they may take their time."""
        self._asked = signal.SIGTERM
        for process in self._processes:
            process.terminate()

    def stop(self, number: int) -> None:
        """Pass on a signal: ranks write a checkpoint and end."""
        self._asked = signal.Signals(number)
        self._end()

    def _end(self) -> None:
        self._deadline = time.monotonic() + self.within + 5
        for process in self._processes:
            process.terminate()  # a second SIGINT, after the terminal's, would end a rank without a checkpoint

    def kill(self) -> None:
        """Kill the ranks that still run, and what they have started."""
        for local, process in enumerate(self._processes):
            if process.poll() is None:
                self._killed.add(local)
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a device or a file system holds it
                process.wait(timeout=10)

    def outcome(self) -> tuple[int, str, bool]:
        """The exit code of this host's ranks, the last line of its log, and whether a rank was killed from outside."""
        codes = self._codes()
        causes = {local: code for local, code in codes.items() if local not in self._killed}
        hung = set(codes) - set(causes)
        worst = max(causes, key=lambda local: WEIGHTS.get(causes[local], CRASH_WEIGHT), default=-1)
        code = causes.get(worst, 0)
        if code in (Outcome.DONE, Outcome.INTERRUPTED) and hung:
            return Outcome.FAILED, f"rank {min(hung)} of this host did not end in {self.within + 5} s: killed", False
        if code == Outcome.DONE:
            return code, "", False
        if code < 0:
            killer = signal.Signals(-code).name
            hint = ": out of memory?" if -code == signal.SIGKILL else ""
            # A library may abort when it loses a peer, as NCCL's watchdog does.
            return Outcome.FAILED, f"rank {worst} of this host was ended by {killer}{hint}", -code != signal.SIGABRT
        meaning = MEANINGS.get(code, CRASHED)
        if self._asked:
            return code, f"signal {self._asked.name}: {meaning}", False
        return code, f"rank {worst} of this host ended with code {code}, {meaning}{self._reason(worst)}", False

    def _reason(self, local: int) -> str:
        """What a rank said of its end (`errors.pass_on`)."""
        try:
            return f": {json.loads((self._folder / f'{local}.json').read_text())['message']}"
        except (OSError, ValueError, KeyError):
            return ""
