//! The thread that works for the GPU: takes what was asked for, and runs it at once.

use std::{
    collections::{HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    backends::cuda::{
        CANCELLED, COUNT, END, GENERATED, MAX_SEQUENCES, decoder::Decoder, encoder::Encoder,
        scratch::Scratch, slot::SlotBuffers,
    },
    error::Error,
};
use vlmnarrate_cuda::{
    DecodePlan, Event, Gpu, Graph, Kernels, MAX_ROWS, Memory, PromptRow, Result, Sequence,
};

/// A picture that is staged, and the row of the features that its own start at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StagedPicture {
    pub(crate) side: usize,
    pub(crate) features: usize,
}

/// What to run, in this order.
#[derive(Debug, Default)]
pub(crate) struct GpuJob {
    /// As they were staged, one behind the other.
    pub(crate) pictures: Vec<StagedPicture>,
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
    /// Also the features and the states of the encoder, for tests.
    pub(crate) states: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) generated: Vec<u32>,
    /// By a stop token.
    pub(crate) stopped: bool,
    /// By logits that no token can be chosen by.
    pub(crate) not_finite: bool,
    pub(crate) logits: Vec<f32>,
    pub(crate) states: Vec<Vec<f32>>,
    pub(crate) vision: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

pub(crate) struct Job {
    pub(crate) slot: SlotBuffers,
    pub(crate) work: GpuJob,
    pub(crate) reply: Sender<(SlotBuffers, Result<Outcome, Error>)>,
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

/// Events at the start of a batch, behind its pictures, behind its prompts and at its end.
struct StageEvents {
    start: Event,
    seen: Event,
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
                start: event()?,
                seen: event()?,
                read: event()?,
                end: event()?,
            },
            scratch: Scratch::new(&gpu, kernels.dtype(), most_tokens)?,
            graphs: Graphs::default(),
            scores: None,
            gpu,
            kernels,
            encoder,
            decoder,
            plan,
            stops,
        })
    }

    /// Works until no job can come any more.
    pub(crate) fn serve(mut self, queue: &Receiver<Job>) {
        let mut last = Batch::default();
        while let Ok(first) = queue.recv() {
            let jobs = last.gather(first, queue);
            let start = Instant::now();
            let outcomes = catch_unwind(AssertUnwindSafe(|| self.run(&jobs)));
            last = Batch {
                jobs: jobs.len(),
                time: start.elapsed(),
            };
            let outcomes = outcomes.unwrap_or_else(|_| {
                Err(vlmnarrate_cuda::Error::Failed(
                    "a bug of this element".into(),
                ))
            });
            answer(jobs, outcomes);
        }
    }

    fn run(&mut self, jobs: &[Job]) -> Result<Vec<Outcome>> {
        self.gpu.record(&self.events.start)?;
        let states = self.encode_images(jobs)?;
        self.gpu.record(&self.events.seen)?;
        let sequences = self.prefill(jobs)?;
        self.gpu.record(&self.events.read)?;
        let scores = self.decode(jobs, &sequences)?;
        self.gpu.record(&self.events.end)?;
        while !self.events.end.is_complete()? {
            thread::sleep(Duration::from_micros(20));
        }
        let StageEvents {
            start,
            seen,
            read,
            end,
        } = &self.events;
        let times = (
            start.elapsed_until(seen)?,
            seen.elapsed_until(read)?,
            read.elapsed_until(end)?,
        );
        let outcomes = jobs.iter().zip(scores).map(|(job, scores)| {
            let words = job.slot.words();
            let count = words.get(COUNT);
            let said = 0..(count & ((1 << END) - 1)) as usize;
            Outcome {
                generated: said.map(|i| words.get(GENERATED + i) as u32).collect(),
                stopped: count >> END == STOPPED,
                not_finite: count >> END == NOT_FINITE,
                logits: scores,
                states: states.clone(),
                vision: times.0,
                prefill: times.1,
                decode: times.2,
            }
        });
        Ok(outcomes.collect())
    }

    /// Encodes all pictures, those of one size as a batch.
    fn encode_images(&mut self, jobs: &[Job]) -> Result<Vec<Vec<f32>>> {
        let Self {
            gpu,
            kernels,
            encoder,
            scratch,
            graphs,
            ..
        } = self;
        let mut all = Vec::new();
        for job in jobs {
            let mut at = 0;
            for picture in &job.work.pictures {
                all.push((&job.slot, at, *picture));
                at += bytes(picture.side);
            }
        }
        all.sort_by_key(|(_, _, picture)| picture.side);
        let mut states = Vec::new();
        let same = |a: &(_, _, StagedPicture), b: &(_, _, StagedPicture)| a.2.side == b.2.side;
        for pictures in all
            .chunk_by(same)
            .flat_map(|same| same.chunks(MAX_SEQUENCES))
        {
            let (count, side) = (pictures.len(), pictures[0].2.side);
            graphs.moved(encoder.reserve(gpu, scratch, count, side))?;
            for (i, (slot, at, _)) in pictures.iter().enumerate() {
                gpu.copy_pinned(
                    &slot.pixels,
                    *at,
                    &mut scratch.rgb,
                    i * bytes(side),
                    bytes(side),
                )?;
            }
            if jobs.iter().any(|job| job.work.states) {
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
            for (i, (slot, _, picture)) in pictures.iter().enumerate() {
                gpu.copy(
                    &scratch.features,
                    i * length,
                    &slot.features,
                    picture.features * row,
                    length,
                )?;
            }
        }
        Ok(states)
    }

    /// Prefills all prompts, and describes all jobs as sequences.
    fn prefill(&mut self, jobs: &[Job]) -> Result<Vec<Sequence>> {
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
        for (sequence, job) in jobs.iter().enumerate() {
            let (slot, work) = (&job.slot, &job.work);
            let words = slot.words();
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
    fn decode(&mut self, jobs: &[Job], sequences: &[Sequence]) -> Result<Vec<Vec<f32>>> {
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
            .filter(|(job, _)| job.work.max_tokens > 0 && !job.work.logits);
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
            if !job.work.logits {
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
            all.push(gpu.read(scores, 0, (1 + job.work.draft_tokens.len()) * vocabulary)?);
        }
        Ok(all)
    }
}

/// How the kernel reports a stop token, or logits that are not finite.
const STOPPED: i32 = 2;
const NOT_FINITE: i32 = 4;

fn bytes(side: usize) -> usize {
    side * side * 3
}

/// What was run last.
#[derive(Default)]
struct Batch {
    jobs: usize,
    time: Duration,
}

impl Batch {
    /// The jobs that wait, and those that will come in a moment, as they did last time: a batch takes little longer than
    /// one job.
    fn gather(&self, first: Job, queue: &Receiver<Job>) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut take = |job: Job| match job.slot.words().get(CANCELLED) {
            0 => jobs.push(job),
            _ => answer(vec![job], Ok(vec![Outcome::default()])),
        };
        take(first);
        let mut count = 1;
        let deadline = Instant::now() + self.time / 10;
        while count < MAX_SEQUENCES {
            let patience = match count < self.jobs {
                true => deadline.saturating_duration_since(Instant::now()),
                false => Duration::ZERO,
            };
            match queue.recv_timeout(patience) {
                Ok(job) => take(job),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
            count += 1;
        }
        jobs
    }
}

fn answer(jobs: Vec<Job>, outcomes: Result<Vec<Outcome>>) {
    let outcomes: Vec<Result<Outcome>> = match outcomes {
        Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
        Err(error) => jobs.iter().map(|_| Err(error.clone())).collect(),
    };
    for (Job { slot, reply, .. }, outcome) in jobs.into_iter().zip(outcomes) {
        // A caller that has gone is not an error.
        let _ = reply.send((slot, outcome.map_err(Error::from)));
    }
}
