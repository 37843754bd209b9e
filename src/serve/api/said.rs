//! What is said of an object, as prompts.

use super::json_of;
use crate::memory;
use crate::prompt::{Prompts, RawBox, RawOutline, RawPoint, Space};
use crate::serve::failure::Failure;
use crate::volume::Grid;
use serde::Deserialize;

/// Corners of lassos and lines of one interaction, at most: each costs as much as its area.
const MOST_CORNERS: usize = 10_000;
/// Voxels that one interaction speaks of, at most.
const MOST_VOXELS: usize = 1_000_000;
/// Voxels within the corners of a lasso, at most: a slim one that lies across holds few of them.
const MOST_AREA: f64 = 4.0 * MOST_VOXELS as f64;
/// How often voxels are held against corners for the lassos of one interaction, at most.
const MOST_HELD: f64 = 4e9;

/// How messages name the memory that points and scribbles take.
const PLACES: &str = "the voxels of the prompts";

/// What is said in one interaction. Places are voxels of the scan, `[x, y, z]`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Said {
    points: Vec<Point>,
    #[serde(rename = "box")]
    bounds: Option<Ends>,
    scribbles: Vec<Scribble>,
    lassos: Vec<Lasso>,
    lines: Vec<Ends>,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Point {
    at: [f64; 3],
    #[serde(default = "yes")]
    on: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ends {
    from: [f64; 3],
    to: [f64; 3],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scribble {
    #[serde(default = "yes")]
    on: bool,
    voxels: Vec<[f64; 3]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lasso {
    #[serde(default = "yes")]
    on: bool,
    axis: usize,
    slice: f64,
    outline: Vec<[f64; 2]>,
}

impl Said {
    /// An error where lines and lassos are larger than any person draws: what they cost is known
    /// before they are followed.
    fn drawable(&self) -> Result<(), Failure> {
        for Ends { from, to } in &self.lines {
            let length = (0..3).map(|a| (to[a] - from[a]).abs()).fold(0.0, f64::max);
            if length > MOST_VOXELS as f64 {
                return Err(Failure::unfit(format!(
                    "a line of {length} voxels: at most {MOST_VOXELS} are accepted"
                )));
            }
        }
        let mut held = 0.0;
        for Lasso { outline, .. } in &self.lassos {
            let side = |n: usize| {
                let along = || outline.iter().map(|corner| corner[n]);
                let low = along().fold(f64::INFINITY, f64::min);
                (along().fold(f64::NEG_INFINITY, f64::max) - low + 1.0).max(1.0)
            };
            let area = side(0) * side(1);
            held += area * outline.len() as f64;
            if area > MOST_AREA || held > MOST_HELD {
                return Err(Failure::unfit(format!(
                    "a lasso over {area} voxels with {} corners: at most {MOST_AREA} voxels are \
                     accepted, and {MOST_HELD} voxels times corners over all lassos",
                    outline.len()
                )));
            }
        }
        Ok(())
    }

    /// What was said, as a session takes it.
    pub(super) fn prompts(&self, grid: &Grid) -> Result<Prompts, Failure> {
        let corners = self.lassos.iter().map(|l| l.outline.len()).sum::<usize>();
        if corners + self.lines.len() > MOST_CORNERS {
            return Err(Failure::unfit(format!(
                "{corners} corners of lassos and {} lines: at most {MOST_CORNERS} are accepted",
                self.lines.len()
            )));
        }
        self.drawable()?;
        let few = |voxels: usize| match voxels {
            0..=MOST_VOXELS => Ok(()),
            many => Err(Failure::unfit(format!(
                "the prompts cover {many} voxels: at most {MOST_VOXELS} are accepted"
            ))),
        };
        let places =
            self.points.len() + self.scribbles.iter().map(|s| s.voxels.len()).sum::<usize>();
        few(places)?;
        let mut prompts = Prompts { points: memory::room(PLACES, places)?, ..Prompts::default() };
        let points = self.points.iter().map(|p| (p.at, p.on));
        let painted = self.scribbles.iter().flat_map(|s| s.voxels.iter().map(move |v| (*v, s.on)));
        for (position, positive) in points.chain(painted) {
            let point = RawPoint { position, positive };
            prompts.add_point(grid, point, Space::Ijk)?;
        }
        if let Some(Ends { from, to }) = &self.bounds {
            // Both corners lie in the box.
            let face = |f: usize| match f {
                0..3 => from[f].min(to[f]),
                _ => from[f - 3].max(to[f - 3]) + 1.0,
            };
            let bounds = RawBox(std::array::from_fn(face));
            prompts.set_box(grid, bounds, Space::Ijk)?;
        }
        for Ends { from, to } in &self.lines {
            let ends = RawBox([from[0], from[1], from[2], to[0], to[1], to[2]]);
            prompts.add_line(grid, ends, Space::Ijk)?;
            few(prompts.points.len())?;
        }
        for lasso in &self.lassos {
            let corner = |[a, b]: [f64; 2]| match lasso.axis {
                0 => Ok([lasso.slice, a, b]),
                1 => Ok([a, lasso.slice, b]),
                2 => Ok([a, b, lasso.slice]),
                other => Err(Failure::unfit(format!("a lasso's axis is {other}, expected 0 to 2"))),
            };
            let corners =
                lasso.outline.iter().map(|c| corner(*c)).collect::<Result<Vec<_>, _>>()?;
            let mut drawn = Prompts::default();
            drawn.add_lasso(grid, &RawOutline(corners), Space::Ijk)?;
            if !lasso.on {
                // What is outlined does not lie on the object, and says nothing of its size.
                drawn.points.iter_mut().for_each(|(_, positive)| *positive = false);
                drawn.drawn = None;
            }
            prompts.join(&drawn)?;
            few(prompts.points.len())?;
        }
        match prompts.is_empty() && prompts.drawn.is_none() {
            true => Err(Failure::unfit(
                "no prompts: expected points, a box, scribbles, lassos or lines",
            )),
            false => Ok(prompts),
        }
    }
}

/// What a body says on a scan.
pub fn prompts_of(bytes: &[u8], grid: &Grid) -> Result<Prompts, Failure> {
    let said: Said = json_of(bytes)?;
    said.prompts(grid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;
    use axum::http::StatusCode;

    #[test]
    fn prompts_are_read_as_documented() {
        let grid = Grid { size: [40, 30, 20], affine: Affine::from_spacing([1.0; 3]) };
        let of = |text: &str| prompts_of(text.as_bytes(), &grid);
        let said = of("{\"points\":[{\"at\":[1,2,3]},{\"at\":[4,5,6],\"on\":false}],\
             \"box\":{\"from\":[9,8,7],\"to\":[1,2,3]},\
             \"scribbles\":[{\"on\":false,\"voxels\":[[7,8,9]]}]}")
        .unwrap();
        assert_eq!(said.points, [([1, 2, 3], true), ([4, 5, 6], false), ([7, 8, 9], false)]);
        // Both corners lie in the box, in whatever order.
        assert_eq!(said.bounds, Some([1, 2, 3, 10, 9, 8]));
        let outline = "[[5,5],[5,15],[15,15],[15,5]]";
        for (axis, at) in [(0, [7, 10, 10]), (1, [10, 7, 10]), (2, [10, 10, 7])] {
            let lasso = |on: bool| {
                of(&format!(
                    "{{\"lassos\":[{{\"on\":{on},\"axis\":{axis},\"slice\":7,\"outline\":{outline}}}]}}"
                ))
                .unwrap()
            };
            let (on, off) = (lasso(true), lasso(false));
            assert!(on.points.contains(&(at, true)) && on.drawn.is_some(), "{axis}");
            assert!(off.points.contains(&(at, false)) && off.drawn.is_none(), "{axis}");
        }
        let line = of("{\"lines\":[{\"from\":[5,5,5],\"to\":[15,5,5]}]}").unwrap();
        assert!(line.drawn.is_some() && line.points.contains(&([10, 5, 5], true)));
        // What costs more than any person draws.
        let list = |one: &str, count: usize| vec![one; count].join(",");
        let many_corners = format!(
            "{{\"lassos\":[{{\"axis\":0,\"slice\":7,\"outline\":[{}]}}]}}",
            list("[5,5],[5,15],[15,15]", 3334)
        );
        let many_voxels =
            format!("{{\"scribbles\":[{{\"voxels\":[{}]}}]}}", list("[1,2,3]", MOST_VOXELS + 1));
        // What a small text may ask for on a large slice.
        let wide = Grid { size: [30_000, 30_000, 1], affine: Affine::from_spacing([1.0; 3]) };
        let outline = |side: usize, times: usize| {
            let corners = format!("[0,0],[0,{side}],[{side},{side}],[{side},0]");
            format!(
                "{{\"lassos\":[{{\"axis\":2,\"slice\":0,\"outline\":[{}]}}]}}",
                list(corners.as_str(), times)
            )
        };
        let line = "{\"lines\":[{\"from\":[0,0,0],\"to\":[2e6,0,0]}]}";
        for (text, says) in [
            (outline(29_999, 1), "lasso over 900000000 voxels with 4 corners"),
            (outline(1_999, 251), "lasso over 4000000 voxels with 1004 corners"),
            (line.to_string(), "line of 2000000 voxels"),
        ] {
            let said: Said = json_of(text.as_bytes()).unwrap();
            let failure = said.prompts(&wide).unwrap_err();
            assert!(format!("{failure:?}").contains(says), "{failure:?}");
            assert_eq!(failure.reply("error").status(), StatusCode::UNPROCESSABLE_ENTITY);
        }
        let failure = of(&many_corners).unwrap_err();
        assert!(format!("{failure:?}").contains("10002 corners"), "{failure:?}");
        for (text, status) in [
            ("", StatusCode::UNPROCESSABLE_ENTITY),
            ("{}", StatusCode::UNPROCESSABLE_ENTITY),
            ("{\"points\":[{\"at\":[40,0,0]}]}", StatusCode::UNPROCESSABLE_ENTITY),
            ("{\"points\":[{\"at\":[0.5,0,0]}]}", StatusCode::UNPROCESSABLE_ENTITY),
            (
                "{\"lassos\":[{\"axis\":3,\"slice\":1,\"outline\":[[1,1]]}]}",
                StatusCode::UNPROCESSABLE_ENTITY,
            ),
            (many_corners.as_str(), StatusCode::UNPROCESSABLE_ENTITY),
            (many_voxels.as_str(), StatusCode::UNPROCESSABLE_ENTITY),
            ("{\"point\":[]}", StatusCode::BAD_REQUEST),
            ("{\"points\":[{\"at\":[1,2]}]}", StatusCode::BAD_REQUEST),
            ("garbage", StatusCode::BAD_REQUEST),
        ] {
            let failure = of(text).unwrap_err();
            assert_eq!(failure.reply("error").status(), status, "{text}");
        }
    }
}
