//! Damaged files of every format: an error or a sane result, never a panic, never a huge
//! allocation.

use crate::common;

use common::{here, tiny};
use prism::model::checkpoint;
use prism::model::{Weights, weights::Precision};
use prism::volume::Volume;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::io::Read;
use std::path::Path;

/// Calls `read` on `rounds` copies of `original`, each with a few bytes of its first `span` changed
/// or its end cut off.
fn attack(
    seed: u64,
    original: &[u8],
    span: usize,
    rounds: usize,
    name: &str,
    mut read: impl FnMut(&Path),
) {
    let mut rng = StdRng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    for _ in 0..rounds {
        let mut bytes = original.to_vec();
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..span.min(bytes.len()));
            bytes[at] = match rng.random_range(0..4) {
                0 => 0,
                1 => 0xff,
                2 => bytes[at] ^ 1 << rng.random_range(0..8),
                _ => rng.random(),
            };
        }
        if rng.random_range(0..8) == 0 {
            bytes.truncate(rng.random_range(0..bytes.len()));
        }
        std::fs::write(&path, bytes).unwrap();
        read(&path);
    }
}

fn raw_scan() -> Vec<u8> {
    let mut bytes = vec![];
    let file = std::fs::File::open(here("tests/data/odd/m00_base.nii.gz")).unwrap();
    flate2::read::MultiGzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    bytes
}

/// What must hold of any volume that was read.
fn sane(volume: Volume) {
    assert_eq!(volume.grid.voxels(), volume.values().len());
    assert!(volume.values().iter().all(|v| v.is_finite()) && volume.grid.affine.is_regular());
    let canonical = volume.grid.canonical();
    assert!(canonical.affine.is_regular() && canonical.voxels() == volume.values().len());
}

#[test]
fn nifti_headers() {
    let (mut good, mut bad) = (0, 0);
    attack(1, &raw_scan(), 352, 1500, "a.nii", |path| match Volume::read(path, None) {
        Ok(v) => {
            sane(v);
            good += 1;
        }
        Err(_) => bad += 1,
    });
    assert!(good > 50 && bad > 50, "{good} read, {bad} refused");
}

#[test]
fn gzip_streams() {
    let original = std::fs::read(here("tests/data/odd/m00_base.nii.gz")).unwrap();
    let mut bad = 0;
    attack(2, &original, usize::MAX, 300, "a.nii.gz", |path| match Volume::read(path, None) {
        Ok(v) => sane(v),
        Err(_) => bad += 1,
    });
    assert!(bad > 250, "only {bad} of 300 damaged streams were noticed");
}

#[test]
fn nrrd_headers() {
    let header = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 3 2\n\
                  space directions: (2,0,0) (0,2,0) (0,0,5)\nendian: little\nencoding: raw\nspace origin: (1,2,3)\n\n";
    let original = [header.as_bytes(), &[7; 48]].concat();
    attack(3, &original, header.len(), 1500, "a.nrrd", |path| {
        drop(Volume::read(path, None).map(sane))
    });
}

#[test]
fn checkpoints() {
    for (seed, name) in
        ["checkpoint_zip.pth.tar", "checkpoint_legacy.pth.tar", "checkpoint_bare_ddp.pth"]
            .into_iter()
            .enumerate()
    {
        let original = std::fs::read(here("tests/reference/misc").join(name)).unwrap();
        attack(seed as u64, &original, usize::MAX, 500, name, |path| {
            if let Ok(state) = checkpoint::read(path) {
                state.values().for_each(|e| drop(e.values()));
            }
        });
    }
}

/// A library that reads one would run other programs than those that were looked at.
#[test]
fn a_tar_archive_that_begins_as_a_pickle_does_is_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let mut archive = vec![0u8; 1024];
    archive[..4].copy_from_slice(b"\x80\x02}.");
    archive[257..262].copy_from_slice(b"ustar");
    std::fs::write(&path, archive).unwrap();
    let error = checkpoint::read(&path).err().unwrap().to_string();
    assert!(
        error.ends_with("a.pth: is a TAR archive, expected a zip archive or a pickle"),
        "{error}"
    );
}

/// A program that is passed over would be run all the same.
#[test]
fn no_program_of_a_checkpoint_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let legacy = std::fs::read(here("tests/reference/misc/checkpoint_legacy.pth.tar")).unwrap();
    // The second program, the number of the format, without the two bytes that tell its protocol.
    let at = 1 + legacy.windows(3).position(|w| w == b".\x80\x02").unwrap();
    std::fs::write(&path, [&legacy[..at], &legacy[at + 2..]].concat()).unwrap();
    let error = checkpoint::read(&path).err().unwrap().to_string();
    assert!(error.contains("not all of its programs are pickles"), "{error}");
}

#[test]
fn models() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    Weights::hashed(tiny(), "x").save(&path, Precision::F16).unwrap();
    let original = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(original[..8].try_into().unwrap()) as usize;
    attack(4, &original, header, 300, "m.safetensors", |path| {
        if let Ok(w) = Weights::open(path) {
            w.config.check().unwrap();
        }
    });
}

/// A terminal would obey them.
#[cfg(unix)]
#[test]
fn control_characters_of_names_and_fields_are_written_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a\u{1b}[2Jb.nrrd");
    std::fs::write(&path, "NRRD0004\nspa\0ce\u{7}: 3\n\n").unwrap();
    let said = crate::refused(crate::program::prism("info").arg(&path));
    assert!(said.contains(r"a\u{1b}[2Jb.nrrd") && said.contains(r"'spa\0ce\u{7}'"), "{said:?}");
    assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
}
