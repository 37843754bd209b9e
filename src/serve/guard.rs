//! Who may call, and the headers of every answer.
//!
//! A server that is reachable only from this machine is still within reach of every web page that
//! is open in a browser there: by a name that was made to point here (so the requested host name
//! counts), and by requests whose answers the page cannot read but which are still executed (so the
//! page's origin counts).

use super::Shared;
use super::body;
use super::failure::Failure;
use super::page;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, AUTHORIZATION, CACHE_CONTROL,
    CONTENT_LENGTH, HOST, ORIGIN, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// Names of this machine that a browser may use for it.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// The header by which browsers say which page is asking.
const SITE: &str = "sec-fetch-site";

/// Paths of prism's own interface, whose errors have another format than nnInteractive's.
pub const OWN: &str = "/v1";

/// An entry point.
#[derive(Clone)]
pub struct Entry {
    pub shared: Arc<Shared>,
    /// Whether callers need no token there: then it is only for this machine's programs.
    pub keyless: bool,
}

/// Lets a request through, or answers it with an error.
pub async fn guard(State(entry): State<Entry>, request: Request, next: Next) -> Response {
    let shared = &entry.shared;
    let path = request.uri().path().to_string();
    let own = path == OWN || path.starts_with("/v1/");
    let origin = request.headers().get(ORIGIN).cloned();
    let allowed = match (&origin, &shared.settings.allow_origin) {
        // If no token is needed no page gets in.
        (Some(origin), Some(allowed)) if !entry.keyless && origin == allowed.as_str() => {
            Some(origin.clone())
        }
        _ => None,
    };
    let checked = check(&entry, &request, &path, allowed.is_some());
    let mut response = match checked {
        Err(failure) => failure.into_response(),
        // What a browser asks before a page of another origin may ask.
        Ok(()) if allowed.is_some() && request.method() == Method::OPTIONS => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        Ok(()) => match shared.progress.now() {
            Some((done, all)) if !is_open(&path) => {
                let (parts, body) = request.into_parts();
                body::pass_by(&parts.headers, body, shared.most_scan).await;
                Failure::full(format!(
                    "the server is restoring its state: {done} of {all} scans, clients and \
                     sessions so far"
                ))
                .into_response()
            }
            _ => {
                let (request, broken) = whole(request).await;
                // What its head says is still recorded, such as that a client wrote to its buffer.
                let answer = next.run(request).await;
                broken.map_or(answer, Failure::into_response)
            }
        },
    };
    shared.metrics.request(!response.status().is_success());
    if let (Some(failure), false) = (response.extensions_mut().remove::<Failure>(), own) {
        response = failure.reply("detail");
    }
    let headers = response.headers_mut();
    let mut put = |name: HeaderName, value: &'static str| {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    };
    put(X_CONTENT_TYPE_OPTIONS, "nosniff");
    put(CACHE_CONTROL, "no-store");
    put(REFERRER_POLICY, "no-referrer");
    if let Some(origin) = allowed {
        put(ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, PUT, PATCH, DELETE");
        put(ACCESS_CONTROL_ALLOW_HEADERS, "Authorization, Content-Type, X-Meta, X-Lease-Token");
        put(ACCESS_CONTROL_EXPOSE_HEADERS, "X-Prism-Answer, X-Meta, Retry-After");
        put(ACCESS_CONTROL_MAX_AGE, "600");
        put(VARY, "Origin");
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    response
}

/// A request with all of its body, if that is short. If an answer was sent before a body arrived,
/// as by a path that reads none, the connection would be closed and the client's next request would
/// be lost: some clients send a head and its body separately. If the body does not arrive, the
/// request has none, and the answer is returned beside it. GET, HEAD and DELETE have no body,
/// whatever they announce: MONAI Label's client repeats there the length of what it sent before.
async fn whole(request: Request) -> (Request, Option<Failure>) {
    if [Method::GET, Method::HEAD, Method::DELETE].contains(request.method()) {
        return (request, None);
    }
    let length = request.headers().get(CONTENT_LENGTH);
    let length: Option<usize> = length.and_then(|n| n.to_str().ok()?.parse().ok());
    match length {
        Some(1..=body::SHORT) => {
            let (parts, body) = request.into_parts();
            let read = body::read(&parts.headers, body, body::SHORT).await;
            match read {
                Ok(sent) => (Request::from_parts(parts, Body::from(sent.bytes)), None),
                Err(broken) => (Request::from_parts(parts, Body::empty()), Some(broken)),
            }
        }
        _ => (request, None),
    }
}

fn check(entry: &Entry, request: &Request, path: &str, allowed: bool) -> Result<(), Failure> {
    let Entry { shared, keyless } = entry;
    let headers = request.headers();
    let host = headers.get(HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    if (shared.is_local || *keyless) && !is_local(host) {
        return Err(Failure::new(
            StatusCode::FORBIDDEN,
            "wrong Host header: this server accepts only localhost, 127.0.0.1 or [::1]",
        ));
    }
    let stranger = || {
        Failure::new(
            StatusCode::FORBIDDEN,
            "request from a page of another origin: allow its origin with --allow-origin",
        )
    };
    if !allowed && let Some(origin) = headers.get(ORIGIN) {
        let origin = origin.to_str().unwrap_or_default();
        let same = ["http://", "https://"]
            .iter()
            .any(|scheme| origin.strip_prefix(scheme).is_some_and(|o| o == host));
        if !same {
            return Err(stranger());
        }
    }
    // A picture that a page shows is requested without an origin, and GET is all that ITK-SNAP's
    // protocol needs for a click; browsers say so in another header.
    if !allowed
        && !page::has(path)
        && let Some(site) = headers.get(SITE)
        && !["same-origin", "none"].iter().any(|s| site == s)
    {
        return Err(stranger());
    }
    // Before a page of another origin may ask anything, its browser asks whether it may, without a
    // token.
    if is_open(path) || (allowed && request.method() == Method::OPTIONS) {
        return Ok(());
    }
    match &shared.settings.token {
        Some(token) if !keyless && !bearer(headers).is_some_and(|text| token.is(text)) => {
            let message = match headers.contains_key(AUTHORIZATION) {
                true => "Invalid bearer token",
                false => "Missing bearer token",
            };
            Err(Failure::new(StatusCode::UNAUTHORIZED, message))
        }
        _ => Ok(()),
    }
}

/// Whether a path reveals nothing about any client.
fn is_open(path: &str) -> bool {
    path == "/healthz" || page::has(path)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let text = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = text.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Whether a Host header names this machine, at any port: a tunnel has a port of its own.
fn is_local(host: &str) -> bool {
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    LOCAL.iter().any(|name| match host.get(..name.len()) {
        Some(start) if start.eq_ignore_ascii_case(name) => {
            let rest = &host[name.len()..];
            rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port)
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_this_machines_or_not() {
        for host in ["localhost", "localhost:1527", "LocalHost:1", "127.0.0.1:80", "[::1]:1527"] {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "localhost:1527.evil.example",
            "127.0.0.1.evil.example:1527",
            "localhost:",
            "user@localhost",
            "ölocalhost",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn a_bearer_is_read_in_any_capitals() {
        let of = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::from_static(value));
            bearer(&headers).map(str::to_string)
        };
        assert_eq!(of("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(of("bearer  abc ").as_deref(), Some("abc"));
        assert_eq!((of("Basic abc"), of("abc")), (None, None));
    }
}
