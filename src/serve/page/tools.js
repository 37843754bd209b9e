// The mouse on the panes: what a drag or a click means with each tool. Prompts leave here in the
// file's own voxels.
import { line } from "./grid.js";
import { PLANE_AXES, SPACE } from "./view.js";

export const TOOLS = ["click", "box", "scribble", "lasso", "move"];
/** A press that moves less than this is a click. */
const STILL = 4;
/** Milliseconds after which a pointer or a crosshair that does not move rests. */
const REST = 120;

const rounded = (ras) => ras.map(Math.round);

export class Tools {
  /**
   * `say(prompt)` sends a prompt; `ready()` tells whether prompts can be sent; `changed()` is
   * called where the pending box or the active plane is another; `rested(at)` where a mouse or the
   * crosshair rests that a click may follow from, with the file's voxel.
   */
  constructor(stage, view, marks, { say, ready, changed, rested }) {
    Object.assign(this, { stage, view, marks, say, ready, changed, rested });
    this.tool = "click";
    this.plane = 0;
    /** Boxes wait to be extended through slices before they are sent. */
    this.deep = false;
    this.pending = null;
    this.drag = null;
    stage.addEventListener("pointerdown", (e) => this.down(e));
    stage.addEventListener("pointermove", (e) => this.move(e));
    stage.addEventListener("pointerup", (e) => this.up(e));
    stage.addEventListener("pointercancel", () => this.giveUp());
    stage.addEventListener("pointerleave", () => clearTimeout(this.resting));
    stage.addEventListener("contextmenu", (e) => e.preventDefault());
    stage.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
  }

  choose(tool) {
    this.tool = tool;
    this.giveUp();
    if (tool !== "box") this.pending = null;
    this.show();
  }

  /** Draws what is being made. */
  show(draft = null) {
    this.marks.draft = draft ?? (this.pending ? { box: this.pending } : null);
    this.marks.plane = this.plane;
    this.view.request();
    this.changed();
  }

  giveUp() {
    this.drag = null;
    this.show();
  }

  /** Escape: what is being made is let go. */
  cancel() {
    this.pending = null;
    this.giveUp();
  }

  place(e) {
    const box = this.stage.getBoundingClientRect();
    return [e.clientX - box.left, e.clientY - box.top];
  }

  /** The voxel of the viewer under a pixel of a pane; held to the scan where `clamp` is set. */
  voxel(tile, x, y, clamp = false) {
    const ras = rounded(tile.at(x, y));
    if (clamp) return this.view.grid.clamp(ras);
    return this.view.grid.holds(ras) ? ras : null;
  }

  /** Waits for the pointer to rest, from where it is now. A finger comes down at once. */
  hover(e) {
    clearTimeout(this.resting);
    if (this.tool !== "click" || e.pointerType === "touch" || e.buttons) return;
    const [x, y] = this.place(e);
    this.resting = setTimeout(() => {
      if (this.tool !== "click" || this.drag || !this.view.grid || !this.ready()) return;
      const tile = this.view.tileAt(x, y);
      const ras = tile && tile.plane !== SPACE ? this.voxel(tile, x, y) : null;
      if (ras) this.rested(this.view.grid.toStored(ras));
    }, REST);
  }

  /** Tells where keys left the crosshair: a key clicks there, whatever the tool. */
  hoverAtCross() {
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      const { grid, cross } = this.view;
      if (grid && !this.drag && !this.pending && this.ready()) this.rested(grid.toStored(cross));
    }, REST);
  }

  down(e) {
    clearTimeout(this.resting);
    if (!this.view.grid || this.drag) return;
    const [x, y] = this.place(e),
      tile = this.view.tileAt(x, y);
    if (!tile) return;
    this.stage.focus({ preventScroll: true });
    if (tile.plane !== SPACE && tile.plane !== this.plane) {
      this.plane = tile.plane;
      this.show();
    }
    const off = e.button === 2 || (e.button === 0 && e.ctrlKey);
    let kind = this.tool;
    if (tile.plane === SPACE) kind = "turn";
    else if (e.button === 1) kind = "pan";
    else if (e.shiftKey) kind = "window";
    else if (e.altKey) kind = "cross";
    else if (kind === "move") kind = off ? "window" : "pan";
    else if (!this.ready()) kind = "cross";
    e.preventDefault();
    this.stage.setPointerCapture(e.pointerId);
    this.drag = {
      kind,
      tile,
      on: !off,
      from: [x, y],
      last: [x, y],
      moved: false,
      start: tile.at ? tile.at(x, y) : null,
      path: [],
      window: { ...this.view.window },
    };
    if (kind === "cross") this.crossTo(tile, x, y);
    if (kind === "scribble" || kind === "lasso") this.trace(x, y);
  }

  crossTo(tile, x, y) {
    this.view.moveTo(this.voxel(tile, x, y, true));
  }

  move(e) {
    const d = this.drag;
    if (!d) return this.hover(e);
    const [x, y] = this.place(e);
    const dx = x - d.last[0],
      dy = y - d.last[1];
    if (Math.hypot(x - d.from[0], y - d.from[1]) >= STILL) d.moved = true;
    // The first pixels belong to a click until they are enough for a drag.
    if (!d.moved && (d.kind === "pan" || d.kind === "box")) return;
    d.last = [x, y];
    switch (d.kind) {
      case "pan":
        return this.view.panBy(d.tile, dx, dy);
      case "turn":
        return this.view.turnBy(dx, dy);
      case "cross":
        return this.crossTo(d.tile, x, y);
      case "window":
        return this.windowBy(d, x - d.from[0], y - d.from[1]);
      case "box":
        return this.show({ box: this.boxOf(d, x, y) });
      case "scribble":
      case "lasso":
        return this.trace(x, y);
    }
  }

  /** To the right: wider. Upwards: brighter. */
  windowBy({ window: { low, high } }, dx, dy) {
    const { auto } = this.view;
    const step = Math.max(high - low, (auto.high - auto.low) / 4, 1e-6) / 250;
    const width = Math.max(step, high - low + dx * step),
      level = (low + high) / 2 + dy * step;
    this.view.setWindow(level - width / 2, level + width / 2);
    this.changed();
  }

  up(e) {
    const d = this.drag;
    if (!d) return;
    const [x, y] = this.place(e);
    this.drag = null;
    const { grid } = this.view;
    if (d.kind === "pan" && !d.moved && e.button === 0) this.crossTo(d.tile, x, y);
    if (d.kind === "click") {
      // Where the button went down: a hand that trembles does not move the click.
      const ras = this.voxel(d.tile, ...d.from);
      if (ras) {
        this.view.moveTo(ras);
        this.say({ points: [{ at: grid.toStored(ras), on: d.on }] });
      }
    }
    if (d.kind === "box" && d.moved) this.boxed(d, x, y, e);
    if (d.kind === "scribble") this.scribbled(d);
    if (d.kind === "lasso") this.lassoed(d);
    this.show();
  }

  /** The box of a drag, in the file's voxels, both corners included. */
  boxOf(d, x, y) {
    const { grid } = this.view,
      { h, v, n } = d.tile;
    const a = grid.clamp(rounded(d.start)),
      b = this.voxel(d.tile, x, y, true);
    const depth = this.extending(d);
    if (depth !== null) {
      // A second drag on another plane says how many slices the box goes through.
      const low = grid.toRas(this.pending.from),
        high = grid.toRas(this.pending.to);
      [low[depth], high[depth]] = [a[depth], b[depth]];
      return this.sorted(low, high);
    }
    const low = [...a],
      high = [...a];
    [low[h], high[h]] = [a[h], b[h]];
    [low[v], high[v]] = [a[v], b[v]];
    low[n] = high[n] = this.view.cross[n];
    return this.sorted(low, high);
  }

  /** The axis through the slice of the pending box, where a drag is on a plane that shows it. */
  extending(d) {
    if (!this.pending || d.tile.plane === this.pendingPlane) return null;
    // Each plane's own axis lies in the two others.
    return PLANE_AXES[this.pendingPlane][2];
  }

  sorted(a, b) {
    const { grid } = this.view;
    const p = grid.toStored(grid.clamp(a)),
      q = grid.toStored(grid.clamp(b));
    return { from: p.map((v, i) => Math.min(v, q[i])), to: p.map((v, i) => Math.max(v, q[i])) };
  }

  boxed(d, x, y, e) {
    const box = this.boxOf(d, x, y),
      more = this.extending(d);
    if (more === null) this.pendingPlane = d.tile.plane;
    if (this.deep || more !== null || e.ctrlKey || !d.on) this.pending = box;
    else this.say({ box });
  }

  /** Sends the pending box. */
  confirm() {
    if (!this.pending) return false;
    const box = this.pending;
    this.pending = null;
    this.show();
    this.say({ box });
    return true;
  }

  /** Makes the pending box reach one slice further, or less far, to both sides. */
  deepen(by) {
    if (!this.pending) return;
    const { grid } = this.view,
      n = PLANE_AXES[this.pendingPlane][2];
    const a = grid.toRas(this.pending.from),
      b = grid.toRas(this.pending.to);
    const middle = (a[n] + b[n]) / 2,
      half = Math.max(0, Math.abs(a[n] - b[n]) / 2 + by);
    a[n] = Math.ceil(middle - half);
    b[n] = Math.floor(middle + half);
    if (a[n] > b[n]) a[n] = b[n] = Math.round(middle);
    this.pending = this.sorted(a, b);
    this.show();
  }

  /** Slices that the pending box goes through. */
  get depth() {
    if (!this.pending) return 0;
    const axis = this.view.grid.axis[PLANE_AXES[this.pendingPlane][2]];
    return this.pending.to[axis] - this.pending.from[axis] + 1;
  }

  trace(x, y) {
    const d = this.drag,
      scribble = d.kind === "scribble";
    // A stroke is of voxels; an outline runs between their centres, as it is drawn.
    const ras = scribble ? this.voxel(d.tile, x, y, true) : this.view.grid.clamp(d.tile.at(x, y));
    const before = d.path.at(-1);
    if (before && before.every((v, i) => Math.abs(v - ras[i]) < (scribble ? 0.5 : 0.1))) return;
    if (before && scribble) d.path.push(...line(before, ras).slice(1));
    else d.path.push(ras);
    this.show(scribble ? this.scribbleOf(d) : this.lassoOf(d));
  }

  scribbleOf({ path, on }) {
    const { grid } = this.view;
    const once = new Map(path.map((ras) => [ras.join(), grid.toStored(ras)]));
    return { scribbles: [{ on, voxels: [...once.values()] }] };
  }

  lassoOf({ path, on, tile }) {
    const { grid, cross } = this.view;
    const axis = grid.axis[tile.n],
      slice = grid.toStored(cross)[axis];
    const others = [0, 1, 2].filter((a) => a !== axis);
    const outline = path.map((ras) => {
      const stored = grid.toStored(ras);
      return others.map((a) => Math.round(100 * stored[a]) / 100);
    });
    return { lassos: [{ on, axis, slice, outline }] };
  }

  scribbled(d) {
    if (d.path.length) this.say(this.scribbleOf(d));
  }

  lassoed(d) {
    const wide = [d.tile.h, d.tile.v].every((a) => {
      const along = d.path.map((ras) => ras[a]);
      return Math.max(...along) - Math.min(...along) >= 1;
    });
    if (d.path.length >= 3 && wide) this.say(this.lassoOf(d));
  }

  wheel(e) {
    if (!this.view.grid) return;
    e.preventDefault();
    // Another slice comes under the pointer.
    this.hover(e);
    const [x, y] = this.place(e),
      tile = this.view.tileAt(x, y);
    if (!tile) return;
    const amount = e.deltaMode === 1 ? e.deltaY * 30 : e.deltaY;
    if (e.ctrlKey || tile.plane === SPACE)
      return this.view.zoomBy(Math.exp(-amount / 400), tile, x, y);
    // Touchpads send many small steps: a slice for every 40 of them.
    this.rest = (this.restOf === tile.plane ? this.rest : 0) + amount;
    this.restOf = tile.plane;
    const steps =
      Math.abs(amount) >= 40
        ? Math.sign(amount) * Math.max(1, Math.round(Math.abs(amount) / 120))
        : Math.trunc(this.rest / 40);
    if (!steps) return;
    this.rest = 0;
    if (this.plane !== tile.plane) {
      this.plane = tile.plane;
      this.show();
    }
    this.view.scroll(tile.plane, -steps);
  }
}
