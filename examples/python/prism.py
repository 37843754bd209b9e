"""prism through ctypes, with NumPy arrays: no package to install beside NumPy, only libprism itself.

    engine = Engine()
    session = Session(Model(engine, "model.safetensors"), Volume(array, affine))
    answer = session.interact(points=[[80, 80, 14]], box=[69, 68, 13, 93, 94, 16])
    answer.mask()                      # uint8 array of the volume's shape

Arrays are indexed [i, j, k] in whatever order they lie in memory; nothing is copied. The library is looked for at $PRISM_LIBRARY, then where the system looks.
"""

import ctypes
import ctypes.util
import os

import numpy as np

_lib = ctypes.CDLL(os.environ.get("PRISM_LIBRARY") or ctypes.util.find_library("prism") or "libprism.so.1")
_lib.prism_last_error.restype = _lib.prism_status_name.restype = _lib.prism_version.restype = ctypes.c_char_p
ABI_VERSION = 1
if _lib.prism_abi_version() != ABI_VERSION:
    raise ImportError(f"libprism has interface version {_lib.prism_abi_version()}, this module was written for {ABI_VERSION}")

NOTHING = 8
VOXELS, RAS, LPS = 0, 1, 2
_ELEMENTS = {np.dtype(name): n for n, name in enumerate("int8 uint8 int16 uint16 int32 uint32 int64 uint64 float32 float64".split())}
_pointer, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32


class Error(RuntimeError):
    """A call that failed."""

    def __init__(self, status):
        super().__init__(_lib.prism_last_error().decode())
        self.status = status


def _check(status):
    if status:
        raise Error(status)


class _Struct(ctypes.Structure):
    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class _Array(_Struct):
    _fields_ = [
        ("struct_size", _size), ("data", _pointer), ("element", _int), ("size", _size * 3), ("strides", ctypes.c_ssize_t * 3),
        ("affine", _pointer), ("spacing", _pointer),
    ]  # fmt: skip


class _Prompts(_Struct):
    _fields_ = [
        ("struct_size", _size), ("space", _int), ("points", _pointer), ("point_labels", _pointer), ("point_count", _size), ("bounds", _pointer),
        ("scribble", _pointer), ("scribble_labels", _pointer), ("scribble_count", _size), ("dense", _pointer), ("dense_kind", _int),
        ("dense_strides", ctypes.c_ssize_t * 3), ("lines", _pointer), ("line_count", _size), ("lasso", _pointer), ("lasso_count", _size),
        ("others", _pointer), ("others_strides", ctypes.c_ssize_t * 3),
    ]  # fmt: skip


class _Options(_Struct):
    _fields_ = [
        ("struct_size", _size), ("spacing", ctypes.c_double), ("intensity", _int), ("clip", ctypes.c_float * 2), ("mean", ctypes.c_float),
        ("sd", ctypes.c_float), ("reserved", _int), ("released", _int), ("memory", _size),
    ]  # fmt: skip


class Info(_Struct):
    """What an answer is; see prism_prediction_info."""

    _fields_ = [
        ("struct_size", _size), ("candidates", _size), ("selected", _size), ("score", ctypes.c_float), ("left_out", _size), ("thinned", _size),
        ("seconds", ctypes.c_double * 5), ("looks", _size), ("changed", _size),
    ]  # fmt: skip


class _Handle:
    """An owned handle, given back when nobody uses it any more."""

    def _open(self, function, *arguments):
        self._free = getattr(_lib, self._free_name)
        handle = _pointer()
        _check(getattr(_lib, function)(*arguments, ctypes.byref(handle)))
        self.handle = handle

    def __del__(self):
        if getattr(self, "handle", None):
            self._free(self.handle)
            self.handle = None


class Engine(_Handle):
    _free_name = "prism_engine_free"

    def __init__(self, device="cpu"):
        self._open("prism_engine_open", device.encode(), None)

    def __str__(self):
        needed = _size()
        _check(_lib.prism_engine_describe(self.handle, None, _size(0), ctypes.byref(needed)))
        text = ctypes.create_string_buffer(needed.value)
        _check(_lib.prism_engine_describe(self.handle, text, needed, None))
        return text.value.decode()


class Model(_Handle):
    _free_name = "prism_model_free"

    def __init__(self, engine, path):
        self._open("prism_model_load", engine.handle, os.fsencode(path))

    def warm_up(self):
        _check(_lib.prism_model_warm_up(self.handle))


class Volume(_Handle):
    """A scan: an array [i, j, k] with its 4x4 affine to RAS millimetres, which is read where it lies, or a file."""

    _free_name = "prism_volume_free"

    def __init__(self, source, affine=None):
        if isinstance(source, (str, os.PathLike)):
            self.shape = None
            self._open("prism_volume_read", os.fsencode(source), _int(-1))
            return
        if source.dtype not in _ELEMENTS or source.ndim != 3:
            raise TypeError(f"a {source.ndim}-dimensional array of {source.dtype}; expected 3 dimensions of {', '.join(map(str, _ELEMENTS))}")
        self.shape, self._kept = source.shape, source
        affine = None if affine is None else np.ascontiguousarray(affine, np.float64)
        array = _Array(
            data=source.ctypes.data, element=_ELEMENTS[source.dtype], size=source.shape, strides=source.strides,
            affine=None if affine is None else affine.ctypes.data,
        )  # fmt: skip
        self._open("prism_volume_wrap", ctypes.byref(array))


def _labelled(positions, labels, dtype):
    positions = np.ascontiguousarray(np.reshape(positions, (-1, 3)), dtype)
    labels = np.ones(len(positions), np.uint8) if labels is None else np.ascontiguousarray(labels, np.uint8)
    if len(labels) != len(positions):
        raise ValueError(f"{len(labels)} labels for {len(positions)} positions")
    return positions, labels


def _marked(mask):
    """A mask of any type as uint8: what is nearest to 0 or no number (NaN) is unmarked."""
    mask = np.asarray(mask)
    if mask.dtype.kind == "f":
        mask = np.rint(np.nan_to_num(mask))
    return (mask > 0).astype(np.uint8)


class Session(_Handle):
    """One object on a volume."""

    _free_name = "prism_session_free"

    def __init__(self, model, volume, released=False, modality=None):
        """`released`: the network alone, as the paper runs it, without the session's promises. `modality`: "ct", "mr" or "pet"; told by the distribution of the values if None."""
        self.volume = volume
        intensity = {None: 0, "ct": 3, "mr": 4, "pet": 5}[modality]
        self._open("prism_session_open", model.handle, volume.handle, ctypes.byref(_Options(intensity=intensity, released=int(released))))

    def interact(
        self, points=(), labels=None, box=None, scribble=(), scribble_labels=None, mask=None, logits=None, line=None, lasso=None, others=None,
        space=VOXELS,
    ):  # fmt: skip
        """One interaction; `labels` are 1 on the object and 0 off it. Returns the Prediction.

        `line` goes from border to border of the object (six coordinates), `lasso` is an outline on one slice (n, 3), `others` a mask of what the answer never enters.
        """
        points, labels = _labelled(points, labels, np.float64)
        scribble, scribble_labels = _labelled(scribble, scribble_labels, np.int32)
        prompts = _Prompts(
            space=space, points=points.ctypes.data, point_labels=labels.ctypes.data, point_count=len(points),
            scribble=scribble.ctypes.data, scribble_labels=scribble_labels.ctypes.data, scribble_count=len(scribble),
        )  # fmt: skip
        if box is not None:
            box = np.ascontiguousarray(np.reshape(box, 6), np.float64)
            prompts.bounds = box.ctypes.data
        if line is not None:
            line = np.ascontiguousarray(np.reshape(line, (-1, 6)), np.float64)
            prompts.lines, prompts.line_count = line.ctypes.data, len(line)
        if lasso is not None:
            lasso = np.ascontiguousarray(np.reshape(lasso, (-1, 3)), np.float64)
            prompts.lasso, prompts.lasso_count = lasso.ctypes.data, len(lasso)
        if others is not None:
            others = _marked(others)
            if self.volume.shape is not None and others.shape != self.volume.shape:
                raise ValueError(f"other objects of {others.shape} in a volume of {self.volume.shape}")
            prompts.others, prompts.others_strides = others.ctypes.data, others.strides
        dense = mask if mask is not None else logits
        if dense is not None:
            dense = _marked(mask) if mask is not None else np.asarray(dense, np.float32)
            if self.volume.shape is not None and dense.shape != self.volume.shape:
                raise ValueError(f"a mask of {dense.shape} for a volume of {self.volume.shape}")
            prompts.dense, prompts.dense_kind, prompts.dense_strides = dense.ctypes.data, 1 if mask is not None else 2, dense.strides
        return Prediction(self, "prism_session_interact", ctypes.byref(prompts))

    def prediction(self):
        """The answer as it stands."""
        return Prediction(self, "prism_session_get_prediction")

    def _step(self, function):
        status = function(self.handle)
        if status != NOTHING:
            _check(status)
        return status != NOTHING

    def undo(self):
        """Takes the last interaction back; False where there is none."""
        return self._step(_lib.prism_session_undo)

    def redo(self):
        """Does it again; False where there is none."""
        return self._step(_lib.prism_session_redo)


class Prediction(_Handle):
    _free_name = "prism_prediction_free"

    def __init__(self, session, function, *arguments):
        self.shape = session.volume.shape
        self._open(function, session.handle, *arguments)

    @property
    def info(self):
        info = Info()
        _check(_lib.prism_prediction_get_info(self.handle, ctypes.byref(info)))
        return info

    def scores(self):
        """What the network thinks each candidate's Dice is."""
        scores = np.empty(self.info.candidates, np.float32)
        _check(_lib.prism_prediction_get_scores(self.handle, scores.ctypes.data_as(_pointer), _size(len(scores)), None))
        return scores

    def _read(self, function, dtype):
        if self.shape is None:
            raise ValueError("the volume was read from a file, whose shape this module does not ask for: save_mask writes it")
        out = np.empty(self.shape, dtype)
        strides = (ctypes.c_ssize_t * 3)(*out.strides)
        _check(function(self.handle, _int(0), out.ctypes.data_as(_pointer), _size(out.nbytes), strides, None))
        return out

    def mask(self):
        """1 on the object, in the volume's shape."""
        return self._read(_lib.prism_prediction_get_mask, np.uint8)

    def logits(self):
        """Positive on the object, in the volume's shape."""
        return self._read(_lib.prism_prediction_get_logits, np.float32)

    def save_mask(self, path):
        _check(_lib.prism_prediction_save_mask(self.handle, os.fsencode(path)))
