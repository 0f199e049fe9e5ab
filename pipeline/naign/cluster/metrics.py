"""`naign launch --metrics PORT`: /metrics of a host for Prometheus, and /healthz for a liveness probe.

A thread of the launcher serves both over HTTP, without a login, from the file that a rank replaces after each round
(observe/heartbeat.py). The format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format.
"""

import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from naign.cluster.exit_codes import say
from naign.cluster.meeting import listen
from naign.errors import one_line

START = 3600.0  # seconds that ranks may take to their first round, and after their last one
REQUEST, CLIENTS = 10.0, 32  # seconds that a client may take to the end of the answer; clients, a thread and file each
LEAST, FACTOR = 300.0, 5.0  # any other round: so many seconds, or so many times the longest before it if that is more


class Metrics(ThreadingHTTPServer):
    """Serves both pages from the moment it is made. Raises InputError if the port cannot be opened."""

    def __init__(self, port: int, host: int) -> None:
        super().__init__(("", port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(port, "--metrics", host)
        self._open = dict[socket.socket, float]()  # connections and when each began, the oldest first
        self._file, self._last, self._generation, self._began = Path(), dict[str, Any](), 0, math.inf
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def watch(self, file: Path, generation: int) -> None:
        """The ranks start, of which one replaces `file` after each round."""
        os.environ["NAIGN_HEARTBEAT"] = str(file)
        self._file, self._generation, self._began = file, generation, time.monotonic()

    def health(self) -> tuple[int, str]:
        """The answer of /healthz: 200 or 503, and the reason."""
        age, limit = self._progress(self._read())
        return 503 if age > limit else 200, f"{age:.0f} s since a round ended or the ranks started, limit {limit:.0f}\n"

    def page(self) -> str:
        """The text of /metrics."""
        state = self._read()
        age, limit = self._progress(state)
        series = {"generation": self._generation, "round_age_seconds": age, "round_limit_seconds": limit, **read_gpus()}
        series["restarts_total"] = max(0, self._generation - 1) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if state:
            series |= {"checkpoint_age_seconds": time.monotonic() - state["checkpoint"], **state["series"]}
        lines = list[str]()
        for name, group in itertools.groupby(sorted(series.items()), key=lambda item: item[0].partition("{")[0]):
            lines.append(f"# TYPE naign_{name} {'counter' if name.endswith('_total') else 'gauge'}")
            lines += [f"naign_{labelled} {value}" for labelled, value in group]
        return "\n".join([*lines, ""])

    def _read(self) -> dict[str, Any]:
        """What the rank reported last; {} before its first round. The file goes when the ranks have ended."""
        with suppress(FileNotFoundError, IsADirectoryError):
            self._last = json.loads(self._file.read_text())
        return self._last

    def _progress(self, state: dict[str, Any]) -> tuple[float, float]:
        """Seconds since a round ended, or since the ranks started (0 before that), and how many are allowed."""
        now = time.monotonic()
        if not state:
            return max(0.0, now - self._began), START
        is_last = state["series"]["images_seen"] >= state["series"]["images_goal"]
        return now - state["ended"], START if is_last else max(LEAST, FACTOR * state["longest"])

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self._open[request] = time.monotonic()
        return True

    def service_actions(self) -> None:  # twice a second, and after each connection: end old ones, and those too many
        self._open = {client: since for client, since in self._open.items() if client.fileno() >= 0}
        for left, (client, since) in zip(range(len(self._open), 0, -1), self._open.items(), strict=True):
            if left > CLIENTS or time.monotonic() - since > REQUEST:
                with suppress(OSError):  # it ended just now
                    client.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        if not isinstance(error := sys.exc_info()[1], OSError):  # a client that went away
            say(f"--metrics: {one_line(error)}")


class _Handler(BaseHTTPRequestHandler):
    server: Metrics

    def do_GET(self) -> None:
        code = 200 if (path := self.path.partition("?")[0]) == "/metrics" else 404
        code, text = self.server.health() if path == "/healthz" else (code, self.server.page())
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None: ...  # no line for each request


def read_gpus() -> dict[str, float]:
    """Memory and use of this host's GPUs by NVML; {} without a driver or `nvidia-ml-py`."""
    try:
        import pynvml
    except ImportError:
        return {}
    series = dict[str, float]()
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            device, label = pynvml.nvmlDeviceGetHandleByIndex(index), f'{{gpu="{index}"}}'
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            series |= {f"gpu_memory_used_bytes{label}": memory.used, f"gpu_memory_bytes{label}": memory.total}
            with suppress(pynvml.NVMLError):  # none of a GPU in parts (MIG)
                series[f"gpu_utilization_ratio{label}"] = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
    return series
