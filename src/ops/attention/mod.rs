//! Attention: the image encoder's, with the released network's relative positions, and the two-way
//! transformer's.

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

/// Gradients, from those of the attended values on.
pub mod grad {
    pub use super::contract::VitGrads;
    pub use super::two_way_grad::attention as two_way_attention;
    pub use super::vit_grad::vit_attention;
}
