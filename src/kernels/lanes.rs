//! Sixteen lanes of arithmetic, by what the processor has.
//!
//! Kernels are written once, over [`Lanes`]. Each way of computing them gives the same bits: integers are
//! exact, and floats are rounded at the same places, multiply-add once.

pub(crate) const LANES: usize = 16;
/// Neighbours of the inner dimension that come together in each lane: as 16 bits, and as 8.
pub(crate) const PAIR: usize = 2;
pub(crate) const QUAD: usize = 4;

pub(crate) trait Lanes: Copy + Send + Sync {
    /// `[i16; 2]` in each lane.
    type Pairs: Copy;
    /// `[i8; 4]`, or `[u8; 4]`, in each lane.
    type Quads: Copy;
    /// Four numbers of 16 bits.
    type Four: Copy;
    /// `[i16; 4]` in each lane.
    type Fours: Copy;
    /// Sums of such, not yet one in each lane.
    type Parts: Copy;
    /// `i32` in each lane.
    type Int: Copy;
    /// `f32` in each lane.
    type Float: Copy;

    /// Runs `f` compiled for this processor, with all that it inlines.
    fn run<T>(self, f: impl FnOnce() -> T) -> T;

    fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs;
    fn store_pairs(self, pairs: Self::Pairs, to: &mut [[i16; PAIR]; LANES]);
    /// The same in each lane.
    fn pair(self, pair: [i16; PAIR]) -> Self::Pairs;
    /// `sum + a[0] * b[0] + a[1] * b[1]`
    fn dot_pairs(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int;

    fn quads(self, values: &[[i8; QUAD]; LANES]) -> Self::Quads;
    /// From 4 bits, 8 standing for 0: the low halves of the bytes and the high ones.
    fn nibble_quads(self, values: &[[u8; QUAD]; LANES]) -> [Self::Quads; 2];
    /// The same in each lane, each up to 127.
    fn quad(self, quad: [u8; QUAD]) -> Self::Quads;
    /// `sum` and the four products of 7 with 8 bits.
    fn dot_quads(self, sum: Self::Int, a: Self::Quads, b: Self::Quads) -> Self::Int;

    fn widen(self, values: &[[i8; QUAD]; LANES]) -> Self::Fours;
    /// From 4 bits, each standing for itself: the low halves of the bytes and the high ones.
    fn nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::Fours; 2];
    /// First and last pairs of each.
    fn split(self, fours: Self::Fours) -> [Self::Pairs; 2];
    fn four(self, four: [i16; QUAD]) -> Self::Four;
    fn no_parts(self) -> Self::Parts;
    /// Adds the four products in each lane.
    fn dot_fours(self, sum: Self::Parts, a: Self::Four, b: Self::Fours) -> Self::Parts;
    fn whole(self, parts: Self::Parts) -> Self::Int;

    fn splat_int(self, x: i32) -> Self::Int;
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int;

    fn to_float(self, x: Self::Int) -> Self::Float;
    /// To the nearest, ties to even; of what fits.
    fn round(self, x: Self::Float) -> Self::Int;
    /// What doesn't fit is the nearest that does.
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]);
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]);
    /// 2 to this power, from -126 to 127.
    fn exp2(self, x: Self::Int) -> Self::Float;

    fn splat(self, x: f32) -> Self::Float;
    fn load(self, from: &[f32; LANES]) -> Self::Float;
    fn store(self, x: Self::Float, to: &mut [f32; LANES]);
    /// Of finite half-precision floats.
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float;
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// `b` where one is not a number.
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn abs(self, x: Self::Float) -> Self::Float;

    /// Of all lanes, halves first.
    #[inline(always)]
    fn fold(self, x: Self::Float, f: impl Fn(f32, f32) -> f32) -> f32 {
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

/// Something to compute with lanes of whatever kind. `run` and all that it calls are `inline(always)`:
/// what isn't, is compiled for any processor.
pub(crate) trait Kernel {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Computes it with the best lanes that there are. To be called on the thread that computes: a closure that
/// another one runs is compiled for any processor.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(lanes) = pulp::x86::V3::try_new() {
        return lanes.run(
            #[inline(always)]
            || kernel.run(lanes),
        );
    }
    Plain.run(|| kernel.run(Plain))
}

fn dot<const N: usize>(sum: i32, a: [i16; N], b: [i16; N]) -> i32 {
    let products = a
        .into_iter()
        .zip(b)
        .map(|(a, b)| i32::from(a) * i32::from(b));
    products.fold(sum, i32::wrapping_add)
}

/// What any processor can.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Lanes for Plain {
    type Pairs = [[i16; PAIR]; LANES];
    type Quads = [[i16; QUAD]; LANES];
    type Four = [i16; QUAD];
    type Fours = [[i16; QUAD]; LANES];
    type Parts = [i32; LANES];
    type Int = [i32; LANES];
    type Float = [f32; LANES];

    #[inline(always)]
    fn run<T>(self, f: impl FnOnce() -> T) -> T {
        f()
    }

    #[inline(always)]
    fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs {
        *values
    }

    #[inline(always)]
    fn store_pairs(self, pairs: Self::Pairs, to: &mut [[i16; PAIR]; LANES]) {
        *to = pairs;
    }

    #[inline(always)]
    fn pair(self, pair: [i16; PAIR]) -> Self::Pairs {
        [pair; LANES]
    }

    #[inline(always)]
    fn dot_pairs(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int {
        std::array::from_fn(|i| dot(sum[i], a[i], b[i]))
    }

    #[inline(always)]
    fn quads(self, values: &[[i8; QUAD]; LANES]) -> Self::Quads {
        self.widen(values)
    }

    #[inline(always)]
    fn nibble_quads(self, values: &[[u8; QUAD]; LANES]) -> [Self::Quads; 2] {
        self.nibbles(values)
            .map(|quads| quads.map(|quad| quad.map(|x| x - 8)))
    }

    #[inline(always)]
    fn quad(self, quad: [u8; QUAD]) -> Self::Quads {
        [quad.map(i16::from); LANES]
    }

    #[inline(always)]
    fn dot_quads(self, sum: Self::Int, a: Self::Quads, b: Self::Quads) -> Self::Int {
        std::array::from_fn(|i| dot(sum[i], a[i], b[i]))
    }

    #[inline(always)]
    fn widen(self, values: &[[i8; QUAD]; LANES]) -> Self::Fours {
        values.map(|quad| quad.map(i16::from))
    }

    #[inline(always)]
    fn nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::Fours; 2] {
        [
            values.map(|quad| quad.map(|value| i16::from(value & 15))),
            values.map(|quad| quad.map(|value| i16::from(value >> 4))),
        ]
    }

    #[inline(always)]
    fn split(self, fours: Self::Fours) -> [Self::Pairs; 2] {
        [
            fours.map(|[a, b, _, _]| [a, b]),
            fours.map(|[_, _, a, b]| [a, b]),
        ]
    }

    #[inline(always)]
    fn four(self, four: [i16; QUAD]) -> Self::Four {
        four
    }

    #[inline(always)]
    fn no_parts(self) -> Self::Parts {
        [0; LANES]
    }

    #[inline(always)]
    fn dot_fours(self, sum: Self::Parts, a: Self::Four, b: Self::Fours) -> Self::Parts {
        std::array::from_fn(|i| dot(sum[i], a, b[i]))
    }

    #[inline(always)]
    fn whole(self, parts: Self::Parts) -> Self::Int {
        parts
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Int {
        [x; LANES]
    }

    #[inline(always)]
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    fn to_float(self, x: Self::Int) -> Self::Float {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    fn round(self, x: Self::Float) -> Self::Int {
        x.map(|x| x.round_ties_even() as i32)
    }

    #[inline(always)]
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]) {
        *to = x.map(|x| x.clamp(i16::MIN.into(), i16::MAX.into()) as i16);
    }

    #[inline(always)]
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]) {
        *to = x.map(|x| x.clamp(0, u8::MAX.into()) as u8);
    }

    #[inline(always)]
    fn exp2(self, x: Self::Int) -> Self::Float {
        x.map(|x| f32::from_bits(((x + 127) as u32) << 23))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Float {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Float {
        *from
    }

    #[inline(always)]
    fn store(self, x: Self::Float, to: &mut [f32; LANES]) {
        *to = x;
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float {
        from.map(|bits| half::f16::from_bits(bits).to_f32_const())
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn abs(self, x: Self::Float) -> Self::Float {
        x.map(f32::abs)
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{__m128i, __m256, __m256i};

    use bytemuck::cast;
    use pulp::x86::V3;

    use super::{LANES, Lanes, PAIR, QUAD};

    /// The halves of sixteen lanes.
    #[inline(always)]
    fn both<T: Copy, U>([a0, a1]: [T; 2], [b0, b1]: [T; 2], f: impl Fn(T, T) -> U) -> [U; 2] {
        [f(a0, b0), f(a1, b1)]
    }

    /// Of four times four lanes.
    #[inline(always)]
    fn quarters<T: bytemuck::Pod>(values: T, f: impl Fn(__m128i) -> __m256i) -> [__m256i; 4] {
        let [a, b, c, d] = cast::<_, [__m128i; 4]>(values);
        [f(a), f(b), f(c), f(d)]
    }

    #[inline(always)]
    fn each<T, U>([a0, a1]: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
        [f(a0), f(a1)]
    }

    impl Lanes for V3 {
        type Pairs = [__m256i; 2];
        type Quads = [__m256i; 2];
        type Four = __m256i;
        type Fours = [__m256i; 4];
        /// Two sums beside each other in each of sixteen lanes.
        type Parts = [__m256i; 4];
        type Int = [__m256i; 2];
        type Float = [__m256; 2];

        #[inline(always)]
        fn run<T>(self, f: impl FnOnce() -> T) -> T {
            self.vectorize(f)
        }

        #[inline(always)]
        fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs {
            cast(*values)
        }

        #[inline(always)]
        fn store_pairs(self, pairs: Self::Pairs, to: &mut [[i16; PAIR]; LANES]) {
            *to = cast(pairs);
        }

        #[inline(always)]
        fn pair(self, pair: [i16; PAIR]) -> Self::Pairs {
            [self.avx._mm256_set1_epi32(cast(pair)); 2]
        }

        #[inline(always)]
        fn dot_pairs(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int {
            let products = both(a, b, |a, b| self.avx2._mm256_madd_epi16(a, b));
            both(sum, products, |a, b| self.avx2._mm256_add_epi32(a, b))
        }

        #[inline(always)]
        fn quads(self, values: &[[i8; QUAD]; LANES]) -> Self::Quads {
            cast(*values)
        }

        #[inline(always)]
        fn nibble_quads(self, values: &[[u8; QUAD]; LANES]) -> [Self::Quads; 2] {
            let bytes = cast::<_, [__m256i; 2]>(*values);
            let (mask, eight) = (self.avx._mm256_set1_epi8(15), self.avx._mm256_set1_epi8(8));
            let high = each(bytes, |x| self.avx2._mm256_srli_epi16::<4>(x));
            each([bytes, high], |nibbles| {
                each(nibbles, |x| {
                    let nibbles = self.avx2._mm256_and_si256(x, mask);
                    self.avx2._mm256_sub_epi8(nibbles, eight)
                })
            })
        }

        #[inline(always)]
        fn quad(self, quad: [u8; QUAD]) -> Self::Quads {
            [self.avx._mm256_set1_epi32(cast(quad)); 2]
        }

        #[inline(always)]
        fn dot_quads(self, sum: Self::Int, a: Self::Quads, b: Self::Quads) -> Self::Int {
            let one = self.avx._mm256_set1_epi16(1);
            // Two products of 7 with 8 bits fit 16.
            let pairs = both(a, b, |a, b| self.avx2._mm256_maddubs_epi16(a, b));
            let products = each(pairs, |x| self.avx2._mm256_madd_epi16(x, one));
            both(sum, products, |a, b| self.avx2._mm256_add_epi32(a, b))
        }

        #[inline(always)]
        fn widen(self, values: &[[i8; QUAD]; LANES]) -> Self::Fours {
            quarters(*values, |quarter| self.avx2._mm256_cvtepi8_epi16(quarter))
        }

        #[inline(always)]
        fn nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::Fours; 2] {
            let mask = self.avx._mm256_set1_epi16(15);
            let bytes = |quarter| self.avx2._mm256_cvtepu8_epi16(quarter);
            [
                quarters(*values, |x| self.avx2._mm256_and_si256(bytes(x), mask)),
                quarters(*values, |x| self.avx2._mm256_srli_epi16::<4>(bytes(x))),
            ]
        }

        #[inline(always)]
        fn split(self, fours: Self::Fours) -> [Self::Pairs; 2] {
            let [a, b, c, d] = cast::<_, [__m256; 4]>(fours);
            let halves = [[a, b], [c, d]];
            // Of each half's low and high quarters, the other way round.
            let order = |x| {
                let x = cast(x);
                self.avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(x)
            };
            let first = |[a, b]: [__m256; 2]| self.avx._mm256_shuffle_ps::<0b10_00_10_00>(a, b);
            let last = |[a, b]: [__m256; 2]| self.avx._mm256_shuffle_ps::<0b11_01_11_01>(a, b);
            [
                each(halves, |half| order(first(half))),
                each(halves, |half| order(last(half))),
            ]
        }

        #[inline(always)]
        fn four(self, four: [i16; QUAD]) -> Self::Four {
            self.avx._mm256_set1_epi64x(cast(four))
        }

        #[inline(always)]
        fn no_parts(self) -> Self::Parts {
            [self.avx._mm256_setzero_si256(); 4]
        }

        #[inline(always)]
        fn dot_fours(self, sum: Self::Parts, a: Self::Four, b: Self::Fours) -> Self::Parts {
            let [s0, s1, s2, s3] = sum;
            let [b0, b1, b2, b3] = b;
            let add = |sum, b| {
                let products = self.avx2._mm256_madd_epi16(a, b);
                self.avx2._mm256_add_epi32(sum, products)
            };
            [add(s0, b0), add(s1, b1), add(s2, b2), add(s3, b3)]
        }

        #[inline(always)]
        fn whole(self, [p0, p1, p2, p3]: Self::Parts) -> Self::Int {
            // Of each half's low and high quarters, the other way round.
            let low = self.avx2._mm256_hadd_epi32(p0, p1);
            let high = self.avx2._mm256_hadd_epi32(p2, p3);
            [
                self.avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(low),
                self.avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(high),
            ]
        }

        #[inline(always)]
        fn splat_int(self, x: i32) -> Self::Int {
            [self.avx._mm256_set1_epi32(x); 2]
        }

        #[inline(always)]
        fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int {
            both(a, b, |a, b| self.avx2._mm256_sub_epi32(a, b))
        }

        #[inline(always)]
        fn to_float(self, x: Self::Int) -> Self::Float {
            each(x, |x| self.avx._mm256_cvtepi32_ps(x))
        }

        #[inline(always)]
        fn round(self, x: Self::Float) -> Self::Int {
            each(x, |x| self.avx._mm256_cvtps_epi32(x))
        }

        #[inline(always)]
        fn store_i16(self, [low, high]: Self::Int, to: &mut [i16; LANES]) {
            // Of each half's low and high quarters, the other way round.
            let packed = self.avx2._mm256_packs_epi32(low, high);
            *to = cast(self.avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }

        #[inline(always)]
        fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]) {
            let mut words = [0i16; LANES];
            self.store_i16(x, &mut words);
            let [low, high] = cast::<_, [__m128i; 2]>(words);
            *to = cast(self.sse2._mm_packus_epi16(low, high));
        }

        #[inline(always)]
        fn exp2(self, x: Self::Int) -> Self::Float {
            let bias = self.avx._mm256_set1_epi32(127);
            each(x, |x| {
                let exponent = self.avx2._mm256_add_epi32(x, bias);
                cast(self.avx2._mm256_slli_epi32::<23>(exponent))
            })
        }

        #[inline(always)]
        fn splat(self, x: f32) -> Self::Float {
            [self.avx._mm256_set1_ps(x); 2]
        }

        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> Self::Float {
            cast(*from)
        }

        #[inline(always)]
        fn store(self, x: Self::Float, to: &mut [f32; LANES]) {
            *to = cast(x);
        }

        #[inline(always)]
        fn load_f16(self, from: &[u16; LANES]) -> Self::Float {
            // Exponent and mantissa where a float has them, then the exponent as high as it counts.
            let scale = self.avx._mm256_set1_ps(f32::from_bits((127 + 112) << 23));
            let rest = self.avx._mm256_set1_epi32(0x7fff);
            each(cast::<_, [__m128i; 2]>(*from), |half| {
                let bits = self.avx2._mm256_cvtepu16_epi32(half);
                let value = self
                    .avx2
                    ._mm256_slli_epi32::<13>(self.avx2._mm256_and_si256(bits, rest));
                let sign = self
                    .avx2
                    ._mm256_slli_epi32::<16>(self.avx2._mm256_andnot_si256(rest, bits));
                let float = self.avx._mm256_mul_ps(cast(value), scale);
                self.avx._mm256_or_ps(float, cast(sign))
            })
        }

        #[inline(always)]
        fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
            both(a, b, |a, b| self.avx._mm256_add_ps(a, b))
        }

        #[inline(always)]
        fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
            both(a, b, |a, b| self.avx._mm256_sub_ps(a, b))
        }

        #[inline(always)]
        fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
            both(a, b, |a, b| self.avx._mm256_mul_ps(a, b))
        }

        #[inline(always)]
        fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
            both(a, b, |a, b| self.avx._mm256_div_ps(a, b))
        }

        #[inline(always)]
        fn mul_add(
            self,
            [a0, a1]: Self::Float,
            [b0, b1]: Self::Float,
            c: Self::Float,
        ) -> Self::Float {
            let [c0, c1] = c;
            [
                self.fma._mm256_fmadd_ps(a0, b0, c0),
                self.fma._mm256_fmadd_ps(a1, b1, c1),
            ]
        }

        #[inline(always)]
        fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
            both(a, b, |a, b| self.avx._mm256_max_ps(a, b))
        }

        #[inline(always)]
        fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
            both(a, b, |a, b| self.avx._mm256_min_ps(a, b))
        }

        #[inline(always)]
        fn abs(self, x: Self::Float) -> Self::Float {
            let sign = self.avx._mm256_set1_ps(-0.0);
            each(x, |x| self.avx._mm256_andnot_ps(sign, x))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Half<'a>(&'a [u16; LANES]);

    impl Kernel for Half<'_> {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut lanes = [0.0; LANES];
            l.store(l.load_f16(self.0), &mut lanes);
            lanes
        }
    }

    #[test]
    fn every_half_is_itself() {
        let all: Vec<_> = (0..=u16::MAX)
            .filter(|bits| half::f16::from_bits(*bits).is_finite())
            .collect();
        for bits in all.as_chunks().0 {
            let expected = bits.map(|bits| half::f16::from_bits(bits).to_f32().to_bits());
            assert_eq!(dispatch(Half(bits)).map(f32::to_bits), expected);
            assert_eq!(Half(bits).run(Plain).map(f32::to_bits), expected);
        }
    }
}
