"""Engines, models, volumes, sessions and predictions."""

from __future__ import annotations

import ctypes
import os
import pathlib
import threading
from typing import Any, Callable, NamedTuple, Sequence, Union

import numpy as np
from numpy.typing import NDArray

from . import _images, _library
from ._library import Handle, check, hearing, lib, opened, path_of

# What may say where something lies: a sequence or an array of numbers.
Numbers = Union[Sequence[Any], np.ndarray]
Progress = Callable[[float, str], Union[bool, None]]

_SPACES = {"index": 0, "ras": 1, "lps": 2}
_PRECISIONS = {"f32": 0, "f16": 1, "bf16": 2, "tf32": 3, "ieee": 4}
_MODALITIES = {None: 0, "ct": 3, "mr": 4, "pet": 5}
_PERCENTILES, _GIVEN = 1, 2
# Where a wheel that was built with it has the small model.
_SMALL = pathlib.Path(__file__).with_name("small.safetensors")


def _one_of(what: str, given: Any, known: dict[Any, int]) -> int:
    if given not in known:
        raise ValueError(f"{what} is {given!r}, expected one of {', '.join(map(repr, known))}")
    return known[given]


class Engine(Handle):
    """Where to compute: threads of the processor, or an NVIDIA GPU ("cuda", "cuda:N").

    An engine owns its threads; models loaded for the same engine share them. Any number of
    threads may use it at once.

    `threads`: 0 for one per processor. `precision`: "f32", "tf32" (GPUs), "ieee" (float32
    without tensor cores), "f16" (GPUs) or "bf16" (GPUs, and processors with AVX512-BF16).
    `memory`: bytes that the library may use in this process.
    """

    _kind = "engine"

    def __init__(
        self, device: str = "cpu", *, threads: int = 0, precision: str = "f32", memory: int = 0
    ) -> None:
        options = _library.EngineOptions(
            threads=threads, precision=_one_of("precision", precision, _PRECISIONS), memory=memory
        )
        handle = opened(lib.prism_engine_open, device.encode(), ctypes.byref(options))
        self._own(handle)

    def __str__(self) -> str:
        needed = ctypes.c_size_t()
        check(lib.prism_engine_describe(self.handle, None, 0, ctypes.byref(needed)))
        text = ctypes.create_string_buffer(needed.value)
        check(lib.prism_engine_describe(self.handle, text, needed, None))
        return text.value.decode()

    def __repr__(self) -> str:
        return f"<prism_seg.Engine: {self}>" if self._finalizer.alive else "<prism_seg.Engine>"


class ModelFacts(NamedTuple):
    """Properties of a model."""

    patch_edge: int
    """Voxels along each side of the cube that it looks at."""
    spacing: float
    """Their spacing in mm, unless the model fits the cube to a box."""
    candidates: int
    """Candidate masks of an interaction."""
    parameters: int
    """Number of weights."""


class Model(Handle):
    """A network, loaded for an engine (or for a new engine on the named device).

    Any number of sessions and threads may use it at once. The file is read again when needed:
    leave it in place.
    """

    _kind = "model"

    def __init__(self, path: str | os.PathLike[str], engine: Engine | str = "cpu") -> None:
        engine = Engine(engine) if isinstance(engine, str) else engine
        self.engine = engine
        self._own(opened(lib.prism_model_load, engine.handle, path_of(path)))

    @classmethod
    def small(cls, engine: Engine | str = "cpu") -> Model:
        """The small model that comes with prism, if this wheel was built with it."""
        if not _SMALL.exists():
            raise FileNotFoundError(
                f"{_SMALL} does not exist: this package was built without the small model "
                "(use scripts/wheel --with-model); Model(PATH) loads any model file"
            )
        return cls(_SMALL, engine)

    @property
    def facts(self) -> ModelFacts:
        """Properties of the model."""
        info = _library.ModelInfo()
        check(lib.prism_model_get_info(self.handle, ctypes.byref(info)))
        return ModelFacts(info.patch_edge, info.spacing, info.candidates, info.parameters)

    def warm_up(self) -> None:
        """Does one-time work in advance, so that the first user does not wait for it."""
        check(lib.prism_model_warm_up(self.handle))


_shared_lock = threading.Lock()
_shared: Model | None = None


def _shared_model() -> Model:
    """The small model of all sessions that were given none."""
    global _shared
    with _shared_lock:
        if _shared is None or not _shared._finalizer.alive:
            _shared = Model.small()
        return _shared


class Volume(Handle):
    """A scan: a NumPy array with its spacing or affine, a nibabel or SimpleITK image, or a file.

    A session creates a Volume from its image; create one yourself to share it between sessions of
    different models. Any number of sessions and threads may use it at once.

    An array is not copied: leave it unchanged as long as the volume or a session uses it, or pass
    a copy. (A SimpleITK image may be changed: SimpleITK then copies it.)

    `spacing`: distances between voxels along the array's axes in mm. `affine`: the 4x4 matrix
    that maps an index (i, j, k, 1) to millimetres in RAS. Without either, 1 mm.
    """

    _kind = "volume"

    def __init__(
        self, image: Any, *, spacing: Numbers | None = None, affine: Numbers | None = None
    ) -> None:
        self._source = source = _images.Source(image, spacing, affine)
        with hearing() as notes:
            if source.voxels is None:
                self._own(opened(lib.prism_volume_read, path_of(image), -1))
            else:
                voxels = source.voxels
                place = None if source.affine is None else np.ascontiguousarray(source.affine)
                array = _library.Array(
                    data=voxels.ctypes.data,
                    element=_images.ELEMENTS[voxels.dtype],
                    size=voxels.shape,
                    strides=voxels.strides,
                    affine=None if place is None else place.ctypes.data,
                    spacing=None if source.spacing is None else source.spacing.ctypes.data,
                )
                # The image is kept too: what SimpleITK hands out is a view of it.
                handle = opened(lib.prism_volume_wrap, ctypes.byref(array))
                self._own(handle, voxels, source.image)
        self.notes: tuple[str, ...] = tuple(notes)
        info = _library.VolumeInfo()
        check(lib.prism_volume_get_info(self.handle, ctypes.byref(info)))
        self._size: tuple[int, ...] = tuple(info.size)
        self.spacing: tuple[float, ...] = tuple(info.spacing)
        """Distances between voxels along i, j and k in mm."""
        self.affine: NDArray[np.float64] = np.array(info.affine[:]).reshape(4, 4)
        """The matrix that maps (i, j, k, 1) to millimetres in RAS."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its masks: the image's, as an array."""
        return self._size[::-1] if self._source.reversed else self._size

    def _empty(self, dtype: Any) -> np.ndarray:
        """An array [i, j, k] that lies in memory as the image does."""
        if self._source.voxels is None:
            return np.empty(self._size, dtype, order="F")
        return np.empty_like(self._source.voxels, dtype, subok=False)


class _Watch:
    """What is called as work proceeds, and what it raised."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.raised: BaseException | None = None
        self.callback = _library.ProgressCallback(self.step)

    def step(self, _user: Any, done: float, stage: bytes) -> int:
        try:
            assert self.progress is not None
            return int(self.progress(done, stage.decode("utf-8", "replace")) is not False)
        except BaseException as error:
            self.raised = error
            return 0


class Session(Handle):
    """One object on a scan: its prompts, its mask and its history.

        with prism_seg.Session(image, model) as session:
            session.box((69, 68, 13), (93, 94, 16))
            session.point((80, 80, 14))
            mask = session.mask

    `image` is a NumPy array with `spacing` or `affine` (see `Volume`), a nibabel or SimpleITK
    image, a file name, or a Volume. `model` is a Model or a file name; without it, the small model
    that comes with the package is used, shared by all such sessions.

    Positions are indices of the image in its own order: [i, j, k] of an array or a nibabel image,
    (x, y, z) of a SimpleITK image, as in GetPixel. If `space` is "ras" or "lps" they are
    millimetres. Masks are arrays in the order of the image's arrays: [z, y, x] for SimpleITK, as
    in GetArrayFromImage.

    Each interaction adds its prompts to the earlier ones and returns a prediction. Every click and
    stroke holds until it is undone or contradicted.

    Use a session from one thread at a time: a second one gets a PrismError named PRISM_BUSY.
    `cancel` may be called from any thread. Different sessions run in parallel; calls release the
    GIL.

    `modality`: "ct", "mr" or "pet"; None guesses it from the distribution of the values.
    `intensities`: "percentiles", or (low, high, mean, sd) to clip and normalise by. `resolution`:
    spacing in mm at which the model looks, 0 for its own choice. `released`: the network alone, as
    in the paper, without the session's guarantees. `memory`, `undo_steps`, `undo_bytes`: limits,
    0 for the defaults.
    """

    _kind = "session"

    def __init__(
        self,
        image: Any,
        model: Model | str | os.PathLike[str] | None = None,
        *,
        spacing: Numbers | None = None,
        affine: Numbers | None = None,
        modality: str | None = None,
        intensities: str | Sequence[float] | None = None,
        resolution: float = 0.0,
        released: bool = False,
        memory: int = 0,
        undo_steps: int = 0,
        undo_bytes: int = 0,
    ) -> None:
        if model is None:
            model = _shared_model()
        elif not isinstance(model, Model):
            model = Model(model)
        if not isinstance(image, Volume):
            image = Volume(image, spacing=spacing, affine=affine)
        elif spacing is not None or affine is not None:
            raise ValueError("spacing and affine are for arrays: a Volume has its own")
        self.model: Model = model
        self.volume: Volume = image
        options = _library.SessionOptions(
            spacing=resolution,
            intensity=_one_of("modality", modality, _MODALITIES),
            released=int(released),
            memory=memory,
            undo_steps=undo_steps,
            undo_bytes=undo_bytes,
        )
        if intensities is not None:
            if modality is not None:
                raise ValueError("modality and intensities were both given: expected one of them")
            if isinstance(intensities, str):
                options.intensity = _one_of(
                    "intensities", intensities, {"percentiles": _PERCENTILES}
                )
            else:
                low, high, mean, sd = intensities
                options.intensity = _GIVEN
                options.clip[:] = low, high
                options.mean, options.sd = mean, sd
        with hearing() as notes:
            handle = opened(
                lib.prism_session_open, model.handle, image.handle, ctypes.byref(options)
            )
        self._begin(handle, [*image.notes, *notes])

    def _begin(self, handle: ctypes.c_void_p, notes: list[str]) -> None:
        self._watch = watch = _Watch()
        source = self.volume._source
        # The voxels must stay until the session was given back, whatever became of the volume.
        self._own(handle, source.voxels, source.image, watch.callback)
        self._notes = notes

    def another(self) -> Session:
        """A session for another object on the same scan, which shares the encoded patches."""
        made = Session.__new__(Session)
        made.model, made.volume = self.model, self.volume
        made._begin(opened(lib.prism_session_fork, self.handle), list(self.volume.notes))
        # The library hands the callback of this session on.
        made.on_progress(None)
        return made

    # What a user says.

    def point(self, at: Numbers, positive: bool = True, *, space: str = "index") -> Prediction:
        """A click on the object, or off it."""
        return self.interact(points=[at], labels=[positive], space=space)

    def box(self, start: Numbers, stop: Numbers, *, space: str = "index") -> Prediction:
        """A box around the object, from voxel `start` to `stop` (exclusive), as in array slices.

        In mm, two opposite corners; the box has the voxels whose centres lie within.
        """
        return self.interact(box=[start, stop], space=space)

    def scribble(self, voxels: Any, positive: bool = True) -> Prediction:
        """A stroke on the object, or off it: indices of voxels (n, 3), or a mask of the image."""
        return self.interact(scribble=voxels, scribble_labels=positive)

    def lasso(self, corners: Numbers, *, space: str = "index") -> Prediction:
        """An outline (n, 3) around the object on one slice of any axis; it need not be closed."""
        return self.interact(lasso=corners, space=space)

    def line(self, start: Numbers, end: Numbers, *, space: str = "index") -> Prediction:
        """A line from border to border of the object, as in RECIST."""
        return self.interact(lines=[[*start, *end]], space=space)

    def start_from(self, mask: Any) -> Prediction:
        """A mask that is the result until a prompt disagrees.

        An array in the order of `mask`, or an image with the same geometry.
        """
        return self.interact(mask=mask)

    def interact(
        self,
        *,
        points: Any = None,
        labels: Any = True,
        box: Any = None,
        lines: Any = None,
        lasso: Any = None,
        scribble: Any = None,
        scribble_labels: Any = True,
        mask: Any = None,
        logits: Any = None,
        others: Any = None,
        space: str = "index",
    ) -> Prediction:
        """One interaction with any of these:

        - `points` (n, 3), with `labels`: true on the object, false off it; one for all or for each
        - `box`: two corners, as for the method `box`
        - `lines` (n, 6) and `lasso` (n, 3)
        - `scribble` with `scribble_labels`: voxels, or a mask
        - `mask` or `logits` (finite): to start from instead of the last prediction
        - `others`: a mask of other objects, which the result never enters, now and later
        - `space`: "index", "ras" or "lps", for points, box, lines and lasso
        """
        given, _kept = self._prompts(
            points=points,
            labels=labels,
            box=box,
            lines=lines,
            lasso=lasso,
            scribble=scribble,
            scribble_labels=scribble_labels,
            mask=mask,
            logits=logits,
            others=others,
            space=space,
        )
        with hearing() as notes:
            handle = self._watched(
                lambda: opened(lib.prism_session_interact, self.handle, ctypes.byref(given))
            )
        self._notes.extend(notes)
        return Prediction(handle, self.volume, tuple(notes))

    def prepare(self, **prompts: Any) -> None:
        """Encodes the patch for these prompts before the first click.

        Takes the arguments of `interact`. It adds no prompts.
        """
        given, _kept = self._prompts(**prompts)
        with hearing() as notes:
            self._watched(
                lambda: check(lib.prism_session_encode(self.handle, ctypes.byref(given)))
            )
        self._notes.extend(notes)

    def _watched(self, work: Callable[[], Any]) -> Any:
        """Runs a call that reports its progress; what the progress raised is raised by it."""
        try:
            return work()
        except _library.PrismError as error:
            raised, self._watch.raised = self._watch.raised, None
            if raised is not None and error.name == "PRISM_CANCELLED":
                raise raised from None
            raise

    def _prompts(
        self,
        points: Any = None,
        labels: Any = True,
        box: Any = None,
        scribble: Any = None,
        scribble_labels: Any = True,
        lines: Any = None,
        lasso: Any = None,
        mask: Any = None,
        logits: Any = None,
        others: Any = None,
        space: str = "index",
    ) -> tuple[_library.Prompts, list[np.ndarray]]:
        """The library's structure, and the arrays that it points into."""
        prompts = _library.Prompts(space=_one_of("space", space, _SPACES))
        kept: list[np.ndarray] = []

        def held(array: np.ndarray) -> int:
            kept.append(array)
            return int(array.ctypes.data)

        def marks(given: Any, what: str) -> np.ndarray:
            volume = self.volume
            return volume._source.marks(given, volume._size, volume.affine, what)

        if points is not None:
            places = _rows(points, 3, "points")
            prompts.points, prompts.point_count = held(places), len(places)
            prompts.point_labels = held(_labels(labels, len(places), "labels"))
        if box is not None:
            corners = np.ascontiguousarray(box, np.float64).reshape(-1)
            if len(corners) != 6:
                raise ValueError(f"a box of {len(corners)} numbers: expected two corners of three")
            prompts.bounds = held(corners)
        if scribble is not None:
            voxels = _scribbled(scribble, marks)
            prompts.scribble, prompts.scribble_count = held(voxels), len(voxels)
            said = _labels(scribble_labels, len(voxels), "scribble_labels")
            prompts.scribble_labels = held(said)
        if lines is not None:
            drawn = _rows(lines, 6, "lines")
            prompts.lines, prompts.line_count = held(drawn), len(drawn)
        if lasso is not None:
            outline = _rows(lasso, 3, "lasso")
            prompts.lasso, prompts.lasso_count = held(outline), len(outline)
        if mask is not None and logits is not None:
            raise ValueError("mask and logits were both given: expected one of them")
        if mask is not None or logits is not None:
            if mask is not None:
                dense, kind = _images.marked(marks(mask, "a mask")), 1
            else:
                dense = _images.strided(marks(logits, "logits").astype(np.float32))
                kind = 2
            prompts.dense, prompts.dense_kind = held(dense), kind
            prompts.dense_strides = dense.strides
        if others is not None:
            taken = _images.marked(marks(others, "a mask of other objects"))
            prompts.others, prompts.others_strides = held(taken), taken.strides
        return prompts, kept

    # The answer, and its history.

    @property
    def prediction(self) -> Prediction | None:
        """The current prediction, also after undo and redo; None without one."""
        try:
            handle = opened(lib.prism_session_get_prediction, self.handle)
        except _library.PrismError as error:
            if error.status == _library.NOTHING:
                return None
            raise
        return Prediction(handle, self.volume, ())

    @property
    def mask(self) -> NDArray[np.uint8]:
        """The mask: uint8, 1 on the object, in the order of the image's arrays.

        A new array each time; all 0 without a prediction.
        """
        prediction = self.prediction
        if prediction is None:
            nothing = self.volume._empty(np.uint8)
            nothing.fill(0)
            return self.volume._source.array(nothing)
        return prediction.mask

    def to_image(self) -> Any:
        """The mask as an image of the same type and geometry as the session's image."""
        return _image_of(self.mask, self.volume)

    @property
    def score(self) -> float | None:
        """Expected Dice, 0 to 1; None if the model does not estimate it."""
        prediction = self.prediction
        return None if prediction is None else prediction.score

    @property
    def notes(self) -> tuple[str, ...]:
        """All messages about the scan and the interactions, in order."""
        return tuple(self._notes)

    def _step(self, function: Callable[..., int]) -> bool:
        status = function(self.handle)
        if status != _library.NOTHING:
            check(status)
        return status != _library.NOTHING

    def undo(self) -> bool:
        """Undoes the last interaction; False if there is none."""
        return self._step(lib.prism_session_undo)

    def redo(self) -> bool:
        """Redoes an interaction; False if none was undone."""
        return self._step(lib.prism_session_redo)

    def reset(self) -> None:
        """Removes prompts, predictions and history. The scan stays encoded."""
        check(lib.prism_session_reset(self.handle))

    @property
    def depth(self) -> tuple[int, int]:
        """Number of interactions that can be undone and redone."""
        undo, redo = ctypes.c_size_t(), ctypes.c_size_t()
        check(lib.prism_session_get_depth(self.handle, ctypes.byref(undo), ctypes.byref(redo)))
        return undo.value, redo.value

    def on_progress(self, progress: Progress | None) -> None:
        """Calls `progress(share, stage)` as later calls proceed; returning False cancels the call.

        An exception that it raises is raised by the call, which leaves the session unchanged.
        """
        watch = self._watch
        callback = _library.ProgressCallback() if progress is None else watch.callback
        check(lib.prism_session_set_progress(self.handle, callback, None))
        watch.progress = progress

    def cancel(self) -> None:
        """Cancels the call that is running on another thread with PRISM_CANCELLED."""
        check(lib.prism_session_cancel(self.handle))


class Prediction(Handle):
    """A result. It does not change; any number of threads may read it at once."""

    _kind = "prediction"

    def __init__(self, handle: ctypes.c_void_p, volume: Volume, notes: tuple[str, ...]) -> None:
        self._own(handle)
        self._volume = volume
        self.notes: tuple[str, ...] = notes
        """Messages about the interaction; empty if it was fetched again."""
        info = _library.PredictionInfo()
        check(lib.prism_prediction_get_info(handle, ctypes.byref(info)))
        self.score: float | None = None if np.isnan(info.score) else float(info.score)
        """Expected Dice, 0 to 1; None if the model does not estimate it or was not run."""
        self.looks: int = info.looks
        """How often the network was run: 0 if the mask already agreed."""
        self.changed: int = info.changed
        """Voxels that changed between object and background."""
        stages = ("patch", "encode", "prompts", "decode", "refine")
        self.seconds: dict[str, float] = dict(zip(stages, info.seconds))
        """Seconds per stage."""
        self._candidates: int = info.candidates

    @property
    def scores(self) -> NDArray[np.float32]:
        """The network's estimate of each candidate's Dice, not calibrated."""
        scores = np.empty(self._candidates, np.float32)
        count = len(scores)
        check(lib.prism_prediction_get_scores(self.handle, scores.ctypes.data, count, None))
        return scores

    def _read(self, function: Callable[..., int], dtype: Any) -> np.ndarray:
        out = self._volume._empty(dtype)
        strides = (ctypes.c_ssize_t * 3)(*out.strides)
        check(function(self.handle, 0, out.ctypes.data, out.nbytes, strides, None))
        return self._volume._source.array(out)

    @property
    def mask(self) -> NDArray[np.uint8]:
        """uint8, 1 on the object, in the order of the image's arrays; a new array each time."""
        return self._read(lib.prism_prediction_get_mask, np.uint8)

    @property
    def logits(self) -> NDArray[np.float32]:
        """float32, positive on the object; -100 where nothing was predicted."""
        return self._read(lib.prism_prediction_get_logits, np.float32)

    def to_image(self) -> Any:
        """The mask as an image of the same type and geometry as the session's image."""
        return _image_of(self.mask, self._volume)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask as .nii.gz, .nii, .nrrd, .seg.nrrd, .mha or .mhd.

        The file appears complete or not at all, and never replaces a file of the scan."""
        check(lib.prism_prediction_save_mask(self.handle, path_of(path)))


def _image_of(mask: np.ndarray, volume: Volume) -> Any:
    return volume._source.same_kind(volume._source.array(mask))


def _rows(given: Any, width: int, what: str) -> np.ndarray:
    """Rows of so many numbers; one row may stand by itself."""
    rows = np.ascontiguousarray(given, np.float64)
    if rows.size == 0:
        return np.empty((0, width))
    rows = rows.reshape(1, -1) if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{what} of shape {rows.shape}: expected (n, {width})")
    return rows


def _labels(given: Any, count: int, what: str) -> np.ndarray:
    labels = np.asarray(given)
    if labels.ndim > 1 or (labels.ndim == 1 and len(labels) != count):
        raise ValueError(
            f"{what} of shape {labels.shape}: expected a single one, or {count}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{what} are {given}: expected true (on the object) or false (off it)")
    return np.ascontiguousarray(np.broadcast_to(labels, count), np.uint8)


def _scribbled(given: Any, marks: Callable[[Any, str], np.ndarray]) -> np.ndarray:
    """The voxels of a stroke, (n, 3)."""
    is_mask = not isinstance(given, (list, tuple)) and getattr(given, "ndim", 3) > 2
    if is_mask:
        voxels = np.argwhere(_images.marked(marks(given, "a scribble")))
    else:
        voxels = _rows(given, 3, "a scribble")
    with np.errstate(invalid="ignore"):
        whole = voxels.astype(np.int32)
    if not np.array_equal(whole, voxels):
        raise ValueError("a scribble has positions that are not voxels: expected whole numbers")
    return np.ascontiguousarray(whole)
