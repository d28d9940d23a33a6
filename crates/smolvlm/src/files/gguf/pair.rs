//! Whether a text model and a projector belong together, by what their headers say.

use crate::{
    error::{Error, Result},
    families::idefics3::config::Config,
    files::gguf::{Half, REMEDY, Value},
};

/// The architecture of every projector, whatever its text model is.
const PROJECTOR: &str = "clip";

/// Whether neither file is what the other should be.
pub(crate) fn check_kinds(text: &Half, projector: &Half) -> Result<()> {
    let broken = |half: &Half, reason| Error::file(&half.path, reason, REMEDY);
    let architecture = |half: &Half| {
        let found = half.text("general.architecture");
        found.map_err(|reason| broken(half, reason))
    };
    let is_projector = |half| Ok::<_, Error>(architecture(half)?.as_deref() == Some(PROJECTOR));
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
    match projector.header.values.get("clip.has_vision_encoder") {
        Some(Value::Bool(false)) => {
            let reason = "has no vision encoder: `clip.has_vision_encoder` is false";
            Err(broken(projector, reason.into()))
        }
        _ => Ok(()),
    }
}

/// Whether what the projector makes of a picture can stand among the text model's embeddings.
pub(crate) fn check_lengths(text: &Half, projector: &Half, config: &Config) -> Result<()> {
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
                "is of another model: it makes embeddings of {rows} values, and {} has embeddings of {length}",
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
            "has `{name}` for {columns} values a token, and {scale} × {scale} patches of its encoder have {shuffled}"
        );
        return Err(Error::file(&projector.path, reason, REMEDY));
    }
    Ok(())
}

/// Whether the headers name the same model. Only what converters take from the model itself is compared: a fine-tuned
/// text model may well go with the projector that it was made with.
pub(crate) fn check_names(text: &Half, projector: &Half) -> Result<()> {
    for key in ["general.basename", "general.name"] {
        let name = |half: &Half| half.text(key).ok().flatten();
        let (Some(of_text), Some(of_projector)) = (name(text), name(projector)) else {
            continue;
        };
        if plain(&of_text) == plain(&of_projector) {
            return Ok(());
        }
        return Err(Error::file(
            &projector.path,
            format!(
                "is the mmproj file of `{of_projector}`, and {} is `{of_text}`",
                text.path.display()
            ),
            "Put the mmproj file of this model beside it, or set mmproj to the one to take, this one too if it fits",
        ));
    }
    Ok(())
}

/// Without what differs between a folder's name and a title.
fn plain(name: &str) -> String {
    let name = name.chars().filter(|c| c.is_alphanumeric());
    name.flat_map(char::to_lowercase).collect()
}
