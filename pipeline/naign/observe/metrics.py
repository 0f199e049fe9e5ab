"""`naign launch --metrics PORT`: /metrics of a host for Prometheus, with the values of the newest round.

The first rank of the host serves it over HTTP, without a login, while it trains. The format:
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format.
"""

import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from naign.errors import InputError


class Metrics(ThreadingHTTPServer):
    """Serves the page from the moment it is made. Raises InputError if the port cannot be opened."""

    def __init__(self, port: int) -> None:
        self.page = ""
        try:
            super().__init__(("", port), _Handler)
        except OSError as error:
            raise InputError(f"port {port} cannot be opened ({error.strerror}): choose another --metrics") from None
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def update(self, values: Mapping[str, float]) -> None:
        """Serve these from now on; `loss/total` as naign_loss_total."""
        lines = [f"naign_reported_timestamp_seconds {time.time()}\n"]
        for name, value in values.items():
            lines.append(f"naign_{re.sub('[^a-zA-Z0-9]', '_', name)} {float(value)}\n")
        self.page = "".join(lines)

    def handle_error(self, *_: Any) -> None: ...  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    server: Metrics
    timeout = 10.0  # seconds that a client may be silent

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.page.encode())

    def log_message(self, format: str, *args: Any) -> None: ...  # no line for each request
