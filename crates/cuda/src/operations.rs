//! The kernels as functions that check what they are given.

use cudarc::driver::CudaFunction;

use super::{
    Error, Gpu, Memory, Result, Shape,
    arguments::{self as raw, Address, DECODE_WARPS, Row, Sequence},
    plan::{Decode, Plan},
};

/// The type of weights and of what they are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    F32,
    Bf16,
    F16,
}

impl Number {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Numbers of this type, widened.
    pub fn read(self, gpu: &Gpu, from: &Memory, count: usize) -> Result<Vec<f32>> {
        Ok(match self {
            Self::F32 => gpu.read(from, 0, count)?,
            Self::Bf16 => gpu
                .read::<half::bf16>(from, 0, count)?
                .iter()
                .map(|x| x.to_f32())
                .collect(),
            Self::F16 => gpu
                .read::<half::f16>(from, 0, count)?
                .iter()
                .map(|x| x.to_f32())
                .collect(),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// A matrix `[rows, columns]`, and what is added to each product with a row.
#[derive(Debug)]
pub struct Weights {
    pub memory: Memory,
    pub rows: usize,
    pub columns: usize,
    pub bias: Option<Memory>,
}

/// What follows a product.
#[derive(Debug, Clone, Copy)]
pub enum Then<'a> {
    Store,
    Gelu,
    /// Columns are pairs of a gate and what it lets through; half as many come out.
    GatedSilu,
    /// To what is there, in f32.
    Add,
    /// In f32.
    Set,
    /// In f32, with the embedding of each row's position.
    Embed(Places<'a>),
    /// Queries stay, keys and values go into the caches.
    Turn(Turned<'a>),
}

impl Then<'_> {
    const NAMES: [&'static str; 7] = ["store", "gelu", "gated_silu", "add", "set", "embed", "turn"];

    /// Of its name.
    fn index(self) -> usize {
        match self {
            Self::Store => 0,
            Self::Gelu => 1,
            Self::GatedSilu => 2,
            Self::Add => 3,
            Self::Set => 4,
            Self::Embed(_) => 5,
            Self::Turn(_) => 6,
        }
    }
}

/// A table of positions, and which of its rows each of some places has.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    pub table: &'a Memory,
    pub positions: &'a Memory,
    pub count: usize,
}

/// A norm's parameters; layer norm has a bias, RMS norm has none.
#[derive(Debug)]
pub struct Norm {
    pub weight: Memory,
    pub bias: Option<Memory>,
    pub epsilon: f64,
    pub length: usize,
}

/// Rows that a norm takes, in their order: of each picture, `stride` rows apart, those that `source` names.
#[derive(Debug, Clone, Copy)]
pub struct Gather<'a> {
    pub source: &'a Memory,
    pub places: usize,
    pub stride: usize,
}

/// Heads of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
}

impl Heads {
    /// Values of a row of queries, keys and values.
    pub fn width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.size
    }

    pub(super) fn scale(self) -> f32 {
        (self.size as f64).powf(-0.5) as f32 * std::f32::consts::LOG2_E
    }
}

/// Who sees whom.
#[derive(Debug, Clone, Copy)]
pub enum Attended<'a> {
    /// So many pictures of so many rows: all rows of each other.
    Pictures { count: usize, rows: usize },
    /// Sequences, the longest of so many rows: each row those before it, which are in the cache.
    Prompts {
        sequences: &'a Memory,
        count: usize,
        longest: usize,
        rows: usize,
        layer: usize,
    },
}

/// Rows of prompts, of which each knows its sequence.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pub rows: &'a Memory,
    pub count: usize,
    pub sequences: &'a Memory,
    pub sequence_count: usize,
}

impl Rows<'_> {
    fn rows(&self) -> Address {
        self.rows.part(0, self.count * size_of::<Row>())
    }

    fn sequences(&self) -> Address {
        let bytes = self.sequence_count * size_of::<Sequence>();
        self.sequences.part(0, bytes)
    }
}

/// What queries and keys of a prompt's rows are turned by, and which layer's they are.
#[derive(Debug, Clone, Copy)]
pub struct Turned<'a> {
    pub rows: Rows<'a>,
    pub turns: &'a Memory,
    pub heads: Heads,
    pub layer: usize,
}

/// Pictures of one size.
#[derive(Debug, Clone, Copy)]
pub struct Pictures<'a> {
    pub rgb: &'a Memory,
    pub count: usize,
    pub side: usize,
    pub patch: usize,
    /// Columns of the patches that come out, those of `[3, patch, patch]` and zeros.
    pub columns: usize,
    /// What each byte of each channel is.
    pub values: &'a Memory,
}

impl Pictures<'_> {
    pub fn grid(&self) -> usize {
        self.side / self.patch
    }
}

struct Gemm {
    tile: usize,
    threads: usize,
    shared: usize,
    /// Cycles from a block's step to its next, of 64 columns, if nothing is in its way.
    step: f64,
    functions: Vec<CudaFunction>,
}

impl Gemm {
    fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tile) * n.div_ceil(self.tile)
    }

    /// Cycles for each 64 columns of a product, about, as an H200 takes them: for its blocks' steps one after the
    /// other, for what matrix units do in them, or for what all blocks fetch from the L2 cache.
    fn time(&self, gpu: &Gpu, m: usize, n: usize) -> f64 {
        const PRODUCTS_A_CYCLE: f64 = 1050.0;
        const BYTES_A_CYCLE: f64 = 2000.0;
        let (tiles, processors) = (self.tiles(m, n), gpu.processors as usize);
        let rounds = |at_once: usize| tiles.div_ceil(processors * at_once) as f64;
        let side = self.tile as f64;
        let steps = rounds((gpu.shared / self.shared.max(1)).max(1)) * self.step;
        let products = rounds(1) * side * side * 64.0 / PRODUCTS_A_CYCLE;
        let bytes = tiles as f64 * 2.0 * side * 64.0 * 2.0 / BYTES_A_CYCLE;
        steps.max(products).max(bytes)
    }
}

/// All kernels for one type.
pub struct Kernels {
    number: Number,
    gemms: Vec<Gemm>,
    /// By the head size that they are made for.
    attentions: Vec<(usize, CudaFunction)>,
    patches: CudaFunction,
    norm: CudaFunction,
    embed: CudaFunction,
    decode: CudaFunction,
}

impl Kernels {
    pub fn new(gpu: &Gpu, number: Number) -> Result<Self> {
        let suffix = number.name();
        let tiles: &[_] = match number {
            Number::F32 => &[(64, 256, 2 * 64 * 17 * 4, 0.0)],
            // Stages of two tiles of 64 columns, in rows of 72.
            _ => &[
                (128, 256, 3 * 256 * 144, 1000.0),
                (64, 128, 4 * 128 * 144, 500.0),
                (32, 128, 4 * 64 * 144, 300.0),
            ],
        };
        // A card with less shared memory does without the largest.
        let tiles = tiles
            .iter()
            .filter(|(_, _, shared, _)| *shared <= gpu.shared);
        let gemms = tiles.map(|&(tile, threads, shared, step)| {
            let functions = Then::NAMES
                .iter()
                .map(|then| gpu.function(&format!("gemm_{tile}_{then}_{suffix}"), shared));
            Ok(Gemm {
                tile,
                threads,
                shared,
                step,
                functions: functions.collect::<Result<_>>()?,
            })
        });
        let attentions = match number {
            Number::F32 => vec![(128, gpu.function("attention_all_f32", 0)?)],
            _ => {
                let sizes = [16, 32, 64, 80, 128];
                let attentions = sizes.map(|size| {
                    let name = format!("attention_{size}_{suffix}");
                    Ok((size, gpu.function(&name, attention_shared(size))?))
                });
                attentions.into_iter().collect::<Result<_>>()?
            }
        };
        let function = |name| gpu.function(&format!("{name}_{suffix}"), 0);
        Ok(Self {
            number,
            gemms: gemms.collect::<Result<_>>()?,
            attentions,
            patches: function("patches")?,
            norm: function("norm")?,
            embed: function("embed")?,
            decode: gpu.function(&format!("decode_{suffix}"), gpu.shared)?,
        })
    }

    pub fn number(&self) -> Number {
        self.number
    }

    /// Multiplies the first `m` rows of `x`.
    pub fn gemm(
        &self,
        gpu: &Gpu,
        (x, m): (&Memory, usize),
        w: &Weights,
        then: Then<'_>,
        out: &mut Memory,
    ) -> Result<()> {
        // An element comes out the same whichever it is.
        let time = |gemm: &&Gemm| gemm.time(gpu, m, w.rows);
        let fastest = self
            .gemms
            .iter()
            .min_by(|a, b| time(a).total_cmp(&time(b)))
            .ok_or_else(|| Error::Failed("too little shared memory".into()))?;
        self.multiply(gpu, fastest, (x, m), w, then, out)
    }

    fn multiply(
        &self,
        gpu: &Gpu,
        gemm: &Gemm,
        (x, m): (&Memory, usize),
        w: &Weights,
        then: Then<'_>,
        out: &mut Memory,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.columns);
        let size = self.number.bytes();
        let per_row = match then {
            Then::Store | Then::Gelu | Then::Turn(_) => n * size,
            Then::GatedSilu => n / 2 * size,
            Then::Add | Then::Set | Then::Embed(_) => n * size_of::<f32>(),
        };
        assert!(n.is_multiple_of(2) && (k * size).is_multiple_of(16));
        let mut arguments = raw::Gemm {
            x: x.part(0, m * k * size),
            w: w.memory.part(0, n * k * size),
            bias: optional(w.bias.as_ref(), n * size_of::<f32>()),
            out: out.part(0, m * per_row),
            m: m as i32,
            n: n as i32,
            k: k as i32,
            ..raw::Gemm::default()
        };
        match then {
            Then::Embed(places) => {
                arguments.table = places.table.part(0, 0);
                arguments.positions = places.positions.part(0, places.count * 4);
                arguments.places = places.count as i32;
            }
            Then::Turn(turned) => {
                let heads = turned.heads;
                assert!((n, m) == (heads.width(), turned.rows.count));
                assert!(heads.size.is_power_of_two());
                arguments.rows = turned.rows.rows();
                arguments.sequences = turned.rows.sequences();
                arguments.turns = turned.turns.part(0, m * heads.size * size_of::<f32>());
                arguments.layer = turned.layer as i32;
                arguments.heads = heads.heads as i32;
                arguments.kv_heads = heads.kv_heads as i32;
                arguments.head_size = heads.size as i32;
            }
            _ => (),
        }
        let shape = Shape {
            blocks: (m.div_ceil(gemm.tile), n.div_ceil(gemm.tile), 1),
            threads: gemm.threads,
            shared: gemm.shared,
            cooperative: false,
        };
        gpu.launch(&gemm.functions[then.index()], shape, &arguments)
    }

    /// Norms of f32 rows.
    pub fn norm(
        &self,
        gpu: &Gpu,
        (x, rows): (&Memory, usize),
        norm: &Norm,
        out: &mut Memory,
        gather: Option<Gather<'_>>,
    ) -> Result<()> {
        let n = norm.length;
        let bytes = n * size_of::<f32>();
        let read = gather.map_or(rows, |g| rows / g.places * g.stride);
        let arguments = raw::Norm {
            x: x.part(0, read * bytes),
            weight: norm.weight.part(0, bytes),
            bias: optional(norm.bias.as_ref(), bytes),
            out: out.part(0, rows * n * self.number.bytes()),
            source: optional(gather.map(|g| g.source), gather.map_or(0, |g| g.places * 4)),
            places: gather.map_or(1, |g| g.places as i32),
            stride: gather.map_or(0, |g| g.stride as i32),
            rows: rows as i32,
            n: n as i32,
            epsilon: norm.epsilon as f32,
            padding: 0,
        };
        gpu.launch(&self.norm, blocks(rows.div_ceil(4), 128), &arguments)
    }

    /// Patches of pictures, a row each.
    pub fn patches(&self, gpu: &Gpu, pictures: Pictures<'_>, out: &mut Memory) -> Result<()> {
        let Pictures {
            count,
            side,
            patch,
            columns,
            ..
        } = pictures;
        let rows = count * pictures.grid().pow(2);
        let arguments = raw::Patches {
            rgb: pictures.rgb.part(0, count * side * side * 3),
            values: pictures.values.part(0, 3 * 256 * 4),
            out: out.part(0, rows * columns * self.number.bytes()),
            side: side as i32,
            patch: patch as i32,
            grid: pictures.grid() as i32,
            k: columns as i32,
            rows: rows as i32,
            padding: 0,
        };
        gpu.launch(&self.patches, blocks(rows, 256), &arguments)
    }

    /// Embeddings of prompts' rows, f32, and what they are turned by.
    pub fn embed(
        &self,
        gpu: &Gpu,
        rows: Rows<'_>,
        table: &Weights,
        out: &mut Memory,
        (frequencies, turns): (&Memory, &mut Memory),
    ) -> Result<()> {
        let half = frequencies.bytes() / size_of::<f32>();
        let arguments = raw::Embed {
            rows: rows.rows(),
            sequences: rows.sequences(),
            table: table
                .memory
                .part(0, table.rows * table.columns * self.number.bytes()),
            out: out.part(0, rows.count * table.columns * size_of::<f32>()),
            frequencies: frequencies.part(0, frequencies.bytes()),
            turns: turns.part(0, rows.count * half * 2 * size_of::<f32>()),
            hidden: table.columns as i32,
            half: half as i32,
        };
        gpu.launch(&self.embed, blocks(rows.count, 128), &arguments)
    }

    /// Attention of rows of queries, keys and values.
    pub fn attention(
        &self,
        gpu: &Gpu,
        qkv: &Memory,
        heads: Heads,
        attended: Attended<'_>,
        out: &mut Memory,
    ) -> Result<()> {
        let size = self.number.bytes();
        let (count, longest, rows) = match attended {
            Attended::Pictures { count, rows } => (count, rows, count * rows),
            Attended::Prompts {
                count,
                longest,
                rows,
                ..
            } => (count, longest, rows),
        };
        let whole = qkv.part(0, rows * heads.width() * size);
        let (sequences, layer) = match attended {
            Attended::Pictures { .. } => (0, 0),
            Attended::Prompts {
                sequences, layer, ..
            } => (sequences.part(0, count * size_of::<Sequence>()), layer),
        };
        let arguments = raw::Attention {
            q: whole,
            q_stride: heads.width() as i32,
            padding: 0,
            k: whole + (heads.heads * heads.size * size) as u64,
            v: whole + ((heads.heads + heads.kv_heads) * heads.size * size) as u64,
            out: out.part(0, rows * heads.heads * heads.size * size),
            sequences,
            layer: layer as i32,
            rows: longest as i32,
            heads: heads.heads as i32,
            kv_heads: heads.kv_heads as i32,
            head_size: heads.size as i32,
            scale: heads.scale(),
        };
        let fits = |(size, _): &&(usize, CudaFunction)| *size >= heads.size;
        let Some((made_for, function)) = self.attentions.iter().find(fits) else {
            return Err(Error::Failed(format!("heads of {} values", heads.size)));
        };
        let (queries, shared) = match self.number {
            Number::F32 => (4, 0),
            _ => (64, attention_shared(*made_for)),
        };
        let shape = Shape {
            blocks: (longest.div_ceil(queries), heads.heads, count),
            threads: 128,
            shared,
            cooperative: false,
        };
        gpu.launch(function, shape, &arguments)
    }

    /// Starts the decoder on captions that have their prompts behind them.
    pub fn decode(&self, gpu: &Gpu, plan: &Plan, decode: Decode<'_>) -> Result<()> {
        let arguments = plan.arguments(self.number, &decode);
        let shape = Shape {
            blocks: (plan.blocks, 1, 1),
            threads: DECODE_WARPS * 32,
            shared: plan.shared,
            cooperative: true,
        };
        gpu.launch(&self.decode, shape, &arguments)
    }
}

fn attention_shared(size: usize) -> usize {
    5 * 64 * (size + 8) * 2
}

pub(super) fn optional(memory: Option<&Memory>, bytes: usize) -> Address {
    memory.map_or(0, |memory| memory.part(0, bytes))
}

fn blocks(count: usize, threads: usize) -> Shape {
    Shape {
        blocks: (count, 1, 1),
        threads,
        shared: 0,
        cooperative: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<T: bytemuck::Pod>(gpu: &Gpu, values: &[f32], narrow: fn(f32) -> T) -> Memory {
        let values: Vec<T> = values.iter().map(|value| narrow(*value)).collect();
        gpu.upload(&values).unwrap()
    }

    /// Rows and columns that fill no tile, and a length that is no whole number of steps.
    #[test]
    fn tiles_of_every_size_make_the_same_product() {
        if std::env::var("VLMNARRATE_DEVICE").as_deref() != Ok("cuda") {
            return eprintln!("not tested: VLMNARRATE_DEVICE is not cuda");
        }
        let gpu = Gpu::open().unwrap();
        let (m, n, k) = (150, 148, 200);
        let mut rng = fastrand::Rng::with_seed(3);
        // Numbers that every type has.
        let mut some = |count: usize| -> Vec<f32> {
            let eighths = |_| rng.i32(-16..=16) as f32 / 8.0;
            (0..count).map(eighths).collect()
        };
        let (x, w, bias) = (some(m * k), some(n * k), some(n));
        let sum = |row: usize, col: usize| {
            let pairs = x[row * k..][..k].iter().zip(&w[col * k..][..k]);
            pairs.map(|(x, w)| x * w).sum::<f32>() + bias[col]
        };
        // They are eighths of eighths and few: no sum is rounded, in whatever order.
        let expected: Vec<f32> = (0..m * n).map(|i| sum(i / n, i % n)).collect();
        for number in [Number::F32, Number::Bf16, Number::F16] {
            let kernels = Kernels::new(&gpu, number).unwrap();
            let upload = |values: &[f32]| match number {
                Number::F32 => numbers(&gpu, values, |x| x),
                Number::Bf16 => numbers(&gpu, values, half::bf16::from_f32),
                Number::F16 => numbers(&gpu, values, half::f16::from_f32),
            };
            let weights = Weights {
                memory: upload(&w),
                rows: n,
                columns: k,
                bias: Some(gpu.upload(&bias).unwrap()),
            };
            let x = upload(&x);
            for gemm in &kernels.gemms {
                let mut out = gpu.memory(m * n * size_of::<f32>()).unwrap();
                gpu.clear(&mut out).unwrap();
                for times in 1..3 {
                    kernels
                        .multiply(&gpu, gemm, (&x, m), &weights, Then::Add, &mut out)
                        .unwrap();
                    let made: Vec<f32> = gpu.read(&out, 0, m * n).unwrap();
                    let all = made.iter().zip(&expected);
                    let wrong = all.filter(|(made, one)| **made != **one * times as f32);
                    assert_eq!(wrong.count(), 0, "{number:?}, tiles of {}", gemm.tile);
                }
            }
        }
    }
}
