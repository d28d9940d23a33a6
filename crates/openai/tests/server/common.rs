//! An engine and what it tells.

use std::{
    ops::ControlFlow,
    sync::LazyLock,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{
    Answer, EndpointSettings, Engine, EngineLoader, Error, ErrorKind, Event, Found, ModelSettings,
    Picture, Request, Setting,
};
use vlmnarrate_openai::OpenAiLoader;

/// The endpoint at a URL, with short times.
pub fn endpoint(url: impl Into<String>) -> EndpointSettings {
    let mut endpoint = EndpointSettings::new(url);
    endpoint.timeout = Duration::from_secs(20);
    endpoint
}

/// Loads the engine of an endpoint, for this model or the only one.
pub fn load(endpoint: EndpointSettings, model: Option<&str>) -> Result<Box<dyn Engine>, Error> {
    let mut settings = ModelSettings::default();
    settings.endpoint = Some(endpoint);
    settings.model = model.map(Into::into);
    match OpenAiLoader.open(&settings)? {
        Found::Ready(checkpoint) => checkpoint.load(&mut |_, _| ControlFlow::Continue(())),
        Found::ToDownload(_) => panic!("nothing to download"),
    }
}

/// The engine of a server that is up.
pub fn engine(url: impl Into<String>) -> Box<dyn Engine> {
    load(endpoint(url), Some("scripted")).unwrap()
}

/// What an engine told while it made an answer.
#[derive(Debug, Default)]
pub struct Told {
    pub texts: Vec<String>,
    pub ignored: Vec<Setting>,
    pub away: Vec<Error>,
    pub models: Vec<String>,
}

/// Asks about a black square.
pub fn ask(engine: &mut dyn Engine) -> Result<Answer, Error> {
    ask_with(engine, |_| ()).0
}

/// Asks about a black square, with changes.
pub fn ask_with<'a>(
    engine: &mut dyn Engine,
    change: impl FnOnce(&mut Request<'a>),
) -> (Result<Answer, Error>, Told) {
    static PICTURE: LazyLock<Picture> = LazyLock::new(|| Picture::blank(16));
    static PICTURES: LazyLock<[&Picture; 1]> = LazyLock::new(|| [&PICTURE]);
    let mut request = Request::new(&*PICTURES, "What is this?");
    change(&mut request);
    let mut told = Told::default();
    let answer = engine.describe(&request, &mut |event| {
        match event {
            Event::Text { text, .. } => told.texts.push(text.to_owned()),
            Event::Ignored(setting) => told.ignored.push(setting),
            Event::Unavailable(error) => told.away.push(error.clone()),
            Event::AnsweredBy(info) => told.models.push(info.model.clone()),
            _ => (),
        }
        ControlFlow::Continue(())
    });
    (answer, told)
}

/// Asks, and stops after this time. Returns how long it took to stop.
pub fn ask_and_stop(engine: &mut dyn Engine, after: Duration) -> Duration {
    let picture = Picture::blank(16);
    let pictures = [&picture];
    let start = Instant::now();
    let result = engine.describe(&Request::new(&pictures, ""), &mut |_| match start.elapsed()
        < after
    {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    });
    assert_eq!(result.unwrap_err().kind, ErrorKind::Cancelled);
    start.elapsed().saturating_sub(after)
}
