"""What a session is opened on: NumPy arrays, and images of nibabel and SimpleITK, told by what they
can do. Neither package is imported here.

Whatever it was, the library sees an array of voxels [i, j, k] and the matrix that takes
(i, j, k, 1) to millimetres in RAS (x to the right, y to the front, z to the head).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

# The prism_element of each type.
ELEMENTS = {
    np.dtype(name): number
    for number, name in enumerate(
        "int8 uint8 int16 uint16 int32 uint32 int64 uint64 float32 float64".split()
    )
}
# From LPS, in which SimpleITK has its positions, to RAS.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def _is_simpleitk(image: Any) -> bool:
    return type(image).__module__.split(".")[0] == "SimpleITK" and hasattr(image, "GetDirection")


def _is_nibabel(image: Any) -> bool:
    return hasattr(image, "dataobj") and hasattr(image, "affine") and hasattr(image, "header")


def is_path(image: Any) -> bool:
    """Whether an image is given as the name of its file."""
    return isinstance(image, (str, os.PathLike))


def _three(array: np.ndarray, what: str) -> np.ndarray:
    """An array without the axes of one voxel that may follow its third."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise ValueError(f"{what} of shape {array.shape}: expected three dimensions, one channel")
    return array


def strided(array: np.ndarray) -> np.ndarray:
    """An array whose strides the library can take: all 0 would mean "one behind the other"."""
    return array if any(array.strides) else array.copy()


def readable(array: np.ndarray) -> np.ndarray:
    """An array of a type that the library reads: the same one wherever it is that already."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype not in ELEMENTS:
        known = ", ".join(map(str, ELEMENTS))
        raise TypeError(f"an image of {array.dtype}: expected {known}, bool or float16")
    return strided(array)


def _simpleitk_affine(image: Any) -> np.ndarray:
    affine = np.eye(4)
    direction = np.array(image.GetDirection(), float).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing(), float)
    affine[:3, 3] = image.GetOrigin()
    return _LPS_TO_RAS @ affine


def _nibabel_affine(image: Any) -> np.ndarray:
    if image.affine is None:
        raise ValueError("the nibabel image has no affine: expected one")
    affine = np.array(image.affine, float)
    units = getattr(image.header, "get_xyzt_units", None)
    if units is not None:
        affine[:3] *= {"meter": 1e3, "micron": 1e-3}.get(units()[0], 1.0)
    return affine


class Source:
    """An image: its voxels as the library takes them, and the way back to its own kind."""

    def __init__(self, image: Any, spacing: Any = None, affine: Any = None) -> None:
        self.image: Any = image
        self.voxels: np.ndarray | None = None
        self.affine: np.ndarray | None = None
        self.spacing: np.ndarray | None = None
        # Whether arrays of its kind are indexed [k, j, i].
        self.reversed = False
        knows_its_place = is_path(image) or _is_simpleitk(image) or _is_nibabel(image)
        if knows_its_place and (spacing is not None or affine is not None):
            raise ValueError(
                "spacing and affine are for arrays: files and images have their own geometry"
            )
        if spacing is not None and affine is not None:
            raise ValueError("spacing and affine were both given: expected one of them")
        if is_path(image):
            return
        if _is_simpleitk(image):
            if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
                raise ValueError(
                    f"a SimpleITK image of {image.GetDimension()} dimensions and "
                    f"{image.GetNumberOfComponentsPerPixel()} components: expected 3 and 1"
                )
            # A copy of our own shares the voxels until either is written to: what is written
            # to the caller's image afterwards is not seen here.
            self.image = type(image)(image)
            view = sys.modules["SimpleITK"].GetArrayViewFromImage(self.image)
            self.voxels, self.reversed = readable(view).T, True
            self.affine = _simpleitk_affine(image)
        elif _is_nibabel(image):
            voxels = np.asanyarray(image.dataobj)
            if isinstance(voxels, np.memmap):
                # A mapped file that is cut short would end the process.
                voxels = np.array(voxels)
            self.voxels = readable(_three(voxels, "a nibabel image"))
            self.affine = _nibabel_affine(image)
        elif hasattr(image, "__array__"):
            self.voxels = readable(_three(np.asarray(image), "an array"))
            if affine is not None:
                self.affine = np.ascontiguousarray(affine, np.float64)
                if self.affine.shape != (4, 4):
                    raise ValueError(f"an affine of shape {self.affine.shape}: expected (4, 4)")
            if spacing is not None:
                self.spacing = np.ascontiguousarray(spacing, np.float64)
                if self.spacing.shape != (3,):
                    raise ValueError(f"spacing is {spacing}: expected three numbers")
        else:
            raise TypeError(
                f"{type(image).__name__}: expected a NumPy array, a nibabel or SimpleITK image, or "
                "a file name"
            )

    def array(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels [i, j, k] as an array in the order of the image's kind."""
        return voxels.T if self.reversed else voxels

    def marks(self, mask: Any, shape: tuple[int, ...], affine: np.ndarray, what: str) -> np.ndarray:
        """Voxels [i, j, k] of a mask or of logits that a caller gave.

        An array is taken in the order of this image's arrays, an image by its own geometry, which
        must be this one's.
        """
        if _is_simpleitk(mask) or _is_nibabel(mask):
            given = Source(mask)
            assert given.voxels is not None and given.affine is not None
            # A view of a SimpleITK image lives no longer than the image.
            voxels = given.voxels.copy()
            if voxels.shape == shape:
                _expect_same_place(given.affine, affine, shape, what)
        else:
            voxels = _three(np.asarray(mask), what)
            voxels = voxels.T if self.reversed else voxels
        if voxels.shape != shape:
            expected = shape[::-1] if self.reversed else shape
            found = voxels.shape[::-1] if self.reversed else voxels.shape
            raise ValueError(f"{what} of shape {found}: expected the image's, {expected}")
        return voxels

    def same_kind(self, voxels: np.ndarray) -> Any:
        """A mask [i, j, k] as an image of this one's kind, at this one's place."""
        if is_path(self.image):
            raise TypeError("the image is a file, not an object: use `save` to write the mask")
        if self.reversed:
            package = sys.modules["SimpleITK"]
            made = package.GetImageFromArray(np.ascontiguousarray(voxels.T))
            made.CopyInformation(self.image)
            return made
        if not _is_nibabel(self.image):
            return voxels
        header = self.image.header.copy()
        header.set_data_dtype(np.uint8)
        for name in ("cal_min", "cal_max"):
            # The window of the scan is none for a mask.
            if name in getattr(header, "keys", list)():
                header[name] = 0
        return type(self.image)(voxels, self.image.affine, header)


def _expect_same_place(
    given: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], what: str
) -> None:
    """Refuses an image whose corners lie a tenth of a voxel or more from where they should."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float).T
    corners[:3] *= np.array(shape, float).reshape(3, 1) - 1
    apart = np.abs((given - affine) @ corners).max()
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0)).min()
    if not apart < 0.1 * spacing:
        raise ValueError(
            f"{what} is {apart:.3g} mm away from the image: resample it to the image"
        )


def marked(mask: np.ndarray) -> np.ndarray:
    """A mask of any type as uint8: what is nearest to 0 or no number (NaN) is unmarked."""
    if mask.dtype.kind == "f":
        mask = np.rint(np.nan_to_num(mask))
    return strided((mask > 0).astype(np.uint8))
