//! Convolutions whose stride is their kernel: they cut a map into patches ([`patch_conv`]) or unfold voxels into patches
//! ([`conv_transpose3d`]). Patches do not overlap, so both are a dense layer on rearranged values.

pub mod grad;

use super::linear::{Activation, Matrix, linear, matmul};
use super::norm::cuda::layer_norm;
use super::norm::layer_norm_rows;
use super::resample;
use crate::device::Device;
use crate::device::cpu::Shared;
use crate::tensor::{OpError, Tensor};

/// Convolution with stride = kernel = `weight`'s edge and no padding: `x` `[n, d, h, w, in]`, `weight` `[out, in, e, e, e]`,
/// `bias` `[out]` to `[n, d / e, h / e, w / e, out]`.
pub fn patch_conv(device: &Device, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, OpError> {
    const OP: &str = "patch_conv";
    let [_, d, h, w, c] = x.map5(OP, "x")?;
    let [out, inputs, e, e2, e3] = weight.map5(OP, "weight")?;
    if inputs != c || e == 0 || [e2, e3] != [e; 2] {
        return Err(weight.misfit(OP, "weight", format!("[out, {c}, e, e, e], for x {:?}", x.shape())));
    }
    let coarse = [d / e, h / e, w / e];
    if coarse.map(|v| v * e) != [d, h, w] || x.is_empty() {
        return Err(x.misfit(OP, "x", format!("spatial axes that {e} divides, for weight {:?}", weight.shape())));
    }
    let rows = unfold(device, x, e)?;
    let patch = rows.channels();
    linear(device, &rows, &weight.reshape([out, patch]), bias, Activation::None, None)
}

/// Patches of edge `e` as rows: `[n, d, h, w, c]` to `[n, d / e, h / e, w / e, c e³]`, channel slowest.
fn unfold(device: &Device, x: &Tensor, e: usize) -> Result<Tensor, OpError> {
    let [n, d, h, w, c] = <[usize; 5]>::try_from(x.shape()).expect("checked by the caller");
    let [cd, ch, cw] = [d / e, h / e, w / e];
    if let Device::Cuda(cuda) = device {
        return resample::cuda::unfold(cuda, x, [n, cd, ch, cw, c], e);
    }
    let patch = c * e * e * e;
    let mut rows = device.cpu().take(x.len());
    device.cpu().chunks_mut(&mut rows, cw * patch, |line, rows| {
        let (item, i, j) = (line / ch / cd, line / ch % cd, line % ch);
        for (k, row) in rows.chunks_exact_mut(patch).enumerate() {
            for (at, v) in row.iter_mut().enumerate() {
                let (channel, td, th, tw) = (at / (e * e * e), at / (e * e) % e, at / e % e, at % e);
                let voxel = ((item * d + i * e + td) * h + j * e + th) * w + k * e + tw;
                *v = x.data()[voxel * c + channel];
            }
        }
    });
    Ok(Tensor::from_buffer([n, cd, ch, cw, patch], rows))
}

/// A channel LayerNorm (and GELU) to apply to each voxel that comes out.
pub struct ChannelLayerNorm<'a> {
    /// `[c]`.
    pub weight: &'a Tensor,
    /// `[c]`.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f32,
}

/// Weights of a transposed convolution with kernel 2 and stride 2, as one matrix.
pub struct PackedTranspose {
    /// `[phase * out, in]`.
    matrix: Tensor,
    bias: Tensor,
    /// The bias once for each phase, `[phase * out]`.
    biases: Tensor,
}

impl PackedTranspose {
    /// Lays out `weight` `[in, out, 2, 2, 2]` and `bias` `[out]`.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<PackedTranspose, OpError> {
        const OP: &str = "conv_transpose3d";
        let [inputs, out, ..] = weight.map5(OP, "weight")?;
        if weight.shape()[2..] != [2, 2, 2] || weight.is_empty() {
            return Err(weight.misfit(OP, "weight", "[in, out, 2, 2, 2]"));
        }
        bias.expect(OP, "bias", &[out])?;
        let from = |row: usize, i: usize| weight.data()[(i * out + row % out) * 8 + row / out];
        let matrix = (0..8 * out).flat_map(|row| (0..inputs).map(move |i| from(row, i))).collect();
        let biases = Tensor::new([8 * out], bias.data().repeat(8));
        Ok(PackedTranspose { matrix: Tensor::new([8 * out, inputs], matrix), bias: bias.clone(), biases })
    }
}

/// Transposed convolution, kernel 2, stride 2: `x` `[n, d, h, w, in]` to `[n, 2d, 2h, 2w, out]`; with `norm`, followed by a channel
/// LayerNorm and GELU.
pub fn conv_transpose3d(device: &Device, x: &Tensor, packed: &PackedTranspose, norm: Option<ChannelLayerNorm>) -> Result<Tensor, OpError> {
    const OP: &str = "conv_transpose3d";
    let [n, d, h, w, c] = x.map5(OP, "x")?;
    let out_channels = packed.bias.len();
    if packed.matrix.channels() != c || x.is_empty() {
        return Err(x.misfit(OP, "x", format!("[n, d, h, w, {}]", packed.matrix.channels())));
    }
    if let Some(norm) = &norm {
        norm.weight.expect(OP, "norm weight", &[out_channels])?;
        norm.bias.expect(OP, "norm bias", &[out_channels])?;
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            // The phases of a voxel side by side, then each to its place.
            let phases = linear(device, x, &packed.matrix, Some(&packed.biases), Activation::None, None)?;
            let behind = norm.as_ref().map(|norm| (norm.weight, norm.bias, norm.eps));
            return layer_norm(cuda, &phases, behind, norm.is_some(), Some([n, d, h, w]));
        }
    };
    let mut out = cpu.take(n * d * h * w * 8 * out_channels);
    let to = Shared::new(&mut out);
    let wide = 8 * out_channels;
    // Enough voxels a unit for the matrix product to be worth its packing.
    let lines = (256 / w).clamp(1, d * h);
    cpu.for_each((n * d * h).div_ceil(lines), |unit| {
        let first = unit * lines;
        let lines = lines.min(n * d * h - first);
        let mut values = cpu.take(lines * w * wide);
        let a = Matrix { data: x.data()[first * w * c..].as_ptr(), row: c, column: 1 };
        let b = Matrix { data: packed.matrix.data().as_ptr(), row: 1, column: c };
        // SAFETY: the sizes were checked; `values` is this unit's own.
        unsafe { matmul([lines * w, wide, c], values.as_mut_ptr(), wide, false, a, b) };
        for voxel in values.chunks_exact_mut(out_channels) {
            voxel.iter_mut().zip(packed.bias.data()).for_each(|(v, b)| *v += b);
        }
        if let Some(norm) = &norm {
            layer_norm_rows(cpu.isa(), &mut values, norm.weight.data(), norm.bias.data(), norm.eps, true);
        }
        for line in 0..lines {
            let (item, i, j) = ((first + line) / h / d, (first + line) / h % d, (first + line) % h);
            for p in 0..4 {
                let row = ((item * 2 * d + 2 * i + p / 2) * 2 * h + 2 * j + p % 2) * 2 * w * out_channels;
                // SAFETY: every fine row belongs to one coarse line.
                let row = unsafe { to.slice(row, 2 * w * out_channels) };
                for (k, pair) in row.chunks_exact_mut(2 * out_channels).enumerate() {
                    pair.copy_from_slice(&values[(line * w + k) * wide + p * 2 * out_channels..][..2 * out_channels]);
                }
            }
        }
    });
    Ok(Tensor::from_buffer([n, 2 * d, 2 * h, 2 * w, out_channels], out))
}
