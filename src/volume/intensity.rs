//! From scanner units to network input: clip, subtract the mean, divide by the standard deviation.

use super::Voxels;
use crate::memory;
use serde::{Deserialize, Serialize};

/// What a scan was made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// X-rays: values are Hounsfield units.
    Ct,
    /// Magnetic resonance: values have no unit.
    Mr,
    /// A tracer: values are activities or uptakes. Normalised as an MR is: networks that learned so do no better by the statistics of CT or a window up to the maximum.
    Pet,
}

/// Hounsfield units below which only fat and air lie, and the least part of a CT that they are: any other scan has no such values, or a stray few, as resampling by
/// splines leaves them.
const FAT: f32 = -50.0;
const LEAST_FAT: f64 = 0.005;
/// A PET's bulk is dim beside its hottest part: its median is below this part of the 99.5th percentile (0.01 to 0.10 in 41 scans; 0.23 to 0.75 in 42 MR), and of what is
/// not background (5 % of the 99.9th percentile and more) less than this part is above a quarter of it (0.02 to 0.40; 0.39 to 0.96).
const DIM: f32 = 0.15;
const LEAST_BRIGHT: f64 = 0.4;

impl Modality {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Modality::Ct => "CT",
            Modality::Mr => "MR",
            Modality::Pet => "PET",
        }
    }

    /// What the distribution of a scan's values looks like, and why.
    pub fn of(image: &impl Voxels) -> (Modality, String) {
        let (mut low, mut all) = (0usize, 0usize);
        image.each(|v| {
            low += usize::from(v <= FAT);
            all += 1;
        });
        let part = low as f64 / all.max(1) as f64;
        if part >= LEAST_FAT {
            return (Modality::Ct, format!("{:.1} % of its values are below {FAT}", 100.0 * part));
        }
        let mut values = above_lowest(image);
        let (median, high) = (quantile(&mut values, 0.5), quantile(&mut values, 0.995));
        let top = quantile(&mut values, 0.999);
        let count = |limit: f32| values.iter().filter(|v| **v > limit * top).count() as f64;
        let bright = count(0.25) / count(0.05).max(1.0);
        if median < DIM * high && bright < LEAST_BRIGHT {
            return (
                Modality::Pet,
                format!("most of it is dim beside a few bright parts: its median is {median:.3}, its 99.9th percentile {top:.3}"),
            );
        }
        (Modality::Mr, format!("it has no air or fat in Hounsfield units, {:.2} % of its values are below {FAT}", 100.0 * part))
    }
}

/// All values above the lowest one, which is the background of most scans.
fn above_lowest(image: &impl Voxels) -> Vec<f32> {
    let lowest = image.range()[0];
    let mut count = 0;
    image.each(|v| count += usize::from(v > lowest));
    let mut values = memory::list("values above the background", count);
    image.each(|v| {
        if v > lowest {
            values.push(v);
        }
    });
    values
}

/// The quantile of values, which are reordered; 0 of none.
fn quantile(values: &mut [f32], q: f64) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let at = ((values.len() - 1) as f64 * q).round() as usize;
    *values.select_nth_unstable_by(at, f32::total_cmp).1
}

/// The numbers of a normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Values are clipped to this range first.
    pub clip: [f32; 2],
    /// Subtracted.
    pub mean: f32,
    /// Divided by.
    pub sd: f32,
}

impl Normalization {
    /// Applies it to one value.
    pub fn apply(&self, v: f32) -> f32 {
        (v.clamp(self.clip[0], self.clip[1]) - self.mean) / self.sd
    }

    /// The 0.5 and 99.5 percentiles of the values above the lowest one (the background of most scans), with the mean and standard
    /// deviation of what they leave. For images whose units mean nothing by themselves, such as MR.
    pub fn of_percentiles(image: &impl Voxels) -> Normalization {
        let (lowest, mut values) = (image.range()[0], above_lowest(image));
        if values.is_empty() {
            return Normalization { clip: [lowest - 1.0, lowest + 1.0], mean: lowest, sd: 1.0 };
        }
        let (low, high) = (quantile(&mut values, 0.005), quantile(&mut values, 0.995));
        let (low, high) = if low < high { (low, high) } else { (low - 1.0, high + 1.0) };
        let clipped = || values.iter().map(|v| v.clamp(low, high) as f64);
        let mean = clipped().sum::<f64>() / values.len() as f64;
        let variance = clipped().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        Normalization { clip: [low, high], mean: mean as f32, sd: (variance.sqrt() as f32).max(1e-6) }
    }
}
