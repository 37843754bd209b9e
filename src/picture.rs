//! RGB pictures, written as PNG: the basis of the program's previews and montages.

use crate::memory;
use crate::output::Pending;
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
pub(crate) const CHARACTER: usize = 8;

impl Picture {
    /// A picture of one colour. Unwinds to [`memory::caught`] if memory for it is refused.
    pub fn new(width: usize, height: usize, colour: [u8; 3]) -> Picture {
        let bytes = memory::extent(&[width, height, 3]).unwrap_or(usize::MAX);
        let mut pixels = memory::list("a picture", bytes);
        pixels.extend(colour.into_iter().cycle().take(bytes));
        Picture { width, height, pixels }
    }

    /// Sets a pixel; does nothing outside the picture.
    pub fn set(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        if x < self.width && y < self.height {
            self.pixels[(y * self.width + x) * 3..][..3].copy_from_slice(&colour);
        }
    }

    /// The colour of a pixel; none outside.
    pub fn get(&self, x: usize, y: usize) -> Option<[u8; 3]> {
        let at = (y * self.width + x) * 3;
        (x < self.width && y < self.height)
            .then(|| [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]])
    }

    /// Sets the pixels of a rectangle.
    pub fn fill(&mut self, left: usize, top: usize, width: usize, height: usize, colour: [u8; 3]) {
        for (x, y) in (top..top + height).flat_map(|y| (left..left + width).map(move |x| (x, y))) {
            self.set(x, y, colour);
        }
    }

    /// Mixes `part` (0 to 1) of a colour into a pixel; does nothing outside the picture.
    pub fn blend(&mut self, x: usize, y: usize, colour: [u8; 3], part: f32) {
        if x < self.width && y < self.height {
            let at = &mut self.pixels[(y * self.width + x) * 3..][..3];
            at.iter_mut()
                .zip(colour)
                .for_each(|(v, c)| *v = (*v as f32 + part * (c as f32 - *v as f32)).round() as u8);
        }
    }

    /// Text from its top left corner; characters that the font lacks are left out.
    pub fn text(&mut self, text: &str, left: usize, top: usize, scale: usize, colour: [u8; 3]) {
        for (at, glyph) in
            text.chars().map(|c| font8x8::BASIC_FONTS.get(c).unwrap_or_default()).enumerate()
        {
            for (row, bits) in glyph.iter().enumerate() {
                for column in (0..8).filter(|c| bits >> c & 1 == 1) {
                    for (dx, dy) in (0..scale).flat_map(|dx| (0..scale).map(move |dy| (dx, dy))) {
                        self.set(
                            left + (at * CHARACTER + column) * scale + dx,
                            top + row * scale + dy,
                            colour,
                        );
                    }
                }
            }
        }
    }

    /// The picture as the bytes of a PNG file.
    ///
    /// # Errors
    /// Those of the encoder, as text.
    pub fn png(&self) -> Result<Vec<u8>, String> {
        let mut bytes = vec![];
        self.encode(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes the picture as PNG into a file that is not in its place yet.
    ///
    /// # Errors
    /// The file cannot be written; the message does not name it.
    pub(crate) fn put(&self, pending: &Pending) -> Result<(), String> {
        let file = pending.open().map_err(|e| e.to_string())?;
        self.encode(std::io::BufWriter::new(file))
    }

    fn encode(&self, to: impl std::io::Write) -> Result<(), String> {
        let mut encoder = png::Encoder::new(to, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(|e| e.to_string())?;
        writer.write_image_data(&self.pixels).map_err(|e| e.to_string())?;
        writer.finish().map_err(|e| e.to_string())
    }

    /// Writes the picture as PNG, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written; the message names it.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let fail = |e: String| format!("{}: {e}", path.display());
        let pending = Pending::new(path, "").map_err(|e| fail(e.to_string()))?;
        self.put(&pending).map_err(fail)?;
        pending.commit().map_err(|e| fail(e.to_string()))
    }
}
