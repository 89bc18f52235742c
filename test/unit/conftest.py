"""Unit tests stay in this process."""

from __future__ import annotations

import os
import subprocess

import pytest


@pytest.fixture(autouse=True)
def no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a test starts a process: it belongs into test/process."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError('a unit test starts a process; move it to test/process')

    monkeypatch.setattr(subprocess.Popen, '__init__', refuse)
    monkeypatch.setattr(subprocess.Popen, '__del__', lambda process: None)
    monkeypatch.setattr(os, 'fork', refuse)
