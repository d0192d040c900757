//! Labelled, length-delimited fields: what a key is the digest of.
//!
//! Byte layout that is hashed, in the order the fields were added, with BLAKE3 in key derivation mode
//! under a context string of the key's kind:
//!
//! ```text
//! label length  u32 little-endian | label | value length  u64 little-endian | value | …
//! ```
//!
//! No two different lists of fields have the same layout, so fields cannot run together.
//! The same fields are stored beside a result so that `cachec explain` can name the one that differs.

use minicbor::{Decode, Encode};

use crate::codec::Message;

/// One field of a key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Field {
    /// What the value is, for example `argument -C opt-level`.
    #[n(0)]
    pub label: String,
    /// The value's bytes, normalised.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub value: Vec<u8>,
}

/// An ordered list of fields.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Fields {
    #[n(0)]
    entries: Vec<Field>,
}

impl Message for Fields {
    const LIMIT_BYTES: usize = 4 << 20;
}

impl Fields {
    /// Adds a field at the end; labels may repeat, and order counts.
    pub fn push(&mut self, label: impl Into<String>, value: impl Into<Vec<u8>>) {
        self.entries.push(Field { label: label.into(), value: value.into() });
    }

    /// The fields in their order.
    #[must_use]
    pub fn entries(&self) -> &[Field] {
        &self.entries
    }

    /// BLAKE3 over all fields, under `context` (a constant that names the kind of key and its version).
    #[must_use]
    pub fn digest(&self, context: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        for Field { label, value } in &self.entries {
            hasher.update(&u32::try_from(label.len()).unwrap_or(u32::MAX).to_le_bytes());
            hasher.update(label.as_bytes());
            hasher.update(&(value.len() as u64).to_le_bytes());
            hasher.update(value);
        }
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{decode, encode};

    fn fields(entries: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (label, value) in entries {
            fields.push(*label, value.as_bytes());
        }
        fields
    }

    #[test]
    fn fields_do_not_run_together() {
        let split = fields(&[("a", "bc"), ("d", "")]);
        let joined = fields(&[("a", "b"), ("cd", "")]);
        assert_ne!(split.digest("test"), joined.digest("test"));
        assert_ne!(split.digest("test"), split.digest("another kind of key"));
    }

    #[test]
    fn golden_layout() {
        let expected = "bab31e8cb7ad60732c3ffd913cc906de3717b3275a6e995a432b9d95f638bd28";
        let digest = fields(&[("tool", "rustc"), ("argument --crate-name", "demo")]).digest("cachec golden");
        assert_eq!(digest.to_hex().as_str(), expected);
    }

    proptest! {
        #[test]
        fn different_lists_have_different_digests(
            left in prop::collection::vec(("[a-c]{0,3}", "[a-c]{0,3}"), 0..4),
            right in prop::collection::vec(("[a-c]{0,3}", "[a-c]{0,3}"), 0..4),
        ) {
            let make = |list: &[(String, String)]| {
                let mut fields = Fields::default();
                for (label, value) in list {
                    fields.push(label.clone(), value.clone());
                }
                fields
            };
            let (first, second) = (make(&left), make(&right));
            prop_assert_eq!(first.digest("test") == second.digest("test"), left == right);
            prop_assert_eq!(decode::<Fields>(&encode(&first)).unwrap(), first);
        }
    }
}
