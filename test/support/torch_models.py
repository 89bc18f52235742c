"""Small torch networks whose answers are known by construction; torch is imported when one is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.runtimes.pt.export import export_program
from support.onnx_models import SHAPE

REQUEST = {'left': np.ones(SHAPE, np.float32), 'right': np.full(SHAPE, 2.0, np.float32)}


def arithmetic(*, as_tuple: bool = False) -> Any:
    """Return a module of total = left + right and ratio = left / right."""
    import torch

    class Arithmetic(torch.nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> Any:
            outputs = {'total': left + right, 'ratio': left / right}
            return tuple(outputs.values()) if as_tuple else outputs

    return Arithmetic()


def write_program(path: Path, module: Any = None, request: dict[str, NDArray] | None = None, **options: str) -> Path:
    export_program(module or arithmetic(), request or REQUEST, path, **options)
    return path
