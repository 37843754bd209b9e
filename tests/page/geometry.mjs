// A click lands on the voxel that was seen, whatever the order and the direction of a file's axes.
// node tests/page/geometry.mjs: its own mock of the server, made scans with one bright voxel, which
// is looked for in the picture, clicked on, and compared with what reaches the server.
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { choose, launch, look, pixel, settled, visit } from "./browser.mjs";
import { readImage, writeImage } from "./images.mjs";
import { serve } from "./mock.mjs";

const SHAPE = [23, 31, 17],
  SPACING = [1.5, 0.9, 2.3],
  BRIGHT = [5, 21, 11];
const index = ([x, y, z]) => x + SHAPE[0] * (y + SHAPE[1] * z);

const times = (a, b) =>
  a.map((row) => b[0].map((_, c) => row.reduce((n, v, k) => n + v * b[k][c], 0)));
const about = (axis, degrees) => {
  const t = (degrees * Math.PI) / 180,
    [i, j] = [0, 1, 2].filter((a) => a !== axis);
  const m = [
    [1, 0, 0],
    [0, 1, 0],
    [0, 0, 1],
  ];
  m[i][i] = m[j][j] = Math.cos(t);
  m[i][j] = -Math.sin(t);
  m[j][i] = Math.sin(t);
  return m;
};
const oblique = times(about(0, 18), times(about(1, -12), about(2, 25)));
const flip = (x, y, z) => [
  [x, 0, 0],
  [0, y, 0],
  [0, 0, z],
];

/** How a file's axes lie in the patient, as a matrix of directions. */
const WAYS = {
  "right, front, head": flip(1, 1, 1),
  "left, back, head": flip(-1, -1, 1),
  "left-handed": flip(-1, 1, 1),
  "from the head down, left-handed": flip(1, 1, -1),
  "axes in another order": [
    [0, 0, 1],
    [1, 0, 0],
    [0, 1, 0],
  ],
  "axes in another order, left-handed": [
    [0, -1, 0],
    [0, 0, -1],
    [-1, 0, 0],
  ],
  oblique,
  "oblique and left-handed": times(oblique, flip(-1, 1, 1)),
  "oblique, in another order": times(oblique, [
    [0, 0, -1],
    [1, 0, 0],
    [0, 1, 0],
  ]),
};

function affineOf(way) {
  const columns = way.map((row) => row.map((v, c) => v * SPACING[c]));
  return [...columns.map((row, r) => [...row, [-31.5, 44, 12.25][r]]), [0, 0, 0, 1]];
}

function mm(affine, voxel) {
  return affine.slice(0, 3).map((row) => row[3] + voxel.reduce((n, v, c) => n + v * row[c], 0));
}

/** The middle of what is bright (or of the label's colour) on a plane's picture, on the page. */
function spot(page, plane, what) {
  return page.evaluate(
    (plane_, what_) => {
      const { view } = window.prism,
        { gl } = view.nv;
      view.nv.drawScene();
      const ratio = view.canvas.width / view.canvas.clientWidth;
      const tile = view.tiles().find((t) => t.plane === plane_);
      const w = Math.floor(tile.width * ratio),
        h = Math.floor(tile.height * ratio);
      const left = Math.round(tile.left * ratio),
        top = Math.round(tile.top * ratio);
      const pixels = new Uint8Array(4 * w * h);
      gl.readPixels(left, view.canvas.height - top - h, w, h, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
      let sum = 0,
        x = 0,
        y = 0;
      for (let i = 0; i < w * h; i++) {
        // Scans are grey, and the first object's colour is yellow.
        const [r, g, b] = pixels.subarray(4 * i);
        const weight =
          what_ === "bright" ? (r > 150 && r - g < 20 ? r : 0) : Math.max(0, r - b - 60);
        sum += weight;
        x += weight * (i % w);
        y += weight * (h - 1 - Math.floor(i / w));
      }
      if (!sum) return null;
      const box = document.getElementById("stage").getBoundingClientRect();
      return [box.left + (left + x / sum + 0.5) / ratio, box.top + (top + y / sum + 0.5) / ratio];
    },
    plane,
    what,
  );
}

/** The axis along which a direction runs, most of all. */
const main = (d) => d.reduce((best, v, i) => (Math.abs(v) > Math.abs(d[best]) ? i : best), 0);
const near = (a, b, pixels) => Math.hypot(a[0] - b[0], a[1] - b[1]) <= pixels;

const folder = await mkdtemp(join(tmpdir(), "prism-geometry-"));
const server = await serve(0);
const address = `http://127.0.0.1:${server.address().port}/`;
const browser = await launch();
let passed = 0,
  failed = 0;
try {
  const values = new Float64Array(SHAPE[0] * SHAPE[1] * SHAPE[2]);
  values[index(BRIGHT)] = 1000;
  const one = new Uint8Array(values.length);
  one[index(BRIGHT)] = 1;
  for (const format of ["nii.gz", "nrrd", "mha"]) {
    for (const [name, way] of Object.entries(WAYS)) {
      const affine = affineOf(way),
        image = { shape: SHAPE, affine, values };
      const file = join(folder, `scan.${format}`),
        mask = join(folder, "mask.nii.gz");
      await writeFile(file, writeImage(format, image, true));
      await writeFile(mask, writeImage("nii.gz", { ...image, values: one }));
      // On screens of one and of two pixels to a CSS pixel.
      const { page, faults, strangers } = await visit(browser, address, {
        width: 1000,
        height: 600,
        deviceScaleFactor: name === "oblique and left-handed" ? 2 : 1,
      });
      try {
        await choose(page, file);
        const is = await page.evaluate(() => {
          const { view, scan } = window.prism;
          return { shown: view.volume.hdr.affine, said: scan.affine };
        });
        is.said.forEach((row, r) =>
          row.forEach((v, c) => {
            assert.ok(
              Math.abs(v - affine[r][c]) < 1e-4,
              "the mock read the affine that was written",
            );
            assert.ok(Math.abs(v - is.shown[r][c]) < 0.02, "the viewer shows the server's affine");
          }),
        );
        // Masks would lie over what is looked for.
        await page.evaluate(() => window.prism.view.setFill({ hidden: true }));
        for (const plane of [0, 1, 2]) {
          await look(page, BRIGHT);
          const at = await spot(page, plane, "bright");
          assert.ok(at, `plane ${plane}: the bright voxel is seen`);
          assert.ok(
            near(at, await pixel(page, plane, BRIGHT), 1.5),
            `plane ${plane}: it is where it is put`,
          );
          await page.keyboard.press("1");
          await page.mouse.click(...at, { button: plane === 1 ? "right" : "left" });
          await settled(page);
          const prompts = await (await fetch(`${address}mock/prompts`)).json();
          assert.deepEqual(
            prompts.at(-1),
            { points: [{ at: BRIGHT, on: plane !== 1 }] },
            `plane ${plane}: the click reached the server as the voxel that was seen`,
          );
          // What is to the left, above and behind on the picture is so in the patient: the page
          // names them, with the patient's right on the left.
          const moved = await page.evaluate((plane_) => {
            const { view } = window.prism;
            const { h, v, right, down } = view.tiles().find((t) => t.plane === plane_);
            const step = (axis, by) => {
              const ras = [...view.cross];
              ras[axis] += by;
              return view.grid.toStored(ras);
            };
            return [step(h, Math.sign(right)), step(v, -Math.sign(down))];
          }, plane);
          const [toRight, toTop] = moved.map((v) =>
            mm(affine, v).map((a, i) => a - mm(affine, BRIGHT)[i]),
          );
          const expected = [
            [
              [0, -1],
              [1, 1],
            ],
            [
              [0, -1],
              [2, 1],
            ],
            [
              [1, -1],
              [2, 1],
            ],
          ][plane];
          [toRight, toTop].forEach((d, i) => {
            assert.equal(main(d), expected[i][0], `plane ${plane}: the axis on the screen`);
            assert.equal(Math.sign(d[main(d)]), expected[i][1], `plane ${plane}: its direction`);
          });
        }
        // A mask of the one voxel is drawn over it, on every plane.
        await page.evaluate(() => window.prism.view.setFill({ hidden: false }));
        await (await page.$("#mask-file")).uploadFile(mask);
        await page.waitForFunction(() => window.prism.active.said?.voxels === 1);
        await settled(page);
        assert.equal(await page.evaluate(() => window.prism.overlay()), 1);
        for (const plane of [0, 1, 2]) {
          const at = await spot(page, plane, "label");
          assert.ok(
            at && near(at, await pixel(page, plane, BRIGHT), 2),
            `plane ${plane}: the mask lies on the voxel`,
          );
        }
        // The slice that diameters lie on, one of the file's last axis, is told as its pane shows it:
        // counted to the patient's right, front or head.
        const along = way.map((row) => row[2]);
        const through = main(along);
        const number = along[through] > 0 ? BRIGHT[2] + 1 : SHAPE[2] - BRIGHT[2];
        assert.equal(
          await page.$eval("#measured", (b) => b.textContent),
          `${["sagittal", "coronal", "axial"][through]}, slice ${number}`,
        );
        await look(page, [0, 0, 0]);
        await page.click("#measured");
        await settled(page);
        assert.equal(await page.evaluate((n) => window.prism.view.cross[n], through), number - 1);
        // And what the page would send of it to a server that lost it is the same file again.
        const again = await page.evaluate(async () => {
          const { niftiOf } = await import("./masks.js");
          const { view, scan, active } = window.prism;
          const blob = niftiOf(active.mask, view.grid, scan.spacing, scan.affine);
          return Array.from(new Uint8Array(await blob.arrayBuffer()));
        });
        const back = readImage("mask.nii", Buffer.from(again));
        assert.deepEqual(back.shape, SHAPE);
        assert.deepEqual(Uint8Array.from(back.values), one);
        assert.deepEqual(faults, []);
        assert.deepEqual(strangers, []);
        passed++;
        console.log(`ok: ${format}, ${name}`);
      } catch (error) {
        failed++;
        console.log(`FAILED: ${format}, ${name}: ${error.message}`, faults);
        if (process.env.SHOTS)
          await page.screenshot({ path: join(process.env.SHOTS, `geometry-${failed}.png`) });
      }
      await page.close();
    }
  }
} finally {
  await browser.close();
  server.close();
  await rm(folder, { recursive: true });
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed ? 1 : 0;
