//! Timed captions of noise.

use std::{
    error::Error,
    io,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{Answer, Picture, Request};
use vlmnarrate_smolvlm::{Checkpoint, LoadOptions, Model, Session, Source};

/// The arguments of the program.
pub fn arguments() -> Vec<String> {
    let arguments = std::env::args().skip(1);
    arguments.filter(|a| a != "--bench").collect()
}

pub fn load(folder: &str, options: &LoadOptions) -> Result<Model, Box<dyn Error>> {
    let checkpoint = Checkpoint::open(&Source::Folder(folder.into()))?;
    let model = Model::load(&checkpoint, options, &mut |_, _| ControlFlow::Continue(()))?;
    Ok(model)
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Makes a caption for each line of standard input, of a scene that is `cut`, `slow` or `static`. `forget` resets the
/// session; `tell` is called with each caption and its times.
pub fn one_by_one(
    model: &Model,
    side: u32,
    (scene, tokens): (&str, usize),
    mut forget: impl FnMut(&mut Session),
    mut tell: impl FnMut(&Answer, Duration),
) -> Result<(), Box<dyn Error>> {
    let mut session = model.session();
    let mut rng = fastrand::Rng::with_seed(0);
    let mut changes = rng.fork();
    let mut picture = noise(&mut rng, side);
    println!(r#"{{"ready": true}}"#);
    for line in io::stdin().lines() {
        line?;
        match scene {
            "cut" => {
                picture = noise(&mut rng, side);
                forget(&mut session);
            }
            "slow" => change_slowly(&mut changes, &mut picture),
            "static" => (),
            other => return Err(other.into()),
        }
        let start = Instant::now();
        let made = describe(model, &mut session, &picture, tokens)?;
        tell(&made, start.elapsed());
    }
    Ok(())
}

pub fn noise(rng: &mut fastrand::Rng, side: u32) -> Picture {
    let rgb = (0..3 * side * side).map(|_| rng.u8(..)).collect();
    Picture::new(side, side, rgb).expect("a whole picture")
}

/// Changes one byte in a hundred.
fn change_slowly(rng: &mut fastrand::Rng, picture: &mut Picture) {
    for _ in 0..picture.rgb.len() / 100 {
        let at = rng.usize(..picture.rgb.len());
        picture.rgb[at] = picture.rgb[at].wrapping_add(1);
    }
}

/// Makes a caption of exactly `tokens` tokens. Errors for another number, which would be another measurement.
pub fn describe(
    model: &Model,
    session: &mut Session,
    picture: &Picture,
    tokens: usize,
) -> Result<Answer, String> {
    let pictures = [picture];
    let mut request = Request::new(&pictures, "Describe this frame in one sentence.");
    request.max_tokens = tokens;
    let made = model.describe(session, &request, &mut |_| ControlFlow::Continue(()));
    let made = made.map_err(|error| error.to_string())?;
    match made.tokens == tokens {
        true => Ok(made),
        false => Err(format!("{} tokens", made.tokens)),
    }
}
