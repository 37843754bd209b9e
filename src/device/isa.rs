//! Instruction sets: what kernels are compiled for, and proof that the processor has it.
//!
//! Functions compiled for more than the compiler's target guarantees are chosen by an [`Isa`].
//! There is none of a level unless the processor has every feature that functions of that level are
//! compiled for: the compiler and the processor are given the same lists.

use super::DeviceError;
use std::fmt;

/// Lists of features. `features! { enable LIST; fn .. }` compiles a function for one,
/// `features!(detect LIST)` asks the processor for all of it. What the features of a list imply
/// stands in it or in a lesser level's.
macro_rules! features {
    (enable portable; $($item:tt)*) => { $($item)* };
    // Registers of eight floats.
    ($what:ident avx2 $($rest:tt)*) => {
        $crate::device::features! { @$what ["sse3" "ssse3" "sse4.1" "sse4.2" "avx" "avx2" "fma"] $($rest)* }
    };
    // Registers of sixteen floats.
    ($what:ident avx512 $($rest:tt)*) => {
        $crate::device::features! { @$what ["f16c" "avx512f" "avx512vl"] $($rest)* }
    };
    // Loops that the compiler vectorises.
    ($what:ident avx512_loops $($rest:tt)*) => {
        $crate::device::features! { @$what ["f16c" "avx512f" "avx512vl" "avx512dq" "avx512bw"] $($rest)* }
    };
    // Registers of sixteen pairs of bfloat16.
    ($what:ident bf16 $($rest:tt)*) => {
        $crate::device::features! { @$what ["f16c" "avx512f" "avx512vl" "avx512bw" "avx512bf16"] $($rest)* }
    };
    (@enable [$($feature:tt)*]; $($item:tt)*) => { $(#[target_feature(enable = $feature)])* $($item)* };
    (@detect [$($feature:tt)*]) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
}
pub(crate) use features;

/// Instruction sets with kernels of their own, best last. A name alone: that the processor has one
/// is what an [`Isa`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the compiler's target guarantees.
    Portable,
    /// AVX2 and FMA: 8 floats.
    Avx2,
    /// AVX-512 with its F, VL, DQ and BW parts: 16 floats.
    Avx512,
}

impl Level {
    /// All of them, best last.
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        })
    }
}

/// An instruction set that this processor has.
///
/// One is made by asking the processor alone, so code that holds one may call the functions that
/// are compiled for its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Isa {
    /// What every processor has.
    pub const PORTABLE: Isa = Isa(Level::Portable);

    /// That of a level, if this processor has it.
    pub fn new(level: Level) -> Option<Isa> {
        let is_there = match level {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => features!(detect avx2),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                features!(detect avx2) && features!(detect avx512) && features!(detect avx512_loops)
            }
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => false,
        };
        is_there.then_some(Isa(level))
    }

    /// All that this processor has, best last.
    pub fn available() -> impl Iterator<Item = Isa> {
        Level::ALL.into_iter().filter_map(Isa::new)
    }

    /// The best this processor has.
    pub fn best() -> Isa {
        Level::ALL.into_iter().rev().find_map(Isa::new).unwrap_or(Isa::PORTABLE)
    }

    /// That of a level's name: `portable`, `avx2` or `avx512`.
    pub fn named(name: &str) -> Result<Isa, DeviceError> {
        let refused =
            |problem| DeviceError::Isa { asked: name.to_string(), problem, best: Isa::best() };
        let level = Level::ALL
            .into_iter()
            .find(|level| level.to_string() == name)
            .ok_or_else(|| refused("not a known instruction set"))?;
        Isa::new(level).ok_or_else(|| refused("this processor does not have it"))
    }

    /// The best, or a lesser one that the environment variable `PRISM_ISA` names.
    pub fn from_env() -> Result<Isa, DeviceError> {
        match std::env::var("PRISM_ISA") {
            Ok(name) if !name.is_empty() => Isa::named(&name),
            _ => Ok(Isa::best()),
        }
    }

    /// Its level, to choose by.
    pub fn level(self) -> Level {
        self.0
    }

    /// Whether the processor has products of pairs of bfloat16 beside it.
    pub fn has_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Level::Avx512 && features!(detect bf16) {
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn functions_are_compiled_for_nothing_that_the_processor_is_not_asked_for() {
        let own = include_str!("isa.rs");
        let lists: Vec<&str> = own
            .lines()
            .filter_map(|line| line.trim().strip_prefix("($what:ident ")?.split(' ').next())
            .collect();
        assert_eq!(lists, ["avx2", "avx512", "avx512_loops", "bf16"]);
        for list in lists {
            assert!(own.contains(&format!("features!(detect {list})")), "nobody asks for {list}");
        }
        // And for nothing but the lists.
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        let mut files = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs")
                    && !path.ends_with("device/isa.rs")
                {
                    let text = std::fs::read_to_string(&path).unwrap();
                    assert!(
                        !text.contains("target_feature("),
                        "{} names features itself",
                        path.display()
                    );
                    files += 1;
                }
            }
        }
        assert!(files > 100, "only {files} files were looked at");
    }

    #[test]
    fn an_isa_is_one_that_the_processor_has() {
        let all: Vec<Isa> = Isa::available().collect();
        assert!(all.is_sorted());
        assert_eq!((all.first(), all.last()), (Some(&Isa::PORTABLE), Some(&Isa::best())));
        for level in Level::ALL {
            let isa = Isa::new(level);
            assert_eq!(isa.is_some(), level <= Isa::best().level(), "{level}");
            assert_eq!(Isa::named(&level.to_string()).ok(), isa, "{level}");
        }
        assert!(Isa::named("sse2").is_err());
        assert!(!Isa::PORTABLE.has_bf16());
    }
}
