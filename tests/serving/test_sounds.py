"""Sound files of all kinds, and what is heard of them."""

from __future__ import annotations

import numpy as np
import pytest
from picture_files import wav

from actors.serving.media_files import sound


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
