"""Times encode and interaction of the base network with early launches, branches of recorded work
and the token path's own launches switched off, with the variants of a table if `prism tune` made
one, and with convolutions and dense layers by wgmma switched on, each between runs with all as they
are by default and variants by rule, and demands the same bits of all but the last three, whose sums
have another order. wgmma is last: a failure of it ends this, and leaves what was timed before.

python switches.py --executables target/gpu [--size 128] [--repeats 20] [--device cuda]
[--json FILE]
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import struct
import subprocess
import sys
import tempfile

# A B A: what is compared with all on has a run of that before it and one behind it.
TOKENS, TUNED, WGMMA = {"PRISM_CUDA_TOKENS": "off"}, {"PRISM_TUNE": "1"}, {"PRISM_CUDA_WGMMA": "on"}
ORDER = [("on", {}), ("no early launches", {"PRISM_CUDA_OVERLAP": "off"}), ("on", {}), ("no branches", {"PRISM_CUDA_BRANCHES": "off"}), ("on", {}), ("token path op by op", TOKENS), ("on", {})]
ORDER += [("variants of the table", TUNED), ("on", {}), ("wgmma", WGMMA), ("on", {})]
# Those whose sums have another order.
OTHERS = (TOKENS, TUNED, WGMMA)


def run(command, switches):
    """What an executable prints as JSON, with these switches alone and without a table of
    variants."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PRISM_CUDA_")} | {"PRISM_TUNE": "0"}
    done = subprocess.run([str(c) for c in command], env={**clean, **switches}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{switches or 'no switch'}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--executables", default="target/gpu")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="f16")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.size < 96:
        sys.exit(f"--size {args.size}: the points need 96 voxels along each axis")
    rng = random.Random(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        image = pathlib.Path(folder) / "image.f32"
        count = args.size**3
        image.write_bytes(struct.pack(f"<{count}f", *(rng.gauss(0, 1) for _ in range(count))))
        for name, switches in ORDER:
            command = [pathlib.Path(args.executables) / "session", image, args.size, args.repeats, 0, "40,50,60;64,64,64;80,30,90", args.device, args.precision]
            result = run(command, switches)
            # The first repeat warms up.
            times = {what: statistics.median(result[what][1:] or result[what]) * 1e3 for what in ("encode", "interact")}
            runs.append({"name": name, "bits": result["bits"], **times})
            print(f"{name}: encode {times['encode']:.3f} ms, interaction {times['interact']:.3f} ms, bits {result['bits']}", flush=True)
            same = len({r["bits"] for r, (_, switches) in zip(runs, ORDER) if switches not in OTHERS}) == 1
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps({"same_bits": None if same and len(runs) < len(ORDER) else same, "runs": runs}, indent=1) + "\n")
    if not same:
        sys.exit("the bits differ")


if __name__ == "__main__":
    main()
