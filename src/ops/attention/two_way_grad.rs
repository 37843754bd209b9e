//! Gradients of plain softmax attention, head by head; the scores are computed again.

use super::contract::{Head, ValidKeys};
use super::flash::QUERIES;
use crate::device::simd::{self, multiversion};
use crate::device::{Cpu, Device, DisjointWriter};
use crate::ops::linear::{Matrix, matmul};
use crate::tensor::{OpError, Tensor};

multiversion! {
    /// Softmax of rows of `keys` scores, then `dp` becomes the gradient of the scores, given each
    /// row's `dO·O`.
    pub(super) fn score_gradients(scores: &mut [f32], dp: &mut [f32], keys: usize) {
        for (p, dp) in scores.chunks_exact_mut(keys).zip(dp.chunks_exact_mut(keys)) {
            let mut row_max = f32::NEG_INFINITY;
            for v in p.iter() {
                row_max = row_max.max(*v);
            }
            for v in p.iter_mut() {
                *v = simd::exp::<FUSED>(*v - row_max);
            }
            let inverse = 1.0 / simd::sum(p);
            for v in p.iter_mut() {
                *v *= inverse;
            }
            let mean = simd::dot(p, dp);
            for i in 0..keys {
                dp[i] = p[i] * (dp[i] - mean);
            }
        }
    }
}

/// Gradients of the projected `q` `[t, width]`, `k` and `v` `[m, width]` of
/// [`attend_heads`](super::attend_heads), from that of its result, `dy` `[t, width]`. Those of keys
/// and values that are not valid are zeros.
pub fn attention(
    device: &Device,
    heads: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    valid: ValidKeys,
    dy: &Tensor,
) -> Result<[Tensor; 3], OpError> {
    const OP: &str = "two_way_attention gradient";
    dy.expect_shape(OP, "dy", q.shape())?;
    let width = q.channels();
    if k.channels() != width || v.shape() != k.shape() || heads == 0 || !width.is_multiple_of(heads)
    {
        return Err(k.shape_error(
            OP,
            "projected k",
            format!("[m, {width}] as v, {width} a multiple of {heads} heads"),
        ));
    }
    if let Device::Cuda(cuda) = device {
        return super::cuda::attend_heads_gradient(cuda, heads, [q, k, v], valid, dy);
    }
    if valid.is_some() {
        return Err(super::two_way::padded(OP));
    }
    let cpu: &Cpu = device.cpu();
    let (rows, keys) = (q.rows(), k.rows());
    let dim = width / heads;
    let scale = 1.0 / (dim as f32).sqrt();
    let head = Head { stride: width, dim };
    let mut grads = [cpu.zeros(q.len()), cpu.zeros(k.len()), cpu.zeros(v.len())];
    let to = grads.each_mut().map(|g| DisjointWriter::new(g));
    let (q, k, v, dy) = (q.data(), k.data(), v.data(), dy.data());
    cpu.for_each(heads, |h| {
        let c0 = h * head.dim;
        for q0 in (0..rows).step_by(QUERIES) {
            let n = QUERIES.min(rows - q0);
            let (mut p, mut ds) = (cpu.alloc(n * keys), cpu.alloc(n * keys));
            // SAFETY: the matrices are the tensors' own rows; each head writes its own channels.
            unsafe {
                matmul(
                    [n, keys, dim],
                    p.as_mut_ptr(),
                    keys,
                    false,
                    head.of(q, q0, c0),
                    head.transposed(k, 0, c0),
                );
                p.iter_mut().for_each(|s| *s *= scale);
                matmul(
                    [n, keys, dim],
                    ds.as_mut_ptr(),
                    keys,
                    false,
                    head.of(dy, q0, c0),
                    head.transposed(v, 0, c0),
                );
                score_gradients(cpu.isa(), &mut p, &mut ds, keys);
                ds.iter_mut().for_each(|s| *s *= scale);
                let plain = |m: &[f32]| Matrix { data: m.as_ptr(), row: keys, column: 1 };
                let transposed = |m: &[f32]| Matrix { data: m.as_ptr(), row: 1, column: keys };
                matmul(
                    [n, dim, keys],
                    to[0].at(q0 * width + c0),
                    width,
                    false,
                    plain(&ds),
                    head.of(k, 0, c0),
                );
                matmul(
                    [keys, dim, n],
                    to[1].at(c0),
                    width,
                    true,
                    transposed(&ds),
                    head.of(q, q0, c0),
                );
                matmul(
                    [keys, dim, n],
                    to[2].at(c0),
                    width,
                    true,
                    transposed(&p),
                    head.of(dy, q0, c0),
                );
            }
        }
    });
    let shape = |rows: usize| vec![rows, width];
    let [dq, dk, dv] = grads;
    Ok([
        Tensor::from_buffer(shape(rows), dq),
        Tensor::from_buffer(shape(keys), dk),
        Tensor::from_buffer(shape(keys), dv),
    ])
}
