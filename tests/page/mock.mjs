// A stand-in for `prism serve` without its engine, to work on the page: it speaks the same HTTP
// interface and answers with a ball around each click. node tests/page/mock.mjs [PORT] [TOKEN]
import { createServer } from "node:http";
import { randomBytes } from "node:crypto";
import { readFile } from "node:fs/promises";
import { gunzipSync } from "node:zlib";
import { fileURLToPath } from "node:url";
import { join } from "node:path";
import { readImage, writeImage } from "./images.mjs";

const LUNG = fileURLToPath(new URL("../../examples/data/lung1_image.nii.gz", import.meta.url));
const PAGE = fileURLToPath(new URL("../../src/serve/page/", import.meta.url));
const TYPES = {
  html: "text/html; charset=utf-8",
  css: "text/css; charset=utf-8",
  js: "text/javascript; charset=utf-8",
  txt: "text/plain; charset=utf-8",
  svg: "image/svg+xml",
};
// What the server sends with the page. Chrome reports what it stops, and the tests listen.
export const POLICY =
  "default-src 'self'; img-src 'self' blob: data:; worker-src 'self' blob:; " +
  "connect-src 'self'; style-src 'self'; script-src 'self' 'wasm-unsafe-eval'; " +
  "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const RADIUS_MM = 9;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const scans = new Map(),
  objects = new Map();
/** Every interaction as it came: for tests, at GET /mock/prompts. */
const prompts = [];
/** The names of the files in every archive that came: at GET /mock/archives. */
const archives = [];
let delay = 0;

const id = () => randomBytes(16).toString("hex");
const at = (scan, [x, y, z]) => x + scan.shape[0] * (y + scan.shape[1] * z);

/** Calls with every voxel of a box of corners (inclusive), clipped to the scan. */
function within(scan, from, to, call) {
  const low = [0, 1, 2].map((a) => Math.max(0, Math.floor(Math.min(from[a], to[a]))));
  const high = [0, 1, 2].map((a) =>
    Math.min(scan.shape[a] - 1, Math.ceil(Math.max(from[a], to[a]))),
  );
  for (let z = low[2]; z <= high[2]; z++)
    for (let y = low[1]; y <= high[1]; y++) for (let x = low[0]; x <= high[0]; x++) call([x, y, z]);
}

function ball(scan, mask, centre, mm, on) {
  const reach = scan.spacing.map((s) => mm / s);
  within(
    scan,
    centre.map((c, a) => c - reach[a]),
    centre.map((c, a) => c + reach[a]),
    (v) => {
      const far = Math.hypot(...v.map((c, a) => (c - centre[a]) * scan.spacing[a]));
      if (far <= mm) mask[at(scan, v)] = on ? 1 : 0;
    },
  );
  mask[at(scan, centre)] = on ? 1 : 0;
}

function inside([a, b], outline) {
  let odd = false;
  for (let i = 0, j = outline.length - 1; i < outline.length; j = i++) {
    const [a0, b0] = outline[i],
      [a1, b1] = outline[j];
    if (b0 > b !== b1 > b && a < ((a1 - a0) * (b - b0)) / (b1 - b0) + a0) odd = !odd;
  }
  return odd;
}

function onScan(scan, voxel, what) {
  const good =
    Array.isArray(voxel) &&
    voxel.length === 3 &&
    voxel.every((v, a) => Number.isInteger(v) && v >= 0 && v < scan.shape[a]);
  if (!good)
    throw new Refused(
      400,
      `${what} ${JSON.stringify(voxel)}: expected a voxel of a scan ` +
        `of ${scan.shape.join(" x ")}`,
    );
  return voxel;
}

function interact(scan, before, said) {
  const mask = before.slice();
  const parts = ["points", "scribbles", "lassos", "lines"].filter((k) => said[k]?.length);
  if (!parts.length && !said.box)
    throw new Refused(400, "no prompt: expected points, box, " + "scribbles, lassos or lines");
  if (said.box) {
    const from = onScan(scan, said.box.from, "the box's corner");
    const to = onScan(scan, said.box.to, "the box's corner");
    const half = from.map((f, a) => Math.abs(to[a] - f) / 2 + 0.5);
    within(scan, from, to, (v) => {
      const far = Math.hypot(...v.map((c, a) => (c - (from[a] + to[a]) / 2) / half[a]));
      if (far <= 1) mask[at(scan, v)] = 1;
    });
  }
  for (const { on, axis, slice, outline } of said.lassos ?? []) {
    const others = [0, 1, 2].filter((a) => a !== axis);
    if (outline.length < 3) throw new Refused(400, "an outline of under three corners");
    const low = [0, 1].map((i) => Math.min(...outline.map((c) => c[i])));
    const high = [0, 1].map((i) => Math.max(...outline.map((c) => c[i])));
    const corner = (pair) => {
      const voxel = [slice, slice, slice];
      others.forEach((a, i) => {
        voxel[a] = pair[i];
      });
      return voxel;
    };
    within(scan, corner(low), corner(high), (v) => {
      if (
        inside(
          others.map((a) => v[a]),
          outline,
        )
      )
        mask[at(scan, v)] = on ? 1 : 0;
    });
  }
  for (const { on, voxels } of said.scribbles ?? [])
    for (const v of voxels) ball(scan, mask, onScan(scan, v, "the stroke's voxel"), 2, on);
  for (const { from, to } of said.lines ?? []) {
    const middle = from.map((f, a) => Math.round((f + to[a]) / 2));
    const mm = Math.hypot(...from.map((f, a) => (to[a] - f) * scan.spacing[a])) / 2;
    ball(scan, mask, onScan(scan, middle, "the line's middle"), mm, true);
  }
  for (const { at: voxel, on } of said.points ?? [])
    ball(scan, mask, onScan(scan, voxel, "the point"), on ? RADIUS_MM : RADIUS_MM / 3, on);
  return mask;
}

function answer(res, object, before, started) {
  const { scan } = object,
    mask = object.history[object.step];
  const low = [...scan.shape],
    high = [-1, -1, -1],
    first = [...scan.shape],
    last = [-1, -1, -1];
  let voxels = 0,
    changed = 0;
  within(scan, [0, 0, 0], scan.shape, (v) => {
    const i = at(scan, v);
    if (mask[i]) {
      voxels++;
      v.forEach((c, a) => {
        first[a] = Math.min(first[a], c);
        last[a] = Math.max(last[a], c);
      });
    }
    if (mask[i] !== before[i]) {
      changed++;
      v.forEach((c, a) => {
        low[a] = Math.min(low[a], c);
        high[a] = Math.max(high[a], c);
      });
    }
  });
  const region = changed ? low.map((l, a) => [l, high[a] + 1]) : null;
  let body = Buffer.alloc(0);
  if (region) {
    const size = region.map(([l, h]) => h - l);
    body = Buffer.alloc(Math.ceil((size[0] * size[1] * size[2]) / 8));
    let bit = 0;
    within(scan, low, high, (v) => {
      if (mask[at(scan, v)]) body[bit >> 3] |= 1 << (bit & 7);
      bit++;
    });
  }
  const ml = (voxels * scan.spacing.reduce((a, b) => a * b)) / 1000;
  const said = {
    step: object.step,
    undo: object.step > 0,
    redo: object.step + 1 < object.history.length,
    voxels,
    ml,
    extent_mm: voxels ? last.map((l, a) => (l - first[a] + 1) * scan.spacing[a]) : null,
    // Of the box: what is drawn here is round.
    diameters_mm: voxels
      ? [0, 1].map((a) => (last[a] - first[a] + 1) * scan.spacing[a]).sort((a, b) => b - a)
      : null,
    diameters_slice: voxels ? first[2] : null,
    score: voxels ? 0.84 : null,
    changed,
    region,
    notes: object.step === 1 ? ["looked at two scales"] : [],
    seconds: (Date.now() - started) / 1000,
  };
  res.writeHead(200, {
    "Content-Type": "application/octet-stream",
    "Content-Length": body.length,
    "X-Prism-Answer": JSON.stringify(said),
  });
  res.end(body);
}

/** The object's voxels at its ends along x. */
function unsure(res, { scan, history, step }) {
  const mask = history[step],
    found = [];
  within(scan, [0, 0, 0], scan.shape, ([x, y, z]) => {
    if (!mask[at(scan, [x, y, z])]) return;
    const beside = [x - 1, x + 1].some(
      (n) => n < 0 || n >= scan.shape[0] || !mask[at(scan, [n, y, z])],
    );
    if (beside) found.push([x, y, z]);
  });
  const region = found.length
    ? [0, 1, 2].map((a) => {
        const along = found.map((v) => v[a]);
        return [along.reduce((m, v) => Math.min(m, v)), along.reduce((m, v) => Math.max(m, v)) + 1];
      })
    : null;
  const size = (region ?? []).map(([from, to]) => to - from);
  const body = Buffer.alloc(region ? Math.ceil(size.reduce((n, s) => n * s) / 8) : 0);
  for (const v of found) {
    const [x, y, z] = v.map((c, a) => c - region[a][0]);
    const bit = (z * size[1] + y) * size[0] + x;
    body[bit >> 3] |= 1 << (bit & 7);
  }
  res.writeHead(200, {
    "Content-Type": "application/octet-stream",
    "Content-Length": body.length,
    "X-Prism-Answer": JSON.stringify({ voxels: found.length, region }),
  });
  res.end(body);
}

function json(res, status, value) {
  const body = Buffer.from(JSON.stringify(value));
  res.writeHead(status, { "Content-Type": "application/json", "Content-Length": body.length });
  res.end(body);
}

function known(map, key, what) {
  const found = map.get(key);
  if (!found) throw new Refused(404, `${what} ${key} is not known here`);
  return found;
}

/** The files of a zip archive that is not packed, by their names: it is read as others read it. */
function filesOf(bytes) {
  const end = bytes.lastIndexOf(Buffer.from("PK\x05\x06"));
  if (end < 0) throw new Error("no zip archive");
  const files = new Map();
  let at = bytes.readUInt32LE(end + 16);
  for (let n = bytes.readUInt16LE(end + 10); n > 0; n--) {
    const [size, length] = [bytes.readUInt32LE(at + 24), bytes.readUInt16LE(at + 28)];
    const place = bytes.readUInt32LE(at + 42);
    const name = bytes.toString("utf8", at + 46, at + 46 + length);
    if (bytes.readUInt32LE(at) !== 0x02014b50 || bytes.readUInt32LE(place) !== 0x04034b50)
      throw new Error(`${name} is not where the archive says`);
    const start = place + 30 + bytes.readUInt16LE(place + 26) + bytes.readUInt16LE(place + 28);
    files.set(name, bytes.subarray(start, start + size));
    at += 46 + length;
  }
  return files;
}

/** Two series of whatever DICOM is sent; each has the example's voxels. */
const SERIES = ["Thorax soft", "Thorax lung"].map((description, n) => ({
  series: `1.2.${n}`,
  number: String(n + 2),
  modality: "CT",
  description,
  shape: [160, 160, 28],
  volumes: 1,
  spacing: [1, 1, 3],
  localizer: false,
}));

const scanOf = ({ scan, name, shape, spacing, affine, format }) => ({
  scan,
  name,
  shape,
  spacing,
  affine,
  modality: "ct",
  format,
  notes: ["treated as CT (as given), normalised by the model's statistics"],
});

function objectOf({ object, name, colour, history, step }) {
  return { object, name, colour, voxels: history[step].reduce((n, v) => n + v, 0) };
}

function attach(res, format, name, image) {
  const body = writeImage(format, image);
  res.writeHead(200, {
    "Content-Type": "application/octet-stream",
    "Content-Length": body.length,
    "Content-Disposition": `attachment; filename="${name}.${format}"`,
  });
  res.end(body);
}

async function api(req, res, url, body) {
  const started = Date.now();
  const [, , kind, key, part] = url.pathname.split("/");
  const route = `${req.method} ${kind ?? ""}${key ? "/ID" : ""}${part ? `/${part}` : ""}`;
  const said = () => {
    try {
      return body.length ? JSON.parse(body) : {};
    } catch (error) {
      throw new Refused(400, `the body is no JSON: ${error.message}`);
    }
  };
  if (delay) await new Promise((go) => setTimeout(go, delay));
  switch (route) {
    case "GET ":
      return json(res, 200, {
        program: "prism",
        version: "mock",
        model: "mock",
        device: "cpu",
        colours: [
          [255, 199, 0],
          [86, 180, 233],
        ],
        limits: { scan_bytes: 2 ** 31, sessions: 16 },
      });
    case "POST scans": {
      const name = url.searchParams.get("name") ?? "";
      const isDicom = name.endsWith(".zip");
      let image;
      try {
        if (isDicom) {
          const files = filesOf(body);
          for (const [path, bytes] of files)
            if (bytes.toString("latin1", 128, 132) !== "DICM")
              throw new Error(`${path} is no DICOM`);
          archives.push([...files.keys()]);
          const asked = url.searchParams.get("series");
          if (!SERIES.some(({ series }) => series === asked))
            return json(res, 409, { error: "holds several series", series: SERIES });
        }
        image = readImage(isDicom ? LUNG : name, isDicom ? await readFile(LUNG) : body);
      } catch (error) {
        throw new Refused(400, `${name}: ${error.message}`);
      }
      const scan = {
        scan: id(),
        name,
        shape: image.shape,
        affine: image.affine,
        objects: [],
        format: isDicom ? "DICOM" : "NIfTI-1",
        spacing: [0, 1, 2].map((c) => Math.hypot(...[0, 1, 2].map((r) => image.affine[r][c]))),
      };
      scans.set(scan.scan, scan);
      return json(res, 201, scanOf(scan));
    }
    case "GET scans/ID": {
      const scan = known(scans, key, "scan");
      return json(res, 200, { ...scanOf(scan), objects: scan.objects.map(objectOf) });
    }
    case "GET scans/ID/image": {
      known(scans, key, "scan");
      const bytes = gunzipSync(await readFile(LUNG));
      res.writeHead(200, {
        "Content-Type": "application/octet-stream",
        "Content-Length": bytes.length,
        "Content-Disposition": 'attachment; filename="scan.nii"',
      });
      return res.end(bytes);
    }
    case "DELETE scans/ID":
      for (const object of scans.get(key)?.objects ?? []) objects.delete(object.object);
      scans.delete(key);
      return json(res, 200, { released: true });
    case "POST scans/ID/objects": {
      const scan = known(scans, key, "scan");
      const { name = "object", colour = [230, 60, 60] } = said();
      const empty = new Uint8Array(scan.shape[0] * scan.shape[1] * scan.shape[2]);
      const object = { object: id(), name, colour, scan, history: [empty], step: 0 };
      objects.set(object.object, object);
      scan.objects.push(object);
      return json(res, 201, objectOf(object));
    }
    case "PATCH objects/ID": {
      const object = known(objects, key, "object");
      const { name = object.name, colour = object.colour } = said();
      Object.assign(object, { name, colour });
      return json(res, 200, objectOf(object));
    }
    case "DELETE objects/ID": {
      const object = objects.get(key);
      if (object) object.scan.objects = object.scan.objects.filter((o) => o !== object);
      objects.delete(key);
      return json(res, 200, { released: true });
    }
    case "POST objects/ID/prepare":
      known(objects, key, "object");
      return json(res, 202, { places: 6 });
    case "POST objects/ID/prompts":
    case "PUT objects/ID/mask":
    case "POST objects/ID/undo":
    case "POST objects/ID/redo":
    case "POST objects/ID/reset": {
      const object = known(objects, key, "object");
      const before = object.history[object.step];
      if (part === "undo" || part === "redo") {
        const next = object.step + (part === "undo" ? -1 : 1);
        if (!object.history[next]) throw new Refused(409, `there is nothing to ${part}`);
        object.step = next;
      } else if (part === "reset") {
        object.history = [new Uint8Array(before.length)];
        object.step = 0;
      } else {
        let next;
        if (part === "prompts") {
          prompts.push(said());
          next = interact(object.scan, before, said());
        } else {
          const image = readImage(url.searchParams.get("name") ?? "mask.nii.gz", body);
          if (image.shape.join() !== object.scan.shape.join())
            throw new Refused(400, `a mask of ${image.shape}: expected ${object.scan.shape}`);
          next = Uint8Array.from(image.values, (v) => (v ? 1 : 0));
        }
        object.history = [...object.history.slice(0, object.step + 1), next];
        object.step++;
      }
      return answer(res, object, before, started);
    }
    case "GET objects/ID/answer": {
      const object = known(objects, key, "object");
      return answer(res, object, new Uint8Array(object.history[0].length), started);
    }
    case "GET objects/ID/unsure": {
      const object = known(objects, key, "object");
      return unsure(res, object);
    }
    case "GET objects/ID/mask": {
      const object = known(objects, key, "object");
      const format = url.searchParams.get("format") ?? "nii.gz";
      return attach(res, format, `${object.name.replace(/\W+/g, "_")}`, {
        ...object.scan,
        values: object.history[object.step],
      });
    }
    case "GET scans/ID/labels": {
      const scan = known(scans, key, "scan");
      const labels = new Uint8Array(scan.shape[0] * scan.shape[1] * scan.shape[2]);
      scan.objects.forEach(({ history, step }, n) => {
        history[step].forEach((v, i) => {
          if (v) labels[i] = n + 1;
        });
      });
      return attach(res, url.searchParams.get("format") ?? "nii.gz", "labels", {
        ...scan,
        values: labels,
      });
    }
    default:
      throw new Refused(
        404,
        `${req.method} ${url.pathname}: this server speaks prism's HTTP ` + "interface below /v1",
      );
  }
}

async function page(res, path) {
  const name = path === "/" ? "index.html" : path.slice(1);
  if (!/^[\w.-]+$/.test(name)) throw new Refused(404, `${path}: no such file`);
  const headers = {
    "Content-Type": TYPES[name.split(".").pop()] ?? "application/octet-stream",
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
  };
  let bytes = await readFile(join(PAGE, name)).catch(() => null);
  if (!bytes) {
    bytes = await readFile(join(PAGE, `${name}.gz`)).catch(() => null);
    if (!bytes) throw new Refused(404, `${path}: no such file`);
    headers["Content-Encoding"] = "gzip";
  }
  res.writeHead(200, { ...headers, "Content-Length": bytes.length });
  res.end(bytes);
}

/** The mock, listening at a port of the loopback (0: any that is free). */
export function serve(port = 0, token = "") {
  const server = createServer(async (req, res) => {
    const url = new URL(req.url, "http://mock");
    const chunks = [];
    for await (const chunk of req) chunks.push(chunk);
    const body = Buffer.concat(chunks);
    try {
      if (url.pathname === "/healthz") return json(res, 200, { ok: true });
      if (url.pathname === "/mock/prompts") return json(res, 200, prompts);
      if (url.pathname === "/mock/archives") return json(res, 200, archives);
      if (url.pathname === "/mock/forget") {
        // as a server that was started anew
        scans.clear();
        objects.clear();
        return json(res, 200, {});
      }
      if (url.pathname === "/mock/delay") {
        delay = Number(url.searchParams.get("ms"));
        return json(res, 200, { delay });
      }
      if (!url.pathname.startsWith("/v1")) return await page(res, url.pathname);
      if (token && req.headers.authorization !== `Bearer ${token}`)
        throw new Refused(401, "no token, or another: expected Authorization: Bearer TOKEN");
      return await api(req, res, url, body);
    } catch (error) {
      if (!(error instanceof Refused)) console.error(error);
      return json(res, error.status ?? 500, { error: error.message });
    }
  });
  return new Promise((go) => server.listen(port, "127.0.0.1", () => go(server)));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const server = await serve(Number(process.argv[2] ?? 8765), process.argv[3] ?? "");
  const token = process.argv[3] ? `#token=${process.argv[3]}` : "";
  console.log(`http://127.0.0.1:${server.address().port}/${token}`);
}
