"""What building and running share of TensorRT's Python API, 8.5 to 11: its log, its errors, its types."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from gps_denied_c7.errors import RuntimeUnavailableError

__all__ = ['ERROR_LIMIT', 'dtype_name', 'error_recorder', 'import_tensorrt', 'listening', 'vendor_logger']

ERROR_LIMIT = 16

# By TensorRT's own name; those that NumPy lacks are refused.
_DTYPES = {
    'BOOL': 'bool',
    'FLOAT': 'float32',
    'HALF': 'float16',
    'INT8': 'int8',
    'INT32': 'int32',
    'INT64': 'int64',
    'UINT8': 'uint8',
}

# TensorRT's INFO is what others call DEBUG: memory figures on every step.
_LEVELS = {'INTERNAL_ERROR': logging.CRITICAL, 'ERROR': logging.ERROR, 'WARNING': logging.WARNING}

_log = logging.getLogger('gps_denied_c7.tensorrt')
_listeners: list[Callable[[str], None]] = []
_making = threading.Lock()
_logger: Any = None


def import_tensorrt(label: str) -> ModuleType:
    """
    Return the tensorrt module.

    :param label: the runtime that asks, for the error.
    :raises RuntimeUnavailableError: it does not import.
    """
    try:
        import tensorrt
    except Exception as error:  # a library that is not there surfaces as ImportError, OSError or RuntimeError
        raise RuntimeUnavailableError(
            label, f'tensorrt does not import: {error}.', remedy='pip install -r requirements/gpu.txt'
        ) from error
    return tensorrt


def vendor_logger(trt: ModuleType) -> Any:
    """
    Return the process's one TensorRT logger, which forwards to ``logging``; TensorRT keeps the first it meets.

    Nothing of TensorRT is made without it, so NVIDIA's plugins are registered together with it.
    """
    global _logger
    with _making:
        if _logger is None:
            _logger = _logger_class(trt)()
            if not trt.init_libnvinfer_plugins(_logger, ''):
                _log.warning('the plugins of TensorRT were not registered: engines that need one are refused')
        return _logger


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Have every message of TensorRT, chatter included, passed to ``listener`` while the context lasts."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def error_recorder(trt: ModuleType) -> Any:
    """
    Return a new IErrorRecorder with ``messages()`` beside TensorRT's methods.

    It must outlive what it is attached to. Attach one to each object: messages then tell whose they are.
    """
    return _recorder_class(trt)()


def dtype_name(dtype: Any) -> str | None:
    """Return NumPy's name of a TensorRT data type, None where NumPy has none."""
    return _DTYPES.get(dtype.name)


def _logger_class(trt: ModuleType) -> type:
    class ForwardingLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Forward to ``logging``."""

        def __init__(self) -> None:
            # By name: the binding's class does not take part in super().
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # The caller is C++ code declared noexcept: an exception from here ends the process.
            try:
                for listener in tuple(_listeners):
                    listener(message)
                _log.log(_LEVELS.get(severity.name, logging.DEBUG), '%s', message)
            except Exception:
                _log.debug('a message of TensorRT could not be forwarded', exc_info=True)

    return ForwardingLogger


def _recorder_class(trt: ModuleType) -> type:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc, name-defined]
        """Keep the last errors of one TensorRT object; its methods are called from any thread."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: deque[tuple[Any, str]] = deque(maxlen=ERROR_LIMIT)
            self._overflowed = False

        def messages(self) -> list[str]:
            """Return what was reported since the last :meth:`clear`, oldest first."""
            return [f'{getattr(code, "name", code)}: {text}' for code, text in tuple(self._errors)]

        def num_errors(self) -> int:
            return len(self._errors)

        # C++ asks under this name.
        get_num_errors = num_errors

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0] if 0 <= index < len(self._errors) else trt.ErrorCodeTRT.SUCCESS

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1] if 0 <= index < len(self._errors) else ''

        def has_overflowed(self) -> bool:
            return self._overflowed

        def clear(self) -> None:
            self._errors.clear()
            self._overflowed = False

        def report_error(self, code: Any, text: str) -> bool:
            self._overflowed |= len(self._errors) == ERROR_LIMIT
            self._errors.append((code, text))
            # Not fatal to the object as a whole; the failing call says so itself.
            return False

    return Recorder
