"""F-2 to F-7: what the chain decides, as tables; each row is one sentence of the specification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gps_denied_c7.errors import EngineDeserializeError, GpuMemoryError
from gps_denied_c7.failover import policy, standby
from gps_denied_c7.failover.loader import EngineLoad, RungEngine
from gps_denied_c7.failover.policy import Attempted, Next, Outcome, Wait
from gps_denied_c7.failover.policy_view import (
    HURRIED,
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
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet

TRT = Rung('tensorrt', ProviderSet.GPU)
ORT = Rung('onnx_trt_ep', ProviderSet.GPU)
PT = Rung('pytorch_fp16', ProviderSet.GPU)
CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
ALL = (TRT, ORT, PT, CPU)
NAMES = {TRT: 'TRT', ORT: 'ORT', PT: 'PT', CPU: 'CPU'}
OK, LOST, HUNG = Gpu.OK, Gpu.LOST, Gpu.HUNG
SERVE, SHADOW, LOAD, LOAD_NOW = Purpose.SERVE, Purpose.SHADOW, Purpose.LOAD, Purpose.LOAD_NOW
NOW_NS, LATER_NS = 100, 200


def table(names, rows):
    """Have a test run for each row; the first of a row says what it is about."""
    return pytest.mark.parametrize(names, [row[1:] for row in rows], ids=[row[0] for row in rows])


def engine(rung, gpu_bytes=None, **state):
    """Return an engine of ``rung``: the policy looks at no host."""
    facts = EngineFacts('provider', (), rung is CPU, 0, (), 0.0, gpu_bytes)
    return RungEngine(rung, None, facts, deadline_s=0.1, hang_s=1.0, **state)


def loads(*rungs):
    return tuple(EngineLoad(rung) for rung in rungs)


def view(serving=None, standby=None, shadow=None, *, rungs=ALL, **rest):
    """Return a view; engines are given by their rung or as such."""
    engines = [engine(each) if isinstance(each, Rung) else each for each in (serving, standby, shadow)]
    active = engines[0].rung if engines[0] else None
    return View(rungs, **{'active': active, 'now_ns': NOW_NS, **rest}, **dict(zip(
        ('serving', 'standby', 'shadow'), engines, strict=True
    )))  # fmt: skip


def told(actions):
    """Return actions as one line, in their order."""
    return ', '.join(map(tell, actions))


def tell(action):
    match action:
        case Move(moved, role, _):
            return f'{NAMES[moved.rung]} → {role.value}'
        case Load(rung, pause):
            return f'load {NAMES[rung]}' + ('' if pause is None else f' ({pause[0]})')
        case Cancel(cancelled):
            return f'cancel {" ".join(NAMES[load.rung] for load in cancelled)}'
        case Pause(what) | ClearPause(what):
            begins = 'pause' if isinstance(action, Pause) else 'clear'
            return f'{begins} {what if isinstance(what, str) else f"{what[0]} {NAMES[what[1]]}"}'
        case Failed(rung, _):
            return f'{NAMES[rung]} failed'
        case TrustGpu(_):
            return 'trust the GPU'
        case Switch(_, switched):
            return f'switch [{told(switched)}]'


# --- which rung may do what -----------------------------------------------------------------------

ELIGIBLE = [
    # rung, GPU, serving: may it serve or be standby, be shadow, be loaded in the background, be loaded to serve at once
    (TRT, OK, ORT, True, True, True, True),
    (TRT, OK, CPU, True, True, True, True),
    (TRT, OK, None, True, True, True, True),
    (CPU, OK, TRT, True, True, True, True),
    (TRT, LOST, ORT, False, False, False, False),
    (TRT, LOST, CPU, False, True, True, False),
    (TRT, LOST, None, False, False, False, False),
    (TRT, HUNG, CPU, False, False, False, False),
    (TRT, HUNG, ORT, False, False, False, False),
    (CPU, LOST, TRT, True, True, True, True),
    (CPU, HUNG, CPU, True, True, True, True),
]


@pytest.mark.parametrize(('rung', 'gpu', 'serving', 'serve', 'shadow', 'load', 'load_now'), ELIGIBLE)
def test_f2_f6_a_lost_gpu_serves_no_frame_and_is_tried_beside_the_cpu_alone(
    rung, gpu, serving, serve, shadow, load, load_now
):
    seen = view(serving, gpu=gpu)
    found = [seen.eligible(rung, purpose) for purpose in (SERVE, SHADOW, LOAD, LOAD_NOW)]
    assert found == [serve, shadow, load, load_now]


@pytest.mark.parametrize('gpu', Gpu)
def test_f2_a_chain_of_gpu_rungs_has_nothing_else_than_its_gpu(gpu):
    seen = view(ORT, rungs=(TRT, ORT), gpu=gpu)
    assert all(seen.eligible(TRT, purpose) for purpose in Purpose)


@pytest.mark.parametrize(('purpose', 'allowed'), [(SERVE, True), (SHADOW, True), (LOAD, False), (LOAD_NOW, False)])
def test_f6_what_was_refused_is_not_loaded_until_a_file_changes(purpose, allowed):
    assert view(CPU, refused=frozenset({TRT})).eligible(TRT, purpose) is allowed


@pytest.mark.parametrize(
    ('end_ns', 'state'),
    [(None, PauseState.NONE), (LATER_NS, PauseState.RUNNING), (NOW_NS, PauseState.DUE), (1, PauseState.DUE)],
)
def test_a_pause_is_over_when_its_time_has_come(end_ns, state):
    assert view(pauses={} if end_ns is None else {'restart': end_ns}).pause('restart') is state


# --- upkeep ---------------------------------------------------------------------------------------


def pauses(**ends):
    """Return pauses by ``purpose_RUNG``."""
    rungs = {name: rung for rung, name in NAMES.items()}
    return {
        what if what == HURRIED else (what.split('_')[0], rungs[what.split('_')[1]]): end for what, end in ends.items()
    }


BETTER_PAUSED = pauses(promotion_TRT=LATER_NS, promotion_ORT=LATER_NS, promotion_PT=LATER_NS)
UPKEEP = [
    ('a standby is loaded first: the next rung', view(TRT), 'load ORT (standby)'),
    ('another engine of the last rung, after it', view(CPU, pauses=BETTER_PAUSED), 'load CPU (standby)'),
    ('none where none is wanted', view(TRT, hot_standby=False), ''),
    ('none while an engine is late: it may become the standby', view(TRT, late=(engine(TRT),)), ''),
    ('none in this process', view(TRT, isolated=False), ''),
    ('none while nothing serves', view(), ''),
    ('none while the chain is released', view(TRT, closing=True), ''),
    ('the next but one while the next pauses', view(TRT, pauses=pauses(standby_ORT=LATER_NS)), 'load PT (standby)'),
    ('the one that is due', view(TRT, pauses=pauses(standby_ORT=NOW_NS)), 'load ORT (standby)'),
    ('not what is refused', view(TRT, refused=frozenset({ORT, PT})), 'load CPU (standby)'),
    ('not on a lost GPU', view(CPU, gpu=HUNG), 'load CPU (standby)'),
    ('no second standby while one is being loaded', view(TRT, loads=loads(ORT)), ''),
    ('beside a better rung that is loaded on the GPU, only what needs none', view(ORT, loads=loads(TRT)),
     'load CPU (standby)'),
    ('nothing is missing', view(TRT, ORT), ''),
    ('a better rung pauses before its first attempt', view(ORT, PT), 'pause promotion TRT'),
    ('it is loaded when its pause is over', view(ORT, PT, pauses=pauses(promotion_TRT=NOW_NS)),
     'load TRT (promotion)'),
    ('not before', view(ORT, PT, pauses=pauses(promotion_TRT=LATER_NS)), ''),
    ('the best one that is due', view(PT, CPU, pauses=pauses(promotion_TRT=LATER_NS, promotion_ORT=NOW_NS)),
     'load ORT (promotion)'),
    ('one at a time', view(PT, CPU, pauses=pauses(promotion_TRT=NOW_NS, promotion_ORT=NOW_NS)),
     'load TRT (promotion)'),
    ('none beside a shadow', view(PT, CPU, ORT, pauses=pauses(promotion_TRT=NOW_NS)), ''),
    ('none while anything is being loaded', view(PT, CPU, loads=loads(PT), pauses=BETTER_PAUSED | pauses(
        promotion_TRT=NOW_NS)), ''),
    ('a preferred standby, too, after its pause', view(TRT, CPU, pauses=pauses(promotion_ORT=LATER_NS)),
     'pause promotion PT'),
    ('a preferred standby is loaded when it is due', view(TRT, CPU, pauses=pauses(
        promotion_ORT=LATER_NS, promotion_PT=NOW_NS)), 'load PT (promotion)'),
    ('on a lost GPU a better rung is tried beside the CPU', view(CPU, CPU, gpu=LOST, pauses=pauses(
        promotion_TRT=NOW_NS)), 'load TRT (promotion)'),
    ('on a GPU that hangs none is', view(CPU, CPU, gpu=HUNG, pauses=pauses(promotion_TRT=NOW_NS)), ''),
]  # fmt: skip


@table(('seen', 'actions'), UPKEEP)
def test_f3_f6_upkeep(seen, actions):
    assert told(policy.upkeep(seen)) == actions


ALL_PAUSE = pauses(
    standby_TRT=LATER_NS + 4, standby_ORT=LATER_NS + 2, standby_PT=LATER_NS + 1, standby_CPU=LATER_NS + 3
)  # fmt: skip
HURRIED_LOADS = [
    ('a frame waits and nothing pauses', view(TRT), False, 'load ORT (standby)'),
    ('all pause: the one whose pause ends first', view(TRT, pauses=ALL_PAUSE), False, 'pause hurried, load PT'),
    ('once in a while', view(TRT, pauses=ALL_PAUSE | {HURRIED: LATER_NS}), False, ''),
    ('again after that', view(TRT, pauses=ALL_PAUSE | {HURRIED: NOW_NS}), False, 'pause hurried, load PT'),
    ('there is a standby', view(TRT, CPU), True, ''),
    ('none is wanted', view(TRT, hot_standby=False), False, ''),
    ('none is wanted, and the engine hangs', view(TRT, hot_standby=False), True, 'load ORT (standby)'),
    ('another engine is late as well', view(TRT, late=(engine(ORT),)), False, ''),
    ('another engine is late as well, and this one hangs', view(TRT, late=(engine(ORT),)), True, 'load ORT (standby)'),
    ('in this process', view(TRT, isolated=False), True, ''),
]


@table(('seen', 'hung', 'actions'), HURRIED_LOADS)
def test_f4_a_standby_is_loaded_for_a_frame_that_waits(seen, hung, actions):
    assert told(standby.hurried_load(seen, hung=hung)) == actions


def ended(rung, *, engine_of=True, gpu_bytes=None, lacks=None):
    load = EngineLoad(rung)
    if lacks is not None:
        load.error = GpuMemoryError('does not fit.', needed_bytes=lacks, left_bytes=0)
    elif engine_of:
        load.engine = engine(rung, gpu_bytes)
    else:
        load.error = EngineDeserializeError('not now.')
    return load


CLEARED = 'clear standby {0}, clear promotion {0}, clear hurried, '
AFTER_LOAD = [
    ('a better rung becomes the shadow', ended(TRT), view(ORT, PT), 'TRT → shadow'),
    ('in place of the shadow before', ended(TRT), view(PT, CPU, ORT), 'ORT → retiring, TRT → shadow'),
    ('beside the CPU also on a lost GPU', ended(TRT), view(CPU, CPU, gpu=LOST), 'TRT → shadow'),
    ('one that may not be is retired', ended(TRT), view(ORT, gpu=LOST), CLEARED.format('TRT') + 'TRT → retiring'),
    ('a further rung becomes the standby', ended(PT), view(ORT), CLEARED.format('PT') + 'PT → standby'),
    ('also where none was wanted: a frame waited for it', ended(PT), view(ORT, hot_standby=False),
     CLEARED.format('PT') + 'PT → standby'),
    ('in place of one less preferred', ended(PT), view(ORT, CPU),
     CLEARED.format('PT') + 'CPU → retiring, PT → standby'),
    ('not of one more preferred', ended(CPU), view(ORT, PT), CLEARED.format('CPU') + 'CPU → retiring'),
    ('another engine of the active rung is preferred least', ended(ORT), view(ORT, CPU),
     CLEARED.format('ORT') + 'ORT → retiring'),
    ('one on a lost GPU retires no standby (D2)', ended(PT), view(ORT, CPU, gpu=LOST),
     CLEARED.format('PT') + 'PT → retiring'),
    ('a failed standby pauses', ended(PT, engine_of=False), view(ORT), 'pause standby PT'),
    ('a failed preferred standby pauses longer', ended(PT, engine_of=False), view(ORT, CPU), 'pause promotion PT'),
    ('a failed better rung pauses, and is told', ended(TRT, engine_of=False), view(ORT, CPU),
     'pause promotion TRT, TRT failed'),
    ("a better rung that lacks memory gets the standby's", ended(TRT, lacks=50), view(ORT, engine(PT, 60)),
     'PT → retiring, pause standby PT, load TRT'),
    ('not where that is too little', ended(TRT, lacks=70), view(ORT, engine(PT, 60)),
     'pause promotion TRT, TRT failed'),
    ('a standby that lacks memory gets nothing', ended(PT, lacks=10), view(ORT, None, engine(TRT, 60)),
     'pause standby PT'),
]  # fmt: skip


@table(('load', 'seen', 'actions'), AFTER_LOAD)
def test_f3_f6_after_a_load(load, seen, actions):
    lack_bytes = load.error.lack_bytes if isinstance(load.error, GpuMemoryError) else None
    assert told(policy.after_load(load, seen, lack_bytes=lack_bytes)) == actions


FULL = view(ORT, engine(PT, 60), engine(TRT, 40))
FREED = 'TRT → retiring, pause promotion TRT, PT → retiring, pause standby PT'
MAKE_ROOM = [
    ('the shadow goes first', FULL, 30, 'TRT → retiring, pause promotion TRT'),
    ('and is enough', FULL, 40, 'TRT → retiring, pause promotion TRT'),
    ('then the standby', FULL, 41, FREED),
    ('nothing is freed in vain', FULL, 101, None),
    ('an engine without GPU memory stays', view(ORT, engine(CPU), engine(TRT, 40)), 30,
     'TRT → retiring, pause promotion TRT'),
    ('loads go last', replace(FULL, loads=loads(TRT)), 101, f'{FREED}, cancel TRT, pause promotion TRT'),
    ('loads stay where the others do', replace(FULL, loads=loads(TRT)), 100, FREED),
    ('loads for the CPU stay', replace(FULL, loads=loads(CPU)), 101, None),
    ('a standby that was being loaded pauses as such', view(ORT, loads=loads(PT)), 10, 'cancel PT, pause standby PT'),
    ('also where the standby goes with it', view(ORT, engine(PT, 60), loads=loads(PT)), 70,
     'PT → retiring, pause standby PT, cancel PT, pause standby PT'),
    ('there is nothing to free', view(ORT), 10, None),
]  # fmt: skip


@table(('seen', 'lack', 'actions'), MAKE_ROOM)
def test_f3_memory_is_taken_from_the_shadow_then_the_standby_then_loads(seen, lack, actions):
    found = policy.make_room(lack, seen)
    assert (found if found is None else told(found)) == actions


def test_f3_a_load_that_lacks_memory_does_not_end_itself():
    own, other = loads(TRT, ORT)
    seen = view(CPU, loads=(own, other))
    assert told(policy.make_room(10, seen, but=own)) == 'cancel ORT, pause promotion ORT'
    assert policy.make_room(10, replace(seen, loads=(own,)), but=own) is None


# --- reconcile ------------------------------------------------------------------------------------

AGREES = {'agreements': policy.SHADOWED_FRAMES}
RECONCILE = [
    ('a shadow that agrees serves, and what served is the standby', policy.promotion,
     view(ORT, PT, engine(TRT, **AGREES)), 'switch [PT → retiring, ORT → standby, TRT → serving]'),
    ('no standby is kept where none is wanted', policy.promotion,
     view(ORT, None, engine(TRT, **AGREES), hot_standby=False), 'switch [ORT → retiring, TRT → serving]'),
    ('one frame too few', policy.promotion, view(ORT, PT, engine(TRT, agreements=policy.SHADOWED_FRAMES - 1)), ''),
    ('nothing serves', policy.promotion, view(None, None, engine(TRT, **AGREES)), ''),
    ('on a lost GPU it shows that the GPU is back', policy.promotion,
     view(CPU, CPU, engine(TRT, **AGREES), gpu=LOST),
     'switch [trust the GPU, CPU → retiring, CPU → standby, TRT → serving]'),
    ('nothing departs from a healthy GPU', policy.departure, view(TRT, CPU), ''),
    ('the standby serves in place of an engine on a lost GPU', policy.departure, view(TRT, CPU, gpu=LOST),
     'switch [TRT → retiring, CPU → serving]'),
    ('it answers until there is one', policy.departure, view(TRT, gpu=LOST), 'load CPU (standby)'),
    ('the CPU stays', policy.departure, view(CPU, gpu=LOST), ''),
    ('nothing serves: nothing departs', policy.departure, view(gpu=LOST), ''),
]  # fmt: skip


@table(('decide', 'seen', 'actions'), RECONCILE)
def test_f2_f6_between_two_frames(decide, seen, actions):
    assert told(decide(seen)) == actions


def test_f6_promotion_comes_before_departure():
    assert list(policy.RECONCILE) == [policy.promotion, policy.departure]


BUSY = {'expected': {'x': np.zeros(1)}}
AFTER_SERVING = [
    ('a shadow that is still better stays', view(ORT, None, TRT), ''),
    ('one that is not becomes the standby', view(TRT, None, engine(ORT)), 'ORT → standby'),
    ('unless there is one', view(TRT, CPU, engine(ORT)), 'ORT → retiring'),
    ('or it could not be asked', view(TRT, None, engine(ORT, **BUSY)), 'ORT → retiring'),
    ('or none is wanted', view(TRT, None, engine(ORT), hot_standby=False), 'ORT → retiring'),
    ('there is none', view(TRT), ''),
]


@table(('seen', 'actions'), AFTER_SERVING)
def test_f6_a_shadow_that_is_no_better_any_more(seen, actions):
    assert told(policy.after_serving(seen)) == actions


# --- failures -------------------------------------------------------------------------------------

SUSPEND = [
    ('every rung on it pauses', view(CPU, gpu=LOST), 'pause promotion TRT, pause promotion ORT, pause promotion PT'),
    ('a shadow on it goes', view(ORT, CPU, TRT, gpu=LOST),
     'TRT → retiring, pause promotion TRT, pause promotion ORT, pause promotion PT'),
    ('a chain of GPU rungs has nothing else', view(ORT, None, TRT, rungs=(TRT, ORT), gpu=LOST), ''),
]  # fmt: skip


@table(('seen', 'actions'), SUSPEND)
def test_f2_a_lost_gpu_is_left_alone_for_a_pause(seen, actions):
    assert told(policy.suspend_gpu(seen)) == actions


def test_f6_a_rung_that_failed_pauses_once():
    assert told(policy.pause_after_failure(TRT, view())) == 'pause promotion TRT'
    assert told(policy.pause_after_failure(TRT, view(gpu=LOST))) == '', 'suspend_gpu has had it pause'
    assert told(policy.pause_after_failure(CPU, view(gpu=LOST))) == 'pause promotion CPU'


WAITING = [
    # standby, seconds, loaded for this request, the standby has answered: what the request does
    (CPU, 0.2, False, False, Wait.LATE),
    (None, 0.2, False, False, Wait.GO_ON),
    (None, 1.1, False, False, Wait.GO_ON),
    (None, 10.0, False, False, Wait.GO_ON),
    (None, 10.1, False, False, Wait.ABANDON),
    (CPU, 0.2, True, False, Wait.GO_ON),
    (CPU, 1.0, True, False, Wait.GO_ON),
    (CPU, 1.1, True, False, Wait.LATE),
    (None, 1.1, True, False, Wait.LATE),
    (CPU, 0.2, True, True, Wait.LATE),
]


@pytest.mark.parametrize(('standby', 'age_s', 'last', 'answered', 'wait'), WAITING)
def test_f4_a_late_engine_is_left_for_the_standby_and_never_for_nothing(standby, age_s, last, answered, wait):
    """Its hang limit is a second."""
    seen = view(TRT, standby)
    assert policy.while_waiting(seen.serving, age_s, seen, last=last, standby_answered=answered) is wait


LATE, FAILED, DIED = Outcome
ATTEMPTS = [
    ('late: the standby is asked', Attempted(TRT, LATE), Next.ASK_STANDBY, ()),
    ('late, loaded for this request: the request is what it hangs on', Attempted(PT, LATE, fresh=True),
     Next.REPLACE_FOR_LATER, (PT, CPU)),
    ('unless the standby has answered it', Attempted(PT, LATE, fresh=True, standby_answered=True),
     Next.ASK_STANDBY, ()),
    ('failed: the next rungs, then the rung itself', Attempted(TRT, FAILED), Next.REPLACE, (ORT, PT, CPU, TRT)),
    ('died: likewise', Attempted(ORT, DIED, alive=False), Next.REPLACE, (PT, CPU, ORT)),
    ('the last rung failed: engine or request?', Attempted(CPU, FAILED), Next.SELF_TEST, ()),
    ('a rung failed again: engine or request?', Attempted(TRT, FAILED, again=True), Next.SELF_TEST, ()),
    ('it passes: the request', Attempted(CPU, FAILED, passed=True), Next.BLAME_REQUEST, ()),
    ('it fails: the engine', Attempted(CPU, FAILED, passed=False), Next.REPLACE, (CPU,)),
    ('the last rung died: no self-test can tell', Attempted(CPU, DIED, alive=False), Next.REPLACE, (CPU,)),
    ('died again before it was loaded afresh', Attempted(TRT, DIED, again=True, alive=False),
     Next.REPLACE, (ORT, PT, CPU, TRT)),
    ('failed after it was loaded afresh: not once more', Attempted(TRT, FAILED, again=True, reloads=1, passed=False),
     Next.REPLACE, (ORT, PT, CPU)),
    ('died after it was loaded afresh: by chance, perhaps', Attempted(TRT, DIED, again=True, reloads=2, alive=False),
     Next.REPLACE, (ORT, PT, CPU, TRT)),
    ('three times: not once more', Attempted(TRT, DIED, again=True, reloads=3, alive=False),
     Next.REPLACE, (ORT, PT, CPU)),
    ('the last rung died three times: for the requests to come', Attempted(
        CPU, DIED, again=True, reloads=3, alive=False), Next.RELOAD, (CPU,)),
    ('twice: not yet', Attempted(CPU, DIED, again=True, reloads=2, alive=False), Next.REPLACE, (CPU,)),
    ('nothing is left', Attempted(CPU, FAILED, again=True, reloads=1, passed=False), Next.REPLACE, ()),
    ('asked the first time, however often it was loaded', Attempted(TRT, FAILED, reloads=1),
     Next.REPLACE, (ORT, PT, CPU, TRT)),
]  # fmt: skip


@table(('attempt', 'what', 'rungs'), ATTEMPTS)
def test_f2_f4_after_an_attempt_that_came_to_nothing(attempt, what, rungs):
    assert policy.after_attempt(attempt, view()) == (what, rungs)
