"""The time of a serving step from sums that a worker keeps, compiled once: what the simulator asks millions of times.

A step runs prefill chunks and decoding sequences in one forward pass. Its operators are those of
`costmodel.serving_step`, priced as every stage is; `costmodel.lean` reads the same tables without arrays. Steps with
decoding sequences alone, which are nearly all, take a short way: for a number of sequences everything but the keys is
one number, and each cache entry is one line of its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.blocks import Work
from costmodel.catalogue import load_model
from costmodel.deployment import Parallelism, Precision
from costmodel.engine import EngineProfile, load_engine
from costmodel.evaluate import Evaluator, kernels_of
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.lean import LeanTable, Line, cached_table, without_line
from costmodel.media import MediaTotals, media_totals
from costmodel.memo import MOST
from costmodel.memory import Memory, memory
from costmodel.models import ModelSpec
from costmodel.priced import PricedTable, priced
from costmodel.query import KVEntry, Query, Turn, build_query
from costmodel.serving_step import StepSums, step_table
from costmodel.stages import Structure
from costmodel.sums import touched_share
from costmodel.techniques import Technique, compose
from costmodel.workload import Image, Video, Workload


@dataclass(frozen=True, slots=True)
class ReadClass:
    """Layers whose decode attention reads equally many keys of a sequence.

    Parameters
    ----------
    visual_share, text_share, cross_share, fixed_tokens, read_share
        As in `KVEntry`.
    cap : float
        Window: more are not read.
    grows : bool
        Whether generated tokens are added.
    """

    visual_share: Quantity
    text_share: Quantity
    cross_share: Quantity
    fixed_tokens: Quantity
    read_share: Quantity
    cap: float
    grows: bool

    @staticmethod
    def of(entry: KVEntry) -> ReadClass:
        """Return the class of a cache entry."""
        return ReadClass(
            visual_share=entry.visual_share,
            text_share=entry.text_share,
            cross_share=entry.cross_share,
            fixed_tokens=entry.fixed_tokens,
            read_share=entry.read_share,
            cap=float(entry.mixer.window),
            grows=entry.grows,
        )

    def kept(self, visual: Quantity, other: Quantity, cross: Quantity = 0.0) -> Quantity:
        """Return the keys that a prompt leaves."""
        seen = self.visual_share * visual + self.text_share * other + self.cross_share * cross
        return self.fixed_tokens + seen

    def reads(self, kept: Quantity, generated: Quantity) -> Quantity:
        """Return the keys that a step reads after this many generated tokens."""
        return self.read_share * np.minimum(kept + generated * self.grows, self.cap)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What one segment of layers has to do for the prefill chunks of a step.

    Parameters
    ----------
    rows : float
        New tokens that go through it.
    pairs : float
        Query-key pairs.
    keys : float
        Keys that are read, those of earlier chunks included.
    """

    rows: float
    pairs: float
    keys: float


@dataclass(frozen=True, slots=True, eq=False)
class StepModel:
    """The step times of one worker; in a pipeline from the first stage to the last, whatever else is under way.

    Parameters
    ----------
    query : Query
        Model, engine, precision, parallelism and techniques, resolved.
    hardware : HardwareProfile
    structure : Structure
    table : PricedTable
        The operators of a step on the device.
    read_classes : tuple of ReadClass
        By cache entry.
    floors_s : tuple of float
        Least time of a step with prefill chunks, and of one without, in which the host issues the kernels [s].
    step_host_s, sequence_host_s, request_host_s : float
        Time of the host a step, for each sequence in it, and where a prompt ends [s].
    without_line : tuple of int
        Read classes whose attention has no curve.
    lean : LeanTable or None
        The same table without arrays, where every operator has a curve.
    cached : PricedTable or None
        What a step does to the cache, where that comes on top of the host's time.
    """

    query: Query
    hardware: HardwareProfile
    structure: Structure
    table: PricedTable
    read_classes: tuple[ReadClass, ...]
    floors_s: tuple[float, float]
    step_host_s: float
    sequence_host_s: float
    request_host_s: float
    without_line: tuple[int, ...]
    lean: LeanTable | None
    cached: PricedTable | None = None
    _at: dict[tuple[float, ...], tuple[float, tuple[Line | None, ...]]] = field(default_factory=dict)

    @staticmethod
    def of(
        model: str | ModelSpec,
        hardware: str | HardwareProfile,
        *,
        engine: str | EngineProfile = "vllm",
        precision: Precision | None = None,
        parallelism: Parallelism | None = None,
        techniques: Sequence[Technique] = (),
        pictures: bool = True,
    ) -> StepModel:
        """Compile the steps of a model on a device; without pictures, layers of cross-attention do not run.

        Raises
        ------
        LookupError, ValueError
            As `costmodel.predict`.
        """
        spec = load_model(model) if isinstance(model, str) else model
        device = load_hardware(hardware) if isinstance(hardware, str) else hardware
        profile = load_engine(engine) if isinstance(engine, str) else engine
        workload = Workload(visual_tokens=1.0 if spec.media and pictures else None, text_tokens=1.0)
        query = build_query(spec, workload, profile, precision=precision, parallelism=parallelism)
        query = compose(query, techniques) if techniques else query
        return StepModel.of_query(query, device)

    @staticmethod
    def of_query(query: Query, device: HardwareProfile) -> StepModel:
        """Compile the steps of requests like those of a query, which may be many: shares of tokens may differ."""
        structure, engine = Structure.of(query), query.engine
        n_layers = structure.n_layers("decode")
        floors = [engine.layer_host_s.get(stage, 0.0) * n_layers / device.host_speed for stage in ("prefill", "decode")]
        table = priced(step_table(structure), kernels_of(query, device))
        return StepModel(
            query=query,
            hardware=device,
            structure=structure,
            table=table,
            without_line=without_line(table, len(structure.kv)),
            lean=None if table.flat else LeanTable.of(table),
            cached=cached_table(table, len(structure.kv)) if engine.cache_adds_to_host else None,
            read_classes=tuple(ReadClass.of(entry) for entry in structure.kv),
            floors_s=(floors[0], floors[1]),
            step_host_s=engine.step_host_s / device.host_speed,
            sequence_host_s=engine.sequence_host_s / device.host_speed,
            request_host_s=engine.request_host_s / device.host_speed,
        )

    @property
    def n_segments(self) -> int:
        """Segments of layers, for each of which a chunk says what it brings."""
        return len(self.structure.decoder)

    def memory(self) -> Memory:
        """Return weights, activations and what is left for the cache on one device."""
        return memory(self.query, self.hardware, self.structure)

    # Pictures

    def media(self, images: Sequence[Image] = (), videos: Sequence[Video] = ()) -> MediaTotals:
        """Return what pictures of a request add up to.

        Raises
        ------
        Unsupported
            If the model has no vision part.
        """
        workload = Workload(images=tuple(images), videos=tuple(videos))
        return media_totals(self.query.model, workload, executed=self.query.engine.executes_everything)

    def encode_s(self, media: MediaTotals) -> float:
        """Return the time of encoder and adapter on pictures that are encoded together [s]."""
        evaluator, turn = self._with(media)
        return float(evaluator.stage_s("encode", turn)) + float(evaluator.stage_s("adapt", turn))

    def preprocess_s(self, media: MediaTotals) -> float:
        """Return the time of one worker of the host for the pictures of a request, and of their copy [s]."""
        evaluator, turn = self._with(media)
        return float(evaluator.stage_s("preprocess", turn))

    def _with(self, media: MediaTotals) -> tuple[Evaluator, Turn]:
        query = replace(self.query, media=media, visual_tokens=media.visual_tokens)
        return Evaluator.of(query, self.hardware), query.turns[0]

    # Any step

    def sums(self, chunks: Sequence[Chunk], finishing: float, decoding: float, keys: Sequence[float]) -> StepSums:
        """Return the sums of a step.

        Parameters
        ----------
        chunks : sequence of Chunk
            By segment; empty for none.
        finishing : float
            Sequences whose prompt ends, which go through the head.
        decoding : float
            Sequences that decode.
        keys : sequence of float
            By read class, the keys that all of them read.
        """
        works = tuple(
            Work(1.0, c.rows, c.pairs, c.keys, touched_share(self.query, c.rows + decoding)) for c in chunks
        ) or tuple(Work(0.0, 0.0, 0.0, 0.0, touched_share(self.query, decoding)) for _ in range(self.n_segments))
        rows = (max(c.rows for c in chunks) if chunks else 0.0) + decoding
        sequences = finishing + decoding
        return StepSums(
            passes=1.0,
            rows=rows,
            sequences=sequences,
            head_passes=min(sequences, 1.0),
            chunk_passes=float(bool(chunks)),
            decode_passes=min(decoding, 1.0),
            decoding=decoding,
            chunks=works,
            keys=tuple(keys),
        )

    def step_s(self, chunks: Sequence[Chunk], finishing: float, decoding: float, keys: Sequence[float]) -> float:
        """Return the time of a step [s]; arguments as for `sums`."""
        if not chunks:
            return self.decode_step_s(int(decoding), keys)
        sums = self.sums(chunks, finishing, decoding, keys).flat()
        if self.lean is None:
            device_s = float(self.table.total_s(np.array(sums, dtype=float)[:, None])[0])
        else:
            device_s = self.lean.total_s(sums)  # type: ignore[arg-type]
        host_s = self.step_host_s + (finishing + decoding) * self.sequence_host_s
        beyond_s = self._beyond_host_s(sums)
        return (
            max(device_s - beyond_s, self.floors_s[0]) + beyond_s + host_s + (self.request_host_s if finishing else 0.0)
        )

    # Steps with decoding sequences alone

    def decode_step_s(self, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step with nothing but decoding sequences [s].

        Parameters
        ----------
        decoding : int
            Sequences; at least one.
        keys : sequence of float
            By read class, the keys that all of them read.
        """
        device_s, lines = self.lines(decoding, keys)
        for line, total in zip(lines, keys, strict=True):
            if line is not None:
                device_s += line.read(total / decoding)
        beyond_s = self._beyond_host_s(self.sums((), 0.0, decoding, keys).flat()) if self.cached else 0.0
        return max(device_s - beyond_s, self.floors_s[1]) + beyond_s + self._host_s(decoding)

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return bit by bit what `decode_step_s` would for the next steps if no sequence comes or goes, shape (k,) [s].

        Parameters
        ----------
        decoding : int
            Sequences; at least one.
        keys, growth : sequence of float
            By read class, the keys that the first of these steps reads, and how many more each step adds.
        k : int
            Steps.
        """
        rest, lines = self.lines(decoding, keys)
        if self.cached or (self.without_line and any(growth[i] for i in self.without_line)):
            after = ([first + i * more for first, more in zip(keys, growth, strict=True)] for i in range(k))
            return np.array([self.decode_step_s(decoding, some) for some in after])
        device_s, steps = np.full(k, rest), np.arange(k, dtype=float)
        for line, first, more in zip(lines, keys, growth, strict=True):
            if line is not None:
                device_s += line.read_many((first + steps * more) / decoding)
        times: Array = np.maximum(device_s, self.floors_s[1]) + self._host_s(decoding)
        return times

    def _beyond_host_s(self, sums: Sequence[Quantity]) -> float:
        """Return the device's time that does not hide behind the host's [s]."""
        return 0.0 if self.cached is None else float(self.cached.total_s(np.array(sums, dtype=float)[:, None])[0])

    def _host_s(self, decoding: int) -> float:
        return self.step_host_s + decoding * self.sequence_host_s

    def lines(self, decoding: int, keys: Sequence[float]) -> tuple[float, tuple[Line | None, ...]]:
        """Return the time of everything but cached keys, and the lines of the cache entries.

        An entry without a curve has no line; its keys are in the rest, which is worked out again when they change.
        """
        unlined = self.without_line
        key = (decoding, *(keys[i] for i in unlined)) if unlined else (decoding,)
        found = self._at.get(key)
        if found is None:
            if len(self._at) >= MOST:
                self._at.clear()
            found = self._at[key] = self._work_out(decoding, keys)
        return found

    def _work_out(self, decoding: int, keys: Sequence[float]) -> tuple[float, tuple[Line | None, ...]]:
        held = [keys[i] if i in self.without_line else 0.0 for i in range(len(self.read_classes))]
        column = np.array(self.sums((), 0.0, decoding, held).flat(), dtype=float)[:, None]
        rest = float(self.table.total_s(column)[0]) - sum(float(s.total_s(column)[0]) for s in self.table.steps)
        steps = iter(sorted(self.table.steps, key=lambda step: step.row))  # the order of the cache entries
        n_classes = len(self.read_classes)
        lines = (None if i in self.without_line else Line.of(next(steps), decoding) for i in range(n_classes))
        return rest, tuple(lines)
