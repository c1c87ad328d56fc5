"""True counts from the real `transformers` code, independent of our cost model."""
