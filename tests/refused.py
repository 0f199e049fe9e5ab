"""What bad input ends in."""

import pytest

from naign.errors import InputError


def refused(message):
    """Expects an InputError that says so; `message` is a regular expression."""
    return pytest.raises(InputError, match=message)
