//! The text pad: captions as a sparse stream.

use std::time::Duration;

use crate::common::{Fake, Item, Items, Pipeline, harness, ms, spy};
use gst::{ClockTime, EventType, prelude::*};

/// The pieces of the timeline: from, to, text.
fn pieces(items: &Items) -> Vec<(ClockTime, ClockTime, Option<String>)> {
    let items = items.lock().unwrap();
    let pieces = items.iter().filter_map(|item| match item {
        Item::Gap(start, duration) => Some((*start, *start + duration.unwrap(), None)),
        Item::Buffer {
            pts,
            duration,
            text,
        } => {
            let start = pts.unwrap();
            Some((start, start + duration.unwrap(), text.clone()))
        }
        Item::Event(_) => None,
    });
    pieces.collect()
}

fn events(items: &Items) -> Vec<EventType> {
    let items = items.lock().unwrap();
    let events = items.iter().filter_map(|item| match item {
        Item::Event(type_) => Some(*type_),
        _ => None,
    });
    events.collect()
}

/// Without a hole, without overlap.
#[track_caller]
fn assert_contiguous(items: &Items) {
    let pieces = pieces(items);
    assert!(!pieces.is_empty());
    for pair in pieces.windows(2) {
        assert_eq!(pair[0].1, pair[1].0, "{pieces:#?}");
    }
}

fn texts(items: &Items) -> Vec<(ClockTime, ClockTime)> {
    let pieces = pieces(items).into_iter();
    let texts = pieces.filter(|(_, _, text)| text.is_some());
    texts.map(|(start, end, _)| (start, end)).collect()
}

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";

fn frame(at: u64) -> gst::Buffer {
    let mut buffer = crate::common::buffer(64, 0, ms(at));
    buffer.get_mut().unwrap().set_duration(ms(100));
    buffer
}

/// A pad that takes what the text pad gives.
fn sink(text: &gst::Pad) -> gst::Pad {
    let sink = gst::Pad::builder(gst::PadDirection::Sink)
        .chain_function(|_, _, _| Ok(gst::FlowSuccess::Ok))
        .event_function(|_, _, _| true)
        .build();
    sink.set_active(true).unwrap();
    text.link(&sink).unwrap();
    sink
}

#[test]
fn a_stream_of_its_own_in_the_videos_group() {
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=25 ! video/x-raw,framerate=10/1 ! vlmnarrate name=n
         n.src ! queue ! fakesink n.text_src ! queue ! fakesink name=text",
        &Fake::new(),
    );
    let text = pipeline.element("text").static_pad("sink").unwrap();
    let items = spy(&pipeline.narrator.static_pad("text_src").unwrap());
    let noted = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    for (pad, noted) in [
        (pipeline.narrator.static_pad("src").unwrap(), noted.clone()),
        (text, noted.clone()),
    ] {
        pad.add_probe(gst::PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
            if let Some(gst::EventView::StreamStart(e)) = info.event().map(|e| e.view()) {
                noted.lock().unwrap().push((
                    e.stream_id().to_owned(),
                    e.group_id(),
                    e.stream_flags(),
                ));
            }
            gst::PadProbeReturn::Ok
        });
    }
    pipeline.play();
    let heard = pipeline.log.wait(|heard| heard.eos);
    let mut noted = noted.lock().unwrap().clone();
    noted.sort_by_key(|(id, ..)| id.len());
    let [(video, group, _), (text, text_group, flags)] = &noted[..] else {
        panic!("{noted:?}");
    };
    assert_eq!(*text, format!("{video}/text/n"));
    assert!(group.is_some());
    assert_eq!(group, text_group);
    assert!(flags.contains(gst::StreamFlags::SPARSE));

    use EventType::{Caps, Eos, Segment, StreamStart};
    assert_eq!(events(&items), [StreamStart, Caps, Segment, Eos]);
    assert_contiguous(&items);
    let second = ClockTime::SECOND;
    let cues = [
        (ms(0), second),
        (second, 2 * second),
        (2 * second, 3 * second),
    ];
    assert_eq!(texts(&items), cues);
    assert_eq!(pieces(&items)[0].2.as_deref(), Some(heard.texts()[0]));
}

#[test]
fn recorded_cues_stretch_to_the_next_due_frame() {
    for (interval, nth, cues) in [
        (300, 1, vec![(0, 300), (300, 600), (600, 900), (900, 1200)]),
        (100, 4, vec![(0, 400), (400, 800), (800, 1200)]),
        (250, 1, vec![(0, 250), (300, 500), (500, 750), (800, 1000)]),
        (0, 5, vec![(0, 500), (500, 1000)]),
    ] {
        let (mut harness, narrator, _log) = harness(&Fake::new(), CAPS);
        narrator.set_property("interval", ms(interval));
        narrator.set_property("every-nth", nth as u32);
        let text = narrator.request_pad_simple("text_src").unwrap();
        let items = spy(&text);
        let _sink = sink(&text);
        for i in 0..10 {
            harness.push_and_pull(frame(100 * i)).unwrap();
        }
        let cues: Vec<_> = cues.into_iter().map(|(a, b)| (ms(a), ms(b))).collect();
        assert_eq!(texts(&items), cues, "{interval} ms, every {nth}");
        assert_contiguous(&items);
    }
}

#[test]
fn an_unchanged_picture_keeps_its_caption_on_screen() {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    narrator.set_property("scene-threshold", 0.1);
    let text = narrator.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let _sink = sink(&text);
    for i in 0..3 {
        harness.push_and_pull(frame(1000 * i)).unwrap();
    }
    assert_eq!(log.heard().captions.len(), 1);
    assert_eq!(texts(&items).len(), 3);
    assert_contiguous(&items);
}

#[test]
fn a_cue_ends_when_its_caption_expires() {
    for merge in [false, true] {
        let fake = Fake::new();
        let element = crate::common::narrator(&fake);
        element.set_property("merge-captions", merge);
        element.set_property("interval", ms(1000));
        element.set_property("expire", ms(300));
        let (mut harness, _log) = crate::common::harness_with(&element, CAPS);
        let text = element.request_pad_simple("text_src").unwrap();
        let items = spy(&text);
        let _sink = sink(&text);
        for i in 0..12 {
            let buffer = harness.push_and_pull(frame(100 * i)).unwrap();
            let is_current = gstvlmnarrate::Caption::try_from(buffer.as_ref()).is_ok();
            assert_eq!(is_current, i % 10 < 3, "{i}");
        }
        assert!(element.property::<Option<String>>("caption").is_some());
        harness.push_event(gst::event::Eos::new());
        let last = if merge { 1200 } else { 1300 };
        let cues = [(ms(0), ms(300)), (ms(1000), ms(last))];
        assert_eq!(texts(&items), cues, "{merge}");
        assert_contiguous(&items);
    }
}

/// Identical captions in a row are one cue, and it ends where the next starts.
#[test]
fn merged_captions() {
    for live in [false, true] {
        let fake = Fake::new();
        let element = crate::common::narrator(&fake);
        element.set_property("merge-captions", true);
        element.set_property("interval", ms(300));
        let (mut harness, log) = crate::common::harness_with(&element, CAPS);
        if live {
            element.set_property_from_str("mode", "live");
        }
        let text = element.request_pad_simple("text_src").unwrap();
        let items = spy(&text);
        let _sink = sink(&text);
        for (i, say) in "aaaaaabbbccc".chars().enumerate() {
            fake.plan().text = Some(say.into());
            harness.push_and_pull(frame(100 * i as u64)).unwrap();
            if i % 3 == 0 {
                log.wait(|heard| !live || !heard.captions.is_empty());
            }
        }
        // The next segment has other times: what is held goes before it.
        let mut segment = gst::FormattedSegment::<ClockTime>::new();
        segment.set_base(ms(1200));
        harness.push_event(gst::event::Segment::new(&segment));
        assert_contiguous(&items);
        let cues = pieces(&items)
            .into_iter()
            .filter_map(|(from, to, text)| text.map(|text| (from.mseconds(), to.mseconds(), text)));
        // Live, the first is ready after its frame has gone; the others start with theirs.
        let first = if live { 100 } else { 0 };
        let expected = [(first, 600, "a"), (600, 900, "b"), (900, 1200, "c")];
        assert_eq!(
            Vec::from_iter(cues),
            expected.map(|(from, to, text)| (from, to, text.to_owned())),
            "live: {live}"
        );
        assert_eq!(events(&items).last(), Some(&EventType::Segment));
    }
}

/// Text that comes behind the video must not hold up the start: with it a second sink would wait
/// for text, the video for that sink, and text for the video.
#[test]
fn merged_captions_do_not_keep_a_pipeline_from_starting() {
    let (_folder, vtt) = written(
        "merge-captions=true n.src ! queue max-size-buffers=1 ! fakesink
         n.text_src ! queue ! webvttenc ! filesink location=FILE",
        "vtt",
    );
    let vtt = std::fs::read_to_string(vtt).unwrap();
    assert!(vtt.contains("00:00:00.000 --> 00:00:03.000"), "{vtt}");
    assert_eq!(vtt.matches("A ball").count(), 1, "{vtt}");
}

#[test]
fn live_cues_are_repeated_in_slices() {
    let fake = Fake::slow(Duration::from_millis(50));
    let (mut harness, narrator, log) = harness(&fake, CAPS);
    narrator.set_property_from_str("mode", "live");
    narrator.set_property("interval", ms(400));
    let text = narrator.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let _sink = sink(&text);
    let mut captions = 0;
    for i in 0..12 {
        harness.push_and_pull(frame(100 * i)).unwrap();
        if i % 4 == 0 {
            captions += log.wait(|heard| !heard.captions.is_empty()).captions.len();
        }
    }
    assert_eq!(captions, 3);
    assert_contiguous(&items);
    // Ready after the first frame and shown from the second on, whatever its own time is.
    let cues = [(ms(100), ms(500)), (ms(500), ms(900)), (ms(900), ms(1300))];
    assert_eq!(texts(&items), cues);
    assert_eq!(pieces(&items)[0], (ms(0), ms(100), None));
}

#[test]
fn a_caption_after_the_last_frame_is_shown_before_eos() {
    let fake = Fake::slow(Duration::from_millis(100));
    let (mut harness, narrator, _log) = harness(&fake, CAPS);
    narrator.set_property_from_str("mode", "live");
    let text = narrator.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let _sink = sink(&text);
    harness.push(frame(0)).unwrap();
    harness.push_event(gst::event::Eos::new());
    assert_eq!(texts(&items), [(ms(100), ms(600))]);
    assert_contiguous(&items);
    let last = items.lock().unwrap().last().cloned();
    assert_eq!(last, Some(Item::Event(EventType::Eos)));
}

#[test]
fn gaps_go_with_the_video() {
    let fake = Fake::slow(Duration::from_secs(20));
    let (mut harness, narrator, _log) = harness(&fake, CAPS);
    narrator.set_property_from_str("mode", "live");
    let text = narrator.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let _sink = sink(&text);
    for at in [0, 100, 300] {
        harness.push(frame(at)).unwrap();
        // Before the video is pushed: whoever waits for text is served.
        assert!(pieces(&items).last().unwrap().1 >= ms(at + 100));
    }
    harness.push_event(gst::event::Gap::builder(ms(400)).duration(ms(600)).build());
    // Nobody knows how long this one lasts.
    harness
        .push(crate::common::buffer(64, 0, ms(1000)))
        .unwrap();
    assert_contiguous(&items);
    assert!(pieces(&items).last().unwrap().1 > ms(1000));
    assert!(texts(&items).is_empty());
}

#[test]
fn a_flush_starts_the_timeline_over() {
    let (mut harness, narrator, _log) = harness(&Fake::new(), CAPS);
    let text = narrator.request_pad_simple("text_src").unwrap();
    let _sink = sink(&text);
    harness.push(frame(5000)).unwrap();
    let items = spy(&text);
    harness.push_event(gst::event::FlushStart::new());
    harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<ClockTime>::new();
    harness.push_event(gst::event::Segment::new(&segment));
    harness.push(frame(1000)).unwrap();
    use EventType::{FlushStart, FlushStop, Segment};
    assert_eq!(events(&items), [FlushStart, FlushStop, Segment]);
    assert_eq!(texts(&items), [(ms(1000), ms(2000))]);
}

#[test]
fn the_pad_comes_and_goes_while_the_video_plays() {
    let (mut harness, narrator, _log) = harness(&Fake::new(), CAPS);
    for round in 0..3u64 {
        let base = 2000 * round;
        harness.push_and_pull(frame(base)).unwrap();
        let text = narrator.request_pad_simple("text_src").unwrap();
        assert_eq!(text.name(), "text_src");
        // There is one, and no more.
        let template = narrator.pad_template("text_src").unwrap();
        assert!(narrator.request_pad(&template, None, None).is_none());
        let items = spy(&text);
        // Not linked: the video doesn't mind.
        harness.push_and_pull(frame(base + 100)).unwrap();
        let sink = sink(&text);
        harness.push_and_pull(frame(base + 1000)).unwrap();
        // Whoever links late is told what it is.
        assert!(sink.sticky_event::<gst::event::StreamStart>(0).is_some());
        assert!(sink.sticky_event::<gst::event::Caps>(0).is_some());
        assert!(sink.sticky_event::<gst::event::Segment>(0).is_some());
        assert!(!texts(&items).is_empty());
        narrator.release_request_pad(&text);
        assert!(narrator.static_pad("text_src").is_none());
    }
    harness.push_and_pull(frame(9000)).unwrap();
}

/// Who takes the text has an end of its own, a failure is everybody's.
#[test]
fn flows_are_combined() {
    use gst::{FlowError, FlowSuccess};
    for (text_flow, expected) in [
        (Err(FlowError::Eos), Ok(FlowSuccess::Ok)),
        (Err(FlowError::NotLinked), Ok(FlowSuccess::Ok)),
        (Err(FlowError::Error), Err(FlowError::Error)),
        (Err(FlowError::NotNegotiated), Err(FlowError::NotNegotiated)),
    ] {
        let (mut harness, narrator, _log) = harness(&Fake::new(), CAPS);
        let text = narrator.request_pad_simple("text_src").unwrap();
        let sink = gst::Pad::builder(gst::PadDirection::Sink)
            .chain_function(move |_, _, _| text_flow)
            .event_function(|_, _, _| true)
            .build();
        sink.set_active(true).unwrap();
        text.link(&sink).unwrap();
        assert_eq!(harness.push(frame(0)), expected);
        assert_eq!(harness.push(frame(1000)), expected);
    }
}

#[test]
fn textoverlay_lets_every_frame_pass() {
    for live in [false, true] {
        let fake = Fake::slow(Duration::from_millis(20));
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} num-buffers=60
                 ! video/x-raw,width=160,height=120,framerate=30/1
                 ! vlmnarrate name=n interval=500000000
                 n.src ! queue ! textoverlay name=o wait-text=true ! fakesink name=sink
                 n.text_src ! queue ! o.text_sink"
            ),
            &fake,
        );
        let passed = spy(&pipeline.element("sink").static_pad("sink").unwrap());
        pipeline.run_to_eos();
        let passed = passed.lock().unwrap();
        let buffers = passed.iter().filter(|i| matches!(i, Item::Buffer { .. }));
        assert_eq!(buffers.count(), 60, "live: {live}");
    }
}

/// Runs three seconds of video into some writer of subtitles.
fn written(branch: &str, extension: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(format!("out.{extension}"));
    let file = file.to_str().unwrap().to_owned();
    let fake = Fake::new();
    fake.plan().text = Some("A ball, and it's 1 < 2 & more".into());
    let pipeline = Pipeline::new(
        &format!(
            "videotestsrc num-buffers=75 ! video/x-raw,width=64,height=48,framerate=25/1
             ! vlmnarrate name=n {} ",
            branch.replace("FILE", &file)
        ),
        &fake,
    );
    pipeline.run_to_eos();
    (folder, file)
}

#[test]
fn webvtt_and_subrip_have_a_cue_per_caption() {
    let (_folder, vtt) = written(
        "n.src ! queue ! fakesink n.text_src ! queue ! webvttenc ! filesink location=FILE",
        "vtt",
    );
    let vtt = std::fs::read_to_string(vtt).unwrap();
    assert!(vtt.starts_with("WEBVTT"), "{vtt}");
    for times in [
        "00:00:00.000 --> 00:00:01.000",
        "00:00:01.000 --> 00:00:02.000",
        "00:00:02.000 --> 00:00:03.000",
    ] {
        assert!(vtt.contains(times), "{vtt}");
    }
    assert_eq!(vtt.matches("A ball").count(), 3);

    let (_folder, srt) = written(
        "n.src ! queue ! fakesink n.text_src ! queue ! srtenc ! filesink location=FILE",
        "srt",
    );
    let srt = std::fs::read_to_string(srt).unwrap();
    assert!(srt.contains("00:00:02,000 --> 00:00:03,000"), "{srt}");
    assert_eq!(srt.matches("A ball").count(), 3);
}

/// What is markup to a format is text to us.
#[test]
fn markup_is_escaped_where_it_is_asked_for() {
    let (_folder, vtt) = written(
        "n.src ! queue ! fakesink
         n.text_src ! queue ! text/x-raw,format=pango-markup ! webvttenc ! filesink location=FILE",
        "vtt",
    );
    let vtt = std::fs::read_to_string(vtt).unwrap();
    assert_eq!(
        vtt.matches("A ball, and it's 1 &lt; 2 &amp; more").count(),
        3,
        "{vtt}"
    );
    let (_folder, srt) = written(
        "n.src ! queue ! fakesink n.text_src ! queue ! srtenc ! filesink location=FILE",
        "srt",
    );
    let srt = std::fs::read_to_string(srt).unwrap();
    assert_eq!(
        srt.matches("A ball, and it's 1 < 2 & more").count(),
        3,
        "{srt}"
    );
}

#[test]
fn matroska_keeps_the_captions_as_subtitles() {
    let (_folder, mkv) = written(
        "n.src ! queue ! jpegenc ! m.  n.text_src ! queue ! m.
         matroskamux name=m ! filesink location=FILE",
        "mkv",
    );
    let pipeline = gst::parse::launch(&format!(
        "filesrc location={mkv} ! matroskademux name=d
         d.video_0 ! queue ! fakesink name=video d.subtitle_0 ! queue ! fakesink name=text"
    ))
    .unwrap();
    let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
    let spy_on = |name| spy(&pipeline.by_name(name).unwrap().static_pad("sink").unwrap());
    let (video, text) = (spy_on("video"), spy_on("text"));
    pipeline.set_state(gst::State::Playing).unwrap();
    let bus = pipeline.bus().unwrap();
    let wanted = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = bus
        .timed_pop_filtered(crate::common::TIMEOUT, &wanted)
        .unwrap();
    assert_eq!(end.type_(), gst::MessageType::Eos, "{end:?}");
    pipeline.set_state(gst::State::Null).unwrap();

    let video = video.lock().unwrap();
    let frames = video.iter().filter(|i| matches!(i, Item::Buffer { .. }));
    assert_eq!(frames.count(), 75);
    let second = ClockTime::SECOND;
    let cues = [
        (ms(0), second),
        (second, 2 * second),
        (2 * second, 3 * second),
    ];
    assert_eq!(texts(&text), cues);
    let said = pieces(&text).into_iter().find_map(|(_, _, text)| text);
    // The demuxer gives Pango markup.
    assert_eq!(
        said.as_deref(),
        Some("A ball, and it&apos;s 1 &lt; 2 &amp; more")
    );
}
