"""Measures the peer's own error in 16 bits on the reference cases in a folder, as src/verify/half.json: python benches/peer/half.py tests/reference

A case of `prism verify` passes in 16 bits within 2e-2 or four times what is written there.
"""

import json
import pathlib
import sys

import torch
from safetensors import safe_open

import prism_torch

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@torch.no_grad()
def session(f, dtype):
    meta, get = f.metadata(), f.get_tensor
    size = int(meta["image_size"])
    net = prism_torch.load(meta["salt"], size, dtype)
    cube = lambda name, scale: (get(name).to(dtype) * float(scale))[None, None]
    image = cube("in.image_i8", meta["image_scale"])
    features = net.encode(image)
    box = get("in.box") if "in.box" in f.keys() else None
    history, out = torch.zeros(1, 2, size, size, size, dtype=dtype), {}
    for t in range(int(meta["iterations"])):
        points, labels = get(f"in.points.{t}"), get(f"in.labels.{t}")
        for (i, j, k), label in zip(points.tolist(), labels.tolist()):
            history[0, 0 if label == 1 else 1, i, j, k] = 1
        answer = net.interact(image, features, points, labels, box, cube(f"in.dense_i8.{t}", meta["dense_scale"]), history)
        for name, value in zip(("masks", "scores", "refined"), answer):
            at = f"iter{t}.{name}"
            if at + ".value" not in f.keys():
                continue
            want = get(at + ".value").double()
            out[at] = relative(value.flatten()[get(at + ".index")], want)
        bits = get(f"iter{t}.mask_bits")
        want = ((bits[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1).flatten()[: size**3].bool()
        got = (answer[2] > 0).flatten()
        out[f"iter{t}.mask_bits"] = 1 - 2 * float((got & want).sum()) / float(got.sum() + want.sum())
    return out


def instance_norm(f, dtype):
    get = f.get_tensor
    given = {n[3:]: get(n).to(dtype).requires_grad_() for n in f.keys() if n.startswith("in.")}
    y = torch.nn.functional.instance_norm(given["x"], weight=given["weight"], bias=given["bias"], eps=1e-5)
    y.backward(get("grad_out.0").to(dtype))
    out = {"out.0": relative(y.detach(), get("out.0").double())}
    return out | {f"grad_in.{n}": relative(t.grad, get(f"grad_in.{n}").double()) for n, t in given.items()}


def two_way_attention(f, dtype):
    get, heads = f.get_tensor, json.loads(f.metadata()["attrs"])["heads"]
    given = {n[3:]: get(n).to(dtype).requires_grad_() for n in f.keys() if n.startswith("in.")}
    linear = lambda x, p: torch.nn.functional.linear(x, given[p + "_weight"], given[p + "_bias"])
    split = lambda x: x.view(*x.shape[:2], heads, -1).transpose(1, 2)
    q, k, v = (split(linear(given[p], p)) for p in "qkv")
    y = linear(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), "out")
    y.backward(get("grad_out.0").to(dtype))
    out = {"out.0": relative(y.detach(), get("out.0").double())}
    return out | {f"grad_in.{n}": relative(t.grad, get(f"grad_in.{n}").double()) for n, t in given.items()}


def main(folder):
    folder, out = pathlib.Path(folder), {}
    ops = [folder / "ops/instance_norm_offset.safetensors", *sorted(folder.glob("ops/two_way_attention_*.safetensors"))]
    run = {"session": session, "instance": instance_norm, "two": two_way_attention}
    for path in sorted(folder.glob("model/session_*.safetensors")) + ops:
        for name, dtype in TYPES.items():
            with safe_open(path, "pt") as f:
                errors = run[path.name.split("_")[0]](f, dtype)
            out.setdefault(path.stem, {})[name] = {k: float(f"{v:.3g}") for k, v in errors.items()}
            print(path.stem, name, out[path.stem][name], file=sys.stderr)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
