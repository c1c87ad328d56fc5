"""SimPy simulator of serving: many requests through queues, caches, links and policies; systems and the planner."""

from simulator.engine import simulate
from simulator.request import Requests
from simulator.serving_plan import ServingPlan, Slo
from simulator.topology import Pool
from simulator.trace import Trace

__all__ = ["Pool", "Requests", "ServingPlan", "Slo", "Trace", "simulate"]
