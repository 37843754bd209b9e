#!/usr/bin/env python3
"""Asks readers of DICOM segmentations that prism shares nothing with whether they see the mask.

    dicom_seg.py SEG SOURCE MASK [SEG SOURCE MASK ...]

SEG is what prism wrote, SOURCE the folder of the series, MASK the same answer as NIfTI (.nii,
.nii.gz) or as an array (.npy) [slice][row][column], slices sorted along their normal; of a
fractional segmentation the probabilities. The geometry of the source is read here, by pydicom.

Judges: `dciodvfy` (dicom3tools) on the structure; pydicom on bits and positions; highdicom on
frames by the instances that they refer to and on the volume; dcmqi's `segimage2itkimage` on the
image it makes. Each must give every voxel. What is wrong with the source itself (`dciodvfy` on its
first file) is not held against the segmentation. A judge that is not here prints `missing: NAME`.
Exit status 0 if all that are here agree.
"""

import gzip
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pydicom

failed = []
absent = set()


def verdict(judge, ok, said=""):
    print(f"  {'ok' if ok else 'FAILED'}: {judge}{': ' + said if said else ''}")
    if not ok:
        failed.append(judge)


def missing(judge):
    absent.add(judge)


def numbers(values):
    return np.array([float(v) for v in values])


def group(data, frame, name):
    """A functional group of a frame: its own, else that of all."""
    own = data.PerFrameFunctionalGroupsSequence[frame]
    shared = data.SharedFunctionalGroupsSequence[0]
    return getattr(own if name in own else shared, name)[0]


class Source:
    """The slices of a series along their normal, and where they lie in mm of LPS."""

    def __init__(self, folder):
        slices = []
        self.first = None
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            try:
                data = pydicom.dcmread(path, stop_before_pixels=True)
            except pydicom.errors.InvalidDicomError:
                continue
            if "Rows" not in data or data.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4":
                continue
            self.first = self.first or path
            if "PerFrameFunctionalGroupsSequence" in data:
                for frame in range(int(data.NumberOfFrames)):
                    place = group(data, frame, "PlanePositionSequence")
                    turn = group(data, frame, "PlaneOrientationSequence")
                    measures = group(data, frame, "PixelMeasuresSequence")
                    slices.append((data, frame + 1, place, turn, measures))
            else:
                slices.append((data, None, data, data, data))
        six = numbers(slices[0][3].ImageOrientationPatient)
        x, y = six[:3] / np.linalg.norm(six[:3]), six[3:] / np.linalg.norm(six[3:])
        self.normal = np.cross(x, y)
        position = lambda s: numbers(s[2].ImagePositionPatient)
        slices.sort(key=lambda s: float(np.dot(position(s), self.normal)))
        self.positions = np.array([position(s) for s in slices])
        self.instances = [(str(s[0].SOPInstanceUID), s[1]) for s in slices]
        self.series = str(slices[0][0].SeriesInstanceUID)
        between = numbers(slices[0][4].PixelSpacing)
        self.columns = np.stack([x * between[1], y * between[0]], axis=1)
        data = slices[0][0]
        self.size = (len(slices), int(data.Rows), int(data.Columns))

    def slice_of(self, position):
        """The slice nearest to a position, and how far it is in mm."""
        away = np.abs((self.positions - position) @ self.normal)
        return int(away.argmin()), float(away.min())

    def voxel_of(self, position):
        """Slice, row and column of a place in mm."""
        k, _ = self.slice_of(position)
        across, *_ = np.linalg.lstsq(self.columns, position - self.positions[k], rcond=None)
        exact = np.array([k, across[1], across[0]])
        voxel = np.rint(exact).astype(int)
        if np.abs(exact - voxel).max() > 0.02:
            raise ValueError(f"{position} lies between voxels: {exact}")
        return voxel

    def paint(self, values, at):
        """Values of an array whose voxel lies at `at(index)` mm, in the source's own order."""
        painted = np.zeros(self.size, values.dtype)
        for index in np.argwhere(values):
            k, row, column = self.voxel_of(at(index))
            painted[k, row, column] = values[tuple(index)]
        return painted


def nifti(path, source):
    """The voxels of a NIfTI file, which must lie where the source does."""
    data = gzip.open(path).read() if path.endswith(".gz") else open(path, "rb").read()
    dim = struct.unpack_from("<8h", data, 40)
    kind = {2: "<u1", 16: "<f4"}[struct.unpack_from("<h", data, 70)[0]]
    rows = np.array(struct.unpack_from("<12f", data, 280)).reshape(3, 4)
    rows[:2] *= -1
    for k in (0, source.size[0] - 1):
        apart = np.abs(rows @ [0, 0, k, 1] - source.positions[k]).max()
        assert apart < 0.05, f"{path}: slice {k} lies {apart} mm from the source's"
    offset = int(struct.unpack_from("<f", data, 108)[0])
    size = (dim[3], dim[2], dim[1])
    return np.frombuffer(data, kind, int(np.prod(size)), offset).reshape(size)


def differ(found, expected):
    wrong = np.argwhere(found != expected)
    if len(wrong) == 0:
        return ""
    at = tuple(int(v) for v in wrong[0])
    return f"{len(wrong)} voxels differ, such as {at}: {found[at]}, expected {expected[at]}"


def structure(path, source):
    tool = shutil.which("dciodvfy")
    if tool is None:
        return missing("dciodvfy")
    say = lambda file: subprocess.run([tool, file], capture_output=True, text=True).stderr
    errors = lambda text: [line for line in text.splitlines() if line.startswith("Error")]
    # What was copied as the source has it is named by the same tag there.
    tags = lambda line: [word for word in line.split() if word.startswith("(0x")]
    known = {tag for line in errors(say(source.first)) for tag in tags(line)}
    own = [line for line in errors(say(path)) if not set(tags(line)) & known]
    own = [line for line in own if not known or "contains invalid data values" not in line]
    verdict("dciodvfy", not own, "; ".join(own))


def by_pydicom(path, source, expected):
    data = pydicom.dcmread(path)
    frames = data.pixel_array
    frames = frames[None] if frames.ndim == 2 else frames
    found = np.zeros(source.size, np.uint8)
    named = True
    for n, frame in enumerate(frames):
        position = numbers(group(data, n, "PlanePositionSequence").ImagePositionPatient)
        k, away = source.slice_of(position)
        assert away < 1e-3, f"frame {n} lies {away} mm from a slice"
        found[k] = frame
        image = group(data, n, "DerivationImageSequence").SourceImageSequence[0]
        uid, number = source.instances[k]
        named &= image.ReferencedSOPInstanceUID == uid
        named &= image.get("ReferencedFrameNumber") == number
    said = differ(found, expected)
    verdict("pydicom", not said, said)
    verdict("frames refer to their own slices", bool(named))
    listed = {
        str(item.ReferencedSOPInstanceUID)
        for series in data.ReferencedSeriesSequence
        if series.SeriesInstanceUID == source.series
        for item in series.ReferencedInstanceSequence
    }
    verdict("every source instance is referred to", listed == {i[0] for i in source.instances})


def by_highdicom(path, source, expected, fractional):
    try:
        import highdicom
    except ImportError:
        return missing("highdicom")
    seg = highdicom.seg.segread(path)
    options = dict(segment_numbers=[1], assert_missing_frames_are_empty=True)
    level = lambda values: np.rint(values * (255.0 if fractional else 1.0)).astype(np.uint8)
    if source.instances[0][1] is None:
        uids = [uid for uid, _ in source.instances]
        found = seg.get_pixels_by_source_instance(uids, **options)
    else:
        numbers = [number for _, number in source.instances]
        found = seg.get_pixels_by_source_frame(source.instances[0][0], numbers, **options)
    said = differ(level(found[..., 0]), expected)
    verdict("highdicom, by instance", not said, said)
    volume = seg.get_volume(segment_numbers=[1])
    at = lambda index: (volume.affine @ [*index, 1.0])[:3]
    said = differ(source.paint(level(volume.array[..., 0]), at), expected)
    verdict("highdicom, by place", not said, said)


def nrrd(path):
    """The voxels of an NRRD file and where they lie: what ITK writes, packed by gzip."""
    head, _, body = open(path, "rb").read().partition(b"\n\n")
    fields = dict(
        line.split(": ", 1) for line in head.decode("latin-1").splitlines() if ": " in line
    )
    vector = lambda text: [float(v) for v in text.strip("()").split(",")]
    steps = np.array([vector(v) for v in fields["space directions"].split()])
    origin = np.array(vector(fields["space origin"]))
    kinds = {"short": "<i2", "unsigned char": "u1", "unsigned short": "<u2", "float": "<f4"}
    size = tuple(int(v) for v in reversed(fields["sizes"].split()))
    body = gzip.decompress(body) if fields["encoding"] == "gzip" else body
    values = np.frombuffer(body, kinds[fields["type"]]).reshape(size)
    return values, lambda index: origin + index[::-1] @ steps


def by_dcmqi(path, source, expected, fractional):
    try:
        import dcmqi
    except ImportError:
        return missing("dcmqi")
    tool = os.path.join(os.path.dirname(dcmqi.__file__), "bin", "segimage2itkimage")
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "--inputDICOM", path, "--outputDirectory", folder, "--prefix", "s"]
        ran = subprocess.run(command, capture_output=True, text=True)
        made = os.path.join(folder, "s-1.nrrd")
        if ran.returncode != 0 or not os.path.exists(made):
            return verdict("dcmqi", False, (ran.stdout + ran.stderr)[-400:])
        values, at = nrrd(made)
    # It makes label images: of what is fractional it says only where something is.
    found = source.paint((values != 0).astype(np.uint8), at)
    said = differ(found, (expected != 0).astype(np.uint8) if fractional else expected)
    verdict("dcmqi", not said, said)


def judge(path, folder, mask):
    print(path)
    source = Source(folder)
    fractional = pydicom.dcmread(path, stop_before_pixels=True).SegmentationType == "FRACTIONAL"
    expected = np.load(mask) if mask.endswith(".npy") else nifti(mask, source)
    if expected.dtype != np.uint8:
        # A half is not yet the object.
        expected = np.ceil(expected.astype(np.float64) * 255 - 0.5).astype(np.uint8)
    assert expected.shape == source.size, f"{expected.shape}, expected {source.size}"
    structure(path, source)
    by_pydicom(path, source, expected)
    by_highdicom(path, source, expected, fractional)
    by_dcmqi(path, source, expected, fractional)


def main():
    arguments = sys.argv[1:]
    if not arguments or len(arguments) % 3:
        sys.exit("expected SEG SOURCE MASK, once or more often")
    for at in range(0, len(arguments), 3):
        judge(*arguments[at : at + 3])
    for name in sorted(absent):
        print(f"missing: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
