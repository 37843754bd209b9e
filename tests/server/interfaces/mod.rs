//! prism's own interface and nnInteractive's, by an HTTP client of the test: answers are compared
//! with the library's, errors by their status. Also nnInteractive's own client.

mod nninteractive;
mod own;
mod program;
#[cfg(feature = "dicom")]
mod series;
mod strangers;

use crate::http::{Reply, upload};
use serde_json::Value;

/// A mask as a client of prism's own interface keeps it, `[i][j][k]`.
struct Mask {
    size: [usize; 3],
    voxels: Vec<u8>,
}

impl Mask {
    fn new(size: [usize; 3]) -> Mask {
        Mask { size, voxels: vec![0; size.iter().product()] }
    }

    /// Writes an answer into it, and returns its metadata.
    #[track_caller]
    fn take(&mut self, reply: &Reply) -> Value {
        assert_eq!(reply.status, 200, "{}", reply.text());
        let about: Value =
            serde_json::from_str(reply.header("X-Prism-Answer").expect("an answer")).unwrap();
        let mut changed = 0;
        if about["region"].is_null() {
            assert!(reply.body.is_empty());
        } else {
            let region: [[usize; 2]; 3] = serde_json::from_value(about["region"].clone()).unwrap();
            let size = region.map(|[low, high]| high - low);
            let count: usize = size.iter().product();
            assert_eq!(reply.body.len(), count.div_ceil(8));
            let [_, nj, nk] = self.size;
            for at in 0..count {
                let within = [at % size[0], at / size[0] % size[1], at / size[0] / size[1]];
                let [i, j, k] = std::array::from_fn(|a| region[a][0] + within[a]);
                let bit = reply.body[at / 8] >> (at % 8) & 1;
                let voxel = &mut self.voxels[(i * nj + j) * nk + k];
                changed += usize::from(*voxel != bit);
                *voxel = bit;
            }
        }
        assert_eq!(about["changed"].as_u64(), Some(changed as u64));
        let voxels = self.voxels.iter().filter(|v| **v != 0).count();
        assert_eq!(about["voxels"].as_u64(), Some(voxels as u64));
        about
    }
}
