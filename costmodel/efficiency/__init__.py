"""How fast kernels run: physical curves with few parameters, fitted to measured kernels by `runtime.calibrate`.

Every curve is a pure function of a shape, a device (`Chip`) and a frozen set of parameters, and never falls with work.
"""

from costmodel.efficiency.attention import attention_s
from costmodel.efficiency.attention_curve import AttentionCurve, Tiling
from costmodel.efficiency.collective import CustomCurve, NcclCurve, custom_all_reduce_s, nccl_s
from costmodel.efficiency.common import Chip, Curve
from costmodel.efficiency.cpu_gemm import CpuGemmCurve, cpu_gemm_s
from costmodel.efficiency.decode import DecodeCurve, decode_attention_s
from costmodel.efficiency.elementwise import ElementwiseCurve, elementwise_s
from costmodel.efficiency.gemm import GemmCurve, gemm_s
from costmodel.efficiency.moe import MoeCurve, Routing, moe_s

__all__ = [
    "AttentionCurve",
    "Chip",
    "CpuGemmCurve",
    "Curve",
    "CustomCurve",
    "DecodeCurve",
    "ElementwiseCurve",
    "GemmCurve",
    "MoeCurve",
    "NcclCurve",
    "Routing",
    "Tiling",
    "attention_s",
    "cpu_gemm_s",
    "custom_all_reduce_s",
    "decode_attention_s",
    "elementwise_s",
    "gemm_s",
    "moe_s",
    "nccl_s",
]
