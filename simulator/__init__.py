"""SimPy simulator of serving: many requests through queues, caches, links and policies; systems and the planner."""

from simulator import traffic
from simulator.engine import simulate
from simulator.laws import check
from simulator.report import Report, report
from simulator.request import Requests
from simulator.scaling import scalability
from simulator.serving_plan import ServingPlan, Slo
from simulator.sweep import sweep
from simulator.topology import Pool
from simulator.trace import Trace

__all__ = [
    "Pool",
    "Report",
    "Requests",
    "ServingPlan",
    "Slo",
    "Trace",
    "check",
    "report",
    "scalability",
    "simulate",
    "sweep",
    "traffic",
]
