//! Arguments of launches.

use super::Memory;
use super::source::Parameter;
use std::marker::PhantomData;
use std::sync::Arc;

/// An argument of a kernel, as wide as its parameter. What is in memory is borrowed: it lives until
/// it was launched, and the device frees in order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg<'a> {
    /// Memory, or none.
    Pointer(Address<'a>),
    /// `int64`.
    Long(i64),
    /// `int`.
    Int(i32),
    /// `float`.
    Float(f32),
    /// `double`.
    Double(f64),
    /// A count that its parameter cannot hold: there is no launch with it.
    Beyond(usize),
}

/// Where memory lies; made of memory alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address<'a> {
    /// 0 for none.
    at: u64,
    device: u64,
    memory: PhantomData<&'a Memory>,
}

impl<'a> Arg<'a> {
    /// A count or an extent, for an `int` parameter. Kernels index maps by 64 bits and axes by 32.
    pub(crate) fn int(v: usize) -> Arg<'a> {
        i32::try_from(v).map_or(Arg::Beyond(v), Arg::Int)
    }

    /// A count of values, for an `int64` parameter.
    pub(crate) fn long(v: usize) -> Arg<'a> {
        i64::try_from(v).map_or(Arg::Beyond(v), Arg::Long)
    }

    /// No memory.
    pub(crate) fn none() -> Arg<'a> {
        Arg::Pointer(Address { at: 0, device: 0, memory: PhantomData })
    }

    /// Memory, or none.
    pub(crate) fn maybe(memory: &'a Option<Arc<Memory>>) -> Arg<'a> {
        memory.as_ref().map_or(Arg::none(), Arg::from)
    }

    /// Memory from a byte on.
    ///
    /// # Panics
    /// Beyond its end.
    pub(crate) fn at(memory: &'a Arc<Memory>, byte: usize) -> Arg<'a> {
        assert!(byte <= memory.bytes, "byte {byte} of a buffer of {}", memory.bytes);
        Arg::Pointer(Address {
            at: memory.address + byte as u64,
            device: memory.cuda.id(),
            memory: PhantomData,
        })
    }

    /// What it is and its bits, or why a launch on `device` cannot have it.
    pub(super) fn bits(self, device: u64) -> Result<(Parameter, u64), String> {
        Ok(match self {
            Arg::Pointer(Address { at, device: own, .. }) if at == 0 || own == device => {
                (Parameter::Pointer, at)
            }
            Arg::Pointer(_) => return Err("memory of another device".into()),
            Arg::Long(v) => (Parameter::Long, v as u64),
            Arg::Int(v) => (Parameter::Int, v as u32 as u64),
            Arg::Float(v) => (Parameter::Float, v.to_bits() as u64),
            Arg::Double(v) => (Parameter::Double, v.to_bits()),
            Arg::Beyond(v) => return Err(format!("{v} is more than it holds")),
        })
    }
}

impl<'a> From<&'a Arc<Memory>> for Arg<'a> {
    fn from(memory: &'a Arc<Memory>) -> Arg<'a> {
        Arg::at(memory, 0)
    }
}
