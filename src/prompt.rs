//! What an engine is asked, apart from the pictures.

use std::time::Duration;

use vlmnarrate_engine::{
    Checkpoint, Clip, Engine, Error, ErrorKind, ImageSize, Picture, Request, Sampling,
};

/// All of a request but its pictures.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RequestSettings {
    /// Whether the picture is the whole frame, to be cut into tiles.
    pub(crate) whole_frames: bool,
    pub(crate) system: Option<String>,
    pub(crate) prompt: String,
    pub(crate) max_tokens: u32,
    pub(crate) sampling: Sampling,
    pub(crate) stop_strings: Vec<String>,
    /// Empty if any caption is allowed.
    pub(crate) choices: Vec<String>,
    /// Whether the text so far is reported at each token.
    pub(crate) partial: bool,
}

impl RequestSettings {
    pub(crate) fn request<'a>(
        &'a self,
        pictures: &'a [&'a Picture],
        clip: Option<&'a Clip>,
    ) -> Request<'a> {
        let mut request = Request::new(pictures, &self.prompt);
        request.clip = clip;
        request.whole_frames = self.whole_frames;
        request.system = self.system.as_deref();
        request.max_tokens = self.max_tokens as usize;
        request.sampling = self.sampling;
        request.stop_strings = &self.stop_strings;
        request.choices = &self.choices;
        request
    }
}

/// The size that the property `image-size` gives, 0 for the size that the model prefers.
pub(crate) fn picture_size(image_size: u32, checkpoint: &dyn Checkpoint) -> ImageSize {
    let preferred = checkpoint.image_size();
    match image_size {
        0 => preferred,
        pixels => preferred.with_pixels(pixels),
    }
}

/// The request that the settings make of every frame or clip that is due.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct IntervalRequest {
    pub(crate) settings: RequestSettings,
    /// Number of pictures.
    pub(crate) frames: usize,
    /// The property `image-size`.
    pub(crate) image_size: u32,
}

impl IntervalRequest {
    /// Checks that the engine can answer such requests. A request that fails now fails for every frame, so any failure
    /// is an error of the settings.
    pub(crate) fn check(
        &self,
        engine: &dyn Engine,
        checkpoint: &dyn Checkpoint,
    ) -> Result<(), Error> {
        let size = picture_size(self.image_size, checkpoint);
        let blank = Picture::blank(match size {
            ImageSize::Square(side) => side,
            // Any size will do.
            ImageSize::LongestEdge(_) | ImageSize::Whole => 64,
        });
        let clip = (self.frames > 1).then(|| Clip {
            times: vec![Duration::ZERO; self.frames],
            duration: Duration::ZERO,
        });
        let pictures = vec![&blank; self.frames];
        let mut request = self.settings.request(&pictures, clip.as_ref());
        request.whole_frames |= size == ImageSize::Whole;
        engine.check(&request).map_err(|error| match error.kind {
            ErrorKind::Failed => {
                let mut error = error;
                error.kind = ErrorKind::Settings;
                error
            }
            _ => error,
        })
    }
}
