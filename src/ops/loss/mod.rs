//! The losses of a mask and the boundary map, with their gradients.
//!
//! One pass gives every term of a mask's loss, and the gradient of their weighted sum if it is
//! wanted: Dice with squared denominators (Milletari et al. 2016) and binary cross entropy, as in
//! Li et al. 2024 and formed as MONAI forms them, the boundary loss of that paper, and the plain
//! Dice that a score is trained to predict. Sums are formed in a fixed order.

mod cpu;
mod cuda;
mod near;

pub use near::Emphasis;

use crate::device::cuda::Memory;
use crate::device::{Cpu, Cuda, Device};
use crate::memory;
use crate::tensor::{GRADIENT, OpError, Tensor, extent};
use std::sync::Arc;

const OP: &str = "mask_loss";

/// Values of a unit of work.
const RUN: usize = 1 << 16;

/// What is added to the numerators and denominators of Dice, so that those of empty masks are
/// defined.
pub const SMOOTH: f64 = 1e-5;
/// The window of the boundary map in the paper (Li et al. 2024), in voxels along d, h and w: 5×5
/// within an axial slice.
pub const KERNEL: [usize; 3] = [5, 5, 1];

/// What masks are compared with: the label of one item, with its boundary map and volume.
pub struct Target {
    label: Tensor,
    boundary: Tensor,
    volume: f64,
    size: [usize; 3],
    kernel: [usize; 3],
}

impl Target {
    /// The target of a label of zeros and ones, `size` `[d, h, w]` voxels in row-major order.
    ///
    /// `kernel` is the window of the boundary map in voxels, odd along each axis: [`KERNEL`] in the
    /// paper.
    ///
    /// # Errors
    /// The label is empty or not of this size, the kernel is even, or the device fails.
    pub fn new(
        device: &Device,
        label: Vec<f32>,
        size: [usize; 3],
        kernel: [usize; 3],
    ) -> Result<Target, OpError> {
        if label.is_empty() || extent(&size) != Some(label.len()) {
            return Err(OpError::Argument {
                op: OP,
                message: format!("a label of {} voxels, expected {size:?}", label.len()),
            });
        }
        let ones = ones_of(device.cpu(), &label);
        let volume = match ones {
            Some(ones) => ones as f64,
            None => label.iter().map(|g| *g as f64).sum(),
        };
        let [d, h, w] = size;
        let label = Tensor::new([1, 1, d, h, w], label);
        if let (Device::Cuda(cuda), Some(_)) = (device, ones) {
            cuda::upload_label(cuda, &label)?;
        }
        let boundary = boundary_map(device, &label, kernel)?;
        Ok(Target { label, boundary, volume, size, kernel })
    }

    /// What [`TargetSize::loss`] needs of the target, which then may be dropped.
    pub fn size(&self) -> TargetSize {
        TargetSize { volume: self.volume, voxels: self.label.len() }
    }

    /// The terms of a mask's loss, from its sums as [`MaskSums::read`] gives them.
    pub fn loss(&self, sums: [f64; 5]) -> MaskLoss {
        self.size().loss(sums)
    }

    /// The label's values, in row-major order.
    pub fn label(&self) -> &[f32] {
        self.label.data()
    }
}

/// The number of ones of a label; none if it has other values than zeros and ones.
fn ones_of(cpu: &Cpu, label: &[f32]) -> Option<usize> {
    let mut runs: Vec<Option<usize>> = vec![None; label.len().div_ceil(RUN)];
    cpu.chunks_mut(&mut runs, 1, |run, ones| {
        let values = &label[run * RUN..];
        let (mut one, mut other) = (0u32, 0u32);
        for v in &values[..values.len().min(RUN)] {
            one += u32::from(*v == 1.0);
            other += u32::from(*v != 0.0 && *v != 1.0);
        }
        ones[0] = (other == 0).then_some(one as usize);
    });
    runs.into_iter().sum()
}

/// The size of a [`Target`] and the volume of its label, in voxels.
#[derive(Clone, Copy, Debug)]
pub struct TargetSize {
    volume: f64,
    voxels: usize,
}

impl TargetSize {
    /// The terms of a mask's loss, from its sums as [`MaskSums::read`] gives them.
    pub fn loss(self, sums: [f64; 5]) -> MaskLoss {
        MaskLoss::of(sums, self)
    }
}

/// For each of several masks the five sums that its loss is made of, kept where they were computed.
///
/// Over the target's voxels, with probabilities `p` and the label `g`, they are the sums of `p g`,
/// of `p²`, of `p`, of the binary cross entropy, and of the squared differences of boundary maps.
pub struct MaskSums(At);

enum At {
    Here(Vec<[f64; 5]>),
    There(Cuda, Arc<Memory>),
}

impl MaskSums {
    /// The sums of each mask, for [`Target::loss`]; a device is waited for. [`read()`] copies those
    /// of several at once.
    pub fn read(&self) -> Result<Vec<[f64; 5]>, OpError> {
        match &self.0 {
            At::Here(sums) => Ok(sums.clone()),
            At::There(cuda, memory) => {
                let mut sums = vec![[0.0; 5]; memory.bytes() / 40];
                cuda.download(memory, &mut sums)?;
                Ok(sums)
            }
        }
    }
}

/// The values that [`read()`] copied back, in the order of its lists.
pub struct Read {
    /// For each [`MaskSums`] the sums of each mask.
    pub sums: Vec<Vec<[f64; 5]>>,
    /// For each tensor of scores its values.
    pub scores: Vec<Vec<f32>>,
    /// The other numbers.
    pub numbers: Vec<f64>,
}

/// Copies the results of several computations back from a device at once: `sums`, the values of
/// `scores`, and `numbers`, each a `double` in a device's memory. The device is waited for.
pub fn read(
    device: &Device,
    sums: &[&MaskSums],
    scores: &[&Tensor],
    numbers: &[&Arc<Memory>],
) -> Result<Read, OpError> {
    if let Device::Cuda(cuda) = device {
        return cuda::read(cuda, sums, scores, numbers);
    }
    let number = |memory: &&Arc<Memory>| -> Result<f64, OpError> {
        let mut value = [0.0f64];
        memory.cuda().download(memory, &mut value)?;
        Ok(value[0])
    };
    Ok(Read {
        sums: sums.iter().map(|s| s.read()).collect::<Result<_, _>>()?,
        scores: scores
            .iter()
            .map(|s| s.try_data().map(<[f32]>::to_vec))
            .collect::<Result<_, _>>()?,
        numbers: numbers.iter().map(number).collect::<Result<_, _>>()?,
    })
}

/// The weights of the terms of a mask's loss.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The weight of [`MaskLoss::dice_squared`] and of [`MaskLoss::cross_entropy`].
    pub region: f64,
    /// The weight of [`MaskLoss::boundary`].
    pub boundary: f64,
}

/// The terms of a mask's loss, not weighted.
#[derive(Clone, Copy, Debug)]
pub struct MaskLoss {
    /// The Dice loss with squared denominators, `1 - 2 Σ p g / (Σ p² + Σ g²)`, with [`SMOOTH`].
    pub dice_squared: f64,
    /// The mean over voxels of the binary cross entropy.
    pub cross_entropy: f64,
    /// The mean squared difference of the boundary maps of the probabilities and of the label.
    pub boundary: f64,
    /// The Dice itself, with plain denominators: `2 Σ p g / (Σ p + Σ g)`, with [`SMOOTH`]. It is no
    /// term of the loss: a score learns to predict it.
    pub dice: f64,
}

impl MaskLoss {
    /// The mask's loss: the weighted sum of Dice loss, cross entropy and boundary loss.
    pub fn total(&self, terms: Terms) -> f64 {
        terms.region * (self.dice_squared + self.cross_entropy) + terms.boundary * self.boundary
    }

    /// The terms from the sums over a target's voxels of p g, p², p, the cross entropy, and the
    /// squared differences of the boundary maps.
    fn of([both, squares, total, entropy, boundary]: [f64; 5], target: TargetSize) -> MaskLoss {
        // The label is zeros and ones: its squares sum to its volume.
        let dice = |total: f64| (2.0 * both + SMOOTH) / (total + target.volume + SMOOTH);
        let n = target.voxels as f64;
        MaskLoss {
            dice_squared: 1.0 - dice(squares),
            cross_entropy: entropy / n,
            boundary: boundary / n,
            dice: dice(total),
        }
    }
}

/// The sums from which the terms of the loss of each mask are computed, not read back yet.
///
/// `logits` is `[masks, ...]`, with as many voxels in each mask as the target has.
pub fn mask_sums(device: &Device, logits: &Tensor, target: &Target) -> Result<MaskSums, OpError> {
    Ok(sums(device, logits, target, None)?.0)
}

/// The loss of each mask in `logits` `[masks, ...]`, and its gradient.
///
/// The gradient is that of each mask's [`MaskLoss::total`] with `terms` with respect to the logits,
/// in their shape, times `factor`.
pub fn mask_losses_gradient(
    device: &Device,
    logits: &Tensor,
    target: &Target,
    terms: Terms,
    factor: f32,
) -> Result<(Vec<MaskLoss>, Tensor), OpError> {
    let (sums, gradient) = mask_sums_gradient(device, logits, target, terms, factor)?;
    Ok((sums.read()?.into_iter().map(|sums| target.loss(sums)).collect(), gradient))
}

/// The gradient that [`mask_losses_gradient`] gives, with the sums that the losses are made of, not
/// read back yet: the device is not waited for.
pub fn mask_sums_gradient(
    device: &Device,
    logits: &Tensor,
    target: &Target,
    terms: Terms,
    factor: f32,
) -> Result<(MaskSums, Tensor), OpError> {
    let (sums, gradient) = sums(device, logits, target, Some((terms, factor)))?;
    Ok((sums, gradient.expect("asked for")))
}

fn sums(
    device: &Device,
    logits: &Tensor,
    target: &Target,
    wanted: Option<(Terms, f32)>,
) -> Result<(MaskSums, Option<Tensor>), OpError> {
    let n = target.label.len();
    if logits.is_empty() || !logits.len().is_multiple_of(n) {
        return Err(logits.shape_error(
            OP,
            "logits",
            format!("[masks, {}], for a target of {:?}", n, target.size),
        ));
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            let (sums, gradient) = cuda::mask_losses(cuda, logits, target, wanted)?;
            return Ok((MaskSums(At::There(cuda.clone(), sums)), gradient));
        }
    };
    let (terms, factor) = wanted.unwrap_or((Terms { region: 0.0, boundary: 0.0 }, 1.0));
    let masks = || logits.data().chunks_exact(n);
    if wanted.is_none() {
        let each = masks().map(|x| cpu::mask_loss(cpu, x, target, terms, factor, None));
        return Ok((MaskSums(At::Here(each.collect())), None));
    }
    let mut gradient = cpu.alloc(logits.len());
    let each = masks()
        .zip(gradient.chunks_exact_mut(n))
        .map(|(x, g)| cpu::mask_loss(cpu, x, target, terms, factor, Some(g)));
    let sums = MaskSums(At::Here(each.collect()));
    Ok((sums, Some(Tensor::from_buffer(logits.shape(), gradient))))
}

/// The gradient of the scores' loss, `scale / n Σ (score - dice)²`, in the shape of `scores`.
///
/// `dice` is [`MaskLoss::dice`] of the mask that the score belongs to, by `sums`; it carries no
/// gradient itself. There are as many scores as masks.
pub fn score_gradient(
    device: &Device,
    sums: &MaskSums,
    scores: &Tensor,
    target: &Target,
    n: f64,
    scale: f32,
) -> Result<Tensor, OpError> {
    if let (Device::Cuda(cuda), At::There(_, memory)) = (device, &sums.0) {
        if memory.bytes() != scores.len() * 40 {
            return Err(scores.shape_error(OP, "scores", format!("[{}]", memory.bytes() / 40)));
        }
        return cuda::score_gradient(cuda, memory, scores, target, 2.0 / n, scale);
    }
    let sums = sums.read()?;
    if sums.len() != scores.len() {
        return Err(scores.shape_error(OP, "scores", format!("[{}]", sums.len())));
    }
    let one = |(score, sums): (&f32, &[f64; 5])| {
        let off = *score as f64 - target.loss(*sums).dice;
        (2.0 * off / n) as f32 * scale
    };
    Ok(Tensor::new(scores.shape(), scores.try_data()?.iter().zip(&sums).map(one).collect()))
}

/// Adds the gradient of an additional cross entropy to `gradient`, times `factor`; also returns its
/// value for each mask in `logits` `[masks, ...]`.
///
/// With weights `w`, cross entropy `h` in each voxel and the weight `share` of their mean, the
/// value is `share Σ w h / Σ w`: the first of the sums of each mask; the others are unused. If the
/// weights add up to 0, the value is 0. A device computes the weights itself: what is copied to it
/// is [`Emphasis`], a few numbers, once for all losses.
///
/// # Errors
/// The emphasis is that of a volume of another size, sizes do not fit, or the device fails.
pub fn emphasis(
    device: &Device,
    logits: &Tensor,
    target: &Target,
    emphasis: &Emphasis,
    factor: f32,
    gradient: Tensor,
) -> Result<(MaskSums, Tensor), OpError> {
    let n = target.label.len();
    if emphasis.size != target.size {
        let message =
            format!("clicks in {:?} voxels, for a target of {:?}", emphasis.size, target.size);
        return Err(OpError::Argument { op: OP, message });
    }
    if logits.is_empty() || !logits.len().is_multiple_of(n) {
        let expected = format!("[masks, {n}], for a target of {:?}", target.size);
        return Err(logits.shape_error(OP, "logits", expected));
    }
    if gradient.len() != logits.len() {
        return Err(gradient.shape_error(OP, "gradient", format!("{:?}", logits.shape())));
    }
    if emphasis.total <= 0.0 {
        return Ok((MaskSums(At::Here(vec![[0.0; 5]; logits.len() / n])), gradient));
    }
    let shares = [(emphasis.share / emphasis.total) as f32, factor];
    if let Device::Cuda(cuda) = device {
        let (sums, gradient) = cuda::emphasis(cuda, logits, target, emphasis, shares, &gradient)?;
        return Ok((MaskSums(At::There(cuda.clone(), sums)), gradient));
    }
    let weights = emphasis.weights();
    let mut sum = memory::copied(GRADIENT, gradient.try_data()?);
    let masks = logits.try_data()?.chunks_exact(n).zip(sum.chunks_exact_mut(n));
    let each = masks.map(|(x, g)| [cpu::emphasis(x, target, &weights, shares, g), 0., 0., 0., 0.]);
    let sums = MaskSums(At::Here(each.collect()));
    Ok((sums, Tensor::new(logits.shape(), sum)))
}

fn check_kernel(kernel: [usize; 3]) -> Result<(), OpError> {
    if kernel.iter().all(|k| k % 2 == 1) {
        return Ok(());
    }
    let message = format!("kernel {kernel:?} must be odd along each axis");
    Err(OpError::Argument { op: "boundary_map", message })
}

/// The boundary map of each map in `m` `[n, c, d, h, w]` (channels first): `|m - avgpool(m)|`.
///
/// The average pooling has stride 1 and zero padding that is counted in the mean; `kernel` is its
/// window in voxels.
///
/// # Errors
/// `m` has not five axes, or the kernel is not odd along each axis.
pub fn boundary_map(device: &Device, m: &Tensor, kernel: [usize; 3]) -> Result<Tensor, OpError> {
    let [.., d, h, w] = m.map5("boundary_map", "m")?;
    check_kernel(kernel)?;
    if let Device::Cuda(cuda) = device {
        return cuda::boundary_map(cuda, m, [d, h, w], kernel);
    }
    let mut out = memory::list("a map of borders", m.len());
    for map in m.data().chunks_exact((d * h * w).max(1)) {
        let pooled = cpu::pool(device.cpu(), map, [d, h, w], kernel);
        out.extend(map.iter().zip(pooled.iter()).map(|(v, p)| (v - p).abs()));
    }
    Ok(Tensor::new(m.shape(), out))
}

/// The gradient of `m` of [`boundary_map`]: with `u = dy sign(m - avgpool(m))`, it is
/// `u - avgpool(u)`, where `sign(0)` is 0. Computed on the host.
pub fn boundary_map_gradient(
    device: &Device,
    m: &Tensor,
    kernel: [usize; 3],
    dy: &Tensor,
) -> Result<Tensor, OpError> {
    let [.., d, h, w] = m.map5("boundary_map", "m")?;
    check_kernel(kernel)?;
    dy.expect_shape("boundary_map gradient", "dy", m.shape())?;
    let mut out = memory::list(GRADIENT, m.len());
    let voxels = (d * h * w).max(1);
    for (map, dy) in m.try_data()?.chunks_exact(voxels).zip(dy.try_data()?.chunks_exact(voxels)) {
        let pooled = cpu::pool(device.cpu(), map, [d, h, w], kernel);
        let sign = |v: f32| {
            if v > 0.0 {
                1.0
            } else if v < 0.0 {
                -1.0
            } else {
                0.0
            }
        };
        let u = map.iter().zip(pooled.iter()).zip(dy).map(|((v, p), g)| g * sign(v - p));
        let u: Vec<f32> = memory::collected(GRADIENT, u);
        let back = cpu::pool(device.cpu(), &u, [d, h, w], kernel);
        out.extend(u.iter().zip(back.iter()).map(|(u, b)| u - b));
    }
    Ok(Tensor::new(m.shape(), out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_labels_volume_is_the_sum_of_its_values() {
        let device = Device::open("cpu", 2).unwrap();
        let size = [2, 3, RUN / 4];
        let voxels: usize = size.iter().product();
        let ones: Vec<f32> = (0..voxels).map(|i| f32::from(u8::from(i % 3 == 0))).collect();
        let parts: Vec<f32> = (0..voxels).map(|i| (i % 7) as f32 / 7.0).collect();
        let last: Vec<f32> = (0..voxels).map(|i| if i + 1 == voxels { 0.3 } else { 1.0 }).collect();
        for label in [ones, parts, last, vec![0.0; voxels]] {
            let sum: f64 = label.iter().map(|v| *v as f64).sum();
            let target = Target::new(&device, label, size, KERNEL).unwrap();
            assert_eq!(target.volume.to_bits(), sum.to_bits());
        }
    }
}
