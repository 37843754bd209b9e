//! Gradients of the decoder stage, through the composition of its weights.
//!
//! The gradient of the stage's parameters is computed in two steps: [`composed`] gives that of the
//! composed weights, and [`weights`] takes it on to the two convolutions. The skip map's parameters
//! have theirs from [`biases`].

use super::{DecoderStage, OP, fine_taps};
use crate::device::cuda::DeviceCache;
use crate::device::{Device, DisjointWriter};
use crate::memory;
use crate::microkernel::strip;
use crate::ops::conv3d::grad::{Pass, outer_products};
use crate::ops::conv3d::tile::{TileSource, Tiling};
use crate::ops::conv3d::{self, ConvInput, Packed, PackedConv, Packer, Rows, Target, groups};
use crate::ops::linear::{Matrix, matmul};
use crate::ops::norm::add_row;
use crate::ops::reduce::added;
use crate::tensor::{GRADIENT, OpError, Tensor};

/// The value of bit `axis` (0: d) in a phase or a coarse tap.
fn bit(v: usize, axis: usize) -> usize {
    v >> (2 - axis) & 1
}

/// A stage's weights as [`input`] needs them; [`mirrored`] makes them.
pub struct Mirrored {
    phases: Vec<PackedConv>,
    on_cuda: DeviceCache<Packed>,
}

/// The weights for [`input`], which turn the gradient of each output phase into that of the coarse
/// input.
pub fn mirrored(device: &Device, stage: &DecoderStage) -> Mirrored {
    let (coarse, out) = (stage.in_channels(), stage.outputs);
    let packer = Packer { outputs: coarse, inputs: out, taps: 8 };
    // A CUDA device uses the taps in reverse order: from the coarse voxel's side the last comes
    // first.
    let last = if matches!(device, Device::Cuda(_)) { 7 } else { 0 };
    let pack = |phase: &PackedConv| {
        if let (Device::Cuda(_), Some(given)) = (device, phase.given_on_device()) {
            let shape = [coarse, out, 2, 2, 2];
            return packer.conv(device.cpu(), None, shape, Some(given.mirror()));
        }
        packer.pack(device.cpu(), None, [coarse, out, 2, 2, 2], |c, o, a| {
            phase.weight(o, c, a ^ last)
        })
    };
    Mirrored { phases: stage.phases.iter().map(pack).collect(), on_cuda: DeviceCache::default() }
}

/// The gradient of the coarse input as it was loaded, after its prologue, `[n, d, h, w, in]`, from
/// `dy` `[n, 2d, 2h, 2w, out]`: each phase adds a convolution of its voxels.
pub fn input(device: &Device, mirrored: &Mirrored, dy: &Tensor) -> Result<Tensor, OpError> {
    let [n, fd, fh, fw, out] = dy.map5(OP, "dy")?;
    let inputs = mirrored.phases[0].in_channels();
    if out != inputs || fd % 2 + fh % 2 + fw % 2 != 0 || dy.is_empty() {
        return Err(dy.shape_error(OP, "dy", format!("[n, 2 d, 2 h, 2 w, {inputs}]")));
    }
    let (d, h, w) = (fd / 2, fh / 2, fw / 2);
    if let Device::Cuda(cuda) = device {
        return super::cuda::input_gradient(
            cuda,
            &mirrored.on_cuda,
            &mirrored.phases,
            [n, d, h, w, out],
            dy,
        );
    }
    let mirrored = &mirrored.phases[..];
    let (cpu, first) = (device.cpu(), &mirrored[0]);
    first.check_layout(OP, cpu)?;
    let coarse = first.out_channels();
    let tiling = Tiling::new([d, h, w], out, first.ic_block);
    let kernels = strip::kernels(cpu.isa(), first.ic_block, coarse);
    let mut dx = cpu.alloc(n * d * h * w * coarse);
    let groups = groups(n * tiling.tiles(), first.oc_blocks());
    let per_group = first.oc_blocks().div_ceil(groups);
    let to = DisjointWriter::new(&mut dx);
    for (p, conv) in mirrored.iter().enumerate() {
        let mut phase = cpu.alloc(n * d * h * w * out);
        cpu.chunks_mut(&mut phase, w * out, |line, row| {
            let (item, i, j) = (line / h / d, line / h % d, line % h);
            let at = ((item * fd + 2 * i + bit(p, 0)) * fh + 2 * j + bit(p, 1)) * fw + bit(p, 2);
            for (k, voxel) in row.chunks_exact_mut(out).enumerate() {
                voxel.copy_from_slice(&dy.data()[(at + 2 * k) * out..][..out]);
            }
        });
        let phase = ConvInput::owned(Tensor::from_buffer([n, d, h, w, out], phase));
        let source = TileSource::new(&phase);
        // The forward taps reach from p - 1 to p; seen from the input they reach from -p to 1 - p.
        let step = |a: usize, axis: usize, stride: usize| {
            (1 - bit(p, axis) as isize - bit(a, axis) as isize) * stride as isize
        };
        let taps: Vec<isize> = (0..8)
            .map(|a| {
                step(a, 0, tiling.plane_stride())
                    + step(a, 1, tiling.row_stride())
                    + step(a, 2, tiling.ic_block)
            })
            .collect();
        let target = Target {
            out: &to,
            init: (p > 0).then_some(to.reader()),
            channels: coarse,
            voxel: coarse,
            stream: false,
        };
        cpu.for_each(n * tiling.tiles() * groups, |unit| {
            let (tile, group) = (unit / groups, unit % groups);
            let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
            let mut scratch = cpu.alloc(tiling.scratch());
            // SAFETY: nothing writes to the input.
            unsafe { tiling.load(cpu.isa(), &source, [n, d, h, w, out], item, t, &mut scratch) };
            let ([i0, j0], rows) = tiling.rows(t, d, h);
            let row_at = |i: usize, j: usize| (((item * d + i0 + i) * h + j0 + j) * w) * coarse;
            let run = Rows { tiling: &tiling, kernels, conv, scratch: &scratch, taps: &taps };
            for ob in group * per_group..((group + 1) * per_group).min(conv.oc_blocks()) {
                // SAFETY: tiles cover disjoint rows, groups disjoint channels; phases follow one
                // another.
                unsafe { run.run(ob, rows, &target, row_at, &mut []) };
            }
        });
    }
    Ok(Tensor::from_buffer([n, d, h, w, coarse], dx))
}

/// The gradient of the composed weights, `[8, out, in, 8]` (output phase, output, coarse input,
/// coarse tap), from the stage's coarse input `x` and `dy` `[n, 2d, 2h, 2w, out]`.
///
/// Such gradients may be added up before they go on to [`weights`], which is linear in them.
pub fn composed(
    device: &Device,
    stage: &DecoderStage,
    x: &ConvInput,
    dy: &Tensor,
) -> Result<Tensor, OpError> {
    composed_onto(device, stage, x, dy, None)
}

/// Adds the gradient that [`composed`] computes to the gradient so far, if there is one, and
/// returns the sum, which may use its memory.
pub fn composed_onto(
    device: &Device,
    stage: &DecoderStage,
    x: &ConvInput,
    dy: &Tensor,
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let extent = x.extent(OP)?;
    let ([n, d, h, w, coarse], out) = (extent, stage.outputs);
    if coarse != stage.in_channels() {
        return Err(x.map.shape_error(OP, "x", format!("[n, d, h, w, {}]", stage.in_channels())));
    }
    dy.expect_shape(OP, "dy", &[n, 2 * d, 2 * h, 2 * w, out])?;
    let pass = |t: &Tiling, p: usize| {
        let step = |a: usize, axis: usize, stride: usize| {
            (bit(p, axis) as isize + bit(a, axis) as isize - 1) * stride as isize
        };
        let row = move |item: usize, i: usize, j: usize| {
            (((item * d * 2 + 2 * i + bit(p, 0)) * h * 2 + 2 * j + bit(p, 1)) * w * 2 + bit(p, 2))
                * out
        };
        let taps = (0..8)
            .map(|a| {
                step(a, 0, t.plane_stride()) + step(a, 1, t.row_stride()) + step(a, 2, t.ic_block)
            })
            .collect();
        Pass { taps, row_at: Box::new(row), voxel: 2 * out }
    };
    let shape = [8, out, coarse, 8];
    match device {
        Device::Cpu(cpu) => {
            let phases = outer_products(cpu, x, extent, dy.data(), out, |t| {
                (0..8).map(|p| pass(t, p)).collect()
            });
            Ok(added(cpu, so_far, Tensor::new(shape, phases.concat())))
        }
        Device::Cuda(cuda) => {
            Ok(conv3d::cuda::weight_gradient(cuda, x, extent, dy, 8, so_far)?.reshape(shape))
        }
    }
}

/// The gradients of the weights of the transposed convolution and of the convolution, in this
/// order, from that of the composed weights.
///
/// `deconv` `[in, up, 2, 2, 2]` and `conv` `[out, skip + up, 3, 3, 3]` are the weights themselves.
/// The convolution's gradient has their whole shape, with zeros for the skip part, which [`biases`]
/// has.
pub fn weights(
    device: &Device,
    composed: &Tensor,
    deconv: &Tensor,
    conv: &Tensor,
) -> Result<[Tensor; 2], OpError> {
    let [out, inputs, ..] = conv.map5(OP, "conv weight")?;
    let [coarse, up, ..] = deconv.map5(OP, "deconv weight")?;
    composed.expect_shape(OP, "the composed weights' gradient", &[8, out, coarse, 8])?;
    deconv.expect_shape(OP, "deconv weight", &[coarse, up, 2, 2, 2])?;
    if inputs < up || conv.shape()[2..] != [3, 3, 3] {
        return Err(conv.shape_error(OP, "conv weight", format!("[{out}, skip + {up}, 3, 3, 3]")));
    }
    if let Device::Cuda(cuda) = device {
        return super::cuda::weights_gradient(cuda, composed, deconv, conv);
    }
    let (cpu, skip) = (device.cpu(), inputs - up);
    // Copied back here, where a failure can be reported.
    let composed = composed.try_data()?;
    [deconv, conv].into_iter().try_for_each(|t| t.try_data().map(|_| ()))?;
    // Every product of a convolution tap with a deconvolution phase, by the composed weight that it
    // is part of.
    let mut terms = vec![];
    for (p, a) in (0..8).flat_map(|p| (0..8).map(move |a| (p, a))) {
        for (td, qd) in fine_taps(bit(p, 0), bit(a, 0)) {
            for (th, qh) in fine_taps(bit(p, 1), bit(a, 1)) {
                for (tw, qw) in fine_taps(bit(p, 2), bit(a, 2)) {
                    terms.push((p, a, (td * 3 + th) * 3 + tw, (qd * 2 + qh) * 2 + qw));
                }
            }
        }
    }
    let of = |p: usize, a: usize| composed[p * out * coarse * 8 + a..].as_ptr();
    let dense = |p: usize, a: usize| Matrix { data: of(p, a), row: coarse * 8, column: 8 };
    let transposed = |p: usize, a: usize| Matrix { data: of(p, a), row: 8, column: coarse * 8 };
    let sums = |count: usize, size: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)| {
        let mut out: Vec<f32> = memory::zeroed(GRADIENT, count * size);
        cpu.chunks_mut(&mut out, size, f);
        out
    };
    // [tap][out][up] and [phase][coarse][up], each a sum over its terms.
    let by_tap = sums(27, out * up, &|tap, to| {
        for &(p, a, _, q) in terms.iter().filter(|t| t.2 == tap) {
            let right = Matrix { data: deconv.data()[q..].as_ptr(), row: up * 8, column: 8 };
            // SAFETY: the shapes were checked above; `to` is one tap's `[out][up]`, its own.
            unsafe { matmul([out, up, coarse], to.as_mut_ptr(), up, true, dense(p, a), right) };
        }
    });
    let by_phase = sums(8, coarse * up, &|q, to| {
        for &(p, a, tap, _) in terms.iter().filter(|t| t.3 == q) {
            let right = Matrix {
                data: conv.data()[skip * 27 + tap..].as_ptr(),
                row: inputs * 27,
                column: 27,
            };
            // SAFETY: as above; `to` is one phase's `[coarse][up]`.
            unsafe {
                matmul([coarse, up, out], to.as_mut_ptr(), up, true, transposed(p, a), right)
            };
        }
    });
    let mut d_conv: Vec<f32> = memory::zeroed(GRADIENT, conv.len());
    for (o, row) in d_conv.chunks_exact_mut(inputs * 27).enumerate() {
        for (at, v) in row[skip * 27..].iter_mut().enumerate() {
            *v = by_tap[(at % 27 * out + o) * up + at / 27];
        }
    }
    let d_deconv = (0..deconv.len()).map(|at| by_phase[at % 8 * coarse * up + at / 8]);
    let d_deconv: Vec<f32> = memory::collected(GRADIENT, d_deconv);
    Ok([Tensor::new(deconv.shape(), d_deconv), Tensor::new(conv.shape(), d_conv)])
}

/// The gradients of a skip map's parameters, from its own gradient `g` `[n, 2d, 2h, 2w, out]`.
///
/// They are those of the transposed convolution's bias `[up]`, of the convolution's weight
/// `[out, skip + up, 3, 3, 3]` and of its bias `[out]`. The gradient of the weight has two parts:
/// for the upsampled channels, what comes through the transposed convolution's bias; for the skip
/// channels, `skip_part` `[out, skip, 3, 3, 3]`, or zeros.
pub fn biases(
    device: &Device,
    g: &Tensor,
    conv: &Tensor,
    deconv_bias: &Tensor,
    skip_part: Option<&Tensor>,
) -> Result<[Tensor; 3], OpError> {
    let [n, d, h, w, out] = g.map5(OP, "the skip map's gradient")?;
    let [outputs, inputs, ..] = conv.map5(OP, "conv weight")?;
    let up = deconv_bias.len();
    if outputs != out || inputs < up || conv.shape()[2..] != [3, 3, 3] {
        return Err(conv.shape_error(OP, "conv weight", format!("[{out}, skip + {up}, 3, 3, 3]")));
    }
    let skip = inputs - up;
    if let Some(part) = skip_part.filter(|part| part.len() != out * skip * 27) {
        let expected = format!("[{out}, {skip}, 3, 3, 3]");
        return Err(part.shape_error(OP, "the skip part's gradient", expected));
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            return super::cuda::biases_gradient(cuda, g, conv, deconv_bias, skip_part);
        }
    };
    let (weights, deconv_bias) = (conv.try_data()?, deconv_bias.try_data()?);
    let side = |at: usize, edge: usize| if at == 0 { 0 } else { 1 + usize::from(at + 1 == edge) };
    // Sums over the 27 kinds of voxel: first, inner or last along each axis. A unit is a plane.
    let cases = {
        let mut partial = cpu.zeros_f64(n * d * 27 * out);
        cpu.chunks_mut(&mut partial, 27 * out, |plane, sums| {
            let mut pairs: Vec<f64> = memory::zeroed(GRADIENT, 2 * out);
            for j in 0..h {
                let row = &g.data()[(plane * h + j) * w * out..][..w * out];
                for (kind, part) in
                    [(0, &row[..out]), (1, &row[out..(w - 1) * out]), (2, &row[(w - 1) * out..])]
                {
                    if part.is_empty() {
                        continue;
                    }
                    pairs.fill(0.0);
                    add_row(cpu.isa(), part, out, out, &mut pairs);
                    let case = (side(plane % d, d) * 3 + side(j, h)) * 3 + kind;
                    sums[case * out..][..out]
                        .iter_mut()
                        .zip(pairs.chunks_exact(2))
                        .for_each(|(s, p)| *s += p[0]);
                }
            }
        });
        let mut cases: Vec<f64> = memory::zeroed(GRADIENT, 27 * out);
        for part in partial.chunks_exact(27 * out) {
            cases.iter_mut().zip(part).for_each(|(c, p)| *c += p);
        }
        cases
    };
    let outside = |case: usize, t: usize| {
        [9, 3, 1].iter().any(|axis| matches!((case / axis % 3, t / axis % 3), (0, 0) | (2, 2)))
    };
    let inside = |o: usize, t: usize| -> f64 {
        (0..27).filter(|&c| !outside(c, t)).map(|c| cases[c * out + o]).sum()
    };
    let mut d_deconv = vec![0.0f64; up];
    let mut d_conv: Vec<f32> = memory::zeroed(GRADIENT, conv.len());
    for (o, t) in (0..out).flat_map(|o| (0..27).map(move |t| (o, t))) {
        let sum = inside(o, t);
        for (m, d) in d_deconv.iter_mut().enumerate() {
            let at = (o * inputs + skip + m) * 27 + t;
            d_conv[at] = (sum * deconv_bias[m] as f64) as f32;
            *d += sum * weights[at] as f64;
        }
    }
    if let Some(part) = skip_part.filter(|_| skip > 0) {
        let rows = d_conv.chunks_exact_mut(inputs * 27);
        for (to, from) in rows.zip(part.try_data()?.chunks_exact(skip * 27)) {
            to[..skip * 27].copy_from_slice(from);
        }
    }
    let d_bias: Vec<f32> =
        (0..out).map(|o| (0..27).map(|c| cases[c * out + o]).sum::<f64>() as f32).collect();
    let d_deconv: Vec<f32> = d_deconv.into_iter().map(|v| v as f32).collect();
    Ok([d_deconv.into(), Tensor::new(conv.shape(), d_conv), d_bias.into()])
}
