"""What the fuzz tests share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope='module')
def idle_process() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(3600)'])
    yield process
    process.kill()
    process.wait()
