"""Where a graph landed: which provider runs which nodes, as ONNX Runtime reports it or as a profile shows."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gps_denied_c7.runtimes.ort.session_plan import TENSORRT

__all__ = ['Placement', 'profile_runs', 'profiled_placement', 'reported_placement', 'reports_placement']

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """
    Say where a graph landed.

    :param nodes: graph nodes by provider.
    :param engines: TensorRT engines that the graph became.
    """

    nodes: Counter[str]
    engines: int

    @property
    def is_one_engine(self) -> bool:
        return self.engines == 1 and not any(count for name, count in self.nodes.items() if name != TENSORRT)


def reports_placement(session: Any) -> bool:
    """Return whether sessions of this class say where their graph landed, as from ONNX Runtime 1.24 on."""
    return hasattr(session, 'get_provider_graph_assignment_info')


def reported_placement(session: Any) -> Placement | None:
    """Return where the graph landed, None before ONNX Runtime 1.24, which cannot say before it has run."""
    if not reports_placement(session):
        return None
    nodes: Counter[str] = Counter()
    engines = 0
    for subgraph in session.get_provider_graph_assignment_info():
        nodes[subgraph.ep_name] += len(subgraph.get_nodes())
        engines += subgraph.ep_name == TENSORRT
    return Placement(nodes, engines) if nodes else None


def profile_runs(options: Any) -> tempfile.TemporaryDirectory[str] | None:
    """Have a session write down what it runs; that ends with the first run, and costs it about a millisecond."""
    try:
        profile = tempfile.TemporaryDirectory(prefix='c7-profile-', ignore_cleanup_errors=True)
    except OSError as error:
        _log.warning('where the graph runs will not be known: %s', error)
        return None
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(profile.name) / 'run')
    return profile


def profiled_placement(session: Any) -> Placement | None:
    """Return which provider ran which nodes, as the session wrote it down, None where it did not."""
    try:
        events = json.loads(Path(session.end_profiling()).read_text(errors='replace'))
        ran = {
            (event['name'], event['args'].get('node_index')): event['args']['provider']
            for event in events
            if event.get('cat') == 'Node' and 'provider' in event.get('args', {})
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning('where the graph runs is not known: %s', error)
        return None
    nodes = Counter(ran.values())
    # A fused engine is one node to the executor.
    return Placement(nodes, nodes[TENSORRT]) if nodes else None
