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

/// A patch that a session will probably look at, to be encoded before that, on any thread.
///
/// [`Session::ahead`](super::Session::ahead) gives the one for the next correction,
/// [`Session::ahead_of`](super::Session::ahead_of) those for a first prompt at some place, and
/// [`Scan::ahead`] the one for a first prompt anywhere. It keeps neither the session nor its scan
/// alive.
pub struct Ahead {
    scan: Weak<Scan>,
    /// The places of all patches that were returned together. Dropped with the session, and when
    /// others are returned; for a scan's own patch, with the [`Interest`].
    sign: Weak<Vec<Grid>>,
    patch: Patch,
    coming: Arc<Coming>,
}

/// A handle that [`Scan::ahead`] returns with a patch: the patch is useful until it is dropped.
pub struct Interest {
    _sign: Arc<Vec<Grid>>,
}

impl Scan {
    /// The widest patch that the network looks at after a first click without a box, wherever that
    /// click is: to be encoded as soon as the scan is available, for as long as the interest is
    /// held. None if the network does not look from several distances, if no patch shows all of the
    /// scan (from a length of about 430 mm on), or if answers are
    /// [released](super::Options::released).
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

    /// Whether encoding it is still useful: the session exists and has not changed since, or the
    /// [`Interest`] is held.
    pub fn serves(&self) -> bool {
        self.sign.strong_count() > 0
    }

    /// Whether a session waits for it. A session that looks at the patch while it is being encoded,
    /// under an observer that [paces](Observer::paced) the network, waits until that has finished.
    pub fn is_awaited(&self) -> bool {
        self.coming.is_awaited()
    }

    /// Encodes the patch and keeps it with the scan; false if that is not useful: the patch is kept
    /// already, others would be dropped for it, it [no longer serves](Ahead::serves), or the scan
    /// is gone.
    ///
    /// # Errors
    /// Memory is refused, the device fails, or the observer cancels it. No session is affected.
    pub fn encode(&self, observer: &mut Observer) -> Result<bool, SessionError> {
        let Some(scan) = self.scan.upgrade().filter(|_| self.serves()) else { return Ok(false) };
        memory::caught(|| scan.encode_ahead(&self.patch, &self.coming, observer))?
    }
}
