//! Reading reference files: safetensors with their metadata.

use super::VerifyError;
use crate::input::{MOST_HEADER, room_for_header};
use crate::memory;
use crate::tensor::Tensor;
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A reference file, read into memory: the tensors and the metadata of a safetensors file.
pub struct Archive {
    path: PathBuf,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

/// A tensor of an [`Archive`], with its values as float64.
#[derive(Clone, PartialEq)]
pub struct Entry {
    /// The length of each axis.
    pub shape: Vec<usize>,
    /// The values in row-major order, whatever type they have in the file.
    pub values: Vec<f64>,
}

impl Entry {
    /// The values rounded to float32, as a tensor.
    pub fn tensor(&self) -> Tensor {
        Tensor::new(self.shape.clone(), self.values.iter().map(|v| *v as f32).collect())
    }

    /// The values as integers, truncated towards 0.
    pub fn integers(&self) -> Vec<i64> {
        self.values.iter().map(|v| *v as i64).collect()
    }
}

/// The name of a file of tensors in refusals of memory.
const ARCHIVE: &str = "a file of reference tensors";

/// Values of N bytes each, widened. Unwinds to [`memory::caught`] if memory for them is refused.
fn wide<const N: usize>(data: &[u8], of: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    let value = |b: &[u8]| of(std::array::from_fn(|i| b[i]));
    memory::collected(ARCHIVE, data.chunks_exact(N).map(value))
}

impl Archive {
    /// Reads a safetensors file. Unwinds to [`memory::caught`] if memory for it is refused.
    ///
    /// # Errors
    /// It cannot be read, is no safetensors file, or has a tensor of a type other than F64, F32,
    /// F16, BF16, I64, I32, I8, U8 and BOOL.
    pub fn open(path: &Path) -> Result<Archive, VerifyError> {
        crate::input::remember(path);
        let fail = |e: &dyn std::fmt::Display| VerifyError::new(path, e.to_string());
        let bytes = memory::read_file(ARCHIVE, path).map_err(|e| fail(&e))?;
        room_for_header(ARCHIVE, &bytes, MOST_HEADER)
            .map_err(|e| fail(&e))?
            .map_err(|e| fail(&e))?;
        let bad = |e: safetensors::SafeTensorError| {
            VerifyError::new(path, format!("not a readable safetensors file: {e}"))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(bad)?;
        let file = SafeTensors::deserialize(&bytes).map_err(bad)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            let d = view.data();
            let values: Vec<f64> = match view.dtype() {
                Dtype::F64 => wide(d, f64::from_le_bytes),
                Dtype::F32 => wide(d, |b| f64::from(f32::from_le_bytes(b))),
                Dtype::F16 => wide(d, |b| half::f16::from_le_bytes(b).to_f64()),
                Dtype::BF16 => wide(d, |b| half::bf16::from_le_bytes(b).to_f64()),
                Dtype::I64 => wide(d, |b| i64::from_le_bytes(b) as f64),
                Dtype::I32 => wide(d, |b| f64::from(i32::from_le_bytes(b))),
                Dtype::I8 => wide(d, |b| f64::from(i8::from_le_bytes(b))),
                Dtype::U8 | Dtype::BOOL => wide(d, |b: [u8; 1]| f64::from(b[0])),
                other => {
                    return Err(VerifyError::new(
                        path,
                        format!("tensor {name} has element type {other:?}"),
                    ));
                }
            };
            tensors.insert(name.to_string(), Entry { shape: view.shape().to_vec(), values });
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Archive { path: path.into(), metadata, tensors })
    }

    /// An error with `message` about this file.
    pub fn error(&self, message: impl Into<String>) -> VerifyError {
        VerifyError::new(&self.path, message.into())
    }

    /// The metadata value `key`.
    ///
    /// # Errors
    /// The file has no such metadata.
    pub fn text(&self, key: &str) -> Result<&str, VerifyError> {
        self.metadata
            .get(key)
            .map(String::as_str)
            .ok_or_else(|| self.error(format!("metadata '{key}' is missing")))
    }

    /// The metadata value `key`, if there is one.
    pub fn maybe_text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The metadata value `key` as a number.
    ///
    /// # Errors
    /// The file has no such metadata, or it is not a number.
    pub fn number(&self, key: &str) -> Result<f64, VerifyError> {
        let text = self.text(key)?;
        text.parse()
            .map_err(|_| self.error(format!("metadata '{key}' is '{text}', expected a number")))
    }

    /// The metadata value `key` as JSON; null if there is none.
    ///
    /// # Errors
    /// It is not JSON.
    pub fn json(&self, key: &str) -> Result<Value, VerifyError> {
        let Some(text) = self.metadata.get(key) else { return Ok(Value::Null) };
        serde_json::from_str(text)
            .map_err(|e| self.error(format!("metadata '{key}' is not JSON: {e}")))
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// The file has no such tensor.
    pub fn get(&self, name: &str) -> Result<&Entry, VerifyError> {
        self.tensors.get(name).ok_or_else(|| self.error(format!("tensor '{name}' is missing")))
    }

    /// The tensor `name`, if there is one.
    pub fn maybe(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}
