"""Small LoRA adapters that really run, written for a model file in a moment. Needs numpy and gguf.

The weights are random and mean nothing: an adapter changes what a model says, and equal arguments write equal files.
"""

from __future__ import annotations

import re
from pathlib import Path

LINEAR = r"attn_(q|k|v|output)\.weight|ffn_(up|gate|down)\.weight|ssm_(in|out)\.weight"


def write_sample_adapter(
    path: Path, model: Path, *, rank: int = 4, seed: int = 1, strength: float = 1.0, pattern: str = LINEAR
) -> Path:
    """An adapter that changes the matrices of `model` whose names match; returns its path. Overwrites.

    `strength`: how large the change is, compared with weights of spread n^-1/2.
    """
    import numpy as np
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(model)
    arch = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(str(path), arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    rng = np.random.default_rng(seed)
    for tensor in reader.tensors:
        if re.search(pattern, tensor.name) and len(tensor.shape) == 2:
            n_in, n_out = (int(n) for n in tensor.shape)
            a = rng.normal(0, n_in**-0.5, (rank, n_in)).astype(np.float32)
            b = rng.normal(0, strength * rank**-0.5, (n_out, rank)).astype(np.float32)
            writer.add_tensor(f"{tensor.name}.lora_a", a)
            writer.add_tensor(f"{tensor.name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
