"""`naign launch --metrics PORT`: /metrics of a host for Prometheus, and /healthz for a liveness probe.

A thread of the launcher serves both over HTTP, without a login, from the file that a rank replaces after each round
(observe/heartbeat.py). The format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format.
"""

import json
import math
import os
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from naign.cluster.hosts import listen, say
from naign.errors import one_line

START = 3600.0  # seconds that ranks may take to their first round, and after their last one
LEAST = 300.0  # seconds of any other round, at least
FACTOR = 5.0  # times the longest round before it, if that is more


class Metrics(ThreadingHTTPServer):
    """Serves both pages from the moment it is made. Raises InputError if the port cannot be opened."""

    def __init__(self, port: int, host: int) -> None:
        super().__init__(("", port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(port, "--metrics", host)
        self._file = Path()
        self._last: dict[str, Any] = {}
        self._generation = 0
        self._began = math.inf
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def watch(self, file: Path, generation: int) -> None:
        """The ranks start, of which one replaces `file` after each round."""
        os.environ["NAIGN_HEARTBEAT"] = str(file)
        self._file = file
        self._last = {}
        self._generation = generation
        self._began = time.monotonic()

    def health(self) -> tuple[int, str]:
        """The answer of /healthz: 200 or 503, and the reason."""
        age, limit = self._progress(self._read())
        code = 503 if age > limit else 200
        return code, f"{age:.0f} s since a round ended or the ranks started, limit {limit:.0f}\n"

    def page(self) -> str:
        """The text of /metrics."""
        state = self._read()
        age, limit = self._progress(state)
        restarts = max(0, self._generation - 1) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        series = {
            "generation": self._generation,
            "restarts_total": restarts,
            "round_age_seconds": age,
            "round_limit_seconds": limit,
            **read_gpus(),
        }
        if state:
            series["checkpoint_age_seconds"] = time.monotonic() - state["checkpoint"]
            series |= state["series"]
        lines = []
        typed = set()
        for labelled, value in sorted(series.items()):
            name = labelled.partition("{")[0]
            if name not in typed:
                typed.add(name)
                kind = "counter" if name.endswith("_total") else "gauge"
                lines.append(f"# TYPE naign_{name} {kind}\n")
            lines.append(f"naign_{labelled} {value}\n")
        return "".join(lines)

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
        age = now - state["ended"]
        if state["series"]["images_seen"] >= state["series"]["images_goal"]:
            return age, START
        return age, max(LEAST, FACTOR * state["longest"])

    def handle_error(self, *_: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that went away
            say(f"--metrics: {one_line(error)}")


class _Handler(BaseHTTPRequestHandler):
    server: Metrics
    timeout = 10.0  # seconds that a client may be silent

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        code = 404
        text = ""
        if path == "/metrics":
            code = 200
            text = self.server.page()
        elif path == "/healthz":
            code, text = self.server.health()
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
    series: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            label = f'{{gpu="{index}"}}'
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            series[f"gpu_memory_used_bytes{label}"] = memory.used
            series[f"gpu_memory_bytes{label}"] = memory.total
            with suppress(pynvml.NVMLError):  # none of a GPU in parts (MIG)
                series[f"gpu_utilization_ratio{label}"] = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
    return series
