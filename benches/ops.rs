//! Criterion benches of the base network's ops, `benches/problems/base.txt`:
//! `cargo bench --bench ops`. The same problems as `prism bench` times, with criterion's
//! statistics.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prism::bench::{Prepared, suite};
use prism::device::Device;
use std::hint::black_box;

fn ops(c: &mut Criterion) {
    let device = Device::open("cpu", 0).unwrap();
    let mut group = c.benchmark_group("ops, floating-point operations");
    for problem in suite(include_str!("problems/base.txt")).unwrap() {
        group.throughput(Throughput::Elements(problem.flops().unwrap_or(0.0) as u64));
        group.bench_function(problem.to_string(), |b| {
            let mut prepared = Prepared::new(&device, &problem).unwrap();
            b.iter(|| black_box(prepared.run().unwrap()));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = ops
}
criterion_main!(benches);
