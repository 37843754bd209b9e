//! Element types of device memory.

use std::fmt;

/// Element types of device memory, and of products on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        if self == DType::F32 { 4 } else { 2 }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        })
    }
}

/// How a device computes: the type in which a CUDA device keeps maps, and how it multiplies them.
/// On the CPU only the products differ. Sums are always in float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Precision {
    /// 32-bit floats. A CUDA device multiplies them on tensor cores, as the sum of three products
    /// of TF32: within 2^-21, and held to float32's bounds.
    #[default]
    F32,
    /// 32-bit floats, rounded to TF32 where they are multiplied, as PyTorch's tf32: CUDA devices.
    Tf32,
    /// 32-bit floats, multiplied as they are in plain arithmetic, as PyTorch's ieee.
    Ieee,
    /// IEEE half precision: CUDA devices.
    F16,
    /// bfloat16: CUDA devices, and processors with AVX512-BF16.
    Bf16,
}

impl Precision {
    /// The type of maps.
    pub fn maps(self) -> DType {
        match self {
            Precision::F32 | Precision::Tf32 | Precision::Ieee => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::Bf16,
        }
    }

    /// Whether the factors of products have fewer bits than float32.
    pub fn rounds(self) -> bool {
        !matches!(self, Precision::F32 | Precision::Ieee)
    }
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Precision {
        match dtype {
            DType::F32 => Precision::F32,
            DType::F16 => Precision::F16,
            DType::Bf16 => Precision::Bf16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Ieee => "ieee",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
        })
    }
}
