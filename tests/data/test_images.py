"""Every kind of file that people call an image comes out as RGB that looks right, or as an error that says why not."""

import errno
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from sequencer2d.data.folders import is_image_file
from sequencer2d.data.images import MAX_PIXELS, ImageError, open_image, open_picture

RAMP = np.linspace(0, 1, 16).repeat(16).reshape(16, 16).T  # [H, W], black on the left to white on the right


def assert_ramp(image: Image.Image, tolerance: int = 2) -> None:
    """The image is the grey ramp, neither clipped nor inverted."""
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image), np.rint(RAMP * 255)[..., None].repeat(3, 2), atol=tolerance)


def grey() -> Image.Image:
    return Image.fromarray(np.rint(RAMP * 255).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_8_bit_modes_look_alike(mode: str, tmp_path: Path) -> None:
    assert_ramp(open_image(saved(grey().convert(mode), tmp_path / "a.png")))


@pytest.mark.parametrize(
    ("pixels", "file"),
    [
        (np.rint(RAMP * 65535).astype(np.uint16), "grey16.png"),
        (np.rint(RAMP * 65535).astype(np.uint16), "grey16.tif"),
        (np.rint(RAMP * 65535).astype(np.int32), "grey32.tif"),
        (np.rint(RAMP * 2_000_000_000).astype(np.int32), "bright32.tif"),
        (RAMP.astype(np.float32), "float1.tif"),
        ((RAMP * 255).astype(np.float32), "float255.tif"),
        ((RAMP * 12_345_678).astype(np.float32), "float_any.tif"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deep_grey_is_scaled(pixels: np.ndarray, file: str, tmp_path: Path) -> None:
    assert_ramp(open_image(saved(Image.fromarray(pixels), tmp_path / file)))


def test_dark_16_bit_image_stays_dark(tmp_path: Path) -> None:
    dark = np.full((4, 4), 1000, dtype=np.uint16)
    assert open_image(saved(Image.fromarray(dark), tmp_path / "dark.png")).getpixel((0, 0)) == (4, 4, 4)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_float_image_without_any_light_is_black(value: float, tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.full((4, 4), value, dtype=np.float32)), tmp_path / "a.tif")
    assert open_image(path).getextrema() == ((0, 0), (0, 0), (0, 0))


def test_1_bit_image(tmp_path: Path) -> None:
    checks = Image.fromarray(np.eye(8, dtype=bool))
    pixels = np.asarray(open_image(saved(checks, tmp_path / "a.png")))
    np.testing.assert_array_equal(pixels[..., 0], np.eye(8) * 255)


def test_16_bit_rgb(tmp_path: Path) -> None:
    """Written by hand: Pillow reads 16-bit colour, but does not write it."""
    rows = np.rint(RAMP * 65535).astype(">u2")[..., None].repeat(3, 2)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, zlib.compress(data)))
    assert_ramp(open_image(tmp_path / "a.png"))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    for mode, clear in (("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))):
        image = Image.new(mode, (4, 4), clear)
        assert open_image(saved(image, tmp_path / f"{mode}.png")).getpixel((1, 1)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert open_image(saved(half, tmp_path / "half.png")).getpixel((1, 1)) == (255, 127, 127)


def test_transparent_palette_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    for transparency in (0, b"\x00\xff"):  # one colour, or an alpha for each
        opened = open_image(saved(image, tmp_path / "a.png", transparency=transparency))
        assert opened.getpixel((0, 0)) == (0, 0, 255)
        assert opened.getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_jpeg_has_its_colours(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (16, 16), (220, 30, 30)).convert("CMYK"), tmp_path / "a.jpg", quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    np.testing.assert_allclose(np.asarray(open_image(path))[8, 8], (220, 30, 30), atol=8)


def test_ycck_jpeg_has_its_colours(tmp_path: Path) -> None:
    """Written by hand: Pillow inverts and writes CMYK; a changed Adobe marker makes YCCK of the same bytes."""
    inks = Image.new("RGB", (16, 16), (35, 225, 225)).convert("YCbCr")  # cyan, magenta and yellow, as if RGB
    black = Image.new("L", (16, 16), 0)
    inverted = [channel.point(lambda level: 255 - level) for channel in inks.split()]
    path = saved(Image.merge("CMYK", [*inverted, black]), tmp_path / "a.jpg", quality=95)
    data = bytearray(path.read_bytes())
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0, "transform: 0 is CMYK, 2 is YCCK"
    data[marker + 11] = 2
    path.write_bytes(data)
    np.testing.assert_allclose(np.asarray(open_image(path))[8, 8], (220, 30, 30), atol=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (24, 16))
    upright.paste((255, 0, 0), (0, 0, 8, 8))  # marks the top left corner
    stored_by = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(stored_by[orientation]) if orientation in stored_by else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(stored, tmp_path / "a.png", exif=exif))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(upright))


@pytest.mark.parametrize("file", ["a.jpg", "a.png"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_does_not_cost_the_image(file: str, exif: bytes, tmp_path: Path) -> None:
    """Pillow warns of some of it and fails on some, differently from format to format."""
    for more in ({}, {"dpi": (72, 72)}):  # with which Pillow does not look at the EXIF block when it opens a JPEG
        assert_ramp(open_image(saved(grey().convert("RGB"), tmp_path / file, exif=exif, quality=100, **more)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: not a regular file"):
        open_image(tmp_path / "pipe.png")


JPEGS: dict[str, tuple[str, dict[str, Any]]] = {
    "colour": ("RGB", {}),
    "full colour": ("RGB", {"subsampling": "4:4:4"}),
    "wide colour": ("RGB", {"subsampling": "4:2:2"}),
    "progressive": ("RGB", {"progressive": True}),
    "restarts": ("RGB", {"restart_marker_blocks": 2}),
    "not YCbCr": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
    "turned": ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
}
"""Mode and options of files that cameras, scanners and web sites write."""


@pytest.mark.parametrize("factor", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("size", [(300, 200), (131, 67), (9, 17), (7, 5), (5, 5), (3, 3)])
@pytest.mark.parametrize("kind", JPEGS)
def test_every_jpeg_has_pillows_pixels(
    kind: str, size: tuple[int, int], factor: int | None, photo: Image.Image, tmp_path: Path
) -> None:
    factor = factor and min(factor, *size)
    mode, options = JPEGS[kind]
    path = saved(photo.resize(size).convert(mode), tmp_path / "a.jpg", quality=90, **options)
    path.write_bytes(path.read_bytes() + b"garbage at the end")
    with Image.open(path) as image:
        if factor and kind != "turned":
            image.draft(None, (size[0] // factor, size[1] // factor))
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=int)
    reduction = None if factor is None else lambda width, height: factor
    for opened in (open_image(path, reduction), open_picture(path, reduction)):
        np.testing.assert_allclose(np.asarray(opened, dtype=int), expected, atol=1)


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["colour", "progressive", "grey"])
def test_a_truncated_jpeg_is_an_error_wherever_it_ends(
    kind: str, kept: float, photo: Image.Image, tmp_path: Path
) -> None:
    mode, options = JPEGS[kind]
    path = saved(photo.convert(mode), tmp_path / "a.jpg", **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    for reduction in (None, lambda width, height: 2):
        with pytest.raises(ImageError, match=r"a\.jpg: (not an image|cannot be decoded: .*truncated)"):
            open_picture(path, reduction)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_of_a_folder_is_read(tmp_path: Path) -> None:
    path = saved(grey(), tmp_path / "a.AVIF", format="AVIF", quality=95)
    assert is_image_file(path.name)
    assert_ramp(open_image(path), tolerance=6)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_stream_is_read_and_stays_open(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    grey().save(buffer, "PNG")
    assert_ramp(open_image(buffer))
    assert not buffer.closed
    with saved(grey(), tmp_path / "a.png").open("rb") as file:
        assert_ramp(open_image(file))
        assert not file.closed
    with pytest.raises(ImageError, match=r"^image: not an image"):
        open_image(io.BytesIO(b"hello"))


def write_truncated(path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, kind)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "directory"),
        (Path.touch, "empty"),
        (lambda path: path.write_text("hello"), "not an image"),
        (lambda path: write_truncated(path, "JPEG"), "truncated"),
        (lambda path: write_truncated(path, "PNG"), "truncated"),
        (lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"), "1×1 pixels are too few"),
        (lambda path: Image.new("RGB", (100, 1)).save(path, "PNG"), "100×1 pixels are too few"),
    ],
    ids=["missing", "folder", "empty", "text", "jpeg", "png", "1x1", "100x1"],
)
def test_unusable_file_is_named_with_the_reason(make, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    make(path)
    with pytest.raises(ImageError, match=reason) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: object) -> None:  # file modes would not stop the super-user
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr("sequencer2d.data.images.open", denied, raising=False)
    with pytest.raises(ImageError, match=r"a\.png: cannot be opened: Permission denied"):
        open_image(tmp_path / "a.png")


def test_path_that_no_file_can_have() -> None:
    with pytest.raises(ImageError, match="null byte"):
        open_image("a\0b.png")


@pytest.mark.parametrize(
    ("side", "size"), [(9_000, "9000×9000"), (11_000, "11000×11000"), (20_000, "400000000 pixels")]
)
def test_huge_image_is_refused_before_decoding(side: int, size: str, tmp_path: Path) -> None:
    """The file has no pixels: to decode it would be another error. Pillow warns from 9,460² on, fails from 13,378²."""
    path = tmp_path / "huge.png"
    path.write_bytes(png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b""))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ImageError, match=size) as error:
            open_image(path)
    assert f"{MAX_PIXELS:,}" in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert caught == []


def png(header: bytes, data: bytes) -> bytes:
    """A PNG of these two chunks."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
