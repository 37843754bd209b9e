//! The normalisation of a scan's values for the network: clip, subtract the mean, divide by the
//! standard deviation; and the modality that a scan's values suggest.

use super::Voxels;
use crate::memory;
use serde::{Deserialize, Serialize};

/// The modality of a scan, as far as it matters to how its values are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// X-rays: values are Hounsfield units.
    Ct,
    /// Magnetic resonance: values have no unit.
    Mr,
    /// A tracer: values are activities or uptakes. Normalised as an MR is: networks that learned so
    /// do no better by the statistics of CT or a window up to the maximum.
    Pet,
}

/// The Hounsfield units below which there is only fat and air, and the least part of a CT that they
/// make up: any other scan has no such values, or a few stray ones, as resampling by splines leaves
/// them.
const FAT: f32 = -50.0;
const LEAST_FAT: f64 = 0.005;
/// Most of a PET is dim compared with its hottest part: its median is below this part of the 99.5th
/// percentile (0.01 to 0.10 in 41 scans; 0.23 to 0.75 in 42 MR), and of the values that are not
/// background (5 % of the 99.9th percentile and more) less than this part is above a quarter of it
/// (0.02 to 0.40; 0.39 to 0.96).
const DIM: f32 = 0.15;
const LEAST_BRIGHT: f64 = 0.4;

impl Modality {
    /// The modality's short name: `CT`, `MR` or `PET`.
    pub fn name(self) -> &'static str {
        match self {
            Modality::Ct => "CT",
            Modality::Mr => "MR",
            Modality::Pet => "PET",
        }
    }

    /// The modality that the distribution of a scan's values suggests, and the reason, as text for
    /// people. Reads all values.
    pub fn of(image: &impl Voxels) -> (Modality, String) {
        let mut low = 0u64;
        match image.array().counts() {
            Some(counts) => {
                low = counts.iter().take_while(|(v, _)| *v <= FAT).map(|(_, n)| n).sum()
            }
            None => image.array().each(|v| low += u64::from(v <= FAT)),
        }
        let all: usize = image.array().size().iter().product();
        let part = low as f64 / all.max(1) as f64;
        if part >= LEAST_FAT {
            return (Modality::Ct, format!("{:.1} % of its values are below {FAT}", 100.0 * part));
        }
        let mut values = Above::of(image);
        let (median, high, top) =
            (values.quantile(0.5), values.quantile(0.995), values.quantile(0.999));
        let count = |limit: f32| values.sum(|v| f64::from(u8::from(v > limit * top)));
        let bright = count(0.25) / count(0.05).max(1.0);
        if median < DIM * high && bright < LEAST_BRIGHT {
            return (
                Modality::Pet,
                format!(
                    "most values are low compared with a few bright regions: its median is {median:.3}, its 99.9th percentile {top:.3}"
                ),
            );
        }
        (
            Modality::Mr,
            format!(
                "it has no air or fat in Hounsfield units, {:.2} % of its values are below {FAT}",
                100.0 * part
            ),
        )
    }
}

/// The distribution of the values of a scan above its lowest one, which is usually the background.
enum Above {
    /// Each value with the number of its occurrences, from the lowest on.
    Counted(Vec<(f32, u64)>),
    /// One by one, in any order.
    Listed(Vec<f32>),
}

impl Above {
    fn of(image: &impl Voxels) -> Above {
        let lowest = image.array().lowest();
        if let Some(counts) = image.array().counts() {
            return Above::Counted(counts.iter().copied().filter(|(v, _)| *v > lowest).collect());
        }
        let mut count = 0;
        image.array().each(|v| count += usize::from(v > lowest));
        let mut values = memory::list("values above the background", count);
        image.array().each(|v| {
            if v > lowest {
                values.push(v);
            }
        });
        Above::Listed(values)
    }

    /// The number of values.
    fn len(&self) -> u64 {
        match self {
            Above::Counted(counts) => counts.iter().map(|(_, n)| n).sum(),
            Above::Listed(values) => values.len() as u64,
        }
    }

    /// A quantile; 0 if there are no values.
    fn quantile(&mut self, q: f64) -> f32 {
        let Some(last) = self.len().checked_sub(1) else { return 0.0 };
        let at = (last as f64 * q).round() as u64;
        match self {
            Above::Counted(counts) => {
                let mut before = 0;
                let reaches = |(_, n): &&(f32, u64)| {
                    before += n;
                    before > at
                };
                counts.iter().find(reaches).map_or(0.0, |(v, _)| *v)
            }
            Above::Listed(values) => *values.select_nth_unstable_by(at as usize, f32::total_cmp).1,
        }
    }

    /// The sum of `f` over all values.
    fn sum(&self, f: impl Fn(f32) -> f64) -> f64 {
        match self {
            Above::Counted(counts) => counts.iter().map(|(v, n)| f(*v) * *n as f64).sum(),
            Above::Listed(values) => values.iter().map(|v| f(*v)).sum(),
        }
    }
}

/// How a scan's values are normalised: clipped, then shifted and scaled.
///
/// [`session::normalization`](crate::session::normalization) makes the one that fits a model and a
/// scan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Values are clipped to this range first.
    pub clip: [f32; 2],
    /// The mean, which is subtracted from the clipped value.
    pub mean: f32,
    /// The standard deviation, by which the difference is divided; above 0.
    pub sd: f32,
}

impl Normalization {
    /// The normalised value, `(v clipped - mean) / sd`.
    pub fn apply(&self, v: f32) -> f32 {
        (v.clamp(self.clip[0], self.clip[1]) - self.mean) / self.sd
    }

    /// A normalisation by the scan's own values: clipped to the 0.5 and 99.5 percentiles of the
    /// values above the lowest one (usually the background), with the mean and standard deviation
    /// of the clipped values. For scans whose units mean nothing by themselves, such as MR.
    pub fn of_percentiles(image: &impl Voxels) -> Normalization {
        let (lowest, mut values) = (image.array().lowest(), Above::of(image));
        let count = values.len() as f64;
        if count == 0.0 {
            return Normalization { clip: [lowest - 1.0, lowest + 1.0], mean: lowest, sd: 1.0 };
        }
        let (low, high) = (values.quantile(0.005), values.quantile(0.995));
        let (low, high) = if low < high { (low, high) } else { (low - 1.0, high + 1.0) };
        let clipped = |v: f32| v.clamp(low, high) as f64;
        let mean = values.sum(clipped) / count;
        let variance = values.sum(|v| (clipped(v) - mean).powi(2)) / count;
        Normalization {
            clip: [low, high],
            mean: mean as f32,
            sd: (variance.sqrt() as f32).max(1e-6),
        }
    }
}
