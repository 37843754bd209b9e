//! The parsers of what callers send, without a server around them: for fuzz targets and tests,
//! which pass them bytes. An error is the sentence that a caller would see.

use super::failure::Failure;
use super::wire::{Dtype, pack, unpack};
use super::{api, dls, monai, multipart, nninteractive, query};
use crate::prompt::Prompts;
use crate::volume::Grid;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use std::ops::Range;

/// A part of a form.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The part's name.
    pub name: String,
    /// The part's name at the sender, if it is a file.
    pub file: Option<String>,
    /// The range of its content in the body.
    pub content: Range<usize>,
}

/// An array of nnInteractive's protocol.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// The type of its elements, as NumPy names it.
    pub dtype: &'static str,
    /// The length of each axis, the fastest last.
    pub shape: Vec<usize>,
    /// The number of bytes of its elements.
    pub bytes: usize,
    /// 1 where an element is not 0.
    pub marks: Vec<u8>,
    /// The number of elements that it has as a scan, which may be of another type.
    pub voxels: usize,
}

fn told<T>(read: Result<T, Failure>) -> Result<T, String> {
    read.map_err(|e| e.message().to_string())
}

/// The headers of a body with this Content-Type, if a header can hold that.
fn headers(kind: &[u8]) -> HeaderMap {
    let kind = HeaderValue::from_bytes(kind).ok();
    kind.map(|kind| (CONTENT_TYPE, kind)).into_iter().collect()
}

/// The parts of a form.
///
/// # Errors
/// It is not a form, or is truncated.
pub fn form(kind: &[u8], body: &[u8]) -> Result<Vec<Part>, String> {
    let parts = told(multipart::parts(&headers(kind), body))?;
    let part = |p: multipart::Part| Part { name: p.name, file: p.file, content: p.content };
    Ok(parts.into_iter().map(part).collect())
}

/// The volume of ITK-SNAP's protocol in a form, of at most `most` bytes: its place, and its
/// elements.
///
/// # Errors
/// There is none, or it differs from what the form says.
pub fn volume(kind: &[u8], body: &[u8], most: usize) -> Result<(Grid, Vec<u8>), String> {
    told(dls::volume(&headers(kind), body, most))
}

/// The parameters of MONAI Label's clients for a scan of this size: the format of the mask, and the
/// box.
///
/// # Errors
/// It cannot be parsed, or does not fit the scan.
pub fn asked(
    kind: &[u8],
    body: &[u8],
    size: [usize; 3],
) -> Result<(&'static str, Option<[usize; 6]>), String> {
    told(monai::wishes(&headers(kind), body, size))
}

/// An array of nnInteractive's protocol, of at most `most` bytes.
///
/// # Errors
/// The message is not an array, is damaged, or holds something else than it announces.
pub fn array(message: &[u8], most: usize) -> Result<Array, String> {
    let array = told(unpack(message, most))?;
    let (dtype, shape) = (array.dtype.name(), array.shape.clone());
    let (bytes, marks) = (array.bytes.len(), array.marks());
    let (element, values) = array.into_scan();
    Ok(Array { dtype, shape, bytes, marks, voxels: values.len() / element.size() })
}

/// The buffer of nnInteractive's protocol, of at most `most` bytes, that a body describes: its
/// shape, and the type of its elements, as NumPy names it.
///
/// # Errors
/// It cannot be parsed, or there is no such buffer.
pub fn buffer(body: &[u8], most: usize) -> Result<([usize; 3], &'static str), String> {
    let buffer = told(nninteractive::buffer(body, most))?;
    Ok((buffer.shape, buffer.dtype.name()))
}

/// The message of an array whose elements are 0 or 1; none if there is no such type.
pub fn packed(dtype: &str, shape: &[usize], marks: &[u8]) -> Option<Vec<u8>> {
    Dtype::named(dtype).map(|dtype| pack(dtype, shape, marks))
}

/// The first value of a field of a query.
pub fn field(query: &str, name: &str) -> Option<String> {
    query::field(&Some(query.into()), name)
}

/// The voxel of ITK-SNAP's protocol that a query names, and whether it is on the object.
///
/// # Errors
/// It names none.
pub fn point(query: &str) -> Result<([f64; 3], bool), String> {
    let query = Some(query.into());
    Ok((told(dls::voxel(&query))?, told(dls::foreground(&query))?))
}

/// The prompts in a body of prism's own interface, on a scan.
///
/// # Errors
/// It cannot be parsed, or does not fit the scan.
pub fn interaction(body: &[u8], grid: &Grid) -> Result<Prompts, String> {
    told(api::prompts_of(body, grid))
}
