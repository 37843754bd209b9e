// DICOM as it is dropped or chosen: folders, files, archives. The page does not read it: the files
// go to the server in a zip archive, which is not packed and made here.

/** Files that are looked at, at most; an archive's directory counts no more. */
const MOST = 65000;
/** Bytes of an archive, at most: beyond it places have no room in its directory. */
const LARGEST = 2 ** 32 - 2 ** 24;

/** What is dropped, folders gone through, as `{ path, file }`. */
export async function dropped(transfer) {
  // The list is empty behind the first pause.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return chosen(transfer.files);
  const found = [];
  for (const entry of entries) await gather(entry, "", found);
  return found;
}

/** What lies in the files that an input has. */
export const chosen = (files) =>
  enough([...files].map((file) => ({ path: file.webkitRelativePath || file.name, file })));

function enough(found) {
  if (found.length > MOST)
    throw new Error(`more than ${MOST} files: choose the folder of one study`);
  return found;
}

async function gather(entry, before, found) {
  const path = before + entry.name;
  if (entry.isFile) {
    found.push({ path, file: await new Promise((done, fail) => entry.file(done, fail)) });
    enough(found);
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // So many at a time, and none at the end.
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return;
    for (const inner of some) await gather(inner, `${path}/`, found);
  }
}

/** Those that are DICOM: by their content, or by their name where they have no preamble. */
export async function ofDicom(found) {
  const all = [];
  for (const one of found) {
    const mark = new Uint8Array(await one.file.slice(128, 132).arrayBuffer());
    if (String.fromCharCode(...mark) === "DICM" || /\.(dcm|ima)$/i.test(one.path)) all.push(one);
  }
  return all;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function checksum(bytes) {
  let sum = ~0;
  for (const byte of bytes) sum = TABLE[(sum ^ byte) & 255] ^ (sum >>> 8);
  return ~sum >>> 0;
}

/** Numbers as a zip archive has them: `[bytes, value]` each. */
function numbers(list) {
  const view = new DataView(new ArrayBuffer(list.reduce((n, [bytes]) => n + bytes, 0)));
  let at = 0;
  for (const [bytes, value] of list) {
    if (bytes === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += bytes;
  }
  return new Uint8Array(view.buffer);
}

/** A zip archive of files as they are; `progress` is called with the part that is done. */
export async function archived(found, progress = () => {}) {
  const parts = [],
    directory = [];
  let place = 0,
    listed = 0;
  for (const [n, { path, file }] of found.entries()) {
    const name = new TextEncoder().encode(path).slice(0, 1000);
    const sum = checksum(new Uint8Array(await file.arrayBuffer()));
    // Version 2, names in UTF-8, not packed, the first day that it has.
    const about = [
      [2, 20],
      [2, 1 << 11],
      [2, 0],
      [2, 0],
      [2, 0x21],
      [4, sum],
      [4, file.size],
      [4, file.size],
      [2, name.length],
      [2, 0],
    ];
    parts.push(numbers([[4, 0x04034b50], ...about]), name, file);
    const entry = [[4, 0x02014b50], [2, 20], ...about, [2, 0], [2, 0], [2, 0], [4, 0], [4, place]];
    directory.push(numbers(entry), name);
    place += 30 + name.length + file.size;
    listed += 46 + name.length;
    if (place + listed > LARGEST)
      throw new Error("more than 4 GB of DICOM: choose the folder of one series");
    progress((n + 1) / found.length);
  }
  const count = found.length;
  const end = [
    [4, 0x06054b50],
    [2, 0],
    [2, 0],
    [2, count],
    [2, count],
    [4, listed],
    [4, place],
    [2, 0],
  ];
  return new Blob([...parts, ...directory, numbers(end)], { type: "application/zip" });
}
