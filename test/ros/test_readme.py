"""README's tables say what the code does, and what the pages link to is there."""

import re
from pathlib import Path

import pytest

from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.flight_record import KINDS
from gps_denied_c7.ros.parameters import PARAMETERS, parameter_table
from support.source_tree import REPOSITORY

README = (REPOSITORY / 'README.md').read_text()


def test_every_parameter_is_described():
    section = re.search(r'<!-- parameters: begin.*?-->\n(.*?)\n?<!-- parameters: end -->', README, re.DOTALL)
    assert section is not None
    assert section[1].strip() == parameter_table().strip()
    assert all(f'`{declaration.name}`' in section[1] for declaration in PARAMETERS)


def test_every_record_kind_that_is_emitted_is_explained():
    source = ''.join(path.read_text() for path in REPOSITORY.glob('gps_denied_c7/**/*.py'))
    emitted = {kind for kind in KINDS if source.count(f"'{kind}'") > 1}
    assert emitted
    assert not {kind for kind in emitted if f'`{kind}`' not in README}


def test_the_model_json_shown_is_one_that_is_read(tmp_path: Path):
    shown = re.search(r'```json\n(.*?)```', README, re.DOTALL)
    assert shown is not None
    (tmp_path / 'model.json').write_text(shown[1].replace('…', '0' * 64))
    bundle = ModelBundle.load(tmp_path)
    assert [rule.output for rule in bundle.rules] == ['scores']
    assert bundle.artefacts_for('onnx_trt_ep')[0].path == tmp_path / 'superpoint.onnx'


PAGES = [REPOSITORY / 'README.md', *sorted((REPOSITORY / 'docs').glob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_what_the_pages_name_is_there(page: Path):
    """Links, and the files of this repository that are named by their path."""
    text = page.read_text()
    links = [link for link in re.findall(r'\]\(([^)#\s]+)\)', text) if '://' not in link]
    files = re.findall(r'`((?:test|config|docs|launch|gps_denied_c7)/[\w/.-]+)`', text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing + [file for file in files if not (REPOSITORY / file).exists()]
