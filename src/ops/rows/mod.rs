//! Rows of matrices: extracting and concatenating them. Values that are on a device stay there.

use crate::device::cuda::{Launch, Memory, Pointer, kernels};
use crate::device::{Cuda, CudaError, DType, Device};
use crate::memory;
use crate::tensor::{GRADIENT, OpError, Tensor, extent};
use std::sync::Arc;

/// The most bytes that kernels load at once.
const VECTOR: usize = 16;
/// The most matrices that one launch stacks.
const JOINED: usize = 4;

/// A copy of rows `from..from + count` of `x` `[t, c]`: `[count, c]`.
pub fn narrow(device: &Device, x: &Tensor, from: usize, count: usize) -> Result<Tensor, OpError> {
    let (c, end) = (x.channels(), from.saturating_add(count));
    if end.checked_mul(c).is_none_or(|values| values > x.len()) {
        return Err(x.shape_error("rows", "x", format!("at least {end} rows")));
    }
    if let (Device::Cuda(cuda), Some(dtype)) = (device, x.device_type()) {
        let (out, values) = (cuda.allocate(count * c, dtype)?, x.to_device(cuda, dtype)?);
        let row = c * dtype.bytes();
        cuda.copy(&values, from * row, &out, 0, count * row)?;
        return Ok(Tensor::from_device([count, c], out, dtype));
    }
    let mut out = device.cpu().alloc(count * c);
    out.copy_from_slice(&x.try_data()?[from * c..(from + count) * c]);
    Ok(Tensor::from_buffer([count, c], out))
}

/// Rows `from..from + count` of `x` `[t, c]`, without a copy where possible: on a CUDA device, if
/// the rows begin at a multiple of 16 bytes. Otherwise as [`narrow`].
///
/// Rows without a copy share the memory of `x`: neither may be written to.
pub fn view(device: &Device, x: &Tensor, from: usize, count: usize) -> Result<Tensor, OpError> {
    let (c, end) = (x.channels(), from.saturating_add(count));
    if let (Device::Cuda(cuda), Some(dtype)) = (device, x.device_type())
        && end.checked_mul(c).is_some_and(|values| values <= x.len())
    {
        let row = c * dtype.bytes();
        if (from * row).is_multiple_of(VECTOR) {
            let values = x.to_device(cuda, dtype)?;
            return Ok(Tensor::from_device(
                [count, c],
                values.part(from * row, count * row),
                dtype,
            ));
        }
    }
    narrow(device, x, from, count)
}

/// Concatenates matrices `[t, c]` with the same number of columns along their rows.
pub fn concat(device: &Device, parts: &[&Tensor]) -> Result<Tensor, OpError> {
    let c = parts.first().map_or(1, |p| p.channels());
    if let Some(other) = parts.iter().find(|p| p.channels() != c) {
        return Err(other.shape_error("concat", "a part", format!("[t, {c}], as the first")));
    }
    let rows: usize = parts.iter().map(|p| p.rows()).sum();
    let types: Vec<_> = parts.iter().map(|p| p.device_type()).collect();
    if let (Device::Cuda(cuda), Some(&Some(dtype))) = (device, types.first())
        && types.iter().all(|t| *t == Some(dtype))
    {
        let (out, mut at) = (cuda.allocate(rows * c, dtype)?, 0);
        if (2..=JOINED).contains(&parts.len()) && parts.iter().all(|p| p.len() == parts[0].len()) {
            concat_equal(cuda, parts, &out, dtype)?;
            return Ok(Tensor::from_device([rows, c], out, dtype));
        }
        for part in parts {
            let bytes = part.len() * dtype.bytes();
            cuda.copy(&*part.to_device(cuda, dtype)?, 0, &out, at, bytes)?;
            at += bytes;
        }
        return Ok(Tensor::from_device([rows, c], out, dtype));
    }
    let values = parts.iter().map(|p| p.try_data()).collect::<Result<Vec<_>, _>>()?;
    let mut all: Vec<f32> = memory::list("rows of a matrix", rows * c);
    values.iter().for_each(|part| all.extend_from_slice(part));
    Ok(Tensor::new([rows, c], all))
}

/// Concatenates a few matrices of the same size along their rows, by one launch.
fn concat_equal(
    cuda: &Cuda,
    parts: &[&Tensor],
    out: &Arc<Memory>,
    dtype: DType,
) -> Result<(), OpError> {
    let each = parts[0].len();
    let memory: Vec<Arc<Memory>> =
        parts.iter().map(|part| part.to_device(cuda, dtype)).collect::<Result<_, CudaError>>()?;
    let part = |i: usize| memory.get(i).map_or(Pointer::none(), Pointer::from);
    let launch = Launch { grid: [each.div_ceil(256), parts.len(), 1], ..Launch::per_element(each) }
        .with_cost(0, 2 * parts.len() * each * dtype.bytes());
    cuda.launch(
        kernels::JOIN_ROWS.of(dtype)?,
        launch,
        kernels::JoinRowsArgs {
            a: part(0),
            b: part(1),
            c: part(2),
            d: part(3),
            y: out.into(),
            each: each.into(),
        },
    )?;
    Ok(())
}

/// The gradient of `x` of [`narrow`]: a matrix of `shape`, whose rows from `from` on are `dy` and
/// all others zero.
pub fn narrow_gradient(
    device: &Device,
    dy: &Tensor,
    shape: &[usize],
    from: usize,
) -> Result<Tensor, OpError> {
    let (c, len) = (dy.channels(), extent(shape).unwrap_or(0));
    if from.checked_mul(c).and_then(|at| at.checked_add(dy.len())).is_none_or(|end| end > len) {
        return Err(dy.shape_error(
            "rows gradient",
            "dy",
            format!("at most {} rows", (len / c.max(1)).saturating_sub(from)),
        ));
    }
    if let (Device::Cuda(cuda), Some(dtype)) = (device, dy.device_type()) {
        let (out, values) = (cuda.allocate(len, dtype)?, dy.to_device(cuda, dtype)?);
        cuda.clear(&out)?;
        cuda.copy(&values, 0, &out, from * c * dtype.bytes(), dy.len() * dtype.bytes())?;
        return Ok(Tensor::from_device(shape, out, dtype));
    }
    let mut out: Vec<f32> = memory::zeroed(GRADIENT, len);
    out[from * c..][..dy.len()].copy_from_slice(dy.try_data()?);
    Ok(Tensor::new(shape, out))
}

/// The row of `x` `[t, c]` whose number is in a CUDA device's memory, as an `int`: `[1, c]`.
///
/// # Errors
/// `device` is the CPU, or fails. The number is not checked, except by the emulator.
pub fn gather_row(device: &Device, x: &Tensor, row: &Arc<Memory>) -> Result<Tensor, OpError> {
    let Device::Cuda(cuda) = device else {
        return Err(OpError::Argument {
            op: "gather_row",
            message: "only a CUDA device has rows numbered in its memory".into(),
        });
    };
    let (c, dtype) = (x.channels(), cuda.precision());
    let (out, values) = (cuda.allocate(c, dtype)?, x.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::GATHER_ROW.of(dtype)?,
        Launch::per_element(c).with_cost(0, 2 * c * dtype.bytes()),
        kernels::GatherRowArgs {
            x: (&values).into(),
            row: row.into(),
            y: (&out).into(),
            c: c.into(),
        },
    )?;
    Ok(Tensor::from_device([1, c], out, dtype))
}

/// Rows of parameters, each added to one of `base` `[t, c]`: row `r` is `base[r]` plus row
/// `rows[r].1` of `rows[r].0`, which are on the device in float32.
pub(crate) fn embed(
    cuda: &Cuda,
    base: &Tensor,
    rows: &[(&Tensor, usize)],
) -> Result<Tensor, OpError> {
    let (c, dtype) = (base.channels(), cuda.precision());
    base.expect_shape("embed", "base", &[rows.len(), c])?;
    let (mut held, mut table) = (vec![], vec![]);
    for (parameter, row) in rows {
        let values = parameter.to_device(cuda, DType::F32)?;
        table.push(values.address() + row_offset(parameter, *row, c)?);
        held.push(values);
    }
    let (table, values) = (cuda.upload(&table)?, base.to_device(cuda, DType::F32)?);
    let out = cuda.allocate(base.len(), dtype)?;
    let launch = Launch { grid: [rows.len(), 1, 1], threads: 128, ..Launch::per_element(0) }
        .with_cost(base.len(), base.len() * (8 + dtype.bytes()));
    cuda.launch(
        kernels::EMBED.of(dtype)?,
        launch,
        kernels::EmbedArgs {
            table: (&table).into(),
            base: (&values).into(),
            y: (&out).into(),
            c: c.into(),
        },
    )?;
    Ok(Tensor::from_device(base.shape(), out, dtype))
}

/// The gradient of [`embed`] for each of `parameters`, where `rows[r].0` is the number of row `r`'s
/// parameter: sums of the rows of `dy` `[t, c]`, in their order.
pub(crate) fn embed_gradient(
    cuda: &Cuda,
    dy: &Tensor,
    parameters: &[&Tensor],
    rows: &[(usize, usize)],
) -> Result<Vec<Tensor>, OpError> {
    let (c, dtype) = (dy.channels(), cuda.precision());
    dy.expect_shape("embed gradient", "dy", &[rows.len(), c])?;
    let mut gradients = vec![];
    for parameter in parameters {
        let memory = cuda.allocate(parameter.len(), DType::F32)?;
        cuda.clear(&memory)?;
        gradients.push(memory);
    }
    // Every row of a parameter that is used, once; and which of them each row of `dy` belongs to.
    let mut places: Vec<(usize, usize)> = vec![];
    let mut numbers = vec![];
    for row in rows {
        let known = places.iter().position(|place| place == row);
        numbers.push(known.unwrap_or(places.len()) as u64);
        if known.is_none() {
            places.push(*row);
        }
    }
    let mut table = vec![];
    for (parameter, row) in &places {
        let at = row_offset(parameters[*parameter], *row, c)?;
        table.push(gradients[*parameter].address() + at);
    }
    table.extend(numbers);
    let (table, values) = (cuda.upload(&table)?, dy.to_device(cuda, dtype)?);
    let launch = Launch { grid: [places.len(), 1, 1], threads: 128, ..Launch::per_element(0) }
        .with_cost(dy.len(), dy.len() * dtype.bytes() + places.len() * c * 4);
    cuda.launch(
        kernels::EMBED_GRADIENT.of(dtype)?,
        launch,
        kernels::EmbedGradientArgs {
            dy: (&values).into(),
            table: (&table).into(),
            rows: rows.len().into(),
            c: c.into(),
        },
    )?;
    let tensor = |(memory, parameter): (Arc<Memory>, &&Tensor)| {
        Tensor::from_device(parameter.shape(), memory, DType::F32)
    };
    Ok(gradients.into_iter().zip(parameters).map(tensor).collect())
}

/// The offset in bytes of a row of `c` floats from a parameter's first.
fn row_offset(parameter: &Tensor, row: usize, c: usize) -> Result<u64, OpError> {
    match row.checked_add(1).and_then(|rows| rows.checked_mul(c)) {
        Some(values) if values <= parameter.len() => Ok((row * c * 4) as u64),
        _ => Err(parameter.shape_error(
            "embed",
            "parameter",
            format!("at least {} rows of {c}", row.saturating_add(1)),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;

    #[test]
    fn rows_beyond_the_last_are_an_error() {
        let device = Device::Cpu(Cpu::new(1).unwrap());
        let x = Tensor::new([3, 4], (0..12).map(|v| v as f32).collect());
        assert_eq!(narrow(&device, &x, 1, 2).unwrap().data(), &x.data()[4..]);
        // Beyond the end, also if sums and products of the numbers would wrap to ones that fit.
        for (from, count) in [(2, 2), (usize::MAX, 2), (2, usize::MAX), (1 << 62, 1), (0, 1 << 62)]
        {
            assert!(
                matches!(narrow(&device, &x, from, count), Err(OpError::Shape { op: "rows", .. })),
                "{from}, {count}"
            );
        }
        let dy = Tensor::new([1, 4], vec![1.0; 4]);
        assert_eq!(
            narrow_gradient(&device, &dy, &[3, 4], 2).unwrap().data()[7..],
            [0.0, 1.0, 1.0, 1.0, 1.0]
        );
        for from in [3, 100, usize::MAX, 1 << 62] {
            assert!(
                matches!(
                    narrow_gradient(&device, &dy, &[3, 4], from),
                    Err(OpError::Shape { op: "rows gradient", .. })
                ),
                "{from}"
            );
        }
    }
}
