"""Trains the small network on synthetic cases for a given time, as a trial:
python trial.py --prism PROGRAM --json FILE [--seconds 60] [--device cuda] [--precision f16]

What training is like as its users run it, with data, simulated users, validation and saving. Fails
if the run does, or if its loss does not fall. The cases are made as they are needed: no data is
read.
"""

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

# Seconds to end in after it was asked to; scripts/gpu-check leaves as many.
SAVING = 30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prism", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="f16")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        command = [args.prism, "train", "--model", "small", "--data", "synth:1", "--out", out, "--epochs", "10000", "--steps", "100", "--batch", "2", "--iterations", "4"]
        command += ["--lr", "1e-3", "--schedule", "constant", "--recompute", "false", "--validation-cases", "8", "--device", args.device, "--precision", args.precision]
        start = time.time()
        run = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said, _ = run.communicate(timeout=args.seconds)
        except subprocess.TimeoutExpired:
            # It finishes its step, or the case of a validation, and saves.
            run.send_signal(signal.SIGTERM)
            try:
                said, _ = run.communicate(timeout=SAVING)
            except subprocess.TimeoutExpired:
                # It would keep the GPU from what is measured next.
                run.kill()
                said, _ = run.communicate()
                print(said)
                sys.exit(f"the training was killed: {SAVING} s after it was asked to end it had not")
        whole = time.time() - start
        print(said)
        if run.returncode:
            sys.exit(f"the training ended with {run.returncode}")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps, validations = [line for line in lines if "loss" in line], [line for line in lines if "validation" in line]
    if len(steps) < 20:
        sys.exit(f"only {len(steps)} steps")
    # The first steps load kernels and memory.
    seconds, part = sorted(line["seconds"] for line in steps[5:]), max(len(steps) // 5, 10)
    first, last = (statistics.mean(line["loss"] for line in some) for some in (steps[:part], steps[-part:]))
    result = {"seconds": whole, "steps": len(steps), "step": statistics.median(seconds), "step_p90": seconds[int(len(seconds) * 0.9)], "loss": [first, last]}
    result |= {"precision": args.precision, "validation": [[line["step"], line["validation"][-1]] for line in validations]}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if not last < first:
        sys.exit(f"the loss did not fall: {first:.3f} to {last:.3f}")


if __name__ == "__main__":
    main()
