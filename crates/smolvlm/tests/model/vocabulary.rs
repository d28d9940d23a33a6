//! Tokens and logits.

use std::{ops::ControlFlow, thread};

use serde_json::{Value, json};
use vlmnarrate_engine::{Answer, DType, ErrorKind, Event, Remedy};
use vlmnarrate_smolvlm::{Checkpoint, Error, Source, question};

use super::small::*;

#[test]
fn tokens_beyond_the_vocabulary_are_refused() {
    each_model(|model| {
        let mut session = model.session();
        let expected = caption(model, &mut session);
        let (prompt, features) = prompt(model);
        for token in [VOCABULARY, 1 << 20, i32::MAX as u32, u32::MAX - 4, u32::MAX] {
            let says = [&*token.to_string(), "500"];
            prefill(model, &mut session, &prompt, &features, 2).unwrap();
            fails(step(model, &mut session, token), &says);
            step(model, &mut session, VOCABULARY - 1).unwrap();
            for place in [0, prompt.ids.len() - 1] {
                let mut prompt = prompt.clone();
                prompt.ids[place] = token;
                fails(prefill(model, &mut session, &prompt, &features, 2), &says);
            }
        }
        assert_eq!(caption(model, &mut session), expected);
    });
}

/// The embedding of `~` is NaN: a request with `~` fails, others succeed.
#[test]
fn numbers_that_are_not_finite_end_one_caption() {
    let asked = "What ~ is it?";
    let tilde = {
        let model = small_model();
        let ids = |text: &str| {
            let messages = question(None, vec![], text);
            model.prompter().encode(&messages, &[]).unwrap().ids
        };
        let without = ids(PROMPT);
        let mut new = ids(asked).into_iter().filter(|id| !without.contains(id));
        new.next().unwrap() as usize
    };
    let copy = Copy::new().tensor("model.text_model.embed_tokens.weight", |rows| {
        rows[tilde].fill(f32::NAN);
    });
    let picture = picture(1);
    let pictures = [&picture];
    let plain = request(&pictures);
    let mut broken = plain;
    broken.prompt = asked;
    let choices = ["yes", "no", "not"].map(str::to_owned);
    let says = ["not finite"];
    for options in options() {
        let model = &load(copy.0.path(), options).unwrap();
        let expected = caption(model, &mut model.session());
        let mut session = model.session();
        for broken in kinds(broken, &choices) {
            let error = describe(model, &mut session, &broken);
            assert!(matches!(error, Err(Error::NotFinite)), "{error:?}");
            fails(error, &says);
            assert_eq!(caption(model, &mut session), expected);
        }
        thread::scope(|scope| {
            for caller in 0..4 {
                let expected = &expected;
                scope.spawn(move || {
                    let mut session = model.session();
                    for _ in 0..3 {
                        match caller % 2 {
                            0 => fails(describe(model, &mut session, &broken), &says),
                            _ => assert_eq!(&caption(model, &mut session), expected),
                        }
                    }
                });
            }
        });
        // In the middle of a caption.
        let (prompt, features) = prompt(model);
        prefill(model, &mut session, &prompt, &features, 1).unwrap();
        let logits = step(model, &mut session, tilde as u32).unwrap();
        assert!(logits.iter().all(|logit| logit.is_nan()));
    }
}

/// One token's logit is NaN, or all are infinite.
#[test]
fn scores_that_are_not_finite_are_no_choice() {
    let head = "lm_head.weight";
    let one = |value| Copy::new().tensor(head, |rows| rows[VOCABULARY as usize - 1].fill(value));
    // The first of the states alone decides, by its sign.
    let all = |sign: f32| {
        Copy::new()
            .tensor(head, |rows| {
                for row in rows {
                    row.fill(0.0);
                    row[0] = f32::INFINITY;
                }
            })
            .tensor("model.text_model.norm.weight", |rows| rows[0][0] = sign)
    };
    let picture = picture(1);
    let pictures = [&picture];
    let choices = ["yes", "no", "not"].map(str::to_owned);
    for copy in [one(f32::NAN), one(f32::INFINITY), all(1.0), all(-1.0)] {
        // Quantized blocks can't hold NaN.
        let model = copy.load().unwrap();
        for request in kinds(request(&pictures), &choices) {
            let made = describe(&model, &mut model.session(), &request);
            fails(made, &["not finite"]);
        }
    }
}

#[test]
fn what_f16_can_not_hold_is_said_with_the_remedy() {
    // More than 65504, the largest f16, which bf16 and f32 represent.
    let copy = Copy::new().tensor("model.text_model.layers.0.mlp.down_proj.weight", |rows| {
        rows.iter_mut().flatten().for_each(|x| *x *= 1e9);
    });
    let on = |dtype| {
        let mut options = options()[0];
        options.dtype = dtype;
        let model = load(copy.0.path(), options).unwrap();
        describe(&model, &mut model.session(), &request(&[&picture(1)]))
    };
    let error = on(DType::F16).unwrap_err();
    assert_eq!(error.remedy(), Some(Remedy::WiderDType));
    fails::<Answer>(Err(error), &["not finite"]);
    for dtype in [DType::Bf16, DType::F32] {
        assert_eq!(on(dtype).unwrap().tokens, 8);
    }
}

#[test]
fn a_vocabulary_that_does_not_fit_is_an_error_at_load() {
    let tokenizer = |change: &dyn Fn(&mut Value)| {
        let copy = Copy::new().json("tokenizer.json", change);
        (copy, "tokenizer.json", ["500", "vocab_size"])
    };
    let added = |id: u32| {
        tokenizer(&move |json| {
            let mut token = json["added_tokens"][0].clone();
            (token["content"], token["id"]) = ("<new>".into(), id.into());
            json["added_tokens"].as_array_mut().unwrap().push(token);
        })
    };
    let template = tokenizer(&|json| {
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"a": {"id": "a", "ids": [4_000_000], "tokens": ["a"]}},
        });
    });
    let config = |size: u32| {
        let copy = Copy::new().json("config.json", |json| {
            json["text_config"]["vocab_size"] = size.into();
        });
        let file = if size < VOCABULARY {
            "generation_config.json"
        } else {
            "model.safetensors"
        };
        (
            copy,
            file,
            [if size < VOCABULARY {
                "vocab_size"
            } else {
                "embed_tokens"
            }; 2],
        )
    };
    let rows = |name: &str, count: usize| {
        let copy = Copy::new().tensor(name, |rows| {
            rows.resize(count, rows[0].clone());
        });
        (copy, "model.safetensors", ["shape mismatch"; 2])
    };
    let cases = [
        added(VOCABULARY),
        template,
        config(VOCABULARY - 1),
        config(VOCABULARY + 1),
        rows("lm_head.weight", 499),
        rows("lm_head.weight", 501),
        rows("model.text_model.embed_tokens.weight", 499),
        rows("model.text_model.embed_tokens.weight", 501),
    ];
    for (copy, file, says) in cases {
        let error = copy.load();
        assert_eq!(error.as_ref().unwrap_err().kind(), ErrorKind::OpenRead);
        fails(error, &[&copy.path(file), says[0], says[1]]);
    }
    // Fewer tokens than rows are usual.
    let fewer = Copy::new()
        .json("config.json", |json| {
            json["text_config"]["vocab_size"] = 512.into()
        })
        .tensor("lm_head.weight", |rows| rows.resize(512, rows[0].clone()))
        .tensor("model.text_model.embed_tokens.weight", |rows| {
            rows.resize(512, rows[0].clone());
        });
    let fewer = fewer.load().unwrap();
    caption(&fewer, &mut fewer.session());
}

#[test]
fn tokens_that_end_a_caption_must_be_the_models() {
    for ids in [
        json!(500),
        json!([2, 500]),
        json!([2, u32::MAX]),
        json!(1e20),
        json!(-1),
        json!("x"),
    ] {
        let copy = Copy::new().eos(ids);
        let error = Checkpoint::open(&Source::Folder(copy.0.path().into()));
        assert_eq!(error.as_ref().unwrap_err().kind(), ErrorKind::OpenRead);
        fails(
            error,
            &[&copy.path("generation_config.json"), "eos_token_id"],
        );
    }
    for ids in [json!(null), json!([]), json!(2), json!([0, 499])] {
        Copy::new().eos(ids).load().unwrap();
    }
}

/// The fifteenth of twenty ends the caption.
#[test]
fn any_number_of_tokens_can_end_a_caption() {
    for options in options() {
        let said = greedy(&load(&small(), options).unwrap(), 8);
        let place = (2..8).find(|i| !said[..*i].contains(&said[*i])).unwrap();
        let others = (0..VOCABULARY).filter(|id| !said.contains(id));
        let mut eos: Vec<u32> = others.take(19).collect();
        eos.insert(14, said[place]);
        let model = load(Copy::new().eos(json!(eos)).0.path(), options).unwrap();
        let picture = picture(1);
        let mut session = model.session();
        // Again, with the whole caption as draft.
        for _ in 0..2 {
            let made = describe(&model, &mut session, &request(&[&picture])).unwrap();
            assert_eq!((made.tokens, made.truncated), (place, false));
        }
    }
}

/// A partial caption counts its tokens as a caption that ends there.
#[test]
fn partial_captions_count_tokens() {
    each_model(|model| {
        let mut several = false;
        let picture = picture(1);
        let pictures = [&picture];
        let mut plain = request(&pictures);
        plain.max_tokens = 20;
        let choices = ["yes it is", "yes it isn't", "no"].map(str::to_owned);
        for request in kinds(plain, &choices) {
            let mut session = model.session();
            // Decoded one by one, then as accepted drafts.
            for _ in 0..2 {
                let mut partial: Vec<(String, usize)> = Vec::new();
                let listen = &mut |event: Event<'_>| {
                    if let Event::Text { text, tokens } = event {
                        partial.push((text.to_owned(), tokens));
                    }
                    ControlFlow::Continue(())
                };
                let made = model.describe(&mut session, &request, listen).unwrap();
                let counts: Vec<_> = partial.iter().map(|(_, tokens)| *tokens).collect();
                assert!(counts.is_sorted_by(|a, b| a < b), "{counts:?}");
                assert!(
                    counts.last().unwrap() <= &made.tokens,
                    "{counts:?} {made:?}"
                );
                if !request.choices.is_empty() {
                    continue;
                }
                // A character may take several tokens: there are more tokens than texts.
                several |= counts.len() < made.tokens;
                for (text, tokens) in &partial {
                    let mut short = request;
                    short.max_tokens = *tokens;
                    let short = describe(model, &mut model.session(), &short).unwrap();
                    assert_eq!((&*short.text, short.tokens), (text.trim(), *tokens));
                }
            }
        }
        assert!(several);
    });
}
