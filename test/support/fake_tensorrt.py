"""
Stand-ins for TensorRT and CUDA, which need a GPU that this machine lacks.

They do in NumPy what the real ones do on a GPU, keep a log of the calls, and fail where a test says so. What
they prove is order, ownership and error handling; what TensorRT makes of it is proven by the GPU suite.
"""

from __future__ import annotations

import ctypes
import enum
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ['SHAPE', 'FakeCudaThisMachineHasNone', 'FakeTensorrtThisMachineCannotRun', 'broken', 'plan_of']

SHAPE = (1, 3, 4)


def plan_of(version: tuple[int, int, int, int] = (8, 6, 0, 12), size: int = 400) -> bytes:
    """Return bytes that look like a plan."""
    return b'ftrt' + bytes(20) + bytes(version) + bytes(range(256)) * (size // 256 + 1)


class _Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorNotSupported = 801
    cudaErrorStreamCaptureUnsupported = 900


# Calls whose status is followed by a value, which is None where they fail.
_ANSWERING = {
    'cudaGetDeviceCount', 'cudaGraphInstantiateWithFlags', 'cudaHostAlloc', 'cudaMalloc', 'cudaStreamEndCapture',
    'cuModuleLoadData',
}


class _Handle:
    def __init__(self, kind: str, number: int) -> None:
        self.kind = kind
        self.number = number
        self.operations: list[Callable[[], None]] = []

    def __int__(self) -> int:
        return self.number


class FakeCudaThisMachineHasNone:
    """cuda-python's two modules; GPU memory is a buffer of this process."""

    cudaError_t = _Status
    cudaMemcpyKind = enum.IntEnum('cudaMemcpyKind', {'cudaMemcpyHostToDevice': 1, 'cudaMemcpyDeviceToHost': 2})
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor='major', cudaDevAttrComputeCapabilityMinor='minor'
    )
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaHostRegisterDefault = 0
    cudaHostRegisterReadOnly = 8

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: dict[str, _Status] = {}
        self.devices = 1
        self.kernel_works = True
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.locked: dict[int, range] = {}
        self.live: list[_Handle] = []
        self._capturing: list[Callable[[], None]] | None = None
        self._numbers = iter(range(1000, 10**6))

    def __getattr__(self, name: str) -> Any:
        operation = object.__getattribute__(self, f'_do_{name}')

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append(name)
            if status := self.fails.get(name):
                return (status, None) if name in _ANSWERING else (status,)
            answer = operation(*arguments)
            return (_Status.cudaSuccess,) if answer is None else (_Status.cudaSuccess, *answer)

        return call

    def enqueue(self, operation: Callable[[], None]) -> None:
        """Do, or note while capturing, what was put on the stream."""
        if self._capturing is None:
            operation()
        else:
            self._capturing.append(operation)

    def array(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return GPU memory as an array."""
        assert address in self.memory, 'not GPU memory, or freed'
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    # --- runtime ----------------------------------------------------------------------------------

    def _do_cudaGetDeviceCount(self):
        return (self.devices,)

    def _do_cudaGetDevice(self):
        return (0,)

    def _do_cudaDeviceGetAttribute(self, attribute, device):
        return ({'major': 9, 'minor': 0}[attribute],)

    def _do_cudaGetDeviceProperties(self, device):
        return (SimpleNamespace(name=b'Fake GPU\0\0'),)

    def _do_cudaDriverGetVersion(self):
        return (12040,)

    def _do_cudaRuntimeGetVersion(self):
        return (11080,)

    def _do_cudaMemGetInfo(self):
        return (8 << 30, 16 << 30)

    def _do_cudaGetErrorName(self, status):
        return (_Status(status).name.encode(),)

    def _do_cudaGetErrorString(self, status):
        return (b'as the test wants it',)

    def _do_cudaGetLastError(self):
        return ()

    def _do_cudaHostAlloc(self, size, flags):
        return (self._allocate(self.pinned, size),)

    def _do_cudaFreeHost(self, address):
        del self.pinned[address]

    def _do_cudaHostRegister(self, address, size, flags):
        assert flags in (self.cudaHostRegisterDefault, self.cudaHostRegisterReadOnly)
        pages = range(address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE + 1)
        taken = [page for pages_of in self.locked.values() for page in pages_of]
        assert not set(pages) & set(taken), 'a page may be locked once'
        self.locked[address] = pages
        self.pinned[address] = (ctypes.c_uint8 * size).from_address(address)

    def _do_cudaHostUnregister(self, address):
        del self.locked[address], self.pinned[address]

    def _do_cudaMalloc(self, size):
        return (self._allocate(self.memory, size),)

    def _do_cudaFree(self, address):
        del self.memory[address]

    def _do_cudaMemset(self, address, value, size):
        ctypes.memset(address, value, size)

    def _do_cudaMemcpyAsync(self, target, source, size, kind, stream):
        places = (self.memory, self.pinned) if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else (
            self.pinned, self.memory
        )
        assert target in places[0] and source in places[1]
        self.enqueue(lambda: ctypes.memmove(target, source, size))

    def _do_cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        return (self._new('stream'),)

    def _do_cudaStreamSynchronize(self, stream):
        assert stream in self.live

    def _do_cudaStreamDestroy(self, stream):
        self.live.remove(stream)

    def _do_cudaStreamBeginCapture(self, stream, mode):
        self._capturing = []

    def _do_cudaStreamEndCapture(self, stream):
        operations, self._capturing = self._capturing, None
        graph = self._new('graph')
        graph.operations = operations or []
        return (graph,)

    def _do_cudaGraphInstantiateWithFlags(self, graph, flags):
        executable = self._new('executable')
        executable.operations = graph.operations
        return (executable,)

    def _do_cudaGraphLaunch(self, executable, stream):
        assert executable in self.live
        for operation in executable.operations:
            operation()

    def _do_cudaGraphDestroy(self, graph):
        self.live.remove(graph)

    def _do_cudaGraphExecDestroy(self, executable):
        self.live.remove(executable)

    # --- driver -----------------------------------------------------------------------------------

    def CUstream(self, number: int) -> int:
        return number

    def _do_cuGetErrorName(self, status):
        return (_Status(status).name.encode(),)

    def _do_cuGetErrorString(self, status):
        return (b'as the test wants it',)

    def _do_cuModuleLoadData(self, image):
        assert image.endswith(b'\0') and b'.entry find_non_finite' in image
        return (self._new('module'),)

    def _do_cuModuleGetFunction(self, module, name):
        assert name == b'find_non_finite'
        return (self._new('function'),)

    def _do_cuModuleUnload(self, module):
        self.live.remove(module)

    def _do_cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        types = (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64)
        pointers = (ctypes.c_void_p * len(types)).from_address(parameters)
        data, quads, low, high, flag = (
            kind.from_address(pointer).value for kind, pointer in zip(types, pointers, strict=True)
        )
        assert gx * bx > 0 and flag in self.pinned

        def look() -> None:
            words = self.array(data, (quads * 4,), 'uint32')
            if self.kernel_works and (((words & low) == low) | ((words & high) == high)).any():
                ctypes.c_uint32.from_address(flag).value = 1

        self.enqueue(look)

    def _new(self, kind: str) -> _Handle:
        handle = _Handle(kind, next(self._numbers))
        if kind != 'function':
            self.live.append(handle)
        return handle

    def _allocate(self, place: dict[int, Any], size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        place[ctypes.addressof(block)] = block
        return ctypes.addressof(block)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


_FLOAT, _BF16 = _Named('FLOAT'), _Named('BF16')


class FakeTensorrtThisMachineCannotRun:
    """
    The tensorrt module, of a version with the names that the tests want; its one network adds and divides.

    :param cuda: whose memory the network computes in.
    :param version: decides which names there are.
    """

    def __init__(self, cuda: FakeCudaThisMachineHasNone, version: str = '8.6.0') -> None:
        self.__version__ = version
        self.cuda = cuda
        self.log = cuda.log
        self.shape: tuple[int, ...] = SHAPE
        self.profile = [(1, 3, 4), (2, 3, 4), (4, 3, 4)]
        self.dtype = _FLOAT
        self.format = 'LINEAR'
        self.refuses: set[str] = set()
        self.report = 'a reason of TensorRT'
        self.built: dict[str, Any] = {}
        major = int(version.split('.')[0])
        self.TensorIOMode = SimpleNamespace(INPUT='in', OUTPUT='out')
        self.TensorLocation = SimpleNamespace(DEVICE='device', HOST='host')
        self.TensorFormat = SimpleNamespace(LINEAR='LINEAR', CHW4='CHW4')
        self.MemoryPoolType = SimpleNamespace(WORKSPACE='workspace')
        self.ErrorCodeTRT = SimpleNamespace(SUCCESS=_Named('SUCCESS'), INTERNAL_ERROR=_Named('INTERNAL_ERROR'))
        flags = {'TF32': 'tf32', **({'FP16': 'fp16'} if major < 11 else {})}
        self.BuilderFlag = SimpleNamespace(**flags)
        kinds = {'EXPLICIT_BATCH': 0, **({'STRONGLY_TYPED': 1} if major >= 10 else {})}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**kinds)
        self.ILogger = type('ILogger', (), {})
        self.IErrorRecorder = type('IErrorRecorder', (), {})
        if major >= 10:
            self.IProgressMonitor = type('IProgressMonitor', (), {})

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        return True

    def Runtime(self, logger: Any) -> _Runtime:
        self.log.append('Runtime')
        return _Runtime(self)

    def Builder(self, logger: Any) -> _Builder:
        self.log.append('Builder')
        return _Builder(self)

    def OnnxParser(self, network: Any, logger: Any) -> _Parser:
        return _Parser(self)

    def works(self, what: str, recorder: Any = None) -> bool:
        """Note a call, and report an error where the test wants it to fail."""
        self.log.append(what)
        if what not in self.refuses:
            return True
        if recorder is not None:
            recorder.report_error(self.ErrorCodeTRT.INTERNAL_ERROR, f'{self.report} ({what})')
        return False


class _Runtime:
    error_recorder: Any = None

    def __init__(self, trt: FakeTensorrtThisMachineCannotRun) -> None:
        self.trt = trt

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if not self.trt.works('deserialize', self.error_recorder):
            return None
        return _Engine(self)

    def __del__(self) -> None:
        self.trt.log.append('~Runtime')


class _Engine:
    error_recorder: Any = None
    num_io_tensors = 4
    device_memory_size = 1 << 20

    def __init__(self, runtime: _Runtime) -> None:
        self.runtime = runtime
        self.trt = runtime.trt

    def create_execution_context(self) -> _Context | None:
        return _Context(self) if self.trt.works('context', self.error_recorder) else None

    def get_tensor_name(self, index: int) -> str:
        return ('left', 'right', 'total', 'ratio')[index]

    def get_tensor_mode(self, name: str) -> str:
        return 'in' if name in ('left', 'right') else 'out'

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.trt.shape

    def get_tensor_dtype(self, name: str) -> _Named:
        return self.trt.dtype

    def get_tensor_location(self, name: str) -> str:
        return 'device'

    def get_tensor_format(self, name: str) -> str:
        return self.trt.format

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return self.trt.profile

    def __del__(self) -> None:
        self.trt.log.append('~Engine')


class _Context:
    error_recorder: Any = None

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.trt = engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.trt.works('set_input_shape', self.error_recorder)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name, next(iter(self.shapes.values()), self.trt.shape))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.trt.cuda
        if cuda._capturing is not None and not self.trt.works('execute captured', self.error_recorder):
            return False
        if not self.trt.works('execute', self.error_recorder):
            return False

        def compute() -> None:
            arrays = {
                name: cuda.array(address, self.get_tensor_shape(name), 'float32')
                for name, address in self.addresses.items()
            }
            arrays['total'][...] = arrays['left'] + arrays['right']
            with np.errstate(all='ignore'):
                arrays['ratio'][...] = arrays['left'] / arrays['right']

        cuda.enqueue(compute)
        return True

    def __del__(self) -> None:
        self.trt.log.append('~Context')


class _Tensor:
    is_shape_tensor = False

    def __init__(self, name: str, trt: FakeTensorrtThisMachineCannotRun) -> None:
        self.name = name
        self.dtype = trt.dtype
        self.shape = trt.shape


class _Builder:
    error_recorder: Any = None

    def __init__(self, trt: FakeTensorrtThisMachineCannotRun) -> None:
        self.trt = trt

    def create_network(self, flags: int) -> SimpleNamespace:
        self.trt.built['network_flags'] = flags
        return SimpleNamespace(
            num_inputs=2,
            num_outputs=2,
            get_input=lambda index: _Tensor(('left', 'right')[index], self.trt),
            get_output=lambda index: _Tensor(('total', 'ratio')[index], self.trt),
        )

    def create_builder_config(self) -> _Config:
        return _Config(self.trt)

    def create_optimization_profile(self) -> SimpleNamespace:
        profile = self.trt.built.setdefault('profile', {})
        return SimpleNamespace(set_shape=lambda name, *shapes: profile.__setitem__(name, shapes))

    def build_serialized_network(self, network: Any, config: _Config) -> bytes | None:
        if monitor := getattr(config, 'progress_monitor', None):
            monitor.phase_start('Building Engine', None, 4)
            monitor.phase_start('Tactic Selection', 'Building Engine', 10)
            assert monitor.step_complete('Tactic Selection', 3)
            assert monitor.step_complete('Building Engine', 1)
        if not self.trt.works('build', self.error_recorder):
            return None
        self.trt.built['config'] = config
        numbers = [int(number) for number in self.trt.__version__.split('.')]
        return plan_of((*numbers, 12)[:4])  # type: ignore[arg-type]


class _Config:
    def __init__(self, trt: FakeTensorrtThisMachineCannotRun) -> None:
        self.trt = trt
        self.flags: set[str] = {'tf32'}
        self.limits: dict[str, int] = {}
        self.timings: bytes | None = None
        if tuple(map(int, trt.__version__.split('.')[:2])) >= (8, 6):
            self.builder_optimization_level = 3
        if hasattr(trt, 'IProgressMonitor'):
            self.progress_monitor = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def create_timing_cache(self, content: bytes) -> SimpleNamespace:
        return SimpleNamespace(content=content, serialize=lambda: b'measured')

    def set_timing_cache(self, cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        if cache.content and not self.trt.works('known timings'):
            return False
        self.timings = cache.content
        return True


class _Parser:
    def __init__(self, trt: FakeTensorrtThisMachineCannotRun) -> None:
        self.trt = trt
        self.num_errors = 1

    def parse(self, content: bytes) -> bool:
        self.trt.built['model'] = content
        return self.trt.works('parse')

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(node=lambda: 3, desc=lambda: 'no such operator', code=lambda: 'UNSUPPORTED_NODE')


@contextmanager
def broken(cuda: FakeCudaThisMachineHasNone, call: str, status: str = 'cudaErrorIllegalAddress') -> Iterator[None]:
    """Have a CUDA call fail while the context lasts."""
    cuda.fails[call] = _Status[status]
    try:
        yield
    finally:
        del cuda.fails[call]
