"""Joules and CO2 of a request, from the power of each stage."""

from __future__ import annotations

from costmodel.engine import EngineProfile
from costmodel.hardware import HardwareProfile


def stage_power_w(hardware: HardwareProfile, engine: EngineProfile, compute_share: float) -> float:
    """Return the power of one device in a stage [W].

    Parameters
    ----------
    compute_share : float
        Share of the stage's time in which compute is the limit; memory is in the rest.

    Notes
    -----
    A device at its compute roof draws its limit, at its memory roof the share that the engine's file states
    (Splitwise, A100).
    """
    fraction = compute_share * engine.compute_power_fraction + (1 - compute_share) * engine.memory_power_fraction
    return hardware.tdp_w * fraction


def energy_per_token_j(tdp_w: float, tpot_s: float) -> float:
    """Return the survey's Eq. 9: the device's limit over the time of one token [J] (arXiv:2604.05546)."""
    return tdp_w * tpot_s


def co2_g(energy_j: float, engine: EngineProfile) -> float:
    """Return the CO2 of this much energy from the grid that the engine's file states [g]."""
    return energy_j * engine.carbon_g_per_j
