"""The S3 client of this process. The only file that imports boto3."""

import os
import re
import threading
from functools import cache
from typing import Any

from botocore import UNSIGNED, exceptions
from urllib3.exceptions import HTTPError

from naign.errors import printable
from naign.storage.prefetch import PARALLEL

SILENCE = 20.0  # seconds without a byte, or without a connection, before a request counts as failed

# Error codes of requests worth retrying, whatever their HTTP status.
TRANSIENT_CODES = ("BadDigest", "XAmzContentChecksumMismatch", "RequestTimeout", "SlowDown")
TRANSIENT = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.IncompleteReadError,
    exceptions.CredentialRetrievalError,
    exceptions.MetadataRetrievalError,
    HTTPError,
    ConnectionError,
    TimeoutError,
)


class BadSettings(Exception):
    """boto3 cannot be set up so."""


def is_transient(error: Exception) -> bool:
    """Whether the failure of a request without an answer is transient: it may succeed a moment later."""
    if isinstance(error, exceptions.SSLError) and re.search("WRONG_VERSION_NUMBER|CERTIFICATE_VERIFY", str(error)):
        return False
    return isinstance(error, TRANSIENT)


def is_transient_status(status: int) -> bool:
    """501 is a header or operation that the server will never know."""
    return (status >= 500 and status != 501) or status in (408, 429)


_MAKING = threading.Lock()  # held across a fork, too, after which the child has none of the parent's connections


def client() -> Any:
    """This process's client, signed by what boto3's chain finds (environment, profile, web identity, instance role).
    Where it finds nothing, requests are not signed: a public bucket needs no account.
    """
    with _MAKING:
        return _make_client()


@cache
def _make_client() -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    credentials = session.get_credentials()
    signature = None
    if credentials is None:
        signature = UNSIGNED
    elif not all(part.isprintable() for part in credentials.get_frozen_credentials() if part):
        # Such a header is refused with an error that prints it.
        raise BadSettings("the credentials hold a line break or another character that is not printable")
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=SILENCE,
        read_timeout=SILENCE,
        max_pool_connections=8 * PARALLEL,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",  # s3.py gives checksums itself, where the server knows them
        response_checksum_validation="when_required",
        signature_version=signature,
    )
    try:
        made = session.client("s3", config=config)
    except (ValueError, AttributeError) as error:  # an address without scheme; sections that are no sections
        raise BadSettings(re.sub(r"\S*@", "...@", str(error))) from None
    if "@" in made.meta.endpoint_url:  # every error would print it
        raise BadSettings("the server's address holds a user or a password: give them as AWS_ACCESS_KEY_ID and so on")
    made.meta.events.register_first("needs-retry.s3", _refuse_redirect)
    return made


os.register_at_fork(before=_MAKING.acquire, after_in_parent=_MAKING.release, after_in_child=_MAKING.release)
forget_clients = _make_client.cache_clear  # so that the next client is made from the environment as it is then
os.register_at_fork(after_in_child=forget_clients)


def _refuse_redirect(response: Any, **_: Any) -> None:
    """Else botocore asks that server for the bucket's region, is redirected again, and so on without end."""
    if response is None:
        return
    http, answer = response
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region_is_told = "x-amz-bucket-region" in headers or "Region" in answer.get("Error", {})
    if http.status_code in (301, 302, 307, 308) and not region_is_told:
        place = printable(headers.get("location", "").partition("?")[0]) or "nowhere"
        raise BadSettings(f"the server redirects ({http.status_code}) to {place} (http or https? another region?)")
