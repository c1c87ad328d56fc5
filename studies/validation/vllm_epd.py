"""vLLM on four A100s: the published serving curve, the host constants fitted to it, and predictions from them.

The curve (`published/vllm_dp4_400_tokens.csv`) is that of the vLLM blog on encoder disaggregation: Qwen3-VL-4B with
`--data-parallel-size 4`, 1 to 4 pictures of 640x640 (JPEG, `vllm bench serve --dataset-name random-mm`), 400 tokens of
text, 150 out, 1,000 requests a run. Engine `vllm-0.11` holds what `calibrate` found.

Run `python -m studies.validation.vllm_epd` to write what stands beside this file, with `--calibrate` to fit anew.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from costmodel import Image, load_engine, load_hardware
from costmodel.base import Array
from costmodel.engine import EngineProfile
from costmodel.step import StepModel
from simulator import Pool, ServingPlan
from simulator.report import Spread
from simulator.request import Ints, Items, Requests, requests_of
from simulator.step_service import StepService
from simulator.traffic import arrival_times
from studies.validation.encoder_apart import EncoderApart, EncodesOnly, Instance, LoadsEmbeddings, Times
from studies.validation.one_server import Lockstep, OneServer
from studies.validation.serving_curve import THROUGHPUT, TPOT, TTFT, CurvePoint, measured_points

MODEL: Final = "qwen3-vl-4b"
HARDWARE: Final = "a100-sxm4-80gb"
ENGINE: Final = "vllm-0.11"
SOURCE: Final = "vllm-epd-blog"
PREDICTIONS: Final = Path(__file__).with_name("vllm_epd_predictions.csv")
PICTURE: Final = Image(640, 640)
OUTPUT_TOKENS: Final = 150
PROMPTS: Final = 1000
RANKS: Final = 4
RANK_TOKENS: Final = 2048
"""Tokens of a rank's step: vLLM's default of an API server on an A100."""
LANGUAGE: Final = 3
"""Instances of prefill and decode beside one that encodes."""
MOST_SEQUENCES, ENCODER_TOKENS = 64, 114_688
"""`--max-num-seqs` of all instances and `--max-num-batched-tokens` of the encoder's, in the script with which an author
of the blog tries to reproduce it (`epd_test_num.sh`, vLLM issue 31961)."""
DEAL_SEED: Final = (0, 2)
"""The proxy draws instances of prefill and decode with Python's `random.choice`, unseeded."""
IMAGES: Final = (1, 2, 3, 4)
TEXTS: Final = (400, 800, 2000)
RATES: Final = tuple(range(4, 25))
WEIGHTS: Final[Mapping[str, float]] = {THROUGHPUT: 2.0, TPOT: 0.5}
"""Of logarithms in the fit: throughputs scatter by a few percent between runs, 99th percentiles four times as much."""
START: Final = (37e-3, 18e-3, 0.7e-3)
"""Seconds a request, a picture and a layer from which the fit starts."""
STEP: Final = 0.03
"""Relative step of its derivatives: below it, the counts of a run do not change."""
MOST_CALLS: Final = 8


class Deployment(Protocol):
    """How requests of so many pictures are served."""

    def served(self, requests: Requests) -> Times:
        """Return when requests had their tokens."""


Topology: TypeAlias = Callable[[int, EngineProfile], Deployment]
"""From pictures of a request and an engine to a deployment."""


def dp4(n_images: int, engine: EngineProfile) -> Instance:
    """Return four ranks that step together, behind one API server."""
    pool = Pool(hardware=HARDWARE, engine=ENGINE, long_prefill_tokens=RANK_TOKENS)
    return Instance(ServingPlan(model=MODEL, pools=(pool,)), Lockstep(_rank(engine), n_images, RANKS))


def independent4(n_images: int, engine: EngineProfile) -> Instance:
    """Return four ranks that do not wait for each other, dealt out in turn, behind one API server."""
    pool = Pool(hardware=HARDWARE, engine=ENGINE, workers=RANKS)
    return Instance(ServingPlan(model=MODEL, pools=(pool,)), OneServer(_rank(engine), n_images))


@dataclass(frozen=True, slots=True)
class Storage:
    """Where embeddings lie between instances, whose steps wait for copies to and from it.

    Parameters
    ----------
    put_bytes_per_s, get_bytes_per_s : float
        How fast they go in and out, beside the copy between device and host [bytes/s].
    """

    put_bytes_per_s: float
    get_bytes_per_s: float


STORAGES: Final[Mapping[str, Storage]] = {
    "file": Storage(0.87e9, 7.5e9),
    "host memory": Storage(float("inf"), float("inf")),
    "Mooncake over TCP": Storage(694 * 2.0**20, 912 * 2.0**20),
}
"""A file, as the connector of that release writes it: `embedding_file.txt`, measured on a machine of ours; no time but
that of the link; and the store that was measured with a later connector (vLLM pull request 47302)."""


def one_encoder(
    n_images: int,
    engine: EngineProfile,
    *,
    storage: Storage = STORAGES["file"],
    encoder_answers: bool = True,
    deal: Callable[[int], Ints] | None = None,
) -> EncoderApart:
    """Return an encoder's instance and three of prefill and decode, each with its server, behind a proxy.

    Parameters
    ----------
    n_images : int
        Pictures of every request.
    engine : EngineProfile
    storage : Storage
    encoder_answers : bool
        Whether the encoder's server spends on a picture what a request costs for one token of its answer, or all of
        what a request costs.
    deal : callable, optional
        Which instance takes each of so many requests; the proxy draws at random.
    """
    rank = _rank(engine)
    n_bytes = rank.embedding_bytes(rank.media(PICTURE, n_images))
    answer_s = engine.request_host_s / OUTPUT_TOKENS if encoder_answers else engine.request_host_s
    coder = _rank(engine.model_copy(update={"request_host_s": answer_s}))
    link_s = n_bytes / _host_link_bytes_per_s()
    put_s, get_s = link_s + n_bytes / storage.put_bytes_per_s, link_s + n_bytes / storage.get_bytes_per_s
    encodes = EncodesOnly(coder, step_host_s=engine.step_host_s, copy_s=put_s)
    loads = LoadsEmbeddings(rank, n_images, copy_s=get_s)
    return EncoderApart(
        Instance(_one(ENCODER_TOKENS), encodes),
        Instance(_one(), loads),
        deal or drawn,
    )


def drawn(n: int) -> Ints:
    """Return the instance of each request, drawn."""
    return np.random.default_rng(DEAL_SEED).integers(LANGUAGE, size=n)


def _one(token_budget: int | None = None) -> ServingPlan:
    pool = Pool(hardware=HARDWARE, engine=ENGINE, max_batch=MOST_SEQUENCES, token_budget=token_budget)
    return ServingPlan(model=MODEL, pools=(pool,))


def _host_link_bytes_per_s() -> float:
    """Return how fast a device and its host copy [bytes/s]."""
    return next(link for link in load_hardware(HARDWARE).links if link.topology == "host").bandwidth_bytes_per_s


TOPOLOGIES: Final[Mapping[str, Topology]] = {"DP4": dp4, "1E3PD": one_encoder}


def _rank(engine: EngineProfile) -> StepService:
    """Return the service of one device."""
    plan = ServingPlan(model=MODEL, pools=(Pool(hardware=HARDWARE, engine=ENGINE),))
    capacity = StepService.of(plan).capacity
    return StepService(StepModel.of(MODEL, HARDWARE, engine=engine), capacity)


def traffic(text_tokens: int, n_images: int, rate: float, *, n: int = PROMPTS, seed: int = 0) -> Requests:
    """Return the requests of a run: Poisson, pictures all different."""
    arrival_s = arrival_times("poisson", rate, n, np.random.default_rng([seed, 1]))
    items = Items.same(n, n_images, PICTURE)
    return requests_of(arrival_s, np.full(n, text_tokens), np.full(n, OUTPUT_TOKENS), items=items, name="random-mm")


def predict_run(deployment: Deployment, requests: Requests) -> dict[str, float]:
    """Return every metric of a run."""
    times = deployment.served(requests)
    done = ~np.isnan(times.finish_s)
    if not done.any():
        raise RuntimeError("no request of the run has finished; the deployment takes none")
    ttft = Spread.of((times.first_token_s - times.arrival_s)[done])
    gaps = requests.output_tokens[done] - 1
    tpot = Spread.of((times.finish_s - times.first_token_s)[done] / gaps)
    span_s = float(np.nanmax(times.finish_s) - times.arrival_s.min())
    values = {THROUGHPUT: done.sum() / span_s, TTFT: 1e3 * (ttft.p99 or 0.0), TPOT: 1e3 * (tpot.p99 or 0.0)}
    return {name: float(value) for name, value in values.items()}


def predict_curves(
    topologies: Mapping[str, Topology] = TOPOLOGIES,
    *,
    texts: Sequence[int] = TEXTS,
    images: Sequence[int] = IMAGES,
    rates: Sequence[float] = RATES,
    engine: EngineProfile | None = None,
    seed: int = 0,
) -> list[CurvePoint]:
    """Return the curves of deployments: a run for each text, number of pictures and rate."""
    engine = engine or load_engine(ENGINE)
    points: list[CurvePoint] = []
    for name, topology in topologies.items():
        for n_images in images:
            deployment = topology(n_images, engine)
            for text in texts:
                for rate in rates:
                    found = predict_run(deployment, traffic(text, n_images, rate, seed=seed))
                    head: dict[str, Any] = {"text_tokens": text, "images": n_images, "topology": name}
                    points += [CurvePoint(**head, offered_rps=rate, metric=m, value=v) for m, v in found.items()]
    return points


def predicted_beside(points: Iterable[CurvePoint], topology: Topology, engine: EngineProfile) -> Array:
    """Return what is predicted for each measured value, shape (n_points,)."""
    deployments: dict[int, Deployment] = {}
    runs: dict[tuple[int, int, str, float], dict[str, float]] = {}
    values: list[float] = []
    for point in points:
        if point.images not in deployments:
            deployments[point.images] = topology(point.images, engine)
        if point.run not in runs:
            requests = traffic(point.text_tokens, point.images, point.offered_rps)
            runs[point.run] = predict_run(deployments[point.images], requests)
        values.append(runs[point.run][point.metric])
    return np.array(values)


def fitted_engine(request_s: float, picture_s: float, layer_s: float) -> EngineProfile:
    """Return the engine with other constants: the server's time a request and a picture, the host's a layer [s]."""
    engine = load_engine(ENGINE)
    pre = engine.preprocessing
    coded_s = float(pre.decode_s(PICTURE.codec, PICTURE.pixels))
    pre = pre.model_copy(update={"resize_s_per_pixel": (picture_s - coded_s) / PICTURE.pixels})
    layers = dict.fromkeys(("encode", "prefill", "decode"), layer_s)
    return engine.model_copy(update={"request_host_s": request_s, "layer_host_s": layers, "preprocessing": pre})


def calibrate(topology: Topology = dp4) -> tuple[Array, Array]:
    """Fit three constants of the host to throughputs and TPOT of the published curve; TTFT is left to check.

    Returns
    -------
    constants : ndarray, shape (3,)
        Arguments of `fitted_engine` [s].
    errors : ndarray, shape (3,)
        Their standard errors by the derivatives at the optimum, relative.
    """
    from scipy.optimize import least_squares

    points = [point for point in measured_points() if point.metric in WEIGHTS]
    weights = np.array([WEIGHTS[point.metric] for point in points])
    target = np.log([point.value for point in points])

    def residuals(scale: Array) -> Array:
        found = predicted_beside(points, topology, fitted_engine(*(scale * START)))
        missed: Array = weights * (np.log(found) - target)
        return missed

    fit = least_squares(residuals, np.ones(3), diff_step=STEP, bounds=(0.1, 10.0), max_nfev=MOST_CALLS)
    covariance = np.linalg.inv(fit.jac.T @ fit.jac) * 2 * fit.cost / (len(points) - len(fit.x))
    return fit.x * START, np.sqrt(np.diag(covariance)) / fit.x


def write_predictions(path: Path = PREDICTIONS) -> None:
    """Write the curves of all topologies, with the constants of the engine file and nothing else."""
    names = [name for name in CurvePoint.model_fields if name != "quality"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for point in predict_curves():
            writer.writerow([f"{v:.6g}" if isinstance(v := getattr(point, name), float) else v for name in names])


def main() -> None:
    """Calibrate, or write the report, the figure and the predictions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calibrate", action="store_true", help="fit the constants anew and print them (minutes)")
    if parser.parse_args().calibrate:
        for name, topology in (("ranks in step", dp4), ("independent ranks", independent4)):
            constants, errors = calibrate(topology)
            shown = ", ".join(f"{c * 1e3:.3f} ms ±{e:.1%}" for c, e in zip(constants, errors, strict=True))
            print(f"{name}: a request, a picture, a layer: {shown}")
        return
    from studies.validation.vllm_epd_report import write_report

    write_predictions()
    write_report()


if __name__ == "__main__":
    main()
