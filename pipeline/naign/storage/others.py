"""What obstore reaches: buckets of Google (gs://) and Azure (az://, abfs://), and, to read only, files on web servers
(https://), such as the Hugging Face hub's. obstore retries the parts of uploads, NetworkStore all else.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, BinaryIO

import obstore
from huggingface_hub import constants, get_token
from obstore.exceptions import BaseError
from obstore.store import HTTPStore, from_url

from naign.errors import one_line, require
from naign.storage import retry
from naign.storage.base import Missing, Names
from naign.storage.network import NO_RANGES, PART, Failure, NetworkStore, Stat
from naign.storage.prefetch import PARALLEL
from naign.storage.s3_client import is_transient_status

SILENCE = timedelta(seconds=20)  # of a server
LONG = timedelta(hours=1)  # of a whole answer: no limit


class OtherStore(NetworkStore):
    """The objects directly under one prefix. Each process makes its clients at the first request."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._writable = not path.startswith("http")
        plain = re.fullmatch(r"[a-z]+://[\w.-]+(:[1-5]?\d{1,4}|:6[0-5]\d{3}|@[\w.-]+)?", self._root, re.ASCII)
        remedy = "the address has a user, password or query, or no plain name or port"
        require((plain, f"{path.partition(':')[0]}://: {remedy}"))

    def names(self) -> Names:
        self._require_writable("it cannot be listed: check the path, or name files, as in .../train-{00000..00031}.tar")
        listing = self._ask("list", "", obstore.list_with_delimiter)
        folders = [folder.rpartition("/")[2] for folder in listing["common_prefixes"]]
        files = [entry["path"].removeprefix(self._prefix) for entry in listing["objects"]]
        return Names(sorted(folders), sorted(files))

    def _ask_stat(self, name: str) -> Stat:
        answer = self._ask("ask about", name, obstore.head)
        version = answer["e_tag"] or f"W/{answer['last_modified']}-{answer['size']}"
        return Stat(answer["size"], version)

    def _range(
        self,
        name: str,
        version: str,
        first: int,
        last: int,
        piece: int,
    ) -> Iterator[bytes]:
        options: Any = {"range": (first, last)}
        if not version.startswith("W/"):  # a weak ETag never matches
            options["if_match"] = version
        answer = obstore.get(_client(self._root), self._prefix + name, options=options)
        for data in answer.stream(piece):
            yield bytes(data)

    def _upload(self, name: str, file: BinaryIO) -> None:
        self._require_writable("write to a local folder or s3://")

        def put() -> Any:
            file.seek(0)
            return obstore.put(
                _client(self._root, uploads=True),
                self._prefix + name,
                file,
                chunk_size=PART,
                max_concurrency=PARALLEL,
            )

        self._retried("write", name, put)

    def delete(self, name: str) -> None:
        self._require_writable("nothing is removed there")
        with contextlib.suppress(Missing):
            self._ask("delete", name, obstore.delete)
        self._stats.pop(name, None)

    def _require_writable(self, instead: str) -> None:
        require((self._writable, f"{self.path}: web servers are only read: {instead}"))

    def _ask(
        self,
        what: str,
        name: str,
        call: Callable[[Any, str], Any],
    ) -> Any:
        """The answer to one request; failures that may pass are retried."""
        return self._retried(what, name, lambda: call(_client(self._root), self._prefix + name))

    @staticmethod
    def forget_client() -> None:
        _client.cache_clear()

    @staticmethod
    def _failure(error: Exception) -> Failure | None:
        if not isinstance(error, BaseError | OSError) or getattr(error, "errno", None) is not None:
            return None
        text = str(error).partition("\n\nDebug source")[0]  # pages of details
        if "Range request not supported" in text:
            return Failure(NO_RANGES)
        answer = re.search(r"code: (\d{3})([^:)]*)", text)
        lasting = re.search(r"\w*ertificate\w*|InvalidContentType|builder error", str(error))  # TLS, an address
        if not answer:
            reason = one_line(text.partition(" - ")[2] or text)
            if lasting:
                reason += f" ({lasting[0]})"
            return Failure(reason, transient="HTTP error" in text and not lasting)
        status = int(answer[1])
        reason = answer[1] + answer[2]  # "403 Forbidden"
        code = re.search("<Code>(.*?)</Code>", text)
        if code:
            reason += f", {code[1]}"
        return Failure(reason, status, is_transient_status(status))


@cache
def _client(root: str, *, uploads: bool = False) -> Any:
    """obstore's client of a bucket or server, set up by the cloud's variables of the environment."""
    options: Any = {"allow_http": True, "connect_timeout": SILENCE, "read_timeout": SILENCE, "timeout": LONG}
    retries: Any = {
        "max_retries": 1000 if uploads else 0,
        "retry_timeout": timedelta(seconds=retry.PATIENCE),
        "backoff": {
            "init_backoff": timedelta(seconds=retry.FIRST_PAUSE),
            "max_backoff": timedelta(seconds=retry.LONGEST_PAUSE),
            "base": 2,
        },
    }
    if not root.startswith("http"):
        return from_url(root, client_options=options, retry_config=retries)
    token = get_token()
    if token and root == constants.ENDPOINT:
        options["default_headers"] = {"Authorization": f"Bearer {token}"}
    return HTTPStore(root, client_options=options, retry_config=retries)
