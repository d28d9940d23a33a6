//! One caller's failure is that caller's.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use candle_core::Tensor;
use vlmnarrate_engine::Observer;

use super::*;
use crate::{
    backends::{
        Backend, BatchLimits, EncodeJob, Needs, SequenceSlot, StepJob, Stepped,
        request_size::{RequestMemory, RequestSize},
    },
    error::Result,
    run::scheduler::Scheduler,
};

/// What goes wrong with a sequence, as its picture says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    EncoderPanics,
    /// In the middle of the network, when the caches of other sequences have got rows already.
    DecoderPanics,
    NotFinite,
    NoMemory,
}

const FAULTS: [Fault; 4] = [
    Fault::EncoderPanics,
    Fault::DecoderPanics,
    Fault::NotFinite,
    Fault::NoMemory,
];
/// The red of the faults' pictures begins here, in a picture that has no other colour.
const FIRST_RED: u8 = 100;
const OTHERS: [u8; 2] = [1, 254];

impl Fault {
    fn picture(self, side: u32) -> Picture {
        let red = FIRST_RED + FAULTS.iter().position(|fault| *fault == self).unwrap() as u8;
        let rgb = [red, OTHERS[0], OTHERS[1]].repeat((side * side) as usize);
        Picture::new(side, side, rgb).unwrap()
    }

    fn of(picture: &Picture) -> Option<Self> {
        let (red, others) = picture.rgb[..3].split_first()?;
        let index = red.checked_sub(FIRST_RED)?;
        FAULTS
            .get(usize::from(index))
            .copied()
            .filter(|_| others == OTHERS)
    }

    fn message(self) -> &'static str {
        match self {
            Self::EncoderPanics | Self::DecoderPanics => "as planned",
            Self::NotFinite => "not finite",
            Self::NoMemory => "out of memory",
        }
    }
}

/// A backend of which some sequences fail.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Backend>,
    /// By the address of the slot.
    faults: Mutex<HashMap<usize, Fault>>,
    /// Batches in which a sequence that fails was with one that doesn't.
    mixed: AtomicUsize,
}

fn address(slot: &dyn SequenceSlot) -> usize {
    std::ptr::from_ref(slot).addr()
}

/// Panics at the second layer.
fn panicking(observer: &mut Observer<'_>) -> impl FnMut(Event<'_>) -> ControlFlow<()> + Send {
    let mut layers = 0;
    move |event| {
        layers += 1;
        assert!(layers < 2, "as planned");
        observer(event)
    }
}

impl Backend for Faulty {
    fn new_slot(&self) -> Box<dyn SequenceSlot> {
        self.inner.new_slot()
    }

    fn is_batch_invariant(&self) -> bool {
        self.inner.is_batch_invariant()
    }

    fn limits(&self) -> BatchLimits {
        // Several pictures at once, which no backend for CPUs takes by itself.
        BatchLimits {
            pictures: 3,
            ..self.inner.limits()
        }
    }

    fn install(&self, work: &mut (dyn FnMut() + Send)) {
        self.inner.install(work);
    }

    fn memory(&self, size: &RequestSize) -> Option<RequestMemory> {
        self.inner.memory(size)
    }

    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()> {
        self.inner.reserve(slot, needs)
    }

    fn encode(&self, batch: &mut [EncodeJob<'_>], observer: &mut Observer<'_>) -> Result<()> {
        let mut panics = false;
        let mut not_finite = Vec::new();
        for (i, job) in batch.iter().enumerate() {
            let mut faults = self.faults.lock().unwrap();
            let fault = Fault::of(job.pictures[0].picture);
            match fault {
                Some(fault) => faults.insert(address(&*job.slot), fault),
                None => faults.remove(&address(&*job.slot)),
            };
            panics |= fault == Some(Fault::EncoderPanics);
            if fault == Some(Fault::NotFinite) {
                not_finite.push(i);
            }
        }
        if panics {
            return self.inner.encode(batch, &mut panicking(observer));
        }
        self.inner.encode(batch, observer)?;
        for i in not_finite {
            let job = &mut batch[i];
            let features = self.inner.features(job.pictures[0].picture, observer)?;
            let features = Tensor::full(f32::NAN, features.shape(), features.device())?
                .to_dtype(features.dtype())?;
            self.inner.set_features(job.slot, &[features])?;
        }
        Ok(())
    }

    fn step(&self, batch: &mut [StepJob<'_>], observer: &mut Observer<'_>) -> Result<Stepped> {
        let faults: Vec<_> = {
            let faults = self.faults.lock().unwrap();
            let fault = |job: &StepJob<'_>| faults.get(&address(&*job.slot)).copied();
            batch.iter().map(fault).collect()
        };
        let bad = faults.iter().flatten().count();
        if (1..batch.len()).contains(&bad) {
            self.mixed.fetch_add(1, Relaxed);
        }
        match faults
            .iter()
            .flatten()
            .find(|fault| **fault != Fault::NotFinite)
        {
            Some(Fault::NoMemory) => Err(Error::Device("out of memory".into())),
            Some(_) => self.inner.step(batch, &mut panicking(observer)),
            None => self.inner.step(batch, observer),
        }
    }

    fn set_features(&self, slot: &mut dyn SequenceSlot, features: &[Tensor]) -> Result<()> {
        self.inner.set_features(slot, features)
    }

    fn vision_states(&self, picture: &Picture) -> Result<(Vec<Tensor>, Tensor)> {
        self.inner.vision_states(picture)
    }
}

/// Of callers whose captions are made together some always fail. The others get what they would get alone.
#[test]
fn a_failure_ends_one_caption() {
    const CAPTIONS: usize = 12;
    let mut model = super::model(Quantization::Q8_0);
    let side = model.config().vision_config.image_size as u32;
    let all: Vec<_> = (0..6)
        .map(|caller| wishes(&model, caller, CAPTIONS))
        .collect();
    let alone: Vec<Vec<_>> = all
        .iter()
        .map(|wishes| {
            wishes
                .iter()
                .map(|wish| say(&model, &mut model.session(), wish))
                .collect()
        })
        .collect();
    let faulty = Arc::new(Faulty {
        inner: model.backend.clone(),
        faults: Mutex::default(),
        mixed: AtomicUsize::new(0),
    });
    model.backend = faulty.clone();
    model.scheduler = Scheduler::new(faulty.clone()).unwrap();
    let model = &model;
    thread::scope(|scope| {
        for (caller, (wishes, alone)) in all.iter().zip(&alone).enumerate() {
            scope.spawn(move || {
                let mut session = model.session();
                for (i, (wish, alone)) in wishes.iter().zip(alone).enumerate() {
                    let said = say(model, &mut session, wish);
                    assert_eq!(&said, alone, "caller {caller}, caption {i}: {wish:?}");
                }
            });
        }
        for fault in FAULTS {
            scope.spawn(move || {
                let mut session = model.session();
                for i in 0..CAPTIONS {
                    let wish = Wish {
                        pictures: vec![fault.picture(side)],
                        prompt: "Describe this frame in one sentence.".into(),
                        max_tokens: 20,
                        sampling: Sampling::default(),
                        choices: Vec::new(),
                        stop_strings: Vec::new(),
                        cancel_after: usize::MAX,
                    };
                    match say(model, &mut session, &wish) {
                        Said::Refused(error) if error.contains(fault.message()) => (),
                        said => panic!("{fault:?}, caption {i}: {said:?}"),
                    }
                }
            });
        }
    });
    let mixed = faulty.mixed.load(Relaxed);
    println!("{mixed} steps of sequences that fail with others");
    assert!(mixed > CAPTIONS, "{mixed}");
}
