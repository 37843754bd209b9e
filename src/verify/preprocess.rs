//! Preprocess cases: a scan in an odd orientation and spacing, brought to the network's grid step
//! by step.
//!
//! The reference resamples with ITK. Inside, both interpolate linearly between the same neighbours.
//! In the outermost layer a sample can be up to half a voxel beyond the last centre: both repeat
//! the edge there, so that layer is compared as well.

use super::{Archive, Check, VerifyError};
use crate::volume::intensity::Normalization;
use crate::volume::labels::Labels;
use crate::volume::patch::{Beyond, Extent, Patch};
use crate::volume::resample::{Interpolation, linear, resample, respaced};
use crate::volume::{Affine, Grid, Volume};
use std::path::Path;

pub fn run(path: &Path) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let beside = |what: &str| path.with_file_name(format!("{stem}_{what}.nii.gz"));
    let fail = |e: crate::volume::VolumeError| archive.error(e.to_string());
    let image = Volume::read(&beside("image"), None).map_err(fail)?;
    let labels = Labels::read(&beside("label"), &image.grid).map_err(fail)?.joined();
    let target = archive.number("target_label")? as u32;
    let edge = archive.number("crop")? as usize;
    let clip = archive.json("intensity")?;
    let clip = |i: usize| {
        clip[i]
            .as_f64()
            .map(|v| v as f32)
            .ok_or_else(|| archive.error("metadata 'intensity' is not two numbers"))
    };
    let normalization = Normalization {
        clip: [clip(0)?, clip(1)?],
        mean: archive.number("mean")? as f32,
        sd: archive.number("std")? as f32,
    };

    let mut checks = vec![];
    // Compares within 1e-4 of the range.
    let mut values = |name: &str, got: &[f32]| -> Result<(), VerifyError> {
        let want = &archive.get(name)?.values;
        let (low, high) = want
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
        let worst = got.iter().zip(want).map(|(g, w)| (*g as f64 - w).abs());
        // Unlike f64::max, this keeps a NaN.
        let worst = worst.fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most });
        let error = if got.len() == want.len() {
            worst / (high - low).max(f64::MIN_POSITIVE)
        } else {
            f64::NAN
        };
        checks.push(Check::within(name, error, 1e-4));
        Ok(())
    };
    let canonical = image.grid.canonical();
    let to_canonical =
        |data: &[f32]| resample(data, &image.grid, &canonical, Interpolation::Nearest, f32::NAN);
    let image_canonical = to_canonical(&image.values());
    values("canonical.image", &image_canonical)?;

    let grid = respaced(&canonical, 1.0);
    let label: Vec<f32> = labels.iter().map(|l| *l as f32).collect();
    let label_canonical = to_canonical(&label);
    let image_resampled =
        resample(&image_canonical, &canonical, &grid, linear(image.description.whole), 0.0);
    let label_resampled =
        resample(&label_canonical, &canonical, &grid, Interpolation::Nearest, 0.0);
    values("resampled.image", &image_resampled)?;
    values("resampled.label", &label_resampled)?;

    // The patch is centred on the target's bounding box.
    let extent = bounding(&label_resampled, grid.size, target as f32);
    let extent =
        extent.ok_or_else(|| archive.error(format!("no resampled voxel has label {target}")))?;
    // The way a session does it: straight from the scan to the patch.
    let patch = Patch::place(&image.grid, edge, 1.0, &on(&image.grid, &grid, &extent));
    let crop = |data: &[f32]| resample(data, &grid, &patch.grid, Interpolation::Nearest, 0.0);
    values("crop.image", &crop(&image_resampled))?;
    let is_target: Vec<f32> =
        label_resampled.iter().map(|l| f32::from(u8::from(*l == target as f32))).collect();
    values("crop.label", &crop(&is_target))?;
    values("normalized.image", &patch.extract(&image, &normalization, Beyond::Zero))?;
    for (name, grid) in [
        ("canonical.affine", &canonical),
        ("resampled.affine", &grid),
        ("crop.affine", &patch.grid),
    ] {
        let want = &archive.get(name)?.values;
        let rows: Vec<[f64; 4]> =
            want.chunks_exact(4).take(3).map(|r| [r[0], r[1], r[2], r[3]]).collect();
        let want = <[[f64; 4]; 3]>::try_from(rows)
            .map_err(|_| archive.error(format!("{name} is not a 4x4 matrix")))?;
        let error = grid.affine.distance(&Affine(want), grid.size);
        checks.push(Check::within(format!("{name} in mm"), error, 1e-3));
    }
    Ok(checks)
}

/// The extent of the voxels that hold `label`.
fn bounding(data: &[f32], [_, nj, nk]: [usize; 3], label: f32) -> Option<Extent> {
    let (mut low, mut high) = ([f64::INFINITY; 3], [f64::NEG_INFINITY; 3]);
    for (at, _) in data.iter().enumerate().filter(|(_, v)| **v == label) {
        for (d, index) in [at / nk / nj, at / nk % nj, at % nk].into_iter().enumerate() {
            low[d] = low[d].min(index as f64 - 0.5);
            high[d] = high[d].max(index as f64 + 0.5);
        }
    }
    low[0].is_finite().then_some(Extent { low, high })
}

/// An extent on grid `from` as one on grid `to` with the same axes up to order and direction.
fn on(to: &Grid, from: &Grid, extent: &Extent) -> Extent {
    let map = to.affine.inverse().after(&from.affine);
    let (a, b) = (map.apply(extent.low), map.apply(extent.high));
    Extent {
        low: std::array::from_fn(|d| a[d].min(b[d])),
        high: std::array::from_fn(|d| a[d].max(b[d])),
    }
}
