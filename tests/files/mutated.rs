//! Damaged files of every kind: the seeds of the fuzz targets, changed some hundreds of times each,
//! through the bodies that the targets run.
//!
//! An input on which a body fails is kept under `target/tmp`; `cargo fuzz run KIND FILE` runs it
//! again.

#[path = "../common/bodies.rs"]
mod bodies;
#[cfg(feature = "serve")]
#[path = "../common/sent.rs"]
mod sent;

use crate::common;

use prism::model::Weights;
use prism::model::weights::Precision;
use prism::prompt::simulate::generator;
use prism::train::run::network;
use rand::{Rng, RngExt};
use std::path::{Path, PathBuf};

/// Bytes at the beginning that are changed as often as all others together, because headers are
/// there.
const HEAD: usize = 600;

/// Whole numbers at which something overflows, wraps or changes sign.
const WHOLE: [u64; 20] = [
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    348,
    32_767,
    32_768,
    65_535,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

const REAL: [f64; 14] = [
    0.0,
    -0.0,
    1e-38,
    1e38,
    -1.0,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    1e-300,
    1e300,
    1e6,
    353.5,
    4e9,
    -352.0,
];

/// Text that may replace a number in a text.
const TOKENS: [&str; 24] = [
    "0",
    "1",
    "-1",
    "3",
    "0.5",
    "64",
    "1e-5",
    "65536",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e19",
    "1e38",
    "1e308",
    "-1e308",
    "1e400",
    "1e-300",
    "nan",
    "inf",
    "null",
    "true",
    "\"\"",
    "[]",
];

fn pick<'a, T>(rng: &mut impl Rng, list: &'a [T]) -> &'a T {
    &list[rng.random_range(0..list.len())]
}

/// A position in this many bytes, the end included.
fn place(rng: &mut impl Rng, length: usize) -> usize {
    let most = if rng.random_bool(0.5) { length.min(HEAD) } else { length };
    rng.random_range(0..=most)
}

/// A position and what follows it, up to `most` bytes.
fn range(rng: &mut impl Rng, length: usize, most: usize) -> std::ops::Range<usize> {
    let from = place(rng, length);
    from..length.min(from + rng.random_range(1..=most))
}

fn noise(rng: &mut impl Rng, most: usize) -> Vec<u8> {
    (0..rng.random_range(1..=most)).map(|_| rng.random()).collect()
}

/// Overwrites what is there, as far as there is room.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes.iter_mut().skip(at).zip(value).for_each(|(b, v)| *b = *v);
}

/// A change that is independent of formats.
fn change(rng: &mut impl Rng, bytes: &mut Vec<u8>, other: &[u8]) {
    let length = bytes.len();
    match rng.random_range(0..9) {
        0 => {
            for _ in 0..*pick(rng, &[1, 1, 2, 4, 16]) {
                let at = place(rng, length);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1u8 << rng.random_range(0..8u32);
                }
            }
        }
        1 => {
            let value = [*pick(rng, &[0, 0xff, b' ', b'.'])];
            let at = place(rng, length);
            put(bytes, at, &value);
        }
        2 => bytes.truncate(place(rng, length)),
        3 => {
            let at = place(rng, length);
            drop(bytes.splice(at..at, noise(rng, 64)));
        }
        4 => drop(bytes.drain(range(rng, length, 64))),
        5 => {
            let part = bytes[range(rng, length, 256)].to_vec();
            let at = place(rng, length);
            drop(bytes.splice(at..at, part));
        }
        6 => {
            bytes.truncate(place(rng, length));
            bytes.extend_from_slice(&other[place(rng, other.len())..]);
        }
        7 => {
            let (value, width) = (pick(rng, &WHOLE).to_le_bytes(), *pick(rng, &[1usize, 2, 4, 8]));
            let mut value = value[..width].to_vec();
            if rng.random_bool(0.3) {
                value.reverse();
            }
            let at = place(rng, length);
            put(bytes, at, &value);
        }
        _ => {
            let value = *pick(rng, &REAL);
            // Fields of headers begin at multiples of four.
            let at = place(rng, length) & !3;
            if rng.random_bool(0.7) {
                put(bytes, at, &(value as f32).to_le_bytes())
            } else {
                put(bytes, at, &value.to_le_bytes())
            }
        }
    }
}

/// The positions of numbers in a text.
fn numbers(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut all: Vec<std::ops::Range<usize>> = vec![];
    let mut at = 0;
    while at < bytes.len() {
        let from = at - usize::from(at > 0 && bytes[at - 1] == b'-');
        let length = bytes[at..].iter().take_while(|b| b.is_ascii_digit() || **b == b'.').count();
        if bytes[at].is_ascii_digit() {
            all.push(from..at + length);
        }
        at += length.max(1);
    }
    all
}

/// A change of a text, or of a header that is text.
fn rewrite(rng: &mut impl Rng, bytes: &mut Vec<u8>) {
    let kind = rng.random_range(0..5);
    let found = if kind < 3 { numbers(bytes) } else { vec![] };
    if !found.is_empty() {
        let number = pick(rng, &found).clone();
        drop(bytes.splice(number, pick(rng, &TOKENS).bytes()));
        return;
    }
    let mut lines: Vec<Vec<u8>> = bytes.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
    let (a, b) = (rng.random_range(0..lines.len()), rng.random_range(0..lines.len()));
    match rng.random_range(0..3) {
        0 => drop(lines.remove(a)),
        1 => {
            let line = lines[a].clone();
            lines.insert(b, line);
        }
        _ => lines.swap(a, b),
    }
    *bytes = lines.join(&b'\n');
}

/// A change of the JSON at the beginning of a safetensors file, with its length kept right.
fn reword(rng: &mut impl Rng, bytes: &mut Vec<u8>) {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return };
    let (header, tensors) = rest.split_at(rest.len().min(u64::from_le_bytes(*length) as usize));
    let mut header = header.to_vec();
    if rng.random_bool(0.8) {
        rewrite(rng, &mut header);
    } else {
        let names = [
            "F32",
            "F16",
            "BF16",
            "I64",
            "F64",
            "weight",
            "bias",
            "data_offsets",
            "shape",
            "[",
            "{",
            ":",
        ];
        let (from, to) = (*pick(rng, &names), *pick(rng, &names));
        let found: Vec<usize> = header
            .windows(from.len())
            .enumerate()
            .filter(|(_, w)| *w == from.as_bytes())
            .map(|(at, _)| at)
            .collect();
        if !found.is_empty() {
            let at = *pick(rng, &found);
            drop(header.splice(at..at + from.len(), to.bytes()));
        }
    }
    *bytes = [&(header.len() as u64).to_le_bytes()[..], &header[..], tensors].concat();
}

/// The folder of a kind's seeds.
fn seeds(kind: &str) -> PathBuf {
    common::here("fuzz/seeds").join(kind)
}

/// The structure of a kind's files, apart from bytes.
#[derive(Clone, Copy)]
enum Form {
    /// Text, or a header that is text, after this many bytes that choose.
    Text(usize),
    /// Safetensors.
    Tensors,
}

/// A seed after one to three changes.
fn mutated(rng: &mut impl Rng, form: Form, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let chosen = if let Form::Text(chosen) = form { chosen.min(seed.len()) } else { 0 };
    let mut choice = seed[..chosen].to_vec();
    if chosen > 0 && rng.random_bool(0.05) {
        *choice.last_mut().unwrap() = rng.random();
    }
    let mut bytes = seed[chosen..].to_vec();
    for _ in 0..*pick(rng, &[1, 1, 2, 3]) {
        match form {
            _ if rng.random_bool(0.5) => change(rng, &mut bytes, other),
            Form::Text(_) => rewrite(rng, &mut bytes),
            Form::Tensors => reword(rng, &mut bytes),
        }
    }
    [choice, bytes].concat()
}

/// Runs a body on each seed of a kind and on `more`, then on `rounds` changed copies of each.
fn attack(kind: &str, body: fn(&[u8]) -> bool, form: Form, rounds: u64, more: Vec<Vec<u8>>) {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(seeds(kind)).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut seeds: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert!(!seeds.is_empty(), "{kind} has no seeds");
    seeds.extend(more);
    for (n, seed) in seeds.iter().enumerate() {
        assert!(body(seed), "seed {n} of {files:?} is not read");
    }
    let (mut good, mut bad) = (0, 0);
    for (n, seed) in seeds.iter().enumerate() {
        for round in 0..rounds {
            let mut rng = generator(round, &[n as u64]);
            let other = pick(&mut rng, &seeds);
            let bytes = mutated(&mut rng, form, seed, other);
            match std::panic::catch_unwind(|| body(&bytes)) {
                Ok(true) => good += 1,
                Ok(false) => bad += 1,
                Err(_) => {
                    let at =
                        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{kind}-{n}-{round}"));
                    std::fs::write(&at, &bytes).unwrap();
                    panic!("seed {n} of {files:?} after change {round}: kept as {}", at.display());
                }
            }
        }
    }
    eprintln!("{kind}: {good} read, {bad} refused");
    assert!(good > 0 && bad > 0, "{kind}: {good} read, {bad} refused");
}

#[test]
fn images() {
    attack("images", bodies::images, Form::Text(2), 300, vec![]);
}

#[test]
fn labels() {
    attack("labels", bodies::labels, Form::Text(2), 300, vec![]);
}

#[test]
fn models() {
    // With both encoders, and as the library writes it.
    let config = network(seeds("settings").join("network.json").to_str().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    Weights::hashed(config, "seed").save(&path, Precision::F16).unwrap();
    attack("models", bodies::models, Form::Tensors, 200, vec![std::fs::read(path).unwrap()]);
}

#[test]
fn checkpoints() {
    attack("checkpoints", bodies::checkpoints, Form::Text(1), 500, vec![]);
}

#[test]
fn prompts() {
    attack("prompts", bodies::prompts, Form::Text(0), 500, vec![]);
}

#[test]
fn settings() {
    attack("settings", bodies::settings, Form::Text(0), 500, vec![]);
}

#[test]
fn states() {
    attack("states", bodies::states, Form::Tensors, 200, vec![]);
}

/// What clients send to a server.
#[cfg(feature = "serve")]
mod serve {
    use super::*;

    #[test]
    fn forms() {
        attack("forms", sent::forms, Form::Text(0), 500, vec![]);
    }

    #[test]
    fn arrays() {
        attack("arrays", sent::arrays, Form::Text(0), 500, vec![]);
    }

    #[test]
    fn queries() {
        attack("queries", sent::queries, Form::Text(0), 500, vec![]);
    }

    #[test]
    fn interactions() {
        attack("interactions", sent::interactions, Form::Text(0), 500, vec![]);
    }
}
