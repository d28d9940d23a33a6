//! One endless WebM for everybody who looks: new clients begin at a key frame, slow ones skip to the next.

use std::{
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use gst::prelude::*;
use tokio::sync::mpsc;

/// Buffers that a client may be behind before it has to skip: three seconds of 30 frames a second.
const WAITING: usize = 90;

/// How long a client may take nothing before it is let go.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes that are kept for new clients; a key frame comes long before.
const LIMIT: usize = 64 << 20;

/// What a new client needs to begin, and everybody who looks.
#[derive(Default)]
pub struct Stream(Mutex<State>);

#[derive(Default)]
struct State {
    head: Vec<Bytes>,
    /// From the latest key frame on.
    latest: Vec<Bytes>,
    clients: Vec<Client>,
    has_ended: bool,
}

struct Client {
    sender: mpsc::Sender<Bytes>,
    /// Since when it has had no room; it waits for a key frame then.
    full_since: Option<Instant>,
}

impl Stream {
    fn locked(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what comes out of the `appsink` of that name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn connect(self: std::sync::Arc<Self>, pipeline: &gst::Pipeline, sink: &str) -> Result<()> {
        let sink = (pipeline.by_name(sink).context("no appsink")?)
            .downcast::<gst_app::AppSink>()
            .map_err(|_| anyhow!("not an appsink"))?;
        let take = move |sink: &gst_app::AppSink| {
            let sample = sink.pull_sample().map_err(|_| gst::FlowError::Eos)?;
            if let Some(caps) = sample.caps()
                && self.locked().head.is_empty()
            {
                self.locked().head = stream_header(caps);
            }
            let buffer = sample.buffer().ok_or(gst::FlowError::Error)?;
            // It comes with the caps.
            if !buffer.flags().contains(gst::BufferFlags::HEADER) {
                let bytes = buffer.map_readable().map_err(|_| gst::FlowError::Error)?;
                let is_key = !buffer.flags().contains(gst::BufferFlags::DELTA_UNIT);
                self.locked()
                    .take(&Bytes::copy_from_slice(&bytes), is_key, Instant::now());
            }
            Ok(gst::FlowSuccess::Ok)
        };
        sink.set_callbacks(
            gst_app::AppSinkCallbacks::builder()
                .new_sample(take)
                .build(),
        );
        Ok(())
    }

    /// Lets everybody go.
    pub fn end(&self) {
        let mut state = self.locked();
        state.has_ended = true;
        state.clients.clear();
    }

    /// The stream for one more client.
    pub fn watch(&self) -> Response {
        let (sender, receiver) = mpsc::channel(WAITING);
        let mut state = self.locked();
        let first: Vec<_> = (state.head.iter().chain(&state.latest)).cloned().collect();
        if !state.has_ended {
            state.clients.push(Client {
                sender,
                full_since: None,
            });
        }
        drop(state);
        let coming = stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        });
        let bytes = stream::iter(first).chain(coming).map(Ok::<_, Infallible>);
        (
            [(header::CONTENT_TYPE, "video/webm")],
            Body::from_stream(bytes),
        )
            .into_response()
    }
}

impl State {
    fn take(&mut self, bytes: &Bytes, is_key: bool, now: Instant) {
        let kept: usize = self.latest.iter().map(Bytes::len).sum();
        if is_key || kept > LIMIT {
            self.latest.clear();
        }
        // Without its key frame nothing can be shown.
        if is_key || !self.latest.is_empty() {
            self.latest.push(bytes.clone());
        }
        self.clients.retain_mut(|client| {
            if client.full_since.is_some() && !is_key {
                return !client.sender.is_closed();
            }
            match client.sender.try_send(bytes.clone()) {
                Ok(()) => {
                    client.full_since = None;
                    true
                }
                Err(mpsc::error::TrySendError::Closed(_)) => false,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    now - *client.full_since.get_or_insert(now) < PATIENCE
                }
            }
        });
    }
}

/// What a stream begins with.
fn stream_header(caps: &gst::CapsRef) -> Vec<Bytes> {
    let Some(Ok(headers)) =
        (caps.structure(0)).map(|structure| structure.get::<gst::Array>("streamheader"))
    else {
        return Vec::new();
    };
    let buffers = (headers.iter()).filter_map(|value| value.get::<gst::Buffer>().ok());
    buffers
        .filter_map(|buffer| Some(Bytes::copy_from_slice(&buffer.map_readable().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(state: &mut State, number: u8, is_key: bool, now: Instant) {
        state.take(&Bytes::from(vec![number]), is_key, now);
    }

    /// All that a client has got by now.
    fn seen(receiver: &mut mpsc::Receiver<Bytes>) -> Vec<u8> {
        std::iter::from_fn(|| receiver.try_recv().ok())
            .map(|bytes| bytes[0])
            .collect()
    }

    #[test]
    fn a_new_client_begins_at_a_key_frame() {
        let now = Instant::now();
        let mut state = State::default();
        for (number, is_key) in [(0, false), (1, true), (2, false), (3, true), (4, false)] {
            taken(&mut state, number, is_key, now);
        }
        assert_eq!(state.latest, [[3], [4]].map(|n| Bytes::from(n.to_vec())));
    }

    #[test]
    fn a_slow_client_skips_to_a_key_frame_and_one_that_is_asleep_is_let_go() {
        let now = Instant::now();
        let mut state = State::default();
        let (sender, mut receiver) = mpsc::channel(2);
        state.clients.push(Client {
            sender,
            full_since: None,
        });
        for (number, is_key) in [(1, true), (2, false), (3, false)] {
            taken(&mut state, number, is_key, now);
        }
        assert_eq!(seen(&mut receiver), [1, 2]);
        for (number, is_key) in [(4, false), (5, true), (6, false), (7, true)] {
            taken(&mut state, number, is_key, now);
        }
        assert_eq!(seen(&mut receiver), [5, 6]);
        taken(&mut state, 8, true, now + PATIENCE / 2);
        taken(&mut state, 9, true, now + PATIENCE / 2);
        taken(&mut state, 10, true, now + PATIENCE / 2);
        assert_eq!(state.clients.len(), 1);
        taken(&mut state, 11, true, now + 2 * PATIENCE);
        assert_eq!(state.clients.len(), 0);
    }
}
