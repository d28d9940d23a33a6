//! The page of a recorded video, which grows while it is narrated.

use std::{
    fs::File,
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::Caption;
use serde_json::json;
use tower_http::services::ServeFile;

use super::{
    events::Events,
    folder::Folder,
    http::Port,
    transcript::Transcript,
    video::{Container, Conversion, Way},
};
use crate::{
    arguments::Serve,
    captions::lines,
    input::Input,
    narrate::suggest,
    pages::{escape, fill},
    pipeline, processes,
    processes::own_descriptor,
    progress::Progress,
    properties::Properties,
    run::{End, Ending, Run},
};

const TEMPLATE: &str = include_str!("../../pages/player.html");

/// What the pages show.
struct Page {
    html: String,
    events: Events,
    transcript: Mutex<Transcript>,
    /// Once browsers can play it.
    video: Mutex<Option<PathBuf>>,
    container: Container,
}

impl Page {
    fn transcript(&self) -> MutexGuard<'_, Transcript> {
        self.transcript
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn video(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.video.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Narrates a video on a web page, or writes the page into a folder.
///
/// # Errors
///
/// The video can't be narrated, the port can't be had or the folder can't be written.
pub fn serve(arguments: &Serve, properties: &Properties) -> Result<End> {
    let port = match &arguments.write {
        None => Some(Port::open("--listen", &arguments.listen)?),
        Some(_) => None,
    };
    let input = Input::open(&arguments.input, true)?;
    if input.is_live() {
        bail!(
            "{0}: this is a live stream; use: vlmnarrate live {0} --serve",
            input.name
        );
    }
    if input.is_still() {
        bail!(
            "{0}: this is a picture, there is nothing to play; use: vlmnarrate {0}",
            input.name
        );
    }
    let way = Way::choose(&input).with_context(|| input.name.clone())?;
    match (port, &arguments.write) {
        (Some(port), _) => on_a_port(port, &input, way, arguments, properties),
        (None, Some(folder)) => {
            let folder = Folder::create(folder.as_ref(), &input, arguments.force)?;
            into_a_folder(folder, &input, way, arguments, properties)
        }
        (None, None) => unreachable!("one of them is there"),
    }
}

/// How the video is made, if it has to be.
struct Making {
    conversion: Option<Conversion>,
    /// Has no name, so that nothing is left of it.
    file: Option<File>,
}

fn on_a_port(
    port: Port,
    input: &Input,
    way: Way,
    arguments: &Serve,
    properties: &Properties,
) -> Result<End> {
    let title = input.title();
    let values = [
        ("title", escape(&title)),
        ("video", "video".to_owned()),
        ("name", escape(&title)),
        ("mode", "served".to_owned()),
        ("src", String::new()),
        ("track", String::new()),
        ("model", String::new()),
        ("cues", String::new()),
    ];
    let page = Arc::new(Page {
        html: filled(&values),
        events: Events::new(usize::MAX),
        transcript: Mutex::default(),
        video: Mutex::new(match way {
            Way::AsIs(_) => input.path.clone(),
            Way::Convert { .. } => None,
        }),
        container: way.container(),
    });
    let mut making = Making {
        conversion: None,
        file: None,
    };
    if let Way::Convert { encodes, .. } = way {
        let file = tempfile::tempfile()
            .context("no temporary file for the video; set TMPDIR to a folder with room")?;
        making.conversion = Some(Conversion::start(input, way, &own_descriptor(&file))?);
        making.file = Some(file);
        say_conversion(input, encodes);
    }
    let router = Router::new()
        .route("/", get(html))
        .route("/events", get(events))
        .route("/captions.vtt", get(vtt))
        .route("/video", get(video))
        .with_state(page.clone());
    let server = port.serve(router, None)?;
    eprintln!("Serving {}; Ctrl-C ends it", server.invitation());

    let mut state = Told::new(&page, input);
    state.tell(&making);
    let narrated = narrate(
        input,
        properties,
        arguments.quiet,
        |caption| {
            let line = page.transcript().add(caption);
            if let Some(line) = line {
                let data = json!({"start": line.start.seconds_f64(), "text": line.text});
                page.events.keep("caption", &data);
            }
        },
        |position| {
            let mut transcript = page.transcript();
            transcript.position = transcript.position.max(position);
            drop(transcript);
            making.poll(&page);
            state.tell(&making);
        },
    );
    match narrated {
        Ok(End::Whole) => {
            eprintln!("The page stays until Ctrl-C");
            state.narration = "whole";
        }
        Ok(end) => return Ok(end),
        Err(error) if page.transcript().model.is_none() => return Err(error),
        Err(error) => {
            eprintln!(
                "error: {error:#}; the page has what was described until then and stays until Ctrl-C"
            );
            state.narration = "failed";
        }
    }
    loop {
        if let Some(signal) = processes::asked_to_end() {
            page.events.end();
            return Ok(End::Interrupted(signal));
        }
        making.poll(&page);
        state.tell(&making);
        thread::sleep(Duration::from_millis(100));
    }
}

/// Says that the video of the page is not the input.
fn say_conversion(input: &Input, encodes: bool) {
    let becomes = match encodes {
        true => "converted",
        false => "copied into an MP4",
    };
    eprintln!(
        "note: browsers can't play {} as it is; beside the narration it is {becomes}",
        input.name
    );
}

impl Making {
    /// Shows the video if it is whole by now.
    fn poll(&mut self, page: &Page) {
        let Some(conversion) = &mut self.conversion else {
            return;
        };
        match conversion.poll() {
            Ok(false) => return,
            Ok(true) => {
                *page.video() = self.file.as_ref().map(own_descriptor);
                eprintln!("The video is ready");
            }
            Err(error) => {
                self.file = None;
                eprintln!("warning: the video can't be shown: {error:#}");
            }
        }
        self.conversion = None;
    }
}

/// What the page says of the state of things.
struct Told<'a> {
    page: &'a Page,
    length: Option<ClockTime>,
    narration: &'static str,
    next: Instant,
}

impl<'a> Told<'a> {
    fn new(page: &'a Page, input: &Input) -> Self {
        let length = input.probe.as_ref().and_then(|probe| probe.video_end());
        Self {
            page,
            length,
            narration: "running",
            next: Instant::now(),
        }
    }

    /// Tells it about twice a second.
    fn tell(&mut self, making: &Making) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + Duration::from_millis(400);
        let transcript = self.page.transcript();
        let video = match (&making.conversion, self.page.video().is_some()) {
            (_, true) => "ready",
            (Some(_), _) => "converting",
            (None, _) => "failed",
        };
        let data = json!({
            "narration": self.narration,
            "position": transcript.position.seconds_f64(),
            "length": self.length.map(ClockTime::seconds_f64),
            "model": transcript.model,
            "video": video,
            "percent": making.conversion.as_ref().and_then(Conversion::percent),
        });
        drop(transcript);
        self.page.events.status(&data);
    }
}

/// Describes the video; `check` gets the position about ten times a second.
fn narrate(
    input: &Input,
    properties: &Properties,
    quiet: bool,
    mut on_caption: impl FnMut(&Caption),
    mut check: impl FnMut(ClockTime),
) -> Result<End> {
    let pipeline = pipeline::recorded(input, "vlmnarrate", "fakesink", properties)?;
    let narrated = pipeline
        .by_name("narrator")
        .and_then(|narrator| narrator.static_pad("src"))
        .context("the narrator has no source pad")?;
    let mut progress = Progress::new(quiet);
    let length = input.probe.as_ref().and_then(|probe| probe.video_end());
    let mut run = Run::new(pipeline, &mut progress, length, Ending::Now);
    let end = run
        .run(
            |caption, _| {
                if caption.partial {
                    return Ok(());
                }
                if !quiet {
                    // That nobody reads them here does not end the page.
                    let _ = writeln!(io::stdout(), "{}", lines::line(caption));
                }
                on_caption(caption);
                Ok(())
            },
            || {
                check(narrated.query_position::<ClockTime>().unwrap_or_default());
                Ok(())
            },
        )
        .with_context(|| input.name.clone())?;
    check(run.position);
    if end == End::Whole && run.captions == 0 {
        bail!("{}: no frame of it could be described", input.name);
    }
    let summary = run.summary(match end {
        End::Whole => "Narrated",
        End::Interrupted(_) => "Stopped after",
    });
    eprintln!("{summary}");
    if run.has_demo_model() {
        suggest("vlmnarrate serve", properties);
    }
    Ok(end)
}

/// Narrates, and writes page, video and captions.
fn into_a_folder(
    folder: Folder,
    input: &Input,
    way: Way,
    arguments: &Serve,
    properties: &Properties,
) -> Result<End> {
    let container = way.container();
    let file = folder.path(container.file_name());
    let mut conversion = match way {
        Way::AsIs(_) => {
            let path = input.path.as_ref().context("nothing to copy")?;
            std::fs::copy(path, &file).with_context(|| folder.name())?;
            None
        }
        Way::Convert { encodes, .. } => {
            say_conversion(input, encodes);
            Some(Conversion::start(input, way, &file)?)
        }
    };
    let mut transcript = Transcript::default();
    let mut failed = None;
    let position = std::cell::Cell::new(ClockTime::ZERO);
    let narrated = narrate(
        input,
        properties,
        arguments.quiet,
        |caption| {
            transcript.add(caption);
        },
        |now| position.set(position.get().max(now)),
    );
    transcript.position = transcript.position.max(position.get());
    let end = match narrated {
        Ok(end) => end,
        Err(error) => {
            failed = Some(error);
            End::Whole
        }
    };
    // What is there is kept, if nothing else has its name.
    if transcript.model.is_none() || (failed.is_some() && folder.is_taken()) {
        return failed.map_or(Ok(end), Err);
    }
    if let Some(conversion) = &mut conversion {
        finish(conversion).with_context(|| folder.name())?;
    }
    let vtt = transcript.vtt();
    let mut track = "data:text/vtt;base64,".to_owned();
    // A page opened from disk may not read a track from a file beside it.
    track.push_str(&gst::glib::base64_encode(&vtt));
    let src = container.file_name();
    let values = [
        ("title", escape(&input.title())),
        ("video", src.to_owned()),
        ("name", src.to_owned()),
        ("mode", "written".to_owned()),
        ("src", format!(" src=\"{src}\"")),
        (
            "track",
            format!(
                "<track kind=\"captions\" srclang=\"en\" label=\"Captions\" src=\"{track}\" default>"
            ),
        ),
        (
            "model",
            escape(transcript.model.as_deref().unwrap_or_default()),
        ),
        ("cues", transcript.html()),
    ];
    folder.write("captions.vtt", &vtt)?;
    folder.write("index.html", filled(&values).as_bytes())?;
    let name = folder.name();
    let page = folder.finish()?;
    match failed {
        None => {
            eprintln!("Wrote {name}: index.html, {src}, captions.vtt");
            eprintln!("Open {page} in a browser, or put the folder on a web server");
            Ok(end)
        }
        Some(error) => Err(error.context(format!("{name} ends early"))),
    }
}

/// Waits until the video is whole, or ends it if that was asked for.
fn finish(conversion: &mut Conversion) -> Result<()> {
    while !conversion.poll()? {
        if processes::asked_to_end().is_some() {
            return conversion.stop();
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn filled(values: &[(&str, String)]) -> String {
    let values: Vec<_> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
    fill(TEMPLATE, &values)
}

async fn html(State(page): State<Arc<Page>>) -> Html<String> {
    Html(page.html.clone())
}

async fn events(State(page): State<Arc<Page>>, headers: HeaderMap, request: Request) -> Response {
    page.events.listen(last_id(&headers, &request))
}

/// The last event that a page knows of: browsers send a header, our scripts a query.
pub fn last_id<'a>(headers: &'a HeaderMap, request: &'a Request) -> Option<&'a str> {
    let header = headers.get("last-event-id");
    header.and_then(|id| id.to_str().ok()).or_else(|| {
        let query = request.uri().query()?;
        query
            .split('&')
            .find_map(|pair| pair.strip_prefix("after="))
    })
}

async fn vtt(State(page): State<Arc<Page>>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/vtt; charset=utf-8"),
        (
            header::CONTENT_DISPOSITION,
            "attachment; filename=\"captions.vtt\"",
        ),
    ];
    (headers, page.transcript().vtt()).into_response()
}

async fn video(State(page): State<Arc<Page>>, request: Request) -> Response {
    let Some(path) = page.video().clone() else {
        return (StatusCode::NOT_FOUND, "The video is not ready yet.\n").into_response();
    };
    let mut response = match ServeFile::new(path).try_call(request).await {
        Ok(response) => response.into_response(),
        Err(error) => {
            return (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response();
        }
    };
    let kind = HeaderValue::from_static(page.container.mime());
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
