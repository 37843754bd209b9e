//! The size of an object as it is measured by hand: its longest diameter on one slice, and the
//! longest one across it there, as RECIST and WHO define them.
//!
//! Slices are those of the scan's own grid along k, and i and j are assumed to be perpendicular. An
//! outline runs through the middles of its voxels' sides, so that a row of voxels is as long as all
//! of them and a single voxel as long as itself. Diameters are those of the convex hull of all of a
//! slice: they cross dents, holes, and gaps between parts of an object.

use super::field::Field;
use crate::memory;

/// How messages name the memory that this takes.
const OUTLINE: &str = "an object's outline";

/// A position on a slice, along i and j in halves of a voxel.
type Place = [i64; 2];

/// The diameters of an object on the slice on which it is longest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Diameters {
    /// The longest one, in mm.
    pub long: f64,
    /// The longest one perpendicular to that, in mm.
    pub short: f64,
    /// The slice's index along k; the first if several have the same length.
    pub slice: usize,
}

impl Diameters {
    /// Measures an object on a grid with that spacing in mm along i, j and k; none if no voxel is
    /// on the object.
    pub fn of(field: &Field, spacing: [f64; 3]) -> Option<Diameters> {
        let [i0, j0, k0, i1, j1, k1] = field.bounds()?;
        // The first and the last voxel of each row of each slice; the others are between them. The
        // first is after the last if there is none.
        let across = j1 - j0;
        let mut rows = memory::filled(OUTLINE, [i1, i0], across * (k1 - k0));
        field.inside_of(&[i0..i1, j0..j1, k0..k1], |[i, j, k]| {
            let [first, last] = &mut rows[(k - k0) * across + j - j0];
            (*first, *last) = (i.min(*first), i.max(*last));
        });
        let half = [spacing[0] / 2.0, spacing[1] / 2.0];
        let mut best: Option<Diameters> = None;
        let mut places = memory::list(OUTLINE, 6 * across);
        for (n, rows) in rows.chunks(across).enumerate() {
            let least = best.map_or(0.0, |b| b.long);
            ends(rows, &mut places);
            if span(&places, half) <= least {
                continue;
            }
            let hull = hull(&mut places);
            // Relative to the first of them, so that an outline has the same length wherever it is.
            let corners = hull.iter().map(|p| [0, 1].map(|a| (p[a] - hull[0][a]) as f64 * half[a]));
            let outline = memory::collected(OUTLINE, corners);
            let (long, pair) = longest(&outline);
            if long > least {
                best = Some(Diameters { long, short: crossing(&outline, pair), slice: k0 + n });
            }
        }
        best
    }
}

/// The middles of the free sides of the voxels at the ends of a slice's rows.
fn ends(rows: &[[usize; 2]], places: &mut Vec<Place>) {
    places.clear();
    for (j, [first, last]) in rows.iter().enumerate().filter(|(_, [first, last])| first <= last) {
        let [a, b, j] = [*first, *last, j].map(|v| 2 * v as i64);
        places.extend([[a - 1, j], [b + 1, j], [a, j - 1], [a, j + 1], [b, j - 1], [b, j + 1]]);
    }
}

/// The diagonal of the box around positions: no two are further apart.
fn span(places: &[Place], half: [f64; 2]) -> f64 {
    let side = |a: usize| {
        let along = || places.iter().map(|p| p[a]);
        let long = along().max().unwrap_or(0) - along().min().unwrap_or(0);
        long as f64 * half[a]
    };
    side(0).hypot(side(1))
}

/// The corners of the convex hull of positions, in order, none of them on the straight line between
/// two others.
fn hull(places: &mut Vec<Place>) -> Vec<Place> {
    places.sort_unstable();
    places.dedup();
    let mut hull: Vec<Place> = memory::list(OUTLINE, 2 * places.len());
    let add = |hull: &mut Vec<Place>, begun: usize, p: Place| {
        while let [.., a, b] = hull[begun..]
            && (b[0] - a[0]) * (p[1] - a[1]) <= (b[1] - a[1]) * (p[0] - a[0])
        {
            hull.pop();
        }
        hull.push(p);
    };
    // First the lower side from left to right, then the upper side from right to left.
    places.iter().for_each(|p| add(&mut hull, 0, *p));
    let begun = hull.len().saturating_sub(1);
    places.iter().rev().skip(1).for_each(|p| add(&mut hull, begun, *p));
    hull.pop();
    hull
}

/// The length between the two corners that are furthest apart, and those two.
fn longest(outline: &[[f64; 2]]) -> (f64, [[f64; 2]; 2]) {
    let mut found = (0.0, [[0.0; 2]; 2]);
    for (n, a) in outline.iter().enumerate() {
        for b in &outline[..n] {
            let [x, y] = [a[0] - b[0], a[1] - b[1]];
            let square = x * x + y * y;
            if square > found.0 {
                found = (square, [*b, *a]);
            }
        }
    }
    (found.0.sqrt(), found.1)
}

/// The length of the longest line within a convex outline that is perpendicular to the one between
/// two positions. As the outline is convex, it passes through a corner.
fn crossing(outline: &[[f64; 2]], [from, to]: [[f64; 2]; 2]) -> f64 {
    let [x, y] = [to[0] - from[0], to[1] - from[1]];
    let length = x.hypot(y);
    // Each corner by its positions along the line and perpendicular to it.
    let turned = |[i, j]: [f64; 2]| [(i * x + j * y) / length, (j * x - i * y) / length];
    let edges = || outline.iter().zip(outline.iter().cycle().skip(1));
    let mut most = 0.0f64;
    for corner in outline {
        let [along, _] = turned(*corner);
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for (a, b) in edges() {
            let [a, b] = [turned(*a), turned(*b)];
            if a[0] == b[0] || along < a[0].min(b[0]) || along > a[0].max(b[0]) {
                continue;
            }
            let part = (along - a[0]) / (b[0] - a[0]);
            let at = a[1] + part * (b[1] - a[1]);
            (low, high) = (low.min(at), high.max(at));
        }
        most = most.max(high - low);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An object of the voxels for which `holds` is true.
    fn object(size: [usize; 3], holds: impl Fn([usize; 3]) -> bool + Sync) -> Field {
        let mut field = Field::new(size, true);
        field.edit(&size.map(|n| 0..n), |voxel, _| if holds(voxel) { 1.0 } else { -10.0 });
        field
    }

    #[track_caller]
    fn measured(field: &Field, spacing: [f64; 3], long: f64, short: f64, slice: usize) {
        let found = Diameters::of(field, spacing).unwrap();
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(found.long, long) && near(found.short, short), "{found:?}");
        assert_eq!(found.slice, slice);
    }

    #[test]
    fn what_is_known_is_found() {
        // Nothing, one voxel, and rows of voxels.
        assert_eq!(Diameters::of(&object([9, 9, 9], |_| false), [1.0; 3]), None);
        let one = object([40, 20, 9], |v| v == [33, 17, 8]);
        measured(&one, [1.0; 3], 1.0, 1.0, 8);
        measured(&one, [0.5, 2.0, 7.0], 2.0, 0.5, 8);
        let row = object([40, 20, 9], |[i, j, k]| (20..31).contains(&i) && j == 0 && k == 2);
        measured(&row, [0.5, 2.0, 7.0], 5.5, 2.0, 2);
        // A box: from the last voxel of a side to the first of the opposite one. The line across
        // runs from one long side to the other.
        let block = object([40, 40, 9], |[i, j, k]| {
            (3..23).contains(&i) && (30..34).contains(&j) && (1..8).contains(&k)
        });
        let (long, slope) = (20f64.hypot(3.0), 20f64.hypot(3.0) / 20.0);
        measured(&block, [1.0; 3], long, 4.0 * slope, 1);
        measured(&block, [0.5, 0.5, 9.0], long / 2.0, 2.0 * slope, 1);
        // A disc with a radius of 10 voxels; only on its axes are positions as far apart.
        let disc = object([40, 40, 3], |[i, j, k]| {
            (i as i64 - 20).pow(2) + (j as i64 - 17).pow(2) <= 100 && k == 1
        });
        measured(&disc, [1.0; 3], 21.0, 21.0, 1);
        measured(&disc, [2.0, 1.0, 1.0], 42.0, 21.0, 1);
    }

    #[test]
    fn the_longest_slice_counts_and_dents_are_bridged() {
        // Slices of other sizes, some in other tiles; the diagonal of the middle one is longest.
        let field = object([60, 50, 40], |[i, j, k]| match k {
            3 => i < 30 && j < 2,
            20 => i.abs_diff(j) == 0 && i < 40,
            35 => i == 50 && (10..49).contains(&j),
            _ => false,
        });
        let found = Diameters::of(&field, [1.0; 3]).unwrap();
        assert_eq!(found.slice, 20);
        // Its ends are the sides of its first voxel and its last.
        assert!((found.long - 39f64.hypot(40.0)).abs() < 1e-9, "{found:?}");
        // An arm of 4 mm beside one of 7, and two parts 11 mm from end to end.
        let angle =
            object([20, 20, 1], |[i, j, _]| (i == 2 && j < 4) || (j == 0 && (2..9).contains(&i)));
        let found = Diameters::of(&angle, [1.0; 3]).unwrap();
        let legs = 7f64.hypot(3.0);
        assert!((found.long - legs).abs() < 1e-9 && found.short < 4.0, "{found:?}");
        let parts = object([20, 20, 1], |v| v == [2, 5, 0] || v == [12, 5, 0]);
        measured(&parts, [1.0; 3], 11.0, 1.0, 0);
    }

    /// Compared with every pair of positions, and every line through one.
    #[test]
    fn it_is_what_its_definition_says() {
        let mut state = 7u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for round in 0..40 {
            let (count, spacing) = (1 + random(12), [0.4 + random(9) as f64 / 5.0, 0.9, 2.0]);
            let slice = 4 * (round % 3);
            let voxels: Vec<[usize; 3]> =
                (0..count).map(|_| [random(23) as usize, random(19) as usize, slice]).collect();
            let found = Diameters::of(&object([23, 19, 9], |v| voxels.contains(&v)), spacing);
            let found = found.unwrap();
            assert_eq!(found.slice, slice);
            let places: Vec<[f64; 2]> = voxels
                .iter()
                .map(|v| [v[0] as f64, v[1] as f64])
                .flat_map(|[i, j]| [[i - 0.5, j], [i + 0.5, j], [i, j - 0.5], [i, j + 0.5]])
                .map(|[i, j]| [i * spacing[0], j * spacing[1]])
                .collect();
            let pairs = || places.iter().flat_map(|a| places.iter().map(move |b| (*a, *b)));
            let apart = |(a, b): ([f64; 2], [f64; 2])| (a[0] - b[0]).hypot(a[1] - b[1]);
            let long = pairs().map(apart).fold(0.0, f64::max);
            assert!((found.long - long).abs() < 1e-9, "{round}: {found:?}, {long}");
            // Several pairs may be equally far apart: each has a line across.
            let mut shorts = pairs().filter(|pair| apart(*pair) > long - 1e-9).map(|(from, to)| {
                let (x, y) = ((to[0] - from[0]) / long, (to[1] - from[1]) / long);
                let turned = |p: [f64; 2]| [p[0] * x + p[1] * y, p[1] * x - p[0] * y];
                let width = |p: &[f64; 2]| {
                    let [along, own] = turned(*p);
                    let (mut low, mut high) = (own, own);
                    for (a, b) in pairs() {
                        let [a, b] = [turned(a), turned(b)];
                        let at = if (a[0] - along).abs() < 1e-9 {
                            a[1]
                        } else if a[0] < along && along < b[0] {
                            a[1] + (along - a[0]) / (b[0] - a[0]) * (b[1] - a[1])
                        } else {
                            continue;
                        };
                        (low, high) = (low.min(at), high.max(at));
                    }
                    high - low
                };
                places.iter().map(width).fold(0.0, f64::max)
            });
            assert!(shorts.any(|short| (found.short - short).abs() < 1e-9), "{round}: {found:?}");
        }
    }
}
