"""
Make a model bundle (M-1) from an ONNX model: its inputs and outputs, what it must answer, and how exactly.

The golden answers are those of plain ONNX Runtime in a process of its own (:mod:`reference`), to pictures of different
kinds: noise, flat ones, ones that give few and many detections, and the user's own. What the node would run has to give
the same answers before the bundle is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.store import engine_model_name
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.ground.golden_answers import answer_cases, golden_cases
from gps_denied_c7.ground.input_shapes import fixed_inputs, with_fixed_inputs
from gps_denied_c7.ground.output_rules import certain_outputs, output_rules, refuse_empty, stable_cases
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.bundle_write import write_bundle
from gps_denied_c7.model.external_data import find_external
from gps_denied_c7.model.files import BundleFile, file_sha256, read_npz, write_atomically
from gps_denied_c7.model.image_input import default_preprocessing
from gps_denied_c7.model.onnx_file import OnnxModel, read_onnx
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_tensors
from gps_denied_c7.runtimes.protocol import BuildConfig, ProviderSet
from gps_denied_c7.runtimes.registry import create_runtime

__all__ = ['MadeBundle', 'make_bundle']

STRATEGY = 'onnx_trt_ep'
_QUANTISED = (
    *('QuantizeLinear', 'DequantizeLinear', 'DynamicQuantizeLinear'),
    *('QLinearConv', 'QLinearMatMul', 'ConvInteger', 'MatMulInteger'),
)


@dataclass(frozen=True, slots=True)
class MadeBundle:
    """
    Hold a bundle that was written.

    :param notes: what its user should know, one sentence each.
    """

    bundle: ModelBundle
    notes: tuple[str, ...]


def make_bundle(request: BundleRequest, accept: Callable[[ModelBundle], None] = lambda bundle: None) -> MadeBundle:
    """
    Write the bundle and check that the node's runtime gives its golden answers; it is complete or not made at all.

    The same model, request and versions give the same bytes.

    :param accept: called with the bundle before it is moved to its place; raises a C7Error to refuse it.
    :raises C7Error: of any kind: the model is damaged, random, leaves sizes free that were not given, is not fed
        by one image, fails on a request that was given or on all others, is answered differently by the runtime, tests
        too little, needs a rule that was not given, or the directory cannot be written.
    """
    notes: list[str] = []
    name = request.name or engine_model_name(request.model.stem)
    if name != engine_model_name(name):
        raise ModelBundleError(f'name: {name!r} is not a plain name.', remedy='Use A-Z a-z 0-9 . _ - only.')
    model = _in_few_files(request.model, notes)
    _refuse_random(model)
    source = model.source
    arrays = _read_request(request.golden_input)
    inputs = fixed_inputs(source, request, arrays)
    preprocessing = default_preprocessing(inputs).replace(**request.preprocessing)
    with _staged(request.output) as stage:
        path = stage / f'{name}.onnx'
        for location in model.external_data:
            _copy(find_external(request.model, location), stage / location)
        content = with_fixed_inputs(source, inputs, notes)
        write_atomically(path, content)
        artefact = Artefact.of_file(
            path,
            strategy=STRATEGY,
            weights_digest=f'sha256:{model.content_sha256}',
            precision=_precision_of(source),
        )
        if artefact.external_data.items() - model.external_data.items():
            raise ModelBundleError(
                f'the weights of {request.model} changed while they were read.', remedy='Run it again.'
            )
        whole = str(path) if model.external_data else content
        outputs, cases = answer_cases(whole, list(golden_cases(request, inputs, preprocessing, arrays)), request, notes)
        outputs = certain_outputs(outputs, model, inputs)
        rules = output_rules(request, outputs, cases, artefact.precision, notes)
        cases = stable_cases(request, rules, cases, notes)
        refuse_empty(request, rules, cases, notes)
        bundle = write_bundle(
            stage,
            name=name,
            weights_digest=artefact.weights_digest,
            inputs=inputs,
            outputs=outputs,
            preprocessing=preprocessing,
            artefacts=[artefact],
            rules=rules,
            golden={case.name: (case.inputs, case.answer) for case in cases},
            allow_non_finite=request.allow_non_finite,
        )
        _prove(bundle)
        accept(bundle)
    return MadeBundle(ModelBundle.load(request.output), tuple(notes))


def _in_few_files(path: Path, notes: list[str]) -> OnnxModel:
    """Return the model with its weights inside, so that one digest covers all of it, or with files of their own."""
    model = read_onnx(path, None)
    if not model.external_data:
        return model
    files = ', '.join(model.external_data)
    try:
        source = model.self_contained()
    except EngineDeserializeError:
        notes.append(f'The weights stay in {files}, under their own digests: one ONNX file is limited to 2 GiB.')
        source, left = model.source, model.external_data
    else:
        notes.append(f'The weights in {files} were copied into the .onnx, under its digest.')
        left = {}
    return dataclasses.replace(
        model, source=source, sha256=hashlib.sha256(source).hexdigest(), external_data=left, weights={}
    )


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise ModelBundleError(f'{source} cannot be copied to {target}: {error.strerror}.') from error


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yield a directory beside ``output``, which becomes ``output`` if nothing is raised."""
    target = output.absolute()
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ModelBundleError(
                f'{output} exists already and is not an empty directory.', remedy='Remove it, or name another one.'
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name[:100]}.'))
    except OSError as error:
        raise ModelBundleError(f'{output} cannot be made: {error.strerror}.', remedy='Name another one.') from error
    try:
        yield stage
        os.chmod(stage, 0o755)
        os.rename(stage, target)
    except OSError as error:
        raise ModelBundleError(f'{output} cannot be made: {error.strerror}.', remedy='Name another one.') from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _read_request(path: Path | None) -> dict[str, NDArray]:
    if path is None:
        return {}
    arrays = read_npz(BundleFile(path.absolute(), file_sha256(path)))
    if not arrays:
        raise ModelBundleError(f'{path} holds no array.', remedy='Save one array for each input of the model.')
    return arrays


def _precision_of(model: bytes) -> str:
    """Return what the model computes in, by the operators and weights in its main graph."""
    import onnx

    graph = onnx.ModelProto.FromString(model).graph
    if any(node.op_type in _QUANTISED for node in graph.node):
        return 'int8'
    kinds = {tensor.data_type for tensor in graph.initializer}
    for precision, kind in (('fp32', onnx.TensorProto.FLOAT), ('fp16', onnx.TensorProto.FLOAT16)):
        if kind in kinds:
            return precision
    return 'bf16' if onnx.TensorProto.BFLOAT16 in kinds else 'fp32'


def _refuse_random(model: OnnxModel) -> None:
    if random := model.random:
        raise ModelBundleError(
            f'answers to the same image differ from run to run, because of {", ".join(random[:8])}'
            f'{f" and {len(random) - 8} more" if len(random) > 8 else ""}.',
            remedy='Export it in evaluation mode (model.eval()), and remove its random operators.',
        )


def _prove(bundle: ModelBundle) -> None:
    """Answer the golden requests from the bundle as written, by what the node would run."""
    # One thread adds in one order, so that the same request has the same answer.
    config = C7InferenceConfig(cpu_threads=1)
    runtime = create_runtime(STRATEGY, config, providers=ProviderSet.CPU)
    try:
        handle = runtime.deserialize_engine(runtime.compile_engine(bundle, BuildConfig()))
    except EngineSchemaMismatchError as error:
        raise ModelBundleError(f'the model contradicts itself: {error.message}', remedy=error.remedy) from error
    try:
        fit_tensors(bundle, handle.inputs, handle.outputs, ImageSettings())
        # The first one twice: one request must not change the answer to the next.
        for index in (*range(len(bundle.golden)), 0):
            found = runtime.infer(handle, bundle.golden_inputs(index))
            if problems := bundle.compare(found, bundle.golden_outputs(index)):
                raise ModelBundleError(
                    f'the runtime of the node answers {bundle.golden[index].name!r} differently from plain session.run '
                    f'without optimisation: {" ".join(problems)}',
                    remedy='Give a wider --rule if that is close enough; else do not use this model with this '
                    'ONNX Runtime.',
                )
    finally:
        runtime.release_engine(handle)
