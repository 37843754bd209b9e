//! What the corrective refiner sees: image, mask and prompts at half the resolution.

use crate::device::Device;
use crate::device::cuda::{Arg, Launch, Memory};
use crate::ops::resample::halve;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

const OP: &str = "refiner_input";

/// Which of several masks.
#[derive(Clone, Copy)]
pub enum Choice<'a> {
    /// Its number.
    Known(usize),
    /// Its number stands in a CUDA device's memory, an `int`.
    OnDevice(&'a Arc<Memory>),
}

/// From the halved `image` `[1, d, h, w, 1]`, candidate `choice` of `masks` (logits, `[m, 2d, 2h, 2w]` in any shape) and `prompts` `[1, 2d, 2h, 2w, 2]`: the
/// refiner's input `[1, d, h, w, 4]` (image, share of positive logits, of positive and of negative prompt voxels) and the halved logits `[1, d h w]`.
pub fn refiner_input(
    device: &Device,
    image: &Tensor,
    masks: &Tensor,
    choice: Choice,
    prompts: &Tensor,
) -> Result<(Tensor, Tensor), OpError> {
    let [n, d, h, w, c] = image.map5(OP, "image")?;
    if (n, c) != (1, 1) {
        return Err(image.misfit(OP, "image", "[1, d, h, w, 1]"));
    }
    let (half, full) = (d * h * w, d * h * w * 8);
    prompts.expect(OP, "prompts", &[1, 2 * d, 2 * h, 2 * w, 2])?;
    let (selected, on_device) = match choice {
        Choice::Known(selected) => (selected, None),
        Choice::OnDevice(memory) => (0, Some(memory.clone())),
    };
    if masks.len() < (selected + 1) * full {
        return Err(masks.misfit(OP, "masks", format!("at least {} maps of [{}, {}, {}]", selected + 1, 2 * d, 2 * h, 2 * w)));
    }
    let cpu = match device {
        Device::Cpu(_) if on_device.is_some() => {
            return Err(OpError::Argument { op: OP, message: "the CPU cannot read a device's choice".into() });
        }
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            let dtype = cuda.precision();
            let (out, logits) = (cuda.allocate(half * 4, dtype)?, cuda.allocate(half, dtype)?);
            let [image, masks, prompts] = [image.on(cuda, dtype)?, masks.on(cuda, dtype)?, prompts.on(cuda, dtype)?];
            let memory = [&image, &masks, &prompts, &out, &logits].map(Arg::from);
            let memory = [&memory[..], &[Arg::maybe(&on_device)]].concat();
            let numbers = [selected, d, h, w].map(Arg::int);
            let launch = Launch::each(half).doing(60 * half, (half * (1 + 4 + 1) + full * 3) * dtype.bytes());
            cuda.launch(&format!("refiner_input_{dtype}"), launch, &[&memory[..], &numbers].concat())?;
            return Ok((Tensor::from_device([1, d, h, w, 4], out, dtype), Tensor::from_device([1, half], logits, dtype)));
        }
    };
    // The mask, its binarisation and both prompt maps are halved together.
    let m = &masks.data()[selected * full..];
    let plane = 4 * h * w;
    let mut four = cpu.take(full * 4);
    cpu.chunks_mut(&mut four, 4 * plane, |i, four| {
        let at = i * plane;
        let prompts = prompts.data()[at * 2..].chunks_exact(2);
        for ((four, m), p) in four.chunks_exact_mut(4).zip(&m[at..]).zip(prompts) {
            four.copy_from_slice(&[f32::from(u8::from(*m > 0.0)), p[0], p[1], *m]);
        }
    });
    let halved = halve(device, &Tensor::from_buffer([1, 2 * d, 2 * h, 2 * w, 4], four))?;
    let mut inputs = cpu.take(half * 4);
    for ((v, i), h) in inputs.chunks_exact_mut(4).zip(image.data()).zip(halved.data().chunks_exact(4)) {
        v.copy_from_slice(&[*i, h[0], h[1], h[2]]);
    }
    let logits = halved.data().chunks_exact(4).map(|h| h[3]).collect();
    Ok((Tensor::from_buffer([1, d, h, w, 4], inputs), Tensor::new([1, half], logits)))
}
