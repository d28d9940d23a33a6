//! Pictures as data URLs.

use base64::{Engine, prelude::BASE64_STANDARD};
use vlmnarrate_engine::{Error, ErrorKind, ImageFormat, Picture, Result};

/// Encodes a picture. The same pixels give the same bytes, so that servers know a picture again.
///
/// # Errors
///
/// The picture is larger than the format allows.
pub(crate) fn data_url(picture: &Picture, format: ImageFormat) -> Result<String> {
    let (type_, bytes) = match format {
        ImageFormat::Jpeg { quality } => ("jpeg", jpeg(picture, quality)),
        ImageFormat::Png => ("png", png(picture)),
    };
    let bytes = bytes.map_err(|error| {
        let (width, height) = (picture.width, picture.height);
        Error::new(
            ErrorKind::Failed,
            format!("a picture of {width} × {height} pixels can't be encoded: {error}"),
        )
    })?;
    let mut url = format!("data:image/{type_};base64,");
    BASE64_STANDARD.encode_string(&bytes, &mut url);
    Ok(url)
}

type Encoded = std::result::Result<Vec<u8>, Box<dyn std::error::Error>>;

fn jpeg(picture: &Picture, quality: u8) -> Encoded {
    let (width, height) = (picture.width.try_into()?, picture.height.try_into()?);
    let mut bytes = Vec::new();
    let encoder = jpeg_encoder::Encoder::new(&mut bytes, quality);
    encoder.encode(&picture.rgb, width, height, jpeg_encoder::ColorType::Rgb)?;
    Ok(bytes)
}

fn png(picture: &Picture) -> Encoded {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgb);
    // The network is faster than a thorough search for smaller bytes.
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let rgb = (0..40 * 30).flat_map(|i| [i as u8, (i / 40) as u8 * 8, 99]);
        Picture::new(40, 30, rgb.collect()).unwrap()
    }

    fn bytes(url: &str) -> Vec<u8> {
        BASE64_STANDARD
            .decode(url.split_once(',').unwrap().1)
            .unwrap()
    }

    #[test]
    fn a_png_has_the_same_pixels() {
        let url = data_url(&picture(), ImageFormat::Png).unwrap();
        assert!(url.starts_with("data:image/png;base64,"));
        let decoder = png::Decoder::new(std::io::Cursor::new(bytes(&url)));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (40, 30));
        assert_eq!(pixels, picture().rgb);
    }

    #[test]
    fn a_jpeg_is_one_and_its_quality_counts() {
        let [low, high] =
            [10, 95].map(|quality| data_url(&picture(), ImageFormat::Jpeg { quality }).unwrap());
        assert!(low.starts_with("data:image/jpeg;base64,"));
        assert_eq!(bytes(&low)[..2], [0xff, 0xd8]);
        assert!(low.len() < high.len());
        let again = data_url(&picture(), ImageFormat::Jpeg { quality: 10 }).unwrap();
        assert_eq!(low, again);
    }

    #[test]
    fn a_picture_too_large_for_a_jpeg_is_an_error() {
        let picture = Picture::new(65_536, 1, vec![0; 3 * 65_536]).unwrap();
        let error = data_url(&picture, ImageFormat::default()).unwrap_err();
        assert!(error.to_string().contains("65536 × 1"), "{error}");
    }
}
