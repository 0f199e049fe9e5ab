"""What audits look at."""

import pytest

from tests.neighbours.planted import plant


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """The path of the planted data set."""
    return plant(str(tmp_path_factory.mktemp("planted")))
