"""
What the fuzz tests share: how many examples, and how real files are damaged.

The short form runs a fixed set of examples, the same on every machine. ``C7_FUZZ_EXAMPLES=<number>`` asks for a long
form with so many random ones of each target (a quarter of them where an example starts a process).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG_EXAMPLES = int(os.environ.get('C7_FUZZ_EXAMPLES', '0'))


def fuzz(examples: int, *, share: float = 1.0) -> settings:
    """
    Return the settings of one target.

    :param examples: of the short form.
    :param share: of ``C7_FUZZ_EXAMPLES`` that this target runs in the long form.
    """
    return settings(
        max_examples=max(1, round(LONG_EXAMPLES * share)) if LONG_EXAMPLES else examples,
        derandomize=not LONG_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw: st.DrawFn, content: bytes, others: tuple[bytes, ...] = (), most: int = 4) -> bytes:
    """Flip, overwrite, cut, insert, repeat, truncate or splice, a few times; never what went in."""
    result = content
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(('flip', 'overwrite', 'cut', 'insert', 'repeat', 'truncate', 'splice', 'word')))
        at = draw(st.integers(0, max(0, len(result) - 1)))
        end = draw(st.integers(at, len(result)))
        if kind == 'flip' and result:
            result = result[:at] + bytes([result[at] ^ 1 << draw(st.integers(0, 7))]) + result[at + 1 :]
        elif kind == 'overwrite':
            piece = draw(st.binary(min_size=1, max_size=32))
            result = result[:at] + piece + result[at + len(piece) :]
        elif kind == 'cut':
            result = result[:at] + result[end:]
        elif kind == 'insert':
            result = result[:at] + draw(st.binary(min_size=1, max_size=32)) + result[at:]
        elif kind == 'repeat':
            result = result[:end] + result[at:end][:4096] * draw(st.integers(1, 4)) + result[end:]
        elif kind == 'truncate':
            result = result[:at]
        elif kind == 'splice':
            other = draw(st.sampled_from((content, *others)))
            result = result[:at] + other[draw(st.integers(0, len(other))) :]
        else:
            # Lengths and counts: where a byte flip says a little too much, these say far too much.
            word = draw(st.sampled_from((b'\xff' * 4, b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f', bytes(4), b'\x80' * 9)))
            result = result[:at] + word + result[at + len(word) :]
    if result == content:
        result = content[:-1]
    return result


def nested(depth: int, *, objects: bool = False) -> Any:
    """Return a list (or an object) in a list, so many times."""
    value: Any = 1
    for _ in range(depth):
        value = {'a': value} if objects else [value]
    return value


HOSTILE_VALUES = st.one_of(
    st.sampled_from(
        (
            None, True, False, 0, -1, 1, 2, 1 << 31, 1 << 63, -(1 << 64), 10**400, 10**4000, 0.5, -0.0, 1e308, 1e300,
            1e-320, float('nan'), float('inf'), '', ' ', '\0', '\ud800', '\udfff\ud800', '..', '../../etc/passwd',
            '/etc/passwd', 'model.json', 'x' * 2000, 'a/' * 3000, '\u202e', '1', 'float32', 'object', 'sha256:',
            [], {}, [None], [[]], {'': {}}, [1] * 70, [0, 1 << 62, 1 << 62], list(range(300)), {'a': 1, 'b': [2]},
        )
    ),
    st.builds(nested, st.integers(2, 1100), objects=st.booleans()),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    ),
)  # fmt: skip


def places(value: Any, deepest: int = 8) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value, its own included, so many levels deep."""
    found: list[tuple[Any, ...]] = [()]
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict) and deepest:
        items = value.items()
    elif isinstance(value, list) and deepest:
        items = enumerate(value)
    for key, item in items:
        found += [(key, *rest) for rest in places(item, deepest - 1)]
    return found


def own(value: Any) -> Any:
    """Return a copy that can be changed; what is nested too deeply for that was made for one use anyway."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return value


@st.composite
def substituted(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove, copy or add values inside a JSON value, a few times."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        holder = value
        for key in path:
            holder = holder[key]
        kind = draw(st.sampled_from(('replace', 'replace', 'replace', 'remove', 'add', 'copy')))
        if kind == 'replace':
            holder[last] = own(draw(HOSTILE_VALUES))
        elif kind == 'remove':
            del holder[last]
        elif kind == 'add':
            extra = own(draw(HOSTILE_VALUES))
            if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = extra
            else:
                holder.insert(last, extra)
        else:
            source = value
            for key in draw(st.sampled_from(paths)):
                if not isinstance(source, dict | list) or (isinstance(source, list) and key not in range(len(source))):
                    break
                if isinstance(source, dict) and key not in source:
                    break
                source = source[key]
            holder[last] = own(source)
    return value


def json_text(value: Any) -> str:
    """
    Return JSON text of a value that may be nested deeper than the encoder goes.

    NaN and infinity are spelled as Python's reader takes them, lone surrogates escaped.
    """
    pieces: list[str] = []
    stack: list[Any] = [(value,)]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            pieces.append(top)
            continue
        (item,) = top
        if isinstance(item, dict):
            stack.append('}')
            for index, (key, inner) in reversed(list(enumerate(item.items()))):
                stack += [(inner,), f'{", " if index else ""}{json.dumps(key)}: ']
            stack.append('{')
        elif isinstance(item, list):
            stack.append(']')
            for index, inner in reversed(list(enumerate(item))):
                stack += [(inner,), ', ' if index else '']
            stack.append('[')
        else:
            pieces.append(json.dumps(item))
    return ''.join(pieces)


@st.composite
def hostile_json(draw: st.DrawFn, value: Any) -> bytes:
    """Return JSON whose values were substituted, some with a key twice, some damaged as bytes besides."""
    text = json_text(draw(substituted(value)))
    kind = draw(st.sampled_from(('plain', 'plain', 'plain', 'twice', 'bytes', 'deep')))
    if kind == 'twice' and '": ' in text:
        colon = text.index('": ')
        key = text[text.rindex('"', 0, colon) : colon + 1]
        text = text.replace('{', f'{{{key}: 1, ', 1)
    elif kind == 'deep':
        depth = draw(st.integers(500, 60_000))
        text = text.replace('1', '[' * depth + ']' * depth, 1)
    content = text.encode()
    return draw(damaged(content)) if kind == 'bytes' and content else content
