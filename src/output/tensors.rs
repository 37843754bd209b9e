//! Files of tensors.

use super::Pending;
use safetensors::tensor::{Metadata, TensorInfo, View};
use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The most bytes of a header that safetensors reads.
const MOST_HEADER: usize = 100_000_000;

/// Writes a file of tensors (safetensors) whole or not at all, with a text in its metadata.
///
/// There is one text, under a key: several would be in another order each time, and the same
/// tensors would give different files.
///
/// Tensors are asked for their bytes one after the other. The crate's own function would write to a
/// temporary file that only it knows.
///
/// # Errors
/// Those of [`Pending::new`], and those of writing; or a tensor's bytes are not as many as its
/// shape and type say, or the header is longer than safetensors reads.
pub(crate) fn write_tensors<V: View>(
    path: &Path,
    key: &str,
    text: String,
    tensors: Vec<(String, V)>,
) -> io::Result<()> {
    let pending = Pending::new(path, "")?;
    // It collects what is small: longer pieces go to the file as they are.
    let mut file = BufWriter::new(pending.open()?);
    put_tensors(&mut file, HashMap::from([(key.to_string(), text)]), tensors, MOST_HEADER)?;
    drop(file.into_inner()?);
    pending.commit()
}

/// Writes tensors in the format safetensors, as its crate does: the header's length, the header,
/// and the bytes of one tensor after the other. Of a header of more than `most` bytes nothing is
/// written.
fn put_tensors<V: View>(
    to: &mut impl Write,
    metadata: HashMap<String, String>,
    mut tensors: Vec<(String, V)>,
    most: usize,
) -> io::Result<()> {
    // Those of long elements first, so that each begins at a multiple of its element's size.
    tensors.sort_by(|(a, x), (b, y)| y.dtype().cmp(&x.dtype()).then_with(|| a.cmp(b)));
    let mut end = 0;
    let places = tensors.iter().map(|(name, tensor)| {
        let begin = end;
        end += tensor.data_len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let header = Metadata::new(Some(metadata), places.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > most {
        let length = header.len();
        return Err(io::Error::other(format!("a header of {length} bytes, expected up to {most}")));
    }
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    tensors.iter().try_for_each(|(name, tensor)| {
        let (bytes, expected) = (tensor.data(), tensor.data_len());
        if bytes.len() != expected {
            let length = bytes.len();
            let message = format!("tensor '{name}' has {length} bytes, expected {expected}");
            return Err(io::Error::other(message));
        }
        to.write_all(&bytes)
    })
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::output::temporary::{is_temporary, temporary};
    use crate::output::tests::mode_of;
    use safetensors::tensor::{Dtype, TensorView};
    use std::borrow::Cow;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    #[test]
    fn tensors_are_written_as_by_their_crate() {
        let bytes: Vec<u8> = (0..=255).cycle().take(20_000).collect();
        let all = [
            ("b", Dtype::F32, vec![3, 5]),
            ("a", Dtype::F32, vec![40, 100]),
            ("of \"é\"\n", Dtype::U8, vec![7]),
            ("none", Dtype::F16, vec![0, 4]),
            ("one", Dtype::F64, vec![]),
            ("c", Dtype::BF16, vec![9000]),
            ("d", Dtype::I64, vec![1, 2, 3]),
            ("e", Dtype::BOOL, vec![3]),
        ];
        let one = |(at, (name, dtype, shape)): (usize, &(&str, Dtype, Vec<usize>))| {
            let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let view = TensorView::new(*dtype, shape.clone(), &bytes[at..at + size]).unwrap();
            (name.to_string(), view)
        };
        for count in 0..=all.len() {
            let tensors: Vec<_> = all[..count].iter().enumerate().map(one).collect();
            // None, and so many that every length of padding comes up.
            for length in 0..=8 {
                let text = (length > 0).then(|| ("key".to_string(), "x".repeat(length)));
                let metadata: HashMap<String, String> = text.into_iter().collect();
                let mut own: Vec<u8> = vec![];
                put_tensors(&mut own, metadata.clone(), tensors.clone(), MOST_HEADER).unwrap();
                let theirs = safetensors::serialize(tensors.clone(), Some(metadata)).unwrap();
                assert!(own == theirs, "{count} tensors, a text of {length} characters");
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all");
        let tensors: Vec<_> = all.iter().enumerate().map(one).collect();
        write_tensors(&path, "key", "text".to_string(), tensors.clone()).unwrap();
        let metadata = HashMap::from([("key".to_string(), "text".to_string())]);
        let theirs = safetensors::serialize(tensors, Some(metadata)).unwrap();
        assert!(std::fs::read(&path).unwrap() == theirs);
    }

    /// A tensor of three bytes, or what says that it is, that does something when asked for them.
    struct Asked<F>(F);

    impl<F: Fn() -> &'static [u8]> View for Asked<F> {
        fn dtype(&self) -> Dtype {
            Dtype::U8
        }
        fn shape(&self) -> &[usize] {
            &[3]
        }
        fn data(&self) -> Cow<'_, [u8]> {
            Cow::Borrowed((self.0)())
        }
        fn data_len(&self) -> usize {
            3
        }
    }

    #[test]
    fn tensors_go_to_the_listed_file_and_to_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let others = || -> Vec<PathBuf> {
            let entries = std::fs::read_dir(folder.path()).unwrap();
            entries.map(|entry| entry.unwrap().path()).filter(|at| *at != path).collect()
        };
        // Writes a file, and does something with the temporary one meanwhile.
        let write = |text: &str, meanwhile: &dyn Fn(&Path)| {
            let asked = || {
                let there = others();
                assert!(matches!(&there[..], [file] if is_temporary(file)), "{there:?}");
                assert!(temporary().contains(&there[0]), "{there:?}");
                meanwhile(&there[0]);
                &b"abc"[..]
            };
            write_tensors(&path, "key", text.to_string(), vec![("t".to_string(), Asked(asked))])
        };
        write("first", &|_| {}).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        write("second", &|file| assert_eq!(mode_of(file), 0o600)).unwrap();
        assert_eq!(mode_of(&path), 0o640);
        assert!(others().is_empty(), "{:?}", others());
        // What is removed as the process ends is not made again.
        let before = std::fs::read(&path).unwrap();
        let error = write("third", &|file| std::fs::remove_file(file).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(others().is_empty(), "{:?}", others());
        assert_eq!(std::fs::read(&path).unwrap(), before);
        // One that has fewer bytes than it says.
        let short = vec![("t".to_string(), Asked(|| &b"ab"[..]))];
        let error = write_tensors(&path, "key", String::new(), short).unwrap_err().to_string();
        assert_eq!(error, "tensor 't' has 2 bytes, expected 3");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        // A header that no one would read.
        let mut own: Vec<u8> = vec![];
        let one = || vec![("t".to_string(), Asked(|| &b"abc"[..]))];
        put_tensors(&mut own, HashMap::new(), one(), MOST_HEADER).unwrap();
        let header = own.len() - 8 - 3;
        own.clear();
        assert!(put_tensors(&mut own, HashMap::new(), one(), header - 1).is_err());
        assert!(own.is_empty());
        put_tensors(&mut own, HashMap::new(), one(), header).unwrap();
    }
}
