//! The peak rates of a device, measured: the roofs of a roofline model (Williams et al. 2009).

use crate::device::cuda::{Launch, TypedKernel, kernels};
use crate::device::simd::{Simd, dispatch};
use crate::device::{Cpu, Cuda, DType, DisjointWriter, Isa, Precision};
use crate::tensor::OpError;
use std::hint::black_box;
use std::time::Instant;

/// The two peak rates that bound a device's ops: of arithmetic, and of memory.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Floating-point operations per second, a multiply-add counting as two. On the CPU they are
    /// multiply-adds in float32 in the registers of all threads.
    pub flops: f64,
    /// Bytes per second that come from or go to memory. On the CPU they are those of `a = b + c` on
    /// all threads, two reads and a write, with arrays too large for the caches.
    pub bytes: f64,
}

/// Independent sums: more than the product of latency and rate.
const SUMS: usize = 16;
/// Multiply-adds of each sum in a unit of work.
const ROUNDS: usize = 1 << 20;
/// Floats of each array: 256 MB together with the other two.
const FLOATS: usize = 22 << 20;

/// A unit of work, in the registers of `S`.
///
/// # Safety
/// The processor has the instruction set of `S`.
#[inline(always)]
unsafe fn multiply_add<S: Simd>(values: &[f32; 64]) -> f32 {
    // SAFETY: a register is at most 16 floats, of the 64 or `out`; the rest is guaranteed by the
    // caller.
    unsafe {
        let (a, b) = (S::load(black_box(values).as_ptr()), S::load(values[16..].as_ptr()));
        let mut sums = [S::zero(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = S::fma(a, *sum, b);
            }
        }
        let mut out = [0.0f32; 16];
        sums.into_iter().fold(0.0, |total, sum| {
            S::store(out.as_mut_ptr(), sum);
            total + out[0]
        })
    }
}

/// One unit of work, and the number of its operations.
fn unit(isa: Isa) -> (unsafe fn(&[f32; 64]) -> f32, usize) {
    dispatch! { isa, S: Values, {
        /// # Safety
        /// The processor has the instruction set of `S`.
        unsafe fn compiled(values: &[f32; 64]) -> f32 {
            // SAFETY: guaranteed by the caller.
            unsafe { multiply_add::<S>(values) }
        }
    } =>
    (compiled, 2 * SUMS * ROUNDS * S::LANES) }
}

impl Ceilings {
    /// Measures the ceilings of a CPU: the best of five tries, which takes about a second.
    pub fn measure(cpu: &Cpu) -> Ceilings {
        let (work, operations) = unit(cpu.isa());
        let mut values = [0.5f32; 64];
        values[16..].fill(1e-3);
        let units = cpu.threads();
        let rate = |amount: f64, f: &mut dyn FnMut()| {
            let mut once = || {
                let start = Instant::now();
                f();
                amount / start.elapsed().as_secs_f64()
            };
            (0..5).map(|_| once()).fold(0.0, f64::max)
        };
        let flops = rate((units * operations) as f64, &mut || {
            cpu.for_each(units, |_| {
                // SAFETY: the device's Isa was made by asking the processor.
                black_box(unsafe { work(&values) });
            });
        });
        let (a, b) = (cpu.zeros(FLOATS), cpu.zeros(FLOATS));
        let mut sum = cpu.zeros(FLOATS);
        let run = FLOATS / units.max(8);
        let bytes = rate((12 * FLOATS) as f64, &mut || {
            let to = DisjointWriter::new(&mut sum);
            cpu.for_each(FLOATS / run, |unit| {
                // SAFETY: each unit writes its own run.
                let out = unsafe { to.slice(unit * run, run) };
                let (a, b) = (&a[unit * run..][..run], &b[unit * run..][..run]);
                out.iter_mut().zip(a.iter().zip(b)).for_each(|(o, (a, b))| *o = a + b);
            });
        });
        Ceilings { flops, bytes }
    }
}

/// The peak rates of a CUDA device.
#[derive(Clone, Copy, Debug)]
pub struct CudaCeilings {
    /// Bytes per second that a copy within its memory reads and writes.
    pub bytes: f64,
    /// Floating-point operations per second on tensor cores, in the precision that was asked for:
    /// in float32, whose products are three of TF32 each, a third of those of TF32.
    pub matrix: f64,
    /// Floating-point operations per second of multiply-adds in float32, without tensor cores.
    pub plain: f64,
}

impl CudaCeilings {
    /// Measures the ceilings: the best of five tries each, on tensor cores as `precision` uses them
    /// (in f16 if it does not). It takes 4 GB of device memory.
    ///
    /// # Errors
    /// The device is out of memory, or fails.
    pub fn measure(cuda: &Cuda, precision: impl Into<Precision>) -> Result<CudaCeilings, OpError> {
        let (precision, bytes): (Precision, usize) = (precision.into(), 2 << 30);
        let [from, to] = [cuda.allocate_bytes(bytes)?, cuda.allocate_bytes(bytes)?];
        cuda.clear(&from)?;
        let best = |work: &mut dyn FnMut() -> Result<(), OpError>| -> Result<f64, OpError> {
            let mut least = f64::INFINITY;
            for _ in 0..5 {
                let mut failure = None;
                let seconds = cuda.seconds(|| {
                    failure = work().err();
                    Ok(())
                })?;
                failure.map_or(Ok(()), Err)?;
                least = least.min(seconds);
            }
            Ok(least)
        };
        let copy = best(&mut || Ok(cuda.copy(&from, 0, &to, 0, bytes)?))?;
        let (blocks, rounds) = (4096usize, 4096usize);
        let out = cuda.allocate(blocks * 256, DType::F32)?;
        type Multiply = TypedKernel<kernels::CeilingMultiplyArgs<'static>>;
        let rate = |kernel: Multiply, per_round: f64| -> Result<f64, OpError> {
            let launch = Launch { grid: [blocks, 1, 1], ..Launch::per_element(0) };
            let seconds = best(&mut || {
                let (out, rounds) = ((&out).into(), rounds.into());
                Ok(cuda.launch(kernel, launch, kernels::CeilingMultiplyArgs { out, rounds })?)
            })?;
            Ok((blocks * rounds) as f64 * per_round / seconds)
        };
        let plain = rate(kernels::CEILING_MULTIPLY_F32, 256.0 * 64.0)?;
        // For 8 warps, 8 products each.
        let (half, float) = (64.0 * 4096.0, 64.0 * 2048.0);
        let matrix = match precision {
            Precision::F32 => rate(kernels::CEILING_MULTIPLY_TF32, float)? / 3.0,
            Precision::Tf32 => rate(kernels::CEILING_MULTIPLY_TF32, float)?,
            Precision::Bf16 => rate(kernels::CEILING_MULTIPLY_BF16, half)?,
            Precision::Ieee | Precision::F16 => rate(kernels::CEILING_MULTIPLY_F16, half)?,
        };
        Ok(CudaCeilings { bytes: 2.0 * bytes as f64 / copy, matrix, plain })
    }

    /// The ceilings that hold for `precision`: with tensor cores if it uses them, otherwise with
    /// multiply-adds in float32.
    pub fn of(&self, precision: impl Into<Precision>) -> Ceilings {
        let precision: Precision = precision.into();
        Ceilings {
            flops: if precision == Precision::Ieee { self.plain } else { self.matrix },
            bytes: self.bytes,
        }
    }
}
