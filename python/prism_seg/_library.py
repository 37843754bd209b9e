"""libprism through ctypes: its functions and structures, errors, messages and handles.

The structures are those of include/prism.h, field by field; tests/python holds them against it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ctypes.util
import logging
import os
import pathlib
import sys
import threading
import weakref
from typing import Any, Callable, Iterator, TypeVar

ABI_VERSION = 1
FILES = {"win32": "prism.dll", "darwin": "libprism.dylib"}
FILE = FILES.get(sys.platform, "libprism.so")
OK, INVALID_HANDLE, BUSY, NOTHING = 0, 2, 6, 8

logger = logging.getLogger("prism_seg")

_pointer, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
_stride = ctypes.c_ssize_t
_out = ctypes.POINTER(ctypes.c_void_p)
_sizes = ctypes.POINTER(ctypes.c_size_t)
LogCallback = ctypes.CFUNCTYPE(None, _pointer, ctypes.c_char_p)
ProgressCallback = ctypes.CFUNCTYPE(_int, _pointer, ctypes.c_double, ctypes.c_char_p)


class Struct(ctypes.Structure):
    """A structure that begins with its own size; all but that is 0 where nothing is given."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class EngineOptions(Struct):
    """prism_engine_options"""

    _fields_ = [
        ("struct_size", _size),
        ("threads", ctypes.c_uint32),
        ("precision", _int),
        ("memory", _size),
    ]


class ModelInfo(Struct):
    """prism_model_info"""

    _fields_ = [
        ("struct_size", _size),
        ("patch_edge", _size),
        ("spacing", ctypes.c_double),
        ("candidates", _size),
        ("parameters", ctypes.c_uint64),
    ]


class PredictionInfo(Struct):
    """prism_prediction_info"""

    _fields_ = [
        ("struct_size", _size),
        ("candidates", _size),
        ("selected", _size),
        ("score", ctypes.c_float),
        ("left_out", _size),
        ("thinned", _size),
        ("seconds", ctypes.c_double * 5),
        ("looks", _size),
        ("changed", _size),
    ]


class SessionOptions(Struct):
    """prism_session_options"""

    _fields_ = [
        ("struct_size", _size),
        ("spacing", ctypes.c_double),
        ("intensity", _int),
        ("clip", ctypes.c_float * 2),
        ("mean", ctypes.c_float),
        ("sd", ctypes.c_float),
        ("reserved", _int),
        ("released", _int),
        ("memory", _size),
        ("undo_steps", _size),
        ("undo_bytes", _size),
    ]


class Prompts(Struct):
    """prism_prompts"""

    _fields_ = [
        ("struct_size", _size),
        ("space", _int),
        ("points", _pointer),
        ("point_labels", _pointer),
        ("point_count", _size),
        ("bounds", _pointer),
        ("scribble", _pointer),
        ("scribble_labels", _pointer),
        ("scribble_count", _size),
        ("dense", _pointer),
        ("dense_kind", _int),
        ("dense_strides", _stride * 3),
        ("lines", _pointer),
        ("line_count", _size),
        ("lasso", _pointer),
        ("lasso_count", _size),
        ("others", _pointer),
        ("others_strides", _stride * 3),
    ]


class Array(Struct):
    """prism_array"""

    _fields_ = [
        ("struct_size", _size),
        ("data", _pointer),
        ("element", _int),
        ("size", _size * 3),
        ("strides", _stride * 3),
        ("affine", _pointer),
        ("spacing", _pointer),
    ]


class VolumeInfo(Struct):
    """prism_volume_info"""

    _fields_ = [
        ("struct_size", _size),
        ("size", _size * 3),
        ("spacing", ctypes.c_double * 3),
        ("affine", ctypes.c_double * 16),
        ("range", ctypes.c_float * 2),
    ]


def _found() -> str:
    """Where the library is: $PRISM_LIBRARY, beside this file, or where the system looks."""
    named = os.environ.get("PRISM_LIBRARY")
    if named:
        return named
    shipped = pathlib.Path(__file__).with_name(FILE)
    if shipped.exists():
        return str(shipped)
    installed = ctypes.util.find_library("prism")
    if installed:
        return installed
    raise ImportError(
        f"{FILE} was found neither beside {__file__}, as in a wheel, nor by the system: "
        "set PRISM_LIBRARY to its path"
    )


def _loaded() -> ctypes.CDLL:
    library = ctypes.CDLL(_found())
    library.prism_abi_version.restype = ctypes.c_uint32
    found = library.prism_abi_version()
    if found != ABI_VERSION:
        raise ImportError(
            f"{_found()} has interface version {found}, this package needs {ABI_VERSION}"
        )
    text = ctypes.c_char_p
    functions: dict[str, tuple[Any, list[Any]]] = {
        "prism_version": (text, []),
        "prism_last_error": (text, []),
        "prism_status_name": (text, [_int]),
        "prism_set_log": (_int, [LogCallback, _pointer]),
        "prism_engine_open": (_int, [text, _pointer, _out]),
        "prism_engine_describe": (_int, [_pointer, _pointer, _size, _sizes]),
        "prism_model_load": (_int, [_pointer, text, _out]),
        "prism_model_get_info": (_int, [_pointer, _pointer]),
        "prism_model_warm_up": (_int, [_pointer]),
        "prism_volume_read": (_int, [text, _int, _out]),
        "prism_volume_wrap": (_int, [_pointer, _out]),
        "prism_volume_get_info": (_int, [_pointer, _pointer]),
        "prism_session_open": (_int, [_pointer, _pointer, _pointer, _out]),
        "prism_session_fork": (_int, [_pointer, _out]),
        "prism_session_set_progress": (_int, [_pointer, ProgressCallback, _pointer]),
        "prism_session_cancel": (_int, [_pointer]),
        "prism_session_encode": (_int, [_pointer, _pointer]),
        "prism_session_interact": (_int, [_pointer, _pointer, _out]),
        "prism_session_undo": (_int, [_pointer]),
        "prism_session_redo": (_int, [_pointer]),
        "prism_session_reset": (_int, [_pointer]),
        "prism_session_get_depth": (_int, [_pointer, _sizes, _sizes]),
        "prism_session_get_prediction": (_int, [_pointer, _out]),
        "prism_prediction_get_info": (_int, [_pointer, _pointer]),
        "prism_prediction_get_scores": (_int, [_pointer, _pointer, _size, _sizes]),
        "prism_prediction_get_mask": (_int, [_pointer, _int, _pointer, _size, _pointer, _sizes]),
        "prism_prediction_get_logits": (_int, [_pointer, _int, _pointer, _size, _pointer, _sizes]),
        "prism_prediction_save_mask": (_int, [_pointer, text]),
    }
    for kind in ("engine", "model", "volume", "session", "prediction"):
        functions[f"prism_{kind}_free"] = (_int, [_pointer])
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


lib = _loaded()
VERSION: str = lib.prism_version().decode()


class PrismError(RuntimeError):
    """A call that failed, with the library's message.

    `status` is the number of the prism_status, `name` its name ("PRISM_PROMPT",
    "PRISM_BUSY", "PRISM_CANCELLED", "PRISM_FILE", ...).
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.name: str = lib.prism_status_name(status).decode()

    def __reduce__(self) -> tuple[Any, ...]:
        return PrismError, (str(self), self.status)


def check(status: int) -> None:
    """Raises what the last call of this thread came to, unless it is PRISM_OK."""
    if status != OK:
        raise PrismError(lib.prism_last_error().decode("utf-8", "replace"), status)


_heard = threading.local()


def _tell(_user: Any, message: bytes) -> None:
    # It runs on the thread whose call has the message, within that call.
    text = message.decode("utf-8", "replace")
    notes = getattr(_heard, "notes", None)
    if notes is not None:
        notes.append(text)
    logger.info("%s", text)


# Named here so that it stays.
_log = LogCallback(_tell)
check(lib.prism_set_log(_log, None))
# Threads that go on while Python ends must not call it any more.
atexit.register(lib.prism_set_log, LogCallback(), None)


@contextlib.contextmanager
def hearing() -> Iterator[list[str]]:
    """Collects what the library says within calls of this thread."""
    before = getattr(_heard, "notes", None)
    notes: list[str] = []
    _heard.notes = notes
    try:
        yield notes
    finally:
        _heard.notes = before


# What handles need that could not be given back: a callback that cannot wait was at work.
_kept_for_good: list[Any] = []


def _give_back(free: Callable[[Any], int], handle: Any, kept: Any) -> None:
    if free(handle) == BUSY:
        _kept_for_good.append(kept)


Own = TypeVar("Own", bound="Handle")


class Handle:
    """What the library owns: given back at the end of `with`, by `close`, or without references."""

    _kind: str
    handle: ctypes.c_void_p

    def _own(self, handle: ctypes.c_void_p, *kept: Any) -> None:
        """Takes a handle. What `kept` holds is let go only after the handle was given back."""
        self.handle = handle
        free = getattr(lib, f"prism_{self._kind}_free")
        self._finalizer = weakref.finalize(self, _give_back, free, handle, kept)

    def close(self) -> None:
        """Gives it back now, once a call that is under way on it has ended.

        What was made of it goes on; it itself is refused from then on.
        """
        if not self._finalizer.alive:
            return
        status = getattr(lib, f"prism_{self._kind}_free")(self.handle)
        if status == BUSY:
            check(status)
        # Where another thread was faster it is no handle any more, which is as well.
        self._finalizer.detach()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(function: Callable[..., int], *arguments: Any) -> ctypes.c_void_p:
    """The handle that a function stores behind its other arguments."""
    handle = ctypes.c_void_p()
    check(function(*arguments, ctypes.byref(handle)))
    return handle


def path_of(path: str | os.PathLike[str]) -> bytes:
    """A path as the library takes it, in UTF-8 on all systems."""
    text = os.fspath(path)
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
