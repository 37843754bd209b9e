//! From a scan with its label to a sample that the network learns from: an augmented, normalised
//! patch.

use crate::memory;
use crate::model::Config;
use crate::prompt::simulate::bounding_box;
use crate::session::{Intensities, fitted_spacing, intensities, normalization, working_spacing};
use crate::volume::intensity::Normalization;
use crate::volume::patch::{Beyond, Extent, Patch};
use crate::volume::resample::{Interpolation, sample};
use crate::volume::{Grid, Volume};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

/// The name of a resampled label in refusals of memory.
const LABEL: &str = "a label on another grid";

/// A patch to train or judge on, `[i][j][k]` of the model's edge.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Name of the case that it came from.
    pub name: String,
    /// Normalised intensities.
    pub image: Vec<f32>,
    /// 1 on the object.
    pub label: Vec<u8>,
}

/// Random changes to a training sample: the paper's, and for patches that fit the object, how much
/// larger than it they are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Augmentation {
    /// Probability of a flip along each axis.
    pub flip: f64,
    /// Probability of a zoom.
    pub zoom: f64,
    /// Smallest and largest factor of a zoom.
    pub zoom_range: [f64; 2],
    /// Probability of an intensity shift.
    pub shift: f64,
    /// Largest size of an intensity shift, in the scan's units (a part of the spread of scans
    /// without units).
    pub shift_range: f64,
    /// Smallest and largest edge of the patch, in longest sides of the object, if the patch fits
    /// the object.
    pub fit_range: [f64; 2],
    /// Probability that the patch shows a part of the object, 0.4 to 1.1 of its longest side long,
    /// if it fits the object: as a first look at a click may see it.
    pub close: f64,
    /// Largest displacement of the patch from the object's middle, in parts of its edge, if it fits
    /// the object.
    pub wander: f64,
    /// Probability that the scan is continued by its border values, as sessions do, and not by
    /// zeros.
    pub edge: f64,
}

impl Default for Augmentation {
    fn default() -> Augmentation {
        Augmentation {
            flip: 0.5,
            zoom: 0.8,
            zoom_range: [0.85, 1.25],
            shift: 0.5,
            shift_range: 20.0,
            fit_range: [1.2, 3.5],
            close: 0.0,
            wander: 0.12,
            edge: 0.0,
        }
    }
}

/// The extent of the object that a label `[i][j][k]` marks, in voxels of the scan; none if it is
/// empty.
pub fn extent(label: &[u8], grid: &Grid) -> Option<Extent> {
    Some(Extent::of_box(bounding_box(label, grid.size)?.map(|v| v as usize)))
}

/// A label resampled to another grid by trilinear interpolation: 1 from one half on.
pub fn label_on(to: &Grid, label: &[u8], grid: &Grid) -> Vec<u8> {
    let wide: Vec<f32> =
        memory::collected(LABEL, label.iter().map(|l| f32::from(u8::from(*l != 0))));
    let to_image = grid.affine.inverse().after(&to.affine);
    let [ni, nj, nk] = to.size;
    let mut out = memory::list(LABEL, to.voxels());
    for (i, j) in (0..ni).flat_map(|i| (0..nj).map(move |j| (i, j))) {
        for k in 0..nk {
            let at = to_image.apply([i as f64, j as f64, k as f64]);
            out.push(u8::from(
                sample(&wide, grid.size, at, Interpolation::Linear).is_some_and(|v| v >= 0.5),
            ));
        }
    }
    out
}

/// The patch that evaluation and use place on an object: centred on it, fitted if the model fits,
/// otherwise at the model's spacing.
pub fn place(config: &Config, grid: &Grid, extent: &Extent) -> Patch {
    Patch::place(grid, config.patch, working_spacing(config, grid, Some(extent)), extent)
}

/// A sample as evaluation sees it, centred on the object and without augmentation; none if the
/// label is empty.
pub fn centred(config: &Config, name: &str, image: &Volume, label: &[u8]) -> Option<Sample> {
    let extent = extent(label, &image.grid)?;
    let patch = place(config, &image.grid, &extent);
    let values = patch.extract(image, &normalization(image, config.intensity), Beyond::Zero);
    Some(Sample {
        name: name.into(),
        image: values,
        label: label_on(&patch.grid, label, &image.grid),
    })
}

/// A random sample of a scan. Without fitting, the patch is centred on a random voxel of the
/// object, as the paper does. None if the patch shows nothing of the object.
pub fn random(
    rng: &mut impl Rng,
    config: &Config,
    a: &Augmentation,
    name: &str,
    image: &Volume,
    label: &[u8],
) -> Option<Sample> {
    let whole = extent(label, &image.grid)?;
    let zoom = if rng.random_bool(a.zoom) {
        rng.random_range(a.zoom_range[0]..=a.zoom_range[1])
    } else {
        1.0
    };
    let (mut centre, spacing) = match config.fit {
        Some(_) => {
            let range =
                if a.close > 0.0 && rng.random_bool(a.close) { [0.4, 1.1] } else { a.fit_range };
            let fit = rng.random_range(range[0].ln()..=range[1].ln()).exp();
            let spacing = fitted_spacing(&whole, &image.grid, config.patch, fit);
            let field = spacing * config.patch as f64 * a.wander;
            let step = image.grid.spacing();
            let middle: [f64; 3] = std::array::from_fn(|d| {
                (whole.low[d] + whole.high[d]) / 2.0
                    + rng.random_range(-1.0..=1.0) * field / step[d]
            });
            (middle, spacing)
        }
        None => {
            let voxels: Vec<usize> =
                memory::counted(LABEL, (0..label.len()).filter(|&v| label[v] != 0));
            let at = voxels[rng.random_range(0..voxels.len())];
            let [_, nj, nk] = image.grid.size;
            ([at / (nj * nk), at / nk % nj, at % nk].map(|v| v as f64), config.spacing as f64)
        }
    };
    centre
        .iter_mut()
        .enumerate()
        .for_each(|(d, c)| *c = c.clamp(0.0, image.grid.size[d] as f64 - 1.0));
    let point = Extent { low: centre.map(|c| c - 0.5), high: centre.map(|c| c + 0.5) };
    // A larger object corresponds to a smaller spacing.
    let patch = Patch::place(&image.grid, config.patch, spacing / zoom, &point);
    let Intensities { normalization: mut norm, modality, .. } =
        intensities(image, config.intensity);
    if rng.random_bool(a.shift) {
        let units = config.intensity.is_some_and(|i| i.applies_to(modality));
        let size = if units { a.shift_range } else { 0.2 * norm.sd as f64 };
        // Shifting the values up is the same as shifting the window down.
        let by = rng.random_range(-size..=size) as f32;
        norm = Normalization { clip: norm.clip.map(|c| c - by), mean: norm.mean - by, ..norm };
    }
    let beyond = if a.edge > 0.0 && rng.random_bool(a.edge) { Beyond::Edge } else { Beyond::Zero };
    let mut sample = Sample {
        name: name.into(),
        image: patch.extract(image, &norm, beyond),
        label: label_on(&patch.grid, label, &image.grid),
    };
    for axis in 0..3 {
        if rng.random_bool(a.flip) {
            flip(&mut sample.image, config.patch, axis);
            flip(&mut sample.label, config.patch, axis);
        }
    }
    sample.label.contains(&1).then_some(sample)
}

/// Reverses a cube along an axis.
fn flip<T>(values: &mut [T], edge: usize, axis: usize) {
    let stride = [edge * edge, edge, 1][axis];
    for block in values.chunks_exact_mut(stride * edge) {
        for at in 0..edge / 2 {
            for inner in 0..stride {
                block.swap(at * stride + inner, (edge - 1 - at) * stride + inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn flipping_twice_changes_nothing_and_once_mirrors() {
        let cube: Vec<usize> = (0..27).collect();
        for axis in 0..3 {
            let mut flipped = cube.clone();
            super::flip(&mut flipped, 3, axis);
            let stride = [9, 3, 1][axis];
            assert_eq!(flipped[0], 2 * stride);
            super::flip(&mut flipped, 3, axis);
            assert_eq!(flipped, cube);
        }
    }
}
