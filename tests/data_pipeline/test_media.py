from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_samples import exif, picture
from PIL import Image, ImageFile, ImageOps

from mmrlhf_jax.data.media import MediaError, MediaRoot, decode, digest, picture_size, read_media, verify_media
from mmrlhf_jax.groups import Media


def deep_gray() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)).save(buffer, format="PNG")
    return buffer.getvalue()


def see_through() -> bytes:
    return picture("P", transparency=b"\0\x80\xff")


def animation() -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


GOOD = {
    "jpeg": picture(format="JPEG"),
    "progressive jpeg": picture(format="JPEG", progressive=True),
    "CMYK jpeg": picture("CMYK", format="JPEG"),
    "gray jpeg": picture("L", format="JPEG"),
    "palette": picture("P"),
    "palette with transparency": see_through(),
    "LA": picture("LA"),
    "RGBA": picture("RGBA"),
    "1 bit": picture("1"),
    "16-bit gray": deep_gray(),
    "1x1": picture(size=(1, 1)),
    "12000x50": picture(size=(12000, 50)),
    "webp": picture(format="WEBP"),
    "bmp": picture(format="BMP"),
    "tiff": picture(format="TIFF"),
    "gif": animation(),
}


@pytest.mark.parametrize("encoded", GOOD.values(), ids=GOOD.keys())
def test_every_still_picture_becomes_rgb_of_the_size_its_header_says(encoded: bytes) -> None:
    pixels = decode(encoded)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert picture_size(encoded) == (pixels.shape[1], pixels.shape[0]) == Image.open(io.BytesIO(encoded)).size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright(format: str, orientation: int) -> None:
    encoded = picture(format=format, exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))
    np.testing.assert_array_equal(decode(encoded), upright)
    assert picture_size(encoded) == ((30, 40) if orientation >= 5 else (40, 30))


def test_an_orientation_tag_behind_the_pixels_changes_neither_size_nor_pixels() -> None:
    encoded = picture(exif=exif(6))
    at = encoded.index(b"eXIf") - 4
    end = at + 12 + struct.unpack(">I", encoded[at : at + 4])[0]
    late = encoded[:at] + encoded[end:-12] + encoded[at:end] + encoded[-12:]  # before IEND
    assert picture_size(late) == (40, 30)
    assert decode(late).shape == (30, 40, 3)


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    pixels = decode(deep_gray())
    expected = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40) * (255 / 65535)
    assert np.abs(pixels - expected[..., None]).max() <= 0.5


def test_transparency_is_dropped_as_convert_rgb_drops_it() -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    np.testing.assert_array_equal(decode(buffer.getvalue())[0, 0], (200, 100, 50))


def test_an_animation_shows_its_first_frame() -> None:
    np.testing.assert_array_equal(decode(animation())[0, 0], (255, 0, 0))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_picture_is_refused(format: str) -> None:
    encoded = picture(size=(200, 150), format=format)
    with pytest.raises(MediaError, match="replace the file or drop the row"):
        decode(encoded[: int(len(encoded) * 0.7)])


def test_a_truncated_picture_cannot_pass_because_some_library_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(MediaError, match="LOAD_TRUNCATED_IMAGES is on"):
        decode(picture(format="JPEG")[:-300])


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9_999, 9_999), (50_000, 50_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    for read in (decode, picture_size):
        with pytest.raises(MediaError, match="shrink the picture"):
            read(bomb(*size))


def test_the_pixel_bound_is_the_callers() -> None:
    encoded = picture(size=(40, 30))
    assert decode(encoded, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(MediaError, match="40x30 pixels, more than 1199"):
        decode(encoded, max_pixels=1199)


@pytest.mark.parametrize(
    "encoded", [b"", b"hello", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n", picture(format="ICO", size=(32, 32))]
)
def test_other_formats_are_not_opened(encoded: bytes) -> None:
    with pytest.raises(MediaError, match="not a JPEG, PNG, WEBP, BMP, GIF, TIFF picture"):
        decode(encoded)


def test_pixels_of_unknown_range_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(buffer, format="TIFF")
    with pytest.raises(MediaError, match="unknown range"):
        decode(buffer.getvalue())


# Reading by path.


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    media = tmp_path / "media"
    (media / "clip").mkdir(parents=True)
    (media / "photo.jpg").write_bytes(picture(format="WEBP"))
    for name in ("f_2.png", "f_10.png", "f_1.png"):
        (media / "clip" / name).write_bytes(picture(size=(10 + int(name[2:-4]), 10)))
    (media / "clip" / ".DS_Store").write_bytes(b"\0")
    (media / "clip" / "notes.txt").write_text("not a frame")
    return MediaRoot(str(media))


def test_a_picture_is_what_its_bytes_say_not_its_name(root: MediaRoot) -> None:
    media = verify_media(Media("image", "photo.jpg"), root)
    assert media.sizes == ((40, 30),)
    assert media.encoded == (picture(format="WEBP"),)
    assert media.sha256 == digest(media.encoded, "image")


def test_a_video_is_its_frames_in_lexicographic_order(root: MediaRoot) -> None:
    media = verify_media(Media("video", "clip"), root)
    assert media.sizes == ((11, 10), (20, 10), (12, 10))
    assert media.sha256 == digest(media.encoded, "video") != digest(media.encoded[::-1], "video")


def test_a_video_has_a_bounded_number_of_frames(root: MediaRoot) -> None:
    with pytest.raises(MediaError, match="'clip' has 3 frames, more than 2: raise --max-frames"):
        read_media(Media("video", "clip"), MediaRoot(root.path, max_frames=2))


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", "C:\\x.png"])
def test_a_path_that_leaves_the_root_is_refused(root: MediaRoot, path: str) -> None:
    (Path(root.path).parent / "secret.png").write_bytes(picture())
    with pytest.raises(MediaError, match="leaves the media root"):
        read_media(Media("image", path), root)


@pytest.mark.parametrize("path", ["", "a\0b.png", "gs://bucket/a.png", "file:///etc/passwd"])
def test_what_is_no_relative_path_is_refused(root: MediaRoot, path: str) -> None:
    with pytest.raises(MediaError, match="is not a path relative to the media root"):
        read_media(Media("image", path), root)


def test_a_symlink_out_of_the_root_is_refused(root: MediaRoot, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    os.symlink(tmp_path / "secret.png", Path(root.path) / "link.png")
    os.symlink(tmp_path / "secret.png", Path(root.path) / "clip" / "f_0.png")
    os.symlink(tmp_path, Path(root.path) / "folder")
    os.symlink(Path(root.path) / "photo.jpg", Path(root.path) / "inside.jpg")
    for media in (Media("image", "link.png"), Media("video", "clip"), Media("image", "folder/secret.png")):
        with pytest.raises(MediaError, match="symlink that leaves the media root"):
            read_media(media, root)
    assert read_media(Media("image", "inside.jpg"), root).sizes == ((40, 30),)


def test_a_root_may_itself_be_a_symlink(root: MediaRoot, tmp_path: Path) -> None:
    os.symlink(root.path, tmp_path / "alias")
    assert read_media(Media("image", "photo.jpg"), MediaRoot(str(tmp_path / "alias"))).sizes == ((40, 30),)


def test_missing_and_mistaken_media_are_named(root: MediaRoot) -> None:
    (Path(root.path) / "empty").mkdir()
    os.mkfifo(Path(root.path) / "pipe.png")
    cases = {
        Media("image", "gone.png"): r"'gone.png' is not under the media root .*: add the file or correct --media",
        Media("image", "clip"): r"'clip' is a directory, a picture was expected",
        Media("image", "pipe.png"): r"'pipe.png' is not a regular file",
        Media("video", "photo.jpg"): r"'photo.jpg' is not a directory: a video is a directory of frame pictures",
        Media("video", "empty"): r"'empty' holds no pictures",
    }
    for media, message in cases.items():
        with pytest.raises(MediaError, match=message):
            read_media(media, root)


def test_a_header_alone_does_not_prove_a_picture_whole(root: MediaRoot) -> None:
    whole = picture(size=(200, 150), format="JPEG")
    (Path(root.path) / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (Path(root.path) / "clip" / "f_3.png").write_bytes(whole[: len(whole) // 2])
    assert read_media(Media("image", "half.jpg"), root).sizes == ((200, 150),)
    with pytest.raises(MediaError, match=r"^'half.jpg': picture cannot be decoded .*truncated"):
        verify_media(Media("image", "half.jpg"), root)
    with pytest.raises(MediaError, match=r"^'clip' frame 3: picture cannot be decoded .*truncated"):
        verify_media(Media("video", "clip"), root)
