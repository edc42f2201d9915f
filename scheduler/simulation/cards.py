"""What known GPUs have and do: memory, memory bandwidth and F32 arithmetic, as their makers' data sheets
have it, from memory: not every figure was looked up.

Names are compared without spaces, case and the maker's name, so that "NVIDIA GeForce RTX 3090" and "rtx3090" are one.
Arithmetic is what llama.cpp's prompts are limited by at best; measured paces correct it in production.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from scheduler.costs.params import Rates
from scheduler.units import GIB

_SHEET = """
    GTX 980 Ti     6   336   5.6
    GTX 1050 Ti    4   112   2.1
    GTX 1060       6   192   4.4
    GTX 1070       8   256   6.5
    GTX 1070 Ti    8   256   8.2
    GTX 1080       8   320   8.9
    GTX 1080 Ti   11   484  11.3
    GTX 1650       4   128   3.0
    GTX 1660       6   192   5.0
    GTX 1660 Super 6   336   5.0
    GTX 1660 Ti    6   288   5.4
    RTX 2060       6   336   6.5
    RTX 2060 Super 8   448   7.2
    RTX 2070       8   448   7.5
    RTX 2070 Super 8   448   9.1
    RTX 2080       8   448  10.1
    RTX 2080 Super 8   496  11.2
    RTX 2080 Ti   11   616  13.4
    Titan Xp      12   548  12.1
    Titan V       12   653  14.9
    Titan RTX     24   672  16.3
    RTX 3050       8   224   9.1
    RTX 3060      12   360  12.7
    RTX 3060 Ti    8   448  16.2
    RTX 3070       8   448  20.3
    RTX 3070 Ti    8   608  21.7
    RTX 3080      10   760  29.8
    RTX 3080 12GB 12   912  30.6
    RTX 3080 Ti   12   912  34.1
    RTX 3090      24   936  35.6
    RTX 3090 Ti   24  1008  40.0
    RTX 4060       8   272  15.1
    RTX 4060 Ti   16   288  22.1
    RTX 4070      12   504  29.2
    RTX 4070 Super 12  504  35.5
    RTX 4070 Ti   12   504  40.1
    RTX 4070 Ti Super 16 672 44.1
    RTX 4080      16   717  48.7
    RTX 4080 Super 16  736  52.2
    RTX 4090      24  1008  82.6
    RTX 5050       8   320  13.2
    RTX 5060       8   448  19.2
    RTX 5060 Ti   16   448  23.7
    RTX 5070      12   672  30.9
    RTX 5070 Ti   16   896  43.9
    RTX 5080      16   960  56.3
    RTX 5090      32  1792 104.8
    RTX A2000     12   288   8.0
    RTX A4000     16   448  19.2
    RTX A5000     24   768  27.8
    RTX A6000     48   768  38.7
    RTX 6000      24   672  16.3
    RTX 8000      48   672  16.3
    RTX 4000 Ada  20   360  26.7
    RTX 4500 Ada  24   432  39.6
    RTX 5000 Ada  32   576  65.3
    RTX 6000 Ada  48   960  91.1
    RTX PRO 6000  96  1792 125.0
    Tesla P4       8   192   5.5
    Tesla P40     24   346  11.8
    Tesla P100    16   732   9.3
    Tesla T4      16   320   8.1
    Tesla V100    16   900  15.7
    Tesla M40     24   288   6.8
    L4            24   300  30.3
    L40           48   864  90.5
    L40S          48   864  91.6
    A2            16   200   4.5
    A10G          24   600  31.2
    A30           24   933  10.3
    A10           24   600  31.2
    A40           48   696  37.4
    A100 40GB     40  1555  19.5
    A100          80  2039  19.5
    H100          80  3350  66.9
    H100 NVL      94  3938  60.0
    H200         141  4800  66.9
    B200         180  8000  75.0
"""
"""Name, GiB, GB/s, F32 TFLOPS."""
_NOISE = re.compile(
    r"nvidia|geforce|quadro|tesla|graphics|gpu|pcie|sxm\d?|hbm\de?|generation|blackwell|(workstation|server) edition"
    r"|[^a-z0-9]"
)
_MEMORY = re.compile(r"\b(\d+) ?gb\b", re.I)


@dataclass(frozen=True, slots=True)
class Card:
    """`total_bytes` of memory and what it does at best."""

    total_bytes: int
    rates: Rates


def known_card(name: str) -> Card | None:
    """The card of that name, if the table has it. Memory in the name counts: "A100-SXM4-40GB"."""
    key = _key(name)
    if key in _CARDS:
        return _CARDS[key]
    memory = _MEMORY.search(name)
    card = _CARDS.get(_key(_MEMORY.sub("", name)))
    return Card(int(memory[1]) * GIB, card.rates) if memory and card else None


def _key(name: str) -> str:
    return _NOISE.sub("", name.lower())


def _card(line: str) -> tuple[str, Card]:
    *name, gib, gigabytes_per_s, tflops = line.split()
    rates = Rates(float(gigabytes_per_s) * 1e9, float(tflops) * 1e12)
    return _key(" ".join(name)), Card(int(gib) * GIB, rates)


_CARDS = dict(map(_card, _SHEET.strip().splitlines()))
