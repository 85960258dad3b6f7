"""``python -m dopsd_kernels.publish FOLDER``: these ops as a repository for the Kernel Hub.

A pure Triton kernel is the same files for every backend, each in a folder of its own under ``build``, with a name and a
namespace of operators that no other version has. Beside them is the source that ``kernel-builder`` makes the same of.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parent
NAME, VERSION, LICENSE = "dopsd-kernels", 1, "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
# What a build has in another form, or not at all.
LEFT_OUT = ("_ops.py", Path(__file__).name, "py.typed", "__pycache__")

BUILD = f"""\
[general]
edition = 5
name = "{NAME}"
version = {VERSION}
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "{{repo_id}}"

[torch-noarch]
pyext = ["py", "json"]

[kernel]
"""
FLAKE = """\
{
  description = "Ops for distillation and decoding of diffusion language models";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
OPS = '''\
"""The namespace of this build's operators in ``torch.ops``."""

import torch

ops = getattr(torch.ops, "{namespace}")


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{namespace}::{{op_name}}"
'''
CARD = f"""\
---
license: {LICENSE.lower()}
library_name: kernels
tags: [kernels, distillation, diffusion-language-model]
---
# {NAME}

Ops that never hold rows x vocabulary logits, for distillation and decoding of language models: Triton kernels on
a GPU, plain PyTorch elsewhere.

```python
import torch
from kernels import get_kernel

dopsd_kernels = get_kernel("{{repo_id}}", version={VERSION}, trust_remote_code=True)
student, teacher, lm_head = torch.randn(6, 64), torch.randn(6, 64), torch.randn(1000, 64)  # (N, d), (N, d), (V, d)
out = dopsd_kernels.fused_step_kl(student, teacher, lm_head, divergence="reverse_kl", clip=0.05)
print(out.loss, out.row_kl)
```

| op | what it computes |
|---|---|
| `fused_step_kl` | a clipped divergence between two LM heads' distributions, with its gradient |
| `fused_token_logprob` | log-probabilities of given tokens and entropies, with gradients |
| `fused_confidence` | token, probability, top-k and reproducible Gumbel samples of LM-head rows |
| `prefix_attention` | attention of many short sequences over one prefix |

Needs torch 2.11 and, on a GPU, Triton 3.6. Docstrings say shapes, dtypes and errors; `reference.py` has every op in
a few lines of PyTorch.
"""
TEST = '''\
"""The op of this repository against its definition."""

import dopsd_kernels
import pytest
import torch


@pytest.mark.kernels_ci
def test_step_kl():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    student, teacher, head = (torch.randn(*shape, device=device) for shape in ((6, 64), (6, 64), (100, 64)))
    s, t = ((rows.double() @ head.double().T).log_softmax(-1) for rows in (student, teacher))
    out = dopsd_kernels.fused_step_kl(student, teacher, head)
    torch.testing.assert_close(out.row_kl.double(), (s.exp() * (s - t)).sum(-1), rtol=1e-4, atol=1e-4)
'''


def publish(folder: Path, repo_id: str) -> None:
    """Write the repository.

    Args:
        folder: new, or empty.
        repo_id: of the repository on the hub, as OWNER/NAME.

    Raises:
        ValueError: there is something in ``folder``.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} must be new or empty")
    source = folder / "torch-ext" / PACKAGE.name
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    digest = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes())
    for backend in BACKENDS:
        build, unique = folder / "build" / f"torch-{backend}", f"_{PACKAGE.name}_{backend}_{digest.hexdigest()[:7]}"
        shutil.copytree(source, build)
        (build / "_ops.py").write_text(OPS.format(namespace=unique))
        metadata = {"name": NAME, "id": unique, "version": VERSION, "license": LICENSE, "python-depends": []}
        (build / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": backend}}, indent=2) + "\n")
    tests = folder / "tests"
    tests.mkdir()
    (tests / f"test_{PACKAGE.name}.py").write_text(TEST)
    (folder / "build.toml").write_text(BUILD.format(repo_id=repo_id))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "README.md").write_text(CARD.format(repo_id=repo_id))


def main() -> None:
    """Parse, write, say how to go on."""
    parser = argparse.ArgumentParser(
        prog="python -m dopsd_kernels.publish", description="A repository for the Kernel Hub."
    )
    parser.add_argument("folder", type=Path, help="where it is written: new, or empty")
    parser.add_argument("--repo_id", default=f"OWNER/{NAME}", help="of the repository on the hub")
    arguments = parser.parse_args()
    try:
        publish(arguments.folder, arguments.repo_id)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.folder}: to be uploaded with `kernel-builder upload`, or tried with kernels.get_local_kernel")


if __name__ == "__main__":
    main()
