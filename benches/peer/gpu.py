"""Times the network in PyTorch on a GPU in every configuration worth a try, and prism beside it:
python gpu.py --executables FOLDER --json FILE [--rows first|rest|warm] [--seconds 200]

Same image, prompts and hashed weights. Encode and interaction, base at 128^3: medians by the
device's clock for PyTorch, by the host's for prism, whose interactions end with the masks on the
host. A training step, base, one item, 4 iterations: medians by the host's clock, device waited for.
The first rows are those that say most: prism in f16, PyTorch's best configuration eager, then
through torch.compile as it is by default and with max-autotune, in inference and training; the rest
are the others. Rows that the file holds of the same executables are kept, of either part, and those
that failed or ran out of time, which is reported as that, are measured again. With --rows warm
nothing is measured, and what torch.compile makes by default is left in its cache on disk. Called by
scripts/gpu-check.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

# Time is counted from here on: torch takes long to load.
START = time.time()

import torch

import prism_torch
import compare_train
from compare import POINTS, image_of, points_of
from recorded import fault

# Name: element type of the weights, autocast type, memory format, mode of torch.compile.
HALF, F32 = torch.float16, torch.float32
CONFIGURATIONS = {
    "f32": (F32, None, torch.contiguous_format, None),
    "f16": (HALF, None, torch.contiguous_format, None),
    "f16 channels-last": (HALF, None, torch.channels_last_3d, None),
    "bf16": (torch.bfloat16, None, torch.contiguous_format, None),
    "AMP f16": (F32, HALF, torch.contiguous_format, None),
    "AMP f16 channels-last": (F32, HALF, torch.channels_last_3d, None),
    "AMP f16 compiled": (F32, HALF, torch.contiguous_format, "default"),
    "AMP f16 max-autotune": (F32, HALF, torch.contiguous_format, "max-autotune"),
    "f16 compiled": (HALF, None, torch.contiguous_format, "default"),
    "f16 channels-last compiled": (HALF, None, torch.channels_last_3d, "default"),
    "f16 channels-last max-autotune": (HALF, None, torch.channels_last_3d, "max-autotune"),
}


# Training: autocast type, memory format channels-last, mode of torch.compile.
TRAINING = {
    "f32": (None, False, None),
    "AMP f16": (HALF, False, None),
    "AMP bf16": (torch.bfloat16, False, None),
    "AMP f16 channels-last": (HALF, True, None),
    "AMP f16 compiled": (HALF, False, "default"),
    "AMP f16 max-autotune": (HALF, False, "max-autotune"),
    "AMP f16 max-autotune without graphs": (HALF, False, "max-autotune-no-cudagraphs"),
}
ITERATIONS = 4
# What is measured first, of both.
FIRST = ("AMP f16", "AMP f16 compiled", "AMP f16 max-autotune")
# Of these, what is compiled beforehand: max-autotune would choose by times.
WARMED = "AMP f16 compiled"
NO_TIME = "no time left"
# A hundred million weights, the same for every row.
prism_torch.hashed = functools.cache(prism_torch.hashed)


def peer_step(repeats, autocast, channels_last, compiled):
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "image.f32"
        image_of(128).tofile(path)
        run = compare_train.peer(path, "base", ITERATIONS, repeats + 3, False, "cuda", autocast, channels_last, compiled)
    # Its loss scale is lowered by steps that change nothing too.
    if run["loss"][-1] == run["loss"][-2]:
        raise RuntimeError(f"the losses do not change: {run['loss']}")
    return {"step": statistics.median(run["step"][3:]), "loss": run["loss"][0], "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def prism_step(executables, precision, repeats):
    with tempfile.TemporaryDirectory() as folder:
        path, label = pathlib.Path(folder) / "image.f32", pathlib.Path(folder) / "label.f32"
        image_of(128).tofile(path)
        compare_train.label_of(128).tofile(label)
        points = ";".join(",".join(map(str, p)) for p in points_of(128))
        command = [executables / "train", path, label, "base", str(ITERATIONS), str(repeats + 3), "0", points, "false", "cuda", precision]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    run = json.loads(done.stdout.splitlines()[-1])
    if wrong := fault(run):
        raise RuntimeError(wrong)
    return {"step": statistics.median(run["step"][3:]), "loss": run["loss"][0], "norm": run["norm"][0], "peak_gb": run["device_bytes"] / 1e9}


def median(work, repeats):
    """Seconds of `work` by the device's clock."""
    times = []
    for _ in range(repeats + 3):
        # Where torch.compile records graphs, what they gave before may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[3:])


def peer(size, repeats, dtype, autocast, memory_format, compiled):
    torch.cuda.reset_peak_memory_stats()
    net = prism_torch.load("public", size, dtype, "cuda")
    for name, w in net.w.items():
        if w.dim() == 5:
            net.w[name] = w.contiguous(memory_format=memory_format)
    cube = lambda t: t.to("cuda", dtype).contiguous(memory_format=memory_format)
    image = cube(torch.from_numpy(image_of(size))[None, None])
    points, labels = torch.tensor(points_of(size), device="cuda"), torch.ones(POINTS, device="cuda")
    history = torch.zeros(1, 2, size, size, size)
    for i, j, k in points.tolist():
        history[0, 0, i, j, k] = 1
    history, dense = cube(history), cube(torch.zeros(1, 1, size, size, size))
    encode, interact = net.encode, net.interact
    if compiled:
        encode, interact = torch.compile(encode, mode=compiled), torch.compile(interact, mode=compiled)
    copied = lambda v: v.clone() if isinstance(v, torch.Tensor) else type(v)(copied(x) for x in v)
    cast = torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext()
    with torch.inference_mode(), cast:
        features = copied(encode(image))
        out = {"encode": median(lambda: encode(image), repeats)}
        # What an interaction costs its user ends with the mask on the host.
        out["interact"] = median(lambda: (interact(image, features, points, labels, None, dense, history)[2] > 0).cpu(), repeats)
    out["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return out


def prism(executables, size, precision, repeats):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "image.f32"
        image_of(size).tofile(path)
        points = ";".join(",".join(map(str, p)) for p in points_of(size))
        command = [executables / "session", path, str(size), str(repeats), "0", points, "cuda", precision]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    run = json.loads(done.stdout.strip().splitlines()[-1])
    out = {what: statistics.median(run[what][len(run[what]) // 4 :]) for what in ("encode", "interact")}
    ordered = sorted(run["interact"][len(run["interact"]) // 4 :])
    return out | {"interact_p99": ordered[int(len(ordered) * 0.99)], "peak_gb": run["device_bytes"] / 1e9, "device": run["device"]}


def compare_best(result):
    """Notes which of PyTorch's configurations so far is the fastest, and how much longer it takes
    than prism."""
    for what, side in (("encode", "peer"), ("interact", "peer"), ("step", "peer_step")):
        own = result["prism" if side == "peer" else "prism_step"].get("f16", {})
        good = {n: r for n, r in result[side].items() if "failed" not in r}
        if good and what in own:
            best = min(good, key=lambda n: good[n][what])
            result[f"best_{what}"] = {"peer": best, "ratio": good[best][what] / own[what]}


@contextlib.contextmanager
def at_most(seconds):
    """Ends what is done within by an exception when the seconds are over; compilers may take any
    time."""

    def end(*_):
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rows(args):
    """What is measured first, and the rest, in order: side, name and work of each row."""
    own = [("prism", p, lambda p=p: prism(args.executables, args.size, p, 10 * args.repeats)) for p in ("f16", "bf16", "tf32", "f32")]
    own += [("prism_step", p, lambda p=p: prism_step(args.executables, p, 5)) for p in ("f16", "bf16")]
    peers = [("peer", n, lambda c=c: peer(args.size, args.repeats, *c), c[-1]) for n, c in CONFIGURATIONS.items()]
    peers += [("peer_step", n, lambda c=c: peer_step(5, *c), c[-1]) for n, c in TRAINING.items()]
    # After the first ones, the eager ones, which begin at once.
    peers.sort(key=lambda p: (FIRST.index(p[1]) if p[1] in FIRST else len(FIRST), p[3] is not None))
    first = [r for r in own if r[1] == "f16"] + [p[:3] for p in peers if p[1] in FIRST]
    rest = [r for r in own if r[1] != "f16"] + [p[:3] for p in peers if p[1] not in FIRST]
    return first, rest


def left(args):
    return args.seconds - (time.time() - START)


def warm(args):
    """Compiles for inference and training, and times nothing."""
    for work in (lambda: peer(args.size, 1, *CONFIGURATIONS[WARMED]), lambda: peer_step(1, *TRAINING[WARMED])):
        if left(args) < 5:
            break
        try:
            with at_most(left(args)):
                work()
            print(f"compiled after {time.time() - START:.0f} s", flush=True)
        except Exception as e:
            print(f"{type(e).__name__}: {e}"[:500], flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def digest(executables):
    """The SHA-256 of the executables that are timed, one after the other."""
    both = hashlib.sha256()
    for name in ("session", "train"):
        both.update((executables / name).read_bytes())
    return both.hexdigest()


def kept(path, result):
    """What an earlier call left of the same comparison, or `result`, which has no rows yet."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return result
    return found if all(found.get(k) == result[k] for k in ("torch", "gpu", "size", "executables")) else result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executables", type=pathlib.Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", choices=("first", "rest", "warm"), default="first")
    parser.add_argument("--seconds", type=float, default=200, help="of the whole process: a configuration takes two thirds of what is left at the most, and none begins in the last 10")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if args.rows == "warm":
        return warm(args)
    result = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "size": args.size, "executables": digest(args.executables), "prism": {}, "peer": {}, "prism_step": {}, "peer_step": {}}
    result = kept(args.json, result)
    # What an earlier call tried in vain comes after what it did not try.
    todo = sorted(rows(args)[args.rows == "rest"], key=lambda r: result[r[0]].get(r[1], {}).get("failed", NO_TIME) != NO_TIME)
    for side, name, work in todo:
        if "failed" in result[side].get(name, {"failed": ""}):
            if left(args) < 10:
                result[side].setdefault(name, {"failed": NO_TIME})
            else:
                try:
                    # A compiler may take any time: it leaves some to those that follow.
                    with at_most(left(args) if (side, name) == todo[-1][:2] else max(left(args) * 2 / 3, 10)):
                        result[side][name] = work()
                except Exception as e:
                    result[side][name] = {"failed": f"{type(e).__name__}: {e}"[:500]}
                torch._dynamo.reset()
                torch.cuda.empty_cache()
        print(side, name, result[side][name], flush=True)
        compare_best(result)
        # Whole or not at all: this may be ended at any time.
        part = args.json.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(args.json)
    if args.rows == "first" and "failed" in result["prism"]["f16"]:
        sys.exit("prism did not run")
    late = [f"{side} {name}" for side, name, _ in todo if result[side][name].get("failed") == NO_TIME]
    if late:
        sys.exit(f"no time left for {', '.join(late)}: run it again")


if __name__ == "__main__":
    main()
