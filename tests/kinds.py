"""One model of every kind of layer: what holds whatever a model is made of is tested on these."""

MULTI_HEAD = "llava-1.5-7b"
GROUPED = "qwen2.5-vl-7b"  # four key/value heads; windows in the encoder
TILED = "internvl3-8b"
SLIDING = "gemma-3-4b"  # five of six layers see 1024 tokens; pictures see themselves in both directions
CROSS = "llama-3.2-11b-vision"
LATENT = "kimi-vl-a3b"  # a dense layer, then 64 experts of which a token uses 6, and shared ones
EXPERTS = "qwen3-vl-30b-a3b"  # 128 experts of which a token uses 8
RECURRENT = "qwen3.5-35b-a3b"  # three of four layers are recurrent; 256 experts of which a token uses 8
TEXT_ONLY = "llama-3.1-8b"

DENSE = (MULTI_HEAD, GROUPED, TILED)
"""One kind of layer from the first to the last."""
KINDS = (*DENSE, SLIDING, CROSS, LATENT, EXPERTS, RECURRENT)
WITH_EXPERTS = (LATENT, EXPERTS, RECURRENT)
