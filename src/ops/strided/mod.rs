//! Convolutions whose stride is their kernel's size.
//!
//! They cut a map into patches ([`patch_conv`]) or unfold voxels into patches
//! ([`conv_transpose3d`]). Patches do not overlap, so both are a dense layer on rearranged values.

mod cuda;
pub mod grad;

use super::linear::{Activation, Layer, linear, linear_to};
use super::norm::cuda::layer_norm;
use super::norm::layer_norm_rows;
use crate::device::profile::OpCost;
use crate::device::{Device, DisjointWriter};
use crate::memory;
use crate::tensor::{OpError, Tensor, WEIGHTS};

/// A convolution with kernel and stride `e` and no padding, as a patch embedding is.
///
/// `x` `[n, d, h, w, in]`, with d, h and w divisible by `e`, `weight` `[out, in, e, e, e]` and
/// `bias` `[out]` give `[n, d / e, h / e, w / e, out]`.
pub fn patch_conv(
    device: &Device,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    const OP: &str = "patch_conv";
    let [_, d, h, w, c] = x.map5(OP, "x")?;
    let [out, inputs, e, e2, e3] = weight.map5(OP, "weight")?;
    if inputs != c || e == 0 || [e2, e3] != [e; 2] {
        return Err(weight.shape_error(
            OP,
            "weight",
            format!("[out, {c}, e, e, e], for x {:?}", x.shape()),
        ));
    }
    let coarse = [d / e, h / e, w / e];
    if coarse.map(|v| v * e) != [d, h, w] || x.is_empty() {
        return Err(x.shape_error(
            OP,
            "x",
            format!("spatial axes that {e} divides, for weight {:?}", weight.shape()),
        ));
    }
    let rows = unfold(device, x, e)?;
    let patch = rows.channels();
    linear(device, &rows, &weight.reshape([out, patch]), bias, Activation::None, None)
}

/// Patches of edge `e` as rows: `[n, d, h, w, c]` to `[n, d / e, h / e, w / e, c e³]`, channel
/// slowest.
fn unfold(device: &Device, x: &Tensor, e: usize) -> Result<Tensor, OpError> {
    let [n, d, h, w, c] = <[usize; 5]>::try_from(x.shape()).expect("checked by the caller");
    let [cd, ch, cw] = [d / e, h / e, w / e];
    if let Device::Cuda(cuda) = device {
        return cuda::unfold(cuda, x, [n, cd, ch, cw, c], e);
    }
    let patch = c * e * e * e;
    let mut rows = device.cpu().alloc(x.len());
    let _op = device.cpu().op("patches", || OpCost {
        problem: format!("{:?} by {e}", x.shape()),
        flops: 0.0,
        floats: 2 * x.len(),
    });
    device.cpu().chunks_mut(&mut rows, cw * patch, |line, rows| {
        let (item, i, j) = (line / ch / cd, line / ch % cd, line % ch);
        for (td, th) in (0..e).flat_map(|td| (0..e).map(move |th| (td, th))) {
            let from = &x.data()[((item * d + i * e + td) * h + j * e + th) * w * c..][..w * c];
            for (row, from) in rows.chunks_exact_mut(patch).zip(from.chunks_exact(e * c)) {
                let to = (td * e + th) * e;
                if c == 1 {
                    row[to..][..e].copy_from_slice(from);
                    continue;
                }
                for (tw, from) in from.chunks_exact(c).enumerate() {
                    for (channel, v) in from.iter().enumerate() {
                        row[channel * e * e * e + to + tw] = *v;
                    }
                }
            }
        }
    });
    Ok(Tensor::from_buffer([n, cd, ch, cw, patch], rows))
}

/// A layer norm over the channels of each output voxel, followed by GELU.
pub struct ChannelLayerNorm<'a> {
    /// The weight, `[out]`.
    pub weight: &'a Tensor,
    /// The bias, `[out]`.
    pub bias: &'a Tensor,
    /// What is added to the variance.
    pub eps: f32,
}

/// The weights of a transposed convolution with kernel 2 and stride 2, laid out as one matrix.
pub struct PackedTranspose {
    /// `[phase * out, in]`.
    matrix: Tensor,
    bias: Tensor,
    /// The bias once for each phase, `[phase * out]`.
    biases: Tensor,
}

impl PackedTranspose {
    /// Lays out `weight` `[in, out, 2, 2, 2]` and `bias` `[out]`, on the device where they are.
    ///
    /// # Errors
    /// The shapes do not fit, or values cannot be copied from a device.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<PackedTranspose, OpError> {
        const OP: &str = "conv_transpose3d";
        let [inputs, out, ..] = weight.map5(OP, "weight")?;
        if weight.shape()[2..] != [2, 2, 2] || weight.is_empty() {
            return Err(weight.shape_error(OP, "weight", "[in, out, 2, 2, 2]"));
        }
        bias.expect_shape(OP, "bias", &[out])?;
        // Weights whose home is a device are laid out there.
        if let Some(cuda) = weight.cuda()
            && [weight, bias].iter().all(|t| t.is_f32_on(&cuda))
        {
            let matrix = cuda::reverse_axes(&cuda, weight, [inputs, out, 8])?;
            return Ok(PackedTranspose {
                matrix: Tensor::persistent([8 * out, inputs], matrix),
                bias: bias.clone(),
                biases: Tensor::persistent([8 * out], cuda::repeat(&cuda, bias, 8)?),
            });
        }
        let (values, bias_values) = (weight.try_data()?, bias.try_data()?);
        let from = |row: usize, i: usize| values[(i * out + row % out) * 8 + row / out];
        let matrix = memory::collected(
            WEIGHTS,
            (0..8 * out * inputs).map(|at| from(at / inputs, at % inputs)),
        );
        let biases = Tensor::new([8 * out], bias_values.repeat(8));
        Ok(PackedTranspose {
            matrix: Tensor::new([8 * out, inputs], matrix),
            bias: bias.clone(),
            biases,
        })
    }
}

/// A transposed convolution with kernel 2 and stride 2: `x` `[n, d, h, w, in]` to
/// `[n, 2d, 2h, 2w, out]`; with `norm`, followed by a layer norm over channels and GELU.
pub fn conv_transpose3d(
    device: &Device,
    x: &Tensor,
    packed: &PackedTranspose,
    norm: Option<ChannelLayerNorm>,
) -> Result<Tensor, OpError> {
    const OP: &str = "conv_transpose3d";
    let [n, d, h, w, c] = x.map5(OP, "x")?;
    let out_channels = packed.bias.len();
    if packed.matrix.channels() != c || x.is_empty() {
        return Err(x.shape_error(OP, "x", format!("[n, d, h, w, {}]", packed.matrix.channels())));
    }
    if let Some(norm) = &norm {
        norm.weight.expect_shape(OP, "norm weight", &[out_channels])?;
        norm.bias.expect_shape(OP, "norm bias", &[out_channels])?;
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            let phases =
                linear(device, x, &packed.matrix, Some(&packed.biases), Activation::None, None)?;
            let behind = norm.as_ref().map(|norm| (norm.weight, norm.bias, norm.eps));
            return layer_norm(cuda, &phases, behind, norm.is_some(), Some([n, d, h, w]));
        }
    };
    let _op = cpu.op("conv transpose", || OpCost {
        problem: format!("{c} to {out_channels} channels, {d}x{h}x{w} to twice"),
        flops: (2 * x.len() * 8 * out_channels) as f64,
        floats: x.len() + x.rows() * 8 * out_channels,
    });
    let mut out = cpu.alloc(x.rows() * 8 * out_channels);
    let to = DisjointWriter::new(&mut out);
    let layer =
        Layer { weight: &packed.matrix, bias: Some(&packed.biases), activation: Activation::None };
    // The phases of a voxel side by side, then each to its place.
    linear_to(cpu, x, layer, |rows, phases| {
        if let Some(norm) = &norm {
            layer_norm_rows(
                cpu.isa(),
                phases,
                norm.weight.data(),
                norm.bias.data(),
                norm.eps,
                true,
            );
        }
        for (voxel, phases) in rows.zip(phases.chunks_exact(8 * out_channels)) {
            let (item, i, j, k) =
                (voxel / (d * h * w), voxel / (h * w) % d, voxel / w % h, voxel % w);
            for (phase, pair) in phases.chunks_exact(2 * out_channels).enumerate() {
                let at =
                    (((item * d + i) * 2 + phase / 2) * 2 * h + 2 * j + phase % 2) * 2 * w + 2 * k;
                // SAFETY: each voxel has fine ones of its own.
                unsafe { to.slice(at * out_channels, 2 * out_channels) }.copy_from_slice(pair);
            }
        }
    });
    Ok(Tensor::from_buffer([n, 2 * d, 2 * h, 2 * w, out_channels], out))
}
