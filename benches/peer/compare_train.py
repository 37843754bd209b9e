"""Times a training step of prism and of the same network in PyTorch in turn: same image, label,
prompts, hashed weights, threads.

    python benches/peer/compare_train.py [--model small|base] [--iterations 4] [--threads 2] [--rounds 2] [--repeats 3] [--checkpoint] [--json FILE]

A step: encode, N iterations with their losses, all gradients, clipping, AdamW; batch 1, float32.
With --checkpoint both sides compute iterations again on the way back instead of keeping their
activations. Needs torch, numpy and safetensors, and cargo.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from compare import HERE, POINTS, build, image_of, last_json, points_of
from recorded import fault

SIZES = {"small": 64, "base": 128}


def label_of(size):
    import numpy as np

    axis = np.linspace(-1, 1, size, dtype=np.float32)
    i, j, k = np.meshgrid(axis, axis, axis, indexing="ij")
    return ((i * i + 1.5 * j * j + k * k) < 0.3).astype(np.float32)


def peer(path, model, iterations, repeats, checkpoint, device="cpu", autocast=None, channels_last=False, compiled=None):
    """The peer's side: seconds and loss of each step, on a device, in its autocast type and
    compiled in a mode where given."""
    import contextlib
    import time

    import numpy as np
    import torch
    from torch.utils.checkpoint import checkpoint as recomputed

    import prism_torch

    size = SIZES[model]
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    cube = lambda t: t.to(device).contiguous(memory_format=layout)
    image = cube(torch.from_numpy(np.fromfile(path, np.float32).reshape(1, 1, size, size, size)))
    label = cube(torch.from_numpy(label_of(size))[None, None])
    net = prism_torch.load("public", size, device=device, config={"small": prism_torch.SMALL, "base": prism_torch.BASE}[model])
    for name, w in net.w.items():
        if channels_last and w.dim() == 5:
            net.w[name] = w.contiguous(memory_format=layout)
    learned = [p for n, p in net.w.items() if "gaussian" not in n]
    for p in learned:
        p.requires_grad_()
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.01, fused=device != "cpu")
    scaler = torch.amp.GradScaler(device, enabled=autocast == torch.float16)
    cast = lambda: torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    points, labels = torch.tensor(points_of(size), device=device), torch.ones(POINTS, device=device)
    history = torch.zeros(1, 2, size, size, size)
    for i, j, k in points.tolist():
        history[0, 0, i, j, k] = 1
    history = cube(history)
    encode, interact = net.encode, net.interact
    if compiled:
        encode, interact = torch.compile(encode, mode=compiled), torch.compile(interact, mode=compiled)
    out = {"step": [], "loss": [], "device": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"}

    def one(dense, embedding, *skips):
        answer = interact(image, (embedding, list(skips)), points, labels, None, dense, history)
        # Losses are formed in float32, as autocast does with what sums.
        with torch.autocast(device, enabled=False):
            return net.losses(tuple(a.float() for a in answer), label), answer[2].float()

    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
            torch.compiler.cudagraph_mark_step_begin()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with cast():
            features = encode(image)
            dense, total = cube(torch.zeros(1, 1, size, size, size)), 0
            for _ in range(iterations):
                arguments = (dense, features[0], *features[1])
                loss, dense = recomputed(one, *arguments, use_reentrant=False) if checkpoint else one(*arguments)
                total = total + loss / iterations
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in learned if p.grad is not None], 1.0)
        scaler.step(optimizer)
        scaler.update()
        # Waits for the device.
        out["loss"].append(total.item())
        if device != "cpu":
            torch.cuda.synchronize()
        out["step"].append(time.perf_counter() - start)
    return out


def peer_alone(path, model, iterations, repeats, threads, checkpoint):
    """The same in its own process, whose memory is measured."""
    import resource

    import torch

    torch.set_num_threads(threads)
    out = peer(path, model, iterations, repeats, checkpoint)
    out["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="steps a round; the first warms up")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--peer", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer_alone(args.peer, args.model, args.iterations, args.repeats, args.threads, args.checkpoint)
    ours, size = build("train"), SIZES[args.model]
    runs = {"peer": [], "prism": []}
    with tempfile.TemporaryDirectory() as folder:
        path, label = pathlib.Path(folder) / "image.f32", pathlib.Path(folder) / "label.f32"
        image_of(size).tofile(path)
        label_of(size).tofile(label)
        points = ";".join(",".join(map(str, p)) for p in points_of(size))
        flags = [f"--{n}={v}" for n, v in (("model", args.model), ("iterations", args.iterations), ("repeats", args.repeats), ("threads", args.threads))]
        for _ in range(args.rounds):
            runs["peer"].append(last_json([sys.executable, __file__, "--peer", path, *flags, *["--checkpoint"] * args.checkpoint]))
            common = [str(v) for v in (args.iterations, args.repeats, args.threads)]
            runs["prism"].append(last_json([ours, path, label, args.model, *common, points, str(args.checkpoint).lower()]))
            if wrong := fault(runs["prism"][-1]):
                sys.exit(wrong)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE.parent.parent).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    result = {"date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu, "model": args.model, "iterations": args.iterations}
    result |= {"recomputed": args.checkpoint, "threads": args.threads, "devices": {n: r[0]["device"] for n, r in runs.items()}}
    print(f"{result['devices']['peer']}  |  prism {result['devices']['prism']}  |  {args.model}, {size}^3, {args.iterations} iterations, float32\n")
    print(f"{'':<10}{'peer':>10}{'prism':>10}{'ratio':>9}")
    # The first of a process warms it up, unless it is the only one.
    part = slice(1, None) if args.repeats > 1 else slice(None)
    median = {n: statistics.median(t for run in r for t in run["step"][part]) for n, r in runs.items()}
    result["step"] = {**median, "ratio": median["peer"] / median["prism"]}
    print(f"{'step':<10}{median['peer']:>8.2f} s{median['prism']:>8.2f} s{result['step']['ratio']:>8.1f}x")
    memory = {n: max(run["peak_bytes"] for run in r) / 1e9 for n, r in runs.items()}
    result["peak_gb"] = memory
    print(f"{'memory':<10}{memory['peer']:>7.2f} GB{memory['prism']:>7.2f} GB")
    result["losses"] = {n: r[0]["loss"] for n, r in runs.items()}
    print("\nlosses: " + "; ".join(n + " " + ", ".join(f"{v:.5f}" for v in l) for n, l in result["losses"].items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
