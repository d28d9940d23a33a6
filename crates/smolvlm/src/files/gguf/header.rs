//! The header of a [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) file, which is not trusted.
//!
//! A header has a largest size, and each count is compared with the bytes that are left before anything is allocated.
//! Not `gguf_file::Content::read` of candle 0.11.1, even within a limit: it divides by an alignment of 0, keeps 32 bytes
//! for each item of an array, takes the last of two keys or tensors of one name, replaces what is not UTF-8, and its
//! errors don't name the tensor of an unknown type. Whether tensors overlap, are aligned and inside the file, and
//! whether the product of their dimensions overflows, it doesn't check.

use std::{
    collections::{HashMap, HashSet},
    io::{self, SeekFrom},
};

use candle_core::quantized::GgmlDType;

use super::reader::{Reader, Value};
use crate::files::weights::ReadSeek;

/// Bytes of a header, at most: ten times what the vocabulary of the family takes.
const MAX_HEADER_SIZE: u64 = 32 << 20;
const MAX_DIMS: usize = 4;
const MAX_ALIGNMENT: u64 = 1 << 16;

/// The type, shape and place of a tensor, which is known to be inside the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) name: String,
    pub(crate) dtype: GgmlDType,
    /// Dimensions, outermost first; the file has them innermost first.
    pub(crate) shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub(crate) start: u64,
    pub(crate) len: usize,
}

/// Metadata and tensor descriptions of a GGUF file.
pub(crate) struct Header {
    pub(crate) metadata: HashMap<String, Value>,
    /// In the order of the file's data.
    pub(crate) tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads and checks a header. The error is a reason without the file's name.
    pub(crate) fn read(bytes: &mut dyn ReadSeek) -> Result<Self, String> {
        let io = |e: io::Error| e.to_string();
        let size = bytes.seek(SeekFrom::End(0)).map_err(io)?;
        bytes.rewind().map_err(io)?;
        let mut reader = Reader::new(bytes, size, MAX_HEADER_SIZE);
        if size < 4 || reader.array()? != *b"GGUF" {
            return Err("is not GGUF".into());
        }
        match reader.u32()? {
            2 | 3 => (),
            version => {
                return Err(format!(
                    "has GGUF version {version}, only 2 and 3 are supported"
                ));
            }
        }
        let (tensors, keys) = (reader.u64()?, reader.u64()?);
        // The least that each takes: lengths, types and offsets.
        reader.check_room(tensors, 8 + 4 + 4 + 8)?;
        reader.check_room(keys, 8 + 4 + 1)?;
        let metadata = read_metadata(&mut reader, keys)?;
        let tensors = read_tensors(&mut reader, tensors, size, alignment(&metadata)?)?;
        Ok(Self { metadata, tensors })
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: u64) -> Result<HashMap<String, Value>, String> {
    let mut metadata = HashMap::new();
    for _ in 0..count {
        let key = reader.string()?;
        let value = reader.value(&key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("has a broken header: `{key}` appears twice"));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(&Value::Integer(n)) => u64::try_from(n)
            .ok()
            .filter(|n| n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(n))
            .ok_or_else(|| format!("has a broken header: `general.alignment` is {n}")),
        Some(_) => Err("has a broken header: `general.alignment` is not a number".into()),
    }
}

fn read_tensors(
    reader: &mut Reader<'_>,
    count: u64,
    file_size: u64,
    alignment: u64,
) -> Result<Vec<TensorInfo>, String> {
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..count {
        let tensor = read_tensor(reader, alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!(
                "has a broken header: `{}` appears twice",
                tensor.name
            ));
        }
        tensors.push(tensor);
    }
    // Offsets count from the end of the header, aligned.
    let data = reader.position().next_multiple_of(alignment);
    for tensor in &mut tensors {
        let end = data
            .checked_add(tensor.start)
            .and_then(|start| start.checked_add(tensor.len as u64));
        if end.is_none_or(|end| end > file_size) {
            return Err(format!(
                "is cut short: `{}` ends behind byte {file_size}",
                tensor.name
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

/// Reads the description of a tensor, whose start still counts from the end of the header.
fn read_tensor(reader: &mut Reader<'_>, alignment: u64) -> Result<TensorInfo, String> {
    let name = reader.string()?;
    let broken = |what: String| format!("has a broken header: `{name}` {what}");
    let dims = reader.u32()? as usize;
    if !(1..=MAX_DIMS).contains(&dims) {
        return Err(broken(format!("has {dims} dimensions")));
    }
    let mut shape = Vec::with_capacity(dims);
    for _ in 0..dims {
        let dim = reader.u64()?;
        shape.push(usize::try_from(dim).map_err(|_| broken(format!("is {dim} long")))?);
    }
    let kind = reader.u32()?;
    let dtype = dtype(kind).ok_or_else(|| {
        format!(
            "has `{name}` as {}, which is not supported",
            type_name(kind)
        )
    })?;
    // The file's first dimension is the length of a row.
    if !shape[0].is_multiple_of(dtype.block_size()) {
        return Err(broken(format!("has rows of {} as {dtype:?}", shape[0])));
    }
    shape.reverse();
    let values = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let len = values
        .map(|n| n / dtype.block_size())
        .and_then(|blocks| blocks.checked_mul(dtype.type_size()))
        .ok_or_else(|| broken(format!("has the shape {shape:?}")))?;
    let start = reader.u64()?;
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

/// The candle type of an `enum ggml_type`, if candle computes with it.
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

/// The name of a type that [`dtype`] doesn't have, as `llama-quantize` calls it.
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
    use super::{
        super::reader::{ARRAY, BOOL, FLOAT32, MAX_ARRAY_LEN, STRING},
        *,
    };

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A key with its type and value.
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
    fn metadata_and_tensors_are_read() {
        let values = [
            value("count", 4, &7u32.to_le_bytes()),
            value("less", 11, &(-7i64).to_le_bytes()),
            value("eps", FLOAT32, &1e-5f32.to_le_bytes()),
            value("on", BOOL, &[1]),
            value("name", STRING, &text("Smöl")),
            array("tokens", STRING, 2, &[text("a"), text("")].concat()),
            array("mean", FLOAT32, 1, &0.5f32.to_le_bytes()),
            array("kinds", 5, 2, &[3i32, 1].map(i32::to_le_bytes).concat()),
            value("general.alignment", 4, &64u32.to_le_bytes()),
        ];
        // Rows of 32 values in blocks of 34 bytes, then the next aligned offset.
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
            ("name", Value::String("Smöl".into())),
            ("tokens", Value::Strings(vec!["a".into(), "".into()])),
            ("mean", Value::Floats(vec![0.5])),
            ("kinds", Value::Integers(vec![3, 1])),
        ] {
            assert_eq!(header.metadata[key], expected);
        }
        let [q, f] = &header.tensors[..] else {
            panic!("{:?}", header.tensors);
        };
        assert_eq!((&q.shape[..], q.start, q.len), (&[2, 32][..], start, 68));
        assert_eq!((&f.shape[..], f.start, f.len), (&[4][..], start + 128, 16));
    }

    #[test]
    fn broken_headers_are_refused() {
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
                "`t` appears twice",
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
                "`k` appears twice",
            ),
            (
                "a text of 2^64",
                says(value("k", STRING, &[255; 8])),
                "cut short",
            ),
            (
                "a text of 1 GB",
                says(value("k", STRING, &(1u64 << 30).to_le_bytes())),
                "cut short",
            ),
            (
                "no UTF-8",
                says(value("k", STRING, &[1, 0, 0, 0, 0, 0, 0, 0, 255])),
                "UTF-8",
            ),
            ("a bomb", says(array("k", 0, 1 << 40, &[])), "`k` has"),
            (
                "a smaller bomb",
                says(array("k", STRING, 1 << 20, &[])),
                "cut short",
            ),
            (
                "arrays of arrays",
                says(array("k", ARRAY, 1, &deep)),
                "`k` has the type 9",
            ),
            (
                "type 13",
                says(value("k", 13, &[0; 8])),
                "`k` has the type 13",
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
        let many = array("k", 0, MAX_ARRAY_LEN, &vec![0; MAX_ARRAY_LEN as usize]);
        let key = |i: usize| [&text(&i.to_string()), &many[9..]].concat();
        let error = read(file(&(0..40).map(key).collect::<Vec<_>>(), &[], 0)).err();
        assert_eq!(error.unwrap(), "has a header of more than 33554432 bytes");
    }

    /// Truncations at each byte and flips of each bit.
    #[test]
    fn no_header_panics() {
        let values = [
            value("general.alignment", 4, &32u32.to_le_bytes()),
            array("tokens", STRING, 2, &[text("a"), text("b")].concat()),
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
