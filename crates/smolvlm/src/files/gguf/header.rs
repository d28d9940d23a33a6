//! The front of a GGUF file, read without believing it.
//!
//! `candle_core::quantized::gguf_file` reads the same format, but takes headers as long as the file, a
//! value of 32 bytes for each that has one, and any alignment. Here a header has a largest size, and
//! every count in it is held against the bytes that are left before anything is allocated.
//! [The format](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

use std::{
    collections::{HashMap, HashSet},
    io::{self, BufReader, Read, SeekFrom},
};

use candle_core::quantized::GgmlDType;

use crate::files::weights::Bytes;

/// Ten times what the vocabulary of the family takes.
const MAX_HEADER: u64 = 32 << 20;
/// Of an array; a vocabulary has 49,280.
const MAX_ITEMS: u64 = 1 << 20;
const MAX_DIMS: usize = 4;
const MAX_ALIGNMENT: u64 = 1 << 16;

/// What a key of the metadata says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

/// Where a tensor lies, sure to be inside the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) name: String,
    pub(crate) dtype: GgmlDType,
    /// Outermost first, the other way round than in the file.
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) start: u64,
    pub(crate) len: usize,
}

pub(crate) struct Header {
    pub(crate) values: HashMap<String, Value>,
    pub(crate) tensors: Vec<TensorInfo>,
}

impl Header {
    /// The error is a reason without the file's name.
    pub(crate) fn read(bytes: &mut dyn Bytes) -> Result<Self, String> {
        let io = |e: io::Error| e.to_string();
        let size = bytes.seek(SeekFrom::End(0)).map_err(io)?;
        bytes.rewind().map_err(io)?;
        let mut reader = Reader {
            bytes: BufReader::new(bytes),
            at: 0,
            end: size.min(MAX_HEADER),
            size,
        };
        if size < 4 || reader.take()? != *b"GGUF" {
            return Err("is not GGUF".into());
        }
        match reader.u32()? {
            2 | 3 => (),
            version => {
                return Err(format!(
                    "is GGUF of version {version}, only 2 and 3 are supported"
                ));
            }
        }
        let (tensors, values) = (reader.u64()?, reader.u64()?);
        // Lengths, types and offsets alone; names and values come on top.
        reader.has_room(tensors, 8 + 4 + 4 + 8)?;
        reader.has_room(values, 8 + 4 + 1)?;
        let values = read_values(&mut reader, values)?;
        let tensors = read_tensors(&mut reader, tensors, alignment(&values)?)?;
        Ok(Self { values, tensors })
    }
}

fn read_values(reader: &mut Reader<'_>, count: u64) -> Result<HashMap<String, Value>, String> {
    let mut values = HashMap::new();
    for _ in 0..count {
        let key = reader.text()?;
        let value = reader.value(&key)?;
        if values.insert(key.clone(), value).is_some() {
            return Err(format!("has a broken header: `{key}` is there twice"));
        }
    }
    Ok(values)
}

fn alignment(values: &HashMap<String, Value>) -> Result<u64, String> {
    match values.get("general.alignment") {
        None => Ok(32),
        Some(&Value::Integer(n)) => u64::try_from(n)
            .ok()
            .filter(|n| n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(n))
            .ok_or_else(|| format!("has a broken header: `general.alignment` is {n}")),
        Some(_) => Err("has a broken header: `general.alignment` is no number".into()),
    }
}

fn read_tensors(
    reader: &mut Reader<'_>,
    count: u64,
    alignment: u64,
) -> Result<Vec<TensorInfo>, String> {
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..count {
        let tensor = reader.tensor(alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!(
                "has a broken header: `{}` is there twice",
                tensor.name
            ));
        }
        tensors.push(tensor);
    }
    // Offsets count from behind the header.
    let data = reader.at.next_multiple_of(alignment);
    for tensor in &mut tensors {
        let end = data
            .checked_add(tensor.start)
            .and_then(|start| start.checked_add(tensor.len as u64));
        if end.is_none_or(|end| end > reader.size) {
            return Err(format!(
                "is cut short: `{}` ends behind byte {}",
                tensor.name, reader.size
            ));
        }
        tensor.start += data;
    }
    tensors.sort_by_key(|tensor| tensor.start);
    for pair in tensors.windows(2) {
        if pair[0].start + pair[0].len as u64 > pair[1].start {
            return Err(format!(
                "has a broken header: `{}` and `{}` overlap",
                pair[0].name, pair[1].name
            ));
        }
    }
    Ok(tensors)
}

struct Reader<'a> {
    bytes: BufReader<&'a mut dyn Bytes>,
    at: u64,
    /// Nothing of the header may lie behind it.
    end: u64,
    size: u64,
}

impl Reader<'_> {
    fn has_room(&self, count: u64, each: u64) -> Result<(), String> {
        let left = self.end - self.at;
        if count.checked_mul(each).is_some_and(|bytes| bytes <= left) {
            Ok(())
        } else if self.end < self.size {
            Err(format!("has a header of more than {MAX_HEADER} bytes"))
        } else {
            Err(format!(
                "is cut short, or its header is broken: something ends behind byte {}",
                self.size
            ))
        }
    }

    fn read(&mut self, len: u64) -> Result<Vec<u8>, String> {
        self.has_room(len, 1)?;
        let mut bytes = vec![0; len as usize];
        self.bytes
            .read_exact(&mut bytes)
            .map_err(|e| e.to_string())?;
        self.at += len;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.has_room(N as u64, 1)?;
        let mut bytes = [0; N];
        self.bytes
            .read_exact(&mut bytes)
            .map_err(|e| e.to_string())?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        String::from_utf8(self.read(len)?)
            .map_err(|_| "has a broken header: a text is not UTF-8".into())
    }

    fn value(&mut self, key: &str) -> Result<Value, String> {
        let kind = self.u32()?;
        if kind != ARRAY {
            return Ok(match kind {
                FLOAT | DOUBLE => Value::Float(self.float(kind)?),
                BOOL => Value::Bool(self.take()? != [0u8]),
                TEXT => Value::Text(self.text()?),
                _ => Value::Integer(self.integer(key, kind)?),
            });
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        if count > MAX_ITEMS {
            return Err(format!(
                "has a broken header: `{key}` has {count} items, at most {MAX_ITEMS} are read"
            ));
        }
        Ok(match kind {
            FLOAT | DOUBLE => Value::Floats(self.items(count, |r| r.float(kind))?),
            BOOL => Value::Bools(self.items(count, |r| Ok(r.take()? != [0u8]))?),
            TEXT => Value::Texts(self.items(count, Self::text)?),
            // An array of arrays is none of these; no SmolVLM has one.
            _ => Value::Integers(self.items(count, |r| r.integer(key, kind))?),
        })
    }

    /// Grows item by item: a count alone allocates nothing.
    fn items<T>(
        &mut self,
        count: u64,
        mut item: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        (0..count).map(|_| item(self)).collect()
    }

    fn float(&mut self, kind: u32) -> Result<f64, String> {
        match kind {
            // The number that was meant: 1e-5 rather than the f32 next to it.
            FLOAT => Ok(shortest(f32::from_le_bytes(self.take()?))),
            _ => self.take().map(f64::from_le_bytes),
        }
    }

    fn integer(&mut self, key: &str, kind: u32) -> Result<i64, String> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.take()?).into(),
            1 => i8::from_le_bytes(self.take()?).into(),
            2 => u16::from_le_bytes(self.take()?).into(),
            3 => i16::from_le_bytes(self.take()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.take()?).into(),
            // Nothing that counts goes as far as 2^63.
            10 => self.u64()?.try_into().unwrap_or(i64::MAX),
            11 => i64::from_le_bytes(self.take()?),
            _ => {
                return Err(format!(
                    "has a broken header: `{key}` is of the type {kind}"
                ));
            }
        })
    }

    /// Its start counts from the end of the header, which is not known yet.
    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo, String> {
        let name = self.text()?;
        let broken = |what: String| format!("has a broken header: `{name}` {what}");
        let dims = self.u32()? as usize;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(broken(format!("has {dims} dimensions")));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let dim = self.u64()?;
            shape.push(usize::try_from(dim).map_err(|_| broken(format!("is {dim} long")))?);
        }
        let kind = self.u32()?;
        let dtype = dtype(kind)
            .ok_or_else(|| format!("holds `{name}` as {}, which is not read", type_name(kind)))?;
        // The first dimension of the file is the one that lies in a row.
        if !shape[0].is_multiple_of(dtype.block_size()) {
            return Err(broken(format!("has rows of {} as {dtype:?}", shape[0])));
        }
        shape.reverse();
        let values = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let len = values
            .map(|n| n / dtype.block_size())
            .and_then(|blocks| blocks.checked_mul(dtype.type_size()))
            .ok_or_else(|| broken(format!("has the shape {shape:?}")))?;
        let start = self.u64()?;
        if !start.is_multiple_of(alignment) {
            return Err(broken(format!("starts at {start}, not aligned")));
        }
        Ok(TensorInfo {
            name,
            dtype,
            shape,
            start,
            len,
        })
    }
}

/// The double whose shortest decimal is that of `value`, as JSON would have it.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}

// Types of values; the others are integers.
const FLOAT: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const DOUBLE: u32 = 12;

/// The types of `ggml.h` that candle multiplies with.
fn dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// As file names and `llama-quantize` call the others.
fn type_name(kind: u32) -> String {
    const NAMES: [(u32, &str); 12] = [
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    let name = NAMES.iter().find(|(number, _)| *number == kind);
    name.map_or_else(|| format!("type {kind}"), |(_, name)| (*name).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// Key, type and value.
    fn value(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&text(key), &kind.to_le_bytes()[..], value].concat()
    }

    fn array(key: &str, kind: u32, count: u64, items: &[u8]) -> Vec<u8> {
        let head = [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
        value(key, ARRAY, &[&head, items].concat())
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = [text(name), (dims.len() as u32).to_le_bytes().into()].concat();
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    fn counted(version: u32, tensors: u64, values: u64, rest: &[u8]) -> Vec<u8> {
        let counts = [tensors.to_le_bytes(), values.to_le_bytes()].concat();
        [b"GGUF", &version.to_le_bytes()[..], &counts, rest].concat()
    }

    fn file(values: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
        let rest = [values.concat(), tensors.concat()].concat();
        let mut file = counted(3, tensors.len() as u64, values.len() as u64, &rest);
        file.resize(file.len().next_multiple_of(32) + data, 0);
        file
    }

    fn read(file: Vec<u8>) -> Result<Header, String> {
        Header::read(&mut io::Cursor::new(file))
    }

    #[test]
    fn values_and_tensors_are_read() {
        let values = [
            value("count", 4, &7u32.to_le_bytes()),
            value("less", 11, &(-7i64).to_le_bytes()),
            value("eps", FLOAT, &1e-5f32.to_le_bytes()),
            value("on", BOOL, &[1]),
            value("name", TEXT, &text("Smöl")),
            array("tokens", TEXT, 2, &[text("a"), text("")].concat()),
            array("mean", FLOAT, 1, &0.5f32.to_le_bytes()),
            array("kinds", 5, 2, &[3i32, 1].map(i32::to_le_bytes).concat()),
            value("general.alignment", 4, &64u32.to_le_bytes()),
        ];
        // Rows of 32 in blocks of 34 bytes; the other lies where the alignment allows.
        let tensors = [tensor("q", &[32, 2], 8, 0), tensor("f", &[4], 0, 128)];
        let mut file = file(&values, &tensors, 0);
        file.resize(file.len().next_multiple_of(64) + 128 + 16, 0);
        let start = file.len() as u64 - 144;
        let header = read(file).unwrap();
        for (key, expected) in [
            ("count", Value::Integer(7)),
            ("less", Value::Integer(-7)),
            ("eps", Value::Float(1e-5)),
            ("on", Value::Bool(true)),
            ("name", Value::Text("Smöl".into())),
            ("tokens", Value::Texts(vec!["a".into(), "".into()])),
            ("mean", Value::Floats(vec![0.5])),
            ("kinds", Value::Integers(vec![3, 1])),
        ] {
            assert_eq!(header.values[key], expected);
        }
        let [q, f] = &header.tensors[..] else {
            panic!("{:?}", header.tensors);
        };
        assert_eq!((&q.shape[..], q.start, q.len), (&[2, 32][..], start, 68));
        assert_eq!((&f.shape[..], f.start, f.len), (&[4][..], start + 128, 16));
    }

    #[test]
    fn headers_are_not_believed() {
        let one = |tensor: Vec<u8>| file(&[], &[tensor], 64);
        let says = |value: Vec<u8>| file(&[value], &[], 0);
        assert!(read(one(tensor("t", &[16], 0, 0))).is_ok());
        let whole = one(tensor("t", &[16], 0, 0));
        let deep = (0..64).fold(vec![], |inner, _| {
            array("", ARRAY, 1, &inner)[12..].to_vec()
        });
        for (what, file, reason) in [
            ("empty", vec![], "not GGUF"),
            ("another format", b"PK\x03\x04 and so on".into(), "not GGUF"),
            ("version 1", counted(1, 0, 0, &[]), "version 1"),
            ("big endian", counted(3u32.to_be(), 0, 0, &[]), "version"),
            (
                "nothing behind",
                counted(3, 0, 0, &[])[..20].into(),
                "cut short",
            ),
            (
                "data cut",
                whole[..whole.len() - 1].into(),
                "cut short: `t`",
            ),
            (
                "1e9 tensors",
                counted(3, 1_000_000_000, 0, &[0; 99]),
                "cut short",
            ),
            (
                "2^64 tensors",
                counted(3, u64::MAX, 0, &[0; 99]),
                "cut short",
            ),
            (
                "2^64 values",
                counted(3, 0, u64::MAX, &[0; 99]),
                "cut short",
            ),
            (
                "a terabyte",
                one(tensor("t", &[1 << 38], 0, 0)),
                "cut short: `t`",
            ),
            (
                "2^64 bytes",
                one(tensor("t", &[1 << 62, 1], 0, 0)),
                "broken header: `t`",
            ),
            (
                "overflow",
                one(tensor("t", &[1 << 40, 1 << 40], 0, 0)),
                "broken header: `t`",
            ),
            (
                "offset overflow",
                one(tensor("t", &[16], 0, !31)),
                "cut short: `t`",
            ),
            ("no alignment", one(tensor("t", &[4], 0, 1)), "not aligned"),
            (
                "5 dimensions",
                one(tensor("t", &[1; 5], 0, 0)),
                "5 dimensions",
            ),
            ("none", one(tensor("t", &[], 0, 0)), "0 dimensions"),
            (
                "part of a block",
                one(tensor("t", &[16, 2], 8, 0)),
                "rows of 16",
            ),
            ("IQ4_XS", one(tensor("t", &[256], 23, 0)), "`t` as IQ4_XS"),
            (
                "a future type",
                one(tensor("t", &[16], 999, 0)),
                "`t` as type 999",
            ),
            (
                "twice",
                file(
                    &[],
                    &[tensor("t", &[4], 0, 0), tensor("t", &[4], 0, 32)],
                    64,
                ),
                "`t` is there twice",
            ),
            (
                "overlap",
                file(
                    &[],
                    &[tensor("t", &[16], 0, 0), tensor("u", &[4], 0, 32)],
                    64,
                ),
                "`t` and `u` overlap",
            ),
            (
                "a key twice",
                file(&[value("k", 0, &[1]), value("k", 0, &[1])], &[], 0),
                "`k` is there twice",
            ),
            (
                "a text of 2^64",
                says(value("k", TEXT, &[255; 8])),
                "cut short",
            ),
            (
                "a text of 1 GB",
                says(value("k", TEXT, &(1u64 << 30).to_le_bytes())),
                "cut short",
            ),
            (
                "no UTF-8",
                says(value("k", TEXT, &[1, 0, 0, 0, 0, 0, 0, 0, 255])),
                "UTF-8",
            ),
            ("a bomb", says(array("k", 0, 1 << 40, &[])), "`k` has"),
            (
                "a smaller bomb",
                says(array("k", TEXT, 1 << 20, &[])),
                "cut short",
            ),
            (
                "arrays of arrays",
                says(array("k", ARRAY, 1, &deep)),
                "`k` is of the type 9",
            ),
            (
                "type 13",
                says(value("k", 13, &[0; 8])),
                "`k` is of the type 13",
            ),
            (
                "alignment 0",
                says(value("general.alignment", 4, &[0; 4])),
                "`general.alignment` is 0",
            ),
            (
                "alignment 48",
                says(value("general.alignment", 4, &48u32.to_le_bytes())),
                "`general.alignment` is 48",
            ),
        ] {
            let error = read(file).err().unwrap_or_else(|| panic!("{what}"));
            assert!(error.contains(reason), "{what}: {error}");
        }
    }

    #[test]
    fn a_header_has_a_largest_size() {
        let many = array("k", 0, MAX_ITEMS, &vec![0; MAX_ITEMS as usize]);
        let key = |i: usize| [&text(&i.to_string()), &many[9..]].concat();
        let error = read(file(&(0..40).map(key).collect::<Vec<_>>(), &[], 0)).err();
        assert_eq!(error.unwrap(), "has a header of more than 33554432 bytes");
    }

    /// Whatever is cut off and wherever a bit tips, there is an answer.
    #[test]
    fn no_header_panics() {
        let values = [
            value("general.alignment", 4, &32u32.to_le_bytes()),
            array("tokens", TEXT, 2, &[text("a"), text("b")].concat()),
        ];
        let file = file(&values, &[tensor("t", &[32, 1], 8, 0)], 64);
        assert!(read(file.clone()).is_ok());
        for end in 0..file.len() - 64 {
            assert!(read(file[..end].into()).is_err());
        }
        for bit in 0..8 * (file.len() - 64) {
            let mut file = file.clone();
            file[bit / 8] ^= 1 << (bit % 8);
            let _ = read(file);
        }
    }
}
