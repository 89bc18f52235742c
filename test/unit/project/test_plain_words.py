"""The word list: what a person reads has none of its words, and the checker finds one wherever it is put."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.source_tree import REPOSITORY


def load_checker() -> ModuleType:
    """Return ``tools/plain_words.py``, which is not a module of the package."""
    spec = importlib.util.spec_from_file_location('plain_words', REPOSITORY / 'tools' / 'plain_words.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['plain_words'] = module
    spec.loader.exec_module(module)
    return module


checker = load_checker()
LISTED = """
[words]
stands by -> is the standby
whoever -> name the program
[names]
tells? -> report
[people]
whoever flies the drone
[pending]
"""

PLANTED = {
    'string': ('a.py', "text = 'an engine stands by'\n"),
    'string in two parts': ('a.py', "text = ('an engine stands '\n        'by')\n"),
    'f-string': ('a.py', "text = f'{name} stands by'\n"),
    'string within an f-string': ('a.py', "text = f'{\"one stands by\" if name else 0}'\n"),
    'docstring': ('a.py', '"""Module.\n\nAn engine stands\nby.\n"""\n'),
    'comment': ('a.py', 'x = 1  # whoever it is\n'),
    'comment of two lines': ('a.py', '# An engine stands\n# by.\nx = 1\n'),
    'function': ('a.py', 'def _tell_all():\n    pass\n'),
    'argument': ('a.py', 'def f(tell):\n    pass\n'),
    'attribute': ('a.py', 'self.tells = 1\n'),
    'page': ('a.md', '# Title\n\nAn engine stands\nby.\n'),
    'diagram': ('a.md', '```mermaid\nflowchart LR\n  a[stands by]\n```\n'),
    'parameter file': ('a.yaml', 'x: 1  # what stands by\n'),
}

PLAIN = {
    'code in a docstring': ('a.py', '"""See ``stands by``."""\n'),
    'a name that is used': ('a.py', 'file.tell()\n'),
    'a person': ('a.py', '"""For whoever flies the drone."""\n'),
    'code on a page': ('a.md', 'See `stands by`.\n\n```sh\nstands by\n```\n'),
    'part of a word': ('a.md', 'Upstands bypass.\n'),
}


@pytest.fixture
def words(tmp_path: Path) -> object:
    path = tmp_path / 'list.txt'
    path.write_text(LISTED, encoding='utf-8')
    return checker.WordList.read(path)


@pytest.mark.parametrize('place', PLANTED)
def test_a_planted_word_is_found(place: str, words: object, tmp_path: Path) -> None:
    name, content = PLANTED[place]
    (tmp_path / name).write_text(content, encoding='utf-8')
    (found,) = checker.findings(tmp_path / name, words)
    assert found.startswith(f'{tmp_path / name}:')


@pytest.mark.parametrize('place', PLAIN)
def test_what_is_not_prose_is_left_alone(place: str, words: object, tmp_path: Path) -> None:
    name, content = PLAIN[place]
    (tmp_path / name).write_text(content, encoding='utf-8')
    assert not list(checker.findings(tmp_path / name, words))


def test_the_command_fails_for_a_planted_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the project's own list, and for a folder that is pending too."""
    path = tmp_path / 'a.py'
    path.write_text("text = 'the engine that stands by'\n", encoding='utf-8')
    assert checker.main([str(path)]) == 1
    assert f'{path}:1: "stands by"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('content', 'problem'), [('stands by -> x\n', 'in no section'), ('[words]\nstands by\n', 'pattern -> plain form')]
)
def test_a_list_that_cannot_be_read_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / 'list.txt'
    path.write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match=problem):
        checker.WordList.read(path)


def test_the_project_is_written_in_plain_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main([]) == 0, capsys.readouterr().out


def test_the_list_names_what_exists() -> None:
    """No pending folder that has gone, no phrase about people that is written nowhere."""
    words = checker.WordList.read()
    named = (*checker.CHECKED, *checker.UNCHECKED, *words.pending)
    assert not [path for path in named if not (REPOSITORY / path).exists()]
    texts = [
        text
        for path in checker.files([REPOSITORY / name for name in checker.CHECKED])
        for _, text in checker.prose(path.suffix, path.read_text(encoding='utf-8'))
    ]
    assert not [phrase for phrase in words.people if not any(phrase in text for text in texts)]
