//! Server-Sent Events: what is told to every page that listens.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use serde_json::Value;
use tokio::{sync::mpsc, time::timeout};

/// Events that a page may be behind before it is let go.
const WAITING: usize = 200;

/// Time between two signs of life.
const PING: Duration = Duration::from_secs(5);

/// The events so far, and everybody who listens.
pub struct Events(Mutex<State>);

struct State {
    /// Numbers start anew with each run; a page that was here before must not take them for old ones.
    run: String,
    /// The number of the first event that is kept, and the events.
    first: u64,
    kept: VecDeque<Bytes>,
    limit: usize,
    status: Option<Bytes>,
    listeners: Vec<mpsc::Sender<Bytes>>,
    has_ended: bool,
}

impl Events {
    /// Keeps so many events for pages that come later.
    pub fn new(limit: usize) -> Self {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self(Mutex::new(State {
            run: format!("{:x}", now.as_nanos()),
            first: 0,
            kept: VecDeque::new(),
            limit,
            status: None,
            listeners: Vec::new(),
            has_ended: false,
        }))
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells an event to all, also to pages that come later.
    pub fn keep(&self, name: &str, data: &Value) {
        let mut state = self.locked();
        let number = state.first + state.kept.len() as u64;
        let event = Bytes::from(format!(
            "event: {name}\ndata: {data}\nid: {}-{number}\n\n",
            state.run
        ));
        state.kept.push_back(event.clone());
        if state.kept.len() > state.limit {
            state.kept.pop_front();
            state.first += 1;
        }
        state.tell(&event);
    }

    /// Tells an event to those who are there.
    pub fn pass(&self, name: &str, data: &Value) {
        self.locked()
            .tell(&Bytes::from(format!("event: {name}\ndata: {data}\n\n")));
    }

    /// Tells the state of things, which is the first that a new page learns.
    pub fn status(&self, data: &Value) {
        let event = Bytes::from(format!("event: status\ndata: {data}\n\n"));
        let mut state = self.locked();
        if state.status.as_ref() != Some(&event) {
            state.tell(&event);
            state.status = Some(event);
        }
    }

    /// Lets everybody go.
    pub fn end(&self) {
        let mut state = self.locked();
        state.has_ended = true;
        state.listeners.clear();
    }

    /// The events behind the one of that id, and those to come.
    pub fn listen(&self, last_id: Option<&str>) -> Response {
        let (sender, receiver) = mpsc::channel(WAITING);
        let mut first = b"retry: 1000\n\n".to_vec();
        let mut state = self.locked();
        let (begun, end) = (state.first, state.first + state.kept.len() as u64);
        let known = last_id
            .and_then(|id| id.strip_prefix(&state.run)?.strip_prefix('-')?.parse().ok())
            .filter(|number: &u64| (begun..end).contains(number));
        let skipped = known.map_or(0, |number| number + 1 - begun);
        first.extend(state.status.iter().flatten());
        first.extend(state.kept.iter().skip(skipped as usize).flatten());
        if !state.has_ended {
            state.listeners.push(sender);
        }
        drop(state);
        let coming = stream::unfold(receiver, |mut receiver| async {
            match timeout(PING, receiver.recv()).await {
                Ok(event) => Some((event?, receiver)),
                // By this the page knows that we are there, and we learn that it is gone.
                Err(_) => Some((Bytes::from_static(b"event: ping\ndata: {}\n\n"), receiver)),
            }
        });
        let events = stream::iter([Bytes::from(first)])
            .chain(coming)
            .map(Ok::<_, Infallible>);
        (
            [(header::CONTENT_TYPE, "text/event-stream")],
            Body::from_stream(events),
        )
            .into_response()
    }
}

impl State {
    /// Whoever is asleep for so long that its channel is full is let go, and may come back.
    fn tell(&mut self, event: &Bytes) {
        self.listeners
            .retain(|listener| listener.try_send(event.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(events: &Events, last_id: Option<&str>) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut body = events.listen(last_id).into_body().into_data_stream();
            let first = body.next().await.unwrap().unwrap();
            String::from_utf8(first.to_vec()).unwrap()
        })
    }

    #[test]
    fn a_page_that_comes_back_learns_what_it_missed() {
        let events = Events::new(3);
        for text in ["a", "b", "c", "d"] {
            events.keep("caption", &json!(text));
        }
        events.pass("words", &json!("e"));
        events.status(&json!("f"));
        let all = told(&events, None);
        let said: Vec<_> = (all.lines())
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(said, [r#""f""#, r#""b""#, r#""c""#, r#""d""#]);
        let ids: Vec<_> = (all.lines())
            .filter_map(|line| line.strip_prefix("id: "))
            .collect();
        let missed = told(&events, Some(ids[1]));
        assert!(
            !missed.contains(r#""c""#) && missed.contains(r#""d""#),
            "{missed}"
        );
        // Of another run, or too old.
        for id in ["0-2", "nonsense", &ids[0].replace("-1", "-0")] {
            assert_eq!(told(&events, Some(id)), all);
        }
    }

    #[test]
    fn a_page_that_is_asleep_is_let_go() {
        let events = Events::new(0);
        let _asleep = events.listen(None);
        for _ in 0..WAITING {
            events.pass("words", &json!(0));
        }
        assert_eq!(events.locked().listeners.len(), 1);
        events.pass("words", &json!(0));
        assert_eq!(events.locked().listeners.len(), 0);
    }
}
