//! Challenges of interactive segmentation: their own input files, answered the way their containers are run.
//!
//! [`cvpr`] is the CVPR 2025 challenge (a NumPy archive with boxes and clicks a class), [`autopet`] is autoPET V (MetaImage files and a
//! list of clicks). Below them lie the formats: [`npz`] and [`npy`] for NumPy's files, [`pickle`] for the objects in them, [`mha`] for
//! MetaImage. Nothing in a file is run, and no size that a file states is believed before it was compared with what is there.

pub mod autopet;
pub mod cvpr;
pub mod mha;
pub mod npy;
pub mod npz;
pub mod pickle;

use crate::volume::reorder;
use std::path::PathBuf;

/// What came of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The file that was written.
    pub output: PathBuf,
    /// Objects that were asked for.
    pub objects: usize,
    /// Voxels that lie on any of them.
    pub voxels: usize,
    /// What was odd about the case and how it was understood.
    pub warnings: Vec<String>,
}

/// No deflate stream grows by more than this.
const DEFLATE_LIMIT: u64 = 1100;

/// The way back: from the order of arrays here to a file's.
fn to_file_order<T: Copy>(data: &[T], [ni, nj, nk]: [usize; 3]) -> Vec<T> {
    // A file's order is the order here with the axes named from the other end.
    reorder(data, [nk, nj, ni])
}

/// Replaces values that are not finite, NaN and -inf by the smallest finite value and +inf by the largest, with a warning. An error when
/// no value is finite.
fn make_finite(data: &mut [f32], warnings: &mut Vec<String>) -> Result<(), String> {
    let finite = data.iter().copied().filter(|v| v.is_finite());
    let range = finite.fold(None, |range: Option<[f32; 2]>, v| Some(range.map_or([v, v], |[low, high]| [low.min(v), high.max(v)])));
    let [low, high] = range.ok_or("no voxel is a finite number")?;
    let mut count = 0;
    for v in data.iter_mut().filter(|v| !v.is_finite()) {
        *v = if *v == f32::INFINITY { high } else { low };
        count += 1;
    }
    if count > 0 {
        warnings.push(format!("{count} voxels are not finite numbers: NaN and -inf were read as the smallest value, +inf as the largest"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orders_of_files_and_arrays_are_each_others_inverse() {
        let size = [2, 3, 4];
        let file: Vec<u8> = (0..24).collect();
        let ours = reorder(&file, size);
        // Voxel [1, 2, 3] is the last in either order, [1, 0, 0] the second of a file.
        assert_eq!((ours[23], ours[12], ours[1]), (23, 1, 6));
        assert_eq!(to_file_order(&ours, size), file);
    }

    #[test]
    fn what_is_not_finite_takes_the_place_of_the_nearest_end() {
        let mut data = [1.0, f32::NAN, 3.0, f32::INFINITY, f32::NEG_INFINITY];
        let mut warnings = vec![];
        make_finite(&mut data, &mut warnings).unwrap();
        assert_eq!((data, warnings.len()), ([1.0, 1.0, 3.0, 3.0, 1.0], 1));
        assert!(make_finite(&mut [f32::NAN], &mut warnings).is_err());
    }
}
