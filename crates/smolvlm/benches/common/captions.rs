//! Captions of noise, for those who time them.

use std::{
    error::Error,
    io,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{Answer, Picture, Request};
use vlmnarrate_smolvlm::{Checkpoint, LoadOptions, Model, Session, Source};

/// What stands behind the program's name.
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

/// A caption for each line that is read, of a scene that is `cut`, `slow` or `static`. `forget` makes the session know
/// nothing of the last caption; `tell` hears of each caption and what it took.
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

/// One byte in a hundred is another.
fn change_slowly(rng: &mut fastrand::Rng, picture: &mut Picture) {
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
