//! The caption record as message, meta and text.

use std::time::Duration;

use crate::common::{Fake, Pipeline, engine::PER_WORD, harness, init, ms};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::{
    Caption, META_NAME, NotACaption, TextCue,
    caption::{Cost, FrameStamp, Trigger},
};

fn caption() -> Caption {
    let mut stamp = FrameStamp::default();
    stamp.timestamp = Some(ms(1));
    stamp.stream_time = Some(ms(2));
    stamp.running_time = Some(ms(3));
    stamp.duration = Some(ms(4));
    stamp.first_timestamp = Some(ms(0));
    stamp.frames = 2;
    stamp.frame = 5;
    stamp.trigger = Trigger::Scene;
    stamp.request_id = 6;
    let mut cost = Cost::default();
    cost.latency = Duration::from_nanos(1_234_567_891);
    cost.preprocess = Duration::from_nanos(1);
    cost.vision = Duration::from_micros(333_333);
    cost.prefill = Duration::ZERO;
    cost.decode = Duration::from_secs(3600);
    let mut caption = Caption::default();
    caption.stamp = stamp;
    caption.arrival_time = Some(ms(7));
    caption.element = "n".into();
    caption.text = "Ein Wörtchen, \"zitiert\"".into();
    caption.prompt = "What?".into();
    caption.model = "a model".into();
    caption.revision = "8".into();
    caption.device = "cuda".into();
    caption.device_name = "NVIDIA H100, \"80GB\"".into();
    caption.device_memory = 80 << 30;
    caption.sequence = u64::MAX;
    caption.tokens = 9;
    caption.probability = Some(0.75);
    caption.truncated = true;
    caption.repeated = true;
    caption.partial = true;
    caption.cost = cost;
    caption
}

/// The contract: name and type of each field.
const FIELDS: [(&str, &str); 29] = [
    ("timestamp", "guint64"),
    ("stream-time", "guint64"),
    ("running-time", "guint64"),
    ("duration", "guint64"),
    ("first-timestamp", "guint64"),
    ("frames", "guint"),
    ("arrival-time", "guint64"),
    ("text", "gchararray"),
    ("element", "gchararray"),
    ("prompt", "gchararray"),
    ("model", "gchararray"),
    ("revision", "gchararray"),
    ("device", "gchararray"),
    ("device-name", "gchararray"),
    ("device-memory", "guint64"),
    ("sequence", "guint64"),
    ("frame", "guint64"),
    ("tokens", "guint"),
    ("probability", "gdouble"),
    ("truncated", "gboolean"),
    ("repeated", "gboolean"),
    ("partial", "gboolean"),
    ("trigger", "gchararray"),
    ("request-id", "guint"),
    ("latency-ms", "gdouble"),
    ("preprocess-ms", "gdouble"),
    ("vision-ms", "gdouble"),
    ("prefill-ms", "gdouble"),
    ("decode-ms", "gdouble"),
];

fn fields(structure: &gst::StructureRef) -> Vec<(&str, &str)> {
    let fields = structure.iter();
    fields
        .map(|(name, value)| (name.as_str(), value.type_().name()))
        .collect()
}

#[test]
fn survives_its_structure() {
    init();
    let mut unknown = caption();
    unknown.stamp.timestamp = None;
    unknown.stamp.stream_time = None;
    unknown.stamp.running_time = None;
    unknown.stamp.duration = None;
    unknown.stamp.first_timestamp = None;
    unknown.arrival_time = None;
    unknown.text = String::new();
    for caption in [caption(), unknown] {
        let structure = gst::Structure::from(&caption);
        assert_eq!(structure.name(), "vlmnarrate");
        assert_eq!(fields(&structure), FIELDS);
        assert_eq!(Caption::try_from(structure.as_ref()), Ok(caption.clone()));
        // And the way to text and back, which scripts go.
        let parsed: gst::Structure = structure.to_string().parse().unwrap();
        assert_eq!(Caption::try_from(parsed.as_ref()), Ok(caption));
    }
}

#[test]
fn says_what_is_wrong_with_a_structure() {
    init();
    for (name, _) in FIELDS {
        let mut structure = gst::Structure::from(&caption());
        structure.remove_field(name);
        match Caption::try_from(structure.as_ref()) {
            // An engine may not know it.
            Ok(caption) => assert_eq!((name, caption.probability), ("probability", None)),
            Err(error) => assert_eq!(error, NotACaption::Field(name)),
        }
        structure.set(name, gst::Fraction::new(1, 2));
        assert_eq!(
            Caption::try_from(structure.as_ref()),
            Err(NotACaption::Field(name))
        );
    }
    let mut structure = gst::Structure::from(&caption());
    structure.set("vision-ms", -1.0);
    assert_eq!(
        Caption::try_from(structure.as_ref()),
        Err(NotACaption::Field("vision-ms"))
    );
    structure.set_name("level");
    let error = NotACaption::Name("level".into());
    assert_eq!(Caption::try_from(structure.as_ref()), Err(error));
}

#[test]
fn survives_its_text_buffer() {
    init();
    let cue = TextCue::new(&caption(), ms(10)..ms(30));
    assert_eq!(cue.text, caption().text);
    let buffer = gst::Buffer::from(cue.clone());
    assert_eq!(
        (buffer.pts(), buffer.duration()),
        (Some(ms(10)), Some(ms(20)))
    );
    assert_eq!(TextCue::try_from(buffer.as_ref()), Ok(cue));
    assert_eq!(
        TextCue::try_from(gst::Buffer::new().as_ref()),
        Err(NotACaption::NotText)
    );

    let mut garbage = gst::Buffer::from_slice([0xff]);
    garbage.get_mut().unwrap().set_pts(ms(1));
    garbage.get_mut().unwrap().set_duration(ms(1));
    assert_eq!(
        TextCue::try_from(garbage.as_ref()),
        Err(NotACaption::NotText)
    );
}

#[test]
fn text_that_would_break_subtitles_is_mended() {
    let mut caption = caption();
    caption.text = " one\u{7}\r\n\n \n\ttwo\0 ".into();
    let cue = TextCue::new(&caption, ms(0)..ms(1));
    assert_eq!(cue.text, "one\ntwo");
}

#[test]
fn control_characters_reach_nobody() {
    let fake = Fake::new();
    fake.plan().text = Some("a\0b \u{1b}[2J\tc\r\n\u{85}d".into());
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
    let (mut harness, narrator, log) = harness(&fake, caps);
    narrator.set_property("partial-captions", true);
    let buffer = harness
        .push_and_pull(crate::common::buffer(64, 7, ms(0)))
        .unwrap();
    let heard = log.heard();
    let said = "a\u{fffd}b \u{fffd}[2J\tc\u{fffd}\n\u{fffd}d";
    assert_eq!(heard.texts(), [said]);
    assert_eq!(Caption::try_from(buffer.as_ref()).unwrap().text, said);
    assert_eq!(narrator.property::<String>("caption"), said);
    let partial = &heard.partials.last().unwrap().text;
    assert!(partial.starts_with("a\u{fffd}b"), "{partial:?}");
}

#[test]
fn message_and_meta_say_the_same() {
    let fake = Fake::slow(Duration::from_millis(20));
    fake.plan().text = Some("one two three four".into());
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
    let (mut harness, narrator, log) = harness(&fake, caps);
    narrator.set_property("max-tokens", 3u32);

    let mut segment = gst::FormattedSegment::<ClockTime>::new();
    segment.set_start(ms(5000));
    segment.set_time(ms(100));
    segment.set_base(ms(200));
    harness.push_event(gst::event::Segment::new(&segment));
    for i in 0..3u64 {
        let mut buffer = crate::common::buffer(64, 7, ms(5000 + 500 * i));
        buffer.get_mut().unwrap().set_duration(ms(40));
        harness.push(buffer).unwrap();
    }
    let heard = log.heard();
    let [first, second] = &heard.captions[..] else {
        panic!("{heard:#?}");
    };
    // Recorded: the caption is on its frame, and stays on until the next.
    for of in [first, first, second] {
        let buffer = harness.pull().unwrap();
        assert_eq!(Caption::try_from(buffer.as_ref()).as_ref(), Ok(of));
        let meta = gst::meta::CustomMeta::from_buffer(&buffer, META_NAME).unwrap();
        assert_eq!(fields(meta.structure()), FIELDS);
    }

    assert_eq!(first.stamp.timestamp, Some(ms(5000)));
    assert_eq!(first.stamp.stream_time, Some(ms(100)));
    assert_eq!(first.stamp.running_time, Some(ms(200)));
    assert_eq!(first.stamp.duration, Some(ms(40)));
    assert_eq!(first.stamp.frame, 0);
    assert_eq!(first.stamp.trigger, Trigger::Interval);
    assert_eq!(first.stamp.request_id, 0);
    assert_eq!(first.text, "one two three");
    assert_eq!(first.prompt, "Describe this frame in one sentence.");
    assert_eq!(first.model, "fake");
    assert_eq!(first.revision, "r1");
    assert_eq!(first.device, "none");
    assert_eq!(first.device_name, "a device");
    assert_eq!(first.device_memory, 1 << 40);
    assert_eq!(first.sequence, 0);
    assert_eq!(first.tokens, 3 * PER_WORD as u32);
    assert!(first.truncated && !first.partial);
    assert!(first.arrival_time.is_some());
    assert!(first.cost.vision >= Duration::from_millis(20));
    assert!(first.cost.latency >= first.cost.vision);
    assert!(first.cost.preprocess > Duration::from_micros(10));
    assert_eq!(first.cost.prefill, Duration::from_micros(20));
    assert_eq!(first.cost.decode, Duration::from_micros(30));

    assert_eq!(second.stamp.timestamp, Some(ms(6000)));
    assert_eq!(second.stamp.stream_time, Some(ms(1100)));
    assert_eq!(second.stamp.running_time, Some(ms(1200)));
    assert_eq!(second.stamp.frame, 2);
    assert_eq!(second.sequence, 1);
    assert_eq!(
        narrator.property::<Option<String>>("caption").as_deref(),
        Some("one two three")
    );
}

#[test]
fn meta_and_messages_can_be_switched_off() {
    let fake = Fake::new();
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
    let (mut harness, narrator, log) = harness(&fake, caps);
    narrator.set_property("attach-meta", false);
    narrator.set_property("post-messages", false);
    harness.push(crate::common::buffer(64, 7, ms(0))).unwrap();
    let buffer = harness.pull().unwrap();
    assert_eq!(Caption::try_from(buffer.as_ref()), Err(NotACaption::NoMeta));
    assert_eq!(log.heard().captions, []);
    assert!(narrator.property::<Option<String>>("caption").is_some());
}

#[test]
fn what_is_said_again_is_marked_and_posted_only_where_asked() {
    let fake = Fake::new();
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
    let (mut harness, narrator, log) = harness(&fake, caps);
    narrator.set_property("interval", ms(100));
    let said = |harness: &mut gst_check::Harness, text: &str, at| {
        fake.plan().text = Some(text.into());
        harness.push(crate::common::buffer(64, 7, ms(at))).unwrap();
        let meta = Caption::try_from(harness.pull().unwrap().as_ref()).unwrap();
        assert_eq!(
            (meta.text.as_str(), meta.stamp.timestamp),
            (text, Some(ms(at)))
        );
        let captions = log.heard().captions;
        assert!(captions.iter().all(|caption| *caption == meta));
        (meta.repeated, captions.len())
    };
    assert_eq!(said(&mut harness, "a", 0), (false, 1));
    assert_eq!(said(&mut harness, "a", 100), (true, 1));
    assert_eq!(said(&mut harness, "b", 200), (false, 1));
    narrator.set_property("post-repeated", false);
    assert_eq!(said(&mut harness, "b", 300), (true, 0));
    assert_eq!(said(&mut harness, "a", 400), (false, 1));
    // Another question with the same answer is news, and so is what somebody asked about.
    narrator.set_property("prompt", "And now?");
    assert_eq!(said(&mut harness, "a", 500), (false, 1));
    assert_eq!(said(&mut harness, "a", 600), (true, 0));
    narrator.set_property("detail-prompt", "And now?");
    narrator.set_property("interval", ClockTime::from_seconds(3600));
    narrator.describe_now(None, None);
    assert_eq!(said(&mut harness, "a", 700), (true, 1));
    // A caption whose time is up is not current.
    narrator.set_property("expire", ms(150));
    harness
        .push_and_pull(crate::common::buffer(64, 7, ms(1000)))
        .unwrap();
    narrator.set_property("interval", ms(100));
    assert_eq!(said(&mut harness, "a", 2000), (false, 1));
}

#[test]
fn meta_goes_through_conversion_and_scaling() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=5 ! video/x-raw,format=I420,width=64,height=48,framerate=5/1
         ! vlmnarrate name=n ! queue ! videoconvertscale ! video/x-raw,format=RGB,width=32,height=32
         ! fakesink name=sink signal-handoffs=true",
        &fake,
    );
    let (sender, receiver) = std::sync::mpsc::channel();
    pipeline
        .element("sink")
        .connect("handoff", false, move |values| {
            let buffer: gst::Buffer = values[1].get().unwrap();
            sender.send(Caption::try_from(buffer.as_ref())).unwrap();
            None
        });
    let heard = pipeline.run_to_eos();
    let metas: Vec<_> = receiver.try_iter().map(Result::unwrap).collect();
    assert_eq!(metas.len(), 5);
    assert!(metas.iter().all(|meta| *meta == heard.captions[0]));
}

#[test]
fn partial_captions_grow_into_the_whole() {
    let fake = Fake::new();
    fake.plan().text = Some("one two three".into());
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=2 ! video/x-raw,framerate=1/1
         ! vlmnarrate name=n partial-captions=true ! fakesink",
        &fake,
    );
    let heard = pipeline.run_to_eos();
    let texts: Vec<_> = heard.partials.iter().map(|c| c.text.as_str()).collect();
    let growing = ["one ", "one two ", "one two three"];
    assert_eq!(texts, [growing, growing].concat());
    let sequences: Vec<_> = heard.partials.iter().map(|c| c.sequence).collect();
    assert_eq!(sequences, [0, 0, 0, 1, 1, 1]);
    assert!(heard.partials.iter().all(|c| c.partial));
    let tokens: Vec<_> = heard.partials.iter().map(|c| c.tokens as usize).collect();
    assert_eq!(tokens, [1, 2, 3, 1, 2, 3].map(|words| words * PER_WORD));
    assert_eq!(heard.texts(), ["one two three"; 2]);
    assert!(heard.captions.iter().all(|c| !c.partial));
}

#[test]
fn caption_property_notifies() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=3 ! video/x-raw,framerate=1/1 ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    let (sender, receiver) = std::sync::mpsc::channel();
    pipeline
        .narrator
        .connect_notify(Some("caption"), move |narrator, _| {
            sender
                .send(narrator.property::<Option<String>>("caption"))
                .unwrap();
        });
    let heard = pipeline.run_to_eos();
    let mut notified: Vec<_> = receiver.try_iter().collect();
    // It is gone when the stream is.
    assert_eq!(notified.pop(), Some(None));
    let notified: Vec<_> = notified.iter().flatten().collect();
    assert_eq!(notified, heard.texts());
}
