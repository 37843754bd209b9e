//! Attention: the image encoder's, with the released network's relative positions, and the two-way transformer's.

mod core;
mod cuda;
mod flash;
mod positions;
pub(crate) use self::core::softmax;
mod two_way;
mod two_way_grad;
mod vit;
mod vit_grad;

pub use two_way::{Live, TwoWayWeights, attend_heads, two_way_attention};
pub use vit::{Attended, VitWeights, attend_windows, vit_attention};

/// Gradients, from those of the attended values on.
pub mod grad {
    pub use super::two_way_grad::attention as two_way_attention;
    pub use super::vit_grad::{VitGrads, vit_attention};
}
