//! Ops on single values on CUDA devices.

use crate::device::cuda::{Launch, kernels};
use crate::device::{Cuda, DType};
use crate::memory;
use crate::ops::norm::ChannelNorm;
use crate::ops::reduce::Columns;
use crate::tensor::{OpError, Tensor};

/// Functions of one value; the numbers are the kernel's.
#[derive(Clone, Copy)]
pub enum Function {
    Gelu = 0,
    Sigmoid = 1,
}

pub fn function(cuda: &Cuda, x: &Tensor, which: Function) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::FUNCTION.of(dtype)?,
        Launch::per_vector(dtype.bytes(), x.len(), x.len())
            .with_cost(8 * x.len(), 2 * x.len() * dtype.bytes()),
        kernels::FunctionArgs {
            x: (&values).into(),
            y: (&out).into(),
            count: x.len().into(),
            which: (which as i32).into(),
        },
    )?;
    Ok(Tensor::from_device(x.shape(), out, dtype))
}

/// Gradients of functions; the numbers are the kernel's.
#[derive(Clone, Copy)]
pub enum Slope {
    /// From its input.
    Gelu = 0,
    /// From its value.
    Sigmoid = 1,
    /// From its value.
    Relu = 2,
}

pub fn slope(cuda: &Cuda, x: &Tensor, dy: &Tensor, which: Slope) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values, gradient) =
        (cuda.allocate(x.len(), dtype)?, x.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::SLOPE.of(dtype)?,
        Launch::per_vector(dtype.bytes(), x.len(), x.len())
            .with_cost(8 * x.len(), 3 * x.len() * dtype.bytes()),
        kernels::SlopeArgs {
            x: (&values).into(),
            dy: (&gradient).into(),
            dx: (&out).into(),
            count: x.len().into(),
            which: (which as i32).into(),
        },
    )?;
    Ok(Tensor::from_device(dy.shape(), out, dtype))
}

/// `a b` of maps of one size.
pub fn times(cuda: &Cuda, a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, a_on, b_on) =
        (cuda.allocate(a.len(), dtype)?, a.to_device(cuda, dtype)?, b.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::TIMES.of(dtype)?,
        Launch::per_vector(dtype.bytes(), a.len(), a.len())
            .with_cost(a.len(), 3 * a.len() * dtype.bytes()),
        kernels::TimesArgs {
            a: (&a_on).into(),
            b: (&b_on).into(),
            y: (&out).into(),
            count: a.len().into(),
        },
    )?;
    Ok(Tensor::from_device(a.shape(), out, dtype))
}

pub fn add(cuda: &Cuda, a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, a_on, b_on) =
        (cuda.allocate(a.len(), dtype)?, a.to_device(cuda, dtype)?, b.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::ADD.of(dtype)?,
        Launch::per_vector(dtype.bytes(), a.len(), b.len())
            .with_cost(a.len(), (2 * a.len() + b.len()) * dtype.bytes()),
        kernels::AddArgs {
            a: (&a_on).into(),
            b: (&b_on).into(),
            y: (&out).into(),
            count: a.len().into(),
            period: b.len().into(),
        },
    )?;
    Ok(Tensor::from_device(a.shape(), out, dtype))
}

/// Adds a map to `sum`, of float32, in place.
pub fn accumulate(cuda: &Cuda, sum: &Tensor, part: &Tensor) -> Result<Tensor, OpError> {
    let (dtype, n) = (cuda.precision(), sum.len());
    let (to, from) = (sum.to_device(cuda, DType::F32)?, part.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::ACCUMULATE.of(dtype)?,
        Launch::per_vector(dtype.bytes(), n, n).with_cost(n, n * (8 + dtype.bytes())),
        kernels::AccumulateArgs { sum: (&to).into(), part: (&from).into(), count: n.into() },
    )?;
    Ok(Tensor::from_device(sum.shape(), to, DType::F32))
}

/// One bit per value on the host, set if it is positive, the first in the highest bit of a byte;
/// for a multiple of eight values.
pub fn pack_bits(cuda: &Cuda, x: &Tensor) -> Result<Vec<u8>, OpError> {
    let (dtype, bytes) = (cuda.precision(), x.len() / 8);
    let (out, values) = (cuda.allocate_bytes(bytes)?, x.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::PACK_BITS.of(dtype)?,
        Launch::per_element(bytes).with_cost(0, bytes * (1 + 8 * dtype.bytes())),
        kernels::PackBitsArgs { x: (&values).into(), bits: (&out).into(), bytes: bytes.into() },
    )?;
    let mut bits = memory::zeroed::<u8>("a mask", bytes);
    cuda.download(&out, &mut bits)?;
    Ok(bits)
}

pub fn multiply_add(cuda: &Cuda, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let out = cuda.allocate(a.len(), dtype)?;
    let [a_on, b_on, c_on] =
        [a.to_device(cuda, dtype)?, b.to_device(cuda, dtype)?, c.to_device(cuda, dtype)?];
    cuda.launch(
        kernels::MULTIPLY_ADD.of(dtype)?,
        Launch::per_vector(dtype.bytes(), a.len(), a.len())
            .with_cost(2 * a.len(), 4 * a.len() * dtype.bytes()),
        kernels::MultiplyAddArgs {
            a: (&a_on).into(),
            b: (&b_on).into(),
            c: (&c_on).into(),
            y: (&out).into(),
            count: a.len().into(),
        },
    )?;
    Ok(Tensor::from_device(a.shape(), out, dtype))
}

/// The most maps of one launch.
const MAPS: usize = 4;

fn few_maps(weights: &Tensor, m: usize) -> Result<(), OpError> {
    match m <= MAPS {
        true => Ok(()),
        false => Err(weights.shape_error(
            "mask_logits",
            "weights",
            format!("at most {MAPS} maps on a CUDA device"),
        )),
    }
}

pub fn mask_logits(
    cuda: &Cuda,
    x: &Tensor,
    [d, h, w, c]: [usize; 4],
    norm: &ChannelNorm,
    add: Option<&Tensor>,
    weights: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, m, voxels) = (cuda.precision(), weights.len() / c, d * h * w);
    few_maps(weights, m)?;
    let out = cuda.allocate(m * voxels, dtype)?;
    let (values, channels) =
        (x.to_device(cuda, dtype)?, norm.coefficients().to_device(cuda, DType::F32)?);
    let add = add.map(|a| a.to_device(cuda, dtype)).transpose()?;
    let (weights, bias) =
        (weights.to_device(cuda, dtype)?, bias.map(|b| b.to_device(cuda, dtype)).transpose()?);
    let launch = Launch { shared: (m + 3) * c * 4, ..Launch::per_element(voxels) }.with_cost(
        2 * voxels * c * m,
        voxels * (c * (1 + usize::from(add.is_some())) + m) * dtype.bytes(),
    );
    cuda.launch(
        kernels::MASK_LOGITS.of(dtype)?,
        launch,
        kernels::MaskLogitsArgs {
            x: (&values).into(),
            norm: (&channels).into(),
            add: (&add).into(),
            weights: (&weights).into(),
            bias: (&bias).into(),
            y: (&out).into(),
            voxels: voxels.into(),
            c: c.into(),
            m: m.into(),
            slope: norm.slope(),
        },
    )?;
    Ok(Tensor::from_device([m, d, h, w], out, dtype))
}

/// [`grad::mask_logits`](super::grad::mask_logits) on a device.
pub fn mask_logits_gradient(
    cuda: &Cuda,
    x: &Tensor,
    norm: &ChannelNorm,
    add: Option<&Tensor>,
    weights: &Tensor,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    let (dtype, c, voxels) = (cuda.precision(), x.channels(), x.rows());
    let m = weights.len() / c;
    few_maps(weights, m)?;
    let (values, gradient, weights) =
        (x.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?, weights.to_device(cuda, dtype)?);
    let (channels, add) = (
        norm.coefficients().to_device(cuda, DType::F32)?,
        add.map(|a| a.to_device(cuda, dtype)).transpose()?,
    );
    let out = cuda.allocate(x.len(), dtype)?;
    // Vectors are within a voxel.
    let launch = Launch::per_vector(dtype.bytes(), x.len(), c)
        .with_cost(2 * x.len() * m, (x.len() + m * voxels) * dtype.bytes());
    cuda.launch(
        kernels::MASK_LOGITS_GRADIENT.of(dtype)?,
        launch,
        kernels::MaskLogitsGradientArgs {
            weights: (&weights).into(),
            dy: (&gradient).into(),
            dx: (&out).into(),
            voxels: voxels.into(),
            c: c.into(),
            m: m.into(),
        },
    )?;
    let columns = Columns::new(cuda, 1, [voxels, c], [MAPS, 1]);
    let [sums, _] = columns.sums(cuda, m * (c + 1), |partial, [first, _]| {
        Ok(cuda.launch(
            kernels::MASK_LOGITS_SUMS.of(dtype)?,
            columns.launch().with_cost(2 * x.len() * m, (x.len() + m * voxels) * dtype.bytes()),
            kernels::MaskLogitsSumsArgs {
                x: (&values).into(),
                norm: (&channels).into(),
                add: (&add).into(),
                dy: (&gradient).into(),
                partial: partial.into(),
                first: first.into(),
                voxels: voxels.into(),
                c: c.into(),
                m: m.into(),
                run: columns.run.into(),
                lanes: columns.lanes.into(),
                slope: norm.slope(),
            },
        )?)
    })?;
    // A few numbers, each map's weights followed by its bias.
    let sums = sums.to_device(cuda, DType::F32)?;
    let [weights, biases] = [cuda.allocate(m * c, DType::F32)?, cuda.allocate(m, DType::F32)?];
    for map in 0..m {
        let row = map * (c + 1) * 4;
        cuda.copy(&sums, row, &weights, map * c * 4, c * 4)?;
        cuda.copy(&sums, row + c * 4, &biases, map * 4, 4)?;
    }
    Ok((
        Tensor::from_device(x.shape(), out, dtype),
        Tensor::from_device([m * c], weights, DType::F32),
        Tensor::from_device([m], biases, DType::F32),
    ))
}
