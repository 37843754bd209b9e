//! The colours of objects for which none was chosen.

/// Colours of objects in order, repeated from the first; distinguishable with red-green colour
/// blindness. The first is that of a single object.
pub const PALETTE: [[u8; 3]; 8] = [
    [255, 199, 0],
    [86, 180, 233],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [0, 114, 178],
    [240, 228, 66],
    [170, 170, 170],
];

/// The colour of an object for which none was chosen, by the number of objects before it.
pub fn default_colour(before: usize) -> [u8; 3] {
    PALETTE[before % PALETTE.len()]
}

/// Red, green and blue, from 0 to 1.
pub(super) fn parts_of_one(colour: [u8; 3]) -> [f64; 3] {
    colour.map(|c| f64::from(c) / 255.0)
}
