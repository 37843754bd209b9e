//! MetaImage files as ITK writes them: header and voxels in one file (`.mha`) or apart (`.mhd` with
//! `.raw` or `.zraw`, in one file or several), scalar volumes, plain or zlib-compressed.
//!
//! Their world is LPS; ours is RAS. A mask is written with the exact header lines of its image that
//! say where voxels are, so that rounding does not move it.

use super::pack::{Body, Zlib};
use super::{
    Affine, Array, Contents, Description, Element, Grid, VOXELS, VOXELS_ELSEWHERE, Volume,
    VolumeError, Which, detached, open, to_file_order, within_memory,
};
use crate::input::{DEFLATE_LIMIT, Input, Kind, no_image, recognise};
use crate::memory;
use crate::output::{Pending, write_bytes};
use flate2::read::ZlibDecoder;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

/// The most bytes of header that are read in search of its end.
const HEADER_LIMIT: usize = 1 << 16;

/// The header's names for the directions of the axes, one row per axis; for the position of the
/// first voxel; for the distances between voxels.
const DIRECTIONS: [&str; 3] = ["TransformMatrix", "Rotation", "Orientation"];
const ORIGINS: [&str; 3] = ["Offset", "Position", "Origin"];
const SPACINGS: [&str; 2] = ["ElementSpacing", "ElementSize"];

/// Other header fields about the place of the image.
const REMARKS: [&str; 2] = ["CenterOfRotation", "AnatomicalOrientation"];

/// Whether a line says where voxels are: a mask copies it.
fn is_geometry(key: &str) -> bool {
    [&DIRECTIONS[..], &ORIGINS, &SPACINGS, &REMARKS].concat().contains(&key)
}

/// The header: keys with their values, in the file's order.
pub(super) struct Header(Vec<(String, String)>);

impl Header {
    /// Splits a file into its header and what follows.
    fn split(mut rest: &[u8]) -> Result<(Header, &[u8]), String> {
        let mut lines = vec![];
        let mut read = 0;
        loop {
            let within = &rest[..rest.len().min(HEADER_LIMIT.saturating_sub(read))];
            // The last line of a separate header may have no line end.
            let last = (!within.is_empty() && within.len() == rest.len()).then_some(within.len());
            let end = within
                .iter()
                .position(|b| *b == b'\n')
                .or(last)
                .ok_or("not a MetaImage file: its header has no 'ElementDataFile'")?;
            let line = String::from_utf8_lossy(&within[..end]).into_owned();
            rest = rest.get(end + 1..).unwrap_or_default();
            read += end + 1;
            let odd = || format!("not a MetaImage file: its header has a line '{}'", line.trim());
            let (key, value) = line.split_once('=').ok_or_else(odd)?;
            lines.push((key.trim().to_string(), value.trim().to_string()));
            if key.trim() == "ElementDataFile" {
                return Ok((Header(lines), rest));
            }
        }
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    fn need(&self, key: &str) -> Result<&str, String> {
        self.get(key).ok_or_else(|| format!("its header has no '{key}'"))
    }

    fn says(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| value.starts_with(['T', 't', '1', 'Y', 'y']))
    }

    /// The numbers of the first of these keys that is present.
    fn numbers(&self, keys: &[&str], otherwise: Vec<f64>) -> Result<Vec<f64>, String> {
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, self.get(key)?))) else {
            return Ok(otherwise);
        };
        let numbers: Option<Vec<f64>> = value
            .split_whitespace()
            .map(|n| n.parse().ok().filter(|v: &f64| v.is_finite()))
            .collect();
        let numbers = numbers.filter(|n| n.len() == otherwise.len());
        numbers.ok_or_else(|| {
            format!("its '{key}' is '{value}', expected {} numbers", otherwise.len())
        })
    }

    /// The sizes of the three axes in space, and the number of volumes.
    fn size(&self) -> Result<([usize; 3], usize), String> {
        let text = self.need("DimSize")?;
        let sizes: Option<Vec<usize>> =
            text.split_whitespace().map(|n| n.parse().ok().filter(|n| *n > 0)).collect();
        let dimensions = self.need("NDims")?;
        let axes = dimensions.parse::<usize>().ok().filter(|n| (2..=4).contains(n));
        let axes = axes.ok_or_else(|| format!("its 'NDims' is {dimensions}, expected 2 to 4"))?;
        let sizes = sizes.filter(|s| s.len() == axes);
        let sizes = sizes.ok_or_else(|| {
            format!("its 'DimSize' is '{text}', expected {axes} numbers, 1 or more")
        })?;
        let at = |a: usize| sizes.get(a).copied().unwrap_or(1);
        Ok(([at(0), at(1), at(2)], at(3)))
    }

    /// The element type, and whether its bytes are in big-endian order.
    fn element(&self) -> Result<(Element, bool), String> {
        if let Some(channels) = self.get("ElementNumberOfChannels").filter(|n| *n != "1") {
            return Err(format!("its 'ElementNumberOfChannels' is {channels}, expected 1"));
        }
        if self.get("BinaryData").is_some() && !self.says("BinaryData") {
            return Err("its 'BinaryData' is False: voxels written as text are not read".into());
        }
        let big = self.says("BinaryDataByteOrderMSB") || self.says("ElementByteOrderMSB");
        let kind = self.need("ElementType")?;
        let element = match kind {
            "MET_UCHAR" => Element::Uint8,
            "MET_CHAR" => Element::Int8,
            "MET_USHORT" => Element::Uint16,
            "MET_SHORT" => Element::Int16,
            "MET_UINT" | "MET_ULONG" => Element::Uint32,
            "MET_INT" | "MET_LONG" => Element::Int32,
            "MET_ULONG_LONG" => Element::Uint64,
            "MET_LONG_LONG" => Element::Int64,
            "MET_FLOAT" => Element::Float32,
            "MET_DOUBLE" => Element::Float64,
            _ => {
                return Err(format!(
                    "its 'ElementType' is {kind}, expected a scalar integer or float type"
                ));
            }
        };
        Ok((element, big))
    }

    /// The bytes of all voxels.
    fn needed(&self) -> Result<usize, String> {
        let ((size, volumes), (element, _)) = (self.size()?, self.element()?);
        element.bytes_of(size, volumes)
    }

    /// From voxel index to RAS mm.
    fn affine(&self) -> Result<Affine, String> {
        // With more or fewer than three axes, the spatial ones count.
        let axes = self.need("NDims")?.parse::<usize>().unwrap_or(3);
        let identity =
            |n: usize| (0..n * n).map(|at| f64::from(at % (n + 1) == 0)).collect::<Vec<_>>();
        let (rows, first) =
            (self.numbers(&DIRECTIONS, identity(axes))?, self.numbers(&ORIGINS, vec![0.0; axes])?);
        let steps = self.numbers(&SPACINGS, vec![1.0; axes])?;
        let directions: [f64; 9] = std::array::from_fn(|at| match (at / 3, at % 3) {
            (axis, along) if axis < axes && along < axes => rows[axis * axes + along],
            (axis, along) => f64::from(axis == along),
        });
        let unit = match self.get("DistanceUnits") {
            None | Some("mm" | "") => 1.0,
            Some("um") => 1e-3,
            Some("cm") => 10.0,
            Some(other) => {
                return Err(format!("its 'DistanceUnits' is '{other}', expected um, mm or cm"));
            }
        };
        let or = |list: &[f64], usual: f64| -> [f64; 3] {
            std::array::from_fn(|a| list.get(a).copied().unwrap_or(usual))
        };
        let (origin, spacing) = (or(&first, 0.0), or(&steps, 1.0));
        // From left and posterior to right and anterior.
        let sign = [-1.0, -1.0, 1.0];
        let row = |r: usize| {
            let step = |axis: usize| sign[r] * directions[3 * axis + r] * spacing[axis];
            [step(0), step(1), step(2), sign[r] * origin[r]].map(|v| v * unit)
        };
        let affine = Affine([row(0), row(1), row(2)]);
        if affine.is_regular() {
            Ok(affine)
        } else {
            Err("its directions and spacing do not span three dimensions".into())
        }
    }

    /// The bytes of the voxels: `rest`, which follows the header, or those in the files that it
    /// names.
    fn voxels(&self, path: &Path, mut rest: &[u8], needed: usize) -> Result<Vec<u8>, String> {
        let named = self.need("ElementDataFile")?;
        if named == "LOCAL" {
            return self.unpacked(self.after_skip(rest, needed)?, needed);
        }
        let mut list = vec![];
        while let (true, Some(end)) =
            (named.starts_with("LIST"), rest.iter().position(|b| *b == b'\n'))
        {
            list.push(String::from_utf8_lossy(&rest[..end]).into_owned());
            rest = &rest[end + 1..];
        }
        if named.starts_with("LIST") {
            list.push(String::from_utf8_lossy(rest).into_owned());
        }
        detached::voxels(
            path,
            named,
            list.iter().map(String::as_str),
            needed,
            |mut file, needed| {
                let mut bytes = vec![];
                memory::read(VOXELS, &mut file, &mut bytes).map_err(|e| e.to_string())?;
                self.after_skip(&bytes, needed).and_then(|b| self.unpacked(b, needed))
            },
        )
    }

    /// The bytes after those to be skipped; with `HeaderSize = -1`, the last ones.
    fn after_skip<'a>(&self, bytes: &'a [u8], needed: usize) -> Result<&'a [u8], String> {
        match self.get("HeaderSize") {
            None | Some("0") => Ok(bytes),
            Some("-1") => Ok(&bytes[bytes.len().saturating_sub(needed)..]),
            Some(text) => {
                let skip = text.parse::<usize>().map_err(|_| {
                    format!("its 'HeaderSize' is '{text}', expected a number of bytes, or -1")
                })?;
                bytes.get(skip..).ok_or_else(|| {
                    format!(
                        "its 'HeaderSize' is {skip}, more than the {} bytes of the file",
                        bytes.len()
                    )
                })
            }
        }
    }

    fn unpacked(&self, bytes: &[u8], needed: usize) -> Result<Vec<u8>, String> {
        if !self.says("CompressedData") {
            let missing = || format!("voxels are missing: found {} of {needed} bytes", bytes.len());
            return Ok(memory::copied(VOXELS, bytes.get(..needed).ok_or_else(missing)?));
        }
        if needed as u64 > (bytes.len() as u64).saturating_mul(DEFLATE_LIMIT) {
            return Err(format!(
                "shorter than its header says: {needed} bytes of voxels are needed, found {} compressed bytes",
                bytes.len()
            ));
        }
        let mut voxels = memory::list(VOXELS, needed.saturating_add(1));
        // One byte more, so that the end, and with it the checksum, is reached.
        let read = ZlibDecoder::new(bytes).take(needed as u64 + 1).read_to_end(&mut voxels);
        read.map_err(|e| format!("truncated or corrupt voxels: {e}"))?;
        if voxels.len() != needed {
            return Err(format!(
                "its voxels decompress to {} bytes or more, expected {needed}",
                voxels.len()
            ));
        }
        Ok(voxels)
    }
}

/// A scan from a MetaImage file, with the header lines that a mask like it repeats.
pub struct Image {
    /// The image on its own grid.
    pub volume: Arc<Volume>,
    /// What a mask states about its place.
    header: Header,
}

/// Reads a MetaImage file of one volume, so that [`write_mask`] can write masks like it. To read
/// one only as a scan, use [`Volume::read`].
///
/// # Errors
/// The file cannot be read, has another format, or is damaged.
pub fn read(path: &Path) -> Result<Image, VolumeError> {
    let fail = |e: String| VolumeError::new(path, e);
    let input = open(path)?;
    if recognise(input.head()) != Some(Kind::MetaImage) {
        return Err(fail(no_image(input.head())));
    }
    let (header, contents) = within_memory(path, || whole(path, input, Which::One(None)))?;
    Ok(Image { volume: Arc::new(contents.image().map_err(fail)?), header })
}

/// The contents of an open file.
pub(super) fn contents(path: &Path, input: Input, which: Which) -> Result<Contents, VolumeError> {
    whole(path, input, which).map(|w| w.1)
}

fn whole(path: &Path, mut input: Input, which: Which) -> Result<(Header, Contents), VolumeError> {
    let fail = |e: String| VolumeError::new(path, e);
    let mut bytes = vec![];
    memory::read(VOXELS, input.by_ref().take(HEADER_LIMIT as u64), &mut bytes)
        .map_err(|e| fail(e.to_string()))?;
    // No more is read than the header requires, plus what an incompressible stream may add.
    let (header, _) = Header::split(&bytes).map_err(fail)?;
    if input.is_alone() && header.get("ElementDataFile") != Some("LOCAL") {
        return Err(fail(VOXELS_ELSEWHERE.into()));
    }
    let skip = header.get("HeaderSize").and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
    let most = header.needed().map_err(fail)? as u64;
    let most = if header.get("HeaderSize") == Some("-1") {
        u64::MAX
    } else {
        most.saturating_add(most / 100 + (1 << 20)).saturating_add(skip)
    };
    memory::read(VOXELS, input.by_ref().take(most), &mut bytes).map_err(|e| fail(e.to_string()))?;
    let (header, mut contents) = parse(path, &bytes, which).map_err(fail)?;
    contents.warnings.extend(input.warning().map(str::to_string));
    Ok((header, contents))
}

fn parse(path: &Path, bytes: &[u8], which: Which) -> Result<(Header, Contents), String> {
    let (header, rest) = Header::split(bytes)?;
    let ((size, volumes), (element, big), affine) =
        (header.size()?, header.element()?, header.affine()?);
    let name = element.name();
    let pick = which.pick(volumes, size)?;
    let needed = header.needed()?;
    let mut raw = header.voxels(path, rest, needed)?;
    element.to_native(&mut raw, big);
    if volumes > 1 {
        let one = needed / volumes;
        raw = memory::copied(VOXELS, &raw[pick * one..][..one]);
    }
    let array = Array::of_bytes(raw, element, size, None);
    let grid = Grid { size, affine };
    let description = Description {
        format: "MetaImage",
        affine_from: "TransformMatrix",
        volumes,
        ..Description::of_new(&grid, name)
    };
    Ok((
        header,
        Contents { grid, volumes: vec![array], segments: vec![], description, warnings: vec![] },
    ))
}

/// Writes a file of voxels in a file's order, with the lines of `header` that place it, or with
/// those of a grid.
pub(super) fn put(
    to: &mut impl Write,
    grid: &Grid,
    header: Option<&Header>,
    element: Element,
    voxels: Body,
) -> std::io::Result<()> {
    let packed = Zlib::of(voxels)?;
    to.write_all(head(grid, header, element, packed.len(), "LOCAL")?.as_bytes())?;
    packed.write(to)
}

/// Whether a header can name a file beside it in such a way that every reader finds that one: none
/// takes the name for a pattern or a list, or truncates it.
pub(super) fn can_be_named(file: &Path) -> bool {
    let name = file.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| {
        !name.starts_with("LIST")
            && !name.contains('%')
            && !name.contains(char::is_control)
            && name.trim() == name
    })
}

/// The header of voxels that are packed in a file, of `length` bytes, or after the header itself
/// (`LOCAL`).
pub(super) fn head(
    grid: &Grid,
    header: Option<&Header>,
    element: Element,
    packed: usize,
    file: &str,
) -> std::io::Result<String> {
    let size = grid.size;
    let mut text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = True\n".to_string();
    text += &format!("CompressedDataSize = {packed}\n");
    // Lines for other axes or units do not apply to three axes in mm.
    match header
        .filter(|h| h.get("NDims") == Some("3") && h.get("DistanceUnits").is_none_or(|u| u == "mm"))
    {
        Some(header) => {
            let geometry = header.0.iter().filter(|(key, _)| is_geometry(key));
            geometry.for_each(|(key, value)| text += &format!("{key} = {value}\n"));
        }
        None => {
            let (affine, spacing) = (&grid.affine, grid.spacing());
            let sign = [-1.0, -1.0, 1.0];
            let line = |values: &[f64]| {
                values.iter().map(|v| format!("{}", v + 0.0)).collect::<Vec<_>>().join(" ")
            };
            let directions: Vec<f64> = (0..9)
                .map(|at| sign[at % 3] * affine.0[at % 3][at / 3] / spacing[at / 3])
                .collect();
            let origin: Vec<f64> = (0..3).map(|r| sign[r] * affine.0[r][3]).collect();
            text += &format!(
                "TransformMatrix = {}\nOffset = {}\nElementSpacing = {}\n",
                line(&directions),
                line(&origin),
                line(&spacing)
            );
        }
    }
    let kind = match element {
        Element::Uint8 => "MET_UCHAR",
        Element::Int16 => "MET_SHORT",
        Element::Uint16 => "MET_USHORT",
        Element::Float32 => "MET_FLOAT",
        other => {
            return Err(std::io::Error::other(format!(
                "voxels of type {} cannot be written",
                other.name()
            )));
        }
    };
    text += &format!(
        "DimSize = {} {} {}\nElementType = {kind}\nElementDataFile = {file}\n",
        size[0], size[1], size[2]
    );
    Ok(text)
}

/// The file of a mask `[i][j][k]` on an image's grid.
fn mask_file(image: &Image, mask: &[u8]) -> Result<Vec<u8>, String> {
    let (grid, size) = (&image.volume.grid, image.volume.grid.size);
    if mask.len() != grid.voxels() {
        return Err(format!("a mask of {} voxels does not fit an image of {size:?}", mask.len()));
    }
    let mut file = vec![];
    let voxels = to_file_order(mask, size);
    put(&mut file, grid, Some(&image.header), Element::Uint8, Body::of(&voxels))
        .map_err(|e| e.to_string())?;
    // What is written can be read, and is in the image's place.
    let (_, written) = parse(Path::new("the mask"), &file, Which::One(None))
        .map_err(|e| format!("the mask would be incomplete: {e}"))?;
    match written.grid.size == size && written.grid.affine.distance(&grid.affine, size) < 1e-3 {
        true => Ok(file),
        false => Err("the mask would not be aligned with its image".into()),
    }
}

/// Writes a mask `[i][j][k]` as uint8 on an image's grid, with the lines of the image's header that
/// say where voxels are. It appears when the result is committed.
///
/// # Errors
/// There are not as many values as voxels; memory is refused; the file cannot be written.
pub fn write_mask(path: &Path, image: &Image, mask: &[u8]) -> Result<Pending, VolumeError> {
    let fail = |e: std::io::Error| VolumeError::new(path, e.to_string());
    let bytes = mask_file(image, mask).map_err(|e| VolumeError::new(path, e))?;
    write_bytes(path, &bytes).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ITK's header of an image whose i runs to posterior and whose j runs to the right.
    const HEADER: &str = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n\
        TransformMatrix = 0 1 0 -1 0 0 0 0 1\nOffset = 10 20 30\nCenterOfRotation = 0 0 0\nAnatomicalOrientation = ALI\n\
        ElementSpacing = 2 3 4\nDimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n";

    fn whole_image(bytes: &[u8]) -> Result<Image, String> {
        let (header, contents) = parse(Path::new("a.mha"), bytes, Which::One(None))?;
        Ok(Image { volume: Arc::new(contents.image()?), header })
    }

    fn file(header: &str) -> Vec<u8> {
        let voxels = (0i16..24).flat_map(|v| (v - 5).to_le_bytes());
        header.bytes().chain(voxels).collect()
    }

    #[test]
    fn voxels_are_where_itk_puts_them() {
        let image = whole_image(&file(HEADER)).unwrap();
        let volume = &image.volume;
        assert_eq!(
            (volume.grid.size, volume.at([0, 0, 0]), volume.at([1, 0, 0]), volume.at([3, 2, 1])),
            ([4, 3, 2], -5.0, -4.0, 18.0)
        );
        // ITK: voxel [1, 0, 0] at (10, 22, 30) in LPS, [0, 1, 0] at (7, 20, 30).
        assert_eq!(volume.grid.affine.apply([1.0, 0.0, 0.0]), [-10.0, -22.0, 30.0]);
        assert_eq!(volume.grid.affine.apply([0.0, 1.0, 0.0]), [-7.0, -20.0, 30.0]);
        assert_eq!((volume.description.element, volume.description.whole), ("int16", true));
        let big = HEADER.replace("MSB = False", "MSB = True");
        assert_eq!(
            whole_image(&file(&big)).unwrap().volume.at([0, 0, 0]),
            i16::from_be_bytes((-5i16).to_le_bytes()) as f32
        );
    }

    #[test]
    fn a_mask_has_its_images_place() {
        let own = whole_image(&file(HEADER)).unwrap();
        let mask: Vec<u8> = (0..24).map(|v| u8::from(v % 5 == 0)).collect();
        let bytes = mask_file(&own, &mask).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        for line in HEADER.lines().filter(|l| {
            ["Tr", "Of", "Ce", "An", "ElementS", "Dim"].iter().any(|s| l.starts_with(s))
        }) {
            assert!(text.contains(&format!("{line}\n")), "{line}");
        }
        let read = whole_image(&bytes).unwrap().volume;
        assert_eq!((read.grid, read.description.element), (own.volume.grid, "uint8"));
        assert_eq!(read.values().iter().map(|v| *v as u8).collect::<Vec<_>>(), mask);
        assert!(mask_file(&own, &mask[1..]).is_err());
        // An image of four axes, or in other units: its mask has three, in mm.
        let four = HEADER
            .replace("NDims = 3", "NDims = 4")
            .replace("= 4 3 2", "= 4 3 2 1")
            .replace("= 2 3 4", "= 2 3 4 1")
            .replace("= 10 20 30", "= 10 20 30 0");
        let four = four
            .replace("0 1 0 -1 0 0 0 0 1", "0 1 0 0 -1 0 0 0 0 0 1 0 0 0 0 1")
            .replace("CenterOfRotation = 0 0 0\n", "");
        for (header, scale) in
            [(four, 1.0), (HEADER.replace("NDims", "DistanceUnits = cm\nNDims"), 10.0)]
        {
            let other = whole_image(&file(&header)).unwrap();
            assert_eq!(
                other.volume.grid.affine,
                Affine(own.volume.grid.affine.0.map(|r| r.map(|v| scale * v)))
            );
            let read = whole_image(&mask_file(&other, &mask).unwrap()).unwrap().volume;
            assert!(read.grid.affine.distance(&other.volume.grid.affine, [4, 3, 2]) < 1e-9);
        }
        for at in 0..bytes.len() {
            assert!(whole_image(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_odd_is_named() {
        let message = |from: &str, to: &str| {
            whole_image(&file(&HEADER.replace(from, to))).err().unwrap_or_default()
        };
        assert!(message("MET_SHORT", "MET_STRING").contains("'ElementType' is MET_STRING"));
        assert!(message("MET_SHORT", "MET_DOUBLE").contains("voxels are missing: found 48 of 192"));
        assert!(message("NDims = 3", "NDims = 5").contains("'NDims' is 5"));
        assert!(message("DimSize = 4 3 2", "DimSize = 4 3").contains("'DimSize'"));
        assert!(
            message("DimSize = 4 3 2", "DimSize = 4294967296 4294967296 4294967296")
                .contains("can be addressed")
        );
        assert!(message("Spacing = 2 3 4", "Spacing = 2 0 4").contains("span three dimensions"));
        assert!(message("Offset = 10", "Offset = x").contains("'Offset' is 'x 20 30'"));
        assert!(message("= LOCAL", "= other.raw").contains("other.raw: No such file"));
        assert!(message("CompressedData = False", "CompressedData = True").contains("corrupt"));
        assert!(
            message("ElementType", "ElementNumberOfChannels = 3\nElementType")
                .contains("expected 1")
        );
        assert!(whole_image(&[0; 100]).is_err() && whole_image(b"a = b\n").is_err());
        // Neither directions nor origin nor spacing.
        let bare = ["TransformMatrix", "Offset", "ElementSpacing"]
            .iter()
            .fold(HEADER.to_string(), |h, key| h.replace(key, "Comment"));
        assert_eq!(
            whole_image(&file(&bare)).unwrap().volume.grid.affine.0[0],
            [-1.0, 0.0, 0.0, -0.0]
        );
    }
}
