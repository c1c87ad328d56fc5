"""SimPy simulator of serving: many requests through queues, caches, links and policies; systems and the planner."""
