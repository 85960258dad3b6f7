"""d-OPSD: on-policy self-distillation of diffusion language models from their own future tokens."""
