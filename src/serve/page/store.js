// What a reload of the page brings back: which scan and objects are open (sessionStorage), and the
// scan's bytes (IndexedDB). The masks themselves lie on the server.

const KEY = "prism.session";
/** Larger scans are not kept: a reload asks for the file again. */
const LARGEST = 512 * 2 ** 20;
/** Scans are patients' data: what a closed tab left is thrown away after this long. */
const HOURS = 12;

export function remember(session) {
  const bare = { ...session, objects: session.objects?.map((o) => ({ ...o, prompts: [] })) };
  // Long strokes may not fit. Without them a reload shows the masks, not how they came to be.
  for (const kept_ of [session, bare]) {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(kept_));
      return;
    } catch {
      // Full or forbidden: the page works, and a reload begins anew.
    }
  }
}

export function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? "null");
  } catch {
    return null;
  }
}

export const forget = () => sessionStorage.removeItem(KEY);

const promised = (request) =>
  new Promise((done, fail) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => fail(request.error);
  });

async function table(mode) {
  const opening = indexedDB.open("prism", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("scans");
  const base = await promised(opening);
  return base.transaction("scans", mode).objectStore("scans");
}

/** Keeps a scan's file under its ID. Returns whether it is kept. */
export async function keep(scan, file) {
  if (file.size > LARGEST) return false;
  try {
    await promised(
      (await table("readwrite")).put({ file, name: file.name, time: Date.now() }, scan),
    );
    return true;
  } catch {
    return false;
  }
}

/** The file that was kept under an ID, or null. */
export async function kept(scan) {
  try {
    const found = await promised((await table("readonly")).get(scan));
    return found ? new File([found.file], found.name) : null;
  } catch {
    return null;
  }
}

/** Throws away the file that was kept under an ID, and all that are old. */
export async function discard(scan) {
  try {
    const scans = await table("readwrite");
    if (scan) scans.delete(scan);
    const walk = scans.openCursor();
    walk.onsuccess = () => {
      const at = walk.result;
      if (!at) return;
      if (Date.now() - at.value.time > HOURS * 3600e3) at.delete();
      at.continue();
    };
  } catch {
    // Nothing was kept then.
  }
}
