//! A model in this process that describes frames while an endpoint is away.

use std::{ops::ControlFlow, sync::Arc};

use vlmnarrate_engine::{
    Answer, Checkpoint, Download, DownloadObserver, Engine, EngineInfo, Error, ErrorKind, Event,
    Found, ImageSize, LoadObserver, Observer, Picture, Priority, Request, Result,
};
use vlmnarrate_smolvlm::resize;

/// The endpoint's model, with the other one for outages.
///
/// # Errors
///
/// The endpoint's model is one that must be downloaded.
pub(crate) fn with_fallback(remote: Found, local: Found) -> Result<Found> {
    let Found::Ready(remote) = remote else {
        let message = "fallback-model: only an endpoint has one";
        return Err(Error::new(ErrorKind::Settings, message));
    };
    Ok(match local {
        Found::Ready(local) => Found::Ready(Arc::new(Both { remote, local })),
        Found::ToDownload(local) => Found::ToDownload(Arc::new(BothToDownload { remote, local })),
    })
}

struct BothToDownload {
    remote: Arc<dyn Checkpoint>,
    local: Arc<dyn Download>,
}

impl Download for BothToDownload {
    fn name(&self) -> &str {
        self.local.name()
    }

    fn download(&self, observer: &mut DownloadObserver<'_>) -> Result<Arc<dyn Checkpoint>> {
        Ok(Arc::new(Both {
            remote: self.remote.clone(),
            local: self.local.download(observer)?,
        }))
    }
}

struct Both {
    remote: Arc<dyn Checkpoint>,
    local: Arc<dyn Checkpoint>,
}

impl Checkpoint for Both {
    fn name(&self) -> &str {
        self.remote.name()
    }

    fn image_size(&self) -> ImageSize {
        self.remote.image_size()
    }

    fn check_image_size(&self, side: u32) -> Result<()> {
        self.remote.check_image_size(side)
    }

    fn load(&self, observer: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>> {
        // The endpoint first: a wrong key shows at once.
        let remote = self.remote.load(observer)?;
        let local = self.local.load(observer)?;
        Ok(Box::new(WithFallback {
            remote,
            local_info: local.info(),
            local,
            checkpoint: self.local.clone(),
            is_local_turn: false,
        }))
    }
}

struct WithFallback {
    remote: Box<dyn Engine>,
    local: Box<dyn Engine>,
    local_info: EngineInfo,
    /// Of the model in this process.
    checkpoint: Arc<dyn Checkpoint>,
    /// Whether the endpoint was away when the turn came.
    is_local_turn: bool,
}

impl WithFallback {
    fn describe_locally(
        &mut self,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Answer> {
        let stops = observer(Event::AnsweredBy(&self.local_info));
        if stops.is_break() {
            return Err(Error::cancelled());
        }
        let scaled: Vec<Option<Picture>> = match request.whole_frames {
            true => Vec::new(),
            false => request.pictures.iter().map(|p| self.scaled(p)).collect(),
        };
        let pictures = request.pictures.iter().enumerate();
        let pictures: Vec<&Picture> = pictures
            .map(|(i, picture)| scaled.get(i).and_then(Option::as_ref).unwrap_or(picture))
            .collect();
        let mut request = *request;
        request.pictures = &pictures;
        self.local.describe(&request, observer)
    }

    /// The picture in a size that the model in this process takes; `None` if it has one.
    fn scaled(&self, picture: &Picture) -> Option<Picture> {
        let takes = |side| self.checkpoint.check_image_size(side).is_ok();
        match self.checkpoint.image_size() {
            ImageSize::Square(_) if picture.width == picture.height && takes(picture.width) => None,
            ImageSize::Square(side) => Some(resize(picture, side, side)),
            ImageSize::LongestEdge(_) | ImageSize::Whole => None,
        }
    }
}

impl Engine for WithFallback {
    fn info(&self) -> EngineInfo {
        self.remote.info()
    }

    fn check(&self, request: &Request<'_>) -> Result<()> {
        self.remote.check(request)
    }

    fn wait_turn(&mut self, priority: Priority, observer: &mut Observer<'_>) -> Result<()> {
        let mut is_away = false;
        let waited = self.remote.wait_turn(priority, &mut |event| {
            let flow = observer(event);
            is_away = matches!(event, Event::Unavailable(_));
            match is_away {
                true => ControlFlow::Break(()),
                false => flow,
            }
        });
        self.is_local_turn = is_away && waited.is_err();
        match self.is_local_turn {
            true => self.local.wait_turn(priority, observer),
            false => waited,
        }
    }

    fn give_up_turn(&mut self) {
        self.remote.give_up_turn();
        self.local.give_up_turn();
        self.is_local_turn = false;
    }

    fn describe(&mut self, request: &Request<'_>, observer: &mut Observer<'_>) -> Result<Answer> {
        if !std::mem::take(&mut self.is_local_turn) {
            match self.remote.describe(request, observer) {
                Err(error) if error.kind == ErrorKind::Unavailable => (),
                result => return result,
            }
        }
        self.describe_locally(request, observer)
    }
}
