//! Sixteen lanes of arithmetic, by what the processor has.
//!
//! Kernels are written once, over [`Lanes`]. Each way of computing them gives the same bits: integers are
//! exact, and floats are rounded at the same places, multiply-add once.

/// Two neighbours of the inner dimension, of each lane.
pub(crate) const PAIR: usize = 2;
pub(crate) const LANES: usize = 16;

pub(crate) trait Lanes: Copy + Send + Sync {
    /// `[i16; 2]` in each lane.
    type Pairs: Copy;
    /// `i32` in each lane.
    type Int: Copy;
    /// `f32` in each lane.
    type Float: Copy;

    /// Rows of a product that are accumulated at once: as many as there are registers for.
    const ROWS: usize;

    /// Runs `f` compiled for this processor, with all that it inlines.
    fn run<T>(self, f: impl FnOnce() -> T) -> T;

    fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs;
    fn widen(self, values: &[[i8; PAIR]; LANES]) -> Self::Pairs;
    /// From 4 bits, 8 standing for 0: the low halves of the bytes and the high ones.
    fn nibbles(self, values: &[[u8; PAIR]; LANES]) -> [Self::Pairs; 2];
    /// The same in each lane.
    fn pair(self, pair: [i16; PAIR]) -> Self::Pairs;
    fn zero(self) -> Self::Int;
    /// `sum + a[0] * b[0] + a[1] * b[1]`
    fn dot(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int;

    fn to_float(self, x: Self::Int) -> Self::Float;
    /// To the nearest, ties to even; of what fits.
    fn round(self, x: Self::Float) -> Self::Int;
    /// What doesn't fit is the nearest that does.
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]);
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

/// What any processor can.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Lanes for Plain {
    type Pairs = [[i16; PAIR]; LANES];
    type Int = [i32; LANES];
    type Float = [f32; LANES];

    const ROWS: usize = 4;

    #[inline(always)]
    fn run<T>(self, f: impl FnOnce() -> T) -> T {
        f()
    }

    #[inline(always)]
    fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs {
        *values
    }

    #[inline(always)]
    fn widen(self, values: &[[i8; PAIR]; LANES]) -> Self::Pairs {
        values.map(|pair| pair.map(i16::from))
    }

    #[inline(always)]
    fn nibbles(self, values: &[[u8; PAIR]; LANES]) -> [Self::Pairs; 2] {
        [
            values.map(|pair| pair.map(|value| i16::from(value & 15) - 8)),
            values.map(|pair| pair.map(|value| i16::from(value >> 4) - 8)),
        ]
    }

    #[inline(always)]
    fn pair(self, pair: [i16; PAIR]) -> Self::Pairs {
        [pair; LANES]
    }

    #[inline(always)]
    fn zero(self) -> Self::Int {
        [0; LANES]
    }

    #[inline(always)]
    fn dot(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int {
        let product = |i: usize, j: usize| i32::from(a[i][j]) * i32::from(b[i][j]);
        std::array::from_fn(|i| {
            sum[i]
                .wrapping_add(product(i, 0))
                .wrapping_add(product(i, 1))
        })
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

    use super::{LANES, Lanes, PAIR};

    /// The halves of sixteen lanes.
    #[inline(always)]
    fn both<T: Copy, U>([a0, a1]: [T; 2], [b0, b1]: [T; 2], f: impl Fn(T, T) -> U) -> [U; 2] {
        [f(a0, b0), f(a1, b1)]
    }

    #[inline(always)]
    fn each<T, U>([a0, a1]: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
        [f(a0), f(a1)]
    }

    impl Lanes for V3 {
        type Pairs = [__m256i; 2];
        type Int = [__m256i; 2];
        type Float = [__m256; 2];

        const ROWS: usize = 6;

        #[inline(always)]
        fn run<T>(self, f: impl FnOnce() -> T) -> T {
            self.vectorize(f)
        }

        #[inline(always)]
        fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs {
            cast(*values)
        }

        #[inline(always)]
        fn widen(self, values: &[[i8; PAIR]; LANES]) -> Self::Pairs {
            each(cast::<_, [__m128i; 2]>(*values), |half| {
                self.avx2._mm256_cvtepi8_epi16(half)
            })
        }

        #[inline(always)]
        fn nibbles(self, values: &[[u8; PAIR]; LANES]) -> [Self::Pairs; 2] {
            let halves = cast::<_, [__m128i; 2]>(*values);
            let bytes = each(halves, |half| self.avx2._mm256_cvtepu8_epi16(half));
            let (mask, eight) = (
                self.avx._mm256_set1_epi16(15),
                self.avx._mm256_set1_epi16(8),
            );
            let low = each(bytes, |x| self.avx2._mm256_and_si256(x, mask));
            let high = each(bytes, |x| self.avx2._mm256_srli_epi16::<4>(x));
            each([low, high], |nibbles| {
                each(nibbles, |x| self.avx2._mm256_sub_epi16(x, eight))
            })
        }

        #[inline(always)]
        fn pair(self, pair: [i16; PAIR]) -> Self::Pairs {
            [self.avx._mm256_set1_epi32(cast(pair)); 2]
        }

        #[inline(always)]
        fn zero(self) -> Self::Int {
            [self.avx._mm256_setzero_si256(); 2]
        }

        #[inline(always)]
        fn dot(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int {
            let products = both(a, b, |a, b| self.avx2._mm256_madd_epi16(a, b));
            both(sum, products, |a, b| self.avx2._mm256_add_epi32(a, b))
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
