"""
Text from outside, made fit for a log line, a record or a diagnostic status.

Image messages, parameters, file names, vendors' messages and the output of workers may hold any text of any length. All
text that leaves this process goes through here: characters that do not print become escapes as in Python's ``repr``,
and long text is cut.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from typing import Any

__all__ = ['TEXT_CHARACTERS', 'PlainText', 'bounded', 'plain', 'plain_lines', 'shortened', 'with_traceback']

TEXT_CHARACTERS = 2000
"""Longest line of a log, and longest text in a record or a status."""

_LINES = 200
_INDENT = '    '

# Of one record; a longer one is an attack or a mistake.
_TOTAL_CHARACTERS = 32_000
_KEY_CHARACTERS = 100
_ITEMS = 256
_DEPTH = 32
_LONGEST_NUMBER_BITS = 128


class PlainText(str):
    """A text that is fit to be logged as it is: lines that print, all but the first of them indented."""

    __slots__ = ()


def shortened(text: str, limit: int = TEXT_CHARACTERS) -> str:
    """
    Return ``text``, without its middle where it is longer than ``limit`` characters.

    The end is kept, since the remedy is there: ``beginning… (4,194,304 characters) …end``.
    """
    if len(text) <= limit:
        return text
    mark = f'… ({len(text):,} characters) …'
    kept = max(0, limit - len(mark))
    end = kept // 4
    return f'{text[: kept - end]}{mark}{text[len(text) - end :]}'


def plain(text: object, limit: int = TEXT_CHARACTERS) -> str:
    """
    Return ``text`` as one line that prints: other characters become escapes, as ``\\n`` or ``\\u202e``.

    That is what Python calls not printable: control characters, line and paragraph separators, what turns the direction
    of writing, halves of surrogate pairs, and white space but the blank itself.

    :param limit: characters of the result at most.
    """
    kept = shortened(_text_of(text), limit)
    if not kept.isprintable():
        kept = shortened(''.join(each if each.isprintable() else _escape(each) for each in kept), limit)
    return kept


def plain_lines(text: object) -> PlainText:
    """
    Return ``text`` of several lines, as a traceback: each as of :func:`plain`, all but the first indented.

    So none of them can be taken for another message of the log. Where there are very many, the middle is left out.
    """
    whole = _text_of(text)
    most = _LINES * TEXT_CHARACTERS
    if len(whole) > most:
        # Cut before it is taken apart; the lines that are kept come from its two ends.
        whole = f'{whole[: most // 2]}\n… ({len(whole):,} characters) …\n{whole[-(most // 2) :]}'
    # Not splitlines, which also parts at characters that only plain makes visible.
    lines = whole.split('\n')
    if len(lines) > _LINES:
        half = _LINES // 2
        lines = [*lines[:half], f'… ({len(lines):,} lines) …', *lines[-half:]]
    first, *others = (plain(line.rstrip('\r')) for line in lines)
    return PlainText('\n'.join([first, *(_INDENT + line for line in others)]))


def with_traceback(message: object, error: BaseException | None) -> PlainText:
    """Return ``message`` as one line, and below it, indented, the traceback of ``error`` where there is one."""
    if error is None:
        return PlainText(plain(message))
    trace = ''.join(traceback.format_exception(error)).rstrip('\n')
    return PlainText(f'{plain(message)}\n{_INDENT}{plain_lines(trace)}')


def bounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return what goes into a record: text as of :func:`plain`, numbers, booleans, None, and lists and objects of these.

    What JSON has no number for becomes text. Each key of ``values`` stays; from about 32,000 characters on, texts are
    cut to nothing, and of a list or an object only the first entries are kept.
    """
    return _Bounds().mapping(values, _DEPTH)


class _Bounds:
    """Count down what is left of one record."""

    def __init__(self) -> None:
        self._left = _TOTAL_CHARACTERS

    def mapping(self, values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for count, (key, value) in enumerate(values.items()):
            if count >= _ITEMS or (self._left <= 0 and depth < _DEPTH):
                kept['…'] = f'{len(values) - count:,} more'
                break
            kept[self._text(key, _KEY_CHARACTERS)] = self._value(value, depth - 1)
        return kept

    def _value(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            self._left -= 5
            return value
        if isinstance(value, int) and value.bit_length() <= _LONGEST_NUMBER_BITS:
            self._left -= 10
            return value
        if isinstance(value, float) and math.isfinite(value):
            self._left -= 10
            return value
        if isinstance(value, Mapping):
            return self.mapping(value, depth) if depth > 0 else '…'
        if isinstance(value, list | tuple | set | frozenset):
            return self._list(list(value), depth) if depth > 0 else '…'
        return self._text(value, TEXT_CHARACTERS)

    def _list(self, values: list[Any], depth: int) -> list[Any]:
        kept: list[Any] = []
        for count, value in enumerate(values):
            if count >= _ITEMS or self._left <= 0:
                kept.append(f'… ({len(values):,} in all)')
                break
            kept.append(self._value(value, depth - 1))
        return kept

    def _text(self, value: object, limit: int) -> str:
        text = plain(value, min(limit, max(40, self._left)))
        self._left -= len(text) + 2
        return text


def _text_of(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER_BITS:
        # Python refuses to spell out the longest.
        return f'a number of {value.bit_length():,} bits'
    try:
        return str(value)
    except Exception as error:  # an exception or a message of a vendor, whose text is made by its own code
        return f'{type(value).__name__} without a text ({type(error).__name__})'


def _escape(character: str) -> str:
    return character.encode('unicode_escape').decode('ascii')
