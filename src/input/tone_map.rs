//! Tone mapping of high dynamic range and wide gamut to sRGB.
//!
//! Linear light is in units of reference white, 203 cd/m² (ITU-R BT.2408). Light up to reference white is kept. Highlights
//! are compressed by the curve of ITU-R BT.2390 from the picture's own peak, so that a picture without highlights is
//! the same as its SDR version.

use gst_video::{VideoColorPrimaries, VideoColorimetry, VideoTransferFunction};

use crate::input::alpha::{AlphaMode, compose};

/// Reference white and the peaks of PQ and of the nominal HLG display, in cd/m².
const WHITE: f64 = 203.0;
const PQ_PEAK: f64 = 10_000.0;
const HLG_PEAK: f64 = 1_000.0;
/// Fraction of the pixels that may be brighter than the peak, so that a glint doesn't dim the rest.
const ABOVE_PEAK: f64 = 0.001;

/// Number of pixels that are sampled for the peak.
const PEAK_SAMPLES: usize = 1 << 16;

/// Sizes of the tables from code values to light, and from light to code values.
const CODES: usize = 1 << 12;
const LIGHTS: usize = 1 << 14;

/// Maps pixels of one colorimetry, of 16 bits per component, to sRGB.
#[derive(Debug)]
pub(crate) struct ToneMap {
    /// Light of each code value: of the display or, for HLG, of the scene.
    light: Vec<f32>,
    /// Gain of the light of an HLG scene, over its luminance.
    ootf: Option<Curve>,
    to_bt709: [[f32; 3]; 3],
    is_hdr: bool,
    /// Code value of light from 0 to 1.
    codes: Vec<u8>,
}

impl ToneMap {
    /// `None` if the colorimetry needs no mapping. `white` is the largest code value, usually 1.
    pub(crate) fn new(colorimetry: &VideoColorimetry, white: f64) -> Option<Self> {
        use VideoTransferFunction::{AribStdB67, Bt202012, Smpte2084};
        let transfer = colorimetry.transfer();
        let is_hdr = matches!(transfer, Smpte2084 | AribStdB67);
        let to_bt709 = match colorimetry.primaries() {
            // Also GStreamer's guess for large pictures without a colorimetry.
            VideoColorPrimaries::Bt2020 if transfer == Bt202012 => return None,
            VideoColorPrimaries::Bt2020 => BT2020,
            VideoColorPrimaries::Smpterp431 | VideoColorPrimaries::Smpteeg432 => P3,
            VideoColorPrimaries::Unknown if is_hdr => BT2020,
            _ if is_hdr => IDENTITY,
            _ => return None,
        };
        let light = |code: f64| match transfer {
            Smpte2084 => pq_light(code) * PQ_PEAK / WHITE,
            AribStdB67 => hlg_scene(code),
            _ => srgb_light(code),
        };
        let code = |i: usize| (i as f64 / (CODES - 1) as f64 / white).min(1.0);
        let back = |i: usize| (srgb_code(i as f64 / (LIGHTS - 1) as f64) * 255.0).round() as u8;
        let ootf = |luminance: f64| luminance.powf(0.2) * HLG_PEAK / WHITE;
        Some(Self {
            light: (0..CODES).map(|i| light(code(i)) as f32).collect(),
            ootf: (transfer == AribStdB67).then(|| Curve::new(ootf)),
            to_bt709,
            is_hdr,
            codes: (0..LIGHTS).map(back).collect(),
        })
    }

    /// Appends ARGB pixels as RGB, mapped and composed on white.
    pub(crate) fn map(&self, argb: &[u8], mode: AlphaMode, rgb: &mut Vec<u8>) {
        let pixels = || argb.as_chunks::<2>().0.as_chunks::<4>().0.iter();
        let highlights = match self.is_hdr {
            true => self.highlights(pixels().step_by(pixels().len() / PEAK_SAMPLES + 1), mode),
            false => None,
        };
        let start = rgb.len();
        rgb.resize(start + pixels().len() * 3, 0);
        for (rgb, pixel) in rgb[start..].as_chunks_mut::<3>().0.iter_mut().zip(pixels()) {
            let (mut light, alpha) = self.light(pixel, mode);
            if let Some(highlights) = &highlights {
                let gain = highlights.at(brightest(light));
                light = light.map(|light| light * gain);
            }
            *rgb = light.map(|light| self.codes[light_index(light)]);
            if alpha < u8::MAX {
                *rgb = rgb.map(|code| compose(code, alpha, AlphaMode::Straight));
            }
        }
    }

    /// Light of the display in BT.709 primaries, and alpha.
    fn light(&self, pixel: &[[u8; 2]; 4], mode: AlphaMode) -> ([f32; 3], u8) {
        let [alpha, red, green, blue] = pixel.map(u16::from_ne_bytes);
        let light = [red, green, blue].map(|code| {
            let code = match (mode, alpha) {
                (AlphaMode::Premultiplied, 1..) => u32::from(code) * 0xffff / u32::from(alpha),
                _ => code.into(),
            };
            self.light[(code as usize >> 4).min(CODES - 1)]
        });
        let gain = self
            .ootf
            .as_ref()
            .map_or(1.0, |ootf| ootf.at(weigh(light, BT2020_LUMINANCE)));
        let row = |row| gain * weigh(light, row);
        let alpha = match mode {
            AlphaMode::Opaque => u8::MAX,
            _ => (alpha >> 8) as u8,
        };
        (self.to_bt709.map(row), alpha)
    }

    /// Gain that compresses highlights, over the brightest component of a pixel. `None` if no pixel is brighter than
    /// white.
    fn highlights<'a>(
        &self,
        pixels: impl ExactSizeIterator<Item = &'a [[u8; 2]; 4]>,
        mode: AlphaMode,
    ) -> Option<Curve> {
        let above_peak = (pixels.len() as f64 * ABOVE_PEAK) as u32;
        let mut counts = [0u32; Curve::STEPS];
        for pixel in pixels {
            let (light, alpha) = self.light(pixel, mode);
            // Colours of nearly transparent pixels are inexact.
            if alpha > 127 {
                // Luminance, because subsampled chroma makes components at edges too bright.
                counts[Curve::step(weigh(light, BT709_LUMINANCE))] += 1;
            }
        }
        let mut brighter = 0;
        let peak = counts.iter().rposition(|count| {
            brighter += count;
            brighter > above_peak
        });
        let peak = Curve::light(peak?);
        (peak > 1.0).then(|| {
            let curve = ToneCurve::new(peak);
            Curve::new(|light| curve.light(light) / light)
        })
    }
}

/// Index of light in a table of [`LIGHTS`]. Clips light that is out of gamut.
fn light_index(light: f32) -> usize {
    // The lower bits of a float this large count in ones, which is faster than a conversion.
    const ONES: f32 = (1 << 23) as f32;
    let index = light.clamp(0.0, 1.0) * (LIGHTS - 1) as f32 + ONES;
    index.to_bits() as usize % LIGHTS
}

fn weigh(light: [f32; 3], shares: [f32; 3]) -> f32 {
    light[0] * shares[0] + light[1] * shares[1] + light[2] * shares[2]
}

fn brightest(light: [f32; 3]) -> f32 {
    light.into_iter().fold(0.0, f32::max)
}

/// A table of a function of light, in steps of less than a percent that the upper bits of a float give.
#[derive(Debug)]
struct Curve(Vec<f32>);

impl Curve {
    const BITS_BELOW: u32 = 16;
    /// From 2⁻²⁰ to 2⁶ of white, more than the range of PQ.
    const FIRST: usize = (127 - 20) << 7;
    const STEPS: usize = 26 << 7;

    fn new(f: impl Fn(f64) -> f64) -> Self {
        Self(
            (0..Self::STEPS)
                .map(|step| f(Self::light(step)) as f32)
                .collect(),
        )
    }

    /// The light in the middle of a step.
    fn light(step: usize) -> f64 {
        let bits = ((Self::FIRST + step) as u32) << Self::BITS_BELOW;
        f32::from_bits(bits | 1 << (Self::BITS_BELOW - 1)).into()
    }

    fn step(light: f32) -> usize {
        let bits = light.max(0.0).to_bits() >> Self::BITS_BELOW;
        (bits as usize)
            .saturating_sub(Self::FIRST)
            .min(Self::STEPS - 1)
    }

    fn at(&self, light: f32) -> f32 {
        self.0[Self::step(light)]
    }
}

/// The tone curve of ITU-R BT.2390, from a peak above white to white.
struct ToneCurve {
    /// Code value of the peak and, relative to it, those of white and of the knee where the curve begins.
    peak: f64,
    white: f64,
    knee: f64,
    knee_light: f64,
}

impl ToneCurve {
    fn new(peak: f64) -> Self {
        let peak = pq_code(peak * WHITE / PQ_PEAK);
        let white = pq_code(WHITE / PQ_PEAK) / peak;
        let knee = 1.5 * white - 0.5;
        Self {
            peak,
            white,
            knee,
            knee_light: pq_light(knee * peak) * PQ_PEAK / WHITE,
        }
    }

    fn light(&self, light: f64) -> f64 {
        if light <= self.knee_light {
            return light;
        }
        let from = pq_code(light * WHITE / PQ_PEAK) / self.peak;
        let t = ((from - self.knee) / (1.0 - self.knee)).clamp(0.0, 1.0);
        let (t2, t3) = (t * t, t * t * t);
        let to = (2.0 * t3 - 3.0 * t2 + 1.0) * self.knee
            + (t3 - 2.0 * t2 + t) * (1.0 - self.knee)
            + (3.0 * t2 - 2.0 * t3) * self.white;
        pq_light(to * self.peak) * PQ_PEAK / WHITE
    }
}

/// Constants of SMPTE ST 2084.
const M1: f64 = 2610.0 / 16384.0;
const M2: f64 = 2523.0 / 4096.0 * 128.0;
const C1: f64 = 3424.0 / 4096.0;
const C2: f64 = 2413.0 / 4096.0 * 32.0;
const C3: f64 = 2392.0 / 4096.0 * 32.0;

fn pq_light(code: f64) -> f64 {
    let root = code.powf(1.0 / M2);
    ((root - C1).max(0.0) / (C2 - C3 * root)).powf(1.0 / M1)
}

fn pq_code(light: f64) -> f64 {
    let power = light.powf(M1);
    ((C1 + C2 * power) / (1.0 + C3 * power)).powf(M2)
}

/// Scene light of a code value, from ARIB STD-B67.
fn hlg_scene(code: f64) -> f64 {
    const A: f64 = 0.178_832_77;
    const B: f64 = 1.0 - 4.0 * A;
    const C: f64 = 0.559_910_73;
    match code <= 0.5 {
        true => code * code / 3.0,
        false => (((code - C) / A).exp() + B) / 12.0,
    }
}

fn srgb_light(code: f64) -> f64 {
    match code <= 0.040_45 {
        true => code / 12.92,
        false => ((code + 0.055) / 1.055).powf(2.4),
    }
}

fn srgb_code(light: f64) -> f64 {
    match light <= 0.003_130_8 {
        true => light * 12.92,
        false => 1.055 * light.powf(1.0 / 2.4) - 0.055,
    }
}

/// Weights of red, green and blue in luminance.
const BT2020_LUMINANCE: [f32; 3] = [0.2627, 0.6780, 0.0593];
const BT709_LUMINANCE: [f32; 3] = [0.2126, 0.7152, 0.0722];

/// Conversions of primaries to BT.709, all with the white point D65.
const BT2020: [[f32; 3]; 3] = [
    [1.660_491, -0.587_641_1, -0.072_849_9],
    [-0.124_550_5, 1.132_899_9, -0.008_349_4],
    [-0.018_150_8, -0.100_578_9, 1.118_729_7],
];
const P3: [[f32; 3]; 3] = [
    [1.224_940_2, -0.224_940_2, 0.0],
    [-0.042_056_9, 1.042_056_9, 0.0],
    [-0.019_637_6, -0.078_636_1, 1.098_273_6],
];
const IDENTITY: [[f32; 3]; 3] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];

#[cfg(test)]
mod tests {
    use gst_video::{
        VideoColorMatrix, VideoColorRange, VideoFormat, VideoFormatInfo, VideoInfo,
        VideoTransferFunction::{AribStdB67, Bt202010, Smpte2084},
    };

    use super::{
        super::downscale::{Downscaler, tests},
        *,
    };
    use vlmnarrate_engine::Picture;

    const TO_BT2020: [[f64; 3]; 3] = [
        [0.627_403_9, 0.329_283, 0.043_313_1],
        [0.069_097_3, 0.919_540_4, 0.011_362_3],
        [0.016_391_4, 0.088_013_3, 0.895_595_3],
    ];

    /// Full range for RGB, as a camera has it for the rest.
    fn colorimetry(is_rgb: bool, transfer: VideoTransferFunction) -> VideoColorimetry {
        let (range, matrix) = match is_rgb {
            true => (VideoColorRange::Range0_255, VideoColorMatrix::Rgb),
            false => (VideoColorRange::Range16_235, VideoColorMatrix::Bt2020),
        };
        VideoColorimetry::new(range, matrix, transfer, VideoColorPrimaries::Bt2020)
    }

    /// Code values of light, in BT.709 primaries and counted in white.
    fn encode(light: [f64; 3], transfer: VideoTransferFunction) -> [f64; 3] {
        let light = TO_BT2020.map(|row| row.iter().zip(light).map(|(a, b)| a * b).sum::<f64>());
        match transfer {
            Smpte2084 => light.map(|light| pq_code(light * WHITE / PQ_PEAK)),
            AribStdB67 => {
                let light = light.map(|light| light * WHITE / HLG_PEAK);
                let shares = light.iter().zip(BT2020_LUMINANCE);
                let luminance = shares.map(|(a, b)| a * f64::from(b)).sum::<f64>();
                light.map(|light| {
                    let scene = light * luminance.max(1e-9).powf(1.0 / 1.2 - 1.0);
                    match scene <= 1.0 / 12.0 {
                        true => (3.0 * scene).sqrt(),
                        false => 0.178_832_77 * (12.0 * scene - 0.284_668_92).ln() + 0.559_910_73,
                    }
                })
            }
            _ => light.map(srgb_code),
        }
    }

    /// A picture of 16 bits a component whose pixels are of these colours.
    fn frame(
        (width, height): (u32, u32),
        transfer: VideoTransferFunction,
        light: impl Fn(usize) -> [f64; 3],
    ) -> (VideoInfo, gst::Buffer) {
        let info = VideoInfo::builder(VideoFormat::Argb64, width, height)
            .colorimetry(&colorimetry(true, transfer))
            .build()
            .unwrap();
        let mut bytes = vec![];
        for i in 0..width as usize * height as usize {
            let codes = encode(light(i), transfer).map(|code| (code * 65535.0).round() as u16);
            let words = [[0xffff].as_slice(), &codes].concat();
            bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        }
        (info, gst::Buffer::from_slice(bytes))
    }

    fn as_format(
        (from, buffer): &(VideoInfo, gst::Buffer),
        format: VideoFormat,
    ) -> (VideoInfo, gst::Buffer) {
        let is_rgb = VideoFormatInfo::from_format(format).is_rgb();
        let info = VideoInfo::builder(format, from.width(), from.height())
            .colorimetry(&colorimetry(is_rgb, from.colorimetry().transfer()))
            .build()
            .unwrap();
        let buffer = tests::convert(from, buffer, &info, tests::undithered());
        (info, buffer)
    }

    fn picture((info, buffer): &(VideoInfo, gst::Buffer), size: (u32, u32)) -> Picture {
        let mut scaler = Downscaler::new(info, size).unwrap();
        scaler.picture(buffer, vec![]).unwrap()
    }

    /// The twin in BT.2020 of the usual picture, and that.
    fn twins(size: (u32, u32), transfer: VideoTransferFunction) -> [(VideoInfo, gst::Buffer); 2] {
        let (info, buffer) = tests::rgb(size);
        let map = buffer.map_readable().unwrap();
        let stride = info.stride()[0] as usize;
        let twin = frame(size, transfer, |i| {
            let (x, y) = (i % size.0 as usize, i / size.0 as usize);
            let at = y * stride + 3 * x;
            std::array::from_fn(|c| srgb_light(f64::from(map[at + c]) / 255.0))
        });
        drop(map);
        [twin, (info, buffer)]
    }

    #[test]
    fn every_format_looks_as_its_sdr_twin() {
        gst::init().unwrap();
        for transfer in [Smpte2084, AribStdB67, Bt202010] {
            for (from, to) in [((320, 180), (64, 64)), ((96, 64), (96, 64))] {
                let [twin, plain] = twins(from, transfer);
                let expected = picture(&plain, to);
                for format in VideoFormat::iter_raw() {
                    let info = VideoFormatInfo::from_format(format);
                    // Grey is another grey in BT.2020, and a palette hardly a picture.
                    if info.is_gray() || info.has_palette() {
                        continue;
                    }
                    let seen = picture(&as_format(&twin, format), to);
                    let (mean, max) = tests::difference(&seen, &expected);
                    // Five bits are few for that, and eight too where a step is one of light.
                    let depth = info.depth()[0];
                    let limit = match (info.is_rgb(), depth) {
                        (_, ..=6) => 10.0,
                        (_, ..=8) => 6.0,
                        (true, _) => 1.0,
                        (false, _) => 5.0,
                    };
                    let what = format!("{transfer:?} {format} {from:?} to {to:?}: {mean} {max}");
                    assert!(mean < limit, "{what}");
                }
            }
        }
    }

    #[test]
    fn highlights_are_told_apart() {
        gst::init().unwrap();
        for transfer in [Smpte2084, AribStdB67] {
            // From black to 900 cd/m².
            let ramp = frame((256, 4), transfer, |i| [(i % 256) as f64 / 255.0 * 4.5; 3]);
            let seen = picture(&as_format(&ramp, VideoFormat::P01010le), (256, 4));
            let row = seen.rgb.chunks(3).take(256).map(|rgb| i32::from(rgb[0]));
            let row = row.collect::<Vec<_>>();
            // Chroma comes in steps.
            assert!(row.windows(2).all(|pair| pair[1] >= pair[0] - 2), "{row:?}");
            let [black, grey, white, brighter, peak] = [0, 10, 57, 85, 254].map(|x| row[x]);
            assert!(black < 2 && white > 190 && peak > 250, "{row:?}");
            assert!(brighter > white + 9 && peak > brighter + 9, "{row:?}");
            // What is far from white stays what it is.
            let expected = (srgb_code(10.0 / 255.0 * 4.5) * 255.0) as i32;
            assert!(grey.abs_diff(expected) < 3, "{row:?}");
        }
    }

    #[test]
    fn a_glint_does_not_dim_the_rest() {
        gst::init().unwrap();
        let glint = frame((64, 64), Smpte2084, |i| {
            [if i == 99 { 20.0 } else { 1.0 }; 3]
        });
        let seen = picture(&glint, (64, 64));
        assert!(seen.rgb.iter().all(|value| *value >= 254));
    }

    #[test]
    fn transparent_highlights_are_composed_too() {
        gst::init().unwrap();
        let (info, opaque) = frame((64, 64), Smpte2084, |_| [0.2; 3]);
        let mut bytes = opaque.map_readable().unwrap().to_vec();
        for (i, pixel) in bytes.chunks_exact_mut(8).enumerate() {
            // As bright as possible, but transparent.
            if i % 64 / 8 % 2 == 0 {
                pixel.fill(0xff);
                pixel[..2].fill(0);
            }
        }
        let frame = (info, gst::Buffer::from_slice(bytes));
        let grey = (srgb_code(0.2) * 255.0) as u8;
        for size in [(64, 64), (8, 8)] {
            let seen = picture(&frame, size);
            for (x, pixel) in seen.rgb.chunks(3).take(size.0 as usize).enumerate() {
                let is_clear = (x * 8 / size.0 as usize).is_multiple_of(2);
                let expected = if is_clear { 255 } else { grey };
                // Taps reach into the neighbours.
                let limit = if size.0 == 8 { 35 } else { 2 };
                assert!(
                    pixel[0].abs_diff(expected) <= limit,
                    "{x}: {pixel:?} {expected}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_wide_or_bright_stays() {
        gst::init().unwrap();
        for text in ["bt601", "bt709", "smpte240m", "sRGB", "bt2020", "2:4:7:1"] {
            let colorimetry = text.parse::<VideoColorimetry>().unwrap();
            assert!(ToneMap::new(&colorimetry, 1.0).is_none(), "{text}");
        }
        for text in ["bt2020-10", "bt2100-pq", "bt2100-hlg", "2:3:14:1"] {
            let colorimetry = text.parse::<VideoColorimetry>().unwrap();
            assert!(ToneMap::new(&colorimetry, 1.0).is_some(), "{text}");
        }
        // Grey has no primaries.
        let tones = ToneMap::new(&"bt2020-10".parse().unwrap(), 1.0).unwrap();
        for grey in 0..=255u8 {
            let mut rgb = vec![];
            tones.map(
                &[[0xff; 2], [grey; 2], [grey; 2], [grey; 2]].concat(),
                AlphaMode::Opaque,
                &mut rgb,
            );
            assert!(
                rgb.iter().all(|value| value.abs_diff(grey) <= 1),
                "{grey} {rgb:?}"
            );
        }
    }
}
