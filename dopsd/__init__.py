"""d-OPSD: on-policy self-distillation of diffusion language models from their own future tokens."""

from importlib.util import find_spec

_missing = [name for name in ("transformers", "peft", "accelerate") if find_spec(name) is None]
if _missing:
    # With this package's name, `python -m dopsd.train` prints the sentence without a traceback.
    raise ImportError(f"dopsd needs {', '.join(_missing)}: pip install 'dopsd[train]'", name=__name__)
