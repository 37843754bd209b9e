// Scans and masks as files, read and written without NiiVue: what the mock of the server and the
// test of the geometry stand on. Voxels are in the file's own order, the first axis fastest.
import { gunzipSync, gzipSync, inflateSync } from "node:zlib";

const NIFTI_TYPES = {
  2: ["Uint8", 1],
  4: ["Int16", 2],
  8: ["Int32", 4],
  16: ["Float32", 4],
  64: ["Float64", 8],
  256: ["Int8", 1],
  512: ["Uint16", 2],
  768: ["Uint32", 4],
};

function quaternion(b, c, d, q) {
  const a = Math.sqrt(Math.max(0, 1 - b * b - c * c - d * d));
  return [
    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
  ].map((row) => [row[0], row[1], row[2] * q]);
}

function readNifti(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = view.getInt32(0, true) === 348;
  if (!little && view.getInt32(0, false) !== 348) throw new Error("not NIfTI-1");
  const i16 = (at) => view.getInt16(at, little),
    f32 = (at) => view.getFloat32(at, little);
  const shape = [1, 2, 3].map((i) => Math.max(1, i16(40 + 2 * i)));
  const spacing = [1, 2, 3].map((i) => f32(76 + 4 * i) || 1);
  const qform = i16(252),
    sform = i16(254);
  let affine;
  if (sform > 0) {
    affine = [0, 1, 2].map((r) => [0, 1, 2, 3].map((c) => f32(280 + 16 * r + 4 * c)));
  } else if (qform > 0) {
    const turn = quaternion(f32(256), f32(260), f32(264), f32(76) < 0 ? -1 : 1);
    affine = turn.map((row, r) => [...row.map((v, c) => v * spacing[c]), f32(268 + 4 * r)]);
  } else {
    affine = [0, 1, 2].map((r) => [0, 1, 2].map((c) => (r === c ? spacing[c] : 0)).concat(0));
  }
  affine.push([0, 0, 0, 1]);
  const [type, size] = NIFTI_TYPES[i16(70)] ?? [];
  if (!type) throw new Error(`NIfTI data type ${i16(70)}: expected a number`);
  return { shape, affine, values: values(bytes, f32(108), shape, type, size, little) };
}

function values(bytes, at, shape, type, size, little) {
  const n = shape[0] * shape[1] * shape[2];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (at + n * size > bytes.byteLength) throw new Error("the file ends before its voxels do");
  const out = new Float64Array(n);
  for (let i = 0; i < n; i++) out[i] = view[`get${type}`](at + i * size, little);
  return out;
}

const NAMED_TYPES = {
  uchar: ["Uint8", 1],
  "unsigned char": ["Uint8", 1],
  uint8: ["Uint8", 1],
  short: ["Int16", 2],
  int16: ["Int16", 2],
  ushort: ["Uint16", 2],
  "unsigned short": ["Uint16", 2],
  uint16: ["Uint16", 2],
  int: ["Int32", 4],
  int32: ["Int32", 4],
  float: ["Float32", 4],
  double: ["Float64", 8],
  met_uchar: ["Uint8", 1],
  met_short: ["Int16", 2],
  met_ushort: ["Uint16", 2],
  met_int: ["Int32", 4],
  met_float: ["Float32", 4],
  met_double: ["Float64", 8],
};

function typed(name) {
  const found = NAMED_TYPES[name.toLowerCase()];
  if (!found) throw new Error(`element type ${name}: expected a number`);
  return found;
}

function readNrrd(bytes) {
  const end = bytes.indexOf("\n\n");
  const fields = Object.fromEntries(
    bytes
      .subarray(0, end)
      .toString("latin1")
      .split("\n")
      .slice(1)
      .filter((line) => line.includes(":") && !line.startsWith("#"))
      .map((line) => [
        line.slice(0, line.indexOf(":")),
        line
          .slice(line.indexOf(":") + 1)
          .replace(/^=/, "")
          .trim(),
      ]),
  );
  const shape = fields.sizes.split(/\s+/).map(Number);
  const columns = [...fields["space directions"].matchAll(/\(([^)]*)\)/g)].map((m) =>
    m[1].split(",").map(Number),
  );
  const origin = fields["space origin"].replace(/[()]/g, "").split(",").map(Number);
  const space = fields.space.toLowerCase();
  const sign =
    space.startsWith("left-posterior") || space === "lps"
      ? [-1, -1, 1]
      : space.startsWith("left") || space === "las"
        ? [-1, 1, 1]
        : [1, 1, 1];
  const affine = [0, 1, 2]
    .map((r) => [0, 1, 2].map((c) => sign[r] * columns[c][r]).concat(sign[r] * origin[r]))
    .concat([[0, 0, 0, 1]]);
  const data = bytes.subarray(end + 2);
  const raw = /gz/.test(fields.encoding) ? gunzipSync(data) : data;
  const [type, size] = typed(fields.type);
  return { shape, affine, values: values(raw, 0, shape, type, size, fields.endian !== "big") };
}

function readMha(bytes) {
  const mark = bytes.indexOf("ElementDataFile");
  const end = bytes.indexOf("\n", mark);
  const fields = Object.fromEntries(
    bytes
      .subarray(0, end)
      .toString("latin1")
      .split(/\r?\n/)
      .map((line) => line.split(/\s*=\s*/))
      .filter((pair) => pair.length === 2),
  );
  const numbers = (name, otherwise) => (fields[name] ?? otherwise).trim().split(/\s+/).map(Number);
  const shape = numbers("DimSize"),
    spacing = numbers("ElementSpacing", "1 1 1");
  const turn = numbers("TransformMatrix", "1 0 0 0 1 0 0 0 1"),
    at = numbers("Offset", "0 0 0");
  const sign = [-1, -1, 1];
  const affine = [0, 1, 2]
    .map((r) =>
      [0, 1, 2].map((c) => sign[r] * turn[3 * c + r] * spacing[c]).concat(sign[r] * at[r]),
    )
    .concat([[0, 0, 0, 1]]);
  const data = bytes.subarray(end + 1);
  const raw = /true/i.test(fields.CompressedData ?? "") ? inflateSync(data) : data;
  const [type, size] = typed(fields.ElementType);
  const big = /true/i.test(fields.BinaryDataByteOrderMSB ?? "");
  return { shape, affine, values: values(raw, 0, shape, type, size, !big) };
}

/** The image in a file: its shape, its affine (voxel to RAS mm) and its values. */
export function readImage(name, bytes) {
  if (/\.nii\.gz$/i.test(name)) return readNifti(gunzipSync(bytes));
  if (/\.nii$/i.test(name)) return readNifti(bytes);
  if (/\.nrrd$/i.test(name)) return readNrrd(bytes);
  if (/\.mha$/i.test(name)) return readMha(bytes);
  throw new Error(`${name}: expected a name that ends in .nii, .nii.gz, .nrrd or .mha`);
}

const length = (affine, c) => Math.hypot(affine[0][c], affine[1][c], affine[2][c]);

function niftiBytes({ shape, affine, values: data }, code, size, set) {
  const out = Buffer.alloc(352 + data.length * size);
  out.writeInt32LE(348, 0);
  [3, ...shape, 1, 1, 1, 1].forEach((v, i) => out.writeInt16LE(v, 40 + 2 * i));
  out.writeInt16LE(code, 70);
  out.writeInt16LE(size * 8, 72);
  [1, 0, 1, 2].forEach((v, c) => out.writeFloatLE(c ? length(affine, c - 1) : v, 76 + 4 * c));
  out.writeFloatLE(352, 108);
  out.writeFloatLE(1, 112);
  out[123] = 2;
  out.writeInt16LE(1, 254);
  affine
    .slice(0, 3)
    .forEach((row, r) => row.forEach((v, c) => out.writeFloatLE(v, 280 + 16 * r + 4 * c)));
  out.write("n+1\0", 344, "latin1");
  for (let i = 0; i < data.length; i++) set(out, data[i], 352 + i * size);
  return out;
}

/** The bytes of an image as a file of a format; int16 for scans, one byte a voxel for masks. */
export function writeImage(format, image, scan = false) {
  const [size, set] = scan
    ? [2, (out, v, at) => out.writeInt16LE(v, at)]
    : [1, (out, v, at) => out.writeUInt8(v, at)];
  if (format === "nii" || format === "nii.gz") {
    const bytes = niftiBytes(image, scan ? 4 : 2, size, set);
    return format === "nii" ? bytes : gzipSync(bytes);
  }
  const { shape, affine, values: data } = image;
  const raw = Buffer.alloc(data.length * size);
  for (let i = 0; i < data.length; i++) set(raw, data[i], i * size);
  const lps = affine.slice(0, 3).map((row, r) => row.map((v) => (r < 2 ? -v : v)));
  if (format === "nrrd" || format === "seg.nrrd") {
    const columns = [0, 1, 2].map((c) => `(${lps.map((row) => row[c]).join(",")})`).join(" ");
    const head = [
      "NRRD0004",
      `type: ${scan ? "int16" : "uint8"}`,
      "dimension: 3",
      "space: left-posterior-superior",
      `sizes: ${shape.join(" ")}`,
      `space directions: ${columns}`,
      "endian: little",
      "encoding: gzip",
      `space origin: (${lps.map((row) => row[3]).join(",")})`,
    ];
    if (format === "seg.nrrd") head.push("Segment0_Name:=object", "Segment0_LabelValue:=1");
    return Buffer.concat([Buffer.from(head.join("\n") + "\n\n"), gzipSync(raw)]);
  }
  if (format === "mha") {
    const spacing = [0, 1, 2].map((c) => length(affine, c));
    const turn = [0, 1, 2].flatMap((c) => lps.map((row) => row[c] / spacing[c]));
    const head = [
      "ObjectType = Image",
      "NDims = 3",
      "BinaryData = True",
      "BinaryDataByteOrderMSB = False",
      "CompressedData = False",
      `TransformMatrix = ${turn.join(" ")}`,
      `Offset = ${lps.map((row) => row[3]).join(" ")}`,
      `ElementSpacing = ${spacing.join(" ")}`,
      `DimSize = ${shape.join(" ")}`,
      `ElementType = ${scan ? "MET_SHORT" : "MET_UCHAR"}`,
      "ElementDataFile = LOCAL",
    ];
    return Buffer.concat([Buffer.from(head.join("\n") + "\n"), raw]);
  }
  throw new Error(`format ${format}: expected nii.gz, nii, nrrd, seg.nrrd or mha`);
}
