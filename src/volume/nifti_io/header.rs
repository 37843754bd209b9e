//! NIfTI headers: fields, element types, sizes, and the placement of the voxels.

use crate::memory;
use crate::volume::{Affine, Element, VolumeError};
use nifti::NiftiHeader;
use std::path::Path;

/// Bytes of a header with a byte order.
struct Raw<'a> {
    bytes: &'a [u8],
    big: bool,
}

impl Raw<'_> {
    fn take<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut b: [u8; N] = std::array::from_fn(|i| self.bytes[at + i]);
        if self.big {
            b.reverse();
        }
        b
    }
    fn i16(&self, at: usize) -> i16 {
        i16::from_le_bytes(self.take(at))
    }
    fn i32(&self, at: usize) -> i32 {
        i32::from_le_bytes(self.take(at))
    }
    fn i64(&self, at: usize) -> i64 {
        i64::from_le_bytes(self.take(at))
    }
    fn f32(&self, at: usize) -> f64 {
        f32::from_le_bytes(self.take(at)) as f64
    }
    fn f64(&self, at: usize) -> f64 {
        f64::from_le_bytes(self.take(at))
    }
}

/// The fields of either version that are used here.
pub struct Header {
    pub version: u8,
    pub pair: bool,
    pub big: bool,
    pub dim: [i64; 8],
    pub datatype: i16,
    pub pixdim: [f64; 8],
    pub vox_offset: f64,
    pub slope: f64,
    pub inter: f64,
    pub units: i32,
    pub codes: [i32; 2],
    pub quatern: [f64; 6],
    pub srow: [[f64; 4]; 3],
}

pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header, VolumeError> {
    let fail = |message: String| Err(VolumeError::new(path, message));
    let size = |big: bool| Raw { bytes, big }.i32(0);
    let (version, big) = match (size(false), size(true)) {
        (348, _) => (1, false),
        (_, 348) => (1, true),
        (540, _) => (2, false),
        (_, 540) => (2, true),
        (other, _) => {
            return fail(format!(
                "not a NIfTI file: its header size field is {other}, expected 348 or 540"
            ));
        }
    };
    if version == 2 && bytes.len() < 540 {
        return fail(format!("shorter than a NIfTI-2 header: {} bytes, expected 540", bytes.len()));
    }
    let r = Raw { bytes, big };
    let magic = if version == 1 { &bytes[344..348] } else { &bytes[4..8] };
    let pair = match magic {
        b"n+1\0" | b"n+2\0" => false,
        b"ni1\0" | b"ni2\0" => true,
        other => {
            let text = String::from_utf8_lossy(other).replace('\0', "");
            return fail(format!(
                "not a NIfTI file: its magic is '{text}', expected n+1, ni1, n+2 or ni2"
            ));
        }
    };
    let mut h = Header {
        version,
        pair,
        big,
        dim: [0; 8],
        datatype: 0,
        pixdim: [0.0; 8],
        vox_offset: 0.0,
        slope: 0.0,
        inter: 0.0,
        units: 0,
        codes: [0; 2],
        quatern: [0.0; 6],
        srow: [[0.0; 4]; 3],
    };
    if version == 1 {
        (0..8).for_each(|a| h.dim[a] = r.i16(40 + 2 * a) as i64);
        (0..8).for_each(|a| h.pixdim[a] = r.f32(76 + 4 * a));
        (h.datatype, h.vox_offset, h.slope, h.inter) =
            (r.i16(70), r.f32(108), r.f32(112), r.f32(116));
        (h.units, h.codes) = (bytes[123] as i32, [r.i16(252) as i32, r.i16(254) as i32]);
        (0..6).for_each(|q| h.quatern[q] = r.f32(256 + 4 * q));
        (0..12).for_each(|s| h.srow[s / 4][s % 4] = r.f32(280 + 4 * s));
    } else {
        (0..8).for_each(|a| h.dim[a] = r.i64(16 + 8 * a));
        (0..8).for_each(|a| h.pixdim[a] = r.f64(104 + 8 * a));
        (h.datatype, h.vox_offset, h.slope, h.inter) =
            (r.i16(12), r.i64(168) as f64, r.f64(176), r.f64(184));
        (h.units, h.codes) = (r.i32(500), [r.i32(344), r.i32(348)]);
        (0..6).for_each(|q| h.quatern[q] = r.f64(352 + 8 * q));
        (0..12).for_each(|s| h.srow[s / 4][s % 4] = r.f64(400 + 8 * s));
    }
    Ok(h)
}

/// The element type with a NIfTI code; none for a code that is not that of a scalar.
pub fn element_of(code: i16) -> Option<Element> {
    Some(match code {
        2 => Element::Uint8,
        4 => Element::Int16,
        8 => Element::Int32,
        16 => Element::Float32,
        64 => Element::Float64,
        256 => Element::Int8,
        512 => Element::Uint16,
        768 => Element::Uint32,
        1024 => Element::Int64,
        1280 => Element::Uint64,
        _ => return None,
    })
}

/// The NIfTI code of an element type.
pub fn code_of(element: Element) -> i16 {
    match element {
        Element::Uint8 => 2,
        Element::Int16 => 4,
        Element::Int32 => 8,
        Element::Float32 => 16,
        Element::Float64 => 64,
        Element::Int8 => 256,
        Element::Uint16 => 512,
        Element::Uint32 => 768,
        Element::Int64 => 1024,
        Element::Uint64 => 1280,
    }
}

pub fn element_problem(code: i16) -> String {
    let what = match code {
        1 => "one bit per voxel",
        32 | 1792 | 2048 => "complex numbers",
        128 | 2304 => "colour",
        1536 => "128-bit floats",
        _ => return format!("datatype code {code} is not a NIfTI type"),
    };
    format!("it holds {what} (datatype {code}), expected a scalar image of integers or floats")
}

/// The sizes of the three spatial axes and the number of volumes.
pub fn sizes(path: &Path, h: &Header) -> Result<([usize; 3], usize), VolumeError> {
    let fail = |message: String| Err(VolumeError::new(path, message));
    let axes = h.dim[0];
    if !(1..=7).contains(&axes) {
        return fail(format!("dim[0] is {axes}, expected the number of axes, 1 to 7"));
    }
    let mut size = [1usize; 7];
    for (a, size) in size.iter_mut().enumerate().take(axes as usize) {
        match usize::try_from(h.dim[a + 1]) {
            Ok(n) if n > 0 => *size = n,
            _ => return fail(format!("dim[{}] is {}, expected at least 1", a + 1, h.dim[a + 1])),
        }
    }
    match memory::extent(&size[3..]) {
        Some(volumes) => Ok(([size[0], size[1], size[2]], volumes)),
        None => fail(format!("its axes {size:?} are too many voxels to count")),
    }
}

/// Whether stored values are to be multiplied or shifted.
pub fn is_scaled(h: &Header) -> bool {
    h.slope.is_finite()
        && h.slope != 0.0
        && (h.slope != 1.0 || (h.inter.is_finite() && h.inter != 0.0))
}

/// The factor of stored values, and what is then added, if they are scaled.
pub fn scale(h: &Header, warnings: &mut Vec<String>) -> Option<[f64; 2]> {
    if h.slope == 0.0 && h.inter.is_finite() && h.inter != 0.0 {
        warnings.push(format!(
            "scl_slope is 0: by the standard there is no scaling, and scl_inter {} is ignored",
            h.inter
        ));
    }
    is_scaled(h).then(|| [h.slope, if h.inter.is_finite() { h.inter } else { 0.0 }])
}

/// The affine in mm, by sform, qform or pixdim, in this order of preference, and an sform that was
/// not used because of its scale.
pub fn place(h: &Header, warnings: &mut Vec<String>) -> (Affine, &'static str, Option<Affine>) {
    let mut spacing = [1.0; 3];
    for (a, spacing) in spacing.iter_mut().enumerate() {
        let p = h.pixdim[a + 1];
        *spacing = if p.is_finite() && p != 0.0 { p.abs() } else { 1.0 };
        if h.dim[0] as usize > a && *spacing != p && h.codes[1] <= 0 {
            warnings.push(format!("pixdim[{}] is {p}: {spacing} mm is used", a + 1));
        }
    }
    let candidates = [(h.codes[1], "sform"), (h.codes[0], "qform")];
    let (mut affine, mut from, mut passed_over) = (Affine::from_spacing(spacing), "pixdim", None);
    for (_, name) in candidates.into_iter().filter(|(code, _)| *code > 0) {
        let candidate = if name == "sform" { Affine(h.srow) } else { quaternion(h, spacing) };
        if candidate.is_regular() {
            let steps = candidate.spacing();
            let apart = (0..3).any(|a| {
                h.dim[0] as usize > a
                    && h.pixdim[a + 1] != 0.0
                    && (steps[a] / spacing[a] - 1.0).abs() > 0.01
            });
            if name == "sform" && apart {
                // Writers that flip or shift the sform and forget its scale leave the qform, whose
                // steps are pixdim's, unchanged.
                let says = format!(
                    "its sform's voxels are {} mm apart, pixdim says {}",
                    list(steps),
                    list(spacing)
                );
                if h.codes[0] > 0 && quaternion(h, spacing).is_regular() {
                    warnings.push(format!("{says}, as does its qform: the qform is used"));
                    passed_over = Some(candidate);
                    continue;
                }
                warnings.push(format!("{says}: the sform is used"));
            }
            (affine, from) = (candidate, name);
            break;
        }
        warnings.push(format!("its {name} is singular and was ignored"));
    }
    let to_mm = match h.units & 7 {
        1 => 1000.0,
        3 => 0.001,
        _ => 1.0,
    };
    if to_mm != 1.0 {
        warnings.push(format!(
            "lengths are in {}, read as mm",
            if to_mm > 1.0 { "metres" } else { "micrometres" }
        ));
        affine
            .0
            .iter_mut()
            .chain(passed_over.iter_mut().flat_map(|p| &mut p.0))
            .flatten()
            .for_each(|v| *v *= to_mm);
    }
    (affine, from, passed_over)
}

/// Steps, as text.
fn list(steps: [f64; 3]) -> String {
    steps.map(|s| format!("{}", (s * 1e4).round() / 1e4)).join(" x ")
}

/// The affine of method 2 of the standard: a unit quaternion, pixdim, and the handedness pixdim[0].
fn quaternion(h: &Header, spacing: [f64; 3]) -> Affine {
    let [b, c, d, x, y, z] = h.quatern;
    let mut a = 1.0 - (b * b + c * c + d * d);
    let (mut b, mut c, mut d) = (b, c, d);
    if a < 1e-7 {
        // A half turn, stored with rounding errors.
        let norm = (b * b + c * c + d * d).sqrt();
        (a, b, c, d) = (0.0, b / norm, c / norm, d / norm);
    } else {
        a = a.sqrt();
    }
    let rotation = [
        [a * a + b * b - c * c - d * d, 2.0 * (b * c - a * d), 2.0 * (b * d + a * c)],
        [2.0 * (b * c + a * d), a * a + c * c - b * b - d * d, 2.0 * (c * d - a * b)],
        [2.0 * (b * d - a * c), 2.0 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ];
    let hand = if h.pixdim[0] < 0.0 { -1.0 } else { 1.0 };
    let steps = [spacing[0], spacing[1], spacing[2] * hand];
    let origin = [x, y, z];
    Affine(std::array::from_fn(|r| {
        [rotation[r][0] * steps[0], rotation[r][1] * steps[1], rotation[r][2] * steps[2], origin[r]]
    }))
}

/// A NIfTI-1 header with the input's geometry, codes and units, for outputs.
pub fn reference(h: &Header, size: [usize; 3]) -> NiftiHeader {
    let spatial = |v: f64| v as f32;
    let mut pixdim = [1.0f32; 8];
    (0..4).for_each(|a| pixdim[a] = spatial(h.pixdim[a]));
    let mut dim = [1u16; 8];
    dim[0] = 3;
    (0..3).for_each(|a| dim[a + 1] = size[a].min(u16::MAX as usize) as u16);
    NiftiHeader {
        dim,
        pixdim,
        xyzt_units: (h.units & 0x3f) as u8,
        qform_code: h.codes[0] as i16,
        sform_code: h.codes[1] as i16,
        quatern_b: spatial(h.quatern[0]),
        quatern_c: spatial(h.quatern[1]),
        quatern_d: spatial(h.quatern[2]),
        quatern_x: spatial(h.quatern[3]),
        quatern_y: spatial(h.quatern[4]),
        quatern_z: spatial(h.quatern[5]),
        srow_x: h.srow[0].map(spatial),
        srow_y: h.srow[1].map(spatial),
        srow_z: h.srow[2].map(spatial),
        ..Default::default()
    }
}
