//! Machine code as `nvdisasm --print-code` lists it: what the instructions of a kernel and of its
//! loops are.

use std::collections::{BTreeMap, HashMap};

/// The instruction in a line of a listing, as name and operands: `/*0080*/ @!P0 LDG.E.64 R2, ...`.
pub fn instruction(line: &str) -> Option<(&str, &str)> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut rest = rest.trim_start();
    if rest.starts_with('@') {
        rest = rest.split_once(' ')?.1.trim_start();
    }
    let end = rest.find([' ', ';']).unwrap_or(rest.len());
    (end > 0).then(|| rest.split_at(end))
}

/// Instructions by kind, and the multiply-adds that they do for each thread.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mix {
    pub instructions: usize,
    /// `HMMA`, `HGMMA`.
    pub matrix: usize,
    /// Reads of shared memory: `LDS`, `LDSM`.
    pub from_shared: usize,
    /// Writes to shared memory: `STS`, `STSM`.
    pub to_shared: usize,
    /// Reads of global memory, and copies from there to shared memory: `LDG`, `LDGSTS`.
    pub from_global: usize,
    /// Writes to global memory, atomic additions too.
    pub to_global: usize,
    /// Arithmetic on integers, comparisons and moves: addresses, above all.
    pub integer: usize,
    /// Arithmetic on floats, conversions too.
    pub float: usize,
    /// Of products of 16 bits or TF32, and of floats.
    pub multiply_adds: usize,
}

impl Mix {
    fn add(&mut self, name: &str, operands: &str) {
        let mut parts = name.split('.');
        let base = parts.next().unwrap_or(name);
        if base == "NOP" {
            return;
        }
        self.instructions += 1;
        self.multiply_adds += multiply_adds(base, parts);
        // A constant is often loaded as a product with zero.
        let is_move = base == "HFMA2" && operands.contains("-RZ, RZ,");
        let kind = match base {
            "HMMA" | "HGMMA" => &mut self.matrix,
            "LDS" | "LDSM" => &mut self.from_shared,
            "STS" | "STSM" => &mut self.to_shared,
            "LD" | "LDG" | "LDGSTS" => &mut self.from_global,
            "ST" | "STG" | "ATOM" | "ATOMG" | "RED" | "REDG" => &mut self.to_global,
            _ if is_move => &mut self.integer,
            "MUFU" | "I2F" | "I2FP" => &mut self.float,
            _ if is_of_integers(base) => &mut self.integer,
            // FADD, F2I, HFMA2, DSETP; DEPBAR waits.
            _ if base.starts_with(['F', 'H', 'D']) && base != "DEPBAR" => &mut self.float,
            _ => return,
        };
        *kind += 1;
    }

    /// Multiply-adds per instruction of a thread.
    fn density(&self) -> f64 {
        self.multiply_adds as f64 / self.instructions.max(1) as f64
    }
}

/// Whether an instruction, which may be a warp's (`U`) or a vector's (`V`), works on integers,
/// predicates or plain bits.
fn is_of_integers(base: &str) -> bool {
    const NAMES: [&str; 22] = [
        "ABS", "BMSK", "FLO", "IABS", "IADD3", "IADD", "IMAD", "IMNMX", "IMNMX3", "ISETP", "LEA",
        "LOP3", "MOV", "MOV32I", "PLOP3", "POPC", "PRMT", "SEL", "SGXT", "SHF", "CS2R", "ADDMNMX",
    ];
    let known = |name: &str| NAMES.contains(&name);
    known(base)
        || base.strip_prefix('U').is_some_and(known)
        || base.strip_prefix('V').is_some_and(|name| known(name) || name.starts_with('I'))
}

/// Multiply-adds of an instruction per thread, of products of matrices with dimensions in the name:
/// `HMMA.16816`, `HMMA.1688`, `HMMA.1684` for a warp, `HGMMA.64x96x16` for four.
fn multiply_adds<'a>(base: &str, mut parts: impl Iterator<Item = &'a str>) -> usize {
    match base {
        "FFMA" | "DFMA" => 1,
        "FFMA2" => 2,
        "HMMA" => match parts.next() {
            Some("16816") => 64,
            Some("1688") => 32,
            Some("1684") => 16,
            _ => 0,
        },
        "HGMMA" => {
            let extents = parts.next().unwrap_or_default().split('x').map(str::parse::<usize>);
            extents
                .collect::<Result<Vec<_>, _>>()
                .map_or(0, |of| of.iter().product::<usize>() / 128)
        }
        _ => 0,
    }
}

/// A kernel's instructions in order.
#[derive(Debug, Default)]
pub struct Listing {
    code: Vec<(String, String)>,
    labels: HashMap<String, usize>,
}

impl Listing {
    pub fn see(&mut self, line: &str) {
        if let Some((name, operands)) = instruction(line) {
            self.code.push((name.into(), operands.into()));
        } else if let Some(label) = line.trim().strip_suffix(':') {
            self.labels.insert(label.into(), self.code.len());
        }
    }

    /// All instructions but those that only fill up.
    pub fn whole(&self) -> Mix {
        let mut mix = Mix::default();
        self.code.iter().for_each(|(name, operands)| mix.add(name, operands));
        mix
    }

    /// The loops, from the first instruction to the jump back to it. A jump to itself, which stands
    /// behind the code, is none.
    fn loops(&self) -> BTreeMap<usize, usize> {
        let mut loops: BTreeMap<usize, usize> = BTreeMap::new();
        for (at, (name, operands)) in self.code.iter().enumerate() {
            if name.split('.').next() != Some("BRA") {
                continue;
            }
            let label = operands.split_once("`(").and_then(|(_, rest)| rest.split_once(')'));
            if let Some(start) = label.and_then(|(label, _)| self.labels.get(label))
                && *start < at
            {
                loops.entry(*start).and_modify(|end| *end = at.max(*end)).or_insert(at);
            }
        }
        loops
    }

    /// Of the loops the one that multiplies most, or else reads most, without the loops within it;
    /// none if there is no loop, or if matrix instructions are outside of all.
    pub fn loop_of_most(&self) -> Option<Mix> {
        let loops = self.loops();
        let mut own: BTreeMap<usize, Mix> = BTreeMap::new();
        for (at, (name, operands)) in self.code.iter().enumerate() {
            let around = loops.range(..=at).filter(|(_, end)| at <= **end);
            if let Some((start, _)) = around.min_by_key(|(start, end)| **end - **start) {
                own.entry(*start).or_default().add(name, operands);
            }
        }
        let matrix = self.whole().matrix > 0;
        own.into_values().filter(|mix| !matrix || mix.matrix > 0).max_by_key(|mix| {
            let read = mix.from_global + mix.from_shared;
            (mix.multiply_adds, read, mix.instructions)
        })
    }
}

/// Of a multiprocessor: 32-bit registers, bytes of shared memory, most blocks and most warps, from
/// compute capability 9.0.
const REGISTERS: usize = 1 << 16;
const SHARED: usize = 228 << 10;
const BLOCKS: usize = 32;
const WARPS: usize = 64;
/// Bytes of shared memory that the system takes for each block.
const RESERVED: usize = 1 << 10;

/// The number of warps that a multiprocessor has room for at a time if their blocks have `threads`
/// threads with `registers` registers each, and `shared` bytes of shared memory.
pub fn warps(threads: usize, registers: usize, shared: usize) -> usize {
    let each = threads.div_ceil(32);
    // A warp gets registers by the 256; the warps of each quarter share a quarter of them.
    let of_registers = REGISTERS / 4 / (registers.max(1).next_multiple_of(8) * 32) * 4;
    let of_shared = SHARED / (shared.next_multiple_of(128) + RESERVED);
    (of_registers / each).min(of_shared).min(WARPS / each).min(BLOCKS) * each
}

/// The columns' names for [`line`].
pub const HEAD: &str = "# kernel                             registers warps  code  loop matrix shared global integer float density";

/// A line of the table: registers and warps of the kernel, without regard to the shared memory that
/// a launch asks for, all of its instructions, and of its loop, or of all if it has none, those of
/// each kind.
pub fn line(kernel: &str, threads: Option<usize>, registers: usize, of: &Listing) -> String {
    let (whole, found) = (of.whole(), of.loop_of_most());
    let length = found.map_or("-".to_string(), |mix| mix.instructions.to_string());
    let mix = found.unwrap_or(whole);
    let warps = threads.map_or("-".to_string(), |n| warps(n, registers, 0).to_string());
    format!(
        "{kernel:<36} {registers:>9} {warps:>5} {:>5} {length:>5} {:>6} {:>6} {:>6} {:>7} {:>5} {:>7.2}",
        whole.instructions,
        mix.matrix,
        mix.from_shared + mix.to_shared,
        mix.from_global + mix.to_global,
        mix.integer,
        mix.float,
        mix.density()
    )
}
