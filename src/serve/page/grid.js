// Voxels: the order in which a file stores them, which the server speaks, and the order in which
// the viewer shows them, whose axes run to the patient's right, front and head ("RAS").

/** A scan's grid in both orders. A voxel is a list of three indices. */
export class Grid {
  /**
   * `shape` is the file's. `perm[i]` names the file's axis, from 1 on, that the viewer's axis i is
   * nearest to; it is negative where the two run in opposite directions.
   */
  constructor(shape, perm) {
    this.shape = [...shape];
    this.axis = perm.map((p) => Math.abs(p) - 1);
    this.flipped = perm.map((p) => p < 0);
    this.ras = this.axis.map((a) => shape[a]);
    if ([...this.axis].sort().join() !== "0,1,2") throw new Error(`invalid axis order: ${perm}`);
    // How far apart neighbours along the file's axes lie in an array in the viewer's order.
    const steps = [1, this.ras[0], this.ras[0] * this.ras[1]];
    this.stride = [0, 0, 0];
    this.origin = 0;
    for (let i = 0; i < 3; i++) {
      this.stride[this.axis[i]] = this.flipped[i] ? -steps[i] : steps[i];
      if (this.flipped[i]) this.origin += steps[i] * (this.ras[i] - 1);
    }
  }

  get voxels() {
    return this.shape[0] * this.shape[1] * this.shape[2];
  }

  toStored(ras) {
    const stored = [0, 0, 0];
    for (let i = 0; i < 3; i++) {
      stored[this.axis[i]] = this.flipped[i] ? this.ras[i] - 1 - ras[i] : ras[i];
    }
    return stored;
  }

  toRas(stored) {
    return this.axis.map((a, i) => (this.flipped[i] ? this.ras[i] - 1 - stored[a] : stored[a]));
  }

  /** The place of a voxel of the viewer in an array in the viewer's order. */
  index(ras) {
    return ras[0] + this.ras[0] * (ras[1] + this.ras[1] * ras[2]);
  }

  /**
   * A slice of one of the file's axes as panes show it: the viewer's axis through it, and its number
   * there, from 1 on.
   */
  slice(axis, index) {
    const through = this.axis.indexOf(axis);
    const number = this.flipped[through] ? this.ras[through] - index : index + 1;
    return { through, number };
  }

  holds(ras) {
    return ras.every((v, i) => v >= 0 && v < this.ras[i]);
  }

  clamp(ras) {
    return ras.map((v, i) => Math.min(this.ras[i] - 1, Math.max(0, v)));
  }
}

/** Where a voxel's centre lies, in mm, by an affine in rows. */
export function toMm(affine, voxel) {
  return [0, 1, 2].map(
    (r) =>
      affine[r][0] * voxel[0] + affine[r][1] * voxel[1] + affine[r][2] * voxel[2] + affine[r][3],
  );
}

/** Whether two affines agree, within a hundredth of a voxel over the whole scan. */
export function sameAffine(a, b, shape) {
  const size = Math.min(...[0, 1, 2].map((c) => Math.hypot(a[0][c], a[1][c], a[2][c])));
  return [0, 1, 2].every((r) => {
    let off = Math.abs(a[r][3] - b[r][3]);
    for (let c = 0; c < 3; c++) off += Math.abs(a[r][c] - b[r][c]) * shape[c];
    return off <= 0.01 * size;
  });
}

/** The voxels of a straight line from one voxel to another, both included. */
export function line(from, to) {
  const steps = Math.max(...from.map((f, i) => Math.abs(to[i] - f)), 1);
  return Array.from({ length: steps + 1 }, (_, n) =>
    from.map((f, i) => Math.round(f + ((to[i] - f) * n) / steps)),
  );
}
