//! Identifiers, and what is found by them.
//!
//! What is held is found by a hash of its identifier, and objects' identifiers are made of their
//! scan's, so that what is kept on disk (`journal.rs`) holds nothing that one could call with.

use crate::serve::failure::Failure;
use crate::serve::work::Key;
use axum::http::StatusCode;
use rand::TryRng;
use rand::rngs::SysRng;

/// What names a lease, a scan or an object.
pub type Id = u128;

/// An identifier as text.
pub fn text(id: Id) -> String {
    format!("{id:032x}")
}

/// The identifier that a text is.
pub(super) fn id_of(text: &str) -> Option<Id> {
    let plain = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { Id::from_str_radix(text, 16).ok() } else { None }
}

/// A new identifier.
pub fn new_id() -> Result<Id, Failure> {
    let mut bytes = [0; 16];
    SysRng.try_fill_bytes(&mut bytes).map_err(|e| {
        Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the system has no random numbers: {e}"),
        )
    })?;
    Ok(Id::from_le_bytes(bytes))
}

/// The first 128 bits of a hash of numbers.
fn hashed(what: &str, numbers: &[u128]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(what.as_bytes());
    for number in numbers {
        hasher.update(&number.to_le_bytes());
    }
    first_bits(&hasher)
}

fn first_bits(hasher: &blake3::Hasher) -> u128 {
    let hash = hasher.finalize();
    u128::from_le_bytes(std::array::from_fn(|at| hash.as_bytes()[at]))
}

/// What something is found by.
pub fn key_of(id: Id) -> Key {
    hashed("prism key", &[id])
}

/// What a series of the server's folder is found by. No identifier that is given leads there.
pub fn series_key(uid: &str) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"prism series").update(uid.as_bytes());
    first_bits(&hasher)
}

/// The identifier of an object on a scan: who knows the scan's may know its objects'.
pub fn object_id(scan: Id, number: u64) -> Id {
    hashed("prism object", &[scan, number.into()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_read_as_they_are_written() {
        let id = new_id().unwrap();
        assert_eq!(id_of(&text(id)), Some(id));
        assert_eq!(text(7).len(), 32);
        let letters = ["g".repeat(32), format!("+{}", "0".repeat(31)), "0".repeat(33)];
        for other in ["", "7"].into_iter().chain(letters.iter().map(String::as_str)) {
            assert_eq!(id_of(other), None, "{other}");
        }
        assert_ne!(id, new_id().unwrap());
        // Nothing that stands on disk is one, and no two things are found by the same.
        let (object, other) = (object_id(id, 0), object_id(id, 1));
        let all = [id, key_of(id), object, key_of(object), other, key_of(other)];
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), all.len());
        // Nor is a series, whatever it is called.
        assert_ne!(series_key("1.2.3"), series_key("1.2.4"));
        assert_ne!(series_key(&text(id)), key_of(id));
    }
}
