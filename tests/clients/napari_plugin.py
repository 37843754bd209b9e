"""Works with a server as a user does who has napari's nnInteractive plugin, unchanged: opens a
scan, connects, draws with the mouse on the window, and compares the layer with what the server's
own interface answers to the same.

python3 napari_plugin.py URL TOKEN SCAN LABEL FOLDER, in a display, with napari-nninteractive 2.5.4
to be imported; SCAN and LABEL are NIfTI files, and FOLDER takes pictures of the window.
scripts/napari-test has all of that. Not called napari.py, which would be the package that it
imports. Says "all is well" at its end.
"""

import itertools
import json
import re
import sys
import time
from pathlib import Path

import httpx
import napari
import nibabel
import numpy as np
from qtpy.QtCore import QPoint, Qt, QTimer
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

URL, TOKEN, SCAN, LABEL = sys.argv[1:5]
PICTURES = Path(sys.argv[5])
# Seconds that anything is waited for.
PATIENCE = 120


class Reference:
    """An object of the server's own interface, of the scan as the plugin sends it: an array, and
    distances."""

    def __init__(self, array, spacing, path):
        # The protocol tells no directions. The server takes voxels to run to the left, the back and
        # the head.
        dk, dj, di = np.abs(spacing)
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-di, -dj, dk, 1])), path)
        self.http = httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE)
        told = self.call("POST", "/v1/scans?name=scan.nii", content=path.read_bytes()).json()
        self.path, self.scan, self.size = path, told["scan"], array.shape
        self.begin()

    def call(self, method, path, **more):
        response = self.http.request(method, path, **more)
        assert response.is_success, f"{method} {path}: {response.status_code} {response.text}"
        return response

    def begin(self):
        """Another object."""
        self.object = self.call("POST", f"/v1/scans/{self.scan}/objects", json={}).json()["object"]

    def say(self, **prompts):
        self.call("POST", f"/v1/objects/{self.object}/prompts", content=json.dumps(prompts))

    def undo(self):
        self.call("POST", f"/v1/objects/{self.object}/undo")

    def give(self, mask):
        """A mask, as the file that the scan is."""
        of = nibabel.load(self.path)
        path = self.path.with_name("given.nii")
        nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8).transpose(2, 1, 0), of.affine), path)
        self.call("PUT", f"/v1/objects/{self.object}/mask?name=given.nii", content=path.read_bytes())

    def mask(self):
        file = self.call("GET", f"/v1/objects/{self.object}/mask?format=nii").content
        return np.asarray(nibabel.Nifti1Image.from_bytes(file).dataobj).transpose(2, 1, 0)


class Person:
    """A user at the window."""

    def __init__(self):
        self.viewer = napari.Viewer(show=True)
        self.viewer.window.resize(1500, 1000)
        [self.image] = self.viewer.open(SCAN, plugin="napari-nifti")
        _, self.panel = self.viewer.window.add_plugin_dock_widget("napari-nninteractive", "nnInteractive")
        self.warnings = []
        napari.utils.notifications.notification_manager.notification_ready.connect(
            lambda notification: self.warnings.append(notification.message)
        )

    def wait(self, until=lambda: True, seconds=0.0):
        """Lets the window work until something is so, and for some time at least."""
        start = time.time()
        while time.time() - start < seconds or not until():
            assert time.time() - start < PATIENCE, f"waited in vain; the window said {self.warnings}"
            QApplication.processEvents()
            time.sleep(0.01)

    def warned(self, words):
        """Something was said in the window's corner, which is forgotten."""
        self.wait(lambda: any(words in warning for warning in self.warnings))
        self.warnings.clear()

    def press(self, button):
        assert button.isEnabled(), button.text()
        QTest.mouseClick(button, Qt.LeftButton)
        self.wait(seconds=0.05)

    def begin(self):
        """Connects, and sends the scan."""
        self.press(self.panel.init_button)
        self.wait(lambda: self.panel._session_locked and self.panel._upload_dialog is None)

    def see(self, axis, slice):
        """Turns to a slice of one of the array's axes."""
        dims = self.viewer.dims
        dims.order = (axis, *(other for other in range(3) if other != axis))
        place = [slice if a == axis else n // 2 for a, n in enumerate(self.image.data.shape)]
        dims.set_point(range(3), self.image.data_to_world(place))
        self.viewer.reset_view()
        self.wait(seconds=0.3)
        assert self.image.world_to_data(dims.point)[axis].round() == slice

    def pixel(self, voxel):
        """Where a voxel is seen in the canvas."""
        view = self.viewer.window._qt_viewer.canvas.view
        world = self.image.data_to_world(voxel)
        shown = [world[axis] for axis in self.viewer.dims.displayed]
        x, y = (view.transform * view.scene.transform).map([shown[1], shown[0]])[:2]
        return QPoint(round(x), round(y))

    def drag(self, *voxels):
        """Presses the mouse on a voxel, moves it over others, and lets it go on the last one."""
        canvas = self.viewer.window._qt_viewer.canvas.native
        pixels = [self.pixel(voxel) for voxel in voxels]
        assert all(canvas.rect().contains(pixel) for pixel in pixels), "the window does not show all of it"
        QTest.mouseMove(canvas, pixels[0])
        self.wait(seconds=0.05)
        QTest.mousePress(canvas, Qt.LeftButton, pos=pixels[0])
        for pixel in pixels[1:]:
            self.wait(seconds=0.03)
            QTest.mouseMove(canvas, pixel)
        self.wait(seconds=0.05)
        QTest.mouseRelease(canvas, Qt.LeftButton, pos=pixels[-1])
        self.wait(seconds=0.05)

    def tool(self, index, on=True):
        """Chooses a tool (point, box, scribble, lasso), on the object or off it. What it draws on
        is returned."""
        self.press(self.panel.prompt_button.buttons[0 if on else 1])
        self.press(self.panel.interaction_button.buttons[index])
        return self.viewer.layers[self.panel.layer_dict[index]]

    def mask(self):
        """The object at work, as the window has it."""
        return np.asarray(self.viewer.layers[self.panel.label_layer_name].data)

    def picture(self, name):
        self.wait(seconds=0.3)
        self.viewer.window.screenshot(str(PICTURES / f"{name}.png"), canvas_only=False, flash=False)


class Both:
    """The same said in the window and to the reference, after which both have the same mask."""

    def __init__(self, person, reference):
        self.person, self.reference = person, reference

    def same(self, name):
        mask, expected = self.person.mask(), self.reference.mask()
        differ = int((mask != expected).sum())
        print(f"{name}: {int(mask.sum())} voxels, {differ} differ", flush=True)
        assert differ == 0, f"after {name} {differ} voxels differ of {int(expected.sum())}"
        return mask.copy()

    def box(self, one, other, name="a box"):
        layer = self.person.tool(1)
        self.person.drag(one, other)
        corners = np.round(layer.data[-1]).astype(int)
        low, high = corners.min(0), corners.max(0)
        # Of the corners that the plugin sends the higher ones lie behind the box, but on the slice
        # that is seen.
        high = np.where(low == high, high, high - 1)
        near = [np.abs(low - np.minimum(one, other)).max(), np.abs(high + 1 - np.maximum(one, other)).max()]
        assert max(near) <= 1, f"drawn from {one} to {other}, and the plugin has {corners.tolist()}"
        self.reference.say(box={"from": low[::-1].tolist(), "to": high[::-1].tolist()})
        return self.same(name)

    def point(self, voxel, on=True, name="a point"):
        layer = self.person.tool(0, on)
        self.person.drag(voxel)
        at = np.round(layer.data[-1]).astype(int)
        assert np.abs(at - voxel).max() == 0, f"clicked at {voxel}, and the plugin has {layer.data[-1]}"
        self.reference.say(points=[{"at": at[::-1].tolist(), "on": on}])
        mask = self.same(name)
        assert mask[tuple(voxel)] == on, f"the click at {voxel} does not hold"
        return mask

    def scribble(self, *voxels, on=True, name="a scribble"):
        layer = self.person.tool(2, on)
        before = np.asarray(layer.data).copy()
        self.person.drag(*voxels)
        painted = np.argwhere(np.asarray(layer.data) != before)
        assert len(painted) >= len(voxels) and (painted == voxels[0]).all(1).any()
        self.reference.say(scribbles=[{"on": on, "voxels": painted[:, ::-1].tolist()}])
        mask = self.same(name)
        assert (mask[tuple(painted.T)] == on).all(), "what was painted does not hold"
        return mask

    def lasso(self, slice, centre, radius, on=True, name="a lasso"):
        """A circle on a slice of the first axis."""
        angles = np.linspace(0, 2 * np.pi, 25)
        layer = self.person.tool(3, on)
        self.person.drag(*((slice, centre[0] + radius * np.sin(a), centre[1] + radius * np.cos(a)) for a in angles))
        outline = layer.data[-1][:, ::-1]
        assert (outline[:, 2].round() == slice).all()
        lasso = {"on": on, "axis": 2, "slice": slice, "outline": outline[:, :2].tolist()}
        self.reference.say(lassos=[lasso])
        # The plugin sends the voxels within, not the outline: of those right at it both may make
        # something else.
        mask, expected = self.person.mask().copy(), self.reference.mask()
        agreed = dice(mask, expected)
        print(f"{name}: {int(mask.sum())} voxels, a Dice coefficient of {agreed:.3f}", flush=True)
        assert agreed > 0.9, f"after {name} a Dice coefficient of {agreed:.3f}"
        places = np.stack(np.meshgrid(*map(np.arange, mask.shape[1:]), indexing="ij"), -1)
        within = np.linalg.norm(places - centre, axis=-1) < radius / 2
        assert (mask[slice][within] == on).all(), "what was outlined does not hold"
        return mask


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())


def rows(mask):
    """The first and the last row in which a mask is."""
    return mask.any(1).nonzero()[0][[0, -1]]


def main():
    person = Person()
    panel, image = person.panel, person.image
    array = np.asarray(image.data)
    # The expert's outline, in the order of the window's array: from toe to head, back to front,
    # left to right.
    [label] = person.viewer.open(LABEL, plugin="napari-nifti", layer_type="labels")
    truth = np.asarray(label.data) > 0
    person.viewer.layers.remove(label)
    where = np.argwhere(truth)
    low, high = where.min(0), where.max(0) + 1
    middle = np.argsort(np.abs(where - where.mean(0)).sum(1))[0]
    k, j, i = (int(n) for n in where[middle])

    # Without the token the plugin says why it is not let in; with it, it is.
    panel.server_url_edit.setText(URL)
    panel.api_key_edit.setText("another")
    person.press(panel.init_button)
    person.warned("Invalid API key")
    panel.api_key_edit.setText(TOKEN)
    person.begin()
    assert all(button.isEnabled() for button in panel.interaction_button.buttons)
    assert panel.session.supports_undo
    reference = Reference(array, panel.session_cfg["spacing"], PICTURES / "scan.nii")
    both = Both(person, reference)

    # Every tool, on the slice through the object's middle.
    person.see(0, k)
    states = [person.mask().copy()]
    states.append(both.box((k, low[1] - 3, low[2] - 3), (k, high[1] + 3, high[2] + 3)))
    agreed = dice(states[-1], truth)
    # 0.82 with the small model; 0.21 where the distances of voxels are lost.
    print(f"the box alone: a Dice coefficient of {agreed:.3f} with the expert's outline", flush=True)
    assert agreed > 0.6, "axes or distances are not what they are"
    person.picture("box")
    # What is said on and off the object disagrees with the answer, which gives way each time.
    mask = states[-1]
    top, bottom = ([n, *sorted(mask[k, n].nonzero()[0])] for n in rows(mask[k]))
    states.append(both.point((k, top[0] - 2, top[1])))
    states.append(both.point((k, bottom[0], bottom[1]), on=False, name="a point off the object"))
    states.append(both.scribble(*((k, top[0] - 4, i + n) for n in range(-3, 4))))
    off = ((k, j + n, i) for n in range(-3, 4))
    states.append(both.scribble(*off, on=False, name="a scribble off the object"))
    person.picture("scribble")
    # Planes along the body's axis.
    person.see(1, j)
    box = (low[0] - 1, j, low[2] - 3), (high[0] + 1, j, high[2] + 3)
    states.append(both.box(*box, name="a coronal box"))
    states.append(both.point((k + 1, j, i - 9), name="a coronal point"))
    person.see(2, i)
    off = ((k + 1, j + n, i) for n in range(-3, 4))
    states.append(both.scribble(*off, on=False, name="a sagittal scribble"))
    person.picture("sagittal")
    person.see(0, k)
    before_lassos = len(states)
    states.append(both.lasso(k, (j, i + 9), 8.3))
    states.append(both.lasso(k, (j, i - 5), 4.3, on=False, name="a lasso off the object"))
    person.picture("lasso")
    changed = [int((a != b).sum()) for a, b in itertools.pairwise(states)]
    assert all(changed), f"what was said changed so many voxels: {changed}"

    # Back, step by step, to the beginning.
    while len(states) > 1:
        states.pop()
        person.press(panel.undo_button)
        reference.undo()
        assert (person.mask() == states[-1]).all(), f"undo to step {len(states) - 1} brings back another answer"
        # Behind the lassos both have the same.
        if len(states) <= before_lassos:
            both.same(f"undo to step {len(states) - 1}")
    person.press(panel.undo_button)
    person.warned("Nothing to undo")

    # Several prompts, and then the answer to all of them.
    panel.auto_run_ckbx.setChecked(False)
    prompts = []
    for voxel, on in (((k, j, i), True), ((k, low[1] - 5, i), False)):
        layer = person.tool(0, on)
        person.drag(voxel)
        at = np.round(layer.data[-1]).astype(int)
        prompts.append({"at": at[::-1].tolist(), "on": on})
    assert not person.mask().any()
    person.press(panel.run_button)
    panel.auto_run_ckbx.setChecked(True)
    reference.say(points=prompts)
    both.same("two points at once")

    # From the beginning.
    person.press(panel.reset_interaction_button)
    assert not person.mask().any()
    reference.begin()
    both.box((k, low[1] - 3, low[2] - 3), (k, high[1] + 3, high[2] + 3), name="a box after a reset")

    # The next object; the first one stays.
    first = person.mask().copy()
    person.press(panel.reset_button)
    assert not person.mask().any()
    [kept] = (layer for layer in person.viewer.layers if re.fullmatch("object 1 - .*", layer.name))
    assert (np.asarray(kept.data) == first).all()
    reference.begin()
    both.point((k, j, i), name="a point on the next object")

    # A mask to go on from.
    def go_on(layer, mask):
        panel.label_for_init.setCurrentText(layer.name)
        assert panel.label_for_init.currentText() == layer.name
        person.press(panel.load_mask_btn)
        assert (person.mask() == mask).all()
        reference.begin()
        reference.give(mask)

    go_on(kept, first)
    both.point((k, low[1] - 1, low[2] - 1), on=False, name="a point off a mask that was given")
    both.point((k, low[1] - 5, i), name="a point on it")

    # The lease is gone. The plugin leaves the mask to be copied, and goes on from the copy.
    left = person.mask().copy()
    lease = panel.session._http.headers["x-lease-token"]
    reference.call("POST", "/release", headers={"X-Lease-Token": lease})
    person.tool(0)
    person.drag((k, j, i))
    person.warned("session lost")
    assert not panel._session_locked and (person.mask() == left).all()
    copy = person.viewer.add_labels(left, name="copy", scale=image.scale, translate=image.translate)
    person.begin()
    go_on(copy, left)
    both.point((k, j, i + 12), name="a point after a session that was lost")
    person.picture("end")

    # A window that is closed leaves its place to others.
    def leases(count):
        return f"prism_leases {count}" in reference.call("GET", "/metrics").text.splitlines()

    assert leases(1)
    QTimer.singleShot(0, person.viewer.close)
    napari.run()
    person.wait(lambda: leases(0))
    print("all is well")


main()
