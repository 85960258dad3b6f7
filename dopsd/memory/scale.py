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
        operations: floating-point ones of the layers' products, in the mean over processes; attention's, and those of
            the LM head, which few positions meet, are left out.
        longest: those that pass until the last is done: a round of tries, or of micro-batches, takes as long as the
            process that has most of them, and others wait for it.
        received: bytes over the network.
    """

    held: int
    parameters: int
    prompts: int
    operations: float
    longest: float
    received: float

    def seconds(self, tflops: float, network: float) -> float:
        """At these rates (10^12 operations and 10^9 bytes a second), if nothing overlaps."""
        return self.longest / (tflops * 1e12) + self.received / (network * 1e9)


def rounds(prompts: float, pass_rate: float, most: int) -> list[float]:
    """Expected tries in each round at so many prompts: as many again as were made, at each that is still wrong.

    Args:
        prompts: of all processes.
        pass_rate: the probability that a try is right, of each alike.
        most: tries at a prompt (``--pass_k``).
    """
    made, found = 0, []
    while made < most and (left := prompts * (1 - pass_rate) ** made) > 0:
        width = min(max(1, made), most - made)
        found.append(left * width)
        made += width
    return found


def turns(things: float, processes: int) -> float:
    """How many of so many things, of which the last may be less than one, the process does that has most of them."""
    each, more = divmod(int(things), processes)
    return each + (1 if more else things % 1)


def share_of(run: DryRun, plan: Plan, processes: int, quantize: str = "none", pass_rate: float = 1.0) -> Share:
    """That of each of so many ``processes``, which share the weights, stored as ``quantize`` says, if ``run``'s do."""
    everything, trained = list(run.network.parameters()), [p for p in run.network.parameters() if p.requires_grad]
    layers = [p for layer in run.network.layers for p in layer.parameters()]
    parameters = sum(p.numel() for p in everything)
    # A pass is through a weight, or its copy.
    computed = sum(p.numel() for layer in run.network.layers for p in uncopied(layer).values())
    weights, of_layers, gradients = (run.stored(some, quantize) for some in (everything, layers, trained))

    options, updates = run.args, run.teaching.updates_per_batch
    decoding = run.rollouts.decoding()
    prompts, most = options.train_batch_size * processes / updates, run.rollouts.pass_k
    tries = rounds(prompts, pass_rate, most)
    decoding_one = decoding.total_steps * (run.prompt_length + decoding.gen_length) * PASS * computed
    # Teacher, student and its gradient, perhaps the student again, and of trained weights their own.
    passes = 2 * PASS + GRADIENT + PASS * plan.sizes.checkpointing + GRADIENT * has_copies(run.network)
    learnt = run.states() / plan.sizes.states_per_forward * processes  # micro-batches, if every prompt is accepted
    learnt *= 1 - (1 - pass_rate) ** most
    learning_one = plan.tokens * passes * computed
    operations = (sum(tries) * decoding_one + learnt * learning_one) / processes
    in_turn = sum(turns(count, processes) for count in tries)  # all meet after each round
    longest = in_turn * decoding_one + turns(learnt, processes) * learning_one

    others = (processes - 1) / processes
    if run.sharing > 1:
        # Layers are gathered for each side's pass and for the gradient, the embedding and the head once; for a batch's
        # rollouts all is.
        batches = -(-run.states() // plan.sizes.states_per_forward)
        received = others * (batches * (2 * of_layers + weights + gradients) + weights / updates)
    else:
        received = 2 * others * gradients
    return Share(-(-parameters // run.sharing), parameters, options.train_batch_size, operations, longest, received)
