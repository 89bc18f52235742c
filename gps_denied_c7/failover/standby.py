"""Which engine is kept as the standby, and when another one is loaded for it (F-3): pure functions, as the policy."""

from __future__ import annotations

from gps_denied_c7.failover.fleet import Role
from gps_denied_c7.failover.loader import RungEngine
from gps_denied_c7.failover.policy_view import HURRIED, Actions, Load, Move, Pause, PauseState, Purpose, View

__all__ = ['hurried_load', 'make_standby', 'standby_load']


def make_standby(engine: RungEngine, view: View, *, ordered: bool) -> Actions:
    """
    Make ``engine`` the standby where one is wanted, else retire it.

    :param ordered: it was loaded as standby; it replaces one that is less preferred.
    """
    standby = view.standby
    replaces = standby is None or (ordered and view.preference(engine.rung) < view.preference(standby.rung))
    if not (replaces and (ordered or view.hot_standby) and view.eligible(engine.rung, Purpose.SERVE)):
        return (Move(engine, Role.RETIRING, 'no standby is needed'),)
    retired = () if standby is None else (Move(standby, Role.RETIRING, f'{engine.rung.name} is preferred'),)
    return (*retired, Move(engine, Role.STANDBY, 'is available'))


def standby_load(view: View, *, hurry: bool = False) -> Actions:
    """
    Begin to load the most preferred engine that may be standby, unless one is being loaded.

    :param hurry: a frame waits for it: where each has failed and pauses, the one whose pause ends first is loaded,
        unless that was done so shortly before that the frames may be late because of it.
    """
    if not view.isolated or view.serving is None or any(not view.better(load.rung) for load in view.loads):
        return ()
    # Two engines of unknown size that are loaded at once could take the memory of the one that serves.
    gpu_taken = any(load.rung.on_gpu for load in view.loads)
    wanted = [
        rung for rung in (*view.rungs_after(view.serving.rung), view.serving.rung)
        if view.eligible(rung, Purpose.LOAD) and not (gpu_taken and rung.on_gpu)
    ]  # fmt: skip
    if not wanted:
        return ()
    rung = min(wanted, key=lambda each: (view.pause_left_ns(('standby', each)), *view.preference(each)))
    pause = ('standby', rung)
    if view.pause(pause) is not PauseState.RUNNING:
        return (Load(rung, pause),)
    if hurry and view.pause(HURRIED) is not PauseState.RUNNING:
        return (Pause(HURRIED), Load(rung))
    return ()


def hurried_load(view: View, *, hung: bool) -> Actions:
    """Begin to load a standby at once for a request that waits for a late engine."""
    wanted = view.standby is None and ((view.hot_standby and not view.late) or hung)
    return standby_load(view, hurry=True) if wanted else ()
