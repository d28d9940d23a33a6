//! A streamed answer that is whatever the fuzzer makes of it, in pieces of any size.

/// Parses the bytes behind the first one, which says how they are cut. Returns whether they are an answer.
///
/// # Panics
///
/// The answer depends on the pieces.
pub fn stream(bytes: &[u8]) -> bool {
    let Some((size, bytes)) = bytes.split_first() else {
        return false;
    };
    let whole = vlmnarrate_openai::parse_stream(&[bytes]);
    let pieces: Vec<_> = bytes.chunks(1 + usize::from(*size)).collect();
    let cut = vlmnarrate_openai::parse_stream(&pieces);
    assert_eq!(whole, cut);
    whole.is_ok_and(|text| !text.is_empty())
}
