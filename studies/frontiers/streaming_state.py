"""Streaming state: the rate, the latency and the memory at which an endless video runs.

Qwen2.5-VL-7B watches a video of 640x360 that is sampled at two frames a second. The state is kept in five ways; each is
asked once the video has run for an hour, or, where nothing bounds it, after some minutes.

    python -m studies.frontiers.streaming_state
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from costmodel import Prediction, Video, Workload, load_hardware, load_model, predict, technique
from costmodel.hardware import HardwareProfile
from costmodel.streaming import Streaming, streaming
from costmodel.techniques import Technique
from costmodel.techniques.kv_retrieve import KVRetrieve
from costmodel.techniques.stream_state import StreamState
from studies.frontiers.common import Numbers, markdown, panels, write
from studies.frontiers.texts import STREAMING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEL: Final = "qwen2.5-vl-7b"
ENGINE: Final = "vllm"
DEVICES: Final = (
    "jetson-agx-orin-64gb",
    "jetson-thor-128gb",
    "l4-24gb",
    "rtx-4090-24gb",
    "l40s-48gb",
    "a100-sxm4-80gb",
    "h100-sxm5-80gb",
    "h200-sxm-141gb",
)
UNIFIED: Final = ("jetson-agx-orin-64gb", "jetson-thor-128gb")
"""Devices that share their memory with the host."""
SMOKE_DEVICES: Final = ("l4-24gb", "h100-sxm5-80gb")
WIDTH, HEIGHT, FPS = 640, 360, 2.0
"""Frames as StreamingVLM's file assumes them: 299 tokens for each pair, so for each second (arXiv:2510.09608)."""
CHUNK_FRAMES: Final = 2.0
FRAME_TOKENS: Final = 149.5
SEEN_S: Final = 3600.0
QUESTION_TOKENS: Final = 32
ANSWER_TOKENS: Final = 64
"""Assumed."""
GROWING_S: Final = (60.0, 600.0, 3600.0)
"""When a state that nothing bounds is asked."""
LOCAL_TOKENS: Final = 15_000.0
RETRIEVED_FRAMES: Final = 64.0
"""ReKV: its local window (n_local of its code, as the tests of this project have it), and frames for a question."""
PUBLISHED_FPS: Final = {"llava-onevision-7b": 11.0, "llava-onevision-0.5b": 17.0}
"""ReKV, Table 5 (arXiv:2503.00540): frames a second on an H800, 196 tokens each, at half a frame a second."""
PUBLISHED_FRAME: Final = 196.0
PUBLISHED_TOKEN_S: Final = {"StreamingVLM": 0.05, "recompute": 0.4}
"""StreamingVLM, efficiency plot: a token on an H100, kept and computed again; read off, a range of 0.25 to 0.41 s."""
MOST_STREAMS: Final = 512


def methods() -> Mapping[str, list[Technique]]:
    """Return the ways of keeping the state."""
    kept = technique("streamingvlm")
    (streaming_vlm,) = kept.parts  # type: ignore[attr-defined]
    again = {name: getattr(streaming_vlm, name) for name in ("sink_tokens", "text_window", "visual_window_tokens")}
    return {
        "StreamingVLM": [kept],
        "InfiniPot-V": [technique("infinipot")],
        "retrieval (ReKV)": [
            KVRetrieve(
                tokens=RETRIEVED_FRAMES * FRAME_TOKENS,
                chunk_tokens=FRAME_TOKENS,
                placement="host",
                during_prefill=True,
            ),
            StreamState(visual_window_tokens=LOCAL_TOKENS, chunk_tokens=CHUNK_FRAMES * FRAME_TOKENS),
        ],
        "recompute": [StreamState(recompute=True, chunk_tokens=CHUNK_FRAMES * FRAME_TOKENS, **again)],
    }


def alone(method: str) -> tuple[str, ...]:
    """Return the devices on which a way cannot be kept: those whose memory is the host's have nowhere to put it."""
    return UNIFIED if method == "retrieval (ReKV)" else ()


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """A way of keeping the state on a device, after so many seconds of video.

    Parameters
    ----------
    method : str
    device : HardwareProfile
    techniques : sequence of Technique
    seconds : float
        Of the video so far [s].
    streams : int
        Videos that the device watches at once.
    engine : str
    """

    method: str
    device: HardwareProfile
    techniques: Sequence[Technique]
    seconds: float = SEEN_S
    streams: int = 1
    engine: str = ENGINE

    def predicted(self, seconds: float) -> Prediction:
        """Return the prediction of a video of so many seconds."""
        video = Video(WIDTH, HEIGHT, seconds, FPS, frames=round(seconds * FPS))
        work = Workload(videos=[video], text_tokens=QUESTION_TOKENS, output_tokens=ANSWER_TOKENS)
        batch = float(self.streams)
        return predict(MODEL, self.device, work, techniques=self.techniques, batch=batch, engine=self.engine)

    def row(self) -> Numbers:
        """Return rates, latencies and memory."""
        prediction, frames = self.predicted(self.seconds), round(self.seconds * FPS)
        # InfiniPot-V digests blocks; the others a second at once
        chunk = None if self.method == "InfiniPot-V" else CHUNK_FRAMES
        found = streaming(prediction, frames=frames, chunk_frames=chunk)
        host_s = prediction.stages["preprocess"].time_s * found.frames_per_chunk / frames
        kv_bytes = max(found.kv_bytes, self.window_bytes())
        free = prediction.memory.usable_bytes - kv_bytes - self.fixed_bytes(found)
        return {
            "method": self.method,
            "device": self.device.name,
            "seconds": self.seconds,
            "frames_per_chunk": found.frames_per_chunk,
            "frames_per_s": found.frames_per_s,
            "device_frames_per_s": found.frames_per_chunk / (found.chunk_s - host_s),
            "host_frames_per_s": found.frames_per_chunk / host_s,
            "chunk_s": found.chunk_s,
            "frame_s": found.chunk_s / found.frames_per_chunk,
            "question_s": found.question_s,
            "token_s": found.token_s,
            "kv_gb": kv_bytes / 1e9,
            "host_gb_per_hour": found.host_kv_bytes_per_frame * FPS * SEEN_S / 1e9,
            "is_bounded": found.is_bounded,
            "fits": free >= 0.0,
            "full_after_s": full_after_s(found, free),
        }

    def window_bytes(self) -> float:
        """Return the state between chunks: retrieval holds its local window while it encodes, and else what it read."""
        tokens = max((getattr(t, "state_tokens", 0.0) for t in self.techniques), default=0.0)
        return self.streams * tokens * load_model(MODEL).decoder.kv_bytes_per_token()

    def fixed_bytes(self, found: Streaming) -> float:
        """Return weights, reserve, and the activations of one chunk; the video is not on the device as a whole."""
        held = self.predicted(math.ceil(found.frames_per_chunk / FPS)).memory
        return held.weights_bytes + held.reserve_bytes + held.activation_bytes


def full_after_s(found: Streaming, free_bytes: float) -> float | None:
    """Return when the device is full, from the start of the video; None where the state is bounded [s]."""
    if found.is_bounded:
        return None
    return max(0.0, (found.kv_bytes + free_bytes) / (found.kv_bytes_per_frame * FPS))


def most_streams(one: Watched, most: int) -> Numbers:
    """Return how many streams the device keeps up with, as far as its rate and its memory go, the host left out."""

    def holds(n: int) -> bool:
        found = replace(one, streams=n).row()
        return bool(found["device_frames_per_s"] >= FPS and found["fits"])

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return {"method": one.method, "device": one.device.name, "streams": low}


def published() -> list[Numbers]:
    """Return ours beside published rates and times of a token, with the eager engine as their software was."""
    rows: list[Numbers] = []
    rekv = methods()["retrieval (ReKV)"]
    for model, rate in PUBLISHED_FPS.items():
        work = Workload(visual_tokens=PUBLISHED_FRAME * 1800, text_tokens=QUESTION_TOKENS, output_tokens=ANSWER_TOKENS)
        p = predict(model, "h800-sxm5-80gb", work, techniques=rekv, engine="hf-eager")
        ours = streaming(p, frames=1800, chunk_frames=1.0).frames_per_s
        rows.append({"what": f"ReKV encoding, {model}, frames/s", "published": rate, "ours": ours})
    h100 = load_hardware("h100-sxm5-80gb")
    for name, seconds in PUBLISHED_TOKEN_S.items():
        ours = Watched(name, h100, methods()[name], engine="hf-eager").row()["token_s"]
        rows.append({"what": f"{name}, a token on H100 [s]", "published": seconds, "ours": ours})
    return rows


def numbers(smoke: bool) -> Numbers:  # noqa: FBT001 - the size, as the command line has it
    """Return every way on every device, what grows without a bound, and the streams of a device."""
    devices = [load_hardware(name) for name in (SMOKE_DEVICES if smoke else DEVICES)]
    pairs = [(name, d, given) for d in devices for name, given in methods().items() if d.name not in alone(name)]
    ways = [Watched(*pair) for pair in pairs]
    rows = [way.row() for way in ways]
    growing = [Watched("everything kept", device, [], seconds).row() for device in devices for seconds in GROWING_S]
    most = 4 if smoke else MOST_STREAMS
    many = [most_streams(way, most) for way in ways]
    found = {"rows": rows, "growing": growing, "streams": many, "published": published()}
    return {"model": MODEL, "engine": ENGINE, **found}


def way_table(found: Numbers) -> str:
    """Return the bounded ways by device."""
    many = {(s["device"], s["method"]): s["streams"] for s in found["streams"]}
    rows = []
    for r in found["rows"]:
        rates = (f"{r['frames_per_s']:.1f}", f"{r['device_frames_per_s']:.1f}", f"{r['chunk_s'] * 1e3:.0f}")
        times = (f"{r['frame_s'] * 1e3:.0f}", f"{r['question_s'] * 1e3:.0f}", f"{r['token_s'] * 1e3:.1f}")
        held = (f"{r['kv_gb']:.2f}", f"{r['host_gb_per_hour']:.0f}", "yes" if r["fits"] else "no")
        rows.append((r["device"], r["method"], *rates, *times, *held, f"{many[r['device'], r['method']]}"))
    columns = ("device", "state", "frames/s", "of the device alone", "chunk ms", "ms a frame", "question ms")
    return markdown((*columns, "token ms", "cache GB", "host GB an hour", "fits", "streams at 2 frames/s"), rows)


def growing_table(found: Numbers) -> str:
    """Return what grows."""
    rows = []
    for r in found["growing"]:
        full = f"{(r['full_after_s'] or 0.0) / 60:.0f} min"
        times = (f"{r['seconds'] / 60:.0f} min", f"{r['frames_per_s']:.1f}", f"{r['chunk_s'] * 1e3:.0f}")
        rows.append((r["device"], *times, f"{r['kv_gb']:.1f}", "yes" if r["fits"] else "no", full))
    return markdown(("device", "seen", "frames/s", "chunk ms", "cache GB", "fits", "device full after"), rows)


def report(found: Numbers) -> str:
    """Return the page."""
    beside = [
        (r["what"], f"{r['published']:g}", f"{r['ours']:.3g}", f"{r['ours'] / r['published'] - 1:+.0%}")
        for r in found["published"]
    ]
    return STREAMING.format(
        model=MODEL,
        engine=ENGINE,
        table=way_table(found),
        growing=growing_table(found),
        host=found["rows"][-1]["host_frames_per_s"],
        published=markdown(("what", "published", "ours", "error"), beside),
    )


def draw(found: Numbers, path: Path) -> None:
    """Draw frames a second, the latency of a frame, and streams by device."""

    def paint(axes: Sequence[Axes]) -> None:
        names = list(dict.fromkeys(r["device"] for r in found["rows"]))
        panel = (("rows", "device_frames_per_s"), ("rows", "frame_s"), ("streams", "streams"))
        labels = ("frames/s of the device", "latency a frame [s]", "streams at 2 frames/s")
        for one, (table, key), label in zip(axes, panel, labels, strict=True):
            for method, marker in zip(methods(), "osv^", strict=True):
                line = [(names.index(r["device"]), r[key]) for r in found[table] if r["method"] == method]
                one.plot(*zip(*line, strict=True), marker, label=method)
            one.set_yscale("symlog" if key == "streams" else "log")
            one.set_xticks(range(len(names)), [name.rsplit("-", 1)[0] for name in names], rotation=60, fontsize=7)
            one.set_ylabel(label)
            one.grid(visible=True, color="0.92")
        axes[0].axhline(FPS, color="black", linestyle=":", label="2 frames/s arrive")
        axes[0].legend(fontsize=7)

    panels(path, 3, paint)


if __name__ == "__main__":
    write("streaming_state", numbers, report, draw)
