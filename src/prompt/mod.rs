//! A user's prompts for an object: points, a box, scribbles, lines, outlines, a mask.
//!
//! [`Prompts`] are those of one interaction, in voxels `[i, j, k]` of the scan. Its methods take
//! positions as users give them, in voxels or in mm ([`Space`]), and check that they are on the
//! scan. [`read_prompts`] reads them from a JSON file; [`simulate`] imitates users, for training
//! and evaluation.
//!
//! ```
//! use prism::prompt::RawBox;
//! use prism::volume::{Affine, Grid};
//! use prism::{Prompts, RawPoint, Space};
//!
//! // 512 x 512 x 60 voxels, 0.7 x 0.7 x 2.5 mm apart, the first at the world's origin.
//! let grid = Grid { size: [512, 512, 60], affine: Affine::from_spacing([0.7, 0.7, 2.5]) };
//! let mut prompts = Prompts::default();
//!
//! let on = RawPoint { position: [212.0, 148.0, 31.0], positive: true };
//! prompts.add_point(&grid, on, Space::Ijk)?;
//! let off = RawPoint { position: [140.0, 105.0, 80.0], positive: false };
//! prompts.add_point(&grid, off, Space::Ras)?;
//! assert_eq!(prompts.points, [([212, 148, 31], true), ([200, 150, 32], false)]);
//!
//! // A box ends before its last three indices.
//! let around = RawBox([190.0, 120.0, 20.0, 240.0, 180.0, 45.0]);
//! prompts.set_box(&grid, around, Space::Ijk)?;
//! assert_eq!(prompts.bounds, Some([190, 120, 20, 240, 180, 45]));
//! # Ok::<(), prism::PromptError>(())
//! ```

mod drawn;
mod file;
pub mod simulate;

pub use drawn::Area;
pub use file::{Iteration, PointEntry, PromptedObject, read_prompts};

use crate::memory::Refused;
use crate::volume::Grid;
use crate::volume::patch::Extent;
use std::str::FromStr;

/// The coordinate system in which positions are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Space {
    /// Voxel indices i, j, k of the scan, from 0, along the axes of its file.
    #[default]
    Ijk,
    /// World millimetres, x to the right, y to the front, z to the head (NIfTI, 3D Slicer's
    /// display).
    Ras,
    /// World millimetres, x to the left, y to the back, z to the head (DICOM, ITK).
    Lps,
}

/// Why a prompt cannot be used with an image.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PromptError {
    /// A prompt does not fit the scan, contradicts itself, or cannot be read; with the reason.
    #[error("{0}")]
    Unfit(String),
    /// Memory was refused.
    #[error(transparent)]
    Memory(#[from] Refused),
}

/// A click as the user gave it. The coordinates' [`Space`] is given with it.
///
/// As text: `i,j,k` or `i,j,k,+` on the object, `i,j,k,-` off it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawPoint {
    /// Three coordinates: voxel indices, which must be whole numbers, or mm.
    pub position: [f64; 3],
    /// Whether it is on the object.
    pub positive: bool,
}

/// A box as the user gave it: voxel indices `[i0, j0, k0, i1, j1, k1]` with exclusive ends, or two
/// opposite corners in mm. For [`Prompts::add_line`] the two ends of a line.
///
/// As text: `i0,j0,k0,i1,j1,k1`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawBox(pub [f64; 6]);

/// The corners of a closed outline as the user gave them, three or more.
///
/// As text: `i,j,k;i,j,k;i,j,k` and so on.
#[derive(Clone, Debug, PartialEq)]
pub struct RawOutline(pub Vec<[f64; 3]>);

impl FromStr for RawOutline {
    type Err = String;
    fn from_str(text: &str) -> Result<RawOutline, String> {
        let corner = |part: &str| numbers(&part.split(',').collect::<Vec<_>>());
        let corners: Option<Vec<[f64; 3]>> =
            text.split(';').filter(|p| !p.trim().is_empty()).map(corner).collect();
        let corners = corners.filter(|c| c.len() >= 3);
        Ok(RawOutline(
            corners
                .ok_or("expected i,j,k;i,j,k;i,j,k;...: at least three corners of three numbers")?,
        ))
    }
}

fn numbers<const N: usize>(parts: &[&str]) -> Option<[f64; N]> {
    let values: Option<Vec<f64>> =
        parts.iter().map(|p| p.trim().parse().ok().filter(|v: &f64| v.is_finite())).collect();
    values?.try_into().ok()
}

impl FromStr for RawPoint {
    type Err = String;
    fn from_str(text: &str) -> Result<RawPoint, String> {
        let parts: Vec<&str> = text.split(',').collect();
        let (place, positive) = match parts[..] {
            [.., "+"] if parts.len() == 4 => (&parts[..3], true),
            [.., "-"] if parts.len() == 4 => (&parts[..3], false),
            _ => (&parts[..], true),
        };
        let position = numbers(place)
            .ok_or("expected i,j,k or i,j,k,+ or i,j,k,- (three numbers and a sign)")?;
        Ok(RawPoint { position, positive })
    }
}

impl FromStr for RawBox {
    type Err = String;
    fn from_str(text: &str) -> Result<RawBox, String> {
        let parts: Vec<&str> = text.split(',').collect();
        Ok(RawBox(
            numbers(&parts).ok_or("expected i0,j0,k0,i1,j1,k1 (six numbers, ends exclusive)")?,
        ))
    }
}

/// A dense prompt: an answer to start from, one value per voxel of the scan, `[i][j][k]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Dense {
    /// A mask: not 0 on the object.
    Mask(Vec<u8>),
    /// Logits: finite, and positive on the object.
    Logits(Vec<f32>),
}

/// The prompts of one interaction, in voxels of the scan.
///
/// The default is empty. The fields may also be set directly: a session checks them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompts {
    /// Clicks, and the voxels of scribbles, lines and outlines: each a voxel `[i, j, k]` and
    /// whether it is on the object.
    pub points: Vec<([usize; 3], bool)>,
    /// The box `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub bounds: Option<[usize; 6]>,
    /// Whether the box was given beyond the scan's faces, and now ends at them.
    pub clipped: bool,
    /// The box around the lines and outlines that were drawn, `[i0, j0, k0, i1, j1, k1]`, ends
    /// exclusive: used as the box if none is given and these are the object's first prompts.
    pub drawn: Option<[usize; 6]>,
    /// A mask or logits to start from instead of the previous answer.
    pub dense: Option<Dense>,
    /// A mask of other objects, one byte per voxel of the scan `[i][j][k]`, not 0 in them: the
    /// answer never enters them. A session keeps it until another replaces it.
    pub others: Option<Vec<u8>>,
}

impl Dense {
    /// Whether it marks any voxel as on the object.
    pub fn marks_anything(&self) -> bool {
        match self {
            Dense::Mask(m) => m.iter().any(|v| *v != 0),
            Dense::Logits(l) => l.iter().any(|v| *v > 0.0),
        }
    }
}

impl Prompts {
    /// Whether there are no prompts.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
            && self.bounds.is_none()
            && self.dense.is_none()
            && self.others.is_none()
    }

    /// Adds a click; one in millimetres is rounded to the nearest voxel.
    ///
    /// # Errors
    /// A coordinate is not a number, a voxel index is not a whole number, or the point is outside
    /// the scan.
    pub fn add_point(
        &mut self,
        image: &Grid,
        point: RawPoint,
        space: Space,
    ) -> Result<(), PromptError> {
        finite("point", &point.position)?;
        let index = to_voxel(image, point.position, space).map(f64::round);
        if space == Space::Ijk && point.position.iter().any(|v| v.fract() != 0.0) {
            return Err(PromptError::Unfit(format!(
                "point {:?}: voxel indices are whole numbers",
                point.position
            )));
        }
        if (0..3).any(|a| !(index[a] >= 0.0 && index[a] < image.size[a] as f64)) {
            let voxel = index.map(|v| v as i64);
            let world = if space == Space::Ijk {
                String::new()
            } else {
                format!(" (from {:?} mm)", point.position)
            };
            return Err(PromptError::Unfit(format!(
                "point at voxel {voxel:?}{world} lies outside the scan of {:?} voxels",
                image.size
            )));
        }
        self.points.push((index.map(|v| v as usize), point.positive));
        Ok(())
    }

    /// Sets the box, in place of an earlier one; given in mm, it becomes the voxels whose centres
    /// are within it. Any part beyond the scan's faces is cut off, and noted in
    /// [`Prompts::clipped`].
    ///
    /// # Errors
    /// A coordinate is not a number, a voxel index is not a whole number, the box is empty or all
    /// of it is outside the scan.
    pub fn set_box(
        &mut self,
        image: &Grid,
        given: RawBox,
        space: Space,
    ) -> Result<(), PromptError> {
        let RawBox(b) = given;
        finite("box", &b)?;
        let (low, high): ([f64; 3], [f64; 3]) = match space {
            Space::Ijk => {
                if b.iter().any(|v| v.fract() != 0.0) {
                    return Err(PromptError::Unfit(format!(
                        "box {b:?}: voxel indices are whole numbers"
                    )));
                }
                ([b[0], b[1], b[2]], [b[3], b[4], b[5]])
            }
            _ => {
                let corner =
                    |c: usize| std::array::from_fn(|a| b[if c >> a & 1 == 1 { a + 3 } else { a }]);
                let corners: Vec<[f64; 3]> =
                    (0..8).map(|c| to_voxel(image, corner(c), space)).collect();
                let of = |a: usize, f: fn(f64, f64) -> f64| {
                    corners.iter().map(|c| c[a]).reduce(f).unwrap_or(0.0)
                };
                (
                    std::array::from_fn(|a| (of(a, f64::min) - 1e-6).ceil()),
                    std::array::from_fn(|a| (of(a, f64::max) + 1e-6).floor() + 1.0),
                )
            }
        };
        // For extremely large numbers the corners may not be finite.
        if low.iter().chain(&high).any(|v| !v.is_finite()) {
            return Err(PromptError::Unfit(format!(
                "box {b:?} lies outside the scan of {:?} voxels",
                image.size
            )));
        }
        for a in 0..3 {
            if low[a] >= high[a] {
                let axis = ["i", "j", "k"][a];
                return Err(PromptError::Unfit(format!(
                    "box {low:?} to {high:?} is empty along {axis}: its end must be above its start (ends are exclusive)"
                )));
            }
            if high[a] <= 0.0 || low[a] >= image.size[a] as f64 {
                let (low, high) = (low.map(|v| v as i64), high.map(|v| v as i64));
                return Err(PromptError::Unfit(format!(
                    "box from voxel {low:?} to {high:?} lies outside the scan of {:?} voxels",
                    image.size
                )));
            }
        }
        self.clipped = (0..3).any(|a| low[a] < 0.0 || high[a] > image.size[a] as f64);
        let face = |f: usize| {
            if f < 3 {
                low[f].max(0.0) as usize
            } else {
                high[f - 3].min(image.size[f - 3] as f64) as usize
            }
        };
        self.bounds = Some(std::array::from_fn(face));
        Ok(())
    }

    /// Adds scribbles: a label image with one value per voxel of the scan, `[i][j][k]`, 1 on the
    /// object, 2 off it, 0 for no scribble.
    ///
    /// # Errors
    /// A label is above 2; memory is refused. Nothing was added.
    pub fn add_scribble(&mut self, image: &Grid, labels: &[u32]) -> Result<(), PromptError> {
        if let Some(label) = labels.iter().find(|l| **l > 2) {
            return Err(PromptError::Unfit(format!(
                "scribble label {label}: expected 1 (positive), 2 (negative) or 0"
            )));
        }
        let [_, nj, nk] = image.size;
        let marked = labels.iter().enumerate().filter(|(_, l)| **l != 0);
        drawn::room(&mut self.points, marked.clone().count())?;
        self.points
            .extend(marked.map(|(at, label)| ([at / nk / nj, at / nk % nj, at % nk], *label == 1)));
        Ok(())
    }

    /// The part of the scan that a patch should show: the box, otherwise the points on the object,
    /// otherwise what a mask marks, otherwise all points. None without any of them.
    pub fn extent(&self, image: &Grid) -> Option<Extent> {
        if let Some(b) = self.bounds.or(self.drawn) {
            return Some(Extent::of_box(b));
        }
        let positive =
            around(self.points.iter().filter(|(_, positive)| *positive).map(|(p, _)| *p));
        positive
            .or_else(|| self.marked(image))
            .or_else(|| around(self.points.iter().map(|(p, _)| *p)))
    }

    /// The bounds of what a mask, or logits, mark.
    pub(crate) fn marked(&self, image: &Grid) -> Option<Extent> {
        let [_, nj, nk] = image.size;
        let voxel = |at: usize| [at / nk / nj, at / nk % nj, at % nk];
        match &self.dense {
            Some(Dense::Mask(m)) => {
                around(m.iter().enumerate().filter(|(_, v)| **v != 0).map(|(at, _)| voxel(at)))
            }
            Some(Dense::Logits(l)) => {
                around(l.iter().enumerate().filter(|(_, v)| **v > 0.0).map(|(at, _)| voxel(at)))
            }
            None => None,
        }
    }
}

fn around(voxels: impl Iterator<Item = [usize; 3]>) -> Option<Extent> {
    voxels.fold(None, |extent: Option<Extent>, v| {
        let v = v.map(|c| c as f64);
        let e = extent.unwrap_or(Extent { low: v.map(|c| c - 0.5), high: v.map(|c| c + 0.5) });
        Some(Extent {
            low: std::array::from_fn(|a| e.low[a].min(v[a] - 0.5)),
            high: std::array::from_fn(|a| e.high[a].max(v[a] + 0.5)),
        })
    })
}

/// An error unless all coordinates are numbers.
fn finite(what: &str, coordinates: &[f64]) -> Result<(), PromptError> {
    match coordinates.iter().all(|v| v.is_finite()) {
        true => Ok(()),
        false => Err(PromptError::Unfit(format!(
            "{what} {coordinates:?}: expected numbers, not NaN or infinity"
        ))),
    }
}

/// A position as a fractional voxel index.
fn to_voxel(image: &Grid, position: [f64; 3], space: Space) -> [f64; 3] {
    let [x, y, z] = position;
    match space {
        Space::Ijk => position,
        Space::Ras => image.affine.inverse().apply([x, y, z]),
        Space::Lps => image.affine.inverse().apply([-x, -y, z]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn points_and_boxes_are_read_as_documented() {
        let p: RawPoint = "1,2,3,-".parse().unwrap();
        assert_eq!(p, RawPoint { position: [1.0, 2.0, 3.0], positive: false });
        assert!(
            "1,2".parse::<RawPoint>().is_err()
                && "1,2,x".parse::<RawPoint>().is_err()
                && "1,2,3,4".parse::<RawPoint>().is_err()
        );
        assert!(
            "0,0,0,1,1".parse::<RawBox>().is_err() && "0,0,0,1,1,nan".parse::<RawBox>().is_err()
        );
    }

    #[test]
    fn a_scribble_is_taken_whole_or_not_at_all() {
        let grid = Grid { size: [2, 2, 3], affine: Affine::from_spacing([1.0; 3]) };
        let mut labels = [0u32; 12];
        (labels[1], labels[9]) = (1, 2);
        let mut prompts = Prompts::default();
        prompts.add_scribble(&grid, &labels).unwrap();
        assert_eq!(prompts.points, [([0, 0, 1], true), ([1, 1, 0], false)]);
        labels[11] = 3;
        let message = prompts.add_scribble(&grid, &labels).unwrap_err().to_string();
        assert!(message.starts_with("scribble label 3: expected 1"), "{message}");
        assert_eq!(prompts.points.len(), 2);
    }

    #[test]
    fn spaces_name_the_same_voxel() {
        // 2 mm, i to the left, origin at (10, -20, 5).
        let affine = Affine([[-2.0, 0.0, 0.0, 10.0], [0.0, 2.0, 0.0, -20.0], [0.0, 0.0, 2.0, 5.0]]);
        let grid = Grid { size: [20, 20, 20], affine };
        let mut prompts = Prompts::default();
        for (position, space) in [
            ([3.0, 4.0, 5.0], Space::Ijk),
            ([4.0, -12.0, 15.0], Space::Ras),
            ([-4.0, 12.0, 15.0], Space::Lps),
        ] {
            prompts.add_point(&grid, RawPoint { position, positive: true }, space).unwrap();
        }
        assert!(prompts.points.iter().all(|(p, _)| *p == [3, 4, 5]));
        let outside = RawPoint { position: [20.0, 0.0, 0.0], positive: true };
        let message = prompts.add_point(&grid, outside, Space::Ijk).unwrap_err().to_string();
        assert_eq!(
            message,
            "point at voxel [20, 0, 0] lies outside the scan of [20, 20, 20] voxels"
        );
        // Centres at 4 and 2 mm along x are voxels 3 and 4.
        prompts.set_box(&grid, RawBox([4.0, -12.0, 15.0, 2.0, -12.0, 15.0]), Space::Ras).unwrap();
        assert_eq!(prompts.bounds, Some([3, 4, 5, 5, 5, 6]));
        assert!(
            prompts.set_box(&grid, RawBox([0.0, 0.0, 0.0, 0.0, 1.0, 1.0]), Space::Ijk).is_err()
        );
        // Across a face: cut off there, in every space. Entirely beyond it: refused.
        assert!(!prompts.clipped);
        for (b, space) in [
            ([-1.0, 3.0, 5.0, 4.0, 21.0, 6.0], Space::Ijk),
            ([12.0, -14.0, 15.0, 4.0, 22.0, 15.0], Space::Ras),
        ] {
            prompts.set_box(&grid, RawBox(b), space).unwrap();
            assert_eq!(
                (prompts.bounds, prompts.clipped),
                (Some([0, 3, 5, 4, 20, 6]), true),
                "{space:?}"
            );
        }
        let beyond = prompts
            .set_box(&grid, RawBox([20.0, 0.0, 0.0, 25.0, 5.0, 5.0]), Space::Ijk)
            .unwrap_err()
            .to_string();
        assert_eq!(
            beyond,
            "box from voxel [20, 0, 0] to [25, 5, 5] lies outside the scan of [20, 20, 20] voxels"
        );
    }
}
