"""Times prism and the same network in PyTorch in turn: same image, same prompts, same threads, same
hashed weights.

    python benches/peer/compare.py [--size 128] [--threads 2] [--rounds 3] [--json FILE]

Needs torch, numpy and safetensors, and cargo; torch.compile also a C++ compiler. Each round runs
every configuration of the peer, then prism in every precision, each in a process of its own;
medians are printed, and their ratios to the peer's best configuration of each column. On a shared
machine only the ratios mean something.
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

HERE = pathlib.Path(__file__).resolve().parent
POINTS = 5
# Memory format channels-last, torch.compile, autocast to bfloat16.
CONFIGURATIONS = {
    "eager": (False, False, False),
    "channels-last": (True, False, False),
    "compiled": (False, True, False),
    "bf16": (False, False, True),
}
PRECISIONS = ("f32", "bf16")


def image_of(size):
    import numpy as np

    axis = np.linspace(-1, 1, size, dtype=np.float32)
    i, j, k = np.meshgrid(axis, axis, axis, indexing="ij")
    noise = np.random.default_rng(0).standard_normal((size,) * 3, dtype=np.float32)
    return (np.exp(-4 * (i * i + j * j + k * k)) * 2 - 1 + 0.1 * noise).astype(np.float32)


def points_of(size):
    return [[size // 2 + (n - 2) * size // 32] * 3 for n in range(POINTS)]


def peer(path, size, repeats, threads, configuration):
    """The peer's side, in its own process."""
    import contextlib
    import resource
    import time

    import numpy as np
    import torch

    import prism_torch

    channels_last, compiled, bf16 = CONFIGURATIONS[configuration]
    cube = lambda t: t.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
    torch.set_num_threads(threads)
    image = cube(torch.from_numpy(np.fromfile(path, np.float32).reshape(1, 1, size, size, size)))
    net = prism_torch.load("public", size)
    net.w.update({name: cube(w) for name, w in net.w.items() if w.dim() == 5})
    encode, interact = (torch.compile(net.encode), torch.compile(net.interact)) if compiled else (net.encode, net.interact)
    points = torch.tensor(points_of(size))
    history = torch.zeros(1, 2, size, size, size)
    for i, j, k in points.tolist():
        history[0, 0, i, j, k] = 1
    out = {"encode": [], "interact": [], "device": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"}
    history = cube(history)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        for _ in range(repeats):
            start = time.perf_counter()
            features = encode(image)
            out["encode"].append(time.perf_counter() - start)
            dense = cube(torch.zeros(1, 1, size, size, size))
            for _ in range(2):
                start = time.perf_counter()
                dense = interact(image, features, points, torch.ones(POINTS), None, dense, history)[2]
                out["interact"].append(time.perf_counter() - start)
    out["sum"] = dense.double().sum().item()
    out["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(out))


def last_json(command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def build(bench="session"):
    """Builds prism's side and returns its executable."""
    command = ["cargo", "bench", "--bench", bench, "--no-run", "--message-format", "json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent)
    made = [json.loads(line) for line in done.stdout.splitlines()]
    # The program itself is built too, before or after.
    return next(m["executable"] for m in made if m.get("executable") and m["target"]["name"] == bench)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="encodes a round; each is followed by two interactions")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--peer", nargs=2, metavar=("CONFIGURATION", "IMAGE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer[1], args.size, args.repeats, args.threads, args.peer[0])
    ours = build()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "image.f32"
        image_of(args.size).tofile(path)
        points = ";".join(",".join(map(str, p)) for p in points_of(args.size))
        common = [str(args.size), str(args.repeats), str(args.threads)]
        flags = ["--size", common[0], "--repeats", common[1], "--threads", common[2]]
        for _ in range(args.rounds):
            for name in CONFIGURATIONS:
                runs.setdefault(f"PyTorch {name}", []).append(last_json([sys.executable, __file__, "--peer", name, path, *flags]))
            for precision in PRECISIONS:
                runs.setdefault(f"prism {precision}", []).append(last_json([ours, path, *common, points, "cpu", precision]))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE.parent.parent).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    devices = {"peer": runs["PyTorch eager"][0]["device"], "prism": runs["prism f32"][0]["device"]}
    result = {"date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu, "size": args.size, "threads": args.threads, "devices": devices, "runs": {}}
    for name, each in runs.items():
        # The first of a process warms it up.
        medians = {what: statistics.median(t for run in each for t in run[what][1:]) for what in ("encode", "interact")}
        result["runs"][name] = medians | {"peak_gb": max(run["peak_bytes"] for run in each) / 1e9, "answers_sum": each[0]["sum"]}
    # Like beside like: float32 is compared with what computes in float32.
    best = lambda what: min(run[what] for name, run in result["runs"].items() if name.startswith("PyTorch") and "bf16" not in name)
    best = {what: best(what) for what in ("encode", "interact")}
    result["best_peer_f32"] = best
    print(f"{devices['peer']}  |  prism {devices['prism']}  |  {args.size}^3; ratios to PyTorch's best in float32\n")
    print(f"{'':<22}{'encode':>9}{'ratio':>8}{'interact':>11}{'ratio':>8}{'memory':>11}{'sum of the logits':>20}")
    for name, run in result["runs"].items():
        ratios = {what: best[what] / run[what] for what in best}
        run["ratios"] = ratios
        columns = "".join(f"{run[what]:>{width}.2f} s{ratios[what]:>7.1f}x" for what, width in (("encode", 7), ("interact", 9)))
        print(f"{name:<22}{columns}{run['peak_gb']:>8.2f} GB{run['answers_sum']:>20.1f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
