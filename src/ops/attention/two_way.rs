//! Attention of the two-way transformer: separate projections, no positions of its own.

use super::contract::{TwoWayWeights, ValidKeys};
use super::flash::{self, Problem};
use crate::device::Device;
use crate::device::profile::OpCost;
use crate::ops::linear::{Activation, linear};
use crate::tensor::{OpError, Param, Tensor};

const OP: &str = "two_way_attention";

/// Softmax attention of projected `q` `[t, width]` to keys `k` `[m, width]` with values `v` `[m,
/// width]`, each head in its own channels.
pub fn attend_heads(
    device: &Device,
    heads: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    valid: ValidKeys,
) -> Result<Tensor, OpError> {
    let (queries, keys, width) = (q.rows(), k.rows(), q.channels());
    if k.channels() != width || v.shape() != k.shape() || heads == 0 || width % heads != 0 {
        return Err(k.shape_error(
            OP,
            "projected k",
            format!("[m, {width}] as v, {width} a multiple of {heads} heads"),
        ));
    }
    let dim = width / heads;
    let scale = 1.0 / (dim as f32).sqrt();
    match device {
        Device::Cpu(cpu) => {
            let _op = cpu.op("attention", || {
                let problem = format!("{queries} to {keys} tokens, {heads} heads of {dim}");
                OpCost {
                    problem,
                    flops: (4 * queries * keys * width) as f64,
                    floats: (2 * queries + 2 * keys) * width,
                }
            });
            let mut out = cpu.alloc(queries * width);
            flash::attend(
                cpu,
                Problem { q: q.data(), k: k.data(), v: v.data(), heads, dim, scale },
                &mut out,
            );
            Ok(Tensor::from_buffer(q.shape(), out))
        }
        Device::Cuda(cuda) => super::cuda::attend_heads(cuda, heads, q, k, v, valid),
    }
}

/// Attention with its four projections: `q` `[t, c]` attends to keys `k` `[m, c]` with values `v`
/// `[m, c]`; adds `residual` `[t, c]` where given.
pub fn two_way_attention(
    device: &Device,
    weights: &TwoWayWeights,
    q: &Tensor,
    (k, v, valid): (&Tensor, &Tensor, ValidKeys),
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let project =
        |x: &Tensor, (w, b): &(Param, Param)| linear(device, x, w, Some(b), Activation::None, None);
    if k.shape() != v.shape() {
        return Err(v.shape_error(OP, "v", format!("{:?}, that of k", k.shape())));
    }
    let (q, k, v) = (project(q, &weights.q)?, project(k, &weights.k)?, project(v, &weights.v)?);
    let attended = attend_heads(device, weights.heads, &q, &k, &v, valid)?;
    linear(device, &attended, &weights.out.0, Some(&weights.out.1), Activation::None, residual)
}
