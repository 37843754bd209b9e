// The server's HTTP interface: requests, answers, and errors that say what to do about them.

const TOKEN = "prism.token";

// The token comes in the address's fragment, which no browser sends to a server. It is taken out of
// the address, so that it does not end up in a bookmark or a screenshot.
const given = /^#token=(.+)$/.exec(location.hash);
if (given) {
  let token = given[1];
  try {
    token = decodeURIComponent(token);
  } catch {
    // A percent sign that stands for itself.
  }
  sessionStorage.setItem(TOKEN, token);
  history.replaceState(null, "", location.pathname + location.search);
}

const ADVICE = {
  401: "Open the page with the full address that “prism serve” printed: it ends in #token=…",
  403: "Open the page with the address that “prism serve” printed.",
  404: "The server may have released the scan after a pause, or was restarted: send it again.",
  413: "Raise the server's limit, or crop the scan to the region of interest.",
  415: "Save it as NIfTI (.nii.gz), NRRD (.nrrd) or MetaImage (.mha), and open that.",
  422: "Nothing was changed: correct the input and try again.",
  503: "The server is full. Close scans that are no longer needed, or try again in a minute.",
  507: "The server's disk is full: close scans that are no longer needed, and try again.",
};

/** A request that failed: what was said, and what a person can do. */
export class ApiError extends Error {
  constructor(status, message, advice = ADVICE[status] ?? "") {
    super(message);
    this.status = status;
    this.advice = advice;
  }
}

function headers(more = {}) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

function refusal(status, text) {
  let said = {};
  try {
    said = JSON.parse(text) ?? {};
  } catch {
    // Something between the page and the server answered: its status has to do.
  }
  const error = new ApiError(status, said.error ?? `the server responded with ${status}`);
  // Where it holds several, those that can be asked for.
  error.series = said.series ?? null;
  return error;
}

const silent = () =>
  new ApiError(
    0,
    "the server does not respond",
    "Check that “prism serve” is running and that the network is up, then try again.",
  );

const pause = (ms) => new Promise((go) => setTimeout(go, ms));

async function request(method, path, { body, type, again = 2 } = {}) {
  // A full server says when to come again; two more tries, then a person decides.
  for (let tries = 0; ; tries++) {
    let response;
    try {
      response = await fetch(path, {
        method,
        body,
        headers: headers(type ? { "Content-Type": type } : {}),
        cache: "no-store",
      });
    } catch {
      throw silent();
    }
    if (response.ok) return response;
    if (response.status !== 503 || tries === again) {
      throw refusal(response.status, await response.text());
    }
    await pause(1000 * Math.min(10, Number(response.headers.get("Retry-After")) || 1));
  }
}

const json = async (method, path, value) =>
  (
    await request(
      method,
      path,
      value === undefined ? {} : { body: JSON.stringify(value), type: "application/json" },
    )
  ).json();

/** What an answer says of the mask, and the new mask within the region that changed. */
async function answer(method, path, options) {
  const response = await request(method, path, options);
  const said = JSON.parse(response.headers.get("X-Prism-Answer") ?? "null");
  if (!said)
    throw new ApiError(
      502,
      "the server's response has no X-Prism-Answer header",
      "A proxy between this page and the server drops headers: connect without it.",
    );
  const bits = new Uint8Array(await response.arrayBuffer());
  const expected = said.region
    ? Math.ceil(said.region.reduce((n, [from, to]) => n * (to - from), 1) / 8)
    : 0;
  if (bits.length !== expected)
    throw new ApiError(
      502,
      `the server's response has ${bits.length} bytes, expected ${expected}`,
      "Try again.",
    );
  return { ...said, bits };
}

async function file(path) {
  const response = await request("GET", path);
  const named = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
  return { name: named?.[1] ?? "mask", blob: await response.blob() };
}

export const server = {
  about: () => json("GET", "v1"),

  /** Sends a scan; `progress` is called with the part that is sent, from 0 to 1. */
  async upload(blob, name, modality, progress, signal, series = "") {
    // A server that refuses a body hangs up while it is sent, and the browser does not tell why: it
    // is asked about the token and the size before.
    const { limits } = await server.about();
    if (blob.size > limits.scan_bytes)
      throw new ApiError(
        413,
        `the scan's file has ${blob.size} bytes: the server accepts at most ${limits.scan_bytes}`,
      );
    signal?.throwIfAborted();
    const query = new URLSearchParams({ name });
    if (modality) query.set("modality", modality);
    if (series) query.set("series", series);
    return new Promise((done, fail) => {
      // fetch() tells nothing of a request's progress.
      const sent = new XMLHttpRequest();
      sent.open("POST", `v1/scans?${query}`);
      for (const [key, value] of Object.entries(headers())) sent.setRequestHeader(key, value);
      sent.setRequestHeader("Content-Type", "application/octet-stream");
      sent.upload.onprogress = (e) => e.lengthComputable && progress(e.loaded / e.total);
      sent.onerror = () => fail(silent());
      sent.onabort = () => fail(new DOMException("the upload was cancelled", "AbortError"));
      sent.onload = () => {
        if (sent.status !== 201) return fail(refusal(sent.status, sent.responseText));
        try {
          done(JSON.parse(sent.responseText));
        } catch {
          fail(refusal(502, ""));
        }
      };
      signal?.addEventListener("abort", () => sent.abort());
      sent.send(blob);
    });
  },
  scan: (scan) => json("GET", `v1/scans/${scan}`),
  close: (scan) => json("DELETE", `v1/scans/${scan}`),
  newObject: (scan, name, colour) => json("POST", `v1/scans/${scan}/objects`, { name, colour }),
  rename: (object, name, colour) => json("PATCH", `v1/objects/${object}`, { name, colour }),
  dropObject: (object) => json("DELETE", `v1/objects/${object}`),
  prompt: (object, said) =>
    answer("POST", `v1/objects/${object}/prompts`, {
      body: JSON.stringify(said),
      type: "application/json",
    }),
  /** Tells where a first click may come. Once: by the next try it would be elsewhere. */
  prepare: async (object, point) =>
    (
      await request("POST", `v1/objects/${object}/prepare`, {
        body: JSON.stringify({ point }),
        type: "application/json",
        again: 0,
      })
    ).json(),
  putMask: (object, blob, name) =>
    answer("PUT", `v1/objects/${object}/mask?${new URLSearchParams({ name })}`, {
      body: blob,
      type: "application/octet-stream",
    }),
  undo: (object) => answer("POST", `v1/objects/${object}/undo`),
  redo: (object) => answer("POST", `v1/objects/${object}/redo`),
  reset: (object) => answer("POST", `v1/objects/${object}/reset`),
  answer: (object) => answer("GET", `v1/objects/${object}/answer`),
  /** The voxels that the network is unsure of, packed as an answer's are. */
  unsure: (object) => answer("GET", `v1/objects/${object}/unsure`),
  image: (scan) => file(`v1/scans/${scan}/image?format=nii`),
  mask: (object, format) => file(`v1/objects/${object}/mask?format=${format}`),
  labels: (scan, format) => file(`v1/scans/${scan}/labels?format=${format}`),
};
