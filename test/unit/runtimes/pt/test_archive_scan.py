"""R-4: nothing in a torch archive that could run is handed to torch; what torch's exporters write is."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError
from gps_denied_c7.runtimes.pt.archive_scan.archive import ArchiveKind, read_torch_archive, scan_torch_archive
from gps_denied_c7.runtimes.pt.archive_scan.strict_zip import ZipRefusedError, read_entries
from support.torch_attacks import (
    ENTRIES,
    LAYERS,
    ZIPS,
    legacy_tar,
)
from support.torch_files import (
    DATA,
    Touch,
    changed_program,
    entries_of,
    evil_expression,
    evil_pickle,
    saved,
    torch_zip,
)

REAL = sorted(path.name for path in DATA.glob('*.pt*'))
HAS_TORCH = importlib.util.find_spec('torch') is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason='torch is not installed')


def kind_of(name: str) -> ArchiveKind:
    return ArchiveKind.EXPORT if name.endswith('.pt2') else ArchiveKind.TORCHSCRIPT


def refusal(content: bytes, suffix: str, tmp_path: Path) -> str:
    path = tmp_path / f'model{suffix}'
    path.write_bytes(content)
    with pytest.raises(EngineDeserializeError) as caught:
        read_torch_archive(path, None)
    assert str(path) in caught.value.message
    assert caught.value.remedy
    return caught.value.message


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / 'it-ran'


@pytest.mark.parametrize('name', REAL)
def test_r4_real_archives_are_admitted(name: str) -> None:
    archive = read_torch_archive(DATA / name, None)
    assert archive.kind is kind_of(name)
    assert archive.content == (DATA / name).read_bytes()


@pytest.mark.parametrize('name', REAL)
def test_r4_real_archives_written_again_are_admitted(name: str) -> None:
    """What the tests below change is the only reason for what they see refused."""
    entries = entries_of(name)
    packed = tuple(entry for entry in entries if entry.startswith('code/'))
    scan_torch_archive(torch_zip(entries, packed=packed), kind_of(name))
    scan_torch_archive(torch_zip(entries, with_end64=False), kind_of(name))


def test_r4_digest_is_compared_before_the_content(tmp_path: Path) -> None:
    path = tmp_path / 'model.pt2'
    path.write_bytes(b'no archive at all')
    with pytest.raises(EngineSchemaMismatchError) as caught:
        read_torch_archive(path, '0' * 64)
    assert caught.value.expected == '0' * 64


@pytest.mark.parametrize('name', ['model.onnx', 'model', 'model.pth'])
def test_r4_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((DATA / 'arithmetic.pt2').read_bytes())
    with pytest.raises(EngineDeserializeError, match='neither'):
        read_torch_archive(tmp_path / name, None)


@pytest.mark.parametrize(('name', 'suffix'), [('arithmetic.pt2', '.pt'), ('scripted.pt', '.pt2')])
def test_r4_an_archive_under_the_other_suffix_is_refused(name: str, suffix: str, tmp_path: Path) -> None:
    assert 'it has no' in refusal((DATA / name).read_bytes(), suffix, tmp_path)


# --- what torch.export would run ------------------------------------------------------------------


def with_target(target: Any) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        program['graph_module']['graph']['nodes'][0]['target'] = target

    return change


def call_system(program: dict[str, Any], marker: Path) -> None:
    """Have the first node call os.system, which torch.export finds from torch by attributes."""
    node = program['graph_module']['graph']['nodes'][0]
    node['target'] = 'torch.os.system'
    node['inputs'] = [{'name': '', 'arg': {'as_string': f'touch {marker}'}, 'kind': 1}]


def free_size(program: dict[str, Any], marker: Path, name: str = 'left') -> None:
    size = {'as_expr': {'expr_str': evil_expression(marker), 'hint': None}}
    program['graph_module']['graph']['tensor_values'][name]['sizes'][0] = size


def hidden_size(program: dict[str, Any], marker: Path) -> None:
    """A size that is not fixed, of a tensor whose name is that of a field with free text."""
    graph = program['graph_module']['graph']
    free_size(program, marker)
    renamed = json.dumps(graph).replace('"left"', '"metadata"')
    program['graph_module']['graph'] = json.loads(renamed)
    signature = program['graph_module']['signature']
    program['graph_module']['signature'] = json.loads(json.dumps(signature).replace('"left"', '"metadata"'))


def rename_node(program: dict[str, Any], marker: Path) -> None:
    """A name that ends its line in the Python that torch.fx writes."""
    evil = f'x = {evil_expression(marker)}; y'
    text = json.dumps(program['graph_module']).replace('"add"', json.dumps(evil))
    program['graph_module'] = json.loads(text)


def guard(program: dict[str, Any], marker: Path) -> None:
    program['guards_code'] = [f"{evil_expression(marker)} == L['left'].size()[0]"]


def enum_tree(program: dict[str, Any], marker: Path) -> None:
    """A structure whose context names a module to import."""
    signature = program['graph_module']['module_call_graph'][0]['signature']
    tree = json.loads(signature['in_spec'])
    tree[1]['children_spec'][1]['context'] = json.dumps(
        [{'__enum__': True, 'fqn': f'{marker.stem.replace("-", "_")}:A.b', 'name': 'b'}]
    )
    signature['in_spec'] = json.dumps(tree)


def defaultdict_tree(program: dict[str, Any], marker: Path) -> None:
    signature = program['graph_module']['module_call_graph'][0]['signature']
    context = {'default_factory_module': 'os', 'default_factory_name': 'system', 'dict_context': []}
    tree = [1, {'type': 'collections.defaultdict', 'context': json.dumps(context), 'children_spec': []}]
    signature['out_spec'] = json.dumps(tree)


PROGRAMS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    'a node that calls os.system': call_system,
    'a size that sympify evaluates': free_size,
    'a size hidden under a name with free text': hidden_size,
    'a node name that is Python': rename_node,
    'a guard that is Python': guard,
    'an enum in the input structure': enum_tree,
    'a defaultdict in the output structure': defaultdict_tree,
}


@pytest.mark.parametrize('attack', PROGRAMS)
def test_r4_a_program_that_is_more_than_operators_is_refused(attack: str, marker: Path, tmp_path: Path) -> None:
    entries = changed_program(lambda program: PROGRAMS[attack](program, marker))
    assert 'models/model.json' in refusal(torch_zip(entries), '.pt2', tmp_path)


@pytest.mark.parametrize(
    'target',
    [
        'torch.os.system', 'torch.load', 'torch.ops.load_library', '_operator.getitem', 'math.floor', '#extension',
        'torch.ops.aten.from_file.default', 'torch.ops.aten.save.default', 'torch.ops.aten.__class__.mro',
        'torch.ops.aten.add', 'torch.ops.aten.add.Tensor.__call__', 'torch.ops.higher_order.cond',
        'torch.ops.quantized.add.default', 'torch.ops.aten.add.Tensor\n', '', 7, None, True,
    ],
)
def test_r4_only_aten_operators_are_called(target: Any, tmp_path: Path) -> None:
    assert 'calls' in refusal(torch_zip(changed_program(with_target(target))), '.pt2', tmp_path)


@pytest.mark.parametrize('target', ['torch.ops.aten.add.Tensor', 'torch.ops.aten.__and__.Tensor',
                                    'torch.ops.aten._assert_tensor_metadata.default'])
def test_r4_aten_operators_are_admitted(target: str) -> None:
    scan_torch_archive(torch_zip(changed_program(with_target(target))), ArchiveKind.EXPORT)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('guards_code', ['True']), ('range_constraints', {'s0': {'min_val': 2, 'max_val': 4}}),
        ('verifiers', ['a b']), ('torch_version', "2'"),
    ],
)
def test_r4_fields_of_the_program(key: str, value: Any, tmp_path: Path) -> None:
    entries = changed_program(lambda program: program.update({key: value}))
    refusal(torch_zip(entries), '.pt2', tmp_path)


@pytest.mark.parametrize('size', [{'as_expr': 's0'}, {'as_expr': {'hint': None}}, {'expr_str': 's0'}])
def test_r4_sizes_are_numbers(size: dict[str, Any], tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program['graph_module']['graph']['tensor_values']['left']['sizes'][0] = size

    assert 'not fixed' in refusal(torch_zip(changed_program(change)), '.pt2', tmp_path)


@pytest.mark.parametrize(
    ('place', 'value'),
    [
        (('graph', 'custom_obj_values'), {'object': {'name': 'object', 'class_fqn': 'a.B'}}),
        (('treespec_namedtuple_fields',), {'a.B': {'field_names': ['x']}}),
        (('signature', 'input_specs', 0), {'custom_obj': {'arg': {'name': 'object', 'class_fqn': 'a.B'}}}),
    ],
)
def test_r4_objects_are_refused(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        at = program['graph_module']
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value

    assert 'custom object' in (message := refusal(torch_zip(changed_program(change)), '.pt2', tmp_path)) or (
        'named tuples' in message
    )


LEAF = {'type': None, 'context': None, 'children_spec': []}


@pytest.mark.parametrize(
    'tree',
    [
        '[2, 0]', '{}', '[1]', '[1, 7]', '[1, {"type": null}]', 'no JSON',
        json.dumps([1, {**LEAF, 'type': 'collections.namedtuple'}]),
        json.dumps([1, {**LEAF, 'type': ['builtins.dict']}]),
        json.dumps([1, {**LEAF, 'context': '"x"'}]),
        json.dumps([1, {**LEAF, 'children_spec': [LEAF]}]),
        json.dumps([1, {**LEAF, 'children_spec': 'x'}]),
        json.dumps([1, {**LEAF, 'type': 'builtins.dict', 'context': '["a\'b"]'}]),
        json.dumps([1, {**LEAF, 'type': 'builtins.tuple', 'context': 'null', 'children_spec': [7]}]),
        json.dumps([1, {**LEAF, 'more': 1}]),
    ],
)
def test_r4_inputs_and_outputs_are_nested_tuples_lists_and_dicts(tree: str, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program['graph_module']['module_call_graph'][0]['signature']['out_spec'] = tree

    assert 'models/model.json' in refusal(torch_zip(changed_program(change)), '.pt2', tmp_path)


@pytest.mark.parametrize('content', [b'[]', b'{"config": []}', b'{"config": {"a": 7}}', b'{"config": {"a": {}}}',
                                     b'{"config": {"a": {"use_pickle": false, "path_name": "../../x"}}}',
                                     b'{"config": {"a": {"use_pickle": false, "path_name": "weight_99"}}}',
                                     b'{"config": {"a": {"use_pickle": 0, "path_name": "weight_0"}}}'])
def test_r4_weights_are_listed_raw_and_there(content: bytes, tmp_path: Path) -> None:
    entries = {**LAYERS, 'data/weights/model_weights_config.json': content}
    assert 'weights_config' in refusal(torch_zip(entries), '.pt2', tmp_path)


def test_r4_a_key_twice_is_refused(tmp_path: Path) -> None:
    content = LAYERS['models/model.json'].replace(b'{', b'{"guards_code": [], "guards_code": [],', 1)
    entries = {**LAYERS, 'models/model.json': content}
    assert 'twice' in refusal(torch_zip(entries), '.pt2', tmp_path)


@pytest.mark.parametrize('content', [b'little\0', b'x' * 300, b'../..'])
def test_r4_small_texts_are_short_and_plain(content: bytes, tmp_path: Path) -> None:
    assert 'short text' in refusal(torch_zip({**LAYERS, 'byteorder': content}), '.pt2', tmp_path)


@pytest.mark.parametrize('inner', [{'data.pkl': b'\x80\x02.', 'libevil.so': b''}, {'data/0': b'1234'}])
def test_r4_sample_inputs_hold_a_pickle_and_numbers(inner: dict[str, bytes], tmp_path: Path) -> None:
    entries = {**LAYERS, 'data/sample_inputs/model.pt': torch_zip(inner)}
    assert 'data/sample_inputs' in refusal(torch_zip(entries), '.pt2', tmp_path)


def test_r4_a_pickle_of_endless_steps_is_refused(tmp_path: Path) -> None:
    entries = {**entries_of('scripted.pt'), 'constants.pkl': b'\x80\x02' + b')' * (1 << 20) + b'.'}
    assert 'too many' in refusal(torch_zip(entries), '.pt', tmp_path)


@pytest.mark.parametrize('argument', ['as_graph', 'as_operator', 'as_custom_obj'])
def test_r4_arguments_that_are_more_than_data(argument: str, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program['graph_module']['graph']['nodes'][0]['inputs'][0]['arg'] = {argument: {'name': 'x'}}

    refusal(torch_zip(changed_program(change)), '.pt2', tmp_path)


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'{"graph_module": 1}', b'\xff', b'{"a": 1, "a": 2}',
                                     b'[' * 100_000, b'{"graph_module": {}, "x": ' + b'[' * 90 + b']' * 90 + b'}'])
def test_r4_a_program_that_is_no_plain_json(content: bytes, tmp_path: Path) -> None:
    entries = {**entries_of('arithmetic.pt2'), 'models/model.json': content}
    assert 'models/model.json' in refusal(torch_zip(entries), '.pt2', tmp_path)


def test_r4_strings_as_arguments_are_data() -> None:
    """Einsum's equation, for one, is no name; it is printed with repr()."""

    def change(program: dict[str, Any]) -> None:
        inputs = program['graph_module']['graph']['nodes'][0]['inputs']
        inputs.append({'name': 'equation', 'arg': {'as_string': 'bchw,bdhw->bcd'}, 'kind': 1})

    scan_torch_archive(torch_zip(changed_program(change)), ArchiveKind.EXPORT)


# --- pickles and libraries in each place ----------------------------------------------------------


@pytest.mark.parametrize('place', ENTRIES)
def test_r4_a_pickle_or_a_library_in_any_entry_is_refused(place: str, marker: Path, tmp_path: Path) -> None:
    entries, suffix = ENTRIES[place](marker)
    refusal(torch_zip(entries), suffix, tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize('suffix', ['.pt', '.pt2'])
@pytest.mark.parametrize('layout', ['pickle', 'tar', 'saved', 'empty', 'text', 'python zip'])
def test_r4_files_that_are_no_torch_archive(layout: str, suffix: str, marker: Path, tmp_path: Path) -> None:
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, 'w') as archive:
        archive.writestr('archive/data.pkl', evil_pickle(marker))
    content = {
        'pickle': evil_pickle(marker), 'tar': legacy_tar(evil_pickle(marker)), 'saved': saved(evil_pickle(marker)),
        'empty': b'', 'text': b'a model', 'python zip': plain.getvalue(),
    }[layout]
    refusal(content, suffix, tmp_path)


@pytest.mark.parametrize(
    'code',
    [
        b'torch.save(x, "/etc/passwd")', b'getattr(torch, "save")', b'torch.from_file("/etc/shadow")',
        b'ops.evil.run(x)', b'ops.aten.from_file(x)', b'x : __torch__.torch.classes.evil.Thing',
    ],
)
def test_r4_torchscript_that_opens_files_is_refused(code: bytes, tmp_path: Path) -> None:
    entries = entries_of('scripted.pt')
    entries['code/__torch__.py'] += b'  _9 = ' + code + b'\n'
    assert 'TorchScript code' in refusal(torch_zip(entries), '.pt', tmp_path)


class Reduced:
    def __init__(self, *reduction: Any) -> None:
        self.reduction = reduction

    def __reduce__(self) -> Any:
        return self.reduction


PICKLES: dict[str, bytes] = {
    'STACK_GLOBAL': pickle.dumps(Touch(Path('x')), protocol=4),
    'INST': b"(S'touch x'\nios\nsystem\n.",
    'OBJ': b'(cos\nsystem\nX\x07\x00\x00\x00touch xo.',
    'NEWOBJ': b'\x80\x02ccollections\nOrderedDict\n)\x81.',
    'BUILD': pickle.dumps(Reduced(dict, (), {'a': 1}), protocol=2),
    'EXT1': b'\x80\x02\x82\x01.',
    'a module with blanks': b'\x80\x02ctorch._utils _rebuild_tensor_v2\nx\n.',
    'builtins': b'\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.',
    'getattr': b'\x80\x02c__builtin__\ngetattr\n.',
    'a name with dots': b'\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.',
    'two pickles': b'\x80\x02).\x80\x02cos\nsystem\n.',
    'no end': b'\x80\x02)',
    'nothing': b'',
}


@pytest.mark.parametrize('case', PICKLES)
@pytest.mark.parametrize('place', ['data/sample_inputs/model.pt', 'constants.pkl'])
def test_r4_pickles_are_judged_by_opcode_and_global(case: str, place: str, tmp_path: Path) -> None:
    if place == 'constants.pkl' and case in ('NEWOBJ', 'BUILD'):
        pytest.skip("TorchScript's own reader makes objects of the archive's classes")
    name = 'scripted.pt' if place == 'constants.pkl' else 'arithmetic.pt2'
    content = PICKLES[case] if place == 'constants.pkl' else saved(PICKLES[case])
    message = refusal(torch_zip({**entries_of(name), place: content}), Path(name).suffix, tmp_path)
    assert 'pickle' in message


# --- archives that two readers read differently ---------------------------------------------------


@pytest.mark.parametrize('trick', ZIPS)
def test_r4_zip_tricks_are_refused(trick: str, tmp_path: Path) -> None:
    content, reason = ZIPS[trick]
    with pytest.raises(ValueError, match=reason):
        scan_torch_archive(content, ArchiveKind.EXPORT)
    refusal(content, '.pt2', tmp_path)


def test_r4_a_zip_bomb_is_refused_by_what_it_declares_and_by_what_it_unpacks_to() -> None:
    bomb = {'code': b'\0' * 1_000_000}
    content = torch_zip(bomb, packed=('code',))
    assert len(content) < 2000
    assert read_entries(content, max_unpacked=1_000_000)
    with pytest.raises(ZipRefusedError, match='too much'):
        read_entries(content, max_unpacked=999_999)
    with pytest.raises(ZipRefusedError, match='another size'):
        read_entries(torch_zip(bomb, packed=('code',), size=lambda size: 10))


def test_r4_every_byte_that_a_reader_looks_at_is_checked() -> None:
    """Change each byte in two ways: refused, or of no consequence (times, attributes, versions, padding)."""
    content = (DATA / 'stripped.pt2').read_bytes()
    whole = {name: bytes(entry) for name, entry in read_entries(content).items()}
    admitted = 0
    for position in range(len(content)):
        for flip in (0x01, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= flip
            try:
                entries = read_entries(bytes(damaged))
            except ZipRefusedError:
                continue
            assert {name: bytes(entry) for name, entry in entries.items()} == whole, position
            admitted += 1
    assert admitted < len(content) / 2


@pytest.mark.parametrize('name', ['layers.pt2', 'frozen.pt'])
def test_r4_no_prefix_of_an_archive_is_admitted(name: str) -> None:
    content = (DATA / name).read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        with pytest.raises(ValueError):
            scan_torch_archive(content[:length], kind_of(name))


@pytest.mark.parametrize('name', ['arithmetic.pt2', 'traced.pt'])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_r4_damage_is_a_typed_error_or_does_no_harm(name: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray((DATA / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content)
    try:
        archive = read_torch_archive(path, None)
    except EngineDeserializeError as error:
        assert error.remedy
    else:
        # Bytes that no reader takes notice of: times, attributes, padding.
        assert {k: bytes(v) for k, v in read_entries(archive.content).items()} == {
            k: bytes(v) for k, v in read_entries((DATA / name).read_bytes()).items()
        }


@pytest.mark.parametrize('name', ['layers.pt2', 'scripted.pt'])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_r4_damaged_entries_with_right_checksums_are_typed_errors(name: str, data: st.DataObject) -> None:
    entries = entries_of(name)
    victim = data.draw(st.sampled_from(sorted(entries)))
    content = bytearray(entries[victim] or b'\0')
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=16))
    try:
        scan_torch_archive(torch_zip({**entries, victim: bytes(content)}), kind_of(name))
    except ValueError as error:
        assert str(error)


# --- torch itself ---------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(
    'attack', ['sample inputs', 'a weight', 'an opaque object', 'a size that sympify evaluates',
               'a size hidden under a name with free text', 'a guard that is Python'],
)
def test_r4_torch_runs_what_the_scan_refuses(attack: str, marker: Path) -> None:
    """The attacks above are real: handed to torch.export as they are, each makes its file."""
    import torch

    if attack in PROGRAMS:
        entries = changed_program(lambda program: PROGRAMS[attack](program, marker))
    else:
        entries, _ = ENTRIES[attack](marker)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            program = torch.export.load(io.BytesIO(torch_zip(entries)))
            program.module()(torch.ones(1, 3, 4), torch.ones(1, 3, 4))
        except Exception as error:
            print(error)
    assert marker.exists()
