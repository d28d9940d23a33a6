//! The enumerations of properties.

use gst::glib;

use crate::properties::Choice;

/// Whether frames wait for their captions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateMode")]
pub enum Mode {
    /// Live if upstream answers the LATENCY query so, else recorded.
    #[default]
    #[enum_value(name = "Auto: live if upstream is live, else recorded", nick = "auto")]
    Auto,
    /// Never holds a buffer. Captions come when they are ready, and the newest frame is described.
    #[enum_value(
        name = "Live: never hold a buffer, describe the newest frame",
        nick = "live"
    )]
    Live,
    /// Each frame that is due waits for its caption. The same input gives the same captions.
    #[enum_value(
        name = "Recorded: each frame that is due waits for its caption",
        nick = "recorded"
    )]
    Recorded,
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateDevice")]
pub enum Device {
    /// The first of CUDA, Metal and the CPU that the build supports and the machine has.
    #[default]
    #[enum_value(
        name = "Auto: the fastest device that the build supports and the machine has",
        nick = "auto"
    )]
    Auto,
    /// The CPU.
    #[enum_value(name = "CPU", nick = "cpu")]
    Cpu,
    /// An NVIDIA GPU.
    #[enum_value(name = "CUDA: an NVIDIA GPU", nick = "cuda")]
    Cuda,
    /// An Apple GPU.
    #[enum_value(name = "Metal: an Apple GPU", nick = "metal")]
    Metal,
}

/// Data type of weights that are not quantized, and of the computation with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateDType")]
pub enum DType {
    /// The fastest data type on the device.
    #[default]
    #[enum_value(name = "Auto: the fastest on the device", nick = "auto")]
    Auto,
    /// 32-bit float.
    #[enum_value(name = "F32: 32-bit float", nick = "f32")]
    F32,
    /// 16-bit brain float, with the range of a 32-bit float.
    #[enum_value(name = "BF16: 16-bit brain float", nick = "bf16")]
    Bf16,
    /// 16-bit float.
    #[enum_value(name = "F16: 16-bit float", nick = "f16")]
    F16,
}

/// Quantization of the weights when they are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateQuantization")]
pub enum Quantization {
    /// `q8-0` on a CPU unless `dtype` is set, else none.
    #[default]
    #[enum_value(
        name = "Auto: q8-0 on a CPU unless dtype is set, else none",
        nick = "auto"
    )]
    Auto,
    /// The weights have the data type of `dtype`.
    #[enum_value(name = "None: weights in the data type of dtype", nick = "none")]
    None,
    /// 8 bits per weight, in blocks of 32.
    #[enum_value(name = "Q8_0: 8 bits per weight, in blocks of 32", nick = "q8-0")]
    Q8_0,
    /// 4 bits per weight in the decoder, 8 elsewhere.
    #[enum_value(
        name = "Q4_0: 4 bits per weight in the decoder, 8 elsewhere",
        nick = "q4-0"
    )]
    Q4_0,
}

/// Format of the pictures that an endpoint gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateImageFormat")]
pub enum ImageFormat {
    /// JPEG, with the quality of `image-quality`.
    #[default]
    #[enum_value(name = "JPEG: small, with the quality of image-quality", nick = "jpeg")]
    Jpeg,
    /// PNG, which keeps every pixel.
    #[enum_value(
        name = "PNG: every pixel as it is, several times as large",
        nick = "png"
    )]
    Png,
}

impl Choice for ImageFormat {}
impl Choice for Mode {}
impl Choice for Quantization {}
impl Choice for Device {}
impl Choice for DType {}

impl From<Device> for vlmnarrate_engine::DeviceKind {
    fn from(device: Device) -> Self {
        match device {
            Device::Auto => Self::Auto,
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
            Device::Metal => Self::Metal,
        }
    }
}

impl From<Quantization> for vlmnarrate_engine::Quantization {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::Auto => Self::Auto,
            Quantization::None => Self::None,
            Quantization::Q8_0 => Self::Q8_0,
            Quantization::Q4_0 => Self::Q4_0,
        }
    }
}

impl From<DType> for vlmnarrate_engine::DType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::Auto => Self::Auto,
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
        }
    }
}
