"""Opens picture and sound files that came with a request: into pixels and samples. Belongs to a preparer's child.

Pictures are decoded by libmtmd (stb_image): PNG, JPEG, GIF (the first frame) and BMP; and by Pillow: WebP (the first
frame). Their size is read from the header first, so that none takes more memory than it may. libmtmd would hand
anything else to ffmpeg: it never gets it.
Sounds are WAV, MP3 or FLAC. The last two are opened by llama.cpp's own library for them (`sound_files.cpp`), which
stops where a sound is longer than it may be, whatever its header says.
"""

from __future__ import annotations

import ctypes
import io
import wave
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp

from actors.serving.attachments import Attachments
from actors.serving.dialogue import SIZE, Kind
from actors.serving.llama_common import library
from scheduler.errors import Rejected

MOST_PIXELS = 2**24
"""Of a picture: 4096 x 4096. A phone's photograph has 12 million, and projectors make it smaller."""

MOST_PIXELS_TOGETHER = 2**26
"""Of all pictures of a request: five photographs as they come, or many smaller ones. Decoding a million takes 10 to 40
ms, and a child may compute for 5 s."""

BYTES_PER_PIXEL = 32
"""That decoding may take. Measured: 16 of a PNG of 16 bits and 4 channels, which is unpacked twice; 12 of a JPEG."""

BYTES_PER_SOUND_BYTE = 24
"""That a sound file may take: its 8 bits become floats, twice. Measured: 14, and up to 80 MiB for what comes out."""

MOST_SOUND_S = 600.0
"""Of all sounds of a request. 10 minutes are 38 MiB of samples at 16 kHz, and some 4,000 to 15,000 tokens."""

PIECE_S = 30.0
"""Encoders of sound take pieces of half a minute. So each sound counts as one of these at the least."""

SHORTEST_S = 0.1
"""Sounds are filled up with silence to whole multiples of this: libmtmd ends the process over a piece of one sample."""

LONGEST_SIDE = 2**14
"""Of a picture, in pixels. Making one of 1 x 16,777,216 smaller takes libmtmd 1 GB, in the runner."""

_CROSSINGS = 8  # of zero on either side of the filter's middle. 20 MiB at 48 kHz and 8 bits take 0.8 s
_BLOCK = 2**20  # samples


Samples = npt.NDArray[np.float32]


class Size(NamedTuple):
    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


def bytes_to_open(files: Sequence[tuple[str, bytes]]) -> int:
    """Memory that opening takes, one file after the other (`Attachments.files`), by their headers. Raises Rejected for
    what is no picture, or too large."""
    sizes = [(index, size_of(index, file)) for index, (kind, file) in enumerate(files) if kind == "image"]
    for index, size in sizes:
        if max(size) > LONGEST_SIDE:
            raise Rejected(
                f"picture {index + 1} has {size.width} x {size.height} pixels; a side may have at most {LONGEST_SIDE}"
            )
        if not 0 < size.pixels <= MOST_PIXELS:
            raise Rejected(
                f"picture {index + 1} has {size.width} x {size.height} pixels; at most {MOST_PIXELS} are allowed "
                "(4096 x 4096). Make it smaller"
            )
    if (together := sum(size.pixels for _, size in sizes)) > MOST_PIXELS_TOGETHER:
        raise Rejected(
            f"the pictures have {together} pixels together; at most {MOST_PIXELS_TOGETHER} are allowed in a request. "
            "Make them smaller, or send fewer"
        )
    pixels = max((size.pixels for _, size in sizes), default=0)
    sound_bytes = max((len(file) for kind, file in files if kind == "audio"), default=0)
    return max(BYTES_PER_PIXEL * pixels, BYTES_PER_SOUND_BYTE * sound_bytes)


def opened(attached: Attachments) -> Iterator[tuple[Kind, bytes]]:
    """Each file as a frame, after `bytes_to_open` has checked them. Raises Rejected for a broken one."""
    left_s = MOST_SOUND_S
    for index, (kind, file) in enumerate(attached.files):
        if kind == "image":
            size, pixels = picture(index, file)
            yield Kind.PICTURE, SIZE.pack(*size) + pixels
        else:
            samples = sound(index, file, attached.senses.sample_rate, left_s)
            left_s -= max(PIECE_S, len(samples) / attached.senses.sample_rate)
            yield Kind.SOUND, samples.tobytes()


def size_of(index: int, file: bytes) -> Size:
    """Width and height by the file's header. Raises Rejected for other files than PNG, JPEG, WebP, GIF and BMP."""
    head = file[:32].ljust(32, b"\0")
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":  # stb would pass over another first chunk
        return Size(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
    if head.startswith((b"GIF87a", b"GIF89a")):
        return Size(int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little"))
    if head.startswith(b"BM"):
        if head[14] == 12:  # the oldest header
            return Size(int.from_bytes(head[18:20], "little"), int.from_bytes(head[20:22], "little"))
        width, height = (int.from_bytes(head[at : at + 4], "little", signed=True) for at in (18, 22))
        return Size(width, abs(height))  # a negative one: from top to bottom
    if head.startswith(b"\xff\xd8") and (size := _size_of_jpeg(file)) is not None:
        return size
    if _is_webp(file) and (size := _size_of_webp(head)) is not None:
        return size
    broken = {b"RIFF": "WebP", b"\xff\xd8": "JPEG", b"\x89PNG": "PNG"}
    named = next((f"a broken {name}" for magic, name in broken.items() if head.startswith(magic)), "none of them")
    raise Rejected(f"file {index + 1} of the messages must be a PNG, JPEG, WebP, GIF or BMP; it is {named}")


def _size_of_jpeg(file: bytes) -> Size | None:
    """Of the first frame header."""
    at = 2
    while at + 9 <= len(file) and file[at] == 0xFF:
        kind = file[at + 1]
        if kind == 0xFF:  # a filling byte
            at += 1
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return Size(int.from_bytes(file[at + 7 : at + 9], "big"), int.from_bytes(file[at + 5 : at + 7], "big"))
        else:
            at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
    return None


def _is_webp(file: bytes) -> bool:
    return file.startswith(b"RIFF") and file[8:12] == b"WEBP"


def _size_of_webp(head: bytes) -> Size | None:
    """Of the canvas, or of the only frame (RFC 9649)."""
    match head[12:16]:
        case b"VP8X":
            return Size(*(1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27)))
        case b"VP8L" if head[20] == 0x2F:
            bits = int.from_bytes(head[21:25], "little")
            return Size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        case b"VP8 " if head[23:26] == b"\x9d\x01\x2a":
            return Size(*(int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28)))
    return None


def picture(index: int, file: bytes) -> tuple[Size, bytes]:
    """Size and pixels of a file whose size was checked. Raises Rejected for a broken one."""
    found = _with_pillow(index, file) if _is_webp(file) else _with_libmtmd(index, file)
    if found[0] != size_of(index, file):
        raise Rejected(f"picture {index + 1} is broken: its size differs from the one in its header")
    return found


def _with_pillow(index: int, file: bytes) -> tuple[Size, bytes]:
    from PIL import Image  # few requests need it, and it takes 30 ms

    Image.MAX_IMAGE_PIXELS = None  # the size was checked
    try:
        with Image.open(io.BytesIO(file), formats=["WEBP"]) as opened, opened.convert("RGB") as pixels:
            return Size(*pixels.size), pixels.tobytes()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise Rejected(f"picture {index + 1} is a broken WebP ({error}); send a PNG or JPEG") from error


def _with_libmtmd(index: int, file: bytes) -> tuple[Size, bytes]:
    buffer: Any = ctypes.cast(ctypes.c_char_p(file), ctypes.POINTER(ctypes.c_uint8))
    no_context: Any = None  # only sounds need one
    bitmap: Any = mtmd_cpp.mtmd_helper_bitmap_init_from_buf(no_context, buffer, len(file), False)
    if not bitmap:
        raise Rejected(f"picture {index + 1} is broken, or of a kind that cannot be read; send a PNG or JPEG")
    try:
        size = Size(mtmd_cpp.mtmd_bitmap_get_nx(bitmap), mtmd_cpp.mtmd_bitmap_get_ny(bitmap))
        pixels = ctypes.string_at(mtmd_cpp.mtmd_bitmap_get_data(bitmap), mtmd_cpp.mtmd_bitmap_get_n_bytes(bitmap))
    finally:
        mtmd_cpp.mtmd_bitmap_free(bitmap)
    return size, pixels


def sound(index: int, file: bytes, sample_rate: int, left_s: float) -> Samples:
    """The samples of a sound file, its channels mixed, at `sample_rate` Hz. `left_s`: how long it may be. Raises
    Rejected."""
    if file.startswith((b"fLaC", b"ID3")) or file[:1] == b"\xff" and file[1:2] >= b"\xe0":
        samples = _compressed(index, file, sample_rate, left_s)
    else:
        samples = _of_wav(index, file, sample_rate, left_s)
    step = round(SHORTEST_S * sample_rate)
    return np.pad(samples, (0, -len(samples) % step))


def _compressed(index: int, file: bytes, sample_rate: int, left_s: float) -> Samples:
    """Of an MP3 or FLAC file."""
    is_flac = file.startswith(b"fLaC")
    most = max(0, int(left_s * sample_rate))
    samples = np.empty(most + 1, np.float32)  # one more, to see whether there is more
    count = library().arriero_sound(file, len(file), is_flac, sample_rate, samples.ctypes.data, len(samples))
    if count <= 0:
        raise Rejected(f"sound {index + 1} is a broken {'FLAC' if is_flac else 'MP3'}, or has no samples")
    if count > most:
        raise _too_long(index, f"longer than {max(0.0, left_s):.1f} s")
    if not np.isfinite(found := samples[:count]).all():
        raise Rejected(f"sound {index + 1} is broken: its samples are not numbers")
    return found


def _too_long(index: int, how_long: str) -> Rejected:
    return Rejected(
        f"sound {index + 1} is {how_long}; all of a request may be {MOST_SOUND_S:.0f} s, "
        f"and each counts as at least {PIECE_S:.0f} s"
    )


def _of_wav(index: int, file: bytes, sample_rate: int, left_s: float) -> Samples:
    try:
        with wave.open(io.BytesIO(file)) as opened:
            channels, width, rate, count = opened.getparams()[:4]
            if not 0 < count <= left_s * rate:
                raise _too_long(index, f"{count / rate:.1f} s long")
            raw = opened.readframes(count)
            if len(raw) < width * channels:
                raise EOFError("it has no samples")
    except (wave.Error, EOFError, ValueError, ZeroDivisionError) as error:
        raise Rejected(
            f"sound {index + 1} must be an MP3, a FLAC, or a WAV file of whole numbers (PCM): {error}"
        ) from error
    samples = _numbers_of(raw[: len(raw) // (width * channels) * width * channels], width)
    mixed: Samples = samples
    if channels > 1:
        mixed = samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return _at_rate(mixed, rate, sample_rate)


def _numbers_of(raw: bytes, width: int) -> Samples:
    """Between -1 and 1."""
    numbers: Samples
    if width == 1:
        numbers = np.frombuffer(raw, np.uint8).astype(np.float32)
        numbers -= 128
        numbers /= 128
        return numbers
    padded = np.zeros((len(raw) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
    numbers = padded.view("<i4").ravel().astype(np.float32)
    numbers /= 2**31
    return numbers


def _at_rate(samples: Samples, given: int, wanted: int) -> Samples:
    """The same sound at another rate. Tones that the new one cannot hold are filtered out first (a windowed sinc)."""
    if given == wanted:
        return samples
    if given > wanted:
        half = _CROSSINGS * given // wanted
        at = np.arange(-half, half + 1)
        kernel = np.sinc(at * wanted / given) * np.hamming(len(at))
        samples = np.convolve(samples, (kernel / kernel.sum()).astype(np.float32), "same")[: len(samples)]
    count = max(1, len(samples) * wanted // given)
    blocks = [
        _between(samples, np.arange(start, min(start + _BLOCK, count)) * given, wanted)
        for start in range(0, count, _BLOCK)
    ]
    return np.concatenate(blocks)


def _between(samples: Samples, places: npt.NDArray[np.int64], parts: int) -> Samples:
    """What is at these places, on straight lines between the samples, which are so many `parts` apart."""
    left = places // parts
    share = (places % parts / parts).astype(np.float32)
    right = np.minimum(left + 1, len(samples) - 1)
    found: Samples = samples[left] + share * (samples[right] - samples[left])
    return found
