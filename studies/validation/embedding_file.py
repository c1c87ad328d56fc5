"""How fast embeddings of a picture go into a file and out of it: what vLLM's file connector does in a step, measured.

`ECSharedStorageConnector` (vLLM 0.11.1) saves every picture's embeddings with safetensors, in a folder of its own, and
loads them so, while the step waits. The copy between device and host is not in these figures; the page cache is.

Run: OMP_NUM_THREADS=1 python -m studies.validation.embedding_file | tee studies/validation/embedding_file.txt
A second run finds memory that the first has given back and is four times as fast; a server's files are never deleted
(vLLM issue 32659), so the first one counts.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

TOKENS: Final = 400
WIDTH: Final = 10_240
"""Qwen3-VL-4B: 2,560 numbers a token, and three more vectors of DeepStack."""
N_FILES: Final = 200


def main() -> None:
    """Print the medians of putting and getting."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    embeddings = torch.randn(TOKENS, WIDTH).to(torch.bfloat16)
    n_bytes = embeddings.numel() * embeddings.element_size()
    put_s: list[float] = []
    get_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(N_FILES):
            start = time.perf_counter()
            path = Path(folder) / str(index) / "encoder_cache.safetensors"
            path.parent.mkdir()
            save_file({"ec_cache": embeddings.clone()}, path)
            put_s.append(time.perf_counter() - start)
        for index in range(N_FILES):
            start = time.perf_counter()
            load_file(Path(folder) / str(index) / "encoder_cache.safetensors")["ec_cache"].clone()
            get_s.append(time.perf_counter() - start)
    print(
        f"{platform.machine()}, python {platform.python_version()}, torch {torch.__version__}, {n_bytes:,} bytes a file"
    )
    for name, taken in (("put", put_s), ("get", get_s)):
        median_s, tenths = statistics.median(taken), statistics.quantiles(taken, n=10)
        spread = f"{1e3 * tenths[0]:.2f} to {1e3 * tenths[-1]:.2f}"
        print(f"{name}: {1e3 * median_s:.2f} ms ({spread}), {n_bytes / median_s / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
