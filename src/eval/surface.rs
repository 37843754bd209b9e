//! The surface between a mask's voxels, as elements with an area and a position, and exact
//! distances to it.
//!
//! A surface element is at a corner of voxels: the eight voxels around it are in or out, 256 cases,
//! and each case has an area by marching cubes with the surface halfway between voxels (Lorensen
//! and Cline 1987). The areas are those that DeepMind's surface-distance uses (Nikolov et al.
//! 2021), whose table reduces to fourteen cases by the symmetries of the cube and the exchange of
//! in and out.

use crate::memory;
use crate::tensor::extent;
use crate::volume::Grid;

/// The name of the surfaces in refusals of memory.
const SURFACES: &str = "the surfaces of two masks";

/// A corner of the cube of eight voxels, along i, j, k.
type Corner = [u8; 3];

/// The cases that the others follow from: the corners inside, and the surface pieces' areas
/// projected along i, j, k, in eighths of a voxel face.
const CASES: [(&[Corner], &[[u8; 3]]); 13] = [
    (&[[1, 1, 1]], &[[1, 1, 1]]),
    (&[[1, 1, 0], [1, 1, 1]], &[[2, 2, 0], [2, 2, 0]]),
    (&[[1, 0, 1], [1, 1, 0]], &[[1, 1, 1], [1, 1, 1]]),
    (&[[0, 1, 1], [1, 0, 0]], &[[1, 1, 1], [1, 1, 1]]),
    (&[[1, 0, 1], [1, 1, 0], [1, 1, 1]], &[[1, 1, 1], [2, 2, 2], [4, 0, 0]]),
    (&[[0, 1, 1], [1, 0, 1], [1, 1, 0]], &[[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    (&[[0, 1, 1], [1, 0, 0], [1, 1, 1]], &[[0, 2, 2], [0, 2, 2], [1, 1, 1]]),
    (&[[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]], &[[4, 0, 0], [4, 0, 0]]),
    (&[[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], &[[1, 1, 1], [1, 1, 1], [2, 2, 2], [2, 2, 2]]),
    (&[[0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], &[[0, 2, 2], [1, 1, 1], [2, 0, 2], [3, 3, 3]]),
    (&[[0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0]], &[[1, 1, 1], [1, 1, 1], [2, 2, 2], [4, 0, 0]]),
    (&[[0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1]], &[[2, 2, 0], [2, 2, 0], [2, 2, 0], [2, 2, 0]]),
    (&[[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 1]], &[[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]),
];

const AXES: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// The area in mm² of every case, by the bits of the eight voxels (bit `4 i + 2 j + k`).
fn areas(spacing: [f64; 3]) -> [f64; 256] {
    let faces = [spacing[1] * spacing[2], spacing[0] * spacing[2], spacing[0] * spacing[1]];
    let mut table = [0.0; 256];
    for (corners, pieces) in CASES {
        for axes in AXES {
            let piece = |p: &[u8; 3]| -> f64 {
                (0..3).map(|a| (p[axes[a]] as f64 / 8.0 * faces[a]).powi(2)).sum::<f64>().sqrt()
            };
            let area = pieces.iter().map(piece).sum();
            for flip in 0..8u8 {
                let bit =
                    |c: &Corner| (0..3).fold(0u8, |at, a| at << 1 | (c[axes[a]] ^ (flip >> a & 1)));
                let code = corners.iter().fold(0u8, |code, c| code | 1 << bit(c));
                table[code as usize] = area;
                table[!code as usize] = area;
            }
        }
    }
    table
}

/// Surface elements of a mask on a grid of voxel corners.
struct Surface {
    /// Whether there is an element at each corner.
    on: Vec<bool>,
    /// The area of the element at each corner, in mm².
    area: Vec<f64>,
}

/// The part of a volume that holds both masks, and its corners.
struct Frame {
    low: [usize; 3],
    corners: [usize; 3],
}

impl Frame {
    fn surface(&self, mask: &[u8], size: [usize; 3], table: &[f64; 256]) -> Surface {
        let [ci, cj, ck] = self.corners;
        let mut surface = {
            let count = extent(&self.corners).unwrap_or(usize::MAX);
            Surface { on: memory::zeroed(SURFACES, count), area: memory::zeroed(SURFACES, count) }
        };
        let inside = |i: usize, j: usize, k: usize| -> bool {
            // Corner (i, j, k) is the low corner of voxel (i, j, k) of the frame; voxels beyond it
            // are out.
            let place = [i, j, k];
            if (0..3).any(|a| place[a] == 0 || place[a] == self.corners[a]) {
                return false;
            }
            let v: [usize; 3] = std::array::from_fn(|a| self.low[a] + place[a] - 1);
            mask[(v[0] * size[1] + v[1]) * size[2] + v[2]] != 0
        };
        for i in 0..ci {
            for j in 0..cj {
                for k in 0..ck {
                    let mut code = 0usize;
                    for c in 0..8 {
                        if inside(i + (c >> 2), j + (c >> 1 & 1), k + (c & 1)) {
                            code |= 1 << c;
                        }
                    }
                    if code != 0 && code != 255 {
                        let at = (i * cj + j) * ck + k;
                        surface.on[at] = true;
                        surface.area[at] = table[code];
                    }
                }
            }
        }
        surface
    }
}

/// For every corner the nearest element's offset along i, j, k (in corners), by lower envelopes of
/// parabolas, one axis after another (Felzenszwalb and Huttenlocher 2012). None where there is no
/// element at all.
fn nearest(on: &[bool], size: [usize; 3], spacing: [f64; 3]) -> Option<Vec<[i32; 3]>> {
    if !on.contains(&true) {
        return None;
    }
    const FAR: i32 = i32::MAX;
    let strides = [size[1] * size[2], size[2], 1];
    let mut offset: Vec<[i32; 3]> =
        memory::collected(SURFACES, on.iter().map(|on| if *on { [0; 3] } else { [FAR; 3] }));
    let mut squared: Vec<f64> =
        memory::collected(SURFACES, on.iter().map(|on| if *on { 0.0 } else { f64::INFINITY }));
    for axis in [2, 1, 0] {
        let (edge, stride, step) = (size[axis], strides[axis], spacing[axis]);
        let (mut place, mut border) = (vec![0usize; edge], vec![0.0f64; edge + 1]);
        for start in (0..on.len()).filter(|v| v / stride % edge == 0) {
            let at = |q: usize| start + q * stride;
            let line: Vec<(f64, [i32; 3])> =
                (0..edge).map(|q| (squared[at(q)], offset[at(q)])).collect();
            let mut count = 0;
            for q in (0..edge).filter(|&q| line[q].0.is_finite()) {
                let cross = |p: usize| {
                    let (x, y) = (q as f64 * step, p as f64 * step);
                    ((line[q].0 + x * x) - (line[p].0 + y * y)) / (2.0 * (x - y))
                };
                while count > 0 && cross(place[count - 1]) <= border[count - 1] {
                    count -= 1;
                }
                border[count] =
                    if count == 0 { f64::NEG_INFINITY } else { cross(place[count - 1]) };
                place[count] = q;
                count += 1;
            }
            if count == 0 {
                continue;
            }
            let mut n = 0;
            for q in 0..edge {
                while n + 1 < count && border[n + 1] < q as f64 * step {
                    n += 1;
                }
                let p = place[n];
                let away = (q as f64 - p as f64) * step;
                squared[at(q)] = line[p].0 + away * away;
                offset[at(q)] = line[p].1;
                offset[at(q)][axis] = q as i32 - p as i32;
            }
        }
    }
    Some(offset)
}

/// Distances from each surface element of one mask to the other mask's surface, in mm, with the
/// element's area in mm²; sorted.
pub type Distances = Vec<(f64, f64)>;

/// The distances from `truth`'s surface to `prediction`'s, and back, of masks `[i][j][k]` of zeros
/// and ones on a grid. Distances to an empty mask are infinite; those from one are none.
pub fn distances(truth: &[u8], prediction: &[u8], grid: &Grid) -> [Distances; 2] {
    let (size, spacing) = (grid.size, grid.spacing());
    let either: Vec<u8> =
        memory::collected(SURFACES, truth.iter().zip(prediction).map(|(a, b)| a | b));
    let Some(b) = crate::prompt::simulate::bounding_box(&either, size) else {
        return [vec![], vec![]];
    };
    let b = b.map(|v| v as usize);
    let frame =
        Frame { low: [b[0], b[1], b[2]], corners: std::array::from_fn(|a| b[a + 3] - b[a] + 1) };
    let table = areas(spacing);
    let surfaces = [truth, prediction].map(|mask| frame.surface(mask, size, &table));
    let fields = surfaces.each_ref().map(|s| nearest(&s.on, frame.corners, spacing));
    let list = |from: &Surface, field: &Option<Vec<[i32; 3]>>| -> Distances {
        let distance = |at: usize| match field {
            None => f64::INFINITY,
            // In this order, so that distances on a tolerance fall on the same side as the
            // reference's.
            Some(field) => {
                (0..3).map(|a| (field[at][a] as f64 * spacing[a]).powi(2)).sum::<f64>().sqrt()
            }
        };
        let mut list: Distances = memory::counted(
            SURFACES,
            (0..from.on.len()).filter(|&at| from.on[at]).map(|at| (distance(at), from.area[at])),
        );
        list.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        list
    };
    [list(&surfaces[0], &fields[1]), list(&surfaces[1], &fields[0])]
}
