//! What runs on the GPU: pictures of several sequences at once, and steps.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    thread,
    time::Duration,
};

use crate::backends::{
    OnTokens, StepTimes,
    cuda::{
        CANCELLED, COUNT, END, GENERATED, MAX_SEQUENCES, decoder::Decoder, encoder::Encoder,
        scratch::Scratch, slot::SlotBuffers, take_new,
    },
};
use vlmnarrate_cuda::{
    DecodePlan, Event, Gpu, Graph, Kernels, MAX_ROWS, Memory, PromptRow, Result, Sequence,
};

/// A picture that is staged in its slot from this byte on, and the row of the features that its own start at.
#[derive(Clone, Copy)]
pub(crate) struct StagedPicture<'a> {
    pub(crate) slot: &'a SlotBuffers,
    pub(crate) at: usize,
    pub(crate) side: usize,
    pub(crate) features: usize,
}

/// Rows of one sequence to run.
pub(crate) struct GpuJob<'a> {
    pub(crate) slot: &'a SlotBuffers,
    /// Tokens to put into the cache behind `past` others; below zero they are rows of features, −1 the first.
    pub(crate) prompt: Vec<i32>,
    pub(crate) past: usize,
    /// The token to go on from, which is the next behind the prompt.
    pub(crate) token: u32,
    /// Tokens to generate at most; 0 generates none.
    pub(crate) max_tokens: usize,
    /// Tokens that the answer may begin with. With `logits` these are run in any case.
    pub(crate) draft_tokens: Vec<u32>,
    /// Logits behind `token` and each draft token, instead of an answer.
    pub(crate) logits: bool,
    /// Called with all generated tokens whenever there are more; `Break` ends the answer.
    pub(crate) on_tokens: Option<&'a mut OnTokens<'a>>,
}

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) generated: Vec<u32>,
    /// By a stop token.
    pub(crate) stopped: bool,
    /// By logits that no token can be chosen by.
    pub(crate) not_finite: bool,
    pub(crate) logits: Vec<f32>,
}

/// What a graph depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Shape {
    /// Pictures and their side.
    Encode(usize, usize),
    /// Rows, prompts, and rows of the longest.
    Prefill(usize, usize, usize),
}

/// CUDA graphs of work that came twice.
#[derive(Default)]
struct Graphs {
    seen: HashSet<Shape>,
    made: HashMap<Shape, Graph>,
}

impl Graphs {
    /// Prompts whose lengths never repeat would fill the memory.
    const MAX: usize = 32;

    fn run(&mut self, gpu: &Gpu, shape: Shape, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if let Some(graph) = self.made.get(&shape) {
            return graph.launch();
        }
        if self.seen.insert(shape) {
            return work();
        }
        if self.made.len() >= Self::MAX {
            self.clear();
        }
        let graph = gpu.capture(work)?;
        graph.launch()?;
        self.made.insert(shape, graph);
        Ok(())
    }

    /// After memory was reserved: graphs hold the addresses of before. Of several pieces some may have moved before
    /// there was none left for another.
    fn moved(&mut self, moved: Result<bool>) -> Result<()> {
        if !matches!(moved, Ok(false)) {
            self.clear();
        }
        moved.map(|_| ())
    }

    fn clear(&mut self) {
        self.seen.clear();
        self.made.clear();
    }
}

/// Events around pictures, and at the start of a step, behind its prompts and at its end.
struct StageEvents {
    look: Event,
    seen: Event,
    start: Event,
    read: Event,
    end: Event,
}

pub(crate) struct Engine {
    gpu: Arc<Gpu>,
    kernels: Kernels,
    encoder: Encoder,
    decoder: Decoder,
    plan: DecodePlan,
    scratch: Scratch,
    graphs: Graphs,
    events: StageEvents,
    /// Whether pictures were encoded since the last step.
    has_seen: bool,
    /// Made when they are first wanted.
    scores: Option<Memory>,
    /// As [`DecodeInput`](vlmnarrate_cuda::DecodeInput) has them.
    stops: Memory,
}

impl Engine {
    pub(crate) fn new(
        gpu: Arc<Gpu>,
        kernels: Kernels,
        encoder: Encoder,
        decoder: Decoder,
        plan: DecodePlan,
        stops: Memory,
        most_tokens: usize,
    ) -> Result<Self> {
        let event = || gpu.event();
        Ok(Self {
            events: StageEvents {
                look: event()?,
                seen: event()?,
                start: event()?,
                read: event()?,
                end: event()?,
            },
            scratch: Scratch::new(&gpu, kernels.dtype(), most_tokens)?,
            graphs: Graphs::default(),
            has_seen: false,
            scores: None,
            gpu,
            kernels,
            encoder,
            decoder,
            plan,
            stops,
        })
    }

    /// Runs a step and waits for it. The outcomes are those of the jobs.
    pub(crate) fn step(&mut self, jobs: &mut [GpuJob<'_>]) -> Result<(Vec<Outcome>, StepTimes)> {
        self.gpu.record(&self.events.start)?;
        let sequences = self.prefill(jobs)?;
        self.gpu.record(&self.events.read)?;
        let scores = self.decode(jobs, &sequences)?;
        self.gpu.record(&self.events.end)?;
        let mut generated = vec![Vec::new(); jobs.len()];
        while !self.events.end.is_complete()? {
            listen(jobs, &mut generated);
            thread::sleep(POLL_INTERVAL);
        }
        let StageEvents {
            look,
            seen,
            start,
            read,
            end,
        } = &self.events;
        let times = StepTimes {
            vision: match std::mem::take(&mut self.has_seen) {
                true => look.elapsed_until(seen)?,
                false => Duration::ZERO,
            },
            prefill: start.elapsed_until(read)?,
            decode: read.elapsed_until(end)?,
        };
        let outcomes = jobs.iter().zip(scores).map(|(job, logits)| {
            let words = &job.slot.words;
            let count = words.get(COUNT);
            let said = 0..(count & ((1 << END) - 1)) as usize;
            Outcome {
                generated: said.map(|i| words.get(GENERATED + i) as u32).collect(),
                stopped: count >> END == STOPPED,
                // Callers that get logits look at them themselves.
                not_finite: count >> END == NOT_FINITE && !job.logits,
                logits,
            }
        });
        Ok((outcomes.collect(), times))
    }

    /// Encodes pictures; the GPU has only been told so when this returns. With `states` also returns the encoder's
    /// states and the features, for tests.
    pub(crate) fn encode(
        &mut self,
        pictures: &[StagedPicture<'_>],
        states: bool,
    ) -> Result<Vec<Vec<f32>>> {
        if !self.has_seen {
            self.gpu.record(&self.events.look)?;
        }
        let states = self.encode_images(pictures, states)?;
        self.gpu.record(&self.events.seen)?;
        self.has_seen = true;
        Ok(states)
    }

    /// Encodes all pictures, those of one size as a batch.
    fn encode_images(
        &mut self,
        pictures: &[StagedPicture<'_>],
        wants_states: bool,
    ) -> Result<Vec<Vec<f32>>> {
        let Self {
            gpu,
            kernels,
            encoder,
            scratch,
            graphs,
            ..
        } = self;
        let mut all = pictures.to_vec();
        all.sort_by_key(|picture| picture.side);
        let mut states = Vec::new();
        let same = |a: &StagedPicture<'_>, b: &StagedPicture<'_>| a.side == b.side;
        for pictures in all
            .chunk_by(same)
            .flat_map(|same| same.chunks(MAX_SEQUENCES))
        {
            let (count, side) = (pictures.len(), pictures[0].side);
            graphs.moved(encoder.reserve(gpu, scratch, count, side))?;
            for (i, picture) in pictures.iter().enumerate() {
                gpu.copy_pinned(
                    &picture.slot.pixels,
                    picture.at,
                    &mut scratch.rgb,
                    i * bytes(side),
                    bytes(side),
                )?;
            }
            if wants_states {
                let mut keep = |x: &Memory, rows: usize| {
                    states.push(gpu.read(x, 0, rows * encoder.hidden())?);
                    Ok(())
                };
                encoder.run(gpu, kernels, scratch, (count, side), &mut keep)?;
                states.push(encoder.last_hidden_state(gpu, kernels, scratch, (count, side))?);
                states.push(gpu.read(
                    &scratch.features,
                    0,
                    encoder.tokens(side) * self.decoder.shape().hidden,
                )?);
            } else {
                graphs.run(gpu, Shape::Encode(count, side), || {
                    encoder.run(gpu, kernels, scratch, (count, side), &mut |_, _| Ok(()))
                })?;
            }
            let row = self.decoder.shape().hidden * size_of::<f32>();
            let length = encoder.tokens(side) * row;
            for (i, picture) in pictures.iter().enumerate() {
                gpu.copy(
                    &scratch.features,
                    i * length,
                    &picture.slot.features,
                    picture.features * row,
                    length,
                )?;
            }
        }
        Ok(states)
    }

    /// Prefills all prompts, and describes all jobs as sequences.
    fn prefill(&mut self, jobs: &[GpuJob<'_>]) -> Result<Vec<Sequence>> {
        let Self {
            gpu,
            kernels,
            decoder,
            scratch,
            graphs,
            ..
        } = self;
        let mut rows = Vec::new();
        let mut draft_tokens = Vec::new();
        let mut sequences = Vec::new();
        for (sequence, work) in jobs.iter().enumerate() {
            let slot = work.slot;
            let words = &slot.words;
            let first = draft_tokens.len();
            draft_tokens.extend(work.draft_tokens.iter().map(|token| *token as i32));
            let position = work.past + work.prompt.len();
            assert!(
                position + work.max_tokens.max(1) <= slot.capacity
                    || work.max_tokens == 0 && position <= slot.capacity
            );
            sequences.push(Sequence {
                kv_cache: slot.kv_cache.part(
                    0,
                    slot.capacity * decoder.kv_bytes_per_token(kernels.dtype().bytes()),
                ),
                image_features: slot.features.part(0, 0),
                capacity: slot.capacity as i32,
                first_row: rows.len() as i32,
                rows: work.prompt.len() as i32,
                past: work.past as i32,
                token: work.token as i32,
                position: position as i32,
                max_tokens: work.max_tokens as i32,
                draft_len: work.draft_tokens.len() as i32,
                draft_tokens: scratch.draft_tokens.part(
                    first * size_of::<i32>(),
                    work.draft_tokens.len() * size_of::<i32>(),
                ),
                cancelled: words.part(CANCELLED, 1),
                generated_len: words.part(COUNT, 1),
                generated: words.part(GENERATED, work.max_tokens),
            });
            rows.extend(work.prompt.iter().enumerate().map(|(i, &token)| PromptRow {
                token,
                sequence: sequence as i32,
                position: (work.past + i) as i32,
            }));
        }
        graphs.moved(decoder.reserve(gpu, scratch, rows.len()))?;
        gpu.write(&sequences, &mut scratch.sequences, 0)?;
        gpu.write(&draft_tokens, &mut scratch.draft_tokens, 0)?;
        if !rows.is_empty() {
            gpu.write(&rows, &mut scratch.rows, 0)?;
            let longest = sequences.iter().map(|s| s.rows as usize).max().unwrap_or(0);
            let shape = (rows.len(), sequences.len(), longest);
            graphs.run(gpu, Shape::Prefill(shape.0, shape.1, shape.2), || {
                decoder.prefill(gpu, kernels, scratch, shape)
            })?;
        }
        Ok(sequences)
    }

    /// Generates all answers as a batch; logits are for callers that sample, one after the other.
    fn decode(&mut self, jobs: &[GpuJob<'_>], sequences: &[Sequence]) -> Result<Vec<Vec<f32>>> {
        let Self {
            gpu,
            kernels,
            decoder,
            plan,
            scratch,
            ..
        } = self;
        let captions = jobs
            .iter()
            .zip(sequences)
            .filter(|(job, _)| job.max_tokens > 0 && !job.logits);
        let captions: Vec<Sequence> = captions.map(|(_, sequence)| *sequence).collect();
        if !captions.is_empty() {
            gpu.write(&captions, &mut scratch.sequences, 0)?;
            decoder.decode(
                gpu,
                kernels,
                plan,
                (&scratch.sequences, captions.len()),
                None,
                &self.stops,
            )?;
        }
        let mut all = Vec::new();
        for (job, sequence) in jobs.iter().zip(sequences) {
            if !job.logits {
                all.push(Vec::new());
                continue;
            }
            let vocabulary = decoder.shape().vocab_size;
            let scores = match &mut self.scores {
                Some(scores) => scores,
                none => none.insert(gpu.memory(MAX_ROWS * vocabulary * size_of::<f32>())?),
            };
            gpu.write(&[*sequence], &mut scratch.sequences, 0)?;
            decoder.decode(
                gpu,
                kernels,
                plan,
                (&scratch.sequences, 1),
                Some(scores),
                &self.stops,
            )?;
            all.push(gpu.read(scores, 0, (1 + job.draft_tokens.len()) * vocabulary)?);
        }
        Ok(all)
    }
}

/// How the kernel reports a stop token, or logits that are not finite.
const STOPPED: i32 = 2;
const NOT_FINITE: i32 = 4;

/// How often the step that runs is looked at.
const POLL_INTERVAL: Duration = Duration::from_micros(20);

fn bytes(side: usize) -> usize {
    side * side * 3
}

/// Shows new tokens to those who generate them, and tells the GPU who wants no more.
fn listen(jobs: &mut [GpuJob<'_>], generated: &mut [Vec<u32>]) {
    for (job, generated) in jobs.iter_mut().zip(generated) {
        let words = &job.slot.words;
        if let Some(on_tokens) = &mut job.on_tokens
            && take_new(words, generated)
            && on_tokens(generated).is_break()
        {
            words.set(CANCELLED, 1);
        }
    }
}
