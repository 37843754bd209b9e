//! `interact:base,t60`: a click of a number of prompt voxels on an encoded patch.

use super::network::{self, Network, beside_portable};
use super::{Judge, Kind, Read, Run, Task, Timed, positive};
use crate::device::{Cuda, Device};
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "interact:base,t60", read };

#[derive(Debug)]
struct Interact {
    network: Network,
    /// Prompt voxels.
    points: usize,
}

fn read(text: &str) -> Read {
    let (network, points) = network::read(text, "t", 1)?;
    positive(&[points])?;
    Ok(Arc::new(Interact { network, points }))
}

impl fmt::Display for Interact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interact:{},t{}", self.network, self.points)
    }
}

impl Task for Interact {
    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let (judged, points) = (self.network.judged(), Some(self.points));
        let judge =
            beside_portable(device, move |device| network::run(device, &judged, points, true));
        Ok((network::run(device, &self.network, points, false)?, judge))
    }

    fn timed(&self, cuda: &Cuda) -> Result<Timed, OpError> {
        network::timed(cuda, &self.network, Some(self.points))
    }
}
