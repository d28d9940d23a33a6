//! The hub's listing of a repository, whose names are checked before they become paths.

use std::path::{Component, Path};

use serde::Deserialize;

/// A repository at a commit, as `/api/models/…` describes it.
#[derive(Deserialize)]
pub(crate) struct ModelInfo {
    pub(crate) sha: String,
    pub(crate) siblings: Vec<Sibling>,
    /// `false`, or the kind of approval that is needed.
    gated: Option<serde_json::Value>,
    private: Option<bool>,
}

impl ModelInfo {
    pub(crate) fn is_public(&self) -> bool {
        self.gated == Some(false.into()) && self.private == Some(false)
    }
}

/// A file of the repository.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sibling {
    #[serde(rename = "rfilename")]
    pub(crate) name: String,
    pub(crate) size: Option<u64>,
    blob_id: Option<String>,
    pub(crate) lfs: Option<LfsInfo>,
}

/// The Git LFS entry of a large file.
#[derive(Deserialize)]
pub(crate) struct LfsInfo {
    pub(crate) sha256: String,
}

impl Sibling {
    pub(crate) fn size(&self) -> u64 {
        self.size.unwrap_or_default()
    }

    /// Name of the file's blob in the cache: SHA-256 of a large file, Git's hash of a small one.
    pub(crate) fn etag(&self) -> Option<&str> {
        let lfs = self.lfs.as_ref().map(|lfs| lfs.sha256.as_str());
        lfs.or(self.blob_id.as_deref())
    }
}

/// Whether an ETag can be the name of a blob: a hash of Git, a SHA-256, or what mirrors send instead.
pub(crate) fn is_etag(etag: &str) -> bool {
    let is_plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
    (1..=128).contains(&etag.len()) && etag.bytes().all(is_plain)
}

/// Whether a file's name, joined to a folder, stays in that folder.
pub(crate) fn is_relative_path(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Percent-encodes a path for a URL.
pub(crate) fn percent_encode(name: &str) -> String {
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
            assert!(is_relative_path(name), "{name}");
        }
        for name in ["", "../x", "a/../../x", "/x", "..", "a\\..\\x", "a\0"] {
            assert!(!is_relative_path(name), "{name}");
        }
        assert!(is_etag("0123abcdef") && is_etag("9a-12"));
        for etag in ["", ".", "../x", "a/b", "a.lock", &"a".repeat(129)] {
            assert!(!is_etag(etag), "{etag}");
        }
        assert_eq!(percent_encode("a b/ü?#.gguf"), "a%20b/%C3%BC%3F%23.gguf");
    }
}
