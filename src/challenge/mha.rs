//! MetaImage files (`.mha`), header and voxels in one file, as ITK writes them: scalar volumes, plain or zlib-compressed.
//!
//! Their world is LPS; ours is RAS. A mask is written with the very lines of its image's header that say where voxels lie, so that no
//! rounding moves it.

use super::npy::DType;
use super::{DEFLATE_LIMIT, make_finite, to_file_order};
use crate::output::Pending;
use crate::volume::{Affine, Description, Grid, Volume, VolumeError, reorder};
use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

/// Bytes of header that are read before giving up on its end.
const HEADER_LIMIT: usize = 1 << 16;

/// What a header calls the directions of the axes, a row an axis; the position of the first voxel; the distances between voxels.
const DIRECTIONS: [&str; 3] = ["TransformMatrix", "Rotation", "Orientation"];
const ORIGINS: [&str; 3] = ["Offset", "Position", "Origin"];
const SPACINGS: [&str; 2] = ["ElementSpacing", "ElementSize"];

/// What else a header says of the place of its image.
const REMARKS: [&str; 2] = ["CenterOfRotation", "AnatomicalOrientation"];

/// Whether a line says where voxels lie: a mask takes it over.
fn is_geometry(key: &str) -> bool {
    [&DIRECTIONS[..], &ORIGINS, &SPACINGS, &REMARKS].concat().contains(&key)
}

/// The header: keys with their values, in the file's order.
struct Header(Vec<(String, String)>);

impl Header {
    /// Splits a file into its header and what follows.
    fn split(mut rest: &[u8]) -> Result<(Header, &[u8]), String> {
        let mut lines = vec![];
        let mut read = 0;
        loop {
            let within = &rest[..rest.len().min(HEADER_LIMIT - read)];
            let end = within.iter().position(|b| *b == b'\n').ok_or("not a MetaImage file: its header has no 'ElementDataFile'")?;
            let line = String::from_utf8_lossy(&within[..end]).into_owned();
            rest = &rest[end + 1..];
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

    /// The numbers of the first of these keys that there is.
    fn numbers<const N: usize>(&self, keys: &[&str], otherwise: [f64; N]) -> Result<[f64; N], String> {
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, self.get(key)?))) else { return Ok(otherwise) };
        let numbers: Option<Vec<f64>> = value.split_whitespace().map(|n| n.parse().ok().filter(|v: &f64| v.is_finite())).collect();
        let numbers = numbers.and_then(|n| n.try_into().ok());
        numbers.ok_or_else(|| format!("its '{key}' is '{value}', expected {N} numbers"))
    }

    fn size(&self) -> Result<[usize; 3], String> {
        let dimensions = self.need("NDims")?;
        if dimensions != "3" {
            return Err(format!("its 'NDims' is {dimensions}, expected 3"));
        }
        let text = self.need("DimSize")?;
        let sizes: Option<Vec<usize>> = text.split_whitespace().map(|n| n.parse().ok().filter(|n| *n > 0)).collect();
        let sizes = sizes.and_then(|s| s.try_into().ok());
        sizes.ok_or_else(|| format!("its 'DimSize' is '{text}', expected three numbers from 1 on"))
    }

    fn element(&self) -> Result<DType, String> {
        if let Some(channels) = self.get("ElementNumberOfChannels").filter(|n| *n != "1") {
            return Err(format!("its 'ElementNumberOfChannels' is {channels}, expected 1"));
        }
        let big = if self.says("BinaryDataByteOrderMSB") || self.says("ElementByteOrderMSB") { ">" } else { "<" };
        let element = self.need("ElementType")?;
        let name = match element {
            "MET_UCHAR" => "u1",
            "MET_CHAR" => "i1",
            "MET_USHORT" => "u2",
            "MET_SHORT" => "i2",
            "MET_UINT" => "u4",
            "MET_INT" => "i4",
            "MET_ULONG_LONG" => "u8",
            "MET_LONG_LONG" => "i8",
            "MET_FLOAT" => "f4",
            "MET_DOUBLE" => "f8",
            _ => return Err(format!("its 'ElementType' is {element}, expected a scalar integer or float type")),
        };
        DType::parse(&format!("{big}{name}"))
    }

    /// From voxel index to RAS mm.
    fn affine(&self) -> Result<Affine, String> {
        let directions = self.numbers(&DIRECTIONS, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])?;
        let (origin, spacing) = (self.numbers(&ORIGINS, [0.0; 3])?, self.numbers(&SPACINGS, [1.0; 3])?);
        // From left and posterior to right and anterior.
        let sign = [-1.0, -1.0, 1.0];
        let row = |r: usize| {
            let step = |axis: usize| sign[r] * directions[3 * axis + r] * spacing[axis];
            [step(0), step(1), step(2), sign[r] * origin[r]]
        };
        let affine = Affine([row(0), row(1), row(2)]);
        if affine.is_regular() { Ok(affine) } else { Err("its directions and spacing do not span space".into()) }
    }

    /// The bytes of the voxels.
    fn voxels(&self, rest: &[u8], needed: usize) -> Result<Vec<u8>, String> {
        let place = self.need("ElementDataFile")?;
        if place != "LOCAL" {
            return Err(format!("its voxels are in '{place}', expected them in the same file (LOCAL)"));
        }
        if !self.says("CompressedData") {
            let missing = || format!("voxels are missing: {} of {needed} bytes are there", rest.len());
            return Ok(rest.get(..needed).ok_or_else(missing)?.to_vec());
        }
        if needed as u64 > (rest.len() as u64).saturating_mul(DEFLATE_LIMIT) {
            return Err(format!("shorter than its header says: {needed} bytes of voxels are needed, {} packed ones are there", rest.len()));
        }
        let mut voxels = vec![];
        // One byte more, so that the end is reached and with it the checksum.
        let read = ZlibDecoder::new(rest).take(needed as u64 + 1).read_to_end(&mut voxels);
        read.map_err(|e| format!("truncated or corrupt voxels: {e}"))?;
        if voxels.len() != needed {
            return Err(format!("its voxels unpack to {} bytes or more, expected {needed}", voxels.len()));
        }
        Ok(voxels)
    }
}

/// A MetaImage file.
pub struct Image {
    /// The image on its own grid.
    pub volume: Arc<Volume>,
    /// What a mask says of its place.
    header: Header,
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Image, VolumeError> {
    let bytes = std::fs::read(path).map_err(|e| VolumeError::new(path, e.to_string()))?;
    parse(&bytes).map_err(|e| VolumeError::new(path, e))
}

fn parse(bytes: &[u8]) -> Result<Image, String> {
    let (header, rest) = Header::split(bytes)?;
    let (size, element, affine) = (header.size()?, header.element()?, header.affine()?);
    let needed = size.iter().try_fold(element.size(), |n, s| n.checked_mul(*s)).filter(|n| *n as u64 <= 1 << 50);
    let needed = needed.ok_or_else(|| format!("{size:?} voxels of {} are more bytes than can be addressed", element.name()))?;
    let raw = header.voxels(rest, needed)?;
    let mut values: Vec<f32> = raw.chunks_exact(element.size()).map(|v| element.number(v).unwrap_or_default() as f32).collect();
    drop(raw);
    let mut warnings = vec![];
    make_finite(&mut values, &mut warnings)?;
    let grid = Grid { size, affine };
    let description = Description::of_new(&grid, element.name());
    Ok(Image { volume: Arc::new(Volume { grid, data: reorder(&values, size), description, warnings }), header })
}

/// The file of a mask `[i][j][k]` on an image's grid.
fn mask_file(image: &Image, mask: &[u8]) -> Result<Vec<u8>, String> {
    let size = image.volume.grid.size;
    if mask.len() != image.volume.grid.voxels() {
        return Err(format!("a mask of {} voxels does not fit an image of {size:?}", mask.len()));
    }
    let mut encoder = ZlibEncoder::new(Vec::<u8>::new(), Compression::fast());
    let packed = encoder.write_all(&to_file_order(mask, size)).and_then(|()| encoder.finish()).map_err(|e| e.to_string())?;
    let mut text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = True\n".to_string();
    text += &format!("CompressedDataSize = {}\n", packed.len());
    let geometry = image.header.0.iter().filter(|(key, _)| is_geometry(key));
    geometry.for_each(|(key, value)| text += &format!("{key} = {value}\n"));
    text += &format!("DimSize = {} {} {}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n", size[0], size[1], size[2]);
    Ok([text.into_bytes(), packed].concat())
}

/// Writes a mask `[i][j][k]` as uint8 on an image's grid. It appears when the result is committed.
pub fn write_mask(path: &Path, image: &Image, mask: &[u8]) -> Result<Pending, VolumeError> {
    let fail = |e: std::io::Error| VolumeError::new(path, e.to_string());
    let bytes = mask_file(image, mask).map_err(|e| VolumeError::new(path, e))?;
    let pending = Pending::new(path).map_err(fail)?;
    std::fs::write(pending.path(), bytes).map_err(fail)?;
    Ok(pending)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As ITK writes an image whose i runs to posterior and whose j runs to the right.
    const HEADER: &str = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n\
        TransformMatrix = 0 1 0 -1 0 0 0 0 1\nOffset = 10 20 30\nCenterOfRotation = 0 0 0\nAnatomicalOrientation = ALI\n\
        ElementSpacing = 2 3 4\nDimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n";

    fn file(header: &str) -> Vec<u8> {
        let voxels = (0i16..24).flat_map(|v| (v - 5).to_le_bytes());
        header.bytes().chain(voxels).collect()
    }

    #[test]
    fn voxels_are_where_itk_puts_them() {
        let image = parse(&file(HEADER)).unwrap();
        let volume = &image.volume;
        assert_eq!((volume.grid.size, volume.at([0, 0, 0]), volume.at([1, 0, 0]), volume.at([3, 2, 1])), ([4, 3, 2], -5.0, -4.0, 18.0));
        // ITK: voxel [1, 0, 0] at (10, 22, 30) in LPS, [0, 1, 0] at (7, 20, 30).
        assert_eq!(volume.grid.affine.apply([1.0, 0.0, 0.0]), [-10.0, -22.0, 30.0]);
        assert_eq!(volume.grid.affine.apply([0.0, 1.0, 0.0]), [-7.0, -20.0, 30.0]);
        assert_eq!((volume.description.element, volume.description.whole), ("int16", true));
        let big = HEADER.replace("MSB = False", "MSB = True");
        assert_eq!(parse(&file(&big)).unwrap().volume.at([0, 0, 0]), i16::from_be_bytes((-5i16).to_le_bytes()) as f32);
    }

    #[test]
    fn a_mask_has_its_images_place() {
        let image = parse(&file(HEADER)).unwrap();
        let mask: Vec<u8> = (0..24).map(|v| u8::from(v % 5 == 0)).collect();
        let bytes = mask_file(&image, &mask).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        for line in HEADER.lines().filter(|l| ["Tr", "Of", "Ce", "An", "ElementS", "Dim"].iter().any(|s| l.starts_with(s))) {
            assert!(text.contains(&format!("{line}\n")), "{line}");
        }
        let read = parse(&bytes).unwrap().volume;
        assert_eq!((read.grid, read.description.element), (image.volume.grid, "uint8"));
        assert_eq!(read.data.iter().map(|v| *v as u8).collect::<Vec<_>>(), mask);
        assert!(mask_file(&image, &mask[1..]).is_err());
        for at in 0..bytes.len() {
            assert!(parse(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_odd_is_named() {
        let message = |from: &str, to: &str| parse(&file(&HEADER.replace(from, to))).err().unwrap_or_default();
        assert!(message("MET_SHORT", "MET_STRING").contains("'ElementType' is MET_STRING"));
        assert!(message("MET_SHORT", "MET_DOUBLE").contains("voxels are missing: 48 of 192"));
        assert!(message("NDims = 3", "NDims = 2").contains("'NDims' is 2"));
        assert!(message("DimSize = 4 3 2", "DimSize = 4 3").contains("'DimSize'"));
        assert!(message("DimSize = 4 3 2", "DimSize = 4294967296 4294967296 4294967296").contains("can be addressed"));
        assert!(message("Spacing = 2 3 4", "Spacing = 2 0 4").contains("span space"));
        assert!(message("Offset = 10", "Offset = x").contains("'Offset' is 'x 20 30'"));
        assert!(message("= LOCAL", "= other.raw").contains("'other.raw'"));
        assert!(message("CompressedData = False", "CompressedData = True").contains("corrupt"));
        assert!(message("ElementType", "ElementNumberOfChannels = 3\nElementType").contains("expected 1"));
        assert!(parse(&[0; 100]).is_err() && parse(b"a = b\n").is_err());
        // Neither directions nor origin nor spacing.
        let bare = ["TransformMatrix", "Offset", "ElementSpacing"].iter().fold(HEADER.to_string(), |h, key| h.replace(key, "Comment"));
        assert_eq!(parse(&file(&bare)).unwrap().volume.grid.affine.0[0], [-1.0, 0.0, 0.0, -0.0]);
    }
}
