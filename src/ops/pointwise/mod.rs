//! Ops on single values or voxels: activations, max-pooling, sums of maps, the mask head and the
//! heads of the refiner.

pub(crate) mod cuda;
pub mod grad;
mod mask_logits;

use self::mask_logits::MaskLogits;
use super::conv3d::{ConvInput, pooled};
use super::norm::ChannelNorm;
use super::resample;
use crate::device::cuda::kernels;
use crate::device::profile::OpCost;
use crate::device::simd::{self, multiversion};
use crate::device::{Cpu, Cuda, Device};
use crate::memory;
use crate::microkernel::gelu::gelu_run;
use crate::tensor::{OpError, Tensor};

/// Values of one unit of work.
const RUN: usize = 1 << 14;

multiversion! {
    fn sigmoid_run(x: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = simd::sigmoid::<FUSED>(*x);
        }
    }
}

fn map(cpu: &Cpu, x: &Tensor, f: impl Fn(&[f32], &mut [f32]) + Sync + Send) -> Tensor {
    let mut out = cpu.alloc(x.len());
    cpu.chunks_mut(&mut out, RUN, |unit, out| f(&x.data()[unit * RUN..][..out.len()], out));
    Tensor::from_buffer(x.shape(), out)
}

/// The GELU of each value by the error function, `x Φ(x)`.
pub fn gelu(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    match device {
        Device::Cpu(cpu) => Ok(map(cpu, x, |x, out| {
            out.copy_from_slice(x);
            gelu_run(cpu.isa(), out);
        })),
        Device::Cuda(cuda) => cuda::function(cuda, x, cuda::Function::Gelu),
    }
}

/// The logistic function of each value, `1 / (1 + exp(-x))`.
pub fn sigmoid(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    match device {
        Device::Cpu(cpu) => Ok(map(cpu, x, |x, out| sigmoid_run(cpu.isa(), x, out))),
        Device::Cuda(cuda) => cuda::function(cuda, x, cuda::Function::Sigmoid),
    }
}

/// The mask of positive values, on the host: one bit per value, set where it is above 0, the first
/// in the highest bit of the first byte. Bits after the last value are 0.
///
/// A CUDA device is waited for; it sends these bits.
pub fn positive(device: &Device, x: &Tensor) -> Result<Vec<u8>, OpError> {
    if let (Device::Cuda(cuda), true) = (device, x.len().is_multiple_of(8) && !x.is_empty()) {
        return cuda::pack_bits(cuda, x);
    }
    let values = x.try_data()?;
    let mut bits = memory::zeroed::<u8>("a mask", values.len().div_ceil(8));
    device.cpu().chunks_mut(&mut bits, RUN / 8, |unit, bits| {
        for (byte, values) in bits.iter_mut().zip(values[unit * RUN..].chunks(8)) {
            *byte = values
                .iter()
                .enumerate()
                .fold(0, |byte, (at, v)| byte | u8::from(*v > 0.0) << (7 - at));
        }
    });
    Ok(bits)
}

/// Softmax over the last axis. Computed on the host.
pub fn softmax(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    if x.is_empty() {
        return Err(x.shape_error("softmax", "x", "no empty axis"));
    }
    let mut out = device.cpu().alloc(x.len());
    out.copy_from_slice(x.try_data()?);
    super::attention::softmax(device.cpu(), &mut out, x.channels());
    Ok(Tensor::from_buffer(x.shape(), out))
}

/// The sum of two tensors, in the shape of `a`; `b` is repeated over leading axes if it has fewer
/// values.
pub fn add(device: &Device, a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    if b.is_empty()
        || !a.len().is_multiple_of(b.len())
        || !a.shape().ends_with(&b.shape()[b.shape().len().saturating_sub(1)..])
    {
        return Err(b.shape_error("add", "b", format!("a trailing part of {:?}", a.shape())));
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return cuda::add(cuda, a, b),
    };
    let _op = cpu.op("add", || OpCost {
        problem: format!("{:?}", a.shape()),
        flops: a.len() as f64,
        floats: 2 * a.len() + b.len(),
    });
    let mut out = cpu.alloc(a.len());
    cpu.chunks_mut(&mut out, b.len(), |unit, out| {
        let a = &a.data()[unit * b.len()..];
        out.iter_mut().zip(a.iter().zip(b.data())).for_each(|(o, (a, b))| *o = a + b);
    });
    Ok(Tensor::from_buffer(a.shape(), out))
}

/// The sum of a map of float32 and of a map of a device of 16 bits, in the first one's memory.
///
/// # Errors
/// The first map is not on the device in float32, has other owners or another number of values, or
/// the device fails.
pub(crate) fn accumulate(cuda: &Cuda, mut sum: Tensor, part: &Tensor) -> Result<Tensor, OpError> {
    const OP: &str = "accumulate";
    if part.len() != sum.len() {
        return Err(part.shape_error(OP, "the part", format!("{:?}", sum.shape())));
    }
    if !sum.is_f32_on(cuda) || !sum.is_unique() {
        let message = "the sum is not float32 on the device, or has other owners".into();
        return Err(OpError::Argument { op: OP, message });
    }
    cuda::accumulate(cuda, &sum, part)
}

/// `a b + c`, value by value, of three tensors with the same number of values, in the shape of `a`.
pub fn multiply_add(
    device: &Device,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
) -> Result<Tensor, OpError> {
    for (what, t) in [("b", b), ("c", c)] {
        if t.len() != a.len() {
            return Err(t.shape_error("multiply_add", what, format!("{:?}", a.shape())));
        }
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return cuda::multiply_add(cuda, a, b, c),
    };
    let _op = cpu.op("multiply and add", || OpCost {
        problem: format!("{:?}", a.shape()),
        flops: (2 * a.len()) as f64,
        floats: 4 * a.len(),
    });
    let mut out = cpu.alloc(a.len());
    for (((o, a), b), c) in out.iter_mut().zip(a.data()).zip(b.data()).zip(c.data()) {
        *o = a * b + c;
    }
    Ok(Tensor::from_buffer(a.shape(), out))
}

/// Maximum over 2×2×2 voxels, stride 2: `[n, d, h, w, c]` to `[n, d/2, h/2, w/2, c]`. The network's
/// convolutions apply it to their inputs
/// ([`Prologue::max_pool`](super::conv3d::Prologue::max_pool)); this is the separate op.
pub fn max_pool3d(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    let input = ConvInput::shared(x).max_pooled();
    let [n, d, h, w, c] = input.extent("max_pool3d")?;
    if let Device::Cuda(cuda) = device {
        return resample::cuda::run(cuda, kernels::MAX_POOL, x, [n, d, h, w, c]);
    }
    Ok(pooled(device.cpu(), &input, [n, d, h, w, c]))
}

/// Maps that are linear in each voxel's channels, such as the logits of masks, the norm of `x`
/// applied on load.
///
/// `x` `[1, d, h, w, c]`, plus `add` of the same shape if given, times `weights` `[m, c]`, plus
/// `bias` `[m]`, gives `m` maps `[m, d, h, w]`. The mask head is this with the hypernetworks'
/// outputs as weights, the refiner's error map and correction with weights of its own.
pub fn mask_logits(
    device: &Device,
    x: &Tensor,
    norm: &ChannelNorm,
    add: Option<&Tensor>,
    weights: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (mask_logits, [d, h, w, c]) = check_mask_logits(x, norm, add, weights, bias)?;
    match device {
        Device::Cpu(cpu) => {
            let m = weights.len() / c;
            let _op = cpu.op("mask_logits", || mask_logits_work(&mask_logits, m, [d, h, w, c]));
            Ok(Tensor::from_buffer([m, d, h, w], mask_logits.maps(cpu)))
        }
        Device::Cuda(cuda) => cuda::mask_logits(cuda, x, [d, h, w, c], norm, add, weights, bias),
    }
}

/// One map of [`mask_logits()`] and the masks of all, on the CPU, without storing the other maps.
///
/// Gives map `chosen` `[1, d, h, w]`, and for every map one bit per voxel, set where it is
/// positive, the first voxel in the highest bit of the first byte.
///
/// # Errors
/// Shapes do not fit, or there is no such map.
pub fn chosen_mask_logits(
    cpu: &Cpu,
    x: &Tensor,
    norm: &ChannelNorm,
    weights: &Tensor,
    chosen: usize,
) -> Result<(Tensor, Vec<Vec<u8>>), OpError> {
    let (mask_logits, [d, h, w, c]) = check_mask_logits(x, norm, None, weights, None)?;
    if chosen >= weights.len() / c {
        let message = format!("map {chosen} of {} was chosen", weights.len() / c);
        return Err(OpError::Argument { op: MASK_LOGITS, message });
    }
    let _op = cpu.op("mask_logits", || mask_logits_work(&mask_logits, 1, [d, h, w, c]));
    let (map, bits) = mask_logits.chosen(cpu, chosen);
    Ok((Tensor::from_buffer([1, d, h, w], map), bits))
}

const MASK_LOGITS: &str = "mask_logits";

fn check_mask_logits<'a>(
    x: &'a Tensor,
    norm: &'a ChannelNorm,
    add: Option<&'a Tensor>,
    weights: &'a Tensor,
    bias: Option<&'a Tensor>,
) -> Result<(MaskLogits<'a>, [usize; 4]), OpError> {
    let [n, d, h, w, c] = ConvInput::shared(x).normed(norm).plus(add).extent(MASK_LOGITS)?;
    if n != 1 {
        return Err(x.shape_error(MASK_LOGITS, "x", "[1, d, h, w, c]"));
    }
    let m = weights.len() / c;
    weights.expect_shape(MASK_LOGITS, "weights", &[m, c])?;
    if let Some(bias) = bias {
        bias.expect_shape(MASK_LOGITS, "bias", &[m])?;
    }
    Ok((MaskLogits { x, norm, add, weights, bias }, [d, h, w, c]))
}

fn mask_logits_work(mask_logits: &MaskLogits, stored: usize, [d, h, w, c]: [usize; 4]) -> OpCost {
    let (voxels, m) = (d * h * w, mask_logits.weights.len() / c);
    let floats = voxels * (c * (1 + usize::from(mask_logits.add.is_some())) + stored);
    OpCost {
        problem: format!("{c} channels to {m} maps, {d}x{h}x{w}"),
        flops: (voxels * c * (4 + 2 * m)) as f64,
        floats,
    }
}
