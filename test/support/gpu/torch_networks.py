"""The GPU suite's network as a torch module, with the very weights of its ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ['superpoint']


def superpoint(path: Path) -> Any:
    """
    Return the network of ``superpoint.write_superpoint`` as a module that returns a dict, on the CPU in FP32.

    :param path: the ONNX file to take the weights from.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    class Superpoint(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
            self.layers = torch.nn.ModuleDict()
            for name in [name.removesuffix('.weight') for name in tensors if name.endswith('.weight')]:
                kernel = torch.from_numpy(tensors[f'{name}.weight'].copy())
                outgoing, incoming, size, _ = kernel.shape
                layer = torch.nn.Conv2d(incoming, outgoing, size, padding=size // 2)
                layer.weight.data = kernel
                layer.bias.data = torch.from_numpy(tensors[f'{name}.bias'].copy())
                self.layers[name] = layer
            self.stages = sum(name.startswith('encoder') for name in self.layers)

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            features = image
            for index in range(self.stages):
                features = torch.relu(self.layers[f'encoder{index}'](features))
                if index % 2 and index < self.stages - 1:
                    features = torch.nn.functional.max_pool2d(features, 2)
            logits = self.layers['score_logits'](torch.relu(self.layers['score_head'](features)))
            raw = self.layers['descriptor_raw'](torch.relu(self.layers['descriptor_head'](features)))
            length = torch.linalg.vector_norm(raw, dim=1, keepdim=True)
            return {'scores': torch.softmax(logits, 1), 'descriptors': raw / length}

    return Superpoint().eval()
