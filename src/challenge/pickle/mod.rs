//! Just enough of Python's pickles to read the object arrays in NumPy's files, protocols 2 to 5, as
//! NumPy 1 and 2 write them.
//!
//! Nothing is executed: the few functions that make NumPy's arrays, element types and numbers are
//! recognised by name and implemented here; any other name is an error. So is anything that nests
//! too deep, refers to itself, or would unfold to more than a stated size.

mod machine;
mod names;
mod numpy;

use machine::{Id, Machine, Node};

/// The most bytes of a pickle.
const LONGEST: usize = 16 << 20;
/// The most objects that a pickle makes, and the most objects and letters that it unfolds to.
const MOST: usize = 1 << 20;
/// The most items and bytes that are copied while it is read.
const MOST_WORK: usize = 64 << 20;
/// How deep lists and dictionaries may nest.
const DEEPEST: usize = 64;

/// The value of a pickle.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// A string.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A list or a tuple.
    List(Vec<Value>),
    /// A dictionary.
    Dict(Vec<(Value, Value)>),
    /// A NumPy array.
    Array {
        /// Items along each axis.
        shape: Vec<usize>,
        /// The items, the last axis fastest.
        items: Vec<Value>,
    },
}

impl Value {
    /// The value of a dictionary's key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let Value::Dict(pairs) = self else { return None };
        // If a key was set twice, the later value counts.
        pairs.iter().rev().find(|(k, _)| k.text() == Some(key)).map(|(_, value)| value)
    }

    /// The items of a list, a tuple or an array.
    pub fn items(&self) -> Option<&[Value]> {
        match self {
            Value::List(items) | Value::Array { items, .. } => Some(items),
            _ => None,
        }
    }

    /// A string.
    pub fn text(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number, however it is stored.
    pub fn int(&self) -> Option<i64> {
        match self {
            Value::Int(n) => Some(*n),
            Value::Float(v) if v.fract() == 0.0 && v.abs() < 1e15 => Some(*v as i64),
            _ => None,
        }
    }
}

/// Reads a pickle, without executing anything.
///
/// # Errors
/// It is damaged, names a function or class that is not one of NumPy's few, or is too large.
pub fn load(bytes: &[u8]) -> Result<Value, String> {
    if bytes.len() > LONGEST {
        return Err(format!("its pickle has {} bytes, expected at most {LONGEST}", bytes.len()));
    }
    let mut machine = Machine::new(bytes);
    loop {
        match machine.byte()? {
            b'.' => break,
            op => machine.step(op)?,
        }
    }
    let top = machine.pop()?;
    let mut budget = MOST;
    machine.tree(top, DEEPEST, &mut budget)
}

impl Machine<'_> {
    /// An object with everything that it contains. What two objects share is unfolded twice, hence
    /// the budget.
    fn tree(&self, id: Id, depth: usize, budget: &mut usize) -> Result<Value, String> {
        let depth = depth
            .checked_sub(1)
            .ok_or_else(|| format!("its pickle nests deeper than {DEEPEST}"))?;
        let node = &self.nodes[id];
        let cost = match node {
            Node::Text(text) => 1 + text.len(),
            Node::Bytes(bytes) => 1 + bytes.len(),
            _ => 1,
        };
        *budget = budget
            .checked_sub(cost)
            .ok_or_else(|| format!("its pickle expands to more than {MOST} objects"))?;
        Ok(match node {
            Node::None => Value::None,
            Node::Bool(b) => Value::Bool(*b),
            Node::Int(n) => Value::Int(*n),
            Node::Float(v) => Value::Float(*v),
            Node::Text(text) => Value::Text(text.clone()),
            Node::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Node::List(items) => Value::List(self.trees(items, depth, budget)?),
            Node::Array(shape, items) => {
                Value::Array { shape: shape.clone(), items: self.trees(items, depth, budget)? }
            }
            Node::Dict(entries) => {
                let mut all = vec![];
                for (key, value) in entries {
                    all.push((self.tree(*key, depth, budget)?, self.tree(*value, depth, budget)?));
                }
                Value::Dict(all)
            }
            Node::Global(_) | Node::DType(_) => {
                return Err(
                    "its pickle holds a function or an element type, expected values".into()
                );
            }
        })
    }

    fn trees(&self, ids: &[Id], depth: usize, budget: &mut usize) -> Result<Vec<Value>, String> {
        ids.iter().map(|id| self.tree(*id, depth, budget)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `np.save` of `[{'fg': [[5, 6, 300]], 'bg': []}, {'fg': [], 'bg': []}]` by NumPy 1.26,
    /// coordinates being int64: protocol 3.
    const CLICKS_1: &[u8] = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01bq\x03\x87q\
        \x04Rq\x05(K\x01K\x02\x85q\x06cnumpy\ndtype\nq\x07X\x02\x00\x00\x00O8q\x08\x89\x88\x87q\tRq\n(K\x03X\x01\x00\x00\x00|q\x0bNNNJ\
        \xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x0cb\x89]q\r(}q\x0e(X\x02\x00\x00\x00fgq\x0f]q\x10]q\x11(cnumpy.core.multiarray\nscalar\
        \nq\x12h\x07X\x02\x00\x00\x00i8q\x13\x89\x88\x87q\x14Rq\x15(K\x03X\x01\x00\x00\x00<q\x16NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\
        \x00tq\x17bC\x08\x05\x00\x00\x00\x00\x00\x00\x00q\x18\x86q\x19Rq\x1ah\x12h\x15C\x08\x06\x00\x00\x00\x00\x00\x00\x00q\x1b\x86q\
        \x1cRq\x1dh\x12h\x15C\x08,\x01\x00\x00\x00\x00\x00\x00q\x1e\x86q\x1fRq eaX\x02\x00\x00\x00bgq!]q\"u}q#(h\x0f]q$h!]q%uetq&b.";

    /// `np.save` of the list in [`CLICKS_1`] by NumPy 2.4: protocol 4.
    const CLICKS_2: &[u8] = b"\x80\x04\x95\x15\x01\x00\x00\x00\x00\x00\x00\x8c\x16numpy._core.multiarray\x94\x8c\x0c_reconstruct\x94\
        \x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01K\x02\x85\x94h\x03\x8c\x05dtype\
        \x94\x93\x94\x8c\x02O8\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t\x94b\x89]\x94(}\x94\
        (\x8c\x02fg\x94]\x94]\x94(h\x00\x8c\x06scalar\x94\x93\x94h\x0c\x8c\x02i8\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01<\x94NNNJ\xff\
        \xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94bC\x08\x05\x00\x00\x00\x00\x00\x00\x00\x94\x86\x94R\x94h\x18h\x1bC\x08\x06\x00\x00\x00\
        \x00\x00\x00\x00\x94\x86\x94R\x94h\x18h\x1bC\x08,\x01\x00\x00\x00\x00\x00\x00\x94\x86\x94R\x94ea\x8c\x02bg\x94]\x94u}\x94(h\
        \x14]\x94h']\x94uet\x94b.";

    /// `[['fg', None], ['bg', 'fg']]` by NumPy 2.4.
    const ORDER: &[u8] = b"\x80\x04\x95\x99\x00\x00\x00\x00\x00\x00\x00\x8c\x16numpy._core.multiarray\x94\x8c\x0c_reconstruct\x94\x93\
        \x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01K\x02K\x02\x86\x94h\x03\x8c\x05dtype\
        \x94\x93\x94\x8c\x02O8\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t\x94b\x89]\x94(\x8c\
        \x02fg\x94N\x8c\x02bg\x94h\x13et\x94b.";

    /// `[np.float32(1.5), np.bool_(True), np.str_('fg')]`, protocol 2, which has no bytes of its
    /// own.
    const PROTOCOL_2: &[u8] = b"\x80\x02]q\x00(cnumpy._core.multiarray\nscalar\nq\x01cnumpy\ndtype\nq\x02X\x02\x00\x00\x00f4q\x03\x89\
        \x88\x87q\x04Rq\x05(K\x03X\x01\x00\x00\x00<q\x06NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x07bc_codecs\nencode\nq\x08X\x05\
        \x00\x00\x00\x00\x00\xc3\x80?q\tX\x06\x00\x00\x00latin1q\n\x86q\x0bRq\x0c\x86q\rRq\x0eh\x01h\x02X\x02\x00\x00\x00b1q\x0f\x89\
        \x88\x87q\x10Rq\x11(K\x03X\x01\x00\x00\x00|q\x12NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13bh\x08X\x01\x00\x00\x00\x01q\
        \x14h\n\x86q\x15Rq\x16\x86q\x17Rq\x18h\x01h\x02X\x02\x00\x00\x00U2q\x19\x89\x88\x87q\x1aRq\x1b(K\x03h\x06NNNK\x08K\x04K\x08tq\
        \x1cbh\x08X\x08\x00\x00\x00f\x00\x00\x00g\x00\x00\x00q\x1dh\n\x86q\x1eRq\x1f\x86q Rq!e.";

    /// `np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))`, protocol 3.
    const FORTRAN: &[u8] = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01bq\x03\x87q\
        \x04Rq\x05(K\x01K\x02K\x03\x86q\x06cnumpy\ndtype\nq\x07X\x02\x00\x00\x00u1q\x08\x89\x88\x87q\tRq\n(K\x03X\x01\x00\x00\x00|q\
        \x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0cb\x88C\x06\x00\x03\x01\x04\x02\x05q\rtq\x0eb.";

    fn text(t: &str) -> Value {
        Value::Text(t.into())
    }

    #[test]
    fn clicks_of_either_numpy_are_read() {
        for pickle in [CLICKS_1, CLICKS_2] {
            let value = load(pickle).unwrap();
            let Value::Array { shape, items } = &value else { panic!("{value:?}") };
            assert_eq!((&shape[..], items.len()), (&[2][..], 2));
            let clicks = items[0].get("fg").and_then(Value::items).unwrap();
            assert_eq!(
                clicks[0].items().unwrap().iter().map(Value::int).collect::<Vec<_>>(),
                [Some(5), Some(6), Some(300)]
            );
            assert_eq!(items[0].get("bg"), Some(&Value::List(vec![])));
            assert_eq!(items[1].get("fg"), Some(&Value::List(vec![])));
            assert_eq!(items[1].get("box"), None);
        }
    }

    #[test]
    fn what_is_none_stays_none() {
        let items = vec![text("fg"), Value::None, text("bg"), text("fg")];
        assert_eq!(load(ORDER).unwrap(), Value::Array { shape: vec![2, 2], items });
    }

    #[test]
    fn numbers_of_numpy_are_read() {
        assert_eq!(
            load(PROTOCOL_2).unwrap(),
            Value::List(vec![Value::Float(1.5), Value::Bool(true), text("fg")])
        );
        let items = (0..6).map(Value::Int).collect();
        assert_eq!(load(FORTRAN).unwrap(), Value::Array { shape: vec![2, 3], items });
        let plain = b"\x80\x04](G?\xf8\x00\x00\x00\x00\x00\x00\x8a\x06\x00\x00\x00\x00\x00\x01J\xfe\xff\xff\xffe.";
        assert_eq!(
            load(plain).unwrap(),
            Value::List(vec![Value::Float(1.5), Value::Int(1 << 40), Value::Int(-2)])
        );
    }

    #[test]
    fn nothing_else_is_called() {
        let message = |pickle: &[u8]| load(pickle).unwrap_err();
        let system = b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.";
        assert!(message(system).contains("posix.system"));
        assert!(message(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.").contains("builtins.eval"));
        // An instance of a class, by a separate instruction.
        assert!(message(b"\x80\x02(cnumpy\nndarray\no.").contains("0x6f"));
        assert!(message(b"\x80\x02cnumpy\nndarray\n)R.").contains("'ndarray'"));
        assert!(message(b"\x80\x02cnumpy\nndarray\n.").contains("function"));
    }

    #[test]
    fn hostile_pickles_are_errors() {
        let message = |pickle: &[u8]| load(pickle).unwrap_err();
        // A list in itself.
        assert!(message(b"\x80\x02]q\x00h\x00a.").contains("nests deeper"));
        // Each list holds the one before twice: 2^40 items at the end.
        let mut laughs = b"\x80\x02]q\x00".to_vec();
        for at in 0u8..40 {
            laughs.extend([b']', b'q', at + 1, b'(', b'h', at, b'h', at, b'e']);
        }
        laughs.push(b'.');
        assert!(message(&laughs).contains("expands to more"));
        // The same bytes made again and again.
        let mut copies = b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x80\x00".to_vec();
        copies.extend(vec![b'a'; 8 << 20]);
        copies.extend(b"X\x06\x00\x00\x00latin1\x86q\x01");
        copies.extend(b"h\x00h\x01R".repeat(100));
        assert!(message(&copies).contains("objects too often"));
        for whole in [CLICKS_1, CLICKS_2, ORDER, PROTOCOL_2, FORTRAN] {
            for at in 0..whole.len() {
                assert!(load(&whole[..at]).is_err());
                // Whatever is changed, the result is an answer or an error.
                let mut changed = whole.to_vec();
                changed[at] ^= 0x11;
                let _ = load(&changed);
            }
        }
    }
}
