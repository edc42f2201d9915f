"""The tensor types of ggml: how many bytes a row of elements takes; and llama.cpp's names for mixtures of them.

Source: `ggml_type` in ggml/include/ggml.h and `type_traits` in ggml/src/ggml.c (llama.cpp of llama-cpp-python 0.3.36).
Types that upstream has removed (4, 5, 31-33, 36-38) are absent: a file that uses one is refused, as llama.cpp does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A tensor type: `block_bytes` bytes hold `block` consecutive elements of a row."""

    id: int
    name: str
    block: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.block > 1

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of `elements`, which must be a multiple of the block (`ggml_row_size`)."""
        return elements // self.block * self.block_bytes


TYPES: dict[int, GgmlType] = {
    row[0]: GgmlType(*row)
    for row in (
        (0, "f32", 1, 4), (1, "f16", 1, 2), (30, "bf16", 1, 2), (28, "f64", 1, 8),
        (24, "i8", 1, 1), (25, "i16", 1, 2), (26, "i32", 1, 4), (27, "i64", 1, 8),
        (2, "q4_0", 32, 18), (3, "q4_1", 32, 20), (6, "q5_0", 32, 22), (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34), (9, "q8_1", 32, 36), (41, "q1_0", 128, 18), (42, "q2_0", 64, 18),
        (10, "q2_K", 256, 84), (11, "q3_K", 256, 110), (12, "q4_K", 256, 144), (13, "q5_K", 256, 176),
        (14, "q6_K", 256, 210), (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66), (17, "iq2_xs", 256, 74), (22, "iq2_s", 256, 82), (18, "iq3_xxs", 256, 98),
        (21, "iq3_s", 256, 110), (19, "iq1_s", 256, 50), (29, "iq1_m", 256, 56), (20, "iq4_nl", 32, 18),
        (23, "iq4_xs", 256, 136), (34, "tq1_0", 256, 54), (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17), (40, "nvfp4", 64, 36),
    )
}  # fmt: skip

_FILE_TYPES = {
    0: "F32 F16 Q4_0 Q4_1",
    7: "Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS"
    " IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16",
    36: "TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0",
}
FILE_TYPES = {first + i: name for first, names in _FILE_TYPES.items() for i, name in enumerate(names.split())}
"""Names of `general.file_type`: `llama_ftype` in include/llama.h, without LLAMA_FTYPE_MOSTLY_ or _ALL_."""

F32 = TYPES[0]
F16 = TYPES[1]

KV_TYPES: dict[str, GgmlType] = {
    t.name: t
    for t in TYPES.values()
    if t.name in {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}
}
"""What `type_k` and `type_v` may be, by llama.cpp's names (`kv_cache_types` in common/arg.cpp)."""
