"""What a program has left running."""

from __future__ import annotations

import os
from pathlib import Path


def processes_naming(path: Path) -> list[int]:
    """Return the processes, but this one, whose command line or environment names ``path``."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            text = (entry / 'cmdline').read_bytes() + (entry / 'environ').read_bytes()
            state = (entry / 'stat').read_text().rpartition(')')[2].split()[0]
        except OSError:
            continue
        if os.fsencode(path) in text and state != 'Z' and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found
