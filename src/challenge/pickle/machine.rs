//! The machine that executes a pickle: a stack, marks in it, a memory, and the instructions that
//! make numbers, strings, lists and dictionaries.

use super::names::{Global, global};
use super::{MOST, MOST_WORK};
use crate::challenge::npy::{DType, Item};
use std::collections::HashMap;

/// The index of an object among all objects made.
pub type Id = usize;

/// An object under construction. Lists and tuples are not distinguished.
pub enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    DType(DType),
    Array(Vec<usize>, Vec<Id>),
}

impl From<Item> for Node {
    fn from(item: Item) -> Node {
        match item {
            Item::Bool(b) => Node::Bool(b),
            Item::Int(n) => Node::Int(n),
            Item::Float(v) => Node::Float(v),
            Item::Text(t) => Node::Text(t),
        }
    }
}

/// The machine that executes a pickle.
pub struct Machine<'a> {
    rest: &'a [u8],
    pub nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Marked heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
    /// The number of items and bytes that were copied.
    work: usize,
}

impl<'a> Machine<'a> {
    pub fn new(program: &'a [u8]) -> Machine<'a> {
        Machine {
            rest: program,
            nodes: vec![],
            stack: vec![],
            marks: vec![],
            memo: HashMap::new(),
            work: 0,
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or("its pickle is truncated")?;
        self.rest = rest;
        Ok(taken)
    }

    pub fn byte(&mut self) -> Result<u8, String> {
        self.number(1).map(|n| n as u8)
    }

    /// A number from 0 on of that many bytes.
    fn number(&mut self, width: usize) -> Result<usize, String> {
        let value =
            self.take(width)?.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value)
            .map_err(|_| "its pickle has a length that cannot be addressed".into())
    }

    /// A signed number of that many bytes, at most 8.
    fn signed(&mut self, width: usize) -> Result<i64, String> {
        let bytes = self.take(width)?;
        let below = bytes.last().is_some_and(|b| *b >= 0x80);
        Ok(bytes
            .iter()
            .rev()
            .fold(if below { -1 } else { 0 }, |value, byte| value << 8 | i64::from(*byte)))
    }

    /// Bytes that are preceded by their length, which has that many bytes.
    fn sized(&mut self, width: usize) -> Result<&'a [u8], String> {
        let length = self.number(width)?;
        self.take(length)
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self
            .rest
            .iter()
            .position(|b| *b == b'\n')
            .ok_or("its pickle has a line without an end")?;
        let line = self.take(end)?;
        self.take(1)?;
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    /// Counts items or bytes that are copied: a short program could ask for the same copy again and
    /// again.
    pub fn spend(&mut self, cost: usize) -> Result<(), String> {
        self.work = self.work.saturating_add(cost);
        if self.work > MOST_WORK {
            Err("its pickle copies the same objects too often".into())
        } else {
            Ok(())
        }
    }

    /// Makes an object.
    pub fn make(&mut self, node: Node) -> Result<Id, String> {
        if self.nodes.len() >= MOST {
            return Err(format!("its pickle makes more than {MOST} objects"));
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn put(&mut self, id: Id) -> Result<(), String> {
        if self.stack.len() >= MOST {
            return Err(format!("its pickle has more than {MOST} objects on its stack"));
        }
        self.stack.push(id);
        Ok(())
    }

    pub fn push(&mut self, node: Node) -> Result<(), String> {
        let id = self.make(node)?;
        self.put(id)
    }

    pub fn top(&self) -> Result<Id, String> {
        self.stack.last().copied().ok_or_else(|| "its pickle pops from an empty stack".into())
    }

    pub fn pop(&mut self) -> Result<Id, String> {
        self.top()?;
        Ok(self.stack.pop().unwrap_or_default())
    }

    /// The uppermost objects, lowest first.
    fn last(&mut self, count: usize) -> Result<Vec<Id>, String> {
        let at =
            self.stack.len().checked_sub(count).ok_or("its pickle pops from an empty stack")?;
        Ok(self.stack.split_off(at))
    }

    fn mark(&mut self) -> Result<(), String> {
        if self.marks.len() >= MOST {
            return Err(format!("its pickle sets more than {MOST} marks"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    /// Everything above the last mark.
    fn marked(&mut self) -> Result<Vec<Id>, String> {
        let at = self
            .marks
            .pop()
            .filter(|at| *at <= self.stack.len())
            .ok_or("its pickle returns to a mark that was not set")?;
        Ok(self.stack.split_off(at))
    }

    /// Executes one instruction.
    pub fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            0x80 => match self.byte()? {
                2..=5 => Ok(()),
                other => Err(format!("its pickle is of protocol {other}, expected 2 to 5")),
            },
            // The length of a frame, which only matters to readers that read piecewise.
            0x95 => self.take(8).map(|_| ()),
            b'(' => self.mark(),
            b'0' => self.pop().map(|_| ()),
            b'1' => self.marked().map(|_| ()),
            b'q' | b'r' | 0x94 => self.remember(op),
            b'h' | b'j' => self.recall(op),
            b'c' | 0x93 => self.name(op),
            b'R' => self.call(),
            b'b' => self.build(),
            b']' | b')' | b'l' | b't' | 0x85..=0x87 => self.list(op),
            b'}' | b'd' => self.dict(op),
            b'a' | b'e' | b's' | b'u' => self.extend(op),
            _ => {
                let node = self.constant(op)?;
                self.push(node)
            }
        }
    }

    fn constant(&mut self, op: u8) -> Result<Node, String> {
        let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Node::Text(text.to_string())),
            Err(_) => Err("its pickle has a string that is not UTF-8".to_string()),
        };
        Ok(match op {
            b'N' => Node::None,
            0x88 | 0x89 => Node::Bool(op == 0x88),
            b'K' => Node::Int(self.number(1)? as i64),
            b'M' => Node::Int(self.number(2)? as i64),
            b'J' => Node::Int(self.signed(4)?),
            0x8a => match self.number(1)? {
                width @ 0..=8 => Node::Int(self.signed(width)?),
                width => {
                    return Err(format!(
                        "its pickle has a whole number of {width} bytes, expected at most 8"
                    ));
                }
            },
            // The only number that is stored with its highest byte first.
            b'G' => {
                Node::Float(self.take(8)?.try_into().map(f64::from_be_bytes).unwrap_or_default())
            }
            0x8c => text(self.sized(1)?)?,
            b'X' => text(self.sized(4)?)?,
            0x8d => text(self.sized(8)?)?,
            b'C' => Node::Bytes(self.sized(1)?.to_vec()),
            b'B' => Node::Bytes(self.sized(4)?.to_vec()),
            0x8e | 0x96 => Node::Bytes(self.sized(8)?.to_vec()),
            _ => {
                return Err(format!(
                    "its pickle has the instruction {op:#04x}, which NumPy's arrays do not need"
                ));
            }
        })
    }

    fn remember(&mut self, op: u8) -> Result<(), String> {
        let at = match op {
            b'q' => self.number(1)?,
            b'r' => self.number(4)?,
            _ => self.memo.len(),
        };
        let top = self.top()?;
        if self.memo.len() >= MOST {
            return Err(format!("its pickle memoises more than {MOST} objects"));
        }
        self.memo.insert(at, top);
        Ok(())
    }

    fn recall(&mut self, op: u8) -> Result<(), String> {
        let at = self.number(if op == b'h' { 1 } else { 4 })?;
        let id = self.memo.get(&at).copied().ok_or("its pickle refers to an undefined object")?;
        self.put(id)
    }

    fn name(&mut self, op: u8) -> Result<(), String> {
        let (module, name) = if op == b'c' {
            (self.line()?, self.line()?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (&self.nodes[module], &self.nodes[name]) {
                (Node::Text(module), Node::Text(name)) => (module.clone(), name.clone()),
                _ => {
                    return Err("its pickle names a function without strings".into());
                }
            }
        };
        let found = global(&module, &name)?;
        self.push(Node::Global(found))
    }

    fn list(&mut self, op: u8) -> Result<(), String> {
        let items = match op {
            b']' | b')' => vec![],
            b'l' | b't' => self.marked()?,
            _ => self.last(op as usize - 0x84)?,
        };
        self.push(Node::List(items))
    }

    fn dict(&mut self, op: u8) -> Result<(), String> {
        let items = if op == b'}' { vec![] } else { self.marked()? };
        self.push(Node::Dict(pairs(&items)?))
    }

    /// Adds items to the list or dictionary below them.
    fn extend(&mut self, op: u8) -> Result<(), String> {
        let items = match op {
            b'a' => self.last(1)?,
            b's' => self.last(2)?,
            _ => self.marked()?,
        };
        let top = self.top()?;
        match (&mut self.nodes[top], op) {
            (Node::List(list), b'a' | b'e') => list.extend(items),
            (Node::Dict(dict), b's' | b'u') => dict.extend(pairs(&items)?),
            _ => {
                return Err(
                    "its pickle adds to an object that is neither list nor dictionary".into()
                );
            }
        }
        Ok(())
    }
}

/// Alternating keys and values.
fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    if items.len() % 2 == 1 {
        return Err("its pickle has a key without a value".into());
    }
    Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}
