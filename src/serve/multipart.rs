//! Forms of several parts (RFC 7578): fields and files, in bodies in memory. Results are ranges in
//! the body: nothing is copied except names.

use super::failure::Failure;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use std::ops::Range;

/// The most parts of a form.
const MOST_PARTS: usize = 32;
/// The most bytes before a part's content.
const MOST_HEAD: usize = 8 << 10;
/// The most letters of a boundary (RFC 2046, section 5.1.1).
const MOST_BOUNDARY: usize = 70;

/// A part of a form.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub name: String,
    /// The part's name at the sender, if it is a file.
    pub file: Option<String>,
    /// The range of its content in the body.
    pub content: Range<usize>,
}

/// Whether a request's body is such a form.
pub fn is_form(headers: &HeaderMap) -> bool {
    let kind = kind(headers).split(';').next().unwrap_or_default();
    kind.trim().eq_ignore_ascii_case("multipart/form-data")
}

fn kind(headers: &HeaderMap) -> &str {
    headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default()
}

/// The parts of a body.
pub fn parts(headers: &HeaderMap, body: &[u8]) -> Result<Vec<Part>, Failure> {
    let boundary = parameter(kind(headers), "boundary")
        .filter(|b| is_form(headers) && (1..=MOST_BOUNDARY).contains(&b.len()))
        .ok_or_else(|| {
            Failure::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "expected multipart/form-data with a boundary",
            )
        })?;
    let delimiter = format!("\r\n--{boundary}").into_bytes();
    let cut =
        || Failure::bad("the form is incomplete: expected its parts, each followed by a boundary");
    // The first may be at the very beginning.
    let mut at = match body.starts_with(&delimiter[2..]) {
        true => delimiter.len() - 2,
        false => find(body, &delimiter, 0).ok_or_else(cut)? + delimiter.len(),
    };
    let mut parts = vec![];
    while !body[at..].starts_with(b"--") {
        if parts.len() == MOST_PARTS {
            return Err(Failure::bad(format!("a form of more than {MOST_PARTS} parts")));
        }
        let within = &body[..body.len().min(at + MOST_HEAD)];
        let head = find(within, b"\r\n\r\n", at).ok_or_else(cut)?;
        let start = head + 4;
        let end = find(body, &delimiter, start).ok_or_else(cut)?;
        let text = String::from_utf8_lossy(&body[at..head]);
        let disposition = disposition(&text).unwrap_or_default();
        let name = parameter(disposition, "name")
            .ok_or_else(|| Failure::bad("a part of the form has no name"))?;
        let file =
            parameter(disposition, "filename").or_else(|| parameter(disposition, "filename*"));
        parts.push(Part { name, file, content: start..end });
        at = end + delimiter.len();
    }
    Ok(parts)
}

/// The only part with a name.
pub fn only<'p>(parts: &'p [Part], name: &str) -> Result<&'p Part, Failure> {
    let mut found = parts.iter().filter(|part| part.name == name);
    match (found.next(), found.next()) {
        (Some(part), None) => Ok(part),
        (None, _) => Err(Failure::unfit(format!("the form has no part '{name}'"))),
        (_, Some(_)) => Err(Failure::unfit(format!("the form has several parts '{name}'"))),
    }
}

/// The Content-Disposition of a part's head.
fn disposition(head: &str) -> Option<&str> {
    let mut lines = head.split("\r\n").filter_map(|line| line.split_once(':'));
    let found = lines.find(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"));
    found.map(|(_, value)| value)
}

/// A parameter of a header's value, such as `b` of `form-data; name="b"`.
fn parameter(value: &str, name: &str) -> Option<String> {
    let mut rest = value.split_once(';')?.1;
    loop {
        let (key, after) = rest.split_once('=')?;
        // Text before it without a value is not a parameter.
        let key = key.rsplit(';').next().unwrap_or(key).trim();
        let (found, behind) = match after.trim_start().strip_prefix('"') {
            Some(text) => quoted(text)?,
            None => {
                let end = after.find(';').unwrap_or(after.len());
                (after[..end].trim().to_string(), &after[end..])
            }
        };
        if key.eq_ignore_ascii_case(name) {
            return Some(found);
        }
        rest = behind.split_once(';')?.1;
    }
}

/// A text up to the quote that ends it, and what follows that.
fn quoted(text: &str) -> Option<(String, &str)> {
    let (mut found, mut escaped) = (String::new(), false);
    for (at, c) in text.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return Some((found, &text[at + 1..])),
            c => {
                found.push(c);
                escaped = false;
            }
        }
    }
    None
}

/// The position of `what` in `bytes`, from an index on. By Horspool's rule (Software: Practice and
/// Experience 10, 1980): the last byte of a window says how far the next may be.
fn find(bytes: &[u8], what: &[u8], from: usize) -> Option<usize> {
    let last = what.len() - 1;
    let mut step = [what.len(); 256];
    what[..last].iter().enumerate().for_each(|(at, b)| step[usize::from(*b)] = last - at);
    let mut at = from;
    while let Some(window) = bytes.get(at..at + what.len()) {
        if window == what {
            return Some(at);
        }
        at += step[usize::from(window[last])];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn of(kind: &'static str, body: &[u8]) -> Result<Vec<Part>, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        parts(&headers, body)
    }

    const KIND: &str = "multipart/form-data; boundary=xYz";

    #[test]
    fn fields_and_files_are_found_where_they_lie() {
        let body =
            b"--xYz\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n2\r\n--xYz\r\n\
            content-disposition: form-data; filename=\"C:;\\\"x\\\".nii.gz\"; name=b\r\n\
            Content-Type: application/gzip\r\n\r\n\r\n--xY\r\n\r\n--xYz--\r\n";
        let found = of(KIND, body).unwrap();
        assert_eq!(found.len(), 2);
        let content = |part: &Part| &body[part.content.clone()];
        assert_eq!((found[0].name.as_str(), &found[0].file), ("a", &None));
        assert_eq!(content(&found[0]), b"1\r\n2");
        assert_eq!((found[1].name.as_str(), content(&found[1])), ("b", &b"\r\n--xY\r\n"[..]));
        assert_eq!(found[1].file.as_deref(), Some("C:;\"x\".nii.gz"));
        assert_eq!(only(&found, "b").unwrap(), &found[1]);
        assert!(only(&found, "c").is_err());
        assert!(only(&[found.clone(), found].concat(), "a").is_err());
        // A boundary in quotes, text before the first, nothing in a part, no part at all.
        let quoted = "Multipart/Form-Data; charset=utf-8; boundary=\"a b;c\"";
        let body =
            b"words\r\n--a b;c\r\nContent-Disposition: form-data; name=\"\"\r\n\r\n\r\n--a b;c--";
        let found = of(quoted, body).unwrap();
        assert_eq!((found.len(), found[0].content.len()), (1, 0));
        assert!(of(KIND, b"--xYz--").unwrap().is_empty());
        let body = b"--xYz\r\nContent-Disposition: form-data; name=f; filename*=utf-8''a%20b.nii\r\n\r\nx\r\n--xYz--";
        assert_eq!(of(KIND, body).unwrap()[0].file.as_deref(), Some("utf-8''a%20b.nii"));
    }

    #[test]
    fn what_is_no_form_is_told() {
        let body =
            b"--xYz\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nbody\r\n--xYz--\r\n";
        for cut in 0..body.len() - 4 {
            assert!(of(KIND, &body[..cut]).is_err(), "cut at {cut}");
        }
        for kind in ["", "text/plain", "multipart/form-data", "multipart/mixed; boundary=xYz"] {
            assert!(format!("{:?}", of(kind, body).unwrap_err()).contains("415"), "{kind}");
        }
        assert!(of("multipart/form-data; boundary=\"\"", body).is_err());
        let nameless = b"--xYz\r\nContent-Disposition: form-data\r\n\r\nbody\r\n--xYz--";
        assert!(format!("{:?}", of(KIND, nameless).unwrap_err()).contains("no name"));
        assert!(of(KIND, b"--xYz\r\n\r\nbody\r\n--xYz--").is_err());
        let part = b"--xYz\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n".repeat(40);
        let many = [&part[..], b"--xYz--"].concat();
        assert!(format!("{:?}", of(KIND, &many).unwrap_err()).contains("more than 32"));
        let long = [b"--xYz\r\n".as_slice(), &[b'a'; 9000], &body[7..]].concat();
        assert!(of(KIND, &long).is_err());
    }

    #[test]
    fn texts_are_found_as_by_looking_everywhere() {
        let bytes: Vec<u8> = (0..2000u32).map(|n| (n * n / 7 % 3) as u8).collect();
        for what in [&[0u8][..], &[1, 0], &[2, 2, 0, 1], &[0, 0, 0, 0, 1], &bytes[1990..]] {
            for from in [0, 1, 77, 1999, 2000] {
                let slow = (from..=bytes.len().saturating_sub(what.len()))
                    .find(|at| bytes[*at..].starts_with(what));
                assert_eq!(find(&bytes, what, from), slow, "{what:?} from {from}");
            }
        }
    }
}
