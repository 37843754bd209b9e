"""Segments an object of a scan in a NumPy array, corrects it once, and takes the correction back:

    python segment.py MODEL IMAGE.nii.gz MASK.nii.gz I0,J0,K0,I1,J1,K1 I,J,K

The scan is read here, by NumPy alone, as some program's own reader would; nibabel's and SimpleITK's
images are taken as they are. MASK is written by the library; MASK.npy holds the array that came
back. Needs the package that scripts/wheel builds.
"""

import gzip
import sys
import time

import numpy as np
import prism_seg


def read_nifti(path):
    """Voxels [i, j, k] and the sform of a little-endian NIfTI-1 file of int16."""
    raw = (gzip.open if path.endswith(".gz") else open)(path, "rb").read()
    is_nifti = len(raw) >= 352 and np.frombuffer(raw, "<i4", 1)[0] == 348
    if not is_nifti or np.frombuffer(raw, "<i2", 1, 70)[0] != 4:
        sys.exit(f"{path}: this example reads little-endian NIfTI-1 of int16 alone")
    shape = tuple(np.frombuffer(raw, "<i2", 8, 40)[1:4])
    offset = int(np.frombuffer(raw, "<f4", 1, 108)[0])
    affine = np.vstack([np.frombuffer(raw, "<f4", 12, 280).reshape(3, 4), [0, 0, 0, 1]])
    voxels = np.frombuffer(raw, "<i2", int(np.prod(shape)), offset).reshape(shape, order="F")
    return voxels, affine.astype(float)


def timed(what, call):
    start = time.perf_counter()
    result = call()
    print(f"{what:<11}{1e3 * (time.perf_counter() - start):7.1f} ms")
    return result


def main():
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    model, image, output = sys.argv[1:4]
    box, point = ([float(v) for v in text.split(",")] for text in sys.argv[4:])
    voxels, affine = read_nifti(image)
    network = prism_seg.Model(model)
    print(network.engine)
    network.warm_up()
    with prism_seg.Session(voxels, network, affine=affine) as session:
        said = {"points": [point], "box": box}
        first = timed("first click", lambda: session.interact(**said))
        mask = first.mask
        first.save(output)
        np.save(output + ".npy", mask)
        # A person would say where the answer is wrong. Here the voxel of it that lies furthest from
        # the first point is taken away.
        inside = np.argwhere(mask)
        furthest = inside[np.argmax(((inside - point) ** 2).sum(1))]
        second = timed("correction", lambda: session.point(furthest, positive=False))
        scores = np.round(first.scores, 3)
        print(f"{mask.sum()} voxels, then {second.mask.sum()}; scores {scores}")
        session.undo()
        if not np.array_equal(session.mask, mask):
            sys.exit("undo did not bring the first answer back")


if __name__ == "__main__":
    main()
