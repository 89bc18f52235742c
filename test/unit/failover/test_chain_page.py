"""docs/explanation/chain.md says what the policy does."""

from __future__ import annotations

import pytest

from support import chain_page


def test_the_page_shows_the_policy_as_it_is():
    page = chain_page.PAGE.read_text(encoding='utf-8')
    assert page == chain_page.with_parts(page), 'PYTHONPATH=$PWD:$PWD/test python3 -m support.chain_page'


@pytest.mark.parametrize('part', chain_page.PARTS)
def test_every_part_is_there(part):
    page = chain_page.PAGE.read_text(encoding='utf-8')
    assert '\n'.join(chain_page.PARTS[part]()) in page
