//! Prompts are those of the plain form: one slice after the other, and lists of all wrong voxels.

use super::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use scribble::{Stages, draw};

/// Simulated prompts as they are explained, on one thread: what is drawn has the same bits.
mod reference {
    use super::super::thinning::thin;
    use super::*;
    use std::collections::HashSet;

    struct Plane {
        rows: usize,
        columns: usize,
    }

    /// Standard deviations of the noise that breaks lines and of a displacement, and the largest
    /// displacement.
    type Hand = [f32; 3];

    pub fn draw(rng: &mut impl Rng, region: &[u8], size: [usize; 3], kind: Kind) -> Vec<Stages> {
        let hand =
            [rng.random_range(4.0..16.0), rng.random_range(4.0..16.0), rng.random_range(1.0..6.0)];
        (0..size[2]).filter_map(|k| slice(rng, region, size, kind, k, hand)).collect()
    }

    fn slice(
        rng: &mut impl Rng,
        region: &[u8],
        [ni, nj, nk]: [usize; 3],
        kind: Kind,
        k: usize,
        [gaps, smoothing, magnitude]: Hand,
    ) -> Option<Stages> {
        let at = |i: usize, j: usize| region[(i * nj + j) * nk + k] != 0;
        let (mut low, mut high) = ([usize::MAX; 2], [0; 2]);
        for (i, j) in (0..ni).flat_map(|i| (0..nj).map(move |j| (i, j))) {
            if at(i, j) {
                low = [low[0].min(i), low[1].min(j)];
                high = [high[0].max(i), high[1].max(j)];
            }
        }
        if low[0] == usize::MAX {
            return None;
        }
        let start = low.map(|v| v as isize - 1);
        let plane = Plane { rows: high[0] - low[0] + 3, columns: high[1] - low[1] + 3 };
        let place = |p: usize| {
            (start[0] + (p / plane.columns) as isize, start[1] + (p % plane.columns) as isize)
        };
        let on_slice_border = |(i, j): (isize, isize)| {
            i <= 0 || j <= 0 || i >= ni as isize - 1 || j >= nj as isize - 1
        };
        let inside = |(i, j): (isize, isize)| {
            i >= 0 && j >= 0 && i < ni as isize && j < nj as isize && at(i as usize, j as usize)
        };
        let count = plane.rows * plane.columns;
        let mask: Vec<u8> = (0..count).map(|p| u8::from(inside(place(p)))).collect();
        let drawn = match kind {
            Kind::Centreline => {
                let off_border = |p: usize| u8::from(mask[p] != 0 && !on_slice_border(place(p)));
                let mut drawn: Vec<u8> = (0..count).map(off_border).collect();
                thin(&mut drawn, plane.rows, plane.columns);
                drawn
            }
            Kind::Line => lines(rng, &mask, &plane),
            Kind::Contour => contour(rng, &mask, &plane),
        };
        if drawn.iter().all(|v| *v == 0) {
            return None;
        }
        let noise = smooth_noise(rng, &plane, gaps);
        let broken: Vec<u8> =
            drawn.iter().zip(&noise).map(|(d, n)| u8::from(*d != 0 && *n > 0.0)).collect();
        let broken = if broken.iter().any(|v| *v != 0) { broken } else { drawn.clone() };
        let shifts = [0, 1].map(|_| {
            let mut field = smooth_noise(rng, &plane, smoothing);
            let largest = field.iter().fold(0.0f32, |a, v| a.max(v.abs())).max(f32::MIN_POSITIVE);
            field.iter_mut().for_each(|v| *v = *v / largest * magnitude);
            field
        });
        let from = |p: usize| -> Option<usize> {
            let i = (p / plane.columns) as f32 + shifts[0][p];
            let j = (p % plane.columns) as f32 + shifts[1][p];
            let (i, j) = (i.round(), j.round());
            (i >= 0.0 && j >= 0.0 && i < plane.rows as f32 && j < plane.columns as f32)
                .then(|| i as usize * plane.columns + j as usize)
        };
        let moved = |p: usize| u8::from(mask[p] != 0 && from(p).is_some_and(|q| broken[q] != 0));
        let warped: Vec<u8> = (0..count).map(moved).collect();
        let warped = if warped.iter().any(|v| *v != 0) { warped } else { broken.clone() };
        let whole = |part: Vec<u8>| {
            let mut slice = vec![0; ni * nj];
            for p in (0..count).filter(|&p| part[p] != 0) {
                let (i, j) = place(p);
                slice[i as usize * nj + j as usize] = 1;
            }
            slice
        };
        Some(Stages { slice: k, drawn: whole(drawn), broken: whole(broken), warped: whole(warped) })
    }

    fn lines(rng: &mut impl Rng, mask: &[u8], plane: &Plane) -> Vec<u8> {
        let voxels: Vec<usize> = (0..mask.len()).filter(|&p| mask[p] != 0).collect();
        let mut out = vec![0; mask.len()];
        for _ in 0..rng.random_range(1..=3) {
            let [a, b] = [0, 1].map(|_| voxels[rng.random_range(0..voxels.len())]);
            let place = |p: usize| [(p / plane.columns) as f32, (p % plane.columns) as f32];
            let (a, b) = (place(a), place(b));
            let steps = (a[0] - b[0]).abs().max((a[1] - b[1]).abs()).ceil().max(1.0);
            for s in 0..=steps as usize {
                let way = s as f32 / steps;
                let [i, j] =
                    [0, 1].map(|axis| (a[axis] + way * (b[axis] - a[axis])).round() as usize);
                out[i * plane.columns + j] = mask[i * plane.columns + j];
            }
        }
        out
    }

    fn contour(rng: &mut impl Rng, mask: &[u8], plane: &Plane) -> Vec<u8> {
        let sigma = rng.random_range(1.0..4.0);
        let blurred = smooth(&mask.iter().map(|v| *v as f32).collect::<Vec<f32>>(), plane, sigma);
        let top =
            blurred.iter().zip(mask).filter(|(_, m)| **m != 0).fold(0.0f32, |a, (b, _)| a.max(*b));
        let level = top * rng.random_range(0.3..0.9);
        let inner: Vec<bool> =
            blurred.iter().zip(mask).map(|(b, m)| *m != 0 && *b >= level).collect();
        let c = plane.columns;
        let on_edge =
            |p: usize| inner[p] && ![p - c, p + c, p - 1, p + 1].iter().all(|&q| inner[q]);
        (0..mask.len()).map(|p| u8::from(on_edge(p))).collect()
    }

    fn smooth_noise(rng: &mut impl Rng, plane: &Plane, sigma: f32) -> Vec<f32> {
        let noise: Vec<f32> = (0..plane.rows * plane.columns).map(|_| normal(rng)).collect();
        smooth(&noise, plane, sigma)
    }

    fn smooth(values: &[f32], plane: &Plane, sigma: f32) -> Vec<f32> {
        let reach = (3.0 * sigma).ceil() as usize;
        let weights: Vec<f32> =
            (0..=reach).map(|d| (-0.5 * (d as f32 / sigma).powi(2)).exp()).collect();
        let (rows, columns) = (plane.rows, plane.columns);
        let mut along = vec![0.0f32; values.len()];
        for (from, to) in values.chunks_exact(columns).zip(along.chunks_exact_mut(columns)) {
            for (j, v) in to.iter_mut().enumerate() {
                *v = (j.saturating_sub(reach)..(j + reach + 1).min(columns))
                    .map(|q| weights[q.abs_diff(j)] * from[q])
                    .sum();
            }
        }
        let mut out = vec![0.0f32; values.len()];
        for (i, to) in out.chunks_exact_mut(columns).enumerate() {
            for q in i.saturating_sub(reach)..(i + reach + 1).min(rows) {
                let weight = weights[q.abs_diff(i)];
                to.iter_mut().zip(&along[q * columns..]).for_each(|(o, v)| *o += weight * v);
            }
        }
        out
    }

    fn scribbles(
        rng: &mut impl Rng,
        region: &[u8],
        size: [usize; 3],
        kind: Kind,
        limit: usize,
    ) -> Vec<usize> {
        let mut voxels = vec![];
        for stages in draw(rng, region, size, kind) {
            let on = (0..stages.warped.len()).filter(|&p| stages.warped[p] != 0);
            voxels.extend(on.map(|p| p * size[2] + stages.slice));
        }
        if voxels.len() > limit {
            voxels = drawn_of(rng, voxels.len(), limit).map(|i| voxels[i]).collect();
        }
        voxels
    }

    /// The prompts of an iteration, where `missed` or `excess` is not 0.
    pub fn correct(
        user: &User,
        rng: &mut impl Rng,
        [missed, excess]: [&[u8]; 2],
        size: [usize; 3],
    ) -> Vec<([i32; 3], bool)> {
        let n = rng.random_range(user.points[0]..=user.points[1].max(user.points[0]));
        let wrong: Vec<usize> =
            (0..missed.len()).filter(|&v| missed[v] != 0 || excess[v] != 0).collect();
        let mut given: Vec<_> = drawn_of(rng, wrong.len(), n)
            .map(|i| (voxel(wrong[i], size), missed[wrong[i]] != 0))
            .collect();
        if rng.random_bool(user.scribbles) {
            let kinds = [Kind::Centreline, Kind::Line, Kind::Contour];
            let kind =
                if user.all_kinds { kinds[rng.random_range(0..3)] } else { Kind::Centreline };
            for (region, positive) in [(missed, true), (excess, false)] {
                let drawn = scribbles(rng, region, size, kind, user.scribble_limit / 2);
                given.extend(drawn.into_iter().map(|at| (voxel(at, size), positive)));
            }
            let mut seen = HashSet::new();
            given.retain(|p| seen.insert(*p));
        }
        given
    }
}

/// A mask by a function of i, j and k.
fn mask([ni, nj, nk]: [usize; 3], on: impl Fn([usize; 3]) -> bool) -> Vec<u8> {
    (0..ni * nj * nk).map(|at| u8::from(on([at / (nj * nk), at / nk % nj, at % nk]))).collect()
}

/// Whether a voxel is in a ball.
fn ball(p: [usize; 3], centre: [usize; 3], radius: usize) -> bool {
    (0..3).map(|a| p[a].abs_diff(centre[a]).pow(2)).sum::<usize>() <= radius * radius
}

/// Regions of many shapes, each behind its name and the size of its volume.
fn regions() -> Vec<(&'static str, [usize; 3], Vec<u8>)> {
    let size = [43, 38, 21];
    let of = |name, on: &dyn Fn([usize; 3]) -> bool| (name, size, mask(size, on));
    vec![
        of("a ball", &|p| ball(p, [20, 18, 10], 9)),
        of("a ball over the faces", &|p| ball(p, [2, 36, 1], 17)),
        of("all", &|_| true),
        of("nothing", &|_| false),
        of("a voxel", &|p| p == [7, 6, 5]),
        of("a voxel in a corner", &|p| p == [42, 37, 20]),
        // Thinning leaves nothing of it, and no noise is drawn.
        of("four voxels, and others on the next slice", &|p| match p[2] {
            3 => (9..11).contains(&p[0]) && (9..11).contains(&p[1]),
            4 => (5..30).contains(&p[0]) && (5..25).contains(&p[1]),
            _ => false,
        }),
        of("rows", &|p| p[0] == 11 && p[2] % 4 == 1),
        of("columns", &|p| p[1] == 0 && p[2] % 5 == 2),
        of("a diagonal", &|p| p[0].abs_diff(p[1]) < 2),
        of("three parts", &|p| {
            ball(p, [8, 8, 3], 4) || ball(p, [33, 30, 6], 5) || ball(p, [9, 33, 17], 3)
        }),
        of("dust", &|p| (p[0] * 7919 + p[1] * 104_729 + p[2] * 1_299_709).is_multiple_of(61)),
        ("a plane", [50, 70, 1], mask([50, 70, 1], |p| p[0] > 2 && p[1] * 2 > p[0])),
        ("a row", [1, 33, 4], mask([1, 33, 4], |p| p[1] > 4)),
        // Fewer columns and rows than a Gaussian reaches, and more of them.
        ("wide", [9, 131, 2], mask([9, 131, 2], |p| p[0] % 8 < 6)),
        ("high", [131, 9, 2], mask([131, 9, 2], |p| p[1] % 8 < 6)),
    ]
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// The stages, and a number drawn after them.
type Drawn = (Vec<(usize, [Vec<u8>; 3])>, u64);

fn all_of(stages: Vec<Stages>, mut rng: ChaCha8Rng) -> Drawn {
    let of = |s: Stages| (s.slice, [s.drawn, s.broken, s.warped]);
    (stages.into_iter().map(of).collect(), rng.random())
}

fn expected(seed: u64, region: &[u8], size: [usize; 3], kind: Kind) -> Drawn {
    let mut rng = generator(seed, &[]);
    all_of(reference::draw(&mut rng, region, size, kind), rng)
}

fn found(pool: &ThreadPool, seed: u64, region: &[u8], size: [usize; 3], kind: Kind) -> Drawn {
    let mut rng = generator(seed, &[]);
    all_of(pool.install(|| draw(&mut rng, region, size, kind)), rng)
}

#[test]
fn scribbles_are_the_same_on_any_number_of_threads() {
    let (pools, mut slices) = ([1, 8].map(pool), 0);
    for (name, size, region) in regions() {
        for kind in [Kind::Centreline, Kind::Line, Kind::Contour] {
            for seed in 0..3 {
                let expected = expected(seed, &region, size, kind);
                slices += expected.0.len();
                for pool in &pools {
                    let (found, n) =
                        (found(pool, seed, &region, size, kind), pool.current_num_threads());
                    assert!(found == expected, "{name}, {kind:?}, seed {seed}, {n} threads");
                }
            }
        }
    }
    assert!(slices > 500, "{slices} slices");
}

/// Slices of which not all are drawn at the same time.
#[test]
fn scribbles_of_many_large_slices_are_the_same_too() {
    let size = [104, 100, 60];
    let region = mask(size, |p| p[2] % 9 != 4 && p[0] + p[1] > p[2]);
    let expected = expected(5, &region, size, Kind::Contour);
    assert_eq!(expected.0.len(), 53);
    assert!(found(&pool(8), 5, &region, size, Kind::Contour) == expected);
}

#[test]
fn prompts_are_those_of_lists_of_all_wrong_voxels() {
    let users = [
        User { scribbles: 1.0, ..User::training() },
        User { scribbles: 0.5, scribble_limit: 100_000, ..User::training() },
        User::of_points(200),
    ];
    for (name, size, label) in regions() {
        // An answer that is shifted, and one with other voxels.
        let shifted: Vec<u8> = [&label[1..], &[0]].concat();
        let other = mask(size, |p| p[0] > size[0] / 3 && p[1] % 3 != 1);
        for answer in [None, Some(&label), Some(&shifted), Some(&other)] {
            let pairs = || label.iter().zip(answer.unwrap_or(&shifted));
            let mut missed = label.clone();
            let mut excess = vec![0; label.len()];
            if answer.is_some() {
                missed = pairs().map(|(l, a)| u8::from(*l != 0 && *a == 0)).collect();
                excess = pairs().map(|(l, a)| u8::from(*l == 0 && *a != 0)).collect();
            }
            let errors = Errors::of(&label, answer.map(Vec::as_slice));
            assert!(errors.missed() == missed && errors.excess() == excess, "{name}");
            let wrong: Vec<u8> = missed.iter().zip(&excess).map(|(m, e)| m | e).collect();
            assert!(errors.wrong() == wrong, "{name}");
            assert_eq!(errors.is_empty(), wrong.iter().all(|v| *v == 0), "{name}");
            for (at, user) in users.iter().enumerate() {
                let [mut rng, mut plain] = [(); 2].map(|()| generator(at as u64, &[7]));
                let given = user.correct(&mut rng, &errors, size);
                let expected = reference::correct(user, &mut plain, [&missed, &excess], size);
                assert!(given == expected, "{name}, user {at}");
                assert_eq!(rng.random::<u64>(), plain.random::<u64>(), "{name}, user {at}");
            }
        }
    }
}

#[test]
fn boxes_are_those_of_every_voxel() {
    for (name, size, label) in regions() {
        let mut bounds = None;
        for at in (0..label.len()).filter(|&v| label[v] != 0) {
            include(&mut bounds, voxel(at, size).map(|v| v as usize));
        }
        assert_eq!(bounding_box(&label, size), bounds.map(|b| b.map(|v| v as i32)), "{name}");
    }
}

#[test]
fn bits_are_what_the_bytes_say() {
    let mut rng = generator(3, &[]);
    for len in [0, 1, 7, 8, 63, 64, 65, 130, 4096, 4097, 20_000] {
        for share in [0.0, 0.01, 0.5, 1.0] {
            // Whatever is not 0 counts.
            let mark = |_| if rng.random_bool(share) { rng.random_range(1..=255) } else { 0 };
            let bytes: Vec<u8> = (0..len).map(mark).collect();
            let bits = Bits::of(&bytes);
            let set: Vec<usize> = (0..len).filter(|&at| bytes[at] != 0).collect();
            assert_eq!(bits.count(), set.len());
            assert_eq!(bits.is_empty(), set.is_empty());
            assert!((0..len).all(|at| bits.has(at) == (bytes[at] != 0)), "{len}, {share}");
            let ones: Vec<u8> = bytes.iter().map(|v| u8::from(*v != 0)).collect();
            assert!(bits.bytes() == ones, "{len}, {share}");
            let mut packed = vec![0u8; len.div_ceil(8)];
            set.iter().for_each(|at| packed[at / 8] |= 128u8 >> (at % 8));
            assert!(Bits::packed(&packed, len) == bits, "{len}, {share}");
            // What a device leaves after the last voxel is no voxel.
            if let (Some(last), used @ 1..) = (packed.last_mut(), len % 8) {
                *last |= 255u8 >> used;
            }
            assert!(Bits::packed(&packed, len) == bits, "{len}, {share}");
            let ranks = Ranks::of(bits);
            assert_eq!(ranks.count(), set.len());
            assert!((0..set.len()).map(|n| ranks.nth(n)).eq(set), "{len}, {share}");
        }
    }
}
