"""
How fast idle processor cores wake up, as a request to the kernel (PM QoS).

A frame passes through several threads and processes, each of which wakes up a core that may have gone to sleep. The
deeper it sleeps, the longer that takes: some microseconds to milliseconds, and on a virtual machine the scheduler
takes a sleeping core for unavailable. The kernel honours the lowest request of all programs, for as long as the file
that it was written to is open (Documentation/power/pm_qos_interface.rst).
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from gps_denied_c7.errors import C7Error

__all__ = ['CPU_LATENCY_DEVICE', 'CpuLatencyError', 'CpuLatencyRequest', 'CpuWakeup']

CPU_LATENCY_DEVICE = Path('/dev/cpu_dma_latency')
_REMEDY = (
    'Let this user write to the device, with a udev rule such as KERNEL=="cpu_dma_latency", GROUP="realtime", '
    'MODE="0660" and a place in that group; or leave cpu_wakeup_latency_us out.'
)


class CpuLatencyError(C7Error):
    """The kernel cannot be asked for cores that wake up fast."""


class CpuLatencyRequest:
    """
    Hold at most one request; for one thread at a time. The kernel drops it with this process, however that ends.

    :param device: that of the kernel.
    """

    def __init__(self, device: Path = CPU_LATENCY_DEVICE) -> None:
        self._device = device
        self._file: int | None = None

    def hold(self, latency_us: int) -> None:
        """
        Ask for cores that wake up within ``latency_us`` microseconds, instead of what was asked for before.

        :raises CpuLatencyError: the device is missing or may not be written; nothing is asked for any more then.
        """
        self.drop()
        try:
            self._file = os.open(self._device, os.O_WRONLY)
            os.write(self._file, struct.pack('i', latency_us))
        except OSError as error:
            self.drop()
            raise CpuLatencyError(
                f'cores cannot be asked to wake up within {latency_us} µs: {error}.', remedy=_REMEDY
            ) from error

    def drop(self) -> None:
        """Ask for nothing any more; safe to repeat."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


class CpuWakeup:
    """
    Have idle cores wake up fast while the node is active, and as they would otherwise; safe to call from any thread.

    :param latency_us: returns the longest time to wake up in microseconds, negative for none.
    :param warn: logs why the kernel cannot be asked.
    """

    def __init__(self, latency_us: Callable[[], int], warn: Callable[[str], object]) -> None:
        self._latency_us = latency_us
        self._warn = warn
        self._request = CpuLatencyRequest()
        self._lock = threading.Lock()
        self._active = False
        self._asked_us = -1
        self.problem = ''
        """Why the kernel does not grant it, a sentence with its remedy; empty where it does."""

    def on_activate(self) -> None:
        """Hold the request from now on."""
        self._hold(active=True)

    def on_deactivate(self) -> None:
        """Drop the request; safe to repeat."""
        self._hold(active=False)

    def on_settings(self) -> None:
        """Ask again where another latency is wanted, or where it was not granted."""
        if self.problem or self._latency_us() != self._asked_us:
            self._hold()

    def _hold(self, *, active: bool | None = None) -> None:
        with self._lock:
            self._active = self._active if active is None else active
            self.problem = ''
            self._asked_us = self._latency_us()
            if not self._active or self._asked_us < 0:
                self._request.drop()
                return
            try:
                self._request.hold(self._asked_us)
            except CpuLatencyError as error:
                self.problem = str(error)
                self._warn(self.problem)
