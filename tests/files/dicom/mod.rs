//! DICOM: scans, and segmentations of them.
#![cfg(feature = "dicom")]

mod labels;
mod packed;
mod series;
#[path = "../../common/dicom.rs"]
mod writer;

use dicom_core::VR;
use dicom_dictionary_std::tags;
use dicom_object::InMemDicomObject;
use prism::volume::{Affine, Volume};
use std::path::Path;
use writer::*;

fn read(path: &Path) -> Volume {
    Volume::read(path, None).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(path: &Path) -> String {
    Volume::read(path, None).unwrap_err().to_string()
}

/// Whether every voxel is what `of` says.
fn assert_voxels(volume: &Volume, of: impl Fn([usize; 3]) -> f32) {
    let [ni, nj, nk] = volume.grid.size;
    for at in (0..ni * nj * nk).map(|n| [n / (nj * nk), n / nk % nj, n % nk]) {
        assert_eq!(volume.at(at), of(at), "{at:?}");
    }
}

fn assert_affine(volume: &Volume, expected: [[f64; 4]; 3]) {
    let apart = volume.grid.affine.distance(&Affine(expected), volume.grid.size);
    assert!(apart < 1e-9, "{:?}", volume.grid.affine);
}

fn plain([i, j, k]: [usize; 3]) -> f32 {
    value(i, j, k).into()
}

const STRAIGHT: [[f64; 4]; 3] =
    [[-0.75, 0.0, 0.0, -10.0], [0.0, -0.5, 0.0, -20.0], [0.0, 0.0, 2.5, -100.0]];

/// The frames of an enhanced file, the last first.
fn enhanced(series: &Series) -> InMemDicomObject {
    let mut file = series.bare(0);
    let mut measures = InMemDicomObject::new_empty();
    measures.put(text(tags::PIXEL_SPACING, VR::DS, "0.5\\0.75"));
    measures.put(text(tags::SLICE_THICKNESS, VR::DS, "2.5"));
    let mut turned = InMemDicomObject::new_empty();
    turned.put(text(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, &numbers(&series.orientation)));
    let mut shared = InMemDicomObject::new_empty();
    shared.put(items(tags::PIXEL_MEASURES_SEQUENCE, vec![measures]));
    shared.put(items(tags::PLANE_ORIENTATION_SEQUENCE, vec![turned]));
    file.put(items(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE, vec![shared]));
    let mut frames = vec![];
    let mut voxels = vec![];
    for k in (0..SLICES).rev() {
        let mut place = InMemDicomObject::new_empty();
        place.put(text(tags::IMAGE_POSITION_PATIENT, VR::DS, &numbers(&straight(k))));
        let mut scale = InMemDicomObject::new_empty();
        scale.put(text(tags::RESCALE_SLOPE, VR::DS, "2"));
        scale.put(text(tags::RESCALE_INTERCEPT, VR::DS, "-1000"));
        let mut frame = InMemDicomObject::new_empty();
        frame.put(items(tags::PLANE_POSITION_SEQUENCE, vec![place]));
        frame.put(items(tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE, vec![scale]));
        frames.push(frame);
        voxels.extend(slice(k));
    }
    file.put(items(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames));
    file.put(text(tags::NUMBER_OF_FRAMES, VR::IS, &SLICES.to_string()));
    file.put(words(voxels));
    file
}
