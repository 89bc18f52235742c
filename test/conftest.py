"""What holds for every test: plain loggers, no litter in the home folder, and a word on what this machine lacks."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Helpers assert too, and their failures shall show the values. This comes before any of them is imported.
pytest.register_assert_rewrite('support', 'measure')

from support.keep_apart import keep_apart  # noqa: E402
from support.source_tree import TESTS  # noqa: E402

if TYPE_CHECKING:
    from gps_denied_c7.engines.manifest import HostProfile

# launch_testing's pytest plugin imports launch, whose logger class does not propagate: caplog would see nothing of the
# loggers that our modules make.
logging.setLoggerClass(logging.Logger)

# rcl and launch write their logs here; a test that looks at them names a folder of its own.
os.environ.setdefault('ROS_LOG_DIR', tempfile.mkdtemp(prefix='c7-test-log-'))

keep_apart()

# The same examples in every run, so that a change is all that can break the suite; make soak looks for new ones.
# No deadlines: how long an example takes is a matter of the machine.
hypothesis.settings.register_profile('fixed', derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile('random', database=None, deadline=None)
hypothesis.settings.load_profile('fixed')

# What some tests use where it imports. Their skips name it again, with the reason.
OPTIONAL = ('launch_testing', 'cv_bridge', 'rclpy', 'tensorrt', 'torch')


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which ROS the tests ran on, and which optional modules are absent."""
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    overlay = os.environ.get('C7_ROS_OVERLAY') or 'none'
    return [
        f'ROS_DISTRO: {os.environ.get("ROS_DISTRO") or "not set"}, C7_ROS_OVERLAY: {overlay}',
        f'absent here: {", ".join(absent) or "nothing"}',
    ]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test with its tier: the folder of test/ that it lies in."""
    item.add_marker(item.path.relative_to(TESTS).parts[0])


class ManualClock:
    """A steady clock in nanoseconds that goes as the test says."""

    ns = 0

    def __call__(self) -> int:
        return self.ns


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, and nothing in the environment that keeps a vendor's library from writing there."""
    home = tmp_path / 'home'
    home.mkdir()
    monkeypatch.setenv('HOME', str(home))
    for name in ('CI', 'ORT_DISABLE_TELEMETRY', 'XDG_CACHE_HOME', 'XDG_CONFIG_HOME', 'XDG_DATA_HOME'):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line of c7_engine; return its status, standard output and standard error."""
    from gps_denied_c7.ground.cli import main

    def run_line(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_line


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> HostProfile:
    """Make this the host that the engines of the tests were built for."""
    from gps_denied_c7.ground import compatibility, sweep, verify
    from support.engine_cache_files import HOST

    for module in (sweep, verify, compatibility):
        monkeypatch.setattr(module, 'local_host_profile', lambda: HOST)
    return HOST
