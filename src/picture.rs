//! RGB pictures, written as PNG: the ground of previews, curves and montages.

use font8x8::UnicodeFonts;
use std::path::Path;

/// An RGB picture.
pub struct Picture {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    pixels: Vec<u8>,
}

/// Pixels from one character to the next at scale 1.
pub const CHARACTER: usize = 8;

impl Picture {
    /// A picture of one colour.
    pub fn new(width: usize, height: usize, colour: [u8; 3]) -> Picture {
        Picture { width, height, pixels: colour.into_iter().cycle().take(width * height * 3).collect() }
    }

    /// Sets a pixel; nothing outside.
    pub fn set(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        if x < self.width && y < self.height {
            self.pixels[(y * self.width + x) * 3..][..3].copy_from_slice(&colour);
        }
    }

    /// Mixes a colour into a pixel.
    pub fn blend(&mut self, x: usize, y: usize, colour: [u8; 3], part: f32) {
        if x < self.width && y < self.height {
            let at = &mut self.pixels[(y * self.width + x) * 3..][..3];
            at.iter_mut().zip(colour).for_each(|(v, c)| *v = (*v as f32 + part * (c as f32 - *v as f32)).round() as u8);
        }
    }

    /// A straight line, two pixels thick.
    pub fn line(&mut self, from: [f64; 2], to: [f64; 2], colour: [u8; 3]) {
        let steps = (from[0] - to[0]).abs().max((from[1] - to[1]).abs()).ceil().max(1.0) as usize;
        for s in 0..=steps {
            let way = s as f64 / steps as f64;
            let at: [f64; 2] = std::array::from_fn(|a| from[a] + way * (to[a] - from[a]));
            if at.iter().all(|v| *v >= 0.0) {
                let [x, y] = at.map(|v| v as usize);
                [(0, 0), (1, 0), (0, 1), (1, 1)].iter().for_each(|(dx, dy)| self.set(x + dx, y + dy, colour));
            }
        }
    }

    /// Text from its top left corner; characters that the font lacks are left out.
    pub fn text(&mut self, text: &str, left: usize, top: usize, scale: usize, colour: [u8; 3]) {
        for (at, glyph) in text.chars().map(|c| font8x8::BASIC_FONTS.get(c).unwrap_or_default()).enumerate() {
            for (row, bits) in glyph.iter().enumerate() {
                for column in (0..8).filter(|c| bits >> c & 1 == 1) {
                    for (dx, dy) in (0..scale).flat_map(|dx| (0..scale).map(move |dy| (dx, dy))) {
                        self.set(left + (at * CHARACTER + column) * scale + dx, top + row * scale + dy, colour);
                    }
                }
            }
        }
    }

    /// Writes it as PNG.
    pub fn save(&self, path: &Path) -> Result<(), String> {
        let file = std::fs::File::create(path).map_err(|e| e.to_string())?;
        let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(|e| e.to_string())?;
        writer.write_image_data(&self.pixels).map_err(|e| e.to_string())?;
        writer.finish().map_err(|e| e.to_string())
    }

    /// Writes it whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let fail = |e: String| format!("{}: {e}", path.display());
        let pending = crate::output::Pending::new(path, "").map_err(|e| fail(e.to_string()))?;
        self.save(pending.path()).map_err(fail)?;
        pending.commit().map_err(|e| fail(e.to_string()))
    }
}

/// Colours of series, told apart also by people who see few colours (Okabe and Ito).
pub const SERIES: [[u8; 3]; 7] = [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [60, 60, 60]];

/// A line of a chart.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points from left to right.
    pub points: Vec<[f64; 2]>,
    /// Half the height of a band around each point, where there is one.
    pub band: Vec<f64>,
}

/// A chart of lines over a common axis.
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below it.
    pub across: String,
    /// The lines.
    pub series: Vec<Series>,
    /// Lowest and highest value shown; of the data where none.
    pub range: Option<[f64; 2]>,
}

/// A round step that divides a span into about `parts`.
fn step(span: f64, parts: f64) -> f64 {
    let raw = (span / parts).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(raw.log10().floor());
    power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= raw).unwrap_or(10.0)
}

impl Chart {
    /// Draws it, 900 by 540 pixels.
    pub fn draw(&self) -> Picture {
        const LEFT: usize = 70;
        const RIGHT: usize = 20;
        const TOP: usize = 44;
        const BOTTOM: usize = 52;
        let mut picture = Picture::new(900, 540, [255; 3]);
        let finite = || self.series.iter().flat_map(|s| &s.points).filter(|p| p.iter().all(|v| v.is_finite()));
        let bounds = |axis: usize| finite().fold([f64::INFINITY, f64::NEG_INFINITY], |b, p| [b[0].min(p[axis]), b[1].max(p[axis])]);
        let wide = |b: [f64; 2]| {
            if b[0] < b[1] {
                b
            } else if b[0].is_finite() {
                [b[0] - 0.5, b[0] + 0.5]
            } else {
                [0.0, 1.0]
            }
        };
        let (x, y) = (wide(bounds(0)), self.range.unwrap_or_else(|| wide(bounds(1))));
        let (width, height) = ((picture.width - LEFT - RIGHT) as f64, (picture.height - TOP - BOTTOM) as f64);
        let place = |p: [f64; 2]| -> [f64; 2] {
            let part = [(p[0] - x[0]) / (x[1] - x[0]), ((p[1] - y[0]) / (y[1] - y[0])).clamp(0.0, 1.0)];
            [LEFT as f64 + part[0] * width, TOP as f64 + (1.0 - part[1]) * height]
        };
        let ink = [40; 3];
        picture.text(&self.title, LEFT, 14, 2, ink);
        let middle = (picture.width - self.across.len() * CHARACTER) / 2;
        picture.text(&self.across, middle, 540 - 18, 1, ink);
        for (axis, span) in [(0, x), (1, y)] {
            let step = step(span[1] - span[0], 7.0);
            let digits = (-step.log10().floor()).max(0.0) as usize;
            let mut v = (span[0] / step).ceil() * step;
            while v <= span[1] + 1e-9 * step {
                let label = format!("{v:.digits$}");
                if axis == 0 {
                    let [px, _] = place([v, y[0]]);
                    picture.line([px, TOP as f64], [px, TOP as f64 + height], [232; 3]);
                    picture.text(&label, (px as usize).saturating_sub(label.len() * 4), 540 - BOTTOM + 8, 1, ink);
                } else {
                    let [_, py] = place([x[0], v]);
                    picture.line([LEFT as f64, py], [LEFT as f64 + width, py], [232; 3]);
                    picture.text(&label, LEFT.saturating_sub(label.len() * 8 + 6), (py as usize).saturating_sub(4), 1, ink);
                }
                v += step;
            }
        }
        for (n, series) in self.series.iter().enumerate() {
            let colour = SERIES[n % SERIES.len()];
            for pair in 1..series.points.len().min(series.band.len()) {
                let (a, b) = (series.points[pair - 1], series.points[pair]);
                let (from, to) = (place(a)[0] as usize, place(b)[0] as usize);
                for px in from..=to {
                    let way = if to > from { (px - from) as f64 / (to - from) as f64 } else { 0.0 };
                    let mix = |p: f64, q: f64| p + way * (q - p);
                    let (value, half) = (mix(a[1], b[1]), mix(series.band[pair - 1], series.band[pair]));
                    let (top, bottom) = (place([a[0], value + half])[1] as usize, place([a[0], value - half])[1] as usize);
                    (top..=bottom).for_each(|py| picture.blend(px, py, colour, 0.18));
                }
            }
            for pair in series.points.windows(2).filter(|p| p.iter().flatten().all(|v| v.is_finite())) {
                picture.line(place(pair[0]), place(pair[1]), colour);
            }
            picture.text(&series.name, LEFT + 14, TOP + 12 + n * 14, 1, colour);
        }
        picture
    }
}
