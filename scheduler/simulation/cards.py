"""What known GPUs have and do: memory, memory bandwidth and F32 arithmetic, from their makers' data sheets.

Names are compared without spaces, case and the maker's name, so that "NVIDIA GeForce RTX 3090" and "rtx3090" are one.
Arithmetic is what llama.cpp's prompts are limited by at best; measured paces correct it in production.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from scheduler.costs.params import Rates
from scheduler.units import GIB

_SHEET = """
    GTX 1060       6   192   4.4
    GTX 1070       8   256   6.5
    GTX 1080       8   320   8.9
    GTX 1080 Ti   11   484  11.3
    RTX 2060       6   336   6.5
    RTX 2070       8   448   7.5
    RTX 2080       8   448  10.1
    RTX 2080 Ti   11   616  13.4
    RTX 3050       8   224   9.1
    RTX 3060      12   360  12.7
    RTX 3060 Ti    8   448  16.2
    RTX 3070       8   448  20.3
    RTX 3070 Ti    8   608  21.7
    RTX 3080      10   760  29.8
    RTX 3080 Ti   12   912  34.1
    RTX 3090      24   936  35.6
    RTX 3090 Ti   24  1008  40.0
    RTX 4060       8   272  15.1
    RTX 4060 Ti   16   288  22.1
    RTX 4070      12   504  29.2
    RTX 4070 Ti   12   504  40.1
    RTX 4080      16   717  48.7
    RTX 4090      24  1008  82.6
    RTX 5060 Ti   16   448  23.7
    RTX 5070      12   672  30.9
    RTX 5070 Ti   16   896  43.9
    RTX 5080      16   960  56.3
    RTX 5090      32  1792 104.8
    RTX A2000     12   288   8.0
    RTX A4000     16   448  19.2
    RTX A5000     24   768  27.8
    RTX A6000     48   768  38.7
    RTX 6000 Ada  48   960  91.1
    Tesla P4       8   192   5.5
    Tesla P40     24   346  11.8
    Tesla P100    16   732   9.3
    Tesla T4      16   320   8.1
    Tesla V100    16   900  15.7
    Tesla M40     24   288   6.8
    L4            24   300  30.3
    L40S          48   864  91.6
    A10           24   600  31.2
    A40           48   696  37.4
    A100 40GB     40  1555  19.5
    A100          80  2039  19.5
    H100          80  3350  66.9
    H200         141  4800  66.9
"""
"""Name, GiB, GB/s, F32 TFLOPS."""
_NOISE = re.compile(r"nvidia|geforce|quadro|tesla|graphics|gpu|pcie|sxm\d?|[^a-z0-9]")


@dataclass(frozen=True, slots=True)
class Card:
    """`total_bytes` of memory and what it does at best."""

    total_bytes: int
    rates: Rates


def known_card(name: str) -> Card | None:
    """The card of that name, if the table has it."""
    return _CARDS.get(_key(name))


def _key(name: str) -> str:
    return _NOISE.sub("", name.lower())


def _card(line: str) -> tuple[str, Card]:
    *name, gib, gigabytes_per_s, tflops = line.split()
    rates = Rates(float(gigabytes_per_s) * 1e9, float(tflops) * 1e12)
    return _key(" ".join(name)), Card(int(gib) * GIB, rates)


_CARDS = dict(map(_card, _SHEET.strip().splitlines()))
