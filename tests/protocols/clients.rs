//! Clients and servers that others wrote, run by Python.

use crate::common::{self, here};
use crate::http::{CLICK, Running, started};
#[cfg(feature = "dicom")]
use crate::series;
use prism::serve::{Secret, Settings};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Python with packages of a folder of their own, which are fetched where that can be; none, and a
/// word of it, where it cannot. `fetched` are the arguments of pip, a call each.
fn python_with(folder: &str, import: &str, fetched: &[&[&str]]) -> Option<PathBuf> {
    let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
    let at = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    let there = || python(&at, &["-c", import]).is_some_and(|out| out.status.success());
    if !there() {
        for packages in fetched {
            let to = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"];
            let _ = python(&at, &[&to[..], &[at.to_str().unwrap()][..], *packages].concat());
        }
    }
    if !there() {
        let why = format!("{folder} cannot be had on this machine");
        assert!(!required, "{why}");
        common::skipped(&why);
        return None;
    }
    Some(at)
}

fn python(packages: &Path, args: &[&str]) -> Option<Output> {
    let mut command = Command::new("python3");
    // The server is here, whatever stands between this machine and others.
    command.args(args).env("PYTHONPATH", packages).env("NO_PROXY", "127.0.0.1");
    command.output().ok()
}

/// Runs a client of tests/clients against a server.
#[track_caller]
fn all_is_well(packages: &Path, client: &str, server: &Running, args: &[&str]) {
    let script = here("tests/clients").join(client);
    let url = format!("http://{}", server.address);
    let out =
        python(packages, &[&[script.to_str().unwrap(), url.as_str()][..], args].concat()).unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.ends_with("all is well\n"), "{said}{error}");
}

/// MONAI Label's own client, which 3D Slicer's extension brings along, where Python can have it.
#[test]
fn monai_labels_own_client_works() {
    let fetched: [&[&str]; 2] =
        [&["--no-deps", "monailabel==0.8.5"], &["requests==2.34.2", "numpy==2.4.6"]];
    let import = "import numpy, monailabel.client.client";
    let Some(packages) = python_with("monailabel-0.8.5", import, &fetched) else { return };
    let token = Some(Secret::new("a secret").unwrap());
    let folder = tempfile::tempdir().unwrap();
    #[cfg(feature = "dicom")]
    let (dicom, series) = (Some(series::file_example(folder.path())), series::EXAMPLE);
    #[cfg(not(feature = "dicom"))]
    let (dicom, series) = (None, "");
    let server = started(Settings { token, dicom, ..Settings::default() });
    let image = here("examples/data/lung1_image.nii.gz");
    let click = CLICK.map(|n| n.to_string()).join(",");
    let args = ["a secret", image.to_str().unwrap(), &click, series];
    all_is_well(&packages, "monai.py", &server, &args);
    drop(folder);
}

/// ITK-SNAP's own server beside this one: to the same requests answers of the same form, where
/// Python can have it.
#[test]
fn itk_snaps_own_server_answers_in_the_same_form() {
    let fetched: [&[&str]; 2] = [
        &["--no-deps", "itksnap-dls==0.1.6"],
        &[
            "fastapi==0.165.0",
            "uvicorn==0.54.0",
            "python-multipart==0.0.34",
            "SimpleITK==2.5.7",
            "huggingface_hub==2.4.0",
            "requests==2.34.2",
            "numpy==2.4.6",
        ],
    ];
    let import = "import fastapi, uvicorn, python_multipart, SimpleITK, huggingface_hub, requests, numpy; \
        from importlib.metadata import version; assert version('itksnap-dls') == '0.1.6'";
    let Some(packages) = python_with("itksnap-dls-0.1.6", import, &fetched) else { return };
    let server = started(Settings::default());
    all_is_well(&packages, "dls.py", &server, &[]);
}
