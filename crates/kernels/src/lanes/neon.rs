#![allow(
    unsafe_code,
    reason = "instructions that pulp has no safe functions for"
)]

use std::arch::{
    aarch64::{
        float32x4_t, int8x16_t, int16x4_t, int16x8_t, int32x4_t, uint8x16_t, uint16x4_t, uint16x8_t,
    },
    asm,
};

use bytemuck::cast;
use pulp::aarch64::Neon;

use super::{LANES, Lanes, PAIR, QUAD};

/// Neon; with `DOT`, also its dot products of bytes.
#[derive(Clone, Copy)]
pub struct NeonLanes<const DOT: bool>(Neon);

impl<const DOT: bool> NeonLanes<DOT> {
    pub fn detect() -> Option<Self> {
        let is_there = !DOT || std::arch::is_aarch64_feature_detected!("dotprod");
        Neon::try_new().filter(|_| is_there).map(Self)
    }

    /// Sums of two neighbouring products of `i16`.
    #[inline(always)]
    fn products(self, a: int16x8_t, b: int16x8_t) -> int32x4_t {
        let neon = self.0.neon;
        let low = neon.vmull_s16(neon.vget_low_s16(a), neon.vget_low_s16(b));
        let high = neon.vmull_high_s16(a, b);
        neon.vpaddq_s32(low, high)
    }

    /// `sum` and the four products of 7 with 8 bits.
    #[inline(always)]
    fn dot_u8_i8(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        if DOT {
            let mut sum = sum;
            // SAFETY: `detect` has found the instruction, which is no intrinsic of stable Rust yet.
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                    inout(vreg) sum,
                    in(vreg) a,
                    in(vreg) b,
                    options(pure, nomem, nostack)
                );
            }
            return sum;
        }
        let neon = self.0.neon;
        let low = neon.vmull_s8(neon.vget_low_s8(a), neon.vget_low_s8(b));
        let high = neon.vmull_high_s8(a, b);
        // Two products of 7 with 8 bits fit 16.
        neon.vpadalq_s16(sum, neon.vpaddq_s16(low, high))
    }
}

#[inline(always)]
fn map<T, U>([a, b, c, d]: [T; 4], f: impl Fn(T) -> U) -> [U; 4] {
    [f(a), f(b), f(c), f(d)]
}

#[inline(always)]
fn map2<T, U>(a: [T; 4], b: [T; 4], f: impl Fn(T, T) -> U) -> [U; 4] {
    let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a, b);
    [f(a0, b0), f(a1, b1), f(a2, b2), f(a3, b3)]
}

#[inline(always)]
fn map3<S, T, U>(sum: [S; 4], a: [T; 4], b: [T; 4], f: impl Fn(S, T, T) -> U) -> [U; 4] {
    let ([s0, s1, s2, s3], [a0, a1, a2, a3], [b0, b1, b2, b3]) = (sum, a, b);
    [f(s0, a0, b0), f(s1, a1, b1), f(s2, a2, b2), f(s3, a3, b3)]
}

impl<const DOT: bool> Lanes for NeonLanes<DOT> {
    const MANY_REGISTERS: bool = false;
    const BYTE_OFFSET: Option<u8> = if DOT { Some(0) } else { None };

    type I16Pairs = [int16x8_t; 4];
    type I8Quads = [int8x16_t; 4];
    type I16Quad = int16x8_t;
    type I16Quads = [int16x8_t; 8];
    /// Two sums in each lane.
    type PartialSums = [int32x4_t; 8];
    type NarrowSums = [int32x4_t; 4];
    type Int = [int32x4_t; 4];
    type Float = [float32x4_t; 4];

    #[inline(always)]
    fn run<T>(self, f: impl FnOnce() -> T) -> T {
        self.0.vectorize(f)
    }

    #[inline(always)]
    fn splat_pair(self, pair: [i16; PAIR]) -> Self::I16Pairs {
        [cast(self.0.neon.vdupq_n_s32(cast(pair))); 4]
    }

    #[inline(always)]
    fn dot_pairs(self, sum: Self::Int, a: Self::I16Pairs, b: Self::I16Pairs) -> Self::Int {
        map3(sum, a, b, |sum, a, b| {
            self.0.neon.vaddq_s32(sum, self.products(a, b))
        })
    }

    #[inline(always)]
    fn unpack_nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::I8Quads; 2] {
        let neon = self.0.neon;
        let bytes = cast::<_, [uint8x16_t; 4]>(*values);
        [
            map(bytes, |x| cast(neon.vandq_u8(x, neon.vdupq_n_u8(15)))),
            map(bytes, |x| cast(neon.vshrq_n_u8::<4>(x))),
        ]
    }

    #[inline(always)]
    fn splat_quad(self, quad: [u8; QUAD]) -> Self::I8Quads {
        [cast(self.0.neon.vdupq_n_s32(cast(quad))); 4]
    }

    #[inline(always)]
    fn dot_quads(self, sum: Self::Int, a: Self::I8Quads, b: Self::I8Quads) -> Self::Int {
        map3(sum, a, b, |sum, a, b| self.dot_u8_i8(sum, a, b))
    }

    #[inline(always)]
    fn zero_narrow(self) -> Self::NarrowSums {
        self.splat_int(0)
    }

    #[inline(always)]
    fn dot_narrow(
        self,
        sum: Self::NarrowSums,
        a: Self::I8Quads,
        b: Self::I8Quads,
    ) -> Self::NarrowSums {
        self.dot_quads(sum, a, b)
    }

    #[inline(always)]
    fn reduce_narrow(self, sum: Self::NarrowSums) -> Self::Int {
        sum
    }

    #[inline(always)]
    fn widen_quads(self, values: &[[i8; QUAD]; LANES]) -> Self::I16Quads {
        let neon = self.0.neon;
        let words = map(cast::<_, [int8x16_t; 4]>(*values), |x| {
            [neon.vmovl_s8(neon.vget_low_s8(x)), neon.vmovl_high_s8(x)]
        });
        cast(words)
    }

    #[inline(always)]
    fn split_pairs(self, fours: Self::I16Quads) -> [Self::I16Pairs; 2] {
        let neon = self.0.neon;
        let [a, b, c, d] = cast::<_, [[int32x4_t; 2]; 4]>(fours);
        [
            map([a, b, c, d], |[x, y]| cast(neon.vuzp1q_s32(x, y))),
            map([a, b, c, d], |[x, y]| cast(neon.vuzp2q_s32(x, y))),
        ]
    }

    #[inline(always)]
    fn splat_i16_quad(self, four: [i16; QUAD]) -> Self::I16Quad {
        cast(self.0.neon.vdupq_n_s64(cast(four)))
    }

    #[inline(always)]
    fn zero_partial(self) -> Self::PartialSums {
        [self.0.neon.vdupq_n_s32(0); 8]
    }

    #[inline(always)]
    fn dot_i16_quads(
        self,
        sum: Self::PartialSums,
        a: Self::I16Quad,
        b: Self::I16Quads,
    ) -> Self::PartialSums {
        let mut parts = sum;
        for (part, b) in parts.iter_mut().zip(b) {
            *part = self.0.neon.vaddq_s32(*part, self.products(a, b));
        }
        parts
    }

    #[inline(always)]
    fn reduce_partial(self, parts: Self::PartialSums) -> Self::Int {
        map(cast::<_, [[int32x4_t; 2]; 4]>(parts), |[a, b]| {
            self.0.neon.vpaddq_s32(a, b)
        })
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Int {
        [self.0.neon.vdupq_n_s32(x); 4]
    }

    #[inline(always)]
    fn load_times_128(self, from: &[i16; LANES]) -> Self::Int {
        let neon = self.0.neon;
        map(cast::<_, [int16x4_t; 4]>(*from), |four| {
            neon.vshlq_n_s32::<7>(neon.vmovl_s16(four))
        })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::Float {
        let neon = self.0.neon;
        map(cast::<_, [uint16x4_t; 4]>(*from), |four| {
            cast(neon.vshlq_n_u32::<16>(neon.vmovl_u16(four)))
        })
    }

    #[inline(always)]
    fn store_bytes(self, [a, b, c, d]: [Self::Int; QUAD], to: &mut [[u8; QUAD]; LANES]) {
        let neon = self.0.neon;
        let byte = neon.vdupq_n_s32(255);
        let [a, b, c] = [a, b, c].map(
            #[inline(always)]
            |x| map(x, |x| neon.vandq_s32(x, byte)),
        );
        let or = |a, b| map2(a, b, |a, b| neon.vorrq_s32(a, b));
        let low = or(a, map(b, |x| neon.vshlq_n_s32::<8>(x)));
        let high = or(
            map(c, |x| neon.vshlq_n_s32::<16>(x)),
            map(d, |x| neon.vshlq_n_s32::<24>(x)),
        );
        *to = cast(or(low, high));
    }

    #[inline(always)]
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int {
        map2(a, b, |a, b| self.0.neon.vsubq_s32(a, b))
    }

    #[inline(always)]
    fn join_bytes(self, high: Self::Int, low: Self::Int) -> Self::Int {
        map2(high, low, |high, low| {
            let high = self.0.neon.vshlq_n_s32::<8>(high);
            self.0.neon.vaddq_s32(high, low)
        })
    }

    #[inline(always)]
    fn to_float(self, x: Self::Int) -> Self::Float {
        map(x, |x| self.0.neon.vcvtq_f32_s32(x))
    }

    #[inline(always)]
    fn round(self, x: Self::Float) -> Self::Int {
        map(x, |x| self.0.neon.vcvtnq_s32_f32(x))
    }

    #[inline(always)]
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]) {
        *to = cast::<[int16x4_t; 4], _>(map(x, |x| self.0.neon.vqmovn_s32(x)));
    }

    #[inline(always)]
    fn store_i8(self, x: Self::Int, to: &mut [i8; LANES]) {
        let neon = self.0.neon;
        let words = cast::<[int16x4_t; 4], [int16x8_t; 2]>(map(x, |x| neon.vqmovn_s32(x)));
        *to = cast([neon.vqmovn_s16(words[0]), neon.vqmovn_s16(words[1])]);
    }

    #[inline(always)]
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]) {
        let neon = self.0.neon;
        let words = cast::<[uint16x4_t; 4], [uint16x8_t; 2]>(map(x, |x| neon.vqmovun_s32(x)));
        *to = cast([neon.vqmovn_u16(words[0]), neon.vqmovn_u16(words[1])]);
    }

    #[inline(always)]
    fn exp2(self, x: Self::Int) -> Self::Float {
        let neon = self.0.neon;
        map(x, |x| {
            let exponent = neon.vaddq_s32(x, neon.vdupq_n_s32(127));
            cast(neon.vshlq_n_s32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn round_float(self, x: Self::Float) -> Self::Float {
        map(x, |x| self.0.neon.vrndnq_f32(x))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Float {
        [self.0.neon.vdupq_n_f32(x); 4]
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float {
        let neon = self.0.neon;
        // Exponent and mantissa where a float has them, then the exponent as high as it counts.
        let scale = neon.vdupq_n_f32(f32::from_bits((127 + 112) << 23));
        map(cast::<_, [uint16x4_t; 4]>(*from), |half| {
            let bits = neon.vmovl_u16(half);
            let rest = neon.vandq_u32(bits, neon.vdupq_n_u32(0x7fff));
            let sign = neon.vandq_u32(bits, neon.vdupq_n_u32(0x8000));
            let float = neon.vmulq_f32(cast(neon.vshlq_n_u32::<13>(rest)), scale);
            let sign = neon.vshlq_n_u32::<16>(sign);
            cast(neon.vorrq_u32(cast(float), sign))
        })
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.neon.vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.neon.vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.neon.vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.neon.vdivq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        map3(c, a, b, |c, a, b| self.0.neon.vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        let neon = self.0.neon;
        map2(a, b, |a, b| neon.vbslq_f32(neon.vcgtq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        let neon = self.0.neon;
        map2(a, b, |a, b| neon.vbslq_f32(neon.vcltq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn abs(self, x: Self::Float) -> Self::Float {
        map(x, |x| self.0.neon.vabsq_f32(x))
    }
}
