//! The network as a [`Backend`]: rows are put together into jobs for the GPU.

use candle_core::{Device, Tensor};
use vlmnarrate_engine::{Observer, Picture};

use super::{
    MAX_SEQUENCES, Network, Slot,
    engine::{GpuJob, Outcome, StagedPicture},
};
use crate::{
    backends::{
        Backend, BatchLimits, EncodeJob, EncodePicture, Needs, SequenceSlot, StepInput, StepJob,
        StepOutput, Stepped, layer_done, own,
        request_size::{RequestMemory, RequestSize},
    },
    error::{Error, Result},
    text::prompt::Prompt,
};

impl SequenceSlot for Slot {
    fn len(&self) -> usize {
        self.len()
    }

    fn room(&self) -> usize {
        self.room()
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }

    fn kept_features(&self, needs: &Needs) -> usize {
        match self.features() >= needs.feature_rows {
            true => needs.pictures,
            false => 0,
        }
    }

    fn capacity(&self) -> usize {
        self.capacity()
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

/// Stages pictures in their slot.
fn stage<'a>(
    slot: &'a mut Slot,
    pictures: &[EncodePicture<'_>],
) -> Result<impl Iterator<Item = StagedPicture<'a>>> {
    let (mut staged, mut places) = (0, Vec::new());
    for picture in pictures {
        slot.stage(staged, &picture.picture.rgb);
        let side = picture.picture.width as usize;
        places.push((staged, side, picture.first_row));
        staged += picture.picture.rgb.len();
    }
    let slot = slot.buffers()?;
    let places = places.into_iter();
    Ok(places.map(move |(at, side, features)| StagedPicture {
        slot,
        at,
        side,
        features,
    }))
}

impl Network {
    /// Rows of one sequence as a job, and the tokens that its slot then holds beside those that are generated.
    fn job<'a>(&self, job: &'a mut StepJob<'_>) -> Result<(GpuJob<'a>, usize)> {
        let slot = own::<Slot>(job.slot)?;
        let past = slot.len();
        let slot = slot.buffers()?;
        let greedy = job.greedy.as_mut();
        let (prompt, token, drafts, held) = match job.input {
            StepInput::Prompt(prompt, end) => {
                let is_whole = end == prompt.ids.len();
                // The last token of a prompt is the one to go on from.
                let end = end - usize::from(is_whole);
                let rows = rows(prompt)[past..end].to_vec();
                (rows, prompt.ids[end], &[][..], end)
            }
            StepInput::Tokens(tokens) => {
                // The kernel that decodes has few rows; of those before nobody needs logits.
                let first = tokens.len().saturating_sub(self.max_rows());
                let rows = tokens[..first].iter().map(|token| *token as i32);
                let [token, drafts @ ..] = &tokens[first..] else {
                    return Err(Error::Session("there is nothing to run".into()));
                };
                (rows.collect(), *token, drafts, past + first)
            }
        };
        let wants = job.input.logits();
        let mut job = GpuJob {
            slot,
            prompt,
            past,
            token,
            max_tokens: wants,
            draft_tokens: drafts.to_vec(),
            logits: wants > 0,
            on_tokens: None,
        };
        if let Some(greedy) = greedy {
            job.max_tokens = greedy.max_tokens;
            job.draft_tokens = greedy.draft[..greedy.draft.len().min(greedy.max_tokens)].to_vec();
            job.logits = false;
            job.on_tokens = Some(&mut *greedy.on_tokens);
        }
        Ok((job, held))
    }

    /// What came of a job, and the tokens that its slot holds.
    fn output(&self, outcome: Outcome, held: usize) -> Result<(StepOutput, usize)> {
        let Outcome {
            generated,
            stopped,
            not_finite,
            logits,
        } = outcome;
        if not_finite {
            return Err(Error::NotFinite);
        }
        if logits.is_empty() && (stopped || !generated.is_empty()) {
            let held = held + generated.len();
            let tokens = generated;
            return Ok((StepOutput::Generated { tokens, stopped }, held));
        }
        let logits = logits.chunks_exact(self.vocabulary);
        let logits = logits
            .map(|row| Tensor::new(row, &Device::Cpu))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let held = held + logits.len();
        Ok((StepOutput::Logits(logits), held))
    }
}

impl Backend for Network {
    fn new_slot(&self) -> Box<dyn SequenceSlot> {
        Box::new(self.slot())
    }

    fn is_batch_invariant(&self) -> bool {
        true
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits {
            sequences: MAX_SEQUENCES,
            pictures: MAX_SEQUENCES,
            overlaps: false,
            rows: 2048,
            answer_rows: self.max_rows(),
        }
    }

    fn memory(&self, _size: &RequestSize) -> Option<RequestMemory> {
        None
    }

    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()> {
        Ok(own::<Slot>(slot)?.reserve(
            needs.capacity,
            needs.max_tokens.max(1),
            needs.feature_rows,
            needs.picture_bytes,
        )?)
    }

    fn encode(&self, batch: &mut [EncodeJob<'_>], observer: &mut Observer<'_>) -> Result<()> {
        layer_done(observer)?;
        let mut pictures = Vec::new();
        for job in batch {
            pictures.extend(stage(own::<Slot>(job.slot)?, job.pictures)?);
        }
        self.engine().encode(&pictures, false)?;
        Ok(())
    }

    fn step(&self, batch: &mut [StepJob<'_>], observer: &mut Observer<'_>) -> Result<Stepped> {
        layer_done(observer)?;
        let (mut jobs, mut held) = (Vec::new(), Vec::new());
        for job in &mut *batch {
            let (job, tokens) = self.job(job)?;
            jobs.push(job);
            held.push(tokens);
        }
        let (outcomes, times) = self.engine().step(&mut jobs)?;
        drop(jobs);
        let mut outputs = Vec::with_capacity(batch.len());
        for ((job, outcome), held) in batch.iter_mut().zip(outcomes).zip(held) {
            let output = self.output(outcome, held).map(|(output, held)| {
                if let Ok(slot) = own::<Slot>(job.slot) {
                    slot.set_len(held);
                }
                output
            });
            outputs.push(output);
        }
        Ok(Stepped {
            outputs,
            times: Some(times),
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
        let picture = EncodePicture {
            picture,
            index: 0,
            first_row: 0,
        };
        let staged: Vec<_> = stage(&mut slot, &[picture])?.collect();
        let mut states = self.engine().encode(&staged, true)?;
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
