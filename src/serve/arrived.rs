//! Scans sent to prism's own interface: one file that holds header and voxels, or the slices of a
//! DICOM series, in a zip archive or one file. Also the series in a server's folder.

use super::failure::Failure;
use crate::message::quoted;
#[cfg(feature = "dicom")]
use crate::volume::dicom::{self, Filed, Sent, Series};
use crate::volume::{Modality, Volume};
use serde_json::Value;
#[cfg(feature = "dicom")]
use serde_json::json;

/// Endings of the names of scans.
pub const SCANS: [&str; 4] = [".nii.gz", ".nii", ".nrrd", ".mha"];
/// Endings of the names of DICOM files and archives.
pub const DICOM: [&str; 2] = [".zip", ".dcm"];

/// The contents of a scan's bytes.
#[cfg_attr(not(feature = "dicom"), allow(dead_code))]
pub enum Arrived {
    Scan(Box<Volume>),
    /// Several series, one of which has to be selected: descriptions of them.
    Several(Value),
}

/// Whether bytes hold DICOM, as far as this build reads it.
#[cfg(feature = "dicom")]
pub fn is_dicom(bytes: &[u8]) -> bool {
    dicom::is_sent(bytes)
}

/// Whether bytes hold DICOM that can be read: this build reads none, and the error of the readers
/// that try says how to convert it.
#[cfg(not(feature = "dicom"))]
pub fn is_dicom(_: &[u8]) -> bool {
    false
}

/// A scan in a file's bytes, which unpacked has at most `most` bytes.
pub fn scan_of(bytes: Vec<u8>, most: usize) -> Result<Volume, Failure> {
    fitting(Volume::of_file(bytes, None)?, most)
}

/// A series of a folder, which unpacked has at most `most` bytes.
#[cfg(feature = "dicom")]
pub fn of_series(filed: &Filed, most: usize) -> Result<Volume, Failure> {
    match filed.read(most as u64) {
        Ok(Sent::Scan(image)) => fitting(*image, most),
        Ok(Sent::TooLarge(unpacked)) => Err(too_large(unpacked, most)),
        Ok(Sent::Several(_)) => Err(Failure::unfit("holds several series")),
        // That is not the caller's fault, and may be over soon.
        Err(_) if filed.has_changed() => Err(unsettled()),
        Err(e) => Err(e.into()),
    }
}

/// The error for a series whose files differ from what the last look found.
pub fn unsettled() -> Failure {
    Failure::full("files of this series are being added or removed: try again")
}

fn fitting(image: Volume, most: usize) -> Result<Volume, Failure> {
    match image.array().bytes() {
        unpacked if unpacked > most => Err(too_large(unpacked as u64, most)),
        _ => Ok(image),
    }
}

fn too_large(unpacked: u64, most: usize) -> Failure {
    Failure::too_large(format!(
        "a scan of {unpacked} bytes when decompressed: at most {most} are accepted"
    ))
}

/// The contents of bytes, for DICOM the selected series; `modality` is the one that their sender
/// stated. `keep` is given the bytes before they are consumed, and is not called if they hold
/// several series, one of which has to be selected.
pub fn read(
    bytes: Vec<u8>,
    modality: Option<Modality>,
    series: Option<&str>,
    most: usize,
    keep: impl FnOnce(&[u8]) -> Result<(), Failure>,
) -> Result<Arrived, Failure> {
    #[cfg(feature = "dicom")]
    if is_dicom(&bytes) {
        return match dicom::of_bytes(&bytes, series, most as u64)? {
            Sent::Scan(image) => {
                let mut image = fitting(*image, most)?;
                keep(&bytes)?;
                // The files state it themselves.
                image.description.modality = modality.or(image.description.modality);
                Ok(Arrived::Scan(Box::new(image)))
            }
            Sent::Several(all) => Ok(Arrived::Several(listed(&all))),
            Sent::TooLarge(unpacked) => Err(too_large(unpacked, most)),
        };
    }
    if let Some(series) = series {
        return Err(Failure::unfit(format!(
            "series '{}' was requested, but the scan is not DICOM",
            quoted(series)
        )));
    }
    keep(&bytes)?;
    let mut image = scan_of(bytes, most)?;
    image.description.modality = modality;
    Ok(Arrived::Scan(Box::new(image)))
}

/// Series to choose from, each with the word that selects it.
#[cfg(feature = "dicom")]
fn listed(all: &[Series]) -> Value {
    let told = |s: &Series| {
        // Parts of a series have one identifier.
        let parts = all.iter().filter(|other| other.uid == s.uid).count();
        let word = if parts == 1 { &s.uid } else { &s.number };
        json!({
            "series": word,
            "number": s.number,
            "modality": s.modality,
            "description": s.description,
            "shape": s.size,
            "volumes": s.volumes,
            "spacing": s.spacing,
            "localizer": s.localizer,
        })
    };
    all.iter().map(told).collect()
}
