"""Objects under a prefix of an S3 bucket, or of any server that speaks S3. botocore's retries, of requests without
their bodies, are off: NetworkStore retries requests, and bodies from the byte where they broke.
"""

import base64
import contextlib
import hashlib
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, wait
from functools import partial, reduce
from typing import Any

from botocore import UNSIGNED
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

from naign.errors import Conflict, InputError, one_line
from naign.storage.base import Missing
from naign.storage.prefetch import PARALLEL, in_background
from naign.storage.resumed import NO_RANGES, BucketStore, Stat
from naign.storage.retry import Patience
from naign.storage.s3_client import BadSettings, client, is_transient

WRITE_PART = 16 << 20  # bytes per part of a multipart upload; S3 allows 10,000 parts
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"
_DENIED = ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_MISSING = ("NoSuchKey", "404", "NotFound")


def _code(error: BaseException | None) -> str:
    return str(error.response["Error"].get("Code")) if isinstance(error, ClientError) else ""


class S3Store(BucketStore):
    """The objects directly under one prefix. Picklable: each process makes its client at the first request."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.checksums = True  # until the server refuses them

    def folders(self) -> list[str]:
        prefixes = [entry["Prefix"] for page in self._pages() for entry in page.get("CommonPrefixes", [])]
        return sorted(prefix.removeprefix(self._prefix).rstrip("/") for prefix in prefixes)

    def list(self) -> list[str]:
        keys = [entry["Key"] for page in self._pages() for entry in page.get("Contents", [])]
        return sorted(key.removeprefix(self._prefix) for key in keys if key != self._prefix)

    def _pages(self) -> Iterator[Any]:
        """Pages of the listing of what lies directly under the prefix."""
        after: dict[str, str] = {}
        while True:
            page = self._ask("list_objects_v2", Prefix=self._prefix, Delimiter="/", **after)
            yield page
            if not page.get("IsTruncated"):
                return
            after = {"ContinuationToken": page["NextContinuationToken"]}

    _is_transient = staticmethod(is_transient)

    def _stat(self, name: str) -> Stat:
        answer = self._ask("head_object", name)
        return Stat(int(answer["ContentLength"]), str(answer["ETag"]))

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        data = super().read(name, first, last)
        etag = self._stats[name].version.strip('"')
        if first or last is not None or len(etag) != 32:
            return data
        # Nothing else holds the hash of a file such as index.json. Its ETag usually is its MD5; where it is not, as of
        # encrypted objects, two reads must agree.
        patience = Patience(f"read {self.url(name)}", self.tally)
        while hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
            self.tally.add(reread=len(data))
            before, data = data, super().read(name)
            if data == before:
                break
            patience.wait(ConnectionError(f"bytes that are not those of its ETag {etag}, others at each read"))
        return data

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator["Upload"]:
        upload = Upload(self, name)
        try:
            yield upload
            upload.finish()
        except BaseException:
            upload.abort()
            raise
        self._stats.pop(name, None)

    def delete(self, name: str) -> None:
        self._ask("delete_object", name)
        self._stats.pop(name, None)

    def _range(self, name: str, version: str, first: int, last: int, piece: int) -> Iterator[bytes]:
        span = f"bytes={first}-{last - 1}"
        answer = client().get_object(Bucket=self._bucket, Key=self._prefix + name, Range=span, IfMatch=version)
        if not str(answer.get("ContentRange", "")).startswith(f"bytes {first}-"):
            raise InputError(f"{self.url(name)}: {NO_RANGES}")
        left = last - first
        with contextlib.closing(answer["Body"]) as body:
            while left and (chunk := body.read(min(piece, left))):
                yield chunk
                left -= len(chunk)

    def _ask(self, operation: str, name: str | None = None, **arguments: Any) -> Any:
        """The answer to one request; transient failures are retried."""
        if name is not None:
            arguments["Key"] = self._prefix + name
        what = operation.replace("_", " ")
        return self._retried(what, name or "", lambda: getattr(client(), operation)(Bucket=self._bucket, **arguments))

    def _explain(self, error: Exception, name: str) -> None:
        match error:
            case ClientError():
                in_bucket = _code(error) in _MISSING and error.operation_name != "HeadBucket"
                if in_bucket and not self._bucket_is_missing():
                    missing = "no such object: check the path, or pack the data set again"
                    raise Missing(f"{self.url(name)}: {missing}", seen=name in self._stats) from error
                problem = self._refusal(error)
            case NoCredentialsError() | PartialCredentialsError() | ProfileNotFound():
                problem = f"{error}: {CREDENTIALS}"
            case BotoCoreError() | BadSettings():
                problem = f"{one_line(error)}: check AWS_ENDPOINT_URL, the AWS configuration and the path"
            case _:
                return
        raise InputError(f"{self.url(name)}: {problem}") from error

    def _refusal(self, error: ClientError) -> str:
        """What a refusal by the server means, and what to do."""
        code = _code(error)
        if code in (*_MISSING, "NoSuchBucket", "InvalidBucketName"):
            return f"there is no bucket {self._bucket}: make it first, or check the name and AWS_ENDPOINT_URL"
        if code in ("PreconditionFailed", "412"):
            return "replaced while it was being read: verify the data set, and start again"
        if code in ("InvalidRange", "416"):
            return "shorter than expected: copy it again, or repack the data set"
        if code in _DENIED:
            unsigned = f"; no credentials were found, so it was asked for without: {CREDENTIALS}"
            remedy = f"access denied ({code}): check the credentials and what they may do in this bucket"
            return remedy + (unsigned if client().meta.config.signature_version is UNSIGNED else "")
        message = error.response["Error"].get("Message") or "no reason given"
        return f"the server refuses ({code}: {message}): check the path, AWS_ENDPOINT_URL and the region"

    def _bucket_is_missing(self) -> bool:
        """Whether an object is missing because its bucket is: the answer to a HEAD does not say."""
        try:
            self._ask("head_bucket")
            return False
        except InputError as error:
            return _code(error.__cause__) in ("404", "NoSuchBucket")


class Upload:
    """An object being written. It appears as a whole when it is finished, or not at all."""

    def __init__(self, store: S3Store, name: str) -> None:
        self._store, self._name = store, name
        self._buffer = bytearray()
        self._size = self._crc = 0  # of all bytes written
        self._upload: str | None = None
        self._parts: list[Future[dict[str, Any]]] = []

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._buffer += data
        self._size += len(data)
        self._crc = zlib.crc32(data, self._crc)
        while len(self._buffer) > WRITE_PART:
            self._send(bytes(self._buffer[:WRITE_PART]))
            del self._buffer[:WRITE_PART]
        return len(data)

    def finish(self) -> None:
        """Make the object visible, and check that it is the one that was written."""
        last = bytes(self._buffer)
        if self._upload is None:
            etag = self._sent("put_object", last)["ETag"]
        else:
            self._send(last)
            etag = self._completed([part.result() for part in self._parts])
        size, version = self._store.size(self._name), self._store.version(self._name)
        if size != self._size or version != etag:
            there = f"{size} bytes, ETag {version} just after {self._size} bytes, ETag {etag} were written"
            remedy = "another program writes there too: stop it, or choose another path"
            raise Conflict(f"{self._store.url(self._name)}: {there}: {remedy}")

    def abort(self) -> None:
        """Leave nothing behind."""
        wait(self._parts)
        if self._upload is not None:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._store._ask("abort_multipart_upload", self._name, UploadId=self._upload)

    def _send(self, part: bytes) -> None:
        """Upload a part in the background; wait for the oldest one if PARALLEL are under way."""
        if self._upload is None:
            self._upload = str(self._ask("create_multipart_upload", {"ChecksumAlgorithm": "CRC32"})["UploadId"])
        if len(self._parts) >= PARALLEL:
            self._parts[-PARALLEL].result()
        self._parts.append(in_background(partial(self._send_part, part, len(self._parts) + 1), "send"))

    def _send_part(self, part: bytes, number: int) -> dict[str, Any]:
        answer = self._sent("upload_part", part, PartNumber=number, UploadId=self._upload)
        return {"PartNumber": number} | {key: answer[key] for key in ("ETag", "ChecksumCRC32") if key in answer}

    def _sent(self, operation: str, data: bytes, **arguments: Any) -> Any:
        """The answer to an upload of bytes, repeated while it shows that the server stored others: by a CRC-32, or else
        by an ETag that is an MD5, which it is not for objects encrypted by SSE-KMS or SSE-C.
        """
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()

        def send() -> Any:
            answer = self._ask(operation, {"ChecksumCRC32": crc}, Body=data, **arguments)
            etag, stored = answer["ETag"].strip('"'), answer.get("ChecksumCRC32")
            encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
            opaque = encrypted or not re.fullmatch("[0-9a-f]{32}", etag)
            if stored == crc or stored is None and (opaque or etag == md5):
                return answer
            raise ConnectionError(f"the server stored other bytes: ETag {etag}, CRC-32 {stored}")

        return self._store._retried("write", self._name, send)

    def _ask(self, operation: str, checksum: dict[str, str], **arguments: Any) -> Any:
        """One request with a checksum; from then on without, where the server does not know these (Backblaze B2)."""
        given = checksum if self._store.checksums else {}
        try:
            return self._store._ask(operation, self._name, **given, **arguments)
        except InputError as error:
            if not given or "x-amz-checksum" not in str(error).lower():
                raise
        self._store.checksums = False
        return self._store._ask(operation, self._name, **arguments)

    def _completed(self, parts: list[dict[str, Any]]) -> str:
        """Complete the upload; its ETag. If an answer is lost, the next request finds no upload: check the object."""
        store, name = self._store, self._name
        try:
            whole = {"UploadId": self._upload, "MultipartUpload": {"Parts": parts}}
            return str(store._ask("complete_multipart_upload", name, **whole)["ETag"])
        except InputError as error:
            there = _code(error.__cause__) == "NoSuchUpload" and store.exists(name) and store.size(name) == self._size
            if not there or reduce(lambda crc, piece: zlib.crc32(piece, crc), store.pieces(name), 0) != self._crc:
                raise
        return store.version(name)
