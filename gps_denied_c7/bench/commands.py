"""Line by line of JSON between the benchmark and its children."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable
from typing import Any

__all__ = ['CommandLine']


class CommandLine:
    """
    Take commands from standard input and answer on standard output, one JSON object a line each.

    Make it before anything else: from then on what libraries print on standard output, as Fast DDS does with its
    errors, goes to standard error.
    """

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(sys.stdout.fileno()), 'w', encoding='utf-8')
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def serve(self, answer: Callable[..., dict[str, Any]], *, meanwhile: Callable[[], object] | None = None) -> None:
        """
        Say that this process is ready, and answer each command until standard input ends.

        The benchmark sends a command once it has the answer to the one before.

        :param answer: gets what the command says by name.
        :param meanwhile: called again and again while no command has come.
        """
        self._say({'ready': True})
        while True:
            while meanwhile is not None and not select.select([sys.stdin], [], [], 0)[0]:
                meanwhile()
            line = sys.stdin.readline()
            if not line:
                return
            self._say(answer(**json.loads(line)))

    def _say(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._output, flush=True)
