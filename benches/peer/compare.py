"""Times prism and the same network in PyTorch in turn: same image, same prompts, same threads, same hashed weights.

    python benches/peer/compare.py [--size 128] [--threads 2] [--rounds 3] [--json FILE]

Needs torch, numpy and safetensors, and cargo. Each round runs the peer, then prism, each in a process of its own; medians and ratios
are printed. On a shared machine only the ratio means something.
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


def image_of(size):
    import numpy as np

    axis = np.linspace(-1, 1, size, dtype=np.float32)
    i, j, k = np.meshgrid(axis, axis, axis, indexing="ij")
    noise = np.random.default_rng(0).standard_normal((size,) * 3, dtype=np.float32)
    return (np.exp(-4 * (i * i + j * j + k * k)) * 2 - 1 + 0.1 * noise).astype(np.float32)


def points_of(size):
    return [[size // 2 + (n - 2) * size // 32] * 3 for n in range(POINTS)]


def peer(path, size, repeats, threads):
    """The peer's side, in its own process."""
    import resource
    import time

    import numpy as np
    import torch

    import prism_torch

    torch.set_num_threads(threads)
    image = torch.from_numpy(np.fromfile(path, np.float32).reshape(1, 1, size, size, size))
    net = prism_torch.load("public", size)
    points = torch.tensor(points_of(size))
    history = torch.zeros(1, 2, size, size, size)
    for i, j, k in points.tolist():
        history[0, 0, i, j, k] = 1
    out = {"encode": [], "interact": [], "device": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"}
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            features = net.encode(image)
            out["encode"].append(time.perf_counter() - start)
            dense = torch.zeros(1, 1, size, size, size)
            for _ in range(2):
                start = time.perf_counter()
                dense = net.interact(image, features, points, torch.ones(POINTS), None, dense, history)[2]
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
    made = [json.loads(line).get("executable") for line in done.stdout.splitlines()]
    return [path for path in made if path][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="encodes a round; each is followed by two interactions")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--peer", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer, args.size, args.repeats, args.threads)
    ours = build()
    runs = {"peer": [], "prism": []}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "image.f32"
        image_of(args.size).tofile(path)
        points = ";".join(",".join(map(str, p)) for p in points_of(args.size))
        common = [str(args.size), str(args.repeats), str(args.threads)]
        for _ in range(args.rounds):
            runs["peer"].append(last_json([sys.executable, __file__, "--peer", path, "--size", common[0], "--repeats", common[1], "--threads", common[2]]))
            runs["prism"].append(last_json([ours, path, *common, points]))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE.parent.parent).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    result = {"date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu}
    result |= {"size": args.size, "threads": args.threads, "devices": {n: r[0]["device"] for n, r in runs.items()}}
    print(f"{result['devices']['peer']}  |  prism {result['devices']['prism']}  |  {args.size}^3, float32\n")
    print(f"{'':<10}{'peer':>10}{'prism':>10}{'ratio':>9}")
    for what in ("encode", "interact"):
        # The first of a process warms it up.
        median = {n: statistics.median(t for run in r for t in run[what][1:]) for n, r in runs.items()}
        result[what] = {**median, "ratio": median["peer"] / median["prism"]}
        print(f"{what:<10}{median['peer']:>8.2f} s{median['prism']:>8.2f} s{result[what]['ratio']:>8.1f}x")
    memory = {n: max(run["peak_bytes"] for run in r) / 1e9 for n, r in runs.items()}
    result["peak_gb"] = memory
    print(f"{'memory':<10}{memory['peer']:>7.2f} GB{memory['prism']:>7.2f} GB")
    sums = [runs[n][0]["sum"] for n in ("peer", "prism")]
    result["answers_sum"] = sums
    print(f"\nsum of the answers' logits: {sums[0]:.1f} and {sums[1]:.1f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
