"""§2: config/diagnostics_aggregator.yaml matches what the node publishes, by the rules of diagnostic_aggregator."""

from __future__ import annotations

import re

import pytest
import yaml

from support.harness import running_node, wait_until
from support.source_tree import REPOSITORY

FILE = REPOSITORY / 'config' / 'diagnostics_aggregator.yaml'

# Of GenericAnalyzer; a value of another type is an exception in the aggregator, which ends it.
GENERIC_ANALYZER = {
    'type': str, 'path': str, 'timeout': float, 'num_items': int, 'discard_stale': bool, 'startswith': list,
    'contains': list, 'expected': list, 'regex': list, 'remove_prefix': list, 'find_and_remove_prefix': list,
}  # fmt: skip
AGGREGATOR = {'path': str, 'pub_rate': float, 'other_as_errors': bool, 'history_depth': int, 'critical': bool}


@pytest.fixture(scope='module')
def parameters() -> dict:
    """The file's parameters; the node that reads them may have any name."""
    ((node, content),) = yaml.safe_load(FILE.read_text()).items()
    assert node == '/**'
    return content['ros__parameters']


@pytest.fixture
def analyzers(parameters) -> dict[str, dict]:
    """The analyzers by name."""
    return {name: value for name, value in parameters.items() if isinstance(value, dict)}


def groups(analyzers: dict[str, dict], status: str) -> list[str]:
    """Return the analyzers that take a status; an expression has to match the whole name."""
    return [name for name, value in analyzers.items() if any(re.fullmatch(text, status) for text in value['regex'])]


def test_the_file_says_what_the_aggregator_understands(parameters, analyzers):
    for name, value in parameters.items():
        if name not in analyzers:
            assert type(value) is AGGREGATOR[name]
    for analyzer in analyzers.values():
        assert analyzer['type'] == 'diagnostic_aggregator/GenericAnalyzer'
        for name, value in analyzer.items():
            assert type(value) is GENERIC_ANALYZER[name]


@pytest.mark.parametrize('namespace', ['', '/drone1', '/fleet/drone1'])
def test_each_status_of_a_node_has_its_group(analyzers, demo_bundle, namespace):
    node = f'{namespace}/c7_inference'
    topics = ['camera/image_raw', '/down/image_raw/compressed']
    parameters = {'model_path': demo_bundle, 'image_topics': topics}
    with running_node(parameters, ('-r', f'__ns:={namespace or "/"}'), node) as (_, peer):
        peer.start('inactive')
        wait_until(lambda: peer.status('Stream /down/image_raw/compressed'), 'the streams on diagnostics')
        names = [status.name for status in peer.diagnostics[-1].status]
    assert {name: groups(analyzers, name) for name in names} == {
        f'{node}: Runtime': ['runtime'],
        f'{node}: Stream {namespace}/camera/image_raw': ['streams'],
        f'{node}: Stream /down/image_raw/compressed': ['streams'],
        f'{node}: Latency': ['latency'],
        f'{node}: Thermal': ['thermal'],
    }


@pytest.mark.parametrize('name', ['/other: Runtime', '/not_c7_inference: Runtime', '/a: Thermal'])
def test_others_are_left_alone(analyzers, name):
    assert groups(analyzers, name) == []
