"""What programs do to the network and to files, as the kernel sees it: strace (Debian: strace)."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support.left_behind import processes_naming

__all__ = ['Trace', 'elsewhere', 'why_not']

# docs/reference/files-and-sockets.md.
_NAMED = ('/dev/shm/fastrtps_', '/dev/shm/fastdds_', '/dev/shm/sem.', '/dev/null', '/dev/tty', '/proc/self/')

_CALLS = (
    'socket,connect,sendto,sendmsg,sendmmsg,open,openat,openat2,creat,mkdir,mkdirat,mknod,mknodat,rename,renameat,'
    'renameat2,link,linkat,symlink,symlinkat,truncate,unlink,unlinkat,rmdir'
)
# -D: the process that is started is the program's own.
_STRACE = ('strace', '-D', '-f', '-ff', '--seccomp-bpf', '-qq', '-y', '-s', '512',
           '-e', f'trace={_CALLS}', '-e', 'signal=none')
_CALL = re.compile(r'(\w+)\((.*)\) += (-?\w+)(?: (E\w+))?')
_ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\), (?:sin_addr=inet_addr\(|.*?inet_pton\(AF_INET6, )"([^"]+)"')
# With the directory that a relative one starts from, as -y shows it.
_PATH = re.compile(r'(?:\w+<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


def why_not() -> str:
    """Return why nothing can be traced here, empty where it can."""
    if shutil.which('strace') is None:
        return 'strace is not installed: sudo apt-get install -y strace'
    with tempfile.TemporaryDirectory() as directory:
        # Where strace cannot write, the program that it was to trace stands still.
        command = [*_STRACE, '-o', f'{directory}/tried', 'true']
        try:
            tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20.0)
        except subprocess.TimeoutExpired:
            return 'strace may not trace here: the program that it was to trace stands still'
    return f'strace may not trace here: {tried.stderr.strip()}' if tried.returncode else ''


@dataclass(frozen=True)
class Trace:
    """
    Hold the system calls of a program and all its children.

    :param directory: one file for each thread, as strace writes them.
    """

    directory: Path

    @property
    def command(self) -> list[str]:
        """The words that go before a command to trace it."""
        self.directory.mkdir(exist_ok=True)
        return [*_STRACE, '-o', str(self.directory / 'thread')]

    def calls(self) -> list[tuple[str, str, str]]:
        """Return (name, arguments, error) of each call."""
        deadline = time.monotonic() + 10.0
        while processes_naming(self.directory) and time.monotonic() < deadline:
            time.sleep(0.02)
        files = self.directory.glob('thread.*')
        lines = (line for path in files for line in path.read_text('utf-8', 'replace').splitlines())
        calls = [(call[1], call[2], call[4] or '') for line in lines if (call := _CALL.match(line))]
        assert calls, 'nothing was traced'
        return calls

    def internet_sockets(self) -> list[str]:
        """Return the calls that make a socket of IPv4 or IPv6."""
        return [f'{name}({words})' for name, words, _ in self.calls() if name == 'socket' and 'AF_INET' in words]

    def addresses(self) -> set[tuple[str, int]]:
        """Return the addresses and ports that were connected or sent to."""
        return {
            (address, int(port)) for name, words, _ in self.calls() if name.startswith(('connect', 'send'))
            for port, address in _ADDRESS.findall(words)
        }  # fmt: skip

    def written(self) -> set[Path]:
        """Return the files and directories that were opened for writing, made, renamed or removed, or tried to be."""
        found = set()
        for name, words, error in self.calls():
            paths = [Path(directory, path) for directory, path in _PATH.findall(words)]
            if name.startswith('open'):
                writes = re.search('O_WRONLY|O_RDWR|O_CREAT|O_TRUNC', words)
                # What is not there, and is not made, is not written.
                if not writes or (error == 'ENOENT' and 'O_CREAT' not in words):
                    continue
            elif name in ('socket', 'connect') or name.startswith('send') or error in ('ENOENT', 'EEXIST'):
                continue
            found.update(paths)
        return found


def elsewhere(trace: Trace, *named: Path) -> set[Path]:
    """Return what was written outside the directories that the documentation names."""
    kept = (*map(str, named), *_NAMED)
    return {path for path in trace.written() if not str(path).startswith(kept) and '__pycache__' not in path.parts}
