//! Instruction sets: what kernels are compiled for, and proof that the processor has it.
//!
//! Functions compiled for more than the compiler's target guarantees are chosen by an [`Isa`]. An
//! [`Isa`] of a level exists only if the processor has every feature that functions of that level
//! are compiled for: the compiler and the processor are given the same list.

use super::DeviceError;
use std::fmt;

/// Hands the list of instruction sets to a macro: `levels! { [macro] arguments }` calls
/// `macro! { arguments floats [..] bf16_pairs [..] }`.
///
/// `floats` has a line for each [`Level`] beyond the portable one, lesser ones first: its
/// architecture, the name of the level and of its registers in `simd`, its name for users, and its
/// features with all that they imply. `bf16_pairs` has an extension that a level may have, products
/// of pairs of bfloat16: architecture, level, the name of the registers, features.
macro_rules! levels {
    ([$($then:tt)*] $($arguments:tt)*) => {
        $($then)*! {
            $($arguments)*
            floats [
                /// NEON: 4 floats.
                ("aarch64", Neon, "neon", ["neon"])
                /// AVX2 and FMA: 8 floats.
                ("x86_64", Avx2, "avx2", [
                    "sse3" "ssse3" "sse4.1" "sse4.2" "avx" "avx2" "fma"
                ])
                /// AVX-512 with its F, VL, DQ and BW parts: 16 floats.
                ("x86_64", Avx512, "avx512", [
                    "sse3" "ssse3" "sse4.1" "sse4.2" "avx" "avx2" "fma" "f16c"
                    "avx512f" "avx512vl" "avx512dq" "avx512bw"
                ])
            ]
            bf16_pairs [
                ("x86_64", Avx512, Avx512Bf16, [
                    "sse3" "ssse3" "sse4.1" "sse4.2" "avx" "avx2" "fma" "f16c"
                    "avx512f" "avx512vl" "avx512dq" "avx512bw" "avx512bf16"
                ])
            ]
        }
    };
}
pub(crate) use levels;

/// Compiles a function for a list of features: `enable! { [features] fn .. }`.
macro_rules! enable {
    ([$($feature:tt)*] $($function:tt)*) => {
        $(#[target_feature(enable = $feature)])*
        $($function)*
    };
}
pub(crate) use enable;

/// Whether the processor has all of a list of features of its architecture.
macro_rules! detected {
    ("x86_64" [$($feature:tt)*]) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
    ("aarch64" [$($feature:tt)*]) => { $(std::arch::is_aarch64_feature_detected!($feature))&&* };
}

/// Makes [`Level`] from the list.
macro_rules! define_level {
    (
        floats [$($(#[$doc:meta])* ($arch:tt, $level:ident, $name:tt, $features:tt))*]
        bf16_pairs [$(($pair_arch:tt, $pair_level:ident, $pair_simd:ident, $pair_features:tt))*]
    ) => {
        /// The name of an instruction set with kernels of its own; of each architecture, the best
        /// comes last.
        ///
        /// It says nothing of this processor: an [`Isa`] does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Level {
            /// Only what the compiler's target guarantees.
            Portable,
            $($(#[$doc])* $level,)*
        }

        impl Level {
            /// All levels, those of other architectures too.
            pub const ALL: &'static [Level] = &[Level::Portable, $(Level::$level),*];

            /// The name of the level for users.
            fn name(self) -> &'static str {
                match self {
                    Level::Portable => "portable",
                    $(Level::$level => $name,)*
                }
            }

            /// Whether this processor has it.
            fn is_here(self) -> bool {
                match self {
                    Level::Portable => true,
                    $(#[cfg(target_arch = $arch)] Level::$level => detected!($arch $features),)*
                    // Levels of other architectures.
                    _ => false,
                }
            }

            /// Whether this processor, which has the level, also has products of pairs of bfloat16.
            #[allow(clippy::match_single_binding)]
            fn has_bf16_pairs(self) -> bool {
                match self {
                    $(
                        #[cfg(target_arch = $pair_arch)]
                        Level::$pair_level => detected!($pair_arch $pair_features),
                    )*
                    _ => false,
                }
            }
        }
    };
}
levels! { [define_level] }

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An instruction set that this processor has.
///
/// An `Isa` is made only by asking the processor, so code that holds one may call the functions
/// that are compiled for its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa {
    level: Level,
    /// Whether products are of pairs of bfloat16, if there is a choice.
    bf16_pairs: bool,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.level.fmt(f)
    }
}

impl Isa {
    /// The instruction set of kernels that run on every processor of the compiler's target.
    pub const PORTABLE: Isa = Isa { level: Level::Portable, bf16_pairs: false };

    /// The instruction set of a level, if this processor has it.
    pub fn new(level: Level) -> Option<Isa> {
        level.is_here().then_some(Isa { level, bf16_pairs: false })
    }

    /// All instruction sets that this processor has, the best last.
    pub fn available() -> impl Iterator<Item = Isa> {
        Level::ALL.iter().copied().filter_map(Isa::new)
    }

    /// The best instruction set that this processor has, [`Isa::PORTABLE`] if no other.
    pub fn best() -> Isa {
        Level::ALL.iter().rev().copied().find_map(Isa::new).unwrap_or(Isa::PORTABLE)
    }

    /// The instruction set called `portable`, `neon`, `avx2` or `avx512`.
    ///
    /// # Errors
    /// There is none of that name, or this processor does not have it.
    pub fn named(name: &str) -> Result<Isa, DeviceError> {
        let refused =
            |problem| DeviceError::Isa { asked: name.to_string(), problem, best: Isa::best() };
        let level = Level::ALL
            .iter()
            .copied()
            .find(|level| level.name() == name)
            .ok_or_else(|| refused("not a known instruction set"))?;
        Isa::new(level).ok_or_else(|| refused("this processor does not have it"))
    }

    /// The names of all levels.
    pub(super) fn names() -> String {
        Level::ALL.iter().map(|level| level.name()).collect::<Vec<_>>().join(", ")
    }

    /// The best instruction set of this processor, or the lesser one that the environment variable
    /// `PRISM_ISA` names.
    ///
    /// # Errors
    /// Those of [`Isa::named`].
    pub fn from_env() -> Result<Isa, DeviceError> {
        match std::env::var("PRISM_ISA") {
            Ok(name) if !name.is_empty() => Isa::named(&name),
            _ => Ok(Isa::best()),
        }
    }

    /// The level of this instruction set, to dispatch by.
    pub fn level(self) -> Level {
        self.level
    }

    /// Whether the processor also multiplies pairs of bfloat16 at this level (AVX512-BF16).
    pub fn has_bf16(self) -> bool {
        self.level.has_bf16_pairs()
    }

    /// This instruction set with products of pairs of bfloat16, if the processor has them.
    pub(crate) fn with_bf16_pairs(self) -> Option<Isa> {
        self.has_bf16().then_some(Isa { bf16_pairs: true, ..self })
    }

    /// Whether products are of pairs of bfloat16: true only if made by [`Isa::with_bf16_pairs`].
    pub(crate) fn bf16_pairs(self) -> bool {
        self.bf16_pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn functions_are_compiled_for_nothing_that_the_processor_is_not_asked_for() {
        // Features are enabled, and checked for, only by the two macros here that are given lists,
        // and nowhere else.
        let own = include_str!("isa.rs");
        let own = &own[..own.find("#[cfg(test)]").expect("the tests come last")];
        for (what, times) in [("target_feature(", 1), ("_feature_detected!(", 2)] {
            assert_eq!(own.matches(what).count(), times, "{what}");
        }
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
                        !text.contains("target_feature(") && !text.contains("_feature_detected!"),
                        "{} names features itself",
                        path.display()
                    );
                    files += 1;
                }
            }
        }
        assert!(files > 100, "only {files} files were looked at");
    }

    /// A feature that another implies and that no list names would be enabled without a check.
    #[test]
    fn lists_name_what_their_features_imply() {
        const IMPLIED: [(&str, &[&str]); 12] = [
            ("ssse3", &["sse3"]),
            ("sse4.1", &["ssse3"]),
            ("sse4.2", &["sse4.1"]),
            ("avx", &["sse4.2"]),
            ("f16c", &["avx"]),
            ("fma", &["avx"]),
            ("avx2", &["avx"]),
            ("avx512f", &["avx2", "fma", "f16c"]),
            ("avx512vl", &["avx512f"]),
            ("avx512dq", &["avx512f"]),
            ("avx512bw", &["avx512f"]),
            ("avx512bf16", &["avx512bw"]),
        ];
        macro_rules! lists {
            (
                floats [$($(#[$doc:meta])* ($a:tt, $level:ident, $name:tt, [$($float:tt)*]))*]
                bf16_pairs [$(($b:tt, $of:ident, $simd:ident, [$($pair:tt)*]))*]
            ) => {
                [$(&[$($float),*][..],)* $(&[$($pair),*][..]),*]
            };
        }
        let lists: [&[&str]; 4] = levels! { [lists] };
        for list in lists {
            for feature in list {
                let implied = IMPLIED.iter().find(|(name, _)| name == feature);
                for implied in implied.map_or(&[][..], |(_, implied)| *implied) {
                    assert!(list.contains(implied), "{feature} without {implied} in {list:?}");
                }
            }
        }
        assert!(lists.concat().contains(&"avx512bf16"), "{lists:?}");
    }

    #[test]
    fn an_isa_is_one_that_the_processor_has() {
        let all: Vec<Isa> = Isa::available().collect();
        assert!(all.is_sorted());
        assert_eq!((all.first(), all.last()), (Some(&Isa::PORTABLE), Some(&Isa::best())));
        for level in Level::ALL.iter().copied() {
            let isa = Isa::new(level);
            // Each level of an architecture has the features of lesser ones.
            let is_of_here = match level {
                Level::Portable => true,
                Level::Neon => cfg!(target_arch = "aarch64"),
                Level::Avx2 | Level::Avx512 => cfg!(target_arch = "x86_64"),
            };
            assert_eq!(isa.is_some(), is_of_here && level <= Isa::best().level(), "{level}");
            assert_eq!(Isa::named(&level.to_string()).ok(), isa, "{level}");
        }
        assert!(Isa::named("sse2").is_err());
        assert!(!Isa::PORTABLE.has_bf16() && Isa::PORTABLE.with_bf16_pairs().is_none());
        for isa in all {
            assert_eq!(
                isa.with_bf16_pairs().map(Isa::level),
                isa.has_bf16().then_some(isa.level())
            );
            assert!(!isa.bf16_pairs() && isa.with_bf16_pairs().is_none_or(Isa::bf16_pairs));
        }
    }
}
