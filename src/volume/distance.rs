//! Exact Euclidean distances on a grid, and connected components.

use crate::memory;

/// How refusals of memory name the scratch of a line, and lists of a mask's parts.
const LINE: &str = "distances along an axis";
const PARTS: &str = "the parts of a mask";

/// The squared distance from every voxel of `[i][j][k]` to the nearest one that `seed` marks (is
/// not 0), with `spacing` between voxels, in whose unit distances are; infinite if none is marked.
///
/// Lower envelopes of parabolas, one axis after the other (Felzenszwalb and Huttenlocher 2012): the
/// time is linear in the number of voxels.
pub fn squared_distance(seed: &[u8], size: [usize; 3], spacing: [f64; 3]) -> Vec<f32> {
    let mut out: Vec<f32> = memory::collected(
        "distances",
        seed.iter().map(|s| if *s != 0 { 0.0 } else { f32::INFINITY }),
    );
    let strides = [size[1] * size[2], size[2], 1];
    let longest = size.into_iter().max().unwrap_or(0);
    let mut line = Envelope::new(longest);
    for axis in [2, 1, 0] {
        let (length, stride) = (size[axis], strides[axis]);
        for start in 0..out.len() / length.max(1) {
            let first = start / stride * stride * length + start % stride;
            line.transform(&mut out, first, stride, length, spacing[axis] as f32);
        }
    }
    out
}

/// Scratch of a line's transform.
struct Envelope {
    values: Vec<f32>,
    /// Vertices of the parabolas of the lower envelope, and the positions from which each is the
    /// lowest.
    vertices: Vec<usize>,
    begins: Vec<f32>,
}

impl Envelope {
    fn new(longest: usize) -> Envelope {
        Envelope {
            values: memory::zeroed(LINE, longest),
            vertices: memory::zeroed(LINE, longest),
            begins: memory::zeroed(LINE, longest),
        }
    }

    fn transform(
        &mut self,
        data: &mut [f32],
        first: usize,
        stride: usize,
        length: usize,
        step: f32,
    ) {
        let mut count = 0;
        for q in 0..length {
            let v = data[first + q * stride];
            self.values[q] = v;
            if v == f32::INFINITY {
                continue;
            }
            let place = q as f32 * step;
            loop {
                if count == 0 {
                    (self.vertices[0], self.begins[0], count) = (q, f32::NEG_INFINITY, 1);
                    break;
                }
                let other = self.vertices[count - 1];
                let at = other as f32 * step;
                let meets =
                    ((v + place * place) - (self.values[other] + at * at)) / (2.0 * (place - at));
                if meets > self.begins[count - 1] {
                    (self.vertices[count], self.begins[count]) = (q, meets);
                    count += 1;
                    break;
                }
                count -= 1;
            }
        }
        let mut lowest = 0;
        for q in 0..if count > 0 { length } else { 0 } {
            let place = q as f32 * step;
            while lowest + 1 < count && self.begins[lowest + 1] < place {
                lowest += 1;
            }
            let vertex = self.vertices[lowest];
            let apart = place - vertex as f32 * step;
            data[first + q * stride] = apart * apart + self.values[vertex];
        }
    }
}

/// The 26-connected components of the voxels marked in `mask` `[i][j][k]`, each as the indices of
/// its voxels in the mask, in the order of their first voxels. Unwinds to [`memory::caught`] if
/// memory for them is refused.
pub fn components(mask: &[u8], [ni, nj, nk]: [usize; 3]) -> Vec<Vec<usize>> {
    // All lists together: each may have room for twice what it holds.
    if let Err(e) = memory::check::<[usize; 2]>(PARTS, mask.iter().filter(|m| **m != 0).count()) {
        memory::refuse(e);
    }
    let mut left: Vec<bool> = memory::collected(PARTS, mask.iter().map(|m| *m != 0));
    let mut all = vec![];
    for start in 0..mask.len() {
        if !left[start] {
            continue;
        }
        left[start] = false;
        let mut component = vec![];
        memory::push(PARTS, &mut component, start);
        let mut next = 0;
        while next < component.len() {
            let at = component[next];
            next += 1;
            let (i, j, k) = (at / (nj * nk), at / nk % nj, at % nk);
            for a in i.saturating_sub(1)..(i + 2).min(ni) {
                for b in j.saturating_sub(1)..(j + 2).min(nj) {
                    for c in k.saturating_sub(1)..(k + 2).min(nk) {
                        let other = (a * nj + b) * nk + c;
                        if std::mem::take(&mut left[other]) {
                            memory::push(PARTS, &mut component, other);
                        }
                    }
                }
            }
        }
        memory::push(PARTS, &mut all, component);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    #[test]
    fn distances_are_those_of_trying_every_pair() {
        let mut rng = StdRng::seed_from_u64(1);
        for (size, spacing) in [
            ([5, 7, 6], [1.0, 1.0, 1.0]),
            ([9, 4, 3], [0.7, 1.3, 5.0]),
            ([1, 1, 8], [1.0, 2.0, 0.5]),
        ] {
            let voxels = size.iter().product();
            let seed: Vec<u8> = (0..voxels).map(|_| u8::from(rng.random_bool(0.08))).collect();
            let found = squared_distance(&seed, size, spacing);
            let place =
                |at: usize| [at / (size[1] * size[2]), at / size[2] % size[1], at % size[2]];
            for (at, found) in found.iter().enumerate() {
                let p = place(at);
                let to = |q: usize| {
                    (0..3)
                        .map(|a| ((p[a] as f64 - place(q)[a] as f64) * spacing[a]).powi(2))
                        .sum::<f64>()
                };
                let expected =
                    (0..voxels).filter(|q| seed[*q] != 0).map(to).fold(f64::INFINITY, f64::min);
                assert!(
                    expected.is_infinite() && found.is_infinite()
                        || (*found as f64 - expected).abs() < 1e-4 * (1.0 + expected)
                );
            }
        }
        assert!(squared_distance(&[0; 8], [2; 3], [1.0; 3]).iter().all(|v| v.is_infinite()));
    }

    #[test]
    fn voxels_that_touch_by_a_corner_are_one_component() {
        let mut mask = vec![0u8; 64];
        for at in [0, 21, 63] {
            mask[at] = 1;
        }
        assert_eq!(components(&mask, [4; 3]), vec![vec![0, 21], vec![63]]);
    }
}
