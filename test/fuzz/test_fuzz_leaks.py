"""F-1: a long row of damaged input leaves neither descriptors nor memory behind in this process."""

from __future__ import annotations

import gc
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.fuzz_bundles import make_bundle, use
from support.fuzz_channel import MESSAGES, answer_from, lay_out, load_from, packet_of
from support.fuzz_images import FILES, decode_file

_PAGE_BYTES = os.sysconf('SC_PAGE_SIZE')
_ROUNDS, _OF = 4, 150
# What allocators keep; a leak of one small image or segment in each attempt is more.
_SLACK_BYTES = 24 << 20


def flip(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def usage() -> tuple[int, int]:
    """Return open descriptors and resident bytes."""
    gc.collect()
    return len(os.listdir('/proc/self/fd')), int(Path('/proc/self/statm').read_text().split()[1]) * _PAGE_BYTES


def attempts(root: Path, process: subprocess.Popen) -> dict[str, Callable[[random.Random], object]]:
    whole = (root / 'model.json').read_bytes()
    packets = [packet_of(message) for message in MESSAGES]

    def bundle(chance: random.Random) -> None:
        (root / 'model.json').write_bytes(flip(whole, chance))
        use(root)

    return {
        'bundles': bundle,
        'images': lambda chance: decode_file('jpeg', flip(chance.choice(FILES), chance)),
        'answers': lambda chance: answer_from(process, [[flip(chance.choice(packets), chance), packets[0]]] * 2, True),
        'loads': lambda chance: load_from(process, [flip(packets[-1], chance)]),
        'layouts': lambda chance: lay_out([[['x', 'float32', [chance.randint(-1, 99)], chance.randint(-1, 300)]]]),
    }


@pytest.mark.parametrize('name', ['bundles', 'images', 'answers', 'loads', 'layouts'])
def test_f1_nothing_of_damaged_input_stays(
    tmp_path: Path, idle_process: subprocess.Popen, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr('gps_denied_c7.worker.process._EXIT_CODE_S', 0.0)
    attempt = attempts(make_bundle(tmp_path / 'net'), idle_process)[name]
    chance = random.Random(7)
    usages = []
    for _ in range(_ROUNDS):
        for _ in range(_OF):
            attempt(chance)
        usages.append(usage())
    print(name, usages)
    assert usages[-1][0] == usages[0][0], usages
    assert usages[-1][1] - usages[0][1] < _SLACK_BYTES, usages
