"""Sends ITK-SNAP's requests to its own server and to another, and compares what comes back.

python3 dls.py URL, with itksnap-dls 0.1.6 and what it needs to be imported but for torch, of which
its mock models want no more than a word. Says "all is well" at its end.
"""

import base64
import gzip
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import requests

URL = sys.argv[1]
SIZE = (40, 36, 20)  # x, y, z


def volume(array):
    """A volume [z, y, x] as ITK-SNAP sends it."""
    metadata = {
        "dimensions": list(SIZE),
        "spacing": [1.0, 1.0, 2.0],
        "origin": [5.0, -3.0, 7.5],
        "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        "components_per_pixel": 1,
        "component_type": "float",
    }
    packed = gzip.compress(np.ascontiguousarray(array, np.float32).tobytes())
    return {
        "files": {"file": ("image.gz", packed, "application/octet-stream")},
        "data": {"metadata": json.dumps(metadata)},
    }


def shape(value):
    """What of an answer both servers have in common: keys, types and sizes."""
    if isinstance(value, dict):
        return {key: mask_size(v) if key == "result" else shape(v) for key, v in sorted(value.items())}
    if isinstance(value, list):
        return [shape(v) for v in value]
    return type(value).__name__


def mask(value):
    flat = np.frombuffer(gzip.decompress(base64.b64decode(value, validate=True)), np.int8)
    assert set(np.unique(flat)) <= {0, 1}
    return flat.reshape(SIZE[::-1])


def mask_size(value):
    return mask(value).shape


def answers(url):
    """The answers to a session's requests, by both generations of paths."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE[::-1]), indexing="ij"))
    inside = ((grid - np.array([10, 18, 20]).reshape(3, 1, 1, 1)) ** 2).sum(0) <= 7**2
    image = np.where(inside, 60, 10) + np.random.default_rng(3).normal(0, 5, inside.shape)
    stroke = np.zeros(SIZE[::-1])
    stroke[10, 18, 16:25] = 1
    area = np.zeros(SIZE[::-1])
    area[10, 12:24, 14:26] = 1

    def get(path):
        answer = requests.get(f"{url}/{path}", timeout=600)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def post(path, array):
        answer = requests.post(f"{url}/{path}", **volume(array), timeout=600)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    yield "status", get("status")
    models = get("v2/models")
    # Of several models the one that both have.
    models["models"] = [m for m in models["models"] if m["id"] == "nnInteractive"]
    yield "models", models
    for start, upload, point, at, reset, end in [
        (
            "v2/start_session/nnInteractive",
            "upload_raw/{}?filename=upload.nii.gz",
            "v2/process_point_interaction/{}",
            "point=20&point=18&point=10",
            "v2/reset_interactions/{}",
            "v2/end_session/{}",
        ),
        (
            "start_session",
            "upload_raw/{}?filename=upload.nii.gz",
            "process_point_interaction/{}",
            "x=20&y=18&z=10",
            "reset_interactions/{}",
            "end_session/{}",
        ),
    ]:
        started = get(start)
        yield start, started
        name = started["session_id"]
        yield upload, post(upload.format(name), image)
        answer = get(point.format(name) + f"?{at}&foreground=true")
        assert mask(answer["result"])[10, 18, 20] == 1
        yield point, answer
        answer = post(f"process_scribble_interaction/{name}?foreground=true", stroke)
        assert mask(answer["result"])[stroke > 0].all()
        yield "scribble", answer
        yield "lasso", post(f"process_lasso_interaction/{name}?foreground=false", area)
        yield reset, get(reset.format(name))
        answer = get(point.format(name) + f"?{at}&foreground=false")
        assert mask(answer["result"])[10, 18, 20] == 0
        yield "off", answer
        yield end, get(end.format(name))


def oracle(folder):
    """ITK-SNAP's own server, with models that compute nothing."""
    torch = pathlib.Path(folder, "torch")
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "cuda.py").write_text("is_available = lambda: False\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    log = open(os.path.join(folder, "log"), "wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "itksnap_dls", "--mock-models", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    end = time.time() + 600
    while True:
        try:
            requests.get(f"{url}/status", timeout=60)
            return process, url
        except requests.RequestException:
            if process.poll() is not None or time.time() > end:
                sys.exit(pathlib.Path(folder, "log").read_text())
            time.sleep(0.2)


def main():
    with tempfile.TemporaryDirectory() as folder:
        process, url = oracle(folder)
        try:
            expected = list(answers(url))
        finally:
            process.kill()
            process.wait()
    got = list(answers(URL))
    assert [name for name, _ in got] == [name for name, _ in expected]
    for (name, theirs), (_, ours) in zip(expected, got):
        if name == "models":
            # Only what there is a path for.
            kinds = [answer["models"][0].pop("interactions") for answer in (theirs, ours)]
            assert set(kinds[1]) <= set(kinds[0]) and kinds[1], kinds
            assert theirs == ours, (theirs, ours)
        assert shape(theirs) == shape(ours), (name, shape(theirs), shape(ours))
    version = tuple(int(part) for part in got[0][1]["version"].split("."))
    assert (0, 1, 2) <= version
    # Of a session that is not there ITK-SNAP tells its user where the status says so.
    lost = requests.get(f"{URL}/v2/process_point_interaction/lost?point=1&point=2&point=3", timeout=600)
    assert lost.status_code == 404 and "no such session" in lost.json()["detail"]
    print("all is well")


if __name__ == "__main__":
    main()
