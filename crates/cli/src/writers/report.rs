//! One HTML page with a picture of each frame that was described, its time and its caption.

use std::{
    fs::File,
    io::{self, BufWriter, Seek, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, anyhow};
use gst::{ClockTime, glib, prelude::*};
use gstvlmnarrate::Caption;
use jiff::Zoned;

use super::{Ended, Writer};
use crate::{
    captions::lines::one_line,
    input::{Input, said},
    output::Output,
    pages::{escape, fill},
    run::is_demo,
    units::clock,
};

const TEMPLATE: &str = include_str!("../../pages/report.html");

/// Pixels that a picture is wide at most.
const WIDTH: f64 = 320.0;

/// Writes the page.
pub struct ReportWriter {
    output: Output,
    /// The input's name, without folders.
    title: String,
    items: Arc<Mutex<Items>>,
}

impl ReportWriter {
    pub fn new(input: &Input, output: Output) -> Result<Self> {
        let folder = output.folder();
        let file = tempfile::tempfile_in(folder).with_context(|| output.name())?;
        Ok(Self {
            title: input.title(),
            items: Arc::new(Mutex::new(Items::new(file))),
            output,
        })
    }

    fn write(&mut self, items: &mut Items, ended: &Ended) -> io::Result<()> {
        items.close(Some(ended.position))?;
        let mut length = clock(ended.position);
        if ended.early {
            length = format!("stopped at {length}");
        }
        let note = match is_demo(&ended.model) {
            true => {
                "The demo model only knows test pictures. For real captions choose a model with --model."
            }
            false => "A vision language model made these captions; they may be wrong.",
        };
        let now = Zoned::now();
        let values = [
            ("name", self.title.clone()),
            ("length", length),
            ("captions", items.captions.to_string()),
            ("model", one_line(&ended.model)),
            ("note", note.to_owned()),
            ("datetime", now.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()),
            ("date", now.strftime("%-d %B %Y, %H:%M").to_string()),
        ]
        .map(|(key, value)| (key, escape(&value)));
        let values: Vec<_> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let (head, tail) = TEMPLATE
            .split_once("{{list}}\n")
            .expect("the template has a list");
        let mut page = BufWriter::new(self.output.file());
        page.write_all(fill(head, &values).as_bytes())?;
        let file = items.file.get_mut();
        file.rewind()?;
        io::copy(file, &mut page)?;
        page.write_all(tail.as_bytes())?;
        page.flush()
    }
}

impl Writer for ReportWriter {
    fn launch(&self) -> String {
        "videoconvertscale add-borders=false ! capsfilter name=size ! jpegenc quality=80 \
         ! appsink name=pictures sync=false async=false"
            .into()
    }

    fn connect(&mut self, pipeline: &gst::Pipeline) -> Result<()> {
        let by_name = |name| {
            pipeline
                .by_name(name)
                .context("a GStreamer element is missing")
        };
        let narrated = by_name("narrator")?
            .static_pad("src")
            .context("the narrator has no source pad")?;
        pass_described(&narrated, by_name("size")?);
        let sink = by_name("pictures")?
            .downcast::<gst_app::AppSink>()
            .map_err(|_| anyhow!("not an appsink"))?;
        let items = self.items.clone();
        sink.set_callbacks(
            gst_app::AppSinkCallbacks::builder()
                .new_sample(move |sink| {
                    let sample = sink.pull_sample().map_err(|_| gst::FlowError::Eos)?;
                    let buffer = sample.buffer().ok_or(gst::FlowError::Error)?;
                    let picture = buffer.map_readable().map_err(|_| gst::FlowError::Error)?;
                    let mut items = locked(&items);
                    if let Ok(caption) = Caption::try_from(buffer)
                        && let Err(error) = items.add(&caption, &picture)
                    {
                        // `check` says what it was.
                        items.failed.get_or_insert(error);
                    }
                    Ok(gst::FlowSuccess::Ok)
                })
                .build(),
        );
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        match locked(&self.items).failed.take() {
            Some(error) => Err(anyhow!("{}: {}", self.output.name(), said(&error))),
            None => Ok(()),
        }
    }

    fn finish(
        mut self: Box<Self>,
        ended: &Ended,
        _: &mut dyn FnMut(ClockTime),
    ) -> Result<Option<String>> {
        self.check()?;
        let name = self.output.name();
        let items = self.items.clone();
        let mut items = locked(&items);
        if items.captions == 0 {
            return Ok(None);
        }
        self.write(&mut items, ended)
            .map_err(|error| anyhow!("{name}: {}", said(&error)))?;
        self.output.finish(ended.failed)
    }
}

fn locked(items: &Mutex<Items>) -> MutexGuard<'_, Items> {
    items.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets only the frames pass that captions are about, as small pictures with square pixels.
fn pass_described(pad: &gst::Pad, size: gst::Element) {
    pad.add_probe(gst::PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
        if let Some(gst::PadProbeData::Event(event)) = &info.data
            && let gst::EventView::Caps(caps) = event.view()
            && let Ok(video) = gst_video::VideoInfo::from_caps(caps.caps())
        {
            let par = f64::from(video.par().numer()) / f64::from(video.par().denom());
            let (width, height) = (f64::from(video.width()) * par, f64::from(video.height()));
            let scale = (WIDTH / width).min(1.0);
            let pixels = |side: f64| (side * scale).round().max(1.0) as i32;
            let caps = gst::Caps::builder("video/x-raw")
                .field("width", pixels(width))
                .field("height", pixels(height))
                .field("pixel-aspect-ratio", gst::Fraction::new(1, 1))
                .build();
            size.set_property("caps", caps);
        }
        gst::PadProbeReturn::Ok
    });
    pad.add_probe(gst::PadProbeType::BUFFER, |_, info| {
        let own = |buffer: &gst::Buffer| {
            Caption::try_from(&**buffer)
                .is_ok_and(|caption| !caption.partial && caption.stamp.timestamp == buffer.pts())
        };
        match &info.data {
            Some(gst::PadProbeData::Buffer(buffer)) if own(buffer) => gst::PadProbeReturn::Ok,
            _ => gst::PadProbeReturn::Drop,
        }
    });
}

/// The items of the list; the same caption several times in a row makes one.
struct Items {
    /// Without a name, so that nothing is left of it.
    file: BufWriter<File>,
    captions: u64,
    /// The item whose end is not known yet.
    open: Option<Item>,
    failed: Option<io::Error>,
}

struct Item {
    sequence: u64,
    start: ClockTime,
    text: String,
    picture: String,
}

impl Items {
    fn new(file: File) -> Self {
        Self {
            file: BufWriter::new(file),
            captions: 0,
            open: None,
            failed: None,
        }
    }

    fn add(&mut self, caption: &Caption, picture: &[u8]) -> io::Result<()> {
        self.captions += 1;
        let text = one_line(&caption.text);
        if self.open.as_ref().is_some_and(|item| item.text == text) {
            return Ok(());
        }
        self.close(caption.stamp.stream_time)?;
        self.open = Some(Item {
            sequence: caption.sequence,
            start: caption.stamp.stream_time.unwrap_or_default(),
            text,
            picture: glib::base64_encode(picture).into(),
        });
        Ok(())
    }

    /// Writes the open item, up to `end`.
    fn close(&mut self, end: Option<ClockTime>) -> io::Result<()> {
        let Some(item) = self.open.take() else {
            return Ok(());
        };
        let text = match item.text.as_str() {
            "" => "<em>Nothing was said.</em>".to_owned(),
            text => escape(text),
        };
        let mut span = stamp(item.start);
        if let Some(end) = end.filter(|&end| clock(end) != clock(item.start)) {
            span = format!("{span} – {}", stamp(end));
        }
        let (id, picture) = (item.sequence, &item.picture);
        // The caption beside it says what is in the picture.
        writeln!(
            self.file,
            "<li id=\"caption-{id}\">\n\
             <img src=\"data:image/jpeg;base64,{picture}\" alt=\"\" decoding=\"async\">\n\
             <div><p class=\"when\"><a href=\"#caption-{id}\">{span}</a></p>\n\
             <p class=\"text\">{text}</p></div>\n</li>"
        )?;
        // A full disk is found at once, not at the end.
        self.file.flush()
    }
}

fn stamp(time: ClockTime) -> String {
    format!(
        "<time datetime=\"PT{}.{:03}S\">{}</time>",
        time.seconds(),
        time.mseconds() % 1000,
        clock(time)
    )
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_report_does_as_no_caption_says() {
        let mut items = Items::new(tempfile::tempfile().unwrap());
        let mut caption = Caption::default();
        caption.text = "<script>alert(1)</script>\n& \"quoted\" {{name}}".into();
        items.add(&caption, b"jpeg").unwrap();
        items.close(None).unwrap();
        let file = items.file.get_mut();
        file.rewind().unwrap();
        let mut page = String::new();
        file.read_to_string(&mut page).unwrap();
        assert!(!page.contains("<script"), "{page}");
        assert!(
            page.contains(
                "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot; {{name}}"
            ),
            "{page}"
        );
    }
}
