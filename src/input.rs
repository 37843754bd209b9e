//! Input files: opened once, recognised by their content, unpacked if they are packed.

use crate::memory;
use crate::sync::locked;
use bzip2::bufread::BzDecoder;
use flate2::Crc;
use flate2::bufread::GzDecoder;
use flate2::read::DeflateDecoder;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use zip::{CompressionMethod, ZipArchive};

/// The number of bytes that are examined to recognise a file.
pub const HEAD: usize = 1024;

/// What a file is, by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// NIfTI-1 or -2, one file or the header of two.
    Nifti,
    /// NRRD.
    Nrrd,
    /// MetaImage.
    MetaImage,
    /// DICOM.
    Dicom,
    /// Tensors, such as a model of prism's.
    Safetensors,
    /// A format that prism does not read as an image: its name, and how to convert it to one that
    /// it reads.
    Foreign(&'static str, &'static str),
}

const TO_NIFTI: &str = "convert it to NIfTI, for example with nibabel or ITK-SNAP";
const NUMPY: &str =
    "it has no geometry: save it as NIfTI with nibabel, or pass the array to prism from Python";
const DICOM: &str = "convert the series to NIfTI, for example with 'dcm2niix -z y FOLDER'";
const NO_IMAGE: &str = "expected a scan or a label image (NIfTI, NRRD or MetaImage)";
const UNPACK: &str = "unpack it first";

/// Signatures at a file's beginning.
const SIGNATURES: [(&[u8], &str, &str); 24] = [
    (b"\x1f\x8b\x08", "packed by gzip", UNPACK),
    (b"BZh", "packed by bzip2", UNPACK),
    (b"\x93NUMPY", "a NumPy array (.npy)", NUMPY),
    (
        b"PK\x03\x04",
        "a ZIP archive, such as .npz, .zip or a PyTorch checkpoint",
        "unpack it, or save its image as NIfTI",
    ),
    (b"PK\x05\x06", "an empty ZIP archive", NO_IMAGE),
    (b"\x89PNG", "a PNG picture", NO_IMAGE),
    (b"\xff\xd8\xff", "a JPEG picture", NO_IMAGE),
    (b"GIF8", "a GIF picture", NO_IMAGE),
    (b"BM", "a BMP picture", NO_IMAGE),
    (b"II*\0", "a TIFF picture", TO_NIFTI),
    (b"MM\0*", "a TIFF picture", TO_NIFTI),
    (b"%PDF", "a PDF document", NO_IMAGE),
    (b"\x89HDF", "an HDF5 file, such as MINC 2 or a MATLAB 7.3 file", TO_NIFTI),
    (b"CDF\x01", "a NetCDF file, such as MINC 1", "convert it to NIfTI with mnc2nii"),
    (b"CDF\x02", "a NetCDF file, such as MINC 1", "convert it to NIfTI with mnc2nii"),
    (b"MATLAB 5.0", "a MATLAB file", TO_NIFTI),
    (b"# vtk DataFile", "a VTK file", TO_NIFTI),
    (b"<?xml", "an XML file, such as .vti or .mrml", TO_NIFTI),
    (b"# Amira", "an Amira mesh", TO_NIFTI),
    (b"# AmiraMesh", "an Amira mesh", TO_NIFTI),
    (b"\xfd7zXZ\0", "packed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (b"\x80\x02", "a pickle, such as an old PyTorch checkpoint", NO_IMAGE),
];

/// The kind of a file by its first bytes, unpacked, of which [`HEAD`] are enough; none if it is not
/// recognised.
pub fn recognise(head: &[u8]) -> Option<Kind> {
    let four = |at: usize| head.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok());
    let number = |at: usize| four(at).map(|b| [i32::from_le_bytes(b), i32::from_be_bytes(b)]);
    let is = |at: usize, value: i32| number(at).is_some_and(|n| n.contains(&value));
    if head.starts_with(b"NRRD") {
        return Some(Kind::Nrrd);
    }
    // Analyze 7.5 has NIfTI's length and nothing where NIfTI has its magic.
    if is(0, 348) && four(344).is_some_and(|m| m == [0; 4]) {
        return Some(Kind::Foreign(
            "Analyze 7.5",
            "it does not tell left from right: convert it to NIfTI with nibabel, and check the sides",
        ));
    }
    if is(0, 348) || is(0, 540) {
        return Some(Kind::Nifti);
    }
    if head.get(128..132) == Some(b"DICM") || is_bare_dicom(head) {
        return Some(Kind::Dicom);
    }
    if four(0) == Some([0, 0, 0, 1]) && four(20).is_some_and(|b| u32::from_be_bytes(b) <= 4) {
        return Some(Kind::Foreign(
            "a FreeSurfer volume (.mgh, .mgz)",
            "convert it with 'mri_convert FILE out.nii.gz'",
        ));
    }
    // Two letters are weak evidence: in a picture the next fields are 0.
    let is_word = |signature: &[u8]| signature == b"BM" && head.get(6..10) != Some(&[0; 4]);
    if let Some((_, name, out)) =
        SIGNATURES.iter().find(|(signature, ..)| head.starts_with(signature) && !is_word(signature))
    {
        return Some(Kind::Foreign(name, out));
    }
    if head.get(257..262) == Some(b"ustar") {
        return Some(Kind::Foreign("a tar archive", UNPACK));
    }
    if head.get(8) == Some(&b'{') && four(4) == Some([0; 4]) {
        return Some(Kind::Safetensors);
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let first = text.split(|b| *b == b'\n').next().unwrap_or(text);
    if let Some(at) = first.iter().position(|b| *b == b'=').filter(|_| first.is_ascii()) {
        let key = first[..at].trim_ascii();
        if [b"ObjectType".as_slice(), b"NDims", b"Comment", b"DimSize"].contains(&key) {
            return Some(Kind::MetaImage);
        }
    }
    if matches!(text.first(), Some(b'{' | b'[')) {
        return Some(Kind::Foreign("a JSON file", NO_IMAGE));
    }
    None
}

/// DICOM without its preamble begins with a group of the file or of the study, explicit or
/// implicit.
fn is_bare_dicom(head: &[u8]) -> bool {
    let plausible = |b: &[u8]| b[4..6].iter().all(u8::is_ascii_uppercase) || b[6..8] == [0, 0];
    (head.starts_with(&[2, 0, 0, 0])
        || head.starts_with(&[8, 0, 0, 0])
        || head.starts_with(&[8, 0, 5, 0]))
        && head.len() >= 8
        && plausible(head)
}

impl Kind {
    /// The kind of file, in words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Nifti => "a NIfTI image",
            Kind::Nrrd => "an NRRD image",
            Kind::MetaImage => "a MetaImage",
            Kind::Dicom => "a DICOM file",
            Kind::Safetensors => "tensors (.safetensors), such as a model",
            Kind::Foreign(name, _) => name,
        }
    }
}

/// The message for a file that is not an image.
pub(crate) fn no_image(head: &[u8]) -> String {
    match recognise(head) {
        Some(Kind::Foreign(name, out)) => format!("is {name}: {out}"),
        Some(Kind::Dicom) => format!("is {}: {DICOM}", Kind::Dicom.name()),
        Some(other) => format!("is {}: {NO_IMAGE}", other.name()),
        None if head.is_empty() => "is empty".into(),
        None => format!(
            "is not recognised: {NO_IMAGE}; it begins with the bytes {:02x?}",
            &head[..head.len().min(8)]
        ),
    }
}

/// Whether a file is a pipe, which has an end.
fn is_pipe(meta: &std::fs::Metadata) -> bool {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileTypeExt::is_fifo(&meta.file_type())
    }
    #[cfg(not(unix))]
    {
        let _ = meta;
        false
    }
}

/// How a file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// Not at all.
    Plain,
    /// By gzip.
    Gzip,
    /// By bzip2.
    Bzip2,
}

/// An open file, which is read once, from its beginning to its end, so that a pipe works as well.
pub struct Input {
    reader: Box<dyn Read>,
    head: Vec<u8>,
    /// How the file is packed; what is read is unpacked.
    pub packed: Packed,
    length: u64,
    behind: Arc<AtomicBool>,
    /// Whether it came without a folder, so that there are no files beside it.
    alone: bool,
}

/// An entry of a zip archive of `length` bytes, unpacked, in memory that messages call `purpose`.
/// The `zip` crate reads only the directory; an entry must have the length and the checksum that
/// the directory says.
///
/// # Errors
/// What is wrong with it, to be appended to its name.
pub(crate) fn zip_entry<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    length: u64,
    at: usize,
    purpose: &'static str,
) -> Result<Vec<u8>, String> {
    let entry = archive.by_index_raw(at).map_err(|e| format!("damaged: {e}"))?;
    let (method, size, packed, sum) =
        (entry.compression(), entry.size(), entry.compressed_size(), entry.crc32());
    if entry.encrypted() {
        return Err("is encrypted: unpack the archive first".into());
    }
    if packed > length || size > packed.saturating_mul(DEFLATE_LIMIT) {
        return Err(format!(
            "damaged: its directory claims {size} bytes packed into {packed}, in a file of {length}"
        ));
    }
    let mut bytes = memory::list(purpose, usize::try_from(size).unwrap_or(usize::MAX));
    let read = if method == CompressionMethod::STORE {
        entry.take(size).read_to_end(&mut bytes)
    } else if method == CompressionMethod::DEFLATE {
        DeflateDecoder::new(entry).take(size).read_to_end(&mut bytes)
    } else {
        let by = match method {
            CompressionMethod::DEFLATE64 => "Deflate64",
            CompressionMethod::BZIP2 => "bzip2",
            CompressionMethod::LZMA => "LZMA",
            CompressionMethod::ZSTD => "Zstandard",
            CompressionMethod::XZ => "XZ",
            _ => "an unsupported method",
        };
        return Err(format!("is compressed with {by}, expected stored or deflated"));
    };
    read.map_err(|e| format!("damaged: {e}"))?;
    if bytes.len() as u64 != size {
        return Err(format!("damaged: found {} of {size} bytes", bytes.len()));
    }
    if crc32(&bytes) != sum {
        return Err("damaged: its checksum is wrong".into());
    }
    Ok(bytes)
}

/// The checksum of zip archives.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// No deflate stream grows by more than this.
pub(crate) const DEFLATE_LIMIT: u64 = 1100;
/// No bzip2 stream grows by more than this: runs of runs shrink to almost nothing.
pub(crate) const BZIP2_LIMIT: u64 = 1 << 21;

/// What is said of an output that is an input.
pub(crate) const IS_INPUT: &str = "is an input: it would be overwritten";

/// Files that were read, by their places behind all links.
#[derive(Default)]
pub(crate) struct Files(BTreeSet<PathBuf>);

impl Files {
    /// Whether a path leads to one of them: by whatever spelling, by links, or by another of the
    /// file's own names (hard links, where the system tells them).
    pub(crate) fn hold(&self, path: &Path) -> bool {
        let Ok(at) = path.canonicalize() else { return false };
        let is_same = |id: (u64, u64)| self.0.iter().any(|file| identity(file) == Some(id));
        // Few files have several names: only for those all that was read is looked at again.
        self.0.contains(&at) || identity(&at).is_some_and(is_same)
    }
}

/// What all names of a file have in common; none for a file with one name alone.
fn identity(path: &Path) -> Option<(u64, u64)> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let meta = path.metadata().ok()?;
        (meta.is_file() && meta.nlink() > 1).then(|| (meta.dev(), meta.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Files that this process has read, where they are kept from being written over.
static READ: Mutex<Option<Files>> = Mutex::new(None);

thread_local! {
    /// Files that this thread has read within [`noting`].
    static NOTED: RefCell<Option<Files>> = const { RefCell::new(None) };
}

/// What work comes to that reads files on this thread, and which files those are.
pub(crate) fn noting<T>(work: impl FnOnce() -> T) -> (T, Files) {
    // Nothing is noted any more where the work panics, too.
    struct Before(Option<Files>);
    impl Drop for Before {
        fn drop(&mut self) {
            NOTED.set(self.0.take());
        }
    }
    let _before = Before(NOTED.replace(Some(Files::default())));
    let done = work();
    (done, NOTED.take().unwrap_or_default())
}

/// Keeps every file that is read from here on from being overwritten by this process: used by the
/// commands of the program, whose inputs may be a user's only copy.
#[cfg(feature = "cli")]
pub(crate) fn keep_inputs() {
    locked(&READ).get_or_insert_default();
}

/// Stops recording what is read: a process that overwrites nothing and reads for as long as it
/// lives would record it in vain.
#[cfg(feature = "serve")]
pub(crate) fn forget_inputs() {
    *locked(&READ) = None;
}

/// Records that a file is an input.
pub(crate) fn remember(path: &Path) {
    let Ok(path) = path.canonicalize() else { return };
    NOTED.with_borrow_mut(|noted| {
        if let Some(files) = noted {
            files.0.insert(path.clone());
        }
    });
    if let Some(read) = &mut *locked(&READ) {
        read.0.insert(path);
    }
}

/// Whether a file is one that was recorded, however its path is spelled.
pub(crate) fn was_read(path: &Path) -> bool {
    let read = locked(&READ);
    read.as_ref().is_some_and(|read| read.hold(path))
}

impl Input {
    /// Opens a file or a pipe, and recognises how it is packed.
    ///
    /// # Errors
    /// It cannot be opened or read, or is a folder; the error does not name it.
    pub fn open(path: &Path) -> io::Result<Input> {
        let mut file = File::open(path)?;
        let meta = file.metadata()?;
        if meta.is_dir() {
            let way = "expected a file; a folder of DICOM slices is converted to NIfTI by 'dcm2niix -z y FOLDER'";
            return Err(io::Error::new(io::ErrorKind::IsADirectory, format!("is a folder, {way}")));
        }
        if meta.is_file() {
            remember(path);
            return Input::new(BufReader::with_capacity(BUFFER, file), meta.len());
        }
        if !is_pipe(&meta) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "is a device, expected a file or a pipe",
            ));
        }
        // A pipe has no length and is read only once.
        let mut bytes = vec![];
        memory::read("the content of the pipe", &mut file, &mut bytes)?;
        let length = bytes.len() as u64;
        Input::new(Cursor::new(bytes), length)
    }

    /// Opens a file whose bytes are taken as they are, packed or not, and whose [`Input::head`] is
    /// empty.
    ///
    /// # Errors
    /// It cannot be opened, or is no ordinary file; the error does not name it.
    pub fn plain(path: &Path) -> io::Result<Input> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"));
        }
        remember(path);
        let reader = Box::new(BufReader::with_capacity(BUFFER, file));
        Ok(Input {
            reader,
            head: vec![],
            packed: Packed::Plain,
            length: meta.len(),
            behind: Arc::default(),
            alone: false,
        })
    }

    /// A file that is in memory, and that came without a folder: there are no files beside it.
    ///
    /// # Errors
    /// Its beginning cannot be unpacked.
    pub fn of_bytes(bytes: Vec<u8>) -> io::Result<Input> {
        let length = bytes.len() as u64;
        Ok(Input { alone: true, ..Input::new(Cursor::new(bytes), length)? })
    }

    /// Whether the file came without a folder: references in it to other files are not followed.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    /// An input of `length` bytes, packed or not, from a reader.
    ///
    /// # Errors
    /// Its beginning cannot be read or unpacked.
    pub fn new(mut file: impl BufRead + 'static, length: u64) -> io::Result<Input> {
        let behind = Arc::new(AtomicBool::new(false));
        let first = file.fill_buf()?;
        let packed = match first {
            [0x1f, 0x8b, ..] => Packed::Gzip,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Packed::Bzip2,
            _ => Packed::Plain,
        };
        let mut reader: Box<dyn Read> = match packed {
            Packed::Plain => Box::new(file),
            packed => unpacked(file, packed, behind.clone()),
        };
        let mut head = vec![];
        let read = reader.by_ref().take(HEAD as u64).read_to_end(&mut head);
        let input = Input {
            reader: Box::new(Cursor::new(head.clone()).chain(reader)),
            head,
            packed,
            length,
            behind,
            alone: false,
        };
        read.map_err(|e| input.broken(e))?;
        Ok(input)
    }

    /// The first bytes, unpacked, at most [`HEAD`]. Reading still begins with them.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// The most bytes that reading can give.
    pub fn most(&self) -> u64 {
        match self.packed {
            Packed::Plain => self.length,
            Packed::Gzip => self.length.saturating_mul(DEFLATE_LIMIT),
            Packed::Bzip2 => self.length.saturating_mul(BZIP2_LIMIT),
        }
    }

    /// An error of reading, with the packing named if there is one.
    pub fn broken(&self, e: io::Error) -> io::Error {
        let what = match self.packed {
            Packed::Plain => return e,
            Packed::Gzip => "gzip",
            Packed::Bzip2 => "bzip2",
        };
        io::Error::new(e.kind(), format!("truncated or corrupt {what} stream: {e}"))
    }

    /// A warning, once everything was read, if bytes of something else followed a packed stream.
    pub fn warning(&self) -> Option<&'static str> {
        self.behind.load(Ordering::Relaxed).then_some(BEHIND)
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer).map_err(|e| self.broken(e))
    }
}

/// The warning about bytes after a packed stream.
pub(crate) const BEHIND: &str = "other bytes follow the compressed stream and were not read";

/// The contents of a packed file. `behind` becomes true if bytes of something else follow.
pub(crate) fn unpacked(
    file: impl BufRead + 'static,
    packed: Packed,
    behind: Arc<AtomicBool>,
) -> Box<dyn Read> {
    match packed {
        Packed::Plain => Box::new(file),
        Packed::Gzip => Box::new(Members { member: Some(GzDecoder::new(file)), behind }),
        Packed::Bzip2 => Box::new(Members { member: Some(BzDecoder::new(file)), behind }),
    }
}

/// A packed stream with an end, after which another may begin.
trait Member: Read + Sized {
    type Inner: BufRead;
    const MAGIC: &'static [u8];
    fn open(inner: Self::Inner) -> Self;
    fn close(self) -> Self::Inner;
}

impl<R: BufRead> Member for GzDecoder<R> {
    type Inner = R;
    const MAGIC: &'static [u8] = &[0x1f, 0x8b];
    fn open(inner: R) -> Self {
        GzDecoder::new(inner)
    }
    fn close(self) -> R {
        self.into_inner()
    }
}

impl<R: BufRead> Member for BzDecoder<R> {
    type Inner = R;
    const MAGIC: &'static [u8] = b"BZh";
    fn open(inner: R) -> Self {
        BzDecoder::new(inner)
    }
    fn close(self) -> R {
        self.into_inner()
    }
}

/// The members of a packed file, one after the other. Bytes after them that are not a member are
/// ignored, as gzip does.
struct Members<M> {
    member: Option<M>,
    behind: Arc<AtomicBool>,
}

impl<M: Member> Read for Members<M> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let read = member.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            if let Some(mut rest) = self.member.take().map(M::close) {
                // At the end of a buffer fewer bytes may be visible.
                let next = rest.fill_buf()?;
                match next.len().min(M::MAGIC.len()) {
                    0 => {}
                    seen if next[..seen] == M::MAGIC[..seen] => self.member = Some(M::open(rest)),
                    _ => self.behind.store(true, Ordering::Relaxed),
                }
            }
        }
        Ok(0)
    }
}

/// Bytes that are read from the system at a time: few enough to be allocated without a check.
const BUFFER: usize = 1 << 15;

/// The most bytes of text that are read.
const MOST_TEXT: u64 = 64 << 20;
/// What messages call the memory that it takes.
const TEXT: &str = "a text file";
/// Bytes that are to be had, for each of a text, when it is taken apart: that is done in lists
/// without a length, which ask for no memory that may be refused.
const APART: usize = 16;

/// An error unless there is room for what a text of so many bytes says, when it is taken apart.
pub(crate) fn room_apart(what: &'static str, bytes: usize) -> Result<(), memory::Refused> {
    memory::room::<u8>(what, APART * bytes).map(drop)
}

/// The most bytes that the header of a model file takes.
pub(crate) const MOST_HEADER: u64 = 1 << 20;

/// The header of a file of tensors (safetensors), which begins with `bytes`: its JSON, at most
/// `most` bytes, once there is room for what it says when another crate takes it apart, as with
/// [`room_apart`]. Otherwise what is wrong with it.
///
/// # Errors
/// There is no room for that.
pub(crate) fn room_for_header<'a>(
    what: &'static str,
    bytes: &'a [u8],
    most: u64,
) -> Result<Result<&'a [u8], &'static str>, memory::Refused> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Ok(Err("its header is missing or too long"));
    };
    let length = u64::from_le_bytes(*length);
    if length > most {
        return Ok(Err("its header is missing or too long"));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Ok(Err("it ends within its header"));
    };
    room_apart(what, header.len())?;
    Ok(Ok(header))
}

/// Reads a text file: UTF-8, with or without a byte order mark. `expected` names for messages what
/// it should contain.
///
/// # Errors
/// It cannot be read, is not text (the message says what it is), or is too long; the message does
/// not name it.
pub fn read_text(path: &Path, expected: &str) -> Result<String, String> {
    let mut input = Input::open(path).map_err(|e| e.to_string())?;
    let mut bytes = vec![];
    memory::caught(|| memory::read(TEXT, input.by_ref().take(MOST_TEXT), &mut bytes))
        .map_err(|e| e.to_string())?
        .map_err(|e| e.to_string())?;
    if bytes.len() as u64 == MOST_TEXT {
        return Err(format!("is longer than {} MiB, expected {expected}", MOST_TEXT >> 20));
    }
    room_apart("the content of a text file", bytes.len()).map_err(|e| e.to_string())?;
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(format!("is text in UTF-16, expected {expected} in UTF-8"));
    }
    let kind = recognise(&bytes[..bytes.len().min(HEAD)])
        .filter(|k| *k != Kind::Foreign("a JSON file", NO_IMAGE));
    match (String::from_utf8(bytes), kind) {
        (Ok(mut text), _) if !text.contains('\0') => {
            if text.starts_with('\u{feff}') {
                text.remove(0);
            }
            Ok(text)
        }
        (_, Some(kind)) => Err(format!("is {}, expected {expected}", kind.name())),
        (Err(e), None) => Err(format!(
            "is not UTF-8 text from byte {} on, expected {expected}",
            e.utf8_error().valid_up_to()
        )),
        (Ok(_), None) => Err(format!("is not text, expected {expected}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gz.write_all(bytes).unwrap();
        gz.finish().unwrap()
    }

    fn all(bytes: Vec<u8>) -> io::Result<(Vec<u8>, Option<&'static str>)> {
        let length = bytes.len() as u64;
        let mut input = Input::new(Cursor::new(bytes), length)?;
        let mut out = vec![];
        input.read_to_end(&mut out)?;
        Ok((out, input.warning()))
    }

    #[test]
    fn gzip_members_are_joined_and_what_follows_them_is_said() {
        let (a, b) = (vec![7u8; 3000], vec![9u8; 10]);
        let joined = [gzip(&a), gzip(&b)].concat();
        assert_eq!(all(joined.clone()).unwrap(), ([a.clone(), b].concat(), None));
        let (read, warning) = all([gzip(&a), b"padding".to_vec()].concat()).unwrap();
        assert!(read == a && warning.is_some());
        let mut bzip2 = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::best());
        bzip2.write_all(&a).unwrap();
        let bzip2 = bzip2.finish().unwrap();
        assert_eq!(all([&bzip2[..], &bzip2].concat()).unwrap(), ([&a[..], &a].concat(), None));
        assert_eq!(all([&bzip2[..], &[0; 9]].concat()).unwrap(), (a.clone(), Some(BEHIND)));
        assert_eq!(
            all([&gzip(&a)[..], &[0x1f, 0, 0]].concat()).unwrap(),
            (a.clone(), Some(BEHIND))
        );
        assert!(
            all(joined[..joined.len() - 3].to_vec())
                .unwrap_err()
                .to_string()
                .starts_with("truncated or corrupt gzip")
        );
    }

    #[cfg(unix)]
    #[test]
    fn files_that_were_read_are_known_by_all_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["one", "other", "alone"] {
            std::fs::write(at(name), name).unwrap();
        }
        std::fs::hard_link(at("one"), at("hard")).unwrap();
        std::fs::hard_link(at("other"), at("foreign")).unwrap();
        std::os::unix::fs::symlink("hard", at("link")).unwrap();
        let read = |name: &str| Input::open(&at(name)).map(drop);
        let (done, files) = noting(|| {
            // Within it another, whose files are not this one's.
            assert!(noting(|| read("alone")).1.hold(&at("alone")));
            read("one")
        });
        done.unwrap();
        read("other").unwrap();
        for (name, known) in [
            ("one", true),
            ("./one", true),
            ("hard", true),
            ("link", true),
            ("foreign", false),
            ("alone", false),
            ("none", false),
        ] {
            assert_eq!(files.hold(&at(name)), known, "{name}");
        }
        let panicked =
            std::panic::catch_unwind(|| noting::<()>(|| std::panic::resume_unwind(Box::new(1))));
        assert!(panicked.is_err() && NOTED.with_borrow(Option::is_none));
    }

    #[test]
    fn text_is_read_behind_its_mark_and_what_is_no_text_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read_text(&path, "JSON")
        };
        assert_eq!(read(b"\xef\xbb\xbf[1]").unwrap(), "[1]");
        assert_eq!(read(b"a,b\n").unwrap(), "a,b\n");
        assert!(read(b"\xff\xfea\0").unwrap_err().contains("UTF-16"));
        assert!(read(b"\x89PNG\r\n").unwrap_err().contains("a PNG picture, expected JSON"));
        assert!(read(b"abc\xff").unwrap_err().contains("from byte 3 on"));
        assert!(read(b"[\"caf\xe9\"]").unwrap_err().contains("from byte 5 on"));
        assert_eq!(read(b"BMI,image,label\n").unwrap(), "BMI,image,label\n");
        assert!(read(b"a\0b").unwrap_err().contains("is not text"));
        assert!(read_text(folder.path(), "JSON").unwrap_err().contains("is a folder"));
    }
}
