// The viewer: NiiVue's rendering of the scan, three planes and 3D, with our own layout, crosshair
// and geometry on top. NiiVue's mouse and keys are off; tools.js has them.
import { NVImage, Niivue } from "./niivue.js";
import { Grid, sameAffine } from "./grid.js";

export const AXIAL = 0,
  CORONAL = 1,
  SAGITTAL = 2,
  SPACE = 4;
export const PLANE_NAMES = {
  [AXIAL]: "Axial",
  [CORONAL]: "Coronal",
  [SAGITTAL]: "Sagittal",
  [SPACE]: "3D",
};
/** Of each plane: the viewer's axes to the right, upwards, and through it. */
export const PLANE_AXES = { [AXIAL]: [0, 1, 2], [CORONAL]: [0, 2, 1], [SAGITTAL]: [1, 2, 0] };
/** The plane that a viewer's axis runs through. */
export const planeThrough = (axis) =>
  [AXIAL, CORONAL, SAGITTAL].find((plane) => PLANE_AXES[plane][2] === axis);
/** Of each layout the panes: left, top, width and height in halves of the stage. */
const LAYOUTS = {
  four: [
    [AXIAL, 0, 0, 1, 1],
    [SAGITTAL, 1, 0, 1, 1],
    [CORONAL, 0, 1, 1, 1],
    [SPACE, 1, 1, 1, 1],
  ],
  planes: [
    [AXIAL, 0, 0, 1, 2],
    [SAGITTAL, 1, 0, 1, 1],
    [CORONAL, 1, 1, 1, 1],
  ],
  axial: [[AXIAL, 0, 0, 2, 2]],
  coronal: [[CORONAL, 0, 0, 2, 2]],
  sagittal: [[SAGITTAL, 0, 0, 2, 2]],
  "3d": [[SPACE, 0, 0, 2, 2]],
};
/** Pixels between panes. */
const GAP = 2;
/** How much of the scan itself is seen in 3D. */
const HAZE = 0.35;
/** In larger scans the object's surface in 3D is not smoothed: that would take every voxel. */
const SMOOTHED = 16e6;
const BACK = [0.035, 0.043, 0.055, 1];

const swizzled = (xyz, plane) => PLANE_AXES[plane].map((a) => xyz[a]);

export class View {
  /** `painted` is called after every drawing, `moved` where the crosshair is somewhere else. */
  constructor(canvas, { painted, moved }) {
    this.canvas = canvas;
    this.painted = painted;
    this.moved = moved;
    this.grid = null;
    this.volume = null;
    this.cross = [0, 0, 0];
    this.layout = "four";
    this.fill = { opacity: 0.4, contour: false, hidden: false };
    this.waiting = false;
  }

  /** Starts WebGL. An error says that there is none. */
  async start() {
    const nv = new Niivue({
      interactive: false,
      dragAndDropEnabled: false,
      logLevel: "error",
      loadingText: "",
      backColor: BACK,
      crosshairWidth: 0,
      isOrientationTextVisible: false,
      show3Dcrosshair: false,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      isNearestInterpolation: false,
    });
    this.nv = nv;
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error(
        "this browser has no WebGL 2: use a current Firefox, Chrome, Edge or Safari, " +
          "with access to the graphics card",
      );
    }
    await nv.attachToCanvas(this.canvas, false);
    // NiiVue shrinks a pane to its image. Ours fill their place, so that what is enlarged has room.
    nv.calculateWidthHeight = (plane, scale, width, height) => [width, height];
    const extent = nv.screenFieldOfViewExtendedVox.bind(nv);
    nv.screenFieldOfViewExtendedVox = (plane) => this.widened(extent(plane), plane);
    // In space the scan is a haze around what was segmented.
    const space = nv.drawImage3D.bind(nv);
    nv.drawImage3D = (...given) => {
      const { gl, renderShader, drawOpacity } = nv;
      renderShader.use(gl);
      gl.uniform1f(renderShader.uniforms.backOpacity, HAZE);
      nv.drawOpacity = this.fill.hidden ? 0 : 1;
      space(...given);
      nv.drawOpacity = drawOpacity;
    };
    const draw = nv.drawScene.bind(nv);
    nv.drawScene = () => {
      draw();
      this.painted();
    };
    this.lay();
  }

  /**
   * Shows a scan from a file that the browser holds. Where the viewer cannot read it, an error says
   * why.
   */
  async open(file) {
    const volume = await NVImage.loadFromFile({ file, name: file.name });
    if (!volume?.img?.length || !volume.permRAS)
      throw new Error("the viewer finds no voxels in the file");
    const { nv } = this;
    this.close();
    nv.addVolume(volume);
    this.volume = volume;
    this.settle();
    nv.scene.pan2Dxyzmm.set([0, 0, 0, 1]);
    nv.scene.volScaleMultiplier = 1;
    nv.scene.renderAzimuth = 160;
    nv.scene.renderElevation = 15;
    this.window = { low: volume.cal_min, high: volume.cal_max };
    this.auto = {
      low: volume.robust_min ?? volume.cal_min,
      high: volume.robust_max ?? volume.cal_max,
    };
    this.moveTo(this.grid.ras.map((n) => Math.floor(n / 2)));
  }

  close() {
    const { nv } = this;
    clearTimeout(this.smoothing);
    if (nv.drawBitmap) nv.closeDrawing();
    for (const volume of [...nv.volumes]) nv.removeVolume(volume);
    this.volume = this.grid = null;
    this.request();
  }

  /** Makes the grid and the empty labels from what the viewer knows of the scan now. */
  settle() {
    const { nv, volume } = this;
    this.grid = new Grid(
      volume.hdr.dims.slice(1, 4).map((n) => Math.max(1, n)),
      Array.from(volume.permRAS),
    );
    nv.opts.smoothDrawing = 0;
    nv.createEmptyDrawing();
    nv.clickToSegmentGrowingBitmap = null; // as large as the scan, and never used here
    this.applyFill();
  }

  /**
   * Takes over where the server says that the scan lies: readers differ in what they make of a
   * file's headers, and the server's masks are the ones that are saved. Returns whether they
   * agreed.
   */
  adopt(shape, affine) {
    const { volume, nv } = this;
    if (shape.join() !== this.grid.shape.join()) {
      throw new Error(
        `the viewer finds ${this.grid.shape.join(" × ")} voxels in the file, the ` +
          `server ${shape.join(" × ")}`,
      );
    }
    if (sameAffine(volume.hdr.affine, affine, shape)) return true;
    const kept = this.grid.toStored(this.cross);
    volume.hdr.affine = affine.map((row) => [...row]);
    volume.hdr.pixDims = volume.hdr.pixDims.map((mm, i) =>
      i < 1 || i > 3 ? mm : Math.hypot(affine[0][i - 1], affine[1][i - 1], affine[2][i - 1]),
    );
    volume.calculateRAS();
    nv.updateGLVolume();
    this.settle();
    this.moveTo(this.grid.toRas(kept));
    return false;
  }

  get labels() {
    return this.nv.drawBitmap;
  }

  get zoom() {
    return this.nv.scene.pan2Dxyzmm[3];
  }

  /** Draws soon, once for all that asked. */
  request() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.nv.drawScene();
    });
  }

  /** Lays the panes out: by the name of one of `LAYOUTS`, or anew in a stage of another size. */
  lay(layout = this.layout) {
    this.layout = layout;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const gaps = [GAP / Math.max(1, width), GAP / Math.max(1, height)];
    this.panes = new Map(
      LAYOUTS[layout].map(([plane, left, top, across, down]) => {
        // A half less half a gap; from the second half on, behind the gap.
        const size = [across, down].map((n, i) => (n === 2 ? 1 : (1 - gaps[i]) / 2));
        const at = [left, top].map((n, i) => (n ? 1 - size[i] : 0));
        return [plane, [...at, ...size]];
      }),
    );
    this.nv.customLayout = [...this.panes].map(([sliceType, position]) => ({
      sliceType,
      position,
    }));
    this.request();
  }

  /** Whether the processor draws, not a graphics card: 3D takes long then. */
  get slow() {
    const { gl } = this.nv;
    const told = gl.getExtension("WEBGL_debug_renderer_info");
    const name = gl.getParameter(told ? told.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
    return /swiftshader|llvmpipe|software|basic render/i.test(String(name));
  }

  /** A plane's extent in mm, widened to its pane's shape, with a margin for the letters. */
  widened(extent, plane) {
    const pane = this.panes.get(plane);
    if (!pane) return extent;
    const pixels = [pane[2] * this.canvas.width, pane[3] * this.canvas.height];
    const [x, y] = swizzled(this.nv.volumeObject3D.fieldOfViewDeObliqueMM, plane);
    const scale = 0.94 * Math.min(pixels[0] / x, pixels[1] / y);
    pixels.forEach((size, i) => {
      const middle = (extent.mnMM[i] + extent.mxMM[i]) / 2,
        half = size / scale / 2;
      extent.mnMM[i] = middle - half;
      extent.mxMM[i] = middle + half;
      extent.fovMM[i] = 2 * half;
    });
    return extent;
  }

  /**
   * The panes as they were drawn, in CSS pixels. Of planes: `at(x, y)` gives the viewer's voxel
   * indices, with fractions (a voxel's centre is whole), and `put(ras)` the pixel of such indices.
   */
  tiles() {
    const { nv, grid } = this;
    if (!grid) return [];
    const ratio = this.canvas.width / Math.max(1, this.canvas.clientWidth);
    return nv.screenSlices.map((slice, i) => {
      const [left, top, width, height] = slice.leftTopWidthHeight.map((v) => v / ratio);
      const plane = slice.axCorSag;
      const tile = { plane, left, top, width, height };
      if (plane === SPACE) return tile;
      const [h, v, n] = PLANE_AXES[plane];
      const probe = (f) =>
        nv.screenXY2TextureFrac((left + f * width) * ratio, (top + f * height) * ratio, i, false);
      const a = probe(0.25),
        b = probe(0.75);
      const right = ((b[h] - a[h]) * grid.ras[h]) / (0.5 * width);
      const down = ((b[v] - a[v]) * grid.ras[v]) / (0.5 * height);
      const x0 = a[h] * grid.ras[h] - 0.5 - right * (left + 0.25 * width);
      const y0 = a[v] * grid.ras[v] - 0.5 - down * (top + 0.25 * height);
      return Object.assign(tile, {
        h,
        v,
        n,
        right,
        down,
        at: (x, y) => {
          const ras = [...this.cross];
          ras[h] = x0 + right * x;
          ras[v] = y0 + down * y;
          return ras;
        },
        put: (ras) => [(ras[h] - x0) / right, (ras[v] - y0) / down],
      });
    });
  }

  tileAt(x, y) {
    return (
      this.tiles().find(
        (t) => x >= t.left && x < t.left + t.width && y >= t.top && y < t.top + t.height,
      ) ?? null
    );
  }

  moveTo(ras) {
    const next = this.grid.clamp(ras.map(Math.round));
    const changed = next.some((v, i) => v !== this.cross[i]);
    this.cross = next;
    this.nv.scene.crosshairPos = this.nv.vox2frac(next);
    if (changed) this.moved();
    this.request();
  }

  /** Moves a pane's slice. */
  scroll(plane, by) {
    if (!this.grid || plane === SPACE) return;
    const next = [...this.cross];
    next[PLANE_AXES[plane][2]] += by;
    this.moveTo(next);
  }

  /** Enlarges about a pixel of a pane, or about the crosshair. */
  zoomBy(factor, tile = null, x = 0, y = 0) {
    const { nv } = this;
    const pan = nv.scene.pan2Dxyzmm;
    if (tile?.plane === SPACE) {
      nv.scene.volScaleMultiplier = Math.min(
        6,
        Math.max(0.3, nv.scene.volScaleMultiplier * factor),
      );
      return this.request();
    }
    const next = Math.min(40, Math.max(0.5, pan[3] * factor));
    const ras = tile ? tile.at(x, y) : [...this.cross];
    // Millimetres along the viewer's axes, which keep their place on the screen.
    const mm = this.sliceMm(ras);
    for (let i = 0; i < 3; i++) pan[i] += mm[i] * (pan[3] - next);
    pan[3] = next;
    this.request();
  }

  /** Where indices lie in the millimetres that slices are drawn in. */
  sliceMm(ras) {
    return this.nv.frac2mm(ras.map((v, i) => (v + 0.5) / this.grid.ras[i])).slice(0, 3);
  }

  panBy(tile, dx, dy) {
    if (tile.plane === SPACE) return;
    const { nv, grid } = this;
    const pan = nv.scene.pan2Dxyzmm,
      fov = nv.volumeObject3D.fieldOfViewDeObliqueMM;
    pan[tile.h] += ((dx * tile.right) / grid.ras[tile.h]) * fov[tile.h] * pan[3];
    pan[tile.v] += ((dy * tile.down) / grid.ras[tile.v]) * fov[tile.v] * pan[3];
    this.request();
  }

  turnBy(dx, dy) {
    const { scene } = this.nv;
    scene.renderAzimuth = (scene.renderAzimuth + dx * 0.5) % 360;
    scene.renderElevation = Math.min(90, Math.max(-90, scene.renderElevation + dy * 0.5));
    this.request();
  }

  resetView() {
    this.nv.scene.pan2Dxyzmm.set([0, 0, 0, 1]);
    this.nv.scene.volScaleMultiplier = 1;
    this.request();
  }

  setRadiological(on) {
    this.nv.opts.isRadiologicalConvention = on;
    this.request();
  }

  get radiological() {
    return this.nv.opts.isRadiologicalConvention;
  }

  /** Shows values from `low` to `high` from black to white. */
  setWindow(low, high) {
    this.window = { low, high: Math.max(high, low + 1e-6) };
    if (this.windowing) return;
    this.windowing = true;
    // The whole scan goes through the graphics card again: once a frame at most.
    requestAnimationFrame(() => {
      this.windowing = false;
      if (!this.volume) return;
      this.volume.cal_min = this.window.low;
      this.volume.cal_max = this.window.high;
      this.nv.updateGLVolume();
    });
  }

  /** The scan's value at a voxel of the viewer. */
  value(ras) {
    const { volume, grid } = this;
    const [x, y, z] = grid.toStored(ras);
    const raw = volume.img[x + grid.shape[0] * (y + grid.shape[1] * z)];
    const { scl_slope: slope, scl_inter: inter } = volume.hdr;
    return (
      raw * (Number.isFinite(slope) && slope !== 0 ? slope : 1) +
      (Number.isFinite(inter) ? inter : 0)
    );
  }

  /** Colours of the labels from 1 on, as [r, g, b]. */
  setColours(colours) {
    const lut = new Uint8ClampedArray(4 * 256).fill(255);
    lut.fill(0, 0, 4);
    colours.forEach((colour, n) => lut.set(colour, 4 * (n + 1)));
    this.nv.drawLut = { lut, labels: Array.from({ length: 256 }, (_, n) => String(n)) };
    this.nv.refreshColormaps();
    this.request();
  }

  setFill(change) {
    Object.assign(this.fill, change);
    this.applyFill();
    this.request();
  }

  applyFill() {
    const { opacity, contour, hidden } = this.fill;
    // The rim is drawn where there is a filling at all: a contour has one that is not seen.
    this.nv.drawOpacity = hidden ? 0 : contour ? 0.004 : opacity;
    this.nv.drawRimOpacity = 1;
  }

  /** Sends the labels within a box to the graphics card. */
  refresh(box) {
    if (!box) return;
    const { nv, grid } = this;
    const { gl } = nv,
      [x, y, z] = box.low,
      size = box.high.map((h, i) => h - box.low[i] + 1);
    gl.activeTexture(gl.TEXTURE7);
    gl.bindTexture(gl.TEXTURE_3D, nv.drawTexture);
    const places = [
      [gl.UNPACK_ALIGNMENT, 1],
      [gl.UNPACK_ROW_LENGTH, grid.ras[0]],
      [gl.UNPACK_IMAGE_HEIGHT, grid.ras[1]],
      [gl.UNPACK_SKIP_PIXELS, x],
      [gl.UNPACK_SKIP_ROWS, y],
      [gl.UNPACK_SKIP_IMAGES, z],
    ];
    for (const [name, value] of places) gl.pixelStorei(name, value);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, x, y, z, ...size, gl.RED, gl.UNSIGNED_BYTE, nv.drawBitmap);
    for (const [name] of places.slice(1)) gl.pixelStorei(name, 0);
    this.request();
    clearTimeout(this.smoothing);
    if (grid.voxels <= SMOOTHED) this.smoothing = setTimeout(() => this.smooth(), 150);
  }

  /** Makes the surface in 3D anew, once a hand rests. */
  smooth() {
    const { nv } = this;
    if (!nv.drawBitmap) return;
    nv.opts.smoothDrawing = 1;
    nv.blurDrawingGL(nv.back.dims);
    this.request();
  }
}
