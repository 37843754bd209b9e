//! Encoding where a session is going to look before anything is said of it.

use super::SessionError;
use super::encodings::Coming;
use super::scan::Scan;
use crate::memory;
use crate::model::Observer;
use crate::volume::Grid;
use crate::volume::patch::Patch;
use std::sync::{Arc, Weak};

/// A patch that a session will look at, most likely, when its answer is corrected
/// ([`super::Session::ahead`]) or where something is said first ([`super::Session::ahead_of`]): to
/// be encoded before that, on any thread. It keeps neither the session nor its scan.
pub struct Ahead {
    scan: Weak<Scan>,
    /// Where all patches lie that were told together. Goes when the session does, and when others
    /// are told.
    sign: Weak<Vec<Grid>>,
    patch: Patch,
    coming: Arc<Coming>,
}

impl Ahead {
    pub(super) fn new(scan: &Arc<Scan>, sign: &Arc<Vec<Grid>>, patch: Patch) -> Ahead {
        let (scan, sign) = (Arc::downgrade(scan), Arc::downgrade(sign));
        Ahead { scan, sign, patch, coming: Arc::default() }
    }

    /// Whether it is of use still: the session is there, and as it was.
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
