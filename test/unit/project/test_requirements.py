"""The requirements of docs/architecture.md are those that code and tests name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from support.source_tree import REPOSITORY as ROOT

ARCHITECTURE = ROOT / 'docs' / 'architecture.md'

_ID = re.compile(r'\b(?:AC|B|F|G|M|N|R|Risk)-\d+\b')
# test_f2_..., test_n10_..., test_risk2_...
_TEST = re.compile(r'\bdef test_(ac|b|f|g|m|n|r|risk)(\d+)_')
_PREFIX = {'risk': 'Risk'}


def named_in(text: str) -> set[str]:
    """Return the identifiers that a source file names, in words or in the names of its tests."""
    tests = {f'{_PREFIX.get(prefix, prefix.upper())}-{number}' for prefix, number in _TEST.findall(text)}
    return set(_ID.findall(text)) | tests


def listed_in(text: str) -> list[str]:
    """Return the identifiers of the list, in its order."""
    table = text.partition('<!-- requirements: begin -->')[2].partition('<!-- requirements: end -->')[0]
    return re.findall(r'^\| \*\*(.+?)\*\* \| \S.+ \|$', table, re.MULTILINE)


def sources() -> Iterable[Path]:
    for folder in ('gps_denied_c7', 'test', 'tools', 'launch'):
        yield from sorted((ROOT / folder).rglob('*.py'))


def test_each_identifier_is_listed_once_and_each_listed_one_is_used():
    used = set().union(*(named_in(path.read_text(encoding='utf-8')) for path in sources() if path != Path(__file__)))
    listed = listed_in(ARCHITECTURE.read_text(encoding='utf-8'))
    assert used and used == set(listed)
    assert len(listed) == len(set(listed))


def test_pages_name_listed_identifiers_only():
    listed = set(listed_in(ARCHITECTURE.read_text(encoding='utf-8')))
    pages = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').rglob('*.md')]
    assert not {name for page in pages for name in _ID.findall(page.read_text(encoding='utf-8'))} - listed


def test_an_identifier_is_found_in_words_and_in_the_names_of_tests():
    assert named_in('# F-2, not AF-3 or F-x\ndef test_n10_live(): ...\ndef test_risk2_once(): ...\n') == {
        'F-2', 'N-10', 'Risk-2',
    }
    table = '<!-- requirements: begin -->\n| **F-2** | The chain. |\n<!-- requirements: end -->\n'
    assert listed_in(f'{table}| **F-9** | Not in the table. |\n') == ['F-2']
