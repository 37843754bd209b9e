//! The scalar types that files store voxels in.

/// Reads one little-endian value.
pub type Decode = fn(&[u8]) -> f32;

/// A type by its name: the name, its bytes, and how a value is read.
pub fn element(name: &str) -> Option<(&'static str, usize, Decode)> {
    macro_rules! of {
        ($name:literal, $t:ty) => {
            ($name, size_of::<$t>(), |b: &[u8]| <$t>::from_le_bytes(std::array::from_fn(|i| b[i])) as f32)
        };
    }
    Some(match name {
        "int8" => of!("int8", i8),
        "uint8" => of!("uint8", u8),
        "int16" => of!("int16", i16),
        "uint16" => of!("uint16", u16),
        "int32" => of!("int32", i32),
        "uint32" => of!("uint32", u32),
        "int64" => of!("int64", i64),
        "uint64" => of!("uint64", u64),
        "float32" => of!("float32", f32),
        "float64" => of!("float64", f64),
        _ => return None,
    })
}
