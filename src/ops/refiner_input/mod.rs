//! The input of the corrective refiner: image, mask and prompts at half the resolution.

use crate::device::cuda::{Launch, Memory, kernels};
use crate::device::profile::OpCost;
use crate::device::simd::multiversion;
use crate::device::{Device, DisjointWriter};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

const OP: &str = "refiner_input";

/// Which of several masks the refiner corrects.
#[derive(Clone, Copy)]
pub enum Choice<'a> {
    /// The mask with this number, from 0.
    Known(usize),
    /// The mask whose number is in a CUDA device's memory, as an `int`.
    OnDevice(&'a Arc<Memory>),
}

/// The refiner's input `[1, d, h, w, 4]`, and the chosen mask's logits at half the resolution,
/// `[1, d h w]`.
///
/// `image` `[1, d, h, w, 1]` is at half the resolution already; `masks` has the logits of
/// candidates, `[m, 2d, 2h, 2w]` in any shape, and `prompts` `[1, 2d, 2h, 2w, 2]` the maps of
/// positive and of negative prompts. The four channels are the image and, over the 2×2×2 voxels of
/// each, the share of positive logits and the means of the two prompt maps; the logits are means
/// too.
///
/// # Errors
/// Shapes do not fit, there is no such mask, or the choice is on a device and the op on the CPU.
pub fn refiner_input(
    device: &Device,
    image: &Tensor,
    masks: &Tensor,
    choice: Choice,
    prompts: &Tensor,
) -> Result<(Tensor, Tensor), OpError> {
    let [n, d, h, w, c] = image.map5(OP, "image")?;
    if (n, c) != (1, 1) {
        return Err(image.shape_error(OP, "image", "[1, d, h, w, 1]"));
    }
    let (half, full) = (d * h * w, d * h * w * 8);
    prompts.expect_shape(OP, "prompts", &[1, 2 * d, 2 * h, 2 * w, 2])?;
    let (selected, on_device) = match choice {
        Choice::Known(selected) => (selected, None),
        Choice::OnDevice(memory) => (0, Some(memory.clone())),
    };
    let needed = selected.saturating_add(1);
    if needed.checked_mul(full).is_none_or(|values| masks.len() < values) {
        return Err(masks.shape_error(
            OP,
            "masks",
            format!("at least {needed} maps of [{}, {}, {}]", 2 * d, 2 * h, 2 * w),
        ));
    }
    let cpu = match device {
        Device::Cpu(_) if on_device.is_some() => {
            return Err(OpError::Argument {
                op: OP,
                message: "the CPU cannot read a device's choice".into(),
            });
        }
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            let dtype = cuda.precision();
            let (out, logits) = (cuda.allocate(half * 4, dtype)?, cuda.allocate(half, dtype)?);
            let [image, masks, prompts] = [
                image.to_device(cuda, dtype)?,
                masks.to_device(cuda, dtype)?,
                prompts.to_device(cuda, dtype)?,
            ];
            let launch = Launch::per_element(half)
                .with_cost(60 * half, (half * (1 + 4 + 1) + full * 3) * dtype.bytes());
            cuda.launch(
                kernels::REFINER_INPUT.of(dtype)?,
                launch,
                kernels::RefinerInputArgs {
                    image: (&image).into(),
                    masks: (&masks).into(),
                    prompts: (&prompts).into(),
                    y: (&out).into(),
                    logits: (&logits).into(),
                    choice: (&on_device).into(),
                    selected: selected.into(),
                    d: d.into(),
                    h: h.into(),
                    w: w.into(),
                },
            )?;
            return Ok((
                Tensor::from_device([1, d, h, w, 4], out, dtype),
                Tensor::from_device([1, half], logits, dtype),
            ));
        }
    };
    let _op = cpu.op("refiner input", || OpCost {
        problem: format!("{d}x{h}x{w}"),
        flops: (32 * half) as f64,
        floats: 3 * full + 6 * half,
    });
    let m = &masks.data()[selected * full..];
    let (mut inputs, mut logits) = (cpu.alloc(half * 4), cpu.alloc(half));
    let to = DisjointWriter::new(&mut logits);
    cpu.chunks_mut(&mut inputs, w * 4, |line, inputs| {
        let at = [(0, 0), (0, 1), (1, 0), (1, 1)]
            .map(|(p, q)| ((2 * (line / h) + p) * 2 * h + 2 * (line % h) + q) * 2 * w);
        let (m, prompts) =
            (at.map(|at| &m[at..][..2 * w]), at.map(|at| &prompts.data()[2 * at..][..4 * w]));
        // SAFETY: each line writes its own.
        let logits = unsafe { to.slice(line * w, w) };
        halve_row(cpu.isa(), &image.data()[line * w..][..w], m, prompts, inputs, logits);
    });
    Ok((Tensor::from_buffer([1, d, h, w, 4], inputs), Tensor::from_buffer([1, half], logits)))
}

multiversion! {
    /// A row of the refiner's input and of the halved logits, from the four rows of logits and
    /// prompts around it.
    fn halve_row(
        image: &[f32],
        m: [&[f32]; 4],
        prompts: [&[f32]; 4],
        inputs: &mut [f32],
        logits: &mut [f32],
    ) {
        let set = |v: f32| if v > 0.0 { 1.0f32 } else { 0.0 };
        for (k, ((inputs, logit), image)) in
            inputs.chunks_exact_mut(4).zip(logits).zip(image).enumerate()
        {
            let mut sums = [0.0f32; 4];
            for (m, p) in m.iter().zip(prompts) {
                let (m, p) = (&m[2 * k..][..2], &p[4 * k..][..4]);
                sums[0] += set(m[0]) + set(m[1]);
                sums[1] += p[0] + p[2];
                sums[2] += p[1] + p[3];
                sums[3] += m[0] + m[1];
            }
            inputs.copy_from_slice(&[*image, sums[0] * 0.125, sums[1] * 0.125, sums[2] * 0.125]);
            *logit = sums[3] * 0.125;
        }
    }
}
