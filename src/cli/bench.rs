//! `prism bench`.

use super::{DeviceArgs, Failure, print};
use crate::bench::{Ceilings, Latency, Workload, peak_memory, table};
use crate::device::Device;
use crate::model::weights::Precision;
use crate::model::{Config, Model, Weights};
use clap::Args;
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a user waits: loading, encoding a scan, the first click, and clicks of so many prompt voxels. With --report, where the time goes: each op's
/// arithmetic, bytes and time beside the two ceilings of this machine, which are measured first.
#[derive(Args)]
pub struct Bench {
    /// Model file, or a preset's network with hashed weights: base, small
    #[arg(long, default_value = "base", value_name = "FILE|PRESET")]
    model: String,
    /// Patch edge in voxels, instead of a preset's own; a multiple of 16
    #[arg(long, value_name = "N")]
    patch: Option<usize>,
    /// Prompt voxels of a click; several are measured one after another
    #[arg(long, default_value = "1,60,500,5000", value_delimiter = ',', value_name = "N,..")]
    points: Vec<usize>,
    /// Clicks for each
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    clicks: u32,
    /// Also print, as Markdown, what each op did (CPU only)
    #[arg(long)]
    report: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

impl Bench {
    pub fn run(&self) -> Result<(), Failure> {
        let device = self.device.open()?;
        // A preset's weights go through a file, to be mapped as anybody's would.
        let folder = tempfile::tempdir()?;
        let preset = Config::preset(&self.model);
        let path = match &preset {
            None if !Path::new(&self.model).exists() => {
                return Err(Failure::Usage(format!("--model {}: neither a file nor a preset (base, small)", self.model)));
            }
            None => self.model.clone().into(),
            Some(config) => {
                let config = Config { patch: self.patch.unwrap_or(config.patch), ..config.clone() };
                config.check().map_err(|e| Failure::Usage(e.to_string()))?;
                let path = folder.path().join("model.safetensors");
                Weights::hashed(config, "public").save(&path, Precision::F32)?;
                path
            }
        };
        if preset.is_none() && self.patch.is_some() {
            return Err(Failure::Usage("--patch goes with a preset: a model file has its own".into()));
        }
        let start = Instant::now();
        let model = Model::new(&device, &Weights::open(&path)?)?;
        let load = start.elapsed();
        let start = Instant::now();
        model.warm_up()?;
        let warm = start.elapsed();
        print(&format!("device       {}\nmodel        {}, patch {}\n", device.describe(), self.model, model.config().patch))?;
        print(&format!("load         {:.0} ms, and {:.0} ms to warm up\n", ms(load), ms(warm)))?;

        let (mut work, first) = Workload::new(&model)?;
        // A user's first click, before anything has run twice.
        let click = work.click(self.points[0], 1)?.clicks[0];
        let encodes = Latency { points: 0, clicks: work.encode(5)? };
        let text = format!("encode       {:.0} ms, the first one {:.0} ms\n", ms(encodes.percentile(0.5)), ms(first));
        print(&text)?;
        print(&format!("first click  {:.0} ms\n", ms(click)))?;
        for &points in &self.points {
            let l = work.click(points, self.clicks as usize)?;
            let (p50, p99) = (ms(l.percentile(0.5)), ms(l.percentile(0.99)));
            print(&format!("click        {p50:.0} ms p50, {p99:.0} ms p99 of {} with {points} prompt voxels\n", self.clicks))?;
        }
        if let Some(peak) = peak_memory() {
            print(&format!("memory       {:.0} MB at most\n", peak as f64 / 1e6))?;
        }
        if self.report {
            print(&self.tables(&device, &mut work)?)?;
        }
        Ok(())
    }

    fn tables(&self, device: &Device, work: &mut Workload) -> Result<String, Failure> {
        let Device::Cpu(cpu) = device else {
            return Err(Failure::Usage("--report tells of the CPU's ops; of a CUDA device's kernels, benches/kernels.rs does".into()));
        };
        let ceilings = Ceilings::measure(cpu);
        let points = self.points.iter().copied().find(|p| *p > 1).unwrap_or(self.points[0]);
        let [encode, click] = work.profile(points, 5)?.expect("it is the CPU");
        let mut text = format!(
            "\nCeilings measured here: {:.0} GFLOP/s in float32, {:.1} GB/s.\n\n## Encode\n\n{}\n## Click with {points} prompt voxels\n\n{}",
            ceilings.flops / 1e9,
            ceilings.bytes / 1e9,
            table(&encode, &ceilings),
            table(&click, &ceilings)
        );
        writeln!(text)?;
        Ok(text)
    }
}
