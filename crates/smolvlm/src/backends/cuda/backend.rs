//! The network as a [`Backend`]: work is put together into jobs for the GPU's thread.

use std::{any::Any, ops::ControlFlow};

use candle_core::{Device, Tensor};
use vlmnarrate_engine::{Observer, Picture};

use super::{GpuJob, Network, Outcome, Slot, StagedPicture};
use crate::{
    backends::{
        Backend, Greedy, ImageInput, Needs, Next, SequenceSlot, StartJob, Started, layer_done, own,
        request_size::RequestSize,
    },
    error::Result,
    text::prompt::Prompt,
};

impl SequenceSlot for Slot {
    fn room(&self) -> usize {
        self.room()
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
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

fn go_on(_: &[u32]) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

impl Network {
    /// Stages the pictures that are to be encoded.
    fn stage(&self, slot: &mut Slot, images: &[ImageInput<'_>]) -> Vec<StagedPicture> {
        let (mut staged, mut features) = (0, 0);
        let mut pictures = Vec::new();
        for image in images {
            match image {
                ImageInput::CachedFeatures { rows } => features += rows,
                ImageInput::Pixels(picture) => {
                    let side = picture.width as usize;
                    slot.stage(staged, &picture.rgb);
                    staged += picture.rgb.len();
                    pictures.push(StagedPicture { side, features });
                    features += self.config.tokens_per_picture(side);
                }
            }
        }
        pictures
    }

    /// Encodes staged pictures and runs a prompt, from which `job` goes on. Until that is done the slot holds nothing.
    fn run_prompt(
        &self,
        slot: &mut Slot,
        prompt: &Prompt,
        job: GpuJob,
        on_tokens: &mut dyn FnMut(&[u32]) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        let rows = rows(prompt);
        let (held, end) = (slot.len(), rows.len() - 1);
        let job = GpuJob {
            prompt: rows[held..end].to_vec(),
            past: held,
            token: prompt.ids[end],
            ..job
        };
        slot.set_len(0);
        let outcome = self.run_job(slot, job, on_tokens)?;
        slot.set_len(prompt.ids.len());
        Ok(outcome)
    }

    /// The same for the logits that choose the next token.
    fn run_for_logits(
        &self,
        slot: &mut Slot,
        prompt: &Prompt,
        pictures: Vec<StagedPicture>,
    ) -> Result<(Tensor, Outcome)> {
        let job = GpuJob {
            pictures,
            max_tokens: 1,
            logits: true,
            ..GpuJob::default()
        };
        let outcome = self.run_prompt(slot, prompt, job, &mut go_on)?;
        let logits = Tensor::new(outcome.logits.as_slice(), &Device::Cpu)?;
        Ok((logits, outcome))
    }
}

impl Backend for Network {
    fn new_slot(&self) -> Box<dyn SequenceSlot> {
        Box::new(self.slot())
    }

    fn is_batch_invariant(&self) -> bool {
        true
    }

    fn memory(&self, _size: &RequestSize) -> Option<u64> {
        None
    }

    fn keeps_features(&self, slot: &dyn SequenceSlot, rows: usize) -> bool {
        let slot = (slot as &dyn Any).downcast_ref::<Slot>();
        slot.is_some_and(|slot| slot.features() >= rows)
    }

    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()> {
        Ok(own::<Slot>(slot)?.reserve(
            needs.capacity,
            needs.max_tokens.max(1),
            needs.feature_rows,
            needs.picture_bytes,
        )?)
    }

    fn encode(
        &self,
        slot: &mut dyn SequenceSlot,
        images: &[ImageInput<'_>],
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        layer_done(observer)?;
        let slot = own::<Slot>(slot)?;
        let job = GpuJob {
            pictures: self.stage(slot, images),
            ..GpuJob::default()
        };
        self.run_job(slot, job, &mut go_on)?;
        Ok(())
    }

    fn prefill(
        &self,
        slot: &mut dyn SequenceSlot,
        prompt: &Prompt,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        layer_done(observer)?;
        let (logits, _) = self.run_for_logits(own::<Slot>(slot)?, prompt, Vec::new())?;
        Ok(logits)
    }

    fn decode(
        &self,
        slot: &mut dyn SequenceSlot,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>> {
        let slot = own::<Slot>(slot)?;
        let mut logits = Vec::new();
        for tokens in tokens.chunks(self.max_rows()) {
            layer_done(observer)?;
            let [token, draft @ ..] = tokens else { break };
            let job = GpuJob {
                past: slot.len(),
                token: *token,
                max_tokens: tokens.len(),
                draft_tokens: draft.to_vec(),
                logits: true,
                ..GpuJob::default()
            };
            let len = slot.len() + tokens.len();
            let outcome = self.run_job(slot, job, &mut go_on)?;
            slot.set_len(len);
            for row in outcome.logits.chunks_exact(self.vocabulary()) {
                logits.push(Tensor::new(row, &Device::Cpu)?);
            }
        }
        Ok(logits)
    }

    /// Pictures, prompt and, of the likeliest tokens, the whole answer in one job.
    fn start(
        &self,
        slot: &mut dyn SequenceSlot,
        job: StartJob<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Started> {
        layer_done(observer)?;
        let StartJob {
            images,
            prompt,
            greedy,
        } = job;
        let slot = own::<Slot>(slot)?;
        let pictures = self.stage(slot, images);
        let (next, outcome) = match greedy {
            None => {
                let (logits, outcome) = self.run_for_logits(slot, prompt, pictures)?;
                (Next::Logits(logits), outcome)
            }
            Some(Greedy {
                max_tokens,
                draft,
                on_tokens,
            }) => {
                let job = GpuJob {
                    pictures,
                    max_tokens,
                    draft_tokens: draft.to_vec(),
                    ..GpuJob::default()
                };
                let mut on_tokens = |tokens: &[u32]| on_tokens(tokens, observer);
                let mut outcome = self.run_prompt(slot, prompt, job, &mut on_tokens)?;
                let next = Next::Generated {
                    tokens: std::mem::take(&mut outcome.generated),
                    stopped: outcome.stopped,
                };
                (next, outcome)
            }
        };
        Ok(Started {
            next,
            vision: outcome.vision,
            prefill: outcome.prefill,
            decode: outcome.decode,
        })
    }

    fn set_features(&self, slot: &mut dyn SequenceSlot, features: &[Tensor]) -> Result<()> {
        let mut values = Vec::new();
        for features in features {
            values.extend(features.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(own::<Slot>(slot)?.set_features(&values)?)
    }

    fn vision_states(&self, picture: &Picture) -> Result<(Vec<Tensor>, Tensor)> {
        let mut slot = self.slot();
        let tokens = self.config.tokens_per_picture(picture.width as usize);
        slot.reserve(0, 1, tokens, picture.rgb.len())?;
        let job = GpuJob {
            pictures: self.stage(&mut slot, &[ImageInput::Pixels(picture)]),
            states: true,
            ..GpuJob::default()
        };
        let mut states = self.run_job(&mut slot, job, &mut go_on)?.states;
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
