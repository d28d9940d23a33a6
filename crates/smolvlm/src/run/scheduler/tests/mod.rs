//! What sequences do to each other: nothing but take time.

mod faults;

use std::{
    ops::ControlFlow,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};

use vlmnarrate_engine::{Event, Picture, Priority, Quantization, Request, Sampling};

use crate::{Checkpoint, Error, LoadOptions, Model, Session, Source};

/// One caption of a caller, and after which text its caller ends it.
#[derive(Debug, Clone)]
struct Wish {
    pictures: Vec<Picture>,
    prompt: String,
    max_tokens: usize,
    sampling: Sampling,
    choices: Vec<String>,
    stop_strings: Vec<String>,
    cancel_after: usize,
}

/// Text of a caption, or how far it came.
#[derive(Debug, PartialEq)]
enum Said {
    Whole(String, usize, Option<f64>),
    Cancelled(Vec<String>),
    Refused(String),
}

/// The demo model, which goes on behind the end, where it isn't sure of anything.
fn model(quantization: Quantization) -> Model {
    let checkpoint = Checkpoint::open(&Source::Demo).unwrap();
    let options = LoadOptions {
        quantization,
        threads: 2,
        ..Default::default()
    };
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let mut model = Model::load(&checkpoint, &options, go_on).unwrap();
    model.stop.clear();
    model
}

fn wishes(model: &Model, caller: u64, count: usize) -> Vec<Wish> {
    let side = model.config().vision_config.image_size as u32;
    let mut rng = fastrand::Rng::with_seed(caller);
    let flat = |rng: &mut fastrand::Rng| {
        let rgb: [u8; 3] = std::array::from_fn(|_| rng.u8(..));
        Picture::new(side, side, rgb.repeat((side * side) as usize)).unwrap()
    };
    let mut shown = vec![flat(&mut rng)];
    let mut wish = || {
        match rng.u8(..4) {
            0 => shown = (0..rng.usize(1..4)).map(|_| flat(&mut rng)).collect(),
            1 => shown[0] = flat(&mut rng),
            _ => (),
        }
        let words = rng.usize(..30);
        Wish {
            pictures: shown.clone(),
            prompt: match rng.u8(..12) {
                // Refused: the place of a picture.
                0 => "<image>".into(),
                1..4 => "word ".repeat(words),
                _ => "Describe this frame in one sentence.".into(),
            },
            max_tokens: rng.usize(..90),
            sampling: Sampling {
                temperature: [0.0, 0.0, 1.3][rng.usize(..3)],
                repetition_penalty: [1.0, 1.0, 1.1][rng.usize(..3)],
                seed: rng.u64(..5),
                ..Sampling::default()
            },
            choices: match rng.u8(..5) {
                0 => ["red", "a red screen", "blue", "nothing"]
                    .map(str::to_owned)
                    .to_vec(),
                _ => Vec::new(),
            },
            stop_strings: match rng.u8(..4) {
                0 => vec![["e", "screen", "zz"][rng.usize(..3)].to_owned()],
                _ => Vec::new(),
            },
            cancel_after: match rng.u8(..4) {
                0 => rng.usize(..30),
                _ => usize::MAX,
            },
        }
    };
    (0..count).map(|_| wish()).collect()
}

fn say(model: &Model, session: &mut Session, wish: &Wish) -> Said {
    let pictures: Vec<_> = wish.pictures.iter().collect();
    let mut request = Request::new(&pictures, &wish.prompt);
    request.max_tokens = wish.max_tokens;
    request.sampling = wish.sampling;
    request.choices = &wish.choices;
    request.stop_strings = &wish.stop_strings;
    let mut texts = Vec::new();
    let observer = &mut |event: Event<'_>| {
        if let Event::Text { text, .. } = event {
            texts.push(text.to_owned());
        }
        match texts.len() > wish.cancel_after {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    match model.describe(session, &request, observer) {
        Ok(made) => Said::Whole(made.text, made.tokens, made.probability),
        Err(Error::Cancelled) => Said::Cancelled(texts),
        Err(error) => Said::Refused(error.to_string()),
    }
}

/// Callers whose captions begin and end whenever they do get, token for token, what each would get alone.
#[test]
fn everybody_gets_what_they_would_get_alone() {
    const CALLERS: u64 = 12;
    for (quantization, captions) in [
        (Quantization::Q8_0, 16),
        (Quantization::Q4_0, 8),
        (Quantization::None, 6),
    ] {
        let model = &model(quantization);
        let all: Vec<_> = (0..CALLERS)
            .map(|caller| wishes(model, caller, captions))
            .collect();
        let alone: Vec<Vec<_>> = all
            .iter()
            .map(|wishes| {
                let say = |wish| say(model, &mut model.session(), wish);
                wishes.iter().map(say).collect()
            })
            .collect();
        let tokens = AtomicUsize::new(0);
        thread::scope(|scope| {
            for (caller, (wishes, alone)) in all.iter().zip(&alone).enumerate() {
                let tokens = &tokens;
                scope.spawn(move || {
                    let mut session = model.session();
                    for (i, (wish, alone)) in wishes.iter().zip(alone).enumerate() {
                        if i % 3 == 0 {
                            let priority = [Priority::Normal, Priority::High][i / 3 % 2];
                            let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
                            model.wait_turn(&mut session, priority, go_on).unwrap();
                        }
                        let said = say(model, &mut session, wish);
                        assert_eq!(&said, alone, "caller {caller}, caption {i}: {wish:?}");
                        tokens.fetch_add(
                            match said {
                                Said::Whole(_, tokens, _) => tokens,
                                Said::Cancelled(texts) => texts.len(),
                                Said::Refused(_) => 0,
                            },
                            Relaxed,
                        );
                    }
                });
            }
        });
        let tokens = tokens.into_inner();
        assert!(tokens > 150 * captions, "{tokens} tokens");
        let kinds = alone.iter().flatten().fold([0; 3], |mut kinds, said| {
            kinds[match said {
                Said::Whole(..) => 0,
                Said::Cancelled(_) => 1,
                Said::Refused(_) => 2,
            }] += 1;
            kinds
        });
        println!("{quantization:?}: {tokens} tokens; whole, cancelled, refused: {kinds:?}");
        assert!(kinds.iter().all(|kind| *kind > 2), "{kinds:?}");
    }
}
