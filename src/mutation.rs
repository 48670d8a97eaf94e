//! Valid inputs with a few places changed: what reaches the parsers deeper than random bytes do.

use std::ops::Range;

use proptest::prelude::*;
use proptest::sample::Index;

/// One of the seeds after one to eight edits: bytes changed, cut out, said twice, put in, or cut off at the end.
pub(crate) fn mutated(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let seed = prop::sample::select(seeds.clone());
    let other = prop::sample::select(seeds);
    (seed, other, prop::collection::vec(edit(), 1..8)).prop_map(|(mut bytes, other, edits)| {
        edits.iter().for_each(|edit| edit.apply(&mut bytes, &other));
        bytes
    })
}

/// As [`mutated`], of text, and text again.
pub(crate) fn mutated_text(seeds: &[&str]) -> impl Strategy<Value = String> + use<> {
    let seeds = seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect();
    mutated(seeds).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

#[derive(Clone, Debug)]
enum Edit {
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, Index),
    Repeat(Index, Index),
    /// Some of another seed.
    Splice(Index, Index, Index),
    Truncate(Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    // What means something in the forms that we read, beside every byte.
    let telling = prop::sample::select(b"\0\t\n\r \"#%&'*,-./0:;<=>?@[]{|}\x7f\x80\xc3\xff".to_vec());
    let byte = prop_oneof![any::<u8>(), telling];
    prop_oneof![
        4 => (at(), byte.clone()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        2 => (at(), prop::collection::vec(byte, 1..6)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        2 => (at(), at()).prop_map(|(from, to)| Edit::Remove(from, to)),
        1 => (at(), at()).prop_map(|(from, to)| Edit::Repeat(from, to)),
        1 => (at(), at(), at()).prop_map(|(at, from, to)| Edit::Splice(at, from, to)),
        1 => at().prop_map(Edit::Truncate),
    ]
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>, other: &[u8]) {
        match self {
            Self::Set(at, byte) if !bytes.is_empty() => *at.get_mut(bytes) = *byte,
            Self::Set(..) => {}
            Self::Insert(at, inserted) => {
                let at = at.index(bytes.len() + 1);
                bytes.splice(at..at, inserted.iter().copied());
            }
            Self::Remove(from, to) => drop(bytes.drain(range(from, to, bytes.len()))),
            Self::Repeat(from, to) => {
                let range = range(from, to, bytes.len());
                let said = bytes[range.clone()].to_vec();
                bytes.splice(range.end..range.end, said);
            }
            Self::Splice(at, from, to) => {
                let at = at.index(bytes.len() + 1);
                bytes.splice(at..at, other[range(from, to, other.len())].iter().copied());
            }
            Self::Truncate(at) => bytes.truncate(at.index(bytes.len() + 1)),
        }
    }
}

/// A short one: a long one leaves little of the seed to be read.
fn range(from: &Index, to: &Index, length: usize) -> Range<usize> {
    let from = from.index(length + 1);
    from..from + to.index((length - from).min(40) + 1)
}
