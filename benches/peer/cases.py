"""Writes reference cases of what the authors' cases leave out, computed by the peer in float64:
python benches/peer/cases.py FOLDER"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

import prism_torch


def vit_windows(grid, window, heads, dim):
    """Attention in several windows, the last ones partly padded."""
    g = torch.Generator().manual_seed(grid * 100 + window)
    rand = lambda *s: torch.randn(*s, generator=g)
    names = {"qkv.weight": (3 * dim, dim), "qkv.bias": (3 * dim,), "proj.weight": (dim, dim), "proj.bias": (dim,)}
    names |= {f"rel_pos_{a}": (2 * window - 1, dim // heads) for a in "dhw"}
    w = {f"at.{n}": rand(*s) * (0.3 if n != "proj.bias" else 1) for n, s in names.items()}
    x = rand(1, grid, grid, grid, dim)
    net = object.__new__(prism_torch.Prism)
    net.w = {n: t.double() for n, t in w.items()}
    net.c = prism_torch.BASE | {"heads": heads}
    y = net.in_windows(x.double(), window, "at")
    tensors = {"in." + n[3:].replace(".", "_"): t for n, t in w.items()}
    tensors |= {"in.x": x, "out.0": y.float().contiguous()}
    return {"op": "vit_attention", "attrs": json.dumps({"heads": heads, "window": window})}, tensors


def main(folder):
    folder = pathlib.Path(folder)
    for grid, window in ((5, 2), (4, 3)):
        metadata, tensors = vit_windows(grid, window, 2, 16)
        save_file(tensors, folder / f"vit_attention_grid{grid}_windows_of_{window}.safetensors", metadata)


if __name__ == "__main__":
    main(sys.argv[1])
