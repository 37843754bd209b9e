//! A turn on one patch: what the network is given of a user's clicks, and how its answer is used.

use super::correction::Click;
use super::{ANSWER, CLICKS};
use crate::memory;

/// The voxels that represent clicks in the refiner's maps, on a patch of `edge` voxels a side: a
/// ball of `radius` voxels around each click, or for a radius below 1 its voxel alone. Where balls
/// of both kinds meet, later clicks cover earlier ones, but never an earlier click's own voxel.
pub fn marks(clicks: &[Click], edge: usize, radius: f32) -> Vec<Click> {
    if radius < 1.0 {
        return memory::copied(CLICKS, clicks);
    }
    let mut all = std::collections::BTreeMap::new();
    for (p, positive) in clicks {
        ball(*p, edge, radius, |q| {
            all.insert(q, *positive);
        });
    }
    // A click's own voxel is its own, whatever is beside it.
    all.extend(clicks.iter().copied());
    memory::collected(CLICKS, all.into_iter())
}

/// Calls `visit` for every voxel of the patch within `radius` of `centre`.
fn ball(centre: [i32; 3], edge: usize, radius: f32, mut visit: impl FnMut([i32; 3])) {
    let r = radius.floor() as i32;
    let range = |d: usize| (centre[d] - r).max(0)..(centre[d] + r + 1).min(edge as i32);
    for i in range(0) {
        for j in range(1) {
            for k in range(2) {
                let q = [i, j, k];
                let squared = (0..3).map(|d| ((q[d] - centre[d]) as f32).powi(2)).sum::<f32>();
                if squared <= radius * radius {
                    visit(q);
                }
            }
        }
    }
}

/// The weighted mean of two answers, voxel by voxel: `before` to the last bit where the weight is
/// 0, `proposal` where it is 1.
pub fn blend(before: &[f32], proposal: &[f32], weights: &[f32]) -> Vec<f32> {
    // Not computed by adding a difference: a weight of 1 gives the proposal to the last bit, one of
    // 0 what was before.
    memory::collected(
        ANSWER,
        before.iter().zip(proposal).zip(weights).map(|((b, p), w)| (1.0 - w) * b + w * p),
    )
}

/// Multiplies the weights `[i][j][k]` of a look so that they fall off towards the faces of the
/// patch that are `open` (low and high along i, j, k): to 0 at the outermost voxels, unchanged from
/// `over` voxels inwards on.
pub fn taper(weights: &mut [f32], edge: usize, over: f32, open: [[bool; 2]; 3]) {
    let along = |d: usize| -> Vec<f32> {
        let part = |at: usize| if over > 0.0 { ((at as f32) / over).min(1.0) } else { 1.0 };
        (0..edge)
            .map(|at| {
                let low = if open[d][0] { part(at) } else { 1.0 };
                low.min(if open[d][1] { part(edge - 1 - at) } else { 1.0 })
            })
            .collect()
    };
    let [a, b, c] = [along(0), along(1), along(2)];
    for (at, w) in weights.iter_mut().enumerate() {
        *w *= a[at / (edge * edge)].min(b[at / edge % edge]).min(c[at % edge]);
    }
}
