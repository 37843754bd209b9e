//! Attention: the image encoder's, with decomposed relative positions, and the two-way
//! transformer's.
//!
//! Both are scaled dot-product attention with several heads (Vaswani et al. 2017): in each head,
//! `softmax(q kᵀ / sqrt(head dim)) v`, where a head has `width / heads` of the channels. The image
//! encoder's adds position terms to the scores, one table an axis, and attends within windows, as
//! the released network does.

mod contract;
mod core;
mod cuda;
mod flash;
mod positions;
mod two_way;
mod two_way_grad;
mod vit;
mod vit_grad;

pub(crate) use self::core::softmax;
pub use contract::{Attended, TwoWayWeights, ValidKeys, VitWeights};
pub use two_way::attend_heads;
pub use vit::{attend_windows, vit_attention};

/// Gradients of attention, from the gradient of the attended values (before the output projection).
pub mod grad {
    pub use super::contract::VitGrads;
    pub use super::two_way_grad::attention as two_way_attention;
    pub use super::vit_grad::vit_attention;
}
