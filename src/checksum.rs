//! Content hashes that files carry, so that a damaged file is an error and not another answer.
//!
//! A file's description (a line of JSON) ends with the hash of that line and of every tensor, by
//! its name. Long tensors are hashed in pieces, in parallel; the hash of a tensor is that of its
//! pieces' hashes. BLAKE3: fast enough to be checked at every reading.

use blake3::{Hash, Hasher};
use safetensors::SafeTensors;
use std::fs::File;
use std::io;
use std::path::Path;

/// Bytes that are hashed at a time.
pub(crate) const PIECE: usize = 1 << 18;

/// The hash of a tensor's bytes.
pub fn of_bytes(bytes: &[u8]) -> Hash {
    of_pieces(bytes.chunks(PIECE).map(blake3::hash))
}

/// The hash of a tensor from those of its pieces, [`PIECE`] bytes each but for the last.
pub(crate) fn of_pieces(pieces: impl Iterator<Item = Hash>) -> Hash {
    let mut all = Hasher::new();
    for piece in pieces {
        all.update(piece.as_bytes());
    }
    all.finalize()
}

/// The BLAKE3 hash of a whole file, in hexadecimal digits.
///
/// # Errors
/// It cannot be read.
pub fn of_file(path: &Path) -> io::Result<String> {
    let mut all = Hasher::new();
    all.update_reader(File::open(path)?)?;
    Ok(all.finalize().to_string())
}

/// The tensors of a file in memory, by name, with their hashes.
pub(crate) fn of_tensors<'a>(file: &'a SafeTensors) -> impl Iterator<Item = (&'a str, Hash)> {
    file.iter().map(|(name, view)| (name, of_bytes(view.data())))
}

/// The text between a description and its hash.
const MARK: &str = ",\"hash\":\"";

fn of_all<'a>(description: &str, tensors: impl Iterator<Item = (&'a str, Hash)>) -> Hash {
    let mut named: Vec<(&str, Hash)> = tensors.collect();
    named.sort_by_key(|(name, _)| *name);
    let mut all = Hasher::new();
    all.update(description.as_bytes());
    for (name, hash) in named {
        all.update(&(name.len() as u64).to_le_bytes())
            .update(name.as_bytes())
            .update(hash.as_bytes());
    }
    all.finalize()
}

/// A file's description, a JSON object, with the hash of it and of the tensors added as its last
/// member.
pub fn sealed<'a>(description: &str, tensors: impl Iterator<Item = (&'a str, Hash)>) -> String {
    let hash = of_all(description, tensors);
    match description.strip_suffix('}') {
        Some(open) => format!("{open}{MARK}{hash}\"}}"),
        None => description.to_string(),
    }
}

/// Splits the description of a file into the description without its hash, and the hash; none if
/// the file carries none, as files of other programs do.
pub fn opened(text: &str) -> (String, Option<Hash>) {
    let parts = text
        .rsplit_once(MARK)
        .and_then(|(open, rest)| Some((open, Hash::from_hex(rest.strip_suffix("\"}")?).ok()?)));
    parts.map_or_else(|| (text.to_string(), None), |(open, hash)| (format!("{open}}}"), Some(hash)))
}

/// Checks that the hash that a file carries is that of its contents.
///
/// # Errors
/// It is not; as text.
pub fn check<'a>(
    description: &str,
    carried: Hash,
    tensors: impl Iterator<Item = (&'a str, Hash)>,
) -> Result<(), &'static str> {
    // Equality of hashes.
    if of_all(description, tensors) == carried {
        Ok(())
    } else {
        Err("damaged: its content does not match the hash that it carries")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_and_any_change_shows() {
        let (a, b) = (of_bytes(&[1; 1000]), of_bytes(&vec![2; 3 * PIECE + 1]));
        let text = sealed("{\"x\":1}", [("b", b), ("a", a)].into_iter());
        let (description, hash) = opened(&text);
        assert_eq!(description, "{\"x\":1}");
        let hash = hash.unwrap();
        assert_eq!(check(&description, hash, [("a", a), ("b", b)].into_iter()), Ok(()));
        assert!(check("{\"x\":2}", hash, [("a", a), ("b", b)].into_iter()).is_err());
        assert!(check(&description, hash, [("a", a), ("c", b)].into_iter()).is_err());
        assert!(check(&description, hash, [("a", b), ("b", a)].into_iter()).is_err());
        assert_eq!(opened("{\"x\":1}"), ("{\"x\":1}".into(), None));
    }
}
