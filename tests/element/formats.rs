//! Any raw video passes unchanged and is described.

use crate::common::{Fake, harness};
use gst::{ClockTime, prelude::*};
use gst_video::{VideoFormat, VideoInfo};

/// Pushes two frames of noise; they must come out as they went in, described.
#[track_caller]
fn passes(caps: &gst::Caps, size: usize) {
    let fake = Fake::new();
    let (mut harness, _narrator, log) = harness(&fake, &caps.to_string());
    for second in 0..2 {
        let mut noise = 0x9e37_79b9u32 ^ second as u32;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            noise ^= noise << 13;
            noise ^= noise >> 17;
            noise ^= noise << 5;
            noise as u8
        })
        .take(size)
        .collect();
        let mut buffer = gst::Buffer::from_slice(bytes.clone());
        buffer
            .get_mut()
            .unwrap()
            .set_pts(ClockTime::from_seconds(second));
        if second == 1
            && let Ok(info) = VideoInfo::from_caps(caps)
        {
            // As decoders and pools add it.
            gst_video::VideoMeta::add_full(
                buffer.get_mut().unwrap(),
                gst_video::VideoFrameFlags::empty(),
                info.format(),
                info.width(),
                info.height(),
                info.offset(),
                info.stride(),
            )
            .unwrap();
        }
        let memory = buffer.peek_memory(0).as_ptr();
        let out = harness.push_and_pull(buffer).unwrap();
        assert_eq!(out.map_readable().unwrap().as_slice(), bytes, "{caps}");
        assert_eq!(out.peek_memory(0).as_ptr(), memory, "copied: {caps}");
        assert_eq!(out.pts(), Some(ClockTime::from_seconds(second)));
    }
    let heard = log.heard();
    assert_eq!(heard.warnings, [""; 0], "{caps}");
    assert_eq!(heard.captions.len(), 2, "{caps}");
}

fn passes_info(info: &VideoInfo) {
    passes(&info.to_caps().unwrap(), info.size());
}

#[test]
fn every_format() {
    crate::common::init();
    let mut formats = 0;
    for format in VideoFormat::iter_raw() {
        // Tiles are whole; everything else may be odd.
        let (width, height) = (67, 35);
        let info = VideoInfo::builder(format, width, height)
            .fps(gst::Fraction::new(1, 1))
            .build()
            .unwrap();
        passes_info(&info);
        formats += 1;
    }
    assert!(formats > 90, "{formats}");
}

#[test]
fn every_size() {
    crate::common::init();
    for (width, height) in [
        (1, 1),
        (2, 1),
        (1, 3),
        (3, 2),
        (17, 4001),
        (4001, 17),
        (1921, 1081),
    ] {
        for format in [VideoFormat::I420, VideoFormat::Rgb, VideoFormat::Yuy2] {
            passes_info(&VideoInfo::builder(format, width, height).build().unwrap());
        }
    }
}

#[test]
fn any_framerate_interlacing_and_aspect() {
    crate::common::init();
    for extra in [
        "framerate=0/1",
        "framerate=30000/1001,pixel-aspect-ratio=16/11",
        "framerate=0/1,max-framerate=60/1",
        "framerate=25/1,interlace-mode=interleaved,field-order=top-field-first",
        "framerate=25/1,interlace-mode=mixed",
        "framerate=25/1,interlace-mode=fields",
        "framerate=25/1,colorimetry=bt2020,chroma-site=mpeg2",
        "framerate=25/1,multiview-mode=left",
    ] {
        let caps = format!("video/x-raw,format=I420,width=720,height=576,{extra}");
        passes(&caps.parse().unwrap(), 720 * 576 * 3 / 2);
    }
    let caps = "video/x-raw(memory:SystemMemory,meta:GstVideoOverlayComposition),format=RGBA,\
                width=32,height=32,framerate=25/1";
    passes(&caps.parse().unwrap(), 32 * 32 * 4);
}

/// As an engine behind a network may be.
#[test]
fn an_engine_without_a_side_gets_whole_frames() {
    let fake = Fake::new();
    fake.plan().image_size = gstvlmnarrate::engine::ImageSize::Whole;
    fake.plan().probability = None;
    let caps = "video/x-raw,format=GRAY8,width=40,height=24,framerate=1/1";
    let (mut harness, narrator, log) = harness(&fake, caps);
    let mut push = |second| {
        let mut buffer = gst::Buffer::from_slice([80; 40 * 24]);
        let fresh = buffer.get_mut().unwrap();
        fresh.set_pts(ClockTime::from_seconds(second));
        harness.push_and_pull(buffer).unwrap();
    };
    push(0);
    narrator.set_property("image-size", 16u32);
    push(1);
    let requests = fake.requests();
    let seen = requests.iter().map(|r| (r.side, r.splitting));
    assert_eq!(seen.collect::<Vec<_>>(), [(40, true), (16, false)]);
    let heard = log.heard();
    assert_eq!(heard.captions[0].probability, None);
    let message = gst::Structure::from(&heard.captions[0]);
    assert!(!message.has_field("probability"), "{message}");
}

/// What the model sees is the picture, wherever its rows lie.
#[test]
fn padded_rows_are_read_where_they_are() {
    let (width, height, stride) = (50usize, 40usize, 77i32);
    let said = |padded: bool| {
        let caps = format!("video/x-raw,format=GRAY8,width={width},height={height},framerate=1/1");
        let (mut harness, _narrator, log) = harness(&Fake::new(), &caps);
        // GStreamer's own rows are a multiple of four long.
        let stride = if padded {
            stride as usize
        } else {
            width.next_multiple_of(4)
        };
        let mut bytes = vec![255u8; stride * height];
        for row in bytes.chunks_exact_mut(stride) {
            row[..width].fill(40);
        }
        let mut buffer = gst::Buffer::from_slice(bytes);
        let fresh = buffer.get_mut().unwrap();
        fresh.set_pts(ClockTime::ZERO);
        if padded {
            gst_video::VideoMeta::add_full(
                fresh,
                gst_video::VideoFrameFlags::empty(),
                VideoFormat::Gray8,
                width as u32,
                height as u32,
                &[0],
                &[stride as i32],
            )
            .unwrap();
        }
        harness.push_and_pull(buffer).unwrap();
        log.heard().captions.remove(0).text
    };
    assert_eq!(said(true), said(false));
    assert!(
        said(true).contains("[28, 28, 28]") || said(true).contains("[40, 40, 40]"),
        "{}",
        said(true)
    );
}

/// A grey picture of 20x10 in a buffer of 60x50 that is black around it, said to be at `left`.
fn cropped(left: u32) -> crate::common::Heard {
    let caps = "video/x-raw,format=GRAY8,width=20,height=10,framerate=1/1";
    let (mut harness, _narrator, log) = harness(&Fake::new(), caps);
    let mut bytes = vec![0u8; 60 * 50];
    for row in bytes.chunks_exact_mut(60).skip(30).take(10) {
        row[33..53].fill(200);
    }
    let mut buffer = gst::Buffer::from_slice(bytes);
    let fresh = buffer.get_mut().unwrap();
    fresh.set_pts(ClockTime::ZERO);
    let flags = gst_video::VideoFrameFlags::empty();
    gst_video::VideoMeta::add_full(fresh, flags, VideoFormat::Gray8, 60, 50, &[0], &[60]).unwrap();
    gst_video::VideoCropMeta::add(fresh, (left, 30, 20, 10));
    let out = harness.push_and_pull(buffer).unwrap();
    let crop = out.meta::<gst_video::VideoCropMeta>().unwrap();
    assert_eq!(crop.rect(), (left, 30, 20, 10));
    log.heard()
}

#[test]
fn cropped_pictures_are_seen_without_what_is_around() {
    let heard = cropped(33);
    assert_eq!(heard.texts(), ["mean colour [200, 200, 200]"]);
    for left in [41, u32::MAX - 3] {
        let heard = cropped(left);
        assert!(heard.captions.is_empty());
        assert!(heard.warnings[0].contains("not inside its buffer of 60x50"));
    }
}

/// Rows that a buffer's meta tells of, of 1 byte each and this far apart.
fn rows(offset: usize, stride: i32, bytes: &[u8; 12]) -> crate::common::Heard {
    let caps = "video/x-raw,format=GRAY8,width=1,height=3,framerate=1/1";
    let (mut harness, _narrator, log) = harness(&Fake::new(), caps);
    let mut buffer = gst::Buffer::from_slice(*bytes);
    let fresh = buffer.get_mut().unwrap();
    fresh.set_pts(ClockTime::ZERO);
    let flags = gst_video::VideoFrameFlags::empty();
    let format = VideoFormat::Gray8;
    gst_video::VideoMeta::add_full(fresh, flags, format, 1, 3, &[offset], &[stride]).unwrap();
    harness.push_and_pull(buffer).unwrap();
    log.heard()
}

#[test]
fn rows_may_be_upside_down_but_not_outside() {
    let bytes = [0, 90, 0, 0, 0, 90, 0, 0, 0, 90, 0, 0];
    // From the top, from the bottom, and one after another.
    for (offset, stride) in [(1, 4), (9, -4)] {
        let heard = rows(offset, stride, &bytes);
        assert_eq!(heard.texts(), ["mean colour [90, 90, 90]"], "{stride}");
    }
    // The last row ends with the buffer, without its padding.
    let heard = rows(1, 5, &[0, 90, 0, 0, 0, 0, 90, 0, 0, 0, 0, 90]);
    assert_eq!(heard.texts(), ["mean colour [90, 90, 90]"]);
    for (offset, stride) in [(1, 6), (7, -4), (0, i32::MAX), (0, i32::MIN)] {
        let heard = rows(offset, stride, &bytes);
        assert!(heard.captions.is_empty(), "{stride}");
        assert!(
            heard.warnings[0].contains("not inside its buffer"),
            "{stride}"
        );
    }
}

/// The colours that the model sees are those of the picture.
#[test]
fn colours_are_right_in_rgb_and_yuv() {
    for format in ["RGB", "BGRx", "I420", "NV12", "YUY2", "P010_10LE", "v210"] {
        let fake = Fake::new();
        let pipeline = crate::common::Pipeline::new(
            &format!(
                "videotestsrc pattern=solid-color foreground-color=0xffc83214 num-buffers=1
                 ! video/x-raw,format={format},width=320,height=240,framerate=1/1
                 ! vlmnarrate name=n ! fakesink"
            ),
            &fake,
        );
        let heard = pipeline.run_to_eos();
        let colour: Vec<i32> = heard.texts()[0]
            .trim_start_matches("mean colour [")
            .trim_end_matches(']')
            .split(", ")
            .map(|n| n.parse().unwrap())
            .collect();
        for (seen, shown) in colour.iter().zip([0xc8, 0x32, 0x14]) {
            assert!((seen - shown).abs() <= 4, "{format}: {colour:?}");
        }
    }
}

#[test]
fn frames_without_timestamps_or_pictures() {
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=2/1";
    let (mut harness, narrator, log) = harness(&Fake::new(), caps);
    // Counted: two frames a second.
    for _ in 0..4 {
        harness
            .push_and_pull(crate::common::buffer(64, 1, None))
            .unwrap();
    }
    let heard = log.heard();
    let frames: Vec<_> = heard.captions.iter().map(|c| c.stamp.frame).collect();
    assert_eq!(frames, [0, 2]);
    assert_eq!(heard.captions[0].stamp.timestamp, None);

    // Nothing to see: an empty buffer, and one that is flagged as a gap too.
    harness.push(gst::Buffer::new()).unwrap();
    let mut gap = crate::common::buffer(0, 1, ClockTime::from_seconds(100));
    gap.get_mut().unwrap().set_flags(gst::BufferFlags::GAP);
    harness.push(gap).unwrap();
    assert_eq!(log.heard().captions.len(), 0);

    // A buffer that is too small for its caps is no reason to stop.
    harness
        .push(crate::common::buffer(60, 1, ClockTime::from_seconds(200)))
        .unwrap();
    let heard = log.heard();
    assert_eq!(
        (heard.captions.len(), heard.warnings.len()),
        (0, 1),
        "{heard:#?}"
    );
    harness
        .push(crate::common::buffer(64, 1, ClockTime::from_seconds(300)))
        .unwrap();
    assert_eq!(log.heard().captions.len(), 1);
    assert_eq!(
        narrator
            .property::<gst::Structure>("stats")
            .get::<u64>("errors"),
        Ok(1)
    );
}

#[test]
fn without_a_framerate_every_frame_without_a_timestamp_is_due() {
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=0/1";
    let (mut harness, _narrator, log) = harness(&Fake::new(), caps);
    for _ in 0..3 {
        harness
            .push_and_pull(crate::common::buffer(64, 1, None))
            .unwrap();
    }
    assert_eq!(log.heard().captions.len(), 3);
}

#[test]
fn caps_may_change_midstream() {
    let fake = Fake::new();
    let (mut harness, _narrator, log) = harness(
        &fake,
        "video/x-raw,format=GRAY8,width=8,height=8,framerate=1/1",
    );
    harness
        .push_and_pull(crate::common::buffer(64, 1, ClockTime::ZERO))
        .unwrap();
    harness.set_src_caps_str("video/x-raw,format=RGB,width=16,height=8,framerate=1/1");
    let frame = crate::common::buffer(16 * 8 * 3, 200, ClockTime::SECOND);
    harness.push_and_pull(frame).unwrap();
    assert_eq!(log.heard().texts()[1], "mean colour [200, 200, 200]");
    assert_eq!(fake.engines(), 1, "the model stays loaded");
    assert_eq!(fake.loads().len(), 1);
}

/// Behind a tee the buffer's metadata is copied, its memory is not.
#[test]
fn a_tee_costs_no_copy_of_the_picture() {
    let fake = Fake::new();
    let pipeline = crate::common::Pipeline::new(
        "videotestsrc num-buffers=3 ! video/x-raw,framerate=1/1 ! tee name=t
         t. ! queue ! vlmnarrate name=n ! fakesink name=a signal-handoffs=true
         t. ! queue ! fakesink name=b signal-handoffs=true",
        &fake,
    );
    let (sender, receiver) = std::sync::mpsc::channel();
    for name in ["a", "b"] {
        let sender = sender.clone();
        pipeline
            .element(name)
            .connect("handoff", false, move |values| {
                let buffer: gst::Buffer = values[1].get().unwrap();
                sender
                    .send((buffer.pts(), buffer.peek_memory(0).as_ptr() as usize))
                    .unwrap();
                None
            });
    }
    pipeline.run_to_eos();
    let mut memories: Vec<_> = receiver.try_iter().collect();
    assert_eq!(memories.len(), 6);
    memories.sort();
    memories.dedup();
    assert_eq!(memories.len(), 3);
}

/// What is said of one frame of these bytes.
fn said_of(caps: &str, bytes: Vec<u8>, rows: Option<(&[usize], &[i32])>) -> crate::common::Heard {
    let (mut harness, _narrator, log) = harness(&Fake::new(), caps);
    let mut buffer = gst::Buffer::from_slice(bytes);
    let fresh = buffer.get_mut().unwrap();
    fresh.set_pts(ClockTime::ZERO);
    if let Some((offset, stride)) = rows {
        let caps = caps.parse::<gst::Caps>().unwrap();
        let info = VideoInfo::from_caps(&caps).unwrap();
        let (format, width, height) = (info.format(), info.width(), info.height());
        let flags = gst_video::VideoFrameFlags::empty();
        gst_video::VideoMeta::add_full(fresh, flags, format, width, height, offset, stride)
            .unwrap();
    }
    harness.push_and_pull(buffer).unwrap();
    log.heard()
}

/// Colours in the order of their rows, so that it shows which is on top.
#[test]
fn frames_may_be_stored_from_the_bottom_up() {
    let half = |colour: [u8; 4], bytes: usize| colour[..bytes].repeat(160 * 60);
    for (format, bytes) in [("RGB", 3), ("BGRx", 4), ("ARGB", 4)] {
        let caps = format!("video/x-raw,format={format},width=160,height=120,framerate=1/1");
        let [light, dark] = [[255, 200, 200, 200], [255, 20, 20, 20]].map(|c| half(c, bytes));
        let row = 160 * bytes;
        let upright = said_of(&caps, [light.clone(), dark.clone()].concat(), None);
        let rows = ([119 * row], [-(row as i32)]);
        let flipped = said_of(&caps, [dark, light].concat(), Some((&rows.0, &rows.1)));
        assert_eq!(flipped.warnings, [""; 0], "{format}");
        assert_eq!(flipped.texts(), upright.texts(), "{format}");
    }
    let caps = "video/x-raw,format=NV12,width=64,height=48,framerate=1/1";
    let bytes = [vec![180; 64 * 48], vec![110; 64 * 24]].concat();
    let rows = ([64 * 47, 64 * 71], [-64, -64]);
    let flipped = said_of(caps, bytes.clone(), Some((&rows.0, &rows.1)));
    assert_eq!(flipped.texts(), said_of(caps, bytes, None).texts());
}

/// A meta that doesn't fit the caps costs a caption, no more.
#[test]
fn metas_of_something_else_are_refused() {
    let caps = "video/x-raw,format=NV12,width=64,height=48,framerate=1/1";
    for (offset, stride) in [
        (&[0][..], &[64][..]),
        (&[0, 64 * 48], &[64, i32::MAX]),
        (&[usize::MAX, 0], &[64, 64]),
        (&[0, 64 * 60], &[64, 64]),
    ] {
        let heard = said_of(caps, vec![100; 64 * 72], Some((offset, stride)));
        assert!(heard.captions.is_empty(), "{offset:?} {stride:?}");
        assert_eq!(heard.warnings.len(), 1, "{:?}", heard.warnings);
    }
}

/// Nobody sees the colour of transparent pixels.
#[test]
fn transparent_pixels_are_white() {
    crate::common::init();
    for format in [
        "RGBA",
        "BGRA",
        "AYUV",
        "GBRA",
        "RGBA64_LE",
        "BGRA64_BE",
        "A420",
    ] {
        let caps = format!("video/x-raw,format={format},width=64,height=48,framerate=1/1");
        let parsed = caps.parse::<gst::Caps>().unwrap();
        let info = VideoInfo::from_caps(&parsed).unwrap();
        // Noise, with an alpha of nothing wherever that is.
        let mut rng = fastrand::Rng::with_seed(6);
        let mut bytes = std::iter::repeat_with(|| rng.u8(..))
            .take(info.size())
            .collect::<Vec<_>>();
        let alpha = 3;
        let step = info.comp_pstride(alpha) as usize;
        let start = info.comp_offset(alpha);
        let size = info.comp_depth(alpha) as usize / 8;
        for pixel in bytes[start..].chunks_mut(step).take(64 * 48) {
            pixel[..size].fill(0);
        }
        let heard = said_of(&caps, bytes, None);
        assert_eq!(heard.texts(), ["mean colour [255, 255, 255]"], "{format}");
    }
}

/// Reference white of high dynamic range is white.
#[test]
fn tones_of_high_dynamic_range_are_mapped() {
    for (colorimetry, white, grey) in [("bt2100-pq", 573, 439), ("bt2100-hlg", 721, 476)] {
        let caps = format!(
            "video/x-raw,format=P010_10LE,width=64,height=48,framerate=1/1,\
             colorimetry={colorimetry}"
        );
        // 203 and 43.8 cd/m²: 255 and 128 of sRGB.
        for (code, expected) in [(white, 255), (grey, 128)] {
            let plane = |code: u16, samples| (code << 6).to_le_bytes().repeat(samples);
            let bytes = [plane(code, 64 * 48), plane(512, 64 * 24)].concat();
            let heard = said_of(&caps, bytes, None);
            let [text] = heard.texts()[..] else {
                panic!("{:?}", heard.warnings);
            };
            let colours = text
                .trim_start_matches("mean colour [")
                .trim_end_matches(']');
            for colour in colours.split(", ") {
                let colour = colour.parse::<i32>().unwrap();
                assert!(
                    (colour - expected).abs() < 4,
                    "{colorimetry} {code}: {text}"
                );
            }
        }
    }
}
