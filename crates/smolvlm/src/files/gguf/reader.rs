//! The primitive values of a GGUF header, read within a limit.

use std::io::{BufReader, Read};

use crate::files::weights::ReadSeek;

/// Items of an array, at most; the vocabulary of the family has 49,280.
pub(super) const MAX_ARRAY_LEN: u64 = 1 << 20;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// Reads little-endian values within a limit.
pub(super) struct Reader<'a> {
    bytes: BufReader<&'a mut dyn ReadSeek>,
    position: u64,
    /// Where the header must end.
    limit: u64,
    file_size: u64,
}

impl<'a> Reader<'a> {
    /// A reader from the start of a file of `file_size` bytes, of which it reads `max` at most.
    pub(super) fn new(bytes: &'a mut dyn ReadSeek, file_size: u64, max: u64) -> Self {
        Self {
            bytes: BufReader::new(bytes),
            position: 0,
            limit: file_size.min(max),
            file_size,
        }
    }

    /// Bytes that were read.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Checks that `count` items of at least `each` bytes fit in what is left, before anything is allocated for them.
    pub(super) fn check_room(&self, count: u64, each: u64) -> Result<(), String> {
        let left = self.limit - self.position;
        if count.checked_mul(each).is_some_and(|bytes| bytes <= left) {
            Ok(())
        } else if self.limit < self.file_size {
            Err(format!("has a header of more than {} bytes", self.limit))
        } else {
            Err(format!(
                "is cut short, or its header is broken: something ends behind byte {}",
                self.file_size
            ))
        }
    }

    /// Reads `len` bytes.
    fn bytes(&mut self, len: u64) -> Result<Vec<u8>, String> {
        self.check_room(len, 1)?;
        let mut bytes = vec![0; len as usize];
        self.bytes
            .read_exact(&mut bytes)
            .map_err(|e| e.to_string())?;
        self.position += len;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.check_room(N as u64, 1)?;
        let mut bytes = [0; N];
        self.bytes
            .read_exact(&mut bytes)
            .map_err(|e| e.to_string())?;
        self.position += N as u64;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        String::from_utf8(self.bytes(len)?)
            .map_err(|_| "has a broken header: a string is not UTF-8".into())
    }

    /// Reads the type and the value of a key.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, String> {
        let kind = self.u32()?;
        if kind != ARRAY {
            return Ok(match kind {
                FLOAT32 | FLOAT64 => Value::Float(self.float(kind)?),
                BOOL => Value::Bool(self.array()? != [0u8]),
                STRING => Value::String(self.string()?),
                _ => Value::Integer(self.integer(key, kind)?),
            });
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        if count > MAX_ARRAY_LEN {
            return Err(format!(
                "has a broken header: `{key}` has {count} items, more than {MAX_ARRAY_LEN}"
            ));
        }
        Ok(match kind {
            FLOAT32 | FLOAT64 => Value::Floats(self.items(count, |r| r.float(kind))?),
            BOOL => Value::Bools(self.items(count, |r| Ok(r.array()? != [0u8]))?),
            STRING => Value::Strings(self.items(count, Self::string)?),
            // No SmolVLM has an array of arrays, which `integer` refuses.
            _ => Value::Integers(self.items(count, |r| r.integer(key, kind))?),
        })
    }

    /// Reads `count` items. The vector grows item by item: a false count allocates nothing.
    fn items<T>(
        &mut self,
        count: u64,
        mut item: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        (0..count).map(|_| item(self)).collect()
    }

    fn float(&mut self, kind: u32) -> Result<f64, String> {
        match kind {
            // As JSON has it: 1e-5, not the f32 closest to it.
            FLOAT32 => Ok(shortest(f32::from_le_bytes(self.array()?))),
            _ => self.array().map(f64::from_le_bytes),
        }
    }

    fn integer(&mut self, key: &str, kind: u32) -> Result<i64, String> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            // No count or id reaches 2^63.
            10 => self.u64()?.try_into().unwrap_or(i64::MAX),
            11 => i64::from_le_bytes(self.array()?),
            _ => {
                return Err(format!("has a broken header: `{key}` has the type {kind}"));
            }
        })
    }
}

/// The f64 with the shortest decimal of `value`.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}

// `gguf_metadata_value_type`; all others are integers.
pub(super) const FLOAT32: u32 = 6;
pub(super) const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;
const FLOAT64: u32 = 12;
