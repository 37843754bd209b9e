"""Measures the peer's own error in 16 bits on the reference cases in a folder, as
src/verify/half.json: python benches/peer/half.py tests/reference

A case of `prism verify` passes in 16 bits within 2e-2 or four times what is written there.
"""

import json
import pathlib
import re
import statistics
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


def gradient(f, dtype):
    """Training as it is done in 16 bits: float32 weights, products in `dtype` (autocast), the loss
    in float32 and scaled as far as nothing overflows. A gradient's error is a matter of chance: of
    parameters whose names differ in numbers only, the largest counts; and of all, the median."""
    meta, get = f.metadata(), f.get_tensor
    size, iterations, scale = int(meta["image_size"]), int(meta["iterations"]), 1024.0
    net = prism_torch.load(meta["salt"], size)
    for name, w in net.w.items():
        w.requires_grad_("gaussian" not in name)
    images, labels, total = get("in.image_i8"), get("in.label"), 0.0
    for item in range(len(images)):
        image = (images[item].float() * float(meta["image_scale"]))[None, None]
        label = labels[item].float()[None, None]
        box = get("in.box")[item] if "in.box" in f.keys() else None
        history, dense, loss = torch.zeros(1, 2, size, size, size), torch.zeros(1, 1, size, size, size), 0.0
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = net.encode(image)
            for t in range(iterations):
                points, kinds = get(f"in.points.{t}")[item], get(f"in.labels.{t}")[item]
                history = history.clone()
                for (i, j, k), kind in zip(points.tolist(), kinds.tolist()):
                    history[0, 0 if kind == 1 else 1, i, j, k] = 1
                answer = net.interact(image, features, points, kinds, box, dense, history)
                dense = answer[2].float()
                with torch.autocast("cpu", enabled=False):
                    loss = loss + net.losses([a.float() for a in answer], label, batch=len(images)) / iterations
        (loss * scale).backward()
        total += loss.item()
    out, want = {"out.loss": abs(total / get("out.loss").item() - 1)}, get("out.grad_norm").item()
    grads = {n: w.grad.double() / scale for n, w in net.w.items() if w.grad is not None}
    out["out.grad_norm"] = abs(sum(g.square().sum() for g in grads.values()).sqrt().item() / want - 1)
    errors = []
    for name, g in grads.items():
        at = f"grad.{name}"
        if at + ".index" in f.keys() and (norm := get(at + ".value").double().norm()) > 0:
            errors.append(float((g.flatten()[get(at + ".index")] - get(at + ".value").double()).norm() / norm))
            kind = re.sub(r"\d+", "*", at)
            out[kind] = max(out.get(kind, 0.0), errors[-1])
    return out | {"grad.(median)": statistics.median(errors)}


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
    run = {"session": session, "gradient": gradient, "instance": instance_norm, "two": two_way_attention}
    # The gradients in f16 take ten minutes on a CPU.
    for path in sorted(folder.glob("model/[sg]*_32*.safetensors")) + ops:
        for name, dtype in TYPES.items():
            with safe_open(path, "pt") as f:
                errors = run[path.name.split("_")[0]](f, dtype)
            out.setdefault(path.stem, {})[name] = {k: float(f"{v:.3g}") for k, v in errors.items()}
            print(path.stem, name, out[path.stem][name], file=sys.stderr)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
