//! From scanner units to network input: clip, subtract the mean, divide by the standard deviation.

use super::Voxels;

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
        let lowest = image.range()[0];
        let mut values = vec![];
        image.each(|v| {
            if v > lowest {
                values.push(v);
            }
        });
        if values.is_empty() {
            return Normalization { clip: [lowest - 1.0, lowest + 1.0], mean: lowest, sd: 1.0 };
        }
        let mut quantile = |q: f64| {
            let at = ((values.len() - 1) as f64 * q).round() as usize;
            *values.select_nth_unstable_by(at, f32::total_cmp).1
        };
        let (low, high) = (quantile(0.005), quantile(0.995));
        let (low, high) = if low < high { (low, high) } else { (low - 1.0, high + 1.0) };
        let clipped = || values.iter().map(|v| v.clamp(low, high) as f64);
        let mean = clipped().sum::<f64>() / values.len() as f64;
        let variance = clipped().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        Normalization { clip: [low, high], mean: mean as f32, sd: (variance.sqrt() as f32).max(1e-6) }
    }
}
