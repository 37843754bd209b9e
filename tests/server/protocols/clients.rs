//! Clients and servers written by others.

#[cfg(feature = "dicom")]
use super::series;
use crate::common::here;
use crate::http::{CLICK, started};
use crate::python::Python;
use prism::serve::{Secret, Settings};

/// MONAI Label's own client, which 3D Slicer's extension includes, if Python can install it.
#[test]
fn monai_labels_own_client_works() {
    let import = "import numpy, monailabel.client.client";
    let Some(python) = Python::with("monai", import) else { return };
    let token = Some(Secret::new("a secret").unwrap());
    let folder = tempfile::tempdir().unwrap();
    #[cfg(feature = "dicom")]
    let (dicom, series) = (Some(series::file_example(folder.path())), series::EXAMPLE);
    #[cfg(not(feature = "dicom"))]
    let (dicom, series) = (None, "");
    let server = started(Settings { token, dicom, ..Settings::default() });
    let url = format!("http://{}", server.address);
    let image = here("examples/data/lung1_image.nii.gz");
    let click = CLICK.map(|n| n.to_string()).join(",");
    python.all_is_well(&[&url, "a secret", image.to_str().unwrap(), &click, series]);
    drop(folder);
}

/// ITK-SNAP's own server, which gives answers of the same form to the same requests, if Python can
/// install it.
#[test]
fn itk_snaps_own_server_answers_in_the_same_form() {
    let import =
        "import fastapi, uvicorn, python_multipart, SimpleITK, huggingface_hub, requests, numpy";
    let Some(python) = Python::with("dls", import) else { return };
    let server = started(Settings::default());
    python.all_is_well(&[&format!("http://{}", server.address)]);
}
