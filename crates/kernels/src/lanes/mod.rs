//! Vectors of sixteen lanes, for each instruction set that the kernels know.
//!
//! Kernels are written once, over [`Lanes`]. All instruction sets give the same bits: integers are exact, floats are
//! rounded at the same places, and a multiply-add is rounded once.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use std::sync::atomic::{AtomicU8, Ordering};

use bytemuck::{Pod, cast};

use scalar::Scalar;

/// Values of a vector. Rows that kernels take are multiples of it.
pub const LANES: usize = 16;
/// Neighbours of the inner dimension in one lane, as `i16`.
pub const PAIR: usize = 2;
/// Neighbours of the inner dimension in one lane, as `i8`.
pub const QUAD: usize = 4;

/// Arithmetic on vectors of sixteen lanes with one instruction set.
pub trait Lanes: Copy + Send + Sync {
    /// Whether there are registers for the sums of [`MAX_TILE_ROWS`](crate::weights::MAX_TILE_ROWS) rows.
    const MANY_REGISTERS: bool;
    /// Whether 16-bit activations are multiplied byte by byte, which takes products of any unsigned with signed bytes.
    const SPLITS_I16: bool = false;
    /// What the bytes of signed activations are XORed with for [`dot_quads`](Self::dot_quads) to take them; `None` where
    /// 16 bits are multiplied in less time, or where that takes 7 bits only.
    const BYTE_OFFSET: Option<u8> = None;

    /// `[i16; 2]` in each lane.
    type I16Pairs: Pod;
    /// `[i8; 4]` or `[u8; 4]` in each lane.
    type I8Quads: Pod;
    /// One `[i16; 4]`, for all lanes.
    type I16Quad: Copy;
    /// `[i16; 4]` in each lane.
    type I16Quads: Copy;
    /// Sums of products of [`I16Quads`](Self::I16Quads), more than one in each lane.
    type PartialSums: Copy;
    /// Sums of products that fit 16 bits, one or two in each lane.
    type NarrowSums: Copy;
    /// `i32` in each lane.
    type Int: Copy;
    /// `f32` in each lane.
    type Float: Pod;

    /// Runs `f`, compiled for this instruction set with everything that it inlines.
    fn run<T>(self, f: impl FnOnce() -> T) -> T;

    #[inline(always)]
    fn load_pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::I16Pairs {
        cast(*values)
    }

    #[inline(always)]
    fn store_pairs(self, pairs: Self::I16Pairs, to: &mut [[i16; PAIR]; LANES]) {
        *to = cast(pairs);
    }

    /// The same pair in each lane.
    fn splat_pair(self, pair: [i16; PAIR]) -> Self::I16Pairs;
    /// `sum + a[0] * b[0] + a[1] * b[1]`
    fn dot_pairs(self, sum: Self::Int, a: Self::I16Pairs, b: Self::I16Pairs) -> Self::Int;

    #[inline(always)]
    fn load_quads(self, values: &[[i8; QUAD]; LANES]) -> Self::I8Quads {
        cast(*values)
    }

    #[inline(always)]
    fn store_quads(self, quads: Self::I8Quads, to: &mut [[i8; QUAD]; LANES]) {
        *to = cast(quads);
    }

    /// The same four values in each lane, none above 127.
    fn splat_quad(self, quad: [u8; QUAD]) -> Self::I8Quads;

    #[inline(always)]
    fn splat_signed_quad(self, quad: [i8; QUAD]) -> Self::I8Quads {
        self.splat_quad(cast(quad))
    }

    /// `sum` and four products of 7 with 8 bits; of 8 with 8, where there is a [`BYTE_OFFSET`](Self::BYTE_OFFSET).
    fn dot_quads(self, sum: Self::Int, a: Self::I8Quads, b: Self::I8Quads) -> Self::Int;
    /// The low and the high halves of bytes.
    fn unpack_nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::I8Quads; 2];
    fn zero_narrow(self) -> Self::NarrowSums;
    /// `sum` and four products of 4 with signed 8 bits. Half of the sum of eight calls fits 16 bits.
    fn dot_narrow(
        self,
        sum: Self::NarrowSums,
        a: Self::I8Quads,
        b: Self::I8Quads,
    ) -> Self::NarrowSums;
    fn reduce_narrow(self, sum: Self::NarrowSums) -> Self::Int;

    fn widen_quads(self, values: &[[i8; QUAD]; LANES]) -> Self::I16Quads;
    /// The first and the last pairs.
    fn split_pairs(self, quads: Self::I16Quads) -> [Self::I16Pairs; 2];
    fn splat_i16_quad(self, quad: [i16; QUAD]) -> Self::I16Quad;
    fn zero_partial(self) -> Self::PartialSums;
    /// `sum` and the four products in each lane.
    fn dot_i16_quads(
        self,
        sum: Self::PartialSums,
        a: Self::I16Quad,
        b: Self::I16Quads,
    ) -> Self::PartialSums;
    fn reduce_partial(self, sums: Self::PartialSums) -> Self::Int;

    fn splat_int(self, x: i32) -> Self::Int;
    /// 128 times each value.
    fn load_times_128(self, from: &[i16; LANES]) -> Self::Int;
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// `256 * high + low`
    fn join_bytes(self, high: Self::Int, low: Self::Int) -> Self::Int;

    fn to_float(self, x: Self::Int) -> Self::Float;
    /// Rounds values in the range of `i32` to the nearest integer, ties to even.
    fn round(self, x: Self::Float) -> Self::Int;
    /// Stores with saturation, as [`store_i8`](Self::store_i8) and [`store_u8`](Self::store_u8).
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]);
    fn store_i8(self, x: Self::Int, to: &mut [i8; LANES]);
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]);
    /// Stores the lowest bytes of four vectors, lane by lane.
    fn store_bytes(self, x: [Self::Int; QUAD], to: &mut [[u8; QUAD]; LANES]);
    /// 2 to the power of `x`, which is from -126 to 127.
    fn exp2(self, x: Self::Int) -> Self::Float;
    /// Rounds to the nearest whole number, ties to even.
    fn round_float(self, x: Self::Float) -> Self::Float;

    /// `x` times 2 to the power of `power`, a whole number from -126 to 127. The product must be no smaller than a
    /// normal number.
    #[inline(always)]
    fn mul_exp2(self, x: Self::Float, power: Self::Float) -> Self::Float {
        self.mul(x, self.exp2(self.round(power)))
    }

    fn splat(self, x: f32) -> Self::Float;
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Float {
        cast(*from)
    }

    #[inline(always)]
    fn store(self, x: Self::Float, to: &mut [f32; LANES]) {
        *to = cast(x);
    }

    /// Widens bfloat16 floats.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::Float;
    /// Widens finite half-precision floats.
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float;
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// The larger value, or `b` where one is not a number.
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The smaller value, or `b` where one is not a number.
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn abs(self, x: Self::Float) -> Self::Float;

    /// The largest lane, if all are numbers.
    #[inline(always)]
    fn reduce_max(self, x: Self::Float) -> f32 {
        // `f32::max` takes four instructions for what one does.
        self.reduce(x, |a, b| if a > b { a } else { b })
    }

    /// The smallest lane, if all are numbers.
    #[inline(always)]
    fn reduce_min(self, x: Self::Float) -> f32 {
        self.reduce(x, |a, b| if a < b { a } else { b })
    }

    /// Combines all lanes, the upper half with the lower first.
    #[inline(always)]
    fn reduce(self, x: Self::Float, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = f(lanes[i], lanes[i + half]);
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// A computation over any [`Lanes`].
///
/// `run` and everything that it calls must be `inline(always)`: other functions are compiled for any processor.
pub trait Kernel {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Instruction sets that kernels are compiled for, the least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum InstructionSet {
    /// What every processor has.
    Plain,
    /// AVX2 and FMA, or Neon.
    Avx2OrNeon,
    /// AVX-VNNI, or Neon with dot products.
    AvxVnniOrNeonDot,
    /// AVX-512 with VNNI.
    Avx512,
}

static LIMIT: AtomicU8 = AtomicU8::new(InstructionSet::Avx512 as u8);

/// From now on uses no more than these instructions in this process, to measure what a lesser processor would take.
/// What is computed stays the same.
///
/// To be called before there are [`Int8Buffer`](crate::Int8Buffer)s and others, whose layout depends on it.
pub fn limit_instructions(to: InstructionSet) {
    LIMIT.store(to as u8, Ordering::Relaxed);
}

/// Runs an expression for each instruction set that this processor has, the best first, [`Scalar`] excluded.
macro_rules! for_each_detected {
    (($lanes:ident, $set:ident) => $do:expr) => {
        #[cfg(target_arch = "x86_64")]
        {
            let $set = InstructionSet::Avx512;
            if let Some($lanes) = avx512::Avx512::detect() {
                $do;
            }
            let $set = InstructionSet::AvxVnniOrNeonDot;
            if let Some($lanes) = avx2::Avx2::<true>::detect() {
                $do;
            }
            let $set = InstructionSet::Avx2OrNeon;
            if let Some($lanes) = avx2::Avx2::<false>::detect() {
                $do;
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            let $set = InstructionSet::AvxVnniOrNeonDot;
            if let Some($lanes) = neon::NeonLanes::<true>::detect() {
                $do;
            }
            let $set = InstructionSet::Avx2OrNeon;
            if let Some($lanes) = neon::NeonLanes::<false>::detect() {
                $do;
            }
        }
    };
}

/// Runs a kernel with the best instruction set of this processor.
///
/// To be called on the thread that computes: a closure that another thread runs is compiled for any processor.
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    let limit = LIMIT.load(Ordering::Relaxed);
    for_each_detected!((lanes, set) => if set as u8 <= limit {
        return run(lanes, kernel);
    });
    run(Scalar, kernel)
}

/// Runs a kernel with each instruction set of this processor and checks that the results are the same.
#[cfg(test)]
pub fn run_on_all<K: Kernel<Output: PartialEq> + Clone>(kernel: K) -> K::Output {
    let scalar = run(Scalar, kernel.clone());
    for_each_detected!((lanes, _set) => {
        let name = std::any::type_name_of_val(&lanes);
        assert!(run(lanes, kernel.clone()) == scalar, "{name} gives something else");
    });
    scalar
}

#[inline(always)]
fn run<L: Lanes, K: Kernel>(lanes: L, kernel: K) -> K::Output {
    lanes.run(
        #[inline(always)]
        || kernel.run(lanes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Half<'a>(&'a [u16; LANES]);

    impl Kernel for Half<'_> {
        type Output = [u32; LANES];

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut lanes = [0.0; LANES];
            l.store(l.load_f16(self.0), &mut lanes);
            lanes.map(f32::to_bits)
        }
    }

    #[test]
    fn every_finite_half_is_widened_exactly() {
        let all: Vec<_> = (0..=u16::MAX)
            .filter(|bits| half::f16::from_bits(*bits).is_finite())
            .collect();
        for bits in all.as_chunks().0 {
            let expected = bits.map(|bits| half::f16::from_bits(bits).to_f32().to_bits());
            assert_eq!(run_on_all(Half(bits)), expected);
        }
    }

    /// Values at the ends of what each instruction set must hold.
    #[derive(Clone)]
    struct Ends;

    impl Kernel for Ends {
        type Output = Vec<[i32; LANES]>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut all = Vec::new();
            let mut keep = |x: L::Int| {
                // Nothing that a float can't hold.
                let mut lanes = [0.0; LANES];
                l.store(l.to_float(x), &mut lanes);
                all.push(lanes.map(|x| x as i32));
            };
            let zero = l.splat_int(0);
            for (i, weight) in [-128i8, -127, -1, 0, 1, 127].into_iter().enumerate() {
                let mut quads = [[weight; QUAD]; LANES];
                quads[i] = [1, -2, 3, -4];
                let fours = l.widen_quads(&quads);
                for x in [0u8, 1, 126, 127] {
                    let quad = [x, x, x / 2, x];
                    keep(l.dot_quads(
                        l.splat_int(i as i32),
                        l.splat_quad(quad),
                        l.load_quads(&quads),
                    ));
                    for word in [i16::from(x), 32767, -32767] {
                        let four = l.splat_i16_quad([word, -word, word, word]);
                        let parts = l.dot_i16_quads(l.zero_partial(), four, fours);
                        keep(l.reduce_partial(l.dot_i16_quads(parts, four, fours)));
                        for pairs in l.split_pairs(fours) {
                            keep(l.dot_pairs(zero, l.splat_pair([word, word - 1]), pairs));
                        }
                    }
                }
            }
            for byte in [0u8, 0x0f, 0xf0, 0xff, 0x1e] {
                let nibbles = [[byte, byte ^ 0xff, 0x78, 0x87]; LANES];
                for quads in l.unpack_nibbles(&nibbles) {
                    for x in [127i8, -127, 3] {
                        let mut narrow = l.zero_narrow();
                        for _ in 0..8 {
                            narrow =
                                l.dot_narrow(narrow, quads, l.splat_signed_quad([x, x, x, x / 2]));
                        }
                        keep(l.sub_int(l.reduce_narrow(narrow), l.splat_int(x.into())));
                    }
                    let mut stored = [[0; QUAD]; LANES];
                    l.store_quads(quads, &mut stored);
                    keep(l.dot_quads(zero, l.splat_quad([1, 0, 0, 2]), l.load_quads(&stored)));
                }
            }
            for (high, low) in [(0, 255), (-128, 255), (127, 0), (1 << 20, -(1 << 20))] {
                keep(l.join_bytes(l.splat_int(high), l.splat_int(low)));
            }
            for x in [0.5, 1.5, -0.5, -2.5, 127.49, 40000.0, -40000.0, 300.0] {
                let rounded = l.round(l.splat(x));
                keep(rounded);
                let (mut words, mut bytes, mut signed) = ([0; LANES], [0; LANES], [0; LANES]);
                l.store_i16(rounded, &mut words);
                l.store_u8(rounded, &mut bytes);
                l.store_i8(rounded, &mut signed);
                all_of(&mut keep, l, signed.map(i32::from));
                all_of(&mut keep, l, words.map(i32::from));
                all_of(&mut keep, l, bytes.map(i32::from));
            }
            all
        }
    }

    #[inline(always)]
    fn all_of<L: Lanes>(keep: &mut impl FnMut(L::Int), l: L, values: [i32; LANES]) {
        let values = values.map(|x| x as f32);
        keep(l.round(l.load(&values)));
    }

    #[test]
    fn integers_are_exact() {
        run_on_all(Ends);
    }

    #[derive(Clone)]
    struct Floats([f32; LANES], [f32; LANES]);

    impl Kernel for Floats {
        type Output = Vec<[u32; LANES]>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let (a, b) = (l.load(&self.0), l.load(&self.1));
            let power = l.round(l.min(l.max(a, l.splat(-126.0)), l.splat(127.0)));
            let all = [
                l.add(a, b),
                l.sub(a, b),
                l.mul(a, b),
                l.div(a, b),
                l.mul_add(a, b, a),
                l.max(a, b),
                l.min(a, b),
                l.abs(a),
                l.exp2(power),
                l.round_float(a),
                l.mul_exp2(
                    l.add(l.splat(1.0), l.abs(l.div(b, l.splat(300.0)))),
                    l.to_float(power),
                ),
            ];
            let bits = all.into_iter().map(
                #[inline(always)]
                |x| {
                    let mut lanes = [0.0; LANES];
                    l.store(x, &mut lanes);
                    lanes.map(f32::to_bits)
                },
            );
            bits.collect()
        }
    }

    #[test]
    fn floats_are_rounded_alike() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..1000 {
            let mut lanes = || std::array::from_fn(|_| (rng.f32() - 0.5) * 300.0);
            run_on_all(Floats(lanes(), lanes()));
        }
        // Not a number, where one of them is: the second.
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
            let all = run_on_all(Floats([a; LANES], [b; LANES]));
            for i in [5, 6] {
                assert_eq!(all[i], [b.to_bits(); LANES]);
            }
        }
    }
}
