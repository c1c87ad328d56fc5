"""Reality beside the model: a reference LVLM in PyTorch, its measurements, and the torch-free calibrate and compare."""
