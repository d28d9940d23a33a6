//! What the hub says of a repository, none of which is believed before it becomes a path.

use std::path::{Component, Path};

use serde::Deserialize;

/// What the hub says of a repository.
#[derive(Deserialize)]
pub(crate) struct Info {
    pub(crate) sha: String,
    pub(crate) siblings: Vec<File>,
    /// `false`, or who lets one in.
    gated: Option<serde_json::Value>,
    private: Option<bool>,
}

impl Info {
    pub(crate) fn is_public(&self) -> bool {
        self.gated == Some(false.into()) && self.private == Some(false)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct File {
    #[serde(rename = "rfilename")]
    pub(crate) name: String,
    pub(crate) size: Option<u64>,
    blob_id: Option<String>,
    pub(crate) lfs: Option<Lfs>,
}

#[derive(Deserialize)]
pub(crate) struct Lfs {
    pub(crate) sha256: String,
}

impl File {
    pub(crate) fn size(&self) -> u64 {
        self.size.unwrap_or_default()
    }

    /// Name of the blob in the cache.
    pub(crate) fn etag(&self) -> Option<&str> {
        let lfs = self.lfs.as_ref().map(|lfs| lfs.sha256.as_str());
        lfs.or(self.blob_id.as_deref())
    }
}

/// Whether a server's word may become a file's name: Git's and SHA-256 sums, and what mirrors take for them.
pub(crate) fn is_etag(etag: &str) -> bool {
    let is_plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
    (1..=128).contains(&etag.len()) && etag.bytes().all(is_plain)
}

/// Whether a server's name for a file stays in the folder that it is joined to.
pub(crate) fn is_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// A part of an address.
pub(crate) fn escaped(name: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_./~".contains(&c);
    let escape = |c: u8| match plain(c) {
        true => char::from(c).to_string(),
        false => format!("%{c:02X}"),
    };
    name.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_names_stays_in_its_folder() {
        for name in ["config.json", "onnx/model.onnx", "a b", "..."] {
            assert!(is_inside(name), "{name}");
        }
        for name in ["", "../x", "a/../../x", "/x", "..", "a\\..\\x", "a\0"] {
            assert!(!is_inside(name), "{name}");
        }
        assert!(is_etag("0123abcdef") && is_etag("9a-12"));
        for etag in ["", ".", "../x", "a/b", "a.lock", &"a".repeat(129)] {
            assert!(!is_etag(etag), "{etag}");
        }
        assert_eq!(escaped("a b/ü?#.gguf"), "a%20b/%C3%BC%3F%23.gguf");
    }
}
