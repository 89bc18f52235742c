"""
The parts of docs/explanation/chain.md that are made from the code: roles, eligibility, what follows a failed attempt.

``PYTHONPATH=$PWD:$PWD/test python3 -m support.chain_page`` in the repository writes them anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gps_denied_c7.failover import policy
from gps_denied_c7.failover.fleet import MOVES, Role
from gps_denied_c7.failover.loader import RungEngine
from gps_denied_c7.failover.policy import Attempted, Outcome
from gps_denied_c7.failover.policy_view import Gpu, Purpose, View
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet
from support.source_tree import REPOSITORY

PAGE = REPOSITORY / 'docs' / 'explanation' / 'chain.md'
_RUNGS = GPU, OTHER_GPU, CPU = (
    Rung('tensorrt', ProviderSet.GPU), Rung('onnx_trt_ep', ProviderSet.GPU), Rung('onnx_trt_ep', ProviderSet.CPU),
)  # fmt: skip
_SERVING = {'an engine on the GPU': OTHER_GPU, 'an engine on the CPU': CPU, 'nothing': None}
_ATTEMPTS = {
    'is late, and a standby is there': Attempted(GPU, Outcome.LATE),
    'was loaded for this request, and hangs': Attempted(GPU, Outcome.LATE, fresh=True),
    'fails it': Attempted(GPU, Outcome.FAILED),
    'dies': Attempted(GPU, Outcome.DIED, alive=False),
    'is of the last rung, and fails it': Attempted(CPU, Outcome.FAILED),
    'is of a rung that was asked before, and fails it': Attempted(GPU, Outcome.FAILED, again=True),
    '… and passes its self-test': Attempted(GPU, Outcome.FAILED, again=True, passed=True),
    '… and fails its self-test': Attempted(GPU, Outcome.FAILED, again=True, passed=False),
    '… which was loaded for this request': Attempted(GPU, Outcome.FAILED, again=True, reloads=1, passed=False),
    f'is of a rung that was loaded {policy.MAX_RELOADS} times for it, and dies': Attempted(
        GPU, Outcome.DIED, again=True, reloads=policy.MAX_RELOADS, alive=False
    ),
    '… and is the last rung': Attempted(
        CPU, Outcome.DIED, again=True, reloads=policy.MAX_RELOADS, alive=False
    ),
}  # fmt: skip


def roles() -> Iterator[str]:
    """Yield the lines of a state diagram of the roles."""
    yield '```mermaid'
    yield 'stateDiagram-v2'
    yield f'  [*] --> {Role.LOADING.value}'
    for (before, after), why in MOVES.items():
        yield f'  {before.value} --> {after.value}: {why}'
    yield f'  {Role.RETIRING.value} --> [*]: its process has ended'
    yield f'  {Role.STUCK.value} --> [*]: its driver releases it'
    yield '```'


def eligibility() -> Iterator[str]:
    """Yield the lines of a table: what a rung on the GPU may be used for."""
    yield '| GPU | what serves | ' + ' | '.join(purpose.value for purpose in Purpose) + ' |'
    yield '|---|---|' + '---|' * len(Purpose)
    for gpu in Gpu:
        for name, rung in _SERVING.items():
            view = View(_RUNGS, active=rung, serving=None if rung is None else _engine(rung), gpu=gpu)
            cells = ['yes' if view.eligible(GPU, purpose) else '–' for purpose in Purpose]
            yield f'| {gpu.value} | {name} | {" | ".join(cells)} |'


def attempts() -> Iterator[str]:
    """Yield the lines of a table: what a request does when an engine does not answer it."""
    yield "| the engine that was asked | the request's next step | rungs to load, where there is no standby |"
    yield '|---|---|---|'
    for name, attempt in _ATTEMPTS.items():
        step = policy.after_attempt(attempt, View(_RUNGS))
        yield f'| {name} | {step.next.value} | {", ".join(f"`{rung.name}`" for rung in step.candidates) or "–"} |'


PARTS = {'roles': roles, 'eligibility': eligibility, 'attempts': attempts}


def with_parts(page: str) -> str:
    """Return a page with its generated parts as the code has them."""
    for name, lines in PARTS.items():
        text = '\n'.join(lines())
        page = re.sub(
            f'(<!-- {name}: begin -->\n).*?(\n<!-- {name}: end -->)',
            lambda found, text=text: f'{found[1]}{text}{found[2]}', page, flags=re.DOTALL,
        )  # fmt: skip
    return page


def _engine(rung: Rung) -> RungEngine:
    return RungEngine(rung, None, EngineFacts('', (), rung is CPU, 0, (), 0.0, None), 0.1, 1.0)


if __name__ == '__main__':
    PAGE.write_text(with_parts(PAGE.read_text(encoding='utf-8')), encoding='utf-8')
