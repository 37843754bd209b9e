//! Position codes of points and of the token grid by random Fourier features (Tancik et al. 2020).
//!
//! The code of a position `c` in `[0, 1]³` is `[sin a, cos a, sin a]` with `a = 2π (2c - 1) G`, as
//! the released network lays it out, where `G` `[3, features]`, the argument `gaussian`, has random
//! frequencies that belong to the model. It is computed on the host, in float64.

use crate::device::Cpu;
use crate::memory;
use crate::tensor::{OpError, Tensor};
use std::f64::consts::TAU;

/// Writes `[sin, cos, sin]` of `2π (2c - 1) G` for `c` in `[0, 1]³`. Computed in float64: at 128
/// random frequencies the angle is tens of turns.
fn code(c: [f64; 3], gaussian: &Tensor, out: &mut [f32]) {
    let features = gaussian.channels();
    let g = gaussian.data();
    for f in 0..features {
        let turns: f64 = (0..3).map(|a| (2.0 * c[a] - 1.0) * g[a * features + f] as f64).sum();
        let (sin, cos) = (turns * TAU).sin_cos();
        out[f] = sin as f32;
        out[features + f] = cos as f32;
        out[2 * features + f] = sin as f32;
    }
}

fn check(gaussian: &Tensor) -> Result<usize, OpError> {
    match gaussian.shape() {
        [3, features] if *features > 0 => {
            // Copied back here, where a failure can be reported.
            gaussian.try_data()?;
            Ok(3 * features)
        }
        _ => Err(gaussian.shape_error("position_code", "gaussian", "[3, features]")),
    }
}

/// The codes of voxel positions `[t][i, j, k]` in a patch of `size` voxels: `[t, 3 * features]`.
///
/// `shift` is added to each index first; 0.5 gives the centres of voxels.
pub fn points(
    cpu: &Cpu,
    gaussian: &Tensor,
    positions: &[[f64; 3]],
    size: [usize; 3],
    shift: f64,
) -> Result<Tensor, OpError> {
    let width = check(gaussian)?;
    let mut out = cpu.alloc(positions.len() * width);
    cpu.chunks_mut(&mut out, 16 * width, |unit, out| {
        for (p, out) in positions[unit * 16..].iter().zip(out.chunks_exact_mut(width)) {
            code(std::array::from_fn(|a| (p[a] + shift) / size[a] as f64), gaussian, out);
        }
    });
    Ok(Tensor::from_buffer([positions.len(), width], out))
}

/// The codes of the centres of a grid's cells, `[d, h, w, 3 * features]`, with the axes of a
/// position in the released network's order (j, i, k).
///
/// That network divides the first coordinate by d and the second by h although they are along h and
/// d; on its cubic grids that makes no difference.
pub fn grid(gaussian: &Tensor, [d, h, w]: [usize; 3]) -> Result<Tensor, OpError> {
    let width = check(gaussian)?;
    let mut out = memory::zeroed("position codes", d * h * w * width);
    for (cell, out) in out.chunks_exact_mut(width).enumerate() {
        let at = |index: usize, edge: usize| (index as f64 + 0.5) / edge as f64;
        let (i, j, k) = (cell / w / h, cell / w % h, cell % w);
        code([at(j, d), at(i, h), at(k, w)], gaussian, out);
    }
    Ok(Tensor::new([d, h, w, width], out))
}
