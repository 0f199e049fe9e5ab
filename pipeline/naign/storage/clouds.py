"""Objects in buckets of Google (gs://) and containers of Azure (az://, abfs://), by obstore, which retries the parts of
uploads; NetworkStore retries all other requests.
"""

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache, reduce
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from naign.errors import Conflict, InputError, Unavailable, one_line, require
from naign.storage import retry
from naign.storage.base import Missing
from naign.storage.prefetch import PARALLEL
from naign.storage.resumed import BucketStore, Stat

WRITE_PART = 16 << 20  # bytes per part of an upload
SILENCE, UPLOAD, LONG = (timedelta(seconds=seconds) for seconds in (20, 300, 3600))  # of an answer; of a part; no limit
GOOGLE = "set GOOGLE_APPLICATION_CREDENTIALS, or call gcloud auth application-default login"
AZURE = "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or an identity"
MEANINGS = {
    **dict.fromkeys((401, 403), "access denied ({}): check the credentials and what they may do in this bucket"),
    404: "there is no such bucket: make it first, or check the name and the account",
    412: "replaced while it was being read: verify the data set, and start again",
    416: "shorter than expected: copy it again, or repack the data set",
}


class CloudStore(BucketStore):
    """The objects directly under one prefix. Picklable: each process makes its clients at the first request."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        named = re.fullmatch(r"(gs|az)://[\w.-]+|abfss?://[\w.-]+(@[\w.-]+)?", self._root, re.ASCII)
        require((named, f"{path.partition(':')[0]}://: the address has a user, password or query, or no plain name"))

    def folders(self) -> list[str]:
        return sorted(prefix.rpartition("/")[2] for prefix in self._listing()["common_prefixes"])

    def list(self) -> list[str]:
        return sorted(entry["path"].removeprefix(self._prefix) for entry in self._listing()["objects"])

    def _listing(self) -> Any:
        return self._ask("list", "", lambda bucket, _: obstore.list_with_delimiter(bucket, self._prefix[:-1] or None))

    def _stat(self, name: str) -> Stat:
        answer = self._ask("ask about", name, obstore.head)
        return Stat(answer["size"], str(answer["e_tag"]))

    def _range(self, name: str, version: str, first: int, last: int, piece: int) -> Iterator[bytes]:
        options: Any = {"range": (first, last), "if_match": version}
        with _failures():
            answer = obstore.get(_client(self._root, 0), self._prefix + name, options=options)
            yield from map(bytes, answer.stream(piece))

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator["Upload"]:
        """As in the protocol. The object is read back: no server compares a checksum with what obstore sends."""
        path, parts = self._prefix + name, dict[str, Any](buffer_size=WRITE_PART, max_concurrency=PARALLEL)
        try:
            with _failures(), obstore.open_writer(_client(self._root, retry.ATTEMPTS - 1), path, **parts) as writer:
                upload = Upload(writer)
                yield upload
        except RequestFailed as error:
            self._explain(error, name)
            failed = f"given up after {retry.ATTEMPTS} attempts; the last failed with {error}"
            raise Unavailable(f"write {self.url(name)}: {failed}") from None
        size, crc = self.size(name), reduce(lambda crc, piece: zlib.crc32(piece, crc), self.pieces(name), 0)
        if (size, crc) != (upload.size, upload.crc):
            there = f"{size} bytes, CRC-32 {crc:08x} just after {upload.size} bytes, {upload.crc:08x}, were written"
            remedy = "another program writes there too: stop it, or choose another path"
            raise Conflict(f"{self.url(name)}: {there}: {remedy}")

    def delete(self, name: str) -> None:
        with contextlib.suppress(Missing):
            self._ask("delete", name, obstore.delete)
        self._stats.pop(name, None)

    def _ask(self, what: str, name: str, call: Callable[[Any, str], Any]) -> Any:
        """The answer to one request; transient failures are retried."""

        def ask() -> Any:
            with _failures():
                return call(_client(self._root, 0), self._prefix + name)

        return self._retried(what, name, ask)

    @staticmethod
    def _is_transient(error: Exception) -> bool:
        return isinstance(error, RequestFailed) and error.transient

    def _explain(self, error: Exception, name: str) -> None:
        if not isinstance(error, RequestFailed) or error.transient:
            return
        if error.status == 404 and name:  # the answer does not say whether the bucket is missing
            self._listing()
            missing = "no such object: check the path, or pack the data set again"
            raise Missing(f"{self.url(name)}: {missing}", seen=name in self._stats) from error
        problem = MEANINGS.get(error.status, "{}: check the path and the account").format(error)
        raise InputError(f"{self.url(name) if name else self._root}: {problem}") from error


class Upload:
    """An object being written."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.size = self.crc = 0  # of all bytes written

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.size, self.crc = self.size + len(data), zlib.crc32(data, self.crc)
        return int(self._writer.write(data))


class RequestFailed(Exception):
    """A request that failed, with the reason on one line."""

    def __init__(self, error: Exception) -> None:
        text = str(error).partition("\n\nDebug source")[0]
        answer, code = re.search(r"code: (\d{3})([^:)]*)", text), re.search("<Code>(.*?)</Code>", text)
        status, for_token = int(answer[1]) if answer else 0, re.search("token request|Account must", text)
        for_good = re.search(r"\w*ertificate\w*|InvalidContentType|builder error", str(error))  # TLS, an address
        network = "HTTP error" in text and not for_good
        self.transient = network or status in (408, 429) or (status >= 500 and status != 501)
        self.status = 0 if for_token else status
        reason = "".join(answer.groups()) if answer else one_line(text.partition(" - ")[2] or text)
        reason += f", {code[1]}" if code else f" ({for_good[0]})" if for_good else ""
        remedy = GOOGLE if "GCS" in text else AZURE
        super().__init__(f"no credentials, and none from this machine ({reason}): {remedy}" if for_token else reason)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """obstore's errors, whose OSErrors have no number, as RequestFailed, without their pages of details."""
    try:
        yield
    except (BaseError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RequestFailed(error) from None


@cache
def _client(root: str, retries: int) -> Any:
    """obstore's client of a bucket, set up by the cloud's variables of the environment."""
    options: Any = {"timeout": UPLOAD} if retries else {"read_timeout": SILENCE, "timeout": LONG}
    options |= {"allow_http": True, "connect_timeout": SILENCE}
    first, longest = timedelta(seconds=retry.FIRST_PAUSE), timedelta(seconds=retry.LONGEST_PAUSE)
    backoff: Any = {"init_backoff": first, "max_backoff": longest, "base": 2}
    patience: Any = {"max_retries": retries, "backoff": backoff, "retry_timeout": LONG}
    return from_url(root, client_options=options, retry_config=patience)


forget_clients = _client.cache_clear  # so that the next client is made from the environment as it is then
