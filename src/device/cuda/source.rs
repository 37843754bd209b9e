//! The kernels' sources, as they are compiled for a GPU, and the table of kernels: what a launch of
//! each needs.
//!
//! Both are made by `build.rs` from `kernels/*.cu`, so that a kernel is declared in only one place.
//! Besides the table, the module `kernels` has a constant to launch each kernel by and a struct of
//! its parameters.

use super::args::{Argument, Arguments, Int, Long, Pointer};
use super::{CudaError, DType, Precision};
use std::marker::PhantomData;

/// A source file of kernels, or a header: its name, and its text.
pub type Source = (&'static str, &'static str);

/// The type of a kernel's parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// An address in device memory, null for none.
    Pointer,
    /// `int`, 32 bits.
    Int,
    /// `int64`, 64 bits.
    Long,
    /// `float`.
    Float,
    /// `double`.
    Double,
}

impl Parameter {
    /// The size of a parameter in bytes.
    fn bytes(self) -> u8 {
        if matches!(self, Parameter::Int | Parameter::Float) { 4 } else { 8 }
    }
}

/// A kernel as its source declares it.
#[derive(Debug, PartialEq)]
pub struct Kernel {
    /// The name by which it is launched.
    pub name: &'static str,
    /// The file that declares it, one of [`FILES`].
    pub file: &'static str,
    /// The most threads of a block; none if the source gives them by an expression that is neither
    /// a number nor a constant.
    pub threads: Option<usize>,
    /// The types of its parameters, in order.
    pub parameters: &'static [Parameter],
    /// Whether its products run on tensor cores. Its source says so: it calls a function that has
    /// the comment `// tensor cores` above it.
    pub tensor_cores: bool,
}

impl Kernel {
    /// An error unless its blocks may have `threads` threads.
    pub(super) fn check_threads(&self, threads: usize) -> Result<(), CudaError> {
        match self.threads {
            Some(most) if threads > most => Err(CudaError::Launch(format!(
                "kernel {} has blocks of at most {most} threads, got {threads}",
                self.name
            ))),
            _ => Ok(()),
        }
    }

    /// An error unless the built code has parameters of these sizes in bytes.
    pub(super) fn check_built(&self, built: &[u8]) -> Result<(), CudaError> {
        let declared: Vec<u8> = self.parameters.iter().map(|p| p.bytes()).collect();
        if declared == built {
            return Ok(());
        }
        let text = format!(
            "kernel {} was built with parameters of {built:?} bytes, its source has {declared:?}",
            self.name
        );
        Err(CudaError::Launch(text))
    }
}

/// A kernel, together with the type of its launch arguments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TypedKernel<A> {
    pub(super) kernel: &'static Kernel,
    // As a function's result, so that a kernel for arguments with a static lifetime serves any
    // lifetime.
    arguments: PhantomData<fn() -> A>,
}

/// A kernel for each of several types of elements, named `add_f32`, `add_f16` and so on, all with
/// the same parameters; for float32 also for the ways to multiply it on tensor cores, `tf32` and
/// `tf32x3`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family<A> {
    /// The common beginning of the names.
    base: &'static str,
    f32: Option<TypedKernel<A>>,
    f16: Option<TypedKernel<A>>,
    bf16: Option<TypedKernel<A>>,
    tf32: Option<TypedKernel<A>>,
    tf32x3: Option<TypedKernel<A>>,
}

impl<A> Family<A> {
    /// The kernel for a type of elements; an error if there is none.
    pub(crate) fn of(self, dtype: DType) -> Result<TypedKernel<A>, CudaError> {
        let kernel = match dtype {
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::Bf16 => self.bf16,
        };
        Self::there(self.base, kernel, &dtype.to_string())
    }

    /// The kernel that multiplies as `precision` says; an error if there is none.
    pub(crate) fn multiplying(self, precision: Precision) -> Result<TypedKernel<A>, CudaError> {
        match precision {
            Precision::F32 => Self::there(self.base, self.tf32x3, "tf32x3"),
            Precision::Tf32 => Self::there(self.base, self.tf32, "tf32"),
            plain => self.of(plain.maps()),
        }
    }

    /// The kernel called `base` with the given ending.
    fn there(
        base: &str,
        kernel: Option<TypedKernel<A>>,
        end: &str,
    ) -> Result<TypedKernel<A>, CudaError> {
        kernel.ok_or_else(|| {
            let name = format!("{base}_{end}");
            match known(&name) {
                Some(_) => CudaError::Launch(format!(
                    "kernel {name} has other parameters than those of other types of elements"
                )),
                None => unknown(&name),
            }
        })
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

fn known(name: &str) -> Option<&'static Kernel> {
    KERNELS.binary_search_by(|kernel| kernel.name.cmp(name)).ok().map(|at| KERNELS[at])
}

/// The kernel called `name`, for inspection.
///
/// # Errors
/// There is no kernel of that name; the message has the nearest names.
pub fn find(name: &str) -> Result<&'static Kernel, CudaError> {
    known(name).ok_or_else(|| unknown(name))
}

/// Whether the products of the kernel called `kernel` run on tensor cores; false if there is none
/// of that name.
pub fn is_matrix(kernel: &str) -> bool {
    known(kernel).is_some_and(|kernel| kernel.tensor_cores)
}

fn unknown(name: &str) -> CudaError {
    let mut near: Vec<(usize, &str)> =
        KERNELS.iter().map(|kernel| (distance(name, kernel.name), kernel.name)).collect();
    near.sort_unstable();
    let near: Vec<&str> = near.iter().take(3).map(|(_, name)| *name).collect();
    CudaError::Launch(format!("no kernel '{name}'; the nearest are {}", near.join(", ")))
}

/// The number of letters to insert, remove or change to turn one name into another.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, letter) in from.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, other) in to.iter().enumerate() {
            let changed = corner + usize::from(letter != *other);
            let least = changed.min(row[j] + 1).min(row[j + 1] + 1);
            corner = std::mem::replace(&mut row[j + 1], least);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::Parameter::{Double, Int, Long, Pointer};
    use super::*;

    #[test]
    fn every_kernel_is_found_by_its_whole_name() {
        assert!(
            KERNELS.is_sorted_by(|a, b| a.name < b.name),
            "a name twice, or names in another order than they are looked for in"
        );
        for kernel in KERNELS {
            assert_eq!(find(kernel.name).unwrap(), *kernel);
            let (_, text) = FILES.iter().find(|(file, _)| *file == kernel.file).unwrap();
            assert!(text.contains("KERNEL("), "{}", kernel.file);
            assert!(!kernel.parameters.is_empty() && !kernel.name.is_empty());
        }
        for (file, _) in FILES {
            assert!(KERNELS.iter().any(|kernel| kernel.file == *file), "{file} declares no kernel");
        }
        // Names that begin alike, or like no file's name.
        let file = |name: &str| find(name).unwrap().file;
        assert_eq!(
            ["norm_sums_f16", "layer_norm_sums_f16", "skip_border_kinds"].map(file),
            ["norm.cu", "norm.cu", "decoder_stage.cu"]
        );
    }

    #[test]
    fn kernels_are_what_their_sources_declare() {
        let step = Kernel {
            name: "adamw_step",
            file: "adamw.cu",
            threads: Some(256),
            parameters: &[
                Pointer, Pointer, Pointer, Double, Double, Double, Double, Double, Double, Double,
                Double, Double,
            ],
            tensor_cores: false,
        };
        assert_eq!(*find("adamw_step").unwrap(), step);
        // Parameters and threads by macros and constants of headers.
        let attention = find("two_way_attention_bf16").unwrap();
        let parameters = [Pointer, Pointer, Pointer, Pointer, Pointer, Int, Int, Int, Int];
        assert_eq!(
            (attention.threads, attention.parameters, attention.tensor_cores),
            (Some(128), &parameters[..], true)
        );
        let few = find("weight_gradient_few_27_f32").unwrap();
        assert_eq!((few.threads, few.parameters.len(), few.tensor_cores), (Some(256), 14, false));
        assert_eq!(find("pack_bits_f16").unwrap().parameters, [Pointer, Pointer, Long]);
        assert!(
            KERNELS.iter().all(|kernel| !kernel.tensor_cores || !kernel.name.ends_with("_f32")),
            "float32 is multiplied as it is where its kernel does not say otherwise"
        );
        assert!(
            is_matrix("conv3d_32_f16")
                && is_matrix("conv3d_16_tf32x3")
                && is_matrix("linear_tf32")
                && !is_matrix("conv3d_32_f32")
                && !is_matrix("linear_odd_f16")
                && !is_matrix("copy")
        );
    }

    #[test]
    fn constants_are_their_kernels() {
        let types = [DType::F32, DType::F16, DType::Bf16];
        let names = types.map(|dtype| kernels::ADD.of(dtype).unwrap().kernel.name);
        assert_eq!(
            (names, kernels::ADD.base, kernels::NORM_TOTALS.kernel.name),
            (["add_f32", "add_f16", "add_bf16"], "add", "norm_totals")
        );
        // A kernel that does not exist for all types.
        assert_eq!(
            kernels::CONVERT_F32.of(DType::Bf16).unwrap().kernel,
            kernels::CONVERT_F32_BF16.kernel
        );
        let missing = kernels::CONV3D_16.of(DType::F32).unwrap_err().to_string();
        assert!(
            missing.starts_with(
                "no kernel 'conv3d_16_f32'; the nearest are conv3d_16_tf32, conv3d_16_f16, "
            ),
            "{missing}"
        );
        // Ways to multiply.
        let ways = [Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16]
            .map(|precision| kernels::CONV3D_16.multiplying(precision).unwrap().kernel.name);
        assert_eq!(ways, ["conv3d_16_tf32x3", "conv3d_16_tf32", "conv3d_16_f16", "conv3d_16_bf16"]);
        assert_eq!(
            kernels::VIT_ATTENTION.multiplying(Precision::Ieee).unwrap().kernel.name,
            "vit_attention_f32"
        );
        assert!(kernels::CONV3D_PLAIN.multiplying(Precision::Tf32).is_err());
        // A kernel whose float32 version takes less.
        assert_eq!(kernels::LINEAR.of(DType::F16).unwrap().kernel.name, "linear_f16");
        assert_eq!(
            kernels::LINEAR.of(DType::F32).unwrap_err().to_string(),
            "kernel linear_f32 has other parameters than those of other types of elements"
        );
        assert_eq!(
            (
                kernels::LINEAR_F32.kernel.parameters.len(),
                kernels::LINEAR_F16.kernel.parameters.len()
            ),
            (9, 10)
        );
    }

    #[test]
    fn a_name_that_is_none_is_an_error_with_the_nearest() {
        let said = |name: &str| find(name).unwrap_err().to_string();
        assert_eq!(
            said("add_f64"),
            "no kernel 'add_f64'; the nearest are add_f16, add_f32, add_bf16"
        );
        assert!(said("norm_sum_f16").contains("the nearest are norm_sums_f16, "));
        // Not the first kernel with the same beginning.
        assert!(
            said("linear").starts_with("no kernel 'linear'; ")
                && said("").starts_with("no kernel ''; ")
        );
    }
}
