"""Works with a server as 3D Slicer's extension of MONAI Label does: by MONAI Label's own Python
client.

python3 monai.py URL TOKEN IMAGE I,J,K SERIES, with monailabel 0.8.5 to be imported; IMAGE is a
packed NIfTI file, the voxel lies on what is to be found, and SERIES is the same scan in the
server's folder, or nothing. Says "all is well" at its end.
"""

import gzip
import os
import sys
import tempfile
import urllib.request

import numpy as np
from monailabel.client.client import MONAILabelClient, MONAILabelClientException

URL, TOKEN, IMAGE = sys.argv[1:4]
CLICK = [int(n) for n in sys.argv[4].split(",")]
SERIES = sys.argv[5]


def nifti(path):
    """A volume [i, j, k], and its axes and place."""
    with gzip.open(path) as file:
        data = file.read()
    size = np.frombuffer(data, "<i2", 3, 42)
    kind = {2: "u1", 4: "<i2", 16: "<f4"}[int(np.frombuffer(data, "<i2", 1, 70)[0])]
    start = int(np.frombuffer(data, "<f4", 1, 108)[0])
    values = np.frombuffer(data, kind, int(np.prod(size.astype(int))), start)
    return values.reshape(size, order="F"), np.frombuffer(data, "<f4", 12, 280).reshape(3, 4)


def nrrd(path):
    """A mask [i, j, k], and its axes and place in the same words."""
    with open(path, "rb") as file:
        head, data = file.read().split(b"\n\n", 1)
    fields = dict(line.split(": ", 1) for line in head.decode().split("\n")[1:] if ": " in line)
    assert fields["type"] == "unsigned char" and fields["space"] == "left-posterior-superior"
    if fields["encoding"] == "gzip":
        data = gzip.decompress(data)
    size = [int(n) for n in fields["sizes"].split()]
    vectors = [*fields["space directions"].split(), fields["space origin"]]
    axes = np.array([[float(n) for n in vector.strip("()").split(",")] for vector in vectors]).T
    axes[:2] *= -1
    return np.frombuffer(data, np.uint8).reshape(size, order="F"), axes


def refused(call, *words):
    try:
        call()
    except MONAILabelClientException as e:
        assert all(word in e.msg for word in words), e.msg
        return
    raise AssertionError("was not refused")


def by_series(client, model, folder, scan, axes, expected):
    """What 3D Slicer's extension does with a sample of the data store."""
    objects = client.datastore()["objects"]
    info = client.info()
    assert info["datastore"]["total"] == len(objects) and info["labels"] == ["tumour"]
    (strategy,) = info["strategies"]
    sample = client.next_sample(strategy, {})
    assert sample["id"] in objects and SERIES in objects
    # Slicer fetches it by itself, and calls it so.
    path = os.path.join(folder, objects[SERIES]["image"]["info"]["name"])
    headers = {"Authorization": f"Bearer {TOKEN}"}
    asked = urllib.request.Request(f"{URL}/datastore/image?image={SERIES}", headers=headers)
    with urllib.request.urlopen(asked) as reply, open(path, "wb") as file:
        file.write(reply.read())
    given, place = nifti(path)
    assert (given == scan).all() and np.abs(place - axes).max() < 1e-3
    params = {"label": "tumour", "foreground": [CLICK], "background": [], "result_extension": ".nrrd"}
    path, told = client.infer(model, SERIES, params)
    mask, place = nrrd(path)
    assert (mask == expected).all() and np.abs(place - axes).max() < 1e-3
    assert told["label_names"] == {"tumour": 1} and told["voxels"] == mask.sum()
    refused(lambda: client.infer(model, f"../{SERIES}", params), "404")
    refused(lambda: client.next_sample("other", {}), "404")


def main(folder):
    stranger = MONAILabelClient(URL, folder)
    refused(stranger.info, "401")
    assert not stranger.auth_enabled()
    client = MONAILabelClient(URL, folder, client_id="visitor")
    client.update_auth({"token_type": "Bearer", "access_token": TOKEN})
    info = client.info()
    assert {"name", "description", "version", "labels", "models", "trainers", "strategies", "scoring",
            "train_stats", "datastore"} <= set(info)
    (model, about), = info["models"].items()
    assert (about["type"], about["dimension"], about["labels"]) == ("deepgrow", 3, {"tumour": 1})

    created = client.create_session(IMAGE)
    name = created["session_id"]
    assert client.get_session(name).keys() == created["session_info"].keys()
    scan, axes = nifti(IMAGE)

    def infer(on, off=(), read=nrrd, **more):
        params = {"label": "tumour", "foreground": on, "background": list(off), "result_extension": ".nrrd",
                  "result_dtype": "uint8", **more}
        path, told = client.infer(model, "lung", params, session_id=name)
        assert os.path.dirname(path) == folder
        mask, place = read(path)
        assert mask.shape == scan.shape and np.abs(place - axes).max() < 1e-3
        assert told["label_names"] == {"tumour": 1} and told["voxels"] == mask.sum()
        return mask

    i, j, k = CLICK
    away = [i - 8, j - 9, k]
    one = infer([CLICK])
    assert one[i, j, k] == 1 and one.max() == 1
    two = infer([CLICK], [away])
    assert two[i, j, k] == 1 and two[tuple(away)] == 0
    # The same again, in other files; then without the last click, which brings back the answer
    # before.
    assert (infer([CLICK], [away], result_compress=True) == two).all()
    assert (infer([CLICK], [away], result_compress=False) == two).all()
    assert (infer([CLICK], [away], nifti, result_extension=".nii.gz") == two).all()
    assert (infer([CLICK]) == one).all()
    assert (infer([CLICK], reset_state=True) == one).all()
    box = [i - 11, i + 12, j - 12, j + 13, k - 1, k + 1]
    assert infer([CLICK], roi=box)[i, j, k] == 1
    assert not infer([]).any()
    if SERIES:
        by_series(client, model, folder, scan, axes, one)

    refused(lambda: client.infer("other", "lung", {}, session_id=name), "404")
    refused(lambda: client.infer(model, "lung", {}), "404", "session")
    refused(lambda: client.infer(model, "lung", {}, label_in=IMAGE, session_id=name), "422", "label")
    refused(lambda: client.infer(model, "lung", {"foreground": [[1, 2]]}, session_id=name), "422")
    assert client.remove_session(name)["name"] == name
    refused(lambda: client.get_session(name), "404")
    refused(lambda: client.remove_session(name), "404")
    refused(lambda: client.infer(model, "lung", {}, session_id=name), "404")
    print("all is well")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
