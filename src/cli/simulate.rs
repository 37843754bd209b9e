//! `prism simulate`: every stage of the simulated prompts, as images to look at.

use super::{Failure, number, say, warn};
use crate::data::cases::TargetLabel;
use crate::memory;
use crate::output::make_folder;
use crate::picture::Picture;
use crate::prompt::simulate::{
    Errors, Kind, bounding_box, drawn_box, generator, points, scribble, scribbles,
};
use crate::volume::labels::Labels;
use crate::volume::{Volume, write_mask};
use clap::Args;
use std::path::{Path, PathBuf};

/// Draw the prompts of a simulated user and write every stage
///
/// The stages are error regions, box, points, and for scribbles the lines, the lines with gaps, and
/// the warped result. They are written as label images on the scan's grid and as one picture.
#[derive(Args)]
pub struct Simulate {
    /// Scan
    #[arg(short, long, value_name = "FILE|FOLDER")]
    image: PathBuf,
    /// Label image of the scan
    #[arg(short, long, visible_alias = "truth", value_name = "FILE")]
    label: PathBuf,
    /// Mask to correct; without one the points are those of a first iteration
    #[arg(long, alias = "prediction", short_alias = 'p', value_name = "FILE")]
    mask: Option<PathBuf>,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Object: a label value, a structure's name, or 'any'
    #[arg(long, default_value = "any", value_name = "any|N|NAME")]
    target: TargetLabel,
    /// Points to draw
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = number(0, 10_000))]
    points: usize,
    /// Maximum number of voxels by which each side of the box grows, at random
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = number(0, 10_000))]
    box_growth: usize,
    /// Voxels by which the sides of the box are moved out, or in if negative
    #[arg(long, default_value_t = 0, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-10_000..=10_000))]
    box_shift: i32,
    /// Most voxels of a scribble
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = number(0, 10_000_000))]
    scribble_limit: usize,
    /// Seed
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
}

/// The name of the stages in refusals of memory.
const STAGES: &str = "stages of prompts";
const MISSED: [u8; 3] = [40, 160, 255];
const EXCESS: [u8; 3] = [255, 120, 40];
const POSITIVE: [u8; 3] = [40, 230, 90];
const NEGATIVE: [u8; 3] = [255, 60, 60];
const BOX: [u8; 3] = [255, 214, 0];

impl Simulate {
    pub fn run(&self) -> Result<(), Failure> {
        let image = Volume::read(&self.image, None)?;
        image.warnings.iter().for_each(|w| warn(&format!("{}: {w}", self.image.display())));
        let read = |path: &Path| -> Result<Vec<u8>, Failure> {
            let labels = Labels::beside(path, &image)?;
            let several = labels.several("--target").filter(|_| self.target == TargetLabel::Any);
            labels
                .warnings
                .iter()
                .chain(&several)
                .for_each(|w| warn(&format!("{}: {w}", path.display())));
            Ok(labels.mask(&self.target)?)
        };
        let label = read(&self.label)?;
        let prediction = self.mask.as_deref().map(read).transpose()?;
        let size = image.grid.size;
        make_folder(&self.output)
            .map_err(|e| Failure::Failed(format!("{}: {e}", self.output.display())))?;
        let errors = Errors::of(&label, prediction.as_deref());
        let [missed, excess] = [errors.missed(), errors.excess()];
        let mut report =
            format!("missed {} voxels, {} in excess\n", count_of(&missed, 1), count_of(&excess, 1));
        let mut files: Vec<(String, Vec<u8>)> = vec![
            ("missed".into(), memory::copied(STAGES, &missed)),
            ("excess".into(), memory::copied(STAGES, &excess)),
        ];

        let mut rng = generator(self.seed, &[0]);
        let flat =
            |p: [i32; 3]| (p[0] as usize * size[1] + p[1] as usize) * size[2] + p[2] as usize;
        let given = points(&mut rng, &errors, size, self.points);
        let mut dots = memory::zeroed::<u8>(STAGES, label.len());
        given.iter().for_each(|(p, positive)| dots[flat(*p)] = if *positive { 1 } else { 2 });
        report +=
            &format!("points: {} positive, {} negative\n", count_of(&dots, 1), count_of(&dots, 2));
        files.push(("points".into(), memory::copied(STAGES, &dots)));

        let bounds = drawn_box(&mut rng, &label, size, self.box_growth, self.box_shift);
        match bounds {
            Some(b) => {
                report +=
                    &format!("box: {b:?} (tight: {:?})\n", bounding_box(&label, size).unwrap_or(b));
                let inside = |at: usize| {
                    let v = [at / (size[1] * size[2]), at / size[2] % size[1], at % size[2]]
                        .map(|v| v as i32);
                    u8::from((0..3).all(|d| v[d] >= b[d] && v[d] < b[d + 3]))
                };
                files.push(("box".into(), memory::collected(STAGES, (0..label.len()).map(inside))));
            }
            None => report += "box: none, the label is empty\n",
        }

        let mut pictures = vec![dots];
        for (kind, name) in
            [(Kind::Centreline, "centreline"), (Kind::Line, "line"), (Kind::Contour, "contour")]
        {
            let mut whole = memory::zeroed::<u8>(STAGES, label.len());
            for (region, value) in [(&missed, 1u8), (&excess, 2)] {
                // Drawn twice from the same place of the generator: once to show the stages, once
                // as a user gives them.
                let place = [1 + kind as u64, u64::from(value)];
                for stages in scribble::draw(&mut generator(self.seed, &place), region, size, kind)
                {
                    for (stage, part) in [
                        ("drawn", &stages.drawn),
                        ("broken", &stages.broken),
                        ("warped", &stages.warped),
                    ] {
                        let name = format!("{name}_{stage}");
                        let at = files.iter().position(|f| f.0 == name).unwrap_or_else(|| {
                            files.push((name, memory::zeroed(STAGES, label.len())));
                            files.len() - 1
                        });
                        (0..part.len())
                            .filter(|&p| part[p] != 0)
                            .for_each(|p| files[at].1[p * size[2] + stages.slice] = value);
                    }
                }
                let voxels = scribbles(
                    &mut generator(self.seed, &place),
                    region,
                    size,
                    kind,
                    self.scribble_limit,
                );
                voxels.into_iter().for_each(|at| whole[at] = value);
            }
            report += &format!(
                "{name}: {} positive, {} negative voxels\n",
                count_of(&whole, 1),
                count_of(&whole, 2)
            );
            pictures.push(whole);
        }
        for (name, mask) in &files {
            let path = self.output.join(format!("{name}.nii.gz"));
            write_mask(&path, &image, mask)?
                .commit()
                .map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
        }
        let path = self.output.join("stages.png");
        self.draw(&image, &label, &errors, bounds, &pictures)
            .write(&path)
            .map_err(Failure::Failed)?;
        say(&format!(
            "{report}{}: {} label images and stages.png\n",
            self.output.display(),
            files.len()
        ))
    }

    /// The slice with most of the error, once per kind of prompt: the error regions as tints,
    /// prompts as dots.
    fn draw(
        &self,
        image: &Volume,
        label: &[u8],
        errors: &Errors,
        bounds: Option<[i32; 6]>,
        prompts: &[Vec<u8>],
    ) -> Picture {
        let [ni, nj, nk] = image.grid.size;
        let wrong = |k: usize| {
            let at = |p: usize| p * nk + k;
            (0..ni * nj).filter(|p| errors.is_missed(at(*p)) || errors.is_excess(at(*p))).count()
        };
        let k = (0..nk).max_by_key(|&k| (wrong(k), nk - k)).unwrap_or(0);
        // Around the object, with a margin.
        let either = label.iter().enumerate().map(|(at, l)| l | u8::from(errors.is_excess(at)));
        let region: Vec<u8> = memory::collected(STAGES, either);
        let b = bounding_box(&region, image.grid.size)
            .unwrap_or([0, 0, 0, ni as i32, nj as i32, nk as i32]);
        let margin = ((b[3] - b[0]).max(b[4] - b[1]) / 4).max(8);
        let low = [b[0] - margin, b[1] - margin].map(|v| v.max(0) as usize);
        let high =
            [(b[3] + margin).min(ni as i32) as usize, (b[4] + margin).min(nj as i32) as usize];
        let (width, height) = (high[0] - low[0], high[1] - low[1]);
        let scale = (380 / width.max(height)).max(1);
        let names = ["points and box", "centreline", "line", "contour"];
        let (step, top) = (width * scale + 8, 22);
        let mut picture = Picture::new(step * prompts.len() - 8, height * scale + top, [24; 3]);
        let mut shown: Vec<f32> = memory::list(STAGES, width * height);
        shown.extend(
            (low[0]..high[0])
                .flat_map(|i| (low[1]..high[1]).map(move |j| (i, j)))
                .map(|(i, j)| image.at([i, j, k])),
        );
        shown.sort_unstable_by(f32::total_cmp);
        let (dark, bright) = (shown[shown.len() / 100], shown[shown.len() * 99 / 100]);
        // As radiologists look at it: the patient's right on the left, front at the top.
        let o = crate::volume::Orientation::of(&image.grid.affine);
        let flips = [!o.flipped[0] && o.axes[0] == 0, !o.flipped[1] && o.axes[1] == 1];
        for (panel, (prompts, name)) in prompts.iter().zip(names).enumerate() {
            picture.text(name, panel * step + 4, 6, 1, [255; 3]);
            for y in 0..height * scale {
                for x in 0..width * scale {
                    let place = |at: usize, length: usize, flip: bool| {
                        if flip { length - 1 - at / scale } else { at / scale }
                    };
                    let (i, j) =
                        (low[0] + place(x, width, flips[0]), low[1] + place(y, height, flips[1]));
                    let at = (i * nj + j) * nk + k;
                    let g = ((image.at([i, j, k]) - dark) / (bright - dark).max(1e-6) * 255.0)
                        .clamp(0.0, 255.0) as u8;
                    let (px, py) = (panel * step + x, top + y);
                    picture.set(px, py, [g; 3]);
                    match (errors.is_missed(at), errors.is_excess(at)) {
                        (true, _) => picture.blend(px, py, MISSED, 0.25),
                        (_, true) => picture.blend(px, py, EXCESS, 0.3),
                        _ => {}
                    }
                    let edge = |b: [i32; 6]| {
                        let (i, j, k) = (i as i32, j as i32, k as i32);
                        let inside =
                            i >= b[0] && i < b[3] && j >= b[1] && j < b[4] && k >= b[2] && k < b[5];
                        inside && (i == b[0] || i + 1 == b[3] || j == b[1] || j + 1 == b[4])
                    };
                    if panel == 0 && bounds.is_some_and(edge) {
                        picture.blend(px, py, BOX, 0.6);
                    }
                    match prompts[at] {
                        1 => picture.set(px, py, POSITIVE),
                        2 => picture.set(px, py, NEGATIVE),
                        _ => {}
                    }
                }
            }
        }
        picture
    }
}

fn count_of(mask: &[u8], value: u8) -> usize {
    mask.iter().filter(|v| **v == value).count()
}
