//! Masks as a person or another program makes them: roughly right.

use super::noise::field;
use crate::memory;
use crate::volume::distance::squared_distance;
use rand::Rng;

/// The name of a coarse mask in refusals of memory.
const MASK: &str = "a coarse mask";

/// The errors of a mask, as parts of the object's diameter.
#[derive(Clone, Copy, Debug)]
pub struct Coarseness {
    /// Amplitude of the bumps and dents of its surface.
    pub rough: f32,
    /// The number of bumps and dents along each axis of the volume.
    pub cells: usize,
    /// By how much it is too large everywhere, or too small if negative.
    pub shift: f32,
}

/// A mask that is roughly right: that of `label` `[i][j][k]` with its surface moved at random; 1 on
/// the object.
pub fn coarse(
    rng: &mut impl Rng,
    label: &[u8],
    size: [usize; 3],
    spacing: [f64; 3],
    how: Coarseness,
) -> Vec<u8> {
    let inside: Vec<u8> = memory::collected(MASK, label.iter().map(|l| u8::from(*l != 0)));
    let outside: Vec<u8> = memory::collected(MASK, inside.iter().map(|l| 1 - l));
    let (to_in, to_out) =
        (squared_distance(&inside, size, spacing), squared_distance(&outside, size, spacing));
    let volume =
        inside.iter().filter(|v| **v != 0).count() as f64 * spacing.iter().product::<f64>();
    let across = 1.24 * volume.cbrt() as f32;
    let bumps = field(rng, size, [how.cells; 3]);
    let phi = |at: usize| to_out[at].sqrt().min(1e6) - to_in[at].sqrt().min(1e6);
    memory::collected(
        MASK,
        (0..label.len())
            .map(|at| u8::from(phi(at) + across * (how.rough * bumps[at] + how.shift) > 0.0)),
    )
}
