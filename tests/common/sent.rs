//! What clients send to a server: what the fuzz targets in `fuzz/fuzz_targets` and the tests in
//! `tests/files/mutated.rs` run, in addition to `bodies.rs`. Each body returns whether something
//! was read.
#![allow(dead_code)]

use prism::serve::readers::{self, Part};
use prism::tensor::extent;
use prism::volume::{Affine, Grid};

/// The most bytes of a volume or an array.
const MOST: usize = 1 << 20;
/// The voxels of the scan along each axis.
const SIZE: [usize; 3] = [12, 10, 8];

/// What must hold of any message: it is for people. A fuzzer learns any word that is looked for,
/// and sends it then, to read it in the quotes of a message: there words are not looked for.
fn said(text: &str) {
    assert!(!text.trim().is_empty(), "an error without a word");
    assert!(cfg!(fuzzing) || !text.contains("panicked"), "{text}");
}

/// Forms of several parts: the first line is the kind of the body, the rest the body.
pub fn forms(input: &[u8]) -> bool {
    let end = input.iter().position(|b| *b == b'\n').unwrap_or(input.len());
    let (kind, body) = (&input[..end], input.get(end + 1..).unwrap_or_default());
    match readers::volume(kind, body, MOST) {
        Ok((grid, values)) => {
            let bytes = extent(&grid.size).map(|voxels| voxels * size_of::<f32>());
            assert!(!values.is_empty() && Some(values.len()) == bytes, "{:?}", grid.size);
        }
        Err(e) => said(&e),
    }
    wished(readers::asked(kind, body, SIZE));
    match readers::form(kind, body) {
        Ok(parts) => {
            apart(&parts, body);
            true
        }
        Err(e) => {
            said(&e);
            false
        }
    }
}

/// What must hold of the parts of a form: they are one after the other, and a form that is written
/// from them has the same parts.
fn apart(parts: &[Part], body: &[u8]) {
    let mut behind = 0;
    for Part { content, .. } in parts {
        assert!(behind <= content.start && content.start <= content.end, "{parts:?}");
        assert!(content.end <= body.len(), "{parts:?} of {} bytes", body.len());
        behind = content.end;
    }
    let letters = |part: &Part| part.name.len() + part.file.as_ref().map_or(0, String::len);
    if parts.iter().any(|part| letters(part) > 2000) {
        // In quotes they may be longer than a head can be.
        return;
    }
    let is_in = |what: &str| body.windows(what.len()).any(|w| w == what.as_bytes());
    let boundary = (0..).map(|n| format!("a-boundary-{n}")).find(|b| !is_in(b)).unwrap();
    let quoted = |text: &str| text.chars().flat_map(|c| ['\\', c]).collect::<String>();
    let mut again: Vec<u8> = vec![];
    for Part { name, file, content } in parts {
        again.extend(format!("--{boundary}\r\nContent-Disposition: form-data").bytes());
        again.extend(format!("; name=\"{}\"", quoted(name)).bytes());
        if let Some(file) = file {
            again.extend(format!("; filename=\"{}\"", quoted(file)).bytes());
        }
        again.extend(b"\r\n\r\n");
        again.extend(&body[content.clone()]);
        again.extend(b"\r\n");
    }
    again.extend(format!("--{boundary}--\r\n").bytes());
    let kind = format!("multipart/form-data; boundary={boundary}");
    let read = readers::form(kind.as_bytes(), &again).unwrap();
    assert_eq!(read.len(), parts.len());
    for (read, part) in read.iter().zip(parts) {
        assert_eq!((&read.name, &read.file), (&part.name, &part.file));
        assert!(again[read.content.clone()] == body[part.content.clone()], "{part:?}");
    }
}

/// What must hold of the parameters of MONAI Label's clients.
fn wished(asked: Result<(&'static str, Option<[usize; 6]>), String>) {
    match asked {
        Ok((format, bounds)) => {
            assert!(!format.is_empty());
            bounds.iter().for_each(within);
        }
        Err(e) => said(&e),
    }
}

/// A box holds something, and is on the scan.
fn within(bounds: &[usize; 6]) {
    let side = |a: usize| bounds[a] < bounds[a + 3] && bounds[a + 3] <= SIZE[a];
    assert!((0..3).all(side), "{bounds:?}");
}

/// Arrays of nnInteractive's protocol, with their chunks of blosc2.
pub fn arrays(input: &[u8]) -> bool {
    let array = match readers::array(input, MOST) {
        Ok(array) => array,
        Err(e) => {
            said(&e);
            return false;
        }
    };
    let count = array.marks.len();
    assert!(count > 0 && Some(count) == extent(&array.shape), "{:?}", array.shape);
    assert!(array.bytes <= MOST && array.bytes.is_multiple_of(count), "{}", array.bytes);
    assert!(array.voxels == count && array.marks.iter().all(|m| *m <= 1));
    let again = readers::packed(array.dtype, &array.shape, &array.marks).unwrap();
    let again = readers::array(&again, MOST).unwrap();
    assert!(again == array, "{} {:?}", array.dtype, array.shape);
    true
}

/// Query strings, and forms in the same encoding.
pub fn queries(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    // Decoding what was percent-encoded gives the original.
    let percent: String = input.iter().map(|b| format!("%{b:02x}")).collect();
    let named = readers::field(&format!("n=1&name={percent}&name=2"), "name");
    assert_eq!(named.as_deref(), Some(&*text));
    let asked = readers::asked(b"", input, SIZE);
    let is_asked = asked.is_ok() && readers::field(&text, "params").is_some();
    wished(asked);
    match readers::point(&text) {
        Ok((at, _)) => {
            assert!(at.iter().all(|v| v.is_finite()), "{at:?}");
            true
        }
        Err(e) => {
            said(&e);
            is_asked
        }
    }
}

/// Prompts to prism's own interface: each position is on the scan, or was refused.
pub fn interactions(input: &[u8]) -> bool {
    let grid = Grid { size: SIZE, affine: Affine::from_spacing([0.7, 0.7, 3.0]) };
    let prompts = match readers::interaction(input, &grid) {
        Ok(prompts) => prompts,
        Err(e) => {
            said(&e);
            return false;
        }
    };
    assert!(!prompts.is_empty() || prompts.drawn.is_some());
    let lies = |voxel: &[usize; 3]| (0..3).all(|a| voxel[a] < SIZE[a]);
    assert!(prompts.points.iter().all(|(voxel, _)| lies(voxel)), "{:?}", prompts.points);
    [prompts.bounds, prompts.drawn].iter().flatten().for_each(within);
    true
}
