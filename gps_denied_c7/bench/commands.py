"""Line by line of JSON between the benchmark and its children."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any, TextIO

__all__ = ['CommandLine']


class CommandLine:
    """
    Take commands from standard input and answer on standard output, one JSON object a line each.

    Make it before anything else: from then on what libraries print on standard output, as Fast DDS does with its
    errors, goes to standard error.
    """

    def __init__(self) -> None:
        self._output: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), 'w', encoding='utf-8')
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._commands.put(json.loads(line))
        self._commands.put(None)

    def poll(self) -> dict[str, Any] | None:
        """
        Return the next command, None where there is none yet.

        :raises EOFError: there will be none any more.
        """
        try:
            command = self._commands.get_nowait()
        except queue.Empty:
            return None
        if command is None:
            raise EOFError
        return command

    def wait(self) -> dict[str, Any]:
        """
        Return the next command once it has come.

        :raises EOFError: there will be none any more.
        """
        command = self._commands.get()
        if command is None:
            raise EOFError
        return command

    def answer(self, values: dict[str, Any]) -> None:
        """Send one object."""
        print(json.dumps(values), file=self._output, flush=True)
