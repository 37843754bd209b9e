// DICOM for the tests of the page: a series written from an image, and what a file holds, element by
// element. Nothing of prism's own has a part in it.
import { mkdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";

const CT = "1.2.840.10008.5.1.4.1.1.2",
  EXPLICIT = "1.2.840.10008.1.2.1",
  ROOT = "1.2.826.0.1.3680043.10.543.77";
/** Value representations whose length has four bytes. */
const LONG = new Set(["OB", "OW", "OF", "OD", "OL", "SQ", "UC", "UR", "UT", "UN"]);

function element(tag, vr, value) {
  let bytes = value;
  if (typeof value === "string") {
    bytes = Buffer.from(value, "latin1");
    if (bytes.length % 2) bytes = Buffer.concat([bytes, Buffer.from(vr === "UI" ? "\0" : " ")]);
  } else if (typeof value === "number") {
    bytes = Buffer.alloc(vr === "US" ? 2 : 4);
    bytes.writeUIntLE(value, 0, bytes.length);
  }
  const head = Buffer.alloc(LONG.has(vr) ? 12 : 8);
  head.writeUInt16LE(tag >>> 16, 0);
  head.writeUInt16LE(tag & 0xffff, 2);
  head.write(vr, 4, "latin1");
  if (LONG.has(vr)) head.writeUInt32LE(bytes.length, 8);
  else head.writeUInt16LE(bytes.length, 6);
  return Buffer.concat([head, bytes]);
}

const numbers = (list) => list.map((v) => String(Number(v.toFixed(6)))).join("\\");

/**
 * Writes an image of whole numbers as a series of CT slices into a folder: the slices in two folders,
 * under names and numbers that say nothing of their order, and a file beside them that is none.
 */
export async function writeSeries(folder, { shape, affine, values }) {
  const [ni, nj, nk] = shape;
  // Millimetres of DICOM run to the left, the back and the head.
  const lps = affine.slice(0, 3).map((row, r) => row.map((v) => (r < 2 ? -v : v)));
  const step = [0, 1, 2].map((c) => Math.hypot(...lps.map((row) => row[c])));
  const along = [0, 1].flatMap((c) => lps.map((row) => row[c] / step[c]));
  for (let k = 0; k < nk; k++) {
    const shuffled = k % 2 ? k >> 1 : nk - 1 - (k >> 1),
      uid = `${ROOT}.3.${shuffled + 1}`;
    const pixels = Buffer.alloc(2 * ni * nj);
    for (let at = 0; at < ni * nj; at++) pixels.writeInt16LE(values[k * ni * nj + at], 2 * at);
    const meta = Buffer.concat([
      element(0x00020001, "OB", Buffer.from([0, 1])),
      element(0x00020002, "UI", CT),
      element(0x00020003, "UI", uid),
      element(0x00020010, "UI", EXPLICIT),
      element(0x00020012, "UI", ROOT),
    ]);
    const file = Buffer.concat([
      Buffer.alloc(128),
      Buffer.from("DICM"),
      element(0x00020000, "UL", meta.length),
      meta,
      element(0x00080016, "UI", CT),
      element(0x00080018, "UI", uid),
      element(0x00080020, "DA", "20260102"),
      element(0x00080060, "CS", "CT"),
      element(0x0008103e, "LO", "Thorax soft"),
      element(0x00100010, "PN", "Made^Up"),
      element(0x00100020, "LO", "M-1"),
      element(0x0020000d, "UI", `${ROOT}.1`),
      element(0x0020000e, "UI", `${ROOT}.2`),
      element(0x00200011, "IS", "2"),
      element(0x00200013, "IS", String(shuffled + 1)),
      element(0x00200032, "DS", numbers(lps.map((row) => row[2] * k + row[3]))),
      element(0x00200037, "DS", numbers(along)),
      element(0x00200052, "UI", `${ROOT}.4`),
      element(0x00280002, "US", 1),
      element(0x00280004, "CS", "MONOCHROME2"),
      element(0x00280010, "US", nj),
      element(0x00280011, "US", ni),
      element(0x00280030, "DS", numbers([step[1], step[0]])),
      element(0x00280100, "US", 16),
      element(0x00280101, "US", 16),
      element(0x00280102, "US", 15),
      element(0x00280103, "US", 1),
      element(0x00281052, "DS", "0"),
      element(0x00281053, "DS", "1"),
      element(0x7fe00010, "OW", pixels),
    ]);
    const path = join(folder, k % 2 ? "more" : ".", `IM${String(shuffled).padStart(4, "0")}`);
    await mkdir(dirname(path), { recursive: true });
    await writeFile(path, file);
  }
  await writeFile(join(folder, "notes.txt"), "no slice");
}

/** Identifiers and times that a segmentation is given when it is made, and how long they are. */
const OWN =
  /(00020000|00020003|00080012|00080013|00080018|00080021|00080023|00080031|00080033|00209164)$/;

/**
 * What a file of explicit little endian holds: `[path, value in hexadecimal digits]` of each element,
 * items numbered, without what differs from one segmentation of a mask to the next.
 */
export function contents(bytes) {
  const found = [];
  const tagAt = (at) =>
    [0, 2]
      .map((by) =>
        bytes
          .readUInt16LE(at + by)
          .toString(16)
          .padStart(4, "0"),
      )
      .join("");
  /** Reads up to `end`, or to what ends an item or a sequence. Returns where it stopped. */
  const elements = (at, end, path) => {
    while (at < end) {
      const tag = tagAt(at);
      if (tag === "fffee00d") return at + 8;
      const vr = bytes.toString("latin1", at + 4, at + 6),
        long = LONG.has(vr);
      const length = long ? bytes.readUInt32LE(at + 8) : bytes.readUInt16LE(at + 6);
      at += long ? 12 : 8;
      if (vr === "SQ") {
        at = items(at, length === 0xffffffff ? bytes.length : at + length, `${path}${tag}`);
        continue;
      }
      // The identifier of its own series, not of those that it refers to.
      if (!OWN.test(tag) && `${path}${tag}` !== "0020000e")
        found.push([`${path}${tag}`, bytes.toString("hex", at, at + length)]);
      at += length;
    }
    return at;
  };
  const items = (at, end, path) => {
    for (let n = 1; at < end; n++) {
      const tag = tagAt(at),
        length = bytes.readUInt32LE(at + 4);
      at += 8;
      if (tag === "fffee0dd") return at;
      at = elements(at, length === 0xffffffff ? bytes.length : at + length, `${path}/${n}/`);
    }
    return at;
  };
  elements(132, bytes.length, "");
  return found;
}
