"""The reference pages agree with the code that they describe."""

import re
from pathlib import Path

from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.flight_record import KINDS
from gps_denied_c7.ros.parameter_table import PARAMETERS, parameter_table

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / 'docs' / 'reference'


def test_every_parameter_is_described():
    page = (REFERENCE / 'parameters.md').read_text()
    section = re.search(r'<!-- parameters: begin.*?-->\n(.*?)\n?<!-- parameters: end -->', page, re.DOTALL)
    assert section is not None
    assert section[1].strip() == parameter_table().strip()
    assert all(f'`{declaration.name}`' in section[1] for declaration in PARAMETERS)


def test_every_record_kind_that_is_emitted_is_explained():
    page = (REFERENCE / 'flight-records.md').read_text()
    source = ''.join(path.read_text() for path in ROOT.glob('gps_denied_c7/**/*.py'))
    emitted = {kind for kind in KINDS if source.count(f"'{kind}'") > 1}
    assert emitted
    assert not {kind for kind in emitted if f'`{kind}`' not in page}


def test_the_model_json_shown_is_one_that_is_read(tmp_path: Path):
    (shown,) = re.findall(r'```json\n(.*?)```', (REFERENCE / 'model-bundle.md').read_text(), re.DOTALL)
    (tmp_path / 'model.json').write_text(shown.replace('…', '0' * 64))
    bundle = ModelBundle.load(tmp_path)
    assert bundle.name == 'superpoint'
    assert [rule.output for rule in bundle.rules] == ['scores']
    assert bundle.artefacts_for('onnx_trt_ep')[0].path == tmp_path / 'superpoint.onnx'
