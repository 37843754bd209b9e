//! Errors as answers of HTTP.

use super::turns::Turn;
use crate::device::CudaError;
use crate::memory::Refused;
use crate::message::shortened;
use crate::model::{Observer, Part};
use crate::prompt::PromptError;
use crate::session::SessionError;
use crate::tensor::OpError;
use crate::volume::VolumeError;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Seconds after which a client may try again if there was no room.
const LATER: u32 = 10;

/// The most characters of a message: readers of JSON and of files quote their input unchanged,
/// which may be megabytes, and a list of a study's series is long.
const LONGEST: usize = 4000;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Failure {
        let message: String = message.into();
        Failure { status, message: shortened(&message, LONGEST) }
    }

    /// The failure of an invalid request.
    pub fn bad(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::BAD_REQUEST, message)
    }

    /// The failure of a request that is well formed, but does not fit the present state.
    pub fn unfit(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::UNPROCESSABLE_ENTITY, message)
    }

    pub fn too_large(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    pub fn unknown(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::NOT_FOUND, message)
    }

    /// The failure of a request for which there is no room at present.
    pub fn full(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The failure's message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// A session's error in the protocol that uses 400 for all errors of a request.
    pub fn into_bad(self) -> Failure {
        match self.status {
            StatusCode::UNPROCESSABLE_ENTITY => Failure { status: StatusCode::BAD_REQUEST, ..self },
            _ => self,
        }
    }

    /// The answer, with the message under the name that a protocol uses.
    pub fn reply(&self, name: &str) -> Response {
        let mut response = reply(self.status, &json!({ (name): self.message }));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(LATER));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let bearer = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(axum::http::header::WWW_AUTHENTICATE, bearer);
        }
        response
    }
}

/// The failure is attached, so that its message can be given another name on the way out.
impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.reply("error");
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Refused> for Failure {
    fn from(e: Refused) -> Failure {
        Failure::full(e.to_string())
    }
}

impl From<OpError> for Failure {
    fn from(e: OpError) -> Failure {
        match e {
            OpError::Memory(e) => e.into(),
            OpError::Cuda(e @ CudaError::Memory { .. }) => Failure::full(e.to_string()),
            OpError::Cancelled => Failure::full("cancelled: the client has disconnected"),
            other => Failure::new(StatusCode::INTERNAL_SERVER_ERROR, other.to_string()),
        }
    }
}

impl From<PromptError> for Failure {
    fn from(e: PromptError) -> Failure {
        match e {
            PromptError::Unfit(message) => Failure::unfit(message),
            PromptError::Memory(e) => e.into(),
        }
    }
}

impl From<SessionError> for Failure {
    fn from(e: SessionError) -> Failure {
        match e {
            SessionError::Memory(e) => e.into(),
            SessionError::Op(e) => e.into(),
            SessionError::NotFinite { .. } => {
                Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())
            }
            other => Failure::unfit(other.to_string()),
        }
    }
}

/// For a file that was sent, the message alone says what is wrong: the path is not shown.
impl From<VolumeError> for Failure {
    fn from(e: VolumeError) -> Failure {
        match e.refused {
            true => Failure::full(e.message),
            false => Failure::unfit(e.message),
        }
    }
}

/// An answer in JSON, if everything went well.
pub fn said(value: Value) -> Result<Response, Failure> {
    Ok(reply(StatusCode::OK, &value))
}

/// An answer in JSON.
pub fn reply(status: StatusCode, value: &Value) -> Response {
    let mut response = (status, value.to_string()).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Runs an interaction by its turns at the network; it ends early if its client no longer waits.
pub fn in_turns<T>(
    turn: &Turn,
    work: impl FnOnce(&mut Observer) -> Result<T, SessionError>,
) -> Result<T, Failure> {
    let mut pace = |part: Part<'_>| turn.goes_on(part);
    let done = work(&mut Observer::paced(&mut pace));
    // What is made of its answer needs no network.
    turn.rests();
    Ok(done?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn memory_that_is_refused_to_prompts_is_no_fault_of_theirs() {
        let refused = || PromptError::from(memory::refused::<u8>("a test", 1));
        let unfit = || PromptError::Unfit("odd".into());
        for (failure, status) in [
            (Failure::from(refused()), StatusCode::SERVICE_UNAVAILABLE),
            (Failure::from(refused()).into_bad(), StatusCode::SERVICE_UNAVAILABLE),
            (Failure::from(unfit()), StatusCode::UNPROCESSABLE_ENTITY),
            (Failure::from(unfit()).into_bad(), StatusCode::BAD_REQUEST),
        ] {
            assert_eq!(failure.reply("error").status(), status, "{failure:?}");
        }
    }
}
