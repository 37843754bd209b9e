//! The first convolution of a decoder stage, fused with the upsampling and the concatenation before
//! it.
//!
//! The network computes `conv3x3x3(concat(skip, deconv2x(x)))`. Both halves are linear, so the skip
//! half, the bias and the deconvolution's bias become a map computed once per image ([`skip_map`]);
//! and the transposed convolution followed by the convolution is, for each of the 8 output phases,
//! one 2×2×2 convolution on the coarse grid whose weights are contractions of the two (composed
//! once, by [`DecoderStage::new`]). The upsampled map is never stored, and 8 taps replace 27 + 1.

mod cpu;
mod cuda;
pub mod grad;

use super::conv3d::{
    ConvInput, ConvOutput, Epilogue, Packed, PackedConv, Packer, RawWeights, conv3d,
};
use crate::device::cuda::DeviceCache;
use crate::device::{Cuda, Device};
use crate::memory;
use crate::ops::linear::{Matrix, matmul};
use crate::tensor::{OpError, Tensor, WEIGHTS};

const OP: &str = "decoder_stage";

/// The weights of a decoder stage, composed and packed.
pub struct DecoderStage {
    /// The skip half with the whole bias; none when the stage has no skip.
    skip: Option<PackedConv>,
    /// One convolution with 8 taps per output phase.
    phases: Vec<PackedConv>,
    /// The bias of a voxel far from the border.
    inner_bias: Tensor,
    /// The difference of a voxel's bias, for the 27 cases (first, inner, last along each axis).
    border: Tensor,
    outputs: usize,
    on_cuda: DeviceCache<Packed>,
}

/// The fine taps of an axis that fall on coarse tap `a` of phase `p`, as (fine tap, deconvolution
/// phase).
fn fine_taps(p: usize, a: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..3).filter_map(move |t| {
        let fine = p + t + 1; // position 2i + p + t - 1, shifted by 2 to stay positive
        (fine / 2 == p + a).then_some((t, fine % 2))
    })
}

impl DecoderStage {
    /// Composes the weights of a transposed convolution, `deconv` `[in, up, 2, 2, 2]` with bias
    /// `[up]`, and of the convolution after it, `conv` `[out, skip + up, 3, 3, 3]` with bias
    /// `[out]`, whose first input channels are those of the skip feature.
    ///
    /// They are composed in float64 on the CPU, or on the device if they are there.
    ///
    /// # Errors
    /// The shapes do not fit, or values cannot be copied from a device.
    pub fn new(
        device: &Device,
        deconv: &Tensor,
        deconv_bias: &Tensor,
        conv: &Tensor,
        conv_bias: &Tensor,
    ) -> Result<DecoderStage, OpError> {
        let [outputs, inputs, ..] = conv.map5(OP, "conv weight")?;
        let [coarse, up, ..] = deconv.map5(OP, "deconv weight")?;
        if deconv.shape()[2..] != [2, 2, 2] || coarse * up == 0 {
            return Err(deconv.shape_error(OP, "deconv weight", "[in, up, 2, 2, 2]"));
        }
        if conv.shape()[2..] != [3, 3, 3] || inputs < up || outputs == 0 {
            return Err(conv.shape_error(
                OP,
                "conv weight",
                format!("[out, skip + {up}, 3, 3, 3], for deconv {:?}", deconv.shape()),
            ));
        }
        deconv_bias.expect_shape(OP, "deconv bias", &[up])?;
        conv_bias.expect_shape(OP, "conv bias", &[outputs])?;
        let cpu = device.cpu();
        let skip = inputs - up;
        if let Device::Cuda(cuda) = device {
            let given = [deconv, deconv_bias, conv, conv_bias];
            if given.iter().all(|t| t.is_f32_on(cuda)) {
                return DecoderStage::on(cuda, given);
            }
        }
        // Copied back here, where a failure can be reported.
        [deconv, deconv_bias, conv, conv_bias]
            .into_iter()
            .try_for_each(|t| t.try_data().map(|_| ()))?;

        // What the deconvolution's bias adds to an output voxel, per tap: summed over the taps
        // inside the image.
        let per_tap = |o: usize, t: usize| -> f64 {
            let weight = |m: usize| conv.data()[((o * inputs) + skip + m) * 27 + t] as f64;
            (0..up).map(|m| weight(m) * deconv_bias.data()[m] as f64).sum()
        };
        let mut border = vec![0.0f32; 27 * outputs];
        let mut inner_bias = conv_bias.data().to_vec();
        for o in 0..outputs {
            let taps: Vec<f64> = (0..27).map(|t| per_tap(o, t)).collect();
            let whole: f64 = taps.iter().sum();
            inner_bias[o] = (conv_bias.data()[o] as f64 + whole) as f32;
            for case in 0..27 {
                // At the first voxel of an axis (case 0) tap 0 is outside; at the last (case 2),
                // tap 2.
                let outside = |t: usize| {
                    [9, 3, 1]
                        .iter()
                        .any(|axis| matches!((case / axis % 3, t / axis % 3), (0, 0) | (2, 2)))
                };
                let lost: f64 = (0..27).filter(|&t| outside(t)).map(|t| taps[t]).sum();
                border[case * outputs + o] = -lost as f32;
            }
        }
        let inner_bias = Tensor::new([outputs], inner_bias);

        // Composed in float64, so that the weights are as exact as if they had been stored.
        let matrix = outputs * coarse;
        let wide = |t: &Tensor| -> Vec<f64> {
            memory::collected(WEIGHTS, t.data().iter().map(|v| *v as f64))
        };
        let (conv_wide, deconv_wide) = (wide(conv), wide(deconv));
        let mut composed: Vec<f64> = memory::zeroed(WEIGHTS, 64 * matrix);
        cpu.chunks_mut(&mut composed, matrix, |unit, to| {
            let (p, a) = (unit / 8, unit % 8);
            let bit = |v: usize, axis: usize| v >> (2 - axis) & 1;
            for (td, qd) in fine_taps(bit(p, 0), bit(a, 0)) {
                for (th, qh) in fine_taps(bit(p, 1), bit(a, 1)) {
                    for (tw, qw) in fine_taps(bit(p, 2), bit(a, 2)) {
                        let (tap, phase) = ((td * 3 + th) * 3 + tw, (qd * 2 + qh) * 2 + qw);
                        let left = Matrix {
                            data: conv_wide[skip * 27 + tap..].as_ptr(),
                            row: inputs * 27,
                            column: 27,
                        };
                        let right =
                            Matrix { data: deconv_wide[phase..].as_ptr(), row: 8, column: up * 8 };
                        // SAFETY: each unit has its own matrix; the inputs' shapes were checked
                        // above.
                        unsafe {
                            matmul(
                                [outputs, coarse, up],
                                to.as_mut_ptr(),
                                coarse,
                                true,
                                left,
                                right,
                            )
                        };
                    }
                }
            }
        });
        let pack = Packer { outputs, inputs: coarse, taps: 8 };
        let shape = [outputs, coarse, 2, 2, 2];
        let phases = (0..8)
            .map(|p| {
                pack.pack(cpu, None, shape, |o, i, a| {
                    composed[(p * 8 + a) * matrix + o * coarse + i] as f32
                })
            })
            .collect();
        let skip = match skip {
            0 => None,
            n => Some(PackedConv::new(cpu, conv, 0..n, Some(&inner_bias))?),
        };
        let border = Tensor::new([27, outputs], border);
        Ok(DecoderStage {
            skip,
            phases,
            inner_bias,
            border,
            outputs,
            on_cuda: DeviceCache::default(),
        })
    }

    /// A stage whose weights' home is a device: composed there. Their shapes were checked.
    fn on(cuda: &Cuda, given: [&Tensor; 4]) -> Result<DecoderStage, OpError> {
        let [deconv, _, conv, _] = given;
        let [outputs, inputs, ..] = conv.map5(OP, "conv weight")?;
        let [coarse, up, ..] = deconv.map5(OP, "deconv weight")?;
        let [composed, inner_bias, border] = cuda::compose(cuda, given)?;
        let pack = Packer { outputs, inputs: coarse, taps: 8 };
        let phase = |p: usize| {
            let start = p * outputs * coarse * 8;
            let given =
                RawWeights { values: composed.clone(), start, row: coarse, mirrored: false };
            pack.conv(cuda.cpu(), None, [outputs, coarse, 2, 2, 2], Some(given))
        };
        let skip = match inputs - up {
            0 => None,
            n => Some(PackedConv::new(cuda.cpu(), conv, 0..n, Some(&inner_bias))?),
        };
        Ok(DecoderStage {
            skip,
            phases: (0..8).map(phase).collect(),
            inner_bias,
            border,
            outputs,
            on_cuda: DeviceCache::default(),
        })
    }

    /// The number of channels of the coarse input.
    pub fn in_channels(&self) -> usize {
        self.phases[0].in_channels()
    }

    /// The number of channels of the skip feature; 0 if the stage has none.
    pub fn skip_channels(&self) -> usize {
        self.skip.as_ref().map_or(0, PackedConv::in_channels)
    }

    /// The convolution of the skip feature, if there is one.
    pub(crate) fn skip_conv(&self) -> Option<&PackedConv> {
        self.skip.as_ref()
    }

    /// Bytes of the layouts for the CPU that have been made so far.
    pub fn bytes(&self) -> usize {
        self.phases.iter().map(PackedConv::bytes).sum::<usize>()
            + self.skip.as_ref().map_or(0, PackedConv::bytes)
    }
}

/// The part of the stage that does not depend on the coarse input: `conv_skip(skip)` and every
/// bias, border included.
///
/// `skip` is `[n, 2d, 2h, 2w, skip]`, or none for a stage without one; `fine` is the shape of the
/// fine grid, `[n, 2d, 2h, 2w]`. Gives `[n, 2d, 2h, 2w, out]`, which may use the memory of an
/// [owned](ConvInput::owned) `skip`.
///
/// # Errors
/// `skip` does not fit `fine` or the stage, or `fine` has an odd axis.
pub fn skip_map(
    device: &Device,
    stage: &DecoderStage,
    skip: Option<ConvInput>,
    fine: [usize; 4],
) -> Result<Tensor, OpError> {
    if fine.iter().skip(1).any(|&edge| edge < 2 || edge % 2 != 0) {
        let message = format!("the fine grid {fine:?} [n, d, h, w] must have even spatial axes");
        return Err(OpError::Argument { op: OP, message });
    }
    match (&skip, &stage.skip) {
        (Some(skip), Some(conv)) => {
            let extent = skip.extent(OP)?;
            let expected = [fine[0], fine[1], fine[2], fine[3], conv.in_channels()];
            if extent != expected {
                return Err(skip.map.shape_error(OP, "skip", format!("{expected:?}")));
            }
        }
        (Some(skip), None) => {
            return Err(skip.map.shape_error(
                OP,
                "skip",
                "nothing: the stage has no skip channels",
            ));
        }
        (None, Some(conv)) => {
            let message =
                format!("the stage needs a skip feature of {} channels", conv.in_channels());
            return Err(OpError::Argument { op: OP, message });
        }
        (None, None) => {}
    }
    match device {
        Device::Cpu(cpu) => {
            // Copied back here, where a failure can be reported.
            [&stage.inner_bias, &stage.border]
                .into_iter()
                .try_for_each(|t| t.try_data().map(|_| ()))?;
            let convolved = skip
                .zip(stage.skip.as_ref())
                .map(|(skip, conv)| conv3d(device, skip, conv, Epilogue::NONE))
                .transpose()?;
            Ok(cpu::skip_map(cpu, stage, convolved.map(|output| output.map), fine))
        }
        Device::Cuda(cuda) => cuda::skip_map(cuda, stage, skip.as_ref(), fine),
    }
}

/// The output of the stage's convolution, `conv3x3x3(concat(skip, deconv2x(x)))`, before its norm.
///
/// `x` is `[n, d, h, w, in]`, on the coarse grid, and `skip` the map of [`skip_map`]. Gives
/// `[n, 2d, 2h, 2w, out]`, always with the sums that the norm needs, and without a pooled map.
///
/// # Errors
/// `x` or `skip` do not fit the stage, or its weights were packed for another instruction set.
pub fn decoder_stage(
    device: &Device,
    stage: &DecoderStage,
    x: &ConvInput,
    skip: &Tensor,
) -> Result<ConvOutput, OpError> {
    let extent = x.extent(OP)?;
    let [n, d, h, w, c] = extent;
    if c != stage.in_channels() {
        return Err(x.map.shape_error(OP, "x", format!("[n, d, h, w, {}]", stage.in_channels())));
    }
    skip.expect_shape(OP, "skip map", &[n, 2 * d, 2 * h, 2 * w, stage.outputs])?;
    match device {
        Device::Cpu(cpu) => {
            stage.phases[0].check_layout(OP, cpu)?;
            stage.phases.iter().try_for_each(PackedConv::fetch)?;
            Ok(cpu::decoder_stage(cpu, stage, x, extent, skip))
        }
        Device::Cuda(cuda) => cuda::decoder_stage(cuda, stage, x, extent, skip),
    }
}
