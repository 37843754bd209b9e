//! The decoder stage on CUDA devices.

use super::DecoderStage;
use crate::device::cuda::{Arg, Launch};
use crate::device::{Cuda, DType};
use crate::ops::conv3d::Input;
use crate::ops::conv3d::cuda::{Packed, conv3d};
use crate::ops::norm::Sums;
use crate::tensor::{OpError, Tensor};

pub fn skip_map(cuda: &Cuda, stage: &DecoderStage, skip: Option<Input>, [n, d, h, w]: [usize; 4]) -> Result<Tensor, OpError> {
    let (c, dtype) = (stage.outputs, cuda.precision());
    let (map, bias) = match (skip, &stage.skip) {
        (Some(skip), Some(conv)) => (conv3d(cuda, skip, [n, d, h, w, conv.in_channels()], conv, false)?.0.on(cuda, dtype)?, None),
        _ => (cuda.allocate(n * d * h * w * c, dtype)?, Some(stage.inner_bias.on(cuda, DType::F32)?)),
    };
    let edges = stage.border.on(cuda, DType::F32)?;
    let count = n * d * h * w * c;
    let shape = [Arg::long(count), Arg::int(d), Arg::int(h), Arg::int(w), Arg::int(c)];
    let arguments = [&[(&map).into(), Arg::maybe(&bias), (&edges).into()], &shape[..]].concat();
    cuda.launch(&format!("skip_border_{dtype}"), Launch::each(count).doing(count, 2 * count * dtype.bytes()), &arguments)?;
    Ok(Tensor::from_device([n, d, h, w, c], map, dtype))
}

pub fn decoder_stage(cuda: &Cuda, stage: &DecoderStage, x: Input, extent: [usize; 5], skip: &Tensor) -> Result<(Tensor, Sums), OpError> {
    let phases: Vec<_> = stage.phases.iter().collect();
    let packed = stage.on_cuda.get(cuda, cuda.precision(), || Packed::new(cuda, &phases, cuda.precision()))?;
    let (map, sums) = packed.run(cuda, "decoder_stage", x, extent, Some(skip), true)?;
    Ok((map, sums.expect("sums were asked for")))
}
