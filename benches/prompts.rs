//! Criterion benches of a simulated user's round on a patch of 128³ voxels:
//! `cargo bench --bench prompts`. `RAYON_NUM_THREADS` sets the number of threads.

use criterion::{Criterion, criterion_group, criterion_main};
use prism::prompt::simulate::{Bits, Errors, Kind, User, generator, scribbles};
use std::hint::black_box;

const EDGE: usize = 128;

/// The mask of an ellipsoid of 230 000 voxels about `centre`.
fn ellipsoid(centre: [f32; 3]) -> Vec<u8> {
    let inside = |at: usize| {
        let p = [at / (EDGE * EDGE), at / EDGE % EDGE, at % EDGE];
        let away = |a: usize| ((p[a] as f32 - centre[a]) / [44.0, 36.0, 34.0][a]).powi(2);
        u8::from(away(0) + away(1) + away(2) <= 1.0)
    };
    (0..EDGE * EDGE * EDGE).map(inside).collect()
}

/// One bit per voxel, as a device sends an answer's mask.
fn packed(mask: &[u8]) -> Vec<u8> {
    mask.chunks(8).map(|eight| eight.iter().fold(0u8, |byte, v| byte << 1 | *v)).collect()
}

fn prompts(c: &mut Criterion) {
    let size = [EDGE; 3];
    let (label, answer) = (ellipsoid([60.0, 66.0, 64.0]), ellipsoid([64.0, 64.0, 61.0]));
    let mut group = c.benchmark_group("prompts on 128x128x128");
    let mut seed = 0;
    let mut next = || {
        seed += 1;
        generator(seed, &[])
    };
    for kind in [Kind::Centreline, Kind::Line, Kind::Contour] {
        group.bench_function(format!("scribbles, {kind:?}"), |b| {
            b.iter(|| black_box(scribbles(&mut next(), &label, size, kind, 250)));
        });
    }
    let all = User { scribbles: 1.0, ..User::training() };
    for (name, user) in [("points", User::of_points(25)), ("points and scribbles", all)] {
        group.bench_function(format!("a round of {name}"), |b| {
            b.iter(|| {
                let errors = Errors::of(&label, Some(&answer));
                black_box((!errors.is_empty()).then(|| user.correct(&mut next(), &errors, size)))
            });
        });
    }
    // As in training.
    let (label, sent) = (Bits::of(&label), packed(&answer));
    group.bench_function("a round of points, by bits", |b| {
        b.iter(|| {
            let answer = Bits::packed(&sent, EDGE * EDGE * EDGE);
            let errors = Errors::between(&label, Some(&answer));
            let user = User::of_points(25);
            black_box((!errors.is_empty()).then(|| user.correct(&mut next(), &errors, size)))
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = prompts
}
criterion_main!(benches);
