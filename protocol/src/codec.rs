//! CBOR in and out, with a size limit on the way in.
//!
//! Messages are CBOR maps with integer keys. Unknown keys are skipped and absent optional ones are `None`,
//! so that two versions of cachec either understand each other or fail to decode, which means a miss.

use minicbor::{Decode, Encode};

/// A message that is not what it should be. The caller treats it as absent (client) or refuses it (server).
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than the message's kind may have.
    #[error("message of {size_bytes} bytes is over its limit of {limit_bytes} bytes")]
    TooLarge {
        /// Length of what was received.
        size_bytes: usize,
        /// The kind's limit.
        limit_bytes: usize,
    },
    /// Not CBOR, or not of this shape.
    #[error("malformed message: {0}")]
    Malformed(#[from] minicbor::decode::Error),
    /// A whole message, and more behind it.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// Well-formed, but a value is outside of its range.
    #[error("invalid message: {0}")]
    Invalid(&'static str),
}

/// A message type with a limit on its encoded size.
pub trait Message {
    /// Largest encoded size in bytes that [`decode`] accepts.
    const LIMIT_BYTES: usize;

    /// Checks what the shape alone does not say.
    ///
    /// # Errors
    /// [`DecodeError::Invalid`] naming the value that is out of range.
    fn check(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}

/// Encodes a message as CBOR.
#[must_use]
pub fn encode<T: Encode<()>>(message: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256);
    // Writing to a Vec cannot fail, and the derived encoders raise no error of their own.
    if let Err(error) = minicbor::encode(message, &mut bytes) {
        unreachable!("encoding to memory failed: {error}");
    }
    bytes
}

/// Decodes a list of at most `MOST` values; nothing behind that is held in memory.
pub(crate) fn decode_list<'b, C, T: Decode<'b, C>, const MOST: usize>(
    decoder: &mut minicbor::Decoder<'b>,
    context: &mut C,
) -> Result<Vec<T>, minicbor::decode::Error> {
    let mut values = Vec::new();
    for value in decoder.array_iter_with(context)? {
        if values.len() == MOST {
            return Err(minicbor::decode::Error::message("a list is too long"));
        }
        values.push(value?);
    }
    Ok(values)
}

/// Decodes one message that fills `bytes` whole.
///
/// # Errors
/// See [`DecodeError`]; nothing larger than [`Message::LIMIT_BYTES`] is looked at.
pub fn decode<'b, T: Message + Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, DecodeError> {
    if bytes.len() > T::LIMIT_BYTES {
        return Err(DecodeError::TooLarge { size_bytes: bytes.len(), limit_bytes: T::LIMIT_BYTES });
    }
    let mut decoder = minicbor::Decoder::new(bytes);
    let message: T = decoder.decode()?;
    let trailing = bytes.len() - decoder.position();
    if trailing > 0 {
        return Err(DecodeError::Trailing(trailing));
    }
    message.check()?;
    Ok(message)
}
