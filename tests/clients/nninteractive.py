"""Works with a server as 3D Slicer's and napari's extensions do: by nnInteractive's own client.

python3 nninteractive.py URL LASTING, with nninteractive-client 2.6.0 to be imported. The server at
URL lets a lease go after 6 seconds without work, and has room for two; that at LASTING gives time
for everything else. Says "all is well" at its end.
"""

import subprocess
import sys
import threading
import time

import httpx
import numpy as np
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Session
from nnInteractive.inference.remote.remote_session import ServerAtCapacityError, SessionExpiredError

URL, LASTING = sys.argv[1:3]


def ball(dtype=np.int16, size=(24, 40, 44), spacing=None):
    """An image [1, k, j, i] with a bright ball, and the ball."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"))
    centre = np.array([n // 2 for n in size]).reshape(3, 1, 1, 1)
    inside = ((grid - centre) ** 2).sum(0) <= 8 ** 2
    noise = np.random.default_rng(5).normal(0, 8, size)
    values = np.where(inside, 60, 10) + noise
    if np.dtype(dtype).kind == "u":
        values = values.clip(0)
    if np.dtype(dtype).kind == "b":
        values = inside
    return values.astype(dtype)[None], inside


def opened(image, buffer=np.uint8, spacing=(2.0, 1.0, 1.0), url=LASTING):
    session = Session(url)
    session.set_image(image, {"spacing": np.array(spacing)})
    assert session.original_image_shape == image.shape
    session.set_target_buffer(np.zeros(image.shape[1:], buffer))
    return session


def expect(error, call):
    try:
        call()
    except error as e:
        return e
    raise AssertionError(f"no {error.__name__}")


def status(call):
    return expect(httpx.HTTPStatusError, call).response.status_code


def every_type():
    """Arrays of every type are read: by zstd, with and without shuffle, stored, of zeros."""
    for dtype in (np.int16, np.uint8, np.uint16, np.int32, np.float32, np.float64, np.float16, bool, ">i2"):
        image, inside = ball(dtype)
        with opened(image) as session:
            box = session.add_bbox_interaction([[4, 20], [12, 28], [14, 30]], True)
            assert box is not None and session._last_paste_bbox == box, dtype
            mask = session.target_buffer.astype(bool)
            assert mask.any() and session.target_buffer.max() == 1, dtype
            if dtype is np.int16:
                expected = session.target_buffer.copy()
        # Of several channels the first is seen.
        if dtype is np.int16:
            two = np.concatenate([image, 0 * image])
            with opened(two) as session:
                session.add_bbox_interaction([[4, 20], [12, 28], [14, 30]], True)
                assert (session.target_buffer == expected).all()
    # Distances have a sign where napari shows an axis the other way round; none is another
    # distance.
    image, _ = ball()
    for spacing, same in (((-2.0, -1.0, -1.0), True), (None, False)):
        with opened(image, spacing=spacing) as session:
            session.add_bbox_interaction([[4, 20], [12, 28], [14, 30]], True)
            assert (session.target_buffer == expected).all() == same, spacing
    noise = np.random.default_rng(2).integers(0, 256, (1, 30, 60, 60)).astype(np.uint8)
    with opened(noise) as session:
        session.add_point_interaction([15, 30, 30], True)


def every_method():
    image, inside = ball()
    session = opened(image)
    assert session.ping() and session.supports_undo and session.lease_status()["remaining_seconds"] > 0
    assert len(session.preferred_scribble_thickness) == 3
    assert all(session.supported_interactions.values())
    session.set_do_autozoom(False)
    states = [session.target_buffer.copy()]

    def step(box):
        """An interaction: what changed lies in the box that was returned."""
        changed = np.argwhere(session.target_buffer != states[-1])
        if box is None:
            assert len(changed) == 0
        else:
            low, high = np.array(box).T
            assert (changed.min(0) == low).all() and (changed.max(0) == high - 1).all()
        states.append(session.target_buffer.copy())

    # Floats, as napari sends them; a click holds.
    step(session.add_point_interaction((12.0, 20.4, 22.0), True))
    assert session.target_buffer[12, 20, 22] == 1
    step(session.add_point_interaction(np.array([3, 3, 3]), False))
    assert session.target_buffer[3, 3, 3] == 0
    # Beyond the image nothing is said, and nothing is wrong.
    for place in ((-50, 3, 3), (12, 20, 500), (24.4, 20, 22)):
        step(session.add_point_interaction(place, True))
    # One slice thick, in three planes, and over the faces.
    for box in ([[12, 13], [11, 29], [13, 31]], [[4.0, 20.0], [20, 21], [13, 31]], [[4, 20], [11, 29], [22, 23]]):
        step(session.add_bbox_interaction(box, True))
    step(session.add_bbox_interaction([[-5, 90], [11, 29], [13, 31]], True))
    assert status(lambda: session.add_bbox_interaction([[3, 3], [1, 2], [1, 2]], True)) == 400
    step(session.add_bbox_interaction([[0, 1], [0, 5], [0, 5]], False))
    # Painted: all of the image, a crop of it.
    stroke = np.zeros(image.shape[1:], np.uint8)
    stroke[12, 20, 18:27] = 1
    step(session.add_scribble_interaction(stroke, True))
    assert session.target_buffer[stroke > 0].all()
    crop = np.ones((1, 3, 4), np.uint8)
    step(session.add_scribble_interaction(crop, False, interaction_bbox=[[1, 2], [30, 33], [2, 6]]))
    assert not session.target_buffer[1, 30:33, 2:6].any()
    area = np.zeros(image.shape[1:], bool)
    area[12, 14:27, 15:30] = True
    step(session.add_lasso_interaction(area, True))
    step(session.add_lasso_interaction(area[12:13, 14:27, 15:30], True, interaction_bbox=[[12, 13], [14, 27], [15, 30]]))
    assert status(lambda: session.add_lasso_interaction(crop, True, interaction_bbox=[[0, 2], [0, 3], [0, 4]])) == 400
    # Said, and predicted later.
    assert session.add_point_interaction([12, 20, 22], True, run_prediction=False) is None
    assert session.add_point_interaction([23, 39, 43], False, run_prediction=False) is None
    step(session._predict())
    assert session._predict(force_full_refine=True) is None
    # An initial mask is the object, in the type of the buffer.
    session.add_initial_seg_interaction(inside.astype(np.uint8))
    states.append(session.target_buffer.copy())
    assert (session.target_buffer == inside).all()
    step(session.add_point_interaction([12, 20, 22], True))
    assert (session.target_buffer == inside).all()
    # One that is to be predicted from is as good an answer: it stays as it is, and nothing more
    # comes of it.
    smaller = inside & (np.arange(inside.shape[2]) < 24)
    assert session.add_initial_seg_interaction(smaller.astype(np.uint8), run_prediction=True) is None
    states.append(session.target_buffer.copy())
    assert (session.target_buffer == smaller).all()
    step(session.add_point_interaction([12, 20, 30], False))
    assert (session.target_buffer == smaller).all()
    # Back, one by one, to the beginning. What was beyond the image was no step.
    states = [s for n, s in enumerate(states) if n == 0 or n not in (3, 4)]
    while len(states) > 1:
        states.pop()
        assert session.undo(), len(states)
        assert (session.target_buffer == states[-1]).all(), len(states)
    assert not session.undo()
    # An empty mask forgets, and is undone; another image begins anew.
    session.add_point_interaction([12, 20, 22], True)
    before = session.target_buffer.copy()
    session.add_initial_seg_interaction(np.zeros(image.shape[1:], np.uint8))
    assert not session.target_buffer.any()
    assert session.undo() and (session.target_buffer == before).all()
    session.reset_interactions()
    assert not session.target_buffer.any() and not session.undo()
    other, _ = ball(size=(20, 30, 33))
    session.set_image(other, {})
    for dtype in (bool, np.int32, np.uint16):
        session.set_target_buffer(np.zeros(other.shape[1:], dtype))
        session.reset_interactions()
        session.add_point_interaction([10, 15, 16], True)
        assert session.target_buffer.dtype == dtype and session.target_buffer[10, 15, 16] == 1
    assert status(lambda: session.set_target_buffer(np.zeros(other.shape[1:], np.float32))) == 400
    assert status(lambda: session.set_target_buffer(np.zeros((2, 2, 2), np.uint8))) == 400
    # Nothing is to be seen in zeros: told when a click points at them.
    session.set_image(np.zeros((1, 8, 8, 8), np.float32), {"spacing": [1, 1, 1]})
    session.set_target_buffer(np.zeros((8, 8, 8), np.uint8))
    failed = expect(httpx.HTTPStatusError, lambda: session.add_point_interaction([4, 4, 4], True))
    assert "entirely zero" in failed.response.json()["detail"]
    session.close()
    session.close()


def leases():
    """There is room for two; a lease ends without work, whatever signs of life come."""
    first, second = Session(URL), Session(URL)
    expect(ServerAtCapacityError, lambda: Session(URL))
    second.close()
    end = time.time() + 30
    while True:
        try:
            assert first.heartbeat() <= 6
            time.sleep(0.5)
        except SessionExpiredError:
            break
        assert time.time() < end
    image, _ = ball()
    expect(SessionExpiredError, lambda: first.set_image(image, {}))
    # A client that is killed leaves its place when its time is over.
    stays = [sys.executable, __file__, URL, LASTING, "stay"]
    killed = subprocess.Popen(stays, stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "there\n"
    killed.kill()
    killed.wait()
    # The other place is kept by work meanwhile, so that the one that comes free is the killed
    # client's.
    one = opened(image, url=URL)
    end = time.time() + 30
    while True:
        one.reset_interactions()
        try:
            two = Session(URL)
            break
        except ServerAtCapacityError:
            assert time.time() < end
            time.sleep(0.5)
    one.reset_interactions()
    one.close()
    two.close()


def initial():
    """A mask that was to be predicted from comes back whole from the server where its buffer is a
    new one."""
    image, inside = ball()
    with opened(image) as session:
        session.add_initial_seg_interaction(inside.astype(np.uint8), run_prediction=True)
        session.set_target_buffer(np.zeros(inside.shape, np.uint8))
        assert session.add_point_interaction([12, 20, 22], True) is not None
        assert (session.target_buffer == inside).all()


def large():
    """Scans of 512 x 512 x 300 voxels, one at a time: zeros with a bright ball."""
    size, centre, radius = (300, 512, 512), (140, 200, 330), 20
    box = tuple(slice(c - radius, c + radius + 1) for c in centre)
    distance = np.stack(np.meshgrid(*3 * [np.arange(-radius, radius + 1)], indexing="ij"))
    inside = (distance**2).sum(0) <= radius**2
    for dtype in (np.float32, np.int16):
        image = np.zeros((1, *size), dtype)
        image[0][box][inside] = 100
        with opened(image, spacing=(1.0, 0.8, 0.8)) as session:
            del image
            low, high = np.array(session.add_point_interaction(centre, True)).T
            mask = session.target_buffer
            assert mask.shape == size and mask.dtype == np.uint8 and mask.max() == 1, dtype
            assert mask[centre] == 1, dtype
            # All that was found lies where the client was told to look.
            count = np.count_nonzero(mask)
            assert 0 < count == np.count_nonzero(mask[tuple(map(slice, low, high))]), dtype
            del mask


def together():
    """Two clients who predict at once have each the object that it has alone."""
    image, _ = ball()
    # The same scan, and another way round: the ball lies elsewhere.
    scans = [(image, (12, 20, 22)), (np.roll(image, (5, -6, 7), (1, 2, 3)), (17, 14, 29))]

    def works(scan, click, ready=None):
        masks = []
        with opened(scan) as session:
            if ready:
                ready.wait()
            session.add_point_interaction(click, True)
            masks.append(session.target_buffer.copy())
            assert masks[0][click] == 1
            session.add_point_interaction((3, 3, 3), False)
            session.add_bbox_interaction([[n - 8, n + 9] for n in click], True)
            masks.append(session.target_buffer.copy())
        return masks

    alone = [works(*scan) for scan in scans]
    assert (alone[0][0] != alone[1][0]).any()
    ready, found = threading.Barrier(2, timeout=600), {}

    def keep(n):
        found[n] = works(*scans[n], ready)

    threads = [threading.Thread(target=keep, args=[n]) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        # Without it that client failed, and has said why.
        assert n in found, n
        for mask, expected in zip(found[n], alone[n]):
            assert (mask == expected).all(), n


def patiently(work, tries=5):
    """Does it again if it fails, when all leases are over: a process may have been paused for longer
    than one lasts."""
    for left in reversed(range(tries)):
        try:
            return work()
        except (AssertionError, SessionExpiredError, ServerAtCapacityError):
            if not left:
                raise
            time.sleep(15)


def stay():
    """A client in the middle of its work."""
    session = opened(ball()[0], url=URL)
    session.add_point_interaction([12, 20, 22], True)
    print("there", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    if sys.argv[3:] == ["stay"]:
        stay()
    every_type()
    every_method()
    initial()
    patiently(leases)
    together()
    large()
    print("all is well")
