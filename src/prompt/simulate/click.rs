//! A click as the CVPR 2025 challenge on interactive segmentation simulates it: in the middle of
//! the largest error.

use super::{Errors, Kind, scribbles, voxel};
use crate::memory::{self, extent};
use crate::volume::distance::{components, squared_distance};
use rand::{Rng, RngExt};

/// The names of what a click is found with in refusals of memory.
const ERROR: &str = "the voxels of an error";
const DEPTHS: &str = "the depths of an error";

/// A part of a volume: its first voxel and its size.
#[derive(Clone, Copy)]
struct Block {
    low: [usize; 3],
    size: [usize; 3],
}

impl Block {
    /// The smallest part that contains `voxels`, with one voxel more on every side. It may begin at
    /// -1: `low` is one higher than the first voxel's index.
    fn around(voxels: &[usize], size: [usize; 3]) -> Block {
        let (mut low, mut high) = ([usize::MAX; 3], [0; 3]);
        for at in voxels {
            let p = voxel(*at, size).map(|v| v as usize);
            (low, high) = (
                std::array::from_fn(|a| low[a].min(p[a])),
                std::array::from_fn(|a| high[a].max(p[a])),
            );
        }
        Block { low, size: std::array::from_fn(|a| high[a] - low[a] + 3) }
    }

    fn place(&self, p: [usize; 3]) -> usize {
        let [i, j, k]: [usize; 3] = std::array::from_fn(|a| p[a] + 1 - self.low[a]);
        (i * self.size[1] + j) * self.size[2] + k
    }
}

/// The largest 26-connected component of the wrong voxels, whether missed or in excess, as indices
/// in `[i][j][k]` order; none if nothing is wrong.
pub fn largest_error(errors: &Errors, size: [usize; 3]) -> Option<Vec<usize>> {
    // The first of those of the same size.
    components(&errors.wrong(), size).into_iter().rev().max_by_key(Vec::len)
}

/// The depth of each voxel of a component: its distance, in voxels, to the nearest voxel outside.
pub fn depths(component: &[usize], size: [usize; 3]) -> Vec<f32> {
    let block = Block::around(component, size);
    let mut outside = memory::filled(DEPTHS, 1u8, extent(&block.size).unwrap_or(usize::MAX));
    let place = |at: usize| block.place(voxel(at, size).map(|v| v as usize));
    component.iter().for_each(|at| outside[place(*at)] = 0);
    let squared = squared_distance(&outside, block.size, [1.0; 3]);
    memory::collected(DEPTHS, component.iter().map(|at| squared[place(*at)].sqrt()))
}

/// The click that corrects an answer: the voxel deepest inside the largest error, one of them at
/// random if there are several; positive if the answer missed it. None if nothing is wrong.
pub fn click(rng: &mut impl Rng, errors: &Errors, size: [usize; 3]) -> Option<([i32; 3], bool)> {
    let component = largest_error(errors, size)?;
    let depths = depths(&component, size);
    let deepest = depths.iter().copied().fold(0.0, f32::max);
    let bottom = component.iter().zip(&depths).filter(|(_, d)| **d >= deepest);
    let all: Vec<usize> = memory::counted(ERROR, bottom.map(|(at, _)| *at));
    let at = all[rng.random_range(0..all.len())];
    Some((voxel(at, size), errors.is_missed(at)))
}

/// A short stroke that corrects an answer: the centreline of the largest error on its largest slice
/// along a random axis, at most 60 voxels, all on the object or all off it. A click if the error is
/// too thin; empty if nothing is wrong.
pub fn stroke(rng: &mut impl Rng, errors: &Errors, size: [usize; 3]) -> Vec<([i32; 3], bool)> {
    let Some(component) = largest_error(errors, size) else { return vec![] };
    let positive = errors.is_missed(component[0]);
    let same = component.iter().filter(|at| errors.is_missed(**at) == positive);
    let of_sign: Vec<[usize; 3]> =
        memory::counted(ERROR, same.map(|at| voxel(*at, size).map(|v| v as usize)));
    let axis = rng.random_range(0..3);
    let mut counts = memory::zeroed::<usize>(ERROR, size[axis]);
    of_sign.iter().for_each(|p| counts[p[axis]] += 1);
    let slice = (0..size[axis]).max_by_key(|s| counts[*s]).unwrap_or(0);
    let (u, v) = ([1, 0, 0][axis], [2, 2, 1][axis]);
    let mut region = memory::zeroed::<u8>(ERROR, size[u] * size[v]);
    of_sign.iter().filter(|p| p[axis] == slice).for_each(|p| region[p[u] * size[v] + p[v]] = 1);
    let drawn = scribbles(rng, &region, [size[u], size[v], 1], Kind::Centreline, 60);
    let place = |at: usize| {
        let mut p = [slice as i32; 3];
        (p[u], p[v]) = ((at / size[v]) as i32, (at % size[v]) as i32);
        (p, positive)
    };
    if drawn.is_empty() {
        // Too thin for a line: a click instead.
        return click(rng, errors, size).into_iter().collect();
    }
    drawn.into_iter().map(place).collect()
}
