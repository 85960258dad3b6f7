"""What an update takes of each process of several, by arithmetic alone: no figure here is measured."""

from __future__ import annotations

from typing import NamedTuple

from dopsd.memory.dry_run import DryRun
from dopsd.memory.planner import Plan
from dopsd.models import has_copies, uncopied

# Operations of a parameter and token, of which half are multiplications: a pass, and the gradient of its inputs or of
# itself. Frozen weights have none of their own, and adapters are small.
PASS = GRADIENT = 2


class Share(NamedTuple):
    """One process's share of an update.

    Args:
        held: parameters that it holds between two passes.
        parameters: of all.
        prompts: that it adds to the batch.
        operations: floating-point ones of the layers' products, with one try at each prompt; attention's, and those of
            the LM head, which few positions meet, are left out.
        received: bytes over the network.
    """

    held: int
    parameters: int
    prompts: int
    operations: float
    received: float

    def seconds(self, tflops: float, network: float) -> float:
        """At these rates (10^12 operations and 10^9 bytes a second), if nothing overlaps and nobody waits."""
        return self.operations / (tflops * 1e12) + self.received / (network * 1e9)


def share_of(run: DryRun, plan: Plan, processes: int, quantize: str) -> Share:
    """That of each of so many ``processes``, which share the weights, stored as ``quantize`` says, if ``run``'s do."""
    everything, trained = list(run.network.parameters()), [p for p in run.network.parameters() if p.requires_grad]
    layers = [p for layer in run.network.layers for p in layer.parameters()]
    parameters = sum(p.numel() for p in everything)
    # A pass is through a weight, or its copy.
    computed = sum(p.numel() for layer in run.network.layers for p in uncopied(layer).values())
    weights, of_layers, gradients = (run.stored(some, quantize) for some in (everything, layers, trained))

    options, updates = run.args, run.teaching.updates_per_batch
    decoding = run.rollouts.decoding()
    learnt = plan.tokens * run.states() / plan.sizes.states_per_forward
    decoded = options.train_batch_size / updates * decoding.total_steps * (run.prompt_length + decoding.gen_length)
    passes = 2 * PASS + GRADIENT + PASS * plan.sizes.checkpointing  # teacher, student, and perhaps the student again
    passes += GRADIENT * has_copies(run.network)
    operations = computed * (learnt * passes + decoded * PASS)

    others = (processes - 1) / processes
    if run.sharing > 1:
        # Layers are gathered for each side's pass and for the gradient, the embedding and the head once; for a batch's
        # rollouts all is.
        batches = -(-run.states() // plan.sizes.states_per_forward)
        received = others * (batches * (2 * of_layers + weights + gradients) + weights / updates)
    else:
        received = 2 * others * gradients
    return Share(-(-parameters // run.sharing), parameters, options.train_batch_size, operations, received)
