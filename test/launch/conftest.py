"""The marker of launch tests, known also where launch_testing is not, and an environment that they leave as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register what launch_testing's plugin would."""
    config.addinivalue_line('markers', 'launch_test: generate_test_description of a launch test')


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Undo what SetEnvironmentVariable does to this process, for the sake of the tests after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
