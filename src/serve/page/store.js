// What a reload of the page, or another tab after this one was closed, brings back: which scan and
// objects are open (localStorage, an entry a scan), and the scan's bytes (IndexedDB). The masks
// themselves lie on the server.
//
// A tab knows its own scan by an entry in sessionStorage, and has a lock on it as long as it lives:
// so others tell what a closed tab left from what a user works on. Browsers have locks on pages
// of this machine and by https alone; elsewhere a tab takes up nothing but its own.

/** In sessionStorage the ID of the tab's scan; in localStorage, with a dot and it, the rest. */
const KEY = "prism.session";
/** Milliseconds that a reloaded page waits for its own lock: the page before it may just go. */
const PATIENCE = 3000;
/** Larger scans are not kept: a reload asks for the file again. */
const LARGEST = 512 * 2 ** 20;
/** Scans are patients' data: what a closed tab left is thrown away after this long. */
const HOURS = 12;

const placeOf = (scan) => `${KEY}.${scan}`;
const isOld = (time) => !(Date.now() - time <= HOURS * 3600e3);

/** The scan that this tab has or waits for, and what lets it go. */
let held = null;

function release() {
  held?.release();
  held = null;
}

/** Keeps other tabs off a scan. Returns a promise of whether none of them has it. */
function hold(scan, patience = 0) {
  if (held?.scan === scan) return held.mine;
  release();
  const own = { scan, release: null, mine: Promise.resolve(true) };
  const ends = new Promise((end) => {
    own.release = end;
  });
  if (navigator.locks) {
    const options = patience ? { signal: AbortSignal.timeout(patience) } : { ifAvailable: true };
    own.mine = new Promise((done) => {
      const granted = (lock) => {
        done(lock !== null);
        return lock && ends;
      };
      navigator.locks.request(placeOf(scan), options, granted).catch(() => done(false));
    });
  }
  held = own;
  return own.mine;
}

/** What is known of a scan, or null. */
function read(scan) {
  try {
    const session = JSON.parse(localStorage.getItem(placeOf(scan)));
    return session && !isOld(session.time) ? session : null;
  } catch {
    return null;
  }
}

/** The scans of all tabs, the newest first. What is old is thrown away. */
function all() {
  const scans = Object.keys(localStorage)
    .filter((key) => key.startsWith(placeOf("")))
    .map((key) => key.slice(placeOf("").length));
  const sessions = [];
  for (const scan of scans) {
    const session = read(scan);
    if (session) sessions.push(session);
    else localStorage.removeItem(placeOf(scan));
  }
  return sessions.sort((a, b) => b.time - a.time);
}

export function remember(session) {
  hold(session.scan);
  const bare = { ...session, objects: session.objects?.map((o) => ({ ...o, prompts: [] })) };
  // Long strokes may not fit. Without them a reload shows the masks, not how they came to be.
  for (const kept_ of [session, bare]) {
    try {
      sessionStorage.setItem(KEY, session.scan);
      const text = JSON.stringify({ ...kept_, time: Date.now() });
      localStorage.setItem(placeOf(session.scan), text);
      return;
    } catch {
      // Full or forbidden: the page works, and a reload begins anew.
    }
  }
}

/** What this tab works on, or null. */
export function remembered() {
  try {
    const scan = sessionStorage.getItem(KEY);
    return scan && read(scan);
  } catch {
    return null;
  }
}

/** Leaves what this tab works on to others. */
export function leave() {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // Forbidden: nothing was kept.
  }
  release();
}

/** Throws away what is known of this tab's scan. */
export function forget() {
  try {
    const scan = sessionStorage.getItem(KEY);
    if (scan) localStorage.removeItem(placeOf(scan));
  } catch {
    // Forbidden: nothing was kept.
  }
  leave();
}

/**
 * What the page begins with: the tab's own scan, else the newest that a closed tab left (`left`
 * tells so) and that is still on the server, which `ask` asks about; else null.
 */
export async function takeOver(ask) {
  try {
    const own = sessionStorage.getItem(KEY);
    // A tab that was duplicated has the entry of the other one, and not the lock.
    if (own && read(own) && (await hold(own, PATIENCE))) return read(own);
    leave();
    if (!navigator.locks) return null;
    for (const session of all()) {
      if (await hold(session.scan)) {
        try {
          await ask(session.scan);
          sessionStorage.setItem(KEY, session.scan);
          return { ...session, left: true };
        } catch (error) {
          // Without an answer, or without the token, nothing is known of any of them.
          if (error.status !== 404) break;
          localStorage.removeItem(placeOf(session.scan));
          await discard(session.scan);
        }
      }
    }
  } catch {
    // Forbidden: the page begins anew.
  }
  leave();
  return null;
}

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
      if (isOld(at.value.time)) at.delete();
      at.continue();
    };
  } catch {
    // Nothing was kept then.
  }
}
