//! The decoder stage on CUDA devices.

use super::{DecoderStage, OP};
use crate::device::cuda::{DeviceCache, Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::ops::conv3d::cuda::{Op, conv3d};
use crate::ops::conv3d::{ConvInput, ConvOutput, Packed, PackedConv};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Rows that a block of `stage_taps_first` turns.
const TURNED: usize = 256;
/// Edge of what a block of a product of weights makes, and floats of its tiles of both sides.
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

/// The gradient of the coarse input `[n, d, h, w, ..]`, `extent`'s channels being the output's.
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
pub fn kinds(cuda: &Cuda, g: &Tensor) -> Result<Vec<f64>, OpError> {
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
    let sums = Tensor::from_device([27 * c], sums, DType::F32);
    Ok(sums.try_data()?.iter().map(|v| *v as f64).collect())
}

/// Weights `[row][tap]` with their taps in front, `[tap][row]`, or back.
fn turned(
    cuda: &Cuda,
    x: &Arc<Memory>,
    [rows, taps]: [usize; 2],
    first: bool,
) -> Result<Arc<Memory>, OpError> {
    let y = cuda.allocate(rows * taps, DType::F32)?;
    let kernel = if first { kernels::STAGE_TAPS_FIRST } else { kernels::STAGE_TAPS_LAST };
    let launch = Launch {
        grid: [rows.div_ceil(TURNED), 1, 1],
        shared: TURNED * (taps | 1) * 4,
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

/// See [`grad::weights`](super::grad::weights), whose shapes were checked.
pub fn weights_gradient(
    cuda: &Cuda,
    composed: &Tensor,
    deconv: &Tensor,
    conv: &Tensor,
) -> Result<[Tensor; 2], OpError> {
    let [out, inputs, ..] = conv.map5(OP, "conv weight")?;
    let [coarse, up, ..] = deconv.map5(OP, "deconv weight")?;
    let by_tap = |t: &Tensor, taps: usize| {
        turned(cuda, &t.to_device(cuda, DType::F32)?, [t.len() / taps, taps], true)
    };
    let gradient = by_tap(composed, 8)?;
    let (deconv_taps, conv_taps) = (by_tap(deconv, 8)?, by_tap(conv, 27)?);
    let [d_deconv, d_conv] =
        [cuda.allocate(deconv.len(), DType::F32)?, cuda.allocate(conv.len(), DType::F32)?];
    // The skip part stays zero.
    cuda.clear(&d_conv)?;
    // Of each of the 216 pairs of a tap and a phase the same number of products.
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
        let values = turned(cuda, values, [like.len() / taps, taps], false)?;
        Ok(Tensor::from_device(like.shape(), values, DType::F32))
    };
    Ok([back(&d_deconv, deconv, 8)?, back(&d_conv, conv, 27)?])
}
