// Looks at DICOM segmentations in OHIF, as it installs: node ohif.mjs URL FOLDER PICTURES. URL is
// that of `ohif.py serve FOLDER OHIF`; a mask.dcm stands beside each series. Opens each study as a
// person does, and the segmentation on it by a double click. Then, of every image, both must be
// what ohif.py reckoned: the voxels that OHIF holds, and what it shows, coloured at the middle of
// each voxel that is marked and grey at that of every other. PICTURES gets the window on a slice
// with the object and on one between its parts, where it is not.
import { readdir, readFile, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { launch } from "../page/browser.mjs";

const [url, folder, pictures] = process.argv.slice(2);
const WITH = 4,
  WITHOUT = 6;
// ms that anything is waited for.
const PATIENCE = 180e3;

/** Opens a study, and its segmentation on it; gives the page and what was said on its console. */
async function open(context, study) {
  const page = await context.newPage();
  await page.setViewport({ width: 1280, height: 800 });
  page.setDefaultTimeout(PATIENCE);
  const said = [];
  page.on("console", (m) => {
    if (["error", "warn", "warning"].includes(m.type())) said.push(m.text());
  });
  page.on("pageerror", (e) => said.push(String(e)));
  await page.goto(`${url}viewer?StudyInstanceUIDs=${study}`);
  try {
    // Who is here for the first time is shown about.
    const skip = await page.waitForSelector("::-p-xpath(//button[contains(., 'Skip all')])");
    await skip.click();
    await page.waitForFunction(() => !document.querySelector(".shepherd-modal-is-visible"));
    const row = await page.waitForSelector("[data-cy=study-browser-thumbnail-no-image]");
    await row.click({ count: 2 });
    const yes = await page.waitForSelector("[data-cy=yes-hydrate-btn]");
    await yes.click();
    await page.waitForFunction(() => {
      const { state } = window.cornerstoneTools.segmentation;
      const { activeViewportId } = window.services.viewportGridService.getState();
      const shown = state.getSegmentationRepresentations(activeViewportId);
      return shown.length === 1 && !document.querySelector("[data-cy=yes-hydrate-btn]");
    });
  } catch (error) {
    await page.screenshot({ path: join(pictures, "failed.png") });
    throw new Error(`${error.message}\n${said.join("\n")}`);
  }
  return page;
}

/** The segments that OHIF lists, and of each image the voxels that it holds as marked. */
const held = (page) =>
  page.evaluate(() => {
    const [one, ...more] = window.cornerstoneTools.segmentation.state.getSegmentations();
    const images = one.representationData.Labelmap.imageIds.map((id) =>
      window.cornerstone.cache.getImage(id),
    );
    const marked = (image) => [...image.getPixelData()].flatMap((v, n) => (v === 0 ? [] : [n]));
    return {
      segmentations: 1 + more.length,
      names: Object.values(one.segments).map((segment) => segment.label),
      // A label image is of the image that it lies on.
      images: images.map((i) => [i.referencedImageId, i.columns, i.rows, marked(i)]),
    };
  });

/** Goes to an image of the stack, and says which it is. */
const go = (page, index) =>
  page.evaluate(async (index_) => {
    const { viewportGridService, cornerstoneViewportService } = window.services;
    const { activeViewportId } = viewportGridService.getState();
    const view = cornerstoneViewportService.getCornerstoneViewport(activeViewportId);
    window.view = view;
    await view.setImageIdIndex(index_);
    view.render();
    for (let n = 0; n < 10; n++) await new Promise((next) => requestAnimationFrame(next));
    return view.getCurrentImageId();
  }, index);

/** Which of some places in mm are coloured on the picture; null for one that is not on it. */
const coloured = (page, places) =>
  page.evaluate((places_) => {
    const canvas = window.view.getCanvas();
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    const scale = width / canvas.clientWidth;
    return places_.map((place) => {
      const [x, y] = window.view.worldToCanvas(place).map((v) => Math.floor(v * scale));
      if (x < 0 || y < 0 || x >= width || y >= height) return null;
      const rgb = data.slice(4 * (x + width * y), 4 * (x + width * y) + 3);
      return Math.max(...rgb) - Math.min(...rgb) > 30;
    });
  }, places);

/** What DICOMweb calls an image within its series. */
const frame = (imageId) => imageId.split("/instances/")[1];

/** What is wrong with a study in OHIF, a line each. */
async function judge(name, context) {
  const truth = JSON.parse(await readFile(join(folder, name, "truth.json")));
  const page = await open(context, truth.study);
  const wrong = [];
  const { segmentations, names, images } = await held(page);
  if (segmentations !== 1 || names.join() !== "object")
    wrong.push(`${segmentations} segmentations with the segments ${names}, expected one, 'object'`);
  const expected = Object.keys(truth.frames).sort().join();
  const found = images.map(([id]) => frame(id));
  if (found.sort().join() !== expected) return [`label images are of ${found}, not of ${expected}`];
  for (const [id, columns, rows, voxels] of images) {
    const { slice, voxels: marked } = truth.frames[frame(id)];
    if (columns !== truth.columns || rows !== truth.rows)
      wrong.push(`slice ${slice} has ${columns} columns and ${rows} rows`);
    if (voxels.join() !== marked.join())
      wrong.push(`slice ${slice} holds ${voxels.length} voxels that are not the ${marked.length}`);
  }
  // The same by the pixels of the picture.
  for (let index = 0; index < images.length; index++) {
    const end = Date.now() + 30e3;
    let slice, off;
    do {
      // Again each time: OHIF itself goes to the object, and makes the view anew, once it has it.
      const here = truth.frames[frame(await go(page, index))];
      const marked = new Set(here.voxels);
      const colours = await coloured(page, here.places);
      slice = here.slice;
      off = colours.flatMap((colour, n) => (colour === marked.has(n) ? [] : [n]));
    } while (off.length > 0 && Date.now() < end);
    if (off.length > 0) {
      const [n] = off;
      const at = `row ${Math.floor(n / truth.columns)}, column ${n % truth.columns}`;
      wrong.push(`slice ${slice} shows ${off.length} voxels wrongly, such as ${at}`);
    }
    const shot = { [WITH]: "with", [WITHOUT]: "without" }[slice];
    if (shot) await page.screenshot({ path: join(pictures, `${name}-${shot}.png`) });
  }
  console.log(`${name}: looked at ${images.length} slices`);
  await page.close();
  return wrong;
}

await mkdir(pictures, { recursive: true });
const browser = await launch();
let failed = 0;
for (const entry of (await readdir(folder)).sort()) {
  // Each in a browser that has never been here.
  const context = await browser.createBrowserContext();
  const wrong = await judge(entry, context).catch((error) => [error.message]);
  await context.close();
  for (const line of wrong) console.log(`FAILED: ${entry}: ${line}`);
  failed += wrong.length > 0;
}
await browser.close();
if (failed > 0) process.exit(1);
console.log("all is well");
