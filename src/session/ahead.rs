//! Encoding the patches that a session will probably look at, before a prompt is given.

use super::SessionError;
use super::encodings::Coming;
use super::region::Sight;
use super::scan::Scan;
use crate::memory;
use crate::model::Observer;
use crate::volume::Grid;
use crate::volume::patch::Patch;
use std::sync::{Arc, Weak};

/// A patch that a session will probably look at when its answer is corrected
/// ([`super::Session::ahead`]), when a first prompt is given somewhere
/// ([`super::Session::ahead_of`]), or wherever that prompt is ([`Scan::ahead`]): to be encoded
/// before that, on any thread. It keeps neither the session nor its scan alive.
pub struct Ahead {
    scan: Weak<Scan>,
    /// The places of all patches that were returned together. Dropped with the session, and when
    /// others are returned; for a scan's own patch, with the [`Interest`].
    sign: Weak<Vec<Grid>>,
    patch: Patch,
    coming: Arc<Coming>,
}

/// Keeps the patch that [`Scan::ahead`] returned useful: until it is dropped.
pub struct Interest {
    _sign: Arc<Vec<Grid>>,
}

impl Scan {
    /// The patch with which every first click without a box is looked at from furthest off: to be
    /// encoded as soon as the scan is available, for as long as the interest is held. None if the
    /// network does not look from several distances, or if no patch shows all of the scan (from
    /// about 430 mm on).
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

    /// Whether it is still useful: the session exists and has not changed, or the interest is held.
    pub fn serves(&self) -> bool {
        self.sign.strong_count() > 0
    }

    /// Whether a session waits for it: one that looks at the patch while it is being encoded, under
    /// an observer that [paces](Observer::paced) the network, waits until that has finished.
    pub fn is_awaited(&self) -> bool {
        self.coming.is_awaited()
    }

    /// Encodes the patch; false if that is not useful: it is kept already, others would be dropped
    /// for it, or the scan is gone.
    ///
    /// # Errors
    /// Memory is refused, the device fails, or the observer ends it. No session is affected.
    pub fn encode(&self, observer: &mut Observer) -> Result<bool, SessionError> {
        let Some(scan) = self.scan.upgrade().filter(|_| self.serves()) else { return Ok(false) };
        memory::caught(|| scan.encode_ahead(&self.patch, &self.coming, observer))?
    }
}
