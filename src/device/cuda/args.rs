//! Arguments of launches: the types in the structs that `build.rs` makes of the kernels'
//! parameters, and how a launch reads them.

use std::marker::PhantomData;

/// What a kernel is launched with: a struct with one field per parameter. Made by `build.rs` alone,
/// because a launch relies on it to match the kernel's parameters.
pub(crate) trait Arguments {
    /// The parameters' names in order, each with its bits, or the reason why a launch on `device`
    /// cannot use it.
    fn bits(&self, device: u64) -> Vec<(&'static str, Result<u64, String>)>;
}

/// The types of the fields of [`Arguments`].
pub(super) trait Argument {
    /// The bits of the parameter, or the reason why a launch on `device` cannot use it
    /// ([`Arguments::bits`]). A parameter of 32 bits is in the lower half.
    fn bits(&self, device: u64) -> Result<u64, String>;
}

/// Memory, or none. It is borrowed: it must live until the launch, and the device frees in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pointer<'a> {
    /// 0 for none.
    at: u64,
    device: u64,
    memory: PhantomData<&'a ()>,
}

impl<'a> Pointer<'a> {
    /// No memory.
    pub(crate) fn none() -> Pointer<'static> {
        Pointer { at: 0, device: 0, memory: PhantomData }
    }

    /// Memory at an address of a device, valid as long as `_owner` is.
    pub(super) fn new<T>(_owner: &'a T, at: u64, device: u64) -> Pointer<'a> {
        Pointer { at, device, memory: PhantomData }
    }
}

impl Argument for Pointer<'_> {
    fn bits(&self, device: u64) -> Result<u64, String> {
        match self.at == 0 || self.device == device {
            true => Ok(self.at),
            false => Err("memory of another device".into()),
        }
    }
}

/// An `int64`, or a count that is too large for one: a launch with that fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Long(Result<i64, usize>);

impl From<usize> for Long {
    fn from(count: usize) -> Long {
        Long(i64::try_from(count).map_err(|_| count))
    }
}

impl Argument for Long {
    fn bits(&self, _device: u64) -> Result<u64, String> {
        self.0.map(|v| v as u64).map_err(too_much)
    }
}

/// An `int`, or a count that is too large for one: a launch with that fails. Kernels index maps by
/// 64 bits and axes by 32; resampling, patches and norms number the values of one item's map by 32,
/// too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Int(Result<i32, usize>);

impl From<usize> for Int {
    fn from(count: usize) -> Int {
        Int(i32::try_from(count).map_err(|_| count))
    }
}

impl From<i32> for Int {
    fn from(v: i32) -> Int {
        Int(Ok(v))
    }
}

impl From<bool> for Int {
    fn from(v: bool) -> Int {
        Int(Ok(v.into()))
    }
}

impl Argument for Int {
    fn bits(&self, _device: u64) -> Result<u64, String> {
        self.0.map(|v| v as u32 as u64).map_err(too_much)
    }
}

fn too_much(count: usize) -> String {
    format!("{count} is more than it holds")
}

impl Argument for f32 {
    fn bits(&self, _device: u64) -> Result<u64, String> {
        Ok(self.to_bits().into())
    }
}

impl Argument for f64 {
    fn bits(&self, _device: u64) -> Result<u64, String> {
        Ok(self.to_bits())
    }
}
