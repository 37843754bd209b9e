//! Encoding where a session is going to look before anything is said of it.

use super::SessionError;
use super::encodings::Coming;
use super::region::Sight;
use super::scan::Scan;
use crate::memory;
use crate::model::Observer;
use crate::volume::Grid;
use crate::volume::patch::Patch;
use std::sync::{Arc, Weak};

/// A patch that a session will look at, most likely, when its answer is corrected
/// ([`super::Session::ahead`]), where something is said first ([`super::Session::ahead_of`]), or
/// wherever that is ([`Scan::ahead`]): to be encoded before that, on any thread. It keeps neither
/// the session nor its scan.
pub struct Ahead {
    scan: Weak<Scan>,
    /// Where all patches lie that were told together. Goes when the session does, and when others
    /// are told; a scan's own with the [`Interest`].
    sign: Weak<Vec<Grid>>,
    patch: Patch,
    coming: Arc<Coming>,
}

/// Says to what was told of a scan ahead that it is of use still: until it is dropped.
pub struct Interest {
    _sign: Arc<Vec<Grid>>,
}

impl Scan {
    /// What every first click without a box is looked at with from furthest off: to be encoded as
    /// soon as the scan is there, for as long as the interest is held. None where the network does
    /// not look from several distances, or where none of them shows all of the scan (from some
    /// 430 mm on).
    pub fn ahead(self: &Arc<Scan>) -> Option<(Ahead, Interest)> {
        let all = if self.options().released { None } else { Sight::of(self).all() }?;
        let sign = Arc::new(vec![all.grid]);
        Some((Ahead::new(self, &sign, all), Interest { _sign: sign }))
    }
}

impl Ahead {
    pub(super) fn new(scan: &Arc<Scan>, sign: &Arc<Vec<Grid>>, patch: Patch) -> Ahead {
        let (scan, sign) = (Arc::downgrade(scan), Arc::downgrade(sign));
        Ahead { scan, sign, patch, coming: Arc::default() }
    }

    /// Whether it is of use still: the session is there, and as it was, or the interest is held.
    pub fn serves(&self) -> bool {
        self.sign.strong_count() > 0
    }

    /// Whether somebody waits for it: a session that looks at the patch while it is being encoded,
    /// under an observer that [paces](Observer::paced) the network, waits for the end of that.
    pub fn is_awaited(&self) -> bool {
        self.coming.is_awaited()
    }

    /// Encodes the patch; false where that is of no use: it is kept already, others would be
    /// dropped for it, or the scan is gone.
    ///
    /// # Errors
    /// Memory is refused, the device fails, or the observer ends it. Nobody has lost anything.
    pub fn encode(&self, observer: &mut Observer) -> Result<bool, SessionError> {
        let Some(scan) = self.scan.upgrade().filter(|_| self.serves()) else { return Ok(false) };
        memory::caught(|| scan.encode_ahead(&self.patch, &self.coming, observer))?
    }
}
