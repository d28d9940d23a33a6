//! Norms and activation functions that stand before a product.

use super::{
    activations::RowSource,
    lanes::{LANES, Lanes},
};

/// Rows of f32 values as they are.
#[derive(Clone, Copy)]
pub struct F32Rows<'a> {
    values: &'a [f32],
    length: usize,
}

impl<'a> F32Rows<'a> {
    /// Rows of `length` values.
    ///
    /// # Panics
    ///
    /// If `length` is no multiple of [`LANES`], or `values` is not in whole rows.
    pub fn new(values: &'a [f32], length: usize) -> Self {
        assert!(length.is_multiple_of(LANES) && values.len().is_multiple_of(length));
        Self { values, length }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.length
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [[f32; LANES]] {
        let row = &self.values[row * self.length..][..self.length];
        row.as_chunks().0
    }
}

impl RowSource for F32Rows<'_> {
    fn rows(&self) -> usize {
        self.rows()
    }

    fn length(&self) -> usize {
        self.length
    }

    #[inline(always)]
    fn write<L: Lanes>(&self, _: L, row: usize, to: &mut [[f32; LANES]]) {
        to.copy_from_slice(self.row(row));
    }
}

/// Layer norm: mean 0 and variance 1. Its weight and bias are for the weights and the bias of the product behind it.
pub struct LayerNorm<'a> {
    /// Rows to be normed.
    pub x: F32Rows<'a>,
    /// Added to the variance.
    pub epsilon: f32,
}

impl RowSource for LayerNorm<'_> {
    fn rows(&self) -> usize {
        self.x.rows()
    }

    fn length(&self) -> usize {
        self.x.length
    }

    #[inline(always)]
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]) {
        let row = self.x.row(row);
        let length = self.x.length as f32;
        let mut sum = l.splat(0.0);
        for x in row {
            sum = l.add(sum, l.load(x));
        }
        let mean = l.splat(l.reduce(sum, |a, b| a + b) / length);
        let mut squares = l.splat(0.0);
        for x in row {
            let x = l.sub(l.load(x), mean);
            squares = l.mul_add(x, x, squares);
        }
        let variance = l.reduce(squares, |a, b| a + b) / length;
        let scale = l.splat(1.0 / (variance + self.epsilon).sqrt());
        for (x, to) in row.iter().zip(to) {
            l.store(l.mul(l.sub(l.load(x), mean), scale), to);
        }
    }
}

/// RMS norm: mean square 1, then a weight.
pub struct RmsNorm<'a> {
    /// Rows to be normed.
    pub x: F32Rows<'a>,
    /// A factor for each column.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub epsilon: f32,
}

impl RowSource for RmsNorm<'_> {
    fn rows(&self) -> usize {
        self.x.rows()
    }

    fn length(&self) -> usize {
        self.x.length
    }

    #[inline(always)]
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]) {
        let row = self.x.row(row);
        let mut squares = l.splat(0.0);
        for x in row {
            let x = l.load(x);
            squares = l.mul_add(x, x, squares);
        }
        let mean = l.reduce(squares, |a, b| a + b) / self.x.length as f32;
        let scale = l.splat(1.0 / (mean + self.epsilon).sqrt());
        let weights = self.weight.as_chunks().0;
        for ((x, to), weight) in row.iter().zip(to).zip(weights) {
            l.store(l.mul(l.mul(l.load(x), scale), l.load(weight)), to);
        }
    }
}

/// SwiGLU: `silu(gate) * up` of rows `[gate, up]`, half as long as these.
pub struct SwiGlu<'a>(pub F32Rows<'a>);

impl RowSource for SwiGlu<'_> {
    fn rows(&self) -> usize {
        self.0.rows()
    }

    fn length(&self) -> usize {
        self.0.length / 2
    }

    #[inline(always)]
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]) {
        let row = self.0.row(row);
        let (gates, ups) = row.split_at(row.len() / 2);
        for ((gate, up), to) in gates.iter().zip(ups).zip(to) {
            let gate = l.load(gate);
            l.store(l.mul(l.mul(gate, logistic(l, gate)), l.load(up)), to);
        }
    }
}

/// `1 / (1 + e⁻ˣ)`
#[inline(always)]
fn logistic<L: Lanes>(l: L, x: L::Float) -> L::Float {
    let one = l.splat(1.0);
    l.div(one, l.add(one, exp(l, l.sub(l.splat(0.0), x))))
}

/// eˣ with a relative error below 2·10⁻⁷, for x clamped to ±87.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(l: L, x: L::Float) -> L::Float {
    let x = l.max(l.min(x, l.splat(87.0)), l.splat(-87.0));
    let power = l.round(l.mul(x, l.splat(std::f32::consts::LOG2_E)));
    let n = l.to_float(power);
    // ln 2 in two parts. n times the first is exact.
    let r = l.mul_add(n, l.splat(-0.693_359_4), x);
    let r = l.mul_add(n, l.splat(2.121_944_4e-4), r);
    // The polynomial of Cephes' expf.
    let mut p = l.splat(1.987_569_1e-4);
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_5e-2,
        1.666_666_5e-1,
        5e-1,
    ] {
        p = l.mul_add(p, r, l.splat(c));
    }
    let y = l.add(l.mul_add(l.mul(r, r), p, r), l.splat(1.0));
    l.mul(y, l.exp2(power))
}

/// 2ˣ with a relative error below 1.1·10⁻⁴, for x from −126, which smaller ones are taken for, to 127; 1 of 0.
///
/// For what is rounded to 8 bits, and sums of it.
#[inline(always)]
pub(crate) fn coarse_exp2<L: Lanes>(l: L, x: L::Float) -> L::Float {
    let x = l.max(x, l.splat(-126.0));
    let power = l.round_float(x);
    let r = l.sub(x, power);
    let mut p = l.splat(5.500_893e-2);
    for c in [2.422_109_7e-1, 6.932_829e-1, 1.0] {
        p = l.mul_add(p, r, l.splat(c));
    }
    l.mul_exp2(p, power)
}

/// GELU by its tanh approximation, `gelu_pytorch_tanh`, off by less than 2·10⁻⁴ of itself.
///
/// For what is rounded to 8 bits.
#[inline(always)]
pub(crate) fn coarse_gelu<L: Lanes>(l: L, x: L::Float) -> L::Float {
    // (1 + tanh(u)) / 2 is the logistic function of 2u.
    let a = -2.0 * (2.0 / std::f32::consts::PI).sqrt() * std::f32::consts::LOG2_E;
    let inner = l.mul_add(l.mul(x, x), l.splat(a * 0.044715), l.splat(a));
    let power = coarse_exp2(l, l.min(l.mul(x, inner), l.splat(126.0)));
    l.div(x, l.add(l.splat(1.0), power))
}

#[cfg(test)]
mod tests {
    use super::{
        super::lanes::{Kernel, run_on_all},
        *,
    };

    struct Write<'a, R>(&'a R, usize);

    impl<R> Clone for Write<'_, R> {
        fn clone(&self) -> Self {
            Self(self.0, self.1)
        }
    }

    impl<R: RowSource> Kernel for Write<'_, R> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut row = vec![[0.0; LANES]; self.0.length() / LANES];
            self.0.write(l, self.1, &mut row);
            row.as_flattened().to_vec()
        }
    }

    /// Checks that all instruction sets agree, to a few roundings, with `exact`, which gives a whole row.
    fn check(rows: &impl RowSource, exact: impl Fn(usize) -> Vec<f64>) {
        for row in 0..rows.rows() {
            let written = run_on_all(Write(rows, row));
            for (y, exact) in written.into_iter().zip(exact(row)) {
                let off = (f64::from(y) - exact).abs();
                assert!(off <= 1e-6 * exact.abs().max(1.0), "{y} for {exact}");
            }
        }
    }

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..len).map(|_| rng.f32() * 12.0 - 6.0).collect()
    }

    fn doubles(x: &[f32]) -> impl Iterator<Item = f64> {
        x.iter().copied().map(f64::from)
    }

    fn silu(x: f64) -> f64 {
        x / (1.0 + (-x).exp())
    }

    #[test]
    fn norms_and_activation_functions_match_doubles() {
        let (length, rows) = (48, 3);
        let (x, weight) = (noise(length * rows, 1), noise(length, 2));
        let row = |row: usize| doubles(&x[row * length..][..length]).collect::<Vec<_>>();
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let values = F32Rows::new(&x, length);
        check(&values, row);
        check(
            &LayerNorm {
                x: values,
                epsilon: 0.01,
            },
            |i| {
                let x = row(i);
                let middle = mean(&x);
                let squares: Vec<_> = x.iter().map(|x| (x - middle).powi(2)).collect();
                let deviation = (mean(&squares) + 0.01).sqrt();
                x.iter().map(|x| (x - middle) / deviation).collect()
            },
        );
        let norm = RmsNorm {
            x: values,
            weight: &weight,
            epsilon: 0.01,
        };
        check(&norm, |i| {
            let x = row(i);
            let squares: Vec<_> = x.iter().map(|x| x * x).collect();
            let size = (mean(&squares) + 0.01).sqrt();
            let weights = doubles(&weight);
            x.iter().zip(weights).map(|(x, w)| x / size * w).collect()
        });
        check(&SwiGlu(F32Rows::new(&x[..96], 96)), |_| {
            let up = doubles(&x[48..96]);
            doubles(&x[..48])
                .zip(up)
                .map(|(gate, up)| silu(gate) * up)
                .collect()
        });
    }

    #[derive(Clone)]
    struct Exp([f32; LANES]);

    impl Kernel for Exp {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut y = [0.0; LANES];
            l.store(exp(l, l.load(&self.0)), &mut y);
            y
        }
    }

    #[derive(Clone)]
    struct Coarse([f32; LANES]);

    impl Kernel for Coarse {
        type Output = [[f32; LANES]; 2];

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut y = [[0.0; LANES]; 2];
            let x = l.load(&self.0);
            l.store(coarse_exp2(l, x), &mut y[0]);
            l.store(coarse_gelu(l, x), &mut y[1]);
            y
        }
    }

    #[test]
    fn coarse_functions() {
        for i in -1300..1270 {
            let x: [f32; LANES] =
                std::array::from_fn(|lane| (i as f32 + lane as f32 / 16.0) / 10.0);
            let [powers, gelus] = run_on_all(Coarse(x));
            for ((x, power), gelu) in x.into_iter().zip(powers).zip(gelus) {
                let x = f64::from(x);
                let exact = x.max(-126.0).exp2();
                assert!(
                    (f64::from(power) / exact - 1.0).abs() < 1.1e-4,
                    "{x}: {power}"
                );
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let exact = x / 2.0 * (1.0 + u.tanh());
                let off = (f64::from(gelu) - exact).abs();
                assert!(off <= 2e-4 * exact.abs() + 1e-6, "{x}: {gelu} for {exact}");
            }
        }
        let [powers, gelus] = run_on_all(Coarse([0.0; LANES]));
        assert_eq!((powers, gelus), ([1.0; LANES], [0.0; LANES]));
        let [powers, _] = run_on_all(Coarse([f32::NEG_INFINITY; LANES]));
        assert!(powers.iter().all(|y| *y < 1e-37));
    }

    #[test]
    fn exponentials() {
        for i in -900..900 {
            let x: [f32; LANES] =
                std::array::from_fn(|lane| (i as f32 + lane as f32 / 16.0) / 10.0);
            for (x, y) in x.into_iter().zip(run_on_all(Exp(x))) {
                let exact = f64::from(x.clamp(-87.0, 87.0)).exp();
                assert!((f64::from(y) / exact - 1.0).abs() < 2e-7, "{x}: {y}");
            }
        }
        let y = run_on_all(Exp([f32::NEG_INFINITY; LANES]));
        assert!(y.iter().all(|y| *y < 1e-37));
    }
}
