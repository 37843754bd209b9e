//! prism in other programs: the C header, and the installed library.

#[path = "../common/mod.rs"]
mod common;
#[cfg(all(feature = "dicom", target_env = "gnu"))]
#[path = "../common/dicom.rs"]
mod dicom;

mod header;
mod installed;
