"""The namespace of this package's operators in ``torch.ops``.

In a repository for the Kernel Hub another file has this one's place, with a namespace of that build alone: several
versions may then be loaded in one process.
"""


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"dopsd::{op_name}"
