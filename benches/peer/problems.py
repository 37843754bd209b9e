"""PyTorch's side of `prism bench --peer`: times problems and prints JSON, {problem: seconds or
null}.

    python problems.py DEVICE PRECISION THREADS SECONDS PROBLEM ...

The plain ops of PyTorch, as a program without prism would call them; a problem that this file does
not know is null. Networks need prism_torch.py beside it.
"""

import json
import re
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def sizes(text):
    return {letter: int(number) for letter, number in re.findall(r"([a-z]+)(\d+)", text)}


# Functions of ops, by the names of their kinds.
KINDS = {}


def kind(make_run):
    KINDS[make_run.__name__] = make_run
    return make_run


@kind
def conv3d(p, make):
    k, same = p["k"], p["k"] == 3
    x, w, b = make(p["n"], p["ic"], p["d"], p["d"], p["d"]), make(p["oc"], p["ic"], k, k, k), make(p["oc"])
    return lambda: F.conv3d(x, w, b, stride=1 if same else k, padding=1 if same else 0)


@kind
def upcat(p, make):
    d = p["d"]
    x, skip = make(1, p["ic"], d, d, d), make(1, p["sc"], 2 * d, 2 * d, 2 * d)
    dw, db = make(p["ic"], p["uc"], 2, 2, 2), make(p["uc"])
    cw, cb = make(p["oc"], p["sc"] + p["uc"], 3, 3, 3), make(p["oc"])
    return lambda: F.conv3d(torch.cat([skip, F.conv_transpose3d(x, dw, db, stride=2)], 1), cw, cb, padding=1)


@kind
def linear(p, make):
    x, w, b = make(p["m"], p["k"]), make(p["n"], p["k"]), make(p["n"])
    return lambda: F.linear(x, w, b)


@kind
def lnorm(p, make):
    x, w, b = make(p["m"], p["c"]), make(p["c"]), make(p["c"])
    return lambda: F.layer_norm(x, (p["c"],), w, b, 1e-6)


@kind
def xattn(p, make):
    q, k, v = (make(1, p["h"], n, p["d"]) for n in (p["q"], p["k"], p["k"]))
    return lambda: F.scaled_dot_product_attention(q, k, v)


@kind
def attn(p, make):
    import prism_torch

    h, d, s = p["h"], p["d"], p["s"]
    edge, c = p["w"] or s, h * d
    at = "attn"
    weights = {f"{at}.qkv.weight": make(3 * c, c), f"{at}.qkv.bias": make(3 * c), f"{at}.proj.weight": make(c, c), f"{at}.proj.bias": make(c)}
    weights |= {f"{at}.rel_pos_{axis}": make(2 * edge - 1, d) for axis in "dhw"}
    net = prism_torch.Prism.__new__(prism_torch.Prism)
    net.w, net.c = weights, {"heads": h}
    x = make(1, s, s, s, c)
    # A whole grid is one window of its own edge.
    return lambda: net.in_windows(x, edge, at) if p["w"] else net._vit_attention(x, at)


def network(kind, text, device, dtype):
    import prism_torch

    preset, _, options = text.partition(",")
    p = sizes(options)
    config = {"base": prism_torch.BASE, "small": prism_torch.SMALL}[preset]
    size = p.get("d", 128 if preset == "base" else 64)
    net = prism_torch.load("public", size, dtype, device, config)
    image = torch.randn(1, 1, size, size, size, device=device, dtype=dtype)
    if kind == "encode":
        return lambda: net.encode(image)
    features = net.encode(image)
    points = torch.randint(0, size, (p.get("t", 1), 3), device=device)
    history, dense = torch.zeros(1, 2, size, size, size, device=device, dtype=dtype), torch.zeros(1, 1, size, size, size, device=device, dtype=dtype)
    return lambda: net.interact(image, features, points, torch.ones(len(points), device=device), None, dense, history)


def seconds(run, device, long):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    run(), wait()
    times = []
    while len(times) < 3 or sum(times) < long:
        start = time.perf_counter()
        run(), wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    device, precision, threads, long = sys.argv[1:5]
    device = device.split(":")[0]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    make = lambda *shape: torch.rand(*shape, device=device, dtype=dtype) * 2 - 1
    out = {}
    with torch.inference_mode():
        for problem in sys.argv[5:]:
            name, _, text = problem.partition(":")
            try:
                run = network(name, text, device, dtype) if name in ("encode", "interact") else KINDS[name](sizes(text), make) if name in KINDS else None
                out[problem] = run and seconds(run, device, float(long))
            except (RuntimeError, KeyError, ImportError) as error:
                print(f"{problem}: {type(error).__name__}: {error}", file=sys.stderr)
                out[problem] = None
    print(json.dumps({"peer": f"PyTorch {torch.__version__}", "seconds": out}))


if __name__ == "__main__":
    main()
