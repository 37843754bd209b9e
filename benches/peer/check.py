"""Checks the PyTorch peer against a reference session:
python check.py session_32.safetensors [float64]"""

import sys

import torch
from safetensors import safe_open

import prism_torch


@torch.no_grad()
def main(path, dtype=torch.float32):
    f = safe_open(path, "pt")
    meta = f.metadata()
    size, get = int(meta["image_size"]), f.get_tensor
    net = prism_torch.load(meta["salt"], size, dtype)
    cube = lambda name, scale: (get(name).to(dtype) * float(scale))[None, None]
    image = cube("in.image_i8", meta["image_scale"])
    features = net.encode(image)
    box = get("in.box") if "in.box" in f.keys() else None
    history, worst = torch.zeros(1, 2, size, size, size, dtype=dtype), 0.0
    for t in range(int(meta["iterations"])):
        points, labels = get(f"in.points.{t}"), get(f"in.labels.{t}")
        for (i, j, k), label in zip(points.tolist(), labels.tolist()):
            history[0, 0 if label == 1 else 1, i, j, k] = 1
        masks, scores, refined = net.interact(image, features, points, labels, box, cube(f"in.dense_i8.{t}", meta["dense_scale"]), history)
        for name, value in (("masks", masks), ("refined", refined)):
            want = get(f"iter{t}.{name}.value").double()
            got = value.flatten()[get(f"iter{t}.{name}.index")].double()
            error = ((got - want).norm() / want.norm()).item()
            worst = max(worst, error)
            print(f"iteration {t} {name}: relative error {error:.2e}")
    assert worst < 5e-3, "the peer is not the reference network"


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else torch.float32)
