// The masks of all objects, as bits, and the one array of labels that the viewer draws.

const EMPTY = () => ({ low: [Infinity, Infinity, Infinity], high: [-1, -1, -1] });

function join(box, other) {
  for (let i = 0; i < 3; i++) {
    box.low[i] = Math.min(box.low[i], other.low[i]);
    box.high[i] = Math.max(box.high[i], other.high[i]);
  }
}

/** One object's mask: a bit a voxel, in the viewer's order. */
export class Mask {
  constructor(voxels) {
    this.bits = new Uint8Array(Math.ceil(voxels / 8));
    this.count = 0;
    // What was ever changed lies in it, in the viewer's order, both corners included.
    this.box = EMPTY();
  }

  has(index) {
    return (this.bits[index >> 3] >> (index & 7)) & 1;
  }

  /** The middle of its voxels on a slice of one of the viewer's axes; null where it has none. */
  middle(grid, through, slice) {
    const low = [...this.box.low],
      high = [...this.box.high],
      sum = [0, 0, 0];
    low[through] = high[through] = slice;
    let count = 0;
    for (let z = low[2]; z <= high[2]; z++) {
      for (let y = low[1]; y <= high[1]; y++) {
        for (let x = low[0]; x <= high[0]; x++) {
          if (!this.has(grid.index([x, y, z]))) continue;
          [x, y, z].forEach((v, i) => {
            sum[i] += v;
          });
          count++;
        }
      }
    }
    return count ? sum.map((v) => Math.round(v / count)) : null;
  }
}

/** The labels of the viewer: of the objects at a voxel, the last that is shown. */
export class Labels {
  constructor(grid, array) {
    this.grid = grid;
    this.array = array;
    this.masks = [];
  }

  /** Takes an object's mask among those that are drawn; its place decides the value. */
  add() {
    const mask = new Mask(this.grid.voxels);
    mask.shown = true;
    this.masks.push(mask);
    return mask;
  }

  /** Takes a mask away; the values of the ones after it move down. */
  remove(mask) {
    const box = this.masks.reduce((all, m) => (join(all, m.box), all), EMPTY());
    this.masks = this.masks.filter((m) => m !== mask);
    return this.paint(box);
  }

  /**
   * Writes what an answer says of a region into a mask. Returns the region in the viewer's order,
   * or null where nothing changed.
   */
  apply(mask, region, bits) {
    if (!region) return null;
    const { stride, origin } = this.grid;
    const [[x0, x1], [y0, y1], [z0, z1]] = region;
    const last = [x1 - 1, y1 - 1, z1 - 1];
    let bit = 0,
      count = mask.count;
    for (let z = z0; z < z1; z++) {
      for (let y = y0; y < y1; y++) {
        let index = origin + x0 * stride[0] + y * stride[1] + z * stride[2];
        for (let x = x0; x < x1; x++, bit++, index += stride[0]) {
          const on = (bits[bit >> 3] >> (bit & 7)) & 1,
            at = index >> 3,
            place = 1 << (index & 7);
          const was = mask.bits[at] & place ? 1 : 0;
          if (on !== was) {
            mask.bits[at] ^= place;
            count += on - was;
          }
        }
      }
    }
    mask.count = count;
    const a = this.grid.toRas([x0, y0, z0]),
      b = this.grid.toRas(last);
    const box = {
      low: a.map((v, i) => Math.min(v, b[i])),
      high: a.map((v, i) => Math.max(v, b[i])),
    };
    join(mask.box, box);
    return this.paint(box);
  }

  /** Empties a mask; what it was is to be painted anew. */
  clear(mask) {
    mask.bits.fill(0);
    mask.count = 0;
    return this.paint(mask.box);
  }

  /** Writes the labels within a box anew. Returns the box, or null where it is empty. */
  paint(box) {
    const { low, high } = box;
    if (high[0] < low[0]) return null;
    const { ras } = this.grid,
      shown = this.masks.map((m) => m.shown);
    for (let z = low[2]; z <= high[2]; z++) {
      for (let y = low[1]; y <= high[1]; y++) {
        let index = low[0] + ras[0] * (y + ras[1] * z);
        for (let x = low[0]; x <= high[0]; x++, index++) {
          let value = 0;
          for (let n = this.masks.length - 1; n >= 0; n--) {
            if (shown[n] && this.masks[n].has(index)) {
              value = n + 1;
              break;
            }
          }
          this.array[index] = value;
        }
      }
    }
    return { low: [...low], high: [...high] };
  }

  /** How many voxels are drawn: for tests. */
  drawn() {
    let n = 0;
    for (const value of this.array) if (value) n++;
    return n;
  }
}

/** A mask as an uncompressed NIfTI file on the scan's grid, in the file's own order. */
export function niftiOf(mask, grid, spacing, affine) {
  const out = new Uint8Array(352 + grid.voxels);
  const view = new DataView(out.buffer);
  view.setInt32(0, 348, true);
  [3, ...grid.shape, 1, 1, 1, 1].forEach((n, i) => view.setInt16(40 + 2 * i, n, true));
  view.setInt16(70, 2, true); // uint8
  view.setInt16(72, 8, true);
  [1, ...spacing].forEach((mm, i) => view.setFloat32(76 + 4 * i, mm, true));
  view.setFloat32(108, 352, true);
  view.setFloat32(112, 1, true);
  out[123] = 2; // mm
  view.setInt16(254, 1, true);
  for (let r = 0; r < 3; r++) {
    for (let c = 0; c < 4; c++) view.setFloat32(280 + 16 * r + 4 * c, affine[r][c], true);
  }
  out.set([0x6e, 0x2b, 0x31, 0], 344);
  const [nx, ny, nz] = grid.shape,
    { stride, origin } = grid;
  let at = 352;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      let index = origin + y * stride[1] + z * stride[2];
      for (let x = 0; x < nx; x++, index += stride[0]) out[at++] = mask.has(index);
    }
  }
  return new Blob([out], { type: "application/octet-stream" });
}
