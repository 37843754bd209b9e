//! Every kernel that the base network launches: its work, the least time that takes, and on a GPU
//! its actual time.
//!
//! `cargo bench --bench kernels -- [DEVICE [PRECISION [SIZE]]]`, by default `emulated f16 128`:
//! there nothing is computed and nothing is timed, but the table of work and floors is the same.
//! With a GPU the ceilings are measured first, and the last column is the share of them that was
//! reached. Ends with the same data as JSON.
//!
//! `cargo bench --bench kernels -- compile ARCH` compiles every file for an architecture (as
//! `sm_90a`) into the cache, for a machine whose NVRTC is of the same version. What is there is not
//! compiled again.

use prism::bench::{CudaCeilings, TrainingStep};
use prism::device::cuda::KernelRecord;
use prism::device::cuda::nvrtc;
use prism::device::cuda::source::{FILES, is_matrix};
use prism::device::{Cuda, Device, Precision};
use prism::model::{Config, Model, PatchPrompts, Weights};
use prism::ops::loss::{KERNEL, Target};
use prism::tensor::{OpError, Tensor};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

/// The ceilings that floors are computed with if none were measured: an H200's.
const BYTES_PER_SECOND: f64 = 4.3e12;
const FLOPS_PER_SECOND: f64 = 790e12;
const PLAIN_FLOPS_PER_SECOND: f64 = 60e12;

/// Launches of one kernel.
#[derive(Default)]
struct Group {
    count: usize,
    flops: f64,
    bytes: f64,
    floor: f64,
    seconds: Option<f64>,
}

fn table(title: &str, seen: &[KernelRecord], ceilings: CudaCeilings) -> serde_json::Value {
    let mut groups: BTreeMap<&str, Group> = BTreeMap::new();
    for s in seen {
        let group = groups.entry(&s.kernel).or_default();
        let rate = if is_matrix(&s.kernel) { ceilings.matrix } else { ceilings.plain };
        group.count += 1;
        group.flops += s.launch.cost.flops;
        group.bytes += s.launch.cost.bytes;
        group.floor += (s.launch.cost.flops / rate).max(s.launch.cost.bytes / ceilings.bytes);
        group.seconds = s.seconds.map(|t| t + group.seconds.unwrap_or(0.0)).or(group.seconds);
    }
    println!("\n{title}\n");
    println!(
        "| kernel | launches | GFLOP | MB | floor, us | measured, us | of the ceiling |\n|---|---|---|---|---|---|---|"
    );
    let mut rows: Vec<_> = groups.iter().collect();
    rows.sort_by(|a, b| {
        b.1.seconds.unwrap_or(b.1.floor).total_cmp(&a.1.seconds.unwrap_or(a.1.floor))
    });
    let line = |name: &str, g: &Group| {
        let taken = g.seconds.map_or("".into(), |t| format!("{:.1}", t * 1e6));
        let share = g.seconds.map_or("".into(), |t| format!("{:.0} %", 100.0 * g.floor / t));
        let (flops, bytes, floor) = (g.flops / 1e9, g.bytes / 1e6, g.floor * 1e6);
        println!(
            "| {name} | {} | {flops:.1} | {bytes:.1} | {floor:.1} | {taken} | {share} |",
            g.count
        );
    };
    let mut all = Group::default();
    for (name, g) in &rows {
        line(name, g);
        all.count += g.count;
        all.flops += g.flops;
        all.bytes += g.bytes;
        all.floor += g.floor;
        all.seconds = g.seconds.map(|t| t + all.seconds.unwrap_or(0.0)).or(all.seconds);
    }
    line("all", &all);
    let json = |name: &str, g: &Group| serde_json::json!({ "kernel": name, "launches": g.count, "flops": g.flops, "bytes": g.bytes, "floor": g.floor, "seconds": g.seconds });
    rows.iter().map(|(name, g)| json(name, g)).chain([json("all", &all)]).collect()
}

/// Interactions of a training item.
const ITERATIONS: usize = 3;

/// The launches of a training step: one item forward and backward, the gradients' norm, the
/// optimiser.
fn training(
    device: &Device,
    cuda: &Cuda,
    size: usize,
    timed: bool,
) -> Result<Vec<KernelRecord>, OpError> {
    let image =
        Tensor::new([size; 3], (0..size.pow(3)).map(|i| (i % 997) as f32 / 500.0 - 1.0).collect());
    let label = (0..size.pow(3)).map(|i| f32::from(u8::from(i % size > size / 2))).collect();
    let target = Target::new(device, label, [size; 3], KERNEL)?;
    let prompts = PatchPrompts { points: vec![([9, 9, 9], true); 5], bounds: None };
    let training = RefCell::new(TrainingStep::new(
        device,
        Config { patch: size, ..Config::base() },
        ITERATIONS,
        false,
    ));
    if timed {
        // A step whose gradients overflow does less than one that changes the weights.
        training.borrow_mut().warm_up(&image, &target, &prompts)?;
    }
    let step = || -> Result<(), OpError> {
        let (_, norm) = training.borrow_mut().run(&image, &target, &prompts)?;
        assert!(!timed || norm.is_finite(), "the gradients' norm is {norm}");
        Ok(())
    };
    Ok(cuda.launches(timed, step)?.0)
}

fn compile(arch: &str) {
    let (major, minor) = nvrtc::version().unwrap_or_else(|e| panic!("{e}"));
    FILES.par_iter().for_each(|(file, _)| {
        let start = Instant::now();
        let code = nvrtc::code_of(file, arch).unwrap_or_else(|e| panic!("{e}"));
        println!("{file}: {} bytes, {:.1} s", code.len(), start.elapsed().as_secs_f64());
    });
    // scripts/gpu-pack and scripts/gpu-check read it.
    println!("NVRTC {major}.{minor}, {arch}");
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default.to_string(), Clone::clone);
    if arg(0, "") == "compile" {
        return compile(&arg(1, "sm_90a"));
    }
    let precision = match arg(1, "f16").as_str() {
        "f32" => Precision::F32,
        "tf32" => Precision::Tf32,
        "ieee" => Precision::Ieee,
        "bf16" => Precision::Bf16,
        _ => Precision::F16,
    };
    let size: usize = arg(2, "128").parse().expect("a size");
    let device =
        Device::open_as(&arg(0, "emulated"), 0, precision).unwrap_or_else(|e| panic!("{e}"));
    let Device::Cuda(cuda) = &device else { panic!("only CUDA devices have kernels") };
    let timed = arg(0, "emulated").starts_with("cuda");
    let ceilings = match timed {
        true => CudaCeilings::measure(cuda, precision).unwrap_or_else(|e| panic!("{e}")),
        false => CudaCeilings {
            bytes: BYTES_PER_SECOND,
            // TF32 runs at half the rate, and three passes of it at a third of that.
            matrix: match precision {
                Precision::F32 => FLOPS_PER_SECOND / 6.0,
                Precision::Tf32 => FLOPS_PER_SECOND / 2.0,
                _ => FLOPS_PER_SECOND,
            },
            plain: PLAIN_FLOPS_PER_SECOND,
        },
    };
    let said = if timed { "measured here" } else { "an H200's" };
    println!("{}; base, {size}³", device.describe());
    println!(
        "ceilings, {said}: {:.2} TB/s, {:.0} TFLOP/s in matrix instructions, {:.0} TFLOP/s in float",
        ceilings.bytes / 1e12,
        ceilings.matrix / 1e12,
        ceilings.plain / 1e12
    );
    let run = || -> Result<serde_json::Value, OpError> {
        let model = Model::new(
            &device,
            &Weights::hashed(Config { patch: size, ..Config::base() }, "public"),
        )?;
        // Score and mask tokens, five points, the box's corners.
        let [encode, interact] = model.launches(12, timed)?.expect("a CUDA device");
        let (first, second) = (
            table("Encode", &encode, ceilings),
            table("Interaction, 12 tokens", &interact, ceilings),
        );
        drop(model);
        let training = table(
            &format!("Training step, one item, {ITERATIONS} iterations"),
            &training(&device, cuda, size, timed)?,
            ceilings,
        );
        Ok(serde_json::json!({
            "training": training, "device": device.describe(), "size": size, "bytes_per_second": ceilings.bytes, "flops_per_second": ceilings.matrix,
            "plain_flops_per_second": ceilings.plain, "encode": first, "interact": second,
        }))
    };
    match run() {
        Ok(json) => println!("\n{json}"),
        Err(e) => panic!("{e}"),
    }
}
