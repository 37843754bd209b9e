//! A problem made ready to run, and judged: its result is compared with the expected one.

use super::problem::{Judge, Problem, Run};
use crate::device::Device;
use crate::tensor::{OpError, Tensor};

/// A problem ready to run on a device.
pub struct Prepared {
    device: Device,
    run: Run,
    judge: Judge,
    tolerance: f64,
}

impl Prepared {
    /// Makes a problem ready to run: its inputs and weights.
    ///
    /// # Errors
    /// The device has no room for them, or fails.
    pub fn new(device: &Device, problem: &Problem) -> Result<Prepared, OpError> {
        let (run, judge) = problem.prepare(device)?;
        let exact = if problem.flops().is_some() { 1e-5 } else { 1e-3 };
        let tolerance = if device.products().rounds() { 2e-2 } else { exact };
        Ok(Prepared { device: device.clone(), run, judge, tolerance })
    }

    /// Runs the problem once, and waits for the device; its result stays where it is.
    pub fn run(&mut self) -> Result<Tensor, OpError> {
        let out = (self.run)()?;
        if let Device::Cuda(cuda) = &self.device {
            cuda.synchronize()?;
        }
        Ok(out)
    }

    /// Runs the problem once and compares the result with the plainest formula in float64, at some
    /// places: returns its relative L2 error, infinite if it is NaN, and the largest that is right.
    pub fn check(&mut self) -> Result<[f64; 2], OpError> {
        let out = self.run()?;
        let pairs = (self.judge)(&out)?;
        let square =
            |f: fn(&(f64, f64)) -> f64| pairs.iter().map(|p| f(p).powi(2)).sum::<f64>().sqrt();
        let error =
            square(|(got, want)| got - want) / square(|(_, want)| *want).max(f64::MIN_POSITIVE);
        Ok([if error.is_nan() { f64::INFINITY } else { error }, self.tolerance])
    }
}

#[cfg(test)]
mod tests {
    use super::super::suite;
    use super::*;
    use crate::device::{Cpu, Isa};

    /// Every kind, on the kernels of this machine and the portable ones; and an oracle that detects
    /// a wrong result.
    #[test]
    fn every_kind_agrees_with_its_oracle() {
        let mut problems = suite(include_str!("../../benches/problems/quick.txt")).unwrap();
        // And sizes that do not fill a register.
        let odd = [
            "conv3d:ic3oc5d6",
            "conv3d:n2ic32oc32d16",
            "conv3d:ic4oc6d8k2s2p0",
            "upcat:ic8uc6sc5oc7d4",
            "attn:h2d8s4w0",
            "attn:h2d8s5w3",
            "xattn:h2d8q5k33",
            "linear:m9k40n17",
            "lnorm:m5c24",
        ];
        problems.extend(odd.map(|text| text.parse::<Problem>().unwrap()));
        for problem in problems {
            for isa in [Isa::PORTABLE, Isa::best()] {
                let device = Device::Cpu(Cpu::with_isa(2, isa).unwrap());
                let mut prepared = Prepared::new(&device, &problem).unwrap();
                let [error, tolerance] = prepared.check().unwrap();
                assert!(error <= tolerance, "{problem}, {isa}: {error}");
                let out = prepared.run().unwrap();
                let wrong = Tensor::new(out.shape(), out.data().iter().map(|v| v * 1.01).collect());
                let pairs = (prepared.judge)(&wrong).unwrap();
                assert!(
                    pairs.iter().any(|(got, want)| (got - want).abs() > 5e-3 * want.abs()),
                    "{problem}: a wrong result passes"
                );
            }
        }
    }
}
