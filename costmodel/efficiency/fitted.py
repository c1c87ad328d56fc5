"""Fitted files: the parameters of curves with their data, their errors and their bands, as `calibrate` writes them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from costmodel.base import Frozen, FrozenMap
from costmodel.efficiency.attention_curve import AttentionCurve, Tiling
from costmodel.efficiency.collective import CustomCurve, NcclCurve
from costmodel.efficiency.common import Curve
from costmodel.efficiency.cpu_gemm import CpuGemmCurve
from costmodel.efficiency.decode import DecodeCurve
from costmodel.efficiency.elementwise import ElementwiseCurve
from costmodel.efficiency.gemm import GemmCurve
from costmodel.efficiency.moe import MoeCurve
from costmodel.errors import one_line, unknown
from costmodel.sources import Source

CURVES: Final[Mapping[str, type[Curve]]] = {
    "gemm": GemmCurve,
    "prefill_attention": AttentionCurve,
    "encoder_attention": AttentionCurve,
    "decode_attention": DecodeCurve,
    "moe_gemm": MoeCurve,
    "collective": NcclCurve,
    "elementwise": ElementwiseCurve,
}
CUSTOM: Final = "custom_all_reduce"
ON_CPU: Final = ".cpu"
"""Ends the variant of products on a CPU, whose curve has another form, such as `fp32.cpu`."""
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class FittedSize(Frozen):
    """Errors on held-out rows of one range of sizes, and the band of measured over predicted time.

    Parameters
    ----------
    size : str
        The range, or `all`.
    up_to : float or None
        Its upper end, in the column that `FittedCurve.by` names.
    low, high : float
        Band as shares of the prediction: 0.2 is 20 % slower.
    rows : int
        Held-out rows; none, and no errors, where the split holds no family out.
    median, mean, p90 : float or None
        Of |predicted/measured - 1|.
    bias : float or None
        Median of predicted/measured - 1.
    coverage : float or None
        Share of the rows inside the band.
    """

    size: str
    up_to: NotNegative | None = None
    low: Annotated[float, Field(gt=-1)]
    high: Annotated[float, Field(gt=-1)]
    rows: Count
    median: NotNegative | None = None
    mean: NotNegative | None = None
    p90: NotNegative | None = None
    bias: Annotated[float, Field(gt=-1)] | None = None
    coverage: Share | None = None


class UnseenDevice(Frozen):
    """Errors on held-out rows of a device whose rows were in no fit.

    Parameters
    ----------
    device : str
        Which.
    rows : int
        Held-out rows; no errors without any.
    median, mean, p90, bias : float or None
        As in `FittedSize`.
    coverage : float or None
        Share of the rows inside the bands that the other devices alone give.
    repaired : float or None
        Median error once one large product and one stream of weights of the device have set two shares.
    """

    device: str
    rows: Count
    median: NotNegative | None = None
    mean: NotNegative | None = None
    p90: NotNegative | None = None
    bias: Annotated[float, Field(gt=-1)] | None = None
    coverage: Share | None = None
    repaired: NotNegative | None = None


class FittedCurve(Frozen):
    """One fitted curve.

    Parameters
    ----------
    kind, variant : str
        What it is for, such as gemm and bf16.
    version : str
        Version of the library.
    rows, train_rows, train_families : int
        Rows of the table, those that were drawn for the fit, and their families.
    fitted_parameters : int
        How many of the parameters were free.
    by : str
        Column of the shape by which errors and bands are kept apart.
    parameters : mapping
        Fields of the curve.
    query_tiles, packed, pad
        How the library cuts attention; see `Tiling`.
    ring : mapping
        Parameters of NCCL's all-reduce behind a custom one.
    devices : tuple of str
        In a file of shared curves, those that it was fitted to; rows are all of theirs, families those of the device
        that has most.
    left_out : tuple of UnseenDevice
        Each of several devices under the curve that the others share.
    beyond : tuple of UnseenDevice
        Devices that are like none of them, under the shared curve; covered by the band that is wider for those.
    sizes : tuple of FittedSize
        Errors and bands, `all` last; of shared curves those of all left-out devices, and for an unseen device.
    """

    kind: str
    variant: str
    version: str = ""
    rows: Count
    train_rows: Count
    train_families: Count
    fitted_parameters: Annotated[int, Field(ge=1, le=20)]
    by: str
    query_tiles: tuple[int, ...] = ()
    packed: bool = False
    pad: int = 16
    parameters: FrozenMap[float]
    ring: FrozenMap[float] = Field(default_factory=dict, validate_default=True)
    devices: tuple[str, ...] = ()
    left_out: tuple[UnseenDevice, ...] = ()
    beyond: tuple[UnseenDevice, ...] = ()
    sizes: tuple[FittedSize, ...]

    @model_validator(mode="after")
    def _is_a_curve(self) -> FittedCurve:
        if self.kind not in CURVES:
            raise ValueError(f"kind={self.kind!r} is no kind with a curve; known: {', '.join(CURVES)}")
        self.curve()
        return self

    def curve(self) -> Curve:
        """Return the parameters as what the formulas take."""
        form = CustomCurve if self.variant.partition(".")[0] == CUSTOM else CURVES[self.kind]
        if self.kind == "gemm" and self.variant.endswith(ON_CPU):
            form = CpuGemmCurve
        return form.model_validate(dict(self.parameters))

    def tiling(self) -> Tiling:
        """Return how the library cuts attention."""
        return Tiling(self.query_tiles or (64, 128), self.packed, self.pad)


class FittedProfile(Frozen):
    """The curves of one kernel library on one device.

    Parameters
    ----------
    device, library : str
        Whose; the device is `shared` where several devices have one curve.
    fitted_on : str
        Date.
    seed : int
        Of the rows that were drawn.
    split : str
        The rule by which families were held out.
    sources : tuple of Source
        The tables, with their commit.
    curves : tuple of FittedCurve
    """

    schema_version: Literal[1]
    device: str
    library: str
    fitted_on: str
    seed: int
    split: str
    sources: tuple[Source, ...]
    curves: tuple[FittedCurve, ...]

    def find(self, kind: str, variant: str) -> FittedCurve:
        """Return a curve.

        Raises
        ------
        LookupError
            If there is none.
        """
        for curve in self.curves:
            if (curve.kind, curve.variant) == (kind, variant):
                return curve
        names = (f"{curve.kind}.{curve.variant}" for curve in self.curves)
        raise unknown(f"curve of {self.library} on {self.device}", f"{kind}.{variant}", names)


def read_fitted(text: str, source: str) -> FittedProfile:
    """Return the profile that a file holds.

    Raises
    ------
    ValueError
        If it is no such file, with one line that says where.
    """
    try:
        values: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source} is no TOML file: {error}") from None
    try:
        return FittedProfile.model_validate(values)
    except ValidationError as error:
        raise one_line(error, source) from None
