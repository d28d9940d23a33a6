//! Checks on the headers of a text model and an mmproj file: do they belong together?

use crate::{
    error::{Error, Result},
    families::idefics3::config::Config,
    files::gguf::{GgufFile, REMEDY, Value},
};

/// The architecture of every mmproj file, whatever its text model is.
const PROJECTOR: &str = "clip";

/// Checks that one file is a text model and the other an mmproj file with a vision encoder.
pub(crate) fn check_kinds(text: &GgufFile, projector: &GgufFile) -> Result<()> {
    let broken = |file: &GgufFile, reason| Error::file(&file.path, reason, REMEDY);
    let architecture = |file: &GgufFile| {
        let found = file.string("general.architecture");
        found.map_err(|reason| broken(file, reason))
    };
    let is_projector = |file| Ok::<_, Error>(architecture(file)?.as_deref() == Some(PROJECTOR));
    if is_projector(text)? {
        let remedy = match is_projector(projector)? {
            true => "Set model to the GGUF file of the text model".to_owned(),
            false => format!(
                "Set model to {} and mmproj to this one",
                projector.path.display()
            ),
        };
        let reason = "is an mmproj file, not a text model";
        return Err(Error::file(&text.path, reason, remedy));
    }
    if let Some(found) = architecture(projector)?
        && found != PROJECTOR
    {
        return Err(Error::file(
            &projector.path,
            format!("is a text model of the architecture `{found}`, not an mmproj file"),
            format!("Set mmproj to the mmproj file of {}", text.path.display()),
        ));
    }
    match projector.header.metadata.get("clip.has_vision_encoder") {
        Some(Value::Bool(false)) => {
            let reason = "has no vision encoder: `clip.has_vision_encoder` is false";
            Err(broken(projector, reason.into()))
        }
        _ => Ok(()),
    }
}

/// Checks that the projector's output has the size of the text model's embeddings, and its input that of pixel-shuffled
/// patches.
pub(crate) fn check_shapes(text: &GgufFile, projector: &GgufFile, config: &Config) -> Result<()> {
    let name = "mm.model.fc.weight";
    let shape = projector.tensor(name).map(|tensor| &tensor.shape[..]);
    let Some(&[rows, columns]) = shape else {
        let reason = match shape {
            None => format!("lacks `{name}`"),
            Some(shape) => format!("has `{name}` of the shape {shape:?}"),
        };
        return Err(Error::file(&projector.path, reason, REMEDY));
    };
    let length = config.text_config.hidden_size;
    if rows != length {
        return Err(Error::file(
            &projector.path,
            format!(
                "is of another model: its embeddings have {rows} values, those of {} have {length}",
                text.path.display()
            ),
            "Take both files from the same repository, or set mmproj to the mmproj file of this model",
        ));
    }
    let scale = config.scale_factor;
    let shuffled = scale.saturating_mul(scale);
    let shuffled = shuffled.saturating_mul(config.vision_config.hidden_size);
    if columns != shuffled {
        let reason = format!(
            "has `{name}` for {columns} values per token, but {scale} × {scale} patches of its encoder have {shuffled}"
        );
        return Err(Error::file(&projector.path, reason, REMEDY));
    }
    Ok(())
}

/// Checks that the headers name the same model. Only names that converters take from the base model are compared: a
/// fine-tuned text model fits the projector that it was trained with.
pub(crate) fn check_names(text: &GgufFile, projector: &GgufFile) -> Result<()> {
    for key in ["general.basename", "general.name"] {
        let name = |file: &GgufFile| file.string(key).ok().flatten();
        let (Some(of_text), Some(of_projector)) = (name(text), name(projector)) else {
            continue;
        };
        if normalized(&of_text) == normalized(&of_projector) {
            return Ok(());
        }
        return Err(Error::file(
            &projector.path,
            format!(
                "is the mmproj file of `{of_projector}`, but {} is `{of_text}`",
                text.path.display()
            ),
            "Put the mmproj file of this model beside it, or set mmproj to the file to use, even this one if it fits",
        ));
    }
    Ok(())
}

/// A name in lower case without punctuation, in which a folder's name and a title may differ.
fn normalized(name: &str) -> String {
    let name = name.chars().filter(|c| c.is_alphanumeric());
    name.flat_map(char::to_lowercase).collect()
}
