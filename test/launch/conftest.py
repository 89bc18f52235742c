"""An environment that launch tests leave as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Undo what SetEnvironmentVariable does to this process, for the sake of the tests after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
