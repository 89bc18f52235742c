"""The pages of the documentation: every link, anchor and named file exists, every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.source_tree import REPOSITORY as ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def prose(page: Path) -> str:
    """Return a page without its code blocks, in which ``#`` and ``]( `` mean other things."""
    return re.sub(r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r'^#{1,6} (.+)$', prose(page), re.MULTILINE)
    plain = (re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading) for heading in headings)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in plain}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that lead to no file, or to no heading of one."""
    broken = []
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path):
    assert not broken_links(page)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path):
    files = re.findall(r'`((?:test|config|docs|launch|tools|requirements|gps_denied_c7)/[\w/.-]+)`', prose(page))
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [ROOT / 'README.md']
    while ahead:
        page = ahead.pop()
        reached.add(page)
        links = {(page.parent / link).resolve() for link in re.findall(r'\]\(([^)#\s]+\.md)(?:#[^)]*)?\)', prose(page))}
        ahead += links - reached - set(ahead)
    assert not set(PAGES) - reached


def test_a_link_to_nothing_is_noticed(tmp_path: Path):
    (tmp_path / 'other.md').write_text('# Of `two` words\n')
    page = tmp_path / 'page.md'
    links = '[a](other.md#of-two-words) [b](other.md#of-one) [c](gone.md) [d](#here)'
    page.write_text(f'{links}\n\n## Here\n\n```\n[e](code)\n```\n')
    assert broken_links(page) == ['other.md#of-one', 'gone.md']


def test_the_readme_is_short_and_keeps_the_test_command():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(readme.splitlines()) <= 200
    assert re.search(r'^make test$', readme, re.MULTILINE)
