//! Runs a pipeline until its end, and tells how far it has come.

use std::{io, thread, time::Instant};

use anyhow::{Result, anyhow};
use gst::{ClockTime, MessageView, prelude::*};
use gstvlmnarrate::Caption;

use crate::{
    processes,
    progress::Progress,
    units::{clock, span},
};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The stream ended by itself, or its reader has had enough.
    Whole,
    /// A signal asked for an end, and what is there was finished.
    Interrupted(i32),
}

impl End {
    /// The status with which the process ends.
    pub fn status(self) -> u8 {
        match self {
            Self::Whole => 0,
            Self::Interrupted(signal) => 128 + u8::try_from(signal).unwrap_or(0),
        }
    }
}

/// What a signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Ends the stream behind the caption under way. Frames that are on their way are not described.
    AfterCaption,
    /// Ends the whole pipeline's stream, so that all its files are finished.
    AfterStream,
    /// Ends at once: there is nothing to finish.
    Now,
}

/// One run of a pipeline with a narrator in it.
pub struct Run<'a> {
    pipeline: gst::Pipeline,
    narrator: Option<gst::Element>,
    progress: &'a mut Progress,
    ending: Ending,
    loading: Option<String>,
    pub captions: u64,
    pub position: ClockTime,
    /// The model that the last caption is from.
    pub model: Option<String>,
    length: Option<ClockTime>,
    began: Instant,
    began_at: ClockTime,
    has_ended: bool,
    /// Whether the stream comes in real time by itself, so that it can't be paused.
    is_live: bool,
    /// Whether an element in front of the narrator failed, which reads or decodes the input.
    pub input_failed: bool,
    /// Whether somebody closed the window, which ends the run.
    pub window_closed: bool,
}

impl<'a> Run<'a> {
    /// `length` is that of the video, if the file tells it better than the pipeline.
    pub fn new(
        pipeline: gst::Pipeline,
        progress: &'a mut Progress,
        length: Option<ClockTime>,
        ending: Ending,
    ) -> Self {
        let narrator = (pipeline
            .iterate_all_by_element_factory_name("vlmnarrate")
            .into_iter())
        .find_map(Result::ok);
        Self {
            pipeline,
            narrator,
            progress,
            ending,
            loading: None,
            captions: 0,
            position: ClockTime::ZERO,
            model: None,
            length,
            began: Instant::now(),
            began_at: ClockTime::ZERO,
            has_ended: false,
            is_live: false,
            input_failed: false,
            window_closed: false,
        }
    }

    /// Runs until the stream ends. `on_caption` gets each caption and its message; if it can't write, the run ends.
    /// `check` is called about ten times a second.
    ///
    /// # Errors
    ///
    /// What an element said, `on_caption` or `check`.
    pub fn run(
        &mut self,
        mut on_caption: impl FnMut(&Caption, &gst::StructureRef) -> io::Result<()>,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<End> {
        let bus = self
            .pipeline
            .bus()
            .ok_or_else(|| anyhow!("the pipeline has no bus"))?;
        let started = self.pipeline.set_state(gst::State::Playing);
        self.is_live = started == Ok(gst::StateChangeSuccess::NoPreroll);
        let started = started.is_ok();
        let ended = loop {
            let message = bus.timed_pop(100 * ClockTime::MSECOND);
            if message.is_none() && !started {
                break Err(anyhow!("the pipeline can't start"));
            }
            if let Some(message) = &message {
                match self.handle(message, &mut on_caption) {
                    Ok(false) => (),
                    Ok(true) => {
                        break Ok(processes::asked_to_end().map_or(End::Whole, End::Interrupted));
                    }
                    Err(error) => break Err(error),
                }
            }
            if let Some(signal) = processes::asked_to_end()
                && !self.has_ended
            {
                // Without a caption there is nothing to finish.
                if self.ending == Ending::Now
                    || (self.ending == Ending::AfterCaption && self.captions == 0)
                {
                    break Ok(End::Interrupted(signal));
                }
                self.progress
                    .say("Ending with what is there; once more to stop at once");
                self.end_stream();
            }
            if let Err(error) = check() {
                break Err(error);
            }
            self.locate();
            let line = self.describe();
            self.progress.show(|| line);
        };
        self.locate();
        let _ = self.pipeline.set_state(gst::State::Null);
        self.progress.clear();
        ended
    }

    /// Handles a message; true at the end of the stream.
    fn handle(
        &mut self,
        message: &gst::Message,
        on_caption: &mut impl FnMut(&Caption, &gst::StructureRef) -> io::Result<()>,
    ) -> Result<bool> {
        match message.view() {
            MessageView::Element(element) => {
                if let Some(structure) = element.structure()
                    && let Ok(caption) = Caption::try_from(structure)
                {
                    return self.caption(&caption, structure, on_caption);
                }
            }
            MessageView::Progress(progress) => {
                let (kind, _, text) = progress.get();
                self.loading = match kind {
                    gst::ProgressType::Start | gst::ProgressType::Continue => Some(text.to_owned()),
                    _ => None,
                };
                if self.loading.is_none() {
                    self.start_clock();
                }
            }
            MessageView::Latency(_) => {
                let _ = self.pipeline.recalculate_latency();
            }
            MessageView::Eos(_) => return Ok(true),
            // What is watched stops until enough of it is here. What is written needs no such rest, and could not end
            // while it is paused.
            MessageView::Buffering(buffering) if self.ending == Ending::Now && !self.is_live => {
                let state = match buffering.percent() {
                    100 => gst::State::Playing,
                    _ => gst::State::Paused,
                };
                let _ = self.pipeline.set_state(state);
            }
            MessageView::Error(error) if is_closed_window(error) => {
                self.window_closed = true;
                return Ok(true);
            }
            MessageView::Error(error) => {
                let reader = self.pipeline.by_name("in");
                self.input_failed = message.src().zip(reader).is_some_and(|(source, reader)| {
                    source == &reader || source.has_as_ancestor(&reader)
                });
                let text = said(&error.error(), error.debug().as_deref());
                return Err(anyhow!("{}{text}", self.who(message)));
            }
            MessageView::Warning(warning) => {
                let text = said(&warning.error(), warning.debug().as_deref());
                self.progress
                    .say(&format!("warning: {}{text}", self.who(message)));
            }
            // That the demo model is a demo is said at the end.
            _ => (),
        }
        Ok(false)
    }

    /// The element that speaks, in a pipeline that the user wrote.
    fn who(&self, message: &gst::Message) -> String {
        match message.src() {
            Some(source) if self.ending == Ending::AfterStream => format!("{}: ", source.name()),
            _ => String::new(),
        }
    }

    fn caption(
        &mut self,
        caption: &Caption,
        structure: &gst::StructureRef,
        on_caption: &mut impl FnMut(&Caption, &gst::StructureRef) -> io::Result<()>,
    ) -> Result<bool> {
        self.captions += u64::from(!caption.partial);
        self.position = caption.stamp.stream_time.unwrap_or(self.position);
        self.model = Some(named(caption));
        match self.progress.aside(|| on_caption(caption, structure)) {
            Ok(()) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                // Whoever reads has had enough; files are still finished.
                self.end_stream();
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn end_stream(&mut self) {
        self.has_ended = true;
        let sink = self
            .narrator
            .as_ref()
            .and_then(|narrator| narrator.static_pad("sink"));
        match (self.ending, sink) {
            // It waits for the caption under way.
            (Ending::AfterCaption, Some(sink)) => {
                thread::spawn(move || sink.send_event(gst::event::Eos::new()));
            }
            _ => {
                self.pipeline.send_event(gst::event::Eos::new());
            }
        }
    }

    /// Whether the captions are from the model that only knows test pictures.
    pub fn has_demo_model(&self) -> bool {
        self.model.as_deref().is_some_and(is_demo)
    }

    /// Loading the model says nothing about the speed.
    fn start_clock(&mut self) {
        self.locate();
        (self.began, self.began_at) = (Instant::now(), self.position);
    }

    fn locate(&mut self) {
        // The pad tells how far the narrator is; a sink lags by what the encoder before it looks ahead.
        let pad = self
            .narrator
            .as_ref()
            .and_then(|narrator| narrator.static_pad("src"));
        let position = match pad {
            Some(pad) => pad.query_position::<ClockTime>(),
            None => self.pipeline.query_position::<ClockTime>(),
        };
        // Else the last caption's time must do.
        if let Some(position) = position {
            self.position = position.max(self.position);
        }
    }

    fn describe(&self) -> String {
        if let Some(loading) = &self.loading {
            return loading.clone();
        }
        let length = self
            .length
            .filter(|&length| self.position <= length && self.position > ClockTime::ZERO);
        let mut parts = vec![clock(self.position)];
        if let Some(length) = length {
            let percent = 100 * self.position.nseconds() / length.nseconds().max(1);
            parts[0] = format!("{} / {}  {percent} %", clock(self.position), clock(length));
        }
        parts.extend(self.speed());
        parts.push(self.counted());
        let (elapsed, gained) = (self.began.elapsed().as_secs_f64(), self.gained());
        if let Some(length) = length
            && elapsed > 1.0
            && gained > 0.0
        {
            let left = (length - self.position).seconds_f64();
            parts.push(format!("{} left", span(elapsed * left / gained)));
        }
        parts.join("  ")
    }

    /// The last words: how far it came, in what time.
    pub fn summary(&self, verb: &str) -> String {
        let took = span(self.began.elapsed().as_secs_f64());
        let mut parts = vec![format!("{verb} {} in {took}", clock(self.position))];
        parts.extend(self.speed());
        parts.push(self.counted());
        parts.join("  ")
    }

    /// Seconds of the stream since the model was loaded: captions come in steps, too coarse for a shorter time.
    fn gained(&self) -> f64 {
        self.position.saturating_sub(self.began_at).seconds_f64()
    }

    fn speed(&self) -> Option<String> {
        // What is only watched comes in real time.
        if self.ending == Ending::Now {
            return None;
        }
        let rate = self.gained() / self.began.elapsed().as_secs_f64();
        (rate > 0.0).then(|| match rate {
            100.0.. => format!("{rate:.0}x real time"),
            _ => format!("{rate:.1}x real time"),
        })
    }

    /// The number of captions, in words.
    pub fn counted(&self) -> String {
        match self.captions {
            1 => "1 caption".into(),
            n => format!("{n} captions"),
        }
    }
}

/// Whether this is how a sink says that somebody closed its window.
fn is_closed_window(error: &gst::message::Error) -> bool {
    let is_sink = (error
        .src()
        .and_then(|src| src.downcast_ref::<gst::Element>()))
    .is_some_and(|sink| sink.element_flags().contains(gst::ElementFlags::SINK));
    // Its words are translated.
    is_sink && error.error().matches(gst::ResourceError::NotFound)
}

/// The model with its revision, as a caption names it.
pub fn named(caption: &Caption) -> String {
    match caption.revision.as_str() {
        "" => caption.model.clone(),
        revision => format!("{} {revision}", caption.model),
    }
}

/// Whether a model, named with its revision, is the demo model.
pub fn is_demo(model: &str) -> bool {
    model.starts_with("demo ")
}

/// What a message says, without the places in source code that debug texts begin with.
fn said(error: &gst::glib::Error, debug: Option<&str>) -> String {
    let message = error.message();
    let detail: Vec<_> = (debug.unwrap_or_default().lines().skip(1))
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("../"))
        .collect();
    let detail = detail.join(" ");
    if detail.is_empty() || message.contains(&detail) {
        message.to_owned()
    } else {
        format!("{message} ({detail})")
    }
}
