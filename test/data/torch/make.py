"""Write the archives of this folder; needs torch."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


class Arithmetic(torch.nn.Module):
    """total = left + right, ratio = left / right."""

    def forward(self, left, right):
        return {'total': left + right, 'ratio': left / right}


class Layers(torch.nn.Module):
    """One of each thing that an archive can hold: parameters, buffers, a constant, a half tensor."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
        self.register_buffer('offset', torch.tensor([1.0, 2.0]))
        self.constant = torch.arange(4.0)

    def forward(self, image):
        features = torch.relu(self.norm(self.convolution(image)))
        scores = torch.softmax(features, 1) + self.constant.view(1, 4, 1, 1) * self.offset.sum()
        length = features.norm(2, dim=1, keepdim=True).clamp_min(1e-6)
        return {'scores': scores, 'descriptors': features / length * self.scale.float().sum()}


def main():
    sys.path.insert(0, str(HERE.parents[2]))
    from gps_denied_c7.runtimes.pt.export import export_program

    torch.manual_seed(0)
    pair = (torch.ones(1, 3, 4), torch.full((1, 3, 4), 2.0))
    image = torch.rand(1, 1, 8, 8)
    layers = Layers().eval()
    torch.export.save(torch.export.export(Arithmetic(), pair), HERE / 'arithmetic.pt2')
    torch.export.save(torch.export.export(layers, (image,)), HERE / 'layers.pt2')
    named = {'left': pair[0].numpy(), 'right': pair[1].numpy()}
    export_program(Arithmetic(), named, HERE / 'stripped.pt2')
    torch.jit.trace(Arithmetic(), pair, strict=False).save(HERE / 'traced.pt')
    torch.jit.script(layers).save(HERE / 'scripted.pt')
    torch.jit.freeze(torch.jit.script(layers)).save(HERE / 'frozen.pt')


if __name__ == '__main__':
    main()
