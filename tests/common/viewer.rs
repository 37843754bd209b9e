//! A client of nnInteractive's protocol, and the example's scan as it sends it.
#![allow(dead_code)]

use super::http::{Reply, ask, example, post};
use prism::volume::{Affine, Description, Element, Grid, Volume};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;

/// An array as nnInteractive's client sends it: stored, in one chunk.
pub fn nnia(dtype: &str, element: usize, shape: &[usize], data: &[u8]) -> Vec<u8> {
    let mut message = b"NNIA\x01\x01".to_vec();
    message.extend([shape.len() as u8, dtype.len() as u8]);
    message.extend(dtype.bytes());
    shape.iter().for_each(|n| message.extend((*n as i64).to_le_bytes()));
    message.extend(1u32.to_le_bytes());
    message.extend((data.len() as u64).to_le_bytes());
    message.extend((data.len() as u64 + 32).to_le_bytes());
    message.extend([5, 1, 0x97, element as u8]);
    [data.len(), data.len(), data.len() + 32]
        .iter()
        .for_each(|n| message.extend((*n as i32).to_le_bytes()));
    message.extend([0; 16]);
    message.extend(data);
    message
}

/// A client of nnInteractive's protocol with its buffer, `[k][j][i]`.
pub struct Viewer {
    pub at: SocketAddr,
    pub lease: String,
    size: [usize; 3],
    pub buffer: Vec<u8>,
}

impl Viewer {
    pub fn new(at: SocketAddr) -> Viewer {
        let claimed = post(at, "/claim", &json!({})).json(200);
        let lease = claimed["lease_token"].as_str().unwrap().to_string();
        Viewer { at, lease, size: [0; 3], buffer: vec![] }
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(path, &Value::Null, body.to_string().as_bytes())
    }

    pub fn send(&self, path: &str, meta: &Value, body: &[u8]) -> Reply {
        let meta = meta.to_string();
        let headers = [("X-Lease-Token", self.lease.as_str()), ("X-Meta", meta.as_str())];
        let count = if meta == "null" { 1 } else { 2 };
        ask(self.at, "POST", path, &headers[..count], body)
    }

    /// Sends an image of int16, `[k][j][i]`, and a buffer for it.
    pub fn open(&mut self, size: [usize; 3], spacing: [f64; 3], values: &[i16]) {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let shape = [1, size[0], size[1], size[2]];
        let meta = json!({ "image_properties": { "spacing": spacing } });
        let reply = self.send("/set_image", &meta, &nnia("int16", 2, &shape, &data)).json(200);
        assert_eq!(reply["original_image_shape"], json!(shape));
        let buffer = json!({ "shape": size, "dtype": "uint8" });
        assert_eq!(self.post("/set_target_buffer", &buffer).json(200), json!({}));
        (self.size, self.buffer) = (size, vec![0; size.iter().product()]);
    }

    /// Writes the change into the buffer; returns whether there was a prediction, and a change.
    #[track_caller]
    pub fn take(&mut self, reply: Reply) -> (bool, bool) {
        assert_eq!(reply.status, 200, "{}", reply.text());
        let meta: Value = serde_json::from_str(reply.header("X-Meta").unwrap()).unwrap();
        let ran = meta["ran_prediction"].as_bool().unwrap();
        if meta["bbox"].is_null() {
            assert!(reply.body.is_empty());
            return (ran, false);
        }
        let region: [[usize; 2]; 3] = serde_json::from_value(meta["bbox"].clone()).unwrap();
        let shape = region.map(|[low, high]| high - low);
        assert_eq!((&meta["shape"], &meta["dtype"]), (&json!(shape), &json!("uint8")));
        let count: usize = shape.iter().product();
        // A head of 8 bytes and the name, three axes, the number of chunks, the chunk's two sizes
        // and its own header.
        let data = &reply.body[8 + 5 + 24 + 4 + 16 + 32..];
        assert_eq!(data.len(), count);
        for (at, value) in data.iter().enumerate() {
            let within = [at / shape[2] / shape[1], at / shape[2] % shape[1], at % shape[2]];
            let [k, j, i] = std::array::from_fn(|a| region[a][0] + within[a]);
            self.buffer[(k * self.size[1] + j) * self.size[2] + i] = *value;
        }
        (ran, true)
    }

    pub fn point(&mut self, at: Value, on: bool, run: bool) -> (bool, bool) {
        let body = json!({
            "coordinates": at, "include_interaction": on, "run_prediction": run,
            "override_capability_checks": false,
        });
        let reply = self.post("/add_point_interaction", &body);
        self.take(reply)
    }

    pub fn bounds(&mut self, bounds: Value, on: bool) -> (bool, bool) {
        let body = json!({ "bbox_coords": bounds, "include_interaction": on });
        let reply = self.post("/add_bbox_interaction", &body);
        self.take(reply)
    }

    /// Sends what is painted in a crop of the image, `[k][j][i]`, by a request with that path.
    #[track_caller]
    pub fn painted(
        &mut self,
        path: &str,
        crop: [[usize; 2]; 3],
        marks: &[u8],
        on: bool,
    ) -> (bool, bool) {
        let meta = json!({ "include_interaction": on, "interaction_bbox": crop });
        let shape = crop.map(|[low, high]| high - low);
        let reply = self.send(path, &meta, &nnia("uint8", 1, &shape, marks));
        self.take(reply)
    }

    pub fn undo(&mut self) -> (bool, bool) {
        let reply = self.post("/undo", &json!({}));
        self.take(reply)
    }

    /// The buffer in the library's order of masks.
    pub fn mask(&self) -> Vec<u8> {
        let [nk, nj, ni] = self.size;
        let place = |at: usize| (at % nk * nj + at / nk % nj) * ni + at / nk / nj;
        (0..self.buffer.len()).map(|at| self.buffer[place(at)]).collect()
    }
}

/// The example as nnInteractive's client sends it, and as the library reads it.
pub fn array_of_example() -> ([usize; 3], [f64; 3], Vec<i16>, Arc<Volume>) {
    let image = example();
    let [ni, nj, nk] = image.grid.size;
    let [di, dj, dk] = image.grid.spacing();
    let mut values = vec![];
    for (k, j) in (0..nk).flat_map(|k| (0..nj).map(move |j| (k, j))) {
        values.extend((0..ni).map(|i| image.at([i, j, k]) as i16));
    }
    let affine = Affine([[-di, 0.0, 0.0, 0.0], [0.0, -dj, 0.0, 0.0], [0.0, 0.0, dk, 0.0]]);
    let grid = Grid { size: [ni, nj, nk], affine };
    let bytes = values.iter().flat_map(|v: &i16| v.to_le_bytes()).collect();
    let volume =
        Volume::of_elements(grid, Element::Int16, bytes, Description::of_new(&grid, "int16"));
    ([nk, nj, ni], [dk, dj, di], values, Arc::new(volume.unwrap()))
}
