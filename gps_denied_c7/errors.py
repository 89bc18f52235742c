"""Every error the package raises, as one family: what is wrong, and what to do next."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterable, Iterator

__all__ = [
    'NO_THREADS_REMEDY',
    'C7Error',
    'ChainExhaustedError',
    'ConfigError',
    'EngineContentError',
    'EngineDeserializeError',
    'EngineSchemaMismatchError',
    'FdrSchemaError',
    'GpuMemoryError',
    'GpuUnavailableError',
    'ImageRejectedError',
    'InferenceError',
    'ModelBundleError',
    'RuntimeUnavailableError',
    'WorkerDiedError',
    'error_and_causes',
    'forget_locals',
    'in_one_line',
    'join_reasons',
]


NO_THREADS_REMEDY = 'Raise the limit of processes and threads: ulimit -u, or pids.max of the control group.'


class C7Error(Exception):
    """
    Carry a message and its remedy.

    :param message: what is wrong, naming the value found.
    :param remedy: what the reader does next, a full sentence; shown after the message.
    """

    is_lasting = False
    """Whether an error of this kind stays until a file, a package or a parameter changes."""

    def __init__(self, message: str, *, remedy: str = '') -> None:
        super().__init__(f'{message} {remedy}' if remedy else message)
        self.message = message
        self.remedy = remedy

    @property
    def lasting(self) -> bool:
        """Whether another attempt comes to the same until a file, a package or a parameter changes."""
        return self.is_lasting and not any(_may_pass(link) for link in error_and_causes(self))


class ConfigError(C7Error, ValueError):
    """A parameter or configuration value that cannot be used; ``name`` says which."""

    is_lasting = True

    def __init__(self, name: str, message: str, *, remedy: str = '') -> None:
        super().__init__(f'{name}: {message}', remedy=remedy)
        self.name = name


class ModelBundleError(C7Error):
    """A model bundle that is damaged, incomplete or contradicts itself."""

    is_lasting = True


class RuntimeUnavailableError(C7Error):
    """A runtime strategy that this host cannot offer; ``label`` says which."""

    is_lasting = True

    def __init__(self, label: str, message: str, *, remedy: str = '') -> None:
        super().__init__(f'runtime {label!r} is unavailable: {message}', remedy=remedy)
        self.label = label


class GpuUnavailableError(RuntimeUnavailableError):
    """No GPU, or none that starts: other than a package, it may come, as a driver's device files do after boot."""

    is_lasting = False


class EngineSchemaMismatchError(C7Error):
    """
    An engine file refused by the gate before any vendor library saw it.

    :param field: what was compared, as ``sm`` or ``engine_sha256``.
    """

    is_lasting = True

    def __init__(self, field: str, *, expected: object, found: object, remedy: str = '') -> None:
        super().__init__(f'engine refused: {field}: expected {expected!r}, found {found!r}.', remedy=remedy)
        self.field = field
        self.expected = expected
        self.found = found


class EngineDeserializeError(C7Error):
    """An engine or model that the runtime could not load, or loaded on refused hardware."""


class EngineContentError(EngineDeserializeError):
    """An engine or model that cannot be loaded because of its files' content; each attempt fails until they change."""

    is_lasting = True


class GpuMemoryError(EngineDeserializeError):
    """
    An engine that does not fit into what is left of the budget for GPU memory.

    :param needed_bytes: what it needs.
    :param left_bytes: what no other engine holds.
    """

    def __init__(self, message: str, *, needed_bytes: int, left_bytes: int, remedy: str = '') -> None:
        super().__init__(message, remedy=remedy)
        self.needed_bytes = needed_bytes
        self.left_bytes = left_bytes

    @property
    def lack_bytes(self) -> int:
        """How much memory other engines would have to free for it."""
        return self.needed_bytes - self.left_bytes


class InferenceError(C7Error):
    """A request that an engine failed: vendor error, non-finite output, wrong shape or dtype."""


class WorkerDiedError(InferenceError):
    """The process of an engine has ended: a crash of a vendor library, or a signal from outside."""


class ChainExhaustedError(C7Error):
    """
    No rung of the runtime chain is usable.

    :param causes: one ``(rung name, exception)`` for each rung tried, in chain order.
    """

    def __init__(self, causes: list[tuple[str, BaseException]], *, remedy: str = '') -> None:
        tried = join_reasons([(rung, str(cause)) for rung, cause in causes]) or 'the chain is empty'
        super().__init__(f'no usable runtime ({tried})', remedy=remedy)
        self.causes = causes

    @property
    def lasting(self) -> bool:
        """Whether every rung is out until a file, a package or a parameter changes."""
        return bool(self.causes) and all(isinstance(cause, C7Error) and cause.lasting for _, cause in self.causes)


class ImageRejectedError(C7Error, ValueError):
    """
    An image refused before inference.

    :param reason: a short stable key under which refusals are counted, as ``encoding`` or ``size``.
    """

    def __init__(self, reason: str, message: str, *, remedy: str = '') -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason


class FdrSchemaError(C7Error, ValueError):
    """A flight record of an unknown kind, or one that lacks a required field."""


_PACKAGES = {
    'cv2': 'Install OpenCV: apt-get install python3-opencv, or pip install opencv-python-headless.',
    'rclpy': 'Source ROS, or begin the command with: python3 tools/environment.py run',
    'gps_denied_c7_msgs': 'Run colcon build and source install/setup.bash.',
    'tabulate': 'pip install -r requirements/dev.txt',
}
"""How a Python package is installed that requirements/runtime.txt leaves out."""


def in_one_line(error: C7Error | ModuleNotFoundError) -> str:
    """Return what a program prints of an error of ours, or of a Python package that is missing, with the remedy."""
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    package = (error.name or str(error)).partition('.')[0]
    remedy = _PACKAGES.get(package, 'pip install -r requirements/runtime.txt')
    return f'the Python package {package} is not installed. {remedy}'


# The errors of a path that is wrong or may not be read. Other errors of a system pass, such as a stalled disk's.
_LASTING_ERRNO = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
)


# glibc's messages for a library that got no memory or descriptor (elf/dl-load.c): Python passes on the text alone.
_SHORT_OF = re.compile('failed to map segment|cannot map zero-fill pages|Cannot allocate memory|Too many open files')


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _LASTING_ERRNO
    if isinstance(error, (OSError, ImportError)):
        return isinstance(error, TimeoutError) or _SHORT_OF.search(str(error)) is not None
    return isinstance(error, MemoryError)


def join_reasons(reasons: Iterable[tuple[str, str]]) -> str:
    """Return ``(name, sentences)`` pairs as one line, ``name: sentences; name: sentences``."""
    return '; '.join(f'{name}: {text.removesuffix(".")}' for name, text in reasons)


def error_and_causes(error: BaseException) -> Iterator[BaseException]:
    """Return ``error`` and what it was raised from or while handling, each once, also where that leads in a circle."""
    seen: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen[id(link)] = link
            waiting += [link.__context__, link.__cause__]
            yield link


def forget_locals(error: BaseException) -> None:
    """Free what the functions that raised an error held: errors are kept for records, and frames with them."""
    for link in error_and_causes(error):
        traceback.clear_frames(link.__traceback__)
