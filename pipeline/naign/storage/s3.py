"""Objects under a prefix of an S3 bucket, or of any server that speaks S3. botocore's retries, of requests without
their bodies, are off: NetworkStore retries requests, and bodies from the byte where they broke.
"""

import base64
import contextlib
import os
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from botocore import UNSIGNED
from botocore.exceptions import BotoCoreError, ClientError

from naign.errors import InputError, one_line, require
from naign.storage.base import Missing, Names
from naign.storage.network import NO_RANGES, PART, Failure, NetworkStore, Stat
from naign.storage.prefetch import in_order
from naign.storage.s3_client import (
    TRANSIENT_CODES,
    BadSettings,
    client,
    forget_clients,
    is_transient,
    is_transient_status,
)

CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"


class S3Store(NetworkStore):
    """The objects directly under one prefix. Each process makes its client at the first request."""

    remedy = "check the path, AWS_ENDPOINT_URL, the region and the rest of the AWS configuration"
    forget_client = staticmethod(forget_clients)

    def names(self) -> Names:
        folders = []
        files = []
        options = {"Prefix": self._prefix, "Delimiter": "/"}
        while True:
            page = self._ask("list_objects_v2", **options)
            for entry in page.get("CommonPrefixes", []):
                folders.append(entry["Prefix"].removeprefix(self._prefix).rstrip("/"))
            for entry in page.get("Contents", []):
                if entry["Key"] != self._prefix:
                    files.append(entry["Key"].removeprefix(self._prefix))
            if not page.get("IsTruncated"):
                return Names(sorted(folders), sorted(files))
            options["ContinuationToken"] = page["NextContinuationToken"]

    def _ask_stat(self, name: str) -> Stat:
        answer = self._ask("head_object", name)
        require(({"ContentLength", "ETag"} <= answer.keys(), f"{self.url(name)}: no S3 store is there: {self.remedy}"))
        # Some servers quote an ETag in one answer and not in the next.
        return Stat(int(answer["ContentLength"]), str(answer["ETag"]).strip('"'))

    def delete(self, name: str) -> None:
        self._ask("delete_object", name)
        self._stats.pop(name, None)

    def _range(
        self,
        name: str,
        version: str,
        first: int,
        last: int,
        piece: int,
    ) -> Iterator[bytes]:
        answer = client().get_object(
            Bucket=self._bucket,
            Key=self._prefix + name,
            Range=f"bytes={first}-{last - 1}",
            IfMatch=f'"{version}"',
        )
        if not str(answer.get("ContentRange", "")).startswith(f"bytes {first}-"):
            raise InputError(f"{self.url(name)}: {NO_RANGES}")
        with contextlib.closing(answer["Body"]) as body:
            while first < last:
                chunk = body.read(min(piece, last - first))
                if not chunk:
                    return
                yield chunk
                first += len(chunk)

    def _upload(self, name: str, file: BinaryIO) -> None:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= PART:
            self._put("put_object", name, file.read())
            return
        begun = self._ask("create_multipart_upload", name, ChecksumAlgorithm="CRC32")
        upload = {"UploadId": begun["UploadId"]}

        def put(number: int, data: bytes) -> dict[str, Any]:
            answer = self._put("upload_part", name, data, PartNumber=number, **upload)
            part = {"PartNumber": number, "ETag": answer["ETag"]}
            if "ChecksumCRC32" in answer:
                part["ChecksumCRC32"] = answer["ChecksumCRC32"]
            return part

        count = -(-size // PART)
        try:
            calls = (partial(put, number, file.read(PART)) for number in range(1, count + 1))
            parts = list(in_order(calls))
            self._ask("complete_multipart_upload", name, MultipartUpload={"Parts": parts}, **upload)
        except BaseException as error:
            # Where the answer to the completion was lost, the next request finds no upload, but the whole object.
            if isinstance(error, Missing) and self.exists(name) and self.size(name) == size:
                return
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._ask("abort_multipart_upload", name, **upload)
            raise

    def _put(self, operation: str, name: str, data: bytes, **arguments: Any) -> Any:
        """Upload bytes with a checksum, which the server compares."""
        crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        return self._ask(operation, name, Body=data, ChecksumCRC32=crc, **arguments)

    def _ask(self, operation: str, name: str = "", **arguments: Any) -> Any:
        """The answer to one request; failures that may pass are retried."""
        if name:
            arguments["Key"] = self._prefix + name
        return self._retried(
            operation.replace("_", " "),
            name,
            lambda: getattr(client(), operation)(Bucket=self._bucket, **arguments),
        )

    @staticmethod
    def _failure(error: Exception) -> Failure | None:
        if isinstance(error, ClientError):
            code = str(error.response["Error"].get("Code"))
            message = error.response["Error"].get("Message")
            reason = one_line(f"{code}: {message}")
            metadata = error.response.get("ResponseMetadata", {})
            status = int(metadata.get("HTTPStatusCode", 0))
            transient = is_transient_status(status) or code in TRANSIENT_CODES
            if "Expired" in code or code == "400":  # what a HEAD says of an expired token
                status = 403
            if status == 403 and client().meta.config.signature_version is UNSIGNED:
                reason += f"; no credentials were found, so it was asked for without: {CREDENTIALS}"
            return Failure(reason, status, transient)
        if is_transient(error):
            return Failure(f"{type(error).__name__}: {one_line(error)}", transient=True)
        if isinstance(error, BotoCoreError | BadSettings):
            return Failure(one_line(error))
        return None
