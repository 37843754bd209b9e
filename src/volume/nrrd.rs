//! Reading NRRD files: attached (.nrrd) or detached (.nhdr) data in one file or several, raw, text,
//! gzip or bzip2, the scalar element types, and the names that segmentations (.seg.nrrd) give their
//! values. A field that changes what the voxels mean and is not supported is an error that names
//! it.

use super::nifti_io::{TAIL, describe};
use super::palette::{default_colour, parts_of_one};
use super::{
    Affine, Array, Contents, Element, Grid, Segment, VOXELS, VOXELS_ELSEWHERE, VolumeError, Which,
    detached,
};
use crate::input::{BEHIND, BZIP2_LIMIT, DEFLATE_LIMIT, Input, Packed, unpacked};
use crate::memory;
use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The most bytes of header text that are read in search of its end.
pub(super) const HEADER_LIMIT: usize = 1 << 20;

/// Fields that are read, in their canonical spelling.
const KNOWN: [&str; 16] = [
    "type",
    "dimension",
    "sizes",
    "encoding",
    "endian",
    "space",
    "space dimension",
    "space directions",
    "space origin",
    "space units",
    "spacings",
    "units",
    "line skip",
    "byte skip",
    "data file",
    "kinds",
];

/// Fields that say nothing about where voxels are or what their values mean.
const REMARKS: [&str; 11] = [
    "content",
    "number",
    "labels",
    "centers",
    "centerings",
    "thicknesses",
    "sample units",
    "min",
    "max",
    "measurement frame",
    "kind",
];

/// Other spellings of fields.
const ALIASES: [(&str, &str); 8] = [
    ("datafile", "data file"),
    ("lineskip", "line skip"),
    ("byteskip", "byte skip"),
    ("sampleunits", "sample units"),
    ("axismins", "axis mins"),
    ("axismaxs", "axis maxs"),
    ("oldmin", "old min"),
    ("oldmax", "old max"),
];

/// An element type, for which NRRD has several spellings.
fn element_of(spelling: &str) -> Option<Element> {
    Some(match spelling {
        "signed char" | "int8" | "int8_t" => Element::Int8,
        "uchar" | "unsigned char" | "uint8" | "uint8_t" => Element::Uint8,
        "short" | "short int" | "signed short" | "signed short int" | "int16" | "int16_t" => {
            Element::Int16
        }
        "ushort" | "unsigned short" | "unsigned short int" | "uint16" | "uint16_t" => {
            Element::Uint16
        }
        "int" | "signed int" | "int32" | "int32_t" => Element::Int32,
        "uint" | "unsigned int" | "uint32" | "uint32_t" => Element::Uint32,
        "longlong"
        | "long long"
        | "long long int"
        | "signed long long"
        | "signed long long int"
        | "int64"
        | "int64_t" => Element::Int64,
        "ulonglong" | "unsigned long long" | "unsigned long long int" | "uint64" | "uint64_t" => {
            Element::Uint64
        }
        "float" => Element::Float32,
        "double" => Element::Float64,
        _ => return None,
    })
}

/// A header: its fields, the key/value pairs, and the lines of a list of files.
#[derive(Default)]
struct Header {
    fields: HashMap<String, String>,
    pairs: HashMap<String, String>,
    list: Vec<String>,
    warnings: Vec<String>,
}

impl Header {
    /// Reads up to the empty line, or to the end of a detached header's list of files.
    fn read(reader: &mut impl BufRead) -> Result<Header, String> {
        let mut header = Header::default();
        let mut total = 0;
        loop {
            let mut line = vec![];
            total += reader
                .by_ref()
                .take(HEADER_LIMIT as u64)
                .read_until(b'\n', &mut line)
                .map_err(|e| e.to_string())?;
            if total > HEADER_LIMIT {
                return Err("its header does not end within 1 MiB".into());
            }
            let ended = line.is_empty();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            let listing = header.get("data file").is_some_and(|f| f.starts_with("LIST"));
            if ended || line.is_empty() {
                return Ok(header);
            } else if line.starts_with('#') {
                continue;
            } else if let Some((key, value)) = line.split_once(":=") {
                header.pairs.insert(key.trim().to_string(), value.trim().to_string());
            } else if let Some((key, value)) = line.split_once(": ").filter(|_| !listing) {
                header.field(key.trim().to_lowercase(), value.trim().to_string())?;
            } else if listing {
                header.list.push(line.to_string());
            } else if !line.starts_with("NRRD") {
                return Err(format!("its header has the line '{line}', expected 'NAME: VALUE'"));
            }
        }
    }

    fn field(&mut self, key: String, value: String) -> Result<(), String> {
        let key = ALIASES
            .iter()
            .find(|(other, _)| *other == key)
            .map_or(key, |(_, name)| name.to_string());
        match key.as_str() {
            k if KNOWN.contains(&k) || REMARKS.contains(&k) => {}
            "axis mins" | "axis maxs" => self.warnings.push(format!(
                "its '{key}' is not read: spacings and directions give the geometry"
            )),
            "old min" | "old max" => self
                .warnings
                .push(format!("its '{key}' is not read: values are taken as they are stored")),
            _ => return Err(format!("its header has an unknown field '{key}'")),
        }
        self.fields.insert(key, value);
        Ok(())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.fields.get(key).map(String::as_str)
    }

    fn need(&self, key: &str) -> Result<&str, String> {
        self.get(key).ok_or_else(|| format!("its header has no '{key}'"))
    }

    /// A whole number from `least` on; `usual` if the field is absent.
    fn whole(&self, key: &str, least: i64, usual: i64) -> Result<i64, String> {
        let Some(text) = self.get(key) else { return Ok(usual) };
        text.parse().ok().filter(|n| *n >= least).ok_or_else(|| {
            format!("its '{key}' is '{text}', expected a whole number, {least} or more")
        })
    }

    /// The structures of a segmentation with `layers` volumes.
    fn segments(&self, layers: usize) -> Vec<Segment> {
        let mut numbers = BTreeMap::new();
        for key in self.pairs.keys() {
            let number = key
                .strip_prefix("Segment")
                .and_then(|k| k.split_once('_'))
                .and_then(|(n, _)| n.parse::<u32>().ok());
            numbers.extend(number.map(|n| (n, ())));
        }
        let of = |n: u32, what: &str| self.pairs.get(&format!("Segment{n}_{what}"));
        let count = numbers.len();
        let segment = |n: &u32| {
            // Files from the time before each layer was a volume have one volume per segment.
            let alone = if count == layers { *n as usize } else { 0 };
            Segment {
                name: of(*n, "Name")
                    .or(of(*n, "ID"))
                    .cloned()
                    .unwrap_or_else(|| format!("Segment {n}")),
                layer: of(*n, "Layer").and_then(|l| l.parse().ok()).unwrap_or(alone),
                value: of(*n, "LabelValue").and_then(|l| l.parse().ok()).unwrap_or(1),
            }
        };
        numbers.keys().map(segment).filter(|s| s.layer < layers).collect()
    }
}

/// A structure as a segmentation shows it.
pub(super) struct Structure<'a> {
    /// The identifier by which programs distinguish it from others.
    pub id: String,
    /// The structure's name: a line without control characters.
    pub name: &'a str,
    /// The value of the structure's voxels.
    pub value: usize,
    /// Red, green and blue, from 0 to 1.
    pub colour: [f64; 3],
    /// Whether the colour was chosen by the user.
    pub chosen: bool,
}

impl Structure<'_> {
    /// The only structure of a mask.
    pub(super) fn object() -> Structure<'static> {
        let colour = parts_of_one(default_colour(0));
        Structure { id: "object".into(), name: "object", value: 1, colour, chosen: true }
    }
}

#[cfg(feature = "dicom")]
impl<'a> Structure<'a> {
    /// The structure with its voxels, for a DICOM segmentation.
    pub(super) fn marked<'m>(
        &self,
        marks: super::dicom::SegmentVoxels<'m>,
    ) -> super::dicom::Segment<'m>
    where
        'a: 'm,
    {
        super::dicom::Segment { label: self.name, colour: self.colour, marks }
    }
}

/// The part of a file before its voxels, packed by an `encoding`: all structures of a segmentation;
/// without any it is a plain image. 3D Slicer shows each with its name and its colour (its
/// developers' guide, "Segmentations": fields of a labelmap file).
pub(super) fn head(
    grid: &Grid,
    element: Element,
    structures: &[Structure],
    encoding: &str,
) -> Vec<u8> {
    let kind = match element {
        Element::Uint8 => "unsigned char",
        Element::Float32 => "float",
        other => other.name(),
    };
    // From right, anterior to left, posterior.
    let lps =
        |r: usize, c: usize| if r < 2 { -grid.affine.0[r][c] + 0.0 } else { grid.affine.0[r][c] };
    let vector = |c: usize| format!("({},{},{})", lps(0, c), lps(1, c), lps(2, c));
    let [ni, nj, nk] = grid.size;
    let mut text = format!(
        "NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\nsizes: {ni} {nj} {nk}\n\
         space directions: {} {} {}\nkinds: domain domain domain\nendian: little\nencoding: {encoding}\nspace origin: {}\n",
        vector(0),
        vector(1),
        vector(2),
        vector(3),
    );
    let extent = format!("0 {} 0 {} 0 {}", ni - 1, nj - 1, nk - 1);
    for (n, Structure { id, name, value, colour: [r, g, b], chosen }) in
        structures.iter().enumerate()
    {
        let automatic = u8::from(!chosen);
        text += &format!(
            "Segment{n}_Color:={r} {g} {b}\nSegment{n}_ColorAutoGenerated:={automatic}\nSegment{n}_Extent:={extent}\n\
             Segment{n}_ID:={id}\nSegment{n}_LabelValue:={value}\nSegment{n}_Layer:=0\nSegment{n}_Name:={name}\n\
             Segment{n}_NameAutoGenerated:=0\nSegment{n}_Tags:=|\n"
        );
    }
    if !structures.is_empty() {
        text += "Segmentation_ContainedRepresentationNames:=Binary labelmap|\nSegmentation_MasterRepresentation:=Binary labelmap\n\
                 Segmentation_SourceRepresentation:=Binary labelmap\nSegmentation_ReferenceImageExtentOffset:=0 0 0\n";
    }
    text.push('\n');
    text.into_bytes()
}

/// Numbers of a vector such as `(1,0,-0.5)`; none for `none`.
fn vector(text: &str) -> Option<Vec<f64>> {
    let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
    inner.split(',').map(|n| n.trim().parse().ok().filter(|v: &f64| v.is_finite())).collect()
}

/// The vectors of a line; a `none` axis gives none.
fn vectors(text: &str) -> Vec<Option<Vec<f64>>> {
    let mut list = vec![];
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = if rest.starts_with('(') {
            rest.find(')').map_or(rest.len(), |e| e + 1)
        } else {
            rest.find(' ').unwrap_or(rest.len())
        };
        list.push(vector(&rest[..end]));
        rest = rest[end..].trim_start();
    }
    list
}

/// The units of a line, each in quotes, or all without.
fn quoted(text: &str) -> Vec<&str> {
    if text.contains('"') {
        text.split('"').skip(1).step_by(2).collect()
    } else {
        text.split_whitespace().collect()
    }
}

/// The number of millimetres in a unit of length.
fn millimetres(unit: &str) -> Option<f64> {
    Some(match unit.trim().to_lowercase().as_str() {
        "" | "mm" | "millimeter" | "millimeters" | "millimetre" | "millimetres" => 1.0,
        "um" | "µm" | "μm" | "micron" | "microns" | "micrometer" | "micrometers" | "micrometre"
        | "micrometres" => 1e-3,
        "nm" | "nanometer" | "nanometers" | "nanometre" | "nanometres" => 1e-6,
        "cm" | "centimeter" | "centimeters" | "centimetre" | "centimetres" => 10.0,
        "m" | "meter" | "meters" | "metre" | "metres" => 1000.0,
        _ => return None,
    })
}

pub fn read(path: &Path, input: Input, which: Which) -> Result<Contents, VolumeError> {
    let most = input.most();
    parse(path, BufReader::new(input), most, which).map_err(|e| VolumeError::new(path, e))
}

fn parse(
    path: &Path,
    mut reader: BufReader<Input>,
    most: u64,
    which: Which,
) -> Result<Contents, String> {
    let mut header = Header::read(&mut reader)?;
    let kind = header.need("type")?;
    let element = element_of(kind)
        .ok_or_else(|| format!("type is '{kind}', expected a scalar integer or float type"))?;
    let (name, width) = (element.name(), element.size());
    let sizes: Option<Vec<usize>> = header
        .need("sizes")?
        .split_whitespace()
        .map(|s| s.parse().ok().filter(|n| *n > 0))
        .collect();
    let sizes = sizes.filter(|s| (2..=7).contains(&s.len()));
    let sizes = sizes.ok_or_else(|| {
        format!(
            "sizes are '{}', expected 2 to 7 numbers, 1 or more",
            header.need("sizes").unwrap_or("")
        )
    })?;
    let dimension = header.whole("dimension", 1, sizes.len() as i64)?;
    if dimension != sizes.len() as i64 {
        return Err(format!("its dimension is {dimension}, but it has {} sizes", sizes.len()));
    }
    let directions = header.get("space directions").map(vectors).unwrap_or_default();
    // The spatial axes are those with a direction in space; without directions, the first three.
    let in_space =
        |d: &Option<Vec<f64>>| d.as_ref().is_some_and(|d| d.iter().take(3).any(|v| *v != 0.0));
    let mut spatial: Vec<usize> =
        (0..sizes.len()).filter(|&a| directions.get(a).is_some_and(in_space)).collect();
    if directions.is_empty() {
        let kinds: Vec<&str> =
            header.get("kinds").map_or(vec![], |k| k.split_whitespace().collect());
        let said =
            kinds.len() == sizes.len() && kinds.iter().any(|k| ["domain", "space"].contains(k));
        spatial = match said {
            true => (0..sizes.len())
                .filter(|a| ["domain", "space"].contains(&kinds[*a]))
                .take(3)
                .collect(),
            false => (0..sizes.len().min(3)).collect(),
        };
    }
    if spatial.is_empty() || spatial.len() > 3 || spatial.windows(2).any(|p| p[1] != p[0] + 1) {
        return Err("expected two or three neighbouring axes with a space direction".into());
    }
    let too_many = || format!("its axes {sizes:?} are too many voxels to count");
    let counted = |axes: &[usize]| memory::extent(axes).ok_or_else(too_many);
    let (inner, size) = (
        counted(&sizes[..spatial[0]])?,
        [0, 1, 2].map(|a| spatial.get(a).map_or(1, |&s| sizes[s])),
    );
    let volumes = counted(&[inner, counted(&sizes[spatial[spatial.len() - 1] + 1..])?])?;
    let segments = header.segments(volumes);
    let picked = match which {
        Which::Layers if !segments.is_empty() => 0..volumes,
        which => {
            let one = which.pick(volumes, size)?;
            one..one + 1
        }
    };
    let voxels = counted(&size)?;
    let bytes = element.bytes_of(size, volumes)?;

    let encoding = header.need("encoding")?.to_lowercase();
    let big = match header.get("endian").map(str::to_lowercase).as_deref() {
        None | Some("little") => false,
        Some("big") => true,
        Some(other) => return Err(format!("its 'endian' is '{other}', expected little or big")),
    };
    let behind = Arc::new(AtomicBool::new(false));
    let mut raw = stored(path, &header, reader, most, (name, &encoding, &behind), bytes)?;
    // Text has no byte order: its values are stored with the lowest byte first.
    element.to_native(&mut raw, big && !is_text(&encoding));
    let chosen = match volumes {
        1 => vec![Array::of_bytes(raw, element, size, None)],
        _ => {
            // Axes before the spatial ones interleave the volumes: one pass through the bytes
            // separates all of them, one cache-sized block at a time.
            const BLOCK: usize = 1 << 14;
            let step = inner * width;
            let mut apart: Vec<Vec<u8>> =
                picked.clone().map(|_| memory::list(VOXELS, voxels * width)).collect();
            for (which, group) in raw.chunks_exact(voxels * step).enumerate() {
                // Those of this group, which are consecutive: there may be a million of either.
                let among = |pick: usize| pick.clamp(picked.start, picked.end) - picked.start;
                let (from, to) = (among(which * inner), among((which + 1) * inner));
                for block in group.chunks(BLOCK * step) {
                    for (pick, bytes) in (picked.start + from..).zip(&mut apart[from..to]) {
                        let lead = pick % inner * width;
                        match inner {
                            1 => bytes.extend_from_slice(block),
                            _ => block
                                .chunks_exact(step)
                                .for_each(|v| bytes.extend_from_slice(&v[lead..][..width])),
                        }
                    }
                }
            }
            let array = |bytes| Array::of_bytes(bytes, element, size, None);
            apart.into_iter().map(array).collect()
        }
    };
    let mut warnings = std::mem::take(&mut header.warnings);
    warnings.extend(behind.load(Ordering::Relaxed).then(|| BEHIND.to_string()));
    let affine = place(&header, &directions, &spatial, &mut warnings)?;
    if !affine.is_regular() {
        return Err("its space directions do not span three dimensions".into());
    }
    let grid = Grid { size, affine };
    Ok(Contents {
        grid,
        volumes: chosen,
        segments,
        description: describe(&grid, "NRRD", name, volumes),
        warnings,
    })
}

fn is_text(encoding: &str) -> bool {
    ["txt", "text", "ascii"].contains(&encoding)
}

/// How voxels are stored: their type, the encoding, and whether bytes of something else follow
/// them.
type Stored<'a> = (&'a str, &'a str, &'a Arc<AtomicBool>);

/// The bytes of all voxels, `bytes` of them.
fn stored(
    path: &Path,
    header: &Header,
    attached: BufReader<Input>,
    most: u64,
    how: Stored,
    bytes: usize,
) -> Result<Vec<u8>, String> {
    let Some(named) = header.get("data file") else {
        return part(header, attached, most, how, bytes);
    };
    if attached.get_ref().is_alone() {
        return Err(VOXELS_ELSEWHERE.into());
    }
    detached::voxels(path, named, header.list.iter().map(String::as_str), bytes, |file, bytes| {
        let most = file.most();
        part(header, BufReader::new(file), most, how, bytes)
    })
}

/// The bytes of the voxels of one file, or of the rest of the header's own file.
fn part(
    header: &Header,
    mut reader: impl BufRead + 'static,
    most: u64,
    how: Stored,
    bytes: usize,
) -> Result<Vec<u8>, String> {
    let (element, encoding, behind) = how;
    let (lines, skip) = (header.whole("line skip", 0, 0)?, header.whole("byte skip", -1, 0)?);
    let broken = |e: std::io::Error| format!("truncated or corrupt voxels: {e}");
    for _ in 0..lines {
        if reader.skip_until(b'\n').map_err(broken)? == 0 {
            return Err(format!(
                "voxels are missing: its 'line skip' is {lines}, the file has fewer lines"
            ));
        }
    }
    let (packed, most) = match encoding {
        "gzip" | "gz" => (Packed::Gzip, most.saturating_mul(DEFLATE_LIMIT)),
        "bzip2" | "bz2" => (Packed::Bzip2, most.saturating_mul(BZIP2_LIMIT)),
        other if other == "raw" || is_text(other) => (Packed::Plain, most),
        other => return Err(format!("encoding is '{other}', expected raw, gzip, bzip2 or text")),
    };
    let mut data = unpacked(reader, packed, behind.clone());
    if skip == -1 {
        if encoding != "raw" {
            return Err(format!("its 'byte skip' is -1, which needs encoding raw, not {encoding}"));
        }
        return last(data, bytes);
    }
    std::io::copy(&mut data.by_ref().take(skip as u64), &mut std::io::sink()).map_err(broken)?;
    if is_text(encoding) {
        return numbers(data, element, bytes);
    }
    if bytes as u64 > most {
        return Err(format!("shorter than its header says: {bytes} bytes of voxels are needed"));
    }
    let mut raw = memory::list(VOXELS, bytes);
    data.by_ref().take(bytes as u64).read_to_end(&mut raw).map_err(broken)?;
    if raw.len() < bytes {
        return Err(format!("voxels are missing: found {} of {bytes} bytes", raw.len()));
    }
    // Read on to the end, so that a wrong checksum is noticed.
    std::io::copy(&mut data.take(TAIL), &mut std::io::sink()).map_err(broken)?;
    Ok(raw)
}

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 15;

/// The last bytes, whatever comes before them.
fn last(mut data: impl Read, bytes: usize) -> Result<Vec<u8>, String> {
    let (mut kept, mut chunk) =
        (memory::list(VOXELS, 2 * bytes.max(1 << 20) + CHUNK), vec![0; CHUNK]);
    loop {
        let read = data.read(&mut chunk).map_err(|e| format!("unreadable voxels: {e}"))?;
        kept.extend_from_slice(&chunk[..read]);
        if read == 0 || kept.len() / 2 > bytes.max(1 << 20) {
            kept.drain(..kept.len().saturating_sub(bytes));
        }
        if read == 0 {
            return if kept.len() == bytes {
                Ok(kept)
            } else {
                Err(format!("voxels are missing: found {} of {bytes} bytes", kept.len()))
            };
        }
    }
}

/// Voxels written as text, as bytes of their type.
fn numbers(mut reader: impl Read, element: &str, bytes: usize) -> Result<Vec<u8>, String> {
    let mut text = vec![];
    // No number takes more bytes than this.
    let most = (bytes as u64).saturating_mul(64).saturating_add(4096);
    memory::read(VOXELS, reader.by_ref().take(most), &mut text)
        .map_err(|e| format!("unreadable text: {e}"))?;
    let text = String::from_utf8(text).map_err(|_| "unreadable text: it is not UTF-8")?;
    let mut raw = memory::list(VOXELS, bytes);
    for word in text.split(|c: char| c.is_whitespace() || c == ',').filter(|w| !w.is_empty()) {
        macro_rules! of {
            ($t:ty) => {
                word.parse::<$t>().map(|v| raw.extend(v.to_le_bytes())).is_ok()
            };
        }
        let read = match element {
            "int8" => of!(i8),
            "uint8" => of!(u8),
            "int16" => of!(i16),
            "uint16" => of!(u16),
            "int32" => of!(i32),
            "uint32" => of!(u32),
            "int64" => of!(i64),
            "uint64" => of!(u64),
            "float32" => of!(f32),
            _ => of!(f64),
        };
        if !read {
            return Err(format!("its voxels contain '{word}', which is not a valid {element}"));
        }
        if raw.len() == bytes {
            return Ok(raw);
        }
    }
    Err(format!("voxels are missing: found {} of {bytes} bytes", raw.len()))
}

/// The affine in RAS mm.
fn place(
    header: &Header,
    directions: &[Option<Vec<f64>>],
    spatial: &[usize],
    warnings: &mut Vec<String>,
) -> Result<Affine, String> {
    let unit = |key: &str, text: &str| {
        millimetres(text).ok_or_else(|| {
            format!("its '{key}' has '{text}', expected a unit of length, such as mm")
        })
    };
    let mut affine = Affine::from_spacing([1.0; 3]);
    let spacings: Vec<Option<f64>> = header
        .get("spacings")
        .map_or(vec![], |s| s.split_whitespace().map(|n| n.parse().ok()).collect());
    let axis_units = header.get("units").map(quoted).unwrap_or_default();
    for (a, &axis) in spatial.iter().enumerate() {
        match directions.get(axis).and_then(Option::as_ref) {
            Some(d) => (0..3).for_each(|r| affine.0[r][a] = d.get(r).copied().unwrap_or(0.0)),
            None => {
                let step =
                    spacings.get(axis).copied().flatten().filter(|s| s.is_finite() && *s != 0.0);
                let scale = axis_units
                    .get(axis)
                    .filter(|_| step.is_some())
                    .map_or(Ok(1.0), |u| unit("units", u))?;
                affine.0[a][a] = step.unwrap_or(1.0).abs() * scale;
            }
        }
    }
    if let Some(origin) = header.get("space origin") {
        let origin = vector(origin).ok_or_else(|| {
            format!("its 'space origin' is '{origin}', expected numbers such as (0,0,0)")
        })?;
        (0..3).for_each(|r| affine.0[r][3] = origin.get(r).copied().unwrap_or(0.0));
    }
    let space = header.get("space").map(str::to_lowercase).unwrap_or_default();
    let flips = match space.strip_suffix("-time").unwrap_or(&space) {
        "left-posterior-superior" | "lps" | "lpst" => [true, true, false],
        "left-anterior-superior" | "las" | "last" => [true, false, false],
        "right-anterior-superior" | "ras" | "rast" => [false; 3],
        "" if header.get("space dimension") == Some("4") => {
            warnings.push("it names no anatomical space: LPS is assumed, as in four-dimensional images of ITK".into());
            [true, true, false]
        }
        "" | "scanner-xyz" | "3d-right-handed" | "3d-left-handed" => {
            warnings.push("it names no anatomical space: RAS is assumed".into());
            [false; 3]
        }
        other => return Err(format!("its 'space' is '{other}', which is not supported")),
    };
    let units = header.get("space units").map(quoted).unwrap_or_default();
    for (r, (row, flip)) in affine.0.iter_mut().zip(flips).enumerate() {
        let scale = units.get(r).map_or(Ok(1.0), |u| unit("space units", u))?;
        if scale != 1.0 && units[..r].iter().all(|u| *u != units[r]) {
            warnings.push(format!("lengths are in '{}', read as mm", units[r]));
        }
        row.iter_mut().for_each(|v| *v *= if flip { -scale } else { scale });
    }
    Ok(affine)
}
