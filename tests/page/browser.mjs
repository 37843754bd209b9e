// A headless Chromium with the page in it, and the few things that the tests do there.
// Needs puppeteer-core (scripts/puppeteer fetches it), and Chromium (CHROMIUM names another).
import { createRequire } from "node:module";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

// PUPPETEER: a folder whose node_modules has it, where that is not above this file.
const require = createRequire(
  process.env.PUPPETEER ? join(process.env.PUPPETEER, "package.json") : import.meta.url,
);
const puppeteer = require("puppeteer-core");

export async function launch() {
  const profile = await mkdtemp(join(tmpdir(), "prism-page-"));
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    userDataDir: profile,
    protocolTimeout: 120e3,
    args: [
      "--headless",
      "--no-sandbox",
      "--use-angle=swiftshader",
      "--enable-unsafe-swiftshader",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
  });
  const close = browser.close.bind(browser);
  browser.close = async () => {
    await close();
    await rm(profile, { recursive: true, force: true });
  };
  return browser;
}

/** A tab with the page, its faults, and the requests that left for elsewhere. */
export async function visit(browser, address, size = { width: 1280, height: 720 }) {
  const page = await browser.newPage();
  await page.setViewport(size);
  const faults = [],
    strangers = [];
  page.on("console", (m) => {
    // A refused request is a line of Chromium's own, and the page's to tell.
    const own = /Failed to load resource/.test(m.text());
    if (["error", "warn", "warning"].includes(m.type()) && !own) faults.push(m.text());
  });
  page.on("pageerror", (e) => faults.push(String(e.stack ?? e)));
  page.on("dialog", (d) => d.accept());
  const { origin } = new URL(address);
  page.on("request", (r) => {
    if (!r.url().startsWith(origin) && !/^(data|blob):/.test(r.url())) strangers.push(r.url());
  });
  await page.goto(address);
  await page.waitForSelector("html[data-ready]", { timeout: 60e3 });
  return { page, faults, strangers };
}

/** Chooses a file as a person does. */
export async function choose(page, file) {
  const input = await page.$("#file");
  await input.uploadFile(file);
  await page.waitForFunction(() => window.prism.scan?.id, { timeout: 60e3 });
  await settled(page);
}

/** All answers are here and drawn. */
export async function settled(page) {
  await page.evaluate(async () => {
    await window.prism.idle();
    for (let n = 0; n < 3; n++) await new Promise((go) => requestAnimationFrame(go));
  });
}

/** The pixel of a stored voxel on a plane (0 axial, 1 coronal, 2 sagittal), on the page. */
export const pixel = (page, plane, voxel) =>
  page.evaluate(
    (plane_, stored) => {
      const { view } = window.prism;
      const tile = view.tiles().find((t) => t.plane === plane_);
      const [x, y] = tile.put(view.grid.toRas(stored));
      const box = document.getElementById("stage").getBoundingClientRect();
      return [box.left + x, box.top + y];
    },
    plane,
    voxel,
  );

/** Moves the crosshair without a prompt. */
export async function look(page, voxel) {
  await page.evaluate((stored) => {
    const { view } = window.prism;
    view.moveTo(view.grid.toRas(stored));
  }, voxel);
  await settled(page);
}

export async function drag(page, from, to, options = {}) {
  await page.mouse.move(...from);
  await page.mouse.down(options);
  await page.mouse.move((from[0] + to[0]) / 2, (from[1] + to[1]) / 2, { steps: 4 });
  await page.mouse.move(...to, { steps: 4 });
  await page.mouse.up(options);
  await settled(page);
}
