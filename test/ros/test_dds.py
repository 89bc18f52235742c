"""The DDS profile: chosen only where the user chose nothing, in force, and missed aloud where it is not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gps_denied_c7.ros import dds_memory
from gps_denied_c7.ros.dds_memory import HD_IMAGE_BYTES, HostTransport, sweep_segments, transport_warnings
from gps_denied_c7.ros.fastdds import (
    apply_profile,
    free_taken_messages,
    profile_path,
    segment_size,
)
from support.harness import NodeProcess, free_domain_id, wait_until
from support.source_tree import REPOSITORY

OLD, NEW = 'FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE'
SKIP = 'SKIP_DEFAULT_XML_FILE'
QOS_FROM_XML = 'RMW_FASTRTPS_USE_QOS_FROM_XML'
GOOD = HostTransport(shm_free_bytes=1 << 30, segment_bytes=70 << 20, rmem_max_bytes=1 << 26)
BARE = HostTransport(shm_free_bytes=1 << 30, segment_bytes=549_408, rmem_max_bytes=212_992)


def prefix(tmp_path: Path, package: str) -> str:
    (tmp_path / 'share' / package).mkdir(parents=True)
    return str(tmp_path)


@pytest.mark.parametrize(('package', 'variable'), [('fastrtps', OLD), ('fastdds', NEW)])
def test_sets_the_variable_that_the_installed_fast_dds_reads(tmp_path, package, variable):
    """§8: FASTRTPS_... for Jazzy, FASTDDS_... for Kilted, and not the other, which Kilted warns about."""
    environ = {'AMENT_PREFIX_PATH': f'/nowhere:{prefix(tmp_path, package)}'}
    decision = apply_profile(environ)
    assert decision.applied
    assert environ[variable] == str(decision.path) == str(profile_path())
    assert {OLD, NEW} & set(environ) == {variable}
    assert variable in decision.reason and 'publishers' in decision.reason


@pytest.mark.parametrize(('distro', 'variable'), [('humble', OLD), ('jazzy', OLD), ('kilted', NEW), ('rolling', NEW)])
def test_goes_by_the_distribution_where_no_package_tells(distro, variable):
    environ = {'ROS_DISTRO': distro, 'RMW_IMPLEMENTATION': 'rmw_fastrtps_cpp'}
    apply_profile(environ)
    assert {OLD, NEW} & environ.keys() == {variable}


@pytest.mark.parametrize(
    'chosen', [{OLD: '/my.xml'}, {NEW: '/my.xml'}, {'FASTDDS_BUILTIN_TRANSPORTS': 'LARGE_DATA'}],
)  # fmt: skip
def test_leaves_what_the_user_chose(chosen):
    """§8: only when the user set neither."""
    environ = dict(chosen)
    decision = apply_profile(environ)
    assert environ == {**chosen, SKIP: '1'} and not decision.applied
    assert next(iter(chosen.values())) in decision.reason


@pytest.mark.parametrize('rmw', ['rmw_cyclonedds_cpp', 'rmw_zenoh_cpp'])
def test_leaves_other_middleware_alone(rmw):
    """§8: and the RMW is Fast DDS."""
    environ = {'RMW_IMPLEMENTATION': rmw}
    assert not apply_profile(environ).applied
    assert environ == {'RMW_IMPLEMENTATION': rmw}
    assert transport_warnings(environ, host=BARE) == ()


def test_a_child_inherits_the_profile_without_complaint():
    environ: dict[str, str] = {}
    assert apply_profile(environ).applied
    again = apply_profile(environ)
    assert not again.applied and again.path == profile_path()


def test_the_memory_of_taken_messages_is_freed_with_the_shipped_profile_and_with_copies_of_it(tmp_path):
    own = tmp_path / 'own.xml'
    own.write_text(profile_path().read_text().replace('67108864', '1048576'))
    for profile in (profile_path(), own):
        environ: dict[str, str] = {}
        assert free_taken_messages(environ, profile) and environ == {QOS_FROM_XML: '1'}
        assert free_taken_messages(environ, profile)


@pytest.mark.parametrize('content', [
    None, '<dds/>', 'no xml', '<dds><data_reader profile_name="mine"/></dds>',
    *(f'<?xml version="1.0" encoding="{name}"?><dds/>' for name in ('gb2312', 'utf-32', 'of no kind', 'x-none')),
])  # fmt: skip
def test_a_profile_of_the_user_says_itself_what_memory_is_kept(tmp_path, content):
    profile = tmp_path / 'own.xml'
    if content is not None:
        profile.write_text(content)
    environ: dict[str, str] = {}
    assert not free_taken_messages(environ, profile) and not free_taken_messages(environ, None)
    assert environ == {}


@pytest.mark.parametrize('chosen', [{QOS_FROM_XML: '0'}, {'RMW_FASTRTPS_PUBLICATION_MODE': 'ASYNCHRONOUS'}], ids=str)
def test_how_the_user_has_messages_published_stays(chosen):
    environ = dict(chosen)
    assert not free_taken_messages(environ, profile_path()) and environ == chosen


def test_the_profile_holds_many_images():
    assert segment_size(profile_path()) >= 64 << 20
    assert segment_size(profile_path()) >= 10 * HD_IMAGE_BYTES


def test_finds_the_profile_from_an_installed_prefix(tmp_path):
    """B-1: colcon puts the module below lib and the profile below share of one prefix."""
    module = tmp_path / 'lib' / 'python3.x' / 'site-packages' / 'gps_denied_c7' / 'ros'
    module.mkdir(parents=True)
    config = tmp_path / 'share' / 'gps_denied_c7' / 'config'
    config.mkdir(parents=True)
    for name in ('__init__.py', 'ros/__init__.py', 'ros/fastdds.py'):
        shutil.copy(REPOSITORY / 'gps_denied_c7' / name, module.parent / name)
    code = 'from gps_denied_c7.ros import fastdds; print(fastdds.__file__, fastdds.profile_path())'
    found = []
    for copy in (False, True):
        if copy:
            shutil.copy(REPOSITORY / 'config' / 'fastdds_shm.xml', config)
        run = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(module.parents[1])},
        )  # fmt: skip
        found.append(run.stdout.split())
    assert found == [
        [str(module / 'fastdds.py'), 'None'],
        [str(module / 'fastdds.py'), str(config / 'fastdds_shm.xml')],
    ]


def test_all_well_says_nothing():
    assert transport_warnings({OLD: str(profile_path())}, host=GOOD) == ()
    assert transport_warnings({'FASTDDS_BUILTIN_TRANSPORTS': 'LARGE_DATA'}, host=BARE) == ()


def test_names_the_variable_and_the_file_when_no_profile_is_in_force():
    warnings = transport_warnings({'ROS_DISTRO': 'jazzy'}, host=BARE)
    assert len(warnings) == 2
    assert f'{OLD}={profile_path()}' in warnings[0]
    assert 'sysctl -w net.core.rmem_max=24883200' in warnings[1]


def test_small_images_need_no_profile():
    assert transport_warnings({}, image_bytes=320 * 240, host=BARE) == ()


@pytest.mark.parametrize(
    ('content', 'words', 'remedy'),
    [
        (None, 'cannot be read', 'Correct it, or unset it'),
        ('<dds><segment_size>1000000</segment_size></dds>', 'gives 1.0 MB', 'Set its segment_size to 24883200.'),
        ('no xml', 'has no segment_size', 'Set its segment_size to 24883200.'),
    ],
)
def test_judges_the_users_own_profile(tmp_path, content, words, remedy):
    profile = tmp_path / 'own.xml'
    if content is not None:
        profile.write_text(content)
    first, *_ = transport_warnings({NEW: str(profile)}, host=BARE)
    assert words in first and str(profile) in first and remedy in first
    assert ('Set its' in first) is (content is not None)


@pytest.mark.parametrize(('free', 'words'), [(None, 'there is no /dev/shm'), (64 << 20, '67.1 MB left')])
def test_names_the_shared_memory_that_is_too_small(free, words):
    """Docker gives 64 MiB, of which the profile's segment takes a little more."""
    host = HostTransport(free, 0, None)
    [warning] = transport_warnings({OLD: str(profile_path())}, host=host)
    assert words in warning and 'docker run --shm-size=1g' in warning and 'fastdds shm clean' in warning


def test_names_the_room_that_the_next_process_lacks():
    [warning] = transport_warnings({OLD: str(profile_path())}, host=HostTransport(10 << 20, 70 << 20, None))
    assert '10.5 MB left' in warning and '--shm-size' in warning


def test_names_a_profile_that_came_too_late():
    [warning] = transport_warnings({OLD: str(profile_path())}, host=HostTransport(1 << 30, 549_408, None))
    assert 'before the process starts' in warning


CHILD = """
import json, os, sys
from pathlib import Path
from gps_denied_c7.ros import dds_memory, fastdds
from gps_denied_c7.ros.dds_memory import HostTransport, transport_warnings
from gps_denied_c7.ros.fastdds import OWN_PORTS, apply_profile, write_profile
asked = sys.argv[1] == 'profile'
written = write_profile(Path(sys.argv[2]), ports=OWN_PORTS, transports=asked)
fastdds.profile_path = dds_memory.profile_path = lambda: written
environ = os.environ if asked else dict(os.environ)
decision = apply_profile(environ)
judged = dict(os.environ)
os.environ[fastdds.profile_variable(os.environ)] = str(written)
import rclpy
rclpy.init()
node = rclpy.create_node('probe')
segment = HostTransport.read().segment_bytes
print(json.dumps([decision.applied, segment, transport_warnings(judged)]))
node.destroy_node()
rclpy.shutdown()
"""


@pytest.fixture(autouse=True)
def own_domain(monkeypatch, domain_id) -> None:
    monkeypatch.setenv('ROS_DOMAIN_ID', str(domain_id))


def run_child(folder: Path, *arguments: str, prefix: tuple[str, ...] = ()):
    """Make a participant with the shipped profile or without, in either case on the tests' ports."""
    pytest.importorskip('rclpy')
    chosen = {OLD, NEW, 'FASTDDS_BUILTIN_TRANSPORTS'}
    environ = {name: value for name, value in os.environ.items() if name not in chosen}
    run = subprocess.run(
        [*prefix, sys.executable, '-c', CHILD, *arguments, str(folder / 'written.xml')], env=environ, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


needs_room = pytest.mark.skipif(
    not Path('/dev/shm').is_dir() or shutil.disk_usage('/dev/shm').free < 160 << 20,
    reason='needs 160 MB in /dev/shm: docker run --shm-size=1g',
)
needs_fast_dds = pytest.mark.skipif(
    os.environ.get('RMW_IMPLEMENTATION', 'rmw_fastrtps_cpp') != 'rmw_fastrtps_cpp', reason='RMW is not Fast DDS'
)


@needs_room
@needs_fast_dds
def segment(folder, name, *, age_s=60.0):
    """Write what Fast DDS leaves behind: a segment, and the file that its process locks."""
    for path in (folder / name, folder / f'{name}_el'):
        path.write_bytes(bytes(1000) if path.suffix == '' and not path.name.endswith('_el') else b'')
        os.utime(path, (time.time() - age_s,) * 2)
    return folder / name


def test_what_killed_processes_left_of_fast_dds_is_removed_and_nothing_else(tmp_path):
    dead = segment(tmp_path, 'fastrtps_0123456789abcdef')
    half = segment(tmp_path, 'fastdds_0123456789abcdef')
    half.unlink()
    kept = [
        segment(tmp_path, 'fastdds_00000000000000ff', age_s=1.0),
        segment(tmp_path, 'fastrtps_port7412'),
        segment(tmp_path, 'fastest_0123456789abcdef'),
        segment(tmp_path, 'fastrtps_fedcba9876543210'),
    ]
    os.mkfifo(tmp_path / 'fastdds_00000000000000aa_el')
    os.utime(tmp_path / 'fastdds_00000000000000aa_el', (0, 0))
    os.symlink(kept[2], tmp_path / 'fastdds_00000000000000bb_el')
    odd = ['fastdds_00000000000000aa_el', 'fastdds_00000000000000bb_el']
    with open(f'{kept[-1]}_el') as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        swept = sweep_segments(tmp_path)
    assert (swept.removed, swept.removed_bytes, swept.refused) == (2, 1000, 0)
    assert not dead.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*odd, *(name for path in kept for name in (path.name, f'{path.name}_el'))]
    )
    assert 'Removed 2' in str(swept)
    assert str(sweep_segments(tmp_path / 'nowhere')) == ''


def test_a_node_removes_what_a_killed_one_left(monkeypatch):
    """With the real Fast DDS: a live participant keeps its memory, and a killed one's is gone."""
    monkeypatch.setattr(dds_memory, '_SETTLED_S', 0.0)
    with free_domain_id() as domain_id:
        killed, living = (NodeProcess(domain_id, {}, ('-r', f'__node:={name}')) for name in ('killed', 'living'))
        try:
            for node in (killed, living):
                wait_until(lambda node=node: 'DDS profile' in node.output(), 'its start')
            left, used = killed.shared_memory(), living.shared_memory()
            assert left and used
            # As if they were new: no other node that starts on this machine meanwhile takes them before this test does.
            for path in left:
                os.utime(path)
            killed.signal(signal.SIGKILL)
            killed.wait()
            assert all(path.exists() for path in left), 'Fast DDS cleans up by itself now: the sweep can go'

            def swept() -> bool:
                # Somebody else's sweep may hold their locks just then.
                sweep_segments()
                return not any(path.exists() for path in left)

            wait_until(swept, 'the end of what the killed one left')
            assert all(path.exists() for path in used)
        finally:
            killed.close()
            living.close()


def test_fast_dds_takes_the_profile(tmp_path):
    """§8: with the real middleware the segment is there, and the check that looks for it finds it."""
    (applied, segment, warnings), noise = run_child(tmp_path, 'profile')
    assert applied and segment >= 64 << 20 and warnings == []
    assert 'deprecated' not in noise and 'XMLPARSER' not in noise
    (_, segment, warnings), _ = run_child(tmp_path, 'no profile')
    assert 0 < segment < 1 << 20
    assert 'DEFAULT_PROFILES_FILE=' in warnings[0]


@needs_fast_dds
def test_a_small_shared_memory_is_noticed_for_real(tmp_path):
    """§8: in a container's 64 MiB Fast DDS silently goes on with UDP; the check says so."""
    unshare = ('unshare', '--mount', 'sh', '-c', 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', 'sh')
    if not shutil.which('unshare') or subprocess.run([*unshare, 'true'], capture_output=True).returncode:
        pytest.skip('may not mount a small /dev/shm here; needs CAP_SYS_ADMIN')
    (applied, segment, warnings), _ = run_child(tmp_path, 'profile', prefix=unshare)
    assert applied and segment < 1 << 20
    assert '--shm-size=1g' in warnings[0]


# With the C library's own functions, after the settings that the argument asks for.
ALLOCATIONS = """
import ctypes, resource, sys, threading
from gps_denied_c7.ros.fastdds import tune_allocator
done = tune_allocator() if sys.argv[1] == 'tune' else None
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
"""

FAULTS = """
def frame(size):
    blocks = [library.malloc(size) for _ in range(2)]
    for block in blocks:
        library.memset(block, 1, size)
    for block in blocks:
        library.free(block)
for _ in range(3):
    frame(1920 * 1080 * 3 + 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    frame(1920 * 1080 * 3 + 64)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def plain_environ() -> dict[str, str]:
    """Return the environment without anybody's own settings of the allocator."""
    return {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}


def test_tuned_allocator_stops_the_page_faults():
    """Half of what a 1080p frame costs beyond copying is page faults of fresh memory; they end."""

    def faults(argument: str, **extra: str) -> tuple[str, int]:
        run = subprocess.run(
            [sys.executable, '-c', ALLOCATIONS + FAULTS, argument], capture_output=True, text=True, check=True,
            env={**plain_environ(), **extra},
        )  # fmt: skip
        done, count = run.stdout.split()
        return done, int(count)

    done, tuned = faults('tune')
    if done == 'False':
        pytest.skip('the C library is not glibc')
    assert tuned < 2000
    assert faults('as it is')[1] > 20 * 2 * 1000
    assert faults('tune', MALLOC_TOP_PAD_='131072')[0] == 'False'


ARENAS = """
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
def use(done, over):
    block = library.malloc(20 << 20)
    library.memset(block, 1, 20 << 20)
    library.free(block)
    done.set()
    over.wait()
over, before = threading.Event(), None
for _ in range(9):
    used = threading.Event()
    threading.Thread(target=use, args=(used, over)).start()
    used.wait()
    before = before or resident()
print(done, resident() - before)
over.set()
"""


def test_threads_share_what_the_tuned_allocator_keeps():
    """Engines are loaded in threads of their own: each could keep as much again."""
    run = subprocess.run(
        [sys.executable, '-c', ALLOCATIONS + ARENAS, 'tune'], capture_output=True, text=True, check=True,
        env=plain_environ(),
    )  # fmt: skip
    done, growth = run.stdout.split()
    if done == 'False':
        pytest.skip('the C library is not glibc')
    assert int(growth) < 20 << 20
