//! Files and pictures of scans and of objects on them.

use super::Answer;
use crate::message::quoted;
use crate::preview::{Marks, Plane, draw_plane};
use crate::serve::body;
use crate::serve::failure::Failure;
use crate::serve::query::field;
use crate::serve::store::{Named, Object};
use crate::serve::turns::Turn;
use crate::serve::work::Kind;
use crate::serve::{Shared, let_go};
use crate::volume::{Grid, LabelValues, LabelledObject, labels_file, mask_file, scan_file};
use axum::extract::{Path, RawQuery, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use std::path::Path as FilePath;
use std::sync::Arc;

/// Formats that masks and label images are written in.
pub const MASKS: [&str; 5] = ["nii.gz", "nii", "nrrd", "seg.nrrd", "mha"];
/// Formats that masks and label images are written in where the scan may have come as DICOM.
const FILES: [&str; 6] = ["nii.gz", "nii", "nrrd", "seg.nrrd", "mha", "dcm"];
/// Formats that scans are written in.
const IMAGES: [&str; 2] = ["nii.gz", "nii"];

/// The plane and the slice that a query asks for on a grid: the axial one where it names none, and
/// no slice where it has no number.
fn look_of(
    query: &Option<String>,
    grid: &Grid,
) -> Result<(&'static Plane, Option<usize>), Failure> {
    let asked = field(query, "plane").unwrap_or_else(|| "axial".into()).to_lowercase();
    let plane = Plane::named(&asked).ok_or_else(|| {
        let asked = quoted(&asked);
        Failure::bad(format!("plane is '{asked}', expected axial, coronal or sagittal"))
    })?;
    let Some(text) = field(query, "slice") else { return Ok((plane, None)) };
    let axis = plane.axis(grid);
    let (axis, count) = (["x", "y", "z"][axis], grid.size[axis]);
    let last = count.saturating_sub(1);
    let expected = format!("slice is '{}', expected 0 to {last} along {axis}", quoted(&text));
    match text.parse() {
        Ok(slice) if slice < count => Ok((plane, Some(slice))),
        Ok(_) => Err(Failure::unfit(expected)),
        Err(_) => Err(Failure::bad(expected)),
    }
}

/// A slice of the scan with the object's contour, as a picture.
pub(super) async fn preview(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let (scan, study, object) = shared.store.object(&name)?;
    let (plane, slice) = look_of(&query, &study.opened.image.grid)?;
    let held = study.clone();
    let draw = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        let (shown, marks) = {
            let session = object.session();
            (session.prediction().cloned(), Marks::holding(session.said()))
        };
        let answer = shown.as_ref().map(|shown| &shown.field);
        let picture = draw_plane(&study.opened.image, answer, &marks, plane, slice);
        picture.png().map_err(|e| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e))
    };
    let picture = shared.work.run(scan, Kind::Other, draw).await;
    shared.store.worked(scan);
    let_go(held);
    let mut response = Response::new(body::kept(picture?)?);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
    Ok(response)
}

/// The format that a query asks for, of those that there are.
fn format_of(
    query: &Option<String>,
    all: &'static [&'static str],
) -> Result<&'static str, Failure> {
    let asked = field(query, "format").unwrap_or_else(|| all[0].into()).to_lowercase();
    all.iter().copied().find(|format| *format == asked).ok_or_else(|| {
        Failure::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("format is '{}', expected one of {all:?}", quoted(&asked)),
        )
    })
}

/// A file to be saved.
pub fn saved(name: &str, format: &str, bytes: Vec<u8>) -> Answer {
    let mut response = Response::new(body::kept(bytes)?);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}.{format}\"")) {
        headers.insert(CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

pub(super) async fn mask(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let format = format_of(&query, &FILES)?;
    let (scan, study, object) = shared.store.object(&name)?;
    let held = study.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        let (image, mask) = (&study.opened.image, object.session().mask());
        let name = format!("mask.{format}");
        Ok(mask_file(FilePath::new(&name), &image.grid, &image.description, &mask)?)
    };
    let file = shared.work.run(scan, Kind::Other, write).await;
    shared.store.worked(scan);
    let_go(held);
    saved("mask", format, file?)
}

/// The scan itself, for viewers that do not read what it came as.
pub(super) async fn image(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let format = format_of(&query, &IMAGES)?;
    let (_, scan, study) = shared.store.scan(&name)?;
    let held = study.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        Ok(scan_file(FilePath::new(&format!("scan.{format}")), &study.opened.image)?)
    };
    let file = shared.work.run(scan, Kind::Other, write).await;
    shared.store.worked(scan);
    let_go(held);
    saved("scan", format, file?)
}

/// An object as a segmentation names it.
fn labelled(object: &Object) -> LabelledObject {
    let Named { name, colour } = object.named();
    LabelledObject { name, colour: colour.into() }
}

pub(super) async fn labels(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let format = format_of(&query, &FILES)?;
    let (_, scan, study) = shared.store.scan(&name)?;
    let held = study.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        let image = &study.opened.image;
        let objects = study.objects().clone();
        let mut joined = LabelValues::nothing(image.grid.voxels(), objects.len());
        for (number, object) in objects.iter().enumerate() {
            let answer = object.session().prediction().cloned();
            if let Some(answer) = answer {
                answer.field.each(|at, logit| {
                    if logit > 0.0 {
                        joined.replace(at, (number + 1) as u16);
                    }
                });
            }
        }
        let objects: Vec<LabelledObject> = objects.iter().map(|o| labelled(o)).collect();
        Ok(labels_file(FilePath::new(&format!("labels.{format}")), image, &joined, &objects)?)
    };
    let file = shared.work.run(scan, Kind::Other, write).await;
    shared.store.worked(scan);
    let_go(held);
    saved("labels", format, file?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn a_picture_is_of_a_plane_and_a_slice_that_there_are() {
        // Its axes run up, to the right and to the front: what lies across differs.
        let rows = [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]];
        let grid = Grid { size: [40, 30, 20], affine: Affine(rows) };
        let of = |query: &str| {
            let query = Some(query.to_string());
            look_of(&query, &grid).map(|(plane, slice)| (plane.axis(&grid), slice))
        };
        assert_eq!(
            look_of(&None, &grid).map(|(plane, slice)| (plane.axis(&grid), slice)),
            Ok((0, None))
        );
        assert_eq!(of("slice=39"), Ok((0, Some(39))));
        assert_eq!(of("plane=Coronal&slice=19"), Ok((2, Some(19))));
        assert_eq!(of("slice=0&plane=sagittal"), Ok((1, Some(0))));
        for (query, status, says) in [
            ("plane=oblique", StatusCode::BAD_REQUEST, "expected axial, coronal or sagittal"),
            ("plane=", StatusCode::BAD_REQUEST, "expected axial, coronal or sagittal"),
            ("slice=40", StatusCode::UNPROCESSABLE_ENTITY, "'40', expected 0 to 39 along x"),
            ("plane=sagittal&slice=30", StatusCode::UNPROCESSABLE_ENTITY, "0 to 29 along y"),
            ("slice=-1", StatusCode::BAD_REQUEST, "'-1', expected 0 to 39 along x"),
            ("slice=1.5", StatusCode::BAD_REQUEST, "expected 0 to 39"),
            ("slice=", StatusCode::BAD_REQUEST, "expected 0 to 39"),
            ("slice=99999999999999999999", StatusCode::BAD_REQUEST, "expected 0 to 39"),
        ] {
            let failure = of(query).unwrap_err();
            assert!(failure.message().contains(says), "{query}: {failure:?}");
            assert_eq!(failure.reply("error").status(), status, "{query}");
        }
    }
}
