"""How much GPU memory this process takes while it loads an engine; for workers, since NVML's calls can hang."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.runtimes.gpu.cuda import open_cuda

__all__ = ['GpuMemoryWatch']

_PERIOD_S = 0.02
_READ_S = 1.0

# Bytes that this process takes, None where the driver does not tell, and that all processes together take.
_Reader = Callable[[], tuple[int | None, int]]

_log = logging.getLogger(__name__)


class GpuMemoryWatch:
    """
    Watch the GPU memory of this process, from a thread of its own, while the ``with`` block runs.

    NVML tells what each process takes, CUDA's own context included. Where it does not, as in a container that hides
    process numbers, on what the GPU as a whole has more than before counts; where NVML is missing, as on a Jetson,
    CUDA is asked the same, and its context does not count.
    """

    def __init__(self) -> None:
        self._readings: list[tuple[int | None, int]] = []
        self._first = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name='c7-gpu-memory', daemon=True)

    def __enter__(self) -> GpuMemoryWatch:
        self._thread.start()
        # What others take meanwhile is not to be mistaken for this process's.
        self._first.wait(_READ_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(_READ_S)

    @property
    def peak_bytes(self) -> int | None:
        """The most that was taken at a time, None where that is not known."""
        return self._most(self._readings[1:])

    @property
    def final_bytes(self) -> int | None:
        """What was taken at the end, None where that is not known."""
        return self._most(self._readings[1:][-1:])

    def _most(self, readings: list[tuple[int | None, int]]) -> int | None:
        own = [mine for mine, _ in readings if mine is not None]
        if own:
            return max(own)
        before = self._readings[0][1] if self._readings else 0
        return max((total - before for _, total in readings), default=None)

    def _run(self) -> None:
        try:
            read = _nvml_reader() or _cuda_reader()
            if read is None:
                return
            self._readings.append(read())
            self._first.set()
            while not self._ended.wait(_PERIOD_S):
                self._readings.append(read())
            self._readings.append(read())
        except Exception as error:
            _log.warning('the GPU memory of this engine is not known: %s', error)
        finally:
            self._first.set()


def _nvml_reader() -> _Reader | None:
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        read = _of_nvml(nvml, devices)
        read()
    except nvml.NVMLError as error:
        _log.debug('NVML does not report memory: %s', error)
        return None
    return read


def _of_nvml(nvml: Any, devices: list[Any]) -> _Reader:
    def read() -> tuple[int | None, int]:
        total = sum(int(nvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices)
        mine = [
            int(process.usedGpuMemory)
            for device in devices
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)
            if process.pid == os.getpid() and process.usedGpuMemory is not None
        ]
        return sum(mine) if mine else None, total

    return read


def _cuda_reader() -> _Reader | None:
    try:
        cuda = open_cuda('gpu memory')
    except RuntimeUnavailableError as error:
        _log.debug('CUDA does not report memory: %s', error)
        return None

    def read() -> tuple[int | None, int]:
        free, total = cuda.memory()
        return None, total - free

    return read
