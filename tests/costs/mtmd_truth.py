"""A program that asks the installed libmtmd what projectors take; run by test_projectors.

`python mtmd_truth.py on|off FILE…` prints a list of bytes (weights and compute) on the CPU, or null for a file that is
refused. `mtmd_get_memory_usage` is C++: it returns a std::map by value, whose libstdc++ layout is walked here.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import sys

from llama_cpp import mtmd_cpp

LIBRARY = mtmd_cpp._libmtmd
LETTERS = "_Z21mtmd_get_memory_usagePKc19mtmd_context_params"


def usage(path: str, flash_attn: bool) -> int | None:
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.flash_attn_type = False, int(flash_attn)
    ask = LIBRARY[LETTERS]
    ask.restype, ask.argtypes = None, [c.c_void_p, c.c_char_p, type(params)]
    result = (c.c_uint64 * 8)()
    ask(c.addressof(result), path.encode(), params)
    total, stack = 0, [result[2]]
    while stack:
        if address := stack.pop():
            node = (c.c_uint64 * 6).from_address(address)
            total += node[5]
            stack += [node[2], node[3]]
    return total or None


def main() -> None:
    answers = [usage(path, sys.argv[1] == "on") for path in sys.argv[2:]]
    print("ANSWERS " + json.dumps(answers), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
