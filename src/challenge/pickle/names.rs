//! The functions and classes that a pickle may name.

/// A function or class that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Global {
    Reconstruct,
    Scalar,
    NdArray,
    DType,
    Encode,
}

impl Global {
    /// The name of a function or class in pickles.
    pub fn name(self) -> &'static str {
        match self {
            Global::Reconstruct => "_reconstruct",
            Global::Scalar => "scalar",
            Global::NdArray => "ndarray",
            Global::DType => "dtype",
            Global::Encode => "encode",
        }
    }
}

/// The function or class with that name, if it is one of the few.
pub fn global(module: &str, name: &str) -> Result<Global, String> {
    Ok(match (module, name) {
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Global::Reconstruct,
        ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Global::Scalar,
        ("numpy", "ndarray") => Global::NdArray,
        ("numpy", "dtype") => Global::DType,
        ("_codecs", "encode") => Global::Encode,
        _ => {
            return Err(format!(
                "its pickle names {module}.{name}, expected no more than NumPy's arrays, element types and numbers"
            ));
        }
    })
}
