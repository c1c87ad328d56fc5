"""What of a list of techniques runs, by the place where it acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from costmodel.errors import Unsupported
from costmodel.techniques import Technique
from costmodel.techniques.composing import check, parts_of
from costmodel.techniques.kv_evict import KVEvict
from costmodel.techniques.kv_quantize import KVQuantize
from costmodel.techniques.kv_retrieve import KVRetrieve
from costmodel.techniques.relaxed_verify import RelaxedVerify
from costmodel.techniques.sparse_attention import SparseAttention
from costmodel.techniques.speculate import Speculate
from costmodel.techniques.stream_state import StreamState
from costmodel.techniques.token_reduce import TokenReduce

SLOTS: Final = {
    "encoder output tokens": "encoder_out",
    "visual tokens": "pre_llm",
    "decoder tokens": "layer",
    "kv tokens": "evict",
    "kv bits": "quantize",
    "kv read": "retrieve",
    "prefill attention": "sparse",
    "encode attention": "sparse",
    "stream": "stream",
    "draft": "speculate",
    "verify": "relax",
}
RUNS: Final = (TokenReduce, KVEvict, KVQuantize, KVRetrieve, SparseAttention, StreamState, Speculate, RelaxedVerify)
"""The primitives that run."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The rewrites of a request by place; None where nothing acts."""

    encoder_out: TokenReduce | None = None
    pre_llm: TokenReduce | None = None
    layer: TokenReduce | None = None
    evict: KVEvict | None = None
    quantize: KVQuantize | None = None
    retrieve: KVRetrieve | None = None
    sparse: SparseAttention | None = None
    stream: StreamState | None = None
    speculate: Speculate | None = None
    relax: RelaxedVerify | None = None

    @staticmethod
    def of(techniques: Sequence[Technique]) -> Plan:
        """Return the plan of techniques that may go together."""
        parts = parts_of(techniques)
        check(parts)
        found: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part.rewrite, RUNS) or part.slot not in SLOTS:
                known = ", ".join(kind.__name__ for kind in RUNS)
                raise Unsupported(f"technique {part.name!r} acts on {part.slot!r}, which does not run; {known} do")
            found[SLOTS[part.slot]] = part.rewrite
        return Plan(**found)


def refuse(parameters: Any, *, neutral: dict[str, Any]) -> None:  # noqa: ANN401 - any primitive
    """Refuse sweeps, and settings that do not run: `neutral` names the only value of a field that does.

    Raises
    ------
    Unsupported
        With the field and the value that runs.
    """
    owner = type(parameters).__name__
    for field in fields(parameters):
        value = getattr(parameters, field.name)
        if isinstance(value, np.ndarray):
            raise Unsupported(f"{owner}.{field.name} is swept, and a run has one value; give one number")
        if field.name in neutral and value != neutral[field.name]:
            raise Unsupported(f"{owner}.{field.name}={value!r} does not run; leave it at {neutral[field.name]!r}")
