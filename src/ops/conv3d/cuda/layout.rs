//! Weights in the order in which kernels read them, laid out on the device or on the host.

use super::OUT;
use crate::device::cuda::{Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::ops::conv3d::PackedConv;
use crate::ops::conv3d::weights::{Kernel, Packed};
use crate::tensor::{OpError, upload};
use std::sync::Arc;

/// Outputs of a block of `conv3d_lay_out`.
const LAID_OUT: usize = 16;

impl Packed {
    /// Lays out convolutions (one, or the phases of a stage) that have the same shape.
    ///
    /// Weights whose home is the device are laid out there, others on the host.
    pub fn new(cuda: &Cuda, convs: &[&PackedConv], dtype: DType) -> Result<Arc<Packed>, OpError> {
        let (first, outputs) = (convs[0], convs[0].out_channels());
        let kernel = Kernel::of(first.in_channels(), first.taps, cuda.products());
        let bias = match first.bias_on(cuda) {
            Some(bias) => bias.to_device(cuda, DType::F32)?,
            None if first.has_bias() => {
                first.fetch()?;
                cuda.upload(first.biases())?
            }
            None => {
                let zeros = cuda.allocate(outputs, DType::F32)?;
                cuda.clear(&zeros)?;
                zeros
            }
        };
        let weights = match Packed::laid_out_there(cuda, convs, kernel, dtype)? {
            Some(weights) => weights,
            None => Packed::laid_out_here(cuda, convs, kernel, dtype)?,
        };
        Ok(Arc::new(Packed { kernel, weights, bias, outputs }))
    }

    /// Lays out weights whose home is the device; none if they are not, or are not contiguous.
    fn laid_out_there(
        cuda: &Cuda,
        convs: &[&PackedConv],
        kernel: Kernel,
        dtype: DType,
    ) -> Result<Option<Arc<Memory>>, OpError> {
        let all: Option<Vec<_>> = convs.iter().map(|conv| conv.given_on(cuda)).collect();
        let Some(all) = all else { return Ok(None) };
        let (conv, given) = (convs[0], all[0]);
        let from = given.values.to_device(cuda, DType::F32)?;
        let phase = all.get(1).map_or(0, |next| next.start.saturating_sub(given.start));
        for (p, other) in all.iter().enumerate() {
            let same = Arc::ptr_eq(&from, &other.values.to_device(cuda, DType::F32)?)
                && (other.row, other.mirrored) == (given.row, given.mirrored);
            if !same || other.start != given.start + p * phase {
                return Ok(None);
            }
        }
        let single = kernel == Kernel::MmaOneChannel;
        let (dtype, lay_out) = match (kernel.on_matrices(), dtype) {
            (true, DType::F32) => (DType::F32, kernels::CONV3D_LAY_OUT_TF32),
            (true, dtype) => (dtype, kernels::CONV3D_LAY_OUT.of(dtype)?),
            (false, _) => (DType::F32, kernels::CONV3D_LAY_OUT_F32),
        };
        let (ins, outs, taps) = (conv.in_channels(), conv.out_channels(), conv.taps);
        let (chunk, wide) = (kernel.chunk(), outs.next_multiple_of(OUT));
        // The taps of a single channel are laid out as channels.
        let (channels, chunks, steps) =
            if single { (1, 1, chunk) } else { (chunk, ins.div_ceil(chunk), taps * chunk) };
        let to = cuda.allocate(convs.len() * chunks * steps * wide, dtype)?;
        let (lines, run) = if given.mirrored { (channels, LAID_OUT) } else { (LAID_OUT, channels) };
        let launch = Launch {
            grid: [wide / LAID_OUT, chunks, convs.len()],
            shared: lines * ((run * taps) | 1) * 4,
            ..Launch::per_element(0)
        }
        .with_cost(0, convs.len() * ins * outs * taps * 4 + to.bytes());
        cuda.launch(
            lay_out,
            launch,
            kernels::Conv3dLayOutArgs {
                from: from.at(given.start * 4),
                to: (&to).into(),
                phase: phase.into(),
                row: given.row.into(),
                ins: ins.into(),
                outs: outs.into(),
                taps: taps.into(),
                chunk: chunk.into(),
                mirrored: given.mirrored.into(),
                single: single.into(),
            },
        )?;
        Ok(Some(to))
    }

    /// Lays out weights on the host: the reference for the device's own layout.
    fn laid_out_here(
        cuda: &Cuda,
        convs: &[&PackedConv],
        kernel: Kernel,
        dtype: DType,
    ) -> Result<Arc<Memory>, OpError> {
        let (first, outputs) = (convs[0], convs[0].out_channels());
        convs.iter().try_for_each(|conv| conv.fetch())?;
        let (inputs, taps) = if kernel == Kernel::MmaOneChannel {
            (first.taps, 1)
        } else {
            (first.in_channels(), first.taps)
        };
        let (chunk, wide) = (kernel.chunk(), outputs.next_multiple_of(OUT));
        let chunks = inputs.div_ceil(chunk);
        let per_chunk = taps * chunk * wide;
        // Elements of a register, of the 16 bytes that a lane reads, and of a fragment along the
        // inputs.
        let each = 4 / dtype.bytes();
        let (piece, along) = (4 * each, 8 * each);
        // Taps along an axis.
        let edge = if taps == 27 { 3 } else { taps.ilog2() as usize / 3 + 1 };
        let raw: Vec<_> = convs.iter().map(|conv| conv.raw(cuda.cpu())).collect();
        let mut values = cuda.cpu().zeros(convs.len() * chunks * per_chunk);
        cuda.cpu().chunks_mut(&mut values, per_chunk, |unit, to| {
            let (phase, group) = (unit / chunks, unit % chunks);
            for (at, v) in to.iter_mut().enumerate() {
                let (i, o, tap) = match kernel {
                    // [tap along d][along w][chunk / along][along h][outs /
                    // 16][lane][tile][register][element]
                    Kernel::Mma(_) | Kernel::MmaOneChannel => {
                        let (element, lane) = (at % piece, at / piece % 32);
                        let block = at / piece / 32;
                        let (pair, step) = (block % (wide / 16), block / (wide / 16));
                        let (tile, register, low) =
                            (element / each / 2, element / each % 2, element % each);
                        let depth = chunk / along;
                        let (h, deep, side) =
                            (step % edge, step / edge % depth, step / edge / depth);
                        let (d, w) = (side / edge, side % edge);
                        (
                            deep * along + register * along / 2 + lane % 4 * each + low,
                            pair * 16 + tile * 8 + lane / 4,
                            (d * edge + h) * edge + w,
                        )
                    }
                    // [tap][chunk][outs]
                    Kernel::Simt | Kernel::SimtAnyChannels => {
                        (at / wide % chunk, at % wide, at / wide / chunk)
                    }
                };
                let i = group * chunk + i;
                if i < inputs && o < outputs {
                    *v = if kernel == Kernel::MmaOneChannel {
                        raw[phase].weight(o, 0, i)
                    } else {
                        raw[phase].weight(o, i, tap)
                    };
                }
            }
        });
        Ok(upload(cuda, &values, if kernel.on_matrices() { dtype } else { DType::F32 })?)
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::cuda::Arena;
    use crate::device::{Cpu, Precision};
    use crate::ops::conv3d::ConvInput;
    use crate::ops::conv3d::cuda::conv3d;
    use crate::ops::conv3d::grad;
    use crate::tensor::Tensor;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// Weights whose home is the device are laid out there, bit by bit as on the host: for every
    /// kernel, for a part of the inputs, and mirrored.
    #[test]
    fn weights_are_laid_out_on_the_device_as_on_the_host() {
        let noise = |shape: &[usize]| {
            let count: usize = shape.iter().product();
            Tensor::new(shape, (0..count).map(|i| (i * 7919 % 2039) as f32 / 997.0 - 1.0).collect())
        };
        for precision in [Precision::F32, Precision::Ieee, Precision::F16, Precision::Bf16] {
            let cuda = Cuda::emulated(Cpu::new(4).unwrap(), precision, 0);
            let dtype = cuda.precision();
            let resident = |t: &Tensor| {
                let memory = t.to_device(&cuda, DType::F32).unwrap();
                Tensor::from_device(t.shape(), memory, DType::F32)
            };
            for (outs, inputs, used) in [
                (35, 45, 2..42),
                (16, 17, 1..17),
                (32, 64, 0..64),
                (5, 9, 3..6),
                (20, 24, 4..24),
                (33, 2, 1..2),
                (1, 40, 0..8),
            ] {
                let (weight, bias) = (noise(&[outs, inputs, 3, 3, 3]), noise(&[outs]));
                let [here, there] =
                    [(weight.clone(), bias.clone()), (resident(&weight), resident(&bias))].map(
                        |(w, b)| {
                            let conv =
                                PackedConv::new(cuda.cpu(), &w, used.clone(), Some(&b)).unwrap();
                            let mirrored = grad::mirrored(cuda.cpu(), &conv);
                            [conv, mirrored]
                        },
                    );
                for (here, there) in here.iter().zip(&there) {
                    let before = cuda.transfers();
                    let there = Packed::new(&cuda, &[there], dtype).unwrap();
                    assert_eq!(cuda.transfers(), before, "it took the way over the host");
                    let here = Packed::new(&cuda, &[here], dtype).unwrap();
                    let bytes = |memory: &Arc<Memory>| {
                        let mut bytes = vec![0u8; memory.bytes()];
                        cuda.download(memory, &mut bytes).unwrap();
                        bytes
                    };
                    assert!(
                        bytes(&here.weights) == bytes(&there.weights)
                            && bytes(&here.bias) == bytes(&there.bias),
                        "{precision}, {outs} of {used:?}"
                    );
                }
            }
        }
    }

    /// After a training step, weights are on the device, where they are laid out by the thread that
    /// records, which holds the device's stream, and before its work is recorded.
    #[test]
    fn weights_that_lie_on_the_device_are_laid_out_within_a_recording() {
        let (done, finished) = channel();
        std::thread::spawn(move || {
            let cuda = Cuda::emulated(Cpu::new(4).unwrap(), DType::F32, 0);
            let noise = |shape: &[usize]| {
                let count: usize = shape.iter().product();
                Tensor::new(
                    shape,
                    (0..count).map(|i| (i * 7919 % 997) as f32 / 997.0 - 0.5).collect(),
                )
            };
            let (extent, x, weight) =
                ([1, 2, 2, 2, 32], noise(&[1, 2, 2, 2, 32]), noise(&[32, 32, 3, 3, 3]));
            let resident = Tensor::from_device(
                weight.shape(),
                weight.to_device(&cuda, DType::F32).unwrap(),
                DType::F32,
            );
            let [there, here] =
                [&resident, &weight].map(|w| PackedConv::new(cuda.cpu(), w, 0..32, None).unwrap());
            let run = |conv: &PackedConv| {
                conv3d(&cuda, &ConvInput::shared(&x), extent, conv, false).map(|y| y.map)
            };
            let (graph, recorded) = cuda.record(&mut Arena::default(), || run(&there)).unwrap();
            graph.replay().unwrap();
            let values = |y: &Tensor| y.try_data().unwrap().to_vec();
            done.send((values(&recorded), values(&run(&here).unwrap()))).unwrap();
        });
        let (recorded, expected) =
            finished.recv_timeout(Duration::from_secs(60)).expect("the recording ends");
        assert_eq!(recorded, expected);
    }
}
