"""Export torch modules as artefacts that the archive scan admits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from gps_denied_c7.model.files import write_atomically

if TYPE_CHECKING:
    import torch

__all__ = ['export_program']


def export_program(
    module: torch.nn.Module,
    inputs: Mapping[str, NDArray],
    path: Path,
    *,
    precision: str = 'fp32',
    device: str = 'cpu',
) -> None:
    """
    Write ``module`` as a ``.pt2`` of fixed shapes, for one device and precision.

    Sample inputs and stack traces are left out: the first would be unpickled by the reader of the file, the others
    name folders of this machine. With ``fp16`` inputs and outputs of the file are float16 too; the runtime casts
    at its boundary.

    :param module: in evaluation mode and on the CPU; returns a tensor, or a tuple or dict of tensors. Not changed.
    :param inputs: one C-contiguous array per argument of ``module.forward``, by its name.
    :param precision: ``fp32`` or ``fp16``.
    :param device: ``cpu`` or ``cuda``, as the artefact will say in model.json.
    :raises ValueError: another precision.
    :raises ModelBundleError: the file cannot be written.
    """
    import copy

    import torch

    kinds = {'fp32': torch.float32, 'fp16': torch.float16}
    if precision not in kinds:
        raise ValueError(f'precision {precision!r} is none of {sorted(kinds)}.')
    dtype = kinds[precision]
    module = copy.deepcopy(module).eval().to(device=device, dtype=dtype)
    samples = {name: torch.from_numpy(array.copy()).to(device) for name, array in inputs.items()}
    samples = {name: sample.to(dtype) if sample.is_floating_point() else sample for name, sample in samples.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exported = torch.export.export(module, (), kwargs=samples)
        exported.example_inputs = None
        for node in exported.graph.nodes:
            for key in ('stack_trace', 'nn_module_stack', 'source_fn_stack', 'torch_fn', 'from_node'):
                node.meta.pop(key, None)
        content = io.BytesIO()
        torch.export.save(exported, content)
    write_atomically(path, content.getvalue())
