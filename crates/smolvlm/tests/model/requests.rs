//! Sessions, prompts, pictures and settings.

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use vlmnarrate_engine::{Clip, Picture, Sampling};
use vlmnarrate_smolvlm::{Checkpoint, Content, Model, Prompt, Source, Span, question};

use super::small::*;

#[test]
fn prompts_whose_parts_do_not_fit_are_refused() {
    each_model(|model| {
        let mut session = model.session();
        let expected = caption(model, &mut session);
        let (prompt, features) = prompt(model);
        let (start, len) = prompt.images[0];
        let count = prompt.ids.len();
        let mut refused = |change: &dyn Fn(&mut Prompt, &mut Vec<Tensor>), says: &str| {
            let (mut prompt, mut features) = (prompt.clone(), features.clone());
            change(&mut prompt, &mut features);
            fails(prefill(model, &mut session, &prompt, &features, 1), &[says]);
        };
        refused(
            &|p, f| (p.ids, p.images, *f) = (vec![], vec![], vec![]),
            "tokens",
        );
        refused(&|p, _| p.images[0].0 = count, "picture");
        refused(&|p, _| p.images[0].0 = usize::MAX, "picture");
        refused(&|p, _| p.images[0].1 = usize::MAX, "picture");
        refused(&|p, _| p.images[0].1 = 0, "picture");
        refused(
            &|p, f| (p.images, *f) = (vec![(start, len); 2], [&f[..], &f[..]].concat()),
            "picture",
        );
        refused(&|_, f| f.clear(), "picture");
        refused(&|_, f| f.push(f[0].clone()), "picture");
        refused(&|p, _| p.images.clear(), "picture");
        // Of other lengths, and of more or fewer tokens.
        refused(&|_, f| f[0] = f[0].narrow(1, 0, 32).unwrap(), "picture");
        refused(
            &|_, f| f[0] = Tensor::cat(&[&f[0], &f[0]], 1).unwrap(),
            "picture",
        );
        refused(
            &|_, f| f[0] = Tensor::cat(&[&f[0], &f[0]], 0).unwrap(),
            "picture",
        );
        refused(&|_, f| f[0] = f[0].flatten_all().unwrap(), "picture");
        assert_eq!(caption(model, &mut session), expected);
    });
}

#[test]
fn a_session_of_another_model_is_refused() {
    each_model(|model| {
        let other = Copy::new().tensor("lm_head.weight", |rows| rows.reverse());
        let other = other.load().unwrap();
        let demo = Checkpoint::open(&Source::Demo).unwrap();
        let demo = Model::load(&demo, &options()[0], &mut |_, _| ControlFlow::Continue(()));
        let demo = demo.unwrap();
        let (prompt, features) = prompt(model);
        let picture = picture(1);
        for other in [&other, &demo] {
            let mut session = other.session();
            // One that holds something and one that doesn't.
            for _ in 0..2 {
                let says = ["session", "another model"];
                fails(describe(model, &mut session, &request(&[&picture])), &says);
                fails(prefill(model, &mut session, &prompt, &features, 2), &says);
                fails(step(model, &mut session, 5), &says);
                let description = describe(other, &mut session, &request(&[&picture])).unwrap();
                let fresh = describe(other, &mut other.session(), &request(&[&picture]));
                assert_eq!(description.text, fresh.unwrap().text);
            }
        }
    });
}

#[test]
fn steps_stay_in_the_room_that_was_reserved() {
    each_model(|model| {
        let mut session = model.session();
        fails(step(model, &mut session, 5), &["session", "room"]);
        let (prompt, features) = prompt(model);
        let first = prefill(model, &mut session, &prompt, &features, 2).unwrap();
        let second = step(model, &mut session, 5).unwrap();
        let third = step(model, &mut session, 6).unwrap();
        for _ in 0..40 {
            fails(step(model, &mut session, 7), &["session", "room"]);
        }
        // Nothing was overwritten, and room of before doesn't count.
        let larger = prefill(model, &mut session, &prompt, &features, 40).unwrap();
        assert_eq!(larger, first);
        assert_eq!(
            prefill(model, &mut session, &prompt, &features, 2).unwrap(),
            first
        );
        assert_eq!(step(model, &mut session, 5).unwrap(), second);
        assert_eq!(step(model, &mut session, 6).unwrap(), third);
        fails(step(model, &mut session, 7), &["session", "room"]);
        prefill(model, &mut session, &prompt, &features, 0).unwrap();
        fails(step(model, &mut session, 7), &["session", "room"]);
        // The model has 8192 positions.
        for room in [8192, 1 << 31, usize::MAX] {
            fails(
                prefill(model, &mut session, &prompt, &features, room),
                &["8192"],
            );
        }
        let long = Prompt {
            ids: vec![5; 9000],
            images: vec![],
        };
        fails(
            prefill(model, &mut session, &long, &[], 0),
            &["9000", "8192"],
        );
        // A caption has room for itself, and for nothing else.
        caption(model, &mut session);
        for _ in 0..=8 {
            let _ = step(model, &mut session, 7);
        }
        fails(step(model, &mut session, 7), &["session", "room"]);
        session.forget();
        caption(model, &mut session);
    });
}

#[test]
fn settings_that_are_none_are_refused() {
    each_model(|model| {
        let mut session = model.session();
        let expected = caption(model, &mut session);
        let picture = picture(1);
        let pictures = [&picture];
        let plain = Sampling::default();
        let set = |property: &str, value: f64| {
            let mut sampling = Sampling {
                temperature: 0.7,
                ..plain
            };
            match property {
                "temperature" => sampling.temperature = value,
                "top-p" => sampling.top_p = value,
                "min-p" => sampling.min_p = value,
                _ => sampling.repetition_penalty = value as f32,
            }
            {
                let mut request = request(&pictures);
                request.sampling = sampling;
                request
            }
        };
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        for (property, values) in [
            ("temperature", &[nan, inf, -inf, -0.1][..]),
            ("top-p", &[nan, inf, -inf, -0.1, 1.1]),
            ("min-p", &[nan, inf, -0.1, 1.1]),
            ("repetition-penalty", &[nan, inf, 0.0, -1.0, 1e-45]),
        ] {
            for value in values {
                fails(
                    describe(model, &mut session, &set(property, *value)),
                    &[property],
                );
            }
        }
        for (property, value) in [
            ("temperature", 1e-300),
            ("temperature", 1e-6),
            ("temperature", 1e300),
            ("top-p", 0.0),
            ("top-p", 1e-300),
            ("min-p", 1.0),
            ("min-p", 1e-300),
        ] {
            let made = describe(model, &mut session, &set(property, value)).unwrap();
            assert!(made.tokens > 0, "{property} {value}");
        }
        // So little randomness is none.
        let cold = describe(model, &mut session, &set("temperature", 1e-300)).unwrap();
        assert_eq!(cold.text, expected);
        let sampling = Sampling {
            temperature: 0.7,
            top_k: usize::MAX,
            seed: u64::MAX,
            ..plain
        };
        let mut many = request(&pictures);
        many.sampling = sampling;
        describe(model, &mut session, &many).unwrap();
        assert_eq!(caption(model, &mut session), expected);
    });
}

#[test]
fn lengths_at_the_ends_of_their_range_are_defined() {
    each_model(|model| {
        let mut session = model.session();
        let expected = caption(model, &mut session);
        let picture = picture(1);
        let pictures = [&picture];
        let plain = request(&pictures);
        let strings = ["".to_owned(), "".to_owned()];
        let choices = ["yes".to_owned(), "no".to_owned()];
        for request in kinds(plain, &choices) {
            let mut none = request;
            none.max_tokens = 0;
            let made = describe(model, &mut session, &none).unwrap();
            if request.choices.is_empty() {
                assert_eq!((&*made.text, made.tokens, made.truncated), ("", 0, true));
            } else {
                assert!(choices.contains(&made.text), "{made:?}");
            }
            let mut empty = request;
            empty.stop_strings = &strings;
            describe(model, &mut session, &empty).unwrap();
        }
        for max_tokens in [8192, 1 << 31, usize::MAX] {
            let mut long = plain;
            long.max_tokens = max_tokens;
            fails(
                describe(model, &mut session, &long),
                &["8192", "of the answer"],
            );
        }
        let words = "word ".repeat(9000);
        let mut long = plain;
        long.prompt = &words;
        fails(describe(model, &mut session, &long), &["8192"]);
        let mut without = plain;
        without.pictures = &[];
        assert_eq!(describe(model, &mut session, &without).unwrap().tokens, 8);
        let mut blank = plain;
        blank.prompt = "";
        blank.system = Some("");
        describe(model, &mut session, &blank).unwrap();
        let clip = Clip {
            times: vec![Default::default(); 2],
            duration: std::time::Duration::MAX,
        };
        let mut uneven = plain;
        uneven.clip = Some(&clip);
        fails(describe(model, &mut session, &uneven), &["picture"]);
        assert_eq!(caption(model, &mut session), expected);
    });
}

#[test]
fn pictures_that_are_none_are_refused() {
    each_model(|model| {
        let mut session = model.session();
        let expected = caption(model, &mut session);
        let of = |width: u32, height: u32, bytes: usize| Picture {
            width,
            height,
            rgb: vec![7; bytes],
        };
        let whole = |width: u32, height: u32| of(width, height, (width * height * 3) as usize);
        for picture in [
            of(0, 0, 0),
            of(0, 64, 0),
            of(64, 64, 0),
            of(64, 64, 64 * 64 * 3 - 1),
            of(64, 64, 64 * 64 * 3 + 1),
            of(u32::MAX, u32::MAX, 12),
        ] {
            for splitting in [false, true] {
                let pictures = [&picture];
                let mut request = request(&pictures);
                request.whole_frames = splitting;
                fails(describe(model, &mut session, &request), &["picture"]);
            }
            fails(model.features(&picture, &mut go_on), &["picture"]);
            fails(model.vision_states(&picture), &["picture"]);
            model.span(&picture, (0, 0));
            // What can't be an error is a picture of the size that was asked for.
            let resized = vlmnarrate_smolvlm::resize(&picture, 3, 2);
            assert_eq!(
                (resized.width, resized.height, resized.rgb.len()),
                (3, 2, 18)
            );
        }
        // Smaller than a patch, not square, too large to attend to.
        for picture in [whole(1, 1), whole(15, 15), whole(64, 48), whole(4096, 4096)] {
            fails(
                describe(model, &mut session, &request(&[&picture])),
                &["picture"],
            );
            fails(model.features(&picture, &mut go_on), &["picture"]);
            fails(model.vision_states(&picture), &["picture"]);
        }
        for (width, grid) in [
            (32, (2, 3)),
            (32, (0, 0)),
            (32, (usize::MAX, 2)),
            (16, (4, 4)),
        ] {
            let x = Tensor::zeros((16, width), candle_core::DType::F32, &Device::Cpu).unwrap();
            if let Some(features) = model.connect(&x, grid) {
                features.unwrap_err();
            }
        }
        assert_eq!(caption(model, &mut session), expected);
    });
}

#[test]
fn places_for_pictures_are_no_more_than_a_model_reads() {
    let model = load(&small(), options()[0]).unwrap();
    let messages = question(None, vec![Content::Image], PROMPT);
    for (grid, tokens) in [
        ((usize::MAX, usize::MAX), 1),
        ((usize::MAX, 0), 1),
        ((0, usize::MAX), usize::MAX),
        ((1 << 20, 1 << 20), 0),
        ((0, 0), usize::MAX),
        ((0, 0), 1 << 24),
        ((0, 0), 0),
    ] {
        let span = Span { grid, tokens };
        fails(model.prompter().encode(&messages, &[span]), &["picture"]);
    }
    let config = model.config();
    assert_eq!(config.tokens_per_picture(usize::MAX), usize::MAX);
    assert_eq!(config.tokens_per_picture(0), 0);
}
