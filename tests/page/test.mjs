// The page as a person uses it, in a headless Chromium: node tests/page/test.mjs [URL [FOLDER]].
// URL is that of `prism serve`, or of the mock; without it a mock is started. FOLDER gets pictures
// and the files that were saved (default: target/page). PRISM names the program that serves: masks
// are held against those that it writes for the same prompts.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { existsSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { choose, drag, launch, look, pixel, settled, visit } from "./browser.mjs";
import { contents, writeSeries } from "./dicom.mjs";
import { readImage } from "./images.mjs";
import { serve } from "./mock.mjs";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const SCAN = join(ROOT, "examples/data/lung1_image.nii.gz");
/** The prompts that the README's example gives; its box on one slice, as a drag makes it. */
const BOX = { from: [69, 68, 14], to: [93, 94, 14] },
  CLICK = [80, 80, 14];
const out = resolve(process.argv[3] ?? join(ROOT, "target/page"));

const given = process.argv[2];
const mock = given ? null : await serve(0);
const address = given || `http://127.0.0.1:${mock.address().port}/`;
const isMock = mock !== null || (await fetch(new URL("mock/prompts", address))).ok;
await mkdir(out, { recursive: true });
const browser = await launch();
let passed = 0,
  failed = 0,
  pictures = 0;
const { page, faults, strangers } = await visit(browser, address);
const session = await page.createCDPSession();
await session.send("Browser.setDownloadBehavior", { behavior: "allow", downloadPath: out });

const shot = (name) =>
  page.screenshot({ path: join(out, `${String(++pictures).padStart(2, "0")}-${name}.png`) });
const state = () =>
  page.evaluate(() => {
    const { active, objects, saved, scan } = window.prism;
    const last = active?.prompts.at(-1) ?? null;
    return {
      overlay: window.prism.overlay(),
      said: active?.said ?? null,
      last,
      prompts: active?.prompts.length ?? 0,
      objects: objects.length,
      saved,
      scan: scan?.id ?? null,
      status: document.getElementById("status").textContent,
      alert: document.getElementById("alerts").textContent,
    };
  });
/** Whether a voxel lies in the active object's mask. */
const holds = (voxel) =>
  page.evaluate((stored) => {
    const { view, active } = window.prism;
    return Boolean(active.mask.has(view.grid.index(view.grid.toRas(stored))));
  }, voxel);
const press = async (key) => {
  await page.keyboard.press(key);
  await settled(page);
};

async function test(name, run) {
  try {
    await run();
    assert.deepEqual(faults, [], "no fault in the browser's console");
    passed++;
    console.log(`ok: ${name}`);
  } catch (error) {
    failed++;
    console.log(`FAILED: ${name}: ${error.message}`);
    faults.length = 0;
    await shot("failed");
  }
}

/** A file that the page saved, once it is whole. */
async function saved(shift) {
  await page.evaluate(() => {
    window.before = window.prism.saved;
  });
  if (shift) await page.keyboard.down("Shift");
  await page.keyboard.press(shift ? "S" : "s");
  if (shift) await page.keyboard.up("Shift");
  await page.waitForFunction(() => window.prism.saved !== window.before);
  const {
    saved: { name, size },
  } = await state();
  for (let n = 0; n < 100; n++) {
    const path = join(out, name);
    if (existsSync(path)) {
      const bytes = await readFile(path);
      if (bytes.length === size) return { name, bytes };
    }
    await new Promise((go) => setTimeout(go, 50));
  }
  throw new Error(`${name} of ${size} bytes did not arrive in ${out}`);
}

/** The file that `prism segment` writes of a scan for some prompts. */
async function segmented(scan, format, ...prompts) {
  const written = join(out, `segment.${format}`);
  const said = ["segment", "-i", scan, "-o", written, ...prompts, "--quiet"];
  await promisify(execFile)(process.env.PRISM, said, { cwd: ROOT });
  return readFile(written);
}

await test("a scan is shown and sent", async () => {
  await shot("start");
  await choose(page, SCAN);
  const { scan, alert } = await state();
  assert.ok(scan);
  assert.equal(alert, "");
  // What it is taken for stays in sight.
  assert.match(await page.$eval("#scan-notes", (l) => l.textContent), /treated as CT/);
  await shot("scan");
});

await test("a file of another kind is refused with what to do", async () => {
  const other = join(out, "not-a-scan.txt");
  await writeFile(other, "no scan");
  await (await page.$("#file")).uploadFile(other);
  await settled(page);
  const { alert, scan } = await state();
  assert.match(alert, /\.nii\.gz/);
  assert.ok(scan, "the open scan stays");
  await press("Escape");
  assert.equal((await state()).alert, "");
});

await test("where the mouse rests is told before a first click, and says nothing", async () => {
  await look(page, CLICK);
  const told = page.waitForRequest((r) => r.url().endsWith("/prepare"), { timeout: 30e3 });
  await page.mouse.move(...(await pixel(page, 0, CLICK)));
  const request = await told;
  assert.deepEqual(JSON.parse(request.postData()), { point: CLICK });
  await settled(page);
  const { objects, prompts, overlay, alert } = await state();
  assert.deepEqual([objects, prompts, overlay, alert], [1, 0, 0, ""]);
  // The server knows the object by now; for a person it is as empty as before.
  assert.ok(await page.$eval("#save", (b) => b.disabled));
  await press("n");
  assert.equal((await state()).objects, 1);
});

let boxed, clicked;
await test("a drag is a box of the voxels under it", async () => {
  await look(page, CLICK);
  await press("2");
  await drag(page, await pixel(page, 0, BOX.from), await pixel(page, 0, BOX.to));
  boxed = await state();
  assert.deepEqual(boxed.last, { box: BOX });
  assert.ok(boxed.overlay > 0, "a mask is drawn");
  assert.equal(boxed.overlay, boxed.said.voxels, "as many voxels as the server says");
  await shot("box");
});

if (!isMock && process.env.PRISM) {
  await test("the mask of a box is the file that prism segment writes for it", async () => {
    await page.focus("#stage");
    const { name, bytes } = await saved(false);
    const ends = [...BOX.from, ...BOX.to.map((v) => v + 1)];
    const written = await segmented(SCAN, "nii.gz", "--box", ends.join());
    assert.ok(bytes.equals(written), "the same bytes");
    await rm(join(out, name));
  });
}

/** A voxel just outside the mask that the box gave, on its slice. */
let beside;
await test("a click where the mask disagrees changes it, and lies in it", async () => {
  await press("1");
  let x = CLICK[0];
  while (await holds([x, ...CLICK.slice(1)])) x++;
  assert.ok(x > CLICK[0], "the box's middle lies in its mask");
  beside = [x + 1, ...CLICK.slice(1)];
  assert.equal(await holds(beside), false);
  await page.mouse.click(...(await pixel(page, 0, beside)));
  await settled(page);
  clicked = await state();
  assert.deepEqual(clicked.last, { points: [{ at: beside, on: true }] });
  assert.equal(clicked.overlay, clicked.said.voxels);
  assert.equal(clicked.said.step, 2);
  assert.ok(clicked.said.changed > 0);
  assert.equal(await holds(beside), true);
  await shot("click");
});

await test("undo and redo bring masks back", async () => {
  await press("z");
  const back = await state();
  assert.equal(back.overlay, boxed.overlay);
  assert.equal(await holds(beside), false);
  assert.equal(back.said.redo, true);
  await page.keyboard.down("Control");
  await page.keyboard.down("Shift");
  await press("Z");
  await page.keyboard.up("Shift");
  await page.keyboard.up("Control");
  assert.equal((await state()).overlay, clicked.overlay);
  await page.click("#undo");
  await settled(page);
  await page.click("#redo");
  await settled(page);
  assert.equal((await state()).overlay, clicked.overlay);
});

await test("the mask is saved as it is seen", async () => {
  await page.focus("#stage");
  const { name, bytes } = await saved(false);
  assert.equal(name, "lung1_image_Object_1.nii.gz");
  const image = readImage(name, bytes);
  let voxels = 0,
    same = 0;
  const shown = await page.evaluate((shape) => {
    const { view, active } = window.prism,
      on = [];
    for (let z = 0, i = 0; z < shape[2]; z++)
      for (let y = 0; y < shape[1]; y++)
        for (let x = 0; x < shape[0]; x++, i++)
          if (active.mask.has(view.grid.index(view.grid.toRas([x, y, z])))) on.push(i);
    return on;
  }, image.shape);
  for (const v of image.values) if (v) voxels++;
  for (const i of shown) if (image.values[i]) same++;
  assert.equal(voxels, clicked.overlay);
  assert.equal(same, voxels, "every voxel of the file is the one that is drawn");
});

await test("diameters name their slice as its pane does, on one line, and a key shows it", async () => {
  const { said } = await state();
  const number = await page.evaluate(
    (index) => window.prism.view.grid.toRas([0, 0, index])[2] + 1,
    said.diameters_slice,
  );
  const text = (id) => page.$eval(`#${id}`, (e) => e.textContent);
  assert.equal(
    await text("diameters"),
    `${said.diameters_mm.map((d) => d.toFixed(1)).join(" × ")} mm`,
  );
  assert.equal(await text("measured"), `axial, slice ${number}`);
  // The widest of them that there are.
  const wrapped = await page.evaluate(() => {
    const wide = { diameters: "163.4 × 141.2 mm", measured: "sagittal, slice 1163" };
    const lines = Object.entries(wide).map(([id, longest]) => {
      const place = document.getElementById(id),
        before = place.textContent;
      place.textContent = longest;
      const row = place.closest("dd");
      const lines_ = row.offsetHeight / Number.parseFloat(getComputedStyle(row).lineHeight);
      place.textContent = before;
      return lines_;
    });
    return lines.filter((n) => n > 1.6);
  });
  assert.deepEqual(wrapped, []);
  await look(page, [CLICK[0], CLICK[1], 3]);
  await page.focus("#stage");
  await press("d");
  assert.equal(await page.evaluate(() => window.prism.view.cross[2] + 1), number);
  assert.match((await state()).status, new RegExp(`Axial, slice ${number}\\b`));
  await look(page, CLICK);
});

await test("where the crosshair is is told by the patient's sides, and said on a key", async () => {
  const where = await page.$eval("#where", (w) => w.textContent);
  assert.match(where, /^voxel 80, 80, 14 · R 22\.2, A 120\.3, I 612\.5 mm · -?\d+ HU$/);
  await press("i");
  assert.match(
    (await state()).status,
    /^Axial 15 of 28, coronal 80 of 160, sagittal 80 of 160; -?\d+ HU; in Object 1\.$/,
  );
});

await test("what the network is unsure of is shown on a key, and follows the answers", async () => {
  const doubt = () =>
    page.evaluate(() => {
      const { marks, view } = window.prism;
      const { voxels, region, bits } = marks.unsure;
      const [x, y] = region.map(([from, to]) => to - from);
      const here = [];
      let marked = 0;
      for (let bit = 0; bit < 8 * bits.length; bit++) {
        if (!((bits[bit >> 3] >> (bit & 7)) & 1)) continue;
        marked++;
        const within = [bit % x, Math.floor(bit / x) % y, Math.floor(bit / x / y)];
        const stored = within.map((c, a) => c + region[a][0]);
        if (stored[2] === view.grid.toStored(view.cross)[2]) here.push(stored);
      }
      // Of those on the slice, how many are drawn in a colour of their own.
      const tile = view.tiles().find((t) => t.plane === 0),
        ratio = devicePixelRatio || 1;
      const { width, height } = marks.canvas;
      const copy = new OffscreenCanvas(width, height);
      const context = copy.getContext("2d", { willReadFrequently: true });
      context.drawImage(marks.canvas, 0, 0);
      const { data } = context.getImageData(0, 0, width, height);
      const drawn = here.filter((stored) => {
        const [px, py] = tile.put(view.grid.toRas(stored)).map((p) => Math.round(p * ratio));
        const [red, green, blue, alpha] = data.subarray(4 * (py * width + px));
        return alpha > 0 && blue > green && red > green;
      });
      return { voxels, marked, here: here.length, drawn: drawn.length };
    });
  /** Does something, and waits for what is unsure after it. */
  const after = async (act) => {
    await page.evaluate(() => {
      window.before = window.prism.marks.unsure;
    });
    await act();
    await page.waitForFunction(
      () => window.prism.marks.unsure && window.prism.marks.unsure !== window.before,
    );
    await settled(page);
    return doubt();
  };
  const pressed = () => page.$eval("#unsure", (b) => b.getAttribute("aria-pressed"));
  await page.focus("#stage");
  assert.equal(await pressed(), "false");
  const first = await after(() => press("u"));
  assert.equal(await pressed(), "true");
  assert.ok(first.voxels > 0 && first.here > 0);
  assert.equal(first.marked, first.voxels);
  // Lines and letters lie over some of them.
  assert.ok(first.drawn > first.here / 2, `${first.drawn} of ${first.here} are drawn`);
  await shot("unsure");
  await after(() => press("z"));
  const again = await after(() => press("y"));
  assert.deepEqual(again, first);
  await page.click("#unsure");
  await settled(page);
  assert.equal(await pressed(), "false");
  assert.equal(await page.evaluate(() => window.prism.marks.unsure), null);
});

await test("the right button says what does not belong", async () => {
  const off = [CLICK[0] + 6, CLICK[1], CLICK[2]];
  await page.mouse.click(...(await pixel(page, 0, off)), { button: "right" });
  await settled(page);
  const now = await state();
  assert.deepEqual(now.last, { points: [{ at: off, on: false }] });
  assert.equal(now.overlay, now.said.voxels);
  await page.keyboard.down("Control");
  await page.mouse.click(...(await pixel(page, 0, [CLICK[0] - 6, CLICK[1], CLICK[2]])));
  await page.keyboard.up("Control");
  await settled(page);
  assert.equal((await state()).last.points[0].on, false);
  await press("z");
  await press("z");
  assert.equal((await state()).overlay, clicked.overlay);
  assert.equal(await holds(beside), true);
});

await test("a second object, by a stroke and an outline", async () => {
  await press("n");
  await press("3");
  await drag(page, await pixel(page, 0, [76, 80, 14]), await pixel(page, 0, [86, 82, 14]));
  const stroke = await state();
  assert.equal(stroke.objects, 2);
  const [{ on, voxels }] = stroke.last.scribbles;
  assert.equal(on, true);
  assert.deepEqual(voxels[0], [76, 80, 14]);
  assert.deepEqual(voxels.at(-1), [86, 82, 14]);
  // Without a gap: each voxel touches the one before it.
  voxels.slice(1).forEach((v, i) => assert.ok(v.every((c, a) => Math.abs(c - voxels[i][a]) <= 1)));
  await shot("stroke");
  await press("4");
  const corners = [
    [74, 74, 14],
    [88, 74, 14],
    [88, 88, 14],
    [74, 88, 14],
    [74, 76, 14],
  ];
  const points = await Promise.all(corners.map((v) => pixel(page, 0, v)));
  await page.mouse.move(...points[0]);
  await page.mouse.down();
  for (const p of points.slice(1)) await page.mouse.move(...p, { steps: 6 });
  await page.mouse.up();
  await settled(page);
  const outline = await state();
  const [lasso] = outline.last.lassos;
  assert.deepEqual([lasso.on, lasso.axis, lasso.slice], [true, 2, 14]);
  const passes = (x, y) => lasso.outline.some(([a, b]) => Math.hypot(a - x, b - y) < 0.5);
  assert.ok(
    corners.every(([x, y]) => passes(x, y)),
    "the outline passes where the hand did",
  );
  const both = await page.evaluate(() => window.prism.objects.map((o) => o.mask.count));
  assert.ok(both.every((n) => n > 0));
  assert.equal(outline.said.voxels, both[1]);
  await shot("lasso");
});

await test("an object is renamed and recoloured by keys", async () => {
  await page.focus("#stage");
  const before = await page.evaluate(() => window.prism.active.colour);
  await press("r");
  for (const letter of "Node 2") await page.keyboard.press(letter);
  await press("Enter");
  await press("k");
  // What is not kept is as it was.
  await press("F2");
  await press("x");
  await press("Escape");
  const { name, colour } = await page.evaluate(() => window.prism.active);
  assert.equal(name, "Node 2");
  assert.notDeepEqual(colour, before);
  const there = await page.evaluate(async () => {
    const token = sessionStorage.getItem("prism.token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const told = await (await fetch(`v1/scans/${window.prism.scan.id}`, { headers })).json();
    return told.objects.find((o) => o.object === window.prism.active.id);
  });
  assert.deepEqual([there.name, there.colour], [name, colour]);
  assert.equal(await page.evaluate(() => document.activeElement.id), "stage");
});

await test("all objects are saved as labels, the later over the earlier", async () => {
  const { name, bytes } = await saved(true);
  assert.equal(name, "lung1_image_labels.nii.gz");
  const { values } = readImage(name, bytes);
  const shown = await page.evaluate(() => {
    const counts = [0, 0, 0];
    for (const v of window.prism.view.labels) counts[v]++;
    return counts;
  });
  const counts = [0, 0, 0];
  for (const v of values) counts[v]++;
  assert.deepEqual(counts, shown);
});

await test("a box waits to go through slices, and a second drag says how many", async () => {
  await press("n");
  await press("2");
  await look(page, CLICK);
  await page.keyboard.down("Control");
  await drag(page, await pixel(page, 0, BOX.from), await pixel(page, 0, BOX.to));
  await page.keyboard.up("Control");
  assert.deepEqual(await page.evaluate(() => window.prism.tools.pending), BOX);
  await drag(page, await pixel(page, 1, [75, 80, 13]), await pixel(page, 1, [90, 80, 16]));
  await shot("deep-box");
  assert.deepEqual(await page.evaluate(() => window.prism.tools.pending), {
    from: [69, 68, 13],
    to: [93, 94, 16],
  });
  await press("]");
  assert.deepEqual(await page.evaluate(() => window.prism.tools.pending), {
    from: [69, 68, 12],
    to: [93, 94, 17],
  });
  await press("[");
  await press("Enter");
  const now = await state();
  assert.deepEqual(now.last, { box: { from: [69, 68, 13], to: [93, 94, 16] } });
  assert.equal(now.objects, 3);
});

await test("keys alone segment", async () => {
  await press("n");
  await press("1");
  await page.focus("#stage");
  await look(page, [82, 80, 14]);
  await press("ArrowRight"); // the patient's right is on the left: one voxel to the left
  const cross = await page.evaluate(() => window.prism.view.grid.toStored(window.prism.view.cross));
  assert.deepEqual(cross.slice(1), [80, 14]);
  assert.equal(Math.abs(cross[0] - 82), 1);
  // Where the crosshair comes to rest is told before the click.
  const told = page.waitForRequest(
    (r) => r.url().endsWith("/prepare") && r.postData() === JSON.stringify({ point: cross }),
    { timeout: 30e3 },
  );
  await press("PageUp");
  await press("PageDown");
  await told;
  await press("Enter");
  const now = await state();
  assert.deepEqual(now.last, { points: [{ at: cross, on: true }] });
  assert.ok(now.said.voxels > 0);
});

await test("windows, display and layouts", async () => {
  // Keys move in the plane that a key has chosen.
  const cross = () => page.evaluate(() => window.prism.view.cross);
  const moved = [];
  for (let n = 0; n < 3; n++) {
    await press("p");
    const before = await cross();
    await press("PageUp");
    const after = await cross();
    moved.push(after.findIndex((v, i) => v !== before[i]));
    await press("PageDown");
  }
  assert.deepEqual(moved.sort(), [0, 1, 2]);
  const window_ = () => page.evaluate(() => ({ ...window.prism.view.window }));
  const before = await window_();
  await press("w");
  assert.deepEqual(await window_(), { low: -160, high: 240 });
  await page.keyboard.down("Shift");
  const p = await pixel(page, 0, CLICK);
  await drag(page, p, [p[0] + 60, p[1] - 40]);
  await page.keyboard.up("Shift");
  const dragged = await window_();
  assert.ok(dragged.high - dragged.low > 400, "to the right is wider");
  assert.equal(await page.$eval("#window", (s) => s.value), "own");
  await page.select("#window", "auto");
  await settled(page);
  assert.deepEqual(await window_(), before);
  await page.focus("#stage");
  await press("c");
  await press("m");
  await shot("contour-large");
  await press("m");
  await press(" ");
  assert.equal(await page.evaluate(() => window.prism.view.nv.drawOpacity), 0);
  await press(" ");
  await press("c");
  // Enlarged about a pixel, what lies under it stays there.
  const at = await pixel(page, 0, CLICK);
  await page.mouse.move(...at);
  await page.keyboard.down("Control");
  await page.mouse.wheel({ deltaY: -300 });
  await page.keyboard.up("Control");
  await settled(page);
  const after = await pixel(page, 0, CLICK);
  // The wheel's place comes in whole pixels.
  assert.ok(Math.hypot(at[0] - after[0], at[1] - after[1]) < 2);
  assert.ok(await page.evaluate(() => window.prism.view.zoom > 1.5));
  await shot("zoom");
  await drag(page, at, [at[0] + 50, at[1] + 30], { button: "middle" });
  const panned = await pixel(page, 0, CLICK);
  assert.ok(
    Math.hypot(panned[0] - at[0] - 50, panned[1] - at[1] - 30) < 2,
    "the picture follows the hand",
  );
  await press("0");
  const slice = await page.evaluate(() => window.prism.view.cross[2]);
  await page.mouse.move(...(await pixel(page, 0, CLICK)));
  await page.mouse.wheel({ deltaY: 120 });
  await settled(page);
  assert.equal(await page.evaluate(() => window.prism.view.cross[2]), slice - 1);
  await page.select("#layout", "four");
  await settled(page);
  await new Promise((go) => setTimeout(go, 500)); // the surface in 3D comes when a hand rests
  await settled(page);
  await shot("four");
  await page.select("#layout", "planes");
  await settled(page);
  await page.focus("#stage");
  await press("?");
  await shot("keys");
  await page.click("#keys button");
  assert.equal(await page.$eval("#keys", (d) => d.open), false);
});

await test("a reload comes back to the same masks", async () => {
  const counts = () => page.evaluate(() => window.prism.objects.map((o) => o.mask.count));
  const before = await counts(),
    { scan } = await state();
  await page.reload();
  await page.waitForSelector("html[data-ready]");
  await page.waitForFunction(
    (n) => window.prism.objects.filter((o) => o.mask.count).length === n,
    { timeout: 30e3 },
    before.length,
  );
  await settled(page);
  assert.deepEqual(await counts(), before);
  assert.equal((await state()).scan, scan);
  await page.click("#undo");
  await settled(page);
  assert.equal((await state()).said.voxels, 0);
  await page.click("#redo");
  await settled(page);
  await shot("reload");
});

await test("a page that is not touched keeps its scan on the server", async () => {
  const counts = () => page.evaluate(() => window.prism.objects.map((o) => o.mask.count));
  const before = await counts(),
    { scan } = await state();
  const { identifier } = await page.evaluateOnNewDocument(() => {
    const own = window.setInterval;
    window.timers = [];
    window.setInterval = (run, ms, ...more) => {
      window.timers.push({ run, ms });
      return own(run, ms, ...more);
    };
  });
  await page.reload();
  await page.waitForSelector("html[data-ready]");
  await page.waitForFunction(
    (all) => window.prism.objects.map((o) => o.mask.count).join() === all,
    { timeout: 30e3 },
    before.join(),
  );
  await settled(page);
  // By itself, well before the ten minutes that a scan is kept.
  const told = page.waitForResponse(
    (r) => r.request().method() === "GET" && r.url().endsWith(`/v1/scans/${scan}`),
    { timeout: 30e3 },
  );
  await page.evaluate(() => {
    const slow = window.timers.filter(({ ms }) => ms >= 60e3 && ms <= 300e3);
    for (const { run } of slow) run();
  });
  assert.equal((await told).status(), 200);
  await page.removeScriptToEvaluateOnNewDocument(identifier);
});

await test("what a closed tab left is taken up, and not what an open one has", async () => {
  const opened = (tab) => tab.evaluate(() => window.prism.scan?.id ?? null);
  const second = (await visit(browser, address)).page;
  assert.equal(await opened(second), null);
  await choose(second, SCAN);
  await look(second, CLICK);
  await second.mouse.click(...(await pixel(second, 0, CLICK)));
  await settled(second);
  const left = await opened(second);
  const voxels = () => window.prism.objects.map((o) => o.mask.count);
  const before = await second.evaluate(voxels);
  assert.ok(before.some((count) => count > 0));
  // Its file is written beside all else.
  const kept = async (id) => (await (await import("./store.js")).kept(id)) !== null;
  await second.waitForFunction(kept, {}, left);
  await second.close();
  const third = (await visit(browser, address)).page;
  await settled(third);
  assert.equal(await opened(third), left);
  assert.deepEqual(await third.evaluate(voxels), before);
  assert.match(await third.$eval("#status", (s) => s.textContent), /closed tab.*Close/);
  // A page that begins anew has nothing to take up.
  await third.click("#close-scan");
  await third.waitForFunction(() => !window.prism.scan);
  await third.close();
  const fourth = (await visit(browser, address)).page;
  assert.equal(await opened(fourth), null);
  await fourth.close();
  await page.bringToFront();
});

await test("the mask of one object is hidden, and an object is deleted", async () => {
  const before = await state();
  const last = () =>
    page.evaluate(() => {
      const { view, objects } = window.prism;
      return view.labels.reduce((n, v) => n + (v === objects.length), 0);
    });
  const drawn = await last();
  assert.ok(drawn > 0);
  await page.click("#objects li:last-child button[aria-pressed]");
  await settled(page);
  assert.equal(await last(), 0);
  await page.click("#objects li:last-child button[aria-pressed]");
  await settled(page);
  assert.equal(await last(), drawn);
  assert.equal((await state()).overlay, before.overlay);
  await page.click("#objects li:last-child button:last-child");
  await settled(page);
  await page.waitForFunction((n) => window.prism.objects.length === n - 1, {}, before.objects);
});

if (isMock) {
  await test("a server that lost the scan gets it again, with the masks", async () => {
    const counts = () => page.evaluate(() => window.prism.objects.map((o) => o.mask.count));
    const before = await counts();
    await fetch(new URL("mock/forget", address));
    await page.focus("#stage");
    await press("Enter");
    const { alert } = await state();
    assert.match(alert, /not known here/);
    assert.match(alert, /Send again/);
    await shot("lost");
    await page.evaluate(() =>
      [...document.querySelectorAll("#alerts button")]
        .find((b) => b.textContent === "Send again")
        .click(),
    );
    await page.waitForFunction(
      (n) => window.prism.scan?.id && window.prism.objects.filter((o) => o.mask.count).length === n,
      { timeout: 30e3 },
      before.length,
    );
    await settled(page);
    assert.deepEqual(await counts(), before);
  });

  await test("answers come one after the other, and say that they come", async () => {
    await fetch(new URL("mock/delay?ms=150", address));
    await press("1");
    await look(page, CLICK);
    const { step } = (await state()).said;
    for (const x of [78, 80, 82]) await page.mouse.click(...(await pixel(page, 0, [x, 80, 14])));
    assert.equal(await page.$eval("#busy", (b) => b.hidden), false);
    await shot("busy");
    const waits = () => page.$eval("#busy-text", (t) => t.textContent);
    assert.equal(await waits(), "Correcting…");
    // How long it takes is not known, and a screen reader is told what it is.
    assert.equal(await page.$eval("#busy progress", (p) => p.position), -1);
    const live = await page.$eval("#busy", (b) => b.closest("[role=status]")?.ariaLive);
    assert.equal(live, "polite");
    await settled(page);
    const now = await state();
    assert.equal(now.said.step, step + 3);
    assert.equal(now.said.voxels, await page.evaluate(() => window.prism.active.mask.count));
    assert.equal(await page.$eval("#busy", (b) => b.hidden), true);
    await press("n");
    await page.mouse.click(...(await pixel(page, 0, CLICK)));
    await settled(page);
    // The words stay where they were until there are others.
    assert.equal(await waits(), "Segmenting…");
    await press("z");
    await fetch(new URL("mock/delay?ms=0", address));
  });

  await test("a page without the server's token says what to do, one with it works", async () => {
    const locked = await serve(0, "s3cret");
    const there = `http://127.0.0.1:${locked.address().port}/`;
    const without = await visit(browser, there);
    await (await without.page.$("#file")).uploadFile(SCAN);
    await without.page.waitForSelector("#alerts .alert");
    assert.match(await without.page.$eval("#alerts", (a) => a.textContent), /#token=/);
    await without.page.close();
    const withit = await visit(browser, `${there}#token=s3cret`);
    await choose(withit.page, SCAN);
    assert.equal(new URL(withit.page.url()).hash, "", "the token is not left in the address");
    await withit.page.close();
    locked.close();
  });
}

await test("a closed scan is forgotten, here and on the server", async () => {
  const notes = () => page.$eval("#notes", (list) => list.textContent);
  if (isMock) {
    await press("n");
    await page.mouse.click(...(await pixel(page, 0, CLICK)));
    await settled(page);
    assert.match(await notes(), /two scales/);
  }
  const { scan } = await state();
  await page.click("#close-scan");
  await page.waitForFunction(() => !window.prism.scan && !document.getElementById("start").hidden);
  assert.equal(await notes(), "", "notes of the last answer");
  assert.equal(await page.evaluate(() => sessionStorage.getItem("prism.session")), null);
  const key = `prism.session.${scan}`;
  assert.equal(await page.evaluate((name) => localStorage.getItem(name), key), null);
  const kept = await page.evaluate(async (id) => {
    const { kept: find } = await import("./store.js");
    return (await find(id)) !== null;
  }, scan);
  assert.equal(kept, false);
  const status = await page.evaluate(async (id) => {
    const token = sessionStorage.getItem("prism.token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    return (await fetch(`v1/scans/${id}`, { headers })).status;
  }, scan);
  assert.equal(status, 404);
  await choose(page, SCAN);
  await page.click("#close-scan");
});

if (isMock) {
  await test("files of DICOM go as an archive, and of several series one is chosen", async () => {
    const slices = ["slice 1.dcm", "slice-2", "notes.txt"].map((name) => join(out, name));
    const slice = Buffer.alloc(300);
    slice.write("DICM", 128);
    for (const path of slices) await writeFile(path, path.endsWith(".txt") ? "no slice" : slice);
    // It may be the first thing that a page opens.
    await page.reload();
    await page.waitForSelector("html[data-ready]");
    await (await page.$("#file")).uploadFile(...slices);
    await page.waitForFunction(() => document.getElementById("series").open);
    await shot("series");
    const list = await page.$eval("#series-list", (l) => l.textContent);
    assert.match(list, /Thorax soft.*Thorax lung/);
    // The first one has the focus: the next is one key further.
    await page.focus("#series-list li:nth-child(2) button");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => window.prism.scan?.id, { timeout: 60e3 });
    await settled(page);
    const archives = await (await fetch(new URL("mock/archives", address))).json();
    assert.deepEqual(archives, [
      ["slice 1.dcm", "slice-2"],
      ["slice 1.dcm", "slice-2"],
    ]);
    const told = await page.evaluate(() => ({
      name: window.prism.scan.name,
      dicom: document.querySelector("#format [value=dcm]").disabled,
    }));
    assert.deepEqual(told, { name: "slice 1_3.nii", dicom: false });
    await look(page, CLICK);
    await page.mouse.click(...(await pixel(page, 0, CLICK)));
    await settled(page);
    const now = await state();
    assert.ok(now.said?.voxels > 0, "a click on it is answered");
    assert.equal(now.overlay, now.said.voxels);
    // A reload finds it.
    await page.reload();
    await page.waitForSelector("html[data-ready]");
    await page.waitForFunction(() => window.prism.objects.some((o) => o.mask.count));
    assert.equal((await state()).scan, now.scan);
    await page.click("#close-scan");
    await page.waitForFunction(() => !window.prism.scan);
    // A user who chooses none is where they were.
    await (await page.$("#file")).uploadFile(...slices);
    await page.waitForFunction(() => document.getElementById("series").open);
    await page.keyboard.press("Escape");
    await page.waitForFunction(() => !document.getElementById("series").open);
    await settled(page);
    const after = await state();
    assert.deepEqual([after.scan, after.alert], [null, ""]);
    assert.equal(await page.$eval("#start", (s) => s.hidden), false);
  });

  await test("a folder that is dropped is gone through", async () => {
    const found = await page.evaluate(async () => {
      const { dropped, ofDicom } = await import("./series.js");
      const slice = new Uint8Array(200);
      slice.set([68, 73, 67, 77], 128);
      const file = (name) => ({ isFile: true, name, file: (done) => done(new File([slice], name)) });
      const folder = (name, inner) => ({
        isDirectory: true,
        name,
        createReader: () => {
          const rest = [...inner];
          return { readEntries: (done) => done(rest.splice(0, 2)) };
        },
      });
      const top = folder("study", [file("1"), file("2"), folder("b", [file("1")]), file("3")]);
      const transfer = { items: [{ webkitGetAsEntry: () => top }], files: [] };
      return (await ofDicom(await dropped(transfer))).map(({ path }) => path);
    });
    assert.deepEqual(found, ["study/1", "study/2", "study/b/1", "study/3"]);
  });
}

if (!isMock) {
  await test("a folder of DICOM is opened, clicked, undone, and saved as files and as DICOM", async () => {
    const folder = join(out, "thorax");
    await rm(folder, { recursive: true, force: true });
    const image = readImage(SCAN, await readFile(SCAN));
    await writeSeries(folder, image);
    // It may be the first thing that a page opens. The browser goes through the folder by itself.
    await page.reload();
    await page.waitForSelector("html[data-ready]");
    await (await page.$("#folder")).uploadFile(folder);
    await page.waitForFunction(() => window.prism.scan?.id, { timeout: 60e3 });
    await settled(page);
    await shot("dicom");
    const told = await page.evaluate((at) => {
      const { scan, view } = window.prism;
      const offered = !document.querySelector("#format [value=dcm]").disabled;
      const { name, format, shape } = scan;
      return { name, format, shape, offered, value: view.value(view.grid.toRas(at)) };
    }, CLICK);
    const [x, y, z] = CLICK;
    const value = image.values[x + image.shape[0] * (y + image.shape[1] * z)];
    const { shape } = image;
    assert.deepEqual(told, { name: "thorax.nii", format: "DICOM", shape, offered: true, value });

    await press("1");
    await look(page, CLICK);
    await page.mouse.click(...(await pixel(page, 0, CLICK)));
    await settled(page);
    const first = await state();
    assert.deepEqual(first.last, { points: [{ at: CLICK, on: true }] });
    assert.ok(first.overlay > 0);
    assert.equal(first.overlay, first.said.voxels);
    let off = x;
    while (await holds([off, y, z])) off++;
    await page.mouse.click(...(await pixel(page, 0, [off + 1, y, z])));
    await settled(page);
    assert.equal(await holds([off + 1, y, z]), true);
    await press("z");
    assert.equal((await state()).overlay, first.overlay);
    assert.equal(await holds([off + 1, y, z]), false);

    for (const format of ["nii.gz", "dcm"]) {
      await page.select("#format", format);
      await page.focus("#stage");
      const { name, bytes } = await saved(false);
      assert.equal(name, `thorax_Object_1.${format}`);
      if (format === "nii.gz") {
        const marked = readImage(name, bytes).values.reduce((n, v) => n + v, 0);
        assert.equal(marked, first.overlay);
      } else {
        assert.equal(bytes.toString("latin1", 128, 132), "DICM");
      }
      if (process.env.PRISM) {
        const written = await segmented(folder, format, "--point", CLICK.join());
        if (format === "dcm") assert.deepEqual(contents(bytes), contents(written));
        else assert.ok(bytes.equals(written), "the same bytes");
      }
      await rm(join(out, name));
    }
    await page.click("#close-scan");
    await page.waitForFunction(() => !window.prism.scan);
  });
}

await test("everything came from the server itself", async () => {
  assert.deepEqual(strangers, []);
});

await browser.close();
mock?.close();
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed ? 1 : 0;
