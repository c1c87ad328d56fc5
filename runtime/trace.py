"""Write down the operators of a `transformers` model that the cost model does not know, from its config alone.

The model is built on the meta device, so no weights and no memory are needed. The language model runs on two prompt
lengths, which shows how the rows of every product grow; the vision part runs on one square picture if it takes one.
What comes out is what `costmodel.families.traced` reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from costmodel.errors import first_line

LENGTHS: Final = (64, 96)
"""Prompt lengths [tokens] of the two runs: no power of two ratio, so that rows cannot agree by chance."""
PRODUCTS: Final = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm"})
N_PRODUCTS_OF_ATTENTION: Final = 2


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a run: the module that ran it, its kind, its operands' and its output's shape."""

    module: str
    kind: str
    operands: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]

    @property
    def is_batched(self) -> bool:
        """Whether it is one half of an attention."""
        return self.kind in ("bmm", "baddbmm")

    @property
    def d_in(self) -> int:
        """Width that is summed over."""
        if self.kind == "convolution":
            return _size(self.operands[1][1:])
        return self.operands[-1][-2] if self.kind == "mm" else _weight(self)[-2]

    @property
    def d_out(self) -> int:
        """Width of an output row."""
        return self.operands[1][0] if self.kind == "convolution" else self.output[-1]

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return _size(self.output) // self.d_out

    @property
    def experts(self) -> int:
        """Weights of a grouped product; 0 of a plain one."""
        return self.operands[1][0] if self.kind == "_grouped_mm" else 0


def _weight(product: Product) -> tuple[int, ...]:
    wide = [shape for shape in product.operands if len(shape) > 1]
    return wide[1]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def trace(config: dict[str, Any], *, source: str = "config.json") -> dict[str, Any]:
    """Return the operators of a model as an object that `load_model` reads from a file.

    Parameters
    ----------
    config : dict
        Content of a Hugging Face config.json.
    source : str
        What to call it in messages and in the result.

    Raises
    ------
    ValueError
        If `transformers` has no class for it, or its rows do not grow in proportion to the prompt.
    ModuleNotFoundError
        If PyTorch or `transformers` is not installed.
    """
    model = _build(config, source)
    unknown = ["element-wise operators (norms, activations, rotations) are not listed", "no parallelism is known"]
    runs = [_run_language(model, length) for length in LENGTHS]
    result = {
        "model_type": "lvlm-trace",
        "schema_version": 1,
        "source": source,
        "traced_model_type": config.get("model_type"),
        "decoder": _decoder(model, runs),
    }
    try:
        result["vision"] = _vision(model)
    except Exception as error:  # noqa: BLE001 - any failure inside a foreign model means the same
        unknown.append(f"the vision part could not be traced on a square picture: {first_line(error)}")
    return {**result, "unknown": unknown}


def _build(config: dict[str, Any], source: str) -> Any:  # noqa: ANN401 - transformers is untyped
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{source}: transformers has no class for model_type {model_type!r}; nothing to trace")
    parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(parsed) in auto._model_mapping:  # noqa: SLF001 - the only way to ask
            with torch.device("meta"):
                return auto.from_config(parsed, dtype=torch.bfloat16, attn_implementation="eager").eval()
    raise ValueError(f"{source}: transformers has no generating class for model_type {model_type!r}; nothing to trace")


@contextmanager
def _recorded() -> Iterator[list[Product]]:
    """Record every product run inside, with the module that runs it."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.module_tracker import ModuleTracker

    products: list[Product] = []
    tracker = ModuleTracker()

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            output = func(*args, **(kwargs or {}))
            kind = func._schema.name.partition("::")[2]  # noqa: SLF001 - the operator's own name
            if kind in PRODUCTS:
                shapes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
                inner = max(tracker.parents, key=len, default="")
                products.append(Product(inner, kind, shapes, tuple(output.shape)))
            return output

    with tracker, Recorder():  # type: ignore[no-untyped-call]
        yield products


def _run_language(model: Any, length: int) -> tuple[list[Product], Any]:  # noqa: ANN401
    """Return the products of a prompt of text, the head at its last position, and the cache that it leaves."""
    import torch

    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.no_grad(), _recorded() as products:
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return products, output.past_key_values


def _decoder(model: Any, runs: list[tuple[list[Product], Any]]) -> dict[str, Any]:  # noqa: ANN401
    (short, _), (long, cache) = runs
    if [p.module for p in short] != [p.module for p in long]:
        raise ValueError("the model runs other operators on a longer prompt; its trace would not hold")
    head = model.get_output_embeddings().weight
    vocabulary, width = head.shape
    body = [(a, b) for a, b in zip(short, long, strict=True) if b.d_out != vocabulary or b.is_batched]
    for a, b in body:
        if not b.is_batched and a.rows * LENGTHS[1] != b.rows * LENGTHS[0]:
            raise ValueError(f"rows of {b.module} do not grow in proportion to the prompt; the model cannot be traced")
    language = _language_parameters(model)
    ends = sum(p.numel() for p in {id(w): w for w in (head, model.get_input_embeddings().weight)}.values()) + width
    tower = _tower([b for _, b in body], LENGTHS[1])
    return {
        "width": width,
        "parameters": language - ends,
        "vocabulary": vocabulary,
        "end_parameters": ends,
        "cached_width": _cached_width(cache),
        **tower,
    }


def _language_parameters(model: Any) -> int:  # noqa: ANN401
    named = dict(model.named_parameters())
    return sum(p.numel() for name, p in named.items() if not _is_picture(name))


def _is_picture(module: str) -> bool:
    return bool(re.search(r"vision|visual|image|projector|qformer|merger|connector|resampler", module))


def _cached_width(cache: Any) -> int:  # noqa: ANN401
    """Return the numbers that one token leaves in the caches of all layers."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.shape[1] * t.shape[3] for t in tensors)


def _tower(products: list[Product], rows: int) -> dict[str, Any]:
    """Return products and attentions of a tower, equal ones counted."""
    plain = Counter(_line(p, rows) for p in products if not p.is_batched)
    halves = [p for p in products if p.is_batched]
    attentions = Counter(_attention(a, b, rows) for a, b in _pairs(halves))
    names = ("name", "d_in", "d_out", "rows_ratio", "experts")
    parts = ("heads", "qk_dim", "v_dim", "pairs_ratio")
    return {
        "products": [{**dict(zip(names, line, strict=True)), "repeats": n} for line, n in plain.items()],
        "attentions": [{**dict(zip(parts, line, strict=True)), "repeats": n} for line, n in attentions.items()],
    }


def _pairs(halves: list[Product]) -> Iterator[tuple[Product, Product]]:
    if len(halves) % N_PRODUCTS_OF_ATTENTION:
        raise ValueError("batched products do not pair up as attention; the model cannot be traced")
    return zip(halves[::2], halves[1::2], strict=True)


def _line(product: Product, rows: int) -> tuple[str, int, int, float, int]:
    name = re.sub(r"\.\d+(?=\.|$)", "", product.module).rpartition(".")[2] or product.kind
    return name, product.d_in, product.d_out, product.rows / rows, product.experts


def _attention(scores: Product, values: Product, rows: int) -> tuple[int, int, int, float]:
    """Return heads, widths and pairs of queries times keys, and weights times values."""
    left, right = (s for s in scores.operands if len(s) == 3)  # noqa: PLR2004 - batch, rows, width
    batch, queries, qk_dim = left
    keys, v_dim = right[-1], values.output[-1]
    heads = max(1, batch * queries // rows)  # the batch of the products, over the windows that the rows are cut into
    return heads, qk_dim, v_dim, batch * queries * keys / heads / rows**2


def _vision(model: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the vision part on one square picture of the config's size."""
    import torch

    side = _side(model.config)
    pixels = torch.zeros(1, 3, side, side, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), _recorded() as products:
        features = _features(model.get_image_features)(pixels)
    embeddings = _tensors(features)
    tokens = sum(_size(tuple(t.shape[:-1])) for t in embeddings)
    root = products[0].module.partition(".")[0]  # the part that embeds the patches runs first
    tower = [p for p in products if p.module.partition(".")[0] == root]
    adapter = [p for p in products if p.module.partition(".")[0] != root]
    rows = Counter(p.rows for p in tower if not p.is_batched).most_common(1)[0][0]
    weights = {n: p.numel() for n, p in model.named_parameters() if _is_picture(n)}
    encoder = {n: size for n, size in weights.items() if re.search(r"vision_tower|vision_model|visual", n)}
    return {
        "width": Counter(p.d_out for p in tower if not p.is_batched).most_common(1)[0][0],
        "parameters": sum(encoder.values()),
        "rows": rows,
        "side_px": side,
        "visual_tokens": tokens,
        "adapter": _tower(adapter, rows)["products"],
        "adapter_parameters": sum(weights.values()) - sum(encoder.values()),
        **_tower(tower, rows),
    }


def _side(config: Any) -> int:  # noqa: ANN401
    size = getattr(config.vision_config, "image_size", None)
    if size is None:
        raise ValueError("vision_config has no image_size")
    return int(size if isinstance(size, int) else size[0])


def _features(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda pixels: method(pixel_values=pixels)


def _tensors(features: Any) -> list[Any]:  # noqa: ANN401
    """Return the embeddings for the language model among what `get_image_features` gives."""
    found = getattr(features, "pooler_output", None)
    found = features if found is None else found
    return list(found) if isinstance(found, list | tuple) else [found]


def write(config_path: Path, output: Path) -> dict[str, Any]:
    """Trace the model of a config.json and write the result; return it."""
    result = trace(json.loads(config_path.read_text(encoding="utf-8")), source=str(config_path))
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
