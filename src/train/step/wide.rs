//! Sums of a map's gradients over the iterations of an item, wider than the maps of 16 bits.

use crate::autograd::add_to;
use crate::device::{DType, Device};
use crate::ops::pointwise::accumulate;
use crate::ops::reduce::{add_values, check_so_far};
use crate::tensor::{OpError, Tensor};

/// Adds `part` to a sum of a map's gradients.
///
/// Where a device has maps of 16 bits, the sum is in float32 from the second part on: a part that
/// is small beside it would be lost. [`as_map`] gives what is read of it in the end.
pub(super) fn add_wide(
    device: &Device,
    sum: &mut Option<Tensor>,
    part: Tensor,
) -> Result<(), OpError> {
    let cuda = match device {
        Device::Cuda(cuda) if cuda.precision() != DType::F32 => cuda,
        _ => return add_to(device, sum, part),
    };
    *sum = Some(match sum.take() {
        None => part,
        // It stays on the host: what the device has of it is a copy that others may read.
        Some(mut first) if first.device_type().is_none() => {
            check_so_far("add_wide", Some(&first), part.len())?;
            add_values(device.cpu(), first.make_mut(), part.try_data()?);
            first
        }
        Some(first) if first.device_type() == Some(cuda.precision()) => {
            let values = first.to_device(cuda, DType::F32)?;
            accumulate(cuda, Tensor::from_device(first.shape(), values, DType::F32), &part)?
        }
        Some(wide) => accumulate(cuda, wide, &part)?,
    });
    Ok(())
}

/// A sum of [`add_wide`] in the type of the device's maps, rounded once.
pub(super) fn as_map(device: &Device, sum: Tensor) -> Result<Tensor, OpError> {
    match device {
        Device::Cuda(cuda) if cuda.precision() != DType::F32 && sum.is_f32_on(cuda) => {
            let dtype = cuda.precision();
            Ok(Tensor::from_device(sum.shape(), sum.to_device(cuda, dtype)?, dtype))
        }
        _ => Ok(sum),
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::{Cpu, Cuda};

    /// Parts that in 16 bits would each be lost beside the first are in the sum, one value a thread
    /// or eight; the first keeps its values, and nothing takes the way over the host.
    #[test]
    fn small_parts_are_not_lost_beside_a_large_one() {
        for (dtype, large) in [(DType::F16, 2048.0), (DType::Bf16, 256.0)] {
            let cuda = Cuda::emulated(Cpu::new(2).unwrap(), dtype, 0);
            let device = Device::Cuda(cuda.clone());
            for count in [9, 16] {
                let filled = |value: f32| {
                    let values = Tensor::from(vec![value; count]).to_device(&cuda, dtype).unwrap();
                    Tensor::from_device([count], values, dtype)
                };
                let (first, small, mut sum) = (filled(large), filled(1.0), None);
                let before = cuda.transfers();
                add_wide(&device, &mut sum, first.clone()).unwrap();
                assert_eq!(sum.as_ref().unwrap().device_type(), Some(dtype));
                (0..10).for_each(|_| add_wide(&device, &mut sum, small.clone()).unwrap());
                let sum = sum.unwrap();
                assert_eq!(sum.device_type(), Some(DType::F32));
                let map = as_map(&device, sum).unwrap();
                assert_eq!(map.device_type(), Some(dtype));
                assert_eq!(cuda.transfers(), before, "{dtype}: it took the way over the host");
                assert_eq!(map.data(), vec![large + 10.0; count], "{dtype}");
                assert_eq!(first.data(), vec![large; count], "{dtype}");
            }
        }
    }

    /// A first part whose home is the host stays there. If others have it, it and its copy on the
    /// device keep their values; small parts are not lost beside it.
    #[test]
    fn a_part_on_the_host_and_its_copy_keep_their_values() {
        let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
        let device = Device::Cuda(cuda.clone());
        let (first, mut sum) = (Tensor::from(vec![2048.0; 9]), Some(Tensor::from(vec![2048.0; 9])));
        let copy = first.to_device(&cuda, DType::F32).unwrap();
        let mut shared = Some(first.clone());
        for sum in [&mut sum, &mut shared] {
            for _ in 0..10 {
                let part = Tensor::from(vec![1.0; 9]).to_device(&cuda, DType::F16).unwrap();
                add_wide(&device, sum, Tensor::from_device([9], part, DType::F16)).unwrap();
            }
            assert_eq!(sum.as_ref().unwrap().data(), [2058.0; 9]);
        }
        assert_eq!(first.data(), [2048.0; 9]);
        assert_eq!(Tensor::from_device([9], copy, DType::F32).data(), [2048.0; 9]);
    }
}
