//! The decoder stage on CUDA devices.

use super::{DecoderStage, OP};
use crate::device::cuda::{DeviceCache, Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::ops::conv3d::cuda::{Op, conv3d};
use crate::ops::conv3d::{ConvInput, ConvOutput, Packed, PackedConv};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Rows that a block of `stage_taps_first` transposes.
const TRANSPOSED: usize = 256;
/// The edge of the part that a block of a product of weights computes, and the floats of its tiles
/// of both sides.
const SPAN: usize = 64;
const TILES: usize = 2 * 16 * (SPAN + 4);

pub fn skip_map(
    cuda: &Cuda,
    stage: &DecoderStage,
    skip: Option<&ConvInput>,
    [n, d, h, w]: [usize; 4],
) -> Result<Tensor, OpError> {
    let (c, dtype) = (stage.outputs, cuda.precision());
    let (map, bias) = match (skip, &stage.skip) {
        (Some(skip), Some(conv)) => (
            conv3d(cuda, skip, [n, d, h, w, conv.in_channels()], conv, false)?
                .map
                .to_device(cuda, dtype)?,
            None,
        ),
        _ => (
            cuda.allocate(n * d * h * w * c, dtype)?,
            Some(stage.inner_bias.to_device(cuda, DType::F32)?),
        ),
    };
    let edges = stage.border.to_device(cuda, DType::F32)?;
    let voxels = n * d * h * w;
    // Without a bias to write everywhere, only the border is touched.
    let touched =
        if bias.is_some() { voxels } else { voxels - n * (d - 2) * (h - 2) * (w - 2) } * c;
    let launch = Launch { grid: [n * d * h, 1, 1], threads: 128, ..Launch::per_element(0) }
        .with_cost(touched, 2 * touched * dtype.bytes());
    cuda.launch(
        kernels::SKIP_BORDER.of(dtype)?,
        launch,
        kernels::SkipBorderArgs {
            map: (&map).into(),
            bias: (&bias).into(),
            edges: (&edges).into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
        },
    )?;
    Ok(Tensor::from_device([n, d, h, w, c], map, dtype))
}

pub fn decoder_stage(
    cuda: &Cuda,
    stage: &DecoderStage,
    x: &ConvInput,
    extent: [usize; 5],
    skip: &Tensor,
) -> Result<ConvOutput, OpError> {
    let phases: Vec<_> = stage.phases.iter().collect();
    let packed = stage
        .on_cuda
        .get(cuda, cuda.precision(), || Packed::new(cuda, &phases, cuda.precision()))?;
    packed.run(cuda, Op::Stage, x, extent, Some(skip), true)
}

/// The gradient of the coarse input `[n, d, h, w, ..]`; `extent`'s channels are the output's.
pub fn input_gradient(
    cuda: &Cuda,
    packed: &DeviceCache<Packed>,
    mirrored: &[PackedConv],
    extent: [usize; 5],
    dy: &Tensor,
) -> Result<Tensor, OpError> {
    let phases: Vec<_> = mirrored.iter().collect();
    let packed =
        packed.get(cuda, cuda.precision(), || Packed::new(cuda, &phases, cuda.precision()))?;
    let dy = ConvInput::shared(dy);
    Ok(packed.run(cuda, Op::StageGradient, &dy, extent, None, false)?.map)
}

/// Sums of a map `[n, d, h, w, c]` over the 27 kinds of voxel: `[kind][c]`.
fn kinds(cuda: &Cuda, g: &Tensor) -> Result<Arc<Memory>, OpError> {
    let ([n, d, h, w, c], dtype) = (g.map5("skip_map gradient", "dy")?, cuda.precision());
    let lines = n * d * h;
    let (partial, sums) =
        (cuda.allocate_bytes(lines * 3 * c * 8)?, cuda.allocate(27 * c, DType::F32)?);
    let values = g.to_device(cuda, dtype)?;
    let launch = Launch { grid: [lines, 1, 1], threads: 32, ..Launch::per_element(0) }
        .with_cost(g.len(), g.len() * dtype.bytes());
    cuda.launch(
        kernels::SKIP_BORDER_LINES.of(dtype)?,
        launch,
        kernels::SkipBorderLinesArgs {
            dy: (&values).into(),
            partial: (&partial).into(),
            w: w.into(),
            c: c.into(),
        },
    )?;
    let launch =
        Launch { grid: [27 * c, 1, 1], threads: 128, shared: 128 * 8, ..Launch::per_element(0) }
            .with_cost(0, lines * 3 * c * 8);
    cuda.launch(
        kernels::SKIP_BORDER_KINDS,
        launch,
        kernels::SkipBorderKindsArgs {
            partial: (&partial).into(),
            y: (&sums).into(),
            lines: lines.into(),
            d: d.into(),
            h: h.into(),
            c: c.into(),
        },
    )?;
    Ok(sums)
}

/// [`grad::biases`](super::grad::biases) on a device; shapes were checked.
pub fn biases_gradient(
    cuda: &Cuda,
    g: &Tensor,
    conv: &Tensor,
    deconv_bias: &Tensor,
    skip_part: Option<&Tensor>,
) -> Result<[Tensor; 3], OpError> {
    let [out, inputs, ..] = conv.map5(OP, "conv weight")?;
    let (up, count) = (deconv_bias.len(), conv.len());
    let kinds = kinds(cuda, g)?;
    let (weight, bias) =
        (conv.to_device(cuda, DType::F32)?, deconv_bias.to_device(cuda, DType::F32)?);
    let skip_part = skip_part.map(|part| part.to_device(cuda, DType::F32)).transpose()?;
    let reached = cuda.allocate_bytes(out * 27 * 8)?;
    let [d_deconv_bias, d_conv, d_conv_bias] = [
        cuda.allocate(up, DType::F32)?,
        cuda.allocate(count, DType::F32)?,
        cuda.allocate(out, DType::F32)?,
    ];
    cuda.launch(
        kernels::STAGE_TAPS_REACHED,
        Launch::per_element(out * 27).with_cost(27 * 27 * out, out * 27 * 12),
        kernels::StageTapsReachedArgs {
            kinds: (&kinds).into(),
            reached: (&reached).into(),
            conv_bias: (&d_conv_bias).into(),
            outs: out.into(),
        },
    )?;
    cuda.launch(
        kernels::STAGE_BIASES_TO_CONV,
        Launch::per_element(count).with_cost(out * up * 27, 4 * (count + out * (inputs - up) * 27)),
        kernels::StageBiasesToConvArgs {
            reached: (&reached).into(),
            deconv_bias: (&bias).into(),
            skip_part: (&skip_part).into(),
            y: (&d_conv).into(),
            count: count.into(),
            up: up.into(),
            inputs: inputs.into(),
        },
    )?;
    let launch = Launch { grid: [up, 1, 1], shared: 256 * 8, ..Launch::per_element(0) }
        .with_cost(2 * out * up * 27, 4 * out * up * 27);
    cuda.launch(
        kernels::STAGE_BIASES_TO_DECONV,
        launch,
        kernels::StageBiasesToDeconvArgs {
            reached: (&reached).into(),
            conv: (&weight).into(),
            y: (&d_deconv_bias).into(),
            outs: out.into(),
            up: up.into(),
            inputs: inputs.into(),
        },
    )?;
    Ok([
        Tensor::from_device([up], d_deconv_bias, DType::F32),
        Tensor::from_device(conv.shape(), d_conv, DType::F32),
        Tensor::from_device([out], d_conv_bias, DType::F32),
    ])
}

/// Weights `[row][tap]` with their taps first, `[tap][row]`, or the reverse.
fn transposed(
    cuda: &Cuda,
    x: &Arc<Memory>,
    [rows, taps]: [usize; 2],
    first: bool,
) -> Result<Arc<Memory>, OpError> {
    let y = cuda.allocate(rows * taps, DType::F32)?;
    let kernel = if first { kernels::STAGE_TAPS_FIRST } else { kernels::STAGE_TAPS_LAST };
    let launch = Launch {
        grid: [rows.div_ceil(TRANSPOSED), 1, 1],
        shared: TRANSPOSED * (taps | 1) * 4,
        ..Launch::per_element(0)
    }
    .with_cost(0, 2 * rows * taps * 4);
    let arguments = kernels::StageTapsFirstArgs {
        x: x.into(),
        y: (&y).into(),
        rows: rows.into(),
        taps: taps.into(),
    };
    cuda.launch(kernel, launch, arguments)?;
    Ok(y)
}

/// Composed weights `[phase][out][coarse][coarse tap]`, the bias of a voxel far from the border
/// `[out]`, and the part of it that is lost there `[27][out]`; shapes were checked. The products'
/// sums are floats, of 64 terms each and then of these: the weights are exact to about 1e-7.
pub fn compose(
    cuda: &Cuda,
    [deconv, deconv_bias, conv, conv_bias]: [&Tensor; 4],
) -> Result<[Tensor; 3], OpError> {
    let [out, inputs, ..] = conv.map5(OP, "conv weight")?;
    let [coarse, up, ..] = deconv.map5(OP, "deconv weight")?;
    let (deconv, conv) = (deconv.to_device(cuda, DType::F32)?, conv.to_device(cuda, DType::F32)?);
    let deconv_taps = transposed(cuda, &deconv, [coarse * up, 8], true)?;
    let conv_taps = transposed(cuda, &conv, [out * inputs, 27], true)?;
    let composed = cuda.allocate(64 * out * coarse, DType::F32)?;
    let launch = Launch {
        grid: [coarse.div_ceil(SPAN), out.div_ceil(SPAN), 64],
        shared: TILES * 4,
        ..Launch::per_element(0)
    }
    .with_cost(2 * 216 * out * coarse * up, conv.bytes() + deconv.bytes() + composed.bytes());
    cuda.launch(
        kernels::STAGE_COMPOSE,
        launch,
        kernels::StageComposeArgs {
            left: (&conv_taps).into(),
            right: (&deconv_taps).into(),
            y: (&composed).into(),
            outs: out.into(),
            coarse: coarse.into(),
            up: up.into(),
            inputs: inputs.into(),
        },
    )?;
    let (deconv_bias, conv_bias) =
        (deconv_bias.to_device(cuda, DType::F32)?, conv_bias.to_device(cuda, DType::F32)?);
    let [inner, border] = [cuda.allocate(out, DType::F32)?, cuda.allocate(27 * out, DType::F32)?];
    let launch = Launch { grid: [out, 1, 1], shared: 10 * 27 * 8, ..Launch::per_element(0) }
        .with_cost(2 * 27 * out * up, 4 * 27 * out * (up + 1));
    cuda.launch(
        kernels::STAGE_BIASES,
        launch,
        kernels::StageBiasesArgs {
            conv: (&conv).into(),
            deconv_bias: (&deconv_bias).into(),
            conv_bias: (&conv_bias).into(),
            inner: (&inner).into(),
            border: (&border).into(),
            outs: out.into(),
            up: up.into(),
            inputs: inputs.into(),
        },
    )?;
    Ok([
        Tensor::from_device([8, out, coarse, 8], composed, DType::F32),
        Tensor::from_device([out], inner, DType::F32),
        Tensor::from_device([27, out], border, DType::F32),
    ])
}

/// [`grad::weights`](super::grad::weights) on a device; shapes were checked.
pub fn weights_gradient(
    cuda: &Cuda,
    composed: &Tensor,
    deconv: &Tensor,
    conv: &Tensor,
) -> Result<[Tensor; 2], OpError> {
    let [out, inputs, ..] = conv.map5(OP, "conv weight")?;
    let [coarse, up, ..] = deconv.map5(OP, "deconv weight")?;
    let by_tap = |t: &Tensor, taps: usize| {
        transposed(cuda, &t.to_device(cuda, DType::F32)?, [t.len() / taps, taps], true)
    };
    let gradient = by_tap(composed, 8)?;
    let (deconv_taps, conv_taps) = (by_tap(deconv, 8)?, by_tap(conv, 27)?);
    let [d_deconv, d_conv] =
        [cuda.allocate(deconv.len(), DType::F32)?, cuda.allocate(conv.len(), DType::F32)?];
    // The skip part stays zero.
    cuda.clear(&d_conv)?;
    // Each of the 216 pairs of a tap and a phase takes the same number of products.
    let flops = 2 * 216 * out * coarse * up;
    for (kernel, [groups, rows], right, y) in [
        (kernels::STAGE_GRADIENT_OF_CONV, [27, out], &deconv_taps, &d_conv),
        (kernels::STAGE_GRADIENT_OF_DECONV, [8, coarse], &conv_taps, &d_deconv),
    ] {
        let launch = Launch {
            grid: [up.div_ceil(SPAN), rows.div_ceil(SPAN), groups],
            shared: TILES * 4,
            ..Launch::per_element(0)
        }
        .with_cost(flops, gradient.bytes() + right.bytes() + y.bytes());
        let arguments = kernels::StageGradientOfConvArgs {
            left: (&gradient).into(),
            right: right.into(),
            y: y.into(),
            outs: out.into(),
            coarse: coarse.into(),
            up: up.into(),
            inputs: inputs.into(),
        };
        cuda.launch(kernel, launch, arguments)?;
    }
    let back = |values: &Arc<Memory>, like: &Tensor, taps: usize| -> Result<Tensor, OpError> {
        let values = transposed(cuda, values, [like.len() / taps, taps], false)?;
        Ok(Tensor::from_device(like.shape(), values, DType::F32))
    };
    Ok([back(&d_deconv, deconv, 8)?, back(&d_conv, conv, 27)?])
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::super::{DecoderStage, decoder_stage, grad, skip_map};
    use super::*;
    use crate::device::{Cpu, Device};

    /// Weights whose home is the device are composed there, and nothing of them is copied to the
    /// host.
    #[test]
    fn a_stage_is_composed_on_the_device_as_on_the_host() {
        // Small whole numbers, whose sums are exact in any order.
        let whole = |shape: &[usize], seed: usize| {
            let count: usize = shape.iter().product();
            Tensor::new(
                shape,
                (0..count).map(|i| ((i * 7919 + seed * 131) % 5) as f32 - 2.0).collect(),
            )
        };
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let cuda = Cuda::emulated(Cpu::new(4).unwrap(), dtype, 0);
            let device = Device::Cuda(cuda.clone());
            let resident = |t: &Tensor| {
                let memory = t.to_device(&cuda, DType::F32).unwrap();
                Tensor::from_device(t.shape(), memory, DType::F32)
            };
            for [coarse, up, skip, out] in [[16, 5, 8, 8], [40, 3, 0, 32], [6, 7, 3, 66]] {
                let given = [
                    whole(&[coarse, up, 2, 2, 2], 1),
                    whole(&[up], 2),
                    whole(&[out, skip + up, 3, 3, 3], 3),
                    whole(&[out], 4),
                ];
                let there = given.each_ref().map(resident);
                let maps = [
                    whole(&[1, 4, 6, 4, skip.max(1)], 5),
                    whole(&[1, 2, 3, 2, coarse], 6),
                    whole(&[1, 4, 6, 4, out], 7),
                ];
                let on_device = maps.each_ref().map(|map| {
                    Tensor::from_device(map.shape(), map.to_device(&cuda, dtype).unwrap(), dtype)
                });
                let results = |[deconv, deconv_bias, conv, conv_bias]: &[Tensor; 4]| {
                    let [fine, x, dy] = &on_device;
                    let stage =
                        DecoderStage::new(&device, deconv, deconv_bias, conv, conv_bias).unwrap();
                    let fine = (skip > 0).then(|| ConvInput::shared(fine));
                    let fine = skip_map(&device, &stage, fine, [1, 4, 6, 4]).unwrap();
                    let x = ConvInput::shared(x);
                    let y = decoder_stage(&device, &stage, &x, &fine).unwrap().map;
                    let mirrored = grad::mirrored(&device, &stage);
                    [fine, y, grad::input(&device, &mirrored, dy).unwrap()]
                };
                let before = cuda.transfers();
                let found = results(&there);
                assert_eq!(cuda.transfers(), before, "it took the way over the host");
                for (found, expected) in found.iter().zip(&results(&given)) {
                    assert_eq!(
                        found.try_data().unwrap(),
                        expected.try_data().unwrap(),
                        "{dtype}, {coarse} and {skip} to {out}"
                    );
                }
            }
        }
    }
}
