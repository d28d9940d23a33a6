//! Several narrators in one chain.

use crate::common::{Fake, harness_with, ms, narrator};
use gst::prelude::*;
use gstvlmnarrate::{Caption, VlmNarrate};

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";

/// One that says its name.
fn named(name: &str) -> (VlmNarrate, Fake) {
    let fake = Fake::new();
    fake.plan().text = Some(format!("I am {name}."));
    let element = narrator(&fake);
    element.set_property("name", name);
    element.set_property("prompt", format!("Who is {name}?"));
    (element, fake)
}

fn chain(names: &[&str]) -> (gst_check::Harness, Vec<(VlmNarrate, Fake)>) {
    crate::common::init();
    let bin = gst::Bin::new();
    let narrators = Vec::from_iter(names.iter().map(|name| named(name)));
    for (element, _) in &narrators {
        element.set_property_from_str("mode", "recorded");
        bin.add(element).unwrap();
    }
    for pair in narrators.windows(2) {
        pair[0].0.link(&pair[1].0).unwrap();
    }
    let ends = [("sink", narrators.first()), ("src", narrators.last())];
    for (name, narrator) in ends {
        let target = narrator.unwrap().0.static_pad(name).unwrap();
        bin.add_pad(&gst::GhostPad::with_target(&target).unwrap())
            .unwrap();
    }
    let mut harness = gst_check::Harness::with_element(&bin, Some("sink"), Some("src"));
    harness.set_src_caps_str(CAPS);
    harness.play();
    (harness, narrators)
}

#[test]
fn each_caption_is_found_by_the_name_of_its_element() {
    let (mut harness, narrators) = chain(&["a", "b", "c"]);
    for i in 0..12 {
        let frame = crate::common::buffer(64, 0, ms(100 * i));
        let buffer = harness.push_and_pull(frame).unwrap();
        for name in ["a", "b", "c"] {
            let caption = Caption::from_buffer(&buffer, name).unwrap();
            assert_eq!(caption.element, name);
            assert_eq!(caption.prompt, format!("Who is {name}?"));
            assert_eq!(caption.text, format!("I am {name}."));
        }
        assert!(Caption::from_buffer(&buffer, "d").is_err());
        // Who asks for none in particular gets the last.
        assert_eq!(Caption::try_from(buffer.as_ref()).unwrap().element, "c");
    }
    drop(narrators);
}

#[test]
fn a_message_and_a_cue_say_who_made_them() {
    let (element, _fake) = named("a");
    let (mut harness, log) = harness_with(&element, CAPS);
    let text = element.request_pad_simple("text_src").unwrap();
    let (told, hears) = std::sync::mpsc::channel();
    text.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        let _ = told.send(Caption::try_from(info.buffer().unwrap().as_ref()));
        gst::PadProbeReturn::Ok
    });
    harness.push(crate::common::buffer(64, 0, ms(0))).unwrap();
    let said = log.heard().captions.remove(0);
    assert_eq!(said.element, "a");
    assert_eq!(hears.recv().unwrap().unwrap(), said);
}

/// A source may push one buffer over and over.
#[test]
fn a_buffer_that_comes_again_has_one_caption_of_each() {
    for names in [&["a"][..], &["a", "b"]] {
        let (mut harness, narrators) = chain(names);
        let mut buffer = crate::common::buffer(64, 0, ms(0));
        for i in 0..5 {
            buffer.make_mut().set_pts(ms(1000 * i));
            buffer = harness.push_and_pull(buffer).unwrap();
            let metas = buffer.iter_meta::<gst::Meta>().count();
            assert_eq!(metas, 1);
            for name in names {
                let caption = Caption::from_buffer(&buffer, name).unwrap();
                assert_eq!(caption.stamp.timestamp, Some(ms(1000 * i)));
            }
        }
        // What has expired is on no buffer, even if it was before.
        for (left, (narrator, fake)) in narrators.iter().enumerate().rev() {
            fake.plan().fails_with = Some(gstvlmnarrate::engine::ErrorKind::Failed);
            narrator.set_property("expire", ms(1));
            let later = 100_000 * (names.len() - left) as u64;
            buffer.make_mut().set_pts(ms(later));
            buffer = harness.push_and_pull(buffer).unwrap();
            let caption = Caption::from_buffer(&buffer, names[left]);
            assert!(caption.is_err(), "{left} of {names:?}: {caption:#?}");
            assert_eq!(Caption::try_from(buffer.as_ref()).is_ok(), left > 0);
        }
    }
}

/// What an application sees is the overlay, not the narrator in it.
#[cfg(feature = "overlay")]
#[test]
fn a_caption_of_an_overlay_is_said_to_be_of_the_overlay() {
    let fake = Fake::new();
    let pipeline = crate::common::Pipeline::new(
        "videotestsrc num-buffers=2 ! video/x-raw,width=64,height=48
         ! vlmnarrateoverlay name=n ! fakesink",
        &fake,
    );
    let heard = pipeline.run_to_eos();
    assert_eq!(heard.captions[0].element, "n");
}
