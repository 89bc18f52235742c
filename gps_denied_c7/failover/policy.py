"""
What a chain does next, as pure functions of what it sees (F-2 to F-7): no clock, no lock, no vendor call.

:func:`upkeep` may run while a request waits and never changes which engine serves; :data:`RECONCILE` runs between two
frames only.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import NamedTuple

from gps_denied_c7.failover.fleet import Role
from gps_denied_c7.failover.loader import EngineLoad, RungEngine
from gps_denied_c7.failover.policy_view import (
    HURRIED,
    Actions,
    Cancel,
    ClearPause,
    Failed,
    Gpu,
    Load,
    Move,
    Pause,
    PauseState,
    Purpose,
    Switch,
    TrustGpu,
    View,
)
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.standby import make_standby, standby_load

__all__ = [
    'ABANDON_FACTOR', 'MAX_RELOADS', 'RECONCILE', 'SHADOWED_FRAMES',
    'Attempted', 'Next', 'Outcome', 'Step', 'Wait',
    'after_attempt', 'after_load', 'after_serving', 'departure', 'make_room', 'pause_after_failure', 'promotion',
    'suspend_gpu', 'trust_gpu', 'upkeep', 'while_waiting',
]  # fmt: skip

SHADOWED_FRAMES = 3
"""Live frames on which a better engine must agree before it serves."""
MAX_RELOADS = 3
"""How often one request has the same rung loaded again while its workers die."""
ABANDON_FACTOR = 10.0
"""Hang limits after which an engine is ended although no other one could be loaded."""


def after_serving(view: View) -> Actions:
    """Return what to do with a shadow that is not better than the engine that serves now."""
    shadow = view.shadow
    if shadow is None or view.better(shadow.rung):
        return ()
    if shadow.expected is not None:
        return (Move(shadow, Role.RETIRING, 'it still runs a request'),)
    return make_standby(shadow, view, ordered=False)


# --- upkeep: while a request waits, too -----------------------------------------------------------


def upkeep(view: View) -> Actions:
    """Begin to load what is missing: a standby (F-3), else better rungs to serve (F-6) or to be standby."""
    if not view.isolated or view.serving is None or view.closing:
        return ()
    if view.hot_standby and view.standby is None and not view.late and (actions := standby_load(view)):
        return actions
    if view.loads:
        return ()
    wanted = [rung for rung in view.rungs if view.better(rung)] if view.shadow is None else []
    if view.standby is not None:
        standby = view.preference(view.standby.rung)
        wanted += [rung for rung in view.rungs_after(view.serving.rung) if view.preference(rung) < standby]
    pauses: Actions = ()
    for rung in wanted:
        if not view.eligible(rung, Purpose.LOAD):
            continue
        pause = ('promotion', rung)
        if view.pause(pause) is PauseState.NONE:
            # It has just failed: its first attempt is one pause away.
            pauses += (Pause(pause),)
        elif view.pause(pause) is PauseState.DUE:
            return (*pauses, Load(rung, pause))
    return pauses


def after_load(load: EngineLoad, view: View, *, lack_bytes: int | None = None) -> Actions:
    """
    Return what to do after a load in the background that has ended.

    :param load: not one of ``view.loads`` any more.
    :param lack_bytes: GPU memory that it lacked, where that is why it failed.
    """
    rung, better = load.rung, view.better(load.rung)
    if load.engine is not None and better and view.eligible(rung, Purpose.SHADOW):
        before = () if view.shadow is None else (Move(view.shadow, Role.RETIRING, f'{rung.name} is loaded'),)
        return (*before, Move(load.engine, Role.SHADOW, 'is to agree on live frames'))
    if load.engine is not None:
        cleared = (ClearPause(('standby', rung)), ClearPause(('promotion', rung)), ClearPause(HURRIED))
        return (*cleared, *make_standby(load.engine, view, ordered=True))
    assert load.error is not None
    # A better engine is worth more than a standby; with nothing left to free, it waits.
    if better and lack_bytes is not None and (room := make_room(lack_bytes, view)) is not None:
        return (*room, Load(rung))
    return (_pause_of_load(rung, view), *((Failed(rung, load.error),) if better else ()))


def make_room(lack_bytes: int, view: View, *, but: EngineLoad | None = None) -> Actions | None:
    """
    Free GPU memory that another engine lacks: the shadow's, the standby's, then what is being loaded (F-3).

    :param but: the load that lacks it.
    :return: None where freeing all of it would not do.
    """
    others = [engine for engine in (view.shadow, view.standby) if engine is not None]
    loads = tuple(load for load in view.loads if load is not but and load.rung.on_gpu)
    if not loads and sum(engine.gpu_bytes for engine in others) < lack_bytes:
        return None
    actions: Actions = ()
    for engine in others:
        if lack_bytes <= 0:
            return actions
        if engine.gpu_bytes:
            purpose = 'standby' if engine is view.standby else 'promotion'
            actions += (Move(engine, Role.RETIRING, 'its GPU memory is needed'), Pause((purpose, engine.rung)))
            view = replace(view, standby=None) if engine is view.standby else view
            lack_bytes -= engine.gpu_bytes
    if lack_bytes > 0:
        actions += (Cancel(loads), *(_pause_of_load(load.rung, view) for load in loads))
    return actions


def _pause_of_load(rung: Rung, view: View) -> Pause:
    return Pause(('standby' if view.standby is None and not view.better(rung) else 'promotion', rung))


# --- reconcile: between two frames ----------------------------------------------------------------


def promotion(view: View) -> Actions:
    """Have a better engine serve once it agrees on live frames; the one that served becomes the standby (F-6)."""
    shadow, serving = view.shadow, view.serving
    if shadow is None or serving is None or shadow.agreements < SHADOWED_FRAMES:
        return ()
    trust = trust_gpu(shadow, view)
    usable = replace(view, standby=None, gpu=Gpu.OK if trust else view.gpu)
    standby = () if view.standby is None else (Move(view.standby, Role.RETIRING, f'{serving.rung.name} is there'),)
    why = f'{shadow.rung.name} is usable again'
    return (
        Switch(why, (*trust, *standby, *make_standby(serving, usable, ordered=False), Move(shadow, Role.SERVING, why))),
    )


def trust_gpu(shadow: RungEngine, view: View) -> Actions:
    """Trust a lost GPU again where the shadow on it is to serve."""
    return () if view.eligible(shadow.rung, Purpose.SERVE) else (TrustGpu(shadow.rung),)


def departure(view: View) -> Actions:
    """Have the standby serve where the GPU was lost by another engine than the one that serves (F-2)."""
    serving, standby = view.serving, view.standby
    if serving is None or view.eligible(serving.rung, Purpose.SERVE):
        return ()
    if standby is None:
        # It answers meanwhile, so that no frame waits for the load.
        return standby_load(view)
    why = 'the GPU is lost'
    return (Switch(why, (Move(serving, Role.RETIRING, why), Move(standby, Role.SERVING, why))),)


RECONCILE = (promotion, departure)
"""What changes the serving engine between two frames, in this order, each with a view of its own."""


# --- failures -------------------------------------------------------------------------------------


def suspend_gpu(view: View) -> Actions:
    """Leave a lost GPU alone for a pause: no engine on it takes over."""
    shadow = view.shadow
    dropped = shadow is not None and not view.eligible(shadow.rung, Purpose.SERVE)
    retired = (Move(shadow, Role.RETIRING, 'the GPU is lost'),) if shadow is not None and dropped else ()
    lost = (rung for rung in view.rungs if not view.eligible(rung, Purpose.SERVE))
    return (*retired, *(Pause(('promotion', rung)) for rung in lost))


def pause_after_failure(rung: Rung, view: View) -> Actions:
    """Return the pause before a rung that failed while it served is tried again; one of a lost GPU has it already."""
    return (Pause(('promotion', rung)),) if view.eligible(rung, Purpose.SERVE) else ()


class Wait(Enum):
    """What a request does while the serving engine has not answered."""

    GO_ON = 'wait'
    LATE = 'turn to the standby'
    ABANDON = 'take it for failed'


def while_waiting(engine: RungEngine, age_s: float, view: View, *, last: bool, standby_answered: bool) -> Wait:
    """
    Return what a request does that ``engine`` has not answered within its deadline (F-4).

    :param last: it was loaded for this request: it has all of its hang limit.
    :param standby_answered: the standby, which was late before, has answered this very request.
    """
    hung = age_s > engine.hang_s
    if (hung if last else view.standby is not None) or standby_answered:
        return Wait.LATE
    # Nothing could be loaded beside it in all that time; its memory may be what is missing.
    return Wait.ABANDON if age_s > ABANDON_FACTOR * engine.hang_s else Wait.GO_ON


class Outcome(Enum):
    """How an engine that was asked ended up: FAILED answered with an error, DIED is a worker that ended."""

    LATE = 'late'
    FAILED = 'failed'
    DIED = 'died'


class Attempted(NamedTuple):
    """
    Describe the latest attempt of a request, and what the request has cost before.

    :param fresh: its engine was loaded for this request.
    :param again: the rung was asked before by this request.
    :param reloads: how often the rung was loaded for this request.
    :param alive: its worker is.
    :param passed: whether its engine passed a self-test after it failed; None before one is made.
    :param standby_answered: see :func:`while_waiting`.
    """

    rung: Rung
    outcome: Outcome
    fresh: bool = False
    again: bool = False
    reloads: int = 0
    alive: bool = True
    passed: bool | None = None
    standby_answered: bool = False


class Next(Enum):
    """What a request does after an attempt that came to nothing."""

    ASK_STANDBY = 'ask the standby'
    SELF_TEST = 'have the engine make its self-test, and decide then'
    BLAME_REQUEST = 'give the request up, and blame no engine'
    REPLACE = 'blame the engine, and ask the next'
    REPLACE_FOR_LATER = 'replace the engine for later requests, and give this one up'
    RELOAD = 'load the rung again; give the request up if the rung that serves then was asked before'


class Step(NamedTuple):
    """What to do, and the rungs to load where no standby is there."""

    next: Next
    candidates: tuple[Rung, ...] = ()


def after_attempt(attempt: Attempted, view: View) -> Step:
    """
    Return what a request does next (F-2).

    A request that every engine fails must not take an engine down: the last one is self-tested, and if it passes,
    the request is to blame.
    """
    rung = attempt.rung
    others = view.rungs_after(rung)
    if attempt.outcome is Outcome.LATE:
        # A fresh engine passed its self-test while the others were late: it is the request that it hangs on.
        gives_up = attempt.fresh and not attempt.standby_answered
        return Step(Next.REPLACE_FOR_LATER, (rung, *others)) if gives_up else Step(Next.ASK_STANDBY)
    if attempt.passed:
        return Step(Next.BLAME_REQUEST)
    if attempt.passed is None and attempt.alive and (attempt.again or not others):
        return Step(Next.SELF_TEST)
    died = attempt.outcome is Outcome.DIED
    spent = attempt.again and attempt.reloads >= (MAX_RELOADS if died else 1)
    if spent and died and not others:
        return Step(Next.RELOAD, (rung,))
    # Where no other is usable, the rung itself may be, loaded again.
    return Step(Next.REPLACE, others if spent else (*others, rung))
