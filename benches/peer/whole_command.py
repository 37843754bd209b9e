#!/usr/bin/env python3
"""How long a person waits for the whole command: from its start to the written mask.

    python benches/peer/whole_command.py [PROGRAM] [--slices 300] [--repeats 5] [--base MODEL]

Makes an int16 CT of 512 x 512 x SLICES from the example scan (repeated, with noise), plain and
packed, and runs `prism segment` on it with the small model and a box, and with a network of the
paper's size where one is given (`prism weights` writes one). Beside it, in the same run
and in turn, nibabel and SimpleITK only read the same file and write a mask of its size. Medians.
Needs numpy, nibabel and SimpleITK.
"""
import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

import nibabel
import numpy
import SimpleITK

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOX = "180,180,100,230,230,120"
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss * 1024)
sys.exit(status != 0)
"""


def scan(folder, slices):
    """The scan, plain and packed as nibabel packs."""
    example = nibabel.load(ROOT / "examples/data/lung1_image.nii.gz")
    values = numpy.asarray(example.dataobj)
    times = [-(-n // m) for n, m in zip((512, 512, slices), values.shape)]
    values = numpy.tile(values, times)[:512, :512, :slices].astype(numpy.int16)
    values += numpy.random.default_rng(0).integers(-8, 9, values.shape, dtype=numpy.int16)
    image = nibabel.Nifti1Image(values, example.affine)
    image.header.set_data_dtype(numpy.int16)
    # Names of their own: beside a.nii, ITK takes it for a.nii.gz.
    paths = [folder / "plain.nii", folder / "packed.nii.gz"]
    for path in paths:
        nibabel.save(image, path)
    return paths


def prism(program, model, path, mask):
    """Seconds of the whole command, its own stages, and its peak memory in bytes."""
    args = [program, "segment", "-m", model, "-i", path, "--box", BOX, "-o", mask]
    # From a small process: a child's peak is counted from what its parent had.
    launcher = [sys.executable, "-c", LAUNCHER, *map(str, args)]
    said = subprocess.run(launcher, capture_output=True, text=True)
    if said.returncode != 0:
        sys.exit(f"prism failed: {said.stdout}{said.stderr}")
    stages = dict(re.findall(r"(read|write) ([0-9.]+)", said.stdout))
    seconds, peak = said.stdout.splitlines()[-1].split()
    return float(seconds), float(stages["read"]), float(stages["write"]), int(peak)


def by_nibabel(path, mask):
    start = time.perf_counter()
    image = nibabel.load(path)
    numpy.asarray(image.dataobj).max()
    read = time.perf_counter()
    nibabel.save(nibabel.Nifti1Image(object_like(image.shape), image.affine), mask)
    return read - start, time.perf_counter() - read


def by_simpleitk(path, mask):
    start = time.perf_counter()
    image = SimpleITK.ReadImage(str(path))
    read = time.perf_counter()
    out = SimpleITK.GetImageFromArray(object_like(image.GetSize()).transpose(2, 1, 0))
    out.CopyInformation(image)
    SimpleITK.WriteImage(out, str(mask), useCompression=True)
    return read - start, time.perf_counter() - read


def object_like(size):
    mask = numpy.zeros(size, numpy.uint8)
    mask[180:230, 180:230, 100:120] = 1
    return mask


def inflated(path):
    """Seconds of unpacking alone, by the zlib that Python has."""
    packed = path.read_bytes()
    start = time.perf_counter()
    zlib.decompress(packed, 31)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program", nargs="?", default=str(ROOT / "target/release/prism"))
    parser.add_argument("--model", default=str(ROOT / "models/small.safetensors"))
    parser.add_argument("--base", help="a model of the paper's size")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        mask = folder / "mask.nii.gz"
        print(f"512 x 512 x {args.slices}, int16, {os.cpu_count()} threads\n")
        print("| | whole command | of it reading | writing | peak memory |")
        print("|---|---|---|---|---|")
        for path in scan(folder, args.slices):
            models = {"prism segment": args.model}
            if args.base:
                models["prism segment, the paper's network"] = args.base
            others = {"nibabel, reading and writing": by_nibabel, "SimpleITK, reading and writing": by_simpleitk}
            rows = {name: [] for name in [*models, *others]}
            bare = []
            for _ in range(args.repeats):
                for name, model in models.items():
                    rows[name].append(prism(args.program, model, path, mask))
                for name, by in others.items():
                    read, write = by(path, mask)
                    rows[name].append((read + write, read, write, None))
                if path.suffix == ".gz":
                    bare.append(inflated(path))
            for name, runs in rows.items():
                whole, read, write = (statistics.median(r[n] for r in runs) for n in range(3))
                memory = max(r[3] for r in runs) / 1e6 if runs[0][3] else None
                peak = f"{memory:.0f} MB" if memory else ""
                print(f"| {path.name}: {name} | {whole:.2f} s | {read:.2f} s | {write:.2f} s | {peak} |")
            if bare:
                print(f"| {path.name}: unpacking alone (Python's zlib) | {statistics.median(bare):.2f} s | | | |")


if __name__ == "__main__":
    main()
