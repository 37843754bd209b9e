//! The two-way transformer's attention between projected tokens, without position terms.

use super::contract::ValidKeys;
use super::flash::{self, Problem};
use crate::device::Device;
use crate::device::profile::OpCost;
use crate::tensor::{OpError, Tensor};

const OP: &str = "two_way_attention";

/// The two-way transformer's attention between its projections: `softmax(q kᵀ / sqrt(head dim)) v`
/// in each head.
///
/// Projected queries `q` are `[t, width]`, keys `k` and values `v` `[m, width]`; a head has
/// `width / heads` channels. Gives `[t, width]`.
///
/// # Errors
/// [`OpError::Shape`] for other shapes; [`OpError::Argument`] for a number of valid keys on a CPU.
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
        Device::Cpu(_) if valid.is_some() => Err(padded(OP)),
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

/// What is said where a CPU is given a number of valid keys: it has no padding.
pub(super) fn padded(op: &'static str) -> OpError {
    OpError::Argument { op, message: "a number of valid keys is for CUDA devices".into() }
}
