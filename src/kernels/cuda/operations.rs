//! The kernels as functions that check what they are given.

use cudarc::driver::CudaFunction;

use super::{
    Error, Gpu, Memory, Result, Shape,
    arguments::{
        self as raw, Address, DECODE_WARPS, MOST_ROWS, PASS_ROW_BYTES, Product, RING, Row,
        STANDING_BYTES, STEP, Sequence, TILE,
    },
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Store,
    Gelu,
    /// Columns are pairs of a gate and what it lets through; half as many come out.
    GatedSilu,
    /// To what is there, in f32.
    Add,
    /// In f32.
    Set,
    /// In f32, with the embedding of each row's position.
    Embed,
}

impl Then {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Store, "store"),
        (Self::Gelu, "gelu"),
        (Self::GatedSilu, "gated_silu"),
        (Self::Add, "add"),
        (Self::Set, "set"),
        (Self::Embed, "embed"),
    ];
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

    fn scale(self) -> f32 {
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
    /// Time that a tile takes for its area, of the largest tile's.
    cost: f64,
    functions: Vec<CudaFunction>,
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
    turn: CudaFunction,
    decode: CudaFunction,
}

impl Kernels {
    pub fn new(gpu: &Gpu, number: Number) -> Result<Self> {
        let suffix = number.name();
        let tiles: &[_] = match number {
            Number::F32 => &[(64, 256, 2 * 64 * 17 * 4, 1.0)],
            // Stages of two tiles of 64 columns, in rows of 72.
            _ => &[
                (128, 256, 3 * 256 * 144, 1.0),
                (64, 128, 4 * 128 * 144, 1.3),
                (32, 128, 4 * 64 * 144, 2.0),
            ],
        };
        // A card with less shared memory does without the largest.
        let tiles = tiles
            .iter()
            .filter(|(_, _, shared, _)| *shared <= gpu.shared);
        let gemms = tiles.map(|&(tile, threads, shared, cost)| {
            let functions = Then::ALL
                .iter()
                .map(|(_, then)| gpu.function(&format!("gemm_{tile}_{then}_{suffix}"), shared));
            Ok(Gemm {
                tile,
                threads,
                shared,
                cost,
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
            turn: function("turn")?,
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
        then: Then,
        out: &mut Memory,
        places: Option<Places<'_>>,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.columns);
        let size = self.number.bytes();
        let per_row = match then {
            Then::Store | Then::Gelu => n * size,
            Then::GatedSilu => n / 2 * size,
            Then::Add | Then::Set | Then::Embed => n * size_of::<f32>(),
        };
        assert!(n.is_multiple_of(2) && (k * size).is_multiple_of(16));
        assert_eq!(then == Then::Embed, places.is_some());
        let arguments = raw::Gemm {
            x: x.part(0, m * k * size),
            w: w.memory.part(0, n * k * size),
            bias: optional(w.bias.as_ref(), n * size_of::<f32>()),
            out: out.part(0, m * per_row),
            table: optional(places.map(|p| p.table), 0),
            positions: optional(
                places.map(|p| p.positions),
                places.map_or(0, |p| p.count * 4),
            ),
            places: places.map_or(0, |p| p.count as i32),
            m: m as i32,
            n: n as i32,
            k: k as i32,
        };
        let tiles = |gemm: &Gemm| m.div_ceil(gemm.tile) * n.div_ceil(gemm.tile);
        let time = |gemm: &Gemm| {
            let rounds = tiles(gemm).div_ceil(gpu.processors as usize);
            rounds as f64 * (gemm.tile * gemm.tile) as f64 * gemm.cost
        };
        // An element comes out the same whichever it is.
        let gemm = self.gemms.iter().min_by(|a, b| time(a).total_cmp(&time(b)));
        let gemm = gemm.ok_or_else(|| Error::Failed("too little shared memory".into()))?;
        let shape = Shape {
            blocks: (m.div_ceil(gemm.tile), n.div_ceil(gemm.tile), 1),
            threads: gemm.threads,
            shared: gemm.shared,
            cooperative: false,
        };
        let which = Then::ALL.iter().position(|(t, _)| *t == then);
        gpu.launch(&gemm.functions[which.unwrap_or(0)], shape, &arguments)
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

    /// Embeddings of prompts' rows, f32.
    pub fn embed(
        &self,
        gpu: &Gpu,
        rows: Rows<'_>,
        table: &Weights,
        out: &mut Memory,
    ) -> Result<()> {
        let arguments = raw::Embed {
            rows: rows.rows.part(0, rows.count * size_of::<Row>()),
            sequences: rows
                .sequences
                .part(0, rows.sequence_count * size_of::<Sequence>()),
            table: table
                .memory
                .part(0, table.rows * table.columns * self.number.bytes()),
            out: out.part(0, rows.count * table.columns * size_of::<f32>()),
            hidden: table.columns as i32,
            padding: 0,
        };
        gpu.launch(&self.embed, blocks(rows.count, 128), &arguments)
    }

    /// Turns queries and keys by their positions, and puts keys and values into the cache.
    pub fn turn(
        &self,
        gpu: &Gpu,
        qkv: &mut Memory,
        rows: Rows<'_>,
        frequencies: &Memory,
        heads: Heads,
        layer: usize,
    ) -> Result<()> {
        let arguments = raw::Turn {
            qkv: qkv.part(0, rows.count * heads.width() * self.number.bytes()),
            rows: rows.rows.part(0, rows.count * size_of::<Row>()),
            sequences: rows
                .sequences
                .part(0, rows.sequence_count * size_of::<Sequence>()),
            frequencies: frequencies.part(0, heads.size / 2 * 4),
            layer: layer as i32,
            heads: heads.heads as i32,
            kv_heads: heads.kv_heads as i32,
            head_size: heads.size as i32,
        };
        gpu.launch(&self.turn, blocks(rows.count, 256), &arguments)
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

fn optional(memory: Option<&Memory>, bytes: usize) -> Address {
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

/// The decoder's shape.
#[derive(Debug, Clone, Copy)]
pub struct Stack {
    pub layers: usize,
    pub hidden: usize,
    pub heads: Heads,
    pub inner: usize,
    pub vocabulary: usize,
    pub epsilon: f64,
}

impl Stack {
    /// Whether these are its matrices.
    fn fit(&self, products: &[Product]) -> bool {
        let attended = self.heads.heads * self.heads.size;
        let layer = [
            (self.heads.width(), self.hidden),
            (self.hidden, attended),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ];
        let mut all = layer.repeat(self.layers);
        all.push((self.vocabulary, self.hidden));
        let sides = products.iter().map(|p| (p.n as usize, p.k as usize));
        sides.eq(all)
    }
}

/// What the decoder's kernel is given, but for the captions.
pub struct Decode<'a> {
    pub sequences: &'a Memory,
    pub count: usize,
    /// Where to put all scores of each row, if anywhere. Then it runs one pass.
    pub scores: Option<&'a Memory>,
    pub table: &'a Weights,
    pub norms: &'a Memory,
    pub frequencies: &'a Memory,
    pub stops: [i32; raw::MOST_STOPS],
}

/// How the decoder's kernel shares the work, and the memory that its blocks meet in.
pub struct Plan {
    stack: Stack,
    blocks: usize,
    shared: usize,
    most_rows: usize,
    row_stride: usize,
    partial: usize,
    products: Memory,
    /// What blocks give each other, as `exchange.cuh` has it.
    middle: Memory,
    states: Memory,
    qkv: Memory,
    attended: Memory,
    inner: Memory,
    best: Memory,
    turn: Memory,
}

/// Shared memory for sums, which a product with a finer share would need more of.
const MOST_PARTIAL: usize = 24 * 1024;

impl Plan {
    /// `weights` are four matrices of each layer, then the head's.
    pub fn new<'w>(
        gpu: &Gpu,
        number: Number,
        stack: Stack,
        weights: impl Iterator<Item = &'w Weights>,
    ) -> Result<Self> {
        // Each has a part in the widest product of a layer, so that none is ahead of another by a layer.
        let blocks = (gpu.processors as usize).min((2 * stack.inner).div_ceil(TILE));
        let size = number.bytes();
        let heads = stack.heads;
        let products = weights.enumerate().map(|(i, w)| Product {
            w: w.memory.part(0, w.rows * w.columns * size),
            n: w.rows as i32,
            k: w.columns as i32,
            parts: match i == 4 * stack.layers {
                true => 1,
                false => parts(w.rows, w.columns, blocks) as i32,
            },
            tiles: 0,
        });
        let products: Vec<Product> = products.collect();
        assert!(stack.fit(&products));

        let sums = products.iter().map(|p| match p.parts {
            1 => 0,
            parts => tiles_of_a_block(p.n as usize, blocks) * parts as usize * MOST_ROWS * TILE,
        });
        let attention = 128 + DECODE_WARPS * (heads.size + 2) + MOST_ROWS * 2 * heads.size;
        let partial = sums
            .max()
            .unwrap_or(0)
            .max(attention)
            .max(2 * DECODE_WARPS * MOST_ROWS);
        let longest = products.iter().map(|p| p.k as usize).max().unwrap_or(0);
        // Rows lie so that eight of them, four lanes each, touch all banks.
        let row_stride = longest.next_multiple_of(2 * STEP) + STEP;
        let floats = |count: usize| (count * size_of::<f32>()).next_multiple_of(16);
        let fixed = RING * DECODE_WARPS * STEP * 8 * size
            + size_of_val(products.as_slice())
            + floats(stack.hidden)
            + floats(MOST_ROWS * heads.size)
            + floats(MOST_ROWS * tiles_of_a_block(stack.hidden, blocks) * TILE)
            + floats(DECODE_WARPS * DECODE_WARPS)
            + MOST_ROWS * (size_of::<Sequence>() + STANDING_BYTES + PASS_ROW_BYTES)
            + floats(partial)
            + 128;
        let most_rows = gpu.shared.saturating_sub(fixed) / (row_stride * size);
        let most_rows = most_rows.min(MOST_ROWS);
        if most_rows == 0 {
            return Err(Error::Failed(format!(
                "its {} kB of shared memory are too few for the decoder of this model",
                gpu.shared / 1024
            )));
        }
        // Zero is the number of no turn.
        let shared = |words: usize| {
            let mut memory = gpu.memory(words * size_of::<u64>())?;
            gpu.clear(&mut memory)?;
            Ok::<_, Error>(memory)
        };
        let rows = |length: usize| shared(2 * MOST_ROWS * length);
        Ok(Self {
            blocks,
            shared: fixed + most_rows * row_stride * size,
            most_rows,
            row_stride,
            partial,
            products: gpu.upload(&products)?,
            middle: rows(stack.hidden)?,
            states: rows(stack.hidden)?,
            qkv: rows(heads.width())?,
            attended: rows(heads.heads * heads.size)?,
            inner: rows(stack.inner)?,
            best: shared(2 * blocks * MOST_ROWS + MOST_ROWS)?,
            turn: shared(1)?,
            stack,
        })
    }

    /// Rows that a pass can have.
    pub fn most_rows(&self) -> usize {
        self.most_rows
    }

    fn arguments(&self, number: Number, decode: &Decode<'_>) -> raw::Decode {
        let s = &self.stack;
        let size = number.bytes();
        assert!((1..=MOST_ROWS).contains(&decode.count));
        let scores = MOST_ROWS * s.vocabulary * 4;
        raw::Decode {
            products: self.products.part(0, 0),
            norms: decode.norms.part(0, (2 * s.layers + 1) * s.hidden * 4),
            frequencies: decode.frequencies.part(0, s.heads.size / 2 * 4),
            table: decode.table.memory.part(0, s.vocabulary * s.hidden * size),
            sequences: decode
                .sequences
                .part(0, decode.count * size_of::<Sequence>()),
            middle: self.middle.part(0, 0),
            states: self.states.part(0, 0),
            qkv: self.qkv.part(0, 0),
            attended: self.attended.part(0, 0),
            inner: self.inner.part(0, 0),
            best: self.best.part(0, 0),
            scores: optional(decode.scores, scores),
            turn: self.turn.part(0, 0),
            count: decode.count as i32,
            layers: s.layers as i32,
            hidden: s.hidden as i32,
            heads: s.heads.heads as i32,
            kv_heads: s.heads.kv_heads as i32,
            head_size: s.heads.size as i32,
            inner_size: s.inner as i32,
            vocabulary: s.vocabulary as i32,
            most_rows: self.most_rows as i32,
            row_stride: self.row_stride as i32,
            partial: self.partial as i32,
            once: decode.scores.is_some().into(),
            stops: decode.stops,
            epsilon: s.epsilon as f32,
            scale: s.heads.scale(),
        }
    }
}

fn tiles_of_a_block(rows: usize, blocks: usize) -> usize {
    rows.div_ceil(TILE).div_ceil(blocks)
}

/// How many warps share a tile: so that the last to end has the least to do.
fn parts(rows: usize, columns: usize, blocks: usize) -> usize {
    let tiles = tiles_of_a_block(rows, blocks);
    let steps = columns.div_ceil(STEP);
    let shares = [1, 2, 4, 8, 16].into_iter().filter(|parts| {
        let sums = tiles * parts * MOST_ROWS * TILE * size_of::<f32>();
        *parts == 1 || sums <= MOST_PARTIAL
    });
    let turns = |parts: usize| tiles.div_ceil(DECODE_WARPS / parts) * steps.div_ceil(parts);
    shares.min_by_key(|parts| turns(*parts)).unwrap_or(1)
}
