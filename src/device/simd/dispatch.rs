//! Dispatch from an [`Isa`](crate::device::Isa) to functions that are compiled for it.

/// Compiles functions once per instruction set, and selects the value that uses those of the
/// instruction set at hand:
///
/// ```text
/// dispatch! { isa, S: Values, {
///     /// # Safety
///     /// The processor has the instruction set of `S`.
///     unsafe fn compiled(x: &[f32]) -> f32 {
///         // SAFETY: guaranteed by the caller.
///         unsafe { body::<S>(x) }
///     }
/// } =>
/// // SAFETY: the Isa was made by asking the processor.
/// unsafe { compiled(x) } }
/// ```
///
/// `S` is the type of the registers. It is one of plain floats where `S: Values` is asked for; with
/// `S: Simd` it is one whose factors are pairs of bfloat16 where the `Isa` says so
/// (`Isa::with_bf16_pairs`). The functions are `unsafe`, and pass on to generic ones that are
/// `#[inline(always)]`. Each is compiled for the features that the processor was asked for before
/// there was such an `Isa`: the list is `levels!`, in `device/isa.rs`.
macro_rules! dispatch {
    (@values ($isa:expr) $simd:ident $functions:tt $value:tt
        floats [$($(#[$doc:meta])* ($arch:tt, $level:ident, $name:tt, $features:tt))*]
        bf16_pairs $bf16_pairs:tt
    ) => {
        match $crate::device::Isa::level($isa) {
            $(
                #[cfg(target_arch = $arch)]
                $crate::device::Level::$level => $crate::device::simd::dispatch! {
                    @one $level $features $simd $functions $value
                },
            )*
            // The portable one; an Isa of another architecture cannot exist.
            _ => $crate::device::simd::dispatch! { @one Portable [] $simd $functions $value },
        }
    };
    (@simd ($isa:expr) $simd:ident $functions:tt $value:tt
        floats $floats:tt
        bf16_pairs [$(($arch:tt, $level:ident, $registers:ident, $features:tt))*]
    ) => {
        match $isa {
            $(
                #[cfg(target_arch = $arch)]
                isa if isa.bf16_pairs() && isa.level() == $crate::device::Level::$level => {
                    $crate::device::simd::dispatch! {
                        @one $registers $features $simd $functions $value
                    }
                }
            )*
            isa => $crate::device::simd::dispatch! {
                @values (isa) $simd $functions $value floats $floats bf16_pairs []
            },
        }
    };
    (@one $registers:ident $features:tt $simd:ident { $($function:item)* } ($value:expr)) => {{
        type $simd = $crate::device::simd::$registers;
        $($crate::device::enable! { $features $function })*
        $value
    }};
    ($isa:expr, $simd:ident: Values, $functions:tt => $value:expr) => {
        $crate::device::levels! {
            [$crate::device::simd::dispatch] @values ($isa) $simd $functions ($value)
        }
    };
    ($isa:expr, $simd:ident: Simd, $functions:tt => $value:expr) => {
        $crate::device::levels! {
            [$crate::device::simd::dispatch] @simd ($isa) $simd $functions ($value)
        }
    };
}
pub(crate) use dispatch;

/// Defines a function whose body is compiled once per instruction set and chosen by an
/// [`Isa`](crate::device::Isa) given first.
///
/// The body is ordinary safe Rust; `for` loops in it vectorise for the instruction set at hand.
/// Closures handed to iterator methods (`for_each`, `fold`) do not: those methods may stay out of
/// line, compiled for the baseline. In it, `FUSED` says whether the instruction set has fused
/// multiply-add, for the functions that take it.
macro_rules! multiversion {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::device::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FUSED: bool>($($arg: $ty),*) $(-> $ret)? $body
            $crate::device::simd::dispatch! { isa, S: Values, {
                /// # Safety
                /// The processor has the instruction set of `S`.
                #[allow(clippy::too_many_arguments)]
                unsafe fn compiled($($arg: $ty),*) $(-> $ret)? {
                    body::<{ <S as $crate::device::simd::Simd>::FUSED }>($($arg),*)
                }
            } =>
            // SAFETY: the Isa was made by asking the processor for what this is compiled for.
            unsafe { compiled($($arg),*) } }
        }
    };
}
pub(crate) use multiversion;

/// The functions for 1, 2 and so on up to `most`, at most 16: `table!(Type, most, N => function)`,
/// where `N` is the number.
macro_rules! table {
    ($function:ty, $most:expr, $n:ident => $entry:expr) => {
        $crate::device::simd::table! {
            @entries $function, $most, $n => $entry, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
        }
    };
    (@entries $function:ty, $most:expr, $n:ident => $entry:expr, $($number:literal)*) => {{
        const MOST: usize = $most;
        // Entries after the last are copies of the last, so that none is compiled in vain.
        const ALL: &[$function] = &[$({
            const $n: usize = if $number < MOST { $number } else { MOST };
            $entry
        }),*];
        const { assert!(0 < MOST && MOST <= ALL.len()) };
        &ALL[..MOST]
    }};
}
pub(crate) use table;
