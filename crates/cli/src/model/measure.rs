//! Which pictures are described, and what each took.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gst::prelude::*;
use gstvlmnarrate::Caption;

use super::frames::Frames;
use crate::arguments::Model;

/// Captions of each kind, if the user says nothing: as many as the time allows, within these limits.
const FEWEST: usize = 3;
const MOST: usize = 30;
const TIME: Duration = Duration::from_secs(8);

/// What the picture does from caption to caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// Another picture each time.
    Cut,
    /// The same picture again.
    Holds,
}

/// What captions of one kind took.
pub struct Row {
    /// Side of the squares that the encoder sees.
    pub image_size: u32,
    pub scene: Scene,
    pub captions: Vec<Caption>,
}

/// Measures one kind of caption after the other.
pub struct Measurement {
    /// The last one is under way.
    pub rows: Vec<Row>,
    narrator: gst::Element,
    source: gst_app::AppSrc,
    frames: Frames,
    /// For each picture size that is still to be measured.
    sizes: Vec<u32>,
    count: Option<usize>,
    warm: bool,
    began: Instant,
}

impl Measurement {
    pub fn new(
        arguments: &Model,
        narrator: gst::Element,
        source: gst_app::AppSrc,
        frames: Frames,
    ) -> Self {
        let mut sizes = arguments.image_size.clone();
        sizes.reverse();
        Self {
            rows: Vec::new(),
            narrator,
            source,
            frames,
            sizes,
            count: arguments.captions.map(|count| count as usize),
            warm: false,
            began: Instant::now(),
        }
    }

    /// Pushes the first frame, which waits until the model is loaded.
    ///
    /// # Errors
    ///
    /// The pipeline takes none.
    pub fn start(&mut self) -> Result<()> {
        let size = self.sizes.pop().unwrap_or(0);
        self.narrator.set_property("image-size", size);
        self.push(true)
    }

    /// Takes a caption, and pushes what is to be described next.
    ///
    /// # Errors
    ///
    /// The model refuses a picture size.
    pub fn caption(&mut self, caption: &Caption) -> Result<()> {
        if !self.warm {
            // The first caption of a size also takes memory for it.
            self.warm = true;
            return self.begin(Scene::Cut);
        }
        let row = self.rows.last_mut().context("no row")?;
        row.captions.push(caption.clone());
        let (count, scene) = (row.captions.len(), row.scene);
        let is_enough = match self.count {
            Some(wanted) => count >= wanted,
            None => count >= FEWEST && (count >= MOST || self.began.elapsed() > TIME),
        };
        match (is_enough, scene) {
            (false, _) => self.push(scene == Scene::Cut),
            (true, Scene::Cut) => self.begin(Scene::Holds),
            (true, Scene::Holds) => self.next_size(),
        }
    }

    fn begin(&mut self, scene: Scene) -> Result<()> {
        let stats = self.narrator.property::<gst::Structure>("stats");
        self.rows.push(Row {
            image_size: stats.get("image-size")?,
            scene,
            captions: Vec::new(),
        });
        self.began = Instant::now();
        self.push(scene == Scene::Cut)
    }

    fn next_size(&mut self) -> Result<()> {
        let Some(size) = self.sizes.pop() else {
            self.source.end_of_stream()?;
            return Ok(());
        };
        self.narrator.set_property("image-size", size);
        if self.narrator.property::<u32>("image-size") != size {
            bail!("image-size: the model takes no pictures of {size} pixels");
        }
        self.warm = false;
        self.push(true)
    }

    /// Pushes the frames of one caption.
    fn push(&mut self, cut: bool) -> Result<()> {
        for _ in 0..self.narrator.property::<u32>("frames") {
            self.source.push_buffer(self.frames.next(cut))?;
        }
        Ok(())
    }
}
