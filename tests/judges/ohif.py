#!/usr/bin/env python3
"""What OHIF is shown, to judge DICOM segmentations: see ohif.mjs, which drives it.

    ohif.py make FOLDER         # FOLDER/NAME/scan/*.dcm, mask.nii, truth.json of kinds of series
    ohif.py serve FOLDER OHIF   # OHIF's built files, and FOLDER's DICOM by DICOMweb, on a free port

Slices run either way, straight and oblique, one a file or many; neither the names of files nor
their identifiers are in the order of places. mask.nii is the mask that prism is to write,
truth.json what it means, reckoned here: the voxels that are marked on each image, and the places in
mm of all.
Serving prints the address first. Needs pydicom.
"""

import json
import math
import os
import struct
import sys
from array import array
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

# Unequal, and rows end within a byte. Slices are a multiple of 16 voxels, for OHIF 3.13.2 misreads
# others, of any program: frames that begin within a byte come out with the wrong bits, and
# where all of them are an odd number of bytes, the byte that pads them is taken for damage.
COLUMNS, ROWS, SLICES = 36, 44, 11
# mm, along a row, down a column, and between slices.
STEP = (0.9, 1.1, 2.5)


def marked(i, j, k):
    """The mask: no flip leaves it as it is, and slices between its parts are empty."""
    if 3 <= k <= 5:
        return 18 <= i < 34 - 2 * k and 6 <= j < 12 + 2 * k and not (i < 21 and j < 10)
    return k == 8 and 6 <= i < 12 and 30 <= j < 34


def value(i, j, k):
    """A body in air, its left brighter than its right, and a lesion."""
    x, y = (i - 18) / 17, (j - 22) / 21
    return -1000 if x * x + y * y > 1 else 150 if marked(i, j, k) else 2 * i - j


def turned(a, b):
    """Directions of rows and columns, turned about the body's axis and then tilted."""
    c, s, d, t = math.cos(a), math.sin(a), math.cos(b), math.sin(b)
    return (c, s, 0.0), (-s * d, c * d, t)


STRAIGHT = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)
# Directions; whether the first slice lies at the end that the normal comes from; and whether all
# slices are frames of one file.
SERIES = {
    "upwards": (STRAIGHT, True, False),
    "downwards": (STRAIGHT, False, False),
    "oblique": (turned(0.3, 0.4), True, False),
    "oblique-downwards": (turned(-0.5, 0.7), False, False),
    "sagittal": (SAGITTAL, True, False),
    "frames": (STRAIGHT, True, True),
    "frames-downwards": (turned(0.3, 0.4), False, True),
}


def group(**attributes):
    """A sequence of one item."""
    item = pydicom.Dataset()
    for keyword, value_ in attributes.items():
        setattr(item, keyword, value_)
    return pydicom.Sequence([item])


def described(root, name, kind, uid):
    """A file of a CT without its voxels and their places."""
    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = kind
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = uid
    file.StudyInstanceUID, file.SeriesInstanceUID = root, f"{root}.1"
    file.FrameOfReferenceUID = f"{root}.3"
    file.StudyDate = file.SeriesDate = file.ContentDate = "20260101"
    file.StudyTime = file.SeriesTime = file.ContentTime = "120000"
    file.PatientName, file.PatientID = f"Made^{name}", name
    file.PatientBirthDate = file.PatientSex = file.AccessionNumber = ""
    file.ReferringPhysicianName = file.StudyID = file.Manufacturer = ""
    file.Modality, file.SeriesNumber, file.SeriesDescription = "CT", 1, name
    file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    file.Rows, file.Columns, file.SamplesPerPixel = ROWS, COLUMNS, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 1
    return file


def make(folder):
    voxels = [(i, j) for j in range(ROWS) for i in range(COLUMNS)]
    for number, (name, (directions, forwards, framed)) in enumerate(SERIES.items(), 1):
        scan = os.path.join(folder, name, "scan")
        os.makedirs(scan)
        (x, y), root = directions, f"1.2.826.0.1.3680043.10.543.{number}"
        z = tuple(x[n - 2] * y[n - 1] - x[n - 1] * y[n - 2] for n in range(3))
        axes = [[d * step for d in axis] for axis, step in zip((x, y, z), STEP)]
        origin = (-20.0, -130.0, 300.0)
        at = lambda i, j, k: [o + i * a + j * b + k * c for o, a, b, c in zip(origin, *axes)]
        scale = {"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "HU"}
        window = {"WindowCenter": 40, "WindowWidth": 400}
        measures = {"PixelSpacing": [STEP[1], STEP[0]], "SliceThickness": STEP[2]}
        turn = {"ImageOrientationPatient": [f"{v:.12f}" for v in x + y]}
        # Of each frame what DICOMweb calls it, its slice, its marks, and the places of all voxels.
        truth, frames, pictures = {}, [], b""
        for n in range(SLICES):
            k = n if forwards else SLICES - 1 - n
            uid = f"{root}.2.{7 * k % SLICES + 1}"
            picture = array("h", (value(i, j, k) for i, j in voxels)).tobytes()
            place = {"ImagePositionPatient": [f"{v:.10f}" for v in at(0, 0, k)]}
            if framed:
                frame = pydicom.Dataset()
                frame.FrameContentSequence = group(
                    StackID="1", InStackPositionNumber=n + 1, DimensionIndexValues=[n + 1]
                )
                frame.PlanePositionSequence = group(**place)
                frames.append(frame)
                pictures += picture
            else:
                file = described(root, name, CTImageStorage, uid)
                file.InstanceNumber = n + 1
                for keyword, value_ in (scale | window | measures | turn | place).items():
                    setattr(file, keyword, value_)
                file.PixelData = picture
                path = os.path.join(scan, f"{3 * k % SLICES:02}.dcm")
                file.save_as(path, enforce_file_format=True)
            truth[f"{root}.2/frames/{n + 1}" if framed else f"{uid}/frames/1"] = {
                "slice": k,
                "voxels": [i + COLUMNS * j for i, j in voxels if marked(i, j, k)],
                "places": [at(i, j, k) for i, j in voxels],
            }
        if framed:
            file = described(root, name, EnhancedCTImageStorage, f"{root}.2")
            file.InstanceNumber, file.NumberOfFrames = 1, SLICES
            shared = pydicom.Dataset()
            shared.PixelMeasuresSequence = group(**measures)
            shared.PlaneOrientationSequence = group(**turn)
            shared.PixelValueTransformationSequence = group(**scale)
            shared.FrameVOILUTSequence = group(**window)
            file.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
            file.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
            file.PixelData = pictures
            file.save_as(os.path.join(scan, "all.dcm"), enforce_file_format=True)
        with open(os.path.join(folder, name, "truth.json"), "w") as out:
            told = {"study": root, "rows": ROWS, "columns": COLUMNS, "frames": truth}
            json.dump(told, out)
        with open(os.path.join(folder, name, "mask.nii"), "wb") as out:
            out.write(nifti(axes, origin))


def nifti(axes, origin):
    """The mask as NIfTI, whose places are to the right, the front and the head."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, COLUMNS, ROWS, SLICES, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<8f", header, 76, 1, *STEP, 0, 0, 0, 0)
    struct.pack_into("<2f", header, 108, 352, 1)
    # Lengths in mm; the affine is that of the scanner.
    header[123] = 2
    struct.pack_into("<2h", header, 252, 0, 1)
    rows = [[axis[n] * sign for axis in (*axes, origin)] for n, sign in enumerate((-1, -1, 1))]
    struct.pack_into("<12f", header, 280, *(v for row in rows for v in row))
    header[344:348] = b"n+1\0"
    every = ((i, j, k) for k in range(SLICES) for j in range(ROWS) for i in range(COLUMNS))
    return bytes(header) + bytes(int(marked(*voxel)) for voxel in every)


CONFIG = """window.config = {
  routerBasename: '/', extensions: [], modes: [], showStudyList: true, maxNumberOfWebWorkers: 1,
  investigationalUseDialog: { option: 'never' },
  defaultDataSourceName: 'here',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb', sourceName: 'here',
    configuration: {
      friendlyName: 'here', name: 'here', qidoRoot: '/dicomweb', wadoRoot: '/dicomweb',
      wadoUriRoot: '/dicomweb', imageRendering: 'wadors', thumbnailRendering: 'wadors',
      enableStudyLazyLoad: true, singlepart: 'video', bulkDataURI: { enabled: false },
    },
  }],
};
"""
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".woff2": "font/woff2",
}
STUDY = "StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber PatientName PatientID"
SERIES_TAGS = "SeriesInstanceUID Modality SeriesNumber SeriesDescription SeriesDate SeriesTime"


class Archive:
    """Studies, their series and instances, read anew for every request: there are few."""

    def __init__(self, folder):
        self.folder = folder

    def files(self, **asked):
        """Paths and data sets whose attributes are as asked."""
        for place, _, names in os.walk(self.folder):
            for name in sorted(name for name in names if name.endswith(".dcm")):
                path = os.path.join(place, name)
                data = pydicom.dcmread(path)
                if all(data.get(keyword) == value for keyword, value in asked.items()):
                    yield path, data

    def list(self, by, keywords, **asked):
        """Studies or series, by the attribute that names them, and what is told of each."""
        found = {}
        for _, data in self.files(**asked):
            found.setdefault(data[by].value, []).append(data)
        told = []
        for members in found.values():
            one = pydicom.Dataset()
            for keyword in keywords.split():
                if keyword in members[0]:
                    one[keyword] = members[0][keyword]
            if by == "StudyInstanceUID":
                one.ModalitiesInStudy = sorted({data.Modality for data in members})
                one.NumberOfStudyRelatedInstances = len(members)
            else:
                one.NumberOfSeriesRelatedInstances = len(members)
            told.append(one.to_json_dict())
        return told

    def answer(self, parts, query):
        """Type and bytes of what a path and a query name, None where they name nothing."""
        said = lambda told: ("application/dicom+json", json.dumps(told).encode())
        levels = ("studies", "series", "instances")
        names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        asked = {n: uid for level, n, uid in zip(levels, names, parts[1::2]) if level in parts[::2]}
        match parts:
            case ["studies"]:
                keys = {"0020000D": names[0], names[0]: names[0], "00100020": "PatientID"}
                asked = {keys[key]: value for key, value in query.items() if key in keys}
                return said(self.list(names[0], STUDY, **asked))
            case ["studies", _, "series"]:
                return said(self.list(names[1], SERIES_TAGS, **asked))
            case ["studies", _, "series", _, "metadata"]:
                told = []
                for _, data in self.files(**asked):
                    del data.PixelData
                    told.append(data.to_json_dict())
                return said(told)
            case ["studies", _, "series", _, "instances", _]:
                for path, _ in self.files(**asked):
                    with open(path, "rb") as file:
                        return parted("application/dicom", file.read())
            # Of images alone: a segmentation is taken whole.
            case ["studies", _, "series", _, "instances", _, "frames", number]:
                size = 2 * COLUMNS * ROWS
                for _, data in self.files(**asked, Modality="CT"):
                    start = size * (int(number) - 1)
                    return parted("application/octet-stream", data.PixelData[start : start + size])
        return None


def parted(kind, content):
    """An answer of one part."""
    head = f"--part\r\nContent-Type: {kind}\r\n\r\n".encode()
    return f'multipart/related; type="{kind}"; boundary=part', head + content + b"\r\n--part--\r\n"


def serve(folder, ohif):
    archive, ohif = Archive(folder), os.path.realpath(ohif)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked = urlsplit(self.path)
            path = unquote(asked.path)
            parts = path.strip("/").split("/")
            if parts[0] == "dicomweb":
                found = archive.answer(parts[1:], dict(parse_qsl(asked.query)))
            elif path == "/app-config.js":
                found = "text/javascript", CONFIG.encode()
            else:
                # Addresses within the viewer are its page.
                file = os.path.realpath(os.path.join(ohif, path.lstrip("/")))
                if not (file.startswith(ohif + os.sep) and os.path.isfile(file)):
                    file = os.path.join(ohif, "index.html")
                ending = os.path.splitext(file)[1]
                with open(file, "rb") as content:
                    found = TYPES.get(ending, "application/octet-stream"), content.read()
            kind, content = found or ("text/plain", b"there is no such thing\n")
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
    server.serve_forever()


match sys.argv[1:]:
    case ["make", folder]:
        make(folder)
    case ["serve", folder, ohif]:
        serve(folder, ohif)
    case _:
        sys.exit(__doc__)
