//! Which projector goes with a text model in GGUF: by the names of files, by the property `mmproj`, and by what headers
//! say against it.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use crate::common::gguf::{PROJECTOR, PROJECTOR_Q8_0, TEXT, TEXT_Q8_0, changed, data, folder};
use crate::common::{Fake, Pipeline};
use candle_core::quantized::gguf_file::Value;
use gst::prelude::*;
use gstvlmnarrate::SmolVlmLoader;
use gstvlmnarrate::engine::{EngineLoader, ModelSettings};
use tempfile::TempDir;
use vlmnarrate_smolvlm::Source;

const LLAMA_CACHE: &str = "ggml-org_SmolVLM-Small-GGUF_";

/// Empty files: names alone decide.
fn named(files: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        fs::write(folder.path().join(file), "").unwrap();
    }
    folder
}

/// The projector that goes with a text file by the names beside it, or why there is none.
fn paired(text: &str, projectors: &[&str]) -> Result<String, String> {
    let folder = named(&[projectors, &[text]].concat());
    match Source::parse(Some(folder.path().join(text).as_os_str()), None) {
        Ok(Source::Gguf { projector, .. }) => {
            Ok(projector.file_name().unwrap().to_str().unwrap().into())
        }
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn files_of_llama_cpps_cache_are_paired() {
    let text = &format!("{LLAMA_CACHE}SmolVLM-Small-Q8_0.gguf");
    let other = "ggml-org_gemma-3-4b-it-GGUF_mmproj-model-f16.gguf";
    let another = "mmproj-SmolVLM2-Other-f16.gguf";
    for own in [
        "mmproj-SmolVLM-Small-f16.gguf",
        "mmproj-model-f16.gguf",
        "mmproj.gguf",
    ] {
        let own = &*format!("{LLAMA_CACHE}{own}");
        assert_eq!(paired(text, &[another, other, own]).as_deref(), Ok(own));
    }
    // By name before by repository.
    let [by_name, by_repository] = ["mmproj-SmolVLM-Small-f16.gguf", "mmproj-model-f16.gguf"]
        .map(|name| format!("{LLAMA_CACHE}{name}"));
    let found = paired(text, &[other, &by_repository, &by_name]);
    assert_eq!(found.as_deref(), Ok(&*by_name));
    // A repository whose name begins as the other's.
    let longer = &*format!("{LLAMA_CACHE}v2_mmproj-model-f16.gguf");
    let text_of_longer = &format!("{LLAMA_CACHE}v2_SmolVLM-Small-Q8_0.gguf");
    let found = paired(text_of_longer, &[&by_repository, longer]);
    assert_eq!(found.as_deref(), Ok(longer));
    // The only one.
    assert_eq!(paired(text, &[other]).as_deref(), Ok(other));
}

#[test]
fn several_that_fit_equally_well_are_named() {
    let text = &format!("{LLAMA_CACHE}SmolVLM-Small-Q8_0.gguf");
    let of_repository =
        ["mmproj-a-f16.gguf", "mmproj-b-f16.gguf"].map(|name| format!("{LLAMA_CACHE}{name}"));
    for several in [
        ["mmproj-a-f16.gguf", "mmproj-b-f16.gguf"],
        ["mmproj-a-f16.gguf", "a-mmproj-F16.gguf"],
        [&of_repository[0], &of_repository[1]],
    ] {
        let error = paired(text, &several).unwrap_err();
        for word in [several[0], several[1], text, "set mmproj to"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}

fn path(path: &Path) -> Option<OsString> {
    Some(path.as_os_str().to_owned())
}

fn open(model: Option<OsString>, mmproj: &Path) -> Result<(), String> {
    let mut settings = ModelSettings::default();
    settings.model = model;
    settings.mmproj = path(mmproj);
    let found = SmolVlmLoader.open(&settings);
    found.map(drop).map_err(|error| error.to_string())
}

/// The projector is to be found.
fn alone(model: &Path) -> Result<(), String> {
    open(path(model), Path::new(""))
}

/// One line that has these words.
#[track_caller]
fn refused(opened: Result<(), String>, words: &[&str]) {
    let error = opened.unwrap_err();
    println!("{error}");
    for word in words {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn files_are_paired_or_what_is_missing_is_named() {
    let all = folder(&[
        TEXT,
        PROJECTOR,
        TEXT_Q8_0,
        PROJECTOR_Q8_0,
        "mmproj-SmolVLM-Small-f16.gguf",
    ]);
    let path = |file: &str| all.path().join(file);
    for (text, projector) in [(TEXT, PROJECTOR), (TEXT_Q8_0, PROJECTOR_Q8_0)] {
        let source = Source::parse(Some(path(text).as_os_str()), None).unwrap();
        let expected = Source::Gguf {
            text: path(text),
            projector: path(projector),
            guessed: false,
        };
        assert_eq!(source, expected);
    }
    refused(
        alone(all.path()),
        &[TEXT, TEXT_Q8_0, "Set model to one of the files"],
    );
    refused(
        alone(&path(PROJECTOR)),
        &[PROJECTOR, "mmproj", "Set model to the other"],
    );
    refused(
        alone(&path("SmolVLM-None.gguf")),
        &["SmolVLM-None.gguf: no such file", "mmproj"],
    );
    fs::rename(path(TEXT), path("Other-BF16.gguf")).unwrap();
    fs::rename(path(PROJECTOR), path("mmproj-Else-BF16.gguf")).unwrap();
    refused(
        alone(&path("Other-BF16.gguf")),
        &[
            "more than one mmproj",
            "mmproj-Else-BF16.gguf",
            PROJECTOR_Q8_0,
        ],
    );

    let text = folder(&[TEXT]);
    refused(alone(text.path()), &["no mmproj", TEXT, "beside"]);
    refused(
        alone(&text.path().join(TEXT)),
        &["no mmproj", TEXT, "beside"],
    );
    refused(
        alone(folder(&[PROJECTOR]).path()),
        &["Download the text model"],
    );
    // Beside a checkpoint, files are asked for by name.
    let both = folder(&[TEXT, PROJECTOR]);
    for file in fs::read_dir(data("SmolVLM-Small"))
        .unwrap()
        .map(Result::unwrap)
    {
        fs::copy(file.path(), both.path().join(file.file_name())).unwrap();
    }
    let source = Source::parse(Some(both.path().as_os_str()), None).unwrap();
    assert_eq!(source, Source::Folder(both.path().into()));
}

/// Where the projector is not found by itself, or another is beside the model.
#[test]
fn the_property_says_which() {
    let (text, elsewhere) = (folder(&[TEXT]), tempfile::tempdir().unwrap());
    // Named as no projector, and as no text.
    let odd = OsString::from_vec(b"caf\xe9.gguf".to_vec());
    let projector = elsewhere.path().join(odd);
    fs::copy(data(PROJECTOR), &projector).unwrap();
    let model = text.path().join(TEXT);
    assert_eq!(open(path(&model), &projector), Ok(()));
    assert_eq!(open(path(text.path()), &projector), Ok(()));
    // The text model may have such a name as well.
    let odd = text
        .path()
        .join(OsString::from_vec(b"t\xe9xt.gguf".to_vec()));
    fs::rename(&model, &odd).unwrap();
    assert_eq!(open(path(&odd), &projector), Ok(()));
    let beside = text.path().join(PROJECTOR);
    fs::copy(&projector, &beside).unwrap();
    assert_eq!(alone(&odd), Ok(()));
    fs::rename(&odd, &model).unwrap();
    // Nothing beside the model is looked at.
    fs::write(&beside, "broken").unwrap();
    fs::write(text.path().join("mmproj-other.gguf"), "broken").unwrap();
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=1 ! video/x-raw,width=64,height=48,framerate=1/1
         ! vlmnarrate name=n max-tokens=5 dtype=f32 ! fakesink",
        &Fake::new(),
    );
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline.narrator.set_property("model", model.to_str());
    pipeline
        .narrator
        .set_property_from_value("mmproj", &projector.to_value());
    let back = pipeline.narrator.property_value("mmproj");
    assert_eq!(back.get::<PathBuf>().unwrap(), projector);
    assert_eq!(pipeline.run_to_eos().captions.len(), 1);
    // The empty string is none.
    refused(alone(&model), &[PROJECTOR, "is not GGUF"]);
    refused(
        open(path(&model), &elsewhere.path().join("no.gguf")),
        &["no.gguf: no such file", "Set mmproj"],
    );
}

#[test]
fn the_property_goes_with_a_gguf_file_alone() {
    let projector = data(PROJECTOR);
    let checkpoint = data("SmolVLM-Small");
    for (model, words) in [
        (None, &["model is not set"][..]),
        (Some("".into()), &["model is not set"]),
        (path(&checkpoint), &["SmolVLM-Small is none"]),
        (Some("owner/name".into()), &["model=owner/name is none"]),
        (
            Some("owner/name-GGUF:Q8_0".into()),
            &["owner/name-GGUF:Q8_0 is none"],
        ),
    ] {
        let words = [
            words,
            &["mmproj: ", PROJECTOR, "Set model to the GGUF file"],
        ]
        .concat();
        refused(open(model, &projector), &words);
    }
    refused(
        open(Some("/no/m.gguf".into()), &projector),
        &["/no/m.gguf: no such file", "Set model"],
    );
}

/// A text model and a projector of its own, which take these names for themselves.
fn with_names(text_names: &[(&str, &str)], projector_names: &[(&str, &str)]) -> TempDir {
    changed(|text, projector| {
        for (half, names) in [(text, text_names), (projector, projector_names)] {
            for key in ["general.name", "general.basename"] {
                half.metadata.remove(key).unwrap();
            }
            for (key, name) in names {
                half.set(&format!("general.{key}"), Value::String((*name).into()));
            }
        }
    })
}

#[test]
fn a_lone_projector_of_another_model_is_refused() {
    let two = [("name", "SmolVLM2 Small"), ("basename", "SmolVLM2")];
    let one = [("name", "SmolVLM Small"), ("basename", "SmolVLM")];
    let tuned = [("name", "Frames"), ("basename", "smol-vlm")];
    for (text, projector, is_same) in [
        (&one[..], &two[..], false),
        (&one[..1], &two[..1], false),
        (&one[..1], &two[..], false),
        (&one, &tuned, true),
        (&one, &[], true),
        (&[], &two, true),
    ] {
        let folder = with_names(text, projector);
        let renamed = folder.path().join("mmproj-Else-BF16.gguf");
        let model = folder.path().join(TEXT);
        // Files that are named alike were published together.
        assert_eq!(alone(&model), Ok(()), "{text:?} {projector:?}");
        fs::rename(folder.path().join(PROJECTOR), &renamed).unwrap();
        let found = alone(&model);
        match is_same {
            true => assert_eq!(found, Ok(()), "{text:?} {projector:?}"),
            false => refused(
                found,
                &[
                    "mmproj-Else-BF16.gguf",
                    TEXT,
                    "`SmolVLM",
                    "`SmolVLM2",
                    "set mmproj",
                ],
            ),
        }
        // Who says so has the say.
        assert_eq!(open(path(&model), &renamed), Ok(()));
    }
}

#[test]
fn what_never_fits_is_refused_whoever_says_so() {
    let check = |folder: &Path, words: &[&str]| {
        let (text, projector) = (folder.join(TEXT), folder.join(PROJECTOR));
        refused(alone(&text), words);
        refused(open(path(&text), &projector), words);
    };
    let other = changed(|text, _| text.set("llama.embedding_length", Value::U32(96)));
    check(
        other.path(),
        &[
            PROJECTOR,
            TEXT,
            "64 values",
            "have 96",
            "same repository",
            "mmproj",
        ],
    );
    let other = changed(|_, projector| {
        projector.set("clip.vision.projector.scale_factor", Value::U32(2));
    });
    check(
        other.path(),
        &[PROJECTOR, "512 values", "2 × 2", "have 128"],
    );
    let other = changed(|_, projector| {
        projector.set("clip.has_vision_encoder", Value::Bool(false));
    });
    check(other.path(), &[PROJECTOR, "no vision encoder"]);
    let other = changed(|_, projector| drop(projector.tensors.remove("mm.model.fc.weight")));
    check(other.path(), &[PROJECTOR, "lacks `mm.model.fc.weight`"]);
}

#[test]
fn files_in_each_others_place_are_told_apart() {
    let (text, projector) = (data(TEXT), data(PROJECTOR));
    let [text_, projector_] = [&text, &projector].map(|path| path.to_str().unwrap());
    refused(
        open(path(&projector), &text),
        &[
            &format!("{projector_}: is an mmproj file"),
            &format!("Set model to {text_} and mmproj to this one"),
        ],
    );
    refused(
        open(path(&projector), &projector),
        &[&format!("{projector_}: is an mmproj file"), "Set model to"],
    );
    refused(
        open(path(&text), &text),
        &[
            &format!("{text_}: is a text model of the architecture `llama`"),
            &format!("Set mmproj to the mmproj file of {text_}"),
        ],
    );
    // Found by names that don't say the truth.
    let swapped = tempfile::tempdir().unwrap();
    fs::copy(text, swapped.path().join("mmproj.gguf")).unwrap();
    fs::copy(projector, swapped.path().join("m.gguf")).unwrap();
    refused(
        alone(swapped.path()),
        &[
            "m.gguf: is an mmproj file",
            "mmproj.gguf and mmproj to this one",
        ],
    );
}
