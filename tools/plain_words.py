#!/usr/bin/env python3
"""
Find words that a reader on a field trip has to think about; ``plain_words.txt`` beside this file lists them.

Without arguments everything that a person reads is checked, except what the list calls pending; with paths, those
files and folders, pending or not. Prose is strings, docstrings, comments and pages: code in backticks and in code
blocks is left out, labels of Mermaid diagrams are not.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix('.txt')
CHECKED = (
    'gps_denied_c7', 'launch', 'config', 'tools', 'msg', 'docs', 'setup.py', 'package.xml', 'Makefile', 'README.md',
    'CONTRIBUTING.md', 'CHANGELOG.rst',
)  # fmt: skip
# Laboratory notes, and the list itself.
UNCHECKED = ('docs/notes', 'tools/plain_words.txt')
SUFFIXES = ('.py', '.md', '.rst', '.yaml', '.xml', '.msg')


@dataclass(frozen=True)
class Rule:
    """One pattern that prose must not contain, and what to write instead."""

    pattern: re.Pattern[str]
    plain: str


@dataclass(frozen=True)
class WordList:
    """
    What ``plain_words.txt`` says.

    :param people: phrases about people, in which words like ``who`` are right.
    :param pending: files and folders that are not checked unless they are named.
    """

    words: tuple[Rule, ...]
    names: tuple[Rule, ...]
    people: tuple[str, ...]
    pending: tuple[str, ...]

    @classmethod
    def read(cls, path: Path = LIST) -> WordList:
        """
        Read a list.

        :raises ValueError: a line is not ``pattern -> plain form``, or is in no known section.
        """
        sections: dict[str, list[str]] = {'words': [], 'names': [], 'people': [], 'pending': []}
        lines: list[str] | None = None
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            text = line.strip()
            if text.startswith('[') and text.endswith(']') and text[1:-1] in sections:
                lines = sections[text[1:-1]]
            elif text and not text.startswith('#'):
                if lines is None:
                    raise ValueError(f'{path}:{number}: this line is in no section.')
                lines.append(text)
        words, names = (tuple(map(_rule, sections[name])) for name in ('words', 'names'))
        return cls(words, names, tuple(sections['people']), tuple(sections['pending']))


def _rule(line: str) -> Rule:
    pattern, arrow, plain = line.partition(' -> ')
    if not arrow:
        raise ValueError(f'{line!r} is not "pattern -> plain form".')
    return Rule(re.compile(rf'\b(?:{pattern.strip()})\b', re.IGNORECASE), plain.strip())


def findings(path: Path, words: WordList) -> Iterator[str]:
    """Yield one line for each word of a file that is on the list."""
    source = path.read_text(encoding='utf-8')
    for number, text in prose(path.suffix, source):
        for rule in words.words:
            for match in rule.pattern.finditer(text):
                around = text[max(0, match.start() - 40) : match.end() + 40]
                if not any(phrase in around for phrase in words.people):
                    yield f'{_shown(path)}:{number}: "{match.group()}" in "{around}": {rule.plain}'
    if path.suffix == '.py':
        for number, name in defined_names(source):
            for rule in words.names:
                if rule.pattern.search(name.replace('_', ' ')):
                    yield f'{_shown(path)}:{number}: name {name}: {rule.plain}'


def prose(suffix: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield what a person reads in a file: the number of the first line, and the text on one line."""
    texts = python_prose(source) if suffix == '.py' else page_prose(source)
    for number, text in texts:
        yield number, ' '.join(re.sub(r'``.+?``|`[^`]+`', '`code`', text, flags=re.DOTALL).split())


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the strings of a module, ``{}`` for what f-strings compute, and its comments, one block each."""
    parts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inner = [each for each in ast.walk(node) if isinstance(each, ast.Constant)]
            parts.update(map(id, inner))
            yield node.lineno, ''.join(
                each.value if isinstance(each, ast.Constant) and isinstance(each.value, str) else '{}'
                for each in node.values
            )
            # A string inside the braces is text as well.
            for each in inner:
                if isinstance(each.value, str) and each not in node.values:
                    yield each.lineno, each.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number = token.start[0]
            if block and number != last + 1:
                yield first, ' '.join(block)
                block = []
            first, last = (first if block else number), number
            block.append(token.string.lstrip('#:!').replace('fmt: skip', '').strip())
    if block:
        yield first, ' '.join(block)


def page_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs of a page; code blocks are left out, Mermaid diagrams are text."""
    paragraph: list[str] = []
    first = 1
    fence = ''
    for number, line in enumerate([*source.splitlines(), ''], 1):
        text = line.strip().lstrip('#').strip()
        if text.startswith('```'):
            fence = '' if fence else text
            text = ''
        if fence and fence != '```mermaid':
            continue
        if text:
            first = first if paragraph else number
            paragraph.append(text)
        elif paragraph:
            yield first, ' '.join(paragraph)
            paragraph = []


def defined_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield the names that a module defines: classes, functions, arguments, variables, attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def files(paths: list[Path]) -> Iterator[Path]:
    """Yield the files below these paths that hold prose."""
    for path in paths:
        for file in sorted(path.rglob('*')) if path.is_dir() else [path]:
            if file.is_file() and (file.suffix in SUFFIXES or file == path) and '__pycache__' not in file.parts:
                yield file


def is_below(path: Path, folders: tuple[str, ...]) -> bool:
    """Tell whether a path is one of these or lies in one; they are named from the repository's root."""
    return any(path == ROOT / folder or ROOT / folder in path.parents for folder in folders)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if ROOT in path.parents else str(path)


def main(arguments: list[str] | None = None) -> int:
    """Check files; returns 1 where a word of the list was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='files and folders; default: the repository')
    parser.add_argument('--text', action='store_true', help='print all prose, for reading it aloud')
    options = parser.parse_args(arguments)
    words = WordList.read()
    without = UNCHECKED if options.paths else (*UNCHECKED, *words.pending)
    paths = [path.resolve() for path in options.paths] or [ROOT / name for name in CHECKED]
    checked = [path for path in files(paths) if not is_below(path, without)]
    if options.text:
        for path in checked:
            print(f'\n== {_shown(path)}')
            for number, text in sorted(prose(path.suffix, path.read_text(encoding='utf-8'))):
                if ' ' in text.strip():
                    print(f'{number}: {text}')
        return 0
    found = [line for path in checked for line in findings(path, words)]
    print('\n'.join(found) or f'{len(checked)} files: no word of {LIST.name} found')
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
