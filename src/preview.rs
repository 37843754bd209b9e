//! A picture of the result: axial, coronal and sagittal planes through the last prompt, or one of
//! them through any slice, with the object's contour and the prompts. Text (plane, slice,
//! directions, scale, window, spacing, colours) is written around the panels, so that nothing
//! covers the scan.
//!
//! Planes are shown as radiologists look at them: the patient's right on the left of axial and
//! coronal planes, anterior on the left of the sagittal one.

use crate::memory;
use crate::picture::{CHARACTER, Picture};
use crate::prompt::Prompts;
use crate::session::Said;
use crate::session::field::{Field, Reader};
use crate::volume::resample::{Interpolation, sample_of};
use crate::volume::{Affine, Grid, Orientation, Volume};
use rayon::prelude::*;

/// The edge of a panel in pixels, the margin on both sides of it, which holds a letter, and the gap
/// between panels with their margins.
const PANEL: usize = 400;
const MARGIN: usize = 24;
const GAP: usize = 8;
/// From the left of one panel to that of the next.
const STEP: usize = PANEL + 2 * MARGIN + GAP;
const WIDTH: usize = 3 * STEP - GAP;
/// The width of a picture of one panel.
const NARROW: usize = STEP - GAP;

/// Text is written at twice the font's size: 16 pixels from one character to the next, and from top
/// to bottom.
const SCALE: usize = 2;
const GLYPH: usize = CHARACTER * SCALE;
/// Tops of the rows of text above and below the panels, which begin at `TOP`.
const TITLES: usize = 8;
const UPPER: usize = 32;
const TOP: usize = 54;
const LOWER: usize = TOP + PANEL + 6;
const BARS: usize = LOWER + 24;
const VALUES: usize = BARS + 32;
const LEGEND: usize = VALUES + 26;
/// From one row of text at the font's own size to the next.
const ROW: usize = CHARACTER + 4;
const HEIGHT: usize = LEGEND + GLYPH + 10;

/// The least and the most that a panel shows, in mm.
const VIEW: [f64; 2] = [60.0, 400.0];
/// Lengths that a scale bar may have, in mm: the longest that takes at most a third of the panel is
/// used.
const BAR_LENGTHS: [f64; 3] = [50.0, 20.0, 10.0];
/// More points than these are drawn as a stroke of dots, so that they do not hide the image.
const CLICKS: usize = 30;

const GROUND: [u8; 3] = [24; 3];
/// Not a grey, so that text can be told from the scan.
const INK: [u8; 3] = [225, 230, 240];
/// The last answer's contour, and those of the answers before it, the latest first.
const CONTOUR: [u8; 3] = [255, 196, 0];
const EARLIER: [[u8; 3]; 3] = [[255, 110, 200], [180, 120, 255], [110, 130, 150]];
const POSITIVE: [u8; 3] = [40, 230, 90];
const NEGATIVE: [u8; 3] = [255, 70, 70];
const BOX: [u8; 3] = [80, 170, 255];

/// The prompts that are drawn beside the object, in voxels of the image.
pub struct Marks {
    points: Vec<([usize; 3], bool)>,
    bounds: Option<[usize; 6]>,
    /// The last click, or the middle of the last stroke.
    last: Option<[usize; 3]>,
}

impl Marks {
    /// The marks of all prompts of all iterations.
    pub fn of(iterations: &[Prompts]) -> Marks {
        let points = iterations.iter().flat_map(|p| p.points.iter().copied()).collect();
        let last =
            iterations.iter().rev().find(|p| !p.points.is_empty()).and_then(|p| match p.drawn {
                None if p.points.len() <= CLICKS => p.points.last().map(|(voxel, _)| *voxel),
                _ => {
                    let any = p.points.iter().any(|(_, positive)| *positive);
                    middle(|visit| {
                        p.points
                            .iter()
                            .filter(|(_, positive)| *positive == any)
                            .for_each(|(voxel, _)| visit(*voxel))
                    })
                }
            });
        Marks { points, bounds: iterations.iter().rev().find_map(|p| p.bounds), last }
    }

    /// The current clicks and strokes of a session; the last one is looked at. If memory for them
    /// is refused it unwinds to [`memory::caught`].
    pub fn holding(said: &[Said]) -> Marks {
        let each = said.iter().map(|said| (said.voxel, said.positive));
        let points = memory::collected("the marks of a picture", each);
        Marks { points, bounds: None, last: said.last().map(|said| said.voxel) }
    }
}

/// The voxel nearest to the mean of those that `each` visits, which it does twice.
fn middle(each: impl Fn(&mut dyn FnMut([usize; 3]))) -> Option<[usize; 3]> {
    let (mut sum, mut count) = ([0.0f64; 3], 0.0f64);
    each(&mut |v: [usize; 3]| {
        (0..3).for_each(|a| sum[a] += v[a] as f64);
        count += 1.0;
    });
    let mut nearest: (f64, Option<[usize; 3]>) = (f64::INFINITY, None);
    each(&mut |v: [usize; 3]| {
        let off: f64 = (0..3).map(|a| (v[a] as f64 - sum[a] / count).powi(2)).sum();
        if off < nearest.0 {
            nearest = (off, Some(v));
        }
    });
    nearest.1
}

/// A plane: its name, the canonical axes that run across and down the panel, the one perpendicular
/// to it, and the letters left, right, top, bottom.
pub struct Plane {
    name: &'static str,
    across: usize,
    down: usize,
    through: usize,
    letters: [char; 4],
}

static PLANES: [Plane; 3] = [
    Plane { name: "axial", across: 0, down: 1, through: 2, letters: ['R', 'L', 'A', 'P'] },
    Plane { name: "coronal", across: 0, down: 2, through: 1, letters: ['R', 'L', 'S', 'I'] },
    Plane { name: "sagittal", across: 1, down: 2, through: 0, letters: ['A', 'P', 'S', 'I'] },
];

impl Plane {
    /// The plane called `axial`, `coronal` or `sagittal`; none for other names.
    pub fn named(name: &str) -> Option<&'static Plane> {
        PLANES.iter().find(|plane| plane.name == name)
    }

    /// The axis of a grid's voxels that its slices are counted along: 0 to 2 for i, j, k.
    pub fn axis(&self, grid: &Grid) -> usize {
        Orientation::of(&grid.affine).axes[self.through]
    }
}

/// The part of the image that is shown.
struct Look {
    /// The voxel of the image that all three planes go through.
    voxel: [usize; 3],
    /// The position that all three planes go through, in canonical voxels.
    through: [f64; 3],
    /// The position in the middle of the panels, in canonical voxels.
    middle: [f64; 3],
    /// The edge of a panel, in mm.
    view: f64,
}

/// What panels show, and how they map to the image.
struct Scene<'a> {
    image: &'a Volume,
    /// The last answer, and up to three before it, the latest first.
    readers: Vec<Reader<'a>>,
    marks: &'a Marks,
    /// From voxels of the image to canonical ones, and back.
    from_image: Affine,
    to_image: Affine,
    /// Of canonical voxels, in mm.
    spacing: [f64; 3],
    look: Look,
}

impl<'a> Scene<'a> {
    fn new(image: &'a Volume, answers: &[&'a Field], marks: &'a Marks) -> Scene<'a> {
        let canonical = image.grid.canonical();
        let to_image = image.grid.affine.inverse().after(&canonical.affine);
        let from_image = canonical.affine.inverse().after(&image.grid.affine);
        let spacing = canonical.spacing();
        let look = look(answers.last().copied(), marks, &from_image, image.grid.size, spacing);
        let latest = answers.iter().rev().take(1 + EARLIER.len()).copied();
        let readers = latest.map(|field| field.reader(8.0)).collect();
        Scene { image, readers, marks, from_image, to_image, spacing, look }
    }

    /// Draws panels side by side, with their text right above and below each, and returns the
    /// window that they have in common.
    fn panels(&self, picture: &mut Picture, planes: &[Plane]) -> (f32, f32) {
        let Scene { image, readers, marks, from_image, to_image, spacing, look } = self;
        let mm = look.view / PANEL as f64;

        // Every pixel's value and the answers that it is inside of, panel by panel; the last answer
        // is bit 0.
        let mut grey = vec![f32::NAN; planes.len() * PANEL * PANEL];
        let mut inside = vec![0u8; planes.len() * PANEL * PANEL];
        let place = |plane: &Plane, x: usize, y: usize| -> [f64; 3] {
            let mut at = look.through;
            // Left on the screen is the patient's right or front, top is front or head: both axes
            // run against their world axis.
            at[plane.across] = look.middle[plane.across]
                - (x as f64 + 0.5 - PANEL as f64 / 2.0) * mm / spacing[plane.across];
            at[plane.down] = look.middle[plane.down]
                - (y as f64 + 0.5 - PANEL as f64 / 2.0) * mm / spacing[plane.down];
            at
        };
        grey.par_chunks_mut(PANEL).zip(inside.par_chunks_mut(PANEL)).enumerate().for_each(
            |(row, (values, bits))| {
                let (plane, y) = (&planes[row / PANEL], row % PANEL);
                for x in 0..PANEL {
                    let at = to_image.apply(place(plane, x, y));
                    if let Some(v) =
                        sample_of(|v| image.at(v), image.grid.size, at, Interpolation::Linear)
                    {
                        values[x] = v as f32;
                        bits[x] = readers
                            .iter()
                            .enumerate()
                            .fold(0, |all, (n, r)| all | u8::from(r.sample(at) > 0.0) << n);
                    }
                }
            },
        );
        let (low, high) = window(&grey);
        for (p, plane) in planes.iter().enumerate() {
            let left = p * STEP + MARGIN;
            let is_inside =
                |x: usize, y: usize, n: usize| inside[(p * PANEL + y) * PANEL + x] >> n & 1 == 1;
            let on_border = |x: usize, y: usize, n: usize| {
                let beside =
                    [(x.wrapping_sub(1), y), (x + 1, y), (x, y.wrapping_sub(1)), (x, y + 1)];
                is_inside(x, y, n)
                    && beside
                        .into_iter()
                        .any(|(x, y)| x >= PANEL || y >= PANEL || !is_inside(x, y, n))
            };
            for y in 0..PANEL {
                for x in 0..PANEL {
                    let v = grey[(p * PANEL + y) * PANEL + x];
                    let g = if v.is_nan() {
                        0
                    } else {
                        ((v - low) / (high - low) * 255.0).clamp(0.0, 255.0) as u8
                    };
                    let contour = (0..readers.len()).find(|n| on_border(x, y, *n));
                    let colour = contour.map(|n| if n == 0 { CONTOUR } else { EARLIER[n - 1] });
                    picture.set(left + x, TOP + y, colour.unwrap_or([g; 3]));
                }
            }
            let pixel = |v: [f64; 3]| -> [f64; 2] {
                let x = -(v[plane.across] - look.middle[plane.across]) * spacing[plane.across] / mm;
                let y = -(v[plane.down] - look.middle[plane.down]) * spacing[plane.down] / mm;
                [x + PANEL as f64 / 2.0, y + PANEL as f64 / 2.0]
            };
            draw_marks(picture, plane, left, marks, from_image, look.through[plane.through], pixel);
            picture.text(&title(plane, &image.grid, look.voxel), left, TITLES, SCALE, INK);
            let (centre, middle) = (left + (PANEL - GLYPH) / 2, TOP + (PANEL - GLYPH) / 2);
            let edges = [
                (left - MARGIN + 4, middle),
                (left + PANEL + 6, middle),
                (centre, UPPER),
                (centre, LOWER),
            ];
            for (letter, (x, y)) in plane.letters.iter().zip(edges) {
                picture.text(&letter.to_string(), x, y, SCALE, INK);
            }
            draw_bar(picture, left, look.view);
        }
        (low, high)
    }
}

/// Draws answers on their image in all three planes: the last one's contour, and faintly those of
/// up to three before it. If memory is refused it unwinds to [`memory::caught`].
pub fn draw(image: &Volume, answers: &[&Field], marks: &Marks) -> Picture {
    let scene = Scene::new(image, answers, marks);
    let mut picture = Picture::new(WIDTH, HEIGHT, GROUND);
    let shown = scene.panels(&mut picture, &PLANES);
    let text = values(shown, image.grid.spacing()).join("   ");
    let scale = if MARGIN + text.len() * GLYPH <= WIDTH { SCALE } else { 1 };
    picture.text(&text, MARGIN, VALUES, scale, INK);
    draw_legend(&mut picture, scene.readers.len(), marks, SCALE);
    picture
}

/// Draws an answer on its image in one plane: through a slice, counted as the voxels of the image
/// are along [`Plane::axis`], or where [`draw`] would. If memory is refused it unwinds to
/// [`memory::caught`].
pub fn draw_plane(
    image: &Volume,
    answer: Option<&Field>,
    marks: &Marks,
    plane: &Plane,
    slice: Option<usize>,
) -> Picture {
    let answers: Vec<&Field> = answer.into_iter().collect();
    let mut scene = Scene::new(image, &answers, marks);
    if let Some(slice) = slice {
        let Scene { look, from_image, .. } = &mut scene;
        look.voxel[plane.axis(&image.grid)] = slice;
        look.through = from_image.apply(look.voxel.map(|v| v as f64));
    }
    let mut picture = Picture::new(NARROW, HEIGHT, GROUND);
    let shown = scene.panels(&mut picture, std::slice::from_ref(plane));
    for (row, text) in values(shown, image.grid.spacing()).iter().enumerate() {
        picture.text(text, MARGIN, VALUES + row * ROW, 1, INK);
    }
    draw_legend(&mut picture, scene.readers.len(), marks, 1);
    picture
}

/// The plane's name and position: the slice by its index in the file, and by the patient's
/// direction in mm.
fn title(plane: &Plane, grid: &Grid, voxel: [usize; 3]) -> String {
    let axis = plane.axis(grid);
    let mm = grid.affine.apply(voxel.map(|v| v as f64))[plane.through];
    let letter = [['R', 'L'], ['A', 'P'], ['S', 'I']][plane.through][usize::from(mm < 0.0)];
    format!("{} {} {}  {letter} {:.1} mm", plane.name, ['i', 'j', 'k'][axis], voxel[axis], mm.abs())
}

/// The window and the spacing, as text.
fn values((low, high): (f32, f32), spacing: [f64; 3]) -> [String; 2] {
    let (low, high) = (f64::from(low), f64::from(high));
    let digits = (2.0 - (high - low).log10().floor()).clamp(0.0, 9.0) as usize;
    let [from, to, level, width] =
        [low, high, (low + high) / 2.0, high - low].map(|v| number(v, digits));
    let [i, j, k] = spacing.map(|s| number(s, 3));
    [
        format!("window {from}..{to} (level {level}, width {width})"),
        format!("spacing {i} x {j} x {k} mm"),
    ]
}

/// A number with at most `digits` digits after the point.
fn number(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        text.as_str()
    };
    if text == "-0" { "0".into() } else { text.into() }
}

/// The scale bar's length in mm, for a panel that shows `view` mm.
fn bar_length(view: f64) -> f64 {
    BAR_LENGTHS
        .into_iter()
        .find(|mm| *mm <= view / 3.0)
        .unwrap_or(BAR_LENGTHS[BAR_LENGTHS.len() - 1])
}

/// The scale bar below the panel that begins at `left`, and its length.
fn draw_bar(picture: &mut Picture, left: usize, view: f64) {
    let length = bar_length(view);
    let pixels = (length / view * PANEL as f64).round() as usize;
    picture.fill(left, BARS + 6, pixels, 4, INK);
    picture.fill(left, BARS + 1, 2, 14, INK);
    picture.fill((left + pixels).saturating_sub(2), BARS + 1, 2, 14, INK);
    picture.text(&format!("{length} mm"), left + pixels + GLYPH / 2, BARS, SCALE, INK);
}

/// The meaning of each colour that was drawn.
fn draw_legend(picture: &mut Picture, answers: usize, marks: &Marks, scale: usize) {
    let has = |sign: bool| marks.points.iter().any(|(_, positive)| *positive == sign);
    let earlier = &EARLIER[..answers.saturating_sub(1).min(EARLIER.len())];
    // A prompt is shown by its sign, everything else by a line.
    let entries: [(&[[u8; 3]], &str, &str); 5] = [
        (if answers > 0 { &[CONTOUR] } else { &[] }, "", "answer"),
        (earlier, "", "earlier answers"),
        (if marks.bounds.is_some() { &[BOX] } else { &[] }, "", "box"),
        (if has(true) { &[POSITIVE] } else { &[] }, "+", "positive click"),
        (if has(false) { &[NEGATIVE] } else { &[] }, "-", "negative click"),
    ];
    let mut x = MARGIN;
    for (colours, sign, words) in entries.into_iter().filter(|(colours, ..)| !colours.is_empty()) {
        for colour in colours {
            match sign {
                "" => picture.fill(x, LEGEND + 3 * scale, 20, 2 * scale, *colour),
                sign => picture.text(sign, x, LEGEND, scale, *colour),
            }
            x += 28;
        }
        picture.text(words, x, LEGEND, scale, INK);
        x += words.len() * CHARACTER * scale + 28;
    }
}

/// The planes go through the last click, otherwise the middle of the box, otherwise that of the
/// object. The panels show the box, or else the object, and that click.
fn look(
    answer: Option<&Field>,
    marks: &Marks,
    from_image: &Affine,
    size: [usize; 3],
    spacing: [f64; 3],
) -> Look {
    let object = answer.and_then(Field::bounds);
    let of_box =
        || marks.bounds.map(|b| [0, 1, 2].map(|a| (b[a] + b[a + 3]).saturating_sub(1) / 2));
    let of_object = || {
        let field = answer?;
        let [_, nj, nk] = field.size();
        middle(|visit| {
            field.each(|at, logit| {
                if logit > 0.0 {
                    visit([at / nk / nj, at / nk % nj, at % nk]);
                }
            });
        })
    };
    let voxel = marks.last.or_else(of_box).or_else(of_object).unwrap_or(size.map(|s| s / 2));
    let through = from_image.apply(voxel.map(|v| v as f64));
    let corners = |b: [usize; 6]| {
        [[b[0], b[1], b[2]], [b[3], b[4], b[5]]]
            .map(|c| from_image.apply(c.map(|v| v as f64 - 0.5)))
    };
    let mut reach = 0.0f64;
    for b in marks.bounds.into_iter().chain(object) {
        let [p, q] = corners(b);
        reach = (0..3).map(|a| (p[a] - q[a]).abs() * spacing[a]).fold(reach, f64::max);
    }
    let view = (reach * 1.8).clamp(VIEW[0], VIEW[1]);
    // The prompts say where the object of interest is; an answer may be elsewhere.
    let middle = marks.bounds.or(object).map_or(through, |b| {
        let [p, q] = corners(b);
        [0, 1, 2].map(|a| {
            let most = 0.45 * view / spacing[a];
            ((p[a] + q[a]) / 2.0).clamp(through[a] - most, through[a] + most)
        })
    });
    Look { voxel, through, middle, view }
}

/// The 1st and 99th percentile of the values shown.
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

/// Draws the box and the points on the plane at `depth` in the panel that begins at `left`.
fn draw_marks(
    picture: &mut Picture,
    plane: &Plane,
    left: usize,
    marks: &Marks,
    from_image: &Affine,
    depth: f64,
    pixel: impl Fn([f64; 3]) -> [f64; 2],
) {
    let mut put = |x: i64, y: i64, colour: [u8; 3]| {
        if (0..PANEL as i64).contains(&x) && (0..PANEL as i64).contains(&y) {
            picture.set(left + x as usize, TOP + y as usize, colour);
        }
    };
    if let Some(b) = marks.bounds {
        let corners = [[b[0], b[1], b[2]], [b[3], b[4], b[5]]]
            .map(|c| from_image.apply(c.map(|v| v as f64 - 0.5)));
        let crosses =
            (corners[0][plane.through] - depth) * (corners[1][plane.through] - depth) <= 0.0;
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
    let arm = if marks.points.len() > CLICKS { 1 } else { 6 };
    for (voxel, positive) in &marks.points {
        let v = from_image.apply(voxel.map(|c| c as f64));
        if (v[plane.through] - depth).abs() > 0.75 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const BOUNDS: [usize; 6] = [69, 68, 13, 93, 94, 16];

    fn example() -> Volume {
        Volume::read(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/lung1_image.nii.gz"),
            None,
        )
        .unwrap()
    }

    /// A box, a click on the object and one off it, and two answers.
    fn picture(image: &Volume) -> Picture {
        let [mut before, mut after] = [0, 1].map(|_| Field::new(image.grid.size, true));
        before.edit(&[74..86, 74..86, 13..16], |_, _| 2.0);
        after.edit(&[72..90, 72..90, 13..16], |_, _| 2.0);
        let points = vec![([70, 70, 14], false), ([80, 80, 14], true)];
        let prompts = Prompts { points, bounds: Some(BOUNDS), ..Default::default() };
        draw(image, &[&before, &after], &Marks::of(&[prompts]))
    }

    /// The number of pixels of a rectangle that have a colour.
    fn count(
        picture: &Picture,
        left: usize,
        top: usize,
        width: usize,
        height: usize,
        colour: [u8; 3],
    ) -> usize {
        let pixels = (top..top + height).flat_map(|y| (left..left + width).map(move |x| (x, y)));
        pixels.filter(|(x, y)| picture.get(*x, *y) == Some(colour)).count()
    }

    #[test]
    fn panels_show_the_scan_and_the_prompts_and_nothing_else() {
        let picture = picture(&example());
        assert_eq!((picture.width, picture.height), (1360, 568));
        let marks = [CONTOUR, EARLIER[0], POSITIVE, NEGATIVE, BOX];
        for left in (0..3).map(|p| p * STEP + MARGIN) {
            for (x, y) in (TOP..TOP + PANEL).flat_map(|y| (left..left + PANEL).map(move |x| (x, y)))
            {
                let colour @ [r, g, b] = picture.get(x, y).unwrap();
                assert!(r == g && g == b || marks.contains(&colour), "{colour:?} at {x}, {y}");
            }
            // The planes go through the last click, so that every panel shows it, both contours and
            // the box.
            for colour in [CONTOUR, EARLIER[0], POSITIVE, BOX] {
                assert!(
                    count(&picture, left, TOP, PANEL, PANEL, colour) > 12,
                    "{colour:?} in the panel at {left}"
                );
            }
        }
    }

    #[test]
    fn what_is_to_be_read_stands_around_the_panels() {
        let picture = picture(&example());
        for left in (0..3).map(|p| p * STEP + MARGIN) {
            let centre = left + (PANEL - GLYPH) / 2;
            assert!(count(&picture, left, TITLES, PANEL, GLYPH, INK) > 500, "the title at {left}");
            for (x, y) in [
                (left - MARGIN, TOP + 192),
                (left + PANEL, TOP + 192),
                (centre, UPPER),
                (centre, LOWER),
            ] {
                assert!(count(&picture, x, y, MARGIN, GLYPH, INK) > 40, "a letter at {x}, {y}");
            }
        }
        assert!(count(&picture, 0, VALUES, WIDTH, GLYPH, INK) > 1000, "window and spacing");
        for colour in [CONTOUR, EARLIER[0], POSITIVE, NEGATIVE, BOX] {
            assert!(
                count(&picture, 0, LEGEND, WIDTH, GLYPH, colour) > 10,
                "{colour:?} in the legend"
            );
        }
        assert_eq!(
            count(&picture, 0, LEGEND, WIDTH, GLYPH, EARLIER[1]),
            0,
            "there was one earlier answer"
        );
        // Text ends before the picture does.
        assert_eq!(
            count(&picture, WIDTH - 8, VALUES, 8, HEIGHT - VALUES, GROUND),
            8 * (HEIGHT - VALUES)
        );
    }

    #[test]
    fn one_plane_is_drawn_as_beside_the_others_and_through_any_slice() {
        let image = example();
        let mut field = Field::new(image.grid.size, true);
        field.edit(&[72..90, 72..90, 13..16], |_, _| 2.0);
        let prompts = Prompts { points: vec![([80, 80, 14], true)], ..Default::default() };
        let all = draw(&image, &[&field], &Marks::of(&[prompts]));
        let marks = Marks::holding(&[Said { voxel: [80, 80, 14], positive: true }]);
        let of = |plane: &Plane, slice| draw_plane(&image, Some(&field), &marks, plane, slice);
        for (p, plane) in PLANES.iter().enumerate() {
            let one = of(plane, None);
            assert_eq!((one.width, one.height), (NARROW, 568));
            // The window may differ, because it depends on what is shown; everything else is the
            // same.
            for (x, y) in (0..TOP + PANEL).flat_map(|y| (0..NARROW).map(move |x| (x, y))) {
                let is_drawn = |c: &[u8; 3]| [CONTOUR, POSITIVE, INK].contains(c);
                let [here, there] = [one.get(x, y), all.get(p * STEP + x, y)]
                    .map(|colour| colour.filter(|c| is_drawn(c)));
                assert_eq!(here, there, "{} at {x}, {y}", plane.name);
            }
            // Through the click's own slice the picture is the same.
            let axis = plane.axis(&image.grid);
            let again = of(plane, Some([80, 80, 14][axis]));
            let differs = |(x, y): (usize, usize)| one.get(x, y) != again.get(x, y);
            assert!(!(0..568).flat_map(|y| (0..NARROW).map(move |x| (x, y))).any(differs));
            // The first slice has neither the object nor the click, but names them.
            let off = of(plane, Some(0));
            for colour in [CONTOUR, POSITIVE] {
                assert_eq!(count(&off, MARGIN, TOP, PANEL, PANEL, colour), 0, "{}", plane.name);
                assert!(count(&off, 0, LEGEND, NARROW, CHARACTER, colour) > 4);
            }
        }
        assert!(Plane::named("axial").is_some_and(|plane| plane.axis(&image.grid) == 2));
        assert!(Plane::named("oblique").is_none());
        // Text ends before the picture does.
        let one = of(&PLANES[0], None);
        assert!(one.png().is_ok_and(|bytes| bytes.starts_with(b"\x89PNG\r\n\x1a\n")));
        assert_eq!(
            count(&one, NARROW - 4, VALUES, 4, HEIGHT - VALUES, GROUND),
            4 * (HEIGHT - VALUES)
        );
        // Without prompts and without an answer.
        let empty = draw_plane(&image, None, &Marks::holding(&[]), &PLANES[1], None);
        assert_eq!(count(&empty, 0, 0, NARROW, HEIGHT, CONTOUR), 0);
    }

    #[test]
    fn the_scale_bar_is_as_long_as_it_says() {
        let image = example();
        let picture = picture(&image);
        // The box, whose size in mm is known, is the scale: on the axial plane it is as wide as i.
        let mm = (BOUNDS[3] - BOUNDS[0]) as f64 * image.grid.spacing()[0];
        let columns = |x: &usize| count(&picture, *x, TOP, 1, PANEL, BOX) > 0;
        let (first, last) = (
            (MARGIN..MARGIN + PANEL).find(columns).unwrap(),
            (MARGIN..MARGIN + PANEL).rfind(columns).unwrap(),
        );
        let per_mm = (last - first) as f64 / mm;
        let bar =
            (MARGIN..MARGIN + PANEL).take_while(|x| picture.get(*x, BARS + 8) == Some(INK)).count();
        let length = BAR_LENGTHS
            .into_iter()
            .find(|l| (bar as f64 - l * per_mm).abs() < 0.02 * bar as f64 + 2.0);
        assert_eq!(length, Some(20.0), "{bar} pixels at {per_mm} a mm");
        assert_eq!([60.0, 90.0, 200.0, 400.0].map(bar_length), [20.0, 20.0, 50.0, 50.0]);
    }

    #[test]
    fn slices_are_named_by_index_and_direction() {
        // i to the left, j to the back, k to the head.
        let affine =
            Affine([[-0.5, 0.0, 0.0, 10.0], [0.0, -0.5, 0.0, 20.0], [0.0, 0.0, 2.0, -30.0]]);
        let grid = Grid { size: [20, 20, 20], affine };
        let titles: Vec<String> =
            PLANES.iter().map(|plane| title(plane, &grid, [4, 6, 5])).collect();
        assert_eq!(
            titles,
            ["axial k 5  I 20.0 mm", "coronal j 6  A 17.0 mm", "sagittal i 4  R 8.0 mm"]
        );
        let text = values((-1000.2, 350.4), [0.5, 0.5, 2.0]).join("   ");
        assert_eq!(text, "window -1000..350 (level -325, width 1351)   spacing 0.5 x 0.5 x 2 mm");
        assert_eq!(
            values((0.0, 0.25), [1.0; 3]).join("   "),
            "window 0..0.25 (level 0.125, width 0.25)   spacing 1 x 1 x 1 mm"
        );
    }

    #[test]
    fn planes_go_through_the_last_click_or_the_middle_of_the_box_or_the_object() {
        let of = |points: Vec<([usize; 3], bool)>, bounds| Prompts {
            points,
            bounds,
            ..Default::default()
        };
        let mut field = Field::new([20; 3], true);
        field.edit(&[2..5, 6..9, 10..13], |_, _| 1.0);
        let voxel = |prompts: &[Prompts], answer: Option<&Field>| {
            look(answer, &Marks::of(prompts), &Affine::from_spacing([1.0; 3]), [20; 3], [1.0; 3])
                .voxel
        };
        let bounds = Some([1, 2, 3, 5, 6, 8]);
        assert_eq!(
            voxel(
                &[of(vec![([4, 5, 6], true)], bounds), of(vec![([7, 8, 9], false)], None)],
                Some(&field)
            ),
            [7, 8, 9]
        );
        assert_eq!(voxel(&[of(vec![], bounds)], Some(&field)), [2, 3, 5]);
        assert_eq!(voxel(&[of(vec![], None)], Some(&field)), [3, 7, 11]);
        assert_eq!(voxel(&[of(vec![], None)], None), [10; 3]);
        // A stroke is looked at in its middle.
        assert_eq!(
            voxel(&[of((0..41).map(|i| ([i, 3, 3], true)).collect(), None)], None),
            [20, 3, 3]
        );
    }
}
