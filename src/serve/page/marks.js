// What lies over the panes: names, orientation, crosshair, and of the active object the prompts and
// what the network is unsure of.
import { PLANE_NAMES, SPACE } from "./view.js";

const LETTERS = [
  ["L", "R"],
  ["P", "A"],
  ["I", "S"],
];
const ON = "#5fe08a",
  OFF = "#ff7a70",
  LINE = "#eef3f8",
  TEXT = "#aeb9c6",
  UNSURE = "rgba(214,120,255,.55)",
  CROSS = "rgba(120,190,255,.55)";

export class Marks {
  constructor(canvas, view) {
    this.canvas = canvas;
    this.view = view;
    this.context = canvas.getContext("2d");
    this.active = null;
    this.prompts = [];
    this.draft = null;
    /** `{ region, bits }` as the server tells it, or null where it is not to be seen. */
    this.unsure = null;
    this.plane = 0;
  }

  paint() {
    const { canvas, context: c, view } = this;
    const ratio = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (
      canvas.width !== Math.round(width * ratio) ||
      canvas.height !== Math.round(height * ratio)
    ) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    c.font = "12px system-ui, sans-serif";
    for (const tile of view.tiles()) {
      c.save();
      c.beginPath();
      c.rect(tile.left, tile.top, tile.width, tile.height);
      c.clip();
      if (tile.plane !== SPACE) {
        if (this.unsure?.region) this.doubt(tile, this.unsure);
        this.cross(tile);
        for (const said of this.prompts) this.prompt(tile, said, false);
        if (this.draft) this.prompt(tile, this.draft, true);
        this.letters(tile);
      }
      this.title(tile);
      c.restore();
    }
  }

  title(tile) {
    const { context: c, view } = this;
    const slice =
      tile.plane === SPACE ? "" : `  ${view.cross[tile.n] + 1} / ${view.grid.ras[tile.n]}`;
    this.text(
      PLANE_NAMES[tile.plane] + slice,
      tile.left + 8,
      tile.top + 17,
      "left",
      tile.plane === this.plane ? "#e8eef5" : TEXT,
    );
    if (tile.plane === this.plane && view.panes.size > 1) {
      c.strokeStyle = "rgba(90,176,246,.5)";
      c.lineWidth = 1;
      c.strokeRect(tile.left + 0.5, tile.top + 0.5, tile.width - 1, tile.height - 1);
    }
  }

  text(text, x, y, align, colour = TEXT) {
    const { context: c } = this;
    c.textAlign = align;
    c.lineWidth = 3;
    c.strokeStyle = "rgba(5,8,12,.85)";
    c.strokeText(text, x, y);
    c.fillStyle = colour;
    c.fillText(text, x, y);
  }

  letters(tile) {
    const { left, top, width, height, h, v, right, down } = tile;
    const [west, east] = right > 0 ? LETTERS[h] : [...LETTERS[h]].reverse();
    const [north, south] = down > 0 ? LETTERS[v] : [...LETTERS[v]].reverse();
    this.text(west, left + 6, top + height / 2 + 4, "left");
    this.text(east, left + width - 6, top + height / 2 + 4, "right");
    this.text(north, left + width / 2, top + 15, "center");
    this.text(south, left + width / 2, top + height - 6, "center");
  }

  cross(tile) {
    const { context: c, view } = this;
    const [x, y] = tile.put(view.cross).map((p) => Math.round(p) + 0.5),
      gap = 14;
    c.strokeStyle = CROSS;
    c.lineWidth = 1;
    c.beginPath();
    for (const [from, to] of [
      [tile.left, x - gap],
      [x + gap, tile.left + tile.width],
    ]) {
      c.moveTo(from, y);
      c.lineTo(to, y);
    }
    for (const [from, to] of [
      [tile.top, y - gap],
      [y + gap, tile.top + tile.height],
    ]) {
      c.moveTo(x, from);
      c.lineTo(x, to);
    }
    c.stroke();
  }

  /** The marked voxels of a region, as far as they lie on a pane's slice. */
  doubt(tile, { region, bits }) {
    const { context: c, view } = this;
    const { grid, cross } = view;
    const through = grid.axis[tile.n],
      slice = grid.toStored(cross)[through];
    if (slice < region[through][0] || slice >= region[through][1]) return;
    const size = region.map(([from, to]) => to - from);
    const steps = [1, size[0], size[0] * size[1]];
    const [a, b] = [0, 1, 2].filter((axis) => axis !== through);
    const corner = (at, far) => {
      const voxel = [slice, slice, slice];
      voxel[a] = region[a][0] + at[0];
      voxel[b] = region[b][0] + at[1];
      const half = far ? 0.5 : -0.5;
      const ras = grid.toRas(voxel);
      for (const axis of [a, b]) {
        const i = grid.axis.indexOf(axis);
        ras[i] += grid.flipped[i] ? -half : half;
      }
      return tile.put(ras);
    };
    c.fillStyle = UNSURE;
    c.beginPath();
    for (let y = 0; y < size[b]; y++) {
      const row = (slice - region[through][0]) * steps[through] + y * steps[b];
      // Voxels beside each other are one rectangle: there may be many of them.
      for (let x = 0, from = -1; x <= size[a]; x++) {
        const bit = row + x * steps[a];
        const on = x < size[a] && (bits[bit >> 3] >> (bit & 7)) & 1;
        if (on && from < 0) from = x;
        if (on || from < 0) continue;
        const p = corner([from, y], false),
          q = corner([x - 1, y], true);
        c.rect(
          Math.min(p[0], q[0]),
          Math.min(p[1], q[1]),
          Math.abs(q[0] - p[0]),
          Math.abs(q[1] - p[1]),
        );
        from = -1;
      }
    }
    c.fill();
  }

  /** One prompt in stored voxels, as far as it lies on a pane's slice. */
  prompt(tile, said, draft) {
    const { context: c, view } = this;
    const { grid, cross } = view,
      { n } = tile;
    const here = (stored) => {
      const ras = grid.toRas(stored);
      return ras[n] === cross[n] ? tile.put(ras) : null;
    };
    c.lineWidth = 1.5;
    for (const { at, on } of said.points ?? []) {
      const p = here(at);
      if (p) this.sign(p, on);
    }
    if (said.box) {
      const a = grid.toRas(said.box.from),
        b = grid.toRas(said.box.to);
      const low = a.map((v, i) => Math.min(v, b[i])),
        high = a.map((v, i) => Math.max(v, b[i]));
      const inside = cross[n] >= low[n] && cross[n] <= high[n];
      if (inside || draft) {
        const p = tile.put(low.map((v) => v - 0.5)),
          q = tile.put(high.map((v) => v + 0.5));
        c.setLineDash(draft || !inside ? [5, 4] : []);
        c.strokeStyle = LINE;
        c.globalAlpha = inside ? 1 : 0.4;
        c.strokeRect(
          Math.min(p[0], q[0]),
          Math.min(p[1], q[1]),
          Math.abs(q[0] - p[0]),
          Math.abs(q[1] - p[1]),
        );
        c.globalAlpha = 1;
        c.setLineDash([]);
      }
    }
    for (const { on, voxels } of said.scribbles ?? []) {
      const points = voxels.map(here).filter(Boolean);
      c.fillStyle = on ? ON : OFF;
      c.globalAlpha = 0.8;
      const w = Math.max(2, 1 / Math.abs(tile.right)),
        h = Math.max(2, 1 / Math.abs(tile.down));
      for (const [x, y] of points) c.fillRect(x - w / 2, y - h / 2, w, h);
      c.globalAlpha = 1;
    }
    for (const { on, axis, slice, outline } of said.lassos ?? []) {
      const others = [0, 1, 2].filter((a) => a !== axis);
      const points = outline.map((pair) => {
        const stored = [slice, slice, slice];
        others.forEach((a, i) => {
          stored[a] = pair[i];
        });
        return here(stored);
      });
      // On the other planes a lasso is a line at most.
      if (points.some((p) => !p)) continue;
      c.strokeStyle = on ? ON : OFF;
      c.beginPath();
      points.forEach(([x, y], i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
      if (!draft) c.closePath();
      c.stroke();
    }
  }

  /** A click: a disc with a plus or a minus, so that colour is not all that tells them apart. */
  sign([x, y], on) {
    const { context: c } = this;
    c.fillStyle = on ? ON : OFF;
    c.strokeStyle = "rgba(5,8,12,.9)";
    c.beginPath();
    c.arc(x, y, 6, 0, 2 * Math.PI);
    c.fill();
    c.stroke();
    c.beginPath();
    c.moveTo(x - 3, y);
    c.lineTo(x + 3, y);
    if (on) {
      c.moveTo(x, y - 3);
      c.lineTo(x, y + 3);
    }
    c.stroke();
  }
}
