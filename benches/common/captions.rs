//! Captions of noise, for those who time them.

use std::ops::ControlFlow;

use gstvlmnarrate::smolvlm::{Description, Model, Picture, Request, Sampling, Session};

pub fn noise(rng: &mut fastrand::Rng, side: u32) -> Picture {
    let rgb = (0..3 * side * side).map(|_| rng.u8(..)).collect();
    Picture::new(side, side, rgb).expect("a whole picture")
}

/// One byte in a hundred is another.
pub fn change_slowly(rng: &mut fastrand::Rng, picture: &mut Picture) {
    for _ in 0..picture.rgb.len() / 100 {
        let at = rng.usize(..picture.rgb.len());
        picture.rgb[at] = picture.rgb[at].wrapping_add(1);
    }
}

/// A caption of exactly so many tokens, or it isn't what was to be timed.
pub fn describe(
    model: &Model,
    session: &mut Session,
    picture: &Picture,
    tokens: usize,
) -> Result<Description, String> {
    let request = Request {
        pictures: &[picture],
        clip: None,
        splitting: false,
        system: None,
        prompt: "Describe this frame in one sentence.",
        max_tokens: tokens,
        sampling: Sampling::default(),
        stop_strings: &[],
        choices: &[],
    };
    let made = model.describe(session, &request, &mut |_| ControlFlow::Continue(()));
    let made = made.map_err(|error| error.to_string())?;
    match made.tokens == tokens {
        true => Ok(made),
        false => Err(format!("{} tokens", made.tokens)),
    }
}
