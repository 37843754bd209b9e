//! Attention: the image encoder's, with the released network's relative positions, and the two-way transformer's.

mod core;
pub(crate) use self::core::softmax;
mod two_way;
mod vit;

pub use two_way::{TwoWayWeights, two_way_attention};
pub use vit::{VitWeights, vit_attention};
