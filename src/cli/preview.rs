//! A picture of the result: axial, coronal and sagittal planes through the object, its contour, the prompts, orientation letters.
//!
//! Planes are shown as radiologists look at them: the patient's right on the left of axial and coronal planes, anterior on the left of the
//! sagittal one.

use crate::picture::Picture;
use crate::prompt::Prompts;
use crate::session::field::Field;
use crate::volume::resample::{Interpolation, sample_of};
use crate::volume::{Affine, Volume};

/// Edge of a panel in pixels, and the gap between panels.
const PANEL: usize = 400;
const GAP: usize = 8;
/// The least and the most that a panel shows, in mm.
const VIEW: [f64; 2] = [60.0, 400.0];

/// The last answer's contour, and those of the answers before it, the latest first.
const CONTOUR: [u8; 3] = [255, 196, 0];
const EARLIER: [[u8; 3]; 3] = [[255, 110, 200], [180, 120, 255], [110, 130, 150]];
const POSITIVE: [u8; 3] = [40, 230, 90];
const NEGATIVE: [u8; 3] = [255, 70, 70];
const BOX: [u8; 3] = [80, 170, 255];

/// What is drawn beside the object, in voxels of the image.
pub struct Marks {
    points: Vec<([usize; 3], bool)>,
    bounds: Option<[usize; 6]>,
}

impl Marks {
    /// All prompts of all iterations.
    pub fn of(iterations: &[Prompts]) -> Marks {
        let points = iterations.iter().flat_map(|p| p.points.iter().copied()).collect();
        Marks { points, bounds: iterations.iter().rev().find_map(|p| p.bounds) }
    }
}

/// A plane: the canonical axes that run across and down the panel, the one through it, and the letters left, right, top, bottom.
struct Plane {
    across: usize,
    down: usize,
    through: usize,
    letters: [char; 4],
}

const PLANES: [Plane; 3] = [
    Plane { across: 0, down: 1, through: 2, letters: ['R', 'L', 'A', 'P'] },
    Plane { across: 0, down: 2, through: 1, letters: ['R', 'L', 'S', 'I'] },
    Plane { across: 1, down: 2, through: 0, letters: ['A', 'P', 'S', 'I'] },
];

/// Draws answers on their image: the last one's contour, and faintly those of up to three before it.
pub fn draw(image: &Volume, answers: &[&Field], marks: &Marks) -> Picture {
    let canonical = image.grid.canonical();
    let to_image = image.grid.affine.inverse().after(&canonical.affine);
    let from_image = canonical.affine.inverse().after(&image.grid.affine);
    let spacing = canonical.spacing();
    let (centre, reach) = focus(answers.last().copied(), marks, &from_image, canonical.size, spacing);
    let view = (reach * 1.8).clamp(VIEW[0], VIEW[1]);
    let mm = view / PANEL as f64;

    // Every pixel's value and which answers it is inside of, panel by panel; the last answer is bit 0.
    let mut grey = vec![f32::NAN; 3 * PANEL * PANEL];
    let mut inside = vec![0u8; 3 * PANEL * PANEL];
    let readers: Vec<_> = answers.iter().rev().take(1 + EARLIER.len()).map(|f| f.reader(8.0)).collect();
    let place = |plane: &Plane, x: f64, y: f64| -> [f64; 3] {
        let mut at = centre;
        // Left on the screen is the patient's right or front, top is front or head: both axes run against their world axis.
        at[plane.across] -= (x + 0.5 - PANEL as f64 / 2.0) * mm / spacing[plane.across];
        at[plane.down] -= (y + 0.5 - PANEL as f64 / 2.0) * mm / spacing[plane.down];
        at
    };
    for (p, plane) in PLANES.iter().enumerate() {
        for y in 0..PANEL {
            for x in 0..PANEL {
                let at = place(plane, x as f64, y as f64);
                let pixel = (p * PANEL + y) * PANEL + x;
                let at = to_image.apply(at);
                if let Some(v) = sample_of(|v| image.at(v), image.grid.size, at, Interpolation::Linear) {
                    grey[pixel] = v as f32;
                    inside[pixel] = readers.iter().enumerate().fold(0, |bits, (n, r)| bits | u8::from(r.sample(at) > 0.0) << n);
                }
            }
        }
    }
    let (low, high) = window(&grey);
    let mut picture = Picture::new(3 * PANEL + 2 * GAP, PANEL, [24; 3]);
    for (p, plane) in PLANES.iter().enumerate() {
        let left = p * (PANEL + GAP);
        let is_inside = |x: usize, y: usize, n: usize| inside[(p * PANEL + y) * PANEL + x] >> n & 1 == 1;
        let on_border = |x: usize, y: usize, n: usize| {
            let beside = [(x.wrapping_sub(1), y), (x + 1, y), (x, y.wrapping_sub(1)), (x, y + 1)];
            is_inside(x, y, n) && beside.into_iter().any(|(x, y)| x >= PANEL || y >= PANEL || !is_inside(x, y, n))
        };
        for y in 0..PANEL {
            for x in 0..PANEL {
                let v = grey[(p * PANEL + y) * PANEL + x];
                let g = if v.is_nan() { 0 } else { ((v - low) / (high - low) * 255.0).clamp(0.0, 255.0) as u8 };
                let contour = (0..readers.len()).find(|n| on_border(x, y, *n));
                let colour = contour.map(|n| if n == 0 { CONTOUR } else { EARLIER[n - 1] });
                picture.set(left + x, y, colour.unwrap_or([g; 3]));
            }
        }
        let pixel = |v: [f64; 3]| -> [f64; 2] {
            let x = -(v[plane.across] - centre[plane.across]) * spacing[plane.across] / mm;
            let y = -(v[plane.down] - centre[plane.down]) * spacing[plane.down] / mm;
            [x + PANEL as f64 / 2.0, y + PANEL as f64 / 2.0]
        };
        draw_marks(&mut picture, plane, left, marks, &from_image, centre, pixel);
        let middle = PANEL / 2 - 6;
        for (letter, (x, y)) in plane.letters.iter().zip([(6, middle), (PANEL - 18, middle), (middle, 6), (middle, PANEL - 20)]) {
            picture.text(&letter.to_string(), left + x, y, 2, [255; 3]);
        }
    }
    picture
}

/// Where to look, in canonical voxels, and how far the object reaches, in mm.
fn focus(answer: Option<&Field>, marks: &Marks, from_image: &Affine, size: [usize; 3], spacing: [f64; 3]) -> ([f64; 3], f64) {
    let within = |v: [f64; 3]| -> [f64; 3] { std::array::from_fn(|a| v[a].clamp(0.0, size[a] as f64 - 1.0)) };
    let mut object: Vec<[f64; 3]> = vec![];
    if let Some(field) = answer {
        let [_, nj, nk] = field.size();
        field.each(|at, logit| {
            if logit > 0.0 {
                object.push(from_image.apply([at / nk / nj, at / nk % nj, at % nk].map(|v| v as f64)));
            }
        });
    }
    // The prompts say where the object of interest is; an answer may have strayed.
    let said: Vec<[f64; 3]> = match marks.bounds {
        Some(b) => vec![from_image.apply([0, 1, 2].map(|a| (b[a] + b[a + 3]) as f64 / 2.0 - 0.5))],
        None => marks.points.iter().filter(|(_, p)| *p).map(|(v, _)| from_image.apply(v.map(|c| c as f64))).collect(),
    };
    let mean =
        |list: &[[f64; 3]]| -> [f64; 3] { std::array::from_fn(|a| list.iter().map(|v| v[a]).sum::<f64>() / list.len().max(1) as f64) };
    let centre = match (said.is_empty(), object.is_empty()) {
        (false, _) => mean(&said),
        (true, false) => mean(&object),
        (true, true) => size.map(|s| s as f64 / 2.0),
    };
    let mut reach = 0.0f64;
    if !object.is_empty() {
        for a in 0..3 {
            let along = || object.iter().map(|v| v[a]);
            reach = reach.max((along().fold(f64::NEG_INFINITY, f64::max) - along().fold(f64::INFINITY, f64::min) + 1.0) * spacing[a]);
        }
    }
    if let Some(b) = marks.bounds {
        let corners = [[b[0], b[1], b[2]], [b[3], b[4], b[5]]].map(|c| from_image.apply(c.map(|v| v as f64)));
        reach = (0..3).map(|a| (corners[0][a] - corners[1][a]).abs() * spacing[a]).fold(reach.min(1e9), f64::max);
    }
    (within(centre), reach)
}

/// The 1st and 99th percentile of what is shown.
fn window(grey: &[f32]) -> (f32, f32) {
    let mut shown: Vec<f32> = grey.iter().copied().filter(|v| !v.is_nan()).collect();
    if shown.is_empty() {
        return (0.0, 1.0);
    }
    shown.sort_unstable_by(f32::total_cmp);
    let at = |q: f64| shown[((shown.len() - 1) as f64 * q) as usize];
    let (low, high) = (at(0.01), at(0.99));
    if low < high { (low, high) } else { (low - 0.5, low + 0.5) }
}

fn draw_marks(
    picture: &mut Picture,
    plane: &Plane,
    left: usize,
    marks: &Marks,
    from_image: &Affine,
    centre: [f64; 3],
    pixel: impl Fn([f64; 3]) -> [f64; 2],
) {
    let mut put = |x: i64, y: i64, colour: [u8; 3]| {
        if (0..PANEL as i64).contains(&x) && (0..PANEL as i64).contains(&y) {
            picture.set(left + x as usize, y as usize, colour);
        }
    };
    if let Some(b) = marks.bounds {
        let corners = [[b[0], b[1], b[2]], [b[3], b[4], b[5]]].map(|c| from_image.apply(c.map(|v| v as f64 - 0.5)));
        let crosses = (corners[0][plane.through] - centre[plane.through]) * (corners[1][plane.through] - centre[plane.through]) <= 0.0;
        if crosses {
            let [a, c] = corners.map(|c| pixel(c).map(|v| v.round() as i64));
            for x in a[0].min(c[0])..=a[0].max(c[0]) {
                [a[1], c[1]].into_iter().for_each(|y| put(x, y, BOX));
            }
            for y in a[1].min(c[1])..=a[1].max(c[1]) {
                [a[0], c[0]].into_iter().for_each(|x| put(x, y, BOX));
            }
        }
    }
    // Many points are a scribble: dots, so that they do not hide the image.
    let arm = if marks.points.len() > 30 { 1 } else { 6 };
    for (voxel, positive) in &marks.points {
        let v = from_image.apply(voxel.map(|c| c as f64));
        if (v[plane.through] - centre[plane.through]).abs() > 0.75 {
            continue;
        }
        let [x, y] = pixel(v).map(|v| v.round() as i64);
        let colour = if *positive { POSITIVE } else { NEGATIVE };
        for d in -arm..=arm {
            put(x + d, y, colour);
            if *positive {
                put(x, y + d, colour);
            }
        }
    }
}
