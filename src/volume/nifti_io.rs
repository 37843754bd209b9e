//! NIfTI-1 and NIfTI-2 files.
//!
//! Reading is ours, because a damaged or hostile file must give an error and never a panic, a zero-filled image or an allocation of its own
//! choosing; writing goes through the `nifti` crate with the input's header as reference.

use super::output::Pending;
use super::{Affine, Grid, Volume, VolumeError, make_finite, reorder};
use flate2::read::MultiGzDecoder;
use ndarray::Array3;
use nifti::NiftiHeader;
use nifti::writer::WriterOptions;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What a file says beside its voxels. Outputs on the same grid inherit it.
#[derive(Clone, Debug)]
pub struct Description {
    /// For example `NIfTI-1`.
    pub format: &'static str,
    /// The stored element type, for example `int16`.
    pub element: &'static str,
    /// Where the affine comes from: `sform`, `qform`, `pixdim` or `space directions`.
    pub affine_from: &'static str,
    /// Volumes in the file.
    pub volumes: usize,
    /// Whether values are whole numbers: an integer type without a scale.
    pub whole: bool,
    /// A NIfTI-1 header with the input's geometry, codes and units.
    pub(super) header: NiftiHeader,
}

/// Bytes behind the voxels that are read to reach a gzip checksum; more are left alone.
const TAIL: u64 = 16 << 20;
/// No deflate stream grows by more than this.
const DEFLATE_LIMIT: u64 = 1100;

/// Opens a file, decompressing if its first bytes say gzip. Also tells whether it is compressed, and its length on disk.
pub(super) fn open(path: &Path) -> Result<(Box<dyn Read>, bool, u64), VolumeError> {
    let fail = |e: std::io::Error| VolumeError::new(path, e.to_string());
    let mut file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if meta.is_dir() {
        return Err(VolumeError::new(path, "is a folder, expected an image file"));
    }
    let mut magic = [0u8; 2];
    let compressed = file.read_exact(&mut magic).is_ok() && magic == [0x1f, 0x8b];
    file.seek(SeekFrom::Start(0)).map_err(fail)?;
    let file = BufReader::with_capacity(1 << 18, file);
    let reader: Box<dyn Read> = if compressed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    Ok((reader, compressed, meta.len()))
}

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

/// The fields of either version that matter here.
struct Header {
    version: u8,
    pair: bool,
    big: bool,
    dim: [i64; 8],
    datatype: i16,
    pixdim: [f64; 8],
    vox_offset: f64,
    slope: f64,
    inter: f64,
    units: i32,
    codes: [i32; 2],
    quatern: [f64; 6],
    srow: [[f64; 4]; 3],
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Header, VolumeError> {
    let fail = |message: String| Err(VolumeError::new(path, message));
    let size = |big: bool| Raw { bytes, big }.i32(0);
    let (version, big) = match (size(false), size(true)) {
        (348, _) => (1, false),
        (_, 348) => (1, true),
        (540, _) => (2, false),
        (_, 540) => (2, true),
        (other, _) => return fail(format!("not a NIfTI file: its header size field is {other}, expected 348 or 540")),
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
            return fail(format!("not a NIfTI file: its magic is '{text}', expected n+1, ni1, n+2 or ni2"));
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
        (h.datatype, h.vox_offset, h.slope, h.inter) = (r.i16(70), r.f32(108), r.f32(112), r.f32(116));
        (h.units, h.codes) = (bytes[123] as i32, [r.i16(252) as i32, r.i16(254) as i32]);
        (0..6).for_each(|q| h.quatern[q] = r.f32(256 + 4 * q));
        (0..12).for_each(|s| h.srow[s / 4][s % 4] = r.f32(280 + 4 * s));
    } else {
        (0..8).for_each(|a| h.dim[a] = r.i64(16 + 8 * a));
        (0..8).for_each(|a| h.pixdim[a] = r.f64(104 + 8 * a));
        (h.datatype, h.vox_offset, h.slope, h.inter) = (r.i16(12), r.i64(168) as f64, r.f64(176), r.f64(184));
        (h.units, h.codes) = (r.i32(500), [r.i32(344), r.i32(348)]);
        (0..6).for_each(|q| h.quatern[q] = r.f64(352 + 8 * q));
        (0..12).for_each(|s| h.srow[s / 4][s % 4] = r.f64(400 + 8 * s));
    }
    Ok(h)
}

/// An element type by NIfTI code: name, bytes, and how a value is read.
type Decode = fn(&[u8]) -> f32;
fn element(code: i16) -> Option<(&'static str, usize, Decode)> {
    macro_rules! of {
        ($name:literal, $t:ty) => {
            ($name, size_of::<$t>(), |b: &[u8]| <$t>::from_le_bytes(std::array::from_fn(|i| b[i])) as f32)
        };
    }
    Some(match code {
        2 => of!("uint8", u8),
        4 => of!("int16", i16),
        8 => of!("int32", i32),
        16 => of!("float32", f32),
        64 => of!("float64", f64),
        256 => of!("int8", i8),
        512 => of!("uint16", u16),
        768 => of!("uint32", u32),
        1024 => of!("int64", i64),
        1280 => of!("uint64", u64),
        _ => return None,
    })
}

fn element_problem(code: i16) -> String {
    let what = match code {
        1 => "one bit a voxel",
        32 | 1792 | 2048 => "complex numbers",
        128 | 2304 => "colour",
        1536 => "128-bit floats",
        _ => return format!("datatype code {code} is not a NIfTI type"),
    };
    format!("it holds {what} (datatype {code}), expected a scalar image of integers or floats")
}

/// The sizes of the three spatial axes and the number of volumes.
fn sizes(path: &Path, h: &Header) -> Result<([usize; 3], usize), VolumeError> {
    let fail = |message: String| Err(VolumeError::new(path, message));
    let axes = h.dim[0];
    if !(1..=7).contains(&axes) {
        return fail(format!("dim[0] is {axes}, expected the number of axes, 1 to 7"));
    }
    let mut size = [1usize; 7];
    for a in 0..axes as usize {
        match usize::try_from(h.dim[a + 1]) {
            Ok(n) if n > 0 => size[a] = n,
            _ => return fail(format!("dim[{}] is {}, expected at least 1", a + 1, h.dim[a + 1])),
        }
    }
    let volumes = size[3..].iter().try_fold(1usize, |n, &s| n.checked_mul(s));
    match volumes {
        Some(volumes) => Ok(([size[0], size[1], size[2]], volumes)),
        None => fail(format!("its axes {size:?} are too many voxels to count")),
    }
}

pub fn read(path: &Path, volume: Option<usize>) -> Result<Volume, VolumeError> {
    // A pair may be named by either of its files.
    let header_path = with_extension(path, "img", "hdr").filter(|p| p.exists()).unwrap_or_else(|| path.to_path_buf());
    let (mut reader, mut compressed, mut length) = open(&header_path)?;
    let truncated = |path: &Path, compressed: bool, e: std::io::Error| {
        let what = if compressed { "truncated or corrupt gzip stream" } else { "unreadable" };
        VolumeError::new(path, format!("{what}: {e}"))
    };
    let mut bytes = Vec::new();
    reader.by_ref().take(348).read_to_end(&mut bytes).map_err(|e| truncated(&header_path, compressed, e))?;
    if bytes.len() < 348 {
        return Err(VolumeError::new(&header_path, format!("shorter than a NIfTI header: {} bytes, expected 348", bytes.len())));
    }
    if [540i32.to_le_bytes(), 540i32.to_be_bytes()].iter().any(|s| bytes[..4] == *s) {
        let rest = reader.by_ref().take(540 - 348).read_to_end(&mut bytes);
        rest.map_err(|e| truncated(&header_path, compressed, e))?;
    }
    let h = parse(&header_path, &bytes)?;
    let fail = |message: String| Err(VolumeError::new(path, message));
    let Some((element, width, decode)) = element(h.datatype) else { return fail(element_problem(h.datatype)) };
    let (size, volumes) = sizes(path, &h)?;
    let pick = match (volume, volumes) {
        (Some(v), n) if v >= n => return fail(format!("volume {v} was asked for, the file has {n} (0 to {})", n - 1)),
        (Some(v), _) => v,
        (None, 1) => 0,
        (None, n) => return fail(format!("it holds {n} volumes of {size:?}; pick one with --volume 0 to {}", n - 1)),
    };

    let mut at = bytes.len() as u64;
    let mut data_path = path.to_path_buf();
    if h.pair {
        let img = [("hdr", "img"), ("HDR", "IMG")].into_iter().find_map(|(a, b)| with_extension(&header_path, a, b));
        data_path = img.unwrap_or_else(|| header_path.with_extension("img"));
        if !data_path.exists() {
            let message = format!("a header without voxels: {} is missing beside it", data_path.display());
            return Err(VolumeError::new(&header_path, message));
        }
        (reader, compressed, length) = open(&data_path)?;
        at = 0;
    }
    let least = if h.pair { 0.0 } else { if h.version == 1 { 352.0 } else { 544.0 } };
    // Some writers leave 0 in a single file; anything else below the header's end would read the header as voxels.
    let offset = if h.vox_offset == 0.0 { least } else { h.vox_offset };
    if !(offset >= least && offset <= 1e15 && offset.fract() == 0.0) {
        return fail(format!("vox_offset is {}, expected a whole number of bytes from {least} on", h.vox_offset));
    }
    let one = size.iter().try_fold(width, |n, &s| n.checked_mul(s));
    let total = one.and_then(|n| n.checked_mul(volumes)).filter(|n| *n as u64 <= 1 << 50);
    let (Some(one), Some(total)) = (one, total) else {
        return fail(format!("{size:?} voxels of {element} in {volumes} volumes are more bytes than can be addressed"));
    };
    let needed = offset as u64 + total as u64;
    let holds = if compressed { length.saturating_mul(DEFLATE_LIMIT) } else { length };
    if needed > holds {
        let data_path = data_path.display();
        return fail(format!("shorter than its header says: {needed} bytes are needed, {data_path} can hold at most {holds}"));
    }
    let skip = offset as u64 - at + (pick * one) as u64;
    let short = |e: std::io::Error| truncated(&data_path, compressed, e);
    let skipped = std::io::copy(&mut reader.by_ref().take(skip), &mut std::io::sink()).map_err(short)?;
    let mut raw = Vec::new();
    reader.by_ref().take(one as u64).read_to_end(&mut raw).map_err(short)?;
    if skipped < skip || raw.len() < one {
        let message = format!("voxels are missing: {} of {one} bytes were there", raw.len());
        return Err(VolumeError::new(&data_path, message));
    }
    let mut warnings = vec![];
    if compressed {
        // Read on to the end, so that a wrong checksum is noticed.
        let rest = (total - (pick + 1) * one) as u64;
        let tail = std::io::copy(&mut reader.by_ref().take(rest + TAIL), &mut std::io::sink()).map_err(short)?;
        if tail == rest + TAIL {
            warnings.push(format!("more than {} MiB follow the voxels and were not read", TAIL >> 20));
        }
    }

    if h.big {
        raw.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
    let mut data: Vec<f32> = raw.chunks_exact(width).map(decode).collect();
    drop(raw);
    scale(&h, &mut data, &mut warnings);
    match make_finite(&mut data) {
        Some(0) => {}
        Some(n) => warnings.push(format!("{n} voxels are not finite numbers: NaN and -inf were read as the smallest value, +inf as the largest")),
        None => return fail("no voxel is a finite number".into()),
    }
    let (affine, affine_from) = place(&h, &mut warnings);
    let description = Description {
        format: if h.version == 1 { "NIfTI-1" } else { "NIfTI-2" },
        element,
        affine_from,
        volumes,
        whole: !element.starts_with("float") && !is_scaled(&h),
        header: reference(&h, size),
    };
    Ok(Volume { grid: Grid { size, affine }, data: reorder(&data, size), description, warnings })
}

/// `path` with its extension `from` replaced, `.gz` kept; none for another extension.
fn with_extension(path: &Path, from: &str, to: &str) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let (stem, gz) = name.strip_suffix(".gz").map_or((name, ""), |s| (s, ".gz"));
    let stem = stem.strip_suffix(from).filter(|s| s.ends_with('.'))?;
    Some(path.with_file_name(format!("{stem}{to}{gz}")))
}

/// Whether stored values are to be multiplied or shifted.
fn is_scaled(h: &Header) -> bool {
    h.slope.is_finite() && h.slope != 0.0 && (h.slope != 1.0 || (h.inter.is_finite() && h.inter != 0.0))
}

fn scale(h: &Header, data: &mut [f32], warnings: &mut Vec<String>) {
    if h.slope == 0.0 || !h.slope.is_finite() {
        if h.slope == 0.0 && h.inter.is_finite() && h.inter != 0.0 {
            warnings.push(format!("scl_slope is 0: by the standard there is no scaling, and scl_inter {} is ignored", h.inter));
        }
        return;
    }
    if is_scaled(h) {
        let inter = if h.inter.is_finite() { h.inter } else { 0.0 };
        data.iter_mut().for_each(|v| *v = (*v as f64 * h.slope + inter) as f32);
    }
}

/// The affine in mm, by sform, qform or pixdim, in this order of preference.
fn place(h: &Header, warnings: &mut Vec<String>) -> (Affine, &'static str) {
    let mut spacing = [1.0; 3];
    for a in 0..3 {
        let p = h.pixdim[a + 1];
        let used = h.dim[0] as usize > a;
        spacing[a] = if p.is_finite() && p != 0.0 { p.abs() } else { 1.0 };
        if used && spacing[a] != p && h.codes[1] <= 0 {
            warnings.push(format!("pixdim[{}] is {p}: {} mm is used", a + 1, spacing[a]));
        }
    }
    let candidates = [(h.codes[1], "sform"), (h.codes[0], "qform")];
    let (mut affine, mut from) = (Affine::from_spacing(spacing), "pixdim");
    for (_, name) in candidates.into_iter().filter(|(code, _)| *code > 0) {
        let candidate = if name == "sform" { Affine(h.srow) } else { quaternion(h, spacing) };
        if candidate.is_regular() {
            (affine, from) = (candidate, name);
            break;
        }
        warnings.push(format!("its {name} is singular and was passed over"));
    }
    let to_mm = match h.units & 7 {
        1 => 1000.0,
        3 => 0.001,
        _ => 1.0,
    };
    if to_mm != 1.0 {
        warnings.push(format!("lengths are in {}, read as mm", if to_mm > 1.0 { "metres" } else { "micrometres" }));
        affine.0.iter_mut().flatten().for_each(|v| *v *= to_mm);
    }
    (affine, from)
}

/// The affine of method 2 of the standard: a unit quaternion, pixdim, and the handedness pixdim[0].
fn quaternion(h: &Header, spacing: [f64; 3]) -> Affine {
    let [b, c, d, x, y, z] = h.quatern;
    let mut a = 1.0 - (b * b + c * c + d * d);
    let (mut b, mut c, mut d) = (b, c, d);
    if a < 1e-7 {
        // A half turn, stored with rounding.
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
    Affine(std::array::from_fn(|r| [rotation[r][0] * steps[0], rotation[r][1] * steps[1], rotation[r][2] * steps[2], origin[r]]))
}

/// A NIfTI-1 header with the input's geometry, codes and units, for outputs.
fn reference(h: &Header, size: [usize; 3]) -> NiftiHeader {
    let spatial = |v: f64| v as f32;
    let mut pixdim = [1.0f32; 8];
    (0..4).for_each(|a| pixdim[a] = spatial(h.pixdim[a]));
    let mut dim = [1u16; 8];
    dim[0] = 3;
    (0..3).for_each(|a| dim[a + 1] = size[a].min(u16::MAX as usize) as u16);
    NiftiHeader {
        dim,
        pixdim,
        xyzt_units: (h.units & 7) as u8,
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

/// A description for an image that did not come from NIfTI: an sform with scanner coordinates in mm.
pub(super) fn describe(grid: &Grid, format: &'static str, element: &'static str, volumes: usize) -> Description {
    let spacing = grid.spacing();
    let row = |r: usize| grid.affine.0[r].map(|v| v as f32);
    let mut pixdim = [1.0f32; 8];
    (0..3).for_each(|a| pixdim[a + 1] = spacing[a] as f32);
    let header = NiftiHeader {
        pixdim,
        xyzt_units: 2,
        qform_code: 0,
        sform_code: 1,
        srow_x: row(0),
        srow_y: row(1),
        srow_z: row(2),
        ..Default::default()
    };
    Description { format, element, affine_from: "space directions", volumes, whole: !element.starts_with("float"), header }
}

/// Writes a binary mask `[i][j][k]` as uint8 on `image`'s grid, with its affine, codes and units. It appears when the result is committed.
pub fn write_mask(path: &Path, image: &Volume, mask: &[u8]) -> Result<Pending, VolumeError> {
    write(path, image, mask)
}

/// The same for probabilities, as float32.
pub fn write_probability(path: &Path, image: &Volume, values: &[f32]) -> Result<Pending, VolumeError> {
    write(path, image, values)
}

/// An error unless `path` has a name that an output image can have.
pub fn check_output(path: &Path) -> Result<(), VolumeError> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    if name.ends_with(".nii") || name.ends_with(".nii.gz") {
        Ok(())
    } else {
        Err(VolumeError::new(path, "an output image must be named .nii or .nii.gz"))
    }
}

fn write<T: nifti::DataElement + bytemuck::Pod>(path: &Path, image: &Volume, values: &[T]) -> Result<Pending, VolumeError> {
    check_output(path)?;
    let size = image.grid.size;
    if size.iter().any(|&s| s > i16::MAX as usize) {
        return Err(VolumeError::new(path, format!("{size:?} voxels do not fit a NIfTI-1 file (at most 32767 along an axis)")));
    }
    let fail = |e: String| VolumeError::new(path, e);
    // The crate expects the array's logical order [i, j, k] and stores i fastest.
    let array = Array3::from_shape_vec(size, values.to_vec()).map_err(|e| fail(e.to_string()))?;
    let pending = Pending::new(path).map_err(|e| fail(e.to_string()))?;
    let written = WriterOptions::new(pending.path()).reference_header(&image.description.header).write_nifti(&array);
    written.map_err(|e| fail(format!("cannot write: {e}")))?;
    Ok(pending)
}
