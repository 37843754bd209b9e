//! Element types, and the precisions of devices.

use std::fmt;

/// The type of an element: of a CUDA device's memory, or of the factors of products on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floats (IEEE 754 binary32).
    F32,
    /// 16-bit floats (IEEE 754 binary16): 5 bits of exponent, 10 of mantissa.
    F16,
    /// bfloat16: 8 bits of exponent, as float32, and 7 of mantissa.
    Bf16,
}

impl DType {
    /// The size of an element in bytes: 4 or 2.
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
    /// The type in which a CUDA device keeps maps.
    pub fn maps(self) -> DType {
        match self {
            Precision::F32 | Precision::Tf32 | Precision::Ieee => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::Bf16,
        }
    }

    /// Whether factors are rounded to fewer bits than float32 has before they are multiplied.
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
