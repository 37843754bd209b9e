//! Thinning of a plane region to its centrelines.

use crate::memory;

/// The name of the pixels of a line in refusals of memory.
const PIXELS: &str = "the pixels of a line";

/// Thins `mask` `[rows][columns]` of zeros and ones in place (Zhang and Suen, 1984), after clearing
/// the pixels on the border.
pub fn thin(mask: &mut [u8], rows: usize, columns: usize) {
    debug_assert_eq!(mask.len(), rows * columns);
    if rows < 3 || columns < 3 {
        return mask.fill(0);
    }
    for i in 0..rows {
        mask[i * columns] = 0;
        mask[(i + 1) * columns - 1] = 0;
    }
    mask[..columns].fill(0);
    mask[(rows - 1) * columns..].fill(0);
    let marked = mask.iter().filter(|v| **v != 0).count();
    let mut alive: Vec<usize> = memory::list(PIXELS, marked);
    alive.extend((0..mask.len()).filter(|&p| mask[p] != 0));
    let mut doomed = memory::list(PIXELS, marked);
    loop {
        let before = alive.len();
        for second in [false, true] {
            doomed.clear();
            doomed.extend(alive.iter().copied().filter(|&p| goes(mask, p, columns, second)));
            doomed.iter().for_each(|&p| mask[p] = 0);
            alive.retain(|&p| mask[p] != 0);
        }
        if alive.len() == before {
            return;
        }
    }
}

/// Whether a pixel is removed in the first or second half of a pass.
fn goes(mask: &[u8], p: usize, columns: usize, second: bool) -> bool {
    // Around the pixel from above it, clockwise.
    let (up, down) = (p - columns, p + columns);
    let ring = [up, up + 1, p + 1, down + 1, down, down - 1, p - 1, up - 1].map(|q| mask[q] != 0);
    let neighbours = ring.iter().filter(|v| **v).count();
    let rises = (0..8).filter(|&i| !ring[i] && ring[(i + 1) % 8]).count();
    let [above, right, below, left] = [ring[0], ring[2], ring[4], ring[6]];
    let open = match second {
        false => !(right && below && (above || left)),
        true => !(above && left && (right || below)),
    };
    (2..=6).contains(&neighbours) && rises == 1 && open
}

#[cfg(test)]
mod tests {
    use super::thin;

    #[test]
    fn a_bar_becomes_a_line_and_a_pixel_stays() {
        let (rows, columns) = (9, 20);
        let mut mask = vec![0u8; rows * columns];
        for i in 3..6 {
            mask[i * columns + 3..i * columns + 17].fill(1);
        }
        thin(&mut mask, rows, columns);
        assert!(
            (0..rows)
                .filter(|i| *i != 4)
                .all(|i| mask[i * columns..][..columns].iter().all(|v| *v == 0))
        );
        assert!(mask[4 * columns + 6..4 * columns + 14].iter().all(|v| *v == 1));
        let mut one = vec![0u8; 25];
        one[12] = 1;
        thin(&mut one, 5, 5);
        assert_eq!(one.iter().map(|v| *v as usize).sum::<usize>(), 1);
        let mut whole = vec![1u8; 4];
        thin(&mut whole, 2, 2);
        assert_eq!(whole, [0; 4]);
    }
}
