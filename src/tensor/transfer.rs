//! Transfers of values between the host and a device, and conversions between types of elements.

use crate::device::cuda::Memory;
use crate::device::{Cuda, CudaError, DType};
use crate::memory;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::sync::Arc;

/// How messages name the memory that weights take.
pub(crate) const WEIGHTS: &str = "the model's weights";
const VALUES: &str = "values from a device";

/// Host values as the bytes of `dtype` elements.
pub(crate) fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    let mut halves =
        memory::zeroed::<u16>(WEIGHTS, if dtype == DType::F32 { 0 } else { values.len() });
    match dtype {
        DType::F32 => return memory::copied(WEIGHTS, bytemuck::cast_slice(values)),
        DType::F16 => from_f32::<half::f16>(values, bytemuck::cast_slice_mut(&mut halves)),
        DType::Bf16 => from_f32::<half::bf16>(values, bytemuck::cast_slice_mut(&mut halves)),
    }
    memory::copied(WEIGHTS, bytemuck::cast_slice(&halves))
}

/// Values that a thread converts at a time.
const PIECE: usize = 1 << 16;

/// Values in 16 bits; converted by all threads if there are many.
fn from_f32<H: Send>(values: &[f32], halves: &mut [H])
where
    [H]: HalfFloatSliceExt,
{
    halves
        .par_chunks_mut(PIECE)
        .zip(values.par_chunks(PIECE))
        .for_each(|(to, from)| to.convert_from_f32_slice(from));
}

/// Host values as `dtype` at the beginning of a device's memory.
pub(crate) fn upload_to(
    cuda: &Cuda,
    memory: &Memory,
    values: &[f32],
    dtype: DType,
) -> Result<(), CudaError> {
    cuda.upload_written(memory, values.len() * dtype.bytes(), |to| match dtype {
        DType::F32 => to.copy_from_slice(bytemuck::cast_slice(values)),
        DType::F16 => from_f32::<half::f16>(values, bytemuck::cast_slice_mut(to)),
        DType::Bf16 => from_f32::<half::bf16>(values, bytemuck::cast_slice_mut(to)),
    })
}

/// Host values as `dtype` on a device.
pub(crate) fn upload(cuda: &Cuda, values: &[f32], dtype: DType) -> Result<Arc<Memory>, CudaError> {
    let memory = cuda.allocate(values.len(), dtype)?;
    upload_to(cuda, &memory, values, dtype)?;
    Ok(memory)
}

/// 16-bit values as floats; converted by all threads if there are many.
fn to_f32<H: Copy + Sync>(halves: &[H]) -> Vec<f32>
where
    [H]: HalfFloatSliceExt,
{
    let mut values = memory::zeroed::<f32>(VALUES, halves.len());
    values
        .par_chunks_mut(PIECE)
        .zip(halves.par_chunks(PIECE))
        .for_each(|(to, from)| from.convert_to_f32_slice(to));
    values
}

/// Device values on the host.
pub(super) fn download(memory: &Memory, dtype: DType, len: usize) -> Result<Vec<f32>, CudaError> {
    let cuda = memory.cuda();
    match dtype {
        DType::F32 => {
            let mut values = memory::zeroed::<f32>(VALUES, len);
            cuda.download(memory, &mut values).map(|()| values)
        }
        DType::F16 => {
            let mut values = memory::zeroed::<half::f16>(VALUES, len);
            cuda.download(memory, &mut values).map(|()| to_f32(&values))
        }
        DType::Bf16 => {
            let mut values = memory::zeroed::<half::bf16>(VALUES, len);
            cuda.download(memory, &mut values).map(|()| to_f32(&values))
        }
    }
}

/// Values on a device as another type, on that device.
pub(super) fn convert(
    cuda: &Cuda,
    memory: &Arc<Memory>,
    len: usize,
    from: DType,
    to: DType,
) -> Result<Arc<Memory>, CudaError> {
    use crate::device::cuda::{Launch, kernels};
    let out = cuda.allocate(len, to)?;
    let family = match from {
        DType::F32 => kernels::CONVERT_F32,
        DType::F16 => kernels::CONVERT_F16,
        DType::Bf16 => kernels::CONVERT_BF16,
    };
    cuda.launch(
        family.of(to)?,
        Launch::per_vector(from.bytes().min(to.bytes()), len, len)
            .with_cost(0, len * (from.bytes() + to.bytes())),
        kernels::ConvertF32Args { x: memory.into(), y: (&out).into(), count: len.into() },
    )?;
    Ok(out)
}
