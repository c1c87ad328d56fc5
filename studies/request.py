"""From options to a model, a workload and a prediction, and back to the resolved inputs of the JSON output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from costmodel import (
    Parallelism,
    Precision,
    Prediction,
    Video,
    Workload,
    build_query,
    load_engine,
    load_hardware,
    load_model,
    predict,
)
from costmodel.catalogue import with_pixel_limits
from costmodel.media import n_frames
from costmodel.models import ModelSpec
from costmodel.query import Query
from studies import parse
from studies.options import Prompt, Serving


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A model and what one request brings to it.

    Parameters
    ----------
    model : ModelSpec
        With the pixel limits that were asked for.
    workload : Workload
        Pictures, text and output.
    prompt : Prompt
        As it was typed.
    """

    model: ModelSpec
    workload: Workload
    prompt: Prompt

    @staticmethod
    def of(model: str, prompt: Prompt, output_tokens: int = 1) -> Request:
        """Resolve a model's name and a prompt.

        Raises
        ------
        LookupError
            If nobody knows the model.
        ValueError
            If an option has a value that cannot be, or would change nothing.
        """
        spec = load_model(model)
        if prompt.pixels is not None:
            if not (prompt.image or prompt.video):
                raise ValueError("--pixels limits pictures, and there are none; add --image or --video")
            spec = with_pixel_limits(spec, *parse.pixels(prompt.pixels))
        images = [parse.image(text) for text in prompt.image]
        workload = Workload(images, _videos(prompt), text_tokens=prompt.text, output_tokens=output_tokens)
        return Request(spec, workload, prompt)

    def inputs(self) -> dict[str, Any]:
        """Return what was asked, resolved."""
        workload, prompt, rule = self.workload, self.prompt, self.model.media
        images = zip(workload.images, prompt.image, strict=True)
        videos = zip(workload.videos, prompt.video, strict=True)
        return {
            "model": {"name": self.model.name, "family": self.model.family, "source": self.model.source},
            "images": [{"source": text, "width": i.width, "height": i.height, "codec": i.codec} for i, text in images],
            "videos": [
                {
                    "source": text,
                    "width": video.width,
                    "height": video.height,
                    "seconds": video.seconds,
                    "fps": video.fps,
                    "frames": n_frames(rule, video) if rule else None,
                }
                for video, text in videos
            ],
            "pixels": list(parse.pixels(prompt.pixels)) if prompt.pixels else None,
            "text": prompt.text,
        }


def _videos(prompt: Prompt) -> list[Video]:
    for name in ("frames", "fps"):
        if getattr(prompt, name) is not None and not prompt.video:
            raise ValueError(f"--{name} samples videos, and there are none; add --video")
    if prompt.frames is not None and prompt.fps is not None:
        raise ValueError("--frames and --fps exclude each other; give one of them")
    videos = [parse.video(text) for text in prompt.video]
    return [replace(video, frames=prompt.frames, sample_fps=prompt.fps) for video in videos]


def build_request(request: Request, serving: Serving) -> Query:
    """Return the query of a request before any technique."""
    check_encoder(request.model, serving)
    return build_query(
        request.model,
        request.workload,
        load_engine(serving.engine),
        batch=serving.batch,
        precision=Precision(serving.weight_bits, serving.activation_bits, serving.kv_bits),
        parallelism=parallelism_of(serving),
    )


def predict_request(request: Request, hardware: str, serving: Serving) -> Prediction:
    """Predict a request on a device."""
    check_encoder(request.model, serving)
    return predict(
        request.model,
        load_hardware(hardware),
        request.workload,
        techniques=[parse.method(text) for text in serving.technique],
        batch=serving.batch,
        precision=Precision(serving.weight_bits, serving.activation_bits, serving.kv_bits),
        parallelism=parallelism_of(serving),
        engine=serving.engine,
    )


def check_encoder(model: ModelSpec, serving: Serving) -> None:
    """Refuse to share an encoder that is not there."""
    if model.vision is None and (serving.encoder_tp is not None or serving.encoder_dp > 1):
        raise ValueError(
            f"--encoder-tp and --encoder-dp share a vision encoder, and {model.name} has none; leave them out"
        )


def parallelism_of(serving: Serving) -> Parallelism:
    """Return how many devices share the model."""
    return Parallelism(serving.tp, serving.pp, serving.dp, serving.ep, serving.encoder_tp, serving.encoder_dp)


def serving_inputs(request: Request, hardware: str, serving: Serving) -> dict[str, Any]:
    """Return what was asked of a prediction, resolved."""
    return {
        **request.inputs(),
        "hardware": {"name": load_hardware(hardware).name, "source": hardware},
        "engine": serving.engine,
        "output": serving.output,
        "batch": serving.batch,
        "precision": {
            "weight_bits": serving.weight_bits,
            "activation_bits": serving.activation_bits,
            "kv_bits": serving.kv_bits,
        },
        "parallelism": {
            "tp": serving.tp,
            "pp": serving.pp,
            "dp": serving.dp,
            "ep": serving.ep,
            "encoder_tp": parallelism_of(serving).encoder,
            "encoder_dp": serving.encoder_dp,
        },
        "techniques": [
            dict(zip(("name", "parameters"), parse.split_method(text), strict=True)) for text in serving.technique
        ],
    }


def describe(prediction: Prediction, request: Request) -> list[str]:
    """Return who was asked and what, in two lines."""
    precision, parallelism = prediction.query.precision, prediction.query.parallelism
    device = prediction.hardware.name
    degrees = {"TP": parallelism.tp, "PP": parallelism.pp, "DP": parallelism.dp, "EP": parallelism.ep}
    degrees |= {"encoder TP": parallelism.encoder, "encoder DP": parallelism.encoder_dp}
    used = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    where = device if parallelism.devices == 1 else f"{parallelism.devices} x {device} ({used})"
    widths = f"{precision.weight_bits}/{precision.activation_bits}/{precision.kv_bits} bits"
    tokens = prediction.tokens
    asked = (
        f"{pictures(request)}: {tokens['visual']:,} visual + {tokens['markers']:,} marker + {tokens['text']:,} text"
        f" = {tokens['prompt']:,} prompt tokens; {request.workload.output_tokens:,} output tokens;"
        f" batch {float(prediction.query.batch):g}"
    )
    served = f"engine {prediction.query.engine.name}, {widths} (weights, inputs, KV)"
    return [f"{request.model.name} on {where}, {served}", asked]


def pictures(request: Request) -> str:
    """Return the pictures of a request in words."""
    workload, rule = request.workload, request.model.media
    sizes: dict[str, int] = {}
    for image in workload.images:
        name = f"image {image.width}x{image.height}" + (f" ({image.codec})" if image.codec != "jpeg" else "")
        sizes[name] = sizes.get(name, 0) + 1
    for video in workload.videos:
        frames = f", {n_frames(rule, video)} frames" if rule else ""
        name = f"video {video.width}x{video.height} of {video.seconds:g} s{frames}"
        sizes[name] = sizes.get(name, 0) + 1
    parts = [name if count == 1 else f"{count} x {name}" for name, count in sizes.items()]
    return "; ".join(parts) or "text alone"
