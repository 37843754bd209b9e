"""The Python package, as the wheel installs it, with the small model on the example scan.

python3 test_prism_seg.py WHEEL MASK, with the wheel's package to be imported; MASK is what `prism
segment` made of BOX and POINT. What needs a package that is not there is skipped.
"""

import base64
import csv
import ctypes
import gc
import gzip
import hashlib
import io
import logging
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import unittest
import unittest.mock
import weakref
import zipfile

import numpy as np
import prism_seg
from prism_seg import _library, _session

try:
    import nibabel
except ImportError:
    nibabel = None
try:
    import SimpleITK
except ImportError:
    SimpleITK = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGE = ROOT / "examples" / "data" / "lung1_image.nii.gz"
BOX, POINT = ((69, 68, 13), (93, 94, 16)), (80, 80, 14)
WHEEL, MASK = (pathlib.Path(p) for p in sys.argv[1:3]) if len(sys.argv) > 2 else (None, None)
needs_nibabel = unittest.skipUnless(nibabel, "nibabel is not on this machine")
needs_simpleitk = unittest.skipUnless(SimpleITK, "SimpleITK is not on this machine")

MODEL = prism_seg.Model.small()


def scan():
    """The example's voxels [i, j, k] and affine, read by NumPy alone."""
    raw = gzip.decompress(IMAGE.read_bytes())
    shape = tuple(np.frombuffer(raw, "<i2", 8, 40)[1:4])
    offset = int(np.frombuffer(raw, "<f4", 1, 108)[0])
    affine = np.vstack([np.frombuffer(raw, "<f4", 12, 280).reshape(3, 4), [0, 0, 0, 1]])
    voxels = np.frombuffer(raw, "<i2", int(np.prod(shape)), offset).reshape(shape, order="F")
    return voxels, affine.astype(float)


VOXELS, AFFINE = scan()


def oblique():
    """An affine of axes that are turned, swapped and left-handed, as scanners leave them."""
    a, b = np.deg2rad(17.0), np.deg2rad(-31.0)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    # i runs towards the back, j to the left, k to the head.
    axes = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ axes * np.sqrt((AFFINE[:3, :3] ** 2).sum(0))
    affine[:3, 3] = [91.5, -40.25, 1203.0]
    return affine


def first(session):
    """The answer to box and point in one interaction."""
    return session.interact(box=BOX, points=[POINT]).mask


class Interactions(unittest.TestCase):
    """What holds for every kind of image, on an array."""

    @classmethod
    def setUpClass(cls):
        cls.volume = prism_seg.Volume(VOXELS, affine=AFFINE)

    def session(self, **options):
        session = prism_seg.Session(self.volume, MODEL, **options)
        self.addCleanup(session.close)
        return session

    def test_a_session_is_steered_and_undo_brings_the_mask_back(self):
        session = self.session()
        self.assertEqual((session.mask.sum(), session.prediction, session.score), (0, None, None))
        self.assertFalse(session.undo())
        answer = session.box(*BOX)
        self.assertGreater(answer.looks, 0)
        self.assertEqual(answer.changed, answer.mask.sum())
        session.point(POINT)
        before = session.mask
        self.assertEqual((before.shape, before.dtype), (VOXELS.shape, np.uint8))
        self.assertEqual(before[POINT], 1)
        self.assertTrue(0.5 < session.prediction.scores.max() < 1)
        inside = np.argwhere(before)
        furthest = tuple(inside[np.argmax(((inside - POINT) ** 2).sum(1))])
        after = session.point(furthest, positive=False)
        self.assertEqual((after.mask[furthest], after.mask[POINT]), (0, 1))
        self.assertEqual(after.changed, (after.mask != before).sum())
        np.testing.assert_array_equal(after.logits > 0, after.mask == 1)
        self.assertEqual(session.depth, (3, 0))
        self.assertTrue(session.undo())
        np.testing.assert_array_equal(session.mask, before)
        self.assertTrue(session.redo())
        np.testing.assert_array_equal(session.mask, after.mask)
        session.reset()
        self.assertEqual((session.mask.sum(), session.depth), (0, (0, 0)))

    def test_every_kind_of_prompt_is_understood(self):
        session, obeyed = self.session(), self.assertEqual
        stroke = np.zeros(VOXELS.shape, bool)
        stroke[78:83, 80, 14] = True
        strokes = []
        for given in (stroke, np.argwhere(stroke)):
            session.reset()
            strokes.append(session.scribble(given).mask)
            obeyed(strokes[-1][stroke].min(), 1)
        np.testing.assert_array_equal(*strokes)
        off = session.scribble(np.argwhere(stroke)[:2], positive=False).mask
        obeyed(off[78:80, 80, 14].max(), 0)
        session.reset()
        obeyed(session.line((74, 80, 14), (87, 80, 14)).mask[POINT], 1)
        session.reset()
        outline = [(72, 72, 14), (88, 72, 14), (88, 88, 14), (72, 88, 14)]
        obeyed(session.lasso(outline).mask[POINT], 1)
        session.reset()
        ball = ((np.indices(VOXELS.shape).T - POINT) ** 2).sum(-1).T < 36
        np.testing.assert_array_equal(session.start_from(ball).mask, ball)
        session.reset()
        logits = np.where(ball, 3.0, -3.0)
        np.testing.assert_array_equal(session.interact(logits=logits).mask, ball)
        logits[POINT] = np.nan
        with self.assertRaisesRegex(prism_seg.PrismError, "logits are NaN"):
            session.interact(logits=logits)
        session.reset()
        others = np.zeros(VOXELS.shape, np.uint8)
        others[:80] = 1
        kept_out = session.interact(box=BOX, points=[(84, 80, 14)], others=others).mask
        self.assertTrue(kept_out.any() and not kept_out[:80].any())
        # Several points at once, some of them off the object.
        session.reset()
        points = [POINT, (70, 69, 13), (84, 80, 14)]
        answer = session.interact(points=points, labels=[True, False, True], box=BOX).mask
        obeyed([answer[p] for p in points], [1, 0, 1])

    def test_prompts_in_millimetres_name_the_same_voxels(self):
        expected = first(self.session())
        for space, flip in (("ras", [1, 1, 1]), ("lps", [-1, -1, 1])):
            at = lambda v: (AFFINE @ [*v, 1])[:3] * flip  # noqa: E731
            last = np.subtract(BOX[1], 1)
            session = self.session()
            found = session.interact(box=[at(BOX[0]), at(last)], points=at(POINT), space=space)
            np.testing.assert_array_equal(found.mask, expected, space)

    def test_errors_carry_the_librarys_message_and_leave_the_session_as_it_was(self):
        session = self.session()
        before = first(session)
        with self.assertRaises(prism_seg.PrismError) as raised:
            session.point((1000, 0, 0))
        error = raised.exception
        self.assertEqual((error.name, error.status), ("PRISM_PROMPT", 9))
        self.assertEqual(
            str(error),
            "point at voxel [1000, 0, 0] lies outside the scan of [160, 160, 28] voxels",
        )
        again = pickle.loads(pickle.dumps(error))
        self.assertEqual((str(again), again.name), (str(error), error.name))
        for wrong, message in [
            (lambda: self.session().interact(), "an interaction needs a point"),
            (lambda: session.point((1, 2)), r"points of shape \(1, 2\)"),
            (lambda: session.point(POINT, space="xyz"), "space is 'xyz'"),
            (lambda: session.point(POINT, positive=2), "labels are"),
            (lambda: session.interact(points=[POINT], labels=[1, 0]), "labels of shape"),
            (lambda: session.box((1, 2), (3, 4)), "a box of 4 numbers"),
            (lambda: session.scribble([(1.5, 2, 3)]), "whole numbers"),
            (lambda: session.start_from(np.ones((2, 3, 4))), r"shape \(2, 3, 4\)"),
            (lambda: prism_seg.Session(VOXELS, MODEL, spacing=(1, 1)), "expected three numbers"),
            (lambda: prism_seg.Session(VOXELS, MODEL, spacing=(1, 1, 1), affine=AFFINE), "both"),
            (lambda: prism_seg.Session(VOXELS[0], MODEL), "expected three dimensions"),
            (lambda: prism_seg.Session(VOXELS * 1j, MODEL), "an image of complex128"),
            (lambda: prism_seg.Session(object(), MODEL), "expected a NumPy array"),
            (lambda: prism_seg.Session(VOXELS, MODEL, modality="xray"), "modality is 'xray'"),
            (lambda: prism_seg.Session("none.nii.gz", MODEL), "none.nii.gz"),
            (lambda: prism_seg.Model("none.safetensors"), "none.safetensors"),
            (lambda: prism_seg.Engine("abacus"), "abacus"),
        ]:
            expected = (prism_seg.PrismError, ValueError, TypeError)
            with self.subTest(message), self.assertRaisesRegex(expected, message):
                wrong()
        self.assertEqual(session.depth, (1, 0))
        np.testing.assert_array_equal(session.mask, before)

    def test_what_was_closed_is_refused(self):
        with prism_seg.Session(self.volume, MODEL) as session:
            answer = session.point(POINT)
        with self.assertRaises(prism_seg.PrismError) as raised:
            session.point(POINT)
        self.assertEqual(raised.exception.name, "PRISM_INVALID_HANDLE")
        session.close()
        # What was made of it goes on.
        self.assertEqual(answer.mask[POINT], 1)

    def test_messages_are_notes_and_go_to_the_log(self):
        with self.assertLogs("prism_seg", logging.INFO) as log:
            session = self.session()
            answer = session.box((69, 68, 14), (93, 94, 15))
        self.assertTrue(any("treated as CT" in note for note in session.notes), session.notes)
        self.assertTrue(any("one slice thick" in note for note in answer.notes), answer.notes)
        self.assertEqual(session.notes[-len(answer.notes) :], answer.notes)
        self.assertEqual([r.getMessage() for r in log.records], list(session.notes))
        self.assertEqual(session.prediction.notes, ())

    def test_progress_is_told_and_cancels(self):
        session, shares = self.session(), []
        session.on_progress(lambda share, stage: shares.append((share, stage)))
        session.prepare(box=BOX)
        first(session)
        self.assertTrue(shares and all(0 < s <= 1 and isinstance(n, str) for s, n in shares))
        session.reset()
        session.on_progress(lambda share, stage: False)
        with self.assertRaises(prism_seg.PrismError) as raised:
            session.point(POINT)
        self.assertEqual(raised.exception.name, "PRISM_CANCELLED")

        def broken(share, stage):
            raise KeyError(stage)

        session.on_progress(broken)
        with self.assertRaises(KeyError):
            session.point(POINT)
        # Another session has not inherited it, and this one is as it was.
        self.assertEqual(session.another().point(POINT).mask[POINT], 1)
        session.on_progress(None)
        self.assertEqual((session.depth, session.point(POINT).mask[POINT]), ((0, 0), 1))

    def test_a_session_is_for_one_thread_and_several_run_at_once(self):
        session, found = self.session(), []

        def nested(share, stage):
            try:
                session.undo()
            except prism_seg.PrismError as error:
                found.append(error.name)

        def elsewhere(share, stage):
            thread = threading.Thread(target=nested, args=(share, stage))
            thread.start()
            thread.join()

        for progress in (nested, elsewhere):
            session.on_progress(progress)
            expected = first(session)
            session.on_progress(None)
            session.reset()
        self.assertEqual(set(found), {"PRISM_BUSY"})
        masks = [None] * 3

        def one(number):
            with prism_seg.Session(self.volume, MODEL) as own:
                masks[number] = first(own)

        threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for mask in masks:
            np.testing.assert_array_equal(mask, expected)

    def test_arrays_of_any_type_and_order_give_the_same_mask(self):
        expected = first(self.session())
        kinds = {
            "C order": np.ascontiguousarray(VOXELS),
            "every second": np.repeat(VOXELS, 2, axis=1)[:, ::2],
            "from behind": np.ascontiguousarray(VOXELS[::-1])[::-1],
            "big-endian": VOXELS.astype(">i4"),
            "one channel": VOXELS[..., None],
        }
        for name, array in kinds.items():
            with self.subTest(name), prism_seg.Session(array, MODEL, affine=AFFINE) as session:
                np.testing.assert_array_equal(first(session), expected)
        # Whole numbers are resampled to whole numbers, others are not: a few voxels may differ.
        masks = []
        for kind in [np.float32, np.float64, np.longdouble]:
            with prism_seg.Session(VOXELS.astype(kind), MODEL, affine=AFFINE) as session:
                masks.append(first(session))
        for mask in masks[1:]:
            np.testing.assert_array_equal(mask, masks[0])
        self.assertLessEqual((masks[0] != expected).sum(), 5)

    def test_an_array_of_one_number_is_read_within_its_memory(self):
        # All of its strides are 0, which means something else to the library.
        flat = np.broadcast_to(np.int16(-700), (24, 24, 24))
        with prism_seg.Session(flat, MODEL, spacing=(1, 1, 1)) as session:
            self.assertEqual(session.volume.spacing, (1.0, 1.0, 1.0))
            answer = session.start_from(np.broadcast_to(np.uint8(1), flat.shape))
            self.assertTrue(answer.mask.all())

    def test_voxels_outlive_their_names(self):
        session = prism_seg.Session(VOXELS.copy(order="F"), MODEL, affine=AFFINE)
        voxels = weakref.ref(session.volume._source.voxels)
        self.assertTrue((first(session) == first(self.session())).all())
        session.close()
        self.assertIsNotNone(voxels())
        del session
        gc.collect()
        self.assertIsNone(voxels(), "a session without a reference keeps its voxels")

    def test_a_file_gives_the_programs_mask(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "mask.nii.gz"
            with prism_seg.Session(IMAGE, str(_session._SMALL)) as session:
                expected = first(session)
                session.prediction.save(path)
                self.assertRaises(TypeError, session.to_image)
            if MASK is not None:
                self.assertEqual(path.read_bytes(), MASK.read_bytes())
        np.testing.assert_array_equal(first(self.session()), expected)

    def test_without_a_model_the_small_one_is_taken_or_said_to_be_missing(self):
        with prism_seg.Session(VOXELS, affine=AFFINE) as session:
            self.assertEqual(session.model.facts, MODEL.facts)
            self.assertEqual(session.point(POINT).mask[POINT], 1)
        missing = pathlib.Path("nowhere.safetensors")
        with unittest.mock.patch.object(_session, "_SMALL", missing):
            self.assertRaisesRegex(FileNotFoundError, "--with-model", prism_seg.Model.small)


@needs_nibabel
class Nibabel(unittest.TestCase):
    def test_a_scan_is_taken_and_given_back_as_an_image(self):
        image = nibabel.load(IMAGE)
        with prism_seg.Session(image, MODEL) as session:
            mask = first(session)
            made = session.to_image()
        if MASK is not None:
            np.testing.assert_array_equal(mask, np.asarray(nibabel.load(MASK).dataobj))
        self.assertIs(type(made), type(image))
        self.assertEqual(made.get_data_dtype(), np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            nibabel.save(made, pathlib.Path(folder) / "mask.nii.gz")
            again = nibabel.load(pathlib.Path(folder) / "mask.nii.gz")
            np.testing.assert_array_equal(np.asarray(again.dataobj), mask)
            np.testing.assert_array_equal(again.affine, image.affine)
            for code in ("sform_code", "qform_code"):
                self.assertEqual(again.header[code], image.header[code])
        # The same again, from what came back.
        with prism_seg.Session(image, MODEL) as session:
            np.testing.assert_array_equal(session.start_from(again_in_memory(made)).mask, mask)

    def test_an_oblique_image_lies_where_its_affine_says(self):
        image = nibabel.Nifti1Image(VOXELS, oblique())
        with prism_seg.Session(image, MODEL) as session:
            np.testing.assert_allclose(session.volume.affine, oblique(), atol=1e-9)
            expected = first(session)
            session.reset()
            at = lambda v: nibabel.affines.apply_affine(oblique(), v)  # noqa: E731
            ras = session.interact(points=[at(POINT)], space="ras").mask
            session.reset()
            np.testing.assert_array_equal(session.point(POINT).mask, ras)
            session.reset()
            shifted = oblique()
            shifted[:3, 3] += 5
            elsewhere = nibabel.Nifti1Image(expected, shifted)
            self.assertRaisesRegex(ValueError, "mm away from the image", session.start_from, elsewhere)
            made = session.to_image()
            np.testing.assert_array_equal(made.affine, image.affine)

    def test_units_of_its_header_count(self):
        affine = np.diag([700.0, 700.0, 1500.0, 1.0])
        image = nibabel.Nifti1Image(VOXELS, affine)
        image.header.set_xyzt_units("micron")
        np.testing.assert_allclose(prism_seg.Volume(image).spacing, (0.7, 0.7, 1.5), rtol=1e-12)

    def test_several_scans_and_a_mapped_file_are_told(self):
        series = nibabel.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4))
        self.assertRaisesRegex(ValueError, "three dimensions", prism_seg.Volume, series)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "mapped.nii"
            nibabel.save(nibabel.Nifti1Image(VOXELS, AFFINE), path)
            image = nibabel.load(path)
            with prism_seg.Session(image, MODEL) as session:
                # A file that is cut short would end a process that has it mapped.
                path.write_bytes(path.read_bytes()[:400])
                self.assertEqual(session.point(POINT).mask[POINT], 1)


def again_in_memory(image):
    """A mask as an image whose header went through bytes."""
    return type(image).from_bytes(image.to_bytes())


@needs_simpleitk
class Simpleitk(unittest.TestCase):
    def oblique(self):
        """The oblique scan, made by SimpleITK: positions in LPS."""
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(VOXELS.T))
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ oblique()
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
        image.SetSpacing(spacing.tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        return image

    def test_a_scan_is_taken_and_given_back_as_an_image(self):
        image = SimpleITK.ReadImage(str(IMAGE))
        with prism_seg.Session(image, MODEL) as session:
            mask = first(session)
            made = session.to_image()
            self.assertEqual(session.volume.shape, SimpleITK.GetArrayViewFromImage(image).shape)
            # Masks go in as they come out.
            session.reset()
            np.testing.assert_array_equal(session.start_from(mask).mask, mask)
            session.reset()
            np.testing.assert_array_equal(session.start_from(made).mask, mask)
            self.assertRaisesRegex(ValueError, "expected the image's", session.start_from, mask.T)
        with prism_seg.Session(VOXELS, MODEL, affine=AFFINE) as session:
            np.testing.assert_array_equal(mask, first(session).T)
        self.assertEqual(made.GetPixel(POINT), 1)
        self.assertEqual(made.GetPixelID(), SimpleITK.sitkUInt8)
        for place in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
            self.assertEqual(getattr(made, place)(), getattr(image, place)())

    def test_an_oblique_image_lies_where_simpleitk_says(self):
        image = self.oblique()
        with prism_seg.Session(image, MODEL) as session:
            np.testing.assert_allclose(session.volume.affine, oblique(), atol=1e-6)
            expected = session.point(POINT).mask
            session.reset()
            lps = image.TransformIndexToPhysicalPoint(POINT)
            np.testing.assert_array_equal(session.point(lps, space="lps").mask, expected)
        with prism_seg.Session(VOXELS, MODEL, affine=oblique()) as session:
            np.testing.assert_array_equal(session.point(POINT).mask.T, expected)

    def test_what_is_written_to_it_afterwards_is_not_seen(self):
        image = self.oblique()
        with prism_seg.Session(image, MODEL) as session:
            before = session.volume._source.voxels.copy()
            image.SetPixel(POINT, -3000)
            image[:, :, 3] = 7
            np.testing.assert_array_equal(session.volume._source.voxels, before)
            del image
            gc.collect()
            np.testing.assert_array_equal(session.volume._source.voxels, VOXELS)

    def test_what_is_no_scan_is_refused(self):
        for image in (
            SimpleITK.Image(8, 8, SimpleITK.sitkInt16),
            SimpleITK.Image([8, 8, 8], SimpleITK.sitkVectorUInt8, 3),
        ):
            self.assertRaisesRegex(ValueError, "expected 3 and 1", prism_seg.Volume, image)
        image = SimpleITK.Image(8, 8, 8, SimpleITK.sitkInt16)
        with self.assertRaisesRegex(ValueError, "for arrays"):
            prism_seg.Volume(image, spacing=(1, 1, 1))

    @needs_nibabel
    def test_a_mask_of_another_package_is_taken_by_its_place(self):
        ball = (((np.indices(VOXELS.shape).T - POINT) ** 2).sum(-1).T < 36).astype(np.uint8)
        with prism_seg.Session(self.oblique(), MODEL) as session:
            given = nibabel.Nifti1Image(ball, oblique())
            np.testing.assert_array_equal(session.start_from(given).mask, ball.T)


class Package(unittest.TestCase):
    def test_the_structures_are_those_of_the_header(self):
        header = (ROOT / "include" / "prism.h").read_text(encoding="utf-8")
        header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
        types = {
            "size_t": ctypes.c_size_t,
            "ptrdiff_t": ctypes.c_ssize_t,
            "int32_t": ctypes.c_int32,
            "uint32_t": ctypes.c_uint32,
            "uint64_t": ctypes.c_uint64,
            "double": ctypes.c_double,
            "float": ctypes.c_float,
        }
        structures = _library.Struct.__subclasses__()
        for structure in structures:
            body = re.search(rf"\{{([^{{}}]*)\}} {structure.__doc__};", header)
            self.assertIsNotNone(body, structure.__doc__)
            fields = []
            for line in body[1].split(";")[:-1]:
                kind, pointer, name, count = re.fullmatch(
                    r"\s*(?:const )?(\w+) (\*?)(\w+)(?:\[(\d+)\])?\s*", line
                ).groups()
                kind = ctypes.c_void_p if pointer else types[kind]
                fields.append((name, kind * int(count) if count else kind))
            self.assertEqual(structure._fields_, fields, structure.__doc__)
        self.assertEqual(len(structures), 7)
        version = re.search(r"#define PRISM_ABI_VERSION (\d+)", header)[1]
        self.assertEqual(_library.ABI_VERSION, int(version))
        for name, number in re.findall(r"PRISM_(OK|INVALID_HANDLE|BUSY|NOTHING) = (\d+)", header):
            self.assertEqual(getattr(_library, name), int(number), name)

    @unittest.skipIf(WHEEL is None, "no wheel was named")
    def test_the_wheel_lists_what_it_holds_and_is_for_this_platform(self):
        version = re.search(r'^version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]
        self.assertEqual(prism_seg.__version__, version)
        self.assertRegex(WHEEL.name, rf"^prism_seg-{re.escape(version)}-py3-none-\w+\.whl$")
        with zipfile.ZipFile(WHEEL) as wheel:
            names = wheel.namelist()
            info = f"prism_seg-{version}.dist-info"
            rows = csv.reader(io.StringIO(wheel.read(f"{info}/RECORD").decode()))
            recorded = {name: (digest, size) for name, digest, size in rows}
            self.assertEqual(sorted(recorded), sorted(names))
            for name in names:
                if name == f"{info}/RECORD":
                    continue
                data = wheel.read(name)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
                expected = (f"sha256={digest.rstrip(b'=').decode()}", str(len(data)))
                self.assertEqual(recorded[name], expected, name)
            tag = WHEEL.stem.split("-", 2)[2]
            self.assertIn(f"Tag: {tag}\n", wheel.read(f"{info}/WHEEL").decode())
            self.assertIn("numpy", wheel.read(f"{info}/METADATA").decode())
            third = wheel.read(f"{info}/licenses/THIRD-PARTY.txt").decode()
            self.assertIn("rayon", third)
        self.assertIn("prism_seg/py.typed", names)
        if "manylinux" in tag:
            # It runs where that glibc is: no symbol asks for a newer one.
            major, minor = map(int, re.search(r"manylinux_(\d+)_(\d+)_", tag).groups())
            library = pathlib.Path(prism_seg.__file__).with_name("libprism.so")
            said = subprocess.run(
                ["readelf", "--version-info", library], capture_output=True, check=True
            ).stdout.decode()
            asked = [tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", said)]
            self.assertEqual(max(asked)[:2], (major, minor))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
