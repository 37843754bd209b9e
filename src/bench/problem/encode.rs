//! `encode:base` or `encode:small`, with `,d64` at another patch edge: encoding a scan's patch.

use super::network::{self, Network, beside_portable};
use super::{Judge, Kind, Read, Run, Task, Timed};
use crate::device::{Cuda, Device};
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "encode:base", read };

#[derive(Debug)]
struct Encode(Network);

fn read(text: &str) -> Read {
    let (network, _) = network::read(text, "", 0)?;
    Ok(Arc::new(Encode(network)))
}

impl fmt::Display for Encode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "encode:{}", self.0)
    }
}

impl Task for Encode {
    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let judged = self.0.judged();
        let judge =
            beside_portable(device, move |device| network::run(device, &judged, None, true));
        Ok((network::run(device, &self.0, None, false)?, judge))
    }

    fn timed(&self, cuda: &Cuda) -> Result<Timed, OpError> {
        network::timed(cuda, &self.0, None)
    }
}
