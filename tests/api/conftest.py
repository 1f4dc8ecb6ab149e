"""One open model for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from squall import Model


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    with Model.open(context=512) as opened:
        yield opened
