"""Times training steps of the base network that are recorded and replayed, between steps that are
launched op by op, and demands the same losses and norms of gradients of all, of steps that learn.

python recorded.py --executables target/gpu [--iterations 4] [--repeats 10] [--device cuda]
[--precision f16] [--json FILE]
"""

import argparse
import json
import math
import pathlib
import random
import statistics
import struct
import sys
import tempfile

from switches import run

SIZE = 128
# Steps before those that are timed: the first is op by op in any case, in the next ones recordings
# are made.
BEFORE = 3
# A B A.
ORDER = [("op by op", {}), ("recorded", {"PRISM_CUDA_TRAIN_GRAPHS": "on"}), ("op by op", {})]


def ball():
    """Floats that are 1 in an ellipsoid in the middle."""
    axis = [2 * i / (SIZE - 1) - 1 for i in range(SIZE)]
    rows = (i * i + 1.5 * j * j for i in axis for j in axis)
    return struct.pack(f"<{SIZE**3}f", *(float(row + k * k < 0.3) for row in rows for k in axis))


def fault(result):
    """What is wrong with the steps of the executable `train`, or none: a step whose gradients are
    not finite changes no weights, and so not the next loss."""
    norms, losses = result["norm"], result["loss"]
    # JSON has no infinity: it is null.
    if not norms or not all(n is not None and math.isfinite(n) for n in norms):
        return f"the norms of the gradients are {norms}"
    if any(loss == after for loss, after in zip(losses, losses[1:])):
        return f"the losses do not change: {losses}"
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--executables", default="target/gpu")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="f16")
    parser.add_argument("--json")
    args = parser.parse_args()
    rng = random.Random(1)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "image.f32").write_bytes(struct.pack(f"<{SIZE**3}f", *(rng.gauss(0, 1) for _ in range(SIZE**3))))
        (folder / "label.f32").write_bytes(ball())
        for name, switches in ORDER:
            files = [folder / "image.f32", folder / "label.f32"]
            points = "40,50,60;64,64,64;80,30,90"
            command = [pathlib.Path(args.executables) / "train", *files, "base", args.iterations, args.repeats + BEFORE, 0, points, "false", args.device, args.precision]
            result = run(command, switches)
            if switches and 0 in result["recorded"][:2]:
                sys.exit(f"nothing was recorded: {result['recorded']} pieces of the encoder, of iterations, and without a tape")
            if wrong := fault(result):
                sys.exit(f"{name}: {wrong}")
            step = statistics.median(result["step"][BEFORE:])
            runs.append({"name": name, "step": step, "loss": result["loss"], "norm": result["norm"], "device_bytes": result["device_bytes"]})
            print(f"{name}: {step * 1e3:.2f} ms a step, {(result['device_bytes'] or 0) / 1e9:.2f} GB, last loss {result['loss'][-1]}", flush=True)
            same = all((r["loss"], r["norm"]) == (runs[0]["loss"], runs[0]["norm"]) for r in runs)
            # Until all were made it is not known that they are the same.
            same = None if same and len(runs) < len(ORDER) else same
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps({"same_losses": same, "precision": args.precision, "iterations": args.iterations, "runs": runs}, indent=1) + "\n")
    if not same:
        sys.exit("the losses or the norms differ")


if __name__ == "__main__":
    main()
