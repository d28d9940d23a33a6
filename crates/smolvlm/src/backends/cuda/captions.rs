//! Captions of a model on the GPU.

use std::{ops::ControlFlow, time::Instant};

use candle_core::{Device, Tensor};

use crate::{
    backends::{
        cuda::{Ask, Network, Seat, Shown},
        layer_done,
        network::Cache,
    },
    error::Result,
    run::{decode::Decoded, generate::Asked, model::Model, sampling::is_greedy, session::Session},
    text::prompt::Prompt,
};
use vlmnarrate_engine::{Observer, Picture, Timings};

impl Network {
    /// Runs tokens behind those in the cache and returns the logits behind each.
    pub(crate) fn run(
        &self,
        seat: &mut Seat,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>> {
        let mut logits = Vec::new();
        for tokens in tokens.chunks(self.most_rows()) {
            layer_done(observer)?;
            let [token, guesses @ ..] = tokens else { break };
            let ask = Ask {
                past: seat.len(),
                token: *token,
                most: tokens.len(),
                guesses: guesses.to_vec(),
                scores: true,
                ..Ask::default()
            };
            let len = seat.len() + tokens.len();
            let outcome = self.ask(seat, ask, &mut |_| ControlFlow::Continue(()))?;
            seat.set_len(len);
            let rows = outcome.scores.chunks_exact(self.vocabulary());
            for row in rows {
                logits.push(Tensor::new(row, &Device::Cpu)?);
            }
        }
        Ok(logits)
    }
}

fn seat(session: &mut Session) -> &mut Seat {
    match &mut session.cache {
        Cache::Cuda(seat) => seat,
        Cache::Tensors(_) => unreachable!("a cache of another network"),
    }
}

/// A prompt's tokens, those of pictures as rows of features, below zero.
fn rows(prompt: &Prompt) -> Vec<i32> {
    let mut rows: Vec<i32> = prompt.ids.iter().map(|id| *id as i32).collect();
    let mut feature = 0;
    for &(start, len) in &prompt.images {
        for row in &mut rows[start..start + len] {
            feature += 1;
            *row = -feature;
        }
    }
    rows
}

impl Model {
    pub(crate) fn run_cuda(
        &self,
        network: &Network,
        session: &mut Session,
        asked: &Asked<'_>,
        timings: &mut Timings,
        observer: &mut Observer<'_>,
    ) -> Result<Decoded> {
        let start = Instant::now();
        layer_done(observer)?;
        let Asked {
            request,
            prompt,
            squares,
            room,
            last,
            ..
        } = *asked;
        let seat = seat(session);
        let features: usize = prompt.images.iter().map(|(_, len)| len).sum();
        let knows = seat.features() >= features;
        let is_new =
            |i: &usize| !knows || !last.is_some_and(|last| last.has(*i, squares[*i], prompt));
        let new: Vec<usize> = (0..squares.len()).filter(is_new).collect();
        let same = new.first().copied().unwrap_or(squares.len());
        let in_common = last.map_or(0, |last| last.in_common(prompt, same));
        // The last is run in any case, for what follows it.
        seat.truncate(in_common.min(prompt.ids.len() - 1));
        let bytes = new.iter().map(|i| squares[*i].rgb.len()).sum();
        seat.reserve(
            self.capacity(prompt.ids.len(), room)?,
            room,
            features,
            bytes,
        )?;
        let held = seat.len();

        let mut pictures = Vec::new();
        let mut staged = 0;
        for i in new {
            let square = squares[i];
            seat.stage(staged, &square.rgb);
            staged += square.rgb.len();
            pictures.push(Shown {
                side: square.width as usize,
                features: prompt.images[..i].iter().map(|(_, len)| len).sum(),
            });
        }
        let rows = rows(prompt);
        let end = rows.len() - 1;
        let sampling = &request.sampling;
        let is_greedy =
            is_greedy(sampling) && sampling.repetition_penalty == 1.0 && request.choices.is_empty();
        let mut ask = Ask {
            pictures,
            prompt: rows[held..end].to_vec(),
            past: held,
            token: prompt.ids[end],
            most: room,
            ..Ask::default()
        };
        seat.set_len(0);
        timings.preprocess += start.elapsed();
        if !is_greedy {
            (ask.most, ask.scores) = (1, true);
            let outcome = network.ask(seat, ask, &mut |_| ControlFlow::Continue(()))?;
            seat.set_len(prompt.ids.len());
            (timings.vision, timings.prefill) = (outcome.vision, outcome.prefill);
            let decoding = Instant::now();
            let logits = Tensor::new(outcome.scores, &Device::Cpu)?;
            let is_same = in_common == prompt.ids.len();
            let decoded = self.continue_from(session, asked, logits, is_same, observer);
            timings.decode = outcome.decode + decoding.elapsed();
            return decoded;
        }
        ask.guesses = last.map_or(Vec::new(), |last| last.ids.clone());
        let (mut reported, mut ended) = (0, None);
        let outcome = network.ask(seat, ask, &mut |ids| {
            while reported < ids.len() && ended.is_none() {
                reported += 1;
                match self.report(&ids[..reported], request.stop_strings, observer) {
                    Ok(false) => (),
                    other => ended = Some(other),
                }
            }
            match ended {
                None => ControlFlow::Continue(()),
                Some(_) => ControlFlow::Break(()),
            }
        })?;
        let by_string = ended.transpose()?.is_some();
        seat.set_len(prompt.ids.len());
        (timings.vision, timings.prefill, timings.decode) =
            (outcome.vision, outcome.prefill, outcome.decode);
        let mut ids = outcome.said;
        if by_string {
            ids.truncate(reported);
        }
        Ok(Decoded {
            ids,
            stopped: by_string || outcome.stopped,
            probability: 1.0,
        })
    }

    /// Runs a prompt with features that were made before.
    pub(crate) fn prefill_cuda(
        &self,
        network: &Network,
        session: &mut Session,
        prompt: &Prompt,
        (features, room): (&[Tensor], usize),
    ) -> Result<Tensor> {
        let seat = seat(session);
        let mut values = Vec::new();
        for features in features {
            values.extend(features.flatten_all()?.to_vec1::<f32>()?);
        }
        let count = prompt.images.iter().map(|(_, len)| len).sum();
        seat.set_len(0);
        seat.reserve(
            self.capacity(prompt.ids.len(), room)?,
            room.max(1),
            count,
            0,
        )?;
        seat.set_features(&values)?;
        let rows = rows(prompt);
        let end = rows.len() - 1;
        let ask = Ask {
            prompt: rows[..end].to_vec(),
            token: prompt.ids[end],
            most: 1,
            scores: true,
            ..Ask::default()
        };
        let outcome = network.ask(seat, ask, &mut |_| ControlFlow::Continue(()))?;
        seat.set_len(prompt.ids.len());
        Ok(Tensor::new(outcome.scores, &Device::Cpu)?)
    }

    /// States of the encoder, and the features of a picture.
    pub(crate) fn states_cuda(
        &self,
        network: &Network,
        picture: &Picture,
    ) -> Result<(Vec<Tensor>, Tensor)> {
        let mut seat = network.seat();
        let tokens = self.config.tokens_per_picture(picture.width as usize);
        seat.reserve(0, 1, tokens, picture.rgb.len())?;
        seat.stage(0, &picture.rgb);
        let ask = Ask {
            pictures: vec![Shown {
                side: picture.width as usize,
                features: 0,
            }],
            states: true,
            ..Ask::default()
        };
        let mut states = network
            .ask(&mut seat, ask, &mut |_| ControlFlow::Continue(()))?
            .states;
        let tensor = |values: Vec<f32>, width: usize| {
            let rows = values.len() / width;
            Tensor::from_vec(values, (rows, width), &Device::Cpu)
        };
        let features = tensor(
            states.pop().unwrap_or_default(),
            self.config.text_config.hidden_size,
        )?;
        let width = self.config.vision_config.hidden_size;
        let states = states.into_iter().map(|values| tensor(values, width));
        Ok((states.collect::<candle_core::Result<_>>()?, features))
    }
}
