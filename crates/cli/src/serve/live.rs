//! The page of a live source: its video and its captions, word by word.

use std::{
    io::{self, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use axum::{
    Router,
    extract::{Request, State},
    http::HeaderMap,
    response::{Html, Response},
    routing::get,
};
use gstvlmnarrate::Caption;
use serde_json::json;

use super::{events::Events, http::Port, player::last_id, stream::Stream};
use crate::{
    captions::lines::{self, one_line},
    pages::{escape, fill},
    progress::Progress,
    run::{End, Ending, Run, named},
};

const TEMPLATE: &str = include_str!("../../pages/live.html");

/// Captions that a new page is told.
const KEPT: usize = 100;

/// How long a client may take nothing before it is let go.
const PATIENCE: Duration = Duration::from_secs(20);

/// What follows the narrator. The video waits for nobody: frames that the encoder has no time for are dropped.
const REST: &str = "queue leaky=downstream max-size-buffers=0 max-size-bytes=0 max-size-time=500000000 \
    ! videoconvert ! video/x-raw,format=I420 \
    ! vp8enc deadline=1 cpu-used=8 threads=2 lag-in-frames=0 keyframe-max-dist=30 end-usage=cbr target-bitrate=2000000 \
    ! webmmux streamable=true ! appsink name=page sync=false async=false";

struct Page {
    html: String,
    events: Events,
    stream: Arc<Stream>,
}

/// Shows a live source on a web page until it ends or a signal comes. `build` gets what follows the narrator, as
/// `gst-launch-1.0` writes it, and returns the whole pipeline. `title` names the source on the page.
///
/// # Errors
///
/// The port can't be had, or the pipeline fails.
pub fn serve(
    title: &str,
    address: &str,
    quiet: bool,
    build: impl FnOnce(&str) -> Result<gst::Pipeline>,
) -> Result<End> {
    let port = Port::open("--serve", address)?;
    let pipeline = build(REST)?;
    let page = Arc::new(Page {
        html: fill(TEMPLATE, &[("title", &escape(&one_line(title)))]),
        events: Events::new(KEPT),
        stream: Arc::default(),
    });
    page.stream.clone().connect(&pipeline, "page")?;
    let router = Router::new()
        .route("/", get(html))
        .route("/video.webm", get(video))
        .route("/captions", get(captions))
        .with_state(page.clone());
    let server = port.serve(router, Some(PATIENCE))?;
    eprintln!("Serving {}; Ctrl-C ends it", server.invitation());

    let mut progress = Progress::new(true);
    let mut run = Run::new(pipeline, &mut progress, None, Ending::Now);
    let end = run.run(
        |caption, _| {
            if !quiet && !caption.partial {
                // That nobody reads them here does not end the page.
                let _ = writeln!(io::stdout(), "{}", lines::line(caption));
            }
            tell(&page.events, caption);
            Ok(())
        },
        || Ok(()),
    );
    page.events.end();
    page.stream.end();
    end
}

fn tell(events: &Events, caption: &Caption) {
    // When the frame was seen, not when the model had done with it.
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let seen = now.saturating_sub(caption.cost.latency).as_millis() as u64;
    let data = json!({"time": seen, "text": one_line(&caption.text)});
    if caption.partial {
        events.pass("words", &data);
    } else {
        events.status(&json!({"model": one_line(&named(caption))}));
        events.keep("caption", &data);
    }
}

async fn html(State(page): State<Arc<Page>>) -> Html<String> {
    Html(page.html.clone())
}

async fn video(State(page): State<Arc<Page>>) -> Response {
    page.stream.watch()
}

async fn captions(State(page): State<Arc<Page>>, headers: HeaderMap, request: Request) -> Response {
    page.events.listen(last_id(&headers, &request))
}
