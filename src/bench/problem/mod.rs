//! Problems to time, as text: `conv3d:n1ic32oc32d128k3s1p1`. Each kind is a file: how its text is
//! read, how its work is counted, how it runs, and its expected result.

mod attn;
mod conv3d;
mod encode;
mod interact;
mod judge;
mod linear;
mod lnorm;
mod network;
mod train;
mod upcat;
mod xattn;

pub use network::launches_of;
pub use train::launches as training_launches;

use crate::device::cuda::KernelRecord;
use crate::device::{Cuda, Device};
use crate::tensor::{OpError, Tensor};
use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Every kind, in the order in which messages name them.
const KINDS: &[Kind] = &[
    conv3d::KIND,
    upcat::KIND,
    attn::KIND,
    xattn::KIND,
    linear::KIND,
    lnorm::KIND,
    encode::KIND,
    interact::KIND,
    train::KIND,
];

/// A kind of problem.
struct Kind {
    /// A problem of this kind, with every letter.
    form: &'static str,
    /// Reads the text after the colon.
    read: fn(&str) -> Read,
}

impl Kind {
    /// The name before the colon.
    fn name(&self) -> &'static str {
        self.form.split(':').next().unwrap_or(self.form)
    }
}

/// A problem that was read, or the error in its text.
type Read = Result<Arc<dyn Task>, String>;

/// A problem of some kind. It is displayed as its text, with the kind's name and every letter.
trait Task: fmt::Debug + fmt::Display + Send + Sync {
    /// The count of its work; none for a network, whose ops are counted as they run.
    fn count(&self) -> Option<Count> {
        None
    }

    /// Makes it ready on a device: what is timed, and the judge of its result.
    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError>;

    /// The problem's launches on a CUDA device.
    fn timed(&self, cuda: &Cuda) -> Result<Timed, OpError> {
        timed(cuda, self.prepare(&cuda.clone().into())?.0)
    }
}

/// The work of an op by the plain algorithm.
struct Count {
    /// Floating-point operations, a multiply-add counting as two.
    flops: f64,
    /// Floats of inputs, weights and outputs, each counted once.
    floats: f64,
}

/// What is timed: one run, with its result left on the device.
pub(super) type Run = Box<dyn FnMut() -> Result<Tensor, OpError>>;
/// Pairs of actual and expected values, by the plainest formula in float64.
pub(super) type Judge = Box<dyn Fn(&Tensor) -> Result<Vec<(f64, f64)>, OpError>>;

/// Runs some work on a CUDA device; gives its launches, each timed.
pub type Timed = Box<dyn FnMut() -> Result<Vec<KernelRecord>, OpError>>;

/// The launches of a run, which records none of them itself.
fn timed(cuda: &Cuda, mut run: Run) -> Result<Timed, OpError> {
    // What stays on the device is brought there.
    run()?;
    let (cuda, run) = (cuda.clone(), RefCell::new(run));
    Ok(Box::new(move || Ok(cuda.launches(true, || (*run.borrow_mut())())?.0)))
}

/// An op or a network with sizes, to be checked and timed, such as `lnorm:m512c768`.
///
/// It is read from text by [`str::parse`]: a kind and, after a colon, letters with numbers, such as
/// `m` for rows and `c` for channels. The error of any other text lists the kinds with all their
/// letters. Maps are cubes. A problem is displayed as its text, with every letter.
#[derive(Clone, Debug)]
pub struct Problem(Arc<dyn Task>);

/// Why a text is not a [`Problem`]: its message says what was expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("problem '{text}': {why}")]
pub struct ProblemError {
    text: String,
    why: String,
}

/// The largest number of a problem.
const MOST: usize = 1 << 20;

/// The numbers after the letters, in the order of `letters`.
fn numbers<const N: usize>(
    text: &str,
    letters: [&str; N],
    usual: [Option<usize>; N],
) -> Result<[usize; N], String> {
    let mut values = usual;
    let mut given = [false; N];
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let end = rest[at..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |e| at + e);
        let (letter, number) = (&rest[..at], &rest[at..end]);
        let which = letters
            .iter()
            .position(|l| *l == letter)
            .ok_or_else(|| format!("'{letter}' is not one of {}", letters.join(", ")))?;
        let value = number.parse().ok().filter(|v| *v <= MOST);
        values[which] = Some(value.ok_or_else(|| {
            format!("'{letter}{number}' needs a number up to {MOST} after {letter}")
        })?);
        if std::mem::replace(&mut given[which], true) {
            return Err(format!("'{letter}' is given twice"));
        }
        rest = &rest[end..];
    }
    let mut out = [0; N];
    for (i, value) in values.iter().enumerate() {
        out[i] = value.ok_or_else(|| format!("'{}' is missing", letters[i]))?;
    }
    Ok(out)
}

/// Refuses sizes of 0.
fn positive(sizes: &[usize]) -> Result<(), String> {
    if sizes.contains(&0) { Err("a size is 0".into()) } else { Ok(()) }
}

/// Operations of multiply-adds, whose number is a product of sizes.
fn multiply_adds(sizes: &[usize]) -> f64 {
    2.0 * sizes.iter().map(|s| *s as f64).product::<f64>()
}

/// Voxels of a cube.
fn cube(edge: usize) -> f64 {
    (edge as f64).powi(3)
}

impl FromStr for Problem {
    type Err = ProblemError;

    fn from_str(text: &str) -> Result<Problem, ProblemError> {
        let fail = |why: String| ProblemError { text: text.into(), why };
        let forms = || KINDS.iter().map(|kind| kind.form).collect::<Vec<_>>().join(", ");
        let (name, rest) = text
            .split_once(':')
            .ok_or_else(|| fail(format!("expected KIND:SIZES, as {}", forms())))?;
        let kind = KINDS
            .iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| fail(format!("unknown kind '{name}', expected one of {}", forms())))?;
        let read = (kind.read)(rest);
        let problem = Problem(read.map_err(|why| fail(format!("{why} (as {})", kind.form)))?);
        let bytes = problem.floats() * 4.0;
        if bytes > (64u64 << 30) as f64 {
            return Err(fail(format!("its tensors take {:.0} GB", bytes / 1e9)));
        }
        Ok(problem)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Problem {
    /// Floating-point operations of the plain algorithm, a multiply-add counting as two; none for a
    /// network, whose ops are counted as they run.
    pub fn flops(&self) -> Option<f64> {
        self.0.count().map(|count| count.flops)
    }

    /// The number of values of inputs, weights and outputs, each counted once; 0 for a network.
    pub fn floats(&self) -> f64 {
        self.0.count().map_or(0.0, |count| count.floats)
    }

    /// Makes it ready on a device.
    pub(super) fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        self.0.prepare(device)
    }

    /// The problem's launches on a CUDA device.
    pub(super) fn timed(&self, cuda: &Cuda) -> Result<Timed, OpError> {
        self.0.timed(cuda)
    }
}

/// Reads the problems of a file's `text`: one per line, with comments after `#`.
///
/// # Errors
/// A line is not a problem.
pub fn suite(text: &str) -> Result<Vec<Problem>, ProblemError> {
    let lines = text.lines().map(|l| l.split('#').next().unwrap_or("").trim());
    lines.filter(|l| !l.is_empty()).map(str::parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_read_and_written() {
        let read = |text: &str| text.parse::<Problem>().unwrap().to_string();
        for Kind { form, .. } in KINDS {
            let written = read(form);
            assert!(written.starts_with(form), "{form}: {written}");
            assert_eq!(read(&written), written);
        }
        for text in ["conv3d:n2ic1oc768d128k16s16p0", "encode:small,d32", "train:small,i4"] {
            assert_eq!(read(text), text);
        }
        // What follows from the rest may be omitted.
        assert_eq!(read("conv3d:ic8oc8d16"), "conv3d:n1ic8oc8d16k3s1p1");
        assert_eq!(read("train:small,d64"), "train:small,i2");
        let conv: Problem = "conv3d:n1ic32oc32d128k3s1p1".parse().unwrap();
        assert_eq!(conv.flops(), Some(2.0 * 27.0 * 1024.0 * 128f64.powi(3)));
        assert_eq!(suite("# all\n\nlnorm:m2c3 # one\n").unwrap().len(), 1);
    }

    /// Everything else that lists the kinds agrees with [`KINDS`].
    #[test]
    fn every_kind_has_its_lines() {
        let quick = suite(include_str!("../../../benches/problems/quick.txt")).unwrap();
        let peer = include_str!("../../../benches/peer/problems.py");
        let table = include_str!("../../../docs/benchmarking.md");
        for kind in KINDS {
            let (name, form) = (kind.name(), kind.form);
            assert!(table.contains(&format!("`{form}")), "docs/benchmarking.md: {form}");
            // Networks are in a suite of their own, and one function in PyTorch.
            if form.parse::<Problem>().unwrap().flops().is_none() {
                continue;
            }
            let is_quick = |p: &Problem| p.to_string().starts_with(&format!("{name}:"));
            assert!(quick.iter().any(is_quick), "benches/problems/quick.txt: {form}");
            assert!(peer.contains(&format!("def {name}(")), "benches/peer/problems.py: {form}");
        }
    }

    #[test]
    fn other_text_is_told_what_is_wrong() {
        for (text, part) in [
            ("conv3d", "KIND:SIZES"),
            ("convolve:n1", "unknown kind 'convolve'"),
            ("conv3d:n1ic32d128", "'oc' is missing"),
            ("conv3d:ic1oc1d8k5s1p2", "k3s1p1, or another kernel"),
            ("conv3d:ic1oc1d9k3s3p0", "k3s3p0 over d9: k3s1p1"),
            ("conv3d:ic1oc1d9k3s3", "k3s3p0 over d9: k3s1p1"),
            ("conv3d:ic1oc1d9k0s0p0", "k3s1p1, or another kernel"),
            ("conv3d:ic1oc1d9k2s2p0", "divides d"),
            ("conv3d:ic1ic1oc1d8", "given twice"),
            ("linear:m5x7", "'x' is not one of m, k, n"),
            ("linear:m0k1n1", "a size is 0"),
            ("linear:m99999999999999999999k1n1", "up to"),
            ("conv3d:ic1048576oc1048576d1048576", "GB"),
            ("encode:huge", "neither base nor small"),
            ("encode:base,d17", "17"),
        ] {
            let message = text.parse::<Problem>().unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("problem '{text}'")) && message.contains(part),
                "{message}"
            );
        }
    }
}
