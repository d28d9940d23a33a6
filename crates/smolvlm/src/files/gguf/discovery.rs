//! Discovery of text models and mmproj files in a folder or a repository, by the names that llama.cpp's tools give them:
//! `SmolVLM-256M-Instruct-Q8_0.gguf` and `mmproj-SmolVLM-256M-Instruct-Q8_0.gguf`.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Result},
    files::source::{CONFIG, Source},
};

/// Quantizations of the text model in order of preference, for a repository without a tag.
#[cfg(feature = "hub")]
const PREFERRED: [&str; 2] = ["Q8_0", "Q4_K_M"];
/// Quantizations of the mmproj file in order of preference.
const PREFERRED_MMPROJ: [&str; 4] = ["F16", "BF16", "F32", "Q8_0"];

/// The part of a name that marks an mmproj file, upper-case as [`split_quantization`] returns it.
const MMPROJ: &str = "MMPROJ";

/// The names of a model's two files in a repository.
#[cfg(feature = "hub")]
#[derive(Debug, PartialEq)]
pub(crate) struct FileNames {
    pub(crate) text: String,
    pub(crate) projector: String,
}

#[cfg(feature = "hub")]
impl FileNames {
    /// The files in a folder that holds a snapshot of the repository.
    pub(crate) fn into_source(self, folder: &Path) -> Source {
        Source::Gguf {
            text: folder.join(self.text),
            projector: folder.join(self.projector),
            // A repository has one model.
            guessed: false,
        }
    }

    /// Chooses among the files of a repository: the quantization `tag`, or the preferred one.
    pub(crate) fn choose(names: &[String], tag: Option<&str>) -> Result<Self, String> {
        let texts = text_models(names);
        let of = |tag: &str| texts.iter().find(|name| is_of_quantization(name, tag));
        let text = match tag {
            Some(tag) => of(tag),
            None => PREFERRED.iter().find_map(|tag| of(tag)).or(texts.first()),
        };
        let text = text.ok_or_else(|| match tag {
            Some(tag) => format!("has no {tag} among its GGUF files ({})", list(&texts)),
            None => "has no GGUF file of a model".into(),
        })?;
        Ok(Self {
            projector: choose_projector(names, text)?.name,
            text: (*text).into(),
        })
    }

    /// Whether the text model is the first choice without a tag.
    pub(crate) fn is_preferred(&self) -> bool {
        is_of_quantization(&self.text, PREFERRED[0])
    }
}

pub(crate) fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

fn is_projector(name: &str) -> bool {
    name.to_ascii_uppercase().contains(MMPROJ)
}

fn text_models(names: &[String]) -> Vec<&str> {
    let is_text = |name: &&str| {
        // Not importance matrices, nor files in folders of a repository.
        is_gguf(name) && !is_projector(name) && !name.contains("imatrix") && !name.contains('/')
    };
    names.iter().map(String::as_str).filter(is_text).collect()
}

fn list(names: &[&str]) -> String {
    match names {
        [] => "there are none".into(),
        names => names.join(", "),
    }
}

/// Splits a file name into name and quantization, upper-case as llama.cpp compares them. Either may be empty.
fn split_quantization(name: &str) -> (String, String) {
    let name = name.to_ascii_uppercase();
    let stem = name.strip_suffix(".GGUF").unwrap_or(&name);
    let is_quantization = |tag: &str| {
        let kind = tag.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let kinds = ["Q", "IQ", "TQ", "F", "BF", "MXFP"];
        kinds.contains(&&tag[..tag.len() - kind.len()]) && kind.starts_with(char::is_numeric)
    };
    match stem.rsplit_once(['-', '.']) {
        Some((base, tag)) if is_quantization(tag) => (base.into(), tag.into()),
        _ if is_quantization(stem) => (String::new(), stem.into()),
        _ => (stem.into(), String::new()),
    }
}

/// The quantization in a file's name, if there is one.
pub(crate) fn quantization(name: &str) -> Option<String> {
    Some(split_quantization(name).1).filter(|tag| !tag.is_empty())
}

fn is_of_quantization(name: &str, tag: &str) -> bool {
    split_quantization(name).1 == tag.to_ascii_uppercase()
}

/// An mmproj file, and whether it was chosen only because there is no other.
#[derive(Debug, PartialEq)]
struct ProjectorChoice {
    name: String,
    guessed: bool,
}

/// The model's name in the name of an mmproj file: `mmproj-NAME-F16.gguf`, `NAME-mmproj-F16.gguf` or
/// `owner_repo_mmproj-NAME-F16.gguf`.
fn model_name(projector: &str) -> String {
    const SEPARATORS: [char; 3] = ['-', '.', '_'];
    let base = split_quantization(projector).0;
    let Some((before, after)) = base.split_once(MMPROJ) else {
        return base;
    };
    let after = match before.is_empty() || before.ends_with(SEPARATORS) {
        true => after.trim_start_matches(SEPARATORS),
        false => after,
    };
    format!("{before}{after}")
        .trim_end_matches(SEPARATORS)
        .to_owned()
}

/// The prefix `owner_repo_` of an mmproj file in llama.cpp's cache, which has no folders; empty if there is none.
fn cache_prefix(projector: &str) -> String {
    let name = projector.to_ascii_uppercase();
    let prefix = name.split_once(MMPROJ).map_or("", |(prefix, _)| prefix);
    match prefix.ends_with('_') && prefix.trim_end_matches('_').contains('_') {
        true => prefix.to_owned(),
        false => String::new(),
    }
}

/// Chooses the mmproj file of a text model: of the same name, else of the same repository in llama.cpp's cache, else the
/// only one. Of several quantizations, that of the text model is preferred.
fn choose_projector(names: &[String], text: &str) -> Result<ProjectorChoice, String> {
    let all: Vec<_> = names
        .iter()
        .map(String::as_str)
        .filter(|name| is_gguf(name) && is_projector(name) && !name.contains('/'))
        .collect();
    let (own, tag) = split_quantization(text);
    let named: Vec<_> = all
        .iter()
        .copied()
        .filter(|n| model_name(n) == own)
        .collect();
    let is_of_repository = |name: &&str| {
        let prefix = cache_prefix(name);
        !prefix.is_empty() && own.starts_with(&prefix)
    };
    let cached: Vec<_> = all.iter().copied().filter(is_of_repository).collect();
    // One repository's prefix may begin with another's.
    let longest = cached.iter().map(|name| cache_prefix(name).len()).max();
    let cached = cached
        .into_iter()
        .filter(|name| Some(cache_prefix(name).len()) == longest);
    let cached: Vec<_> = cached.collect();
    let (left, guessed) = match (named.is_empty(), cached.is_empty()) {
        (false, _) => (named, false),
        (true, false) => (cached, false),
        (true, true) => (all, true),
    };
    let Some(first) = left.first() else {
        return Err(format!("has no mmproj file to go with {text}"));
    };
    let ambiguous = |names: &[&str]| {
        let names = list(names);
        format!("has more than one mmproj file that may go with {text}: {names}")
    };
    if left
        .iter()
        .any(|name| model_name(name) != model_name(first))
    {
        return Err(ambiguous(&left));
    }
    let tags = [tag.as_str()].into_iter().chain(PREFERRED_MMPROJ);
    let found = tags
        .into_iter()
        .find(|tag| left.iter().any(|name| is_of_quantization(name, tag)))
        .unwrap_or_default();
    let of_tag: Vec<_> = left
        .iter()
        .copied()
        .filter(|n| is_of_quantization(n, found))
        .collect();
    match of_tag[..] {
        [] => Ok(*first),
        [name] => Ok(name),
        _ => Err(ambiguous(&of_tag)),
    }
    .map(|name| ProjectorChoice {
        name: name.into(),
        guessed,
    })
}

/// The model of a text model's file; the mmproj file is in the same folder.
pub(crate) fn source_of_text_model(text: &Path) -> Result<Source> {
    text_exists(text)?;
    let folder = match text.parent() {
        // The parent of a bare file name.
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        folder => folder.unwrap_or(text),
    };
    let file = text.file_name().unwrap_or_default();
    let name = file.to_string_lossy();
    if is_projector(&name) {
        return Err(Error::file(
            text,
            "is the mmproj file of a model",
            "Set model to the other GGUF file, that of the text model; this one is found beside it",
        ));
    }
    source(folder, &list_files(folder)?, folder.join(file), &name)
}

fn text_exists(text: &Path) -> Result<()> {
    match text.exists() {
        true => Ok(()),
        false => Err(Error::NotFound {
            path: text.to_owned(),
            what: "file",
            remedy: "Set model to the GGUF file of a text model, with its mmproj file beside it"
                .into(),
        }),
    }
}

/// The text model `model`, a file or a folder with one, and the mmproj file `mmproj`.
pub(crate) fn with_mmproj(model: Option<&OsStr>, mmproj: &OsStr) -> Result<Source> {
    let unfit = |what: String| Error::Setting {
        property: "mmproj",
        reason: format!(
            "{} can only go with a GGUF file, and {what}. Set model to the GGUF file of a text model on this \
             machine, or leave mmproj unset",
            Path::new(mmproj).display()
        ),
    };
    let Some(model) = model.filter(|model| !model.is_empty()) else {
        return Err(unfit("model is not set".into()));
    };
    let path = Path::new(model);
    let text = match path.is_dir() {
        true if path.join(CONFIG).exists() => None,
        true => match &text_models(&list_files(path)?)[..] {
            [] => None,
            [text] => Some(path.join(text)),
            texts => return Err(ambiguous_error(path, texts)),
        },
        false => is_gguf(&model.to_string_lossy()).then(|| path.to_owned()),
    };
    let text = text.ok_or_else(|| unfit(format!("model={} is none", path.display())))?;
    text_exists(&text)?;
    let projector = PathBuf::from(mmproj);
    if !projector.exists() {
        return Err(Error::NotFound {
            path: projector,
            what: "file",
            remedy: "Set mmproj to the mmproj file of the model, or leave it unset to have it found beside \
                     the model"
                .into(),
        });
    }
    Ok(Source::Gguf {
        text,
        projector,
        guessed: false,
    })
}

/// The model of a folder; `None` if the folder has no GGUF file.
pub(crate) fn source_in_folder(folder: &Path) -> Result<Option<Source>> {
    let names = list_files(folder)?;
    match &text_models(&names)[..] {
        [text] => source(folder, &names, folder.join(text), text).map(Some),
        [] if !names.iter().any(|name| is_gguf(name)) => Ok(None),
        [] => Err(Error::file(
            folder,
            "has an mmproj file and no other GGUF file",
            "Download the text model of the same repository beside it",
        )),
        texts => Err(ambiguous_error(folder, texts)),
    }
}

fn ambiguous_error(folder: &Path, texts: &[&str]) -> Error {
    Error::file(
        folder,
        format!("has more than one GGUF file: {}", list(texts)),
        "Set model to one of the files",
    )
}

fn source(folder: &Path, names: &[String], text: PathBuf, name: &str) -> Result<Source> {
    let found = choose_projector(names, name).map_err(|reason| {
        let remedy = "llama.cpp keeps the vision encoder in a file of its own: set mmproj to the mmproj file of \
                      the same model, or put it beside the text model, and no other";
        Error::file(folder, reason, remedy)
    })?;
    Ok(Source::Gguf {
        text,
        projector: folder.join(found.name),
        guessed: found.guessed,
    })
}

/// Names of a folder's files, sorted: the choice must not depend on the file system.
pub(crate) fn list_files(folder: &Path) -> Result<Vec<String>> {
    let unread = |e| Error::file(folder, e, "Check its permissions");
    let mut names = Vec::new();
    for file in fs::read_dir(folder).map_err(unread)? {
        names.extend(file.map_err(unread)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.into()).collect()
    }

    #[test]
    fn a_name_is_split_from_its_quantization() {
        for (name, base, tag) in [
            (
                "SmolVLM-256M-Instruct-Q8_0.gguf",
                "SMOLVLM-256M-INSTRUCT",
                "Q8_0",
            ),
            (
                "SmolVLM2-2.2B-Instruct-Q4_K_M.gguf",
                "SMOLVLM2-2.2B-INSTRUCT",
                "Q4_K_M",
            ),
            ("m.f16.gguf", "M", "F16"),
            ("SmolVLM-256M-Instruct.gguf", "SMOLVLM-256M-INSTRUCT", ""),
            ("F32.GGUF", "", "F32"),
        ] {
            assert_eq!(
                split_quantization(name),
                (base.into(), tag.into()),
                "{name}"
            );
        }
    }

    /// The files of ggml-org/SmolVLM2-2.2B-Instruct-GGUF.
    #[cfg(feature = "hub")]
    const PUBLISHED: [&str; 6] = [
        "README.md",
        "SmolVLM2-2.2B-Instruct-Q4_K_M.gguf",
        "SmolVLM2-2.2B-Instruct-Q8_0.gguf",
        "SmolVLM2-2.2B-Instruct-f16.gguf",
        "mmproj-SmolVLM2-2.2B-Instruct-Q8_0.gguf",
        "mmproj-SmolVLM2-2.2B-Instruct-f16.gguf",
    ];

    #[cfg(feature = "hub")]
    #[test]
    fn a_tag_says_which() {
        let published = names(&PUBLISHED);
        for (tag, text, projector) in [
            (None, 2, 4),
            (Some("Q8_0"), 2, 4),
            (Some("q4_k_m"), 1, 5),
            (Some("F16"), 3, 5),
        ] {
            let chosen = FileNames::choose(&published, tag).unwrap();
            let expected = [text, projector].map(|i: usize| PUBLISHED[i]);
            assert_eq!([&*chosen.text, &*chosen.projector], expected, "{tag:?}");
            assert_eq!(chosen.is_preferred(), text == 2);
        }
        let error = FileNames::choose(&published, Some("Q2_K")).unwrap_err();
        assert!(
            error.contains("no Q2_K") && error.contains(PUBLISHED[3]),
            "{error}"
        );
        let error = FileNames::choose(&published[..4], None).unwrap_err();
        assert!(error.contains("no mmproj"), "{error}");
        assert!(FileNames::choose(&published[..1], None).is_err());
    }

    #[test]
    fn a_projector_is_found_by_its_name() {
        let text = "SmolVLM-256M-Instruct-Q8_0.gguf";
        for (others, expected) in [
            (&["mmproj.gguf"][..], Some("mmproj.gguf")),
            (
                &["mmproj-BF16.gguf", "mmproj-F16.gguf"],
                Some("mmproj-F16.gguf"),
            ),
            (
                &[
                    "mmproj-Other-Q8_0.gguf",
                    "SmolVLM-256M-Instruct-mmproj-f32.gguf",
                ],
                Some("SmolVLM-256M-Instruct-mmproj-f32.gguf"),
            ),
            (&["mmproj-a-Q8_0.gguf", "mmproj-b-F16.gguf"], None),
            (&["mmproj.safetensors", "sub/mmproj.gguf"], None),
            (&[], None),
        ] {
            let all = [others, &[text]].concat();
            let found = choose_projector(&names(&all), text);
            let found = found.as_ref().map(|found| &*found.name);
            assert_eq!(found.ok(), expected, "{found:?}");
        }
    }
}
