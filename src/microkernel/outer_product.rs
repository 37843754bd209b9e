//! The innermost loop of the weight gradient: sums of outer products of input and output-gradient
//! voxels.
//!
//! The mirror image of a strip: where a strip keeps 13 voxels by 32 output channels in registers
//! and runs over input channels, this keeps 13 input channels by 32 output channels and runs over
//! the voxels of a tile, so that the same 26 accumulators hide the latency of the multiply-add.

use crate::device::Isa;
use crate::device::simd::{Simd, dispatch, table};

/// What an outer product reads and writes. Strides are in floats.
pub struct Outer {
    /// The first voxel's first input channel, the tap's offset included.
    pub x: *const f32,
    /// From a voxel, a row and a plane of the input to the next.
    pub x_stride: [usize; 3],
    /// Output gradients `[plane][row][voxel][output channels of a block]`, without gaps.
    pub dy: *const f32,
    /// Planes, rows and voxels of a row.
    pub size: [usize; 3],
    /// Where the sums are added: `[input channel][output channels of a block]`.
    pub grad: *mut f32,
}

/// A compiled loop for a fixed number of input channels.
///
/// # Safety
/// The processor has the instruction set that [`kernels`] chose it for, as an [`Isa`] says.
/// Whatever the fields of [`Outer`] span can be read, and nothing else touches what `grad` spans.
pub type Kernel = unsafe fn(&Outer);

/// The loop over `V` input channels, with `R` registers of output channels.
///
/// # Safety
/// As [`Kernel`], the instruction set being that of `S`.
#[inline(always)]
unsafe fn outer<S: Simd, const V: usize, const R: usize>(g: &Outer) {
    // SAFETY: guaranteed by the caller: the processor has the instructions, and every address lies
    // in what the fields span: `size` voxels, of `V` channels in, of `R` registers out.
    unsafe {
        let mut sums = [[S::zero(); R]; V];
        let mut dy = g.dy;
        for i in 0..g.size[0] {
            for j in 0..g.size[1] {
                let mut x = g.x.add(i * g.x_stride[2] + j * g.x_stride[1]);
                for _ in 0..g.size[2] {
                    let mut value = [S::zero(); R];
                    for (r, value) in value.iter_mut().enumerate() {
                        *value = S::load(dy.add(r * S::LANES));
                    }
                    for (v, sums) in sums.iter_mut().enumerate() {
                        let x = S::splat(x.add(v));
                        for (r, sum) in sums.iter_mut().enumerate() {
                            *sum = S::fma(x, value[r], *sum);
                        }
                    }
                    x = x.add(g.x_stride[0]);
                    dy = dy.add(R * S::LANES);
                }
            }
        }
        for (v, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                let at = g.grad.add((v * R + r) * S::LANES);
                S::store(at, S::add(S::load(at), *sum));
            }
        }
    }
}

/// The loops for an instruction set and a layer of `outputs`; entry `v` takes `v + 1` input
/// channels. Output blocks are those of the strips.
pub fn kernels(isa: Isa, outputs: usize) -> &'static [Kernel] {
    dispatch! { isa, S: Values, {
        /// # Safety
        /// As [`Kernel`].
        unsafe fn one<const V: usize, const R: usize>(g: &Outer) {
            // SAFETY: guaranteed by the caller.
            unsafe { outer::<S, V, R>(g) }
        }
    } =>
    if outputs <= S::LANES {
        table!(Kernel, S::NARROW.strip, V => one::<V, { S::NARROW.registers }>)
    } else {
        table!(Kernel, S::WIDE.strip, V => one::<V, { S::WIDE.registers }>)
    } }
}
