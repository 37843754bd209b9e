//! NRRD files, reading: attached (.nrrd) or detached (.nhdr) data, raw or gzip, the scalar element types.

use super::element::element;
use super::nifti_io::{DEFLATE_LIMIT, TAIL, describe, open};
use super::{Affine, Grid, Volume, VolumeError, make_finite, reorder};
use flate2::read::MultiGzDecoder;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Whether the file begins as an NRRD file does.
pub fn is_nrrd(path: &Path) -> Result<bool, VolumeError> {
    let mut file = std::fs::File::open(path).map_err(|e| VolumeError::new(path, e.to_string()))?;
    let mut magic = [0u8; 4];
    Ok(file.read_exact(&mut magic).is_ok() && &magic == b"NRRD")
}

/// Bytes of header text that are read before giving up on its end.
const HEADER_LIMIT: usize = 1 << 20;

/// The plain name of an element type, of which NRRD knows several spellings.
fn element_name(spelling: &str) -> Option<&'static str> {
    Some(match spelling {
        "signed char" | "int8" | "int8_t" => "int8",
        "uchar" | "unsigned char" | "uint8" | "uint8_t" => "uint8",
        "short" | "short int" | "signed short" | "signed short int" | "int16" | "int16_t" => "int16",
        "ushort" | "unsigned short" | "unsigned short int" | "uint16" | "uint16_t" => "uint16",
        "int" | "signed int" | "int32" | "int32_t" => "int32",
        "uint" | "unsigned int" | "uint32" | "uint32_t" => "uint32",
        "longlong" | "long long" | "long long int" | "signed long long" | "int64" | "int64_t" => "int64",
        "ulonglong" | "unsigned long long" | "unsigned long long int" | "uint64" | "uint64_t" => "uint64",
        "float" => "float32",
        "double" => "float64",
        _ => return None,
    })
}

/// Numbers of a vector such as `(1,0,-0.5)`; none for `none`.
fn vector(text: &str) -> Option<Vec<f64>> {
    let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
    inner.split(',').map(|n| n.trim().parse().ok()).collect()
}

/// The vectors of a line; a `none` axis gives none.
fn vectors(text: &str) -> Vec<Option<Vec<f64>>> {
    let mut list = vec![];
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = if rest.starts_with('(') { rest.find(')').map_or(rest.len(), |e| e + 1) } else { rest.find(' ').unwrap_or(rest.len()) };
        list.push(vector(&rest[..end]));
        rest = rest[end..].trim_start();
    }
    list
}

pub fn read(path: &Path, volume: Option<usize>) -> Result<Volume, VolumeError> {
    let fail = |message: String| VolumeError::new(path, message);
    let (reader, ..) = open(path)?;
    let mut reader = BufReader::new(reader);
    let mut fields = HashMap::new();
    let mut total = 0;
    loop {
        let mut line = vec![];
        let read = reader.by_ref().take(HEADER_LIMIT as u64).read_until(b'\n', &mut line).map_err(|e| fail(e.to_string()))?;
        total += read;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches(['\n', '\r']);
        if line.is_empty() || read == 0 {
            break;
        }
        if total > HEADER_LIMIT {
            return Err(fail("its header does not end within 1 MiB".into()));
        }
        if let Some((key, value)) = line.split_once(": ").filter(|_| !line.starts_with('#')) {
            fields.insert(key.trim().to_lowercase(), value.trim().to_string());
        }
    }
    let field = |key: &str| fields.get(key).map(String::as_str);
    let need = |key: &str| field(key).ok_or_else(|| fail(format!("its header has no '{key}'")));

    let kind = need("type")?;
    let (name, width, decode) =
        element_name(kind).and_then(element).ok_or_else(|| fail(format!("type is '{kind}', expected a scalar integer or float type")))?;
    let sizes: Option<Vec<usize>> = need("sizes")?.split_whitespace().map(|s| s.parse().ok().filter(|n| *n > 0)).collect();
    let sizes = sizes.filter(|s| (2..=7).contains(&s.len()));
    let sizes = sizes.ok_or_else(|| fail(format!("sizes are '{}', expected 2 to 7 numbers from 1 on", need("sizes").unwrap_or(""))))?;
    let directions = field("space directions").map(vectors).unwrap_or_default();
    // The spatial axes are those with a direction; without directions, the first three.
    let mut spatial: Vec<usize> = (0..sizes.len()).filter(|&a| directions.get(a).is_some_and(Option::is_some)).collect();
    if directions.is_empty() {
        spatial = (0..sizes.len().min(3)).collect();
    }
    if spatial.is_empty() || spatial.len() > 3 || spatial.windows(2).any(|p| p[1] != p[0] + 1) {
        return Err(fail("expected two or three neighbouring axes with a space direction".into()));
    }
    let (inner, size) = (sizes[..spatial[0]].iter().product::<usize>(), [0, 1, 2].map(|a| spatial.get(a).map_or(1, |&s| sizes[s])));
    let outer = sizes[spatial[spatial.len() - 1] + 1..].iter().try_fold(inner, |n, &s| n.checked_mul(s));
    let volumes = outer.ok_or_else(|| fail(format!("its axes {sizes:?} are too many voxels to count")))?;
    let pick = match (volume, volumes) {
        (Some(v), n) if v >= n => return Err(fail(format!("volume {v} was asked for, the file has {n} (0 to {})", n - 1))),
        (Some(v), _) => v,
        (None, 1) => 0,
        (None, n) => return Err(fail(format!("it holds {n} volumes of {size:?}; pick one with --volume 0 to {}", n - 1))),
    };
    let voxels = size.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
    let bytes = voxels.and_then(|n| n.checked_mul(width)).and_then(|n| n.checked_mul(volumes)).filter(|n| *n as u64 <= 1 << 50);
    let (Some(voxels), Some(bytes)) = (voxels, bytes) else {
        return Err(fail(format!("{size:?} voxels of {name} in {volumes} volumes are more bytes than can be addressed")));
    };

    let data_file = field("data file").or(field("datafile"));
    let (mut data, limit): (Box<dyn Read>, u64) = match data_file {
        Some(file) => {
            if file.contains("LIST") || file.contains('%') {
                return Err(fail("voxels spread over several files are not supported".into()));
            }
            let at = path.with_file_name(file);
            let (reader, compressed, length) = open(&at)?;
            (reader, if compressed { length.saturating_mul(DEFLATE_LIMIT) } else { length })
        }
        None => {
            let length = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?.len();
            (Box::new(reader), length.saturating_mul(DEFLATE_LIMIT))
        }
    };
    let encoding = need("encoding")?;
    data = match encoding {
        "raw" => data,
        // A detached gzip file was recognised when it was opened.
        "gzip" | "gz" if data_file.is_some() => data,
        "gzip" | "gz" => Box::new(MultiGzDecoder::new(BufReader::new(data))),
        other => return Err(fail(format!("encoding is '{other}', expected raw or gzip"))),
    };
    if bytes as u64 > limit {
        return Err(fail(format!("shorter than its header says: {bytes} bytes of voxels are needed")));
    }
    let skip: u64 = field("byte skip")
        .or(field("byteskip"))
        .map_or(Ok(0), |s| s.parse())
        .map_err(|_| fail("byte skip is not a number from 0 on".into()))?;
    let broken = |e: std::io::Error| fail(format!("truncated or corrupt voxels: {e}"));
    std::io::copy(&mut data.by_ref().take(skip), &mut std::io::sink()).map_err(broken)?;
    let mut raw = Vec::new();
    data.by_ref().take(bytes as u64).read_to_end(&mut raw).map_err(broken)?;
    if raw.len() < bytes {
        return Err(fail(format!("voxels are missing: {} of {bytes} bytes were there", raw.len())));
    }
    // On to the end, so that a wrong checksum is noticed.
    std::io::copy(&mut data.by_ref().take(TAIL), &mut std::io::sink()).map_err(broken)?;
    if width > 1 && field("endian").is_some_and(|e| e.eq_ignore_ascii_case("big")) {
        raw.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
    // Axes in front of the spatial ones interleave the volumes.
    let (lead, which) = (pick % inner, pick / inner);
    let value = |v: usize| decode(&raw[((which * voxels + v) * inner + lead) * width..][..width]);
    let mut values: Vec<f32> = (0..voxels).map(value).collect();
    let mut warnings = vec![];
    make_finite(path, &mut values, &mut warnings)?;
    let affine = place(&fields, &directions, &spatial, &mut warnings);
    if !affine.is_regular() {
        return Err(fail("its space directions do not span space".into()));
    }
    let grid = Grid { size, affine };
    let description = describe(&grid, "NRRD", name, volumes);
    Ok(Volume { grid, data: reorder(&values, size), description, warnings })
}

/// The affine in RAS mm.
fn place(fields: &HashMap<String, String>, directions: &[Option<Vec<f64>>], spatial: &[usize], warnings: &mut Vec<String>) -> Affine {
    let mut affine = Affine::from_spacing([1.0; 3]);
    for (a, &axis) in spatial.iter().enumerate() {
        match directions.get(axis).and_then(Option::as_ref) {
            Some(d) => (0..3).for_each(|r| affine.0[r][a] = d.get(r).copied().unwrap_or(0.0)),
            None => {
                let spacings: Vec<f64> =
                    fields.get("spacings").map_or(vec![], |s| s.split_whitespace().filter_map(|n| n.parse().ok()).collect());
                affine.0[a][a] = spacings.get(axis).copied().filter(|s| s.is_finite() && *s != 0.0).unwrap_or(1.0).abs();
            }
        }
    }
    if let Some(origin) = fields.get("space origin").and_then(|o| vector(o)) {
        (0..3).for_each(|r| affine.0[r][3] = origin.get(r).copied().unwrap_or(0.0));
    }
    let space = fields.get("space").map(|s| s.to_lowercase()).unwrap_or_default();
    let flips = match space.as_str() {
        "left-posterior-superior" | "lps" => [true, true, false],
        "left-anterior-superior" | "las" => [true, false, false],
        "right-anterior-superior" | "ras" => [false; 3],
        _ => {
            warnings.push("it names no anatomical space: axes are taken as they are, as RAS".into());
            [false; 3]
        }
    };
    for (row, flip) in affine.0.iter_mut().zip(flips) {
        if flip {
            row.iter_mut().for_each(|v| *v = -*v);
        }
    }
    affine
}
