//! The page: a viewer for the browser, built into the program.

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::Response;

/// A file of the page: its path, its type, whether it is packed by gzip, its contents.
type File = (&'static str, &'static str, bool, &'static [u8]);

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const PICTURE: &str = "image/svg+xml";
const TEXT: &str = "text/plain; charset=utf-8";

/// All of them.
static FILES: [File; 14] = [
    ("/", HTML, false, include_bytes!("page/index.html")),
    ("/LICENSES.txt", TEXT, false, include_bytes!("page/LICENSES.txt")),
    ("/api.js", SCRIPT, false, include_bytes!("page/api.js")),
    ("/app.js", SCRIPT, false, include_bytes!("page/app.js")),
    ("/grid.js", SCRIPT, false, include_bytes!("page/grid.js")),
    ("/icon.svg", PICTURE, false, include_bytes!("page/icon.svg")),
    ("/marks.js", SCRIPT, false, include_bytes!("page/marks.js")),
    ("/masks.js", SCRIPT, false, include_bytes!("page/masks.js")),
    ("/niivue.js", SCRIPT, true, include_bytes!("page/niivue.js.gz")),
    ("/series.js", SCRIPT, false, include_bytes!("page/series.js")),
    ("/store.js", SCRIPT, false, include_bytes!("page/store.js")),
    ("/style.css", STYLE, false, include_bytes!("page/style.css")),
    ("/tools.js", SCRIPT, false, include_bytes!("page/tools.js")),
    ("/view.js", SCRIPT, false, include_bytes!("page/view.js")),
];

/// The page's content security policy: only what this server sends is allowed. The viewer has
/// pictures inlined in its own script (data:), and sets styles one by one, which needs no
/// permission.
const POLICY: &str = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; \
    style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; worker-src 'self' blob:; \
    object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The paths of the page's files.
pub fn paths() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(path, ..)| *path)
}

/// Whether a path is one of the page's.
pub fn has(path: &str) -> bool {
    paths().any(|p| p == path)
}

/// A file of the page.
pub fn file(asked: &str) -> Option<Response> {
    let (_, kind, packed, bytes) = *FILES.iter().find(|(path, ..)| *path == asked)?;
    let mut response = Response::new(Body::from(bytes));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    // Another version of the program has other files.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if packed {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Some(response)
}
