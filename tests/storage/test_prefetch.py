"""Calls made by threads ahead of need."""

from contextvars import ContextVar

from naign.storage.prefetch import in_order

limit: ContextVar[int] = ContextVar("limit", default=0)


def test_calls_have_the_context_of_the_caller() -> None:
    """Else a limit of retries would end where a store reads ahead."""
    token = limit.set(3)
    try:
        assert list(in_order([limit.get] * 5, width=2)) == [3] * 5
    finally:
        limit.reset(token)
