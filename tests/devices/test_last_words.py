"""Of all that a dying process leaves in its error output, what it died of is told, and only that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.devices.last_words import MOST_BYTES, MOST_CHARACTERS, last_words, telling

ABORT = """
:actor_name:RunnerActor
2026-11-29 01:07:50,000 WARNING something of Python's: error, error
/src/llama.cpp/ggml/src/ggml.c:1234: GGML_ASSERT(n_tokens > 0) failed
warning: File "/usr/bin/python3.11-gdb.py" auto-loading has been declined
30\t../sysdeps/unix/sysv/linux/epoll_wait.c: No such file or directory.
#3  0x00007f GGML_ASSERT in ggml_abort () from libggml-base.so
*** SIGABRT received at time=1795914478 on cpu 1 ***
PC: @     0x7f5dc6ca8eec  (unknown)  (unknown)
    @     0x7f5dc6c5a050      15184  (unknown)
[2026-11-29 01:07:58,964 E 7991 8108] logging.cc:474: *** SIGABRT received at time=1795914478 on cpu 1 ***
Fatal Python error: Aborted

Stack (most recent call first):
  File "/x/actors/serving/native.py", line 10 in ggml_abort
"""

THROWN = """
[2026-11-29 01:08:06,039 E 7990 8221] logging.cc:118: Unhandled exception: St13runtime_error. what(): vk::Queue: lost
[2026-11-29 01:08:06,039 E 7990 8221] logging.cc:125: Stack trace:
 /x/_raylet.so(+0x1812b9a) [0x7f41cf412b9a] ray::operator<<()
/x/libggml-base.so.0(+0x2f23b) [0x7f41a819723b] ggml_abort
*** SIGABRT received at time=1795914478 on cpu 1 ***
"""

CUDA = """
CUDA error: an illegal memory access was encountered
  current device: 0, in function ggml_backend_cuda_synchronize at /src/ggml-cuda.cu:2900
  cudaStreamSynchronize(cuda_ctx->stream())
/src/ggml/src/ggml-cuda/ggml-cuda.cu:83: CUDA error
*** SIGABRT received at time=1795914478 on cpu 1 ***
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ABORT, "/src/llama.cpp/ggml/src/ggml.c:1234: GGML_ASSERT(n_tokens > 0) failed; SIGABRT"),
        (THROWN, "Unhandled exception: St13runtime_error. what(): vk::Queue: lost; SIGABRT"),
        (
            CUDA,
            "CUDA error: an illegal memory access was encountered; "
            "/src/ggml/src/ggml-cuda/ggml-cuda.cu:83: CUDA error; SIGABRT",
        ),
        ("*** SIGSEGV received at time=1 on cpu 0 ***\nFatal Python error: Segmentation fault\n", "SIGSEGV"),
        ("2026-11-29 WARNING the scheduler is away\nTraceback (most recent call last):\n", ""),
        ("", ""),
    ],
)
def test_what_it_died_of(text: str, words: str) -> None:
    assert telling(text) == words


def test_a_line_is_bounded_and_clean() -> None:
    (line,) = [telling("GGML_ASSERT(\x1b[31m\x07" + "x" * 1000)]
    assert len(line) == MOST_CHARACTERS
    assert line.startswith("GGML_ASSERT( [31m xxx")


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text("GGML_ASSERT(old) failed\n" + "y" * MOST_BYTES + "\nGGML_ASSERT(new) failed\n")
    assert last_words(str(log), tmp_path) == "GGML_ASSERT(new) failed"


def test_only_ordinary_files_of_the_folder_are_read(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("GGML_ASSERT(secret) failed")
    (logs / "link").symlink_to(secret)
    os.mkfifo(logs / "pipe")
    for path in (str(secret), str(logs / "link"), str(logs / "pipe"), f"{logs}/../secret", str(logs / "none"), ""):
        assert last_words(path, logs) == "", path
