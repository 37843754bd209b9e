// The page: what is open, which object is worked on, and what each control does.
import { ApiError, server } from "./api.js";
import { toMm } from "./grid.js";
import { Marks } from "./marks.js";
import { Labels, niftiOf } from "./masks.js";
import { archived, chosen, dropped, ofDicom } from "./series.js";
import { discard, forget, keep, kept, leave, remember, remembered, takeOver } from "./store.js";
import { TOOLS, Tools } from "./tools.js";
import { AXIAL, CORONAL, PLANE_AXES, PLANE_NAMES, SAGITTAL, View, planeThrough } from "./view.js";

const $ = (id) => document.getElementById(id);
const READABLE = /\.(nii|nii\.gz|nrrd|mha)$/i;
/** Level and width, in Hounsfield units. */
const WINDOWS = [
  ["soft", "Soft tissue", 40, 400],
  ["lung", "Lung", -600, 1500],
  ["bone", "Bone", 400, 1800],
  ["brain", "Brain", 40, 80],
];
/** Milliseconds after which the server hears that the scan is open here: it forgets unused ones. */
const BEAT = 4 * 60e3;
const HINTS = {
  click: "Left: on the object · right or Ctrl: off it",
  box: "Drag a box around the object on one slice · Ctrl or T: through slices",
  scribble: "Draw over the object · right or Ctrl: over the background",
  lasso: "Draw around the object · right or Ctrl: around background",
  move: "Drag: pan · right: window · click: crosshair · Ctrl+wheel: zoom",
};

/** The open scan: `id` is null until the server has it. */
let scan = null;
let labels = null;
/**
 * `{ id, name, colour, mask, prompts, at, said, begun, coming }`; `id` is null until the first
 * prompt, or until the pointer rests where that may come, and `coming` is the promise of it. Of the
 * prompts the first `at` hold, the others were taken back. `begun` tells whether something was said
 * of it at all.
 */
let objects = [];
let active = null;
let uploading = null;
let queue = Promise.resolve();
let working = 0;
/** Of new objects, in turn, as the server gives them. */
let colours = [];

const view = new View($("picture"), { painted: () => marks.paint(), moved: () => tellWhere() });
const marks = new Marks($("marks"), view);
const tools = new Tools($("stage"), view, marks, {
  say: (said) => prompt(said),
  ready: () => Boolean(scan?.id),
  changed: () => showPending(),
  rested: (at) => prepare(at),
});

// ---- What is said to a person -------------------------------------------------------------------

const say = (text) => {
  $("status").textContent = text;
};

/** Shows an error until it is dismissed, with what to do, and a button that does it. */
function alarm(message, advice = "", action = null) {
  const box = document.createElement("div");
  box.className = "alert";
  const text = document.createElement("div");
  for (const line of [capital(message), advice].filter(Boolean)) {
    const p = document.createElement("p");
    p.textContent = line;
    text.append(p);
  }
  box.append(text);
  if (action) {
    box.append(
      button(action.label, () => {
        box.remove();
        action.run();
      }),
    );
  }
  box.append(button("Dismiss", () => box.remove(), "plain"));
  // The newest alone: older ones are seldom true any more.
  $("alerts").replaceChildren(box);
}

function button(label, run, kind = "") {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  if (kind) made.className = kind;
  made.addEventListener("click", run);
  return made;
}

const capital = (text) =>
  text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

function complain(error, again = null) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) {
    console.error(error);
    return alarm(error.message || String(error));
  }
  const action =
    error.status === 404 && scan?.file
      ? { label: "Send again", run: sendAgain }
      : again
        ? { label: "Try again", run: again }
        : null;
  alarm(error.message, error.advice, action);
}

const volumeOf = (ml) => (ml < 10 ? ml.toFixed(2) : ml < 100 ? ml.toFixed(1) : ml.toFixed(0));

/** A place in mm by the patient's sides: which way numbers run, programs do not agree on. */
const sided = (mm) =>
  mm.map((v, i) => `${(v < 0 ? "LPI" : "RAS")[i]} ${Math.abs(v).toFixed(1)}`).join(", ");

/** The scan's value at the crosshair. */
function valueHere() {
  const value = view.value(view.cross);
  const shown = Number.isInteger(value) ? value : Number(value.toPrecision(4));
  return `${shown}${scan?.modality === "ct" ? " HU" : ""}`;
}

function tellWhere() {
  if (!view.grid) return void ($("where").textContent = "");
  const voxel = view.grid.toStored(view.cross);
  const mm = scan?.affine ? ` · ${sided(toMm(scan.affine, voxel))} mm` : "";
  $("where").textContent = `voxel ${voxel.join(", ")}${mm} · ${valueHere()}`;
}

/** Says where the crosshair is, as panes show it, for who does not see them. */
function sayWhere() {
  const { grid, cross } = view;
  const slices = [AXIAL, CORONAL, SAGITTAL].map((plane) => {
    const through = PLANE_AXES[plane][2];
    return `${PLANE_NAMES[plane].toLowerCase()} ${cross[through] + 1} of ${grid.ras[through]}`;
  });
  const around = objects.filter(({ mask }) => mask.has(grid.index(cross))).map((o) => o.name);
  const what = around.length ? `in ${around.join(", ")}` : "in no object";
  say(capital(`${slices.join(", ")}; ${valueHere()}; ${what}`));
}

// ---- Opening a scan -----------------------------------------------------------------------------

/** What becomes of what was dropped or chosen last. */
let deciding = Promise.resolve();

/** Opens what was dropped or chosen. */
async function openAll(gathered) {
  deciding = decided(gathered);
  const go = await deciding;
  await go?.();
}

/** How to open it: one file, or files of DICOM, in folders, archives or as they are. */
async function decided(gathered) {
  let found, dicom;
  try {
    found = await gathered;
    const [first] = found;
    if (!first) return null;
    if (found.length === 1 && READABLE.test(first.path)) return () => open(first.file);
    if (found.length === 1 && /\.zip$/i.test(first.path))
      return () => openSeries(first.file, first.path);
    say(`Checking ${found.length} files…`);
    dicom = await ofDicom(found);
  } catch (error) {
    return void alarm(`cannot read this: ${error?.message ?? error}`);
  }
  const readable = found.filter(({ path }) => READABLE.test(path));
  if (!dicom.length && readable.length === 1) return () => open(readable[0].file);
  if (!dicom.length) {
    const what =
      found.length === 1 ? `${found[0].path} is not` : `none of these ${found.length} files is`;
    return void alarm(
      `${what} a scan that can be opened here`,
      "Choose a file whose name ends in .nii, .nii.gz, .nrrd or .mha, or the files or the folder " +
        "of a DICOM series.",
    );
  }
  const name = dicom[0].path.split("/")[0].replace(/\.(dcm|ima)$/i, "");
  return () => openSeries(null, name, dicom);
}

/** How often something was opened: what was begun before the last of them is given up. */
let opened = 0;

/**
 * Sends DICOM, an archive or files that become one, and shows what the server makes of it. Of
 * several series a person chooses one.
 */
async function openSeries(archive, name, files) {
  if (scan && !mayLeave()) return;
  const mine = ++opened;
  await closeScan();
  $("start").hidden = false;
  const stop = new AbortController();
  uploading = stop;
  $("progress").hidden = false;
  const show = (part, what) => {
    $("progress-bar").value = part;
    $("progress-text").textContent =
      part < 1 ? `${what}: ${Math.floor(100 * part)} %` : "The server is reading the series";
  };
  const stem = name.replace(/\.zip$/i, "");
  let told,
    title = stem;
  try {
    say(`Reading ${name}…`);
    await learnColours();
    const reading = (part) => {
      stop.signal.throwIfAborted();
      show(Math.min(part, 0.99), "Reading the files");
    };
    const blob = archive ?? (await archived(files, reading));
    const sending = (part) => show(part, "Sending the series");
    const modality = $("modality").value;
    const send = (series) =>
      server.upload(blob, "study.zip", modality, sending, stop.signal, series);
    try {
      told = await send("");
    } catch (error) {
      if (!error.series) throw error;
      $("progress").hidden = true;
      const series = await chooseSeries(error.series);
      if (!series || stop.signal.aborted)
        return void (mine === opened && say("Open a scan to begin."));
      $("progress").hidden = false;
      title = `${stem}_${series.number}`;
      told = await send(series.series);
    }
    const { blob: image } = await server.image(told.scan);
    const file = new File([image], `${title}.nii`);
    if (mine !== opened) return void server.close(told.scan).catch(() => {});
    await view.open(file);
    scan = { id: null, file, name: file.name, modality: null, affine: null };
    labels = new Labels(view.grid, view.labels);
    $("start").hidden = true;
    $("scan-name").textContent = title;
    document.title = `${title} – prism`;
    if (!settled(told)) return;
    keep(told.scan, file);
    addObject();
    say(`${title} is ready: click into the lesion, or draw a box around it.`);
  } catch (error) {
    if (told && scan?.id !== told.scan) server.close(told.scan).catch(() => {});
    if (mine !== opened) return;
    say("Open a scan to begin.");
    complain(error, () => openSeries(archive, name, files));
  } finally {
    if (uploading === stop) {
      uploading = null;
      $("progress").hidden = true;
    }
    enable();
  }
}

/** Asks which of several series is meant; null where none is. */
async function chooseSeries(list) {
  const box = $("series");
  if (box.open) {
    // Something else was dropped meanwhile: who was asked before is told that none was chosen.
    const closed = new Promise((done) => box.addEventListener("close", done, { once: true }));
    box.close("");
    await closed;
  }
  $("series-list").replaceChildren(
    ...list.map((one, n) => {
      const item = document.createElement("li");
      const pick_ = document.createElement("button");
      pick_.type = "submit";
      pick_.value = String(n);
      const size = one.shape.join(" × ") + (one.volumes > 1 ? `, ${one.volumes} volumes` : "");
      const mm = one.spacing
        ? `${one.spacing.map((v) => Number(v.toFixed(2))).join(" × ")} mm`
        : "cannot be read as a volume";
      const title = document.createElement("b");
      title.textContent = `${one.number} · ${one.modality} · ${one.description || "no description"}`;
      const facts = document.createElement("span");
      facts.className = "quiet";
      facts.textContent = `${size}, ${mm}${one.localizer ? ", localizer" : ""}`;
      pick_.append(title, facts);
      item.append(pick_);
      return item;
    }),
  );
  box.returnValue = "";
  box.showModal();
  return new Promise((done) =>
    box.addEventListener("close", () => done(list[Number(box.returnValue || -1)] ?? null), {
      once: true,
    }),
  );
}

async function open(file) {
  if (!READABLE.test(file.name)) {
    return alarm(
      `${file.name} is not a scan that can be opened here`,
      "Choose a file whose name ends in .nii, .nii.gz, .nrrd or .mha, or the files or the folder " +
        "of a DICOM series.",
    );
  }
  if (scan && !mayLeave()) return;
  const known = remembered();
  opened++;
  const back = scan === null && known?.wanted === true && known.name === file.name ? known : null;
  await closeScan(back === null);
  say(`Reading ${file.name}…`);
  try {
    await view.open(file);
  } catch (error) {
    view.close();
    $("start").hidden = false;
    say("Open a scan to begin.");
    return alarm(
      `${file.name} cannot be shown: ${error?.message ?? error}`,
      "Is the file complete? Saving it again as NIfTI (.nii.gz) often helps.",
    );
  }
  scan = { id: null, file, name: file.name, modality: null, affine: null };
  labels = new Labels(view.grid, view.labels);
  $("start").hidden = true;
  $("scan-name").textContent = file.name;
  document.title = `${file.name} – prism`;
  listWindows();
  if (back) return takeUp(back);
  await upload();
}

async function learnColours() {
  if (!colours.length) colours = (await server.about()).colours;
}

/** Sends the scan that is shown to the server. */
async function upload() {
  const mine = scan;
  const stop = new AbortController();
  uploading = stop;
  $("progress").hidden = false;
  const show = (part) => {
    $("progress-bar").value = part;
    $("progress-text").textContent =
      part < 1 ? `Sending the scan: ${Math.floor(100 * part)} %` : "The server is reading the scan";
  };
  show(0);
  say("Sending the scan to the server…");
  try {
    await learnColours();
    const told = await server.upload(mine.file, mine.name, $("modality").value, show, stop.signal);
    if (scan !== mine) return void server.close(told.scan).catch(() => {});
    if (!settled(told)) return;
    keep(told.scan, mine.file).then((is) => {
      if (!is && scan === mine)
        say(`${mine.name} is ready. It is too large to be restored after a reload of the page.`);
    });
    addObject();
    say(`${mine.name} is ready: click into the lesion, or draw a box around it.`);
  } catch (error) {
    if (scan === mine) {
      say("The scan is displayed, but not on the server: it cannot be segmented.");
      complain(error, () => scan === mine && upload());
    }
  } finally {
    if (uploading === stop) {
      uploading = null;
      $("progress").hidden = true;
    }
    enable();
  }
}

/** Takes over what the server says of the scan. Returns false where the two do not fit. */
function settled(told) {
  let same;
  try {
    same = view.adopt(told.shape, told.affine);
  } catch (error) {
    server.close(told.scan).catch(() => {});
    alarm(
      error.message,
      "Save the scan as NIfTI (.nii.gz) from the original program, and open that.",
    );
    return false;
  }
  Object.assign(scan, {
    id: told.scan,
    affine: told.affine,
    modality: told.modality,
    format: told.format,
    spacing: told.spacing,
    shape: told.shape,
  });
  if (!same) labels = new Labels(view.grid, view.labels);
  $("scan-facts").textContent = `${told.shape.join(" × ")} · ${told.spacing
    .map((mm) => Number(mm.toFixed(2)))
    .join(" × ")} mm${told.modality ? ` · ${told.modality.toUpperCase()}` : ""}`;
  $("scan-facts").title = $("scan-facts").textContent;
  listScanNotes(told.notes);
  listWindows();
  tellWhere();
  return true;
}

async function closeScan(release = true) {
  uploading?.abort();
  const known = remembered();
  // What a closed tab left and was not opened here stays for another tab.
  const stays = !scan?.id && known?.left === true;
  const gone = scan?.id ?? (release && !stays ? known?.scan : null);
  scan = labels = active = null;
  objects = [];
  tools.cancel();
  view.close();
  $("alerts").replaceChildren();
  if (release) {
    if (stays) leave();
    else forget();
    if (gone) {
      server.close(gone).catch(() => {});
      await discard(gone);
    }
  }
  $("scan-name").textContent = "no scan";
  $("scan-facts").textContent = $("scan-facts").title = "";
  listScanNotes();
  listObjects();
  showAnswer();
  enable();
}

/** Goes on with a session that lies on the server: the scan is shown, its objects are fetched. */
async function takeUp(known) {
  let told;
  try {
    await learnColours();
    told = await server.scan(known.scan);
  } catch (error) {
    if (error.status !== 404) return complain(error, () => takeUp(known));
    // The file is here: begin anew with it.
    alarm(
      "The server has released this scan and its masks",
      "The scan is sent again; prompts have to be given again.",
    );
    forget();
    return upload();
  }
  if (!settled(told)) return;
  for (const { object, name, colour } of told.objects ?? []) {
    const before = known.objects?.find((o) => o.id === object) ?? {};
    const made = addObject({
      id: object,
      name: before.name ?? name,
      colour: before.colour ?? colour,
      prompts: before.prompts ?? [],
      at: before.at ?? 0,
      begun: before.begun ?? false,
    });
    if (before.shown === false) made.mask.shown = false;
    await run(made, () => server.answer(object), { quiet: true });
  }
  if (!objects.length) addObject();
  choose(objects.find((o) => o.id && o.id === known.active) ?? objects.at(-1));
  if (known.cross) view.moveTo(view.grid.toRas(known.cross));
  save();
  enable();
  const count = objects.filter(isBegun).length;
  const whose = known.left ? ", from a closed tab" : "";
  const more = known.left ? " Use “Close” to start over." : "";
  say(`${scan.name} was reopened${whose}, with ${count} object(s) from the server.${more}`);
}

/** At the page's start: what a reload brings back, or what a closed tab left. */
async function restore() {
  const known = await takeOver(server.scan);
  if (!known?.scan) return discard("");
  const file = await kept(known.scan);
  if (file) {
    remember({ ...known, wanted: true });
    return open(file);
  }
  remember({ ...known, wanted: true });
  $("start-note").hidden = false;
  $("start-note").textContent =
    `Drop ${known.name} here again to continue: its masks are on the server, ` +
    "but the file was too large for the browser to keep.";
}

/** After the server lost the scan: sends it and the masks that are shown here. */
async function sendAgain() {
  const before = objects.map((o) => ({ ...o }));
  const { grid } = view,
    { spacing, affine } = scan,
    at = objects.indexOf(active);
  const masks = before.map((o) => (o.mask.count ? niftiOf(o.mask, grid, spacing, affine) : null));
  scan.id = null;
  objects = [];
  active = null;
  if (labels) for (const m of [...labels.masks]) view.refresh(labels.remove(m));
  await upload();
  if (!scan?.id) return;
  objects = [];
  labels.masks = [];
  for (const [n, { name, colour }] of before.entries()) {
    const object = addObject({ name, colour });
    if (masks[n])
      await run(object, async () => server.putMask(await idOf(object), masks[n], "mask.nii"), {
        said: {},
      });
  }
  choose(objects[at] ?? objects[0] ?? addObject());
}

// ---- Objects ------------------------------------------------------------------------------------

function addObject({
  id = null,
  name,
  colour,
  prompts = [],
  at = prompts.length,
  begun = id !== null,
} = {}) {
  let n = objects.length + 1;
  while (objects.some((o) => o.name === `Object ${n}`)) n++;
  const object = {
    id,
    name: name ?? `Object ${n}`,
    colour: colour ?? colours[(n - 1) % colours.length],
    mask: labels.add(),
    prompts,
    at,
    said: null,
    begun,
    coming: null,
  };
  objects.push(object);
  choose(object);
  return object;
}

/** Whether the server knows something of an object. */
const isBegun = (object) => Boolean(object?.id && object.begun);

function choose(object) {
  active = object;
  view.setColours(objects.map((o) => o.colour));
  listObjects();
  showAnswer();
  enable();
  save();
}

/** The server's ID of an object, which it gets when that is asked for first. */
async function idOf(object) {
  if (object.id) return object.id;
  // Calls meanwhile wait for the same one.
  object.coming ??= newIdOf(object).finally(() => {
    object.coming = null;
  });
  return object.coming;
}

async function newIdOf(object) {
  const { name, colour } = object;
  object.id = (await server.newObject(scan.id, name, colour)).object;
  // An object that the server has is at the server's place of it.
  save();
  if (object.name !== name || object.colour !== colour) called(object);
  return object.id;
}

/** An object has another name or colour: the server writes them into files. */
function called(object) {
  save();
  const mine = scan;
  queue = queue.then(async () => {
    if (!object.id || scan !== mine || !objects.includes(object)) return;
    try {
      await server.rename(object.id, object.name, object.colour);
    } catch (error) {
      if (scan === mine) complain(error, () => scan === mine && called(object));
    }
  });
}

/** Puts the hand on the active object's name. */
function rename() {
  const row = $("objects").children[objects.indexOf(active)];
  const name = row?.querySelector("input[type=text]");
  name?.focus();
  name?.select();
}

function nextColour() {
  if (!active) return;
  const at = colours.findIndex((c) => c.join() === active.colour.join());
  active.colour = colours[(at + 1) % colours.length];
  view.setColours(objects.map((o) => o.colour));
  listObjects();
  called(active);
  say(`${active.name} has another colour.`);
}

async function dropObject(object) {
  if (object.mask.count && !confirm(`Delete ${object.name} and its mask?`)) return;
  try {
    await object.coming?.catch(() => {});
    if (object.id) await server.dropObject(object.id);
  } catch (error) {
    if (error.status !== 404) return complain(error, () => dropObject(object));
  }
  view.refresh(labels.remove(object.mask));
  objects = objects.filter((o) => o !== object);
  if (!objects.length) addObject();
  choose(active === object ? objects.at(-1) : active);
  say(`${object.name} is deleted.`);
}

function listObjects() {
  const eye =
    '<svg viewBox="0 0 24 24" aria-hidden="true">' +
    '<path d="M2.5 12s3.5-6 9.5-6 9.5 6 9.5 6-3.5 6-9.5 6-9.5-6-9.5-6z"/>' +
    '<circle cx="12" cy="12" r="2.6"/></svg>';
  // An answer may come while a name is being typed.
  const typing = document.activeElement?.closest("#objects li");
  const place = [...$("objects").children].indexOf(typing);
  const text = typing?.contains(document.activeElement) && document.activeElement.type === "text";
  const typed = text ? document.activeElement.value : "";
  const bin = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M6 6l12 12M18 6L6 18"/></svg>';
  $("objects").replaceChildren(
    ...objects.map((object) => {
      const row = document.createElement("li");
      row.className = object === active ? "active" : "";
      if (object === active) row.setAttribute("aria-current", "true");
      row.addEventListener("pointerdown", () => {
        if (object === active) return;
        // The list is made anew: what was pressed has to be there still.
        for (const other of $("objects").children) other.classList.toggle("active", other === row);
        active = object;
        showAnswer();
        enable();
        save();
      });
      const colour = document.createElement("input");
      colour.type = "color";
      colour.value = `#${object.colour.map((c) => c.toString(16).padStart(2, "0")).join("")}`;
      colour.setAttribute("aria-label", `Colour of ${object.name}`);
      colour.addEventListener("input", () => {
        object.colour = [1, 3, 5].map((i) => parseInt(colour.value.slice(i, i + 2), 16));
        view.setColours(objects.map((o) => o.colour));
      });
      colour.addEventListener("change", () => called(object));
      const name = document.createElement("input");
      name.type = "text";
      name.value = object.name;
      name.maxLength = 200;
      name.setAttribute("aria-label", "Name of the object");
      name.addEventListener("focus", () => object !== active && choose(object));
      name.addEventListener("change", () => {
        object.name = name.value.trim() || object.name;
        name.value = object.name;
        called(object);
      });
      name.addEventListener("keydown", (e) => {
        if (e.key === "Enter" || e.key === "Escape") {
          if (e.key === "Escape") name.value = object.name;
          name.blur();
          $("stage").focus();
          e.stopPropagation();
        }
      });
      const ml = document.createElement("span");
      ml.className = "ml";
      ml.textContent = object.said && object.mask.count ? `${volumeOf(object.said.ml)} ml` : "";
      const see = button(
        "",
        () => {
          object.mask.shown = !object.mask.shown;
          view.refresh(labels.paint(object.mask.box));
          listObjects();
          save();
        },
        "plain",
      );
      see.innerHTML = eye;
      see.setAttribute("aria-pressed", String(object.mask.shown));
      see.setAttribute("aria-label", `Show ${object.name}`);
      const away = button("", () => dropObject(object), "plain");
      away.innerHTML = bin;
      away.setAttribute("aria-label", `Delete ${object.name}`);
      row.append(colour, name, ml, see, away);
      return row;
    }),
  );
  const name = text && $("objects").children[place]?.querySelector("input[type=text]");
  if (name) {
    name.focus();
    name.value = typed;
  }
}

// ---- Prompts and answers ------------------------------------------------------------------------

let preparing = false;
/** The scan and the voxel where the pointer rests, until the server is told. */
let resting = null;

/**
 * Tells the server where the pointer rests, before anything is known of the active object. A click
 * neither waits for this nor needs it.
 */
async function prepare(at) {
  resting = { scan, at };
  // Where it rests by the time that the server has answered is told then.
  if (preparing) return;
  preparing = true;
  try {
    while (resting?.scan === scan && isOpen()) {
      const place = resting.at;
      resting = null;
      await server.prepare(await idOf(active), place);
    }
  } catch {
    // A click is answered all the same.
  } finally {
    preparing = false;
    resting = null;
  }
}

/** Whether the next click may be the first on the active object. */
const isOpen = () => Boolean(scan?.id && active && !active.mask.count && !working && !saving);

/** Sends a prompt for the active object. */
function prompt(said) {
  if (!scan?.id) return say("The server does not have the scan yet.");
  if (!active) addObject();
  const object = active;
  run(object, async () => server.prompt(await idOf(object), said), { said });
}

/**
 * Asks for an answer and shows it, one after the other: answers are differences. `said` is the
 * prompt that it answers, `steps` how far it goes in the history.
 */
function run(object, ask, { said = null, steps = 0, quiet = false } = {}) {
  const mine = scan;
  if (said) object.begun = true;
  working++;
  $("busy").hidden = quiet;
  queue = queue
    .then(async () => {
      if (scan !== mine) return;
      if (!quiet) $("busy-text").textContent = waitFor(object, said, steps);
      try {
        const answer = await ask();
        if (scan === mine && objects.includes(object)) take(object, answer, said, steps);
        if (!quiet) $("alerts").replaceChildren();
      } catch (error) {
        if (scan === mine)
          complain(error, () => scan === mine && run(object, ask, { said, steps, quiet }));
      }
    })
    .finally(() => {
      working--;
      if (!working) $("busy").hidden = true;
      enable();
    });
  return queue;
}

/** What is waited for, in words. */
function waitFor(object, said, steps) {
  if (!said) return steps ? "Going through the history…" : "Fetching the mask…";
  if (!Object.keys(said).length) return "Reading the mask…";
  return object.at || object.mask.count ? "Correcting…" : "Segmenting…";
}

/** Shows an answer. */
function take(object, answer, said, steps = 0) {
  const { bits, ...told } = answer;
  // The server counts the steps that can be undone, and forgets the oldest: those are counted here.
  if (said) {
    // Steps without a prompt, a mask from a file for example, have their place too.
    const before = Array.from({ length: object.at }, (_, n) => object.prompts[n] ?? {});
    object.prompts = [...before, said];
    object.at++;
  }
  object.at = Math.max(0, object.at + steps);
  // What the server knows may be more than this page said of it, after a reload for example.
  if (told.voxels || told.undo || told.redo) object.begun = true;
  view.refresh(labels.apply(object.mask, told.region, bits));
  object.said = told;
  if (object.mask.count !== told.voxels) {
    // A difference was lost, to another page on the same object for example: fetch the whole.
    if (!object.again) {
      object.again = true;
      view.refresh(labels.clear(object.mask));
      run(object, () => server.answer(object.id), { quiet: true });
      return;
    }
    alarm(
      `${object.name} has ${object.mask.count} voxels here and ${told.voxels} on the server`,
      "Reload the page.",
    );
  }
  object.again = false;
  listObjects();
  if (object === active) showAnswer();
  save();
  say(
    told.voxels
      ? `${object.name}: ${volumeOf(told.ml)} ml, ${told.changed} voxels changed, ` +
          `${told.seconds.toFixed(2)} s.`
      : `${object.name} is empty.`,
  );
}

function showAnswer() {
  const said = active?.said;
  $("volume").textContent = said ? `${volumeOf(said.ml)} ml` : "–";
  showDiameters(said);
  $("score").textContent = said?.score != null ? said.score.toFixed(2) : "–";
  $("seconds").textContent = said ? `${said.seconds.toFixed(2)} s` : "–";
  listNotes(said?.notes);
  marks.prompts = active ? active.prompts.slice(0, active.at).filter(Boolean) : [];
  view.request();
  showUnsure();
}

/** Whether it is shown what the network is unsure of. */
let doubting = false;
/** How often that was asked for: what comes for an earlier answer is not shown. */
let doubts = 0;

/** Fetches what the network is unsure of in the active object's answer, where that is shown. */
async function showUnsure() {
  const mine = ++doubts,
    object = active;
  marks.unsure = null;
  view.request();
  if (!doubting || !isBegun(object)) return;
  try {
    const told = await server.unsure(object.id);
    if (mine !== doubts) return;
    marks.unsure = told;
    view.request();
  } catch (error) {
    if (mine !== doubts) return;
    setUnsure(false);
    complain(error, () => setUnsure(true));
  }
}

function setUnsure(on) {
  doubting = on;
  $("unsure").setAttribute("aria-pressed", String(on));
  showUnsure();
  say(on ? "Uncertain voxels are shown." : "Uncertain voxels are hidden.");
}

/** The diameters, and the slice that they lie on as its pane names and counts it. */
function showDiameters(said) {
  const mm = said?.diameters_mm;
  $("diameters").textContent = mm ? `${mm.map((d) => d.toFixed(1)).join(" × ")} mm` : "–";
  const { number, plane } = mm ? measured(said) : {};
  $("measured").textContent = mm ? `${PLANE_NAMES[plane].toLowerCase()}, slice ${number}` : "–";
  $("measured").disabled = !mm;
}

/** The server's diameters are those of a slice of the file's last axis. */
function measured({ diameters_slice: index }) {
  const { through, number } = view.grid.slice(2, index);
  return { plane: planeThrough(through), through, number };
}

/** Shows the slice that the diameters lie on. */
function showMeasured() {
  if (!active?.said?.diameters_mm) return say("There are no diameters yet.");
  const { plane, through, number } = measured(active.said);
  const to = [...view.cross];
  to[through] = number - 1;
  view.moveTo(active.mask.middle(view.grid, through, number - 1) ?? to);
  goTo(plane);
  tools.hoverAtCross();
  say(`${PLANE_NAMES[plane]}, slice ${number}: the diameters of ${active.name}.`);
}

/** Notes of the active object's answer. */
const listNotes = (notes) => writeNotes($("notes"), notes);

/** Notes of the scan, which stay as long as it is open: what is odd about it, what it is taken for. */
function listScanNotes(notes) {
  writeNotes($("scan-notes"), notes);
  $("scan-section").hidden = !notes?.length;
}

function writeNotes(place, notes) {
  place.replaceChildren(
    ...(notes ?? []).map((note) => {
      const item = document.createElement("li");
      item.textContent = note;
      return item;
    }),
  );
}

function step(which) {
  const object = active;
  if (!object?.id || !object.said?.[which]) return say(`There is nothing to ${which}.`);
  run(object, () => server[which](object.id), { steps: which === "redo" ? 1 : -1 });
}

function reset() {
  const object = active;
  if (!object?.id) return;
  if (object.mask.count && !confirm(`Clear ${object.name}? This cannot be undone.`))
    return;
  run(object, () => server.reset(object.id), { steps: -Infinity });
}

async function download(fetched, name) {
  try {
    const { name: given, blob } = await fetched();
    const url = URL.createObjectURL(blob),
      link = document.createElement("a");
    link.href = url;
    link.download = name(given);
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60e3);
    say(`Saved ${link.download}.`);
    lastSaved = { name: link.download, size: blob.size };
  } catch (error) {
    complain(error, () => download(fetched, name));
  }
}

/** For tests: what was saved last. */
let lastSaved = null;
const stem = () => scan.name.replace(READABLE, "");

/** After all answers are here, so that the file is what is seen. */
async function saveMask() {
  await queue;
  if (!isBegun(active)) return say("There is no mask to save yet.");
  const object = active,
    format = $("format").value;
  const name = `${stem()}_${object.name.replace(/[^\p{L}\p{N}.-]+/gu, "_")}.${format}`;
  await download(
    () => server.mask(object.id, format),
    () => name,
  );
}

async function saveAll() {
  await queue;
  if (!objects.some(isBegun)) return say("There is no mask to save yet.");
  const format = $("format").value;
  saving++;
  try {
    await download(
      async () => {
        await Promise.all(objects.map(withdraw));
        return server.labels(scan.id, format);
      },
      () => `${stem()}_labels.${format}`,
    );
  } finally {
    saving--;
  }
}

/** Files of all objects that are being made. */
let saving = 0;

/** Takes an object of which nothing was said from the server: a file of all would name it. */
async function withdraw(object) {
  await object.coming?.catch(() => {});
  const { id } = object;
  if (!id || object.begun) return;
  object.id = null;
  save();
  try {
    await server.dropObject(id);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}

function loadMask(file) {
  const object = active ?? addObject();
  run(object, async () => server.putMask(await idOf(object), file, file.name), { said: {} });
}

function save() {
  if (!scan?.id) return;
  remember({
    scan: scan.id,
    name: scan.name,
    active: active?.id ?? null,
    cross: view.grid?.toStored(view.cross),
    objects: objects
      .filter((o) => o.id)
      .map(({ id, name, colour, prompts, at, begun, mask }) => ({
        id,
        name,
        colour,
        prompts,
        at,
        begun,
        shown: mask.shown,
      })),
  });
}

// ---- Controls -----------------------------------------------------------------------------------

function enable() {
  const ready = Boolean(scan?.id),
    has = isBegun(active);
  $("close-scan").hidden = !scan;
  $("undo").disabled = !(has && active.said?.undo);
  $("redo").disabled = !(has && active.said?.redo);
  for (const id of ["save", "clear-object"]) $(id).disabled = !has;
  $("save-all").disabled = !objects.some(isBegun);
  for (const id of ["new-object", "load-mask", "format", "unsure"]) $(id).disabled = !ready;
  $("window").disabled = !view.volume;
  // A segmentation of DICOM refers to the slices of its scan.
  const option = $("format").querySelector("[value=dcm]");
  option.disabled = scan?.format !== "DICOM";
  if (option.disabled && option.selected) $("format").value = "nii.gz";
}

function pick(tool) {
  tools.choose(tool);
  for (const b of document.querySelectorAll("[data-tool][role=radio]")) {
    const on = b.dataset.tool === tool;
    b.setAttribute("aria-checked", String(on));
    b.tabIndex = on ? 0 : -1;
  }
  $("stage").dataset.tool = tool;
  $("hint").textContent = HINTS[tool];
  $("deep-field").hidden = tool !== "box";
}

function showPending() {
  const box = tools.pending;
  $("pending").hidden = !box;
  if (box) {
    const size = box.to.map((v, i) => v - box.from[i] + 1);
    $("pending-text").textContent =
      `Box of ${size.join(" × ")} voxels, ` +
      `through ${tools.depth} slice${tools.depth > 1 ? "s" : ""}`;
  }
  showWindow();
}

let preset = "auto";

function listWindows() {
  if (!view.volume) return;
  const ct = scan?.modality ? scan.modality === "ct" : view.auto.low < -400;
  const choices = [["auto", "Auto"], ...(ct ? WINDOWS : [])];
  if (!choices.some(([key]) => key === preset)) preset = "auto";
  $("window").replaceChildren(...choices.map(([key, name]) => new Option(name, key)));
  const own = new Option("Custom", "own");
  own.hidden = true;
  $("window").append(own);
  $("window").disabled = false;
  $("window").value = preset;
  setPreset(preset);
}

function setPreset(key) {
  preset = key;
  const found = WINDOWS.find((w) => w[0] === key);
  if (found) view.setWindow(found[2] - found[3] / 2, found[2] + found[3] / 2);
  else view.setWindow(view.auto.low, view.auto.high);
  showWindow();
}

function nextPreset() {
  const keys = [...$("window").options].map((o) => o.value).filter((v) => v !== "own");
  setPreset(keys[(keys.indexOf(preset) + 1) % keys.length]);
  say(`Window: ${$("window").selectedOptions[0].text}.`);
}

function showWindow() {
  if (!view.window || !view.volume) return;
  const { low, high } = view.window;
  const found = WINDOWS.find((w) => w[0] === preset);
  const [a, b] = found
    ? [found[2] - found[3] / 2, found[2] + found[3] / 2]
    : [view.auto.low, view.auto.high];
  const own = preset === "own" || Math.abs(a - low) + Math.abs(b - high) > 1e-3 * (b - a);
  if (own) preset = "own";
  $("window").value = preset;
  const digits = high - low < 10 ? 2 : 0;
  $("window-values").textContent =
    `${((low + high) / 2).toFixed(digits)} / ${(high - low).toFixed(digits)}`;
}

function setLayout(layout) {
  view.lay(layout);
  $("layout").value = layout;
  const one = { axial: AXIAL, coronal: CORONAL, sagittal: SAGITTAL }[layout];
  if (one !== undefined) tools.plane = one;
  tools.show();
}

/** One pane large, and back to what was before. */
let several = "four";

function enlarge() {
  if (view.panes.size > 1) {
    several = view.layout;
    setLayout(PLANE_NAMES[tools.plane].toLowerCase());
  } else setLayout(several);
}

/** Keys move in this plane; where another fills the stage, or space, it takes its place. */
function goTo(plane) {
  if (!view.panes.has(plane)) setLayout(PLANE_NAMES[plane].toLowerCase());
  tools.plane = plane;
  tools.show();
}

function nextPlane() {
  const planes = [AXIAL, SAGITTAL, CORONAL];
  const plane = planes[(planes.indexOf(tools.plane) + 1) % planes.length];
  goTo(plane);
  say(`${PLANE_NAMES[plane]}, slice ${view.cross[PLANE_AXES[plane][2]] + 1}.`);
}

function setContour(on) {
  view.setFill({ contour: on });
  document.querySelector(`[name=fill][value=${on ? "contour" : "fill"}]`).checked = true;
  $("opacity").disabled = on;
}

function setHidden(hidden) {
  view.setFill({ hidden });
  $("shown").checked = !hidden;
  say(hidden ? "Masks are hidden." : "Masks are shown.");
}

function clickAtCross(on) {
  if (view.grid) prompt({ points: [{ at: view.grid.toStored(view.cross), on }] });
}

function neighbour(by) {
  if (objects.length < 2) return;
  choose(objects[(objects.indexOf(active) + by + objects.length) % objects.length]);
  say(`${active.name} is active.`);
}

function walk(key, far) {
  const [h, v] = PLANE_AXES[tools.plane] ?? PLANE_AXES[AXIAL];
  const tile = view.tiles().find((t) => t.plane === tools.plane);
  const [right, up] = tile ? [Math.sign(tile.right), -Math.sign(tile.down)] : [1, 1];
  const next = [...view.cross],
    n = far ? 10 : 1;
  if (key === "ArrowLeft") next[h] -= right * n;
  if (key === "ArrowRight") next[h] += right * n;
  if (key === "ArrowUp") next[v] += up * n;
  if (key === "ArrowDown") next[v] -= up * n;
  view.moveTo(next);
  tools.hoverAtCross();
}

/** One slice on, by a key. */
function turnPage(by) {
  view.scroll(tools.plane, by);
  tools.hoverAtCross();
}

function deep(on) {
  tools.deep = on;
  $("deep").checked = on;
  say(
    on
      ? "Boxes can be extended through slices: drag on another plane, or press [ and ]."
      : "Boxes are one slice thick.",
  );
}

/** Keys of the page; the ones that a control under the focus needs stay with it. */
function key(e) {
  if ($("keys").open || $("series").open) return;
  const at = document.activeElement;
  if (at?.matches("input[type=text], input[type=color]")) return;
  const control = at?.matches("button, select, input, a");
  if (control && [" ", "Enter"].includes(e.key)) return;
  if (
    at?.matches("select, input[type=range], input[type=radio], [role=radio]") &&
    /^(Arrow|Page|Home|End)/.test(e.key)
  )
    return;
  if (at?.matches("select") && e.key.length === 1) return;
  const pressed = e.key.length === 1 ? e.key.toLowerCase() : e.key;
  if (e.ctrlKey || e.metaKey) {
    if (pressed === "z") step(e.shiftKey ? "redo" : "undo");
    else if (pressed === "y") step("redo");
    else if (pressed === "s") e.shiftKey ? saveAll() : saveMask();
    else if (pressed === "o") $("file").click();
    else return;
    return e.preventDefault();
  }
  if (e.altKey) return;
  const tool = TOOLS[Number(pressed) - 1];
  if (tool) pick(tool);
  else if (pressed === "?") $("keys").showModal();
  else if (pressed === "o") $(e.shiftKey ? "folder" : "file").click();
  else if (pressed === "Escape") {
    tools.cancel();
    $("alerts").replaceChildren();
  } else if (!view.grid) return;
  else if (pressed === "z") step("undo");
  else if (pressed === "y") step("redo");
  else if (pressed === "n") scan?.id && fresh();
  else if (pressed === "r" || pressed === "F2") rename();
  else if (pressed === "k") nextColour();
  else if (pressed === "w") nextPreset();
  else if (pressed === "s") e.shiftKey ? saveAll() : saveMask();
  else if (pressed === " ") setHidden(!view.fill.hidden);
  else if (pressed === "c") setContour(!view.fill.contour);
  else if (pressed === "u") scan?.id && setUnsure(!doubting);
  else if (pressed === "m") enlarge();
  else if (pressed === "d") showMeasured();
  else if (pressed === "p") nextPlane();
  else if (pressed === "i") sayWhere();
  else if (pressed === "t") deep(!tools.deep);
  else if (pressed === "0") view.resetView();
  else if (pressed === "[") tools.deepen(-1);
  else if (pressed === "]") tools.deepen(1);
  else if (pressed === ",") neighbour(-1);
  else if (pressed === ".") neighbour(1);
  else if (pressed === "+" || pressed === "=") view.zoomBy(1.25);
  else if (pressed === "-") view.zoomBy(0.8);
  else if (pressed === "Enter") tools.confirm() || clickAtCross(!e.shiftKey);
  else if (pressed === "PageUp") turnPage(1);
  else if (pressed === "PageDown") turnPage(-1);
  else if (pressed.startsWith("Arrow")) walk(pressed, e.shiftKey);
  else return;
  e.preventDefault();
}

/** A new object; one that is still without a prompt will do. */
function fresh() {
  const empty = objects.find((o) => !isBegun(o));
  if (empty) choose(empty);
  else addObject();
  say(`${active.name}: click into it, or draw a box around it.`);
}

/** Forgets the scan here and on the server. */
async function close() {
  if (!mayLeave()) return;
  await closeScan();
  $("start").hidden = false;
  $("start-note").hidden = true;
  document.title = "prism";
  tellWhere();
  say("The scan is closed, here and on the server.");
}

/** Tells the server that the scan is used. Where it is gone, the next click says so. */
function beat() {
  // What is kept here is no older than that either.
  save();
  if (scan?.id) server.scan(scan.id).catch(() => {});
}

function mayLeave() {
  return (
    !objects.some((o) => o.mask.count) ||
    confirm(`Close ${scan.name}? Unsaved masks are lost.`)
  );
}

function wire() {
  // A hand on the mouse goes on to the picture, and so do its keys.
  document.addEventListener("click", (e) => {
    const pressed = e.detail > 0 && e.target.closest?.("nav button, aside button, #pending button");
    if (pressed && view.grid) $("stage").focus({ preventScroll: true });
  });
  document.addEventListener("keydown", key);
  for (const b of document.querySelectorAll("[data-tool][role=radio]")) {
    b.addEventListener("click", () => pick(b.dataset.tool));
    b.addEventListener("keydown", (e) => {
      const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[e.key];
      if (!by) return;
      const n = TOOLS.length;
      pick(TOOLS[(TOOLS.indexOf(tools.tool) + by + n) % n]);
      document.querySelector(`[role=radio][data-tool=${tools.tool}]`).focus();
      e.preventDefault();
    });
  }
  const on = (id, run, event = "click") => $(id).addEventListener(event, run);
  on("open", () => $("file").click());
  on("close-scan", close);
  on("choose", () => $("file").click());
  on(
    "file",
    () => {
      const files = [...$("file").files];
      $("file").value = "";
      openAll(Promise.resolve(files).then(chosen));
    },
    "change",
  );
  on("choose-folder", () => $("folder").click());
  on("open-folder", () => $("folder").click());
  on(
    "folder",
    () => {
      const files = [...$("folder").files];
      $("folder").value = "";
      openAll(Promise.resolve(files).then(chosen));
    },
    "change",
  );
  on(
    "mask-file",
    () => {
      const [file] = $("mask-file").files;
      $("mask-file").value = "";
      if (file) loadMask(file);
    },
    "change",
  );
  on("load-mask", () => $("mask-file").click());
  on("new-object", fresh);
  on("clear-object", reset);
  on("undo", () => step("undo"));
  on("redo", () => step("redo"));
  on("save", saveMask);
  on("save-all", saveAll);
  on("help", () => $("keys").showModal());
  on("stop-upload", () => {
    uploading?.abort();
    if (!scan) return say("The series was not sent.");
    alarm("The scan was not sent", "It is displayed, but cannot be segmented.", {
      label: "Send",
      run: () => scan && !scan.id && upload(),
    });
  });
  on("window", () => setPreset($("window").value), "change");
  on("opacity", () => view.setFill({ opacity: $("opacity").value / 100 }), "input");
  on("shown", () => setHidden(!$("shown").checked), "change");
  on("unsure", () => setUnsure(!doubting));
  on("measured", showMeasured);
  on("layout", () => setLayout($("layout").value), "change");
  on("radiological", () => view.setRadiological($("radiological").checked), "change");
  on("deep", () => deep($("deep").checked), "change");
  on("thinner", () => tools.deepen(-1));
  on("deeper", () => tools.deepen(1));
  on("confirm", () => tools.confirm());
  on("drop-box", () => tools.cancel());
  for (const radio of document.querySelectorAll("[name=fill]")) {
    radio.addEventListener("change", () => setContour(radio.value === "contour" && radio.checked));
  }
  $("stage").addEventListener("dblclick", () => tools.tool === "move" && view.grid && enlarge());
  // Controls that lie over the picture are no part of it.
  for (const id of ["pending", "start", "busy"]) {
    for (const event of ["pointerdown", "wheel", "dblclick"]) {
      $(id).addEventListener(event, (e) => e.stopPropagation());
    }
  }
  let over = 0;
  const files = (e) => e.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (e) => {
    if (files(e)) $("drop").hidden = ++over <= 0;
  });
  addEventListener("dragleave", (e) => {
    if (files(e) && --over <= 0) $("drop").hidden = true;
  });
  addEventListener("dragover", (e) => files(e) && e.preventDefault());
  addEventListener("drop", (e) => {
    if (!files(e)) return;
    e.preventDefault();
    over = 0;
    $("drop").hidden = true;
    openAll(dropped(e.dataTransfer));
  });
  addEventListener("pagehide", save);
  setInterval(beat, BEAT);
  $("picture").addEventListener("webglcontextlost", () =>
    alarm("the browser lost the graphics device", "Reload the page: the masks are on the server."),
  );
  new ResizeObserver(() => view.nv && view.lay()).observe($("stage"));
}

// For tests, and for developers who look into the page with the browser's tools.
window.prism = {
  view,
  tools,
  marks,
  get scan() {
    return scan;
  },
  get objects() {
    return objects;
  },
  get active() {
    return active;
  },
  get saved() {
    return lastSaved;
  },
  overlay: () => labels?.drawn() ?? 0,
  idle: async () => {
    await deciding;
    // Answers may ask for more.
    for (let n = 0; n < 10; n++) await queue;
    return working === 0 && !uploading;
  },
  open,
  openAll,
};

wire();
pick("click");
enable();
try {
  await view.start();
  // A pane in 3D costs a processor more than all planes together.
  if (view.slow) several = "planes";
  setLayout(several);
  await restore();
} catch (error) {
  console.error(error);
  alarm(`the page cannot start: ${error?.message ?? error}`);
}
document.documentElement.dataset.ready = "true";
