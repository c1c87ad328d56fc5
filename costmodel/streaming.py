"""An endless video: frames a second, latencies and memory once the state of the stream is full."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from costmodel.evaluate import Evaluator
from costmodel.hardware import HardwareProfile
from costmodel.memory import entry_bytes_per_token, memory, stage_share
from costmodel.predict import Prediction
from costmodel.query import Query, Stage, Turn
from costmodel.recurrent import RecurrentSpec
from costmodel.stages import Structure
from costmodel.sums import kept_tokens
from costmodel.sweep import shape_of
from costmodel.techniques.kv_common import is_cache
from costmodel.units import SECONDS_PER_HOUR, UNBOUNDED


@dataclass(frozen=True, slots=True)
class Streaming:
    """What a stream costs, chunk after chunk, for every stream of the batch.

    Parameters
    ----------
    frames_per_chunk : float
        Frames that one pass digests.
    chunk_s : float
        From a chunk's last frame until it is part of the state: preprocess, encode, adapt, prefill [s].
    frames_per_s : float
        Frames of one stream that the device digests for ever; the host prepares the next chunk meanwhile.
    token_s : float
        One token of an answer [s].
    question_s : float
        From a question until its first token [s].
    state_tokens : float
        Tokens of the longest cache that steps read.
    kv_bytes, host_kv_bytes : float
        Caches on one device, and on its host, after the video that the request holds [bytes].
    kv_bytes_per_frame, host_kv_bytes_per_frame : float
        What another frame adds to them for ever; 0 is a bounded state [bytes].
    """

    frames_per_chunk: float
    chunk_s: float
    frames_per_s: float
    token_s: float
    question_s: float
    state_tokens: float
    kv_bytes: float
    host_kv_bytes: float
    kv_bytes_per_frame: float
    host_kv_bytes_per_frame: float

    @property
    def is_bounded(self) -> bool:
        """Whether the device holds an endless video."""
        return self.kv_bytes_per_frame == 0

    def keeps_up(self, frames_per_s: float) -> bool:
        """Return whether frames are digested as fast as they come."""
        return self.frames_per_s >= frames_per_s

    def kv_bytes_after(self, hours: float, *, frames_per_s: float) -> float:
        """Return what device and host hold after so many hours more [bytes]."""
        frames = hours * SECONDS_PER_HOUR * frames_per_s
        grown = (self.kv_bytes_per_frame + self.host_kv_bytes_per_frame) * frames
        return self.kv_bytes + self.host_kv_bytes + grown


def streaming(
    source: Prediction | Query,
    hardware: HardwareProfile | None = None,
    *,
    frames: float,
    chunk_frames: float | None = None,
) -> Streaming:
    """Return what a video costs as a stream.

    Parameters
    ----------
    source : Prediction or Query
        A request with a video, after its techniques (`StreamState` and others); its text is the question. The video is
        what has been seen so far: without a bounded state, the next chunk is as dear as it is long.
    hardware : HardwareProfile, optional
        The device, for a query.
    frames : float
        Frames of that video.
    chunk_frames : float, optional
        Frames of a chunk; as many whole ones as a pass takes when not given.

    Raises
    ------
    ValueError
        If the request has no video, is a sweep, or a chunk has no frame.
    """
    query, device = (source.query, source.hardware) if isinstance(source, Prediction) else (source, hardware)
    if device is None:
        raise ValueError("streaming needs a device for a query; pass hardware, or a Prediction")
    visual = 0.0 if shape_of(query) else float(query.visual_tokens * query.turns[0].visual_share)
    if not visual > 0 or not frames > 0:
        raise ValueError(f"streaming needs one request with a video, and frames={frames!r} above 0; give both")
    frames_each = _chunk_frames(query, visual / frames, frames, chunk_frames)
    chunk_device_s, chunk_host_s = _chunk_s(query, device, frames_each / frames)
    question_s, token_s = _answer_s(query, device)
    structure = Structure.of(query)
    held = memory(query, device, structure)
    return Streaming(
        frames_per_chunk=frames_each,
        chunk_s=chunk_device_s + chunk_host_s,
        frames_per_s=frames_each / max(chunk_device_s, chunk_host_s),
        token_s=token_s,
        question_s=question_s,
        state_tokens=max((float(kept_tokens(query, e)) for e in query.kv if is_cache(e)), default=0.0),
        kv_bytes=held.kv_bytes,
        host_kv_bytes=held.host_kv_bytes,
        kv_bytes_per_frame=_growth_bytes(query, structure, "gpu") * visual / frames,
        host_kv_bytes_per_frame=_growth_bytes(query, structure, "host") * visual / frames,
    )


def _chunk_frames(query: Query, tokens_each: float, frames: float, given: float | None) -> float:
    """Return the frames of a chunk: those given, or as many whole ones as a pass takes, all if it takes them."""
    if given is None:
        return min(max(query.engine.prefill_chunk_tokens // tokens_each, 1.0), frames)
    if not 0 < given <= frames:
        raise ValueError(f"chunk_frames={given!r} must lie in (0, {frames:g}], the frames of the video; use fewer")
    return given


def _seen_tokens(query: Query) -> float:
    """Return the tokens of the video so far."""
    return float(query.turns[0].visual_share * (query.visual_tokens + query.media.marker_tokens))


def _chunk_s(query: Query, device: HardwareProfile, share: float) -> tuple[float, float]:
    """Return the time of the device, and of the host, for the next chunk: this share of the video so far [s]."""
    turn = Turn(query.turns[0].visual_share * share, 0.0, 1.0, prefix_tokens=_seen_tokens(query))
    bare = replace(query, turns=(turn,), overheads=())
    times = Evaluator.of(bare, device).turn(turn)
    digesting = Evaluator.of(replace(query, overheads=tuple(o for o in query.overheads if not o.each_turn)), device)
    stages: tuple[Stage, ...] = ("encode", "adapt", "prefill")
    added = sum(float(digesting.overhead_s(stage, query.turns[0])) for stage in stages)
    return float(times.encode_s + times.adapt_s + times.prefill_s) + share * added, float(times.preprocess_s)


def _answer_s(query: Query, device: HardwareProfile) -> tuple[float, float]:
    """Return the time to the first token of a question about the video so far, and of a further token [s]."""
    first = query.turns[0]
    turn = Turn(0.0, first.text_tokens, first.output_tokens, prefix_tokens=_seen_tokens(query))
    own = tuple(o for o in query.overheads if o.each_turn or o.stage == "decode")
    times = Evaluator.of(replace(query, turns=(turn,), overheads=own), device).turn(turn)
    return float(times.prefill_s), float(times.decode_step_s)


def _growth_bytes(query: Query, structure: Structure, placement: Literal["gpu", "host"]) -> float:
    """Return what one more visual token adds to the caches of a place, of all requests [bytes]."""
    total = 0.0
    for entry in query.kv:
        is_endless = entry.mixer.window >= UNBOUNDED and not isinstance(entry.mixer, RecurrentSpec)
        if entry.placement == placement and is_endless:
            total += float(entry.visual_share) * entry_bytes_per_token(entry, query.parallelism.tp)
    return float(query.replica_batch) * total * stage_share(structure)
