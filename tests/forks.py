"""Python programs for tests, forked from a server that has imported the heavy libraries already.

A start of pipeline/train.py takes seven seconds of CPU time, nearly all of them for imports (torch, and torch._dynamo
with the first optimizer), and tests start it hundreds of times. `Popen` is subprocess.Popen, except that a command
`[sys.executable, ...]` whose environment names a server (`SERVER`) is forked from it: with its own pid, session,
arguments, environment, folder, standard files and exit status, as a new interpreter has them. What a forked program
starts is forked, too, such as the ranks of a launcher.

What differs from a new interpreter: the parent process is the server, so that programs outlive who asked for them,
modules are imported already, and all programs share one seed of string hashes. Tests in which that matters (launchers
that are killed, signals while modules are imported) start real programs. The server has one thread and no CUDA context:
without Linux, or with a GPU, every program is a real one.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
SERVER = "NAIGN_FORK_SERVER"
"""The environment variable with the path of the server's socket, of programs that are to be forked."""
RUNNING = "NAIGN_FORK_SERVER_RUNNING"
"""The same, of processes that may share a server: the workers of pytest-xdist."""

MODULES = (
    *("torch._dynamo", "torch.utils.tensorboard", "torchmetrics", "sklearn.datasets", "sklearn.metrics"),
    *("accelerate.commands.launch", "torch.distributed.run", "boto3", "faiss", "webdataset", "deepspeed"),
    "torch._inductor.compile_fx",  # which later versions of deepspeed import when they make their first optimizer
)
"""What the server imports beside pipeline/, and with it nearly everything that a program needs."""

READ_AT_IMPORT = ("DS_", "LD_", "MKL_", "OMP_", "PYTHON", "TORCHINDUCTOR_", "TORCH_", "TQDM_")
"""Prefixes of variables that modules may read when they are imported: a program with others than the server is real."""

HARMLESS = ("PYTHONPATH", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
"""But for these: the first is minded by `become`, the second is for CUDA."""


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """subprocess.Popen, with programs forked where their environment asks for it and it is possible."""

    _server: socket.socket | None = None
    """Sends the pid (0: this program must be a real one), and the exit status in the end; 8 bytes each."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, *more: Any) -> None:
        # more: pass_fds, cwd, env, startupinfo, creationflags, shell, ends of three pipes [6:12], restore_signals, gid,
        # gids, uid, umask, start_new_session, process_group
        env = os.environ if more[2] is None else more[2]
        python = not isinstance(args, str) and args[0] == sys.executable
        if SERVER in env and python and preexec_fn is None and not more[0] and not more[5] and len(more) == 19:
            files = [number if end == -1 else end for number, end in enumerate((more[6], more[9], more[11]))]
            request = {"words": list(args[1:]), "env": dict(env), "cwd": str(more[1] or os.getcwd())}
            request |= {"new_session": more[17], "session": os.getsid(0), "group": os.getpgrp(), "parent": os.getpid()}
            self._server = socket.socket(socket.AF_UNIX)
            self._server.connect(env[SERVER])
            socket.send_fds(self._server, [b"\0"], files)
            self._server.sendall(json.dumps(request).encode())
            self._server.shutdown(socket.SHUT_WR)
            self.pid = int.from_bytes(self._server.recv(8))
            if self.pid:
                self._child_created = True
                self._close_pipe_fds(*more[6:12])
                return
            self._server.close()
            self._server = None
        super()._execute_child(
            args,
            executable,
            preexec_fn,
            close_fds,
            *more,
        )

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)
        self._server.settimeout(0 if wait_flags & os.WNOHANG else None)
        try:
            status = self._server.recv(8)
        except BlockingIOError:
            return 0, 0
        assert status, "the server of tests/forks.py has ended"
        return self.pid, int.from_bytes(status)

    def _internal_poll(self, *args: Any, **more: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(*args, **more)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


@functools.cache
def server() -> str:
    """The path of the socket of the server, which is started unless one runs; "" where programs cannot be forked."""
    if RUNNING in os.environ:
        return os.environ[RUNNING]
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return ""
    path = Path(tempfile.mkdtemp(prefix="naign-forks-")) / "socket"
    more = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "pipeline"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    more["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pandas imports pyarrow, which starts a thread
    command = [sys.executable, "-m", "tests.forks", str(path)]
    process = subprocess.Popen(command, env=os.environ | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and b"ready\n" in process.stdout, "the server of tests/forks.py has not started"
    atexit.register(process.communicate)  # the server ends with its stdin
    os.environ[RUNNING] = str(path)
    return str(path)


def relevant(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in env if name.startswith(READ_AT_IMPORT) and name not in HARMLESS}


def serve(path: str, own: dict[str, str], imported: dict[str, str]) -> tuple[dict[str, Any], list[int]]:
    """Fork a child for each request and report its end, until stdin ends. Returns in each child, with the request.

    own:       the environment before anything was imported
    imported:  variables that imports have set
    """
    links: dict[int, socket.socket] = {}  # by pid
    with selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    shutil.rmtree(Path(path).parent)
                    os._exit(0)
                if pid := key.data:
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    with links.pop(pid) as link, contextlib.suppress(OSError):  # who asked for it may be gone
                        link.sendall(os.waitpid(pid, 0)[1].to_bytes(8))
                    continue
                link, _ = listener.accept()
                files = socket.recv_fds(link, 1, 3)[1]
                with link.makefile("rb") as text:
                    request = json.load(text)
                theirs = {name: value for name, value in request["env"].items() if imported.get(name) != value}
                # A process joins no group of another session, where a signal to the group would miss it.
                joins = request["new_session"] or request["session"] == os.getsid(0)
                pid = os.fork() if joins and relevant(theirs) == relevant(own) else -1
                if pid == 0:
                    for other in (link, *links.values()):
                        other.close()
                    return request, files
                for file in files:
                    os.close(file)
                with contextlib.suppress(OSError):
                    link.sendall(max(0, pid).to_bytes(8))
                if pid > 0:
                    links[pid] = link
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                else:
                    link.close()


def become(request: dict[str, Any], files: list[int], imported: dict[str, str]) -> None:
    """Take on what a new process is given: session, files, folder and environment.

    imported: variables that imports would have set here, too
    """
    if request["new_session"]:
        os.setsid()
    else:
        with contextlib.suppress(OSError):  # the group may have ended
            os.setpgid(0, request["group"])
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in set(files) - {0, 1, 2}:
        os.close(file)
    os.getppid = lambda: request["parent"]  # for ranks that compare it with their launcher
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(imported | request["env"])
    sys.path[1:1] = [place for place in os.environ.get("PYTHONPATH", "").split(":") if place not in sys.path]
    numpy.random.seed()  # Python's own generator seeds itself anew


def execute(words: list[str]) -> None:
    """Run the program that follows `python` in a command line."""
    while words[0] in ("-u", "-B"):
        words = words[1:]
    sys.argv = words if not words[0].startswith("-") else words[1:]
    if words[0] == "-c":
        sys.path[0], sys.argv[0] = "", "-c"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def leave(run: Callable[..., None], *arguments: Any) -> NoReturn:
    """Run a program and end the process as Python does, but free no module: that takes longer than most programs."""
    code: Any = 0
    try:
        run(*arguments)
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    naign.process.leave(code)


if __name__ == "__main__":
    subprocess.Popen = Popen  # type: ignore[misc]  # for modules that take it from there
    own = dict(os.environ)
    import numpy

    import naign

    ours = [found.name for found in pkgutil.walk_packages(naign.__path__, "naign.")]
    left = ("__main__", "storage.clouds")  # which need optional packages
    for name in (*MODULES, *(name for name in ours if not name.endswith(left))):
        importlib.import_module(name)

    imported = {name: value for name, value in os.environ.items() if name not in own}
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not forked"
    gc.collect()
    gc.freeze()
    request, files = serve(sys.argv[1], own, imported)
    become(request, files, imported)
    leave(execute, request["words"])
