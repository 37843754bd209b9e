//! The server as its clients use it. Tests of all its parts are one executable, so that those that
//! wait and those that compute run side by side.
#![cfg(feature = "serve")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/http.rs"]
mod http;
#[path = "../common/python.rs"]
mod python;
#[path = "../common/viewer.rs"]
mod viewer;
#[cfg(feature = "dicom")]
#[path = "../common/dicom.rs"]
mod writer;

mod interfaces;
mod protocols;
#[cfg(unix)]
mod state;
#[cfg(unix)]
mod turns;
