"""prism: interactive segmentation of tumours in 3D scans.

    import prism_seg

    with prism_seg.Session(image, "small.safetensors") as session:
        session.box((69, 68, 13), (93, 94, 16))
        session.point((80, 80, 14))
        mask = session.mask

`image` is a NumPy array with `spacing` or `affine`, a nibabel or SimpleITK image, or a file
name. See `Session` for the order of indices. Messages also go to the logger "prism_seg".

It is research software, not a medical device.
"""

from ._library import VERSION as __version__
from ._library import PrismError
from ._session import Engine, Model, ModelFacts, Prediction, Session, Volume

__all__ = [
    "Engine",
    "Model",
    "ModelFacts",
    "Prediction",
    "PrismError",
    "Session",
    "Volume",
    "__version__",
]
