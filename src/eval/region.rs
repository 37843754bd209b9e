//! The resampled surroundings of an object, seen through one patch or, if it is larger, through
//! overlapping windows whose logits are averaged.

use super::result::{CaseResult, Tally};
use crate::data::sample::{extent, label_on, place};
use crate::memory;
use crate::model::{Features, Model, Observer, PatchPrompts, prompt_maps};
use crate::prompt::simulate::{Errors, User};
use crate::session::normalization;
use crate::tensor::{OpError, Tensor};
use crate::volume::patch::{Beyond, Extent, Patch};
use crate::volume::{Grid, Volume};
use rand_chacha::ChaCha8Rng;

/// The least overlap of windows, in voxels.
const OVERLAP: usize = 16;
/// The name of the answers of windows in refusals of memory.
const ANSWERS: &str = "answers of windows";
/// The logit of voxels that no window has answered for yet.
const UNSEEN: f32 = -8.0;

/// A window on the region.
struct Window {
    /// The window's first voxel in the region.
    start: [usize; 3],
    features: Features,
}

/// The surroundings of an object, resampled to the network's spacing and encoded.
pub struct Region {
    grid: Grid,
    label: Vec<u8>,
    windows: Vec<Window>,
}

/// The first voxels of windows of `edge` over `length` voxels, evenly spread, overlapping by at
/// least [`OVERLAP`].
fn starts(length: usize, edge: usize) -> Vec<usize> {
    if length <= edge {
        return vec![0];
    }
    let count = (length - OVERLAP).div_ceil(edge - OVERLAP);
    (0..count).map(|n| n * (length - edge) / (count - 1)).collect()
}

impl Region {
    /// Resamples the surroundings of the object that `label` `[i][j][k]` marks, and encodes every
    /// window.
    ///
    /// # Errors
    /// The label is empty, or the network fails; as text.
    pub fn new(model: &Model, image: &Volume, label: &[u8]) -> Result<Region, String> {
        let (config, edge) = (model.config(), model.config().patch);
        let whole = extent(label, &image.grid).ok_or("the label is empty")?;
        let centre: [f64; 3] = std::array::from_fn(|a| (whole.low[a] + whole.high[a]) / 2.0);
        // A patch about the middle gives the lattice; the object's faces on it determine how many
        // windows are needed.
        let spacing = if config.fit.is_some() {
            place(config, &image.grid, &whole).spacing
        } else {
            config.spacing as f64
        };
        let middle =
            Patch::place(&image.grid, edge, spacing, &Extent { low: centre, high: centre });
        let (a, b) = (middle.from_image.apply(whole.low), middle.from_image.apply(whole.high));
        let mut first = [0i64; 3];
        let mut size = [edge; 3];
        for d in 0..3 {
            let (low, high) =
                ((a[d].min(b[d]) + 0.5).floor() as i64, (a[d].max(b[d]) + 0.5).ceil() as i64);
            if high - low > edge as i64 {
                (first[d], size[d]) = (low, (high - low) as usize);
            }
        }
        let shifted = |start: [i64; 3]| -> Grid {
            let mut affine = middle.grid.affine;
            let origin = affine.apply(start.map(|v| v as f64));
            (0..3).for_each(|r| affine.0[r][3] = origin[r]);
            Grid { size: [edge; 3], affine }
        };
        let grid = Grid { size, ..shifted(first) };
        let norm = normalization(image, config.intensity);
        let mut windows = vec![];
        for i in starts(size[0], edge) {
            for j in starts(size[1], edge) {
                for k in starts(size[2], edge) {
                    let start = [i, j, k];
                    let at = shifted(std::array::from_fn(|d| first[d] + start[d] as i64));
                    let from_image = at.affine.inverse().after(&image.grid.affine);
                    let patch = Patch { grid: at, from_image, ..middle.clone() };
                    let values = Tensor::new([edge; 3], patch.extract(image, &norm, Beyond::Zero));
                    let features =
                        model.encode(&values, &mut Observer::none()).map_err(|e| e.to_string())?;
                    windows.push(Window { start, features });
                }
            }
        }
        let label = label_on(&grid, label, &image.grid);
        Ok(Region { grid, label, windows })
    }

    /// Lets a simulated user segment the object in some iterations.
    ///
    /// # Errors
    /// The network fails; as text.
    pub fn run(
        &self,
        model: &Model,
        case: &str,
        user: &User,
        iterations: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<CaseResult, String> {
        let size = self.grid.size;
        let bounds = user.bounds(rng, &self.label, size);
        let mut history: Vec<([i32; 3], bool)> = vec![];
        let mut logits: Option<Vec<f32>> = None;
        let mut tally = Tally::new(&self.label, &self.grid);
        for _ in 0..iterations {
            let mask = logits.as_deref().map(crate::train::interactive::mask);
            let errors = Errors::of(&self.label, mask.as_deref());
            if logits.is_some() && errors.is_empty() {
                tally.repeat();
                continue;
            }
            let points = model.device().cpu().run(|| user.correct(rng, &errors, size));
            history.extend(&points);
            let answer = self
                .interact(model, &points, bounds, &history, logits.as_deref())
                .map_err(|e| e.to_string())?;
            tally.add(crate::train::interactive::mask(&answer));
            logits = Some(answer);
        }
        Ok(tally.finish(case, self.windows.len()))
    }

    /// One iteration over all windows. A window without prompts keeps its previous answer.
    fn interact(
        &self,
        model: &Model,
        points: &[([i32; 3], bool)],
        bounds: Option<[i32; 6]>,
        history: &[([i32; 3], bool)],
        previous: Option<&[f32]>,
    ) -> Result<Vec<f32>, OpError> {
        let ([_, nj, nk], edge) = (self.grid.size, model.config().patch);
        let mut sum = memory::zeroed::<f32>(ANSWERS, self.label.len());
        let mut count = memory::zeroed::<u16>(ANSWERS, self.label.len());
        for window in &self.windows {
            let local = |p: [i32; 3]| -> Option<[i32; 3]> {
                let q: [i32; 3] = std::array::from_fn(|d| p[d] - window.start[d] as i32);
                q.iter().all(|v| (0..edge as i32).contains(v)).then_some(q)
            };
            let voxels =
                || (0..edge * edge * edge).map(|v| [v / (edge * edge), v / edge % edge, v % edge]);
            let at = |v: [usize; 3]| {
                ((v[0] + window.start[0]) * nj + v[1] + window.start[1]) * nk
                    + v[2]
                    + window.start[2]
            };
            let inside: Vec<([i32; 3], bool)> =
                points.iter().filter_map(|(p, positive)| Some((local(*p)?, *positive))).collect();
            let bounds = bounds.and_then(|b| {
                let clip =
                    |v: i32, d: usize| (v - window.start[d % 3] as i32).clamp(0, edge as i32);
                let b: [i32; 6] = std::array::from_fn(|n| clip(b[n], n));
                (0..3).all(|d| b[d] < b[d + 3]).then(|| b.map(|v| v as f32))
            });
            let dense: Vec<f32> =
                memory::collected(ANSWERS, voxels().map(|v| previous.map_or(0.0, |p| p[at(v)])));
            let logits = if inside.is_empty() && bounds.is_none() {
                match previous {
                    Some(_) => dense,
                    None => memory::filled(ANSWERS, UNSEEN, dense.len()),
                }
            } else {
                let history: Vec<_> = history
                    .iter()
                    .filter_map(|(p, positive)| Some((local(*p)?, *positive)))
                    .collect();
                let maps = prompt_maps(model.device(), edge, &history);
                let prompts = PatchPrompts { points: inside, bounds };
                let answer = model.interact(
                    &window.features,
                    &prompts,
                    &Tensor::new([edge; 3], dense),
                    &maps,
                    &mut Observer::none(),
                )?;
                memory::copied(ANSWERS, answer.logits.try_data()?)
            };
            for (v, logit) in voxels().zip(logits) {
                sum[at(v)] += logit;
                count[at(v)] += 1;
            }
        }
        sum.iter_mut().zip(count).for_each(|(s, c)| *s /= f32::from(c.max(1)));
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::{OVERLAP, starts};

    #[test]
    fn windows_cover_everything_and_overlap() {
        for length in [1, 64, 65, 112, 113, 200, 401] {
            let list = starts(length, 64);
            assert_eq!(list[0], 0);
            assert!(length <= 64 && list.len() == 1 || *list.last().unwrap() == length - 64);
            assert!(
                list.windows(2).all(|p| p[1] > p[0] && p[1] - p[0] <= 64 - OVERLAP),
                "{length}: {list:?}"
            );
        }
    }
}
