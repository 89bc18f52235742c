"""F-2 to F-4, F-6 to F-8: the chain does what it did before fleet, policy and chain were parted, step by step."""

from __future__ import annotations

import logging
import os
from collections import Counter

import pytest

from gps_denied_c7.failover import chain as chain_module
from gps_denied_c7.failover.chain import RuntimeChain
from support import lockstep, old_chain

HISTORIES = int(os.environ.get('C7_LOCKSTEP_HISTORIES', '300'))
FIRST = int(os.environ.get('C7_LOCKSTEP_FIRST', '0'))

decided: Counter[str] = Counter()


class OldChain(old_chain.RuntimeChain):
    """
    The chain as it was, but for two decisions; docs/explanation/chain.md gives the reasons.

    D1: a shadow whose worker has died is dropped at once, and not with the next frame or once it serves.
    D2: an engine that may not be the standby, since its GPU is lost, retires no standby.
    """

    def __init__(self, *args, make_loader, **kwargs):
        made, old_chain.EngineLoader = old_chain.EngineLoader, make_loader
        try:
            super().__init__(*args, **kwargs)
        finally:
            old_chain.EngineLoader = made

    def _hear_candidate(self, engine):
        if engine.expected is None and not engine.host.alive:
            decided['D1'] += 1
            self._drop_candidate('its worker died.')
        else:
            super()._hear_candidate(engine)

    def _stand_by(self, engine, *, ordered=False):
        if ordered and self._standby is not None and not self._may_serve(engine.rung):
            decided['D2'] += 1
            self._retiring.add(engine.rung, engine.host)
        else:
            super()._stand_by(engine, ordered=ordered)


lockstep.add_seam(old_chain)
lockstep.add_seam(chain_module)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    lockstep.end_stopped_process()


def test_f2_both_chains_do_the_same_in_every_history():
    """Calls of engines, records with their fields, the status after each step, and answers."""
    for seed in range(FIRST, FIRST + HISTORIES):
        assert (difference := lockstep.first_difference(RuntimeChain, OldChain, seed)) is None, f'\n{difference}'


def test_f2_a_difference_is_noticed():
    class Forgetful(OldChain):
        def _record_switch(self, before, reason, started_ns, *, frames_affected):
            super()._record_switch(before, reason, self._monotonic_ns(), frames_affected=frames_affected)

    assert any(lockstep.first_difference(Forgetful, OldChain, seed) for seed in range(20))
