"""What ``python -m dopsd.plan`` prints."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dopsd.distillation import Distillation
from dopsd.errors import RunError, must_be, require
from dopsd.files import first_line, read_json
from dopsd.memory.dry_run import DryProbe, DryRun
from dopsd.memory.options import parse_plan
from dopsd.memory.planner import Planner, remedies, too_little, workspace_for
from dopsd.memory.scale import share_of
from dopsd.models import MODELS, SHIPPED, class_of, of_adapters
from dopsd.models.bidirectional import BidirectionalModel
from dopsd.models.checkpoint import read_config
from dopsd.sampler import check_decoding
from dopsd.step_batch import Reuse
from dopsd.tables import show
from dopsd.units import gib, read_bytes

log = logging.getLogger(__name__)


def read_architecture(path: str, block_size: int | None = None) -> Any:
    """The configuration in a config.json, a folder with one or a hub model, with that ``block_size`` if there is one.

    Raises:
        UsageError: there is none, or it is of a family whose layers are not this project's.
        RunError: it can't be read, or asks for what is not implemented.
    """
    found = Path(SHIPPED.get(path, path))
    require(found.is_file() or found.suffix != ".json", "model_config", path, "there is no such file")
    fields = read_json(found) if found.is_file() else read_config(path, str(found), SHIPPED)
    network: Any = class_of(path, fields)
    accepted = f"only {', '.join(MODELS)} are planned without weights; a run's --memory_budget plans for any model"
    require(issubclass(network, BidirectionalModel), "model_config", path, accepted)
    try:
        config = network.config_class(**fields)
        if block_size is not None:
            config.block_size = block_size
        return config
    except (ValueError, TypeError) as error:
        raise RunError(f"model_config={path!r} can't be used: {first_line(error)}") from error


def options(run: DryRun, limit: int, sequences: int) -> list[dict[str, str]]:
    """Rows with the states that fit, and their peak, for each reuse, weights and with and without checkpointing."""
    rows = []
    for reuse in get_args(Reuse):
        if run.block_causal and reuse == "prompt":
            continue
        for quantize in ("none", "nf4"):
            probe = DryProbe(run, reuse, quantize)
            planner = Planner(probe, limit, run.states(), sequences, run.workspace_bytes)
            for checkpointing in (False, True):
                states = planner.most(checkpointing)
                rows.append(
                    {
                        "reuse": reuse,
                        "weights": "as stored" if quantize == "none" else quantize,
                        "checkpointing": "yes" if checkpointing else "no",
                        "states": str(states) if states else "-",
                        "tokens": str(probe.tokens(states)) if states else "-",
                        "peak GiB": gib(probe.training(states or 1, checkpointing)),
                    }
                )
    return rows


def main(argv: Sequence[str]) -> None:
    """Parse, plan, print."""
    arguments, model, _, rollouts, teaching, args = parse_plan(argv)
    limit = read_bytes("gpu", arguments.gpu, None)
    accepted = "only d_opsd is planned without weights; a run's --memory_budget plans for any method"
    require(teaching.method == "d_opsd", "method", teaching.method, accepted)
    config = read_architecture(arguments.model_config or model.model, model.block_size)
    context = config.max_position_embeddings - arguments.prompt_length
    must_be(rollouts.gen_length <= context, "gen_length", rollouts.gen_length, f"at most {context}, for the context")
    workspace = workspace_for(limit, "cuda")
    processes = arguments.nodes * arguments.gpus
    sharing = 1 if args.fsdp is None else processes
    hint = "one process has none to share weights with: --nodes or --gpus say how many there are"
    require(args.fsdp is None or processes > 1, "fsdp", args.fsdp, hint)
    require(sharing == 1 or model.quantize != "int8", "quantize", model.quantize, "such weights can't be shared")
    run = DryRun(config, model, rollouts, teaching, args, arguments.prompt_length, workspace, sharing)
    check_decoding(run.network, rollouts.decoding())
    Distillation.check_model(run.network, teaching)
    probe = DryProbe(run, teaching.reuse if teaching.drift_limit is None else "none", model.quantize)
    planner = Planner(probe, limit, run.states(), rollouts.sequences_per_forward, workspace)
    plan = planner.plan()
    if plan is None:
        for curve in (planner.training[True], planner.decoding):
            curve.largest(sys.maxsize, [1])  # here nothing has to fit for its peak to be known
        raise too_little("gpu", arguments.gpu, planner.least(), remedies(model, rollouts, teaching, args, "cuda"))
    adapters = sum(p.numel() for p in of_adapters(run.network).values())
    base = sum(p.numel() for p in run.network.parameters()) - adapters
    trained = sum(p.numel() for p in run.network.parameters() if p.requires_grad)
    log.info(f"{base:,} parameters, and {trained:,} that are trained; {run.states()} states an update")
    log.info(f"predicted, not measured: {plan}")
    plan.show()
    share = share_of(run, plan, processes, model.quantize, arguments.pass_rate)
    if processes > 1:
        log.info(
            f"{processes} processes: each holds {share.held:,} of {share.parameters:,} parameters; its share of an "
            f"update (prompts: {share.prompts}) is {share.operations / 1e12:,.0f} TFLOP and "
            f"{share.received / 1e9:,.2f} GB over the network; if {arguments.pass_rate:.0%} of tries are right it "
            f"waits for others {1 - share.operations / share.longest:.0%} of the time that this takes"
        )
    if arguments.tflops is not None and arguments.network is not None:
        seconds = share.seconds(arguments.tflops, arguments.network)
        rates = f"{arguments.tflops:g} TFLOP/s and {arguments.network:g} GB/s"
        log.info(f"at {rates} that is {seconds:,.1f} s, waiting included, if nothing overlaps: a prediction")
    if sharing > 1:
        return  # the table is of other weights too
    rows = options(run, limit, rollouts.sequences_per_forward)
    show(rows, f"what fits in {gib(limit)} GiB: predicted, not measured")
