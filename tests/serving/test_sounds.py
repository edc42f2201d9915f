"""Sound files of all kinds, and what is heard of them, however long or broken they are."""

from __future__ import annotations

import numpy as np
import pytest
from picture_files import wav
from sound_files import flac, flac_bomb, mp3

from actors.serving.media_files import sound
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama

HEARD_HZ = 16000


def loudest(samples: np.ndarray) -> float:
    """The strongest frequency, in Hz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * HEARD_HZ / len(samples))


@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (16000, 1), (8000, 2), (96000, 1)])
def test_a_flac_is_heard_as_it_was_written(rate: int, channels: int) -> None:
    heard = sound(0, flac(1000, 1.0, rate, channels), HEARD_HZ, 600)
    assert len(heard) == pytest.approx(HEARD_HZ, abs=1600)
    assert loudest(heard) == pytest.approx(1000, abs=5)
    assert np.abs(heard).max() == pytest.approx(0.5, rel=0.1)


def test_an_mp3_is_heard_as_it_was_written() -> None:
    heard = sound(0, mp3(1.0), HEARD_HZ, 600)
    assert len(heard) == pytest.approx(HEARD_HZ, abs=1600)
    assert loudest(heard) == pytest.approx(26.5 * 44100 / 1152, abs=40)
    assert 0.001 < np.abs(heard).max() < 1


@pytest.mark.parametrize(
    "file",
    [
        b"ID3\3" + b"x" * 900,
        b"\xff\xfb" + b"\0" * 900,
        b"fLaC",
        b"fLaC\x80\0\0\x22" + b"\0" * 34,
        flac(1000, 0.0),
        flac(1000, 1.0, 0),
        flac(1000, 1.0)[:50],
    ],
)
def test_a_broken_file_is_refused(file: bytes) -> None:
    with pytest.raises(Rejected, match=r"sound 3 is a broken (MP3|FLAC), or has no samples"):
        sound(2, file, HEARD_HZ, 600)


def test_half_a_file_is_heard_to_where_it_ends() -> None:
    for file in (flac(1000, 2.0), mp3(2.0)):
        assert HEARD_HZ // 2 < len(sound(0, file[: len(file) // 2], HEARD_HZ, 600)) <= 1.2 * HEARD_HZ


@pytest.mark.parametrize("told", [0, 1, 2**36 - 1])
def test_what_the_header_says_of_the_length_is_not_believed(told: int) -> None:
    assert len(sound(0, flac(1000, 1.0, told=told), HEARD_HZ, 600)) == pytest.approx(HEARD_HZ, abs=1600)


@pytest.mark.parametrize("file", [flac(1000, 3.0), mp3(3.0), flac_bomb(10_000)])
def test_a_longer_sound_is_refused_without_opening_all_of_it(file: bytes) -> None:
    with pytest.raises(Rejected, match=r"sound 1 is longer than 2\.0 s; all of a request may be 600 s"):
        sound(0, file, HEARD_HZ, 2.0)
    with pytest.raises(Rejected, match=r"longer than 0\.0 s"):
        sound(0, file, HEARD_HZ, -1.0)


def test_noise_in_the_middle_harms_nobody() -> None:
    noise = np.random.default_rng(1)
    for file in (flac(1000, 1.0), mp3(1.0)):
        for _ in range(50):
            broken = bytearray(file)
            at = int(noise.integers(12, len(file) - 600))
            broken[at : at + 500] = noise.bytes(500)
            try:
                heard = sound(0, bytes(broken), HEARD_HZ, 600)
            except Rejected:
                continue
            assert np.isfinite(heard).all() and len(heard) < 30 * HEARD_HZ


@pytest.mark.parametrize(("width", "channels", "rate"), [(1, 1, 8000), (2, 2, 44100), (3, 1, 16000), (4, 2, 48000)])
def test_a_tone_is_heard_alike_however_it_is_written(width: int, channels: int, rate: int) -> None:
    heard = sound(0, wav(1000, 1.0, rate, width, channels), 16000, 600)
    assert abs(len(heard) - 16000) <= 1
    tone = np.sin(np.arange(len(heard)) * 1000 * 2 * np.pi / 16000)
    level = 100 / 128 if width == 1 else 0.5
    assert np.abs(heard - level * tone)[200:-200].max() < 0.25 * level  # half a step of the coarse ones
    assert np.corrcoef(heard, tone)[0, 1] > 0.99


def test_tones_that_a_rate_cannot_hold_are_not_heard_as_others() -> None:
    heard = sound(0, wav(15000, 1.0, 44100), 16000, 600)
    assert np.abs(heard[500:-500]).max() < 0.02
