//! Dense float tensors: a shape and shared, immutable storage.
//!
//! A [`Tensor`] is a handle: cloning or reshaping it copies no values. It can be sent to and shared
//! between threads.
//!
//! Values are on the host or on a CUDA device. Either side can be asked for: what is not there yet
//! is copied, once, and kept with the values. So an op without a body for a device still runs, on
//! the host, and nothing is copied unless it is read.
//!
//! Every tensor is contiguous, the last axis fastest. Feature maps are channels last, `[n, d, h, w,
//! c]`: items of a batch, depth, height, width, channels. PyTorch's order `[n, c, d, h, w]` occurs
//! only where its data come in or go out ([`Tensor::to_channels_last`],
//! [`Tensor::to_channels_first`]).
//!
//! ```
//! use prism::tensor::Tensor;
//!
//! let matrix = Tensor::new([2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
//! let other = matrix.reshape([3, 2]); // shares the values
//! assert_eq!((other.shape(), other.rows(), other.channels()), (&[3, 2][..], 3, 2));
//! assert_eq!(other.data(), matrix.data());
//! ```

pub(crate) mod stored;
mod transfer;

use crate::device::cuda::{DeviceCache, Memory};
use crate::device::{Buffer, Cpu, Cuda, CudaError, DType, Isa};
pub use crate::memory::extent;
use crate::memory::{self, Refused};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, OnceLock};
use stored::Stored;
pub(crate) use transfer::{WEIGHTS, to_bytes, upload, upload_to};
use transfer::{convert, download};

/// What messages call the memory of a gradient.
pub(crate) const GRADIENT: &str = "a gradient";

/// Why an op, or work that consists of ops, failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OpError {
    /// An argument has a shape that the op cannot take, or that does not fit the other arguments.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// Which of its arguments.
        what: &'static str,
        /// The argument's shape.
        got: Vec<usize>,
        /// The shape that was expected, as text, with the shapes that it depends on.
        expected: String,
    },
    /// An argument other than a shape is out of range, or not supported.
    #[error("{op}: {message}")]
    Argument {
        /// The op that refused.
        op: &'static str,
        /// What it got and what it expected.
        message: String,
    },
    /// A CUDA device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// There is not enough memory on the host: see [`crate::memory`].
    #[error(transparent)]
    Memory(#[from] Refused),
    /// A file that weights are read from cannot be read, or has changed since the model was
    /// loaded; the text names it.
    #[error("{0}")]
    File(String),
    /// The [`Observer`](crate::model::Observer) asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// Runs work, and returns as an error what unwinds from inside its ops: that memory was refused, or
/// that a file with weights cannot be read.
///
/// Ops allocate in places that cannot return an error; a refusal unwinds from there to here. Other
/// panics continue. See [`crate::memory`].
///
/// # Errors
/// Those that `work` returns; [`OpError::Memory`] or [`OpError::File`] for what unwinds.
pub fn caught<T>(work: impl FnOnce() -> Result<T, OpError>) -> Result<T, OpError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        match payload.downcast::<OpError>() {
            Ok(e) => Err(*e),
            Err(payload) => {
                Err(memory::of_panic(payload).unwrap_or_else(|other| resume_unwind(other)).into())
            }
        }
    })
}

/// Where a tensor's values are.
enum Storage {
    Owned(Buffer),
    Plain(Vec<f32>),
    /// Values in a file, and in memory once they were asked to stay there.
    Stored(Stored, OnceLock<Vec<f32>>),
    /// Device memory, and its host copy once it was asked for.
    Device {
        memory: Arc<Memory>,
        dtype: DType,
        host: OnceLock<Vec<f32>>,
        /// Whether copies of other types are worth keeping.
        persistent: bool,
    },
}

/// Values, and their copies on devices.
struct Cell {
    storage: Storage,
    copies: DeviceCache<Memory>,
    /// The values in the layout of a processor's kernels.
    layout: OnceLock<(Layout, Buffer)>,
}

/// The kernels that a layout is for: an instruction set, with products in bfloat16 or not.
pub(crate) type Layout = (Isa, bool);

impl Cell {
    fn new(storage: Storage) -> Arc<Cell> {
        Arc::new(Cell { storage, copies: DeviceCache::default(), layout: OnceLock::new() })
    }
}

/// A contiguous tensor of `f32` values in row-major order; clones share the values.
///
/// The values of a tensor on a CUDA device may be of another [`DType`]; read on the host, they are
/// always `f32`.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    cell: Arc<Cell>,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor{:?}", self.shape)
    }
}

impl Tensor {
    /// A tensor over values in row-major order.
    ///
    /// # Panics
    /// If the number of values is not the shape's product.
    pub fn new(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Tensor {
        let shape = shape.into();
        assert_eq!(extent(&shape), Some(values.len()), "values do not fill shape {shape:?}");
        Tensor { shape, cell: Cell::new(Storage::Plain(values)) }
    }

    /// A tensor over a buffer of a [`Cpu`], in row-major order; the buffer is not copied.
    ///
    /// # Panics
    /// As [`Tensor::new`].
    pub fn from_buffer(shape: impl Into<Vec<usize>>, values: Buffer) -> Tensor {
        let shape = shape.into();
        assert_eq!(extent(&shape), Some(values.len()), "values do not fill shape {shape:?}");
        Tensor { shape, cell: Cell::new(Storage::Owned(values)) }
    }

    /// A tensor over floats that stay in a file; none if their number is not the shape's.
    pub(crate) fn from_stored(shape: impl Into<Vec<usize>>, stored: Stored) -> Option<Tensor> {
        let shape = shape.into();
        (extent(&shape)? == stored.count())
            .then(|| Tensor { shape, cell: Cell::new(Storage::Stored(stored, OnceLock::new())) })
    }

    /// Bytes of its values that are charged nowhere: those of a plain list.
    pub(crate) fn uncharged(&self) -> usize {
        match &self.cell.storage {
            Storage::Plain(values) => size_of_val(&values[..]),
            _ => 0,
        }
    }

    /// This tensor with its values in memory; if they stay in a file, they are read, and kept as
    /// long as the result lives.
    ///
    /// # Errors
    /// The file cannot be read, or has changed.
    pub(crate) fn at_hand(&self, cpu: &Cpu) -> Result<Tensor, OpError> {
        match &self.cell.storage {
            Storage::Stored(stored, kept) if kept.get().is_none() => {
                let mut values = cpu.alloc(stored.count());
                stored.read(Some(cpu), &mut values).map_err(OpError::File)?;
                Ok(Tensor::from_buffer(self.shape.clone(), values))
            }
            _ => Ok(self.clone()),
        }
    }

    /// A tensor over the memory of a CUDA device, which has elements of type `dtype`.
    ///
    /// # Panics
    /// If the size of the memory is not that of the shape's values.
    pub fn from_device(shape: impl Into<Vec<usize>>, memory: Arc<Memory>, dtype: DType) -> Tensor {
        let shape = shape.into();
        assert_eq!(
            extent(&shape).and_then(|n| n.checked_mul(dtype.bytes())),
            Some(memory.bytes()),
            "memory does not fill shape {shape:?}"
        );
        Tensor {
            shape,
            cell: Cell::new(Storage::Device {
                memory,
                dtype,
                host: OnceLock::new(),
                persistent: false,
            }),
        }
    }

    /// A parameter over device memory of floats: it is read many times, so its conversions to other
    /// types are kept with it.
    ///
    /// # Panics
    /// As [`Tensor::new`].
    pub(crate) fn persistent(shape: impl Into<Vec<usize>>, memory: Arc<Memory>) -> Tensor {
        let shape = shape.into();
        assert_eq!(
            extent(&shape).and_then(|n| n.checked_mul(4)),
            Some(memory.bytes()),
            "memory does not fill shape {shape:?}"
        );
        Tensor {
            shape,
            cell: Cell::new(Storage::Device {
                memory,
                dtype: DType::F32,
                host: OnceLock::new(),
                persistent: true,
            }),
        }
    }

    /// The values as `dtype` on a CUDA device.
    ///
    /// Values that are there already, in this type, are returned as they are. Values from elsewhere
    /// are copied, and the copy is kept with the tensor for the next call. Values that are there in
    /// another type are converted; the result is kept only for parameters of a network.
    ///
    /// # Errors
    /// The device is out of memory, or a copy or launch fails.
    ///
    /// # Panics
    /// If the values are in a file that cannot be read: see [`caught`].
    pub fn to_device(&self, cuda: &Cuda, dtype: DType) -> Result<Arc<Memory>, CudaError> {
        if let Storage::Device { memory, dtype: own, .. } = &self.cell.storage
            && (*own, memory.cuda().id()) == (dtype, cuda.id())
        {
            return Ok(memory.clone());
        }
        match &self.cell.storage {
            Storage::Device { memory, persistent: true, .. } if memory.cuda().id() == cuda.id() => {
                self.cell
                    .copies
                    .get(cuda, dtype, || convert(cuda, memory, self.len(), DType::F32, dtype))
            }
            Storage::Device { memory, dtype: own, .. } if memory.cuda().id() == cuda.id() => {
                match (own, dtype) {
                    (DType::F32, _) | (_, DType::F32) => {
                        convert(cuda, memory, self.len(), *own, dtype)
                    }
                    // The two half types are converted through float32.
                    _ => convert(
                        cuda,
                        &convert(cuda, memory, self.len(), *own, DType::F32)?,
                        self.len(),
                        DType::F32,
                        dtype,
                    ),
                }
            }
            _ => self.cell.copies.get(cuda, dtype, || {
                let values =
                    self.at_hand(cuda.cpu()).unwrap_or_else(|e| resume_unwind(Box::new(e)));
                upload(cuda, values.try_data()?, dtype)
            }),
        }
    }

    /// A device's copy of values whose home is the host, kept with them for
    /// [`Tensor::to_device`]: made by `make`, unless there is one.
    pub(crate) fn kept_on(
        &self,
        cuda: &Cuda,
        dtype: DType,
        make: impl FnOnce() -> Result<Arc<Memory>, CudaError>,
    ) -> Result<Arc<Memory>, CudaError> {
        debug_assert!(self.device_type().is_none(), "their home is a device");
        self.cell.copies.get(cuda, dtype, make)
    }

    /// The type of the values if their home is a CUDA device, none if it is the host.
    pub fn device_type(&self) -> Option<DType> {
        match &self.cell.storage {
            Storage::Device { dtype, .. } => Some(*dtype),
            _ => None,
        }
    }

    /// Whether the home of the values is a CUDA device, as float32.
    pub(crate) fn is_f32_on(&self, cuda: &Cuda) -> bool {
        matches!(&self.cell.storage, Storage::Device { memory, dtype: DType::F32, .. }
            if memory.cuda().id() == cuda.id())
    }

    /// The CUDA device that is the home of the values, none if it is the host.
    pub fn cuda(&self) -> Option<Cuda> {
        match &self.cell.storage {
            Storage::Device { memory, .. } => Some(memory.cuda().clone()),
            _ => None,
        }
    }

    /// The [`Buffer`] that the tensor is made of, to be used again.
    ///
    /// # Errors
    /// The tensor itself, if others share its values, or if they are not in a [`Buffer`].
    pub fn into_buffer(self) -> Result<Buffer, Tensor> {
        match Arc::try_unwrap(self.cell) {
            Ok(Cell { storage: Storage::Owned(buffer), .. }) => Ok(buffer),
            Ok(cell) => Err(Tensor { shape: self.shape, cell: Arc::new(cell) }),
            Err(cell) => Err(Tensor { shape: self.shape, cell }),
        }
    }

    /// This tensor's values in memory where they can stay for long: not among the memory that ops
    /// allocate and free.
    pub(crate) fn into_persistent(self, cpu: &Cpu) -> Tensor {
        match &self.cell.storage {
            Storage::Owned(buffer) if !buffer.is_alone() => {
                Tensor::from_buffer(self.shape.clone(), cpu.persistent_copy(buffer))
            }
            _ => self,
        }
    }

    /// The values laid out for a processor's kernels: made by `make`, once, and kept with them.
    /// None if another layout is kept already.
    pub(crate) fn packed(&self, layout: Layout, make: impl FnOnce() -> Buffer) -> Option<&Buffer> {
        let (kept, values) = self.cell.layout.get_or_init(|| (layout, make()));
        (*kept == layout).then_some(values)
    }

    /// Whether this tensor is the only owner of its values.
    pub fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.cell).is_some()
    }

    /// The values to write to, if this tensor is their only owner and they are on the host; copies
    /// on devices are dropped.
    pub fn get_mut(&mut self) -> Option<&mut [f32]> {
        let cell = Arc::get_mut(&mut self.cell)?;
        cell.copies.clear();
        cell.layout = OnceLock::new();
        match &mut cell.storage {
            Storage::Owned(b) => Some(b),
            Storage::Plain(v) => Some(v),
            Storage::Stored(..) | Storage::Device { .. } => None,
        }
    }

    /// The values to write to, on the host; shared values, and those of a device, are copied first.
    pub(crate) fn make_mut(&mut self) -> &mut [f32] {
        if self.get_mut().is_none() {
            *self = Tensor::new(self.shape(), self.data().to_vec());
        }
        self.get_mut().expect("just made its own")
    }

    /// The length of each axis; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of values: the product of the shape.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no values, because some axis has length 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The length of the last axis, which holds the channels of a map; 1 for a scalar.
    pub fn channels(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The product of all axes but the last: the number of rows if the tensor is read as a matrix
    /// with [`Tensor::channels`] columns.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The values in row-major order, for a tensor that is known to be on the host or to have been
    /// read before.
    ///
    /// # Panics
    /// If they have to be copied back from a device or read from a file, and that fails: see
    /// [`Tensor::try_data`].
    pub fn data(&self) -> &[f32] {
        self.try_data().unwrap_or_else(|failure| {
            panic!("values {:?} cannot be read back from the device: {failure}", self.shape)
        })
    }

    /// The values in row-major order.
    ///
    /// Values on a device are waited for, copied back and kept on the host, so that the next call
    /// costs nothing. Values that stay in a file are read, and kept as well.
    ///
    /// # Errors
    /// The device fails. The next call tries again.
    ///
    /// # Panics
    /// If the values are in a file that cannot be read: see [`caught`].
    pub fn try_data(&self) -> Result<&[f32], CudaError> {
        let values: &[f32] = match &self.cell.storage {
            Storage::Owned(b) => b,
            Storage::Plain(v) => v,
            Storage::Stored(stored, kept) => kept.get_or_init(|| {
                let mut values = memory::zeroed(WEIGHTS, stored.count());
                stored
                    .read(None, &mut values)
                    .unwrap_or_else(|e| resume_unwind(Box::new(OpError::File(e))));
                values
            }),
            Storage::Device { memory, dtype, host, .. } => match host.get() {
                Some(values) => values,
                None => {
                    // Copied outside the lock: a copy waits for the device's stream, and the thread
                    // that holds it may be waiting for these values.
                    let values = download(memory, *dtype, self.len())?;
                    host.get_or_init(|| values)
                }
            },
        };
        Ok(values)
    }

    /// Whether values whose home is a device were copied to the host: where they change on the
    /// device, that copy is out of date.
    pub(crate) fn was_read(&self) -> bool {
        matches!(&self.cell.storage, Storage::Device { host, .. } if host.get().is_some())
    }

    /// A tensor that shares these values under another shape; nothing is copied.
    ///
    /// # Panics
    /// If the number of values differs.
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Tensor {
        let shape = shape.into();
        assert_eq!(extent(&shape), Some(self.len()), "{:?} cannot become {shape:?}", self.shape);
        Tensor { shape, cell: self.cell.clone() }
    }

    /// The lengths of the five axes of a map `[n, d, h, w, c]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] for argument `what` of `op`, if there are not five axes.
    pub fn map5(&self, op: &'static str, what: &'static str) -> Result<[usize; 5], OpError> {
        <[usize; 5]>::try_from(&self.shape[..])
            .map_err(|_| self.shape_error(op, what, "[n, d, h, w, c]"))
    }

    /// An [`OpError::Shape`] about this tensor, which is argument `what` of `op`.
    pub fn shape_error(
        &self,
        op: &'static str,
        what: &'static str,
        expected: impl Into<String>,
    ) -> OpError {
        OpError::Shape { op, what, got: self.shape.clone(), expected: expected.into() }
    }

    /// Checks that the shape is `expected`.
    ///
    /// # Errors
    /// [`OpError::Shape`] for argument `what` of `op`, if it is not.
    pub fn expect_shape(
        &self,
        op: &'static str,
        what: &'static str,
        expected: &[usize],
    ) -> Result<(), OpError> {
        if self.shape == expected {
            Ok(())
        } else {
            Err(self.shape_error(op, what, format!("{expected:?}")))
        }
    }

    /// A copy with the channels moved last: `[n, c, rest...]` to `[n, rest..., c]`.
    ///
    /// # Panics
    /// If there are fewer than two axes, or as [`Tensor::data`].
    pub fn to_channels_last(&self, cpu: &Cpu) -> Tensor {
        let (n, c) = (self.shape[0], self.shape[1]);
        let mut shape = vec![n];
        shape.extend(&self.shape[2..]);
        shape.push(c);
        self.swap(cpu, shape, c)
    }

    /// A copy with the channels moved to the second axis: `[n, rest..., c]` to `[n, c, rest...]`.
    ///
    /// # Panics
    /// If there are fewer than two axes, or as [`Tensor::data`].
    pub fn to_channels_first(&self, cpu: &Cpu) -> Tensor {
        let (n, c) = (self.shape[0], self.channels());
        let mut shape = vec![n, c];
        shape.extend(&self.shape[1..self.shape.len() - 1]);
        let voxels = self.len().checked_div(n * c).unwrap_or(0);
        self.swap(cpu, shape, voxels)
    }

    /// Transposes each item's matrix of `rows` rows.
    fn swap(&self, cpu: &Cpu, shape: Vec<usize>, rows: usize) -> Tensor {
        let items = shape[0].max(1);
        let columns = self.len().checked_div(items * rows).unwrap_or(0);
        let (mut out, from) = (cpu.alloc(self.len()), self.data());
        cpu.chunks_mut(&mut out, rows * 1024, |chunk, part| {
            for (k, row) in part.chunks_mut(rows.max(1)).enumerate() {
                let (item, column) = ((chunk * 1024 + k) / columns, (chunk * 1024 + k) % columns);
                for (r, v) in row.iter_mut().enumerate() {
                    *v = from[(item * rows + r) * columns + column];
                }
            }
        });
        Tensor::from_buffer(shape, out)
    }
}

impl From<Vec<f32>> for Tensor {
    /// A tensor of one axis.
    fn from(values: Vec<f32>) -> Tensor {
        Tensor::new([values.len()], values)
    }
}

/// A parameter of a network: its values, and its place in the network's list of parameters.
///
/// It dereferences to the [`Tensor`] of its values. [Gradients](crate::autograd::ParamGrads) are
/// found by the place.
#[derive(Clone, Debug)]
pub struct Param {
    value: Tensor,
    id: Option<usize>,
}

impl Param {
    /// A parameter that is trained, number `id` in the list of parameters (from 0).
    pub fn new(value: Tensor, id: usize) -> Param {
        Param { value, id: Some(id) }
    }

    /// A parameter that is not trained: no gradient is computed for it.
    pub fn fixed(value: Tensor) -> Param {
        Param { value, id: None }
    }

    /// The place in the list of parameters; none if the parameter is not trained.
    pub fn id(&self) -> Option<usize> {
        self.id
    }
}

impl std::ops::Deref for Param {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shared_until_one_writes_to_them() {
        let mut one = Tensor::new([2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let other = one.reshape([3, 2]);
        assert!(std::ptr::eq(one.data(), other.data()));
        assert!(!one.is_unique() && one.get_mut().is_none());
        one.make_mut()[0] = 7.0;
        assert_eq!((one.data()[0], other.data()[0]), (7.0, 0.0));
        assert!(one.get_mut().is_some_and(|values| values.len() == 6));
        assert_eq!((other.shape(), other.rows(), other.channels()), (&[3, 2][..], 3, 2));
        let said = other.expect_shape("test", "other", &[2, 3]).unwrap_err().to_string();
        assert_eq!(said, "test: other has shape [3, 2], expected [2, 3]");
    }
}
