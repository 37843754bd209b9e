//! Gradients of a convolution or a decoder stage: of its weights, and of a map before pooling.

use super::{OUT, TILE};
use crate::device::cuda::{Launch, kernels};
use crate::device::{Cuda, DType};
use crate::ops::conv3d::ConvInput;
use crate::ops::reduce::weight_total;
use crate::tensor::{OpError, Tensor};
use std::fmt;

/// Input channels of a block of a weight gradient in plain arithmetic.
const IN: usize = 16;
/// The most blocks that share weights: their sums are added up in order.
const SPLITS: usize = 256;
/// On tensor cores, the number of blocks that keep a GPU busy: two rounds of one block per
/// multiprocessor. If two blocks run side by side on one, there are twice as many.
const WEIGHT_BLOCKS: usize = 256;
/// The fewest planes that such a block goes over.
const PLANES: usize = 4;

/// How many blocks share weights.
#[derive(Clone, Copy, PartialEq)]
struct Splits(usize);

impl fmt::Display for Splits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parts", self.0)
    }
}

/// How the blocks of a weight gradient are laid out: the number that share weights, the number side
/// by side over channels, threads, bytes of shared memory.
struct WeightBlocks {
    splits: Splits,
    across: usize,
    threads: usize,
    shared: usize,
}

impl WeightBlocks {
    /// In plain arithmetic: tiles of the convolution, and the input's halo, in float. About
    /// `wanted` blocks.
    fn plain(
        [n, d, h, w, c]: [usize; 5],
        outs: usize,
        phases: usize,
        wanted: usize,
    ) -> WeightBlocks {
        let tiles: usize =
            [d, h, w].iter().zip(TILE).map(|(edge, tile)| edge.div_ceil(tile)).product();
        let across = c.div_ceil(IN) * outs.div_ceil(OUT);
        let reach = if phases == 8 { 1 } else { 2 };
        let voxels: usize = TILE.iter().map(|t| t + reach).product();
        WeightBlocks {
            splits: Splits((wanted / (across * phases)).clamp(1, SPLITS).min(n * tiles)),
            across,
            threads: 256,
            shared: (voxels * (IN + 1) + 256 * (OUT + 1)) * 4,
        }
    }

    /// On tensor cores: columns of 8 x 8 voxels, cut along d if there are few, the same number of
    /// pieces for each block. The kernel itself works out how columns are cut for this number of
    /// blocks. About `wanted` blocks, if one is on a multiprocessor at a time.
    fn matrix(
        [n, d, h, w, c]: [usize; 5],
        outs: usize,
        phases: usize,
        adds: bool,
        wanted: usize,
    ) -> WeightBlocks {
        let (edge, beside) = if phases == 8 { (2, 2) } else { (3, 1) };
        let across = c.div_ceil(OUT) * outs.div_ceil(OUT);
        let wanted = (wanted * beside / (across * phases)).max(1);
        let columns = n * h.div_ceil(8) * w.div_ceil(8);
        let parts = (wanted / columns).clamp(1, (d / PLANES).max(1));
        let runs = columns * d.div_ceil(d.div_ceil(parts));
        // Four buffers of a plane of the input, of the map that is added to it, and of the
        // gradient.
        let voxels = 64 * (1 + usize::from(adds)) + (8 + edge - 1) * (8 + edge - 1);
        WeightBlocks {
            splits: Splits(runs.div_ceil(runs.div_ceil(wanted))),
            across,
            threads: 128 * edge,
            shared: 4 * voxels * (OUT + 8) * 2,
        }
    }
}

/// The gradient of the weights of a convolution (1 phase: `[out, in, 3, 3, 3]`) or of a decoder
/// stage (8: `[8, out, in, 2, 2, 2]`, composed), added to the gradient so far. `extent` is that of
/// the loaded input.
pub(crate) fn weight_gradient(
    cuda: &Cuda,
    x: &ConvInput,
    extent: [usize; 5],
    dy: &Tensor,
    phases: usize,
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, [n, d, h, w, c], outs) = (cuda.precision(), extent, dy.channels());
    let taps = if phases == 8 { 8 } else { 27 };
    // With `part` / `of` of the number of blocks that the rule of thumb wants.
    let blocks = |part: usize, of: usize| match dtype {
        DType::F32 => WeightBlocks::plain(extent, outs, phases, SPLITS * 4 * part / of),
        _ => {
            let adds = x.prologue.add.is_some();
            WeightBlocks::matrix(extent, outs, phases, adds, WEIGHT_BLOCKS * part / of)
        }
    };
    let WeightBlocks { splits, across, threads, shared } = blocks(1, 1);
    let (Splits(splits), _launches) = cuda.choose(
        "weight_gradient",
        format_args!("n{n}c{c}o{outs}d{d}h{h}w{w}p{phases}"),
        splits,
        || [(1, 4), (1, 2), (2, 1)].map(|(part, of)| blocks(part, of).splits).into(),
    );
    let each = phases * taps * c * outs;
    let partial = cuda.allocate(splits * each, DType::F32)?;
    let (map, gradient) = (x.map.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    let [norm, add] = x.prologue.on_device(cuda, dtype)?;
    let vector = if dtype == DType::F32 { 4 } else { 8 };
    let whole = c.is_multiple_of(vector) && outs.is_multiple_of(vector);
    // On tensor cores a map is pooled by a separate kernel, or by the kernel that takes any map.
    let pools = x.prologue.max_pool && dtype != DType::F32;
    let family = match (whole, taps, pools) {
        (true, 27, false) => kernels::WEIGHT_GRADIENT_27,
        (true, 27, true) => kernels::WEIGHT_GRADIENT_POOLED_27,
        (true, _, false) => kernels::WEIGHT_GRADIENT_8,
        (false, 27, _) => kernels::WEIGHT_GRADIENT_FEW_27,
        _ => kernels::WEIGHT_GRADIENT_FEW_8,
    };
    let flops = 2 * n * d * h * w * phases * taps * c * outs;
    let bytes = (x.map.len() * (1 + usize::from(x.prologue.add.is_some())) + dy.len())
        * dtype.bytes()
        + each * 4;
    let launch =
        Launch { grid: [splits, across, phases], threads, shared, ..Launch::per_element(0) }
            .with_cost(flops, bytes);
    cuda.launch(
        family.of(dtype)?,
        launch,
        kernels::WeightGradient27Args {
            x: (&map).into(),
            norm: (&norm).into(),
            add: (&add).into(),
            dy: (&gradient).into(),
            partial: (&partial).into(),
            items: n.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
            outs: outs.into(),
            phases: phases.into(),
            pool: x.prologue.max_pool.into(),
            slope: x.prologue.slope(),
        },
    )?;
    weight_total(cuda, &partial, splits, [phases, taps, c, outs], so_far)
}

/// The gradient of a map before pooling, see [`grad::unpool`](crate::ops::conv3d::grad::unpool).
pub(crate) fn unpool(
    cuda: &Cuda,
    x: &ConvInput,
    g: &Tensor,
    so_far: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let ([n, d, h, w, c], dtype) = (g.map5("unpool", "g")?, cuda.precision());
    let out = cuda.allocate(x.map.len(), dtype)?;
    let (map, gradient) = (x.map.to_device(cuda, dtype)?, g.to_device(cuda, dtype)?);
    let [norm, add] = x.prologue.on_device(cuda, dtype)?;
    let so_far = so_far.map(|sum| sum.to_device(cuda, dtype)).transpose()?;
    let each = d * h * w * c;
    let maps = 2 + usize::from(so_far.is_some());
    let launch = Launch::per_element(each)
        .for_each(n)
        .with_cost(8 * g.len(), (maps * x.map.len() + g.len()) * dtype.bytes());
    cuda.launch(
        kernels::UNPOOL.of(dtype)?,
        launch,
        kernels::UnpoolArgs {
            x: (&map).into(),
            norm: (&norm).into(),
            add: (&add).into(),
            dy: (&gradient).into(),
            so_far: (&so_far).into(),
            dx: (&out).into(),
            count: each.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
            slope: x.prologue.slope(),
        },
    )?;
    Ok(Tensor::from_device(x.map.shape(), out, dtype))
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::Cpu;

    /// Small numbers, whose products and sums are exact in float and in 16 bits.
    fn small(shape: &[usize], seed: usize) -> Tensor {
        let count: usize = shape.iter().product();
        let at = |i: usize| ((i + seed) * 7919 % 2039 % 9) as f32 - 4.0;
        Tensor::new(shape, (0..count).map(at).collect())
    }

    /// The gradient of the weights of a convolution (1 phase) or a stage (8), by its formula.
    fn plain_gradient(
        x: &Tensor,
        dy: &Tensor,
        [n, d, h, w, c]: [usize; 5],
        phases: usize,
    ) -> Vec<f32> {
        let (outs, up) = (dy.channels(), if phases == 8 { 2 } else { 1 });
        let (taps, edge) = if phases == 8 { (8, 2) } else { (27, 3) };
        let mut sums = vec![0.0; phases * outs * c * taps];
        let bits = |v: usize| [v >> 2, v >> 1 & 1, v & 1];
        for (at, sum) in sums.iter_mut().enumerate() {
            let (tap, i, o) = (at % taps, at / taps % c, at / taps / c % outs);
            let phase = bits(at / taps / c / outs);
            let tap = [tap / edge / edge, tap / edge % edge, tap % edge];
            for v in 0..n * d * h * w {
                let (item, v) = (v / (d * h * w), [v / (h * w) % d, v / w % h, v % w]);
                let from: [usize; 3] =
                    std::array::from_fn(|a| (v[a] + tap[a] + phase[a]).wrapping_sub(1));
                if from.iter().zip([d, h, w]).any(|(at, edge)| *at >= edge) {
                    continue;
                }
                let x_at = ((item * d + from[0]) * h + from[1]) * w + from[2];
                let to: [usize; 3] = std::array::from_fn(|a| up * v[a] + phase[a]);
                let dy_at = ((item * up * d + to[0]) * up * h + to[1]) * up * w + to[2];
                *sum += x.data()[x_at * c + i] * dy.data()[dy_at * outs + o];
            }
        }
        sums
    }

    /// For every form of a convolution's input, and for maps of one column and of several, which
    /// one block goes through or several share.
    #[test]
    fn gradients_of_weights_on_tensor_cores_are_those_of_the_formula() {
        let devices =
            [DType::F16, DType::Bf16].map(|dtype| Cuda::emulated(Cpu::new(4).unwrap(), dtype, 3));
        for (extent, outs, phases, pooled, added) in [
            ([1, 19, 8, 8, 8], 16, 1, false, true),
            ([2, 3, 9, 10, 40], 24, 1, false, true),
            ([1, 2, 8, 17, 40], 40, 1, false, false),
            ([1, 4, 3, 9, 24], 8, 1, true, true),
            ([1, 3, 9, 5, 5], 7, 1, true, false),
            ([2, 1, 1, 1, 1], 32, 1, false, false),
            ([1, 11, 8, 5, 16], 40, 8, false, false),
            ([2, 3, 9, 10, 6], 5, 8, false, false),
            ([1, 2, 3, 3, 8], 8, 8, true, false),
        ] {
            let [n, d, h, w, c] = extent;
            let (fine, up) = (1 + usize::from(pooled), if phases == 8 { 2 } else { 1 });
            let map = [n, fine * d, fine * h, fine * w, c];
            let (x, add) = (small(&map, 1), small(&map, 40));
            let dy = small(&[n, up * d, up * h, up * w, outs], 77);
            let mut input = ConvInput::shared(&x).plus(added.then_some(&add));
            // The input as the convolution loads it.
            let mut loaded = x.data().to_vec();
            if added {
                loaded.iter_mut().zip(add.data()).for_each(|(v, a)| *v += a);
            }
            if pooled {
                input = input.max_pooled();
                let (h, w) = (2 * h, 2 * w);
                let largest = |at: usize| {
                    let (i, v) = (at % c, at / c);
                    let (plane, j, k) = (v / (h * w / 4), v / (w / 2) % (h / 2), v % (w / 2));
                    let value = |q: usize| {
                        let row = (2 * plane + (q >> 2)) * h + 2 * j + (q >> 1 & 1);
                        loaded[(row * w + 2 * k + (q & 1)) * c + i]
                    };
                    (0..8).map(value).fold(f32::NEG_INFINITY, f32::max)
                };
                loaded = (0..n * d * h * w / 4 * c).map(largest).collect();
            }
            let loaded = Tensor::new([n, d, h, w, c], loaded);
            let once = plain_gradient(&loaded, &dy, extent, phases);
            // Added to the gradient so far: twice the sum.
            let twice: Vec<f32> = once.iter().map(|v| 2.0 * v).collect();
            for cuda in &devices {
                let what = format!("{}, {extent:?}, {outs}", cuda.precision());
                let of = |so_far| weight_gradient(cuda, &input, extent, &dy, phases, so_far);
                let got = of(None).unwrap();
                assert!(got.try_data().unwrap()[..] == once[..], "{what}");
                assert!(of(Some(got)).unwrap().try_data().unwrap()[..] == twice[..], "{what}, on");
            }
        }
    }

    /// Large maps keep a GPU busy without more sums than needed; small ones are not cut up.
    #[test]
    fn blocks_of_a_weight_gradient_have_the_same_share() {
        let splits =
            |e, outs, phases| WeightBlocks::matrix(e, outs, phases, false, WEIGHT_BLOCKS).splits.0;
        assert_eq!(splits([1, 128, 128, 128, 32], 32, 1), 256);
        assert_eq!(splits([1, 64, 64, 64, 64], 64, 1), 64);
        assert_eq!(splits([1, 16, 16, 16, 32], 32, 1), 16);
        assert_eq!(splits([1, 8, 8, 8, 384], 384, 1), 1);
        assert_eq!(splits([1, 64, 64, 64, 64], 32, 8), 32);
    }
}
