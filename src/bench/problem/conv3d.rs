//! `conv3d:n1ic32oc32d128k3s1p1`: items, input and output channels, edge of the input, edge of the
//! kernel, stride, padding. Kernels of 3 with stride 1 and padding 1, and others as large as their
//! stride without padding.

use super::judge::{noise, sampled, split, taps, weights, wide};
use super::{Count, Judge, Kind, Read, Run, Task, cube, multiply_adds, numbers, positive};
use crate::device::Device;
use crate::ops::conv3d::{ConvInput, Epilogue, PackedConv, conv3d};
use crate::ops::strided::patch_conv;
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "conv3d:n1ic32oc32d128k3s1p1", read };

#[derive(Debug)]
struct Conv {
    /// Items.
    n: usize,
    /// Input channels.
    ic: usize,
    /// Output channels.
    oc: usize,
    /// Edge of the input.
    d: usize,
    /// Edge of the kernel.
    k: usize,
}

fn read(sizes: &str) -> Read {
    let one = Some(1);
    let [n, ic, oc, d, k, s, p] = numbers(
        sizes,
        ["n", "ic", "oc", "d", "k", "s", "p"],
        [one, None, None, None, Some(3), one, None],
    )
    .or_else(|e| {
        // Padding follows from the kernel if it is not given.
        let [n, ic, oc, d, k, s] =
            numbers(sizes, ["n", "ic", "oc", "d", "k", "s"], [one, None, None, None, Some(3), one])
                .map_err(|_| e)?;
        Ok::<_, String>([n, ic, oc, d, k, s, usize::from(k == 3 && s == 1)])
    })?;
    // The kernel alone determines which of the two it is.
    let is_read = match k {
        3 => [s, p] == [1, 1],
        _ => [s, p] == [k, 0] && d.checked_rem(k) == Some(0),
    };
    if !is_read {
        return Err(format!(
            "k{k}s{s}p{p} over d{d}: k3s1p1, or another kernel that is its stride and divides d, without padding"
        ));
    }
    positive(&[n, ic, oc, d, k])?;
    Ok(Arc::new(Conv { n, ic, oc, d, k }))
}

impl fmt::Display for Conv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conv { n, ic, oc, d, k } = self;
        let [s, p] = if self.is_same() { [1, 1] } else { [*k, 0] };
        write!(f, "conv3d:n{n}ic{ic}oc{oc}d{d}k{k}s{s}p{p}")
    }
}

impl Conv {
    /// Whether it keeps its input's size: a kernel of 3 always does.
    fn is_same(&self) -> bool {
        self.k == 3
    }

    /// Edge of the output.
    fn out(&self) -> usize {
        if self.is_same() { self.d } else { self.d / self.k }
    }
}

impl Task for Conv {
    fn count(&self) -> Option<Count> {
        let Conv { n, ic, oc, d, k } = *self;
        let out = self.out();
        Some(Count {
            flops: multiply_adds(&[n, ic, oc, out, out, out, k, k, k]),
            floats: n as f64 * (ic as f64 * cube(d) + oc as f64 * cube(out))
                + (ic * oc) as f64 * cube(k),
        })
    }

    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let Conv { n, ic, oc, d, k } = *self;
        let same = self.is_same();
        let (x, b) = (noise(&[n, d, d, d, ic], 1), noise(&[oc], 3));
        let w = weights(&[oc, ic, k, k, k], ic * k * k * k, 2);
        let (xs, ws, bs) = (wide(&x), wide(&w), wide(&b));
        let judge = {
            let out = self.out();
            sampled(n * out.pow(3) * oc, 512, move |at| {
                let (item, v, o) = split(at, out, oc);
                let from = |p: [usize; 3], c: usize| {
                    xs[(((item * d + p[0]) * d + p[1]) * d + p[2]) * ic + c]
                };
                let cube = k * k * k;
                let inputs = |t: usize, p: [usize; 3]| {
                    (0..ic).map(|c| from(p, c) * ws[(o * ic + c) * cube + t]).sum::<f64>()
                };
                let sum = match same {
                    true => taps(d, v, inputs),
                    false => (0..cube)
                        .map(|t| {
                            inputs(
                                t,
                                [v[0] * k + t / (k * k), v[1] * k + t / k % k, v[2] * k + t % k],
                            )
                        })
                        .sum(),
                };
                sum + bs[o]
            })
        };
        let on = device.clone();
        let run: Run = if same {
            let packed = PackedConv::new(device.cpu(), &w, 0..ic, Some(&b))?;
            Box::new(move || Ok(conv3d(&on, ConvInput::shared(&x), &packed, Epilogue::SUMS)?.map))
        } else {
            Box::new(move || patch_conv(&on, &x, &w, Some(&b)))
        };
        Ok((run, judge))
    }
}
