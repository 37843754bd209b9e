//! The prompts of one interaction, as C passes them.

use super::status::{Failure, VersionedStruct, read_struct};
use crate::memory;
use crate::prompt::{Dense, Prompts, RawBox, RawOutline, RawPoint, Space};
use crate::volume::{Element, Grid, View};
use std::ffi::c_void;

/// Coordinates of points and boxes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum prism_space {
    /// Voxel indices (i, j, k) of the volume, from 0, whole numbers. The end of a box is exclusive.
    PRISM_VOXELS = 0,
    /// Millimetres, x to the right, y to the front, z to the head (NIfTI). A point selects the
    /// nearest voxel; a box, given by two opposite corners, the voxels whose centres lie within it.
    PRISM_RAS = 1,
    /// Millimetres, x to the left, y to the back, z to the head (DICOM, ITK).
    PRISM_LPS = 2,
}

/// The kind of an interaction's dense prompt: of what prism_prompts.dense points to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum prism_dense {
    /// There is none: the session's last prediction is corrected.
    PRISM_DENSE_NONE = 0,
    /// uint8, nonzero on the object.
    PRISM_DENSE_MASK = 1,
    /// float32, positive on the object. NaN or infinity gives PRISM_PROMPT.
    PRISM_DENSE_LOGITS = 2,
}

/// The prompts of one interaction. Zero all of it, set struct_size, then the fields that are used.
/// The arrays are not used any more when the call returns.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_prompts {
    /// sizeof(prism_prompts).
    pub struct_size: usize,
    /// A prism_space, for points, box, lines and lasso.
    pub space: i32,
    /// point_count times three coordinates.
    pub points: *const f64,
    /// point_count numbers, 0 off the object and 1 on it; NULL: all on it.
    pub point_labels: *const u8,
    /// Number of points.
    pub point_count: usize,
    /// NULL, or six numbers: i0, j0, k0, i1, j1, k1, ends exclusive, or two corners in mm. It stays
    /// in force until another is given.
    pub bounds: *const f64,
    /// scribble_count times the three indices of a voxel.
    pub scribble: *const i32,
    /// scribble_count numbers, 0 off the object and 1 on it; NULL: all on it.
    pub scribble_labels: *const u8,
    /// Number of scribble voxels.
    pub scribble_count: usize,
    /// Voxel (0, 0, 0) of a mask or of logits on the volume's grid to start from, instead of the
    /// session's last prediction; used if dense_kind says so.
    pub dense: *const c_void,
    /// A prism_dense.
    pub dense_kind: i32,
    /// Bytes from a voxel of it to the next along i, j and k; all 0: one behind the other, i
    /// fastest.
    pub dense_strides: [isize; 3],
    /// line_count times six coordinates: lines from border to border of the object, as in RECIST.
    pub lines: *const f64,
    /// Number of lines.
    pub line_count: usize,
    /// lasso_count times three coordinates: the corners of a closed outline around the object on
    /// one slice, of any axis.
    pub lasso: *const f64,
    /// Number of corners: 0, or at least 3.
    pub lasso_count: usize,
    /// NULL, or a mask on the volume's grid, uint8, nonzero in other objects: the result never
    /// enters them. It stays in force until another is given.
    pub others: *const u8,
    /// Bytes from a voxel of it to the next along i, j and k; all 0: one behind the other, i
    /// fastest.
    pub others_strides: [isize; 3],
}

impl VersionedStruct for prism_prompts {
    const NAME: &'static str = "prism_prompts";
    const LEAST: usize = std::mem::offset_of!(prism_prompts, lines);
}

/// The name of the points of prompts in refusals of memory.
const POINTS: &str = "so many points";
/// The size of a point with everything that is passed to the network for it.
type Told = [u64; 16];

/// Voxels in a caller's array, `[i][j][k]`, as they are.
fn gathered<T: bytemuck::Zeroable + Send>(view: &View, value: impl Fn(f32) -> T + Sync) -> Vec<T> {
    view.array().laid_out("a prompt", value)
}

/// A caller's prompts.
///
/// # Safety
/// `given` is NULL or a structure of the size that it says; its arrays hold what its counts say, or
/// as many voxels as `grid` has, and nothing writes there meanwhile.
pub(super) unsafe fn prompts_of(
    given: *const prism_prompts,
    grid: &Grid,
) -> Result<Prompts, Failure> {
    // SAFETY: guaranteed by the caller.
    let p = unsafe { read_struct(given)? };
    let space = match p.space {
        0 => Space::Ijk,
        1 => Space::Ras,
        2 => Space::Lps,
        other => {
            return Err(Failure::argument(format!(
                "space is {other}, expected a prism_space, 0 to 2"
            )));
        }
    };
    let most = 1 << 32;
    let announced = [
        ("points", p.point_count, p.points.is_null()),
        ("scribble", p.scribble_count, p.scribble.is_null()),
        ("lines", p.line_count, p.lines.is_null()),
        ("lasso", p.lasso_count, p.lasso.is_null()),
    ];
    for (name, count, array) in announced {
        if count > 0 && array {
            return Err(Failure::argument(format!("{name} is NULL, but its count is {count}")));
        }
        if count > most {
            return Err(Failure::argument(format!(
                "{count} {name} were given, at most {most} are accepted"
            )));
        }
    }
    let label = |labels: *const u8, at: usize, what: &str| match labels.is_null() {
        true => Ok(true),
        // SAFETY: not NULL, so there is one for each point or voxel, and `at` counts those.
        false => match unsafe { labels.add(at).read() } {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Failure::argument(format!(
                "label {at} of {what} is {other}, expected 0 (off the object) or 1 (on it)"
            ))),
        },
    };
    let mut prompts = Prompts::default();
    let told = p.point_count.saturating_add(p.scribble_count);
    let all = told.saturating_add(p.lasso_count).saturating_add(p.line_count);
    memory::check::<Told>(POINTS, all)?;
    memory::reserve(POINTS, &mut prompts.points, told);
    for at in 0..p.point_count {
        // SAFETY: three for each of `point_count`; NULL was refused above.
        let position =
            std::array::from_fn(|a| unsafe { p.points.add(3 * at + a).read_unaligned() });
        prompts.add_point(
            grid,
            RawPoint { position, positive: label(p.point_labels, at, "points")? },
            space,
        )?;
    }
    if !p.bounds.is_null() {
        // SAFETY: not NULL, so it is six numbers.
        let bounds: [f64; 6] = std::array::from_fn(|a| unsafe { p.bounds.add(a).read_unaligned() });
        if let Some(v) = bounds.iter().find(|v| !v.is_finite()) {
            return Err(Failure::argument(format!(
                "the box {bounds:?} contains {v}, expected numbers"
            )));
        }
        prompts.set_box(grid, RawBox(bounds), space)?;
    }
    for at in 0..p.line_count {
        // SAFETY: six for each of `line_count`; NULL was refused above.
        let line = std::array::from_fn(|a| unsafe { p.lines.add(6 * at + a).read_unaligned() });
        prompts.add_line(grid, RawBox(line), space)?;
    }
    if p.lasso_count > 0 {
        let corner = |at: usize| {
            // SAFETY: called for `lasso_count` corners, which have three each; NULL was refused
            // above.
            std::array::from_fn(|a| unsafe { p.lasso.add(3 * at + a).read_unaligned() })
        };
        let corners = memory::collected("an outline", (0..p.lasso_count).map(corner));
        prompts.add_lasso(grid, &RawOutline(corners), space)?;
    }
    // Lines and outlines become many points each.
    memory::check::<Told>(POINTS, prompts.points.len().saturating_add(p.scribble_count))?;
    for at in 0..p.scribble_count {
        let position = std::array::from_fn(|a| {
            // SAFETY: three for each of `scribble_count`; NULL was refused above.
            f64::from(unsafe { p.scribble.add(3 * at + a).read_unaligned() })
        });
        prompts.add_point(
            grid,
            RawPoint { position, positive: label(p.scribble_labels, at, "scribble")? },
            Space::Ijk,
        )?;
    }
    if !p.others.is_null() {
        let strides = if p.others_strides == [0; 3] {
            View::dense(Element::Uint8, grid.size)
        } else {
            p.others_strides
        };
        // SAFETY: not NULL, so it is a mask on the grid; the view ends before the call does.
        let view = unsafe { View::new(p.others, Element::Uint8, grid.size, strides, grid.affine)? };
        prompts.others = Some(gathered(&view, |v| u8::from(v != 0.0)));
    }
    let element = match p.dense_kind {
        0 => return Ok(prompts),
        1 => Element::Uint8,
        2 => Element::Float32,
        other => {
            return Err(Failure::argument(format!(
                "dense_kind is {other}, expected a prism_dense, 0 to 2"
            )));
        }
    };
    if p.dense.is_null() {
        return Err(Failure::argument("dense is NULL, but dense_kind is a mask or logits"));
    }
    let strides =
        if p.dense_strides == [0; 3] { View::dense(element, grid.size) } else { p.dense_strides };
    // SAFETY: not NULL, so it is such values on the grid; the view ends before the call does.
    let view = unsafe { View::of_any(p.dense.cast(), element, grid.size, strides, grid.affine)? };
    prompts.dense = Some(match element {
        Element::Uint8 => Dense::Mask(gathered(&view, |v| u8::from(v != 0.0))),
        _ => Dense::Logits(gathered(&view, |v| v)),
    });
    Ok(prompts)
}
