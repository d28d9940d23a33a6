//! The kernels as functions that check their arguments.

use cudarc::driver::CudaFunction;

use super::{
    Error, Gpu, Memory, Result, Shape,
    arguments::{self as raw, Address, DECODE_WARPS, Sequence},
    parameters::{
        Attention, DType, Epilogue, Images, Norm, PromptRows, QkvShape, RowGather, Weights,
    },
    plan::{DecodeInput, DecodePlan},
};

/// A product kernel with square tiles of one size.
struct Gemm {
    tile: usize,
    threads: usize,
    shared: usize,
    /// Cycles of a block's step of 64 columns when it is alone.
    step_cycles: f64,
    /// In the order of [`Epilogue::NAMES`].
    functions: Vec<CudaFunction>,
}

impl Gemm {
    fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tile) * n.div_ceil(self.tile)
    }

    /// Estimated cycles for 64 columns of a product on an H200: the largest of what the latency of steps, the throughput of
    /// tensor cores and the bandwidth of the L2 cache allow.
    fn cycles(&self, gpu: &Gpu, m: usize, n: usize) -> f64 {
        const PRODUCTS_PER_CYCLE: f64 = 1050.0;
        const BYTES_PER_CYCLE: f64 = 2000.0;
        let (tiles, processors) = (self.tiles(m, n), gpu.processors as usize);
        let waves = |resident: usize| tiles.div_ceil(processors * resident) as f64;
        let side = self.tile as f64;
        let steps = waves((gpu.shared / self.shared.max(1)).max(1)) * self.step_cycles;
        let products = waves(1) * side * side * 64.0 / PRODUCTS_PER_CYCLE;
        let bytes = tiles as f64 * 2.0 * side * 64.0 * 2.0 / BYTES_PER_CYCLE;
        steps.max(products).max(bytes)
    }
}

/// All kernels for one [`DType`].
pub struct Kernels {
    dtype: DType,
    gemms: Vec<Gemm>,
    /// With the head size that each is compiled for, in ascending order.
    attentions: Vec<(usize, CudaFunction)>,
    patchify: CudaFunction,
    norm: CudaFunction,
    embed: CudaFunction,
    decode: CudaFunction,
}

impl Kernels {
    /// Loads the kernels.
    pub fn new(gpu: &Gpu, dtype: DType) -> Result<Self> {
        let suffix = dtype.name();
        let tiles: &[_] = match dtype {
            DType::F32 => &[(64, 256, 2 * 64 * 17 * 4, 0.0)],
            // Stages of two tiles of 64 columns, padded to 72.
            _ => &[
                (128, 256, 3 * 256 * 144, 1000.0),
                (64, 128, 4 * 128 * 144, 500.0),
                (32, 128, 4 * 64 * 144, 300.0),
            ],
        };
        // GPUs with less shared memory do without the largest tiles.
        let tiles = tiles
            .iter()
            .filter(|(_, _, shared, _)| *shared <= gpu.shared);
        let gemms = tiles.map(|&(tile, threads, shared, step_cycles)| {
            let functions = Epilogue::NAMES
                .iter()
                .map(|name| gpu.function(&format!("gemm_{tile}_{name}_{suffix}"), shared));
            Ok(Gemm {
                tile,
                threads,
                shared,
                step_cycles,
                functions: functions.collect::<Result<_>>()?,
            })
        });
        let attentions = match dtype {
            DType::F32 => vec![(128, gpu.function("attention_128_f32", 0)?)],
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
            dtype,
            gemms: gemms.collect::<Result<_>>()?,
            attentions,
            patchify: function("patchify")?,
            norm: function("norm")?,
            embed: function("embed")?,
            decode: gpu.function(&format!("decode_{suffix}"), gpu.shared)?,
        })
    }

    /// The type of weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Multiplies the first `m` rows of `x` with the transposed weights, adds the bias and applies an epilogue.
    ///
    /// A row comes out the same, to the bit, however many rows there are.
    ///
    /// # Panics
    ///
    /// If memory is too small, the number of weight rows odd, or a weight row no multiple of 16 bytes.
    pub fn gemm(
        &self,
        gpu: &Gpu,
        (x, m): (&Memory, usize),
        w: &Weights,
        epilogue: Epilogue<'_>,
        out: &mut Memory,
    ) -> Result<()> {
        // An element comes out the same with each of them.
        let cycles = |gemm: &&Gemm| gemm.cycles(gpu, m, w.rows);
        let fastest = self
            .gemms
            .iter()
            .min_by(|a, b| cycles(a).total_cmp(&cycles(b)))
            .ok_or_else(|| Error::Failed("too little shared memory".into()))?;
        self.multiply(gpu, fastest, (x, m), w, epilogue, out)
    }

    fn multiply(
        &self,
        gpu: &Gpu,
        gemm: &Gemm,
        (x, m): (&Memory, usize),
        w: &Weights,
        epilogue: Epilogue<'_>,
        out: &mut Memory,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.columns);
        let size = self.dtype.bytes();
        let per_row = match epilogue {
            Epilogue::Store | Epilogue::Gelu | Epilogue::RopeStoreKv(_) => n * size,
            Epilogue::SwiGlu => n / 2 * size,
            Epilogue::AddF32 | Epilogue::StoreF32 | Epilogue::AddPositions(_) => {
                n * size_of::<f32>()
            }
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
        match epilogue {
            Epilogue::AddPositions(positions) => {
                arguments.position_embedding = positions.table.part(0, 0);
                arguments.position_ids = positions.ids.part(0, positions.patches * 4);
                arguments.patches = positions.patches as i32;
            }
            Epilogue::RopeStoreKv(rope) => {
                let shape = rope.shape;
                assert!((n, m) == (shape.row_length(), rope.rows.count));
                assert!(shape.head_size.is_power_of_two());
                let rotations = m * shape.head_size * size_of::<f32>();
                arguments.rows = rope.rows.rows();
                arguments.sequences = rope.rows.sequences();
                arguments.rotations = rope.rotations.part(0, rotations);
                arguments.layer = rope.layer as i32;
                arguments.heads = shape.heads as i32;
                arguments.kv_heads = shape.kv_heads as i32;
                arguments.head_size = shape.head_size as i32;
            }
            _ => (),
        }
        let shape = Shape {
            blocks: (m.div_ceil(gemm.tile), n.div_ceil(gemm.tile), 1),
            threads: gemm.threads,
            shared: gemm.shared,
            cooperative: false,
        };
        gpu.launch(&gemm.functions[epilogue.index()], shape, &arguments)
    }

    /// Norms the first `rows` f32 rows of `x`, or those that `gather` names, to the kernels' type.
    ///
    /// # Panics
    ///
    /// If memory is too small.
    pub fn norm(
        &self,
        gpu: &Gpu,
        (x, rows): (&Memory, usize),
        norm: &Norm,
        out: &mut Memory,
        gather: Option<RowGather<'_>>,
    ) -> Result<()> {
        let n = norm.length;
        let bytes = n * size_of::<f32>();
        let read = gather.map_or(rows, |g| rows / g.per_image * g.stride);
        let arguments = raw::Norm {
            x: x.part(0, read * bytes),
            weight: norm.weight.part(0, bytes),
            bias: optional(norm.bias.as_ref(), bytes),
            out: out.part(0, rows * n * self.dtype.bytes()),
            indices: optional(
                gather.map(|g| g.indices),
                gather.map_or(0, |g| g.per_image * 4),
            ),
            per_image: gather.map_or(1, |g| g.per_image as i32),
            stride: gather.map_or(0, |g| g.stride as i32),
            rows: rows as i32,
            n: n as i32,
            epsilon: norm.epsilon as f32,
            padding: 0,
        };
        gpu.launch(&self.norm, blocks(rows.div_ceil(4), 128), &arguments)
    }

    /// Normalises images and cuts them into patches, to a row `[columns]` each in the kernels' type.
    ///
    /// # Panics
    ///
    /// If memory is too small.
    pub fn patchify(&self, gpu: &Gpu, images: Images<'_>, out: &mut Memory) -> Result<()> {
        let Images {
            count,
            side,
            patch_size,
            columns,
            ..
        } = images;
        let rows = count * images.grid().pow(2);
        let arguments = raw::Patchify {
            rgb: images.rgb.part(0, count * side * side * 3),
            pixel_table: images.pixel_table.part(0, 3 * 256 * 4),
            out: out.part(0, rows * columns * self.dtype.bytes()),
            side: side as i32,
            patch_size: patch_size as i32,
            grid: images.grid() as i32,
            k: columns as i32,
            rows: rows as i32,
            padding: 0,
        };
        gpu.launch(&self.patchify, blocks(rows, 256), &arguments)
    }

    /// Embeds rows of prompts to f32 `[rows, hidden]`, and computes the rotations of their positions.
    ///
    /// `inv_freq` has the rotary embedding's inverse frequencies, f32 `[head_size / 2]`. Token ids must be inside the table.
    ///
    /// # Panics
    ///
    /// If memory is too small.
    pub fn embed(
        &self,
        gpu: &Gpu,
        rows: PromptRows<'_>,
        embed_tokens: &Weights,
        out: &mut Memory,
        (inv_freq, rotations): (&Memory, &mut Memory),
    ) -> Result<()> {
        let half = inv_freq.bytes() / size_of::<f32>();
        let arguments = raw::Embed {
            rows: rows.rows(),
            sequences: rows.sequences(),
            embeddings: embed_tokens.memory.part(
                0,
                embed_tokens.rows * embed_tokens.columns * self.dtype.bytes(),
            ),
            out: out.part(0, rows.count * embed_tokens.columns * size_of::<f32>()),
            inv_freq: inv_freq.part(0, inv_freq.bytes()),
            rotations: rotations.part(0, rows.count * half * 2 * size_of::<f32>()),
            hidden: embed_tokens.columns as i32,
            half: half as i32,
        };
        gpu.launch(&self.embed, blocks(rows.count, 128), &arguments)
    }

    /// Attention of rows of queries, keys and values, to rows `[heads, head_size]` of `attn_out`.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] if no kernel is compiled for the head size.
    ///
    /// # Panics
    ///
    /// If memory is too small.
    pub fn attention(
        &self,
        gpu: &Gpu,
        qkv: &Memory,
        shape: QkvShape,
        attention: Attention<'_>,
        attn_out: &mut Memory,
    ) -> Result<()> {
        let size = self.dtype.bytes();
        let (count, longest, rows) = match attention {
            Attention::Bidirectional { images, rows } => (images, rows, images * rows),
            Attention::Causal {
                count,
                longest,
                rows,
                ..
            } => (count, longest, rows),
        };
        let whole = qkv.part(0, rows * shape.row_length() * size);
        let (sequences, layer) = match attention {
            Attention::Bidirectional { .. } => (0, 0),
            Attention::Causal {
                sequences, layer, ..
            } => (sequences.part(0, count * size_of::<Sequence>()), layer),
        };
        let arguments = raw::Attention {
            q: whole,
            q_stride: shape.row_length() as i32,
            padding: 0,
            k: whole + (shape.heads * shape.head_size * size) as u64,
            v: whole + ((shape.heads + shape.kv_heads) * shape.head_size * size) as u64,
            out: attn_out.part(0, rows * shape.heads * shape.head_size * size),
            sequences,
            layer: layer as i32,
            rows: longest as i32,
            heads: shape.heads as i32,
            kv_heads: shape.kv_heads as i32,
            head_size: shape.head_size as i32,
            scale: shape.scale(),
        };
        let fits = |(size, _): &&(usize, CudaFunction)| *size >= shape.head_size;
        let Some((compiled_for, function)) = self.attentions.iter().find(fits) else {
            return Err(Error::Failed(format!(
                "heads of {} values",
                shape.head_size
            )));
        };
        let (queries, shared) = match self.dtype {
            DType::F32 => (4, 0),
            _ => (64, attention_shared(*compiled_for)),
        };
        let launch = Shape {
            blocks: (longest.div_ceil(queries), shape.heads, count),
            threads: 128,
            shared,
            cooperative: false,
        };
        gpu.launch(function, launch, &arguments)
    }

    /// Launches the decode kernel on sequences whose prompts are in their KV caches, but for the last token.
    ///
    /// # Panics
    ///
    /// If memory is too small, or there are no sequences or more than [`MAX_ROWS`](crate::MAX_ROWS).
    pub fn decode(&self, gpu: &Gpu, plan: &DecodePlan, input: DecodeInput<'_>) -> Result<()> {
        let arguments = plan.arguments(self.dtype, &input);
        let shape = Shape {
            blocks: (plan.blocks, 1, 1),
            threads: DECODE_WARPS * 32,
            shared: plan.shared,
            cooperative: true,
        };
        gpu.launch(&self.decode, shape, &arguments)
    }
}

/// Shared memory of an attention block.
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

    fn upload_as<T: bytemuck::Pod>(gpu: &Gpu, values: &[f32], narrow: fn(f32) -> T) -> Memory {
        let values: Vec<T> = values.iter().map(|value| narrow(*value)).collect();
        gpu.upload(&values).unwrap()
    }

    /// Rows and columns fill no tile, and the length is no whole number of steps.
    #[test]
    fn tiles_of_every_size_make_the_same_product() {
        if std::env::var("VLMNARRATE_DEVICE").as_deref() != Ok("cuda") {
            return eprintln!("not tested: VLMNARRATE_DEVICE is not cuda");
        }
        let gpu = Gpu::open().unwrap();
        let (m, n, k) = (150, 148, 200);
        let mut rng = fastrand::Rng::with_seed(3);
        // Values that every type has.
        let mut some = |count: usize| -> Vec<f32> {
            let eighths = |_| rng.i32(-16..=16) as f32 / 8.0;
            (0..count).map(eighths).collect()
        };
        let (x, w, bias) = (some(m * k), some(n * k), some(n));
        let sum = |row: usize, col: usize| {
            let pairs = x[row * k..][..k].iter().zip(&w[col * k..][..k]);
            pairs.map(|(x, w)| x * w).sum::<f32>() + bias[col]
        };
        // Few 64ths: no sum is rounded, in any order.
        let expected: Vec<f32> = (0..m * n).map(|i| sum(i / n, i % n)).collect();
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let kernels = Kernels::new(&gpu, dtype).unwrap();
            let upload = |values: &[f32]| match dtype {
                DType::F32 => upload_as(&gpu, values, |x| x),
                DType::Bf16 => upload_as(&gpu, values, half::bf16::from_f32),
                DType::F16 => upload_as(&gpu, values, half::f16::from_f32),
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
                        .multiply(&gpu, gemm, (&x, m), &weights, Epilogue::AddF32, &mut out)
                        .unwrap();
                    let made: Vec<f32> = gpu.read(&out, 0, m * n).unwrap();
                    let all = made.iter().zip(&expected);
                    let wrong = all.filter(|(made, one)| **made != **one * times as f32);
                    assert_eq!(wrong.count(), 0, "{dtype:?}, tiles of {}", gemm.tile);
                }
            }
        }
    }
}
